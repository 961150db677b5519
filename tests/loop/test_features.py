"""extract_features.py: what is encoded, the feature file, work in parts, the command."""
import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import extract_features
from common import web
from common.encoders import hash_text, pixels
from common.features import feature_path
from common.files import UserError, load_tensors, read_json, save_tensors
from extract_features import encoders, features, fingerprint, in_parts, inputs_of, sentences_of
from helpers import run, send, write_shop

BUILT_IN = ("--text", "hash", "--image", "pixels")


def picture(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return str(path)


def write_items(folder, rows):
    with open(folder / "items.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def shop(tmp_path):
    """Four items: two sentences and two pictures; a title of the same words; nothing; a broken
    picture and one of frames."""
    folder = tmp_path / "shop"
    colours = {"a": "red", "b": "blue", "film/1": "green", "film/2": "white"}
    for name, colour in colours.items():
        picture(folder / f"img/{name}.png", colour)
    (folder / "img" / "bad.jpg").write_text("<html>no picture</html>")
    write_items(folder, [
        {"item": "i1", "title": "Red mug", "text": ["It is soft. It is new.", "Kitchen"],
         "images": ["img/a.png", "img/b.png"]},
        {"item": "i2", "title": "Kitchen", "images": ["img/a.png"]},
        {"item": "i3"},
        {"item": "i4", "title": "!!!", "images": ["img/bad.jpg", "img/film"]},
    ])
    lines = ["user,item,time"]
    for u in range(5):
        for t in range(4):
            lines.append(f"u{u},i{1 + (u + t) % 4},{1500000000 + 86401 * t}")
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def dataset(shop, tmp_path):
    return data.load(shop, root=tmp_path / "data")


def image_features(dataset):
    return features(dataset, "image", None, "pixels")


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-6)


# ---------------- what is encoded

def test_sentences_title_first_and_their_mean(dataset):
    got = features(dataset, "text", "hash")
    rows = hash_text(["Red mug", "It is soft.", "It is new.", "Kitchen"])
    assert got["sentences"].shape == (5, 4, 256)
    assert got["sentences_mask"].sum(1).tolist() == [0, 4, 1, 0, 0]
    close(got["sentences"][1], rows)
    close(got["text"][1], rows.mean(0))
    close(got["text"][2], rows[3])
    assert got["has_text"].tolist() == [False, True, True, False, False]    # "!!!" has no word
    assert not got["text"][[0, 3, 4]].any()
    assert not got["sentences"][3:].any()


def test_pictures_films_and_failures(dataset):
    got = image_features(dataset)
    colours = ("red", "blue", "green", "white")
    red, blue, green, white = pixels([Image.new("RGB", (40, 30), colour) for colour in colours])
    there = [[False, False], [True, True], [True, False], [False, False], [False, True]]
    assert got["pictures_mask"].tolist() == there
    close(got["pictures"][1], [red, blue])
    close(got["image"][1], (red + blue) / 2)
    close(got["image"][4], (green + white) / 2)    # the mean of the frames
    about = read_json(feature_path(dataset.folder, "image", "pixels").with_suffix(".json"))
    (path, reason), = about["failures"].items()
    assert path.endswith("img/bad.jpg") and "format" in reason
    assert about["items_with"] == 3
    assert about["backend"] == "pil" and about["versions"]["pillow"]
    assert about["template"] and about["weights"]


def test_only_what_is_read_is_made(dataset):
    reads = ("has_text", "sentences_mask")
    assert set(features(dataset, "text", "hash", reads=reads)) == set(reads)


def test_at_most_ten(tmp_path, shop):
    numbers = [f"Number {i}." for i in range(20)]
    write_items(shop, [{"item": "i1", "title": "T", "text": numbers}])
    dataset = data.load(shop, root=tmp_path / "more")
    assert features(dataset, "text", "hash")["sentences"].shape[1] == 10
    assert inputs_of(dataset, "text")[1][:2] == ["T", "Number 0."]


def test_each_distinct_input_is_encoded_once(dataset):
    which, inputs = inputs_of(dataset, "text")
    assert len(inputs) == len(set(inputs)) == 5
    assert which == [[0, 1, 2, 3], [3], [], [4]]


@pytest.mark.parametrize("text, sentences", [
    ("One 3.5 l. pot! Two? (Three.)", ["One 3.5 l. pot!", "Two?", "(Three.)"]),
    ("これは赤い。とても良い！", ["これは赤い。", "とても良い！"]),
    ("e.g. this, approx. that", ["e.g. this, approx. that"]),
])
def test_sentences_end_where_sentences_end(text, sentences):
    assert sentences_of({"title": "", "text": [text]}) == sentences


def test_no_picture_at_all(tmp_path):
    dataset = data.load(write_shop(tmp_path / "plain"), root=tmp_path / "d")
    # nothing to encode: nothing to load
    got = features(dataset, "image", None, "no/such/model")
    assert not got["has_image"].any()
    assert got["image"].shape == (31, 1)
    assert got["pictures"].shape == (31, 1, 1)


def test_features_that_came_with_the_data_are_stacks_of_one(real, tmp_path):
    dataset = data.load(real("scientific-mm"), root=tmp_path)
    got = features(dataset, "text")
    assert got["sentences"].shape == (1586, 1, 512)
    assert torch.equal(got["sentences"][:, 0], got["text"])
    assert torch.equal(got["sentences_mask"][:, 0], got["has_text"])


# ---------------- the feature file

@pytest.mark.parametrize("change", [{"items_sha256": "0" * 64}, {"encoder": "another"}])
def test_other_items_or_another_encoder_are_refused(dataset, change):
    features(dataset, "text", "hash")
    about = feature_path(dataset.folder, "text", "hash").with_suffix(".json")
    about.write_text(json.dumps(read_json(about) | change))
    with pytest.raises(UserError, match="other items"):
        features(dataset, "text", "hash")


@pytest.mark.parametrize("spoil", ["nan", "row 0", "short", "beyond", "cut"])
def test_damaged_files_are_refused(dataset, spoil):
    features(dataset, "text", "hash")
    path = feature_path(dataset.folder, "text", "hash")
    tensors, _ = load_tensors(path)
    if spoil == "nan":
        tensors["vectors"][1, 3] = torch.nan
    elif spoil == "row 0":
        tensors["vectors"][0, 3] = 1
    elif spoil == "short":
        tensors["index"] = tensors["index"][:-1]
    elif spoil == "beyond":
        tensors["index"][1, 0] = 99
    save_tensors(path, tensors)
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="remove it"):
        features(dataset, "text", "hash")


def test_changed_pictures_are_encoded_again_and_the_old_features_kept(dataset, shop, capsys):
    before = image_features(dataset)
    picture(shop / "img/bad.jpg", "green")
    after = image_features(dataset)
    assert "have changed" in capsys.readouterr().out
    assert after["pictures_mask"][4].all() and not before["pictures_mask"][4].all()
    path = feature_path(dataset.folder, "image", "pixels")
    assert path.with_name("image-pixels.safetensors~1").is_file()


def test_pictures_that_come_later_are_encoded(tmp_path):
    shop = write_shop(tmp_path / "late", items=5)
    write_items(shop, [{"item": f"i{i}", "title": "a", "images": ["a.png"]} for i in range(5)])
    assert not image_features(data.load(shop, root=tmp_path / "data"))["has_image"].any()
    picture(shop / "a.png", "red")
    assert image_features(data.load(shop, root=tmp_path / "data"))["has_image"][1:].all()


def test_frames_that_change_are_noticed(shop):
    folder = shop / "img" / "film"
    before = fingerprint([str(folder)], "image")
    assert before == fingerprint([str(folder)], "image")
    picture(folder / "1.png", "white", (90, 90))
    assert before != fingerprint([str(folder)], "image")


def test_two_processes_that_see_a_change_set_the_old_file_aside_once(dataset, shop, monkeypatch):
    image_features(dataset)
    picture(shop / "img" / "a.png", "white", (90, 90))

    @contextlib.contextmanager
    def after_another(folder):    # which did the work while this one waited
        monkeypatch.setattr(extract_features, "alone_in", contextlib.nullcontext)
        image_features(dataset)
        yield

    monkeypatch.setattr(extract_features, "alone_in", after_another)
    image_features(dataset)
    assert len(list((dataset.folder / "features").glob("image*safetensors~*"))) == 1


def test_features_without_their_pictures_still_serve(dataset, shop):
    before = image_features(dataset)
    (shop / "img").rename(shop / "elsewhere")
    assert torch.equal(image_features(dataset)["image"], before["image"])


# ---------------- work in parts

class Encoder:
    """Length and first letter of each text; remembers its calls, and can be interrupted."""

    def __init__(self, fails=False):
        self.calls = []
        self.fails = fails

    def encode(self, inputs):
        self.calls.append(list(inputs))
        if self.fails and "stop" in inputs:
            raise KeyboardInterrupt
        vectors = np.array([[len(x), ord(x[0])] for x in inputs], np.float32)
        return vectors, {x: "bad" for x in inputs if x == "bb"}, 1


def test_interrupted_work_goes_on(tmp_path):
    inputs = ["bb", "a", "dddd", "ccc", "stop", "eeeeee"]
    parts = tmp_path / "x.parts"
    first = Encoder(fails=True)
    with pytest.raises(KeyboardInterrupt):
        in_parts(parts, first.encode, inputs, 2, {"encoder": "e"})
    assert first.calls == [["eeeeee", "dddd"], ["stop", "ccc"]]    # the longest first
    second = Encoder()
    rows, failures, cut = in_parts(parts, second.encode, inputs, 2, {"encoder": "e"})
    assert second.calls == [["stop", "ccc"], ["bb", "a"]]
    assert rows.tolist() == [[len(x), ord(x[0])] for x in inputs]
    assert failures == {"bb": "bad"}
    assert cut == 3


def test_what_json_reads_back_otherwise_is_the_same(tmp_path):
    encoder = Encoder()
    for _ in range(2):
        made_of = {"processor": {"mean": (.5, .5)}}    # a tuple is a list in JSON
        in_parts(tmp_path / "x.parts", encoder.encode, ["a", "bb"], 2, made_of)
    assert len(encoder.calls) == 1


def test_parts_of_other_inputs_are_not_used(tmp_path):
    encoder = Encoder()
    in_parts(tmp_path / "x.parts", encoder.encode, ["a", "bb"], 2, {"inputs": 1})
    rows, _, _ = in_parts(tmp_path / "x.parts", encoder.encode, ["ccc", "d"], 2, {"inputs": 2})
    assert rows[:, 0].tolist() == [3, 1]


def test_nothing_is_left_of_the_parts(dataset):
    features(dataset, "text", "hash")
    left = {path.suffix for path in (dataset.folder / "features").iterdir()}
    assert left == {".json", ".safetensors"}


# ---------------- the command

def test_from_raw_content_to_a_trained_model(shop, tmp_path):
    done = run("extract_features.py", "--data", shop, *BUILT_IN, cwd=tmp_path)
    assert "text by hash: 2 of 4 items, 5 vectors of 256 numbers" in done.stdout
    assert "1 of 4 pictures cannot be used" in done.stdout
    assert "img/bad.jpg" in done.stdout
    small = ("--dim", 16, "--epochs", 1, "--neighbors", 2, "--centers", 2)
    run("train.py", "--model", "mdsrec", "--data", shop, *BUILT_IN, *small, cwd=tmp_path)


@pytest.mark.parametrize("flags", [
    ("--text", "pixels"),
    ("--text", "no-such-folder/model", "--image", "pixels"),
    ("--text", "hash", "--image", "ViT-B-32:no_such_tag"),
    ("--text", "hash", "--image", "no-such-arch:x"),
    ("--text", "hash", "--image", "keywords:hash"),
    ("--text", "hash", "--device", "abacus"),
])
def test_what_cannot_be_loaded_is_one_sentence(shop, tmp_path, flags, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("extract_features.py", "--data", shop, *flags, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_default_encoders(dataset):
    clip = extract_features.CLIP
    assert encoders(dataset) == {"text": clip, "image": clip}
    dataset.about["source"] = "demo"
    assert encoders(dataset) == {"text": "hash", "image": "pixels"}
    dataset.about["features"] = {"image": "given"}
    assert encoders(dataset, text="x") == {"text": "x", "image": "given"}
    named = encoders(dataset, "x", "keywords:C:t")
    assert named == {"text": "x", "image": "keywords:C:t+x"}


# ---------------- pictures by address

def test_what_is_said_to_be_there_stays_when_pictures_are_fetched(dataset):
    assert dataset.has["text"].tolist() == [False, True, True, False, True]
    dataset.set_has("text", np.array([False, False, False, True, False]))
    dataset.__dict__.pop("has", None)    # as after fetching
    assert dataset.has["text"].tolist() == [False, False, False, True, False]
    assert dataset.has["image"].any()


@pytest.fixture
def addresses(server, shop):
    """The shop's first item has three pictures on the server: a good one, none, and a page."""
    for name in ("a.png", "bad.jpg"):
        server.routes[f"/{name}"] = send(200, (shop / "img" / name).read_bytes())
    urls = [f"{server.base}/{name}" for name in ("a.png", "absent.png", "bad.jpg")]
    write_items(shop, [{"item": "i1", "title": "Red", "images": urls}])
    return server.asked


def test_pictures_are_fetched_once_and_encoded(addresses, shop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(web, "is_public", lambda address: True)
    dataset = data.load(shop, root=tmp_path / "data")
    assert not dataset.has["image"].any()
    got = image_features(dataset)
    has = [False, True, False, False, False]
    assert got["has_image"].tolist() == has == dataset.has["image"].tolist()
    close(got["image"][1], pixels([Image.new("RGB", (40, 30), "red")])[0])
    assert "ok 1" in capsys.readouterr().out
    assert len(addresses) == 3
    data.load(shop, root=tmp_path / "data").fetch_pictures()
    assert len(addresses) == 3


def test_addresses_inside_this_machine_are_refused(addresses, shop, tmp_path, capsys):
    dataset = data.load(shop, root=tmp_path / "data")
    assert not image_features(dataset)["has_image"].any()
    assert "refused 3" in capsys.readouterr().out
    assert not addresses


def test_a_text_that_moves_to_another_item_moves_its_vector(tmp_path, capsys):
    """The distinct sentences stay the same."""
    write_shop(tmp_path / "shop", items=12)
    rows = [{"item": f"i{n}", "title": "Garden" if n % 3 else "Kitchen"} for n in range(12)]
    write_items(tmp_path / "shop", rows)
    dataset = data.load(tmp_path / "shop", root=tmp_path / "data")
    before = features(dataset, "text", "hash")["text"]
    rows[3]["title"] = "Garden"
    rows[4]["title"] = "Kitchen"
    write_items(tmp_path / "shop", rows)
    dataset = data.load(tmp_path / "shop", root=tmp_path / "data")
    after = features(dataset, "text", "hash")["text"]
    assert "inputs of shop have changed" in capsys.readouterr().out
    keys = [item["key"] for item in dataset.items]
    first, second = keys.index("i3"), keys.index("i4")
    swapped = list(range(13))
    swapped[first], swapped[second] = second, first
    assert torch.equal(after, before[swapped])
    assert features(dataset, "text", "hash")["text"].equal(after)
    assert "have changed" not in capsys.readouterr().out


def test_texts_that_are_cut_are_counted(dataset, monkeypatch):
    monkeypatch.setattr(extract_features, "encode", lambda model, encoder, inputs: (
        np.eye(len(inputs), 4, dtype=np.float32) + 1, {}, 2))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        features(dataset, "text", "hash")
    assert "note: 2 of 5 texts are longer than hash reads, and were cut" in said.getvalue()
