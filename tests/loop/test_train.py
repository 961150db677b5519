"""The loop from the command line: what is written, resume after a kill, bad steps, stages, several seeds."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, write_shop
from PIL import Image

import data as datasets
import evaluate as evaluation
import train
from sources import common
from sources.common import UserError

CONTENT = ("--text", "hash", "--image", "pixels")
TINY = ("--text_encoder", "tiny", "--image_encoder", "tiny", "--dim", 16, "--epochs", 1)
SMALL = (*CONTENT, "--dim", 16, "--epochs", 4, "--batch_size", 16)

TOY = '''
from dataclasses import dataclass
import torch
from torch import nn
READS = ()
@dataclass
class Config:
    dim: int = 8           # size of everything
    heads: int = 1
    layers: int = 1
    dropout: float = 0.
    max_len: int = 20
    batch_size: int = 16
    prefixes: bool = True
    lr: float = 1e-2
    weight_decay: float = 0.
    epochs: int = 3
    patience: int = 3
    pretrain_epochs: int = 2
    pretrain_lr: float = 1e-3
    schedule: str = "cosine"
class Pretrain(nn.Module):
    rows = "items"
    def __init__(self, cfg, catalog):
        super().__init__()
        self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim)
    def forward(self, batch):
        return {"norm": (self.item(batch["item"]).norm(dim=-1) - 1).square().mean()}
class Model(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim)
        self.started = 0
    def init_from(self, state):
        assert set(state) == set(self.state_dict())
        self.load_state_dict(state)
        assert (self.item.weight.norm(dim=-1).mean() - 1).abs() < (torch.randn(99, 8).norm(dim=-1).mean() - 1).abs()
    def param_groups(self, cfg):
        return [{"params": [self.item.weight], "lr": cfg.lr / 2, "weight_decay": 0.1}]
    def on_epoch_start(self, epoch):
        self.started = epoch
    def forward(self, batch):
        assert self.started and batch["target"][:, -1].all()
        x = self.item(batch["seq"][:, -1]) @ self.item.weight.T
        return {"next_item": nn.functional.cross_entropy(x, batch["target"][:, -1]), "twice": 0.1 * x.square().mean()}
    def encode_items(self):
        return (self.item.weight,)
    def score(self, batch, table):
        return table[0][batch["seq"][:, -1]] @ table[0].T
'''


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_and_its_evaluation(shop, tmp_path):
    done = run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.jsonl", "model.safetensors", "state.safetensors",
                                                  "ranks-test.npy", "metrics.json", "report.html"}
    result = metrics_of(folder)
    assert {"valid", "valid_masked", "test", "test_masked", "groups", "groups_masked"} <= result.keys()
    assert set(result["test"]) == {f"{m}@{k}" for m in ("recall", "ndcg", "mrr") for k in (5, 10, 20, 50)}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    best = max(log, key=lambda line: line["valid"]["ndcg@10"])
    assert result["best_epoch"] == best["epoch"] and result["valid"] == best["valid"]
    assert len(np.load(folder / "ranks-test.npy")) == result["users"] == 60
    again = run("evaluate.py", folder, cwd=tmp_path).stdout
    rows = lambda text: [line.split()[-8:] for line in text.splitlines() if "masked  " in line]
    assert rows(done.stdout) == rows(again) and len(rows(again)) >= 5
    assert rows(again)[0] == ["60", *(f"{result['test'][c]:.4f}" for c in ("recall@10", "ndcg@10", "recall@50", "ndcg@50")),
                              "masked", *(f"{result['test_masked'][c]:.4f}" for c in ("recall@10", "ndcg@10"))]
    both = run("evaluate.py", folder, folder, cwd=tmp_path).stdout
    assert "+0.0000, 95 % interval +0.0000 to +0.0000" in both


def test_an_earlier_run_is_never_overwritten(shop, tmp_path):
    for lr in ("1e-3", "1e-2"):
        run("train.py", "--model", "sasrec", "--data", "shop", "--lr", lr, "--dim", 8, "--epochs", 1, cwd=tmp_path)
    config = lambda name: json.loads((tmp_path / "runs" / name / "config.json").read_text())["config"]
    assert config("sasrec-shop-0")["lr"] == 1e-2 and config("sasrec-shop-0~1")["lr"] == 1e-3


def test_a_refused_run_displaces_none(shop, tmp_path):
    run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, cwd=tmp_path)
    before = metrics_of(tmp_path / "runs" / "sasrec-shop-0")
    done = run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, "--heads", 3, cwd=tmp_path, ok=False)
    assert done.returncode == 2 and "is runs/sasrec-shop-0 again" in done.stdout
    assert metrics_of(tmp_path / "runs" / "sasrec-shop-0") == before and len(list((tmp_path / "runs").iterdir())) == 1


def test_two_processes_never_write_one_run(shop, tmp_path):
    run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, cwd=tmp_path)
    with common.alone_in(tmp_path / "runs" / "sasrec-shop-0"):   # as another process would
        for more in ((), ("--resume",)):
            done = run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, *more, cwd=tmp_path, ok=False)
            assert done.returncode == 2 and "another process is writing runs/sasrec-shop-0" in done.stderr
    run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, cwd=tmp_path)


@pytest.mark.parametrize("command", [("extract_features.py", *("--text", "hash", "--image", "pixels")),
                                     ("train.py", "--model", "sasrec", "--dim", "8", "--epochs", "1")])
def test_processes_that_prepare_the_same_data_wait_for_each_other(command, shop, tmp_path):
    script, *flags = command
    out = lambda n: ["--out", str(n)] if script == "train.py" else []
    processes = [subprocess.Popen([sys.executable, ROOT / script, "--data", "shop", *flags, *out(n)], cwd=tmp_path, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for n in range(3)]
    printed = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0]
    assert sum("preparing data/shop" in out for out in printed) == 1 and not list((tmp_path / "data").glob("*~*"))


def test_several_seeds(shop, tmp_path):
    printed = run("train.py", "--model", "sasrec", "--data", "shop", "--seeds", "3,4", *SMALL, cwd=tmp_path).stdout
    values = [metrics_of(tmp_path / "runs" / f"sasrec-shop-{s}")["test"]["ndcg@10"] for s in (3, 4)]
    assert values[0] != values[1]
    line = next(line for line in printed.splitlines() if "sasrec on shop" in line and "±" in line)
    assert f"{np.mean(values):.4f} ±{np.std(values, ddof=1):.4f}" in line


@pytest.mark.parametrize("model", ["sasrec", "mdsrec", "pop"])
def test_the_same_command_gives_the_same_bits(shop, tmp_path, model):
    settings = () if model == "pop" else SMALL
    for out in ("a", "b"):
        run("train.py", "--model", model, "--data", "shop", "--out", out, *settings, cwd=tmp_path)
    a, b = (tmp_path / out / f"{model}-shop-0" for out in "ab")
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert metrics_of(a)["test"] == metrics_of(b)["test"]


def kill_in_epoch(command, folder, epochs, cwd):
    """Start the command, and kill -9 it some way into the epoch after `epochs`; True when it was still running."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as in this process: sums depend on it
    process = subprocess.Popen(command, cwd=cwd, env=os.environ | threads, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = folder / "log.jsonl", time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= epochs:
            time.sleep(.03)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(.005)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("model, settings", [
    ("sasrec", ()), ("mdsrec", (("--batch_size", 32),)), *(("toy.py", (("--pretrain_epochs", n),)) for n in (6, 1))])
def test_killed_and_resumed_is_the_same_to_the_bit(shop, tmp_path, model, settings):
    (tmp_path / "toy.py").write_text(TOY)
    args = ["--model", model, "--data", "shop", "--epochs", 12, "--patience", 12, "--dim", 8, "--batch_size", 4, *CONTENT,
            *(x for pair in settings for x in pair)]
    run("train.py", *args, "--out", "whole", cwd=tmp_path)
    folder = lambda out: tmp_path / out / f"{Path(model).stem}-shop-0"
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args), "--out", "killed"]
    assert kill_in_epoch(command, folder("killed"), 3, tmp_path), "the run ended before it could be killed"
    assert not (folder("killed") / "metrics.json").exists()
    printed = run("train.py", *args, "--out", "killed", "--resume", cwd=tmp_path).stdout
    epochs = 12 + dict(settings).get("--pretrain_epochs", 0)
    # it went on, it did not start over; the state is written after the line, so the kill may have cost the third epoch
    assert len(re.findall(r"^(?:pre)?train epoch ", printed, re.M)) <= epochs - 2
    for file in ("model.safetensors", "ranks-test.npy"):
        assert (folder("whole") / file).read_bytes() == (folder("killed") / file).read_bytes()
    whole, killed = (metrics_of(folder(out)) for out in ("whole", "killed"))
    assert all(whole[k] == killed[k] for k in ("valid", "test", "test_masked", "groups", "best_epoch", "epochs"))
    log = lambda out: [(r["stage"], r["epoch"], r["losses"], r.get("valid")) for r in
                       map(json.loads, (folder(out) / "log.jsonl").read_text().splitlines())]
    assert log("whole") == log("killed")


def test_patience_ends_a_run_and_resume_leaves_it_ended(shop, tmp_path):
    args = ("--model", "sasrec", "--data", "shop", "--dim", 8, "--epochs", 60, "--patience", 2, "--lr", 0.05, "--dropout", 0.1)
    run("train.py", *args, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    result, log = metrics_of(folder), [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    values = [x["valid"]["ndcg@10"] for x in log]
    assert result["epochs"] == len(log) == result["best_epoch"] + 2 < 60 and np.argmax(values) + 1 == result["best_epoch"]
    before = (folder / "model.safetensors").read_bytes()
    (folder / "metrics.json").unlink()                           # killed after the last epoch, before the test
    run("train.py", *args, "--resume", cwd=tmp_path)
    assert metrics_of(folder)["test"] == result["test"] and metrics_of(folder)["epochs"] == len(log)
    assert (folder / "model.safetensors").read_bytes() == before


def test_resume_between_the_stages_and_after_a_torn_log_line(shop, tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    args = ("--model", "toy.py", "--data", "shop")
    run("train.py", *args, "--out", "whole", cwd=tmp_path)
    run("train.py", *args, "--out", "cut", "--epochs", 3, cwd=tmp_path)
    whole, cut = (tmp_path / out / "toy-shop-0" for out in ("whole", "cut"))
    log = (cut / "log.jsonl").read_text().splitlines(True)
    for file in ("metrics.json", "model.safetensors", "state.safetensors"):
        (cut / file).unlink()
    tensors, _ = common.load_tensors(cut / "pretrain.safetensors")   # as it stands when the first stage has just ended
    (cut / "log.jsonl").write_text("".join(log[:2]) + log[2][:40])
    model = torch.nn.Module()
    model.item = torch.nn.Embedding.from_pretrained(tensors["item.weight"], freeze=False)
    optimizer = torch.optim.Adam(model.parameters())
    train.save_state(cut / "state.safetensors", model, optimizer, {"stage": "pretrain", "epoch": 2, "best": -1., "best_epoch": 0,
                                                                   "seconds": 0.})
    run("train.py", *args, "--out", "cut", "--resume", cwd=tmp_path)
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert len((cut / "log.jsonl").read_text().splitlines()) == len(log)


def test_mask_history_selects_by_masked_validation(shop, tmp_path):
    run("train.py", "--model", "sasrec", "--data", "shop", "--mask_history", *SMALL, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    best = max(log, key=lambda x: x["valid_masked"]["ndcg@10"])
    assert metrics_of(folder)["best_epoch"] == best["epoch"] and metrics_of(folder)["valid_masked"] == best["valid_masked"]


@pytest.mark.parametrize("extra", [("--split", "temporal"), ("--prefixes", "true"), ("--loss", "bce"), ("--optimizer", "adamw")])
def test_other_ways_through_the_loop(shop, tmp_path, extra):
    run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, *extra, cwd=tmp_path)
    assert metrics_of(tmp_path / "runs" / "sasrec-shop-0")["users"] > 0


def test_a_run_on_data_that_changed_is_refused(shop, tmp_path):
    run("train.py", "--model", "pop", "--data", "shop", cwd=tmp_path)
    lines = (shop / "interactions.csv").read_text().splitlines(True)
    (shop / "interactions.csv").write_text("".join(lines[:-2]))
    run("data.py", "shop", cwd=tmp_path)
    for done in (run("evaluate.py", "runs/pop-shop-0", cwd=tmp_path, ok=False),
                 run("train.py", "--model", "pop", "--data", "shop", "--resume", cwd=tmp_path, ok=False)):
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_resume_refuses_other_settings(shop, tmp_path):
    args = ("--model", "sasrec", "--data", "shop", "--dim", 8, "--epochs", 1)
    run("train.py", *args, cwd=tmp_path)
    done = run("train.py", *args, "--resume", "--lr", "0.5", cwd=tmp_path, ok=False)
    assert done.returncode == 2 and "(lr)" in done.stderr and "Traceback" not in done.stderr
    assert "is finished" in run("train.py", *args, "--resume", cwd=tmp_path).stdout


@pytest.mark.parametrize("args, sentence", [
    (("--model", "sasrec", "--data", "shop", "--colour", "red"), "--colour"),
    (("--model", "sasrec", "--data", "shop", "--epoch", "1"), "--epoch"),          # no abbreviations either
    (("--model", "nobody", "--data", "shop"), "--model nobody is unknown"),
    (("--model", "sasrec", "--data", "nowhere"), "neither a folder nor a known data set"),
    (("--model", "sasrec", "--data", "shop", "--heads", "3"), "multiple of heads"),
    (("--model", "sasrec", "--data", "shop", "--loss", "hinge"), "invalid choice"),
    (("--model", "sasrec", "--data", "shop", "--device", "cuda:77"), "--device cuda:77"),
    (("--model", "sasrec", "--data", "shop", "--seeds", "1,x"), "--seeds"),
    (("--model", "mdsrec", "--data", "shop", "--use_ica", "perhaps"), "neither true nor false"),
    (("--model", "", "--data", "shop"), "--model  is unknown"),
    (("--model", "sasrec", "--data", "shop", "--lr", "nan"), "--lr nan"),
    (("--model", "sasrec", "--data", "shop", "--lr", "1e30", "--epochs", "2"), "lower --lr"),
    (("--model", "sasrec", "--data", "shop", "--batch_size", "0"), "--batch_size 0"),
    (("--model", "sasrec", "--data", "shop", "--seed", "-1"), "--seed -1 must not be negative"),
    (("--model", "mdsrec", "--data", "shop", *CONTENT, "--inner", "-5"), "--inner -5"),
    (("--model", "sasrec", "--data", "shop", "--out", "/proc/nowhere"), "error: "),
    (("--model", "mdsrec", "--data", "shop", *CONTENT, "--neighbors", "-1"), "neighbors must be"),
    (("--model", "fmmsrec", "--data", "shop", *CONTENT, "--schedule", "square"), "invalid choice"),
    (("--model", "mmsr", "--data", "shop", *TINY, "--max_tokens", "2"), "max_tokens 2 of tiny must be from 3 to 512"),
    (("--model", "mmsr", "--data", "shop", *TINY, "--encoder_lr", "-1"), "--encoder_lr -1"),
    (("--model", "sasrec", "--data", "shop", "--clip_norm", "nan"), "--clip_norm nan"),
    (("--model", "pop", "--data", "single"), "no valid and no test targets"),
    (("--model", "sasrec", "--data", "three"), "no training rows")])
def test_bad_input_is_one_sentence_and_exit_code_2(shop, tmp_path, args, sentence):
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "interactions.csv").write_text("user,item,time\n" + "".join(
        f"u{u},i{(u + t) % 5},{t}\n" for u in range(9) for t in range(3)))
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "interactions.csv").write_text("user,item,time\n" + "".join(f"u{u},i{u % 5},1\n" for u in range(9)))
    done = run("train.py", *args, cwd=tmp_path, ok=False)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_help_shows_every_setting_with_its_default(tmp_path):
    printed = " ".join(run("train.py", "--model", "mdsrec", "--help", cwd=tmp_path).stdout.split())
    assert "--neighbors" in printed and "H = 10 in general" in printed and "(default: 16.0)" in printed
    assert "--mask_history" in printed and "sasrec" in run("train.py", "--help", cwd=tmp_path).stdout


PRETRAIN = ("--model", "msm4sr", *SMALL, "--pretrain_epochs", 2, "--layers", 1)


def test_pre_training_on_other_sets_and_starting_from_its_weights(shop, tmp_path):
    write_shop(tmp_path / "a", seed=1, items=20), write_shop(tmp_path / "b", seed=2, items=25)
    run("train.py", *PRETRAIN, "--data", "shop", "--pretrain-data", "a,b", "--out", "first", cwd=tmp_path)
    run("train.py", *PRETRAIN, "--data", "shop", "--init", "first/msm4sr-shop-0", "--out", "second", cwd=tmp_path)
    run("train.py", *PRETRAIN, "--data", "shop", "--out", "own", cwd=tmp_path)
    weights = lambda out: (tmp_path / out / "msm4sr-shop-0" / "model.safetensors").read_bytes()
    assert weights("first") == weights("second") != weights("own")       # the second stage by itself is the same to the bit
    assert not (tmp_path / "second" / "msm4sr-shop-0" / "pretrain.safetensors").exists()
    stages = [json.loads(line)["stage"] for line in open(tmp_path / "second" / "msm4sr-shop-0" / "log.jsonl")]
    assert set(stages) == {"train"}


def picture_shop(folder, **kwargs):
    rows = map(json.loads, (write_shop(folder, **kwargs) / "items.jsonl").read_text().splitlines())
    Image.new("RGB", (8, 8), "red").save(folder / "a.png"), Image.new("RGB", (8, 8), "blue").save(folder / "b.png")
    (folder / "items.jsonl").write_text("".join(
        json.dumps(row | {"images": [("a.png", "b.png")[n % 2]]}) + "\n" for n, row in enumerate(rows)))


def test_pre_training_across_sets_with_and_without_pictures(shop, tmp_path):
    picture_shop(tmp_path / "seen", seed=1, items=20), write_shop(tmp_path / "blind", seed=2, items=25)
    width = lambda data: train.load_tensors(tmp_path / "runs" / f"msm4sr-{data}-0" / "model.safetensors")[0][
        "m2se.encoders.image.W_k.weight"].shape[1]
    run("train.py", *PRETRAIN, "--data", "shop", "--pretrain-data", "seen", cwd=tmp_path)
    assert width("shop") > 1
    run("train.py", *PRETRAIN, "--data", "seen", "--pretrain-data", "blind, shop", cwd=tmp_path)
    assert width("seen") == width("shop")
    run("train.py", *PRETRAIN, "--data", "blind", "--pretrain-data", "shop", cwd=tmp_path)
    assert width("blind") == 1
    before = metrics_of(tmp_path / "runs" / "msm4sr-shop-0")["test"]
    model, data, cfg, device = train.open_run(tmp_path / "runs" / "msm4sr-shop-0")     # shop has no pictures, its weights have
    again = evaluation.evaluate(model, data, cfg, "test", device)
    assert before == {key: again[key] for key in before}
    run("train.py", *PRETRAIN, "--data", "blind", "--init", "runs/msm4sr-seen-0", "--out", "again", cwd=tmp_path)


def test_a_run_that_starts_from_itself(shop, tmp_path):
    for init in ((), ("--init", "runs/msm4sr-shop-0")):
        done = run("train.py", *PRETRAIN, "--data", "shop", *init, cwd=tmp_path)
    assert "runs/msm4sr-shop-0~1" in done.stdout


def test_weights_of_other_features_are_named(shop, tmp_path):
    run("train.py", *PRETRAIN, "--data", "shop", "--out", "first", cwd=tmp_path)
    config = tmp_path / "first" / "msm4sr-shop-0" / "config.json"
    assert json.loads(config.read_text())["encoders"] == {"text": "hash", "image": "pixels"}
    again = lambda: run("train.py", *PRETRAIN, "--data", "shop", "--init", "first/msm4sr-shop-0", cwd=tmp_path).stdout
    assert "warning" not in again()
    config.write_text(config.read_text().replace('"hash"', '"org/bert"'))
    assert "warning: first/msm4sr-shop-0 was trained with org/bert and pixels, this run has hash and pixels" in again()


@pytest.mark.parametrize("model", ["msm4sr", "fmmsrec"])
def test_cold_start_pre_trains_without_cold_items(model, shop, tmp_path, monkeypatch):
    seen = []

    def epoch(model, forward, optimizer, rows, *args):
        seen.append(set((rows.users if isinstance(rows, train.ItemRows) else rows.flat).tolist()))
        return train_epoch(model, forward, optimizer, rows, *args)

    train_epoch = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", epoch)
    extra = ("--use_id", "false") if model == "msm4sr" else ()
    run("train.py", "--model", model, *PRETRAIN[2:], "--data", "shop", "--cold_start", *extra, cwd=tmp_path)
    data = datasets.load(tmp_path / "shop", root=tmp_path / "data")
    cold = set(np.flatnonzero(data.train_counts < datasets.COLD)) - {0}
    assert cold and not seen[0] & cold and seen[0] | cold == set(range(1, data.n_items + 1)) == seen[-1]
    kept = train.load_tensors(tmp_path / "runs" / f"{model}-shop-0" / "model.safetensors")[0]
    assert not any("item" in key for key in kept)


@pytest.mark.parametrize("args, sentence", [
    (("--model", "msm4sr", "--init", "nowhere"), "--init nowhere holds no weights"),
    (("--model", "sasrec", "--init", "nowhere"), "--init means nothing"),
    (("--model", "msm4sr", "--init", "nowhere", "--cold_start"), "leave --pretrain-data and --cold_start out"),
    (("--model", "sasrec", "--cold_start"), "sasrec is not pre-trained"),
    ((*PRETRAIN, "--init", "narrow"), "does not fit msm4sr on shop"),
    ((*PRETRAIN, "--train_share", "0"), "--train_share"),
    ((*PRETRAIN, "--pretrain_epochs", "0", "--cold_start"), "--pretrain_epochs 0 is no pre-training"),
    ((*PRETRAIN, "--pretrain_epochs", "-1"), "--pretrain_epochs -1"),
    ((*PRETRAIN, "--experts", "0"), "experts are at least 1"),
    ((*PRETRAIN, "--data", "rare", "--cold_start"), "leave --cold_start out"),
    ((*PRETRAIN, "--pretrain-data", "rare,"), "is not a list of data sets"),
    ((*PRETRAIN, "--pretrain-data", "elsewhere"), "neither a folder nor a known data set")])
def test_bad_pre_training_is_one_sentence(shop, tmp_path, args, sentence):
    write_shop(tmp_path / "rare", users=20, items=90)
    (tmp_path / "narrow").mkdir()
    train.save_tensors(tmp_path / "narrow" / "pretrain.safetensors", {"x": torch.zeros(2)})
    done = run("train.py", "--data", "shop", *CONTENT, *args, cwd=tmp_path, ok=False)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_report_page_holds_its_pictures_and_trusts_no_title(tmp_path):
    shop = write_shop(tmp_path / "shop", items=6)
    Image.new("RGB", (50, 40), "red").save(shop / "a.png")
    (shop / "bad.jpg").write_text("no picture")
    rows = [{"item": f"i{i}", "title": "<b onload=x>&" if i else "<script>alert(1)</script> a < b & c",
             "images": [("a.png", "bad.jpg")[i % 2]]} for i in range(6)]
    (shop / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, cwd=tmp_path)
    page = (tmp_path / "runs" / "sasrec-shop-0" / "report.html").read_text()
    numbers = metrics_of(tmp_path / "runs" / "sasrec-shop-0")
    assert f"{numbers['test']['ndcg@10']:.4f}" in page and f"{numbers['test_masked']['recall@50']:.4f}" in page
    assert page.count("<section>") == 8 and "data:image/jpeg;base64," in page and page.count("<polyline") == 2
    assert "<script" not in page and "onload" not in page and "a &lt; b &amp; c" in page
    assert not re.search(r"""(src|href)=["'](?!data:image/jpeg)|url\(|@import""", page)


def test_a_step_that_is_not_finite_is_skipped_and_named():
    model = torch.nn.Linear(3, 1)
    optimizer = train.optimizer_of(model, train.SimpleNamespace(weight_decay=0.), 1e-2)
    optimizer.zero_grad()
    before = [p.clone() for p in model.parameters()]
    bad = {"x": torch.full((2, 3), torch.nan)}
    loss = lambda b: {"next_item": model(b["x"]).mean(), "other": torch.zeros(())}
    class Rows(list):
        users = np.array([8, 9])

        def epoch(self, size, rng):
            return ((batch, np.array([0, 1])) for batch in self)

    epoch = lambda batches, name: train.train_epoch(model, loss, optimizer, Rows(batches), 2, None, 5., torch.device("cpu"), name)
    with pytest.raises(UserError, match=r"epoch 7, step 0: the loss next_item is not finite .*\[8, 9\]"):
        epoch([bad], "epoch 7")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    good = {"x": torch.ones(2, 3)}
    with pytest.raises(UserError, match="step 1"):               # found at the end, though good steps followed it
        epoch([good, bad, good], "epoch 8")
    assert all(p.isfinite().all() for p in model.parameters()) and not torch.equal(before[0], model.weight)


def test_a_truncated_checkpoint_is_one_sentence(shop, tmp_path):
    args = ("--model", "sasrec", "--data", "shop", "--dim", 8, "--epochs", 1)
    run("train.py", *args, cwd=tmp_path)
    path = tmp_path / "runs" / "sasrec-shop-0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    done = run("evaluate.py", path.parent, cwd=tmp_path, ok=False)
    assert done.returncode == 2 and "model.safetensors cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_presets_and_flags(shop):
    args, module = train.parse(["--model", "mdsrec", "--data", "x", "--neighbors", "7", "--use_ica", "false"])
    cfg = train.configure(module, args, "baby-folder")
    assert (cfg.neighbors, cfg.centers, cfg.use_ica, cfg.use_cre) == (7, 32, False, True)


def test_nothing_unsafe_is_read_or_run():
    """No pickle, no eval, no shell in the sources."""
    bad = ("pickle.", "import pickle", "torch.load(", "allow_pickle=True", " eval(", "=eval(", "shell=True", "os.system")
    for folder in (ROOT, ROOT / "models", ROOT / "sources"):
        for path in folder.glob("*.py"):
            assert not [b for b in bad if b in path.read_text()], path
