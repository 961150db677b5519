"""Atomic files of RecBole: tab-separated tables whose headers name a type for each column.

<D>.inter         user_id:token, item_id:token, timestamp:float
<D>.train.inter, <D>.valid.inter, <D>.test.inter    in its place, where the data is split
<D>.item          where present, item_id:token and what is known of the items

Source: https://recbole.io/docs/user_guide/data/atomic_files.html
"""
from common.files import UserError
from common.interactions import FILES, Interactions
from common.items import Items, notes_of_match
from common.tables import TABS, Raw, header_of

from . import mmrec


def recognises(folder) -> bool:
    others = [*folder.glob("*.item2index"), *folder.glob("interactions.csv")]
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
    items = Items()
    described = folder / f"{path.name.partition('.')[0]}.item"
    if described.is_file():
        report[described.name] = items.read(described, TABS)
        columns["notes"] += items.notes()
        columns["notes"] += notes_of_match(
            items.catalog, columns["items"], described.name, path.name
        )
    order = list(dict.fromkeys([*items.catalog, *sorted(set(columns["items"]))]))
    root = str(folder.resolve())
    return Raw(
        catalog=items.catalog, report=report, item_order=order, image_root=root, **columns
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
    return {path: FILES.get(path.name.split(".")[-2]) for path in paths}


def tables_in(folder) -> list:
    return sorted(folder.glob("*.inter"))
