"""Numbered sequences in a text file, as SASRec, S3-Rec, STOSA and many others publish them.

user item item item ...    a line for each user, the oldest item first
user item                  a line for each interaction, in their order

<D>.txt is read; what is known of the items may lie beside it as items.jsonl or items.csv. There are
no times. Sources: github.com/kang205/SASRec, github.com/RUCAIBox/CIKM2020-S3Rec.
"""
from common.files import UserError
from common.items import Items, notes_of_match
from common.tables import Raw, count_lines, first_lines, text_lines

ENOUGH = 200                            # lines that say how a file is written,
MOST = .9                               # and how many of them must be written so
TIME = 100_000_000                      # a last column of such numbers is no item: a time
NEGATIVES = ("_sample", "_neg", "_negative")    # ends of names of items that were not bought


def recognises(folder) -> bool:
    return folder.is_dir() and not (folder / "interactions.csv").exists() and bool(files(folder))


def read(folder, name) -> Raw:
    """Raises UserError for several data sets in one folder, or more than 1 % unusable lines."""
    paths = files(folder)
    if len(paths) > 1:
        raise UserError(
            f"{folder} holds several data sets ({', '.join(path.stem for path in paths)}): make "
            f"one folder for each"
        )
    path, = paths
    users, items = [], []

    def take(numbers):
        user, *sequence = numbers.split()
        if not sequence or not all(number.isdecimal() for number in (user, *sequence)):
            return "no_user_and_items"
        users.extend([user] * len(sequence))
        items.extend(sequence)

    rows = ((number, text, text) for number, text in text_lines(path))
    report = {path.name: count_lines(path, rows, take)}
    catalog = Items()
    notes = catalog.read_beside(folder, report)
    notes += notes_of_match(catalog.catalog, items, catalog.file, path.name)
    keys = {*items, *catalog.catalog}
    order = sorted(keys, key=lambda key: (key.zfill(20), key))    # 2 before 10
    return Raw(
        users, items, list(range(len(users))), catalog.catalog,
        report=report,
        notes=notes,
        clock="order",
        item_order=order,
        image_root=str(folder.resolve()),
    )


def files(folder) -> list:
    """The text files of numbered sequences in a folder."""
    return [
        path for path in sorted(folder.glob("*.txt"))
        if not path.stem.lower().endswith(NEGATIVES) and has_sequences(path)
    ]


def has_sequences(path) -> bool:
    """Whether most of the first lines are a user and items, all numbers, and no times."""
    try:
        rows = [text.split() for _, text in first_lines(path, ENOUGH)]
    except (UserError, OSError):
        return False
    numbers = [row for row in rows if len(row) > 1 and "".join(row).isdecimal()]
    if not rows or len(numbers) < MOST * len(rows):
        return False
    return not all(int(row[-1]) > TIME for row in numbers)
