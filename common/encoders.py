"""Encoders: sentences or pictures -> vectors. extract_features.py makes feature files with them.

An encoder has `about`, what fixes its numbers, and

    encode(inputs) -> vectors float32 (n, D), failures {input: reason}, how many texts were cut

where the inputs are sentences, or paths of pictures, of animations and of folders of frames. Two
are built in and need no download: `hash` and `pixels`. transformers and open_clip are imported by
the encoders that need them. No code that comes with a model is run: weights are read from
safetensors, or by torch's weights-only reader where a model has none.
"""
import math
import os
import re
import unicodedata
import zlib
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .files import (
    UserError,
    first_line,
    load_tensors,
    memory_is_full,
    precision,
    read_json,
    sha256,
)
from .pictures import BadPicture, frames

BUILT_IN = {"text": "hash", "image": "pixels"}
TOKENS = defaultdict(lambda: 2048, cuda=65536)   # by device: in a batch of sentences, with padding
BATCH = defaultdict(lambda: 32, cuda=256)        # by device: pictures, or texts of one length
WORDS = 15                                       # keywords of a picture, MSM4SR section IV-A
POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "last": "lasttoken"}    # of model@cls


def open_encoder(modality, name, device, texts=()):
    """The encoder of a name, on the device. Raises UserError for one that cannot be loaded.

    texts: the words of the data set's items, for the dictionary of `keywords:`.
    """
    if name in BUILT_IN.values():
        if name != BUILT_IN[modality]:
            raise UserError(
                f"--{modality} {name} is the other modality's encoder: give {BUILT_IN[modality]} "
                f"or a model"
            )
        return HashedText() if modality == "text" else Pixels()
    if modality == "image" and name.startswith("keywords:"):
        return Keywords(*keywords_of(name), texts, device)
    if ":" in name:
        kind = OpenClipText if modality == "text" else OpenClipPictures
    else:
        kind = TextModel if modality == "text" else VisionModel
    with whatever_it_raises(name):
        return kind(name, device)


def encode(encoder, name, inputs):
    """encoder.encode(inputs), for an encoder of strangers. Raises UserError."""
    with whatever_it_raises(name):
        return encoder.encode(inputs)


@contextmanager
def whatever_it_raises(name):
    """Files of strangers make the libraries that read them raise anything: a UserError instead."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if memory_is_full(error):
            raise
        raise UserError(
            f"the encoder {name} cannot be used ({reason_of(error)}): give another, or a complete "
            f"copy of it"
        ) from None


# ---------------- texts

class HashedText:
    """The built-in text encoder: see `hash_text`."""
    about = {"weights": "built in", "versions": {"numpy": version("numpy")}}

    def encode(self, texts):
        return hash_text(texts), {}, 0


class TextModel:
    """A Hugging Face text model.

    Pooling, the layers after it and the length limit are as its Sentence-BERT files say, else the
    mean over tokens. `name@cls`, `@mean`, `@max` or `@last` has another pooling.
    """

    def __init__(self, name, device):
        name, chosen = pooling_choice(name)
        self.model = hugging_face(name, device)
        self.device = device
        self.tokenizer = hugging_face_part("AutoTokenizer", name)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.pools_itself = hasattr(self.model, "get_text_features")    # CLIP and its kin
        if chosen and self.pools_itself:
            raise UserError(f"{name} pools its tokens by itself: give it without @")
        modules = sentence_bert_modules(name)
        self.pooling = chosen or pooling_of(name, modules)
        head, after = head_of(name, modules, self.model.config.get_text_config())
        self.head = head.to(device)
        settings = companion(name, "sentence_bert_config.json") or {}
        self.lower = settings.get("do_lower_case", False)
        longest = settings.get("max_seq_length") or 512
        positions = most_positions(self.model)
        self.limit = min(longest, self.tokenizer.model_max_length, positions)
        siglip = self.model.config.model_type in ("siglip", "siglip2")
        self.full_length = positions if siglip else 0    # SigLIP reads its padding, too
        self.about = about_model(
            name, self.model, "transformers", folders=["", *modules],
            pooling=self.pooling, after_pooling=after, most_tokens=self.limit,
        )

    @torch.inference_mode()
    def encode(self, texts):
        if self.lower:
            texts = [text.lower() for text in texts]
        tokens = self.tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: -len(tokens[i]))    # the longest first
        rows = None
        first = 0
        while first < len(order):
            # as many as fit into the budget when all are padded to the longest of them
            longest = max(len(tokens[order[first]]), self.full_length)
            size = max(1, TOKENS[self.device.type] // longest)
            batch = order[first:first + size]
            padded = self.padded([tokens[i] for i in batch])
            with precision(self.device):
                pooled = self.pool(padded.to(self.device))
            pooled = self.head(pooled)
            if rows is None:
                rows = pooled.new_empty(len(order), pooled.shape[1])
            rows[batch] = pooled
            first += len(batch)
        cut = sum(len(t) >= self.limit for t in tokens)
        return rows.cpu().numpy(), {}, cut

    def padded(self, tokens):
        """Lists of token ids -> what the model takes: (B, L)."""
        rows = {"input_ids": tokens}
        if self.full_length:    # as it was trained: without a mask
            return self.tokenizer.pad(
                rows, padding="max_length", max_length=self.full_length,
                return_attention_mask=False, return_tensors="pt",
            )
        # on the right for every model: tokens have the positions that they have without padding
        return self.tokenizer.pad(rows, padding_side="right", return_tensors="pt")

    def pool(self, tokens):
        """Tokens (B, L) -> (B, D), float32."""
        if self.pools_itself:
            return pooler_output(self.model.get_text_features(**tokens)).float()
        hidden = self.model(**tokens).last_hidden_state.float()    # (B, L, D)
        mask = tokens["attention_mask"].unsqueeze(-1)              # (B, L, 1)
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "max":
            return hidden.masked_fill(mask == 0, -torch.inf).amax(1)
        if self.pooling == "lasttoken":
            last = mask.sum(1).squeeze(-1) - 1                     # (B,): padding is on the right
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        return (hidden * mask).sum(1) / mask.sum(1)


def pooling_choice(name):
    """`org/model@cls` -> (`org/model`, the pooling chosen); any other name -> (name, None)."""
    before, _, choice = name.rpartition("@")
    if before and choice in POOLINGS:
        return before, POOLINGS[choice]
    return name, None


def most_positions(model):
    """How many tokens a text model has positions for; infinity where it sets no number."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:    # RoBERTa and its kin
            return module.num_embeddings - padding - 1    # positions begin after the padding index
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or -1    # as XLNet says it
    return most if most > 0 else math.inf


# ---------------- what Sentence-BERT's files say

def sentence_bert_modules(name) -> dict:
    """{folder: kind} of a model's modules, in their order. Raises UserError for unknown kinds."""
    listed = companion(name, "modules.json", [{"path": str, "type": str}]) or []
    modules = {module["path"]: module["type"].rpartition(".")[2] for module in listed}
    strange = set(modules.values()) - {"Transformer", "Pooling", "Dense", "Normalize"}
    if strange:
        raise UserError(
            f"{name} has modules that are not supported ({', '.join(strange)}): give another "
            f"text encoder"
        )
    return modules


def pooling_of(name, modules) -> str:
    """How a Sentence-BERT model pools its tokens, as in POOLINGS. Raises UserError for others."""
    modes = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_lasttoken": "lasttoken",
    }
    pooling = {}
    for path, kind in modules.items():
        if kind == "Pooling":
            pooling = companion(name, f"{path}/config.json") or {}
            break
    mode = pooling.get("pooling_mode")    # as newer files say it
    if not mode:
        on = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
        mode = "+".join(modes.get(key, key) for key in on) or "mean"
    if mode not in modes.values():
        raise UserError(
            f"{name} pools its tokens by {mode}, which is not supported: give another text "
            f"encoder, or choose the pooling, as in {name}@mean"
        )
    return mode


def head_of(name, modules, config):
    """What follows the pooling of a Sentence-BERT model: (its layers, what they are).

    Raises UserError for layers that do not fit the model, whose text part has the config.
    """
    layers = []
    about = []
    vectors = torch.zeros(1, getattr(config, "hidden_size", 0))    # (1, D), to try the layers on
    for path, kind in modules.items():
        if kind == "Normalize":
            layers.append(Normalize())
            about.append({"type": kind})
        if kind == "Dense":
            settings = companion(name, f"{path}/config.json") or {}
            layer, vectors = dense(name, path, settings, vectors)
            layers.append(layer)
            about.append({"type": kind, **settings})
    return torch.nn.Sequential(*layers).eval(), about


class Normalize(torch.nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


def dense(name, path, settings, vectors):
    """A Dense of sentence-transformers: (a linear layer and its activation, what they give).

    vectors: (1, D), what it is given. Raises UserError for one that cannot be used.
    """
    unlike = settings.get("module_input_name", "sentence_embedding") != "sentence_embedding"
    if unlike or settings.get("use_residual"):
        raise UserError(
            f"the module {path} of {name} works on tokens or adds its input, which is not "
            f"supported: give another text encoder"
        )
    weights = companion_file(name, f"{path}/model.safetensors")
    if weights is None:
        raise UserError(f"{name} lacks the weights {path}/model.safetensors: give a complete model")
    tensors, _ = load_tensors(weights, "give a complete model")
    kind = activation_of(name, settings.get("activation_function", "torch.nn.Tanh"))
    try:
        linear = torch.nn.Linear(
            settings["in_features"], settings["out_features"], settings.get("bias", True)
        )
        layer = torch.nn.Sequential(OrderedDict(linear=linear, activation_function=kind()))
        layer.load_state_dict(tensors)
        return layer, layer(vectors)
    except Exception as error:    # sizes that differ, an activation that needs settings
        raise UserError(
            f"the module {path} of {name} does not fit its weights or the model "
            f"({reason_of(error)}): give a complete model"
        ) from None


def activation_of(name, dotted):
    """The class in torch.nn of a dotted name. Nothing is imported. Raises UserError for others."""
    package, _, kind = dotted.rpartition(".")
    known = [*torch.nn.modules.activation.__all__, "Identity"]
    if not package.startswith("torch.nn") or kind not in known:
        raise UserError(
            f"{name} has the activation {dotted}, which is not one of torch.nn's: give another "
            f"text encoder"
        )
    return getattr(torch.nn, kind)


class OpenClipText:
    """The text side of an open_clip model."""

    def __init__(self, name, device):
        self.model, _, self.about = open_clip_model(name, device)
        self.tokenizer = open_clip_tokenizer(name)
        self.device = device
        inner = getattr(self.tokenizer, "tokenizer", None)    # of Hugging Face
        self.padding = inner.pad_token_id if inner else 0
        # a text that is cut ends in its end token, which some SigLIPs pad with as well
        self.last = -2 if inner and inner.eos_token_id == self.padding else -1

    @torch.inference_mode()
    def encode(self, texts):
        rows = []
        cut = 0
        size = BATCH[self.device.type]
        for first in range(0, len(texts), size):
            tokens = self.tokenizer(texts[first:first + size])    # (n, context length), cut to it
            cut += int((tokens[:, self.last] != self.padding).sum())
            with precision(self.device):
                rows.append(self.model.encode_text(tokens.to(self.device)).float())
        return torch.cat(rows).cpu().numpy(), {}, cut


# ---------------- pictures

class Pictures:
    """Encodes pictures, which threads open ahead.

    A kind has `prepare(PIL RGB) -> x`, `forward([x]) -> (n, D)`, and `batch`, how many at a time.
    """

    def encode(self, paths):
        blank = self.forward([self.prepare(Image.new("RGB", (64, 64)))])
        vectors = np.zeros((len(paths), blank.shape[1]), np.float32)
        failures = {}
        with ThreadPoolExecutor() as pool:
            ahead = pool.map(self.opened, paths[:self.batch])
            for first in range(0, len(paths), self.batch):
                now = list(ahead)
                after = first + self.batch
                ahead = pool.map(self.opened, paths[after:after + self.batch])
                good = []
                for place, frames_or_reason in enumerate(now, first):
                    if isinstance(frames_or_reason, str):
                        failures[paths[place]] = frames_or_reason
                    else:
                        good.append((place, frames_or_reason))
                if good:
                    each = self.forward([frame for _, prepared in good for frame in prepared])
                    ends = np.cumsum([len(prepared) for _, prepared in good])
                    for (place, _), mine in zip(good, np.split(each, ends[:-1])):
                        vectors[place] = mine.mean(0)    # over the frames: FMMS-Rec eq. (1)
        return vectors, failures, 0

    def opened(self, path):
        """The prepared frames of a picture, or the reason why there are none."""
        try:
            return frames(path, make=self.checked)
        except BadPicture as error:
            return str(error)

    def checked(self, frame):
        try:
            return self.prepare(frame)
        except ValueError as error:    # a shape that the encoder's own preparation refuses
            raise BadPicture(str(error)) from None


class Pixels(Pictures):
    """The built-in picture encoder: see `pixels`."""
    about = {
        "weights": "built in",
        "backend": "pil",
        "versions": {package: version(package) for package in ("numpy", "pillow")},
    }
    batch = 64

    def prepare(self, picture):
        return pixels([picture])[0]

    def forward(self, rows):
        return np.stack(rows)


class VisionModel(Pictures):
    """A Hugging Face vision model: CLIP's projection, else the pooled output, else the class token,
    else the mean token."""

    def __init__(self, name, device):
        self.model = hugging_face(name, device)
        self.device = device
        self.batch = BATCH[device.type]
        # backend: torchvision's results differ in bits
        self.processor = hugging_face_part("AutoImageProcessor", name, backend="pil")
        blank = self.processor(Image.new("RGB", (64, 64)), return_tensors="pt")
        more = sorted(set(blank) - {"pixel_values", "pixel_mask"})
        if more:    # as SigLIP 2 NaFlex, whose pictures have any number of pieces
            raise UserError(
                f"{name} reads more of a picture than its pixels ({', '.join(more)}), which is not "
                f"supported: give another picture encoder"
            )
        self.has_class = any(key.endswith("cls_token") for key, _ in self.model.named_parameters())
        self.about = about_model(
            name, self.model, "transformers", "pillow",
            backend="pil", processor=self.processor.to_dict(),
        )

    def prepare(self, picture):
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def forward(self, pictures):
        x = torch.stack(pictures).to(self.device)    # (n, 3, H, W)
        with precision(self.device):
            rows = self.pool(x)
        return rows.flatten(1).float().cpu().numpy()

    def pool(self, x):
        if hasattr(self.model, "get_image_features"):
            return pooler_output(self.model.get_image_features(pixel_values=x))
        output = self.model(pixel_values=x)
        rows = getattr(output, "pooler_output", None)
        if rows is not None:
            return rows
        tokens = output.last_hidden_state            # (n, L, D)
        return tokens[:, 0] if self.has_class else tokens.mean(1)


class OpenClipPictures(Pictures):
    """The picture side of an open_clip model."""

    def __init__(self, name, device):
        self.model, self.prepare, self.about = open_clip_model(name, device)
        self.device = device
        self.batch = BATCH[device.type]

    @torch.inference_mode()
    def forward(self, pictures):
        with precision(self.device):
            rows = self.model.encode_image(torch.stack(pictures).to(self.device))
        return rows.float().cpu().numpy()


class Keywords:
    """A picture as its nearest words in CLIP's space (MSM4SR section III-A2, eq. (2)).

    The paper does not define its dictionary: here, every word of three or more letters that occurs
    twice in the texts of the data set and is no function word (the paper it follows took nouns and
    verbs).
    """

    def __init__(self, most, clip, text, texts, device):
        self.most = most
        self.pictures = open_encoder("image", clip, device)
        self.text = open_encoder("text", text, device)
        counts = Counter(word for t in texts for word in re.findall(r"[^\W\d_]{3,}", t.lower()))
        self.words = sorted(w for w, n in counts.items() if n > 1 and w not in FUNCTION_WORDS)
        if len(self.words) < most:
            raise UserError(
                f"the texts of the data set have {len(self.words)} words that occur twice, too few "
                f"to describe pictures by {most}: give fewer, as in keywords:5:{clip}, or an "
                f"--image encoder without keywords:"
            )
        vectors, _, _ = open_encoder("text", clip, device).encode(self.words)
        self.space = normalized(vectors)    # (V, D)
        self.about = {
            "clip": self.pictures.about,
            "text": self.text.about,
            "words": most,
            "dictionary": len(self.words),
        }

    def encode(self, paths):
        said, failures = self.describe(paths)
        rows, _, cut = self.text.encode(said)               # eq. (2): v_l
        rows[[i for i, path in enumerate(paths) if path in failures]] = 0
        return rows, failures, cut

    def describe(self, paths):
        """The keywords of each picture as a sentence, the nearest first, and the failures: eq. (2).

        A picture that cannot be read is described as an empty one would be.
        """
        vectors, failures, _ = self.pictures.encode(paths)
        if vectors.shape[1] != self.space.shape[1]:
            raise UserError(
                "keywords: needs an encoder whose texts and pictures share one space, such as CLIP"
            )
        likeness = normalized(vectors) @ self.space.T       # f(w): (n, V)
        nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :self.most]
        return [" ".join(self.words[i] for i in row) for row in nearest], failures


def keywords_of(name):
    """`keywords:N:CLIP+TEXT` -> (N, CLIP, TEXT); without N: `WORDS`. Raises UserError for N < 1."""
    clip, text = name.removeprefix("keywords:").rsplit("+", 1)
    number = re.match(r"(-?\d+):", clip)
    if not number:
        return WORDS, clip, text
    most = int(number[1])
    if most < 1:
        raise UserError(
            f"--image {name} describes pictures by {most} words: give 1 or more, as in "
            f"keywords:5:CLIP"
        )
    return most, clip[number.end():], text


FUNCTION_WORDS = set("""
about above after again all also and any are because been before being below between both but can
could did does doing down during each few for from further had has have having her here hers him his
how into its itself just more most not now off once only other our ours out over own same she should
some such than that the their theirs them then there these they this those through too under until
very was were what when where which while who whom why will with would you your yours
""".split())


def normalized(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


# ---------------- what a model of strangers may ask for

MOST = {    # the largest number that a config may have under a name that ends so
    "layers": 1000,
    "depth": 1000,
    "depths": 1000,
    "num_labels": 10 ** 6,
    "image_size": 10 ** 4,
    "height": 10 ** 4,
    "shortest_edge": 10 ** 4,
}


def refuse_absurd(name):
    """Raises UserError for a Hugging Face model that asks for more than its files hold, before any
    of it takes memory."""
    import transformers
    if Path(name).is_dir():
        refuse_links(Path(name))
    for file in ("config.json", "preprocessor_config.json"):
        refuse_numbers(name, companion(name, file))
    config = hugging_face_part("AutoConfig", name)
    with whatever_it_raises(name):
        try:
            with torch.device("meta"):    # shapes alone
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" in str(error):    # a model that reads its weights while it is built
                return
            raise
    names = ("model.safetensors", "pytorch_model.bin")
    refuse_size(name, model, filter(None, (companion_file(name, file) for file in names)))


def refuse_links(folder):
    """Raises UserError for a link that leads out of a model's folder, and for a pipe or a device.

    The Hugging Face cache has its files as links into a folder `blobs`.
    """
    places = [Path(os.path.realpath(folder))]
    if folder.resolve().parent.name == "snapshots":
        places.append(folder.resolve().parents[1] / "blobs")
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        real = Path(os.path.realpath(path))
        if not any(place in (real, *real.parents) for place in places):
            raise UserError(
                f"{path} is a link to {real}, outside of the model's folder: put the file itself "
                f"there"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is neither a file nor a folder: give a complete model")


def refuse_numbers(name, config):
    """Raises UserError for a config with a number of layers, labels or pixels that no model has."""
    for key, number in numbers_in(config):
        most = next((MOST[end] for end in MOST if key.endswith(end)), None)
        if most is not None and not 0 <= number <= most:
            raise UserError(f"{name} has {key} {number} in its config, which no model has: give "
                            f"another encoder")


def numbers_in(value, key=""):
    """Yield (its key, the number) of every whole number in a JSON value."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from numbers_in(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from numbers_in(part, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def refuse_size(name, model, files):
    """Raises UserError where a model has more weights than its files, if it has any, have bytes."""
    held = sum(Path(file).stat().st_size for file in files)
    weights = sum(weight.numel() for weight in model.parameters())
    if 0 < held < weights:
        raise UserError(f"{name} asks for {weights} weights, and its files hold {held} bytes: give "
                        f"a complete model")


# ---------------- loading models

def hugging_face(name, device):
    """AutoModel in float32, from safetensors, else from a .bin file that holds nothing but tensors.

    Raises UserError where it lacks weights.
    """
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"    # no service is asked to convert a .bin
    refuse_absurd(name)
    model, info = hugging_face_part(
        "AutoModel", name, dtype=torch.float32, weights_only=True, output_loading_info=True
    )
    missing = set(info["missing_keys"])
    if any("pooler" not in key for key in missing):
        raise UserError(
            f"{name} lacks weights ({', '.join(sorted(missing)[:3])}, ...): give a complete model"
        )
    if missing:
        model.pooler = None    # it would be random
    if getattr(model.config, "mask_ratio", 0):
        model.config.mask_ratio = 0.0    # a masked autoencoder must see every patch
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return model.eval().to(device)


def hugging_face_part(kind, name, **options):
    """transformers.<kind>.from_pretrained(name). Raises UserError."""
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:    # no such model, no network, a foreign format
        raise UserError(
            f"the encoder {name} cannot be loaded ({reason_of(error)}): give the name or folder of "
            f"a Hugging Face model, or a built-in encoder ({' or '.join(BUILT_IN.values())})"
        ) from None


def companion(name, file, form=dict):
    """A json file that lies beside a Hugging Face model; None where there is none. form: what it
    must be, as has_form takes it. Raises UserError."""
    path = companion_file(name, file)
    return None if path is None else read_json(path, form, "give a complete model")


def companion_file(name, file):
    """The path of a file that lies beside a Hugging Face model; None where there is none."""
    from transformers.utils import cached_file
    try:
        return cached_file(name, file)
    except OSError:
        return None


def pooler_output(x):
    return getattr(x, "pooler_output", x)


def open_clip_model(name, device):
    """(model, preparation of a picture, about) of an open_clip model. Raises UserError.

    name: `architecture:tag`, `architecture:file`, `hf-hub:...` or `local-dir:...`
    """
    architecture, weights = open_clip_name(name)
    if weights is None:
        refuse_absurd_clip(name)
    with open_clip_for(name) as open_clip:
        model, prepare = open_clip.create_model_from_pretrained(
            architecture, weights, device=device, **preparation_of(architecture)
        )
    about = about_model(
        weights or name.partition(":")[2], model, "open_clip_torch", "pillow",
        backend="pil", preparation=str(prepare),
    )
    return model.eval(), prepare, about


def refuse_absurd_clip(name):
    """`refuse_absurd` of `hf-hub:...` and `local-dir:...`."""
    place = name.partition(":")[2]
    files = []
    if name.startswith("local-dir:"):
        refuse_links(Path(place))
        files = [*Path(place).glob("*.safetensors"), *Path(place).glob("*.bin")]
    refuse_numbers(name, companion(place, "open_clip_config.json"))
    with open_clip_for(name) as open_clip, torch.device("meta"):    # shapes alone
        model = open_clip.create_model(
            name, load_weights=False, pretrained_text=False, device="meta"
        )
    refuse_size(name, model, files)


def open_clip_tokenizer(name):
    architecture, _ = open_clip_name(name)
    with open_clip_for(name) as open_clip:
        return open_clip.get_tokenizer(architecture)


def open_clip_name(name):
    """(architecture, tag or file), as open_clip takes them."""
    architecture, _, weights = name.partition(":")
    if architecture in ("hf-hub", "local-dir"):
        return name, None
    return architecture, weights


@contextmanager
def open_clip_for(name):
    """open_clip, to load an encoder with. Raises UserError for whatever goes wrong."""
    try:
        import open_clip
        from transformers import dynamic_module_utils
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0    # code of a text model: refused, not asked
        yield open_clip
    except Exception as error:    # not installed, no such tag, no network, a bad file
        raise UserError(
            f"the open_clip encoder {name} cannot be loaded ({reason_of(error)}): give "
            f"architecture:tag, architecture:checkpoint file, or a built-in encoder "
            f"({' or '.join(BUILT_IN.values())})"
        ) from None


def preparation_of(architecture) -> dict:
    """How open_clip's own weights of an architecture want pictures, for weights given as a file.

    {} where it has none, or where they differ: then open_clip's default stays.
    """
    import open_clip
    names = ("mean", "std", "interpolation", "resize_mode")
    ways = []
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        config = open_clip.get_pretrained_cfg(architecture, tag)
        way = {f"image_{name}": config.get(name) for name in names}
        if way not in ways:
            ways.append(way)
    return ways[0] if len(ways) == 1 else {}


def reason_of(error) -> str:
    if type(error).__name__ == "UnpicklingError":    # torch's message tells how to run the file
        return "its weights are damaged or hold more than tensors"
    if "trust_remote_code" in str(error):    # the message tells how to run it
        return "it needs code of its own, which is not run"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other sizes than its config says"
    return f"{type(error).__name__}: {first_line(error)}"


def about_model(name, model, *packages, folders=("",), **more) -> dict:
    """What fixes a model's numbers: the SHA-256 of weights on disk, else name and commit.

    folders: those inside a model's folder that have weights.
    """
    place = Path(name)
    files = {place.name: place} if place.is_file() else {}
    for folder in folders:
        inside = [*(place / folder).glob("*.safetensors"), *(place / folder).glob("*.bin")]
        files |= {(Path(folder) / file.name).as_posix(): file for file in sorted(inside)}
    return {
        "weights": {key: sha256(file) for key, file in files.items()} or name,
        "commit": getattr(getattr(model, "config", None), "_commit_hash", None),
        "precision": "bfloat16" if next(model.parameters()).is_cuda else "float32",
        "versions": {package: version(package) for package in ("torch", *packages)},
        **more,
    }


# ---------------- what is built in

CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"    # Japanese, Chinese, Korean
RUN = re.compile(rf"([{CJK}]+)|([^\W_{CJK}]+)")


def hash_text(texts, dim=256):
    """Words of 4 or more letters, and every word's trigrams at weight .35. -> float32 (n, dim)

    Chinese, Japanese and Korean runs give character bigrams, which stand in for words there. Each
    token is a normal vector seeded by its crc32; they are summed and scaled to length 1. Nothing
    is learned from the catalog, so two catalogs share one space. A text without a letter or digit
    is a zero row.
    """
    random = np.random.RandomState()    # seeding one again is far cheaper than making a new one

    @lru_cache(maxsize=1 << 16)
    def vector(token):
        random.seed(zlib.crc32(token.encode("utf-8", "replace")))
        return random.standard_normal(dim).astype(np.float32)

    features = np.zeros((len(texts), dim), np.float32)
    for row, text in zip(features, texts):
        tokens = weighted_tokens(text)
        if tokens:
            vectors = np.concatenate([vector(token) for token in tokens]).reshape(-1, dim)
            row += np.array(list(tokens.values()), np.float32) @ vectors
            row /= np.linalg.norm(row)
    return features


def weighted_tokens(text) -> Counter:
    """token -> weight, summed over its occurrences in a text."""
    weights = Counter()
    for dense, word in RUN.findall(unicodedata.normalize("NFKC", text).lower()):
        if dense:
            for i in range(max(len(dense) - 1, 1)):
                weights[dense[i:i + 2]] += 1
        if word:
            for i in range(max(len(word) - 2, 1)):
                weights[word[i:i + 3]] += .35
        if len(word) >= 4:
            weights[word] += 1
    return weights


def pixels(pictures, dim=128):
    """Simple looks of RGB pictures (PIL) of any size. -> float32 (n, dim)

    Five blocks, each of length 1: a 12 x 12 thumbnail, a hue histogram, edge orientations, a
    silhouette (what is colourful where), and the low frequencies of the middle; then one fixed
    random projection. Nothing is learned.
    """
    window = (np.hanning(24)[:, None] * np.hanning(24)).astype(np.float32)
    features = []
    for picture in pictures:
        rgb = np.asarray(picture.resize((48, 48), Image.BOX), np.float32) / 255
        red, green, blue = np.moveaxis(rgb, -1, 0)
        grey = rgb.mean(-1)
        spread = np.ptp(rgb, axis=-1)    # how colourful
        hue = np.arctan2(1.732 * (green - blue), 2 * red - green - blue)
        down, right = np.gradient(grey)
        edges = by_angle(np.arctan2(down, right), np.hypot(down, right), np.pi, 8)
        middle = grey[12:36, 12:36] - grey[12:36, 12:36].mean()
        blocks = [
            cells(rgb, 12) - .5,
            by_angle(hue, spread, 2 * np.pi, 12).mean((0, 1)),
            cells(edges, 3),
            cells(spread, 12),
            np.abs(np.fft.rfft2(middle * window))[:8, :8],
        ]
        row = np.concatenate([b.ravel() / max(np.linalg.norm(b), 1e-3) for b in blocks])
        features.append(row @ projection(len(row), dim))
    return np.array(features, np.float32).reshape(-1, dim)


def by_angle(angle, strength, turn, bins):
    """Each pixel's strength, shared by the two nearest bins: (H, W) -> (H, W, bins)."""
    ahead = (angle * np.float32(bins / turn))[..., None] - np.arange(bins, dtype=np.float32)
    apart = np.abs((ahead + bins / 2) % bins - bins / 2)
    return np.maximum(1 - apart, 0) * strength[..., None]


def cells(x, n):
    """(48, 48, ...) -> means of n x n equal cells (n, n, ...)."""
    return x.reshape(n, 48 // n, n, 48 // n, *x.shape[2:]).mean((1, 3))


@lru_cache
def projection(rows, columns):
    return np.random.RandomState(0).standard_normal((rows, columns)) / np.sqrt(columns)
