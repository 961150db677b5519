"""What a data source needs: the shape of what it reads, clean text, and a reader of tables.

A source (one file in sources/) turns raw files into a `Raw`. Its tables are read by `each_row` (CSV
and its kin) and `each_object` (one JSON object a line), which count the lines that cannot be used
and refuse a file in which there are too many.
"""
import codecs
import csv
import gzip
import html
import json
import re
import unicodedata
import zlib
from array import array
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter

import numpy as np

from .files import UserError

MOST_BAD = 0.01          # share of unusable lines above which a file is refused
LONGEST_LINE = 1 << 22   # bytes; a longer line is read in pieces, so that no line fills the memory
SHOWN = 60               # characters of an unusable line that a message shows
SEPARATORS = ",\t;|"
MISSING = {"", "nan", "null", "none"}    # what programs write where there is nothing


class Keys:
    """A column of keys: each distinct key is kept once, and for each line only its number."""

    def __init__(self, keys=()):
        self.names = {}             # key -> its number 0, 1, 2, ..., in the order of the lines
        self.numbers = array("i")   # (lines,) of each line's key
        self.extend(keys)

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        """Each line's key."""
        names = list(self.names)
        return (names[number] for number in self.numbers)

    def add(self, key):
        self.numbers.append(self.names.setdefault(key, len(self.names)))

    def extend(self, keys):
        for key in keys:
            self.add(key)

    def renamed(self, rename) -> "Keys":
        """The column with `rename(key)` for each key; keys that get one name become one."""
        column = Keys(map(rename, self.names))
        column.numbers = array("i", np.asarray(column.numbers)[self.numbers].tobytes())
        return column

    def places_in(self, order) -> np.ndarray:
        """(lines,) int32: where each line's key stands among the distinct keys `order`."""
        place = {key: number for number, key in enumerate(order)}
        places = np.array([place[key] for key in self.names], np.int32)
        return places[self.numbers]


def first_of_each(*columns) -> np.ndarray:
    """(n,) bool: which rows of parallel columns are the first of their kind."""
    order = np.lexsort(columns)    # equal rows stay in their order
    again = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        column = np.asarray(column)[order]
        again &= column[1:] == column[:-1]
    first = np.ones(len(order), bool)
    first[order[1:][again]] = False
    return first


@dataclass
class Raw:
    """Interactions and items as a source read them.

    users, items, times and, where given, parts and variants have an entry for each interaction, in
    the order of the file.
    """
    users: Keys
    items: Keys
    times: np.ndarray           # seconds since 1970, or any numbers that give an order (see clock)
    catalog: dict               # item key -> {"title": str, "text": [str], "language": str,
                                #              "images": [path or address]}
    report: dict = field(default_factory=dict)    # what was found and dropped while reading; under
                                                  # the name of each file that was read, its counts
    notes: list = field(default_factory=list)     # what was given and is not used, in sentences
    parts: np.ndarray = None    # int8: 0 train, 1 valid, 2 test, where files say so
    clock: str = "seconds"      # seconds | day | order; "order": the times are no real times
    core: int = 0               # iterative k-core on users and items; 0 = none
    need_catalog: bool = False  # drop interactions with items that the catalog does not have
    catalog_gaps: bool = False  # lines of its file describe nothing new: it has more of them
    item_order: list = None     # item keys in id order; None = sorted by key
    user_order: list = None     # user keys in row order; None = sorted by key
    features: dict = field(default_factory=dict)    # modality -> (encoder, float32 (N, D)),
                                                    # rows as in item_order, zero row = missing
    published: dict = field(default_factory=dict)   # what a paper prints: {"users", "items",
                                                    # "interactions", "source"}
    image_root: str = ""        # where picture paths start: absolute, or from the processed folder
    variants: Keys = None       # an exact duplicate must share these as well
    picture_hosts: tuple = None # hosts that pictures may be fetched from; None = any public one
    extra: dict = field(default_factory=dict)    # file name -> {array name: array}, saved as .npz

    def __post_init__(self):
        """Lists will do for columns."""
        for name in ("users", "items", "variants"):
            column = getattr(self, name)
            if column is not None and not isinstance(column, Keys):
                setattr(self, name, Keys(column))
        self.times = np.asarray(self.times)
        if self.parts is not None:
            self.parts = np.asarray(self.parts, np.int8)


# ---------------- text

TAG = re.compile(
    r"<(script|style)\b.*?(</\1\s*>|$)"    # scripts and styles with what they hold
    r"|<!--.*?(-->|$)"                     # comments
    r"|</?[a-zA-Z][^<>]*(>|$)",            # any other tag
    re.DOTALL | re.IGNORECASE,
)


def clean_text(value) -> str:
    """Any JSON value -> one line of plain text: entities decoded, tags and scripts gone, NFC.

    Lists are joined by a space, dicts give their values; None, NaN and booleans give "".
    """
    if value is None or isinstance(value, bool) or value != value:
        return ""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        try:
            return " ".join(filter(None, map(clean_text, value)))
        except RecursionError:    # no real text is nested this deeply
            return ""
    text = TAG.sub(" ", html.unescape(html.unescape(str(value))))
    if not text.isprintable():    # control characters, lone surrogates
        text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def sentences(*parts, limit=2000) -> list:
    """Clean, non-empty, distinct texts in the order given; each is cut at `limit` characters."""
    cleaned = (clean_text(part)[:limit] for part in parts)
    return list(dict.fromkeys(text for text in cleaned if text))


def whole_number(text):
    """The number that a text of at most 18 digits is; None for any other text."""
    return int(text) if text.isdecimal() and len(text) < 19 else None


# ---------------- files

class Defect(str):
    """Why a line cannot be used; stands where its row would."""


def placed(folder, table):
    """The file in a folder that holds a table, compressed or not; None where there is none."""
    for path in (folder / table, folder / f"{table}.gz"):
        if path.is_file():
            return path
    return None


def first_of(folder, tables):
    """The first of some tables that is in a folder, compressed or not; None where none is."""
    return next(filter(None, (placed(folder, table) for table in tables)), None)


def latin_1(error):
    """Bytes that are no UTF-8 are read as Latin-1, as older programs write."""
    return error.object[error.start:error.end].decode("latin-1"), error.end


codecs.register_error("latin_1", latin_1)
UTF_8 = {"encoding": "utf-8-sig", "errors": "latin_1"}
OTHER_KINDS = {    # first bytes: (what such a file is, what to do)
    b"\xff\xfe": ("UTF-16, as Excel's \"Unicode text\"", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16", "save it as UTF-8"),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or save it as CSV"),
    b"\x1f\x8b": ("compressed", "give its name the end .gz"),
    b"PAR1": ("a Parquet file", "save it as CSV"),
}


def refuse_other_kinds(path):
    """Raises UserError for a file, compressed or not, that is no text in UTF-8 or Latin-1."""
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rb") as file:
        first = file.read(4)
    for start, (kind, advice) in OTHER_KINDS.items():
        if first.startswith(start):
            raise UserError(f"{path} is {kind}: {advice}")
    if b"\0" in first:
        raise UserError(f"{path} is damaged or UTF-16 (it has zero bytes): save it as UTF-8")


# ---------------- tables

@dataclass(frozen=True)
class Form:
    """How a table is written."""
    separator: str = ","
    quoted: bool = True    # whether cells may stand in quotes
    header: tuple = ()     # the names of the columns, where the file does not begin with them
    skip: int = 0          # lines before the header


CSV = Form()
TABS = Form("\t", quoted=False)


def form_of(path) -> Form:
    """The form of a table with a header: quoted cells between the most frequent separator there."""
    for number, text in first_lines(path, 1):
        if text.lower().startswith("sep=") and len(text) == 5:    # how Excel says it
            return Form(text[-1], skip=number)
        return Form(max(SEPARATORS, key=text.count))
    return CSV


def each_row(path, columns, take, optional=(), form=CSV, advice=None, most_bad=MOST_BAD) -> dict:
    """Read a table (.gz too): hand the named columns of each line to `take(*cells)` -> counts.

    take returns None, or a few words that say why the line cannot be used. An optional column that
    the table lacks is "" in every line. advice: what to do about unusable lines, by their reason.
    Raises UserError for a missing column, a damaged file, quotes that do not close, or a share of
    unusable lines above most_bad.
    """
    def rows():
        lines = table_lines(path, form)
        header = names(form.header or next(lines, (0, []))[1])
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(
                f"{path} must begin with a line that names the columns {', '.join(columns)}, but "
                f"{', '.join(missing)} is not there (it begins with {cut(', '.join(header))}): put "
                f"a complete copy in its place"
            )
        twice = [name for name in (*columns, *optional) if header.count(name) > 1]
        if twice:
            raise UserError(f"{path} has two columns {twice[0]}: give one of them another name")
        places = [header.index(name) for name in columns]
        places += [header.index(name) if name in header else -1 for name in optional]
        cells = itemgetter(*places, -1)    # of two places or more: a tuple
        width = len(header)
        for number, row in lines:
            if len(row) < width:
                yield number, Defect("columns_missing"), row
            elif len(row) > width and any(row[width:]):
                yield number, Defect("more_columns_than_the_header"), row
            else:
                # "" is what place -1, an optional column that is not there, reads
                yield number, cells([*row, ""])[:-1], row

    return count_lines(path, rows(), lambda row: take(*row), advice, most_bad)


def table_lines(path, form=CSV):
    """Yield (line number, cells) of a table, without blank lines. Raises UserError."""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        refuse_other_kinds(path)
        with open_text(path, "rt", newline="", **UTF_8) as file:
            if not form.quoted:
                yield from split_lines(file, form)
                return
            # strict: else a stray quote swallows what follows
            lines = csv.reader(file, strict=True, delimiter=form.separator)
            for row in filter(None, lines):
                if lines.line_num > form.skip:
                    yield lines.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{path}, line {lines.line_num} is not CSV ({error}): correct that line"
        ) from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read to its end ({error}): put a complete copy in its place"
        ) from None


def split_lines(file, form):
    """Yield (line number, cells) of lines without quotes; the last column has what is left over."""
    columns = len(form.header)
    for number, line in enumerate(file, 1):
        if line.strip():
            row = line.rstrip("\r\n").split(form.separator, columns - 1)
            columns = columns or len(row)    # the first line names them
            yield number, row


def names(header) -> list:
    """The cells of a header as column names: in lower case, without RecBole's `:token`."""
    return [name.strip().lower().partition(":")[0] for name in header]


def first_row(path, form=CSV) -> list:
    """The cells of the first line. Raises UserError for what is no table."""
    with closing(table_lines(path, form)) as lines:
        return next(lines, (0, []))[1]


def header_of(path, form=CSV) -> list:
    """The column names of a table, in lower case. Raises UserError for what is no table."""
    return names(first_row(path, form))


# ---------------- JSON lines

def parse_object(text):
    """A line of JSON -> dict, or the Defect."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return Defect("not_json")
    return row if isinstance(row, dict) else Defect("not_an_object")


def each_object(path, take, parse=parse_object) -> dict:
    """Read a file of one object a line (.gz too): hand each object to `take(row)` -> counts.

    take returns None, or a few words that say why the line cannot be used. parse: text -> object or
    Defect. Raises UserError for a damaged file or more than 1 % unusable lines.
    """
    rows = ((number, parse(text), text) for number, text in text_lines(path))
    return count_lines(path, rows, take)


def text_lines(path):
    """Yield (number, text) of the lines that are not blank. Raises UserError for a cut file."""
    with open(path, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        try:
            refuse_other_kinds(path)
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
                text = line.decode(**UTF_8).strip()
                if text:
                    yield number, text
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(
                f"{path} is not a whole file, reading stopped at byte {file.tell()} ({error}): "
                f"remove it, put a complete copy there, and run the same command again"
            ) from None


def first_lines(path, most) -> list:
    """Up to so many (number, text) of `text_lines`."""
    with closing(text_lines(path)) as lines:
        return list(islice(lines, most))


# ---------------- what cannot be used

def count_lines(path, rows, take, advice=None, most_bad=MOST_BAD) -> dict:
    """Hand each row of (line number, row, what the file says) to `take`; the counts for a report.

    -> {"lines": how many, "bad_lines": {defect: how many}, "first_bad_line": number, if any}.
    advice: {defect: what to do}. Raises UserError above a share of most_bad unusable lines.
    """
    lines = 0
    bad = Counter()
    first_bad = shown = None
    for number, row, written in rows:
        lines += 1
        defect = row if isinstance(row, Defect) else take(row)
        if defect:
            if not bad:
                first_bad = number
                shown = cut(written if isinstance(written, str) else ", ".join(written))
            bad[str(defect)] += 1
    if bad.total() > most_bad * lines:
        what_to_do = (advice or {}).get(
            next(iter(bad)), "correct the file or put a complete copy there"
        )
        raise UserError(
            f"{path}: {bad.total()} of {lines} lines cannot be used ({kinds_of(bad)}), the first "
            f"is line {first_bad} ({shown}): {what_to_do}"
        )
    counts = {"lines": lines, "bad_lines": dict(bad)}
    if bad:
        counts["first_bad_line"] = first_bad
    return counts


def kinds_of(bad) -> str:
    """{"no_user": 3} -> "no user 3"."""
    return ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in bad.items())


def cut(text, most=SHOWN) -> str:
    """A text on one line, shortened for a message."""
    text = clean_text(text)
    return text if len(text) <= most else f"{text[:most]}..."
