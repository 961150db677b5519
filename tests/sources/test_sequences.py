"""sources/sequences.py: numbered sequences, one line a user or one line an interaction."""
import json

import pytest

from common.files import UserError, read_json
from sources import prepare, sequences


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("text", [
    "1 10 2 3\n2 2 3 10 2\n", "1 10\n1 2\n1 3\n2 2\n2 3\n2 10\n2 2\n", "1\t10\t2  3\n2 2 3 10 2",
])
def test_both_ways_of_writing(tmp_path, histories, text):
    folder = write(tmp_path / "x", Beauty=text, Beauty_sample="1 7 8 9\n2 7 8 9\n")
    (folder / "Beauty_item2attributes.json").write_text("{}")
    out = prepare(folder, tmp_path / "data")
    assert histories(out) == {"1": ["10", "2", "3"], "2": ["2", "3", "10", "2"]}
    keys = [json.loads(line)["key"] for line in open(out / "items.jsonl", encoding="utf-8")]
    assert keys == ["2", "3", "10"]    # by number
    about = read_json(out / "source.json")
    assert about["clock"] == "order"
    assert about["notes"] == [
        "not read: Beauty_item2attributes.json, Beauty_sample.txt; what is read: Beauty.txt"
    ]


def test_titles_may_lie_beside_it(tmp_path):
    folder = write(tmp_path / "x", a="1 1 2 3\n")
    (folder / "items.csv").write_text("item,title\n1,Tea\n2,Cup\n9,Pot\n")
    raw = sequences.read(folder, None)
    assert raw.catalog["2"]["title"] == "Cup"
    assert raw.item_order == ["1", "2", "9", "3"]    # the catalog first
    assert len(raw.notes) == 2


@pytest.mark.parametrize("text", [
    "",
    "some words in a file\n",
    "1\n2\n",
    "1 2 5 881250949\n1 3 4 881250950\n",    # ratings with times
    "1 a\n2 b\n",
    "1 10 5\n1 11 4\n2 10 3\n",             # ratings without times
])
def test_other_text_files_are_not_taken_for_sequences(tmp_path, text):
    assert not sequences.recognises(write(tmp_path / "x", a=text))


def test_train_and_test(tmp_path):
    folder = write(tmp_path / "x", train="1 1 2 3\n2 4 5\n", test="1 4\n2 1\n")
    raw = sequences.read(folder, None)
    assert list(zip(raw.users, raw.items, raw.parts)) == [
        ("1", "1", 0), ("1", "2", 0), ("1", "3", 0), ("2", "4", 0), ("2", "5", 0),
        ("1", "4", 2), ("2", "1", 2),
    ]


def test_several_sets_are_refused(tmp_path):
    folder = write(tmp_path / "x", Beauty="1 2 3 4\n", Toys="1 2 3 4\n")
    with pytest.raises(UserError, match="several data sets .Beauty, Toys."):
        prepare(folder, tmp_path / "data")
