"""Your own data: a folder with interactions.csv and, if you have them, a catalog and pictures.

interactions.csv   a header with user, item and time, or with other usual names (user_id, session,
                   product_id, timestamp, ...). Times: seconds since 1970, dates in the usual forms;
                   equal times keep the file's order; without times the order of the lines is the
                   order of events.
train.csv, valid.csv, test.csv      in its place, where you have a split of your own
items.jsonl        one JSON object a line: {"item": ..., "title": ..., "text": str or [str],
                   "language": "en", "images": [path in this folder, or URL]}; every key but "item"
                   is optional, and other usual names (description, brand, image_url, ...) are known
items.csv          in its place: the same as a table

Tables may have tabs or semicolons, be called .tsv, and be compressed (.gz).
"""
from common.interactions import FILES, OWN, Interactions
from common.items import Items, notes_of_match, order_of
from common.tables import Raw, first_of

ENDS = (".csv", ".tsv")


def recognises(folder) -> bool:
    return len(tables_of(folder)) > 0


def read(folder, name) -> Raw:
    """Raises UserError for a missing column, a damaged file, or more than 1 % unusable lines."""
    report = {}
    interactions = Interactions()
    tables = tables_of(folder)
    for path, part in tables.items():
        report[path.name] = interactions.read(path, part=part)
    columns = interactions.columns(next(iter(tables)), report)
    items = Items()
    columns["notes"] += items.read_beside(folder, report)
    bought = columns["items"].names
    tables = " or ".join(table.name for table in tables)
    columns["notes"] += notes_of_match(items.catalog, bought, items.file, tables)
    order = order_of(items.catalog, bought)
    root = str(folder.resolve())
    return Raw(
        catalog=items.catalog, catalog_gaps=items.gaps, report=report, item_order=order,
        image_root=root, **columns,
    )


def tables_of(folder) -> dict:
    """Table of interactions -> its part, train 0, valid 1, test 2; None for a table of all."""
    path = first_of(folder, OWN)
    if path:
        return {path: None}
    parts = {}    # the first file of each part
    for stem, part in FILES.items():
        path = first_of(folder, [f"{stem}{end}" for end in ENDS])
        if path and part not in parts.values():
            parts[path] = part
    return parts if 0 in parts.values() and 2 in parts.values() else {}
