"""Encoders: sentences or pictures -> vectors. extract_features.py makes feature files with them.

An encoder has `about`, what fixes its numbers, and `encode(inputs) -> (vectors (n, D) float32, failures {input: reason},
texts cut)`, where the inputs are sentences, or paths of pictures, of animations and of folders of frames. Two are built
in and need no download: `hash` and `pixels`. transformers and open_clip are imported by the encoders that need them.
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

from sources.common import UserError, read_json, sha256
from sources.pictures import BadPicture, frames

BUILT_IN = {"text": "hash", "image": "pixels"}
TOKENS = defaultdict(lambda: 2048, cuda=65536)   # by device: in one batch of sentences, padding included
BATCH = defaultdict(lambda: 32, cuda=256)        # pictures, or texts that are all padded to one length
WORDS = 15                               # keywords of a picture, MSM4SR section IV-A


def precision(device):
    """Mixed precision on a GPU: the context that a forward pass runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def open_encoder(modality, name, device, texts=()):
    """The encoder of a name, on the device. texts: of the data set, for the dictionary of `keywords:`. Raises UserError."""
    if name in BUILT_IN.values():
        if name != BUILT_IN[modality]:
            raise UserError(f"--{modality} {name} is the other modality's encoder: give {BUILT_IN[modality]} or a model")
        return {"text": HashedText, "image": Pixels}[modality]()
    if modality == "image" and name.startswith("keywords:"):
        return Keywords(*name.removeprefix("keywords:").rsplit("+", 1), texts, device)
    if ":" in name:
        return {"text": OpenClipText, "image": OpenClipPictures}[modality](name, device)
    return {"text": TextModel, "image": VisionModel}[modality](name, device)


class Pictures:
    """Encodes pictures, opened ahead in threads. Kinds have `prepare(PIL RGB) -> x`, `forward([x]) -> (n, D)`, `batch`."""

    def encode(self, paths):
        def prepare(frame):
            try:
                return self.prepare(frame)
            except ValueError as e:      # a shape that the encoder's own preparation refuses
                raise BadPicture(str(e)) from None

        def prepared(path):
            try:
                return frames(path, make=prepare)
            except BadPicture as e:
                return str(e)

        vectors = np.zeros((len(paths), self.forward([self.prepare(Image.new("RGB", (64, 64)))]).shape[1]), np.float32)
        failures, starts = {}, range(0, len(paths), self.batch)
        with ThreadPoolExecutor() as pool:
            ahead = pool.map(prepared, paths[:self.batch])
            for first in starts:
                now, ahead = list(ahead), pool.map(prepared, paths[first + self.batch:first + 2 * self.batch])
                good = [i for i, x in enumerate(now) if not isinstance(x, str)]
                failures |= {paths[first + i]: x for i, x in enumerate(now) if isinstance(x, str)}
                if good:
                    each = self.forward([frame for i in good for frame in now[i]])
                    ends = np.cumsum([len(now[i]) for i in good])
                    for i, mine in zip(good, np.split(each, ends[:-1])):
                        vectors[first + i] = mine.mean(0)                          # FMMS-Rec eq. (1)
        return vectors, failures, 0


class HashedText:
    about = {"weights": "built in", "versions": {"numpy": version("numpy")}}

    def encode(self, texts):
        return hash_text(texts), {}, 0


class Pixels(Pictures):
    about = {"weights": "built in", "backend": "pil", "versions": {p: version(p) for p in ("numpy", "pillow")}}
    batch = 64

    def prepare(self, picture):
        return pixels([picture])[0]

    def forward(self, rows):
        return np.stack(rows)


class TextModel:
    """A Hugging Face text model. Pooling, length limit and scaling as its Sentence-BERT files say, else the masked mean."""

    def __init__(self, name, device):
        self.model, self.device = hugging_face(name, device), device
        self.tokenizer = hugging_face_part("AutoTokenizer", name)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        kinds = {m["path"]: m["type"].rpartition(".")[2] for m in companion(name, "modules.json") or []}
        if strange := set(kinds.values()) - {"Transformer", "Pooling", "Normalize"}:
            raise UserError(f"{name} has modules that are not supported ({', '.join(strange)}): give another text encoder")
        pooling = next((companion(name, f"{path}/config.json") for path, kind in kinds.items() if kind == "Pooling"), {})
        modes = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max"}
        old = [mode for key, mode in modes.items() if pooling.get(key)] + [
            key for key, on in pooling.items() if key.startswith("pooling_mode_") and on and key not in modes]
        self.pooling = pooling.get("pooling_mode") or "+".join(old) or "mean"
        if self.pooling not in modes.values():
            raise UserError(f"{name} pools its tokens by {self.pooling}, which is not supported: give another text encoder")
        self.normalize, settings = "Normalize" in kinds.values(), companion(name, "sentence_bert_config.json") or {}
        self.lower = settings.get("do_lower_case", False)
        self.limit = min(settings.get("max_seq_length") or 512, self.tokenizer.model_max_length)
        self.about = about_model(name, self.model, "transformers", pooling=self.pooling, normalized=self.normalize,
                                 most_tokens=self.limit)

    @torch.inference_mode()
    def encode(self, texts):
        texts = [text.lower() for text in texts] if self.lower else texts
        tokens = self.tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: -len(tokens[i]))
        rows, first, budget = None, 0, TOKENS[self.device.type]
        while first < len(order):
            batch = order[first:first + max(1, budget // len(tokens[order[first]]))]
            x = self.tokenizer.pad({"input_ids": [tokens[i] for i in batch]}, return_tensors="pt").to(self.device)
            with precision(self.device):
                pooled = self.pool(x)
            if rows is None:
                rows = pooled.new_empty(len(order), pooled.shape[1])
            rows[batch] = pooled
            first += len(batch)
        return rows.cpu().numpy(), {}, sum(len(t) >= self.limit for t in tokens)

    def pool(self, x):                                           # tokens (B, L) -> (B, D), float32
        if hasattr(self.model, "get_text_features"):             # CLIP and its kin
            return pooler_output(self.model.get_text_features(**x)).float()
        hidden, mask = self.model(**x).last_hidden_state.float(), x["attention_mask"].unsqueeze(-1)        # (B, L, D)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "max":
            pooled = hidden.masked_fill(mask == 0, -torch.inf).amax(1)
        else:
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


class VisionModel(Pictures):
    """A Hugging Face vision model: CLIP's projection, else its pooled output, else the class token, else the mean token."""

    def __init__(self, name, device):
        self.model, self.device, self.batch = hugging_face(name, device), device, BATCH[device.type]
        self.processor = hugging_face_part("AutoImageProcessor", name, backend="pil")     # torchvision's differs in bits
        self.has_class = any(key.endswith("cls_token") for key, _ in self.model.named_parameters())
        self.about = about_model(name, self.model, "transformers", "pillow", backend="pil",
                                 processor=self.processor.to_dict())

    def prepare(self, picture):
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def forward(self, pictures):
        x = torch.stack(pictures).to(self.device)                                  # (n, 3, H, W)
        with precision(self.device):
            if hasattr(self.model, "get_image_features"):
                rows = pooler_output(self.model.get_image_features(pixel_values=x))
            else:
                output = self.model(pixel_values=x)
                rows = getattr(output, "pooler_output", None)
                if rows is None:
                    tokens = output.last_hidden_state                              # (n, L, D)
                    rows = tokens[:, 0] if self.has_class else tokens.mean(1)
        return rows.flatten(1).float().cpu().numpy()


class OpenClipText:
    def __init__(self, name, device):
        self.model, self.tokenizer, _, self.about = open_clip_model(name, device)
        self.device = device

    @torch.inference_mode()
    def encode(self, texts):
        rows, cut, size = [], 0, BATCH[self.device.type]
        for first in range(0, len(texts), size):
            tokens = self.tokenizer(texts[first:first + size])                     # (n, context length), cut to it
            cut += int((tokens[:, -1] != 0).sum())
            with precision(self.device):
                rows.append(self.model.encode_text(tokens.to(self.device)).float())
        return torch.cat(rows).cpu().numpy(), {}, cut


class OpenClipPictures(Pictures):
    def __init__(self, name, device):
        self.model, _, self.prepare, self.about = open_clip_model(name, device)
        self.device, self.batch = device, BATCH[device.type]

    @torch.inference_mode()
    def forward(self, pictures):
        with precision(self.device):
            return self.model.encode_image(torch.stack(pictures).to(self.device)).float().cpu().numpy()


class Keywords:
    """A picture as the sentence of its WORDS nearest words in CLIP's space, nearest first (MSM4SR section IV-A, eqs 1-2).

    The paper does not define its dictionary: here, every word of three or more letters that occurs twice in the texts of
    the data set and is no function word (the paper it follows took nouns and verbs).
    """

    def __init__(self, clip, text, texts, device):
        self.pictures, self.text = open_encoder("image", clip, device), open_encoder("text", text, device)
        words = Counter(w for t in texts for w in re.findall(r"[^\W\d_]{3,}", t.lower()))
        self.words = sorted(w for w, n in words.items() if n > 1 and w not in FUNCTION_WORDS)
        if len(self.words) < WORDS:
            raise UserError(f"the texts of the data set have {len(self.words)} words that occur twice, too few to describe "
                            f"pictures: give an --image encoder without keywords:")
        self.space = normalized(open_encoder("text", clip, device).encode(self.words)[0])
        self.about = {"clip": self.pictures.about, "text": self.text.about, "words": WORDS, "dictionary": len(self.words)}

    def encode(self, paths):
        vectors, failures, _ = self.pictures.encode(paths)
        if vectors.shape[1] != self.space.shape[1]:
            raise UserError("keywords: needs an encoder whose texts and pictures share one space, such as CLIP")
        nearest = np.argsort(-normalized(vectors) @ self.space.T, axis=1, kind="stable")[:, :WORDS]        # eq. (1)
        rows, _, cut = self.text.encode([" ".join(self.words[i] for i in near) for near in nearest])       # eq. (2)
        rows[[i for i, path in enumerate(paths) if path in failures]] = 0
        return rows, failures, cut


FUNCTION_WORDS = set("""about above after again all also and any are because been before being below between both but can
could did does doing down during each few for from further had has have having her here hers him his how into its itself
just more most not now off once only other our ours out over own same she should some such than that the their theirs them
then there these they this those through too under until very was were what when where which while who whom why will with
would you your yours""".split())


def normalized(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def hugging_face(name, device):
    """AutoModel in float32, weights as safetensors only. Raises UserError where it cannot be had or lacks weights."""
    model, info = hugging_face_part("AutoModel", name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = set(info["missing_keys"])
    if {key for key in missing if "pooler" not in key}:
        raise UserError(f"{name} lacks weights ({', '.join(sorted(missing)[:3])}, ...): give a complete model")
    if missing:
        model.pooler = None              # it would be random
    if getattr(model.config, "mask_ratio", 0):
        model.config.mask_ratio = 0.0    # a masked autoencoder must see every patch
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    return model.eval().to(device)


def hugging_face_part(kind, name, **options):
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except Exception as e:               # a missing file, a missing network, a foreign format: each has its own type
        raise UserError(f"the encoder {name} cannot be loaded ({reason_of(e)}): give the name or folder of a Hugging Face "
                        f"model, or a built-in encoder ({' or '.join(BUILT_IN.values())})") from None


def companion(name, file):
    """A json file that lies beside a Hugging Face model, parsed; None where there is none."""
    from transformers.utils import cached_file
    try:
        return read_json(cached_file(name, file))
    except OSError:
        return None


def pooler_output(x):
    return getattr(x, "pooler_output", x)


def open_clip_model(name, device):
    """`architecture:tag`, `architecture:file`, `hf-hub:...` or `local-dir:...` -> model, tokenizer, preparation, about"""
    architecture, _, weights = name.partition(":")
    if architecture in ("hf-hub", "local-dir"):
        architecture, weights = name, None
    try:
        import open_clip
        from transformers import dynamic_module_utils
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0    # a text model that brings code is refused, not asked about
        model, prepare = open_clip.create_model_from_pretrained(architecture, weights, device=device)
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as e:               # not installed, no such architecture or tag, no network, a foreign file
        raise UserError(f"the open_clip encoder {name} cannot be loaded ({reason_of(e)}): give architecture:tag, "
                        f"architecture:checkpoint file, or a built-in encoder ({' or '.join(BUILT_IN.values())})") from None
    about = about_model(weights or name.partition(":")[2], model, "open_clip_torch", "pillow", backend="pil",
                        preparation=str(prepare))
    return model.eval(), tokenizer, prepare, about


def reason_of(error):
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def about_model(name, model, *packages, **more):
    """What fixes a model's numbers: for weights on disk their SHA-256, else the name and the commit."""
    place = Path(name)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    return {"weights": {f.name: sha256(f) for f in files} or name,
            "commit": getattr(getattr(model, "config", None), "_commit_hash", None),
            "precision": "bfloat16" if next(model.parameters()).is_cuda else "float32",
            "versions": {p: version(p) for p in ("torch", *packages)}, **more}


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
