"""Damaged files of the project's own: each kind that tests/fuzz.py has found is refused."""
import json
import shutil

import numpy as np
import pytest
import torch

from common.features import feature_path
from common.files import read_json, save_tensors
from helpers import refused, run, write_shop

FEATURES = ("--text", "hash", "--image", "pixels")
SMALL = ("--dim", 8, "--heads", 2, "--epochs", 1)
RUN = "runs/sasrec-shop-0"
USER = ("recommend.py", RUN, "--user", "u1")
TABLE = ("evaluate.py", "runs/pop-shop-0", RUN)
RESUME = ("train.py", "--model", "sasrec", "--data", "data/shop", "--dim", 8, "--heads", 2,
          "--epochs", 2, "--resume")
COSINE = ("train.py", "--model", "cosine", "--data", "data/shop", *FEATURES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a processed shop, its features, and runs."""
    folder = tmp_path_factory.mktemp("whole")
    write_shop(folder / "shop")
    run("train.py", "--model", "sasrec", "--data", "shop", *SMALL, cwd=folder)
    run("train.py", "--model", "pop", "--data", "shop", cwd=folder)
    run("train.py", "--model", "msm4sr", "--data", "shop", *SMALL, *FEATURES,
        "--pretrain_epochs", 1, cwd=folder)
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy; its runs know the data as they were trained on it, beside them."""
    shutil.copytree(whole, tmp_path / "copy")
    for config in (tmp_path / "copy" / "runs").glob("*/config.json"):
        data = str(tmp_path / "copy" / "data" / "shop")
        config.write_text(json.dumps(read_json(config) | {"data": data}))
    return tmp_path / "copy"


def said(place, words):
    """The sentence that a command is refused with."""
    script, *flags = words
    done = run(script, *flags, cwd=place, ok=False)
    refused(done)
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    return sentence


def changed(path, *keys, value):
    """Put another value into a JSON file."""
    whole = read_json(path)
    inside = whole
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    path.write_text(json.dumps(whole))


def flip(path, place):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("file, words, sentence", [
    (f"{RUN}/model.safetensors", USER, "not those that were written): train again"),
    (f"{RUN}/state.safetensors", RESUME, "not those that were written): remove it and run"),
    ("runs/msm4sr-shop-0/pretrain.safetensors",
     ("train.py", "--model", "msm4sr", "--data", "data/shop", *SMALL, *FEATURES, "--init",
      "runs/msm4sr-shop-0", "--out", "again"),
     "not those that were written): give --init the folder of another run"),
    ("data/shop/features/text-hash.safetensors", COSINE, "not those that were written): remove it"),
])
def test_one_bit_of_weights_or_features_is_told(place, file, words, sentence):
    flip(place / file, -3)
    assert sentence in said(place, words)


def test_one_rank_that_counts_is_told(place):
    path = place / RUN / "ranks-test.npy"
    ranks = np.load(path)
    ranks[np.argmin(ranks)] += 1
    np.save(path, ranks)
    assert "do not give the numbers of metrics.json" in said(place, TABLE)
    np.save(path, ranks[:, None])
    assert "they are no ranks" in said(place, TABLE)
    path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'shape': (3,")
    assert "ranks-test.npy cannot be read" in said(place, TABLE)


@pytest.mark.parametrize("keys, value, words, sentence", [
    (("config",), "x", USER, "config.json of no run: train it again"),
    (("split",), "half", USER, "config.json of no run: train it again"),
    (("train_share",), "1", USER, "config.json of no run: train it again"),
    (("seed",), 2 ** 70, USER, "config.json of no run: train it again"),
    (("config", "dim"), "8", USER, "makes no sense (dim): train it again"),
    (("config", "dim"), True, USER, "makes no sense (dim): train it again"),
    (("config", "dim"), 9, USER, "makes no sense (dim 9 must be a multiple of heads 2)"),
    (("config",), 5, TABLE, "config.json of no run: train it again, or leave it out"),
    (("config",), None, RESUME, "leave --resume out, then the run begins anew"),
    (("config", "epochs"), "1", RESUME, "was begun with other settings (epochs)"),
])
def test_settings_of_another_form_are_told(place, keys, value, words, sentence):
    changed(place / RUN / "config.json", *keys, value=value)
    assert sentence in said(place, words)


@pytest.mark.parametrize("keys, value, words, sentence", [
    (("test",), "x", TABLE, "metrics.json of no run"),
    (("test", "ndcg@10"), None, TABLE, "metrics.json of no run"),
    (("groups", "cold"), {}, TABLE, "metrics.json of no run"),
    (("groups_masked",), {}, ("evaluate.py", "runs/pop-shop-0", "--against", RUN), "two sets of"),
    (("users",), "60", (*RESUME[:-2], 1, "--resume"), "holds something else than it should"),
])
def test_metrics_of_another_form_are_told(place, keys, value, words, sentence):
    changed(place / RUN / "metrics.json", *keys, value=value)
    assert sentence in said(place, words)


def test_a_damaged_log_is_cut_and_the_run_goes_on(place):
    log = place / RUN / "log.jsonl"
    for line in (b"[" * 10 ** 5, b"\xff", b"5", b'{"stage": "tea", "epoch": 1}', b'{"stage": []}'):
        log.write_bytes(line + b"\n" + log.read_bytes())
    run(*RESUME, cwd=place)
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [2]


def test_a_state_of_another_model_is_told(place):
    path = place / RUN / "state.safetensors"
    progress = dict(stage="train", epoch=1, best=.1, best_epoch=1, seconds=1.)
    for tensors, about, sentence in (
        ({"model.x": torch.zeros(3)}, progress, "is of another model than is trained"),
        ({"nothing": torch.zeros(3)}, progress, "is of another model than is trained"),
        ({}, progress | {"epoch": "1"}, "is no state of a run"),
        ({}, progress | {"stage": "tea"}, "is no state of a run"),
        ({}, [1], "is no state of a run"),
    ):
        save_tensors(path, tensors, about)
        assert sentence in said(place, RESUME)


ITEM = {"key": "i0", "title": "", "text": [], "language": "", "images": []}


@pytest.mark.parametrize("line", [
    "{", "5", "[" * 10 ** 5, json.dumps(ITEM | {"title": 5}), json.dumps(ITEM | {"text": "x"}),
    json.dumps(ITEM | {"images": None}), '{"key": "i0"}', json.dumps(ITEM | {"title": "\ud800"}),
])
def test_a_damaged_line_of_the_processed_items_is_told(place, line):
    path = place / "data" / "shop" / "items.jsonl"
    _, *others = path.read_text().splitlines()
    path.write_text("\n".join([line, *others]) + "\n")
    assert "items.jsonl was changed after the data was prepared" in said(place, COSINE)


@pytest.mark.parametrize("key, value", [
    ("files", 5), ("notes", [5]), ("features", {"text": 1}), ("pictures_in", "x"), ("published", 1),
    ("image_root", None),
])
def test_a_source_json_of_another_form_is_told(place, key, value):
    changed(place / "data" / "shop" / "source.json", key, value=value)
    for words in (("data.py", "shop"), ("data.py", "data/shop")):
        assert "source.json holds something else than it should" in said(place, words)


def test_sequences_that_are_not_those_of_the_preparation_are_told(place):
    path = place / "data" / "shop" / "sequences.npz"
    arrays = dict(np.load(path))
    np.savez_compressed(path, **arrays)    # a few kB that may become gigabytes
    assert "it is compressed" in said(place, COSINE)
    for items in (np.roll(arrays["items"], 1), arrays["items"].astype(str), arrays["items"][:0]):
        np.savez(path, **arrays | {"items": items})
        assert "sequences.npz was changed after the data was prepared" in said(place, COSINE)
    np.savez(path, items=arrays["items"], times=arrays["times"][:, None],
             offsets=arrays["offsets"])    # the same bytes
    assert "do not belong together" in said(place, COSINE)


def test_features_of_another_encoder_or_form_are_told(place):
    text, image = (feature_path(place / "data" / "shop", *names)
                   for names in (("text", "hash"), ("image", "pixels")))
    kept = text.read_bytes()
    shutil.copy(image, text)
    assert "is no feature file of 30 items" in said(place, COSINE)
    for change in ({"vectors": torch.zeros(31)}, {"vectors": torch.zeros(31, 8).double()},
                   {"index": torch.zeros(31, 1).long()}, {"index": torch.zeros(31, 0).int()}):
        tensors = {"vectors": torch.zeros(31, 8), "index": torch.zeros(31, 1).int()}
        save_tensors(text, tensors | change, {"file": text.name})
        assert "is no feature file of 30 items" in said(place, COSINE)
    text.write_bytes(kept)
    changed(text.with_suffix(".json"), "notes", value=[5])
    assert "has notes that are no sentences" in said(place, COSINE)
    text.with_suffix(".json").write_text('"x"')
    assert f"remove {text.relative_to(place)}, then both are" in said(place, COSINE)
    text.unlink()
    run(*COSINE, cwd=place)


def test_a_part_of_features_of_another_form_is_told(place):
    features = place / "data" / "shop" / "features"
    text = features / "text-hash.safetensors"
    about = read_json(text.with_suffix(".json"))
    made_of = {key: about[key] for key in
               ("encoder", "inputs", "inputs_sha256", "template", "weights", "versions")}
    parts = text.with_suffix(".parts")
    parts.mkdir()
    (parts / "about.json").write_text(json.dumps(made_of))
    text.unlink()
    for tensors, notes in (({}, [{}, 0]), ({"vectors": torch.zeros(2, 8)}, [{}, 0]),
                           ({"vectors": torch.zeros(about["inputs"], 8)}, {})):
        save_tensors(parts / "0.safetensors", tensors, notes)
        assert "is no part of the features that are made: remove it" in said(place, COSINE)


def test_a_table_of_new_items_without_keys_gets_its_own_sentence(place):
    (place / "new.csv").write_text("name,colour\nmug,red\n")
    words = ("recommend.py", RUN, "--history", "i1", "--items", "new.csv")
    sentence = said(place, words)
    assert "the column of the items' keys (it begins with name, colour)" in sentence
    assert "complete copy" not in sentence


def test_devices_and_pipes_are_no_files(place):
    for file, words in ((f"{RUN}/config.json", USER), ("data/shop/items.jsonl", COSINE),
                        (f"{RUN}/ranks-test.npy", TABLE)):
        kept = (place / file).read_bytes()
        (place / file).unlink()
        (place / file).symlink_to("/dev/zero")
        assert "it is no file" in said(place, words)
        (place / file).unlink()
        (place / file).write_bytes(kept)
