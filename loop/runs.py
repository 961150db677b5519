"""A run: its model and catalog, its folder, its state, and how it is resumed or opened again.

`runs/<model>-<data>-<seed>/` holds config.json, log.jsonl (one line per epoch), model.safetensors
(the best validation epoch), state.safetensors (the last epoch, for --resume), ranks-test.npy and
ranks-test-masked.npy, metrics.json and report.html.

Resuming: each epoch draws its random numbers from (seed, stage, epoch) alone, so there is no
generator state to restore. state.safetensors has the weights, the optimiser and the Progress. It
is written last in every epoch, after model.safetensors and the line of the log, so that its
Progress knows the epoch's validation. The log is cut back to it, and `train_stage` goes on there.
"""
import dataclasses
import json
import os
import random
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import data
import extract_features
from common.encoders import refuse_absurd
from common.features import KEYS
from common.files import (
    AGAIN,
    UserError,
    alone_in,
    atomic,
    has_form,
    load_tensors,
    naming,
    pick_device,
    read_json,
    save_tensors,
    set_aside,
    sha256,
    tensors_sha256,
    write_json,
)
from common.splits import SPLITS
from sources import read_about

from .settings import has_recipe, load_model_file, wrong_values

STAGES = ("pretrain", "train")    # in their order
LONGER = ("epochs", "patience")   # settings that may grow when a run is resumed
PATHS = ("text", "image", "encoders", "model_file")    # settings that may be paths
# of runs that were begun without these settings
SINCE = {
    "valid_every": 1, "valid_users": None, "cut": None, "precision": "bfloat16", "widths": {},
}
TEXT = (str, type(None))
SETTINGS = {     # what a run that is opened again must say of itself, as has_form takes it
    "model": str,
    "model_file": str,
    "data": str,
    "seed": int,
    "split": str,
    "cut": TEXT,
    "text": TEXT,
    "image": TEXT,
    "train_share": float,
    "config": dict,
    "sequences_sha256": str,
    "widths": {str: int},
}
PROGRESS = {
    "stage": str, "epoch": int, "best": float, "best_epoch": int, "checked": int, "seconds": float,
}
METRICS = {f"{name}@{k}": float for name in ("recall", "ndcg") for k in (10, 50)}
GROUPS = {str: {"users": int} | METRICS}
TRAINED = {"best_epoch": int, "epochs": int, "seconds": float, "parameters": int}
TESTED = TRAINED | {    # what metrics.json has of a run that was tested
    "test": METRICS, "test_masked": METRICS, "groups": GROUPS, "groups_masked": GROUPS,
    "users": int,
}
LINE = {"stage": str, "epoch": int, "losses": {str: float}, "seconds": float}    # of the log


@dataclass
class Job:
    """What all seeds of one command share."""
    args: object          # the command line
    module: object        # the model file
    cfg: object           # its Config
    dataset: data.Data
    catalog: dict
    device: torch.device
    reuse: bool = False   # finished runs with these settings are taken as they are

    @property
    def label(self):
        return f"{self.args.model} on {self.dataset.name}"

    @cached_property
    def made_with(self) -> dict:
        """What can be another under the same settings: the model file, what it READS of items (of
        pictures that it reads itself, only their names), the kind of device, --compile."""
        tensors = {key: value for key, value in self.catalog.items() if torch.is_tensor(value)}
        pictures = [Path(path or "").name for path in self.catalog.get("image_paths", ())]
        return {
            "code": sha256(self.module.__file__),
            "inputs": tensors_sha256(tensors, [self.catalog.get("titles", []), pictures]),
            "device": self.device.type,
            "compile": self.args.compile,
        }

    def folder(self, seed):
        """Where the run of a seed lies."""
        return Path(self.args.out) / f"{self.args.model}-{self.dataset.name}-{seed}"


# ---------------- catalog and model

def build_catalog(module, dataset, args, device):
    """The catalog dict with the keys that the model file READS, and `n_items`."""
    if "image_paths" in module.READS:
        dataset.fetch_pictures()
    catalog = dataset.catalog(module.READS)
    for modality, keys in KEYS.items():
        if set(module.READS) & set(keys):
            catalog |= extract_features.features(
                dataset, modality, args.text, args.image, device, module.READS
            )
    warn_of_what_no_item_has(module, catalog, dataset)
    return catalog


RAW = {"text": "titles", "image": "image_paths"}    # catalog keys of what is not encoded yet


def warn_of_what_no_item_has(module, catalog, dataset):
    """Print a line for each modality that a model file READS and that the data set lacks."""
    for modality, keys in KEYS.items():
        read = [catalog[key] for key in (*keys, RAW[modality]) if key in module.READS]
        if read and not any(map(has_any, read)):
            what = "a text" if modality == "text" else "a picture"
            name = module.__name__.rpartition(".")[2]
            print(f"warning: no item of {dataset.name} has {what}, which {name} reads: it runs "
                  f"without", flush=True)


def has_any(value) -> bool:
    return bool(value.any()) if torch.is_tensor(value) else any(value)


def encoders_of(module, cfg, dataset, args):
    """{modality: encoder} of the features that a model file READS, or that it trains itself."""
    named = extract_features.encoders(dataset, args.text, args.image)
    encoders = {}
    for modality, keys in KEYS.items():
        own = vars(cfg).get(f"{modality}_encoder")    # a setting of models that encode themselves
        if own or set(module.READS) & set(keys):
            encoders[modality] = own or named[modality]
    return encoders


def widths_of(catalog) -> dict:
    """{key: width} of the features in a catalog."""
    return {
        key: x.shape[-1] for key, x in catalog.items()
        if torch.is_tensor(x) and x.is_floating_point()
    }


def align_widths(catalogs, known=None):
    """If a data set has no features of a modality, give it zeros of the others' width (in place).

    known: {key: width} for features that no set has. Raises UserError if widths differ.
    """
    for key in widths_of(catalogs[0]):
        widths = {catalog[key].shape[-1] for catalog in catalogs if catalog[key].any()}
        if not widths and known and key in known:
            widths = {known[key]}
        if len(widths) > 1:
            shown = ", ".join(map(str, sorted(widths)))
            raise UserError(
                f"the features {key} of the data sets differ in width ({shown}): give one --text "
                f"and one --image encoder for all of them"
            )
        for catalog in catalogs:
            if widths and not catalog[key].any():
                catalog[key] = catalog[key].new_zeros(*catalog[key].shape[:-1], *widths)


def build(model_class, cfg, catalog, device, seed):
    """A model with seeded weights, on the device.

    A ValueError from the model is a bad setting or catalog: reported as a UserError.
    """
    seed_everything(seed)
    for modality in KEYS:
        own = vars(cfg).get(f"{modality}_encoder")    # a setting of models that encode themselves
        if own and Path(own).is_dir():
            refuse_absurd(own)
    try:
        model = model_class(cfg, catalog).to(device)
        if hasattr(model, "prepare"):    # what it computes once, before its first step
            model.prepare(torch.device(device))
    except ValueError as error:
        raise UserError(f"{model_class.__name__} cannot be built: {error}") from None
    if is_trained(model) and not has_recipe(cfg):
        raise UserError(
            f"{model_class.__name__} has weights to train, but its Config has no recipe: give it "
            f"lr, weight_decay, batch_size, epochs, patience and prefixes"
        )
    return model


def is_trained(model) -> bool:
    return any(weight.requires_grad for weight in model.parameters())


def seed_everything(*numbers):
    """Start Python's, numpy's and torch's generators from integers: (seed, stage, epoch)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------- the state of a run

@dataclass
class Progress:
    """How far a stage has come."""
    stage: str
    epoch: int = 0            # the last one that is trained, and validated if it is to be
    best: float = -1.0        # the best "selected_by" of the log so far
    best_epoch: int = 0       # the epoch that had it
    checked: int = 0          # the last epoch that is validated
    seconds: float = 0.0

    def includes(self, stage, epoch) -> bool:
        """Whether that epoch of that stage is done."""
        return (STAGES.index(stage), epoch) <= (STAGES.index(self.stage), self.epoch)


@dataclass
class Saved:
    """What state.safetensors holds of an interrupted run."""
    path: Path
    progress: Progress
    tensors: dict

    def has_finished(self, stage) -> bool:
        return STAGES.index(self.progress.stage) > STAGES.index(stage)

    def is_inside(self, stage) -> bool:
        return self.progress.stage == stage

    def restore(self, model, optimizer):
        """Put the weights and the optimiser's state back. Raises UserError where they do not fit.
        """
        weights = {}
        state = {}
        try:
            for key, tensor in self.tensors.items():
                kind, name = key.split(".", 1)
                if kind == "model":
                    weights[name] = tensor
                else:
                    number, name = name.split(".")
                    state.setdefault(int(number), {})[name] = tensor
            model.load_state_dict(weights)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            refuse_other_shapes(optimizer)
        except (RuntimeError, ValueError) as error:    # other names, or other shapes
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{self.path} is of another model than is trained ({reason}): {AGAIN}"
            ) from None


def refuse_other_shapes(optimizer):
    """Raises ValueError where the optimiser's numbers are not of its weights' shapes."""
    for weight, values in optimizer.state.items():
        if not {value.shape for value in values.values()} <= {(), weight.shape}:
            raise ValueError("size mismatch in the optimiser's numbers")


def save_state(folder, model, optimizer, progress):
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        for name, tensor in values.items():
            tensors[f"optimizer.{number}.{name}"] = tensor
    save_tensors(folder / "state.safetensors", tensors, dataclasses.asdict(progress))


def saved_state(folder):
    """What an interrupted run has left, its log cut back to it; None where nothing was left."""
    path = folder / "state.safetensors"
    saved = None
    if path.is_file():
        tensors, progress = load_tensors(path)
        if isinstance(progress, dict):
            progress = {"checked": progress.get("epoch"), **progress}    # of runs without it
        if not has_form(progress, PROGRESS) or progress["stage"] not in STAGES:
            raise UserError(f"{path} is no state of a run: {AGAIN}")
        progress = Progress(**{name: progress[name] for name in PROGRESS})
        saved = Saved(path, progress, tensors)
    cut_log(folder / "log.jsonl", saved)
    return saved


def cut_log(path, saved):
    """Drop what the log says of epochs after the saved state: they are trained again. Of a damaged
    log, that line and what follows are lost; it is read by nothing but the report."""
    kept = []
    if saved and path.is_file():
        for line in path.read_bytes().splitlines():
            row = parsed(line)
            if row is None:
                break
            if saved.progress.includes(row["stage"], row["epoch"]):
                kept.append(line + b"\n")
    with atomic(path, "wb") as file:
        file.writelines(kept)


def parsed(line):
    """A line of the log; None for the one that was being written when the run was killed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = has_form(row, LINE) and row["stage"] in STAGES
    if fits and "valid" in row:
        fits = has_form(row["valid"], {"ndcg@10": float})
    return row if fits else None


def append_log(folder, line):
    path = folder / "log.jsonl"
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_log(folder) -> list:
    lines = map(parsed, (folder / "log.jsonl").read_bytes().splitlines())
    return [line for line in lines if line is not None]


def seconds_so_far(folder) -> float:
    """What the epochs took that a run's log has already."""
    lines = read_log(folder) if (folder / "log.jsonl").is_file() else []
    return sum(line.get("seconds", 0) for line in lines)


def load_weights(model, path, rows_of_items=()):
    """Raises UserError where the file is damaged or holds other weights than the model has.

    rows_of_items: names of weights that get rows of zeros for the items that the file has none for.
    """
    weights, _ = load_tensors(path, "train again")
    trained = model.state_dict()
    for name in weights.keys() & trained.keys() & set(rows_of_items):
        weights[name] = with_rows(weights[name], len(trained[name]))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path} holds other weights than the model has ({reason}): train again"
        ) from None


def with_rows(weight, count):
    """A weight (N, ...) with zeros below, (count, ...)."""
    return torch.cat([weight, weight.new_zeros(count - len(weight), *weight.shape[1:])])


# ---------------- the folder of a run

def settings_of(job, seed) -> dict:
    """What config.json keeps: the settings, and what they were used on."""
    args = job.args
    return {
        "model": args.model,
        "model_file": args.model_file,
        "data": str(job.dataset.folder.resolve()),
        "seed": seed,
        "split": args.split,
        "cut": args.cut,
        "text": extract_features.full_name(args.text),
        "image": extract_features.full_name(args.image),
        "mask_history": args.mask_history,
        "valid_every": args.valid_every,
        "valid_users": args.valid_users,
        "train_share": args.train_share,
        "precision": args.precision,
        "pretrain_data": args.pretrain_data,
        "cold_start": args.cold_start,
        "init": args.init,
        "encoders": encoders_of(job.module, job.cfg, job.dataset, args),
        "widths": widths_of(job.catalog),
        "config": dataclasses.asdict(job.cfg),
        "sequences_sha256": job.dataset.about["sequences_sha256"],
        "made_with": job.made_with,
    }


def read_metrics(folder, form, advice) -> dict:
    """metrics.json of a finished run. form: TRAINED or TESTED. Raises UserError, which ends with
    the advice."""
    path = folder / "metrics.json"
    found = read_json(path, form, advice)
    if form is TESTED and found["groups"].keys() != found["groups_masked"].keys():
        raise UserError(f"{path} has two sets of groups: {advice}")
    return found


@contextmanager
def run_folder(folder, settings, resume):
    """The run's folder, made ready, and this process alone in it. --resume needs the same settings.

    An earlier run there is renamed, never overwritten; it gets its name back from a run that is
    refused in its first epoch.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as alone:
        with alone_in(folder.parent):    # two processes may begin the same run
            resumed = resume and (folder / "config.json").is_file()
            aside = None
            if not resumed:
                aside = make_room(folder)
            if resume and not resumed:
                print(f"--resume finds no run in {folder}: a new one begins", flush=True)
            alone.enter_context(alone_in(folder, wait=False))
            if not resumed:
                write_json(folder / "config.json", settings)
        if resumed:
            longer = refuse_other_settings(folder, settings)
            changed = changed_since(folder, settings)
            if changed:
                print(f"note: {folder} was begun with another {', '.join(changed)} (made_with in "
                      f"its config.json)", flush=True)
            make_longer(folder, settings, longer)
        try:
            yield
        except (UserError, OSError):
            log = folder / "log.jsonl"
            begun = log.is_file() and log.stat().st_size
            if aside and not begun:
                shutil.rmtree(folder)
                aside.rename(folder)
                print(f"{aside} is {folder} again")
            raise


def make_room(folder):
    """Make an empty folder for a run -> the new name of an earlier run there, or None."""
    aside = None
    empty = folder.is_dir() and all(path.name[0] == "." for path in folder.iterdir())
    if folder.exists() and not empty:
        with alone_in(folder, wait=False):
            aside = set_aside(folder)
        print(f"an earlier run is now {aside}")
    folder.mkdir(exist_ok=True)    # an empty one is left where a process was killed at its start
    return aside


def has_settings(folder, settings) -> bool:
    """Whether a run was begun there with just these settings, made with the same."""
    if not (folder / "config.json").is_file():
        return False
    try:
        longer = refuse_other_settings(folder, settings)
    except UserError:
        return False
    return not longer and not changed_since(folder, settings)


def name_alone(value):
    """A path without its folders; of a dict, of each value."""
    if isinstance(value, dict):
        return {key: name_alone(one) for key, one in value.items()}
    return Path(value).name if isinstance(value, str) else value


def changed_since(folder, settings) -> list:
    """Names of what a run was made with that are not the same now."""
    before = read_json(folder / "config.json", dict, AGAIN).get("made_with")
    if not isinstance(before, dict):
        return ["version of this project"]    # which did not keep it
    return [name for name, value in settings["made_with"].items() if before.get(name) != value]


def refuse_other_settings(folder, settings) -> list:
    """Raises UserError where a run was begun with other settings; returns those that have grown."""
    advice = "leave --resume out, then the run begins anew"
    before = read_json(folder / "config.json", {"config": dict}, advice)
    now = {**settings, **settings["config"]}
    before = {**SINCE, **before, **before["config"]}
    # where the data lies is no setting: sequences_sha256 says whether it is the same; and what it
    # was made with may change under a run that goes on, which is said
    changed = [name for name in now if name not in ("config", "data", "made_with")]
    changed = [name for name in changed if before.get(name) != now[name]]
    made = changed_since(folder, settings)
    if not made:    # a file that lies elsewhere now is the same
        changed = [name for name in changed if name not in PATHS
                   or name_alone(before.get(name)) != name_alone(now[name])]
    numbers = [name for name in changed if name in LONGER and has_form(before.get(name, 0), int)]
    longer = [name for name in numbers if before.get(name, 0) < now[name]]
    if "epochs" in longer and now.get("schedule", "constant") != "constant":
        raise UserError(
            f"{folder} cannot be given more epochs: its learning rate follows --schedule "
            f"{now['schedule']} over {before['epochs']} epochs; train it anew without --resume"
        )
    changed = [name for name in changed if name not in longer]
    if "inputs" in made:    # epochs on two sets of features
        changed.append("the features")
    if changed:
        raise UserError(
            f"{folder} was begun with other settings ({', '.join(changed)}): resume with the same "
            f"command, or leave --resume out"
        )
    return longer


def make_longer(folder, settings, longer):
    """longer: what has grown since the run was begun; if anything, it is no longer finished."""
    if longer and (folder / "metrics.json").is_file():
        aside = set_aside(folder / "metrics.json")
        print(f"{folder} goes on; its metrics so far are now {aside.name}", flush=True)
    write_json(folder / "config.json", settings)


def where_data_is(folder, settings):
    """The processed data of a run: where it was, else a folder near by with the same sequences."""
    before = Path(settings["data"])
    if (before / "source.json").is_file():
        return before
    above = folder.resolve().parents[:3]
    roots = [Path("data")] + [parent / "data" for parent in above]
    for root in roots:
        for about in sorted(root.glob("*/source.json")):
            try:
                found = read_about(about.parent).get("sequences_sha256")
            except UserError:    # another data set, damaged
                continue
            if found == settings["sequences_sha256"]:
                print(f"the data of {folder} is {about.parent} now, no longer {before}", flush=True)
                return about.parent
    raise UserError(
        f"the data of {folder} is no longer {before}: say where it is, with --data FOLDER"
    )


def refuse_own_code(folder, name):
    """Raises UserError for a run of a model file that may have come with it: train.py keeps the
    whole path of a file that lay on this machine in training."""
    if not name.endswith(".py"):
        return
    inside = Path(os.path.realpath(folder)) in Path(os.path.realpath(name)).parents
    if inside or not Path(name).is_absolute():
        raise UserError(
            f"{folder} names the model file {name}, which came with it and is not run: if you "
            f"trust it, put it elsewhere and write its whole path into config.json"
        )


@dataclass
class Features:
    """The encoders that a run was made with, as build_catalog reads them from the command line."""
    text: str
    image: str


@dataclass
class Run:
    """A finished run, opened again."""
    folder: Path
    settings: dict        # config.json
    module: object        # the model file
    cfg: object
    dataset: data.Data
    catalog: dict
    device: torch.device

    def model(self, catalog=None):
        """The model with its best weights; catalog: another than that of the training."""
        catalog = catalog or self.catalog
        model = build(self.module.Model, self.cfg, catalog, self.device, self.settings["seed"])
        load_weights(model, self.folder / "model.safetensors")
        return model


def open_run(folder, device=None, where=None) -> Run:
    """A finished run's folder -> Run. where: the data, if it is no longer where it was in training.

    Raises UserError.
    """
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{folder} holds no finished run (no model.safetensors): give a folder that train.py "
            f"made"
        )
    if not (folder / "metrics.json").is_file():
        print(f"note: the run in {folder} is not finished: its best weights so far are used",
              flush=True)
    settings = {**SINCE, **read_json(folder / "config.json", dict, "train the run again")}
    if not has_form(settings, SETTINGS) or settings["split"] not in SPLITS:
        raise UserError(f"{folder} has a config.json of no run: train it again")
    refuse_own_code(folder, settings["model_file"])
    if settings["model_file"].endswith(".py") and not Path(settings["model_file"]).is_file():
        raise UserError(
            f"{folder} was trained with {settings['model_file']}, which is no longer there: put it "
            f"back, or write its new path into config.json (model_file)"
        )
    module = load_model_file(settings["model_file"])
    device = pick_device(device)
    where = where or where_data_is(folder, settings)
    dataset = data.load(
        where,
        split=settings["split"],
        train_share=settings["train_share"],
        cut=settings["cut"],
    )
    if dataset.about["sequences_sha256"] != settings["sequences_sha256"]:
        raise UserError(
            f"{folder} was trained on other data than {dataset.folder} holds now: train it again"
        )
    fields = {field.name for field in dataclasses.fields(module.Config)}
    unknown = [name for name in settings["config"] if name not in fields]
    if unknown:
        raise UserError(
            f"{folder} was made by another version of the model, which had the setting "
            f"{unknown[0]}: train it again"
        )
    wrong = wrong_values(module.Config, settings["config"])
    try:
        cfg = module.Config(**settings["config"]) if not wrong else None
    except ValueError as error:
        wrong = [str(error)]
    if wrong:
        raise UserError(
            f"{folder} has a setting in its config.json that makes no sense ({wrong[0]}): train it "
            f"again"
        )
    features = Features(settings["text"], settings["image"])
    catalog = build_catalog(module, dataset, features, device)
    align_widths([catalog], settings["widths"])
    return Run(folder, settings, module, cfg, dataset, catalog, device)
