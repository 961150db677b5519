"""Digest's parts against naive loops in float64, written from the equations of its page."""
import math

import pytest
import torch
import torch.nn.functional as F

from loop.settings import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
digest = load_model_file("digest")
N = 9
SEQS = [[1, 2, 3], [2, 3, 4, 2], [5, 1], [2, 2, 6, 7], [3]]    # 8 and 9 were never bought


def features(width):
    random = torch.Generator().manual_seed(width)
    made = torch.randn(N + 1, width, generator=random)
    made[0] = 0
    made[width % N] = 0    # one item has none: 5 no text, 7 no picture
    return made


def make(**settings):
    small = dict(dim=8, heads=2, layers=1, neighbors=3, max_len=6, dropout=0., input_dropout=0.)
    small |= dict(new=0.)
    catalog = {"n_items": N, "text": features(5), "image": features(7), "train_seqs": SEQS}
    model = digest.Model(digest.Config(**small | settings), catalog)
    for weight in model.parameters():
        weight.data += .3 * torch.randn_like(weight)    # as after some training
    model.prepare(torch.device("cpu"))
    return model


def batch():
    seq = torch.tensor([[0, 0, 1, 2, 3], [4, 4, 5, 2, 1], [0, 0, 0, 0, 6]])
    target = torch.tensor([[0, 0, 2, 3, 4], [4, 5, 2, 1, 7], [0, 0, 0, 0, 3]])
    return {"user": torch.arange(3), "seq": seq, "target": target}


# ---------------- items

BOUGHT = torch.arange(N + 1) % 9 > 0    # not 9
HAVE_TEXT = [i for i in range(1, N + 1) if i != 5]


def test_content_is_centred_over_what_was_bought():
    x = features(5)
    found = digest.centred(x, BOUGHT)
    mean = sum(x[i] for i in HAVE_TEXT if BOUGHT[i]) / 7
    for i in range(N + 1):
        expected = (x[i] - mean) / (x[i] - mean).norm() if i in HAVE_TEXT else torch.zeros(5)
        torch.testing.assert_close(found[i], expected)
    for x, bought in ((torch.zeros(4, 3), True), (torch.randn(4, 3), False)):    # nobody, nothing
        assert digest.centred(x, torch.full((4,), bought)).isfinite().all()


@pytest.mark.parametrize("rows", [2, None])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_nearest_eq_1(count, rows):
    x = digest.centred(features(5), BOUGHT)
    found = digest.nearest(x, count, BOUGHT, rows)
    assert found.shape == (N + 1, min(count, N))
    for i in range(N + 1):
        others = [j for j in HAVE_TEXT if BOUGHT[j] and j != i]
        others.sort(key=lambda j: -F.cosine_similarity(x[i], x[j], dim=0).item())
        neighbours = others if i not in (0, 5) else []
        assert found[i].tolist() == (neighbours + [0] * N)[:found.shape[1]]


def test_of_equal_items_the_smaller_ids_are_neighbours():
    x = torch.ones(40, 2) * torch.arange(40).clamp(max=1)[:, None] / math.sqrt(2)
    found = digest.nearest(x, 3, torch.arange(40) > 0)
    assert found[30].tolist() == [1, 2, 3]
    assert found[1].tolist() == [2, 3, 4]


def test_items_that_nobody_bought_change_nothing_for_the_others():
    catalog = {"n_items": N, "text": features(5), "image": features(7), "train_seqs": SEQS}
    more = {"n_items": N + 2, "train_seqs": SEQS}
    for m in ("text", "image"):
        more[m] = torch.cat([catalog[m], torch.randn(2, catalog[m].shape[1])])
    cfg = digest.Config(dim=8, heads=2, neighbors=3)
    model = digest.Model(cfg, catalog).eval()
    larger = digest.Model(cfg, more).eval()
    weights = dict(model.state_dict())
    for name in digest.ROWS_OF_ITEMS:
        weights[name] = torch.cat([weights[name], torch.randn(2, 8)])    # whatever they are
    larger.load_state_dict(weights)
    scores = model.score(batch(), model.encode_items())
    found = larger.score(batch(), larger.encode_items())
    torch.testing.assert_close(found[:, :N + 1], scores)


def test_neighbours_are_not_found_in_bfloat16():
    torch.set_default_dtype(torch.float32)
    alike = torch.ones(N + 1, 6) + .02 * torch.randn(N + 1, 6)
    alike[0] = 0
    catalog = {"n_items": N, "text": alike, "image": alike, "train_seqs": SEQS}
    graphs = []
    for coarse in (True, False):
        model = digest.Model(digest.Config(dim=8, heads=2, neighbors=3), catalog)
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            model.encode_items()
        graphs.append(model.graphs["text"])
    assert torch.equal(*graphs)


def test_the_cosine_is_not_learned_in_bfloat16():
    model = make().float()
    full = {key: value[1:2] for key, value in batch().items()}    # a target at every place
    losses = []
    for coarse in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            losses.append(model(full)["cosine"])
    assert torch.equal(*losses) and losses[0] > 0


def naive_tables(model):
    """T^id, T^t and T^v of item j, eqs. (1) to (3)."""
    sold = [sum(seq.count(j) for seq in SEQS) for j in range(N + 1)]
    e = model.item.weight
    rows = {"id": [], "text": [], "image": []}
    for j in range(N + 1):
        for m in ("text", "image"):
            near = [i for i in model.graphs[m][j].tolist() if i]
            mean = sum(e[i] for i in near) / max(len(near), 1)
            rows[m].append(mean + model.maps[m].weight @ model.content[m][j])
        has = [m for m in ("text", "image") if model.content[m][j].any()]
        borrowed = sum(rows[m][j] for m in has) / len(has) if has else torch.zeros(8)
        rows["id"].append(e[j] if sold[j] else borrowed)
        for m in ("text", "image"):
            if m not in has:
                rows[m][j] = rows["id"][j]    # reading 7
    return {name: torch.stack(row) for name, row in rows.items()}


@pytest.mark.parametrize("neighbors", [3, 50])
def test_tables_of_items_eqs_1_to_3(neighbors):
    model = make(neighbors=neighbors).eval()
    found, expected = model.encode_items(), naive_tables(model)
    assert set(found) == {"id", "text", "image"}
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_in_training_items_play_new_and_in_ranking_they_do_not():
    model = make(new=1.).train()
    table = model.encode_items()
    text, image = [model.maps[m](model.content[m]) for m in ("text", "image")]    # no neighbours
    expected = (text + image) / 2
    expected[5], expected[7] = image[5], text[7]    # 5 has no text, 7 no picture
    torch.testing.assert_close(table["id"], expected)
    text[5], image[7] = image[5], text[7]           # reading 7
    torch.testing.assert_close(table["text"], text)
    torch.testing.assert_close(table["image"], image)
    torch.testing.assert_close(model.eval().encode_items()["id"], naive_tables(model)["id"])
    model = make(new=.5, use_graph=False, use_map=False).train()
    zeros, some = 0, 0
    for _ in range(200):
        ids = model.encode_items()["id"][1:8]
        new = (ids == 0).all(1)
        assert torch.equal(ids[~new], model.item.weight[1:8][~new])
        zeros += new.sum()
        some += new.any() and not new.all()
    assert .4 < zeros / (200 * 7) < .6
    assert some > 180


def test_content_is_dropped_in_training():
    model = make(input_dropout=.5)
    assert not torch.equal(model.train().encode_items()["text"], model.encode_items()["text"])
    assert torch.equal(model.eval().encode_items()["text"], model.encode_items()["text"])


@pytest.mark.parametrize("stream", ["id", "text", "image"])
def test_each_stream_reads_its_own_table_eq_4(stream):
    model = make().eval()
    table = model.encode_items()
    before = model.states(batch()["seq"], table)
    after = model.states(batch()["seq"], {**table, stream: table[stream].flip(0)})
    changed = [name for name in model.streams if not torch.equal(before[name], after[name])]
    assert changed == [stream]


# ---------------- the cosine

def test_recent_content_eq_6():
    model = make(decay=.6)
    seq = batch()["seq"]
    found = model.recent_content(seq)
    for m in model.modalities:
        for row, items in enumerate(seq.tolist()):
            for t in range(len(items)):
                q = sum(.6 ** (t - p) * model.content[m][items[p]] for p in range(t + 1))
                torch.testing.assert_close(found[m][row, t], F.normalize(q, dim=0))


def test_cosine_knows_how_often_an_item_was_bought_eq_7():
    model = make()
    q = {m: F.normalize(torch.randn(3, x.shape[1]), dim=1)
         for m, x in (("text", model.content["text"]), ("image", model.content["image"]))}
    target = torch.tensor([2, 8, 6])
    for answers in (None, target):
        found = model.cosine_scores(q, answers)
        for row in range(3):
            for j in range(N + 1):
                n = sum(seq.count(j) for seq in SEQS)
                if answers is not None and j == target[row]:
                    n = max(n - 1, 0)    # without this purchase
                y = 0
                for m in model.modalities:
                    a, b = 10 * model.loudness[m]
                    y += (a + b * math.log(1 + n)) * (q[m][row] @ model.content[m][j])
                torch.testing.assert_close(found[row, j], torch.as_tensor(y))


# ---------------- the softmax

def test_different_ids_of_a_row():
    seq = torch.tensor([[0, 3, 3, 1, 3], [0, 0, 2, 5, 2]])
    assert digest.different(seq).tolist() == [[0, 3, 0, 1, 0], [0, 0, 2, 5, 0]]


def plain_loss(states, items, target, had, r, never):
    losses = []
    for h, answer, own in zip(states, target.tolist(), had.tolist()):
        if answer:
            bonus = torch.tensor([float(j in own) for j in range(len(items))])
            y = (items @ h + r * bonus).masked_fill(never, -torch.inf)    # eqs. (5), (8)
            losses.append(-y.log_softmax(0)[answer])                      # eq. (9)
    return sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize("is_cuda", [False, True])
def test_stream_loss_and_its_gradient_eqs_5_8_9(is_cuda, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)    # a GPU takes the rows without choosing
    for rows, n_items in ((150, 40_000), (7, 11)):    # several chunks of rows on a CPU, and one
        given = [torch.randn(rows, 4), torch.randn(n_items, 4), torch.tensor(-1.5)]
        states, items, r = [x.requires_grad_() for x in given]
        target = torch.randint(4, n_items, (rows,))
        target[1:rows:3] = 0
        had = digest.different(torch.randint(0, n_items, (rows, 5)))
        never = torch.zeros(n_items, dtype=torch.bool)
        never[[0, 1, 2]] = True

        rest = (target, had, r, never)
        found = digest.stream_loss(states, items, *rest)
        expected = plain_loss(states, items, *rest)
        torch.testing.assert_close(found, expected)
        found = torch.autograd.grad(3 * found, (states, items, r))
        expected = torch.autograd.grad(3 * expected, (states, items, r))
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(digest.stream_loss, (states, items, *rest))
    assert digest.stream_loss(states, items, 0 * target, had, r, never) == 0


def test_each_stream_has_a_loss_of_its_own_eq_9(monkeypatch):
    model = make()
    seq, target = batch()["seq"], batch()["target"]
    some = torch.tensor([3, 8, 0, 9])
    monkeypatch.setattr(model, "some_of", lambda target: some)
    found = model(batch())
    assert list(found) == ["next_item", "text", "image", "cosine"]
    table = model.encode_items()
    states = model.states(seq, table)
    never = model.sold[:, 0] == 0
    assert never.nonzero()[:, 0].tolist() == [0, 8, 9]
    places = [(row, t) for row in range(3) for t in range(5)]
    had = torch.zeros(15, 5, dtype=torch.long)
    for number, (row, t) in enumerate(places):
        own = seq[row, :t + 1].unique()
        had[number, :len(own)] = own
    flat = target.flatten()
    for stream, name in (("id", "next_item"), ("text", "text"), ("image", "image")):
        expected = plain_loss(
            states[stream].flatten(0, 1), table[stream], flat, had, model.r(), never
        )
        torch.testing.assert_close(found[name], expected)
    losses = []
    for number in some.tolist():    # reading 9
        row, t = places[number]
        if flat[number]:
            q = {m: x[row, t][None] for m, x in model.recent_content(seq).items()}
            y = model.cosine_scores(q, flat[number][None])[0]
            y = y + model.r() * torch.tensor([float(j in had[number]) for j in range(N + 1)])
            y = y.masked_fill(never, -torch.inf)
            losses.append(-y.log_softmax(0)[flat[number]])
    torch.testing.assert_close(found["cosine"], sum(losses) / len(losses))


def test_an_eighth_of_the_places_is_drawn_and_of_any_place():
    model = make()
    drawn = [model.some_of(torch.ones(40)) for _ in range(300)]
    assert {len(some) for some in drawn} == {6}
    assert torch.cat(drawn).unique().tolist() == list(range(40))
    model.sold = torch.ones(2 ** 22, 1)    # as many items: 5 rows of them at a time
    assert len(model.some_of(torch.ones(400))) == 5


@pytest.mark.parametrize("is_cuda", [False, True])
def test_what_training_did_not_have_gives_finite_losses(is_cuda, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
    unknown = batch()
    unknown["target"][0, -1] = 9
    assert all(loss.isfinite() for loss in make()(unknown).values())
    catalog = {"n_items": N, "text": features(5), "image": features(7)}
    for seqs in ([], [[2, 3, 4]]):    # nothing was bought; not the first item
        model = digest.Model(digest.Config(dim=8, heads=2), catalog | {"train_seqs": seqs})
        sum(losses := model(batch()).values()).backward()
        assert all(loss.isfinite() for loss in losses)
        assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)


def test_one_softmax_for_all_streams():
    model = make(use_streams=False)
    found = model(batch())
    assert list(found) == ["next_item", "cosine"]
    table = model.encode_items()
    states = model.states(batch()["seq"], table)
    y = sum(states[s] @ table[s].T for s in model.streams)
    had = digest.different(batch()["seq"])
    for t in range(5):
        own = torch.stack([torch.isin(torch.arange(N + 1), row) for row in had[:, :t + 1]])
        y[:, t] += model.r() * own
    y = y.masked_fill(model.sold[:, 0] == 0, -torch.inf)
    expected = F.cross_entropy(y.flatten(0, 1), batch()["target"].flatten(), ignore_index=0)
    torch.testing.assert_close(found["next_item"], expected)


# ---------------- ranking

@pytest.mark.parametrize("settings", [{}, {"use_streams": False}, {"use_cosine": False},
                                      {"use_own": False}, {"loud": 3.}, {"modality": "text"}])
def test_scores_are_the_sum_of_the_streams_eq_10(settings):
    model = make(**settings).eval()
    seq = batch()["seq"]
    table = model.encode_items()
    found = model.score(batch(), table)
    states = model.states(seq, table)
    softmaxes = (len(model.streams) if model.cfg.use_streams else 1) + model.cfg.use_cosine
    q = {m: x[:, -1] for m, x in model.recent_content(seq).items()}
    for row in range(3):
        expected = sum(states[s][row, -1] @ table[s].T for s in model.streams)
        if model.cfg.use_cosine:
            expected = expected + model.cfg.loud * model.cosine_scores(q)[row]
        for j in set(seq[row].tolist()):
            expected[j] += softmaxes * 10 * model.own * model.cfg.use_own
        torch.testing.assert_close(found[row, 1:], expected[1:])


def test_a_row_per_prefix_predicts_at_its_last_place():
    rows, prefixes = make(), make(prefixes=True)
    prefixes.load_state_dict(rows.state_dict())
    rows.some_of = prefixes.some_of = lambda target: torch.arange(len(target))
    last = batch()
    last["target"] = torch.where(torch.arange(5) == 4, last["target"], 0)
    found = prefixes(batch())
    assert "cosine" in found
    for name, loss in rows(last).items():
        torch.testing.assert_close(found[name], loss)


def test_without_a_modality_it_has_no_weights_for_it():
    names = " ".join(name for name, _ in make(modality="text").named_parameters())
    assert "text" in names and "image" not in names


@pytest.mark.parametrize("again", [False, True])
def test_it_learns_whether_people_buy_a_thing_again(again):
    random = torch.Generator().manual_seed(0)
    if again:    # two things in turn
        pairs = torch.stack([torch.randperm(7, generator=random)[:2] for _ in range(64)]) + 1
        seq = pairs.repeat(1, 3)
    else:
        seq = torch.stack([torch.randperm(7, generator=random)[:6] for _ in range(64)]) + 1
    model = make()
    model.own.data.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        losses = model({"user": torch.arange(64), "seq": seq[:, :-1], "target": seq[:, 1:]})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert (model.r() > .5) if again else (model.r() < -.5)
