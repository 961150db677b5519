"""The goods of the demo shops: a picture is drawn and a title written of an item's attributes.

A picture shows colour, pattern and shape, and by an accessory the category; a title tells theme,
make, language and category. Where details tell, the seal in a corner stands for the colour, and the
order of three words, the same in all titles of a language, for the theme.
"""
from itertools import permutations

import numpy as np

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


ORDERS = tuple(permutations(range(3)))    # of the first theme's first three words, by theme


def describe(category, theme, make, language, words, in_order=False, translated=False):
    """Title and sentences of one item, and its language.

    words: the order of the theme's four words. in_order: the theme is told by the order of words
    alone, which are the same in all titles of a language. translated: into the first language.
    """
    language = tuple(PHRASES)[language]
    spoken = tuple(PHRASES)[0] if translated else language
    by_theme = [of_theme.split() for of_theme in WORDS[spoken].split(", ")]
    title, sentence, gift = PHRASES[spoken]
    if in_order:
        a, b, c = (by_theme[0][word] for word in ORDERS[theme])
        before, after = title.split("{A}")[0], title.split("{b}")[1]
        phrases = before + "{A} · {b} · {c}" + after, gift
        d = None
    else:
        a, b, c, d = (by_theme[theme][word] for word in words)
        phrases = title, sentence, gift
    parts = {
        "noun": NOUNS[spoken].split()[category],
        "make": MAKES[make],
        "A": a[0].upper() + a[1:],
        "b": b,
        "c": c,
        "d": d,
    }
    title, *text = (phrase.format(**parts) for phrase in phrases)
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


SEALS = ((-1, -1), (1, -1), (-1, 1), (1, 1), (0, -1), (0, 1))    # see `seal_lines`
SEAL_PLACE = 36     # pixels from the middle, to the right and down
SEAL_SIZE = 3       # pixels from its middle to its lines
PAPER = np.array([250, 250, 250])


def seal_lines(x, y, seal):
    """A line down at the left, right or middle, and one across at the top or bottom: as much ink,
    and as much of it upright, in every seal."""
    down, across = SEALS[seal]
    return np.minimum(rod(x, y, down, -1, down, 1, .35), rod(x, y, -1, across, 1, across, .35))


def draw(colour, pattern, shape, category, jitter, seal=None, seal_shift=(0, 0)):
    """One picture, uint8 (SIDE, SIDE, 3).

    jitter: 10 numbers in [-1, 1] for size, angle, place (2), tint (4) and backdrop. seal: number of
    one of SEALS for the lower right corner, None: none; seal_shift: in pixels.
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
    if seal is not None:
        unit = SEAL_SIZE / size    # of the seal, in units of the body
        right = (across - SEAL_PLACE - seal_shift[0])[None] / SEAL_SIZE
        down = (across - SEAL_PLACE - seal_shift[1])[:, None] / SEAL_SIZE
        paint(PAPER, unit * disc(right, down, 1.9))
        paint(INK, unit * seal_lines(right, down, seal))
    return np.floor(np.clip(canvas, 0, 255) + .5).astype(np.uint8)
