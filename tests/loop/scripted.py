"""A model whose ranking in each epoch is written down: what the loop makes of it is known.

In this shop the item after i is i + 1 most of the time. Odd epochs know that. Even ones rank the
history first, after it the right item and, which odd ones do not, the one after that: worse among
all items, better without the history.
"""
from dataclasses import dataclass

import torch
from torch import nn

READS = ()


@dataclass
class Config:
    max_len: int = 20
    lr: float = 1e-9
    weight_decay: float = 0.
    batch_size: int = 16
    epochs: int = 4
    patience: int = 4
    prefixes: bool = False


class Model(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        self.n_items = catalog["n_items"]
        self.epoch = nn.Parameter(torch.zeros(()))

    def on_epoch_start(self, epoch):
        with torch.no_grad():
            self.epoch.fill_(epoch)

    def forward(self, batch):
        return {"next_item": self.epoch.square()}

    def encode_items(self):
        return torch.zeros(self.n_items + 1, 1)

    def score(self, batch, table):
        seq = batch["seq"]
        scores = torch.zeros(len(seq), self.n_items + 1)
        after = seq[:, -1:] % self.n_items + 1
        if round(self.epoch.item()) % 2 == 0:
            scores.scatter_(1, after % self.n_items + 1, 1.)
            scores.scatter_(1, seq, 3.)
        return scores.scatter_(1, after, 2.)
