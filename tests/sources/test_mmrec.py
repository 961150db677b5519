"""sources/mmrec.py: interactions by number, features by row, a split in a column."""
import numpy as np
import pytest

import data
from common.features import feature_path
from common.files import UserError, load_tensors
from extract_features import features
from sources import mmrec, prepare

HEAD = "userID\titemID\trating\ttimestamp\tx_label\n"
LINES = ["0\t2\t5.0\t10\t0", "0\t0\t5.0\t11\t1", "0\t1\t5.0\t12\t2", "1\t2\t5.0\t9\t0"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "baby"
    folder.mkdir()
    (folder / "baby.inter").write_text(HEAD + "".join(f"{line}\n" for line in LINES))
    (folder / "i_id_mapping.csv").write_text("asin\titemID\nB2\t2\nB0\t0\nB1\t1\nB3\t3\n")
    np.save(folder / "text_feat.npy", np.arange(8.).reshape(4, 2) + 1)
    np.save(folder / "image_feat.npy", np.arange(12.).reshape(4, 3) + 1)
    return folder


def test_rows_belong_to_their_items(folder, tmp_path):
    raw = mmrec.read(folder, None)
    assert [*raw.items] == ["B2", "B0", "B1", "B2"]
    assert raw.item_order == ["B0", "B1", "B2", "B3"]
    assert [*raw.parts] == [0, 1, 2, 0]
    assert raw.notes == ["baby.inter: columns not read: rating", (
        "the times of baby.inter are no dates (the first is 10): they give the order of events only"
    )]
    dataset = data.load(folder, root=tmp_path / "data", split="files")
    got = features(dataset, "text")
    np.testing.assert_array_equal(got["text"][1:], np.arange(8.).reshape(4, 2) + 1)
    tensors, _ = load_tensors(feature_path(dataset.folder, "image", "image_feat"))
    assert tensors["vectors"].shape == (5, 3)
    assert dataset.flat[dataset.targets["test"][0]] == 2    # B1


def test_without_features_the_mapping_names_the_items(folder):
    (folder / "text_feat.npy").unlink()
    (folder / "image_feat.npy").unlink()
    raw = mmrec.read(folder, None)
    assert raw.item_order == ["B0", "B1", "B2"]
    assert raw.features == {}


def damage(folder, kind):
    if kind == "few rows":
        np.save(folder / "text_feat.npy", np.ones((2, 3)))
    elif kind == "nan":
        np.save(folder / "text_feat.npy", np.full((4, 3), np.nan))
    elif kind == "lengths":
        np.save(folder / "text_feat.npy", np.ones((5, 3)))
    elif kind == "twice":
        (folder / "i_id_mapping.csv").write_text("asin\titemID\nB0\t0\nB0\t1\n")
    elif kind == "objects":
        np.save(folder / "text_feat.npy", np.array([{}], object))
    elif kind in ("digits", "billions"):
        number = "9" * 5000 if kind == "digits" else "9" * 10    # a row for each up to it
        (folder / "baby.inter").write_text(f"{HEAD}0\t{number}\t5.0\t10\t0\n")
    else:
        (folder / "baby.inter").write_text(HEAD + "0\tB2\t5.0\t10\t0\n")


@pytest.mark.parametrize("kind, sentence", [
    ("few rows", "a row of finite numbers for each itemID up to 2, but its shape is .2, 3."),
    ("nan", "finite numbers"),
    ("lengths", "different numbers of rows"),
    ("objects", "cannot be read as an array of numbers"),
    ("names", "has an item B2"),
    ("digits", "has an item 99"),
    ("billions", "has an item 99"),
    ("twice", "gives one asin to several itemIDs"),
])
def test_what_does_not_fit_is_one_sentence(folder, tmp_path, kind, sentence):
    damage(folder, kind)
    with pytest.raises(UserError, match=sentence):
        prepare(folder, tmp_path / "data")


@pytest.mark.parametrize("lines, sentence", [
    ("2\t2\nB0\t0\n3\t1\n", "has no asin for itemID 3, and 3 is the asin of another"),
    ("7\t0\n0\t1\n0\t2\n", "one asin to several itemIDs"),
    ("B2\t2\nB0\tx\n\t1\nB3\t3\n", "2 of 4 lines cannot be used"),
    ("B2\t2\nB0\t0\nB1\t1\nB3\t1\n", "1 of 4 lines cannot be used"),
])
def test_a_mapping_that_would_merge_items_is_refused(folder, lines, sentence):
    (folder / "i_id_mapping.csv").write_text("asin\titemID\n" + lines)
    with pytest.raises(UserError, match=sentence):
        mmrec.read(folder, None)


@pytest.mark.parametrize("rows", [
    np.array([["a", "b"]] * 4), np.ones((4, 2), complex), np.ones((4, 0)), np.full((4, 2), 1e300),
])
def test_features_that_are_no_numbers_are_refused(folder, rows):
    np.save(folder / "text_feat.npy", rows)
    with pytest.raises(UserError, match="must have a row of finite numbers"):
        mmrec.read(folder, None)
