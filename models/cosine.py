"""Cosine to the last item: items are ranked by how alike their text or picture is to the last's.

An untrained baseline for content: it knows no behaviour at all, and so it does not mind whether an
item was ever sold.

Reads from the catalog: n_items, text, image (their forms: CATALOG below).
"""
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import nn

CATALOG = {
    "n_items": "int N; item ids are 1..N, 0 is padding",
    "text": "float (N+1, D), row 0 zero, a zero row = no text",
    "image": "float (N+1, D), row 0 zero, a zero row = no picture",
}
READS = ("text", "image")


@dataclass
class CosineConfig:
    modality: Literal["text", "image", "both"] = "text"    # both: the mean of the two cosines
    dim: int = 0                         # nothing here has a size: the words that all files share
    heads: int = 0
    layers: int = 0
    dropout: float = 0.0
    max_len: int = 50

    def __post_init__(self):
        check_kinds(self)


class Cosine(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        kinds = ("text", "image") if cfg.modality == "both" else (cfg.modality,)
        # a missing feature stays zero: its cosine is 0
        rows = [F.normalize(catalog[kind].float(), dim=-1) for kind in kinds]
        rows = torch.cat(rows, -1) / len(kinds) ** .5
        self.register_buffer("rows", rows, persistent=False)    # (N+1, D)

    def forward(self, batch):
        return {"next_item": self.rows.new_zeros(())}    # nothing to train

    def encode_items(self):
        return self.rows                                 # (N+1, D)

    def score(self, batch, table):
        return table[batch["seq"][:, -1]] @ table.T      # (B, N+1)

    def as_product(self, batch, table):
        """Users (B, D) and items (N+1, D) whose products are the scores."""
        return table[batch["seq"][:, -1]], table


Model, Config = Cosine, CosineConfig


# ---------------- helpers: the same text in every model file

def check(condition, message):
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_kinds(cfg):
    """Raises ValueError for a setting of another type, or none of its choices."""
    for name, kind in get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        choices = get_args(kind)
        if choices:
            check(value in choices, f"{name} {value} must be one of {', '.join(choices)}")
        else:
            wanted = {int: Integral, float: Real}.get(kind, kind)
            check(isinstance(value, wanted), f"{name} {value!r} must be of type {kind.__name__}")


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
    torch.manual_seed(0)
    catalog = {"n_items": 3, "text": torch.randn(4, 8), "image": torch.randn(4, 5)}
    model = Cosine(CosineConfig(modality="both"), catalog)
    scores = model.score({"seq": torch.tensor([[0, 2]])}, model.encode_items())
    assert scores.shape == (1, 4) and scores[0, 1:].argmax() == 1
    print(scores)
