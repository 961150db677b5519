"""One table of many finished runs: means and spreads of seeds, and paired differences.

Everything is read from the runs' folders: config.json, metrics.json, and the users' ranks.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import (
    UserError,
    atomic,
    first_line,
    has_form,
    read_json,
    refuse_endless,
    set_aside,
)
from common.statistics import gain, holm, mean_and_spread, p_value, with_interval

COLUMNS = (    # heading, part of metrics.json, metric
    ("R@10", "test", "recall@10"),
    ("N@10", "test", "ndcg@10"),
    ("masked R@10", "test_masked", "recall@10"),
    ("masked N@10", "test_masked", "ndcg@10"),
    ("warm N@10", "warm", "ndcg@10"),
    ("cold R@10", "cold", "recall@10"),
    ("cold N@10", "cold", "ndcg@10"),
)
COMPARED = {    # column whose users are compared -> part of metrics.json, file of ranks, key here
    "N@10": ("test", "ranks-test.npy", "against"),
    "masked N@10": ("test_masked", "ranks-test-masked.npy", "against_masked"),
}
DATA = ("sequences_sha256", "split", "cut")    # what runs in one table share
IGNORED = ("seed", "data", "widths", "config", "made_with")    # what sets no rows apart
# what a table reads of config.json and metrics.json, as has_form takes it
NEEDED = {"model": str, "seed": int, "split": str, "config": dict, "sequences_sha256": str}
NUMBERS = {"recall@10": float, "ndcg@10": float}
TOLD = {
    "test": NUMBERS, "test_masked": NUMBERS, "groups": {str: NUMBERS},
    "best_epoch": int, "seconds": float, "parameters": int,
}


@dataclass
class Finished:
    """A finished run, as far as a table needs it."""
    folder: Path
    settings: dict
    metrics: dict

    def has_ranks(self, column) -> bool:
        """Whether ranks are kept for a column of COMPARED; older runs have them for N@10 alone."""
        return column == "N@10" or (self.folder / COMPARED[column][1]).is_file()

    def ranks(self, column="N@10"):
        """The rank of each test user's target, 0 = best: (U,) integers. Raises UserError."""
        part, name, _ = COMPARED[column]
        path = self.folder / name
        try:
            refuse_endless(path)
            found = np.load(path, allow_pickle=False)
            if found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0:
                raise ValueError("they are no ranks")
            if abs(gain(found).mean() - self.metrics[part]["ndcg@10"]) > 1e-6:
                raise ValueError("they do not give the numbers of metrics.json")
            return found
        except Exception as error:    # a damaged .npy can raise almost anything
            raise UserError(
                f"{path} cannot be read ({first_line(error)}): train the run again, or leave it out"
            ) from None

    def number(self, part, metric):
        """A metric over all users or of a group; None for a group that nobody is in."""
        numbers = self.metrics.get(part) or self.metrics["groups"].get(part)
        return numbers[metric] if numbers else None


def finished(folder) -> Finished:
    """Raises UserError for a folder without a finished and tested run."""
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        raise UserError(
            f"{folder} holds no finished run (no metrics.json): finish it with --resume, or leave "
            f"it out"
        )
    advice = "train it again, or leave it out"
    settings = read_json(folder / "config.json", object, advice)
    if not has_form(settings, NEEDED):
        raise UserError(f"{folder} has a config.json of no run: {advice}")
    if settings["split"] == "none":
        raise UserError(f"{folder} was trained on everything (--split none): nothing was tested")
    metrics = read_json(folder / "metrics.json", object, advice)
    if not has_form(metrics, TOLD):
        raise UserError(f"{folder} has a metrics.json of no run: {advice}")
    return Finished(folder, settings, metrics)


# ---------------- rows: runs that differ in nothing but the seed

def rows_of(folders) -> dict:
    """{name of a row: its runs}, in the order of the folders. Raises UserError for runs on
    different data or splits."""
    unique = {os.path.realpath(folder): folder for folder in folders}
    runs = [finished(folder) for folder in unique.values()]
    about = [tuple(run.settings.get(name) for name in DATA) for run in runs]
    for run, own in zip(runs, about):
        if own != about[0]:
            raise UserError(
                f"{runs[0].folder} and {run.folder} are runs on different data or splits: give "
                f"runs on the same"
            )
    groups = {}
    for run in runs:
        groups.setdefault(fingerprint(run.settings), []).append(run)
    rows = {}
    for group in groups.values():
        refuse_seeds_twice(group)
        rows[name_of(group[0], groups.values(), rows)] = group
    return rows


def refuse_seeds_twice(runs):
    """Raises UserError where two runs of a row have one seed."""
    folders = {}
    for run in runs:
        other = folders.setdefault(run.settings["seed"], run.folder)
        if other != run.folder:
            raise UserError(
                f"{other} and {run.folder} are runs of one seed with the same settings: leave one "
                f"out"
            )


def fingerprint(settings) -> str:
    """All settings but the seed, as one string."""
    return json.dumps(flat(settings), sort_keys=True)


def flat(settings) -> dict:
    both = {**settings, **settings["config"]}
    return {name: value for name, value in both.items() if name not in IGNORED}


def name_of(run, groups, taken) -> str:
    """The model's name, and what sets a row apart from the first row of that model."""
    model = run.settings["model"]
    first = next(group[0] for group in groups if group[0].settings["model"] == model)
    here, there = flat(run.settings), flat(first.settings)
    parts = [
        f"{name} {str(here[name]).lower()}" for name in here if here[name] != there.get(name)
    ]
    name = ", ".join([model, *parts[:4]])
    return name if name not in taken else f"{name} ({run.folder})"


# ---------------- what a row says

def summary(runs) -> dict:
    """{column: [mean, spread]} of runs with different seeds, and what they cost."""
    found = {"seeds": [run.settings["seed"] for run in runs]}
    for heading, part, metric in COLUMNS:
        values = [run.number(part, metric) for run in runs]
        if None not in values:
            found[heading] = mean_and_spread(values)
    for name in ("best_epoch", "seconds", "parameters"):
        found[name] = float(np.mean([run.metrics[name] for run in runs]))
    found["runs"] = [str(run.folder) for run in runs]
    return found


def difference(runs, others, column="N@10") -> dict:
    """Of a row's NDCG@10 to another's: each user's mean over seeds, paired. column: of COMPARED.

    Raises UserError where the ranks are not of the same users.
    """
    mine, theirs = gains_of(runs, column), gains_of(others, column)
    if len(mine) != len(theirs):
        raise UserError(
            f"{runs[0].folder} and {others[0].folder} rank {len(mine)} and {len(theirs)} users: "
            f"they cannot be compared"
        )
    differences = mine - theirs
    return with_interval(differences) | {"p": p_value(differences)}


def gains_of(runs, column):
    """NDCG@10 of each user, mean over the seeds: (U,)"""
    each = [gain(run.ranks(column)) for run in runs]
    if len({len(gains) for gains in each}) > 1:
        raise UserError(f"the runs of {runs[0].folder} and its other seeds rank different users")
    return np.mean(each, axis=0)


def compare(rows) -> dict:
    """{name: summary}; from the second row on with "against" and "against_masked": the difference
    to the first, p by Holm over all of a column."""
    found = {name: summary(runs) for name, runs in rows.items()}
    for column in COMPARED:
        if all(run.has_ranks(column) for runs in rows.values() for run in runs):
            add_differences(found, rows, column)
    return found


def add_differences(found, rows, column):
    """Add to each row of `found` but the first its difference to the first (in place)."""
    first, *others = rows
    key = COMPARED[column][2]
    each = [difference(rows[name], rows[first], column) for name in others]
    for name, one, p in zip(others, each, holm([one["p"] for one in each])):
        found[name][key] = {"first": first, **one, "p_holm": p}


# ---------------- how it is shown

def markdown(found) -> str:
    """The table of `compare` as Markdown."""
    head = ["", *(heading for heading, _, _ in COLUMNS), "epoch", "seconds", "weights"]
    first, *others = found
    compared = {column: key for column, (_, _, key) in COMPARED.items()
                if others and key in found[others[0]]}
    for column in compared:
        head += [f"{column} against {first}", "p (Holm)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in found.items():
        cells = [shown(*row[heading]) if heading in row else "" for heading, _, _ in COLUMNS]
        cells += [f"{row['best_epoch']:.0f}", f"{row['seconds']:.0f}"]
        cells.append(f"{row['parameters']:.0f}")
        for key in compared.values():
            cells += shown_difference(row.get(key))
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def shown(mean, spread=math.nan) -> str:
    """.0903 ± .0012"""
    text = f"{mean:.4f}".removeprefix("0") if mean else "0"
    if spread > 0:    # not nan either: of one seed
        text += f" ± {spread:.4f}".replace(" 0.", " .")
    return text


def shown_difference(against) -> list:
    """Two cells: the difference with its interval, and its corrected p value."""
    if against is None:
        return ["", ""]
    signed = [f"{against[name]:+.4f}".replace("0.", ".") for name in ("difference", "low", "high")]
    p = against["p_holm"]
    return [f"{signed[0]} ({signed[1]} to {signed[2]})", f"{p:.4f}".removeprefix("0")]


NOTE = (
    "Differences: each user's NDCG@10, mean over seeds, with the 95 % interval of the bootstrap "
    "over users, and p of the permutation test over users, by Holm for all rows of a column. "
    "What seeds differ by is in neither: see the ± of the rows."
)


def write(path, found):
    """The table as path.md and path.json; another one there is kept under another name."""
    note = f"\n\n{NOTE}\n" if len(found) > 1 else "\n"
    texts = {".md": markdown(found) + note, ".json": json.dumps(found, indent=1) + "\n"}
    for end, text in texts.items():
        file = path.with_name(path.name + end)
        if file.is_file() and file.read_bytes() != text.encode():
            print(f"an earlier {file} is now {set_aside(file)}")
        with atomic(file) as opened:
            opened.write(text)
