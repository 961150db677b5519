"""--pretrain_data, --cold_start and --init: which data and weights the first stage has."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from common.files import UserError, load_tensors, save_tensors
from evaluate import evaluate
from helpers import refused, run, write_shop
from loop.pretraining import join_catalogs, training_parts
from loop.runs import align_widths, open_run

CONTENT = ("--text", "hash", "--image", "pixels")
SMALL = (*CONTENT, "--dim", 16, "--epochs", 4, "--batch_size", 16)
PRETRAIN = ("--model", "msm4sr", *SMALL, "--pretrain_epochs", 2, "--layers", 1)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_pre_training_on_other_sets_and_starting_from_its_weights(shop, tmp_path):
    write_shop(tmp_path / "a", seed=1, items=20)
    write_shop(tmp_path / "b", seed=2, items=25)
    own = (*PRETRAIN, "--data", "shop", "--device", "cpu")    # a GPU adds in any order
    run("train.py", *own, "--pretrain_data", "a,b", "--out", "first", cwd=tmp_path)
    run("train.py", *own, "--init", "first/msm4sr-shop-0", "--out", "second", cwd=tmp_path)
    run("train.py", *own, "--out", "own", cwd=tmp_path)
    folders = {out: tmp_path / out / "msm4sr-shop-0" for out in ("first", "second", "own")}
    weights = {out: (f / "model.safetensors").read_bytes() for out, f in folders.items()}
    # the second stage by itself is the same to the bit
    assert weights["first"] == weights["second"] != weights["own"]
    assert not (folders["second"] / "pretrain.safetensors").exists()
    log = (folders["second"] / "log.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in log} == {"train"}


def test_no_epochs_of_pre_training_are_no_stage(shop, tmp_path):
    flags = (*PRETRAIN, "--pretrain_epochs", 0, "--epochs", 1)
    run("train.py", *flags, "--data", "shop", cwd=tmp_path)
    folder = tmp_path / "runs" / "msm4sr-shop-0"
    assert json.loads((folder / "log.jsonl").read_text())["stage"] == "train"
    assert not (folder / "pretrain.safetensors").exists()


def test_the_flags_old_spelling_still_works(shop, tmp_path):
    write_shop(tmp_path / "a", seed=1, items=20)
    run("train.py", *PRETRAIN, "--data", "shop", "--pretrain-data", "a", cwd=tmp_path)
    config = json.loads((tmp_path / "runs" / "msm4sr-shop-0" / "config.json").read_text())
    assert config["pretrain_data"] == "a"


def picture_shop(folder, **kwargs):
    write_shop(folder, **kwargs)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    with open(folder / "items.jsonl", "w") as file:
        for n, row in enumerate(rows):
            file.write(json.dumps(row | {"images": [("a.png", "b.png")[n % 2]]}) + "\n")


def test_pre_training_across_sets_with_and_without_pictures(shop, tmp_path):
    picture_shop(tmp_path / "seen", seed=1, items=20)
    write_shop(tmp_path / "blind", seed=2, items=25)

    def width(name):
        path = tmp_path / "runs" / f"msm4sr-{name}-0" / "model.safetensors"
        return load_tensors(path)[0]["m2se.encoders.image.W_k.weight"].shape[1]

    run("train.py", *PRETRAIN, "--data", "shop", "--pretrain_data", "seen", cwd=tmp_path)
    assert width("shop") > 1
    run("train.py", *PRETRAIN, "--data", "seen", "--pretrain_data", "blind, shop", cwd=tmp_path)
    assert width("seen") == width("shop")
    run("train.py", *PRETRAIN, "--data", "blind", "--pretrain_data", "shop", cwd=tmp_path)
    assert width("blind") == 1
    # shop has no pictures, its weights have: it is opened with the width in config.json
    folder = tmp_path / "runs" / "msm4sr-shop-0"
    opened = open_run(folder)
    again = evaluate(opened.model(), opened.dataset, opened.cfg, "test", opened.device)
    before = metrics_of(folder)["test"]
    assert before == {key: again[key] for key in before}
    init = ("--init", "runs/msm4sr-seen-0", "--out", "again")
    run("train.py", *PRETRAIN, "--data", "blind", *init, cwd=tmp_path)


def test_a_run_that_starts_from_itself(shop, tmp_path):
    run("train.py", *PRETRAIN, "--data", "shop", cwd=tmp_path)
    init = ("--init", "runs/msm4sr-shop-0")
    done = run("train.py", *PRETRAIN, "--data", "shop", *init, cwd=tmp_path)
    assert "runs/msm4sr-shop-0~1" in done.stdout


def test_weights_of_other_features_are_named(shop, tmp_path):
    run("train.py", *PRETRAIN, "--data", "shop", "--out", "first", cwd=tmp_path)
    config = tmp_path / "first" / "msm4sr-shop-0" / "config.json"
    assert json.loads(config.read_text())["encoders"] == {"text": "hash", "image": "pixels"}
    again = (*PRETRAIN, "--data", "shop", "--init", "first/msm4sr-shop-0")
    assert "was trained with" not in run("train.py", *again, cwd=tmp_path).stdout
    config.write_text(config.read_text().replace('"hash"', '"org/bert"'))
    warning = ("warning: first/msm4sr-shop-0 was trained with org/bert and pixels, this run has "
               "hash and pixels")
    assert warning in run("train.py", *again, cwd=tmp_path).stdout


@pytest.mark.parametrize("model", ["msm4sr", "fmmsrec"])
def test_cold_start_pre_trains_without_cold_items(model, shop, tmp_path, monkeypatch):
    seen = []
    train_epoch = train.train_epoch

    def watched(trainer, rows, rng, where):
        items = rows.users if isinstance(rows, data.ItemRows) else rows.flat
        seen.append(set(items.tolist()))
        return train_epoch(trainer, rows, rng, where)

    monkeypatch.setattr(train, "train_epoch", watched)
    no_ids = ("--use_id", "false") if model == "msm4sr" else ()
    flags = ("--data", "shop", "--cold_start", *no_ids)
    run("train.py", "--model", model, *PRETRAIN[2:], *flags, cwd=tmp_path)
    dataset = data.load(tmp_path / "shop", root=tmp_path / "data")
    cold = set(np.flatnonzero(dataset.train_counts < data.COLD)) - {0}
    everything = set(range(1, dataset.n_items + 1))
    assert cold
    assert not seen[0] & cold
    assert seen[0] | cold == everything == seen[-1]
    weights, _ = load_tensors(tmp_path / "runs" / f"{model}-shop-0" / "model.safetensors")
    assert not any("item" in name for name in weights)


@pytest.mark.parametrize("args, sentence", [
    (("--model", "msm4sr", "--init", "nowhere"), "--init nowhere holds no weights"),
    (("--model", "sasrec", "--init", "nowhere"), "--init means nothing"),
    (("--model", "msm4sr", "--init", "nowhere", "--cold_start"),
     "leave --pretrain_data and --cold_start out"),
    (("--model", "sasrec", "--cold_start"), "sasrec is not pre-trained"),
    ((*PRETRAIN, "--init", "narrow"), "does not fit msm4sr on shop"),
    ((*PRETRAIN, "--pretrain_epochs", "0", "--cold_start"), "0 is no pre-training"),
    ((*PRETRAIN, "--pretrain_epochs", "-1"), "--pretrain_epochs -1"),
    ((*PRETRAIN, "--experts", "0"), "--experts 0"),
    ((*PRETRAIN, "--data", "rare", "--cold_start"), "leave --cold_start out"),
    ((*PRETRAIN, "--pretrain_data", "rare,"), "is not a list of data sets"),
    ((*PRETRAIN, "--pretrain_data", "elsewhere"), "neither a folder nor a known data set"),
])
def test_bad_pre_training_is_one_sentence(shop, tmp_path, args, sentence):
    write_shop(tmp_path / "rare", users=20, items=90)
    (tmp_path / "narrow").mkdir()
    save_tensors(tmp_path / "narrow" / "pretrain.safetensors", {"x": torch.zeros(2)})
    done = run("train.py", "--data", "shop", *CONTENT, *args, cwd=tmp_path, ok=False)
    refused(done, sentence)


# ---------------- several sets as one

def two_sets(tmp_path, items):
    sets = []
    for n, name in enumerate("ab"):
        folder = write_shop(tmp_path / name, seed=n, items=items + n)
        sets.append(data.load(folder, root=tmp_path / "data"))
    return sets


def test_training_parts_of_several_sets_are_one(tmp_path):
    a, b = two_sets(tmp_path, items=40)
    joined = training_parts([a, b])
    expected = [seq for seq in a.train_seqs if seq]
    expected += [[40 + item for item in seq] for seq in b.train_seqs if seq]
    assert joined.train_seqs == expected
    assert joined.n_items == 81 and not joined.targets
    rows = joined.training_rows("sequences", 50)
    assert rows.lengths.sum() == sum(len(seq) - 1 for seq in expected)


def test_training_parts_without_cold_items(tmp_path):
    a, b = two_sets(tmp_path, items=40)
    joined, warm = training_parts([a, b]), training_parts([a, b], warm=True)
    counts = np.concatenate([a.train_counts, b.train_counts[1:]])
    kept = [[item for item in seq if counts[item] >= data.COLD] for seq in joined.train_seqs]
    assert sorted(warm.train_seqs) == sorted(seq for seq in kept if seq)
    assert 0 < warm.train_counts.sum() < joined.train_counts.sum()


def random_catalog(n, high, width):
    return {
        "n_items": n,
        "train_seqs": [],
        "sentences": torch.rand(n + 1, high, width),
        "sentences_mask": torch.ones(n + 1, high, dtype=torch.bool),
        "text": torch.rand(n + 1, width),
        "lang": torch.arange(n + 1),
        "titles": ["", *map(str, range(n))],
    }


def test_joined_catalogs(tmp_path):
    joined = training_parts(two_sets(tmp_path, items=20))
    a, b = random_catalog(20, 2, 4), random_catalog(21, 3, 4)
    whole = join_catalogs([a, b], joined)
    assert whole["n_items"] == 41
    assert whole["train_seqs"] == joined.train_seqs
    assert len(whole["titles"]) == 42 and whole["lang"].shape == (42,)
    assert torch.equal(whole["text"], torch.cat([a["text"], b["text"][1:]]))
    assert whole["sentences"].shape == (42, 3, 4)    # filled up to the highest
    assert torch.equal(whole["sentences"][:21, :2], a["sentences"])
    assert torch.equal(whole["sentences"][21:], b["sentences"][1:])
    assert not whole["sentences_mask"][:21, 2].any()


def test_a_set_without_texts_takes_the_width_of_the_other(tmp_path):
    a = random_catalog(20, 2, 4)
    none = random_catalog(21, 2, 1)
    none["sentences"] = torch.zeros(22, 1, 1)
    none["sentences_mask"] = torch.zeros(22, 1, dtype=torch.bool)
    none["text"] = torch.zeros(22, 1)
    align_widths([none, a])
    assert none["sentences"].shape == (22, 1, 4)
    assert none["text"].shape == (22, 4) and not none["text"].any()
    joined = training_parts(two_sets(tmp_path, items=20))
    assert join_catalogs([a, none], joined)["text"].shape == (42, 4)
    with pytest.raises(UserError, match=r"differ in width \(4, 5\)"):
        align_widths([a, random_catalog(21, 2, 5)])
