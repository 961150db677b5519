"""MDSRec's parts against naive loops in float64, written from the paper's equations."""
import math
import random

import pytest
import torch
import torch.nn.functional as F

from train import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
mdsrec = load_model_file("mdsrec")
N = 12


def seqs(count=25):
    rng = random.Random(1)
    return [[rng.randint(1, N - 2) for _ in range(rng.randint(1, 9))] for _ in range(count)]   # N-1 and N never occur


def make_text():
    text = torch.randn(N + 1, 5, generator=torch.Generator().manual_seed(5))
    text[0] = 0
    return text


def make(**settings):
    text, image = make_text(), torch.randn(N + 1, 7, generator=torch.Generator().manual_seed(7))
    image[0] = image[3] = 0
    cfg = mdsrec.Config(**dict(dim=8, heads=2, centers=3, neighbors=4, max_len=10, dropout=0.) | settings)
    return mdsrec.Model(cfg, {"n_items": N, "text": text, "image": image, "train_seqs": seqs()})


@pytest.mark.parametrize("use_dis", [True, False])
def test_co_occurrence_eqs_1_2(use_dis):
    max_len, O = 6, [[0.] * (N + 1) for _ in range(N + 1)]
    for seq in seqs():
        seq = seq[-max_len:]
        for p, i in enumerate(seq):
            for q, j in enumerate(seq):
                if i != j:
                    O[i][j] += 1 / abs(p - q) if use_dis else 1
    O = [[x / sum(row) if sum(row) else 0 for x in row] for row in O]
    found, transposed = (m.to_dense() for m in mdsrec.co_occurrence(seqs(), N, max_len, use_dis))
    torch.testing.assert_close(found, torch.tensor(O))
    torch.testing.assert_close(found.T, transposed)
    assert not found.diagonal().any() and not found[0].any() and not found[:, 0].any()


def test_no_sequences_give_no_co_occurrence():
    assert mdsrec.co_occurrence([[], [3]], N, 5)[0].to_dense().sum() == mdsrec.co_occurrence([], N, 5)[0].to_dense().sum() == 0


def test_nearest_eqs_4_5():
    features = torch.randn(N + 1, 5)
    features[0] = features[4] = 0
    found = mdsrec.nearest(features, 3)
    for i in range(1, N + 1):
        if i == 4:
            assert found[i].tolist() == [4, 4, 4]                # without a feature it is alone
            continue
        cosine = lambda j: float(features[i] @ features[j] / (features[i].norm() * features[j].norm()))
        expected = sorted((j for j in range(1, N + 1) if j != 4), key=lambda j: -cosine(j))[:3]
        assert found[i].tolist() == expected and expected[0] == i
    assert mdsrec.nearest(features, 50).shape == (N + 1, N)


def test_equal_items_are_their_own_first_neighbours():
    features = torch.cat([torch.zeros(1, 4), torch.ones(9, 4)])
    assert mdsrec.nearest(features, 3)[1:, 0].tolist() == list(range(1, 10))


def test_co_occurrence_is_mixed_in_float32_and_with_its_gradient():
    torch.set_default_dtype(torch.float32)
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.encode_items()["id"]
        losses = model({"seq": torch.tensor([[1, 2]]), "target": torch.tensor([[2, 3]])})
    assert mixed.dtype == torch.float32 and all(v.dtype == torch.float32 for v in losses.values())
    O, E = mdsrec.co_occurrence(seqs(), N, 10)[0].to_dense(), model.item.weight
    slope = torch.randn(N + 1, 8)
    found, = torch.autograd.grad(mixed, E, slope)
    torch.testing.assert_close(found, slope + 16 * O.T @ slope)


def test_item_tables_eqs_3_6():
    model = make()
    table, E = model.encode_items(), model.item.weight
    O = mdsrec.co_occurrence(seqs(), N, 10)[0].to_dense()
    for i in range(N + 1):
        mixed = E[i] + 16.0 * sum(O[i, j] * E[j] for j in range(N + 1))
        torch.testing.assert_close(table["id"][i], mixed)
        torch.testing.assert_close(table["text"][i], sum(E[j] for j in model.A_text[i]) / 4)
    assert not table["image"][0].any()


def test_centres_are_means_of_members_eqs_10_11():
    features = torch.randn(40, 6)
    features[0] = features[7] = 0
    C = mdsrec.k_means(features, 5)
    assert not C[:, 0].any() and not C[:, 7].any()
    member = [i for i in range(40) if i not in (0, 7)]
    assert (C[:, member].count_nonzero(0) == 1).all()
    torch.testing.assert_close(C.sum(1), torch.ones(5))          # a mean: the weights of a cluster sum to 1
    centers = C @ features
    for i in member:                                             # k-means has converged: nobody is nearer to another
        assert C[:, i].argmax() == (centers - features[i]).norm(dim=1).argmin()
    assert mdsrec.k_means(features, 5).equal(C)
    assert not mdsrec.k_means(torch.zeros(9, 4), 3).any()
    assert (mdsrec.k_means(torch.ones(9, 4), 3).sum(1) > 0).sum() == 1


@torch.no_grad()
def naive_block(block, queries, keys, look):
    """Multi-head attention of each query over keys[j] with look(q, j), feed-forward, residuals: Python loops over (., D)."""
    d = queries.shape[1] // block.heads
    Q, K, V = block.query(queries), block.key(keys), block.value(keys)
    rows = []
    for q in range(len(queries)):
        heads = []
        for h in range(block.heads):
            part = slice(h * d, (h + 1) * d)
            weight = [math.exp(float(Q[q, part] @ K[j, part]) / math.sqrt(d)) if look(q, j) else 0. for j in range(len(keys))]
            heads.append(sum(w / sum(weight) * V[j, part] for j, w in enumerate(weight)))     # eqs. (12), (13)
        g = block.norm1(queries[q] + block.out(torch.cat(heads)))                             # eq. (14)
        rows.append(block.norm2(g + block.outer(F.gelu(block.inner(g)))))                     # eq. (15)
    return torch.stack(rows)


@torch.no_grad()
def test_sequence_and_centres_eqs_7_to_16():
    model = make().eval()
    table, seq = model.encode_items(), torch.tensor([[0, 0, 5, 2, 9], [1, 2, 3, 4, 5]])
    centers = model.C_text @ table["text"]
    last, c = model.encode("text", seq, table["text"], centers)
    for b, row in enumerate(seq.tolist()):
        pad = row.count(0)
        items = [i for i in row if i]
        x = torch.stack([model.norm(table["text"][i] + model.position[len(model.position) - 5 + pad + p])
                         for p, i in enumerate(items)])                                       # eq. (9)
        e = centers
        for block in model.encoders["text"]:
            x, e = naive_block(block, x, x, lambda q, j: j <= q), naive_block(block, e, x, lambda q, j: True)
        torch.testing.assert_close(last[b], x[-1])
        torch.testing.assert_close(c[b], e)


@torch.no_grad()
def test_scores_and_losses_eqs_17_to_24():
    model = make(rho_image=.3).eval()
    table, seq = model.encode_items(), torch.tensor([[0, 4, 5, 2, 9]])
    streams = {m: model.encode(m, seq, table[m], getattr(model, f"C_{m}") @ table[m]) for m in ("image", "text")}
    rho, own = {"image": .3, "text": .7}, {}
    e_s = model.encode("id", seq, table["id"])[0][0]
    for m, (e, c) in streams.items():
        e, c = e[0], c[0]
        e_s = e_s + rho[m] * e                                                                # eq. (17)
        weight = [math.exp(float(e @ row) / .2) for row in c]
        own[m] = e + sum(w / sum(weight) * row for w, row in zip(weight, c))                  # eqs. (18), (19), no noise
    parts = {"item": [float(e_s @ row) for row in table["item"]]}                             # eq. (20)
    parts |= {m: [float(own[m] @ row) for row in table[m]] for m in own}                      # eq. (21)
    scores = [parts["item"][j] + sum(rho[m] * parts[m][j] for m in own) for j in range(N + 1)]   # eq. (22)
    torch.testing.assert_close(model.score({"seq": seq}, table)[0], torch.tensor(scores))
    losses = model({"seq": seq, "target": torch.tensor([[0, 5, 2, 9, 7]])})
    for name, key, factor in (("next_item", "item", 1), ("image", "image", .3), ("text", "text", .7)):
        p = math.exp(parts[key][7]) / sum(math.exp(s) for s in parts[key][1:])
        assert losses[name].item() == pytest.approx(-factor * math.log(p))                    # eqs. (23), (24)


def test_noise_in_training_only():
    model = make()
    batch = {"seq": torch.tensor([[1, 2, 3]])}
    table = model.encode_items()
    assert not torch.equal(model.train().score(batch, table), model.score(batch, table))
    assert torch.equal(model.eval().score(batch, table), model.score(batch, table))


def test_ablations_change_what_they_name():
    def scores(**settings):
        torch.manual_seed(1)
        model = make(**settings).eval()
        return model.score({"seq": torch.tensor([[1, 2, 3]])}, model.encode_items())

    full = scores()
    assert torch.equal(full, scores())
    for settings in (dict(use_dis=False), dict(use_cre=False), dict(use_ica=False), dict(use_mrgc=False),
                     dict(neighbors=1), dict(mu_id=0.)):
        assert not torch.allclose(full, scores(**settings)), settings
    model = make(neighbors=0)
    assert torch.equal(model.encode_items()["text"], model.item.weight)
    model = make(use_cre=False)                                  # the graph loses co-occurrence, the ids keep it
    assert torch.equal(model.A_text, mdsrec.nearest(mdsrec.F.normalize(make_text(), dim=-1), 4))
    assert not torch.equal(model.encode_items()["id"], model.item.weight)


@pytest.mark.parametrize("settings", [dict(neighbors=-1), dict(rho_image=3.), dict(heads=3), dict(centers=0)])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError):
        make(**settings)


@pytest.mark.parametrize("file", ["mdsrec", "sasrec"])
def test_softmax_loss_and_its_gradient(file):
    loss = load_model_file(file).SoftmaxLoss.apply
    for n_rows, n_items in ((150, 40_000), (7, 11)):             # three chunks of rows, and one
        states, items = torch.randn(n_rows, 4, requires_grad=True), torch.randn(n_items, 4, requires_grad=True)
        target = torch.randint(1, n_items, (n_rows,))
        plain = lambda s, e: F.cross_entropy((s @ e.T)[:, 1:], target - 1)
        torch.testing.assert_close(loss(states, items, target), plain(states, items))
        for a, b in zip(torch.autograd.grad(3 * loss(states, items, target), (states, items)),
                        torch.autograd.grad(3 * plain(states, items), (states, items))):
            torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda s, e: loss(s, e, target), (states, items))


def test_sasrec_rows_without_a_target_count_nothing():
    loss = load_model_file("sasrec").SoftmaxLoss.apply
    states, items, target = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.tensor([0, 3, 0, 8, 1, 0])
    value = loss(states, items, target)
    torch.testing.assert_close(value, F.cross_entropy((states @ items.T)[target != 0, 1:], target[target != 0] - 1))
    assert not torch.autograd.grad(value, states)[0][target == 0].any()
