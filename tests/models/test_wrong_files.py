"""Somebody's model file: a right one trains, a wrong one gets one sentence before the start."""
import re

import pytest
import torch

from common.files import UserError
from helpers import ROOT, refused, run
from loop.settings import load_model_file

README = (ROOT / "models" / "README.md").read_text()
RIGHT = re.search(r"```python\n(.+?)```", README, re.DOTALL)[1]    # the file that README shows
UNTRAINED = """
from dataclasses import dataclass
import torch
READS = ()

@dataclass
class Config:
    max_len: int = 50

class Model(torch.nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        self.N = catalog["n_items"]

    def forward(self, batch):
        return {"next_item": torch.zeros(())}

    def encode_items(self):
        return torch.zeros(self.N + 1, 1)

    def score(self, batch, table):
        return table.T.expand(len(batch["seq"]), -1)
"""
PRETRAIN = """

class Pretrain(nn.Module):
    rows = "items"

    def __init__(self, cfg, catalog):
        super().__init__()

    def forward(self, batch):
        return {"loss": 0.0}
"""
WRONG = {    # what is changed in the right file -> what the sentence must say
    "no Config": ("class Config", "class Settings", "Config"),
    "no Model": ("class Model", "class Network", "Model"),
    "no READS": ("READS =", "NEEDS =", "READS"),
    "READS is text": ('READS = ("text", "has_text")', 'READS = ("text")', "READS as a tuple"),
    "unknown key": ('"has_text")', '"txet")', "a catalog key txet"),
    "no dataclass": ("@dataclass\n", "", "Config as a dataclass"),
    "no score": ("def score", "def scores", "Model.score"),
    "no forward": ("def forward", "def loss", "Model.forward"),
    "no encode_items": ("def encode_items", "def items", "Model.encode_items"),
    "no module": ("class Model(nn.Module)", "class Model", "Model as a class, a torch.nn.Module"),
    "half a recipe": ("    patience: int", "    hope: int", "Config.patience (int)"),
    "no max_len": ("    max_len: int", "    length: int", "Config.max_len (int)"),
    "no default": ("    dim: int = 32 ", "    dim: int      ", "Config.dim with a default"),
    "a list": ("    dim: int = 32", "    dim: tuple = (3, 2)", "int, float, str, bool or Literal"),
    "unknown type": ("    dim: int", "    dim: 'Int'", "name 'Int' is not defined"),
    "name of a flag": ("    dim: int", "    seed: int", "another name for Config.seed"),
    "optimizer": ("    dim: int = 32", "    optimizer: str = 'sgd'", "one of adam, adamw"),
    "preset": ("class Model", "PRESETS = {'demo': {'dmi': 3}}\nclass Model", "Config.dmi"),
    "syntax": ("class Model(nn.Module):", "class Model(nn.Module)", "SyntaxError in line"),
    "import": ("import torch\n", "import torhc\n", "No module named 'torhc'"),
    "its own error": ("READS =", "1 / 0\nREADS =", "ZeroDivisionError in line"),
}


def write(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def changed(old, new):
    assert old in RIGHT, old
    return RIGHT.replace(old, new, 1)


def sentence(path):
    """What is said of a wrong file: one sentence that names the file."""
    with pytest.raises(UserError) as error:
        load_model_file(path)
    text = str(error.value)
    assert "\n" not in text and "mine.py" in text
    return text


@pytest.mark.parametrize("old, new, said", WRONG.values(), ids=WRONG)
def test_a_wrong_file_gets_one_sentence(old, new, said, tmp_path):
    assert said in sentence(write(tmp_path, changed(old, new)))


@pytest.mark.parametrize("old, new, said", [
    ('rows = "items"', 'rows = "users"', "Pretrain.rows as one of sequences, prefixes, items"),
    ("def forward(self, batch):\n        return {\"loss\"", "def f(self):\n        return {\"l\"",
     "Pretrain.forward"),
    ("rows", "rows", "Model.init_from"),
    ("rows", "rows", "Config.pretrain_epochs (int)"),
])
def test_a_wrong_pretrain_gets_one_sentence(old, new, said, tmp_path):
    assert old in PRETRAIN
    assert said in sentence(write(tmp_path, RIGHT + PRETRAIN.replace(old, new, 1)))


def test_the_example_keeps_what_the_page_says_of_batches(tmp_path):
    module = load_model_file(write(tmp_path, RIGHT))
    torch.manual_seed(0)
    catalog = {"n_items": 9, "text": torch.randn(10, 4), "has_text": torch.arange(10) > 2}
    model = module.Model(module.Config(max_len=4), catalog).eval()
    batch = {"seq": torch.tensor([[3, 5, 9, 1], [0, 0, 7, 2]]),
             "target": torch.tensor([[5, 9, 1, 4], [0, 0, 2, 8]])}
    padded = {key: torch.nn.functional.pad(value, (3, 0)) for key, value in batch.items()}
    longer = {key: torch.cat([value.new_full((2, 3), 6), value], 1) for key, value in batch.items()}
    table = model.encode_items()
    scores, losses = model.score(batch, table), model(batch)
    torch.testing.assert_close(model.score(padded, table), scores)
    torch.testing.assert_close(model(padded), losses)
    cut = [0]    # a row that max_len fills
    torch.testing.assert_close(model.score(longer, table)[cut], scores[cut])
    before = {key: value[cut] for key, value in batch.items()}
    after = {key: value[cut] for key, value in longer.items()}
    torch.testing.assert_close(model(after), model(before))


def test_all_faults_are_in_one_sentence(tmp_path):
    text = RIGHT.replace("patience", "hope").replace("def score", "def scores")
    said = sentence(write(tmp_path, text.replace('"has_text")', '"txet")')))
    assert all(fault in said for fault in ("Config.patience", "Model.score", "txet"))


def test_it_ends_with_exit_code_2_before_any_data_is_touched(tmp_path):
    path = write(tmp_path, changed("def score", "def scores"))
    done = run("train.py", "--model", path, "--data", "demo", cwd=tmp_path, ok=False)
    refused(done, "Model.score", "models/README.md")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.py"]
    done = run("train.py", "--model", "mdsrce", "--data", "demo", cwd=tmp_path, ok=False)
    refused(done, "mdsrce", "mdsrec", "path of a model file")


def test_the_right_file_loads(tmp_path):
    assert load_model_file(write(tmp_path, RIGHT)).READS == ("text", "has_text")


def test_an_untrained_file_needs_no_recipe(shop, tmp_path):
    path = write(tmp_path, UNTRAINED)
    done = run("train.py", "--model", path, "--data", shop, "--text", "hash", cwd=tmp_path)
    assert "mine-shop-0" in done.stdout


def test_weights_without_a_recipe_are_refused(shop, tmp_path):
    text = UNTRAINED.replace("self.N =", "self.w = torch.nn.Linear(1, 1)\n        self.N =")
    done = run("train.py", "--model", write(tmp_path, text), "--data", shop, cwd=tmp_path, ok=False)
    refused(done, "Config has no recipe", "lr")


LOSS = 'return {"next_item": F.cross_entropy'


@pytest.mark.parametrize("old, new, words", [
    (LOSS, 'return {} and {"next_item": F.cross_entropy', "forward of the model file must return"),
    (LOSS, 'return 1.0 or {"next_item": F.cross_entropy', "forward of the model file must return"),
    ("ignore_index=0)}", "ignore_index=0).detach()}", "0-d tensors with a gradient"),
    ("ignore_index=0)}", "ignore_index=0, reduction='none')}", "0-d tensors with a gradient"),
    ("[:, -1] @ table.T\n", "[:, -1] @ table[1:].T\n", "a column for each row of encode_items"),
    ("[:, -1] @ table.T\n", "[:, -1].detach().numpy() @ table.T.numpy()\n", "returned ndarray"),
])
def test_what_a_model_returns_in_another_form_is_one_sentence(shop, tmp_path, old, new, words):
    path = write(tmp_path, changed(old, new))
    done = run("train.py", "--model", path, "--data", "shop", "--text", "hash", "--image", "pixels",
               "--epochs", 1, "--device", "cpu", cwd=tmp_path, ok=False)
    refused(done, words)


@pytest.mark.parametrize("old, new, said", [
    ("    dim: int = 32", '    dim: int = "8"', "Config.dim with a default that is int"),
    ("    epochs: int = 20", "    epochs: int = 1.5", "Config.epochs with a default that is int"),
    ("class Model", "PRESETS = ['demo']\nclass Model", "PRESETS as a dict of dicts"),
    ("def __init__(self, cfg, catalog):", "def __init__(self, cfg, catalog=None, *, more):",
     "Model.__init__ that takes cfg and catalog"),
    ("def __init__(self, cfg, catalog):", "def __init__(self, cfg):",
     "Model.__init__ that takes cfg and catalog"),
    ("class Model", "PRESETS = {'demo': None}\nclass Model", "PRESETS as a dict of dicts"),
])
def test_defaults_presets_and_arguments_of_another_form_are_named(old, new, said, tmp_path):
    assert said in sentence(write(tmp_path, changed(old, new)))
