"""A model file of somebody, with a pre-training stage and all the optional hooks."""
from dataclasses import dataclass

import torch
from torch import nn

READS = ()


@dataclass
class Config:
    dim: int = 8           # size of everything
    max_len: int = 20
    batch_size: int = 16
    prefixes: bool = True
    lr: float = 1e-2
    weight_decay: float = 0.
    epochs: int = 3
    patience: int = 3
    pretrain_epochs: int = 2
    pretrain_lr: float = 1e-3
    schedule: str = "cosine"


class Pretrain(nn.Module):
    rows = "items"

    def __init__(self, cfg, catalog):
        super().__init__()
        self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim)

    def forward(self, batch):
        return {"norm": (self.item(batch["item"]).norm(dim=-1) - 1).square().mean()}


class Model(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim)
        self.started = 0

    def init_from(self, state):
        assert set(state) == set(self.state_dict())
        self.load_state_dict(state)
        # the pre-training has made the rows shorter than random ones
        random = torch.randn(99, 8).norm(dim=-1).mean()
        assert (self.item.weight.norm(dim=-1).mean() - 1).abs() < (random - 1).abs()

    def param_groups(self, cfg):
        return [{"params": [self.item.weight], "lr": cfg.lr / 2, "weight_decay": 0.1}]

    def on_epoch_start(self, epoch):
        self.started = epoch

    def forward(self, batch):
        assert self.started and batch["target"][:, -1].all()
        x = self.item(batch["seq"][:, -1]) @ self.item.weight.T
        loss = nn.functional.cross_entropy(x, batch["target"][:, -1])
        return {"next_item": loss, "small": 0.1 * x.square().mean()}

    def encode_items(self):
        return (self.item.weight,)

    def score(self, batch, table):
        return table[0][batch["seq"][:, -1]] @ table[0].T
