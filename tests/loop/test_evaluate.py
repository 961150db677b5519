"""Ranks and metrics against an independent slow implementation, hand-computed cases, and the ways evaluations cheat."""
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_shop

import data as datasets
from evaluate import demo_scale, evaluate, metrics, paired, rank_of_target, ranks_of
from sources import demo


def slow_rank(scores, target, seen=()):
    """Items that score at least as high as the target, one by one."""
    return sum(scores[j] >= scores[target] for j in range(1, len(scores)) if j != target and j not in set(seen))


def slow_metrics(ranks, k):
    """By the definitions: a list of relevance, DCG over ideal DCG, first relevant place."""
    recall = ndcg = mrr = 0.0
    for rank in ranks:
        relevant = [1 if place == rank else 0 for place in range(k)]
        recall += sum(relevant) / 1
        ndcg += sum(r / math.log(place + 2, 2) for place, r in enumerate(relevant)) / (1 / math.log(2, 2))
        mrr += next((1 / (place + 1) for place, r in enumerate(relevant) if r), 0)
    return recall / len(ranks), ndcg / len(ranks), mrr / len(ranks)


@pytest.mark.parametrize("levels", [3, 1000])                    # few levels: many ties
def test_ranks_equal_a_slow_loop(levels):
    g = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (50, 31), generator=g).float()
    target = torch.randint(1, 31, (50,), generator=g)
    seen = torch.randint(0, 31, (50, 12), generator=g)           # zeros, repeats and some targets among them
    seen[:5, 3] = target[:5]
    plain, masked = rank_of_target(scores, target), rank_of_target(scores, target, seen)
    assert plain.dtype == torch.int64
    assert plain.tolist() == [slow_rank(s, t) for s, t in zip(scores.tolist(), target.tolist())]
    assert masked.tolist() == [slow_rank(s, t, h) for s, t, h in zip(scores.tolist(), target.tolist(), seen.tolist())]


def test_metrics_equal_a_slow_loop():
    ranks = np.random.default_rng(0).integers(0, 60, 200)
    for k in (1, 5, 10, 20, 50):
        found = metrics(ranks, (k,))
        assert np.allclose([found[f"recall@{k}"], found[f"ndcg@{k}"], found[f"mrr@{k}"]], slow_metrics(ranks, k), atol=1e-12)


def test_metrics_by_hand():
    found = metrics([0, 2, 10], ks=(5, 10))
    assert found["recall@5"] == pytest.approx(2 / 3)
    assert found["ndcg@5"] == pytest.approx((1 + 1 / 2) / 3)     # log2(2) = 1, log2(4) = 2
    assert found["mrr@5"] == pytest.approx((1 + 1 / 3) / 3)
    assert found["recall@10"] == pytest.approx(2 / 3)            # rank 10 is the eleventh place
    assert set(metrics([0])) == {f"{m}@{k}" for m in ("recall", "ndcg", "mrr") for k in (5, 10, 20, 50)}
    assert all(type(v) is float for v in found.values())
    with pytest.raises(ValueError):
        metrics([])


def test_an_oracle_gets_one_and_a_constant_gets_nothing():
    target = torch.arange(1, 101)
    oracle = torch.nn.functional.one_hot(target, 101).float()
    assert metrics(rank_of_target(oracle, target))["ndcg@5"] == 1
    constant = rank_of_target(torch.zeros(100, 101), target)
    assert constant.tolist() == [99] * 100 and metrics(constant)["recall@50"] == 0


def test_padding_is_never_ranked():
    scores = torch.tensor([[9., 2., 1.]])
    assert rank_of_target(scores, torch.tensor([1])).item() == 0


def test_the_target_is_never_left_out():
    scores = torch.tensor([[0., 3., 2., 1.]])
    assert rank_of_target(scores, torch.tensor([2]), torch.tensor([[2, 1, 1, 0]])).item() == 0
    assert rank_of_target(scores, torch.tensor([2]), torch.tensor([[2, 2, 0, 0]])).item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_raise(bad):
    scores = torch.zeros(3, 5)
    scores[1, 3] = bad
    with pytest.raises(ValueError, match="row 1 "):
        rank_of_target(scores, torch.tensor([1, 2, 3]))


def test_the_inputs_are_left_as_they_were():
    scores, target, seen = torch.randn(4, 9), torch.tensor([1, 2, 3, 4]), torch.tensor([[5], [0], [3], [1]])
    before = scores.clone()
    rank_of_target(scores, target, seen)
    assert torch.equal(scores, before)


class Scorer(torch.nn.Module):
    """Scores by a fixed table of (last item, next item) numbers."""

    def __init__(self, n_items, seed=0):
        super().__init__()
        self.table = torch.randn(n_items + 1, n_items + 1, generator=torch.Generator().manual_seed(seed))
        self.table = (self.table * 4).round()                    # with ties

    def encode_items(self):
        return {"rows": self.table}

    def score(self, batch, table):
        assert set(batch) == {"user", "seq"}                     # a score that reads the target would be an oracle
        return table["rows"][batch["seq"][:, -1]]


@pytest.fixture
def shop_data(tmp_path):
    return datasets.load(write_shop(tmp_path / "shop"), root=tmp_path / "data")


def test_evaluation_equals_a_slow_loop_over_users(shop_data):
    model, cfg = Scorer(shop_data.n_items), SimpleNamespace(max_len=4)
    for split, back in (("valid", 2), ("test", 1)):
        result = evaluate(model, shop_data, cfg, split, "cpu")
        plain, masked = [], []
        for u in range(shop_data.n_users):
            items = shop_data.flat[shop_data.offsets[u]:shop_data.offsets[u + 1]].tolist()
            history, target = items[:-back], items[-back]
            scores = model.table[history[-1]].tolist()
            plain.append(slow_rank(scores, target)), masked.append(slow_rank(scores, target, history))
        assert result["ranks"].tolist() == plain and result["ranks_masked"].tolist() == masked
        assert result["ndcg@10"] == metrics(plain)["ndcg@10"]
        assert result["masked"]["ndcg@10"] == metrics(masked)["ndcg@10"] > result["ndcg@10"]


@pytest.mark.parametrize("budget", [1, 100, 10 ** 6])
def test_the_size_of_a_chunk_changes_nothing(shop_data, budget):
    rows = shop_data.evaluated_rows("test", 50)
    model = Scorer(shop_data.n_items)
    for a, b in zip(ranks_of(model, rows, "cpu", budget), ranks_of(model, rows, "cpu")):
        assert a.tolist() == b.tolist()


def test_groups_part_the_users(shop_data):
    result = evaluate(Scorer(shop_data.n_items), shop_data, SimpleNamespace(max_len=50), "test", "cpu")
    groups = result["groups"]
    for parts in (["cold", "warm"], [g for g in groups if g.startswith("history")], ["with image", "without image"]):
        parts = [groups[p] for p in parts if p in groups]
        assert sum(g["users"] for g in parts) == result["users"] == shop_data.n_users
        assert sum(g["users"] * g["mrr@50"] for g in parts) == pytest.approx(result["users"] * result["mrr@50"])
    counts = np.bincount([i for s in shop_data.train_seqs for i in s], minlength=shop_data.n_items + 1)
    targets = shop_data.flat[shop_data.offsets[1:] - 1]
    assert groups.get("cold", {"users": 0})["users"] == (counts[targets] < 10).sum()


def test_the_oracle_is_the_upper_end_of_the_demos_scale(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.WORLDS, "demo", demo.World(n_users=200, n_items=80))
    data = datasets.load("demo", root=tmp_path)
    lines = demo_scale(data, "model", {"test_masked": {"recall@10": 0., "ndcg@10": 0.}}).splitlines()[1:]
    names, values = zip(*(line.rsplit(maxsplit=2)[::2] for line in lines))
    names, values = [n.strip() for n in names], list(map(float, values))
    assert names[:2] == ["model", "pop"] and names[-1] == "oracle" and len(names) == 6 and values == sorted(values)
    users = histories_of(data)
    counts = np.bincount([i for u in users for i in u[:-2]], minlength=data.n_items + 1)
    by_hand = metrics([slow_rank(counts, u[-1], u[:-1]) for u in users])["ndcg@10"]
    assert values[1] == pytest.approx(by_hand, abs=1e-4) and values[1] < values[-1]
    assert demo_scale(datasets.load(write_shop(tmp_path / "shop"), root=tmp_path), "model", {}) == ""


def histories_of(data):
    return [data.flat[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]


def test_paired_difference():
    rng = random.Random(0)
    a = [rng.randrange(30) for _ in range(400)]
    same = paired(a, a, draws=200)
    assert same["difference"] == same["low"] == same["high"] == 0
    better = paired([max(0, r - 5) for r in a], a, draws=500)
    assert 0 < better["low"] < better["difference"] < better["high"]
    with pytest.raises(ValueError):
        paired(a, a[1:])
