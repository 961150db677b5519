"""The project as a whole: which way imports go, and what is never read or run."""
import ast
import re

import mutants

from helpers import ROOT

FLOORS = (    # nothing imports to its right
    "common", "sources", "data", "extract_features", "loop", "evaluate", "train", "recommend",
    "bench",
)
FILES = [path for path in ROOT.rglob("*.py")
         if path.relative_to(ROOT).parts[0] not in ("tests", "docs", ".venv", "data", "runs")
         and not path.relative_to(ROOT).parts[0].startswith(".")]


def floor_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(path):
    """The rooms of the project that a file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            rooms.add(node.module.partition(".")[0])
    return rooms & set(FLOORS)


def test_imports_go_one_way():
    assert len(FILES) > 20
    for path in FILES:
        room = floor_of(path)
        if room == "models":
            assert not imports_of(path), f"{path} imports the project: a model file stands alone"
        else:
            above = FLOORS[FLOORS.index(room) + 1:]
            later = imports_of(path) & set(above)
            assert not later, f"{path} imports {later}, which lie above it"


def test_nothing_unsafe_is_read_or_run():
    """No pickle, no eval, no shell."""
    unsafe = re.compile(
        r"import pickle|pickle\.|torch\.load\(|allow_pickle=True|[ =]eval\(|shell=True|os\.system"
    )
    for path in FILES:
        assert not unsafe.search(path.read_text()), path


def test_the_lists_of_changes_fit_the_code():
    """Each change of tests/mutations/ has one place; `python tests/mutants.py` tries them."""
    lists = sorted(mutants.LISTS.glob("*.txt"))
    assert len(lists) >= 14
    for path in lists:
        assert len(mutants.read_list(path)) >= 5, path
