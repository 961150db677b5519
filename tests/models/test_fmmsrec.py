"""FMMS-Rec's parts against naive loops in float64, written from the paper's equations and the
file's readings."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from loop.settings import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
fmmsrec = load_model_file("fmmsrec")
N, D = 12, 8
MISSING = {"text": [0, 5, 8], "image": [0, 3, 8]}    # items that lack it


def make_catalog(n=N, text=5, image=7):
    """Item 3 has no picture, item 5 no text, item 8 neither; their rows hold noise that must not
    be read."""
    random = torch.Generator().manual_seed(5)
    catalog = {"n_items": n}
    for m, width in (("text", text), ("image", image)):
        catalog[m] = torch.randn(n + 1, width, generator=random)
        catalog[f"has_{m}"] = torch.ones(n + 1, dtype=torch.bool)
        catalog[f"has_{m}"][MISSING[m]] = False
    return catalog


def make(kind="Model", catalog=None, **changes):
    """A model in eval mode with weights large enough to matter."""
    torch.manual_seed(2)
    small = dict(dim=D, heads=2, max_len=10, dropout=0., input_dropout=0.)
    cfg = fmmsrec.Config(**small | changes)
    model = getattr(fmmsrec, kind)(cfg, catalog or make_catalog())
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


def some_items(*ids):
    return {"item": torch.tensor(ids)}


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


# ---------------- both towers, token by token

@torch.no_grad()
def naive_layer(layer, x):
    """A single layer, f_NN or a projection: a linear map, and a LayerNorm."""
    linear, norm = layer
    y = linear.weight @ x + linear.bias
    deviation = torch.sqrt(((y - y.mean()) ** 2).mean() + 1e-5)
    return (y - y.mean()) / deviation * norm.weight + norm.bias


@torch.no_grad()
def naive_block(block, x, seen):
    """Attention of each token over those that are seen, feed-forward, residuals."""
    d = D // block.heads
    keys, vectors = zip(*(block.key_value(row).chunk(2) for row in x))
    out = []
    for row in x:
        q = block.query(row)
        heads = []
        for h in range(block.heads):
            part = slice(h * d, (h + 1) * d)
            weight = [see * math.exp(q[part] @ k[part] / math.sqrt(d))
                      for see, k in zip(seen, keys)]
            heads.append(sum(w / sum(weight) * v[part] for w, v in zip(weight, vectors)))
        a = block.norm1(row + block.out(torch.cat(heads)))
        out.append(block.norm2(a + block.outer(F.gelu(block.inner(a)))))
    return out


@torch.no_grad()
def naive_tokens(encoder, items, position=None):
    """Contextual tokens of a sequence of items: per item its M vectors, and which are seen.

    items: per item and modality the features, or None where they are missing.
    """
    x, seen = [], []
    for place, item in enumerate(items):
        for i, (m, features) in enumerate(zip(encoder.modalities, item)):
            missing = features is None
            E = encoder.mask[0]
            if not missing:
                E = naive_layer(encoder.f_NN[m], features)    # eqs. (1), (2)
            E = E + encoder.modality[i]
            if position is not None:
                E = E + position[place]
            x.append(encoder.norm(E))
            nothing = all(other is None for other in item)
            seen.append(not missing or not encoder.cfg.drop_missing or nothing)    # reading 3
    for block in encoder.blocks:
        x = naive_block(block, x, seen)
    M = encoder.M
    places = [slice(t * M, (t + 1) * M) for t in range(len(items))]
    return [x[p] for p in places], [seen[p] for p in places]


@torch.no_grad()
def naive_pool(encoder, tokens, seen):
    """Eq. (3a) for one item: the largest value of each dimension over its modalities."""
    h = []
    for m, x, see in zip(encoder.modalities, tokens, seen):
        if see:
            h.append(naive_layer(encoder.project[m], encoder.final(x)))
    return torch.stack(h).max(0).values


def content(encoder, i):
    """Features of item i per modality, None where it has none; item 0 is [mask]."""
    return [encoder.features[m][i] if encoder.has[i, j] else None
            for j, m in enumerate(encoder.modalities)]


def naive_item(encoder, item):
    tokens, seen = naive_tokens(encoder, [item])
    return naive_pool(encoder, tokens[0], seen[0])


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {}, dict(drop_missing=True), dict(use_image=False), dict(layers=1, heads=1),
], ids=str)
def test_item_tower_eqs_1_to_3(changes):
    model = make(**changes)
    table = model.encode_items()
    for i in range(N + 1):
        h = naive_item(model.encoder, content(model.encoder, i))
        torch.testing.assert_close(table["item"][i], h / h.norm())


@torch.no_grad()
@pytest.mark.parametrize("L", [1, 5])
@pytest.mark.parametrize("changes", [{}, dict(drop_missing=True), dict(use_text=False)], ids=str)
def test_sequence_tower_and_scores(changes, L):
    model = make(**changes)
    encoder = model.encoder
    seq = make_batch()["seq"][:, -L:]
    table = model.encode_items()
    found = model.score({"seq": seq}, table)
    for row, scores in zip(seq.tolist(), found):
        items = [content(encoder, i) for i in row if i]
        items.append([None] * encoder.M)    # [mask] at the end
        tokens, seen = naive_tokens(encoder, items, model.position[-len(items):])
        h = naive_pool(encoder, tokens[-1], seen[-1])
        expected = table["item"] @ h / h.norm() / .05
        torch.testing.assert_close(scores[1:], expected[1:])


def test_both_towers_and_both_stages_are_one_set_of_parameters():
    model = make()
    shared = {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == shared | {"position"}
    own = {"logit_scale", "match.weight", "match.bias"}
    assert {name for name, _ in make("Pretrain").named_parameters()} == shared | own
    seq = make_batch()["seq"]
    table = model.encode_items()
    sequence = model.last_state(seq, table)[:, 0].sum()
    item = table["item"][:, 0].sum()
    for name, weight in model.encoder.named_parameters():
        if weight.dim() > 1:    # each weight moves both
            for tower in (sequence, item):
                assert torch.autograd.grad(tower, weight, retain_graph=True)[0].any(), name


@torch.no_grad()
def test_the_item_tower_is_a_sequence_of_length_one_without_position():
    model = make()
    encoder = model.encoder
    E, has = encoder.embed(torch.arange(N + 1))
    x = encoder.transform(E[:, None], has[:, None], torch.ones(N + 1, 1, dtype=torch.bool))
    expected = F.normalize(encoder.pool(x[:, 0], has), dim=-1)
    torch.testing.assert_close(model.encode_items()["item"], expected)
    model.position += torch.randn_like(model.position)
    torch.testing.assert_close(model.encode_items()["item"], expected)


# ---------------- items and what they lack

@torch.no_grad()
def test_an_item_does_not_depend_on_the_others():
    encoder = make().encoder
    whole = encoder.encode(*encoder.embed(torch.arange(N + 1)))
    for ids in (torch.tensor([4, 3, 9, 3]), torch.tensor([4])):
        torch.testing.assert_close(encoder.encode(*encoder.embed(ids)), whole[ids])


@torch.no_grad()
@pytest.mark.parametrize("drop_missing", [False, True])
def test_every_subset_of_modalities_gives_a_vector(drop_missing):
    model = make(drop_missing=drop_missing)
    before = model.encode_items()["item"]
    found = []
    for has in itertools.product([True, False], repeat=2):    # of item 6
        model.encoder.has[6] = torch.tensor(has)
        h = model.encode_items()["item"]
        torch.testing.assert_close(h.norm(dim=1), torch.ones(N + 1))
        h_6, h[6] = h[6].clone(), before[6]
        torch.testing.assert_close(h, before, rtol=0, atol=0)    # the others do not change
        assert torch.equal(h[0], h[8])    # nothing at all is [mask]
        assert torch.equal(h[0], h_6) == (not any(has))
        scores = model.score({"seq": torch.tensor([[6, 3]])}, model.encode_items())
        assert scores.isfinite().all() and scores.abs().max() <= 1 / .05 + 1e-9
        found.append(h_6)
    for a, b in itertools.combinations(found, 2):
        assert not torch.allclose(a, b)


@torch.no_grad()
def test_features_of_a_missing_modality_are_never_read():
    catalog = make_catalog()
    for m, ids in MISSING.items():
        catalog[m][ids] = 1e9
    model, expected = make(catalog=catalog), make()
    batch = make_batch()
    table = model.encode_items()
    torch.testing.assert_close(table["item"], expected.encode_items()["item"])
    scores = expected.score(batch, expected.encode_items())
    torch.testing.assert_close(model.score(batch, table), scores)
    assert values(model(batch)) == pytest.approx(values(expected(batch)))


def test_features_are_standardised_over_the_items_that_have_them():
    x = 3 * torch.randn(50, 4) + 100
    x[:, 3] = 7
    has = torch.rand(50) > .3
    x[~has] = math.nan    # what is missing is never read
    found = fmmsrec.standardised(x, has)
    torch.testing.assert_close(found[has][:, :3].mean(0), torch.zeros(3))
    torch.testing.assert_close(found[has][:, :3].std(0, correction=0), torch.ones(3))
    assert not found[~has].any() and not found[:, 3].any()
    assert not fmmsrec.standardised(x, has & False).any()


def test_the_encoder_reads_standardised_features():
    """Of each dimension: mean 0 and deviation 1 over the items that have the modality."""
    catalog = make_catalog()
    for m in fmmsrec.MODALITIES:
        catalog[m] = .03 * catalog[m] + 5
    encoder = make(catalog=catalog).encoder
    for m, missing in MISSING.items():
        there = [i for i in range(N + 1) if i not in missing]
        for d in range(catalog[m].shape[1]):
            x = [catalog[m][i, d].item() for i in there]
            mean = sum(x) / len(x)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in x) / len(x))
            expected = [(value - mean) / deviation for value in x]
            assert encoder.features[m][there, d].tolist() == pytest.approx(expected)


def test_blocks_are_twice_as_wide_inside():
    for block in make().encoder.blocks:
        assert block.inner.weight.shape == (2 * D, D)
        assert block.outer.weight.shape == (D, 2 * D)


def test_a_catalog_is_left_as_it_was():
    catalog = make_catalog()
    catalog["has_text"][0] = True    # a careless caller: padding still is [mask]
    model = make(catalog=catalog)
    assert catalog["has_text"][0] and not model.encoder.has[0].any()


def test_a_large_catalog_goes_in_parts(monkeypatch):
    model = make()
    weights = list(model.encoder.parameters())
    slope = torch.randn(N + 1, D)

    def table_and_gradients():
        table = model.encode_items()
        return table, torch.autograd.grad((table["item"] * slope).sum(), weights)

    whole = table_and_gradients()
    monkeypatch.setattr(fmmsrec, "CHUNK", 4)
    torch.testing.assert_close(table_and_gradients(), whole)


def test_parts_draw_the_same_dropout_when_they_are_computed_again(monkeypatch):
    """The gradient is that of the numbers that were given: finite differences, fixed draws."""
    monkeypatch.setattr(fmmsrec, "CHUNK", 4)
    model = make(dropout=.3).train()
    slope = torch.randn(N + 1, D)

    def loss():
        torch.manual_seed(7)
        return (model.encode_items()["item"] * slope).sum()

    check_slope(loss, model.encoder.blocks[0].outer.bias, (2,))


def check_slope(loss, weight, at, rel=1e-4):
    """The gradient at one place of a weight against finite differences."""
    found, = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        weight[at] += 1e-6
        up = loss()
        weight[at] -= 2e-6
        down = loss()
        weight[at] += 1e-6
    assert found[at].item() == pytest.approx(((up - down) / 2e-6).item(), rel=rel)


def check_steepest_slope(loss, weight):
    """The gradient of a matrix where it is largest."""
    steepest = torch.autograd.grad(loss(), weight)[0].abs().argmax()
    check_slope(loss, weight, divmod(int(steepest), weight.shape[1]))


@pytest.mark.parametrize("name", [
    "encoder.f_NN.text.0.weight", "encoder.blocks.0.query.weight", "encoder.mask", "position",
])
def test_gradients_of_both_towers_by_finite_differences(name):
    model = make()
    batch = make_batch()
    weight = dict(model.named_parameters())[name]

    def loss():
        return model(batch)["next_item"]

    check_steepest_slope(loss, weight)


@torch.no_grad()
def test_attention_of_few_tokens_is_attention():
    block = make().encoder.blocks[0]
    x = torch.randn(4, 6, D)
    mask = torch.rand(4, 1, 1, 6) > .3
    mask[..., 0] = True
    mask[..., 4:] = False    # the same with four keys and with six of which two are unseen
    few = block(x[:, :2], x[:, :4], mask[..., :4])
    torch.testing.assert_close(few, block(x[:, :2], x, mask))


@torch.no_grad()
@pytest.mark.parametrize("T", [2, 6])
def test_attention_has_dropout_in_training_only(T):
    block = make().encoder.blocks[0]
    block.attention_dropout = .5
    x = torch.randn(3, T, D)
    mask = torch.ones(3, 1, 1, T, dtype=torch.bool)
    torch.testing.assert_close(block(x, x, mask), block(x, x, mask), rtol=0, atol=0)
    block.train()
    assert not torch.allclose(block(x, x, mask), block(x, x, mask))


# ---------------- masked item prediction

def test_mask_frequencies():
    def near(count, of, share):
        return abs(count / of - share) < 5 * math.sqrt(share * (1 - share) / of)

    seq = torch.randint(1, 1001, (500, 40))
    seq[:, :10] = 0
    read, chosen = fmmsrec.mask_items(seq, 1000, .2)
    real = seq != 0
    assert not chosen[~real].any() and not read[~real].any()
    assert torch.equal(read[~chosen], seq[~chosen])
    n = int(chosen.sum())
    masked = int((read[chosen] == 0).sum())
    same = int((read[chosen] == seq[chosen]).sum())
    assert near(n, int(real.sum()), .2)
    assert near(masked, n, .8) and near(same, n, .1) and near(n - masked - same, n, .1)
    other = read[chosen & (read != 0) & (read != seq)]
    assert 1 <= other.min() < 100 and 900 < other.max() <= 1000
    assert torch.equal(fmmsrec.mask_items(seq, 1000, 0.)[0], seq)


def test_another_item_is_never_padding():
    """With one item in all, what is drawn for it is itself: 0 is read for [mask] only."""
    read, chosen = fmmsrec.mask_items(torch.ones(500, 40, dtype=torch.long), 1, .2)
    assert (read[chosen] == 0).double().mean().item() == pytest.approx(.8, abs=.03)


@pytest.mark.parametrize("training", [True, False])
def test_the_last_place_is_always_mask(training, monkeypatch):
    model = make().train(training)
    transform = model.encoder.transform
    calls = []

    def watched(E, has, real, position=0., last=False):
        if torch.is_tensor(position):    # a sequence, not the item tower
            calls.append((has, real, position))
        return transform(E, has, real, position, last)

    monkeypatch.setattr(model.encoder, "transform", watched)
    batch = make_batch()
    for _ in range(20):
        model(batch)
    model.score(batch, model.encode_items())
    assert len(calls) == 21
    for has, real, position in calls:
        assert has.shape == (3, 6, 2) and not has[:, -1].any()
        assert torch.equal(real[:, :-1], batch["seq"] != 0) and real[:, -1].all()
        assert torch.equal(position[:, 0], model.position[-6:])


@torch.no_grad()
def test_training_loss_is_the_mean_over_all_masked_places(monkeypatch):
    """Inner places chosen by hand: one [mask], one replaced by item 6, one kept; reading 15."""
    model = make().train()
    encoder = model.encoder
    batch = make_batch()
    read = batch["seq"].clone()
    chosen = torch.zeros(3, 5, dtype=torch.bool)
    for row, place, instead in ((0, 2, 0), (1, 1, 6), (2, 3, 2)):
        read[row, place] = instead
        chosen[row, place] = True
    monkeypatch.setattr(fmmsrec, "mask_items", lambda seq, n, p: (read, chosen))
    table = model.encode_items()
    losses = {"next_item": 0., "masked_item": 0.}
    for b, row in enumerate(batch["seq"].tolist()):
        first = row.count(0)
        items = [content(encoder, i) for i in read[b, first:].tolist()]
        items.append([None, None])
        tokens, seen = naive_tokens(encoder, items, model.position[-len(items):])
        answers = [item if chosen[b, first + t] else None for t, item in enumerate(row[first:])]
        answers.append(int(batch["target"][b, -1]))
        for t, answer in enumerate(answers):
            if answer is not None:
                h = naive_pool(encoder, tokens[t], seen[t])
                y = table["item"] @ h / h.norm() / .05
                name = "next_item" if t == len(items) - 1 else "masked_item"
                losses[name] += F.cross_entropy(y[1:], torch.tensor(answer - 1)).item()
    found = model(batch)
    assert values(found) == pytest.approx({name: loss / 6 for name, loss in losses.items()})
    assert list(found) == ["next_item", "masked_item"]


@torch.no_grad()
def test_the_loss_in_testing_is_that_of_the_last_place():
    model = make()
    batch = make_batch()
    scores = model.score(batch, model.encode_items())[:, 1:]
    expected = F.cross_entropy(scores, batch["target"][:, -1] - 1).item()
    assert values(model(batch)) == pytest.approx({"next_item": expected})


def test_every_chosen_place_reaches_the_loss():
    """The room for chosen places is bounded so that no GPU has to count them: none falls out."""
    model = make(mask_ratio=.2)
    for _ in range(30):
        seq = torch.randint(1, N + 1, (40, 10))
        chosen = fmmsrec.mask_items(seq, N, .2)[1]
        places = model.inner_places(chosen)
        assert len(places) < 200 and len(places.unique()) == len(places)
        assert chosen.flatten()[places].sum() == chosen.sum()
    one = torch.ones(1, 1, dtype=torch.bool)    # a batch of one place has room for it
    assert model.inner_places(one).tolist() == [0]


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_positions_are_counted_from_the_end(training, monkeypatch):
    def every_third(seq, n_items, ratio):
        chosen = (seq != 0) & (seq % 3 == 0)
        return seq * ~chosen, chosen

    monkeypatch.setattr(fmmsrec, "mask_items", every_third)
    model = make().train(training)
    batch = make_batch()
    table = model.encode_items()
    scores = model.score(batch, table)
    for k in (1, 5):
        padding = torch.zeros(3, k, dtype=torch.long)
        longer = {name: torch.cat([padding, batch[name]], 1) for name in ("seq", "target")}
        assert values(model(longer)) == pytest.approx(values(model(batch)))
        torch.testing.assert_close(model.score(longer, table), scores)
    model.position[:5] += torch.randn(D)    # of places that no row reaches
    torch.testing.assert_close(model.score(batch, table), scores)
    model.position[-1] += torch.randn(D)    # of the last place
    assert not torch.allclose(model.score(batch, table), scores)


@torch.no_grad()
def test_of_a_long_history_the_newest_items_are_read():
    model = make(max_len=4)
    table = model.encode_items()
    long = torch.randint(1, N + 1, (3, 9))
    batch, newest = ({"seq": seq, "target": seq} for seq in (long, long[:, -4:]))
    torch.testing.assert_close(model.score(batch, table), model.score(newest, table))
    assert values(model(batch)) == pytest.approx(values(model(newest)))


@torch.no_grad()
def test_a_new_model_hears_the_order_of_a_history():
    """Measured by what a changed item does: positions that the features drown would not reach a
    hundredth of it."""
    torch.manual_seed(0)
    everywhere = {f"has_{m}": torch.arange(N + 1) > 0 for m in fmmsrec.MODALITIES}
    catalog = make_catalog(text=24, image=24) | everywhere
    model = fmmsrec.Model(fmmsrec.Config(dim=64, heads=4), catalog).eval()
    table = model.encode_items()
    seq = torch.randint(1, N + 1, (64, 8))
    other = torch.cat([seq[:, :-1], seq[:, -1:] % N + 1], 1)
    h, turned, changed = (
        F.normalize(model.last_state(s, table), dim=-1) for s in (seq, seq.flip(1), other)
    )
    assert (turned - h).norm() > .1 * (changed - h).norm()


@torch.no_grad()
def test_order_matters_and_nothing_is_causal():
    model = make()
    table = model.encode_items()
    a = model.score({"seq": torch.tensor([[1, 2, 4]])}, table)
    b = model.score({"seq": torch.tensor([[2, 1, 4]])}, table)
    assert not torch.allclose(a, b)
    E = torch.randn(1, 3, 2, D)
    has = torch.ones(1, 3, 2, dtype=torch.bool)
    real = torch.ones(1, 3, dtype=torch.bool)
    before = model.encoder.transform(E, has, real)
    E[:, 2] += torch.randn(2, D)
    after = model.encoder.transform(E, has, real)
    assert not torch.allclose(after[:, 0], before[:, 0])    # the first sees the last
    last = model.encoder.transform(E, has, real, last=True)
    torch.testing.assert_close(last[:, 0], after[:, -1])


# ---------------- pre-training

def naive_info_nce(a, b, real, scale):
    """Eq. (4) with a positive sign: half the mean of both directions."""
    rows = [j for j in range(len(a)) if real[j]]
    total = 0.
    for j in rows:
        own = scale * cosine(a[j], b[j])
        to_b = sum(math.exp(scale * cosine(a[j], b[k])) for k in rows)
        to_a = sum(math.exp(scale * cosine(a[k], b[j])) for k in rows)
        total -= own - math.log(to_b) + own - math.log(to_a)
    return total / 2 / max(len(rows), 1)


@pytest.mark.parametrize("real", [
    [True] * 6, [True, False, True, True, False, True], [False] * 5 + [True], [False] * 6,
], ids=["all", "some", "one", "none"])
def test_info_nce_eq_4(real):
    a, b = torch.randn(2, 6, D, requires_grad=True)
    scale = 1 / .07
    loss, logits = fmmsrec.info_nce(a, b, torch.tensor(real), scale)
    assert loss.item() == pytest.approx(naive_info_nce(a, b, real, scale), abs=1e-12)
    assert logits[1, 2].item() == pytest.approx(cosine(a[1], b[2]) * scale)
    slope, = torch.autograd.grad(loss, a)
    assert slope.isfinite().all()
    assert slope.any(1).tolist() == [r and sum(real) > 1 for r in real]
    other_way = fmmsrec.info_nce(b, a, torch.tensor(real), scale)[0]
    assert other_way.item() == pytest.approx(loss.item(), abs=1e-12)


def test_info_nce_falls_when_pairs_are_alike():
    a, b = torch.randn(2, 6, D)
    real = torch.ones(6, dtype=torch.bool)
    loss = [fmmsrec.info_nce(a, b + k * a, real, 1 / .07)[0].item() for k in (0, 1, 3, 100)]
    assert loss == sorted(loss, reverse=True)
    assert 0 <= loss[-1] < .1 < 1 < loss[0]


def test_info_nce_is_precise_under_autocast():
    a, b = torch.randn(2, 6, 64)
    real = torch.ones(6, dtype=torch.bool)
    expected = fmmsrec.info_nce(a, b, real, 100)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fmmsrec.info_nce(a.float(), b.float(), real, 100)[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_hard_negatives_are_drawn_by_similarity():
    logits = torch.tensor([[9., 0., 1., 2.]]).repeat(4, 1).fill_diagonal_(9.)
    real = torch.tensor([True, True, True, False])
    drawn = torch.stack([fmmsrec.hard_negatives(logits, real) for _ in range(4000)])
    assert drawn[:, 2].unique().tolist() == [0, 1] and drawn[:, 0].unique().tolist() == [1, 2]
    share = (drawn[:, 0] == 2).double().mean().item()
    assert share == pytest.approx(math.e / (1 + math.e), abs=.04)    # softmax of 0 and 1
    assert fmmsrec.hard_negatives(logits, real, draw=False).tolist() == [2, 0, 0, 0]
    alone = fmmsrec.hard_negatives(logits, torch.tensor([False, True, False, False]))
    assert alone.min() >= 0 and alone.max() < 4    # nobody to draw: any place, which counts nothing


@torch.no_grad()
def naive_pretrain(model, ids):
    """All terms of eqs. (3b), (3c) without dropout, each pass item by item; the likeliest wrong
    partners."""
    encoder = model.encoder
    scale = math.exp(float(model.logit_scale))
    features = [content(encoder, i) for i in ids]
    text = [naive_item(encoder, [t, None]) for t, _ in features]
    image = [naive_item(encoder, [None, v]) for _, v in features]
    whole = [naive_item(encoder, item) for item in features]
    has_text = [t is not None for t, _ in features]
    has_image = [v is not None for _, v in features]
    both = [t and v for t, v in zip(has_text, has_image)]
    rows = [j for j in range(len(ids)) if both[j]]

    def p(h):
        return 1 / (1 + math.exp(-float(model.match(h))))

    def pair(j, k):
        """The text of j with the picture of k."""
        return naive_item(encoder, [features[j][0], features[k][1]])

    pwm = []
    for j in rows:
        pwm.append(-math.log(p(whole[j])))                                  # eq. (5), y = 1
        others = [k for k in rows if k != j]
        if others:
            wrong_image = max(others, key=lambda k: cosine(text[j], image[k]))
            wrong_text = max(others, key=lambda k: cosine(text[k], image[j]))
            pwm.append(-math.log(1 - p(pair(j, wrong_image))))              # eq. (5), y = 0
            pwm.append(-math.log(1 - p(pair(wrong_text, j))))
    return {
        "pwc": naive_info_nce(text, image, both, scale),
        "pwm": sum(pwm) / max(len(pwm), 1),
        "text": naive_info_nce(text, text, has_text, scale),
        "image": naive_info_nce(image, image, has_image, scale),
        "text+image": naive_info_nce(whole, whole, both, scale),
    }


@pytest.mark.parametrize("drop_missing", [False, True])
@pytest.mark.parametrize("ids", [[1, 2, 3, 4, 5, 6, 7, 8], [9, 3, 5], [3, 5, 8], [6]], ids=str)
def test_pre_training_losses_eqs_3_to_5(ids, drop_missing):
    model = make("Pretrain", drop_missing=drop_missing)
    with torch.no_grad():
        model.match.weight *= 3
    losses = model(some_items(*ids))
    assert values(losses) == pytest.approx(naive_pretrain(model, ids), abs=1e-10)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class Match(torch.nn.Module):
    """In place of the head of eq. (5): the same answer to all true pairs, and to all wrong ones."""

    def __init__(self, true, wrong):
        super().__init__()
        self.answers = true, wrong

    def forward(self, h):    # 5 true pairs, then 10 wrong ones
        assert len(h) == 15
        true, wrong = self.answers
        return torch.tensor([true] * 5 + [wrong] * 10)[:, None]


def test_match_loss_falls_when_true_pairs_score_higher():
    """Eq. (5) has its minus sign."""
    model = make("Pretrain")

    def pwm(true, wrong):
        model.match = Match(true, wrong)
        return model(some_items(1, 2, 4, 6, 7))["pwm"].item()

    assert pwm(0., 0.) == pytest.approx(math.log(2))
    assert pwm(2., 0.) < pwm(0., 0.) < pwm(-2., 0.)
    assert pwm(0., -2.) < pwm(0., 0.) < pwm(0., 2.)
    assert pwm(30., -30.) == pytest.approx(0, abs=1e-9)
    assert pwm(2., 0.) == pytest.approx((math.log1p(math.exp(-2)) + 2 * math.log(2)) / 3)


def test_wrong_pairs_are_wrong(monkeypatch):
    """A wrong picture for each text, a wrong text for each picture, of items that have both."""
    model = make("Pretrain").train()
    encode = model.encoder.encode
    calls = []

    def watched(E, has):
        calls.append((E, has))
        return encode(E, has)

    monkeypatch.setattr(model.encoder, "encode", watched)
    ids = torch.tensor([1, 3, 4, 5, 6, 7])
    whole = [0, 2, 4, 5]    # places of items that have both
    E, _ = model.encoder.embed(ids)

    def place_of(vector, modality):
        return int((E[:, modality] == vector).all(1).nonzero()[0])

    for _ in range(20):
        calls.clear()
        model({"item": ids})
        pairs, has = calls[1]
        assert pairs.shape == (12, 2, D) and has.all()
        for j in whole:
            text, image = place_of(pairs[j, 0], 0), place_of(pairs[j, 1], 1)
            assert text == j and image in whole and image != j
            text, image = place_of(pairs[6 + j, 0], 0), place_of(pairs[6 + j, 1], 1)
            assert image == j and text in whole and text != j


@pytest.mark.parametrize("name", ["pwc", "pwm", "text", "image", "text+image"])
def test_gradients_of_pre_training_by_finite_differences(name):
    """Both sides of a contrast are trained, and true pairs as well as wrong ones."""
    model = make("Pretrain")
    items = some_items(*range(1, 9))

    def loss():
        return model(items)[name]

    check_steepest_slope(loss, model.encoder.blocks[0].outer.weight)


def test_the_two_views_differ_by_dropout_only():
    items = some_items(1, 2, 4, 6, 7, 9)
    plain = make("Pretrain").train()
    noisy = make("Pretrain", dropout=.5).train()
    noisy_input = make("Pretrain", input_dropout=.5).train()
    for name in ("text", "image", "text+image"):
        loss = plain(items)[name].item()
        assert loss == pytest.approx(plain(items)[name].item())
        assert noisy(items)[name].item() > loss + .01
    assert noisy_input(items)["text"].item() > plain(items)["text"].item() + .01


def test_the_learned_temperature_starts_at_007_and_is_capped():
    model = make("Pretrain")
    items = some_items(*range(1, 8))
    assert model.logit_scale.exp().item() == pytest.approx(1 / .07)
    model(items)["pwc"].backward()
    assert model.logit_scale.grad != 0
    with torch.no_grad():
        model.logit_scale.fill_(9)
    losses = model(items)
    assert model.logit_scale.exp().item() == pytest.approx(100)
    assert values(losses) == pytest.approx(naive_pretrain(model, range(1, 8)))


def test_pre_training_brings_modalities_together():
    model = make("Pretrain", dim=16)
    items = some_items(1, 2, 4, 6, 7, 9, 10, 11)
    before = values(model(items))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(model.train()(items).values()).backward()
        optimizer.step()
    after = values(model.eval()(items))
    assert after["pwc"] < .5 * before["pwc"] and after["pwm"] < before["pwm"]


# ---------------- from stage to stage

@pytest.mark.parametrize("changes", [{}, dict(use_image=False), dict(use_text=False)], ids=str)
def test_a_pre_trained_state_is_taken_over_whole(changes):
    state = make("Pretrain", **changes).state_dict()
    model = make(**changes)
    assert set(model.state_dict()) - set(state) == {"position"}
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.zero_()
    position = model.position.clone()
    model.init_from(state)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, position if name == "position" else state[name]), name
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("gone, more", [
    ("encoder.mask", {}),
    ("match.bias", {}),
    ("logit_scale", {}),
    (None, {"more": torch.zeros(1)}),
    (None, {"encoder.more": torch.zeros(1)}),
    (None, {"position": torch.zeros(11, D)}),
    (None, {"encoder.modality": torch.zeros(3, D)}),
    (None, {"match.weight": torch.zeros(2, D)}),
], ids=lambda x: next(iter(x), "") if isinstance(x, dict) else str(x))
def test_any_other_state_is_refused_whole(gone, more):
    state = {name: weight + 1 for name, weight in make("Pretrain").state_dict().items()} | more
    state.pop(gone, None)
    model = make()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="pre-trained state"):
        model.init_from(state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_state_of_other_modalities_is_refused():
    with pytest.raises(ValueError, match="pre-trained state"):
        make().init_from(make("Pretrain", use_image=False).state_dict())
    with pytest.raises(ValueError, match="pre-trained state"):
        make(use_image=False).init_from(make("Pretrain").state_dict())


def test_pre_training_rows_are_items():
    assert fmmsrec.Pretrain.rows == "items"


# ---------------- ablations, settings

@torch.no_grad()
@pytest.mark.parametrize("gone, kept", [("image", "text"), ("text", "image")])
def test_without_v_and_without_s(gone, kept):
    without = {f"use_{gone}": False}
    model, full = make(**without), make()
    names = {name for name, _ in model.named_parameters()}
    theirs = {name.replace(f".{kept}.", f".{gone}.") for name in names}
    assert names | theirs == {name for name, _ in full.named_parameters()}
    catalog = make_catalog()
    catalog[gone] = 5 * catalog[gone]
    catalog[f"has_{gone}"] = ~catalog[f"has_{gone}"]
    other = make(catalog=catalog, **without)    # what is gone is not read
    torch.testing.assert_close(other.encode_items(), model.encode_items(), rtol=0, atol=0)
    changed = make(catalog=catalog).encode_items()["item"]
    assert not torch.allclose(changed, full.encode_items()["item"])
    items = some_items(*range(1, 9))
    assert list(make("Pretrain", **without)(items)) == [kept]
    assert list(make("Pretrain")(items)) == ["pwc", "pwm", "text", "image", "text+image"]


def test_a_third_modality_is_one_more_name(monkeypatch):
    monkeypatch.setattr(fmmsrec, "MODALITIES", ("text", "image", "sound"))
    sound = {"sound": torch.randn(N + 1, 3), "has_sound": torch.arange(N + 1) % 4 > 0}
    catalog = make_catalog() | sound
    model = make(catalog=catalog)
    table = model.encode_items()
    for i in (1, 4, 5):
        h = naive_item(model.encoder, content(model.encoder, i))
        torch.testing.assert_close(table["item"][i], h / h.norm())
    pretrain = make("Pretrain", catalog=catalog)
    losses = pretrain(some_items(*range(1, N + 1)))
    assert list(losses) == [
        "pwc", "pwm", "text", "image", "sound", "text+image", "text+sound", "image+sound",
        "text+image+sound",
    ]
    E, has = pretrain.encoder.embed(torch.arange(1, N + 1))
    alone = [pretrain.encoder.encode(E, has & (torch.arange(3) == m)) for m in range(3)]
    pwc = 0.
    for a, b in itertools.combinations(range(3), 2):
        pwc += fmmsrec.info_nce(alone[a], alone[b], has[:, a] & has[:, b], 1 / .07)[0]
    torch.testing.assert_close(losses["pwc"], pwc)
    sum(losses.values()).backward()
    sum(model.train()(make_batch()).values()).backward()
    for weight in (*model.parameters(), *pretrain.parameters()):
        assert weight.grad.isfinite().all()
    model.init_from(pretrain.state_dict())


def test_both_stages_have_the_papers_one_rate():
    assert fmmsrec.Config().pretrain_lr == fmmsrec.Config().lr == 1e-3


@pytest.mark.parametrize("setting, value", [
    ("tau", 0.), ("mask_ratio", 1.), ("mask_ratio", -.1), ("input_dropout", 1.),
])
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} {value}"):
        make(**{setting: value})


def test_no_modality_at_all_is_refused():
    with pytest.raises(ValueError, match="use_text or use_image"):
        make(use_text=False, use_image=False)


def test_bfloat16_autocast_stays_near_float32():
    torch.set_default_dtype(torch.float32)
    items = some_items(*range(1, N + 1))
    for model, batch in (
        (make(), make_batch()), (make(drop_missing=True), make_batch()), (make("Pretrain"), items),
    ):
        exact = values(model(batch))
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(batch)
        assert values(losses) == pytest.approx(exact, rel=.15, abs=.1)
        sum(losses.values()).backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        assert slopes and all(s.dtype == torch.float32 and s.isfinite().all() for s in slopes)
    with torch.autocast("cpu", torch.bfloat16):
        table = make().encode_items()
    assert all(leaf.dtype == torch.float32 for leaf in table.values())


def test_features_of_any_size_are_standardised():
    """Vectors of norm 1 have deviations of .03 or so."""
    x = .03 * torch.randn(2001, 4) + 5
    has = torch.arange(2001) % 5 != 0
    found = fmmsrec.standardised(x, has)
    assert not found[~has].any()
    torch.testing.assert_close(found[has].mean(0), torch.zeros(4), atol=1e-9, rtol=0)
    torch.testing.assert_close(found[has].square().mean(0), torch.ones(4), atol=1e-9, rtol=0)
    constant = fmmsrec.standardised(torch.full((2001, 1), .1), has)
    assert constant.abs().max() < .01


def test_every_place_may_be_masked_and_every_item_may_replace():
    torch.manual_seed(0)
    read, chosen = fmmsrec.mask_items(torch.ones(3000, 4, dtype=torch.long), 5, .9)
    assert (chosen.double().mean(0) - .9).abs().max() < .03    # the first and the last as well
    assert read.unique().tolist() == [0, 1, 2, 3, 4, 5]
    counts = read[read > 1].bincount()[2:]
    assert counts.min() > .7 * counts.max()
