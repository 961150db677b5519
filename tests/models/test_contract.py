"""Every file in models/ by itself: the contract between a model file and the loop. A new file is tested the moment it exists."""
import dataclasses
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import train

FILES = train.MODELS
N, B, L = 40, 6, 9
TEXT, IMAGE = 12, 20


def make_catalog(seed=0, text=True, image=True):
    """Every catalog key of the contract on random numbers; a tenth of the items lacks a text or a picture."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    has_text, has_image = (torch.rand(N + 1, generator=g) > .1 for _ in range(2))
    has_text &= text
    has_image &= image
    has_text[0] = has_image[0] = False
    mask = lambda has: (torch.rand(N + 1, 3, generator=g) > .4).index_fill_(1, torch.tensor([0]), True) & has[:, None]
    sentences_mask, pictures_mask = mask(has_text), mask(has_image)
    seqs = [torch.randint(1, N + 1, (int(n),), generator=g).tolist() for n in torch.randint(1, 15, (30,), generator=g)]
    return {"n_items": N, "text": rand(N + 1, TEXT) * has_text[:, None], "image": rand(N + 1, IMAGE) * has_image[:, None],
            "has_text": has_text, "has_image": has_image, "sentences": rand(N + 1, 3, TEXT) * sentences_mask[..., None],
            "sentences_mask": sentences_mask, "pictures": rand(N + 1, 3, TEXT) * pictures_mask[..., None],
            "pictures_mask": pictures_mask, "lang": torch.randint(1, 4, (N + 1,), generator=g).index_fill_(0, torch.tensor([0]), 0),
            "train_seqs": seqs, "titles": ["", *(f"thing {i}" if h else "" for i, h in enumerate(has_text[1:]))],
            "image_paths": [None] * (N + 1)}


def make(name, tmp_path, seed=0, kind="Model", dropout=.1, dim=16, **changes):
    """(module, model, cfg) of a small model on a catalog that holds only what the file READS."""
    module = train.load_model_file(name)
    fields = {f.name for f in dataclasses.fields(module.Config)}
    settings = {"dim": dim, "max_len": 20, "text_encoder": "tiny", "image_encoder": "tiny", "cache_dir": str(tmp_path),
                "dropout": dropout}
    cfg = module.Config(**{k: v for k, v in settings.items() if k in fields})
    full = make_catalog(**changes)
    catalog = {k: v for k, v in full.items() if k in (*module.READS, "n_items")}
    return module, train.build(getattr(module, kind), cfg, catalog, "cpu", seed), cfg


def make_batch(seed=1, length=L, shortest=1):
    """Left-padded rows of different lengths, the item after each position as target."""
    g = torch.Generator().manual_seed(seed)
    items = torch.randint(1, N + 1, (B, length + 1), generator=g)
    sizes = torch.randint(shortest, length + 1, (B,), generator=g)
    sizes[0] = length
    real = torch.arange(length) >= length - sizes[:, None]
    return {"user": torch.arange(B), "seq": items[:, :-1] * real, "target": items[:, 1:] * real}


def trainable(model):
    return any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", FILES)
class TestContract:
    def test_names_and_recipe(self, name, tmp_path):
        module, _, _ = make(name, tmp_path)
        words = {f.name for f in dataclasses.fields(module.Config)}
        assert words >= {"dim", "heads", "layers", "dropout", "max_len", "batch_size", "prefixes", "lr", "weight_decay",
                         "epochs", "patience"}
        assert module.Config() == module.Config()                # every field has a default
        for preset in getattr(module, "PRESETS", {}).values():
            module.Config(**preset)

    def test_losses_and_scores(self, name, tmp_path):
        _, model, _ = make(name, tmp_path)
        losses = model(make_batch())
        assert next(iter(losses)) == "next_item"
        assert all(v.dim() == 0 and v.isfinite() for v in losses.values())
        scores = model.eval().score({k: v for k, v in make_batch().items() if k != "target"}, model.encode_items())
        assert scores.shape == (B, N + 1) and scores.isfinite().all()

    def test_table_has_a_row_for_every_item(self, name, tmp_path):
        _, model, _ = make(name, tmp_path)
        assert all(len(leaf) == N + 1 for leaf in leaves(model.eval().encode_items()))

    def test_every_weight_gets_a_gradient(self, name, tmp_path):
        _, model, _ = make(name, tmp_path)
        if not trainable(model):
            return
        sum(model(make_batch(length=20)).values()).backward()
        for key, weight in model.named_parameters():
            if weight.requires_grad:
                assert weight.grad is not None and weight.grad.isfinite().all(), key
                assert weight.dim() < 2 or weight.grad.abs().sum() > 0, key

    def test_training_lowers_the_loss(self, name, tmp_path):
        _, model, cfg = make(name, tmp_path)
        if not trainable(model):
            return
        optimizer, batch = torch.optim.Adam(model.parameters(), lr=3e-3), make_batch()
        before = sum(model.eval()(batch).values()).item()
        for _ in range(30):
            optimizer.zero_grad()
            sum(model.train()(batch).values()).backward()
            optimizer.step()
        assert sum(model.eval()(batch).values()).item() < before

    def test_no_position_sees_its_future(self, name, tmp_path):
        _, model, cfg = make(name, tmp_path)
        if cfg.prefixes or not trainable(model):
            return                                               # a prefix row has no future in it
        batch, t = make_batch(shortest=L), 4
        batch["target"][:, t + 1:] = 0                           # losses at the first positions only
        changed = dict(batch, seq=batch["seq"].clone())
        changed["seq"][:, t + 1:] = changed["seq"][:, t + 1:] % N + 1
        torch.testing.assert_close(seeded(model.eval(), batch), seeded(model, changed))
        changed["seq"][:, t] = changed["seq"][:, t] % N + 1      # and the test does see a change it should see
        assert not torch.allclose(seeded(model, batch), seeded(model, changed))

    def test_prefix_rows_have_one_target(self, name, tmp_path):
        module, model, cfg = make(name, tmp_path)
        if not trainable(model):
            return
        cfg.prefixes = True
        batch = make_batch(shortest=L)
        changed = dict(batch, target=batch["target"].clone())
        changed["target"][:, :-1] = changed["target"][:, :-1] % N + 1
        torch.testing.assert_close(seeded(model.eval(), batch), seeded(model, changed), atol=1e-4, rtol=1e-3)

    def test_trimming_a_batch_changes_nothing(self, name, tmp_path):
        _, model, _ = make(name, tmp_path)
        table, batch = model.eval().encode_items(), make_batch(shortest=L)
        longer = dict(batch, seq=torch.cat([torch.zeros(B, 7, dtype=torch.long), batch["seq"]], 1))
        torch.testing.assert_close(model.score(longer, table), model.score(batch, table), rtol=1e-4, atol=1e-5)
        longer["target"] = torch.cat([torch.zeros(B, 7, dtype=torch.long), batch["target"]], 1)
        torch.testing.assert_close(seeded(model, longer), seeded(model, batch))

    def test_padding_content_changes_nothing(self, name, tmp_path):
        _, model, _ = make(name, tmp_path)
        table, batch = model.eval().encode_items(), make_batch()
        assert (batch["seq"] == 0).any()
        before = model.score(batch, table)[:, 1:]
        torch.testing.assert_close(model.score(batch, garbage_row_0(table))[:, 1:], before)

    def test_rows_of_a_batch_do_not_meet(self, name, tmp_path):
        _, model, _ = make(name, tmp_path)
        table, batch = model.eval().encode_items(), make_batch()
        alone = {k: v[2:3] for k, v in batch.items()}
        torch.testing.assert_close(model.score(alone, table)[0], model.score(batch, table)[2], rtol=1e-4, atol=1e-5)

    def test_same_seed_same_numbers(self, name, tmp_path):
        runs = []
        for _ in range(2):
            _, model, _ = make(name, tmp_path, seed=3)
            losses = model(make_batch())
            runs.append([v.item() for v in losses.values()] + [p.sum().item() for p in model.parameters()])
        assert runs[0] == runs[1]

    def test_threads_make_no_difference_between_runs(self, name, tmp_path):
        batch = {key: x.repeat_interleave(40, 0) for key, x in make_batch(length=20).items()}
        torch.set_num_threads(4)
        try:
            _, model, _ = make(name, tmp_path, dim=64, dropout=0.)
            if not trainable(model):
                return
            runs = []
            for _ in range(4):
                torch.manual_seed(0)
                model.zero_grad()
                sum(model(batch).values()).backward()
                runs.append({key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None})
        finally:
            torch.set_num_threads(1)
        for other in runs[1:]:
            torch.testing.assert_close(other, runs[0], rtol=0, atol=0)

    def test_state_holds_weights_only_and_loads_on_another_catalog(self, name, tmp_path):
        _, model, _ = make(name, tmp_path)
        _, other, _ = make(name, tmp_path, seed=9)
        assert set(model.state_dict()) == {k for k, _ in model.named_parameters()}
        other.load_state_dict(model.state_dict(), strict=True)
        _, third, _ = make(name, tmp_path, text=False)
        third.load_state_dict(model.state_dict(), strict=True)

    @pytest.mark.parametrize("missing", ["text", "image"])
    def test_a_wholly_missing_modality(self, name, missing, tmp_path):
        _, model, _ = make(name, tmp_path, **{missing: False})
        losses = model(make_batch())
        if trainable(model):
            sum(losses.values()).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert all(v.isfinite() for v in losses.values())
        assert model.eval().score(make_batch(), model.encode_items()).isfinite().all()

    def test_imports_nothing_of_the_project_and_runs_alone(self, name, tmp_path):
        shutil.copy(ROOT / "models" / f"{name}.py", tmp_path / "copied.py")
        done = subprocess.run([sys.executable, "-I", "copied.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


STAGES = [(name, kind) for name in FILES for kind in ("Pretrain", "Model") if hasattr(train.load_model_file(name), kind)]


@pytest.mark.parametrize("name, kind", STAGES)
class TestOnAGPU:
    """What a GPU would do, seen on a CPU: fake tensors have shape, type and device, and raise where a value is asked for."""

    def test_its_branches_give_the_same(self, name, kind, tmp_path, monkeypatch):
        found = []
        for is_cuda in (False, True):
            _, model, _ = make(name, tmp_path, kind=kind, dropout=0.)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "is_cuda", is_cuda)
                torch.manual_seed(0)
                losses = model(stage_batch(model))
                if trainable(model):
                    sum(losses.values()).backward()
            found.append((losses, {key: weight.grad for key, weight in model.named_parameters()}))
        torch.testing.assert_close(*found)

    def test_no_step_waits_for_it(self, name, kind, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(train, "precision", lambda device: torch.autocast("cpu", torch.bfloat16))
        for method in ("check", "means"):                        # once per epoch the host may wait
            monkeypatch.setattr(train.Watch, method, lambda *_: None)
        model, cfg, batch, mode = faked(name, tmp_path, kind, "cpu")
        rows = mock.MagicMock(users=np.arange(B), epoch=lambda *_: iter([(batch, np.arange(B))] * 2))
        with mode:
            if trainable(model):
                optimizer = train.optimizer_of(model, cfg, 1e-3)
                train.train_epoch(model, model.forward, optimizer, rows, B, None, 5., torch.device("cpu"), "")
            if kind == "Model":
                with torch.no_grad():
                    model.eval().score(batch, model.encode_items())

    @pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch does not know the device cuda")
    def test_everything_lies_on_it(self, name, kind, tmp_path):
        if name == "mdsrec":
            pytest.skip("sparse matrices cannot be faked on a GPU")
        model, _, batch, mode = faked(name, tmp_path, kind, "cuda")
        torch.set_autocast_dtype("cuda", torch.bfloat16), torch.set_autocast_enabled("cuda", True)
        try:
            with mode:
                terms = model(batch)
                assert {(v.device.type, v.dtype) for v in terms.values()} == {("cuda", torch.float32)}
                assert train.Watch(torch.device("cuda")).step(terms, next(iter(terms.values())).detach(), []).is_cuda
        finally:
            torch.set_autocast_enabled("cuda", False)
        if kind == "Model":
            with mode, torch.no_grad():
                assert model.eval().score(batch, model.encode_items()).is_cuda


def stage_batch(model):
    return {"item": torch.arange(1, N + 1)} if getattr(model, "rows", "") == "items" else make_batch()


def faked(name, tmp_path, kind, device):
    """(model, cfg, batch, mode): weights, buffers and batch as fake tensors of the device."""
    if name == "mmsr":
        pytest.skip("its shapes depend on how many distinct items a batch holds")
    _, model, cfg = make(name, tmp_path, kind=kind)
    mode = FakeTensorMode()

    def fake(x):
        x = mode.from_tensor(x)
        with mode:
            return x.to(device)

    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                module._parameters[key] = torch.nn.Parameter(fake(weight.data), weight.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = fake(buffer)
    return model, cfg, {key: fake(x) for key, x in stage_batch(model).items()}, mode


def seeded(model, batch):
    torch.manual_seed(0)                                         # sampled negatives must not hide or make a difference
    return next(iter(model(batch).values())).detach()


def leaves(table):
    return table.values() if isinstance(table, dict) else table if isinstance(table, tuple) else [table]


def garbage_row_0(table):
    def spoil(leaf):
        leaf = leaf.detach().clone()
        leaf[0] = 7 if leaf.is_floating_point() else leaf[1]
        return leaf
    if isinstance(table, dict):
        return {k: spoil(v) for k, v in table.items()}
    return tuple(map(spoil, table)) if isinstance(table, tuple) else spoil(table)
