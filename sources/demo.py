"""A small shop, generated and drawn, whose next-purchase probabilities are known exactly.

How an item looks (colour, pattern, shape) is only in its picture; its wording (theme, make,
language) is only in its title; its category (bag, mug, lamp, clock, cushion, pendant) is in both.
Users buy what matches the looks and the wording of what they bought last, or follow habits. `step`
says with which probability: the generator draws from it, and `oracle` averages it over the kinds
of user, which it cannot see. So the shop is an instrument: no model beats the full oracle but by
luck. The oracles that see no pictures, no titles or neither still know habits and popularity, but
do not learn looks from what is bought together, as a model may that has item ids: for such a model
they are no bound.

What is artificial: new items arrive just before each user's last two purchases; looks and wording
are independent, so a title restores nothing of a missing picture but the category; the oracle
knows how popular each item really is.

All randomness is `RandomState.random_sample` and own arithmetic on it, so the shop is the same
under any numpy. `demo-b` is a second shop: other items and users; the same looks, words and
tastes.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import read_json, write_json
from common.tables import Raw


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


WORLDS = {world.name: world for world in (World(), World("demo-b", seed=1))}
NAMES = tuple(WORLDS)
LATE = 2                       # new items arrive before each user's last two purchases
ARRIVAL = 1709251200           # on 1 March 2024
DAY = 86400
NEW_POPULARITY = 1.5           # old items: exp(.4 x normal)

KINDS = ("looks", "words", "both", "habit")    # what a user follows
PRIOR = np.array([.25, .25, .35, .15])         # shares of the kinds
SHARPNESS = ((1.5, .4), (.4, 1.5), (1.2, 1.2), (.8, .8))    # by kind: exponents of (look, wording)
CHANNELS = (                                   # by kind: shares of (match, habit, any)
    (.90, .04, .06),
    (.90, .04, .06),
    (.90, .04, .06),
    (.20, .74, .06),
)
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
    return arrays


def make_users(world, arrays):
    """What all users buy: left-padded item ids (U, longest). Also each user's kind (U,), which no
    oracle may see."""
    n = world.n_users
    uniform = stream(world, "users")
    taste = Taste(arrays)
    kinds = spread(uniform(n), PRIOR)
    stop = 1 / (1 + world.mean - world.shortest)
    extra = np.log(1 - uniform(n)) / np.log(1 - stop)         # geometric, from 0
    start = np.maximum(world.longest - world.shortest - np.floor(extra), 0)
    draws = uniform((n, world.longest))
    bought = np.zeros((n, world.longest), int)
    for t in range(world.longest):
        late = t >= world.longest - LATE
        for kind in range(len(KINDS)):
            rows = np.flatnonzero((start <= t) & (kinds == kind))
            p = step(taste, kind, bought[rows, :t], late)
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
    both or neither."""

    def __init__(self, arrays, sees=VIEWS["full"]):
        self.popularity = arrays["popularity"]
        self.new = arrays["new"]
        self.successors = arrays["successors"]
        self.pictured = arrays["pictured"] & ("image" in sees)
        self.titled = arrays["titled"] & ("text" in sees)
        self.category = closeness(arrays, ("category",), self.pictured | self.titled, 1)
        # by kind of user
        self.look = [closeness(arrays, LOOK, self.pictured, a) for a, _ in SHARPNESS]
        self.wording = [closeness(arrays, WORDING, self.titled, b) for _, b in SHARPNESS]


def closeness(arrays, names, seen, power):
    """How much likelier item j (column) is after item i (row): (N+1, N+1), over attributes.

    A column that is not seen gets the mean of those that are; a row that is not seen says nothing:
    1.
    """
    factor = np.ones((len(seen), len(seen)))
    for name in names:
        shares, after, other = ATTRIBUTES[name]
        value = np.arange(len(shares))
        ahead = (value - value[:, None]) % len(shares)
        wheel = np.array([1, after, other])[np.minimum(ahead, 2)] ** power
        factor *= wheel[np.ix_(arrays[name], arrays[name])]
    factor[:, ~seen] = factor[:, seen].sum(1, keepdims=True) / max(seen.sum(), 1)
    factor[~seen] = 1
    return factor


def last_seen(prefix, seen):
    """The last id of each row (R, L) that has `seen` (N+1,), 0 where there is none: (R,)"""
    at = (seen[prefix] * np.arange(1, prefix.shape[1] + 1)).max(1, initial=0)
    with_none = np.hstack([np.zeros((len(prefix), 1), int), prefix])
    return with_none[np.arange(len(prefix)), at]


def step(taste, kind, prefix, late):
    """Probabilities (R, N+1) of the next purchase of R users of one kind.

    prefix: all that they bought before, in order (R, L), 0 = padding. late: are the new items on
    the shelf? Habit acts as `any` where it has nothing to offer: after a new item, or when both
    successors are bought.
    """
    rows = np.arange(len(prefix))[:, None]
    on_shelf = np.where(taste.new & (not late), 0, taste.popularity)
    shelf = np.tile(on_shelf, (len(prefix), 1))
    shelf[rows, prefix] = 0    # nothing is bought twice
    last = last_seen(prefix, taste.popularity > 0)
    match = shelf * taste.category[last]
    match *= taste.look[kind][last_seen(prefix, taste.pictured)]
    match *= taste.wording[kind][last_seen(prefix, taste.titled)]
    planted = SUCCESSORS * (shelf[rows, taste.successors[last]] > 0)    # (R, 2)
    offered = planted.sum(1)
    to_match, to_habit, to_any = CHANNELS[kind]
    match *= (to_match / match.sum(1))[:, None]
    match += shelf * ((to_any + to_habit * (offered == 0)) / shelf.sum(1))[:, None]
    by_habit = to_habit * planted / np.where(offered > 0, offered, 1)[:, None]
    match[rows, taste.successors[last]] += by_habit
    return match


def oracle(arrays, histories, sees=VIEWS["full"], late=LATE):
    """Probabilities (U, N+1) of the next purchase for whoever knows the shop and the history, but
    not the kind of user.

    arrays: `extra["oracle"]` of `read`. histories: all that each user bought before, left-padded
    ids (U, L). late: how many of a user's purchases up to the predicted one have new items on the
    shelf: 0 training, 1 validation, 2 test. Factors that are not seen are 1. Each row sums to 1;
    column 0 and what was bought are 0.
    """
    taste = Taste(arrays, sees)
    histories = np.asarray(histories)
    blocks = np.split(histories, range(256, len(histories), 256))    # bounds the memory
    return np.concatenate([average_kinds(taste, block, late) for block in blocks])


def average_kinds(taste, histories, late):
    """`step` averaged over the posterior of the kinds: the prior times the probability of each
    purchase so far."""
    kinds = range(len(KINDS))
    length = histories.shape[1]
    evidence = np.tile(np.log(PRIOR), (len(histories), 1))    # (U, kinds)
    for t in range(length):
        rows = np.flatnonzero(histories[:, t])
        if len(rows) == 0:
            continue
        for kind in kinds:
            p = step(taste, kind, histories[rows, :t], late=t > length - late)
            evidence[rows, kind] += np.log(p[np.arange(len(rows)), histories[rows, t]])
    posterior = np.exp(evidence - evidence.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    return sum(posterior[:, [kind]] * step(taste, kind, histories, late=late > 0) for kind in kinds)


def ceiling(arrays, histories, targets, late=LATE, among=None, k=10):
    """Ranking by the oracle: {view: {"expected" | "realised": {"recall@10": ..., "ndcg@10": ...}}}

    histories (U, L), targets (U,), late: as in `oracle`. among: optional mask (N+1,) of the
    targets that count, such as cold items. Expected: by the full oracle's probabilities, which are
    the truth, whatever the view. Realised: on the targets. Ties count against the target.
    """
    by_view = {view: oracle(arrays, histories, sees, late) for view, sees in VIEWS.items()}
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
    with np.load(folder / "oracle.npz", allow_pickle=False) as arrays:
        views = ceiling(dict(arrays), histories, targets)
    return {
        "oracle" if view == "full" else f"oracle {view}": metrics["realised"]
        for view, metrics in views.items()
    }


# ---------------- titles

MAKES = ("Orvelle", "Marukita", "Solvane", "Tibrena")
NOUNS = {    # by category
    "en": "Handbag Mug Lamp Clock Cushion Pendant",
    "de": "Tasche Becher Lampe Wanduhr Kissen Anhänger",
    "ja": "バッグ マグカップ ランプ 時計 クッション ペンダント",
    "fr": "Sac Tasse Lampe Horloge Coussin Pendentif",
    "it": "Borsa Tazza Lampada Orologio Cuscino Ciondolo",
    "es": "Bolso Taza Lámpara Reloj Cojín Colgante",
}
WORDS = {    # four by theme: sea, travel, music, kitchen, forest, winter
    "en": "harbour anchor seagull lighthouse, suitcase compass passport railway, "
          "violin trumpet concert melody, cinnamon pepper basil vanilla, "
          "squirrel fern acorn badger, snowflake sleigh icicle mitten",
    "de": "Hafen Anker Möwe Leuchtturm, Koffer Kompass Reisepass Eisenbahn, "
          "Geige Trompete Konzert Melodie, Zimt Pfeffer Basilikum Vanille, "
          "Eichhörnchen Farn Eichel Dachs, Schneeflocke Schlitten Eiszapfen Handschuh",
    "ja": "港町 いかり カモメ 灯台, 旅行鞄 羅針盤 旅券 鉄道, バイオリン トランペット 演奏会 旋律, "
          "シナモン 胡椒 バジル バニラ, リス シダ どんぐり アナグマ, 雪片 そり つらら 手袋",
    "fr": "port ancre mouette phare, valise boussole passeport locomotive, "
          "violon trompette concert mélodie, cannelle poivre basilic vanille, "
          "écureuil fougère gland blaireau, flocon traîneau glaçon moufle",
    "it": "porto ancora gabbiano faro, valigia bussola passaporto ferrovia, "
          "violino tromba concerto melodia, cannella pepe basilico vaniglia, "
          "scoiattolo felce ghianda tasso, nevicata slitta ghiacciolo muffola",
    "es": "puerto ancla gaviota faro, maleta brújula pasaporte ferrocarril, "
          "violín trompeta concierto melodía, canela pimienta albahaca vainilla, "
          "ardilla helecho bellota tejón, nevada trineo carámbano manopla",
}
PHRASES = {    # the title; a sentence with the theme's other two words; one that tells nothing
    "en": (
        '{noun} "{A} and {b}", {make}',
        "It also tells of {c} and {d}.",
        "A gift for any day of the year.",
    ),
    "de": (
        "{noun} „{A} und {b}“, {make}",
        "Erzählt auch von {c} und {d}.",
        "Ein Geschenk für jeden Tag im Jahr.",
    ),
    "ja": (
        "{noun}「{A}と{b}」、{make}",
        "{c}と{d}の物語も。",
        "一年中いつでも喜ばれる贈り物です。",
    ),
    "fr": (
        "{noun} « {A} et {b} », {make}",
        "Raconte aussi {c} et {d}.",
        "Un cadeau pour tous les jours de l'année.",
    ),
    "it": (
        "{noun} «{A} e {b}», {make}",
        "Racconta anche di {c} e {d}.",
        "Un regalo per ogni giorno dell'anno.",
    ),
    "es": (
        "{noun} «{A} y {b}», {make}",
        "También habla de {c} y {d}.",
        "Un regalo para cualquier día del año.",
    ),
}


def describe(category, theme, make, language, words):
    """Title and sentences of one item. words: the order of the theme's four words."""
    language = tuple(PHRASES)[language]
    of_theme = WORDS[language].split(", ")[theme].split()
    a, b, c, d = (of_theme[word] for word in words)
    parts = {
        "noun": NOUNS[language].split()[category],
        "make": MAKES[make],
        "A": a[0].upper() + a[1:],
        "b": b,
        "c": c,
        "d": d,
    }
    title, *text = (phrase.format(**parts) for phrase in PHRASES[language])
    return {"title": title, "text": text, "language": language}


# ---------------- pictures
# Everything is a signed distance, negative inside, in units of the body; x runs right, y down.

SIDE = 96                         # pixels
LINE = .07                        # width of the outline
INK = np.array([66, 60, 62])      # colour of what is not the body
COLOURS = (
    (214, 58, 54), (236, 128, 44), (244, 200, 62), (84, 164, 84), (62, 112, 196), (132, 84, 170),
)


def disc(x, y, radius):
    return np.sqrt(x * x + y * y) - radius


def rod(x, y, ax, ay, bx, by, radius):
    """A line from a to b with round ends."""
    dx, dy = bx - ax, by - ay
    along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx ** 2 + dy ** 2), 0, 1)
    return disc(x - ax - along * dx, y - ay - along * dy, radius)


def round_body(x, y):
    return disc(x, y, .9)


def square(x, y):
    x, y = np.abs(x) - .66, np.abs(y) - .66
    return disc(np.maximum(x, 0), np.maximum(y, 0), .14) + np.minimum(np.maximum(x, y), 0)


def heart(x, y):
    x, y = np.abs(x) / 1.75, (.92 - y) / 1.75
    nearest = np.maximum(x + y, 0) / 2    # on the side, which is x = y
    to_tip = disc(x, y - 1, 0)
    to_side = disc(x - nearest, y - nearest, 0)
    below = np.minimum(to_tip, to_side) * np.sign(x - y)
    return 1.75 * np.where(x + y > 1, disc(x - .25, y - .75, np.sqrt(2) / 4), below)


def star(x, y):
    fifth = 2 * np.pi / 5
    turn = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)    # from the nearest tip
    return disc(x, y, 0) * np.cos(turn - .92) - 1.18 * np.cos(.92)


SHAPES = (round_body, square, heart, star)


def plain(x, y):
    return np.full(x.shape, 9.)


def stripes(x, y):
    return np.abs(2.4 * x % 1 - .5) / 2.4 - .11


def dots(x, y):
    shifted = 2.3 * x + np.floor(2.3 * y) % 2 / 2    # every second row by half a step
    return disc(shifted % 1 - .5, 2.3 * y % 1 - .5, .29) / 2.3


PATTERNS = (plain, stripes, dots)


def strap(x, y):
    return np.abs(disc(x, y + .85, .5)) - .09


def ear(x, y):
    return np.abs(disc(x - .95, y - .05, .42)) - .11


def cord_and_bulb(x, y):
    return np.minimum(rod(x, y, 0, 0, 0, -4, .05), disc(x, y - 1, .24))


def hands(x, y):
    return np.minimum(rod(x, y, 0, 0, 0, -.42, .08), rod(x, y, 0, 0, .27, .16, .08))


def tassels(x, y):
    x, y = abs(x), abs(y)
    return np.minimum(rod(x, y, 0, 0, 1, 1, .05), disc(x - 1.08, y - 1.08, .15))


def chain(x, y):
    return np.minimum(rod(abs(x), y, 0, -.6, 1.6, -4, .05), np.abs(disc(x, y + .95, .1)) - .05)


ACCESSORIES = (strap, ear, cord_and_bulb, hands, tassels, chain)    # by category, which they tell


def draw(colour, pattern, shape, category, jitter):
    """One picture, uint8 (SIDE, SIDE, 3).

    jitter: 10 numbers in [-1, 1] for size, angle, place (2), tint (4) and backdrop.
    """
    size = 25 + 3 * jitter[0]     # pixels per unit
    angle = .14 * jitter[1]       # radians
    across = np.arange(SIDE) + .5 - SIDE / 2
    right = (across - 4 * jitter[2])[None] / size
    down = (across - 2 - 3 * jitter[3])[:, None] / size
    x = right * np.cos(angle) + down * np.sin(angle)
    y = down * np.cos(angle) - right * np.sin(angle)
    canvas = np.zeros((SIDE, SIDE, 1)) + (238 + 6 * jitter[[8, 9, 7]])

    def paint(paint_colour, distance, blur=1.0, opacity=1.0):
        cover = opacity * np.clip(.5 - distance * size / blur, 0, 1)    # anti-aliased
        canvas[...] += (paint_colour - canvas) * cover[..., None]

    body = SHAPES[shape](x, y)
    accessory = ACCESSORIES[category](x, y)
    in_front = ACCESSORIES[category] is hands
    tint = np.array(COLOURS[colour]) * (1 + .05 * jitter[4]) + 8 * jitter[5:8]
    paint(INK, SHAPES[shape](x, y - .16), blur=9, opacity=.3)    # shadow
    if not in_front:
        paint(INK, accessory)
    paint(.72 * tint, body)                                      # outline
    paint(tint * (1 - .12 * down[..., None]), body + LINE)
    paint(.25 * tint + 188, np.maximum(body + LINE, PATTERNS[pattern](x, y)))
    if in_front:
        paint(INK, accessory)
    return np.floor(np.clip(canvas, 0, 255) + .5).astype(np.uint8)


# ---------------- the source

def recognises(folder):
    return False    # nobody has this shop in a folder of their own


def item_keys(world):
    return [f"{world.name}-{i:04d}" for i in range(1, world.n_items + 1)]


def fetch(name, raw, mirror=None):
    """Draw the shop into raw/images; raw/world.json, written last, says of which world."""
    world = WORLDS[name]
    done = Path(raw) / "world.json"
    if done.exists() and read_json(done) == asdict(world):
        return done.parent
    arrays = make_items(world)
    jitter = 2 * stream(world, "pictures")((world.n_items, 10)) - 1
    folder = done.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for i, key in enumerate(item_keys(world), start=1):
        if arrays["pictured"][i]:
            looks = [arrays[name][i] for name in (*LOOK, "category")]
            Image.fromarray(draw(*looks, jitter[i - 1])).save(folder / f"{key}.png")
    write_json(done, asdict(world))
    return done.parent


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
            item = describe(*wording, words[i - 1])
        item["images"] = [f"images/{key}.png"] if arrays["pictured"][i] else []
        catalog[key] = item

    bought, _ = make_users(world, arrays)
    times = make_times(world)
    users, steps = np.nonzero(bought)
    by_time = order(times[users, steps])
    users, steps = users[by_time], steps[by_time]
    return Raw(
        users=[f"{world.name}-user-{user + 1:04d}" for user in users],
        items=[keys[item - 1] for item in bought[users, steps]],
        times=times[users, steps].tolist(),
        catalog=catalog,
        item_order=keys,
        image_root=f"../raw/{name}",
        extra={"oracle": arrays},
    )
