"""The command line of a model file: flags, presets, help."""
import pytest

from common.files import UserError
from helpers import run
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
