"""sources/amazon.py on small files with the dirt of the real ones; what is expected is worked out
by hand."""
import gzip
import json

import pytest

import data
from common.files import UserError, read_json
from helpers import send
from sources import amazon, prepare

DAY = 86_400
MAY_2014 = 1_400_000_000
PICTURES = "https://images-na.ssl-images-amazon.com/images/I/"


def content(path, rows):
    """The bytes of a file: a dict becomes a line of JSON, text stays; .gz is compressed."""
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    text = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
    return gzip.compress(text, mtime=0) if str(path).endswith(".gz") else text


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(path, rows))


def review(user="U1", item="A1", time=MAY_2014, **more):
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 5.0, **more}


def review_2023(user="U1", item="P1", time=MAY_2014 * 1000, **more):
    return {"user_id": user, "asin": "variant", "parent_asin": item, "timestamp": time, **more}


def triples(raw):
    return list(zip(raw.users, raw.items, raw.times))


# ---------------- names and files

def test_names_beyond_those_that_are_listed():
    assert len(amazon.NAMES) == 10
    for name in (*amazon.NAMES, "amazon2018:Gift_Cards", "amazon2014:Baby", "amazon2023:Any"):
        assert amazon.knows(name)
    for name in ("Pantry", "amazon2018:../x", "amazon2019:Baby", "amazon2018:", "amazon2018:Baby\n",
                 "xamazon2018:Baby"):
        assert not amazon.knows(name)


@pytest.mark.parametrize("files, expected", [
    (["Prime_Pantry_5.json.gz", "meta_Prime_Pantry.json.gz"], True),
    (["Prime_Pantry.json", "meta_Prime_Pantry.json"], True),
    (["reviews_Baby_5.json.gz"], True),
    (["All_Beauty.jsonl", "meta_All_Beauty.jsonl.gz"], True),
    (["Baby_5.json.gz", "interactions.csv"], False),
    (["meta_Baby.json.gz"], False),
    (["Baby_5.csv"], False),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_recognises_by_file_names(tmp_path, files, expected):
    for name in files:
        write(tmp_path / name, [review()])
    assert amazon.recognises(tmp_path) is expected


def test_recognises_lone_files_by_their_first_lines(tmp_path):
    rows = [{"item": "A1", "title": "Tea"}, {"asin": "A1", "title": "Tea"}]
    write(tmp_path / "items.jsonl", rows)
    write(tmp_path / "source.json", ["{", ' "format": 1', "}"])
    write(tmp_path / "late.json", [{}] * 100 + [review()])
    (tmp_path / "cut.json.gz").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "folder.json").mkdir()
    assert not amazon.recognises(tmp_path)
    write(tmp_path / "any_name.jsonl", ["not json", review_2023()])
    assert amazon.recognises(tmp_path)


def test_five_core_comes_before_all_reviews(tmp_path):
    write(tmp_path / "Tea.json", [review("all")])
    write(tmp_path / "Tea_5.json.gz", [review("core")])
    write(tmp_path / "Other.json", [review("other")])    # looks like reviews, but has no metadata
    write(tmp_path / "meta_Tea.json.gz", [{"asin": "A1", "title": "Tea"}])
    raw = amazon.read(tmp_path, None)
    assert [*raw.users] == ["core"]
    assert raw.catalog["A1"]["title"] == "Tea"
    notes = read_json(prepare(tmp_path, tmp_path / "data") / "source.json")["notes"]
    assert notes == [
        "not read: Other.json, Tea.json; what is read: Tea_5.json.gz, meta_Tea.json.gz"
    ]


def test_several_categories_are_refused(tmp_path):
    for name in ("Baby_5.json", "Tea_5.json"):
        write(tmp_path / name, [review()])
    with pytest.raises(UserError, match="2 categories .Baby, Tea."):
        amazon.read(tmp_path, None)
    for name in ("meta_Baby.json", "meta_Tea.json"):
        write(tmp_path / name, [{"asin": "A1"}])
    with pytest.raises(UserError, match="make one folder for each"):
        amazon.read(tmp_path, None)


# ---------------- reviews

def test_reviews_of_2018(tmp_path):
    write(tmp_path / "Tea_5.json.gz", [
        review("U2", "A2", MAY_2014 + DAY),
        "",
        review(" U1 ", 7, str(MAY_2014)),
        review("U1", "A2", MAY_2014 * 1000),
        review("U1", "A2", float(MAY_2014)),
        review("U1", "A2", MAY_2014 + DAY),
        review("U2\n\ud800", "A 2", 0),
        '{"reviewerID": "U2", "asin": "A2", "unixReviewTime": 0, "x": NaN}',
    ])
    raw = amazon.read(tmp_path, None)
    assert triples(raw) == [
        ("U2", "A2", MAY_2014 + DAY),
        ("U1", "7", MAY_2014),
        ("U1", "A2", MAY_2014),
        ("U1", "A2", MAY_2014),
        ("U1", "A2", MAY_2014 + DAY),
        ("U2 ?", "A 2", 0),
        ("U2", "A2", 0),
    ]
    assert raw.report["Tea_5.json.gz"] == {
        "lines": 7, "bad_lines": {}, "users": 3, "items": 3,
        "exact_duplicates": 1, "repeated_items": 3,
    }
    assert (raw.clock, raw.core, raw.need_catalog, raw.published) == ("day", 0, False, {})
    assert raw.catalog == {}
    assert raw.report["items_without_metadata"] == 3
    assert raw.picture_hosts == amazon.HOSTS


def test_reviews_of_2023(tmp_path):
    rows = [review_2023(time=1_588_615_855_070), review_2023("U2", "P2", 946_684_800_999)]
    write(tmp_path / "Tea.jsonl.gz", rows)
    raw = amazon.read(tmp_path, None)
    assert triples(raw) == [("U1", "P1", 1_588_615_855.07), ("U2", "P2", 946_684_800.999)]
    assert raw.clock == "seconds"


BAD_LINES = {
    "not_json": [
        "{'broken': ", "{} {}", "[" * 100_000, '{"reviewerID": __import__("os").abort()}',
    ],
    "not_an_object": ["[1, 2]", "null", '"U1"'],
    "no_user": [{"asin": "A1", "unixReviewTime": 5}, review(user="  "), review(user=True)],
    "no_item": [review(item=None), review(item={"a": 1}), review(item=float("nan"))],
    "no_time": [{"reviewerID": "U1", "asin": "A1"}, review(time=None)],
    "impossible_time": [
        review(time=time) for time in (
            -1, 5_000_000_000, MAY_2014 * 10_000, "02 26, 2014", float("nan"), float("inf"),
            [MAY_2014], 10 ** 400,
        )
    ],
}


@pytest.mark.parametrize("defect", BAD_LINES)
def test_bad_lines_are_skipped_and_counted(tmp_path, defect):
    bad = BAD_LINES[defect]
    good = [review(f"U{i}") for i in range(800)]
    write(tmp_path / "Tea_5.json", [*good[:49], "", *bad, *good[49:]])
    raw = amazon.read(tmp_path, None)
    counts = raw.report["Tea_5.json"]
    assert [*raw.users] == [f"U{i}" for i in range(800)]
    assert (counts["lines"], counts["bad_lines"]) == (800 + len(bad), {defect: len(bad)})
    assert counts["first_bad_line"] == 51


# ---------------- metadata

def test_metadata_of_2014_are_python_literals(tmp_path):
    write(tmp_path / "reviews_Baby_5.json.gz", [review(item=f"A{i}") for i in range(1, 5)])
    write(tmp_path / "meta_Baby.json.gz", [
        {"asin": "A0", "title": "nobody reviewed it"},
        "{'asin': 'A1', 'title': 'Mum\\'s &amp; <b>Baby</b>', 'price': 9.5, "
        "'imUrl': 'http://e.com/I/1._SY300_.jpg', 'related': {'also_bought': ['A0', 'A2']}, "
        "'categories': [['Baby'], ['Baby', 'Bath &amp; Skin', 'Tub'], ['x', 'y', 'z']], "
        "'description': 'Soft.\\n\\nSafe.', 'brand': 'Caf\\xe9'}",
        "{'asin': 'A2', 'categories': [[]], 'imUrl': 'ftp://e.com/1.jpg', 'title': None}",
        "{'asin': 'A1', 'title': 'described again'}",
        {"asin": "A3", "title": "valid JSON, too", "description": ""},
    ])
    raw = amazon.read(tmp_path, None)
    assert raw.catalog == {
        "A1": {
            "title": "Mum's & Baby",
            "text": ["Soft. Safe.", "Baby, Bath & Skin, Tub", "Café"],
            "language": "en",
            "images": ["http://e.com/I/1._SY300_.jpg"],
        },
        "A2": {"title": "", "text": [], "language": "en", "images": []},
        "A3": {"title": "valid JSON, too", "text": [], "language": "en", "images": []},
    }
    assert raw.report["meta_Baby.json.gz"] == {
        "lines": 5, "bad_lines": {}, "items": 4, "duplicate_items": 1, "titles_unusable": 1,
        "pictures_not_understood": 1,
    }
    assert raw.notes == [
        "meta_Baby.json.gz: the pictures of 1 products are not understood: an address is wanted"
    ]
    assert raw.report["items_without_metadata"] == 1
    assert raw.clock == "day"


def test_metadata_of_2018(tmp_path):
    write(tmp_path / "Tea_5.json.gz", [review(item=f"A{i}") for i in range(1, 5)])
    write(tmp_path / "meta_Tea.json.gz", [
        {
            "asin": "A1",
            "title": '<span class="a-size-medium a-color-secondary"',
            "brand": "T &amp; Co",
            "description": ["Green.", "", "<p>Black</p>", "Green."],
            "category": ["Food &amp; Drink", "", "Tea"],
            "imageURLHighRes": [
                f"{PICTURES}1.jpg", f"{PICTURES}2.jpg", f"{PICTURES}1.jpg", 5,
                "data:image/png;base64,xx",
            ],
            "imageURL": [f"{PICTURES}9._SS40_.jpg"],
        },
        {
            "asin": "A2",
            "title": "var aPageStart = (new Date()).getTime();",
            "description": "one string",
            "brand": None,
            "category": ["Tea", "</span></span></span>", "Made of leaves"],
            "imageURLHighRes": [],
            "imageURL": [f"{PICTURES}71+ab._SX38_SY50_CR,0,0,38,50_.jpg", f"{PICTURES}plain.jpg"],
        },
        {
            "asin": "A3",
            "title": "x" * 3000,
            "imageURLHighRes": [f"{PICTURES}{i}.jpg" for i in range(12)],
        },
    ])
    raw = amazon.read(tmp_path, None)
    assert raw.catalog["A1"] == {
        "title": "",
        "text": ["Green.", "Black", "Food & Drink, Tea", "T & Co"],
        "language": "en",
        "images": [f"{PICTURES}1.jpg", f"{PICTURES}2.jpg"],
    }
    assert raw.catalog["A2"] == {
        "title": "",
        "text": ["one string", "Tea"],
        "language": "en",
        "images": [f"{PICTURES}71+ab.jpg", f"{PICTURES}plain.jpg"],
    }
    assert len(raw.catalog["A3"]["title"]) == 2000
    assert raw.catalog["A3"]["images"] == [f"{PICTURES}{i}.jpg" for i in range(10)]
    assert raw.report["meta_Tea.json.gz"]["titles_unusable"] == 2


def saved_by_datasets(images):
    """A list of objects as an object of lists."""
    sizes = ("hi_res", "large", "thumb", "variant")
    return {size: [(image or {}).get(size) for image in images] for size in sizes}


@pytest.mark.parametrize("shape", [list, saved_by_datasets])
def test_metadata_of_2023(tmp_path, shape):
    write(tmp_path / "Tea.jsonl", [review_2023(item="P1")])
    images = [
        {"thumb": "https://t/1.jpg", "large": "https://l/1.jpg", "hi_res": "https://h/1.jpg"},
        {"thumb": "https://t/2.jpg", "large": "https://l/2.jpg", "hi_res": None},
        {"thumb": "https://t/3.jpg", "large": "", "variant": "MAIN"},
        {},
        None,
    ]
    write(tmp_path / "meta_Tea.jsonl.gz", [{
        "parent_asin": "P1",
        "asin": "variant",
        "title": "Чай 茶",
        "store": "Leaf",
        "categories": ["Food", "Tea"],
        "description": ["Loose"],
        "features": ["Green.", "From Uji"],
        "bought_together": None,
        "images": shape(images),
    }])
    raw = amazon.read(tmp_path, None)
    assert raw.catalog == {"P1": {
        "title": "Чай 茶",
        "text": ["Green.", "From Uji", "Loose", "Food, Tea", "Leaf"],
        "language": "en",
        "images": ["https://h/1.jpg", "https://l/2.jpg", "https://t/3.jpg"],
    }}
    assert raw.notes == []


def test_rows_without_a_key_and_rows_nobody_needs(tmp_path):
    """Literals are evaluated for reviewed products only; a row of two keys is read as a whole."""
    write(tmp_path / "Tea_5.json", [review()])
    write(tmp_path / "meta_Tea.json", [
        *(f"{{'asin': 'B{i}', broken}}" for i in range(150)),
        {"title": "no key"},
        {"similar": {"asin": "B1"}, "asin": " A1 ", "title": "Tea"},
    ])
    raw = amazon.read(tmp_path, None)
    counts = raw.report["meta_Tea.json"]
    assert counts["bad_lines"] == {"no_item": 1}
    assert counts["items"] == 151
    assert raw.catalog["A1"]["title"] == "Tea"


@pytest.mark.parametrize("name", ["Tea_5.json.gz", "meta_Tea.json"])
@pytest.mark.parametrize("rows", [[], [" ", " "]], ids=["empty", "blank"])
def test_a_file_without_a_line_is_refused(tmp_path, name, rows):
    write(tmp_path / "Tea_5.json.gz", [review()])
    write(tmp_path / "meta_Tea.json", [{"asin": "A1"}])
    write(tmp_path / name, rows)
    with pytest.raises(UserError, match=f"{name} is empty"):
        amazon.read(tmp_path, None)


# ---------------- fetching

def test_fetch_from_a_mirror_and_read(tmp_path, server):
    reviews = "/categoryFilesSmall/Prime_Pantry_5.json.gz"
    metadata = "/meta_Prime_Pantry.json.gz"    # this mirror has no folders
    server.routes[reviews] = send(200, content(reviews, [review()]))
    server.routes[metadata] = send(200, content(metadata, [{"asin": "A1", "title": "Tea"}]))
    raw_folder = tmp_path / "raw" / "pantry"
    assert amazon.fetch("pantry", raw_folder, server.base + "/") == raw_folder
    asked = [reviews, f"/metaFiles2{metadata}", metadata]
    assert server.asked == asked
    raw = amazon.read(raw_folder, "pantry")
    assert triples(raw) == [("U1", "A1", MAY_2014)]
    assert raw.catalog["A1"]["title"] == "Tea"
    assert (raw.core, raw.need_catalog, raw.clock) == (5, True, "day")
    assert raw.published == {
        "users": 13101, "items": 4898, "interactions": 126962, "source": "UniSRec",
    }
    amazon.fetch("pantry", raw_folder, server.base)
    assert server.asked == asked    # nothing is fetched twice


def test_fetch_2023_from_a_mirror_with_uncompressed_files(tmp_path, server):
    reviews = "/raw/review_categories/All_Beauty.jsonl"
    metadata = "/raw/meta_categories/meta_All_Beauty.jsonl.gz"
    server.routes[reviews] = send(200, content(reviews, [review_2023()]))
    server.routes[metadata] = send(200, content(metadata, [{"parent_asin": "P1", "title": "Soap"}]))
    folder = amazon.fetch("amazon2023:All_Beauty", tmp_path / "raw", server.base)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["All_Beauty.jsonl", "meta_All_Beauty.jsonl.gz"]
    raw = amazon.read(folder, "amazon2023:All_Beauty")
    assert raw.catalog["P1"]["title"] == "Soap"
    assert (raw.core, raw.need_catalog, raw.published) == (5, True, {})


@pytest.mark.parametrize("name, files", [
    ("pantry", ["Prime_Pantry_5.json", "meta_Prime_Pantry.json.gz"]),
    ("baby", ["reviews_Baby.json.gz", "meta_Baby.json"]),
    ("amazon2023:Baby_Products", ["Baby_Products.jsonl", "meta_Baby_Products.jsonl.gz"]),
], ids=["2018", "all reviews instead of the 5-core", "2023"])
def test_files_put_by_hand_need_no_network(tmp_path, server, name, files):
    for file in files:
        write(tmp_path / file, [review_2023() if "2023" in name else review()])
    assert amazon.fetch(name, tmp_path, server.base) == tmp_path
    assert server.asked == []
    assert [*amazon.read(tmp_path, name).users] == ["U1"]


def test_files_of_another_year_do_not_stand_for_a_set(tmp_path, server):
    write(tmp_path / "Toys_and_Games_5.json.gz", [review("2018")])
    write(tmp_path / "meta_Toys_and_Games.json.gz", [{"asin": "A1"}])
    with pytest.raises(UserError, match="lacks the reviews of toys"):
        amazon.read(tmp_path, "toys")
    reviews = "/reviews_Toys_and_Games_5.json.gz"
    server.routes[reviews] = send(200, content(reviews, [review("2014")]))
    assert [*amazon.read(amazon.fetch("toys", tmp_path, server.base), "toys").users] == ["2014"]


LAB = "https://mcauleylab.ucsd.edu/public_datasets/data"
SNAP = "https://snap.stanford.edu/data/amazon/productGraph"
ALIAS = "https://jmcauley.ucsd.edu/data/amazon_v2"
HUB = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/raw"


@pytest.mark.parametrize("name, reviews, metadata", [
    ("arts",
     [f"{LAB}/amazon_v2/categoryFilesSmall/Arts_Crafts_and_Sewing_5.json.gz",
      f"{ALIAS}/categoryFilesSmall/Arts_Crafts_and_Sewing_5.json.gz"],
     [f"{LAB}/amazon_v2/metaFiles2/meta_Arts_Crafts_and_Sewing.json.gz",
      f"{ALIAS}/metaFiles2/meta_Arts_Crafts_and_Sewing.json.gz"]),
    ("toys",
     [f"{SNAP}/categoryFiles/reviews_Toys_and_Games_5.json.gz",
      f"{LAB}/amazon/categoryFiles/reviews_Toys_and_Games_5.json.gz"],
     [f"{SNAP}/categoryFiles/meta_Toys_and_Games.json.gz",
      f"{LAB}/amazon/categoryFiles/meta_Toys_and_Games.json.gz"]),
    ("amazon2023:All_Beauty",
     [f"{LAB}/amazon_2023/raw/review_categories/All_Beauty.jsonl.gz",
      f"{HUB}/review_categories/All_Beauty.jsonl"],
     [f"{LAB}/amazon_2023/raw/meta_categories/meta_All_Beauty.jsonl.gz",
      f"{HUB}/meta_categories/meta_All_Beauty.jsonl"]),
], ids=["2018", "2014", "2023"])
def test_built_in_addresses(tmp_path, monkeypatch, name, reviews, metadata):
    asked = []
    monkeypatch.setattr(amazon, "download", lambda urls, target: asked.append((urls, target)))
    amazon.fetch(name, tmp_path, None)
    assert asked == [
        (reviews, tmp_path / reviews[0].rpartition("/")[2]),
        (metadata, tmp_path / metadata[0].rpartition("/")[2]),
    ]


def test_fetch_stops_after_the_first_file_and_names_both(tmp_path, server, capsys):
    with pytest.raises(UserError, match="Prime_Pantry_5.json.gz could not be downloaded"):
        amazon.fetch("pantry", tmp_path / "raw", server.base)
    assert server.asked == [
        "/categoryFilesSmall/Prime_Pantry_5.json.gz", "/Prime_Pantry_5.json.gz",
    ]
    both = "Prime_Pantry_5.json.gz and meta_Prime_Pantry.json.gz"
    assert f"pantry needs {both}" in capsys.readouterr().out


# ---------------- real data

def test_real_files_of_2018(real):
    folder = real("magazine-raw")
    assert amazon.recognises(folder)
    raw = amazon.read(folder, None)
    assert raw.report["Magazine_Subscriptions_5.json.gz"] == {
        "lines": 2375, "bad_lines": {}, "users": 348, "items": 157,
        "exact_duplicates": 47, "repeated_items": 73,
    }
    assert raw.report["meta_Magazine_Subscriptions.json.gz"] == {
        "lines": 3385, "bad_lines": {}, "items": 2320, "duplicate_items": 1065,
        "titles_unusable": 148, "pictures_not_understood": 0,
    }
    assert raw.report["items_without_metadata"] == 6
    assert (len(raw.catalog), len(raw.users), raw.clock) == (151, 2375, "day")
    assert (raw.times % DAY == 0).all()
    assert raw.catalog["B00005N7P0"]["text"][-2:] == [
        "Magazine Subscriptions, Technology, Computers & Internet", "Future US, Inc.",
    ]
    texts = [text for item in raw.catalog.values() for text in (item["title"], *item["text"])]
    assert not any("<" in text for text in texts)
    assert sum(bool(item["images"]) for item in raw.catalog.values()) == 130


@pytest.mark.parametrize("described, noted", [(["a1", "a2", "A3"], True), (["A1", "A2"], False)])
def test_products_that_are_described_under_other_names_are_counted(tmp_path, described, noted):
    write(tmp_path / "Tea.json.gz", [review("U", item) for item in ("A1", "A2", "A3")])
    write(tmp_path / "meta_Tea.json.gz", [{"asin": key, "title": "x"} for key in described])
    notes = amazon.read(tmp_path, None).notes
    assert notes == noted * ["2 of 3 items are not in meta_Tea.json.gz, the first is A1: are the "
                             "ids written alike?"]


def test_the_order_inside_a_second_is_kept(tmp_path):
    rows = [review_2023("U", f"P{n}", time=1_588_615_855_000 + 100 * n) for n in (3, 1, 2, 3)]
    write(tmp_path / "Tea.jsonl.gz", rows)
    dataset = data.load(tmp_path, root=tmp_path / "data")
    assert [dataset.items[i]["key"] for i in dataset.flat] == ["P1", "P2", "P3"]
