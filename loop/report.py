"""Pages: the numbers of a run, the curves of its training, what users got and what they might like.

Draws what it is given and computes nothing. One file without scripts or links; titles are escaped,
pictures are drawn anew.
"""
import base64
import html
import io
import math
from contextlib import suppress

from common.files import atomic
from common.pictures import BadPicture, open_picture

COLUMNS = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
THUMBNAIL = (168, 168)    # pixels, twice what is shown
COLOURS = ("#2a62b8", "#e0a030")    # of the bars of one run, of two
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222 }
body { margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse }
td, th { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child { text-align: left; font-weight: normal; white-space: nowrap }
thead th { font-weight: bold }
svg { background: #f6f6f4; margin: .4em .4em .4em 0; border-radius: 4px }
table { display: block; overflow-x: auto }
polyline { fill: none; stroke: #2a62b8; stroke-width: 2 }
figure { display: inline-block; width: 76px; margin: .3em .2em; vertical-align: top }
figcaption { font-size: 10px; line-height: 1.25 }
figure img, figure span { display: block; width: 76px; height: 76px; background: #f6f6f4 }
figure img { object-fit: contain }
.hit { outline: 3px solid #3a9a4a }
h3 { margin: .6em 0 0; font-size: 13px }
section { display: flex; flex-wrap: wrap; gap: 0 1.2em; border-bottom: 1px solid #ddd }
"""


def write_report(folder, label, dataset, result, log, examples):
    """Write `folder/report.html`.

    result: what metrics.json holds; without test metrics where everything was trained on. log: the
    lines of log.jsonl. examples: of evaluate.examples.
    """
    title = html.escape(label)
    cost = (
        f"{result['seconds']:.0f} s on {html.escape(result['device'])}, {result['parameters']} "
        f"weights."
    )
    if "test" in result:
        lead = (
            f"Best epoch {result['best_epoch']} of {result['epochs']}, {cost} Test metrics, full "
            f"ranking over {dataset.n_items} items; masked: without the user's history."
        )
        everybody = {"without the history": (result["test_masked"], result["groups_masked"])}
        head = f"{table(result)}<h2>NDCG@10 by group</h2>{bars(everybody)}"
        sections = "".join(section(dataset, example) for example in examples)
        users = f"<h2>{len(examples)} test users, drawn at random</h2>\n{sections}"
    else:
        lead = f"{result['epochs']} epochs on everything, nothing is tested; {cost}"
        head = users = ""
    body = f"""<p>{lead}</p>
{head}
<h2>Training</h2>{curves(log)}
{users}"""
    write_page(folder / "report.html", title, body)


def write_page(path, title, body):
    """One file without scripts or links. title: escaped."""
    with atomic(path) as file:
        file.write(f"""<!doctype html><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>
{body}""")


def write_recommendations(path, model, dataset, people):
    """A page of what a model recommends.

    people: (name, history: item ids, the oldest first, items ranked first) of each user.
    """
    sections = []
    for name, history, best in people:
        lately = figures(dataset, history[-6:])
        sections.append(
            f"<h2>{html.escape(name)}</h2><section>"
            f"<div><h3>the last of {len(history)} items</h3>{lately}</div>"
            f"<div><h3>recommended</h3>{figures(dataset, best)}</div></section>"
        )
    title = html.escape(f"{model} on {dataset.name}")
    write_page(path, title, "\n".join(sections))


def table(result) -> str:
    """The metrics, overall and by group, plain and masked."""
    rows = [row("all", result["users"], result["test"], result["test_masked"])]
    for group, numbers in result["groups"].items():
        rows.append(row(group, numbers["users"], numbers, result["groups_masked"][group]))
    return f"<table>{head_of_table()}{''.join(rows)}</table>"


def head_of_table() -> str:
    head = "".join(f"<th>{name}" for name in COLUMNS)
    head += "".join(f"<th>masked {name}" for name in COLUMNS)
    return f"<thead><tr><th><th>users{head}</thead>"


def row(name, users, plain, masked) -> str:
    cells = "".join(f"<td>{numbers[c]:.4f}" for numbers in (plain, masked) for c in COLUMNS)
    return f"<tr><th>{html.escape(name)}<td>{users}{cells}"


def bars(runs) -> str:
    """NDCG@10 without the history of all users and of each group, a bar for each run.

    runs: {name: (numbers of all users, {group: numbers})}; several have one colour each.
    """
    values = {
        name: {"all": everybody["ndcg@10"]} | {group: row["ndcg@10"] for group, row in by.items()}
        for name, (everybody, by) in runs.items()
    }
    groups = list(dict.fromkeys(group for row in values.values() for group in row))
    longest = max(max(row.values()) for row in values.values()) or 1
    step = 14 * len(runs) + 8
    height = step * len(groups) + 30
    parts = []
    for n, group in enumerate(groups):
        middle = 30 + n * step + 7 * len(runs)
        label = html.escape(group)
        parts.append(f'<text x="118" y="{middle + 4}" text-anchor="end">{label}</text>')
        for m, (row, colour) in enumerate(zip(values.values(), COLOURS)):
            if group in row:
                y, width = 30 + n * step + 14 * m, 300 * row[group] / longest
                parts.append(
                    f'<rect x="126" y="{y}" width="{width:.1f}" height="12" fill="{colour}"/>'
                    f'<text x="{132 + width:.1f}" y="{y + 10}">{row[group]:.4f}</text>'
                )
    names = "".join(
        f'<tspan fill="{colour}" dx="12">{html.escape(name)}</tspan>'
        for name, colour in zip(values, COLOURS)
    )
    legend = f'<text x="114" y="18" font-weight="bold">{names}</text>'
    return (
        f'<svg viewBox="0 0 500 {height}" style="width: 100%; max-width: 500px" font-size="11">'
        f'{legend}{"".join(parts)}</svg>'
    )


def write_comparison(path, names, dataset, results, difference, users):
    """A page of two runs.

    names: of the runs. results: what their metrics.json hold. difference: of
    comparison.difference. users: {heading: [{"history", "target", "ranks", "tops"}]}, the last two
    of both runs, of users where they differ most.
    """
    both = {
        name: (result["test_masked"], result["groups_masked"])
        for name, result in zip(names, results)
    }
    rows = "".join(
        row(name, result["users"], result["test"], result["test_masked"])
        for name, result in zip(names, results)
    )
    first, second = map(html.escape, names)
    lead = (
        f"NDCG@10 of {first} minus {second}: {difference['difference']:+.4f}, 95 % interval "
        f"{difference['low']:+.4f} to {difference['high']:+.4f} (bootstrap over users), "
        f"p {difference['p']:.4f} (permutation of signs)."
    )
    sections = []
    for heading, people in users.items():
        sections.append(f"<h2>{html.escape(heading)}</h2>")
        sections += [section_of_both(dataset, names, person) for person in people]
    body = f"""<p>{lead}</p>
<table>{head_of_table()}{rows}</table>
<h2>NDCG@10 without the history, by group</h2>{bars(both)}
{"".join(sections)}"""
    write_page(path, f"{first} against {second}", body)


def section_of_both(dataset, names, person) -> str:
    """One user: the end of the history, the next item, and what each run ranked first."""
    target = person["target"]
    tops = "".join(
        f"<div><h3>{html.escape(name)}: rank {rank + 1}</h3>{figures(dataset, top, target)}</div>"
        for name, rank, top in zip(names, person["ranks"], person["tops"])
    )
    return (
        f"<section><div><h3>the last of the history</h3>"
        f"{figures(dataset, person['history'][-6:])}</div>"
        f"<div><h3>then</h3>{figures(dataset, [target])}</div>{tops}</section>"
    )


def curves(log) -> str:
    """Each loss term of each stage, and the validation metric, over the epochs."""
    drawn = []
    for stage in dict.fromkeys(line["stage"] for line in log):
        lines = [line for line in log if line["stage"] == stage]
        for term in lines[0]["losses"]:
            values = [line["losses"][term] for line in lines if term in line["losses"]]
            drawn.append(curve(f"{stage}: {term}", values))
    valid = [line["valid"]["ndcg@10"] for line in log if "valid" in line]
    drawn.append(curve("validation ndcg@10", valid))
    return "".join(drawn)


def curve(title, values, width=250, height=120) -> str:
    """A row of numbers as a line in a small SVG picture."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (width - 24) / max(len(values) - 1, 1)
    scale = (height - 54) / ((high - low) or 1)
    points = " ".join(
        f"{12 + i * step:.1f},{height - 22 - (value - low) * scale:.1f}"
        for i, value in enumerate(values)
    )
    note = f"{len(values)} points, from {values[0]:.4g} to {values[-1]:.4g}"
    return (
        f'<svg width="{width}" height="{height}">'
        f'<text x="12" y="18" font-size="12">{html.escape(title)}</text>'
        f'<polyline points="{points}"/>'
        f'<text x="12" y="{height - 6}" font-size="10">{note}</text></svg>'
    )


def section(dataset, example) -> str:
    """One user: the end of the history, the next item and its rank, the items ranked first."""
    target = example["target"]
    history = figures(dataset, example["history"][-6:])
    answer = figures(dataset, [target])
    top = figures(dataset, example["top"], hit=target)
    return (
        f"<section><div><h3>the last of the history</h3>{history}</div>"
        f"<div><h3>then: rank {example['rank'] + 1}</h3>{answer}</div>"
        f"<div><h3>ranked first</h3>{top}</div></section>"
    )


def figures(dataset, items, hit=None) -> str:
    return "".join(figure(dataset, item, item == hit) for item in items)


def figure(dataset, item, is_hit) -> str:
    """An item's picture, if it has one, and its title."""
    about = dataset.items[item]
    picture = "<span></span>"
    path = dataset.image_path(about)
    if path:
        with suppress(BadPicture):
            image = open_picture(path)
            image.thumbnail(THUMBNAIL)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            data = base64.b64encode(buffer.getvalue()).decode()
            picture = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    caption = html.escape((about["title"] or about["key"])[:70])
    mark = " class=hit" if is_hit else ""
    return f"<figure{mark}>{picture}<figcaption>{caption}</figcaption></figure>"
