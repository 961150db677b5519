"""One table of many runs: what is one row, what a row says, and several models at once."""
import json
import re
import shutil

import numpy as np
import pytest

from common.files import UserError
from common.statistics import gain, holm, p_value
from evaluate import metrics
from helpers import ROOT, refused, run, write_shop
from loop import comparison

ONCE = ("--epochs", 1)


def write_run(folder, ranks, model="sasrec", seed=0, cold=None, **settings):
    """A finished run, as far as a table reads it."""
    folder.mkdir(parents=True)
    config = {"dim": settings.pop("dim", 8)}
    about = {"model": model, "seed": seed, "split": "leave-one-out", "cut": None, "data": "/x",
             "sequences_sha256": "abc", "config": config, **settings}
    (folder / "config.json").write_text(json.dumps(about))
    groups = {"warm": metrics(ranks)} | ({"cold": metrics(cold)} if cold is not None else {})
    numbers = {"test": metrics(ranks), "test_masked": metrics(np.maximum(np.array(ranks) - 1, 0)),
               "groups": groups, "best_epoch": 3, "seconds": 2. + seed, "parameters": 100}
    (folder / "metrics.json").write_text(json.dumps(numbers))
    np.save(folder / "ranks-test.npy", np.array(ranks))
    np.save(folder / "ranks-test-masked.npy", np.maximum(np.array(ranks) - 1, 0))
    return folder


@pytest.fixture
def ranks():
    rng = np.random.default_rng(0)
    return {
        ("sasrec", 0): rng.geometric(.05, 200), ("sasrec", 1): rng.geometric(.05, 200),
        ("mdsrec", 0): rng.geometric(.2, 200), ("mdsrec", 1): rng.geometric(.2, 200),
        ("pop", 0): rng.geometric(.05, 200),
    }


@pytest.fixture
def folders(tmp_path, ranks):
    return [
        write_run(tmp_path / f"{model}-shop-{seed}", these, model, seed, cold=these[:5])
        for (model, seed), these in ranks.items()
    ]


def test_a_row_is_a_model_with_all_its_seeds(folders, ranks):
    found = comparison.compare(comparison.rows_of(folders))
    assert list(found) == ["sasrec", "mdsrec", "pop"]
    assert found["sasrec"]["seeds"] == [0, 1]
    each = [metrics(ranks["sasrec", seed])["ndcg@10"] for seed in (0, 1)]
    assert found["sasrec"]["N@10"] == (np.mean(each), pytest.approx(np.std(each, ddof=1)))
    assert found["sasrec"]["seconds"] == 2.5
    assert found["mdsrec"]["cold R@10"][0] == pytest.approx(np.mean(
        [metrics(ranks["mdsrec", seed][:5])["recall@10"] for seed in (0, 1)]
    ))


def test_differences_are_of_each_users_mean_over_seeds(folders, ranks):
    found = comparison.compare(comparison.rows_of(folders))
    assert "against" not in found["sasrec"]
    first = (gain(ranks["sasrec", 0]) + gain(ranks["sasrec", 1])) / 2
    second = (gain(ranks["mdsrec", 0]) + gain(ranks["mdsrec", 1])) / 2
    against = found["mdsrec"]["against"]
    assert against["first"] == "sasrec"
    assert against["difference"] == pytest.approx((second - first).mean())
    assert against["p"] == p_value(second - first)
    assert against["low"] < against["difference"] < against["high"]
    both = [against["p"], found["pop"]["against"]["p"]]
    assert [against["p_holm"], found["pop"]["against"]["p_holm"]] == holm(both)
    assert against["p_holm"] < .001 < found["pop"]["against"]["p_holm"]


def test_differences_of_masked_ranks_are_a_column_of_their_own(folders, ranks):
    found = comparison.compare(comparison.rows_of(folders))
    each = {key: gain(np.maximum(these - 1, 0)) for key, these in ranks.items()}
    first = (each["sasrec", 0] + each["sasrec", 1]) / 2
    second = (each["mdsrec", 0] + each["mdsrec", 1]) / 2
    masked = found["mdsrec"]["against_masked"]
    assert masked["difference"] == pytest.approx((second - first).mean())
    assert masked["difference"] != found["mdsrec"]["against"]["difference"]
    assert masked["p"] == p_value(second - first)


def test_runs_of_before_masked_ranks_were_kept_are_compared_without(folders):
    (folders[3] / "ranks-test-masked.npy").unlink()
    found = comparison.compare(comparison.rows_of(folders))
    assert not any("against_masked" in row for row in found.values())
    assert comparison.markdown(found).splitlines()[0].endswith("| N@10 against sasrec | p (Holm) |")


def test_the_table_as_it_is_printed(folders):
    text = comparison.markdown(comparison.compare(comparison.rows_of(folders)))
    head, line, *rows = text.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert {len(row) for row in cells} == {15} == {line.count("---")}
    assert cells[0][-4::2] == ["N@10 against sasrec", "masked N@10 against sasrec"]
    assert cells[0][-3::2] == ["p (Holm)", "p (Holm)"]
    assert [row[0] for row in cells[1:]] == ["sasrec", "mdsrec", "pop"]
    assert re.fullmatch(r"\.\d{4} ± \.\d{4}", cells[1][1])
    assert re.fullmatch(r"\.\d{4}", cells[3][1])    # one seed has no spread
    assert cells[1][-4:] == ["", "", "", ""]
    assert re.fullmatch(r"\+\.\d{4} \(\+\.\d{4} to \+\.\d{4}\)", cells[2][-4])


def test_rows_of_one_model_say_what_sets_them_apart(tmp_path, ranks):
    runs = [
        write_run(tmp_path / "a" / "sasrec-shop-0", ranks["sasrec", 0], dim=8),
        write_run(tmp_path / "b" / "sasrec-shop-0", ranks["sasrec", 1], dim=64),
        write_run(tmp_path / "c" / "sasrec-shop-0", ranks["sasrec", 1], text="hash"),
    ]
    assert list(comparison.rows_of(runs)) == ["sasrec", "sasrec, dim 64", "sasrec, text hash"]


def test_seeds_of_one_row_may_be_made_with_different_files(tmp_path, ranks):
    runs = [write_run(tmp_path / str(seed), ranks["sasrec", seed], seed=seed,
                      made_with={"code": str(seed)}) for seed in (0, 1)]
    assert [len(row) for row in comparison.rows_of(runs).values()] == [2]


def test_ranks_of_another_run_are_refused(folders):
    shutil.copy(folders[2] / "ranks-test.npy", folders[0])
    with pytest.raises(UserError, match="do not give the numbers of metrics.json"):
        comparison.compare(comparison.rows_of(folders))


@pytest.mark.parametrize("other", [
    {"sequences_sha256": "xyz"}, {"split": "temporal"}, {"cut": "2022-09-15"},
])
def test_runs_on_other_data_are_refused(tmp_path, ranks, other):
    one = write_run(tmp_path / "one", ranks["sasrec", 0])
    two = write_run(tmp_path / "two", ranks["sasrec", 1], **other)
    with pytest.raises(UserError, match="different data or splits"):
        comparison.rows_of([one, two])


def test_runs_of_other_users_are_refused(tmp_path, ranks):
    one = write_run(tmp_path / "one", ranks["sasrec", 0])
    two = write_run(tmp_path / "two", ranks["mdsrec", 0][:99], model="mdsrec")
    with pytest.raises(UserError, match="rank 99 and 200 users"):
        comparison.compare(comparison.rows_of([one, two]))


# ---------------- the commands

def test_several_models_make_one_table_and_finished_runs_are_kept(tmp_path):
    write_shop(tmp_path / "shop")
    command = ("train.py", "--model", "pop,sasrec", "--data", "shop", "--seeds", "0,1")
    first = run(*command, cwd=tmp_path)
    trained = (tmp_path / "runs/sasrec-shop-1/model.safetensors").stat().st_mtime_ns
    assert "is finished" not in first.stdout
    shutil.rmtree(tmp_path / "runs/sasrec-shop-0")
    again = run(*command, cwd=tmp_path)
    assert again.stdout.count("is finished") == 3
    assert (tmp_path / "runs/sasrec-shop-1/model.safetensors").stat().st_mtime_ns == trained
    table = (tmp_path / "runs/table-shop.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == ["pop", "sasrec"]
    assert table.splitlines()[3] in again.stdout
    numbers = json.loads((tmp_path / "runs/table-shop.json").read_text())
    assert numbers["sasrec"]["against"]["first"] == "pop"
    printed = run("evaluate.py", *sorted((tmp_path / "runs").iterdir()), cwd=tmp_path).stdout
    assert table.splitlines()[3] in printed    # the table's own files are no runs


@pytest.mark.parametrize("flags", [("--dim", 8), ("--epochs", 2)])
def test_a_run_with_other_settings_is_trained_anew(tmp_path, flags):
    write_shop(tmp_path / "shop")
    run("train.py", "--model", "sasrec", "--data", "shop", *ONCE, cwd=tmp_path)
    command = ("train.py", "--model", "pop,sasrec", "--data", "shop", *ONCE)
    done = run(*command, *flags, cwd=tmp_path)
    assert "is finished" not in done.stdout
    assert (tmp_path / "runs/sasrec-shop-0~1/metrics.json").is_file()


def test_a_run_of_another_model_file_or_of_other_features_is_trained_anew(tmp_path):
    write_shop(tmp_path / "shop")
    shutil.copy(ROOT / "models" / "digest.py", tmp_path / "mine.py")
    run("train.py", "--model", "pop", "--data", "shop", cwd=tmp_path)
    items = (tmp_path / "data" / "shop" / "items.jsonl").read_text().splitlines()
    vectors = np.random.default_rng(0).normal(size=(len(items), 4))
    np.save(tmp_path / "v.npy", vectors)
    command = ("train.py", "--model", "pop,mine.py", "--data", "shop", "--text", "v.npy", "--image",
               "pixels", "--modality", "text", *ONCE)
    run(*command, cwd=tmp_path)
    assert run(*command, cwd=tmp_path).stdout.count("is finished") == 2
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# changed\n")
    again = run(*command, cwd=tmp_path).stdout
    assert again.count("is finished") == 1
    assert "an earlier run is now runs/mine-shop-0~1" in again
    np.save(tmp_path / "v.npy", 2 * vectors[::-1])
    again = run(*command, cwd=tmp_path).stdout
    assert again.count("is finished") == 1
    assert "an earlier run is now runs/mine-shop-0~2" in again


def test_a_run_that_goes_on_says_what_has_changed_since(tmp_path):
    write_shop(tmp_path / "shop")
    shutil.copy(ROOT / "models" / "sasrec.py", tmp_path / "mine.py")
    command = ("train.py", "--model", "mine.py", "--data", "shop", "--resume")
    run(*command, *ONCE, cwd=tmp_path)
    assert "was begun with another" not in run(*command, "--epochs", 2, cwd=tmp_path).stdout
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# changed\n")
    done = run(*command, "--epochs", 3, cwd=tmp_path).stdout
    assert "note: runs/mine-shop-0 was begun with another code (made_with" in done
    config = tmp_path / "runs/mine-shop-0/config.json"
    about = json.loads(config.read_text())
    del about["made_with"]
    config.write_text(json.dumps(about))
    done = run(*command, "--epochs", 4, cwd=tmp_path).stdout
    assert "was begun with another version of this project" in done


@pytest.mark.parametrize("models, words", [
    ("sasrec,sasrec", ("names two models of one name",)),
    ("sasrec,nobody", ("--model nobody is unknown",)),
])
def test_wrong_models_are_refused(tmp_path, models, words):
    write_shop(tmp_path / "shop")
    done = run("train.py", "--model", models, "--data", "shop", *ONCE, cwd=tmp_path, ok=False)
    refused(done, *words)


def test_a_table_needs_finished_runs(tmp_path, folders):
    (folders[1] / "metrics.json").unlink()
    done = run("evaluate.py", *folders, cwd=tmp_path, ok=False)
    refused(done, "sasrec-shop-1 holds no finished run", "--resume")


def test_a_file_in_the_way_of_a_table_is_kept_whatever_it_holds(tmp_path, folders):
    (tmp_path / "tab.md").write_bytes(b"\xff\xfe")
    run("evaluate.py", *folders, "--out", "tab", cwd=tmp_path)
    assert (tmp_path / "tab.md~1").read_bytes() == b"\xff\xfe"


# ---------------- a page of two runs

def test_a_page_of_one_run_against_another(tmp_path):
    write_shop(tmp_path / "shop")
    run("train.py", "--model", "pop,sasrec", "--data", "shop", cwd=tmp_path)
    done = run("evaluate.py", "runs/sasrec-shop-0", "--against", "runs/pop-shop-0", cwd=tmp_path)
    page = (tmp_path / "runs/sasrec-shop-0/against-pop-shop-0.html").read_text()
    assert "NDCG@10 of sasrec-shop-0 minus pop-shop-0: " in done.stdout
    assert re.search(r"minus pop-shop-0: ([+-][.\d]+)", done.stdout)[1] in page
    assert "<script" not in page
    ours, theirs = (np.load(tmp_path / f"runs/{model}-shop-0/ranks-test.npy")
                    for model in ("sasrec", "pop"))
    shown = [(int(a) - 1, int(b) - 1) for a, b in re.findall(
        r"sasrec-shop-0: rank (\d+)</h3>.*?pop-shop-0: rank (\d+)</h3>", page, re.DOTALL)]
    assert len(shown) == 12
    assert set(shown) <= set(zip(ours.tolist(), theirs.tolist()))
    gaps = np.log2(theirs + 1.) - np.log2(ours + 1.)
    first = np.log2(shown[0][1] + 1.) - np.log2(shown[0][0] + 1.)
    assert first == pytest.approx(gaps.max())
    numbers = json.loads((tmp_path / "runs/sasrec-shop-0/metrics.json").read_text())
    assert f"{numbers['groups_masked']['warm']['ndcg@10']:.4f}</text>" in page


def test_a_page_of_two_needs_one_run_first(tmp_path, folders):
    done = run("evaluate.py", *folders[:2], "--against", folders[2], cwd=tmp_path, ok=False)
    refused(done, "--against compares one run with another")


# ---------------- what is refused or said

def test_models_of_one_name_and_flags_of_one_alone_are_refused_before_training(tmp_path):
    write_shop(tmp_path / "shop")
    (tmp_path / "pop.py").write_text("")
    done = run("train.py", "--model", "pop.py,pop", "--data", "shop", cwd=tmp_path, ok=False)
    refused(done, "two models of one name")
    done = run("train.py", "--model", "pop,sasrec", "--data", "shop", "--use_ica", "true",
               cwd=tmp_path, ok=False)
    refused(done, "--use_ica")
    assert not (tmp_path / "runs").exists()
    run("train.py", "--model", "pop,", "--data", "shop", cwd=tmp_path)


def test_the_same_run_twice_and_one_seed_twice(tmp_path, ranks):
    one = write_run(tmp_path / "one", ranks["sasrec", 0])
    same = write_run(tmp_path / "one~1", ranks["sasrec", 1])
    assert len(comparison.rows_of([one, one])["sasrec"]) == 1
    with pytest.raises(UserError, match="one seed with the same settings"):
        comparison.rows_of([one, same])
    other = write_run(tmp_path / "two", ranks["sasrec", 1], model_file="/x/sasrec.py")
    assert len(comparison.rows_of([one, other])) == 2


@pytest.mark.parametrize("file, content, words", [
    ("ranks-test.npy", "broken", ("ranks-test.npy cannot be read", "leave it out")),
    ("ranks-test-masked.npy", "broken", ("ranks-test-masked.npy cannot be read",)),
    ("metrics.json", "{}", ("metrics.json of no run",)),
    ("config.json", "{}", ("config.json of no run",)),
    ("config.json", "[]", ("config.json of no run",)),
])
def test_damaged_runs_are_named(tmp_path, folders, file, content, words):
    (folders[1] / file).write_text(content)
    refused(run("evaluate.py", *folders, cwd=tmp_path, ok=False), *words)


@pytest.mark.parametrize("flags, words", [
    (("--against",), ("is the run itself",)),
    (("--out", "table"), ("--out names the table of several runs",)),
])
def test_flags_that_make_no_sense_for_one_run(tmp_path, folders, flags, words):
    more = (folders[0],) if flags == ("--against",) else ()
    refused(run("evaluate.py", folders[0], *flags, *more, cwd=tmp_path, ok=False), *words)


def test_an_earlier_table_is_kept(tmp_path, folders):
    run("evaluate.py", *folders[:2], "--out", "table", cwd=tmp_path)
    done = run("evaluate.py", *folders, "--out", "table", "--device", "cpu", cwd=tmp_path)
    assert (tmp_path / "table.md~1").is_file()
    assert "an earlier table.md is now table.md~1" in done.stdout
    assert "--device is not used" in done.stdout
