"""Split, rows and batches against loops over users; what users with 1, 2 and 3 items get; the temporal split."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run, write_shop

import data as datasets
from sources.common import UserError


@pytest.fixture
def shop_data(tmp_path):
    return datasets.load(write_shop(tmp_path / "shop"), root=tmp_path / "data")


def histories(data):
    return [data.flat[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]


def write_csv(folder, lines):
    folder.mkdir()
    (folder / "interactions.csv").write_text("user,item,time\n" + "".join(f"{x}\n" for x in lines))
    return folder


def test_users_with_one_two_and_three_items(tmp_path):
    folder = write_csv(tmp_path / "few", ["a,x,1", "b,x,1", "b,y,2", "c,x,1", "c,y,2", "c,z,3"])
    data = datasets.load(folder, root=tmp_path / "data")
    assert data.train_seqs == [[1], [1, 2], [1]]                 # too short to be evaluated: all of it is trained on
    assert data.targets["valid"].tolist()[:2] == data.targets["test"].tolist()[:2] == [-1, -1]
    assert data.flat[data.targets["valid"][2]] == 2 and data.flat[data.targets["test"][2]] == 3
    assert len(data.training_rows("sequences", 5)) == len(data.training_rows("prefixes", 5)) == 1
    assert data.train_counts.tolist() == [0, 3, 1, 0]


@pytest.mark.parametrize("max_len", [3, 50])
def test_evaluated_rows(shop_data, max_len):
    for split, back in (("valid", 2), ("test", 1)):              # the test input includes the validation item
        rows = shop_data.evaluated_rows(split, max_len)
        batch = rows.batch(torch.arange(len(rows)), max_len)
        for row, items in zip(batch["seq"].tolist(), histories(shop_data)):
            expected = items[:-back][-max_len:]
            assert row == [0] * (max_len - len(expected)) + expected
        assert rows.flat[rows.end].tolist() == [items[-back] for items in histories(shop_data)]
        seen = rows.seen(torch.arange(len(rows)), 20)
        for row, items in zip(seen.tolist(), histories(shop_data)):
            assert row == [0] * (20 - len(items[:-back])) + items[:-back]     # uncut, whatever max_len is


@pytest.mark.parametrize("kind", ["sequences", "prefixes"])
@pytest.mark.parametrize("max_len", [4, 50])
def test_an_epoch_has_every_row_once_and_trimmed(shop_data, kind, max_len):
    expected = []
    for user, items in enumerate(histories(shop_data)):
        train = items[:-2]
        ends = range(1, len(train)) if kind == "prefixes" else [len(train) - 1] * (len(train) > 1)
        expected += [(user, train[max(0, e - max_len):e], train[max(0, e - max_len) + 1:e + 1]) for e in ends]
    found, rows = [], shop_data.training_rows(kind, max_len)
    for batch, index in rows.epoch(8, np.random.default_rng(0)):
        assert batch["seq"][:, 0].any()                          # as long as its longest row, not longer
        assert batch["seq"].dtype == torch.int64 and rows.users[index].tolist() == batch["user"].tolist()
        for user, seq, target in zip(*(batch[k].tolist() for k in ("user", "seq", "target"))):
            assert [i for i in seq if i] == seq[len(seq) - sum(map(bool, seq)):]   # left-padded
            found.append((user, [i for i in seq if i], [i for i in target if i]))
    assert sorted(found) == sorted(expected)


def test_epochs_differ_and_are_repeatable(shop_data):
    rows = shop_data.training_rows("prefixes", 50)
    order = lambda seed: np.concatenate([index for _, index in rows.epoch(8, np.random.default_rng(seed))]).tolist()
    assert order([0, 1]) == order([0, 1]) != order([0, 2])


def test_batches_are_full_and_weigh_alike(tmp_path):
    data = datasets.load(write_shop(tmp_path / "big", users=4000), root=tmp_path / "data")
    batches = [b for b, _ in data.training_rows("sequences", 50).epoch(32, np.random.default_rng(0))]
    targets = np.array([int((b["target"] != 0).sum()) for b in batches])
    assert targets.max() <= 1.15 * targets.mean() and targets.min() >= .85 * targets.mean()
    assert sum(targets) / sum(b["seq"].numel() for b in batches) > .93          # hardly any padding is left


def test_the_split_at_a_time(shop_data, tmp_path):
    data = datasets.load(tmp_path / "shop", root=tmp_path / "data", split="temporal")
    first, second = np.quantile(data.times, .8), np.quantile(data.times, .9)
    assert any(t >= 0 for t in data.targets["test"])
    for u in range(data.n_users):
        times = data.times[data.offsets[u]:data.offsets[u + 1]]
        train = int((times < first).sum())
        assert data.train_end[u] - data.offsets[u] == train
        for split, low, high in (("valid", first, second), ("test", second, np.inf)):
            inside = [i for i, t in enumerate(times) if low <= t < high]
            place = data.targets[split][u]
            assert place == (data.offsets[u] + inside[0] if inside and inside[0] > 0 else -1)


def test_an_order_is_no_time(tmp_path):
    folder = write_csv(tmp_path / "order", ["a,x,1", "a,y,2", "a,z,3"])
    with pytest.raises(UserError, match="no times"):
        datasets.load(folder, root=tmp_path / "data", split="temporal")


def test_equal_times_keep_the_order_of_the_file(tmp_path):
    day = 1_500_000_000
    folder = write_csv(tmp_path / "ties", [f"a,{item},{day}" for item in "zxy"] + [f"a,w,{day - 86_400}"])
    data = datasets.load(folder, root=tmp_path / "data")
    assert [data.items[i]["key"] for i in data.flat] == ["w", "z", "x", "y"]


def test_the_same_numbers_under_any_hash_seed(tmp_path):
    write_shop(tmp_path / "shop")
    code = ("import sys, hashlib; sys.path.insert(0, sys.argv[1]); import data; d = data.load('shop', root=sys.argv[2]);"
            "print(hashlib.sha256(d.flat.tobytes() + d.offsets.tobytes() + str(d.items).encode()).hexdigest())")
    digests = {subprocess.run([sys.executable, "-c", code, str(ROOT), f"data{seed}"], cwd=tmp_path, text=True, check=True,
                              capture_output=True, env={"PYTHONHASHSEED": str(seed)}).stdout.splitlines()[-1] for seed in (1, 2)}
    assert len(digests) == 1


def test_a_damaged_processed_folder_is_one_sentence(shop_data):
    path = shop_data.folder / "sequences.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="remove the folder"):
        datasets.load(shop_data.folder)


def test_changed_items_are_refused(shop_data):
    path = shop_data.folder / "items.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(UserError, match="changed after"):
        datasets.load(shop_data.folder).items


def test_statistics_are_exact(tmp_path):
    folder = write_csv(tmp_path / "few", ["a,x,1", "b,x,1", "b,y,2", "c,x,1", "c,y,2", "c,z,3"])
    printed = run("data.py", folder, cwd=tmp_path).stdout
    for line in ("users 3", "items 3", "interactions 6", "shortest, 25 %, median, 75 %, longest history 1 1 2 2 3",
                 "empty cells of users x items 3 of 9 (33.33%)", "items with text 0 of 3 (0.00%)",
                 "evaluated users (validation, test) 1 1"):
        assert line in " ".join(printed.split()), printed


def test_beauty_has_the_published_counts(real, tmp_path):
    data = datasets.load(real("beauty"), root=tmp_path)
    assert (data.n_users, data.n_items, len(data.flat)) == (22_363, 12_101, 198_502)


def test_scientific_has_the_published_counts(real, tmp_path):
    data = datasets.load(real("scientific"), root=tmp_path)
    assert (data.n_users, data.n_items, len(data.flat)) == (8_442, 4_385, 59_427)


def test_training_parts_of_several_sets_are_one(tmp_path):
    sets = [datasets.load(write_shop(tmp_path / name, seed=n, items=40 + n), root=tmp_path / "data") for n, name in enumerate("ab")]
    joined = datasets.training_parts(sets)
    want = [seq for seq in sets[0].train_seqs if seq] + [[40 + i for i in seq] for seq in sets[1].train_seqs if seq]
    assert joined.train_seqs == want and joined.n_items == 81 and not joined.targets
    rows = joined.training_rows("sequences", 50)
    assert rows.lengths.sum() == sum(len(seq) - 1 for seq in want)
    counts = np.concatenate([sets[0].train_counts, sets[1].train_counts[1:]])
    warm = datasets.training_parts(sets, warm=True)
    assert sorted(warm.train_seqs) == sorted(kept for seq in want if (kept := [i for i in seq if counts[i] >= datasets.COLD]))
    assert 0 < warm.train_counts.sum() < joined.train_counts.sum()


def test_joined_catalogs(tmp_path):
    sets = [datasets.load(write_shop(tmp_path / name, seed=n, items=20 + n), root=tmp_path / "data") for n, name in enumerate("ab")]
    joined = datasets.training_parts(sets)
    make = lambda n, high, width: {
        "n_items": n, "train_seqs": [], "sentences": torch.rand(n + 1, high, width), "titles": ["", *map(str, range(n))],
        "sentences_mask": torch.ones(n + 1, high, dtype=torch.bool), "text": torch.rand(n + 1, width), "lang": torch.arange(n + 1)}
    a, b = make(20, 2, 4), make(21, 3, 4)
    whole = datasets.join_catalogs([a, b], joined)
    assert whole["n_items"] == 41 and whole["train_seqs"] == joined.train_seqs and len(whole["titles"]) == 42
    assert whole["sentences"].shape == (42, 3, 4) and torch.equal(whole["sentences"][21:], b["sentences"][1:])
    assert torch.equal(whole["sentences"][:21, :2], a["sentences"]) and not whole["sentences_mask"][:21, 2].any()
    assert torch.equal(whole["text"], torch.cat([a["text"], b["text"][1:]])) and whole["lang"].shape == (42,)
    with pytest.raises(UserError, match=r"differ in width \(4, 5\)"):
        datasets.align_widths([a, make(21, 2, 5)])
    none = make(21, 2, 1) | {"sentences": torch.zeros(22, 1, 1), "sentences_mask": torch.zeros(22, 1, dtype=torch.bool),
                             "text": torch.zeros(22, 1)}
    datasets.align_widths([none, a])                             # a set without texts takes the width of the other
    assert none["sentences"].shape == (22, 1, 4) and none["text"].shape == (22, 4) and not none["text"].any()
    assert datasets.join_catalogs([a, none], joined)["text"].shape == (42, 4)


def test_a_share_of_the_users_trains_and_all_are_evaluated(shop, tmp_path):
    whole, part = (datasets.load(shop, root=tmp_path / "data", train_share=share) for share in (1, .25))
    assert sum(map(bool, part.train_seqs)) == round(.25 * whole.n_users)
    assert all(not few or few == seq for few, seq in zip(part.train_seqs, whole.train_seqs))
    assert part.train_counts.sum() == sum(map(len, part.train_seqs))
    for split in ("valid", "test"):
        assert part.targets[split].tolist() == whole.targets[split].tolist()
