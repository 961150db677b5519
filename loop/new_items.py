"""Items that a model was not trained on: their features, and one catalog of old and new.

Only a model can score them whose weights belong to no item, or whose file says in ROWS_OF_ITEMS
which weights have rows that mean nothing for an item that nobody bought. Features are made by the
encoders of the run.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.features import KEYS
from common.files import UserError, keys_sha256, load_tensors, write_json
from common.items import Items
from common.vectors import is_vectors
from extract_features import encoders
from sources import write_items
from sources.notes import notes_of_pictures

from .runs import Features, align_widths, build, build_catalog, load_weights


def model_of_more(run, path):
    """The trained model of a run, for its items and those of a file, which are numbered after them.

    Adds the items to `run.dataset.items`. Raises UserError for a file that cannot be read, for
    items that the data has, and for a model that has weights of its own for every item.
    """
    dataset = run.dataset
    new = new_dataset(run, path)
    features = Features(run.settings["text"], run.settings["image"])
    catalog = build_catalog(run.module, new, features, run.device)
    leave_out_what_was_not_trained(run, catalog, path)
    align_widths([run.catalog, catalog], run.settings["widths"])
    joined = {key: join(key, run.catalog[key], catalog[key]) for key in run.catalog}
    if "lang" in joined:
        joined["lang"] = languages(dataset, new)
    model = build(run.module.Model, run.cfg, joined, run.device, run.settings["seed"])
    refuse_weights_of_items(run, model)
    load_weights(model, run.folder / "model.safetensors", rows_of_items(run))
    dataset.items.extend(new.items[1:])
    dataset.fetched.update(new.fetched)
    return model


def leave_out_what_was_not_trained(run, catalog, path):
    """Where no item of the training had a picture, or a text, take those of new ones for missing,
    in place, and say so."""
    for modality, keys in KEYS.items():
        read = [key for key in keys if key in catalog]
        if any(run.catalog[key].any() for key in read) or not any(catalog[k].any() for k in read):
            continue
        for key in read:
            catalog[key] = torch.zeros_like(catalog[key])
        print(f"note: the {modality}s of {path} are not used: {run.folder} was trained without any",
              flush=True)


def refuse_weights_of_items(run, model):
    """Raises UserError where a model of more items has larger weights than the trained one."""
    trained, _ = load_tensors(run.folder / "model.safetensors", "train again")
    needed = trained.keys() - set(rows_of_items(run))
    larger = [
        name for name, weight in model.state_dict().items()
        if name in needed and trained[name].shape != weight.shape
    ]
    if larger:
        raise UserError(
            f"{run.settings['model']} learned weights for each item ({larger[0]}), and new ones "
            f"have none: --items needs a model that reads content alone, such as mmsr, fmmsrec, or "
            f"msm4sr trained with --use_id false, or digest"
        )


def rows_of_items(run):
    """Names of weights with a row for each item, of which new ones need none."""
    return getattr(run.module, "ROWS_OF_ITEMS", ())


def join(key, old, new):
    """One value of two catalogs. Tensors of several vectors are padded to the larger number."""
    if key == "n_items":
        return old + new
    if key == "train_seqs":
        return old
    if isinstance(old, list):
        return old + new[1:]
    if old.dim() > 1:
        most = max(old.shape[1], new.shape[1])
        old, new = padded(old, most), padded(new, most)
    return torch.cat([old, new[1:]])


def padded(x, length):
    """(N, S, ...) -> (N, length, ...), with zeros."""
    after = [0, 0] * (x.dim() - 2) + [0, length - x.shape[1]]
    return F.pad(x, after)


def languages(dataset, new):
    """The languages' numbers (N+1,): those of the training, then those that are new."""
    known = sorted({item["language"] for item in dataset.items[1:]})
    unknown = sorted({item["language"] for item in new.items[1:]} - set(known))
    number = {language: n for n, language in enumerate([*known, *unknown], start=1)}
    rows = [*dataset.items[1:], *new.items[1:]]
    return torch.tensor([0] + [number[item["language"]] for item in rows])


def new_dataset(run, path):
    """The items of a file as a data set that nobody has bought from, in a folder of the run."""
    items = Items()
    if not path.is_file():
        raise UserError(f"--items {path} is no file: give items.jsonl or items.csv")
    items.read(path)
    catalog = items.catalog
    root = path.resolve().parent
    for note in [*items.notes(), *notes_of_pictures(catalog.values(), root, True)]:
        print(f"note: {note}", flush=True)
    known = {item["key"] for item in run.dataset.items}
    twice = [key for key in catalog if key in known]
    if twice:
        raise UserError(
            f"{path} describes {len(twice)} items that {run.dataset.name} has, such as "
            f"{twice[0]}: leave them out, their own descriptions are used"
        )
    if not catalog:
        raise UserError(f"{path} describes no item: each line needs a key under item")
    refuse_given_vectors(run)
    for item in catalog.values():    # as paths that are right from anywhere
        item["images"] = [x if "://" in x else str(root / x) for x in item["images"]]
    keys = list(catalog)
    folder = run.folder.resolve() / f"items-{keys_sha256([str(catalog)])[:12]}"
    about = run.dataset.about | {
        "name": path.name,
        "items_sha256": keys_sha256(keys),
        "described": len(keys),
        "image_root": str(root),
        "pictures": "pictures",
        "features": {},
        "notes": [],
    }
    folder.mkdir(exist_ok=True)
    write_items(folder, keys, catalog)
    write_json(folder / "source.json", about)
    nothing = np.zeros(0, np.int64)
    return replace(
        run.dataset, folder=Path(folder), about=about, flat=nothing, times=nothing, parts=None,
        offsets=np.zeros(1, np.int64), n_items=len(keys), split="none", cut=None, train_share=1.,
    )


def refuse_given_vectors(run):
    """Raises UserError where the run read vectors that no encoder can make for other items."""
    named = encoders(run.dataset, run.settings["text"], run.settings["image"])
    for modality, encoder in named.items():
        read = set(KEYS[modality]) & set(run.module.READS)
        given = run.dataset.about["features"].get(modality) == encoder
        if read and (given or is_vectors(encoder)):
            raise UserError(
                f"{run.folder} was trained on {modality} vectors that were given ({encoder}), and "
                f"new items have none: --items needs a run whose encoders make them"
            )
