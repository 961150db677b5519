"""MMSR's parts against naive forms in float64, its encoders against Hugging Face's, what is cached against what is not."""
import contextlib
import copy
import json
import os

import numpy as np
import pytest
import torch
from conftest import run, write_shop
from PIL import Image

import data as datasets
from evaluate import evaluate
from train import load_model_file

transformers = pytest.importorskip("transformers")
mmsr = load_model_file("mmsr")
N, D, L = 24, 16, 6
FUSIONS = ("sum", "concat", "gate", "film")
TEXT_KINDS, IMAGE_KINDS = ("bert", "roberta", "electra", "clip", "flava"), ("vit_mae", "swin", "resnet", "clip", "flava")
close = torch.testing.assert_close


def same(a, b, tolerance=1e-5):
    close(a, b, rtol=tolerance, atol=tolerance)


def draw(folder, n=5, size=(40, 30)):
    """n pictures of noise, each of its own -> their paths."""
    for i in range(0 if folder.exists() else n):                 # once: their time counts
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(n)]


def make_catalog(folder, n=N):
    """Titles of 0 to 6 words, some of them alike; few pictures for all, none for every third item. User 3 has everything."""
    words, paths = "red blue green soft hard round".split(), draw(folder / "pictures")
    titles = ["", *(" ".join((words * 2)[i % 5:i % 5 + i % 7]) for i in range(1, n + 1))]
    seqs = [[1, 2, 3, 2, 7], [9, 4, 5, 6, 8, 10], [n, n - 1, n, 1], list(range(1, n + 1)), [5]]
    return {"n_items": n, "titles": titles, "train_seqs": seqs,
            "image_paths": [None, *(paths[i % 5] if i % 3 else None for i in range(1, n + 1))]}


def settings(folder, **changes):
    return mmsr.Config(**dict(text_encoder="tiny", image_encoder="tiny", dim=D, max_len=8, dropout=0., cache="fp32",
                              cache_dir=str(folder / "cache")) | changes)


def make(folder, catalog=None, seed=2, **changes):
    """A model whose own weights are large enough to matter, its biases among them."""
    torch.manual_seed(seed)
    return shaken(mmsr.MMSR(settings(folder, **changes), catalog or make_catalog(folder)))


def shaken(model, by=.1):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("position", "kinds"):                    # a part alone leaves them to the whole model
                weight.zero_()
            weight += by * torch.randn_like(weight)
    return model


def make_batch():
    """Row 0 owns its targets 2 and 3 elsewhere too; 4 and 2 are targets of two rows; user 3 owns every item."""
    seq = torch.tensor([[0, 0, 1, 2, 3, 2], [9, 4, 5, 6, 8, 10], [0, 0, 0, 0, 24, 23], [3, 4, 5, 6, 7, 8]])
    target = torch.tensor([[0, 0, 2, 3, 2, 7], [4, 5, 6, 8, 10, 12], [0, 0, 0, 0, 23, 0], [4, 5, 6, 7, 8, 2]])
    return {"user": torch.arange(4), "seq": seq, "target": target}


def loss_and_gradients(model, batch=None, seed=1):
    torch.manual_seed(seed)
    loss = sum(model(batch or make_batch()).values())
    return loss, torch.autograd.grad(loss, list(model.parameters()))


# ---------------------------------------------------------------- fusions

def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def layer_norm(norm, x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def softmax(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def attention(layer, q, k, heads, see=None):
    """Multi-head attention of (T, D) on (S, D), a head at a time."""
    d, out = q.shape[1] // heads, []
    W, b = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    Q, K, V = q @ W[0].T + b[0], k @ W[1].T + b[1], k @ W[2].T + b[2]
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        score = Q[:, part] @ K[:, part].T / d ** .5
        out.append(softmax(score if see is None else score.masked_fill(~see, -torch.inf)) @ V[:, part])
    return linear(layer.out_proj, torch.cat(out, 1))


def bert_layer(block, x, heads):
    """The same weights in Hugging Face's BertLayer."""
    from transformers.models.bert.modeling_bert import BertLayer
    d, a = x.shape[-1], block.self_attn
    bert = BertLayer(transformers.BertConfig(hidden_size=d, num_attention_heads=heads, intermediate_size=4 * d,
                                             attn_implementation="eager")).double().eval()
    weights = [*zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3)), *(
        (layer.weight, layer.bias) for layer in (a.out_proj, block.norm1, block.linear1, block.linear2, block.norm2))]
    bert.load_state_dict(dict(zip(bert.state_dict(), sum(weights, ()), strict=True)))
    out = bert(x[None])
    return (out[0] if isinstance(out, tuple) else out).view_as(x)


def naive_fusion(fusion, kind, x, y, heads):
    """One item: text tokens x (T, D), picture tokens y (V, D), no padding."""
    if kind == "merge":                                          # type embeddings, then BERT on both, then the mean
        z = torch.cat([x + fusion.kinds[0], y + fusion.kinds[1]])
        for block in fusion.blocks:
            z = bert_layer(block, z, heads)
        return z.mean(0)
    if kind == "co":                                             # LXMERT: one cross-attention, two of everything else
        x, y = x + fusion.kinds[0], y + fusion.kinds[1]
        a = layer_norm(fusion.norm, x + attention(fusion.cross, x, y, heads), 1e-12)
        b = layer_norm(fusion.norm, y + attention(fusion.cross, y, x, heads), 1e-12)
        a, b = bert_layer(fusion.blocks[0], a, heads), bert_layer(fusion.blocks[1], b, heads)
        return linear(fusion.out, torch.cat([a.mean(0), b.mean(0)]))
    a, b, m = layer_norm(fusion.norm, x.mean(0), 1e-6), layer_norm(fusion.norm, y.mean(0), 1e-6), fusion.maps
    z = {"sum": lambda: linear(m["Wx"], a) + linear(m["Wy"], b),
         "concat": lambda: linear(m["W"], torch.cat([a, b])),
         "gate": lambda: linear(m["W"], 1 / (1 + (-linear(m["Wx"], a)).exp()) * linear(m["Wy"], b)),
         "film": lambda: linear(m["W"], linear(m["gamma"], a) * b + linear(m["beta"], a))}[kind.removesuffix("+")]()
    layers = [layer for layer in fusion.dnn if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 3 * kind.endswith("+")
    for layer in layers:
        z = linear(layer, z).clamp(min=0)
    return z


def tokens_of(n=5, d=D, scale=1.):
    """Text tokens with garbage behind the last, picture tokens, their masks."""
    g = torch.Generator().manual_seed(4)
    x, y = (scale * torch.randn(n, t, d, generator=g, dtype=torch.float64) for t in (7, 4))
    x_mask = torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]
    x[~x_mask] = 1e3
    return x, x_mask, y, torch.ones(n, 4, dtype=torch.bool)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind, layers", [*((k + plus, 1) for k in FUSIONS for plus in ("", "+")), ("co", 1), ("merge", 1),
                                          ("merge", 2)])
def test_a_fusion_equals_its_definition(kind, layers, training, tmp_path):
    d = 128 if kind in ("co", "merge") else D                    # two heads there
    torch.manual_seed(0)
    fusion = mmsr.Fusion(settings(tmp_path, fusion=kind, merge_layers=layers, dim=d), None).double()
    fusion = shaken(fusion.train(training), by=.2 if d == D else .05)
    x, x_mask, y, y_mask = tokens_of(d=d, scale=1. if d > D else .01)              # small: then the norm's epsilon counts
    with torch.set_grad_enabled(training):                       # without gradients torch takes another road
        found = fusion(x, x_mask, y, y_mask)
    with torch.no_grad():
        close(found, torch.stack([naive_fusion(fusion, kind, x[i, x_mask[i]], y[i], 2) for i in range(5)]))
        x[~x_mask] = -50.
        close(fusion(x, x_mask, y, y_mask), found)


def test_dropout_is_where_the_definitions_have_it(tmp_path):
    for kind, noisy in (("sum", False), ("gate+", True), ("co", True), ("merge", True)):
        torch.manual_seed(0)
        fusion = shaken(mmsr.Fusion(settings(tmp_path, fusion=kind, dropout=.5), None).double())
        z = [fusion.train(mode)(*tokens_of()) for mode in (True, True, False, False)]
        assert torch.equal(z[0], z[1]) != noisy and torch.equal(z[2], z[3])
    assert mmsr.Fusion(mmsr.Config(fusion="co"), None).cross.num_heads == 12       # 768 numbers: 12 heads, as in BERT


@pytest.mark.parametrize("loss", ["bce", "in_batch"])
@pytest.mark.parametrize("user_encoder", ["sasrec", "gru", "nextitnet"])
def test_with_ids_padding_changes_no_loss(user_encoder, loss, tmp_path):
    model, batch = make(tmp_path, item_encoder="id", user_encoder=user_encoder, loss=loss), make_batch()
    assert not model.items(torch.tensor([0])).any()
    wider = batch | {k: torch.nn.functional.pad(batch[k], (2, 0)) for k in ("seq", "target")}
    assert loss_and_gradients(model, wider)[0].item() == pytest.approx(loss_and_gradients(model, batch)[0].item(), rel=1e-5)


def test_one_modality_is_the_masked_mean_of_its_projected_tokens(tmp_path):
    for modality in ("text", "image"):
        model = make(tmp_path, modality=modality).eval()
        assert model.fusion is None and set(model.towers) == {modality}
        found, tower = model.items(torch.arange(N + 1)), model.towers[modality]
        for i in range(1, N + 1, 4):
            tokens, mask = tower(torch.tensor([i]))
            same(found[i], linear(model.project[modality], tokens[0, mask[0]]).mean(0))


@torch.no_grad()
@pytest.mark.parametrize("tune_blocks", [2, 0])
def test_flava_fusion_is_flavas_own_multimodal_encoder(tune_blocks, tmp_path):
    changes = dict(fusion="flava", text_encoder="tiny-flava", image_encoder="tiny-flava", tune_blocks=tune_blocks)
    torch.manual_seed(0)
    catalog = make_catalog(tmp_path)
    model = mmsr.MMSR(settings(tmp_path, **changes), catalog).eval()
    whole, ids, found = mmsr.load_encoder("tiny-flava", "text")[0].eval(), torch.tensor([1, 6, 20]), []
    for i in ids.tolist():
        words = torch.tensor(mmsr.tiny_tokens([catalog["titles"][i]], 50)["input_ids"])
        both = whole(words, pixels_of(catalog["image_paths"][i])[None], torch.ones_like(words))
        found.append(both.multimodal_embeddings[0, 0])
    same(model.items(ids), linear(model.fusion.out, torch.stack(found)), 1e-4)
    for changed in (dict(text_encoder="tiny-bert"), dict(image_encoder="tiny")):
        with pytest.raises(ValueError, match="FLAVA"):
            make(tmp_path, **changes | changed)


# ---------------------------------------------------------------- user encoders

def naive_sasrec(user, x):
    """Items x (L, D) of one user, no padding."""
    see = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    x = layer_norm(user.norm, x + user.position[len(user.position) - len(x):], 1e-5)
    for block in user.blocks:
        x = layer_norm(block.norm1, x + attention(block.self_attn, x, x, 2, see), 1e-5)
        x = layer_norm(block.norm2, x + linear(block.linear2, linear(block.linear1, x).clamp(min=0)), 1e-5)
    return x


def naive_gru(user, x):
    for layer in range(user.gru.num_layers):
        W, U = (getattr(user.gru, f"weight_{k}h_l{layer}").chunk(3) for k in "ih")
        h, states = torch.zeros(D, dtype=x.dtype), []
        for t in range(len(x)):
            r, z = torch.sigmoid(W[0] @ x[t] + U[0] @ h), torch.sigmoid(W[1] @ x[t] + U[1] @ h)
            h = (1 - z) * torch.tanh(W[2] @ x[t] + r * (U[2] @ h)) + z * h
            states.append(h)
        x = torch.stack(states)
    return x


def naive_nextitnet(user, x):
    def layer(i, x):                                             # width 3: now, d before, 2 d before
        d, W, b = (1, 2, 4, 8)[i % 4], user.convolutions[i].weight, user.convolutions[i].bias
        tap = lambda k, t: W[:, :, k] @ x[t] if t >= 0 else 0.
        y = torch.stack([tap(2, t) + tap(1, t - d) + tap(0, t - 2 * d) + b for t in range(len(x))])
        return layer_norm(user.norms[i], y, 1e-5).clamp(min=0)
    for i in range(0, len(user.convolutions), 2):
        x = x + layer(i + 1, layer(i, x))
    return x


USERS = {"sasrec": (mmsr.SASRec, naive_sasrec), "gru": (mmsr.GRU, naive_gru), "nextitnet": (mmsr.NextItNet, naive_nextitnet)}


def user_encoder(name, folder, **changes):
    torch.manual_seed(0)
    return shaken(USERS[name][0](settings(folder, max_len=20, **changes)).double())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", USERS)
def test_a_user_encoder_equals_its_definition_whatever_the_padding(name, training, tmp_path):
    user = user_encoder(name, tmp_path).train(training)
    x, lengths = torch.randn(4, 12, D, dtype=torch.float64), torch.tensor([12, 1, 5, 9])
    real = torch.arange(12) >= 12 - lengths[:, None]
    x *= real[..., None]
    with torch.set_grad_enabled(training):
        states = user(x, real)
    with torch.no_grad():
        for b, n in enumerate(lengths.tolist()):
            close(states[b, -n:], USERS[name][1](user, x[b, -n:]))
        longer = user(torch.cat([torch.zeros(4, 8, D), x], 1), torch.cat([torch.zeros(4, 8, dtype=torch.bool), real], 1))
        close(longer[:, 8:][real], states[real])
        x[:, 7:] += 1
        close(user(x, real)[:, :7][real[:, :7]], states[:, :7][real[:, :7]])       # no state sees what comes after it


def test_layers_by_default_and_as_asked(tmp_path):
    counts = {"sasrec": lambda user: len(user.blocks), "gru": lambda user: user.gru.num_layers,
              "nextitnet": lambda user: len(user.convolutions) / 4}
    assert {name: counts[name](user_encoder(name, tmp_path)) for name in USERS} == {"sasrec": 2, "gru": 4, "nextitnet": 2}
    assert {counts[name](user_encoder(name, tmp_path, layers=3)) for name in USERS} == {3}
    with pytest.raises(ValueError, match="multiple of heads"):
        user_encoder("sasrec", tmp_path, heads=3)


def test_dropout_at_the_entrance_of_a_user_encoder(tmp_path):
    x, real = torch.randn(2, 5, D, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    for name, noisy in (("sasrec", True), ("gru", True), ("nextitnet", False)):
        user = user_encoder(name, tmp_path, dropout=.5)
        user.blocks = torch.nn.ModuleList()                      # SASRec's have their own
        assert torch.equal(user(x, real), user(x, real)) != noisy and torch.equal(user.eval()(x, real), user(x, real))


def test_weights_at_the_start(tmp_path):
    model = mmsr.MMSR(settings(tmp_path, dim=128, max_len=50), make_catalog(tmp_path))
    for weight, std in ((model.fusion.kinds, .02), (model.user.position, .02),
                        (model.project["text"].weight, (2 / 192) ** .5)):          # Xavier's
        assert weight.std().item() == pytest.approx(std, rel=.15)
    whole = dict(mmsr.load_encoder("tiny", "text")[0].encoder.layer[-1].named_parameters())
    assert all(torch.equal(whole[k], v) for k, v in model.towers["text"].blocks[-1].named_parameters())


@pytest.mark.parametrize("name", USERS)
def test_what_stands_at_padding_changes_no_score(name, tmp_path):
    model, batch = make(tmp_path, user_encoder=name).eval(), make_batch()
    table = model.encode_items()
    scores, table[0] = model.score(batch, table), 7.
    close(model.score(batch, table)[:, 1:], scores[:, 1:])
    states = model.user(table[batch["seq"]] * (batch["seq"] != 0)[..., None], batch["seq"] != 0)[:, -1]
    close(scores[:, 1:], (states[:, None] * table[None, 1:]).sum(-1))


# ---------------------------------------------------------------- encoders

def pixels_of(path):
    picture = Image.open(path).convert("RGB") if path else Image.new("RGB", (9, 9), (128, 128, 128))
    pixels = np.array(picture.resize((64, 64), Image.BICUBIC), np.float32)
    return (torch.tensor(pixels).permute(2, 0, 1) / 255 - .5) / .5


def load(kind, modality):
    """A tiny model with weights large enough to matter, batch statistics among them; what reads its inputs."""
    whole, other = mmsr.load_encoder(f"tiny-{kind}", modality)
    part = {"text": "text_model", "image": "vision_model" if kind == "clip" else "image_model"}[modality]
    model = getattr(whole, part, whole)
    torch.manual_seed(0)
    shaken(model, .05)
    for name, values in model.named_buffers():
        if "running" in name:
            values += .3 * torch.rand_like(values)
    return model, other


def own_tokens(model, modality, given):
    """Hugging Face's last hidden state of one input, (T, width)."""
    with torch.no_grad():
        if modality == "text":
            return model(torch.tensor([given]), torch.ones(1, len(given), dtype=torch.long)).last_hidden_state[0]
        also = {"noise": torch.arange(16.)[None]} if model.config.model_type == "vit_mae" else {}    # patches in order
        found = model(given[None], **also).last_hidden_state[0]
        return found.flatten(1).T if found.dim() == 3 else found


@pytest.mark.parametrize("modality, kind", [*(("text", k) for k in TEXT_KINDS), *(("image", k) for k in IMAGE_KINDS)])
def test_an_encoder_gives_what_hugging_face_gives_for_each_item_alone(modality, kind, tmp_path):
    model, other = load(kind, modality)
    whole, catalog = copy.deepcopy(model).eval(), make_catalog(tmp_path)
    wanted = catalog["titles" if modality == "text" else "image_paths"]
    if kind == "vit_mae":
        whole.config.mask_ratio = 0.
    items = torch.tensor([5, 2, 0, 6, 2, 13, 9])                 # of different lengths, with one twice, in no order
    given = [wanted[i] for i in items]
    given = mmsr.tiny_tokens(given, 50)["input_ids"] if modality == "text" else list(map(pixels_of, given))
    for tune_blocks in (0, 1, 2):
        tower = mmsr.Tower(copy.deepcopy(model), other, modality, wanted, settings(tmp_path, tune_blocks=tune_blocks)).eval()
        tower.prepare(torch.device("cpu"))
        tokens, mask = tower(items)
        assert len(tower.blocks) == tune_blocks and tower.width == tokens.shape[2]
        assert mask.sum(1).tolist() == ([len(ids) for ids in given] if modality == "text" else [tokens.shape[1]] * 7)
        for i in range(7):
            same(tokens[i, mask[i]], own_tokens(whole, modality, given[i]))
        assert torch.equal(tower(items)[0], tokens)              # and so again


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_every_block_may_be_trained_but_no_more(kind, tmp_path):
    model, other = load(kind, "image")
    whole, paths = copy.deepcopy(model).eval(), make_catalog(tmp_path)["image_paths"]
    whole.config.mask_ratio = 0.
    most = {"swin": 2, "resnet": 2}.get(kind, 4)                 # ResNet's third reads a map of another shape
    tower = lambda n: mmsr.Tower(copy.deepcopy(model), other, "image", paths, settings(tmp_path, tune_blocks=n)).eval()
    found = tower(most)
    found.prepare(torch.device("cpu"))
    same(found(torch.tensor([2]))[0][0], own_tokens(whole, "image", pixels_of(paths[2])))
    for n in (most + 1, 5, -1):
        with pytest.raises(ValueError, match="tune_blocks"):
            tower(n)


def test_at_most_so_many_tokens_and_the_same_title_once(tmp_path):
    titles = ["", "red mug", " ".join(["word"] * 90), "red mug", ""]
    tower = mmsr.Tower(*load("roberta", "text"), "text", titles, settings(tmp_path))
    assert [len(ids) for ids in tower.inputs] == [2, 4, 50] and tower.row_of.tolist() == [0, 1, 2, 1, 0]
    assert mmsr.Config().max_tokens == 50
    assert mmsr.tiny_tokens(["red"], 50) == {"input_ids": [[0, 2721, 2]]}          # in every process
    assert mmsr.tiny_tokens(["Red MUG!"], 50) == mmsr.tiny_tokens(["red  mug"], 50) != mmsr.tiny_tokens(["mug red"], 50)


@pytest.mark.parametrize("modality, name", [("text", "tiny-swin"), ("image", "tiny-bert"), ("text", "tiny-nothing")])
def test_an_encoder_of_another_kind_is_refused(modality, name, tmp_path):
    with pytest.raises(ValueError, match=f"{modality}_encoder"):
        make(tmp_path, **{f"{modality}_encoder": name})


# ---------------------------------------------------------------- the cache

@pytest.fixture
def below(monkeypatch):
    """How many inputs went through a frozen bottom, by modality."""
    calls, real = [], mmsr.Tower.below
    monkeypatch.setattr(mmsr.Tower, "below", lambda self, inputs, device: (
        calls.append((self.modality, len(inputs))) or real(self, inputs, device)))
    return calls


def cached(folder):
    return {p.name: p.stat().st_size for p in (folder / "cache").iterdir()}


ENCODERS = [("tiny", "tiny"), ("tiny-electra", "tiny-swin"), ("tiny-bert", "tiny-resnet"), ("tiny-clip", "tiny-clip"),
            ("tiny-flava", "tiny-flava")]


@pytest.mark.parametrize("text, image", ENCODERS)
def test_a_cache_changes_no_number(text, image, tmp_path, below):
    changes = dict(text_encoder=text, image_encoder=image, dropout=.3)
    found = {cache: loss_and_gradients(make(tmp_path, cache=cache, **changes)) for cache in ("off", "fp32", "fp16")}
    same(found["fp32"], found["off"])
    loss, slopes = found["fp16"]
    assert loss.item() == pytest.approx(found["off"][0].item(), rel=2e-2)
    norm = lambda slopes: torch.cat([s.flatten() for s in slopes]).norm()
    assert norm([a - b for a, b in zip(slopes, found["off"][1])]) < .1 * norm(slopes)         # some ReLU turns over
    sizes = {name.split(".")[1] + name[:3]: size for name, size in cached(tmp_path).items()}
    assert len(sizes) == len(cached(tmp_path)) == 4
    assert all(sizes["fp32" + m] == 2 * sizes["fp16" + m] for m in ("tex", "ima"))
    below.clear()
    same(loss_and_gradients(make(tmp_path, **changes)), found["fp32"], 0)
    assert not below                                             # the second model opens what the first one made


def test_a_bottom_runs_once_for_each_distinct_input(tmp_path, below):
    model, catalog = make(tmp_path), make_catalog(tmp_path)
    loss_and_gradients(model), loss_and_gradients(model), model.eval().encode_items()
    assert sorted(below) == [("image", 6), ("text", len(set(catalog["titles"])))]  # five pictures and the grey one
    assert all(tower.bottom is None for tower in model.towers.values())            # and then gives its memory back
    for image in ("tiny-swin", "tiny"):
        started = make(tmp_path, image_encoder=image)
        loss_and_gradients(started)
        below.clear()
        loss_and_gradients(shaken(make(tmp_path, image_encoder=image)))            # weights of a checkpoint
        assert not below


def test_a_cache_belongs_to_its_inputs_and_frozen_weights(tmp_path):
    def file_of(modality, wanted, other=None, change=None, config=(), **changes):
        model, reader = load({"text": "roberta", "image": "resnet"}[modality], modality)
        model.config.update(dict(config))
        if change:
            with torch.no_grad():
                dict(model.named_parameters())[change].flatten()[5] += 1e-3
        tower = mmsr.Tower(model, other or reader, modality, wanted, settings(tmp_path, **changes))
        before = set((tmp_path / "cache").glob("*"))
        tower.prepare(torch.device("cpu"))
        return set((tmp_path / "cache").glob("*")) - before      # a new file, or none

    catalog = make_catalog(tmp_path)
    titles, paths = catalog["titles"], catalog["image_paths"]
    assert file_of("text", titles) and not file_of("text", titles)
    assert not file_of("text", titles, change="encoder.layer.3.output.dense.weight")          # a trained one
    for changes in (dict(change="encoder.layer.1.output.dense.weight"), dict(change="embeddings.word_embeddings.weight"),
                    dict(config={"layer_norm_eps": 1e-3}), dict(tune_blocks=1), dict(max_tokens=4), dict(cache="fp16")):
        assert file_of("text", titles, **changes)
    assert file_of("text", titles[:-1] + ["another"])
    assert file_of("image", paths) and not file_of("image", paths)
    assert file_of("image", paths, other=([.4] * 3, [.5] * 3)) and file_of("image", paths, other=([.5] * 3, [.4] * 3))
    assert file_of("image", [None, *paths[:0:-1]])
    time, size = os.stat(paths[2])[8], os.stat(paths[2])[6]
    os.utime(paths[2], (time, time + 5))
    assert file_of("image", paths) and os.stat(paths[2])[6] == size
    Image.new("RGB", (9, 9)).save(paths[2])
    os.utime(paths[2], (time, time + 5))
    assert file_of("image", paths)


def test_a_fill_that_is_killed_leaves_nothing_to_be_taken_for_a_cache(tmp_path, monkeypatch):
    catalog, real, left = make_catalog(tmp_path, 40), mmsr.Tower.below, []
    catalog["titles"] = ["", *(f"thing {i}" for i in range(40))]

    def killed(self, inputs, device):
        left.append(len(inputs))
        if len(left) == 2:
            raise KeyboardInterrupt
        return real(self, inputs, device)
    monkeypatch.setattr(mmsr.Tower, "below", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, catalog).encode_items()
    assert left == [32, 9] and not [name for name in cached(tmp_path) if name.endswith(".fp32")]
    same(make(tmp_path, catalog).eval().encode_items(), make(tmp_path, catalog, cache="off").eval().encode_items())


@pytest.mark.filterwarnings("ignore:overflow")
def test_numbers_beyond_fp16_are_refused(tmp_path):
    model, other = load("vit_mae", "image")
    model.embeddings.cls_token.data += 1e5
    for cache in ("fp16", "fp32"):
        tower = mmsr.Tower(copy.deepcopy(model), other, "image", [None, None], settings(tmp_path, cache=cache))
        with pytest.raises(ValueError, match="fp32") if cache == "fp16" else contextlib.nullcontext():
            tower.prepare(torch.device("cpu"))
    assert [name[-5:] for name in cached(tmp_path) if name.count(".") == 1] == [".fp32"]


# ---------------------------------------------------------------- what is trained

@pytest.mark.parametrize("text, image, fusion", [*((*both, "merge") for both in ENCODERS), (*ENCODERS[-1], "flava")])
def test_the_top_is_trained_and_the_bottom_is_not(text, image, fusion, tmp_path):
    model = make(tmp_path, cache="off", text_encoder=text, image_encoder=image, fusion=fusion)
    model.items(torch.tensor([1]))                               # reads what there is to read
    bottoms = [model.towers[m].bottom[0] for m in model.towers]
    frozen = lambda: [v.clone() for b in bottoms for v in b.state_dict().values()] + [v.clone() for v in model.buffers()]
    optimizer = torch.optim.AdamW(model.param_groups(model.cfg), lr=1e-3)
    before, weights = frozen(), {k: v.detach().clone() for k, v in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        sum(model(make_batch()).values()).backward()
        for name, weight in model.named_parameters():            # a key's bias adds the same to all scores of a query
            assert weight.grad.abs().max() > 1e-6 or name.endswith(("key.bias", "k_proj.bias")), name
        optimizer.step()
    assert all(map(torch.equal, before, frozen()))               # batch statistics among them, from the very start
    assert not [k for k, v in model.named_parameters() if torch.equal(v, weights[k])]
    blocks = {".".join(k.split(".")[1:4]) for k in weights if k.startswith("towers") and ".blocks." in k}
    assert blocks == {f"{m}.blocks.{i}" for m in ("text", "image") for i in (0, 1)}


def test_weights_belong_to_no_catalog(tmp_path):
    encoders = dict(image_encoder="tiny-resnet", text_encoder="tiny-clip")
    for changes in (encoders, dict(image_encoder="tiny-swin")):
        model = make(tmp_path, **changes)
        assert set(state := model.state_dict()) == {k for k, _ in model.named_parameters()}
        assert not [k for k in state if "embeddings" in k or "running" in k or "index" in k]
    small, other = make(tmp_path, **encoders), make(tmp_path, make_catalog(tmp_path, 31), seed=3, **encoders)
    other.init_from(small.state_dict())
    same(other.eval().encode_items()[:N + 1], small.eval().encode_items())         # their first items are alike
    for changes in (dict(dim=8), dict(fusion="sum"), dict(tune_blocks=1), dict(user_encoder="gru"), dict(modality="text")):
        with pytest.raises(ValueError, match="differ"):
            make(tmp_path, **encoders | changes).init_from(small.state_dict())
    ids = [make(tmp_path, make_catalog(tmp_path, n), item_encoder="id") for n in (N, 31)]
    with pytest.raises(ValueError, match="item.weight"):
        ids[1].init_from(ids[0].state_dict())
    assert ids[0](make_batch())["next_item"].isfinite() and not ids[0].towers and not ids[0].encode_items()[0].any()


@pytest.mark.parametrize("changes", [{}, dict(fusion="flava", text_encoder="tiny-flava", image_encoder="tiny-flava"),
                                     dict(modality="text"), dict(item_encoder="id"), dict(tune_blocks=0)])
def test_groups_of_the_optimizer(changes, tmp_path):
    model = make(tmp_path, encoder_lr=.01, encoder_weight_decay=.2, **changes)
    groups = torch.optim.AdamW(model.param_groups(model.cfg), lr=.03, weight_decay=.4).param_groups
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in groups)
    names = ("towers.", "fusion.x.", "fusion.y.", "fusion.model.") if changes.get("fusion") == "flava" else ("towers.",)
    for name, weight in model.named_parameters():
        assert rates.pop(id(weight)) == ((.01, .2) if name.startswith(names) else (.03, .4)), name
    assert not rates


# ---------------------------------------------------------------- objectives

def test_negatives_are_uniform_over_what_the_user_lacks(tmp_path):
    model, catalog, draws = make(tmp_path, item_encoder="id"), make_catalog(tmp_path), 20_000
    for user, seq in enumerate(catalog["train_seqs"]):
        counts = model.negatives(torch.full((draws // 10,), user), 10).flatten().bincount(minlength=N + 1)
        lacks = [i for i in range(1, N + 1) if i not in seq]
        assert counts.sum() == counts[lacks].sum() == draws if lacks else counts.tolist() == [draws] + [0] * N
        if lacks:                                                # chi-square: its mean is n - 1, its variance twice that
            n, expected = len(lacks), draws / len(lacks)
            assert ((counts[lacks] - expected) ** 2 / expected).sum() < n + 5 * (2 * n) ** .5
    together = model.negatives(torch.tensor([3, 0, 3, 1]), 2)
    assert (together == 0).all(1).tolist() == (together == 0).any(1).tolist() == [True, False, True, False]


@torch.no_grad()
def naive_loss(model, batch, negative, counts):
    """Eq. (6), or the softmax over the targets of the batch; a mean over all places that have a target."""
    seq, target, total = batch["seq"].tolist(), batch["target"].tolist(), []
    e = {i: model.items(torch.tensor([i]))[0].double() for i in range(N + 1)}
    last = len(seq[0]) - 1 if model.cfg.prefixes else 0
    drawn = sorted({t for row in target for t in row[last:] if t})
    for b in range(len(seq)):
        states = model.user(torch.stack([e[i].float() for i in seq[b]])[None], batch["seq"][b:b + 1] != 0)[0].double()
        for t in range(last, len(seq[b])):
            if target[b][t]:
                score = lambda i: float(states[t] @ e[i])
                if negative is not None:
                    loss = np.log1p(np.exp(-score(target[b][t])))
                    if negative[b][t]:
                        loss += np.log1p(np.exp(score(negative[b][t])))
                else:
                    own = {*seq[b], *target[b][last:]} - {target[b][t]}
                    logit = {i: score(i) - np.log(max(counts[i], 1)) for i in drawn if i not in own}
                    loss = np.log(sum(np.exp(v) for v in logit.values())) - logit[target[b][t]]
                total.append(loss)
    return sum(total) / len(total)


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("loss", ["bce", "in_batch"])
def test_the_loss_equals_its_definition(loss, prefixes, tmp_path):
    model, batch, catalog = make(tmp_path, loss=loss, prefixes=prefixes).eval(), make_batch(), make_catalog(tmp_path)
    counts = np.bincount(sum(catalog["train_seqs"], []), minlength=N + 1)
    torch.manual_seed(3)
    negative = model.negatives(batch["user"], L).tolist() if loss == "bce" else None
    assert negative is None or not any(negative[3])              # user 3 has everything: no loss from a negative
    torch.manual_seed(3)
    assert model(batch)["next_item"].item() == pytest.approx(naive_loss(model, batch, negative, counts), rel=1e-4)


@pytest.mark.parametrize("changes", [dict(fusion="co"),
                                     dict(loss="in_batch", user_encoder="nextitnet", text_encoder="tiny-clip")])
def test_bfloat16_autocast_keeps_the_numbers_and_weights_in_float32(changes, tmp_path):
    model = make(tmp_path, **changes).eval()
    exact, _ = loss_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, slopes = loss_and_gradients(model)
    assert loss.item() == pytest.approx(exact.item(), rel=.03)
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in slopes)


@pytest.mark.parametrize("loss", ["bce", "in_batch"])
def test_a_batch_without_any_target_has_no_loss(loss, tmp_path):
    batch = make_batch()
    batch["target"] = torch.zeros_like(batch["target"])
    found, slopes = loss_and_gradients(make(tmp_path, item_encoder="id", loss=loss), batch)
    assert found == 0 and all(s.isfinite().all() for s in slopes)


# ---------------------------------------------------------------- items, pictures

def test_the_table_holds_each_item_as_it_is_alone(tmp_path, monkeypatch):
    model, rows, real = make(tmp_path).eval(), [], mmsr.Tower.boundary
    table = model.encode_items()
    assert table.shape == (N + 1, D) and not table[0].any() and table[1:].any(1).all()
    same(table, torch.cat([model.items(torch.tensor([i])) for i in range(N + 1)]))
    monkeypatch.setattr(mmsr.Tower, "boundary", lambda self, asked: rows.append((self, asked.tolist())) or real(self, asked))
    batch = make_batch()
    model(batch)
    ids = torch.cat([batch["seq"].flatten(), batch["target"].flatten()]).unique()
    assert len(rows) == 2
    for tower, asked in rows:                                    # once each, and one row for what several items share
        assert len(asked) == len(set(asked)) and set(tower.row_of[ids].tolist()) <= set(asked)


def test_evaluation_encodes_the_catalog_once(shop, tmp_path, monkeypatch):
    data = datasets.load(shop, root=tmp_path / "data")
    model = make(tmp_path, data.catalog(mmsr.READS) | {"n_items": data.n_items})
    calls, real, items = [], model.encode_items, model.items
    monkeypatch.setattr(model, "encode_items", lambda: calls.append("table") or real())
    monkeypatch.setattr(model, "items", lambda ids: calls.append(len(ids)) or items(ids))
    assert evaluate(model, data, model.cfg, "valid", "cpu")["users"] == 60 and calls == ["table", data.n_items + 1]


def test_pictures_of_every_kind(tmp_path, capsys):
    red, grey = Image.new("RGB", (40, 30), "red"), Image.linear_gradient("L")
    red.save(tmp_path / "red.png")
    red.save(tmp_path / "film.gif", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")], duration=50)
    red.convert("P").save(tmp_path / "palette.png"), red.convert("RGBA").save(tmp_path / "rgba.png")
    grey.save(tmp_path / "grey.png"), grey.convert("RGB").save(tmp_path / "rgb.png")
    (tmp_path / "text.jpg").write_text("<html>no picture</html>")
    cut = open(draw(tmp_path / "more")[0], "rb").read()
    (tmp_path / "cut.png").write_bytes(cut[:len(cut) // 2])
    dds = Image.new("RGB", (8, 8)).save(tmp_path / "bad.dds") or bytearray((tmp_path / "bad.dds").read_bytes())
    dds[80:84] = bytes(4)                                        # damaged so that Pillow raises NotImplementedError
    (tmp_path / "bad.dds").write_bytes(dds)
    names = [None, "red.png", "film.gif", "palette.png", "rgba.png", "grey.png", "rgb.png", "rgb.png", "text.jpg", "cut.png",
             "bad.dds", "absent.png", None]
    catalog = make_catalog(tmp_path, 12) | {"image_paths": [name and str(tmp_path / name) for name in names]}
    model = make(tmp_path, catalog, modality="image").eval()
    table, row_of = model.encode_items(), model.towers["image"].row_of.tolist()
    for alike in ((1, 2, 3, 4), (5, 6, 7), (8, 9, 10, 11, 12)):
        same(table[list(alike)], table[[alike[0]] * len(alike)], 1e-6)
    distances = torch.cdist(table[[1, 5, 8]], table[[1, 5, 8]])
    assert (distances + torch.eye(3) > 1e-2).all()
    assert row_of[6] == row_of[7] and row_of[12] == row_of[0] == 0 and len(set(row_of)) == 11
    assert "11 images" in (printed := capsys.readouterr().out) and " 4 unreadable" in printed


# ---------------------------------------------------------------- from the command line, from a folder

def test_from_the_command_line(tmp_path):
    for seed, name in enumerate(("one", "two")):
        write_shop(tmp_path / name, items=30 + 6 * seed, seed=seed)
    flags = "--model mmsr --text_encoder tiny --image_encoder tiny --dim 16 --epochs 1 --cache_dir cache --data".split()
    train = lambda data, *more, ok=True: run("train.py", *flags, data, *more, cwd=tmp_path, ok=ok)
    assert "texts to the boundary" in train("one").stdout
    assert json.loads((tmp_path / "runs/mmsr-one-0/metrics.json").read_text())["users"] == 60
    train("two", "--init", "runs/mmsr-one-0")
    for more in (("--item_encoder", "id"), ("--modality", "text"), ("--modality", "image", "--user_encoder", "gru")):
        train("one", *more, "--out", more[1])
    missing = tmp_path / "no-such-folder"
    for more, words in ((("--text_encoder", missing), "no-such-folder"), (("--fusion", "flava"), "FLAVA"),
                        (("--init", "id/mmsr-one-0"), "does not fit")):
        done = train("one", *more, "--out", "refused", ok=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1 and words in done.stderr


@pytest.fixture
def folders(tmp_path):
    """A BERT and a Swin as they come from Hugging Face, with a vocabulary and pixel statistics of their own."""
    T, words = transformers, "[PAD] [UNK] [CLS] [SEP] [MASK] red blue green soft hard round".split()
    small = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    models = {"text": T.BertModel(T.BertConfig(**small, vocab_size=len(words), max_position_embeddings=60)),
              "image": T.SwinModel(T.SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2, image_size=32))}
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
    (tmp_path / "text/vocab.txt").write_text("\n".join(words))
    T.BertTokenizerFast(str(tmp_path / "text/vocab.txt")).save_pretrained(tmp_path / "text")
    T.ViTImageProcessor(size={"height": 32, "width": 32}, resample=3, image_mean=[.4, .5, .6],
                        image_std=[.2, .3, .25]).save_pretrained(tmp_path / "image")
    return models


def test_checkpoints_in_folders(folders, tmp_path):
    from safetensors.torch import load_file, save_file
    changes, catalog = {f"{m}_encoder": str(tmp_path / m) for m in folders}, make_catalog(tmp_path)
    model = mmsr.MMSR(settings(tmp_path, **changes, tune_blocks=1, max_tokens=5), catalog).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "text")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "image", backend="pil")
    model.encode_items()                                         # fills the caches
    for i in (1, 2, 5, 8):
        given = {"text": tokenizer(catalog["titles"][i], truncation=True, max_length=5, return_tensors="pt"),
                 "image": processor(Image.open(catalog["image_paths"][i]), return_tensors="pt")}
        for m, x in given.items():
            tokens, mask = model.towers[m](torch.tensor([i]))
            with torch.no_grad():
                same(tokens[0, mask[0]], folders[m](**x).last_hidden_state[0])
    # BERT's pooler is often missing and never used: what it starts with must not make another cache
    weights, files = load_file(path := tmp_path / "text/model.safetensors"), []
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, path, {"format": "pt"})
    for seed in (0, 1):
        torch.manual_seed(seed)
        mmsr.MMSR(settings(tmp_path, **changes), catalog).encode_items()
        files.append(set(cached(tmp_path)))
    assert files[0] == files[1]
    for m, name in (("text", "encoder.layer.1.output.dense.weight"), ("image", "layernorm.weight")):
        weights = load_file(path := tmp_path / m / "model.safetensors")
        save_file({k: v for k, v in weights.items() if k != name}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{m}_encoder.*lacks weights"):
            make(tmp_path, **changes)
        save_file(weights, path, {"format": "pt"})


def test_states_beyond_fp16_end_a_run_in_one_sentence(folders, tmp_path):
    folders["text"].embeddings.LayerNorm.bias.data += 1e5
    folders["text"].save_pretrained(tmp_path / "text")
    write_shop(tmp_path / "shop")
    train = lambda *more, ok: run("train.py", "--model", "mmsr", "--data", "shop", "--text_encoder", tmp_path / "text", "--modality",
                                  "text", "--tune_blocks", 3, "--dim", 16, "--epochs", 1, *more, cwd=tmp_path, ok=ok)
    refused = train(ok=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "give cache fp32" in refused.stderr
    train("--cache", "fp32", ok=True)
