"""docs/refusals.md is true: it has every sentence of the code and no other, and those of the
command line come as it says."""
import ast
import json
import re
import shlex

import pytest

from common.files import UserError
from helpers import ROOT, drawn, refused, run, write_shop
from loop import settings

PAGE = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (?!sentence \|)(.+?) \| (.+) \|$", re.MULTILINE)
CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-su-z]*/*.py")])    # without tests/


def blank(sentence) -> str:
    """A sentence without the names in its braces."""
    return re.sub(r"\{[^{}]*\}", "{}", sentence).strip()


def rows(heading=None) -> set:
    """The sentences of the page, or below one of its headings."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0] if heading else PAGE
    return {blank(sentence) for sentence, _ in ROW.findall(text)}


def written(node) -> str:
    """A string of the code, {} where it is filled in."""
    if isinstance(node, ast.Constant):
        return node.value.strip()
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts).strip()


def sentences_in(path):
    """Yield what a file refuses with. A model file raises ValueError, mostly by its `check`."""
    of_model = path.parent.name == "models"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id == "UserError":
            yield written(node.args[0])
        if of_model and node.func.id == "check" and len(node.args) == 2:
            yield written(node.args[1])
        if of_model and node.func.id == "ValueError" and isinstance(node.args[0], ast.JoinedStr):
            yield written(node.args[0])


def test_every_sentence_of_the_code_is_on_the_page_and_the_reverse():
    code = {sentence for path in CODE for sentence in sentences_in(path)}
    assert len(code) > 200
    assert code - rows() == set(), "give docs/refusals.md these sentences"
    assert rows() - code == set(), "these sentences of docs/refusals.md are no longer in the code"


def test_every_reason_on_the_page_is_in_the_code():
    text = " ".join(path.read_text(encoding="utf-8") for path in CODE)
    counted = PAGE.partition("\n## Not refused")[2].partition("Up to 1 %")[0]
    reasons = re.findall(r"`([^`\n]+)`", counted)
    assert len(reasons) == 14
    assert [reason for reason in reasons if f'"{reason}' not in text] == []


# ---------------- provoked

FEATURES = "--text hash --image pixels"
COMMANDS = [
    "bench.py --only x",
    "bench.py --items 0",
    "bench.py --items 100 --ranked -1",
    f"extract_features.py --data shop {FEATURES.replace('pixels', 'keywords:0:hash')}",
    "train.py --model pop --data shop --device nonsense",
    "data.py shop --split temporal --cut soon",
    "data.py shop --split temporal --cut .9,.8",
    "data.py shop --cut .8,.9",
    "data.py shop --train_share 0",
    "data.py shop --train_share 2",
    "evaluate.py runs/pop-shop-0 runs/pop-shop-1 --against runs/pop-shop-0",
    "evaluate.py runs/pop-shop-0 --against runs/pop-shop-0",
    "evaluate.py runs/pop-shop-0 --out table",
    "extract_features.py --data shop --text shop/items.jsonl",
    "recommend.py runs/pop-shop-0 --history i1 --items nowhere.csv",
    "train.py --model pop --data shop --cold_start",
    f"train.py --model msm4sr --data shop {FEATURES} --pretrain_data shop,",
    "train.py --model sasrec --data shop --init runs/pop-shop-0",
    f"train.py --model msm4sr --data shop {FEATURES} --init shop",
    "train.py --model sasrce --data shop",
    "train.py --model sasrec,sasrce --data shop",
    "train.py --model pop,pop --data shop",
    "train.py --model pop --data shop --seed -1",
    "train.py --model pop --data shop --seed 1 --seeds 1,2",
    "train.py --model pop --data shop --seeds 1,x",
    "train.py --model pop --data shop --seeds 1,1",
    "train.py --model pop --data shop --seed 99999999999999999999",
    "train.py --model pop --data shop --seeds 0,99999999999999999999",
    "train.py --model pop --data shop --valid_every 0",
    "train.py --model pop --data shop --valid_users 0",
    "train.py --model sasrec --data shop --epochs 2 --valid_every 3",
    "recommend.py runs/pop-shop-0 --user nobody",
    "recommend.py runs/pop-shop-0 --history ,",
    "recommend.py runs/pop-shop-0 --history i1,nothing",
    "recommend.py runs/pop-shop-0 --export shop/items.jsonl",
    "recommend.py runs/pop-shop-0 --export shop",
    "recommend.py runs/pop-shop-0 --user u1 --top 0",
    "recommend.py runs/pop-shop-0 --all --out shop",
    "recommend.py runs/pop-shop-0 --all",
    "recommend.py runs/pop-shop-0 --user u1 --html /dev/null",
    "recommend.py runs/pop-shop-0 --user u1 --out top.csv",
    "recommend.py runs/pop-shop-0 --all --out top.csv --json",
    "data.py shop --core -1",
    "data.py shop --by product",
    "data.py shop/interactions.csv",
    "data.py nowhere",
    # of the other headings, what needs no file of its own
    "extract_features.py --data shop --text pixels",
    "extract_features.py --data shop --text nowhere.npy",
    "extract_features.py --data shop --image keywords:99:hash",
    "data.py shop --split files",
    "data.py shop --split temporal --cut 1990-01-01",
    "data.py shop --core 50",
    "data.py data",
    "data.py data/shop --core 3",
    "data.py hm",
    "data.py m2-uk",
    "evaluate.py shop",
    "evaluate.py runs/pop-shop-0 shop",
    "recommend.py shop --user u1",
    "recommend.py runs/pop-shop-0 --history i1 --items shop/items.jsonl",
]
NOT_HERE = {"--compile cannot be used here"}    # tests/loop/test_train.py takes the compiler away


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a shop, which has one picture, and two runs."""
    folder = tmp_path_factory.mktemp("refusals")
    shop = write_shop(folder / "shop")
    drawn().save(shop / "a.png")
    first, *others = (shop / "items.jsonl").read_text().splitlines()
    first = json.dumps(json.loads(first) | {"images": ["a.png"]})
    (shop / "items.jsonl").write_text("\n".join([first, *others]) + "\n")
    run("train.py", "--model", "pop", "--data", "shop", "--seeds", "0,1", cwd=folder)
    return folder


def row_of(message):
    """The sentence on the page that a message is: the one with the most letters of its own."""
    fits = [
        sentence for sentence in rows()
        if re.fullmatch(".*".join(map(re.escape, sentence.split("{}"))), message, re.DOTALL)
    ]
    return max(fits, key=own_letters, default=None)


def own_letters(sentence) -> int:
    return len(sentence.replace("{}", ""))


def message_of(done) -> str:
    refused(done, "error: ")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    return last.removeprefix("error: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_refused_is_on_the_page(command, place):
    script, *words = shlex.split(command)
    message = message_of(run(script, *words, cwd=place, ok=False))
    row = row_of(message)
    assert row is not None and own_letters(row) > 15, message
    PROVOKED.add(row)


PROVOKED = set()


def test_every_refusal_of_the_command_line_was_provoked(request):
    if not request.session.testscollected >= len(COMMANDS):
        pytest.skip("the commands were not run")
    missing = rows("The command line") - PROVOKED
    assert [row for row in missing if not row.startswith(tuple(NOT_HERE))] == []


SETTINGS = {    # of a model: what is refused of it
    "sasrec": ["dim 0", "epochs 0", "dim 65 heads 2", "dropout 1", "lr 0", "weight_decay -1",
               "clip_norm -1"],
    "fmmsrec": ["input_dropout 1", "mask_ratio 1", "tau 0", "use_text false use_image false",
                "pretrain_epochs -1", "pretrain_lr 0"],
    "mdsrec": ["inner 0", "neighbors -1", "centers 0", "rho_image 2", "tau 0"],
    "mmsr": ["dim 0", "tune_blocks -2", "dropout 1", "mask_ratio 1", "lr 0", "encoder_lr 0",
             "dim 65 heads 2", "fusion stream tune_image_blocks 1", "weight_decay -1"],
    "msm4sr": ["attention_dim 0", "experts 0", "rho 1", "p_max 1", "tau 0", "lam -1",
               "pretrain_epochs -1", "pretrain_lr 0", "e2e true pretrain_epochs 5",
               "e2e true use_nip false use_cmcl false pretrain_epochs 0",
               "use_nip false use_cmcl false pretrain_epochs 5"],
    "digest": ["input_dropout 1", "neighbors 0", "new 2", "loud -1", "decay 2"],
    "srmml": ["gate_scale 0", "languages 0", "temperature -1"],
}


@pytest.mark.parametrize("model, given", [(m, g) for m, gs in SETTINGS.items() for g in gs])
def test_a_setting_that_makes_no_sense_is_refused_as_the_page_says(model, given):
    words = given.split()
    flags = [f"--{word}" if place % 2 == 0 else word for place, word in enumerate(words)]
    args, module = settings.parse(["--model", model, "--data", "x", *flags])
    with pytest.raises(UserError) as error:
        settings.configure(module, args, "x")
    row = row_of(str(error.value).removeprefix("--"))
    assert row in rows("Model files and settings")
    assert any(word in str(error.value) for word in words[::2])
