"""The processed folder -> items, histories, split and batches. `python data.py NAME_OR_FOLDER` prints its statistics.

Everything is a few integer tensors: all users' items in one flat row, and for each training row or evaluated user the
place where its input begins and ends. A batch is then an index: no Python per row, no copy to the device in the loop.

Split (leave-one-out): a user's last item is the test target, the one before it the validation target; the test input
includes the validation item. Users with fewer than 3 items are trained on and never evaluated. `temporal`: one cut in
time for all users at 80 % and 90 % of the interactions; the targets are each user's first item after a cut.
"""
import argparse
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from sources import BY, NAMES, pictures, prepare
from sources.common import UserError, command, feature_path, keys_sha256, load_tensors, read_json

COLD = 10                                # an item with fewer training occurrences is cold
WINDOW = 32                              # rows are shuffled, then sorted by length inside windows of so many batches


@dataclass(eq=False)
class Data:
    """One data set. User u's items are `flat[offsets[u]:offsets[u + 1]]`, oldest first; ids are 1..n_items, 0 is padding."""
    folder: Path
    about: dict                          # source.json
    flat: np.ndarray                     # (n_interactions,) int64 item ids
    offsets: np.ndarray                  # (n_users + 1,) int64
    times: np.ndarray                    # (n_interactions,) int64
    n_items: int
    split: str
    train_share: float = 1.0             # share of the users whose training parts are used; all users are evaluated
    train_end: np.ndarray = field(init=False)   # (n_users,) where each user's training part ends in `flat`
    targets: dict = field(init=False)           # "valid", "test" -> (n_users,) place of the target in `flat`, -1 = none

    def __post_init__(self):
        self.train_end, valid, test = SPLITS[self.split](self)
        self.targets = {"valid": valid, "test": test}
        if self.train_share < 1:         # the same users for every model and seed
            others = np.random.default_rng(0).permutation(self.n_users)[max(1, round(self.n_users * self.train_share)):]
            self.train_end[others] = self.offsets[others]
        self.rows = {}                   # evaluated rows already on a device

    @property
    def name(self):
        return self.about["name"]

    @property
    def n_users(self):
        return len(self.offsets) - 1

    @cached_property
    def items(self) -> list:
        """Rows of items.jsonl; items[0] stands for the padding id."""
        with open(self.folder / "items.jsonl", encoding="utf-8") as f:
            rows = [{"key": "", "title": "", "text": [], "language": "", "images": []}, *map(json.loads, f)]
        if len(rows) != self.n_items + 1 or keys_sha256([r["key"] for r in rows[1:]]) != self.about["items_sha256"]:
            raise UserError(f"{self.folder / 'items.jsonl'} was changed after the data was prepared: remove the folder "
                            f"{self.folder} and run the same command again")
        return rows

    @cached_property
    def train_seqs(self) -> list:
        """The training part of every user's items, oldest first: lists of ids."""
        return [self.flat[a:b].tolist() for a, b in zip(self.offsets, self.train_end)]

    @property
    def in_train(self) -> np.ndarray:
        """(n_interactions,) bool: which places of `flat` belong to a training part."""
        return np.arange(len(self.flat)) < np.repeat(self.train_end, np.diff(self.offsets))

    @cached_property
    def train_counts(self) -> np.ndarray:
        """(n_items + 1,) occurrences in the training parts."""
        return np.bincount(self.flat[self.in_train], minlength=self.n_items + 1)

    @cached_property
    def has(self) -> dict:
        """{"text", "image"}: (n_items + 1,) bool, which items have a text or a picture on disk.

        Where features came with the data, which items have such features.
        """
        present = {"text": np.array([bool(i["title"] or i["text"]) for i in self.items]),
                   "image": np.array([bool(self.image_paths(i)) for i in self.items])}
        for modality, encoder in self.about["features"].items():
            tensors, _ = load_tensors(feature_path(self.folder, modality, encoder))
            present[modality] = tensors["index"].numpy().any(1)
        return present

    @property
    def texts(self) -> list:
        """All the words of each item: title, then sentences, joined by a full stop; texts[0] is ""."""
        return [". ".join(filter(None, [i["title"], *i["text"]])) for i in self.items]

    def catalog(self, reads) -> dict:
        """The catalog keys that need no encoder, as far as a model reads them (its READS)."""
        items, languages = self.items, sorted({i["language"] for i in self.items[1:]})
        makers = {
            "has_text": lambda: torch.from_numpy(self.has["text"]),
            "has_image": lambda: torch.from_numpy(self.has["image"]),
            "lang": lambda: torch.tensor([0, *(1 + languages.index(i["language"]) for i in items[1:])]),
            "train_seqs": lambda: self.train_seqs,
            "titles": lambda: self.texts,
            "image_paths": lambda: [self.image_path(i) for i in items],
        }
        return {"n_items": self.n_items} | {key: make() for key, make in makers.items() if key in reads}

    @cached_property
    def fetched(self) -> dict:
        """Address of a picture -> its path, for those that were fetched."""
        return pictures.fetched(self.folder / self.about["pictures"])

    def image_paths(self, item) -> list:
        """Paths of an item's pictures that are on disk; a folder of frames is one picture. item: a row of `items`."""
        root = self.folder / self.about["image_root"]
        paths = [self.fetched.get(p) if "://" in p else root / p for p in item["images"]]
        return [str(p) for p in paths if p and p.exists()]

    def fetch_pictures(self):
        """Fetch what the items have as addresses only; what is there, or was refused before, is not asked for again."""
        wanted = [(i["key"], urls) for i in self.items[1:] if (urls := [p for p in i["images"] if "://" in p])]
        if wanted:
            counts = pictures.fetch(wanted, self.folder / self.about["pictures"], self.about["picture_hosts"])
            print(f"pictures of {self.name}: " + ", ".join(f"{k} {n}" for k, n in counts.items() if n), flush=True)
            for cached in ("fetched", "has"):
                self.__dict__.pop(cached, None)

    def image_path(self, item):
        """Path of an item's first picture that is on disk and is one file, else None."""
        return next(filter(os.path.isfile, self.image_paths(item)), None)

    def training_rows(self, kind, max_len, device="cpu") -> "Rows":
        """kind "sequences": one row per user, a target after every item; "prefixes": one row per prefix, one target."""
        begin, end = self.offsets[:-1], self.train_end - 1         # the last training item is a target only
        users = np.flatnonzero(end > begin)
        if kind == "prefixes":
            lengths = (end - begin)[users]
            ends = np.repeat(begin[users], lengths) + 1 + _counters(lengths)
            return Rows(self, np.repeat(users, lengths), ends, max_len, device, kind)
        return Rows(self, users, end[users], max_len, device, kind)

    def evaluated_rows(self, split, max_len, device="cpu") -> "Rows":
        """One row per user with a target in `split` ("valid" or "test"); the input is everything before the target."""
        key = (split, max_len, str(device))
        if key not in self.rows:
            users = np.flatnonzero(self.targets[split] >= 0)
            self.rows[key] = Rows(self, users, self.targets[split][users], max_len, device, "evaluated")
        return self.rows[key]


class Rows:
    """Rows of a data set on a device. Row r reads `flat[start[r]:end[r]]`; its last target is `flat[end[r]]`."""

    def __init__(self, data, users, ends, max_len, device, kind):
        starts = np.maximum(data.offsets[users], ends - max_len)
        self.kind, self.lengths, self.users = kind, ends - starts, users
        place = lambda x: torch.as_tensor(x, dtype=torch.long, device=device)
        self.user, self.start, self.end = place(users), place(starts), place(ends)
        self.first = place(data.offsets[users])                    # where the whole history begins
        self.history = ends - data.offsets[users]                  # (rows,) its length, uncut
        self.flat = place(data.flat)

    def __len__(self):
        return len(self.lengths)

    def batch(self, index, length) -> dict:
        """{"user": (B,), "seq": (B, length) left-padded, "target": (B, length) the item after each}, int64 on the device.

        index: (B,) row numbers on the device. length: longest of these rows.
        """
        place = self.end[index, None] - length + torch.arange(length, device=index.device)
        real = place >= self.start[index, None]
        place = place.clamp(min=0)
        return {"user": self.user[index], "seq": torch.where(real, self.flat[place], 0),
                "target": torch.where(real, self.flat[place + 1], 0)}

    def seen(self, index, length) -> torch.Tensor:
        """(B, length) every item of the rows' uncut histories, 0 = none."""
        place = self.end[index, None] - length + torch.arange(length, device=index.device)
        return torch.where(place >= self.first[index, None], self.flat[place.clamp(min=0)], 0)

    def epoch(self, batch_size, rng):
        """Batches of one epoch in random order, rows of similar length together, each trimmed to its longest row.

        For "sequences" the batches have equal numbers of targets, those of `batch_size` rows of mean length, so that
        a target weighs the same in a batch of short rows; else equal numbers of rows. rng: numpy Generator.
        Yields (batch, row numbers on the host).
        """
        weight = self.lengths if self.kind == "sequences" else np.ones(len(self), np.int64)
        order = rng.permutation(len(self))
        windows = [w[np.argsort(self.lengths[w], kind="stable")]
                   for w in np.array_split(order, max(1, len(order) // (WINDOW * batch_size)))]
        # every second window runs backwards, so that a batch across two windows still has similar lengths
        order = np.concatenate([w[::-1] if i % 2 else w for i, w in enumerate(windows)])
        n_batches = max(1, -(-len(order) // batch_size))
        place = np.cumsum(weight[order]) - weight[order]
        cuts = np.searchsorted(place, np.arange(1, n_batches) * (weight.sum() / n_batches))
        batches = [b for b in np.split(np.arange(len(order)), cuts) if len(b)]
        on_device = torch.as_tensor(order, device=self.user.device)
        for b in rng.permutation(len(batches)):
            first, last = batches[b][0], batches[b][-1] + 1
            yield self.batch(on_device[first:last], int(self.lengths[order[first:last]].max())), order[first:last]


def _counters(lengths):
    """[2, 3] -> [0, 1, 0, 1, 2]"""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _leave_one_out(data):
    begin, end = data.offsets[:-1], data.offsets[1:]
    evaluated = end - begin >= 3
    return np.where(evaluated, end - 2, end), np.where(evaluated, end - 2, -1), np.where(evaluated, end - 1, -1)


def _temporal(data):
    if data.about["clock"] == "order":
        raise UserError(f"{data.name} has an order but no times, so it cannot be split at a time: use --split leave_one_out")
    begin, end = data.offsets[:-1], data.offsets[1:]
    user = np.repeat(np.arange(data.n_users), np.diff(data.offsets))
    cuts = [begin + np.bincount(user, data.times < np.quantile(data.times, q), data.n_users).astype(np.int64)
            for q in (.8, .9)]
    valid = np.where((cuts[0] < cuts[1]) & (cuts[0] > begin), cuts[0], -1)
    test = np.where((cuts[1] < end) & (cuts[1] > begin), cuts[1], -1)
    return cuts[0], valid, test


SPLITS = {"leave_one_out": _leave_one_out, "temporal": _temporal}


def training_parts(sets, warm=False) -> Data:
    """The training parts of one or several data sets as one that is nothing but training, for pre-training.

    Item ids of the second set follow those of the first. warm: without the items that are cold in their set. Raises
    UserError where that leaves nothing to learn from.
    """
    flat, lengths, n_items = [], [], 0
    for data in sets:
        keep = data.in_train
        if warm:
            keep &= data.train_counts[data.flat] >= COLD
        flat.append(data.flat[keep] + n_items)
        lengths.append(np.add.reduceat(keep, data.offsets[:-1]))
        n_items += data.n_items
    flat, lengths = np.concatenate(flat), np.concatenate(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
    about = {"name": "+".join(data.name for data in sets)}
    if warm and lengths.max() < 2:
        raise UserError(f"nobody in {about['name']} has two warm items ({COLD} training occurrences or more) to pre-train "
                        f"on: leave --cold_start out")
    joined = Data(sets[0].folder, about, flat, offsets, np.zeros_like(flat), n_items, "leave_one_out")
    joined.train_end, joined.targets = offsets[1:].copy(), {}
    return joined


def widths_of(catalog) -> dict:
    """{key: width} of the features in a catalog."""
    return {key: x.shape[-1] for key, x in catalog.items() if torch.is_tensor(x) and x.is_floating_point()}


def align_widths(catalogs, known=None):
    """Give a modality that a set lacks wholly the feature width of the others, in place. Raises UserError if they differ.

    known: {key: width} for features that no set has.
    """
    for key in widths_of(catalogs[0]):
        widths = {c[key].shape[-1] for c in catalogs if c[key].any()} or {(known or {}).get(key)} - {None}
        if len(widths) > 1:
            raise UserError(f"the features {key} of the data sets differ in width ({', '.join(map(str, sorted(widths)))}): "
                            f"give one --text and one --image encoder for all of them")
        for catalog in catalogs:
            if widths and not catalog[key].any():
                catalog[key] = catalog[key].new_zeros(*catalog[key].shape[:-1], *widths)


def join_catalogs(catalogs, joined) -> dict:
    """Catalogs, of equal feature widths, of the sets that training_parts joined, as one."""
    def below(key, parts):
        if isinstance(parts[0], list):
            return [*parts[0], *(row for part in parts[1:] for row in part[1:])]
        if parts[0].dim() == 3 or key.endswith("_mask"):         # stacks are filled up to the highest
            high = max(part.shape[1] for part in parts)
            parts = [torch.cat([p, p.new_zeros(len(p), high - p.shape[1], *p.shape[2:])], 1) for p in parts]
        return torch.cat([parts[0], *(part[1:] for part in parts[1:])])

    made = {"n_items": joined.n_items, "train_seqs": joined.train_seqs}
    return {key: made[key] if key in made else below(key, [c[key] for c in catalogs]) for key in catalogs[0]}


def load(where, root="data", split="leave_one_out", core=None, mirror=None, by=None, train_share=1.0) -> Data:
    """Known name, folder of raw files or processed folder -> Data; prepares what is not prepared yet. Raises UserError."""
    if not 0 < train_share <= 1:
        raise UserError(f"--train_share {train_share} must be above 0 and at most 1")
    folder = prepare(where, root, core, mirror, by)
    about = read_json(folder / "source.json")
    try:
        with np.load(folder / "sequences.npz", allow_pickle=False) as f:
            flat, offsets, times = (f[k].astype(np.int64) for k in ("items", "offsets", "times"))
        with open(folder / "items.jsonl", "rb") as f:
            n_items = sum(1 for _ in f)
        assert len(flat) == len(times) == offsets[-1] > 0 and offsets[0] == 0 and (np.diff(offsets) > 0).all()
        assert flat.min() >= 1 and flat.max() <= n_items
    except Exception as e:               # a truncated or foreign .npz can raise almost anything
        raise UserError(f"{folder / 'sequences.npz'} cannot be read ({type(e).__name__} {e}): remove the folder "
                        f"{folder} and run the same command again") from None
    return Data(folder, about, flat, offsets, times, n_items, split, train_share)


def statistics(data) -> dict:
    """What a paper's data table prints, as exact integers; shares are given as (part, whole)."""
    lengths, cells = np.diff(data.offsets), data.n_users * data.n_items
    test = data.targets["test"][data.targets["test"] >= 0]
    cold = data.train_counts[data.flat[test]] < COLD
    return {
        "users": data.n_users, "items": data.n_items, "interactions": len(data.flat),
        "items with interactions": len(np.unique(data.flat)),
        "shortest, 25 %, median, 75 %, longest history": np.quantile(lengths, [0, .25, .5, .75, 1], method="lower").tolist(),
        "empty cells of users x items": (cells - len(np.unique(
            np.repeat(np.arange(data.n_users), lengths) * (data.n_items + 1) + data.flat)), cells),
        "items with text": (int(data.has["text"].sum()), data.n_items),
        "items with a picture on disk, or its features": (int(data.has["image"].sum()), data.n_items),
        "items with a picture's address": (sum(any("://" in p for p in i["images"]) for i in data.items), data.n_items),
        "training interactions": int(data.train_counts.sum()),
        "evaluated users (validation, test)": [int((t >= 0).sum()) for t in data.targets.values()],
        f"cold test targets (< {COLD} training occurrences)": (int(cold.sum()), len(test)),
    }


def add_arguments(parser, data="--data"):
    """The flags that say which data: the keyword arguments of `load`, the same in every script."""
    parser.add_argument(data, **({"required": True} if data[0] == "-" else {}), help=f"a folder, or {', '.join(NAMES)}, "
                        f"amazon2018:CATEGORY, amazon2023:CATEGORY")
    parser.add_argument("--split", choices=SPLITS, default="leave_one_out")
    parser.add_argument("--core", type=int, help="k-core on users and items (default: the source's own)")
    parser.add_argument("--by", choices=BY, help="what an item is, where the source has a choice (H&M: article)")
    parser.add_argument("--mirror", help="base URL to download a known data set from")
    parser.add_argument("--train_share", type=float, default=1.0, help="train on this share of the users; all are evaluated")


def load_for(args) -> Data:
    """`load` with what add_arguments brought."""
    return load(args.data, split=args.split, core=args.core, mirror=args.mirror, by=args.by,
                train_share=args.train_share)


def main():
    parser = argparse.ArgumentParser(description="Prepare a data set and print its statistics.", allow_abbrev=False)
    add_arguments(parser, "data")
    data = load_for(parser.parse_args())
    print(f"{data.name} in {data.folder}, from {data.about['from']}")
    for step in data.about["counts"]:
        print(f"  {step['users']:>9} users {step['items']:>9} items {step['interactions']:>10} interactions   "
              f"{step['step']}")
    if known := data.about["published"]:
        print(f"  {known['users']:>9} users {known['items']:>9} items {known['interactions']:>10} interactions   "
              f"as {known['source']} prints them")
    for what, n in data.about["report"].items():
        if n:
            print(f"  {what}: {', '.join(f'{k} {v}' for k, v in n.items() if v) if isinstance(n, dict) else n}")
    print()
    for what, n in statistics(data).items():
        shown = (f"{n[0]} of {n[1]} ({n[0] / n[1]:.2%})" if isinstance(n, tuple) and n[1] else
                 " ".join(map(str, n)) if isinstance(n, (list, tuple)) else n)
        print(f"{what:<52} {shown}")


if __name__ == "__main__":
    command(main)
