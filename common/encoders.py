"""Encoders: sentences or pictures -> vectors. extract_features.py makes feature files with them.

An encoder has `about`, what fixes its numbers, and

    encode(inputs) -> vectors float32 (n, D), failures {input: reason}, how many texts were cut

where the inputs are sentences, or paths of pictures, of animations and of folders of frames. Two
are built in and need no download: `hash` and `pixels`. transformers and open_clip are imported by
the encoders that need them. No code that comes with a model is run, and weights are read from
safetensors.
"""
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .files import UserError, precision, read_json, sha256
from .pictures import BadPicture, frames

BUILT_IN = {"text": "hash", "image": "pixels"}
TOKENS = defaultdict(lambda: 2048, cuda=65536)   # by device: in a batch of sentences, with padding
BATCH = defaultdict(lambda: 32, cuda=256)        # by device: pictures, or texts of one length
WORDS = 15                                       # keywords of a picture, MSM4SR section IV-A


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
        clip, text = name.removeprefix("keywords:").rsplit("+", 1)
        return Keywords(clip, text, texts, device)
    if ":" in name:
        kind = OpenClipText if modality == "text" else OpenClipPictures
    else:
        kind = TextModel if modality == "text" else VisionModel
    return kind(name, device)


# ---------------- texts

class HashedText:
    """The built-in text encoder: see `hash_text`."""
    about = {"weights": "built in", "versions": {"numpy": version("numpy")}}

    def encode(self, texts):
        return hash_text(texts), {}, 0


class TextModel:
    """A Hugging Face text model.

    Pooling, length limit and scaling are as its Sentence-BERT files say, else the mean over tokens.
    """

    def __init__(self, name, device):
        self.model = hugging_face(name, device)
        self.device = device
        self.tokenizer = hugging_face_part("AutoTokenizer", name)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        listed = companion(name, "modules.json") or []
        modules = {module["path"]: module["type"].rpartition(".")[2] for module in listed}
        strange = set(modules.values()) - {"Transformer", "Pooling", "Normalize"}
        if strange:
            raise UserError(
                f"{name} has modules that are not supported ({', '.join(strange)}): give another "
                f"text encoder"
            )
        self.pooling = pooling_of(name, modules)
        self.normalize = "Normalize" in modules.values()
        settings = companion(name, "sentence_bert_config.json") or {}
        self.lower = settings.get("do_lower_case", False)
        longest = settings.get("max_seq_length") or 512
        self.limit = min(longest, self.tokenizer.model_max_length)
        self.about = about_model(
            name, self.model, "transformers",
            pooling=self.pooling, normalized=self.normalize, most_tokens=self.limit,
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
            size = max(1, TOKENS[self.device.type] // len(tokens[order[first]]))
            batch = order[first:first + size]
            rows_of_ids = {"input_ids": [tokens[i] for i in batch]}
            padded = self.tokenizer.pad(rows_of_ids, return_tensors="pt")
            with precision(self.device):
                pooled = self.pool(padded.to(self.device))
            if rows is None:
                rows = pooled.new_empty(len(order), pooled.shape[1])
            rows[batch] = pooled
            first += len(batch)
        cut = sum(len(t) >= self.limit for t in tokens)
        return rows.cpu().numpy(), {}, cut

    def pool(self, tokens):
        """Tokens (B, L) -> (B, D), float32."""
        if hasattr(self.model, "get_text_features"):    # CLIP and its kin
            return pooler_output(self.model.get_text_features(**tokens)).float()
        hidden = self.model(**tokens).last_hidden_state.float()    # (B, L, D)
        mask = tokens["attention_mask"].unsqueeze(-1)              # (B, L, 1)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "max":
            pooled = hidden.masked_fill(mask == 0, -torch.inf).amax(1)
        else:
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def pooling_of(name, modules) -> str:
    """How a Sentence-BERT model pools its tokens: cls, mean or max. Raises UserError for others."""
    modes = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
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
            f"{name} pools its tokens by {mode}, which is not supported: give another text encoder"
        )
    return mode


class OpenClipText:
    """The text side of an open_clip model."""

    def __init__(self, name, device):
        self.model, self.tokenizer, _, self.about = open_clip_model(name, device)
        self.device = device

    @torch.inference_mode()
    def encode(self, texts):
        rows = []
        cut = 0
        size = BATCH[self.device.type]
        for first in range(0, len(texts), size):
            tokens = self.tokenizer(texts[first:first + size])    # (n, context length), cut to it
            cut += int((tokens[:, -1] != 0).sum())
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
        self.model, _, self.prepare, self.about = open_clip_model(name, device)
        self.device = device
        self.batch = BATCH[device.type]

    @torch.inference_mode()
    def forward(self, pictures):
        with precision(self.device):
            rows = self.model.encode_image(torch.stack(pictures).to(self.device))
        return rows.float().cpu().numpy()


class Keywords:
    """A picture as its nearest words in CLIP's space (MSM4SR section IV-A, eqs. 1-2).

    The paper does not define its dictionary: here, every word of three or more letters that occurs
    twice in the texts of the data set and is no function word (the paper it follows took nouns and
    verbs).
    """

    def __init__(self, clip, text, texts, device):
        self.pictures = open_encoder("image", clip, device)
        self.text = open_encoder("text", text, device)
        counts = Counter(word for t in texts for word in re.findall(r"[^\W\d_]{3,}", t.lower()))
        self.words = sorted(w for w, n in counts.items() if n > 1 and w not in FUNCTION_WORDS)
        if len(self.words) < WORDS:
            raise UserError(
                f"the texts of the data set have {len(self.words)} words that occur twice, too few "
                f"to describe pictures: give an --image encoder without keywords:"
            )
        vectors, _, _ = open_encoder("text", clip, device).encode(self.words)
        self.space = normalized(vectors)    # (V, D)
        self.about = {
            "clip": self.pictures.about,
            "text": self.text.about,
            "words": WORDS,
            "dictionary": len(self.words),
        }

    def encode(self, paths):
        vectors, failures, _ = self.pictures.encode(paths)
        if vectors.shape[1] != self.space.shape[1]:
            raise UserError(
                "keywords: needs an encoder whose texts and pictures share one space, such as CLIP"
            )
        likeness = normalized(vectors) @ self.space.T                           # eq. (1): (n, V)
        nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :WORDS]
        said = [" ".join(self.words[i] for i in row) for row in nearest]        # eq. (2)
        rows, _, cut = self.text.encode(said)
        rows[[i for i, path in enumerate(paths) if path in failures]] = 0
        return rows, failures, cut


FUNCTION_WORDS = set("""
about above after again all also and any are because been before being below between both but can
could did does doing down during each few for from further had has have having her here hers him his
how into its itself just more most not now off once only other our ours out over own same she should
some such than that the their theirs them then there these they this those through too under until
very was were what when where which while who whom why will with would you your yours
""".split())


def normalized(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


# ---------------- loading models

def hugging_face(name, device):
    """AutoModel in float32, from safetensors only. Raises UserError where it lacks weights."""
    model, info = hugging_face_part(
        "AutoModel", name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
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


def companion(name, file):
    """A json file that lies beside a Hugging Face model; None where there is none."""
    from transformers.utils import cached_file
    try:
        return read_json(cached_file(name, file))
    except OSError:
        return None


def pooler_output(x):
    return getattr(x, "pooler_output", x)


def open_clip_model(name, device):
    """(model, tokenizer, preparation of a picture, about) of an open_clip model. Raises UserError.

    name: `architecture:tag`, `architecture:file`, `hf-hub:...` or `local-dir:...`
    """
    architecture, _, weights = name.partition(":")
    if architecture in ("hf-hub", "local-dir"):
        architecture, weights = name, None
    try:
        import open_clip
        from transformers import dynamic_module_utils
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0    # code of a text model: refused, not asked
        create = open_clip.create_model_from_pretrained
        model, prepare = create(architecture, weights, device=device)
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:    # not installed, no such tag, no network, a bad file
        raise UserError(
            f"the open_clip encoder {name} cannot be loaded ({reason_of(error)}): give "
            f"architecture:tag, architecture:checkpoint file, or a built-in encoder "
            f"({' or '.join(BUILT_IN.values())})"
        ) from None
    about = about_model(
        weights or name.partition(":")[2], model, "open_clip_torch", "pillow",
        backend="pil", preparation=str(prepare),
    )
    return model.eval(), tokenizer, prepare, about


def reason_of(error) -> str:
    message = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {message.splitlines()[0]}"


def about_model(name, model, *packages, **more) -> dict:
    """What fixes a model's numbers: the SHA-256 of weights on disk, else name and commit."""
    place = Path(name)
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
    else:
        files = [place] if place.is_file() else []
    return {
        "weights": {file.name: sha256(file) for file in files} or name,
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
