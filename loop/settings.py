"""Config <-> command line: model files, the contract they keep, and the flags of train.py.

The command line of `--model mdsrec` is built from the fields of that file's Config, whose comments
are the help texts; PRESETS of the file change defaults per data set, flags change both.
"""
import argparse
import dataclasses
import importlib.util
import inspect
import math
import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

import extract_features
from common.features import KEYS
from common.files import UserError, has_form

FOLDER = Path(__file__).resolve().parents[1] / "models"
MODELS = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


# ---------------- model files

def load_model_file(name):
    """models/<name>.py, or any file given by its path -> module that keeps the contract.

    Raises UserError.
    """
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file():
        raise UserError(
            f"--model {name} is unknown: give one of {', '.join(MODELS)}, or the path of a model "
            f"file"
        )
    spec = importlib.util.spec_from_file_location(f"models.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module    # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:    # somebody's file can fail in any way
        line = getattr(error, "lineno", None) or line_in(error, path)
        raise UserError(
            f"{path} cannot be imported, {type(error).__name__} in line {line}: {error}"
        ) from None
    check_contract(module, path)
    return module


def line_in(error, path):
    """The last line of a file that an exception passed through."""
    lines = [0]
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[-1]


# ---------------- the contract of models/README.md

CATALOG_KEYS = (
    "n_items", "text", "image", "has_text", "has_image", "sentences", "sentences_mask", "pictures",
    "pictures_mask", "lang", "train_seqs", "titles", "image_paths",
)
METHODS = ("__init__", "forward", "encode_items", "score")
RECIPE = {    # what training needs of a Config: all of it, or nothing where nothing is trained
    "lr": float,
    "weight_decay": float,
    "batch_size": int,
    "epochs": int,
    "patience": int,
    "prefixes": bool,
}
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = {         # factor of the learning rate at a share of all epochs, 0 <= share < 1
    "constant": lambda share: 1.0,
    "step": lambda share: 1.0 if share < .8 else .1,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: .5 * (1 + math.cos(math.pi * share)),
}
ROWS = ("sequences", "prefixes", "items")    # what a Pretrain can be trained on


def check_contract(module, path):
    """Raises UserError, in one sentence, for everything that a model file lacks or has wrong."""
    faults = []
    for name in ("Config", "Model", "READS"):
        if not hasattr(module, name):
            faults.append(name)
    if hasattr(module, "READS"):
        faults += faults_of_reads(module.READS)
    if hasattr(module, "Config"):
        faults += faults_of_config(module)
    if hasattr(module, "Model"):
        faults += faults_of_class(module.Model, "Model", METHODS)
    if hasattr(module, "Pretrain"):
        faults += faults_of_pretrain(module)
    if faults:
        raise UserError(
            f"{path} lacks, or has in another form than the loop needs: {'; '.join(faults)}. "
            f"models/README.md says what a model file has"
        )


def faults_of_reads(reads):
    if isinstance(reads, str) or not isinstance(reads, (tuple, list)):
        return ['READS as a tuple of catalog keys, such as ("text",)']
    return [f"a catalog key {key}" for key in reads if key not in CATALOG_KEYS]


def faults_of_config(module):
    """Fields that are missing or that no flag can be made of, and wrong presets."""
    if not dataclasses.is_dataclass(module.Config):
        return ["Config as a dataclass"]
    fields = {field.name: field for field in dataclasses.fields(module.Config)}
    wanted = {"max_len": int}
    if fields.keys() & RECIPE.keys() or hasattr(module, "Pretrain"):
        wanted |= RECIPE
    if hasattr(module, "Pretrain"):
        wanted["pretrain_epochs"] = int
    faults = [f"Config.{name} ({kind.__name__})" for name, kind in wanted.items()
              if name not in fields]
    faults += faults_of_fields(module.Config, fields)
    presets = getattr(module, "PRESETS", {})
    if not has_form(presets, {str: dict}):
        return [*faults, "PRESETS as a dict of dicts"]
    for preset, values in presets.items():
        faults += [f"Config.{name}, which the preset {preset} sets" for name in values
                   if name not in fields]
    return faults


def faults_of_fields(config, fields):
    """Fields without default, of a type that no flag can have, or named like a flag."""
    try:
        hints = get_type_hints(config)
    except NameError as error:
        return [f"Config with types that exist ({error})"]
    flags = {action.dest for action in train_flags()._actions}
    choices = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    faults = []
    for name, field in fields.items():
        if field.default is dataclasses.MISSING:
            faults.append(f"Config.{name} with a default")
        elif field.default not in choices.get(name, [field.default]):
            faults.append(f"Config.{name} as one of {', '.join(choices[name])}")
        elif hints[name] in (int, float, str, bool) and not has_form(field.default, hints[name]):
            faults.append(f"Config.{name} with a default that is {hints[name].__name__}")
        if hints[name] not in (int, float, str, bool) and get_origin(hints[name]) is not Literal:
            faults.append(f"Config.{name} as int, float, str, bool or Literal")
        if name in flags:
            faults.append(f"another name for Config.{name}, which is a flag of train.py")
    return faults


def faults_of_class(kind, name, methods):
    """Methods that a class does not define."""
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        return [f"{name} as a class, a torch.nn.Module"]
    faults = [
        f"{name}.{method}" for method in methods
        if getattr(kind, method, None) in (None, getattr(nn.Module, method, None))
    ]
    try:
        inspect.signature(kind).bind("cfg", "catalog")
    except TypeError:
        faults.append(f"{name}.__init__ that takes cfg and catalog")
    return faults


def faults_of_pretrain(module):
    faults = faults_of_class(module.Pretrain, "Pretrain", ("__init__", "forward"))
    if getattr(module.Pretrain, "rows", None) not in ROWS:
        faults.append(f"Pretrain.rows as one of {', '.join(ROWS)}")
    if hasattr(module, "Model") and not hasattr(module.Model, "init_from"):
        faults.append("Model.init_from, which takes over the weights of Pretrain")
    return faults


def has_recipe(cfg) -> bool:
    """Whether a Config says how to train."""
    return hasattr(cfg, "lr")


# ---------------- the command line

def train_flags():
    """The flags of train.py that every model shares."""
    parser = argparse.ArgumentParser(
        description="Train and test one model on one data set.",
        epilog="With --model NAME --help, also the model's own settings.",
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--model", required=True,
        help=f"{', '.join(MODELS)}, or the path of a model file; several, A,B: one table")
    extract_features.add_arguments(parser)
    add("--seed", type=int, help="seed of weights, order and dropout (default: 0)")
    add("--seeds", help="several seeds, such as 0,1,2: prints mean and standard deviation as well")
    add("--mask_history", action="store_true", help="select the epoch by masked validation metrics")
    add("--valid_every", type=int, default=1, help="validate every so many epochs (default: 1)")
    add("--valid_users", type=int,
        help="select the epoch on so many validation users, drawn once (default: all)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--precision", choices=("bfloat16", "float32"), default="bfloat16",
        help="of a training step's products on a GPU; elsewhere they are in float32 (default: "
             "bfloat16)")
    add("--compile", action="store_true", help="torch.compile the training step")
    add("--pretrain_data", "--pretrain-data",
        help="pre-train on other data sets than --data, one or several: A,B")
    add("--cold_start", action="store_true",
        help="pre-train without cold items; with --use_id false as well, the whole setting")
    add("--init", help="start from the weights of another run's folder, instead of pre-training")
    add("--out", default="runs", help="folder for run folders (default: runs)")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    return parser


def one_per_model(argv) -> list:
    """The command lines of `--model A,B`, one for each model; of one model, the line itself.

    A setting that some of the models lack is given to the others, and a line says so; with --help
    the settings of all are shown. Raises UserError.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    given, rest = parser.parse_known_args(argv)
    names = [name.strip() for name in (given.model or "").split(",") if name.strip()]
    if not names:
        return [argv]
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        raise UserError(
            f"--model {given.model} names two models of one name, which would share a folder: give "
            f"each once, or rename a file"
        )
    if len(names) == 1:
        return [["--model", *names, *rest]]
    configs = {name: load_model_file(name).Config for name in names}
    if {"-h", "--help"} & set(rest):
        show_help(configs)
    return [["--model", name, *own] for name, own in zip(names, flags_of_each(configs, rest))]


def flags_of_each(configs, argv) -> list:
    """The flags of a command line that each of several models takes. configs: {model: Config}"""
    fields = {model: {field.name for field in dataclasses.fields(configs[model])}
              for model in configs}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in sorted(set().union(*fields.values())):
        parser.add_argument(f"--{name}")
    found, shared = parser.parse_known_args(argv)
    given = {name: value for name, value in vars(found).items() if value is not None}
    for name in given:
        lacking = [model for model in configs if name not in fields[model]]
        if lacking:
            print(f"note: --{name} is not used by {', '.join(lacking)}: no such setting")
    return [
        [*shared, *(f"--{name}={value}" for name, value in given.items() if name in own)]
        for own in fields.values()
    ]


def show_help(configs):
    """Print the shared flags, then the settings of each of several models; then end."""
    parser = train_flags()
    parser.add_argument("-h", "--help", action="help")
    parser.print_help()
    for name, config in configs.items():
        own = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
        add_settings(own.add_argument_group(f"settings of {name}"), config)
        print()
        own.print_help()
    sys.exit(0)


def parse(argv=None):
    """Command line -> (args, model module). Flags that are not known end with exit code 2."""
    parser = train_flags()
    parser.add_argument("-h", "--help", action="help")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    name = first.parse_known_args(argv)[0].model
    module = None
    if name is not None:
        module = load_model_file(name)
        add_settings(parser.add_argument_group(f"settings of {name}"), module.Config)
    args = parser.parse_args(argv)
    args.model = Path(name).stem
    args.model_file = str(Path(name).resolve()) if name.endswith(".py") else name
    return args, module


def add_settings(group, config):
    """One flag per field of a Config; the comment beside a field is its help text."""
    lines = inspect.getsource(config)
    comments = dict(re.findall(r"^ +(\w+):.*?# *(.+)$", lines, re.MULTILINE))
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        choices = get_args(kind) if get_origin(kind) is Literal else None
        if choices:
            kind = type(choices[0])
        text = f"{comments.get(field.name, '')} (default: {field.default})"
        group.add_argument(
            f"--{field.name}",
            type=boolean if kind is bool else kind,
            choices=choices,
            default=None,
            metavar=None if choices else "",
            help=text.replace("%", "%%"),
        )


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def wrong_values(config, values) -> list:
    """Names among those of some values of a Config whose value is of another type."""
    hints = get_type_hints(config)
    return [
        name for name, value in values.items()
        if name in hints and not fits_hint(value, hints[name])
    ]


def fits_hint(value, hint) -> bool:
    return value in get_args(hint) if get_origin(hint) is Literal else has_form(value, hint)


def configure(module, args, data_name, source=""):
    """Config: its defaults, changed by PRESETS for the data set or, where it has none, for its
    source (all demo shops share one), changed by flags.

    Raises UserError for a setting that makes no sense.
    """
    fields = [field.name for field in dataclasses.fields(module.Config)]
    presets = getattr(module, "PRESETS", {})
    preset = presets.get(data_name.removesuffix("-folder"), presets.get(source, {}))
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    used = ", ".join(f"{name} {value}" for name, value in preset.items() if name not in given)
    if used:
        print(f"settings for {data_name}: {used}")
    try:
        return module.Config(**{**preset, **given})
    except ValueError as error:
        flag = "--" if str(error).split()[0] in fields else ""
        raise UserError(f"{flag}{error}") from None


def seeds_of(args) -> list:
    """The seeds of --seeds, else the one of --seed. Raises UserError."""
    if args.seeds is None:
        if args.seed is None:
            return [0]
        if args.seed < 0:
            raise UserError(f"--seed {args.seed} must not be negative")
        if args.seed >= 2 ** 63:
            raise UserError(f"--seed {args.seed} must be below 2^63")
        return [args.seed]
    if args.seed is not None:
        raise UserError("give --seed or --seeds, not both")
    texts = args.seeds.split(",")
    if not all(text.strip().isdecimal() for text in texts):
        raise UserError(f"--seeds {args.seeds} is not a list of whole numbers such as 0,1,2")
    seeds = [int(text) for text in texts]
    if max(seeds) >= 2 ** 63:
        raise UserError(f"--seeds {args.seeds}: each must be below 2^63")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {args.seeds} names a seed twice: give each once")
    return seeds


def say_what_is_not_used(args, module):
    """Print a line for each flag that was given and changes nothing in this run."""
    for modality, keys in KEYS.items():
        encoder = getattr(args, modality)
        if modality == "text" and str(args.image).startswith("keywords:"):
            continue    # it reads the keywords
        if encoder and not set(module.READS) & set(keys):
            print(f"note: --{modality} {encoder} is not used: {args.model} does not read it")
    if args.split == "none":
        names = ("patience", "valid_users", "mask_history")
        given = [f"--{name}" for name in names if getattr(args, name, None)]
        given += ["--valid_every"] if args.valid_every > 1 else []
        if given:
            print(f"note: {' and '.join(given)} not used: under --split none no epoch is selected")


def check_counts(args, *names):
    """Raises UserError for a flag that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
