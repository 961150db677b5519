"""sources/unisrec.py: sequences cut into rows as UniSRec does are whole again; damaged files."""
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.files import UserError
from sources import prepare, unisrec


def write_inter(path, rows):
    head = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    lines = (f"{user}\t{' '.join(map(str, before))}\t{target}\n" for user, before, target in rows)
    path.write_text(head + "".join(lines))


def write_unisrec(path, sequences, descending=True, stem="X"):
    """The files of a data set of these sequences of item indices -> the number of items."""
    path.mkdir(exist_ok=True)
    parts = {"train": [], "valid": [], "test": []}
    for user, sequence in enumerate(sequences):
        rows = [
            (user, sequence[max(0, t - unisrec.CUT):t], sequence[t])
            for t in range(1, len(sequence))
        ]
        *train, valid, test = rows
        parts["train"] += train[::-1] if descending else train
        parts["valid"].append(valid)
        parts["test"].append(test)
    for part, rows in parts.items():
        write_inter(path / f"{stem}.{part}.inter", rows)
    n = 1 + max(map(max, sequences))
    # neither in the order of the indices nor in that of the keys
    items = [f"key{i}\t{i}\n" for i in range(n)]
    users = [f"user{u}\t{u}\n" for u in range(len(sequences))]
    (path / f"{stem}.item2index").write_text("".join(items[::-1]))
    (path / f"{stem}.user2index").write_text("".join(users[::-1]))
    texts = [f"key{i}\tThing {i} &amp;\tco. \n" for i in range(n - 1)]
    others = ["key0\tdescribed again\n", "unknown\tof no item\n", "\n"]
    head = "item_id:token\ttext:token_seq\n"
    (path / f"{stem}.text").write_text(head + "".join(texts + others))
    return n


@pytest.mark.parametrize("descending", [True, False])
def test_sequences_longer_than_the_cut_are_whole_again(tmp_path, histories, descending):
    rng = np.random.default_rng(0)
    lengths = (3, 4, 49, 50, 51, 52, 53, 120)
    sequences = [rng.integers(0, 30, length).tolist() for length in lengths]
    n = write_unisrec(tmp_path / "x", sequences, descending)
    out = prepare(tmp_path / "x", root=tmp_path / "data")
    assert histories(out) == {
        f"user{u}": [f"key{i}" for i in sequence] for u, sequence in enumerate(sequences)
    }
    items = [json.loads(line) for line in open(out / "items.jsonl", encoding="utf-8")]
    assert [item["key"] for item in items] == [f"key{i}" for i in range(n)]    # in index order
    assert items[0] == {
        "key": "key0", "title": "Thing 0 & co.", "text": [], "language": "en", "images": [],
    }
    assert items[n - 1]["title"] == ""
    about = json.loads((out / "source.json").read_text())
    assert about["clock"] == "order"
    assert about["report"].pop("item texts of other items") == 1
    assert about["report"].keys() == {
        "X.text", "X.train.inter", "X.valid.inter", "X.test.inter", "X.item2index", "X.user2index",
    }
    assert about["published"] == {}
    users = (out / "users.txt").read_text().split()
    assert users == [f"user{u}" for u in range(len(lengths))]


@pytest.mark.parametrize("descending", [True, False])
def test_a_user_without_targets_has_the_longest_training_row(tmp_path, descending):
    write_unisrec(tmp_path / "x", [[0, 1, 2, 3, 0, 1], [3, 2, 1]], descending)
    for part, rows in (("valid", [(1, [3], 2)]), ("test", [(1, [3, 2], 1)])):
        write_inter(tmp_path / "x" / f"X.{part}.inter", rows)
    raw = unisrec.read(tmp_path / "x", None)
    assert [*raw.users] == ["user0"] * 4 + ["user1"] * 3
    assert [*raw.items] == [f"key{i}" for i in (0, 1, 2, 3, 3, 2, 1)]


def test_features_that_come_with_the_data(tmp_path):
    n = write_unisrec(tmp_path / "x", [[*range(12)]])
    rng = np.random.default_rng(0)
    rows = {"text": rng.random((n, 6), np.float32), "image": rng.random((n, 4), np.float32)}
    rows["image"][3] = 0    # has no picture
    rows["text"].tofile(tmp_path / "x" / "X.feat1CLS")
    rows["image"].tofile(tmp_path / "x" / "X.feat3CLS")
    out = prepare(tmp_path / "x", root=tmp_path / "data")
    assert json.loads((out / "source.json").read_text())["features"] == {
        "text": "feat1cls", "image": "feat3cls",
    }
    for modality, encoder in (("text", "feat1cls"), ("image", "feat3cls")):
        saved = load_file(out / "features" / f"{modality}-{encoder}.safetensors")
        index = saved["index"][:, 0]
        assert np.array_equal(saved["vectors"][index[1:]], rows[modality])
        assert not saved["vectors"][0].any()
        assert index.astype(bool).tolist() == [False, *rows[modality].any(1)]


@pytest.mark.parametrize("stem, n_items, published", [
    ("Scientific", 4385, {
        "users": 8442, "items": 4385, "interactions": 59427, "source": "UniSRec",
    }),
    ("Scientific", 12, {}),    # a part of it
    ("Mine", 4385, {}),
])
def test_what_the_paper_prints_belongs_to_the_whole_set(tmp_path, stem, n_items, published):
    write_unisrec(tmp_path / "x", [[*range(n_items)]], stem=stem)
    assert unisrec.read(tmp_path / "x", None).published == published


DAMAGE = [    # file, its content or None = missing, what the message says
    ("X.text", None, "X.text is missing"),
    ("X.user2index", None, "X.user2index is missing"),
    ("X.valid.inter", None, "X.valid.inter is missing"),
    ("X.text", b"key0 Thing\n", "columns missing 1.*line 1 .key0 Thing."),
    ("X.text", b"item_id:token\nkey0\n", "must have 2 columns between tabs, and has 1"),
    ("X.test.inter", b"a:token\tb\tc\n0\t1\n", "columns missing 1.*line 2 .0, 1."),
    ("X.feat1CLS", b"", "finite float32 rows for 4 items, but has 0"),
    ("X.feat1CLS", b"1234" * 7, "finite float32 rows for 4 items, but has 7"),
    ("X.feat3CLS", np.full(8, np.nan, np.float32).tobytes(), "some that are not finite"),
    ("X.item2index", b"a\t0\nb\t5\n", "indices 0 to 1"),
    ("X.item2index", b"a\t0\nb\t0\nc\t1\n", "indices 0 to 2"),
    ("X.item2index", b"a\t0\na\t1\n", "each to one key"),
    ("X.test.inter", b"0\t1 2\t4\n", "not in the index files 1.*line 1 .0, 1 2, 4."),
    ("X.test.inter", b"0\t1 -2\t3\n", "not in the index files 1"),
    ("X.test.inter", b"2\t1 2\t3\n", "not in the index files 1"),
    ("X.train.inter", b"0\t1 x\t3\n", "no numbers 1.*0, 1 x, 3"),
    ("Y.item2index", b"a\t0\n", "several data sets"),
]


@pytest.mark.parametrize("name, content, sentence", DAMAGE, ids=[
    f"{name}: {sentence}" for name, _, sentence in DAMAGE
])
def test_damaged_files_are_one_sentence(tmp_path, name, content, sentence):
    write_unisrec(tmp_path / "x", [[0, 1, 2, 3], [3, 2, 1]])
    if content is None:
        (tmp_path / "x" / name).unlink()
    else:
        (tmp_path / "x" / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prepare(tmp_path / "x", root=tmp_path / "data")
