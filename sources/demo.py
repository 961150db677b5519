"""Small shops, generated and drawn, whose next-purchase probabilities are known exactly.

How an item looks (colour, pattern, shape) is only in its picture; its wording (theme, make,
language) is only in its title; its category (bag, mug, lamp, clock, cushion, pendant) is in both.
Users buy what matches the looks and the wording of what they bought last, what they like at all
times, or follow habits. `step` says with which probability: the generator draws from it, and
`oracle` averages it over the kinds of users and their favourites, which it cannot see. So a shop is
an instrument: no model beats the full oracle but by luck. Oracles that see or know less say what
that is worth; they do not learn from what is bought together, as a model may that has item ids: for
such a model they are no bound.

`demo` is the plain shop; `demo:tastes` and the others of WORLDS are small changes of it, each made
for one question. `demo-b`, `demo-b:tastes` and so on are second shops: other items and users; the
same looks, words and tastes.

What is artificial: new items arrive just before each user's last two purchases; the oracle knows
how popular each item really is.

All randomness is `RandomState.random_sample` and own arithmetic on it, so a shop is the same under
any numpy.
"""
import json
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import load_arrays, naming, read_json, write_json
from common.tables import Keys, Raw

from .demo_goods import describe, draw


@dataclass(frozen=True)
class World:
    """One shop: its size, and the seed that everything in it comes from."""
    name: str = "demo"
    seed: int = 0
    n_users: int = 3000
    n_items: int = 1000
    shortest: int = 5          # a user's purchases: shortest + geometric ...
    mean: float = 9.0          # ... with this mean ...
    longest: int = 30          # ... cut at this length
    new: float = .04    # share of the items that are on the shelf for the last two purchases only
    rare: float = .30          # share of the old items whose popularity is divided by 4
    no_picture: float = .05
    no_title: float = .05      # no item lacks both
    kinds: str = "alike"       # of users: a row of KINDS
    favourites: int = 1        # colours, and themes, that a user likes best at all times
    lag: int = 2    # the wording of a purchase matches that of the last titled one, or, with 2, of
                    # the last titled one before the last
    scattered: float = 0.      # share of the items after which nearly anything is bought
    tongues: bool = False      # what goes with what, and what sells, differs by language
    linked: float = 0.         # share of the items whose theme goes with their colour
    # what a missing picture or title would have shown: "nothing" is made of it; or it is "known" to
    # the users, who see the goods; or it is "filled" in, colour for theme and theme for colour
    hidden: str = "nothing"
    # colour and theme are told "plainly", or "in details": by a seal in a corner of the picture and
    # the order of three words; to somebody who knows no details they are "overlooked"
    told: str = "plainly"
    translated: bool = False   # all titles are in the first language, as if an encoder knew them
                               # all; the catalog still says which language it was


QUESTIONS = {    # name: what differs from the plain shop
    "last": dict(favourites=0, lag=1, kinds="following"),
    "tastes": dict(favourites=2, kinds="apart"),
    "uncertainty": dict(kinds="steady", scattered=.5),
    "languages": dict(tongues=True, favourites=0, kinds="sharp"),
    "translated": dict(tongues=True, favourites=0, kinds="sharp", translated=True),
    "many": dict(tongues=True, favourites=0, kinds="sharp", translated=True, n_users=20_000),
    "missing": dict(linked=.9, hidden="known", no_picture=.3, no_title=.3),
    "content": dict(told="in details"),
    "cold": dict(new=.3),
    "few": dict(n_users=300),
}
SHOPS = {"demo": 0, "demo-b": 1}    # name: seed
WORLDS = {shop: World(shop, seed) for shop, seed in SHOPS.items()} | {
    f"{shop}:{question}": World(f"{shop}:{question}", seed, **knobs)
    for shop, seed in SHOPS.items() for question, knobs in QUESTIONS.items()
}
NAMES = tuple(SHOPS)
SHUFFLES = 4                   # orders of a history that an oracle averages over
LATE = 2                       # new items arrive before each user's last two purchases
ARRIVAL = 1709251200           # on 1 March 2024
DAY = 86400
NEW_POPULARITY = 1.5           # old items: exp(.4 x normal)

# kinds of users: shares; exponents of (look, wording); shares of (match, habit, any)
KINDS = {
    "following": (    # looks, words, both, habit
        (.25, (1.5, .4), (.90, .04, .06)),
        (.25, (.4, 1.5), (.90, .04, .06)),
        (.35, (1.2, 1.2), (.90, .04, .06)),
        (.15, (.8, .8), (.20, .74, .06)),
    ),
    "alike": ((1., (.7, .7), (.88, .06, .06)),),
    "sharp": ((1., (1.4, 1.4), (.88, .06, .06)),),
    "apart": (        # a taste for looks, a taste for words
        (.5, (1.2, .2), (.90, .04, .06)),
        (.5, (.2, 1.2), (.90, .04, .06)),
    ),
    "steady": (       # steady, scattered
        (.5, (2., 2.), (.90, .04, .06)),
        (.5, (.3, .3), (.90, .04, .06)),
    ),
}
FAVOURITE = (.1, .02)    # how well liked the next value on the wheel and any other are
SCATTER = .2             # factor of the exponents after a scattered item
SHIFT = 3                # in every second language colours go with those so far on the wheel
SUCCESSORS = np.array([.6, .4])    # habit: shares of an old item's two planted successors
# shares of the values; how likely the next value on the wheel and any other are, if the same is 1
ATTRIBUTES = {
    "colour": (6 * [1], .3, .04),
    "pattern": (3 * [1], .2, .2),
    "shape": (4 * [1], .4, .4),
    "theme": (6 * [1], .3, .04),
    "make": (4 * [1], .25, .25),
    "language": ([30, 18, 16, 12, 12, 12], .3, .3),
    "category": (6 * [1], .5, .5),
}
LOOK = ("colour", "pattern", "shape")          # what only a picture shows
WORDING = ("theme", "make", "language")        # what only a title says
VIEWS = {                                      # what an oracle sees
    "full": ("text", "image"),
    "without pictures": ("text",),
    "without text": ("image",),
    "without both": (),
}
BLIND = {    # by question: oracles that take the shop for another one
    "": {"blind to tastes": dict(favourites=0)},
    "tastes": {"blind to tastes": dict(favourites=0)},
    "uncertainty": {"blind to steadiness": dict(kinds="alike", scattered=0.)},
    "languages": {"blind to languages": dict(tongues=False)},
    "translated": {"blind to languages": dict(tongues=False)},
    "many": {"blind to languages": dict(tongues=False)},
    "missing": {"filling in": dict(hidden="filled"), "filling nothing in": dict(hidden="nothing")},
    "content": {"overlooking details": dict(told="overlooked")},
}


# ---------------- chance

def stream(world, part):
    """random_sample of a generator for each part of a world: no part moves the others."""
    parts = ("items", "users", "times", "words", "pictures")
    seed = len(parts) * world.seed + parts.index(part)
    return np.random.RandomState(seed).random_sample


def order(uniform):
    """The positions that sort each row, a random order of random rows: (..., n) -> (..., n)"""
    return np.argsort(uniform, axis=-1, kind="stable")


def spread(uniform, shares):
    """Values 0..len(shares)-1 in exactly these shares, in random order: (n,) -> (n,)"""
    place = (order(order(uniform)) + .5) / len(uniform)
    return np.searchsorted(np.cumsum(shares) / np.sum(shares), place)


def choose(weights, uniform):
    """A column of each row, drawn in proportion to its weight: (R, n), (R,) -> (R,)"""
    cdf = np.cumsum(weights, axis=1)
    return (cdf <= uniform[:, None] * cdf[:, -1:]).sum(1)


# ---------------- items and users

def make_items(world):
    """All about the items that decides what is bought: arrays (N+1, ...), row 0 is padding."""
    n = world.n_items
    uniform = stream(world, "items")
    columns = {name: spread(uniform(n), shares) for name, (shares, _, _) in ATTRIBUTES.items()}
    old = 1 - world.new
    age = spread(uniform(n), [world.new, old * world.rare, old * (1 - world.rare)])
    lacks_nothing = 1 - world.no_picture - world.no_title
    lack = spread(uniform(n), [world.no_picture, world.no_title, lacks_nothing])
    radius = np.sqrt(-2 * np.log(1 - uniform(n)))
    normal = radius * np.cos(2 * np.pi * uniform(n))    # Box-Muller
    usual = np.exp(.4 * normal)
    columns["new"] = age == 0
    columns["pictured"] = lack != 0
    columns["titled"] = lack != 1
    columns["popularity"] = np.choose(age, [NEW_POPULARITY, usual / 4, usual])
    arrays = {
        name: np.concatenate([np.zeros(1, column.dtype), column])
        for name, column in columns.items()
    }

    habitual = (arrays["popularity"] > 0) & ~arrays["new"]    # habits know no new items
    others = arrays["popularity"] * habitual * (1 - np.eye(n + 1))
    first = choose(others, uniform(n + 1))
    others[np.arange(n + 1), first] = 0
    second = choose(others, uniform(n + 1))
    successors = np.stack([first, second], axis=1)            # (N+1, 2)
    arrays["successors"] = successors * habitual[:, None]     # 0 = none

    linked = uniform(n + 1) < world.linked
    arrays["theme"] = np.where(linked, arrays["colour"], arrays["theme"])
    scattered = uniform(n + 1) < world.scattered
    arrays["steadiness"] = np.where(scattered, SCATTER, 1.)
    sells = np.exp(2 * uniform((6, 6)) - 1)                   # by language and category
    if world.tongues:
        arrays["popularity"] = arrays["popularity"] * sells[arrays["language"], arrays["category"]]
    arrays["world"] = np.array(json.dumps(asdict(world)))
    return arrays


def world_of(arrays) -> World:
    """The world that the arrays of `make_items` belong to."""
    return World(**json.loads(str(arrays["world"])))


def make_users(world, arrays):
    """What all users buy: left-padded item ids (U, longest). Also each user's kind (U,), which no
    oracle may see, as it may not see the favourites."""
    n = world.n_users
    uniform = stream(world, "users")
    taste = Taste(arrays)
    kinds = spread(uniform(n), taste.prior)
    stop = 1 / (1 + world.mean - world.shortest)
    extra = np.log(1 - uniform(n)) / np.log(1 - stop)         # geometric, from 0
    start = np.maximum(world.longest - world.shortest - np.floor(extra), 0)
    draws = uniform((n, world.longest))
    liked = spread(uniform(n), np.ones(taste.liked.shape[1]))
    bought = np.zeros((n, world.longest), int)
    for t in range(world.longest):
        late = t >= world.longest - LATE
        for kind in range(len(taste.prior)):
            rows = np.flatnonzero((start <= t) & (kinds == kind))
            p = step(taste, kind, bought[rows, :t], late, liked[rows])
            bought[rows, t] = choose(p, draws[rows, t])
    return bought, kinds


def make_times(world):
    """Seconds of all purchases (U, longest): users buy every 1 to 7 days, each at an own pace and
    time of day."""
    uniform = stream(world, "times")
    pace = np.floor(1 + 7 * uniform(world.n_users))
    second = np.floor(DAY * uniform(world.n_users))
    steps = np.arange(world.longest) - (world.longest - LATE)    # 0 = the first after the arrival
    return (ARRIVAL + DAY * steps * pace[:, None] + second[:, None]).astype(int)


# ---------------- what is bought next, and the oracle

class Taste:
    """What moves purchases, as far as somebody knows who sees titles ("text"), pictures ("image"),
    both or neither.

    takes_for: knobs of the world that somebody has wrong.
    """

    def __init__(self, arrays, sees=VIEWS["full"], takes_for=None):
        world = replace(world_of(arrays), **(takes_for or {}))
        self.lag = world.lag
        self.prior, sharpness, self.channels = map(np.array, zip(*KINDS[world.kinds]))
        self.popularity = arrays["popularity"]
        self.new = arrays["new"]
        self.successors = arrays["successors"]
        shown, told = arrays["pictured"], arrays["titled"]
        if world.hidden == "known" and sees == VIEWS["full"]:
            shown = told = np.arange(len(shown)) > 0    # 0 is padding
        self.pictured = shown & ("image" in sees)
        self.titled = told & ("text" in sees)
        self.category = closeness(arrays, ("category",), self.pictured | self.titled, 1)
        steadiness = arrays["steadiness"] if world.scattered else np.ones(len(shown))
        turned = None
        if world.tongues:
            turned = np.where(self.titled, arrays["language"] % 2, -1)
        looks, words = LOOK, WORDING
        liked_as = self.pictured, self.titled
        if world.told == "overlooked":    # colour and theme, which come first
            looks, words = LOOK[1:], WORDING[1:]
            liked_as = np.zeros((2, len(shown)), bool)
        self.look = []       # by kind of user
        self.wording = []
        for look, wording in sharpness:
            self.look.append(closeness(arrays, looks, self.pictured, look * steadiness, turned))
            self.wording.append(closeness(arrays, words, self.titled, wording * steadiness))
        self.liked = likings(arrays, world.favourites, *liked_as)    # (N+1, K)
        if world.hidden == "filled":
            self.fill_in(arrays, world.favourites, sharpness * steadiness.mean())

    def fill_in(self, arrays, favourites, sharpness):
        """Take the theme for the colour of what has no picture, and the colour for the theme of
        what has no title; the other attributes stay unknown."""
        everything = np.arange(len(self.pictured)) > 0
        guessed = arrays | {
            "colour": np.where(self.pictured, arrays["colour"], arrays["theme"]),
            "theme": np.where(self.titled, arrays["theme"], arrays["colour"]),
        }
        for kind, (look, wording) in enumerate(sharpness):
            self.look[kind] = closeness(guessed, LOOK[:1], everything, look)
            self.look[kind] *= closeness(arrays, LOOK[1:], self.pictured, look)
            self.wording[kind] = closeness(guessed, WORDING[:1], everything, wording)
            self.wording[kind] *= closeness(arrays, WORDING[1:], self.titled, wording)
        self.liked = likings(guessed, favourites, everything, everything)
        self.pictured = self.titled = everything


def wheel(name, ahead):
    """How likely values so many steps ahead on the wheel of an attribute are; the same is 1."""
    shares, after, other = ATTRIBUTES[name]
    return np.array([1, after, other])[np.minimum(ahead % len(shares), 2)]


def closeness(arrays, names, seen, power, turned=None):
    """How much likelier item j (column) is after item i (row): (N+1, N+1), over attributes.

    power: exponent, one or of each row (N+1,). turned: of each row whether its colours go with
    those SHIFT ahead (1), or with their like (0); -1: not known. A column that is not seen gets the
    mean of those that are; a row that is not seen says nothing: 1.
    """
    power = np.broadcast_to(power, seen.shape)[:, None]
    factor = np.ones((len(seen), len(seen)))
    for name in names:
        ahead = arrays[name] - arrays[name][:, None]
        likely = wheel(name, ahead)
        if name == "colour" and turned is not None:
            other = wheel(name, ahead - SHIFT)
            ways = [likely, other, (likely + other) / 2]
            likely = np.choose(turned[:, None] % 3, ways)
        factor *= likely ** power
    factor[:, ~seen] = factor[:, seen].sum(1, keepdims=True) / max(seen.sum(), 1)
    factor[~seen] = 1
    return factor


def likings(arrays, count, pictured, titled):
    """How well a user likes each item at all times: (N+1, K), for every choice of `count` favourite
    colours and as many favourite themes; ones (N+1, 1) for none."""
    if count == 0:
        return np.ones((len(pictured), 1))
    by_colour = liking(arrays["colour"], 6, count, pictured)    # (N+1, choices)
    by_theme = liking(arrays["theme"], 6, count, titled)
    return (by_colour[:, :, None] * by_theme[:, None]).reshape(len(pictured), -1)


def liking(value, size, count, seen):
    """(N+1,) values on a wheel -> (N+1, choices): how well the favourites go with each, on average;
    an item that is not seen gets the mean of those that are."""
    ahead = (value[:, None] - np.arange(size)) % size
    each = np.array([1, *FAVOURITE])[np.minimum(ahead, 2)]      # (N+1, size)
    choices = list(combinations(range(size), count))
    liked = np.stack([each[:, list(choice)].mean(1) for choice in choices], axis=1)
    liked[~seen] = liked[seen].sum(0) / max(seen.sum(), 1) if seen.any() else 1
    return liked


def last_seen(prefix, seen):
    """The last id of each row (R, L) that has `seen` (N+1,), 0 where there is none: (R,)"""
    at = (seen[prefix] * np.arange(1, prefix.shape[1] + 1)).max(1, initial=0)
    with_none = np.hstack([np.zeros((len(prefix), 1), int), prefix])
    return with_none[np.arange(len(prefix)), at]


def step(taste, kind, prefix, late, liked):
    """Probabilities (R, N+1) of the next purchase of R users of one kind.

    prefix: all that they bought before, in order (R, L), 0 = padding. late: are the new items on
    the shelf? liked: the column of `taste.liked` of each (R,). Habit acts as `any` where it has
    nothing to offer: after a new item, or when both successors are bought.
    """
    match, rest = ways(taste, kind, prefix, late)
    match *= taste.liked[:, liked].T
    return match * (taste.channels[kind][0] / match.sum(1))[:, None] + rest


def ways(taste, kind, prefix, late):
    """Two ways to the next purchase (R, N+1): how well each item matches what was bought before,
    whatever is liked; and the probability to be bought by habit or for no reason."""
    rows = np.arange(len(prefix))[:, None]
    on_shelf = np.where(taste.new & (not late), 0, taste.popularity)
    shelf = np.tile(on_shelf, (len(prefix), 1))
    shelf[rows, prefix] = 0    # nothing is bought twice
    last = last_seen(prefix, taste.popularity > 0)
    before = prefix[:, :prefix.shape[1] + 1 - taste.lag]
    match = shelf * taste.category[last]
    match *= taste.look[kind][last_seen(prefix, taste.pictured)]
    match *= taste.wording[kind][last_seen(before, taste.titled)]
    planted = SUCCESSORS * (shelf[rows, taste.successors[last]] > 0)    # (R, 2)
    offered = planted.sum(1)
    _, to_habit, to_any = taste.channels[kind]
    rest = shelf * ((to_any + to_habit * (offered == 0)) / shelf.sum(1))[:, None]
    by_habit = to_habit * planted / np.where(offered > 0, offered, 1)[:, None]
    rest[rows, taste.successors[last]] += by_habit
    return match, rest


def oracle(arrays, histories, sees=VIEWS["full"], late=LATE, takes_for=None):
    """Probabilities (U, N+1) of the next purchase for whoever knows the shop and the history, but
    not the kind of user and the favourites.

    arrays: `extra["oracle"]` of `read`. histories: all that each user bought before, left-padded
    ids (U, L). late: how many of a user's purchases up to the predicted one have new items on the
    shelf: 0 training, 1 validation, 2 test. takes_for: knobs of the world that it has wrong.
    Factors that are not seen are 1. Each row sums to 1; column 0 and what was bought are 0.
    """
    taste = Taste(arrays, sees, takes_for)
    histories = np.asarray(histories)
    blocks = np.split(histories, range(256, len(histories), 256))    # bounds the memory
    return np.concatenate([average(taste, block, late) for block in blocks])


def average(taste, histories, late):
    """`step` averaged over the posterior of kinds and favourites: the prior times the probability
    of each purchase so far."""
    kinds = range(len(taste.prior))
    length = histories.shape[1]
    evidence = np.log(taste.prior)[:, None] + np.zeros((len(histories), 1, taste.liked.shape[1]))
    for t in range(length):
        rows = np.flatnonzero(histories[:, t])
        if len(rows) == 0:
            continue
        item = histories[rows, t]
        for kind in kinds:
            match, rest = ways(taste, kind, histories[rows, :t], late=t > length - late)
            here = np.arange(len(rows)), item
            matched = match[here][:, None] * taste.liked[item] / (match @ taste.liked)    # (R, K)
            p = taste.channels[kind][0] * matched + rest[here][:, None]
            evidence[rows, kind] += np.log(np.maximum(p, 1e-300))    # a wrong oracle may say never
    evidence -= evidence.max((1, 2), keepdims=True)
    posterior = np.exp(evidence)                                     # (U, kinds, K)
    posterior /= posterior.sum((1, 2), keepdims=True)
    total = 0
    for kind in kinds:
        match, rest = ways(taste, kind, histories, late=late > 0)
        liked = (posterior[:, kind] / (match @ taste.liked)) @ taste.liked.T    # (U, N+1)
        share = posterior[:, kind].sum(1, keepdims=True)
        total = total + taste.channels[kind][0] * match * liked + share * rest
    return total


def views(arrays, histories, late=LATE) -> dict:
    """{view: probabilities (U, N+1)} of all oracles that say something in a world: VIEWS; those
    that see the last item alone, or the history shuffled; and those that are blind of what the
    world is made for."""
    found = {view: oracle(arrays, histories, sees, late) for view, sees in VIEWS.items()}
    found["of the last item"] = oracle(arrays, histories[:, -1:], late=late)
    shuffled = [oracle(arrays, shuffle(histories, seed), late=late) for seed in range(SHUFFLES)]
    found["of the history shuffled"] = sum(shuffled) / SHUFFLES
    question = world_of(arrays).name.partition(":")[2]
    for view, knobs in BLIND.get(question, {}).items():
        found[view] = oracle(arrays, histories, late=late, takes_for=knobs)
    return found


def shuffle(histories, seed):
    """Each row's items in random order, behind its padding: (U, L) -> (U, L)"""
    uniform = np.random.RandomState(seed).random_sample(histories.shape)
    uniform[histories == 0] = -1
    return np.take_along_axis(histories, order(uniform), 1)


def ceiling(arrays, histories, targets, late=LATE, among=None, k=10):
    """Ranking by the oracle: {view: {"expected" | "realised": {"recall@10": ..., "ndcg@10": ...}}}

    histories (U, L), targets (U,), late: as in `oracle`. among: optional mask (N+1,) of the
    targets that count, such as cold items. Expected: by the full oracle's probabilities, which are
    the truth, whatever the view. Realised: on the targets. Ties count against the target.
    """
    by_view = views(arrays, np.asarray(histories), late)
    truth = by_view["full"]
    targets = np.asarray(targets)[:, None]
    among = np.ones(truth.shape[1]) if among is None else np.asarray(among)
    table = {}
    for view, p in by_view.items():
        best = np.argsort(-p, axis=1)[:, :k]
        likely = np.take_along_axis(truth, best, 1) * among[best]
        table[view] = {
            "expected": gains(p, best, likely, (truth * among).sum(), k),
            "realised": gains(p, targets, among[targets], among[targets].sum(), k),
        }
    return table


def gains(p, ids, weights, total, k):
    """Recall and NDCG at k of items `ids` (U, n) with their weights, ranked by p (U, N+1)."""
    ranks = []
    for column in ids.T:
        ranks.append((p >= np.take_along_axis(p, column[:, None], 1)).sum(1))
    rank = np.stack(ranks, axis=1)                            # 1 = first
    hit = weights * (rank <= k) / max(total, 1e-9)            # (U, n)
    return {f"recall@{k}": float(hit.sum()), f"ndcg@{k}": float((hit / np.log2(rank + 1)).sum())}


def reached(folder, histories, targets) -> dict:
    """{"oracle": metrics, "oracle without text": ...} on the test targets of a processed shop; {}
    for any other folder."""
    if not (folder / "oracle.npz").is_file():
        return {}
    advice = f"remove the folder {folder} and prepare the data again"
    arrays = load_arrays(folder / "oracle.npz", advice)
    if "world" not in arrays:    # drawn before there were several
        return {}
    by_view = ceiling(arrays, histories, targets)
    return {
        "oracle" if view == "full" else f"oracle {view}": metrics["realised"]
        for view, metrics in by_view.items()
    }


# ---------------- the source

def recognises(folder):
    return False    # nobody has this shop in a folder of their own


def knows(name):
    """demo:tastes and the other shops that are made for a question."""
    return name in WORLDS


def item_keys(world):
    name = world.name.replace(":", "-")
    return [f"{name}-{i:04d}" for i in range(1, world.n_items + 1)]


def fetch(name, raw, mirror=None):
    """Draw the shop into raw/images; raw/world.json, written last, says of which world."""
    world = WORLDS[name]
    done = Path(raw) / "world.json"
    if done.exists() and read_json(done) == asdict(world):
        return done.parent
    arrays = make_items(world)
    uniform = stream(world, "pictures")
    jitter = 2 * uniform((world.n_items, 10)) - 1
    details = seals(world, arrays, uniform)
    folder = done.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for i, key in enumerate(item_keys(world), start=1):
        if arrays["pictured"][i]:
            looks = {name: arrays[name][i] for name in (*LOOK, "category")}
            picture = draw(**looks | details[i - 1], jitter=jitter[i - 1])
            path = folder / f"{key}.png"
            with naming(path):
                Image.fromarray(picture).save(path)
    write_json(done, asdict(world))
    return done.parent


def seals(world, arrays, uniform):
    """What else `draw` is told of each item: nothing, or, where details tell, the seal that stands
    for the colour, and a body of any colour."""
    if world.told == "plainly":
        return [{}] * world.n_items
    body = spread(uniform(world.n_items), ATTRIBUTES["colour"][0])
    shift = 2 * uniform((world.n_items, 2)) - 1
    return [
        {"colour": colour, "seal": seal, "seal_shift": place}
        for colour, seal, place in zip(body, arrays["colour"][1:], shift)
    ]


def read(folder, name):
    """The shop as a Raw, in order of time."""
    world = WORLDS[name]
    arrays = make_items(world)
    keys = item_keys(world)
    words = order(stream(world, "words")((world.n_items, 4)))
    catalog = {}
    for i, key in enumerate(keys, start=1):
        item = {"title": "", "text": [], "language": ""}
        if arrays["titled"][i]:
            wording = [arrays[name][i] for name in ("category", *WORDING)]
            item = describe(
                *wording, words[i - 1],
                in_order=world.told == "in details", translated=world.translated,
            )
        item["images"] = [f"images/{key}.png"] if arrays["pictured"][i] else []
        catalog[key] = item

    bought, _ = make_users(world, arrays)
    times = make_times(world)
    users, steps = np.nonzero(bought)
    by_time = order(times[users, steps])
    users, steps = users[by_time], steps[by_time]
    return Raw(
        users=Keys(f"{world.name}-user-{user + 1:04d}" for user in users),
        items=Keys(keys[item - 1] for item in bought[users, steps]),
        times=times[users, steps],
        catalog=catalog,
        item_order=keys,
        image_root=f"../raw/{name.replace(':', '-')}",
        extra={"oracle": arrays},
    )
