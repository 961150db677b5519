"""Digest: what the five papers of this project taught, in one model. Not from a paper.

Ids are good at what is bought often, content at what is bought rarely or never, and nearly nobody
buys a thing again. So: (a) three tables of items, of ids, texts and pictures; in the last two an
item is what others like it and its content say, in the first a new item is what these two say, and
in training some items play new; (b) a Transformer over each table, and each learns to predict
alone; (c) the plain cosine with what was read lately; (d) one number for what it is worth that a
person has an item already; (e) the scores are added.

  ids e of the H nearest others: their mean (1) + content, mapped (2) --> T^text, T^image
  the id of an item, or if it is new the mean of T^text and T^image (3) --> T^id
  s in {id, text, image}:  T^s of the history --> Transformer^s (4) --> h^s --> h^s . T^s (5)
  content of the history, the older the fainter (6) --> cosine with that of an item (7)
  each: + r if the item is in the history (8), softmax, cross entropy (9);  score = their sum (10)

What comes from where, and what is new:
 1. SASRec: the causal Transformer and a softmax over all items. MDSRec: for each modality a table,
    an encoder and a prediction, and graphs of like items that carry ids, (1), (4), (5). Each stream
    has a softmax of its own: in the demo shop one softmax of the sum reaches fewer new items.
 2. FMMS-Rec, MSM4SR, SRMML: content mapped into the width of the ids, (2).
 3. MMSR and the untrained cosine know no ids and are first on new items. So texts and pictures have
    streams that do not read an item's own id, (1) and (2), and the cosine is one, (6) and (7). Its
    weight depends on how often an item was bought; for the target this purchase is not counted.
 4. New: in each step every item is new with a chance, its id 0 in (1) and (3), so that the rest
    learns to speak for it. Where new items are bought this is worth much, elsewhere nothing.
 5. New: r of (8), learned: all of the five recommend what a person has. Where people do buy things
    again, r becomes positive.
 6. Left out, as they made no difference or cost more than they gave: interest centres, Gaussians,
    fusion by agreement, gates of experts, pre-training, co-occurrence (docs/papers/digest.md).

Readings:
 7. content is centred, since vectors of one encoder share a direction that says nothing, and has
    norm 1. An item without a modality is in that stream what it is in the stream of ids, and in
    the cosine of that modality it is 0.
 8. an item that nobody bought is no neighbour of others, and is not in the training softmax. So
    items can be added to a trained model, and nothing changes for the others.
 9. eq. (7) learns two numbers a modality, so an eighth of the places is enough.

Reads from the catalog: n_items, text, image, train_seqs (their forms: CATALOG below).
A batch: "seq" and "target" (B, L), item ids, the newest last, padded with 0 on the left; target is
the item after each place, 0 = none. score reads "seq" alone; its column 0 is padding's.
state_dict has weights only: rebuild with the same catalog.
"""
import math
import time
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import nn

CATALOG = {
    "n_items": "int N; item ids are 1..N, 0 is padding",
    "text": "float (N+1, D_m), row 0 zero, a zero row = no text",
    "image": "float (N+1, D_m), row 0 zero, a zero row = no picture",
    "train_seqs": "one list of item ids per user, training part only",
}
READS = ("text", "image", "train_seqs")
NOT_COMPILED = ("stream_loss",)    # it would be, anew, for every shape
ROWS_OF_ITEMS = ("item.weight",)   # weights whose rows are not read for what nobody bought, eq. (3)
MODALITIES = {"both": ("text", "image"), "text": ("text",), "image": ("image",)}


@dataclass
class DigestConfig:
    dim: int = 64                        # width of ids, tables and Transformers
    heads: int = 4
    layers: int = 2                      # of each Transformer
    dropout: float = 0.3                 # of the Transformers
    input_dropout: float = 0.3           # of the content before its map, eq. (2)
    max_len: int = 50                    # items of the history that are read
    neighbors: int = 4                   # H of eq. (1)
    new: float = 0.2                     # chance of an item to be new in a step, point 4
    decay: float = 0.7                   # gamma of eq. (6)
    loud: float = 1.0                    # factor of eq. (7) in ranking, not in training
    modality: Literal["both", "text", "image"] = "both"
    use_graph: bool = True               # false: eq. (2) without its first term
    use_map: bool = True                 # false: eq. (2) without its second term
    use_cosine: bool = True              # false: no eqs. (6) and (7)
    use_own: bool = True                 # false: r = 0 in eq. (8)
    use_streams: bool = True             # false: one softmax for the sum of the streams, point 1
    # the recipe, for the training loop
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 0.0               # largest norm of a gradient; 0: any
    batch_size: int = 128                # as many targets as in so many rows of mean length
    epochs: int = 200                    # at most
    patience: int = 10                   # epochs without a better validation NDCG@10
    prefixes: bool = False               # true: a row per prefix, and one target a row, the last

    def __post_init__(self):
        check_recipe(self)
        check(0 <= self.input_dropout < 1,
              f"input_dropout {self.input_dropout} must be in [0, 1)")
        check(self.neighbors >= 1,
              f"neighbors {self.neighbors} is too small: it must be at least 1")
        check(0 <= self.new <= 1, f"new {self.new} must be from 0 to 1")
        check(0 <= self.loud < math.inf, f"loud {self.loud} must not be negative")
        check(0 <= self.decay <= 1, f"decay {self.decay} must be from 0 to 1")


# chosen on validation
PRESETS = {
    "scientific-mm": dict(new=0.0),
    "demo": dict(new=0.8, patience=20),    # of many items that play new, validation is noisy
}


# ---------------- items

def centred(features, bought):
    """Features (N+1, D_m) less the mean of what was bought, with norm 1 (reading 7).

    bought (N+1,) bool. An item without features stays 0.
    """
    has = features.any(1, keepdim=True)
    counts = has & bought[:, None]
    mean = (features * counts).sum(0) / counts.sum().clamp(min=1)
    return F.normalize((features - mean) * has, dim=-1)


def nearest(features, count, bought, rows=None):
    """Of what was bought, the other items of greatest cosine: (N+1, count) ids, 0 = none.

    features (N+1, D_m) of norm 1, bought (N+1,) bool. None for items without features, and where
    candidates are too few. Never N x N: some rows of cosines at a time.
    """
    rows = rows or 1 + 2 ** 25 // len(features)
    empty = ~features.any(1)
    number = torch.arange(len(features), device=features.device)
    found = []
    for ids in number.split(rows):
        cosine = features[ids] @ features.T                               # (rows, N+1)
        cosine[:, empty | ~bought] = -torch.inf
        cosine[empty[ids]] = -torch.inf                                   # reading 7
        cosine.scatter_(1, ids[:, None], -torch.inf)                      # not itself
        # of equals, to six digits, the smaller id comes first, however many items there are
        key = cosine.double().mul_(1e6).round_().mul_(1e8).sub_(number)
        best, neighbour = key.topk(min(count, len(features) - 1))
        found.append(neighbour.masked_fill(best.isinf(), 0))
    return torch.cat(found)


# ---------------- the Transformer, eq. (4)

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
        """softmax(Q K^T / sqrt(D / heads)) V, eq. (4).

        x (B, L, D), mask (B, 1, L, L) True = may look -> (B, L, D)
        """
        projected = self.qkv(x).unflatten(-1, (3, self.heads, -1))    # (B, L, 3, heads, D / heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4)    # (B, heads, L, D / heads) each
        p = self.attention_dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
        return self.out(a.transpose(1, 2).flatten(2))

    def forward(self, x, mask):
        x = self.norm1(x + self.dropout(self.attend(x, mask)))
        feed_forward = self.outer(F.gelu(self.inner(x)))              # eq. (4)
        return self.norm2(x + self.dropout(feed_forward))


# ---------------- the model

class Digest(nn.Module):
    """Three streams, each of which predicts alone, and a cosine; their scores are added."""

    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        self.cfg = cfg
        self.modalities = MODALITIES[cfg.modality]
        self.streams = ("id", *self.modalities)
        N = catalog["n_items"]
        self.item = nn.Embedding(N + 1, cfg.dim)                          # e; row 0 is padding
        self.position = nn.Parameter(torch.empty(cfg.max_len, cfg.dim))   # P
        self.norm = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)
        self.encoders = nn.ModuleDict()
        for stream in self.streams:
            self.encoders[stream] = nn.ModuleList(
                Block(cfg.dim, cfg.heads, cfg.dropout) for _ in range(cfg.layers)
            )
        self.maps = nn.ModuleDict()
        for m in self.modalities:
            self.maps[m] = nn.Linear(catalog[m].shape[1], cfg.dim, bias=False)    # W^m
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0    # padding
        # kept divided by 10: Adam moves each weight by about lr a step, and these must come far
        self.own = nn.Parameter(torch.zeros(()))                          # r / 10, eq. (8)
        self.loudness = nn.ParameterDict()                                # (a^m, b^m) / 10, eq. (7)
        for m in self.modalities:
            self.loudness[m] = nn.Parameter(torch.zeros(2))
        self.content = Buffers()     # c^m (N+1, D_m)
        self.graphs = Buffers()      # N^m (N+1, H): ids of the neighbours
        self.share = Buffers()       # (N+1, 1) 1 / how many modalities an item has; 0: not this one
        bought = [item for seq in catalog["train_seqs"] for item in seq]
        sold = torch.tensor(bought, dtype=torch.long).bincount(minlength=N + 1)
        sold = sold[:, None].to(self.position)
        self.register_buffer("sold", sold, persistent=False)              # n (N+1, 1)
        self.catalog = catalog       # until prepare has made of it what is made once

    def prepare(self, device):
        """Centred content and its neighbours, made on the device. Nothing the second time.

        Of a model that is not prepared, encode_items does it.
        """
        if self.catalog is None:
            return
        catalog, self.catalog = self.catalog, None
        bought = self.sold[:, 0] > 0                                      # (N+1,)
        with torch.autocast(device.type, enabled=False):    # bfloat16 is coarse for neighbours
            for m in self.modalities:
                content = centred(catalog[m].to(device, self.position.dtype), bought)
                self.content[m] = content
                self.graphs[m] = nearest(content, self.cfg.neighbors, bought)    # eq. (1)
        has = [self.content[m].any(1, keepdim=True) for m in self.modalities]
        for m, has_m in zip(self.modalities, has):
            self.share[m] = has_m / sum(has).clamp(min=1)                 # eq. (3)

    def encode_items(self):
        """{"id": T^id, "text": T^t, "image": T^v}, each (N+1, D).

        e: the ids, of new items 0. T^m = mean of e over the H nearest, eq. (1), + W^m c^m, eq. (2);
        T^id = e, but of new items the mean of T^m over the modalities that they have, eq. (3).
        """
        self.prepare(self.item.weight.device)
        new = self.sold == 0                                              # (N+1, 1)
        if self.training:
            new = new | (torch.rand_like(self.sold) < self.cfg.new)       # point 4
        e = self.item.weight.masked_fill(new, 0)
        table, borrowed = {}, torch.zeros_like(e)
        for m in self.modalities:
            table[m] = torch.zeros_like(e)
            if self.cfg.use_graph:
                near = F.embedding_bag(self.graphs[m], e, mode="mean", padding_idx=0)
                table[m] = table[m] + near                                # eq. (1)
            if self.cfg.use_map:
                content = F.dropout(self.content[m], self.cfg.input_dropout, self.training)
                table[m] = table[m] + self.maps[m](content)               # eq. (2)
            borrowed = borrowed + self.share[m] * table[m]
        table["id"] = torch.where(new, borrowed, e)                       # eq. (3)
        for m in self.modalities:
            table[m] = torch.where(self.share[m] > 0, table[m], table["id"])    # reading 7
        return table

    def states(self, seq, table):
        """h^s after each item, eq. (4): seq (B, L) -> {stream: (B, L, D)}."""
        L = seq.shape[1]
        real = (seq != 0)[:, None, None, :]                               # (B, 1, 1, L)
        causal = torch.ones(L, L, dtype=torch.bool, device=seq.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=seq.device)    # padding must see something
        mask = (causal & real) | itself                                   # (B, 1, L, L)
        states = {}
        for stream in self.streams:
            x = F.embedding(seq, table[stream]) + self.position[-L:]
            x = self.dropout(self.norm(x))
            for block in self.encoders[stream]:
                x = block(x, mask)
            states[stream] = x
        return states

    # ---------------- the cosine, eqs. (6) and (7)

    def recent_content(self, seq):
        """q^m_t = sum over places p <= t of gamma^(t - p) c^m_p, with norm 1, eq. (6).

        seq (B, L) -> {m: (B, L, D_m)}
        """
        places = torch.arange(seq.shape[1], device=seq.device)
        age = places[:, None] - places                                    # (L, L), t - p
        weight = self.cfg.decay ** age.clamp(min=0) * (age >= 0)
        recent = {}
        for m in self.modalities:
            q = weight.to(self.position) @ F.embedding(seq, self.content[m])
            recent[m] = F.normalize(q, dim=-1)
        return recent

    def cosine_scores(self, q, target=None):
        """y_j = sum_m w^m(n_j) q^m . c^m_j, w^m(n) = a^m + b^m log(1 + n), eq. (7).

        q {m: (R, D_m)} -> (R, N+1). For the target (R,) n is one purchase less: this one.
        """
        scores = 0
        for m in self.modalities:
            a, b = 10 * self.loudness[m]
            cosine = q[m] @ self.content[m].T                             # (R, N+1)
            scores = scores + (a + b * self.sold.T.log1p()) * cosine
            if target is not None:
                n = self.sold[target]                                     # (R, 1)
                less = b * ((n - 1).clamp(min=0).log1p() - n.log1p())
                own = less * cosine.gather(1, target[:, None])
                scores = scores.scatter_add(1, target[:, None], own)
        return scores

    # ---------------- learning and ranking

    def forward(self, batch):
        """The cross entropy of each stream, eq. (9), of a batch: "seq" and "target" (B, L).

        "next_item" is that of the ids. The training loop adds them up.
        """
        table = self.encode_items()
        seq = recent(self, batch)
        L = seq.shape[1]
        P = 1 if self.cfg.prefixes else L                                 # places that predict
        target = batch["target"][:, -P:].flatten()                        # (B P,)
        had = different(seq)[:, None].expand(-1, L, -1).tril()            # (B, L, L) of each place
        had = had[:, -P:].flatten(0, 1)                                   # (B P, L)
        never = self.sold[:, 0] == 0                                      # (N+1,) reading 8
        never.index_fill_(0, target, False)    # whatever train_seqs say
        never[0] = True                        # padding is no item
        states = self.states(seq, table)
        losses = {}
        if self.cfg.use_streams:
            for stream in self.streams:
                h = states[stream][:, -P:].flatten(0, 1)                  # (B P, D)
                name = "next_item" if stream == "id" else stream
                losses[name] = stream_loss(h, table[stream], target, had, self.r(), never)
        else:
            h = torch.cat([states[stream] for stream in self.streams], 2)[:, -P:].flatten(0, 1)
            items = torch.cat([table[stream] for stream in self.streams], 1)
            losses["next_item"] = stream_loss(h, items, target, had, self.r(), never)
        if self.cfg.use_cosine:
            with torch.autocast(seq.device.type, enabled=False):    # bfloat16 is coarse for logits
                losses["cosine"] = self.cosine_loss(seq, target, had, never)
        return losses

    def cosine_loss(self, seq, target, had, never):
        """Cross entropy of the cosine's scores, of some of the places that predict, eq. (9)."""
        P = len(target) // len(seq)
        some = self.some_of(target)                                       # (n,) reading 9
        q = {m: x[:, -P:].flatten(0, 1)[some] for m, x in self.recent_content(seq).items()}
        y = self.cosine_scores(q, target[some])                           # (n, N+1)
        y = y.scatter_add(1, had[some], self.r().expand_as(had[some]))    # eq. (8)
        y = y.masked_fill(never, -torch.inf)                              # reading 8
        loss = F.cross_entropy(y, target[some], ignore_index=0, reduction="sum")
        return loss / (target[some] != 0).sum().clamp(min=1)

    def some_of(self, target):
        """An eighth of the places (R,), drawn; fewer where a row of all items is long."""
        most = 1 + 2 ** 24 // len(self.sold)
        count = min(1 + len(target) // 8, most)
        return torch.randint(len(target), (count,), device=target.device)

    def r(self):
        """r of eq. (8): what is added to the score of an item that the person has."""
        return 10 * self.own * self.cfg.use_own

    def score(self, batch, table):
        """The sum of all streams' scores, eqs. (5), (7), (8) and (10): (B, N+1).

        Column 0 means nothing.
        """
        seq = recent(self, batch)
        states = self.states(seq, table)
        scores = 0
        for stream in self.streams:
            scores = scores + states[stream][:, -1] @ table[stream].T     # eq. (5)
        terms = len(self.streams) if self.cfg.use_streams else 1
        if self.cfg.use_cosine:
            q = {m: x[:, -1] for m, x in self.recent_content(seq).items()}
            scores = scores + self.cfg.loud * self.cosine_scores(q)       # eq. (7)
            terms += 1
        had = different(seq)
        return scores.scatter_add(1, had, (terms * self.r()).expand_as(had).to(scores))    # eq. (8)

    def as_product(self, batch, table):
        """Users (B, W) and items (N+1, W) whose products are the scores, eqs. (5) and (7).

        But for r of eq. (8): whoever ranks by products leaves out what the user has.
        """
        seq = recent(self, batch)
        users, items = [], []
        for stream, h in self.states(seq, table).items():
            users.append(h[:, -1])
            items.append(table[stream])
        if self.cfg.use_cosine:
            for m, q in self.recent_content(seq).items():
                a, b = 10 * self.loudness[m]
                users.append(self.cfg.loud * q[:, -1])
                items.append((a + b * self.sold.log1p()) * self.content[m])
        return torch.cat(users, 1), torch.cat(items, 1)


Model, Config = Digest, DigestConfig


# ---------------- the softmax of eq. (9), in pieces

def different(seq):
    """seq (B, L) with 0 wherever an item stands that stood before in its row."""
    again = (seq[:, :, None] == seq[:, None, :]).tril(-1).any(-1)
    return seq.masked_fill(again, 0)


class StreamLoss(torch.autograd.Function):
    """Cross entropy of h T + r [had], summed over the rows.

    States h (R, D), items T (N+1, D), target (R,): a row with target 0 counts nothing. had (R, L):
    different ids, 0 = none. Works through the rows in chunks and makes the gradient on the way, so
    the (R, N+1) logits never exist as a whole.
    """

    @staticmethod
    def forward(ctx, states, items, target, had, r, never):
        wide = torch.promote_types(states.dtype, torch.float32)    # bfloat16 is coarse for logits
        x, e = states.to(wide), items.to(wide)
        loss, d_r = x.new_zeros(()), x.new_zeros(())
        d_x, d_e = torch.zeros_like(x), torch.zeros_like(e)
        chunk = max(64, 2 ** (26 if x.is_cuda else 21) // len(e))
        with torch.autocast(x.device.type, enabled=False):
            for first in range(0, len(x), chunk):
                rows = slice(first, first + chunk)
                real = target[rows, None] != 0                      # (chunk, 1)
                answer = target[rows, None].clamp(min=1)
                logits = x[rows] @ e.T                              # (chunk, N+1), eq. (5)
                logits.scatter_add_(1, had[rows], r.to(wide).expand_as(had[rows]))    # eq. (8)
                logits.masked_fill_(never, -torch.inf)              # reading 8
                log_p = logits.log_softmax(1)
                loss -= log_p.gather(1, answer).masked_fill(~real, 0).sum()    # eq. (9)
                # d loss / d logits: p - 1 at the answer, p elsewhere
                minus_one = -torch.ones_like(answer, dtype=wide)
                slope = log_p.exp_().scatter_add_(1, answer, minus_one)
                slope.masked_fill_(~real, 0)    # not a product: it may be nan
                d_x[rows] = slope @ e
                d_e += slope.T @ x[rows]
                d_r += slope.gather(1, had[rows]).sum()
        ctx.save_for_backward(d_x.to(states.dtype), d_e.to(items.dtype), d_r.to(r.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        d_states, d_items, d_r = ctx.saved_tensors
        return d_states * slope, d_items * slope, None, None, d_r * slope, None


def stream_loss(states, items, target, had, r, never):
    """Mean cross entropy over the rows that have a target, 0 if none has: see StreamLoss."""
    if not target.is_cuda:    # a GPU would have to wait while they are counted
        real = target != 0
        states, target, had = states[real], target[real], had[real]
    return StreamLoss.apply(states, items, target, had, r, never) / (target != 0).sum().clamp(min=1)


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


class Buffers(nn.Module):
    """Named tensors that are no weights: a dict that moves with the model."""

    def __setitem__(self, name, value):
        self.register_buffer(name, value, persistent=False)

    def __getitem__(self, name):
        return getattr(self, name)


if __name__ == "__main__":    # a check that this file works where it was copied to
    torch.manual_seed(0)
    start = time.time()
    N, B, L = 100, 8, 10
    seqs = [torch.randint(1, N + 1, (12,)).tolist() for _ in range(50)]
    features = {"text": torch.randn(N + 1, 24), "image": torch.randn(N + 1, 32)}
    model = Digest(DigestConfig(dim=32), {"n_items": N, "train_seqs": seqs, **features})
    rows = torch.tensor(seqs[:B])
    batch = {"user": torch.arange(B), "seq": rows[:, :L], "target": rows[:, 1:L + 1]}
    losses = model(batch)
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
    shown = {name: round(loss.item(), 4) for name, loss in losses.items()}
    print(shown, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
