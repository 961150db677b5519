"""FMMS-Rec's parts against naive loops in float64, written from the paper's equations and the file's readings."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from train import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
fmms = load_model_file("fmmsrec")
N, D = 12, 8


def make_catalog(n=N, width=(5, 7)):
    """Item 3 has no picture, item 5 no text, item 8 neither; their rows hold noise that must not be read."""
    g = torch.Generator().manual_seed(5)
    catalog = {"n_items": n}
    for m, D_m, missing in zip(("text", "image"), width, ([0, 5, 8], [0, 3, 8])):
        catalog[m] = torch.randn(n + 1, D_m, generator=g)
        catalog[f"has_{m}"] = ~torch.isin(torch.arange(n + 1), torch.tensor(missing))
    return catalog


def settings(**changes):
    return fmms.Config(**dict(dim=D, heads=2, max_len=10, dropout=0., input_dropout=0.) | changes)


def make(kind="Model", catalog=None, **changes):
    """A model in eval mode with weights large enough to matter."""
    torch.manual_seed(2)
    model = getattr(fmms, kind)(settings(**changes), catalog or make_catalog())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name != "logit_scale":
                weight += .3 * torch.randn_like(weight)
    return model.eval()


def make_batch():
    """Rows of 3, 5 and 4 items; 3, 5 and 8 lack something."""
    seq = torch.tensor([[0, 0, 4, 2, 8], [1, 2, 3, 9, 5], [0, 7, 8, 2, 9]])
    target = torch.tensor([[0, 0, 2, 9, 7], [2, 3, 9, 5, 6], [0, 8, 2, 9, 3]])
    return {"user": torch.arange(3), "seq": seq, "target": target}


def values(losses):
    return {k: v.item() for k, v in losses.items()}


# ---------------------------------------------------------------- both towers, token by token

@torch.no_grad()
def naive_tokens(enc, items, position=None):
    """items: per item a list of feature vectors or None (missing) per modality -> contextual tokens (len(items), M, D)."""
    tokens, there = [], []
    for t, item in enumerate(items):
        for i, (m, x) in enumerate(zip(enc.modalities, item)):
            E = enc.mask[0] if x is None else enc.f_NN[m](x)                                  # eqs. (1), (2)
            tokens.append(enc.norm(E + enc.modality[i] + (0 if position is None else position[t])))
            there.append(x is not None or not enc.cfg.drop_missing or all(y is None for y in item))
    x = tokens
    for block in enc.blocks:
        d, out = D // block.heads, []
        keys = [block.key_value(row).chunk(2) for row in x]
        for row in x:
            q, heads = block.query(row), []
            for h in range(block.heads):
                part = slice(h * d, (h + 1) * d)
                weight = [math.exp(float(q[part] @ k[part]) / math.sqrt(d)) * see for (k, _), see in zip(keys, there)]
                heads.append(sum(w / sum(weight) * v[part] for w, (_, v) in zip(weight, keys)))
            a = block.norm1(row + block.out(torch.cat(heads)))
            out.append(block.norm2(a + block.outer(F.gelu(block.inner(a)))))
        x = out
    M = enc.M
    return [x[t * M:(t + 1) * M] for t in range(len(items))], [there[t * M:(t + 1) * M] for t in range(len(items))]


@torch.no_grad()
def naive_pool(enc, tokens, there):
    """Eq. (3a) for one item: the largest value of each dimension over its modalities."""
    h = [enc.project[m](enc.final(x)) for m, x, see in zip(enc.modalities, tokens, there) if see]
    return torch.tensor([max(float(row[k]) for row in h) for k in range(D)])


def content(enc, i):
    """Features of item i per modality, None where it has none; item 0 is [mask]."""
    return [getattr(enc, f"x_{m}")[i] if enc.has[i, j] else None for j, m in enumerate(enc.modalities)]


def naive_item(enc, item):
    tokens, there = naive_tokens(enc, [item])
    return naive_pool(enc, tokens[0], there[0])


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(drop_missing=True), dict(use_image=False), dict(layers=1, heads=1)])
def test_item_tower_eqs_1_to_3(changes):
    model = make(**changes)
    table, enc = model.encode_items(), model.encoder
    for i in range(N + 1):
        h = naive_item(enc, content(enc, i))
        torch.testing.assert_close(table["item"][i], h / h.norm())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(drop_missing=True), dict(use_text=False)])
@pytest.mark.parametrize("L", [1, 5])
def test_sequence_tower_and_scores(changes, L):
    model, seq = make(**changes), make_batch()["seq"][:, -L:]
    table = model.encode_items()
    found = model.score({"seq": seq}, table)
    for row, scores in zip(seq.tolist(), found):
        items = [content(model.encoder, i) for i in row if i] + [[None] * model.encoder.M]    # [mask] at the end
        tokens, there = naive_tokens(model.encoder, items, model.position[-len(items):])
        h = naive_pool(model.encoder, tokens[-1], there[-1])
        for j in range(1, N + 1):
            assert scores[j].item() == pytest.approx(float(h @ table["item"][j] / h.norm() / .05))


def test_both_towers_and_both_stages_are_one_set_of_parameters():
    model, pretrain = make(), make("Pretrain")
    encoder = {f"encoder.{k}" for k, _ in model.encoder.named_parameters()}
    assert {k for k, _ in model.named_parameters()} == {"position"} | encoder
    assert {k for k, _ in pretrain.named_parameters()} == {"logit_scale", "match.weight", "match.bias"} | encoder
    seq, shared = make_batch()["seq"], [p for p in model.encoder.parameters() if p.dim() > 1]
    towers = lambda: (model.next(seq, model.encode_items()), model.encode_items()["item"])
    before = [tower.detach() for tower in towers()]
    for weight in shared:                                        # each weight moves both
        sequence, item = towers()
        assert torch.autograd.grad(sequence[:, 0].sum(), weight)[0].any()
        assert torch.autograd.grad(item[:, 0].sum(), weight)[0].any()
    with torch.no_grad():
        model.encoder.blocks[0].inner.weight += torch.randn_like(model.encoder.blocks[0].inner.weight)
    assert not any(map(torch.allclose, before, towers()))


@torch.no_grad()
def test_the_item_tower_is_a_sequence_of_length_one_without_position():
    model = make()
    enc = model.encoder
    E, has = enc.embed(torch.arange(N + 1))
    x = enc.transform(E[:, None], has[:, None], torch.ones(N + 1, 1, dtype=torch.bool))
    torch.testing.assert_close(F.normalize(enc.pool(x[:, 0], has), dim=-1), model.encode_items()["item"])
    model.position += torch.randn_like(model.position)
    torch.testing.assert_close(F.normalize(enc.pool(x[:, 0], has), dim=-1), model.encode_items()["item"])


# ---------------------------------------------------------------- items and what they lack

@torch.no_grad()
def test_an_item_does_not_depend_on_the_others():
    enc, ids = make().encoder, torch.tensor([4, 3, 9, 3])
    whole = enc.encode(*enc.embed(torch.arange(N + 1)))
    torch.testing.assert_close(enc.encode(*enc.embed(ids)), whole[ids])
    torch.testing.assert_close(enc.encode(*enc.embed(ids[:1])), whole[ids[:1]])


@torch.no_grad()
@pytest.mark.parametrize("drop_missing", [False, True])
def test_every_subset_of_modalities_gives_a_vector(drop_missing):
    model = make(drop_missing=drop_missing)
    found = {}
    for has_text, has_image in itertools.product([True, False], repeat=2):
        model.encoder.has[6] = torch.tensor([has_text, has_image])
        h = model.encode_items()["item"]
        torch.testing.assert_close(h.norm(dim=1), torch.ones(N + 1))
        found[has_text, has_image] = h[6]
        others = [i for i in range(N + 1) if i != 6]
        torch.testing.assert_close(h[others], found.setdefault("others", h[others]), rtol=0, atol=0)
        assert torch.equal(h[0], h[8]) and torch.equal(h[0], h[6]) == (not has_text and not has_image)
        scores = model.score({"seq": torch.tensor([[6, 3]])}, model.encode_items())
        assert scores.isfinite().all() and scores.abs().max() <= 1 / .05 + 1e-9
    del found["others"]
    for a, b in itertools.combinations(found.values(), 2):
        assert not torch.allclose(a, b)


@torch.no_grad()
def test_features_of_a_missing_modality_are_never_read():
    model = make(catalog=make_catalog() | {"image": make_catalog()["image"].index_fill(0, torch.tensor([0, 3, 8]), 1e9)})
    torch.testing.assert_close(model.encode_items()["item"], make().encode_items()["item"])
    scores, losses = (model.score(make_batch(), model.encode_items()), values(model(make_batch())))
    torch.testing.assert_close(scores, make().score(make_batch(), make().encode_items()))
    assert losses == pytest.approx(values(make()(make_batch())))


def test_features_are_standardised_over_the_items_that_have_them():
    x, has = 3 * torch.randn(50, 4) + 100, torch.rand(50) > .3
    x[:, 3] = 7
    found = fmms.standardised(x, has)
    torch.testing.assert_close(found[has][:, :3].mean(0), torch.zeros(3))
    torch.testing.assert_close(found[has][:, :3].std(0, correction=0), torch.ones(3))
    assert not found[~has].any() and not found[:, 3].any()
    assert not fmms.standardised(x, has & False).any()


def test_a_catalog_is_left_as_it_was():
    catalog = make_catalog()
    catalog["has_text"][0] = True                                # a careless caller: padding still is [mask]
    model = make(catalog=catalog)
    assert catalog["has_text"][0] and not model.encoder.has[0].any()


def test_a_large_catalog_goes_in_parts(monkeypatch):
    model = make()
    weights, slope = list(model.encoder.parameters()), torch.randn(N + 1, D)
    whole = [*model.encode_items().values(), *torch.autograd.grad((model.encode_items()["item"] * slope).sum(), weights)]
    monkeypatch.setattr(fmms, "CHUNK", 4)
    parts = [*model.encode_items().values(), *torch.autograd.grad((model.encode_items()["item"] * slope).sum(), weights)]
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


def test_parts_draw_their_dropout_again(monkeypatch):
    """The gradient of a part that is computed again is that of the numbers it gave: finite differences under fixed draws."""
    monkeypatch.setattr(fmms, "CHUNK", 4)
    model, slope = make(dropout=.3).train(), torch.randn(N + 1, D)
    def loss():
        torch.manual_seed(7)
        return (model.encode_items()["item"] * slope).sum()
    bias = model.encoder.blocks[0].outer.bias
    found, = torch.autograd.grad(loss(), bias)
    with torch.no_grad():
        bias[2] += 1e-6
        up = loss()
        bias[2] -= 2e-6
        down = loss()
    assert found[2].item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-4)


@torch.no_grad()
def test_attention_of_few_tokens_is_attention():
    block, x = make().encoder.blocks[0], torch.randn(4, 6, D)
    mask = torch.rand(4, 1, 1, 6) > .3
    mask[..., 0] = True
    mask[..., 4:] = False                                        # the same with four keys and with six, two unseen
    torch.testing.assert_close(block(x[:, :2], x[:, :4], mask[..., :4]), block(x[:, :2], x, mask))


@torch.no_grad()
@pytest.mark.parametrize("T", [2, 6])
def test_attention_has_dropout_in_training_only(T):
    block, x, mask = make().encoder.blocks[0], torch.randn(3, T, D), torch.ones(3, 1, 1, T, dtype=torch.bool)
    block.p = .5
    torch.testing.assert_close(block(x, x, mask), block(x, x, mask), rtol=0, atol=0)
    block.train()
    assert not torch.allclose(block(x, x, mask), block(x, x, mask))


# ---------------------------------------------------------------- masked item prediction

def test_mask_frequencies():
    seq = torch.randint(1, 1001, (500, 40))
    seq[:, :10] = 0
    read, chosen = fmms.mask_items(seq, 1000, .2)
    real, n = seq != 0, int((seq != 0).sum())
    near = lambda count, of, share: abs(count / of - share) < 5 * math.sqrt(share * (1 - share) / of)
    assert not chosen[~real].any() and not read[~real].any() and torch.equal(read[~chosen], seq[~chosen])
    k = int(chosen.sum())
    assert near(k, n, .2)
    masked, same = int((read[chosen] == 0).sum()), int((read[chosen] == seq[chosen]).sum())
    assert near(masked, k, .8) and near(same, k, .1) and near(k - masked - same, k, .1)
    other = read[chosen & (read != 0) & (read != seq)]
    assert other.min() >= 1 and other.max() <= 1000 and other.max() > 900 and other.min() < 100
    assert torch.equal(fmms.mask_items(seq, 1000, 0.)[0], seq)


@pytest.mark.parametrize("training", [True, False])
def test_the_last_slot_is_always_mask(training, monkeypatch):
    model, seen = make().train(training), []
    real = model.encoder.transform
    def watched(E, has, is_real, position=0., last=False):
        if torch.is_tensor(position):                            # a sequence, not the item tower
            seen.append((has, is_real, position))
        return real(E, has, is_real, position, last)
    monkeypatch.setattr(model.encoder, "transform", watched)
    batch = make_batch()
    for _ in range(20):
        model(batch)
    model.score(batch, model.encode_items())
    assert len(seen) == 21
    for has, is_real, position in seen:
        assert has.shape == (3, 6, 2) and not has[:, -1].any() and is_real[:, -1].all()
        assert torch.equal(is_real[:, :-1], batch["seq"] != 0)
        assert torch.equal(position[:, 0], model.position[-6:])
    with torch.no_grad():                                        # nothing after it, nothing of the target
        other = dict(batch, target=batch["target"].roll(1, 0))
        model.eval()
        torch.testing.assert_close(model.score(other, model.encode_items()), model.score(batch, model.encode_items()))


@torch.no_grad()
def test_training_loss_is_the_mean_over_all_masked_places(monkeypatch):
    """Inner places by hand: one [mask], one replaced by item 6, one kept; F23."""
    model, batch = make().train(), make_batch()
    read, chosen = batch["seq"].clone(), torch.zeros(3, 5, dtype=torch.bool)
    for row, place, what in ((0, 2, 0), (1, 1, 6), (2, 3, 2)):
        read[row, place], chosen[row, place] = what, True
    monkeypatch.setattr(fmms, "mask_items", lambda seq, n, p: (read, chosen))
    table = model.encode_items()
    inner = last = 0.
    for b, row in enumerate(batch["seq"].tolist()):
        first = row.count(0)
        items = [content(model.encoder, i) for i in read[b, first:].tolist()] + [[None, None]]
        tokens, there = naive_tokens(model.encoder, items, model.position[-len(items):])
        for t in range(len(items)):
            final = t == len(items) - 1
            if final or chosen[b, first + t]:
                h = naive_pool(model.encoder, tokens[t], there[t])
                y = [float(h @ table["item"][j] / h.norm() / .05) for j in range(1, N + 1)]
                right = batch["target"][b, -1] if final else row[first + t]
                ce = math.log(sum(map(math.exp, y))) - y[int(right) - 1]
                last, inner = last + ce * final, inner + ce * (not final)
    assert values(model(batch)) == pytest.approx({"next_item": last / 6, "masked_item": inner / 6})
    assert list(model(batch)) == ["next_item", "masked_item"]
    model.eval()
    assert values(model(batch)) == {"next_item": pytest.approx(naive_next(model, batch))}


@torch.no_grad()
def naive_next(model, batch):
    scores = model.score(batch, model.encode_items())[:, 1:]
    return F.cross_entropy(scores, batch["target"][:, -1] - 1).item()


def test_every_chosen_place_reaches_the_loss(monkeypatch):
    """The room for chosen places is bounded so that no GPU has to count them: none may fall out of it."""
    model, asked = make(mask_ratio=.2).train(), []
    monkeypatch.setattr(fmms.SoftmaxLoss, "apply", lambda s, i, t, c: asked.append((t, c)) or s.sum() * 0)
    batch = {"seq": torch.randint(1, N + 1, (40, 10)), "target": torch.randint(1, N + 1, (40, 10))}
    real, drawn = fmms.mask_items, []
    monkeypatch.setattr(fmms, "mask_items", lambda *a: drawn.append(real(*a)) or drawn[-1])
    for _ in range(30):
        model(batch)
        (last, count), (inner, same) = asked[-2:]
        assert torch.equal(last, batch["target"][:, -1]) and len(inner) < 200 and count == same
        assert sorted(inner[inner != 0].tolist()) == sorted(batch["seq"][drawn[-1][1]].tolist())
        assert count == len(last) + (inner != 0).sum()
    few = {"seq": torch.tensor([[3]]), "target": torch.tensor([[4]])}
    monkeypatch.setattr(fmms, "mask_items", lambda seq, n, p: (seq * 0, seq != 0))
    assert model(few) and asked[-1][0].tolist() == [3]           # a batch of one place has room for it


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_positions_are_counted_from_the_end(training, monkeypatch):
    model, batch = make().train(training), make_batch()
    monkeypatch.setattr(fmms, "mask_items", lambda seq, n, p: (seq * (seq % 3 != 0), (seq != 0) & (seq % 3 == 0)))
    pad = lambda x, k: torch.cat([torch.zeros(3, k, dtype=torch.long), x], 1)
    table = model.encode_items()
    for k in (1, 5):
        longer = {n: pad(batch[n], k) for n in ("seq", "target")}
        assert values(model(longer)) == pytest.approx(values(model(batch)))
        torch.testing.assert_close(model.score(longer, table), model.score(batch, table))
    before = model.score(batch, table)
    slot = model.position[-1].clone()
    model.position[-1] += torch.randn(D)                         # of the [mask] slot
    assert not torch.allclose(model.score(batch, table), before)
    model.position[-1] = slot
    model.position[:5] += torch.randn(D)                         # of places that no row reaches
    torch.testing.assert_close(model.score(batch, table), before)


def test_a_new_model_hears_the_order_of_a_history():
    """Next to what a changed item does: positions that the sum with the features drowns would not reach a hundredth."""
    torch.manual_seed(0)
    catalog = make_catalog(width=(24, 24)) | {f"has_{m}": torch.arange(N + 1) > 0 for m in fmms.MODALITIES}
    model = fmms.Model(fmms.Config(dim=64, heads=4), catalog).eval()
    seq = torch.randint(1, N + 1, (64, 8))
    other = torch.cat([seq[:, :-1], seq[:, -1:] % N + 1], 1)
    with torch.no_grad():
        table = model.encode_items()
        h, turned, changed = (F.normalize(model.next(s, table), dim=-1) for s in (seq, seq.flip(1), other))
    assert (turned - h).norm() > .1 * (changed - h).norm()


@torch.no_grad()
def test_order_matters_and_nothing_is_causal():
    model = make()
    table = model.encode_items()
    a, b = (model.score({"seq": torch.tensor([row])}, table) for row in ([1, 2, 4], [2, 1, 4]))
    assert not torch.allclose(a, b)
    enc, has = model.encoder, torch.ones(1, 3, 2, dtype=torch.bool)
    E, there = torch.randn(1, 3, 2, D), torch.ones(1, 3, dtype=torch.bool)
    x = enc.transform(E, has, there)
    E[:, 2] += torch.randn(2, D)
    assert not torch.allclose(enc.transform(E, has, there)[:, 0], x[:, 0])                    # the first sees the last
    torch.testing.assert_close(enc.transform(E, has, there, last=True)[:, 0], enc.transform(E, has, there)[:, -1])


# ---------------------------------------------------------------- pre-training

def naive_info_nce(a, b, real, scale):
    """Eq. (4) with a positive sign: half the mean of both directions."""
    rows, total = [j for j in range(len(a)) if real[j]], 0.
    sim = lambda i, j: (a[i] @ b[j] / a[i].norm() / b[j].norm()).item() * scale
    for j in rows:
        total -= sim(j, j) - math.log(sum(math.exp(sim(j, k)) for k in rows))
        total -= sim(j, j) - math.log(sum(math.exp(sim(k, j)) for k in rows))
    return total / 2 / max(len(rows), 1)


@pytest.mark.parametrize("real", [[True] * 6, [True, False, True, True, False, True], [False] * 5 + [True], [False] * 6])
def test_info_nce_eq_4(real):
    a, b = torch.randn(2, 6, D, requires_grad=True)
    loss, logits = fmms.info_nce(a, b, torch.tensor(real), 1 / .07)
    assert loss.item() == pytest.approx(naive_info_nce(a, b, real, 1 / .07), abs=1e-12)
    assert logits[1, 2].item() == pytest.approx((a[1] @ b[2] / a[1].norm() / b[2].norm() / .07).item())
    slope, = torch.autograd.grad(loss, a)
    assert slope.isfinite().all() and slope.any(1).tolist() == [r and sum(real) > 1 for r in real]
    assert fmms.info_nce(b, a, torch.tensor(real), 1 / .07)[0].item() == pytest.approx(loss.item(), abs=1e-12)   # symmetric


def test_info_nce_falls_when_pairs_are_alike():
    a, b, real = torch.randn(6, D), torch.randn(6, D), torch.ones(6, dtype=torch.bool)
    loss = [fmms.info_nce(a, b + k * a, real, 1 / .07)[0].item() for k in (0, 1, 3, 100)]
    assert loss == sorted(loss, reverse=True) and 0 <= loss[-1] < .1 < 1 < loss[0]


def test_hard_negatives_are_drawn_by_similarity():
    logits = torch.tensor([[9., 0., 1., 2.]]).repeat(4, 1).index_put((torch.arange(4), torch.arange(4)), torch.tensor(9.))
    real = torch.tensor([True, True, True, False])
    drawn = torch.stack([fmms.hard_negatives(logits, real) for _ in range(4000)])
    assert drawn[:, 2].unique().tolist() == [0, 1] and drawn[:, 0].unique().tolist() == [1, 2]
    share = (drawn[:, 0] == 2).double().mean().item()
    assert share == pytest.approx(math.e / (1 + math.e), abs=.04)                             # softmax of 0 and 1
    assert fmms.hard_negatives(logits, real, draw=False).tolist() == [2, 0, 0, 0]
    alone = fmms.hard_negatives(logits, torch.tensor([False, True, False, False]))
    assert alone.min() >= 0 and alone.max() < 4                  # nobody to draw: any place, which counts nothing


@torch.no_grad()
def naive_pretrain(model, ids):
    """All terms of eq. (3b) without dropout, each pass item by item; the likeliest wrong partners."""
    enc, scale = model.encoder, math.exp(float(model.logit_scale))
    x = [content(enc, i) for i in ids]
    text, image = [naive_item(enc, [a, None]) for a, b in x], [naive_item(enc, [None, b]) for a, b in x]
    pair = lambda a, b: naive_item(enc, [x[a][0], x[b][1]])
    both = [None not in item for item in x]
    full = [naive_item(enc, item) for item in x]
    rows = [j for j in range(len(ids)) if both[j]]
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())
    no = yes = 0.
    p = lambda h: 1 / (1 + math.exp(-float(model.match(h))))
    for j in rows:
        others = [k for k in rows if k != j]
        yes -= math.log(p(full[j]))                                                           # eq. (5), y = 1
        if others:
            hard_image = max(others, key=lambda k: cosine(text[j], image[k]))
            hard_text = max(others, key=lambda k: cosine(text[k], image[j]))
            no -= math.log(1 - p(pair(j, hard_image))) + math.log(1 - p(pair(hard_text, j)))  # y = 0
    return {"pwc": naive_info_nce(text, image, both, scale),
            "pwm": (yes + no) / max(len(rows) * (3 if len(rows) > 1 else 1), 1),
            "text": naive_info_nce(text, text, [a is not None for a, _ in x], scale),
            "image": naive_info_nce(image, image, [b is not None for _, b in x], scale),
            "text+image": naive_info_nce(full, full, both, scale)}


@pytest.mark.parametrize("drop_missing", [False, True])
@pytest.mark.parametrize("ids", [[1, 2, 3, 4, 5, 6, 7, 8], [9, 3, 5], [3, 5, 8], [6]])
def test_pre_training_losses_eqs_3_to_5(ids, drop_missing):
    model = make("Pretrain", drop_missing=drop_missing)
    with torch.no_grad():
        model.match.weight *= 3
    losses = model({"item": torch.tensor(ids)})
    assert values(losses) == pytest.approx(naive_pretrain(model, ids), abs=1e-10)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_match_loss_falls_when_true_pairs_score_higher():
    """Eq. (5) has its minus sign: pwm is smaller, the higher true pairs and the lower wrong ones score."""
    model, ids = make("Pretrain"), torch.tensor([1, 2, 4, 6, 7])
    slope = {}
    class Match(torch.nn.Module):
        def forward(self, h):                                    # 5 true pairs, then 10 wrong ones
            assert len(h) == 15
            return torch.cat([torch.full((5, 1), slope["true"]), torch.full((10, 1), slope["wrong"])])
    model.match = Match()
    def pwm(true, wrong):
        slope.update(true=true, wrong=wrong)
        return model({"item": ids})["pwm"].item()
    assert pwm(0., 0.) == pytest.approx(math.log(2))
    assert pwm(2., 0.) < pwm(0., 0.) < pwm(-2., 0.) and pwm(0., -2.) < pwm(0., 0.) < pwm(0., 2.)
    assert pwm(30., -30.) == pytest.approx(0, abs=1e-9)
    assert pwm(2., 0.) == pytest.approx((math.log1p(math.exp(-2)) + 2 * math.log(2)) / 3)


def test_wrong_pairs_are_wrong(monkeypatch):
    """One negative text per image and one negative image per text, never the true one, never of items that lack one."""
    model, seen = make("Pretrain").train(), []
    real = model.encoder.encode
    monkeypatch.setattr(model.encoder, "encode", lambda E, has: seen.append((E, has)) or real(E, has))
    ids = torch.tensor([1, 3, 4, 5, 6, 7])
    E, _ = model.encoder.embed(ids)
    whole = [0, 2, 4, 5]
    for _ in range(20):
        seen.clear()
        model({"item": ids})
        pairs, has = seen[1]
        assert pairs.shape == (12, 2, D) and has.all()
        find = lambda x, m: next(j for j in range(6) if torch.equal(E[j, m], x))
        for j in whole:
            text, image = find(pairs[j, 0], 0), find(pairs[j, 1], 1)
            assert text == j and image in whole and image != j
            text, image = find(pairs[6 + j, 0], 0), find(pairs[6 + j, 1], 1)
            assert image == j and text in whole and text != j


def test_the_two_views_differ_by_dropout_only():
    ids = {"item": torch.tensor([1, 2, 4, 6, 7, 9])}
    plain, noisy = make("Pretrain").train(), make("Pretrain", dropout=.5).train()
    for name in ("text", "image", "text+image"):
        assert plain(ids)[name].item() == pytest.approx(plain(ids)[name].item())
        assert noisy(ids)[name].item() > plain(ids)[name].item() + .01
    assert make("Pretrain", input_dropout=.5).train()(ids)["text"].item() > plain(ids)["text"].item() + .01


def test_the_learned_temperature_starts_at_007_and_is_capped():
    model, ids = make("Pretrain"), {"item": torch.arange(1, 8)}
    assert model.logit_scale.exp().item() == pytest.approx(1 / .07)
    model(ids)["pwc"].backward()
    assert model.logit_scale.grad != 0
    with torch.no_grad():
        model.logit_scale.fill_(9)
    high = model(ids)
    assert model.logit_scale.exp().item() == pytest.approx(100)
    assert values(high) == pytest.approx(naive_pretrain(model, range(1, 8)))


def test_pre_training_brings_modalities_together():
    model = make("Pretrain", dim=16).train()
    ids = {"item": torch.tensor([1, 2, 4, 6, 7, 9, 10, 11])}
    first, optimizer = values(model.eval()(ids)), torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(model.train()(ids).values()).backward()
        optimizer.step()
    last = values(model.eval()(ids))
    assert last["pwc"] < .5 * first["pwc"] and last["pwm"] < first["pwm"]


# ---------------------------------------------------------------- from stage to stage

@pytest.mark.parametrize("changes", [{}, dict(use_image=False), dict(use_text=False)])
def test_a_pre_trained_state_is_taken_over_whole(changes):
    state, model = make("Pretrain", **changes).state_dict(), make(**changes)
    assert set(model.state_dict()) - set(state) == {"position"}
    with torch.no_grad():
        [p.zero_() for p in model.encoder.parameters()]
    before = model.position.clone()
    model.init_from(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k != "position")
    assert torch.equal(model.position, before) and before.any()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("spoil", [
    lambda s: s.pop("encoder.mask"), lambda s: s.pop("match.bias"), lambda s: s.pop("logit_scale"),
    lambda s: s.update(more=torch.zeros(1)), lambda s: s.update({"encoder.more": torch.zeros(1)}),
    lambda s: s.update(position=torch.zeros(11, D)), lambda s: s.update({"encoder.modality": torch.zeros(3, D)}),
    lambda s: s.update({"match.weight": torch.zeros(2, D)})])
def test_any_other_state_is_refused(spoil):
    state, model = make("Pretrain").state_dict(), make()
    state = {k: v + 1 for k, v in state.items()}
    spoil(state)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="pre-trained state"):
        model.init_from(state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())              # nothing was taken over


def test_a_state_of_fewer_modalities_is_refused():
    for model, state in ((make(), make("Pretrain", use_image=False)), (make(use_image=False), make("Pretrain"))):
        with pytest.raises(ValueError, match="pre-trained state"):
            model.init_from(state.state_dict())


def test_pre_training_rows_are_items():
    assert fmms.Pretrain.rows == "items" and fmms.READS == ("text", "image", "has_text", "has_image")


# ---------------------------------------------------------------- ablations, settings, numbers

@torch.no_grad()
@pytest.mark.parametrize("gone, kept", [("image", "text"), ("text", "image")])
def test_without_v_and_without_s(gone, kept):
    model, full = make(**{f"use_{gone}": False}), make()
    assert {k.replace(kept, gone) for k, _ in model.named_parameters()} | {k for k, _ in model.named_parameters()} == \
        {k for k, _ in full.named_parameters()}
    catalog = make_catalog()
    catalog[gone], catalog[f"has_{gone}"] = 5 * catalog[gone], ~catalog[f"has_{gone}"]
    other = make(catalog=catalog, **{f"use_{gone}": False})      # what is gone is not read
    torch.testing.assert_close(other.encode_items(), model.encode_items(), rtol=0, atol=0)
    assert not torch.allclose(make(catalog=catalog).encode_items()["item"], full.encode_items()["item"])
    assert list(values(make("Pretrain", **{f"use_{gone}": False})({"item": torch.arange(1, 9)}))) == [kept]
    assert list(values(make("Pretrain")({"item": torch.arange(1, 9)}))) == ["pwc", "pwm", "text", "image", "text+image"]


def test_without_p_there_is_no_pre_training_stage():
    from train import stages_of
    for changes, stages in (({}, ["pretrain", "train"]), (dict(pretrain_epochs=0), ["train"]),
                            (dict(pretrain_epochs=0, use_image=False), ["train"])):
        assert [s.name for s in stages_of(fmms, settings(**changes))] == stages


def test_a_third_modality_is_one_more_name(monkeypatch):
    catalog = make_catalog() | {"sound": torch.randn(N + 1, 3), "has_sound": torch.arange(N + 1) % 4 > 0}
    monkeypatch.setattr(fmms, "MODALITIES", ("text", "image", "sound"))
    model, pretrain = make(catalog=catalog), make("Pretrain", catalog=catalog)
    losses = pretrain({"item": torch.arange(1, N + 1)})
    assert list(losses) == ["pwc", "pwm", "text", "image", "sound", "text+image", "text+sound", "image+sound",
                            "text+image+sound"]
    table = model.encode_items()
    with torch.no_grad():
        for i in (1, 4, 5):
            h = naive_item(model.encoder, content(model.encoder, i))
            torch.testing.assert_close(table["item"][i], h / h.norm())
        E, has = pretrain.encoder.embed(torch.arange(1, N + 1))
        alone = [pretrain.encoder.encode(E, has & (torch.arange(3) == m)) for m in range(3)]
        pairs = [fmms.info_nce(alone[a], alone[b], has[:, a] & has[:, b], 1 / .07)[0] for a, b in ((0, 1), (0, 2), (1, 2))]
        torch.testing.assert_close(losses["pwc"].detach(), sum(pairs))
    sum(losses.values()).backward()
    sum(model.train()(make_batch()).values()).backward()
    assert all(p.grad.isfinite().all() for m in (model, pretrain) for p in m.parameters())
    model.init_from(pretrain.state_dict())


@pytest.mark.parametrize("kind", ["Pretrain", "Model"])
@pytest.mark.parametrize("changes", [dict(heads=3), dict(tau=0.), dict(mask_ratio=1.), dict(mask_ratio=-.1),
                                     dict(use_text=False, use_image=False)])
def test_settings_that_make_no_sense_are_refused(kind, changes):
    with pytest.raises(ValueError):
        make(kind, **changes)


def test_softmax_loss_and_its_gradient():
    loss = fmms.SoftmaxLoss.apply
    states, items = torch.randn(300, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target, count = torch.randint(0, 9, (300,)), torch.tensor(70)
    real = target != 0
    plain = lambda s, e: F.cross_entropy((s[real] @ e.T)[:, 1:], target[real] - 1, reduction="sum") / 70
    torch.testing.assert_close(loss(states, items, target, count), plain(states, items))
    for a, b in zip(torch.autograd.grad(3 * loss(states, items, target, count), (states, items)),
                    torch.autograd.grad(3 * plain(states, items), (states, items))):
        torch.testing.assert_close(a, b)
    assert loss(states, items, target * 0, torch.tensor(0)) == 0


def test_gradients_of_both_towers_by_finite_differences():
    model, batch = make(), make_batch()
    for name in ("encoder.f_NN.text.0.weight", "encoder.blocks.0.query.weight", "encoder.mask", "position"):
        weight = dict(model.named_parameters())[name]
        found, = torch.autograd.grad(model(batch)["next_item"], weight)
        at = divmod(int(found.abs().argmax()), found.shape[1])
        with torch.no_grad():
            weight[at] += 1e-6
            up = model(batch)["next_item"]
            weight[at] -= 2e-6
            down = model(batch)["next_item"]
            weight[at] += 1e-6
        assert found[at].item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-4), name


def test_bfloat16_autocast_keeps_losses_and_weights_in_float32():
    torch.set_default_dtype(torch.float32)
    ids = {"item": torch.arange(1, N + 1)}
    for model, batch in ((make(), make_batch()), (make("Pretrain"), ids), (make(drop_missing=True), make_batch())):
        exact = values(model(batch))
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(batch)
            if "seq" in batch:
                table = model.encode_items()
                assert all(v.dtype == torch.float32 for v in table.values())
        sum(losses.values()).backward()
        assert all(v.dtype == torch.float32 for v in losses.values())
        assert values(losses) == pytest.approx(exact, rel=.15, abs=.1)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
