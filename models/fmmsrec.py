"""FMMS-Rec: Video-Image-Sentence Multi-Modality Sequential Recommendation Model. Guowei Wang, Yicheng Di, Yuan Liu.
2024. ICIC 2024, posters, pages 992-1006. Not on arXiv; no code was released.

An item is what its pictures and its words say, nothing else: no item ids, so that a model can move to another shop. One
Transformer reads an item's modalities, each a token, and fills in those that are missing; the element-wise maximum is the
item. It is pre-trained to bring the modalities of an item together and to tell true pairs from false ones. Then the very
same Transformer reads a user's items in their order, [mask] at the end, and what it puts there is compared with all items.

    text  -> f_NN = E^S (2) --+ [mask] if missing     + modality embedding -> Transformer -> project, normalise
    image -> f_NN = E^I (1) --+                                                                 max (3a) = h_j
    pre-training   h of {I}, {S}, {I, S}, twice each: PWC (4), PWM with hard negatives (5), L_I, L_S, L_I-S (3b, 3c)
    item tower        E_j             + modality               -> Transformer -> max = h_j, all items once a step
    sequence tower    E_1 ... E_L [mask] + modality + position -> (the same)  -> max at [mask] = h
                                                                 score_j = cosine(h, h_j) / tau, cross entropy over all items

Readings, where the paper is silent, misprinted or contradicts itself (it numbers three equations 3: here 3a, 3b, 3c):
  F1-F3    eqs 1-2: pictures and words come as vectors of any encoder (a video: the mean of its frames). f_NN is Linear and
           LayerNorm, one per modality, and reads them standardised, or their common mean drowns what tells them apart.
  F4-F5    feature + modality (+ position) embedding, LayerNorm, dropout. One learned [mask] stands for a missing modality,
           attends and stays in the maximum; drop_missing leaves it out of both, as the ancestor MMSRec does. A masked item
           is an item without any modality. Positions start with the features' variance: with the usual 0.02 the sum drowns
           them, and a trained model then ranks a shuffled history as it ranks the true one.
  F6-F8    eq 3a: h^i, h^s after a Linear and a LayerNorm each; length 1 where similarities are taken. Blocks: LayerNorm
           after the residual sums, GELU, inner width 2 dim without a dropout of its own, one more LayerNorm at the end.
  F9       L_I, L_S, L_I-S: InfoNCE between two passes with different dropout, of items that have the whole group; all
           weights 1. A third modality adds its groups (all subsets), and its pairs to PWC and PWM.
  F10-F11  eq 4: symmetric InfoNCE, rows and columns of one matrix, mean over the batch; as printed it would be maximised.
  F12      its tau multiplies: exp of a learned number, from 1 / 0.07, at most 100, on cosines; shared by F9's terms.
  F13      eq 5 with its minus sign: each true pair, its picture with a wrong text, its text with a wrong picture, drawn
           from the batch by similarity; p = sigmoid of a linear map of the pair's joint h.
  F14      i_j and s_j are passes of the shared encoder with the other modality masked.
  F15-F16  pre-training on the catalog's own items, a stage of its own, at the paper's one rate; positions are new after it.
  F17-F20  both towers are one set of weights; a sequence is L x M tokens, seen both ways. Positions are counted from the
           end, so that the [mask] slot is always the same; the item tower has none.
  F21      20 % of the inner places, of these 80 / 10 / 10 %; the last is always [mask] and always predicted.
  F22      one row per prefix. prefixes false: one row per user, whose inner places are then the only other examples.
  F23      cross entropy over all items, item tower with gradient every step, mean over all masked places.
  F24-F27  history stays in the ranking; Adam 1e-3, smaller batches than 8192; 20 items; the project's common data.
  F28      Table 2 is no target: with one test item NDCG@10 - NDCG@5 is at most (HR@10 - HR@5) / log2(7), which every method
           exceeds on every data set: such numbers cannot be. Compare the variants of section 4.6 with each other.

Reads from the catalog: n_items, text, image, has_text, has_image. Features are buffers, not weights.
"""
import math
import time
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MODALITIES = ("text", "image")                           # S and I; a third one is one more name here
READS = MODALITIES + tuple(f"has_{m}" for m in MODALITIES)
CHUNK = 2 ** 16                                          # items whose inner values are kept in memory at a time


@dataclass
class FMMSRecConfig:
    dim: int = 512                       # d, heads and layers are not in the paper; MMSRec's (F8)
    heads: int = 8
    layers: int = 2
    dropout: float = 0.5                 # in the blocks; not in the paper; MMSRec's
    input_dropout: float = 0.2           # of the sum of embeddings; not in the paper; MMSRec's
    max_len: int = 20                    # N = 20 for Amazon, 100 for Meituan (section 4.4)
    mask_ratio: float = 0.2              # "the masking rate for the model is set at 0.2" (section 4.4)
    tau: float = 0.05                    # temperature of the ranking; not in the paper; MMSRec's (F23)
    use_image: bool = True               # false: w/o V, ablation of section 4.6
    use_text: bool = True                # false: w/o S, ablation of section 4.6
    drop_missing: bool = False           # F5
    optimizer: str = "adam"              # section 4.4
    schedule: Literal["constant", "step", "linear", "cosine"] = "constant"          # of the learning rate
    lr: float = 1e-3                     # "Adam optimizer with a learning rate of 0.001" (section 4.4)
    weight_decay: float = 0.0
    batch_size: int = 1024               # rows, or items in pre-training; 8192 in the paper (section 4.4), on 8 GPUs (F25)
    epochs: int = 500                    # at most; not in the paper; MMSRec's
    patience: int = 10                   # not in the paper; MMSRec's
    pretrain_epochs: int = 50            # not in the paper; MMSRec's; 0: w/o P, with the two above w/o P+V, w/o P+S
    pretrain_lr: float = 1e-3            # F15
    prefixes: bool = True                # F22


SMALL = dict(heads=4, batch_size=256, pretrain_epochs=20, lr=2e-3, schedule="cosine", patience=40)
PRESETS = {"scientific-mm": SMALL | dict(dim=128, dropout=0.3, input_dropout=0.3, epochs=40),
           "demo": SMALL | dict(dim=64, dropout=0.1, input_dropout=0.1, batch_size=128, epochs=20)}


class SoftmaxLoss(torch.autograd.Function):
    """Cross entropy of states (R, D) over items 1..N of a table (N+1, D), summed over rows with a target / count.

    Works through the rows in chunks and makes the gradient on the way, so the (R, N+1) logits never exist as a whole.
    """

    @staticmethod
    def forward(ctx, states, items, target, count):
        weight = (target != 0) / count.clamp(min=1)                                # (R,)
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
        return d_states * slope, d_items * slope, None, None


def standardised(x, has):
    """(N+1, D) -> the same, per dimension mean 0 and deviation 1 over the items that have it, 0 for those that do not."""
    count = has.sum().clamp(min=1)
    x = (x - (x * has[:, None]).sum(0) / count) * has[:, None]
    return x / (x.square().sum(0) / count).sqrt().clamp(min=1e-6)


class Block(nn.Module):
    """Queries (B, Q, D) attend to keys (B, T, D), then feed-forward; dropout, residual sums, LayerNorm after them."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.p, dim = cfg.heads, cfg.dropout, cfg.dim
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.inner, self.outer = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(cfg.dropout)

    def forward(self, x, keys, mask):                            # mask (B, 1, 1, T) True = may be seen
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.query(x), *self.key_value(keys).chunk(2, -1)))
        p = self.p if self.training else 0.                                        # q (B, Q, heads, D / heads)
        if keys.shape[1] <= 4:           # an item's tokens: fused attention is slow for so few, and ends at 65,535 rows
            a = (q[:, :, None] * k[:, None]).sum(-1) / math.sqrt(q.shape[-1])      # (B, Q, T, heads)
            a = a.masked_fill(~mask[:, 0, ..., None], -torch.inf).softmax(2)
            a = (F.dropout(a, p)[..., None] * v[:, None]).sum(2)                   # (B, Q, heads, D / heads)
        else:
            a = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, dropout_p=p).transpose(1, 2)
        x = self.norm1(x + self.dropout(self.out(a.flatten(2))))
        return self.norm2(x + self.dropout(self.outer(F.gelu(self.inner(x)))))


class Encoder(nn.Module):
    """Item encoder and sequence encoder: what both towers and both stages share. An item is a sequence of length 1 (F17)."""

    def __init__(self, cfg, catalog):
        super().__init__()
        self.cfg = cfg
        self.modalities = tuple(m for m in MODALITIES if getattr(cfg, f"use_{m}", True))
        if cfg.dim % cfg.heads or not self.modalities or not (0 <= cfg.mask_ratio < 1 and cfg.tau > 0):
            raise ValueError("dim is a multiple of heads, mask_ratio from 0 to below 1, tau above 0, a modality is used")
        self.M, dim = len(self.modalities), cfg.dim
        self.f_NN = nn.ModuleDict({m: nn.Sequential(nn.Linear(catalog[m].shape[1], dim), nn.LayerNorm(dim))
                                   for m in self.modalities})
        self.mask = nn.Parameter(torch.empty(1, dim))                              # [mask]
        self.modality = nn.Parameter(torch.empty(self.M, dim))
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(cfg.input_dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.final = nn.LayerNorm(dim)
        self.project = nn.ModuleDict({m: nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim)) for m in self.modalities})
        has = torch.stack([catalog[f"has_{m}"].bool() for m in self.modalities], 1)          # (N+1, M)
        has[0] = False                                           # padding's row is [mask]: an item without any modality
        self.register_buffer("has", has, persistent=False)
        for i, m in enumerate(self.modalities):
            x = standardised(catalog[m].to(self.mask.dtype), has[:, i])
            self.register_buffer(f"x_{m}", x, persistent=False)                    # (N+1, D_m)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def embed(self, ids):
        """ids (n,) or a slice -> E (n, M, D), and which modalities the items have (n, M)."""
        E = [self.f_NN[m](getattr(self, f"x_{m}")[ids]) for m in self.modalities]  # eqs. (1), (2)
        return torch.stack(E, 1).to(self.mask.dtype), self.has[ids]

    def seen(self, has):
        """Which tokens take part, (..., M) bool: all of them, or with drop_missing those that are there, if any is."""
        return has | ~has.any(-1, keepdim=True) if self.cfg.drop_missing else torch.ones_like(has)

    def transform(self, E, has, real, position=0., last=False):
        """Contextual tokens: E (B, L, M, D), has (B, L, M), real (B, L) False = padding -> (B, L, M, D); last: of the last
        place only, (B, 1, M, D), in the top layer the others then are keys and no queries."""
        x = torch.where(has[..., None], E, self.mask) + self.modality + position   # F4, F5
        x = self.dropout(self.norm(x)).flatten(1, 2)                               # (B, L M, D), F18
        mask = (self.seen(has) & real[..., None]).flatten(1)[:, None, None]        # (B, 1, 1, L M)
        for i, block in enumerate(self.blocks):
            top = last and i == len(self.blocks) - 1
            x = block(x[:, -self.M:] if top else x, x, mask)
        return x.unflatten(1, (-1, self.M))

    def pool(self, x, has):
        """Projection, normalisation and maximum over modalities: (n, M, D), (n, M) -> h (n, D)."""
        x = self.final(x)
        h = torch.stack([self.project[m](x[:, i]) for i, m in enumerate(self.modalities)], 1)      # (n, M, D)
        return h.masked_fill(~self.seen(has)[..., None], -torch.inf).amax(1).to(self.mask.dtype)   # eq. (3a)

    def encode(self, E, has):
        """The item tower: E (n, M, D), has (n, M) -> h (n, D). A sequence of length 1 without a position (F19)."""
        return self.pool(self.transform(E[:, None], has[:, None], has.new_ones(len(has), 1))[:, 0], has)


def info_nce(a, b, real, scale):
    """Symmetric InfoNCE of a, b (B, D), row j of both one item, over the real (B,) items, eq. (4): loss, logits (B, B)."""
    with torch.autocast(a.device.type, enabled=False):
        logits = scale * (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T)       # tau sim(i_j, s_k)
    itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
    known = logits.masked_fill(~(real[:, None] & real | itself), -torch.inf)
    both = known.log_softmax(1).diagonal() + known.log_softmax(0).diagonal()       # image -> text and text -> image (F11)
    return -.5 * (both * real).sum() / real.sum().clamp(min=1), logits


def hard_negatives(logits, real, draw=True):
    """For each row another item that is real (B,): drawn with softmax(logits), logits (B, B), or the likeliest. -> (B,)"""
    noise = -torch.empty_like(logits).exponential_().log() if draw else 0.         # Gumbel noise: its argmax is the draw
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return (logits + noise).masked_fill(itself | ~real, -torch.inf).argmax(1)


class Pretrain(nn.Module):
    """L = L_MM + L_I-S + L_I + L_S, eq. (3b); L_MM = L_PWC + L_PWM, eq. (3c). Batches of items, no sequences."""
    rows = "items"

    def __init__(self, cfg, catalog):
        super().__init__()
        self.encoder = Encoder(cfg, catalog)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))           # F12
        self.match = nn.Linear(cfg.dim, 1) if self.encoder.M > 1 else None         # p of eq. (5)
        self.groups = [g for n in range(self.encoder.M) for g in combinations(range(self.encoder.M), n + 1)]
        keep = torch.tensor([[i in g for i in range(self.encoder.M)] for g in self.groups])
        self.register_buffer("keep", keep, persistent=False)                       # (G, M): {S}, {I}, {S, I}

    def forward(self, batch):
        encoder = self.encoder
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(100))
        scale = self.logit_scale.exp()                                             # tau of eq. (4)
        E, has = encoder.embed(batch["item"])                                      # (B, M, D), (B, M)
        kept = (has & self.keep[:, None]).repeat(2, 1, 1)                          # (2 G, B, M): each group twice (F9)
        h = encoder.encode(E.repeat(len(kept), 1, 1), kept.flatten(0, 1))          # (2 G B, D): others masked (F14)
        h = h.unflatten(0, (2, len(self.groups), -1))                              # (2, G, B, D)
        whole = (has | ~self.keep[:, None]).all(-1)                                # (G, B): has all of the group
        losses = {"pwc": 0., "pwm": 0.} if encoder.M > 1 else {}
        for g, group in enumerate(self.groups):
            name = "+".join(encoder.modalities[i] for i in group)
            losses[name] = info_nce(h[0, g], h[1, g], whole[g], scale)[0]          # L_S, L_I, L_I-S
            if len(group) == 2:                                                    # (text, image), alone and together
                pwc, logits = info_nce(h[0, group[0]], h[0, group[1]], whole[g], scale)
                losses["pwc"] += pwc                                               # eq. (4)
                losses["pwm"] += self.pwm(E, g, h[0, g], whole[g], logits.detach())          # eq. (5)
        return losses                                                              # eq. (3b): the loop minimises the sum

    def pwm(self, E, g, h, real, logits):
        """Match or no match, eq. (5), of the pair (a, b) that is group g: E (B, M, D), h (B, D) of the true pairs, real (B,)
        which items have both, logits (B, B) of eq. (4), a against b."""
        wrong_b, wrong_a = (hard_negatives(x, real, self.training) for x in (logits, logits.T))    # (B,), rows of E
        is_b = torch.arange(E.shape[1], device=E.device)[:, None] == self.groups[g][1]             # (M, 1)
        pairs = torch.where(is_b, torch.cat([E[wrong_b], E]), torch.cat([E, E[wrong_a]]))          # (2 B, M, D)
        wrong = self.encoder.encode(pairs, self.keep[g].expand(len(pairs), -1))                    # (2 B, D)
        p = self.match(torch.cat([h, wrong]))[:, 0].to(h.dtype)                                    # before the sigmoid
        loss = F.softplus(torch.cat([-p[:len(h)], p[len(h):]]))                    # -log p where y = 1, else -log(1 - p)
        counts = torch.cat([real, (real & (real.sum() > 1)).repeat(2)])            # a single item finds no wrong partner
        return (loss * counts).sum() / counts.sum().clamp(min=1)


def mask_items(seq, n_items, ratio):
    """Masked item prediction: seq (B, L) -> what is read instead (0 is [mask]), and which places are to be predicted."""
    chosen = (torch.rand(seq.shape, device=seq.device) < ratio) & (seq != 0)
    how = torch.rand(seq.shape, device=seq.device)
    other = torch.where(how < .9, torch.randint_like(seq, 1, n_items + 1), seq)    # 10 % another item, 10 % itself
    return torch.where(chosen, torch.where(how < .8, 0, other), seq), chosen       # 80 % [mask]


class FMMSRec(nn.Module):
    """The encoder as two towers: items, and sequences with positions."""

    def __init__(self, cfg, catalog):
        super().__init__()
        self.cfg, self.n_items, self.encoder = cfg, catalog["n_items"], Encoder(cfg, catalog)
        self.position = nn.Parameter(torch.empty(cfg.max_len + 1, cfg.dim))        # the last is that of the [mask] slot
        nn.init.normal_(self.position)                           # F4: as loud as the features

    def init_from(self, state):
        """Take over a state of Pretrain: positions are new, eq. (4)'s tau and eq. (5)'s head stay behind, nothing else."""
        left = {"logit_scale": ()} | ({"match.weight": (1, self.cfg.dim), "match.bias": (1,)} if self.encoder.M > 1 else {})
        mine = {f"encoder.{k}": tuple(v.shape) for k, v in self.encoder.state_dict().items()}
        if wrong := (mine | left).items() ^ {k: tuple(v.shape) for k, v in state.items()}.items():
            raise ValueError(f"a pre-trained state holds exactly the weights of Pretrain, here differ {sorted(wrong)[:3]}")
        self.encoder.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("encoder.")})

    def encode_items(self):
        """All items: {"embedding": E (N+1, M, D), "item": h of length 1 (N+1, D)}. Item by item the same as one by one."""
        def tower(ids):
            E, has = self.encoder.embed(ids)
            return E, F.normalize(self.encoder.encode(E, has), dim=-1)
        E, h = tower(slice(None)) if self.n_items < CHUNK else map(torch.cat, zip(*(
            checkpoint(tower, ids, use_reentrant=False)      # again in the backward pass; by its ids it finds the device
            for ids in torch.arange(self.n_items + 1, device=self.position.device).split(CHUNK))))
        return {"embedding": E, "item": h}

    def tokens(self, seq, read, table, last=False):
        """The sequence tower: seq, read (B, L) -> x (B, L+1, M, D), has (B, L+1, M); last: of the last place only."""
        read, real = F.pad(read, (0, 1)), F.pad(seq != 0, (0, 1), value=True)      # (B, L+1): [mask], read as 0, at the end
        E = F.embedding(read, table["embedding"].flatten(1)).unflatten(-1, (self.encoder.M, -1))   # (B, L+1, M, D)
        has, position = self.encoder.has[read], self.position[-read.shape[1]:, None]               # position (L+1, 1, D)
        return self.encoder.transform(E, has, real, position, last), has[:, -1:] if last else has

    def users(self, x, has):                                     # (n, M, D), (n, M) -> h of length 1 / tau (n, D)
        return F.normalize(self.encoder.pool(x, has), dim=-1) / self.cfg.tau

    def next(self, seq, table):                                  # what stands at the last place, without inner masks: (B, D)
        return self.users(*(t[:, 0] for t in self.tokens(seq, seq, table, last=True)))

    def forward(self, batch):
        table, seq, target = self.encode_items(), batch["seq"], batch["target"][:, -1]
        if not self.training:                                                      # as in testing: [mask] at the end only
            return {"next_item": SoftmaxLoss.apply(self.next(seq, table), table["item"], target, (target != 0).sum())}
        read, chosen = mask_items(seq, self.n_items, self.cfg.mask_ratio)
        n, p = seq.numel(), self.cfg.mask_ratio     # to count the chosen would wait for a GPU: room for 6 deviations more
        place = chosen.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        place = place[:min(n, math.ceil(n * p + 6 * math.sqrt(n * p * (1 - p))))]  # (R,)
        answer = (seq * chosen).flatten()[place]                                   # 0 where none is chosen
        states = self.users(*(torch.cat([t[:, -1], t[:, :-1].flatten(0, 1)[place]])
                              for t in self.tokens(seq, read, table)))             # (B + R, D)
        count, B = (target != 0).sum() + (answer != 0).sum(), len(seq)             # F23: one mean over all masked places
        return {"next_item": SoftmaxLoss.apply(states[:B], table["item"], target, count),
                "masked_item": SoftmaxLoss.apply(states[B:], table["item"], answer, count)}

    def score(self, batch, table):
        return self.next(batch["seq"], table) @ table["item"].T                    # cosine / tau: (B, N+1)


Model, Config = FMMSRec, FMMSRecConfig


if __name__ == "__main__":
    torch.manual_seed(0)
    start, N, B, seq = time.time(), 100, 8, torch.randint(1, 101, (8, 11))
    catalog = {"n_items": N} | {k: torch.rand(N + 1) > .3 if "has" in k else torch.randn(N + 1, 24) for k in READS}
    pretrain, model = (kind(FMMSRecConfig(dim=64), catalog) for kind in (Pretrain, FMMSRec))
    model.init_from(pretrain.state_dict())
    losses = pretrain({"item": torch.arange(1, 33)}) | model({"seq": seq[:, :-1], "target": seq[:, 1:]})
    sum(losses.values()).backward()
    scores = model.eval().score({"seq": seq}, model.encode_items())
    print({k: round(v.item(), 4) for k, v in losses.items()}, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
