"""A finished run -> recommendations.

    python recommend.py runs/mdsrec-demo-0 --user demo-user-0001              one user
    python recommend.py runs/mdsrec-demo-0 --history demo-0003,demo-0717      somebody new
    python recommend.py runs/mdsrec-demo-0 --all --out top.csv                everybody
    python recommend.py runs/mdsrec-demo-0 --export vectors                   for a vector index

A user's whole history is read, what was held out for validation and test too; what a user has is
left out of the list unless --keep_history. Users are scored in parts, of which only a bounded block
of scores is held at a time.
"""
import argparse
import contextlib
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common.features import KEYS
from common.files import (
    UserError,
    alone_in,
    atomic,
    command,
    filled,
    read_text,
    save_tensors,
    set_aside,
    write_json,
)
from common.progress import Bar
from data import Rows
from evaluate import chunk_size, in_chunks, ranking, rows_in, scores_of
from loop.new_items import model_of_more
from loop.report import write_recommendations
from loop.runs import RAW, open_run
from loop.settings import check_counts

BLOCK = 65536    # users whose lists are held before they are written


# ---------------- the best items

@dataclass
class Ranker:
    """A model that is ready to recommend from a catalog."""
    model: torch.nn.Module
    table: object        # of model.encode_items()
    max_len: int
    device: torch.device
    keep_history: bool = False


def best_items(ranker, rows, k):
    """The k best items of every row, the best first: ids (R, k) int64, and their scores (R, k).

    rows: `Rows` whose inputs are whole histories. Where there are fewer than k items to choose
    from, ids are 0 and scores -inf at the end. Raises UserError for scores that are not finite.
    """
    k = min(k, rows_in(ranker.table) - 1)
    ids = np.zeros((len(rows), k), np.int64)
    scores = np.zeros((len(rows), k), np.float32)
    size = chunk_size(ranker.table, ranker.device)
    for chunk, index, inputs in in_chunks(rows, size, ranker.device):
        seen = None
        if not ranker.keep_history:
            seen = rows.seen(index, int(rows.history[chunk].max()))
        values, best = best_of_chunk(ranker, inputs, seen, k)
        ids[chunk] = best.cpu().numpy()
        scores[chunk] = values.cpu().numpy()
    ids[np.isneginf(scores)] = 0
    return ids, scores


@torch.no_grad()
def best_of_chunk(ranker, inputs, seen, k):
    """Scores and ids (B, k) of rows that are scored at once. seen: (B, M) ids to leave out."""
    scores = scores_of(ranker.model, inputs, ranker.table)
    if scores.stride(0) == 0:    # one row for all users
        scores = scores.clone()
    scores[:, 0] = -torch.inf    # padding is no item
    if seen is not None:
        scores.scatter_(1, seen, -torch.inf)
    best = scores.topk(k)
    if best.values.isnan().any() or best.values.isposinf().any():    # they are the largest
        raise UserError(
            "the model's scores are not finite: look at the features, or train with a lower --lr"
        )
    return best


# ---------------- whose histories

def rows_of_users(dataset, users, max_len, device):
    """Rows of users (numbers) of a data set, whose inputs are their whole histories."""
    return Rows(dataset, users, dataset.offsets[users + 1], max_len, device, "whole")


def rows_of_history(history, max_len, device):
    """One row of somebody whom the model never saw. history: item ids, the oldest first."""
    flat = np.array(history, np.int64)
    somebody = SimpleNamespace(flat=flat, offsets=np.array([0, len(flat)]))
    return rows_of_users(somebody, np.array([0]), max_len, device)


def keys_of_users(dataset) -> list:
    """The users' keys in the order of their numbers. Raises UserError."""
    path = dataset.folder / "users.txt"
    keys = read_text(path, "prepare the data again").splitlines()
    if len(keys) != dataset.n_users:
        raise UserError(
            f"{path} has {len(keys)} keys for {dataset.n_users} users: prepare the data again"
        )
    return keys


def number_of_user(dataset, key) -> int:
    """Raises UserError for a key that the data set lacks."""
    keys = keys_of_users(dataset)
    if key not in keys:
        raise UserError(
            f"--user {key} is none of the {len(keys)} users of {dataset.name}, which are called "
            f"{', '.join(keys[:3])}, ...: give one of them, or what somebody new has, as --history"
        )
    return keys.index(key)


def ids_of_items(dataset, text) -> list:
    """Item ids of keys between commas; a key with a comma or a quote is quoted as in a CSV file.

    Raises UserError for no keys, and for keys that the data set lacks.
    """
    lines = csv.reader(text.splitlines(), skipinitialspace=True)
    keys = [key.strip() for line in lines for key in line if key.strip()]
    if not keys:
        raise UserError("--history is empty: give the keys of one item or more, as KEY,KEY")
    numbers = {item["key"]: number for number, item in enumerate(dataset.items)}
    strange = [key for key in keys if key not in numbers]
    if strange:
        known = [item["key"] for item in dataset.items[1:4]]
        quoted = "; a key with a comma stands in quotes" if "," in "".join(known) else ""
        raise UserError(
            f"--history has {len(strange)} of {len(keys)} keys that are no item of "
            f"{dataset.name}: {', '.join(strange[:3])}; its items are called "
            f"{'  '.join(known)} ...{quoted}"
        )
    return [numbers[key] for key in keys]


# ---------------- what is shown

def recommendation(dataset, name, history, ids, scores) -> dict:
    """What --json prints of one user. name: None for somebody new."""
    return {
        "user": name,
        "history": [dataset.items[item]["key"] for item in history],
        "items": [
            {"item": dataset.items[item]["key"], "title": title_of(dataset, item),
             "score": round(float(score), 6)}
            for item, score in zip(ids, scores) if item
        ],
    }


def title_of(dataset, item) -> str:
    about = dataset.items[item]
    return about["title"] or " ".join(about["text"])[:70]


def as_text(dataset, name, history, ids, scores) -> str:
    """The list of one user for a person to read."""
    last = ", ".join(title_of(dataset, item) or dataset.items[item]["key"] for item in history[-3:])
    lines = [f"for {name or 'somebody'}, who has {len(history)} items, lately {last}:"]
    for place, (item, score) in enumerate(zip(ids, scores), start=1):
        if item:
            key, title = dataset.items[item]["key"], title_of(dataset, item)
            lines.append(f"  {place:>3}  {score:>9.4f}  {key}  {title}")
    if len(lines) == 1:
        lines.append("  nothing is left to recommend: --keep_history lists what is there already")
    return "\n".join(lines)


CONTENT = {*sum(KEYS.values(), ()), *RAW.values()}    # catalog keys of texts and pictures


def note_of_unknown(run, history) -> str:
    """A sentence on items of a history that have nothing that the model reads; "" if all have."""
    if not CONTENT & set(run.module.READS):
        return ""
    known = run.dataset.has["text"] | run.dataset.has["image"]
    blank = [
        item for item in history
        if not (known[item] if item < len(known) else title_of(run.dataset, item))
    ]
    if not blank:
        return ""
    keys = ", ".join(run.dataset.items[item]["key"] for item in blank[:3])
    return f"note: {len(blank)} of {len(history)} items have neither text nor picture: {keys}"


# ---------------- everybody

def write_all(path, ranker, dataset, k):
    """Best k items of every user into a CSV file: user, rank from 1, item, score.

    The file is there whole or not at all.
    """
    keys = keys_of_users(dataset)
    items = [item["key"] for item in dataset.items]
    with atomic(path) as file, Bar("users", dataset.n_users) as bar:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("user", "rank", "item", "score"))
        for first in range(0, dataset.n_users, BLOCK):
            users = np.arange(first, min(first + BLOCK, dataset.n_users))
            rows = rows_of_users(dataset, users, ranker.max_len, ranker.device)
            ids, scores = best_items(ranker, rows, k)
            for user, best, values in zip(users, ids.tolist(), scores.tolist()):
                for rank, (item, score) in enumerate(zip(best, values), start=1):
                    if item:
                        writer.writerow((keys[user], rank, items[item], f"{score:.6g}"))
            bar.update(len(users))


# ---------------- vectors for an index

@torch.no_grad()
def export(folder, run, ranker):
    """Write users' and items' vectors whose products rank as the model does.

    items.safetensors and users.safetensors have "vectors" (N, D) and (U, D); items.txt and
    users.txt the keys of their rows; about.json says what they are. The folder is there whole or
    not at all. Raises UserError for a model without `as_product`.
    """
    if not hasattr(ranker.model, "as_product"):
        raise UserError(
            f"{run.settings['model']} has no method as_product, so that its scores are no product "
            f"of two vectors: models/README.md says what it returns"
        )
    dataset = run.dataset
    rows = rows_of_users(dataset, np.arange(dataset.n_users), ranker.max_len, ranker.device)
    of_users = None
    bar = Bar("users", -(-len(rows) // 2048), " parts")
    for chunk, _, inputs in bar.over(in_chunks(rows, 2048, ranker.device)):
        vectors, of_items = ranker.model.as_product(inputs, ranker.table)
        if of_users is None:
            of_users = torch.empty(len(rows), vectors.shape[1])
        of_users[torch.as_tensor(chunk)] = vectors.float().cpu()
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(folder.parent), filled(folder, "about.json") as made:
        write_lines(made / "items.txt", [item["key"] for item in dataset.items[1:]])
        write_lines(made / "users.txt", keys_of_users(dataset))
        save_tensors(made / "items.safetensors", {"vectors": of_items[1:].float().cpu()})
        save_tensors(made / "users.safetensors", {"vectors": of_users})
        write_json(made / "about.json", {
            "run": str(run.folder.resolve()),
            "model": run.settings["model"],
            "users": dataset.n_users,
            "items": len(dataset.items) - 1,
            "width": of_users.shape[1],
            "score": "users @ items.T ranks as the model does; histories are not left out",
        })
        keep_earlier(folder)
        made.rename(folder)


def write_lines(path, lines):
    with atomic(path) as file:
        file.writelines(f"{line}\n" for line in lines)


# ---------------- the command

def arguments():
    parser = argparse.ArgumentParser(
        description="Recommend items with a finished run.", allow_abbrev=False
    )
    add = parser.add_argument
    add("run", type=Path, help="folder that train.py made, such as runs/mdsrec-demo-0")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="key of a user of the data set")
    who.add_argument("--history", help="keys of the items that somebody new has: KEY,KEY,...")
    who.add_argument("--all", action="store_true", help="every user, into the file --out")
    who.add_argument("--export", type=Path, metavar="DIR", help="write vectors for a vector index")
    add("--top", type=int, help="how many items (default: 10)")
    add("--keep_history", action="store_true", help="recommend what a user has, too")
    add("--items", type=Path, help="items.jsonl or items.csv of items that were not trained on")
    add("--out", type=Path, help="CSV file for --all")
    add("--json", action="store_true", help="print JSON")
    add("--html", type=Path, help="also write a page with pictures")
    add("--data", help="where the data is now (default: where it was in training)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    return parser.parse_args()


def check_arguments(args):
    """Raises UserError for flags that do not go together."""
    if args.export is not None:
        given = [name for name in ("top", "keep_history") if getattr(args, name)]
        for name in given:
            print(f"note: --{name} is not used: --export writes vectors of all users and items",
                  file=sys.stderr)
        if not args.export.name or args.export.is_file():
            raise UserError(f"--export {args.export} is no folder: give the name of one")
        if args.export.is_dir() and not (args.export / "about.json").is_file() and any(
                args.export.iterdir()):
            raise UserError(f"--export {args.export} has other files: give a new folder")
    args.top = 10 if args.top is None else args.top
    check_counts(args, "top")
    for name in ("out", "html"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.name):
            raise UserError(f"--{name} {path} is a folder: give the name of a file")
        if path is not None and path.exists() and not path.is_file():
            raise UserError(f"--{name} {path} is a pipe or a device: give the name of a file")
    if args.all and not args.out:
        raise UserError("--all needs a file for the lists: give --out top.csv")
    if args.out and not args.all:
        raise UserError("--out is the file of --all: give --all, or --html for a page")
    one = args.user is not None or args.history is not None
    for name in ("json", "html"):
        if getattr(args, name) and not one:
            raise UserError(f"--{name} shows one user: give --user or --history")


def main():
    args = arguments()
    check_arguments(args)
    with contextlib.redirect_stdout(sys.stderr):    # what is said on the way is no recommendation
        run = open_run(args.run, args.device, args.data)
        model = model_of_more(run, args.items) if args.items else run.model()
    with ranking(model):
        ranker = Ranker(
            model, encoded(model), run.cfg.max_len, run.device, args.keep_history
        )
        if args.export:
            export(args.export, run, ranker)
            print(f"vectors of {run.dataset.n_users} users and {len(run.dataset.items) - 1} items "
                  f"in {args.export}")
        elif args.all:
            keep_earlier(args.out)
            write_all(args.out, ranker, run.dataset, args.top)
            print(f"the best {args.top} items of {run.dataset.n_users} users in {args.out}")
            if args.top > len(run.dataset.items) - 1:
                print(f"note: there are {len(run.dataset.items) - 1} items, less than --top")
        else:
            show_one(args, run, ranker)


def keep_earlier(path):
    """Give a file or folder that is in the way another name, and say so."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if path.exists():
        print(f"an earlier {path} is now {set_aside(path)}", file=sys.stderr)


@torch.no_grad()
def encoded(model):
    return model.encode_items()


def show_one(args, run, ranker):
    """Print, and perhaps draw, the list of one user."""
    dataset = run.dataset
    if args.user is not None:
        user = number_of_user(dataset, args.user)
        history = dataset.flat[dataset.offsets[user]:dataset.offsets[user + 1]].tolist()
    else:
        history = ids_of_items(dataset, args.history)
    note = note_of_unknown(run, history)
    if note:
        print(note, file=sys.stderr)
    rows = rows_of_history(history, ranker.max_len, ranker.device)
    (ids,), (scores,) = best_items(ranker, rows, args.top)
    if args.json:
        found = recommendation(dataset, args.user, history, ids.tolist(), scores.tolist())
        print(in_json(found))
    else:
        print(as_text(dataset, args.user, history, ids.tolist(), scores.tolist()))
    if args.html:
        keep_earlier(args.html)
        people = [(args.user or "somebody new", history, ids[ids > 0].tolist())]
        write_recommendations(args.html, run.settings["model"], dataset, people)
        print(f"the page is {args.html}", file=sys.stderr)


def in_json(found) -> str:
    """As JSON; its letters as \\u00e9 and the like where the output cannot hold them all."""
    holds_all = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(found, ensure_ascii=not holds_all, indent=1)


if __name__ == "__main__":
    command(main)
