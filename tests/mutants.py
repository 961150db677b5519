"""Breaks the code on purpose, one small change at a time, and reports which the tests let live.

    python tests/mutants.py                    all lists of tests/mutations/
    python tests/mutants.py srmml data         some
    python tests/mutants.py srmml --only 3,7   some changes of one list

A list begins with the file that is changed and the tests that must fail; then come the changes:

    file: models/srmml.py
    tests: tests/models/test_srmml.py

    # eq. (11): the sign of the cross term
    - return a_squared + b_squared - 2 * (a @ b.mT)
    + return a_squared + b_squared + 2 * (a @ b.mT)

A change whose note begins with "equivalent:" is one that no test can tell from the code, and says
why; it is expected to live. Several - lines follow each other in the file. Not part of the normal
tests: a change takes as long as its tests do until one fails.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tests" / "mutations"
LIMIT = 600    # seconds of one change's tests: a change that hangs them is noticed


@dataclass
class Mutant:
    file: str
    tests: list
    number: int
    note: str
    old: str
    new: str

    @property
    def equivalent(self):
        return self.note.startswith("equivalent:")


def read_list(path) -> list:
    """The changes of one list, each checked to fit its file in one place. Raises ValueError."""
    header, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    fields = dict(line.split(": ", 1) for line in header.splitlines())
    source = (ROOT / fields["file"]).read_text(encoding="utf-8")
    mutants = []
    for number, block in enumerate(body.strip().split("\n\n"), start=1):
        lines = block.splitlines()
        parts = {sign: [line[2:] for line in lines if line[0] == sign] for sign in "#-+"}
        old, new = (find(parts["-"], source, path, number), parts["+"])
        indent = old[:len(old) - len(old.lstrip())]
        less = len(parts["-"][0]) - len(parts["-"][0].lstrip())
        new = "\n".join(indent + line[less:] for line in new)
        note = " ".join(parts["#"])
        mutants.append(Mutant(fields["file"], fields["tests"].split(), number, note, old, new))
    return mutants


def find(wanted, source, path, number):
    """The lines of the source that are `wanted` but for their indentation, as they stand there."""
    lines = source.splitlines()
    stripped = [line.strip() for line in wanted]
    found = [
        "\n".join(lines[i:i + len(wanted)]) for i in range(len(lines))
        if [line.strip() for line in lines[i:i + len(wanted)]] == stripped
    ]
    if len(found) != 1 or source.count(found[0]) != 1:
        raise ValueError(f"{path.name}, change {number}: its lines stand in {len(found)} places")
    return found[0]


def lives(mutant, copy) -> bool:
    """Whether all tests pass in a copy of the project with one change."""
    target = copy / mutant.file
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    target.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    shutil.rmtree(target.parent / "__pycache__", ignore_errors=True)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
    own = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    try:
        done = subprocess.run(command, cwd=copy, env=own, capture_output=True, timeout=LIMIT)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        target.write_text(source, encoding="utf-8")


def copied(folder):
    """The project without what is not part of it."""
    unwanted = shutil.ignore_patterns(".git", "data", "runs", "__pycache__", ".venv")
    return Path(shutil.copytree(ROOT, folder, ignore=unwanted))


def try_all(mutants, jobs):
    """(mutant, lives, seconds) of each, as they are done."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        free = [copied(Path(scratch) / str(job)) for job in range(jobs)]

        def attempt(mutant):
            copy = free.pop()
            begin = time.time()
            try:
                return mutant, lives(mutant, copy), time.time() - begin
            finally:
                free.append(copy)

        yield from pool.map(attempt, mutants)


def main():
    names = sorted(path.stem for path in LISTS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lists", nargs="*", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--only", help="numbers of changes, such as 3,7")
    parser.add_argument("--jobs", type=int, default=1, help="changes that are tried at a time")
    args = parser.parse_args()
    bad = 0
    for name in args.lists or names:
        mutants = read_list(LISTS / f"{name}.txt")
        if args.only:
            mutants = [mutant for mutant in mutants if str(mutant.number) in args.only.split(",")]
        counts = {"killed": 0, "equivalent": 0, "LIVES": 0}
        for mutant, alive, seconds in try_all(mutants, args.jobs):
            verdict = "killed"
            if alive:
                verdict = "equivalent" if mutant.equivalent else "LIVES"
            counts[verdict] += 1
            print(f"  {verdict:<10} {seconds:4.0f} s  {mutant.number}. {mutant.note}", flush=True)
        print(f"{name}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
        bad += counts["LIVES"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
