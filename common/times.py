"""Times as files write them -> seconds since 1970.

A column is read as a whole, because one value alone may say too little: 01/02/2017 is a day in
January or in February, and 20170714 is a number of seconds or a date.
"""
import re
from array import array
from datetime import date, datetime, timedelta, timezone

import numpy as np

from .files import UserError
from .tables import Keys

DAY = 86_400
YEAR_1980 = 315_532_800        # in seconds
YEAR_2100 = 4_102_444_800
FIRST_DATE = 10_000_000        # smaller numbers are no dates but 1, 2, 3, ...
UNITS = (("nanoseconds", 1e9), ("microseconds", 1e6), ("milliseconds", 1e3))
ADVICE = "write times as seconds since 1970 or as 2017-07-14 12:30:00"
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DATES = (
    r"(?P<year>\d{4})(?P<mark>[-/.])(?P<month>\d{1,2})(?P=mark)(?P<day>\d{1,2})",
    r"(?P<first>\d{1,2})(?P<mark>[-/.])(?P<second>\d{1,2})(?P=mark)(?P<year>\d{4})",
    r"(?P<day>\d{1,2})\.?[ -](?P<name>[a-z]{3})[a-z]*\.?,?[ -](?P<year>\d{4})",
    r"(?P<name>[a-z]{3})[a-z]*\.? (?P<day>\d{1,2}),? (?P<year>\d{4})",
)
CLOCK = (
    r"(?P<hour>\d{1,2}):(?P<minute>\d\d)(:(?P<seconds>\d\d([.,]\d+)?))?"
    r"( ?(?P<half>[ap])\.?m\.?)?"
)
ZONE = r"(z|utc|gmt|(?P<zone>[-+]\d\d(:?\d\d)?))"
WRITTEN = [
    re.compile(rf"([a-z]{{3,9}}, )?{form}([t ,]+{CLOCK})?( ?{ZONE})?", re.IGNORECASE)
    for form in DATES
]


class Times:
    """The times of a table, one after the other: `add` each, then `in_seconds`."""

    def __init__(self):
        self.values = array("d")    # seconds since 1970, or numbers
        self.numbers = 0            # how many are numbers,
        self.least = np.inf         # and the least of them
        self.unsure = array("i")    # places in values of dates with the day or the month first,
        self.dates = Keys()         # (first, second, year) of each of them,
        self.clocks = array("d")    # and the seconds of its day

    def add(self, text) -> bool:
        """Whether a text is understood: a number, an ISO date, or another usual form of a date."""
        value = number(text)
        is_number = value is not None
        latest = np.inf if is_number else YEAR_2100
        if value is None:
            value = iso(text)
        if value is None:
            value = self.date_of(text)
        if value is None or not 0 <= value < latest:
            return False
        if is_number:
            self.numbers += 1
            self.least = min(self.least, value)
        self.values.append(value)
        return True

    def date_of(self, text):
        """Seconds since 1970 of a written date, 0 for one that is resolved later; else None."""
        matches = (form.fullmatch(text.strip()) for form in WRITTEN)
        match = next(filter(None, matches), None)
        if match is None:
            return None
        parts = match.groupdict()
        clock = seconds_of_day(parts)
        if clock is None:
            return None
        if "first" not in parts:
            month = parts["month"] if "month" in parts else month_of(parts["name"])
            return moment(parts["year"], month, parts["day"], clock)
        if parts["mark"] == ".":    # 14.07.2017: the day first, wherever it is written so
            return moment(parts["year"], parts["second"], parts["first"], clock)
        self.unsure.append(len(self.values))
        self.dates.add((parts["first"], parts["second"], parts["year"]))
        self.clocks.append(clock)
        return 0

    def in_seconds(self, path) -> tuple:
        """-> times (n,) float, what was found {sentence: count}, clock (seconds, day or order).

        Raises UserError for dates that can be read in two ways, and for times in several units.
        """
        if 0 < self.numbers < len(self.values) and self.least < YEAR_1980:
            raise UserError(
                f"{path} mixes written dates with numbers such as {self.least:.0f}: {ADVICE}, all "
                f"in one form"
            )
        self.resolve(path)
        times = np.asarray(self.values)
        found = {}
        dates = compact_dates(times)
        if dates is not None:
            times = dates
            found["times read as dates such as 20170714"] = len(times)
        for unit, scale in UNITS:
            if len(times) and times.min() > YEAR_2100 * scale / 1e3:
                times = times / scale
                found[f"times read as {unit}"] = len(times)
        if (times > YEAR_2100).any():
            raise UserError(
                f"{path} mixes times in seconds with larger numbers: write every time in one unit"
            )
        if len(times) == 0 or times.max() < FIRST_DATE:
            return times, found, "order"
        return times, found, "day" if (times % DAY == 0).all() else "seconds"

    def resolve(self, path):
        """Decide what stands first in dates such as 07/14/2017: the month or the day."""
        if not self.unsure:
            return
        dates = list(self.dates.names)
        day_first = max(int(first) for first, _, _ in dates) > 12
        month_first = max(int(second) for _, second, _ in dates) > 12
        if day_first == month_first:
            first, second, year = dates[0]
            raise UserError(
                f"{path} has dates such as {first}/{second}/{year}, and it cannot be told whether "
                f"the day or the month stands first: {ADVICE}"
            )
        days = []
        for first, second, year in dates:
            day, month = (first, second) if day_first else (second, first)
            days.append(moment(year, month, day, 0))
        days = np.array(days, float)    # NaN for a date that does not exist
        seconds = days[self.dates.numbers] + np.asarray(self.clocks)
        impossible = np.flatnonzero(~(seconds >= 0))
        if len(impossible):
            first, second, year = dates[self.dates.numbers[impossible[0]]]
            raise UserError(
                f"{path} has a date {first}/{second}/{year} that does not exist or lies before "
                f"1970: {ADVICE}"
            )
        np.asarray(self.values)[self.unsure] = seconds


# ---------------- one time

def number(text):
    try:
        return float(text)
    except ValueError:
        return None


def iso(text):
    """Seconds since 1970 (UTC if no zone is written) of an ISO date; else None."""
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    if found.tzinfo is None:
        found = found.replace(tzinfo=timezone.utc)
    return found.timestamp()


def seconds_of_day(parts):
    """Of the matched hour, minute, seconds, half of the day and zone; None for no such time."""
    if parts["hour"] is None:
        return 0
    hour = int(parts["hour"])
    minute = int(parts["minute"])
    seconds = float((parts["seconds"] or "0").replace(",", "."))
    if hour > 23 or minute > 59 or seconds >= 60:
        return None
    if parts["half"]:
        if not 1 <= hour <= 12:
            return None
        afternoon = parts["half"].lower() == "p"
        hour = hour % 12 + 12 * afternoon
    return hour * 3600 + minute * 60 + seconds - zone_of(parts["zone"])


def zone_of(zone):
    """+05:30 -> 19800 seconds east of Greenwich."""
    if not zone:
        return 0
    digits = zone[1:].replace(":", "").ljust(4, "0")
    seconds = int(digits[:2]) * 3600 + int(digits[2:]) * 60
    return -seconds if zone[0] == "-" else seconds


def month_of(name):
    """The number of a month's English name; 0, which is no month, for another word."""
    name = name.lower()
    return MONTHS.index(name) + 1 if name in MONTHS else 0


def moment(year, month, day, clock):
    """Seconds since 1970 of a date and its seconds of the day; None for what does not exist."""
    try:
        days = date(int(year), int(month), int(day)) - date(1970, 1, 1)
    except ValueError:
        return None
    return days / timedelta(seconds=1) + clock


def compact_dates(times):
    """Numbers that are all dates, 20170714 or with hours, minutes (and seconds), as seconds since
    1970; else None."""
    if not len(times):
        return None
    scale, unit = 1, 1                   # 20170714
    if times.min() > 1e13:
        scale, unit = 1_000_000, 1       # 20170714123000
    elif times.min() > 1e11:
        scale, unit = 10_000, 100        # 201707141230
    days = times // scale
    plausible = days.min() >= 1970_01_01 and days.max() <= 2100_12_31 and (times % 1 == 0).all()
    if not plausible:
        return None
    distinct, place = np.unique(days, return_inverse=True)
    seconds = [    # since 1970
        moment(day // 10_000, day // 100 % 100, day % 100, 0)
        for day in distinct.astype(int).tolist()
    ]
    if None in seconds:
        return None
    clock = times % scale * unit    # 123000, or 0
    hour, minute, second = clock // 10_000, clock // 100 % 100, clock % 100
    if hour.max() > 23 or minute.max() > 59 or second.max() > 59:
        return None
    return np.array(seconds)[place] + hour * 3600 + minute * 60 + second
