"""MSM4SR: Multimodal Pre-training Framework for Sequential Recommendation via Contrastive Learning.
Lingzi Zhang, Xin Zhou, Zhiqi Shen. 2023. arXiv:2303.11879 (version 1).

An item is a few sentences, and a few pictures told as sentences of keywords: vectors of one
language model. Attention and a mixture of experts turn each stack into one vector per modality;
one Transformer reads the text sequence and the image sequence, between which some items are
swapped. Pre-training, without item ids: what both sequences say of the next item must agree with
its content (NIP) and with each other (CMCL). Fine-tuning adds an embedding per item id and ranks
all items.

  sentences x^t -> attention (3) -> experts (4, 5) = z^t -+-> M^t -> Transformer -> h^t
                                           swap, ratio p  |
  pictures  x^v -> attention (3) -> experts (4, 5) = z^v -+-> M^v -> (the same)  -> h^v
  pre-training   mhat^t, mtilde^t = h^t W_t, h^v W_t;  mhat^v, mtilde^v = h^v W_v, h^t W_v (6)
                 NIP: both against z of the next item (7, 8);  CMCL: each other (9, 10);  sum (11)
  fine-tuning    M + E instead of M, nothing dropped or swapped;  F^t, F^v = z^t, z^v of all items
                 score = h^t (F^t + E)^T + h^v (F^v + E)^T (12, 13)

Readings, where the paper is silent, misprinted or differs from the code its authors released:
 1. sentences, keywords and vectors are the feature extractor's matter. Where an item has one vector
    per modality, as with CLIP features of a title and a picture, eq. 3 has no choice.
 2. eq. 3: slots without a vector get no attention. An item without the modality has z = 0 and is no
    target and no negative of that modality's NIP. W_1 and W_2 learn (the code cuts their gradient).
 3. eqs. 4-5: experts with bias, all of them used; the gate has none, no noise, and starts even.
 4. each item but the first of a row is dropped with probability rho, and the rest moves up. Every
    target stays, and is predicted from what is left before it: so the item just before it is
    missing for a share rho of the targets.
 5. one p from U(0, 0.5) per batch; M^t and M^v come from one draw; padding is never swapped.
 6. causal Transformer, LayerNorm after the residual sums, GELU; positions from the end.
 7. eq. 6 as printed. use_proj false is W_t = W_v = 1, where both CMCL terms are the same; the
    released command, which leaves W out, has one of them, and mhat alone in NIP.
 8. eqs. 7-10: cosine, log-sum-exp, means over the pairs; eq. 9 symmetric, the second direction by
    columns. A row with the same target is no negative: -inf, not 0.
 9. large batches are contrasted in parts: memory grows with the square of the pairs (1024 there).
10. pre-training runs to its last epoch, unvalidated.
11. eq. 12: cosines over tau, as the code has it; cosine false: inner products, as printed.
12. a target at every position instead of one row per prefix: the same pairs (S_j, i_j) of the last
    max_len items, faster and as good. A user's pairs then share a batch and what random dropout
    drops, and are no negatives to each other.
13. w/o Pre-train and E2E: pretrain_epochs 0. freeze_transformer keeps the pre-trained positions and
    blocks; the modality encoders, the LayerNorm of the input and E learn. modality sum is SASRecM,
    a baseline of Table II: one sequence of z^t + z^v + E, ranked by the same sums.
14. inner width 4 d_0 and dropout 0.2 are the code's.

Reads from the catalog: n_items, sentences, sentences_mask, pictures, pictures_mask (see CATALOG).
A batch: "seq" and "target" (B, L), item ids, the newest last, padded with 0 on the left; target is
the item after each place, 0 = none. score reads "seq" alone; it ranks the history's items as well,
and its column 0 is padding's. state_dict has weights only: rebuild with the same catalog.
"""
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CATALOG = {
    "n_items": "int N; item ids are 1..N, 0 is padding",
    "sentences": "float (N+1, S, D), the vectors of an item's sentences",
    "sentences_mask": "bool (N+1, S), which of them are there",
    "pictures": "float (N+1, S, D), the vectors of an item's pictures",
    "pictures_mask": "bool (N+1, S), which of them are there",
}
READS = ("sentences", "sentences_mask", "pictures", "pictures_mask")
NOT_COMPILED = ("softmax_loss",)    # it would be, anew, for every shape
STACKS = {"text": "sentences", "image": "pictures"}    # t and v of the equations
CHUNK = 2 ** 16    # items whose experts are kept in memory at a time
PAIRS = 2 ** 11    # of a batch, at most, that are contrasted with each other (reading 9)


@dataclass
class MSM4SRConfig:
    dim: int = 64                        # d_0 (Implementation Details)
    attention_dim: int = 64              # d_a (Implementation Details)
    experts: int = 8                     # O (Implementation Details, Fig. 3c)
    heads: int = 2
    layers: int = 2                      # L
    dropout: float = 0.2                 # not in the paper; the released code's
    max_len: int = 50
    rho: float = 0.2    # share of items that random dropout drops (Implementation Details)
    p_max: float = 0.5                   # mixup ratio p is drawn between 0 and 0.5 (section III-B3)
    tau: float = 0.07                    # temperature (Implementation Details)
    lam: float = 0.01                    # lambda of eq. 11 (Implementation Details, Fig. 3a)
    cosine: bool = True    # false: the inner products of eq. 12 as printed (reading 11)
    use_proj: bool = True                # false: W_t and W_v of eq. 6 are left out (reading 7)
    use_nip: bool = True                 # w/o NIP, Table III
    use_cmcl: bool = True                # w/o CMCL, Table III
    use_mixup: bool = True               # w/o Mixup, Table III
    e2e: bool = False    # E2E, Table III: eqs. 11 and 13 summed; needs pretrain_epochs 0
    modality: Literal["both", "text", "image", "sum"] = "both"    # -T, -V, Table IV; sum: SASRecM
    use_id: bool = True                  # false: no ID embeddings, for cold items, Table V
    freeze_transformer: bool = False     # fine-tuning leaves the Transformer as it is, Table VI
    # the recipe, for the training loop
    lr: float = 1e-3                     # of fine-tuning; searched in 1e-4, 5e-4, 1e-3
    weight_decay: float = 0.0            # of both stages; searched in 1e-4, 5e-4, 1e-3
    clip_norm: float = 0.0               # largest norm of a gradient; 0: any; not in the paper
    batch_size: int = 200                # sequences of 5 pairs: the paper's 1024 (reading 12)
    epochs: int = 300                    # of fine-tuning, at most; not in the paper
    patience: int = 10                   # "does not increase for 10 epochs"
    pretrain_epochs: int = 300           # "pre-trained for 300 epochs"; 0: w/o Pre-train, Table III
    pretrain_lr: float = 1e-3            # "learning rate to 0.001"
    prefixes: bool = False               # true: a row per prefix, and one target a row (reading 12)

    def __post_init__(self):
        check_recipe(self)
        check(self.attention_dim >= 1, f"attention_dim {self.attention_dim} must be at least 1")
        check(self.experts >= 1, f"experts {self.experts} must be at least 1")
        check(0 <= self.rho < 1, f"rho {self.rho} must be from 0 to below 1")
        check(0 <= self.p_max <= .5, f"p_max {self.p_max} must be from 0 to 0.5")
        check(self.tau > 0, f"tau {self.tau} must be above 0")
        check(self.lam >= 0, f"lam {self.lam} must not be negative")
        check(self.pretrain_epochs >= 0,
              f"pretrain_epochs {self.pretrain_epochs} must not be negative")
        check(0 < self.pretrain_lr < math.inf, f"pretrain_lr {self.pretrain_lr} must be above 0")
        contrasts = self.use_nip or self.use_cmcl
        check(not (self.e2e and self.pretrain_epochs), "pretrain_epochs must be 0 for e2e")
        check(contrasts or not self.e2e, "e2e needs use_nip or use_cmcl")
        check(contrasts or not self.pretrain_epochs,
              "pretrain_epochs must be 0 without NIP and CMCL: there is nothing to pre-train")


PRESETS = {
    "scientific-mm": dict(batch_size=256, pretrain_epochs=40),
    "demo": dict(batch_size=128, pretrain_epochs=5),
    "beauty": dict(
        batch_size=512, lr=2e-3, tau=0.1, dropout=0.3, epochs=40, patience=5, pretrain_epochs=10
    ),
}


# ---------------- an item's vectors -> one vector per modality, eqs. (3) to (5)

class ModalityEncoder(nn.Module):
    """Frozen stacks of one modality, x (N+1, S, d) and mask (N+1, S) -> z (N+1, d_0)."""

    def __init__(self, cfg, x, mask):
        super().__init__()
        d = x.shape[-1]
        self.experts = cfg.experts
        self.p = cfg.dropout
        self.W_1 = nn.Linear(d, cfg.attention_dim)
        self.W_2 = nn.Linear(cfg.attention_dim, 1)
        self.W_3 = nn.Linear(d, cfg.experts, bias=False)
        self.W_k = nn.Linear(d, cfg.experts * cfg.dim)    # all experts side by side
        self.scale = nn.Parameter(torch.ones(cfg.experts * cfg.dim))    # of the experts' LayerNorms
        self.shift = nn.Parameter(torch.zeros(cfg.experts * cfg.dim))
        mask = mask.clone()
        mask[0] = False                                   # padding has nothing
        has = mask.any(1)                                 # (N+1,)
        padding = has.new_zeros(1).long()
        kept = torch.cat([padding, has.nonzero()[:, 0]])  # padding, and items that have a vector
        if len(kept) < len(x):    # no copy of a catalog where all have one
            x, mask = x[kept], mask[kept]
        if not x.sum().isfinite():    # what the mask calls missing may be anything
            x = torch.where(mask[..., None], x, 0)
        row = has.cumsum(0) * has    # (N+1,) an item's row of x; 0: it has none
        self.register_buffer("x", x.to(self.scale.dtype), persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("row", row, persistent=False)

    def forward(self, ids=None):
        """z of the items ids (n,), or of all items: (n, d_0)."""
        if ids is not None:
            rows = self.row[ids]
            return self.encode(self.x[rows], self.mask[rows])
        if len(self.x) <= CHUNK:
            z = self.encode(self.x, self.mask)
        else:    # computed again in the backward pass
            parts = zip(self.x.split(CHUNK), self.mask.split(CHUNK))
            z = torch.cat([checkpoint(self.encode, x, m, use_reentrant=False) for x, m in parts])
        return z if len(z) == len(self.row) else F.embedding(self.row, z)

    def encode(self, x, mask):
        """x (n, S, d), mask (n, S) -> z (n, d_0), 0 where there is no vector.

        e = sum_s alpha_s x_s, eq. (3);  E_k = LayerNorm(dropout(W_k e + b_k)), eq. (4);
        z = sum_k g_k E_k, g = softmax(W_3 e), eq. (5)
        """
        e = x[:, 0] if x.shape[1] == 1 else self.attend(x, mask)           # (n, d): reading 1
        E = F.dropout(self.W_k(e), self.p, self.training)
        E = E.unflatten(1, (self.experts, -1))                             # (n, O, d_0)
        E = F.layer_norm(E, E.shape[2:])
        E = E * self.scale.view(self.experts, -1) + self.shift.view(self.experts, -1)    # eq. (4)
        g = self.W_3(e).softmax(1)                                         # (n, O)
        z = torch.einsum("no,nod->nd", g.to(E.dtype), E)                   # eq. (5)
        return z.to(self.scale.dtype) * mask.any(1, keepdim=True)

    def attend(self, x, mask):
        """alpha = softmax((x W_1 + b_1) W_2 + b_2), e = sum_s alpha_s x_s, eq. (3): -> e (n, d).

        Two linear maps in a row are one, x (W_1 W_2) + (b_1 W_2 + b_2): a vector instead of a
        matrix.
        """
        if torch.is_autocast_enabled(x.device.type):    # once: x is large, and is read twice
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = self.W_2.weight @ self.W_1.weight                         # (1, d)
        scores = F.linear(x, weight, self.W_2(self.W_1.bias))[..., 0]      # (n, S)
        lowest = torch.finfo(scores.dtype).min
        alpha = scores.masked_fill(~mask, lowest).softmax(1) * mask        # reading 2
        return torch.einsum("ns,nsd->nd", alpha.to(x.dtype), x)


# ---------------- the Transformer

class Block(nn.Module):
    """Self-attention, then feed-forward; each with dropout, residual sum and LayerNorm."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        self.attention_dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.inner = nn.Linear(dim, 4 * dim)
        self.outer = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x, mask):
        """x (B, L, D), mask (B, 1, L, L) True = may look -> (B, L, D)"""
        projected = self.qkv(x).unflatten(-1, (3, self.heads, -1))    # (B, L, 3, heads, D / heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4)                    # (B, heads, L, D / heads)
        p = self.attention_dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
        return self.out(a.transpose(1, 2).flatten(2))

    def forward(self, x, mask):
        x = self.norm1(x + self.dropout(self.attend(x, mask)))
        feed_forward = self.outer(F.gelu(self.inner(x)))
        return self.norm2(x + self.dropout(feed_forward))


class M2SE(nn.Module):
    """Multimodal Mixup Sequence Encoder: what both stages share, and fine-tuning takes over."""

    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        self.encoders = nn.ModuleDict({
            m: ModalityEncoder(cfg, catalog[stack], catalog[stack + "_mask"])
            for m, stack in STACKS.items()
        })
        self.position = nn.Parameter(torch.empty(cfg.max_len, cfg.dim))
        self.norm = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(
            Block(cfg.dim, cfg.heads, cfg.dropout) for _ in range(cfg.layers)
        )
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        for encoder in self.encoders.values():
            nn.init.zeros_(encoder.W_3.weight)    # all experts alike: reading 3

    def items(self, ids=None, modalities=tuple(STACKS)):
        """{"text": z^t, "image": z^v}, or one of them, of items ids (n,), or of all: (n, d_0)."""
        return {m: self.encoders[m](ids) for m in modalities}

    def transform(self, streams, seq):
        """The one Transformer over several sequences of vectors.

        streams: k times (B, L, D), with the ids seq (B, L) -> (k, B, L, D)
        """
        k, L = len(streams), seq.shape[1]
        x = torch.cat(streams) + self.position[-L:]                        # (k B, L, D)
        x = self.dropout(self.norm(x))
        real = (seq != 0)[:, None, None, :]                                # (B, 1, 1, L)
        causal = torch.ones(L, L, dtype=torch.bool, device=seq.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=seq.device)    # padding must see something
        mask = ((causal & real) | itself).repeat(k, 1, 1, 1)               # (k B, 1, L, L)
        for block in self.blocks:
            x = block(x, mask)
        return x.unflatten(0, (k, -1))


# ---------------- pre-training, eqs. (6) to (11)

def random_drop(seq, rho):
    """Sequence random dropout (reading 4): seq (B, L) without the dropped items, and where to look.

    Returns what is left, moved to the right, (B, L), and for each place of seq the place in it of
    the last item kept up to there, (B, L).
    """
    real = seq != 0
    first = real & (real.cumsum(1) == 1)
    keep = real & ((torch.rand(seq.shape, device=seq.device) >= rho) | first)
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)    # the rest moves up, padding left
    thinned = seq.gather(1, order) * keep.gather(1, order)
    count = keep.cumsum(1)                                      # kept up to each place
    place = seq.shape[1] - count[:, -1:] + count - 1
    return thinned, place.clamp(min=0)                          # before the first: no target there


def mixup(z_t, z_v, seq, p):
    """Complementary sequence mixup: z^t and z^v (B, L, D) swapped at the same items, each with
    probability p -> M^t, M^v."""
    swap = (torch.rand(seq.shape, device=seq.device) < p) & (seq != 0)     # (B, L)
    swap = swap[..., None]
    return torch.where(swap, z_v, z_t), torch.where(swap, z_t, z_v)


def similarity(a, b, tau):
    """log f = cos(a, b) / tau of eq. (7), of all pairs of rows: (R, D), (R, D) -> (R, R).

    At least in float32: bfloat16 is too coarse for a cosine over a small tau.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.to(wide), dim=-1), F.normalize(b.to(wide), dim=-1)
        return a @ b.T / tau


def nip(m_hat, m_tilde, z, excluded, weight, tau):
    """NIP: -log [f(mhat, z) + f(mtilde, z)] / sum_j [f(mhat, z_j) + f(mtilde, z_j)],

    eqs. (7), (8). m_hat, m_tilde, z (R, D); excluded (R, R): pairs that are no negatives;
    weight (R,): of each row in the mean.
    """
    logits = torch.stack([similarity(m_hat, z, tau), similarity(m_tilde, z, tau)])    # (2, R, R)
    right = logits.diagonal(dim1=1, dim2=2).logsumexp(0)                              # (R,)
    every = logits.masked_fill(excluded, -torch.inf).logsumexp((0, 2))                # (R,)
    return ((every - right) * weight).sum()


def cmcl(m_hat, m_tilde, excluded, weight, tau):
    """Cross modality contrastive loss: mhat against mtilde of its row, symmetric, eqs. (9), (10).

    The negatives of mhat_i are the other rows' mtilde_j and mhat_j. Arguments as of `nip`.
    """
    across = similarity(m_hat, m_tilde, tau)                                          # (R, R)
    hat = one_direction(across, similarity(m_hat, m_hat, tau), excluded)
    tilde = one_direction(across.T, similarity(m_tilde, m_tilde, tau), excluded)
    return -.5 * ((hat + tilde) * weight).sum()


def one_direction(across, within, excluded):
    """ell of eq. (9): log-softmax of the diagonal of `across` among all pairs -> (R,)."""
    itself = torch.eye(len(across), dtype=torch.bool, device=across.device)
    across_known = across.masked_fill(excluded, -torch.inf)
    within_known = within.masked_fill(excluded | itself, -torch.inf)
    return across.diagonal() - torch.cat([across_known, within_known], 1).logsumexp(1)


def projections(cfg):
    """W_t and W_v of eq. (6)."""
    if not cfg.use_proj:
        return nn.ModuleDict({m: nn.Identity() for m in STACKS})
    return nn.ModuleDict({m: nn.Linear(cfg.dim, cfg.dim) for m in STACKS})


class Pretrain(nn.Module):
    """L_pre-train, eq. (11). In training mode with random dropout and mixup."""
    rows = "sequences"    # reading 12

    def __init__(self, cfg, catalog):
        super().__init__()
        self.cfg = cfg
        self.m2se = M2SE(cfg, catalog)
        self.W = projections(cfg)

    def forward(self, batch):
        """{"nip_text", "cmcl_text", "nip_image", "cmcl_image"} of a batch of sequences."""
        return contrast(self.cfg, self.m2se, self.W, batch | {"seq": recent(self, batch)})


def contrast(cfg, m2se, W, batch, z=None):
    """NIP and CMCL of a batch, eqs. (6) to (11). z: of all items, where the caller has it."""
    seq = batch["seq"]
    target = batch["target"][:, -seq.shape[1]:]
    read = None
    if m2se.training:
        seq, read = random_drop(seq, cfg.rho)
    place = torch.stack([seq, target])                            # (2, B, L): rows of z
    if z is None:
        ids = None
        if not seq.is_cuda or len(m2se.encoders["text"].row) > place.numel():
            # the items of the batch, each once; a GPU would have to wait while they are counted
            ids, place = place.unique(return_inverse=True)
        z = m2se.items(ids)
    streams = [F.embedding(place[0], z[m]) for m in STACKS]       # Z^t, Z^v: (B, L, D)
    if m2se.training and cfg.use_mixup:
        p = cfg.p_max * torch.rand((), device=seq.device)         # reading 5
        streams = mixup(*streams, seq, p)
    h = m2se.transform(streams, seq)                              # h^t, h^v: (2, B, L, D)
    if read is not None:                                          # reading 4
        h = h.gather(2, read[None, :, :, None].expand(len(h), -1, -1, h.shape[-1]))
    h = h.flatten(1, 2)                                           # (2, R, D), R = B L
    target = target.flatten()                                     # (R,)
    answer = place[1].flatten()                                   # (R,) the target's row of z
    user = batch["user"][:, None].expand_as(seq).flatten()        # (R,)
    if not target.is_cuda:    # a GPU would have to wait while they are counted
        real = target != 0
        h, target, answer, user = h[:, real], target[real], answer[real], user[real]
    weights = {"both": mean_over(target != 0)}
    for m in STACKS:
        weights[m] = mean_over(m2se.encoders[m].row[target] > 0)  # reading 2; padding has no row
    losses = defaultdict(float)
    n = max(1, -(-len(target) // PAIRS))                          # reading 9
    columns = (target, user, answer, *weights.values())
    for states, *part in zip(h.tensor_split(n, 1), *(column.tensor_split(n) for column in columns)):
        part_target, part_user, part_answer, *part_weights = part
        weight = dict(zip(weights, part_weights))
        same = part_target == part_target[:, None]                # reading 8
        same |= part_user == part_user[:, None]                   # reading 12
        for m, own, other in zip(STACKS, states, states.flip(0)):
            m_hat, m_tilde = W[m](own), W[m](other)               # eq. (6)
            if cfg.use_nip:
                z_next = F.embedding(part_answer, z[m])
                excluded = no_negatives(same, weight[m])
                losses[f"nip_{m}"] += nip(m_hat, m_tilde, z_next, excluded, weight[m], cfg.tau)
            if cfg.use_cmcl:
                excluded = no_negatives(same, weight["both"])
                term = cmcl(m_hat, m_tilde, excluded, weight["both"], cfg.tau)
                losses[f"cmcl_{m}"] += cfg.lam * term             # eq. (11)
    return losses


def mean_over(real):
    """Weights (R,) that make a sum the mean over the rows that count."""
    return real / real.sum().clamp(min=1)


def no_negatives(same, weight):
    """(R, R): pairs i, j where j is no negative of i; a row is never excluded for itself."""
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    return (same | (weight == 0)) & ~itself


# ---------------- fine-tuning, eqs. (12), (13)

class MSM4SR(nn.Module):
    """The pre-trained encoder with ID embeddings, fine-tuned to rank all items: eqs. (12), (13)."""

    def __init__(self, cfg, catalog):
        super().__init__()
        self.cfg = cfg
        self.m2se = M2SE(cfg, catalog)
        self.W = projections(cfg)
        self.pretrained = shapes_of(self.state_dict())    # what a state of Pretrain holds
        if not cfg.e2e:
            self.W = None                                 # eq. (6) belongs to pre-training
        self.scored = tuple(STACKS) if cfg.modality == "both" else (cfg.modality,)
        if cfg.use_id:
            self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim)    # E; row 0 is padding
            nn.init.normal_(self.item.weight, std=0.02)
            with torch.no_grad():
                self.item.weight[0] = 0    # padding

    def init_from(self, state):
        """Take over a state of Pretrain, all but the projections of eq. (6).

        Raises ValueError unless it holds exactly the weights of Pretrain.
        """
        wrong = self.pretrained ^ shapes_of(state)
        check(not wrong, f"a pre-trained state holds exactly the weights of Pretrain, here differ "
                         f"{sorted(wrong)[:3]}")
        mine = {k.removeprefix("m2se."): v for k, v in state.items() if k.startswith("m2se.")}
        self.m2se.load_state_dict(mine)
        if self.cfg.freeze_transformer:                   # reading 13
            self.m2se.position.requires_grad_(False)
            self.m2se.blocks.requires_grad_(False)

    def encode_items(self, z=None):
        """{modality: F + E (N+1, D)} of what is scored, eq. (12), and "candidates" (N+1, D or 2 D):
        an item's rows side by side, as score needs them."""
        if z is None:
            alone = self.cfg.modality in STACKS
            z = self.m2se.items(modalities=self.scored if alone else tuple(STACKS))
        if self.cfg.modality == "sum":                    # reading 13
            z = {"sum": z["text"] + z["image"]}
        table = {}
        for m in self.scored:
            table[m] = z[m] + self.item.weight if self.cfg.use_id else z[m]
        rows = list(table.values())
        if self.cfg.cosine:                               # reading 11
            rows = [F.normalize(row, dim=-1) / self.cfg.tau for row in rows]
        table["candidates"] = torch.cat(rows, 1)
        return table

    def states(self, seq, table):
        """h^t and h^v side by side, (B, L) -> (B, L, D or 2 D): eq. (12) is then one product."""
        streams = [F.embedding(seq, table[m]) for m in self.scored]        # M + E; p = rho = 0
        h = self.m2se.transform(streams, seq)                              # (k, B, L, D)
        if self.cfg.cosine:                                                # reading 11
            h = F.normalize(h, dim=-1)
        return torch.cat(list(h), -1)

    def forward(self, batch):
        """{"next_item": loss}, eq. (13), and for e2e the terms of eq. (11)."""
        seq = recent(self, batch)
        target = batch["target"][:, -seq.shape[1]:]
        z = self.m2se.items() if self.cfg.e2e else None    # eq. (11) reads both modalities
        table = self.encode_items(z)
        states = self.states(seq, table)                                   # (B, L, 2 D)
        if self.cfg.prefixes:    # one target a row, the last
            states, target = states[:, -1:], target[:, -1:]
        loss = softmax_loss(states.flatten(0, 1), table["candidates"], target.flatten())
        losses = {"next_item": loss}                                       # eqs. (12), (13)
        if self.cfg.e2e:
            padding = seq.shape[1] - target.shape[1]
            target = F.pad(target, (padding, 0))                           # (B, L)
            pairs = batch | {"seq": seq, "target": target}
            losses |= contrast(self.cfg, self.m2se, self.W, pairs, z)      # eq. (11)
        return losses

    def score(self, batch, table):
        """h^t (F^t + E)^T + h^v (F^v + E)^T, eq. (12) before the softmax: scores (B, N+1)."""
        seq = recent(self, batch)
        return self.states(seq, table)[:, -1] @ table["candidates"].T

    def as_product(self, batch, table):
        """Users (B, D or 2 D) and items (N+1, the same) whose products are the scores."""
        return self.states(recent(self, batch), table)[:, -1], table["candidates"]


def shapes_of(state):
    """{(name, *shape)} of a state's weights."""
    return {(name, *value.shape) for name, value in state.items()}


Model, Config = MSM4SR, MSM4SRConfig


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
    N, B, L, S = 100, 8, 10, 3
    items = torch.randint(1, N + 1, (B, L + 1))
    catalog = {"n_items": N}
    for stack in STACKS.values():
        catalog[stack] = torch.randn(N + 1, S, 24)
        catalog[stack + "_mask"] = torch.rand(N + 1, S) > .3
    pretrain = Pretrain(MSM4SRConfig(), catalog)
    model = MSM4SR(MSM4SRConfig(), catalog)
    model.init_from(pretrain.state_dict())
    batch = {"user": torch.arange(B), "seq": items[:, :-1], "target": items[:, 1:]}
    losses = {**pretrain(batch), **model(batch)}
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
    shown = {name: round(loss.item(), 4) for name, loss in losses.items()}
    print(shown, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
