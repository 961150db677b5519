"""Fixtures that all tests share."""
import os

os.environ["OMP_NUM_THREADS"] = "1"    # for processes that tests start, too

import pytest
import torch

from helpers import REAL, Server, write_shop

torch.set_num_threads(1)


@pytest.fixture
def real():
    """real("beauty") -> its folder, or a skipped test that says why."""
    def folder(name):
        if not (REAL / name).is_dir():
            pytest.skip(f"the real data set {name} is not beside the project ({REAL / name})")
        return REAL / name
    return folder


@pytest.fixture
def float64():
    """New tensors in float64, from a fixed seed: for parts that are held against naive loops."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def shop(tmp_path):
    return write_shop(tmp_path / "shop")


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine that answers 404 until it is given routes."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()
