"""Your own data: a folder with `interactions.csv` and, if you have them, `items.jsonl` and pictures.

interactions.csv   header user,item,time. time (or timestamp): seconds since 1970 or an ISO date; equal times keep the
                   file's order; without a time column the order of the lines is the order of events.
items.jsonl        one JSON object a line: {"item": ..., "title": ..., "text": str or [str], "language": "en",
                   "images": [path in this folder, or URL]}; every key but "item" is optional.
"""
import csv
import json
import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from .common import Raw, UserError, clean_text, sentences

NAMES = ()
DAY, YEAR_2100 = 86_400, 4_102_444_800
SURROGATE = re.compile("[\ud800-\udfff]")


def knows(name) -> bool:
    return False


def recognises(folder) -> bool:
    return (folder / "interactions.csv").is_file()


def fetch(name, raw, mirror):
    raise NotImplementedError("a folder is not fetched")


def read(folder, name) -> Raw:
    """Raises UserError for a missing column, an unreadable file, or more than 1 % unusable lines."""
    report = Counter()
    users, items, times, clock = _interactions(folder / "interactions.csv", report)
    catalog = _items(folder / "items.jsonl", report) if (folder / "items.jsonl").is_file() else {}
    return Raw(users, items, times, catalog, report=dict(report), clock=clock, image_root=str(folder.resolve()))


def _interactions(path, report):
    users, items, times = [], [], []
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        rows = csv.reader(f, strict=True)        # else one stray quote swallows lines without a word
        try:
            header = [h.strip().lower() for h in next(rows, [])]
            if "user" not in header or "item" not in header:
                raise UserError(f"{path} must begin with the header user,item,time, not {','.join(header)[:80]!r}")
            u, i = header.index("user"), header.index("item")
            t = next((header.index(name) for name in ("time", "timestamp") if name in header), None)
            if t is None:
                print(f"{path} has no column time: the order of its lines is the order of events")
            for row in filter(None, rows):
                report["interaction lines"] += 1
                if len(row) < len(header):
                    problem = "columns missing"
                else:
                    user, item = row[u].strip(), row[i].strip()
                    time = len(users) if t is None else _seconds(row[t])
                    problem = ("no user or item" if not (user and item) else
                               "time not understood" if time is None or time < 0 else None)
                if problem:
                    _bad_line(path, rows.line_num, problem, report)
                else:
                    users.append(user), items.append(item), times.append(time)
        except csv.Error as e:
            raise UserError(f"{path}, line {rows.line_num} is not CSV ({e}): correct that line") from None
    _refuse_if_many(path, report, report["interaction lines"])
    times = np.array(times, float)
    for unit, scale in (("nanoseconds", 1e9), ("microseconds", 1e6), ("milliseconds", 1e3)):     # MicroLens has the last
        if len(times) and times.min() > YEAR_2100 * scale / 1e3:
            times, report[f"times read as {unit}"] = times / scale, len(times)
    if (times > YEAR_2100).any():
        raise UserError(f"{path} mixes times in seconds with larger numbers: write every time in one unit")
    if t is None or len(times) == 0 or times.max() < 10_000_000:     # numbers this small are no dates: 1, 2, 3, ...
        clock = "order"
    else:
        clock = "day" if (times % DAY == 0).all() else "seconds"
    return users, items, times.tolist(), clock


def _seconds(text):
    """Seconds since 1970 (UTC where no zone is written) from a number or an ISO date; None if it is neither."""
    try:
        value = float(text)
        return value if np.isfinite(value) else None
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _items(path, report):
    catalog = {}
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            report["item lines"] += 1
            try:
                row = json.loads(line)
                key = str(row["item"]).strip() if isinstance(row["item"], (str, int)) else ""
                key.encode()                     # a lone surrogate is no text
            except (ValueError, KeyError, TypeError, RecursionError):
                row, key = None, ""
            if not key:
                _bad_line(path, number, "not an object with an item", report)
            elif key in catalog:
                report["items described twice, the first kept"] += 1
            else:
                text = row.get("text")
                catalog[key] = {"title": clean_text(row.get("title")),
                                "text": sentences(*(text if isinstance(text, list) else [text])),
                                "language": clean_text(row.get("language")), "images": _images(row, report)}
    _refuse_if_many(path, report, report["item lines"])
    return catalog


def _images(row, report):
    """Picture URLs and paths inside the folder; a path that is absolute or climbs out is refused and counted."""
    images = row.get("images", row.get("image")) or []
    kept = []
    for image in images if isinstance(images, list) else [images]:
        if image == "":
            continue
        if _is_usable(image):
            kept.append(image)
        else:
            report["picture paths refused"] += 1
    return kept


def _is_usable(image) -> bool:
    if not isinstance(image, str) or SURROGATE.search(image):
        return False
    if image.startswith(("http://", "https://")):
        return True
    path = PurePosixPath(image)
    leaves = path.is_absolute() or PureWindowsPath(image).drive or ".." in path.parts or "\\" in image or "\0" in image
    return bool(path.parts) and not leaves                       # the folder itself is no picture


def _bad_line(path, number, problem, report):
    report[f"{Path(path).name}: {problem}"] += 1
    report.setdefault(f"{Path(path).name}: first bad line", number)


def _refuse_if_many(path, report, lines):
    name = Path(path).name
    bad = {k: n for k, n in report.items() if k.startswith(f"{name}: ") and not k.endswith("first bad line")}
    if sum(bad.values()) * 100 > lines:
        kinds = ", ".join(f"{k.removeprefix(name + ': ')} {n}" for k, n in bad.items())
        raise UserError(f"{path}: {sum(bad.values())} of {lines} lines cannot be used ({kinds}), the first is line "
                        f"{report[f'{name}: first bad line']}: correct the file")
