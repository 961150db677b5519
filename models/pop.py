"""Popularity: every user gets the items that occur most often in the training sequences. The floor; nothing is trained.

Reads from the catalog: n_items, train_seqs.
"""
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

READS = ("train_seqs",)


@dataclass
class PopConfig:
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


class Pop(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        counts = Counter(i for seq in catalog["train_seqs"] for i in seq)
        self.register_buffer("counts", torch.tensor([counts[i] for i in range(catalog["n_items"] + 1)],
                                                    dtype=torch.float32), persistent=False)

    def forward(self, batch):
        return {"next_item": self.counts.new_zeros(())}

    def encode_items(self):
        return self.counts[:, None]                                                # (N+1, 1)

    def score(self, batch, table):
        return table[:, 0].expand(len(batch["seq"]), -1)                           # (B, N+1)


Model, Config = Pop, PopConfig


if __name__ == "__main__":
    model = Pop(PopConfig(), {"n_items": 3, "train_seqs": [[1, 2], [2]]})
    scores = model.score({"seq": torch.ones(2, 1, dtype=torch.long)}, model.encode_items())
    print(scores)
    assert scores.tolist() == [[0, 1, 2, 0]] * 2
