"""What a trained MDSRec finds alike and recommends in each modality (Fig. 5 of its paper).

    python docs/case.py runs/mdsrec-demo-0 --user 0

Prints how many neighbours, and how many of the five items ranked first, texts and pictures share,
means over items and over test users; then one test user in full. Ids are those of items.jsonl, the
first line is 1.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.files import UserError, command
from evaluate import ranking
from loop.runs import open_run

USERS = 2000    # at most so many are scored


def shared(a, b):
    """How many ids of a row of a (n, k) the same row of b has too; the mean over rows."""
    return (a[:, :, None] == b[:, None]).any(2).sum(1).double().mean().item()


@torch.no_grad()
def scores_of(model, batch):
    """{"text" and "image": y^m of eq. (21), "both": y of eq. (22)}, each (B, N+1)."""
    with ranking(model):
        table = model.encode_items()
        e_tilde = model.states(batch["seq"], table)[1]
        scores = {m: e_tilde[m][:, -1] @ table[m].T for m in ("text", "image")}
        scores["both"] = model.score(batch, table)
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--user", type=int, default=0, help="number of the test user, from 0 on")
    args = parser.parse_args()
    opened = open_run(args.run)
    model, dataset, cfg, device = opened.model(), opened.dataset, opened.cfg, opened.device
    if not getattr(cfg, "use_mrgc", False):
        raise UserError(f"{args.run} is no run of mdsrec with graphs: there is nothing to compare")
    rows = dataset.evaluated_rows("test", cfg.max_len, device)
    first = min(args.user // USERS * USERS, len(rows) - 1)    # the block of users with this one
    users = torch.arange(first, min(first + USERS, len(rows)), device=device)
    if args.user not in users.tolist():
        raise UserError(f"there is no test user {args.user}: they are 0 to {len(rows) - 1}")
    batch = rows.batch(users, int(rows.lengths[users.cpu()].max()))
    scores = scores_of(model, batch)
    top = {m: y[:, 1:].topk(min(5, dataset.n_items)).indices + 1 for m, y in scores.items()}
    graphs = {m: model.graphs[m][1:, 1:] for m in ("text", "image")}    # without the item itself
    print(f"{shared(graphs['text'], graphs['image']):.2f} of {graphs['text'].shape[1]} neighbours "
          f"of an item are the same in texts and pictures")
    print(f"{shared(top['text'], top['image']):.2f} of the top five of a user are the same")

    row = args.user - first
    item = int(rows.flat[rows.end[args.user]])
    print(f"user {args.user} takes item {item} next: {dataset.items[item]['title']}")
    for m, y in scores.items():
        rank = 1 + int((y[row, 1:] > y[row, item]).sum())
        print(f"  by {m}: its rank is {rank}, the top five are {top[m][row].tolist()}")
    for m, graph in graphs.items():
        print(f"  alike in {m}: {graph[item - 1].tolist()}")


if __name__ == "__main__":
    command(main)
