"""tests/fuzz.py: a short look at damaged input, and that its judge sees every kind of bad end."""
import re
import subprocess
import sys

from helpers import ROOT

SCRIPT = str(ROOT / "tests" / "fuzz.py")
KINDS = ("sources", "own data", "processed folder", "features", "given vectors", "pictures")
PLANTED = """
import os, sys, time
sys.path.insert(0, "tests")
import fuzz

def ends_badly():
    size = os.path.isfile(sys.argv[1]) and os.stat(sys.argv[1]).st_size % 5    # else a link
    if size == 1:
        raise KeyError("planted")
    if size == 2:
        time.sleep(60)
    if size == 3:
        bytearray(fuzz.MEMORY * 4)
    if size == 4:
        os.abort()

fuzz.look_at_picture = ends_badly
fuzz.end_well = lambda *_: None
fuzz.SECONDS = .2
sys.argv = ["fuzz.py", "--only", "pictures", "--inputs", "40"]
sys.exit(fuzz.main())
"""


def counts_of(printed) -> dict:
    """{"inputs": .., "ok": .., ...} of the last line of the table."""
    head = re.search(r"^ +inputs .*$", printed, re.MULTILINE)[0].split()
    numbers = re.search(r"^all +(.*)$", printed, re.MULTILINE)[1].split()
    return dict(zip(head, map(int, numbers)))


def test_two_hundred_damaged_files_end_well():
    only = [word for kind in KINDS for word in ("--only", kind)]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--inputs", "200", *only], capture_output=True, text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = counts_of(done.stdout)
    assert counts["inputs"] == 200 == counts["ok"] + counts["refused"]
    assert min(counts["ok"], counts["refused"]) > 40


def test_what_ends_badly_is_counted_as_such():
    done = subprocess.run(
        [sys.executable, "-c", PLANTED], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1, done.stdout + done.stderr
    counts = counts_of(done.stdout)
    assert counts["refused"] == 0
    for name in ("ok", "traceback", "hang", "memory", "died"):
        assert counts[name] > 0, done.stdout
    assert sum(counts.values()) == 2 * counts["inputs"] == 80
