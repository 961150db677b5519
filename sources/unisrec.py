"""The processed files that UniSRec and MISSRec publish: `<D>.train.inter .valid.inter .test.inter
.text .item2index .user2index` and, where present, `<D>.feat1CLS` (text) and `<D>.feat3CLS`
(image): raw float32, one row per item index.

Their `.inter` files hold one row per prefix, cut to the last 50 items; the whole sequence is put
together again here. They have an order but no times. Sources: github.com/RUCAIBox/UniSRec,
github.com/gimpong/MM23-MISSRec.
"""
from array import array
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from common.files import UserError
from common.tables import TABS, Keys, Raw, clean_text, each_row, first_lines, header_of

CUT = 50    # items before the target in a row of .inter
# users, items, interactions as the UniSRec paper prints them (Table 1)
PUBLISHED = {
    "Scientific": (8442, 4385, 59427),
    "Pantry": (13101, 4898, 126962),
    "Instruments": (24962, 9964, 208926),
    "Arts": (45486, 21019, 395150),
    "Office": (87436, 25986, 684837),
}


def recognises(folder) -> bool:
    return len(list(folder.glob("*.item2index"))) > 0


def read(folder, name) -> Raw:
    """Raises UserError for a missing file, an unnamed index, a feature file of another size."""
    stems = sorted(path.stem for path in folder.glob("*.item2index"))
    if len(stems) > 1:
        raise UserError(
            f"{folder} holds several data sets ({', '.join(stems)}): give each a folder of its own"
        )
    stem = folder / stems[0]
    if Path(f"{stem}.pt_datasets").is_file():
        raise UserError(
            f"{folder} holds a mix of domains that UniSRec pre-trains on, which has no users of "
            f"its own: give the folders of its domains to --pretrain_data"
        )
    report = {}
    item_keys = read_index(Path(f"{stem}.item2index"), report)
    user_keys = read_index(Path(f"{stem}.user2index"), report)
    users, items = Keys(), Keys()
    sequences = read_sequences(stem, len(user_keys), len(item_keys), report)
    for user, sequence in sorted(sequences.items()):
        users.extend([user_keys[user]] * len(sequence))
        items.extend(item_keys[i] for i in sequence)
    published = {}
    known = PUBLISHED.get(stem.name)
    if known and known[1] == len(item_keys):    # else it is a part of that set
        published = dict(zip(("users", "items", "interactions"), known), source="UniSRec")
    return Raw(
        users, items, np.arange(len(users)),
        catalog=read_texts(Path(f"{stem}.text"), item_keys, report),
        report=report,
        clock="order",
        item_order=item_keys,
        user_order=user_keys,
        features=read_features(stem, len(item_keys), report),
        published=published,
    )


def read_texts(path, item_keys, report) -> dict:
    """The catalog: one text for each item, taken for its title."""
    texts = {}

    def take(key, text):
        texts.setdefault(key, clean_text(text))

    report[path.name] = each_line(path, ("key", "text"), take)
    report["item texts of other items"] = len(texts.keys() - set(item_keys))
    return {
        key: {"title": texts[key], "text": [], "language": "en", "images": []}
        for key in item_keys if key in texts
    }


def each_line(path, columns, take) -> dict:
    """`each_row` of a tab-separated file, with a header (which has `:token` in it) or without.

    Raises UserError for a missing file and for the first line that cannot be used.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing: copy it into the folder beside the other files of the data set"
        )
    headed = any(":token" in text for _, text in first_lines(path, 1))
    header = tuple(header_of(path, TABS)) if headed else columns
    if len(header) < len(columns):
        raise UserError(
            f"{path} must have {len(columns)} columns between tabs, and has {len(header)}: fetch "
            f"the file again"
        )
    form = replace(TABS, header=() if headed else columns)
    return each_row(path, header[:len(columns)], take, form=form, most_bad=0)


def read_index(path, report) -> list:
    """Keys in index order; the lines are counted in the report.

    Raises UserError unless the indices are 0..n-1, each once.
    """
    by_index = {}

    def take(key, index):
        by_index[index.strip()] = key.strip()

    report[path.name] = each_line(path, ("key", "index"), take)
    lines = report[path.name]["lines"]
    keys = [by_index.get(str(i)) for i in range(lines)]
    if None in keys or len(set(keys)) < len(keys):
        raise UserError(
            f"{path} must give the indices 0 to {lines - 1}, each to one key: fetch the file again"
        )
    return keys


def read_sequences(stem, n_users, n_items, report) -> dict:
    """user index -> whole sequence of item indices. report: where the lines are counted."""
    rows = defaultdict(dict)    # user -> {the last CUT items up to and with the target: row}
    last = {}                   # user -> the row that ends last

    def take(part, user, before, target):
        try:
            user = int(user)
            row = [*map(int, before.split()), int(target)]
        except ValueError:
            return "no_numbers"
        if not (0 <= user < n_users and min(row) >= 0 and max(row) < n_items):
            return "not_in_the_index_files"
        row = array("i", row)
        rows[user][row[-CUT:].tobytes()] = row
        if part != "train" or len(row) > len(last.get(user, ())):
            last[user] = row

    for part in ("train", "valid", "test"):
        path = Path(f"{stem}.{part}.inter")
        report[path.name] = each_line(path, ("user", "before", "target"), partial(take, part))
    return {user: whole_sequence(row, rows[user]) for user, row in last.items()}


def whole_sequence(last, rows) -> list:
    """The sequence that ends with the row `last`; rows: {the last CUT items up to the target: row}.

    A row is (CUT items before, target). The row before it ends where this row's list ends, so its
    first item is one further back, until a list is shorter than the cut.
    """
    row = last
    older = []
    while len(row) > CUT:
        row = rows.pop(row[:-1].tobytes(), ())
        if len(row) > CUT:
            older.append(row[0])
    return [*older[::-1], *last]


def read_features(stem, n_items, report) -> dict:
    """modality -> (encoder, float32 (n_items, D)). Raises UserError."""
    features = {}
    for modality, suffix in (("text", "feat1CLS"), ("image", "feat3CLS")):
        path = Path(f"{stem}.{suffix}")
        if not path.is_file():
            continue
        rows = np.fromfile(path, np.float32)
        if rows.size == 0 or rows.size % n_items or not np.isfinite(rows).all():
            raise UserError(
                f"{path} must hold finite float32 rows for {n_items} items, but has {rows.size} "
                f"numbers or some that are not finite: fetch the file again"
            )
        features[modality] = (suffix.lower(), rows.reshape(n_items, -1))
        report[path.name] = f"features of {n_items} items"
    return features
