"""What a disk, a clock, a GPU or a person can do to a command in the middle of its work.

Whatever it is: one sentence that names what the user knows, exit code 2 (130 for Ctrl-C), nothing
that was on disk is lost, and the next start makes up for it.
"""
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from common import encoders
from common.files import UserError, command, load_tensors
from common.web import download
from helpers import refused, run, send
from loop import runs

if sys.platform != "linux":
    pytest.skip("disks are mounted, and files compared by tests/soak.py", allow_module_level=True)
from soak import changed, differences, snapshot

DEVICE = ("--device", "cpu")
PREPARE = ("data.py", "shop")
FEATURES = ("extract_features.py", "--data", "shop", "--text", "hash", "--image", "pixels", *DEVICE)
SMALL = ("--data", "shop", "--dim", 8, "--epochs", 2, "--patience", 2, *DEVICE)
TRAIN = ("train.py", "--model", "sasrec", *SMALL)
RUN = "runs/sasrec-shop-0"
LISTS = ("recommend.py", RUN, "--all", "--out", "top.csv", *DEVICE)
EXPORT = ("recommend.py", RUN, "--export", "vectors", *DEVICE)
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def begin(shop, tmp_path):
    """begin(commands, name) -> a folder with the shop where these commands have run."""
    def folder(commands=(), name="here"):
        place = tmp_path / name
        place.mkdir()
        shutil.copytree(shop, place / "shop", copy_function=shutil.copy2)
        for arguments in commands:
            run(*arguments, cwd=place)
        return place
    return folder


def again(arguments):
    return (*arguments, "--resume") if arguments[0] == "train.py" else arguments


def unfinished_in(folder):
    return [path for path in folder.rglob(".*") if "unfinished" in path.name]


# ---------------- the disk is full, somebody presses Ctrl-C

@pytest.mark.parametrize("fault", [FULL, KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
@pytest.mark.parametrize("before, arguments", [
    ((), PREPARE), ((PREPARE,), FEATURES), ((PREPARE,), (*TRAIN, "--epochs", 1)),
    ((PREPARE, TRAIN), LISTS), ((PREPARE, TRAIN), EXPORT),
], ids=["prepare", "features", "train", "recommend", "export"])
def test_at_each_write(begin, tmp_path, monkeypatch, before, arguments, fault):
    """Every file that is written whole is synced once: there a full disk shows at the latest."""
    base = begin(before, "base")
    work = tmp_path / "work"    # one place for all: it stands in some files
    shutil.copytree(base, work)
    run(*arguments, cwd=work)
    truth = snapshot(work)
    real = os.fsync
    for number in itertools.count(1):
        shutil.rmtree(work)
        shutil.copytree(base, work)
        kept = snapshot(work)
        calls = itertools.count(1)

        def sync(handle, number=number, calls=calls):
            if next(calls) == number:
                raise fault
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            done = run(*arguments, cwd=work, ok=False)
        if next(calls) <= number:    # it has not so many
            break
        if isinstance(fault, OSError):
            refused(done, "No space left on device): make room there")
            assert "unfinished" not in done.stderr
        else:
            assert done.returncode == 130 and "Traceback" not in done.stderr
        found = snapshot(work)
        assert [path for path in kept if found.get(path) != kept[path]] == []
        assert unfinished_in(work) == []
        run(*again(arguments), cwd=work)
        assert differences(truth, snapshot(work)) == []
    assert number > 1 and done.returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A disk of our own -> disk("size=1m"), disk("ro") change it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        tried = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(tried, capture_output=True).returncode:
            pytest.skip("a disk cannot be mounted here")
        return folder

    yield lambda options: mount(f"remount,{options}" if os.path.ismount(folder) else options)
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("size", [8, 24, 48, 72])
def test_a_disk_that_is_really_full(begin, disk, size):
    """Nothing is simulated: the run stops at some write, and goes on when there is room."""
    folder = begin((PREPARE,))
    run(*TRAIN, "--out", "roomy", cwd=folder)
    os.symlink(disk(f"size={size}k"), folder / "runs")
    done = run(*TRAIN, cwd=folder, ok=False)
    refused(done, "No space left on device): make room there", "runs/sasrec-shop-0")
    assert "unfinished" not in done.stderr
    disk("size=4m")
    run(*TRAIN, "--resume", cwd=folder)
    whole = snapshot(folder / "roomy/sasrec-shop-0")
    assert differences(whole, snapshot(folder / RUN)) == []


def test_a_full_disk_is_no_fault_of_the_network(server, tmp_path):
    server.routes["/x.json"] = send(200, b"{}" * 9000)
    os.symlink("/dev/full", tmp_path / "x.json.part")
    with pytest.raises(OSError, match="No space left on device.*x.json.part"):
        download([f"{server.base}/x.json"], tmp_path / "x.json")


# ---------------- what cannot be written to

def test_a_disk_that_is_read_only(begin, disk):
    where = disk("size=4m")
    shutil.copytree(begin() / "shop", where / "shop", copy_function=shutil.copy2)
    for arguments in (PREPARE, TRAIN):
        run(*arguments, cwd=where)
    disk("ro")
    before = snapshot(where)
    assert "users" in run(*PREPARE, cwd=where).stdout    # what only reads goes on
    assert "for u1" in run("recommend.py", RUN, "--user", "u1", *DEVICE, cwd=where).stdout
    for arguments in (FEATURES, TRAIN, (*TRAIN, "--seed", 1), LISTS, EXPORT):
        done = run(*arguments, cwd=where, ok=False)
        refused(done, "Read-only file system): ask for the right to, or work in another folder")
        assert "unfinished" not in done.stderr
    assert snapshot(where) == before
    disk("rw")
    run(*FEATURES, cwd=where)


@pytest.mark.parametrize("arguments, in_the_way", [
    (PREPARE, "data"), (FEATURES, "data/shop/features"), (TRAIN, "runs"), (TRAIN, RUN),
])
def test_a_file_where_a_folder_should_be(begin, arguments, in_the_way):
    folder = begin(() if in_the_way == "data" else (PREPARE,))
    path = folder / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    done = run(*arguments, cwd=folder, ok=False)
    if in_the_way == RUN:    # it is given another name, as an earlier run would be
        assert (folder / f"{RUN}~1").read_text() == "mine"
        return
    refused(done, in_the_way)
    assert path.read_text() == "mine"


def test_a_folder_where_a_file_should_be(begin):
    folder = begin((PREPARE, TRAIN))
    (folder / RUN / "state.safetensors").unlink()
    (folder / RUN / "state.safetensors").mkdir()
    (folder / RUN / "metrics.json").unlink()
    done = run(*TRAIN, "--resume", cwd=folder, ok=False)
    refused(done, f"{RUN}/state.safetensors cannot be read or written (Is a directory)")


@pytest.mark.parametrize("links", [True, False], ids=["two disks", "no hard links"])
def test_data_on_another_disk(begin, tmp_path, monkeypatch, links):
    """`data` lies on a second disk, its features on a third: nothing can be renamed across."""
    folder = begin()
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    other = Path(tempfile.mkdtemp(dir=other))
    try:
        os.symlink(other, folder / "data")
        run(*PREPARE, cwd=folder)
        (tmp_path / "features").mkdir()
        os.symlink(tmp_path / "features", other / "shop/features")
        run(*FEATURES, cwd=folder)
        before = snapshot(tmp_path / "features")
        if not links:
            def refuse(*args):
                raise OSError(errno.EPERM, "no links here")
            monkeypatch.setattr(os, "link", refuse)
        changed(folder)
        run(*TRAIN, cwd=folder)
        assert snapshot(other / "shop/features") == before
        assert snapshot(tmp_path / "features") == before
        assert (other / "shop~1/features").is_symlink()
    finally:
        shutil.rmtree(other)


# ---------------- the clock

def test_a_clock_that_jumps_changes_nothing(begin, tmp_path, monkeypatch):
    truth = begin((PREPARE, FEATURES, TRAIN), "truth")
    with monkeypatch.context() as patch:
        now = itertools.count(2_000_000_000, -86_400)
        patch.setattr(time, "time", lambda: next(now))
        found = begin((PREPARE, FEATURES, TRAIN), "found")
    for name in ("data", RUN):
        known = snapshot(truth / name)
        known.pop("shop/source.json", None)    # they name the folder
        known.pop("config.json", None)
        there = snapshot(found / name)
        assert [path for path in known if known[path] != there.get(path)] == []
    later = time.time() + 10 * 365 * 86_400
    for path in (found / "shop").iterdir():    # copied from a machine that is ahead
        os.utime(path, (later, later))
    for _ in range(2):
        assert "data/shop is up to date" in run(*FEATURES, cwd=found).stdout
    assert list((found / "data").glob("*~*")) == []


# ---------------- numbers that are not finite, memory that is full

MODEL = """
from dataclasses import dataclass
import torch
from torch import nn

READS = ()

@dataclass
class Config:
    dim: int = 8
    max_len: int = 20
    lr: float = 1e-2
    weight_decay: float = 0.
    batch_size: int = 16
    epochs: int = 3
    patience: int = 3
    prefixes: bool = False

def fault():
    FAULT

class Model(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        self.item = nn.Embedding(catalog["n_items"] + 1, cfg.dim)

    def on_epoch_start(self, epoch):
        self.at = [epoch, 0]

    def forward(self, batch):
        self.at[1] += 1
        if self.at == [EPOCH, STEP]:
            fault()
        logits = self.item(batch["seq"]) @ self.item.weight.T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["target"].flatten())
        return {"next_item": loss * (float("nan") if self.at == [EPOCH, -STEP] else 1)}

    def encode_items(self):
        if self.at[0] == EPOCH and STEP == 99:
            fault()
        return self.item.weight

    def score(self, batch, table):
        return table[batch["seq"][:, -1]] @ table.T
"""
GPU = 'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\\nGPU 0")'
CPU = "torch.empty(10 ** 15)"    # more than any machine has
ASKS = r"lower --batch_size (now 16), --max_len (now 20), --dim (now 8)"
STOPS = "the loss next_item is not finite"


def write_model(folder, epoch=0, step=0, fault="pass"):
    text = MODEL.replace("FAULT", fault).replace("EPOCH", str(epoch)).replace("STEP", str(step))
    (folder / "mine.py").write_text(text)


@pytest.mark.parametrize("epoch, step, fault, told", [
    (1, -1, "pass", [f"train epoch 1, step 0: {STOPS}"]),
    (2, -2, "pass", [f"train epoch 2, step 1: {STOPS}", "the last good state is kept"]),
    (1, 1, GPU, ["the memory of cpu is full (CUDA out of memory. Tried to allocate 20", ASKS]),
    (2, 2, GPU, [ASKS]),
    (2, 99, GPU, [ASKS]),
    (2, 2, CPU, [ASKS, "DefaultCPUAllocator: can't allocate memory"]),
    (2, 99, "raise MemoryError", ["(MemoryError)", ASKS]),
], ids=["nan first", "nan later", "gpu first", "gpu later", "gpu validating", "cpu", "python"])
def test_a_run_that_cannot_go_on_keeps_what_it_has(begin, epoch, step, fault, told):
    folder = begin((PREPARE,))
    write_model(folder)
    arguments = ("train.py", "--model", "mine.py", "--data", "shop", "--lr", 0.01, *DEVICE)
    run(*arguments, "--out", "whole", cwd=folder)
    run(*arguments, cwd=folder)
    earlier = snapshot(folder / "runs/mine-shop-0")
    write_model(folder, epoch, step, fault)
    done = run(*arguments, cwd=folder, ok=False)
    refused(done, *told)
    if epoch == 1:    # the earlier run is where it was
        assert "runs/mine-shop-0 again" in done.stdout
        assert snapshot(folder / "runs/mine-shop-0") == earlier
        return
    assert snapshot(folder / "runs/mine-shop-0~1") == earlier
    tensors, about = load_tensors(folder / "runs/mine-shop-0/state.safetensors")
    assert about["epoch"] == epoch - 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    write_model(folder)    # mended
    run(*arguments, "--resume", cwd=folder)
    whole = snapshot(folder / "whole/mine-shop-0")
    assert differences(whole, snapshot(folder / "runs/mine-shop-0")) == []


def test_memory_that_is_full_while_features_are_made(begin, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    folder = begin((PREPARE,))
    with monkeypatch.context() as patch:
        patch.setattr(encoders.HashedText, "encode", full)
        done = run(*FEATURES, cwd=folder, ok=False)
    refused(done, "the memory is full (CUDA out of memory. Tried to allocate 9.00 GiB.)")
    run(*FEATURES, cwd=folder)


def test_another_error_is_no_full_memory():
    def broken():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        command(broken)


# ---------------- two at once

def test_two_that_begin_the_same_run_do_not_mix(begin, monkeypatch):
    """The second begins between the first one's look at the folder and its lock on it."""
    folder = begin((PREPARE,))
    monkeypatch.chdir(folder)
    real = runs.make_room
    seen = []

    def slow(path):
        found = real(path)
        if not seen:
            seen.append(threading.Thread(target=second))
            seen[0].start()
            seen[0].join(.2)
            assert seen[0].is_alive()    # it waits
        return found

    def second():
        with pytest.raises(UserError, match="another process is writing"):
            with runs.run_folder(Path(RUN), {"lr": 2, "config": {}}, False):
                pytest.fail("two at once")
        told.append(True)

    told = []
    monkeypatch.setattr(runs, "make_room", slow)
    with runs.run_folder(Path(RUN), {"lr": 1, "config": {}}, False):
        seen[0].join(10)
        assert json.loads((folder / RUN / "config.json").read_text())["lr"] == 1
    assert told and list((folder / "runs").iterdir()) == [folder / RUN]
