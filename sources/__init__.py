"""Raw data -> `data/<name>/`. One file per place that data comes from; a new file here is on the command line at once.

A source module has four functions (see folder.py for the shortest):

    knows(name) -> bool                  is this a data set that the source can fetch or make?
    recognises(folder) -> bool           does this folder hold the source's raw files?
    fetch(name, raw, mirror) -> Path     bring a known data set into the folder `raw`; files already there are kept
    read(folder, name) -> Raw            read the raw files (name is None for somebody's own folder)

and `NAMES`, the names for help texts. `BY = ("article", "product")`, where a source has it, says what an item can be,
the default first; read then takes it as `by`. `pictures_in(folder) -> int`, where it has it, counts the pictures whose
paths read finds by looking: when there are more than before, the folder is read again.
"""
import importlib
import json
import pkgutil
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from .common import (Raw, UserError, alone_in, atomic, k_core, keys_sha256, read_json, set_aside, sha256, write_features,
                     write_json)

FORMAT = 3                               # of the processed folder; a folder of another format is made anew
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
SOURCES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
SOURCES = [m for m in SOURCES if hasattr(m, "recognises")]
NAMES = [name for m in SOURCES for name in m.NAMES]
BY = sorted({by for m in SOURCES for by in getattr(m, "BY", ())})


def prepare(where, root="data", core=None, mirror=None, by=None) -> Path:
    """A known data set's name, a folder of raw files or a processed folder -> the processed folder.

    Work that is already done is not done again: a folder's files are compared by size, time and SHA-256. What a
    changed source or option replaces is renamed to `<name>~1`, never deleted.

    core: k of the iterative k-core on users and items; None = what the source's papers do (none for a folder).
    mirror: base URL to download from instead of the built-in ones. by: what an item is, where the source has a choice.
    Raises UserError.
    """
    root, folder = Path(root), Path(where)
    if (folder / "source.json").is_file() and (folder / "sequences.npz").is_file():
        about = read_json(folder / "source.json")
        if about.get("format") != FORMAT or core not in (None, about["core"]) or by not in (None, about["by"]):
            raise UserError(f"{folder} is a processed folder of another format or with another --core or --by: "
                            f"give the raw data instead")
        return folder
    source = next((m for m in SOURCES if m.knows(str(where))), None)
    name = str(where) if source else None
    if source is None:
        if not folder.is_dir():
            raise UserError(f"--data {where} is neither a folder nor a known data set: "
                            f"give a folder or one of {', '.join(NAMES)}")
        source = next((m for m in SOURCES if m.recognises(folder)), None)
        if source is None:
            raise UserError(f"no source recognises the files in {folder}: for your own data put interactions.csv "
                            f"(header user,item,time) and, if you have them, items.jsonl there")
    kinds = getattr(source, "BY", ())
    if by not in (None, *kinds):
        raise UserError(f"--by {by} means nothing for {where}: "
                        + (f"give {' or '.join(kinds)}" if kinds else "leave it out"))
    origin = name or str(folder.resolve())
    suffix = (f"-{by}" if by in kinds[1:] else "") + (f"-core{core}" if core is not None else "")
    base = _slug(name) if name else _folder_name(folder, root, suffix)
    raw_folder, out = root / "raw" / base if name else folder, root / (base + suffix)
    pictures_in = getattr(source, "pictures_in", lambda folder: 0)
    fresh = lambda: _is_fresh(out, origin, None if name else raw_folder, pictures_in(raw_folder))
    if fresh():
        return out
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        if fresh():                      # another process made it meanwhile
            return out
        if name:
            raw_folder = source.fetch(name, raw_folder, mirror)
        print(f"preparing {out} from {raw_folder}", flush=True)
        seen = pictures_in(raw_folder)   # before they are read: what comes meanwhile is noticed the next time
        raw = source.read(raw_folder, name, **({"by": by or kinds[0]} if kinds else {}))
        if core is not None:
            raw.core = core
        build(raw, out, {"format": FORMAT, "name": out.name, "from": origin,
                         "source": source.__name__.rpartition(".")[2], "by": by or (kinds[0] if kinds else None),
                         "pictures": f"../raw/{base}/pictures", "pictures_in": seen,
                         "files": {p.name: _fingerprint(p) for p in _raw_files(raw_folder)}})
    return out


def build(raw: Raw, out: Path, about: dict):
    """Filter, number and write what a source read. about: the head of source.json.

    Users and items are numbered in the order given by the source, else sorted by key, so that the result depends on
    nothing but the data. A user's items are ordered by (time, line in the file). Raises UserError when nothing is left.
    """
    if not raw.users:
        raise UserError(f"no interactions were found for {about['name']}: check the raw files named in its folder")
    user_keys = raw.user_order or sorted(set(raw.users))
    item_keys = raw.item_order or sorted(set(raw.items) | set(raw.catalog))
    users, items = _codes(raw.users, user_keys), _codes(raw.items, item_keys)
    times = np.asarray(raw.times)        # fractions of a second still order events
    variants = _codes(raw.variants, sorted(set(raw.variants))) if raw.variants else items
    steps = []

    def count(step, keep=slice(None)):
        nonlocal users, items, times, variants
        users, items, times, variants = users[keep], items[keep], times[keep], variants[keep]
        steps.append({"step": step, "users": len(np.unique(users)), "items": len(np.unique(items)),
                      "interactions": len(users)})

    count("read")
    if raw.need_catalog:
        count("items without metadata dropped", np.array([k in raw.catalog for k in item_keys])[items])
    if raw.clock != "order":
        count("exact duplicates dropped", _first(users, variants, times))
    if raw.core > 1:
        count(f"{raw.core}-core", k_core(users, items, raw.core))
    if not len(users):
        raise UserError(f"no interactions of {about['name']} are left after its filters "
                        f"({', '.join(s['step'] for s in steps)}): ask for a smaller --core")
    # an untouched folder keeps its whole catalog; after a filter only the items that still occur
    kept_items = np.unique(items) if raw.core > 1 or raw.need_catalog else np.arange(len(item_keys))
    kept_users = np.unique(users)
    users, items = np.searchsorted(kept_users, users), np.searchsorted(kept_items, items)
    order = np.lexsort((np.arange(len(users)), times, users))
    keys = [item_keys[i] for i in kept_items]
    sequences = {"items": (items[order] + 1).astype(np.int32), "times": np.floor(times[order]).astype(np.int64),
                 "offsets": np.searchsorted(users[order], np.arange(len(kept_users) + 1))}

    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        with atomic(tmp / "items.jsonl") as f:
            for key in keys:
                item = raw.catalog.get(key, {})
                f.write(json.dumps({"key": key, "title": item.get("title", ""), "text": item.get("text", []),
                                    "language": item.get("language", ""), "images": item.get("images", [])},
                                   ensure_ascii=False) + "\n")
        with atomic(tmp / "sequences.npz", "wb") as f:
            np.savez(f, **sequences)
        with atomic(tmp / "users.txt") as f:
            f.writelines(f"{user_keys[u]}\n" for u in kept_users)
        for stem, arrays in raw.extra.items() if raw.core <= 1 else ():          # they know the items by their numbers
            with atomic(tmp / f"{stem}.npz", "wb") as f:
                np.savez(f, **arrays)
        for modality, (encoder, rows) in raw.features.items():
            rows = rows[kept_items]
            write_features(tmp, modality, encoder, rows, np.arange(1, len(rows) + 1)[:, None], keys,
                           {"weights": "given with the data"})
        write_json(tmp / "source.json", about | {
            "clock": raw.clock, "image_root": raw.image_root,
            "picture_hosts": raw.picture_hosts, "core": raw.core, "items_sha256": keys_sha256(keys),
            "sequences_sha256": keys_sha256([a.tobytes().hex() for a in sequences.values()]), "report": raw.report,
            "features": {modality: encoder for modality, (encoder, _) in raw.features.items()}, "counts": steps,
            "published": raw.published})
        if out.exists():
            print(f"the source of {out} has changed: the old folder is now {set_aside(out)}")
        tmp.chmod(0o755)
        tmp.rename(out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _codes(values, keys):
    index = {k: i for i, k in enumerate(keys)}
    return np.fromiter((index[v] for v in values), np.int64, len(values))


def _first(*columns):
    """Positions, ascending, of the first row of each distinct combination."""
    order = np.lexsort((np.arange(len(columns[0])), *columns))
    new = np.ones(len(order), bool)
    new[1:] = np.any([c[order][1:] != c[order][:-1] for c in columns], axis=0)
    return np.sort(order[new])


def _slug(name) -> str:
    """A folder name of [a-z0-9_-] only: no separator, no dot, nothing that could leave the data folder."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "data"


def _folder_name(folder, root, suffix) -> str:
    """Name, up to the suffix, for somebody's folder: its own, made different from the known sets' and another folder's."""
    resolved = folder.resolve()
    name = _slug(resolved.name)
    if name in (*NAMES, "raw", "cache") or re.match(r"amazon20\d\d-", name):
        name += "-folder"
    taken = root / (name + suffix) / "source.json"
    if taken.is_file() and read_json(taken).get("from") != str(resolved):
        name += f"-{keys_sha256([str(resolved)])[:6]}"
    return name


def _raw_files(folder):
    """The raw files of a folder: its own files, without pictures, which may be a great many."""
    return sorted(p for p in folder.iterdir()
                  if p.is_file() and p.name[0] != "." and p.suffix.lower() not in PICTURES)


def _fingerprint(path) -> dict:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path)}


def _is_fresh(out, origin, folder, pictures) -> bool:
    """Was `out` made from these files? Those of a fetched data set (folder None) do not change, but for its pictures."""
    if not (out / "source.json").is_file():
        return False
    about = read_json(out / "source.json")
    if (about.get("format"), about.get("from")) != (FORMAT, origin) or pictures > about.get("pictures_in", 0):
        return False
    if folder is None:
        return True
    files = {p.name: p for p in _raw_files(folder)}
    known = about.get("files", {})
    return files.keys() == known.keys() and all(
        p.stat().st_size == known[n]["bytes"]
        and (p.stat().st_mtime_ns == known[n]["mtime_ns"] or sha256(p) == known[n]["sha256"])
        for n, p in files.items())
