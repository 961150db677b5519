"""SASRec: Self-Attentive Sequential Recommendation. Wang-Cheng Kang, Julian McAuley. ICDM 2018. arXiv:1808.09781.

The yardstick: item ids only. A causal Transformer reads the items a user had and, at every position, predicts the one
that follows; an item's score is the dot product of the last state and the item's embedding.

    seq (B, L) -> E[seq] + P -> LayerNorm, dropout -> [causal attention, feed-forward] x layers -> state (B, L, D)
                                                                              state . E[1..N]^T -> scores (B, N)

Departures from the paper, all of them usual today:
  1. loss: full softmax over all items (the paper: one sampled negative with binary cross entropy, `--loss bce`). The
     loss moves the result more than most architectures published since, so every number must name it.
  2. LayerNorm on the input and after each residual sum, GELU, a feed-forward of 4 x dim, as in BERT (the paper:
     LayerNorm before attention and feed-forward, ReLU, 1 x dim).
  3. positions are counted from the end of the sequence, so that trimming left padding changes nothing.

Reads from the catalog: n_items.
"""
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

READS = ()


@dataclass
class SASRecConfig:
    dim: int = 64                        # embedding size
    heads: int = 2
    layers: int = 2                      # b = 2, section IV-C
    dropout: float = 0.5                 # on embeddings, attention and feed-forward; 0.5 for sparse data, section IV-C
    max_len: int = 50                    # n = 50 for sparse data, section IV-C
    loss: Literal["softmax", "bce"] = "softmax"  # softmax over all items, or bce with one sampled negative (section III-E)
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 128                # rows; batches hold as many targets as this many rows of mean length
    epochs: int = 300
    patience: int = 20                   # epochs without a better validation NDCG@10
    prefixes: bool = False               # a target at every position


class SoftmaxLoss(torch.autograd.Function):
    """Mean cross entropy of states (R, D) over items 1..N of a table (N+1, D); rows with target 0 count nothing.

    Works through the rows in chunks and makes the gradient on the way, so the (R, N+1) logits never exist as a whole.
    """

    @staticmethod
    def forward(ctx, states, items, target):
        weight = (target != 0) / (target != 0).sum().clamp(min=1)                  # (R,)
        loss = torch.zeros((), device=states.device, dtype=torch.promote_types(states.dtype, torch.float32))
        d_states, d_items = torch.zeros_like(states), torch.zeros_like(items)
        chunk = max(64, 2 ** (26 if states.is_cuda else 21) // len(items))
        for first in range(0, len(states), chunk):
            rows = slice(first, first + chunk)
            logits = (states[rows] @ items.T).to(loss.dtype)                       # (chunk, N+1)
            logits[:, 0] = -torch.inf                                              # padding is no item
            logits = logits.log_softmax(1)
            answer = target[rows, None].clamp(min=1)
            loss -= (logits.gather(1, answer)[:, 0] * weight[rows]).sum()
            slope = logits.exp_().scatter_add_(1, answer, logits.new_full(answer.shape, -1.))
            slope = (slope * weight[rows, None]).to(states.dtype)                  # d loss / d logits
            d_states[rows] = slope @ items
            d_items += slope.T @ states[rows]
        ctx.save_for_backward(d_states, d_items)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        d_states, d_items = ctx.saved_tensors
        return d_states * slope, d_items * slope, None


class Block(nn.Module):
    """Self-attention and feed-forward, each with dropout, residual sum and LayerNorm."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.inner, self.outer = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):                                  # x (B, L, D), mask (B, 1, L, L) True = may look
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.p if self.training else 0.)
        x = self.norm1(x + self.dropout(self.out(a.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.dropout(self.outer(F.gelu(self.inner(x)))))


class SASRec(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        if cfg.dim % cfg.heads:
            raise ValueError(f"dim {cfg.dim} must be a multiple of heads {cfg.heads}")
        self.cfg = cfg
        self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim, padding_idx=0)
        self.position = nn.Parameter(torch.empty(cfg.max_len, cfg.dim))
        self.norm, self.dropout = nn.LayerNorm(cfg.dim), nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg.dim, cfg.heads, cfg.dropout) for _ in range(cfg.layers))
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0

    def states(self, seq, table):                                # (B, L) -> (B, L, D)
        L = seq.shape[1]
        x = self.dropout(self.norm(F.embedding(seq, table) + self.position[-L:]))
        real = (seq != 0)[:, None, None, :]                                        # (B, 1, 1, L)
        causal = torch.ones(L, L, dtype=torch.bool, device=seq.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=seq.device)                 # a padded row must see something
        mask = causal & real | itself                                              # (B, 1, L, L)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(self, batch):
        table, target = self.encode_items(), batch["target"]
        states = self.states(batch["seq"], table)                                  # (B, L, D)
        if self.cfg.prefixes:                                                      # one target a row, the last
            states, target = states[:, -1:], target[:, -1:]
        if self.cfg.loss == "softmax":
            states, target = states.flatten(0, 1), target.flatten()
            if not target.is_cuda:                  # choosing rows would wait for a GPU; trimmed batches are nearly full
                states, target = states[target != 0], target[target != 0]
            return {"next_item": SoftmaxLoss.apply(states, table, target)}
        real, negative = target != 0, torch.randint_like(target, 1, len(table))    # (B, L)
        own = torch.cat([batch["seq"], batch["target"]], 1)                        # what the row has is no negative
        other = (negative[..., None] != own[:, None]).all(-1)
        right, wrong = ((states * table[i]).sum(-1) for i in (target, negative))   # (B, L)
        loss = F.softplus(-right) * real + F.softplus(wrong) * (real & other)      # section III-E
        return {"next_item": loss.sum() / real.sum().clamp(min=1)}

    def encode_items(self):
        return self.item.weight                                                    # (N+1, D)

    def score(self, batch, table):
        return self.states(batch["seq"], table)[:, -1] @ table.T                   # (B, N+1)


Model, Config = SASRec, SASRecConfig


if __name__ == "__main__":
    torch.manual_seed(0)
    start, N, B, L = time.time(), 100, 8, 10
    model = SASRec(SASRecConfig(), {"n_items": N})
    items = torch.randint(1, N + 1, (B, L + 1))
    items[0, :4] = 0
    batch = {"user": torch.arange(B), "seq": items[:, :-1], "target": items[:, 1:] * (items[:, :-1] != 0)}
    losses = model(batch)
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    print({k: round(v.item(), 4) for k, v in losses.items()}, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
