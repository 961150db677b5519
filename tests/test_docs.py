"""What the documents say is true: the example model trains, and the links lead somewhere."""
import re

import pytest

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target
