"""The feature file: where it lies, how it is written, read and checked.

`data/<name>/features/<modality>-<encoder>.safetensors` holds two tensors,

    vectors   float32 (V+1, D)   the distinct sentences' or pictures' vectors; row 0 is zero
    index     int32 (N+1, S)     which vectors each item has; 0 means none; row 0 is padding

and the .json beside it says what the numbers are: encoder, weights, versions, template, and the
SHA-256 of the item keys, so that a file of other items, or of another order of them, is refused.
"""
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .files import (
    UserError,
    has_form,
    keys_sha256,
    load_tensors,
    read_json,
    write_json,
    write_tensors,
)

LONGEST = 120    # characters of an encoder's name in a file's name
KEYS = {    # modality -> the catalog keys that its feature file gives
    "text": ("text", "has_text", "sentences", "sentences_mask"),
    "image": ("image", "has_image", "pictures", "pictures_mask"),
}


def feature_path(folder, modality, encoder) -> Path:
    """`features/text-hash.safetensors`; in an encoder's name all but [a-z0-9_-] becomes a dash, and
    a name that no disk would take is cut."""
    name = re.sub(r"[^a-z0-9_-]+", "-", str(encoder).lower()).strip("-")
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{keys_sha256([str(encoder)])[:8]}"
    return Path(folder) / "features" / f"{modality}-{name}.safetensors"


def write_features(folder, modality, encoder, vectors, index, keys, about):
    """Write a feature file and its json.

    vectors: (V, D) of the distinct sentences or pictures; a zero row means that there is none.
    index: (N, S) of each item's vectors, 1 + row of `vectors`, 0 = none. keys: item keys in id
    order (N). about: what else fixes the numbers (weights, versions, template).
    """
    path = feature_path(folder, modality, encoder)
    vectors = np.pad(np.asarray(vectors, np.float32), ((1, 0), (0, 0)))    # (V+1, D)
    index = np.where(vectors.any(1)[index], index, 0)
    padded = np.pad(index, ((1, 0), (0, 0))).astype(np.int32)              # (N+1, S)
    write_json(path.with_suffix(".json"), {
        "modality": modality,
        "encoder": encoder,
        "items": len(keys),
        "items_with": int(index.any(1).sum()),
        "items_sha256": keys_sha256(keys),
        "shapes": {"vectors": list(vectors.shape), "index": list(padded.shape)},
        **about,
    })
    # written last, so that its presence implies the json's
    tensors = {"vectors": torch.from_numpy(vectors), "index": torch.from_numpy(padded)}
    write_tensors(path, tensors, {"file": path.name})


def about_features(path, keys, encoder) -> dict:
    """The json of a feature file. Raises UserError where it belongs to other items or encoders."""
    advice = f"remove {path}, then both are made again"
    about = read_json(path.with_suffix(".json"), dict, advice)
    about = {"notes": [], "inputs_sha256": None, "which_sha256": None} | about
    if not has_form(about["notes"], [str]):
        raise UserError(f"{path.with_suffix('.json')} has notes that are no sentences: {advice}")
    if (about.get("items_sha256"), about.get("encoder")) != (keys_sha256(keys), encoder):
        raise UserError(
            f"{path} was made for other items, for another order of them, or by another encoder: "
            f"remove it, then it is made again"
        )
    return about


def read_features(path, n_items):
    """(vectors (V+1, D), index (N+1, S)) of a feature file. Raises UserError for a damaged one."""
    tensors, about = load_tensors(path)
    vectors = tensors.get("vectors")
    index = tensors.get("index")
    fits = (
        vectors is not None
        and index is not None
        and (vectors.dtype, index.dtype) == (torch.float32, torch.int32)
        and vectors.dim() == index.dim() == 2
        and index.shape[0] == n_items + 1
        and index.shape[1] > 0
        and 0 <= index.min() <= index.max() < len(vectors)
        and isinstance(about, dict)
        and about.get("file", path.name) == path.name    # and no other encoder's
    )
    if not fits:
        raise UserError(
            f"{path} is no feature file of {n_items} items: remove it, then it is made again"
        )
    if vectors[0].any() or index[0].any() or not vectors.isfinite().all():
        raise UserError(
            f"{path} holds numbers that are not finite, or a row 0 that is not zero: remove it, "
            f"then it is made again"
        )
    return vectors, index


def catalog_of(modality, vectors, index, reads=None) -> dict:
    """The catalog keys that a feature file gives; reads: the keys that are wanted, None = all.

    text or image       float (N+1, D)     the mean of an item's vectors, zero where it has none
    has_*               bool (N+1,)        whether it has any
    sentences, pictures float (N+1, S, D)  its vectors
    *_mask              bool (N+1, S)      which of them are there
    """
    mean, has, stack, mask = KEYS[modality]
    catalog = {}
    if reads is None or mean in reads:
        catalog[mean] = F.embedding_bag(index, vectors, mode="mean", padding_idx=0)
    if reads is None or has in reads:
        catalog[has] = index.any(1)
    if reads is None or stack in reads:
        catalog[stack] = vectors[index]
    if reads is None or mask in reads:
        catalog[mask] = index != 0
    return catalog


def items_with_features(path, n_items) -> np.ndarray:
    """(N+1,) bool: which items a feature file has a vector for. Raises UserError."""
    return torch.as_tensor(read_features(path, n_items)[1]).numpy().any(1)
