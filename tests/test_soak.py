"""tests/soak.py itself, for a few seconds: commands that are killed, interrupted, started twice."""
import re
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="it forks, and sets limits on files")
def test_a_few_kills():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/soak.py", "--only", "prepare,features",
         "--every", "20", "--random", "1"],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = re.search(r"(\d+) kills, (\d+) interrupts, \d+ resumes, 0 mismatches", done.stdout)
    assert int(total[1]) >= 6 and int(total[2]) >= 3
