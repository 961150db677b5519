"""Vectors that somebody has made: a .npy or .safetensors file -> one row for each item.

Which row is which item is said in one of these ways:

    nothing               rows in the order of items.jsonl
    a column of ids       the first column of the numbers is the items' keys
    NAME.ids.txt          beside NAME.npy or NAME.safetensors: the keys, one a line
    fields                .npy with two fields: the key, and the vector
    tensors by key        .safetensors with one vector for each item, under its key
"""
import re
from pathlib import Path

import numpy as np

from .files import UserError, first_line, load_tensors, read_text, sha256
from .tables import whole_number

ENDS = (".npy", ".safetensors")
MOST = .9    # share of different numbers in a column of ids; fewer are a feature's


def is_vectors(name) -> bool:
    """Whether an encoder's name is a file of vectors, and not ViT-B-32:file.safetensors."""
    if not str(name).endswith(ENDS):
        return False
    architecture = re.match(r"[^/\\:]{2,}:", str(name))    # one letter is a drive
    return architecture is None or Path(name).is_file()


def digest_of(path) -> str:
    """SHA-256 of a file of vectors and of the ids beside it."""
    digests = [sha256(file) for file in (Path(path), ids_beside(path)) if file.is_file()]
    return "+".join(digests)


def ids_beside(path) -> Path:
    return Path(path).with_suffix(".ids.txt")


def read_vectors(path, keys, described=None) -> tuple:
    """(rows (N, D) float32, zero where there is none; sentences on what is not used).

    keys: of the items, in id order (N). described: how many of them, the first ones, stand in the
    user's items.jsonl; -1 where that file has other lines as well. Raises UserError for a file
    that cannot be read, has another number of rows, or numbers that are not finite.
    """
    path = Path(path)
    rows, ids = contents(path)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "fiub":
        raise UserError(
            f"{path} holds {rows.dtype} numbers of shape {rows.shape}, and a row of numbers for "
            f"each item is wanted: (items, width)"
        )
    notes = []
    if ids is None:
        rows, ids, notes = column_of_ids(path, rows, keys)
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)    # what is too large becomes infinite
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
        raise UserError(f"{path}, row {bad} (counted from 0) has a number that is not finite")
    if ids is None:
        if described == -1:
            raise UserError(
                f"{path} does not say whose its rows are, and the file of items has lines twice or "
                f"lines that cannot be used: write the items' keys into {ids_beside(path).name}, "
                f"one a line, a line for each row"
            )
        notes.append(f"the rows of {path.name} are taken in the order of the catalog, the first is "
                     f"{keys[0]}'s")
        return in_order(path, rows, keys, described or len(keys)), notes
    rows, more = by_id(path, rows, ids, keys)
    return rows, notes + more


def contents(path) -> tuple:
    """(rows, their items' keys or None) of a file."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give a file of vectors, .npy or .safetensors")
    beside = ids_beside(path)
    ids = None
    if beside.is_file():
        ids = read_text(beside, "save it as UTF-8, one id a line").lstrip("\ufeff").splitlines()
    if path.suffix == ".npy":
        rows = array_in(path)
        if rows.dtype.names and len(rows.dtype.names) == 2:    # key and vector
            key, vector = rows.dtype.names
            ids = [as_text(value) for value in rows[key].tolist()]
            rows = rows[vector]
        return rows, ids
    tensors, _ = load_tensors(path, "save it again, with safetensors")
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    if len(arrays) == 1:
        return next(iter(arrays.values())), ids
    widths = {array.shape for array in arrays.values()}
    if len(widths) == 1 and all(array.ndim == 1 for array in arrays.values()):
        return np.stack(list(arrays.values())), list(arrays)
    raise UserError(
        f"{path} holds the tensors {', '.join(list(arrays)[:5])}: one of shape (items, width) is "
        f"wanted, or one vector for each item under its key"
    )


def array_in(path):
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("it holds several arrays, as .npz does")
        return found
    except Exception as error:    # cut, no .npy at all, or Python objects, which would run code
        raise UserError(
            f"{path} cannot be read as an array of numbers ({first_line(error)}): save it with "
            f"numpy.save, as numbers"
        ) from None


def as_text(key) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)


def column_of_ids(path, rows, keys) -> tuple:
    """(rows, None, notes), or, where their first column holds items' keys, (rows without it, the
    keys, notes).

    No real feature is a distinct whole number in every row, and some item's key as well. Raises
    UserError for keys that have lost their last digits.
    """
    first = rows[:, 0]
    whole = rows.shape[1] > 1 and np.isfinite(first).all() and (first % 1 == 0).all()
    if not whole or len(set(first.tolist())) < MOST * len(first):
        return rows, None, []
    coarse = rows.dtype.itemsize < 8
    exact = 2 ** (24 if coarse else 53)    # beyond, floats leave whole numbers out
    if rows.dtype.kind == "f" and first.max() > exact:
        advice = "save it as float64, or " if coarse else ""
        raise UserError(
            f"{path} has a first column of large whole numbers, as ids are, which {rows.dtype} "
            f"cannot hold: {advice}write the ids into {ids_beside(path).name}, one a line"
        )
    by_number = {whole_number(key): key for key in keys}    # 0012 is 12 here
    by_number.pop(None, None)
    ids = [by_number.get(int(number), f"{number:.0f}") for number in first.tolist()]
    if not set(ids) & set(by_number.values()):
        return rows, None, [f"the first column of {path.name} has whole numbers that are no items' "
                            f"ids, and is taken for a feature"]
    return rows[:, 1:], ids, [f"the first column of {path.name} is taken for the items' ids"]


def in_order(path, rows, keys, described):
    """Rows of all items, or of those in items.jsonl, which are the first."""
    if len(rows) not in (len(keys), described):
        wanted = f"{len(keys)}" if described == len(keys) else f"{described} or {len(keys)}"
        raise UserError(
            f"{path} has {len(rows)} rows, and the data set has {wanted} items: give a row for "
            f"each, in the order of items.jsonl, or say whose they are in "
            f"{ids_beside(path).name}, one id a line"
        )
    filled = np.zeros((len(keys), rows.shape[1]), np.float32)
    filled[:len(rows)] = rows
    return filled


def by_id(path, rows, ids, keys) -> tuple:
    """(rows in the order of the keys, sentences on ids and items without a partner)."""
    if len(ids) != len(rows) or len(set(ids)) < len(ids):
        raise UserError(
            f"{path} has {len(rows)} rows and {len(set(ids))} different ids for them: give each "
            f"row an id of its own"
        )
    place = {key: number for number, key in enumerate(keys)}
    known = [number for number, key in enumerate(ids) if key in place]
    if not known:
        raise UserError(
            f"none of the {len(ids)} ids of {path} is an item of the data set ({ids[0]} against "
            f"{keys[0]}): are they written alike?"
        )
    filled = np.zeros((len(keys), rows.shape[1]), np.float32)
    filled[[place[ids[number]] for number in known]] = rows[known]
    notes = []
    if len(known) < len(ids):
        first = next(key for key in ids if key not in place)
        notes.append(
            f"{len(ids) - len(known)} of {len(ids)} rows of {path.name} are of no item of the data "
            f"set, the first is {first}"
        )
    return filled, notes
