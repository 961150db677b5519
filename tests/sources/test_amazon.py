"""sources/amazon.py on small files with the dirt that the real ones have; expected values are worked out by hand."""
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from sources import amazon, download
from sources.common import UserError

MAGAZINES = ROOT.parent / "shared" / "data" / "magazine-raw"
DAY = 86_400
MAY_2014 = 1_400_000_000


def write(path, lines):
    """Rows (dicts become JSON lines, anything else is written as it is) into a file, gzip when its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(line) if isinstance(line, dict) else str(line) for line in lines) + "\n"
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    return path


def review(user="U1", item="A1", time=MAY_2014, **more):
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 5.0, **more}


def review_2023(user="U1", item="P1", time=MAY_2014 * 1000, **more):
    return {"user_id": user, "asin": "variant", "parent_asin": item, "timestamp": time, **more}


def triples(raw):
    return list(zip(raw.users, raw.items, raw.times))


# Names and files

def test_names():
    assert all(map(amazon.knows, amazon.NAMES)) and len(amazon.NAMES) == 10
    assert amazon.knows("amazon2018:Gift_Cards") and amazon.knows("amazon2014:Baby")
    for name in ("Pantry", "amazon2018:../x", "amazon2019:Baby", "amazon2018:", "amazon2018:Baby\n", "/tmp/pantry"):
        assert not amazon.knows(name)


@pytest.mark.parametrize("files, expected", [
    (["Prime_Pantry_5.json.gz", "meta_Prime_Pantry.json.gz"], True),
    (["Prime_Pantry.json", "meta_Prime_Pantry.json"], True),
    (["reviews_Baby_5.json.gz"], True),
    (["All_Beauty.jsonl", "meta_All_Beauty.jsonl.gz"], True),
    (["Baby_5.json.gz", "interactions.csv"], False),
    (["meta_Baby.json.gz"], False),
    (["Baby_5.csv"], False),
    ([], False)])
def test_recognises_by_file_names(tmp_path, files, expected):
    for name in files:
        write(tmp_path / name, [review()])
    assert amazon.recognises(tmp_path) is expected


def test_recognises_lone_files_by_their_first_lines(tmp_path):
    assert not amazon.recognises(tmp_path / "nowhere")
    write(tmp_path / "items.jsonl", [{"item": "A1", "title": "Tea"}, {"asin": "A1", "title": "Tea"}])
    write(tmp_path / "source.json", ["{", ' "format": 1', "}"])
    (tmp_path / "cut.json.gz").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "folder.json").mkdir()
    assert not amazon.recognises(tmp_path)
    write(tmp_path / "any_name.jsonl", ["not json", review_2023()])
    assert amazon.recognises(tmp_path)


def test_five_core_comes_before_all_reviews(tmp_path):
    write(tmp_path / "Tea.json", [review("all")])
    write(tmp_path / "Tea_5.json.gz", [review("core")])
    write(tmp_path / "Other.json", [review("other")])        # looks like reviews, but has no metadata
    write(tmp_path / "meta_Tea.json.gz", [{"asin": "A1", "title": "Tea"}])
    raw = amazon.read(tmp_path, None)
    assert raw.users == ["core"] and raw.report["ignored_files"] == ["Other.json", "Tea.json"]
    assert raw.catalog["A1"]["title"] == "Tea"


def test_several_categories_are_refused(tmp_path):
    for name in ("Baby_5.json", "Tea_5.json"):
        write(tmp_path / name, [review()])
    with pytest.raises(UserError, match="2 categories .Baby, Tea."):
        amazon.read(tmp_path, None)
    for name in ("meta_Baby.json", "meta_Tea.json"):
        write(tmp_path / name, [{"asin": "A1"}])
    with pytest.raises(UserError, match="make one folder for each"):
        amazon.read(tmp_path, None)


# Reviews

def test_reviews_of_2018(tmp_path):
    write(tmp_path / "Tea_5.json.gz", [
        "\ufeff" + json.dumps(review("U2", "A2", MAY_2014 + DAY)) + "\r", "", "  \r",
        review(" U1 ", 7, str(MAY_2014)), review("U1", "A2", MAY_2014 * 1000), review("U1", "A2", float(MAY_2014)),
        review("U1", "A2", MAY_2014 + DAY),
        review("U2\n\ud800", "A 2", 0), '{"reviewerID": "U2", "asin": "A2", "unixReviewTime": 0, "x": NaN}'])
    raw = amazon.read(tmp_path, None)
    assert triples(raw) == [("U2", "A2", MAY_2014 + DAY), ("U1", "7", MAY_2014), ("U1", "A2", MAY_2014),
                            ("U1", "A2", MAY_2014), ("U1", "A2", MAY_2014 + DAY), ("U2 ?", "A 2", 0), ("U2", "A2", 0)]
    assert raw.report["Tea_5.json.gz"] == {"lines": 7, "bad_lines": {}, "users": 3, "items": 3,
                                           "exact_duplicates": 1, "repeated_items": 3}
    assert (raw.clock, raw.core, raw.need_catalog, raw.published) == ("day", 0, False, {})
    assert raw.catalog == {} and raw.report["items_without_metadata"] == 3


def test_reviews_of_2023(tmp_path):
    write(tmp_path / "Tea.jsonl.gz", [review_2023(time=1_588_615_855_070), review_2023("U2", "P2", 946_684_800_999)])
    raw = amazon.read(tmp_path, None)
    assert triples(raw) == [("U1", "P1", 1_588_615_855), ("U2", "P2", 946_684_800)] and raw.clock == "seconds"


BAD_LINES = [("not_json", "{'broken': "), ("not_json", "{} {}"), ("not_json", "[" * 100_000),
             ("not_json", '{"reviewerID": __import__("os").abort()}'),
             ("not_an_object", "[1, 2]"), ("not_an_object", "null"), ("not_an_object", '"U1"'),
             ("no_user", {"asin": "A1", "unixReviewTime": 5}), ("no_user", review(user="  ")),
             ("no_user", review(user=True)),
             ("no_item", review(item=None)), ("no_item", review(item={"a": 1})), ("no_item", review(item=float("nan"))),
             ("no_time", {"reviewerID": "U1", "asin": "A1"}), ("no_time", review(time=None)),
             ("impossible_time", review(time=-1)), ("impossible_time", review(time=5_000_000_000)),
             ("impossible_time", review(time=MAY_2014 * 10_000)), ("impossible_time", review(time="02 26, 2014")),
             ("impossible_time", review(time=float("nan"))), ("impossible_time", review(time=float("inf"))),
             ("impossible_time", review(time=[MAY_2014])), ("impossible_time", review(time=10 ** 400))]


@pytest.mark.parametrize("defect, line", BAD_LINES)
def test_bad_line_is_skipped_and_counted(tmp_path, defect, line):
    good = [review(f"U{i}") for i in range(99)]
    write(tmp_path / "Tea_5.json", good[:49] + ["", line] + good[49:])
    raw = amazon.read(tmp_path, None)
    counts = raw.report["Tea_5.json"]
    assert raw.users == [f"U{i}" for i in range(99)]
    assert (counts["lines"], counts["bad_lines"], counts["first_bad_line"]) == (100, {defect: 1}, 51)


@pytest.mark.parametrize("name", ["Tea_5.json", "meta_Tea.json.gz"])
def test_more_than_one_percent_bad_lines_is_refused(tmp_path, name):
    rows = [review(f"U{i}") for i in range(98)]
    write(tmp_path / "Tea_5.json", rows)
    write(tmp_path / name, rows[:20] + ["{", {}] + rows[20:])
    write(tmp_path / "meta_Tea.json", [{"asin": "A1"}]) if name == "Tea_5.json" else None
    with pytest.raises(UserError) as error:
        amazon.read(tmp_path, None)
    assert str(tmp_path / name) in str(error.value)
    assert "2 of 100 lines cannot be used (not_json 1, no_" in str(error.value) and "line 21" in str(error.value)


def test_long_line_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(amazon, "MAX_LINE", 1000)
    rows = [review(f"U{i}") for i in range(250)] + [review(reviewText="x" * 1500), review("last")]
    write(tmp_path / "Tea_5.json", rows)
    raw = amazon.read(tmp_path, None)
    assert raw.report["Tea_5.json"]["bad_lines"] == {"not_json": 2} and raw.users[-1] == "last"


def test_cut_gzip_names_file_and_byte(tmp_path):
    path = write(tmp_path / "Tea_5.json.gz", [review(f"U{i}", reviewText=os.urandom(99).hex()) for i in range(999)])
    write(tmp_path / "meta_Tea.json", [{"asin": "A1"}])
    path.write_bytes(path.read_bytes()[:50_000])
    assert amazon.recognises(tmp_path)
    with pytest.raises(UserError, match=r"Tea_5.json.gz is not a whole file, reading stopped at byte 50000 "):
        amazon.read(tmp_path, None)


@pytest.mark.parametrize("content, message", [
    (b"<html>login</html>", r"stopped at byte \d+ .Not a gzipped file"), (b"", "is empty"),
    (gzip.compress(b"\n \n"), "is empty")])
def test_file_that_is_no_gzip_or_empty(tmp_path, content, message):
    write(tmp_path / "meta_Tea.json", [{"asin": "A1"}])
    (tmp_path / "Tea_5.json.gz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        amazon.read(tmp_path, None)


def test_damaged_gzip(tmp_path):
    path = write(tmp_path / "Tea_5.json.gz", [review(f"U{i}") for i in range(999)])
    content = bytearray(path.read_bytes())
    content[-8:-4] = b"\0\0\0\0"                              # the CRC
    path.write_bytes(content)
    write(tmp_path / "meta_Tea.json", [{"asin": "A1"}])
    with pytest.raises(UserError, match=f"byte {len(content)} .CRC check failed"):
        amazon.read(tmp_path, None)


# Metadata

def test_metadata_of_2014_are_python_literals(tmp_path):
    write(tmp_path / "reviews_Baby_5.json.gz", [review(item=f"A{i}") for i in range(1, 5)])
    write(tmp_path / "meta_Baby.json.gz", [
        {"asin": "A0", "title": "nobody reviewed it"},
        "{'asin': 'A1', 'title': 'Mum\\'s &amp; <b>Baby</b>', 'price': 9.5, 'imUrl': 'http://e.com/I/1._SY300_.jpg', "
        "'related': {'also_bought': ['A0', 'A2']}, "
        "'categories': [['Baby'], ['Baby', 'Bath &amp; Skin', 'Tub'], ['x', 'y', 'z']], "
        "'description': 'Soft.\\n\\nSafe.', 'brand': 'Caf\\xe9'}",
        "{'asin': 'A2', 'categories': [[]], 'imUrl': 'ftp://e.com/1.jpg', 'title': None}",
        "{'asin': 'A1', 'title': 'described again'}",
        {"asin": "A3", "title": "valid JSON, too", "description": ""}])
    raw = amazon.read(tmp_path, None)
    assert raw.catalog == {
        "A1": {"title": "Mum's & Baby", "text": ["Soft. Safe.", "Baby, Bath & Skin, Tub", "Café"], "language": "en",
               "images": ["http://e.com/I/1._SY300_.jpg"]},
        "A2": {"title": "", "text": [], "language": "en", "images": []},
        "A3": {"title": "valid JSON, too", "text": [], "language": "en", "images": []}}
    assert raw.report["meta_Baby.json.gz"] == {"lines": 5, "bad_lines": {}, "items": 4, "duplicate_items": 1,
                                               "titles_unusable": 1}
    assert raw.report["items_without_metadata"] == 1 and raw.clock == "day"


def test_metadata_of_2018(tmp_path):
    host = "https://images-na.ssl-images-amazon.com/images/I/"
    write(tmp_path / "Tea_5.json.gz", [review(item=f"A{i}") for i in range(1, 5)])
    write(tmp_path / "meta_Tea.json.gz", [
        {"asin": "A1", "title": '<span class="a-size-medium a-color-secondary"', "brand": "T &amp; Co",
         "description": ["Green.", "", "<p>Black</p>", "Green."], "category": ["Food &amp; Drink", "", "Tea"],
         "imageURLHighRes": [host + "1.jpg", host + "2.jpg", host + "1.jpg", 5, "data:image/png;base64,xx"],
         "imageURL": [host + "9._SS40_.jpg"]},
        {"asin": "A2", "title": "var aPageStart = (new Date()).getTime();", "description": "one string", "brand": None,
         "category": ["Tea", "</span></span></span>", "Made of leaves"], "imageURLHighRes": [],
         "imageURL": [host + "71+ab._SX38_SY50_CR,0,0,38,50_.jpg", host + "plain.jpg"]},
        {"asin": "A3", "title": "x" * 3000, "imageURLHighRes": [f"{host}{i}.jpg" for i in range(12)]}])
    raw = amazon.read(tmp_path, None)
    assert raw.catalog["A1"] == {"title": "", "text": ["Green.", "Black", "Food & Drink, Tea", "T & Co"],
                                 "language": "en", "images": [host + "1.jpg", host + "2.jpg"]}
    assert raw.catalog["A2"] == {"title": "", "text": ["one string", "Tea"], "language": "en",
                                 "images": [host + "71+ab.jpg", host + "plain.jpg"]}
    assert len(raw.catalog["A3"]["title"]) == 2000
    assert raw.catalog["A3"]["images"] == [f"{host}{i}.jpg" for i in range(10)]
    assert raw.report["meta_Tea.json.gz"]["titles_unusable"] == 2


def test_metadata_of_2023(tmp_path):
    write(tmp_path / "Tea.jsonl", [review_2023(item="P1")])
    write(tmp_path / "meta_Tea.jsonl.gz", [
        {"parent_asin": "P1", "asin": "variant", "title": "Чай 茶", "store": "Leaf", "categories": ["Food", "Tea"],
         "description": ["Loose"], "features": [], "bought_together": None, "images": [
             {"thumb": "https://t/1.jpg", "large": "https://l/1.jpg", "hi_res": "https://h/1.jpg", "variant": "MAIN"},
             {"thumb": "https://t/2.jpg", "large": "https://l/2.jpg", "hi_res": None},
             {"thumb": "https://t/3.jpg", "large": ""}, {}, None]}])
    raw = amazon.read(tmp_path, None)
    assert raw.catalog == {"P1": {"title": "Чай 茶", "text": ["Loose", "Food, Tea", "Leaf"], "language": "en",
                                  "images": ["https://h/1.jpg", "https://l/2.jpg", "https://t/3.jpg"]}}


def test_rows_without_a_key_and_rows_nobody_needs(tmp_path):
    """Literals are evaluated only for reviewed products; a row that names two keys is read in full."""
    write(tmp_path / "Tea_5.json", [review()])
    write(tmp_path / "meta_Tea.json", ["{'asin': 'B%d', broken}" % i for i in range(150)] + [
        {"title": "no key"}, {"similar": {"asin": "B1"}, "asin": " A1 ", "title": "Tea"}])
    raw = amazon.read(tmp_path, None)
    counts = raw.report["meta_Tea.json"]
    assert counts["bad_lines"] == {"no_item": 1} and counts["items"] == 151 and raw.catalog["A1"]["title"] == "Tea"


def test_order_does_not_depend_on_the_hash_seed(tmp_path):
    write(tmp_path / "Tea_5.json.gz", [review(f"U{i % 7}", f"A{i % 11}", MAY_2014 + i) for i in range(50)])
    write(tmp_path / "meta_Tea.json.gz", [{"asin": f"A{i}", "title": f"{i}", "brand": "b"} for i in range(11)])
    code = (f"from pathlib import Path; from sources import amazon; "
            f"print(amazon.read(Path({str(tmp_path)!r}), None), amazon.NAMES)")
    outputs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=True).stdout for seed in "12"}
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


# Fetching

@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A web server for the files under tmp_path / "mirror"; yields (folder, base address, paths asked for)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0)
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_fetch_from_a_mirror_and_read(tmp_path, mirror):
    folder, base, asked = mirror
    write(folder / "categoryFilesSmall/Prime_Pantry_5.json.gz", [review()])
    write(folder / "meta_Prime_Pantry.json.gz", [{"asin": "A1", "title": "Tea"}])        # a mirror without folders
    raw_folder = tmp_path / "raw" / "pantry"
    assert amazon.fetch("pantry", raw_folder, base + "/") == raw_folder
    assert asked == ["/categoryFilesSmall/Prime_Pantry_5.json.gz", "/metaFiles2/meta_Prime_Pantry.json.gz",
                     "/meta_Prime_Pantry.json.gz"]
    raw = amazon.read(raw_folder, "pantry")
    assert triples(raw) == [("U1", "A1", MAY_2014)] and raw.catalog["A1"]["title"] == "Tea"
    assert (raw.core, raw.need_catalog, raw.clock) == (5, True, "day")
    assert raw.published == {"users": 13101, "items": 4898, "interactions": 126962, "source": "UniSRec"}
    amazon.fetch("pantry", raw_folder, base)
    assert len(asked) == 3                                    # nothing is fetched twice


def test_fetch_2023_from_a_mirror_with_uncompressed_files(tmp_path, mirror):
    folder, base, _ = mirror
    write(folder / "raw/review_categories/All_Beauty.jsonl", [review_2023()])
    write(folder / "raw/meta_categories/meta_All_Beauty.jsonl.gz", [{"parent_asin": "P1", "title": "Soap"}])
    raw_folder = amazon.fetch("amazon2023:All_Beauty", tmp_path / "raw", base)
    assert sorted(path.name for path in raw_folder.iterdir()) == ["All_Beauty.jsonl", "meta_All_Beauty.jsonl.gz"]
    raw = amazon.read(raw_folder, "amazon2023:All_Beauty")
    assert raw.catalog["P1"]["title"] == "Soap" and raw.core == 5 and raw.published == {}


@pytest.mark.parametrize("name, files", [
    ("pantry", ["Prime_Pantry_5.json", "meta_Prime_Pantry.json.gz"]),
    ("baby", ["reviews_Baby.json.gz", "meta_Baby.json"]),
    ("amazon2023:Baby_Products", ["Baby_Products.jsonl", "meta_Baby_Products.jsonl.gz"])])
def test_hand_placed_files_need_no_network(tmp_path, monkeypatch, name, files):
    monkeypatch.setattr(amazon, "download", lambda *args: pytest.fail("the network was used"))
    for file in files:
        write(tmp_path / file, [review_2023() if "2023" in name else review()])
    assert amazon.fetch(name, tmp_path, None) == tmp_path
    assert len(amazon.read(tmp_path, name).users) == 1


def test_files_of_another_year_do_not_stand_for_a_set(tmp_path, mirror):
    write(tmp_path / "Toys_and_Games_5.json.gz", [review("2018")])
    write(mirror[0] / "reviews_Toys_and_Games_5.json.gz", [review("2014")])
    write(tmp_path / "meta_Toys_and_Games.json.gz", [{"asin": "A1"}])
    with pytest.raises(UserError, match="lacks the reviews of toys"):
        amazon.read(tmp_path, "toys")
    assert amazon.read(amazon.fetch("toys", tmp_path, mirror[1]), "toys").users == ["2014"]


def test_built_in_addresses(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(amazon, "download", lambda urls, target: asked.append((urls, target.name)))
    for name in ("arts", "toys", "amazon2023:All_Beauty"):
        amazon.fetch(name, tmp_path, None)
    lab, alias = "https://mcauleylab.ucsd.edu/public_datasets/data", "https://jmcauley.ucsd.edu/data/amazon_v2"
    assert asked[0] == ([f"{lab}/amazon_v2/categoryFilesSmall/Arts_Crafts_and_Sewing_5.json.gz",
                         f"{alias}/categoryFilesSmall/Arts_Crafts_and_Sewing_5.json.gz"],
                        "Arts_Crafts_and_Sewing_5.json.gz")
    assert asked[1][0][0] == f"{lab}/amazon_v2/metaFiles2/meta_Arts_Crafts_and_Sewing.json.gz"
    assert asked[2][0] == [f"{base}/categoryFiles/reviews_Toys_and_Games_5.json.gz" for base in
                           ("https://snap.stanford.edu/data/amazon/productGraph", f"{lab}/amazon")]
    assert asked[3][1] == "meta_Toys_and_Games.json.gz"
    hub = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/raw"
    assert asked[4] == ([f"{lab}/amazon_2023/raw/review_categories/All_Beauty.jsonl.gz",
                         f"{hub}/review_categories/All_Beauty.jsonl"], "All_Beauty.jsonl.gz")
    assert asked[5][0][1] == f"{hub}/meta_categories/meta_All_Beauty.jsonl"


def test_fetch_stops_after_the_first_file_and_names_both(tmp_path, mirror, capsys):
    _, base, asked = mirror
    with pytest.raises(UserError, match="Prime_Pantry_5.json.gz could not be downloaded"):
        amazon.fetch("pantry", tmp_path / "raw", base)
    assert len(asked) == 2 and not any("meta" in path for path in asked)
    assert "Prime_Pantry_5.json.gz and meta_Prime_Pantry.json.gz" in capsys.readouterr().out


# Real data

@pytest.mark.skipif(not MAGAZINES.is_dir(), reason="no raw Magazine_Subscriptions files at ../shared")
def test_real_files_of_2018():
    assert amazon.recognises(MAGAZINES)
    raw = amazon.read(MAGAZINES, None)
    reviews, metadata = (raw.report[f"{name}.json.gz"] for name in ("Magazine_Subscriptions_5", "meta_Magazine_Subscriptions"))
    assert (reviews["lines"], reviews["users"], reviews["items"]) == (2375, 348, 157) and reviews["bad_lines"] == {}
    assert reviews["exact_duplicates"] == 47 and reviews["repeated_items"] == 73
    assert (metadata["lines"], metadata["items"], metadata["duplicate_items"]) == (3385, 2320, 1065)
    assert metadata["titles_unusable"] == 148 and raw.report["items_without_metadata"] == 6
    assert len(raw.catalog) == 151 and len(raw.users) == 2375 and raw.clock == "day"
    assert all(time % DAY == 0 for time in raw.times)
    assert raw.catalog["B00005N7P0"]["text"][-2:] == ["Magazine Subscriptions, Technology, Computers & Internet",
                                                      "Future US, Inc."]
    assert not any("<" in text for item in raw.catalog.values() for text in [item["title"], *item["text"]])
    assert sum(bool(item["images"]) for item in raw.catalog.values()) == 130
