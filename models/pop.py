"""Popularity: every user gets the items that occur most often in the training sequences.

An untrained baseline: a model that does not beat it has learned nothing of the user.

Reads from the catalog: n_items, train_seqs (their forms: CATALOG below).
"""
from dataclasses import dataclass

import torch
from torch import nn

CATALOG = {
    "n_items": "int N; item ids are 1..N, 0 is padding",
    "train_seqs": "one list of item ids per user, training part only",
}
READS = ("train_seqs",)


@dataclass
class PopConfig:
    dim: int = 0                         # nothing here has a size: the words that all files share
    heads: int = 0
    layers: int = 0
    dropout: float = 0.0
    max_len: int = 50


class Pop(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        items = [item for seq in catalog["train_seqs"] for item in seq]
        counts = torch.tensor(items, dtype=torch.long).bincount(minlength=catalog["n_items"] + 1)
        self.register_buffer("counts", counts.float(), persistent=False)    # (N+1,)

    def forward(self, batch):
        return {"next_item": self.counts.new_zeros(())}    # nothing to train

    def encode_items(self):
        return self.counts[:, None]                        # (N+1, 1)

    def score(self, batch, table):
        return table[:, 0].expand(len(batch["seq"]), -1)   # (B, N+1)

    def as_product(self, batch, table):
        """Users (B, 1) and items (N+1, 1) whose products are the scores."""
        return table.new_ones(len(batch["seq"]), 1), table


Model, Config = Pop, PopConfig


# ---------------- helpers: the same text in every model file

def check(condition, message):
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_catalog(catalog):
    """Raises ValueError for keys of CATALOG that a catalog lacks, or has in another form."""
    missing = [f"{key} ({form})" for key, form in CATALOG.items() if key not in catalog]
    check(not missing, f"the catalog lacks {', '.join(missing)}")
    N = catalog["n_items"]
    for key, form in CATALOG.items():
        value = catalog[key]
        got = type(value).__name__
        fits = True
        if "(N+1" in form:    # a tensor with as many axes as the form names
            axes = form[:form.index(")")].removesuffix(",").count(",") + 1
            fits = torch.is_tensor(value) and value.dim() == axes and len(value) == N + 1
            got += f" {tuple(value.shape)}" if hasattr(value, "shape") else ""
        elif "list" in form:
            fits = isinstance(value, list) and ("N+1" not in form or len(value) == N + 1)
            got += f" of {len(value)}" if hasattr(value, "__len__") else ""
        check(fits, f"catalog[{key!r}] must be: {form}; N is {N}; it is: {got}")
    for key, form in CATALOG.items():
        if form.startswith("float"):
            masks = [mask for mask in (f"has_{key}", f"{key}_mask") if mask in CATALOG]
            check_numbers(key, catalog[key], catalog[masks[0]] if masks else None)
        if form.startswith("int (N+1"):
            whole = not catalog[key].is_floating_point() and (catalog[key] >= 0).all()
            check(whole, f"catalog[{key!r}] must be whole numbers from 0 on")
    ids = set().union(*catalog.get("train_seqs", ()))
    check(ids <= set(range(1, N + 1)),
          f"catalog['train_seqs'] has ids that are not from 1 to {N}: {list(ids)[:3]}, ...")


def check_numbers(key, value, there):
    """Raises ValueError for features that are not finite, or too large for a square in float32.

    there: bool, where they are read; None: everywhere.
    """
    for first in range(0, len(value), 4096):
        rows = slice(first, first + 4096)
        bad = ~(value[rows].abs() < 1e15).all(-1)    # NaN is below nothing
        if there is not None:
            bad &= there[rows].bool()
        items = bad.flatten(1).any(1) if bad.dim() > 1 else bad
        number = items.nonzero()[:3, 0] + first
        check(len(number) == 0, f"catalog[{key!r}] has numbers that are not finite, or above 1e15, "
                                f"for items {number.tolist()}")


if __name__ == "__main__":    # a check that this file works where it was copied to
    model = Pop(PopConfig(), {"n_items": 3, "train_seqs": [[1, 2], [2]]})
    scores = model.score({"seq": torch.ones(2, 1, dtype=torch.long)}, model.encode_items())
    assert scores.tolist() == [[0, 1, 2, 0]] * 2
    print(scores)
