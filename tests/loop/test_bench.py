"""bench.py runs: each comparison once, on a tiny shop, with small encoders."""
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import bench
import data
from helpers import refused, run, write_shop
from loop.settings import load_model_file

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "TARGETS", 200)
    monkeypatch.setattr(bench, "USERS", 20)
    monkeypatch.setattr(bench, "ITEMS", 10)


def test_the_command(small, tmp_path):
    write_shop(tmp_path / "shop")
    flags = ("--data", "shop", "--only", "sasrec,evaluation,setup,recommendation", "--repeats", 1)
    printed = run("bench.py", *flags, cwd=tmp_path).stdout
    lines = [line for line in printed.splitlines() if line.startswith("  ")]
    with_recbole = 2 * (find_spec("recbole") is not None)
    assert len(lines) == 9 + with_recbole
    assert lines[0].split()[-1] == "1.0x" and "targets/s (" in lines[0]
    assert sum(line.endswith(" 1.0x") for line in lines) >= 4
    refused(run("bench.py", "--only", "nothing", cwd=tmp_path, ok=False), "--only nothing")


def test_a_made_up_shop(tmp_path):
    flags = ("--items", 300, "--users", 2000, "--steps", 2, "--dim", 16)
    printed = run("bench.py", *flags, cwd=tmp_path).stdout
    for name in ("sasrec", "srmml", "mdsrec"):
        assert f"{name}, 2000 users, 300 items, dim 16" in printed
    assert printed.count("2 steps, ") == printed.count("evaluation of 2000 users") == 3
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()[-3:]]
    assert [row[:2] for row in rows] == [[name, "300"] for name in ("sasrec", "srmml", "mdsrec")]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])
    dataset, catalog = bench.made_shop(300, 2000)
    sold = np.sort(np.bincount(dataset.flat, minlength=301)[1:])
    assert sold[-30:].sum() > .25 * sold.sum()    # a tenth of the items
    assert 9 < np.diff(dataset.offsets).mean() < 12 and np.diff(dataset.offsets).min() > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["srmml", "mdsrec", "msm4sr", "fmmsrec", "mmsr"])
def test_each_contestant_does_some_work(small, name, tmp_path):
    dataset = data.load(write_shop(tmp_path / "shop"), root=tmp_path / "data")
    more = {"encoders": load_model_file("mmsr").TINY} if name == "mmsr" else {}
    _, _, contestants = bench.COMPARISONS[name](dataset, CPU, **more)
    assert len(contestants) > 1
    for contestant in contestants.values():
        assert contestant() > 0
