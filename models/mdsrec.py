"""MDSRec: Multimodal Difference Learning for Sequential Recommendation.
Changhong Li, Zhiqiang Guo. 2024. arXiv:2412.08103.

People buy one thing for its look and another for its words, and two items can be alike in one
modality only. So: (a) a graph of like items per modality, built from features that co-occurrence
has been mixed into, turns item ids into one item table per modality; (b) each modality has its own
Transformer over the user's sequence, and learned interest centres attend to the sequence as well;
(c) the three next-item predictions are added.

  train_seqs -> O (1, 2);  Ebar^id = E^id + mu^id O E^id (3) --> Trm^id (7, 8) -> e^id_t ----+
  E^m -> Ebar^m = E^m + mu^m O E^m (3) -> A^m (4) -> Ahat^m (5)                             |
         Ehat^m = Ahat^m E^id (6) --------------------> Trm^m (9) -> e^m_t ----(rho_m)----> e^s (17)
  k-means(E^m) = C^m (10) -> Ehat_c^m = C^m Ehat^m (11) -> attend (12-16) -> E_c^m
                                             etilde^m = e^m_t + Gamma E_c^m (18, 19)
  score = e^s . E^id (20) + sum_m rho_m etilde^m . Ehat^m (21, 22)       m = t (text), v (image)

Readings, where the paper is silent, misprinted or contradicts itself:
 1. eqs. 1-2: pairs of places with different items, in both directions, in the whole of each
    training sequence; places max_len or more apart, which no row shows together, count nothing.
 2. eq. 3: rows of O sum to 1 and features have norm 1: raw counts would drown the features even
    at mu^m = 0.2. mu^id = 16 is the paper's, so there the neighbours outweigh the item.
 3. made once: O, eq. 3 of the features, 4, 5, 10. In every step, with gradient: eq. 3 of the ids,
    6 and 11.
 4. eq. 5: an item is its own first neighbour (its cosine is 1); where candidates are too few, the
    rest of its list is the item itself. Eq. 6 as printed is a sum; taken is the mean over the
    neighbours. H = 0 is as H = 1: the item alone.
 5. Ebar^id is for eq. 7 alone: eqs. 6 and 20 have E^id, as printed.
 6. eqs. 7-9: three encoders, but one position table, counted from the end (rows are padded on the
    left), and one LayerNorm of item + position, then dropout. Causal; LayerNorm after residuals.
 7. eq. 10: hard clusters of features of norm 1; a row of C^m is divided by the cluster's size, so
    centres are means. The centre of an empty cluster is 0.
 8. eqs. 12-15: the paper shares Q, K and V with the sequence; here the whole block is shared, U,
    W_1, W_2, residuals and LayerNorm too. sigma is GELU, between W_1 and W_2: as printed, two
    linear maps in a row are one. Heads have width D / heads and divide by its root. The centres
    pass the LayerNorm of reading 6 before: without it they are far smaller than what they read,
    which then outweighs what they are, and all centres of a user become one vector.
 9. eqs. 12-16: the centres of a target read what stands before it. With prefixes, the default, the
    training loop, which is not in this file, makes a row per prefix of a sequence, and its last
    place has the target. prefixes false: a row per user, a target and own centres at every place.
10. rho_v = rho_t = 0.5 (the paper gives their sum alone, 1); tau = 1, not given, by validation.
11. eq. 19: the printed noise log(delta) - log(1 - delta) is logistic; Gumbel noise is taken, as the
    text says. None in testing.
12. eqs. 20-24: raw dot products; the softmax is inside each cross entropy. 1/|U| sum_u covers L^s
    and L^m alike, and is a mean over the rows of a batch.
13. layers, heads, inner width and dropout are not given: those of MISSRec (Wang et al. 2023).
    50 items are read everywhere; the longest histories of Baby, Sports and Clothing have 124, 295
    and 135.
14. w/o DIS: every pair counts 1. w/o CRE: the modal graphs are made of E^m; Ebar^id stays
    (mu_id = 0 is without that as well). w/o ICA: etilde^m = e^m_t.
15. w/o MRGC makes Ehat^m a trained linear map of E^m, whose width is not D; Ebar^id stays.
16. an item without features of a modality has what co-occurrence gives it (eq. 3); if it has none
    there either, it is its own only neighbour. It is in no cluster.
Letters: in shapes L is the length of a row, D is dim, D_m the width of features; elsewhere L is a
loss and D_ij a distance; t in e_t is the last place, else text; k is the number of centres.

Reads from the catalog: n_items, text, image, train_seqs (their forms: CATALOG below).
A batch: "seq" and "target" (B, L), item ids, the newest last, padded with 0 on the left; the last
column of target is what is predicted. score reads "seq" alone; it ranks the history's items as
well, and its column 0 is padding's. state_dict has weights only: rebuild with the same catalog.
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
NOT_COMPILED = ("softmax_loss",)    # it would be, anew, for every shape
MODALITIES = ("text", "image")


@dataclass
class MDSRecConfig:
    dim: int = 300                       # "fixed embedding size 300"
    heads: int = 4                       # not in the paper; MISSRec's (reading 13)
    layers: int = 2                      # the paper's L, of each encoder; not given; MISSRec's
    inner: int = 256                     # width of the feed-forward; not in the paper; MISSRec's
    dropout: float = 0.5                 # not in the paper; MISSRec's
    max_len: int = 50                    # items of the history that are read (reading 13)
    neighbors: int = 10                  # H: 10 in general, tuned per set (Parameter Settings)
    centers: int = 32                    # k, of a modality: 32 in general, tuned per data set
    mu_id: float = 16.0                  # mu^id: co-occurrence in the ids (Parameter Settings)
    mu_modal: float = 0.2                # mu^m: the same in the features (Parameter Settings)
    rho_image: float = 0.5               # rho_v; rho_t = 1 - rho_v (below eq. 17); reading 10
    tau: float = 1.0                     # temperature of eq. 19; reading 10
    partners: int = 0                    # pairs of O that an item keeps, the strongest; 0: all
    use_dis: bool = True                 # w/o DIS, Table 3: every pair in a sequence counts 1
    use_cre: bool = True                 # w/o CRE, Table 3: modal graphs from the raw features
    use_mrgc: bool = True                # w/o MRGC, Table 3: a linear map in the graphs' place
    use_ica: bool = True                 # w/o ICA, Table 3: no interest centres
    # the recipe, for the training loop
    optimizer: Literal["adam", "adamw"] = "adam"    # Adam (Parameter Settings)
    lr: float = 1e-3                     # searched in 1e-4 ... 1e-1 (Parameter Settings)
    weight_decay: float = 0.0
    clip_norm: float = 0.0               # largest norm of a gradient; 0: any; not in the paper
    batch_size: int = 512                # "mini-batch size 512"; without prefixes give far less
    epochs: int = 200                    # at most; not in the paper
    patience: int = 10                   # "a patience of 10"
    prefixes: bool = True                # a row per prefix; false: a target per place (reading 9)

    def __post_init__(self):
        check_recipe(self)
        check(self.inner >= 1, f"inner {self.inner} is too small: it must be at least 1")
        check(self.neighbors >= 0, f"neighbors {self.neighbors} must not be negative")
        check(self.centers >= 1, f"centers {self.centers} must be at least 1")
        check(self.partners >= 0, f"partners {self.partners} must not be negative")
        check(0 <= self.rho_image <= 1, f"rho_image {self.rho_image} must be from 0 to 1")
        check(self.tau > 0, f"tau {self.tau} must be above 0")


# the paper's best H and k (its analyses of the neighbor number and the center number), and what
# docs/results.md uses: small sets at a width that suits a CPU, chosen by validation
PRESETS = {
    "scientific": dict(neighbors=5, centers=16),
    "pantry": dict(neighbors=10, centers=16),
    "baby": dict(neighbors=10, centers=32),
    "sports": dict(neighbors=20, centers=32),
    "clothing": dict(neighbors=15, centers=64),
    "scientific-mm": dict(neighbors=5, centers=16, dim=64, inner=128, lr=2e-3),
    # long histories, where a row per prefix is slow
    "ml100k": dict(dim=64, inner=128, dropout=0.3, lr=2e-3, prefixes=False, batch_size=16),
    "demo": dict(centers=4, dim=64, inner=128, dropout=0.3, lr=5e-4, epochs=20),
    "demo-last": dict(centers=4, dim=64, inner=128, lr=3e-3, epochs=20),
}


# ---------------- co-occurrence, eqs. (1) to (3)

def co_occurrence(
    train_seqs, n_items, max_len, use_dis=True, partners=0, device=None, tile=2 ** 18
):
    """O and its transpose, sparse (N+1, N+1), zero diagonal.

    O_ij = sum over users u of O_ij^u, eq. (2); O_ij^u = 1 / D_ij, eq. (1). D_ij is the distance
    |p - q| of the places p of i and q of j in the sequence of u; each pair of places nearer than
    max_len counts (reading 1). Then each row of O is divided by its sum (reading 2).

    Whole rows of O are made at a time, those of the items that have about `tile` places. partners:
    a pair is kept where it is among so many strongest of one of its items; 0: every pair.
    """
    window = min(max_len, max(map(len, train_seqs), default=1)) - 1    # the largest distance
    items, user = end_to_end(train_seqs, window, device)
    cells, values = [], []
    for places in places_of_items(items, n_items, window, tile):
        cell, O_ij = pairs_at(places, items, user, n_items, window, use_dis)
        if partners:
            kept = strongest(cell // (n_items + 1), O_ij, partners)
            cell, O_ij = cell[kept], O_ij[kept]
        cells.append(cell)
        values.append(O_ij)
    cell, O_ij = torch.cat(cells), torch.cat(values)
    if partners:    # what one of a pair keeps, the other keeps
        mirrored = cell % (n_items + 1) * (n_items + 1) + cell // (n_items + 1)
        cell, where = torch.unique(torch.cat([cell, mirrored]), return_inverse=True)
        O_ij = O_ij.new_zeros(len(cell)).scatter_(0, where, O_ij.repeat(2))
    index = torch.stack([cell // (n_items + 1), cell % (n_items + 1)])
    row_sum = O_ij.new_zeros(n_items + 1).index_add_(0, index[0], O_ij)
    both = []
    for side in index:    # O is symmetric before: its transpose is divided by the other item's sum
        value = (O_ij / row_sum[side]).to(torch.get_default_dtype())   # reading 2
        both.append(torch.sparse_coo_tensor(
            index, value, (n_items + 1, n_items + 1), is_coalesced=True, check_invariants=True
        ))
    return tuple(both)


def end_to_end(train_seqs, room, device):
    """All sequences one after the other: items (n,) and whose they are (n,), with `room` places
    of item 0 and user -1 at both ends."""
    items = torch.tensor([item for seq in train_seqs for item in seq], dtype=torch.long)
    lengths = torch.tensor([len(seq) for seq in train_seqs], dtype=torch.long)
    user = torch.arange(len(lengths)).repeat_interleave(lengths)
    return F.pad(items, (room, room)).to(device), F.pad(user, (room, room), value=-1).to(device)


def places_of_items(items, n_items, room, tile):
    """The places of items 1..N in what `end_to_end` gives, about `tile` of them at a time, those
    of one item together."""
    places = items.argsort(stable=True)[2 * room:]                     # of item 1, then of item 2
    sold = items.bincount(minlength=n_items + 1)
    sold[0] = 0
    part = (sold.cumsum(0) - 1).clamp(min=0) // tile                   # (N+1,) in which an item is
    return places.split(torch.bincount(part, sold).long().tolist())


def pairs_at(p, items, user, n_items, window, use_dis):
    """All pairs of the items i at places p with items j of the same sequence: the cells
    i (N+1) + j of O (n,), ascending, and O_ij (n,), eqs. (1) and (2)."""
    i = items[p]
    cells = [p.new_zeros(0)]
    scores = [p.new_zeros(0, dtype=torch.float64)]
    for distance in range(1, window + 1):                              # D_ij
        for q in (p - distance, p + distance):
            j = items[q]
            counts = (user[p] == user[q]) & (i != j)                   # of one user, two items
            cells.append(i[counts] * (n_items + 1) + j[counts])
            score = 1 / distance if use_dis else 1.0                   # eq. (1)
            scores.append(scores[0].new_full(cells[-1].shape, score))
    cell, where = torch.unique(torch.cat(cells), return_inverse=True)
    return cell, scores[0].new_zeros(len(cell)).index_add_(0, where, torch.cat(scores))    # eq. (2)


def strongest(row, value, count):
    """Which entries (n,) are among the `count` largest of their row: (n,) bool.

    row (n,): in ascending order. Of equals the first are taken.
    """
    order = value.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]                     # row by row, largest first
    size = row.bincount()
    rank = torch.arange(len(row), device=row.device) - (size.cumsum(0) - size)[row]
    kept = torch.zeros_like(row, dtype=torch.bool)
    kept[order] = rank < count
    return kept


class Mix(torch.autograd.Function):
    """O E of eq. (3), for a fixed sparse O (N+1, N+1) and E (N+1, D).

    The transpose of O is stored beside it: the backward pass needs it, and sparse matrices are
    slow to transpose. In float32: GPUs have no sparse product in bfloat16.
    """

    @staticmethod
    def forward(ctx, O, O_T, E):
        ctx.O_T = O_T
        with torch.autocast(E.device.type, enabled=False):
            return torch.sparse.mm(O, E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return None, None, torch.sparse.mm(ctx.O_T, slope)


# ---------------- graphs and clusters, eqs. (4), (5), (10)

def nearest(features, count, tile=None):
    """The `count` items of greatest cosine, the item itself first: (N+1, D_m) -> (N+1, count) ids.

    A_ij = cos(Ebar_i, Ebar_j), eq. (4); Ahat_ij = 1 for the top H of row i, else 0, eq. (5). The
    ids returned are the j with Ahat_ij = 1. A is made in tiles of `tile` x `tile`, in float64 where
    float32 cannot rule out that a tile holds a neighbour. Cosines that differ by less than 2^-28
    are equal, and of equals the smaller id comes first: so neither the tile nor the device decides.
    """
    N = len(features) - 1
    count = min(count, N)
    tile = tile or (2 ** 13 if features.is_cuda else 2 ** 10)
    ids = torch.arange(1, N + 1, device=features.device)
    empty = ~features.any(1)                                # (N+1,) no feature: nobody's neighbour
    number = torch.arange(N + 1, device=features.device, dtype=torch.float64)
    number = number.masked_fill(empty, torch.inf)
    tiles = ids.split(tile)
    error = (features.shape[1] + 4) * 2.0 ** -24            # most that float32 is off in a cosine
    found = [ids.new_zeros(1, count)]                       # padding
    for rows in tiles:
        best = number.new_full((len(rows), count), -torch.inf)
        x = F.normalize(features[rows].double(), dim=-1)
        for columns in tiles:
            y = F.normalize(features[columns].double(), dim=-1)
            largest = (x.float() @ y.float().T).amax(1)
            near = largest > best[:, -1] / 2 ** 52 - error  # rows that this tile may change
            near |= rows is columns
            A = x[near] @ y.T                               # eq. (4)
            if rows is columns:
                A.fill_diagonal_(2)                         # itself first, whoever equals it
            # one number to sort by: the cosine in steps of 2^-28, then the smaller id
            key = A.mul_(2 ** 28).round_().mul_(2 ** 24).sub_(number[columns])
            key = key.topk(min(count, len(columns))).values
            best[near] = torch.cat([best[near], key], 1).topk(count).values    # eq. (5)
        alone = best.isinf() | empty[rows, None]            # reading 16
        neighbour = (-best).remainder(2 ** 24).masked_fill(alone, 0).long()
        found.append(torch.where(alone, rows[:, None], neighbour))
    return torch.cat(found)


def k_means(features, k, steps=50, seed=0):
    """C of eq. (10): (N+1, D_m) -> (k, N+1); row c is 1 / size at the members of cluster c.

    Items without a feature belong to no cluster. Where there are fewer different items than k,
    clusters are empty: rows of 0 (reading 7).
    """
    random = torch.Generator().manual_seed(seed)
    member = features.any(1).nonzero()[:, 0]
    C = features.new_zeros(k, len(features))
    if len(member) == 0:
        return C
    x = features[member]                                    # (n, D_m)
    centers = x[torch.randint(len(x), (1,), generator=random)]
    while len(centers) < min(k, len(x)):                    # k-means++: far points are likelier
        far = torch.cdist(x, centers).amin(1).square()
        chosen = torch.multinomial(far.cpu() + 1e-12, 1, generator=random)
        centers = torch.cat([centers, x[chosen]])
    for _ in range(steps):
        cluster = torch.cdist(x, centers).argmin(1)         # (n,)
        one_hot = F.one_hot(cluster, len(centers)).to(x.dtype)    # (n, k)
        size = one_hot.sum(0)[:, None]                      # (k, 1)
        means = one_hot.T @ x / size.clamp(min=1)
        moved = torch.where(size > 0, means, centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    C[:len(centers), member] = one_hot.T / size.clamp(min=1)    # reading 7
    return C


# ---------------- the Transformer, eqs. (8), (9), (12) to (15)

class Block(nn.Module):
    """Trm: queries attend to keys, then feed-forward; residual sums, LayerNorm after them."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.attention_dropout = cfg.dropout
        self.query = nn.Linear(cfg.dim, cfg.dim)    # Q
        self.key = nn.Linear(cfg.dim, cfg.dim)      # K
        self.value = nn.Linear(cfg.dim, cfg.dim)    # V
        self.out = nn.Linear(cfg.dim, cfg.dim)      # U
        self.inner = nn.Linear(cfg.dim, cfg.inner)  # W_1, b_1
        self.outer = nn.Linear(cfg.inner, cfg.dim)  # W_2, b_2
        self.norm1 = nn.LayerNorm(cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)

    def split(self, x):
        """(B, L, D) -> (B, heads, L, D / heads)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, x, keys, mask):
        """head_h = softmax(x Q_h (keys K_h)^T / sqrt(D / heads)) keys V_h, eqs. (12), (13).

        The heads side by side, times U: g of eq. (14).
        x (B, n, D), keys (B, L, D), mask (B, 1, n, L) True = may look -> (B, n, D)
        """
        q = self.split(self.query(x))
        k = self.split(self.key(keys))
        v = self.split(self.value(keys))
        p = self.attention_dropout if self.training else 0.0
        head = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p) # eqs. (12), (13)
        return self.out(head.transpose(1, 2).flatten(2))                  # eq. (14)

    def forward(self, x, keys, mask):
        x = self.norm1(x + self.dropout(self.attend(x, keys, mask)))      # readings 6, 8
        feed_forward = self.outer(F.gelu(self.inner(x)))                  # eq. (15), reading 8
        return self.norm2(x + self.dropout(feed_forward))


# ---------------- the model

class MDSRec(nn.Module):
    """Item tables from ids and graphs, three sequence encoders, three predictions."""

    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        self.cfg = cfg
        self.rho = {"text": 1 - cfg.rho_image, "image": cfg.rho_image}
        N = catalog["n_items"]
        self.item = nn.Embedding(N + 1, cfg.dim)                          # E^id; row 0 is padding
        self.position = nn.Parameter(torch.empty(cfg.max_len, cfg.dim))   # P
        self.norm = nn.LayerNorm(cfg.dim)                                 # of item + position
        self.dropout = nn.Dropout(cfg.dropout)
        self.encoders = nn.ModuleDict()
        for name in ("id", *MODALITIES):                                  # reading 6
            self.encoders[name] = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.graphs = Buffers()      # Ahat^m (N+1, H): ids of the neighbours
        self.clusters = Buffers()    # C^m (k, N+1)
        self.features = Buffers()    # E^m (N+1, D_m), where they are read in every step
        self.maps = nn.ModuleDict()  # w/o MRGC
        if not cfg.use_mrgc:
            for m in MODALITIES:
                self.maps[m] = nn.Linear(catalog[m].shape[1], cfg.dim)    # reading 15
        self.catalog = catalog       # until prepare has made of it what is made once
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0    # padding; only an empty history would train it

    def prepare(self, device):
        """O, the graphs and the clusters, made on the device (reading 3). Nothing the second time.

        Of a model that is not prepared, encode_items does it.
        """
        if self.catalog is None:
            return
        cfg, catalog, self.catalog = self.cfg, self.catalog, None
        made_on = torch.device("cpu") if device.type == "mps" else device    # Apple's: no float64
        seqs, N = catalog["train_seqs"], catalog["n_items"]
        O, O_T = co_occurrence(seqs, N, cfg.max_len, cfg.use_dis, cfg.partners, made_on)
        dtype = self.position.dtype
        self.register_buffer("O", O.to(device, dtype), persistent=False)
        self.register_buffer("O_T", O_T.to(device, dtype), persistent=False)
        with torch.autocast(made_on.type, enabled=False):    # bfloat16 is coarse for neighbours
            for m in MODALITIES:
                E = F.normalize(catalog[m].to(made_on, dtype), dim=-1)    # E^m, reading 2
                if cfg.use_mrgc:
                    E_bar = E
                    if cfg.use_cre:                                       # reading 14
                        E_bar = E + cfg.mu_modal * torch.sparse.mm(O.to(dtype), E)    # eq. (3)
                    graph = nearest(E_bar, max(cfg.neighbors, 1))         # eqs. (4), (5)
                    self.graphs[m] = graph.to(device)
                else:
                    self.features[m] = E.to(device)
                if cfg.use_ica:
                    self.clusters[m] = k_means(E, cfg.centers).to(device)     # eq. (10)

    def encode_items(self):
        """{"item": E^id, "id": Ebar^id, "text": Ehat^t, "image": Ehat^v}, each (N+1, D).

        Ebar^id = E^id + mu^id O E^id, eq. (3); Ehat^m = mean of E^id over the neighbours, eq. (6).
        """
        self.prepare(self.item.weight.device)
        E = self.item.weight
        table = {"item": E}
        table["id"] = E + self.cfg.mu_id * Mix.apply(self.O, self.O_T, E)           # eq. (3)
        for m in MODALITIES:
            if self.cfg.use_mrgc:
                table[m] = F.embedding_bag(self.graphs[m], E, mode="mean")          # eq. (6)
            else:
                table[m] = self.maps[m](self.features[m])                           # reading 15
        return table

    def encode(self, name, seq, items, E_hat_c=None, P=1):
        """The Transformer `name`, "id" or a modality, over seq (B, L); items: its table (N+1, D).

        E_hat_c: the interest centres (k, D) of eq. (11), or None. Returns e_t (B, P, D), the states
        at the last P places, those that predict (reading 9), and E_c (B, P, k, D), the centres
        after the last layer, which differ from place to place, eq. (16); None without.
        """
        B, L = seq.shape
        x = F.embedding(seq, items) + self.position[-L:]                            # eqs. (7), (9)
        x = self.dropout(self.norm(x))                                              # (B, L, D)
        real = seq != 0
        causal = torch.ones(L, L, dtype=torch.bool, device=seq.device).tril()
        # all that padding may look at, and an empty history: a softmax needs a key
        itself = torch.eye(L, dtype=torch.bool, device=seq.device)
        mask = ((causal & real[:, None]) | itself)[:, None]                         # (B, 1, L, L)
        E_c = None
        if E_hat_c is not None:
            k = len(E_hat_c)
            E_c = self.norm(E_hat_c).repeat(P, 1).expand(B, -1, -1)                 # (B, P k, D)
            before = mask[:, :, -P:].repeat_interleave(k, 2)                        # (B, 1, P k, L)
        for number, block in enumerate(self.encoders[name], 1):
            if E_c is not None:    # before x changes: eq. (12) reads layer l - 1
                E_c = block(E_c, x, before)                                         # eqs. (12)-(15)
            # of the top layer only the places that predict are read, so only they are computed
            top = P if number == self.cfg.layers else L
            x = block(x[:, -top:], x, mask[:, :, -top:])                            # eqs. (8), (9)
        if E_c is not None:
            E_c = E_c.unflatten(1, (P, k))                                          # eq. (16)
        return x, E_c

    def interest(self, e, E_c):
        """etilde = e + Gamma E_c, Gamma = softmax((e . E_c + noise) / tau), eqs. (18), (19).

        e (B, P, D), E_c (B, P, k, D) -> (B, P, D)
        """
        wide = torch.promote_types(e.dtype, torch.float32)    # bfloat16 is too coarse for tau
        with torch.autocast(e.device.type, enabled=False):
            logits = torch.einsum("bpd,bpkd->bpk", e.to(wide), E_c.to(wide))
        if self.training:
            gamma = F.gumbel_softmax(logits, self.cfg.tau)                # eq. (19), reading 11
        else:
            gamma = (logits / self.cfg.tau).softmax(-1)                   # the same without noise
        return e + torch.einsum("bpk,bpkd->bpd", gamma, E_c)              # eq. (18)

    def states(self, seq, table, P=1):
        """Of histories (B, L): e^s (B, P, D), eq. (17), and {m: etilde^m (B, P, D)}, eq. (18)."""
        e_s, _ = self.encode("id", seq, table["id"], P=P)
        e_tilde = {}
        for m in MODALITIES:
            if self.cfg.use_ica:
                E_hat_c = self.clusters[m] @ table[m]                     # eq. (11): (k, D)
                e, E_c = self.encode(m, seq, table[m], E_hat_c, P)
                e_tilde[m] = self.interest(e, E_c)
            else:
                e, _ = self.encode(m, seq, table[m], P=P)
                e_tilde[m] = e                                            # reading 14
            e_s = e_s + self.rho[m] * e                                   # eq. (17)
        return e_s, e_tilde

    def forward(self, batch):
        """The terms of L = L_s + sum_m rho_m L_m, eq. (23): {"next_item": L_s, m: rho_m L_m}.

        The training loop adds them up. With prefixes only the last column of "target" is read.
        """
        seq = recent(self, batch)
        P = 1 if self.cfg.prefixes else seq.shape[1]
        target = batch["target"][:, -P:].flatten()                        # (B P,)
        table = self.encode_items()
        e_s, e_tilde = self.states(seq, table, P)
        loss = softmax_loss(e_s.flatten(0, 1), table["item"], target)     # eqs. (20), (24)
        losses = {"next_item": loss}
        for m in MODALITIES:
            L_m = softmax_loss(e_tilde[m].flatten(0, 1), table[m], target)     # eqs. (21), (24)
            losses[m] = self.rho[m] * L_m                                 # eq. (23)
        return losses

    def score(self, batch, table):
        """y = e^s . E^id + sum_m rho_m etilde^m . Ehat^m, eqs. (20) to (22): scores (B, N+1).

        Column 0 is padding's and means nothing.
        """
        seq = recent(self, batch)
        e_s, e_tilde = self.states(seq, table)
        scores = e_s[:, -1] @ table["item"].T                             # eq. (20)
        for m in MODALITIES:
            y_m = e_tilde[m][:, -1] @ table[m].T                          # eq. (21)
            scores = scores + self.rho[m] * y_m                           # eq. (22)
        return scores

    def as_product(self, batch, table):
        """Users (B, 3 D) and items (N+1, 3 D) whose products are the scores: eq. (22) as one."""
        e_s, e_tilde = self.states(recent(self, batch), table)
        users, items = [e_s[:, -1]], [table["item"]]
        for m in MODALITIES:
            users.append(self.rho[m] * e_tilde[m][:, -1])
            items.append(table[m])
        return torch.cat(users, 1), torch.cat(items, 1)


Model, Config = MDSRec, MDSRecConfig


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
    seqs = [torch.randint(1, N + 1, (12,)).tolist() for _ in range(50)]
    features = {"text": torch.randn(N + 1, 24), "image": torch.randn(N + 1, 32)}
    model = MDSRec(MDSRecConfig(dim=32), {"n_items": N, "train_seqs": seqs, **features})
    rows = torch.tensor(seqs[:B])
    batch = {"user": torch.arange(B), "seq": rows[:, :L], "target": rows[:, 1:L + 1]}
    losses = model(batch)
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
    shown = {name: round(loss.item(), 4) for name, loss in losses.items()}
    print(shown, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
