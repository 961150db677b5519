"""The command line of a model file: flags, presets, help."""
import pytest

from common.files import UserError
from helpers import refused, run
from loop import settings


def test_presets_and_flags():
    flags = ["--model", "mdsrec", "--data", "x", "--neighbors", "7", "--use_ica", "false"]
    args, module = settings.parse(flags)
    cfg = settings.configure(module, args, "baby-folder")
    assert (cfg.neighbors, cfg.centers, cfg.use_ica, cfg.use_cre) == (7, 32, False, True)


def test_a_preset_is_said_in_one_line(capsys):
    args, module = settings.parse(["--model", "mdsrec", "--data", "x", "--neighbors", "7"])
    settings.configure(module, args, "baby")
    assert capsys.readouterr().out == "settings for baby: centers 32\n"
    settings.configure(module, args, "unknown")
    assert capsys.readouterr().out == ""


def test_help_shows_every_setting_with_its_default(tmp_path):
    printed = run("train.py", "--model", "mdsrec", "--help", cwd=tmp_path).stdout
    words = " ".join(printed.split())
    for text in ("--neighbors", "H: 10 in general", "(default: 16.0)", "--mask_history"):
        assert text in words
    assert "sasrec" in run("train.py", "--help", cwd=tmp_path).stdout


def test_help_of_several_models_shows_the_settings_of_each(tmp_path):
    printed = run("train.py", "--model", "pop,sasrec,mdsrec", "--help", cwd=tmp_path).stdout
    parts = printed.split("settings of ")
    assert [part.split(":")[0] for part in parts[1:]] == ["pop", "sasrec", "mdsrec"]
    assert printed.count("--mask_history") == 2    # in the usage, and explained
    assert "--neighbors" in parts[3] and "--neighbors" not in parts[2]
    assert "--lr" in parts[2] and "--lr" in parts[3]


def test_each_of_several_models_takes_the_settings_that_it_has(capsys):
    shared = ["--data", "x", "--seed", "1"]
    flags = ["--model", "pop,sasrec,mdsrec", *shared[:2], "--epochs", "3", "--inner=7", *shared[2:]]
    assert settings.one_per_model(flags) == [
        ["--model", "pop", *shared],
        ["--model", "sasrec", *shared, "--epochs=3"],
        ["--model", "mdsrec", *shared, "--epochs=3", "--inner=7"],
    ]
    assert capsys.readouterr().out.splitlines() == [
        "note: --epochs is not used by pop: no such setting",
        "note: --inner is not used by pop, sasrec: no such setting",
    ]
    commands = [settings.parse(argv)[0] for argv in settings.one_per_model(flags)]
    assert [getattr(args, "epochs", None) for args in commands] == [None, 3, 3]


@pytest.mark.parametrize("flag", ["--epoch", "--neighbours"])
def test_a_setting_that_none_of_several_models_has_is_refused(tmp_path, flag):
    flags = ("--model", "pop,sasrec", "--data", "x", flag, "3")
    done = run("train.py", *flags, cwd=tmp_path, ok=False)
    refused(done, f"unrecognized arguments: {flag} 3")


def test_all_flags_are_written_with_underscores():
    hyphens = [flag for action in settings.train_flags()._actions
               for flag in action.option_strings if "-" in flag[2:]]
    assert hyphens == ["--pretrain-data"]    # the old spelling of --pretrain_data


def test_seeds():
    args, _ = settings.parse(["--model", "pop", "--data", "x", "--seeds", "0, 2,11"])
    assert settings.seeds_of(args) == [0, 2, 11]
    args.seeds = None
    assert settings.seeds_of(args) == [0]
    args.seeds = "-1,2"
    with pytest.raises(UserError, match="whole numbers"):
        settings.seeds_of(args)
