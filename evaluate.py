"""Ranks -> metrics. Full ranking over all items, ties against the target, padding never ranked.

    python evaluate.py runs/mdsrec-demo-0                       evaluated again
    python evaluate.py runs/sasrec-demo-? runs/mdsrec-demo-?    one table, each against the first
    python evaluate.py runs/mdsrec-demo-0 --against runs/sasrec-demo-0    a page, with users

One target per user, so Recall@K = HR@K. Every number exists twice: over all items, and `masked`,
where the items of the user's own history are left out of the ranking (the target itself never is).
"""
import argparse
import math
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from common.files import UserError, command
from common.progress import Bar
from common.statistics import paired  # noqa: F401, for whoever compares ranks
from data import COLD
from loop import comparison, report
from loop.runs import TESTED, open_run, read_metrics
from sources import demo

KS = (5, 10, 20, 50)
HISTORY = ((1, 4), (5, 9), (10, 19), (20, None))    # groups of history length
SHOWN = 6    # users of each kind on a page of two runs


# ---------------- ranks and metrics

def items_that_beat(scores, target):
    """(B, N+1) bool: which other items score at least as high as the target. Raises ValueError."""
    finite = torch.isfinite(scores)
    if not finite.all():
        row = int((~finite).any(1).nonzero()[0])
        raise ValueError(f"scores of row {row} are not finite, and a NaN would rank by accident")
    beats = scores >= scores.gather(1, target[:, None])
    beats[:, 0] = False
    return beats.scatter_(1, target[:, None], False)


def rank_of_target(scores, target, seen=None) -> torch.Tensor:
    """Rank of each row's target among all items: (B,) int64, 0 = best. Every tie counts against it.

    scores: (B, N+1) finite, column j = item j; column 0 is padding and is never counted. target:
    (B,) int64 in 1..N. seen: (B, M) int64 ids to leave out of the ranking, 0 = none, repeats
    allowed; the target itself is never left out. Raises ValueError for a score that is not finite.
    """
    beats = items_that_beat(scores, target)
    if seen is not None:
        beats = beats.scatter_(1, seen, False)
    return beats.sum(1)


def metrics(ranks, ks=KS) -> dict:
    """{"recall@k", "ndcg@k", "mrr@k"}, means over users with one relevant item (HR@k = recall@k).

    ranks: (U,) int, 0 = best. Inside the first k, NDCG@k = 1 / log2(rank + 2) and
    MRR@k = 1 / (rank + 1); else 0. Raises ValueError for no ranks at all: nothing has no mean.
    """
    if isinstance(ranks, torch.Tensor):
        ranks = ranks.cpu()
    ranks = np.asarray(ranks, np.float64)
    if not len(ranks):
        raise ValueError("there are no ranks to average")
    means = {}
    for k in ks:
        hit = ranks < k
        means[f"recall@{k}"] = float(hit.mean())
        means[f"ndcg@{k}"] = float((hit / np.log2(ranks + 2)).mean())
        means[f"mrr@{k}"] = float((hit / (ranks + 1)).mean())
    return means


# ---------------- a model on a data set

@contextmanager
def ranking(model):
    """Evaluation mode, and matrix products in true float32."""
    training = model.training
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def ranks_of(model, rows, device, budget=None):
    """Ranks of every row's target, plain and with the history masked: two (rows,) int64 arrays.

    rows: `Data.evaluated_rows`. budget: how many scores are held at once (default: 2^22 on the CPU,
    2^26 elsewhere). The table of items is made once; users are scored sorted by length, trimmed, in
    chunks of at most budget / n_items.
    """
    plain = torch.empty(len(rows), dtype=torch.long, device=device)
    masked = torch.empty_like(plain)
    with ranking(model):
        table = model.encode_items()
        size = chunk_size(table, device, budget)
        bar = Bar("ranking", -(-len(rows) // size), " parts")
        for chunk, index, inputs in bar.over(in_chunks(rows, size, device)):
            target = rows.flat[rows.end[index]]
            beats = items_that_beat(scores_of(model, inputs, table), target)
            plain[index] = beats.sum(1)
            seen = rows.seen(index, int(rows.history[chunk].max()))
            masked[index] = beats.scatter_(1, seen, False).sum(1)
    return plain.cpu().numpy(), masked.cpu().numpy()


def scores_of(model, inputs, table):
    """A model's scores of all items, float32: (B, N+1).

    Raises UserError for another shape: with a column less, every item would have its neighbour's.
    """
    scores = model.score(inputs, table)
    users, width = len(inputs["seq"]), rows_in(table)
    shape = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
    if shape != (users, width):
        raise UserError(
            f"score of the model file returned {shape} for {users} users, and a tensor of shape "
            f"({users}, {width}) is wanted: a column for each row of encode_items, the first is "
            f"padding"
        )
    return scores.float()


def in_chunks(rows, size, device):
    """All rows, sorted by length, `size` at a time: their numbers on the host and on the device,
    and what a model is shown of them."""
    order = np.argsort(rows.lengths, kind="stable")
    on_device = torch.as_tensor(order, device=device)
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        chunk, index = order[part], on_device[part]
        batch = rows.batch(index, int(rows.lengths[chunk].max()))
        yield chunk, index, {"user": batch["user"], "seq": batch["seq"]}    # without the target


def chunk_size(table, device, budget=None) -> int:
    """How many users are scored at once."""
    if budget is None:
        budget = 2 ** 22 if torch.device(device).type == "cpu" else 2 ** 26
    # in a small catalog too, rows of different lengths are kept apart
    return min(max(budget // rows_in(table), 1), 2048)


def rows_in(table) -> int:
    """N + 1: the rows of what encode_items returns."""
    if isinstance(table, dict):
        table = tuple(table.values())
    return len(table[0] if isinstance(table, tuple) else table)


def evaluate(model, dataset, cfg, split, device, most=None) -> dict:
    """Full-ranking evaluation of one split ("valid" or "test").

    most: so many of its users, drawn once and for all; None: all.

    Returns the metrics over all evaluated users, and under "masked" the same with histories
    masked, "groups" and "groups_masked" (name -> {"users": n, metrics}), "users" (how many),
    "ranks" and "ranks_masked" (users,) int64 arrays. Groups: cold (fewer than 10 training
    occurrences of the target), of these the unseen (none), and warm; length of the input history;
    target with and without text and picture. model: the contract's encode_items and score. cfg:
    needs max_len. Raises UserError for scores that are not finite.
    """
    rows = dataset.evaluated_rows(split, cfg.max_len, device, most)
    try:
        plain, masked = ranks_of(model, rows, device)
    except ValueError as error:
        raise UserError(
            f"the {split} evaluation stopped, {error}: look at the features, or train with a lower "
            f"--lr"
        ) from None
    groups = groups_of(dataset, rows, split)
    return {
        **metrics(plain),
        "masked": metrics(masked),
        "groups": by_group(plain, groups),
        "groups_masked": by_group(masked, groups),
        "users": len(rows),
        "ranks": plain,
        "ranks_masked": masked,
    }


def groups_of(dataset, rows, split) -> dict:
    """Name of a group -> (rows,) bool, for the groups that have users."""
    target = dataset.flat[dataset.targets[split][rows.users]]
    seen = dataset.train_counts[target]
    groups = {"cold": seen < COLD, "unseen": seen == 0, "warm": seen >= COLD}
    for low, high in HISTORY:
        name = f"history {low}-{high}" if high else f"history {low}+"
        groups[name] = (rows.history >= low) & (rows.history <= (high or math.inf))
    for modality in ("text", "image"):
        has = dataset.has[modality][target]
        groups[f"with {modality}"] = has
        groups[f"without {modality}"] = ~has
    return {name: member for name, member in groups.items() if member.any()}


def by_group(ranks, groups) -> dict:
    return {
        name: {"users": int(member.sum()), **metrics(ranks[member])}
        for name, member in groups.items()
    }


def numbers_of(result) -> dict:
    """The metrics of an evaluation over all users, without what else it returns."""
    return {name: value for name, value in result.items() if "@" in name}


def summary(result) -> dict:
    """What metrics.json keeps of a test evaluation: numbers only."""
    return {
        "test": numbers_of(result),
        "test_masked": result["masked"],
        "groups": result["groups"],
        "groups_masked": result["groups_masked"],
        "users": result["users"],
    }


@torch.no_grad()
def examples(model, dataset, cfg, device, users=8, seed=0, drawn=None) -> list:
    """What some test users, drawn at random, got; drawn: the numbers of others.

    -> [{"history": item ids, the oldest first, "target": id, "rank": 0 = best, "top": the five
    items ranked first}]
    """
    rows = dataset.evaluated_rows("test", cfg.max_len, device)
    if drawn is None:
        drawn = np.random.default_rng(seed).permutation(len(rows))[:users]
    drawn = np.array(drawn)
    index = torch.as_tensor(drawn, device=device)
    batch = rows.batch(index, int(rows.lengths[drawn].max()))
    target = rows.flat[rows.end[index]]
    inputs = {"user": batch["user"], "seq": batch["seq"]}
    with ranking(model):
        scores = model.score(inputs, model.encode_items()).float()
    ranks = rank_of_target(scores, target)
    top = scores[:, 1:].topk(min(5, dataset.n_items)).indices + 1    # column 0 is padding
    return [
        {"history": [i for i in seq if i], "target": answer, "rank": rank, "top": first}
        for seq, answer, rank, first in zip(
            batch["seq"].tolist(), target.tolist(), ranks.tolist(), top.tolist()
        )
    ]


# ---------------- what is printed

PLAIN = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")    # columns of the table
MASKED = ("recall@10", "ndcg@10")


def table(label, summaries) -> str:
    """The table a run ends with: overall, then by group; mean ± sd of several seeds."""
    width = 11 if len(summaries) == 1 else 17

    def cell(values):
        spread = f" ±{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        return f"{np.mean(values):.4f}{spread}".rjust(width)

    def line(name, users, plain, masked):
        cells = "".join(cell([numbers[column] for numbers in plain]) for column in PLAIN)
        more = "".join(cell([numbers[column] for numbers in masked]) for column in MASKED)
        return f"{name:<24}{users:>8} {cells}  masked{more}"

    head = "".join(column.rjust(width) for column in PLAIN)
    head_masked = "".join(column.rjust(width) for column in MASKED)
    lines = [f"{'':<24}{'users':>8} {head}        {head_masked}"]
    first = summaries[0]
    plain = [summary["test"] for summary in summaries]
    masked = [summary["test_masked"] for summary in summaries]
    lines.append(line(label, first["users"], plain, masked))
    for group in first["groups"]:
        plain = [summary["groups"][group] for summary in summaries]
        masked = [summary["groups_masked"][group] for summary in summaries]
        lines.append(line(f"  {group}", plain[0]["users"], plain, masked))
    return "\n".join(lines)


def demo_scale(dataset, label, result) -> str:
    """Lines that place a run on the demo shop between popularity and its oracle; "" for other data
    and for a run that is not tested.

    All by masked ranking, since nothing is bought twice there. The oracle knows the shop's
    probabilities; its other views see or know less. It is a bound in expectation: on 3,000 users
    chance moves it by +-0.01.
    """
    if not dataset.is_tested or not (dataset.folder / "oracle.npz").is_file():
        return ""
    longest = int(dataset.evaluated_rows("test", 1).history.max())
    rows = dataset.evaluated_rows("test", longest)
    index = torch.arange(len(rows), device=rows.end.device)
    histories = rows.batch(index, int(rows.lengths.max()))["seq"]
    target = rows.flat[rows.end]
    counts = torch.as_tensor(dataset.train_counts, dtype=torch.float, device=target.device)
    by_popularity = rank_of_target(counts.expand(len(rows), -1), target, histories)
    scale = {
        "pop": metrics(by_popularity),
        label: result["test_masked"],
        **demo.reached(dataset.folder, histories.cpu().numpy(), target.cpu().numpy()),
    }
    lines = [f"{'on the scale of the shop':<34}masked  recall@10    ndcg@10"]
    for name, numbers in sorted(scale.items(), key=lambda row: row[1]["ndcg@10"]):
        lines.append(f"  {name:<40}{numbers['recall@10']:>9.4f}{numbers['ndcg@10']:>11.4f}")
    return "\n".join(lines)


# ---------------- finished runs

def main():
    args = arguments()
    folders = args.runs
    if len(folders) > 1:    # runs/* has tables as well
        folders = [folder for folder in folders if not folder.is_file()]
    if args.against:
        if len(folders) > 1:
            raise UserError("--against compares one run with another: give one before it")
        if os.path.realpath(folders[0]) == os.path.realpath(args.against):
            raise UserError(f"--against {args.against} is the run itself: give another")
        page_of_two(folders[0], args.against, args)
        return
    if len(folders) > 1:
        for name in ("data", "device"):
            if getattr(args, name):
                print(f"note: --{name} is not used: a table is made of what the runs have kept")
        table_of_runs(folders, args.out)
        return
    run = open_run(folders[0], args.device, args.data)
    if not run.dataset.is_tested:
        raise UserError(
            f"{run.folder} was trained on everything (--split none): nobody is left to be tested"
        )
    result = evaluate(run.model(), run.dataset, run.cfg, "test", run.device)
    print(table(run.folder.resolve().name, [summary(result)]))


def table_of_runs(folders, out=None):
    """Print, and perhaps write, the table of several finished runs."""
    found = comparison.compare(comparison.rows_of(folders))
    print(comparison.markdown(found))
    if len(found) > 1:
        print(f"\n{comparison.NOTE}")
    if out:
        comparison.write(out, found)
        print(f"\nthe table is {out}.md, its numbers {out}.json")


def page_of_two(folder, other, args):
    """Write a page beside a run: its difference to another, and users where they differ most."""
    rows = comparison.rows_of([folder, other])
    pair = [run for runs in rows.values() for run in runs]
    results = [read_metrics(path, TESTED, "train it again") for path in (folder, other)]
    difference = comparison.difference(pair[:1], pair[1:])
    ranks = [run.ranks() for run in pair]
    gap = np.log2(ranks[1] + 1.) - np.log2(ranks[0] + 1.)    # how many times better the first is
    order = np.argsort(-gap, kind="stable")
    names = [path.resolve().name for path in (folder, other)]
    if names[0] == names[1]:
        names = [str(folder), str(other)]
    better, worse = order[gap[order] > 0], order[gap[order] < 0][::-1]
    chosen = {
        f"where {name} is better": numbers[:SHOWN]
        for name, numbers in zip(names, (better, worse)) if len(numbers)
    }
    tops = []
    for path in (folder, other):
        opened = open_run(path, args.device, args.data)
        of_run = opened.model(), opened.dataset, opened.cfg, opened.device
        tops.append({
            heading: examples(*of_run, drawn=drawn) for heading, drawn in chosen.items()
        })
    users = {
        heading: [
            {**one, "ranks": [one["rank"], two["rank"]], "tops": [one["top"], two["top"]]}
            for one, two in zip(tops[0][heading], tops[1][heading])
        ]
        for heading in chosen
    }
    path = folder / f"against-{names[1].replace('/', '-')}.html"
    report.write_comparison(
        path, names, opened.dataset, results, difference, users
    )
    print(f"NDCG@10 of {names[0]} minus {names[1]}: {difference['difference']:+.4f}, 95 % interval "
          f"{difference['low']:+.4f} to {difference['high']:+.4f}, p {difference['p']:.4f}; the "
          f"page is {path}")


def arguments():
    parser = argparse.ArgumentParser(
        description="Evaluate a finished run; of several, make one table.", allow_abbrev=False
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder, such as runs/mdsrec-demo-0")
    add("--data", help="where the data of one run is now (default: where it was in training)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--against", type=Path, metavar="RUN", help="write a page on one run against another")
    add("--out", type=Path, help="write the table of several runs as OUT.md and OUT.json")
    args = parser.parse_args()
    if args.out is not None and (not args.out.name or args.against or len(args.runs) == 1):
        raise UserError("--out names the table of several runs: give their folders")
    return args


if __name__ == "__main__":
    command(main)
