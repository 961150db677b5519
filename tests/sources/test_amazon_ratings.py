"""sources/amazon_ratings.py: tables of stars of three years, with and without their products."""
import gzip
import json

import pytest

import data
from common.files import UserError, read_json
from sources import amazon_ratings, prepare

P = ["B000000001", "0000000002", "B000000003"]
U = "A0000000000001"
T = 1_400_000_000


@pytest.mark.parametrize("name, lines", [
    ("ratings_Tea.csv", [f"{U},{item},5.0,{T + n}" for n, item in enumerate(P)]),
    ("Tea.csv", [f"{item},{U},5.0,{T + n}" for n, item in enumerate(P)]),
    ("Tea.csv.gz", ["user_id,parent_asin,rating,timestamp",
                    *(f"{U},{item},5.0,{(T + n) * 1000}" for n, item in enumerate(P))]),
])
def test_three_years(tmp_path, name, lines):
    text = "".join(f"{line}\n" for line in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (tmp_path / "meta_Tea.json").write_text(json.dumps({"asin": P[0], "title": "Tea"}) + "\n")
    assert amazon_ratings.recognises(tmp_path)
    raw = amazon_ratings.read(tmp_path, None)
    rows = list(zip(raw.users, raw.items, raw.times))
    assert rows == [(U, item, T + n) for n, item in enumerate(P)]
    assert raw.catalog[P[0]]["title"] == "Tea"
    assert raw.report["items_without_metadata"] == 2


def test_last_out_splits_are_kept(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for n, part in enumerate(("train", "valid", "test")):
        (folder / f"Tea.{part}.csv").write_text(
            f"user_id,parent_asin,rating,timestamp,history\n{U},{P[n]},5.0,{T + n}000,\n"
        )
    dataset = data.load(folder, root=tmp_path / "data", split="files")
    keys = [item["key"] for item in dataset.items]
    assert dataset.flat.tolist() == [keys.index(item) for item in P]
    assert keys[dataset.flat[dataset.targets["valid"][0]]] == P[1]
    assert keys[dataset.flat[dataset.targets["test"][0]]] == P[2]


@pytest.mark.parametrize("line", [
    "a,b,5.0,1400000000", f"{U},{P[0]},5.0", "user,item,time", f"{P[0]},{P[1]},5.0,1400000000", "",
])
def test_other_tables_are_not_taken_for_ratings(tmp_path, line):
    (tmp_path / "Tea.csv").write_text(f"{line}\n")
    assert not amazon_ratings.recognises(tmp_path)


def test_somebodys_own_tables_stay_his(tmp_path):
    line = f"user_id,parent_asin,rating,timestamp\n{U},{P[0]},5.0,{T}000\n"
    for names in (["interactions.csv"], ["train.csv", "valid.csv", "test.csv"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).write_text(line)
        assert not amazon_ratings.recognises(folder)
        assert read_json(prepare(folder, tmp_path / "d") / "source.json")["source"] == "folder"


def test_several_categories_are_refused(tmp_path):
    for name in ("Tea", "Baby"):
        (tmp_path / f"{name}.csv").write_text(f"{P[0]},{U},5.0,{T}\n")
    with pytest.raises(UserError, match="2 categories .Baby, Tea."):
        prepare(tmp_path, tmp_path / "data")
