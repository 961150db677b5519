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
why; it is expected to live. Several - lines follow each other in the file. The tests must pass
without a change, or nothing is tried. Not part of the normal tests: a change takes as long as its
tests do until one fails. For Linux and macOS.
"""
import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

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


# ---------------- one change

def outcome(copy, tests) -> tuple:
    """Run tests in a copy of the project, in a child of this process, which has torch already.

    -> (pytest's exit code, None where they hung; the first test that failed, or "")
    """
    log = copy.parent / "log"
    child = os.fork()
    if child == 0:
        try:
            run_here(copy, tests, log)
        finally:
            os._exit(3)    # pytest itself failed
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return (None if code < 0 else code), (failed or [""])[0].rpartition("::")[2]


def run_here(copy, tests, log):
    """In the child: leave for the copy, run pytest, and end with its exit code."""
    os.setsid()
    os.chdir(copy)
    own = [str(copy), str(copy / "tests")]
    sys.path[:] = own + [path for path in sys.path if not path.startswith(str(ROOT))]
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.alarm(LIMIT)
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy.parent / 'tmp'}"]
    code = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(int(code))


def attempt(mutant, copy) -> tuple:
    """The outcome of a copy with one change, which is then taken back."""
    target = copy / mutant.file
    source = target.read_text(encoding="utf-8")
    target.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return outcome(copy, mutant.tests)
    finally:
        target.write_text(source, encoding="utf-8")


def copied(folder):
    """The project without what is not part of it."""
    unwanted = shutil.ignore_patterns(".git", "data", "runs", "__pycache__", ".venv")
    return Path(shutil.copytree(ROOT, folder, ignore=unwanted))


# ---------------- lists

def try_list(name, only, copy) -> int:
    """Try the changes of one list, print what came of each; how many live that should not."""
    mutants = read_list(LISTS / f"{name}.txt")
    code, failed = outcome(copy, mutants[0].tests)
    if code != 0:
        raise SystemExit(f"{name}: the tests fail without any change ({failed or code})")
    counts = {"killed": 0, "equivalent": 0, "LIVES": 0}
    for mutant in mutants:
        if only and str(mutant.number) not in only:
            continue
        begin = time.time()
        code, failed = attempt(mutant, copy)
        verdict = "killed"
        if code == 0:
            verdict = "equivalent" if mutant.equivalent else "LIVES"
        counts[verdict] += 1
        why = f"  [{failed or 'it hung'}]" if verdict == "killed" else ""
        print(f"  {verdict:<10} {time.time() - begin:4.0f} s  {mutant.number}. {mutant.note}{why}",
              flush=True)
    print(f"{name}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}",
          flush=True)
    return counts["LIVES"]


def main():
    names = sorted(path.stem for path in LISTS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lists", nargs="*", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--only", help="numbers of changes, such as 3,7")
    args = parser.parse_args()
    only = args.only.split(",") if args.only else []
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as scratch:
        copy = copied(Path(scratch) / "copy")
        return sum(try_list(name, only, copy) for name in args.lists or names) > 0


if __name__ == "__main__":
    sys.exit(main())
