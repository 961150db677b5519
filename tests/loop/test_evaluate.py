"""Ranks and metrics against an independent slow implementation, cases worked out by hand, and the
ways in which evaluations cheat."""
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from evaluate import (
    chunk_size,
    demo_scale,
    evaluate,
    examples,
    metrics,
    paired,
    rank_of_target,
    ranks_of,
    summary,
    table,
)
from helpers import write_shop
from sources import demo


def slow_rank(scores, target, seen=()):
    """Items that score at least as high as the target, one by one."""
    others = [j for j in range(1, len(scores)) if j != target and j not in set(seen)]
    return sum(scores[j] >= scores[target] for j in others)


def slow_metrics(ranks, k):
    """Recall, NDCG, MRR by the definitions: DCG over ideal DCG, the first relevant place."""
    recall = ndcg = mrr = 0.0
    for rank in ranks:
        relevant = [1 if place == rank else 0 for place in range(k)]
        recall += sum(relevant) / 1
        dcg = sum(r / math.log(place + 2, 2) for place, r in enumerate(relevant))
        ndcg += dcg / (1 / math.log(2, 2))
        mrr += next((1 / (place + 1) for place, r in enumerate(relevant) if r), 0)
    return recall / len(ranks), ndcg / len(ranks), mrr / len(ranks)


# ---------------- metrics

@pytest.mark.parametrize("levels", [3, 1000])    # few levels: many ties
def test_ranks_equal_a_slow_loop(levels):
    g = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (50, 31), generator=g).float()
    target = torch.randint(1, 31, (50,), generator=g)
    seen = torch.randint(0, 31, (50, 12), generator=g)    # zeros, repeats, some targets among them
    seen[:5, 3] = target[:5]
    plain = rank_of_target(scores, target)
    masked = rank_of_target(scores, target, seen)
    assert plain.dtype == torch.int64
    rows = list(zip(scores.tolist(), target.tolist(), seen.tolist()))
    assert plain.tolist() == [slow_rank(s, t) for s, t, _ in rows]
    assert masked.tolist() == [slow_rank(s, t, h) for s, t, h in rows]


def test_metrics_recall_ndcg_mrr_equal_a_slow_loop():
    ranks = np.random.default_rng(0).integers(0, 60, 200)
    for k in (1, 5, 10, 20, 50):
        found = metrics(ranks, (k,))
        values = [found[f"recall@{k}"], found[f"ndcg@{k}"], found[f"mrr@{k}"]]
        assert np.allclose(values, slow_metrics(ranks, k), atol=1e-12)


def test_metrics_by_hand():
    found = metrics([0, 2, 10], ks=(5, 10))
    assert found["recall@5"] == pytest.approx(2 / 3)
    assert found["ndcg@5"] == pytest.approx((1 + 1 / 2) / 3)    # log2(2) = 1, log2(4) = 2
    assert found["mrr@5"] == pytest.approx((1 + 1 / 3) / 3)
    assert found["recall@10"] == pytest.approx(2 / 3)           # rank 10 is the eleventh place
    assert set(metrics([0])) == {
        f"{m}@{k}" for m in ("recall", "ndcg", "mrr") for k in (5, 10, 20, 50)
    }
    assert all(type(value) is float for value in found.values())
    with pytest.raises(ValueError):
        metrics([])


def test_an_oracle_gets_one_and_a_constant_gets_nothing():
    target = torch.arange(1, 101)
    oracle = torch.nn.functional.one_hot(target, 101).float()
    assert metrics(rank_of_target(oracle, target))["ndcg@5"] == 1
    constant = rank_of_target(torch.zeros(100, 101), target)
    assert constant.tolist() == [99] * 100
    assert metrics(constant)["recall@50"] == 0


def test_padding_is_never_ranked():
    scores = torch.tensor([[9., 2., 1.]])
    assert rank_of_target(scores, torch.tensor([1])).item() == 0


def test_the_target_is_never_left_out():
    scores = torch.tensor([[0., 3., 2., 1.]])
    target = torch.tensor([2])
    assert rank_of_target(scores, target, torch.tensor([[2, 1, 1, 0]])).item() == 0
    assert rank_of_target(scores, target, torch.tensor([[2, 2, 0, 0]])).item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_raise(bad):
    scores = torch.zeros(3, 5)
    scores[1, 3] = bad
    with pytest.raises(ValueError, match="row 1 "):
        rank_of_target(scores, torch.tensor([1, 2, 3]))


def test_the_inputs_are_left_as_they_were():
    scores = torch.randn(4, 9)
    before = scores.clone()
    seen = torch.tensor([[5], [0], [3], [1]])
    rank_of_target(scores, torch.tensor([1, 2, 3, 4]), seen)
    assert torch.equal(scores, before)


# ---------------- a model on a data set

class Scorer(torch.nn.Module):
    """Scores by a fixed table of (last item, next item) numbers, with ties; padding has the best.
    """

    def __init__(self, n_items, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.table = (torch.randn(n_items + 1, n_items + 1, generator=g) * 4).round()
        self.table[:, 0] = 99

    def encode_items(self):
        return {"rows": self.table}

    def score(self, batch, table):
        assert set(batch) == {"user", "seq"}    # a score that reads the target would be an oracle
        return table["rows"][batch["seq"][:, -1]]


@pytest.fixture
def dataset(tmp_path):
    return data.load(write_shop(tmp_path / "shop"), root=tmp_path / "data")


def histories_of(dataset):
    ends = zip(dataset.offsets, dataset.offsets[1:])
    return [dataset.flat[a:b].tolist() for a, b in ends]


def test_evaluation_equals_a_slow_loop_over_users(dataset):
    model = Scorer(dataset.n_items)
    for split, back in (("valid", 2), ("test", 1)):
        result = evaluate(model, dataset, SimpleNamespace(max_len=4), split, "cpu")
        plain, masked = [], []
        for items in histories_of(dataset):
            history, target = items[:-back], items[-back]
            scores = model.table[history[-1]].tolist()
            plain.append(slow_rank(scores, target))
            masked.append(slow_rank(scores, target, history))
        assert result["ranks"].tolist() == plain
        assert result["ranks_masked"].tolist() == masked
        assert result["ndcg@10"] == metrics(plain)["ndcg@10"]
        assert result["masked"]["ndcg@10"] == metrics(masked)["ndcg@10"] > result["ndcg@10"]


class Watched(Scorer):
    """Writes down what it is shown, and how it is asked."""

    def __init__(self, n_items):
        super().__init__(n_items)
        self.shown = {}       # user -> items
        self.asked = set()    # (in training, how floats are multiplied)

    def score(self, batch, table):
        for user, seq in zip(batch["user"].tolist(), batch["seq"].tolist()):
            self.shown[user] = [item for item in seq if item]
        self.asked.add((self.training, torch.get_float32_matmul_precision()))
        return super().score(batch, table)


def test_a_model_is_shown_the_whole_history_and_ranks_with_all_it_has(dataset):
    """Without dropout, and with exact products of matrices, whatever the training had."""
    model = Watched(dataset.n_items)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        evaluate(model, dataset, SimpleNamespace(max_len=50), "test", "cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert model.asked == {(False, "highest")}
    assert model.shown == {u: items[:-1] for u, items in enumerate(histories_of(dataset))}


@pytest.mark.parametrize("budget", [1, 100, 10 ** 6])
def test_the_size_of_a_chunk_changes_nothing(dataset, budget):
    rows = dataset.evaluated_rows("test", 50)
    model = Scorer(dataset.n_items)
    for found, expected in zip(ranks_of(model, rows, "cpu", budget), ranks_of(model, rows, "cpu")):
        assert found.tolist() == expected.tolist()


def test_a_chunk_is_bounded_by_the_budget_and_never_empty():
    table = {"item": torch.zeros(1001, 2)}
    assert chunk_size(table, "cpu", budget=4004) == 4
    assert chunk_size(table, "cpu", budget=1) == 1
    assert chunk_size((table["item"],), "cpu") == 2048
    assert chunk_size(torch.zeros(2 ** 22, 1), "cpu") == 1


def test_a_model_is_left_in_the_mode_it_was_in(dataset):
    model = Scorer(dataset.n_items).train()
    evaluate(model, dataset, SimpleNamespace(max_len=4), "test", "cpu")
    assert model.training
    model.table[:] = math.nan
    with pytest.raises(ValueError, match="the test evaluation stopped"):
        evaluate(model, dataset, SimpleNamespace(max_len=4), "test", "cpu")
    assert model.training


def test_groups_part_the_users(dataset):
    cfg = SimpleNamespace(max_len=50)
    result = evaluate(Scorer(dataset.n_items), dataset, cfg, "test", "cpu")
    groups = result["groups"]
    lengths = [name for name in groups if name.startswith("history")]
    for names in (["cold", "warm"], lengths, ["with image", "without image"]):
        parts = [groups[name] for name in names if name in groups]
        assert sum(part["users"] for part in parts) == result["users"] == dataset.n_users
        total = sum(part["users"] * part["mrr@50"] for part in parts)
        assert total == pytest.approx(result["users"] * result["mrr@50"])
    occurrences = [item for seq in dataset.train_seqs for item in seq]
    counts = np.bincount(occurrences, minlength=dataset.n_items + 1)
    targets = dataset.flat[dataset.offsets[1:] - 1]
    assert groups.get("cold", {"users": 0})["users"] == (counts[targets] < 10).sum()


def write_uneven_shop(folder):
    """A shop in which every group has users, and some users have none: they are not evaluated."""
    write_shop(folder)
    own = {
        "few1": "i1 i2", "few2": "i3", "long20": "i4 i5 " * 10, "long21": "i6 " * 21,
        "once": "rare i1 i2 rare", "never": "i1 i2 i3 new",
    }
    with open(folder / "interactions.csv", "a") as file:
        for user, items in own.items():
            # before all others, so that the numbers of later users are no places of rows
            lines = [f"{user},{item},{1_400_000_000 + t}\n" for t, item in enumerate(items.split())]
            file.writelines(lines)
    (folder / "p.png").write_bytes(b"x")
    with open(folder / "items.jsonl", "w") as file:
        for n, item in enumerate(["rare", "new", *(f"i{i}" for i in range(30))]):
            title, images = "red cup" * (n % 3 > 0), ["p.png"] * (n % 4 > 0)
            row = {"item": item, "title": title, "images": images}
            file.write(json.dumps(row) + "\n")
    return folder


def slow_groups(dataset, history, target):
    """The names of the groups that a user is in."""
    count = sum(seq.count(target) for seq in dataset.train_seqs)
    long = [low for low in (1, 5, 10, 20) if low <= len(history)]
    item = dataset.items[target]
    return [
        "cold" if count < 10 else "warm",
        *["unseen"] * (count == 0),
        {1: "history 1-4", 5: "history 5-9", 10: "history 10-19", 20: "history 20+"}[long[-1]],
        "with text" if item["title"] else "without text",
        "with image" if item["images"] else "without image",
    ]


@pytest.mark.parametrize("split, back", [("valid", 2), ("test", 1)])
def test_groups_equal_a_slow_loop_over_users(tmp_path, split, back):
    dataset = data.load(write_uneven_shop(tmp_path / "shop"), root=tmp_path / "data")
    model = Scorer(dataset.n_items)
    result = evaluate(model, dataset, SimpleNamespace(max_len=4), split, "cpu")
    users = [items for items in histories_of(dataset) if len(items) > 2]
    plain, masked = {}, {}    # group -> ranks
    for items in users:
        history, target = items[:-back], items[-back]
        scores = model.table[history[-1]].tolist()
        for name in slow_groups(dataset, history, target):
            plain.setdefault(name, []).append(slow_rank(scores, target))
            masked.setdefault(name, []).append(slow_rank(scores, target, history))
    for found, expected in (("groups", plain), ("groups_masked", masked)):
        assert result[found] == {
            name: {"users": len(ranks), **metrics(ranks)} for name, ranks in expected.items()
        }
    assert result["users"] == len(users) == dataset.n_users - 2
    assert len(plain) == 11 if split == "test" else "unseen" not in plain
    kept = summary(result)
    assert kept["test"] == {name: result[name] for name in metrics([0])}
    assert kept["test_masked"] == result["masked"] != kept["test"]
    assert kept["groups"] == result["groups"] != kept["groups_masked"] == result["groups_masked"]


def test_some_users_can_be_evaluated(dataset):
    model, cfg = Scorer(dataset.n_items), SimpleNamespace(max_len=50)
    everybody = evaluate(model, dataset, cfg, "valid", "cpu")["ranks"]
    some = evaluate(model, dataset, cfg, "valid", "cpu", most=7)
    users = dataset.evaluated_rows("valid", 50, "cpu", most=7).users
    assert some["users"] == 7
    assert some["ranks"].tolist() == everybody[users].tolist()


def test_examples_are_what_the_ranks_say(dataset):
    cfg = SimpleNamespace(max_len=50)
    model = Scorer(dataset.n_items)
    ranks = evaluate(model, dataset, cfg, "test", "cpu")["ranks"].tolist()
    found = examples(model, dataset, cfg, "cpu", users=7)
    assert len(found) == 7
    assert found == examples(model, dataset, cfg, "cpu", users=7)    # drawn once and for all
    histories = histories_of(dataset)
    for example in found:
        user = histories.index([*example["history"], example["target"]])
        assert example["rank"] == ranks[user]
        scores = model.table[example["history"][-1]].tolist()
        assert [scores[i] for i in example["top"]] == sorted(scores[1:], reverse=True)[:5]


def test_a_table_has_means_and_deviations_of_seeds():
    def summary_of(value):
        plain, masked, group, group_masked = (
            dict.fromkeys(metrics([0]), value + more) for more in (0, .1, .2, .3)
        )
        return {
            "test": plain,
            "test_masked": masked,
            "groups": {"cold": {"users": 3, **group}},
            "groups_masked": {"cold": {"users": 3, **group_masked}},
            "users": 9,
        }

    one = table("m on d", [summary_of(.25)]).splitlines()
    assert one[1].split() == ["m", "on", "d", "9", *["0.2500"] * 4, "masked", *["0.3500"] * 2]
    assert one[2].split() == ["cold", "3", *["0.4500"] * 4, "masked", *["0.5500"] * 2]
    two = table("m on d", [summary_of(.25), summary_of(.35)]).splitlines()
    spread = f"±{np.std([.25, .35], ddof=1):.4f}"
    first, second = two[1].split("masked")
    assert first.split() == ["m", "on", "d", "9", *["0.3000", spread] * 4]
    assert second.split() == ["0.4000", spread] * 2


# ---------------- the demo's scale

def test_the_oracle_is_the_upper_end_of_the_demos_scale(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.WORLDS, "demo", demo.World(n_users=200, n_items=80))
    dataset = data.load("demo", root=tmp_path)
    result = {"test_masked": {"recall@10": 0., "ndcg@10": 0.}}
    lines = demo_scale(dataset, "model", result).splitlines()[1:]
    names = [line.rsplit(maxsplit=2)[0].strip() for line in lines]
    values = [float(line.rsplit(maxsplit=2)[2]) for line in lines]
    assert names[:2] == ["model", "pop"] and names[-1] == "oracle"
    assert set(names[2:-1]) == {f"oracle {view}" for view in (
        "without both", "without text", "without pictures", "of the last item",
        "of the history shuffled", "blind to tastes",
    )}
    assert values == sorted(values)
    users = histories_of(dataset)
    sold = [item for items in users for item in items[:-2]]
    counts = np.bincount(sold, minlength=dataset.n_items + 1)
    ranks = [slow_rank(counts, items[-1], items[:-1]) for items in users]
    assert values[1] == pytest.approx(metrics(ranks)["ndcg@10"], abs=1e-4)
    assert values[1] < values[-1]
    other = data.load(write_shop(tmp_path / "shop"), root=tmp_path)
    assert demo_scale(other, "model", {}) == ""


# ---------------- two runs

def test_paired_difference():
    rng = random.Random(0)
    ranks = [rng.randrange(30) for _ in range(400)]
    same = paired(ranks, ranks, draws=200)
    assert same["difference"] == same["low"] == same["high"] == 0
    better = paired([max(0, rank - 5) for rank in ranks], ranks, draws=500)
    assert 0 < better["low"] < better["difference"] < better["high"]
    assert better == paired([max(0, rank - 5) for rank in ranks], ranks, draws=500)
    with pytest.raises(ValueError):
        paired(ranks, ranks[1:])


def test_the_difference_is_that_of_ndcg_at_10():
    found = paired([0, 9], [1, 10], draws=1)    # rank 10 is the eleventh place
    expected = (1 - 1 / math.log2(3) + 1 / math.log2(11) - 0) / 2
    assert found["difference"] == pytest.approx(expected)


def test_the_interval_holds_95_percent():
    """Of 1,000 users half differ by 1: the mean is .5, its standard deviation .5 / sqrt(1000)."""
    found = paired([0] * 1000, [0, 99] * 500)
    deviation = .5 / math.sqrt(1000)
    assert found["difference"] == .5
    assert found["low"] == pytest.approx(.5 - 1.96 * deviation, abs=.06 * deviation)
    assert found["high"] == pytest.approx(.5 + 1.96 * deviation, abs=.06 * deviation)
