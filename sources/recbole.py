"""Atomic files of RecBole: tab-separated tables whose headers name a type for each column.

<D>.inter         user_id:token, item_id:token, timestamp:float
<D>.train.inter, <D>.valid.inter, <D>.test.inter    in its place, where the data is split
<D>.item          where present, item_id:token and what is known of the items

Source: https://recbole.io/docs/user_guide/data/atomic_files.html
"""
from common.files import UserError
from common.interactions import FILES, Interactions, has_own_table
from common.items import Items, notes_of_match, order_of
from common.tables import TABS, Raw, header_of

from . import mmrec


def recognises(folder) -> bool:
    others = list(folder.glob("*.item2index")) or has_own_table(folder)
    return bool(tables_in(folder)) and not others and not mmrec.recognises(folder)


def read(folder, name) -> Raw:
    """Raises UserError for a missing column, a damaged file, or several data sets in one folder."""
    report = {}
    interactions = Interactions()
    tables = tables_of(folder)
    for path, part in tables.items():
        if "item_id_list" in header_of(path, TABS):
            raise UserError(
                f"{path} has a row for each prefix of a history (item_id_list): put the table of "
                f"single interactions there"
            )
        report[path.name] = interactions.read(path, TABS, part)
    columns = interactions.columns(path, report)
    if len(tables) > 1 and not interactions.parted:
        columns["notes"].append(
            f"{', '.join(table.name for table in tables)} are put together: they are not called "
            f"train, valid and test"
        )
    items = Items()
    bought = columns["items"].names
    described = folder / f"{path.name.partition('.')[0]}.item"
    if described.is_file():
        report[described.name] = items.read(described, TABS)
        columns["notes"] += items.notes()
        columns["notes"] += notes_of_match(
            items.catalog, bought, described.name, path.name
        )
    order = order_of(items.catalog, bought)
    root = str(folder.resolve())
    return Raw(
        catalog=items.catalog, catalog_gaps=items.gaps, report=report, item_order=order,
        image_root=root, **columns,
    )


def tables_of(folder) -> dict:
    """Table -> its part, 0 to 2; None for a table of all. Raises UserError for several sets."""
    paths = tables_in(folder)
    stems = sorted({path.name.partition(".")[0] for path in paths})
    if len(stems) > 1:
        raise UserError(
            f"{folder} holds several data sets ({', '.join(stems)}): make one folder for each"
        )
    whole = folder / f"{stems[0]}.inter"
    if whole in paths:
        return {whole: None}
    parts = {path: FILES.get(path.name.split(".")[-2]) for path in paths}
    return dict(sorted(parts.items(), key=lambda row: (row[1] is None, row[1])))


def tables_in(folder) -> list:
    return sorted(folder.glob("*.inter"))
