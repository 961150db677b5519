"""common/tables.py: clean text, and the readers that count what they cannot use."""
import gzip
import os
import random
import re

import numpy as np
import pytest

from common import tables
from common.files import UserError
from common.tables import (
    Defect,
    Keys,
    clean_text,
    count_lines,
    each_object,
    each_row,
    first_of_each,
    header_of,
    parse_object,
    placed,
    sentences,
    table_lines,
    text_lines,
)

# ---------------- columns

def test_a_column_gives_back_its_keys_however_long_it_grows():
    rng = random.Random(0)
    lines = [f"key {rng.randrange(5000)}" for _ in range(100_000)]
    column = Keys(lines[:10])
    for key in lines[10:]:
        column.add(key)
    assert len(column) == len(lines)
    assert [*column] == lines
    assert [*column.names] == [*dict.fromkeys(lines)]    # in the order of the lines
    assert [*column.names.values()] == [*range(len(column.names))]
    assert column.numbers.itemsize * len(column.numbers) == 4 * len(lines)
    assert len({*map(id, column)}) == len(column.names)    # one string per key
    order = sorted({*lines, "key nobody has"})
    places = column.places_in(order)
    assert places.dtype == np.int32
    assert [order[place] for place in places] == lines


def test_keys_that_get_one_name_become_one():
    column = Keys(["b2", "a1", "b1", "a1"]).renamed(lambda key: key[:1])
    assert [*column] == ["b", "a", "b", "a"]
    assert column.names == {"b": 0, "a": 1}
    column.add("a")
    assert [*column][-1] == "a"


def test_an_empty_column():
    assert [*Keys().renamed(str.upper)] == [*Keys()] == []
    assert len(Keys().places_in(["a"])) == 0
    assert len(first_of_each(Keys().numbers)) == 0


def test_the_first_of_each_kind_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    columns = rng.integers(0, 5, (3, 200))
    seen = set()
    slow = []
    for row in zip(*columns.tolist()):
        slow.append(row not in seen)
        seen.add(row)
    assert 50 < sum(slow) < 150
    assert first_of_each(*columns).tolist() == slow


# ---------------- text

@pytest.mark.parametrize("value, text", [
    (" a \n\t b ", "a b"),
    ("Tom &amp; Jerry &amp;amp; co", "Tom & Jerry & co"),
    ("<b>bold</b> <br/>x", "bold x"),
    ("<script>var a = '<b>';</script>rest", "rest"),
    ("<STYLE>p {}", ""),
    ('<span class="a-size-medium', ""),
    ("<!-- hidden -->seen", "seen"),
    ("3 < 4 > 2", "3 < 4 > 2"),
    ("&lt;b&gt;bold", "bold"),
    (None, ""),
    (float("nan"), ""),
    (True, ""),
    (12, "12"),
    (["a", None, ["b"]], "a b"),
    ({"k": "v"}, "v"),
    ("Cafe\u0301", "Caf\u00e9"),
    ("日本語", "日本語"),
    ("a\x00b\u200bc\ud800", "a b c"),
], ids=ascii)
def test_clean_text(value, text):
    assert clean_text(value) == text


def test_texts_nested_too_deep_are_no_texts():
    deep = ["x"]
    for _ in range(100_000):
        deep = [deep]
    assert clean_text(["seen", deep]) == "seen"


def test_sentences_are_distinct_in_order_and_cut():
    assert sentences("b", None, " ", "<i>a</i>", "b ", ["c", "d"]) == ["b", "a", "c d"]
    assert sentences("x" * 3000) == ["x" * 2000]
    assert sentences("abc", "abd", limit=2) == ["ab"]


# ---------------- rows

def write(path, content):
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def rows_of(path, *columns, optional=()):
    """(the cells of each line, counts)"""
    rows = []
    counts = each_row(path, columns, lambda *cells: rows.append(cells), optional)
    return rows, counts


def test_a_table_is_plain_or_else_compressed(tmp_path):
    assert placed(tmp_path, "t.csv") is None
    (tmp_path / "t.csv").mkdir()
    write(tmp_path / "t.csv.gz", "")
    assert placed(tmp_path, "t.csv") == tmp_path / "t.csv.gz"
    (tmp_path / "t.csv").rmdir()
    write(tmp_path / "t.csv", "")
    assert placed(tmp_path, "t.csv") == tmp_path / "t.csv"


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_columns_are_found_by_name(tmp_path, name):
    text = '\ufeff More , B,a\r\n\r\n1,"x, ""y""\r\nz",3\r\n4,5,6,\r\n'
    path = write(tmp_path / name, text)
    rows, counts = rows_of(path, "a", "b", optional=("more", "missing"))
    assert rows == [("3", 'x, "y"\r\nz', "1", ""), ("6", "5", "4", "")]
    assert counts == {"lines": 2, "bad_lines": {}}
    assert header_of(path) == ["more", "b", "a"]


@pytest.mark.parametrize("line, defect", [
    ("1,2", "columns_missing"), ("1,2,3,4", "more_columns_than_the_header"),
])
def test_a_line_of_another_width_is_bad_and_is_not_handed_on(tmp_path, line, defect):
    path = write(tmp_path / "t.csv", "a,b,c\n" + "1,2,3\n" * 99 + line)
    rows, counts = rows_of(path, "a", "b")
    assert rows == [("1", "2")] * 99
    assert counts == {"lines": 100, "bad_lines": {defect: 1}, "first_bad_line": 101}


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = write(tmp_path / "t.csv", "a,A,c,c\n1,2,3,4\n")
    with pytest.raises(UserError, match="t.csv has two columns a: give one of them another name"):
        rows_of(path, "a")
    with pytest.raises(UserError, match="two columns c"):
        each_row(path, (), print, ("c", "missing"))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_older_programs_write_latin_1(tmp_path, encoding):
    table = write(tmp_path / "t.csv", "a,b\nCafé,2\n".encode(encoding))
    assert rows_of(table, "a", "b")[0] == [("Café", "2")]
    lines = write(tmp_path / "t.jsonl", '{"a": "Café"}\n'.encode(encoding))
    assert list(text_lines(lines)) == [(1, '{"a": "Café"}')]


@pytest.mark.parametrize("content, sentence", [
    ("a,b\n1,2\n".encode("utf-16"), "is UTF-16, as Excel's .* save it as UTF-8"),
    ("a,b\n1,2\n".encode("utf-16-le"), "is damaged or UTF-16 .*: save it as UTF-8"),
    (b"PK\x03\x04 and more", "is a zip archive or an Excel file: unpack it, or save it as CSV"),
    (gzip.compress(b"a,b\n1,2\n"), "is compressed: give its name the end .gz"),
    (b"PAR1 and more", "is a Parquet file: save it as CSV"),
])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_other_kinds_of_files_are_named(tmp_path, content, sentence, end):
    for name in ("t.csv", "t.jsonl"):
        path = write(tmp_path / f"{name}{end}", content)
        with pytest.raises(UserError, match=sentence):
            list(table_lines(path) if "csv" in name else text_lines(path))


@pytest.mark.parametrize("content, message", [
    ("", "names the columns a, b, but a, b is not there"),
    ("a,c\n1,2\n", "names the columns a, b, but b is not there"),
    ('a,b\n1,"2\n1,2\n', "line 3 is not CSV"),
    ('a,b\n1,"2"x\n', "line 2 is not CSV"),
    ("x" * 200_000, "line 1 is not CSV"),
], ids=["empty", "a column less", "open quote", "text after a quote", "one long line"])
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.* {message}"):
        rows_of(path, "a", "b")


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:-500],
    lambda whole: b"<html>login</html>",
    lambda whole: whole[:200] + b"\0" * 2000 + whole[2200:],
    lambda whole: whole[:-8] + b"\0\0\0\0" + whole[-4:],
], ids=["cut", "a web page", "damaged", "another check sum"])
def test_compressed_tables_that_are_cut_or_damaged(tmp_path, damage):
    lines = "".join(f"{os.urandom(32).hex()},2\n" for _ in range(500))
    path = write(tmp_path / "t.csv.gz", f"a,b\n{lines}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="t.csv.gz cannot be read to its end"):
        rows_of(path, "a", "b")


# ---------------- objects

def test_objects_one_a_line(tmp_path):
    lines = ["\ufeff" + '{"a": 1}' + "\r", "", "  \r", '{"a": NaN}', ' {"b": "\ufffd"} ']
    objects = []
    for name in ("t.jsonl", "t.jsonl.gz"):
        path = write(tmp_path / name, "\n".join(lines))
        assert each_object(path, objects.append) == {"lines": 3, "bad_lines": {}}
    assert [[*row] for row in objects] == [["a"], ["a"], ["b"]] * 2
    assert objects[0] == {"a": 1}


@pytest.mark.parametrize("text, parsed", [
    ('{"a": [1]}', {"a": [1]}),
    ("{'a': 1}", Defect("not_json")),
    ("{} {}", Defect("not_json")),
    ("[" * 100_000, Defect("not_json")),
    ("[1]", Defect("not_an_object")),
    ("null", Defect("not_an_object")),
    ('"a"', Defect("not_an_object")),
], ids=lambda value: str(value)[:10])
def test_parse_object(text, parsed):
    assert parse_object(text) == parsed
    assert type(parse_object(text)) is type(parsed)


def test_a_long_line_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_LINE", 1000)
    lines = ['{"a": 1}'] * 250 + [f'{{"b": "{"x" * 1500}"}}', '{"last": 1}']
    objects = []
    path = write(tmp_path / "t.jsonl", "\n".join(lines))
    assert each_object(path, objects.append)["bad_lines"] == {"not_json": 2}
    assert len(objects) == 251
    assert objects[-1] == {"last": 1}


@pytest.mark.parametrize("damage, message", [
    (lambda whole: whole[:20_000], "byte 20000 .Compressed file ended"),
    (lambda whole: b"<html>login</html>", r"byte \d+ .Not a gzipped file"),
    (lambda whole: whole[:-8] + b"\0\0\0\0" + whole[-4:], r"byte \d+ .CRC check failed"),
], ids=["cut", "a web page", "another check sum"])
def test_compressed_objects_that_are_cut_or_damaged_name_the_byte(tmp_path, damage, message):
    lines = "".join(f'{{"a": "{os.urandom(99).hex()}"}}\n' for _ in range(999))
    path = write(tmp_path / "t.jsonl.gz", lines)
    path.write_bytes(damage(path.read_bytes()))
    told = f"{re.escape(str(path))} is not a whole file, reading stopped at {message}"
    with pytest.raises(UserError, match=told):
        each_object(path, lambda row: None)


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = write(tmp_path / "t.txt", "a\n\n \n b \r\nc")
    assert list(text_lines(path)) == [(1, "a"), (4, "b"), (5, "c")]


# ---------------- counting

def test_one_percent_of_bad_lines_is_counted_and_more_is_refused(tmp_path):
    def take(row):
        return "odd" if row == 1 else None

    rows = [(number, 0, "") for number in range(2, 200)]
    rows += [(300, 1, "so it is\nwritten"), (301, Defect("no_book"), ["a"])]
    assert count_lines("t", rows, take) == {
        "lines": 200, "bad_lines": {"odd": 1, "no_book": 1}, "first_bad_line": 300,
    }
    message = (
        r"t: 2 of 199 lines cannot be used \(odd 1, no book 1\), the first is line 300 "
        r"\(so it is written\): "
    )
    with pytest.raises(UserError, match=message + "correct the file"):
        count_lines("t", rows[1:], take)
    with pytest.raises(UserError, match=message + "make it even"):
        count_lines("t", rows[1:], take, {"odd": "make it even"})
    assert count_lines("t", [], take) == {"lines": 0, "bad_lines": {}}
