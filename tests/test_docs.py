"""What the documents say is true: the example model trains, and the links lead somewhere."""
import re
import runpy
import sys

import pytest
import torch

from common.files import UserError
from helpers import ROOT, run, write_shop

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("models/*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_example_of_the_contract_trains(tmp_path):
    write_shop(tmp_path / "shop")
    page = (ROOT / "models" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "mine.py").write_text(code)
    flags = ("--data", "shop", "--text", "hash", "--epochs", 2)
    done = run("train.py", "--model", "mine.py", *flags, cwd=tmp_path)
    assert "best epoch" in done.stdout
    assert "width of everything" in run("train.py", "--model", "mine.py", "--help",
                                        cwd=tmp_path).stdout


def test_the_case_study_of_mdsrec(tmp_path, monkeypatch, capsys):
    write_shop(tmp_path / "shop")
    flags = ("--data", "shop", "--text", "hash", "--image", "pixels", "--epochs", 1, "--dim", 8)
    run("train.py", "--model", "mdsrec", *flags, cwd=tmp_path)
    case = runpy.run_path(str(ROOT / "docs" / "case.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["case.py", "runs/mdsrec-shop-0", "--user", "3"])
    case["main"]()
    printed = capsys.readouterr().out
    assert "of 9 neighbours of an item are the same" in printed
    assert "by both: its rank is" in printed
    monkeypatch.setattr(sys, "argv", ["case.py", "runs/mdsrec-shop-0", "--user", "60"])
    with pytest.raises(UserError, match="no test user 60"):
        case["main"]()
    a, b = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 1, 7], [8, 9, 7]])
    assert case["shared"](a, b) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target
