"""common/files.py: nothing half written, nothing lost, one sentence for what cannot be used."""
import hashlib
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common import files
from common.files import (
    UserError,
    alone_in,
    arrays_sha256,
    atomic,
    command,
    filled,
    has_form,
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
    (raising(MemoryError()), 2, "error: the memory is full (MemoryError): end what "
     "else uses it, or give --device cpu or less data\n"),
    (lambda: "caf\udce9.txt".encode(), 2,
     "error: 'caf\\udce9.txt' is no UTF-8: rename the file or folder of that name\n"),
    (raising(KeyboardInterrupt()), 130, "\nstopped; what was finished is on disk\n"),
], ids=["done", "a code", "user error", "full disk", "memory", "no UTF-8", "interrupted"])
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


def test_what_a_killed_writer_has_left_is_written_over(tmp_path):
    left = files.unfinished(tmp_path / "a.json")
    left.write_text("half of something long" * 99)
    left.chmod(0o600)
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_lies_in_the_way_of_a_temporary_file_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    files.unfinished(tmp_path / "a.json").symlink_to(tmp_path / "mine")
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "mine").read_text() == "mine" and read_json(tmp_path / "a.json") == 1


def test_of_two_writers_of_a_file_the_second_waits(tmp_path):
    def second():
        with atomic(tmp_path / "a.txt") as file:
            file.write("second")

    with atomic(tmp_path / "a.txt") as file:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(.1)
        assert thread.is_alive()
        file.write("first" * 99)
    thread.join(10)
    assert (tmp_path / "a.txt").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("without", ["locks", "fcntl"])
def test_without_locks_every_writer_has_a_name_of_its_own(tmp_path, monkeypatch, without):
    take_locks(monkeypatch, without)
    with atomic(tmp_path / "a.txt") as one:
        with atomic(tmp_path / "a.txt") as two:
            two.write("two")
        one.write("one")
        assert (tmp_path / "a.txt").read_text() == "two"
    assert (tmp_path / "a.txt").read_text() == "one"
    with filled(tmp_path / "b", "last") as one, filled(tmp_path / "b", "last") as two:
        assert one != two
    assert len(list(tmp_path.iterdir())) == 3


def take_locks(monkeypatch, how):
    def no_locks(*args):
        raise OSError("this file system has no locks")

    if how == "locks":
        monkeypatch.setattr(files.fcntl, "flock", no_locks)
    else:
        monkeypatch.setattr(files, "fcntl", None)    # as on Windows


@pytest.mark.parametrize("renamed, last, kept", [
    (False, False, False), (False, True, False), (True, False, False), (True, True, True),
])
def test_a_folder_that_is_filled_by_half_goes(tmp_path, renamed, last, kept):
    """One that is whole, and whose elder has given up its name, stays for the next start."""
    out = tmp_path / "out"
    if not renamed:
        out.mkdir()
    files.unfinished(out).mkdir()
    (files.unfinished(out) / "of a killed process").touch()
    with pytest.raises(KeyboardInterrupt):
        with filled(out, "last") as made:
            assert list(made.iterdir()) == []
            if last:
                (made / "last").touch()
            raise KeyboardInterrupt
    assert made.exists() == kept and out.exists() != renamed


@pytest.mark.parametrize("error, told", [
    (OSError(28, "No space left on device"), "No space left on device"),
    (OSError("5 requested and 3 written"), "5 requested and 3 written"),
], ids=["full", "numpy's"])
def test_an_error_names_the_file_that_the_user_knows(tmp_path, capsys, error, told):
    def main():
        with atomic(tmp_path / "a.json"):
            raise error

    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path / 'a.json'} cannot be read or written ({told}): "
    )


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        with atomic(tmp_path / "a.json"):
            open(tmp_path / "nowhere")


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


def test_tensors_that_are_not_as_they_were_written_are_told(tmp_path):
    """One bit of numbers, of a name or of what is said about them; files of others have no sum."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(9), "b": torch.zeros(9)}, {"epoch": 1})
    whole = path.read_bytes()
    for old, new in ((b'"a"', b'"c"'), (b'epoch\\": 1', b'epoch\\": 3'), (whole[-1:], b"\1")):
        assert old in whole
        path.write_bytes(new.join(whole.rsplit(old, 1)))
        with pytest.raises(UserError, match="not those that were written"):
            load_tensors(path)
    save_file({"a": torch.ones(2)}, path, {"about": '{"epoch": 1}'})
    assert load_tensors(path)[1] == {"epoch": 1}
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is no file"):
        load_tensors(path)


@pytest.mark.parametrize("form, fits, does_not", [
    (int, [0, -5], [True, 1., "1", None, 2 ** 63]),
    (float, [0, .5, float("nan")], [True, "1", 2 ** 63]),
    (str, ["", "é"], [5, None, "\ud800"]),
    ((str, type(None)), ["x", None], [5, []]),
    ([int], [[], [1, 2]], [{}, [1, "2"], "12"]),
    ({str: int}, [{}, {"a": 1}], [[], {"a": "b"}]),
    ({"a": [str]}, [{"a": ["x"], "b": 1}], [{}, {"a": "x"}, []]),
    ({str: ()}, [{}], [{"a": 1}, []]),
])
def test_forms(form, fits, does_not):
    assert all(has_form(value, form) for value in fits)
    assert not any(has_form(value, form) for value in does_not)


def test_json_of_another_form_or_depth_is_one_sentence(tmp_path):
    path = tmp_path / "a.json"
    for text, form in (("[1]", dict), ('{"a": 1}', {"a": str}), ("[" * 10 ** 5, object)):
        path.write_text(text)
        with pytest.raises(UserError, match="a.json .*: train again"):
            read_json(path, form, "train again")
    path.write_text("[1]")
    assert read_json(path, [int]) == [1]


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
    take_locks(monkeypatch, without)
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


def test_a_fingerprint_of_arrays_is_that_of_their_digits():
    arrays = [np.arange(2_500_000, dtype=np.int32), np.zeros(0), np.array([5, 7])]
    digits = [array.tobytes().hex() for array in arrays]
    assert arrays_sha256(arrays) == keys_sha256(digits)


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
