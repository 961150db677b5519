"""The processed files that UniSRec and MISSRec publish: `<D>.train.inter .valid.inter .test.inter
.text .item2index .user2index` and, where present, `<D>.feat1CLS` (text) and `<D>.feat3CLS`
(image): raw float32, one row per item index.

Their `.inter` files hold one row per prefix, cut to the last 50 items; the whole sequence is put
together again here. They have an order but no times. Sources: github.com/RUCAIBox/UniSRec,
github.com/gimpong/MM23-MISSRec.
"""
from collections import defaultdict

import numpy as np

from common.files import UserError
from common.tables import Raw, clean_text

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
    item_keys = read_index(f"{stem}.item2index")
    user_keys = read_index(f"{stem}.user2index")
    users, items = [], []
    sequences = read_sequences(stem, len(user_keys), len(item_keys))
    for user, sequence in sorted(sequences.items()):
        users += [user_keys[user]] * len(sequence)
        items += [item_keys[i] for i in sequence]
    texts = {}
    for key, text in lines(f"{stem}.text", 2):
        texts.setdefault(key, clean_text(text))
    catalog = {
        key: {"title": texts[key], "text": [], "language": "en", "images": []}
        for key in item_keys if key in texts
    }
    features = {}
    for modality, suffix in (("text", "feat1CLS"), ("image", "feat3CLS")):
        path = folder / f"{stems[0]}.{suffix}"
        if path.is_file():
            features[modality] = (suffix.lower(), read_features(path, len(item_keys)))
    published = {}
    known = PUBLISHED.get(stems[0])
    if known and known[1] == len(item_keys):    # else it is a part of that set
        published = dict(zip(("users", "items", "interactions"), known), source="UniSRec")
    return Raw(
        users, items, list(range(len(users))), catalog,
        report={"item texts of other items": len(texts.keys() - set(item_keys))},
        clock="order",
        item_order=item_keys,
        user_order=user_keys,
        features=features,
        published=published,
    )


def lines(path, columns):
    """Rows of a tab-separated file, without a header (a first line with `:token` in it)."""
    try:
        file = open(path, encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: copy it into the folder beside the other files of the data set"
        ) from None
    with file:
        for number, line in enumerate(file, 1):
            header = number == 1 and ":token" in line
            if header or not line.strip():
                continue
            row = line.rstrip("\r\n").split("\t", columns - 1)
            if len(row) != columns:
                raise UserError(
                    f"{path}, line {number} has {len(row)} columns, not {columns}: fetch the file "
                    f"again"
                )
            yield row


def read_index(path) -> list:
    """Keys in index order. Raises UserError unless the indices are 0..n-1, each once."""
    rows = [(key.strip(), index.strip()) for key, index in lines(path, 2)]
    by_index = {index: key for key, index in rows}
    keys = [by_index.get(str(i)) for i in range(len(rows))]
    if None in keys or len(set(keys)) < len(keys):
        raise UserError(
            f"{path} must give the indices 0 to {len(rows) - 1}, each to one key: fetch the file "
            f"again"
        )
    return keys


def read_sequences(stem, n_users, n_items) -> dict:
    """user index -> whole sequence of item indices."""
    rows = defaultdict(dict)    # user -> {the last CUT items up to and with the target: row}
    last = {}                   # user -> the row that ends last
    for part in ("train", "valid", "test"):
        path = f"{stem}.{part}.inter"
        for user, before, target in lines(path, 3):
            try:
                user = int(user)
                row = [*map(int, before.split()), int(target)]
                known = 0 <= user < n_users and min(row) >= 0 and max(row) < n_items
            except ValueError:
                known = False
            if not known:
                raise UserError(
                    f"{path} names user {user} or an item of theirs that the index files do not "
                    f"have: fetch the files again"
                )
            rows[user][tuple(row[-CUT:])] = row
            if part != "train" or len(row) > len(last.get(user, ())):
                last[user] = row
    return {user: whole_sequence(row, rows[user]) for user, row in last.items()}


def whole_sequence(last, rows) -> list:
    """The sequence that ends with the row `last`; rows: {the last CUT items up to the target: row}.

    A row is (CUT items before, target). The row before it ends where this row's list ends, so its
    first item is one further back, until a list is shorter than the cut.
    """
    row = last
    older = []
    while len(row) > CUT:
        row = rows.pop(tuple(row[:-1]), ())
        if len(row) > CUT:
            older.append(row[0])
    return older[::-1] + last


def read_features(path, n_items):
    """float32 (n_items, D). Raises UserError."""
    rows = np.fromfile(path, np.float32)
    if rows.size == 0 or rows.size % n_items or not np.isfinite(rows).all():
        raise UserError(
            f"{path} must hold finite float32 rows for {n_items} items, but has {rows.size} "
            f"numbers or some that are not finite: fetch the file again"
        )
    return rows.reshape(n_items, -1)
