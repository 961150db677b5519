"""sources/hm.py on small folders in Kaggle's layout; expected values are worked out by hand."""
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import data as datasets
from sources import build, hm
from sources.common import UserError, k_core

DAY = 86_400
SEP_20_2018 = 1_537_401_600
HEADER = "t_dat,customer_id,article_id,price,sales_channel_id"
ARTICLE_HEADER = ("article_id,product_code,prod_name,product_type_name,product_group_name,graphical_appearance_name,"
                  "colour_group_name,index_name,garment_group_name,detail_desc")


def write(path, lines, header=None):
    """Lines of text, gzipped when the file's name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write("".join(f"{line}\n" for line in [header, *lines] if line is not None).encode())
    return path


def sales(folder, lines, name="transactions_train.csv"):
    write(folder / name, lines, HEADER)
    return folder


def sale(article="0108775015", customer="c1", day="2018-09-20"):
    return f"{day},{customer},{article},0.05,2"


def articles(folder, *lines):
    write(folder / "articles.csv", lines, ARTICLE_HEADER)


def pictures(folder, *names):
    for name in names:
        path = folder / "images" / (name if "/" in name else f"{name[:3]}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a picture")


def triples(raw):
    return list(zip(raw.users, raw.items, raw.times))


def steps(raw, out):
    build(raw, out, {"name": out.name})
    counts = json.loads((out / "source.json").read_text())["counts"]
    return {step["step"]: (step["users"], step["items"], step["interactions"]) for step in counts}


# Names and files

def test_names(tmp_path):
    assert hm.knows("hm") and not hm.knows("HM") and hm.NAMES == ("hm",)
    assert hm.BY == ("article", "product")
    assert not hm.recognises(tmp_path) and not hm.recognises(tmp_path / "nowhere")
    articles(tmp_path)
    assert not hm.recognises(tmp_path)
    sales(tmp_path, [], "transactions_train.csv.gz")
    assert hm.recognises(tmp_path)


def test_fetch_says_what_to_put_where_and_takes_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = Path("raw/hm")
    with pytest.raises(UserError, match="get transactions_train.csv and articles.csv .*images from https://") as error:
        hm.fetch("hm", raw, None)
    assert str(error.value).endswith(f"put them into {tmp_path.resolve()}/raw/hm")
    sales(raw, [sale()])
    with pytest.raises(UserError, match="get articles.csv and, for the pictures, the folder images"):
        hm.fetch("hm", raw, None)
    articles(raw)
    assert hm.fetch("hm", raw, None) == raw


def test_a_name_means_a_5_core_and_a_folder_none(tmp_path):
    sales(tmp_path, [sale()])
    assert (hm.read(tmp_path, "hm").core, hm.read(tmp_path, None).core) == (5, 0)


# Purchases

def test_purchases_are_read_in_the_order_of_the_file(tmp_path):
    raw = hm.read(sales(tmp_path, [sale(customer="c2", day="2018-09-21"), sale("0108775044"), sale(), sale()]), None)
    assert triples(raw) == [("c2", "0108775015", SEP_20_2018 + DAY), ("c1", "0108775044", SEP_20_2018),
                            ("c1", "0108775015", SEP_20_2018), ("c1", "0108775015", SEP_20_2018)]
    assert (raw.clock, raw.need_catalog, raw.catalog, raw.image_root) == ("day", False, {}, str(tmp_path.resolve()))
    assert raw.report == {"transactions_train.csv": {"lines": 4, "bad_lines": {}, "article_ids_without_their_zero": 0},
                          "items_without_metadata": 2, "items_without_picture": 2}
    assert steps(raw, tmp_path / "out")["exact duplicates dropped"] == (2, 2, 3)


def test_one_string_per_key(tmp_path):
    raw = hm.read(sales(tmp_path, [sale(), sale(day="2018-09-21"), sale("0108775044")]), None, by="product")
    assert len({*map(id, raw.users)}) == 1 and raw.items[0] is raw.items[1] and raw.times[0] is raw.times[2]


def test_columns_in_another_order_bom_carriage_returns_and_no_price(tmp_path):
    (tmp_path / "transactions_train.csv").write_bytes(
        b"\xef\xbb\xbfArticle_ID , customer_id,more,t_dat\r\n\r\n 0108775015 , c 1 ,\"a,\nb\", 2018-09-20 \r\n"
        b"0108775044,c2,x,2018-09-21 00:00:00\r\n")
    raw = hm.read(tmp_path, None)
    assert triples(raw) == [("c 1", "0108775015", SEP_20_2018), ("c2", "0108775044", SEP_20_2018 + DAY)]
    assert raw.report["transactions_train.csv"]["lines"] == 2


def test_plain_comes_before_gzip(tmp_path):
    sales(tmp_path, [sale(customer="zip")], "transactions_train.csv.gz")
    write(tmp_path / "articles.csv.gz", ["0108775015,0108775,Strap top"], "article_id,product_code,prod_name")
    raw = hm.read(tmp_path, None)
    assert raw.users == ["zip"] and raw.catalog["0108775015"]["title"] == "Strap top"
    assert hm.read(sales(tmp_path, [sale(customer="plain")]), None).users == ["plain"]


def test_lost_zeros_are_put_back_and_counted(tmp_path):
    raw = hm.read(sales(tmp_path, [sale("108775015"), sale("0108775015"), sale("108775015"), sale("110065001")]), None)
    assert raw.items == ["0108775015", "0108775015", "0108775015", "0110065001"]
    assert raw.report["transactions_train.csv"]["article_ids_without_their_zero"] == 2
    articles(tmp_path, "108775015,108775,Strap top,,,,,,,")
    pictures(tmp_path, "0108775015.jpg")
    for by, key in (("article", "0108775015"), ("product", "0108775")):
        assert hm.read(tmp_path, None, by).catalog == {key: {"title": "Strap top", "text": [], "language": "en",
                                                             "images": ["images/010/0108775015.jpg"]}}


BAD = [("no_article", sale("")), ("no_article", sale("01087750155")), ("no_article", sale("10877501")),
       ("no_article", sale("108775015.0")), ("no_article", sale("-108775015")), ("no_article", sale("٠١٠٨٧٧٥٠١٥")),
       ("no_customer", sale(customer=" ")), ("no_day", sale(day="20.9.2018")), ("no_day", sale(day="2018-02-30")),
       ("no_day", sale(day="1969-12-31")), ("no_day", sale(day="")), ("columns_missing", "2018-09-20,c1,0108775015")]


@pytest.mark.parametrize("defect, line", BAD)
def test_a_bad_line_is_skipped_and_counted_and_two_percent_are_refused(tmp_path, defect, line):
    good = [sale(customer=f"c{i}") for i in range(99)]
    raw = hm.read(sales(tmp_path, good[:49] + ["", line] + good[49:]), None)
    assert raw.users == [f"c{i}" for i in range(99)] and set(raw.items) == {"0108775015"}
    assert raw.report["transactions_train.csv"] == {"lines": 100, "bad_lines": {defect: 1}, "first_bad_line": 52,
                                                    "article_ids_without_their_zero": 0}
    with pytest.raises(UserError, match=rf"transactions_train.csv: 2 of 101 lines .*\({defect} 2\), the first is line 2:"):
        hm.read(sales(tmp_path, [line, line, *good]), None)


def test_the_first_day_of_all_is_a_day(tmp_path):
    assert hm.read(sales(tmp_path, [sale(day="1970-01-01")]), None).times == [0]


@pytest.mark.parametrize("content, message", [
    (b"", "names the columns t_dat, customer_id, article_id, but t_dat, customer_id, article_id is not there"),
    (b"t_dat,customer_id,article\n", "but article_id is not there"),
    (b"t_dat,customer_id,article_id\n2018-09-20,\"c1,0108775015\n2018-09-20,c1,0108775015\n", "line 3 is not CSV"),
    (b"t_dat,customer_id,article_id\n2018-09-20,\"c1\"x,0108775015\n", "line 2 is not CSV")])
def test_tables_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "transactions_train.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/transactions_train.csv.*{message}"):
        hm.read(tmp_path, None)


def test_gzip_that_is_cut_or_none(tmp_path):
    path = sales(tmp_path, [sale(customer=os.urandom(32).hex()) for _ in range(500)], "transactions_train.csv.gz") / \
        "transactions_train.csv.gz"
    whole = path.read_bytes()
    for content in (whole[:-500], b"<html>login</html>", whole[:200] + b"\0" * 2000 + whole[2200:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="transactions_train.csv.gz cannot be read to its end"):
            hm.read(tmp_path, None)


# Texts

def test_texts_by_article(tmp_path):
    sales(tmp_path, [sale("0108775015"), sale("0108775044"), sale("0110065001"), sale("0120129001")])
    articles(tmp_path,
             '0108775015,108775,Strap &amp; top,Vest top,Garment Upper body,Solid,Black,Ladieswear,Jersey Basic,'
             '"Jersey top, with  narrow\nstraps."',
             '0108775044,108775,<b>Crème</b>,Socks,Socks & Tights,Stripe,Light Pink,socks,Socks and Tights,nan',
             '0110065001,110065,nan,Unknown,Unknown,undefined,Unknown,,,',
             '0999999001,999999,Nobody bought it,,,,,,,',
             '0108775015,108775,Described again,,,,,,,')
    raw = hm.read(tmp_path, None)
    assert raw.catalog == {
        "0108775015": {"title": "Strap & top", "language": "en", "images": [], "text": [
            "Jersey top, with narrow straps.", "Vest top, Garment Upper body, Jersey Basic, Ladieswear", "Solid, Black"]},
        "0108775044": {"title": "Crème", "language": "en", "images": [], "text": [
            "Socks, Socks & Tights", "Stripe, Light Pink"]},
        "0110065001": {"title": "", "text": [], "language": "en", "images": []}}
    assert raw.report["articles.csv"] == {"lines": 5, "bad_lines": {}, "articles": 4, "duplicate_articles": 1}
    assert raw.report["items_without_metadata"] == 1 and len(raw.items) == 4


def test_a_product_has_the_words_of_its_first_article_and_the_looks_of_all(tmp_path):
    sales(tmp_path, [sale("0108775044"), sale("0108775044", "c2"), sale("0110065001")])
    articles(tmp_path,
             "0108775051,108775,First in the file,Vest top,,Solid,Black,Ladieswear,,Its words.",
             "0108775015,108775,Second,Dress,,Stripe,White,Menswear,,Other words.",
             "0108775051,108775,Again,,,Check,Gold,,,",
             "0108775044,108775,Third,,,Solid,black,,,")
    raw = hm.read(tmp_path, None, by="product")
    assert raw.items == ["0108775", "0108775", "0110065"]
    assert raw.catalog == {"0108775": {"title": "First in the file", "language": "en", "images": [], "text": [
        "Its words.", "Vest top, Ladieswear", "Solid, Black, Stripe, White"]}}
    assert raw.report["articles.csv"]["duplicate_articles"] == 1


def test_articles_without_an_id_are_counted_and_refused_when_many(tmp_path):
    sales(tmp_path, [sale()])
    good = [f"01{i:05}001,1,Top,,,,,,," for i in range(99)]
    articles(tmp_path, *good, "x,1,Top,,,,,,,")
    counts = hm.read(tmp_path, None).report["articles.csv"]
    assert counts == {"lines": 100, "bad_lines": {"no_article": 1}, "first_bad_line": 101, "articles": 99,
                      "duplicate_articles": 0}
    articles(tmp_path, *good[:50], "x,1,Top,,,,,,,")
    with pytest.raises(UserError, match="articles.csv: 1 of 51 lines cannot be used"):
        hm.read(tmp_path, None)
    write(tmp_path / "articles.csv", ["0108775015,108775"], "article_id,product_code")
    with pytest.raises(UserError, match="articles.csv must .* but prod_name is not there"):
        hm.read(tmp_path, None)


# Pictures

def test_pictures_are_those_on_disk(tmp_path):
    sales(tmp_path, [sale("0108775015"), sale("0108775044"), sale("0999000001")])
    pictures(tmp_path, "0108775044.JPG", "0108775015.jpg", "0108775015.png", "0108775051.jpeg", "0110065001.jpg",
             "0999000001.gif", "010877501.jpg", "010/0108775015.jpg.part", "0999000001.jpg/inside", "extra/0999000001.jpg")
    (tmp_path / "images" / "0999000001.jpg.txt").write_text("not in a folder of its own")
    raw = hm.read(tmp_path, None)
    assert {item: row["images"] for item, row in raw.catalog.items()} == {
        "0108775015": ["images/010/0108775015.jpg", "images/010/0108775015.png"],
        "0108775044": ["images/010/0108775044.JPG"]}
    assert raw.report["items_without_picture"] == 1
    assert all((tmp_path / path).is_file() for row in raw.catalog.values() for path in row["images"])
    assert {item: row["images"] for item, row in hm.read(tmp_path, None, "product").catalog.items()} == {
        "0108775": ["images/010/0108775015.jpg", "images/010/0108775015.png", "images/010/0108775044.JPG",
                    "images/010/0108775051.jpeg"]}                # 0108775051: not sold, but the product's


def test_a_product_has_at_most_ten_pictures(tmp_path):
    sales(tmp_path, [sale("0108775044")])
    names = [f"0108775{i:03}.jpg" for i in range(14)]
    pictures(tmp_path, *reversed(names))
    assert hm.read(tmp_path, None, "product").catalog["0108775"]["images"] == [f"images/010/{n}" for n in names[:10]]


def test_pictures_that_come_later_are_noticed(tmp_path):
    sales(tmp_path / "shop", [sale(), sale("0108775044")])
    load = lambda: datasets.load(tmp_path / "shop", root=tmp_path / "data").has["image"].sum()
    assert load() == 0
    pictures(tmp_path / "shop", "0108775015.jpg")
    assert load() == 1 and (tmp_path / "data" / "shop~1").is_dir()
    load()
    assert not (tmp_path / "data" / "shop~2").exists()


def test_picture_folder_may_be_a_link(tmp_path):
    pictures(tmp_path / "disk", "0108775015.jpg")
    folder = sales(tmp_path / "hm", [sale()])
    (folder / "images").symlink_to(tmp_path / "disk" / "images")
    (tmp_path / "link").symlink_to(folder)
    raw = hm.read(tmp_path / "link", None)
    assert raw.catalog["0108775015"]["images"] == ["images/010/0108775015.jpg"] and raw.image_root == str(folder.resolve())


# The whole way

def test_result_does_not_depend_on_the_hash_seed(tmp_path):
    sales(tmp_path, [sale(f"01087{i % 9:02}{i % 4:03}", f"c{i % 7}", f"2018-09-{i % 28 + 1:02}") for i in range(60)])
    articles(tmp_path, *(f"01087{i:02}000,1,Top {i},Top,,Solid,Red,,," for i in range(5)))
    pictures(tmp_path, *(f"01087{i:02}{j:03}.jpg" for i in range(9) for j in range(3)))
    code = f"from pathlib import Path; from sources import hm; print(hm.read(Path({str(tmp_path)!r}), None, 'product'))"
    outputs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=True).stdout for seed in "12"}
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


def test_real_sample_by_article(real, tmp_path):
    raw = hm.read(real("hm-sample"), None)
    assert (len(set(raw.users)), len(set(raw.items)), len(raw.items)) == (1364, 17033, 31662)
    assert sum(bool(row["title"]) for row in raw.catalog.values()) == 4116
    assert sum(len(row["images"]) for row in raw.catalog.values()) == 9468 == 17033 - raw.report["items_without_picture"]
    assert not raw.report["transactions_train.csv"]["bad_lines"] and not raw.report["articles.csv"]["bad_lines"]
    assert steps(raw, tmp_path / "data")["exact duplicates dropped"] == (1364, 17033, 28516)
    texts = " ".join(text for row in raw.catalog.values() for text in row["text"])
    assert len(texts) > 100_000 and not re.search("<|&amp;|unknown|undefined", texts, re.I)


def test_real_sample_by_product(real, tmp_path):
    by_article, raw = (hm.read(real("hm-sample"), None, by) for by in ("article", "product"))
    described = {item for item, row in raw.catalog.items() if row["title"]}
    assert len(described) == 3086 and sum(item[:7] in described for item in set(by_article.items)) == 7127
    raw.core = 5
    counts = steps(raw, tmp_path / "data")
    # two colours of a product on one day are two purchases of it
    assert counts["exact duplicates dropped"] == (1364, 10010, 28516) and counts["5-core"] == (664, 1248, 12812)
