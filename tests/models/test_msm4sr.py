"""MSM4SR's parts against naive loops in float64, written from the paper's equations."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from loop.settings import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
msm = load_model_file("msm4sr")
N, D = 12, 8
close = torch.testing.assert_close


def make_catalog():
    """Stacks of different width; noise where no vector is.

    Item 3 has no picture, item 5 no sentence.
    """
    random = torch.Generator().manual_seed(5)
    catalog = {"n_items": N}
    for stack, missing, slots, width in (("sentences", 5, 3, 5), ("pictures", 3, 2, 7)):
        mask = torch.arange(slots) < torch.randint(1, slots + 1, (N + 1, 1), generator=random)
        mask[[0, missing]] = False
        catalog[stack] = torch.randn(N + 1, slots, width, generator=random)
        catalog[stack + "_mask"] = mask
    return catalog


def settings(**changes):
    small = dict(dim=D, attention_dim=6, experts=3, heads=2, max_len=10, dropout=0.)
    return msm.Config(**small | {"pretrain_epochs": 0} | changes)


def make(kind="Model", **changes):
    """A model with weights large enough to matter, the gates' among them."""
    torch.manual_seed(2)
    model = getattr(msm, kind)(settings(**changes), make_catalog())
    with torch.no_grad():
        for weight in model.parameters():
            weight += .3 * torch.randn_like(weight)
        if hasattr(model, "item"):
            model.item.weight[0] = 0
    return model


def make_batch():
    """Targets 3 and 5 lack a modality; 2 and 9 are targets of two users."""
    seq = torch.tensor([[0, 0, 4, 2, 9], [1, 2, 3, 9, 5], [0, 7, 8, 2, 9]])
    target = torch.tensor([[0, 0, 2, 9, 7], [2, 3, 9, 5, 6], [0, 8, 2, 9, 4]])
    return {"user": torch.tensor([4, 0, 2]), "seq": seq, "target": target}


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


def losses_and_gradients(model, losses):
    weights = list(model.parameters())
    return losses, torch.autograd.grad(sum(losses.values()), weights, retain_graph=True)


# ---------------- the encoder of a modality, eqs. (3) to (5)

@torch.no_grad()
def naive_encoder(encoder, m, i):
    """One item and one modality."""
    stack = msm.STACKS[m]
    catalog = make_catalog()
    x = catalog[stack][i][catalog[stack + "_mask"][i]]
    if not len(x):
        return torch.zeros(D)
    score = [math.exp(encoder.W_2(encoder.W_1(row))) for row in x]
    e = sum(s / sum(score) * row for s, row in zip(score, x))                       # eq. (3)
    g = [math.exp(a) for a in encoder.W_3.weight @ e]
    z = 0
    for k in range(3):
        expert = slice(k * D, (k + 1) * D)
        y = encoder.W_k.weight[expert] @ e + encoder.W_k.bias[expert]
        y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
        y = y * encoder.scale[expert] + encoder.shift[expert]                       # eq. (4)
        z = z + g[k] / sum(g) * y                                                   # eq. (5)
    return z


def test_item_encoders_eqs_3_to_5():
    m2se = make().m2se.train()
    items = m2se.items()
    for m, z in items.items():
        encoder = m2se.encoders[m]
        close(z, torch.stack([naive_encoder(encoder, m, i) for i in range(N + 1)]))
        assert len(encoder.x) == N    # who lacks it costs nothing
    assert not items["image"][[0, 3]].any() and not items["text"][[0, 5]].any()


def test_a_vector_in_padding_is_nobodys():
    catalog = make_catalog()
    m2se = msm.M2SE(settings(), catalog)
    for stack in msm.STACKS.values():
        catalog[stack][0] = 7.
        catalog[stack + "_mask"][0] = True
    noisy = msm.M2SE(settings(), catalog)
    noisy.load_state_dict(m2se.state_dict())
    close(noisy.items(), m2se.items())
    assert catalog["pictures_mask"][0].all()    # the caller's catalog stays as it was


def test_attention_learns_and_slots_without_a_vector_do_not_count():
    encoder = make().m2se.encoders["text"]
    z = encoder()
    z.square().sum().backward()
    assert encoder.W_1.weight.grad.abs().sum() > 1e-3
    assert encoder.W_2.weight.grad.abs().sum() > 1e-3
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())
    encoder.x[~encoder.mask] = 1e3
    close(encoder(), z)
    encoder.x[4, 0] += 1
    assert not torch.allclose(encoder()[4], z[4])


def test_one_vector_per_item_needs_no_attention():
    encoder = make().m2se.encoders["text"]
    x, mask = encoder.x[:, :1], encoder.mask[:, :1]
    two = torch.cat([mask, torch.zeros_like(mask)], 1)
    close(encoder.encode(x, mask), encoder.encode(x.repeat(1, 2, 1), two))


def test_weights_at_the_start():
    model = msm.Model(settings(dim=64), make_catalog())
    for encoder in model.m2se.encoders.values():
        assert not encoder.W_3.weight.any()    # all experts alike
    assert not model.item.weight[0].any()
    assert model.item.weight[1:].std().item() == pytest.approx(.02, rel=.15)


def test_experts_have_dropout_in_training_only():
    encoder = make(dropout=.5).m2se.encoders["text"]
    assert not torch.equal(encoder(), encoder())
    encoder.eval()
    assert torch.equal(encoder(), encoder())


def test_a_large_catalog_goes_in_parts(monkeypatch):
    encoder = make().m2se.encoders["text"]
    slope = torch.randn(N + 1, D)

    def table_and_gradients():
        z = encoder()
        return z, torch.autograd.grad(z, list(encoder.parameters()), slope, retain_graph=True)

    whole = table_and_gradients()
    monkeypatch.setattr(msm, "CHUNK", 4)
    close(table_and_gradients(), whole)
    # a part that is computed again drops the same numbers again: z is linear in scale and shift,
    # so their gradients give z back
    encoder.p = .5
    z, _ = table_and_gradients()
    linear = torch.autograd.grad(z, (encoder.scale, encoder.shift), slope)
    found = (linear[0] * encoder.scale).sum() + (linear[1] * encoder.shift).sum()
    close(found, (z * slope).sum())


def test_stacks_are_cast_once_under_autocast():
    torch.set_default_dtype(torch.float32)
    encoder = make().m2se.encoders["text"].eval()
    expected = encoder()
    cast = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_to_copy" in str(function) and args[0].shape == encoder.x.shape:
                cast.append(function)
            return function(*args, **(kwargs or {}))

    with Casts(), torch.autocast("cpu", torch.bfloat16):
        found = encoder()
    close(found, expected, rtol=.1, atol=.1)
    assert len(cast) == 1


# ---------------- random dropout, mixup, Transformer

def test_sequence_random_dropout():
    seq = torch.arange(1, 21).repeat(400, 1)
    seq[:100, :15] = 0
    thinned, place = msm.random_drop(seq, .2)
    dropped = 0
    for row, where, before in zip(thinned.tolist(), place.tolist(), seq.tolist()):
        items = [i for i in row if i]
        assert set(items) <= set(before) and row == [0] * (20 - len(items)) + sorted(items)
        first = before.count(0)
        assert items[0] == before[first]    # it stays
        for t in range(first, 20):    # every target is predicted from what is left before it
            assert row[where[t]] == max(i for i in items if i <= before[t])
            dropped += row[where[t]] != before[t]
    assert (thinned != 0).sum() / (seq != 0).sum() == pytest.approx(.8, abs=.03)
    assert dropped / (seq != 0).sum() == pytest.approx(.2, abs=.03)
    unchanged, place = msm.random_drop(seq, 0.)
    assert torch.equal(unchanged, seq) and torch.equal(place[150], torch.arange(20))


def test_random_dropout_leaves_the_first():
    seq = torch.tensor([[0, 0, 3, 4], [0, 0, 0, 0]])
    thinned, place = msm.random_drop(seq, .999999)
    assert thinned.tolist() == [[0, 0, 0, 3], [0, 0, 0, 0]]
    assert place[0, 2:].tolist() == [3, 3] and (place >= 0).all()


@torch.no_grad()
def test_every_target_counts_in_pre_training_whatever_is_dropped(monkeypatch):
    """Losses are those of what is left before each target, one row per target."""
    model = make("Pretrain", use_mixup=False, dropout=0.)
    model.m2se.position.zero_()    # an item's place differs in rows of one target
    seq = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    target = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])
    left = torch.tensor([[0, 0, 3, 5], [0, 7, 8, 10]])    # 4, 6 and 9 are dropped
    places = torch.tensor([[2, 2, 3, 3], [1, 2, 2, 3]])
    monkeypatch.setattr(msm, "random_drop", lambda seq, rho: (left, places))
    found = model.train()({"user": torch.tensor([0, 1]), "seq": seq, "target": target})
    rows = torch.tensor([
        [0, 0, 3], [0, 0, 3], [0, 3, 5], [0, 3, 5], [0, 0, 7], [0, 7, 8], [0, 7, 8], [7, 8, 10],
    ])
    answers = F.pad(target.reshape(8, 1), (2, 0))
    user = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    expected = model.eval()({"user": user, "seq": rows, "target": answers})
    for name in expected:
        assert expected[name] > .001    # two users: there are negatives
        close(found[name], expected[name])


def test_complementary_mixup():
    seq = torch.randint(1, 9, (200, 10))
    seq[:, :4] = 0
    z_t, z_v = torch.randn(2, 200, 10, 3)
    m_t, m_v = msm.mixup(z_t, z_v, seq, torch.tensor(.3))
    swapped = (m_t == z_v).all(-1)
    assert torch.equal(m_t, torch.where(swapped[..., None], z_v, z_t))
    assert torch.equal(m_v, torch.where(swapped[..., None], z_t, z_v))    # the same items
    assert not swapped[seq == 0].any()
    assert swapped[seq != 0].double().mean() == pytest.approx(.3, abs=.05)


@pytest.mark.parametrize("use_mixup", [True, False])
def test_the_mixup_ratio_is_drawn_between_0_and_a_half(use_mixup, monkeypatch):
    model = make("Pretrain", use_mixup=use_mixup)
    real = msm.mixup
    drawn = []

    def mixup(z_t, z_v, seq, p):
        drawn.append(p.item())
        return real(z_t, z_v, seq, p)

    monkeypatch.setattr(msm, "mixup", mixup)
    for _ in range(40):
        model(make_batch())
    model.eval()(make_batch())    # none outside of training
    assert len(drawn) == (40 if use_mixup else 0)
    if use_mixup:
        assert 0 <= min(drawn) < .1 and .4 < max(drawn) <= .5


@torch.no_grad()
def naive_block(block, x):
    """Causal multi-head attention and feed-forward with residual sums, x (L, D): loops."""
    d = D // block.heads
    Q, K, V = block.qkv(x).chunk(3, -1)
    rows = []
    for q in range(len(x)):
        heads = []
        for h in range(block.heads):
            part = slice(h * d, (h + 1) * d)
            weight = [math.exp(Q[q, part] @ K[j, part] / math.sqrt(d)) for j in range(q + 1)]
            heads.append(sum(w / sum(weight) * V[j, part] for j, w in enumerate(weight)))
        a = block.norm1(x[q] + block.out(torch.cat(heads)))
        rows.append(block.norm2(a + block.outer(F.gelu(block.inner(a)))))
    return torch.stack(rows)


@torch.no_grad()
def naive_states(m2se, rows, seq):
    """rows (N+1, D) of one stream, seq a list of ids -> states of its items (n, D)."""
    items = [i for i in seq if i]
    first = len(m2se.position) - len(items)
    x = m2se.norm(torch.stack([rows[i] + m2se.position[first + t] for t, i in enumerate(items)]))
    for block in m2se.blocks:
        x = naive_block(block, x)
    return x


@torch.no_grad()
def test_one_transformer_for_both_streams():
    m2se = make().m2se
    seq = make_batch()["seq"]
    z = m2se.items()
    h = m2se.transform([z["text"][seq], z["image"][seq]], seq)
    for states, rows in zip(h, z.values()):
        for found, row in zip(states, seq.tolist()):
            close(found[row.count(0):], naive_states(m2se, rows, row))


@torch.no_grad()
@pytest.mark.parametrize("place", ["input", "attention", "attended", "fed forward"])
def test_dropout_of_the_transformer_in_training_only(place):
    m2se = make(layers=1).m2se
    block = m2se.blocks[0]
    if place == "input":
        m2se.dropout.p = .5
    elif place == "attention":
        block.attention_dropout = .5
    else:    # one dropout in both places; the other one drops zeros
        block.dropout.p = .5
        other = block.outer if place == "attended" else block.out
        other.weight.zero_()
        other.bias.zero_()
    seq = make_batch()["seq"]
    streams = [torch.randn(3, 5, D)]
    assert not torch.equal(m2se.transform(streams, seq), m2se.transform(streams, seq))
    m2se.eval()
    assert torch.equal(m2se.transform(streams, seq), m2se.transform(streams, seq))


# ---------------- pre-training, eqs. (6) to (11)

def f(s, z, tau=.07):
    return math.exp(s @ z / (s.norm() * z.norm()) / tau)


def naive_nip(m_hat, m_tilde, z, no_negative, real):
    """Eq. (7), mean over the real rows."""
    def both(j, k):
        return f(m_hat[j], z[k]) + f(m_tilde[j], z[k])

    total = 0.
    rows = [j for j in range(len(z)) if real[j]]
    for j in rows:
        others = [k for k in rows if k == j or not no_negative[j][k]]
        total -= math.log(both(j, j) / sum(both(j, k) for k in others))
    return total / max(len(rows), 1)


def naive_cmcl(m_hat, m_tilde, no_negative):
    """Eq. (9), mean over the rows."""
    R = range(len(m_hat))

    def ell(a, b, j):
        others = [k for k in R if k != j and not no_negative[j][k]]
        negatives = sum(f(a[j], b[k]) + f(a[j], a[k]) for k in others)
        return math.log(f(a[j], b[j]) / (f(a[j], b[j]) + negatives))

    return -sum(ell(m_hat, m_tilde, j) + ell(m_tilde, m_hat, j) for j in R) / 2 / len(R)


ITSELF = torch.eye(7, dtype=torch.bool)
WEIGHT = torch.ones(7) / 7
TARGET = torch.tensor([4, 2, 4, 9, 2, 4, 6])
SAME = TARGET[:, None] == TARGET


def test_next_item_prediction_eqs_7_8():
    a, b, z = torch.randn(3, 7, D)
    z.requires_grad_()
    loss = msm.nip(a, b, z, SAME & ~ITSELF, WEIGHT, .07)
    close(loss.item(), naive_nip(a, b, z.detach(), SAME, [True] * 7))
    first = msm.nip(a, b, z, SAME & ~ITSELF, ITSELF[0], .07)
    slope, = torch.autograd.grad(first, z)
    assert not slope[[2, 5]].any()    # the same target as the first
    assert slope[[0, 1, 3, 4, 6]].any(1).all()
    alone = msm.nip(a, b, z, ~ITSELF, WEIGHT, .07)
    close(alone.item(), 0.)    # nothing to tell it from: exp(0) must not stay behind


def test_cross_modality_contrast_eqs_9_10():
    a, b = torch.randn(2, 7, D)
    loss = msm.cmcl(a, b, SAME & ~ITSELF, WEIGHT, .07)
    close(loss.item(), naive_cmcl(a, b, SAME))
    close(msm.cmcl(b, a, SAME & ~ITSELF, WEIGHT, .07), loss)    # symmetric
    close(msm.cmcl(a, b, ~ITSELF, WEIGHT, .07).item(), 0.)


def pairs_of(batch):
    """-> the targets of all positions that have one, and the users."""
    targets = []
    users = []
    for user, row in zip(batch["user"].tolist(), batch["target"].tolist()):
        own = [target for target in row if target]
        targets += own
        users += [user] * len(own)
    return targets, users


@torch.no_grad()
def naive_objectives(model, batch):
    """Eqs. (6) to (11), without dropout and mixup."""
    m2se = model.m2se
    z, h = {}, {}
    for m, encoder in m2se.encoders.items():
        z[m] = torch.stack([naive_encoder(encoder, m, i) for i in range(N + 1)])
        h[m] = torch.cat([naive_states(m2se, z[m], row) for row in batch["seq"].tolist()])
    targets, users = pairs_of(batch)
    R = len(targets)
    parts = torch.arange(R).tensor_split(-(-R // msm.PAIRS))                        # reading 9
    part = [p for p, rows in enumerate(parts) for _ in rows]
    no_negative = [[
        targets[j] == targets[k] or users[j] == users[k] or part[j] != part[k] for k in range(R)
    ] for j in range(R)]
    losses = {}
    for m, n in (("text", "image"), ("image", "text")):
        m_hat, m_tilde = model.W[m](h[m]), model.W[m](h[n])                         # eq. (6)
        real = make_catalog()[msm.STACKS[m] + "_mask"].any(1)[targets]
        losses[f"nip_{m}"] = naive_nip(m_hat, m_tilde, z[m][targets], no_negative, real)
        losses[f"cmcl_{m}"] = .01 * naive_cmcl(m_hat, m_tilde, no_negative)         # eq. (11)
    return losses


@pytest.mark.parametrize("use_proj, pairs", [
    (True, msm.PAIRS), (False, msm.PAIRS), (True, 4),    # 4: contrasted in three parts
])
def test_pre_training_loss_eqs_6_to_11(use_proj, pairs, monkeypatch):
    monkeypatch.setattr(msm, "PAIRS", pairs)
    model = make("Pretrain", use_proj=use_proj).eval()
    expected = naive_objectives(model, make_batch())
    assert values(model(make_batch())) == pytest.approx(expected)
    assert list(expected) == list(model(make_batch()))


def test_rows_without_a_target_count_nothing_on_a_gpu(monkeypatch):
    """No rows are chosen there."""
    batch = make_batch()
    batch["target"][1, 2] = 0
    for model in (make("Pretrain").eval(), make(e2e=True).eval()):
        expected = losses_and_gradients(model, model(batch))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            losses = model(batch)
        close(losses_and_gradients(model, losses), expected)


@pytest.mark.parametrize("kind, changes", [("Pretrain", {}), ("Model", dict(e2e=True))], ids=str)
def test_gradients_are_the_slopes_of_the_losses(kind, changes):
    """Along a random direction of all weights at once: what is cut off would be missing."""
    model = make(kind, **changes).eval()
    weights = list(model.parameters())
    directions = [torch.randn_like(weight) for weight in weights]
    _, gradients = losses_and_gradients(model, model(make_batch()))
    found = sum((slope * way).sum() for slope, way in zip(gradients, directions))
    step = 1e-6
    heights = []
    with torch.no_grad():
        for side in (1, -1):
            for weight, way in zip(weights, directions):
                weight += side * step * way
            heights.append(sum(model(make_batch()).values()))
            for weight, way in zip(weights, directions):
                weight -= side * step * way
    close(found, (heights[0] - heights[1]) / (2 * step), rtol=1e-5, atol=0)


def test_each_item_of_a_batch_is_encoded_once(monkeypatch):
    model = make("Pretrain").eval()
    batch = make_batch()
    z = model.m2se.items()
    every = msm.contrast(model.cfg, model.m2se, model.W, batch, z)
    real = model.m2se.items
    asked = []

    def items(ids=None):
        asked.append(ids.tolist())
        return real(ids)

    monkeypatch.setattr(model.m2se, "items", items)
    losses = model(batch)
    assert asked == [list(range(10))]
    close(losses_and_gradients(model, losses), losses_and_gradients(model, every))
    some = torch.tensor([5, 2, 2, 0])
    close(real(some), {m: table[some] for m, table in z.items()})


@pytest.mark.parametrize("changes, noisy", [
    ({}, True), (dict(rho=0.), True), (dict(use_mixup=False), True),
    (dict(rho=0., use_mixup=False), False), (dict(rho=0., p_max=0.), False),
], ids=str)
def test_dropping_and_mixing_in_pre_training(changes, noisy):
    def different(model):
        return len({sum(model(make_batch()).values()).item() for _ in range(8)}) > 1

    model = make("Pretrain", **changes)
    assert different(model) == noisy
    assert not different(model.eval())
    assert not different(make(**changes))    # fine-tuning: p = rho = 0
    assert different(make(**changes, dropout=.1))


# ---------------- fine-tuning, eqs. (12), (13)

@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {}, dict(cosine=False), dict(use_id=False), dict(modality="text"),
    dict(modality="image", cosine=False), dict(modality="sum", cosine=False), dict(prefixes=True),
], ids=str)
def test_scores_and_loss_eqs_12_13(changes):
    model = make(**changes).eval()
    cfg = model.cfg
    batch = make_batch()
    E = model.item.weight if cfg.use_id else torch.zeros(N + 1, D)
    z = model.m2se.items()
    if cfg.modality == "sum":    # SASRecM: one sequence of the sums
        z = {"sum": z["text"] + z["image"]}
    rows = {m: F_m + E for m, F_m in z.items() if cfg.modality in (m, "both")}

    def score(h, row):
        product = h @ row
        if not cfg.cosine:
            return product
        return product / (h.norm() * row.norm()).clamp(min=1e-9) / .07

    found = model.score(batch, model.encode_items())
    losses = []
    for b, seq in enumerate(batch["seq"].tolist()):
        h = {m: naive_states(model.m2se, rows[m], seq) for m in rows}
        targets = [i for i in batch["target"][b].tolist() if i]
        for t, right in enumerate(targets):
            y = torch.stack([                                                       # eq. (12)
                sum(score(h[m][t], rows[m][i]) for m in rows) for i in range(1, N + 1)
            ])
            if t == len(targets) - 1 or not cfg.prefixes:
                losses.append(y.exp().sum().log() - y[right - 1])                   # eq. (13)
        close(found[b, 1:], y)
    close(model(batch), {"next_item": sum(losses) / len(losses)})


@pytest.mark.parametrize("changes", [
    {}, dict(use_id=False), dict(use_proj=False), dict(modality="text"),
], ids=str)
def test_a_pre_trained_state_is_taken_over_whole(changes):
    state = make("Pretrain", **changes).state_dict()
    model = make(**changes)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.m2se.parameters():
            weight.zero_()
    model.init_from(state)
    new = {"item.weight"} if model.cfg.use_id else set()
    assert set(before) - set(state) == new
    left = {name.split(".")[0] for name in set(state) - set(before)}
    assert left == ({"W"} if model.cfg.use_proj else set())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name] if name in new else state[name]), name
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name, weight", [
    ("m2se.position", None), ("m2se.encoders.image.W_k.weight", None), ("W.text.bias", None),
    ("more", torch.zeros(1)), ("item.weight", torch.zeros(N + 1, D)),
    ("W.more", torch.zeros(1)), ("m2se.position", torch.zeros(11, D)),
])
def test_any_other_state_is_refused(name, weight):
    state = make("Pretrain").state_dict()
    if weight is None:
        del state[name]
    else:
        state[name] = weight
    model = make()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="pre-trained state"):
        model.init_from(state)
    close(model.state_dict(), before, rtol=0, atol=0)    # nothing was taken over


def test_a_frozen_transformer_stays_while_the_rest_learns():
    model = make(freeze_transformer=True)
    assert all(weight.requires_grad for weight in model.parameters())    # nothing to keep yet
    model.init_from(make("Pretrain").state_dict())
    parts = {True: set(), False: set()}
    for name, weight in model.named_parameters():
        parts[weight.requires_grad].add(name.removeprefix("m2se.").split(".")[0])
    assert parts == {True: {"encoders", "norm", "item"}, False: {"position", "blocks"}}
    sum(model(make_batch()).values()).backward()
    assert model.item.weight.grad.any() and model.m2se.encoders["text"].W_1.weight.grad.any()


# ---------------- ablations, settings, numbers

@pytest.mark.parametrize("changes, factors", [
    (dict(use_nip=False), {"cmcl": 1}), (dict(use_cmcl=False), {"nip": 1}),
    (dict(lam=.02), {"nip": 1, "cmcl": 2}),
], ids=str)
def test_without_nip_or_cmcl(changes, factors):
    full = values(make("Pretrain").eval()(make_batch()))
    expected = {}
    for name, loss in full.items():
        kind = name.partition("_")[0]
        if kind in factors:
            expected[name] = factors[kind] * loss
    found = values(make("Pretrain", **changes).eval()(make_batch()))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("prefixes", [False, True])
def test_end_to_end_is_the_sum_of_both(prefixes):
    model = make(e2e=True, prefixes=prefixes).eval()
    state = model.state_dict()
    pretrain = make("Pretrain").eval()
    pretrain.load_state_dict({k: v for k, v in state.items() if k != "item.weight"})
    plain = make(prefixes=prefixes).eval()
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("W.")})
    batch = make_batch()
    pairs = make_batch()
    if prefixes:    # one target a row, the last
        pairs["target"][:, :-1] = 0
    assert values(model(batch)) == pytest.approx(values(plain(batch)) | values(pretrain(pairs)))


def test_one_modality_scores_and_the_other_gets_no_gradient():
    model = make(modality="text")
    model.m2se.encoders["image"].x = None    # it is not even computed
    table = model.encode_items()
    assert set(table) == {"text", "candidates"} and table["candidates"].shape == (N + 1, D)
    sum(model(make_batch()).values()).backward()
    for m, learns in (("text", True), ("image", False)):
        for weight in model.m2se.encoders[m].parameters():
            if weight.dim() > 1:
                assert (weight.grad is not None and bool(weight.grad.any())) == learns


@pytest.mark.parametrize("use_id", [True, False])
def test_only_id_embeddings_tell_items_of_equal_content_apart(use_id):
    catalog = make_catalog()
    for stack in msm.STACKS.values():
        catalog[stack][1:] = catalog[stack][1]
        catalog[stack + "_mask"][1:] = catalog[stack + "_mask"][1]
    model = msm.Model(settings(use_id=use_id), catalog).eval()
    scores = model.score(make_batch(), model.encode_items())[:, 1:]
    assert torch.allclose(scores, scores[:, :1], rtol=0, atol=1e-3) != use_id


def test_settings_by_default():
    """As section IV-A4 states them; the last line is not in the paper (readings 11, 12, 14)."""
    stated = dict(
        dim=64, attention_dim=64, experts=8, heads=2, layers=2, max_len=50, rho=.2, p_max=.5,
        tau=.07, lam=.01, pretrain_epochs=300, pretrain_lr=1e-3, patience=10,
        use_nip=True, use_cmcl=True, use_mixup=True, use_id=True, use_proj=True, modality="both",
        e2e=False, freeze_transformer=False,
        dropout=.2, cosine=True, prefixes=False,
    )
    cfg = msm.Config()
    assert {name: getattr(cfg, name) for name in stated} == stated
    block = msm.Block(64, 2, 0.)
    assert block.inner.out_features == 256    # reading 14


@pytest.mark.parametrize("changes, words", [
    (dict(rho=1.), "rho 1"), (dict(p_max=.6), "p_max 0.6"), (dict(lam=-.1), "lam -0.1"),
    (dict(experts=0), "experts 0"), (dict(attention_dim=-1), "attention_dim -1"),
    (dict(e2e=True, pretrain_epochs=1), "pretrain_epochs must be 0 for e2e"),
    (dict(e2e=True, use_nip=False, use_cmcl=False), "e2e needs"),
    (dict(use_nip=False, use_cmcl=False, pretrain_epochs=1), "nothing to pre-train"),
], ids=str)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_a_modality_without_a_single_slot():
    catalog = make_catalog()
    catalog["pictures"] = torch.zeros(N + 1, 0, 7)
    catalog["pictures_mask"] = torch.zeros(N + 1, 0, dtype=torch.bool)
    pretrain = msm.Pretrain(settings(), catalog)
    losses = pretrain(make_batch())
    sum(losses.values()).backward()
    assert losses["nip_image"] == 0 and losses["nip_text"] > 0
    gradients = [weight.grad for weight in pretrain.parameters() if weight.grad is not None]
    assert all(slope.isfinite().all() for slope in gradients)


@pytest.mark.parametrize("kind, changes", [
    ("Pretrain", {}), ("Model", dict(e2e=True)), ("Model", dict(use_id=False)),
], ids=str)
def test_bfloat16_changes_little(kind, changes):
    torch.set_default_dtype(torch.float32)    # float64 is no matter for autocast
    model = make(kind, **changes).eval()
    exact = values(model(make_batch()))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(make_batch())
        z = model.m2se.items()
        assert msm.similarity(z["text"], z["image"], .07).dtype == torch.float32
    sum(losses.values()).backward()
    assert values(losses) == pytest.approx(exact, rel=.1, abs=.02)
    assert {table.dtype for table in z.values()} == {torch.float32}
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("prefixes", [False, True])
def test_both_stages_in_one_drop_items_of_the_pre_training_terms_alone(monkeypatch, prefixes):
    model = make("Model", e2e=True, pretrain_epochs=0, prefixes=prefixes).train()
    calls = []
    real = msm.random_drop

    def watched(seq, rho):
        calls.append((seq, rho))
        return real(seq, rho)

    monkeypatch.setattr(msm, "random_drop", watched)
    seq = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    batch = {"user": torch.tensor([0, 1]), "seq": seq, "target": seq + 1}
    losses = model(batch)
    assert len(calls) == 1 and calls[0][1] == model.cfg.rho
    assert torch.equal(calls[0][0], seq)
    assert {"next_item", "nip_text", "cmcl_image"} <= set(losses)
