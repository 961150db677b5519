"""Damaged input by the thousand: every file that a script reads, changed at random.

    python tests/fuzz.py                          20,000 inputs; docs/safety.md has a result
    python tests/fuzz.py --inputs 200             a short look, a part of the ordinary tests
    python tests/fuzz.py --only weights --show    one kind, and what was said of each input
    python tests/fuzz.py --number 1234            one input again

Small whole files are made first, and the scripts that read them must end well. Then each input is a
copy of their folder in which one file is damaged (see `damaged`), and the scripts are called as on
the command line, in a process of their own with bounded memory and time and without a network.
What can come of it:

    ok          the scripts end well: the damage is harmless, or such input is allowed
    refused     exit code 2 and one sentence
    silent      a file that has a checksum was taken, although its numbers have changed
    traceback, hang, memory, died

The last five must not occur: the exit code is 1 if one does.
"""
import argparse
import contextlib
import csv
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).parent))
sys.path.insert(2, str(Path(__file__).parent / "common"))
sys.path.insert(3, str(Path(__file__).parent / "sources"))

import numpy as np
import safetensors.numpy
import torch
from PIL import Image

import data
import evaluate
import extract_features
import recommend
import train
from common.encoders import Pixels
from common.files import command

SECONDS = 20            # for one input
MEMORY = 1 << 30        # bytes that one input may ask for, beyond what the process has
BATCH = 20              # inputs of one process
BAD = ("silent", "traceback", "hang", "memory", "died")
OUTCOMES = ("ok", "refused", *BAD)


# ---------------- what is damaged

@dataclass
class Case:
    """A file of a folder, and the command lines that read it."""
    kind: str
    folder: Path
    file: str
    commands: list
    sealed: bool = False    # whether its numbers are known by a checksum, or must not change
    weight: float = 1.0     # how often it is drawn, against the other files of its kind


@dataclass
class Input:
    """One damaged file."""
    number: int
    case: Case
    how: str = ""
    link: str = ""
    content: bytes = b""

    def __str__(self):
        return f"{self.number:>6} {self.case.kind}: {self.case.folder.name}/{self.case.file}"


SHARES = {    # kind -> how many of a hundred inputs
    "sources": 36,
    "own data": 14,
    "processed folder": 9,
    "features": 6,
    "given vectors": 5,
    "weights": 6,
    "a run's json": 6,
    "caches": 4,
    "pictures": 8,
    "--items": 4,
    "encoders": 2,
}


def drawn(seed, number, cases) -> Input:
    """The input of a number: the same one always."""
    rng = random.Random(f"{seed} {number}")
    by_kind = defaultdict(list)
    for case in cases:
        by_kind[case.kind].append(case)
    kinds = [kind for kind in SHARES if kind in by_kind]
    kind, = rng.choices(kinds, [SHARES[kind] for kind in kinds])
    case, = rng.choices(by_kind[kind], [case.weight for case in by_kind[kind]])
    made = Input(number, case)
    if rng.random() < .03:
        made.how = "a link"
        made.link = rng.choice(["nowhere", ".", "/dev/null", "/dev/zero", Path(case.file).name])
        return made
    content = (case.folder / case.file).read_bytes()
    others = [other for other in cases if other.folder == case.folder]
    how = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name, content = damaged(content, case.file, rng, others)
        how.append(name)
    made.how = ", ".join(how)
    made.content = content
    return made


# ---------------- damage to bytes

def flipped(data, rng, _):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def part(data, rng):
    """A slice of some bytes."""
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + rng.choice([1, 2, 8, 100, 1000]))


def cut(data, rng, _):
    return data[:rng.randrange(len(data) + 1)]


def dropped(data, rng, _):
    begin, end = part(data, rng)
    return data[:begin] + data[end:]


def doubled(data, rng, _):
    begin, end = part(data, rng)
    return data[:end] + data[begin:]


def overwritten(data, rng, _):
    begin, end = part(data, rng)
    return data[:begin] + rng.randbytes(end - begin) + data[end:]


def zeros(data, rng, _):
    begin, end = part(data, rng)
    return data[:begin] + bytes(rng.choice([1, 4, 1000])) + data[end:]


def empty(data, rng, _):
    return rng.choice([b"", b"\n", b" ", b"\xef\xbb\xbf"])


def of_another_file(data, rng, others):
    other = rng.choice(others)
    return (other.folder / other.file).read_bytes()


def with_a_tail(data, rng, others):
    return data + rng.choice([b"\0", b"{}", b"\n\n", data, of_another_file(data, rng, others)])


def web_page(data, rng, _):
    return b"<!DOCTYPE html><html><body>404 not found</body></html>" * rng.choice([1, 100])


def compressed(data, rng, _):
    return gzip.compress(data)


BYTES = [
    flipped, cut, dropped, doubled, overwritten, zeros, empty, of_another_file, with_a_tail,
    web_page, compressed,
]


# ---------------- damage to text

WEIRD = [
    "", " ", "nan", "NaN", "inf", "-inf", "1e400", "-1", "0", "1.5", "9" * 30, "9" * 5000, "0x10",
    "1e308", str(2 ** 63), str(-2 ** 63), "2019-13-45", "0001-01-01", "9999-12-31T23:59:59",
    "01/02/2020", "True", "None", "null", "\ud800", "\0", "\u0663", "\u2028", "a\rb", '"', '""',
    "'", "[" * 3000, "[]", "{}", "x" * 100_000, "../../x", "/etc/passwd", "C:\\x", "http://[",
    "http://127.0.0.1/x", "file:///etc/passwd", "$(x)", "%s", "{0}", "é", "日本", "-0", "1_000",
]


def encoded(text) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def lines_of(data):
    return data.split(b"\n")


def lines_dropped(data, rng, _):
    share = rng.choice([.01, .1, .5, .9])
    return b"\n".join(line for line in lines_of(data) if rng.random() > share)


def first_line_dropped(data, rng, _):
    return data.partition(b"\n")[2]


def lines_doubled(data, rng, _):
    times = rng.choice([2, 2, 50])
    lines = [[line] * (times if rng.random() < .1 else 1) for line in lines_of(data)]
    return b"\n".join(sum(lines, []))


def lines_shuffled(data, rng, _):
    lines = lines_of(data)
    rng.shuffle(lines)
    return b"\n".join(lines)


def separator_of(data) -> bytes:
    first = data.partition(b"\n")[0]
    return max((b",", b"\t", b"::", b";", b" "), key=first.count)


def columns_swapped(data, rng, _):
    separator = separator_of(data)
    rows = [line.split(separator) for line in lines_of(data)]
    order = list(range(max(map(len, rows))))
    rng.shuffle(order)
    return b"\n".join(separator.join(row[i] for i in order if i < len(row)) for row in rows)


def columns_dropped(data, rng, _):
    separator = separator_of(data)
    rows = [line.split(separator) for line in lines_of(data)]
    place = rng.randrange(len(rows[0]))
    return b"\n".join(separator.join(row[:place] + row[place + 1:]) for row in rows)


def separators_changed(data, rng, _):
    return data.replace(separator_of(data), rng.choice([b",", b"\t", b";", b"|", b" ", b"\x01"]))


def cells_changed(data, rng, _):
    """One cell, or a column of each line, has another value."""
    separator = separator_of(data)
    value = encoded(rng.choice(WEIRD))
    lines = lines_of(data)
    chosen = [rng.randrange(len(lines))] if rng.random() < .6 else range(len(lines))
    place = rng.randrange(8)
    for number in chosen:
        cells = lines[number].split(separator)
        cells[place % len(cells)] = value
        lines[number] = separator.join(cells)
    return b"\n".join(lines)


def numbers_changed(data, rng, _):
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not numbers:
        return data
    found = rng.choice(numbers)
    return data[:found.start()] + encoded(rng.choice(WEIRD)) + data[found.end():]


def in_another_encoding(data, rng, _):
    text = data.decode("utf-8", "replace")
    how = rng.choice(["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "cp500", "utf-7"])
    return text.encode(how, "replace")


def other_line_ends(data, rng, _):
    return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\0", "\u2028".encode()]))


TEXT = [
    lines_dropped, first_line_dropped, lines_doubled, lines_shuffled, columns_swapped,
    columns_dropped, separators_changed, cells_changed, cells_changed, cells_changed,
    numbers_changed, numbers_changed, in_another_encoding, other_line_ends,
]


# ---------------- damage to what a file says

VALUES = [
    None, True, False, -1, 0, 1, 2, .5, 10 ** 30, 2 ** 63, -2 ** 31, 1e308, float("nan"),
    float("inf"), [], {}, [[]], [None], {"a": {"b": 1}}, "deep", *WEIRD,
]


def json_changed(data, rng, _):
    """A value of a JSON text, or of one of its lines, is another, is gone, or is deeply nested."""
    lines = lines_of(data) if data.count(b"\n{") else [data]
    number = rng.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        return data
    holder = {"": value}
    places = list(places_in(holder))
    inside, key = rng.choice(places)
    if rng.random() < .15:
        del inside[key]
    elif rng.random() < .1 and isinstance(inside, dict):
        inside[rng.choice(WEIRD)] = inside.pop(key)
    else:
        inside[key] = rng.choice(VALUES)
    text = json.dumps(holder.get("", {}))
    deep = "[" * 100_000 + "]" * 100_000
    lines[number] = text.replace('"deep"', deep).encode()
    return b"\n".join(lines)


def places_in(value):
    """Yield (the dict or list, the key) of every value inside."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places_in(value[key])


def header_changed(data, rng, others):
    """The header of a .safetensors file says something else."""
    length = int.from_bytes(data[:8], "little")
    header = json_changed(data[8:8 + length], rng, others)
    if rng.random() < .1:
        return rng.choice([0, 10 ** 9, 2 ** 63]).to_bytes(8, "little") + data[8:]
    return len(header).to_bytes(8, "little") + header + data[8 + length:]


def tensors_changed(data, rng, _):
    """The numbers of a .safetensors file are others; its header fits them."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            with safetensors.safe_open(file.name, "np") as opened:
                about = opened.metadata()
                arrays = {name: opened.get_tensor(name) for name in opened.offset_keys()}
    except Exception:    # damaged before
        return data
    if not arrays:
        return data
    name = rng.choice(sorted(arrays))
    array = array_changed(arrays.pop(name), rng)
    if rng.random() < .8 and array.dtype.kind in "fiub" and array.dtype.itemsize <= 8:
        arrays[rng.choice([name, name, name, "x"])] = array
    return safetensors.numpy.save(arrays, about)


def array_changed(array, rng):
    """Another type or shape, or numbers that are not finite."""
    array = np.array(array)
    how = rng.randrange(6)
    if how == 0:
        return array.astype(rng.choice(["f2", "f8", "i1", "i8", "u1", "c16", "?"]))
    if how == 1:
        return array[..., None]
    if how == 2:
        return array.reshape(-1)
    if how == 3 and array.size:
        return array[:-1] if array.ndim else array
    if how == 4 and array.ndim:
        return array[:0]
    if array.size and array.dtype.kind in "fiu":
        worst = [np.nan, np.inf, -1e30] if array.dtype.kind == "f" else [-1, 100, 0]
        with np.errstate(over="ignore"):
            value = np.array(rng.choice(worst)).astype(array.dtype)
        array.reshape(-1)[rng.randrange(array.size)] = value
    return array


def npy_changed(data, rng, _):
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        array = array_changed(array, rng)
    except Exception:    # damaged before
        return data
    if rng.random() < .1:
        array = np.array([{"a": 1}, None], object)
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header_changed(data, rng, _):
    """The header of a .npy file says something else in as many bytes."""
    end = data.find(b"\n") + 1
    values = [b"0", b"-1", b"1e9", b"10000000000", b"None", b"()", b"'O'", b"'<U9999'", b"__x__"]
    found = rng.choice(list(re.finditer(rb"\d+|'[^']*'|True|False|\(|\)", data[10:end])) or [None])
    if found is None:
        return data
    value = rng.choice(values)
    header = data[10:end][:found.start()] + value + data[10:end][found.end():]
    header = header.rstrip().ljust(end - 11) + b"\n"
    return data[:8] + len(header).to_bytes(2, "little") + header + data[end:]


def npz_changed(data, rng, others):
    """One array of an .npz file is damaged or gone."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = {name: file.read(name) for name in file.namelist()}
    except Exception:    # damaged before
        return data
    if not members:
        return data
    name = rng.choice(sorted(members))
    how = rng.choice([npy_changed, npy_changed, npy_header_changed, flipped, cut, None])
    if how is None:
        members[rng.choice(["x.npy", "../x.npy", "items"])] = members.pop(name)
    else:
        members[name] = how(members[name], rng, others)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


OF_KIND = {
    ".json": [json_changed] * 12,
    ".jsonl": [json_changed] * 10,
    ".safetensors": [header_changed, tensors_changed] * 4,
    ".npy": [npy_changed, npy_header_changed] * 4,
    ".npz": [npz_changed] * 8,
}
BINARY = (".safetensors", ".npy", ".npz", ".png", ".jpg", ".gif", ".webp", ".bmp", ".feat1CLS")


def damaged(data, file, rng, others):
    """(the name of what was done, the new bytes)"""
    suffix = Path(file).suffix
    kinds = list(BYTES)
    if suffix not in BINARY:
        kinds += TEXT
    kinds += OF_KIND.get(suffix, [])
    kind = rng.choice(kinds)
    return kind.__name__, kind(data, rng, others)


# ---------------- small whole files

USERS, ITEMS = 24, 12
TITLES = ["red mug", "blue lamp", "grün & weich", "a hammer", "茶"]
SMALL = [
    "--dim", "8", "--heads", "2", "--layers", "1", "--max_len", "8", "--batch_size", "64",
]


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def picture(format, seed=0, animated=False):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in pixels]
    file = io.BytesIO()
    more = dict(save_all=True, append_images=frames[1:]) if animated else {}
    frames[0].save(file, format, **more)
    return file.getvalue()


def own_interactions(date=str, separator=",", begin=0):
    rows = ["user,item,time,rating"]
    for user in range(USERS):
        for step in range(5):
            item = (user + step * (user % 3 + 1)) % ITEMS
            rows.append(f"u{user},i{item},{date(1_500_000_000 + begin + user * 1000 + step)},5")
    return "\n".join(rows).replace(",", separator) + "\n"


def as_date(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds * 3600 % 1_600_000_000))


def own_items(first=0):
    rows = []
    for i in range(first, first + ITEMS - 1):
        rows.append(json.dumps({
            "item": f"i{i}", "title": TITLES[i % len(TITLES)], "text": [f"number {i}.", "It is."],
            "language": "en", "images": ["p/0.png", "https://example.org/x.jpg"][:i % 3],
            "price": i,
        }))
    return "\n".join(rows) + "\n"


def own_items_table():
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["id", "title", "genres", "image"])
    for i in range(ITEMS):
        writer.writerow([f"i{i}", TITLES[i % len(TITLES)], "['a', 'b']", "p/0.png|p/1.png"])
    return rows.getvalue()


def script(name, *words):
    return [f"{name}.py", *words]


def end_well(folder, *commands):
    """Run what must go well."""
    for words in commands:
        code, out, error = called(folder, words)
        if code != 0:
            raise SystemExit(f"{folder}: {words} does not end well:\n{out}\n{error}")


def cases_in(folder, only=()) -> list:
    """Make the small whole files -> every Case."""
    makers = (of_sources, of_own_data, of_processed, of_vectors, of_runs, of_caches, of_pictures,
              of_encoders)
    cases = []
    for maker in makers:
        if only and not set(only) & set(maker.kinds):
            continue
        cases += maker(folder)
    cases = [case for case in cases if not only or case.kind in only]
    for number, place in enumerate(sorted({case.folder for case in cases})):
        commands = {tuple(words): words for case in cases if case.folder == place
                    for words in case.commands}
        copy = folder / f"whole-{number}"
        for words in commands.values():
            shutil.copytree(place, copy)
            end_well(copy, words)
            shutil.rmtree(copy)
    return cases


def makes(*kinds):
    def mark(maker):
        maker.kinds = kinds
        return maker
    return mark


@makes("sources")
def of_sources(folder):
    from test_contract import EXAMPLES
    cases = []
    for name, example in EXAMPLES.items():
        if not example.files or name == "folder":
            continue
        files = dict(example.files)
        if name == "mmrec":
            file = io.BytesIO()
            np.save(file, np.ones((99, 3), np.float32))
            files |= {"text_feat.npy": file.getvalue(), "image_feat.npy": file.getvalue()}
        if name == "unisrec":
            files |= {"X.feat1CLS": np.ones((4, 3), np.float32).tobytes()}
        place = folder / f"source-{name}"
        if name == "mmrec":    # without features, too
            plain = folder / "source-mmrec-plain"
            write(plain / "shop", example.files)
            cases.append(Case("sources", plain, "shop/X.inter", [script("data", "shop")]))
        write(place / "shop", files)
        commands = [script("data", "shop")]
        cases += [Case("sources", place, f"shop/{file}", commands) for file in files]
        if example.name:
            named = folder / f"named-{name}"
            write(named / "data" / "raw" / example.name, example.files)
            commands = [script("data", example.name)]
            cases += [
                Case("sources", named, f"data/raw/{example.name}/{file}", commands, weight=.5)
                for file in example.files
            ]
    return cases


PICTURES = {"p/0.png": picture("PNG"), "p/1.png": picture("JPEG", 1)}


@makes("own data")
def of_own_data(folder):
    table = own_interactions()
    lines = table.splitlines()
    shops = {
        "seconds": ({"interactions.csv": table, "items.jsonl": own_items()}, []),
        "dates": ({"interactions.tsv": own_interactions(as_date, "\t"),
                   "items.csv": own_items_table()}, ["--split", "temporal"]),
        "parts": ({f"{name}.csv": "\n".join([lines[0], *lines[1 + n::3]])
                   for n, name in enumerate(("train", "valid", "test"))},
                  ["--split", "files"]),
        "zipped": ({"interactions.csv.gz": gzip.compress(table.encode()),
                    "items.jsonl.gz": gzip.compress(own_items().encode())}, ["--core", "2"]),
    }
    cases = []
    for name, (files, flags) in shops.items():
        place = folder / f"own-{name}"
        write(place / "shop", files | PICTURES)
        commands = [script("data", "shop", *flags)]
        cases += [Case("own data", place, f"shop/{file}", commands) for file in files]
    return cases


def processed_shop(place):
    """A processed folder, data/shop, with features."""
    write(place / "shop", {"interactions.csv": own_interactions(), "items.jsonl": own_items()}
          | PICTURES)
    end_well(place, script("extract_features", "--data", "shop", *BUILT_IN))


BUILT_IN = ["--text", "hash", "--image", "pixels"]


@makes("processed folder", "features")
def of_processed(folder):
    place = folder / "processed"
    processed_shop(place)
    here = script("extract_features", "--data", "data/shop", *BUILT_IN)
    by_run = script("train", "--model", "cosine", "--data", "data/shop", *BUILT_IN)
    from_raw = script("data", "shop")
    cases = [
        Case("processed folder", place, "data/shop/sequences.npz", [here], sealed=True),
        Case("processed folder", place, "data/shop/items.jsonl", [here]),
        Case("processed folder", place, "data/shop/source.json", [here]),
        Case("processed folder", place, "data/shop/source.json", [from_raw]),
    ]
    for modality in ("text-hash", "image-pixels"):
        file = f"data/shop/features/{modality}"
        cases.append(Case("features", place, f"{file}.safetensors", [by_run], sealed=True))
        cases.append(Case("features", place, f"{file}.json", [here], weight=.5))
    return cases


@makes("given vectors")
def of_vectors(folder):
    place = folder / "vectors"
    processed_shop(place)
    rows = np.random.default_rng(0).normal(size=(ITEMS, 4)).astype(np.float32)
    keys = [f"i{i}" for i in range(ITEMS)]
    fields = np.zeros(ITEMS, [("key", "S4"), ("vector", "f4", 4)])
    fields["key"] = keys
    fields["vector"] = rows
    arrays = {
        "plain.npy": rows,
        "beside.npy": rows,
        "fields.npy": fields,
    }
    for name, array in arrays.items():
        np.save(place / name, array)
    named = {
        "one.safetensors": {"vectors": rows},
        "many.safetensors": dict(zip(keys, rows)),
    }
    for name, tensors in named.items():
        safetensors.numpy.save_file(tensors, place / name)
    (place / "beside.ids.txt").write_text("\n".join(keys) + "\n")
    cases = []
    for file in (*arrays, *named):
        read = script("extract_features", "--data", "data/shop", "--text", file,
                      "--image", "pixels")
        cases.append(Case("given vectors", place, file, [read]))
        if file == "beside.npy":
            cases.append(Case("given vectors", place, "beside.ids.txt", [read]))
    return cases


@makes("weights", "a run's json", "--items", "processed folder")
def of_runs(folder):
    place = folder / "runs"
    processed_shop(place)
    flags = ["--data", "data/shop", *SMALL, *BUILT_IN]
    sasrec = script("train", "--model", "sasrec", *flags[:2], *SMALL, "--epochs")
    pretrained = script("train", "--model", "msm4sr", *flags, "--use_id", "false", "--epochs", "1",
                        "--pretrain_epochs", "1")
    end_well(place, [*sasrec, "1"], script("train", "--model", "pop", *flags[:2]), pretrained)
    run = "runs/sasrec-shop-0"
    other = "runs/msm4sr-shop-0"
    write(place, {"new.jsonl": own_items(100), "new.csv": own_items_table().replace("\ni", "\nj")})
    user = script("recommend", run, "--user", "u1")
    here = ["--data", "data/shop"]    # of the copy, not where it was in training
    everybody = script("recommend", run, "--all", "--out", "top.csv", *here)
    table = script("evaluate", "runs/pop-shop-0", run)
    page = script("evaluate", "runs/pop-shop-0", "--against", run)
    again = script("evaluate", run, *here)
    longer = [*sasrec, "2", "--resume"]
    taken_over = [*pretrained, "--init", other, "--out", "again"]
    cases = [
        Case("weights", place, f"{run}/model.safetensors", [user], sealed=True, weight=2),
        Case("weights", place, f"{run}/state.safetensors", [longer], sealed=True),
        Case("weights", place, f"{other}/pretrain.safetensors", [taken_over], sealed=True),
        Case("a run's json", place, f"{run}/config.json", [user]),
        Case("a run's json", place, f"{run}/config.json", [table]),
        Case("a run's json", place, f"{run}/config.json", [longer]),
        Case("a run's json", place, f"{other}/config.json", [taken_over], weight=.5),
        Case("a run's json", place, f"{run}/metrics.json", [table]),
        Case("a run's json", place, f"{run}/metrics.json", [page], weight=.3),
        Case("a run's json", place, f"{run}/metrics.json", [[*sasrec, "1", "--resume"]]),
        Case("a run's json", place, f"{run}/log.jsonl", [longer]),
        Case("a run's json", place, f"{run}/ranks-test.npy", [table]),
        Case("processed folder", place, "data/shop/users.txt", [everybody], weight=.5),
        Case("processed folder", place, "data/shop/sequences.npz", [again], sealed=True, weight=.3),
    ]
    for file in ("new.jsonl", "new.csv"):
        read = script("recommend", other, "--history", "i1,i2", "--items", file)
        cases.append(Case("--items", place, file, [read]))
    return cases


@makes("caches")
def of_caches(folder):
    """Parts of features, what is known of addresses, MMSR's frozen states, the demo's oracle."""
    place = folder / "caches"
    processed_shop(place)
    url = "https://example.org/x.jpg"
    row = {"url": url, "item": "i2", "status": "ok", "file": "a.png", "bytes": 1, "sha256": "0"}
    pictures = "data/raw/shop/pictures"
    write(place, {f"{pictures}/manifest.jsonl": json.dumps(row) + "\n",
                  f"{pictures}/a.png": picture("PNG", 2)})
    mmsr = script("train", "--model", "mmsr", "--data", "data/shop", "--text_encoder", "tiny",
                  "--image_encoder", "tiny", "--dim", "16", "--epochs", "1", "--max_len", "4",
                  "--batch_size", "64", "--tune_blocks", "1")
    end_well(place, mmsr)
    again = [*mmsr, "--seed", "1"]
    cases = [
        Case("caches", place, f"data/cache/{path.name}", [again], weight=.3)
        for path in sorted((place / "data" / "cache").glob("*.npy"))
    ]
    read = script("extract_features", "--data", "data/shop", *BUILT_IN)
    cases.append(Case("caches", place, f"{pictures}/manifest.jsonl", [read], weight=3))
    cases.append(Case("caches", place, f"{pictures}/a.png", [read]))

    parts = folder / "parts"
    shutil.copytree(place, parts)
    unfinished(parts, read)
    for file in ("about.json", "0.safetensors"):
        sealed = file != "about.json"
        file = f"data/shop/features/text-hash.parts/{file}"
        cases.append(Case("caches", parts, file, [read], sealed=sealed, weight=2))
    return cases


def unfinished(place, words):
    """Leave the parts of the text features, as a killed run does."""
    features = place / "data" / "shop" / "features"
    (features / "text-hash.safetensors").unlink()
    kept = extract_features.shutil.rmtree
    extract_features.shutil.rmtree = lambda *args, **options: None
    end_well(place, words)
    extract_features.shutil.rmtree = kept
    (features / "text-hash.safetensors").unlink()


@makes("pictures")
def of_pictures(folder):
    place = folder / "pictures"
    kinds = {
        "x.png": picture("PNG"), "x.jpg": picture("JPEG"), "x.gif": picture("GIF", animated=True),
        "x.webp": picture("WEBP"), "y.webp": picture("WEBP", animated=True),
        "x.bmp": picture("BMP"), "y.png": picture("PNG", animated=True),
    }
    write(place, kinds)
    return [Case("pictures", place, file, [["pictures", file]]) for file in kinds]


@makes("encoders")
def of_encoders(folder):
    """A text model and a vision model of Hugging Face, and Sentence-BERT's files."""
    from test_encoders import save_text_model, save_vision_model
    place = folder / "encoders"
    processed_shop(place)
    save_text_model(place / "words", {"pooling_mode": "mean"})
    save_vision_model(place / "eyes", "vit")
    read = {
        "words": script("extract_features", "--data", "data/shop", "--text", "words",
                        "--image", "pixels"),
        "eyes": script("extract_features", "--data", "data/shop", "--text", "hash",
                       "--image", "eyes"),
    }
    return [
        Case("encoders", place, str(path.relative_to(place)), [words])
        for name, words in read.items()
        for path in sorted((place / name).rglob("*")) if path.is_file()
    ]


# ---------------- calling the scripts

MAINS = {
    "data.py": data.main,
    "extract_features.py": extract_features.main,
    "train.py": train.main,
    "evaluate.py": evaluate.main,
    "recommend.py": recommend.main,
}


def look_at_picture():
    """The picture encoder on one file: it must give a row, and a reason if the row is zero."""
    rows, failures, _ = Pixels().encode([sys.argv[1]])
    if rows.shape != (1, 128) or not np.isfinite(rows).all():
        raise AssertionError(f"{rows.shape} {failures}")


def called(folder, words):
    """(exit code, what was printed, what was said on stderr) of a command line, in a folder."""
    out, error = io.StringIO(), io.StringIO()
    before = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = list(words)
    code = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                command(MAINS.get(words[0], look_at_picture))
            except SystemExit as end:
                code = end.code
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    return code, out.getvalue(), error.getvalue()


class Hang(BaseException):
    """The time of an input is over."""


def over(*_):
    raise Hang


def outcome_of(made, folder) -> tuple:
    """(outcome, what was said) of an input in a copy of its folder."""
    case = made.case
    path = folder / case.file
    path.unlink()
    if made.how == "a link":
        path.symlink_to(made.link)
    else:
        path.write_bytes(made.content)
    said = ""
    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        for words in case.commands:
            code, out, error = called(folder, words)
            said = error.strip()
            if code != 0:
                sentences = [line for line in said.splitlines() if line.startswith("error: ")]
                one = len(sentences) == 1 and said.endswith(sentences[0])
                outcome = "refused" if code == 2 and one else "traceback"
                if "the memory is full" in said:
                    outcome = "memory"
                return outcome, said or f"exit code {code}"
    except Hang:
        return "hang", traceback.format_exc()
    except MemoryError:
        return "memory", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if case.sealed and made.how != "a link" and not same(made, case):
        return "silent", said
    return "ok", said


def same(made, case) -> bool:
    """Whether a damaged file still holds the same arrays."""
    whole, now = (case.folder / case.file).read_bytes(), made.content
    try:
        before, after = arrays_in(whole, case.file), arrays_in(now, case.file)
        return before.keys() == after.keys() and all(
            np.array_equal(before[name], after[name], equal_nan=False) for name in before
        )
    except Exception:    # what read it has made it anew
        return True


def arrays_in(content, file) -> dict:
    if file.endswith(".safetensors"):
        return safetensors.numpy.load(content)
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    return dict(loaded) if file.endswith(".npz") else {"": loaded}


# ---------------- in processes of their own

def without_network():
    def refuse(*_, **__):
        raise OSError("there is no network")

    socket.getaddrinfo = refuse
    socket.socket.connect = refuse


def work(pipe, scratch, inputs):
    """Try inputs one after the other; each outcome goes through the pipe at once."""
    without_network()
    os.fsync = lambda _: None
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for made in inputs:
        folder = Path(scratch, "copy")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made.case.folder, folder, symlinks=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome, said = outcome_of(made, folder)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > MEMORY >> 10 and outcome in ("ok", "refused"):
            outcome, said = "memory", f"{grown} KiB more\n{said}"
        pipe.send((outcome, said))
    pipe.close()


def tried(inputs, scratch):
    """Yield (input, outcome, what was said). A process that dies or hangs costs one input."""
    inputs = list(inputs)
    fork = multiprocessing.get_context("fork")
    while inputs:
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=work, args=(there, scratch, inputs[:BATCH]), daemon=True)
        process.start()
        there.close()
        done = 0
        try:
            for made in inputs[:BATCH]:
                if not here.poll(2 * SECONDS):
                    process.kill()
                    yield made, "hang", "in code that cannot be interrupted"
                    done += 1
                    break
                outcome, said = here.recv()
                yield made, outcome, said
                done += 1
        except EOFError:
            process.join()
            yield inputs[done], "died", f"exit code {process.exitcode}"
            done += 1
        process.join()
        here.close()
        del inputs[:done]


# ---------------- the command

@dataclass
class Counts:
    """How many inputs of each kind had each outcome."""
    table: dict = field(default_factory=lambda: defaultdict(Counter))

    def __str__(self):
        lines = [f"{'':<18}" + "".join(f"{name:>11}" for name in ("inputs", *OUTCOMES))]
        for kind, counts in [*self.table.items(), ("all", sum(self.table.values(), Counter()))]:
            numbers = [counts.total(), *(counts[name] for name in OUTCOMES)]
            lines.append(f"{kind:<18}" + "".join(f"{number:>11}" for number in numbers))
        return "\n".join(lines)

    @property
    def bad(self):
        return sum(counts[name] for counts in self.table.values() for name in BAD)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=SHARES, help="kinds; default: all")
    parser.add_argument("--number", type=int, help="try this input alone")
    parser.add_argument("--show", action="store_true", help="print what was said of each input")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_in(Path(folder), args.only or ())
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        numbers = range(args.inputs) if args.number is None else [args.number]
        for first in range(0, len(numbers), 1000):
            inputs = [drawn(args.seed, n, cases) for n in numbers[first:first + 1000]]
            for made, outcome, said in tried(inputs, scratch):
                counts.table[made.case.kind][outcome] += 1
                if outcome in BAD or args.show or args.number is not None:
                    print(f"{made} ({made.how}): {outcome}\n{said}\n", flush=True)
            if len(numbers) > 1000:
                print(f"{first + len(inputs)} inputs, {counts.bad} of them bad", flush=True)
    print(counts)
    print(f"{len(numbers)} inputs, seed {args.seed}, {time.perf_counter() - begin:.0f} s")
    return 1 if counts.bad else 0


if __name__ == "__main__":
    sys.exit(main())
