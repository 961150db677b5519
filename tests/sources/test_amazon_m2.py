"""sources/amazon_m2.py on small tables in the real syntax, written by hand."""
import gzip
import json
import re

import pytest

from sources import amazon_m2, build
from sources.common import UserError

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
CATALOG = {
    "B09W9FND7K@UK": {"title": "Kettle, 1.7 l & filter", "text": ["Boils. Quickly", "Acme, black, K-17, steel"],
                      "language": "en", "images": []},
    "B09W9FND7K@DE": {"title": "Wasserkocher mit „Filter“", "text": ["Acme, schwarz"], "language": "de", "images": []},
    "B000000001@UK": {"title": "", "text": [], "language": "en", "images": []},
    "B000000JP1@JP": {"title": "やかん", "text": ["お湯を沸かす"], "language": "ja", "images": []},
    "2070368223@FR": {"title": "L'Étranger", "text": ["Folio, Albert Camus"], "language": "fr", "images": []},
    "B000000IT3@IT": {"title": "Bollitore", "text": [], "language": "it", "images": []},
    "B000000ES3@ES": {"title": "Hervidor", "text": ["Rápido", "Ácme, rojo"], "language": "es", "images": []}}


def write(folder, sessions=SESSIONS, products=PRODUCTS):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("sessions_train.csv", sessions), ("products_train.csv", products)):
        (folder / name).write_bytes(text.encode())
    return folder


def by_session(raw):
    assert raw.clock == "order" and len(raw.users) == len(raw.items) == len(raw.times)
    found = {}
    for user, item, time in zip(raw.users, raw.items, raw.times):
        found.setdefault(user, []).append(item)
        assert time == len(found[user]) - 1
    return found


# Names and files

def test_names_and_files(tmp_path):
    assert amazon_m2.NAMES == ("m2-uk", "m2-de", "m2-jp", "m2-es", "m2-fr", "m2-it", "m2")
    assert all(map(amazon_m2.knows, amazon_m2.NAMES)) and not amazon_m2.knows("m2-us") and not amazon_m2.knows("M2")
    assert not amazon_m2.recognises(tmp_path) and not amazon_m2.recognises(tmp_path / "nowhere")
    write(tmp_path)
    assert amazon_m2.recognises(tmp_path)
    (tmp_path / "products_train.csv").unlink()
    assert not amazon_m2.recognises(tmp_path)


def test_one_folder_serves_all_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "raw"
    with pytest.raises(UserError, match="get sessions_train.csv and products_train.csv from https://.*aicrowd") as error:
        amazon_m2.fetch("m2-uk", raw.relative_to(tmp_path) / "m2-uk", None)
    assert str(error.value).endswith(f"put them into {raw.resolve()}/m2")
    write(raw / "m2-uk")
    assert amazon_m2.fetch("m2-uk", raw / "m2-uk", None) == raw / "m2-uk"
    write(raw / "m2")
    for name in amazon_m2.NAMES:
        assert amazon_m2.fetch(name, raw / name, None) == raw / "m2"


# Sessions

def test_sessions_of_all_locales(tmp_path):
    for name in ("m2", None):
        raw = amazon_m2.read(write(tmp_path), name)
        assert by_session(raw) == {
            "UK1": ["B09W9FND7K@UK", "B09JSPLN1M@UK", "B000000001@UK", "B076THCGSG@UK"],
            "DE2": ["B09W9FND7K@DE", "B09W9FND7K@DE"],
            "JP3": ["B000000JP1@JP", "B000000JP2@JP", "B000000JP1@JP", "B000000JP3@JP"],
            "ES4": ["B000000ES1@ES", "B000000ES2@ES", "B000000ES3@ES"],
            "FR5": ["3596520983@FR", "2070368223@FR", "2070368223@FR"],
            "IT6": ["B000000IT1@IT", "B000000IT2@IT", "B000000IT3@IT"],
            "UK7": ["B076THCGSG@UK", "B09W9FND7K@UK", "B000000001@UK"]}
        assert (raw.core, raw.need_catalog, raw.published) == (0, False, {})
        assert raw.report == {"sessions_train.csv": {"lines": 7, "bad_lines": {}},
                              "products_train.csv": {"lines": 9, "bad_lines": {}, "duplicate_products": 1},
                              "items_without_metadata": 9}
        assert raw.catalog == CATALOG


@pytest.mark.parametrize("name, sessions, published", [
    ("m2-uk", ["UK1", "UK7"], (1182181, 494409)), ("m2-de", ["DE2"], (1111416, 513811)),
    ("m2-jp", ["JP3"], (979119, 389888)), ("m2-es", ["ES4"], (89047, 41341)),
    ("m2-fr", ["FR5"], (117516, 43033)), ("m2-it", ["IT6"], (126925, 48788))])
def test_a_name_is_cut_to_its_locale(tmp_path, name, sessions, published):
    raw = amazon_m2.read(write(tmp_path), name)
    assert list(by_session(raw)) == sessions and raw.core == 0
    assert raw.catalog == {key: item for key, item in CATALOG.items() if key.endswith(name[-2:].upper())}
    assert (raw.published["users"], raw.published["items"], raw.published["source"]) == (*published, "SRMML")
    assert f"{raw.published['interactions']:>10}" == " " * 9 + "-"


def test_one_string_per_key(tmp_path):
    raw = amazon_m2.read(write(tmp_path), "m2-uk")
    assert len({*map(id, raw.items)}) == len({*raw.items}) == 4 and len({*map(id, raw.users)}) == 2


def test_written_data_keep_the_order_and_repeats(tmp_path):
    raw = amazon_m2.read(write(tmp_path / "raw"), "m2-jp")
    build(raw, tmp_path / "out", {"name": "m2-jp"})
    assert json.loads((tmp_path / "out" / "source.json").read_text())["counts"] == [
        {"step": "read", "users": 1, "items": 3, "interactions": 4}]


def test_bom_carriage_returns_column_order_and_gzip(tmp_path):
    write(tmp_path, "\ufefflocale,next_item,more,prev_items\r\n uk , A3 ,x,\"[ 'A1'\r\n\t'A2' ]\"\r\n\r\n",
          "title,locale,id\nTea,UK, A1 \n")
    for path in list(tmp_path.iterdir()):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    assert amazon_m2.recognises(tmp_path)
    raw = amazon_m2.read(tmp_path, None)
    assert by_session(raw) == {"UK1": ["A1@UK", "A2@UK", "A3@UK"]}
    assert raw.catalog == {"A1@UK": {"title": "Tea", "text": [], "language": "en", "images": []}}


BAD = [("no_locale", "['A1'],A2,US"), ("no_locale", "['A1'],A2,"), ("no_prev_items", "[],A2,UK"),
       ("no_prev_items", ",A2,UK"), ("no_next_item", "['A1'],,UK"), ("no_next_item", "['A1'],A2 A3,UK"),
       ("prev_items_cut_short", "['A1' 'A2' ... 'A8' 'A9'],A2,UK"), ("columns_missing", "['A1'],A2")]


@pytest.mark.parametrize("defect, line", BAD)
def test_a_bad_session_is_skipped_and_counted_and_two_percent_are_refused(tmp_path, defect, line):
    header, good = "prev_items,next_item,locale", ["['A1'],A2,UK"] * 99
    raw = amazon_m2.read(write(tmp_path, "\n".join([header, *good[:49], line, *good[49:], ""])), None)
    assert raw.report["sessions_train.csv"] == {"lines": 100, "bad_lines": {defect: 1}, "first_bad_line": 51}
    assert len(by_session(raw)) == 99 and set(raw.items) == {"A1@UK", "A2@UK"}
    write(tmp_path, "\n".join([header, line, line, *good, ""]))
    with pytest.raises(UserError, match=rf"sessions_train.csv: 2 of 101 lines .*\({defect} 2\), the first is line 2:"):
        amazon_m2.read(tmp_path, None)


def test_sessions_that_are_no_table(tmp_path):
    for text, message in (("A1,A2,UK\n", "names the columns prev_items, next_item, locale"),
                          (SESSIONS + '"[\'A1\',A2,UK\n' + SESSIONS, "is not CSV")):
        write(tmp_path, text)
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/sessions_train.csv.* {message}"):
            amazon_m2.read(tmp_path, None)


# Products

@pytest.mark.parametrize("defect, line", [("no_product", ",UK,Tea,,,,,,,,"), ("no_locale", "A1,US,Tea,,,,,,,,"),
                                          ("columns_missing", "A1,UK,Tea")])
def test_a_bad_product_is_skipped_and_counted_and_two_percent_are_refused(tmp_path, defect, line):
    header, *rows = PRODUCTS.partition("\n")[0], *(f"P{i},UK,,,,,,,,," for i in range(99))
    raw = amazon_m2.read(write(tmp_path, products="\n".join([header, *rows, line])), None)
    assert raw.report["products_train.csv"] == {"lines": 100, "bad_lines": {defect: 1}, "first_bad_line": 101,
                                                "duplicate_products": 0}
    assert raw.catalog == {} and len(raw.items) == 22
    write(tmp_path, products="\n".join([header, *rows, line, line]))
    with pytest.raises(UserError, match="products_train.csv: 2 of 101 lines"):
        amazon_m2.read(tmp_path, None)
    write(tmp_path, products="id,title\nA1,Tea\n")
    with pytest.raises(UserError, match="products_train.csv must .* but locale is not there"):
        amazon_m2.read(tmp_path, None)
