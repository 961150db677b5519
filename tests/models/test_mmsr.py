"""MMSR's parts against naive forms, its encoders against Hugging Face's, the cache against none."""
import copy
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data as datasets
from evaluate import evaluate
from helpers import kept_for_backward, refused, run, write_shop
from loop.settings import load_model_file

transformers = pytest.importorskip("transformers")
mmsr = load_model_file("mmsr")
N, D, L = 24, 16, 6
CPU = torch.device("cpu")
TEXT_KINDS = ("bert", "roberta", "electra", "clip", "groupvit", "flava")
IMAGE_KINDS = ("vit_mae", "swin", "resnet", "clip", "groupvit", "flava")
ENCODERS = [
    ("tiny", "tiny"), ("tiny-electra", "tiny-swin"), ("tiny-bert", "tiny-resnet"),
    ("tiny-clip", "tiny-clip"), ("tiny-groupvit", "tiny-groupvit"), ("tiny-flava", "tiny-flava"),
]
STREAMS = [    # text encoder, image encoder
    ("vilt", "vilt"), *(("visual_bert", kind) for kind in ("resnet", "clip", "vit_mae")),
]
FLAVA = dict(fusion="flava", text_encoder="tiny-flava", image_encoder="tiny-flava")
VILT = dict(fusion="stream", text_encoder="tiny-vilt", image_encoder="tiny-vilt")
VISUAL_BERT = dict(fusion="stream", text_encoder="tiny-visual_bert", image_encoder="tiny-resnet")
close = torch.testing.assert_close


def same(found, expected, tolerance=1e-5):
    close(found, expected, rtol=tolerance, atol=tolerance)


def draw(folder, n=5):
    """n pictures of noise, each of its own -> their paths. Drawn once: their times count."""
    paths = [folder / f"{i}.png" for i in range(n)]
    if not folder.exists():
        folder.mkdir(parents=True)
        for i, path in enumerate(paths):
            pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    return list(map(str, paths))


def make_catalog(folder, n=N):
    """Titles of 0 to 6 words, some of them alike; five pictures, none for every third item.

    User 3 has everything.
    """
    words = "red blue green soft hard round".split() * 2
    paths = draw(folder / "pictures")
    items = range(1, n + 1)
    return {
        "n_items": n,
        "titles": ["", *(" ".join(words[i % 5:i % 5 + i % 7]) for i in items)],
        "image_paths": [None, *(paths[i % 5] if i % 3 else None for i in items)],
        "train_seqs": [[1, 2, 3, 2, 7], [9, 4, 5, 6, 8, 10], [n, n - 1, n, 1], list(items), [5]],
    }


def settings(folder, **changes):
    small = dict(
        text_encoder="tiny", image_encoder="tiny", dim=D, max_len=8, dropout=0., cache="fp32",
        cache_dir=str(folder / "cache"),
    )
    return mmsr.Config(**small | changes)


def make(folder, catalog=None, seed=2, **changes):
    """A model whose weights are large enough to matter, its biases among them."""
    torch.manual_seed(seed)
    return shaken(mmsr.Model(settings(folder, **changes), catalog or make_catalog(folder)))


@torch.no_grad()
def shaken(module, by=.1):
    for name, weight in module.named_parameters():
        if name in ("position", "kinds"):    # a part alone leaves them to the whole model
            weight.zero_()
        weight += by * torch.randn_like(weight)
    return module


def make_batch():
    """Row 0 has its targets 2 and 3 elsewhere too; 4 and 2 are targets of two rows."""
    seq = [[0, 0, 1, 2, 3, 2], [9, 4, 5, 6, 8, 10], [0, 0, 0, 0, 24, 23], [3, 4, 5, 6, 7, 8]]
    target = [[0, 0, 2, 3, 2, 7], [4, 5, 6, 8, 10, 12], [0, 0, 0, 0, 23, 0], [4, 5, 6, 7, 8, 2]]
    return {"user": torch.arange(4), "seq": torch.tensor(seq), "target": torch.tensor(target)}


def loss_and_gradients(model, batch=None, seed=1):
    torch.manual_seed(seed)
    loss = model(batch or make_batch())["next_item"]
    return loss, torch.autograd.grad(loss, list(model.parameters()))


# ---------------- fusions (section 3.3)

def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def layer_norm(norm, x, eps):
    deviation = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias


def attention(layer, q, k, heads, see=None):
    """Multi-head attention of (T, D) on (S, D), a head at a time."""
    weights = zip((q, k, k), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3))
    Q, K, V = (x @ weight.T + bias for x, weight, bias in weights)
    d = q.shape[1] // heads
    out = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        weight = (Q[:, part] @ K[:, part].T / d ** .5).exp()
        if see is not None:
            weight = weight * see
        out.append(weight / weight.sum(1, keepdim=True) @ V[:, part])
    return linear(layer.out_proj, torch.cat(out, 1))


def bert_layer(block, x, heads):
    """The same weights in Hugging Face's BertLayer."""
    from transformers.models.bert.modeling_bert import BertLayer
    d = x.shape[1]
    config = transformers.BertConfig(
        hidden_size=d, num_attention_heads=heads, intermediate_size=4 * d,
        attn_implementation="eager",
    )
    bert = BertLayer(config).double().eval()
    own = block.self_attn
    weights = []
    for pair in zip(own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3)):
        weights += pair
    for layer in (own.out_proj, block.norm1, block.linear1, block.linear2, block.norm2):
        weights += [layer.weight, layer.bias]
    bert.load_state_dict(dict(zip(bert.state_dict(), weights, strict=True)))
    out = bert(x[None])
    return (out[0] if isinstance(out, tuple) else out).view_as(x)


def naive_merge(fusion, x, y, heads):
    """BERT on the tokens of both, then the mean."""
    z = torch.cat([x + fusion.kinds[0], y + fusion.kinds[1]])
    for block in fusion.blocks:
        z = bert_layer(block, z, heads)
    return z.mean(0)


def naive_co(fusion, x, y, heads):
    """LXMERT: one cross-attention, two of everything else."""
    x, y = x + fusion.kinds[0], y + fusion.kinds[1]
    a = layer_norm(fusion.norm, x + attention(fusion.cross, x, y, heads), 1e-12)
    b = layer_norm(fusion.norm, y + attention(fusion.cross, y, x, heads), 1e-12)
    a = bert_layer(fusion.blocks[0], a, heads)
    b = bert_layer(fusion.blocks[1], b, heads)
    return linear(fusion.out, torch.cat([a.mean(0), b.mean(0)]))


def naive_coarse(fusion, kind, x, y):
    x = layer_norm(fusion.norm, x.mean(0), 1e-6)
    y = layer_norm(fusion.norm, y.mean(0), 1e-6)
    maps = fusion.maps
    kind, plus, _ = kind.partition("+")
    if kind == "sum":
        z = linear(maps.Wx, x) + linear(maps.Wy, y)
    elif kind == "concat":
        z = linear(maps.W, torch.cat([x, y]))
    elif kind == "gate":
        z = linear(maps.W, 1 / (1 + (-linear(maps.Wx, x)).exp()) * linear(maps.Wy, y))
    else:
        z = linear(maps.W, linear(maps.gamma, x) * y + linear(maps.beta, x))
    deep = [layer for layer in fusion.dnn if isinstance(layer, torch.nn.Linear)]
    assert len(deep) == (3 if plus else 0)
    for layer in deep:
        z = linear(layer, z).clamp(min=0)
    return z


def naive_fusion(fusion, kind, x, y):
    """One item: text tokens x (T, D), picture tokens y (V, D), no padding."""
    if kind == "merge":
        return naive_merge(fusion, x, y, heads=2)
    return naive_co(fusion, x, y, heads=2) if kind == "co" else naive_coarse(fusion, kind, x, y)


def tokens_of(d=D, scale=1.):
    """Tokens of five items: texts with garbage behind the last, pictures, and their masks."""
    random = torch.Generator().manual_seed(4)
    x = scale * torch.randn(5, 7, d, generator=random, dtype=torch.float64)
    y = scale * torch.randn(5, 4, d, generator=random, dtype=torch.float64)
    x_mask = torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]
    x[~x_mask] = 1e3
    return x, x_mask, y, torch.ones(5, 4, dtype=torch.bool)


def make_fusion(folder, by=.1, **changes):
    torch.manual_seed(0)
    return shaken(mmsr.make_fusion(settings(folder, **changes), None).double(), by)


COARSE = [kind + plus for kind in ("sum", "concat", "gate", "film") for plus in ("", "+")]


@pytest.mark.parametrize("training", [True, False])    # without gradients torch takes another road
@pytest.mark.parametrize("kind, layers", [
    *((kind, 1) for kind in COARSE), ("co", 1), ("merge", 1), ("merge", 2),
])
def test_a_fusion_equals_its_definition(kind, layers, training, tmp_path):
    if kind in COARSE:
        d, by, scale = D, .2, .01      # so small that the norm's epsilon counts
    else:
        d, by, scale = 128, .05, 1.    # two heads
    fusion = make_fusion(tmp_path, by, fusion=kind, merge_layers=layers, dim=d).train(training)
    x, x_mask, y, y_mask = tokens_of(d, scale)
    with torch.set_grad_enabled(training):
        found = fusion(x, x_mask, y, y_mask)
    with torch.no_grad():
        expected = [naive_fusion(fusion, kind, x[i, x_mask[i]], y[i]) for i in range(5)]
        close(found, torch.stack(expected))
        x[~x_mask] = -50.
        close(fusion(x, x_mask, y, y_mask), found)


@pytest.mark.parametrize("kind, noisy", [
    ("sum", False), ("gate+", True), ("co", True), ("merge", True),
])
def test_dropout_is_where_the_definitions_have_it(kind, noisy, tmp_path):
    fusion = make_fusion(tmp_path, fusion=kind, dropout=.5)
    tokens = tokens_of()
    assert torch.equal(fusion(*tokens), fusion(*tokens)) != noisy
    fusion.eval()
    assert torch.equal(fusion(*tokens), fusion(*tokens))


@pytest.mark.parametrize("p, p_attention", [(.5, 0.), (0., .5)])
def test_cross_attention_has_both_dropouts(p, p_attention, tmp_path):
    fusion = make_fusion(tmp_path, fusion="co", dropout=.5)
    fusion.blocks.eval()
    assert fusion.dropout.p == fusion.cross.dropout == .5
    fusion.dropout.p = p
    fusion.cross.dropout = p_attention
    assert not torch.equal(fusion(*tokens_of()), fusion(*tokens_of()))


def test_attention_has_twelve_heads_as_in_bert():
    assert mmsr.make_fusion(mmsr.Config(fusion="co"), None).cross.num_heads == 12
    assert mmsr.make_fusion(mmsr.Config(), None).blocks[0].self_attn.num_heads == 12


def test_one_modality_is_the_masked_mean_of_its_projected_tokens(tmp_path):
    for modality in ("text", "image"):
        model = make(tmp_path, modality=modality).eval()
        assert model.fusion is None and set(model.towers) == {modality}
        found = model.items(torch.arange(N + 1))
        for i in range(1, N + 1, 4):
            tokens, mask = model.towers[modality](torch.tensor([i]))
            same(found[i], linear(model.project[modality], tokens[0, mask[0]]).mean(0))


@torch.no_grad()
@pytest.mark.parametrize("tune_blocks", [2, 0])
def test_flava_fusion_is_flavas_own_multimodal_encoder(tune_blocks, tmp_path):
    catalog = make_catalog(tmp_path)
    model = mmsr.Model(settings(tmp_path, tune_blocks=tune_blocks, **FLAVA), catalog).eval()
    whole, tokenizer = mmsr.load_encoder("tiny-flava", "text")
    whole.eval()
    ids = [1, 6, 20]
    expected = []
    for i in ids:
        words = torch.tensor(tokenizer([catalog["titles"][i]], 50)["input_ids"])
        pixels = pixels_of(catalog["image_paths"][i])[None]
        both = whole(words, pixels, torch.ones_like(words))
        expected.append(linear(model.fusion.out, both.multimodal_embeddings[0, 0]))
    same(model.items(torch.tensor(ids)), torch.stack(expected), 1e-4)


@pytest.mark.parametrize("changed", [dict(text_encoder="tiny-bert"), dict(image_encoder="tiny")])
def test_flava_fusion_needs_flava(changed, tmp_path):
    with pytest.raises(ValueError, match="FLAVA"):
        make(tmp_path, **FLAVA | changed)


# ---------------- user encoders (section 3.5, appendix B)

def naive_sasrec(user, x):
    """Items x (L, D) of one user, no padding."""
    see = torch.ones(len(x), len(x)).tril()
    x = layer_norm(user.norm, x + user.position[len(user.position) - len(x):], 1e-5)
    for block in user.blocks:
        x = layer_norm(block.norm1, x + attention(block.self_attn, x, x, 2, see), 1e-5)
        inner = linear(block.linear1, x).clamp(min=0)
        x = layer_norm(block.norm2, x + linear(block.linear2, inner), 1e-5)
    return x


def naive_gru(user, x):
    for layer in range(user.gru.num_layers):
        W = getattr(user.gru, f"weight_ih_l{layer}").chunk(3)
        U = getattr(user.gru, f"weight_hh_l{layer}").chunk(3)
        h = torch.zeros_like(x[0])
        states = []
        for row in x:
            r = torch.sigmoid(W[0] @ row + U[0] @ h)
            z = torch.sigmoid(W[1] @ row + U[1] @ h)
            h = (1 - z) * torch.tanh(W[2] @ row + r * (U[2] @ h)) + z * h
            states.append(h)
        x = torch.stack(states)
    return x


def naive_nextitnet(user, x):
    def convolve(i, x):
        """Width 3: this row, the one d before and the one 2 d before."""
        d = (1, 2, 4, 8)[i % 4]
        weight = user.convolutions[i].weight
        rows = []
        for t in range(len(x)):
            row = user.convolutions[i].bias
            for tap, place in ((2, t), (1, t - d), (0, t - 2 * d)):
                if place >= 0:
                    row = row + weight[:, :, tap] @ x[place]
            rows.append(row)
        return layer_norm(user.norms[i], torch.stack(rows), 1e-5).clamp(min=0)

    for i in range(0, len(user.convolutions), 2):
        x = x + convolve(i + 1, convolve(i, x))
    return x


NAIVE_USERS = {"sasrec": naive_sasrec, "gru": naive_gru, "nextitnet": naive_nextitnet}
every_user_encoder = pytest.mark.parametrize("name", NAIVE_USERS)


def user_encoder(name, folder, **changes):
    torch.manual_seed(0)
    return shaken(mmsr.USERS[name](settings(folder, max_len=20, **changes)).double())


@pytest.mark.parametrize("training", [True, False])
@every_user_encoder
def test_a_user_encoder_equals_its_definition_whatever_the_padding(name, training, tmp_path):
    user = user_encoder(name, tmp_path).train(training)
    lengths = torch.tensor([12, 1, 5, 9])
    real = torch.arange(12) >= 12 - lengths[:, None]
    x = torch.randn(4, 12, D, dtype=torch.float64) * real[..., None]
    with torch.set_grad_enabled(training):
        states = user(x, real)
    with torch.no_grad():
        for b, n in enumerate(lengths.tolist()):
            close(states[b, -n:], NAIVE_USERS[name](user, x[b, -n:]))
        wider = user(F.pad(x, (0, 0, 8, 0)), F.pad(real, (8, 0)))
        close(wider[:, 8:][real], states[real])
        x[:, 7:] += 1
        before = real[:, :7]
        close(user(x, real)[:, :7][before], states[:, :7][before])    # no state sees its future


def test_layers_by_default_and_as_asked(tmp_path):
    def layers(**changes):
        return (
            len(user_encoder("sasrec", tmp_path, **changes).blocks),
            user_encoder("gru", tmp_path, **changes).gru.num_layers,
            len(user_encoder("nextitnet", tmp_path, **changes).convolutions) / 4,
        )

    assert layers() == (2, 4, 2)
    assert layers(layers=3) == (3, 3, 3)


@pytest.mark.parametrize("name, noisy", [("sasrec", True), ("gru", True), ("nextitnet", False)])
def test_dropout_at_the_entrance_of_a_user_encoder(name, noisy, tmp_path):
    user = user_encoder(name, tmp_path, dropout=.5)
    user.blocks = torch.nn.ModuleList()    # SASRec's have their own
    x = torch.randn(2, 5, D, dtype=torch.float64)
    real = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(user(x, real), user(x, real)) != noisy
    user.eval()
    assert torch.equal(user(x, real), user(x, real))


@pytest.mark.parametrize("changes", [
    {}, {"modality": "text"}, {"image_encoder": "tiny-swin", "cache": "off"},
], ids=str)
def test_many_items_in_parts_give_the_same_and_keep_less(changes, tmp_path, monkeypatch):
    model = make(tmp_path, **changes).eval()

    def loss_gradients_and_kept():
        with kept_for_backward() as kept:
            loss, gradients = loss_and_gradients(model)
        return loss, gradients, sum(kept)

    loss, gradients, kept = loss_gradients_and_kept()
    monkeypatch.setattr(mmsr, "PART", 5)
    loss_of_parts, gradients_of_parts, kept_by_parts = loss_gradients_and_kept()
    torch.testing.assert_close(loss_of_parts, loss)
    torch.testing.assert_close(gradients_of_parts, gradients, rtol=1e-4, atol=1e-6)
    assert kept_by_parts < .6 * kept


def test_parts_draw_the_same_dropout_when_they_are_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mmsr, "PART", 5)
    model = make(tmp_path, dropout=.3).train()
    weight = model.project["text"].bias

    def loss():
        torch.manual_seed(7)
        return model.items(torch.arange(1, 20)).double().square().sum()

    found, = torch.autograd.grad(loss(), weight)
    at = int(found.abs().argmax())
    values = []
    for step in (1e-2, -1e-2):
        weight.data[at] += step
        values.append(loss().item())
        weight.data[at] -= step
    assert found[at].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=.01)


def test_caches_share_one_budget_of_the_gpu():
    """The smallest first; what does not fit stays where it is."""
    sizes = (40, 10, 25)
    for room, moved in ((400, "yyy"), (299, "nyy"), (300, "yyy"), (140, "nyy"), (99, "nyn"),
                        (39, "nnn")):
        caches = [mock.Mock(hidden=torch.zeros(size)) for size in sizes]
        mmsr.move(caches, torch.device("meta"), room)
        assert "".join("y" if cache.hidden.is_meta else "n" for cache in caches) == moved


def test_a_gru_computes_in_the_precision_of_its_weights(tmp_path):
    user = mmsr.GRU(settings(tmp_path))
    x = torch.randn(2, 5, D).bfloat16()
    real = torch.ones(2, 5, dtype=torch.bool)
    expected = user(x.float(), real)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(user(x, real), expected)


def test_weights_at_the_start(tmp_path):
    model = mmsr.Model(settings(tmp_path, dim=128, max_len=50), make_catalog(tmp_path))
    xavier = (2 / (64 + 128)) ** .5
    deviations = [
        (model.fusion.kinds, .02), (model.user.position, .02),
        (model.project["text"].weight, xavier),
    ]
    for weight, deviation in deviations:
        assert weight.std().item() == pytest.approx(deviation, rel=.15)
    whole, _ = mmsr.load_encoder("tiny", "text")
    assert tensors_equal(
        whole.encoder.layer[-1].state_dict(), model.towers["text"].blocks[-1].state_dict()
    )


def tensors_equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[k], others[k]) for k in some)


@every_user_encoder
def test_what_stands_at_padding_changes_no_score(name, tmp_path):
    model = make(tmp_path, user_encoder=name).eval()
    batch = make_batch()
    table = model.encode_items()
    scores = model.score(batch, table)
    real = batch["seq"] != 0
    last = model.user(table[batch["seq"]] * real[..., None], real)[:, -1]
    close(scores[:, 1:], (last[:, None] * table[None, 1:]).sum(-1))
    table[0] = 7.
    close(model.score(batch, table)[:, 1:], scores[:, 1:])


@pytest.mark.parametrize("loss", ["bce", "in_batch"])
@every_user_encoder
def test_with_ids_padding_changes_no_loss(name, loss, tmp_path):
    model = make(tmp_path, item_encoder="id", user_encoder=name, loss=loss)
    assert not model.items(torch.tensor([0])).any() and not model.encode_items()[0].any()
    assert not model.towers
    batch = make_batch()
    wider = batch | {key: F.pad(batch[key], (2, 0)) for key in ("seq", "target")}
    close(loss_and_gradients(model, wider)[0], loss_and_gradients(model, batch)[0])


# ---------------- encoders (section 3.2)

def pixels_of(path):
    grey = Image.new("RGB", (9, 9), (128, 128, 128))
    picture = Image.open(path).convert("RGB") if path else grey
    pixels = np.array(picture.resize((64, 64), Image.BICUBIC), np.float32)
    return (torch.tensor(pixels).permute(2, 0, 1) / 255 - .5) / .5


def load(kind, modality):
    """A tiny model with weights large enough to matter, batch statistics among them.

    -> the model of that modality, what reads its inputs
    """
    whole, other = mmsr.load_encoder(f"tiny-{kind}", modality)
    parts = ("text_model",) if modality == "text" else ("vision_model", "image_model")
    model = next((getattr(whole, part) for part in parts if hasattr(whole, part)), whole)
    torch.manual_seed(0)
    shaken(model, .05)
    for name, values in model.named_buffers():
        if "running" in name:
            values += .3 * torch.rand_like(values)
    return model, other


class Alone:
    """Hugging Face's model, an input at a time."""

    def __init__(self, model, modality, mask_ratio=0., noise=None):
        self.model = copy.deepcopy(model).eval()
        self.modality = modality
        self.more = {}
        if model.config.model_type == "vit_mae":
            self.model.config.mask_ratio = mask_ratio
            noise = torch.arange(16.) if noise is None else noise
            self.more = {"noise": noise[None]}    # it keeps the patches with the least

    @torch.no_grad()
    def __call__(self, text_or_path):
        """-> last hidden state (T, width)"""
        if self.modality == "text":
            ids = torch.tensor(mmsr.tiny_tokens([text_or_path], 50)["input_ids"])
            return self.model(ids, torch.ones_like(ids)).last_hidden_state[0]
        hidden = self.model(pixels_of(text_or_path)[None], **self.more).last_hidden_state[0]
        return hidden.flatten(1).T if hidden.dim() == 3 else hidden


def make_tower(folder, model, other, modality, wanted, **changes):
    """A tower of a copy of the model, ready to be read."""
    cfg = settings(folder, **changes)
    encoder = mmsr.encoder_of(copy.deepcopy(model), modality, cfg.mask_ratio)
    tower = mmsr.Tower(encoder, {modality: other}, {modality: wanted}, cfg).eval()
    tower.prepare(CPU)
    return tower


SOME = torch.tensor([5, 2, 0, 6, 2, 13, 9])    # of different lengths, one twice, in no order


@pytest.mark.parametrize("cache", ["fp32", "off"])
@pytest.mark.parametrize("modality, kind", [
    *(("text", kind) for kind in TEXT_KINDS), *(("image", kind) for kind in IMAGE_KINDS),
])
def test_an_encoder_gives_what_hugging_face_gives_for_each_item_alone(
    modality, kind, cache, tmp_path
):
    model, other = load(kind, modality)
    wanted = make_catalog(tmp_path)["titles" if modality == "text" else "image_paths"]
    alone = Alone(model, modality)
    expected = [alone(wanted[i]) for i in SOME]
    for n in (-1, 0, 1, 2):
        tower = make_tower(tmp_path, model, other, modality, wanted, tune_blocks=n, cache=cache)
        assert len(tower.blocks) == max(n, 0)
        tokens, mask = tower(SOME)
        assert tower.width == tokens.shape[2]
        for row, real, hidden in zip(tokens, mask, expected):
            same(row[real], hidden)
        assert torch.equal(tower(SOME)[0], tokens)    # and so again


@torch.no_grad()
def vilt_alone(text, image, ids, pixels):
    return text(ids, pixel_values=pixels).last_hidden_state[0]


@torch.no_grad()
def visual_bert_alone(text, image, ids, pixels):
    more = {"noise": torch.arange(16.)[None]} if image.config.model_type == "vit_mae" else {}
    seen = image(pixels, **more).last_hidden_state
    seen = seen.flatten(2).mT if seen.dim() == 4 else seen
    return text(ids, visual_embeds=seen).last_hidden_state[0]


@pytest.mark.parametrize("cache", ["fp32", "off"])
@pytest.mark.parametrize("text_kind, image_kind", STREAMS)
def test_one_stream_gives_what_hugging_face_gives_for_each_pair_alone(
    text_kind, image_kind, cache, tmp_path
):
    catalog = make_catalog(tmp_path)
    wanted = {"text": catalog["titles"], "image": catalog["image_paths"]}
    text, tokenizer = load(text_kind, "text")
    image, statistics = load(image_kind, "image")
    image.config.mask_ratio = 0.
    alone = vilt_alone if text_kind == "vilt" else visual_bert_alone
    expected = []
    for i in SOME:
        ids = torch.tensor(tokenizer([catalog["titles"][i]], 50)["input_ids"])
        pixels = pixels_of(catalog["image_paths"][i])[None]
        expected.append(alone(text.eval(), image.eval(), ids, pixels))
    names = dict(text_encoder=f"tiny-{text_kind}", image_encoder=f"tiny-{image_kind}")
    for n in (-1, 0, 1, 2, 4):
        cfg = settings(tmp_path, fusion="stream", tune_blocks=n, cache=cache, **names)
        encoders = {
            "text": copy.deepcopy(text), "image": mmsr.encoder_of(copy.deepcopy(image), "image"),
        }
        model = mmsr.one_stream(**encoders, cfg=cfg)
        readers = {"text": tokenizer, "image": statistics}
        tower = mmsr.Tower(model, readers, wanted, cfg).eval()
        tower.prepare(CPU)
        assert len(tower.blocks) == max(n, 0)
        tokens, mask = tower(SOME)
        for row, real, hidden in zip(tokens, mask, expected):
            found = row[real]
            words = len(hidden) - (17 if image_kind in ("vilt", "clip", "vit_mae") else 4)
            same(found[:words], hidden[:words])
            # ViLT shuffles its patches: they are compared in the order of their first numbers
            found, hidden = found[words:], hidden[words:]
            same(found[found[:, 0].argsort()], hidden[hidden[:, 0].argsort()])
        assert torch.equal(tower(SOME)[0], tokens)


def test_one_stream_has_a_row_for_each_pair(tmp_path, computed):
    catalog = make_catalog(tmp_path)
    model = make(tmp_path, catalog, **VILT)
    assert list(model.towers) == ["pair"] and model.fusion is None
    for _ in range(2):
        loss_and_gradients(model)
    pairs = {("", None), *zip(catalog["titles"], catalog["image_paths"])}
    assert computed == [("pair", len(pairs))]
    [name] = caches(tmp_path)
    assert name.startswith("pair-")


@torch.no_grad()
def test_an_item_of_one_stream_is_the_masked_mean_of_its_projected_tokens(tmp_path):
    model = make(tmp_path, **VISUAL_BERT).eval()
    found = model.items(torch.arange(N + 1))
    for i in range(1, N + 1, 5):
        tokens, mask = model.towers["pair"](torch.tensor([i]))
        same(found[i], linear(model.project["pair"], tokens[0, mask[0]]).mean(0))


@pytest.mark.parametrize("changes, words", [
    (dict(fusion="stream"), "text_encoder of the type roberta .* only vilt, visual_bert"),
    (VILT | dict(image_encoder="tiny"), "needs ViLT as text_encoder and as image_encoder"),
    (VISUAL_BERT | dict(image_encoder="tiny-bert"), "image_encoder of the type bert"),
    (VILT | dict(fusion="merge"), "text_encoder of the type vilt .* give fusion stream"),
    (VILT | dict(modality="text"), "text_encoder of the type vilt .* give fusion stream"),
    (VILT | dict(modality="image"), "image_encoder of the type vilt .* give fusion stream"),
    (VILT | dict(tune_image_blocks=1), "tune_image_blocks 1 must be -2 for fusion stream"),
    (VILT | dict(tune_blocks=5), "tune_blocks 5 of text_encoder must be from 0 to 4"),
    (dict(image_encoder="tiny-swin", mask_ratio=.5), "mask_ratio 0.5 must be 0 for all"),
    (dict(mask_ratio=1.), "mask_ratio 1.0 must be from 0 to below 1"),
], ids=str)
def test_combinations_that_make_no_model_are_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words) as raised:
        make(tmp_path, **changes)
    assert "\n" not in str(raised.value)


def test_tokens_of_another_width_need_a_projection_that_is_trained(tmp_path, monkeypatch):
    bert = dict(mmsr.TINY["visual_bert"], visual_embedding_dim=48)
    monkeypatch.setitem(mmsr.TINY, "visual_bert", bert)
    with pytest.raises(ValueError, match="width 64, text_encoder reads 48: give another, or tune"):
        make(tmp_path, **VISUAL_BERT)
    model = make(tmp_path, tune_blocks=-1, **VISUAL_BERT)
    projection = model.towers["pair"].whole.bert.embeddings.visual_projection
    assert projection.in_features == 64
    model(make_batch())["next_item"].backward()
    assert projection.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("mask_ratio, kept", [(.5, 8), (.75, 4), (.99, 0)])
def test_a_mae_leaves_out_a_share_of_the_patches_always_the_same(mask_ratio, kept, tmp_path):
    model, other = load("vit_mae", "image")
    paths = make_catalog(tmp_path)["image_paths"]
    items = torch.tensor([2, 4, 3])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    noise = torch.ones(16)
    noise[order[:kept].sort().values] = torch.arange(kept) / 16
    alone = Alone(model, "image", mask_ratio, noise)
    for cache in ("fp32", "off"):
        changes = dict(mask_ratio=mask_ratio, cache=cache)
        tower = make_tower(tmp_path, model, other, "image", paths, **changes)
        tokens, mask = tower(items)
        assert tokens.shape[1] == 1 + kept and mask.all()
        for row, i in zip(tokens, items):
            same(row, alone(paths[i]))
        assert torch.equal(tower(items)[0], tokens)


def test_the_number_of_trained_blocks_may_differ_between_the_encoders(tmp_path):
    def blocks(**changes):
        towers = make(tmp_path, **changes).towers
        return [-1 if tower.whole else len(tower.blocks) for tower in towers.values()]

    assert blocks() == [2, 2]
    assert blocks(tune_blocks=3) == [3, 3]
    assert blocks(tune_blocks=3, tune_image_blocks=1) == [3, 1]
    assert blocks(tune_image_blocks=0) == [2, 0]
    assert blocks(tune_blocks=-1, tune_image_blocks=2) == [-1, 2]
    assert blocks(modality="image", tune_image_blocks=-1) == [-1]
    assert blocks(modality="text", tune_image_blocks=-1) == [2]


@pytest.mark.parametrize("changes", [
    *(dict(text_encoder=text, image_encoder=image) for text, image in ENCODERS),
    FLAVA, VILT, VISUAL_BERT,
], ids=str)
def test_a_whole_encoder_is_trained_and_has_no_cache(changes, tmp_path):
    model = make(tmp_path, tune_blocks=-1, **changes)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    buffers = [buffer.clone() for buffer in model.buffers()]
    optimizer = torch.optim.AdamW(model.param_groups(model.cfg), lr=1e-3)
    torch.manual_seed(0)
    model(make_batch())["next_item"].backward()
    optimizer.step()
    # a vector that no last hidden state depends on, or that softmax takes away
    idle = ("pooler", "post_layernorm", "mask_token", "key.bias", "k_proj.bias")
    fixed = "towers.image.whole.embeddings.position_embeddings"    # MAE's, of sines
    for name, weight in model.named_parameters():
        if not any(part in name for part in idle) and weight.requires_grad:
            assert weight.grad is not None and not torch.equal(weight, before[name]), name
        elif weight.requires_grad is False:
            assert name == fixed
    assert all(map(torch.equal, buffers, model.buffers()))    # statistics of BatchNorm among them
    assert not (tmp_path / "cache").exists()
    scores = model.eval().score(make_batch(), model.encode_items())
    assert scores.shape == (4, N + 1) and scores.isfinite().all()


def test_a_whole_encoder_has_the_gradients_of_hugging_faces(tmp_path):
    titles = make_catalog(tmp_path)["titles"]
    model, other = load("roberta", "text")
    tower = make_tower(tmp_path, model, other, "text", titles, tune_blocks=-1)
    tokens, mask = tower(torch.tensor([6]))
    tokens[mask].square().sum().backward()
    ids = torch.tensor(mmsr.tiny_tokens([titles[6]], 50)["input_ids"])
    model.eval()(ids).last_hidden_state.square().sum().backward()
    found = dict(tower.whole.named_parameters())
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            same(found[name].grad, weight.grad, 1e-3)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_every_block_may_be_trained_but_no_more(kind, tmp_path):
    model, other = load(kind, "image")
    paths = make_catalog(tmp_path)["image_paths"]
    last_stage = ("swin", "resnet", "groupvit")    # ResNet's third reads another shape
    most = 2 if kind in last_stage else 4
    tower = make_tower(tmp_path, model, other, "image", paths, tune_blocks=most)
    same(tower(torch.tensor([2]))[0][0], Alone(model, "image")(paths[2]))
    for n in (most + 1, 5):
        with pytest.raises(ValueError, match="tune_blocks"):
            make_tower(tmp_path, model, other, "image", paths, tune_blocks=n)


def test_at_most_so_many_tokens_and_the_same_title_once(tmp_path):
    titles = ["", "red mug", " ".join(["word"] * 90), "red mug", ""]
    model, other = load("roberta", "text")
    tower = mmsr.Tower(model, {"text": other}, {"text": titles}, settings(tmp_path))
    assert [len(ids) for ids in tower.bottom.inputs["text"]] == [2, 4, 50]
    assert tower.row_of.tolist() == [0, 1, 2, 1, 0]
    assert mmsr.Config().max_tokens == 50


def test_tokens_of_the_tiny_encoders():
    def tokens(text):
        return mmsr.tiny_tokens([text], 50)["input_ids"][0]

    assert tokens("red") == [0, 2721, 2]    # in every process
    assert tokens("Red MUG!") == tokens("red  mug") != tokens("mug red")


@pytest.mark.parametrize("modality, name", [
    ("text", "tiny-swin"), ("image", "tiny-bert"), ("text", "tiny-nothing"),
])
def test_an_encoder_of_another_kind_is_refused(modality, name, tmp_path):
    with pytest.raises(ValueError, match=f"{modality}_encoder"):
        make(tmp_path, **{f"{modality}_encoder": name})


@pytest.mark.parametrize("setting, value", [
    ("merge_layers", 0), ("tune_blocks", -2), ("tune_image_blocks", -3), ("encoder_lr", 0.),
    ("encoder_weight_decay", -1.),
])
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} {value} must|^{setting} {value} is"):
        mmsr.Config(**{setting: value})


def test_settings_are_the_papers():
    cfg = mmsr.Config()
    recipe = (cfg.optimizer, cfg.schedule, cfg.lr, cfg.encoder_lr, cfg.epochs)
    assert recipe == ("adamw", "step", 1e-4, 1e-4, 150)                   # section 4.2
    assert (cfg.weight_decay, cfg.encoder_weight_decay) == (.1, 0)        # section 4.2
    assert (cfg.dim, cfg.heads, cfg.layers, cfg.max_len) == (768, 2, 0, 20)    # appendices B, C
    assert (cfg.fusion, cfg.merge_layers, cfg.tune_blocks, cfg.loss) == ("merge", 1, 2, "bce")
    assert cfg.dropout in (.1, .3, .5) and cfg.batch_size in (64, 128, 256)


def test_heads_are_sasrecs_alone():
    assert mmsr.Config(user_encoder="gru", dim=64, heads=3).heads == 3


# ---------------- the cache

@pytest.fixture
def computed(monkeypatch):
    """How many inputs go through a frozen bottom at a time, by modality."""
    calls = []
    real = mmsr.Bottom.hidden

    def hidden(self, read, device):
        calls.append((self.modality, len(read)))
        return real(self, read, device)

    monkeypatch.setattr(mmsr.Bottom, "hidden", hidden)
    return calls


def caches(folder):
    return {path.name: path.stat().st_size for path in (folder / "cache").iterdir()}


@pytest.mark.parametrize("changes", [
    *(dict(text_encoder=text, image_encoder=image) for text, image in ENCODERS), VILT, VISUAL_BERT,
], ids=str)
def test_a_cache_changes_no_number(changes, tmp_path, computed):
    def found_with(cache):
        model = make(tmp_path, cache=cache, dropout=.3, **changes)
        if "pair" in model.towers:    # padding stands elsewhere, so dropout would hit other tokens
            model.towers.eval()
        return loss_and_gradients(model)

    modalities = ("pair",) if "fusion" in changes else ("text", "image")
    exact, fp32 = found_with("off"), found_with("fp32")
    same(fp32, exact)
    loss, gradients = found_with("fp16")
    assert loss.item() == pytest.approx(exact[0].item(), rel=.02)
    error = [found - right for found, right in zip(gradients, exact[1])]
    assert norm_of(error) < .1 * norm_of(exact[1])    # some ReLU turns over
    found = {}
    for path in (tmp_path / "cache").iterdir():
        found[path.name.partition("-")[0], path.suffixes[0]] = np.load(path)
    assert len(found) == len(caches(tmp_path)) == 2 * len(modalities)
    for modality in modalities:
        half, whole = found[modality, ".fp16"], found[modality, ".fp32"]
        assert half.dtype == np.float16 and whole.dtype == np.float32
        assert half.shape == whole.shape
    computed.clear()
    same(found_with("fp32"), fp32, 0)
    assert not computed    # the second model opens what the first one made


def norm_of(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


def test_a_bottom_runs_once_for_each_distinct_input(tmp_path, computed):
    model = make(tmp_path)
    for _ in range(2):
        loss_and_gradients(model)
    model.eval().encode_items()
    titles = len(set(make_catalog(tmp_path)["titles"]))
    assert sorted(computed) == [("image", 6), ("text", titles)]    # five pictures and the grey one
    assert all(tower.bottom is None for tower in model.towers.values())    # its memory is free


@pytest.mark.parametrize("image", ["tiny", "tiny-swin"])
def test_another_training_opens_the_same_cache(image, tmp_path, computed):
    loss_and_gradients(make(tmp_path, image_encoder=image))
    computed.clear()
    trained = shaken(make(tmp_path, image_encoder=image))    # as with weights of a checkpoint
    loss_and_gradients(trained)
    assert not computed


class Caches:
    """Towers of one modality in a folder."""

    def __init__(self, folder, modality, kind):
        self.folder = folder
        self.modality = modality
        self.kind = kind

    def new(self, wanted, other=None, weight=None, config=(), **changes):
        """Does a tower make a new cache? weight: one that differs; config: what differs in it."""
        model, reader = load(self.kind, self.modality)
        model.config.update(dict(config))
        if weight:
            with torch.no_grad():
                model.get_parameter(weight).flatten()[5] += 1e-3
        before = set((self.folder / "cache").glob("*"))
        make_tower(self.folder, model, other or reader, self.modality, wanted, **changes)
        return set((self.folder / "cache").glob("*")) != before


def test_a_cache_of_texts_belongs_to_its_tokens_and_frozen_weights(tmp_path):
    titles = make_catalog(tmp_path)["titles"]
    texts = Caches(tmp_path, "text", "roberta")
    assert texts.new(titles) and not texts.new(titles)
    assert not texts.new(titles, weight="encoder.layer.3.output.dense.weight")    # a trained one
    for changes in (
        dict(weight="encoder.layer.1.output.dense.weight"),
        dict(weight="embeddings.word_embeddings.weight"),
        dict(config={"layer_norm_eps": 1e-3}),
        dict(tune_blocks=1), dict(max_tokens=4), dict(cache="fp16"),
    ):
        assert texts.new(titles, **changes), changes
    assert texts.new([*titles[:-1], "another"])


def test_a_cache_of_pictures_belongs_to_their_files_and_statistics(tmp_path):
    paths = make_catalog(tmp_path)["image_paths"]
    pictures = Caches(tmp_path, "image", "resnet")
    assert pictures.new(paths) and not pictures.new(paths)
    assert pictures.new(paths, other=([.4] * 3, [.5] * 3))
    assert pictures.new(paths, other=([.5] * 3, [.4] * 3))
    assert pictures.new([None, *paths[:0:-1]])
    later = os.stat(paths[2]).st_mtime + 5
    os.utime(paths[2], (later, later))
    assert pictures.new(paths)
    Image.new("RGB", (9, 9)).save(paths[2])    # of another size, with the same time
    os.utime(paths[2], (later, later))
    assert pictures.new(paths)


def test_a_fill_that_is_killed_leaves_nothing_to_be_taken_for_a_cache(tmp_path, monkeypatch):
    catalog = make_catalog(tmp_path, 40)
    catalog["titles"] = ["", *(f"thing {i}" for i in range(40))]
    exact = make(tmp_path, catalog, cache="off").eval().encode_items()
    real = mmsr.Bottom.hidden
    sizes = []

    def killed(self, inputs, device):
        sizes.append(len(inputs))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return real(self, inputs, device)

    with monkeypatch.context() as patch:
        patch.setattr(mmsr.Bottom, "hidden", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, catalog).encode_items()
    assert sizes == [32, 9] and not caches(tmp_path)
    same(make(tmp_path, catalog).eval().encode_items(), exact)


# ---------------- what is trained

@pytest.mark.parametrize("text, image, fusion", [
    *((*both, "merge") for both in ENCODERS), (*ENCODERS[-1], "flava"),
    *((f"tiny-{text}", f"tiny-{image}", "stream") for text, image in STREAMS[:2]),
])
def test_the_top_is_trained_and_the_bottom_is_not(text, image, fusion, tmp_path):
    changes = dict(text_encoder=text, image_encoder=image, fusion=fusion)
    model = make(tmp_path, cache="off", **changes)
    bottoms = [tower.bottom.model for tower in model.towers.values()]

    def frozen():
        states = [value for bottom in bottoms for value in bottom.state_dict().values()]
        return [value.clone() for value in (*states, *model.buffers())]

    optimizer = torch.optim.AdamW(model.param_groups(model.cfg), lr=1e-3)
    before = frozen()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(make_batch())["next_item"].backward()
        for name, weight in model.named_parameters():
            if not name.endswith(("key.bias", "k_proj.bias")):    # they change no softmax
                assert weight.grad.abs().max() > 1e-6, name
        optimizer.step()
    assert all(map(torch.equal, before, frozen()))    # statistics of BatchNorm among them
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, weights[name]), name
    towers = [name.split(".") for name in weights if name.startswith("towers")]
    blocks = {(m, int(number[0])) for _, m, part, *number in towers if part == "blocks"}
    assert blocks == {(m, i) for m in model.towers for i in (0, 1)}
    scores = model.eval().score(make_batch(), model.encode_items())
    assert scores.shape == (4, N + 1) and scores.isfinite().all()


@pytest.mark.parametrize("text, image", [("tiny-clip", "tiny-resnet"), ("tiny", "tiny-swin")])
def test_weights_belong_to_no_catalog(text, image, tmp_path):
    encoders = dict(text_encoder=text, image_encoder=image)
    small = make(tmp_path, **encoders)
    state = dict(small.state_dict())    # as it comes from a file: without versions of its parts
    assert set(state) == {name for name, _ in small.named_parameters()}
    assert not [key for key in state if "embeddings" in key or "running" in key or "index" in key]
    other = make(tmp_path, make_catalog(tmp_path, 31), seed=3, **encoders)
    other.init_from(state)
    table = other.eval().encode_items()
    same(table[:N + 1], small.eval().encode_items())    # their first items are alike


@pytest.mark.parametrize("changes", [
    dict(dim=8), dict(fusion="sum"), dict(tune_blocks=1), dict(user_encoder="gru"),
    dict(modality="text"),
], ids=str)
def test_weights_of_other_settings_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="differ"):
        make(tmp_path, **changes).init_from(make(tmp_path).state_dict())


def test_weights_of_ids_belong_to_their_catalog(tmp_path):
    few = make(tmp_path, item_encoder="id")
    many = make(tmp_path, make_catalog(tmp_path, 31), item_encoder="id")
    with pytest.raises(ValueError, match="item.weight"):
        many.init_from(few.state_dict())


@pytest.mark.parametrize("changes", [
    {}, FLAVA, dict(modality="text"), dict(item_encoder="id"), dict(tune_blocks=0),
], ids=str)
def test_groups_of_the_optimizer(changes, tmp_path):
    model = make(tmp_path, encoder_lr=.01, encoder_weight_decay=.2, **changes)
    groups = model.param_groups(model.cfg)
    optimizer = torch.optim.AdamW(groups, lr=.03, weight_decay=.4)
    rates = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            assert weight not in rates    # each weight once
            rates[weight] = (group["lr"], group["weight_decay"])
    pre_trained = ("towers.",)
    if changes == FLAVA:
        pre_trained += ("fusion.x.", "fusion.y.", "fusion.model.")
    for name, weight in model.named_parameters():
        expected = (.01, .2) if name.startswith(pre_trained) else (.03, .4)
        assert rates.pop(weight) == expected, name
    assert not rates


# ---------------- objectives

def test_negatives_are_uniform_over_what_the_user_lacks(tmp_path):
    model = make(tmp_path, item_encoder="id")
    draws = 20_000
    for user, seq in enumerate(make_catalog(tmp_path)["train_seqs"]):
        users = torch.full((draws // 10,), user)
        counts = model.negatives(users, 10).flatten().bincount(minlength=N + 1)
        lacks = [i for i in range(1, N + 1) if i not in seq] or [0]    # user 3 has everything
        assert counts[lacks].sum() == counts.sum() == draws
        expected = draws / len(lacks)
        chi_square = ((counts[lacks] - expected) ** 2 / expected).sum()
        n = len(lacks) - 1    # the mean of chi-square; its variance is twice that
        assert chi_square <= n + 5 * (2 * n) ** .5


def test_negatives_of_several_users_at_once(tmp_path):
    model = make(tmp_path, item_encoder="id")
    seqs = make_catalog(tmp_path)["train_seqs"]
    users = [3, 0, 3, 1]
    for _ in range(20):
        for user, row in zip(users, model.negatives(torch.tensor(users), 2).tolist()):
            assert row == [0, 0] if user == 3 else 0 not in row
            assert not set(row) & set(seqs[user])


@torch.no_grad()
def places(model, batch):
    """Of each place that has a target: its row, its position, its scores of all items."""
    seq, target = batch["seq"], batch["target"]
    table = torch.cat([model.items(torch.tensor([i])) for i in range(N + 1)])
    for b in range(len(seq)):
        states = model.user(table[seq[b:b + 1]], seq[b:b + 1] != 0)[0]
        for t in range(L - 1 if model.cfg.prefixes else 0, L):
            if target[b, t]:
                yield b, t, (table @ states[t]).tolist()


def naive_bce(model, batch, negative):
    """Eq. (6)"""
    losses = []
    for b, t, scores in places(model, batch):
        loss = math.log1p(math.exp(-scores[batch["target"][b, t]]))
        if negative[b, t]:
            loss += math.log1p(math.exp(scores[negative[b, t]]))
        losses.append(loss)
    return sum(losses) / len(losses)


def naive_in_batch(model, batch, sales):
    """Softmax over the targets of the batch that are not the user's own (reading 9)."""
    found = list(places(model, batch))
    targets = [(b, batch["target"][b, t].item()) for b, t, _ in found]
    losses = []
    for (b, right), (_, _, scores) in zip(targets, found):
        own = {*batch["seq"][b].tolist(), *(item for row, item in targets if row == b)} - {right}
        logits = {i: scores[i] - math.log(max(sales[i], 1)) for _, i in targets if i not in own}
        losses.append(math.log(sum(map(math.exp, logits.values()))) - logits[right])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("loss", ["bce", "in_batch"])
def test_the_loss_equals_its_definition(loss, prefixes, tmp_path):
    model = make(tmp_path, loss=loss, prefixes=prefixes).eval()
    batch = make_batch()
    torch.manual_seed(3)
    found = model(batch)["next_item"].item()
    if loss == "bce":
        torch.manual_seed(3)
        negative = model.negatives(batch["user"], L)
        assert not negative[3].any()    # user 3 has everything: no loss from a negative
        expected = naive_bce(model, batch, negative)
    else:
        sales = np.bincount(sum(make_catalog(tmp_path)["train_seqs"], []), minlength=N + 1)
        expected = naive_in_batch(model, batch, sales)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("changes", [
    dict(fusion="co"), dict(user_encoder="gru"),
    dict(loss="in_batch", user_encoder="nextitnet", text_encoder="tiny-clip"),
], ids=str)
def test_bfloat16_changes_little(changes, tmp_path):
    model = make(tmp_path, **changes).eval()
    exact, _ = loss_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model)
    assert loss.item() == pytest.approx(exact.item(), rel=.03)
    assert all(slope.dtype == torch.float32 and slope.isfinite().all() for slope in gradients)


@pytest.mark.parametrize("loss", ["bce", "in_batch"])
def test_a_target_of_0_counts_nothing(loss, tmp_path):
    model = make(tmp_path, item_encoder="id", loss=loss)
    batch = make_batch()
    batch["target"][3] = 0
    without = {key: value[:3] for key, value in batch.items()}
    same(loss_and_gradients(model, batch), loss_and_gradients(model, without))
    batch["target"][:] = 0
    found, gradients = loss_and_gradients(model, batch)
    assert found == 0 and not any(slope.any() for slope in gradients)


# ---------------- items and pictures

class Watched:
    """What is below a boundary; keeps the rows that it is asked for."""

    def __init__(self, below):
        self.below = below
        self.asked = []

    def boundary(self, rows):
        self.asked.append(rows.tolist())
        return self.below.boundary(rows)


def test_a_step_encodes_each_distinct_item_once(tmp_path):
    model = make(tmp_path)
    model.prepare(CPU)
    for tower in model.towers.values():
        tower.below = Watched(tower.below)
    batch = make_batch()
    model(batch)
    ids = torch.cat([batch["seq"], batch["target"]]).unique()
    for tower in model.towers.values():
        [asked] = tower.below.asked
        assert len(asked) == len(set(asked))    # one row for what several items share
        assert set(tower.row_of[ids].tolist()) <= set(asked)


def test_the_table_holds_each_item_as_it_is_alone(tmp_path):
    model = make(tmp_path).eval()
    table = model.encode_items()
    assert table.shape == (N + 1, D) and not table[0].any() and table[1:].any(1).all()
    same(table, torch.cat([model.items(torch.tensor([i])) for i in range(N + 1)]))


@pytest.fixture
def encoded(monkeypatch):
    """How many items a model encodes at a time."""
    sizes = []
    real = mmsr.Model.items

    def items(self, ids):
        sizes.append(len(ids))
        return real(self, ids)

    monkeypatch.setattr(mmsr.Model, "items", items)
    return sizes


def test_a_large_catalog_goes_in_parts(tmp_path, encoded):
    catalog = make_catalog(tmp_path, 600)
    catalog["titles"] = ["", *(f"{title} {i}" for i, title in enumerate(catalog["titles"][1:]))]
    model = make(tmp_path, catalog).eval()
    table = model.encode_items()
    assert not table.requires_grad
    assert encoded == [256, 256, 89]
    some = torch.tensor([1, 256, 257, 600])
    same(table[some], model.items(some))


def test_items_with_one_title_and_one_picture_tie_to_the_last_bit(tmp_path, encoded):
    catalog = make_catalog(tmp_path, 600)
    for key in ("titles", "image_paths"):
        for i in (300, 599):
            catalog[key][i] = catalog[key][1]
        catalog[key][600] = catalog[key][0]    # as padding has: but it is an item
    catalog["titles"][2] = "a long title that makes its part of the catalog longer than others are"
    table = make(tmp_path, catalog).eval().encode_items()
    assert table[1].equal(table[300]) and table[1].equal(table[599])
    assert table[600].any() and not table[0].any()
    pairs = set(zip(catalog["titles"][1:], catalog["image_paths"][1:]))
    assert sum(encoded) == len(pairs) + 1


def test_nothing_that_tells_items_apart_is_refused(tmp_path):
    catalog = make_catalog(tmp_path) | {"image_paths": [None] * (N + 1)}
    make(tmp_path, catalog)
    with pytest.raises(ValueError, match="no picture tells one item from another"):
        make(tmp_path, catalog, modality="image")
    catalog["titles"] = [""] * (N + 1)
    with pytest.raises(ValueError, match="no title and no picture tells"):
        make(tmp_path, catalog)


def cut_off(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


def emptied(path):
    path.write_bytes(b"")


def of_another_shape(path):
    np.save(path, np.load(path)[:-1])


def without_rows(path):
    np.save(path, np.load(path)[:0])


def with_a_header_that_does_not_end(path):
    path.write_bytes(path.read_bytes().replace(b"}", b"{", 1))


@pytest.mark.parametrize("damage", [
    cut_off, emptied, of_another_shape, without_rows, with_a_header_that_does_not_end,
])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_damaged_cache_is_made_again(tmp_path, damage, modality, capsys):
    whole = make(tmp_path).eval().encode_items()
    [path] = (tmp_path / "cache").glob(f"{modality}-*")
    damage(path)
    capsys.readouterr()
    assert make(tmp_path).eval().encode_items().equal(whole)
    assert f"{path} is damaged: it is made again" in capsys.readouterr().out
    assert make(tmp_path).eval().encode_items().equal(whole)
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("without", [None, "locks", "fcntl"])
def test_what_a_killed_run_left_of_a_cache_is_written_over(tmp_path, monkeypatch, without):
    def no_locks(*args):
        raise OSError("this file system has no locks")

    if without == "locks":
        monkeypatch.setattr(mmsr.fcntl, "flock", no_locks)
    elif without == "fcntl":
        monkeypatch.setattr(mmsr, "fcntl", None)    # as on Windows
    whole = make(tmp_path).eval().encode_items()
    [path] = (tmp_path / "cache").glob("text-*")
    left = path.with_name(path.name + ".unfinished")
    left.write_bytes(b"half" * path.stat().st_size)
    path.unlink()
    assert make(tmp_path).eval().encode_items().equal(whole)
    assert path.is_file() and left.exists() == (without is not None)


def test_of_two_processes_one_fills_the_cache_and_the_other_waits(tmp_path, monkeypatch):
    """The second is a thread here: locks know no difference."""
    tower = make(tmp_path, cache="off").towers["text"]
    cfg = make(tmp_path).cfg
    fills = []
    real = mmsr.Cached.fill

    def slow(self, path, *args):
        fills.append(path.name)
        time.sleep(.2)
        return real(self, path, *args)

    monkeypatch.setattr(mmsr.Cached, "fill", slow)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(
            lambda _: mmsr.Cached(tower.bottom, tower.width, cfg, CPU), range(2)
        ))
    assert len(fills) == 1 and made[0].hidden.equal(made[1].hidden)
    assert [name for name in caches(tmp_path) if "unfinished" in name] == []


def test_a_picture_changed_within_a_second_is_read_anew(tmp_path):
    catalog = make_catalog(tmp_path)
    before = make(tmp_path, catalog).eval().encode_items()
    path = next(path for path in catalog["image_paths"] if path)
    stat = os.stat(path)
    with Image.open(path) as picture:
        changed = Image.eval(picture, lambda x: 255 - x)
    changed.save(path)
    with open(path, "ab") as file:    # the size is a part of what is compared; time alone must do
        file.write(b"\0" * max(0, stat.st_size - os.path.getsize(path)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not make(tmp_path, catalog).eval().encode_items().equal(before)


def test_evaluation_encodes_the_catalog_once(shop, tmp_path, encoded):
    data = datasets.load(shop, root=tmp_path / "data")
    model = make(tmp_path, data.catalog(mmsr.READS) | {"n_items": data.n_items})
    assert evaluate(model, data, model.cfg, "valid", "cpu")["users"] == 60
    assert encoded == [data.n_items + 1]


def draw_every_kind(folder):
    """-> names of pictures that are alike, in groups: red, grey, white, and what is not read."""
    red = Image.new("RGB", (40, 30), "red")
    blue = Image.new("RGB", (40, 30), "blue")
    gradient = Image.linear_gradient("L")    # 256 x 256
    red.save(folder / "red.png")
    red.save(folder / "film.gif", save_all=True, append_images=[blue], duration=50)
    red.convert("P").save(folder / "palette.png")
    red.convert("RGBA").save(folder / "rgba.png")
    gradient.save(folder / "grey.png")
    gradient.convert("RGB").save(folder / "rgb.png")
    turned = Image.Exif()
    turned[274] = 6    # to be turned by 90 degrees
    gradient.transpose(Image.ROTATE_90).save(folder / "turned.png", exif=turned)
    Image.fromarray(np.asarray(gradient).astype(np.uint16) * 257).save(folder / "16bit.png")
    Image.new("RGB", (40, 30), "white").save(folder / "white.png")
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(folder / "transparent.png")
    red.resize((1, 200)).save(folder / "thin.png")
    red.save(folder / "other.tiff")    # none of FORMATS
    red.resize((300, 300)).save(folder / "large.png")
    (folder / "text.jpg").write_text("<html>no picture</html>")
    [whole] = draw(folder / "more", 1)
    with open(whole, "rb") as file:
        (folder / "cut.png").write_bytes(file.read()[:2000])
    return (
        ["red.png", "film.gif", "palette.png", "rgba.png"],
        ["grey.png", "rgb.png", "rgb.png", "turned.png", "16bit.png"],
        ["white.png", "transparent.png"],
        ["text.jpg", "cut.png", "other.tiff", "large.png", "thin.png", "absent.png", None],
    )


@pytest.mark.filterwarnings("ignore:Image size")    # Pillow warns of the large one
def test_pictures_of_every_kind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    groups = draw_every_kind(tmp_path)
    names = [None, *sum(groups, [])]
    paths = [name and str(tmp_path / name) for name in names]
    catalog = make_catalog(tmp_path, len(names) - 1) | {"image_paths": paths}
    model = make(tmp_path, catalog, modality="image").eval()
    table = model.encode_items()
    kinds = table[1:].split([len(group) for group in groups])
    for kind in kinds:
        same(kind, kind[:1].expand_as(kind), 1e-6)
    first = torch.stack([kind[0] for kind in kinds])
    assert (torch.cdist(first, first) + torch.eye(4) > .01).all()
    row_of = model.towers["image"].row_of.tolist()
    assert row_of[6] == row_of[7] and row_of[-1] == row_of[0] == 0
    printed = capsys.readouterr().out
    assert "17 images to the boundary, 6 unreadable" in printed


# ---------------- from the command line, from a folder

def test_from_the_command_line(tmp_path):
    for seed, name in enumerate(("one", "two")):
        write_shop(tmp_path / name, items=30 + 6 * seed, seed=seed)

    def train(data, *more, ok=True):
        flags = "--model mmsr --text_encoder tiny --image_encoder tiny --dim 16 --epochs 1"
        return run("train.py", *flags.split(), "--data", data, *more, cwd=tmp_path, ok=ok)

    assert "texts to the boundary" in train("one").stdout
    metrics = json.loads((tmp_path / "runs/mmsr-one-0/metrics.json").read_text())
    assert metrics["users"] == 60
    train("two", "--init", "runs/mmsr-one-0")
    train("one", "--item_encoder", "id", "--out", "id")
    train("one", "--modality", "text", "--out", "text")
    done = train("one", "--modality", "image", "--out", "image", ok=False)
    refused(done, "no picture tells one item from another")    # the shop has none
    train("one", "--user_encoder", "gru", "--out", "gru")
    for more, words in (
        (("--text_encoder", tmp_path / "no-such-folder"), "no-such-folder"),
        (("--fusion", "flava"), "FLAVA"),
        (("--init", "id/mmsr-one-0"), "does not fit"),
    ):
        done = train("one", *more, "--out", "refused", ok=False)
        refused(done, words)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.fixture
def folders(tmp_path):
    """A BERT and a Swin as they come from Hugging Face: with a vocabulary, pixel statistics."""
    torch.manual_seed(0)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] red blue green soft hard round".split()
    bert = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        vocab_size=len(words), max_position_embeddings=60,
    )
    swin = transformers.SwinConfig(
        embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2, image_size=32
    )
    models = {"text": transformers.BertModel(bert), "image": transformers.SwinModel(swin)}
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
    vocabulary = tmp_path / "text/vocab.txt"
    vocabulary.write_text("\n".join(words))
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(tmp_path / "text")
    transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, resample=3, image_mean=[.4, .5, .6],
        image_std=[.2, .3, .25],
    ).save_pretrained(tmp_path / "image")
    return models


def encoders_in(folder):
    return {"text_encoder": str(folder / "text"), "image_encoder": str(folder / "image")}


def remove_weights(folder, words):
    """Take the weights whose names have these words out of a checkpoint."""
    from safetensors.torch import load_file, save_file
    path = folder / "model.safetensors"
    weights = load_file(path)
    kept = {name: weight for name, weight in weights.items() if words not in name}
    assert len(kept) < len(weights)
    save_file(kept, path, {"format": "pt"})


def test_checkpoints_in_folders(folders, tmp_path):
    catalog = make_catalog(tmp_path)
    cfg = settings(tmp_path, tune_blocks=1, max_tokens=5, **encoders_in(tmp_path))
    model = mmsr.Model(cfg, catalog).eval()
    model.prepare(CPU)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "text")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "image", backend="pil")
    for i in (1, 2, 5, 8):
        title, picture = catalog["titles"][i], Image.open(catalog["image_paths"][i])
        given = {
            "text": tokenizer(title, truncation=True, max_length=5, return_tensors="pt"),
            "image": processor(picture, return_tensors="pt"),
        }
        for m, x in given.items():
            tokens, mask = model.towers[m](torch.tensor([i]))
            with torch.no_grad():
                same(tokens[0, mask[0]], folders[m](**x).last_hidden_state[0])


def test_a_pooler_that_a_checkpoint_lacks_makes_no_other_cache(folders, tmp_path):
    remove_weights(tmp_path / "text", "pooler")
    files = []
    for seed in (0, 1):    # of what is drawn for the pooler, which is not used
        model = make(tmp_path, seed=seed, **encoders_in(tmp_path))
        model.prepare(CPU)
        files.append(set(caches(tmp_path)))
    assert files[0] == files[1]


@pytest.mark.parametrize("modality, name", [
    ("text", "encoder.layer.1.output.dense.weight"), ("image", "layernorm.weight"),
])
def test_a_checkpoint_that_lacks_weights_is_refused(modality, name, folders, tmp_path):
    remove_weights(tmp_path / modality, name)
    with pytest.raises(ValueError, match=f"{modality}_encoder.*lacks weights"):
        make(tmp_path, **encoders_in(tmp_path))


@pytest.mark.filterwarnings("error:overflow")
def test_states_beyond_fp16_end_a_run_in_one_sentence(folders, tmp_path):
    folders["text"].embeddings.LayerNorm.bias.data += 1e5
    folders["text"].save_pretrained(tmp_path / "text")
    write_shop(tmp_path / "shop")

    def train(*more, ok=True):
        flags = "--model mmsr --data shop --modality text --tune_blocks 3 --dim 16 --epochs 1"
        given = [*flags.split(), "--text_encoder", tmp_path / "text", "--cache_dir", "cache"]
        return run("train.py", *given, *more, cwd=tmp_path, ok=ok)

    done = train(ok=False)
    refused(done, "text_encoder has hidden states beyond fp16: give cache fp32")
    assert done.stderr.count("\n") == 1
    assert not caches(tmp_path)
    train("--cache", "fp32")
    assert [name[-9:] for name in caches(tmp_path)] == [".fp32.npy"]


# ---------------- dropout in training

def test_everything_that_is_trained_drops_in_training(tmp_path):
    for settings in (dict(), dict(fusion="co"), dict(user_encoder="gru"), dict(fusion="sum+")):
        model = make(tmp_path, dropout=.3, **settings).train()
        own = [*model.user.modules(), *(model.fusion.modules())]
        rates = [part.p for part in own if isinstance(part, torch.nn.Dropout)]
        rates += [part.dropout for part in own if isinstance(part, torch.nn.MultiheadAttention)]
        assert rates and set(rates) == {.3}
        assert all(part.training for part in model.modules())


@torch.no_grad()
def test_trained_blocks_drop_in_training_and_not_in_evaluation(tmp_path):
    tower = make(tmp_path, text_encoder="tiny-bert").towers["text"]
    tower.prepare(torch.device("cpu"))
    for part in tower.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = .5
    items = torch.tensor([1, 2, 3])
    assert not torch.equal(tower.train()(items)[0], tower(items)[0])
    assert torch.equal(tower.eval()(items)[0], tower(items)[0])


@torch.no_grad()
@pytest.mark.parametrize("tune_blocks", [-1, 2])
def test_batch_norm_in_training_is_that_of_evaluation(tune_blocks, tmp_path):
    model = make(tmp_path, image_encoder="tiny-resnet", tune_blocks=tune_blocks)
    tower = model.towers["image"]
    tower.prepare(CPU)
    items = torch.tensor([1, 2, 4])
    found, _ = tower.train()(items)
    close(found, tower.eval()(items)[0])


def test_texts_longer_than_roberta_has_positions_are_refused(tmp_path):
    make(tmp_path, text_encoder="tiny-roberta", max_tokens=512)
    with pytest.raises(ValueError, match="must be from 3 to 512"):
        make(tmp_path, text_encoder="tiny-roberta", max_tokens=513)


def test_a_negative_that_is_the_target_counts_nothing(tmp_path, monkeypatch):
    model = make(tmp_path).eval()
    batch = {"user": torch.tensor([0]), "seq": torch.tensor([[1, 2]]),
             "target": torch.tensor([[2, 3]])}
    target = batch["target"]
    monkeypatch.setattr(mmsr.Model, "negatives", lambda self, user, L: target)
    found = model(batch)["next_item"]
    table = model.encode_items()
    states = model.user(table[batch["seq"]], batch["seq"] != 0)
    expected = F.softplus(-(states * table[target]).sum(-1)).mean()
    same(found, expected)


def test_logits_of_the_batch_are_wide_under_autocast(tmp_path):
    """Two users with one place each: both targets are candidates, the items before them are not."""
    model = make(tmp_path, loss="in_batch")
    ids = torch.tensor([1, 2, 4, 5])
    place = torch.tensor([[[0], [2]], [[1], [3]]])    # 1 before 2, 4 before 5
    torch.manual_seed(0)
    states = 10 * torch.randn(2, 1, D)
    vectors = 10 * torch.randn(4, D)
    logits = (states.double() @ vectors.double().T)[:, 0] - model.log_pop[ids].double()
    targets = logits[:, [1, 3]]
    expected = targets.logsumexp(1) - targets.diagonal()
    assert (expected > 10).any()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.in_batch(states, vectors, ids, place)
    close(found[:, 0].double(), expected, rtol=1e-5, atol=1e-3)
