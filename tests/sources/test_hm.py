"""sources/hm.py on small folders in Kaggle's layout; what is expected is worked out by hand."""
import json
import re
from pathlib import Path

import pytest

import data as datasets
from common.files import UserError
from sources import build, hm

DAY = 86_400
SEP_20_2018 = 1_537_401_600
HEADER = "t_dat,customer_id,article_id,price,sales_channel_id"
ARTICLE_HEADER = (
    "article_id,product_code,prod_name,product_type_name,product_group_name,"
    "graphical_appearance_name,colour_group_name,index_name,garment_group_name,detail_desc"
)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def sales(folder, *lines):
    write(folder / "transactions_train.csv", HEADER, *lines)
    return folder


def sale(article="0108775015", customer="c1", day="2018-09-20"):
    return f"{day},{customer},{article},0.05,2"


def articles(folder, *lines):
    write(folder / "articles.csv", ARTICLE_HEADER, *lines)


def pictures(folder, *names):
    for name in names:
        path = folder / "images" / (name if "/" in name else f"{name[:3]}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a picture")


def triples(raw):
    return list(zip(raw.users, raw.items, raw.times))


def images_of(raw):
    return {item: row["images"] for item, row in raw.catalog.items()}


def steps(raw, out):
    """step -> (users, items, interactions) when the data is built."""
    build(raw, out, {"name": out.name})
    counts = json.loads((out / "source.json").read_text())["counts"]
    return {step["step"]: (step["users"], step["items"], step["interactions"]) for step in counts}


# ---------------- names and files

def test_fetch_says_what_to_put_where_and_takes_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = Path("raw/hm")
    both = "get transactions_train.csv and articles.csv .*images from https://"
    with pytest.raises(UserError, match=both) as error:
        hm.fetch("hm", raw, None)
    assert str(error.value).endswith(f"put them into {tmp_path.resolve()}/raw/hm")
    sales(raw, sale())
    with pytest.raises(UserError, match="get articles.csv and, for the pictures, the folder"):
        hm.fetch("hm", raw, None)
    articles(raw)
    assert hm.fetch("hm", raw, None) == raw


def test_a_name_means_a_5_core_and_a_folder_none(tmp_path):
    sales(tmp_path, sale())
    assert hm.read(tmp_path, "hm").core == 5
    assert hm.read(tmp_path, None).core == 0


# ---------------- purchases

def test_purchases_are_read_in_the_order_of_the_file(tmp_path):
    sales(tmp_path, sale(customer="c2", day="2018-09-21"), sale("0108775044"), sale(), sale())
    raw = hm.read(tmp_path, None)
    assert triples(raw) == [
        ("c2", "0108775015", SEP_20_2018 + DAY),
        ("c1", "0108775044", SEP_20_2018),
        ("c1", "0108775015", SEP_20_2018),
        ("c1", "0108775015", SEP_20_2018),
    ]
    assert (raw.clock, raw.need_catalog, raw.catalog) == ("day", False, {})
    assert raw.image_root == str(tmp_path.resolve())
    assert raw.report == {
        "transactions_train.csv": {
            "lines": 4, "bad_lines": {}, "article_ids_without_their_zero": 0,
        },
        "items_without_metadata": 2,
        "items_without_picture": 2,
    }
    assert steps(raw, tmp_path / "out")["exact duplicates dropped"] == (2, 2, 3)


def test_two_colours_of_a_product_on_one_day_are_two_purchases(tmp_path):
    sales(tmp_path, sale("0108775015"), sale("0108775044"), sale("0108775044"))
    raw = hm.read(tmp_path, None, by="product")
    assert [*raw.items] == ["0108775"] * 3
    assert [*raw.variants] == ["0108775015", "0108775044", "0108775044"]
    assert steps(raw, tmp_path / "out")["exact duplicates dropped"] == (1, 1, 2)


def test_columns_in_another_order_and_no_price(tmp_path):
    write(
        tmp_path / "transactions_train.csv",
        "Article_ID , customer_id,more,t_dat", "",
        ' 0108775015 , c \t1 ,"a,\nb", 2018-09-20 ',
        "0108775044,c2,x,2018-09-21 00:00:00",
    )
    raw = hm.read(tmp_path, None)
    assert triples(raw) == [
        ("c 1", "0108775015", SEP_20_2018),
        ("c2", "0108775044", SEP_20_2018 + DAY),
    ]
    assert raw.report["transactions_train.csv"]["lines"] == 2


def test_lost_zeros_are_put_back_and_counted(tmp_path):
    sales(tmp_path, *map(sale, ("108775015", "0108775015", "108775015", "110065001")))
    raw = hm.read(tmp_path, None)
    assert [*raw.items] == ["0108775015", "0108775015", "0108775015", "0110065001"]
    assert raw.report["transactions_train.csv"]["article_ids_without_their_zero"] == 2
    articles(tmp_path, "108775015,108775,Strap top,,,,,,,")
    pictures(tmp_path, "0108775015.jpg")
    row = {
        "title": "Strap top", "text": [], "language": "en",
        "images": ["images/010/0108775015.jpg"],
    }
    assert hm.read(tmp_path, None, "article").catalog == {"0108775015": row}
    assert hm.read(tmp_path, None, "product").catalog == {"0108775": row}


def test_the_first_day_of_all_is_a_day(tmp_path):
    assert hm.read(sales(tmp_path, sale(day="1970-01-01")), None).times.tolist() == [0]


BAD_SALES = {
    "no_article": [
        sale(article) for article in
        ("", "01087750155", "10877501", "108775015.0", "-108775015", "٠١٠٨٧٧٥٠١٥")
    ],
    "no_customer": [sale(customer=" ")],
    "no_day": [sale(day=day) for day in ("20.9.2018", "2018-02-30", "1969-12-31", "")],
    "columns_missing": ["2018-09-20,c1,0108775015"],
}


@pytest.mark.parametrize("defect", BAD_SALES)
def test_bad_lines_are_skipped_and_counted(tmp_path, defect):
    bad = BAD_SALES[defect]
    good = [sale(customer=f"c{i}") for i in range(600)]
    raw = hm.read(sales(tmp_path, *good[:49], "", *bad, *good[49:]), None)
    assert [*raw.users] == [f"c{i}" for i in range(600)]
    assert set(raw.items) == {"0108775015"}
    assert raw.report["transactions_train.csv"] == {
        "lines": 600 + len(bad), "bad_lines": {defect: len(bad)}, "first_bad_line": 52,
        "article_ids_without_their_zero": 0,
    }


# ---------------- texts

def test_texts_by_article(tmp_path):
    sales(tmp_path, *map(sale, ("0108775015", "0108775044", "0110065001", "0120129001")))
    articles(
        tmp_path,
        "0108775015,108775,Strap &amp; top,Vest top,Garment Upper body,Solid,Black,Ladieswear,"
        'Jersey Basic,"Jersey top, with  narrow\nstraps."',
        "0108775044,108775,<b>Crème</b>,Socks,Socks & Tights,Stripe,Light Pink,socks,"
        "Socks and Tights,nan",
        "0110065001,110065,nan,Unknown,Unknown,undefined,Unknown,,,",
        "0999999001,999999,Nobody bought it,,,,,,,",
        "0108775015,108775,Described again,,,,,,,",
    )
    raw = hm.read(tmp_path, None)
    assert raw.catalog == {
        "0108775015": {
            "title": "Strap & top",
            "language": "en",
            "images": [],
            "text": [
                "Jersey top, with narrow straps.",
                "Vest top, Garment Upper body, Jersey Basic, Ladieswear",
                "Solid, Black",
            ],
        },
        "0108775044": {
            "title": "Crème",
            "language": "en",
            "images": [],
            "text": ["Socks, Socks & Tights", "Stripe, Light Pink"],
        },
        "0110065001": {"title": "", "text": [], "language": "en", "images": []},
    }
    assert raw.report["articles.csv"] == {
        "lines": 5, "bad_lines": {}, "articles": 4, "duplicate_articles": 1,
    }
    assert raw.report["items_without_metadata"] == 1
    assert len(raw.items) == 4


def test_a_product_has_the_words_of_its_first_article_and_the_looks_of_all(tmp_path):
    sales(tmp_path, sale("0108775044"), sale("0108775044", "c2"), sale("0110065001"))
    articles(
        tmp_path,
        "0108775051,108775,First in the file,Vest top,,Solid,Black,Ladieswear,,Its words.",
        "0108775015,108775,Second,Dress,,Stripe,White,Menswear,,Other words.",
        "0108775051,108775,Again,,,Check,Gold,,,",
        "0108775044,108775,Third,,,Solid,black,,,",
    )
    raw = hm.read(tmp_path, None, by="product")
    assert [*raw.items] == ["0108775", "0108775", "0110065"]
    assert raw.catalog == {"0108775": {
        "title": "First in the file",
        "language": "en",
        "images": [],
        "text": ["Its words.", "Vest top, Ladieswear", "Solid, Black, Stripe, White"],
    }}
    assert raw.report["articles.csv"]["duplicate_articles"] == 1


def test_articles_without_an_id_are_counted(tmp_path):
    sales(tmp_path, sale())
    articles(tmp_path, *(f"01{i:05}001,1,Top,,,,,,," for i in range(99)), "x,1,Top,,,,,,,")
    assert hm.read(tmp_path, None).report["articles.csv"] == {
        "lines": 100, "bad_lines": {"no_article": 1}, "first_bad_line": 101, "articles": 99,
        "duplicate_articles": 0,
    }
    write(tmp_path / "articles.csv", "article_id,product_code", "0108775015,108775")
    with pytest.raises(UserError, match="articles.csv must .* but prod_name is not there"):
        hm.read(tmp_path, None)


# ---------------- pictures

def test_pictures_are_those_on_disk(tmp_path):
    sales(tmp_path, *map(sale, ("0108775015", "0108775044", "0999000001")))
    pictures(
        tmp_path,
        "0108775044.JPG", "0108775015.jpg", "0108775015.png", "0108775051.jpeg",
        # and what is no picture of a sold article
        "0110065001.jpg", "0999000001.gif", "010877501.jpg", "010/0108775015.jpg.part",
        "0999000001.jpg/inside", "extra/0999000001.jpg",
    )
    (tmp_path / "images" / "0999000001.jpg.txt").write_text("not in a folder of its own")
    raw = hm.read(tmp_path, None)
    assert images_of(raw) == {
        "0108775015": ["images/010/0108775015.jpg", "images/010/0108775015.png"],
        "0108775044": ["images/010/0108775044.JPG"],
    }
    assert raw.report["items_without_picture"] == 1
    paths = [path for images in images_of(raw).values() for path in images]
    assert all((tmp_path / path).is_file() for path in paths)
    assert images_of(hm.read(tmp_path, None, "product")) == {"0108775": [
        "images/010/0108775015.jpg", "images/010/0108775015.png", "images/010/0108775044.JPG",
        "images/010/0108775051.jpeg",    # not sold, but the product's
    ]}


def test_a_product_has_at_most_ten_pictures(tmp_path):
    sales(tmp_path, sale("0108775044"))
    names = [f"0108775{i:03}.jpg" for i in range(14)]
    pictures(tmp_path, *reversed(names))
    first_ten = [f"images/010/{name}" for name in names[:10]]
    assert images_of(hm.read(tmp_path, None, "product")) == {"0108775": first_ten}


def test_pictures_that_come_later_are_noticed(tmp_path):
    sales(tmp_path / "shop", sale(), sale("0108775044"))

    def with_picture():
        return datasets.load(tmp_path / "shop", root=tmp_path / "data").has["image"].sum()

    assert with_picture() == 0
    pictures(tmp_path / "shop", "0108775015.jpg")
    assert with_picture() == 1
    assert (tmp_path / "data" / "shop~1").is_dir()
    assert with_picture() == 1
    assert not (tmp_path / "data" / "shop~2").exists()


def test_picture_folder_may_be_a_link(tmp_path):
    pictures(tmp_path / "disk", "0108775015.jpg")
    folder = sales(tmp_path / "hm", sale())
    (folder / "images").symlink_to(tmp_path / "disk" / "images")
    (tmp_path / "link").symlink_to(folder)
    raw = hm.read(tmp_path / "link", None)
    assert images_of(raw) == {"0108775015": ["images/010/0108775015.jpg"]}
    assert raw.image_root == str(folder.resolve())


# ---------------- real data

def test_real_sample_by_article(real, tmp_path):
    raw = hm.read(real("hm-sample"), None)
    assert (len(set(raw.users)), len(set(raw.items)), len(raw.items)) == (1364, 17033, 31662)
    assert sum(bool(row["title"]) for row in raw.catalog.values()) == 4116
    assert sum(map(len, images_of(raw).values())) == 9468
    assert raw.report["items_without_picture"] == 17033 - 9468
    for table in ("transactions_train.csv", "articles.csv"):
        assert not raw.report[table]["bad_lines"]
    assert steps(raw, tmp_path / "data")["exact duplicates dropped"] == (1364, 17033, 28516)
    texts = " ".join(text for row in raw.catalog.values() for text in row["text"])
    assert len(texts) > 100_000
    assert not re.search("<|&amp;|unknown|undefined", texts, re.IGNORECASE)


def test_real_sample_by_product(real, tmp_path):
    articles_sold = set(hm.read(real("hm-sample"), None).items)
    raw = hm.read(real("hm-sample"), None, "product")
    described = {item for item, row in raw.catalog.items() if row["title"]}
    assert len(described) == 3086
    assert sum(article[:7] in described for article in articles_sold) == 7127
    raw.core = 5
    counts = steps(raw, tmp_path / "data")
    assert counts["exact duplicates dropped"] == (1364, 10010, 28516)
    assert counts["5-core"] == (664, 1248, 12812)


def test_pictures_of_no_article_are_counted(tmp_path):
    sales(tmp_path, sale("0108775015"), sale("0108775044"))
    pictures(tmp_path, "010/0108775015.jpg", "010/108775044.jpg", "010/0108775044.webp")
    note, = hm.read(tmp_path, None).notes
    assert note.startswith("2 pictures are of no article that was sold")
    assert "the first is images/010/0108775044.webp" in note
