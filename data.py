"""The processed folder -> items, histories, split and batches.

    python data.py NAME_OR_FOLDER        prepares a data set and prints its statistics

Everything is a few integer tensors: all users' items in one flat row, and for each training row or
evaluated user the place where its input begins and ends. A batch is then an index: no Python per
row, no copy to the device in the loop.

Split (leave-one-out): a user's last item is the test target, the one before it the validation
target; the test input includes the validation item. Other splits, at a time or given with the data,
are in common/splits.py.
"""
import argparse
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from common.features import feature_path, items_with_features
from common.files import (
    UserError,
    arrays_sha256,
    command,
    keys_sha256,
    load_arrays,
    refuse_endless,
)
from common.splits import SPLITS, in_order_of_parts
from common.web import Rules, fetch_pictures, fetched_pictures
from sources import BY, NAMES, prepare, read_about
from sources.notes import notes_of_pictures, notes_of_vectors

COLD = 10      # an item with fewer training occurrences is cold
ARRAYS = ("items", "offsets", "times")    # of sequences.npz
WINDOW = 32    # rows are shuffled, then sorted by length inside windows of so many batches


# ---------------- a data set

@dataclass(eq=False)
class Data:
    """One data set. User u's items are `flat[offsets[u]:offsets[u + 1]]`, oldest first.

    Item ids are 1..n_items; 0 is padding.
    """
    folder: Path
    about: dict                # source.json
    flat: np.ndarray           # (n_interactions,) int64 item ids
    offsets: np.ndarray        # (n_users + 1,) int64
    times: np.ndarray          # (n_interactions,) int64
    n_items: int
    split: str
    train_share: float = 1.0   # share of the users whose training parts are used; all are evaluated
    cut: str = None            # of the temporal split: dates or shares
    parts: np.ndarray = None   # (n_interactions,) 0 train, 1 valid, 2 test, where the data says so
    # (n_users,) where each training part ends in `flat`
    train_end: np.ndarray = field(init=False)
    # "valid", "test" -> (n_users,) place of the target in `flat`, -1 = none
    targets: dict = field(init=False)

    def __post_init__(self):
        if self.split == "files" and self.parts is not None:
            self.flat, self.times, self.parts = in_order_of_parts(
                self.offsets, self.flat, self.times, self.parts
            )
        self.train_end, valid, test = SPLITS[self.split](self)
        self.targets = {"valid": valid, "test": test}
        if self.train_share < 1:    # the same users for every model and seed
            kept = max(1, round(self.n_users * self.train_share))
            others = np.random.default_rng(0).permutation(self.n_users)[kept:]
            self.train_end[others] = self.offsets[others]
        self.evaluated = {}    # evaluated rows that are on a device already
        self.given = {}        # modality -> which items have features, once they are read

    @property
    def name(self):
        return self.about["name"]

    @property
    def n_users(self):
        return len(self.offsets) - 1

    @property
    def is_tested(self) -> bool:
        """Whether anybody is evaluated; not where everything is trained on."""
        return self.split != "none"

    def notes(self, encoders=None) -> list:
        """Sentences on what the user gave and is not used.

        encoders: modality -> what the command line asks for.
        """
        notes = list(self.about.get("notes", ()))
        notes += notes_of_vectors(self.about, encoders or {})
        if self.about["image_root"]:
            root = self.folder / self.about["image_root"]
            found = self.about.get("pictures_in", 0) > 0    # then the source names what it finds
            notes += notes_of_pictures(self.items[1:], root, found)
        if self.parts is not None and self.split not in ("files", "none"):
            notes.append(
                f"the data came as train, valid and test, and is split anew by {self.split}: "
                f"--split files keeps it as it came"
            )
        if self.split == "files":
            for number, split in enumerate(("valid", "test"), 1):
                given = int((self.parts == number).sum())
                idle = given - int((self.targets[split] >= 0).sum())
                if idle:
                    notes.append(
                        f"{idle} of {given} {split} interactions are no targets: a user's first "
                        f"one is, with items before it"
                    )
        return notes

    # ---- items

    @cached_property
    def items(self) -> list:
        """Rows of items.jsonl; items[0] stands for the padding id."""
        path = self.folder / "items.jsonl"
        padding = {"key": "", "title": "", "text": [], "language": "", "images": []}
        try:
            refuse_endless(path)
            with open(path, encoding="utf-8") as file:
                rows = [padding, *map(json.loads, file)]
            check_rows(rows)
            keys = [row["key"] for row in rows[1:]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            keys = []
        if len(keys) != self.n_items or keys_sha256(keys) != self.about["items_sha256"]:
            raise UserError(
                f"{path} was changed after the data was prepared: remove the folder {self.folder} "
                f"and prepare the data again"
            )
        return rows

    @property
    def texts(self) -> list:
        """All the words of each item, title first, joined by full stops; texts[0] is ""."""
        return [". ".join(filter(None, [item["title"], *item["text"]])) for item in self.items]

    @cached_property
    def has(self) -> dict:
        """{"text", "image"}: (n_items + 1,) bool, which items have a text or a picture on disk.

        Where features came with the data, or are read: which items have such features.
        """
        present = {
            "text": np.array([bool(item["title"] or item["text"]) for item in self.items]),
            "image": np.array([bool(self.image_paths(item)) for item in self.items]),
        }
        for modality, encoder in self.about["features"].items():
            path = feature_path(self.folder, modality, encoder)
            present[modality] = items_with_features(path, self.n_items)
        return present | self.given

    def set_has(self, modality, present):
        """Say which items have features: (n_items + 1,) bool."""
        self.given[modality] = present
        self.__dict__.pop("has", None)

    def catalog(self, reads) -> dict:
        """The catalog keys that need no encoder, as far as a model reads them (its READS)."""
        catalog = {"n_items": self.n_items}
        if "has_text" in reads:
            catalog["has_text"] = torch.from_numpy(self.has["text"])
        if "has_image" in reads:
            catalog["has_image"] = torch.from_numpy(self.has["image"])
        if "lang" in reads:
            languages = [item["language"] for item in self.items[1:]]
            numbers = {language: n for n, language in enumerate(sorted(set(languages)), 1)}
            catalog["lang"] = torch.tensor([0] + [numbers[language] for language in languages])
        if "train_seqs" in reads:
            catalog["train_seqs"] = self.train_seqs
        if "titles" in reads:
            catalog["titles"] = self.texts
        if "image_paths" in reads:
            catalog["image_paths"] = [self.image_path(item) for item in self.items]
        return catalog

    # ---- pictures

    @cached_property
    def fetched(self) -> dict:
        """Address of a picture -> its path, for those that were fetched."""
        return fetched_pictures(self.folder / self.about["pictures"])

    def image_paths(self, item) -> list:
        """Paths of an item's pictures that are on disk; a folder of frames is one picture.

        item: a row of `items`.
        """
        root = self.folder / self.about["image_root"]
        paths = [self.fetched.get(p) if "://" in p else root / p for p in item["images"]]
        return [str(path) for path in paths if path and path.exists()]

    def image_path(self, item):
        """Path of an item's first picture that is on disk and is one file, else None."""
        return next(filter(os.path.isfile, self.image_paths(item)), None)

    def fetch_pictures(self):
        """Fetch the pictures that the items have as addresses only.

        What is there, or was refused before, is not asked for again.
        """
        wanted = []
        for item in self.items[1:]:
            urls = [path for path in item["images"] if "://" in path]
            if urls:
                wanted.append((item["key"], urls))
        if not wanted:
            return
        hosts = self.about["picture_hosts"]
        counts = fetch_pictures(wanted, self.folder / self.about["pictures"], Rules(hosts=hosts))
        shown = ", ".join(f"{status} {count}" for status, count in counts.items() if count)
        print(f"pictures of {self.name}: {shown}", flush=True)
        for outdated in ("fetched", "has"):
            self.__dict__.pop(outdated, None)

    # ---- histories

    @cached_property
    def train_seqs(self) -> list:
        """The training part of every user's items, oldest first: lists of ids."""
        return [self.flat[a:b].tolist() for a, b in zip(self.offsets, self.train_end)]

    @property
    def in_train(self) -> np.ndarray:
        """(n_interactions,) bool: which places of `flat` belong to a training part."""
        end = np.repeat(self.train_end, np.diff(self.offsets))
        return np.arange(len(self.flat)) < end

    @cached_property
    def train_counts(self) -> np.ndarray:
        """(n_items + 1,) occurrences in the training parts."""
        return np.bincount(self.flat[self.in_train], minlength=self.n_items + 1)

    def training_rows(self, kind, max_len, device="cpu") -> "Rows":
        """kind "sequences": one row per user, a target after every item; "prefixes": one row per
        prefix, one target; "items": one row per item."""
        if kind == "items":
            return ItemRows(np.arange(1, self.n_items + 1), device)
        begin = self.offsets[:-1]
        end = self.train_end - 1    # the last training item is a target only
        users = np.flatnonzero(end > begin)
        ends = end[users]
        if kind == "prefixes":
            lengths = (end - begin)[users]
            ends = np.repeat(begin[users], lengths) + 1 + counters(lengths)
            users = np.repeat(users, lengths)
        return Rows(self, users, ends, max_len, device, kind)

    def evaluated_rows(self, split, max_len, device="cpu", most=None) -> "Rows":
        """One row per user with a target in `split` ("valid" or "test"); the input is everything
        before the target. most: of so many of these users, the same ones always; None: of all."""
        key = (split, max_len, str(device), most)
        if key not in self.evaluated:
            users = np.flatnonzero(self.targets[split] >= 0)
            if most is not None and most < len(users):
                users = np.sort(np.random.default_rng(0).choice(users, most, replace=False))
            ends = self.targets[split][users]
            self.evaluated[key] = Rows(self, users, ends, max_len, device, "evaluated")
        return self.evaluated[key]


def check_rows(rows):
    """Raises TypeError, KeyError or ValueError for a row that sources.write_items has not written.
    """
    for row in rows:
        if not type(row["text"]) is type(row["images"]) is list:
            raise TypeError("no list")
        texts = (row["key"], row["title"], row["language"], *row["text"], *row["images"])
        "".join(texts).encode()    # nothing but texts, and no half letter


def counters(lengths):
    """[2, 3] -> [0, 1, 0, 1, 2]"""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


# ---------------- rows and batches

class Rows:
    """Rows of a data set on a device. Row r reads `flat[start[r]:end[r]]`; its last target is
    `flat[end[r]]`."""

    def __init__(self, dataset, users, ends, max_len, device, kind):
        first = dataset.offsets[users]
        starts = np.maximum(first, ends - max_len)
        self.kind = kind
        self.users = users                # (R,)
        self.lengths = ends - starts      # (R,) of the inputs
        self.history = ends - first       # (R,) of the whole histories, uncut

        def on_device(array):
            return torch.as_tensor(array, dtype=torch.long, device=device)

        self.user = on_device(users)
        self.start = on_device(starts)
        self.end = on_device(ends)
        self.first = on_device(first)     # where the whole history begins
        self.flat = on_device(dataset.flat)

    def __len__(self):
        return len(self.lengths)

    def batch(self, index, length) -> dict:
        """{"user": (B,), "seq": (B, length), "target": (B, length)}, int64 on the device.

        seq is left-padded with 0; target is the item after each. index: (B,) row numbers on the
        device. length: of the longest of these rows.
        """
        place = self.end[index, None] - length + torch.arange(length, device=index.device)
        real = place >= self.start[index, None]
        place = place.clamp(min=0)
        after = (place + 1).clamp(max=len(self.flat) - 1)    # a whole history may end the data
        return {
            "user": self.user[index],
            "seq": torch.where(real, self.flat[place], 0),
            "target": torch.where(real, self.flat[after], 0),
        }

    def seen(self, index, length) -> torch.Tensor:
        """(B, length) every item of the rows' uncut histories, 0 = none."""
        place = self.end[index, None] - length + torch.arange(length, device=index.device)
        real = place >= self.first[index, None]
        return torch.where(real, self.flat[place.clamp(min=0)], 0)

    def epoch(self, batch_size, rng):
        """Batches of one epoch in random order, rows of similar length together, each trimmed to
        its longest row. rng: numpy Generator. Yields (batch, row numbers on the host).

        For "sequences" the batches have equal numbers of targets, those of `batch_size` rows of
        mean length, so that a target weighs the same in a batch of short rows; else equal numbers
        of rows.
        """
        order = self.shuffled(batch_size, rng)
        weight = self.lengths if self.kind == "sequences" else np.ones(len(self), np.int64)
        n_batches = max(1, -(-len(order) // batch_size))
        before = np.cumsum(weight[order]) - weight[order]
        cuts = np.searchsorted(before, np.arange(1, n_batches) * (weight.sum() / n_batches))
        batches = [part for part in np.split(np.arange(len(order)), cuts) if len(part)]
        on_device = torch.as_tensor(order, device=self.user.device)
        for number in rng.permutation(len(batches)):
            part = slice(batches[number][0], batches[number][-1] + 1)
            rows = order[part]
            yield self.batch(on_device[part], int(self.lengths[rows].max())), rows

    def shuffled(self, batch_size, rng):
        """All row numbers in random order, sorted by length inside windows of WINDOW batches."""
        order = rng.permutation(len(self))
        windows = np.array_split(order, max(1, len(order) // (WINDOW * batch_size)))
        windows = [w[np.argsort(self.lengths[w], kind="stable")] for w in windows]
        # every second window runs backwards, so that a batch across two windows has similar lengths
        return np.concatenate([w[::-1] if i % 2 else w for i, w in enumerate(windows)])


class ItemRows:
    """Rows of a stage whose batches are items: each item once per epoch."""
    kind = "items"

    def __init__(self, items, device):
        self.users = items    # what a message about a bad batch names
        self.device = device

    def __len__(self):
        return len(self.users)

    def epoch(self, batch_size, rng):
        """Yields ({"item": (B,) ids}, row numbers on the host)."""
        order = rng.permutation(len(self))
        on_device = torch.as_tensor(self.users[order], device=self.device)
        for first in range(0, len(order), batch_size):
            part = slice(first, first + batch_size)
            yield {"item": on_device[part]}, order[part]


# ---------------- loading

def load(
    where, root="data", split="leave_one_out", core=None, mirror=None, by=None, train_share=1.0,
    cut=None,
):
    """Known name, folder of raw files or processed folder -> Data; prepares what is not prepared.

    Raises UserError.
    """
    if cut is not None and split != "temporal":
        raise UserError(f"--cut {cut} belongs to --split temporal: give both, or leave it out")
    if not 0 < train_share <= 1:
        raise UserError(f"--train_share {train_share} must be above 0 and at most 1")
    folder = prepare(where, root, core, mirror, by)
    advice = f"remove the folder {folder} and prepare the data again"
    about = read_about(folder, advice)
    path = folder / "sequences.npz"
    arrays = load_arrays(path, advice)
    if arrays_sha256(arrays.values()) != about["sequences_sha256"]:
        raise UserError(f"{path} was changed after the data was prepared: {advice}")
    n_items = lines_in(folder / "items.jsonl", advice)
    fits = set(ARRAYS) <= set(arrays)
    fits = fits and all(a.ndim == 1 and a.dtype.kind in "iu" for a in arrays.values())
    if fits:
        flat, offsets, times = (arrays[name].astype(np.int64) for name in ARRAYS)
        parts = arrays.get("parts")
        fits = len(flat) == len(times) == len(flat if parts is None else parts) > 0
        fits = fits and len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(flat)
        fits = fits and (np.diff(offsets) > 0).all() and 1 <= flat.min() <= flat.max() <= n_items
    if not fits:
        raise UserError(f"{path} and items.jsonl beside it do not belong together: {advice}")
    return Data(folder, about, flat, offsets, times, n_items, split, train_share, cut, parts)


def lines_in(path, advice) -> int:
    """How many lines a file has. Raises UserError."""
    try:
        refuse_endless(path)
        with open(path, "rb") as file:
            return sum(1 for _ in file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): {advice}") from None


def add_arguments(parser, name="--data"):
    """The flags that say which data: the keyword arguments of `load`, the same in every script."""
    add = parser.add_argument
    required = {"required": True} if name.startswith("-") else {}
    names = ", ".join(NAMES)
    others = "demo:tastes and the like, amazon2018:CATEGORY, amazon2023:CATEGORY"
    add(name, **required, help=f"a folder, or {names}, {others}")
    add("--split", choices=SPLITS, default="leave_one_out",
        help="which items are targets: the last ones, those after a time, as train, valid and test "
             "files of the data say, or none, to train on everything (default: leave_one_out)")
    add("--cut", help="of --split temporal: where validation and test begin, dates such as "
                      "2022-09-15,2022-09-22 or shares (default: .8,.9)")
    add("--core", type=int, help="k-core on users and items (default: the source's own)")
    add("--by", choices=BY, help="what an item is, where the source has a choice (H&M: article)")
    add("--mirror", help="base URL to download a known data set from")
    add("--train_share", type=float, default=1.0,
        help="train on this share of the users; all are evaluated")


def load_for(args) -> Data:
    """`load` with what add_arguments brought; says what was given and is not used."""
    dataset = load(
        args.data,
        split=args.split,
        core=args.core,
        mirror=args.mirror,
        by=args.by,
        train_share=args.train_share,
        cut=args.cut,
    )
    print_notes(dataset, args)
    return dataset


def print_notes(dataset, args):
    encoders = {modality: getattr(args, modality, None) for modality in ("text", "image")}
    for note in dataset.notes(encoders):
        print(f"note: {note}", flush=True)


# ---------------- statistics

def statistics(dataset) -> dict:
    """What a paper's data table prints, as exact integers; shares are given as (part, whole)."""
    lengths = np.diff(dataset.offsets)
    quartiles = np.quantile(lengths, [0, .25, .5, .75, 1], method="lower")
    user = np.repeat(np.arange(dataset.n_users), lengths)
    filled = np.sort(user * (dataset.n_items + 1) + dataset.flat)    # np.unique takes far more
    filled = 1 + int((filled[1:] != filled[:-1]).sum())
    cells = dataset.n_users * dataset.n_items
    test = dataset.targets["test"][dataset.targets["test"] >= 0]
    seen = dataset.train_counts[dataset.flat[test]]
    cold = seen < COLD
    addressed = sum(any("://" in path for path in item["images"]) for item in dataset.items)
    evaluated = [int((places >= 0).sum()) for places in dataset.targets.values()]
    n_items = dataset.n_items
    return {
        "users": dataset.n_users,
        "items": n_items,
        "interactions": len(dataset.flat),
        "items with interactions": np.count_nonzero(np.bincount(dataset.flat)),
        "shortest, 25 %, median, 75 %, longest history": quartiles.tolist(),
        "empty cells of users x items": (cells - filled, cells),
        "items with text": (int(dataset.has["text"].sum()), n_items),
        "items with a picture on disk, or its features": (int(dataset.has["image"].sum()), n_items),
        "items with a picture's address": (addressed, n_items),
        "training interactions": int(dataset.train_counts.sum()),
        "evaluated users (validation, test)": evaluated,
        f"cold test targets (< {COLD} training occurrences)": (int(cold.sum()), len(test)),
        "unseen test targets (no training occurrence)": (int((seen == 0).sum()), len(test)),
    }


def shown(value) -> str:
    """A value of `statistics`, or of a source's report, as text."""
    if isinstance(value, tuple) and value[1]:
        part, whole = value
        return f"{part} of {whole} ({part / whole:.2%})"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items() if part)
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


def main():
    parser = argparse.ArgumentParser(
        description="Prepare a data set and print its statistics.", allow_abbrev=False
    )
    add_arguments(parser, "data")
    dataset = load_for(parser.parse_args())
    about = dataset.about
    print(f"{dataset.name} in {dataset.folder}, from {about['from']}")
    rows = [(step, step["step"]) for step in about["counts"]]
    if about["published"]:
        rows.append((about["published"], f"as {about['published']['source']} prints them"))
    for row, what in rows:
        print(f"  {row['users']:>9} users {row['items']:>9} items "
              f"{row['interactions']:>10} interactions   {what}")
    for what, value in about["report"].items():
        if value:
            print(f"  {what}: {shown(value)}")
    print()
    for what, value in statistics(dataset).items():
        print(f"{what:<52} {shown(value)}")


if __name__ == "__main__":
    command(main)
