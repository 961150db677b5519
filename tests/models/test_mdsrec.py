"""MDSRec's parts against naive loops in float64, written from the paper's equations."""
import math
import random

import pytest
import torch
import torch.nn.functional as F

from loop.settings import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
mdsrec = load_model_file("mdsrec")
N = 12


def make_seqs(count=25):
    """Short random sequences; the last two items never occur."""
    rng = random.Random(1)
    lengths = [rng.randint(1, 9) for _ in range(count)]
    return [[rng.randint(1, N - 2) for _ in range(length)] for length in lengths]


def make_features(width):
    features = torch.randn(N + 1, width, generator=torch.Generator().manual_seed(width))
    features[0] = 0
    return features


def make(**settings):
    small = dict(dim=8, heads=2, centers=3, neighbors=4, max_len=10, dropout=0.)
    text, image = make_features(5), make_features(7)
    image[3] = 0
    catalog = {"n_items": N, "text": text, "image": image, "train_seqs": make_seqs()}
    return mdsrec.Model(mdsrec.Config(**small | settings), catalog)


def co_occurrence(max_len, **settings):
    """O as a dense matrix."""
    return mdsrec.co_occurrence(make_seqs(), N, max_len, **settings)[0].to_dense()


# ---------------- graphs and clusters

@pytest.mark.parametrize("use_dis", [True, False])
def test_co_occurrence_eqs_1_2(use_dis):
    max_len = 6
    O = torch.zeros(N + 1, N + 1)
    for seq in make_seqs():
        for p, i in enumerate(seq):
            for q, j in enumerate(seq):
                if i != j and abs(p - q) < max_len:
                    O[i, j] += 1 / abs(p - q) if use_dis else 1
    O = O / O.sum(1, keepdim=True).clamp(min=1e-9)
    found, transposed = mdsrec.co_occurrence(make_seqs(), N, max_len, use_dis)
    torch.testing.assert_close(found.to_dense(), O)
    torch.testing.assert_close(transposed.to_dense(), O.T)
    assert not O[0].any() and not O.diagonal().any()


def test_no_sequences_give_no_co_occurrence():
    for seqs in ([], [[], [3]]):
        O, O_T = mdsrec.co_occurrence(seqs, N, 5)
        assert O.to_dense().sum() == O_T.to_dense().sum() == 0


def test_nearest_eqs_4_5():
    features = torch.randn(N + 1, 5)
    features[0] = features[4] = 0
    found = mdsrec.nearest(features, 3)
    others = [j for j in range(1, N + 1) if j != 4]
    for i in others:
        cosine = {j: F.cosine_similarity(features[i], features[j], dim=0).item() for j in others}
        assert found[i].tolist() == sorted(others, key=cosine.get, reverse=True)[:3]
        assert found[i, 0] == i
    assert found[4].tolist() == [4, 4, 4]    # without a feature it is alone
    everybody = mdsrec.nearest(features, 50)
    assert everybody.shape == (N + 1, N)
    assert not (everybody[others] == 4).any()    # nor is it anybody's neighbour


def test_equal_items_are_their_own_first_neighbours():
    features = torch.cat([torch.zeros(1, 4), torch.ones(9, 4)])
    assert mdsrec.nearest(features, 3)[1:, 0].tolist() == list(range(1, 10))


def test_centres_are_means_of_members_eqs_10_11():
    features = torch.randn(40, 6)
    features[0] = features[7] = 0
    C = mdsrec.k_means(features, 5)
    member = [i for i in range(40) if i not in (0, 7)]
    assert not C[:, [0, 7]].any()
    assert (C[:, member].count_nonzero(0) == 1).all()
    torch.testing.assert_close(C.sum(1), torch.ones(5))    # a mean: its weights sum to 1
    centers = C @ features
    for i in member:    # k-means has converged: nobody is nearer to another centre
        assert C[:, i].argmax() == (centers - features[i]).norm(dim=1).argmin()
    assert mdsrec.k_means(features, 5).equal(C)


def test_clusters_of_nothing_and_of_equal_items():
    assert not mdsrec.k_means(torch.zeros(9, 4), 3).any()
    assert (mdsrec.k_means(torch.ones(9, 4), 3).sum(1) > 0).sum() == 1


@pytest.mark.parametrize("max_len", [3, 10])
def test_graphs_and_clusters_of_each_modality_eqs_3_4_5_10(max_len):
    model = make(max_len=max_len, mu_modal=.7)
    O = co_occurrence(max_len)
    image = 3 * make_features(7)    # of any length: reading 2
    image[3] = 0
    for m, features in (("text", make_features(5)), ("image", image)):
        E = F.normalize(features, dim=-1)
        mixed = E + .7 * O @ E                                                      # eq. (3)
        for i in range(1, N + 1):
            if not mixed[i].any():
                continue
            others = [j for j in range(1, N + 1) if mixed[j].any()]
            alike = {j: F.cosine_similarity(mixed[i], mixed[j], dim=0).item() for j in others}
            expected = sorted(others, key=alike.get, reverse=True)[:4]              # eqs. (4), (5)
            assert model.graphs[m][i].tolist() == expected
        assert torch.equal(model.clusters[m], mdsrec.k_means(E, 3))                 # eq. (10)
    assert torch.equal(model.O.to_dense(), O)


def test_gumbel_noise_and_its_temperature_in_training():
    """Between two centres that are alike, gamma is sharp at a small tau and even at a large one."""
    e = torch.zeros(4000, 1, 8)
    centers = torch.zeros(4000, 1, 2, 8)
    centers[:, :, 0, 0] = 1
    for tau, extreme in ((.01, .95), (100., 0.)):
        model = make(tau=tau).train()
        gamma = model.interest(e, centers)[..., 0]
        assert ((gamma < .01) | (gamma > .99)).double().mean() == pytest.approx(extreme, abs=.05)
        assert gamma.mean() == pytest.approx(.5, abs=.05)


# ---------------- item tables

def test_item_tables_eqs_3_6():
    model = make()
    table = model.encode_items()
    E = model.item.weight
    O = co_occurrence(max_len=10)
    for i in range(N + 1):
        mixed = E[i] + 16.0 * sum(O[i, j] * E[j] for j in range(N + 1))
        torch.testing.assert_close(table["id"][i], mixed)
        neighbours = model.graphs["text"][i]
        torch.testing.assert_close(table["text"][i], sum(E[j] for j in neighbours) / 4)
    assert not table["image"][0].any()


def test_co_occurrence_is_mixed_in_float32_and_with_its_gradient():
    torch.set_default_dtype(torch.float32)
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.encode_items()["id"]
    assert mixed.dtype == torch.float32
    slope = torch.randn(N + 1, 8)
    found, = torch.autograd.grad(mixed, model.item.weight, slope)
    torch.testing.assert_close(found, slope + 16 * co_occurrence(max_len=10).T @ slope)


# ---------------- sequences and centres

@torch.no_grad()
def naive_block(block, queries, keys, look):
    """Attention of each query over keys[j] with look(q, j), feed-forward, residuals: loops."""
    d = queries.shape[1] // block.heads
    Q, K, V = block.query(queries), block.key(keys), block.value(keys)
    rows = []
    for q in range(len(queries)):
        seen = [j for j in range(len(keys)) if look(q, j)]
        heads = []
        for h in range(block.heads):
            part = slice(h * d, (h + 1) * d)
            weight = {j: math.exp(Q[q, part] @ K[j, part] / math.sqrt(d)) for j in seen}
            total = sum(weight.values())
            heads.append(sum(weight[j] / total * V[j, part] for j in seen))    # eqs. (12), (13)
        g = block.norm1(queries[q] + block.out(torch.cat(heads)))              # eq. (14)
        rows.append(block.norm2(g + block.outer(F.gelu(block.inner(g)))))      # eq. (15)
    return torch.stack(rows)


@torch.no_grad()
def test_sequence_and_centres_eqs_7_to_16():
    model = make().eval()
    items = model.encode_items()["text"]
    seq = torch.tensor([[0, 0, 5, 2, 9], [1, 2, 3, 4, 5]])
    centers = model.clusters["text"] @ items
    last, own = model.encode("text", seq, items, centers)
    for b, row in enumerate(seq):
        row = row[row > 0]
        x = model.norm(items[row] + model.position[-len(row):])                # eqs. (7), (9)
        e = model.norm(centers)                                                # reading 8
        for block in model.encoders["text"]:
            e = naive_block(block, e, x, lambda q, j: True)
            x = naive_block(block, x, x, lambda q, j: j <= q)
            # the centres of the next layer read the sequence of the next layer
        torch.testing.assert_close(last[b, 0], x[-1])
        torch.testing.assert_close(own[b, 0], e)


@torch.no_grad()
def test_without_prefixes_every_place_has_centres_of_what_stands_before_it():
    model = make(prefixes=False, layers=2)    # in training, without dropout
    items = model.encode_items()["image"]
    seq = torch.tensor([[0, 0, 5, 2, 9], [1, 2, 3, 4, 5]])
    centers = model.clusters["image"] @ items
    states, own = model.encode("image", seq, items, centers, P=5)
    assert states.shape == (2, 5, 8) and own.shape == (2, 5, 3, 8)
    for b, row in enumerate(seq):
        row = row[row > 0]
        for t in range(len(row)):
            x = model.norm(items[row] + model.position[-len(row):])
            e = model.norm(centers)
            for block in model.encoders["image"]:
                e = naive_block(block, e, x[:t + 1], lambda q, j: True)
                x = naive_block(block, x, x, lambda q, j: j <= q)
            torch.testing.assert_close(states[b, t - len(row)], x[t])
            torch.testing.assert_close(own[b, t - len(row)], e)


@pytest.mark.parametrize("prefixes", [True, False])
def test_every_target_is_learned_without_prefixes_and_the_last_with_them(prefixes):
    model = make(prefixes=prefixes)
    seq = torch.tensor([[0, 4, 5, 2, 9], [1, 2, 3, 4, 5]])
    target = torch.tensor([[0, 5, 2, 9, 7], [2, 3, 4, 5, 6]])

    def losses(target):
        torch.manual_seed(0)
        return torch.stack(list(model({"seq": seq, "target": target}).values()))

    for b, t in [(1, 0), (0, 1), (1, 3), (0, 4)]:
        other = target.clone()
        other[b, t] = 10
        assert torch.equal(losses(other), losses(target)) == (prefixes and t < 4)


@torch.no_grad()
def test_a_users_centres_differ():
    """Reading 8: without the LayerNorm all pairs of them have a cosine of .999."""
    torch.set_default_dtype(torch.float32)
    model = make(dim=64, heads=4).eval()
    items = model.encode_items()["text"]
    _, E_c = model.encode("text", torch.tensor([[1, 2, 3]]), items, model.clusters["text"] @ items)
    unit = F.normalize(E_c[0, 0], dim=-1)
    pairs = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    assert pairs.mean() < .8


@torch.no_grad()
def test_scores_and_losses_eqs_17_to_24():
    rho = {"text": .7, "image": .3}
    model = make(rho_image=.3, tau=.2).eval()
    table = model.encode_items()
    seq = torch.tensor([[0, 4, 5, 2, 9]])
    e_s = model.encode("id", seq, table["id"])[0][0, 0]
    own = {}
    for m in rho:
        e, centers = model.encode(m, seq, table[m], model.clusters[m] @ table[m])
        e, centers = e[0], centers[0]
        e_s = e_s + rho[m] * e[0]                                                       # eq. (17)
        weight = [math.exp(e[0] @ c / .2) for c in centers[0]]                          # eq. (19)
        own[m] = e[0] + sum(w / sum(weight) * c for w, c in zip(weight, centers[0]))    # eq. (18)
    scores = {"item": table["item"] @ e_s}                                              # eq. (20)
    for m in rho:
        scores[m] = table[m] @ own[m]                                                   # eq. (21)
    total = scores["item"] + .7 * scores["text"] + .3 * scores["image"]                 # eq. (22)
    torch.testing.assert_close(model.score({"seq": seq}, table)[0], total)
    losses = model({"seq": seq, "target": torch.tensor([[0, 5, 2, 9, 7]])})
    parts = {"next_item": ("item", 1), "text": ("text", .7), "image": ("image", .3)}
    for name, (part, factor) in parts.items():                                  # eqs. (23), (24)
        p = scores[part].exp()[7] / scores[part].exp()[1:].sum()
        torch.testing.assert_close(losses[name], -factor * p.log())


def test_noise_in_training_only():
    model = make()
    batch = {"seq": torch.tensor([[1, 2, 3]])}
    table = model.encode_items()
    assert not torch.equal(model.train().score(batch, table), model.score(batch, table))
    assert torch.equal(model.eval().score(batch, table), model.score(batch, table))


# ---------------- ablations

@torch.no_grad()
@pytest.mark.parametrize("setting", [
    dict(use_dis=False), dict(use_cre=False), dict(use_ica=False), dict(use_mrgc=False),
    dict(neighbors=1), dict(mu_id=0.),
], ids=str)
def test_ablations_change_the_scores(setting):
    def scores(**settings):
        torch.manual_seed(1)
        model = make(**settings).eval()
        return model.score({"seq": torch.tensor([[1, 2, 3]])}, model.encode_items())

    assert torch.equal(scores(), scores())
    assert not torch.allclose(scores(), scores(**setting))


def test_without_neighbours_every_modality_is_the_ids():
    model = make(neighbors=0)
    assert torch.equal(model.encode_items()["text"], model.item.weight)


def test_without_cre_the_graphs_lose_co_occurrence_and_the_ids_keep_it():
    model = make(use_cre=False)
    expected = mdsrec.nearest(F.normalize(make_features(5), dim=-1), 4)
    assert torch.equal(model.graphs["text"], expected)
    assert not torch.equal(model.encode_items()["id"], model.item.weight)


@pytest.mark.parametrize("setting, value", [
    ("neighbors", -1), ("rho_image", 3.), ("centers", 0), ("inner", 0),
])
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} {value}"):
        make(**{setting: value})
