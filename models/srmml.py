"""SRMML: Sequential Recommendation Based on Multi-Modal and Multi-Lingual. Yongqing Wu, Yu Xing. IAENG 2025. Not on arXiv.

A purchase says where a user's interest lies and how sure that is, so items and users are Gaussians. (a) CLIP's text and
picture vectors make three channels, the third as strong as the two agree, and a small network weighs the channels;
(b) a gate that knows an item's language and how its goods sell scales its mean and its covariance; (c) attention asks
how far two Gaussians are apart (Wasserstein) and mixes means with weights A, covariances with A^2; (d) the next item is
the nearest Gaussian.

    text  f_T -> P_T ---------------------> m_T -+ channel         e^mu    + W m_Agg = M^mu    -+- (+ P, LayerNorm) (5)
    both  f_M -> P_M * M(cos(f_T, f_I)) --> m_M -+ attention       e^Sigma + W m_Agg = M^Sigma -+        |
    image f_I -> P_I ---------------------> m_I -+--> m_Agg (1-4)                               |        |
    language, sales, M^mu -> two layers -> 2 sigmoid = G (6-8) ------ times both (9) -----------+--------+
    sequence: [-W2^2 (11) -> softmax (12) -> A V^mu, A^2 V^Sigma (13) -> ELU feed-forward (14, 15)] x layers -> s_t
    candidate j: N(G M^mu_j, ELU(G M^Sigma_j) + 1)         score = -W2^2(s_t, j) (16), cross entropy over all items (17)

Readings, where the paper is silent, misprinted or contradicts itself:
  S1-S2    m_T is the text's channel, m_I the picture's (swapped in the text); the same two vectors feed all three branches.
  S3       projection heads: Linear, LayerNorm, ReLU, dropout, Linear, LayerNorm (the ancestor FND-CLIP ends with one more
           ReLU; its BatchNorm removes the mean that CLIP's vectors share: here the heads read standardised vectors).
  S4-S5    M(s) = sigmoid(w s + b) with two scalars; the cosine is of the vectors as given if both have the same width
           (one encoder's space), else of m_T and m_I.
  S6       mean and maximum over the width, one 3-3-3 network for both, added, sigmoid; eq 4 sums the three channels.
  S7       the vectors may come from any encoder; for several languages it should be a multilingual one.
  S8       M = e + W m_Agg, for mean and covariance; an item the training part never shows has e = 0.
  S9, S22  E = LayerNorm(M + P), dropout, gate; ELU + 1 where a covariance is used, never 0: see `positive`.
  S10-S14  y = [language, statistics, M^mu without gradient], one gate for mean and covariance, per item. Statistics: log of
           1 + sales of the item, and of 1 + mean sales in its language; training part only, standardised. We see no gain
           by it, nor harm: with six languages (demo, seed 0) NDCG@10 is .1165, without it .1187. e learns as much alone.
  S15, S19 eq 10 is only the attention that is replaced; queries are later positions t, keys are k <= t, itself included.
  S16-S17  eq 11 is the square of the distance; the cross term is sqrt(Sigma_k) sqrt(Sigma_t) (a root is lost in print).
           The square is no metric: the triangle inequality that the text claims holds for its root only.
  S18, S20 eq 12: a softmax, with 1 / sqrt(d_head) (as printed the farthest item gets the largest weight); sums from k = 1.
  S21      V^Sigma is ELU + 1 as well: a variance is positive. No dropout on A: it would raise the mean of A^2.
  S23-S24  heads split the width, an output map joins them; a residual sum around the attention too.
  S25      eqs 14-15 as printed: d -> d -> d, LayerNorm before the feed-forward only.
  S26      the mean is passed from layer to layer (the released code of STOSA drops it by a misspelt name).
  S27      eq 16: softmax of minus the distance, times a learned temperature that starts at 1 / sqrt(d).
  S28      candidates: gated, without position, ELU + 1.
  S29-S37  eq 17: softmax cross entropy over all items, at every position. Protocol and data: the project's common ones.
  and:     a channel of a modality that an item lacks is 0, and so is the fused one; without both, an item has its e alone.
           w/o MF feeds P_M(f_M) alone. w/o PM: one vector per item, attention of eq 10, dot product for eq 16.

Reads from the catalog: n_items, text, image, has_text, has_image, lang, train_seqs.
"""
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

READS = ("text", "image", "has_text", "has_image", "lang", "train_seqs")
CHUNK = None                             # rows whose logits the loss holds at once; None: 64, or more where items are few


@dataclass
class SRMMLConfig:
    dim: int = 64                        # d, searched in 8 ... 128 (Implementation Details)
    heads: int = 4                       # searched in 1 ... 16 (Implementation Details)
    layers: int = 1                      # searched in 1 ... 4 (Implementation Details)
    dropout: float = 0.3                 # searched in 0.3, 0.5, 0.7 (Implementation Details)
    max_len: int = 50                    # n; not in the paper
    gate_scale: float = 2.0              # lambda of eq. 7: "a scaling factor set to 2"
    languages: int = 16                  # rows of the language table, at least as many as there are; the paper's data has 6
    temperature: float = 0.0             # logits are -W2^2 / temperature; 0 means sqrt(dim) (S27)
    learn_temperature: bool = True       # the number above is then where it starts
    modality: Literal["both", "text", "image"] = "both"    # Table III: text or image alone
    use_fusion: bool = True              # w/o MF, Fig. 2: both features, joined, through one head
    use_gate: bool = True                # w/o MG, Fig. 2
    use_gaussian: bool = True            # w/o PM, Fig. 2: "item embeddings are treated as fixed vectors"
    optimizer: str = "adam"              # not in the paper
    lr: float = 1e-3                     # searched in 1e-3, 1e-4 (Implementation Details)
    weight_decay: float = 0.0
    batch_size: int = 256                # not in the paper; STOSA's
    epochs: int = 300                    # at most; not in the paper
    patience: int = 50                   # "does not improve within 50 epochs"
    prefixes: bool = False               # a target at every position (S30)


PRESETS = {                              # chosen by validation NDCG@10
    "scientific-mm": dict(lr=5e-4, patience=10),
    "demo": dict(lr=5e-4, epochs=40, patience=10),
}


class SoftmaxLoss(torch.autograd.Function):
    """Mean cross entropy of states (R, D) over items 1..N: logits states @ items.T + bias, of a table (N+1, D) and (N+1,).

    Rows with target 0 count nothing. Works through the rows in chunks and makes the gradient on the way, so the (R, N+1)
    logits never exist as a whole. In float32 also under autocast: distances are small differences of large numbers.
    """

    @staticmethod
    def forward(ctx, states, items, bias, target):
        weight = (target != 0) / (target != 0).sum().clamp(min=1)                  # (R,)
        loss = torch.zeros((), device=states.device, dtype=states.dtype)
        d_states, d_items, d_bias = torch.zeros_like(states), torch.zeros_like(items), torch.zeros_like(bias)
        chunk = CHUNK or max(64, 2 ** (26 if states.is_cuda else 21) // len(items))
        with torch.autocast(states.device.type, enabled=False):
            for first in range(0, len(states), chunk):
                rows = slice(first, first + chunk)
                logits = torch.addmm(bias, states[rows], items.T)                  # (chunk, N+1)
                logits[:, 0] = -torch.inf                                          # padding is no item
                logits = logits.log_softmax(1)
                answer = target[rows, None].clamp(min=1)
                loss -= (logits.gather(1, answer)[:, 0] * weight[rows]).sum()
                slope = logits.exp_().scatter_add_(1, answer, logits.new_full(answer.shape, -1.))
                slope *= weight[rows, None]                                        # d loss / d logits
                d_states[rows] = slope @ items
                d_items += slope.T @ states[rows]
                d_bias += slope.sum(0)
        ctx.save_for_backward(d_states, d_items, d_bias)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return *(d * slope for d in ctx.saved_tensors), None


def wide(x):
    """At least float32: what autocast has made bfloat16 is too coarse for a covariance or a distance."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positive(x):
    """ELU(x) + 1, a covariance. In float32 that is exactly 0 below about -17, where a root has no slope: so + 1e-6."""
    return F.elu(wide(x)) + (1 + 1e-6)


def point(mu, sigma):
    """[mu, sqrt(sigma)]: (..., d) twice -> (..., 2d). The Euclidean distance of points is W2 of the Gaussians.

    The - 1 moves all points alike, which changes no distance and keeps the numbers small.
    """
    return torch.cat([wide(mu), sigma.sqrt() - 1], -1)


def wasserstein(a, b):
    """W2^2 of each Gaussian in a with each in b: points (..., Q, 2d) and (..., K, 2d) -> (..., Q, K). Eq. (11)."""
    with torch.autocast(a.device.type, enabled=False):
        return a.square().sum(-1)[..., None] + b.square().sum(-1)[..., None, :] - 2 * (a @ b.mT)


def distance_loss(states, items, log_scale, target):
    """Cross entropy of -W2^2 * exp(log_scale): points (R, 2d) of users, (N+1, 2d) of items. Eqs. (16), (17).

    A user's own |state|^2 is the same for every item and falls out of the softmax: what is left is a product and a bias.
    """
    scale = log_scale.exp()
    return SoftmaxLoss.apply(2 * scale * states, items, -scale * items.square().sum(-1), target)


def standardised(x, has):
    """(N+1, D) -> the same, per dimension mean 0 and deviation 1 over the items that have it, rows of length about 1."""
    count = has.sum().clamp(min=1)
    x = (x - (x * has[:, None]).sum(0) / count) * has[:, None]
    return x / (x.square().sum(0) / count).sqrt().clamp(min=1e-4) / math.sqrt(x.shape[1])


class Fusion(nn.Module):
    """Text and image features (N+1, d_T), (N+1, d_I) -> m_Agg (N+1, d), eqs. (1) to (4)."""

    def __init__(self, cfg, catalog):
        super().__init__()
        text, image = (F.normalize(catalog[m].to(torch.get_default_dtype()), dim=-1) for m in ("text", "image"))
        has_text, has_image = catalog["has_text"].bool(), catalog["has_image"].bool()
        self.width = text.shape[1]
        width = {"text": self.width, "image": image.shape[1], "fused": self.width + image.shape[1]}
        both = has_text & has_image if cfg.use_fusion else has_text | has_image
        has = {"text": has_text, "image": has_image, "fused": both}
        several = ("text", "image", "fused") if cfg.use_fusion else ("fused",)
        self.channels = several if cfg.modality == "both" else (cfg.modality,)
        buffer = lambda name, value: self.register_buffer(name, value, persistent=False)
        f_M = torch.cat([standardised(text, has_text), standardised(image, has_image)], 1)
        buffer("f_M", f_M)                                                         # eq. (1): f_T is its left part
        buffer("has", torch.stack([has[c] for c in self.channels], 1)[..., None])  # (N+1, channels, 1)
        buffer("similarity", (text * image).sum(1) if text.shape == image.shape else None)    # eq. (2), S5: (N+1,)
        self.P = nn.ModuleDict({c: nn.Sequential(
            nn.Linear(width[c], 2 * cfg.dim), nn.LayerNorm(2 * cfg.dim), nn.ReLU(), nn.Dropout(cfg.dropout),
            nn.Linear(2 * cfg.dim, cfg.dim), nn.LayerNorm(cfg.dim)) for c in self.channels})   # S3
        if len(self.channels) == 3:
            self.M = nn.Linear(1, 1)                                               # w and b of S4
            self.attention = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3))

    def forward(self):
        f = {"text": self.f_M[:, :self.width], "image": self.f_M[:, self.width:], "fused": self.f_M}
        m = {c: self.P[c](f[c]) for c in self.channels}                            # eq. (3): (N+1, d) each
        if len(m) == 1:                                                            # w/o MF, or one modality
            return m[self.channels[0]] * self.has[:, 0]
        similarity = F.cosine_similarity(m["text"], m["image"], -1) if self.similarity is None else self.similarity
        m["fused"] = self.M(similarity[:, None]).sigmoid() * m["fused"]            # eq. (3): M is (N+1, 1)
        m = torch.stack([m[c] for c in self.channels], 1) * self.has               # (N+1, 3, d)
        att = (self.attention(m.mean(-1)) + self.attention(m.amax(-1))).sigmoid()  # (N+1, 3)
        return (att[..., None] * m).sum(1)                                         # eq. (4)


def statistics(lang, train_seqs):
    """What eq. (8) knows of an item besides its language: (N+1,) int and lists of ids -> (N+1, 2), standardised (S11)."""
    flat = torch.tensor([i for seq in train_seqs for i in seq], dtype=torch.long)
    count = torch.bincount(flat, minlength=len(lang)).double()                     # sales in the training part
    items, total = (torch.bincount(lang[1:], w, minlength=int(lang.max()) + 1) for w in (None, count[1:]))
    stats = torch.stack([count, (total / items.clamp(min=1))[lang]], 1).log1p()
    stats = (stats - stats[1:].mean(0)) / stats[1:].std(0, correction=0).clamp(min=1e-6)
    stats[0] = 0
    return stats.to(torch.get_default_dtype()), count > 0


class Stream(nn.Module):
    """The weights of one stream, mean or covariance, in one layer."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim, bias=False)                     # W_Q, W_K, W_V
        self.out = nn.Linear(cfg.dim, cfg.dim)                                     # joins the heads, S23
        self.norm, self.dropout = nn.LayerNorm(cfg.dim), nn.Dropout(cfg.dropout)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.dim), nn.ELU(), nn.Linear(cfg.dim, cfg.dim))   # eq. (14)

    def project(self, x):                                        # (B, L, d) -> three of (B, heads, L, d / heads)
        return (wide(t.unflatten(-1, (self.heads, -1)).transpose(1, 2)) for t in self.qkv(x).chunk(3, -1))

    def finish(self, x, z):                                      # z (B, heads, L, d / heads), x and the result (B, L, d)
        z = x + self.dropout(self.out(z.transpose(1, 2).flatten(2)))               # S24
        return z + self.dropout(self.ffn(self.norm(z)))                            # eq. (15)


class Layer(nn.Module):
    """Wasserstein attention and feed-forward over both streams."""

    def __init__(self, cfg):
        super().__init__()
        self.mean, self.covariance = Stream(cfg), Stream(cfg) if cfg.use_gaussian else None

    def attend(self, mu, sigma, mask):                           # (B, L, d) twice; mask (B, 1, L, L) True = may look
        mu_q, mu_k, mu_v = self.mean.project(mu)                                   # (B, heads, L, d / heads)
        if sigma is None:
            a = wide(mu_q @ mu_k.mT)                                               # eq. (10), w/o PM
        else:
            sigma_q, sigma_k, sigma_v = map(positive, self.covariance.project(sigma))
            a = -wasserstein(point(mu_q, sigma_q), point(mu_k, sigma_k))           # eq. (11): (B, heads, L, L)
        a = (a / math.sqrt(mu_q.shape[-1])).masked_fill(~mask, -torch.inf).softmax(-1)        # eq. (12)
        with torch.autocast(a.device.type, enabled=False):
            return a, a @ mu_v, None if sigma is None else a.square() @ sigma_v    # eq. (13)

    def forward(self, mu, sigma, mask):
        _, z_mu, z_sigma = self.attend(mu, sigma, mask)
        mu = self.mean.finish(mu, z_mu)
        return mu, None if sigma is None else positive(self.covariance.finish(sigma, z_sigma))         # eq. (15)


class SRMML(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        if cfg.dim % cfg.heads:
            raise ValueError(f"dim {cfg.dim} must be a multiple of heads {cfg.heads}")
        if cfg.temperature < 0 or cfg.gate_scale <= 0 or int(catalog["lang"].max()) > cfg.languages:
            raise ValueError("temperature must be at least 0, gate_scale above 0, languages at least as many as there are")
        self.cfg, N, d = cfg, catalog["n_items"], cfg.dim
        streams = ("mu", "sigma") if cfg.use_gaussian else ("mu",)
        self.fusion = Fusion(cfg, catalog)
        self.item = nn.ModuleDict({s: nn.Embedding(N + 1, d) for s in streams})                       # e^mu, e^Sigma
        self.content = nn.ModuleDict({s: nn.Linear(d, d, bias=False) for s in streams})               # W of S8
        self.position = nn.ParameterDict({s: torch.empty(cfg.max_len, d) for s in streams})           # P^mu, P^Sigma
        self.norm = nn.ModuleDict({s: nn.LayerNorm(d) for s in streams})
        self.dropout = nn.Dropout(cfg.dropout)
        stats, seen = statistics(catalog["lang"], catalog["train_seqs"])
        self.register_buffer("seen", seen[:, None], persistent=False)              # (N+1, 1), False for padding
        if cfg.use_gate:
            self.register_buffer("stats", stats, persistent=False)                 # (N+1, 2)
            self.register_buffer("lang", catalog["lang"], persistent=False)        # (N+1,)
            self.language = nn.Embedding(cfg.languages + 1, d)                     # row 0 is padding's
            self.gate = nn.Sequential(nn.Linear(2 * d + 2, d), nn.ReLU(), nn.Linear(d, d), nn.Sigmoid())
        self.blocks = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        log_scale = torch.tensor(-math.log(cfg.temperature or math.sqrt(d)))
        if cfg.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def encode_items(self):
        """All items once: {"mu": M^mu, "sigma": M^Sigma, "gate": G} (N+1, d) and "point": where candidates are (N+1, 2d)."""
        m_agg = self.fusion()                                                      # (N+1, d)
        table = {s: self.item[s].weight * self.seen + self.content[s](m_agg) for s in self.item}   # S8
        gate = torch.ones_like(table["mu"])
        if self.cfg.use_gate:
            y = torch.cat([self.language(self.lang), self.stats, table["mu"].detach()], -1)        # (N+1, 2d + 2)
            gate = self.cfg.gate_scale * self.gate(y)                              # eqs. (6), (7), (8): (N+1, d)
        place = wide(gate * table["mu"])
        if self.cfg.use_gaussian:
            place = point(place, positive(gate * table["sigma"]))                  # S28: (N+1, 2d)
        return table | {"gate": gate, "point": place}

    def states(self, seq, table):
        """Points of the users' Gaussians at every position: (B, L) -> (B, L, 2d), w/o PM (B, L, d)."""
        L = seq.shape[1]
        gate = F.embedding(seq, table["gate"])                                     # (B, L, d)
        E = {s: self.norm[s](F.embedding(seq, table[s]) + self.position[s][-L:]) for s in self.item}   # eq. (5): (B, L, d)
        E = {s: gate * self.dropout(x) for s, x in E.items()}                      # eq. (9)
        real = (seq != 0)[:, None, None, :]                                        # (B, 1, 1, L)
        causal = torch.ones(L, L, dtype=torch.bool, device=seq.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=seq.device)                 # a padded row must see something
        mask = causal & real | itself                                              # (B, 1, L, L)
        mu, sigma = E["mu"], E.get("sigma")
        for block in self.blocks:
            mu, sigma = block(mu, sigma, mask)
        return wide(mu) if sigma is None else point(mu, sigma)

    def forward(self, batch):
        table, target = self.encode_items(), batch["target"]
        states = self.states(batch["seq"], table)                                  # (B, L, 2d)
        if self.cfg.prefixes:                                                      # one target a row, the last
            states, target = states[:, -1:], target[:, -1:]
        states, target = states.flatten(0, 1), target.flatten()                    # (B L, 2d), (B L,)
        if not target.is_cuda:                      # choosing rows would wait for a GPU; trimmed batches are nearly full
            states, target = states[target != 0], target[target != 0]
        if self.cfg.use_gaussian:
            return {"next_item": distance_loss(states, table["point"], self.log_scale, target)}
        bias = table["point"].new_zeros(len(table["point"]), dtype=states.dtype)
        return {"next_item": SoftmaxLoss.apply(self.log_scale.exp() * states, table["point"], bias, target)}

    def score(self, batch, table):
        state = self.states(batch["seq"], table)[:, -1]                            # (B, 2d)
        if self.cfg.use_gaussian:
            return -wasserstein(state, table["point"])                             # eq. (16): (B, N+1)
        return state @ table["point"].T


Model, Config = SRMML, SRMMLConfig


if __name__ == "__main__":
    torch.manual_seed(0)
    start, N, B, L = time.time(), 100, 8, 10
    seqs = [torch.randint(1, N + 1, (L + 1,)).tolist() for _ in range(50)]
    has, lang = torch.arange(N + 1) > 0, torch.randint(1, 4, (N + 1,)) * (torch.arange(N + 1) > 0)
    catalog = {"n_items": N, "train_seqs": seqs, "text": torch.randn(N + 1, 32), "image": torch.randn(N + 1, 32),
               "has_text": has, "has_image": has, "lang": lang}
    model, rows = SRMML(SRMMLConfig(), catalog), torch.tensor(seqs[:B])
    batch = {"user": torch.arange(B), "seq": rows[:, :-1], "target": rows[:, 1:]}
    losses = model(batch)
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    print({k: round(v.item(), 4) for k, v in losses.items()}, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
