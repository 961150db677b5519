"""The same command in many surroundings: what is the same to the bit, and how far the rest is off.

    python tests/determinism.py
    python tests/determinism.py --also "torch 2.11=/path/of/another/bin/python"

Prints a table for docs/safety.md. The first row is this Python with one thread; the others are
compared with it: another order of hashes, two threads, a run that was broken off and resumed, and
each other Python that is named (with pytest, of which tests/helpers.py is made). Each prepares a
shop of 600 users and 300 items, makes its features and trains the models for itself, two epochs of
each stage, in a process of its own. A cell says "same bits", or the largest difference of a weight
and of a metric.
"""
import argparse
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

SMALL = "--data shop --text hash --image pixels --device cpu --dim 32 --patience 9"
MODELS = {    # flags beside these
    "sasrec": "",
    "mdsrec": "--neighbors 5 --centers 8 --inner 64",
    "msm4sr": "--pretrain_epochs 2",
    "fmmsrec": "--pretrain_epochs 2",
    "mmsr": "--text_encoder tiny --image_encoder tiny --schedule constant",
}
PARTS = ("valid", "valid_masked", "test", "test_masked")


# ---------------- in the process of one row

def work(folder, threads, resumed):
    """Prepare, make features, train all models in the folder; write what is compared."""
    import torch

    import data
    import train
    from common.files import sha256
    from helpers import drawn, write_shop
    torch.set_num_threads(threads)
    os.chdir(folder)
    write_shop(Path("shop"), users=600, items=300)
    lines = Path("shop/items.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for n, row in enumerate(rows[:60]):
        drawn(n).save(f"shop/{n}.png")
        row["images"] = [f"{n}.png"]
    Path("shop/items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(data.main, "data.py shop")
    for model, flags in MODELS.items():
        line = f"train.py --model {model} {SMALL} {flags}"
        if resumed:
            call(train.main, f"{line} --epochs 1")
        call(train.main, f"{line} --epochs 2" + " --resume" * resumed)
    made = [Path("data/shop/sequences.npz"), *sorted(Path("data/shop/features").glob("*.s*"))]
    found = {"data": {path.name: sha256(path) for path in made}, "torch": torch.__version__,
             "python": platform.python_version()}
    Path("found.json").write_text(json.dumps(found))


def call(main, line):
    sys.argv = line.split()
    with redirect_stdout(io.StringIO()):
        main()


# ---------------- rows

def row_of(top, name, python, threads=1, resumed=False, hashes="0") -> Path:
    """Run one row's process -> its folder."""
    folder = Path(tempfile.mkdtemp(dir=top))
    me = str(Path(__file__).resolve())
    arguments = [*python, me, "--work", str(folder), "--threads", str(threads)]
    surroundings = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",    # a busy machine need not wait for idle threads
        "PYTHONHASHSEED": hashes,
    }
    done = subprocess.run(
        arguments + ["--resumed"] * resumed, env=os.environ | surroundings, capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    return folder


def shown(first, other) -> list:
    """The cells of a row: its data and features, then each model."""
    a, b = (json.loads((folder / "found.json").read_text())["data"] for folder in (first, other))
    different = sorted(name for name in a if a[name] != b.get(name))
    cells = [", ".join(different) or "same bits"]
    return cells + [difference(first, other, model) for model in MODELS]


def difference(first, other, model) -> str:
    """How far two runs of a model are apart, as a cell."""
    from common.files import load_tensors
    folders = [folder / f"runs/{model}-shop-0" for folder in (first, other)]
    files = ("model.safetensors", "ranks-test.npy")
    a, b = ([(folder / file).read_bytes() for file in files] for folder in folders)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    pairs = [(x, metrics[1][part][name]) for part in PARTS for name, x in metrics[0][part].items()]
    off = max(abs(x - y) for x, y in pairs)
    if a == b and off == 0:
        return "same bits"
    weights = [load_tensors(folder / "model.safetensors")[0] for folder in folders]
    far = max(float((x - weights[1][name]).abs().max()) for name, x in weights[0].items())
    return f"{far:.0e}, {off:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--also", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--resumed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.threads, args.resumed)
    here = [sys.executable]
    rows = {
        "another PYTHONHASHSEED": dict(python=here, hashes="12345"),
        "broken off and resumed": dict(python=here, resumed=True),
    }
    for also in args.also:
        name, _, python = also.partition("=")
        rows[name] = dict(python=shlex.split(python))
    rows["2 threads"] = dict(python=here, threads=2)
    with tempfile.TemporaryDirectory() as top:
        first = row_of(top, "the first", here)
        about = json.loads((first / "found.json").read_text())
        print(f"Against Python {about['python']}, torch {about['torch']}, 1 thread:\n")
        print(f"| | data, features | {' | '.join(MODELS)} |")
        print("|---" * (len(MODELS) + 2) + "|", flush=True)
        for name, way in rows.items():
            folder = row_of(top, name, **way)
            print(f"| {name} | {' | '.join(shown(first, folder))} |", flush=True)


if __name__ == "__main__":
    main()
