"""SRMML's parts against naive loops in float64, written from the paper's equations."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import kept_for_backward
from loop.settings import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
srmml = load_model_file("srmml")
N = 12
SEQS = [[1, 2, 3, 4], [5, 6, 2], [7, 8, 9, 10, 1], [2, 2]]    # 11 and 12 never occur
LANG = [0, 1, 2, 1, 3, 1, 2, 2, 1, 3, 3, 1, 2]


def make_catalog(text=5, image=7):
    """Item 3 has no image, item 4 no text, item 6 neither; three languages."""
    has_text = torch.ones(N + 1, dtype=torch.bool)
    has_image = torch.ones(N + 1, dtype=torch.bool)
    has_text[[0, 4, 6]] = False
    has_image[[0, 3, 6]] = False
    return {
        "n_items": N,
        "text": torch.randn(N + 1, text) * has_text[:, None],
        "image": torch.randn(N + 1, image) * has_image[:, None],
        "has_text": has_text,
        "has_image": has_image,
        "lang": torch.tensor(LANG),
        "train_seqs": SEQS,
    }


def make(catalog=None, **settings):
    """A model without dropout whose weights are large enough for every part to matter."""
    small = dict(dim=8, heads=2, max_len=10, dropout=0.)
    model = srmml.Model(srmml.Config(**small | settings), catalog or make_catalog())
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, .5)
    return model.double()


def causal(L):
    return torch.ones(L, L, dtype=torch.bool).tril()


def gaussians(*shape):
    """Means and covariances."""
    return torch.randn(*shape), torch.rand(*shape) + .05


def standardised(x, has):
    """What the heads read (reading 2), item by item."""
    rows = [i for i in range(len(x)) if has[i]]
    mean = sum(x[i] for i in rows) / len(rows)
    deviation = (sum((x[i] - mean) ** 2 for i in rows) / len(rows)).sqrt()
    found = torch.zeros_like(x)
    for i in rows:
        found[i] = (x[i] - mean) / deviation / math.sqrt(x.shape[1])
    return found


def standardised_channels(x, has):
    """What the channel network reads (reading 4): each column of x (N+1, 3) by itself."""
    columns = [standardised(x[:, c:c + 1], has[:, c]) for c in range(x.shape[1])]
    return torch.cat(columns, 1)


def heads_inputs(catalog):
    """f_T, f_I (N+1, D) as the heads see them."""
    return [
        standardised(F.normalize(catalog[m], dim=1), catalog[f"has_{m}"])
        for m in ("text", "image")
    ]


def w2(mu_a, sigma_a, mu_b, sigma_b):
    """Eq. (11) of two Gaussians with diagonal covariances, number by number."""
    total = 0.
    for m, s, n, t in zip(mu_a, sigma_a, mu_b, sigma_b):
        total += float((m - n) ** 2 + s + t - 2 * math.sqrt(s) * math.sqrt(t))
    return total


def elu1(x):
    return torch.where(x > 0, x + 1, x.exp()) + 1e-6


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---------------- the distance

def test_wasserstein_distance_is_positive_symmetric_and_zero_to_itself_eq_11():
    a = srmml.point(*gaussians(6, 4))
    b = srmml.point(*gaussians(5, 4))
    ab = srmml.wasserstein(a, b)
    aa = srmml.wasserstein(a, a)
    assert (ab > 0).all() and (aa > -1e-12).all()
    torch.testing.assert_close(aa.diagonal(), torch.zeros(6), atol=1e-12, rtol=0)
    torch.testing.assert_close(ab, srmml.wasserstein(b, a).T)


def test_wasserstein_distance_keeps_the_triangle_inequality():
    a = srmml.point(*gaussians(6, 4))
    b = srmml.point(*gaussians(5, 4))
    ab = srmml.wasserstein(a, b).clamp(min=0).sqrt()
    aa = srmml.wasserstein(a, a).clamp(min=0).sqrt()
    assert (aa[:, :, None] <= ab[:, None] + ab[None] + 1e-9).all()


def test_wasserstein_distance_is_the_general_formula_and_the_naive_loop():
    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T

    mu_a, sigma_a = gaussians(4, 3)
    mu_b, sigma_b = gaussians(5, 3)
    found = srmml.wasserstein(srmml.point(mu_a, sigma_a), srmml.point(mu_b, sigma_b))
    for i in range(4):
        for j in range(5):
            A, B = sigma_a[i].diag(), sigma_b[j].diag()
            spread = torch.trace(A + B - 2 * root(root(A) @ B @ root(A)))
            torch.testing.assert_close(found[i, j], (mu_a[i] - mu_b[j]).square().sum() + spread)
            naive = w2(mu_a[i], sigma_a[i], mu_b[j], sigma_b[j])
            assert found[i, j].item() == pytest.approx(naive)


def test_wasserstein_distance_is_precise_in_float32_under_autocast():
    mu = torch.randn(1, 64)
    sigma = 1 + .01 * torch.randn(1, 64)
    a = srmml.point(mu + 1e-2, sigma).float()
    b = srmml.point(mu, sigma).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = srmml.wasserstein(a, b)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(64e-4, rel=1e-2)


EXTREME = [-1e30, -1e4, -100., -17., -1., 0., 1., 100., 1e4]


def test_covariances_are_positive_for_any_input():
    x = torch.tensor(EXTREME, dtype=torch.float32, requires_grad=True)
    for given in (x, x.bfloat16()):
        found = srmml.positive(given)
        assert found.dtype == torch.float32 and (found >= 5e-7).all()
    expected = torch.tensor([1., 2., 101., 10_001.], dtype=torch.float32)
    torch.testing.assert_close(srmml.positive(x)[5:], expected)
    srmml.point(x, srmml.positive(x)).sum().backward()
    assert x.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("scale", [1., 1e2, 1e4])
def test_covariances_stay_positive_through_layers(scale, bfloat16):
    layer = make().float().blocks[0]
    mu, sigma = scale * torch.randn(2, 3, 4, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        for _ in range(3):
            mu, sigma = layer(mu, sigma, causal(4))
            assert (sigma > 0).all() and sigma.isfinite().all() and sigma.dtype == torch.float32
    assert mu.isfinite().all() and srmml.point(mu, sigma).isfinite().all()


# ---------------- the items

def gelu(x):
    return x * .5 * (1 + math.erf(x / math.sqrt(2)))


def channel_network(network, pooled):
    """Linear(3, 3), GELU, Linear(3, 3), number by number."""
    first, _, second = network
    hidden = [gelu(float(first.weight[r] @ pooled + first.bias[r])) for r in range(3)]
    hidden = torch.tensor(hidden)
    return [float(second.weight[r] @ hidden + second.bias[r]) for r in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("image", [5, 7])
def test_fusion_eqs_1_to_4(image):
    catalog = make_catalog(image=image)
    fusion = make(catalog).fusion
    found = fusion()
    P = fusion.P
    texts, images = heads_inputs(catalog)
    if image == 5:    # the vectors share a space only if their widths agree: reading 3
        cosine = F.cosine_similarity(catalog["text"], catalog["image"])
    else:
        cosine = F.cosine_similarity(
            fusion.norm["text"](P["text"](texts)), fusion.norm["image"](P["image"](images))
        )
    both = [i for i in range(N + 1) if catalog["has_text"][i] and catalog["has_image"][i]]
    channels = []    # of each item: whether it has them, what is pooled, what is summed
    for i in range(N + 1):
        has_text = bool(catalog["has_text"][i])
        has_image = bool(catalog["has_image"][i])
        fused = torch.cat([texts[i], images[i]])                            # eq. (1)
        u = [P["text"](texts[i]), P["image"](images[i]), P["fused"](fused)]
        m = [fusion.norm[c](x) for c, x in zip(("text", "image", "fused"), u)]
        agreement = 0.
        if has_text and has_image:    # eq. (2), reading 3
            s = float((cosine[i] - min(cosine[both])) / (max(cosine[both]) - min(cosine[both])))
            agreement = fusion.M.weight.item() * s + fusion.M.bias.item()   # eq. (3)
        factors = [has_text, has_image, agreement]
        channels.append((
            [has_text, has_image, has_text and has_image],
            torch.stack([factor * x for factor, x in zip(factors, u)]),
            torch.stack([factor * x for factor, x in zip(factors, m)]),
        ))
    has = torch.tensor([c[0] for c in channels])
    by_mean = standardised_channels(torch.stack([c[1].mean(1) for c in channels]), has)
    by_maximum = standardised_channels(torch.stack([c[1].amax(1) for c in channels]), has)
    for i, (_, _, m) in enumerate(channels):
        a = channel_network(fusion.attention, by_mean[i])
        b = channel_network(fusion.attention, by_maximum[i])
        expected = sum(sigmoid(a[c] + b[c]) * m[c] for c in range(3))       # eq. (4)
        torch.testing.assert_close(found[i], expected)
        assert has[i].any() or not found[i].any()


@torch.no_grad()
@pytest.mark.parametrize("image", [5, 7])
def test_agreement_and_channel_weights_differ_from_item_to_item(image):
    """Of a fresh model, as it starts: readings 3 and 4. At a start of .02 they are constants."""
    torch.set_default_dtype(torch.float32)
    catalog = make_catalog(image=image)
    fusion = srmml.Model(srmml.Config(dim=64, dropout=0.), catalog).fusion
    both = catalog["has_text"] & catalog["has_image"]
    outputs = []
    for part in (fusion.M, fusion.attention):
        part.register_forward_hook(lambda part, given, output: outputs.append(output[both]))
    fusion()
    agreement, by_mean, by_maximum = outputs
    assert agreement.std() > .1
    for logits in (by_mean, by_maximum):
        assert (logits.std(0) > .05).all()


def test_similarities_are_brought_to_the_unit_interval():
    has = torch.tensor([False, True, True, True, False])
    found = srmml.in_unit_interval(torch.tensor([0., .2, .4, .3, .9]), has)
    torch.testing.assert_close(found, torch.tensor([0., 0., 1., .5, 0.]))
    assert not srmml.in_unit_interval(torch.ones(3), torch.zeros(3, dtype=torch.bool)).any()
    assert srmml.in_unit_interval(torch.ones(3), torch.ones(3, dtype=torch.bool)).isfinite().all()


def test_what_is_the_same_for_all_items_is_standardised_to_nothing():
    """In float32 a mean is not exact: the rest must not be blown up."""
    x = torch.full((1001, 3), .1, dtype=torch.float32) * torch.tensor([1., 3., 1e-3])
    has = torch.ones(1001, 1, dtype=torch.bool)
    assert srmml.standardised(x.float(), has).abs().max() < .01


def naive_statistics():
    """Log mean sales in an item's language, standardised: (N, 1)."""
    sales = [sum(seq.count(i) for seq in SEQS) for i in range(N + 1)]
    rows = []
    for i in range(1, N + 1):
        same = [sales[j] for j in range(1, N + 1) if LANG[j] == LANG[i]]
        rows.append([math.log(1 + sum(same) / len(same))])
    rows = torch.tensor(rows)
    centred = rows - rows.mean(0)
    return centred / centred.square().mean(0).sqrt()


@torch.no_grad()
def test_item_tables_and_gate_eqs_6_to_9():
    model = make(gate_scale=1.5)
    table = model.encode_items()
    m_agg = model.fusion()
    stats = naive_statistics()
    first, _, second, _ = model.gate
    for i in range(1, N + 1):
        M = {}
        for s in ("mu", "sigma"):                                           # reading 6
            own = model.item[s].weight[i] * any(i in seq for seq in SEQS)
            M[s] = own + model.content[s].weight @ m_agg[i]
        y = torch.cat([model.language.weight[LANG[i]], stats[i - 1], M["mu"]])
        hidden = (first.weight @ y + first.bias).clamp(min=0)               # eq. (6)
        logits = second.weight @ hidden + second.bias
        G = 1.5 / (1 + torch.exp(-logits))                                  # eqs. (7), (8)
        torch.testing.assert_close(table["mu"][i], M["mu"])
        torch.testing.assert_close(table["sigma"][i], M["sigma"])
        torch.testing.assert_close(table["gate"][i], G)
        root = elu1(G * M["sigma"]).sqrt()
        place = torch.cat([G * M["mu"], root - 1])                          # eq. (9), reading 16
        torch.testing.assert_close(table["point"][i], place)


def test_the_gate_is_between_0_and_2_and_sends_no_gradient_into_the_means():
    model = make()
    gate = model.encode_items()["gate"]
    assert (gate > 0).all() and (gate < 2).all()
    assert gate.std() > .1 and gate.max() > 1
    weights = [model.item["mu"].weight, model.item["sigma"].weight, model.language.weight]
    slopes = torch.autograd.grad(gate.sum(), weights, allow_unused=True)
    assert slopes[0] is None and slopes[1] is None and slopes[2].any()


def test_statistics_of_one_language_and_of_no_sequences():
    stats, seen = srmml.statistics(torch.tensor([0, 1, 1, 1]), [[1, 1, 2]])
    assert seen.tolist() == [False, True, True, False]
    assert not stats.any()    # of one language: nothing to tell apart
    stats, seen = srmml.statistics(torch.tensor([0, 1, 2]), [])
    assert not stats.any() and not seen.any()


@torch.no_grad()
def test_the_gate_does_not_know_what_an_item_has_sold():
    """Or it switches off what was never sold, which is no target of training (reading 8)."""
    catalog = make_catalog()
    assert LANG[3] == LANG[5]

    def gate(seqs):
        torch.manual_seed(0)
        return make(catalog | {"train_seqs": seqs}).encode_items()["gate"]

    torch.testing.assert_close(gate([[3] * 9, [5], [2]]), gate([[3], [5] * 9, [2]]))


def test_items_never_sold_are_scored_by_their_content():
    model = make().eval()
    table = model.encode_items()
    scores = model.score({"seq": torch.tensor([[1, 2, 12]])}, table)
    assert scores.isfinite().all() and scores[0, 11] != scores[0, 12]
    for name in ("mu", "sigma"):
        embedding = model.item[name].weight
        slope, = torch.autograd.grad(table[name].sum(), embedding, retain_graph=True)
        assert not slope[[0, 11, 12]].any() and slope[1:11].all()


@torch.no_grad()
def test_two_items_never_sold_with_one_content_score_the_same():
    catalog = make_catalog()
    for key in ("text", "image", "lang"):
        catalog[key][12] = catalog[key][11]
    model = make(catalog).eval()
    scores = model.score({"seq": torch.tensor([[1, 2, 3]])}, model.encode_items())
    torch.testing.assert_close(scores[0, 11], scores[0, 12])


# ---------------- the attention

@torch.no_grad()
def naive_attend(layer, mu, sigma):
    """A, z^mu, z^Sigma of one sequence (L, d), head by head and position by position."""
    L, d = mu.shape
    heads = layer.mean.heads
    mu_q, mu_k, mu_v = (mu @ w.T for w in layer.mean.qkv.weight.split(d))
    weights = layer.covariance.qkv.weight.split(d)
    sigma_q, sigma_k, sigma_v = (elu1(sigma @ w.T) for w in weights)
    A = torch.zeros(heads, L, L)
    z_mu = torch.zeros(L, d)
    z_sigma = torch.zeros(L, d)
    for h in range(heads):
        p = slice(h * d // heads, (h + 1) * d // heads)
        for t in range(L):
            distance = [w2(mu_q[t, p], sigma_q[t, p], mu_k[k, p], sigma_k[k, p])
                        for k in range(t + 1)]
            weight = [math.exp(-x / math.sqrt(d // heads)) for x in distance]
            for k in range(t + 1):
                A[h, t, k] = weight[k] / sum(weight)                        # eq. (12)
                z_mu[t, p] += A[h, t, k] * mu_v[k, p]                       # eq. (13)
                z_sigma[t, p] += A[h, t, k] ** 2 * sigma_v[k, p]
    return A, z_mu, z_sigma


@torch.no_grad()
def naive_finish(stream, x, z):
    """Residual sum, LayerNorm, two linear maps with ELU, residual sum: eqs. (14), (15)."""
    z = x + stream.out(z)
    variance = z.var(-1, keepdim=True, correction=0)
    inner = (z - z.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    inner = stream.ffn[0](inner * stream.norm.weight + stream.norm.bias)
    inner = torch.where(inner > 0, inner, inner.exp() - 1)
    return z + stream.ffn[2](inner)


def joined(z):
    """(B, heads, L, d / heads) -> (B, L, d)"""
    return z.transpose(1, 2).flatten(2)


@torch.no_grad()
def test_attention_and_layer_eqs_11_to_15():
    layer = make(layers=2).blocks[1]
    mu, sigma = torch.randn(2, 3, 5, 8)
    A, z_mu, z_sigma = layer.attend(mu, sigma, causal(5))
    Z_mu, Z_sigma = layer(mu, sigma, causal(5))
    for b in range(3):
        naive_A, naive_mu, naive_sigma = naive_attend(layer, mu[b], sigma[b])
        torch.testing.assert_close(A[b], naive_A)
        torch.testing.assert_close(joined(z_mu)[b], naive_mu)
        torch.testing.assert_close(joined(z_sigma)[b], naive_sigma)
        torch.testing.assert_close(Z_mu[b], naive_finish(layer.mean, mu[b], naive_mu))
        finished = naive_finish(layer.covariance, sigma[b], naive_sigma)
        torch.testing.assert_close(Z_sigma[b], elu1(finished))


def test_gradients_of_the_attention():
    layer = make(dim=4, heads=2).blocks[0]
    mu = torch.randn(1, 3, 4, requires_grad=True)
    sigma = torch.randn(1, 3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: layer.attend(m, s, causal(3)), (mu, sigma))
    assert torch.autograd.gradcheck(lambda m, s: layer(m, s, causal(3)), (mu, sigma))


@torch.no_grad()
def test_nearer_items_weigh_more():
    layer = make(heads=1).blocks[0]
    for stream in (layer.mean, layer.covariance):
        stream.qkv.weight.copy_(torch.eye(8).repeat(3, 1))
    mu, sigma = torch.randn(2, 1, 4, 8)
    mu[0, 1] = mu[0, 3] + .1    # but for itself, position 1 is the nearest to position 3
    sigma[0, 1] = sigma[0, 3]
    A = layer.attend(mu, sigma, causal(4))[0]
    assert A[0, 0, 3].argsort(descending=True)[:2].tolist() == [3, 1]


@torch.no_grad()
def test_nearer_items_score_more():
    model = make().eval()
    table = model.encode_items()
    seq = torch.tensor([[1, 5, 9]])
    state = model.states(seq, table)[0, -1]
    distance = (state - table["point"]).square().sum(1)
    torch.testing.assert_close(model.score({"seq": seq}, table)[0], -distance)
    table["point"][7] = state + 1e-3    # an item where the user is
    assert model.score({"seq": seq}, table)[0].argmax() == 7


@torch.no_grad()
def test_squared_weights_give_the_variance_of_the_combination_eq_13():
    layer = make(heads=1, dim=4).blocks[0]
    mu, sigma = torch.randn(2, 1, 3, 4)
    A, z_mu, z_sigma = layer.attend(mu, sigma, causal(3))
    v_mu = mu[0] @ layer.mean.qkv.weight[8:].T
    v_sigma = elu1(sigma[0] @ layer.covariance.qkv.weight[8:].T)
    draws = v_mu + v_sigma.sqrt() * torch.randn(200_000, 3, 4)    # values, independent Gaussians
    mixed = torch.einsum("k,nkd->nd", A[0, 0, 2], draws)
    torch.testing.assert_close(mixed.mean(0), z_mu[0, 0, 2], atol=.02, rtol=0)
    torch.testing.assert_close(mixed.var(0), z_sigma[0, 0, 2], rtol=.02, atol=0)


@torch.no_grad()
def test_states_eqs_5_and_9():
    model = make(layers=2).eval()
    table = model.encode_items()
    seq = torch.tensor([[0, 0, 4, 11, 6], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    found = model.states(seq, table)
    assert found.isfinite().all()
    for b, pad in ((0, 2), (1, 0)):
        items = seq[b, pad:]
        E = {}
        for s in ("mu", "sigma"):
            x = table[s][items] + model.position[s][5 + pad:]
            E[s] = table["gate"][items] * model.norm[s](x)                  # eqs. (5), (9)
        mu, sigma = E["mu"], E["sigma"]
        for layer in model.blocks:
            _, z_mu, z_sigma = naive_attend(layer, mu, sigma)
            mu = naive_finish(layer.mean, mu, z_mu)
            sigma = elu1(naive_finish(layer.covariance, sigma, z_sigma))
        torch.testing.assert_close(found[b, pad:], torch.cat([mu, sigma.sqrt() - 1], 1))


# ---------------- the loss

def plain_loss(states, items, log_scale, target):
    distance = (states[:, None] - items[None]).square().sum(-1)
    logits = -torch.exp(log_scale) * distance                               # eq. (16)
    real = target != 0
    return F.cross_entropy(logits[real, 1:], target[real] - 1)              # eq. (17)


@pytest.mark.parametrize("n_rows, n_items", [(7, 11), (150, 40_000)])
def test_the_loss_is_cross_entropy_of_distances_eqs_16_17(n_rows, n_items):
    states = torch.randn(n_rows, 6, requires_grad=True)
    items = torch.randn(n_items, 6, requires_grad=True)
    log_scale = torch.tensor(-.7, requires_grad=True)
    target = torch.randint(1, n_items, (n_rows,))
    target[::3] = 0
    inputs = (states, items, log_scale)
    found = srmml.distance_loss(*inputs, target)
    expected = plain_loss(*inputs, target)
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(3 * found, inputs)
    torch.testing.assert_close(slopes, torch.autograd.grad(3 * expected, inputs))
    assert srmml.distance_loss(*inputs, 0 * target) == 0
    if n_items < 20:
        assert torch.autograd.gradcheck(lambda *x: srmml.distance_loss(*x, target), inputs)


def test_the_loss_is_float32_under_autocast():
    states = 3 * torch.randn(50, 32)
    items = 3 * torch.randn(40, 32)
    log_scale = torch.tensor(-1.)
    target = torch.randint(1, 40, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        found = srmml.distance_loss(states.float(), items.float(), log_scale.float(), target)
    expected = plain_loss(states, items, log_scale, target)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("setting", [
    dict(layers=2), dict(use_gaussian=False), dict(use_gate=False), dict(use_fusion=False),
], ids=str)
def test_ablations_train_under_autocast(setting):
    torch.set_default_dtype(torch.float32)
    model = make(**setting).float()
    batch = {"seq": torch.tensor([[1, 2, 3]]), "target": torch.tensor([[2, 3, 4]])}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["next_item"]
        scores = model.score(batch, model.encode_items())
    assert loss.dtype == torch.float32 and scores.isfinite().all()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class Sizes(TorchDispatchMode):
    """The shapes of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


def test_nothing_is_as_large_as_positions_times_items():
    n_items, B, L, heads, d = 50_000, 13, 9, 2, 4
    catalog = {
        "n_items": n_items,
        "lang": torch.arange(n_items + 1).clamp(max=2),
        "train_seqs": [list(range(1, n_items + 1))],
        "text": torch.randn(n_items + 1, 5),
        "image": torch.randn(n_items + 1, 5),
        "has_text": torch.arange(n_items + 1) > 0,
        "has_image": torch.arange(n_items + 1) > 0,
    }
    model = make(catalog, dim=d, heads=heads, dropout=.1)
    seq = torch.randint(1, n_items, (B, L))
    with Sizes() as sizes, kept_for_backward() as kept:
        model({"seq": seq, "target": seq + 1})["next_item"].backward()
        model.score({"seq": seq}, model.encode_items())
    chunk = 64    # rows of the loss that are worked through at a time
    assert chunk < B * L
    assert max(map(math.prod, sizes.shapes)) <= (n_items + 1) * chunk
    assert not any(s.count(L) > 1 and len(s) > 4 for s in sizes.shapes)    # (B, heads, L, L, d)
    assert max(kept) <= (n_items + 1) * 3 * 2 * d    # what waits for the backward pass


# ---------------- the ablations

def parts(model):
    """The names of a model's parts that have weights."""
    depth = {"fusion": 3}
    names = [key.split(".") for key, _ in model.named_parameters()]
    return {".".join(name[:depth.get(name[0], 1)]) for name in names}


SHARED = {"fusion.P.fused", "fusion.norm.fused", "fusion.M.weight", "fusion.M.bias",
          "fusion.attention.0", "fusion.attention.2"}
OF_FUSED = {"fusion.P.fused", "fusion.norm.fused"}
OF_TEXT = {"fusion.P.text", "fusion.norm.text"}
OF_IMAGE = {"fusion.P.image", "fusion.norm.image"}


@pytest.mark.parametrize("setting, gone", [
    (dict(use_fusion=False), SHARED - OF_FUSED | OF_TEXT | OF_IMAGE),
    (dict(modality="text"), SHARED | OF_IMAGE),
    (dict(modality="image"), SHARED | OF_TEXT),
    (dict(use_gate=False), {"gate", "language"}),
    (dict(learn_temperature=False), {"log_scale"}),
], ids=["no fusion", "text", "image", "no gate", "fixed temperature"])
def test_ablations_remove_the_weights_they_name(setting, gone):
    assert parts(make()) - parts(make(**setting)) == gone


@torch.no_grad()
def test_without_fusion_both_features_pass_one_head():
    catalog = make_catalog()
    fusion = make(catalog, use_fusion=False).fusion
    has_any = (catalog["has_text"] | catalog["has_image"])[:, None]
    u = fusion.P["fused"](torch.cat(heads_inputs(catalog), 1))
    expected = fusion.norm["fused"](u) * has_any
    torch.testing.assert_close(fusion(), expected)


@torch.no_grad()
@pytest.mark.parametrize("kept, other", [("text", "image"), ("image", "text")])
def test_one_modality_alone_reads_nothing_of_the_other(kept, other):
    catalog = make_catalog()
    before = make(catalog, modality=kept)
    changed = {other: torch.randn_like(catalog[other]), f"has_{other}": ~catalog[f"has_{other}"]}
    after = make(catalog | changed, modality=kept)
    after.load_state_dict(before.state_dict())
    torch.testing.assert_close(before.fusion(), after.fusion())
    f = heads_inputs(catalog)[kept == "image"]
    expected = before.fusion.norm[kept](before.fusion.P[kept](f)) * catalog[f"has_{kept}"][:, None]
    torch.testing.assert_close(before.fusion(), expected)


@torch.no_grad()
def test_without_the_gate_every_gate_is_1():
    table = make(use_gate=False).encode_items()
    assert torch.equal(table["gate"], torch.ones(N + 1, 8))
    expected = srmml.point(table["mu"], elu1(table["sigma"]))
    torch.testing.assert_close(table["point"], expected)


@torch.no_grad()
def test_without_the_probabilistic_model_items_are_fixed_vectors():
    model = make(use_gaussian=False)
    probabilistic = {k for k in make().state_dict() if "sigma" in k or "covariance" in k}
    assert set(make().state_dict()) - probabilistic == set(model.state_dict())
    layer = model.blocks[0]
    x = torch.randn(1, 4, 8)
    A, z, none = layer.attend(x, None, causal(4))
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in layer.mean.qkv(x).chunk(3, -1))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)      # eq. (10)
    torch.testing.assert_close(z, expected)
    assert none is None
    table = model.encode_items()
    torch.testing.assert_close(table["point"], table["gate"] * table["mu"])
    batch = {"seq": torch.tensor([[2, 1, 3]]), "target": torch.tensor([[0, 0, 5]])}
    state = model.states(batch["seq"], table)[0, -1]
    torch.testing.assert_close(model.score(batch, table)[0], table["point"] @ state)
    logits = model.log_scale.exp() * (table["point"] @ state)
    expected = F.cross_entropy(logits[None, 1:], torch.tensor([4]))
    torch.testing.assert_close(model(batch)["next_item"], expected)


def test_dropout_acts_where_it_should(monkeypatch):
    """Once in each head, on each embedding, and twice in each stream of each layer."""
    model = make(dropout=.5, layers=2).train()
    seen = []

    def remembered(part, x):
        seen.append(part)
        return x

    monkeypatch.setattr(torch.nn.Dropout, "forward", remembered)
    model({"seq": torch.tensor([[1, 2, 3]]), "target": torch.tensor([[2, 3, 4]])})
    streams = [stream for block in model.blocks for stream in (block.mean, block.covariance)]
    heads = [part for head in model.fusion.P.values() for part in head
             if isinstance(part, torch.nn.Dropout)]
    wanted = [*heads, model.dropout, model.dropout, *(2 * [s.dropout for s in streams])]
    assert sorted(map(id, seen)) == sorted(map(id, wanted))
    assert {part.p for part in seen} == {.5}


def test_rows_without_a_target_count_nothing_where_they_are_not_left_out():
    """A GPU is given all rows; the loss and its gradients are those of the rows with a target."""
    states = torch.randn(5, 4, requires_grad=True)
    items = torch.randn(7, 4, requires_grad=True)
    target = torch.tensor([3, 0, 6, 0, 1])
    loss = srmml.SoftmaxLoss.apply(states, items, target)
    logits = (states @ items.T)[target != 0, 1:]
    wanted = F.cross_entropy(logits, target[target != 0] - 1, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item())
    for got, expected in zip(torch.autograd.grad(loss, (states, items)),
                             torch.autograd.grad(wanted, (states, items))):
        assert torch.allclose(got, expected)


def test_the_settings_that_the_paper_states():
    cfg = srmml.Config()
    assert cfg.gate_scale == 2                   # eq. (7)
    assert cfg.patience == 50                    # the rest: Implementation Details
    assert cfg.dropout in (.3, .5, .7)
    assert cfg.lr in (1e-3, 1e-4)
    assert cfg.dim in (8, 16, 32, 64, 128)
    assert cfg.layers in (1, 2, 3, 4)
    assert cfg.heads in (1, 2, 4, 8, 16)


def test_weights_start_small_but_for_the_fusion():
    """STOSA's .02; the fusion keeps torch's own start, or its parts would not act."""
    model = srmml.Model(srmml.Config(dim=64), make_catalog())
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.startswith("fusion."):
            assert weight.std().item() == pytest.approx(.02, rel=.2), name
    assert model.fusion.P["text"][0].weight.std() > .1


def test_the_temperature_starts_where_it_should():
    def fresh(**settings):
        return srmml.Model(srmml.Config(dim=16, **settings), make_catalog()).log_scale

    assert fresh().exp().item() == pytest.approx(1 / 4)
    assert fresh(temperature=5.).exp().item() == pytest.approx(1 / 5)
    assert fresh().requires_grad and not fresh(learn_temperature=False).requires_grad
    model = make(learn_temperature=False)
    batch = {"seq": torch.tensor([[2, 1, 3]]), "target": torch.tensor([[1, 3, 5]])}
    table = model.encode_items()
    states = model.states(batch["seq"], table)[0]
    log_scale = torch.tensor(-math.log(math.sqrt(8)))
    expected = plain_loss(states, table["point"], log_scale, batch["target"][0])
    torch.testing.assert_close(model(batch)["next_item"], expected)


@pytest.mark.parametrize("missing", [("text",), ("image",), ("text", "image")], ids="+".join)
def test_heads_of_a_modality_that_no_item_has_learn_nothing(missing):
    catalog = make_catalog()
    for m in missing:
        catalog[m] = torch.zeros_like(catalog[m])
        catalog[f"has_{m}"] = torch.zeros(N + 1, dtype=torch.bool)
    model = make(catalog)
    batch = {"seq": torch.tensor([[0, 3, 12, 5]]), "target": torch.tensor([[0, 12, 5, 7]])}
    model(batch)["next_item"].backward()
    for name in (*missing, "fused"):
        assert not any(p.grad.any() for p in model.fusion.P[name].parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.score(batch, model.encode_items()).isfinite().all()


@pytest.mark.parametrize("setting, value", [("gate_scale", 0.), ("languages", 2)])
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} {value}"):
        make(**{setting: value})


# ---------------- large catalogs

@pytest.mark.parametrize("setting", [{}, {"use_fusion": False}, {"use_gate": False}], ids=str)
def test_a_large_catalog_in_chunks_gives_the_same_and_keeps_less(setting, monkeypatch):
    torch.manual_seed(1)
    model = make(**setting)
    slope = torch.randn(N + 1, 8)

    def table_and_gradients():
        with kept_for_backward() as kept:
            table = model.encode_items()
        loss = (table["gate"] * slope + table["mu"] * slope + table["sigma"] * slope).sum()
        weights = [*model.fusion.parameters(), *model.item.parameters()]
        return table, torch.autograd.grad(loss, weights, allow_unused=True), sum(kept)

    table, gradients, kept = table_and_gradients()
    monkeypatch.setattr(srmml, "CHUNK", 5)
    in_chunks, of_chunks, kept_by_chunks = table_and_gradients()
    torch.testing.assert_close(in_chunks, table)
    torch.testing.assert_close(of_chunks, gradients)
    assert kept_by_chunks < .7 * kept


def test_chunks_draw_the_same_dropout_when_they_are_computed_again(monkeypatch):
    """The gradient is that of the numbers that were given: finite differences, fixed draws."""
    monkeypatch.setattr(srmml, "CHUNK", 5)
    model = make(dropout=.3).train()
    weight = model.fusion.P["text"][0].bias

    def loss():
        torch.manual_seed(7)
        return model.encode_items()["mu"].square().sum()

    found, = torch.autograd.grad(loss(), weight)
    at = int(found.abs().argmax())
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight[at] += step
            values.append(loss().item())
            weight[at] -= step
    assert found[at].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)
