"""The demo shop is an instrument: it is checked against plain loops, against its own draws, and for
what a picture or a title gives away."""
import hashlib
import itertools
import json
import re
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from PIL import Image

from common.encoders import hash_text, pixels
from common.files import read_json
from sources import demo, demo_goods, prepare

SMALL = demo.World("small", seed=7, n_users=300, n_items=120)


def made(world):
    """(arrays of the items, what all users buy)"""
    arrays = demo.make_items(world)
    return arrays, demo.make_users(world, arrays)[0]


@pytest.fixture(scope="module")
def small():
    return made(SMALL)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small shop, fetched and read under the name "demo"."""
    monkeypatch.setitem(demo.WORLDS, "demo", SMALL)
    return demo.read(demo.fetch("demo", tmp_path / "raw"), "demo")


def purchases(raw):
    """user -> [(item, time)], in the order of the raw lists."""
    found = {}
    for user, item, time in zip(raw.users, raw.items, raw.times, strict=True):
        found.setdefault(user, []).append((item, time))
    return found


# ---------------- the oracle against the world in words: one user, one item, one kind at a time

WHEELS = {    # number of values; factors of the next value and of any other, if the same is 1
    "colour": (6, .3, .04),
    "pattern": (3, .2, .2),
    "shape": (4, .4, .4),
    "theme": (6, .3, .04),
    "make": (4, .25, .25),
    "language": (6, .3, .3),
    "category": (6, .5, .5),
}
KINDS = {    # share; exponents of look and wording; shares of match and habit
    "following": [
        (.25, 1.5, .4, .90, .04),
        (.25, .4, 1.5, .90, .04),
        (.35, 1.2, 1.2, .90, .04),
        (.15, .8, .8, .20, .74),
    ],
    "alike": [(1, .7, .7, .88, .06)],
    "sharp": [(1, 1.4, 1.4, .88, .06)],
    "apart": [(.5, 1.2, .2, .90, .04), (.5, .2, 1.2, .90, .04)],
    "steady": [(.5, 2, 2, .90, .04), (.5, .3, .3, .90, .04)],
}


def factor_of(arrays, name, size, after, other, here, there, turned):
    """How likely item `there` is after item `here`, by one attribute."""
    steps = [0]
    if name == "colour" and turned is not None:    # None: an ordinary shop
        steps = {0: [0], 1: [3], "unknown": [0, 3]}[turned]
    found = []
    for step in steps:
        ahead = (arrays[name][there] - arrays[name][here] - step) % size
        found.append(1 if ahead == 0 else after if ahead == 1 else other)
    return sum(found) / len(found)


def loop_factors(arrays, names, seen, power, reference, turned=None):
    """The factor of each item 0..N given the last item that is seen, attribute by attribute."""
    n = len(seen)
    if not reference:
        return [1] * n
    factors = {}
    for j in range(1, n):
        if seen[j]:
            factors[j] = 1
            for name in names:
                factor = factor_of(arrays, name, *WHEELS[name], reference, j, turned)
                factors[j] *= factor ** power
    mean = sum(factors.values()) / len(factors)
    return [factors.get(j, mean) for j in range(n)]


def last_of(history, seen):
    return next((item for item in reversed(history) if seen[item]), 0)


def loop_match(arrays, world, kind, history, late, pictured, titled):
    """What users of a kind, whatever they like, make of each item: its shelf, match and habit."""
    _, a, b, _, _ = KINDS[world.kinds][kind]
    n = len(pictured)
    last = history[-1] if history else 0
    free = [j > 0 and j not in history and (late or not arrays["new"][j]) for j in range(n)]
    shelf = [arrays["popularity"][j] if free[j] else 0 for j in range(n)]
    known = [p or t for p, t in zip(pictured, titled)]
    category = loop_factors(arrays, ["category"], known, 1, last if known[last] else 0)
    shown = last_of(history, pictured)
    told = last_of(history if world.lag == 1 else history[:-1], titled)
    turned = None
    if world.tongues:
        turned = int(arrays["language"][shown]) % 2 if titled[shown] else "unknown"
    steady = arrays["steadiness"] if world.scattered else [1] * n
    looks = ["colour", "pattern", "shape"]
    look = loop_factors(arrays, looks, pictured, a * steady[shown], shown, turned)
    words = ["theme", "make", "language"]
    wording = loop_factors(arrays, words, titled, b * steady[told], told)
    match = [shelf[j] * category[j] * look[j] * wording[j] for j in range(n)]
    habit = [0] * n
    if history:
        for successor, share in zip(arrays["successors"][last], (.6, .4)):
            habit[successor] = share if shelf[successor] else 0
    return shelf, match, habit if sum(habit) else shelf


def loop_step(world, kind, ways, liked):
    """The next purchase of a user whose kind and favourites are known: N+1 probabilities."""
    shelf, match, habit = ways
    _, _, _, to_match, to_habit = KINDS[world.kinds][kind]
    match = [m * l for m, l in zip(match, liked)]
    any_share = 1 - to_match - to_habit
    channels = (to_match, match), (to_habit, habit), (any_share, shelf)
    return [
        sum(share * weights[j] / sum(weights) for share, weights in channels)
        for j in range(len(shelf))
    ]


def loop_likings(arrays, world, pictured, titled):
    """For every choice of favourites: how well each item is liked."""
    if not world.favourites:
        return [[1] * len(pictured)]

    def affinity(name, seen, chosen):
        each = {}
        for j in range(1, len(seen)):
            if seen[j]:
                ahead = [(arrays[name][j] - favourite) % 6 for favourite in chosen]
                each[j] = sum({0: 1, 1: .1}.get(step, .02) for step in ahead) / len(chosen)
        mean = sum(each.values()) / len(each) if each else 1
        return [each.get(j, mean) for j in range(len(seen))]

    choices = list(itertools.combinations(range(6), world.favourites))
    by_colours = [affinity("colour", pictured, colours) for colours in choices]
    by_themes = [affinity("theme", titled, themes) for themes in choices]
    return [[c * t for c, t in zip(one, two)] for one in by_colours for two in by_themes]


def loop_oracle(arrays, world, history, sees, late):
    everything = world.hidden == "known" and len(sees) == 2
    pictured = [(bool(p) or everything) and "image" in sees for p in arrays["pictured"]]
    titled = [(bool(t) or everything) and "text" in sees for t in arrays["titled"]]
    likings = loop_likings(arrays, world, pictured, titled)
    total = [0] * len(pictured)
    weight = 0
    for kind, (share, *_) in enumerate(KINDS[world.kinds]):
        ways = [
            loop_match(arrays, world, kind, history[:t], len(history) - t < late, pictured, titled)
            for t in range(len(history))
        ]
        now = loop_match(arrays, world, kind, history, late > 0, pictured, titled)
        for liked in likings:
            posterior = share
            for way, item in zip(ways, history):
                posterior *= loop_step(world, kind, way, liked)[item]
            weight += posterior
            total = [t + posterior * p for t, p in zip(total, loop_step(world, kind, now, liked))]
    return [t / weight for t in total]


@pytest.mark.parametrize("sees", demo.VIEWS.values(), ids=list(demo.VIEWS))
@pytest.mark.parametrize("late", [0, 1, 2])
def test_oracle_equals_plain_loops(small, sees, late):
    arrays, bought = small
    last = bought[:, -3 + late]
    lacking = ~(arrays["pictured"] & arrays["titled"])[last] & (last > 0)
    after_new = arrays["new"][bought[:, -2]]
    users = np.r_[0, np.flatnonzero(lacking)[:2], np.flatnonzero(after_new)[:1]]
    check_oracle(arrays, SMALL, bought[users, :bought.shape[1] - 3 + late], sees, late)


def check_oracle(arrays, world, histories, sees, late):
    got = demo.oracle(arrays, histories, sees, late)
    for row, history in zip(got, histories):
        history = [item for item in history.tolist() if item][-7:]
        want = loop_oracle(arrays, world, history, sees, late)
        cut = demo.oracle(arrays, np.array([history]), sees, late)[0]
        np.testing.assert_allclose(cut, want, rtol=0, atol=1e-12)
        assert row.sum() == pytest.approx(1)


@pytest.mark.parametrize("question", demo.QUESTIONS)
def test_oracles_of_all_worlds_equal_plain_loops(question):
    small = {"n_users": 40, "n_items": 60}
    world = demo.World(f"demo:{question}", seed=3, **demo.QUESTIONS[question] | small)
    arrays, bought = made(world)
    for sees in (demo.VIEWS["full"], demo.VIEWS["without text"]):
        check_oracle(arrays, world, bought[:2, :-1], sees, 2)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_oracle_gives_probabilities(small, late):
    arrays, bought = small
    histories, following = bought[:, :late - 3], bought[:, [late - 3]]
    p = demo.oracle(arrays, histories, late=late)
    assert np.allclose(p.sum(1), 1, atol=1e-12)
    assert not np.take_along_axis(p, histories, 1).any()    # what was bought, and column 0
    assert p[:, arrays["new"]].any() == (late > 0)
    assert (np.take_along_axis(p, following, 1) > 0).all()


def test_oracle_needs_no_padding_and_accepts_an_empty_history(small):
    arrays, bought = small
    row = bought[[np.argmin((bought > 0).sum(1))]]
    padded = demo.oracle(arrays, row[:, :-1])
    np.testing.assert_allclose(demo.oracle(arrays, row[row > 0][None, :-1]), padded)
    last = demo.make_items(demo.World(n_items=9, **demo.QUESTIONS["last"]))["world"]
    arrays = arrays | {"world": last}
    first = demo.oracle(arrays, np.zeros((1, 0), int), late=0)[0]
    old = np.where(arrays["new"], 0, arrays["popularity"])
    np.testing.assert_allclose(first, old / old.sum())    # nothing is liked at all times


# ---------------- the ceiling

WORTH = {    # by question: NDCG@10 of oracles, as shares of the full one's, at most
    "": {"of the last item": .6, "of the history shuffled": .85, "blind to tastes": .75},
    "last": {"of the history shuffled": .5},
    "tastes": {"blind to tastes": .8},
    "uncertainty": {"blind to steadiness": .85},
    "languages": {"blind to languages": .8},
    "translated": {"blind to languages": .8},
    "many": {"blind to languages": .8},
    "missing": {"filling in": .8, "filling nothing in": .65},
    "content": {"overlooking details": .4},
    "cold": {},
    "few": {},
}


@pytest.mark.parametrize("question", WORTH)
def test_what_the_oracle_expects_happens(question):
    """Within three standard errors in every view; and the views are worth what they should."""
    world = demo.WORLDS[f"demo:{question}".removesuffix(":")]
    world = replace(world, n_users=world.n_users if question == "" else 600)
    arrays, bought = made(world)
    found = demo.ceiling(arrays, bought[:, :-1], bought[:, -1])
    recall = {view: found[view]["expected"]["recall@10"] for view in found}
    for view, share in recall.items():
        error = sqrt(share * (1 - share) / len(bought))
        for metric in ("recall@10", "ndcg@10"):
            expected, realised = (found[view][how][metric] for how in ("expected", "realised"))
            assert abs(realised - expected) < 3 * error, (view, metric)
    ndcg = {view: found[view]["expected"]["ndcg@10"] for view in found}
    for view, share in WORTH[question].items():
        assert ndcg[view] < share * ndcg["full"], view
    for partial in ("without pictures", "without text"):
        assert ndcg["full"] > 1.4 * ndcg[partial] > 1.4 * 1.2 * ndcg["without both"]


def test_where_nothing_is_missing_there_is_nothing_to_fill_in():
    knobs = demo.QUESTIONS["missing"] | dict(no_picture=0, no_title=0, n_users=20, n_items=80)
    arrays, bought = made(demo.World("demo:missing", **knobs))
    found = demo.views(arrays, bought[:, :-1])
    np.testing.assert_allclose(found["filling in"], found["full"], atol=1e-12)
    np.testing.assert_allclose(found["filling nothing in"], found["full"], atol=1e-12)


@pytest.mark.parametrize("known", ["colour", "theme"])
def test_filling_in_takes_one_modality_for_the_other(known):
    """As if the guess were known, where nothing but colour and theme is looked at."""
    knobs = demo.QUESTIONS["missing"] | dict(n_users=20, n_items=80)
    arrays, bought = made(demo.World("demo:missing", **knobs))
    lacking = ~arrays["pictured"] if known == "theme" else ~arrays["titled"]
    guess, other = ("colour", "theme") if known == "theme" else ("theme", "colour")
    sure = demo.Taste(arrays | {guess: np.where(lacking, arrays[other], arrays[guess])})
    taste = demo.Taste(arrays, takes_for=dict(hidden="filled"))
    liked = sure.liked.reshape(-1, 6, 6).sum(2 if guess == "colour" else 1)
    filled = taste.liked.reshape(-1, 6, 6).sum(2 if guess == "colour" else 1)
    np.testing.assert_allclose((filled / filled.sum(1, keepdims=True))[1:],
                               (liked / liked.sum(1, keepdims=True))[1:])


def test_overlooking_details_is_to_know_no_colour_and_no_theme(small):
    arrays, bought = small
    closely = arrays | {"world": np.array(json.dumps(vars(replace(SMALL, told="in details"))))}
    overlooking = demo.oracle(closely, bought[:9, :-1], takes_for=dict(told="overlooked"))
    alike = arrays | {name: 0 * arrays[name] for name in ("colour", "theme")}
    np.testing.assert_allclose(overlooking, demo.oracle(alike, bought[:9, :-1]), atol=1e-12)
    np.testing.assert_array_equal(
        demo.oracle(closely, bought[:9, :-1]), demo.oracle(arrays, bought[:9, :-1])
    )


def test_questions_are_worlds():
    assert demo.WORLDS.keys() == {
        *demo.SHOPS, *(f"{shop}:{question}" for shop in demo.SHOPS for question in demo.QUESTIONS)
    }
    assert WORTH.keys() - {""} == demo.QUESTIONS.keys()
    assert demo.BLIND.keys() <= WORTH.keys()


def test_no_other_scorer_expects_more(small):
    arrays, bought = small
    histories, targets = bought[:, :-1], bought[:, -1]
    best = demo.ceiling(arrays, histories, targets)["full"]["expected"]
    truth = demo.oracle(arrays, histories)
    taste = demo.Taste(arrays)
    scorers = [
        *(demo.oracle(arrays, histories, sees) for sees in demo.VIEWS.values()),
        *(demo.oracle(arrays, histories[:, -n:]) for n in (1, 2, 3)),    # of a shortened history
        np.tile(arrays["popularity"], (len(bought), 1)),
        np.random.RandomState(0).random_sample(truth.shape),
        taste.look[0][histories[:, -1]],
        taste.wording[0][histories[:, -2]],
    ]
    for scores in scorers:
        gains = np.take_along_axis(truth, np.argsort(-scores, axis=1)[:, :10], 1)
        assert gains.sum(1).mean() <= best["recall@10"] + 1e-12
        assert (gains / np.log2(np.arange(2, 12))).sum(1).mean() <= best["ndcg@10"] + 1e-12


@pytest.mark.parametrize("k", [5, 10, 20, 40])
def test_ceiling_by_hand(small, k):
    """Ranks by sorting, ties against the target; `among` counts the new items only."""
    arrays, bought = small
    new = arrays["new"]
    bought = bought[np.r_[np.flatnonzero(new[bought[:, -1]])[:8], :12]]
    histories, targets = bought[:, :-1], bought[:, -1]
    found = demo.ceiling(arrays, histories, targets, among=new, k=k)
    truth = demo.oracle(arrays, histories)
    realised = np.zeros_like(truth)
    realised[range(20), targets] = 1
    for view, sees in demo.VIEWS.items():
        p = demo.oracle(arrays, histories, sees)
        rank = np.array([
            [sorted(-row).index(-x) + list(row).count(x) for x in row] for row in p
        ])    # (U, N+1)
        for how, weight in (("expected", truth), ("realised", realised)):
            share = weight * new / (weight * new).sum()
            want = {
                f"recall@{k}": share[rank <= k].sum(),
                f"ndcg@{k}": (share / np.log2(rank + 1))[rank <= k].sum(),
            }
            assert found[view][how] == pytest.approx(want), (view, how)


def test_the_ceiling_of_a_folder(source, small, tmp_path):
    """The oracle's arrays on disk are those in memory; a folder without them has no ceiling."""
    histories, targets = small[1][:9, :-1], small[1][:9, -1]
    assert demo.reached(tmp_path, histories, targets) == {}
    np.savez(tmp_path / "oracle.npz", **source.extra["oracle"])
    views = demo.ceiling(small[0], histories, targets)
    assert demo.reached(tmp_path, histories, targets) == {
        "oracle": views["full"]["realised"],
        "oracle without pictures": views["without pictures"]["realised"],
        "oracle without text": views["without text"]["realised"],
        "oracle without both": views["without both"]["realised"],
        "oracle of the last item": views["of the last item"]["realised"],
        "oracle of the history shuffled": views["of the history shuffled"]["realised"],
        "oracle blind to tastes": views["blind to tastes"]["realised"],
    }


# ---------------- the source

DIGESTS = {
    "": "eb7286532d7077d3a86b18961a250e04aad286c11934b2b5d958fe925a52c0b5",
    "last": "15750fd84a576d73a9f6ce764097dc8d9f79cc6b3450db83e2252b1aa365ad03",
}


def columns_of(raw):
    return [[*raw.users], [*raw.items], raw.times.tolist(), raw.catalog]


@pytest.mark.parametrize("question", DIGESTS)
def test_the_same_seed_gives_the_same_shop(tmp_path, monkeypatch, question):
    """Down to titles and decoded pixels; the digest must not depend on versions or machines."""
    world = replace(SMALL, **demo.QUESTIONS.get(question, {}))
    monkeypatch.setitem(demo.WORLDS, "demo", world)
    source = demo.read(demo.fetch("demo", tmp_path / "raw"), "demo")
    columns = columns_of(source)
    digest = hashlib.sha256(json.dumps(columns).encode())
    for entry in source.catalog.values():
        for image in entry["images"]:
            digest.update(np.asarray(Image.open(tmp_path / "raw" / image)).tobytes())
    assert digest.hexdigest() == DIGESTS[question]
    again = demo.read(demo.fetch("demo", tmp_path / "again"), "demo")
    assert columns_of(again) == columns
    for picture in (tmp_path / "raw" / "images").iterdir():
        second = tmp_path / "again" / "images" / picture.name
        assert picture.read_bytes() == second.read_bytes()


def test_purchases_are_in_order_and_new_items_arrive_late(source):
    arrays = source.extra["oracle"]
    new = {key for key, is_new in zip(source.item_order, arrays["new"][1:]) if is_new}
    assert len(new) == round(.04 * SMALL.n_items)
    assert new & set(source.items)
    assert (np.diff(source.times) >= 0).all()
    by_user = purchases(source)
    assert len(by_user) == SMALL.n_users
    for events in by_user.values():
        items, times = zip(*events)
        late = [time >= demo.ARRIVAL for time in times]
        assert len(set(items)) == len(items)
        assert SMALL.shortest <= len(items) <= SMALL.longest
        assert late == [False] * (len(items) - 2) + [True, True]
        assert not new & set(items[:-2])


def test_histories_of_the_raw_are_those_of_the_oracle(source, small):
    """A user's purchases in order of time are the generator's, so that ids and arrays agree."""
    ids = {key: i for i, key in enumerate(source.item_order, start=1)}
    got = [[ids[item] for item, _ in events] for _, events in sorted(purchases(source).items())]
    assert got == [[item for item in row.tolist() if item] for row in small[1]]
    for name, array in small[0].items():
        assert np.array_equal(source.extra["oracle"][name], array)


def test_catalog_lacks_what_it_should(source, tmp_path):
    arrays = source.extra["oracle"]
    pictured, titled = arrays["pictured"][1:], arrays["titled"][1:]
    assert (~pictured).sum() == (~titled).sum() == round(.05 * SMALL.n_items)
    assert (pictured | titled).all()
    for key, has_picture, has_title in zip(source.item_order, pictured, titled):
        entry = source.catalog[key]
        assert bool(entry["images"]) == has_picture
        for part in ("title", "text", "language"):
            assert bool(entry[part]) == has_title
        assert all((tmp_path / "raw" / image).is_file() for image in entry["images"])
    assert len(list((tmp_path / "raw" / "images").iterdir())) == pictured.sum()


@pytest.mark.parametrize("language", range(6), ids=list(demo_goods.PHRASES))
def test_titles_use_four_words_of_one_theme(language):
    entry = demo_goods.describe(2, 0, 1, language, [3, 1, 0, 2])
    themes = list(demo_goods.WORDS.values())[language].split(", ")
    assert [len(theme.split()) for theme in themes] == [4] * 6
    words = themes[0].lower().split()
    title, sentence = entry["title"].lower(), entry["text"][0].lower()
    assert [word in title for word in words] == [False, True, False, True]
    assert [word in sentence for word in words] == [True, False, True, False]
    assert demo_goods.MAKES[1].lower() in title
    assert entry["language"] == list(demo_goods.PHRASES)[language]


def test_translated_titles_are_in_one_language_and_say_which_it_was():
    own = [demo_goods.describe(1, 2, 3, language, [0, 1, 2, 3]) for language in range(6)]
    english = [
        demo_goods.describe(1, 2, 3, language, [0, 1, 2, 3], translated=True)
        for language in range(6)
    ]
    assert len({item["title"] for item in own}) == 6
    assert {item["title"] for item in english} == {own[0]["title"]}
    assert [item["language"] for item in english] == list(demo_goods.PHRASES)
    worlds = (replace(SMALL, **demo.QUESTIONS[name]) for name in ("languages", "translated"))
    (_, one), (_, other) = (made(world) for world in worlds)
    assert np.array_equal(one, other)


def test_fetch_draws_once_and_finishes_what_was_broken_off(source, tmp_path):
    raw = tmp_path / "raw"
    one = sorted((raw / "images").iterdir())[0]
    drawn = np.asarray(Image.open(one))
    one.unlink()
    demo.fetch("demo", raw)
    assert not one.exists()    # it was finished: nothing is drawn again
    (raw / "world.json").unlink()
    demo.fetch("demo", raw)
    assert np.array_equal(np.asarray(Image.open(one)), drawn)


def test_fetch_draws_again_what_another_world_left(source, tmp_path, monkeypatch):
    monkeypatch.setitem(demo.WORLDS, "demo", demo.World("small", seed=8, n_users=9, n_items=120))
    before = {path: path.read_bytes() for path in (tmp_path / "raw" / "images").iterdir()}
    demo.fetch("demo", tmp_path / "raw")
    assert any(path.read_bytes() != old for path, old in before.items())
    assert json.loads((tmp_path / "raw" / "world.json").read_text())["seed"] == 8


def test_the_second_shop_has_other_items_and_the_same_words(tmp_path):
    one, two = (demo.read(tmp_path, name) for name in demo.NAMES)
    assert not set(one.item_order) & set(two.item_order)
    assert not set(one.users) & set(two.users)
    assert one.extra["oracle"]["colour"].tolist() != two.extra["oracle"]["colour"].tolist()
    words = []
    for raw in (one, two):
        titles = [row["title"] for row in raw.catalog.values() if row["language"] != "ja"]
        words.append({word for title in titles for word in title.split()})
    assert len(words[0] & words[1]) > .9 * len(words[0] | words[1])


def test_a_drawn_shop_has_nothing_to_say(source, tmp_path, monkeypatch):
    folder = prepare("demo", tmp_path / "data")
    assert read_json(folder / "source.json")["notes"] == []


# ---------------- the built-in encoders, and what each modality gives away

def probe(features, labels):
    """Accuracy of a ridge classifier on the last third, fitted on the rest."""
    x = features - features.mean(0)
    y = np.eye(labels.max() + 1)[labels]
    cut = len(x) * 2 // 3
    gram = x[:cut].T @ x[:cut]
    ridge = .01 * np.trace(gram) / len(gram) * np.eye(len(gram))
    w = np.linalg.solve(gram + ridge, x[:cut].T @ (y[:cut] - y.mean(0)))
    return (np.argmax(x[cut:] @ w, 1) == labels[cut:]).mean()


def test_looks_are_in_pictures_only_and_wording_in_titles_only():
    world = demo.World("probe", seed=3, n_items=600, n_users=0, no_picture=0, no_title=0)
    arrays = demo.make_items(world)
    del arrays["world"]
    arrays = {name: array[1:] for name, array in arrays.items()}
    uniform = np.random.RandomState(0).random_sample
    jitter = 2 * uniform((600, 10)) - 1
    words = demo.order(uniform((600, 4)))
    looks = list(zip(*(arrays[name] for name in (*demo.LOOK, "category"))))
    wording = list(zip(*(arrays[name] for name in ("category", *demo.WORDING))))
    seen = pixels(Image.fromarray(demo_goods.draw(*looks[i], jitter[i])) for i in range(600))
    entries = [demo_goods.describe(*wording[i], words[i]) for i in range(600)]
    told = hash_text([" ".join([entry["title"], *entry["text"]]) for entry in entries])
    for name in (*demo.LOOK, *demo.WORDING):
        shares = demo.ATTRIBUTES[name][0]
        chance = max(shares) / sum(shares)
        here, there = (seen, told) if name in demo.LOOK else (told, seen)
        assert probe(here, arrays[name]) > .9, name
        assert probe(there, arrays[name]) < chance + .12, name
    assert probe(seen, arrays["category"]) > .9
    assert probe(told, arrays["category"]) > .9


def test_details_are_told_but_not_to_the_built_in_encoders(tmp_path, monkeypatch):
    """The same purchases as in the plain shop; the colour is in a corner of the picture, the theme
    in the order of words, and neither in features."""
    knobs = dict(n_users=9, n_items=600, no_picture=0, no_title=0)
    world = demo.World("details", seed=3, told="in details", **knobs)
    monkeypatch.setitem(demo.WORLDS, "demo", world)
    raw = demo.read(demo.fetch("demo", tmp_path / "raw"), "demo")
    arrays, bought = made(replace(world, told="plainly"))
    assert raw.extra["oracle"]["colour"].tolist() == arrays["colour"].tolist()
    assert [*raw.items] == [raw.item_order[i - 1] for i in by_time(world, bought)]
    colours, themes = arrays["colour"][1:], arrays["theme"][1:]

    entries = [raw.catalog[key] for key in raw.item_order]
    pictures = [Image.open(tmp_path / "raw" / entry["images"][0]) for entry in entries]
    corner = [np.asarray(picture)[75:93, 75:93].ravel() / 255. for picture in pictures]
    assert probe(np.array(corner), colours) > .95
    assert probe(pixels(pictures), colours) < 1 / 6 + .2

    titles = [entry["title"] for entry in entries]
    told = {(entry["language"], re.search(r"(\w+) · (\w+) · (\w+)", title).groups()): theme
            for entry, title, theme in zip(entries, titles, themes)}
    assert len(told) == 6 * 6    # each theme has one order in each language
    features = hash_text([" ".join([entry["title"], *entry["text"]]) for entry in entries])
    assert probe(features, themes) < 1 / 6 + .1


def by_time(world, bought):
    """All purchases (U, L) in order of time."""
    times = demo.make_times(world)
    real = bought > 0
    return bought[real][np.argsort(times[real], kind="stable")]


def test_hash_text():
    texts = [
        'Mug "Harbour and anchor"', "", "MUG harbour, and ANCHOR!", "灯台とカモメ",
        "TV", "港", "?!", "ｍｕｇ harbour and anchor",
    ]
    rows = hash_text(texts)
    assert rows.dtype == np.float32
    assert rows.shape == (8, 256)
    filled = rows.any(1)
    assert filled.tolist() == [True, False, True, True, True, True, False, True]
    assert np.allclose(np.linalg.norm(rows[filled], axis=1), 1, atol=1e-6)
    assert np.array_equal(rows[0], rows[2])
    assert np.array_equal(rows[0], rows[7])
    assert np.array_equal(rows[3], hash_text(texts[3:4])[0])    # no statistics of the catalog
    assert hash_text([]).shape == (0, 256)


def test_pixels():
    pictures = [
        Image.new("RGB", (1, 1), "black"),
        Image.new("RGB", (300, 20), "white"),
        Image.new("RGB", (48, 48), "grey"),
        Image.new("RGB", (64, 64), "crimson"),
    ]
    rows = pixels(iter(pictures))
    assert rows.dtype == np.float32
    assert rows.shape == (4, 128)
    assert np.isfinite(rows).all()
    assert rows.any(1).all()
    assert np.array_equal(rows[3], pixels(pictures[3:])[0])    # no statistics of the catalog
    assert pixels([]).shape == (0, 128)
