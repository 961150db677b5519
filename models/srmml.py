"""SRMML: Sequential Recommendation Based on Multi-Modal and Multi-Lingual.
Yongqing Wu, Yu Xing. IAENG 2025. Not on arXiv.

A purchase says where a user's interest lies and how sure that is, so items and users are Gaussians.
(a) CLIP's text and picture vectors make three channels, the third as strong as the two agree, and a
small network weighs the channels; (b) a gate that knows an item's language and how its goods sell
scales its mean and its covariance; (c) attention asks how far two Gaussians are apart (Wasserstein)
and mixes means with weights A, covariances with A^2; (d) the next item is the nearest Gaussian.

  text  f_T -> P_T --------------------> m_T -+ channel       e^mu  + W m_Agg = M^mu  -+- (+ P) (5)
  both  f_M -> P_M * M(cos(f_T, f_I)) -> m_M -+ attention     e^Sig + W m_Agg = M^Sig -+      |
  image f_I -> P_I --------------------> m_I -+-> m_Agg (1-4)                          |      |
  language, M^mu -> two layers -> 2 sigmoid = G (6-8) ---------------- times both (9) -+------+
  sequence: [-W2^2 (11) -> softmax (12) -> A V^mu, A^2 V^Sig (13) -> feed-forward (14, 15)] -> s_t
  candidate j: N(G M^mu_j, ELU(G M^Sig_j) + 1);  score = -W2^2(s_t, j) (16), softmax over items (17)

Readings, where the paper is silent, misprinted or contradicts itself:
 1. eq. 1: m_T is the text's channel, m_I the picture's (swapped in the text).
 2. eq. 3: heads are Linear, LayerNorm, ReLU, dropout, Linear, LayerNorm, on standardised vectors:
    CLIP's share a large mean.
 3. eqs. 2-3: M(s) = w s + b, from w = 1, b = 0. The cosine is of the vectors as given if both have
    one width (one encoder's space), else of m_T and m_I; it is brought to [0, 1] by its extremes
    over the items that have both.
 4. eq. 4: mean and maximum over the width, one 3-3-3 network for both; eq. 4 sums the channels.
    Both are taken before the last LayerNorm of a head, after which every mean is 0, and are
    standardised over the items, or they differ too little for the network to tell items apart.
 5. the vectors may come from any encoder; for several languages it should be a multilingual one.
 6. M = e + W m_Agg; an item that the training part never shows has e = 0.
 7. eqs. 5, 9: LayerNorm(M + P), dropout, gate; ELU + 1 where a covariance is used: see `positive`.
 8. eqs. 6-8: y = [language, statistics, M^mu without gradient], one gate for mean and covariance.
    Statistics, of the language alone: log of 1 + the mean sales of its items, standardised. With
    the item's own sales in y the gate learns to switch off what was never sold, as it is no target.
 9. eq. 10 is only the attention that is replaced; t looks at k <= t, itself included.
10. eq. 11 is the square of the distance; its cross term is sqrt(Sigma_k) sqrt(Sigma_t): a root is
    lost in print. The triangle inequality that the text claims holds for the distance alone.
11. eq. 12: softmax(-W2^2 / sqrt(d_head)): as printed, the farthest item gets the largest weight.
12. eq. 13: V^Sigma is ELU + 1 as well; no dropout on A, which would raise the mean of A^2.
13. heads split the width, an output map joins them; a residual sum around the attention too.
14. eqs. 14-15 as printed: d -> d -> d, LayerNorm before the feed-forward only.
15. eqs. 16-17: -W2^2 times a learned temperature, from 1 / sqrt(d); a target at every position.
16. candidates are gated, without position, ELU + 1.
17. a channel of a modality that an item lacks is 0, and so is the fused one.
18. w/o MF: P_M(f_M) alone. w/o PM: vectors, attention of eq. 10, dot product instead of eq. 16.

Reads from the catalog: n_items, text, image, has_text, has_image, lang, train_seqs (see CATALOG).
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
from torch.utils.checkpoint import checkpoint

CATALOG = {
    "n_items": "int N; item ids are 1..N, 0 is padding",
    "text": "float (N+1, D), row 0 zero, a zero row = no text",
    "image": "float (N+1, D), row 0 zero, a zero row = no picture",
    "has_text": "bool (N+1,), which items have a text",
    "has_image": "bool (N+1,), which items have a picture",
    "lang": "int (N+1,), the language's number from 1 on, 0 for padding",
    "train_seqs": "one list of item ids per user, training part only",
}
READS = ("text", "image", "has_text", "has_image", "lang", "train_seqs")
NOT_COMPILED = ("softmax_loss",)    # it would be, anew, for every shape
CHUNK = 2 ** 16    # items whose inner values are kept in memory at a time


@dataclass
class SRMMLConfig:
    dim: int = 64                        # d, searched in 8 ... 128 (Implementation Details)
    heads: int = 4                       # searched in 1 ... 16 (Implementation Details)
    layers: int = 1                      # searched in 1 ... 4 (Implementation Details)
    dropout: float = 0.3                 # searched in 0.3, 0.5, 0.7 (Implementation Details)
    max_len: int = 50                    # n; not in the paper
    gate_scale: float = 2.0              # lambda of eq. 7: "a scaling factor set to 2"
    languages: int = 16                  # rows of the language table; the paper's data has 6
    temperature: float = 0.0             # logits are -W2^2 / temperature; 0 means sqrt(dim)
    learn_temperature: bool = True       # the number above is then where it starts (reading 15)
    modality: Literal["both", "text", "image"] = "both"    # Table III: text or image alone
    use_fusion: bool = True              # w/o MF, Fig. 2: both features, joined, through one head
    use_gate: bool = True                # w/o MG, Fig. 2: every gate is 1
    use_gaussian: bool = True            # w/o PM, Fig. 2: items are "fixed vectors"
    # the recipe, for the training loop
    optimizer: Literal["adam", "adamw"] = "adam"    # not in the paper
    lr: float = 1e-3                     # searched in 1e-3, 1e-4 (Implementation Details)
    weight_decay: float = 0.0
    clip_norm: float = 0.0               # largest norm of a gradient; 0: any; not in the paper
    batch_size: int = 256                # not in the paper; STOSA's
    epochs: int = 300                    # at most; not in the paper
    patience: int = 50                   # "does not improve within 50 epochs"
    prefixes: bool = False               # true: a row per prefix, and one target a row (reading 15)

    def __post_init__(self):
        check_recipe(self)
        check(self.gate_scale > 0, f"gate_scale {self.gate_scale} must be above 0")
        check(self.languages >= 1, f"languages {self.languages} must be at least 1")
        check(self.temperature >= 0, f"temperature {self.temperature} must not be negative")


PRESETS = {    # chosen by validation NDCG@10
    "scientific-mm": dict(lr=5e-4, patience=10),
    "demo": dict(lr=5e-4, epochs=40, patience=10),
    "demo-languages": dict(lr=1e-3, patience=30),    # a long plateau before it learns
    "demo-translated": dict(lr=1e-3, patience=30),
    "demo-many": dict(lr=1e-3, epochs=40, patience=8),
}


# ---------------- content of an item, eqs. (1) to (4)

class Fusion(nn.Module):
    """Text and image features (N+1, d_T), (N+1, d_I) -> m_Agg (N+1, d), eqs. (1) to (4)."""

    def __init__(self, cfg, catalog):
        super().__init__()
        text = F.normalize(catalog["text"].to(torch.get_default_dtype()), dim=-1)
        image = F.normalize(catalog["image"].to(torch.get_default_dtype()), dim=-1)
        has_text, has_image = catalog["has_text"].bool(), catalog["has_image"].bool()
        if cfg.modality != "both":
            self.channels = (cfg.modality,)
        else:
            self.channels = ("text", "image", "fused") if cfg.use_fusion else ("fused",)
        has_fused = has_text & has_image if cfg.use_fusion else has_text | has_image
        has = {"text": has_text, "image": has_image, "fused": has_fused}
        has = torch.stack([has[channel] for channel in self.channels], 1)[..., None]
        f_T = standardised(text, has_text[:, None]) / math.sqrt(text.shape[1])      # reading 2
        f_I = standardised(image, has_image[:, None]) / math.sqrt(image.shape[1])
        f_M = torch.cat([f_T, f_I], 1)                                              # eq. (1)
        similarity = None
        if text.shape == image.shape:                                               # reading 3
            similarity = (text * image).sum(1)    # eq. (2): (N+1,)
        self.text_width = text.shape[1]
        self.register_buffer("f_M", f_M, persistent=False)      # f_T and f_I are its two parts
        self.register_buffer("has", has, persistent=False)      # (N+1, channels, 1)
        self.register_buffer("similarity", similarity, persistent=False)
        widths = {"text": text.shape[1], "image": image.shape[1], "fused": f_M.shape[1]}
        self.P = nn.ModuleDict({c: projection_head(widths[c], cfg) for c in self.channels})
        self.norm = nn.ModuleDict({c: nn.LayerNorm(cfg.dim) for c in self.channels})
        if len(self.channels) == 3:
            self.M = nn.Linear(1, 1)                            # w and b of M(s)
            nn.init.ones_(self.M.weight)
            nn.init.zeros_(self.M.bias)
            self.attention = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3))

    def forward(self):
        f = {
            "text": self.f_M[:, :self.text_width],
            "image": self.f_M[:, self.text_width:],
            "fused": self.f_M,
        }
        u = {c: in_chunks(self.P[c], f[c]) for c in self.channels}                  # (N+1, d) each
        m = {c: self.norm[c](u[c]) for c in self.channels}                          # reading 2
        if len(m) == 1:    # w/o MF, or one modality
            return m[self.channels[0]] * self.has[:, 0]
        agreement = self.agreement(m)                                               # (N+1, 1)
        u["fused"] = agreement * u["fused"]
        m["fused"] = agreement * m["fused"]                                         # eq. (3)
        m = torch.stack([m[c] for c in self.channels], 1) * self.has                # (N+1, 3, d)
        u = torch.stack([u[c] for c in self.channels], 1) * self.has
        return (self.weights(u)[..., None] * m).sum(1)                              # eq. (4)

    def agreement(self, m):
        """M(s) of eq. (3), s the similarity of eq. (2) in [0, 1]: (N+1, 1); reading 3."""
        similarity = self.similarity
        if similarity is None:
            similarity = F.cosine_similarity(m["text"], m["image"], -1)             # eq. (2)
        s = in_unit_interval(similarity, self.has[:, 2, 0])
        return self.M(s[:, None])

    def weights(self, u):
        """Channel attention of eq. (4), by mean and maximum: (N+1, 3, d) -> (N+1, 3); reading 4."""
        has = self.has[..., 0]                                                      # (N+1, 3)
        by_mean = self.attention(standardised(u.mean(-1), has))
        by_maximum = self.attention(standardised(u.amax(-1), has))
        return (by_mean + by_maximum).sigmoid()


def projection_head(width, cfg):
    """P of eq. (3) up to its last LayerNorm: width -> 2 d -> d (reading 2)."""
    return nn.Sequential(
        nn.Linear(width, 2 * cfg.dim),
        nn.LayerNorm(2 * cfg.dim),
        nn.ReLU(),
        nn.Dropout(cfg.dropout),
        nn.Linear(2 * cfg.dim, cfg.dim),
    )


def in_chunks(function, *x):
    """function of x (N+1, ...), row by row; of many rows CHUNK at a time, whose inner values are
    computed again in the backward pass."""
    if len(x[0]) <= CHUNK:
        return function(*x)
    parts = zip(*(rows.split(CHUNK) for rows in x))
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


def in_unit_interval(similarity, has):
    """(N+1,) -> from 0 for the least alike to 1 for the most, of the items that have both."""
    lowest = similarity.masked_fill(~has, torch.inf).amin()
    highest = similarity.masked_fill(~has, -torch.inf).amax()
    s = (similarity - lowest) / (highest - lowest).clamp(min=1e-6)
    return torch.where(has, s, 0)


def standardised(x, has):
    """(N+1, D) -> per dimension mean 0 and deviation 1 over the items that have it, else 0.

    has: bool, (N+1, 1) or (N+1, D)
    """
    count = has.sum(0).clamp(min=1)
    mean = torch.where(has, x, 0).sum(0) / count
    x = torch.where(has, x - mean, 0)
    variance = x.square().sum(0) / count
    return x / variance.clamp(min=1e-8).sqrt()    # clamped first: a root of 0 has no slope


def statistics(lang, train_seqs):
    """What eq. (8) knows of an item's language besides its number (reading 8).

    lang (N+1,), lists of ids -> (N+1, 1) standardised, and which items were sold at all (N+1,)
    """
    flat = torch.tensor([item for seq in train_seqs for item in seq], dtype=torch.long)
    sales = torch.bincount(flat, minlength=len(lang)).double()    # in the training part
    n_lang = int(lang.max()) + 1
    items = torch.bincount(lang[1:], minlength=n_lang)            # of each language
    total = torch.bincount(lang[1:], sales[1:], minlength=n_lang)
    mean_sales = total / items.clamp(min=1)
    stats = mean_sales[lang][:, None].log1p()                     # (N+1, 1)
    deviation = stats[1:].std(0, correction=0).clamp(min=1e-6)
    stats = (stats - stats[1:].mean(0)) / deviation
    stats[0] = 0
    return stats.to(torch.get_default_dtype()), sales > 0


# ---------------- Gaussians and their distance, eq. (11)

def wide(x):
    """At least float32: autocast's bfloat16 is too coarse for a covariance or a distance."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positive(x):
    """ELU(x) + 1, a covariance.

    In float32 that is exactly 0 below about -17, where a root has no slope: so + 1e-6.
    """
    return F.elu(wide(x)) + (1 + 1e-6)


def point(mu, sigma):
    """[mu, sqrt(sigma)]: (..., d) twice -> (..., 2d). W2 is the distance of such points.

    The - 1 moves all points alike, which changes no distance and keeps the numbers small.
    """
    return torch.cat([wide(mu), sigma.sqrt() - 1], -1)


def wasserstein(a, b):
    """W2^2 = |mu_a - mu_b|^2 + |sqrt(Sigma_a) - sqrt(Sigma_b)|^2, eq. (11), each with each.

    The square of the distance (reading 10), as |a|^2 + |b|^2 - 2 a.b of the Gaussians' points:
    (..., Q, 2d), (..., K, 2d) -> (..., Q, K)
    """
    with torch.autocast(a.device.type, enabled=False):
        a_squared = a.square().sum(-1)[..., None]           # (..., Q, 1)
        b_squared = b.square().sum(-1)[..., None, :]        # (..., 1, K)
        return a_squared + b_squared - 2 * (a @ b.mT)


# ---------------- attention over Gaussians, eqs. (10) to (15)

class Stream(nn.Module):
    """The weights of one stream, mean or covariance, in one layer."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim, bias=False)    # W_Q, W_K, W_V
        self.out = nn.Linear(cfg.dim, cfg.dim)                    # joins the heads: reading 13
        self.norm = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)
        self.ffn = nn.Sequential(                                 # eq. (14)
            nn.Linear(cfg.dim, cfg.dim), nn.ELU(), nn.Linear(cfg.dim, cfg.dim)
        )

    def project(self, x):
        """x (B, L, d) -> q, k, v, (B, heads, L, d / heads) each."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.split(q), self.split(k), self.split(v)

    def split(self, x):
        return wide(x.unflatten(-1, (self.heads, -1)).transpose(1, 2))

    def finish(self, x, z):
        """x + z + FFN(LayerNorm(x + z)), eqs. (14), (15): x (B, L, d), z (B, heads, L, d / heads).

        For the covariance the caller makes the sum positive: the ELU + 1 of eq. (15).
        """
        z = x + self.dropout(self.out(z.transpose(1, 2).flatten(2)))
        return z + self.dropout(self.ffn(self.norm(z)))


class Layer(nn.Module):
    """Wasserstein attention and feed-forward over both streams."""

    def __init__(self, cfg):
        super().__init__()
        self.mean = Stream(cfg)
        self.covariance = Stream(cfg) if cfg.use_gaussian else None

    def attend(self, mu, sigma, mask):
        """A = softmax(-W2^2(q_t, k) / sqrt(d / heads)), z^mu = A V^mu, z^Sigma = A^2 V^Sigma.

        mu, sigma (B, L, d), sigma None for w/o PM; mask (B, 1, L, L) True = may look
        -> A (B, heads, L, L), z^mu and z^Sigma (B, heads, L, d / heads). Eqs. (11) to (13).
        """
        mu_q, mu_k, mu_v = self.mean.project(mu)
        if sigma is None:
            likeness = wide(mu_q @ mu_k.mT)                                # eq. (10)
        else:
            sigma_q, sigma_k, sigma_v = self.covariance.project(sigma)
            q = point(mu_q, positive(sigma_q))
            k = point(mu_k, positive(sigma_k))
            likeness = -wasserstein(q, k)                                  # eq. (11)
        scaled = likeness / math.sqrt(mu_q.shape[-1])                      # reading 11
        A = scaled.masked_fill(~mask, -torch.inf).softmax(-1)              # eq. (12)
        with torch.autocast(A.device.type, enabled=False):
            z_mu = A @ mu_v                                                # eq. (13)
            z_sigma = None if sigma is None else A.square() @ positive(sigma_v)
        return A, z_mu, z_sigma

    def forward(self, mu, sigma, mask):
        """mu, sigma (B, L, d) -> the same; the sigma that comes out is positive (reading 7)."""
        _, z_mu, z_sigma = self.attend(mu, sigma, mask)
        mu = self.mean.finish(mu, z_mu)
        if sigma is not None:
            sigma = positive(self.covariance.finish(sigma, z_sigma))       # eq. (15)
        return mu, sigma


# ---------------- the model

class SRMML(nn.Module):
    """Items and users as Gaussians; the next item is the one nearest to the user."""

    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        n_lang = int(catalog["lang"].max())
        check(n_lang <= cfg.languages,
              f"languages {cfg.languages} is less than the {n_lang} of the data")
        self.cfg = cfg
        N, d = catalog["n_items"], cfg.dim
        streams = ("mu", "sigma") if cfg.use_gaussian else ("mu",)
        self.fusion = Fusion(cfg, catalog)
        self.item = nn.ModuleDict({s: nn.Embedding(N + 1, d) for s in streams})          # e
        self.content = nn.ModuleDict({s: nn.Linear(d, d, bias=False) for s in streams})  # W
        self.position = nn.ParameterDict({s: torch.empty(cfg.max_len, d) for s in streams})
        self.norm = nn.ModuleDict({s: nn.LayerNorm(d) for s in streams})
        self.dropout = nn.Dropout(cfg.dropout)
        stats, seen = statistics(catalog["lang"], catalog["train_seqs"])
        self.register_buffer("seen", seen[:, None], persistent=False)         # (N+1, 1)
        if cfg.use_gate:
            self.register_buffer("stats", stats, persistent=False)            # (N+1, 1)
            self.register_buffer("lang", catalog["lang"], persistent=False)   # (N+1,)
            self.language = nn.Embedding(cfg.languages + 1, d)                # row 0 is padding's
            self.gate = nn.Sequential(
                nn.Linear(2 * d + 1, d), nn.ReLU(), nn.Linear(d, d), nn.Sigmoid()
            )
        self.blocks = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        log_scale = torch.tensor(-math.log(cfg.temperature or math.sqrt(d)))  # reading 15
        if cfg.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1 and not name.startswith("fusion."):    # it would freeze reading 4
                nn.init.normal_(weight, std=0.02)

    def encode_items(self):
        """All items: {"mu": M^mu, "sigma": M^Sigma, "gate": G, "point": candidates}.

        (N+1, d) each, M^Sigma before ELU + 1 (reading 7); "point" (N+1, 2d), w/o PM (N+1, d).
        """
        m_agg = self.fusion()                                                 # (N+1, d)
        table = {}
        for s in self.item:                                                   # reading 6
            table[s] = self.item[s].weight * self.seen + self.content[s](m_agg)
        table["gate"] = self.gate_of(table["mu"])
        place = wide(table["gate"] * table["mu"])                             # reading 16
        if self.cfg.use_gaussian:
            place = point(place, positive(table["gate"] * table["sigma"]))    # (N+1, 2d)
        table["point"] = place
        return table

    def gate_of(self, mu):
        """G = lambda sigmoid(W_2 relu(W_1 y)), y = [language, statistics, M^mu], eqs. (6) to (8).

        mu (N+1, d) -> (N+1, d)
        """
        if not self.cfg.use_gate:
            return torch.ones_like(mu)

        def G(lang, stats, mu):
            y = torch.cat([self.language(lang), stats, mu.detach()], -1)      # (n, 2d + 1)
            return self.cfg.gate_scale * self.gate(y)

        return in_chunks(G, self.lang, self.stats, mu)

    def states(self, seq, table):
        """Points of the users' Gaussians at every position: (B, L) -> (B, L, 2d), w/o PM d."""
        L = seq.shape[1]
        gate = F.embedding(seq, table["gate"])                                # (B, L, d)
        E = {}
        for s in self.item:
            x = F.embedding(seq, table[s]) + self.position[s][-L:]            # M + P
            E[s] = self.norm[s](x)                                            # eq. (5): (B, L, d)
        for s in self.item:
            E[s] = gate * self.dropout(E[s])                                  # eq. (9)
        real = (seq != 0)[:, None, None, :]                                   # (B, 1, 1, L)
        causal = torch.ones(L, L, dtype=torch.bool, device=seq.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=seq.device)    # padding must see something
        mask = (causal & real) | itself                                       # (B, 1, L, L)
        mu, sigma = E["mu"], E.get("sigma")
        for block in self.blocks:
            mu, sigma = block(mu, sigma, mask)
        return wide(mu) if sigma is None else point(mu, sigma)

    def forward(self, batch):
        """{"next_item": loss} of a batch: "seq" and "target" (B, L), 0 = padding or no target."""
        table = self.encode_items()
        seq = recent(self, batch)
        target = batch["target"][:, -seq.shape[1]:]
        states = self.states(seq, table)                                      # (B, L, 2d)
        if self.cfg.prefixes:    # one target a row, the last
            states, target = states[:, -1:], target[:, -1:]
        states, target = states.flatten(0, 1), target.flatten()               # (B L, 2d), (B L,)
        if self.cfg.use_gaussian:
            loss = distance_loss(states, table["point"], self.log_scale, target)
        else:
            loss = product_loss(states, table["point"], self.log_scale, target)
        return {"next_item": loss}

    def score(self, batch, table):
        """-W2^2 of the user's Gaussian and each item's, eq. (16): scores (B, N+1).

        Without the temperature of the loss, which changes no rank.
        """
        seq = recent(self, batch)
        state = self.states(seq, table)[:, -1]                                # (B, 2d)
        if self.cfg.use_gaussian:
            return -wasserstein(state, table["point"])                        # eq. (16)
        return state @ table["point"].T

    def as_product(self, batch, table):
        """Users (B, D) and items (N+1, D) whose products rank as the scores do.

        -|s - j|^2 = 2 s.j - |j|^2 - |s|^2; the last term is the same for all items of a user.
        """
        state = self.states(recent(self, batch), table)[:, -1]                # (B, 2d)
        points = table["point"]
        if not self.cfg.use_gaussian:
            return state, points
        ones = state.new_ones(len(state), 1)
        minus_squares = -points.square().sum(-1, keepdim=True)                # (N+1, 1)
        return torch.cat([2 * state, ones], 1), torch.cat([points, minus_squares], 1)


def distance_loss(states, items, log_scale, target):
    """Cross entropy of -W2^2 * exp(log_scale), eqs. (16), (17), of users (R, 2d), items (N+1, 2d).

    Both are points, see `point`. -scale |s - j|^2 = 2 scale s.j - scale |j|^2 - scale |s|^2; the
    last term is the same for every item and falls out of the softmax. What is left is one product,
    with the second term as one more column.
    """
    scale = log_scale.exp()
    ones = states.new_ones(len(states), 1)
    bias = -scale * items.square().sum(-1, keepdim=True)                      # (N+1, 1)
    with torch.autocast(states.device.type, enabled=False):    # small differences of large numbers
        return softmax_loss(
            torch.cat([2 * scale * states, ones], 1), torch.cat([items, bias], 1), target
        )


def product_loss(states, items, log_scale, target):
    """The same for w/o PM: cross entropy of s.j * exp(log_scale), vectors (R, d) and (N+1, d)."""
    with torch.autocast(states.device.type, enabled=False):
        return softmax_loss(log_scale.exp() * states, items, target)


Model, Config = SRMML, SRMMLConfig


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
    seqs = [torch.randint(1, N + 1, (L + 1,)).tolist() for _ in range(50)]
    has = torch.arange(N + 1) > 0
    catalog = {
        "n_items": N,
        "text": torch.randn(N + 1, 32),
        "image": torch.randn(N + 1, 32),
        "has_text": has,
        "has_image": has,
        "lang": torch.randint(1, 4, (N + 1,)) * has,
        "train_seqs": seqs,
    }
    model = SRMML(SRMMLConfig(), catalog)
    rows = torch.tensor(seqs[:B])
    batch = {"user": torch.arange(B), "seq": rows[:, :-1], "target": rows[:, 1:]}
    losses = model(batch)
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
    shown = {name: round(loss.item(), 4) for name, loss in losses.items()}
    print(shown, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
