"""Amazon reviews of 2014, 2018 and 2023: download, read, join with the product metadata.

        reviews, one object a line             metadata, one object a line: title, description and
2014    reviewerID, asin, unixReviewTime       asin, categories, brand, imUrl (Python literals)
2018    the same names                         asin, category, brand, imageURL, imageURLHighRes
2023    user_id, parent_asin, timestamp (ms)   parent_asin, features, categories, store, images

Reviews of 2014 and 2018 are dated to the day. `<Category>_5` holds the reviews of persons and
products with five. Sources: https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html (2014),
https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/ (2018), https://amazon-reviews-2023.github.io
(2023).
"""
import ast
import json
import re
from array import array
from collections import Counter
from itertools import takewhile, zip_longest
from pathlib import Path

import numpy as np

from common.files import UserError
from common.interactions import has_own_table
from common.items import as_list, notes_of_undescribed
from common.tables import (
    Defect,
    Keys,
    Raw,
    clean_text,
    each_object,
    first_lines,
    first_of_each,
    sentences,
)
from common.web import download

MAX_IMAGES = 10
HOSTS = ("images-amazon.com", "ssl-images-amazon.com", "media-amazon.com")    # of pictures
YEAR_1995 = 788_918_400    # in seconds; the first review is from 1995
YEAR_2100 = 4_102_444_800

# edition: (path of the reviews, path of the metadata, ((base address, suffix of files), ...));
# {} is the category
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
FIELDS = {    # clock: (person, product, time)
    "day": ("reviewerID", "asin", "unixReviewTime"),
    "seconds": ("user_id", "parent_asin", "timestamp"),
}
ITEM_KEY = re.compile(r"""["'](?:parent_)?asin["']\s*:\s*["']([^"'\\]+)["']""")
PICTURE_KEYS = ("images", "imageURLHighRes", "imageURL", "image", "imUrl")
THUMBNAIL = re.compile(r"\._[^/]*_(?=\.\w+$)")    # ._SX38_SY50_CR,0,0,38,50_ before .jpg
WEB_ADDRESS = re.compile(r"https?://[^\s<>\"]+")


def knows(name) -> bool:
    """One of NAMES, or for example `amazon2018:Gift_Cards`: any category of 2014, 2018 or 2023."""
    return name in SETS or ANY_CATEGORY.fullmatch(name) is not None


def recognises(folder) -> bool:
    if not folder.is_dir() or has_own_table(folder):
        return False
    return len(categories_in(folder)) > 0


def fetch(name, raw, mirror) -> Path:
    """Bring a known set's reviews and metadata into the folder `raw`; files already there are kept.

    mirror: base address that replaces the built-in ones. Raises UserError when a file cannot be
    had.
    """
    paths, bases = paths_and_bases(name)
    missing = [path for path in paths if not file_for(raw, path)]
    if missing:
        files = " and ".join(f"{Path(path).name}.gz" for path in missing)
        print(f"{name} needs {files} in {raw}", flush=True)
    for path in missing:
        download(addresses(path, bases, mirror), raw / f"{Path(path).name}.gz")
    return raw


def read(folder, name) -> Raw:
    """The reviews in a folder, joined with their products' metadata.

    name: a known set, or None for any other folder. Raises UserError for a missing or damaged file,
    more than 1 % unusable lines, or several categories in one folder.
    """
    reviews, metadata = files_of_set(folder, name) if name else files_of_folder(folder)
    users, items, times, clock, counts = read_reviews(reviews)
    report = {reviews.name: counts}
    catalog = {}
    notes = []
    if metadata:
        catalog, found = read_metadata(metadata, items.names)
        report[metadata.name] = found
        if found["pictures_not_understood"]:
            notes.append(
                f"{metadata.name}: the pictures of {found['pictures_not_understood']} products are "
                f"not understood: an address is wanted"
            )
        if not name:
            notes += notes_of_undescribed(items.names, catalog, metadata.name)
    report["items_without_metadata"] = len(items.names.keys() - catalog.keys())
    published = {}
    if name in SETS:
        published = dict(zip(("users", "items", "interactions", "source"), SETS[name][2:]))
    return Raw(
        users, items, times, catalog,
        report=report,
        notes=notes,
        clock=clock,
        core=5 if name else 0,
        need_catalog=name is not None,
        picture_hosts=HOSTS,
        published=published,
    )


# ---------------- which files

def paths_and_bases(name) -> tuple:
    """([path of the reviews, path of the metadata], base addresses) of a known set."""
    if name in SETS:
        edition, category = SETS[name][:2]
    else:
        edition, category = ANY_CATEGORY.fullmatch(name).groups()
    *paths, bases = EDITIONS[edition]
    return [path.format(category) for path in paths], bases


def addresses(path, bases, mirror) -> list:
    """Where a file may be fetched from; a mirror may have it with or without its folders."""
    if not mirror:
        return [base + path + suffix for base, suffix in bases]
    suffixes = dict.fromkeys(suffix for _, suffix in bases)
    paths = dict.fromkeys((path, Path(path).name))
    return [f"{mirror.rstrip('/')}/{file}{suffix}" for suffix in suffixes for file in paths]


def file_for(folder, path):
    """The file that stands for a set's path: compressed or not, 5-core or all reviews."""
    name = Path(path).name
    for stem in (name, name.replace("_5.json", ".json")):
        for suffix in (".gz", ""):
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    return None


def files_of_set(folder, name) -> tuple:
    """(reviews, metadata) of a known set."""
    reviews, metadata = (file_for(folder, path) for path in paths_and_bases(name)[0])
    if not (reviews and metadata):
        raise UserError(
            f"{folder} lacks the {'metadata' if reviews else 'reviews'} of {name}: ask for {name} "
            f"by name, then they are fetched"
        )
    return reviews, metadata


def files_of_folder(folder) -> tuple:
    """(reviews, metadata) of somebody's folder; None for metadata that are not there."""
    categories = categories_in(folder)
    with_metadata = {category: files for category, files in categories.items() if files[1]}
    chosen = with_metadata or categories
    if len(chosen) != 1:
        raise UserError(
            f"{folder} holds reviews of {len(chosen)} categories ({', '.join(chosen)}): make one "
            f"folder for each"
        )
    (reviews, metadata), = chosen.values()
    return reviews[0], metadata[0] if metadata else None


def categories_in(folder) -> dict:
    """category -> ([reviews files, 5-core first], [metadata files]).

    Reviews without metadata must look like reviews: many programs write .json and .jsonl files.
    """
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        match = FILE.fullmatch(path.name)
        if match:
            reviews, metadata = found.setdefault(match["category"], ([], []))
            (metadata if match["kind"] == "meta_" else reviews).append(path)
    categories = {}
    for category, (reviews, metadata) in found.items():
        if reviews and (metadata or any(map(clock_of, reviews))):
            reviews.sort(key=lambda path: "_5.json" not in path.name)
            categories[category] = (reviews, metadata)
    return categories


def clock_of(path):
    """"day" or "seconds", told by the fields of the first lines; None if they are no reviews."""
    try:
        for _, text in first_lines(path, 100):
            row = parse(text)
            for clock, (user, item, _) in FIELDS.items():
                if isinstance(row, dict) and key_of(row.get(user)) and key_of(row.get(item)):
                    return clock
    except (UserError, OSError):
        pass
    return None


# ---------------- lines

def parse(text):
    """Object or Defect. literal_eval, for the metadata of 2014, builds values and runs nothing."""
    for parser in (json.loads, ast.literal_eval):
        try:
            row = parser(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return row if isinstance(row, dict) else Defect("not_an_object")
    return Defect("not_json")


def each_line(path, take, parse=parse) -> dict:
    """`each_object` of a file that must not be empty."""
    counts = each_object(path, take, parse)
    if not counts["lines"]:
        raise UserError(
            f"{path} is empty: put a complete copy there and run the same command again"
        )
    return counts


def read_reviews(path) -> tuple:
    """-> users, items, times, clock, counts."""
    clock = clock_of(path) or "day"
    user_field, item_field, time_field = FIELDS[clock]
    users, items, times = Keys(), Keys(), array("d")

    def take(row):
        user = key_of(row.get(user_field))
        item = key_of(row.get(item_field))
        if not user:
            return "no_user"
        if not item:
            return "no_item"
        if row.get(time_field) is None:
            return "no_time"
        time = seconds(row[time_field])
        if time is None:
            return "impossible_time"
        users.add(user)
        items.add(item)
        times.append(time)

    counts = each_line(path, take)
    times = np.asarray(times)
    counts["users"] = len(users.names)
    counts["items"] = len(items.names)
    counts["exact_duplicates"] = duplicates(users.numbers, items.numbers, times)
    counts["repeated_items"] = duplicates(users.numbers, items.numbers)
    return users, items, times, clock, counts


def read_metadata(path, wanted) -> tuple:
    """-> catalog of the wanted items, counts. Of a product described twice, the first counts."""
    catalog = {}
    seen = set()
    found = Counter()

    def parse_if_wanted(text):
        # most products have no review here, and literal_eval takes a millisecond
        keys = ITEM_KEY.findall(text)
        if len(keys) == 1 and key_of(keys[0]) not in wanted:
            return {"asin": keys[0]}
        return parse(text)

    def take(row):
        key = key_of(row.get("parent_asin") or row.get("asin"))
        if not key:
            return "no_item"
        if key in wanted and key not in seen:
            catalog[key] = describe(row)
            if has_pictures(row) and not catalog[key]["images"]:
                found["pictures_not_understood"] += 1
        seen.add(key)

    counts = each_line(path, take, parse_if_wanted)
    good = counts["lines"] - sum(counts["bad_lines"].values())
    counts["items"] = len(seen)
    counts["duplicate_items"] = good - len(seen)
    counts["titles_unusable"] = sum(not item["title"] for item in catalog.values())
    counts["pictures_not_understood"] = found["pictures_not_understood"]
    return catalog, counts


def duplicates(*columns) -> int:
    """How many rows of the parallel columns have occurred before."""
    return int((~first_of_each(*columns)).sum())


# ---------------- values

def key_of(value) -> str:
    """A person's or product's key on one line; "" for what is no key."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        return ""
    writable = str(value).encode("utf-8", "replace").decode()    # without lone surrogates
    return " ".join(writable.split())


def seconds(value):
    """Seconds since 1970 from seconds or milliseconds; None for no time up to 2100."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if value >= YEAR_1995 * 1000:
        value /= 1000
    return value if 0 <= value <= YEAR_2100 else None    # NaN is in no range


def describe(row) -> dict:
    """Title, text and pictures of a product."""
    text = [
        *as_list(row.get("features") or row.get("feature")),
        *as_list(row.get("description")),
        ", ".join(category_path(row)),
        row.get("brand") or row.get("store"),
    ]
    title = usable(row.get("title"))
    return {
        "title": title[0] if title else "",
        "text": usable(*text),
        "language": "en",
        "images": images_of(row),
    }


def usable(*parts) -> list:
    """Clean sentences, without the page script (it calls getTime) that stands for some titles."""
    good = [part for part in parts if "getTime" not in str(part)]
    return sentences(*good)


def category_path(row) -> list:
    path = as_list(row.get("categories") or row.get("category"))
    lists = [names for names in path if isinstance(names, list)]    # 2014 has several paths
    path = max(lists, key=len, default=path)
    path = takewhile(lambda name: "</span>" not in str(name), path)    # 2018: page details follow
    return list(filter(None, map(clean_text, path)))


def has_pictures(row) -> bool:
    """Whether a product's metadata say anything of pictures."""
    for value in map(row.get, PICTURE_KEYS):
        parts = value.values() if isinstance(value, dict) else as_list(value)
        if any(parts):
            return True
    return False


def images_of(row) -> list:
    """Addresses of a product's pictures: the largest size, distinct, at most MAX_IMAGES."""
    thumbnails = as_list(row.get("imageURL") or row.get("image"))
    kinds = (
        as_list(row.get("imageURLHighRes")),
        [THUMBNAIL.sub("", str(url)) for url in thumbnails],
        as_list(row.get("imUrl")),
        [next(filter(is_address, urls), None) for urls in sizes_of(row.get("images"))],
    )
    for urls in kinds:
        found = list(dict.fromkeys(filter(is_address, urls)))
        if found:
            return found[:MAX_IMAGES]
    return []


def sizes_of(images) -> list:
    """The sizes of each picture, the largest first, of a list of objects as published in 2023, or
    of an object of lists, as the library datasets saves it."""
    sizes = ("hi_res", "large", "thumb")
    if isinstance(images, dict):
        columns = [as_list(images.get(size)) for size in sizes]
        return list(zip_longest(*columns))
    return [
        [image.get(size) for size in sizes]
        for image in as_list(images) if isinstance(image, dict)
    ]


def is_address(value) -> bool:
    return isinstance(value, str) and WEB_ADDRESS.fullmatch(value) is not None
