"""What is known of an item, from an object or a row whose keys have usual names.

`Items` collects a catalog: titles, texts, languages and pictures; and, for the sentences that are
printed, the keys that it did not know and the pictures that it refused. Names of keys are compared
as in interactions.py.
"""
import ast
import json
import re
from collections import Counter
from pathlib import PurePosixPath, PureWindowsPath

from .files import SURROGATE, UserError
from .interactions import ITEMS, find, one_form, plain_name
from .tables import (
    MISSING,
    clean_text,
    cut,
    each_object,
    each_row,
    first_of,
    form_of,
    header_of,
    sentences,
)

TITLES = (
    "title", "name", "itemname", "itemtitle", "productname", "producttitle", "prodname",
    "movietitle", "moviename",
)
TEXTS = (    # in the order in which they stand in an item's texts
    ("text", "texts"),
    ("description", "desc", "detaildesc", "overview", "summary", "abstract", "plot", "synopsis"),
    ("features", "feature", "bulletpoints", "bullets"),
    ("categories", "category", "maincategory", "genres", "genre", "class", "tags",
     "keywords"),
    ("brand", "store", "manufacturer", "author", "authors", "artist", "publisher"),
    ("color", "colour", "material", "style"),
)
KEYS = (*ITEMS, "id")    # in a table of interactions an id would be that of its line
LISTED = {"categories", "category", "maincategory", "genres", "genre", "tags", "keywords"}
CATALOGS = ("items.jsonl", "items.csv", "items.tsv")
LANGUAGES = ("language", "lang", "locale")
IMAGES = (
    "images", "image", "imageurl", "imageurls", "imgurl", "imurl", "img", "imgs", "imagepath",
    "imagepaths", "imagefile", "picture", "pictures", "pictureurl", "photo", "photos", "thumbnail",
    "poster", "posterurl", "cover", "coverurl", "imageurlhighres",
)
ALL_READ = {*sum(TEXTS, ()), *IMAGES}    # of the other names the first that has a text is read
BETWEEN = re.compile(r"""(['"])\s+(['"])""")    # texts in an array that numpy has printed
SEVERAL = re.compile(r"\s*[|;]\s*|[,\s]+(?=https?://)")    # between the pictures in one cell


class Items:
    """A catalog, filled by `read`."""

    def __init__(self):
        self.catalog = {}          # item key -> title, text, language, images
        self.file = ""             # the name of the file that was read last
        self.twice = 0             # described again: the first counts
        self.gaps = False          # whether there are more lines than items
        self.unread = Counter()    # key -> in how many items it was not read
        self.refused = Counter()   # why -> how many pictures
        self.first_refused = ""

    def read_beside(self, folder, report) -> list:
        """Add the catalog of a folder, if it has one: CATALOGS -> sentences on what is not used.

        report: where its lines are counted. Raises UserError.
        """
        path = first_of(folder, CATALOGS)
        if path is None:
            return []
        report[path.name] = self.read(path)
        return self.notes()

    def read(self, path, form=None) -> dict:
        """Add items.jsonl or a table of items -> the counts of its lines. Raises UserError."""
        counts = self.read_lines(path, form)
        self.gaps = counts["lines"] > len(self.catalog)
        return counts

    def read_lines(self, path, form):
        self.file = path.name
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            return each_object(path, self.take)
        form = form or form_of(path)
        header = header_of(path, form)
        item = find(header, KEYS)
        if item is None:
            raise UserError(
                f"{path} must begin with a line that names the column of the items' keys (it "
                f"begins with {cut(', '.join(header))}): write a header such as item,title; "
                f"docs/data.md has the names that are known"
            )
        others = [name for name in header if name not in ("", item)]

        def take(key, *cells):
            row = {name: value_of(cell) for name, cell in zip(others, cells)}
            for name, value in row.items():
                if plain_name(name) in IMAGES and isinstance(value, str):
                    row[name] = SEVERAL.split(value)
            return self.take({"item": key, **row})

        return each_row(path, (item,), take, others, form)

    def take(self, row):
        """An object that describes an item; None, or why it cannot be used."""
        plain = {}
        for name, value in row.items():    # of two that are one plain name, the first with a text
            if not clean_text(plain.get(plain_name(name))):
                plain[plain_name(name)] = value
        item = next((name for name in KEYS if name in plain), None)
        key = key_of(plain.get(item))
        if not key:
            return "no_item"
        if key in self.catalog:
            self.twice += 1
            return None
        title, language = first_text(plain, TITLES), first_text(plain, LANGUAGES)
        read = {item, title, language, *ALL_READ}
        for name, value in row.items():
            if plain_name(name) not in read and clean_text(value):
                self.unread[SURROGATE.sub("?", name)] += 1
        self.catalog[key] = {
            "title": clean_text(plain.get(title)),
            "text": sentences(*texts_of(plain)),
            "language": clean_text(plain.get(language)),
            "images": list(dict.fromkeys(self.images_of(plain))),
        }
        return None

    def images_of(self, plain):
        """Yield the addresses, and the paths inside the folder; others are refused and counted."""
        for name in IMAGES:
            for image in as_list(plain.get(name)):
                if image in ("", None):
                    continue
                why = refusal_of(image)
                if why is None:
                    yield image
                    continue
                self.first_refused = self.first_refused or SURROGATE.sub("?", str(image)[:60])
                self.refused[why] += 1

    def notes(self) -> list:
        """One sentence for each kind of thing that was given and is not used."""
        name = self.file
        notes = []
        if self.unread:
            keys = ", ".join(f"{key} ({count})" for key, count in self.unread.most_common())
            notes.append(f"{name}: keys not read: {keys}")
        if self.twice:
            notes.append(f"{name} describes {self.twice} items twice: the first counts")
        if self.refused:
            kinds = ", ".join(f"{why} {count}" for why, count in self.refused.items())
            notes.append(
                f"{name}: {self.refused.total()} picture paths refused ({kinds}), the first is "
                f"{self.first_refused}: give paths inside the folder, with /, or addresses"
            )
        return notes


def key_of(value) -> str:
    """An item's key; "" for what is none: true, a list, a lone surrogate."""
    if isinstance(value, float) and value.is_integer():    # as pandas writes what has gaps
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    key = " ".join(str(value).split())
    return "" if SURROGATE.search(key) or key.casefold() in MISSING else key


def first_text(plain, names):
    """The first of some names whose value has any text; None where none has."""
    return next((name for name in names if clean_text(plain.get(name))), None)


def texts_of(plain):
    """Yield the texts of an object. Categories are one text, with commas between them."""
    for names in TEXTS:
        for name in names:
            value = plain.get(name)
            if name in LISTED:
                yield ", ".join(filter(None, map(clean_text, flat(value))))
            else:
                yield from as_list(value)


def flat(value):
    """Yield what lists inside lists hold."""
    for part in as_list(value):
        if isinstance(part, list):
            yield from flat(part)
        else:
            yield part


def as_list(value) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def value_of(cell):
    """What a cell of a table says: a text, or the list that a program has written into it."""
    cell = cell.strip()
    if cell.casefold() in MISSING:
        return None
    if cell.startswith("[") and cell.endswith("]"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(BETWEEN.sub(r"\1, \2", cell))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pass
    return cell


def refusal_of(image):
    """Why a picture is refused; None for an address and for a path inside the folder."""
    if not isinstance(image, str) or SURROGATE.search(image):
        return "no text"
    if image.startswith(("http://", "https://")):
        return None
    if re.match(r"[a-z]{2,}:", image):    # data:, file:, ftp:
        return "neither a path nor a web address"
    if "\\" in image or PureWindowsPath(image).drive:
        return "backslash or drive"
    path = PurePosixPath(image)
    if path.is_absolute():
        return "absolute"
    if ".." in path.parts or not path.parts or "\0" in image:
        return "leaves the folder, or is the folder"
    return None


# ---------------- two files that must speak of the same items

def order_of(catalog, items) -> list:
    """Keys in the order of the catalog, so that a file of vectors in that order fits, then the
    others: 2 before 10."""
    others = {*items} - catalog.keys()
    return [*catalog, *sorted(others, key=lambda key: (key.zfill(20), key))]


def notes_of_match(catalog, items, described_in, bought_in) -> list:
    """Sentences on the items that only one of two files has.

    catalog: keys. items: keys of the interactions. described_in, bought_in: names of the files.
    """
    bought = dict.fromkeys(items)
    if not (catalog and bought):
        return []
    idle = [key for key in catalog if key not in bought]
    unknown = [key for key in bought if key not in catalog]
    pairs = alike(idle, unknown)
    described, sold = pairs[0] if pairs else ([*idle, ""][0], [*unknown, ""][0])
    if len(idle) == len(catalog):
        return [
            f"none of the {len(idle)} items of {described_in} occurs in {bought_in} ({described} "
            f"against {sold}): are the ids written alike?"
        ]
    notes = []
    if pairs:
        notes.append(
            f"{len(pairs)} items seem to be written differently in {described_in} and in "
            f"{bought_in} ({described} against {sold}), and count as two"
        )
    if idle:
        notes.append(
            f"{len(idle)} of {len(catalog)} items of {described_in} do not occur in {bought_in}, "
            f"the first is {idle[0]}"
        )
    if unknown:
        notes.append(
            f"{len(unknown)} of {len(bought)} items of {bought_in} are not in {described_in}, the "
            f"first is {unknown[0]}"
        )
    return notes


def notes_of_undescribed(items, described, file) -> list:
    """A sentence on the items that a file of descriptions lacks, where they are half or more: then
    their keys may be written differently."""
    unknown = [key for key in items if key not in described]
    if not unknown or 2 * len(unknown) < len(items):
        return []
    return [
        f"{len(unknown)} of {len(items)} items are not in {file}, the first is {unknown[0]}: are "
        f"the ids written alike?"
    ]


def alike(some, others) -> list:
    """Pairs of keys that may mean the same item: 12 and 12.0, 0012 and 12, a7 and A7."""
    by_form = {bare(key): key for key in others}
    return [(key, by_form[bare(key)]) for key in some if bare(key) in by_form]


def bare(key) -> str:
    return "".join(filter(str.isalnum, one_form(key).casefold())).lstrip("0") or key
