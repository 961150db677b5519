"""The loop, one for every model: `python train.py --model mdsrec --data demo`.

The command line is built from the fields of the model's Config (`--model mdsrec --help` shows each with its default);
PRESETS of the model file change defaults per data set, flags change both. What a run leaves behind is in
`runs/<model>-<data>-<seed>/`: config.json, log.jsonl, model.safetensors (best validation epoch), state.safetensors
(last epoch, for --resume), ranks-test.npy (rank of the target, one per test user), metrics.json, report.html.

Each epoch draws its random numbers from (seed, stage, epoch) alone, so a resumed run has no generator state to restore.
"""
import argparse
import dataclasses
import importlib.util
import inspect
import json
import random
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import torch
from tqdm import tqdm

import data as datasets
import evaluate as evaluation
import extract_features
from encoders import precision
from extract_features import pick_device
from sources.common import (UserError, alone_in, atomic, command, load_tensors, read_json, save_tensors, set_aside,
                            write_json)

HERE = Path(__file__).resolve().parent
MODELS = sorted(p.stem for p in (HERE / "models").glob("[a-z]*.py"))
SELECT = "ndcg@10"                       # the validation metric that chooses the epoch
COUNTS = ("dim", "inner", "heads", "layers", "max_len", "batch_size", "epochs", "patience")   # at least 1
CHECK_EVERY = 500                        # steps between two looks at the flag for bad steps, within long epochs
SCHEDULES = {                            # learning-rate factor at a share of all epochs, 0 <= share < 1
    "constant": lambda share: 1.0,
    "step": lambda share: 1.0 if share < .8 else .1,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: .5 * (1 + np.cos(np.pi * share)),
}


# ---------------------------------------------------------------- the command line

def load_model_file(name):
    """models/<name>.py, or any file given by its path -> module. Raises UserError."""
    path = Path(name) if name.endswith(".py") else HERE / "models" / f"{name}.py"
    if not path.is_file():
        raise UserError(f"--model {name} is unknown: give one of {', '.join(MODELS)}, or the path of a model file")
    spec = importlib.util.spec_from_file_location(f"models.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module      # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def common_arguments():
    parser = argparse.ArgumentParser(
        description="Train and test one model on one data set.", allow_abbrev=False, add_help=False,
        epilog="With --model NAME --help, also the model's own settings.")
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(MODELS)}, or the path of a model file")
    extract_features.add_arguments(parser)
    add("--seed", type=int, default=0, help="seed of weights, order and dropout (default: 0)")
    add("--seeds", help="several seeds, such as 0,1,2: runs each and prints mean and standard deviation")
    add("--mask_history", action="store_true", help="select the epoch by masked validation metrics")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--compile", action="store_true", help="torch.compile the training step")
    add("--clip_norm", type=float, default=5.0, help="largest gradient norm (default: 5)")
    add("--pretrain-data", help="pre-train on other data sets than --data, one or several: A,B")
    add("--cold_start", action="store_true", help="pre-train without cold items; --use_id false makes it the whole setting")
    add("--init", help="start from the pre-trained weights of another run's folder, instead of pre-training")
    add("--out", default="runs", help="folder for run folders (default: runs)")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    return parser


def parse(argv=None):
    """Command line -> (args, model module). Flags that are not known end with exit code 2."""
    parser = common_arguments()
    model = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    model.add_argument("--model")
    name = model.parse_known_args(argv)[0].model
    module = None if name is None else load_model_file(name)
    parser.add_argument("-h", "--help", action="help")
    if module:
        group = parser.add_argument_group(f"settings of {name}")
        comments = dict(re.findall(r"^ +(\w+):.*?# *(.+)$", inspect.getsource(module.Config), re.M))
        hints = get_type_hints(module.Config)
        for field in dataclasses.fields(module.Config):
            hint = hints[field.name]     # int, float, str, bool, or Literal["a", "b"] for a choice
            choices = get_args(hint) or None
            group.add_argument(f"--{field.name}", type=_boolean if hint is bool else str if choices else hint,
                               choices=choices, default=None, metavar=None if choices else "",
                               help=f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%"))
    args = parser.parse_args(argv)
    args.model, args.model_file = Path(name).stem, str(Path(name).resolve()) if name.endswith(".py") else name
    return args, module


def _boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def configure(module, args, data_name):
    """Config: its defaults, changed by PRESETS for the data set, changed by flags. Raises UserError for absurd numbers."""
    defaults = {f.name: f.default for f in dataclasses.fields(module.Config)}
    preset = getattr(module, "PRESETS", {}).get(data_name.removesuffix("-folder"), {})
    given = {n: getattr(args, n) for n in defaults if getattr(args, n) is not None}
    for name, value in given.items():
        if name in COUNTS and value < min(1, defaults[name]):
            raise UserError(f"--{name} {value} is too small: it must be at least 1")
        if (name in ("lr", "pretrain_lr", "encoder_lr") and not 0 < value < np.inf
                or name in ("weight_decay", "encoder_weight_decay", "pretrain_epochs") and not 0 <= value < np.inf
                or name == "dropout" and not 0 <= value < 1):
            raise UserError(f"--{name} {value} makes no sense: learning rates are above 0, dropout is from 0 to below "
                            f"1, the rest is not negative")
    if preset:
        print(f"settings for {data_name}: " + ", ".join(f"{k} {v}" for k, v in preset.items() if k not in given))
    return module.Config(**{**preset, **given})


# ---------------------------------------------------------------- building

def build_catalog(module, data, text, image, device):
    """The catalog dict with the keys that the model file READS, and no others (`n_items` always)."""
    if "image_paths" in module.READS:
        data.fetch_pictures()
    catalog = data.catalog(module.READS)
    for modality, keys in extract_features.KEYS.items():
        if set(module.READS) & set(keys):
            catalog |= extract_features.features(data, modality, text, image, device, module.READS)
    return catalog


def pretraining(args, module, cfg, data, catalog, device):
    """The data and catalog of the pre-training stage, and the weights of --init (else None), as one namespace.

    Data and catalog are those of the run, unless --pretrain-data or --cold_start say otherwise. Where only one side has
    a modality, the other's features get its width.
    """
    sets, catalogs, ours = [data], [catalog], encoders_of(module, cfg, data, args)
    elsewhere = args.pretrain_data is not None or args.cold_start
    why = f"{args.model} is not pre-trained" if not hasattr(module, "Pretrain") else \
        "--init takes over a pre-training that is done" if args.init else \
        "--pretrain_epochs 0 is no pre-training" if cfg.pretrain_epochs == 0 else None
    if elsewhere and why:
        raise UserError(f"{why}: leave --pretrain-data and --cold_start out")
    weights = None
    if args.init:
        weights, widths = load_pretrained(module, args.init, ours)
        datasets.align_widths([catalog], widths)
    if args.pretrain_data is not None:
        names = [name.strip() for name in args.pretrain_data.split(",")]
        if not all(names):
            raise UserError(f"--pretrain-data {args.pretrain_data!r} is not a list of data sets such as A or A,B")
        sets = [datasets.load(name, split=args.split, mirror=args.mirror) for name in names]
        for other in sets:
            if (theirs := encoders_of(module, cfg, other, args)) != ours:
                raise UserError(f"{other.name} has features of {' and '.join(theirs.values())}, {data.name} of "
                                f"{' and '.join(ours.values())}: give one --text and one --image encoder for both")
        catalogs = [build_catalog(module, other, args.text, args.image, device) for other in sets]
        datasets.align_widths([catalog, *catalogs])
    if elsewhere:
        data = datasets.training_parts(sets, args.cold_start)
        catalog = datasets.join_catalogs(catalogs, data)
    return SimpleNamespace(data=data, catalog=catalog, weights=weights)


def encoders_of(module, cfg, data, args):
    """{modality: encoder}, of the features that a model file READS, or of those that it trains itself."""
    named = extract_features.encoders(data, args.text, args.image)
    return {m: getattr(cfg, f"{m}_encoder", named[m]) for m, keys in extract_features.KEYS.items()
            if set(module.READS) & set(keys) or hasattr(cfg, f"{m}_encoder")}


def build(model_class, cfg, catalog, device, seed):
    """Seeded weights on the device. A setting the model refuses (ValueError) is the user's to mend: UserError."""
    seed_everything(seed)
    try:
        model = model_class(cfg, catalog).to(device)
        if hasattr(model, "prepare"):            # what it computes once, before its first step
            model.prepare(torch.device(device))
        return model
    except ValueError as e:
        raise UserError(f"{model_class.__name__} refuses its settings: {e}") from None


def seed_everything(*numbers):
    """Start Python's, numpy's and torch's generators from a few integers, such as (seed, stage, epoch)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def optimizer_of(model, cfg, lr):
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind = getattr(cfg, "optimizer", "adam")
    if kind not in kinds:
        raise UserError(f"--optimizer {kind} is unknown: give one of {', '.join(kinds)}")
    groups = (model.param_groups(cfg) if hasattr(model, "param_groups") else
              [{"params": [p for p in model.parameters() if p.requires_grad]}])
    # fused: one kernel for all weights, and it takes `found_inf`, by which a bad step is skipped on the device
    return kinds[kind](groups, lr=lr, weight_decay=cfg.weight_decay, fused=True)


def open_run(run, device=None):
    """A finished run folder -> (model with its best weights, data, cfg, device). Raises UserError."""
    if not (run / "model.safetensors").is_file():
        raise UserError(f"{run} holds no finished run (no model.safetensors): give a folder that train.py made")
    settings = read_json(run / "config.json")
    module, device = load_model_file(settings["model_file"]), pick_device(device)
    data = datasets.load(settings["data"], split=settings["split"], train_share=settings["train_share"])
    if data.about["sequences_sha256"] != settings["sequences_sha256"]:
        raise UserError(f"{run} was trained on other data than {data.folder} holds now: train it again")
    try:
        cfg = module.Config(**settings["config"])
    except TypeError as e:
        raise UserError(f"{run} was made by another version of the model ({e}): train it again") from None
    catalog = build_catalog(module, data, settings["text"], settings["image"], device)
    datasets.align_widths([catalog], settings.get("widths", {}))
    model = build(module.Model, cfg, catalog, device, settings["seed"])
    load_weights(model, run / "model.safetensors")
    return model, data, cfg, device


# ---------------------------------------------------------------- checkpoints

def load_weights(model, path):
    try:
        model.load_state_dict(load_tensors(path)[0])
    except RuntimeError as e:
        raise UserError(f"{path} holds other weights than the model has "
                        f"({str(e).splitlines()[-1].strip()}): train again") from None


def save_state(path, model, optimizer, progress):
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    save_tensors(path, tensors, progress)


def load_state(tensors, model, optimizer):
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---------------------------------------------------------------- the loop

class Watch:
    """Sums of the loss terms, and the first step whose loss or gradient is not finite, kept on the device: no sync."""

    def __init__(self, device):
        self.steps, self.names, self.users = 0, [], {}
        self.first_bad = torch.full((), -1, device=device)
        self.sums = self.norm = self.bad_terms = None

    def step(self, terms, norm, users):
        """0-d losses by name, the gradient norm -> 0-d float 1. where this step must be skipped, else 0."""
        values = torch.stack([t.detach().float() for t in terms.values()])
        finite = values.isfinite()
        bad = ~(finite.all() & norm.isfinite())
        if self.sums is None:
            self.names, self.sums = list(terms), torch.zeros_like(values)
            self.norm, self.bad_terms = torch.zeros_like(norm), torch.zeros_like(finite)
        new = bad & (self.first_bad < 0)
        self.first_bad = torch.where(new, self.steps, self.first_bad)
        self.norm, self.bad_terms = torch.where(new, norm, self.norm), torch.where(new, ~finite, self.bad_terms)
        self.sums = self.sums + torch.where(bad, 0, values)
        self.users[self.steps] = users
        self.steps += 1
        return bad.float()

    def check(self, where, lr):
        """Raises UserError for a bad step since the last check; the one wait for the device."""
        step = int(self.first_bad)
        if step >= 0:
            terms = [n for n, b in zip(self.names, self.bad_terms.tolist()) if b]
            raise UserError(
                f"training stopped at {where}, step {step}: {' '.join(['the loss', *terms]) if terms else 'the gradient'} "
                f"is not finite (learning rate {lr:g}, gradient norm {float(self.norm):g}, first users or items of the "
                f"batch {self.users[step][:5].tolist()}); the last good state is kept: look at those inputs or lower --lr")
        self.users = {}

    def means(self):
        return dict(zip(self.names, (self.sums / self.steps).tolist()))


class ItemRows:
    """The rows of a stage whose batches are items: each item once per epoch."""

    def __init__(self, items, device):
        self.users, self.device = items, device

    def __len__(self):
        return len(self.users)

    def epoch(self, batch_size, rng):
        """Yields ({"item": (B,) ids}, row numbers on the host)."""
        order = rng.permutation(len(self))
        on_device = torch.as_tensor(self.users[order], device=self.device)
        for first in range(0, len(order), batch_size):
            yield {"item": on_device[first:first + batch_size]}, order[first:first + batch_size]


def train_epoch(model, forward, optimizer, rows, batch_size, rng, clip_norm, device, where):
    """One pass over the rows; mean of each loss term by name. Raises UserError where a loss is not finite."""
    model.train()
    watch = Watch(device)
    weights = [p for g in optimizer.param_groups for p in g["params"]]
    steps = tqdm(rows.epoch(batch_size, rng), desc=where, unit=" steps", leave=False, disable=None,
                 total=-(-len(rows) // batch_size))
    for batch, index in steps:
        with precision(device):
            terms = forward(batch)
            loss = sum(terms.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, clip_norm, foreach=True)
        optimizer.found_inf = watch.step(terms, norm, rows.users[index])
        optimizer.step()
        if watch.steps % CHECK_EVERY == 0:
            watch.check(where, optimizer.param_groups[0]["lr"])
    watch.check(where, optimizer.param_groups[0]["lr"])
    return watch.means()


def train_stage(model, stage, cfg, data, args, device, run, resume):
    """Train one stage to its end. stage: name, number, rows, epochs, lr, and whether validation chooses the epoch.

    resume: (tensors, progress) of state.safetensors when the run was interrupted inside this stage, else None.
    Returns the progress dict {"stage", "epoch", "best", "best_epoch", "seconds"}.
    """
    optimizer = optimizer_of(model, cfg, stage.lr)
    progress = {"stage": stage.name, "epoch": 0, "best": -1.0, "best_epoch": 0, "seconds": 0.0}
    if resume:
        load_state(resume[0], model, optimizer)
        progress = resume[1]
    if stage.rows == "items":
        rows = ItemRows(np.flatnonzero(data.train_counts) if args.cold_start else np.arange(1, data.n_items + 1), device)
    else:
        rows = data.training_rows(stage.rows, cfg.max_len, device)
    if len(rows) == 0:
        raise UserError(f"{data.name} has no training rows under --split {data.split}: it needs users with more "
                        f"interactions")
    base_lr = [g["lr"] for g in optimizer.param_groups]
    factor = SCHEDULES[getattr(cfg, "schedule", "constant")]
    forward = torch.compile(model.forward, dynamic=True) if args.compile else model.forward
    patience = cfg.patience if stage.validate else stage.epochs
    for epoch in range(progress["epoch"] + 1, stage.epochs + 1):
        if epoch - 1 - progress["best_epoch"] >= patience:
            break
        begin = time.perf_counter()
        seed_everything(args.seed, stage.number, epoch)
        rng = np.random.default_rng([args.seed, stage.number, epoch])
        for group, lr in zip(optimizer.param_groups, base_lr):
            group["lr"] = lr * factor((epoch - 1) / stage.epochs)
        if hasattr(model, "on_epoch_start"):
            model.on_epoch_start(epoch)
        losses = train_epoch(model, forward, optimizer, rows, cfg.batch_size, rng, args.clip_norm, device,
                             f"{stage.name} epoch {epoch}")
        line = {"stage": stage.name, "epoch": epoch, "losses": losses, "seconds": time.perf_counter() - begin}
        if stage.validate:
            valid = evaluation.evaluate(model, data, cfg, "valid", device)
            line |= {"valid": {k: v for k, v in valid.items() if "@" in k}, "valid_masked": valid["masked"]}
            chosen_by = line["valid_masked" if args.mask_history else "valid"][SELECT]
            if chosen_by > progress["best"]:
                progress |= {"best": chosen_by, "best_epoch": epoch}
                save_tensors(run / "model.safetensors", model.state_dict())
        progress |= {"epoch": epoch, "seconds": progress["seconds"] + time.perf_counter() - begin}
        with open(run / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        save_state(run / "state.safetensors", model, optimizer, progress)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in losses.items())
        print(f"{stage.name} epoch {epoch:>3}  {shown}" + (f"  valid {SELECT} {chosen_by:.4f}"
              f"{' *' if progress['best_epoch'] == epoch else '  '}" if stage.validate else "") +
              f"  {line['seconds']:.1f} s", flush=True)
    return progress


def stages_of(module, cfg):
    """The stages a model file asks for: Pretrain, if there is one and it has epochs, then Model."""
    if hasattr(module, "Pretrain") and cfg.pretrain_epochs > 0:
        yield SimpleNamespace(name="pretrain", number=0, model=module.Pretrain, rows=module.Pretrain.rows,
                              epochs=cfg.pretrain_epochs, lr=getattr(cfg, "pretrain_lr", cfg.lr), validate=False)
    yield SimpleNamespace(name="train", number=1, model=module.Model, rows="prefixes" if cfg.prefixes else "sequences",
                          epochs=cfg.epochs, lr=cfg.lr, validate=True)


def train(args, module, cfg, data, catalog, first, device, run):
    """All stages of one seed; leaves the best weights in `run` and in the model returned with the progress.

    first: what `pretraining` returned.
    """
    tensors, progress = load_tensors(run / "state.safetensors") if (run / "state.safetensors").is_file() else ({}, None)
    _cut_log(run / "log.jsonl", progress)
    pretrained = first.weights
    for stage in stages_of(module, cfg):
        if stage.name == "pretrain" and args.init:
            continue
        model = build(stage.model, cfg, catalog if stage.validate else first.catalog, device, args.seed)
        weights = run / ("model.safetensors" if stage.validate else "pretrain.safetensors")
        if pretrained is not None:
            try:
                model.init_from(pretrained)
            except ValueError as e:
                raise UserError(f"{args.init or run / 'pretrain.safetensors'} does not fit {args.model} on {data.name}: "
                                f"{e}") from None
        if not any(p.requires_grad for p in model.parameters()):       # a floor: nothing to train
            save_tensors(weights, model.state_dict())
            return model, {"stage": stage.name, "epoch": 0, "best_epoch": 0, "seconds": 0.0}
        if progress and stage.name == "pretrain" and progress["stage"] == "train":
            pretrained = load_tensors(weights)[0]                      # this stage was finished before the interruption
            continue
        resume = (tensors, progress) if progress and progress["stage"] == stage.name else None
        done = train_stage(model, stage, cfg, data if stage.validate else first.data, args, device, run, resume)
        if not stage.validate:
            pretrained = {k: v.detach().clone() for k, v in model.state_dict().items()}
            save_tensors(weights, pretrained)
    load_weights(model, weights)
    return model, done


def load_pretrained(module, run, encoders):
    """(weights, widths of features) of a run's folder: its pre-training stage's or, without one, its best. UserError.

    encoders: those of this run; a line is printed where they were others.
    """
    if not hasattr(module.Model, "init_from"):
        raise UserError("--init means nothing for this model: it has no init_from")
    path = next((p for p in (Path(run) / "pretrain.safetensors", Path(run) / "model.safetensors") if p.is_file()), None)
    if path is None:
        raise UserError(f"--init {run} holds no weights: give the folder of a run that is finished")
    config = Path(run) / "config.json"
    about = read_json(config) if config.is_file() else {}
    theirs = about.get("encoders", encoders)
    if theirs != encoders:
        print(f"warning: {run} was trained with {' and '.join(theirs.values())}, this run has "
              f"{' and '.join(encoders.values())}")
    return load_tensors(path)[0], about.get("widths", {})


def _cut_log(path, progress):
    """Drop what the log says of epochs after the saved state: they are trained again."""
    kept, order = [], ("pretrain", "train")
    for line in path.read_text(encoding="utf-8").splitlines() if progress and path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:               # the line that was being written when the run was killed
            break
        if (order.index(row["stage"]), row["epoch"]) <= (order.index(progress["stage"]), progress["epoch"]):
            kept.append(line + "\n")
    with atomic(path) as f:
        f.writelines(kept)


# ---------------------------------------------------------------- one run, several runs

def run_seed(args, module, cfg, data, catalog, first, device):
    """Train and test one seed. Returns (run folder, what was written to its metrics.json)."""
    run = Path(args.out) / f"{args.model}-{data.name}-{args.seed}"
    settings = {"model": args.model, "model_file": args.model_file, "data": str(data.folder.resolve()),
                "seed": args.seed, "split": args.split, "text": args.text, "image": args.image,
                "mask_history": args.mask_history, "clip_norm": args.clip_norm, "train_share": args.train_share,
                "pretrain_data": args.pretrain_data, "cold_start": args.cold_start, "init": args.init,
                "encoders": encoders_of(module, cfg, data, args), "widths": datasets.widths_of(catalog),
                "config": dataclasses.asdict(cfg), "sequences_sha256": data.about["sequences_sha256"]}
    if missing := [split for split, at in data.targets.items() if at.max() < 0]:
        raise UserError(f"{data.name} has no {' and no '.join(missing)} targets under --split {data.split}: it needs users "
                        f"with more interactions")
    with run_folder(run, settings, args.resume):
        if args.resume and (run / "metrics.json").is_file():
            print(f"{run} is finished")
            return run, read_json(run / "metrics.json")
        return run, train_and_test(args, module, cfg, data, catalog, first, device, run)


def train_and_test(args, module, cfg, data, catalog, first, device, run):
    """What run_seed does in the folder `run`. Returns what was written to its metrics.json."""
    begin = time.perf_counter()
    model, done = train(args, module, cfg, data, catalog, first, device, run)
    valid, test = (evaluation.evaluate(model, data, cfg, split, device) for split in ("valid", "test"))
    with atomic(run / "ranks-test.npy", "wb") as f:
        np.save(f, test["ranks"])
    result = {"valid": {k: v for k, v in valid.items() if "@" in k}, "valid_masked": valid["masked"],
              **evaluation.summary(test),
              "best_epoch": done["best_epoch"], "epochs": done["epoch"],
              "seconds_training": done["seconds"], "seconds": time.perf_counter() - begin,
              "parameters": sum(p.numel() for p in model.parameters()), "device": str(device),
              "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}}
    evaluation.report(run, f"{args.model} on {data.name}, seed {args.seed}", model, data, cfg, result, device)
    write_json(run / "metrics.json", result)
    return result


@contextmanager
def run_folder(run, settings, resume):
    """The run folder, made ready, and this process alone in it. --resume needs the same settings.

    An earlier run there is renamed, never overwritten; it takes its place again from a run refused in its first epoch.
    """
    aside = None
    if resume and (run / "config.json").is_file():
        before = read_json(run / "config.json")
        flat = lambda s: {k: v for k, v in s.items() if k != "config"} | s.get("config", {})
        changed = [k for k in flat(settings) if flat(before).get(k) != flat(settings)[k]]
        if changed:
            raise UserError(f"{run} was begun with other settings ({', '.join(changed)}): resume with the same command, "
                            f"or leave --resume out")
    else:
        if run.exists():
            with alone_in(run, wait=False):
                print(f"an earlier run is now {(aside := set_aside(run))}")
        write_json(run / "config.json", settings)
    with alone_in(run, wait=False):
        try:
            yield
        except UserError:
            log = run / "log.jsonl"
            if aside and not (log.is_file() and log.stat().st_size):
                shutil.rmtree(run)
                print(f"{aside} is {aside.rename(run)} again")
            raise


def main():
    args, module = parse()
    try:
        seeds = [args.seed] if args.seeds is None else [int(s) for s in args.seeds.split(",")]
        if min(seeds) < 0:
            raise ValueError
    except ValueError:
        raise UserError(f"--seed {args.seed} must not be negative" if args.seeds is None else
                        f"--seeds {args.seeds} is not a list of whole numbers such as 0,1,2") from None
    if not args.clip_norm > 0:
        raise UserError(f"--clip_norm {args.clip_norm} must be above 0")
    device = pick_device(args.device)
    data = datasets.load_for(args)
    cfg = configure(module, args, data.name)
    catalog = build_catalog(module, data, args.text, args.image, device)
    first = pretraining(args, module, cfg, data, catalog, device)
    results = []
    for args.seed in seeds:
        run, result = run_seed(args, module, cfg, data, catalog, first, device)
        results.append(result)
        print(f"\n{evaluation.table(f'{args.model} on {data.name}', [result])}\n"
              f"best epoch {result['best_epoch']} of {result['epochs']}, {result['seconds']:.0f} s, "
              f"{result['parameters']} weights, everything in {run}\n", flush=True)
        if scale := evaluation.demo_scale(data, args.model, result):
            print(f"{scale}\n", flush=True)
    if len(results) > 1:
        print(f"mean ± sd of {len(results)} seeds\n{evaluation.table(f'{args.model} on {data.name}', results)}")


if __name__ == "__main__":
    command(main)
