"""Sentences on what was given and is not used: printed by every command that reads the data."""
import os
from pathlib import Path, PurePosixPath

from common.tables import kinds_of

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
ABOUT = (".ids.txt", ".md", ".pdf", ".py", ".ipynb", ".sh", ".html", ".log")
VECTORS = (".npy", ".safetensors")
MOST = 1000    # pictures that no item names: so many are counted


def notes_of_files(report, files) -> list:
    """On lines that were passed over, and on files that the source did not read.

    report: of the reading, with the counts of each file that was read. files: names of all.
    """
    notes = []
    for name, counts in report.items():
        bad = counts.get("bad_lines") if isinstance(counts, dict) else None
        if bad:
            notes.append(
                f"{name}: {sum(bad.values())} of {counts['lines']} lines are not used "
                f"({kinds_of(bad)}), the first is line {counts['first_bad_line']}"
            )
    read = [name for name in files if name in report]
    unread = [name for name in files if name not in report and not is_no_data(name)]
    if read and unread:    # a shop that is drawn reads none
        notes.append(f"not read: {', '.join(unread)}; what is read: {', '.join(read)}")
    return notes


def is_no_data(name) -> bool:
    """Whether a file is about the data, or has vectors, which are given to --text and --image."""
    return name.upper().startswith(("README", "LICENSE")) or name.endswith((*ABOUT, *VECTORS))


def notes_of_vectors(about, encoders) -> list:
    """On vectors that lie in the folder, and on features that came with the data.

    about: source.json. encoders: modality -> what the command line asks for, or None.
    """
    notes = []
    for modality, came in about["features"].items():
        if encoders.get(modality) not in (None, came):
            notes.append(
                f"the {modality} features that came with the data are not used: leave --{modality} "
                f"out for them"
            )
    given = {Path(encoder).name for encoder in encoders.values() if encoder}
    idle = [
        name for name in about.get("files", {})
        if name.endswith(VECTORS) and name not in about["report"] and name not in given
    ]
    if idle:
        notes.append(
            f"not used: {', '.join(idle)}; vectors are given as --text FILE or --image FILE"
        )
    return notes


def notes_of_pictures(items, root, found) -> list:
    """On pictures that items name and that are not there, and on pictures that no item names.

    items: rows of items.jsonl. root: the folder that their paths start in. found: whether the
    source has looked for the pictures itself; then those that it passes over belong to no item.
    """
    paths = [path for item in items for path in item["images"] if "://" not in path]
    notes = []
    missing = [path for path in paths if not (root / path).exists()]
    if missing:
        notes.append(
            f"{len(missing)} of {len(paths)} picture paths of the items are not on disk, the first "
            f"is {missing[0]}{twin_of(root / missing[0])}, in {root}"
        )
    unnamed = [] if found else pictures_without(paths, root)
    if unnamed:
        count = f"{len(unnamed)}" if len(unnamed) < MOST else f"{MOST} or more"
        notes.append(
            f"{count} pictures in {root} are named by no item, the first is {unnamed[0]}: give the "
            f"items a key images, such as \"images\": [\"{unnamed[0]}\"]"
        )
    return notes


def twin_of(path) -> str:
    """Words on a file that differs in the case of its name alone, or in its ending."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent.name})"
    stem = path.stem.lower()
    twins = [other.name for other in path.parent.iterdir() if other.stem.lower() == stem]
    return f" (but there is {min(twins)})" if twins else ""


def pictures_without(paths, root) -> list:
    """Up to MOST picture files below a folder, as paths from there, that are not among the paths
    or in folders among them."""
    named = {PurePosixPath(path) for path in paths}
    unnamed = []
    for folder, inside, names in os.walk(root):
        inside.sort()
        below = Path(folder).relative_to(root)
        for name in sorted(names):
            path = PurePosixPath((below / name).as_posix())
            if path.suffix.lower() in PICTURES and not named & {path, *path.parents}:
                unnamed.append(str(path))
                if len(unnamed) == MOST:
                    return unnamed
    return unnamed
