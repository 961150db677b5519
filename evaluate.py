"""Ranks -> metrics. Full ranking over all items, ties against the target, column 0 (padding) never ranked.

    python evaluate.py runs/mdsrec-demo-0                     the same numbers as the training run printed
    python evaluate.py runs/mdsrec-demo-0 runs/sasrec-demo-0  and the paired difference between two runs

One target per user, so Recall@K = HR@K. Every number exists twice: over all items, and `masked`, where the items of
the user's own history are left out of the ranking (the target itself never is).
"""
import argparse
import base64
import contextlib
import html
import io
import json
import math
from pathlib import Path

import numpy as np
import torch

from data import COLD
from sources import demo
from sources.common import UserError, atomic, command
from sources.pictures import BadPicture, open_picture

KS = (5, 10, 20, 50)
HISTORY = ((1, 4), (5, 9), (10, 19), (20, None))          # groups of history length


def _beats(scores, target):
    """(B, N+1) bool: which other items score at least as high as the target. Raises ValueError on NaN or inf."""
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).any(1).nonzero()[0])
        raise ValueError(f"scores of row {row} are not finite, and a NaN would rank by accident")
    beats = scores >= scores.gather(1, target[:, None])
    beats[:, 0] = False
    return beats.scatter_(1, target[:, None], False)


def rank_of_target(scores, target, seen=None) -> torch.Tensor:
    """Rank of each row's target among all items: (B,) int64, 0 = best. Every tie counts against the target.

    scores: (B, N+1) finite, column j = item j; column 0 is padding and is never counted. target: (B,) int64 in 1..N.
    seen: (B, M) int64 ids to leave out of the ranking, 0 = none, repeats allowed; the target itself is never left out.
    Raises ValueError for a score that is not finite.
    """
    beats = _beats(scores, target)
    return beats.sum(1) if seen is None else beats.scatter_(1, seen, False).sum(1)


def metrics(ranks, ks=KS) -> dict:
    """{"recall@k", "ndcg@k", "mrr@k"} as float64 means over users; one relevant item each (so HR@k = recall@k).

    ranks: (U,) int, 0 = best. NDCG@k = 1 / log2(rank + 2) and MRR@k = 1 / (rank + 1) inside the first k, else 0.
    Raises ValueError for no ranks at all: nothing has no mean.
    """
    ranks = np.asarray(ranks.cpu() if isinstance(ranks, torch.Tensor) else ranks, np.float64)
    if not len(ranks):
        raise ValueError("there are no ranks to average")
    out = {}
    for k in ks:
        hit = ranks < k
        for name, gain in (("recall", hit), ("ndcg", hit / np.log2(ranks + 2)), ("mrr", hit / (ranks + 1))):
            out[f"{name}@{k}"] = float(gain.mean())
    return out


@torch.no_grad()
def ranks_of(model, rows, device, budget=None):
    """Ranks of every row's target, plain and with the history masked: two (rows,) int64 arrays in the order of `rows`.

    rows: `Data.evaluated_rows`. budget: how many scores are held at once (default: 2^22 on the CPU, 2^26 elsewhere);
    the table of items is made once, users are scored sorted by length, trimmed, in chunks of at most budget / n_items.
    Matrix products are in true float32.
    """
    training, precision = model.training, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model.eval()
    table = model.encode_items()
    plain, masked = (torch.empty(len(rows), dtype=torch.long, device=device) for _ in range(2))
    order = np.argsort(rows.lengths, kind="stable")
    on_device = torch.as_tensor(order, device=device)
    leaf = next(iter(table.values())) if isinstance(table, dict) else table[0] if isinstance(table, tuple) else table
    size = (budget or (2 ** 22 if torch.device(device).type == "cpu" else 2 ** 26)) // len(leaf)
    size = min(max(size, 1), 2048)       # in a small catalog too, rows of different lengths are kept apart
    for first in range(0, len(rows), size):
        chunk = order[first:first + size]
        index = on_device[first:first + size]
        batch = rows.batch(index, int(rows.lengths[chunk].max()))
        target = rows.flat[rows.end[index]]
        beats = _beats(model.score({"user": batch["user"], "seq": batch["seq"]}, table).float(), target)
        plain[index] = beats.sum(1)
        masked[index] = beats.scatter_(1, rows.seen(index, int(rows.history[chunk].max())), False).sum(1)
    model.train(training)
    torch.set_float32_matmul_precision(precision)
    return plain.cpu().numpy(), masked.cpu().numpy()


def evaluate(model, data, cfg, split, device) -> dict:
    """Full-ranking evaluation of one split ("valid" or "test").

    Returns the metrics over all evaluated users, and under "masked" the same with histories masked, "groups" and
    "groups_masked" (name -> {"users": n, metrics}), "users" (how many), "ranks", "ranks_masked" (users,) int64 arrays.
    Groups: cold (fewer than 10 training occurrences of the target) and warm, length of the input history, target with
    and without text and picture. model: the contract's encode_items and score. cfg: needs max_len.
    Raises UserError for scores that are not finite.
    """
    rows = data.evaluated_rows(split, cfg.max_len, device)
    try:
        plain, masked = ranks_of(model, rows, device)
    except ValueError as e:
        raise UserError(f"the {split} evaluation stopped, {e}: look at the features, or train with a lower --lr") from None
    target = data.flat[data.targets[split][rows.users]]
    groups = {name: member for name, member in _groups(data, rows, target) if member.any()}
    by_group = lambda ranks: {g: {"users": int(m.sum())} | metrics(ranks[m]) for g, m in groups.items()}
    return metrics(plain) | {"masked": metrics(masked), "groups": by_group(plain), "groups_masked": by_group(masked),
                             "users": len(rows), "ranks": plain, "ranks_masked": masked}


def _groups(data, rows, target):
    """(name, (rows,) bool) of each group."""
    cold = data.train_counts[target] < COLD
    yield "cold", cold
    yield "warm", ~cold
    for low, high in HISTORY:
        yield f"history {low}-{high}" if high else f"history {low}+", \
            (rows.history >= low) & (rows.history <= (high or math.inf))
    for modality in ("text", "image"):
        has = data.has[modality][target]
        yield f"with {modality}", has
        yield f"without {modality}", ~has


def summary(result) -> dict:
    """What metrics.json keeps of a test evaluation: numbers only, by the names `test`, `test_masked`, `groups`, ..."""
    return {"test": {k: v for k, v in result.items() if "@" in k}, "test_masked": result["masked"],
            "groups": result["groups"], "groups_masked": result["groups_masked"], "users": result["users"]}


def table(label, summaries) -> str:
    """The table a run ends with: overall, then by group, plain and masked; mean ± sd where there are several seeds."""
    plain, masked = ("recall@10", "ndcg@10", "recall@50", "ndcg@50"), ("recall@10", "ndcg@10")
    width = 11 if len(summaries) == 1 else 17

    def cell(values):
        spread = f" ±{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        return f"{np.mean(values):.4f}{spread}".rjust(width)

    def line(name, users, numbers, numbers_masked):
        return (f"{name:<24}{users:>8} " + "".join(cell([n[c] for n in numbers]) for c in plain) + "  masked" +
                "".join(cell([n[c] for n in numbers_masked]) for c in masked))

    first = summaries[0]
    head = f"{'':<24}{'users':>8} " + "".join(c.rjust(width) for c in plain) + " " * 8 + \
        "".join(c.rjust(width) for c in masked)
    lines = [line(label, first["users"], [s["test"] for s in summaries], [s["test_masked"] for s in summaries])]
    lines += [line(f"  {g}", first["groups"][g]["users"], [s["groups"][g] for s in summaries],
                   [s["groups_masked"][g] for s in summaries]) for g in first["groups"]]
    return "\n".join([head, *lines])


def demo_scale(data, label, result) -> str:
    """Lines that place a run on the demo shop between popularity and what its oracle reaches; "" for other data.

    All by masked ranking, since nothing is bought twice there. The oracle knows the shop's probabilities; a view is an
    oracle that cannot see pictures, or texts. It is a bound in expectation: on 3,000 users chance moves it by +-0.01.
    """
    if not (data.folder / "oracle.npz").is_file():
        return ""
    rows = data.evaluated_rows("test", int(data.evaluated_rows("test", 1).history.max()))
    histories = rows.batch(torch.arange(len(rows), device=rows.end.device), int(rows.lengths.max()))["seq"]
    target = rows.flat[rows.end]
    counts = torch.as_tensor(data.train_counts, dtype=torch.float, device=target.device).expand(len(rows), -1)
    scale = {"pop": metrics(rank_of_target(counts, target, histories)), label: result["test_masked"]}
    with np.load(data.folder / "oracle.npz", allow_pickle=False) as arrays:
        views = demo.ceiling(dict(arrays), histories.cpu().numpy(), target.cpu().numpy())
    scale |= {"oracle" if view == "full" else f"oracle {view}": m["realised"] for view, m in views.items()}
    return "\n".join([f"{'on the scale of the shop':<34}masked  recall@10    ndcg@10"] + [
        f"  {name:<40}{m['recall@10']:>9.4f}{m['ndcg@10']:>11.4f}"
        for name, m in sorted(scale.items(), key=lambda row: row[1]["ndcg@10"])])


def report(run, label, model, data, cfg, result, device, users=8, seed=0):
    """Write `run/report.html`: the numbers, the curves of the training, and what a few random test users got.

    result: what metrics.json holds. One file without scripts or links; titles are escaped, pictures are drawn anew.
    """
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
    cells = lambda numbers: "".join(f"<td>{numbers[name]:.4f}" for name in names)
    rows = [("all", result["users"], result["test"], result["test_masked"])]
    rows += [(g, n["users"], n, result["groups_masked"][g]) for g, n in result["groups"].items()]
    table = "".join(f"<tr><th>{html.escape(name)}<td>{n}{cells(plain)}{cells(masked)}" for name, n, plain, masked in rows)
    curves = [_curve(f"{stage}: {term}", [line["losses"][term] for line in log if line["stage"] == stage])
              for stage in dict.fromkeys(line["stage"] for line in log)
              for term in next(line["losses"] for line in log if line["stage"] == stage)]
    curves += [_curve("validation ndcg@10", [line["valid"]["ndcg@10"] for line in log if "valid" in line])]
    page = f"""<!doctype html><meta charset="utf-8"><title>{html.escape(label)}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child {{ text-align: left; font-weight: normal; white-space: nowrap }} thead th {{ font-weight: bold }}
svg {{ background: #f6f6f4; margin: .4em; border-radius: 4px }} polyline {{ fill: none; stroke: #2a62b8; stroke-width: 2 }}
figure {{ display: inline-block; width: 76px; margin: .3em .2em; vertical-align: top; font-size: 10px; line-height: 1.25 }}
figure img, figure span {{ display: block; width: 76px; height: 76px; object-fit: contain; background: #f6f6f4 }}
.hit {{ outline: 3px solid #3a9a4a }} h3 {{ margin: .6em 0 0; font-size: 13px }}
section {{ display: flex; flex-wrap: wrap; gap: 0 1.2em; border-bottom: 1px solid #ddd }}
</style><h1>{html.escape(label)}</h1>
<p>Best epoch {result['best_epoch']} of {result['epochs']}, {result['seconds']:.0f} s on {html.escape(result['device'])},
{result['parameters']} weights. Test metrics, full ranking over {data.n_items} items; masked: without the user's history.</p>
<table><thead><tr><th><th>users{''.join(f'<th>{n}' for n in names)}{''.join(f'<th>masked {n}' for n in names)}</thead>{table}
</table><h2>Training</h2>{''.join(curves)}<h2>{users} test users, drawn at random</h2>
{''.join(_examples(model, data, cfg, device, users, seed))}"""
    with atomic(run / "report.html") as f:
        f.write(page)


def _curve(title, values, width=250, height=120):
    """A line of numbers as a small SVG picture."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return ""
    low, high = min(values), max(values)
    points = " ".join(f"{12 + i * (width - 24) / max(len(values) - 1, 1):.1f},"
                      f"{height - 22 - (v - low) / ((high - low) or 1) * (height - 54):.1f}" for i, v in enumerate(values))
    return (f'<svg width="{width}" height="{height}"><text x="12" y="18" font-size="12">{html.escape(title)}</text>'
            f'<polyline points="{points}"/><text x="12" y="{height - 6}" font-size="10">{len(values)} epochs, from '
            f'{values[0]:.4g} to {values[-1]:.4g}</text></svg>')


@torch.no_grad()
def _examples(model, data, cfg, device, users, seed):
    """For some test users: the end of the history, the next item and its rank, the five items ranked first."""
    rows = data.evaluated_rows("test", cfg.max_len, device)
    index = torch.as_tensor(np.random.default_rng(seed).permutation(len(rows))[:users], device=device)
    batch = rows.batch(index, int(rows.lengths[index.cpu()].max()))
    target = rows.flat[rows.end[index]]
    scores = model.eval().score({"user": batch["user"], "seq": batch["seq"]}, model.encode_items()).float()
    ranks = rank_of_target(scores, target).tolist()
    first = scores[:, 1:].topk(min(5, data.n_items)).indices + 1                 # padding is no item
    for seq, answer, rank, top in zip(batch["seq"].tolist(), target.tolist(), ranks, first.tolist()):
        parts = (("the last of the history", [item for item in seq if item][-6:]), (f"then: rank {rank + 1}", [answer]),
                 ("ranked first", top))
        figures = lambda name, ids: "".join(_figure(data, i, name == "ranked first" and i == answer) for i in ids)
        yield f"<section>{''.join(f'<div><h3>{name}</h3>{figures(name, ids)}</div>' for name, ids in parts)}</section>"


def _figure(data, item, hit=False):
    row = data.items[item]
    picture, path = "<span></span>", data.image_path(row)
    if path:
        with contextlib.suppress(BadPicture):
            image, buffer = open_picture(path), io.BytesIO()
            image.thumbnail((168, 168))
            image.save(buffer, "JPEG", quality=80)
            picture = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    caption = html.escape((row["title"] or row["key"])[:70])
    return f'<figure{" class=hit" if hit else ""}>{picture}<figcaption>{caption}</figcaption></figure>'


def paired(a, b, k=10, draws=10_000, seed=0) -> dict:
    """Paired bootstrap over users of the difference in NDCG@k between two runs' ranks: {"difference", "low", "high"}.

    a, b: (U,) ranks of the same users in the same order; low and high bound the 95 % interval. Raises ValueError.
    """
    if len(a) != len(b):
        raise ValueError(f"the runs rank {len(a)} and {len(b)} users: only runs on the same data set can be compared")
    gain = lambda r: np.where(np.asarray(r) < k, 1 / np.log2(np.asarray(r, float) + 2), 0)
    difference, rng = gain(a) - gain(b), np.random.default_rng(seed)
    means = np.array([difference[rng.integers(0, len(a), len(a))].mean() for _ in range(draws)])
    return {"difference": difference.mean(), "low": np.quantile(means, .025), "high": np.quantile(means, .975)}


def main():
    from train import open_run           # train imports this file; a script may import both
    parser = argparse.ArgumentParser(description="Evaluate a finished run; with two runs, compare them.",
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, such as runs/mdsrec-demo-0")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    args = parser.parse_args()
    if len(args.runs) > 2:
        raise UserError("give one run folder to evaluate, or two to compare")
    ranks = []
    for run in args.runs:
        model, data, cfg, device = open_run(Path(run), args.device)
        result = evaluate(model, data, cfg, "test", device)
        print(table(Path(run).resolve().name, [summary(result)]))
        ranks.append(((data.about["sequences_sha256"], data.split), result["ranks"]))
    if len(ranks) == 2:
        if ranks[0][0] != ranks[1][0]:
            raise UserError(f"{args.runs[0]} and {args.runs[1]} are runs on different data or splits")
        d = paired(ranks[0][1], ranks[1][1])
        print(f"\nNDCG@10 of the first minus the second: {d['difference']:+.4f}, "
              f"95 % interval {d['low']:+.4f} to {d['high']:+.4f} (paired bootstrap over users)")


if __name__ == "__main__":
    command(main)
