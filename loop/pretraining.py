"""The pre-training stage's data and weights: --pretrain_data, --cold_start and --init.

A model file with a class Pretrain is trained in two stages. The first one uses the run's own data
unless --pretrain_data names other sets, or --cold_start leaves cold items out; with --init it is
not run, and another run's weights are taken over.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from common.files import UserError, has_form, load_tensors, read_json

from .runs import align_widths, build_catalog, encoders_of


@dataclass
class Pretraining:
    """What a pre-training stage reads, and the weights of --init (else None)."""
    dataset: data.Data
    catalog: dict
    weights: dict

    def rows(self, kind, job):
        """The rows of the stage; kind: Pretrain.rows. Raises UserError where there are none."""
        if kind == "items" and job.args.cold_start:    # only warm ones occur in what is left
            return data.ItemRows(np.flatnonzero(self.dataset.train_counts), job.device)
        return self.dataset.training_rows(kind, job.cfg.max_len, job.device)


def prepare_pretraining(job) -> Pretraining:
    """Data, catalog and weights as the command line asks for. Raises UserError."""
    args = job.args
    elsewhere = args.pretrain_data is not None or args.cold_start
    if elsewhere:
        refuse_if_not_pretrained(job)
    weights = None
    if args.init:
        weights = take_over(job)
    if not elsewhere:
        return Pretraining(job.dataset, job.catalog, weights)
    sets, catalogs = [job.dataset], [job.catalog]
    if args.pretrain_data is not None:
        sets = load_sets(job)
        catalogs = [build_catalog(job.module, other, args, job.device) for other in sets]
        align_widths([job.catalog, *catalogs])
    dataset = training_parts(sets, args.cold_start)
    return Pretraining(dataset, join_catalogs(catalogs, dataset), weights)


def refuse_if_not_pretrained(job):
    """Raises UserError where --pretrain_data or --cold_start would change nothing."""
    if not hasattr(job.module, "Pretrain"):
        why = f"{job.args.model} is not pre-trained"
    elif job.args.init:
        why = "--init reuses a finished pre-training"
    elif job.cfg.pretrain_epochs == 0:
        why = "--pretrain_epochs 0 is no pre-training"
    else:
        return
    raise UserError(f"{why}: leave --pretrain_data and --cold_start out")


def load_sets(job) -> list:
    """The data sets of --pretrain_data. Raises UserError for features of other encoders."""
    args = job.args
    names = [name.strip() for name in args.pretrain_data.split(",")]
    if not all(names):
        raise UserError(
            f"--pretrain_data {args.pretrain_data!r} is not a list of data sets such as A or A,B"
        )
    # a split that came with one data set says nothing of another
    split = "leave_one_out" if args.split == "files" else args.split
    sets = [data.load(name, split=split, mirror=args.mirror, cut=args.cut) for name in names]
    for other in sets:
        data.print_notes(other, args)
    ours = encoders_of(job.module, job.cfg, job.dataset, args)
    for other in sets:
        theirs = encoders_of(job.module, job.cfg, other, args)
        if theirs != ours:
            raise UserError(
                f"{other.name} has features of {' and '.join(theirs.values())}, {job.dataset.name} "
                f"of {' and '.join(ours.values())}: give one --text and one --image encoder for "
                f"both"
            )
    return sets


def take_over(job) -> dict:
    """The weights of --init: another run's pre-training stage's or, without one, its best.

    Features that this run's data lacks get the width that they had there. Raises UserError.
    """
    if not hasattr(job.module.Model, "init_from"):
        raise UserError("--init means nothing for this model: it has no init_from")
    run = Path(job.args.init)
    files = [run / "pretrain.safetensors", run / "model.safetensors"]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise UserError(
            f"--init {run} holds no weights: give the folder of a run that is finished"
        )
    about = {}
    advice = "give --init the folder of another run"
    if (run / "config.json").is_file():
        about = read_json(run / "config.json", dict, advice)
    ours = encoders_of(job.module, job.cfg, job.dataset, job.args)
    theirs = about.get("encoders", ours)
    widths = about.get("widths", {})
    if not has_form([theirs, widths], [{str: (int, str)}]):
        raise UserError(f"--init {run} has a config.json of no run: {advice}")
    if theirs != ours:
        before = " and ".join(map(str, theirs.values()))
        print(f"warning: {run} was trained with {before}, this run has "
              f"{' and '.join(ours.values())}")
    align_widths([job.catalog], widths)
    return load_tensors(path, advice)[0]


def training_parts(sets, warm=False) -> data.Data:
    """The training parts of one or several data sets as one that is nothing but training.

    Item ids of the second set follow those of the first. warm: without the items that are cold in
    their set. Raises UserError where that leaves nothing to learn from.
    """
    flat, lengths = [], []
    n_items = 0
    for dataset in sets:
        keep = dataset.in_train
        if warm:
            keep &= dataset.train_counts[dataset.flat] >= data.COLD
        flat.append(dataset.flat[keep] + n_items)
        lengths.append(np.add.reduceat(keep, dataset.offsets[:-1]))
        n_items += dataset.n_items
    flat = np.concatenate(flat)
    lengths = np.concatenate(lengths)
    name = "+".join(dataset.name for dataset in sets)
    if warm and lengths.max() < 2:
        raise UserError(
            f"nobody in {name} has two warm items ({data.COLD} training occurrences or more) to "
            f"pre-train on: leave --cold_start out"
        )
    offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
    times = np.zeros_like(flat)
    joined = data.Data(
        sets[0].folder, {"name": name}, flat, offsets, times, n_items, "leave_one_out"
    )
    joined.train_end = offsets[1:].copy()
    joined.targets = {}
    return joined


def join_catalogs(catalogs, joined) -> dict:
    """Catalogs, of equal feature widths, of the sets that training_parts joined, as one."""
    whole = {}
    for key in catalogs[0]:
        if key == "n_items":
            whole[key] = joined.n_items
        elif key == "train_seqs":
            whole[key] = joined.train_seqs
        else:
            whole[key] = one_below_the_other([catalog[key] for catalog in catalogs])
    return whole


def one_below_the_other(parts):
    """Lists or tensors of N+1 rows each, as one with a single row for padding."""
    if isinstance(parts[0], list):
        return parts[0] + [row for part in parts[1:] for row in part[1:]]
    stacked = parts[0].dim() == 3 or (parts[0].dim() == 2 and parts[0].dtype == torch.bool)
    if stacked:    # (N+1, S, D) or their masks: filled up to the highest
        high = max(part.shape[1] for part in parts)
        parts = [filled_up(part, high) for part in parts]
    others = [part[1:] for part in parts[1:]]
    return torch.cat([parts[0], *others])


def filled_up(part, high):
    missing = part.new_zeros(len(part), high - part.shape[1], *part.shape[2:])
    return torch.cat([part, missing], 1)
