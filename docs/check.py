"""Holds the pages against the code: equations, readings, commands, links.

    python docs/check.py          prints what is wrong, a line each; exit code 1 if anything is
    python docs/check.py --fix    first moves links to the lines where the functions are now

On a page of docs/papers/ an equation is a $$ block with a \\tag, and below it the functions that
compute it, each a link to the line of its definition:

    [`wasserstein`](../../models/srmml.py#L258)

The function's source must cite the equation, and every equation that the code cites must have its
block. A link may lead to another file of the project, where features are made. Readings are the
numbered points of a model file's head; a page has each as a numbered point.
"""
import argparse
import ast
import os
import re
import runpy
import shlex
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./\.\./([\w/]+\.py)#L(\d+)\)")
CITED = re.compile(r"\beqs?\.((?: to |,? and |-|\(?\d+[a-z]?\)?|,? )+)")    # eqs. (3) to (5), 8


def pages_of(root):
    return sorted([*root.glob("*.md"), *root.glob("models/*.md"), *root.glob("docs/**/*.md")])


def papers_of(root):
    """The pages on papers: each is called as its model file is."""
    pages = sorted(root.glob("docs/papers/*.md"))
    return [page for page in pages if (root / "models" / f"{page.stem}.py").is_file()]


def faults_of(root):
    """What is wrong under a copy of the project, a sentence each."""
    faults = []
    for page in pages_of(root):
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(root)
        faults += [f"{name}: {fault}" for fault in faults_of_links(page, text)]
        for command in commands_in(text):
            fault = fault_of_command(command, root)
            faults += [f"{name}: `{command}` does not parse: {fault}"] if fault else []
    for page in papers_of(root):
        code = root / "models" / f"{page.stem}.py"
        text = page.read_text(encoding="utf-8")
        source = code.read_text(encoding="utf-8")
        of_equations = faults_of_equations(text, source, root)
        for fault in (*of_equations, *faults_of_readings(text, source)):
            faults.append(f"{page.relative_to(root)}: {fault}")
    return faults


# ---------------- equations

def cited(text) -> set:
    """Numbers of the equations that a text cites: "eqs. (3a), (5) to (7)" -> {3a, 5, 6, 7}"""
    found = set()
    for match in CITED.finditer(text):
        parts = re.findall(r"\d+[a-z]?|to|-", match[1])
        for i, part in enumerate(parts):
            if part in ("to", "-"):
                if 0 < i < len(parts) - 1:
                    found |= between(parts[i - 1], parts[i + 1])
            else:
                found.add(part)
    return found


def between(first, last) -> set:
    """Numbers from one to another: "3", "5" -> 3, 4, 5. Letters count as they are."""
    whole = range(int(re.match(r"\d+", first)[0]) + 1, int(re.match(r"\d+", last)[0]))
    return {first, last, *map(str, whole)}


def definitions(source) -> dict:
    """{"name" or "Class.name": (line, its source)} of all functions and classes."""
    found = {}
    lines = source.splitlines()

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = prefix + child.name
                found[name] = child.lineno, "\n".join(lines[child.lineno - 1:child.end_lineno])
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{name}.")

    visit(ast.parse(source), "")
    return found


def known_in(path) -> dict:
    """The definitions of a file; none if it does not exist."""
    return definitions(path.read_text(encoding="utf-8")) if path.is_file() else {}


def equations_in(page):
    """[(number, [(name, file, line)])] of the tagged blocks, with the links right below each."""
    blocks = re.split(r"^\$\$\s*$", page, flags=re.MULTILINE)
    found = []
    for formula, below in zip(blocks[1::2], blocks[2::2]):
        numbers = re.findall(r"\\tag\{(\w+)\}", formula)
        links = LINK.findall(below.strip().split("\n\n")[0])
        for number in numbers:
            found.append((number, [(name, file, int(line)) for name, file, line in links]))
    return found


def faults_of_equations(page, source, root=ROOT):
    equations = equations_in(page)
    for number, links in equations:
        if not links:
            yield f"equation ({number}) names no function below it"
        for name, file, line in links:
            known = known_in(root / file)
            if name not in known:
                yield f"equation ({number}) names {name}, which {file} lacks"
                continue
            at, text = known[name]
            if line != at:
                yield f"{name} stands in line {at} of {file}, not {line}: run --fix"
            if number not in cited(text):
                yield f"equation ({number}) names {name}, whose source does not cite it"
    shown = {number for number, _ in equations}
    head = ast.get_docstring(ast.parse(source), clean=False)
    for number in sorted(cited(source.replace(head, "", 1)) - shown):
        yield f"the code cites equation ({number}), which the page does not show"


def fixed(page, root):
    """A page's text with the lines of its links moved to the definitions."""
    def move(match):
        name, file, _ = match.groups()
        known = known_in(root / file)
        return f"[`{name}`](../../{file}#L{known[name][0]})" if name in known else match[0]
    return LINK.sub(move, page)


# ---------------- readings

def faults_of_readings(page, source):
    head = ast.get_docstring(ast.parse(source), clean=False)
    numbered = re.compile(r"^ ?(\d+)\. ", re.MULTILINE)
    in_head = set(numbered.findall(head))
    section = page.partition("\n## Readings")[2].partition("\n## ")[0]
    on_page = set(numbered.findall(section))
    in_code = set()
    for match in re.findall(r"\breadings? ((?:\d+|, | and | to )+)", source):
        in_code |= set(re.findall(r"\d+", match))
    for number in sorted(in_code - in_head, key=int):
        yield f"the code cites reading {number}, which its head lacks"
    for number in sorted(in_head ^ on_page, key=int):
        there, lacking = ("head of the code", "page") if number in in_head else ("page", "head")
        yield f"reading {number} is in the {there} and not in the {lacking}"


# ---------------- commands

def commands_in(page):
    """The lines of a page's bash blocks that call python, loops written out."""
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        text = block.replace("\\\n", " ")
        for line in written_out(text):
            for command in re.split(r"&&|;|\|", line):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"\w+=\S*", words[0]):    # CUDA_VISIBLE_DEVICES=0
                    words = words[1:]
                if words[:1] == ["python"] and words[1:2] and words[1].endswith(".py"):
                    yield shlex.join(word for word in words if word != "&")


def written_out(text):
    """Lines with each loop `for x in a b; do ...; done` written out for all its words."""
    loop = re.compile(r"for (\w+) in ([^;\n]*)(?:;|\n)\s*do\b(.*?)\bdone\b", re.DOTALL)
    match = loop.search(text)
    while match:
        name, words, body = match.groups()
        words = shlex.split(words)
        copies = [re.sub(rf"\$\{{?{name}\b\}}?", word, body) for word in words]
        text = text[:match.start()] + "\n".join(copies) + text[match.end():]
        match = loop.search(text)
    return text.splitlines()


class Parsed(BaseException):
    """A script has understood its command line."""


def fault_of_command(command, root):
    """Why a script does not understand its arguments, None if it does: nothing is run."""
    _, script, *words = shlex.split(command)
    path = root / script
    if not path.is_file():
        return None if script.startswith("path/") else f"there is no {script}"
    parse = argparse.ArgumentParser.parse_args
    errors = StringIO()

    def parse_and_stop(parser, argv=None, namespace=None):
        parse(parser, argv, namespace)
        raise Parsed

    own = dict(argv=[str(path), *words], path=[str(root), *sys.path])
    with mock.patch.multiple(sys, **own), redirect_stderr(errors), \
            mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Parsed:
            return None
        except SystemExit:
            pass
    return errors.getvalue().strip().splitlines()[-1] if errors.getvalue() else "it does not parse"


# ---------------- links

def anchors(text) -> set:
    """What GitHub makes of the headings of a page."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    counts = {}
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().strip()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        n = counts.get(slug, 0)
        found.add(slug if n == 0 else f"{slug}-{n}")
        counts[slug] = n + 1
    return found


def faults_of_links(page, text):
    """Links into the project that lead nowhere; those to the web are not followed."""
    without_code = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = Path(os.path.normpath(page.parent / file)) if file else page
        if not path.exists():
            yield f"the link {target} leads nowhere"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text("utf-8")):
            yield f"the link {target} leads to no heading"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", action="store_true", help="move links to where functions are now")
    args = parser.parse_args()
    if args.fix:
        for page in papers_of(ROOT):
            page.write_text(fixed(page.read_text(encoding="utf-8"), ROOT), encoding="utf-8")
    faults = faults_of(ROOT)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
