"""Raw data -> `data/<name>/`. One file per place that data comes from.

A source is a module in this folder that has

    recognises(folder) -> bool           does this folder hold the source's raw files?
    read(folder, name) -> Raw            read them (name is None for somebody's own folder)

and, only where they apply,

    NAMES = ("hm",)                      data sets that it can fetch by name, for help texts
    knows(name) -> bool                  further names, where NAMES cannot list them all
    fetch(name, raw, mirror) -> Path     bring a named data set into the folder `raw`; files already
                                         there are kept. Needed with NAMES or knows
    BY = ("article", "product")          what an item can be, the default first; read takes `by`
    pictures_in(folder) -> int           how many pictures lie there that read finds by looking: if
                                         there are more than before, the folder is read again

`Raw`, its columns (`Keys`: a line takes four bytes, however long its key) and what helps to read
tables are in common/tables.py, readers of tables with usual names in common/interactions.py and
common/items.py; recbole.py is a short example. `Raw.report` has an entry
under the name of each file that was read: other files of the folder are named as not read. A new
file is on the command line at once.
"""
import importlib
import json
import os
import pkgutil
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.features import write_features
from common.files import (
    AGAIN,
    UserError,
    alone_in,
    arrays_sha256,
    atomic,
    filled,
    has_form,
    keys_sha256,
    read_json,
    set_aside,
    sha256,
    unfinished,
    write_json,
)
from common.tables import Raw, first_of_each

from .notes import PICTURES, notes_of_files

FORMAT = 3    # of the processed folder; a folder of another format is made anew. Raise it also when
              # a reader in common/ reads otherwise: only the code of sources is watched
PIECE = 1 << 17    # interactions, and the rest of the last user's, that are sorted at once
SOURCES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
SOURCES = [source for source in SOURCES if hasattr(source, "recognises")]
TEXT = (str, type(None))
COUNT = (int, str)    # of a paper that does not say it: a dash
PUBLISHED = {"users": COUNT, "items": COUNT, "interactions": COUNT, "source": str}
ABOUT = {     # what source.json holds, as has_form takes it
    "name": str,
    "from": str,
    "source": str,
    "code": str,
    "by": TEXT,
    "pictures": str,
    "pictures_in": int,
    "files": {str: {"bytes": int, "mtime_ns": int, "sha256": str}},
    "clock": str,
    "image_root": str,
    "picture_hosts": ([str], type(None)),
    "core": int,
    "described": int,
    "items_sha256": str,
    "sequences_sha256": str,
    "report": dict,
    "notes": [str],
    "features": {str: str},
    "published": (PUBLISHED, {str: ()}),
    "counts": [{"step": str, "users": int, "items": int, "interactions": int}],
}
SINCE = {"code": "", "pictures_in": 0, "described": 0, "notes": []}    # older folders lack these
NAMES = [name for source in SOURCES for name in getattr(source, "NAMES", ())]
BY = sorted({by for source in SOURCES for by in getattr(source, "BY", ())})


def knows(source, name) -> bool:
    """Whether a source can fetch or make a data set of this name."""
    if name in getattr(source, "NAMES", ()):
        return True
    return hasattr(source, "knows") and source.knows(name)


# ---------------- prepare: what, from where, is it done

def prepare(where, root="data", core=None, mirror=None, by=None) -> Path:
    """A known name, a folder of raw files or a processed folder -> the processed folder.

    Work that is done is not done again: a folder's files are compared by size, time and SHA-256,
    and so is the code of the source. What a changed source or option replaces is renamed to
    `<name>~1`, never deleted.

    core: k of the iterative k-core on users and items; None = what the source's papers do (none
    for a folder). mirror: base URL to download from instead of the built-in ones. by: what an item
    is, where the source has a choice. Raises UserError.
    """
    folder = Path(where)
    if (folder / "source.json").is_file() and (folder / "sequences.npz").is_file():
        return processed(folder, core, by)
    order = place_order(str(where), Path(root), core, by)
    if what_changed(order) is None:
        print(f"{order.out} is up to date, and is used as it was prepared", flush=True)
        return order.out
    order.out.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(order.out.parent):
        finish(order.out)
        changed = what_changed(order)
        if changed is not None:    # else another process has made it meanwhile
            carry_out(order, mirror, changed)
    return order.out


def processed(folder, core, by) -> Path:
    """A processed folder, if it is what the options ask for."""
    about = read_about(folder)
    fits = about.get("format") == FORMAT
    fits = fits and core in (None, about["core"]) and by in (None, about["by"])
    if not fits:
        raise UserError(
            f"{folder} is a processed folder of another format or with another --core or --by: "
            f"give the raw data instead"
        )
    return folder


def read_about(folder, advice=AGAIN) -> dict:
    """source.json of a processed folder. Raises UserError, which ends with the advice."""
    path = folder / "source.json"
    about = read_json(path, dict, advice)
    if about.get("format") == FORMAT and not has_form(SINCE | about, ABOUT):
        raise UserError(f"{path} holds something else than it should: {advice}")
    return about


@dataclass
class Order:
    """What is to be prepared."""
    source: object     # the module
    name: str          # of a known data set; None for somebody's folder
    origin: str        # the name, or the folder's full path
    base: str          # name of its folders, without what the options add
    raw: Path          # where the raw files are, or will be
    out: Path          # the processed folder
    core: int
    by: str

    @property
    def code(self) -> str:
        """SHA-256 of the source's code."""
        return sha256(self.source.__file__)

    @property
    def pictures(self) -> int:
        return getattr(self.source, "pictures_in", no_pictures)(self.raw)


def no_pictures(folder) -> int:
    return 0


def place_order(where, root, core, by) -> Order:
    """Find the source of a name or a folder, and the folder that the result is to have."""
    name = where
    source = next((source for source in SOURCES if knows(source, where)), None)
    if source is None:
        name = None
        source = source_of_folder(Path(where))
    if core is not None and core < 0:
        raise UserError(f"--core {core} must not be negative; 0 filters nothing")
    kinds = getattr(source, "BY", ())
    if by not in (None, *kinds):
        advice = f"give {' or '.join(kinds)}" if kinds else "leave it out"
        raise UserError(f"--by {by} means nothing for {where}: {advice}")
    suffix = f"-{by}" if by in kinds[1:] else ""
    suffix += f"-core{core}" if core is not None else ""
    if name:
        base, origin, raw = slug(name), name, root / "raw" / slug(name)
    else:
        raw = Path(where)
        base, origin = folder_name(raw, root, suffix), str(raw.resolve())
    by = by or (kinds[0] if kinds else None)
    return Order(source, name, origin, base, raw, root / (base + suffix), core, by)


def source_of_folder(folder):
    """The source that recognises a folder's files. Raises UserError."""
    if folder.is_file():
        raise UserError(f"--data {folder} is a file: give the folder that it lies in")
    if not folder.is_dir():
        raise UserError(
            f"--data {folder} is neither a folder nor a known data set: give a folder or one of "
            f"{', '.join(NAMES)}"
        )
    for source in SOURCES:
        if source.recognises(folder):
            return source
    raise UserError(
        f"no source recognises the files in {folder} ({files_in(folder)}): for your own data put "
        f"interactions.csv (header user,item,time) and, if you have them, items.jsonl there; what "
        f"else is read stands in README.md"
    )


def files_in(folder) -> str:
    """The names of a few files."""
    names = [path.name for path in raw_files(folder)]
    more = ", ..." if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "there is none"


def slug(name) -> str:
    """A folder name of [a-z0-9_-] only: nothing in it could leave the folder."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "data"


def folder_name(folder, root, suffix) -> str:
    """A name, up to the suffix, for somebody's folder: its own, told apart from known sets' names
    and from other folders of the same name."""
    resolved = folder.resolve()
    name = slug(resolved.name)
    if name in (*NAMES, "raw", "cache") or re.match(r"amazon20\d\d-", name):
        name += "-folder"
    taken = root / (name + suffix)
    if (taken / "source.json").is_file():
        about = read_about(taken)
        before = about.get("from", "")
        moved = not Path(before).exists() and same_files(raw_files(folder), about.get("files", {}))
        if before != str(resolved) and not moved:
            name += f"-{keys_sha256([str(resolved)])[:6]}"
    return name


def what_changed(order):
    """Why a folder is to be prepared: a few words; None where it is up to date.

    The files of a fetched data set do not change, but for its pictures.
    """
    if not (order.out / "source.json").is_file():
        return "it was not prepared yet"
    about = read_about(order.out)
    if about.get("format") != FORMAT:
        return "it was prepared in another format"
    if about.get("from") != order.origin:
        return "it was prepared from another folder"
    if about.get("code", order.code) != order.code:
        return f"the code of sources/{Path(order.source.__file__).name} has changed"
    if order.pictures > about.get("pictures_in", 0):
        return "there are more pictures"
    if order.name is None and not same_files(raw_files(order.raw), about.get("files", {})):
        return "its raw files have changed"
    return None


def raw_files(folder):
    """The files of a folder, without pictures, which may be a great many."""
    return sorted(
        path for path in folder.iterdir()
        if path.is_file() and path.name[0] != "." and path.suffix.lower() not in PICTURES
    )


def same_files(paths, known) -> bool:
    """Whether files are those whose fingerprints are known. A new time alone is no change."""
    if {path.name for path in paths} != known.keys():
        return False
    for path in paths:
        stat, before = path.stat(), known[path.name]
        if stat.st_size != before["bytes"]:
            return False
        if stat.st_mtime_ns != before["mtime_ns"] and sha256(path) != before["sha256"]:
            return False
    return True


def fingerprint(path) -> dict:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path)}


def carry_out(order, mirror, reason):
    """Fetch, read and build what is ordered. reason: why an older folder is replaced."""
    raw_folder = order.raw
    if order.name:
        raw_folder = order.source.fetch(order.name, order.raw, mirror)
    print(f"preparing {order.out} from {raw_folder}", flush=True)
    pictures = order.pictures    # counted before they are read: later ones will be noticed
    choice = {"by": order.by} if order.by else {}
    raw = order.source.read(raw_folder, order.name, **choice)
    if order.core is not None:
        raw.core = order.core
    files = {path.name: fingerprint(path) for path in raw_files(raw_folder)}
    raw.notes += notes_of_files(raw.report, files)
    about = {
        "format": FORMAT,
        "name": order.out.name,
        "from": order.origin,
        "source": order.source.__name__.rpartition(".")[2],
        "code": order.code,
        "by": order.by,
        "pictures": f"../raw/{order.base}/pictures",
        "pictures_in": pictures,
        "files": files,
    }
    build(raw, order.out, about, reason)


# ---------------- build: filter, number, write

class Columns:
    """The interactions as parallel arrays, one user after the other, each user's by (time, line in
    the file); and what each filter has left of them."""

    def __init__(self, raw, user_keys, item_keys):
        users = raw.users.places_in(user_keys)
        # fractions of a second still order events; equal times stay in the order of the lines
        order = np.lexsort((raw.times, users))
        self.users = users[order]
        del users    # what is not needed is let go: this is where the memory is fullest
        self.items = raw.items.places_in(item_keys)[order]
        self.times = raw.times[order]
        self.variants = self.items
        if raw.variants:
            self.variants = np.asarray(raw.variants.numbers)[order]
        self.parts = np.zeros(len(order), np.int8)
        if raw.parts is not None:
            self.parts = raw.parts[order]
        self.steps = []
        self.count("read")

    def first_of_each(self):
        """(n,) bool: which are the first of their user, time and variant."""
        begins = np.unique(np.searchsorted(self.users, self.users[::PIECE]))
        first = [np.zeros(0, bool)]
        for begin, end in zip(begins, [*begins[1:], len(self.users)]):
            columns = (self.variants, self.times, self.users)
            first.append(first_of_each(*(column[begin:end] for column in columns)))
        return np.concatenate(first)

    def keep(self, step, which):
        """Keep some of the interactions (a mask); count them under the step's name."""
        self.users = self.users[which]
        self.items = self.items[which]
        self.times = self.times[which]
        self.variants = self.variants[which]
        self.parts = self.parts[which]
        self.count(step)

    def count(self, step):
        self.steps.append({
            "step": step,
            "users": len(occurring(self.users)),
            "items": len(occurring(self.items)),
            "interactions": len(self.users),
        })


def build(raw: Raw, out: Path, about: dict, reason="its source has changed"):
    """Filter, number and write what a source read. about: the head of source.json.

    Users and items are numbered in the order given by the source, else sorted by key, so that the
    result depends on nothing but the data. A user's items are ordered by (time, line in the file).
    Raises UserError when nothing is left.
    """
    if not len(raw.users):
        raise UserError(
            f"no interactions were found for {about['name']}: check the raw files in its folder"
        )
    user_keys = raw.user_order or sorted(raw.users.names)
    item_keys = raw.item_order or sorted({*raw.items.names, *raw.catalog})
    columns = Columns(raw, user_keys, item_keys)
    apply_filters(raw, columns, item_keys, about["name"])

    # an untouched folder keeps its whole catalog; after a filter only the items that still occur
    filtered = raw.core > 1 or raw.need_catalog
    kept_items = occurring(columns.items) if filtered else np.arange(len(item_keys))
    kept_users = occurring(columns.users)
    keys = [item_keys[i] for i in kept_items]
    sequences = sequences_of(columns, kept_items)
    if raw.parts is None:
        del sequences["parts"]

    with filled(out, "source.json") as made:
        write_items(made, keys, raw.catalog)
        write_arrays(made / "sequences.npz", sequences)
        with atomic(made / "users.txt") as file:
            file.writelines(f"{user_keys[user]}\n" for user in kept_users)
        if raw.core <= 1:    # the extra arrays know the items by their numbers
            for stem, arrays in raw.extra.items():
                write_arrays(made / f"{stem}.npz", arrays)
        for modality, (encoder, rows) in raw.features.items():
            rows = rows[kept_items]
            index = np.arange(1, len(rows) + 1)[:, None]
            origin = {"weights": "given with the data"}
            write_features(made, modality, encoder, rows, index, keys, origin)
        what_is_made = about_data(raw, keys, sequences) | {"counts": columns.steps}
        keep_features(out, made, what_is_made["items_sha256"])
        write_json(made / "source.json", about | what_is_made)    # last: the folder is whole
        take_place(made, out, reason)


def about_data(raw, keys, sequences) -> dict:
    """What source.json says of what was made. keys: of the items, in id order."""
    return {
        "clock": raw.clock,
        "image_root": raw.image_root,
        "picture_hosts": raw.picture_hosts,
        "core": raw.core,
        "described": -1 if raw.catalog_gaps else described_first(keys, raw.catalog),
        "items_sha256": keys_sha256(keys),
        "sequences_sha256": arrays_sha256(sequences.values()),
        "report": raw.report,
        "notes": raw.notes,
        "features": {modality: encoder for modality, (encoder, _) in raw.features.items()},
        "published": raw.published,
    }


def apply_filters(raw, columns, item_keys, name):
    """Drop what the source wants dropped. Raises UserError when nothing is left."""
    if raw.need_catalog:
        described = np.array([key in raw.catalog for key in item_keys])
        columns.keep("items without metadata dropped", described[columns.items])
    if raw.clock != "order":
        columns.keep("exact duplicates dropped", columns.first_of_each())
    if raw.core > 1:
        columns.keep(f"{raw.core}-core", k_core(columns.users, columns.items, raw.core))
    if not len(columns.users):
        steps = ", ".join(step["step"] for step in columns.steps)
        raise UserError(
            f"no interactions of {name} are left after its filters ({steps}): ask for a smaller "
            f"--core"
        )


def sequences_of(columns, kept_items) -> dict:
    """{"items": ids 1..N, one user after the other, "times", "parts": 0 train, 1 valid, 2 test,
    "offsets": where each user begins}"""
    ids = np.zeros(kept_items.max() + 1, np.int32)
    ids[kept_items] = np.arange(1, len(kept_items) + 1)
    lengths = np.bincount(columns.users)
    times = np.empty(len(columns.times), np.int64)
    np.floor(columns.times, out=times, casting="unsafe")
    return {
        "items": ids[columns.items],
        "times": times,
        "parts": columns.parts,
        "offsets": np.concatenate([[0], np.cumsum(lengths[lengths > 0])]),
    }


def described_first(keys, catalog) -> int:
    """How many items the catalog has, if they are the first; else 0."""
    known = [key in catalog for key in keys]
    count = sum(known)
    return count if all(known[:count]) else 0


def write_items(folder, keys, catalog):
    with atomic(folder / "items.jsonl") as file:
        for key in keys:
            item = catalog.get(key, {})
            row = {
                "key": key,
                "title": item.get("title", ""),
                "text": item.get("text", []),
                "language": item.get("language", ""),
                "images": item.get("images", []),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_arrays(path, arrays):
    with atomic(path, "wb") as file:
        np.savez(file, **arrays)


def finish(out):
    """Give its name to a folder that a killed process had made whole, and its elder set aside."""
    made = unfinished(out)
    if not out.exists() and (made / "source.json").is_file():
        made.rename(out)


def keep_features(old, new, items_sha256):
    """Give a new folder the feature files of the one before, where the items are the same: the
    same files under a second name, or copies where the disk has no such thing."""
    if not (old / "source.json").is_file():
        return
    if read_about(old).get("items_sha256") != items_sha256:
        return
    for path in sorted((old / "features").glob("*")):
        place = new / "features" / path.name
        if path.is_file() and not place.exists():
            place.parent.mkdir(exist_ok=True)
            try:
                os.link(path, place)
            except OSError:
                shutil.copy2(path, place)


def take_place(made, out, reason):
    """Give a folder that is ready its name; an older one is kept aside."""
    aside = set_aside(out) if out.exists() else None
    made.rename(out)
    if aside is not None:
        print(f"{out}: {reason}; the old folder is now {aside}", flush=True)


def occurring(numbers):
    """The distinct ones of some small numbers, ascending."""
    return np.flatnonzero(np.bincount(numbers))


def k_core(users, items, k):
    """Which interactions are left when users and items with fewer than k are dropped until none is.

    users, items: int arrays (n,) -> bool (n,)
    """
    keep = np.ones(len(users), bool)
    while k > 1:
        few_users = np.bincount(users[keep], minlength=users.max(initial=0) + 1) < k
        few_items = np.bincount(items[keep], minlength=items.max(initial=0) + 1) < k
        drop = keep & (few_users[users] | few_items[items])
        if not drop.any():
            break
        keep &= ~drop
    return keep
