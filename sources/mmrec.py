"""Folders of MMRec and its kin (BM3, FREEDOM, ...): interactions by number, and features by row.

<D>.inter            a tab-separated table: userID, itemID, timestamp, and x_label, which says what
                     is train (0), valid (1) and test (2)
text_feat.npy, image_feat.npy    a row for each itemID
i_id_mapping.csv     the asin of each itemID; the items are called by it

Of these <D>.inter and one of the others must be there. Source: github.com/enoche/MMRec
"""
import numpy as np

from common.files import UserError
from common.interactions import Interactions, has_own_table
from common.tables import TABS, Raw, cut, each_row, form_of, whole_number
from common.vectors import array_in

FEATURES = {"text": "text_feat.npy", "image": "image_feat.npy"}
MAPPING = "i_id_mapping.csv"
LAST = 10 ** 7    # a larger itemID is none: the catalog has a row for each number up to it


def recognises(folder) -> bool:
    beside = any((folder / name).is_file() for name in (MAPPING, *FEATURES.values()))
    tables = list(folder.glob("*.inter"))
    return beside and len(tables) == 1 and not has_own_table(folder)


def read(folder, name) -> Raw:
    """Raises UserError for a missing column, a damaged file, items that are no numbers, or features
    of another number of items."""
    path, = folder.glob("*.inter")
    interactions = Interactions()
    report = {path.name: interactions.read(path, TABS)}
    columns = interactions.columns(path, report)
    last = highest(columns["items"].names, path)
    features = read_features(folder, last, report)
    asins = read_mapping(folder, report)
    rows = max([last + 1] + [len(vectors) for _, vectors in features.values()])
    order = [asins.get(str(number), str(number)) for number in range(rows)]
    refuse_keys_twice(order, folder / MAPPING)
    columns["items"] = columns["items"].renamed(lambda number: order[int(number)])
    return Raw(catalog={}, report=report, item_order=order, features=features, **columns)


def highest(items, path) -> int:
    """The largest itemID. Raises UserError for an item that is no number."""
    numbers = {item: whole_number(item) for item in items}
    strange = [item for item, number in numbers.items() if number is None or number > LAST]
    if strange:
        raise UserError(
            f"{path} has an item {cut(min(strange))}, and the rows of features are numbered: put "
            f"the table with the numbers there"
        )
    return max(numbers.values(), default=-1)


def read_features(folder, last, report) -> dict:
    """modality -> (encoder, rows by itemID). Raises UserError where they do not fit."""
    features = {}
    for modality, file in FEATURES.items():
        path = folder / file
        if not path.is_file():
            continue
        rows = array_in(path)
        numbers = rows.ndim == 2 and rows.shape[1] > 0 and rows.dtype.kind in "fiub"
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32) if numbers else rows
        if not numbers or len(rows) <= last or not np.isfinite(rows).all():
            raise UserError(
                f"{path} must have a row of finite numbers for each itemID up to {last}, but its "
                f"shape is {rows.shape}: put the file of this data set there"
            )
        features[modality] = (path.stem, rows)
        report[path.name] = f"features of {len(rows)} items"
    if len({len(rows) for _, rows in features.values()}) > 1:
        raise UserError(
            f"{' and '.join(FEATURES.values())} in {folder} have different numbers of rows: put "
            f"the files of one data set there"
        )
    return features


def refuse_keys_twice(order, path):
    """Raises UserError where an itemID without an asin has the name of another's."""
    seen = {}
    for number, key in enumerate(order):
        if seen.setdefault(key, number) != number:
            raise UserError(
                f"{path} has no asin for itemID {number if key == str(number) else seen[key]}, "
                f"and {key} is the asin of another: put a complete copy there"
            )


def read_mapping(folder, report) -> dict:
    """itemID -> asin, where a file says so."""
    asins = {}
    path = folder / MAPPING
    if path.is_file():
        def take(asin, number):
            number = whole_number(number.strip())
            if number is None or not asin.strip():
                return "no_number_or_asin"
            if asins.setdefault(str(number), asin.strip()) != asin.strip():
                return "two_asins_of_one_item"

        report[path.name] = each_row(path, ("asin", "itemid"), take, form=form_of(path))
    if len(set(asins.values())) < len(asins):
        raise UserError(f"{path} gives one asin to several itemIDs: put a complete copy there")
    return asins
