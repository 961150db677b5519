"""Runs that are killed or interrupted, and go on as if nothing had happened."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.files import alone_in, load_tensors, save_tensors
from helpers import ROOT, refused, run, write_shop
from loop.runs import Progress, Saved, cut_log, save_state

CONTENT = ("--text", "hash", "--image", "pixels")
TOY = Path(__file__).with_name("toy.py")


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def log_of(folder):
    """What the log says, without times."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(row["stage"], row["epoch"], row["losses"], row.get("valid")) for row in rows]


def kill_in_epoch(command, folder, epochs, cwd):
    """Start the command, and kill -9 it some way into the epoch after `epochs`; True when it was
    still running."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}    # as in this process
    process = subprocess.Popen(
        command, cwd=cwd, env=os.environ | threads, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = folder / "log.jsonl"
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= epochs:
            time.sleep(.03)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(.005)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("model, flags, pretrain_epochs", [
    ("sasrec", (), 0),
    ("mdsrec", ("--batch_size", 32), 0),
    ("toy.py", ("--pretrain_epochs", 6), 6),
    ("toy.py", ("--pretrain_epochs", 1), 1),
])
def test_killed_and_resumed_is_the_same_to_the_bit(shop, tmp_path, model, flags, pretrain_epochs):
    shutil.copy(TOY, tmp_path)
    args = [
        "--model", model, "--data", "shop", "--epochs", 12, "--patience", 12, "--dim", 8,
        "--batch_size", 4, "--device", "cpu", *CONTENT, *flags,
    ]
    run("train.py", *args, "--out", "whole", cwd=tmp_path)
    name = f"{Path(model).stem}-shop-0"
    whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
    command = [sys.executable, ROOT / "train.py", *map(str, args), "--out", "killed"]
    assert kill_in_epoch(command, killed, 3, tmp_path), "the run ended before it could be killed"
    assert not (killed / "metrics.json").exists()
    printed = run("train.py", *args, "--out", "killed", "--resume", cwd=tmp_path).stdout
    # it went on, it did not start over; the state is written after the line in the log, so the
    # kill may have cost the third epoch
    epochs_run = len(re.findall(r"^(?:pre)?train epoch ", printed, re.MULTILINE))
    assert epochs_run <= 12 + pretrain_epochs - 2
    for file in ("model.safetensors", "ranks-test.npy"):
        assert (whole / file).read_bytes() == (killed / file).read_bytes()
    before, after = metrics_of(whole), metrics_of(killed)
    for key in ("valid", "test", "test_masked", "groups", "best_epoch", "epochs"):
        assert before[key] == after[key]
    assert log_of(whole) == log_of(killed)


def test_a_run_that_patience_has_ended_stays_ended(shop, tmp_path):
    args = (
        "--model", "sasrec", "--data", "shop", "--dim", 8, "--epochs", 60, "--patience", 2,
        "--lr", 0.05, "--dropout", 0.1,
    )
    run("train.py", *args, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    result, log = metrics_of(folder), log_of(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "metrics.json").unlink()    # killed after the last epoch, before the test
    run("train.py", *args, "--resume", cwd=tmp_path)
    assert metrics_of(folder)["test"] == result["test"]
    assert log_of(folder) == log
    assert (folder / "model.safetensors").read_bytes() == weights


def test_resume_between_the_stages_and_after_a_torn_log_line(shop, tmp_path):
    shutil.copy(TOY, tmp_path)
    args = ("--model", "toy.py", "--data", "shop", "--device", "cpu")
    run("train.py", *args, "--out", "whole", cwd=tmp_path)
    run("train.py", *args, "--out", "cut", cwd=tmp_path)
    whole, cut = tmp_path / "whole" / "toy-shop-0", tmp_path / "cut" / "toy-shop-0"
    log = (cut / "log.jsonl").read_text().splitlines(True)
    for file in ("metrics.json", "model.safetensors", "state.safetensors"):
        (cut / file).unlink()
    # as it stands when the first stage has just ended
    (cut / "log.jsonl").write_text("".join(log[:2]) + log[2][:40])
    tensors, _ = load_tensors(cut / "pretrain.safetensors")
    model = torch.nn.Module()
    model.item = torch.nn.Embedding.from_pretrained(tensors["item.weight"], freeze=False)
    save_state(cut, model, torch.optim.Adam(model.parameters()), Progress("pretrain", epoch=2))
    run("train.py", *args, "--out", "cut", "--resume", cwd=tmp_path)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert weights[0] == weights[1]
    assert len((cut / "log.jsonl").read_text().splitlines()) == len(log)


def test_the_log_is_cut_back_to_the_state(tmp_path):
    stages = [("pretrain", 1), ("pretrain", 2), ("train", 1), ("train", 2), ("train", 3)]
    path = tmp_path / "log.jsonl"
    for progress, kept in ((Progress("train", 2), 4), (Progress("pretrain", 1), 1)):
        lines = [{"stage": s, "epoch": n, "losses": {}, "seconds": 1} for s, n in stages]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        cut_log(path, Saved(tmp_path / "state.safetensors", progress, {}))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(row["stage"], row["epoch"]) for row in rows] == stages[:kept]


def test_resume_refuses_other_settings(shop, tmp_path):
    args = ("--model", "sasrec", "--data", "shop", "--dim", 8, "--epochs", 1)
    run("train.py", *args, cwd=tmp_path)
    done = run("train.py", *args, "--resume", "--lr", "0.5", cwd=tmp_path, ok=False)
    refused(done, "(lr)")
    assert "is finished" in run("train.py", *args, "--resume", cwd=tmp_path).stdout


SHORT = ("--model", "sasrec", "--data", "shop", "--dim", 8, "--device", "cpu")


@pytest.mark.parametrize("valid_every", [1, 3])
def test_a_run_can_be_given_more_epochs(shop, tmp_path, valid_every):
    args = (*SHORT, "--patience", 9, "--valid_every", valid_every, "--lr", 0.3)
    run("train.py", *args, "--epochs", 6, "--out", "whole", cwd=tmp_path)
    run("train.py", *args, "--epochs", 4, "--out", "longer", cwd=tmp_path)
    whole, longer = tmp_path / "whole/sasrec-shop-0", tmp_path / "longer/sasrec-shop-0"
    before = (longer / "metrics.json").read_text()
    log = [json.loads(line) for line in (longer / "log.jsonl").read_text().splitlines()]
    lines = [json.dumps({**line, "seconds": 1000}) + "\n" for line in log]
    (longer / "log.jsonl").write_text("".join(lines))
    done = run("train.py", *args, "--epochs", 6, "--out", "longer", "--resume", cwd=tmp_path)
    assert "goes on; its metrics so far are now metrics.json~1" in done.stdout
    assert "train epoch   4" not in done.stdout and "train epoch   5" in done.stdout
    assert (longer / "metrics.json~1").read_text() == before
    assert log_of(longer) == log_of(whole)
    assert 4000 < metrics_of(longer)["seconds"] < 4100    # those of before count
    for file in ("model.safetensors", "ranks-test.npy"):
        assert (whole / file).read_bytes() == (longer / file).read_bytes()
    again = run("train.py", *args, "--epochs", 6, "--out", "longer", "--resume", cwd=tmp_path)
    assert "is finished" in again.stdout


def test_a_run_can_be_given_more_patience_but_no_less(shop, tmp_path):
    args = (*SHORT, "--epochs", 60, "--lr", 0.05)
    run("train.py", *args, "--patience", 1, cwd=tmp_path)
    folder = tmp_path / "runs/sasrec-shop-0"
    epochs = metrics_of(folder)["epochs"]
    assert epochs < 60
    run("train.py", *args, "--patience", 3, "--resume", cwd=tmp_path)
    assert metrics_of(folder)["epochs"] >= epochs + 2
    done = run("train.py", *args, "--patience", 2, "--resume", cwd=tmp_path, ok=False)
    refused(done, "begun with other settings (patience)")


def test_more_epochs_are_refused_where_the_learning_rate_depends_on_them(shop, tmp_path):
    args = ("--model", "fmmsrec", "--data", "shop", *CONTENT, "--dim", 8, "--pretrain_epochs", 0,
            "--schedule", "cosine")
    run("train.py", *args, "--epochs", 1, cwd=tmp_path)
    done = run("train.py", *args, "--epochs", 2, "--resume", cwd=tmp_path, ok=False)
    refused(done, "its learning rate follows --schedule cosine over 1 epochs")


def test_a_run_that_another_process_holds_is_not_made_longer(shop, tmp_path):
    run("train.py", *SHORT, "--epochs", 1, cwd=tmp_path)
    folder = tmp_path / "runs/sasrec-shop-0"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with alone_in(folder):
        done = run("train.py", *SHORT, "--epochs", 2, "--resume", cwd=tmp_path, ok=False)
    refused(done, "another process is writing")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resume_says_when_there_is_nothing_to_resume(shop, tmp_path):
    done = run("train.py", *SHORT, "--epochs", 1, "--resume", cwd=tmp_path)
    assert "--resume finds no run in runs/sasrec-shop-0: a new one begins" in done.stdout


def test_a_project_that_was_moved_is_found_again(shop, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shop.rename(old / "shop")
    args = ("--model", "mdsrec", "--data", "shop", *CONTENT, "--dim", 8, "--device", "cpu")
    run("train.py", *args, "--epochs", 1, cwd=old)
    before = metrics_of(old / "runs/mdsrec-shop-0")
    old.rename(new)
    done = run("evaluate.py", "runs/mdsrec-shop-0", "--device", "cpu", cwd=new)
    assert "data/shop now, no longer" in done.stdout
    done = run("train.py", *args, "--epochs", 1, "--resume", cwd=new)
    assert "runs/mdsrec-shop-0 is finished" in done.stdout
    elsewhere = tmp_path / "elsewhere"
    (new / "runs").rename(elsewhere)
    new = new.rename(tmp_path / "newer")
    args = ("evaluate.py", elsewhere / "mdsrec-shop-0", "--device", "cpu")
    refused(run(*args, cwd="/", ok=False), "say where it is, with --data")
    done = run(*args, "--data", new / "data/shop", cwd=tmp_path)
    assert f"{before['test']['recall@10']:.4f}" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no list of maps here")
def test_tensors_that_were_read_do_not_map_their_file(tmp_path):
    """Windows refuses to replace a file that is mapped into memory."""
    save_tensors(tmp_path / "state.safetensors", {"a": torch.ones(100_000)})
    tensors, _ = load_tensors(tmp_path / "state.safetensors")
    assert "state.safetensors" not in Path("/proc/self/maps").read_text()
    assert tensors["a"].sum() == 100_000


def test_a_project_that_was_moved_is_resumed_with_its_own_files(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    write_shop(old / "shop")
    shutil.copy(ROOT / "models" / "cosine.py", old / "mine.py")
    run("train.py", "--model", "pop", "--data", "shop", cwd=old)
    items = (old / "data" / "shop" / "items.jsonl").read_text().splitlines()
    np.save(old / "v.npy", np.random.default_rng(0).normal(size=(len(items), 4)))
    args = ("train.py", "--model", "mine.py", "--data", "shop", "--text", "v.npy", "--image",
            "pixels", "--modality", "text", "--resume")
    run(*args, cwd=old)
    old.rename(new)
    moved = run("evaluate.py", "runs/mine-shop-0", cwd=new, ok=False)
    refused(moved, "was trained with", "mine.py, which is no longer there")
    assert "runs/mine-shop-0 is finished" in run(*args, cwd=new).stdout
    np.save(new / "v.npy", np.ones((len(items), 4)))
    refused(run(*args, cwd=new, ok=False), "begun with other settings (the features)")
