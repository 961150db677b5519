"""Models of strangers: nothing of theirs is run, and nothing absurd is built."""
import json
import os
from pathlib import Path

import pytest
import torch

from common import encoders
from common.encoders import open_encoder
from common.files import UserError, read_json
from helpers import refused, run

CPU = torch.device("cpu")
ABSURD = {    # what the config says -> words of the refusal
    "hidden_size": (10 ** 9, "weights, and its files hold"),
    "intermediate_size": (10 ** 8, "weights, and its files hold"),
    "vocab_size": (10 ** 9, "weights, and its files hold"),
    "max_position_embeddings": (10 ** 9, "weights, and its files hold"),
    "num_hidden_layers": (10 ** 6, "num_hidden_layers 1000000 in its config"),
    "num_labels": (10 ** 8, "num_labels 100000000 in its config"),
    "num_attention_heads": (0, "cannot be used"),
}
NEGATIVE = {
    "num_hidden_layers": (-3, "num_hidden_layers -3 in its config"),
    "hidden_size": (-16, "cannot be used"),
    "vocab_size": (-1, "cannot be used"),
}
OTHER_TYPES = {
    "hidden_size": ("sixteen", "cannot be loaded"),
    "num_hidden_layers": ([2], "cannot be loaded"),
    "vocab_size": (None, "cannot be"),
    "model_type": (5, "cannot be loaded"),
    "dtype": ("object", "cannot be"),
    "hidden_act": ("os.system", "cannot be"),
}
CHANGES = [(key, *row) for part in (ABSURD, NEGATIVE, OTHER_TYPES) for key, row in part.items()]


@pytest.fixture
def model(tmp_path):
    """The folder of a small random text model."""
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder = tmp_path / "model"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=40).save_pretrained(folder)
    BertModel(BertConfig(
        vocab_size=6, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40,
    )).save_pretrained(folder)
    return folder


def change(folder, file="config.json", **values):
    (folder / file).write_text(json.dumps(read_json(folder / file) | values))


def refusal(folder, modality="text") -> str:
    with pytest.raises(UserError) as error:
        open_encoder(modality, str(folder), CPU)
    text = str(error.value)
    assert "\n" not in text and folder.name in text
    return text


@pytest.fixture
def never_built(monkeypatch):
    """No weight is given memory: torch is told of every one that is."""
    import transformers
    monkeypatch.setattr(
        transformers.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("it was built")
    )


@pytest.mark.parametrize("key, value, words", CHANGES)
def test_a_config_of_no_model_is_refused_before_it_is_built(
    model, never_built, key, value, words
):
    change(model, **{key: value})
    assert words in refusal(model)


@pytest.mark.parametrize("file, values, words", [
    ("modules.json", 5, "modules.json"),
    ("modules.json", [{"path": 1, "type": "x"}], "modules.json"),
    ("modules.json", [{"path": "../..", "type": "a.Dense"}], "lacks the weights"),
    ("sentence_bert_config.json", "deep", "sentence_bert_config.json"),
])
def test_files_beside_it_of_another_form_are_refused(model, file, values, words):
    (model / file).write_text(json.dumps(values))
    assert words in refusal(model)


def test_a_picture_size_of_no_model_is_refused(model):
    (model / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 10 ** 5}}))
    assert "height 100000" in refusal(model, "image")


def test_code_of_its_own_is_not_run_and_its_advice_not_repeated(model, tmp_path):
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(model, model_type="own", auto_map={"AutoConfig": "code.A", "AutoModel": "code.A"})
    said = refusal(model)
    assert "code of its own, which is not run" in said and "trust_remote_code" not in said
    assert not (tmp_path / "ran").exists()


class Runs:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_is_called_otherwise_is_not_run(model, tmp_path):
    """Under the name of safe weights, and in place of given vectors."""
    tensors = {"x": torch.zeros(9999), "y": Runs(tmp_path / "ran")}
    torch.save(tensors, model / "model.safetensors")
    assert "cannot be loaded" in refusal(model)
    assert not (tmp_path / "ran").exists()


# ---------------- links

def test_links_out_of_the_folder_are_refused(model, tmp_path):
    outside = tmp_path / "weights"
    (model / "model.safetensors").rename(outside)
    (model / "model.safetensors").symlink_to(outside)
    assert f"is a link to {outside}" in refusal(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("kept")    # a link inside
    outside.rename(model / "kept")
    assert open_encoder("text", str(model), CPU).encode(["a"])[0].shape == (1, 16)


def test_a_link_to_a_device_and_a_pipe_are_refused(model):
    (model / "notes").symlink_to("/dev/zero")
    assert "is a link to /dev/zero" in refusal(model)
    (model / "notes").unlink()
    os.mkfifo(model / "notes")
    assert "neither a file nor a folder" in refusal(model)


def test_the_links_of_the_hugging_face_cache_are_its_own(model, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    model.rename(cache / "snapshots" / "abc")
    weights = cache / "snapshots" / "abc" / "model.safetensors"
    weights.rename(cache / "blobs" / "123")
    weights.symlink_to("../../blobs/123")
    folder = str(cache / "snapshots" / "abc")
    assert open_encoder("text", folder, CPU).encode(["a"])[0].shape == (1, 16)


# ---------------- where they come in

def test_an_encoder_that_fails_on_a_text_is_refused(model):
    """Its tokenizer has more words than it has vectors."""
    encoder = open_encoder("text", str(model), CPU)
    encoder.model.embeddings.word_embeddings = torch.nn.Embedding(2, 16)
    with pytest.raises(UserError, match="the encoder x cannot be used"):
        encoders.encode(encoder, "x", ["a a"])


def test_mmsr_looks_at_a_folder_before_it_builds(shop, model, tmp_path):
    change(model, num_hidden_layers=10 ** 6)
    flags = ("--model", "mmsr", "--data", "shop", "--image_encoder", "tiny", "--text_encoder")
    done = run("train.py", *flags, model, cwd=tmp_path, ok=False)
    refused(done, "num_hidden_layers 1000000")


def test_a_run_that_brings_a_model_file_is_not_opened(shop, tmp_path):
    """Its config.json names a file beside it: that would be a stranger's code."""
    run("train.py", "--model", "pop", "--data", "shop", cwd=tmp_path)
    folder = tmp_path / "runs" / "pop-shop-0"
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for named in ("runs/pop-shop-0/own.py", str(folder / "own.py")):
        change(folder, model_file=named)
        done = run("recommend.py", folder, "--user", "u1", cwd=tmp_path, ok=False)
        refused(done, "own.py", "not run")
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, words", [
    ({"text_cfg": {"layers": 10 ** 6}}, "layers 1000000"),
    ({"vision_cfg": {"width": 10 ** 6}}, "weights, and its files hold"),
    ({"embed_dim": 10 ** 9}, "weights, and its files hold"),
    ({"text_cfg": {"width": "x"}}, "cannot be loaded"),
])
def test_a_clip_of_no_sense_is_refused_before_it_is_built(tmp_path, monkeypatch, change, words):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    about = {"model_cfg": config, "preprocess_cfg": {"size": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    (tmp_path / "open_clip_model.safetensors").write_bytes(bytes(9999))
    monkeypatch.setattr(
        open_clip, "create_model_from_pretrained", lambda *_, **__: pytest.fail("it was built")
    )
    with pytest.raises(UserError, match=words):
        open_encoder("image", f"local-dir:{tmp_path}", CPU)
