"""sources/folder.py, somebody's own data: small folders with the dirt that hand-made files have."""
import csv
import gzip
import io
import json
import time

import pytest

from common.files import UserError, read_json
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
    assert [*raw.times] == [1578009600, 1577836800, 1577937600]
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
    # the whole catalog, in its order, then what has no line: all of it can be recommended
    keys = [json.loads(line)["key"] for line in open(out / "items.jsonl", encoding="utf-8")]
    assert keys == ["a", "b", "unsold", "7", "c"]


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
def test_times(tmp_path, text, times, clock, report):
    raw = folder.read(write(tmp_path / "own", text), None)
    assert list(zip(raw.users, raw.items)) == [("u", "a"), ("u", "b")]
    assert (raw.times.tolist(), raw.clock) == (times, clock)
    assert raw.report == {"interactions.csv": {"lines": 2, "bad_lines": {}}, **report}
    assert any("has no column time" in note for note in raw.notes) == ("time" not in text.lower())


def test_a_time_without_a_zone_is_utc_on_every_machine(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        raw = folder.read(write(tmp_path / "own", "user,item,time\nu,a,2020-01-01\n"), None)
    time.tzset()
    assert [*raw.times] == [1577836800]


def test_order_inside_a_second_is_kept(tmp_path, histories):
    text = "user,item,time\nu,b,1500000000900\nu,a,1500000000100\nu,c,1500000001000\n"
    out = prepare(write(tmp_path / "own", text), root=tmp_path / "data")
    assert histories(out) == {"u": ["a", "b", "c"]}


@pytest.mark.parametrize("defect, lines", [
    ("no_user_or_item", ["u1,,5", " ,i1,5", "NULL,i1,5", "u1,nan,5", "None,i,5"]),
    ("time_not_understood", ["u1,i1,yesterday", "u1,i1,-4", "u1,i1,", "u1,i1,nan", "u1,i1,inf"]),
    ("columns_missing", ["u1", "u1,i1"]),
], ids=["no_user_or_item", "time_not_understood", "columns_missing"])
def test_bad_lines_are_skipped_and_counted(tmp_path, defect, lines):
    good = [f"u{i % 20},i{i % 7},{TIMES_2017 + i}" for i in range(500)]
    text = "\n".join(["user,item,time", *good, *lines, ""])
    raw = folder.read(write(tmp_path / "own", text), None)
    assert [*raw.times] == [TIMES_2017 + i for i in range(500)]
    assert raw.report == {"interactions.csv": {
        "lines": 500 + len(lines), "bad_lines": {defect: len(lines)}, "first_bad_line": 502,
    }}


@pytest.mark.parametrize("content, sentence", [
    ("", "columns user, item, but user, item is not there"),
    ("Kunde;Artikel\n1;2\n", "it begins with kunde, artikel.: write a header such as user,item"),
    ("a,item,c\n1,2,3\n", "but user is not there"),
    ("user,item,time\n", "no interactions"),
    ("user,item,time\nu,i,1\nu,i,9999999999999999\n", "one unit"),
    ("user,item,time\nu,i,1500000000\nu,j,1500000000001\nu,k,1500000000002\n", "one unit"),
    # else the quote swallows what follows
    ('user,item,time\nu,i,1\nu,"i,2\nu,j,3\n', "line 4 is not CSV"),
    ("x" * 200_000, "line 1 is not CSV"),
], ids=[
    "empty", "German", "no user", "no line", "one time too large", "two units", "open quote",
    "no table",
])
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
    assert "items.jsonl describes 1 items twice: the first counts" in raw.notes


def test_pictures_outside_the_folder_are_refused(tmp_path):
    refused = [
        "../x.jpg", "/etc/passwd", "p/../../x.jpg", "C:\\x.jpg", "C:/x.jpg", "p\\x.jpg", 7,
        "a\0.jpg", "\ud800.jpg",
        ".", "./",    # the data's own folder is no folder of frames
    ]
    images = [*refused, "ok/a.jpg", "", "http://e.org/../a.jpg"]
    raw = folder.read(write(tmp_path / "own", items=[{"item": "a", "images": images}]), None)
    assert raw.catalog["a"]["images"] == ["ok/a.jpg", "http://e.org/../a.jpg"]
    sentence, = [note for note in raw.notes if "refused" in note]
    assert sentence == (
        "items.jsonl: 11 picture paths refused (leaves the folder, or is the folder 5, absolute 1, "
        "backslash or drive 3, no text 2), the first is ../x.jpg: give paths inside the folder, "
        "with /, or addresses"
    )


# ---------------- other names, other separators, other tables

@pytest.mark.parametrize("name, text", [
    ("interactions.csv", "user_id,item_id,timestamp\nu,a,1500000000\nu,b,1500000001\n"),
    ("interactions.csv", "User ID;Product-ID;Event Time\nu;a;1500000000\nu;b;1500000001\n"),
    ("interactions.csv", "user\titem\ttime\nu\ta\t1500000000\nu\tb\t1500000001\n"),
    ("interactions.tsv", "uid\tasin\tdate\nu\ta\t2017-07-14T02:40:00\nu\tb\t1500000001\n"),
    ("interactions.csv", "sep=;\nuser;item;time\nu;a;1500000000\nu;b;1500000001\n"),
    ("interactions.csv", "visitorid|movieId|ts\nu|a|1500000000\nu|b|1500000001\n"),
    ("interactions.csv", '"user","item","time"\n"u","a","1500000000"\nu,b,1500000001\n'),
    ("interactions.csv.gz", "user,item,time\nu,a,1500000000\nu,b,1500000001\n"),
    ("interactions.csv", "session_id;item;time\nu;a;1500000000\nu;b;1500000001\n"),
])
def test_usual_names_and_separators(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert folder.recognises(tmp_path)
    raw = folder.read(tmp_path, None)
    assert list(zip(raw.users, raw.items, raw.times)) == [
        ("u", "a", 1500000000), ("u", "b", 1500000001),
    ]
    assert raw.report[name]["lines"] == 2
    session = "interactions.csv has no users: each session_id is taken for a user"
    assert raw.notes == ([session] if "session_id" in text else [])


def test_the_user_comes_before_the_session_and_columns_that_are_not_read_are_named(tmp_path):
    text = "rating,session,item,user,event_type,time\n5,s1,a,u,buy,1500000000\n"
    raw = folder.read(write(tmp_path / "own", text), None)
    assert [*raw.users] == ["u"]
    assert raw.notes == ["interactions.csv: columns not read: rating, session, event_type"]


def test_utf_16_is_named(tmp_path):
    write(tmp_path / "own")
    table = "user,item,time\nu,a,1\n".encode("utf-16")
    (tmp_path / "own" / "interactions.csv").write_bytes(table)
    with pytest.raises(UserError, match="interactions.csv is UTF-16, .*: save it as UTF-8"):
        folder.read(tmp_path / "own", None)


def test_a_time_that_is_not_understood_is_shown_with_a_form_that_would_do(tmp_path):
    path = write(tmp_path / "own", "user,item,time\nu,a,14 Juillet 2017\nu,b,15 Juillet 2017\n")
    with pytest.raises(UserError) as error:
        folder.read(path, None)
    assert str(error.value) == (
        f"{path / 'interactions.csv'}: 2 of 2 lines cannot be used (time not understood 2), the "
        f"first is line 2 (u, a, 14 Juillet 2017): write times as seconds since 1970 or as "
        f"2017-07-14 12:30:00"
    )


@pytest.mark.parametrize("names", [
    ("train.csv", "valid.csv", "test.csv"), ("train.tsv", "validation.csv", "test.csv.gz"),
])
def test_train_valid_and_test(tmp_path, names, histories):
    for number, name in enumerate(names):
        text = f"user,item,time\nu,i{number},{TIMES_2017 + number}\n"
        content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        (tmp_path / name).write_bytes(content)
    raw = folder.read(tmp_path, None)
    assert list(zip(raw.items, raw.parts)) == [("i0", 0), ("i1", 1), ("i2", 2)]
    assert histories(prepare(tmp_path, tmp_path / "data")) == {"u": ["i0", "i1", "i2"]}


def test_a_column_may_say_the_part(tmp_path):
    text = "user,item,time,split\nu,a,1,train\nu,b,2,Validation\nu,c,3,test\n"
    assert folder.read(write(tmp_path / "own", text), None).parts.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="part not understood 1.*: write train, valid or test"):
        folder.read(write(tmp_path / "own", "user,item,split\nu,a,later\n"), None)


def test_some_tables_with_times_and_some_without_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("user,item,time\nu,a,1500000000\n")
    (tmp_path / "test.csv").write_text("user,item\nu,b\n")
    with pytest.raises(UserError, match="test.csv .* all have a column time, or none"):
        folder.read(tmp_path, None)


# ---------------- catalogs

ITEM = {
    "title": "Mug", "text": ["Holds 0.3 l.", "Blue.", "Kitchen, Mugs", "Acme"], "language": "en",
    "images": ["p/1.jpg", "https://e.org/1.jpg"],
}


def test_usual_keys_of_catalogs(tmp_path):
    raw = folder.read(write(tmp_path / "own", items=[{
        "product_id": 1, "Name": "Mug", "description": "Holds 0.3 l.", "features": ["Blue."],
        "categories": [["Kitchen", "Mugs"]], "brand": "Acme", "lang": "en",
        "image": "p/1.jpg", "image_url": "https://e.org/1.jpg", "price": 3, "rank": 9,
        "sku": "other key", "product_name": "other title",
    }, {"product_id": 2, "price": 4, "title": "", "name": "Pot", "rank": None}]), None)
    assert raw.catalog["1"] == ITEM
    assert raw.catalog["2"]["title"] == "Pot"
    note = "items.jsonl: keys not read: price (2), rank (1), sku (1), product_name (1)"
    assert note in raw.notes


def test_a_table_of_nothing_but_keys(tmp_path):
    write(tmp_path / "own")
    (tmp_path / "own" / "items.csv").write_text("item\nm1\nm22\n")
    raw = folder.read(tmp_path / "own", None)
    assert list(raw.catalog) == ["m1", "m22"]
    assert raw.report["items.csv"]["lines"] == 2


def test_a_table_without_keys_gets_a_sentence_of_its_own(tmp_path):
    write(tmp_path / "own")
    (tmp_path / "own" / "items.csv").write_text("name,colour\nmug,red\n")
    with pytest.raises(UserError, match="the column of the items' keys .it begins with name, col"):
        folder.read(tmp_path / "own", None)


@pytest.mark.parametrize("name, separator", [
    ("items.csv", ","), ("items.csv", ";"), ("items.tsv", "\t"), ("items.csv.gz", ","),
])
def test_a_catalog_as_a_table(tmp_path, name, separator):
    row = [
        "1", "Mug", "Holds 0.3 l.", "['Blue.']", "['Kitchen', 'Mugs']", "Acme", "en",
        "p/1.jpg|https://e.org/1.jpg", "3",
    ]
    header = [
        "item_id", "title", "description", "features", "category", "brand", "language", "images",
        "price",
    ]
    empty = ["2", "nan", "None", "", "", "", "", "", ""]
    rows = [header, row, empty]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    write(tmp_path / "own")
    content = text.getvalue().encode()
    content = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / "own" / name).write_bytes(content)
    raw = folder.read(tmp_path / "own", None)
    assert raw.catalog["1"] == ITEM
    assert raw.catalog["2"] == {"title": "", "text": [], "language": "", "images": []}
    assert f"{name}: keys not read: price (1)" in raw.notes


@pytest.mark.parametrize("other", ["items.json", "products.csv", "items.csv", "items.parquet"])
def test_files_that_are_not_read_are_named(tmp_path, other):
    path = write(tmp_path / "own", items=[{"item": "a"}])
    (path / other).write_text("item,title\na,Mug\n")
    (path / "README.txt").write_text("words")
    notes = read_json(prepare(path, tmp_path / "data") / "source.json")["notes"]
    assert f"not read: {other}; what is read: interactions.csv, items.jsonl" in notes


@pytest.mark.parametrize("bought, described, shown", [
    ("12.0", "12", "12 against 12.0"), ("0000000012", "12", "12 against 0000000012"),
    ("A7", "a7", "a7 against A7"), ("x", "y", "y against x"), ("b", "0", "0 against b"),
])
def test_ids_that_are_written_differently(tmp_path, bought, described, shown):
    text = f"user,item,time\nu,{bought},1\n"
    raw = folder.read(write(tmp_path / "own", text, [{"item": described}]), None)
    assert (
        f"none of the 1 items of items.jsonl occurs in interactions.csv ({shown}): are the ids "
        f"written alike?"
    ) in raw.notes


def test_some_ids_that_are_written_differently(tmp_path):
    text = "user,item,time\nu,SKU-1,1\nu,0012,2\nu,a,3\n"
    items = [{"item": item} for item in ("sku-1", "12", "a")]
    raw = folder.read(write(tmp_path / "own", text, items), None)
    assert (
        "2 items seem to be written differently in items.jsonl and in interactions.csv (sku-1 "
        "against SKU-1), and count as two"
    ) in raw.notes


def test_items_that_only_one_file_has_are_counted(tmp_path):
    raw = folder.read(write(
        tmp_path / "own", "user,item,time\nu,a,1\nu,b,2\nu,c,3\n",
        [{"item": "a"}, {"item": "d"}, {"item": "e"}],
    ), None)
    assert raw.notes[-2:] == [
        "2 of 3 items of items.jsonl do not occur in interactions.csv, the first is d",
        "2 of 3 items of interactions.csv are not in items.jsonl, the first is b",
    ]


@pytest.mark.parametrize("image, why", [
    ("/home/x/1.png", "absolute"), ("img\\1.png", "backslash or drive"),
    ("data:image/png;base64,xx", "neither a path nor a web address"),
    ("file:///x/1.png", "neither a path nor a web address"),
    ("../1.png", "leaves the folder, or is the folder"),
])
def test_why_a_picture_is_refused(tmp_path, image, why):
    raw = folder.read(write(tmp_path / "own", items=[{"item": "a", "images": [image]}]), None)
    assert raw.catalog["a"]["images"] == []
    assert any(note.startswith(
        f"items.jsonl: 1 picture paths refused ({why} 1), the first is {image}"
    ) for note in raw.notes)


@pytest.mark.parametrize("some, others, shown", [
    ("12", "12.0", "(12 and 12.0)"), ("012", "12", "(012 and 12)"),
    ("caf\u00e9", "cafe\u0301", "(caf"), ("mug", "mug\u200b", "(mug"),
])
def test_keys_that_are_written_in_two_ways_in_one_column(tmp_path, some, others, shown):
    lines = ["user,item,time", f"u,{some},1", f"u,{others},2", "u,x,3"]
    raw = folder.read(write(tmp_path / "own", "\n".join(lines)), None)
    note, = [note for note in raw.notes if "two ways" in note]
    assert note.startswith("1 items of interactions.csv seem to be written in two ways")
    assert shown in note and "count as two" in note


def test_keys_that_have_lost_their_digits_are_named(tmp_path):
    text = "user,item,time\nu,9.78014E+12,1\nv,9.78014E+12,2\n"
    raw = folder.read(write(tmp_path / "own", text), None)
    assert any("written like 9.78014E+12" in note for note in raw.notes)


def test_ids_in_letters_of_other_scripts_are_no_others(tmp_path):
    path = write(tmp_path / "own", "user,item,time\nu,\u4e59,1\n", [{"item": "\u4e19"}])
    assert not any("differently" in note for note in folder.read(path, None).notes)


@pytest.mark.parametrize("cell, texts", [
    ("""['Home' 'Kitchen']""", ["Home, Kitchen"]), ("""["Home", null]""", ["Home"]),
    ("""['Home', None]""", ["Home"]), ("[sic]", ["[sic]"]),
])
def test_lists_that_programs_write_into_cells(tmp_path, cell, texts):
    path = write(tmp_path / "own")
    with open(path / "items.csv", "w", newline="") as file:
        csv.writer(file).writerows([["item", "categories"], ["a", cell]])
    assert folder.read(path, None).catalog["a"]["text"] == texts


def test_of_two_keys_of_one_plain_name_the_one_with_a_text_counts(tmp_path):
    items = [{"item": "a", "image_url": "a.jpg", "imageUrl": None, "Title": "", "title": "Mug"}]
    found = folder.read(write(tmp_path / "own", items=items), None).catalog["a"]
    assert (found["title"], found["images"]) == ("Mug", ["a.jpg"])


def test_half_letters_in_names_are_shown_and_written(tmp_path):
    items = ['{"item": "a", "x\\ud800": "b", "images": ["../\\ud800"]}']
    raw = folder.read(write(tmp_path / "own", items=items), None)
    "".join(raw.notes).encode()
    assert any("x?" in note for note in raw.notes)


@pytest.mark.parametrize("items, described", [
    ([{"item": "a"}], 1), ([{"item": "a"}, {"item": "a"}], -1),
    ([{"item": f"i{n}"} for n in range(200)] + ["no JSON"], -1),
])
def test_lines_that_describe_nothing_new_are_remembered(tmp_path, items, described):
    path = write(tmp_path / "own", "user,item,time\nu,a,1\nu,i1,2\n", items)
    with open(prepare(path, tmp_path / "data") / "source.json") as file:
        assert json.load(file)["described"] == described
