"""Sentences on what was given and is not used: printed by every command that reads the data."""
from pathlib import Path

from common.tables import kinds_of

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
ABOUT = (".ids.txt", ".md", ".pdf", ".py", ".ipynb", ".sh", ".html", ".log")
VECTORS = (".npy", ".npz", ".safetensors")
MOST = 1000    # pictures that are counted where no item names one


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
    unread = [name for name in files if name not in report and not is_no_data(name)]
    if unread:
        read = ", ".join(name for name in files if name in report)
        notes.append(f"not read: {', '.join(unread)}; what is read are {read}")
    return notes


def is_no_data(name) -> bool:
    """Whether a file is about the data, or has vectors, which are given to --text and --image."""
    return name.upper().startswith(("README", "LICENSE")) or name.endswith((*ABOUT, *VECTORS))


def notes_of_vectors(about, encoders) -> list:
    """On vectors that lie in the folder. about: source.json. encoders: of the command line."""
    given = {Path(encoder).name for encoder in encoders if encoder}
    idle = [
        name for name in about.get("files", {})
        if name.endswith(VECTORS) and name not in about["report"] and name not in given
    ]
    if not idle:
        return []
    return [f"not used: {', '.join(idle)}; vectors are given as --text FILE or --image FILE"]


def notes_of_pictures(items, root) -> list:
    """On pictures that items name and that are not there, and on pictures that no item names.

    items: rows of items.jsonl. root: the folder that their paths start in.
    """
    named = [path for item in items for path in item["images"]]
    paths = [path for path in named if "://" not in path]
    missing = [path for path in paths if not (root / path).exists()]
    if missing:
        return [
            f"{len(missing)} of {len(paths)} picture paths of the items are not on disk, the first "
            f"is {missing[0]}{twin_of(root / missing[0])}, in {root}"
        ]
    if named or not root.is_dir():
        return []
    found = pictures_below(root)
    if not found:
        return []
    count = f"{len(found)}" if len(found) < MOST else f"{MOST} or more"
    return [
        f"{count} pictures in {root} are named by no item, the first is {found[0]}: give the items "
        f"a key images, such as \"images\": [\"{found[0]}\"]"
    ]


def twin_of(path) -> str:
    """Words on a file that differs in the case of its name alone, or in its ending."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent.name})"
    stem = path.stem.lower()
    twins = [other.name for other in path.parent.iterdir() if other.stem.lower() == stem]
    return f" (but there is {min(twins)})" if twins else ""


def pictures_below(root) -> list:
    """Up to MOST paths of picture files below a folder, from there."""
    found = []
    for path in Path(root).rglob("*"):
        if path.suffix.lower() in PICTURES:
            found.append(str(path.relative_to(root)))
            if len(found) == MOST:
                break
    return sorted(found)
