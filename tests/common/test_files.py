"""common/files.py: nothing half written, nothing lost, one sentence for what cannot be used."""
import hashlib
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch

from common import files
from common.files import (
    UserError,
    alone_in,
    atomic,
    command,
    keys_sha256,
    load_tensors,
    pick_device,
    precision,
    read_json,
    save_tensors,
    set_aside,
    sha256,
    write_json,
)
from helpers import ROOT

# ---------------- a script's end

def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("main, code, told", [
    (lambda: None, 0, ""),
    (lambda: 3, 3, ""),
    (raising(UserError("the data: is missing")), 2, "error: the data: is missing\n"),
    (raising(OSError("the disk is full")), 2, "error: the disk is full\n"),
    (raising(KeyboardInterrupt()), 130, "\nstopped; what was finished is on disk\n"),
], ids=["done", "a code", "user error", "full disk", "interrupted"])
def test_how_a_script_ends(capsys, main, code, told):
    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == code
    assert capsys.readouterr().err == told


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)


# ---------------- writing and reading

def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError):
        with atomic(tmp_path / "a.json") as file:
            file.write("half")
            file.flush()
            assert read_json(tmp_path / "a.json") == {"old": 1}
            raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_written_is_for_all_to_read_and_the_same_everywhere(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"ключ": [1, None, "é"]})
    assert path.read_bytes() == '{\n "ключ": [\n  1,\n  null,\n  "é"\n ]\n}\n'.encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert read_json(path) == {"ключ": [1, None, "é"]}
    with atomic(path, "wb") as file:
        file.write(b"\0\r\n")
    assert path.read_bytes() == b"\0\r\n"


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe"], ids=[
    "missing", "empty", "cut", "no text",
])
def test_json_that_cannot_be_read_is_one_sentence(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="a.json cannot be read .*: remove it and run"):
        read_json(path)


def test_tensors_come_back_as_they_were(tmp_path):
    whole = torch.arange(6.).reshape(2, 3)
    tensors = {
        "whole": whole, "again": whole, "row": whole[0], "turned": whole.T,
        "int": torch.tensor([1]), "bits": whole > 2,
    }
    about = {"stage": "pré", "epoch": 3}
    save_tensors(tmp_path / "x.safetensors", tensors, about)
    got, told = load_tensors(tmp_path / "x.safetensors")
    assert told == about
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    save_tensors(tmp_path / "y.safetensors", {"grad": whole.requires_grad_()})
    got, told = load_tensors(tmp_path / "y.safetensors")
    assert not got["grad"].requires_grad
    assert told == {}


def test_damaged_tensors_are_one_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(99)})
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"x" * 500):
        path.write_bytes(content)
        with pytest.raises(UserError, match="x.safetensors cannot be read .*: remove it"):
            load_tensors(path)
    path.unlink()
    with pytest.raises(UserError, match="x.safetensors cannot be read"):
        load_tensors(path)


def test_what_is_set_aside_takes_the_first_free_number(tmp_path):
    for n in (1, 2):
        (tmp_path / "a.txt").write_text(str(n))
        assert set_aside(tmp_path / "a.txt") == tmp_path / f"a.txt~{n}"
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.txt~1").unlink()
    assert set_aside(tmp_path / "a.txt") == tmp_path / "a.txt~1"
    assert (tmp_path / "a.txt~1").is_dir()
    assert (tmp_path / "a.txt~2").read_text() == "2"
    assert not (tmp_path / "a.txt").exists()


# ---------------- the lock

def test_one_works_in_a_folder_and_the_other_waits(tmp_path, capsys):
    order = []

    def second():
        with alone_in(tmp_path):
            order.append("second")

    with alone_in(tmp_path):
        with pytest.raises(UserError, match=f"another process is writing {tmp_path}"):
            with alone_in(tmp_path, wait=False):
                pytest.fail("two at once")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(.2)
        assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert f"waiting for another process that works in {tmp_path}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())    # the lock is no file


def test_the_lock_ends_with_its_work_however_that_ends(tmp_path):
    with pytest.raises(RuntimeError):
        with alone_in(tmp_path):
            raise RuntimeError
    with alone_in(tmp_path, wait=False):
        pass


@pytest.mark.parametrize("without", ["locks", "fcntl"])
def test_without_locks_the_work_goes_on(tmp_path, monkeypatch, without):
    def no_locks(*args):
        raise OSError("this file system has no locks")

    if without == "locks":
        monkeypatch.setattr(files.fcntl, "flock", no_locks)
    else:
        monkeypatch.setattr(files, "fcntl", None)    # as on Windows
    done = []
    with alone_in(tmp_path):
        done.append(1)
    assert done


# ---------------- fingerprints and the device

def test_fingerprints(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert keys_sha256(["a", "é"]) == hashlib.sha256("a\né".encode()).hexdigest()
    assert keys_sha256(["a", "b"]) != keys_sha256(["b", "a"])


def test_the_device(monkeypatch, capsys):
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:999"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            pick_device(name)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    assert "no GPU found" in capsys.readouterr().out
    with precision(torch.device("cpu")):    # plain float32
        x = torch.ones(2, 2)
        assert (x @ x).dtype == torch.float32


def test_products_are_mixed_on_a_gpu_alone_and_only_by_that_name(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *given, enabled: asked.append(enabled))
    for device, name in (("cuda", "bfloat16"), ("cuda", "float32"), ("cpu", "bfloat16")):
        precision(torch.device(device), name)
    assert asked == [True, False, False]


def test_an_apple_gpu_is_picked_where_it_can_do_what_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(files, "lacks", lambda device: None)
    assert files.best_device() == "mps" and capsys.readouterr().out == ""
    monkeypatch.setattr(files, "lacks", lambda device: "no sparse matrices")
    assert files.best_device() == "cpu"
    assert "the Apple GPU cannot do all that is needed (no sparse" in capsys.readouterr().out
    monkeypatch.undo()
    assert files.lacks("cpu") is None
    assert files.lacks("meta") is not None    # a device on which numbers cannot be read


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_cannot_be_encoded_does_not_end_a_run(tmp_path, encoding):
    code = "from common.files import command; command(lambda: print('数据集 ±'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"???")
