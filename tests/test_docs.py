"""What the documents say is true: the example trains, and pages fit the code they speak of."""
import re
import runpy
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from common.files import UserError, read_json
from helpers import ROOT, run, write_shop

sys.path.insert(0, str(ROOT / "docs"))
import check
import make

PAPERS = [path.stem for path in check.papers_of(ROOT)]


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


@pytest.mark.parametrize("page", check.pages_of(ROOT), ids=lambda page: page.name)
def test_links_lead_somewhere_and_commands_parse(page):
    text = page.read_text(encoding="utf-8")
    assert list(check.faults_of_links(page, text)) == []
    for command in check.commands_in(text):
        assert check.fault_of_command(command, ROOT) is None, command


@pytest.fixture(params=PAPERS)
def paper(request):
    """A page on a paper and the code it speaks of."""
    page = ROOT / "docs" / "papers" / f"{request.param}.md"
    code = ROOT / "models" / f"{request.param}.py"
    return page.read_text(encoding="utf-8"), code.read_text(encoding="utf-8")


def test_each_paper_and_our_own_model_has_its_page():
    assert PAPERS == ["digest", "fmmsrec", "mdsrec", "mmsr", "msm4sr", "srmml"]


def test_pages_on_papers_fit_the_code(paper):
    assert list(check.faults_of_equations(*paper)) == []
    assert list(check.faults_of_readings(*paper)) == []


def test_every_page_on_a_paper_shows_equations_and_readings(paper):
    page, source = paper
    assert len(check.equations_in(page)) >= 2
    assert len(re.findall(r"^\$\$$", page, re.MULTILINE)) >= 8    # two lines a formula
    assert len(re.findall(r"^\d+\. ", page, re.MULTILINE)) >= 5


PAGE = """
$$
x = y \\tag{1}
$$
[`double`](../../models/toy.py#L10)

$$
a = 2 b \\tag{2a}
$$
[`Toy.halve`](../../models/toy.py#L15)

## Readings

1. **Printed:** nothing.
2. **Printed:** less.
"""
CODE = '''"""Toy.

 1. the first, of eq. 9
 2. the second
"""



# line 9
def double(x):
    """Eq. (1) is eq. (1), reading 2."""


class Toy:
    def halve(self):
        return 1    # eqs. (1) to (2a)
'''


@pytest.fixture
def toy(tmp_path):
    """A project of one model."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "toy.py").write_text(CODE)
    return tmp_path


def test_a_page_that_fits(toy):
    assert list(check.faults_of_equations(PAGE, CODE, toy)) == []
    assert list(check.faults_of_readings(PAGE, CODE)) == []
    moved = PAGE.replace("#L10", "#L99")
    assert check.fixed(moved, toy) == PAGE


@pytest.mark.parametrize("old, new, fault", [
    ("#L10", "#L11", "double stands in line 10 of models/toy.py, not 11: run --fix"),
    ("`double`", "`triple`", "equation (1) names triple, which models/toy.py lacks"),
    ("\\tag{1}", "\\tag{3}", "equation (3) names double, whose source does not cite it"),
    ("[`double`](../../models/toy.py#L10)", "", "equation (1) names no function below it"),
    ("a = 2 b \\tag{2a}", "a = 2 b", "the code cites equation (2a), which the page does not show"),
    ("2. **Printed", "3. **Printed", "reading 2 is in the head of the code and not in the page"),
])
def test_a_page_that_does_not_fit(toy, old, new, fault):
    page = PAGE.replace(old, new, 1)
    assert page != PAGE
    faults = [*check.faults_of_equations(page, CODE, toy), *check.faults_of_readings(page, CODE)]
    assert fault in faults


def test_a_reading_that_the_head_lacks():
    cited = CODE.replace("reading 2", "readings 2 and 7")
    faults = list(check.faults_of_readings(PAGE, cited))
    assert faults == ["the code cites reading 7, which its head lacks"]


@pytest.mark.parametrize("text, numbers", [
    ("eq. (11)", {"11"}),
    ("eqs. (3a), (5) to (7) and (9)", {"3a", "5", "6", "7", "9"}),
    ("eqs. 12-15, of 3 items", {"12", "13", "14", "15"}),
    ("eqs. (8), (9), (12) to (14)", {"8", "9", "12", "13", "14"}),
    ("the sequel of 5", set()),
])
def test_equations_that_a_text_cites(text, numbers):
    assert check.cited(text) == numbers


@pytest.mark.parametrize("command, fault", [
    ("python train.py --model srmml --data demo --dim 8", None),
    ("python train.py --model srmml --data demo --dims 8", "unrecognized arguments: --dims 8"),
    ("python train.py --model srmml --data demo --modality sound", "invalid choice: 'sound'"),
    ("python evaluate.py", "the following arguments are required: RUN"),
    ("python trains.py", "there is no trains.py"),
])
def test_commands_are_parsed_and_not_run(command, fault):
    found = check.fault_of_command(command, ROOT)
    assert found is None if fault is None else fault in found


def test_commands_of_a_page():
    page = """
```bash
for d in 8 16; do
  python train.py --dim $d \\
    --out dim-$d    # a comment
done
X=1 python data.py demo && pip install -r requirements.txt
```
"""
    assert list(check.commands_in(page)) == [
        "python train.py --dim 8 --out dim-8",
        "python train.py --dim 16 --out dim-16",
        "python data.py demo",
    ]


@pytest.mark.parametrize("link, fits", [
    ("../README.md", True), ("../README.md#results", True), ("#here-and-now-2", True),
    ("../README.md#nowhere", False), ("../NOTHING.md", False), ("#there", False),
])
def test_links_and_anchors(link, fits):
    page = ROOT / "docs" / "imagined.md"
    text = f"# Here, and `now` (2)\n\n[x]({link})\n"
    page_is_there = link.startswith("#")
    faults = list(check.faults_of_links(page, text)) if not page_is_there else [
        link for link in [link] if link[1:] not in check.anchors(text)
    ]
    assert (faults == []) == fits


# ---------------- tables that are made of runs

def test_the_tables_and_plots_are_those_of_the_runs_that_were_kept():
    """`python docs/make.py` writes them."""
    for path, text in make.everything().items():
        assert path.read_text(encoding="utf-8") == text, path


@pytest.mark.parametrize("marks", ["oracle", "oracle=x", "a=1; b"])
def test_marks_of_a_plot_that_are_none_are_one_sentence(marks):
    with pytest.raises(UserError, match=f"x.svg has the marks {marks}: write NAME=NUMBER"):
        make.plots_in(f"<!-- plot demo: docs/x.svg; {marks} -->")


def test_a_table_is_made_of_runs_that_are_kept(tmp_path, monkeypatch):
    write_shop(tmp_path / "shop")
    run("train.py", "--model", "pop", "--data", "shop", cwd=tmp_path)
    run("train.py", "--model", "sasrec", "--data", "shop", "--seeds", "0,1", "--epochs", 1,
        cwd=tmp_path)
    monkeypatch.setattr(make, "KEPT", tmp_path / "kept")
    make.keep("shop", sorted((tmp_path / "runs").glob("*-shop-?")))
    kept = tmp_path / "kept" / "shop" / "sasrec-shop-1"
    assert str(tmp_path) not in (kept / "config.json").read_text()
    page = "a\n<!-- runs shop: N@10, masked N@10, epoch, weights -->\nold\n<!-- end -->\nb\n"
    lines = make.written(page).splitlines()
    assert lines[0] == "a"
    assert lines[-2:] == ["<!-- end -->", "b"]
    assert lines[2] == "| | N@10 | masked N@10 | epoch | weights |"
    rows = {line.split(" | ")[0].strip("| "): line for line in lines[4:6]}
    assert rows.keys() == {"pop", "sasrec"}
    assert "| 1 of 1 |" in rows["sasrec"] and "of" not in rows["pop"]
    mean = np.mean([
        read_json(tmp_path / f"runs/sasrec-shop-{seed}/metrics.json")["test"]["ndcg@10"]
        for seed in (0, 1)
    ])
    assert f"{mean:.4f}".removeprefix("0") in rows["sasrec"]
    assert sum("**" in row for row in rows.values()) >= 1
    with pytest.raises(UserError, match="--keep nothing"):
        make.table("nothing", ["N@10"])


def test_a_table_of_parts_is_made_of_what_life_found(tmp_path, monkeypatch):
    write_shop(tmp_path / "shop")
    run("train.py", "--model", "sasrec", "--data", "shop", "--epochs", 1, cwd=tmp_path)
    run("tests/life.py", "runs/sasrec-shop-0", cwd=tmp_path)
    monkeypatch.setattr(make, "KEPT", tmp_path / "kept")
    make.keep("shop", [tmp_path / "runs/sasrec-shop-0"])
    found = read_json(tmp_path / "kept/shop/sasrec-shop-0/parts.json")
    page = "<!-- parts shop/sasrec-shop-0 -->\nold\n<!-- end -->\n"
    lines = make.written(page).splitlines()
    assert lines[1:3] == ["| sasrec | shop |", "|---|---|"]
    assert [line.split(" | ")[0].strip("| ") for line in lines[3:-1]] == list(found)
    trained = f"{found['as trained']['masked N@10']:.4f}".removeprefix("0")
    assert lines[3] == f"| as trained | {trained} |"
    (tmp_path / "kept/shop/sasrec-shop-0/parts.json").unlink()
    with pytest.raises(UserError, match="shop/sasrec-shop-0 has no parts.json"):
        make.written(page)


def test_a_frontier_has_a_point_and_a_name_for_each_row():
    rows = make.rows_of("scientific")
    svg = ElementTree.fromstring(make.frontier(rows))
    drawn = [node.tag.partition("}")[2] for node in svg]
    assert drawn.count("circle") == len(rows)
    assert set(rows) <= {node.text for node in svg}
    page = "<!-- frontier scientific, digest-frontier: docs/x.svg -->"
    assert list(make.plots_in(page)) == [ROOT / "docs/x.svg"]


def test_growth_is_drawn_from_the_table_that_follows():
    page = ("<!-- growth: docs/x.svg -->\n\n| | items | step, s | peak, GB |\n|---|---|---|---|\n"
            "| sasrec | 1,000 | 0.01 | 2 |\n| sasrec | 100,000 | 1 | 2 |\n"
            "| srmml | 1,000 | 0.1 | 20 |\n| srmml | 100,000 | 0 | 20 |\n\nMore.\n")
    (path, svg), = make.plots_in(page).items()
    assert path == ROOT / "docs/x.svg"
    nodes = [(node.tag.partition("}")[2], node.attrib, node.text)
             for node in ElementTree.fromstring(svg)]
    texts = [text for tag, _, text in nodes if tag == "text"]
    assert {"step, s", "peak, GB", "1k", "100k", "0.01", "0.1", "1", "10", "100"} <= set(texts)
    assert texts[-2:] == ["sasrec", "srmml"]
    points = [(float(at["cx"]), float(at["cy"])) for tag, at, _ in nodes if tag == "circle"]
    assert len(points) == 7 + 2    # no point for 0; two of the legend
    low, high, alone = points[:3]
    assert low[0] == alone[0] < high[0]
    assert low[1] - alone[1] == pytest.approx((low[1] - high[1]) / 2, abs=.1)    # .01, .1, 1


@pytest.mark.parametrize("look, text", [
    ({"masked N@10": .2, "change": -.0024, "moved": .0111}, "−.0024 (.011)"),
    ({"masked N@10": .2, "change": 0., "moved": 0.}, "+.0000 (.000)"),
    ({"masked N@10": .2, "change": -.2, "moved": 1.25}, "−.2000 (1.250)"),
    (None, ""),
])
def test_how_a_part_is_shown(look, text):
    assert make.shown_part("positions: none", look) == text
