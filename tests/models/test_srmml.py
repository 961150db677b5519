"""SRMML's parts against naive loops in float64, written from the paper's equations."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from train import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
srmml = load_model_file("srmml")
N = 12
SEQS = [[1, 2, 3, 4], [5, 6, 2], [7, 8, 9, 10, 1], [2, 2]]        # N-1 and N never occur


def make_catalog(text=5, image=7):
    """Item 3 has no image, item 4 no text, item 6 neither; three languages."""
    features = {"text": torch.randn(N + 1, text), "image": torch.randn(N + 1, image)}
    has = {m: torch.ones(N + 1, dtype=torch.bool) for m in features}
    has["image"][[0, 3, 6]] = has["text"][[0, 4, 6]] = False
    lang = torch.tensor([0, 1, 2, 1, 3, 1, 2, 2, 1, 3, 3, 1, 2])
    return {"n_items": N, "lang": lang, "train_seqs": SEQS,
            **{m: x * has[m][:, None] for m, x in features.items()}, **{f"has_{m}": h for m, h in has.items()}}


def make(catalog=None, **settings):
    """A model without dropout whose weights are large enough for every part to matter."""
    cfg = srmml.Config(**dict(dim=8, heads=2, max_len=10, dropout=0.) | settings)
    model = srmml.Model(cfg, catalog or make_catalog())
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, .5)
    return model.double()


def gaussians(*shape):
    return torch.randn(*shape), torch.rand(*shape) + .05


def standardised(x, has):
    """What the heads read (S3), item by item."""
    rows = [i for i in range(len(x)) if has[i]]
    mean = sum(x[i] for i in rows) / len(rows)
    sd = (sum((x[i] - mean) ** 2 for i in rows) / len(rows)).sqrt()
    return torch.stack([(x[i] - mean) / sd / math.sqrt(x.shape[1]) if has[i] else 0 * mean for i in range(len(x))])


def heads_inputs(catalog):
    """f_T, f_I (N+1, D) as the heads see them."""
    return [standardised(F.normalize(catalog[m], dim=1), catalog[f"has_{m}"]) for m in ("text", "image")]


def w2(mu_a, sigma_a, mu_b, sigma_b):
    """Eq. (11) of two Gaussians with diagonal covariances, number by number."""
    four = zip(mu_a, sigma_a, mu_b, sigma_b)
    return sum(float((m - n) ** 2 + s + t - 2 * math.sqrt(s) * math.sqrt(t)) for m, s, n, t in four)


def elu1(x):
    return torch.where(x > 0, x + 1, x.exp()) + 1e-6


# ---------------------------------------------------------------- the distance

def test_the_distance_is_a_distance_eq_11():
    a, b = srmml.point(*gaussians(6, 4)), srmml.point(*gaussians(5, 4))
    ab, aa = srmml.wasserstein(a, b), srmml.wasserstein(a, a)
    torch.testing.assert_close(aa.diagonal(), torch.zeros(6), atol=1e-12, rtol=0)
    torch.testing.assert_close(ab, srmml.wasserstein(b, a).T)
    assert (ab > 0).all() and (aa > -1e-12).all()
    root = lambda x, y: srmml.wasserstein(x, y).clamp(min=0).sqrt()
    assert (root(a, a)[:, :, None] <= root(a, b)[:, None] + root(b, a).T[None] + 1e-9).all()     # the root's triangles


def test_the_distance_is_the_general_formula_and_the_naive_loop():
    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T

    (mu_a, sigma_a), (mu_b, sigma_b) = gaussians(4, 3), gaussians(5, 3)
    found = srmml.wasserstein(srmml.point(mu_a, sigma_a), srmml.point(mu_b, sigma_b))
    for i in range(4):
        for j in range(5):
            A, B = sigma_a[i].diag(), sigma_b[j].diag()
            general = (mu_a[i] - mu_b[j]).square().sum() + torch.trace(A + B - 2 * root(root(A) @ B @ root(A)))
            torch.testing.assert_close(found[i, j], general)
            assert found[i, j].item() == pytest.approx(w2(mu_a[i], sigma_a[i], mu_b[j], sigma_b[j]))


def test_the_distance_is_precise_in_float32():
    mu, sigma = torch.randn(1, 64), 1 + .01 * torch.randn(1, 64)
    near = srmml.point(mu + 1e-2, sigma), srmml.point(mu, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        found = srmml.wasserstein(*(x.float() for x in near))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(64e-4, rel=1e-2)


def test_covariances_stay_above_zero():
    torch.set_default_dtype(torch.float32)
    extreme = torch.tensor([-1e30, -1e4, -100., -17., -1., 0., 1., 100., 1e4])
    for x in (extreme, extreme.bfloat16()):
        found = srmml.positive(x)
        assert found.dtype == torch.float32 and (found >= 5e-7).all()
    torch.testing.assert_close(found[5:], torch.tensor([1., 2., 101., 9985.]), rtol=1e-2, atol=0)
    x = extreme.clone().requires_grad_()
    srmml.point(x, srmml.positive(x)).sum().backward()
    assert x.grad.isfinite().all()
    layer = make(heads=2).float().blocks[0]
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    for scale in (1., 1e2, 1e4):
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                mu, sigma = scale * torch.randn(2, 3, 4, 8)
                for _ in range(3):
                    mu, sigma = layer(mu, sigma, mask)
                    assert (sigma > 0).all() and sigma.dtype == torch.float32 and sigma.isfinite().all()
            assert mu.isfinite().all() and srmml.point(mu, sigma).isfinite().all()


# ---------------------------------------------------------------- the items

@torch.no_grad()
@pytest.mark.parametrize("image", [5, 7])
def test_fusion_eqs_1_to_4(image):
    catalog = make_catalog(image=image)
    model = make(catalog)
    fusion, found = model.fusion, model.fusion()
    gelu = lambda x: x * .5 * (1 + math.erf(x / math.sqrt(2)))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    def network(pooled):                                         # Linear(3, 3), GELU, Linear(3, 3), number by number
        first, _, second = fusion.attention
        hidden = [gelu(float(first.weight[r] @ pooled + first.bias[r])) for r in range(3)]
        return [float(second.weight[r] @ torch.tensor(hidden) + second.bias[r]) for r in range(3)]

    for i in range(N + 1):
        has_text, has_image = (bool(catalog[f"has_{m}"][i]) for m in ("text", "image"))
        f_T, f_I = (f[i] for f in heads_inputs(catalog))
        f_M = torch.cat([f_T, f_I])                              # eq. (1)
        m = {"text": fusion.P["text"](f_T), "image": fusion.P["image"](f_I), "fused": fusion.P["fused"](f_M)}
        if has_text and has_image:                               # eqs. (2), (3); S5: one space only if the widths agree
            s = cosine(catalog["text"][i], catalog["image"][i]) if image == 5 else cosine(m["text"], m["image"])
            m["fused"] = m["fused"] * sigmoid(float(fusion.M.weight) * s + float(fusion.M.bias))
        else:
            m["fused"] = torch.zeros(8)
        m["text"], m["image"] = m["text"] * has_text, m["image"] * has_image
        channels = [m["text"], m["image"], m["fused"]]
        mean = network(torch.stack([sum(c) / 8 for c in channels]))
        top = network(torch.stack([max(c) for c in channels]))
        aggregated = sum(sigmoid(a + b) * c for a, b, c in zip(mean, top, channels))           # eq. (4)
        torch.testing.assert_close(found[i], aggregated)
        assert has_text or has_image or not found[i].any()


@torch.no_grad()
def test_item_tables_and_gate_eqs_6_to_9():
    catalog = make_catalog()
    model = make(catalog, gate_scale=1.5)
    table, m_agg = model.encode_items(), model.fusion()
    count = [sum(seq.count(i) for seq in SEQS) for i in range(N + 1)]
    lang = catalog["lang"].tolist()
    mean = {s: sum(count[i] for i in range(1, N + 1) if lang[i] == s) / lang.count(s) for s in (1, 2, 3)}
    stats = torch.tensor([[math.log(1 + count[i]), math.log(1 + mean[lang[i]])] for i in range(1, N + 1)])
    stats = (stats - stats.mean(0)) / ((stats - stats.mean(0)) ** 2).mean(0).sqrt()
    first, _, second, _ = model.gate
    for i in range(1, N + 1):
        seen = any(i in seq for seq in SEQS)
        M = {s: seen * model.item[s].weight[i] + model.content[s].weight @ m_agg[i] for s in ("mu", "sigma")}       # S8
        y = torch.cat([model.language.weight[lang[i]], stats[i - 1], M["mu"]])
        hidden = (first.weight @ y + first.bias).clamp(min=0)                                  # eq. (6)
        G = 1.5 / (1 + torch.exp(-(second.weight @ hidden + second.bias)))                     # eqs. (7), (8)
        for name, expected in (("mu", M["mu"]), ("sigma", M["sigma"]), ("gate", G)):
            torch.testing.assert_close(table[name][i], expected)
        place = torch.cat([G * M["mu"], elu1(G * M["sigma"]).sqrt() - 1])                      # eq. (9), S28
        torch.testing.assert_close(table["point"][i], place)


def test_the_gate_is_between_0_and_2_and_sends_no_gradient_into_the_means():
    model = make()
    gate = model.encode_items()["gate"]
    assert (gate > 0).all() and (gate < 2).all() and gate.std() > .1 and gate.max() > 1
    for name in ("mu", "sigma"):
        assert not torch.autograd.grad(gate.sum(), model.item[name].weight, retain_graph=True, allow_unused=True)[0]
    assert torch.autograd.grad(gate.sum(), model.language.weight)[0].any()


def test_statistics_of_one_language_and_of_no_sequences():
    stats, seen = srmml.statistics(torch.tensor([0, 1, 1, 1]), [[1, 1, 2]])
    assert seen.tolist() == [False, True, True, False] and not stats[:, 1].any() and stats[1, 0] > stats[2, 0] > stats[3, 0]
    stats, seen = srmml.statistics(torch.tensor([0, 1, 2]), [])
    assert not stats.any() and not seen.any()


def test_items_never_seen_are_scored_by_their_content():
    catalog = make_catalog()
    model = make(catalog).eval()
    table = model.encode_items()
    scores = model.score({"seq": torch.tensor([[1, 2, 12]])}, table)
    assert scores.isfinite().all() and scores[0, 11] != scores[0, 12]
    for name in ("mu", "sigma"):
        slope, = torch.autograd.grad(table[name].sum(), model.item[name].weight, retain_graph=True)
        assert not slope[[0, 11, 12]].any() and slope[1:11].all()
    twin = {k: v.clone() if torch.is_tensor(v) else v for k, v in catalog.items()}
    for key in ("text", "image", "lang"):
        twin[key][12] = twin[key][11]                            # an unseen item is its content and nothing else
    twins = make(twin).eval()
    scores = twins.score({"seq": torch.tensor([[1, 2, 3]])}, twins.encode_items())
    torch.testing.assert_close(scores[0, 11], scores[0, 12])


# ---------------------------------------------------------------- the attention

@torch.no_grad()
def naive_attend(layer, mu, sigma):
    """Eqs. (10) to (13) of one row (L, d): A (heads, L, L), z^mu and z^Sigma (L, d), in Python loops."""
    L, d, heads = *mu.shape, layer.mean.heads
    mu_q, mu_k, mu_v = (mu @ w.T for w in layer.mean.qkv.weight.split(d))
    sigma_q, sigma_k, sigma_v = (elu1(sigma @ w.T) for w in layer.covariance.qkv.weight.split(d))
    A, z_mu, z_sigma = torch.zeros(heads, L, L), torch.zeros(L, d), torch.zeros(L, d)
    for h in range(heads):
        p = slice(h * d // heads, (h + 1) * d // heads)
        for t in range(L):
            weight = [math.exp(-w2(mu_q[t, p], sigma_q[t, p], mu_k[k, p], sigma_k[k, p]) / math.sqrt(d // heads))
                      for k in range(t + 1)]
            for k in range(t + 1):
                A[h, t, k] = weight[k] / sum(weight)                                           # eq. (12)
                z_mu[t, p] += A[h, t, k] * mu_v[k, p]                                          # eq. (13)
                z_sigma[t, p] += A[h, t, k] ** 2 * sigma_v[k, p]
    return A, z_mu, z_sigma


def join(z):
    return z.transpose(1, 2).flatten(2)


@torch.no_grad()
def test_attention_and_layer_eqs_11_to_15():
    layer, mask = make(layers=2).blocks[1], torch.ones(5, 5, dtype=torch.bool).tril()
    mu, sigma = torch.randn(2, 3, 5, 8)
    A, z_mu, z_sigma = layer.attend(mu, sigma, mask)
    Z_mu, Z_sigma = layer(mu, sigma, mask)
    for b in range(3):
        for found, expected in zip((A[b], join(z_mu)[b], join(z_sigma)[b]), naive_attend(layer, mu[b], sigma[b])):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

        def feed_forward(s, x, z):
            z = x + s.out(z)
            inner = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            inner = inner * s.norm.weight + s.norm.bias
            inner = s.ffn[0](inner)
            inner = torch.where(inner > 0, inner, inner.exp() - 1)
            return z + s.ffn[2](inner)                                                         # eqs. (14), (15)
        torch.testing.assert_close(Z_mu[b], feed_forward(layer.mean, mu[b], join(z_mu)[b]))
        torch.testing.assert_close(Z_sigma[b], elu1(feed_forward(layer.covariance, sigma[b], join(z_sigma)[b])))


def test_gradients_of_the_attention():
    layer, mask = make(dim=4, heads=2).blocks[0], torch.ones(3, 3, dtype=torch.bool).tril()
    mu, sigma = (torch.randn(1, 3, 4, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda m, s: layer.attend(m, s, mask), (mu, sigma))
    assert torch.autograd.gradcheck(lambda m, s: layer(m, s, mask), (mu, sigma))


@torch.no_grad()
def test_nearer_items_weigh_more_and_score_more():
    layer = make(heads=1).blocks[0]
    for stream in (layer.mean, layer.covariance):
        stream.qkv.weight.copy_(torch.eye(8).repeat(3, 1))
    mu, sigma = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    mu[0, 1], sigma[0, 1] = mu[0, 3] + .1, sigma[0, 3]           # position 1 is the nearest to position 3 but for itself
    A = layer.attend(mu, sigma, torch.ones(4, 4, dtype=torch.bool).tril())[0][0, 0]
    assert A[3].argsort(descending=True)[:2].tolist() == [3, 1]
    model = make().eval()
    table, seq = model.encode_items(), torch.tensor([[1, 5, 9]])
    state, p = model.states(seq, table)[0, -1], table["point"]
    distance = (state - p).square().sum(1)
    torch.testing.assert_close(model.score({"seq": seq}, table)[0], -distance)
    p[7] = state + 1e-3                                          # an item where the user is
    assert model.score({"seq": seq}, table)[0].argmax() == 7


@torch.no_grad()
def test_squared_weights_give_the_variance_of_the_combination_eq_13():
    layer = make(heads=1, dim=4).blocks[0]
    mu, sigma = torch.randn(2, 1, 3, 4)
    A, z_mu, z_sigma = layer.attend(mu, sigma, torch.ones(3, 3, dtype=torch.bool).tril())
    v_mu, v_sigma = mu[0] @ layer.mean.qkv.weight[8:].T, elu1(sigma[0] @ layer.covariance.qkv.weight[8:].T)
    draws = v_mu + v_sigma.sqrt() * torch.randn(200_000, 3, 4)   # the values as independent Gaussians
    mixed = torch.einsum("k,nkd->nd", A[0, 0, 2], draws)
    torch.testing.assert_close(mixed.mean(0), z_mu[0, 0, 2], atol=.02, rtol=0)
    torch.testing.assert_close(mixed.var(0), z_sigma[0, 0, 2], rtol=.02, atol=0)


@torch.no_grad()
def test_states_eqs_5_and_9_causality_and_padding():
    model = make(layers=2).eval()
    table, seq = model.encode_items(), torch.tensor([[0, 0, 4, 11, 6], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    found = model.states(seq, table)
    assert found.isfinite().all()
    for b, pad in ((0, 2), (1, 0)):
        items = seq[b, pad:]
        norm = lambda s, x: F.layer_norm(x, (8,)) * model.norm[s].weight + model.norm[s].bias
        mu, sigma = (table["gate"][items] * norm(s, table[s][items] + model.position[s][5 + pad:]) for s in ("mu", "sigma"))
        for layer in model.blocks:
            _, z_mu, z_sigma = naive_attend(layer, mu, sigma)
            mu, sigma = (s.out(z) + x for s, z, x in ((layer.mean, z_mu, mu), (layer.covariance, z_sigma, sigma)))
            mu, sigma = (x + s.ffn(s.norm(x)) for s, x in ((layer.mean, mu), (layer.covariance, sigma)))
            sigma = elu1(sigma)
        torch.testing.assert_close(found[b, pad:], torch.cat([mu, sigma.sqrt() - 1], 1))
    changed = seq.clone()
    changed[:, 3] = 7
    torch.testing.assert_close(model.states(changed, table)[:, :3], found[:, :3])
    assert not torch.allclose(model.states(changed, table)[:, 3:], found[:, 3:])


# ---------------------------------------------------------------- the loss

def plain_loss(states, items, log_scale, target):
    logits = -torch.exp(log_scale) * (states[:, None] - items[None]).square().sum(-1)          # eq. (16)
    return F.cross_entropy(logits[target != 0, 1:], target[target != 0] - 1)                   # eq. (17)


def test_the_chunked_loss_is_cross_entropy_with_all_gradients(monkeypatch):
    states, items = torch.randn(7, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    log_scale, target = torch.tensor(-.7, requires_grad=True), torch.tensor([3, 0, 10, 1, 1, 0, 5])
    inputs = (states, items, log_scale)
    for rows in (None, 2, 1):
        monkeypatch.setattr(srmml, "CHUNK", rows)
        torch.testing.assert_close(srmml.distance_loss(*inputs, target), plain_loss(*inputs, target))
        for a, b in zip(torch.autograd.grad(3 * srmml.distance_loss(*inputs, target), inputs),
                        torch.autograd.grad(3 * plain_loss(*inputs, target), inputs)):
            torch.testing.assert_close(a, b)
        assert torch.autograd.gradcheck(lambda *x: srmml.distance_loss(*x, target), inputs)
    assert srmml.distance_loss(*inputs, 0 * target) == 0         # no target at all: nothing, not NaN
    bias = torch.randn(11, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: srmml.SoftmaxLoss.apply(*x, target), (states, items, bias))


def test_the_loss_is_float32_under_autocast():
    torch.set_default_dtype(torch.float32)
    states, items, target = 3 * torch.randn(50, 32), 3 * torch.randn(40, 32), torch.randint(1, 40, (50,))
    log_scale = torch.tensor(-1.)
    with torch.autocast("cpu", torch.bfloat16):
        found = srmml.distance_loss(states, items, log_scale, target)
    expected = plain_loss(states.double(), items.double(), log_scale.double(), target)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    for settings in (dict(layers=2), dict(use_gaussian=False), dict(use_gate=False), dict(use_fusion=False)):
        model = make(**settings).float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model({"seq": torch.tensor([[1, 2, 3]]), "target": torch.tensor([[2, 3, 4]])})["next_item"]
            scores = model.score({"seq": torch.tensor([[1, 2, 3]])}, model.encode_items())
        assert loss.dtype == torch.float32 and (scores.dtype == torch.float32 or "use_gaussian" in settings)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class Sizes(TorchDispatchMode):
    """The shapes of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t)}
        return out


def test_nothing_as_large_as_rows_times_items(monkeypatch):
    items, B, L = 400, 13, 9
    catalog = {"n_items": items, "lang": torch.arange(items + 1).clamp(max=2), "train_seqs": [list(range(1, items + 1))],
               "text": torch.randn(items + 1, 5), "image": torch.randn(items + 1, 5),
               "has_text": torch.arange(items + 1) > 0, "has_image": torch.arange(items + 1) > 0}
    model, chunk = make(catalog, dim=4, dropout=.1), 19
    monkeypatch.setattr(srmml, "CHUNK", chunk)
    seq, saved = torch.randint(1, items, (B, L)), []
    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model({"seq": seq, "target": seq + 1})["next_item"].backward()
        model.score({"seq": seq}, model.encode_items())
    both = [s for s in sizes.shapes if items + 1 in s and set(s) & {B, L, B * L, chunk}]
    assert (chunk, items + 1) in both and (B, items + 1) in both             # the loss's chunk, the scores: no third kind
    assert set(both) <= {(chunk, items + 1), (items + 1, chunk), (B, items + 1)}, both
    assert max(map(math.prod, sizes.shapes)) <= (items + 1) * max(chunk, 3 * 8)          # 3 * 8: the heads' widths
    assert not any(s.count(L) > 1 and len(s) > 4 for s in sizes.shapes)      # no (B, heads, L, L, d)
    assert max(saved) <= (items + 1) * 3 * 8                                 # what waits for the backward pass


# ---------------------------------------------------------------- the ablations

def named(model):
    return {k.split(".")[0] if "fusion" not in k else ".".join(k.split(".")[:3]) for k, _ in model.named_parameters()}


@pytest.mark.parametrize("settings, gone", [
    (dict(use_fusion=False), {"fusion.P.text", "fusion.P.image", "fusion.M.weight", "fusion.M.bias", "fusion.attention.0",
                              "fusion.attention.2"}),
    (dict(modality="text"), {"fusion.P.image", "fusion.P.fused", "fusion.M.weight", "fusion.M.bias", "fusion.attention.0",
                             "fusion.attention.2"}),
    (dict(modality="image"), {"fusion.P.text", "fusion.P.fused", "fusion.M.weight", "fusion.M.bias", "fusion.attention.0",
                              "fusion.attention.2"}),
    (dict(use_gate=False), {"gate", "language"}),
    (dict(learn_temperature=False), {"log_scale"}),
])
def test_ablations_remove_the_weights_they_name(settings, gone):
    assert named(make()) - named(make(**settings)) == gone


@torch.no_grad()
def test_without_fusion_both_features_pass_one_head():
    catalog = make_catalog()
    fusion = make(catalog, use_fusion=False).fusion
    expected = fusion.P["fused"](torch.cat(heads_inputs(catalog), 1)) * (catalog["has_text"] | catalog["has_image"])[:, None]
    torch.testing.assert_close(fusion(), expected)


@torch.no_grad()
@pytest.mark.parametrize("kept, other", [("text", "image"), ("image", "text")])
def test_one_modality_alone_reads_nothing_of_the_other(kept, other):
    catalog = make_catalog()
    before = make(catalog, modality=kept)
    changed = catalog | {other: torch.randn_like(catalog[other]), f"has_{other}": ~catalog[f"has_{other}"]}
    after = make(changed, modality=kept)
    after.load_state_dict(before.state_dict())
    torch.testing.assert_close(before.fusion(), after.fusion())
    f = heads_inputs(catalog)[kept == "image"]
    torch.testing.assert_close(before.fusion(), before.fusion.P[kept](f) * catalog[f"has_{kept}"][:, None])


@torch.no_grad()
def test_without_the_gate_every_gate_is_1():
    model = make(use_gate=False)
    table = model.encode_items()
    assert torch.equal(table["gate"], torch.ones(N + 1, 8))
    torch.testing.assert_close(table["point"], srmml.point(table["mu"], elu1(table["sigma"])))


@torch.no_grad()
def test_without_the_probabilistic_model_items_are_fixed_vectors():
    full, model = make(), make(use_gaussian=False)
    assert not any("sigma" in k or "covariance" in k for k in model.state_dict())
    assert {k for k in full.state_dict() if "sigma" not in k and "covariance" not in k} == set(model.state_dict())
    layer, x, L = model.blocks[0], torch.randn(1, 4, 8), 4
    A, z, none = layer.attend(x, None, torch.ones(L, L, dtype=torch.bool).tril())
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in layer.mean.qkv(x).chunk(3, -1))
    torch.testing.assert_close(z, F.scaled_dot_product_attention(q, k, v, is_causal=True))     # eq. (10)
    assert none is None
    table, seq = model.encode_items(), torch.tensor([[2, 1, 3]])
    state = model.states(seq, table)[0, -1]
    torch.testing.assert_close(table["point"], table["gate"] * table["mu"])
    torch.testing.assert_close(model.score({"seq": seq}, table)[0], table["point"] @ state)
    loss = model({"seq": seq, "target": torch.tensor([[0, 0, 5]])})["next_item"]
    logits = model.log_scale.exp() * (table["point"] @ state)
    torch.testing.assert_close(loss, F.cross_entropy(logits[None, 1:], torch.tensor([4])))


def test_the_temperature_starts_where_it_should():
    assert make().log_scale.requires_grad and not make(learn_temperature=False).log_scale.requires_grad
    fresh = lambda **s: srmml.Model(srmml.Config(dim=16, **s), make_catalog()).log_scale.exp().item()
    assert fresh() == pytest.approx(1 / 4) and fresh(temperature=5.) == pytest.approx(1 / 5)
    model = make(learn_temperature=False)
    seq = torch.tensor([[2, 1, 3]])
    table, target = model.encode_items(), torch.tensor([[1, 3, 5]])
    expected = plain_loss(model.states(seq, table)[0], table["point"], torch.tensor(-math.log(math.sqrt(8))), target[0])
    torch.testing.assert_close(model({"seq": seq, "target": target})["next_item"], expected)


@pytest.mark.parametrize("missing", [("text",), ("image",), ("text", "image")])
def test_wholly_missing_modalities(missing):
    catalog = make_catalog()
    for m in missing:
        catalog[m], catalog[f"has_{m}"] = torch.zeros_like(catalog[m]), torch.zeros(N + 1, dtype=torch.bool)
    model, seq = make(catalog), torch.tensor([[0, 3, 12, 5]])
    loss = model({"seq": seq, "target": torch.tensor([[0, 12, 5, 7]])})["next_item"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for m in missing:
        assert not any(p.grad.any() for p in model.fusion.P[m].parameters())
    assert not any(p.grad.any() for p in model.fusion.P["fused"].parameters())
    assert model.score({"seq": seq}, model.encode_items()).isfinite().all()


@pytest.mark.parametrize("settings", [dict(heads=3), dict(temperature=-1.), dict(gate_scale=0.), dict(languages=2)])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError):
        make(**settings)
