"""sources/__init__.py: what is prepared, when it is prepared again, and what is written."""
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file

import sources
from common.features import write_features
from common.files import UserError, alone_in, read_json, sha256
from common.tables import Keys, Raw
from helpers import ROOT, write_shop
from sources import k_core, prepare

USED = "is up to date, and is used as it was prepared"
MINE = '''"""Ratings in a table with columns of other names, as somebody may have them."""
import numpy as np

from common.tables import Keys, Raw, each_row

NAMES = ("mine",)


def recognises(folder):
    return (folder / "ratings.csv").is_file()


def fetch(name, raw, mirror):
    if not recognises(raw):
        raw.mkdir(parents=True, exist_ok=True)
        (raw / "ratings.csv").write_text("who,what,when\\nann,tea,3\\nann,cup,2\\nbob,tea,9\\n")
    return raw


def read(folder, name):
    users, items, times = Keys(), Keys(), []

    def take(user, item, time):
        users.add(user)
        items.add(item)
        times.append(int(time))

    counts = each_row(folder / "ratings.csv", ("who", "what", "when"), take)
    return Raw(users, items, np.array(times), {}, report={"ratings.csv": counts})
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Somebody's source beside the project's own -> the path of its code."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    spec = importlib.util.spec_from_file_location("sources.mine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sources, "SOURCES", [*sources.SOURCES, module])
    return path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def write(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "interactions.csv").write_text("\n".join(["user,item,time", *lines, ""]))
    return folder


def raw_of(*events, **options):
    """A Raw of (user, item, time) triples, as plain lists."""
    users, items, times = map(list, zip(*events))
    return Raw(users, items, times, **{"catalog": {}, **options})


def keys_in(folder):
    return [json.loads(line)["key"] for line in open(folder / "items.jsonl", encoding="utf-8")]


# ---------------- filters and order

def test_k_core_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 40, 300), rng.integers(0, 50, 300)
    left = set(range(300))
    while True:
        few = {
            p for p in left
            if sum(users[q] == users[p] for q in left) < 5
            or sum(items[q] == items[p] for q in left) < 5
        }
        if not few:
            break
        left -= few
    assert 0 < len(left) < 300
    assert set(np.flatnonzero(k_core(users, items, 5))) == left
    assert not k_core(users[:3], items[:3], 5).any()
    assert k_core(users, items, 1).all()


def built_slowly(events, catalog, core) -> list:
    """What is left of (user, item, time, variant, part), line by line."""
    left = [event for event in events if event[1] in catalog]
    kinds = {}    # user, variant, time -> the first such event
    for event in left:
        kinds.setdefault((event[0], event[3], event[2]), event)
    left = list(kinds.values())
    while True:
        users = Counter(event[0] for event in left)
        items = Counter(event[1] for event in left)
        kept = [event for event in left if min(users[event[0]], items[event[1]]) >= core]
        if kept == left:
            return sorted(left, key=lambda event: (event[0], event[2]))    # else as the lines stand
        left = kept


@pytest.mark.parametrize("piece", [1, 50, 1 << 17])
def test_what_is_built_equals_a_slow_loop(tmp_path, monkeypatch, histories, piece):
    """Times with many ties, lines that are there twice, and a filter on top."""
    monkeypatch.setattr(sources, "PIECE", piece)
    rng = np.random.default_rng(0)
    lines = (rng.random((1500, 5)) ** 3 * [400, 40, 9, 3, 3]).astype(int).tolist()    # skewed
    events = [(f"u{u}", f"i{i}", t / 2, f"i{i} in {v}", part) for u, i, t, v, part in lines]
    catalog = {f"i{i}": {} for i in range(36)}
    users, items, times, variants, parts = zip(*events)
    raw = Raw(
        Keys(users), Keys(items), np.array(times), catalog, core=5, need_catalog=True,
        variants=Keys(variants), parts=np.array(parts, np.int8), clock="day",
    )
    sources.build(raw, tmp_path / "x", {"name": "x"})
    expected = built_slowly(events, catalog, core=5)
    without_core = built_slowly(events, catalog, core=0)
    described = [event for event in events if event[1] in catalog]
    assert len(expected) + 100 < len(without_core) < len(described) - 20    # each filter drops some
    left = {}
    for user, item, *_ in expected:
        left.setdefault(user, []).append(item)
    assert histories(tmp_path / "x") == left
    with np.load(tmp_path / "x" / "sequences.npz") as arrays:
        assert {name: str(array.dtype) for name, array in arrays.items()} == {
            "items": "int32", "times": "int64", "parts": "int8", "offsets": "int64",
        }
        assert arrays["times"].tolist() == [int(event[2]) for event in expected]
        assert arrays["parts"].tolist() == [event[4] for event in expected]
    steps = read_json(tmp_path / "x" / "source.json")["counts"]
    assert steps[-1] == {
        "step": "5-core", "users": len(left), "items": len({event[1] for event in expected}),
        "interactions": len(expected),
    }


def test_filters_are_counted_in_order(tmp_path, histories):
    raw = raw_of(
        ("u", "a", 5), ("u", "a", 5), ("u", "a", 9), ("u", "b", 7), ("v", "a", 1), ("v", "b", 2),
        ("v", "no words", 3), ("w", "b", 1),
        catalog={"a": {"title": "A"}, "b": {}, "unsold": {}}, need_catalog=True, core=2,
        extra={"oracle": {"x": [1]}},
    )
    out = tmp_path / "x"
    sources.build(raw, out, {"name": "x"})
    counts = read_json(out / "source.json")["counts"]
    assert [tuple(step.values()) for step in counts] == [
        ("read", 3, 3, 8),
        ("items without metadata dropped", 3, 2, 7),
        ("exact duplicates dropped", 3, 2, 6),
        ("2-core", 2, 2, 5),
    ]
    assert histories(out) == {"u": ["a", "b", "a"], "v": ["a", "b"]}    # buying again is kept
    assert keys_in(out) == ["a", "b"]
    # the extra arrays know the items by numbers that they no longer have
    assert not (out / "oracle.npz").exists()
    raw.core = 9
    with pytest.raises(UserError, match="smaller --core"):
        sources.build(raw, tmp_path / "y", {"name": "y"})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_untouched_folder_keeps_its_whole_catalog_and_what_comes_with_it(tmp_path):
    raw = raw_of(
        ("u", "b", 2), ("u", "a", 1), catalog={"unsold": {}, "a": {"title": "A"}},
        extra={"oracle": {"x": np.arange(3)}},
    )
    sources.build(raw, tmp_path / "x", {"name": "x"})
    assert [json.loads(line) for line in open(tmp_path / "x" / "items.jsonl")] == [
        {"key": "a", "title": "A", "text": [], "language": "", "images": []},
        {"key": "b", "title": "", "text": [], "language": "", "images": []},
        {"key": "unsold", "title": "", "text": [], "language": "", "images": []},
    ]
    with np.load(tmp_path / "x" / "oracle.npz") as arrays:
        assert arrays["x"].tolist() == [0, 1, 2]


def test_users_and_items_are_numbered_by_key_or_as_the_source_says(tmp_path):
    events = [("u2", "b", 1), ("u1", "c", 2), ("u1", "a", 3)]
    sources.build(raw_of(*events), tmp_path / "x", {"name": "x"})
    ordered = raw_of(*events, item_order=["c", "b", "a"], user_order=["u2", "u1"])
    sources.build(ordered, tmp_path / "y", {"name": "y"})
    for name, items, users, flat in (
        ("x", ["a", "b", "c"], ["u1", "u2"], [3, 1, 2]),
        ("y", ["c", "b", "a"], ["u2", "u1"], [2, 1, 3]),
    ):
        assert keys_in(tmp_path / name) == items
        assert (tmp_path / name / "users.txt").read_text().split() == users
        with np.load(tmp_path / name / "sequences.npz") as arrays:
            assert arrays["items"].tolist() == flat


def test_a_history_is_ordered_by_time_then_by_line(tmp_path, histories):
    events = [("u", "c", 5.5), ("u", "b", 5.2), ("u", "a", 5.2), ("u", "d", 1)]
    sources.build(raw_of(*events), tmp_path / "x", {"name": "x"})
    assert histories(tmp_path / "x") == {"u": ["d", "b", "a", "c"]}
    with np.load(tmp_path / "x" / "sequences.npz") as arrays:
        assert arrays["times"].tolist() == [1, 5, 5, 5]
        assert arrays["offsets"].tolist() == [0, 4]


@pytest.mark.parametrize("options, left", [
    ({}, 2),                                       # the second of three rows, for all it has
    ({"variants": Keys(["red", "red", "blue"])}, 2),
    ({"variants": Keys(["red", "green", "blue"])}, 3),
    ({"clock": "day"}, 2),
    ({"clock": "order"}, 3),                       # equal numbers say nothing there
], ids=["plain", "same variant", "other variant", "day", "order"])
def test_exact_duplicates(tmp_path, histories, options, left):
    raw = raw_of(("u", "a", 1), ("u", "a", 1), ("u", "a", 2), **options)
    sources.build(raw, tmp_path / "x", {"name": "x"})
    assert len(histories(tmp_path / "x")["u"]) == left


def test_given_features_follow_their_items_through_a_filter(tmp_path):
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    rows[2] = 0    # c has none
    events = [(user, item, time) for user in "uv" for time, item in enumerate("dcb")]
    raw = raw_of(*events, ("u", "a", 9), core=2, item_order=list("abcd"),
                 features={"text": ("Given", rows)})
    sources.build(raw, tmp_path / "x", {"name": "x"})
    assert keys_in(tmp_path / "x") == ["b", "c", "d"]
    saved = load_file(tmp_path / "x" / "features" / "text-given.safetensors")
    assert np.array_equal(saved["vectors"][saved["index"][:, 0]], [[0, 0], *rows[1:]])
    assert saved["index"][:, 0].astype(bool).tolist() == [False, True, False, True]
    assert read_json(tmp_path / "x" / "source.json")["features"] == {"text": "Given"}


def test_a_build_that_breaks_off_leaves_the_old_folder(tmp_path):
    raw = raw_of(("u", "a", 1))
    sources.build(raw, tmp_path / "x", {"name": "x"})
    before = (tmp_path / "x" / "source.json").read_bytes()
    raw.report = {"no json": object()}
    with pytest.raises(TypeError):
        sources.build(raw, tmp_path / "x", {"name": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "source.json").read_bytes() == before


# ---------------- names

@pytest.mark.parametrize("name, folder", [
    ("Own Shop!", "own-shop"), ("raw", "raw-folder"), ("cache", "cache-folder"),
    ("demo", "demo-folder"), ("amazon2018-gift_cards", "amazon2018-gift_cards-folder"),
    ("---", "data"),
])
def test_a_folder_never_takes_a_name_that_is_used_otherwise(tmp_path, root, name, folder):
    assert prepare(write(tmp_path / name, "u,a,1"), root) == root / folder


def test_a_slug_stays_in_its_folder():
    assert sources.slug("../..//etc") == "etc"
    assert sources.slug("???") == "data"
    assert sources.slug("Größe_1-a") == "gr-e_1-a"


@pytest.mark.parametrize("core", [None, 1])
def test_folders_of_one_name_are_prepared_side_by_side(tmp_path, root, core):
    paths = [write(tmp_path / who / "shop", f"u,{who},1") for who in ("x", "y")]
    made = [prepare(path, root, core) for path in paths * 2]
    assert made[:2] == made[2:]
    assert made[0].name == ("shop" if core is None else "shop-core1")
    assert made[1].name.startswith("shop-")
    assert made[0] != made[1]
    assert [keys_in(path) for path in made[:2]] == [["x"], ["y"]]
    assert not list(root.glob("*~*"))


def test_unknown_names_and_folders(tmp_path, root):
    with pytest.raises(UserError, match="neither a folder nor a known data set.*demo, .*hm"):
        prepare("nothing-of-the-sort", root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="interactions.csv"):
        prepare(tmp_path / "empty", root)
    assert not root.exists()


# ---------------- options

def test_core(shop, root):
    whole, core = prepare(shop, root), prepare(shop, root, core=5)
    assert (whole.name, core.name) == ("shop", "shop-core5")
    assert read_json(whole / "source.json")["core"] == 0
    about = read_json(core / "source.json")
    assert about["core"] == 5
    assert about["counts"][-1]["step"] == "5-core"


def test_by(tmp_path, root, shop):
    folder = tmp_path / "sales"
    folder.mkdir()
    table = "t_dat,customer_id,article_id\n2018-09-20,c,0108775015\n"
    (folder / "transactions_train.csv").write_text(table)
    for by, name, key in (
        (None, "sales", "0108775015"), ("article", "sales", "0108775015"),
        ("product", "sales-product", "0108775"),
    ):
        out = prepare(folder, root, by=by)
        assert (out.name, keys_in(out)) == (name, [key])
        assert read_json(out / "source.json")["by"] == (by or "article")
    with pytest.raises(UserError, match="--by colour means nothing .* give article or product"):
        prepare(folder, root, by="colour")
    with pytest.raises(UserError, match="--by article means nothing .* leave it out"):
        prepare(shop, root, by="article")


def test_a_processed_folder_is_taken_as_it_is(shop, root):
    out = prepare(shop, root, core=2)
    shutil.rmtree(shop)
    assert prepare(out) == out
    assert prepare(out, core=2) == out
    for options in ({"core": 7}, {"by": "article"}):
        with pytest.raises(UserError, match="with another --core or --by"):
            prepare(out, **options)
    about = read_json(out / "source.json")
    (out / "source.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(UserError, match="another format"):
        prepare(out)


def test_the_mirror_is_asked(server, root):
    with pytest.raises(UserError, match="could not be downloaded"):
        prepare("pantry", root, mirror=server.base)
    assert server.asked
    assert not (root / "pantry").exists()


# ---------------- what is done already, and what has changed

def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_what_is_done_is_not_done_again_and_says_so(shop, root, capsys):
    out = prepare(shop, root)
    assert lines_of(capsys) == [f"preparing {out} from {shop}"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    stamp = (out / "source.json").stat().st_mtime_ns
    os.utime(shop / "interactions.csv")    # a new time alone is no change
    (shop / "picture.JPG").write_bytes(b"pictures are no tables")
    (shop / ".hidden").write_text("nor is this")
    (shop / "folder").mkdir()
    for _ in range(2):
        assert prepare(shop, root) == out
        assert lines_of(capsys) == [f"{out} {USED}"]
    assert (out / "source.json").stat().st_mtime_ns == stamp


def append(path):
    with open(path, "a") as file:
        file.write("\n")


def swap(path):
    """Other content of the same size."""
    text = path.read_text()
    path.write_text(text.replace("red", "RED", 1))


@pytest.mark.parametrize("change", [
    lambda shop: append(shop / "interactions.csv"),
    lambda shop: swap(shop / "items.jsonl"),
    lambda shop: (shop / "items.jsonl").unlink(),
    lambda shop: (shop / "more.txt").write_text(""),
], ids=["longer", "as long", "gone", "new"])
def test_a_changed_file_is_noticed_and_nothing_is_lost(shop, root, capsys, change):
    out = prepare(shop, root)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    change(shop)
    lines_of(capsys)
    assert prepare(shop, root) == out
    assert lines_of(capsys)[-1] == (
        f"{out}: its raw files have changed; the old folder is now {out}~1"
    )
    aside = root / "shop~1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    change_again = write_shop(shop, seed=9)
    prepare(change_again, root)
    assert sorted(path.name for path in root.iterdir()) == ["shop", "shop~1", "shop~2"]


def test_changed_code_prepares_again_and_features_move_along(mine, root, capsys):
    out = prepare("mine", root)
    assert read_json(out / "source.json")["code"] == sha256(mine)
    keys = ["cup", "tea"]
    for encoder in ("hash", "other"):
        write_features(out, "text", encoder, np.eye(2), np.array([[1], [2]]), keys, {})
    features = {path.name: path.read_bytes() for path in (out / "features").iterdir()}
    assert len(features) == 4
    mine.write_text(MINE + "# another line\n")
    lines_of(capsys)
    prepare("mine", root)
    assert lines_of(capsys)[-1] == (
        f"{out}: the code of sources/mine.py has changed; the old folder is now {out}~1"
    )
    moved = {path.name: path.read_bytes() for path in (out / "features").iterdir()}
    assert moved == features
    assert read_json(out / "source.json")["code"] == sha256(mine)
    prepare("mine", root)
    assert lines_of(capsys) == [f"{out} {USED}"]


def test_features_of_other_items_stay_with_them(shop, root):
    out = prepare(shop, root)
    write_features(out, "text", "hash", np.eye(2), np.array([[1], [2]]), ["a", "b"], {})
    with open(shop / "items.jsonl", "a") as file:
        file.write('{"item": "new"}\n')
    prepare(shop, root)
    assert not (out / "features").exists()
    assert len(list((root / "shop~1" / "features").iterdir())) == 2


def test_features_that_came_with_the_data_are_not_replaced_by_older_ones(tmp_path):
    events = [("u", "a", 1), ("u", "b", 2)]
    for value in (1, 2):
        rows = np.full((2, 3), value, np.float32)
        raw = raw_of(*events, features={"text": ("given", rows)})
        sources.build(raw, tmp_path / "x", {"name": "x"})
    for name, value in (("x", 2), ("x~1", 1)):
        path = tmp_path / name / "features" / "text-given.safetensors"
        assert load_file(path)["vectors"].max() == value


def test_a_folder_of_another_format_or_origin_is_made_anew(mine, root, capsys):
    out = prepare("mine", root)
    changes = {"in another format": {"format": 2}, "from another folder": {"from": "elsewhere"}}
    for number, (reason, change) in enumerate(changes.items(), start=1):
        about = read_json(out / "source.json")
        (out / "source.json").write_text(json.dumps(about | change))
        prepare("mine", root)
        told = f"it was prepared {reason}; the old folder is now {out}~{number}"
        assert told in lines_of(capsys)[-1]
        assert read_json(out / "source.json") == about


def test_a_folder_from_before_codes_were_kept_is_used(mine, root, capsys):
    out = prepare("mine", root)
    about = read_json(out / "source.json")
    del about["code"]
    (out / "source.json").write_text(json.dumps(about))
    prepare("mine", root)
    assert lines_of(capsys)[-1] == f"{out} {USED}"


def test_a_fetched_set_does_not_change(mine, root, capsys):
    out = prepare("mine", root)
    append(root / "raw" / "mine" / "ratings.csv")
    assert prepare("mine", root) == out
    assert lines_of(capsys)[-1] == f"{out} {USED}"


def test_what_another_process_has_prepared_meanwhile_is_used(shop, root):
    """Two processes want the same folder, and wait for a third: one of them prepares it."""
    root.mkdir()
    code = f"import sources; sources.prepare({str(shop)!r}, {str(root)!r})"
    with alone_in(root):
        processes = [
            subprocess.Popen(
                [sys.executable, "-u", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        first = [process.stdout.readline() for process in processes]    # they wait
        assert first == [f"waiting for another process that works in {root}\n"] * 2
    rest = "".join(process.communicate(timeout=60)[0] for process in processes)
    assert rest == f"preparing {root / 'shop'} from {shop}\n"
    assert [path.name for path in root.iterdir()] == ["shop"]


# ---------------- a new source

@pytest.mark.slow
def test_a_file_dropped_into_sources_is_on_the_command_line(tmp_path):
    """A copy of the project with somebody's source in it: by name, by folder, and in the help."""
    project = tmp_path / "project"
    for name in ("common", "sources"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "data.py", project)
    (project / "sources" / "mine.py").write_text(MINE)
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "ratings.csv").write_text("who,what,when\nu,a,2\nu,b,1\nu,c,3\n")

    def run(*args):
        command = [sys.executable, project / "data.py", *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "mine" in run("--help")
    assert "2 users         2 items          3 interactions   read" in run("mine")
    assert "1 users         3 items          3 interactions   read" in run(folder)
    assert read_json(tmp_path / "data" / "shop" / "source.json")["source"] == "mine"
    assert f"data/shop {USED}" in run(folder)


# ---------------- what is not used

def test_lines_that_are_passed_over_are_said(root, tmp_path):
    lines = [f"u{i % 9},i{i % 7},{1_500_000_000 + i}" for i in range(300)]
    folder = write(tmp_path / "own", *lines, "u1,,5", "u1,i1,yesterday")
    assert read_json(prepare(folder, root) / "source.json")["notes"] == [
        "interactions.csv: 2 of 302 lines are not used (no user or item 1, time not understood 1), "
        "the first is line 302"
    ]


@pytest.mark.parametrize("order, described", [
    (["a", "b", "c"], 2), (["a", "c", "b"], 0), (["c", "a", "b"], 0),
])
def test_whether_the_catalog_comes_first(tmp_path, order, described):
    raw = raw_of(("u", "a", 1), ("u", "c", 2), catalog={"a": {}, "b": {}}, item_order=order)
    sources.build(raw, tmp_path / "out", {"name": "x"})
    assert read_json(tmp_path / "out" / "source.json")["described"] == described
