"""sources/amazon_m2.py on small tables in the real syntax, written by hand."""
import json

import pytest

from common.files import UserError
from sources import amazon_m2, build

SESSIONS = '''prev_items,next_item,locale
"['B09W9FND7K' 'B09JSPLN1M'
 'B000000001']",B076THCGSG,UK
['B09W9FND7K'],B09W9FND7K,DE
"['B000000JP1', 'B000000JP2', 'B000000JP1']",B000000JP3,JP
"[""B000000ES1"" ""B000000ES2""]",B000000ES3,ES
['3596520983' '2070368223'],2070368223,FR
['B000000IT1'  'B000000IT2'],B000000IT3,IT
['B076THCGSG' 'B09W9FND7K'],B000000001,UK
'''
PRODUCTS = '''id,locale,title,price,brand,color,size,model,material,author,desc
B09W9FND7K,UK,"Kettle, 1.7 l &amp; filter",25.99,Acme,black,,K-17,steel,,"Boils.

<b>Quickly</b>"
B09W9FND7K,DE,Wasserkocher mit „Filter“,29.0,Acme,schwarz,Acme,,,,
B000000001,UK,nan,,nan,,,,,,nan
B000000JP1,JP,やかん,3000.0,,,,,,,お湯を沸かす
2070368223,FR,L'Étranger,6.9,Folio,,,,,Albert Camus,
B000000IT3,IT,Bollitore,,,,,,,,
B000000IT3,IT,again,,,,,,,,
B000000ES3,ES,Hervidor,,Ácme,rojo,,,,,Rápido
B0UNUSED00,UK,nobody looked at it,1.0,,,,,,,
'''


def item(title, *text, language):
    return {"title": title, "text": list(text), "language": language, "images": []}


CATALOG = {
    "B09W9FND7K@UK": item(
        "Kettle, 1.7 l & filter", "Boils. Quickly", "Acme, black, K-17, steel", language="en"
    ),
    "B09W9FND7K@DE": item("Wasserkocher mit „Filter“", "Acme, schwarz", language="de"),
    "B000000001@UK": item("", language="en"),
    "B000000JP1@JP": item("やかん", "お湯を沸かす", language="ja"),
    "2070368223@FR": item("L'Étranger", "Folio, Albert Camus", language="fr"),
    "B000000IT3@IT": item("Bollitore", language="it"),
    "B000000ES3@ES": item("Hervidor", "Rápido", "Ácme, rojo", language="es"),
}


def write(folder, sessions=SESSIONS, products=PRODUCTS):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("sessions_train.csv", sessions), ("products_train.csv", products)):
        lines = text if isinstance(text, str) else "".join(f"{line}\n" for line in text)
        (folder / name).write_bytes(lines.encode())
    return folder


def by_session(raw):
    """session -> its items; the times count them."""
    assert raw.clock == "order"
    found = {}
    for user, key, time in zip(raw.users, raw.items, raw.times, strict=True):
        found.setdefault(user, []).append(key)
        assert time == len(found[user]) - 1
    return found


# ---------------- names and files

def test_both_tables_are_needed(tmp_path):
    assert amazon_m2.NAMES == ("m2-uk", "m2-de", "m2-jp", "m2-es", "m2-fr", "m2-it", "m2")
    write(tmp_path)
    assert amazon_m2.recognises(tmp_path)
    (tmp_path / "products_train.csv").unlink()
    assert not amazon_m2.recognises(tmp_path)


def test_one_folder_serves_all_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "raw"
    tables = "sessions_train.csv and products_train.csv"
    with pytest.raises(UserError, match=f"get {tables} from https://.*aicrowd") as error:
        amazon_m2.fetch("m2-uk", raw.relative_to(tmp_path) / "m2-uk", None)
    assert str(error.value).endswith(f"put them into {raw.resolve()}/m2")
    write(raw / "m2-uk")
    assert amazon_m2.fetch("m2-uk", raw / "m2-uk", None) == raw / "m2-uk"
    write(raw / "m2")
    for name in amazon_m2.NAMES:
        assert amazon_m2.fetch(name, raw / name, None) == raw / "m2"


# ---------------- sessions

@pytest.mark.parametrize("name", ["m2", None])
def test_sessions_of_all_locales(tmp_path, name):
    raw = amazon_m2.read(write(tmp_path), name)
    assert by_session(raw) == {
        "UK1": ["B09W9FND7K@UK", "B09JSPLN1M@UK", "B000000001@UK", "B076THCGSG@UK"],
        "DE2": ["B09W9FND7K@DE", "B09W9FND7K@DE"],
        "JP3": ["B000000JP1@JP", "B000000JP2@JP", "B000000JP1@JP", "B000000JP3@JP"],
        "ES4": ["B000000ES1@ES", "B000000ES2@ES", "B000000ES3@ES"],
        "FR5": ["3596520983@FR", "2070368223@FR", "2070368223@FR"],
        "IT6": ["B000000IT1@IT", "B000000IT2@IT", "B000000IT3@IT"],
        "UK7": ["B076THCGSG@UK", "B09W9FND7K@UK", "B000000001@UK"],
    }
    assert (raw.core, raw.need_catalog, raw.published) == (0, False, {})
    assert raw.report == {
        "sessions_train.csv": {"lines": 7, "bad_lines": {}},
        "products_train.csv": {"lines": 9, "bad_lines": {}, "duplicate_products": 1},
        "items_without_metadata": 9,
    }
    assert raw.catalog == CATALOG


@pytest.mark.parametrize("name, sessions, n_users, n_items", [
    ("m2-uk", ["UK1", "UK7"], 1182181, 494409),
    ("m2-de", ["DE2"], 1111416, 513811),
    ("m2-jp", ["JP3"], 979119, 389888),
    ("m2-es", ["ES4"], 89047, 41341),
    ("m2-fr", ["FR5"], 117516, 43033),
    ("m2-it", ["IT6"], 126925, 48788),
])
def test_a_name_is_cut_to_its_locale(tmp_path, name, sessions, n_users, n_items):
    raw = amazon_m2.read(write(tmp_path), name)
    assert list(by_session(raw)) == sessions
    assert (raw.core, raw.need_catalog) == (0, False)
    locale = name[-2:].upper()
    assert raw.catalog == {key: row for key, row in CATALOG.items() if key.endswith(locale)}
    assert raw.published == {
        "users": n_users, "items": n_items, "interactions": "-", "source": "SRMML",
    }


def test_pictures_that_somebody_adds(tmp_path):
    """By product, or by product and locale; a product without a line of its own may have one."""
    folder = write(tmp_path / "m2")
    (folder / "images").mkdir()
    for name in ("B09W9FND7K.jpg", "B09W9FND7K@DE.png", "B076THCGSG.webp", "B0NOBODY00.jpg", ".x"):
        (folder / "images" / name).write_bytes(b"")
    raw = amazon_m2.read(folder, "m2")
    pictured = {key: row["images"] for key, row in raw.catalog.items() if row["images"]}
    assert pictured == {
        "B09W9FND7K@UK": ["images/B09W9FND7K.jpg"],
        "B09W9FND7K@DE": ["images/B09W9FND7K@DE.png"],
        "B076THCGSG@UK": ["images/B076THCGSG.webp"],
    }
    assert raw.catalog["B076THCGSG@UK"]["language"] == "en"
    assert raw.image_root == str(folder.resolve())
    assert raw.report["items_without_picture"] == len({*raw.items}) - 3
    assert raw.notes == [
        "1 picture is named after no item of the sessions: images/B0NOBODY00.jpg"
    ]
    assert amazon_m2.pictures_in(folder) == 4


def test_written_data_keep_the_order_and_repeats(tmp_path, histories):
    raw = amazon_m2.read(write(tmp_path / "raw"), "m2-jp")
    build(raw, tmp_path / "out", {"name": "m2-jp"})
    assert json.loads((tmp_path / "out" / "source.json").read_text())["counts"] == [
        {"step": "read", "users": 1, "items": 3, "interactions": 4},
    ]
    codes = ("B000000JP1", "B000000JP2", "B000000JP1", "B000000JP3")
    assert histories(tmp_path / "out") == {"JP3": [f"{code}@JP" for code in codes]}


def test_order_of_columns_and_space_around_cells(tmp_path):
    sessions = ["locale,next_item,more,prev_items", " uk , A3 ,x,\"[ 'A1'\n\t'A2' ]\"", ""]
    raw = amazon_m2.read(write(tmp_path, sessions, ["title,locale,id", "Tea,uk, A1 "]), None)
    assert by_session(raw) == {"UK1": ["A1@UK", "A2@UK", "A3@UK"]}
    assert raw.catalog == {"A1@UK": item("Tea", language="en")}


BAD_SESSIONS = {
    "no_locale": ["['A1'],A2,US", "['A1'],A2,"],
    "no_prev_items": ["[],A2,UK", ",A2,UK"],
    "no_next_item": ["['A1'],,UK", "['A1'],A2 A3,UK"],
    "prev_items_cut_short": ["['A1' 'A2' ... 'A8' 'A9'],A2,UK"],
    "columns_missing": ["['A1'],A2"],
}
BAD_PRODUCTS = {
    "no_product": [",UK,Tea,,,,,,,,", " ,UK,Tea,,,,,,,,"],
    "no_locale": ["A1,US,Tea,,,,,,,,"],
    "columns_missing": ["A1,UK,Tea"],
}


@pytest.mark.parametrize("defect", BAD_SESSIONS)
def test_bad_sessions_are_skipped_and_counted(tmp_path, defect):
    bad = BAD_SESSIONS[defect]
    good = ["['A1'],A2,UK"] * 200
    sessions = ["prev_items,next_item,locale", *good[:49], *bad, *good[49:]]
    raw = amazon_m2.read(write(tmp_path, sessions), None)
    assert raw.report["sessions_train.csv"] == {
        "lines": 200 + len(bad), "bad_lines": {defect: len(bad)}, "first_bad_line": 51,
    }
    assert list(by_session(raw).values()) == [["A1@UK", "A2@UK"]] * 200


@pytest.mark.parametrize("defect", BAD_PRODUCTS)
def test_bad_products_are_skipped_and_counted(tmp_path, defect):
    bad = BAD_PRODUCTS[defect]
    header = PRODUCTS.partition("\n")[0]
    good = [f"P{i},UK,,,,,,,,," for i in range(200)]
    raw = amazon_m2.read(write(tmp_path, products=[header, *good, *bad]), None)
    assert raw.report["products_train.csv"] == {
        "lines": 200 + len(bad), "bad_lines": {defect: len(bad)}, "first_bad_line": 202,
        "duplicate_products": 0,
    }
    assert raw.catalog == {}
    assert len(raw.items) == 22


@pytest.mark.parametrize("table", ["sessions", "products"])
def test_a_missing_column_is_named(tmp_path, table):
    lines = {"sessions": "A1,next_item,locale\n", "products": "id,title\nA1,Tea\n"}
    missing = {"sessions": "prev_items", "products": "locale"}[table]
    write(tmp_path, **{table: lines[table]})
    with pytest.raises(UserError, match=f"{table}_train.csv must .* but {missing} is not there"):
        amazon_m2.read(tmp_path, None)
