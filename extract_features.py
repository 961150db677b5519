"""Titles and pictures -> frozen features, made once, in `data/<name>/features/`.

    python extract_features.py --data demo --text hash --image pixels
    python extract_features.py --data pantry --text sentence-transformers/all-mpnet-base-v2

train.py does this by itself where features are missing. Encoders are

    hash, pixels                  built in: they need no download; the defaults of the demo shops
    vectors.npy, .safetensors     vectors of your own: see common/vectors.py
    microsoft/swin-base-...       a Hugging Face text or vision model: its name there, or a folder;
                                  a text model's name with @cls, @mean, @max or @last has that
                                  pooling instead of its own
    ViT-B-32:laion2b_s34b_b79k    an open_clip model and its weights' tag or checkpoint file; also
                                  hf-hub: and local-dir:
    keywords:CLIP                 for pictures, as MSM4SR has them: the 15 words of the data set
                                  that are nearest to the picture in the space of the encoder
                                  CLIP, read as a sentence by the text encoder; keywords:N:CLIP
                                  takes N words

Every sentence (title first, then the other texts, 10 at most) and every picture (10 at most; of an
animation or a folder of frames the mean over 10 frames, FMMS-Rec eq. 1) gets a vector of its own,
each distinct one once; an item's `text` and `image` are the means. Work is saved part by part, so
a killed run continues.
"""
import argparse
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from common.encoders import BUILT_IN, encode, open_encoder
from common.features import (
    KEYS,
    about_features,
    catalog_of,
    feature_path,
    read_features,
    write_features,
)
from common.files import (
    AGAIN,
    UserError,
    alone_in,
    command,
    has_form,
    keys_sha256,
    load_tensors,
    pick_device,
    read_json,
    save_tensors,
    set_aside,
    write_json,
)
from common.progress import Bar
from common.vectors import digest_of, is_vectors, read_vectors

CLIP = "ViT-B-32:laion2b_s34b_b79k"    # the default for everything but the demo shops
MOST = 10                              # sentences or pictures of one item
TEMPLATE = {
    "text": f"the title, then the sentences of the other texts, at most {MOST}",
    "image": f"at most {MOST} pictures, of an animation or a folder the mean over its frames",
}
PART = {"text": 4096, "image": 1024}   # inputs whose vectors are saved together
END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9À-Þ])|(?<=[。！？])")    # of a sentence


# ---------------- what train.py asks for

def features(dataset, modality, text=None, image=None, device=None, reads=None) -> dict:
    """The catalog keys of one modality ("text" or "image") as tensors, made where they are missing.

    text, image: encoders; None = the features that came with the data, else the default one.
    reads: the keys wanted; None = all four. Raises UserError for an encoder that cannot be loaded,
    and for a feature file that is damaged or belongs to other items.
    """
    encoder = encoders(dataset, text, image)[modality]
    path = feature_path(dataset.folder, modality, encoder)
    parts = parts_of(path)
    if parts.exists() or not path.is_file() or inputs_changed(dataset, modality, encoder):
        with alone_in(dataset.folder):    # another process may have made it meanwhile
            if path.is_file() and inputs_changed(dataset, modality, encoder):
                print(f"the {modality} inputs of {dataset.name} have changed: their old features "
                      f"are now {set_aside(path)}")
            if not path.is_file():
                extract(dataset, modality, encoder, pick_device(device))
            shutil.rmtree(parts, ignore_errors=True)
    for note in about_features(path, keys_of(dataset), encoder)["notes"]:
        print(f"note: {note}", flush=True)
    vectors, index = read_features(path, dataset.n_items)
    dataset.set_has(modality, index.any(1).numpy())    # what the model is given
    return catalog_of(modality, vectors, index, reads)


def encoders(dataset, text=None, image=None) -> dict:
    """{"text", "image"}: full names of the encoders that a choice means for a data set."""
    defaults = BUILT_IN if dataset.about["source"] == "demo" else dict.fromkeys(KEYS, CLIP)
    given = dataset.about["features"]    # with the data
    text = text or given.get("text") or defaults["text"]
    image = image or given.get("image") or defaults["image"]
    text, image = full_name(text), full_name(image)
    if image.startswith("keywords:") and "+" not in image:
        image = f"{image}+{text}"        # the encoder that reads the keywords
    return {"text": text, "image": image}


def full_name(encoder):
    """An encoder's name; of a file of vectors the full path, so that it is found from anywhere.

    Raises UserError for a file of another kind.
    """
    if is_vectors(encoder):
        return os.path.realpath(encoder)    # a link to itself is no error here
    if encoder and ":" not in str(encoder) and Path(encoder).is_file():
        raise UserError(
            f"{encoder} is no file of vectors: save them with numpy.save, as .npy, or as "
            f".safetensors"
        )
    return encoder


def inputs_changed(dataset, modality, encoder) -> bool:
    """Whether an existing feature file was made of other texts or pictures. Raises UserError."""
    path = feature_path(dataset.folder, modality, encoder)
    about = about_features(path, keys_of(dataset), encoder)
    if is_vectors(encoder):    # features without their file still serve
        return Path(encoder).is_file() and about["inputs_sha256"] != digest_of(encoder)
    which, inputs = inputs_of(dataset, modality)
    if not inputs or about["inputs_sha256"] is None:
        return False
    moved = about["which_sha256"] not in (None, whose(which))
    return moved or about["inputs_sha256"] != fingerprint(inputs, modality)


def keys_of(dataset) -> list:
    return [item["key"] for item in dataset.items[1:]]


# ---------------- what is encoded

def inputs_of(dataset, modality):
    """(which inputs each item 1..N has, by number; the distinct sentences or picture paths)"""
    lists = sentences_of if modality == "text" else dataset.image_paths
    of_items = [lists(item)[:MOST] for item in dataset.items[1:]]
    distinct = list(dict.fromkeys(x for inputs in of_items for x in inputs))
    number = {x: n for n, x in enumerate(distinct)}
    return [[number[x] for x in inputs] for inputs in of_items], distinct


def sentences_of(item) -> list:
    """The title, then the sentences of the other texts, distinct. item: a row of `Data.items`."""
    sentences = [item["title"]]
    for text in item["text"]:
        sentences += END.split(text)
    return list(dict.fromkeys(sentence for sentence in sentences if sentence))


def fingerprint(inputs, modality) -> str:
    """SHA-256 of sentences, or of the names and sizes of picture files, in a folder its frames'."""
    if modality == "text":
        return keys_sha256(inputs)
    named = []
    for path in map(Path, inputs):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                named.append(f"{file.parent.name}/{file.name} {file.stat().st_size}")
    return keys_sha256(named)


def whose(which) -> str:
    """SHA-256 of which inputs each item has."""
    return keys_sha256([",".join(map(str, numbers)) for numbers in which])


# ---------------- encoding, part by part

def parts_of(path) -> Path:
    """The folder of what is encoded so far of a feature file; it goes when the file is there."""
    return path.with_suffix(".parts")


def extract(dataset, modality, encoder, device):
    """Encode one modality of all items and write its feature file: MSM4SR eqs. (1), (2).

    Raises UserError.
    """
    if is_vectors(encoder):
        take_over(dataset, modality, encoder)
        return
    if modality == "image":
        dataset.fetch_pictures()
    which, inputs = inputs_of(dataset, modality)
    path = feature_path(dataset.folder, modality, encoder)
    vectors = np.zeros((0, 1), np.float32)
    about = {"inputs": len(inputs), "inputs_sha256": fingerprint(inputs, modality)}
    if inputs:
        print(f"extracting {modality} features of {dataset.name} with {encoder}", flush=True)
        model = open_encoder(modality, encoder, device, dataset.texts)
        about |= {"template": TEMPLATE[modality], **model.about}
        made_of = {"encoder": encoder, **about}
        of_part = partial(encode, model, encoder)
        vectors, failures, cut = in_parts(
            parts_of(path), of_part, inputs, PART[modality], made_of
        )
        notes = what_failed(dataset, encoder, vectors, failures, cut)
        about |= {"failures": failures, "texts_cut": cut, "notes": notes}
    index = np.zeros((len(which), max(1, *map(len, which))), np.int64)    # (N, S)
    for row, numbers in zip(index, which):
        row[:len(numbers)] = np.array(numbers, np.int64) + 1
    about["which_sha256"] = whose(which)
    keys = keys_of(dataset)
    write_features(dataset.folder, modality, encoder, vectors, index, keys, about)


def take_over(dataset, modality, file):
    """Write the feature file of somebody's own vectors. Raises UserError."""
    keys = keys_of(dataset)
    vectors, notes = read_vectors(file, keys, dataset.about.get("described"))
    zero = int((~vectors.any(1)).sum())
    if zero:
        notes.append(f"{zero} of {len(keys)} items have no vector in {Path(file).name}, or zeros")
    index = np.arange(1, len(keys) + 1)[:, None]
    digest = digest_of(file)    # of the file, then of the ids beside it
    about = {
        "weights": {Path(file).name: digest.partition("+")[0]},
        "inputs_sha256": digest,
        "notes": notes,
    }
    write_features(dataset.folder, modality, file, vectors, index, keys, about)


def what_failed(dataset, encoder, vectors, failures, cut) -> list:
    """Sentences on pictures that cannot be used, on texts (`cut` of them) that are longer than the
    encoder reads, and on an encoder that tells nothing apart."""
    notes = []
    if failures:
        first, reason = next(iter(failures.items()))
        notes.append(
            f"{len(failures)} of {len(vectors)} pictures cannot be used, the first is {first} "
            f"({reason}); the features' json names all"
        )
    if cut:
        notes.append(f"{cut} of {len(vectors)} texts are longer than {encoder} reads, and were cut")
    if len(vectors) - len(failures) > 1 and not (vectors != vectors[0]).any():
        notes.append(f"{encoder} gives one and the same vector for everything in {dataset.name}")
    return notes


def in_parts(folder, encode, inputs, size, made_of):
    """encode(inputs) -> (vectors, failures, texts cut), part by part; those in `folder` are kept.

    Inputs of similar length lie in one part, the longest first. made_of: what fixes the numbers;
    parts made of something else are removed. Returns the vectors (len(inputs), D) in the order of
    the inputs, the failures {input: reason}, and how many texts were cut.
    """
    made_of = json.loads(json.dumps(made_of))    # as it is read back: a tuple is a list there
    note = folder / "about.json"
    if folder.exists() and (not note.is_file() or read_json(note) != made_of):
        shutil.rmtree(folder)
    write_json(note, made_of)
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    rows, failures, cut = [], {}, 0
    with Bar("encoding", len(inputs)) as bar:
        for first in range(0, len(inputs), size):
            part = folder / f"{first}.safetensors"
            if not part.is_file():
                vectors, *notes = encode([inputs[i] for i in order[first:first + size]])
                save_tensors(part, {"vectors": torch.from_numpy(vectors)}, notes)
            vectors, (failed, shortened) = read_part(part, len(inputs[first:first + size]))
            rows.append(vectors)
            failures |= failed
            cut += shortened
            bar.update(len(rows[-1]))
    vectors = np.empty((len(inputs), rows[0].shape[1]), np.float32)
    vectors[order] = np.concatenate(rows)
    return vectors, failures, cut


def read_part(path, number) -> tuple:
    """(vectors (number, D), [failures, how many texts were cut]) of a part. Raises UserError."""
    tensors, notes = load_tensors(path)
    vectors = tensors.get("vectors", torch.zeros(0))
    fits = vectors.dim() == 2 and len(vectors) == number and vectors.dtype == torch.float32
    fits = fits and isinstance(notes, list) and len(notes) == 2
    if not (fits and has_form(notes[0], {str: str}) and has_form(notes[1], int)):
        raise UserError(f"{path} is no part of the features that are made: {AGAIN}")
    return vectors.numpy(), notes


# ---------------- the command line

def add_arguments(parser):
    """The flags that say which data and which encoders."""
    data.add_arguments(parser)
    parser.add_argument(
        "--text",
        help=f"text encoder: hash, a Hugging Face model (with @cls, @mean, @max or @last: by that "
             f"pooling), an open_clip model such as {CLIP}, or a file of vectors, .npy or "
             f".safetensors (default: the features that came with the data, else {CLIP}; for demo "
             f"shops hash)",
    )
    parser.add_argument(
        "--image",
        help="image encoder: pixels, a Hugging Face model, an open_clip model, a file of vectors, "
             "or keywords: and one that has texts and pictures in one space, keywords:N: for N "
             "words instead of 15 (default: as for --text; for demo shops pixels)",
    )


def main():
    parser = argparse.ArgumentParser(
        description="Encode the titles and pictures of a data set.", allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    dataset = data.load_for(args)
    dataset.fetch_pictures()    # what an earlier run could not get is asked for again
    for modality, encoder in encoders(dataset, args.text, args.image).items():
        tensors = features(dataset, modality, args.text, args.image, device)
        _, has, stack, mask = (tensors[key] for key in KEYS[modality])
        path = feature_path(dataset.folder, modality, encoder)
        print(f"{modality} by {encoder}: {int(has.sum())} of {dataset.n_items} items, "
              f"{int(mask.sum())} vectors of {stack.shape[-1]} numbers, {path}")


if __name__ == "__main__":
    command(main)
