"""Cosine to the last item: items are ranked by how alike their text or picture is to the last item's. Nothing is trained.

The floor for content: it knows no behaviour at all, and so it does not mind whether an item was ever sold.

Reads from the catalog: n_items, text, image.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

READS = ("text", "image")


@dataclass
class CosineConfig:
    modality: Literal["text", "image", "both"] = "text"  # what is compared; both: the mean of the two cosines
    dim: int = 0                         # nothing here has a size: the recipe's words are the same in every file
    heads: int = 0
    layers: int = 0
    dropout: float = 0.0
    max_len: int = 50
    lr: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 512
    epochs: int = 0
    patience: int = 0
    prefixes: bool = False


class Cosine(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        kinds = ("text", "image") if cfg.modality == "both" else (cfg.modality,)
        rows = [F.normalize(catalog[kind].float(), dim=-1) for kind in kinds]      # a missing one stays zero: cosine 0
        self.register_buffer("rows", torch.cat(rows, -1) / len(rows) ** .5, persistent=False)

    def forward(self, batch):
        return {"next_item": self.rows.new_zeros(())}

    def encode_items(self):
        return self.rows                                                           # (N+1, D)

    def score(self, batch, table):
        return table[batch["seq"][:, -1]] @ table.T                                # (B, N+1)


Model, Config = Cosine, CosineConfig


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Cosine(CosineConfig(modality="both"), {"n_items": 3, "text": torch.randn(4, 8), "image": torch.randn(4, 5)})
    scores = model.score({"seq": torch.tensor([[0, 2]])}, model.encode_items())
    print(scores)
    assert scores.shape == (1, 4) and scores[0, 1:].argmax() == 1
