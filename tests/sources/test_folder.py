"""sources/folder.py, somebody's own data: small folders with the dirt that hand-made files have."""
import json
import time

import pytest

from common.files import UserError
from sources import folder, prepare

TIMES_2017 = 1_500_000_000


def write(path, interactions="user,item,time\nu,a,1\n", items=None):
    """Own-data files; of the items a dict becomes a line of JSON, text stays as it is."""
    path.mkdir(exist_ok=True)
    (path / "interactions.csv").write_bytes(interactions.encode())
    if items is not None:
        lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
        (path / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_own_folder(tmp_path, histories):
    lines = [
        "\ufeffuser,item,time", "u1,b,2020-01-03", "u1,a,2020-01-01", "",
        "u1,c,2020-01-02T05:00:00+01:00", "",
    ]
    path = write(tmp_path / "own", "\r\n".join(lines), [
        {"item": "a", "title": "<b>Caf&eacute;</b>", "text": "one", "images": "a.jpg"},
        {"item": "b", "text": ["x", None, "x", " y "], "language": "fr",
         "images": ["p/b.jpg", "https://e.org/b.jpg"]},
        {"item": "unsold"},
        {"item": 7, "image": ["7.jpg"]},
    ])
    raw = folder.read(path, None)
    assert raw.clock == "seconds"
    assert raw.times == [1578009600, 1577836800, 1577937600]
    assert raw.catalog == {
        "a": {"title": "Café", "text": ["one"], "language": "", "images": ["a.jpg"]},
        "b": {"title": "", "text": ["x", "y"], "language": "fr",
              "images": ["p/b.jpg", "https://e.org/b.jpg"]},
        "unsold": {"title": "", "text": [], "language": "", "images": []},
        "7": {"title": "", "text": [], "language": "", "images": ["7.jpg"]},
    }
    assert (raw.core, raw.need_catalog, raw.image_root) == (0, False, str(path.resolve()))
    out = prepare(path, root=tmp_path / "data")
    assert histories(out) == {"u1": ["a", "c", "b"]}
    # the whole catalog: an unsold item can be recommended, and so can an item without a line
    keys = [json.loads(line)["key"] for line in open(out / "items.jsonl", encoding="utf-8")]
    assert keys == ["7", "a", "b", "c", "unsold"]


# ---------------- interactions

@pytest.mark.parametrize("text, times, clock, report", [
    ("user,item,time\nu,a,1500000000123\nu,b,1500086400123\n",
     [1500000000.123, 1500086400.123], "seconds", {"times read as milliseconds": 2}),
    ("user,item,timestamp\nu,a,1500000000000000\nu,b,2000000000000000\n",
     [15e8, 2e9], "seconds", {"times read as microseconds": 2}),
    ("user,item,timestamp\nu,a,1500000000000000000\nu,b,2000000000000000000\n",
     [15e8, 2e9], "seconds", {"times read as nanoseconds": 2}),
    ("user,item,time\nu,a,2020-01-01\nu,b,2020-01-02\n", [1577836800, 1577923200], "day", {}),
    ("user,item,time\nu,a, 2020-01-01T00:00:01Z\nu,b,1e9\n", [1577836801, 1e9], "seconds", {}),
    ("user,item,time\nu,a,1\nu,b,2\n", [1, 2], "order", {}),
    ("user,item,time\nu,a,0\nu,b,10000000\n", [0, 1e7], "seconds", {}),
    ("user,item,timestamp,time\nu,a,5,1\nu,b,4,2\n", [1, 2], "order", {}),
    (" TIME ,more,Item,USER\n1,x,a,u\n2,,b,u\n", [1, 2], "order", {}),
    ("item,user\na,u\nb,u\n", [0, 1], "order", {}),
], ids=[
    "milliseconds", "microseconds", "nanoseconds", "days", "zones", "counted", "from 1970",
    "two columns of times", "columns in another order", "no times",
])
def test_times(tmp_path, capsys, text, times, clock, report):
    raw = folder.read(write(tmp_path / "own", text), None)
    assert list(zip(raw.users, raw.items)) == [("u", "a"), ("u", "b")]
    assert (raw.times, raw.clock) == (times, clock)
    assert raw.report == {"interactions.csv": {"lines": 2, "bad_lines": {}}, **report}
    assert ("has no column time" in capsys.readouterr().out) == ("time" not in text.lower())


def test_a_time_without_a_zone_is_utc_on_every_machine(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        raw = folder.read(write(tmp_path / "own", "user,item,time\nu,a,2020-01-01\n"), None)
    time.tzset()
    assert raw.times == [1577836800]


def test_order_inside_a_second_is_kept(tmp_path, histories):
    text = "user,item,time\nu,b,1500000000900\nu,a,1500000000100\nu,c,1500000001000\n"
    out = prepare(write(tmp_path / "own", text), root=tmp_path / "data")
    assert histories(out) == {"u": ["a", "b", "c"]}


@pytest.mark.parametrize("defect, lines", [
    ("no_user_or_item", ["u1,,5", " ,i1,5", "u1, ,5"]),
    ("time_not_understood", ["u1,i1,yesterday", "u1,i1,-4", "u1,i1,", "u1,i1,nan", "u1,i1,inf"]),
    ("columns_missing", ["u1", "u1,i1"]),
], ids=["no_user_or_item", "time_not_understood", "columns_missing"])
def test_bad_lines_are_skipped_and_counted(tmp_path, defect, lines):
    good = [f"u{i % 20},i{i % 7},{TIMES_2017 + i}" for i in range(500)]
    text = "\n".join(["user,item,time", *good, *lines, ""])
    raw = folder.read(write(tmp_path / "own", text), None)
    assert raw.times == [TIMES_2017 + i for i in range(500)]
    assert raw.report == {"interactions.csv": {
        "lines": 500 + len(lines), "bad_lines": {defect: len(lines)}, "first_bad_line": 502,
    }}


@pytest.mark.parametrize("content, sentence", [
    ("", "columns user, item, but user, item is not there"),
    ("a,item,c\n1,2,3\n", "but user is not there"),
    ("user,item,time\n", "no interactions"),
    ("user,item,time\nu,i,1\nu,i,9999999999999999\n", "one unit"),
    ("user,item,time\nu,i,1500000000\nu,j,1500000000001\nu,k,1500000000002\n", "one unit"),
    # else the quote swallows what follows
    ('user,item,time\nu,i,1\nu,"i,2\nu,j,3\n', "line 4 is not CSV"),
    ("x" * 200_000, "line 1 is not CSV"),
], ids=["empty", "no user", "no line", "one time too large", "two units", "open quote", "no table"])
def test_files_that_cannot_be_used_are_one_sentence(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(write(tmp_path / "own", content), root=tmp_path / "data")
    assert not list((tmp_path / "data").glob("*"))


# ---------------- items

def test_bad_items_are_skipped_and_counted(tmp_path):
    good = [{"item": f"i{n}", "title": "t"} for n in range(800)]
    bad = [
        '{broken', "[1]", {"title": "no key"}, {"item": ""}, {"item": " "}, {"item": True},
        {"item": ["i"]}, '{"item": "\\ud800x"}',
    ]
    items = [*good, *bad, {"item": "i0", "title": "again"}]
    raw = folder.read(write(tmp_path / "own", items=items), None)
    assert list(raw.catalog) == [f"i{n}" for n in range(800)]
    assert raw.catalog["i0"]["title"] == "t"
    assert raw.report["items.jsonl"] == {
        "lines": 809,
        "bad_lines": {"not_json": 1, "not_an_object": 1, "no_item": 6},
        "first_bad_line": 801,
    }
    assert raw.report["items described twice, the first kept"] == 1


def test_pictures_outside_the_folder_are_refused(tmp_path):
    refused = [
        "../x.jpg", "/etc/passwd", "p/../../x.jpg", "C:\\x.jpg", "C:/x.jpg", "p\\x.jpg", 7,
        "a\0.jpg", "\ud800.jpg",
        ".", "./",    # the data's own folder is no folder of frames
    ]
    images = [*refused, "ok/a.jpg", "", "http://e.org/../a.jpg"]
    raw = folder.read(write(tmp_path / "own", items=[{"item": "a", "images": images}]), None)
    assert raw.catalog["a"]["images"] == ["ok/a.jpg", "http://e.org/../a.jpg"]
    assert raw.report["picture paths refused"] == len(refused)
