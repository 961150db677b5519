"""What is true for every source in sources/. A new source is under test at once; all it needs here
is a small example of its files in EXAMPLES. What only one source promises is in a file of its own.
"""
import contextlib
import gzip
import inspect
import json
import os
import socket
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest

import sources
from common.files import UserError, read_json, sha256
from common.tables import Keys, clean_text
from helpers import HTML, ROOT
from sources import SOURCES, knows, prepare, slug


@dataclass
class Example:
    """Small files of a source, in their real syntax, with more than one interaction and item.

    A table with an entry in `bad` has exactly 99 good lines, if the source is not strict.
    """
    files: dict = field(default_factory=dict)    # file name -> text; the first is indispensable
    bad: dict = field(default_factory=dict)      # file name -> a line that cannot be used
    zipped: bool = False    # whether the files may be compressed
    strict: bool = False    # whether one bad line is enough for a refusal
    name: str = None        # the known data set whose files these are


def table(*lines, header=None):
    return "".join(f"{line}\n" for line in ([header] if header else []) + list(lines))


NUMBERS = range(99)
EXAMPLES = {
    "folder": Example(
        files={
            "interactions.csv": table(
                *(f"u{i % 9},Ä{i % 7},{1_500_000_000 + i}" for i in NUMBERS),
                header="user,item,time",
            ),
            "items.jsonl": table(*(
                json.dumps({"item": f"Ä{i}", "title": f"<b>Nº {i}</b>", "images": [f"p/{i}.jpg"]},
                           ensure_ascii=False)
                for i in NUMBERS
            )),
        },
        bad={"interactions.csv": "u1,,5", "items.jsonl": "{"},
        zipped=True,
    ),
    "recbole": Example(
        files={
            "X.inter": table(
                *(f"u{i % 9}\tÄ{i % 7}\t{1_500_000_000 + i}" for i in NUMBERS),
                header="user_id:token\titem_id:token\ttimestamp:float",
            ),
            "X.item": table(
                *(f'Ä{i}\t"Thé" {i}\tTea' for i in NUMBERS),
                header="item_id:token\ttitle:token_seq\tcategories:token_seq",
            ),
        },
        bad={"X.inter": "u1\t\t5", "X.item": "\tno key\tTea"},
    ),
    "mmrec": Example(
        files={
            "X.inter": table(
                *(f"{i % 9}\t{i % 7}\t{1_500_000_000 + i}\t{i % 3}" for i in NUMBERS),
                header="userID\titemID\ttimestamp\tx_label",
            ),
            "i_id_mapping.csv": table(*(f"B{i}\t{i}" for i in NUMBERS), header="asin\titemID"),
        },
        bad={"X.inter": "1\t\t5\t0", "i_id_mapping.csv": "B1"},
    ),
    "sequences": Example(
        files={"X.txt": table(*(f"{i % 9} {i}" for i in NUMBERS))},
        bad={"X.txt": "1 tea"},
    ),
    "movielens": Example(
        files={
            "ratings.dat": table(*(f"{i % 9}::{i % 7}::5::{9e8 + i:.0f}" for i in NUMBERS)),
            "movies.dat": table(*(f"{i}::Amélie {i} (2001)::Comedy|Romance" for i in NUMBERS)),
        },
        bad={"ratings.dat": "1::::5::900000000", "movies.dat": "::No number::Comedy"},
    ),
    "amazon_ratings": Example(
        files={
            "Tea.csv": table(*(f"B00000000{i % 7},A000000000{i % 9},5.0,{9e8 + i:.0f}"
                               for i in NUMBERS)),
            "meta_Tea.json": table(*(
                json.dumps({"asin": f"B00000000{i}", "title": f"Thé {i}"}, ensure_ascii=False)
                for i in NUMBERS
            )),
        },
        bad={"Tea.csv": "B000000001,,5.0,900000000", "meta_Tea.json": "{}"},
        zipped=True,
    ),
    "unisrec": Example(
        files={
            "X.item2index": table(*(f"Ä{i}\t{i}" for i in range(4))),
            "X.user2index": table("u0\t0", "u1\t1"),
            "X.text": table("Ä0\tTea &amp; co.", "Ä1\tCup", header="item_id:token\ttext:token_seq"),
            "X.train.inter": table("0\t0\t1", "1\t3\t2"),
            "X.valid.inter": table("0\t0 1\t2", "1\t3 2\t1"),
            "X.test.inter": table("0\t0 1 2\t3", "1\t3 2 1\t0"),
        },
        bad={"X.item2index": "x\tx", "X.text": "x", "X.test.inter": "0\t1 2\t999"},
        strict=True,
    ),
    "amazon": Example(
        files={
            "Prime_Pantry_5.json": table(*(
                json.dumps({
                    "reviewerID": f"U{i % 9}", "asin": f"A{i % 7}", "unixReviewTime": 86_400 * i,
                })
                for i in NUMBERS
            )),
            "meta_Prime_Pantry.json": table(*(
                json.dumps({"asin": f"A{i}", "title": f"Thé {i}", "brand": "b"}, ensure_ascii=False)
                for i in NUMBERS
            )),
        },
        bad={"Prime_Pantry_5.json": "{", "meta_Prime_Pantry.json": "{}"},
        zipped=True,
        name="pantry",
    ),
    "hm": Example(
        files={
            "transactions_train.csv": table(
                *(f"2018-09-{i % 28 + 1:02},c{i % 9},01{i % 7:05}001" for i in NUMBERS),
                header="t_dat,customer_id,article_id",
            ),
            "articles.csv": table(
                *(f"01{i:05}001,Crème {i},Top,Red" for i in NUMBERS),
                header="article_id,prod_name,product_type_name,colour_group_name",
            ),
        },
        bad={
            "transactions_train.csv": "2018-02-30,c1,0100001001",
            "articles.csv": "x,Top,Top,Red",
        },
        zipped=True,
        name="hm",
    ),
    "amazon_m2": Example(
        files={
            "sessions_train.csv": table(
                *(f"['A{i % 9}' 'A{i % 7}'],A{i % 5},UK" for i in NUMBERS),
                header="prev_items,next_item,locale",
            ),
            "products_train.csv": table(
                *(f"A{i},UK,Thé {i},Acme" for i in NUMBERS), header="id,locale,title,brand"
            ),
        },
        bad={"sessions_train.csv": "[],A1,UK", "products_train.csv": "A1,US,Tea,Acme"},
        zipped=True,
        name="m2-uk",
    ),
    "demo": Example(name="demo"),    # drawn, not read from files
}
BY_NAME = {source.__name__.rpartition(".")[2]: source for source in SOURCES}
WITH_FILES = [name for name, example in EXAMPLES.items() if example.files]
WITH_NAME = [name for name in WITH_FILES if EXAMPLES[name].name]


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    return folder


def example_in(folder, name):
    return write(folder, EXAMPLES[name].files)


def with_line(text, line):
    """A text with one more line in the third place."""
    lines = text.splitlines()
    return table(*lines[:2], line, *lines[2:])


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------- the module

def test_every_source_has_an_example():
    assert BY_NAME.keys() == EXAMPLES.keys(), (
        "give EXAMPLES in this file a small example of each file in sources/"
    )


@pytest.mark.parametrize("name", BY_NAME)
def test_the_module_says_what_it_reads(name):
    source = BY_NAME[name]
    first = inspect.getdoc(source).split("\n\n")[0]
    assert len(first) > 40 and first[-1] in ".:;"
    by = ["by"] if hasattr(source, "BY") else []
    assert list(inspect.signature(source.recognises).parameters) == ["folder"]
    assert list(inspect.signature(source.read).parameters) == ["folder", "name", *by]


@pytest.mark.parametrize("name", BY_NAME)
def test_names_and_fetch_belong_together(name, tmp_path):
    source = BY_NAME[name]
    names = getattr(source, "NAMES", ())
    assert isinstance(names, tuple)
    assert hasattr(source, "fetch") == (bool(names) or hasattr(source, "knows"))
    for known in names:
        assert [other for other in SOURCES if knows(other, known)] == [source]
        assert slug(known) == known    # so that it is the name of its folder
        assert known not in ("raw", "cache")
        for wrong in (known.upper(), f"{known}\n", f" {known}", f"../{known}", f"{known}-x"):
            assert not any(knows(other, wrong) for other in SOURCES), wrong
    for wrong in ("", ".", "..", "/", str(tmp_path), "shop"):
        assert not knows(source, wrong)
    if names:
        assert list(inspect.signature(source.fetch).parameters) == ["name", "raw", "mirror"]
        assert set(names) <= set(sources.NAMES)
    kinds = getattr(source, "BY", ())
    if kinds:
        assert len(set(kinds)) == len(kinds) > 1
        assert set(kinds) <= set(sources.BY)
        assert inspect.signature(source.read).parameters["by"].default in (
            kinds[0], inspect.Parameter.empty
        )


# ---------------- which folders

@pytest.mark.parametrize("name", BY_NAME)
def test_a_source_recognises_its_own_folders_only(name, tmp_path, shop):
    source = BY_NAME[name]
    for other in WITH_FILES:
        assert bool(source.recognises(example_in(tmp_path / other, other))) == (name == other)
    (tmp_path / "empty").mkdir()
    assert not source.recognises(tmp_path / "empty")
    assert not source.recognises(tmp_path / "nowhere")
    assert not source.recognises(prepare(shop, tmp_path / "data"))    # a processed folder


@pytest.mark.parametrize("name", WITH_NAME)
def test_files_put_by_hand_are_kept_and_nobody_is_asked(name, tmp_path, monkeypatch):
    def asked(*args, **options):
        pytest.fail("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(socket, "create_connection", asked)
    example = EXAMPLES[name]
    raw = example_in(tmp_path / "raw" / example.name, name)
    before = content_of(raw)
    folder = BY_NAME[name].fetch(example.name, raw, None)
    assert content_of(raw) == before
    assert len(BY_NAME[name].read(folder, example.name).users) > 1
    assert read_json(prepare(example.name, tmp_path) / "source.json")["source"] == name


# ---------------- what is read

@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_read_is_whole_and_clean(name, tmp_path):
    folder = example_in(tmp_path / "shop", name)
    before = content_of(folder)
    raw = BY_NAME[name].read(folder, EXAMPLES[name].name)
    assert content_of(folder) == before
    for keys in filter(None, (raw.users, raw.items, raw.variants)):
        assert isinstance(keys, Keys) and len(keys) == len(raw.users) > 1
        assert set(keys) == keys.names.keys()    # no key is there without a line
    for column in (raw.times, raw.parts):
        assert column is None or isinstance(column, np.ndarray) and len(column) == len(raw.users)
    for key in {*raw.users, *raw.items, *raw.catalog}:
        assert isinstance(key, str)
        assert key and key.split("\n") == [key.strip()]
    assert np.isfinite(raw.times).all()
    assert min(raw.times) >= 0
    assert raw.clock in ("seconds", "day", "order")
    for row in raw.catalog.values():
        assert row.keys() == {"title", "text", "language", "images"}
        for text in (row["title"], *row["text"]):
            assert text == clean_text(text)
        assert "" not in row["text"]
        for image in row["images"]:
            assert "://" in image or not os.path.isabs(image)
    assert raw.item_order is None or set(raw.item_order) >= {*raw.items, *raw.catalog}
    assert raw.user_order is None or set(raw.user_order) >= set(raw.users)
    assert raw.published.keys() in (set(), {"users", "items", "interactions", "source"})
    json.dumps(raw.report, allow_nan=False)


# of unisrec and amazon_m2 each line brings a new key
LONG = [name for name in WITH_FILES if name not in ("unisrec", "amazon_m2")]


@pytest.mark.parametrize("name", LONG)
def test_a_further_line_takes_a_few_bytes(name, tmp_path):
    """Which is what lets tens of millions of lines fit into the memory."""
    file, text = next(iter(EXAMPLES[name].files.items()))
    first, *others = text.splitlines()
    held = {}
    for times in (20, 120):
        folder = example_in(tmp_path / str(times), name)
        write(folder, {file: table(first, *others * times)})
        BY_NAME[name].read(folder, None)    # what is made once is made now
        tracemalloc.start()
        raw = BY_NAME[name].read(folder, None)
        held[len(raw.users)] = np.array(tracemalloc.get_traced_memory())    # now, at the peak
        tracemalloc.stop()
    few, many = held
    assert many - few > 9000
    now, peak = (held[many] - held[few]) / (many - few)
    assert now < 20
    assert peak < 48


@pytest.mark.parametrize("name", WITH_FILES)
def test_a_folder_is_prepared_once(name, tmp_path, capsys):
    folder = example_in(tmp_path / "shop", name)
    out = prepare(folder, tmp_path / "data")
    about = read_json(out / "source.json")
    assert about["source"] == name
    assert about["code"] == sha256(ROOT / "sources" / f"{name}.py")
    assert about["files"].keys() == EXAMPLES[name].files.keys()
    written = content_of(out)
    capsys.readouterr()
    assert prepare(folder, tmp_path / "data") == out
    assert "is up to date" in capsys.readouterr().out
    assert content_of(out) == written


def in_form(data, form):
    """A file as other programs write it."""
    if form == "carriage returns":
        return data.replace(b"\n", b"\r\n")
    if form == "byte order mark":
        return b"\xef\xbb\xbf" + data
    if form == "no last line end":
        return data.rstrip(b"\n")
    return gzip.compress(data, mtime=0)


FORMS = [
    (name, form)
    for name in WITH_FILES
    for form in ("carriage returns", "byte order mark", "no last line end", "compressed")
    if form != "compressed" or EXAMPLES[name].zipped
]


@pytest.mark.parametrize("name, form", FORMS, ids=[f"{name}: {form}" for name, form in FORMS])
def test_other_forms_of_the_files_read_like_plain_ones(name, form, tmp_path):
    example = EXAMPLES[name]
    end = ".gz" if form == "compressed" else ""
    files = {
        f"{file}{end}": in_form(text.encode(), form) for file, text in example.files.items()
    }
    plain = BY_NAME[name].read(example_in(tmp_path / "plain", name), None)
    folder = write(tmp_path / "other", files)
    assert BY_NAME[name].recognises(folder)
    other = BY_NAME[name].read(folder, None)
    for column in ("users", "items", "times"):
        assert [*getattr(other, column)] == [*getattr(plain, column)]
    for part in ("catalog", "clock", "item_order", "user_order"):
        assert getattr(other, part) == getattr(plain, part)


@pytest.mark.slow
def test_what_is_read_does_not_depend_on_the_hash_seed(tmp_path):
    """Of the demo that is checked by a digest, in its own tests."""
    folders = {name: str(example_in(tmp_path / name, name)) for name in WITH_FILES}
    code = (
        "import importlib, pathlib\n"
        "from common.tables import Keys\n"
        f"for name, folder in {folders}.items():\n"
        "    source = importlib.import_module(f'sources.{name}')\n"
        "    for by in [{'by': by} for by in getattr(source, 'BY', ())] or [{}]:\n"
        "        raw = source.read(pathlib.Path(folder), None, **by)\n"
        "        for column, value in vars(raw).items():\n"
        "            print(column, [*value] if isinstance(value, Keys) else value)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in "12"
    ]
    first, second = (process.communicate(timeout=60)[0] for process in processes)
    assert first.count(b"users [") == len(WITH_FILES) + 1    # of hm both kinds of item
    assert first == second


# ---------------- what cannot be read

def refusal(call, *args):
    """The message of a UserError, which is one line."""
    with pytest.raises(UserError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


TABLES = [(name, file) for name, example in EXAMPLES.items() for file in example.bad]


@pytest.mark.parametrize("name, file", TABLES, ids=[f"{name}: {file}" for name, file in TABLES])
def test_one_bad_line_in_a_hundred_is_counted_and_more_are_refused(name, file, tmp_path):
    example = EXAMPLES[name]
    folder = example_in(tmp_path, name)
    whole = BY_NAME[name].read(folder, None)
    spoiled = with_line(example.files[file], example.bad[file])
    write(folder, {file: spoiled})
    if example.strict:
        assert file in refusal(BY_NAME[name].read, folder, None)
        return
    raw = BY_NAME[name].read(folder, None)
    counts = raw.report[file]
    assert counts["lines"] == 100
    assert list(counts["bad_lines"].values()) == [1]
    assert counts["first_bad_line"] == 3
    assert [*raw.items] == [*whole.items]
    assert len(set(raw.users)) == len(set(whole.users))
    good = spoiled.splitlines()[3]
    write(folder, {file: spoiled.replace(f"{good}\n", "")})    # 1 of 99
    message = refusal(BY_NAME[name].read, folder, None)
    assert f"{folder / file}: 1 of 99 lines cannot be used" in message
    assert "the first is line 3" in message


JUNK = {
    "empty": b"",
    "a web page": HTML,
    "a long web page": HTML * 1000,
    "bytes": bytes(range(256)) * 40,
    "zeros": b"\0" * 1000,
    "one long line": b"x" * 200_000,
    "an open quote": b'"',
    "an open bracket": b"[" * 100_000,
}


@pytest.mark.parametrize("name", WITH_FILES)
@pytest.mark.parametrize("junk", JUNK)
def test_whatever_lies_in_a_file_is_read_or_refused_in_a_sentence(name, junk, tmp_path):
    root = tmp_path / "data"
    for number, file in enumerate(EXAMPLES[name].files):
        folder = example_in(tmp_path / str(number), name)
        write(folder, {file: JUNK[junk]})
        if junk == "empty" and number > 0:    # it may be that just nothing is known of the items
            with contextlib.suppress(UserError):
                prepare(folder, root)
        else:
            refusal(prepare, folder, root)
            assert not (root / str(number)).exists()
    assert not list(root.glob(".*"))    # nothing half made is left


ZIPPED = [
    (name, file)
    for name, example in EXAMPLES.items() if example.zipped for file in example.files
]


@pytest.mark.parametrize("name, file", ZIPPED, ids=[f"{name}: {file}" for name, file in ZIPPED])
def test_compressed_files_that_are_cut_or_damaged_are_named(name, file, tmp_path):
    folder = example_in(tmp_path, name)
    (folder / file).unlink()
    whole = gzip.compress(EXAMPLES[name].files[file].encode(), mtime=0)
    for damaged in (
        whole[:-30],
        whole[:-8] + b"\0\0\0\0" + whole[-4:],    # the CRC
        whole[:60] + b"\0" * 60 + whole[120:],
        b"no gzip",
    ):
        write(folder, {f"{file}.gz": damaged})
        assert f"{folder / file}.gz " in refusal(BY_NAME[name].read, folder, None)
