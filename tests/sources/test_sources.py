"""Readers of somebody's folder and of UniSRec's files on small files with dirt in them, and what is written from them."""
import json

import numpy as np
import pytest
from conftest import write_shop

import sources
from sources import common, folder, unisrec
from sources.common import Raw, UserError, clean_text, k_core


def load(path):
    with np.load(path / "sequences.npz") as f:
        items, offsets = f["items"], f["offsets"]
    keys = [json.loads(line)["key"] for line in open(path / "items.jsonl", encoding="utf-8")]
    users = (path / "users.txt").read_text(encoding="utf-8").split()
    return {u: [keys[i - 1] for i in items[a:b]] for u, a, b in zip(users, offsets, offsets[1:])}


def write(path, interactions, items=None):
    path.mkdir(exist_ok=True)
    (path / "interactions.csv").write_bytes(interactions.encode() if isinstance(interactions, str) else interactions)
    if items is not None:
        lines = (i if isinstance(i, str) else json.dumps(i) + "\n" for i in items)
        (path / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("value, text", [
    (" a \n\t b ", "a b"), ("Tom &amp; Jerry &amp;amp; co", "Tom & Jerry & co"), ("<b>bold</b> <br/>x", "bold x"),
    ("<script>var a = '<b>';</script>rest", "rest"), ("<span class=\"a-size-medium", ""), ("3 < 4 > 2", "3 < 4 > 2"),
    (None, ""), (float("nan"), ""), (True, ""), (12, "12"), (["a", None, ["b"]], "a b"), ({"k": "v"}, "v"),
    ("Cafe\u0301", "Caf\u00e9"), ("日本語", "日本語"), ("a\x00b\u200bc\ud800", "a b c"), ("<!-- hidden -->seen", "seen")])
def test_clean_text(value, text):
    assert clean_text(value) == text


def test_k_core_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 40, 300), rng.integers(0, 50, 300)
    pairs = set(range(300))
    while True:
        small = {p for p in pairs if sum(users[q] == users[p] for q in pairs) < 5
                 or sum(items[q] == items[p] for q in pairs) < 5}
        if not small:
            break
        pairs -= small
    assert set(np.flatnonzero(k_core(users, items, 5))) == pairs and 0 < len(pairs) < 300
    assert not k_core(users[:3], items[:3], 5).any()


def test_own_folder(tmp_path):
    lines = ["\ufeffuser,item,time", "u1,b,2020-01-03", "u1,a,2020-01-01", "", "u1,c,2020-01-02T05:00:00+01:00", ""]
    path = write(tmp_path / "own", "\r\n".join(lines),
                 [{"item": "a", "title": "<b>Caf&eacute;</b>", "text": "one", "images": "a.jpg"},
                  {"item": "b", "text": ["x", None, "x", " y "], "language": "fr", "images": ["p/b.jpg", "https://e.org/b.jpg"]},
                  {"item": "unsold"}])
    raw = folder.read(path, None)
    assert raw.clock == "seconds" and raw.times == [1578009600, 1577836800, 1577937600]
    assert raw.catalog["a"] == {"title": "Café", "text": ["one"], "language": "", "images": ["a.jpg"]}
    assert raw.catalog["b"]["text"] == ["x", "y"] and raw.catalog["b"]["images"] == ["p/b.jpg", "https://e.org/b.jpg"]
    out = sources.prepare(path, root=tmp_path / "data")
    assert load(out) == {"u1": ["a", "c", "b"]}
    keys = [json.loads(line)["key"] for line in open(out / "items.jsonl")]
    assert keys == ["a", "b", "c", "unsold"]                     # the whole catalog: an unsold item can be recommended


def test_pictures_outside_the_folder_are_refused(tmp_path):
    path = write(tmp_path / "own", "user,item,time\nu,a,1\n",
                 [{"item": "a", "images": ["../x.jpg", "/etc/passwd", "p/../../x.jpg", "C:\\x.jpg", "C:/x.jpg", 7, "ok/a.jpg",
                                           "", ".", "./"]}])
    raw = folder.read(path, None)                                # the data's own folder is no folder of frames
    assert raw.catalog["a"]["images"] == ["ok/a.jpg"] and raw.report["picture paths refused"] == 8


def test_texts_nested_too_deep_are_no_texts(tmp_path):
    deep = "[" * 900 + '"x"' + "]" * 900
    path = write(tmp_path / "own", "user,item,time\nu,a,1\n", [f'{{"item": "a", "title": "t", "text": {deep}}}\n'])
    assert folder.read(path, None).catalog["a"]["title"] == "t"


def test_a_folder_never_takes_a_name_that_is_used_otherwise(tmp_path):
    for name in ("raw", "cache"):
        path = write(tmp_path / name, "user,item,time\nu,a,1\nu,b,2\n")
        assert sources.prepare(path, root=tmp_path / "data").name == f"{name}-folder"


def test_lone_surrogates_are_no_text(tmp_path):
    lines = ['{"item": "\\ud800x", "title": "a"}\n', '{"item": "a", "images": ["\\ud800.jpg", "b.jpg"]}\n']
    raw = folder.read(write(tmp_path / "own", "user,item,time\nu,a,1\n", lines + [{"item": f"i{n}"} for n in range(200)]), None)
    assert raw.catalog["a"]["images"] == ["b.jpg"] and raw.report["items.jsonl: not an object with an item"] == 1


def test_folders_of_one_name_are_prepared_side_by_side(tmp_path):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    for core in (None, 1):
        paths = [write(tmp_path / who / "shop", f"user,item,time\nu,{who},1\n") for who in ("x", "y")]
        made = [sources.prepare(path, root=tmp_path / "data", core=core) for path in paths * 2]
        assert made[:2] == made[2:] and made[0] != made[1] and not list((tmp_path / "data").glob("*~*"))


def test_a_few_bad_lines_are_counted_and_many_are_refused(tmp_path):
    good = "".join(f"u{i % 20},i{i % 7},{1_500_000_000 + i}\n" for i in range(400))
    bad = "u1,,5\nu1,i1,yesterday\nu1,i1,-4\nu1\n"
    raw = folder.read(write(tmp_path / "own", "user,item,time\n" + good + bad), None)
    assert len(raw.users) == 400
    assert {k: n for k, n in raw.report.items() if k.startswith("interactions.csv")} == {
        "interactions.csv: no user or item": 1, "interactions.csv: time not understood": 2,
        "interactions.csv: columns missing": 1, "interactions.csv: first bad line": 402}
    with pytest.raises(UserError, match="12 of 412 lines .* line 402"):
        folder.read(write(tmp_path / "own", "user,item,time\n" + good + bad * 3), None)


@pytest.mark.parametrize("content, sentence", [
    ("", "header"), ("a,b,c\n1,2,3\n", "header"), ("user,item,time\n", "no interactions"),
    ("user,item,time\nu,i,1\nu,i,9999999999999999\n", "one unit"),
    ('user,item,time\nu,i,1\nu,"i,2\nu,j,3\n', "is not CSV"),                     # else the quote swallows what follows
    ("user,item,time\nu,i,1500000000\nu,j,1500000000001\nu,k,1500000000002\n", "one unit")])
def test_files_that_cannot_be_used_are_one_sentence(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence):
        sources.prepare(write(tmp_path / "own", content), root=tmp_path / "data")
    assert not list((tmp_path / "data").glob("*")) if (tmp_path / "data").exists() else True


def test_bad_item_lines(tmp_path):
    lines = [{"item": f"i{n}", "title": "t"} for n in range(300)]
    bad = ["{broken\n", "[1]\n", {"item": "i0", "title": "again"}]
    raw = folder.read(write(tmp_path / "own", "user,item,time\nu,a,1\n", lines + bad), None)
    assert raw.catalog["i0"]["title"] == "t" and raw.report["items described twice, the first kept"] == 1
    with pytest.raises(UserError, match="items.jsonl"):
        folder.read(write(tmp_path / "own", "user,item,time\nu,a,1\n", ["{broken\n"] * 4 + lines), None)


def test_milliseconds_and_days(tmp_path, capsys):
    raw = folder.read(write(tmp_path / "own", "user,item,time\nu,a,1500000000123\nu,b,1500086400123\n"), None)
    assert raw.times == [1500000000.123, 1500086400.123] and raw.report["times read as milliseconds"] == 2
    for zeros, unit in ((6, "microseconds"), (9, "nanoseconds")):
        lines = f"user,item,timestamp\nu,a,15{'0' * (8 + zeros)}\nu,b,2{'0' * (9 + zeros)}\n"
        raw = folder.read(write(tmp_path / "own", lines), None)
        assert raw.times == [15e8, 2e9] and raw.report[f"times read as {unit}"] == 2 and raw.clock == "seconds"
    assert folder.read(write(tmp_path / "own", "user,item,time\nu,a,2020-01-01\nu,b,2020-01-02\n"), None).clock == "day"
    assert folder.read(write(tmp_path / "own", "user,item,time\nu,a,1\nu,b,2\n"), None).clock == "order"
    assert folder.read(write(tmp_path / "own", "item,user\na,u\nb,u\n"), None).times == [0, 1]
    assert "has no column time" in capsys.readouterr().out


def test_order_inside_a_second_is_kept(tmp_path):
    path = write(tmp_path / "own", "user,item,time\nu,b,1500000000900\nu,a,1500000000100\nu,c,1500000001000\n")
    assert load(sources.prepare(path, root=tmp_path / "data")) == {"u": ["a", "b", "c"]}


def test_filters_are_counted_in_order(tmp_path):
    events = [("u", "a", 5), ("u", "a", 5), ("u", "a", 9), ("u", "b", 7), ("v", "a", 1), ("v", "b", 2), ("v", "nometa", 3)]
    users, items, times = map(list, zip(*events))
    raw = Raw(users, items, times, {"a": {"title": "A"}, "b": {}}, need_catalog=True, core=2, extra={"oracle": {"x": [1]}})
    sources.build(raw, tmp_path / "x", {"name": "x"})
    assert not (tmp_path / "x" / "oracle.npz").exists()          # it knows the items by numbers they no longer have
    about = json.loads((tmp_path / "x" / "source.json").read_text())
    assert [s["interactions"] for s in about["counts"]] == [7, 6, 5, 5]
    assert load(tmp_path / "x") == {"u": ["a", "b", "a"], "v": ["a", "b"]}   # buying again is kept
    with pytest.raises(UserError, match="smaller --core"):
        raw.core = 9
        sources.build(raw, tmp_path / "y", {"name": "y"})
    assert not (tmp_path / "y").exists()


def test_a_changed_source_is_noticed_and_nothing_is_lost(tmp_path, capsys):
    path = write_shop(tmp_path / "Own Shop!")
    out = sources.prepare(path, root=tmp_path / "data")
    assert out.name == "own-shop"
    stamp = (out / "source.json").stat().st_mtime_ns
    assert sources.prepare(path, root=tmp_path / "data") == out and (out / "source.json").stat().st_mtime_ns == stamp
    with open(path / "interactions.csv", "a") as f:
        f.write("new,i1,1500000000\n")
    sources.prepare(path, root=tmp_path / "data")
    assert "new" in load(out) and "new" not in load(out.with_name("own-shop~1"))
    assert "own-shop~1" in capsys.readouterr().out
    core = sources.prepare(path, root=tmp_path / "data", core=3)
    assert core.name == "own-shop-core3" and json.loads((core / "source.json").read_text())["core"] == 3
    assert sources.prepare(out) == out                           # a processed folder is taken as it is
    with pytest.raises(UserError, match="--core"):
        sources.prepare(out, core=7)


def test_names_do_not_collide(tmp_path):
    a, b = write_shop(tmp_path / "a" / "mine"), write_shop(tmp_path / "b" / "mine", seed=1)
    first, second = (sources.prepare(p, root=tmp_path / "data") for p in (a, b))
    assert first.name == "mine" and second.name.startswith("mine-") and sources.prepare(a, root=tmp_path / "data") == first
    known = write_shop(tmp_path / "demo")
    assert sources.prepare(known, root=tmp_path / "data").name == "demo-folder"
    known = write_shop(tmp_path / "amazon2018-gift_cards")
    assert sources.prepare(known, root=tmp_path / "data").name == "amazon2018-gift_cards-folder"
    assert sources._slug("../..//etc") == "etc" and sources._slug("???") == "data"


def test_unknown_names_and_folders(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor a known data set"):
        sources.prepare("nothing-of-the-sort", root=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="interactions.csv"):
        sources.prepare(tmp_path / "empty", root=tmp_path / "data")


def write_unisrec(path, sequences, cut=unisrec.CUT, descending=True):
    path.mkdir(exist_ok=True)
    head = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    row = lambda u, seq, t: f"{u}\t{' '.join(map(str, seq[max(0, t - cut):t]))}\t{seq[t]}\n"
    parts = {"train": [], "valid": [], "test": []}
    for u, seq in enumerate(sequences):
        train = [row(u, seq, t) for t in range(1, len(seq) - 2)]
        parts["train"] += train[::-1] if descending else train
        parts["valid"].append(row(u, seq, len(seq) - 2)), parts["test"].append(row(u, seq, len(seq) - 1))
    for part, rows in parts.items():
        (path / f"X.{part}.inter").write_text(head + "".join(rows))
    n = 1 + max(map(max, sequences))
    (path / "X.item2index").write_text("".join(f"key{i}\t{i}\n" for i in range(n)))
    (path / "X.user2index").write_text("".join(f"user{u}\t{u}\n" for u in range(len(sequences))))
    texts = "".join(f"key{i}\tThing {i} &amp; co. \n" for i in range(n - 1))
    (path / "X.text").write_text("item_id:token\ttext:token_seq\n" + texts)
    return n


@pytest.mark.parametrize("descending", [True, False])
def test_unisrec_sequences_longer_than_the_cut_are_whole_again(tmp_path, descending):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 30, n).tolist() for n in (3, 4, 49, 50, 51, 52, 53, 120)]
    n = write_unisrec(tmp_path / "x", sequences, descending=descending)
    text, image = rng.random((n, 6), np.float32), rng.random((n, 4), np.float32)
    image[3] = 0
    text.tofile(tmp_path / "x" / "X.feat1CLS"), image.tofile(tmp_path / "x" / "X.feat3CLS")
    out = sources.prepare(tmp_path / "x", root=tmp_path / "data")
    assert load(out) == {f"user{u}": [f"key{i}" for i in seq] for u, seq in enumerate(sequences)}
    titles = [json.loads(line)["title"] for line in open(out / "items.jsonl")]
    assert titles[0] == "Thing 0 & co." and titles[n - 1] == ""
    from safetensors.numpy import load_file
    saved = load_file(out / "features" / "image-feat3cls.safetensors")
    assert np.array_equal(saved["vectors"][saved["index"][1:, 0]], image) and not saved["vectors"][0].any()
    assert (saved["index"][:, 0] != 0).tolist() == [False] + [i != 3 for i in range(n)]      # a zero row: no picture


@pytest.mark.parametrize("damage, sentence", [
    (lambda p: (p / "X.text").unlink(), "X.text is missing"),
    (lambda p: (p / "X.feat1CLS").write_bytes(b"1234" * 7), "finite float32"),
    (lambda p: (p / "X.item2index").write_text("a\t0\nb\t5\n"), "indices 0 to"),
    (lambda p: (p / "X.item2index").write_text("a\t0\nb\t0\nc\t1\n"), "indices 0 to"),
    (lambda p: (p / "X.test.inter").write_text("0\t1 2\t999\n"), "index files do not have"),
    (lambda p: (p / "Y.item2index").write_text("a\t0\n"), "several data sets")])
def test_damaged_unisrec_files_are_one_sentence(tmp_path, damage, sentence):
    write_unisrec(tmp_path / "x", [[0, 1, 2, 3], [3, 2, 1]])
    damage(tmp_path / "x")
    with pytest.raises(UserError, match=sentence):
        sources.prepare(tmp_path / "x", root=tmp_path / "data")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    common.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), common.atomic(tmp_path / "a.json") as f:
        f.write("half")
        raise RuntimeError
    assert common.read_json(tmp_path / "a.json") == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
