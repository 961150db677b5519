"""recommend.py: its lists against the models' own scores, its files, and what it refuses."""
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recommend
from common.files import UserError, load_tensors
from evaluate import ranking
from helpers import drawn, refused, run, write_shop
from loop.runs import open_run

SMALL = ("--dim", 8, "--epochs", 1, "--text", "hash", "--image", "pixels")
FLAGS = {
    "sasrec": SMALL,
    "srmml": SMALL,
    "mdsrec": (*SMALL, "--inner", 8, "--centers", 4),
    "msm4sr": (*SMALL, "--pretrain_epochs", 0),
    "fmmsrec": (*SMALL, "--pretrain_epochs", 0),
    "mmsr": (
        "--dim", 8, "--epochs", 1, "--text_encoder", "tiny", "--image_encoder", "tiny",
        "--loss", "in_batch",
    ),
    "cosine": ("--text", "hash", "--image", "pixels"),
    "pop": (),
    "digest": SMALL,
}
CONTENT = (*SMALL, "--pretrain_epochs", 0, "--use_id", "false")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a shop, some of its items with pictures, and a run of every model."""
    place = tmp_path_factory.mktemp("recommend")
    shop = write_shop(place / "shop")
    lines = [json.loads(line) for line in (shop / "items.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines[:20]):
        drawn(i).save(shop / f"{i}.png")
        line["images"] = [f"{i}.png"]
    lines[3]["title"] = "2 < 3 & co"
    (shop / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for model, flags in FLAGS.items():
        heads = ("--heads", 2) if model not in ("cosine", "pop", "mdsrec") else ()
        run("train.py", "--model", model, "--data", "shop", *heads, *flags, cwd=place)
    flags = ("--heads", 2, *CONTENT, "--out", "content")
    run("train.py", "--model", "msm4sr", "--data", "shop", *flags, cwd=place)
    return place


def opened(place, model, monkeypatch):
    monkeypatch.chdir(place)
    run_of = open_run(Path(f"runs/{model}-shop-0"), "cpu")
    return run_of, run_of.model().eval()


def plain_scores(run_of, model, history):
    """Scores of all items after a whole history, one user at a time: (N+1,)"""
    seq = torch.tensor([history[-run_of.cfg.max_len:]])
    batch = {"user": torch.tensor([0]), "seq": seq}
    with torch.no_grad(), ranking(model):
        return model.score(batch, model.encode_items()).float()[0]


def histories(dataset):
    for user, key in enumerate(recommend.keys_of_users(dataset)):
        yield key, dataset.flat[dataset.offsets[user]:dataset.offsets[user + 1]].tolist()


def check_list(found, scores, allowed, items):
    """found: (key, score) pairs, the best first; scores: of all items (N+1,)."""
    numbers = {item["key"]: number for number, item in enumerate(items)}
    ids = [numbers[key] for key, _ in found]
    assert len(set(ids)) == len(ids) == min(10, len(allowed))
    assert set(ids) <= set(allowed)
    given = np.array([score for _, score in found])
    np.testing.assert_allclose(given, scores[ids], rtol=1e-4, atol=1e-5)
    best = np.sort(scores[sorted(allowed)].numpy())[::-1][:len(ids)]
    np.testing.assert_allclose(given, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", FLAGS)
def test_everybodys_lists_are_the_best_of_the_models_scores(place, monkeypatch, model):
    """In several blocks and chunks; what a user has is left out."""
    monkeypatch.setattr(recommend, "BLOCK", 25)
    monkeypatch.setattr(recommend, "chunk_size", lambda table, device: 7)
    run("recommend.py", f"runs/{model}-shop-0", "--all", "--out", "top.csv", cwd=place)
    with open(place / "top.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    run_of, trained = opened(place, model, monkeypatch)
    items = run_of.dataset.items
    for key, history in histories(run_of.dataset):
        mine = [row for row in rows if row["user"] == key]
        assert [int(row["rank"]) for row in mine] == list(range(1, len(mine) + 1))
        found = [(row["item"], float(row["score"])) for row in mine]
        allowed = set(range(1, len(items))) - set(history)
        check_list(found, plain_scores(run_of, trained, history), allowed, items)
    assert len({row["user"] for row in rows}) == run_of.dataset.n_users


@pytest.mark.parametrize("flags, left_out", [((), True), (("--keep_history",), False)])
def test_one_user_and_somebody_with_the_same_history(place, monkeypatch, flags, left_out):
    run_of, trained = opened(place, "sasrec", monkeypatch)
    items = run_of.dataset.items
    key, history = next(histories(run_of.dataset))
    keys = ",".join(items[item]["key"] for item in history)
    found = []
    for who in (("--user", key), ("--history", keys)):
        done = run("recommend.py", "runs/sasrec-shop-0", *who, "--json", *flags, cwd=place)
        found.append(json.loads(done.stdout))
    assert found[0].pop("user") == key
    assert found[1].pop("user") is None
    assert found[0] == found[1]
    assert found[0]["history"] == keys.split(",")
    pairs = [(row["item"], row["score"]) for row in found[0]["items"]]
    allowed = set(range(1, len(items))) - (set(history) if left_out else set())
    check_list(pairs, plain_scores(run_of, trained, history), allowed, items)
    assert found[0]["items"][0]["title"] == next(
        item["title"] for item in items if item["key"] == pairs[0][0]
    )


def test_more_than_there_is(place):
    """A list ends where the items end, and nobody gets padding or what he has."""
    done = run("recommend.py", "runs/pop-shop-0", "--history", "i1,i2", "--top", 99, "--json",
               cwd=place)
    items = [row["item"] for row in json.loads(done.stdout)["items"]]
    assert sorted(items) == sorted({f"i{i}" for i in range(30)} - {"i1", "i2"})


def test_a_history_of_ten_thousand_items(place):
    keys = ",".join(f"i{i % 29}" for i in range(10_000))
    done = run("recommend.py", "runs/sasrec-shop-0", "--history", keys, "--json", cwd=place)
    assert [row["item"] for row in json.loads(done.stdout)["items"]] == ["i29"]


def test_the_list_for_a_person(place):
    done = run("recommend.py", "runs/sasrec-shop-0", "--history", "i7", "--top", 3, cwd=place)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("for somebody, who has 1 items, lately ")
    assert len(lines) == 4
    assert lines[1].split()[0] == "1"


def test_no_more_scores_are_held_than_the_budget(place, monkeypatch):
    run_of, trained = opened(place, "sasrec", monkeypatch)
    shapes = []
    score = trained.score

    def watched(*inputs):
        scores = score(*inputs)
        shapes.append(tuple(scores.shape))
        return scores

    trained.score = watched
    monkeypatch.setattr(recommend, "chunk_size", lambda table, device: 8)
    ranker = recommend.Ranker(trained, recommend.encoded(trained), 50, torch.device("cpu"))
    users = np.arange(run_of.dataset.n_users)
    recommend.best_items(ranker, recommend.rows_of_users(run_of.dataset, users, 50, "cpu"), 5)
    assert max(shapes) == (8, 31)
    assert sum(rows for rows, _ in shapes) == len(users)


def test_scores_that_are_not_finite_are_refused(place, monkeypatch):
    run_of, trained = opened(place, "sasrec", monkeypatch)
    trained.item.weight.data[5] = torch.nan
    ranker = recommend.Ranker(trained, recommend.encoded(trained), 50, torch.device("cpu"))
    with pytest.raises(UserError, match="not finite"):
        recommend.best_items(ranker, recommend.rows_of_history([1], 50, "cpu"), 5)


# ---------------- vectors for an index

@pytest.mark.parametrize("model", FLAGS)
def test_exported_vectors_rank_as_the_model_does(place, monkeypatch, model):
    folder = place / f"vectors-{model}"
    run("recommend.py", f"runs/{model}-shop-0", "--export", folder, cwd=place)
    users = load_tensors(folder / "users.safetensors")[0]["vectors"]
    items = load_tensors(folder / "items.safetensors")[0]["vectors"]
    about = json.loads((folder / "about.json").read_text())
    run_of, trained = opened(place, model, monkeypatch)
    keys = [item["key"] for item in run_of.dataset.items[1:]]
    assert (folder / "items.txt").read_text().split() == keys
    assert (folder / "users.txt").read_text().split() == recommend.keys_of_users(run_of.dataset)
    assert items.shape == (about["items"], about["width"]) == (30, users.shape[1])
    assert len(users) == about["users"]
    for row, (_, history) in zip(users, histories(run_of.dataset)):
        scores = plain_scores(run_of, trained, history)[1:]
        shift = scores - items @ row    # the same for every item
        if model == "digest":    # which has learned what it is worth to have an item
            shift = shift[~torch.isin(torch.arange(1, 31), torch.tensor(history))]
        assert shift.max() - shift.min() < 1e-4


def test_a_model_without_products_cannot_be_exported(place, monkeypatch):
    run_of, trained = opened(place, "sasrec", monkeypatch)
    monkeypatch.delattr(type(trained), "as_product")
    ranker = recommend.Ranker(trained, recommend.encoded(trained), 50, torch.device("cpu"))
    with pytest.raises(UserError, match="as_product"):
        recommend.export(place / "none", run_of, ranker)
    assert not (place / "none").exists()


# ---------------- the page

def test_the_page_is_one_file_without_scripts(place):
    run("recommend.py", "runs/sasrec-shop-0", "--history", "i3,i1", "--top", 30, "--html", "a.html",
        cwd=place)
    page = (place / "a.html").read_text()
    assert "<figcaption>2 &lt; 3 &amp; co<" in page
    assert "<script" not in page
    assert page.count("<figure") == 2 + 28
    assert page.count("data:image/jpeg") == 20    # the items with pictures
    assert 'name="viewport"' in page
    assert "http" not in page


# ---------------- items that were not trained on

def new_items(place, *rows, name="more.jsonl"):
    (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.mark.parametrize("run_of", ["runs/fmmsrec-shop-0", "runs/mmsr-shop-0",
                                    "content/msm4sr-shop-0", "runs/cosine-shop-0"])
def test_new_items_are_recommended_by_their_content(place, run_of):
    """A new item with the words and the picture of an old one scores as the old one does."""
    old = json.loads((place / "shop" / "items.jsonl").read_text().splitlines()[7])
    twin = {"item": "twin", "title": old["title"], "images": ["shop/7.png"], "language": "en"}
    more = new_items(place, twin, {"item": "other", "title": "a red lamp"})
    done = run("recommend.py", run_of, "--history", "i1,i2", "--items", more, "--top", 40, "--json",
               cwd=place)
    scores = {row["item"]: row["score"] for row in json.loads(done.stdout)["items"]}
    assert len(scores) == 30
    assert scores["twin"] == pytest.approx(scores["i7"], abs=1e-4)
    assert "other" in scores
    done = run("recommend.py", run_of, "--history", "twin", "--items", more, "--top", 40, "--json",
               cwd=place)
    of_twin = {row["item"]: row["score"] for row in json.loads(done.stdout)["items"]}
    assert "twin" not in of_twin
    assert "i7" in of_twin


def test_new_items_of_a_model_that_needs_no_weights_for_them(place):
    """The others' scores stay as they are."""
    more = new_items(place, {"item": "fresh", "title": "a red lamp"})
    lists = []
    for flags in ((), ("--items", more)):
        done = run("recommend.py", "runs/digest-shop-0", "--history", "i1,i2", "--top", 40,
                   "--json", *flags, cwd=place)
        lists.append({row["item"]: row["score"] for row in json.loads(done.stdout)["items"]})
    before, after = lists
    assert after.keys() - before.keys() == {"fresh"}
    assert {key: after[key] for key in before} == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("model", ["sasrec", "mdsrec", "srmml", "msm4sr"])
def test_models_with_weights_of_items_refuse_new_ones(place, model):
    more = new_items(place, {"item": "new", "title": "a red lamp"})
    done = run("recommend.py", f"runs/{model}-shop-0", "--history", "i1", "--items", more,
               cwd=place, ok=False)
    refused(done, f"{model} learned weights for each item", "--use_id false")


@pytest.mark.parametrize("rows, words", [
    ([{"item": "i3", "title": "again"}], ("describes 1 items that shop has", "i3")),
    ([], ("describes no item",)),
])
def test_wrong_new_items(place, rows, words):
    more = new_items(place, *rows, name="wrong.jsonl")
    done = run("recommend.py", "runs/fmmsrec-shop-0", "--history", "i1", "--items", more,
               cwd=place, ok=False)
    refused(done, *words)


# ---------------- what is refused

@pytest.mark.parametrize("flags, words", [
    (("--user", "nobody"), ("--user nobody", "60 users of shop", "u0")),
    (("--history", "i1,lamp,i99"), ("2 of 3 keys", "lamp, i99", "i0")),
    (("--history", ""), ("--history is empty",)),
    (("--history", " , "), ("--history is empty",)),
    (("--user", "u1", "--top", 0), ("--top 0",)),
    (("--all",), ("--all needs a file",)),
    (("--user", "u1", "--out", "a.csv"), ("--out is the file of --all",)),
    (("--all", "--out", "a.csv", "--json"), ("--json shows one user",)),
    (("--user", "u1", "--items", "none.jsonl"), ("none.jsonl is no file",)),
    ((), ("one of the arguments --user --history --all --export is required",)),
    (("--user", "u1", "--all"), ("not allowed with argument",)),
])
def test_what_makes_no_sense_is_refused(place, flags, words):
    done = run("recommend.py", "runs/sasrec-shop-0", *flags, cwd=place, ok=False)
    refused(done, *words)


def test_a_folder_without_a_run(place):
    refused(run("recommend.py", "shop", "--user", "u1", cwd=place, ok=False), "no finished run")


def test_keys_with_commas_and_quotes(tmp_path):
    rows = ["user,item,time"]
    keys = ['a, "b"', "c", "d,e", "f"]
    for user in range(12):
        for time in range(4):
            key = keys[(user + time) % 4].replace('"', '""')
            rows.append(f'u{user},"{key}",{1_500_000_000 + time}')
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "interactions.csv").write_text("\n".join(rows) + "\n")
    run("train.py", "--model", "pop", "--data", "odd", cwd=tmp_path)
    done = run("recommend.py", "runs/pop-odd-0", "--history", '"a, ""b""", "d,e"', "--json",
               cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["history"] == ['a, "b"', "d,e"]
    assert sorted(row["item"] for row in found["items"]) == ["c", "f"]
    run("recommend.py", "runs/pop-odd-0", "--all", "--keep_history", "--out", "top.csv",
        cwd=tmp_path)
    with open(tmp_path / "top.csv", newline="") as file:
        assert {row["item"] for row in csv.DictReader(file)} == set(keys)


def test_a_run_of_changed_data_is_refused(tmp_path):
    write_shop(tmp_path / "shop")
    run("train.py", "--model", "pop", "--data", "shop", cwd=tmp_path)
    write_shop(tmp_path / "shop", seed=1)
    run("data.py", "shop", cwd=tmp_path)
    done = run("recommend.py", "runs/pop-shop-0", "--user", "u1", cwd=tmp_path, ok=False)
    refused(done, "trained on other data")


def test_a_model_file_that_is_gone_is_named(tmp_path):
    write_shop(tmp_path / "shop")
    mine = tmp_path / "mine.py"
    mine.write_text((Path(recommend.__file__).parent / "models" / "pop.py").read_text())
    run("train.py", "--model", "mine.py", "--data", "shop", cwd=tmp_path)
    mine.unlink()
    done = run("recommend.py", "runs/mine-shop-0", "--user", "u1", cwd=tmp_path, ok=False)
    refused(done, "mine.py")


# ---------------- what is in the way, and what is not used

def test_what_is_in_the_way_is_kept(place):
    (place / "mine.csv").write_text("mine")
    done = run("recommend.py", "runs/pop-shop-0", "--all", "--out", "mine.csv", "--top", 99,
               cwd=place)
    assert (place / "mine.csv~1").read_text() == "mine"
    assert "there are 30 items, less than --top" in done.stdout
    (place / "full").mkdir()
    (place / "full" / "items.txt").write_text("mine")
    done = run("recommend.py", "runs/pop-shop-0", "--export", "full", cwd=place, ok=False)
    refused(done, "has other files")


def test_pictures_of_new_items_for_a_model_that_saw_none(place):
    write_shop(place / "blind")
    run("train.py", "--model", "fmmsrec", "--data", "blind", "--heads", 2, *FLAGS["fmmsrec"],
        cwd=place)
    more = new_items(place, {"item": "p1", "title": "red", "images": ["shop/1.png", "gone.png"]})
    done = run("recommend.py", "runs/fmmsrec-blind-0", "--history", "i1", "--items", more,
               cwd=place)
    assert "the images of more.jsonl are not used" in done.stderr
    assert "1 of 2 picture paths of the items are not on disk" in done.stderr


@pytest.mark.parametrize("model, noted", [
    ("mmsr", True), ("msm4sr", True), ("fmmsrec", True), ("sasrec", False),
])
def test_items_without_text_and_picture_are_named(place, model, noted, monkeypatch):
    run_of, _ = opened(place, model, monkeypatch)
    run_of.dataset.set_has("text", np.zeros(31, bool))
    run_of.dataset.set_has("image", np.arange(31) == 1)
    note = recommend.note_of_unknown(run_of, [1, 5])
    assert ("1 of 2 items have neither text nor picture: i" in note) == noted


def test_a_history_of_everything(place):
    keys = ",".join(f"i{i}" for i in range(30))
    done = run("recommend.py", "runs/pop-shop-0", "--history", keys, cwd=place)
    assert "nothing is left to recommend" in done.stdout


def test_damaged_keys_of_users_are_named(tmp_path):
    write_shop(tmp_path / "shop")
    run("train.py", "--model", "pop", "--data", "shop", cwd=tmp_path)
    users = tmp_path / "data" / "shop" / "users.txt"
    for damage in (b"u0\nu1\n", b"\xff\xfe"):
        users.write_bytes(damage)
        done = run("recommend.py", "runs/pop-shop-0", "--user", "u1", cwd=tmp_path, ok=False)
        refused(done, "users.txt", "prepare the data again")


def test_lists_in_json_can_be_written_in_any_letters(monkeypatch):
    said = []
    for encoding in ("cp1252", "utf-8"):
        monkeypatch.setattr(recommend.sys, "stdout", SimpleNamespace(encoding=encoding))
        said.append(recommend.in_json({"item": "\u4e59"}))
    assert said == ['{\n "item": "\\u4e59"\n}', '{\n "item": "\u4e59"\n}']
