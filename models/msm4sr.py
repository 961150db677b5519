"""MSM4SR: Multimodal Pre-training Framework for Sequential Recommendation via Contrastive Learning.
Lingzi Zhang, Xin Zhou, Zhiqi Shen. 2023. arXiv:2303.11879 (version 1).

An item is a few sentences, and a few pictures told as sentences of keywords: vectors of one language model. Attention and
a mixture of experts turn each stack into one vector per modality; one Transformer reads the text sequence and the image
sequence, between which some items are swapped. Pre-training, without item ids: what both sequences say of the next item
must agree with its content (NIP) and with each other (CMCL). Fine-tuning adds an embedding per item id and ranks all items.

    sentences x^t -> attention (3) -> experts (4, 5) = z^t --+-> M^t --> Transformer --> h^t    hat: own, tilde: the other
                                              swap with ratio p              |
    pictures  x^v -> attention (3) -> experts (4, 5) = z^v --+-> M^v --> (the same)  --> h^v
    pre-training   mhat^t, mtilde^t = h^t W_t, h^v W_t;  mhat^v, mtilde^v = h^v W_v, h^t W_v (6)
                   NIP: mhat, mtilde against z of the next item (7, 8);  CMCL: mhat against mtilde (9, 10);  sum (11)
    fine-tuning    M + E instead of M, nothing dropped or swapped;  F^t, F^v = z^t, z^v of all items
                   score = h^t (F^t + E)^T + h^v (F^v + E)^T (12, 13)

Readings, where the paper is silent, misprinted or differs from the code its authors released:
  P1-P3    keywords, sentences and their vectors are the feature extractor's matter; both modalities may differ in width.
           Where an item has one vector per modality, as with CLIP features of a title and a picture, eq. 3 has no choice.
  P4       eq. 3: slots without a vector get no attention. An item without the modality has z = 0 and is no target and no
           negative of that modality's NIP. W_1 and W_2 learn (the code cuts their gradient).
  P5       eqs. 4-5: experts with bias, all of them used; the gate has none, no noise, and starts even.
  P6-P7    each item is dropped with probability rho, its pair (P15) with it, one stays at least, the rest moves up. One p
           from U(0, 0.5) per batch; M^t and M^v come from the same draw; padding is never swapped, a missing modality is.
  P8       last rows: causal Transformer, LayerNorm after the residual sums, GELU, as in BERT; positions from the end.
  P9       eq. 6 as printed. use_proj false is W_t = W_v = 1, where both CMCL terms are the same; the released command, which
           leaves W out, has one of them, and mhat alone in NIP.
  P10-P11  eqs. 7-10: cosine, log-sum-exp, means over the pairs; eq. 9 symmetric, the second direction by columns. A row
           with the same target is no negative: -inf, not 0. Batches of long histories are contrasted in parts: the memory
           grows with the square of the pairs, of which the paper has 1024.
  P13-P14  pre-training runs to its last epoch, unvalidated. eq. 12: cosines over tau, as the code has it (or cosine false).
  P15      a target at every position instead of one row per prefix, in both stages: the same pairs (S_j, i_j), faster and
           as good on scientific-mm. A user's pairs then share a batch, drop and mixup, and are no negatives to each other.
  P16-P18  w/o Pre-train and E2E: pretrain_epochs 0. freeze_transformer keeps positions and blocks of a pre-trained state,
           which fits any catalog of equal widths; the modality encoders, the LayerNorm of the input and E learn.
  P20-P21  inner width 4 d_0 and dropout 0.2 are the code's. The history stays in the ranking.
  and:     a step encodes an item once, not once per place: all items in fine-tuning, where all are candidates; those of the
           batch in pre-training, unless a GPU has a catalog smaller than the batch: finding them would cost it a wait.
Reads from the catalog: n_items, sentences, sentences_mask, pictures, pictures_mask. The stacks are buffers, not weights.
"""
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

READS = ("sentences", "sentences_mask", "pictures", "pictures_mask")
STACKS = {"text": "sentences", "image": "pictures"}      # t and v of the equations
CHUNK = 2 ** 16                                          # items whose experts are kept in memory at a time
PAIRS = 2 ** 11                                          # of a batch, at most, that are contrasted with each other (P10-P11)


@dataclass
class MSM4SRConfig:
    dim: int = 64                        # d_0 (Implementation Details)
    attention_dim: int = 64              # d_a (Implementation Details)
    experts: int = 8                     # O (Implementation Details, Fig. 3c)
    heads: int = 2
    layers: int = 2                      # L
    dropout: float = 0.2                 # not in the paper; the released code's
    max_len: int = 50
    rho: float = 0.2                     # share of items that sequence random dropout drops (Implementation Details)
    p_max: float = 0.5                   # mixup ratio p is drawn between 0 and 0.5 (section III-B3)
    tau: float = 0.07                    # temperature (Implementation Details)
    lam: float = 0.01                    # lambda of eq. 11 (Implementation Details, Fig. 3a)
    cosine: bool = True                  # P14; false: the inner products of eq. 12 as printed
    use_proj: bool = True                # P9; false: W_t and W_v of eq. 6 are left out
    use_nip: bool = True                 # w/o NIP, Table III
    use_cmcl: bool = True                # w/o CMCL, Table III
    use_mixup: bool = True               # w/o Mixup, Table III
    e2e: bool = False                    # E2E, Table III: eqs. 11 and 13 summed in one run; needs pretrain_epochs 0
    modality: Literal["both", "text", "image"] = "both"  # text: -T, image: -V, Table IV: the one that is scored
    use_id: bool = True                  # false: fine-tuning without ID embeddings, for cold items, Table V
    freeze_transformer: bool = False     # fine-tuning leaves the pre-trained Transformer as it is, Table VI
    lr: float = 1e-3                     # of fine-tuning; searched in 1e-4, 5e-4, 1e-3 (Implementation Details)
    weight_decay: float = 0.0            # of both stages; the paper searched in 1e-4, 5e-4, 1e-3 (Implementation Details)
    batch_size: int = 200                # sequences of 5 pairs: the paper's 1024 (P15)
    epochs: int = 300                    # of fine-tuning, at most; not in the paper
    patience: int = 10                   # "does not increase for 10 epochs"
    pretrain_epochs: int = 300           # "pre-trained for 300 epochs"; 0: w/o Pre-train, Table III
    pretrain_lr: float = 1e-3            # "learning rate to 0.001"
    prefixes: bool = False               # P15; one target a row, in fine-tuning


PRESETS = {
    "scientific-mm": dict(batch_size=256, pretrain_epochs=40), "demo": dict(batch_size=128, pretrain_epochs=5),
    "beauty": dict(batch_size=512, lr=2e-3, tau=0.1, dropout=0.3, epochs=40, patience=5, pretrain_epochs=10),
}


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


class ModalityEncoder(nn.Module):
    """x (N+1, S, d) frozen stacks of one modality -> z (N+1, d_0): attention over an item's vectors, mixture of experts."""

    def __init__(self, cfg, x, mask):
        super().__init__()
        self.O, self.p, d = cfg.experts, cfg.dropout, x.shape[-1]
        self.W_1, self.W_2 = nn.Linear(d, cfg.attention_dim), nn.Linear(cfg.attention_dim, 1)
        self.W_3 = nn.Linear(d, cfg.experts, bias=False)
        self.W_k = nn.Linear(d, cfg.experts * cfg.dim)                             # all experts side by side
        self.scale, self.shift = (nn.Parameter(torch.full((cfg.experts * cfg.dim,), v)) for v in (1., 0.))   # LayerNorms'
        mask = mask.clone()
        mask[0] = False                                                            # padding has nothing
        has = mask.any(1)                                                          # (N+1,)
        rows = torch.cat([has.new_zeros(1).long(), has.nonzero()[:, 0]])           # what is kept: padding, and who has it
        x, mask = (x, mask) if len(rows) == len(x) else (x[rows], mask[rows])      # no copy of a catalog where all have it
        self.register_buffer("x", x.to(self.scale.dtype), persistent=False)
        self.register_buffer("mask", mask, persistent=False)                       # False = no vector there
        self.register_buffer("row", has.cumsum(0) * has, persistent=False)         # (N+1,) of an item; 0: has no vector

    def forward(self, ids=None):
        """z of the items ids (n,), or of all: (n, d_0). Item by item the same as one by one."""
        if ids is not None:
            rows = self.row[ids]
            return self.encode(self.x[rows], self.mask[rows])
        if len(self.x) <= CHUNK:
            z = self.encode(self.x, self.mask)
        else:                                                                      # computed again in the backward pass
            parts = zip(self.x.split(CHUNK), self.mask.split(CHUNK))
            z = torch.cat([checkpoint(self.encode, *part, use_reentrant=False) for part in parts])
        return z if len(z) == len(self.row) else F.embedding(self.row, z)

    def encode(self, x, mask):                                                     # (n, S, d), (n, S)
        e = x[:, 0] if x.shape[1] == 1 else None                                   # (n, d); of one vector alpha is 1
        if e is None:       # (x W_1 + b_1) W_2 + b_2 = x (W_1 W_2) + (b_1 W_2 + b_2): a vector instead of a matrix
            scores = F.linear(x, self.W_2.weight @ self.W_1.weight, self.W_2(self.W_1.bias))[..., 0]    # (n, S)
            alpha = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(1) * mask          # P4
            e = torch.einsum("ns,nsd->nd", alpha.to(x.dtype), x)                                        # eq. (3)
        E = F.dropout(self.W_k(e), self.p, self.training).unflatten(1, (self.O, -1))                    # (n, O, d_0)
        E = F.layer_norm(E, E.shape[2:]) * self.scale.view(self.O, -1) + self.shift.view(self.O, -1)    # eq. (4)
        g = self.W_3(e).softmax(1)                                                                      # (n, O)
        z = torch.einsum("no,nod->nd", g.to(E.dtype), E).to(self.scale.dtype)                           # eq. (5)
        return z * mask.any(1, keepdim=True)                                       # without the modality: 0


class Block(nn.Module):
    """Self-attention and feed-forward, each with dropout, residual sum and LayerNorm."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.inner, self.outer = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x, mask):                                  # x (B, L, D), mask (B, 1, L, L) True = may look
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.p if self.training else 0.)
        x = self.norm1(x + self.dropout(self.out(a.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.dropout(self.outer(F.gelu(self.inner(x)))))


class M2SE(nn.Module):
    """Multimodal Mixup Sequence Encoder: what both stages share, and what fine-tuning takes over from pre-training."""

    def __init__(self, cfg, catalog):
        super().__init__()
        if cfg.dim % cfg.heads or not (0 <= cfg.rho < 1 and 0 <= cfg.p_max <= .5 and cfg.tau > 0 and cfg.lam >= 0):
            raise ValueError("dim is a multiple of heads, rho from 0 to below 1, p_max from 0 to 0.5, tau above 0, lam >= 0")
        if min(cfg.attention_dim, cfg.experts) < 1:
            raise ValueError("attention_dim and experts are at least 1")
        if cfg.e2e and cfg.pretrain_epochs or (cfg.e2e or cfg.pretrain_epochs) and not (cfg.use_nip or cfg.use_cmcl):
            raise ValueError("pretrain_epochs must be 0 for e2e, and without NIP and CMCL")
        self.encoders = nn.ModuleDict({m: ModalityEncoder(cfg, catalog[name], catalog[name + "_mask"])
                                       for m, name in STACKS.items()})
        self.position = nn.Parameter(torch.empty(cfg.max_len, cfg.dim))
        self.norm, self.dropout = nn.LayerNorm(cfg.dim), nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg.dim, cfg.heads, cfg.dropout) for _ in range(cfg.layers))
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        [nn.init.zeros_(encoder.W_3.weight) for encoder in self.encoders.values()]           # P5: all experts alike

    def items(self, ids=None, of=tuple(STACKS)):
        """{"text": z^t, "image": z^v}, or one of them, of the items ids (n,), or of all: (n, d_0) each."""
        return {m: self.encoders[m](ids) for m in of}

    def transform(self, streams, seq):
        """The one Transformer over several sequences of vectors, k times (B, L, D) with the ids seq (B, L): (k, B, L, D)."""
        k, L = len(streams), seq.shape[1]
        x = self.dropout(self.norm(torch.cat(streams) + self.position[-L:]))       # (k B, L, D)
        real = (seq != 0)[:, None, None, :]                                        # (B, 1, 1, L)
        square = torch.ones(L, L, dtype=torch.bool, device=seq.device)
        mask = square.tril() & real | square.tril().triu()                         # causal; itself also where all is padding
        for block in self.blocks:
            x = block(x, mask.repeat(k, 1, 1, 1))                                  # mask (k B, 1, L, L)
        return x.unflatten(0, (k, -1))


def random_drop(seq, target, rho):
    """Sequence random dropout: each item goes with probability rho, its pair with it; the rest moves up, padding left."""
    keep = (torch.rand(seq.shape, device=seq.device) >= rho) & (seq != 0)          # (B, L)
    keep[:, -1] |= ~keep.any(1)                                                    # P6: the last one stays if all would go
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)
    kept = keep.gather(1, order)
    return seq.gather(1, order) * kept, target.gather(1, order) * kept


def mixup(z_t, z_v, seq, p):
    """Complementary sequence mixup: z^t and z^v (B, L, D) swapped at the same items, each with probability p -> M^t, M^v."""
    swap = (torch.rand(seq.shape, device=seq.device) < p) & (seq != 0)             # (B, L), padding never
    return torch.where(swap[..., None], z_v, z_t), torch.where(swap[..., None], z_t, z_v)


def similarity(a, b, tau):
    """log f of eq. (7) for all pairs of rows: cosine / tau, (R, D), (R, D) -> (R, R)."""
    cosine = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    return cosine.to(torch.promote_types(cosine.dtype, torch.float32)) / tau


def nip(m_hat, m_tilde, z, excluded, weight, tau):
    """Modality-specific next item prediction, eqs. (7), (8). excluded (R, R): pairs that are no negatives; weight (R,)."""
    logits = torch.stack([similarity(m_hat, z, tau), similarity(m_tilde, z, tau)])                # (2, R, R)
    right = logits.diagonal(dim1=1, dim2=2).logsumexp(0)                                          # (R,)
    return ((logits.masked_fill(excluded, -torch.inf).logsumexp((0, 2)) - right) * weight).sum()


def cmcl(m_hat, m_tilde, excluded, weight, tau):
    """Cross modality contrastive loss, eqs. (9), (10), symmetric."""
    itself = torch.eye(len(m_hat), dtype=torch.bool, device=m_hat.device)
    def ell(across, within):                                                                      # (R, R) both -> (R,)
        negatives = [across.masked_fill(excluded, -torch.inf), within.masked_fill(excluded | itself, -torch.inf)]
        return across.diagonal() - torch.cat(negatives, 1).logsumexp(1)
    across = similarity(m_hat, m_tilde, tau)
    both = ell(across, similarity(m_hat, m_hat, tau)) + ell(across.T, similarity(m_tilde, m_tilde, tau))
    return -.5 * (both * weight).sum()


class Pretrain(nn.Module):
    """L_pre-train, eq. (11). In training mode with random dropout and mixup."""
    rows = "sequences"                                           # P15: every position is a pair of a sequence and the next

    def __init__(self, cfg, catalog):
        super().__init__()
        self.cfg, self.m2se = cfg, M2SE(cfg, catalog)
        self.W = nn.ModuleDict({m: nn.Linear(cfg.dim, cfg.dim) if cfg.use_proj else nn.Identity() for m in STACKS})

    def forward(self, batch, z=None):                            # z: of all items, where the caller has it
        cfg, m2se, seq, target = self.cfg, self.m2se, batch["seq"], batch["target"]
        if self.training:
            seq, target = random_drop(seq, target, cfg.rho)
        ids, place = None, torch.stack([seq, target])                              # (2, B, L): rows of z
        if z is None and (not seq.is_cuda or len(m2se.encoders["text"].row) > place.numel()):
            ids, place = place.unique(return_inverse=True)                         # the items of the batch, each once
        z = z or m2se.items(ids)
        streams = [F.embedding(place[0], z[m]) for m in STACKS]                    # Z^t, Z^v: (B, L, D)
        if self.training and cfg.use_mixup:
            streams = mixup(*streams, seq, cfg.p_max * torch.rand((), device=seq.device))    # P7: one ratio a batch
        h = m2se.transform(streams, seq).flatten(1, 2)                             # (2, R, D), R = B L: h^t, h^v
        target, answer = target.flatten(), place[1].flatten()                      # (R,)
        user = batch["user"][:, None].expand_as(seq).flatten()
        if not target.is_cuda:                      # choosing rows would wait for a GPU; trimmed batches are nearly full
            h, answer, user, target = h[:, target != 0], answer[target != 0], user[target != 0], target[target != 0]
        real = torch.stack([target != 0, *(m2se.encoders[m].row[target] > 0 for m in STACKS)])     # P4; padding has no row
        weights = real / real.sum(1, keepdim=True).clamp(min=1)                    # (3, R): of means over all parts
        n, losses = max(1, -(-len(target) // PAIRS)), defaultdict(float)
        parts = (x.tensor_split(n, -1) for x in (target, user, answer, weights))
        for states, t, u, a, w in zip(h.tensor_split(n, 1), *parts):
            itself = torch.eye(len(t), dtype=torch.bool, device=t.device)
            same = (t == t[:, None]) | (u == u[:, None])                           # P10, P15: no negatives of each other
            every, *among = [((same | (weight == 0)) & ~itself, weight) for weight in w]
            for m, own, other, having in zip(STACKS, states, states.flip(0), among):
                m_hat, m_tilde = self.W[m](own), self.W[m](other)                  # eq. (6)
                if cfg.use_nip:
                    losses[f"nip_{m}"] += nip(m_hat, m_tilde, F.embedding(a, z[m]), *having, cfg.tau)
                if cfg.use_cmcl:
                    losses[f"cmcl_{m}"] += cfg.lam * cmcl(m_hat, m_tilde, *every, cfg.tau)
        return losses                                                              # eq. (11): the loop minimises the sum


class MSM4SR(Pretrain):
    """The pre-trained encoder with ID embeddings, fine-tuned to rank all items."""

    def __init__(self, cfg, catalog):
        super().__init__(cfg, catalog)
        self.pretrained = {(k, *v.shape) for k, v in self.state_dict().items()}
        self.W = self.W if cfg.e2e else None                     # eq. (6) belongs to pre-training
        self.scored = tuple(STACKS) if cfg.modality == "both" else (cfg.modality,)
        if cfg.use_id:
            self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim, padding_idx=0)         # E
            nn.init.normal_(self.item.weight, std=0.02), nn.init.zeros_(self.item.weight[0])

    def init_from(self, state):
        """Take over a state of Pretrain: the ID table is new, the projections of eq. (6) are left behind, nothing else."""
        if wrong := self.pretrained ^ {(k, *v.shape) for k, v in state.items()}:
            raise ValueError(f"a pre-trained state holds exactly the weights of Pretrain, here differ {sorted(wrong)[:3]}")
        self.m2se.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("m2se.")})
        if self.cfg.freeze_transformer:                                            # P18: its input's LayerNorm learns
            self.m2se.position.requires_grad_(False), self.m2se.blocks.requires_grad_(False)

    def encode_items(self, z=None):
        """F + E per scored modality, and "candidates" (N+1, D or 2 D): an item's rows side by side, as score needs them."""
        z = z or self.m2se.items(of=self.scored)
        table = {m: z[m] + self.item.weight if self.cfg.use_id else z[m] for m in self.scored}
        rows = [F.normalize(t, dim=-1) / self.cfg.tau if self.cfg.cosine else t for t in table.values()]       # P14
        return table | {"candidates": torch.cat(rows, 1)}

    def states(self, seq, table):
        """h^t and h^v side by side, (B, L) -> (B, L, D or 2 D), so that eq. (12) is one product with the candidates."""
        h = self.m2se.transform([F.embedding(seq, table[m]) for m in self.scored], seq)    # M + E; p = rho = 0
        return torch.cat([F.normalize(s, dim=-1) if self.cfg.cosine else s for s in h], -1)                    # P14

    def forward(self, batch):
        z, target = self.m2se.items() if self.cfg.e2e else None, batch["target"]   # eq. (11) reads both modalities
        table = self.encode_items(z)
        states = self.states(batch["seq"], table)                                  # (B, L, 2 D)
        if self.cfg.prefixes:                                                      # one target a row, the last
            states, target = states[:, -1:], target[:, -1:]
        rows, answer = states.flatten(0, 1), target.flatten()
        if not answer.is_cuda:
            rows, answer = rows[answer != 0], answer[answer != 0]
        losses = {"next_item": SoftmaxLoss.apply(rows, table["candidates"], answer)}         # eqs. (12), (13)
        if self.cfg.e2e:
            target = F.pad(target, (batch["seq"].shape[1] - target.shape[1], 0))   # (B, L)
            losses |= super().forward(batch | {"target": target}, z)               # eq. (11)
        return losses

    def score(self, batch, table):
        return self.states(batch["seq"], table)[:, -1] @ table["candidates"].T     # eq. (12) before the softmax: (B, N+1)


Model, Config = MSM4SR, MSM4SRConfig


if __name__ == "__main__":
    torch.manual_seed(0)
    start, N, B, items = time.time(), 100, 8, torch.randint(1, 101, (8, 11))
    catalog = {"n_items": N} | {k: torch.rand(N + 1, 3) > .3 if "mask" in k else torch.randn(N + 1, 3, 24) for k in READS}
    pretrain, model = (kind(MSM4SRConfig(), catalog) for kind in (Pretrain, MSM4SR))
    model.init_from(pretrain.state_dict())
    batch = {"user": torch.arange(B), "seq": items[:, :-1], "target": items[:, 1:]}
    losses = pretrain(batch) | model(batch)
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    print({k: round(v.item(), 4) for k, v in losses.items()}, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
