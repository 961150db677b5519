"""MDSRec's parts against naive loops in float64, written from the paper's equations."""
import math
import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    model = mdsrec.Model(mdsrec.Config(**small | settings), catalog)
    model.prepare(torch.device("cpu"))
    return model


def co_occurrence(max_len, **settings):
    """O as a dense matrix."""
    return mdsrec.co_occurrence(make_seqs(), N, max_len, **settings)[0].to_dense()


# ---------------- settings

def test_settings_that_the_paper_states():
    cfg = mdsrec.Config()
    stated = dict(dim=300, batch_size=512, optimizer="adam", patience=10, neighbors=10, centers=32)
    stated |= dict(mu_id=16, mu_modal=.2)
    stated |= dict(use_dis=True, use_cre=True, use_mrgc=True, use_ica=True, rho_image=.5)
    assert {name: getattr(cfg, name) for name in stated} == stated
    best = {"scientific": (5, 16), "pantry": (10, 16), "baby": (10, 32), "sports": (20, 32),
            "clothing": (15, 64)}
    for name, (neighbors, centers) in best.items():
        assert mdsrec.PRESETS[name] == dict(neighbors=neighbors, centers=centers)


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


@pytest.mark.parametrize("partners", [0, 2])
def test_co_occurrence_is_the_same_in_rows_of_any_number(partners):
    whole = mdsrec.co_occurrence(make_seqs(), N, 6, partners=partners)
    for tile in (1, 7, 20, 1000):
        parts = mdsrec.co_occurrence(make_seqs(), N, 6, partners=partners, tile=tile)
        for found, expected in zip(parts, whole):
            assert torch.equal(found.indices(), expected.indices())
            assert torch.equal(found.values(), expected.values())
            assert found.is_coalesced()


def test_no_more_pairs_are_held_than_those_of_a_tile(monkeypatch):
    held = []
    unique = torch.unique

    def watched(x, **more):
        held.append(len(x))
        return unique(x, **more)

    monkeypatch.setattr(torch, "unique", watched)
    seqs = [list(range(1, N + 1)) for _ in range(40)]
    mdsrec.co_occurrence(seqs, N, 6)
    pairs = held.pop()
    mdsrec.co_occurrence(seqs, N, 6, tile=40)    # an item at a time
    assert sum(held) == pairs and max(held) <= 40 * 2 * 5


def test_the_strongest_partners_of_each_item_are_kept():
    every = torch.zeros(N + 1, N + 1)
    for seq in make_seqs():
        for p, i in enumerate(seq):
            for q, j in enumerate(seq):
                if i != j and abs(p - q) < 6:
                    every[i, j] += 1 / abs(p - q)
    kept = torch.zeros_like(every)
    for i in range(1, N + 1):
        best = sorted(range(1, N + 1), key=lambda j: (-every[i, j].item(), j))[:2]
        kept[i, best] = kept[best, i] = 1
    expected = every * kept
    expected = expected / expected.sum(1, keepdim=True).clamp(min=1e-9)
    found, transposed = mdsrec.co_occurrence(make_seqs(), N, 6, partners=2)
    torch.testing.assert_close(found.to_dense(), expected)
    torch.testing.assert_close(transposed.to_dense(), expected.T)
    assert 0 < found._nnz() < mdsrec.co_occurrence(make_seqs(), N, 6)[0]._nnz()


def test_the_model_keeps_the_partners_that_it_is_told():
    expected, _ = mdsrec.co_occurrence(make_seqs(), N, 10, partners=2)
    assert torch.equal(make(partners=2).O.to_dense(), expected.to_dense())


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


def test_neighbours_do_not_depend_on_the_tile():
    """With items that are alike and items without a feature; of equals the smaller id is first."""
    torch.set_default_dtype(torch.float32)
    random = torch.Generator().manual_seed(0)
    features = torch.randn(300, 24, generator=random)
    features[200:260] = features[100]    # many equal ones
    features[260:280] = 3 * features[50]
    features[[0, 17, 299]] = 0
    whole = mdsrec.nearest(features, 7, tile=1000)
    for tile in (20, 64, 299):
        assert torch.equal(mdsrec.nearest(features, 7, tile), whole)
    assert whole[100].tolist() == [100, 200, 201, 202, 203, 204, 205]
    assert whole[230].tolist() == [230, 100, 200, 201, 202, 203, 204]
    assert whole[17].tolist() == [17] * 7
    many = mdsrec.nearest(features, 299, tile=50)    # more than a tile has
    assert torch.equal(many, mdsrec.nearest(features, 299, tile=1000))
    assert len(set(many[5].tolist())) == 297


def test_what_float32_cannot_tell_apart_float64_does():
    random = torch.Generator().manual_seed(0)
    features = torch.ones(8) + 4e-4 * torch.randn(400, 8, generator=random)
    features[0] = 0
    cosine = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    assert 1 - cosine[1:, 1:].min() < 1e-6
    cosine[:, 0] = -torch.inf
    expected = cosine.topk(6).values[1:]
    found = cosine[1:].gather(1, mdsrec.nearest(features, 6, tile=10)[1:])
    torch.testing.assert_close(found, expected, rtol=0, atol=2 ** -28)


def test_neighbours_are_not_found_in_bfloat16():
    torch.set_default_dtype(torch.float32)
    alike = torch.ones(2501, 6) + .02 * torch.randn(2501, 6)    # more than two tiles
    alike[0] = 0
    catalog = {"n_items": 2500, "text": alike, "image": alike, "train_seqs": make_seqs()}
    graphs = []
    for coarse in (True, False):
        model = mdsrec.Model(mdsrec.Config(dim=8, heads=2, centers=3, neighbors=4), catalog)
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            model.encode_items()
        graphs.append(model.graphs["text"])
    assert torch.equal(*graphs)

def test_a_model_makes_its_graphs_once_when_they_are_first_needed():
    catalog = {"n_items": N, "text": make_features(5), "image": make_features(7),
               "train_seqs": make_seqs()}
    small = mdsrec.Config(dim=8, heads=2, centers=3, neighbors=4)
    model = mdsrec.Model(small, catalog)
    assert not dict(model.named_buffers())
    with mock.patch.object(mdsrec, "nearest", wraps=mdsrec.nearest) as watched:
        model.encode_items()
        model.prepare(torch.device("cpu"))
    assert watched.call_count == 2
    assert dict(model.named_buffers()).keys() >= {"O", "O_T", "graphs.text", "clusters.image"}


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


def test_a_few_items_far_away_have_a_centre_of_their_own_eq_10():
    """The first centres are far from each other, so that no large group of items takes all."""
    features = torch.zeros(101, 2)
    features[1:] = torch.randn(100, 2) / 100 + torch.tensor([10., 0.])
    features[50:52] = torch.tensor([0., 10.])
    features[98:101] = torch.tensor([-10., 0.])
    found = mdsrec.k_means(features, 3).bool()
    sizes = sorted(found.sum(1).tolist())
    assert sizes == [2, 3, 95]
    assert [50, 51] in [row.nonzero()[:, 0].tolist() for row in found]


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


def test_the_noise_is_gumbels_eq_19():
    """Between two centres that are alike, at tau = 1, gamma is uniform: a difference of two Gumbel
    numbers is logistic. With logistic noise, as printed, it would be near 0 or 1 more often."""
    gamma = make(tau=1.).train().interest(*two_centres(4000))[..., 0]
    for share in (.1, .3, .5, .9):
        assert (gamma < share).double().mean() == pytest.approx(share, abs=.03)


def two_centres(users):
    """e of zeros, and two centres of which the first one's weight can be read in place 0."""
    centers = torch.zeros(users, 1, 2, 8)
    centers[:, :, 0, 0] = 1
    return torch.zeros(users, 1, 8), centers


def test_gumbel_noise_and_its_temperature_in_training():
    """Between two centres that are alike, gamma is sharp at a small tau and even at a large one."""
    e, centers = two_centres(4000)
    for tau, extreme in ((.01, .95), (100., 0.)):
        model = make(tau=tau).train()
        gamma = model.interest(e, centers)[..., 0]
        assert ((gamma < .01) | (gamma > .99)).double().mean() == pytest.approx(extreme, abs=.05)
        assert gamma.mean() == pytest.approx(.5, abs=.05)


def test_gamma_is_exact_under_autocast_eq_19():
    """100 and 100.25 are one number in bfloat16; at tau = .05 they are e^5 apart."""
    torch.set_default_dtype(torch.float32)
    model = make(tau=.05).eval()
    e, centers = two_centres(1)
    e[..., 7] = 1
    centers[0, 0, :, 7] = torch.tensor([100.25, 100.])
    with torch.autocast("cpu", torch.bfloat16):
        gamma = model.interest(e, centers)[0, 0, 0]
    assert gamma == pytest.approx(1 / (1 + math.exp(-5)), abs=.01)


# ---------------- item tables

def test_weights_start_small_and_padding_at_zero():
    model = make(dim=64, heads=4, max_len=50)
    assert not model.item.weight[0].any()
    for weight in (model.item.weight[1:], model.position, model.encoders["id"][0].query.weight):
        assert weight.std().item() == pytest.approx(.02, rel=.15)


def test_item_tables_eqs_3_6():
    model = make()
    table = model.encode_items()
    E = model.item.weight
    O = co_occurrence(max_len=10)
    for i in range(N + 1):
        mixed = E[i] + 16.0 * sum(O[i, j] * E[j] for j in range(N + 1))
        torch.testing.assert_close(table["id"][i], mixed)
        for m in ("text", "image"):
            neighbours = model.graphs[m][i]
            torch.testing.assert_close(table[m][i], sum(E[j] for j in neighbours) / 4)
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
def naive_block(block, queries, keys, look, dropped=1):
    """Attention of each query over keys[j] with look(q, j), feed-forward, residuals: loops.

    dropped: what stands for dropout, a factor.
    """
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
        g = block.norm1(queries[q] + dropped * block.out(torch.cat(heads)))    # eq. (14)
        inner = block.inner(g)
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2              # GELU
        rows.append(block.norm2(g + dropped * block.outer(inner)))             # eq. (15)
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
def test_dropout_of_inputs_and_after_attention_and_feed_forward():
    model = make(layers=1)
    model.dropout.forward = lambda x: 3 * x
    block = model.encoders["id"][0]
    block.dropout.forward = lambda x: 2 * x
    items = model.encode_items()["id"]
    found, _ = model.encode("id", torch.tensor([[5, 2, 9]]), items)
    x = 3 * model.norm(items[[5, 2, 9]] + model.position[-3:])
    torch.testing.assert_close(found[0, 0], naive_block(block, x, x, lambda q, j: j <= q, 2)[-1])


def test_dropout_in_training_alone():
    model = make(dropout=.25)
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {.25}
    batch = {"seq": torch.tensor([[1, 2, 3]]), "target": torch.tensor([[2, 3, 4]])}
    attention = F.scaled_dot_product_attention
    for mode, expected in ((model.train, .25), (model.eval, 0.)):
        mode()
        with mock.patch.object(F, "scaled_dot_product_attention", wraps=attention) as watched:
            model(batch)
        assert {call.kwargs["dropout_p"] for call in watched.call_args_list} == {expected}


@torch.no_grad()
def test_an_empty_history_is_one_of_padding_alone():
    model = make().eval()
    items = model.encode_items()["text"]
    centers = model.clusters["text"] @ items
    found = model.encode("text", torch.zeros(1, 4, dtype=torch.long), items, centers)
    alone = model.encode("text", torch.zeros(1, 1, dtype=torch.long), items, centers)
    x = model.norm(items[:1] + model.position[-1:])
    e = model.norm(centers)
    for block in model.encoders["text"]:
        e = naive_block(block, e, x, lambda q, j: True)
        x = naive_block(block, x, x, lambda q, j: True)
    for states, own in (found, alone):
        torch.testing.assert_close(states[0], x)
        torch.testing.assert_close(own[0, 0], e)


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


@pytest.mark.parametrize("prefixes", [True, False])
def test_gradients_of_the_loss_eqs_3_6_11_23_24(prefixes):
    """Reading 3: ids learn through eqs. (3), (6) and (11). Each weight is moved a little along a
    random direction: the loss changes by its gradient."""
    torch.manual_seed(0)
    model = make(prefixes=prefixes, layers=1).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=.2)
    seq = torch.tensor([[0, 4, 5, 2, 9], [1, 2, 3, 4, 5]])
    target = torch.tensor([[0, 5, 2, 9, 7], [2, 3, 4, 5, 6]])

    def loss():
        return sum(model({"seq": seq, "target": target}).values())

    loss().backward()
    for name, weight in model.named_parameters():
        direction = torch.randn_like(weight)
        found = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight += step * direction
                found.append(loss())
                weight -= step * direction
        slope = (found[0] - found[1]) / 2e-5
        expected = (weight.grad * direction).sum()
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-7, msg=name)


def test_losses_are_means_over_the_rows_eq_23():
    model = make().eval()
    seq = torch.tensor([[0, 4, 5, 2, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 8]])
    target = torch.tensor([[7], [6], [1]])
    together = model({"seq": seq, "target": target})
    alone = [model({"seq": seq[i:i + 1], "target": target[i:i + 1]}) for i in range(3)]
    for name, loss in together.items():
        torch.testing.assert_close(loss, sum(losses[name] for losses in alone) / 3)


def test_the_newest_items_of_a_long_history_are_read():
    model = make(max_len=3).eval()
    table = model.encode_items()
    found = model.score({"seq": torch.tensor([[7, 8, 1, 2, 3]])}, table)
    assert torch.equal(found, model.score({"seq": torch.tensor([[1, 2, 3]])}, table))


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


@torch.no_grad()
def test_without_mrgc_a_linear_map_of_the_features_and_ids_with_co_occurrence():
    model = make(use_mrgc=False)
    table = model.encode_items()
    image = make_features(7)
    image[3] = 0
    for m, features in (("text", make_features(5)), ("image", image)):
        unit = features / features.norm(dim=1, keepdim=True).clamp(min=1e-9)
        expected = unit @ model.maps[m].weight.T + model.maps[m].bias
        torch.testing.assert_close(table[m], expected)
    E = model.item.weight
    torch.testing.assert_close(table["id"], E + 16 * co_occurrence(max_len=10) @ E)


@torch.no_grad()
def test_without_ica_each_modality_predicts_by_its_last_state():
    model = make(use_ica=False, rho_image=.3).eval()
    table = model.encode_items()
    seq = torch.tensor([[4, 5, 2, 9]])
    text = model.encode("text", seq, table["text"])[0][0, 0]
    image = model.encode("image", seq, table["image"])[0][0, 0]
    e_s = model.encode("id", seq, table["id"])[0][0, 0] + .7 * text + .3 * image
    expected = table["item"] @ e_s + .7 * table["text"] @ text + .3 * table["image"] @ image
    torch.testing.assert_close(model.score({"seq": seq}, table)[0], expected)


def test_without_cre_the_graphs_lose_co_occurrence_and_the_ids_keep_it():
    model = make(use_cre=False)
    expected = mdsrec.nearest(F.normalize(make_features(5), dim=-1), 4)
    assert torch.equal(model.graphs["text"], expected)
    assert not torch.equal(model.encode_items()["id"], model.item.weight)


@pytest.mark.parametrize("setting, value", [
    ("neighbors", -1), ("partners", -1), ("rho_image", 3.), ("centers", 0), ("inner", 0),
])
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} {value}"):
        make(**{setting: value})
