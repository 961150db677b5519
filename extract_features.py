"""Titles and pictures -> frozen features, made once: `data/<name>/features/<modality>-<encoder>.safetensors`.

    python extract_features.py --data demo --text hash --image pixels
    python extract_features.py --data pantry --text sentence-transformers/all-mpnet-base-v2

train.py does this by itself where features are missing. Encoders are

    hash, pixels                    built in: they need no download, and are the defaults of the demo shops
    microsoft/swin-base-...         a Hugging Face text or vision model: its name there, or a folder
    ViT-B-32:laion2b_s34b_b79k      an open_clip model and its weights' tag or checkpoint file; also hf-hub: and local-dir:
    keywords:CLIP                   for pictures, as MSM4SR has them: the 15 words of the data set that are nearest to the
                                    picture in the space of the encoder CLIP, read as a sentence by the text encoder

Every sentence (title first, then the other texts, 10 at most) and every picture (10 at most; of an animation or a folder
of frames, the mean over 10 frames, FMMS-Rec eq. 1) gets a vector of its own, each distinct one once; an item's `text` and
`image` are the means. A file holds the distinct vectors and, item by item, which of them are its own; the json beside it
says what the numbers are: encoder, weights, versions, template, SHA-256 of the item keys and of what was encoded. A file
of other items, or of another order of them, is refused. Work goes in parts that are kept, so a killed run goes on.
"""
import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data as datasets
from encoders import BUILT_IN, open_encoder
from sources.common import (UserError, alone_in, command, feature_path, keys_sha256, load_tensors, read_json, save_tensors,
                            set_aside, write_features, write_json)

KEYS = {"text": ("text", "has_text", "sentences", "sentences_mask"),
        "image": ("image", "has_image", "pictures", "pictures_mask")}
CLIP = "ViT-B-32:laion2b_s34b_b79k"      # the default for everything but the demo shops
MOST = 10                                # sentences or pictures of one item
TEMPLATE = {"text": f"the title, then the sentences of the other texts, at most {MOST}",
            "image": f"at most {MOST} pictures, of an animation or a folder the mean over its frames"}
PART = {"text": 4096, "image": 1024}     # inputs whose vectors are saved together
END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9À-Þ])|(?<=[。！？])")     # of a sentence


# ---------------------------------------------------------------- what train.py asks for

def features(data, modality, text=None, image=None, device=None, reads=None) -> dict:
    """The catalog keys of one modality ("text" or "image") as tensors; makes them first where they are missing.

    text, image: encoders; None = the features that came with the data, else the default one. reads: the keys wanted;
    None = all four. Raises UserError for an encoder that cannot be had, and for a feature file that is damaged or
    belongs to other items.
    """
    encoder = encoders(data, text, image)[modality]
    path = feature_path(data.folder, modality, encoder)
    keys = [item["key"] for item in data.items[1:]]

    def changed():
        about = read_json(path.with_suffix(".json"))
        if (about["items_sha256"], about["encoder"]) != (keys_sha256(keys), encoder):
            raise UserError(f"{path} was made for other items, for another order of them, or by another encoder: "
                            f"remove it, then it is made again")
        inputs = inputs_of(data, modality)[1]
        return inputs and about.get("inputs_sha256") not in (None, fingerprint(inputs, modality))

    if not path.is_file() or changed():
        with alone_in(data.folder):      # another process may have made it meanwhile
            if path.is_file() and changed():
                print(f"the {modality} inputs of {data.name} have changed: their old features are now {set_aside(path)}")
            if not path.is_file():
                extract(data, modality, encoder, keys, pick_device(device))
    tensors = load_tensors(path)[0]
    vectors, index = tensors.get("vectors"), tensors.get("index")
    if vectors is None or index is None or len(index) != len(keys) + 1 or not 0 <= index.min() <= index.max() < len(vectors):
        raise UserError(f"{path} is no feature file of {len(keys)} items: remove it, then it is made again")
    if vectors[0].any() or index[0].any() or not vectors.isfinite().all():
        raise UserError(f"{path} holds numbers that are not finite, or a row 0 that is not zero: remove it")
    makers = (lambda: F.embedding_bag(index, vectors, mode="mean", padding_idx=0),     # (N+1, D)
              lambda: index.any(1), lambda: vectors[index], lambda: index != 0)        # (N+1), (N+1, S, D), (N+1, S)
    return {key: make() for key, make in zip(KEYS[modality], makers) if reads is None or key in reads}


def encoders(data, text=None, image=None) -> dict:
    """{"text", "image"}: full names of the encoders that a choice means for a data set (None = the default one)."""
    defaults = BUILT_IN if data.about["source"] == "demo" else dict.fromkeys(KEYS, CLIP)
    text, image = (given or data.about["features"].get(modality) or defaults[modality]
                   for modality, given in (("text", text), ("image", image)))
    return {"text": text, "image": f"{image}+{text}" if image.startswith("keywords:") and "+" not in image else image}


def inputs_of(data, modality):
    """(which inputs each item 1..N has, by number; the distinct inputs: sentences, or paths of pictures)"""
    of = sentences_of if modality == "text" else data.image_paths
    lists = [of(item)[:MOST] for item in data.items[1:]]
    number = {x: n for n, x in enumerate(dict.fromkeys(x for xs in lists for x in xs))}
    return [[number[x] for x in xs] for xs in lists], list(number)


def sentences_of(item) -> list:
    """The title, then the sentences of the other texts, distinct, in their order. item: a row of `Data.items`."""
    return list(dict.fromkeys(s for s in (item["title"], *(s for text in item["text"] for s in END.split(text))) if s))


def fingerprint(inputs, modality) -> str:
    """SHA-256 of what is encoded: sentences, or the names and sizes of picture files, in a folder those of its frames."""
    if modality == "image":
        files = (f for p in map(Path, inputs) for f in (sorted(p.iterdir()) if p.is_dir() else [p]) if f.is_file())
        inputs = [f"{f.parent.name}/{f.name} {f.stat().st_size}" for f in files]
    return keys_sha256(inputs)


# ---------------------------------------------------------------- encoding, in parts that are kept

def extract(data, modality, encoder, keys, device):
    """Encode one modality of all items and write its feature file. Raises UserError for an encoder that cannot be had."""
    if modality == "image":
        data.fetch_pictures()
    which, inputs = inputs_of(data, modality)
    path = feature_path(data.folder, modality, encoder)
    parts = path.with_suffix(".parts")
    vectors, about = np.zeros((0, 1), np.float32), {"inputs": 0, "inputs_sha256": fingerprint([], modality)}
    if inputs:
        print(f"extracting {modality} features of {data.name} with {encoder}", flush=True)
        model = open_encoder(modality, encoder, device, data.texts)
        about = {"inputs": len(inputs), "inputs_sha256": fingerprint(inputs, modality), "template": TEMPLATE[modality],
                 **model.about}
        vectors, failures, cut = in_parts(parts, model.encode, inputs, PART[modality], {"encoder": encoder, **about})
        about |= {"failures": failures, "texts_cut": cut}
        if failures:
            print(f"{len(failures)} of {len(inputs)} pictures cannot be used, the first is "
                  f"{' ('.join(next(iter(failures.items())))}); all are named in {path.with_suffix('.json')}")
        if len(vectors) - len(failures) > 1 and not (vectors != vectors[0]).any():
            print(f"warning: {encoder} gives one and the same vector for everything in {data.name}")
    index = np.zeros((len(keys), max(1, *map(len, which))), np.int64)
    for row, numbers in zip(index, which):
        row[:len(numbers)] = np.array(numbers, np.int64) + 1
    write_features(data.folder, modality, encoder, vectors, index, keys, about)
    shutil.rmtree(parts, ignore_errors=True)


def in_parts(folder, encode, inputs, size, about):
    """encode(inputs) -> (vectors, failures, texts cut), part by part; parts that are in `folder` are not made again.

    Inputs of similar length lie in one part, the longest first. Returns the vectors (len(inputs), D) in the order of the
    inputs, the failures {input: reason}, and how many texts were cut.
    """
    about = json.loads(json.dumps(about))        # as it is read back: a tuple is a list there
    if folder.exists() and (not (folder / "about.json").is_file() or read_json(folder / "about.json") != about):
        shutil.rmtree(folder)            # parts of other inputs or of another encoder
    write_json(folder / "about.json", about)
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    rows, failures, cut = [], {}, 0
    with tqdm(total=len(inputs), desc="encoding", unit="", leave=False, disable=None) as bar:
        for first in range(0, len(inputs), size):
            part = folder / f"{first}.safetensors"
            if not part.is_file():
                vectors, *notes = encode([inputs[i] for i in order[first:first + size]])
                save_tensors(part, {"vectors": torch.from_numpy(vectors)}, notes)
            tensors, notes = load_tensors(part)
            rows.append(tensors["vectors"].numpy())
            failures |= notes[0]
            cut += notes[1]
            bar.update(len(rows[-1]))
    vectors = np.empty((len(inputs), rows[0].shape[1]), np.float32)
    vectors[order] = np.concatenate(rows)
    return vectors, failures, cut


# ---------------------------------------------------------------- the command line

def pick_device(name=None):
    """torch.device; says in one line when there is no GPU. Raises UserError for a device that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            print(f"no GPU found: running on the CPU with {torch.get_num_threads()} threads")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used here ({str(e).splitlines()[0]}): try --device cpu") from None
    return device


def add_arguments(parser):
    """The flags that say which data and which encoders."""
    datasets.add_arguments(parser)
    parser.add_argument("--text", help=f"text encoder: hash, a Hugging Face model, or an open_clip model such as {CLIP} "
                        f"(default: the features that came with the data, else {CLIP}; for the demo shops hash)")
    parser.add_argument("--image", help="image encoder: pixels, a Hugging Face model, an open_clip model, or keywords: and "
                        "one that has texts and pictures in one space (default: as for --text; for the demo shops pixels)")


def main():
    parser = argparse.ArgumentParser(description="Encode the titles and pictures of a data set.", allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    data = datasets.load_for(args)
    data.fetch_pictures()                # what an earlier run could not get is asked for again
    for modality, encoder in encoders(data, args.text, args.image).items():
        tensors = features(data, modality, args.text, args.image, device)
        _, has, stack, mask = (tensors[key] for key in KEYS[modality])
        print(f"{modality} by {encoder}: {int(has.sum())} of {data.n_items} items, {int(mask.sum())} vectors of "
              f"{stack.shape[-1]} numbers, {feature_path(data.folder, modality, encoder)}")


if __name__ == "__main__":
    command(main)
