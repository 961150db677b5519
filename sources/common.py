"""What every source shares: the shape of what it reads, the cleaning of strangers' text, safe writes.

A source (one file in this folder) turns raw files into a `Raw`; `sources.prepare` turns a `Raw` into `data/<name>/`.
"""
import csv
import gzip
import hashlib
import html
import json
import os
import re
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None


class UserError(ValueError):
    """Input that cannot be used. The message is one sentence: what, where, what to do. Exit code 2."""


@dataclass
class Raw:
    """Interactions and items as a source read them. The three interaction lists are parallel, in the file's order."""
    users: list                                  # str keys
    items: list                                  # str keys
    times: list                                  # numbers: seconds since 1970, or any order numbers (see clock)
    catalog: dict                                # key -> {"title": str, "text": [str], "language": str, "images": [str]}
    report: dict = field(default_factory=dict)   # what was found and dropped while reading, by name of the defect
    clock: str = "seconds"                       # seconds | day | order ("order" means the times are no real times)
    core: int = 0                                # iterative k-core on users and items; 0 = none
    need_catalog: bool = False                   # drop interactions with items that the catalog does not have
    item_order: list = None                      # item keys in id order; None = sorted by key
    user_order: list = None                      # user keys in row order; None = sorted by key
    features: dict = field(default_factory=dict) # modality -> (encoder, float32 (len(item_order), D)), zero row = missing
    published: dict = field(default_factory=dict)  # what a paper prints: {"users", "items", "interactions", "source"}
    image_root: str = ""                         # where picture paths start: absolute, or from the processed folder
    variants: list = None                        # parallel to items: an exact duplicate must share these as well
    picture_hosts: tuple = None                  # hosts that pictures may be fetched from; None = any public one
    extra: dict = field(default_factory=dict)    # file name -> {name: array}, saved as .npz (the demo's oracle)


TAG = re.compile(r"<(script|style)\b.*?(</\1\s*>|$)|<!--.*?(-->|$)|</?[a-zA-Z][^<>]*(>|$)", re.S | re.I)


def clean_text(value) -> str:
    """Any JSON value -> one line of plain text: entities decoded, tags and scripts gone, NFC, single spaces.

    Lists are joined by a space; dicts give their values; None, NaN and booleans give "". Non-ASCII letters stay.
    """
    if value is None or isinstance(value, bool) or value != value:
        return ""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        try:
            return " ".join(filter(None, map(clean_text, value)))
        except RecursionError:           # nobody nests texts that deep in earnest
            return ""
    text = TAG.sub(" ", html.unescape(html.unescape(str(value))))
    if not text.isprintable():           # control characters, lone surrogates
        text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def sentences(*parts, limit=2000) -> list:
    """Clean, non-empty, distinct texts in the order given; each is cut at `limit` characters."""
    return list(dict.fromkeys(t for t in (clean_text(p)[:limit] for p in parts) if t))


def k_core(users, items, k):
    """Boolean mask (n,) of the interactions left when users and items with fewer than k are dropped until none is.

    users, items: int arrays (n,).
    """
    keep = np.ones(len(users), bool)
    while k > 1:
        few_u = np.bincount(users[keep], minlength=users.max(initial=0) + 1) < k
        few_i = np.bincount(items[keep], minlength=items.max(initial=0) + 1) < k
        drop = keep & (few_u[users] | few_i[items])
        if not drop.any():
            break
        keep &= ~drop
    return keep


def placed(folder, table):
    """The file in the folder that holds a table, compressed or not; else None."""
    return next((path for path in (folder / table, folder / f"{table}.gz") if path.is_file()), None)


def each_row(path, columns, take, optional=()) -> dict:
    """Hand the named columns of each line to `take`, which returns None or the defect that makes the line unusable.

    Returns counts. An optional column that the table does not have is "" in every line. Raises UserError for a column
    that is missing, a damaged file, quotes that do not close, or more than 1 % unusable lines.
    """
    lines, bad, first_bad = 0, Counter(), None
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file, strict=True)         # else a stray quote swallows the lines up to the next one
            header = [name.strip().lower() for name in next(rows, [])]
            if missing := [name for name in columns if name not in header]:
                raise UserError(f"{path} must begin with a line that names the columns {', '.join(columns)}, but "
                                f"{', '.join(missing)} is not there: put a complete copy in its place")
            pick = itemgetter(*(header.index(name) if name in header else -1 for name in (*columns, *optional)))
            for row in filter(None, rows):
                lines += 1
                row.append("")                           # what position -1, a column that is not there, reads
                if defect := take(*pick(row)) if len(row) > len(header) else "columns_missing":
                    bad[defect] += 1
                    first_bad = first_bad or rows.line_num
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num} is not CSV ({error}): correct that line") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): put a complete copy in its place") from None
    return line_counts(path, lines, bad, first_bad)


def line_counts(path, lines, bad, first_bad) -> dict:
    """What a report says of a file's lines; bad: defect -> how many. Raises UserError above 1 % of unusable lines."""
    if bad.total() * 100 > lines:
        kinds = ", ".join(f"{kind} {count}" for kind, count in bad.items())
        raise UserError(f"{path}: {bad.total()} of {lines} lines cannot be used ({kinds}), the first is line "
                        f"{first_bad}: correct the file or put a complete copy there")
    return {"lines": lines, "bad_lines": dict(bad)} | ({"first_bad_line": first_bad} if bad else {})


@contextmanager
def atomic(path, mode="w"):
    """Open a temporary file beside `path`; on success it is synced and takes the place of `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        if hasattr(os, "fchmod"):        # not everywhere on Windows
            os.fchmod(fd, 0o644)
        with os.fdopen(fd, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise


def write_json(path, value):
    with atomic(path) as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): remove it and run the same command again") from None


@contextmanager
def alone_in(folder, wait=True):
    """Work in an existing folder that no other process works in: wait for it, or raise a UserError at once.

    The system ends the lock with the process, however that ends; it leaves no file. Without effect on Windows.
    """
    if fcntl is None:
        yield
        return
    at = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"another process is writing {folder}: wait for its end, or give another --out") from None
            print(f"waiting for another process that works in {folder}", flush=True)
            fcntl.flock(at, fcntl.LOCK_EX)
        except OSError:
            pass                         # a file system without locks
        yield
    finally:
        os.close(at)


def set_aside(path):
    """Rename an existing file or folder to the first free `path~N`, so that nothing on disk is lost."""
    path = Path(path)
    n = 1
    while (aside := path.with_name(f"{path.name}~{n}")).exists():
        n += 1
    path.rename(aside)
    return aside


def sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def keys_sha256(keys) -> str:
    """Fingerprint of item keys in id order: what ties a feature file or a model to its catalog."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def write_features(folder, modality, encoder, vectors, index, keys, about):
    """Write `features/<modality>-<encoder>.safetensors` and, beside it, the json that says what it is.

    vectors: (V, D) of the distinct sentences or pictures; a zero row means that there is none.
    index: (N, S) of each item's vectors, 1 + row of `vectors`, 0 = none; S is 1 where an item has one vector.
    keys: item keys in id order (N). about: what else fixes the numbers (weights, backend, template, versions).
    In the file both have a row 0, of zeros: the vectors' for "none", the index' for the padding item.
    """
    path = feature_path(folder, modality, encoder)
    vectors = np.pad(np.asarray(vectors, np.float32), ((1, 0), (0, 0)))
    index = np.where(vectors.any(1)[index], index, 0)
    tensors = {"vectors": vectors, "index": np.pad(index, ((1, 0), (0, 0))).astype(np.int32)}
    write_json(path.with_suffix(".json"), {
        "modality": modality, "encoder": encoder, "items": len(keys), "items_with": int(index.any(1).sum()),
        "items_sha256": keys_sha256(keys), "shapes": {k: list(v.shape) for k, v in tensors.items()}, **about})
    with atomic(path, "wb") as f:        # last: who sees this file finds the other
        f.write(safetensors.numpy.save(tensors))


def save_tensors(path, tensors, about=None):
    """Write tensors by name, wherever they lie, and a small dict about them."""
    with atomic(path, "wb") as f:
        f.write(safetensors.torch.save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
                                       {"about": json.dumps(about or {})}))


def load_tensors(path):
    """(tensors, about). Raises UserError where the file is truncated or no safetensors file."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get("about", "{}"))
    except Exception as e:               # the reader raises types of its own for each kind of damage
        raise UserError(f"{path} cannot be read ({e}): remove it and run the same command again") from None


def feature_path(folder, modality, encoder) -> Path:
    """`features/text-hash.safetensors`; in an encoder's name all but [a-z0-9_-] becomes a dash. Its json lies beside it."""
    encoder = re.sub(r"[^a-z0-9_-]+", "-", str(encoder).lower()).strip("-")
    return Path(folder) / "features" / f"{modality}-{encoder}.safetensors"


def command(main):
    """Run a script's main(): a UserError becomes one line on stderr and exit code 2, never a traceback."""
    try:
        sys.exit(main() or 0)
    except (UserError, OSError) as e:    # OSError: a full disk, a folder that may not be written
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is on disk", file=sys.stderr)
        sys.exit(130)
