"""The processed files that UniSRec and MISSRec publish: `<D>.train.inter .valid.inter .test.inter .text .item2index
.user2index` and, where present, `<D>.feat1CLS` (text) and `<D>.feat3CLS` (image): raw float32, one row per item index.

Their `.inter` files hold one row per prefix, cut to the last 50 items; the whole sequence is put together again here.
Their files have an order but no times. Sources: github.com/RUCAIBox/UniSRec, github.com/gimpong/MM23-MISSRec.
"""
from collections import defaultdict

import numpy as np

from .common import Raw, UserError, clean_text

NAMES = ()
CUT = 50
# users, items, interactions as the UniSRec paper prints them (Table 1)
PUBLISHED = {"Scientific": (8442, 4385, 59427), "Pantry": (13101, 4898, 126962), "Instruments": (24962, 9964, 208926),
             "Arts": (45486, 21019, 395150), "Office": (87436, 25986, 684837)}


def knows(name) -> bool:
    return False


def recognises(folder) -> bool:
    return len(list(folder.glob("*.item2index"))) > 0


def fetch(name, raw, mirror):
    raise NotImplementedError("these files lie on drives that ask for a browser: fetch them by hand")


def read(folder, name) -> Raw:
    """Raises UserError where a file is missing, an index has no name, or a feature file has another size."""
    stems = sorted(p.stem for p in folder.glob("*.item2index"))
    if len(stems) > 1:
        raise UserError(f"{folder} holds several data sets ({', '.join(stems)}): give each a folder of its own")
    path = lambda suffix: folder / f"{stems[0]}.{suffix}"
    item_keys, user_keys = _index(path("item2index")), _index(path("user2index"))
    users, items = [], []
    for user, sequence in sorted(_sequences(path, len(user_keys), len(item_keys)).items()):
        users += [user_keys[user]] * len(sequence)
        items += [item_keys[i] for i in sequence]
    catalog = {}
    for key, text in _lines(path("text"), 2):
        catalog.setdefault(key, {"title": clean_text(text), "text": [], "language": "en", "images": []})
    features = {modality: (suffix.lower(), _features(path(suffix), len(item_keys)))
                for modality, suffix in (("text", "feat1CLS"), ("image", "feat3CLS")) if path(suffix).is_file()}
    known = PUBLISHED.get(stems[0])
    known = known if known and known[1] == len(item_keys) else None    # else it is a part of that set
    return Raw(users, items, list(range(len(users))), {k: catalog[k] for k in item_keys if k in catalog},
               report={"item texts of other items": len(catalog.keys() - set(item_keys))}, clock="order",
               item_order=item_keys, user_order=user_keys, features=features,
               published=known and dict(zip(("users", "items", "interactions", "source"), (*known, "UniSRec"))) or {})


def _lines(path, columns):
    """Rows of a tab-separated file; a first line with `:token` in it is the header and is left out."""
    if not path.is_file():
        raise UserError(f"{path} is missing: copy it into the folder beside the other files of the data set")
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for number, line in enumerate(f, 1):
            row = line.rstrip("\r\n").split("\t", columns - 1)
            if number == 1 and ":token" in line or not line.strip():
                continue
            if len(row) != columns:
                raise UserError(f"{path}, line {number} has {len(row)} columns, not {columns}: fetch the file again")
            yield row


def _index(path) -> list:
    """Keys in index order. Raises UserError unless the indices are 0..n-1, each once."""
    rows = [(key.strip(), index.strip()) for key, index in _lines(path, 2)]
    by_index = {index: key for key, index in rows}
    keys = [by_index.get(str(i)) for i in range(len(rows))]
    if None in keys or len(set(keys)) < len(keys):
        raise UserError(f"{path} must give the indices 0 to {len(rows) - 1}, each to one key: fetch the file again")
    return keys


def _sequences(path, n_users, n_items) -> dict:
    """user index -> whole sequence of item indices.

    A row is (last CUT items before, target). The row before it ends where this row's list ends, so the first item of
    each such row is one item further back, until a list is shorter than the cut.
    """
    rows = defaultdict(dict)             # user -> {the last CUT items up to and with the target: row}
    last = {}
    for part in ("train", "valid", "test"):
        for user, before, target in _lines(path(f"{part}.inter"), 3):
            try:
                user, sequence = int(user), [*map(int, before.split()), int(target)]
                if not (0 <= user < n_users and min(sequence) >= 0 and max(sequence) < n_items):
                    raise ValueError
            except ValueError:
                raise UserError(f"{path(f'{part}.inter')} names user {user} or an item of theirs that the index "
                                f"files do not have: fetch the files again") from None
            rows[user][tuple(sequence[-CUT:])] = sequence
            if part != "train" or len(sequence) > len(last.get(user, ())):
                last[user] = sequence
    whole = {}
    for user, sequence in last.items():
        row, older = sequence, []
        while len(row) > CUT:
            row = rows[user].pop(tuple(row[:-1]), ())
            older += row[:1] if len(row) > CUT else []
        whole[user] = older[::-1] + sequence
    return whole


def _features(path, n_items):
    rows = np.fromfile(path, np.float32)
    if rows.size == 0 or rows.size % n_items or not np.isfinite(rows).all():
        raise UserError(f"{path} must hold finite float32 rows for {n_items} items, but has {rows.size} numbers "
                        f"or some that are not finite: fetch the file again")
    return rows.reshape(n_items, -1)
