"""Titles and pictures -> frozen features, made once: `data/<name>/features/<modality>-<encoder>.safetensors`.

    python extract_features.py --data demo --text hash --image pixels

train.py does this by itself where features are missing. A file holds the catalog keys of its modality (`text`,
`has_text`; `image`, `has_image`), one row per item id, row 0 zero; an item without the modality has a zero row and
False. The json beside it says what the numbers are: encoder, versions, text template, SHA-256 of the item keys. A file
of other items or of another order is refused.

Two encoders are built in and need no download: `hash` for text, `pixels` for pictures.
"""
import argparse
import re
import unicodedata
import zlib
from collections import Counter
from functools import lru_cache
from importlib.metadata import version

import numpy as np
from PIL import Image
from tqdm import tqdm

import data as datasets
from sources import NAMES
from sources.common import UserError, command, feature_path, keys_sha256, load_tensors, read_json, write_features

KEYS = {"text": ("text", "has_text"), "image": ("image", "has_image")}
DEFAULTS = {"text": "hash", "image": "pixels"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")     # the only ones that are opened


def features(data, modality, encoder=None) -> dict:
    """Catalog keys of one modality ("text" or "image") as tensors; extracts them first where they are missing.

    encoder: None = the features that came with the data, else the default one. Raises UserError for an unknown
    encoder, and for a feature file that is damaged or belongs to other items.
    """
    encoder = encoder or data.about["features"].get(modality) or DEFAULTS[modality]
    path = feature_path(data.folder, modality, encoder)
    keys = [item["key"] for item in data.items[1:]]
    if not path.is_file():
        extract(data, modality, encoder, keys)
    about, tensors = read_json(path.with_suffix(".json")), load_tensors(path)[0]
    if about["items_sha256"] != keys_sha256(keys) or any(len(t) != len(keys) + 1 for t in tensors.values()):
        raise UserError(f"{path} was made for other items, or for another order of them, than {data.folder} holds: "
                        f"remove it, then it is made again")
    if not (tensors[modality].isfinite().all() and not tensors[modality][0].any()):
        raise UserError(f"{path} holds numbers that are not finite, or a row 0 that is not zero: remove it")
    return tensors


def extract(data, modality, encoder, keys):
    """Encode one modality of all items and write it. Raises UserError for an encoder that is not known."""
    if encoder not in ENCODERS[modality]:
        raise UserError(f"--{modality} {encoder} is not known: give {' or '.join(ENCODERS[modality])}")
    print(f"extracting {modality} features of {data.name} with {encoder}", flush=True)
    rows, about = ENCODERS[modality][encoder](data)
    rows = np.concatenate([np.zeros((1, rows.shape[1]), np.float32), rows])
    write_features(data.folder, modality, encoder, {modality: rows, f"has_{modality}": rows.any(1)}, keys,
                   {"weights": "built in", "versions": {p: version(p) for p in ("numpy", "pillow")}, **about})


def hashed_texts(data):
    """(N, 256): title, then sentences, joined by a full stop."""
    return hash_text(data.texts[1:]), {"template": "title. sentence. sentence"}


def pixel_pictures(data):
    """(N, 128): each item's first picture; the names of pictures that cannot be read go into the json."""
    paths, failures = [data.image_path(item) for item in data.items[1:]], {}
    rows = np.zeros((len(paths), 128), np.float32)
    for i, path in enumerate(tqdm(paths, desc="pictures", unit="", leave=False, disable=None)):
        if path:
            try:
                with Image.open(path, formats=FORMATS) as picture:
                    rows[i] = pixels([picture.convert("RGB")])[0]
            except Exception as e:       # Pillow raises many types for damaged files; one bad file is one failure
                failures[path] = f"{type(e).__name__}: {e}"
    if failures:
        print(f"{len(failures)} pictures could not be read, the first is {next(iter(failures))}")
    return rows, {"failures": failures}


ENCODERS = {"text": {"hash": hashed_texts}, "image": {"pixels": pixel_pictures}}


def hash_text(texts, dim=256):
    """The built-in text encoder: words of 4 or more letters, and every word's trigrams at weight .35. float32 (n, dim)

    Chinese, Japanese and Korean runs give character bigrams, which stand in for words there. Each token is a normal
    vector seeded by its crc32; they are summed and scaled to length 1. Nothing is learned from the catalog, so two
    catalogs share one space. A text without a letter or digit gives a zero row.
    """
    cjk = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"
    run = re.compile(rf"([{cjk}]+)|([^\W_{cjk}]+)")
    random = np.random.RandomState()                       # seeding one again is far cheaper than making a new one

    @lru_cache(maxsize=1 << 16)
    def vector(token):
        random.seed(zlib.crc32(token.encode("utf-8", "replace")))
        return random.standard_normal(dim).astype(np.float32)

    features = np.zeros((len(texts), dim), np.float32)
    for row, text in zip(features, texts):
        weights = Counter()
        for dense, word in run.findall(unicodedata.normalize("NFKC", text).lower()):
            for i in range(max(len(dense) - 1, 1) if dense else 0):
                weights[dense[i:i + 2]] += 1
            for i in range(max(len(word) - 2, 1) if word else 0):
                weights[word[i:i + 3]] += .35
            if len(word) >= 4:
                weights[word] += 1
        if weights:
            vectors = np.concatenate([vector(token) for token in weights]).reshape(-1, dim)
            row += np.array(list(weights.values()), np.float32) @ vectors
            row /= np.linalg.norm(row)
    return features


def pixels(pictures, dim=128):
    """The built-in picture encoder, for RGB pictures (PIL) of any size. float32 (n, dim)

    Five blocks, each of length 1: a 12 x 12 thumbnail, a hue histogram, edge orientations, a silhouette (what is
    colourful where), and the low frequencies of the middle; then one fixed random projection. Nothing is learned.
    """
    def angles(angle, strength, turn, bins):
        """Each pixel's strength, shared by the two bins nearest to its angle: (H, W) -> (H, W, bins)"""
        ahead = (angle * np.float32(bins / turn))[..., None] - np.arange(bins, dtype=np.float32)
        apart = np.abs((ahead + bins / 2) % bins - bins / 2)
        return np.maximum(1 - apart, 0) * strength[..., None]

    def pool(x, n):
        """(48, 48, ...) -> means of n x n equal cells (n, n, ...)"""
        return x.reshape(n, 48 // n, n, 48 // n, *x.shape[2:]).mean((1, 3))

    window = (np.hanning(24)[:, None] * np.hanning(24)).astype(np.float32)
    features = []
    for picture in pictures:
        rgb = np.asarray(picture.resize((48, 48), Image.BOX), np.float32) / 255
        red, green, blue = np.moveaxis(rgb, -1, 0)
        grey, spread = rgb.mean(-1), np.ptp(rgb, axis=-1)
        down, right = np.gradient(grey)
        hue = np.arctan2(1.732 * (green - blue), 2 * red - green - blue)
        edges = angles(np.arctan2(down, right), np.hypot(down, right), np.pi, 8)
        middle = grey[12:36, 12:36] - grey[12:36, 12:36].mean()
        blocks = [pool(rgb, 12) - .5, angles(hue, spread, 2 * np.pi, 12).mean((0, 1)), pool(edges, 3),
                  pool(spread, 12), np.abs(np.fft.rfft2(middle * window))[:8, :8]]
        blocks = np.concatenate([block.ravel() / max(np.linalg.norm(block), 1e-3) for block in blocks])
        features.append(blocks @ projection(len(blocks), dim))
    return np.array(features, np.float32).reshape(-1, dim)


@lru_cache
def projection(rows, columns):
    return np.random.RandomState(0).standard_normal((rows, columns)) / np.sqrt(columns)


def main():
    parser = argparse.ArgumentParser(description="Encode the titles and pictures of a data set.", allow_abbrev=False)
    parser.add_argument("--data", required=True, help=f"a folder, or one of {', '.join(NAMES)}")
    parser.add_argument("--text", help="text encoder (default: the features that came with the data, else hash)")
    parser.add_argument("--image", help="image encoder (default: the features that came with the data, else pixels)")
    parser.add_argument("--core", type=int, help="k-core on users and items (default: the source's own)")
    args = parser.parse_args()
    data = datasets.load(args.data, core=args.core)
    for modality, encoder in (("text", args.text), ("image", args.image)):
        tensors = features(data, modality, encoder)
        print(f"{modality}: {int(tensors[f'has_{modality}'].sum())} of {data.n_items} items, "
              f"{tensors[modality].shape[1]} numbers each")


if __name__ == "__main__":
    command(main)
