"""SASRec: Self-Attentive Sequential Recommendation.
Wang-Cheng Kang, Julian McAuley. ICDM 2018. arXiv:1808.09781.

The yardstick: item ids only. A causal Transformer reads the items a user had and, at every
position, predicts the one that follows; an item's score is the dot product of the last state and
the item's embedding.

  seq (B, L) -> E[seq] + P -> LayerNorm -> [causal attention, feed-forward] x layers -> (B, L, D)
                                                            last state . E[1..N]^T -> scores (B, N)

Departures from the paper, all of them usual today:
 1. The loss is a softmax over all items; the paper has one sampled negative with binary cross
    entropy (`--loss bce`). The loss moves the result more than most architectures published since.
 2. LayerNorm on the input and after each residual sum, GELU, a feed-forward of 4 x dim, as in BERT;
    the paper has LayerNorm before attention and feed-forward, ReLU, 1 x dim.
 3. Positions are counted from the end of the sequence, so that trimming padding changes nothing.

Reads from the catalog: n_items.
A batch: "seq" and "target" (B, L), item ids, the newest last, padded with 0 on the left; target is
the item after each place, 0 = none. score reads "seq" alone; it ranks the history's items as well,
and its column 0 is padding's. state_dict has weights only: rebuild with the same catalog.
"""
import math
import time
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import nn

CATALOG = {"n_items": "int N; item ids are 1..N, 0 is padding"}
READS = ()
NOT_COMPILED = ("softmax_loss",)    # it would be, anew, for every shape


@dataclass
class SASRecConfig:
    dim: int = 64                        # embedding size
    heads: int = 2
    layers: int = 2                      # b = 2, section IV-C
    dropout: float = 0.5                 # everywhere; 0.5 for sparse data, section IV-C
    max_len: int = 50                    # n = 50 for sparse data, section IV-C
    loss: Literal["softmax", "bce"] = "softmax"    # bce: one sampled negative, section III-E
    # the recipe, for the training loop
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 0.0               # largest norm of a gradient; 0: any; not in the paper
    batch_size: int = 128                # as many targets as in so many rows of mean length
    epochs: int = 300
    patience: int = 20                   # epochs without a better validation NDCG@10
    prefixes: bool = False               # true: a row per prefix, and one target a row, the last

    def __post_init__(self):
        check_recipe(self)


class Block(nn.Module):
    """Self-attention, then feed-forward; each with dropout, residual sum and LayerNorm."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        self.attention_dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)    # W^Q, W^K, W^V side by side
        self.out = nn.Linear(dim, dim)
        self.inner = nn.Linear(dim, 4 * dim)
        self.outer = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x, mask):
        """softmax(Q K^T / sqrt(D / heads)) V, section III-B.

        x (B, L, D), mask (B, 1, L, L) True = may look -> (B, L, D)
        """
        projected = self.qkv(x).unflatten(-1, (3, self.heads, -1))    # (B, L, 3, heads, D / heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4)    # (B, heads, L, D / heads) each
        p = self.attention_dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
        return self.out(a.transpose(1, 2).flatten(2))

    def forward(self, x, mask):
        x = self.norm1(x + self.dropout(self.attend(x, mask)))
        feed_forward = self.outer(F.gelu(self.inner(x)))              # section III-B
        return self.norm2(x + self.dropout(feed_forward))


class SASRec(nn.Module):
    """Scores all items from the ids of a user's history."""

    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        self.cfg = cfg
        self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim)    # E; row 0 is padding
        self.position = nn.Parameter(torch.empty(cfg.max_len, cfg.dim))             # P
        self.norm = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(
            Block(cfg.dim, cfg.heads, cfg.dropout) for _ in range(cfg.layers)
        )
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0    # padding

    def states(self, seq, table):
        """The state after each item: seq (B, L), table (N+1, D) -> (B, L, D)."""
        L = seq.shape[1]
        x = F.embedding(seq, table) + self.position[-L:]                  # (B, L, D), departure 3
        x = self.dropout(self.norm(x))
        real = (seq != 0)[:, None, None, :]                               # (B, 1, 1, L)
        causal = torch.ones(L, L, dtype=torch.bool, device=seq.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=seq.device)    # padding must see something
        mask = (causal & real) | itself                                   # (B, 1, L, L)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(self, batch):
        """{"next_item": loss} of a batch: "seq" and "target" (B, L), 0 = padding or no target."""
        table = self.encode_items()
        seq = recent(self, batch)
        target = batch["target"][:, -seq.shape[1]:]
        states = self.states(seq, table)                                  # (B, L, D)
        if self.cfg.prefixes:    # one target a row, the last
            states, target = states[:, -1:], target[:, -1:]
        if self.cfg.loss == "softmax":                                    # departure 1
            loss = softmax_loss(states.flatten(0, 1), table, target.flatten())
        else:
            loss = self.bce(states, table, target, batch)
        return {"next_item": loss}

    def bce(self, states, table, target, batch):
        """Mean of -log sigmoid(r_target) - log(1 - sigmoid(r_negative)), section III-E.

        The negative is drawn from all items; one that the row itself has counts nothing.
        """
        real = target != 0                                                # (B, L)
        negative = torch.randint_like(target, 1, len(table))              # (B, L)
        own = torch.cat([batch["seq"], batch["target"]], 1)
        other = (negative[..., None] != own[:, None]).all(-1)             # (B, L)
        right = (states * F.embedding(target, table)).sum(-1)             # (B, L)
        wrong = (states * F.embedding(negative, table)).sum(-1)           # (B, L)
        loss = F.softplus(-right) * real + F.softplus(wrong) * (real & other)
        return loss.sum() / real.sum().clamp(min=1)

    def encode_items(self):
        """The table that score reads: E (N+1, D)."""
        return self.item.weight

    def score(self, batch, table):
        """Scores (B, N+1) of all items after the sequences "seq" (B, L)."""
        seq = recent(self, batch)
        return self.states(seq, table)[:, -1] @ table.T

    def as_product(self, batch, table):
        """Users (B, D) and items (N+1, D) whose products are the scores."""
        return self.states(recent(self, batch), table)[:, -1], table


Model, Config = SASRec, SASRecConfig


# ---------------- helpers, not the paper's: the same text in every model file

class SoftmaxLoss(torch.autograd.Function):
    """Cross entropy of states (R, D) over items 1..N of a table (N+1, D), summed over the rows.

    A row with target 0 counts nothing. Works through the rows in chunks and makes the gradient on
    the way, so the (R, N+1) logits never exist as a whole.
    """

    @staticmethod
    def forward(ctx, states, items, target):
        wide = torch.promote_types(states.dtype, torch.float32)    # bfloat16 is coarse for logits
        x, e = states.to(wide), items.to(wide)
        loss = torch.zeros((), device=x.device, dtype=wide)
        d_x, d_e = torch.zeros_like(x), torch.zeros_like(e)
        chunk = max(64, 2 ** (26 if x.is_cuda else 21) // len(e))
        with torch.autocast(x.device.type, enabled=False):
            for first in range(0, len(x), chunk):
                rows = slice(first, first + chunk)
                real = target[rows, None] != 0                      # (chunk, 1)
                answer = target[rows, None].clamp(min=1)
                logits = x[rows] @ e.T                              # (chunk, N+1)
                logits[:, 0] = -torch.inf                           # padding is no item
                log_p = logits.log_softmax(1)
                loss -= (log_p.gather(1, answer) * real).sum()
                # d loss / d logits: p - 1 at the answer, p elsewhere
                minus_one = -torch.ones_like(answer, dtype=wide)
                slope = log_p.exp_().scatter_add_(1, answer, minus_one) * real
                d_x[rows] = slope @ e
                d_e += slope.T @ x[rows]
        d_states, d_items = d_x.to(states.dtype), d_e.to(items.dtype)
        ctx.save_for_backward(d_states, d_items)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        d_states, d_items = ctx.saved_tensors
        return d_states * slope, d_items * slope, None


def softmax_loss(states, items, target):
    """Mean cross entropy over the rows that have a target, 0 if none has: see SoftmaxLoss."""
    if not target.is_cuda:    # a GPU would have to wait while they are counted
        states, target = states[target != 0], target[target != 0]
    return SoftmaxLoss.apply(states, items, target) / (target != 0).sum().clamp(min=1)


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


def check_recipe(cfg):
    """Raises ValueError for a setting that makes no sense, of those that model files share."""
    check_kinds(cfg)
    for name in ("dim", "heads", "layers", "max_len", "batch_size", "epochs", "patience"):
        value = getattr(cfg, name)
        check(value >= 1, f"{name} {value} is too small: it must be at least 1")
    check(cfg.dim % cfg.heads == 0, f"dim {cfg.dim} must be a multiple of heads {cfg.heads}")
    check(0 <= cfg.dropout < 1, f"dropout {cfg.dropout} must be from 0 to below 1")
    check(0 < cfg.lr < math.inf, f"lr {cfg.lr} must be above 0")
    check(0 <= cfg.weight_decay < math.inf, f"weight_decay {cfg.weight_decay} must not be negative")
    check(0 <= cfg.clip_norm < math.inf, f"clip_norm {cfg.clip_norm} must not be negative")


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


def recent(model, batch):
    """"seq" of a batch, the last cfg.max_len items of each row: (B, L).

    Raises ValueError for what would go wrong without a word: rows that are padded on the right
    (on a GPU nobody looks, as a step would have to wait for the answer), and coarse weights.
    """
    dtype = next(model.parameters()).dtype
    check(dtype in (torch.float32, torch.float64),
          f"weights in {dtype} are too coarse: leave them in float32, and use torch.autocast")
    seq = batch["seq"][:, -model.cfg.max_len:]
    if not seq.is_cuda and not torch.compiler.is_compiling():
        check(((seq[:, -1] != 0) | (seq == 0).all(1)).all(),
              "rows of seq must be padded with 0 on the left, the newest item last")
    return seq


if __name__ == "__main__":    # a check that this file works where it was copied to
    torch.manual_seed(0)
    start = time.time()
    N, B, L = 100, 8, 10
    model = SASRec(SASRecConfig(), {"n_items": N})
    items = torch.randint(1, N + 1, (B, L + 1))
    items[0, :4] = 0    # a shorter row, padded on the left
    seq, target = items[:, :-1], items[:, 1:]
    batch = {"user": torch.arange(B), "seq": seq, "target": target * (seq != 0)}
    losses = model(batch)
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
    shown = {name: round(loss.item(), 4) for name, loss in losses.items()}
    print(shown, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
