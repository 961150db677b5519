"""MSM4SR's parts against naive loops in float64, written from the paper's equations."""
import math

import pytest
import torch
import torch.nn.functional as F

from train import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
msm = load_model_file("msm4sr")
N, D = 12, 8


def make_catalog(n=N):
    """Stacks of different width; noise where no vector is. Item 3 has no picture, item 5 no sentence."""
    g = torch.Generator().manual_seed(5)
    masks = [torch.arange(s) < torch.randint(1, s + 1, (n + 1, 1), generator=g) for s in (3, 2)]
    masks[0][[0, 5]] = masks[1][[0, 3]] = False
    return {"n_items": n, "sentences": torch.randn(n + 1, 3, 5, generator=g), "sentences_mask": masks[0],
            "pictures": torch.randn(n + 1, 2, 7, generator=g), "pictures_mask": masks[1]}


def settings(**changes):
    return msm.Config(**dict(dim=D, attention_dim=6, experts=3, heads=2, max_len=10, dropout=0.) | changes)


def make(kind="Model", **changes):
    """A model with weights large enough to matter, the gates' among them."""
    torch.manual_seed(2)
    changes.setdefault("pretrain_epochs", 300 if kind == "Pretrain" else 0)
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


# ---------------------------------------------------------------- the encoder of a modality

@torch.no_grad()
def naive_encoder(enc, m, i):
    """Eqs. (3)-(5) for one item and one modality."""
    catalog = make_catalog()
    x = [row for row, there in zip(catalog[msm.STACKS[m]][i], catalog[msm.STACKS[m] + "_mask"][i]) if there]
    if not x:
        return torch.zeros(D)
    score = [math.exp(float(enc.W_2(enc.W_1(row)))) for row in x]
    e = sum(s / sum(score) * row for s, row in zip(score, x))                                 # eq. (3)
    O, g, z = enc.O, [math.exp(float(a)) for a in enc.W_3.weight @ e], 0
    for k in range(O):
        part = slice(k * D, (k + 1) * D)
        y = enc.W_k.weight[part] @ e + enc.W_k.bias[part]
        y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
        z = z + g[k] / sum(g) * (y * enc.scale[part] + enc.shift[part])                       # eqs. (4), (5)
    return z


def test_item_encoders_eqs_3_to_5():
    m2se = make().m2se.train()
    for m, z in m2se.items().items():
        torch.testing.assert_close(z, torch.stack([naive_encoder(m2se.encoders[m], m, i) for i in range(N + 1)]))
    assert not m2se.items()["image"][[0, 3]].any() and not m2se.items()["text"][[0, 5]].any()
    assert len(m2se.encoders["image"].x) == N and len(m2se.encoders["text"].x) == N      # who lacks it costs nothing


def test_a_vector_in_padding_is_nobodys():
    catalog = make_catalog()
    m2se = msm.M2SE(settings(), catalog)
    for stack in msm.STACKS.values():
        catalog[stack][0], catalog[stack + "_mask"][0] = 7., True
    noisy = msm.M2SE(settings(), catalog)
    noisy.load_state_dict(m2se.state_dict())
    for m, z in m2se.items().items():
        torch.testing.assert_close(noisy.items()[m], z)


def test_attention_learns_and_slots_without_a_vector_do_not_count():
    enc = make().m2se.encoders["text"]
    z = enc()
    z.square().sum().backward()
    assert enc.W_1.weight.grad.abs().sum() > 1e-3 and enc.W_2.weight.grad.abs().sum() > 1e-3
    assert all(p.grad.isfinite().all() for p in enc.parameters())
    enc.x[~enc.mask] = 1e3
    torch.testing.assert_close(enc(), z)
    enc.x[4, 0] += 1
    assert not torch.allclose(enc()[4], z[4])


def test_one_vector_per_item_needs_no_attention():
    enc = make().m2se.encoders["text"]
    x, mask = enc.x[:, :1], enc.mask[:, :1]
    torch.testing.assert_close(enc.encode(x, mask), enc.encode(x.repeat(1, 2, 1), torch.cat([mask, mask & False], 1)))


def test_experts_start_alike_and_have_dropout():
    torch.manual_seed(0)
    enc = msm.M2SE(settings(dropout=.5), make_catalog()).encoders["text"]
    assert not enc.W_3.weight.any()
    assert not torch.equal(enc.train()(), enc()) and torch.equal(enc.eval()(), enc())


def test_a_large_catalog_goes_in_parts(monkeypatch):
    enc = make().m2se.encoders["text"]
    slope = torch.randn(N + 1, D)
    whole = [enc(), *torch.autograd.grad(enc(), list(enc.parameters()), slope)]
    monkeypatch.setattr(msm, "CHUNK", 4)
    parts = [enc(), *torch.autograd.grad(enc(), list(enc.parameters()), slope)]
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)
    monkeypatch.setattr(enc, "p", .5)                            # a part computed again must drop the same numbers again
    z = enc()
    scale, = torch.autograd.grad(z, enc.scale, slope, retain_graph=True)
    E = torch.autograd.grad((z * slope).sum(), enc.shift)[0]
    torch.testing.assert_close((scale * enc.scale + E * enc.shift).sum(), (z * slope).sum())


# ---------------------------------------------------------------- dropout, mixup, Transformer

def test_sequence_random_dropout():
    seq = torch.arange(1, 21).repeat(400, 1)
    seq[:100, :15] = 0
    kept, target = msm.random_drop(seq, seq + 20 * (seq != 0), .2)
    for row, before in zip(kept.tolist(), seq.tolist()):
        items = [i for i in row if i]
        assert row == [0] * (20 - len(items)) + sorted(items) and items and set(items) <= set(before)
    assert torch.equal(target, torch.where(kept != 0, kept + 20, 0))                          # an item's pair goes with it
    assert (kept != 0).sum() / (seq != 0).sum() == pytest.approx(.8, abs=.02)
    few = msm.random_drop(torch.tensor([[0, 0, 3, 4]] * 50), torch.tensor([[0, 0, 4, 5]] * 50), .999)[0]
    assert (few == torch.tensor([0, 0, 0, 4])).all(1).sum() > 40 and ((few != 0).sum(1) >= 1).all()
    assert all(map(torch.equal, msm.random_drop(seq, seq, 0.), (seq, seq)))


def test_complementary_mixup():
    seq = torch.randint(1, 9, (200, 10))
    seq[:, :4] = 0
    z_t, z_v = torch.randn(2, 200, 10, 3)
    m_t, m_v = msm.mixup(z_t, z_v, seq, torch.tensor(.3))
    swapped = (m_t == z_v).all(-1)
    torch.testing.assert_close(m_t, torch.where(swapped[..., None], z_v, z_t), rtol=0, atol=0)
    torch.testing.assert_close(m_v, torch.where(swapped[..., None], z_t, z_v), rtol=0, atol=0)    # the same mask
    assert not swapped[seq == 0].any() and swapped[seq != 0].double().mean() == pytest.approx(.3, abs=.05)


@pytest.mark.parametrize("use_mixup", [True, False])
def test_the_mixup_ratio_is_drawn_between_0_and_a_half(use_mixup, monkeypatch):
    model, drawn, real = make("Pretrain", use_mixup=use_mixup), [], msm.mixup
    monkeypatch.setattr(msm, "mixup", lambda z_t, z_v, seq, p: drawn.append(float(p)) or real(z_t, z_v, seq, p))
    for _ in range(40):
        model(make_batch())
    assert (len(drawn) == 40 and 0 <= min(drawn) < .1 and .4 < max(drawn) <= .5) if use_mixup else not drawn
    model.eval()(make_batch())
    assert len(drawn) == 40 * use_mixup                          # none outside of training


@torch.no_grad()
def naive_block(block, x):
    """Causal multi-head attention and feed-forward with residual sums, x (L, D): Python loops."""
    d = D // block.heads
    Q, K, V = block.qkv(x).chunk(3, -1)
    rows = []
    for q in range(len(x)):
        heads = []
        for h in range(block.heads):
            part = slice(h * d, (h + 1) * d)
            weight = [math.exp(float(Q[q, part] @ K[j, part]) / math.sqrt(d)) for j in range(q + 1)]
            heads.append(sum(w / sum(weight) * V[j, part] for j, w in enumerate(weight)))
        a = block.norm1(x[q] + block.out(torch.cat(heads)))
        rows.append(block.norm2(a + block.outer(F.gelu(block.inner(a)))))
    return torch.stack(rows)


@torch.no_grad()
def naive_states(m2se, rows, seq):
    """rows (N+1, D) of one stream, seq a list of ids -> states of its items, (n, D)."""
    pad, items = seq.count(0), [i for i in seq if i]
    first = len(m2se.position) - len(seq) + pad
    x = torch.stack([m2se.norm(rows[i] + m2se.position[first + t]) for t, i in enumerate(items)])
    for block in m2se.blocks:
        x = naive_block(block, x)
    return x


@torch.no_grad()
def test_one_transformer_for_both_streams():
    m2se, seq = make().m2se, make_batch()["seq"]
    z = list(m2se.items().values())
    h = m2se.transform([z[0][seq], z[1][seq]], seq)
    for stream in range(2):
        for b, row in enumerate(seq.tolist()):
            torch.testing.assert_close(h[stream, b, row.count(0):], naive_states(m2se, z[stream], row))


# ---------------------------------------------------------------- pre-training

def f(s, z, tau=.07):
    return math.exp((s @ z / (s.norm() * z.norm())).item() / tau)


def naive_nip(m_hat, m_tilde, z, no_negative, real):
    """Eq. (7), mean over the real rows."""
    total, R = 0., len(z)
    for j in range(R):
        if real[j]:
            others = [k for k in range(R) if k == j or real[k] and not no_negative[j][k]]
            total -= math.log((f(m_hat[j], z[j]) + f(m_tilde[j], z[j])) /
                              sum(f(m_hat[j], z[k]) + f(m_tilde[j], z[k]) for k in others))
    return total / max(sum(real), 1)


def naive_cmcl(m_hat, m_tilde, no_negative, real):
    """Eq. (9), mean over the real rows."""
    def ell(a, b, j):
        others = [k for k in range(R) if real[k] and k != j and not no_negative[j][k]]
        return math.log(f(a[j], b[j]) / (f(a[j], b[j]) + sum(f(a[j], b[k]) + f(a[j], a[k]) for k in others)))
    R = len(m_hat)
    return -sum(ell(m_hat, m_tilde, j) + ell(m_tilde, m_hat, j) for j in range(R) if real[j]) / 2 / sum(real)


def pairs(R=7):
    target = torch.tensor([4, 2, 4, 9, 2, 4, 6])[:R]
    same = target == target[:, None]
    a, b, z = torch.randn(3, R, D)
    return a, b, z, same, (same & ~torch.eye(R, dtype=torch.bool))


def test_next_item_prediction_eqs_7_8():
    a, b, z, same, excluded = pairs()
    a.requires_grad_(), z.requires_grad_()
    loss = msm.nip(a, b, z, excluded, torch.ones(7) / 7, .07)
    assert loss.item() == pytest.approx(naive_nip(a, b, z, same, [True] * 7))
    slope, = torch.autograd.grad(msm.nip(a, b, z, excluded, F.one_hot(torch.tensor(0), 7), .07), z)
    assert not slope[[2, 5]].any() and slope[[0, 1, 3, 4, 6]].abs().sum(1).all()              # 2 and 5 are the same target
    alone = msm.nip(a, b, z, ~torch.eye(7, dtype=torch.bool), torch.ones(7) / 7, .07)
    assert alone.item() == pytest.approx(0, abs=1e-12)           # nothing to tell it from: exp(0) must not stay behind


def test_cross_modality_contrast_eqs_9_10():
    a, b, _, same, excluded = pairs()
    weight = torch.ones(7) / 7
    loss = msm.cmcl(a, b, excluded, weight, .07)
    assert loss.item() == pytest.approx(naive_cmcl(a, b, same, [True] * 7))
    assert msm.cmcl(b, a, excluded, weight, .07).item() == pytest.approx(loss.item())         # symmetric
    alone = msm.cmcl(a, b, ~torch.eye(7, dtype=torch.bool), weight, .07)
    assert alone.item() == pytest.approx(0, abs=1e-12)


@torch.no_grad()
def naive_objectives(model, batch, use_proj=True):
    """Eqs. (6)-(11) without dropout and mixup, from the states of all positions that have a target."""
    m2se, lam = model.m2se, .01
    z = {m: [naive_encoder(e, m, i) for i in range(N + 1)] for m, e in m2se.encoders.items()}
    h = {m: [] for m in z}
    targets, users = [], []
    for user, seq, target in zip(batch["user"].tolist(), batch["seq"].tolist(), batch["target"].tolist()):
        for m in z:
            h[m] += list(naive_states(m2se, torch.stack(z[m]), seq))
        targets += target[seq.count(0):]
        users += [user] * (len(seq) - seq.count(0))
    R, losses = len(targets), {}
    part = [j for j, part in enumerate(torch.arange(R).tensor_split(-(-R // msm.PAIRS))) for _ in part]
    no_negative = [[targets[j] == targets[k] or users[j] == users[k] or part[j] != part[k] for k in range(R)] for j in range(R)]
    for m, n in (("text", "image"), ("image", "text")):
        W = model.W[m]
        m_hat, m_tilde = [W(s) for s in h[m]], [W(s) for s in h[n]]                           # eq. (6)
        real = [bool(make_catalog()[msm.STACKS[m] + "_mask"][t].any()) for t in targets]
        losses[f"nip_{m}"] = naive_nip(m_hat, m_tilde, [z[m][t] for t in targets], no_negative, real)
        losses[f"cmcl_{m}"] = lam * naive_cmcl(m_hat, m_tilde, no_negative, [True] * R)       # eq. (11)
    return losses


def values(losses):
    return {k: v.item() for k, v in losses.items()}


@pytest.mark.parametrize("use_proj, pairs", [(True, msm.PAIRS), (False, msm.PAIRS), (True, 4)])
def test_pre_training_loss_eqs_6_to_11(use_proj, pairs, monkeypatch):
    monkeypatch.setattr(msm, "PAIRS", pairs)                     # 4: the batch is contrasted in three parts
    model = make("Pretrain", use_proj=use_proj).eval()
    assert values(model(make_batch())) == pytest.approx(naive_objectives(model, make_batch()))


@pytest.fixture
def like_cuda(monkeypatch):
    """No rows are chosen, as on a GPU."""
    return lambda: monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))


def test_rows_without_a_target_count_nothing_on_a_gpu(like_cuda):
    pretrain, model, batch = make("Pretrain").eval(), make(e2e=True).eval(), make_batch()
    batch["target"][1, 2] = 0
    def losses_and_gradients():
        for m in (pretrain, model):
            losses = m(batch)
            yield values(losses), torch.autograd.grad(sum(losses.values()), list(m.parameters()))

    before = list(losses_and_gradients())
    like_cuda()
    for (a, slopes), (b, others) in zip(before, losses_and_gradients()):
        assert a == pytest.approx(b)
        torch.testing.assert_close(slopes, others)


def test_each_item_of_a_batch_is_encoded_once(monkeypatch):
    model, batch, asked = make("Pretrain").eval(), make_batch(), []
    losses = model(batch)
    every = model(batch, model.m2se.items())
    assert values(losses) == pytest.approx(values(every))
    for a, b in zip(*(torch.autograd.grad(sum(terms.values()), list(model.parameters())) for terms in (losses, every))):
        torch.testing.assert_close(a, b)
    real = model.m2se.items
    monkeypatch.setattr(model.m2se, "items", lambda ids=None: asked.append(ids) or real(ids))
    model(batch)
    assert asked[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    z = real()
    for m in z:                                                  # one by one, as the positions come
        one_by_one = torch.stack([real(i[None])[m][0] for i in batch["seq"].flatten()])
        torch.testing.assert_close(z[m][batch["seq"]].flatten(0, 1), one_by_one)


def test_dropping_and_mixing_in_pre_training_only():
    noisy = lambda model: len({sum(model(make_batch()).values()).item() for _ in range(8)}) > 1
    assert noisy(make("Pretrain")) and not noisy(make("Pretrain").eval())
    assert noisy(make("Pretrain", rho=0.)) and noisy(make("Pretrain", use_mixup=False))
    assert not noisy(make("Pretrain", rho=0., use_mixup=False)) and not noisy(make("Pretrain", rho=0., p_max=0.))
    assert not noisy(make()) and not noisy(make(modality="text"))                             # fine-tuning: p = rho = 0
    assert noisy(make(dropout=.1))


# ---------------------------------------------------------------- fine-tuning

@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(cosine=False), dict(use_id=False), dict(modality="text"),
                                     dict(modality="image", cosine=False), dict(prefixes=True)])
def test_scores_and_loss_eqs_12_13(changes):
    model, batch = make(**changes).eval(), make_batch()
    cfg, z = model.cfg, model.m2se.items()
    E = model.item.weight if cfg.use_id else torch.zeros(N + 1, D)
    unit = (lambda x: x / x.norm()) if cfg.cosine else (lambda x: x)
    tau, total, count = .07 if cfg.cosine else 1., 0., 0
    found = model.score(batch, model.encode_items())
    for b, seq in enumerate(batch["seq"].tolist()):
        h = {m: naive_states(model.m2se, z[m] + E, seq) for m in z if cfg.modality in (m, "both")}
        for t in range(len(seq) - seq.count(0)):
            y = [sum(float(unit(h[m][t]) @ unit(z[m][i] + E[i])) / tau if (z[m][i] + E[i]).any() else 0. for m in h)
                 for i in range(1, N + 1)]                                                    # eq. (12)
            last = t == len(seq) - seq.count(0) - 1
            if last or not cfg.prefixes:
                right = int(batch["target"][b, seq.count(0) + t])
                total, count = total - y[right - 1] + math.log(sum(map(math.exp, y))), count + 1      # eq. (13)
        torch.testing.assert_close(found[b, 1:], torch.tensor(y))
    assert list(model(batch)) == ["next_item"] and model(batch)["next_item"].item() == pytest.approx(total / count)


@pytest.mark.parametrize("changes", [{}, dict(use_id=False), dict(use_proj=False), dict(modality="text")])
def test_a_pre_trained_state_is_taken_over_whole(changes):
    state, model = make("Pretrain", **changes).state_dict(), make(**changes)
    new = {"item.weight"} if model.cfg.use_id else set()
    assert set(model.state_dict()) - set(state) == new
    left = {k.split(".")[0] for k in set(state) - set(model.state_dict())}
    assert left == ({"W"} if model.cfg.use_proj else set())
    with torch.no_grad():
        before = model.state_dict()["item.weight"].clone() if new else None
        [p.zero_() for p in model.m2se.parameters()]
    model.init_from(state)
    after = model.state_dict()
    assert all(torch.equal(after[k], state[k]) for k in after if k not in new)
    assert not new or torch.equal(after["item.weight"], before) and after["item.weight"][1:].any(1).all()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("spoil", [
    lambda s: s.pop("m2se.position"), lambda s: s.pop("m2se.encoders.image.W_k.weight"), lambda s: s.pop("W.text.bias"),
    lambda s: s.update(more=torch.zeros(1)), lambda s: s.update({"item.weight": torch.zeros(N + 1, D)}),
    lambda s: s.update({"W.more": torch.zeros(1)}), lambda s: s.update({"m2se.position": torch.zeros(11, D)})])
def test_any_other_state_is_refused(spoil):
    state = make("Pretrain").state_dict()
    spoil(state)
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="pre-trained state"):
        model.init_from(state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())              # nothing was taken over


def test_a_frozen_transformer_stays_while_the_rest_learns():
    model = make(freeze_transformer=True)
    assert all(p.requires_grad for p in model.parameters())      # nothing to keep before a pre-trained state came
    model.init_from(make("Pretrain").state_dict())
    frozen = {k.split(".")[1] for k, p in model.named_parameters() if not p.requires_grad}
    trained = {k.split(".")[0 if k.startswith("item") else 1] for k, p in model.named_parameters() if p.requires_grad}
    assert frozen == {"position", "blocks"} and trained == {"encoders", "norm", "item"}
    sum(model(make_batch()).values()).backward()
    assert model.item.weight.grad.any() and model.m2se.encoders["text"].W_1.weight.grad.any()


# ---------------------------------------------------------------- ablations, settings, numbers

def test_without_nip_or_cmcl():
    full = values(make("Pretrain").eval()(make_batch()))
    assert list(full) == ["nip_text", "cmcl_text", "nip_image", "cmcl_image"]
    for changes, gone in ((dict(use_nip=False), "nip"), (dict(use_cmcl=False), "cmcl"), (dict(lam=.02), None)):
        found = values(make("Pretrain", **changes).eval()(make_batch()))
        assert found == pytest.approx({k: v * (1 + (gone is None and k[:4] == "cmcl")) for k, v in full.items()
                                       if gone is None or not k.startswith(gone)})


def test_end_to_end_is_the_sum_of_both():
    model, pretrain = make(e2e=True).eval(), make("Pretrain").eval()
    pretrain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "item.weight"})
    losses = values(model(make_batch()))
    plain = make()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("W.")})
    assert losses == pytest.approx(values(plain.eval()(make_batch())) | values(pretrain(make_batch())))


def test_one_modality_scores_and_the_other_gets_no_gradient():
    model = make(modality="text")
    table = model.encode_items()
    assert set(table) == {"text", "candidates"} and table["candidates"].shape == (N + 1, D)
    sum(model(make_batch()).values()).backward()
    for m, learns in (("text", True), ("image", False)):
        weights = [p for p in model.m2se.encoders[m].parameters() if p.dim() > 1]
        assert all((p.grad is not None and bool(p.grad.any())) == learns for p in weights)


def test_only_id_embeddings_tell_items_of_equal_content_apart():
    for use_id in (True, False):
        catalog = {k: v if k == "n_items" else v[torch.tensor([0] + [1] * N)] for k, v in make_catalog().items()}
        model = msm.Model(settings(use_id=use_id), catalog).eval()
        scores = model.score(make_batch(), model.encode_items())[:, 1:]
        assert (scores - scores[:, :1]).abs().max().item() > 1e-3 if use_id else torch.allclose(scores, scores[:, :1])


@pytest.mark.parametrize("kind", ["Pretrain", "Model"])
@pytest.mark.parametrize("changes", [dict(heads=3), dict(tau=0.), dict(rho=1.), dict(p_max=.6),
                                     dict(lam=-.1), dict(experts=0), dict(attention_dim=-1),
                                     dict(e2e=True, pretrain_epochs=1),
                                     dict(use_nip=False, use_cmcl=False, pretrain_epochs=1)])
def test_settings_that_make_no_sense_are_refused(kind, changes):
    with pytest.raises(ValueError):
        make(kind, **changes)


def test_a_modality_without_a_single_slot():
    catalog = make_catalog() | {"pictures": torch.zeros(N + 1, 0, 7),
                                "pictures_mask": torch.zeros(N + 1, 0, dtype=torch.bool)}
    pretrain = msm.Pretrain(settings(), catalog)
    losses = pretrain(make_batch())
    sum(losses.values()).backward()
    assert losses["nip_image"] == 0 and losses["nip_text"] > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in pretrain.parameters())


def test_softmax_loss_and_its_gradient():
    loss = msm.SoftmaxLoss.apply
    states, items = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    target = torch.tensor([3, 0, 10, 1, 0, 7, 3])
    real = target != 0
    plain = lambda s, e: F.cross_entropy((s[real] @ e.T)[:, 1:], target[real] - 1)
    torch.testing.assert_close(loss(states, items, target), plain(states, items))
    for a, b in zip(torch.autograd.grad(3 * loss(states, items, target), (states, items)),
                    torch.autograd.grad(3 * plain(states, items), (states, items))):
        torch.testing.assert_close(a, b)


def test_bfloat16_autocast_keeps_losses_and_weights_in_float32():
    torch.set_default_dtype(torch.float32)
    for model in (make("Pretrain").eval(), make(e2e=True).eval(), make(use_id=False).eval()):
        exact = values(model(make_batch()))
        with torch.autocast("cpu", torch.bfloat16):
            losses, z = model(make_batch()), model.m2se.items()
        sum(losses.values()).backward()
        assert all(v.dtype == torch.float32 for v in (*losses.values(), *z.values()))
        assert values(losses) == pytest.approx(exact, rel=.1, abs=.02)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
