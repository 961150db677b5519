"""Interactions from tables whose columns have usual names, in whatever order.

`Interactions` reads one table or several (train, valid, test) and gives the columns of a `Raw`.
Names are compared without case and without what is no letter or digit: `User_ID` is `userid`.
"""
import re
import unicodedata
from array import array

import numpy as np

from .files import UserError
from .tables import MISSING, Keys, cut, each_row, first_of, form_of, header_of
from .times import ADVICE, Times

USERS = (
    "user", "userid", "uid", "reviewerid", "customer", "customerid", "client", "clientid", "member",
    "memberid", "visitor", "visitorid", "buyer", "buyerid", "account", "accountid",
)
SESSIONS = ("session", "sessionid", "sid")
ITEMS = (
    "item", "itemid", "iid", "product", "productid", "asin", "parentasin", "article", "articleid",
    "movie", "movieid", "sku", "book", "bookid", "isbn", "track", "trackid", "song", "songid",
    "video", "videoid", "news", "newsid", "business", "businessid",
)
TIMES = (
    "time", "timestamp", "datetime", "date", "ts", "eventtime", "eventtimestamp", "eventdate",
    "unixreviewtime", "reviewtime", "createdat", "orderdate", "purchasedate", "tdat",
)
PARTS = ("split", "part", "xlabel")
OWN = ("interactions.csv", "interactions.tsv")    # a folder with one of these is somebody's own
FILES = {    # name of a table: which part it is
    "train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2,
}
PART = {**FILES, "0": 0, "1": 1, "2": 2}    # what a cell of such a column says
ROUNDED = re.compile(r"\d\.\d+[Ee]\+\d+")    # 9.78014E+12
ADVICES = {"time_not_understood": ADVICE, "part_not_understood": "write train, valid or test"}


class Interactions:
    """users, items, times and parts of one table or several; then `columns`."""

    def __init__(self):
        self.users = Keys()
        self.items = Keys()
        self.parts = array("b")
        self.times = Times()
        self.timed = None    # whether the tables have times: all or none,
        self.parted = None   # and whether they are parts
        self.notes = []

    def read(self, path, form=None, part=None) -> dict:
        """Add a table -> what `each_row` counts.

        form: how it is written; None = as its first line says. part: of train, valid and test the
        one that it is, 0 to 2. Raises UserError for a missing column or a file that cannot be used.
        """
        form = form or form_of(path)
        user, item, time, own_part = self.find_columns(path, form)
        self.timed = all_or_none(path, "a column time", self.timed, time is not None)
        parted = bool(own_part) or part is not None
        self.parted = all_or_none(path, "a part: train, valid or test", self.parted, parted)

        def take(user, item, time, name):
            # most lines have a user and an item that an earlier one has
            if user not in self.users.names:
                user = key_of(user)
            if item not in self.items.names:
                item = key_of(item)
            if not (user and item):
                return "no_user_or_item"
            place = PART.get(name.strip().lower()) if own_part else part
            if place is None and own_part:
                return "part_not_understood"
            if not self.times.add(time if self.timed else str(len(self.users))):
                return "time_not_understood"
            self.users.add(user)
            self.items.add(item)
            if place is not None:
                self.parts.append(place)

        optional = (time or "time", own_part or "split")
        return each_row(path, (user, item), take, optional, form, ADVICES)

    def find_columns(self, path, form) -> tuple:
        """The names of the columns user, item, time, part; None for the last two where absent."""
        header = list(form.header) or header_of(path, form)
        user, session, item = (find(header, names) for names in (USERS, SESSIONS, ITEMS))
        time, part = (find(header, names) for names in (TIMES, PARTS))
        if session and not user:
            user = session
            self.notes.append(f"{path.name} has no users: each {session} is taken for a user")
        if time is None:
            self.notes.append(
                f"{path.name} has no column time: the order of its lines is the order of events"
            )
        unread = [name for name in header if name and name not in (user, item, time, part)]
        if unread:
            self.notes.append(f"{path.name}: columns not read: {', '.join(unread)}")
        missing = [role for role, name in (("user", user), ("item", item)) if name is None]
        if missing:
            raise UserError(
                f"{path} must begin with a line that names the columns user, item, but "
                f"{', '.join(missing)} is not there (it begins with {cut(', '.join(header))}): "
                f"write a header such as user,item,time; docs/data.md has the names that are known"
            )
        return user, item, time, part

    def columns(self, path, report) -> dict:
        """users, items, times, clock, parts and notes, as arguments of `Raw`.

        path: what a message names. report: where what was found of the times is added. Raises
        UserError for times that can be read in two ways.
        """
        times, found, clock = self.times.in_seconds(path)
        report |= found
        notes = list(self.notes)
        for role, keys in (("users", self.users), ("items", self.items)):
            notes += notes_of_keys(keys.names, role, path.name)
        if self.timed and clock == "order" and len(times):
            notes.append(
                f"the times of {path.name} are no dates (the first is {times[0]:g}): they give the "
                f"order of events only"
            )
        return {
            "users": self.users,
            "items": self.items,
            "times": times,
            "clock": clock if self.timed else "order",
            "parts": np.asarray(self.parts) if self.parts else None,
            "notes": notes,
        }


def notes_of_keys(keys, role, file) -> list:
    """Sentences on keys of one column that seem to be written in two ways, or were rounded."""
    notes = []
    rounded = [key for key in keys if ROUNDED.fullmatch(key)]
    if rounded:
        notes.append(
            f"{len(rounded)} {role} of {file} are written like {rounded[0]}, as spreadsheets write "
            f"long numbers: their last digits are lost, and different {role} count as one"
        )
    first = {}
    twice = [(first[form], key) for key in keys
             if (form := one_form(key)) and first.setdefault(form, key) != key]
    if twice:
        one, other = twice[0]
        notes.append(
            f"{len(twice)} {role} of {file} seem to be written in two ways ({one} and {other}), "
            f"and count as two"
        )
    return notes


def one_form(key) -> str:
    """A key without what programs add or take away: .0, zeros before, invisible letters."""
    if not key.isascii():
        composed = unicodedata.normalize("NFC", key)
        key = "".join(x for x in composed if unicodedata.category(x) != "Cf").strip()
    return key.removesuffix(".0").lstrip("0")


def all_or_none(path, what, before, now) -> bool:
    """Raises UserError where a table has something that those before it lack, or the reverse."""
    if before not in (None, now):
        raise UserError(f"{path} and the other tables in its folder must all have {what}, or none")
    return now


def has_own_table(folder) -> bool:
    return first_of(folder, OWN) is not None


def find(header, names):
    """The column that has the first of these names that any has; None where none has."""
    plain = {}
    for column in header:
        plain.setdefault(plain_name(column), column)
    return next((plain[name] for name in names if name in plain), None)


def plain_name(name) -> str:
    """`User_ID` -> `userid`."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def key_of(cell) -> str:
    """A cell's key on one line; "" for what stands for none."""
    key = " ".join(cell.split())
    return "" if key.casefold() in MISSING else key
