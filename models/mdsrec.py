"""MDSRec: Multimodal Difference Learning for Sequential Recommendation. Changhong Li, Zhiqiang Guo. 2024. arXiv:2412.08103.

People buy one thing for its look and another for its words, and two items can be alike in one modality only. So: (a) a
graph of like items per modality, built from features that co-occurrence has been mixed into, turns item ids into one
item table per modality; (b) each modality has its own Transformer over the user's sequence, in which learned interest
centres attend to the sequence as well; (c) the three next-item predictions (fused, image, text) are added.

    train_seqs -> O co-occurrence (1, 2)                   E^id --O--> Ebar^id (3) -----------> Trm^id ---> e^id_t -+
    E^m -> Ebar^m = mu O E^m + E^m (3) -> cosine (4) -> A^m top-H (5)                                               |
           Ehat^m = A^m E^id (6) ----------------------------------------> Trm^m (9) ---> e^m_t --(rho_m)-----------+-> e^s (17)
    k-means(E^m) = C^m (10) -> C^m Ehat^m (11) = centres -> attend to the sequence (12-16) -> Gamma (18, 19) -> etilde^m
    score = e^s . E^id (20) + sum_m rho_m etilde^m . Ehat^m (21, 22)            m = v (image), t (text)

Readings, where the paper is silent, misprinted or contradicts itself:
  D1-D2    eqs 1-2: position pairs of different items, symmetric, zero diagonal; training part only, last max_len items.
  D3, D5   eq 3: rows of O sum to 1 (unnormalised, mu = 0.2 would already drown the modal feature), features have length 1.
  D4, D8   A^m, O and the clusters are fixed, sparse and built once; eqs 3, 6 and 11 are recomputed every step, with
           gradient into E^id.
  D6-D7    eqs 5-6: an item is its own first neighbour, the mean of the H neighbours is taken; H = 0, like 1, is itself.
  D9, D23  eq 6 and the candidates of eq 20 use E^id, not Ebar^id, as printed.
  D10, D17 eqs 7-9: three encoders, one position table P; causal blocks with LayerNorm after the residual sum, as in BERT.
  D11      eq 10: hard assignment of raw features, each row of C divided by its cluster's size, so that C Ehat are means.
  D12-D14  eqs 12-15: the centres pass the very block that the sequence passes (residual, LayerNorm, GELU between the
           two linear maps): as printed, two linear maps in a row are one, and without a residual all centres become equal.
  D15-D16  the centres read the whole input, so only a row's last position may have a loss: one row per prefix.
  D18, D22 rho_v + rho_t = 1, 0.5 each; tau = 0.2. Neither is given.
  D19-D21  eq 19: the noise is logistic, though called Gumbel; the usual Gumbel-softmax is meant. None in evaluation.
  D24-D27  eqs 20-24: scores are raw dot products, the softmax is inside each cross entropy, 1/|U| is over the whole sum;
           the centre features of eq 16 are per user.
  D28-D29  layers, heads, inner width and dropout are not given: MISSRec's. 50 items for every data set.
  D30      features of any encoder; they enter the graphs and the clusters, and a trained layer only in w/o MRGC.
  D31-D32  the history stays in the ranking, and is left out in the second number of every table; no pre-training.
  and:     w/o CRE builds the modal graphs from E^m instead of Ebar^m; Ebar^id stays (mu_id = 0 is without that as well).
           w/o MRGC makes Ehat^m a linear map of E^m. An item without a modality has what co-occurrence gives it (eq 3);
           if that is nothing, its only neighbour is itself.

Reads from the catalog: n_items, text, image, train_seqs. Centres and graphs are buffers, not weights.
"""
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

READS = ("text", "image", "train_seqs")
MODALITIES = ("image", "text")


@dataclass
class MDSRecConfig:
    dim: int = 300                       # "fixed embedding size 300"
    heads: int = 4                       # not in the paper; MISSRec's
    layers: int = 2                      # L; not in the paper; MISSRec's
    inner: int = 256                     # width of the feed-forward; not in the paper; MISSRec's
    dropout: float = 0.5                 # not in the paper; MISSRec's
    max_len: int = 50
    neighbors: int = 10                  # H = 10 in general, tuned per data set (Parameter Settings)
    centers: int = 32                    # k = 32 in general, tuned per data set
    mu_id: float = 16.0                  # mu^id = 16 (Parameter Settings)
    mu_modal: float = 0.2                # mu^m = 0.2 (Parameter Settings)
    rho_image: float = 0.5               # rho_v; rho_t = 1 - rho_v (below eq. 17)
    tau: float = 0.2                     # temperature of eq. 19
    use_dis: bool = True                 # w/o DIS, Table 3: every pair in a sequence counts 1
    use_cre: bool = True                 # w/o CRE, Table 3
    use_mrgc: bool = True                # w/o MRGC, Table 3
    use_ica: bool = True                 # w/o ICA, Table 3
    optimizer: str = "adam"              # Adam (Parameter Settings)
    lr: float = 1e-3                     # searched in 1e-4 ... 1e-1 (Parameter Settings)
    weight_decay: float = 0.0
    batch_size: int = 512                # "mini-batch size 512"
    epochs: int = 200                    # at most; not in the paper
    patience: int = 10                   # "a patience of 10"
    prefixes: bool = True                # D16


# the paper's best H and k (its analysis of the neighbor number and the center number); small sets at a CPU's width
PRESETS = {
    "scientific": dict(neighbors=5, centers=16), "pantry": dict(neighbors=10, centers=16),
    "baby": dict(neighbors=10, centers=32), "sports": dict(neighbors=20, centers=32),
    "clothing": dict(neighbors=15, centers=64),
    "scientific-mm": dict(neighbors=5, centers=16, dim=64, inner=128, dropout=0.3, lr=2e-3),
    "ml100k": dict(dim=64, inner=128, dropout=0.3, lr=2e-3, prefixes=False),       # long histories: a row per prefix is slow
    "demo": dict(centers=4, dim=64, inner=128, lr=3e-3, epochs=20),
}


class SoftmaxLoss(torch.autograd.Function):
    """Mean cross entropy of states (R, D) over items 1..N of a table (N+1, D).

    Works through the rows in chunks and makes the gradient on the way, so the (R, N+1) logits never exist as a whole.
    """

    @staticmethod
    def forward(ctx, states, items, target):
        loss = torch.zeros((), device=states.device, dtype=torch.promote_types(states.dtype, torch.float32))
        d_states, d_items = torch.zeros_like(states), torch.zeros_like(items)
        chunk = max(64, 2 ** (26 if states.is_cuda else 21) // len(items))
        for first in range(0, len(states), chunk):
            rows = slice(first, first + chunk)
            logits = (states[rows] @ items.T).to(loss.dtype)                       # (chunk, N+1)
            logits[:, 0] = -torch.inf                                              # padding is no item
            logits = logits.log_softmax(1)
            answer = target[rows, None]
            loss -= logits.gather(1, answer).sum() / len(states)
            slope = logits.exp_().scatter_add_(1, answer, logits.new_full(answer.shape, -1.))
            slope = (slope / len(states)).to(states.dtype)                         # d loss / d logits
            d_states[rows] = slope @ items
            d_items += slope.T @ states[rows]
        ctx.save_for_backward(d_states, d_items)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        d_states, d_items = ctx.saved_tensors
        return d_states * slope, d_items * slope, None


class Mix(torch.autograd.Function):
    """O E for a fixed sparse matrix O (N+1, N+1) and its transpose. In float32: GPUs have no sparse product in bfloat16."""

    @staticmethod
    def forward(ctx, O, O_T, E):
        ctx.O_T = O_T
        with torch.autocast(E.device.type, enabled=False):
            return torch.sparse.mm(O, E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return None, None, torch.sparse.mm(ctx.O_T, slope)


def co_occurrence(train_seqs, n_items, max_len, use_dis=True):
    """O of eqs (1) and (2), rows divided by their sums (D3), and its transpose: sparse (N+1, N+1), zero diagonal."""
    seqs = [seq[-max_len:] for seq in train_seqs]
    items = torch.tensor([i for seq in seqs for i in seq], dtype=torch.long)
    user = torch.arange(len(seqs)).repeat_interleave(torch.tensor([len(seq) for seq in seqs], dtype=torch.long))
    pairs, values = [torch.zeros(2, 0, dtype=torch.long)], [torch.zeros(0)]
    for distance in range(1, max(map(len, seqs), default=1)):
        i, j = items[:-distance], items[distance:]
        together = (user[:-distance] == user[distance:]) & (i != j)
        pairs.append(torch.stack([i, j])[:, together])
        values.append(torch.full((int(together.sum()),), 1 / distance if use_dis else 1.))   # eq. (1)
    pairs, values = torch.cat(pairs, 1), torch.cat(values)
    i, j = torch.cat([pairs, pairs.flip(0)], 1)
    place, pair = torch.unique(i * (n_items + 1) + j, return_inverse=True)
    O = torch.zeros(len(place)).index_add_(0, pair, torch.cat([values, values]))             # eq. (2): symmetric
    index = torch.stack([place // (n_items + 1), place % (n_items + 1)])
    total = torch.zeros(n_items + 1).index_add_(0, index[0], O)
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        return tuple(torch.sparse_coo_tensor(index, O / total[side], (n_items + 1, n_items + 1), is_coalesced=True)
                     for side in index)


def nearest(features, count):
    """The `count` items of greatest cosine, the item itself among them: (N+1, D) -> (N+1, count) ids. Eqs (4), (5)."""
    N = len(features) - 1
    unit = F.normalize(features, dim=-1)
    empty = ~unit[1:].any(1)                                                       # no feature: nobody's neighbour
    found = [torch.zeros(1, min(count, N), dtype=torch.long)]
    for rows in torch.arange(1, N + 1).split(max(1, 2 ** 24 // (N + 1))):
        cosine = (unit[rows] @ unit[1:].T).masked_fill(empty, -torch.inf)          # eq. (4)
        cosine[torch.arange(len(rows)), rows - 1] = 2                              # itself first, also among equals
        best = cosine.topk(min(count, N))                                          # eq. (5)
        itself = best.values.isinf() | empty[rows - 1, None]                       # alone: see the head
        found.append(torch.where(itself, rows[:, None], best.indices + 1))
    return torch.cat(found)


def k_means(features, k, steps=50, seed=0):
    """C of eq. (10): (N+1, D) -> (k, N+1), row c is 1 / size at the members of cluster c (D11).

    Items without a feature belong to no cluster; a cluster may be empty when there are fewer different items than k.
    """
    random = torch.Generator().manual_seed(seed)
    member = features.any(1).nonzero()[:, 0]
    C = torch.zeros(k, len(features))
    if len(member) == 0:
        return C
    x = features[member]
    centers = x[torch.randint(len(x), (1,), generator=random)]
    while len(centers) < min(k, len(x)):                                           # k-means++: far points are likelier
        far = torch.cdist(x, centers).amin(1).square()
        centers = torch.cat([centers, x[torch.multinomial(far + 1e-12, 1, generator=random)]])
    for _ in range(steps):
        cluster = torch.cdist(x, centers).argmin(1)
        one_hot = F.one_hot(cluster, len(centers)).to(x.dtype)
        size = one_hot.sum(0)[:, None]
        moved = torch.where(size > 0, one_hot.T @ x / size.clamp(min=1), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    C[:len(centers), member] = one_hot.T / size.clamp(min=1)
    return C


class Block(nn.Module):
    """Trm: queries (B, Q, D) attend to keys (B, L, D), then feed-forward; residual sums, LayerNorm after them."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.p = cfg.heads, cfg.dropout
        self.query, self.key, self.value, self.out = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))   # Q, K, V, U
        self.inner, self.outer = nn.Linear(cfg.dim, cfg.inner), nn.Linear(cfg.inner, cfg.dim)
        self.norm1, self.norm2 = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, keys, mask):                            # mask (B, 1, Q, L) True = may look
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (B, heads, ., D / heads)
        head = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(keys)), split(self.value(keys)),
                                              mask, dropout_p=self.p if self.training else 0.)   # eqs. (12), (13)
        x = self.norm1(x + self.dropout(self.out(head.transpose(1, 2).flatten(2))))              # eq. (14)
        return self.norm2(x + self.dropout(self.outer(F.gelu(self.inner(x)))))                   # eq. (15)


class MDSRec(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        if cfg.dim % cfg.heads:
            raise ValueError(f"dim {cfg.dim} must be a multiple of heads {cfg.heads}")
        if cfg.neighbors < 0 or cfg.centers < 1 or not 0 <= cfg.rho_image <= 1 or cfg.tau <= 0:
            raise ValueError("neighbors must be at least 0, centers at least 1, rho_image from 0 to 1, tau above 0")
        self.cfg, N = cfg, catalog["n_items"]
        self.rho = {"image": cfg.rho_image, "text": 1 - cfg.rho_image}
        self.item = nn.Embedding(N + 1, cfg.dim, padding_idx=0)                    # E^id
        self.position = nn.Parameter(torch.empty(cfg.max_len, cfg.dim))            # P
        self.norm, self.dropout = nn.LayerNorm(cfg.dim), nn.Dropout(cfg.dropout)
        self.encoders = nn.ModuleDict({n: nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
                                       for n in ("id", *MODALITIES)})
        buffer = lambda name, value: self.register_buffer(name, value, persistent=False)
        O, O_T = co_occurrence(catalog["train_seqs"], N, cfg.max_len, cfg.use_dis)
        buffer("O", O), buffer("O_T", O_T)
        for m in MODALITIES:
            E = F.normalize(catalog[m].to(self.position.dtype), dim=-1)             # E^m, D5
            if cfg.use_mrgc:
                E_bar = E + cfg.mu_modal * torch.sparse.mm(O, E) if cfg.use_cre else E       # eq. (3)
                buffer(f"A_{m}", nearest(E_bar, max(cfg.neighbors, 1)))            # eqs. (4), (5); D6
            else:
                buffer(f"E_{m}", E)
                self.add_module(f"map_{m}", nn.Linear(E.shape[1], cfg.dim))
            if cfg.use_ica:
                buffer(f"C_{m}", k_means(E, cfg.centers))                          # eq. (10)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0

    def encode_items(self):
        """{"item": E^id, "id": Ebar^id, "image": Ehat^v, "text": Ehat^t}, each (N+1, D)."""
        E = self.item.weight
        table = {"item": E, "id": E + self.cfg.mu_id * Mix.apply(self.O, self.O_T, E)}       # eq. (3)
        for m in MODALITIES:
            if self.cfg.use_mrgc:
                table[m] = F.embedding_bag(getattr(self, f"A_{m}"), E, mode="mean")          # eq. (6)
            else:
                table[m] = getattr(self, f"map_{m}")(getattr(self, f"E_{m}"))
        return table

    def encode(self, name, seq, items, centers=None):
        """One modality's sequence: last state (B, D), and the user's centres (B, k, D) where centres (k, D) are given."""
        B, L = seq.shape
        x = self.dropout(self.norm(F.embedding(seq, items) + self.position[-L:]))   # eqs. (7), (9)
        real = (seq != 0) | (torch.arange(L, device=seq.device) == L - 1)          # (B, L), never a row without any
        causal = torch.ones(L, L, dtype=torch.bool, device=seq.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=seq.device)
        mask = causal & real[:, None] | itself                                     # (B, L, L)
        k = 0 if centers is None else len(centers)
        c = x[:, :0] if centers is None else centers.expand(B, -1, -1)             # (B, k, D), layer 0: eq. (11)
        for i, block in enumerate(self.encoders[name]):
            last = i == len(self.encoders[name]) - 1                               # of the top layer only row t is read
            q, own = (x[:, -1:], mask[:, -1:]) if last else (x, mask)
            own = torch.cat([own, real[:, None].expand(-1, k, -1)], 1)             # centres see all of the input
            both = block(torch.cat([q, c], 1), x, own[:, None])                    # eqs. (8), (9); (12)-(15)
            x, c = both[:, :q.shape[1]], both[:, q.shape[1]:]
        return x[:, -1], c                                                         # eq. (16)

    def users(self, seq, table):
        """e^s (B, D) and etilde^m (B, D) by modality."""
        e_s, own = self.encode("id", seq, table["id"])[0], {}
        for m in MODALITIES:
            centers = getattr(self, f"C_{m}") @ table[m] if self.cfg.use_ica else None     # eq. (11): (k, D)
            e, c = self.encode(m, seq, table[m], centers)
            e_s = e_s + self.rho[m] * e                                            # eq. (17)
            if self.cfg.use_ica:
                logits = torch.einsum("bd,bkd->bk", e, c).to(e.dtype)
                gamma = (F.gumbel_softmax(logits, self.cfg.tau) if self.training else       # eq. (19)
                         (logits / self.cfg.tau).softmax(-1))
                e = e + torch.einsum("bk,bkd->bd", gamma, c)                       # eq. (18)
            own[m] = e
        return e_s, own

    def forward(self, batch):
        table, target = self.encode_items(), batch["target"][:, -1]
        e_s, own = self.users(batch["seq"], table)
        losses = {"next_item": SoftmaxLoss.apply(e_s, table["item"], target)}      # eqs. (20), (24)
        return losses | {m: self.rho[m] * SoftmaxLoss.apply(own[m], table[m], target)   # eqs. (21), (24)
                         for m in MODALITIES}                                      # eq. (23): the loop minimises the sum

    def score(self, batch, table):
        e_s, own = self.users(batch["seq"], table)
        scores = e_s @ table["item"].T                                             # eq. (20): (B, N+1)
        for m in MODALITIES:
            scores = scores + self.rho[m] * (own[m] @ table[m].T)                  # eqs. (21), (22)
        return scores


Model, Config = MDSRec, MDSRecConfig


if __name__ == "__main__":
    torch.manual_seed(0)
    start, N, B, L = time.time(), 100, 8, 10
    seqs = [torch.randint(1, N + 1, (12,)).tolist() for _ in range(50)]
    catalog = {"n_items": N, "train_seqs": seqs, "text": torch.randn(N + 1, 24), "image": torch.randn(N + 1, 32)}
    model = MDSRec(MDSRecConfig(dim=32), catalog)
    rows = torch.tensor(seqs[:B])
    batch = {"user": torch.arange(B), "seq": rows[:, :L], "target": rows[:, 1:L + 1]}
    losses = model(batch)
    sum(losses.values()).backward()
    scores = model.eval().score(batch, model.encode_items())
    print({k: round(v.item(), 4) for k, v in losses.items()}, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
