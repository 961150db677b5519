"""What is true of every file in models/: the contract between a model file and the loop.

A new file is tested the moment it exists.
"""
import ast
import dataclasses
import math
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from common.files import UserError
from helpers import ROOT, kept_for_backward
from loop import runs
from loop.settings import MODELS, has_recipe, load_model_file

N, B, L = 40, 6, 9
TEXT, IMAGE = 12, 20
MODULES = {name: load_model_file(name) for name in MODELS}
TRAINED = [name for name in MODELS if has_recipe(MODULES[name].Config)]
STARTED = [name for name in MODELS if hasattr(MODULES[name].Model, "init_from")]
STAGES = [(name, kind) for name in MODELS for kind in ("Pretrain", "Model")
          if hasattr(MODULES[name], kind)]
SOFTMAX = [name for name in MODELS if hasattr(MODULES[name], "softmax_loss")]
every_model = pytest.mark.parametrize("name", MODELS)
every_trained_model = pytest.mark.parametrize("name", TRAINED)
every_stage = pytest.mark.parametrize("name, kind", STAGES)


# ---------------- a small catalog, model and batch

def make_catalog(seed=0, text=True, image=True, n=N):
    """Every catalog key of the contract, random; a tenth of the items lacks text or picture."""
    random = torch.Generator().manual_seed(seed)

    def some(present, *shape):
        """Which items have it, and which of their three vectors: the first one always."""
        has = (torch.rand(n + 1, generator=random) > .1) & present
        has[0] = False
        mask = torch.rand(n + 1, 3, generator=random) > .4
        mask[:, 0] = True
        return has, mask & has[:, None]

    def vectors(mask, width):
        return torch.randn(*mask.shape, width, generator=random) * mask[..., None]

    has_text, sentences_mask = some(text)
    has_image, pictures_mask = some(image)
    lang = torch.randint(1, 4, (n + 1,), generator=random)
    lang[0] = 0
    lengths = torch.randint(1, 15, (30,), generator=random).tolist()
    return {
        "n_items": n,
        "text": vectors(has_text, TEXT),
        "image": vectors(has_image, IMAGE),
        "has_text": has_text,
        "has_image": has_image,
        "sentences": vectors(sentences_mask, TEXT),
        "sentences_mask": sentences_mask,
        "pictures": vectors(pictures_mask, IMAGE),
        "pictures_mask": pictures_mask,
        "lang": lang,
        "train_seqs": [torch.randint(1, n + 1, (k,), generator=random).tolist() for k in lengths],
        "titles": [f"thing {i}" if has else "" for i, has in enumerate(has_text)],
        "image_paths": [None] * (n + 1),
    }


def settings_of(name, folder, **given):
    """A small Config; of the settings, those that it has."""
    small = {
        "dim": 16, "max_len": 20, "dropout": .1, "cache_dir": str(folder),
        "text_encoder": "tiny", "image_encoder": "tiny",
    }
    fields = {field.name for field in dataclasses.fields(MODULES[name].Config)}
    chosen = {key: value for key, value in (small | given).items() if key in fields}
    return MODULES[name].Config(**chosen)


def reads(name, catalog):
    """What a model file is given of a catalog."""
    return {key: catalog[key] for key in ("n_items", *MODULES[name].READS)}


def make(name, folder, kind="Model", seed=0, catalog=None, **settings):
    """A model on a catalog that holds only what its file READS."""
    catalog = reads(name, catalog or make_catalog())
    cfg = settings_of(name, folder, **settings)
    return runs.build(getattr(MODULES[name], kind), cfg, catalog, "cpu", seed)


def make_batch(seed=1, length=L, shortest=1):
    """Left-padded rows of different lengths, the item after each position as target."""
    random = torch.Generator().manual_seed(seed)
    items = torch.randint(1, N + 1, (B, length + 1), generator=random)
    sizes = torch.randint(shortest, length + 1, (B,), generator=random)
    sizes[0] = length
    real = torch.arange(length) >= length - sizes[:, None]
    return {"user": torch.arange(B), "seq": items[:, :-1] * real, "target": items[:, 1:] * real}


def longer(batch, places):
    """The batch with more padding on the left."""
    padding = torch.zeros(B, places, dtype=torch.long)
    return batch | {key: torch.cat([padding, batch[key]], 1) for key in ("seq", "target")}


def next_item(model, batch):
    """The next-item loss, with the same negatives and dropout each time."""
    torch.manual_seed(0)
    return next(iter(model(batch).values())).detach()


def leaves(table):
    if isinstance(table, dict):
        return list(table.values())
    return list(table) if isinstance(table, tuple) else [table]


def with_garbage_in_row_0(table):
    def spoil(leaf):
        leaf = leaf.detach().clone()
        leaf[0] = 7 if leaf.is_floating_point() else leaf[1]
        return leaf
    if isinstance(table, dict):
        return {key: spoil(leaf) for key, leaf in table.items()}
    return tuple(map(spoil, table)) if isinstance(table, tuple) else spoil(table)


# ---------------- losses and scores

@every_model
def test_shapes_of_losses_scores_and_table(name, tmp_path):
    model = make(name, tmp_path)
    losses = model(make_batch())
    assert next(iter(losses)) == "next_item"
    assert all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
    batch = make_batch()
    del batch["target"]
    table = model.eval().encode_items()
    assert all(len(leaf) == N + 1 for leaf in leaves(table))
    scores = model.score(batch, table)
    assert scores.shape == (B, N + 1) and scores.isfinite().all()


@every_trained_model
def test_every_weight_gets_a_gradient(name, tmp_path):
    model = make(name, tmp_path)
    sum(model(make_batch(length=20)).values()).backward()
    for key, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.isfinite().all(), key
            assert weight.dim() < 2 or weight.grad.abs().sum() > 0, key


@every_trained_model
def test_training_lowers_the_loss(name, tmp_path):
    model = make(name, tmp_path)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = make_batch()
    before = sum(model.eval()(batch).values()).item()
    for _ in range(30):
        optimizer.zero_grad()
        sum(model.train()(batch).values()).backward()
        optimizer.step()
    assert sum(model.eval()(batch).values()).item() < before


@every_model
@pytest.mark.parametrize("missing", ["text", "image"])
def test_a_modality_that_no_item_has(name, missing, tmp_path):
    if name == "mmsr" and missing == "text":    # the catalog here has no pictures
        with pytest.raises(UserError, match="no title and no picture"):
            make(name, tmp_path, catalog=make_catalog(text=False))
        return
    model = make(name, tmp_path, catalog=make_catalog(**{missing: False}))
    losses = model(make_batch())
    assert all(loss.isfinite() for loss in losses.values())
    if runs.is_trained(model):
        sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.eval().score(make_batch(), model.encode_items()).isfinite().all()


@every_stage
def test_losses_are_float32_and_finite_under_autocast(name, kind, tmp_path):
    model = make(name, tmp_path, kind)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(stage_batch(model))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    if runs.is_trained(model):
        sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---------------- what a batch may hold

@every_trained_model
def test_no_position_sees_its_future(name, tmp_path):
    model = make(name, tmp_path)
    if model.cfg.prefixes:
        pytest.skip("a row per prefix has no future in it")
    model.eval()
    t = 4
    batch = make_batch(shortest=L)
    batch["target"][:, t + 1:] = 0    # losses at the first positions only
    changed = batch | {"seq": batch["seq"].clone()}
    changed["seq"][:, t + 1:] = changed["seq"][:, t + 1:] % N + 1
    torch.testing.assert_close(next_item(model, batch), next_item(model, changed))
    changed["seq"][:, t] = changed["seq"][:, t] % N + 1    # a change that it should see
    assert not torch.allclose(next_item(model, batch), next_item(model, changed))


@every_trained_model
def test_prefix_rows_have_one_target(name, tmp_path):
    model = make(name, tmp_path, prefixes=True).eval()
    batch = make_batch(shortest=L)
    changed = batch | {"target": batch["target"].clone()}
    changed["target"][:, :-1] = changed["target"][:, :-1] % N + 1
    found = next_item(model, changed)
    torch.testing.assert_close(next_item(model, batch), found, atol=1e-4, rtol=1e-3)


@every_trained_model
def test_a_target_of_0_counts_nothing(name, tmp_path):
    """A row without any target changes neither the loss nor its gradient."""
    model = make(name, tmp_path, dropout=0.).eval()
    if name == "mmsr":
        pytest.skip("its negatives are the other items of the batch, those of such a row as well")
    batch = make_batch(shortest=L)
    batch["target"][2] = 0
    without = {key: value[torch.arange(B) != 2] for key, value in batch.items()}
    torch.testing.assert_close(next_item(model, batch), next_item(model, without))
    batch["target"][:] = 0
    losses = model(batch)
    assert losses["next_item"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_padding_and_trimming_change_nothing(name, tmp_path):
    model = make(name, tmp_path).eval()
    table = model.encode_items()
    batch = make_batch()
    assert (batch["seq"] == 0).any()
    scores = model.score(batch, table)
    more = longer(batch, 7)
    torch.testing.assert_close(model.score(more, table), scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(next_item(model, more), next_item(model, batch))
    found = model.score(batch, with_garbage_in_row_0(table))
    torch.testing.assert_close(found[:, 1:], scores[:, 1:])


@every_model
def test_a_sequence_longer_than_max_len_is_cut_to_its_end(name, tmp_path):
    model = make(name, tmp_path, max_len=5, dropout=0.).eval()
    batch = make_batch(length=20, shortest=20)
    cut = {key: value[:, -5:] if value.dim() > 1 else value for key, value in batch.items()}
    table = model.encode_items()
    torch.testing.assert_close(model.score(batch, table), model.score(cut, table))
    torch.testing.assert_close(next_item(model, batch), next_item(model, cut))    # targets as well
    assert all(loss.isfinite() for loss in model(batch).values())


@every_model
def test_rows_of_a_batch_do_not_meet(name, tmp_path):
    model = make(name, tmp_path).eval()
    table = model.encode_items()
    batch = make_batch()
    alone = {key: value[2:3] for key, value in batch.items()}
    found = model.score(alone, table)[0]
    torch.testing.assert_close(found, model.score(batch, table)[2], rtol=1e-4, atol=1e-5)


# ---------------- seeds and weights

@every_model
def test_same_seed_same_numbers(name, tmp_path):
    found = []
    for _ in range(2):
        model = make(name, tmp_path, seed=3)
        losses = [loss.item() for loss in model(make_batch()).values()]
        found.append(losses + [weight.sum().item() for weight in model.parameters()])
    assert found[0] == found[1]


@every_trained_model
def test_threads_make_no_difference_between_runs(name, tmp_path):
    batch = make_batch(length=20)
    batch = {key: value.repeat_interleave(40, 0) for key, value in batch.items()}
    torch.set_num_threads(4)
    try:
        model = make(name, tmp_path, dim=64, dropout=0.)
        gradients = []
        for _ in range(4):
            torch.manual_seed(0)
            model.zero_grad()
            sum(model(batch).values()).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(1)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=0)


@every_model
def test_state_holds_weights_only_and_loads_on_another_catalog(name, tmp_path):
    model = make(name, tmp_path)
    state = model.state_dict()
    assert set(state) == {key for key, _ in model.named_parameters()}
    make(name, tmp_path, seed=9).load_state_dict(state, strict=True)
    other = make(name, tmp_path, catalog=make_catalog(seed=1, image=False))
    other.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", STARTED)
def test_init_from_takes_its_own_weights_and_refuses_others(name, tmp_path):
    kind = "Pretrain" if hasattr(MODULES[name], "Pretrain") else "Model"
    first = make(name, tmp_path, kind, seed=5)
    model = make(name, tmp_path)
    model.init_from(first.state_dict())
    own = model.state_dict()
    same = [key for key, weight in first.state_dict().items()
            if key in own and torch.equal(own[key], weight)]
    assert same
    for key in same:
        wrong = first.state_dict() | {key: torch.zeros(3, 2)}
        with pytest.raises(ValueError):
            model.init_from(wrong)
    with pytest.raises(ValueError):
        model.init_from({"another.weight": torch.zeros(3)})


# ---------------- settings and catalogs that make no sense

@every_model
def test_config_says_everything_and_presets_fit(name):
    module = MODULES[name]
    words = {field.name for field in dataclasses.fields(module.Config)}
    assert words >= {"dim", "heads", "layers", "dropout", "max_len"}
    assert module.Config() == module.Config()    # every field has a default
    for preset in getattr(module, "PRESETS", {}).values():
        module.Config(**preset)


SENSELESS = [
    ("dim", 0), ("heads", 3), ("heads", 0), ("layers", -1), ("max_len", 0), ("dropout", 1.),
    ("dropout", -.1), ("lr", 0.), ("lr", -1.), ("lr", math.nan), ("lr", math.inf),
    ("weight_decay", -1.), ("weight_decay", math.nan), ("batch_size", 0), ("epochs", 0),
    ("patience", 0), ("pretrain_epochs", -1), ("pretrain_lr", 0.), ("temperature", -1.),
    ("tau", 0.), ("tau", math.nan),
]


@every_trained_model
@pytest.mark.parametrize("setting, value", SENSELESS)
def test_settings_that_make_no_sense_are_refused_by_name(name, setting, value, tmp_path):
    fields = {field.name for field in dataclasses.fields(MODULES[name].Config)}
    if setting not in fields:
        pytest.skip("it has no such setting")
    with pytest.raises(ValueError, match=rf"\b{setting} {value}"):
        settings_of(name, tmp_path, **{setting: value})


@every_model
def test_a_catalog_that_lacks_something_is_refused_by_name(name, tmp_path):
    cfg = settings_of(name, tmp_path)
    catalog = reads(name, make_catalog())
    for key in catalog:
        lacking = {k: value for k, value in catalog.items() if k != key}
        with pytest.raises(ValueError, match=rf"the catalog lacks {key} \("):
            MODULES[name].Model(cfg, lacking)
    with pytest.raises(ValueError) as error:
        MODULES[name].Model(cfg, {})
    assert all(key in str(error.value) for key in catalog)


@every_model
def test_a_catalog_in_another_form_is_refused_by_name(name, tmp_path):
    catalog = reads(name, make_catalog())
    features = [key for key, value in catalog.items() if torch.is_tensor(value)]
    for key in features:
        wrong_rows = catalog | {key: catalog[key][1:]}
        no_tensor = catalog | {key: catalog[key].numpy()}
        for wrong in (wrong_rows, no_tensor):
            with pytest.raises(ValueError, match=rf"'{key}'\] must be"):
                MODULES[name].Model(settings_of(name, tmp_path), wrong)


MASKS = {"text": "has_text", "image": "has_image", "sentences": "sentences_mask",
         "pictures": "pictures_mask"}
WIDE = [name for name in MODELS if set(MODULES[name].READS) & set(MASKS)]
MASKED = [name for name in WIDE if set(MODULES[name].READS) & set(MASKS.values())]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e20])
@pytest.mark.parametrize("name", WIDE)
def test_features_that_are_no_numbers_are_refused_by_item(name, tmp_path, number):
    for key in set(MODULES[name].READS) & set(MASKS):
        catalog = make_catalog()
        there = catalog[MASKS[key]]
        item = int((there if there.dim() == 1 else there[:, 0]).nonzero()[3])
        catalog[key][item] = number
        with pytest.raises(UserError, match=rf"{key}'\] has numbers .*for items \[{item}\]"):
            make(name, tmp_path, catalog=catalog)


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", MASKED)
def test_what_a_mask_calls_missing_may_be_anything(name, tmp_path, number):
    catalog = make_catalog()
    zeros, other = dict(catalog), dict(catalog)
    for key in set(MODULES[name].READS) & set(MASKS):
        there = catalog[MASKS[key]][..., None]
        zeros[key] = torch.where(there, catalog[key], 0)
        other[key] = torch.where(there, catalog[key], number)
    kinds = ["Pretrain", "Model"] if hasattr(MODULES[name], "Pretrain") else ["Model"]
    for kind in kinds:
        models = [make(name, tmp_path, kind, catalog=given, dropout=0.) for given in (zeros, other)]
        losses = []
        for model in models:
            torch.manual_seed(0)
            loss = model(stage_batch(model))
            sum(loss.values()).backward()
            losses.append(loss)
        torch.testing.assert_close(*losses)
        for one, two in zip(models[0].parameters(), models[1].parameters()):
            assert one.grad is None or torch.equal(one.grad, two.grad)
    table = [model.eval().score(make_batch(), model.encode_items()) for model in models]
    assert torch.equal(*table)


@every_stage
@pytest.mark.parametrize("key", ["image", "text"])
def test_a_modality_that_one_item_has_is_trained_on(name, kind, key, tmp_path):
    catalog = make_catalog()
    one = torch.arange(N + 1) == 5
    stack = {"text": "sentences", "image": "pictures"}[key]
    catalog[f"has_{key}"] &= one
    catalog[key] = catalog[key] * one[:, None]
    catalog[stack] = catalog[stack] * one[:, None, None]
    catalog[f"{stack}_mask"] &= one[:, None]
    catalog["titles"] = [title if i == 5 else "" for i, title in enumerate(catalog["titles"])]
    model = make(name, tmp_path, kind, catalog=catalog, dropout=0.)
    losses = model(stage_batch(model))
    if runs.is_trained(model):
        sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_mask_that_a_file_does_not_read_excuses_nothing(tmp_path):
    catalog = make_catalog()
    catalog["has_image"][5] = False
    catalog["image"][5] = math.nan
    with pytest.raises(ValueError, match=r"'image'\] has numbers .* for items \[5\]"):
        MODULES["mdsrec"].Model(settings_of("mdsrec", tmp_path), catalog)


@pytest.mark.parametrize("name", [name for name in MODELS if "train_seqs" in MODULES[name].READS])
@pytest.mark.parametrize("bad", [0, -1, N + 1, 2.5])
def test_training_sequences_with_other_ids_are_refused(name, tmp_path, bad):
    catalog = make_catalog()
    catalog["train_seqs"][3] = [1, bad, 2]
    with pytest.raises(UserError, match=f"has ids that are not from 1 to {N}"):
        make(name, tmp_path, catalog=catalog)


@every_model
def test_settings_of_another_type_or_choice_are_refused_by_name(name):
    Config = MODULES[name].Config
    for field in dataclasses.fields(Config):
        if name == "pop":    # nothing of it is read
            continue
        for wrong in ("sideways", None, [1]):
            if field.type is str and wrong == "sideways":    # any text
                continue
            with pytest.raises(ValueError, match=f"^{field.name} "):
                Config(**{field.name: wrong})
    if "dim" in {field.name for field in dataclasses.fields(Config)}:
        Config(dim=np.int64(Config().dim))


def test_languages_that_are_no_numbers_from_0_on_are_refused(tmp_path):
    for lang in (make_catalog()["lang"].float(), -make_catalog()["lang"]):
        with pytest.raises(UserError, match="'lang'\\] must be whole numbers from 0 on"):
            make("srmml", tmp_path, catalog=make_catalog() | {"lang": lang})


@every_trained_model
def test_rows_padded_on_the_right_are_refused(name, tmp_path):
    model = make(name, tmp_path)
    batch = make_batch(shortest=3)
    model(batch)
    wrong = batch | {"seq": batch["seq"].flip(1)}
    if not (wrong["seq"][:, -1] == 0).any():
        wrong["seq"][0, -1] = 0
    for call in (model, lambda given: model.score(given, model.encode_items())):
        with pytest.raises(ValueError, match="padded with 0 on the left"):
            call(wrong)
    nothing = batch | {"seq": batch["seq"] * 0, "target": batch["target"] * 0}
    assert all(loss.isfinite() for loss in model(nothing).values())


@every_trained_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused(name, tmp_path, dtype):
    model = make(name, tmp_path).to(dtype)
    with pytest.raises(ValueError, match="too coarse: leave them in float32"):
        model(make_batch())


@every_model
def test_the_loop_reports_a_bad_catalog_in_a_sentence(name, tmp_path):
    with pytest.raises(UserError, match="Model cannot be built: the catalog lacks n_items|cannot"):
        runs.build(MODULES[name].Model, settings_of(name, tmp_path), {}, "cpu", 0)


# ---------------- a file by itself

@every_model
def test_imports_nothing_of_the_project_and_runs_alone(name, tmp_path):
    shutil.copy(ROOT / "models" / f"{name}.py", tmp_path / "copied.py")
    command = [sys.executable, "-I", "copied.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


@every_model
def test_head_names_what_it_reads(name):
    module = MODULES[name]
    assert set(module.CATALOG) == {"n_items", *module.READS}
    for key in module.CATALOG:
        assert key in module.__doc__.split("Reads from the catalog:")[1]


def test_shared_helpers_are_one_text():
    """Files import nothing of each other, so these are copies: the same in all of them."""
    shared = (
        "SoftmaxLoss", "softmax_loss", "check", "check_recipe", "check_catalog", "Buffers",
    )
    texts = {}
    for name in MODELS:
        source = (ROOT / "models" / f"{name}.py").read_text()
        for node in ast.parse(source).body:
            if getattr(node, "name", None) in shared:
                text = ast.get_source_segment(source, node)
                texts.setdefault(node.name, {})[name] = text
    assert set(texts) == set(shared)
    for helper, found in texts.items():
        assert len(found) > 1 and len(set(found.values())) == 1, (helper, sorted(found))


# ---------------- the softmax loss

def plain_loss(states, items, target):
    real = target != 0
    return F.cross_entropy((states[real] @ items.T)[:, 1:], target[real] - 1)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("is_cuda", [False, True])
def test_softmax_loss_and_its_gradient(name, is_cuda, float64, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)    # a GPU takes the rows without choosing
    loss = MODULES[name].softmax_loss
    for n_rows, n_items in ((150, 40_000), (7, 11)):    # three chunks of rows, and one
        states = torch.randn(n_rows, 4, requires_grad=True)
        items = torch.randn(n_items, 4, requires_grad=True)
        target = torch.randint(1, n_items, (n_rows,))
        target[1:n_rows:3] = 0
        found = loss(states, items, target)
        expected = plain_loss(states, items, target)
        torch.testing.assert_close(found, expected)
        found = torch.autograd.grad(3 * found, (states, items))
        expected = torch.autograd.grad(3 * expected, (states, items))
        torch.testing.assert_close(found, expected)
        assert not found[0][target == 0].any()
    assert torch.autograd.gradcheck(lambda s, e: loss(s, e, target), (states, items))
    assert loss(states, items, 0 * target) == 0    # no target at all: nothing, not NaN


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_loss_never_holds_all_logits(name):
    rows, n_items = 400, 40_000
    states = torch.randn(rows, 4, requires_grad=True)
    items = torch.randn(n_items, 4, requires_grad=True)
    with Largest() as largest, kept_for_backward() as kept:
        MODULES[name].softmax_loss(states, items, torch.ones(rows, dtype=torch.long)).backward()
    assert largest.numel <= 64 * n_items
    assert max(kept) <= items.numel()    # what waits for the backward pass


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


# ---------------- dropout, and the numbers that the papers state

# of a training step with two layers: how often something is dropped, and in fused attention
DROPPED = {
    ("sasrec", "Model"): (1 + 2 * 2, 2),                # the input, twice in each block
    ("mdsrec", "Model"): (3 * (1 + 2 * 2) + 2 * 2 * 2, 3 * 2 + 2 * 2),    # centres pass blocks, too
    ("srmml", "Model"): (3 + 2 + 2 * 2 * 2, 0),         # heads, inputs, both streams in each layer
    ("fmmsrec", "Model"): (2 * (1 + 2 * 2) + 2, 2),     # two towers; in items' attention by hand
    ("fmmsrec", "Pretrain"): (2 * (1 + 2 * 2 + 2), 0),  # items, and pairs that do not match
    ("msm4sr", "Model"): (2 + 1 + 2 * 2, 2),            # experts of both modalities, the input, ...
    ("msm4sr", "Pretrain"): (2 + 1 + 2 * 2, 2),
}


@pytest.mark.parametrize("name, kind", DROPPED)
def test_everything_that_is_to_be_dropped_is(name, kind, tmp_path, monkeypatch):
    given = {"dropout": .3, "input_dropout": .3, "layers": 2}
    model = make(name, tmp_path, kind, **given)
    dropped, attended = [], []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def watched_dropout(x, p=.5, training=True, inplace=False):
        dropped.append((p, training))
        return dropout(x, p, training)

    def watched_attention(*args, dropout_p=0., **more):
        attended.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **more)

    monkeypatch.setattr(F, "dropout", watched_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched_attention)
    model.train()(stage_batch(model))
    number, fused = DROPPED[name, kind]
    assert dropped == [(.3, True)] * number
    assert attended == [.3] * fused
    dropped.clear()
    attended.clear()
    model.eval()(stage_batch(model))
    assert all(not training or p == 0 for p, training in dropped)
    assert all(p == 0 for p in attended)


STATED = {
    "srmml": dict(gate_scale=2.0, patience=50),
    "fmmsrec": dict(lr=1e-3, mask_ratio=.2, max_len=20, optimizer="adam"),
    "mdsrec": dict(dim=300, batch_size=512, mu_id=16., mu_modal=.2, neighbors=10, centers=32,
                   patience=10, optimizer="adam"),
    "msm4sr": dict(dim=64, attention_dim=64, experts=8, rho=.2, p_max=.5, tau=.07, lam=.01,
                   pretrain_epochs=300, pretrain_lr=1e-3, patience=10),
    "mmsr": dict(dim=768, lr=1e-4, encoder_lr=1e-4, weight_decay=.1, encoder_weight_decay=0.,
                 max_len=20, max_tokens=50, epochs=150, tune_blocks=2, schedule="step",
                 optimizer="adamw", loss="bce"),
}


@pytest.mark.parametrize("name", STATED)
def test_settings_are_those_that_the_paper_states(name):
    cfg = dataclasses.asdict(MODULES[name].Config())
    assert {key: cfg[key] for key in STATED[name]} == STATED[name]
    assert MODULES["srmml"].Config().dropout in (.3, .5, .7)


@pytest.mark.parametrize("name", [name for name in SOFTMAX if name != "mmsr"])
def test_weights_start_small(name, tmp_path):
    """Matrices at a deviation of .02, but for those that a reading starts otherwise."""
    model = make(name, tmp_path, dim=64)
    others = ("fusion.", "position", "W_3")    # SRMML's content, FMMS-Rec's positions, even experts
    for key, weight in model.named_parameters():
        large = weight.dim() > 1 and weight.numel() > 500
        if large and not any(part in key for part in others):
            assert weight.std().item() == pytest.approx(.02, rel=.2), key


# ---------------- torch.compile

@pytest.mark.slow
@pytest.mark.parametrize("name", SOFTMAX)
def test_a_compiled_step_is_the_same_and_not_compiled_for_every_shape(name, tmp_path):
    module = load_model_file(name)    # a copy of its own: it is changed
    train.leave_as_they_are(module)
    cfg = module.Config(**dataclasses.asdict(settings_of(name, tmp_path, layers=1)))
    model = runs.build(module.Model, cfg, reads(name, make_catalog()), "cpu", 0)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    fast = torch.compile(model.forward, backend=keep, dynamic=True)
    counts = []
    for seed, (rows, length) in enumerate([(6, 9), (5, 7), (4, 12), (3, 5), (6, 15)]):
        batch = {key: value[:rows] for key, value in make_batch(seed, length).items()}
        found = []
        for step in (fast, model):
            torch.manual_seed(0)
            found.append({key: loss.detach() for key, loss in step(batch).items()})
        torch.testing.assert_close(*found)
        counts.append(len(graphs))
    torch.compiler.reset()
    assert 0 < counts[2] == counts[-1]


# ---------------- what a GPU would do, seen on a CPU
# fake tensors have shape, type and device, and raise where a value is asked for

@every_stage
def test_branches_for_a_gpu_give_the_same(name, kind, tmp_path, monkeypatch):
    found = []
    for is_cuda in (False, True):
        model = make(name, tmp_path, kind, dropout=0.)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", is_cuda)
            torch.manual_seed(0)
            losses = model(stage_batch(model))
            if runs.is_trained(model):
                sum(losses.values()).backward()
        found.append((losses, {key: weight.grad for key, weight in model.named_parameters()}))
    torch.testing.assert_close(*found)


@every_stage
def test_no_step_waits_for_a_gpu(name, kind, tmp_path, monkeypatch):
    def autocast(device, name):
        return torch.autocast("cpu", torch.bfloat16)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(train, "precision", autocast)
    for method in ("check", "means"):    # once per epoch the host may wait
        monkeypatch.setattr(train.Watch, method, lambda *_: None)
    model, batch, mode = faked(name, tmp_path, kind, "cpu")
    rows = mock.MagicMock()
    rows.users = np.arange(B)
    rows.epoch = lambda *_: iter([(batch, np.arange(B))] * 2)
    with mode:
        if runs.is_trained(model):
            optimizer = train.optimizer_of(model, model.cfg, 1e-3)
            device = torch.device("cpu")
            trainer = train.Trainer(model, model.forward, optimizer, device, batch_size=B)
            train.train_epoch(trainer, rows, None, "")
        if kind == "Model":
            with torch.no_grad():
                model.eval().score(batch, model.encode_items())


@every_stage
@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch knows no CUDA")
def test_everything_lies_on_the_gpu(name, kind, tmp_path):
    if name == "mdsrec":
        pytest.skip("sparse matrices cannot be faked on a GPU")
    model, batch, mode = faked(name, tmp_path, kind, "cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with mode:
            terms = model(batch)
            assert {term.device.type for term in terms.values()} == {"cuda"}
            assert {term.dtype for term in terms.values()} == {torch.float32}
            norm = next(iter(terms.values())).detach()
            assert train.Watch(torch.device("cuda")).step(terms, norm, []).is_cuda
    finally:
        torch.set_autocast_enabled("cuda", False)
    if kind == "Model":
        with mode, torch.no_grad():
            assert model.eval().score(batch, model.encode_items()).is_cuda


def stage_batch(model):
    """What the loop gives a stage: items for a Pretrain of items, else sequences."""
    if getattr(model, "rows", "") == "items":
        return {"item": torch.arange(1, N + 1)}
    return make_batch()


def faked(name, folder, kind, device):
    """(model, batch, mode): weights, buffers and batch as fake tensors of the device."""
    if name == "mmsr":
        pytest.skip("its shapes depend on how many different items a batch holds")
    model = make(name, folder, kind)
    model.cfg = settings_of(name, folder)
    mode = FakeTensorMode()

    def fake(tensor):
        tensor = mode.from_tensor(tensor)
        with mode:
            return tensor.to(device)

    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                weight = torch.nn.Parameter(fake(weight.data), weight.requires_grad)
                module._parameters[key] = weight
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = fake(buffer)
    batch = {key: fake(value) for key, value in stage_batch(model).items()}
    return model, batch, mode
