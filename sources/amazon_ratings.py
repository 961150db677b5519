"""Amazon's reviews as tables: who rated what when, without the words.

ratings_<Category>.csv    of 2014, without a header: person, product, stars, seconds
<Category>.csv            of 2018, without a header: product, person, stars, seconds
<Category>.csv            of 2023, with a header: user_id, parent_asin, rating, timestamp (ms)
<Category>.train.csv, .valid.csv, .test.csv    of 2023: the last but one is valid, the last is test

The metadata (meta_<Category>.json or .jsonl) may lie beside it; without them there are no texts and
no pictures. All may be compressed (.gz). Source: https://amazon-reviews-2023.github.io
"""
import re

from common.files import UserError
from common.interactions import FILES, Interactions, has_own_table
from common.items import notes_of_undescribed
from common.tables import CSV, Form, Raw, first_row

from .amazon import HOSTS, read_metadata

TABLE = re.compile(r"(?P<category>.+?)(\.(?P<part>train|valid|test))?\.csv(\.gz)?")
META = re.compile(r"meta_.+\.jsonl?(\.gz)?")
PRODUCT = re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")
PERSON = re.compile(r"A[0-9A-Z]{9,}")
HEADED = ("user_id", "parent_asin", "rating", "timestamp")


def recognises(folder) -> bool:
    try:
        return folder.is_dir() and not has_own_table(folder) and len(tables_of(folder)) > 0
    except UserError:    # a damaged table
        return False


def read(folder, name) -> Raw:
    """Raises UserError for several categories in one folder, a damaged file, or more than 1 %
    unusable lines."""
    tables = tables_of(folder)
    categories = sorted({match["category"] for match, _ in tables.values()})
    if len(categories) > 1:
        raise UserError(
            f"{folder} holds ratings of {len(categories)} categories ({', '.join(categories)}): "
            f"make one folder for each"
        )
    report = {}
    interactions = Interactions()
    for path, (match, form) in tables.items():
        report[path.name] = interactions.read(path, form, FILES.get(match["part"]))
    columns = interactions.columns(path, report)
    sold = columns["items"].names
    catalog = {}
    metadata = sorted(path for path in folder.iterdir() if META.fullmatch(path.name))
    if metadata:
        catalog, report[metadata[0].name] = read_metadata(metadata[0], sold)
        columns["notes"] += notes_of_undescribed(sold, catalog, metadata[0].name)
    report["items_without_metadata"] = len(sold.keys() - catalog.keys())
    return Raw(catalog=catalog, report=report, picture_hosts=HOSTS, **columns)


def tables_of(folder) -> dict:
    """Table of ratings -> (match of its name, how it is written), train before valid and test."""
    tables = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        match = TABLE.fullmatch(path.name)
        if not match or match["category"] in FILES:    # train.csv is somebody's own
            continue
        form = form_of_ratings(path)
        if form:
            tables[path] = match, form
    return dict(sorted(tables.items(), key=lambda row: FILES.get(row[1][0]["part"], 0)))


def form_of_ratings(path):
    """How a table of ratings is written, told by its first line; None for another table.

    Raises UserError for a damaged one.
    """
    cells = first_row(path)
    if tuple(cells[:4]) == HEADED:
        return CSV
    if len(cells) != 4:
        return None
    kinds = ("item" if PRODUCT.fullmatch(cell) else "user" for cell in cells[:2])
    header = (*kinds, "rating", "time")
    user = cells[header.index("user")] if "user" in header else ""
    if "item" not in header or not PERSON.fullmatch(user):
        return None
    return Form(",", True, header)
