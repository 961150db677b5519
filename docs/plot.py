"""A table and a plot of finished runs, from their metrics.json.

    python docs/plot.py runs/*-demo-? --out docs/demo.svg

Runs that differ in the seed alone are one row: mean and standard deviation. The table is printed as
Markdown; the plot is an SVG of NDCG@10 without the user's history, with a line at each --mark.
"""
import argparse
import json
import re
from html import escape
from pathlib import Path
from statistics import mean, stdev

COLUMNS = (    # heading, part of metrics.json, metric
    ("R@10", "test", "recall@10"),
    ("N@10", "test", "ndcg@10"),
    ("masked R@10", "test_masked", "recall@10"),
    ("masked N@10", "test_masked", "ndcg@10"),
    ("warm N@10", "warm", "ndcg@10"),
    ("cold R@10", "cold", "recall@10"),
    ("cold N@10", "cold", "ndcg@10"),
)
WIDTH, ROW, LEFT, RIGHT = 760, 30, 110, 110    # pixels


def rows_of(folders):
    """{model: [its runs' metrics]}, the weakest first."""
    rows = {}
    for folder in folders:
        name = re.sub(r"-\d+$", "", folder.name)
        metrics = json.loads((folder / "metrics.json").read_text())
        settings = json.loads((folder / "config.json").read_text())
        rows.setdefault(settings["model"] if settings else name, []).append(metrics)
    return dict(sorted(rows.items(), key=lambda row: mean(values(row[1], "test_masked"))))


def values(runs, part, metric="ndcg@10"):
    found = []
    for metrics in runs:
        numbers = metrics[part] if part in metrics else metrics["groups"].get(part)
        if numbers:
            found.append(numbers[metric])
    return found


def shown(numbers):
    """.0903 ± .0012"""
    if not numbers:
        return ""
    text = f"{mean(numbers):.4f}".lstrip("0")
    if len(numbers) > 1:
        text += f" ± {stdev(numbers):.4f}".replace(" 0.", " .")
    return text


def table(rows):
    headings = [heading for heading, _, _ in COLUMNS]
    head = ["", *headings, "epochs", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in rows.items():
        cells = [shown(values(runs, part, metric)) for _, part, metric in COLUMNS]
        epochs = f"{mean(run['best_epoch'] for run in runs):.0f}"
        seconds = f"{mean(run['seconds_training'] for run in runs):.0f}"
        lines.append("| " + " | ".join([name, *cells, epochs, seconds]) + " |")
    return "\n".join(lines)


def plot(rows, title, marks):
    """An SVG of horizontal bars, with the spread of the seeds and vertical lines at the marks."""
    height = 64 + ROW * len(rows) + 16
    highest = [max(values(runs, "test_masked")) for runs in rows.values()]
    longest = max([*highest, *marks.values()])
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="12" y="22" font-weight="bold">{escape(title)}</text>',
    ]
    for name, value in marks.items():
        x = LEFT + value * scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="52" y2="{height - 12}" stroke="#999" '
            f'stroke-dasharray="3 3"/><text x="{x:.1f}" y="46" font-size="11" fill="#666" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    for n, (name, runs) in enumerate(rows.items()):
        numbers = values(runs, "test_masked")
        y = 60 + ROW * n
        end = LEFT + mean(numbers) * scale
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{LEFT}" y="{y + 4}" width="{end - LEFT:.1f}" height="18" fill="#2a62b8"/>'
        )
        if len(numbers) > 1:
            low, high = LEFT + min(numbers) * scale, LEFT + max(numbers) * scale
            parts.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 13}" y2="{y + 13}" '
                f'stroke="#e0a030" stroke-width="4"/>'
            )
        after = LEFT + max(numbers) * scale + 8
        parts.append(
            f'<text x="{after:.1f}" y="{y + 17}" stroke="#fff" stroke-width="4" '
            f'paint-order="stroke">{shown(numbers)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="where to write the SVG")
    parser.add_argument("--title", default="NDCG@10 without the history")
    parser.add_argument("--mark", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    rows = rows_of(args.runs)
    print(table(rows))
    if args.out:
        marks = dict(mark.split("=") for mark in args.mark)
        marks = {name: float(value) for name, value in marks.items()}
        args.out.write_text(plot(rows, args.title, marks), encoding="utf-8")


if __name__ == "__main__":
    main()
