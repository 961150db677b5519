"""What the tests share: the project on the path, a tiny shop in the own-data format, the real data sets if they are there."""
import contextlib
import importlib
import io
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"      # also for the processes that tests start: tiny tensors gain nothing by more
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
from sources.common import command  # noqa: E402  (the path comes first)

torch.set_num_threads(1)


@pytest.fixture
def real():
    """real("beauty") -> its folder, or a skipped test that says why."""
    def folder(name):
        if not (REAL / name).is_dir():
            pytest.skip(f"the real data set {name} is not beside the project (looked for {REAL / name})")
        return REAL / name
    return folder


@pytest.fixture
def float64():
    """New tensors in float64, from a fixed seed: for parts that are held against naive loops."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def write_shop(folder, users=60, items=30, seed=0):
    """Own-data files of a small shop: user u walks through the items in steps, with some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines, day = ["user,item,time"], 1_500_000_000
    for u in range(users):
        item = rng.randrange(items)
        for t in range(rng.randint(3, 12)):
            lines.append(f"u{u},i{item},{day + u * 1000 + t * 86_401}")
            item = (item + 1) % items if rng.random() < .8 else rng.randrange(items)
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    words = "red blue green soft hard round old new small large".split()
    (folder / "items.jsonl").write_text("".join(json.dumps(
        {"item": f"i{i}", "title": " ".join(rng.choices(words, k=3)), "language": "en"}) + "\n" for i in range(items)))
    return folder


@pytest.fixture
def shop(tmp_path):
    return write_shop(tmp_path / "shop")


def run(script, *args, cwd, ok=True):
    """Run one of the project's scripts as from the command line, in this process; its exit code and what it printed."""
    out, err, before = io.StringIO(), io.StringIO(), (os.getcwd(), sys.argv)
    os.chdir(cwd)
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            command(importlib.import_module(Path(script).stem).main)
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    done = SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=err.getvalue())
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done
