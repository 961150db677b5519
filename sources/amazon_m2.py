"""Amazon-M2 (KDD Cup 2023): shopping sessions in six locales, with the products' texts.

sessions_train.csv   prev_items,next_item,locale; prev_items is a printed array over many lines,
                     "['B01' 'B02'\\n 'B03']"
products_train.csv   id,locale,title,price,brand,color,size,model,material,author,desc; most cells
                     may be empty
images/<id>.jpg      optional, and not part of the published set: whoever has pictures of products
                     puts them here, in any format that Pillow reads; <id>@UK.jpg is of one locale

Both tables may be compressed (.csv.gz). There are no users and no times: a session is taken for a
user, its order for time. A product has one row a locale, in the locale's language, so an item is a
product in a locale: `B01@UK`. Source:
https://www.aicrowd.com/challenges/amazon-kdd-cup-23-multilingual-recommendation-challenge (asks
for a login).
"""
import re
from array import array
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np

from common.files import UserError
from common.items import notes_of_undescribed
from common.tables import Keys, Raw, each_row, placed, sentences

LANGUAGES = {"UK": "en", "DE": "de", "JP": "ja", "ES": "es", "FR": "fr", "IT": "it"}
LOCALES = {f"m2-{locale.lower()}": locale for locale in LANGUAGES}    # name of the set: its locale
NAMES = (*LOCALES, "m2")
PAGE = "https://www.aicrowd.com/challenges/amazon-kdd-cup-23-multilingual-recommendation-challenge"
SESSIONS, PRODUCTS = "sessions_train.csv", "products_train.csv"
ATTRIBUTES = ("brand", "color", "size", "model", "material", "author")
ITEM = re.compile(r"""[^\s'",\[\]]+""")
# locale: sessions and items as SRMML prints them (Table I); it prints no number of interactions
PUBLISHED = {
    "UK": (1182181, 494409),
    "DE": (1111416, 513811),
    "JP": (979119, 389888),
    "ES": (89047, 41341),
    "FR": (117516, 43033),
    "IT": (126925, 48788),
}


def recognises(folder) -> bool:
    return all(placed(folder, table) for table in (SESSIONS, PRODUCTS))


def fetch(name, raw, mirror):
    """The folder with the two tables, for all names: `m2` beside the folder `raw`, or `raw`.

    Raises UserError where they have not been put by hand.
    """
    shared = raw.parent / "m2"
    for folder in (shared, raw):
        if recognises(folder):
            return folder
    raise UserError(
        f"{name} asks for a login and cannot be downloaded from here: get {SESSIONS} and "
        f"{PRODUCTS} from {PAGE} and put them into {shared.resolve()}"
    )


def read(folder, name) -> Raw:
    """The sessions of a name's locale, or of all (`m2`, and a folder), with their products.

    Nothing is filtered, by name or not. SRMML speaks of dropping what occurs fewer than five
    times, but prints the counts of sessions that nothing was dropped from, and a session has about
    five items, so that a 5-core would drop most.

    Raises UserError for a table that lacks a column, is damaged, or has more than 1 % unusable
    lines.
    """
    wanted = LOCALES.get(name)
    locales = {wanted} if wanted else LANGUAGES.keys()
    sessions, products = placed(folder, SESSIONS), placed(folder, PRODUCTS)
    report = {}
    users, items, times, report[sessions.name] = read_sessions(sessions, locales)
    used = items.names
    catalog, report[products.name] = read_products(products, used)
    report["items_without_metadata"] = len(used) - len(catalog)
    notes = [] if name else notes_of_undescribed(used, catalog, products.name)
    images = find_images(folder)
    if images:
        report["items_without_picture"] = len(used) - add_images(catalog, images, used)
        notes += note_of_strangers(images, used)
    published = {}
    if wanted:
        n_users, n_items = PUBLISHED[wanted]
        published = {"users": n_users, "items": n_items, "interactions": "-", "source": "SRMML"}
    return Raw(
        users, items, times, catalog,
        clock="order", report=report, published=published, notes=notes,
        image_root=str(Path(folder).resolve()),
    )


def read_sessions(path, locales) -> tuple:
    """-> users, items, times, counts.

    A session is named by its locale and a running number.
    """
    users, items, times = Keys(), Keys(), array("i")
    numbers = count(1)

    def take(previous, following, locale):
        number = next(numbers)
        locale = locale.strip().upper()
        session = ITEM.findall(previous)
        target = ITEM.findall(following)
        if locale not in LANGUAGES:
            return "no_locale"
        if not session:
            return "no_prev_items"
        if len(target) != 1:
            return "no_next_item"
        if "..." in session:    # how a printed array leaves out its middle
            return "prev_items_cut_short"
        if locale in locales:
            session = [f"{item}@{locale}" for item in session + target]
            users.extend([f"{locale}{number}"] * len(session))
            items.extend(session)
            times.extend(range(len(session)))

    counts = each_row(path, ("prev_items", "next_item", "locale"), take)
    return users, items, np.asarray(times), counts


def read_products(path, used) -> tuple:
    """-> catalog of the used items, counts. Of a product described twice, the first counts."""
    catalog = {}
    found = Counter()

    def take(product, locale, title, description, *attributes):
        product, locale = product.strip(), locale.strip().upper()
        if not product:
            return "no_product"
        if locale not in LANGUAGES:
            return "no_locale"
        key = f"{product}@{locale}"
        if key in catalog:
            found["duplicate_products"] += 1
        elif key in used:
            catalog[key] = {
                "title": "".join(known(title)),
                "text": known(description, ", ".join(known(*attributes))),
                "language": LANGUAGES[locale],
                "images": [],
            }

    counts = each_row(path, ("id", "locale", "title"), take, ("desc", *ATTRIBUTES))
    return catalog, counts | {"duplicate_products": found["duplicate_products"]}


def find_images(folder) -> dict:
    """{id, or id@locale: path} of the pictures in the folder images; {} where there is none."""
    folder = Path(folder) / "images"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return {name.rpartition(".")[0]: f"images/{name}" for name in names if "." in name[1:]}


def pictures_in(folder) -> int:
    """How many files lie in the folder images, which may come after the tables."""
    return len(find_images(folder))


def add_images(catalog, images, used) -> int:
    """Give each item the picture of its locale, else of its product -> how many have one."""
    pictured = 0
    for key in used:
        product, _, locale = key.partition("@")
        picture = images.get(key) or images.get(product)
        if picture:
            unknown = {"title": "", "text": [], "language": LANGUAGES[locale]}
            catalog.setdefault(key, unknown)["images"] = [picture]
            pictured += 1
    return pictured


def note_of_strangers(images, used) -> list:
    """A line on pictures whose name is no item's, if there are any."""
    products = {key.partition("@")[0] for key in used}
    strangers = [
        path for name, path in images.items() if name not in used and name not in products
    ]
    if not strangers:
        return []
    if len(strangers) == 1:
        return [f"1 picture is named after no item of the sessions: {strangers[0]}"]
    return [
        f"{len(strangers)} pictures are named after no item of the sessions, such as "
        f"{strangers[0]}"
    ]


def known(*cells) -> list:
    """Clean, distinct texts of the cells that are not missing; some programs write "nan"."""
    return [text for text in sentences(*cells) if text.casefold() != "nan"]
