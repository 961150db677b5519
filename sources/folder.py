"""Your own data: a folder with interactions.csv and, if you have them, items.jsonl and pictures.

interactions.csv   header user,item,time. time (or timestamp): seconds since 1970 or an ISO date;
                   equal times keep the file's order; without a time column the order of the lines
                   is the order of events.
items.jsonl        one JSON object a line: {"item": ..., "title": ..., "text": str or [str],
                   "language": "en", "images": [path in this folder, or URL]}; every key but "item"
                   is optional.
"""
import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from common.files import UserError
from common.tables import Raw, clean_text, each_object, each_row, header_of, sentences

INTERACTIONS, ITEMS = "interactions.csv", "items.jsonl"
DAY = 86_400
YEAR_2100 = 4_102_444_800      # in seconds
FIRST_DATE = 10_000_000        # smaller numbers are no dates but 1, 2, 3, ...
UNITS = (("nanoseconds", 1e9), ("microseconds", 1e6), ("milliseconds", 1e3))
SURROGATE = re.compile("[\ud800-\udfff]")


def recognises(folder) -> bool:
    return (folder / INTERACTIONS).is_file()


def read(folder, name) -> Raw:
    """Raises UserError for a missing column, a damaged file, or more than 1 % unusable lines."""
    report = {}
    users, items, times, clock = read_interactions(folder / INTERACTIONS, report)
    catalog = {}
    if (folder / ITEMS).is_file():
        catalog = read_items(folder / ITEMS, report)
    root = str(folder.resolve())
    return Raw(users, items, times, catalog, report=report, clock=clock, image_root=root)


# ---------------- interactions

def read_interactions(path, report) -> tuple:
    """-> users, items, times in seconds (parallel lists), clock."""
    header = header_of(path)
    time_column = next((name for name in ("time", "timestamp") if name in header), "time")
    timed = time_column in header
    users, items, times = [], [], []

    def take(user, item, time):
        user, item = user.strip(), item.strip()
        if not (user and item):
            return "no_user_or_item"
        moment = seconds(time) if timed else len(users)
        if moment is None or moment < 0:
            return "time_not_understood"
        users.append(user)
        items.append(item)
        times.append(moment)

    report[path.name] = each_row(path, ("user", "item"), take, (time_column,))
    if not timed:
        print(f"{path} has no column time: the order of its lines is the order of events")
    times = in_seconds(np.array(times, float), path, report)
    if not timed or len(times) == 0 or times.max() < FIRST_DATE:
        clock = "order"
    elif (times % DAY == 0).all():
        clock = "day"
    else:
        clock = "seconds"
    return users, items, times.tolist(), clock


def seconds(text):
    """Seconds since 1970 (UTC if no zone is written) of a number or an ISO date; else None."""
    try:
        value = float(text)
    except ValueError:
        pass
    else:
        return value if np.isfinite(value) else None
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.timestamp()


def in_seconds(times, path, report):
    """Times in smaller units, told by their size, as seconds. Raises UserError for mixed ones."""
    for unit, scale in UNITS:
        if len(times) and times.min() > YEAR_2100 * scale / 1e3:
            times = times / scale
            report[f"times read as {unit}"] = len(times)
    if (times > YEAR_2100).any():
        raise UserError(
            f"{path} mixes times in seconds with larger numbers: write every time in one unit"
        )
    return times


# ---------------- items

def read_items(path, report) -> dict:
    """item key -> what is known of it."""
    catalog = {}
    found = Counter()

    def take(row):
        key = row.get("item")
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            return "no_item"
        key = str(key).strip()
        if not key or SURROGATE.search(key):    # a lone surrogate is no text
            return "no_item"
        if key in catalog:
            found["items described twice, the first kept"] += 1
            return
        text = row.get("text")
        catalog[key] = {
            "title": clean_text(row.get("title")),
            "text": sentences(*(text if isinstance(text, list) else [text])),
            "language": clean_text(row.get("language")),
            "images": images_of(row, found),
        }

    report[path.name] = each_object(path, take)
    report |= found
    return catalog


def images_of(row, found) -> list:
    """Picture addresses, and paths inside the folder; one that leaves it is refused."""
    images = row.get("images", row.get("image")) or []
    kept = []
    for image in images if isinstance(images, list) else [images]:
        if image == "":
            continue
        if is_usable(image):
            kept.append(image)
        else:
            found["picture paths refused"] += 1
    return kept


def is_usable(image) -> bool:
    if not isinstance(image, str) or SURROGATE.search(image):
        return False
    if image.startswith(("http://", "https://")):
        return True
    if "\\" in image or "\0" in image or PureWindowsPath(image).drive:
        return False
    path = PurePosixPath(image)
    leaves = path.is_absolute() or ".." in path.parts
    return bool(path.parts) and not leaves    # the folder itself is no picture
