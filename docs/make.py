"""Writes the tables and plots of the documents from the runs behind them.

    python docs/make.py --keep demo runs/*-demo-?    keep what tables need of these runs
    python docs/make.py                              write all tables and plots anew
    python docs/make.py --check                      say which are not as they would be written

docs/runs/<set>/<run>/ has the config.json and metrics.json of a run, and the parts.json that
tests/life.py wrote, so that every number can be traced to the settings that made it. In a page a
table stands between two lines, the first of which names the set and the columns, or the runs whose
parts it shows; a plot is named by such a line too:

    <!-- runs demo: R@10, N@10, masked N@10, cold N@10, seconds -->
    <!-- end -->
    <!-- parts demo/srmml-demo-0, scientific/srmml-scientific-mm-0 -->
    <!-- end -->
    <!-- plot demo: docs/demo.svg; oracle=.3316 -->
    <!-- frontier scientific, digest-scientific: docs/frontier.svg -->
    <!-- growth: docs/growth.svg -->

Runs that differ in the seed alone are one row: mean ± standard deviation. The best of a column is
bold. A growth plot shows the table that follows it: | model | items | numbers ... |.
"""
import argparse
import json
import math
import re
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from check import pages_of

from common.files import UserError, command, read_json
from loop import comparison

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "runs"
INSIDE = r"((?:(?!<!-- (?:runs|parts) ).)*?)(<!-- end -->)"
TABLE = re.compile(r"(<!-- runs ([^:\n]+): ([^\n]+) -->\n)" + INSIDE, re.DOTALL)
PARTS = re.compile(r"(<!-- parts ([^\n]+) -->\n)" + INSIDE, re.DOTALL)
PLOT = re.compile(r"<!-- plot ([^:\n]+): (\S+?)(?:; ([^\n]+))? -->")
GROWTH = re.compile(r"<!-- growth: (\S+?) -->\n\n((?:\|.*\n)+)")
FRONTIER = re.compile(r"<!-- frontier ([^:\n]+): (\S+?) -->")
OTHER = {"epoch": "best_epoch", "seconds": "seconds", "weights": "parameters"}
MASKED_COLD = "masked cold N@10"
WIDTH, ROW, LEFT, RIGHT = 760, 30, 110, 110    # pixels
HEIGHT, EDGE = 460, 60
COLOURS = BLUE, RED, GREEN, VIOLET = "#2a62b8", "#c2542a", "#3a8f4d", "#8a4fb0"


# ---------------- what is kept

def keep(name, folders):
    """Copy the numbers of runs and what made them, without what belongs to one machine."""
    if Path(name).name != name:
        raise UserError(f"--keep {name} must be a plain name")
    for folder in map(Path.absolute, folders):
        run = comparison.finished(folder)
        settings = without_folders(run.settings)
        settings["encoders"] = without_folders(settings.get("encoders", {}))
        if settings.get("init"):
            settings["init"] = Path(settings["init"]).name
        beside = "" if folder.parent.name == "runs" else f"{folder.parent.name}-"
        target = KEPT / name / f"{beside}{folder.name}"
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(as_json(settings), encoding="utf-8")
        (target / "metrics.json").write_text(as_json(run.metrics), encoding="utf-8")
        if (folder / "parts.json").is_file():
            parts = as_json(read_json(folder / "parts.json"))
            (target / "parts.json").write_text(parts, encoding="utf-8")


def without_folders(settings) -> dict:
    """Absolute paths of one machine become the names of their files."""
    return {
        key: Path(value).name if isinstance(value, str) and value.startswith("/") else value
        for key, value in settings.items()
    }


def as_json(value) -> str:
    """Numbers to six digits: a line for each entry of the outermost level."""
    def rounded(x):
        if isinstance(x, float):
            return float(f"{x:.6g}")
        return {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else x

    lines = [f" {json.dumps(key)}: {json.dumps(rounded(part))}" for key, part in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rows_of(name) -> dict:
    """{name of a row: its runs} of a set that was kept, the best first. Raises UserError."""
    folders = [path.parent for path in (KEPT / name).glob("*/metrics.json")]
    if not folders:
        raise UserError(f"docs/runs/{name} has no runs: keep some with --keep {name} RUN ...")
    folders.sort(key=lambda folder: (not is_plain(folder), folder.name))
    rows = comparison.rows_of(folders)
    best = {row: comparison.summary(runs)["masked N@10"][0] for row, runs in rows.items()}
    return {row: rows[row] for row in sorted(rows, key=lambda row: -best[row])}


def numbers_of(runs) -> dict:
    """A row's numbers, as in the table of `evaluate.py`, those of cold items without the history,
    and the last epoch that was allowed, where a run was best in it."""
    cold = [run.metrics["groups_masked"].get("cold") for run in runs]
    numbers = comparison.summary(runs)
    most = [run.settings["config"].get("epochs") for run in runs]
    if any(run.metrics["best_epoch"] == last for run, last in zip(runs, most)):
        numbers["last epoch"] = max(most)
    if None not in cold:
        numbers[MASKED_COLD] = comparison.mean_and_spread([group["ndcg@10"] for group in cold])
    return numbers


def is_plain(folder) -> bool:
    """Whether a run was kept from runs/, the others being named by what sets them apart from it."""
    return folder.name.startswith(f"{read_json(folder / 'config.json')['model']}-")


# ---------------- tables

def table(name, columns) -> str:
    known = [*OTHER, *(heading for heading, _, _ in comparison.COLUMNS), MASKED_COLD]
    strange = [column for column in columns if column not in known]
    if strange:
        raise UserError(f"{strange[0]} is no column of a table: give some of {', '.join(known)}")
    rows = {row: numbers_of(runs) for row, runs in rows_of(name).items()}
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    best = {column: max((row[column][0] for row in rows.values() if column in row), default=0)
            for column in columns if column not in OTHER}
    for label, row in rows.items():
        cells = [cell(row, column, best.get(column)) for column in columns]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines) + "\n"


def cell(row, column, best) -> str:
    if column in OTHER:
        value = row[OTHER[column]]
        text = f"{value:.0f}" if value else ""
        if column == "epoch" and "last epoch" in row:
            text += f" of {row['last epoch']}"
        return text
    if column not in row:
        return ""
    text = comparison.shown(*row[column])
    return f"**{text}**" if row[column][0] == best > 0 else text


def parts_table(names) -> str:
    """What the parts of trained models do, a column for each of the runs <set>/<run>."""
    runs = [KEPT / name for name in names]
    missing = [name for name, run in zip(names, runs) if not (run / "parts.json").is_file()]
    if missing:
        raise UserError(
            f"docs/runs/{missing[0]} has no parts.json: run tests/life.py, then --keep the run"
        )
    columns = [read_json(run / "parts.json") for run in runs]
    heads = [read_json(run / "config.json")["data"] for run in runs]
    model = read_json(runs[0] / "config.json")["model"]
    lines = [f"| {model} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(runs)]
    for part in dict.fromkeys(part for column in columns for part in column):
        cells = [shown_part(part, column.get(part)) for column in columns]
        lines.append("| " + " | ".join([part, *cells]) + " |")
    return "\n".join(lines) + "\n"


def shown_part(part, look) -> str:
    """.2079 of the model as trained, else the change and how much the scores moved:
    -.0024 (.011)"""
    if look is None:
        return ""
    if part == "as trained":
        return comparison.shown(look["masked N@10"])
    sign = "−" if look["change"] < 0 else "+"
    change, moved = f"{abs(look['change']):.4f}", f"{abs(look['moved']):.3f}"
    return f"{sign}{change.removeprefix('0')} ({moved.removeprefix('0')})"


def written(page) -> str:
    """A page with its tables as they are made of what is kept."""
    def fill(match):
        head, name, columns, _, end = match.groups()
        return head + table(name, names_in(columns)) + end

    def fill_parts(match):
        head, names, _, end = match.groups()
        return head + parts_table(names_in(names)) + end

    return PARTS.sub(fill_parts, TABLE.sub(fill, page))


def names_in(text) -> list:
    return [name.strip() for name in text.split(",")]


# ---------------- plots

def opening(height, title) -> list:
    """The first lines of an SVG: a white page and its title."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="12" y="22" font-weight="bold">{escape(title)}</text>',
    ]


def small(x, y, text, anchor="middle") -> str:
    """Small grey text, such as a number at an axis."""
    return (f'<text x="{round(x, 1)}" y="{round(y, 1)}" font-size="11" fill="#666" '
            f'text-anchor="{anchor}">{escape(text)}</text>')


def plot(rows, title, marks) -> str:
    """An SVG of horizontal bars, masked NDCG@10, with the spread of the seeds, and vertical lines
    at the marks."""
    height = 64 + ROW * len(rows) + 16
    values = {
        name: [run.number("test_masked", "ndcg@10") for run in runs]
        for name, runs in reversed(rows.items())
    }
    longest = max([*map(max, values.values()), *marks.values()])
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = opening(height, title)
    for name, value in marks.items():
        x = LEFT + value * scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="52" y2="{height - 12}" stroke="#999" '
            f'stroke-dasharray="3 3"/>{small(x, 46, name)}'
        )
    for n, (name, each) in enumerate(values.items()):
        y = 60 + ROW * n
        end = LEFT + sum(each) / len(each) * scale
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{LEFT}" y="{y + 4}" width="{end - LEFT:.1f}" height="18" fill="{BLUE}"/>'
        )
        if len(each) > 1:
            low, high = LEFT + min(each) * scale, LEFT + max(each) * scale
            parts.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 13}" y2="{y + 13}" '
                f'stroke="#e0a030" stroke-width="4"/>'
            )
        after = LEFT + max(each) * scale + 8
        shown = comparison.shown(*comparison.mean_and_spread(each))
        parts.append(
            f'<text x="{after:.1f}" y="{y + 17}" stroke="#fff" stroke-width="4" '
            f'paint-order="stroke">{shown}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def frontier(rows) -> str:
    """An SVG of points: NDCG@10 over all (across) and of cold items (up), without the history."""
    points = {}
    for name, runs in rows.items():
        numbers = numbers_of(runs)
        points[name] = numbers["masked N@10"][0], numbers[MASKED_COLD][0]
    right = 1.08 * max(x for x, _ in points.values())
    top = 1.12 * max(y for _, y in points.values())
    parts = [
        *opening(HEIGHT, "NDCG@10 without the history: over all, and of cold items"),
        f'<path d="M{EDGE} {EDGE - 20}V{HEIGHT - EDGE}H{WIDTH - 20}" fill="none" stroke="#999"/>',
        f'<text x="{WIDTH - 20}" y="{HEIGHT - 14}" text-anchor="end">over all</text>',
        f'<text x="12" y="{EDGE - 14}">cold</text>',
    ]

    def across(x):
        return EDGE + x / right * (WIDTH - EDGE - 20)

    def up(y):
        return HEIGHT - EDGE - y / top * (HEIGHT - 2 * EDGE)

    for tick in range(1, int(right / 0.02) + 1):
        x = 0.02 * tick
        parts.append(small(across(x), HEIGHT - EDGE + 18, comparison.shown(x)[:3]))
    for tick in range(1, int(top / 0.01) + 1):
        y = 0.01 * tick
        parts.append(small(EDGE - 6, up(y) + 4, comparison.shown(y)[:3], "end"))
    taken = []    # places of labels, so that none covers another
    for name, (x, y) in sorted(points.items(), key=lambda point: point[1]):
        colour = RED if name.startswith("digest") else BLUE
        label = up(y) + 4
        while any(abs(label - other) < 14 and abs(across(x) - place) < 150
                  for place, other in taken):
            label -= 14
        taken.append((across(x), label))
        parts.append(
            f'<path d="M{across(x):.1f} {up(y):.1f}L{across(x) - 9:.1f} {label - 4:.1f}" '
            f'stroke="#999"/>'
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="5" fill="{colour}"/>'
            f'<text x="{across(x) - 10:.1f}" y="{label:.1f}" text-anchor="end">'
            f'{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def growth(table) -> str:
    """An SVG of a Markdown table | model | items | numbers ... |: each number against the items, a
    line for each model, all axes logarithmic."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                      for line in table.splitlines()]
    numbers = {}    # of each model its rows
    for model, *cells in rows:
        numbers.setdefault(model, []).append([float(cell.replace(",", "")) for cell in cells])
    height, wide = 330, (WIDTH - 20) / (len(head) - 2)
    parts = opening(height, "What grows with the number of items, and how")
    for column, title in enumerate(head[2:], start=1):
        lines = [[(row[0], row[column]) for row in of_model if row[column] > 0]
                 for of_model in numbers.values()]
        parts += panel(title, lines, 20 + wide * (column - 1), wide, height)
    for n, (colour, model) in enumerate(zip(COLOURS, numbers)):
        x = 30 + 100 * n
        parts.append(f'<circle cx="{x}" cy="{height - 19}" r="5" fill="{colour}"/>'
                     f'<text x="{x + 10}" y="{height - 15}">{escape(model)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def panel(title, lines, start, wide, height) -> list:
    """Lines of points (x, y) on logarithmic axes, in the elements of an SVG."""
    xs = sorted({x for line in lines for x, _ in line})
    ys = [y for line in lines for _, y in line]
    low, top = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    top += low == top

    def across(x):
        share = math.log(x / xs[0]) / max(math.log(xs[-1] / xs[0]), 1e-9)
        return start + 34 + (wide - 60) * share

    def up(y):
        return height - 60 - (height - 130) * (math.log10(y) - low) / (top - low)

    left, right, bottom = across(xs[0]), across(xs[-1]), up(10 ** low)
    parts = [f'<text x="{start + 4:.1f}" y="50">{escape(title)}</text>'
             f'<path d="M{left:.1f} {up(10 ** top):.1f}V{bottom:.1f}H{right:.1f}" fill="none" '
             f'stroke="#999"/>']
    for power in range(low, top + 1):
        parts.append(small(left - 6, up(10 ** power) + 4, f"{10 ** power:g}", "end"))
    for x in xs:
        parts.append(small(across(x), bottom + 16, f"{x / 1000:g}k"))
    for colour, line in zip(COLOURS, lines):
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="{colour}"/>'
                  for x, y in line]
    return parts


def plots_in(page) -> dict:
    """{path: SVG} of the plots that a page names."""
    found = {}
    for name, path, marks in PLOT.findall(page):
        try:
            pairs = [mark.rsplit("=", 1) for mark in marks.split(";") if mark.strip()]
            values = {what.strip(): float(value) for what, value in pairs}
        except ValueError:
            raise UserError(
                f"the plot {name}: {path} has the marks {marks}: write NAME=NUMBER; NAME=NUMBER"
            ) from None
        found[ROOT / path] = plot(rows_of(name), "NDCG@10 without the history", values)
    for sets, path in FRONTIER.findall(page):
        rows = {}
        for name in names_in(sets):
            rows |= rows_of(name)
        found[ROOT / path] = frontier(rows)
    for path, table in GROWTH.findall(page):
        found[ROOT / path] = growth(table)
    return found


# ---------------- the command

def everything() -> dict:
    """{path: its text as it should be} of all pages with tables, and of all plots."""
    texts = {}
    for path in pages_of(ROOT):
        page = path.read_text(encoding="utf-8")
        if TABLE.search(page) or PARTS.search(page):
            texts[path] = written(page)
        texts |= plots_in(page)
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--keep", metavar="SET", help="keep the runs in docs/runs/SET")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    args = parser.parse_args()
    if bool(args.keep) != bool(args.runs) or (args.keep and args.check):
        raise UserError("--keep names a set and needs runs: --keep demo runs/*-demo-?")
    if args.keep:
        keep(args.keep, args.runs)
        return 0
    outdated = {
        path: text for path, text in everything().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }
    for path, text in outdated.items():
        print(f"{path.relative_to(ROOT)} {'is outdated' if args.check else 'is written anew'}")
        if not args.check:
            path.write_text(text, encoding="utf-8")
    return 1 if args.check and outdated else 0


if __name__ == "__main__":
    command(main)
