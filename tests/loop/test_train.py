"""The loop from the command line: what is written, several seeds, bad input, bad steps."""
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data as datasets
import train
from common.files import UserError, alone_in, load_tensors
from evaluate import metrics
from extract_features import features
from helpers import ROOT, refused, run, write_shop
from loop.runs import open_run

CONTENT = ("--text", "hash", "--image", "pixels")
SMALL = (*CONTENT, "--dim", 16, "--epochs", 4, "--batch_size", 16)
TINY = ("--text_encoder", "tiny", "--image_encoder", "tiny", "--dim", 16, "--epochs", 1)
SASREC = ("--model", "sasrec", "--data", "shop")


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------- a run

def rows_of(printed):
    """The numbers of each row of a printed table."""
    return [line.split()[-8:] for line in printed.splitlines() if "masked  " in line]


def test_a_run_and_its_evaluation(shop, tmp_path):
    done = run("train.py", *SASREC, *SMALL, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "log.jsonl", "model.safetensors", "state.safetensors", "ranks-test.npy",
        "ranks-test-masked.npy", "metrics.json", "report.html",
    }
    result = metrics_of(folder)
    wanted = {"valid", "valid_masked", "test", "test_masked", "groups", "groups_masked"}
    assert wanted <= result.keys()
    log = log_of(folder)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    best = max(log, key=lambda line: line["valid"]["ndcg@10"])
    assert result["best_epoch"] == best["epoch"]
    assert result["valid"] == best["valid"]
    ranks = np.load(folder / "ranks-test.npy")
    assert len(ranks) == result["users"] == 60
    assert metrics(ranks) == result["test"] != result["test_masked"]
    assert metrics(np.load(folder / "ranks-test-masked.npy")) == result["test_masked"]
    again = run("evaluate.py", folder, cwd=tmp_path).stdout
    assert rows_of(done.stdout) == rows_of(again)
    assert len(rows_of(again)) >= 5
    plain = [f"{result['test'][c]:.4f}" for c in ("recall@10", "ndcg@10", "recall@50", "ndcg@50")]
    masked = [f"{result['test_masked'][c]:.4f}" for c in ("recall@10", "ndcg@10")]
    assert rows_of(again)[0] == ["60", *plain, "masked", *masked]


def test_several_seeds(shop, tmp_path):
    printed = run("train.py", *SASREC, "--seeds", "3,4", *SMALL, cwd=tmp_path).stdout
    runs = [tmp_path / "runs" / f"sasrec-shop-{seed}" for seed in (3, 4)]
    values = [metrics_of(folder)["test"]["ndcg@10"] for folder in runs]
    assert values[0] != values[1]
    lines = [line for line in printed.splitlines() if "sasrec on shop" in line and "±" in line]
    assert f"{np.mean(values):.4f} ±{np.std(values, ddof=1):.4f}" in lines[0]


@pytest.mark.parametrize("model", ["sasrec", "mdsrec", "pop"])
def test_the_same_command_gives_the_same_bits(shop, tmp_path, model):
    flags = ["--model", model, "--data", "shop", "--device", "cpu"]    # a GPU adds in any order
    flags += () if model == "pop" else SMALL
    for out in ("a", "b"):
        run("train.py", *flags, "--out", out, cwd=tmp_path)
    a, b = tmp_path / "a" / f"{model}-shop-0", tmp_path / "b" / f"{model}-shop-0"
    weights = [(folder / "model.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]
    assert metrics_of(a)["test"] == metrics_of(b)["test"]


def test_patience_ends_a_run(shop, tmp_path):
    flags = ("--dim", 8, "--epochs", 60, "--patience", 2, "--lr", 0.05, "--dropout", 0.1)
    run("train.py", *SASREC, *flags, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    values = [line["valid"]["ndcg@10"] for line in log_of(folder)]
    result = metrics_of(folder)
    assert np.argmax(values) + 1 == result["best_epoch"]
    assert result["valid"] == log_of(folder)[result["best_epoch"] - 1]["valid"]
    assert result["epochs"] == len(values) == result["best_epoch"] + 2 < 60


@pytest.mark.parametrize("flags, best", [((), 1), (("--mask_history",), 2)])
def test_the_epoch_that_validation_chooses_is_the_one_that_is_tested(shop, tmp_path, flags, best):
    """Of equal epochs the first; by the masked metric if --mask_history says so; not the last."""
    model = ROOT / "tests" / "loop" / "scripted.py"
    run("train.py", "--model", model, "--data", "shop", *flags, cwd=tmp_path)
    folder = tmp_path / "runs" / "scripted-shop-0"
    log, result = log_of(folder), metrics_of(folder)
    assert log[0]["valid"] == log[2]["valid"] != log[1]["valid"] == log[3]["valid"]
    assert log[0]["valid"]["ndcg@10"] > log[1]["valid"]["ndcg@10"]
    assert log[0]["valid_masked"]["ndcg@10"] < log[1]["valid_masked"]["ndcg@10"]
    assert result["best_epoch"] == best and result["epochs"] == 4
    assert result["valid"] == log[best - 1]["valid"]
    assert result["valid_masked"] == log[best - 1]["valid_masked"]


@pytest.mark.parametrize("mask_history, best", [(False, 2), (True, 3)])
def test_the_best_epoch_has_the_best_ndcg_at_10(tmp_path, monkeypatch, mask_history, best):
    scripts = [    # one an epoch: of recall, NDCG, masked NDCG
        (.9, .1, .1), (.5, .3, .2), (.1, .2, .3), (.1, .3, .3),
    ]

    def scripted(model, dataset, cfg, split, device, most):
        assert split == "valid" and most == 7
        recall, ndcg, masked = scripts[progress.epoch - 1]
        return {
            "recall@10": recall, "ndcg@10": ndcg,
            "masked": {"recall@10": 1 - recall, "ndcg@10": masked},
        }

    monkeypatch.setattr(train.evaluate, "evaluate", scripted)
    args = SimpleNamespace(valid_users=7, mask_history=mask_history)
    job = SimpleNamespace(args=args, dataset=None, cfg=None, device=None)
    model, path = torch.nn.Linear(1, 1), tmp_path / "model.safetensors"
    progress = train.Progress("train")
    for epoch in range(1, 5):
        torch.nn.init.constant_(model.weight, epoch)
        progress.epoch = epoch
        train.validate(job, model, progress, path)
    assert progress.best_epoch == best and progress.checked == 4
    assert progress.best == .3
    assert load_tensors(path)[0]["weight"].item() == best


@pytest.mark.parametrize("flags", [
    ("--split", "temporal"), ("--prefixes", "true"), ("--loss", "bce"), ("--optimizer", "adamw")
])
def test_other_ways_through_the_loop(shop, tmp_path, flags):
    run("train.py", *SASREC, *SMALL, *flags, cwd=tmp_path)
    assert metrics_of(tmp_path / "runs" / "sasrec-shop-0")["users"] > 0


# ---------------- what is on disk is never lost

def test_an_earlier_run_is_never_overwritten(shop, tmp_path):
    for lr in ("1e-3", "1e-2"):
        run("train.py", *SASREC, "--lr", lr, "--dim", 8, "--epochs", 1, cwd=tmp_path)
    for name, lr in (("sasrec-shop-0", 1e-2), ("sasrec-shop-0~1", 1e-3)):
        config = json.loads((tmp_path / "runs" / name / "config.json").read_text())
        assert config["config"]["lr"] == lr


def test_a_refused_run_displaces_none(shop, tmp_path):
    run("train.py", *SASREC, *SMALL, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    before = metrics_of(folder)
    done = run("train.py", *SASREC, *SMALL, "--lr", "1e30", cwd=tmp_path, ok=False)
    refused(done, "lower --lr")
    assert "is runs/sasrec-shop-0 again" in done.stdout
    assert metrics_of(folder) == before
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_two_processes_never_write_one_run(shop, tmp_path):
    run("train.py", *SASREC, *SMALL, cwd=tmp_path)
    with alone_in(tmp_path / "runs" / "sasrec-shop-0"):    # as another process would
        for more in ((), ("--resume",)):
            done = run("train.py", *SASREC, *SMALL, *more, cwd=tmp_path, ok=False)
            refused(done, "another process is writing runs/sasrec-shop-0")
    run("train.py", *SASREC, *SMALL, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ("extract_features.py", *CONTENT),
    ("train.py", "--model", "sasrec", "--dim", "8", "--epochs", "1"),
])
def test_processes_that_prepare_the_same_data_wait_for_each_other(command, shop, tmp_path):
    script, *flags = command
    processes = []
    for n in range(3):
        out = ["--out", str(n)] if script == "train.py" else []
        processes.append(subprocess.Popen(
            [sys.executable, ROOT / script, "--data", "shop", *flags, *out], cwd=tmp_path,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("preparing data/shop" in out for out in printed) == 1
    assert not list((tmp_path / "data").glob("*~*"))


def test_a_run_on_data_that_changed_is_refused(shop, tmp_path):
    run("train.py", "--model", "pop", "--data", "shop", cwd=tmp_path)
    path = shop / "interactions.csv"
    path.write_text("".join(path.read_text().splitlines(True)[:-2]))
    run("data.py", "shop", cwd=tmp_path)
    refused(run("evaluate.py", "runs/pop-shop-0", cwd=tmp_path, ok=False), "other data")
    again = ("--model", "pop", "--data", "shop", "--resume")
    refused(run("train.py", *again, cwd=tmp_path, ok=False), "sequences_sha256")


def test_a_run_of_another_version_of_the_model_is_refused(shop, tmp_path):
    run("train.py", *SASREC, "--dim", 8, "--epochs", 1, cwd=tmp_path)
    path = tmp_path / "runs" / "sasrec-shop-0" / "config.json"
    config = json.loads(path.read_text())
    config["config"]["colour"] = "red"
    path.write_text(json.dumps(config))
    refused(run("evaluate.py", path.parent, cwd=tmp_path, ok=False), "had the setting colour")


def test_a_truncated_checkpoint_is_one_sentence(shop, tmp_path):
    run("train.py", *SASREC, "--dim", 8, "--epochs", 1, cwd=tmp_path)
    path = tmp_path / "runs" / "sasrec-shop-0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    done = run("evaluate.py", path.parent, cwd=tmp_path, ok=False)
    refused(done, "model.safetensors cannot be read")


# ---------------- bad input

MDSREC = ("--model", "mdsrec", "--data", "shop", *CONTENT)
MMSR = ("--model", "mmsr", "--data", "shop", *TINY)


@pytest.mark.parametrize("args, sentence", [
    ((*SASREC, "--colour", "red"), "--colour"),
    ((*SASREC, "--epoch", "1"), "--epoch"),    # no abbreviations either
    (("--model", "nobody", "--data", "shop"), "--model nobody is unknown"),
    (("--model", "", "--data", "shop"), "--model  is unknown"),
    (("--model", "sasrec", "--data", "nowhere"), "neither a folder nor a known data set"),
    ((*SASREC, "--heads", "3"), "multiple of heads"),
    ((*SASREC, "--loss", "hinge"), "invalid choice"),
    ((*SASREC, "--device", "cuda:77"), "--device cuda:77"),
    ((*SASREC, "--seeds", "1,x"), "--seeds 1,x"),
    ((*SASREC, "--seeds", "1,1"), "names a seed twice"),
    ((*SASREC, "--seed", "-1"), "--seed -1 must not be negative"),
    ((*SASREC, "--lr", "nan"), "--lr nan"),
    ((*SASREC, "--lr", "1e30", "--epochs", "2"), "lower --lr"),
    ((*SASREC, "--batch_size", "0"), "--batch_size 0"),
    ((*SASREC, "--dropout", "1"), "--dropout 1.0"),
    ((*SASREC, "--clip_norm", "nan"), "--clip_norm nan"),
    ((*SASREC, "--out", "/proc/nowhere"), "error: "),
    ((*SASREC, "--train_share", "0"), "--train_share"),
    ((*MDSREC, "--use_ica", "perhaps"), "neither true nor false"),
    ((*MDSREC, "--inner", "-5"), "--inner -5"),
    ((*MDSREC, "--neighbors", "-1"), "--neighbors -1"),
    (("--model", "fmmsrec", *SASREC[2:], "--schedule", "square"), "invalid choice"),
    ((*MMSR, "--max_tokens", "2"), "max_tokens 2 of tiny must be from 3 to 512"),
    ((*MMSR, "--encoder_lr", "-1"), "--encoder_lr -1"),
    (("--model", "pop", "--data", "single"), "no valid and no test targets"),
    (("--model", "sasrec", "--data", "three"), "no training rows"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(shop, tmp_path, args, sentence):
    for name, purchases in (("three", 3), ("single", 1)):
        (tmp_path / name).mkdir()
        lines = ["user,item,time"]
        for u in range(9):
            lines += [f"u{u},i{(u + t) % 5},{t}" for t in range(purchases)]
        (tmp_path / name / "interactions.csv").write_text("\n".join(lines))
    refused(run("train.py", *args, cwd=tmp_path, ok=False), sentence)


def test_a_bad_setting_is_refused_before_any_data_is_prepared(shop, tmp_path):
    run("train.py", *SASREC, "--seed", "-1", cwd=tmp_path, ok=False)
    assert not (tmp_path / "data").exists()


# ---------------- bad steps

class Rows(list):
    """Batches that are given."""
    users = np.array([8, 9])

    def epoch(self, size, rng):
        return ((batch, np.array([0, 1])) for batch in self)


def test_a_step_that_is_not_finite_is_skipped_and_named():
    model = torch.nn.Linear(3, 1)
    optimizer = train.optimizer_of(model, SimpleNamespace(weight_decay=0.), 1e-2)
    before = [weight.clone() for weight in model.parameters()]

    def losses(batch):
        return {"next_item": model(batch["x"]).mean(), "other": torch.zeros(())}

    trainer = train.Trainer(model, losses, optimizer, torch.device("cpu"), 2)
    good = {"x": torch.ones(2, 3)}
    bad = {"x": torch.full((2, 3), torch.nan)}
    message = r"epoch 7, step 0: the loss next_item is not finite .*\[8, 9\]"
    with pytest.raises(UserError, match=message):
        train.train_epoch(trainer, Rows([bad]), None, "epoch 7")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with pytest.raises(UserError, match="step 1"):    # found at the end, though good steps followed
        train.train_epoch(trainer, Rows([good, bad, good]), None, "epoch 8")
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert not torch.equal(before[0], model.weight)


def test_the_means_are_those_of_the_terms():
    watch = train.Watch(torch.device("cpu"))
    for value in (1., 3.):
        terms = {"a": torch.tensor(value), "b": torch.tensor(2 * value)}
        assert watch.step(terms, torch.tensor(1.), [0]) == 0
    assert watch.means() == {"a": 2, "b": 4}


def test_gradients_are_clipped():
    model = torch.nn.Linear(3, 1)
    optimizer = train.optimizer_of(model, SimpleNamespace(weight_decay=0.), 1e-2)

    def losses(batch):
        return {"next_item": 1e3 * model(batch).sum()}

    trainer = train.Trainer(model, losses, optimizer, torch.device("cpu"), 2, clip_norm=.5)
    train.train_step(trainer, torch.ones(2, 3), train.Watch(trainer.device), [0])
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    assert norm.item() == pytest.approx(.5, rel=1e-4)


def test_a_step_follows_the_gradient_of_all_terms_of_its_own_batch():
    model = torch.nn.Linear(3, 1).eval()
    optimizer = train.optimizer_of(model, SimpleNamespace(weight_decay=0.), 1e-2)

    def losses(batch):
        assert model.training    # dropout is on
        return {"next_item": model(batch).sum(), "other": 2 * model.weight.sum()}

    trainer = train.Trainer(model, losses, optimizer, torch.device("cpu"), 2)
    batches = Rows([torch.ones(2, 3), torch.full((2, 3), 5.)])
    train.train_epoch(trainer, batches, None, "epoch 1")
    assert model.weight.grad.tolist() == [[12, 12, 12]]    # 2 rows of 5, and 2


@pytest.mark.parametrize("term, named", [
    (lambda weight: torch.tensor(torch.inf), "the loss other"),    # its gradient is finite
    (lambda weight: (0 * weight).sqrt().sum(), "the gradient"),    # its value is
])
def test_a_step_is_bad_by_its_loss_or_its_gradient_alone(term, named):
    model = torch.nn.Linear(3, 1)
    optimizer = train.optimizer_of(model, SimpleNamespace(weight_decay=0.), 1e-2)
    before = model.weight.detach().clone()

    def losses(batch):
        return {"next_item": model.weight.sum(), "other": term(model.weight)}

    trainer = train.Trainer(model, losses, optimizer, torch.device("cpu"), 2)
    with pytest.raises(UserError, match=f"step 0: {named} is not finite"):
        train.train_epoch(trainer, Rows([None, None]), None, "epoch 1")    # the first is named
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_optimizer_is_that_of_the_settings(kind):
    cfg = SimpleNamespace(optimizer=kind, weight_decay=.25)
    optimizer = train.optimizer_of(torch.nn.Linear(3, 1), cfg, 1e-2)
    assert type(optimizer) is {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    group, = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-2, .25)


def test_each_epoch_has_its_own_chance_and_learning_rate(shop, tmp_path, monkeypatch):
    epochs, started = [], []

    def watched(trainer, rows, rng, where):
        order = np.concatenate([index for _, index in rows.epoch(16, rng)])
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        chance = rng.random(), torch.rand(()).item(), np.random.random()
        weight = trainer.weights[-1][-1, -1].item()
        epochs.append((where, rows.kind, rates, order.tolist(), chance, weight))
        return {"next_item": 0.}

    monkeypatch.setattr(train, "train_epoch", watched)
    monkeypatch.setattr(train, "start_from", lambda model, weights, job: started.append(weights))
    text = (ROOT / "tests" / "loop" / "toy.py").read_text()
    for old, new in (
        ('"cosine"', '"linear"'),
        ("self.started = 0", "self.shift = nn.Parameter(torch.zeros(3)); self.started = 0"),
        ("return [{", 'return [{"params": [self.shift]}, {'),    # a group at the common rate
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "linear.py").write_text(text)
    flags = ("--pretrain_epochs", 2, "--epochs", 5, "--patience", 9, "--lr", .2, "--seeds", "0,1")
    run("train.py", "--model", "linear.py", "--data", "shop", *flags, cwd=tmp_path)
    where, kinds, rates, orders, chances, weights = zip(*epochs)
    assert where == 2 * (
        "pretrain epoch 1", "pretrain epoch 2", *(f"train epoch {n}" for n in range(1, 6))
    )
    assert kinds == 2 * (*["items"] * 2, *["prefixes"] * 5)
    # the second group has half the rate, as param_groups says; all fall with the stage's epochs
    expected = [[1e-3], [5e-4], [.2, .1], [.16, .08], [.12, .06], [.08, .04], [.04, .02]]
    for found, wanted in zip(rates, 2 * expected):
        assert found == pytest.approx(wanted)
    assert len(set(map(tuple, orders[2:7]))) == 5
    assert len({tuple(sorted(order)) for order in orders[2:7]}) == 1
    for draws in zip(*chances):    # another for each seed, stage and epoch
        assert len(set(draws)) == 14
    assert weights[2] != weights[9]    # each seed begins with other weights
    # and its second stage with those of its first
    assert [state["item.weight"][-1, -1].item() for state in started] == [weights[1], weights[8]]


def test_schedules():
    factors = {name: [f(share) for share in (0, .5, .8)] for name, f in train.SCHEDULES.items()}
    assert factors["constant"] == [1, 1, 1]
    assert factors["step"] == [1, 1, .1]
    assert factors["linear"] == pytest.approx([1, .5, .2])
    assert factors["cosine"] == pytest.approx([1, .5, (1 + np.cos(.8 * np.pi)) / 2])


def test_a_model_with_weights_and_no_recipe_is_refused(tmp_path):
    write_shop(tmp_path / "shop")
    text = (ROOT / "tests" / "loop" / "toy.py").read_text()
    recipe = text[text.index("    batch_size"):text.index("class Pretrain")]
    pretrain = text[text.index("class Pretrain"):text.index("class Model")]
    (tmp_path / "bare.py").write_text(text.replace(recipe, "\n\n").replace(pretrain, ""))
    done = run("train.py", "--model", "bare.py", "--data", "shop", cwd=tmp_path, ok=False)
    refused(done, "its Config has no recipe")


# ---------------- validation of large sets

def test_validation_every_few_epochs(shop, tmp_path):
    run("train.py", *SASREC, "--epochs", 5, "--valid_every", 2, cwd=tmp_path)
    folder = tmp_path / "runs/sasrec-shop-0"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log if "valid" in row] == [2, 4]
    assert json.loads((folder / "metrics.json").read_text())["best_epoch"] in (2, 4)
    done = run("train.py", *SASREC, "--epochs", 2, "--valid_every", 3, cwd=tmp_path, ok=False)
    refused(done, "--valid_every 3 is more than the 2 epochs of the run")


def test_patience_waits_for_a_validation(shop, tmp_path):
    flags = ("--epochs", 40, "--patience", 1, "--valid_every", 3, "--lr", 0.1)
    run("train.py", *SASREC, *flags, cwd=tmp_path)
    result = json.loads((tmp_path / "runs/sasrec-shop-0/metrics.json").read_text())
    assert result["epochs"] % 3 == 0 and result["epochs"] == result["best_epoch"] + 3


def test_the_epoch_is_selected_on_some_users_and_reported_on_all(shop, tmp_path):
    data = datasets.load(shop, root=tmp_path / "data")
    some = data.evaluated_rows("valid", 50, most=10)
    everybody = data.evaluated_rows("valid", 50)
    assert len(some) == 10 and set(some.users) < set(everybody.users)
    assert data.evaluated_rows("valid", 50, most=10) is some
    assert len(data.evaluated_rows("valid", 50, most=10_000)) == len(everybody)
    run("train.py", *SASREC, "--epochs", 2, "--valid_users", 10, cwd=tmp_path)
    folder = tmp_path / "runs/sasrec-shop-0"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row in log:    # a share of ten users
        hits = 10 * row["valid"]["recall@10"]
        assert hits == pytest.approx(round(hits))
    result = json.loads((folder / "metrics.json").read_text())
    whole = len(everybody) * result["valid"]["recall@10"]
    assert whole == pytest.approx(round(whole))
    refused(run("train.py", *SASREC, "--valid_users", 0, cwd=tmp_path, ok=False),
            "--valid_users 0 must be at least 1")


def test_the_precision_that_is_asked_for_reaches_every_step(shop, tmp_path, monkeypatch):
    asked = []
    real = train.precision

    def watched(device, name):
        asked.append(name)
        return real(device, name)

    monkeypatch.setattr(train, "precision", watched)
    run("train.py", *SASREC, "--epochs", 1, "--precision", "float32", cwd=tmp_path)
    assert set(asked) == {"float32"}
    settings = json.loads((tmp_path / "runs/sasrec-shop-0/config.json").read_text())
    assert settings["precision"] == "float32"
    refused(run("train.py", *SASREC, "--epochs", 2, "--resume", cwd=tmp_path, ok=False),
            "other settings (precision)")


def test_nothing_is_compiled_by_torch_that_needs_a_c_compiler():
    """The setting is read when torch is imported first."""
    lines = (ROOT / "train.py").read_text().splitlines()
    setting = next(i for i, line in enumerate(lines) if "TORCH_DISABLE_NATIVE_JIT" in line)
    assert setting < lines.index("import torch")
    assert os.environ["TORCH_DISABLE_NATIVE_JIT"] == "1"


def test_compile_without_a_compiler_ends_in_one_sentence(shop, tmp_path, monkeypatch):
    class Missing(torch._inductor.exc.InductorError):
        def __init__(self):
            Exception.__init__(self, "InvalidCxxCompiler: No working C++ compiler found")

    def broken(forward, dynamic):
        def call(batch):
            raise Missing
        return call

    Missing.__module__ = "torch._inductor.exc"
    monkeypatch.setattr(torch, "compile", broken)
    done = run("train.py", *SASREC, "--compile", cwd=tmp_path, ok=False)
    refused(done, "--compile cannot be used here (InvalidCxxCompiler")
    with pytest.raises(ZeroDivisionError):    # other errors stay what they are
        monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
        train.compiled(lambda batch: 1 / 0)({})


@pytest.mark.parametrize("given, limit", [("0.25", .25), ("0", float("inf"))])
def test_gradients_are_clipped_at_the_models_own_setting(shop, tmp_path, monkeypatch, given, limit):
    limits = []
    real = torch.nn.utils.clip_grad_norm_

    def watched(weights, max_norm, **more):
        limits.append(max_norm)
        return real(weights, max_norm, **more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    run("train.py", *SASREC, "--epochs", 1, "--clip_norm", given, cwd=tmp_path)
    assert set(limits) == {limit}


# ---------------- trained on everything

def test_without_a_split_all_epochs_are_trained_and_nothing_is_tested(shop, tmp_path):
    flags = (*SASREC, *SMALL, "--split", "none")
    done = run("train.py", *flags, "--patience", 1, "--valid_every", 9, cwd=tmp_path)
    assert "4 epochs on everything, nothing is tested" in done.stdout
    note = "note: --patience and --valid_every not used: under --split none no epoch is selected"
    assert note in done.stdout
    folder = tmp_path / "runs" / "sasrec-shop-0"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "log.jsonl", "model.safetensors", "state.safetensors", "metrics.json",
        "report.html",
    }
    assert not {"valid", "test", "groups"} & metrics_of(folder).keys()
    assert [line.keys() & {"valid", "selected_by"} for line in log_of(folder)] == [set()] * 4
    assert "nothing is tested" in (folder / "report.html").read_text()
    weights = load_tensors(folder / "model.safetensors")[0]
    last = load_tensors(folder / "state.safetensors")[0]
    for name, weight in weights.items():
        assert torch.equal(weight, last[f"model.{name}"])
    refused(run("evaluate.py", folder, cwd=tmp_path, ok=False), "was trained on everything")
    # killed after the last epoch, and resumed with more
    (folder / "metrics.json").unlink()
    more = (*flags, "--patience", 1, "--valid_every", 9, "--epochs", 5, "--resume")
    run("train.py", *more, cwd=tmp_path)
    assert len(log_of(folder)) == 5
    whole = run("train.py", *more[:-1], "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "sasrec-shop-0" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("model", ["pop", "msm4sr"])
def test_other_models_without_a_split(shop, tmp_path, model):
    flags = (*SMALL, "--pretrain_epochs", 2) if model == "msm4sr" else CONTENT
    run("train.py", "--model", model, "--data", "shop", *flags, "--split", "none", "--seeds", "0,1",
        cwd=tmp_path)
    assert "test" not in metrics_of(tmp_path / "runs" / f"{model}-shop-1")


def test_another_cut_is_another_run(shop, tmp_path):
    days = ("--split", "temporal", "--cut", "2017-07-18,2017-07-20")
    run("train.py", *SASREC, *SMALL, *days, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    assert rows_of(run("evaluate.py", folder, cwd=tmp_path).stdout)
    with (folder / "config.json").open() as file:
        dataset = open_run(folder, "cpu").dataset
        assert dataset.cut == json.load(file)["cut"] == days[-1]
    run("train.py", *SASREC, *SMALL, "--split", "temporal", "--out", "plain", cwd=tmp_path)
    both = ("runs/sasrec-shop-0", "plain/sasrec-shop-0")
    refused(run("evaluate.py", *both, cwd=tmp_path, ok=False), "different data or splits")
    other = ("--split", "temporal", "--cut", ".8,.9", "--resume")
    done = run("train.py", *SASREC, *SMALL, *other, cwd=tmp_path, ok=False)
    refused(done, "other settings (cut)")


# ---------------- what was given and is not used

def notes_of(printed):
    return [line for line in printed.splitlines() if line.startswith(("note: ", "warning: "))]


def test_every_command_says_what_is_not_used(shop, tmp_path):
    items = [{"item": f"i{i}", "title": "Mug", "images": [f"img/{i}.png"], "price": 1}
             for i in range(30)]
    (shop / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (shop / "products.json").write_text("[]")
    np.save(shop / "idle.npy", np.ones(3))
    expected = [
        "note: items.jsonl: keys not read: price (30)",
        "note: not read: products.json; what is read: interactions.csv, items.jsonl",
        "note: not used: idle.npy; vectors are given as --text FILE or --image FILE",
        f"note: 30 of 30 picture paths of the items are not on disk, the first is img/0.png (there "
        f"is no folder img), in {shop}",
    ]
    commands = {
        "data.py": ("shop",),
        "extract_features.py": ("--data", "shop", *CONTENT),
        "train.py": ("--model", "mdsrec", "--data", "shop", *SMALL),
    }
    for script, args in commands.items():
        printed = notes_of(run(script, *args, cwd=tmp_path).stdout)
        assert printed[:4] == expected, script
    assert printed[4:] == [
        "warning: no item of shop has a picture, which mdsrec reads: it runs without"
    ]


def test_a_picture_path_that_is_nearly_right(shop, tmp_path):
    (shop / "img").mkdir()
    (shop / "img" / "A.PNG").write_bytes(b"x")
    item = {"item": "i1", "images": ["img/a.png"]}
    (shop / "items.jsonl").write_text(json.dumps(item) + "\n")
    done = run("data.py", "shop", cwd=tmp_path)
    note, = [line for line in notes_of(done.stdout) if "disk" in line]
    assert "the first is img/a.png (but there is A.PNG)" in note


@pytest.mark.parametrize("named", [[], ["img/c.jpg", "img/film"]])
def test_pictures_that_no_item_names(shop, tmp_path, named):
    (shop / "img" / "film").mkdir(parents=True)
    for name in ("b.jpg", "a.jpg"):
        (shop / "img" / name).write_bytes(b"x")
    if named:
        for name in ("c.jpg", "film/1.jpg"):    # a film is one picture
            (shop / "img" / name).write_bytes(b"x")
        item = {"item": "i1", "images": named}
        (shop / "items.jsonl").write_text(json.dumps(item) + "\n")
    assert (
        f"note: 2 pictures in {shop} are named by no item, the first is img/a.jpg: give the items "
        f'a key images, such as "images": ["img/a.jpg"]'
    ) in notes_of(run("data.py", "shop", cwd=tmp_path).stdout)


@pytest.mark.parametrize("model, flags, idle", [
    ("sasrec", CONTENT, ["--text hash", "--image pixels"]),
    ("cosine", CONTENT, []),
    ("srmml", CONTENT, []),
    ("pop", ("--image", "pixels"), ["--image pixels"]),
])
def test_encoders_that_a_model_does_not_read(shop, tmp_path, model, flags, idle):
    small = () if model in ("pop", "cosine") else ("--dim", 16, "--epochs", 1)
    done = run("train.py", "--model", model, "--data", "shop", *flags, *small, cwd=tmp_path)
    notes = [line for line in notes_of(done.stdout) if "is not used" in line]
    assert notes == [f"note: {flag} is not used: {model} does not read it" for flag in idle]


def test_seed_and_seeds_together_are_refused(shop, tmp_path):
    done = run("train.py", *SASREC, "--seed", 1, "--seeds", "0,1", cwd=tmp_path, ok=False)
    refused(done, "give --seed or --seeds, not both")


# ---------------- vectors of one's own

def test_own_vectors_from_the_command_to_the_evaluation(shop, tmp_path):
    rows = np.random.default_rng(0).standard_normal((30, 6))
    rows[4] = 0
    np.save(tmp_path / "v.npy", rows)
    done = run("train.py", "--model", "mdsrec", "--data", "shop", *SMALL, "--image", "v.npy",
               cwd=tmp_path)
    assert "note: 1 of 30 items have no vector in v.npy, or zeros" in done.stdout
    folder = tmp_path / "runs" / "mdsrec-shop-0"
    groups = metrics_of(folder)["groups"]
    assert groups["without image"]["users"] + groups["with image"]["users"] == 60
    dataset = datasets.load(shop, root=tmp_path / "data")
    image = features(dataset, "image", image=tmp_path / "v.npy")["image"]
    keys = [json.loads(line)["item"] for line in open(shop / "items.jsonl")]
    place = {item["key"]: number for number, item in enumerate(dataset.items)}
    for key, row in zip(keys, rows):    # in the order of the user's own items.jsonl
        np.testing.assert_array_equal(image[place[key]], row.astype(np.float32))
    before = rows_of(done.stdout)
    (tmp_path / "elsewhere").mkdir()
    again = run("evaluate.py", folder, cwd=tmp_path / "elsewhere").stdout
    assert rows_of(again) == before
    # changed vectors are noticed, and those of the run kept
    np.save(tmp_path / "v.npy", rows + 1)
    again = run("train.py", "--model", "mdsrec", "--data", "shop", *SMALL, "--image", "v.npy",
                cwd=tmp_path)
    assert "have changed" in again.stdout
    (tmp_path / "v.npy").unlink()
    assert rows_of(run("evaluate.py", folder, cwd=tmp_path).stdout) == rows_of(again.stdout)


def test_features_that_came_with_the_data_and_are_not_used_are_said(tmp_path, real):
    flags = ("--model", "cosine", "--data", real("scientific-mm"))
    assert "are not used" not in run("train.py", *flags, cwd=tmp_path).stdout
    done = run("train.py", *flags, "--text", "hash", cwd=tmp_path)
    assert (
        "note: the text features that came with the data are not used: leave --text out for them"
    ) in done.stdout


@pytest.mark.parametrize("name", ["v.npz", "v.csv", "v.pkl"])
def test_files_of_other_kinds_are_no_vectors(shop, tmp_path, name):
    (tmp_path / name).write_text("1,2")
    done = run("train.py", "--model", "mdsrec", "--data", "shop", *SMALL, "--text", name,
               cwd=tmp_path, ok=False)
    refused(done, f"{name} is no file of vectors: save them with numpy.save, as .npy, or as")


@pytest.mark.parametrize("rows, sentence", [
    (np.ones((29, 4)), "v.npy has 29 rows, and the data set has 30 items"),
    (np.full((30, 4), np.nan), "row 0 .counted from 0. has a number that is not finite"),
])
def test_vectors_that_do_not_fit_are_one_sentence(shop, tmp_path, rows, sentence):
    np.save(tmp_path / "v.npy", rows)
    done = run("train.py", "--model", "mdsrec", "--data", "shop", *SMALL, "--text", "v.npy",
               cwd=tmp_path, ok=False)
    assert re.search(sentence, done.stderr)
    refused(done)
