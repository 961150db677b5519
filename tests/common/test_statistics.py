"""Intervals and p values against exact enumeration, and against what chance alone brings."""
from itertools import product

import numpy as np
import pytest

from common.statistics import gain, holm, interval, mean_and_spread, p_value, paired


def exact_p(differences):
    """Every choice of signs, one by one."""
    differences = list(differences)
    observed = abs(sum(differences))
    as_far = total = 0
    for signs in product((1, -1), repeat=len(differences)):
        total += 1
        as_far += abs(sum(s * d for s, d in zip(signs, differences))) >= observed - 1e-12
    return as_far / total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_p_of_few_users_is_exact(seed, n):
    differences = np.random.default_rng(seed).normal(.3, 1, n).round(1)
    assert p_value(differences) == pytest.approx(exact_p(differences))


@pytest.mark.parametrize("seed", range(3))
def test_p_of_random_signs_is_near_the_exact_one(seed):
    differences = np.random.default_rng(seed).normal(.4, 1, 12)
    exact = exact_p(differences)
    drawn = p_value(differences, draws=4000)    # fewer than 2^12 signs
    assert abs(drawn - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000) + 1 / 4000


def test_users_without_a_difference_change_nothing():
    differences = np.random.default_rng(0).normal(.5, 1, 8)
    assert p_value([*differences, *np.zeros(500)]) == p_value(differences)
    assert p_value(np.zeros(9)) == 1


def test_the_smallest_p_is_not_zero():
    assert p_value(np.ones(5000), draws=99) == 1 / 100


def test_blocks_of_signs_change_nothing(monkeypatch):
    differences = np.random.default_rng(0).normal(.05, 1, 300)
    whole = p_value(differences, draws=500)
    monkeypatch.setattr("common.statistics.BLOCK", 300 * 7)
    again = p_value(differences, draws=500)
    assert abs(whole - again) < .1    # other draws, the same test


def test_two_equal_models_are_called_different_as_often_as_the_level_says():
    """Ranks of two models that are equally good: 5 % of the p values are below .05, no more than
    chance allows."""
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(400):
        mine, theirs = (rng.geometric(.1, 60) - 1 for _ in range(2))
        called += p_value(gain(mine) - gain(theirs), draws=400) <= .05
    assert called / 400 < .05 + 3 * np.sqrt(.05 * .95 / 400)
    assert called > 5    # nor never


def test_a_better_model_is_called_better():
    rng = np.random.default_rng(0)
    theirs = rng.geometric(.1, 500) - 1
    mine = theirs // 2
    assert p_value(gain(mine) - gain(theirs)) < .001


@pytest.mark.parametrize("p_values, corrected", [
    ([.01], [.01]),
    ([.01, .04, .03], [.03, .06, .06]),
    ([.04, .01, .03, .005], [.06, .03, .06, .02]),
    ([.9, .8], [1., 1.]),
    ([], []),
])
def test_holm_by_hand(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected)


def test_the_interval_is_the_bootstraps():
    """Against all resamples of a small sample, and with the right width for a large one."""
    few = np.array([0., 0., 1.])
    every = sorted(np.mean(few[list(rows)]) for rows in product(range(3), repeat=3))
    low, high = interval(few)
    assert (low, high) == (every[0], every[-1])    # 8 of 27 and 1 of 27 are more than 2.5 %
    many = np.random.default_rng(0).normal(1, 2, 2000)
    low, high = interval(many, draws=2000)
    assert high - low == pytest.approx(2 * 1.96 * 2 / np.sqrt(2000), rel=.1)
    assert low < many.mean() < high
    with pytest.raises(ValueError, match="no users"):
        interval([])


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = interval(rng.normal(.5, 1, 80), draws=300)
        held += low <= .5 <= high
    assert .89 < held / 200 < .99


def test_gain_and_spread():
    assert gain([0, 1, 9, 10], 10).tolist() == [1, 1 / np.log2(3), 1 / np.log2(11), 0]
    assert mean_and_spread([1., 3.]) == (2, pytest.approx(np.sqrt(2)))
    mean, spread = mean_and_spread([1.])
    assert mean == 1
    assert np.isnan(spread)


def test_paired_runs():
    found = paired([0] * 100, [0, 99] * 50)
    assert found["difference"] == pytest.approx(.5)
    assert found["low"] < .5 < found["high"]
    with pytest.raises(ValueError, match="100 and 99 users"):
        paired([0] * 100, [0] * 99)
