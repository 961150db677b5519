"""Split, rows and batches against loops over users; users with 1, 2 and 3 items; the split at a
time."""
import json

import numpy as np
import pytest
import torch

import data
from common.files import UserError
from helpers import run, write_shop


@pytest.fixture
def dataset(tmp_path):
    return data.load(write_shop(tmp_path / "shop"), root=tmp_path / "data")


def histories(dataset):
    ends = zip(dataset.offsets, dataset.offsets[1:])
    return [dataset.flat[a:b].tolist() for a, b in ends]


def write_csv(folder, lines):
    folder.mkdir()
    rows = "".join(f"{line}\n" for line in lines)
    (folder / "interactions.csv").write_text("user,item,time\n" + rows)
    return folder


FEW = ["a,x,1", "b,x,1", "b,y,2", "c,x,1", "c,y,2", "c,z,3"]


# ---------------- the split

def test_users_with_one_two_and_three_items(tmp_path):
    dataset = data.load(write_csv(tmp_path / "few", FEW), root=tmp_path / "data")
    # too short to be evaluated: all of it is trained on
    assert dataset.train_seqs == [[1], [1, 2], [1]]
    for split, item in (("valid", 2), ("test", 3)):
        assert dataset.targets[split].tolist()[:2] == [-1, -1]
        assert dataset.flat[dataset.targets[split][2]] == item
    for kind in ("sequences", "prefixes"):
        assert len(dataset.training_rows(kind, 5)) == 1
    assert dataset.train_counts.tolist() == [0, 3, 1, 0]


def test_the_split_at_a_time(tmp_path):
    write_shop(tmp_path / "shop")
    dataset = data.load(tmp_path / "shop", root=tmp_path / "data", split="temporal")
    first, second = np.quantile(dataset.times, .8), np.quantile(dataset.times, .9)
    assert any(place >= 0 for place in dataset.targets["test"])
    for u in range(dataset.n_users):
        begin = dataset.offsets[u]
        times = dataset.times[begin:dataset.offsets[u + 1]]
        assert dataset.train_end[u] - begin == (times < first).sum()
        for split, low, high in (("valid", first, second), ("test", second, np.inf)):
            inside = [i for i, t in enumerate(times) if low <= t < high]
            expected = begin + inside[0] if inside and inside[0] > 0 else -1
            assert dataset.targets[split][u] == expected


def test_what_happens_at_the_cut_is_after_it(tmp_path):
    """Ten purchases a second apart: the cuts, at 80 and 90 %, fall on times that occur."""
    lines = [f"{'ab'[t % 2]},i{t},{1_500_000_000 + t}" for t in range(11)]
    folder = write_csv(tmp_path / "cut", lines)
    dataset = data.load(folder, root=tmp_path / "data", split="temporal")
    assert dataset.times.min() + 8 == np.quantile(dataset.times, .8)
    assert [dataset.items[i]["key"] for i in dataset.train_seqs[0]] == ["i0", "i2", "i4", "i6"]
    valid = dataset.flat[dataset.targets["valid"][0]]
    assert dataset.items[valid]["key"] == "i8"
    test = [dataset.items[dataset.flat[place]]["key"] for place in dataset.targets["test"]]
    assert test == ["i10", "i9"]
    # who begins after a cut has no history to be tested with
    lines.append(f"c,i1,{1_500_000_010}")
    folder = write_csv(tmp_path / "late", lines)
    late = data.load(folder, root=tmp_path / "data", split="temporal")
    assert late.targets["test"][2] == -1


def test_a_small_share_leaves_somebody(shop, tmp_path):
    dataset = data.load(shop, root=tmp_path / "data", train_share=1e-6)
    assert sum(map(bool, dataset.train_seqs)) == 1


def test_an_order_is_no_time(tmp_path):
    folder = write_csv(tmp_path / "order", ["a,x,1", "a,y,2", "a,z,3"])
    with pytest.raises(UserError, match="no times"):
        data.load(folder, root=tmp_path / "data", split="temporal")


def test_equal_times_keep_the_order_of_the_file(tmp_path):
    day = 1_500_000_000
    lines = [f"a,{item},{day}" for item in "zxy"] + [f"a,w,{day - 86_400}"]
    dataset = data.load(write_csv(tmp_path / "ties", lines), root=tmp_path / "data")
    keys = [dataset.items[item]["key"] for item in dataset.flat]
    assert keys == ["w", "z", "x", "y"]


def test_a_share_of_the_users_trains_and_all_are_evaluated(shop, tmp_path):
    whole = data.load(shop, root=tmp_path / "data")
    part = data.load(shop, root=tmp_path / "data", train_share=.25)
    assert sum(map(bool, part.train_seqs)) == round(.25 * whole.n_users)
    for few, seq in zip(part.train_seqs, whole.train_seqs):
        assert not few or few == seq
    assert part.train_counts.sum() == sum(map(len, part.train_seqs))
    for split in ("valid", "test"):
        assert part.targets[split].tolist() == whole.targets[split].tolist()
    # the same users each time, drawn at random
    assert data.load(shop, root=tmp_path / "data", train_share=.25).train_seqs == part.train_seqs
    users = [user for user, seq in enumerate(part.train_seqs) if seq]
    assert users != list(range(len(users)))


DAYS = [f"{'ab'[t % 2]},i{t},2022-09-{t + 1:02}" for t in range(20)]    # two users in turn


def bounds_of(dataset):
    """The days of September on which the training ends, and of the targets of user a."""
    def day(place):
        return dataset.times[place].astype("datetime64[s]").item().day

    return day(dataset.train_end[0] - 1), *(day(p[0]) for p in dataset.targets.values())


@pytest.mark.parametrize("cut, bounds", [
    ("2022-09-11,2022-09-15", (9, 11, 15)),
    ("2022-09-11 12:00,2022-09-15", (11, 13, 15)),
    ("11.09.2022,20220915", (9, 11, 15)),
    (".5,.75", (9, 11, 17)),
    ("2022-09-19", (15, 17, 19)),    # validation: the last ninth of what lies before, 2 days of 18
    (None, (15, 17, 19)),
    (".9", (15, 17, 19)),
])
def test_the_cuts_can_be_chosen(tmp_path, cut, bounds):
    folder = write_csv(tmp_path / "days", DAYS)
    dataset = data.load(folder, root=tmp_path / "data", split="temporal", cut=cut)
    assert bounds_of(dataset) == bounds


def test_the_last_moment_can_be_all_that_is_tested(tmp_path):
    folder = write_csv(tmp_path / "days", DAYS)
    cut = "2022-09-19,2022-09-20"
    dataset = data.load(folder, root=tmp_path / "data", split="temporal", cut=cut)
    last = dataset.offsets[2] - 1    # user b's, on the 20th
    assert dataset.targets["test"].tolist() == [-1, last]


@pytest.mark.parametrize("cut, split, sentence", [
    ("soon", "temporal", "--cut soon is not understood: give one or two dates"),
    ("2022-09-11,", "temporal", "is not understood"),
    ("1,2,3", "temporal", "is not understood"),
    ("2022-09-15,2022-09-11", "temporal", "must name the earlier cut first"),
    (".9,.8", "temporal", "must name the earlier cut first"),
    (".8,.8", "temporal", "must name the earlier cut first"),
    ("2022-09-01,2022-09-11", "temporal", "leaves nothing to train on"),
    ("2023-01-01,2023-02-01", "temporal", "between 2022-09-01 and 2022-09-20"),
    ("1", "temporal", "is not understood"),
    ("01/02/2022", "temporal", "whether the day or the month stands first"),
    ("2023-01-01", "temporal", "leaves nothing to train on, to validate or to test"),
    ("2021-01-01", "temporal", "leaves nothing"),
    ("2022-09-15", "leave_one_out", "--cut 2022-09-15 belongs to --split temporal"),
])
def test_cuts_that_cannot_be_used_are_one_sentence(tmp_path, cut, split, sentence):
    folder = write_csv(tmp_path / "days", DAYS)
    with pytest.raises(UserError, match=sentence):
        data.load(folder, root=tmp_path / "data", split=split, cut=cut)


PARTS = {    # not in the order of time: the files decide
    "train": ["a,t1,5", "a,t2,6", "b,t1,5", "c,t2,5"],
    "valid": ["a,v1,9", "a,v2,4", "c,v1,6", "d,v1,1"],
    "test": ["a,s2,3", "a,s1,2", "b,s1,9", "d,s1,2"],
}


def write_parts(folder):
    folder.mkdir()
    for part, lines in PARTS.items():
        (folder / f"{part}.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    return folder


def test_the_split_that_came_with_the_data(tmp_path):
    dataset = data.load(write_parts(tmp_path / "own"), root=tmp_path / "data", split="files")
    keys = [item["key"] for item in dataset.items]

    def named(items):
        return [keys[item] for item in items]

    assert [named(seq) for seq in dataset.train_seqs] == [["t1", "t2"], ["t1"], ["t2"], []]
    assert named(histories(dataset)[0]) == ["t1", "t2", "v2", "v1", "s1", "s2"]
    assert dataset.times[:6].tolist() == [5, 6, 4, 9, 2, 3]
    targets = {
        split: [keys[dataset.flat[place]] if place >= 0 else None for place in places]
        for split, places in dataset.targets.items()
    }
    assert targets == {"valid": ["v2", None, "v1", None], "test": ["s1", "s1", None, "s1"]}
    rows = dataset.evaluated_rows("test", 10)
    batch = rows.batch(torch.tensor([0]), 4)
    assert named(batch["seq"][0].tolist()) == ["t1", "t2", "v2", "v1"]
    assert dataset.notes()[-2:] == [
        "2 of 4 valid interactions are no targets: a user's first one is, with items before it",
        "1 of 4 test interactions are no targets: a user's first one is, with items before it",
    ]


def test_a_given_split_is_mentioned_where_it_is_not_used(tmp_path):
    dataset = data.load(write_parts(tmp_path / "own"), root=tmp_path / "data")
    assert any("--split files keeps it as it came" in note for note in dataset.notes())
    # and the histories are in the order of time again
    keys = [item["key"] for item in dataset.items]
    assert [keys[item] for item in histories(dataset)[0]] == ["s1", "s2", "v2", "t1", "t2", "v1"]


def test_data_in_one_piece_have_no_split_of_their_own(shop, tmp_path):
    pattern = "came in one piece .interactions.csv, items.jsonl.*give train.csv, valid.csv and test"
    with pytest.raises(UserError, match=pattern):
        data.load(shop, root=tmp_path / "data", split="files")


def test_a_split_without_a_part_is_named(tmp_path):
    folder = write_parts(tmp_path / "own")
    (folder / "valid.csv").unlink()
    with pytest.raises(UserError, match="came without valid, and --split files needs train, valid"):
        data.load(folder, root=tmp_path / "data", split="files")


def test_without_a_split_everything_is_trained_on(shop, tmp_path):
    dataset = data.load(shop, root=tmp_path / "data", split="none")
    assert dataset.train_seqs == histories(dataset)
    assert all((places == -1).all() for places in dataset.targets.values())
    assert not dataset.is_tested


# ---------------- rows and batches

@pytest.mark.parametrize("max_len", [3, 50])
def test_evaluated_rows(dataset, max_len):
    for split, back in (("valid", 2), ("test", 1)):    # the test input includes the validation item
        rows = dataset.evaluated_rows(split, max_len)
        every = torch.arange(len(rows))
        batch = rows.batch(every, max_len)
        seen = rows.seen(every, 20)
        for n, items in enumerate(histories(dataset)):
            history = items[:-back]
            expected = history[-max_len:]
            assert batch["seq"][n].tolist() == [0] * (max_len - len(expected)) + expected
            # uncut, whatever max_len is
            assert seen[n].tolist() == [0] * (20 - len(history)) + history
            assert rows.flat[rows.end[n]] == items[-back]
            assert (rows.lengths[n], rows.history[n]) == (len(expected), len(history))


def test_rows_of_some_users_are_kept_apart_from_everybodys(shop, tmp_path):
    """A validation of some users has the same ones each time, drawn at random, each once."""
    dataset, again = (data.load(shop, root=tmp_path / "data") for _ in range(2))
    some = dataset.evaluated_rows("valid", 50, most=40).users.tolist()
    assert some == again.evaluated_rows("valid", 50, most=40).users.tolist()
    assert len(set(some)) == 40 and some != list(range(40))
    assert len(dataset.evaluated_rows("valid", 50)) == dataset.n_users
    assert dataset.evaluated_rows("valid", 3).lengths.max() == 3


def training_examples(dataset, kind, max_len):
    """(user, inputs, targets) of all rows, by a loop."""
    for user, items in enumerate(histories(dataset)):
        train = items[:-2]
        ends = range(1, len(train)) if kind == "prefixes" else [len(train) - 1] * (len(train) > 1)
        for end in ends:
            begin = max(0, end - max_len)
            yield user, train[begin:end], train[begin + 1:end + 1]


@pytest.mark.parametrize("kind", ["sequences", "prefixes"])
@pytest.mark.parametrize("max_len", [4, 50])
def test_an_epoch_has_every_row_once_and_trimmed(dataset, kind, max_len):
    rows = dataset.training_rows(kind, max_len)
    found = []
    for batch, index in rows.epoch(8, np.random.default_rng(0)):
        assert batch["seq"][:, 0].any()    # as long as its longest row, not longer
        assert batch["seq"].dtype == torch.int64
        assert rows.users[index].tolist() == batch["user"].tolist()
        columns = [batch[key].tolist() for key in ("user", "seq", "target")]
        for user, seq, target in zip(*columns):
            items = [item for item in seq if item]
            assert items == seq[len(seq) - len(items):]    # left-padded
            found.append((user, items, [item for item in target if item]))
    assert sorted(found) == sorted(training_examples(dataset, kind, max_len))


def test_an_epoch_of_items_has_each_once(dataset):
    rows = dataset.training_rows("items", 50)
    batches = list(rows.epoch(7, np.random.default_rng(0)))
    items = torch.cat([batch["item"] for batch, _ in batches]).tolist()
    assert sorted(items) == list(range(1, dataset.n_items + 1)) != items
    for batch, index in batches:
        assert rows.users[index].tolist() == batch["item"].tolist()


def test_epochs_differ_and_are_repeatable(dataset):
    rows = dataset.training_rows("prefixes", 50)

    def order(seed):
        batches = rows.epoch(8, np.random.default_rng(seed))
        return np.concatenate([index for _, index in batches]).tolist()

    assert order([0, 1]) == order([0, 1]) != order([0, 2])


def test_other_rows_meet_in_each_epoch(dataset):
    rows = dataset.training_rows("sequences", 50)

    def batches(seed):
        epoch = rows.epoch(8, np.random.default_rng(seed))
        return {frozenset(index.tolist()) for _, index in epoch}

    assert len(batches(1) & batches(2)) < len(batches(1)) / 2


def test_batches_of_prefixes_have_equal_numbers_of_rows(dataset):
    rows = dataset.training_rows("prefixes", 50)
    sizes = [len(index) for _, index in rows.epoch(8, np.random.default_rng(0))]
    assert len(rows) % 8 and len(sizes) == len(rows) // 8 + 1
    assert set(sizes) <= {7, 8}


def test_batches_are_full_and_weigh_alike(tmp_path):
    dataset = data.load(write_shop(tmp_path / "big", users=4000), root=tmp_path / "data")
    rows = dataset.training_rows("sequences", 50)
    batches = [batch for batch, _ in rows.epoch(32, np.random.default_rng(0))]
    targets = np.array([int((batch["target"] != 0).sum()) for batch in batches])
    assert targets.max() <= 1.15 * targets.mean()
    assert targets.min() >= .85 * targets.mean()
    places = sum(batch["seq"].numel() for batch in batches)
    assert targets.sum() / places > .93    # hardly any padding is left
    lengths = [batch["seq"].shape[1] for batch in batches]
    gaps = np.abs(np.diff(lengths))
    assert gaps.mean() > 1    # neighbours differ: batches do not come in the order of their lengths


# ---------------- the catalog

def test_the_catalog_says_what_the_items_have(tmp_path):
    folder = write_csv(tmp_path / "own", ["a,x,1", "a,y,2", "a,z,3", "a,w,4"])
    items = [
        {"item": "z", "title": "Cup", "brand": "Acme", "language": "fr", "images": ["no.png"]},
        {"item": "x", "brand": "Acme", "language": "de", "images": ["no.png", "film", "p.png"]},
        {"item": "y", "language": "fr", "images": ["film"]},
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "p.png").write_bytes(b"x")
    (folder / "film").mkdir()
    dataset = data.load(folder, root=tmp_path / "data")
    keys = [item["key"] for item in dataset.items]
    reads = ("has_text", "has_image", "lang", "train_seqs", "titles", "image_paths")
    catalog = dataset.catalog(reads)
    assert catalog["n_items"] == 4 and keys[0] == ""
    assert [keys[item] for item in catalog["train_seqs"][0]] == ["x", "y"]

    def of_items(name):
        column = catalog[name]
        column = column.tolist() if torch.is_tensor(column) else column
        return dict(zip(keys, column))

    no, yes = False, True
    assert of_items("has_text") == {"": no, "x": yes, "y": no, "z": yes, "w": no}
    assert of_items("has_image") == {"": no, "x": yes, "y": yes, "z": no, "w": no}
    assert of_items("titles") == {"": "", "x": "Acme", "y": "", "z": "Cup. Acme", "w": ""}
    # w has no language, and that is a language of its own: "", "de", "fr"
    assert of_items("lang") == {"": 0, "w": 1, "x": 2, "y": 3, "z": 3}
    paths = of_items("image_paths")
    assert paths.pop("x").endswith("p.png") and set(paths.values()) == {None}
    assert dataset.catalog(()) == {"n_items": 4}


# ---------------- the processed folder

def test_a_damaged_processed_folder_is_one_sentence(dataset):
    path = dataset.folder / "sequences.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="remove the folder"):
        data.load(dataset.folder)


def test_changed_items_are_refused(dataset):
    path = dataset.folder / "items.jsonl"
    first, *rest = path.read_text().splitlines(True)
    path.write_text("".join([*rest, first]))
    with pytest.raises(UserError, match="changed after"):
        assert data.load(dataset.folder).texts


def test_statistics_are_exact(tmp_path):
    printed = run("data.py", write_csv(tmp_path / "few", FEW), cwd=tmp_path).stdout
    words = " ".join(printed.split())
    for line in (
        "users 3", "items 3", "interactions 6",
        "shortest, 25 %, median, 75 %, longest history 1 1 2 2 3",
        "empty cells of users x items 3 of 9 (33.33%)",
        "items with text 0 of 3 (0.00%)",
        "evaluated users (validation, test) 1 1",
        "interactions.csv: lines 6",
    ):
        assert line in words, printed


def test_a_cell_is_filled_once(tmp_path):
    lines = ["a,x,1", "a,y,2", "a,x,3", "b,x,1"]
    dataset = data.load(write_csv(tmp_path / "again", lines), root=tmp_path / "data")
    assert data.statistics(dataset)["empty cells of users x items"] == (1, 4)


@pytest.mark.parametrize("occurrences, cold, unseen", [
    (0, True, True), (1, True, False), (9, True, False), (10, False, False),
])
def test_ten_training_occurrences_are_not_cold(tmp_path, occurrences, cold, unseen):
    lines = ["a,y,1", "a,z,2", "a,x,3"]
    for u in range(occurrences):
        lines += [f"u{u},x,1"]
    dataset = data.load(write_csv(tmp_path / "few", lines), root=tmp_path / "data")
    shown = data.statistics(dataset)
    assert shown["cold test targets (< 10 training occurrences)"] == (int(cold), 1)
    assert shown["unseen test targets (no training occurrence)"] == (int(unseen), 1)


@pytest.mark.parametrize("name, users, items, interactions", [
    ("beauty", 22_363, 12_101, 198_502),
    ("scientific", 8_442, 4_385, 59_427),
])
def test_real_data_has_the_published_counts(real, tmp_path, name, users, items, interactions):
    dataset = data.load(real(name), root=tmp_path)
    counts = (dataset.n_users, dataset.n_items, len(dataset.flat))
    assert counts == (users, items, interactions)
