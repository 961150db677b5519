"""Whether two models differ: per-user gains, their paired difference, intervals and p values.

Users are the sample: a small p value says that the difference between these trained models would
be found on other users too. It does not say that the methods differ: another seed is another model.
"""
import math
from itertools import product

import numpy as np

BLOCK = 1 << 22    # numbers that are drawn at once


def gain(ranks, k=10):
    """NDCG@k of each user. ranks: 0 = best."""
    ranks = np.asarray(ranks)
    return np.where(ranks < k, 1 / np.log2(ranks.astype(float) + 2), 0)


def interval(differences, draws=10_000, seed=0):
    """The 95 % interval of a mean over users, by the bootstrap: (low, high).

    differences: (U,) of each user. Raises ValueError for none.
    """
    differences = np.asarray(differences, float)
    n = len(differences)
    if n == 0:
        raise ValueError("there are no users to compare")
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(0, n, n)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [.025, .975])
    return float(low), float(high)


def p_value(differences, draws=10_000, seed=0) -> float:
    """Two-sided permutation test of a paired difference: could its sign be chance?

    If two models were alike, each user's difference might as well have the other sign. p is the
    share of such signs whose mean is at least as far from 0, exact where there are few users with
    a difference, else of `draws` random ones (and the true ones, so that p is never 0).
    """
    differences = np.asarray(differences, float)
    differences = differences[differences != 0]
    n = len(differences)
    if n == 0:
        return 1.
    least = abs(differences.sum()) * (1 - 1e-12)    # equal sums may differ in their last bits
    if 2 ** n <= draws:
        signs = np.array(list(product((-1., 1.), repeat=n)))
        return float((abs(signs @ differences) >= least).mean())
    rng = np.random.default_rng(seed)
    as_far = 1
    per_block = max(1, BLOCK // n)
    for first in range(0, draws, per_block):
        rows = min(per_block, draws - first)
        signs = rng.integers(0, 2, (rows, n), dtype=np.int8) * 2 - 1
        as_far += int((abs(signs @ differences) >= least).sum())
    return as_far / (draws + 1)


def holm(p_values) -> list:
    """p values of several comparisons, corrected so that any false alarm is as rare as one was.

    The smallest is multiplied by their number n, the next by n - 1, ...; none is below one before.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = [0.] * len(order)
    largest = 0.
    for left, place in zip(range(len(order), 0, -1), order):
        largest = max(largest, min(1., p_values[place] * left))
        corrected[place] = largest
    return corrected


def paired(a, b, k=10, draws=10_000, seed=0) -> dict:
    """The difference in NDCG@k of two runs' ranks, and its 95 % interval over users.

    a, b: (U,) ranks of the same users in the same order -> {"difference", "low", "high"}. Raises
    ValueError.
    """
    if len(a) != len(b):
        raise ValueError(
            f"the runs rank {len(a)} and {len(b)} users: only runs on the same data set can be "
            f"compared"
        )
    difference = gain(a, k) - gain(b, k)
    return with_interval(difference, draws, seed)


def with_interval(differences, draws=10_000, seed=0) -> dict:
    """The mean of users' differences (U,) and its `interval`: {"difference", "low", "high"}"""
    low, high = interval(differences, draws, seed)
    return {"difference": float(np.mean(differences)), "low": low, "high": high}


def mean_and_spread(values):
    """Mean, and the standard deviation of a sample (nan for one value)."""
    values = np.asarray(values, float)
    spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return float(values.mean()), spread
