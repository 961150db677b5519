"""The demo shop is an instrument: here it is checked against plain loops, against its own draws and for leaks."""
import hashlib
import json
from math import sqrt

import numpy as np
import pytest
from PIL import Image

from encoders import hash_text, pixels
from sources import demo

SMALL = demo.World("small", seed=7, n_users=300, n_items=120)


@pytest.fixture(scope="module")
def small():
    arrays = demo.make_items(SMALL)
    return arrays, demo.make_users(SMALL, arrays)[0]


@pytest.fixture(scope="module")
def shop():
    world = demo.WORLDS["demo"]
    arrays = demo.make_items(world)
    return arrays, demo.make_users(world, arrays)[0]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Fetch and read a small shop under the name "demo"."""
    monkeypatch.setitem(demo.WORLDS, "demo", SMALL)
    return demo.read(demo.fetch("demo", tmp_path / "raw"), "demo")


# ---- The oracle against the world in words: one user, one item, one kind at a time

WHEELS = {"colour": (6, .3, .04), "pattern": (3, .2, .2), "shape": (4, .4, .4), "theme": (6, .3, .04),
          "make": (4, .25, .25), "language": (6, .3, .3), "category": (6, .5, .5)}
KINDS = [(.25, 1.5, .4, .90, .04), (.25, .4, 1.5, .90, .04), (.35, 1.2, 1.2, .90, .04), (.15, .8, .8, .20, .74)]


def loop_factors(arrays, names, seen, power, reference):
    """The factor of each item 0..N given the last item that is seen, attribute by attribute."""
    n = len(seen)
    if not reference:
        return [1] * n
    factors = {}
    for j in range(1, n):
        if seen[j]:
            factors[j] = 1
            for name in names:
                size, after, other = WHEELS[name]
                ahead = (arrays[name][j] - arrays[name][reference]) % size
                factors[j] *= (1 if ahead == 0 else after if ahead == 1 else other) ** power
    mean = sum(factors.values()) / len(factors)
    return [factors.get(j, mean) for j in range(n)]


def loop_step(arrays, kind, history, late, pictured, titled):
    """The next purchase of a user whose kind is known: a list of N+1 probabilities."""
    _, a, b, to_match, to_habit = KINDS[kind]
    n = len(pictured)
    last_of = lambda seen: next((i for i in reversed(history) if seen[i]), 0)
    known = [p or t for p, t in zip(pictured, titled)]
    free = [j > 0 and j not in history and (late or not arrays["new"][j]) for j in range(n)]
    shelf = [arrays["popularity"][j] if free[j] else 0 for j in range(n)]
    category = loop_factors(arrays, ["category"], known, 1, history[-1] if history and known[history[-1]] else 0)
    look = loop_factors(arrays, ["colour", "pattern", "shape"], pictured, a, last_of(pictured))
    wording = loop_factors(arrays, ["theme", "make", "language"], titled, b, last_of(titled))
    match = [shelf[j] * category[j] * look[j] * wording[j] for j in range(n)]
    habit = [0] * n
    for successor, share in zip(arrays["successors"][history[-1]] if history else (), (.6, .4)):
        habit[successor] = share if shelf[successor] else 0
    if not sum(habit):
        habit = shelf
    channels = (to_match, match), (to_habit, habit), (.06, shelf)
    return [sum(share * weights[j] / sum(weights) for share, weights in channels) for j in range(n)]


def loop_oracle(arrays, history, sees, late):
    pictured = [bool(p) and "image" in sees for p in arrays["pictured"]]
    titled = [bool(t) and "text" in sees for t in arrays["titled"]]
    posterior = [kind[0] for kind in KINDS]
    for t, item in enumerate(history):
        on_shelf = len(history) - t < late
        for kind in range(4):
            posterior[kind] *= loop_step(arrays, kind, history[:t], on_shelf, pictured, titled)[item]
    steps = [loop_step(arrays, kind, history, late > 0, pictured, titled) for kind in range(4)]
    return [sum(w * step[j] for w, step in zip(posterior, steps)) / sum(posterior) for j in range(len(pictured))]


@pytest.mark.parametrize("sees", demo.VIEWS.values(), ids=list(demo.VIEWS))
@pytest.mark.parametrize("late", [0, 1, 2])
def test_oracle_equals_plain_loops(small, sees, late):
    arrays, bought = small
    lacking = ~(arrays["pictured"] & arrays["titled"])[bought[:, -3 + late]] & (bought[:, -3 + late] > 0)
    after_new = arrays["new"][bought[:, -2]]
    users = np.r_[0, 1, np.flatnonzero(lacking)[:2], np.flatnonzero(after_new)[:1]]
    histories = bought[users, :bought.shape[1] - 3 + late]
    got = demo.oracle(arrays, histories, sees, late)
    for row, history in zip(got, histories):
        want = loop_oracle(arrays, [i for i in history.tolist() if i], sees, late)
        np.testing.assert_allclose(row, want, rtol=0, atol=1e-12)


def test_oracle_gives_probabilities(small):
    arrays, bought = small
    for late, end in ((0, -3), (1, -2), (2, -1)):
        p = demo.oracle(arrays, bought[:, :end], late=late)
        assert np.allclose(p.sum(1), 1, atol=1e-12)
        assert not np.take_along_axis(p, bought[:, :end], 1).any()          # what was bought, and column 0
        assert p[:, arrays["new"]].any() == (late > 0)
        assert (np.take_along_axis(p, bought[:, end, None], 1) > 0).all()


def test_oracle_needs_no_padding_and_accepts_an_empty_history(small):
    arrays, bought = small
    row = bought[np.argmin((bought > 0).sum(1))]
    np.testing.assert_allclose(demo.oracle(arrays, row[None, :-1]), demo.oracle(arrays, row[None, row > 0][:, :-1]))
    first = demo.oracle(arrays, np.zeros((1, 0), int), late=0)[0]
    old = np.where(arrays["new"], 0, arrays["popularity"])
    np.testing.assert_allclose(first, old / old.sum())


# ---- The ceiling

def test_what_the_oracle_expects_happens(shop):
    """On the demo itself, with 3,000 test targets: within three standard errors in every view."""
    arrays, bought = shop
    found = demo.ceiling(arrays, bought[:, :-1], bought[:, -1])
    expected = {view: found[view]["expected"]["recall@10"] for view in found}
    for view, recall in expected.items():
        error = sqrt(recall * (1 - recall) / len(bought))
        assert abs(found[view]["realised"]["recall@10"] - recall) < 3 * error, view
        assert abs(found[view]["realised"]["ndcg@10"] - found[view]["expected"]["ndcg@10"]) < 3 * error, view
    assert expected["full"] == pytest.approx(.479, abs=.001)
    assert expected["full"] > 1.4 * expected["without pictures"] > 1.4 * 1.4 * expected["without both"]
    assert expected["full"] > 1.4 * expected["without text"] > 1.4 * 1.4 * expected["without both"]


def test_no_other_scorer_expects_more(small):
    arrays, bought = small
    histories, targets = bought[:, :-1], bought[:, -1]
    found = demo.ceiling(arrays, histories, targets)["full"]["expected"]
    truth = demo.oracle(arrays, histories)
    last = demo.Taste(arrays)
    scorers = [demo.oracle(arrays, histories, sees) for sees in demo.VIEWS.values()]
    scorers += [demo.oracle(arrays, histories[:, -n:]) for n in (1, 2, 3)]             # of a shortened history
    scorers += [np.tile(arrays["popularity"], (len(bought), 1)), np.random.RandomState(0).random_sample(truth.shape),
                last.look[0][histories[:, -1]], last.wording[1][histories[:, -1]]]
    for scores in scorers:
        gains = np.take_along_axis(truth, np.argsort(-scores, axis=1)[:, :10], 1)
        assert gains.sum(1).mean() <= found["recall@10"] + 1e-12
        assert (gains / np.log2(np.arange(2, 12))).sum(1).mean() <= found["ndcg@10"] + 1e-12


@pytest.mark.parametrize("k", [5, 10, 20, 40])
def test_ceiling_by_hand(small, k):
    """Ranks by sorting, ties against the target; expected by the full oracle; `among` counts the new items only."""
    arrays, bought = small
    new = arrays["new"]
    bought = bought[np.r_[np.flatnonzero(new[bought[:, -1]])[:8], :12]]
    histories, targets = bought[:, :-1], bought[:, -1]
    found, truth = demo.ceiling(arrays, histories, targets, among=new, k=k), demo.oracle(arrays, histories)
    for view, sees in demo.VIEWS.items():
        p = demo.oracle(arrays, histories, sees)
        rank = np.array([[sorted(-row).index(-x) + list(row).count(x) for x in row] for row in p])       # (U, N+1)
        realised = np.zeros_like(truth)
        realised[range(20), targets] = 1
        for how, weight in (("expected", truth), ("realised", realised)):
            share = weight * new / (weight * new).sum()
            want = {f"recall@{k}": share[rank <= k].sum(), f"ndcg@{k}": (share / np.log2(rank + 1))[rank <= k].sum()}
            assert found[view][how] == pytest.approx(want), (view, how)


# ---- The source

def test_the_same_seed_gives_the_same_shop(source, tmp_path):
    """Users, items, times, titles and decoded pixels; the digest must not depend on versions or machines."""
    digest = hashlib.sha256(json.dumps([source.users, source.items, source.times, source.catalog]).encode())
    for entry in source.catalog.values():
        for image in entry["images"]:
            digest.update(np.asarray(Image.open(tmp_path / "raw" / image)).tobytes())
    assert digest.hexdigest() == "15750fd84a576d73a9f6ce764097dc8d9f79cc6b3450db83e2252b1aa365ad03"
    again = demo.read(demo.fetch("demo", tmp_path / "again"), "demo")
    assert (again.users, again.items, again.times) == (source.users, source.items, source.times)
    assert again.catalog == source.catalog
    for picture in (tmp_path / "raw" / "images").iterdir():
        assert picture.read_bytes() == (tmp_path / "again" / "images" / picture.name).read_bytes()


def test_purchases_are_in_order_and_new_items_arrive_late(source):
    arrays, by_user = source.extra["oracle"], {}
    new = {key for key, is_new in zip(source.item_order, arrays["new"][1:]) if is_new}
    assert source.times == sorted(source.times) and len(new) == round(.04 * SMALL.n_items)
    for user, item, time in zip(source.users, source.items, source.times):
        by_user.setdefault(user, []).append((item, time >= demo.ARRIVAL))
        assert item not in new or time >= demo.ARRIVAL
    assert len(by_user) == SMALL.n_users and new & set(source.items)
    for purchases in by_user.values():
        items, late = zip(*purchases)
        assert len(set(items)) == len(items) and SMALL.shortest <= len(items) <= SMALL.longest
        assert late == (False,) * (len(items) - 2) + (True, True)


def test_histories_of_the_raw_are_those_of_the_oracle(source, small):
    """A user's purchases in order of time are the generator's, so that ids and the oracle's arrays agree."""
    ids, by_user = {key: i for i, key in enumerate(source.item_order, start=1)}, {}
    for user, item in zip(source.users, source.items):
        by_user.setdefault(user, []).append(ids[item])
    assert [by_user[user] for user in sorted(by_user)] == [[i for i in row.tolist() if i] for row in small[1]]
    assert all(np.array_equal(source.extra["oracle"][name], small[0][name]) for name in small[0])


def test_catalog_lacks_what_it_should(source, tmp_path):
    arrays = source.extra["oracle"]
    assert (~arrays["pictured"][1:]).sum() == (~arrays["titled"][1:]).sum() == round(.05 * SMALL.n_items)
    assert (arrays["pictured"] | arrays["titled"])[1:].all()
    for i, key in enumerate(source.item_order, start=1):
        entry = source.catalog[key]
        assert bool(entry["images"]) == arrays["pictured"][i]
        assert bool(entry["title"]) == bool(entry["text"]) == bool(entry["language"]) == arrays["titled"][i]
        assert all((tmp_path / "raw" / image).is_file() for image in entry["images"])
    assert len(list((tmp_path / "raw" / "images").iterdir())) == arrays["pictured"].sum()


def test_titles_use_four_words_of_one_theme(small):
    for language in range(6):
        entry = demo.describe(2, 0, 1, language, [3, 1, 0, 2])
        words = list(demo.WORDS.values())[language].split(", ")[0].split()
        title, sentence = entry["title"].lower(), entry["text"][0].lower()
        assert [w.lower() in title for w in words] == [False, True, False, True]
        assert [w.lower() in sentence for w in words] == [True, False, True, False]
        assert demo.MAKES[1].lower() in title
    everything = " ".join(demo.WORDS.values()).replace(",", "").split()
    assert all(len(demo.WORDS[lang].split(", ")) == 6 for lang in demo.WORDS) and len(everything) == 6 * 6 * 4


def test_fetch_draws_once_and_finishes_what_was_broken_off(source, tmp_path):
    one = sorted((tmp_path / "raw" / "images").iterdir())[0]
    pixels_before = np.asarray(Image.open(one))
    one.unlink()
    demo.fetch("demo", tmp_path / "raw")
    assert not one.exists()                                                 # finished: nothing is drawn again
    (tmp_path / "raw" / "world.json").unlink()
    demo.fetch("demo", tmp_path / "raw")
    assert np.array_equal(np.asarray(Image.open(one)), pixels_before)


def test_oracle_survives_the_disk(source, small, tmp_path):
    np.savez(tmp_path / "oracle.npz", **source.extra["oracle"])
    with np.load(tmp_path / "oracle.npz", allow_pickle=False) as arrays:
        assert np.array_equal(demo.oracle(dict(arrays), small[1][:9, :-1]), demo.oracle(small[0], small[1][:9, :-1]))


def test_names(tmp_path):
    assert all(demo.knows(name) for name in demo.NAMES) and not demo.knows("demo-c")
    assert not demo.recognises(tmp_path)


def test_the_second_shop_has_other_items_and_the_same_words(tmp_path):
    one, two = (demo.read(tmp_path, name) for name in demo.NAMES)
    assert not set(one.item_order) & set(two.item_order) and not set(one.users) & set(two.users)
    assert one.extra["oracle"]["colour"].tolist() != two.extra["oracle"]["colour"].tolist()
    words = [{w for entry in raw.catalog.values() if entry["language"] != "ja" for w in entry["title"].split()}
             for raw in (one, two)]
    assert len(words[0] & words[1]) > .9 * len(words[0] | words[1])


# ---- The encoders, and what each modality gives away

def probe(features, labels):
    """Accuracy of a ridge classifier on the last third, fitted on the rest."""
    x, y = features - features.mean(0), np.eye(labels.max() + 1)[labels]
    cut = len(x) * 2 // 3
    gram = x[:cut].T @ x[:cut]
    w = np.linalg.solve(gram + .01 * np.trace(gram) / len(gram) * np.eye(len(gram)), x[:cut].T @ (y[:cut] - y.mean(0)))
    return (np.argmax(x[cut:] @ w, 1) == labels[cut:]).mean()


def test_looks_are_in_pictures_only_and_wording_in_titles_only():
    world = demo.World("probe", seed=3, n_items=600, n_users=0, no_picture=0, no_title=0)
    arrays = {name: array[1:] for name, array in demo.make_items(world).items()}
    uniform = np.random.RandomState(0).random_sample
    jitter, words = 2 * uniform((600, 10)) - 1, demo.order(uniform((600, 4)))
    seen = pixels(Image.fromarray(demo.draw(*(arrays[a][i] for a in demo.LOOK + ("category",)), jitter[i]))
                  for i in range(600))
    entries = [demo.describe(*(arrays[a][i] for a in ("category",) + demo.WORDING), words[i]) for i in range(600)]
    told = hash_text([" ".join([entry["title"], *entry["text"]]) for entry in entries])
    for name in demo.LOOK:
        chance = 1 / WHEELS[name][0]
        assert probe(seen, arrays[name]) > .9, name
        assert probe(told, arrays[name]) < chance + .12, name
    for name in demo.WORDING:
        chance = max(demo.ATTRIBUTES[name][0]) / sum(demo.ATTRIBUTES[name][0])
        assert probe(told, arrays[name]) > .9, name
        assert probe(seen, arrays[name]) < chance + .12, name
    assert probe(seen, arrays["category"]) > .9 and probe(told, arrays["category"]) > .9


def test_hash_text():
    texts = ['Mug "Harbour and anchor"', "", "MUG harbour, and ANCHOR!", "灯台とカモメ", "TV", "港", "?!",
             "ｍｕｇ harbour and anchor"]
    rows = hash_text(texts)
    assert rows.dtype == np.float32 and rows.shape == (8, 256)
    assert np.array_equal(rows.any(1), [True, False, True, True, True, True, False, True])
    assert np.allclose(np.linalg.norm(rows[rows.any(1)], axis=1), 1, atol=1e-6)
    assert np.array_equal(rows[0], rows[2]) and np.array_equal(rows[0], rows[7])
    assert np.array_equal(rows[3], hash_text(texts[3:4])[0])                # no catalog statistics
    assert hash_text([]).shape == (0, 256)


def test_pixels():
    pictures = [Image.new("RGB", (1, 1), "black"), Image.new("RGB", (300, 20), "white"),
                Image.new("RGB", (48, 48), "grey"), Image.new("RGB", (64, 64), "crimson")]
    rows = pixels(iter(pictures))
    assert rows.dtype == np.float32 and rows.shape == (4, 128) and np.isfinite(rows).all() and rows.any(1).all()
    assert np.array_equal(rows[3], pixels(pictures[3:])[0])                 # no catalog statistics
    assert pixels([]).shape == (0, 128)
