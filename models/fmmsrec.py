"""FMMS-Rec: Video-Image-Sentence Multi-Modality Sequential Recommendation Model.
Guowei Wang, Yicheng Di, Yuan Liu. 2024. ICIC 2024, posters, pages 992-1006. No code was released.

An item is what its pictures and its words say, nothing else: no item ids, so that a model can move
to another shop. One Transformer reads an item's modalities, each a token, and fills in those that
are missing; the element-wise maximum is the item. It is pre-trained to bring the modalities of an
item together and to tell true pairs from false ones. Then the very same Transformer reads a user's
items in their order, [mask] at the end, and what it puts there is compared with all items.

  text  -> f_NN = E^S (2) --+ [mask] if missing  + modality embedding -> Transformer -> project,
  image -> f_NN = E^I (1) --+                                                           max (3a) = h
  pre-training    h of {S}, {I}, {S, I}, twice each: PWC (4), PWM (5), L_I, L_S, L_I-S (3b, 3c)
  item tower      E_j            + modality            -> Transformer -> max = h_j, all items
  sequence tower  E_1 ... E_L [mask] + modality + position -> (the same)  -> max at [mask] = h
                  score_j = cosine(h, h_j) / tau, cross entropy over all items

Readings, where the paper is silent or misprinted (it has three equations 3: here 3a, 3b, 3c; its
equations 6 to 9 are metrics and not here):
 1. eqs. 1-2: vectors of any encoder (a video: the mean of its frames). f_NN is Linear and
    LayerNorm, on standardised vectors, or their common mean drowns what tells them apart.
 2. the Transformer reads LayerNorm(feature + modality + position). Positions start as loud as the
    features: at the usual 0.02 they vanish in the sum, and the model cannot hear the order. [mask]
    and the modality vectors start at 0.02.
 3. one learned [mask] stands for a missing modality, and for each modality of a masked item; it is
    attended to and takes part in the maximum. With drop_missing a missing modality does neither, as
    in this paper's ancestor MMSRec (Song et al. 2023, arXiv:2304.13277); an item with none has all.
 4. eq. 3a: h^i, h^s after a Linear and a LayerNorm each; norm 1 where similarities are taken.
 5. blocks: LayerNorm after the residual sums, GELU, inner width 2 dim, a last LayerNorm.
 6. eq. 3b: L_I, L_S, L_I-S are InfoNCE between two passes with different dropout, of items that
    have the whole group; weights 1. A third modality adds its groups, and its pairs to PWC and PWM.
 7. eq. 4: as printed its minus signs cancel, so training would push true pairs apart, and its
    denominators sum true pairs alone. Taken: symmetric InfoNCE, each picture against all texts and
    each text against all pictures of the batch, a mean over the items that have both.
 8. eq. 4: its tau multiplies, as printed: the exponential of a learned number, from 1 / 0.07, at
    most 100. The losses of reading 6 use the same.
 9. eq. 5 with the minus sign that is lost in print: each true pair, its picture with a wrong text,
    its text with a wrong picture, drawn from the batch by similarity (in testing the most similar);
    p = sigmoid of a linear map of the pair's joint h.
10. i_j and s_j of eq. 4 are h of the item with its other modality replaced by [mask].
11. pre-training on the catalog's own items, a stage of its own; positions are new after it.
12. both towers are one set of weights. A history of L items is (L + 1) M tokens, [mask] last, M
    modalities each, which all see each other. Positions are counted from the end, so that [mask]
    always has the same; the item tower has none.
13. inner places are those of the history. 20 % of them are chosen, and read as [mask] (80 % of
    these), as a random item (10 %) or as they are (10 %). The place after them is always [mask].
14. the place after the history predicts the last target of a row. The training loop, which is not
    in this file, makes a row per prefix of a sequence. prefixes false: a row per user, so that
    inner places are the only other examples.
15. the paper gives neither similarity nor loss of the recommendation. Taken: cosine / tau, cross
    entropy over all items, item tower with gradient in every step, mean over masked places.
16. Table 2 is no target: with one test item NDCG@10 - NDCG@5 is at most (HR@10 - HR@5) / log2(7),
    which every method exceeds on every reported data set. Compare the variants of section 4.6.

Reads from the catalog: n_items, text, image, has_text, has_image (their forms: CATALOG below).
A batch: "seq" and "target" (B, L), item ids, the newest last, padded with 0 on the left; the last
column of target is what is predicted. score reads "seq" alone; it ranks the history's items as
well, and its column 0 is padding's. state_dict has weights only: rebuild with the same catalog.
"""
import math
import time
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral, Real
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MODALITIES = ("text", "image")    # S and I; a third one is one more name here
CATALOG = {
    "n_items": "int N; item ids are 1..N, 0 is padding",
    "text": "float (N+1, D), row 0 zero",
    "image": "float (N+1, D), row 0 zero",
    "has_text": "bool (N+1,), which items have a text",
    "has_image": "bool (N+1,), which items have a picture",
}
READS = ("text", "image", "has_text", "has_image")
# they would be, anew, for every shape
NOT_COMPILED = ("softmax_loss", "summed_loss", "FMMSRec.inner_places")
CHUNK = 2 ** 16                   # items whose inner values are kept in memory at a time


@dataclass
class FMMSRecConfig:
    dim: int = 512                       # d, heads and layers are not in the paper; MMSRec's
    heads: int = 8
    layers: int = 2
    dropout: float = 0.5                 # in the blocks; not in the paper; MMSRec's
    input_dropout: float = 0.2           # of the sum of embeddings; not in the paper; MMSRec's
    max_len: int = 20                    # its N: 20 for Amazon, 100 for Meituan (section 4.4)
    mask_ratio: float = 0.2              # "the masking rate ... is set at 0.2" (section 4.4)
    tau: float = 0.05                    # divides cosines (reading 15); not in the paper; MMSRec's
    use_image: bool = True               # false: w/o V, ablation of section 4.6
    use_text: bool = True                # false: w/o S, ablation of section 4.6
    drop_missing: bool = False           # true: no [mask] for a missing modality (reading 3)
    # the recipe, for the training loop
    optimizer: Literal["adam", "adamw"] = "adam"    # section 4.4
    schedule: Literal["constant", "step", "linear", "cosine"] = "constant"    # of the learning rate
    lr: float = 1e-3                     # "a learning rate of 0.001" (section 4.4)
    weight_decay: float = 0.0
    clip_norm: float = 1.0               # largest norm of a gradient; 0: any; MMSRec's
    batch_size: int = 1024               # rows, or items in pre-training; 8192 in section 4.4
    epochs: int = 500                    # at most; not in the paper; MMSRec's
    patience: int = 10                   # not in the paper; MMSRec's
    pretrain_epochs: int = 50            # not in the paper; MMSRec's; 0: w/o P
    pretrain_lr: float = 1e-3            # the paper's one rate
    prefixes: bool = True                # a row per prefix, and one target a row (reading 14)

    def __post_init__(self):
        check_recipe(self)
        check(0 <= self.input_dropout < 1, f"input_dropout {self.input_dropout} must be in [0, 1)")
        check(0 <= self.mask_ratio < 1, f"mask_ratio {self.mask_ratio} must be in [0, 1)")
        check(self.tau > 0, f"tau {self.tau} must be above 0")
        check(self.use_text or self.use_image, "use_text or use_image must be true")
        check(self.pretrain_epochs >= 0,
              f"pretrain_epochs {self.pretrain_epochs} must not be negative")
        check(0 < self.pretrain_lr < math.inf, f"pretrain_lr {self.pretrain_lr} must be above 0")


# chosen on validation for small sets and a CPU: what docs/results.md uses
SMALL = dict(
    heads=4, batch_size=256, pretrain_epochs=20, lr=2e-3, schedule="cosine", patience=40,
    clip_norm=5.0,
)
DEMO = SMALL | dict(dim=64, dropout=0.1, input_dropout=0.1, batch_size=128, epochs=40)
PRESETS = {
    "scientific-mm": SMALL | dict(dim=128, dropout=0.3, input_dropout=0.3, epochs=40),
    "demo": DEMO,
    "demo-missing": DEMO | dict(epochs=20),
    "demo-content": DEMO | dict(epochs=20),
}


# ---------------- the encoder that both towers and both stages share, eqs. (1) to (3a)

def standardised(x, has):
    """(N+1, D) -> per dimension mean 0 and deviation 1 over the items that have it; else 0."""
    has = has[:, None]
    count = has.sum().clamp(min=1)
    mean = torch.where(has, x, 0).sum(0) / count
    x = torch.where(has, x - mean, 0)    # what is missing may be anything, NaN as well
    deviation = (x.square().sum(0) / count).sqrt()
    return x / deviation.clamp(min=1e-6)


class Block(nn.Module):
    """Queries attend to keys, then feed-forward; dropout, residual sums, LayerNorm (reading 5)."""

    def __init__(self, cfg):
        super().__init__()
        dim = cfg.dim
        self.heads = cfg.heads
        self.attention_dropout = cfg.dropout
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.inner = nn.Linear(dim, 2 * dim)
        self.outer = nn.Linear(2 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(cfg.dropout)

    def split(self, x):
        """(B, T, D) -> (B, T, heads, D / heads)"""
        return x.unflatten(-1, (self.heads, -1))

    def attend(self, x, keys, visible):
        """x (B, Q, D), keys (B, T, D), visible (B, 1, 1, T) True = may be seen -> (B, Q, D)"""
        key, value = self.key_value(keys).chunk(2, -1)
        q, k, v = self.split(self.query(x)), self.split(key), self.split(value)
        p = self.attention_dropout if self.training else 0.0
        if keys.shape[1] <= 4:
            # an item's tokens: fused attention is slow for so few, and fails above 65,535 rows
            logits = (q[:, :, None] * k[:, None]).sum(-1) / math.sqrt(q.shape[-1])
            logits = logits.masked_fill(~visible[:, 0, ..., None], -torch.inf)
            weights = F.dropout(logits.softmax(2), p)                      # (B, Q, T, heads)
            a = (weights[..., None] * v[:, None]).sum(2)                   # (B, Q, heads, D/heads)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            a = F.scaled_dot_product_attention(q, k, v, visible, dropout_p=p).transpose(1, 2)
        return self.out(a.flatten(2))

    def forward(self, x, keys, visible):
        x = self.norm1(x + self.dropout(self.attend(x, keys, visible)))
        feed_forward = self.outer(F.gelu(self.inner(x)))
        return self.norm2(x + self.dropout(feed_forward))


class Encoder(nn.Module):
    """Item encoder and sequence encoder. An item is a sequence of one place (reading 12)."""

    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        self.cfg = cfg
        used = {"text": cfg.use_text, "image": cfg.use_image}
        self.modalities = tuple(m for m in MODALITIES if used.get(m, True))
        self.M = len(self.modalities)
        dim = cfg.dim
        self.f_NN = nn.ModuleDict()
        for m in self.modalities:                                          # reading 1
            width = catalog[m].shape[1]
            self.f_NN[m] = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
        self.mask = nn.Parameter(torch.empty(1, dim))                      # [mask]
        self.modality = nn.Parameter(torch.empty(self.M, dim))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(cfg.input_dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.final = nn.LayerNorm(dim)
        self.project = nn.ModuleDict()
        for m in self.modalities:                                          # reading 4
            self.project[m] = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        has = torch.stack([catalog[f"has_{m}"].bool() for m in self.modalities], 1)
        has[0] = False    # padding's row is [mask]: an item without any modality
        self.register_buffer("has", has, persistent=False)                 # (N+1, M)
        self.features = Buffers()                                          # (N+1, D_m) each
        for i, m in enumerate(self.modalities):
            self.features[m] = standardised(catalog[m].to(self.mask.dtype), has[:, i])
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def embed(self, ids):
        """ids (n,) or a slice -> E = f_NN(features) (n, M, D), and which are there (n, M)."""
        E = [self.f_NN[m](self.features[m][ids]) for m in self.modalities]    # eqs. (1), (2)
        return torch.stack(E, 1).to(self.mask.dtype), self.has[ids]

    def seen(self, has):
        """Which tokens take part, (..., M) bool: all, or with drop_missing those that are there."""
        if not self.cfg.drop_missing:
            return torch.ones_like(has)
        return has | ~has.any(-1, keepdim=True)    # all of an item that has none

    def transform(self, E, has, real, position=0.0, last=False):
        """Contextual tokens of P places, 1 for an item, L + 1 for a history.

        E (B, P, M, D), has (B, P, M), real (B, P) False = padding -> (B, P, M, D)
        last: of the last place only, (B, 1, M, D): in the top layer the others are no queries.
        """
        x = torch.where(has[..., None], E, self.mask)                      # reading 3
        x = x + self.modality + position                                   # reading 2
        x = self.dropout(self.norm(x)).flatten(1, 2)                       # (B, P M, D)
        visible = (self.seen(has) & real[..., None]).flatten(1)            # (B, P M)
        visible = visible[:, None, None]                                   # (B, 1, 1, P M)
        for number, block in enumerate(self.blocks, 1):
            top = last and number == len(self.blocks)
            x = block(x[:, -self.M:] if top else x, x, visible)
        return x.unflatten(1, (-1, self.M))

    def pool(self, x, has):
        """h = max over modalities of project_m(x_m), eq. (3a): (n, M, D), (n, M) -> (n, D)."""
        x = self.final(x)
        h = [self.project[m](x[:, i]) for i, m in enumerate(self.modalities)]
        h = torch.stack(h, 1)                                              # (n, M, D)
        h = h.masked_fill(~self.seen(has)[..., None], -torch.inf)
        return h.amax(1).to(self.mask.dtype)                               # eq. (3a)

    def encode(self, E, has):
        """The item tower: E (n, M, D), has (n, M) -> h (n, D)."""
        real = has.new_ones(len(has), 1)
        x = self.transform(E[:, None], has[:, None], real)                 # (n, 1, M, D)
        return self.pool(x[:, 0], has)


# ---------------- pre-training, eqs. (3b) to (5)

def info_nce(a, b, real, scale):
    """Symmetric InfoNCE of a, b (B, D), row j of both one item: the loss, and its logits (B, B).

    -1/2 mean_j [log softmax_k(scale sim(a_j, b_k)) + log softmax_k(scale sim(a_k, b_j))] at k = j,
    eq. (4) by reading 7, over the items that are real (B,).
    """
    with torch.autocast(a.device.type, enabled=False):
        logits = scale * (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T)
    itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
    both = real[:, None] & real
    known = logits.masked_fill(~(both | itself), -torch.inf)    # itself: a softmax needs one finite
    there = known.log_softmax(1).diagonal()                                # each a against all b
    back = known.log_softmax(0).diagonal()                                 # each b against all a
    loss = -.5 * ((there + back) * real).sum() / real.sum().clamp(min=1)   # eq. (4)
    return loss, logits


def hard_negatives(logits, real, draw=True):
    """Wrong partners for eq. (5): for each row another item that is real (B,), drawn with
    softmax(logits), or the likeliest.

    logits (B, B) -> (B,)
    """
    noise = 0.0
    if draw:    # Gumbel noise: the argmax of a sum with it is the draw
        noise = -torch.empty_like(logits).exponential_().log()
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return (logits + noise).masked_fill(itself | ~real, -torch.inf).argmax(1)


class Pretrain(nn.Module):
    """The terms of L = L_MM + L_I-S + L_I + L_S, eq. (3b); L_MM = L_PWC + L_PWM, eq. (3c).

    The loop adds them up. Its batches are of items, not of users' sequences.
    """
    rows = "items"

    def __init__(self, cfg, catalog):
        super().__init__()
        self.encoder = Encoder(cfg, catalog)
        M = self.encoder.M
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))   # reading 8
        self.match = nn.Linear(cfg.dim, 1) if M > 1 else None              # p of eq. (5)
        self.groups = []    # G tuples of places in modalities: (0,), (1,), (0, 1)
        for size in range(1, M + 1):
            self.groups += combinations(range(M), size)
        keep = torch.tensor([[i in group for i in range(M)] for group in self.groups])
        self.register_buffer("keep", keep, persistent=False)               # (G, M)

    def forward(self, batch):
        """Of a batch of items, "item" (B,): the losses of eqs. (3b), (3c), by name.

        "pwc" is L_PWC, "pwm" L_PWM, "text" L_S, "image" L_I, "text+image" L_I-S.
        """
        encoder = self.encoder
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(100))
        scale = self.logit_scale.exp()                                     # tau of eq. (4)
        E, has = encoder.embed(batch["item"])                              # (B, M, D), (B, M)
        kept = (has & self.keep[:, None]).repeat(2, 1, 1)                  # (2 G, B, M): reading 6
        h = encoder.encode(E.repeat(len(kept), 1, 1), kept.flatten(0, 1))  # (2 G B, D): reading 10
        h = h.unflatten(0, (2, len(self.groups), -1))                      # (2, G, B, D)
        whole = (has | ~self.keep[:, None]).all(-1)    # (G, B): has each modality of the group
        losses = {"pwc": 0.0, "pwm": 0.0} if encoder.M > 1 else {}
        for g, group in enumerate(self.groups):
            name = "+".join(encoder.modalities[i] for i in group)
            losses[name], _ = info_nce(h[0, g], h[1, g], whole[g], scale)  # reading 6
            if len(group) == 2:
                # the first M groups are the modalities, each alone
                a, b = h[0, group[0]], h[0, group[1]]                      # s_j, i_j: reading 10
                pwc, logits = info_nce(a, b, whole[g], scale)
                losses["pwc"] += pwc                                       # L_PWC of eq. (3c)
                pwm = self.pwm(E, g, h[0, g], whole[g], logits.detach())
                losses["pwm"] += pwm                                       # L_PWM of eq. (3c)
        return losses

    def pwm(self, E, g, h, real, logits):
        """Match or no match: -[y log p + (1 - y) log(1 - p)], eq. (5), of the pair (a, b), group g.

        E (B, M, D); h (B, D) of the true pairs; real (B,) which items have both; logits (B, B) of
        eq. (4), a against b.
        """
        wrong_b = hard_negatives(logits, real, self.training)              # (B,): rows of E
        wrong_a = hard_negatives(logits.T, real, self.training)
        is_b = torch.arange(E.shape[1], device=E.device)[:, None] == self.groups[g][1]    # (M, 1)
        with_wrong_b = torch.where(is_b, E[wrong_b], E)                    # (B, M, D)
        with_wrong_a = torch.where(is_b, E, E[wrong_a])
        pairs = torch.cat([with_wrong_b, with_wrong_a])                    # (2 B, M, D)
        wrong = self.encoder.encode(pairs, self.keep[g].expand(len(pairs), -1))
        logit = self.match(torch.cat([h, wrong]))[:, 0].to(h.dtype)        # p = sigmoid(logit)
        B = len(h)
        true, false = logit[:B], logit[B:]               # y = 1, y = 0
        loss = F.softplus(torch.cat([-true, false]))     # eq. (5): -log p, -log(1 - p)
        has_partner = real & (real.sum() > 1)            # a single item finds no wrong one
        counts = torch.cat([real, has_partner, has_partner])
        return (loss * counts).sum() / counts.sum().clamp(min=1)


# ---------------- recommendation

def mask_items(seq, n_items, ratio):
    """Masked item prediction (reading 13) of seq (B, L): what is read instead, and what is asked.

    Returns the ids that are read, (B, L), 0 = [mask], and which places are to be predicted, (B, L).
    """
    chosen = (torch.rand(seq.shape, device=seq.device) < ratio) & (seq != 0)
    how = torch.rand(seq.shape, device=seq.device)
    random = torch.randint_like(seq, 1, n_items + 1)
    other = torch.where(how < .9, random, seq)           # 10 % a random item, 10 % itself
    instead = torch.where(how < .8, 0, other)            # 80 % [mask]
    return torch.where(chosen, instead, seq), chosen


class FMMSRec(nn.Module):
    """The encoder as two towers: items, and sequences with positions."""

    def __init__(self, cfg, catalog):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg, catalog)
        self.n_items = catalog["n_items"]
        places = cfg.max_len + 1                         # the last is [mask]'s
        self.position = nn.Parameter(torch.empty(places, cfg.dim))
        nn.init.normal_(self.position)                   # reading 2

    def init_from(self, state):
        """Take over a state of Pretrain, all but tau of eq. (4) and the head of eq. (5).

        Raises ValueError unless it holds exactly the weights of Pretrain.
        """
        expected = {"logit_scale": ()}
        if self.encoder.M > 1:
            expected |= {"match.weight": (1, self.cfg.dim), "match.bias": (1,)}
        for name, value in self.encoder.state_dict().items():
            expected[f"encoder.{name}"] = tuple(value.shape)
        given = {name: tuple(value.shape) for name, value in state.items()}
        wrong = expected.items() ^ given.items()
        check(not wrong, "a pre-trained state must hold exactly the weights of Pretrain, but these "
                         f"differ: {sorted(wrong)[:3]}")
        mine = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        self.encoder.load_state_dict(mine)

    def encode_items(self):
        """All items: {"embedding": E (N+1, M, D), "item": h of norm 1 (N+1, D)}."""
        if self.n_items < CHUNK:
            E, h = self.item_tower(slice(None))
        else:    # inner values are computed again in the backward pass
            ids = torch.arange(self.n_items + 1, device=self.position.device)
            parts = [checkpoint(self.item_tower, i, use_reentrant=False) for i in ids.split(CHUNK)]
            E = torch.cat([E for E, _ in parts])
            h = torch.cat([h for _, h in parts])
        return {"embedding": E, "item": h}

    def item_tower(self, ids):
        """ids (n,) or a slice -> E (n, M, D), h of norm 1 (n, D)."""
        E, has = self.encoder.embed(ids)
        return E, F.normalize(self.encoder.encode(E, has), dim=-1)

    def sequence_tower(self, seq, read, table, last=False):
        """seq (B, L) -> tokens (B, L+1, M, D), has (B, L+1, M); last: of the last place only.

        read (B, L): the ids that are read in place of seq, 0 = [mask]. Place L+1 is [mask] always.
        """
        read = F.pad(read, (0, 1))                                         # (B, L+1), [mask] last
        real = F.pad(seq != 0, (0, 1), value=True)    # 0 is padding in seq, [mask] in read
        E = F.embedding(read, table["embedding"].flatten(1))
        E = E.unflatten(-1, (self.encoder.M, -1))                          # (B, L+1, M, D)
        has = self.encoder.has[read]                                       # (B, L+1, M)
        position = self.position[-read.shape[1]:, None]                    # (L+1, 1, D)
        x = self.encoder.transform(E, has, real, position, last)
        return x, has[:, -1:] if last else has

    def state(self, x, has):
        """Tokens of a place (n, M, D), has (n, M) -> h / tau, h of norm 1 (n, D): reading 15."""
        return F.normalize(self.encoder.pool(x, has), dim=-1) / self.cfg.tau

    def last_state(self, seq, table):
        """What the [mask] after seq (B, L) has become, without inner masks: (B, D)."""
        x, has = self.sequence_tower(seq, seq, table, last=True)
        return self.state(x[:, 0], has[:, 0])

    def forward(self, batch):
        """The cross entropy at the last place, "next_item", and at inner places, "masked_item".

        Inner places are masked in training only. The sum of both is the mean over all masked
        places (reading 15). Of "target" only the last column is read (reading 14).
        """
        seq = recent(self, batch)
        target = batch["target"][:, -1]
        table = self.encode_items()
        if not self.training:    # as in testing: [mask] at the end only
            state = self.last_state(seq, table)
            return {"next_item": softmax_loss(state, table["item"], target)}
        read, chosen = mask_items(seq, self.n_items, self.cfg.mask_ratio)
        x, has = self.sequence_tower(seq, read, table)
        place = self.inner_places(chosen)                                  # (R,)
        answer = (seq * chosen).flatten()[place]                           # 0 where none is chosen
        inner_x = x[:, :-1].flatten(0, 1)[place]                           # (R, M, D)
        inner_has = has[:, :-1].flatten(0, 1)[place]
        x = torch.cat([x[:, -1], inner_x])                                 # (B + R, M, D)
        has = torch.cat([has[:, -1], inner_has])
        states = self.state(x, has)                                        # (B + R, D)
        count = (target != 0).sum() + (answer != 0).sum()                  # reading 15
        count = count.clamp(min=1)
        B = len(seq)
        return {
            "next_item": summed_loss(states[:B], table["item"], target) / count,
            "masked_item": summed_loss(states[B:], table["item"], answer) / count,
        }

    def inner_places(self, chosen):
        """Indices (R,) into the flattened places of a batch, those chosen (B, L) first.

        R does not depend on how many are chosen: to count them would make a GPU wait. It is their
        expected number and 6 standard deviations more; the rest of the R count nothing.
        """
        n, p = chosen.numel(), self.cfg.mask_ratio
        room = math.ceil(n * p + 6 * math.sqrt(n * p * (1 - p)))
        order = chosen.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        return order[:min(n, room)]

    def score(self, batch, table):
        """Scores (B, N+1): cosine(h, h_j) / tau; column 0 is padding's and means nothing."""
        seq = recent(self, batch)
        return self.last_state(seq, table) @ table["item"].T

    def as_product(self, batch, table):
        """Users (B, D) and items (N+1, D) whose products are the scores."""
        return self.last_state(recent(self, batch), table), table["item"]


def summed_loss(states, items, target):
    """Cross entropy summed over the rows: see SoftmaxLoss."""
    return SoftmaxLoss.apply(states, items, target)


Model, Config = FMMSRec, FMMSRecConfig


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
    seq = torch.randint(1, N + 1, (B, L + 1))
    catalog = {"n_items": N}
    for m in MODALITIES:
        catalog[m] = torch.randn(N + 1, 24)
        catalog[f"has_{m}"] = torch.rand(N + 1) > .3
    pretrain = Pretrain(FMMSRecConfig(dim=64), catalog)
    model = FMMSRec(FMMSRecConfig(dim=64), catalog)
    model.init_from(pretrain.state_dict())
    losses = pretrain({"item": torch.arange(1, 33)})
    losses |= model({"seq": seq[:, :-1], "target": seq[:, 1:]})
    sum(losses.values()).backward()
    scores = model.eval().score({"seq": seq}, model.encode_items())
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
    shown = {name: round(loss.item(), 4) for name, loss in losses.items()}
    print(shown, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
