"""What a data source needs: the shape of what it reads, clean text, and a reader of tables.

A source (one file in sources/) turns raw files into a `Raw`. Its tables are read by `each_row`
(CSV) and `each_object` (one JSON object a line), which count the lines that cannot be used and
refuse a file in which there are too many.
"""
import csv
import gzip
import html
import json
import re
import unicodedata
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from operator import itemgetter

from .files import UserError

MOST_BAD = 0.01          # share of unusable lines above which a file is refused
LONGEST_LINE = 1 << 22   # bytes; a longer line is read in pieces, so that no line fills the memory


@dataclass
class Raw:
    """Interactions and items as a source read them.

    users, items, times are parallel lists, in the order of the file.
    """
    users: list                 # str keys
    items: list                 # str keys
    times: list                 # seconds since 1970, or any numbers that give an order (see clock)
    catalog: dict               # item key -> {"title": str, "text": [str], "language": str,
                                #              "images": [path or address]}
    report: dict = field(default_factory=dict)      # what was found and dropped while reading
    clock: str = "seconds"      # seconds | day | order; "order": the times are no real times
    core: int = 0               # iterative k-core on users and items; 0 = none
    need_catalog: bool = False  # drop interactions with items that the catalog does not have
    item_order: list = None     # item keys in id order; None = sorted by key
    user_order: list = None     # user keys in row order; None = sorted by key
    features: dict = field(default_factory=dict)    # modality -> (encoder, float32 (N, D)),
                                                    # rows as in item_order, zero row = missing
    published: dict = field(default_factory=dict)   # what a paper prints: {"users", "items",
                                                    # "interactions", "source"}
    image_root: str = ""        # where picture paths start: absolute, or from the processed folder
    variants: list = None       # parallel to items: an exact duplicate must share these as well
    picture_hosts: tuple = None # hosts that pictures may be fetched from; None = any public one
    extra: dict = field(default_factory=dict)    # file name -> {array name: array}, saved as .npz


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


# ---------------- tables

class Defect(str):
    """Why a line cannot be used; stands where its row would."""


def placed(folder, table):
    """The file in a folder that holds a table, compressed or not; None where there is none."""
    for path in (folder / table, folder / f"{table}.gz"):
        if path.is_file():
            return path
    return None


def each_row(path, columns, take, optional=()) -> dict:
    """Read a CSV file (.gz too): hand the named columns of each line to `take(*cells)` -> counts.

    take returns None, or a few words that say why the line cannot be used. An optional column that
    the table lacks is "" in every line. Raises UserError for a missing column, a damaged file,
    quotes that do not close, or more than 1 % unusable lines.
    """
    def rows():
        lines = csv_lines(path)
        header = names(next(lines, (0, []))[1])
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(
                f"{path} must begin with a line that names the columns {', '.join(columns)}, but "
                f"{', '.join(missing)} is not there: put a complete copy in its place"
            )
        places = [header.index(name) for name in columns]
        places += [header.index(name) if name in header else -1 for name in optional]
        cells = itemgetter(*places)
        for number, row in lines:
            if len(row) < len(header):
                yield number, Defect("columns_missing")
            else:
                row.append("")    # what place -1, an optional column that is not there, reads
                yield number, cells(row)

    return count_lines(path, rows(), lambda row: take(*row))


def csv_lines(path):
    """Yield (line number, cells) of a CSV file (.gz too), without blank lines. Raises UserError."""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            lines = csv.reader(file, strict=True)    # else a stray quote swallows what follows
            for row in filter(None, lines):
                yield lines.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{path}, line {lines.line_num} is not CSV ({error}): correct that line"
        ) from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read to its end ({error}): put a complete copy in its place"
        ) from None


def names(header) -> list:
    """The cells of a header as column names."""
    return [name.strip().lower() for name in header]


def header_of(path) -> list:
    """The column names of a CSV file, in lower case. Raises UserError for what is not CSV."""
    with closing(csv_lines(path)) as lines:
        return names(next(lines, (0, []))[1])


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
    rows = ((number, parse(text)) for number, text in text_lines(path))
    return count_lines(path, rows, take)


def text_lines(path):
    """Yield (number, text) of the lines that are not blank. Raises UserError for a cut file."""
    with open(path, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        try:
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
                text = line.decode("utf-8-sig", "replace").strip()
                if text:
                    yield number, text
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(
                f"{path} is not a whole file, reading stopped at byte {file.tell()} ({error}): "
                f"remove it, put a complete copy there, and run the same command again"
            ) from None


def count_lines(path, rows, take) -> dict:
    """Hand each row of (line number, row) to `take`; what a report says of the file's lines.

    -> {"lines": how many, "bad_lines": {defect: how many}, "first_bad_line": number, if any}.
    Raises UserError above 1 % of unusable lines.
    """
    lines = 0
    bad = Counter()
    first_bad = None
    for number, row in rows:
        lines += 1
        defect = row if isinstance(row, Defect) else take(row)
        if defect:
            bad[str(defect)] += 1
            first_bad = first_bad or number
    if bad.total() > MOST_BAD * lines:
        kinds = ", ".join(f"{kind} {count}" for kind, count in bad.items())
        raise UserError(
            f"{path}: {bad.total()} of {lines} lines cannot be used ({kinds}), the first is line "
            f"{first_bad}: correct the file or put a complete copy there"
        )
    counts = {"lines": lines, "bad_lines": dict(bad)}
    if bad:
        counts["first_bad_line"] = first_bad
    return counts
