"""Numbered sequences in a text file, as SASRec, S3-Rec, STOSA and many others publish them.

user item item item ...    a line for each user, the oldest item first
user item                  a line for each interaction, in their order

<D>.txt is read, or train.txt, valid.txt and test.txt; what is known of the items may lie beside it
as items.jsonl or items.csv. There are no times. Sources: github.com/kang205/SASRec,
github.com/RUCAIBox/CIKM2020-S3Rec
"""
from array import array

import numpy as np

from common.files import UserError
from common.interactions import FILES, has_own_table
from common.items import Items, notes_of_match, order_of
from common.tables import Keys, Raw, each_object, first_lines, whole_number

ENOUGH = 200                            # lines that say how a file is written,
MOST = .9                               # and how many of them must be written so
TIME = 100_000_000                      # a last column of such numbers is no item: a time
NEGATIVES = ("_sample", "_neg", "_negative")    # ends of names of items that were not bought


def recognises(folder) -> bool:
    return folder.is_dir() and not has_own_table(folder) and len(files(folder)) > 0


def read(folder, name) -> Raw:
    """Raises UserError for several data sets in one folder, or more than 1 % unusable lines."""
    paths = files(folder)
    parts = [FILES.get(path.stem) for path in paths]
    if len(paths) > 1 and None in parts:
        raise UserError(
            f"{folder} holds several data sets ({', '.join(path.stem for path in paths)}): make "
            f"one folder for each"
        )
    report = {}
    users, items, of_parts = Keys(), Keys(), array("b")

    def take(numbers):
        user, *sequence = numbers
        if not sequence or not "".join(numbers).isdecimal():
            return "no_user_and_items"
        users.extend([user] * len(sequence))
        items.extend(sequence)

    for path, part in sorted(zip(paths, parts), key=lambda row: row[1] or 0):
        report[path.name] = each_object(path, take, parse=str.split)
        of_parts.extend([part or 0] * (len(items) - len(of_parts)))
    catalog = Items()
    notes = catalog.read_beside(folder, report)
    notes += notes_of_match(catalog.catalog, items.names, catalog.file, path.name)
    return Raw(
        users, items, np.arange(len(users)), catalog.catalog,
        report=report,
        notes=notes,
        parts=None if None in parts else np.asarray(of_parts),
        clock="order",
        item_order=order_of(catalog.catalog, items.names),
        image_root=str(folder.resolve()),
    )


def files(folder) -> list:
    """The text files of numbered sequences in a folder."""
    return [
        path for path in sorted(folder.glob("*.txt"))
        if not path.stem.lower().endswith(NEGATIVES) and has_sequences(path)
    ]


def has_sequences(path) -> bool:
    """Whether most of the first lines are a user and items, all numbers; no ratings, no times."""
    try:
        rows = [text.split() for _, text in first_lines(path, ENOUGH)]
    except (UserError, OSError):
        return False
    numbers = [row for row in rows if len(row) > 1 and "".join(row).isdecimal()]
    if not rows or len(numbers) < MOST * len(rows):
        return False
    rated = all(len(row) == 3 for row in numbers)
    timed = all((whole_number(row[-1]) or 0) > TIME for row in numbers)
    return not (rated or timed)
