"""Amazon reviews of 2014, 2018 and 2023: download, read, join with the product metadata.

        reviews, one JSON object a line        metadata, one object a line
2014    reviewerID, asin, unixReviewTime       asin, title, description, categories, brand, imUrl (Python literals)
2018    the same names                         asin, title, description, category, brand, imageURL, imageURLHighRes
2023    user_id, parent_asin, timestamp (ms)   parent_asin, title, description, categories, store, images

Reviews of 2014 and 2018 are dated to the day. `<Category>_5` holds the reviews of persons and products with five.
Sources: https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html (2014),
https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/ (2018), https://amazon-reviews-2023.github.io (2023).
"""
import ast
import gzip
import json
import re
import zlib
from collections import Counter
from itertools import islice, takewhile
from pathlib import Path

import numpy as np

from .common import Raw, UserError, clean_text, line_counts, sentences
from .download import download

MAX_IMAGES = 10
HOSTS = ("images-amazon.com", "ssl-images-amazon.com", "media-amazon.com")     # of pictures, with their subdomains
MAX_LINE = 1 << 22                       # bytes; a longer line is read in pieces, so that no line fills the memory
YEAR_1995, YEAR_2100 = 788_918_400, 4_102_444_800      # seconds; the first review is from 1995

# edition: (path of the reviews, path of the metadata, ((base address, suffix of the files there), ...)), {} = category
EDITIONS = {
    "2014": ("reviews_{}_5.json", "meta_{}.json", (
        ("https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/", ".gz"),
        ("https://mcauleylab.ucsd.edu/public_datasets/data/amazon/categoryFiles/", ".gz"))),
    "2018": ("categoryFilesSmall/{}_5.json", "metaFiles2/meta_{}.json", (
        ("https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/", ".gz"),
        ("https://jmcauley.ucsd.edu/data/amazon_v2/", ".gz"))),
    "2023": ("raw/review_categories/{}.jsonl", "raw/meta_categories/meta_{}.jsonl", (
        ("https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/", ".gz"),
        ("https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/", ""))),
}
# name: (edition, category, users, items and interactions as a paper prints them, the paper)
SETS = {
    "pantry": ("2018", "Prime_Pantry", 13101, 4898, 126962, "UniSRec"),
    "scientific": ("2018", "Industrial_and_Scientific", 8442, 4385, 59427, "UniSRec"),
    "instruments": ("2018", "Musical_Instruments", 24962, 9964, 208926, "UniSRec"),
    "arts": ("2018", "Arts_Crafts_and_Sewing", 45486, 21019, 395150, "UniSRec"),
    "office": ("2018", "Office_Products", 87436, 25986, 684837, "UniSRec"),
    "beauty": ("2014", "Beauty", 22363, 12101, 198502, "S3-Rec"),
    "sports": ("2014", "Sports_and_Outdoors", 35598, 18357, 296337, "S3-Rec"),
    "toys": ("2014", "Toys_and_Games", 19412, 11924, 167597, "S3-Rec"),
    "baby": ("2014", "Baby", 19445, 7050, 160792, "MMRec"),
    "clothing": ("2014", "Clothing_Shoes_and_Jewelry", 39387, 23033, 278677, "MMRec"),
}
NAMES = tuple(SETS)
ANY_CATEGORY = re.compile(r"amazon(2014|2018|2023):([A-Za-z0-9_]+)")
FILE = re.compile(r"(?P<kind>meta_|reviews_)?(?P<category>[A-Za-z0-9_]+?)(_5)?\.jsonl?(\.gz)?")
FIELDS = {"day": ("reviewerID", "asin", "unixReviewTime"),             # clock: (person, product, time)
          "seconds": ("user_id", "parent_asin", "timestamp")}
ITEM_KEY = re.compile(r"""["'](?:parent_)?asin["']\s*:\s*["']([^"'\\]+)["']""")
THUMBNAIL = re.compile(r"\._[^/]*_(?=\.\w+$)")                         # ._SX38_SY50_CR,0,0,38,50_ before .jpg
WEB_ADDRESS = re.compile(r"https?://[^\s<>\"]+")


def knows(name) -> bool:
    """One of NAMES, or for example `amazon2018:Gift_Cards`: any category of 2014, 2018 or 2023."""
    return name in SETS or ANY_CATEGORY.fullmatch(name) is not None


def recognises(folder) -> bool:
    return folder.is_dir() and not (folder / "interactions.csv").exists() and bool(_categories(folder))


def fetch(name, raw, mirror) -> Path:
    """Bring a known set's reviews and metadata into the folder `raw`; files already there are used as they are.

    mirror: base address that replaces the built-in ones. Raises UserError when a file cannot be had.
    """
    paths, bases = _paths_and_bases(name)
    missing = [path for path in paths if not _placed(raw, path)]
    if missing:
        print(f"{name} needs {' and '.join(f'{Path(path).name}.gz' for path in missing)} in {raw}", flush=True)
    for path in missing:
        if mirror:
            urls = [f"{mirror.rstrip('/')}/{file}{suffix}" for suffix in dict.fromkeys(suffix for _, suffix in bases)
                    for file in dict.fromkeys((path, Path(path).name))]
        else:
            urls = [base + path + suffix for base, suffix in bases]
        download(urls, raw / f"{Path(path).name}.gz")
    return raw


def read(folder, name) -> Raw:
    """The reviews in a folder, joined with their products' metadata. name: a known set, or None for any other folder.

    Raises UserError for a missing or damaged file, more than 1 % unusable lines, or several categories in one folder.
    """
    reviews, metadata, ignored = _files_of_set(folder, name) if name else _files_of_folder(folder)
    users, items, times, clock, counts = _read_reviews(reviews)
    report, catalog = {reviews.name: counts}, {}
    if metadata:
        catalog, report[metadata.name] = _read_metadata(metadata, set(items))
    report |= {"items_without_metadata": len(set(items) - catalog.keys()), "ignored_files": ignored}
    return Raw(users, items, times, catalog, report=report, clock=clock, core=5 if name else 0,
               need_catalog=name is not None, picture_hosts=HOSTS,
               published=dict(zip(("users", "items", "interactions", "source"), SETS.get(name, ())[2:])))


# Which files

def _paths_and_bases(name) -> tuple:
    edition, category = SETS[name][:2] if name in SETS else ANY_CATEGORY.fullmatch(name).groups()
    *paths, bases = EDITIONS[edition]
    return [path.format(category) for path in paths], bases


def _placed(folder, path):
    """The file in the folder that stands for a set's path: compressed or not, 5-core or all reviews; else None."""
    name = Path(path).name
    names = [f"{stem}{suffix}" for stem in (name, name.replace("_5.json", ".json")) for suffix in (".gz", "")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _files_of_set(folder, name) -> tuple:
    reviews, metadata = (_placed(folder, path) for path in _paths_and_bases(name)[0])
    if not (reviews and metadata):
        raise UserError(f"{folder} lacks the {'metadata' if reviews else 'reviews'} of {name}: ask for {name} by name, "
                        f"then they are fetched")
    return reviews, metadata, []


def _files_of_folder(folder) -> tuple:
    """Reviews, metadata (None where there are none) and the names of the files that are passed over."""
    categories = _categories(folder)
    chosen = {category: files for category, files in categories.items() if files[1]} or categories
    if len(chosen) != 1:
        raise UserError(f"{folder} holds reviews of {len(chosen)} categories ({', '.join(chosen)}): "
                        f"make one folder for each")
    (reviews, metadata), = chosen.values()
    used = {reviews[0], *metadata[:1]}
    others = sorted(path.name for files in categories.values() for path in sum(files, []) if path not in used)
    return reviews[0], next(iter(metadata), None), others


def _categories(folder) -> dict:
    """category -> ([reviews files, 5-core first], [metadata files]).

    Reviews without metadata must look like reviews: many programs write .json and .jsonl files.
    """
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if match := FILE.fullmatch(path.name):
            found.setdefault(match["category"], ([], []))[match["kind"] == "meta_"].append(path)
    return {category: (sorted(reviews, key=lambda path: "_5.json" not in path.name), metadata)
            for category, (reviews, metadata) in found.items() if reviews and (metadata or any(map(_clock, reviews)))}


def _clock(path):
    """"day" or "seconds", told by the field names in the first lines; None where they do not look like reviews."""
    try:
        for _, text in islice(_lines(path), 100):
            row, _ = _parse(text)
            for clock, (user, item, _) in FIELDS.items():
                if row and _key(row.get(user)) and _key(row.get(item)):
                    return clock
    except (UserError, OSError):
        pass
    return None


# Lines

def _lines(path):
    """Yield (number, text) of the lines that are not blank. Raises UserError with the byte where reading stopped."""
    with open(path, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        try:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
                if text := line.decode("utf-8-sig", "replace").strip():
                    yield number, text
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(f"{path} is not a whole file, reading stopped at byte {file.tell()} ({error}): remove it, "
                            f"put a complete copy there, and run the same command again") from None


def _parse(text) -> tuple:
    """(object, None) or (None, defect). literal_eval, for 2014's metadata, builds values and runs nothing."""
    for parse in (json.loads, ast.literal_eval):
        try:
            row = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return (row, None) if isinstance(row, dict) else (None, "not_an_object")
    return None, "not_json"


def _each_row(path, take, parse=_parse) -> dict:
    """Hand each line's object to `take`, which returns None or the defect that makes the line unusable -> counts.

    Raises UserError for a file without lines, or when more than 1 % of them are unusable.
    """
    lines, bad, first_bad = 0, Counter(), None
    for number, text in _lines(path):
        lines += 1
        row, defect = parse(text)
        if defect := defect or take(row):
            bad[defect] += 1
            first_bad = first_bad or number
    if not lines:
        raise UserError(f"{path} is empty: put a complete copy there and run the same command again")
    return line_counts(path, lines, bad, first_bad)


def _read_reviews(path) -> tuple:
    """-> users, items, times (parallel lists), clock, counts."""
    clock = _clock(path) or "day"
    user_field, item_field, time_field = FIELDS[clock]
    users, items, times, known = [], [], [], {}

    def take(row):
        user, item, time = _key(row.get(user_field)), _key(row.get(item_field)), row.get(time_field)
        if not user or not item or time is None:
            return "no_user" if not user else "no_item" if not item else "no_time"
        time = _seconds(time)
        if time is None:
            return "impossible_time"
        users.append(known.setdefault(user, user))       # one string per key, however many reviews
        items.append(known.setdefault(item, item))
        times.append(time)

    counts = _each_row(path, take)
    counts |= {"users": len(set(users)), "items": len(set(items)),
               "exact_duplicates": _duplicates(users, items, times), "repeated_items": _duplicates(users, items)}
    return users, items, times, clock, counts


def _read_metadata(path, wanted) -> tuple:
    """-> catalog of the wanted items, counts. A product described twice keeps its first description."""
    catalog, seen = {}, set()

    def parse(text):
        keys = ITEM_KEY.findall(text)    # most products have no review here, and literal_eval takes a millisecond
        return ({"asin": keys[0]}, None) if len(keys) == 1 and _key(keys[0]) not in wanted else _parse(text)

    def take(row):
        key = _key(row.get("parent_asin") or row.get("asin"))
        if not key:
            return "no_item"
        if key in wanted and key not in seen:
            catalog[key] = _item(row)
        seen.add(key)

    counts = _each_row(path, take, parse)
    return catalog, counts | {
        "items": len(seen), "duplicate_items": counts["lines"] - sum(counts["bad_lines"].values()) - len(seen),
        "titles_unusable": sum(not item["title"] for item in catalog.values())}


def _duplicates(*columns) -> int:
    """How many rows of the parallel columns have occurred before."""
    codes = np.stack([np.fromiter(map({key: code for code, key in enumerate(dict.fromkeys(column))}.get, column),
                                  np.int64, len(column)) for column in columns])
    codes = codes[:, np.lexsort(codes)]
    return int((codes[:, 1:] == codes[:, :-1]).all(0).sum())


# Values

def _key(value) -> str:
    """A person's or product's key on one line, without what a text file cannot hold; "" for what is no key."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        return ""
    return " ".join(str(value).encode("utf-8", "replace").decode().split())


def _seconds(value):
    """Whole seconds since 1970 from seconds or milliseconds; None for what is no time from 1970 to 2100."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if value >= YEAR_1995 * 1000:
        value /= 1000
    return int(value) if 0 <= value <= YEAR_2100 else None             # NaN is in no range


def _item(row) -> dict:
    text = [*_listed(row.get("description")), ", ".join(_category_path(row)), row.get("brand") or row.get("store")]
    return {"title": "".join(_usable(row.get("title"))), "text": _usable(*text), "language": "en",
            "images": _images(row)}


def _usable(*parts) -> list:
    """Clean sentences, without the page script (it calls getTime) that stands in place of some titles."""
    return sentences(*(part for part in parts if "getTime" not in str(part)))


def _category_path(row):
    path = _listed(row.get("categories") or row.get("category"))
    path = max((names for names in path if isinstance(names, list)), key=len, default=path)     # 2014 has several
    path = takewhile(lambda name: "</span>" not in str(name), path)    # 2018: page details follow the path
    return filter(None, map(clean_text, path))


def _images(row) -> list:
    """Addresses of a product's pictures: the largest size there is, distinct, at most MAX_IMAGES."""
    thumbnails = _listed(row.get("imageURL") or row.get("image"))
    sizes = [map(image.get, ("hi_res", "large", "thumb")) for image in _listed(row.get("images"))
             if isinstance(image, dict)]
    for urls in (_listed(row.get("imageURLHighRes")), [THUMBNAIL.sub("", str(url)) for url in thumbnails],
                 _listed(row.get("imUrl")), [next(filter(_is_url, urls), None) for urls in sizes]):
        if urls := list(dict.fromkeys(filter(_is_url, urls))):
            return urls[:MAX_IMAGES]
    return []


def _is_url(value) -> bool:
    return isinstance(value, str) and WEB_ADDRESS.fullmatch(value) is not None


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]
