"""MMSR: An Empirical Study of Training ID-Agnostic Multi-modal Sequential Recommenders. Youhua Li,
Hanwen Du, Yongxin Ni, Yuanqi He, Junchen Fu, Xiangyan Liu, Qi Guo. 2024. arXiv:2403.17372.

An item is its raw title and picture, nothing else: a pre-trained text and a vision encoder whose
top blocks are trained with the recommender, a fusion of their tokens into one vector, and a user
encoder that reads such vectors. No weight belongs to an item, so what was trained on one shop
starts on another (--init).

  title ---> text encoder:   frozen bottom -|-> top blocks -> tokens (U, T, D) -+
                                          cache                                 +-> fusion -> (U, D)
  picture -> vision encoder: frozen bottom -|-> top blocks -> tokens (U, V, D) -+
  items (B, L, D) -> SASRec | GRU | NextItNet -> states (B, L, D);   score = state . item

What stands left of the bar never changes: it is computed once for each text and picture and kept in
cache_dir. A step runs the top blocks on the U distinct items of its batch. ViLT and VisualBERT read
a title and its picture as one stream of tokens (`--fusion stream`): there is one tower, with a row
of the cache for each pair. With `--tune_blocks -1` the bar stands at the left end: no cache.

Readings, of what the paper leaves open and its code does:
 1. trained are the last two blocks of each encoder and the norm after them, by name. The code
    compares tensor indices the wrong way round and freezes just those. Embeddings stay frozen.
 2. at most 50 tokens of one string an item: its title and what else the data set says (F.3).
 3. pictures are turned upright, white where they are transparent, squeezed to the encoder's square
    and normalised by its statistics (the code: .5). An item without a readable picture has a grey
    one, as has one whose picture is longer than 100 times its width. Of an animation, the first
    frame.
 4. MAE sees all patches. The paper's MAE has `--mask_ratio .75` (table 14 has 0, .5, .75), and
    draws the patches anew in every pass, so that scores are random; here those that are kept are
    drawn once, the same places in all pictures.
 5. MMSR-T, MMSR-V, the coarse fusions and one stream take the masked mean of the projected tokens;
    "+" is 3 x (dropout, linear, ReLU).
 6. merge-attention is BERT's layer (post-norm), and adds the modality embeddings that the code
    makes and forgets; co-attention is LXMERT's: one cross-attention for both, then own blocks.
 7. padding is zero where a user encoder reads it (in the code it is an encoded blank item).
 8. layers: SASRec 2, GRU 4, NextItNet 2 (appendix B). Positions are counted from the end.
 9. eq. (6): one negative, uniform over the items that the user's training sequence lacks.
    `--loss in_batch`: softmax over the targets of the batch minus log popularity, as in MoRec.
10. the learning rate drops to a tenth at 80 % of the epochs, as in the code; the paper: "linearly".
11. BatchNorm (ResNet) keeps its pre-trained statistics, as usual in fine-tuning.
12. VisualBERT reads the last hidden states of any image encoder for Faster R-CNN's regions (table
    7: ResNet, CLIP). Where their width is not its own, a new projection must be trained with all
    the rest (`--tune_blocks -1`).
13. with FLAVA's top blocks all of its fusion is trained (appendix E; section 6.1: its last block).
14. ResNet's map is projected place by place, as other tokens are (the code: a 3 x 3 convolution
    and ReLU).
15. at the start embeddings are normal (.02), other matrices xavier, biases torch's own (the code:
    xavier and zeros).
Vision-language models (appendix E): CLIP and GroupViT, as both encoders, with `--fusion concat`;
of GroupViT's images the blocks of the last stage can be trained. FLAVA as both, with its own fusion
(`--fusion flava`). ViLT as both, VisualBERT as text encoder (`--fusion stream --tune_blocks 4`).

Reads from the catalog: n_items, titles, image_paths, train_seqs (their forms: CATALOG below).
A batch: "seq" and "target" (B, L), item ids, the newest last, padded with 0 on the left; target is
the item after each place, 0 = none. score reads "seq" alone; it ranks the history's items as well,
and its column 0 is padding's. state_dict has weights only: rebuild with the same catalog.
"""
import hashlib
import math
import os
import re
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:    # Windows has none
    fcntl = None

CATALOG = {
    "n_items": "int N; item ids are 1..N, 0 is padding",
    "titles": "list of N+1 strings, the first for padding",
    "image_paths": "list of N+1 paths of pictures or None, the first for padding",
    "train_seqs": "one list of item ids per user, training part only",
}
READS = ("titles", "image_paths", "train_seqs")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")    # of pictures that are opened
THIN = 100       # longer side / shorter side; above it a picture is not read
PART = 512       # items of a step whose inner values are kept in memory at a time


@dataclass
class MMSRConfig:
    text_encoder: str = "FacebookAI/roberta-base"    # name or folder, or tiny, tiny-bert, ...
    image_encoder: str = "microsoft/swin-base-patch4-window7-224"    # or tiny, tiny-swin, ...
    modality: Literal["both", "text", "image"] = "both"              # text, image: MMSR-T, MMSR-V
    item_encoder: Literal["content", "id"] = "content"    # id: IDSR, the paper's baseline
    fusion: Literal[
        "merge", "co", "sum", "concat", "gate", "film", "sum+", "concat+", "gate+", "film+",
        "flava", "stream"
    ] = "merge"    # stream: ViLT's and VisualBERT's, one encoder for both
    merge_layers: int = 1                # blocks of merge-attention: 1, 2, 4 in Table 3
    user_encoder: Literal["sasrec", "gru", "nextitnet"] = "sasrec"   # section 3.5
    tune_blocks: int = 2    # top blocks of each encoder that are trained; 0: none, -1: all of it
    tune_image_blocks: int = -2          # the same of the image encoder; -2: tune_blocks
    mask_ratio: float = 0.               # of a picture's patches that MAE does not see (reading 4)
    loss: Literal["bce", "in_batch"] = "bce"         # eq. (6), or softmax over the batch's targets
    cache: Literal["fp16", "fp32", "off"] = "fp16"   # of the frozen part; off: run it in every step
    cache_dir: str = "data/cache"        # where it is kept
    max_tokens: int = 50                 # of a text, appendix F.3
    dim: int = 768                       # section 4.2
    heads: int = 2                       # of SASRec, appendix B
    layers: int = 0    # of the user encoder; 0: 2 for SASRec, 4 for GRU, 2 for NextItNet
    dropout: float = 0.1                 # section 4.2: from .1, .3, .5
    max_len: int = 20                    # appendix C
    # the recipe, for the training loop
    optimizer: Literal["adam", "adamw"] = "adamw"    # section 4.2
    schedule: Literal["constant", "step", "linear", "cosine"] = "step"    # reading 10
    lr: float = 1e-4                     # section 4.2
    encoder_lr: float = 1e-4             # of the top blocks; 5e-5 is better in Table 12
    weight_decay: float = 0.1            # section 4.2
    encoder_weight_decay: float = 0.0    # section 4.2
    clip_norm: float = 0.0               # largest norm of a gradient; 0: any, as in the code
    batch_size: int = 64                 # section 4.2: from 64, 128, 256
    epochs: int = 150                    # section 4.2
    patience: int = 10                   # ours
    prefixes: bool = False               # true: a row per prefix, and one target a row (appendix B)

    def __post_init__(self):
        check_kinds(self)
        for name in ("merge_layers", "dim", "heads", "max_len", "batch_size", "epochs", "patience"):
            value = getattr(self, name)
            check(value >= 1, f"{name} {value} is too small: it must be at least 1")
        for name in ("layers", "weight_decay", "encoder_weight_decay", "clip_norm"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"{name} {value} must not be negative")
        for name, least in (("tune_blocks", -1), ("tune_image_blocks", -2)):
            value = getattr(self, name)
            check(value >= least, f"{name} {value} must be at least {least}")
        check(self.fusion != "stream" or self.tune_image_blocks == -2,
              f"tune_image_blocks {self.tune_image_blocks} must be -2 for fusion stream, which has "
              f"one encoder: give tune_blocks")
        check(0 <= self.dropout < 1, f"dropout {self.dropout} must be from 0 to below 1")
        check(0 <= self.mask_ratio < 1, f"mask_ratio {self.mask_ratio} must be from 0 to below 1")
        check(0 < self.lr < math.inf, f"lr {self.lr} must be above 0")
        check(0 < self.encoder_lr < math.inf, f"encoder_lr {self.encoder_lr} must be above 0")
        if self.user_encoder == "sasrec":
            check(self.dim % self.heads == 0,
                  f"dim {self.dim} must be a multiple of heads {self.heads}")


SMALL = dict(
    text_encoder="tiny", image_encoder="tiny", loss="in_batch", dim=64, lr=1e-3, encoder_lr=1e-3,
    batch_size=32, epochs=25, clip_norm=5.0,
)
PRESETS = {
    "demo": SMALL,
    "demo-few": SMALL | dict(epochs=80, patience=30),    # 300 users: few steps an epoch
}


# ---------------- encoders and their blocks (section 3.2)

TOWERS = {    # model type -> what it reads, where its blocks are, and the norm after them
    "bert": ("text", "encoder.layer", ""),
    "roberta": ("text", "encoder.layer", ""),
    "electra": ("text", "encoder.layer", ""),
    "clip_text_model": ("text", "encoder.layers", "final_layer_norm"),
    "groupvit_text_model": ("text", "encoder.layers", "final_layer_norm"),
    "flava_text_model": ("text", "encoder.layer", "layernorm"),
    "swin": ("image", "encoder.layers.{last}.blocks", "layernorm"),
    "resnet": ("image", "encoder.stages.{last}.layers", ""),
    "vit_mae": ("image", "layers", "layernorm"),
    "clip_vision_model": ("image", "encoder.layers", ""),
    "groupvit_vision_model": ("image", "encoder.stages.{last}.layers", "layernorm"),
    "flava_image_model": ("image", "encoder.layer", "layernorm"),
    "vilt": ("pair", "model.encoder.layer", "model.layernorm"),
    "visual_bert": ("pair", "bert.encoder.layer", ""),
}
CAUSAL = ("clip_text_model", "groupvit_text_model")    # a token sees none after it
VIT = dict(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128,
    image_size=64, patch_size=16,
)
BERT = dict(VIT, vocab_size=4096, max_position_embeddings=514)
TINY = {    # model type -> settings of its tiny version
    "bert": BERT,
    "roberta": BERT,
    "electra": dict(BERT, embedding_size=32),
    "vit_mae": VIT,
    "swin": dict(
        image_size=64, embed_dim=16, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=4
    ),
    "resnet": dict(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 3], image_size=64
    ),
    "clip": dict(text_config=dict(BERT, eos_token_id=2), vision_config=VIT),
    "groupvit": dict(
        text_config=dict(BERT, eos_token_id=2),
        vision_config=dict(
            VIT, depths=[1, 1, 2], num_group_tokens=[8, 4, 0], num_output_groups=[8, 4, 4]
        ),
    ),
    "flava": dict(
        text_config=BERT, image_config=VIT, multimodal_config=dict(VIT, num_hidden_layers=2)
    ),
    "vilt": BERT,
    "visual_bert": dict(BERT, visual_embedding_dim=64),
}


def load_encoder(name, modality):
    """Name, folder or tiny -> (Hugging Face model, tokenizer or (mean, std) of pixels).

    Raises ValueError.
    """
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if name.partition("-")[0] == "tiny":
            return tiny_encoder(transformers, name.partition("-")[2], modality)
        model, info = transformers.AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            trust_remote_code=False,
        )
        missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
        check(not missing, f"it lacks weights: {', '.join(missing[:3])}, ...")
        if modality == "text":
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            return model, tokenizer
        processor = transformers.AutoImageProcessor.from_pretrained(
            name, backend="pil", trust_remote_code=False
        )
        return model, (processor.image_mean, processor.image_std)
    except Exception as error:    # no such folder, no network, a foreign format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{modality}_encoder {name} cannot be loaded ({reason}): give the name or folder of a "
            f"Hugging Face model, tiny, or tiny- and one of {', '.join(TINY)}"
        ) from None


def tiny_encoder(transformers, kind, modality):
    """A small encoder with random weights, the same for every seed, like a checkpoint's."""
    kind = kind or {"text": "roberta", "image": "vit_mae"}[modality]
    config = transformers.AutoConfig.for_model(kind, **TINY[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
    return model, tiny_tokens if modality == "text" else ([.5] * 3, [.5] * 3)


def tiny_tokens(texts, max_length, **_):
    """Words as hashes, between RoBERTa's <s> and </s>: the tokenizer of the tiny encoders."""
    rows = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        numbers = [3 + zlib.crc32(word.encode()) % 4093 for word in words]
        rows.append([0, *numbers[:max_length - 2], 2])
    return {"input_ids": rows}


def encoder_of(whole, modality, mask_ratio=0.):
    """The text or the image encoder of a vision-language model; other models are one themselves."""
    parts = {"text": ("text_model",), "image": ("vision_model", "image_model")}    # CLIP, FLAVA
    own = [getattr(whole, part) for part in parts[modality] if hasattr(whole, part)]
    model = own[0] if own else whole
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = mask_ratio
        patches = model.embeddings.patch_embeddings.num_patches
        order = torch.randperm(patches, generator=torch.Generator().manual_seed(0))
        kept = order[:int(patches * (1 - mask_ratio))].sort().values                # reading 4
        model.embeddings.random_masking = lambda x, noise=None: (x[:, kept], None, None)
    return model


def check_mask_ratio(cfg, encoders):
    """Raises ValueError where patches are to be left out and no encoder can do so."""
    kinds = [encoder.config.model_type for encoder in encoders.values()]
    check(cfg.mask_ratio == 0 or "vit_mae" in kinds,
          f"mask_ratio {cfg.mask_ratio} must be 0 for all image encoders but a MAE (vit_mae)")


def check_kind(model, setting, reads):
    """Raises ValueError for an encoder that does not read "text", "image" or "pair"."""
    kind = model.config.model_type
    fitting = [name for name, tower in TOWERS.items() if tower[0] == reads]
    other, *_ = TOWERS.get(kind, ("",))
    hint = ": for titles and pictures in one stream give fusion stream" if other == "pair" else ""
    check(kind in fitting, f"{setting} of the type {kind} is not supported here, only "
                           f"{', '.join(fitting)}{hint}")


def setting_of(modality):
    """The setting that names the encoder of "text", "image" or "pair"."""
    return "image_encoder" if modality == "image" else "text_encoder"


def width_of(config):
    return getattr(config, "hidden_size", None) or config.hidden_sizes[-1]


def as_tokens(hidden):
    """Hidden states (n, T, width), or ResNet's map (n, width, H, W) -> (n, T, width)"""
    return hidden.flatten(2).mT if hidden.dim() == 4 else hidden


class ViLT(nn.Module):
    """ViLT on a title and a picture of its own size: patches in their order, no shuffling."""

    def __init__(self, model):
        super().__init__()
        self.config = model.config
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        own = self.model.embeddings
        x = own.patch_embeddings(pixel_values).flatten(2).mT          # (n, V, width)
        x = torch.cat([own.cls_token.expand(len(x), -1, -1), x], 1) + own.position_embeddings
        seen = attention_mask.new_ones(x.shape[:2])
        return self.model(
            input_ids, attention_mask, image_embeds=own.dropout(x), pixel_mask=seen
        )


class VisualBERT(nn.Module):
    """VisualBERT on a title and on an image encoder's tokens of a picture (reading 12)."""

    def __init__(self, bert, eye, new_projection):
        super().__init__()
        self.config = bert.config
        self.bert = bert
        self.eye = eye
        self.config.image_size = getattr(eye.config, "image_size", 224)
        self.config.image_encoder = eye.config.to_dict()
        width, wanted = width_of(eye.config), self.config.visual_embedding_dim
        if width != wanted:
            check(new_projection,
                  f"image_encoder makes tokens of width {width}, text_encoder reads {wanted}: give "
                  f"another, or tune_blocks -1")
            bert.embeddings.visual_projection = nn.Linear(width, width_of(self.config))

    def forward(self, input_ids, attention_mask, pixel_values):
        x = as_tokens(self.eye(pixel_values).last_hidden_state)
        return self.bert(input_ids, attention_mask, visual_embeds=x)


def one_stream(text, image, cfg):
    """ViLT or VisualBERT as one encoder of titles and pictures. Raises ValueError."""
    check_kind(text, "text_encoder", "pair")
    if text.config.model_type == "vilt":
        check(cfg.text_encoder == cfg.image_encoder,
              "fusion stream needs ViLT as text_encoder and as image_encoder")
        return ViLT(text)
    check_kind(image, "image_encoder", "image")
    return VisualBERT(text, image, cfg.tune_blocks == -1)


class Boundary(nn.Module):
    """Stands where the first trained block stood: stops the encoder, keeps its hidden states."""

    class Reached(Exception):
        pass

    def forward(self, hidden, *_, **__):
        raise self.Reached(hidden)


# ---------------- below the boundary: what is frozen

def read_picture(path):
    """The picture as RGB, upright, white where it is transparent. Raises many errors."""
    with Image.open(path, formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > Image.MAX_IMAGE_PIXELS:    # Pillow only warns
            raise ValueError("too many pixels")
        if (width, height) == (1, 1) or max(width, height) > THIN * min(width, height):
            raise ValueError("no picture of anything")
        picture.load()
        with suppress(Exception):    # a bad note on the orientation makes no bad picture
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):    # 16 bit: convert() would clip at 255
            grey = np.asarray(picture) // 257
            picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")


class Bottom:
    """An encoder up to the boundary: texts, pictures or both -> hidden states.

    model: the encoder, with a Boundary in it, or whole. inputs: {"text": the token ids of each row,
    "image": the path of each picture, None for a grey one}, or one of the two. tuned: how many
    blocks are trained; -1: all of the model. size, mean, std: of the pictures that it reads.
    """

    def __init__(self, model, modality, inputs, tuned):
        self.model = model.eval()
        self.modality = modality
        self.setting = setting_of(modality)
        self.inputs = inputs
        self.tuned = tuned
        self.size = self.mean = self.std = None
        self.unreadable = 0

    def __len__(self):
        return len(next(iter(self.inputs.values())))

    def pixels(self, path):
        """-> (3, S, S), grey for None and for what is no picture."""
        picture = None
        if path:
            try:
                picture = read_picture(path)
            except Exception:    # a damaged file makes Pillow raise almost anything
                self.unreadable += 1
        picture = picture or Image.new("RGB", (1, 1), (128, 128, 128))
        picture = picture.resize((self.size, self.size), Image.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        return (pixels - self.mean) / self.std                                 # reading 3

    def read(self, row):
        """A row's {"text": token ids (T,), "image": (3, S, S)}, or one of the two."""
        reader = {"text": torch.tensor, "image": self.pixels}
        return {m: reader[m](inputs[row]) for m, inputs in self.inputs.items()}

    def run(self, read, device):
        """What `read` made of n rows -> hidden states (n, T, width), mask (n, T)."""
        model = self.model.to(device)
        given = {}
        mask = torch.ones(len(read), 0, dtype=torch.bool, device=device)
        if "text" in self.inputs:
            ids = [x["text"] for x in read]
            lengths = torch.tensor([len(x) for x in ids], device=device)
            padding = model.config.pad_token_id or 0
            ids = nn.utils.rnn.pad_sequence(ids, True, padding).to(device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            given = {"input_ids": ids, "attention_mask": mask.long()}
        if "image" in self.inputs:
            given["pixel_values"] = torch.stack([x["image"] for x in read]).to(device)
        try:
            hidden = as_tokens(model(**given).last_hidden_state)    # no block is trained, or all
        except Boundary.Reached as reached:
            hidden = as_tokens(reached.args[0])
        of_pictures = hidden.shape[1] - mask.shape[1]    # tokens; they stand after the text's
        return hidden, F.pad(mask, (0, of_pictures), value=True)

    @torch.no_grad()
    def hidden(self, read, device):
        """The same of a frozen bottom: in full precision."""
        with torch.autocast(device.type, enabled=False):
            return self.run(read, device)

    def boundary(self, rows):
        """Rows of the inputs (R,) -> hidden states (R, T, width), mask (R, T)."""
        read = [self.read(row) for row in rows.tolist()]
        return self.run(read, rows.device) if self.tuned == -1 else self.hidden(read, rows.device)

    def fingerprint(self):
        """Of what decides the hidden states: the frozen model, and the tokens, or each picture's
        path, size and time."""
        about = f"{self.model.config} {self.tuned} {self.size} {self.mean} {self.std}"
        digest = hashlib.blake2b(about.encode(), digest_size=12)
        for key, weight in self.model.state_dict().items():
            if "pooler" not in key:    # not used, and random where a checkpoint lacks it
                digest.update(weight.cpu().contiguous().numpy().tobytes())
        for x in (x for inputs in self.inputs.values() for x in inputs):
            about = ()
            if isinstance(x, str) and os.path.exists(x):
                stat = os.stat(x)
                about = (stat.st_size, stat.st_mtime_ns)
            digest.update(f"{x} {about}".encode())
        return digest.hexdigest()


def lengths_of(bottom, tokens, n):
    """How many tokens each row has, where the first n rows have so many in all: those of its text,
    and for each picture the same number."""
    words = [len(ids) for ids in bottom.inputs.get("text", [()] * len(bottom))]
    of_picture = (tokens - sum(words[:n])) // n if "image" in bottom.inputs else 0
    return [length + of_picture for length in words]


@contextmanager
def alone_in(folder):
    """Work in a folder, made if need be, while no other process does: the others wait.

    Yields False where there are no locks: on Windows, and on some network disks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except BlockingIOError:
        print(f"waiting for another process that works in {folder}", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
        alone = True
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        os.close(handle)


class Cached:
    """The hidden states of all rows at the boundary, computed once and kept on disk.

    One .npy file of (tokens, width), the rows one after the other, opened as a memory map. A
    damaged one is made again.
    """

    def __init__(self, bottom, width, cfg, device):
        dtype = np.dtype(np.float16 if cfg.cache == "fp16" else np.float32)
        name = f"{bottom.modality}-{bottom.fingerprint()}.{cfg.cache}.npy"
        path = Path(cfg.cache_dir) / name
        with alone_in(path.parent) as alone:
            hidden = self.opened(path, bottom, width, dtype)
            if hidden is None:
                self.make(path, bottom, dtype, device, alone)
                hidden = self.opened(path, bottom, width, dtype)
        self.hidden = torch.from_numpy(hidden)
        lengths = lengths_of(bottom, len(hidden), len(bottom))
        # where each row's tokens begin
        self.start = torch.tensor([0, *lengths], device=device).cumsum(0)

    def opened(self, path, bottom, width, dtype):
        """The file as a memory map, None where there is none or it is damaged."""
        if not path.is_file():
            return None
        try:
            hidden = np.load(path, mmap_mode="c", allow_pickle=False)
            fits = hidden.dtype == dtype and hidden.ndim == 2 and hidden.shape[1] == width
            fits = fits and len(hidden) >= len(bottom)
            if fits and sum(lengths_of(bottom, len(hidden), len(bottom))) == len(hidden):
                return hidden
        except Exception:    # cut off, or no .npy at all: its reader may raise anything
            pass
        print(f"{path} is damaged: it is made again", flush=True)
        return None

    def make(self, path, bottom, dtype, device, alone):
        """Fill the file under another name, then rename it: it is there whole or not at all. What
        a killed run has left under that name is written over."""
        end = "unfinished" if alone else uuid.uuid4().hex[:8]
        partial = Path(f"{path}.{end}")
        begin = time.time()
        try:
            self.fill(partial, bottom, dtype, device)
            os.replace(partial, path)
        except OSError as error:
            if error.filename not in (None, str(partial)):    # a full disk names no file
                raise
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        finally:
            partial.unlink(missing_ok=True)
        n, size = len(bottom), path.stat().st_size
        print(f"{n} {bottom.modality}s to the boundary, {bottom.unreadable} unreadable, "
              f"{time.time() - begin:.0f} s: {size / 2**20:.1f} MiB, {size / 1024 / n:.1f} KiB "
              f"each, in {path}", flush=True)

    def fill(self, path, bottom, dtype, device):
        step = 256 if device.type == "cuda" else 32
        n = len(bottom)
        with open(path, "wb") as file, ThreadPoolExecutor() as pool, np.errstate(over="ignore"):
            for first in range(0, n, step):
                read = list(pool.map(bottom.read, range(first, min(first + step, n))))
                hidden, mask = bottom.hidden(read, device)
                rows = hidden[mask].cpu().numpy()
                check(np.isfinite(rows).all(),
                      f"{bottom.setting} makes hidden states that are not finite")
                rows = rows.astype(dtype)
                check(np.isfinite(rows).all(),
                      f"{bottom.setting} has hidden states beyond fp16: give cache fp32")
                if first == 0:    # all pictures have as many tokens as the first
                    lengths = lengths_of(bottom, len(rows), len(read))
                    header = np.lib.format.header_data_from_array_1_0(rows)
                    header["shape"] = (sum(lengths), rows.shape[1])
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def boundary(self, rows):
        """Rows of the inputs (R,) -> hidden states (R, T, width), mask (R, T)."""
        length = self.start[rows + 1] - self.start[rows]
        place = torch.arange(int(length.max()), device=rows.device)
        mask = place < length[:, None]
        place = torch.where(mask, self.start[rows, None] + place, 0)
        hidden = self.hidden[place.to(self.hidden.device)]
        return hidden.to(rows.device).float(), mask


def move(caches, device, room):
    """Copy caches to the device, the smallest first, as far as they fit into `room` bytes."""
    for cache in sorted(caches, key=lambda cache: cache.hidden.nbytes):
        room -= cache.hidden.nbytes
        if room >= 0:
            cache.hidden = cache.hidden.to(device)


# ---------------- above the boundary: what is trained (section 3.2)

class Tower(nn.Module):
    """The trained top of an encoder, on the hidden states of its frozen bottom.

    model: of encoder_of, or of one_stream. readers: what load_encoder gives with a model, by
    modality. wanted: the text, or the path of a picture or None, of each item, by modality; row 0
    is padding. Raises ValueError.
    """

    def __init__(self, model, readers, wanted, cfg):
        super().__init__()
        config = model.config
        self.cfg = cfg
        self.modality = "pair" if len(wanted) == 2 else next(iter(wanted))
        self.kind = config.model_type
        check_kind(model, setting_of(self.modality), self.modality)
        same = self.modality != "image" or cfg.tune_image_blocks == -2
        self.tuned = cfg.tune_blocks if same else cfg.tune_image_blocks
        self.cut(model)
        self.width = width_of(config)
        nothing = {"text": "", "image": None}
        columns = [[nothing[m], *x[1:]] for m, x in wanted.items()]
        contents = list(zip(*columns))
        row = {content: i for i, content in enumerate(dict.fromkeys(contents))}
        row_of = torch.tensor([row[content] for content in contents])
        self.register_buffer("row_of", row_of, persistent=False)    # (N+1,) of the distinct inputs
        inputs = dict(zip(wanted, map(list, zip(*row))))
        self.bottom = Bottom(model, self.modality, inputs, self.tuned)    # no module: not saved
        if "text" in wanted:
            inputs["text"] = self.tokenize(readers["text"], inputs["text"], config)
        if "image" in wanted:
            self.bottom.size = np.ravel(getattr(config, "image_size", 224))[0].item()
            self.bottom.mean, self.bottom.std = torch.tensor(readers["image"])[..., None, None]
        self.below = None    # Bottom or Cached, once it is prepared
        self.train()

    def cut(self, model):
        """Take the top blocks, and the norm after them, out of the model (reading 1)."""
        _, where, norm = TOWERS[self.kind]
        last = len(getattr(model.config, "depths", ())) - 1
        blocks = model.get_submodule(where.format(last=last))
        first = len(blocks) - max(self.tuned, 0)
        least = int(self.kind == "resnet")    # its last stage's first block reads another shape
        check(least <= first,
              f"tune_blocks {self.tuned} of {setting_of(self.modality)} must be from 0 to "
              f"{len(blocks) - least}, or -1 for all of it")
        self.whole = model if self.tuned == -1 else None    # then it is all trained
        self.blocks = nn.ModuleList(list(blocks)[first:])
        # FLAVA's own fusion reads the tokens before their norm
        own = self.cfg.fusion == "flava" and self.cfg.modality == "both"
        self.norm = nn.Identity()
        if norm and self.blocks and not own:
            self.norm = model.get_submodule(norm)
        if norm and (self.blocks or own):     # trained, or not wanted: no part of the frozen bottom
            model.set_submodule(norm, nn.Identity())
        if self.blocks:
            blocks[first] = Boundary()
            del blocks[first + 1:]
        for module in self.modules():         # indices of positions, statistics of BatchNorm
            module._non_persistent_buffers_set.update(module._buffers)
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False    # or loading asks for a count of batches

    def tokenize(self, tokenizer, texts, config):
        """Texts -> token ids (reading 2). Raises ValueError for too many max_tokens."""
        room = config.max_position_embeddings
        if self.kind == "roberta":
            room -= config.pad_token_id + 1
        check(3 <= self.cfg.max_tokens <= room,
              f"max_tokens {self.cfg.max_tokens} of {self.cfg.text_encoder} must be from 3 to "
              f"{room}")
        return tokenizer(texts, max_length=self.cfg.max_tokens, truncation=True)["input_ids"]

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()                 # reading 11
        return self

    def prepare(self, device):
        """Open the cache, or fill it; then forget the frozen bottom. Nothing the second time."""
        if self.below is not None:
            return
        if self.cfg.cache == "off" or self.whole is not None:
            self.below = self.bottom
        else:
            self.below = Cached(self.bottom, self.width, self.cfg, device)
        self.bottom = None

    def forward(self, items):
        """Items (U,) -> tokens (U, T, width), mask (U, T)."""
        rows, back = self.row_of[items].unique(return_inverse=True)
        x, mask = self.below.boundary(rows)                       # (R, T, width), (R, T)
        side = int(x.shape[1] ** .5)
        if self.kind == "resnet":
            x = x.mT.unflatten(2, (side, side))                   # (R, width, side, side)
        more = self.arguments(x, mask, side)
        for block in self.blocks:
            x = block(x, *more)
            x = x[0] if isinstance(x, tuple) else x
        return self.norm(as_tokens(x)).index_select(0, back), mask[back]

    def arguments(self, x, mask, side):
        """What a block of this kind of encoder takes besides the hidden states."""
        if self.modality != "image":
            T = x.shape[1]
            look = mask[:, None, None].expand(-1, 1, T, -1)       # (R, 1, T, T) True = may look
            if self.kind in CAUSAL:
                look = look.tril()
            added = torch.zeros_like(look, dtype=x.dtype)
            return (added.masked_fill(~look, torch.finfo(x.dtype).min),)
        if self.kind == "resnet":
            return ()
        return ((side, side),) if self.kind == "swin" else (None,)


# ---------------- fusion (section 3.3): tokens x (U, T, D), y (U, V, D) and their masks -> (U, D)

def masked_mean(x, mask):
    """(U, T, D), (U, T) -> (U, D)"""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Sum(nn.Module):
    """W_x x + W_y y"""

    def __init__(self, d):
        super().__init__()
        self.Wx = nn.Linear(d, d)
        self.Wy = nn.Linear(d, d)

    def forward(self, x, y):
        return self.Wx(x) + self.Wy(y)


class Concat(nn.Module):
    """W [x, y]"""

    def __init__(self, d):
        super().__init__()
        self.W = nn.Linear(2 * d, d)

    def forward(self, x, y):
        return self.W(torch.cat([x, y], -1))


class Gate(nn.Module):
    """W (sigmoid(W_x x) * W_y y)"""

    def __init__(self, d):
        super().__init__()
        self.Wx = nn.Linear(d, d)
        self.Wy = nn.Linear(d, d)
        self.W = nn.Linear(d, d)

    def forward(self, x, y):
        return self.W(self.Wx(x).sigmoid() * self.Wy(y))


class FiLM(nn.Module):
    """W (gamma(x) * y + beta(x))"""

    def __init__(self, d):
        super().__init__()
        self.gamma = nn.Linear(d, d)
        self.beta = nn.Linear(d, d)
        self.W = nn.Linear(d, d)

    def forward(self, x, y):
        return self.W(self.gamma(x) * y + self.beta(x))


COARSE = {"sum": Sum, "concat": Concat, "gate": Gate, "film": FiLM}


class Coarse(nn.Module):
    """Fusion of the two means; with "+", a deep network after it (reading 5)."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.dim
        self.maps = COARSE[cfg.fusion.removesuffix("+")](d)
        self.norm = nn.LayerNorm(d, eps=1e-6)    # one for both means
        deep = []
        if cfg.fusion.endswith("+"):
            for _ in range(3):
                deep += [nn.Dropout(cfg.dropout), nn.Linear(d, d), nn.ReLU()]
        self.dnn = nn.Sequential(*deep)

    def forward(self, x, x_mask, y, y_mask):
        x = self.norm(masked_mean(x, x_mask))
        y = self.norm(masked_mean(y, y_mask))
        return self.dnn(self.maps(x, y))


def bert_block(cfg):
    """BERT's layer, with heads of width 64 (or the nearest that divides dim)."""
    d = cfg.dim
    heads = max(h for h in range(1, max(1, d // 64) + 1) if d % h == 0)
    return nn.TransformerEncoderLayer(
        d, heads, 4 * d, cfg.dropout, "gelu", 1e-12, batch_first=True
    )


class Merge(nn.Module):
    """Merge-attention: all tokens of both modalities in one sequence (reading 6)."""

    def __init__(self, cfg):
        super().__init__()
        self.kinds = nn.Parameter(torch.empty(2, cfg.dim))    # modality embeddings
        self.blocks = nn.ModuleList(bert_block(cfg) for _ in range(cfg.merge_layers))

    def forward(self, x, x_mask, y, y_mask):
        z = torch.cat([x + self.kinds[0], y + self.kinds[1]], 1)    # (U, T + V, D)
        mask = torch.cat([x_mask, y_mask], 1)
        for block in self.blocks:
            z = block(z, src_key_padding_mask=~mask)
        return masked_mean(z, mask)


class CoAttention(nn.Module):
    """Each modality's tokens attend to the other's, then to their own (reading 6)."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.dim
        self.kinds = nn.Parameter(torch.empty(2, d))                # modality embeddings
        self.blocks = nn.ModuleList(bert_block(cfg) for _ in range(2))
        heads = self.blocks[0].self_attn.num_heads
        self.cross = nn.MultiheadAttention(d, heads, cfg.dropout, batch_first=True)
        self.out = nn.Linear(2 * d, d)
        self.norm = nn.LayerNorm(d, 1e-12)
        self.dropout = nn.Dropout(cfg.dropout)

    def attend(self, x, y, y_mask):
        """Tokens x look at tokens y."""
        seen, _ = self.cross(x, y, y, ~y_mask, need_weights=False)
        return self.norm(x + self.dropout(seen))

    def forward(self, x, x_mask, y, y_mask):
        x, y = x + self.kinds[0], y + self.kinds[1]
        x, y = self.attend(x, y, y_mask), self.attend(y, x, x_mask)
        x = self.blocks[0](x, src_key_padding_mask=~x_mask)
        y = self.blocks[1](y, src_key_padding_mask=~y_mask)
        return self.out(torch.cat([masked_mean(x, x_mask), masked_mean(y, y_mask)], -1))


class Flava(nn.Module):
    """The class token of FLAVA's own multimodal Transformer, which is trained (appendix E)."""

    def __init__(self, cfg, flava):
        super().__init__()
        check(flava.config.model_type == "flava" and cfg.text_encoder == cfg.image_encoder,
              "fusion flava needs one FLAVA model as text_encoder and as image_encoder")
        self.x = flava.text_to_mm_projection
        self.y = flava.image_to_mm_projection
        self.model = flava.multimodal_model
        self.model.pooler = None
        self.out = nn.Linear(flava.mm_hidden_size, cfg.dim)

    def forward(self, x, x_mask, y, y_mask):
        z = torch.cat([self.y(y), self.x(x)], 1)
        mask = torch.cat([y_mask[:, :1], y_mask, x_mask], 1)    # one more, for the class token
        return self.out(self.model(z, attention_mask=mask.long()).last_hidden_state[:, 0])

    def pre_trained(self):
        return [*self.x.parameters(), *self.y.parameters(), *self.model.parameters()]


def make_fusion(cfg, flava):
    """The fusion of a Config, None for one stream; flava: the whole model, which fusion flava takes
    its part from."""
    if cfg.fusion == "stream":
        return None
    if cfg.fusion == "flava":
        return Flava(cfg, flava)
    if cfg.fusion in ("merge", "co"):
        return Merge(cfg) if cfg.fusion == "merge" else CoAttention(cfg)
    return Coarse(cfg)


# ---------------- user encoders (section 3.5, appendix B): x (B, L, D), real (B, L) -> (B, L, D)

class SASRec(nn.Module):
    """A causal Transformer."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.position = nn.Parameter(torch.empty(cfg.max_len, cfg.dim))
        self.norm = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList()
        for _ in range(cfg.layers or 2):                                   # reading 8
            self.blocks.append(nn.TransformerEncoderLayer(
                cfg.dim, cfg.heads, 4 * cfg.dim, cfg.dropout, batch_first=True
            ))

    def forward(self, x, real):
        L = x.shape[1]
        x = self.dropout(self.norm(x + self.position[-L:]))
        causal = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=x.device)    # padding must see something
        hide = ~((causal & real[:, None]) | itself)                        # (B, L, L)
        hide = hide.repeat_interleave(self.heads, 0)                       # (B heads, L, L)
        for block in self.blocks:
            x = block(x, hide)
        return x


class GRU(nn.Module):
    """A recurrent network. Without biases, zeros on the left leave its state at zero."""

    def __init__(self, cfg):
        super().__init__()
        self.dropout = nn.Dropout(cfg.dropout)
        self.gru = nn.GRU(cfg.dim, cfg.dim, cfg.layers or 4, bias=False, batch_first=True)

    def forward(self, x, real):
        x = self.dropout(x).to(self.gru.weight_ih_l0.dtype)
        with torch.autocast(x.device.type, enabled=False):    # else cuDNN computes in float16
            states, _ = self.gru(x)
        return states


class NextItNet(nn.Module):
    """Layers of two residual blocks (b), each of two causal convolutions of width 3, dilated by d
    and 2 d; d = 1, 4."""

    def __init__(self, cfg):
        super().__init__()
        self.dilations = [d for _ in range(cfg.layers or 2) for d in (1, 2, 4, 8)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(cfg.dim, cfg.dim, 3, dilation=d) for d in self.dilations
        )
        self.norms = nn.ModuleList(nn.LayerNorm(cfg.dim) for _ in self.dilations)

    def convolve(self, i, x, real):
        padded = F.pad(x.mT, (2 * self.dilations[i], 0))    # causal
        x = self.norms[i](self.convolutions[i](padded).mT)
        return x.relu() * real[..., None]                   # reading 7

    def forward(self, x, real):
        for i in range(0, len(self.dilations), 2):          # a residual block
            x = x + self.convolve(i + 1, self.convolve(i, x, real), real)
        return x


USERS = {"sasrec": SASRec, "gru": GRU, "nextitnet": NextItNet}


# ---------------- the model

class MMSR(nn.Module):
    """Items from their titles and pictures, users from their items."""

    def __init__(self, cfg, catalog):
        super().__init__()
        check_catalog(catalog)
        self.cfg = cfg
        self.n_items = catalog["n_items"]
        self.towers = nn.ModuleDict()
        self.project = nn.ModuleDict()
        self.user = USERS[cfg.user_encoder](cfg)
        self.fusion = None
        self.item = None
        self.prepared = False
        if cfg.item_encoder == "id":
            self.item = nn.Embedding(self.n_items + 1, cfg.dim)
        else:
            self.add_towers(catalog)
        self.start_weights()
        self.remember(catalog["train_seqs"])

    def add_towers(self, catalog):
        """An encoder for each modality, a projection of its tokens, and the fusion of both."""
        cfg = self.cfg
        both = cfg.modality == "both"
        names = {"text": cfg.text_encoder, "image": cfg.image_encoder}
        wanted = {"text": catalog["titles"], "image": catalog["image_paths"]}
        if not both:
            wanted = {cfg.modality: wanted[cfg.modality]}
        encoders, readers = {}, {}
        for m in wanted:
            whole, readers[m] = load_encoder(names[m], m)
            encoders[m] = encoder_of(whole, m, cfg.mask_ratio)
        check_mask_ratio(cfg, encoders)
        if both and cfg.fusion == "stream":
            self.towers["pair"] = Tower(one_stream(**encoders, cfg=cfg), readers, wanted, cfg)
        else:
            for m, encoder in encoders.items():
                self.towers[m] = Tower(encoder, {m: readers[m]}, {m: wanted[m]}, cfg)
        projected = not (both and cfg.fusion == "flava")
        for m, tower in self.towers.items():
            self.project[m] = nn.Linear(tower.width, cfg.dim) if projected else nn.Identity()
        if both:
            self.fusion = make_fusion(cfg, whole)
        self.find_twins([x[1:] for x in wanted.values()])

    def find_twins(self, contents):
        """Items with one title and one picture are one. Raises ValueError where all items are.

        contents: the titles, or the paths of the pictures, of items 1..N, or both lists
        """
        missing = {"both": "title and no picture", "text": "title", "image": "picture"}
        first = {}    # of each (title, picture) the first item that has them
        twins = [first.setdefault(pair, item) for item, pair in enumerate(zip(*contents), 1)]
        check(len(first) > 1 or self.n_items == 1,
              f"no {missing[self.cfg.modality]} tells one item from another: give items.jsonl with "
              f"them")
        self.register_buffer("twin", torch.tensor([0, *twins]), persistent=False)    # (N+1,)

    def start_weights(self):
        """Random numbers for all weights that are not pre-trained."""
        self.pre_trained = set(self.towers.parameters())
        if isinstance(self.fusion, Flava):
            self.pre_trained.update(self.fusion.pre_trained())
        embeddings = ("item.weight", "user.position", "fusion.kinds")
        for name, weight in self.named_parameters():
            if weight.dim() > 1 and weight not in self.pre_trained:
                if name in embeddings:
                    nn.init.normal_(weight, std=.02)
                else:
                    nn.init.xavier_normal_(weight)

    def remember(self, train_seqs):
        """What negatives and popularity need of the training sequences."""
        N = self.n_items
        own = [sorted(set(seq)) for seq in train_seqs]
        # how many items user u lacks before the i-th of those he has, + u (N + 1): sorted, so that
        # one search finds the place among all users'
        lacked = [
            u * (N + 1) + item - 1 - i for u, seq in enumerate(own) for i, item in enumerate(seq)
        ]
        first = torch.tensor([0, *map(len, own)]).cumsum(0)       # where a user begins in `lacked`
        flat = torch.tensor([item for seq in train_seqs for item in seq], dtype=torch.long)
        sales = flat.bincount(minlength=N + 1)
        self.register_buffer("lacked", torch.tensor(lacked), persistent=False)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("log_pop", sales.clamp(min=1).log(), persistent=False)

    def prepare(self, device):
        """Fill or open the caches now, and not in the first step. Raises ValueError.

        They are copied to a GPU if they take no more than half of what is free there: the other
        half is a step's.
        """
        if self.prepared:
            return
        for tower in self.towers.values():
            tower.prepare(device)
        if device.type == "cuda":
            caches = [t.below for t in self.towers.values() if isinstance(t.below, Cached)]
            move(caches, device, room=torch.cuda.mem_get_info(device)[0] / 2)
        self.prepared = True

    def items(self, ids):
        """Item vectors (U, D) of ids (U,); zero for padding.

        Of many items PART at a time: their inner values are computed again in the backward pass.
        """
        real = (ids != 0)[:, None]
        if self.item is not None:
            return self.item(ids) * real
        self.prepare(ids.device)
        if len(ids) <= PART or not torch.is_grad_enabled():
            return self.content(ids) * real
        parts = [checkpoint(self.content, part, use_reentrant=False) for part in ids.split(PART)]
        return torch.cat(parts) * real

    def content(self, ids):
        """Titles and pictures of ids (U,) -> (U, D)."""
        tokens = []
        for m, tower in self.towers.items():
            x, mask = tower(ids)
            tokens += [self.project[m](x), mask]                  # (U, T, D), (U, T)
        fuse = self.fusion or masked_mean                         # reading 5
        return fuse(*tokens)

    def forward(self, batch):
        """{"next_item": loss} of each item given all before it, eq. (3): that of eq. (6), or with
        `--loss in_batch` of reading 9."""
        seq = recent(self, batch)
        target = batch["target"][:, -seq.shape[1]:]
        if self.cfg.prefixes:    # one target a row, the last
            target = F.pad(target[:, -1:], (seq.shape[1] - 1, 0))
        real = target != 0
        negative = target
        if self.cfg.loss == "bce":
            negative = self.negatives(batch["user"], seq.shape[1]) * real
        ids, place = torch.stack([seq, target, negative]).unique(return_inverse=True)
        vectors = self.items(ids)                                 # (U, D): each distinct item once
        x, right, wrong = F.embedding(place, vectors)             # (B, L, D) each
        states = self.user(x, seq != 0)                           # (B, L, D)
        if self.cfg.loss == "bce":
            counts = (negative != 0) & (negative != target)
            loss = F.softplus((states * wrong).sum(-1)) * counts
            loss = loss + F.softplus(-(states * right).sum(-1)) * real              # eq. (6)
        else:
            loss = self.in_batch(states, vectors, ids, place) * real
        return {"next_item": loss.sum() / real.sum().clamp(min=1)}

    def negatives(self, user, L):
        """user (B,) -> (B, L) items, each uniform over those that the user's training sequence
        lacks; 0 where there is none (reading 9)."""
        longest = max(L, self.cfg.max_len)
        fine = torch.float32 if user.device.type == "mps" else torch.float64    # Apple's has no 64
        draw = torch.rand(len(user), longest, device=user.device, dtype=fine)
        draw = draw[:, -L:]    # those of the places from the end, so that padding changes none
        user = user[:, None]
        first = self.first[user]
        n = self.n_items - (self.first[user + 1] - first)         # how many the user lacks
        r = torch.minimum((draw * n).long(), n - 1).clamp(min=0)  # take the r-th of them
        place = torch.searchsorted(self.lacked, user * (self.n_items + 1) + r, right=True)
        before = place - first    # items that the user has before it
        return torch.where(n > 0, r + 1 + before, 0)

    def in_batch(self, states, vectors, ids, place):
        """-log softmax over the batch's targets of states . vectors - log popularity (reading 9).

        states (B, L, D), vectors (U, D) of ids (U,), place (3, B, L): seq and target among ids
        -> (B, L)
        """
        B, L, _ = states.shape
        with torch.autocast(states.device.type, enabled=False):    # bfloat16 is coarse for logits
            logits = states.float() @ vectors.float().T - self.log_pop[ids]         # (B, L, U)
        seq, target = place[0], place[1]
        is_target = torch.zeros_like(ids, dtype=torch.bool).index_fill_(0, target.flatten(), True)
        candidates = is_target & (ids != 0)                                         # (U,)
        own = torch.zeros(B, len(ids), dtype=torch.bool, device=ids.device)
        own.scatter_(1, torch.cat([seq, target], 1), True)                          # (B, U)
        allowed = (candidates & ~own)[:, None].repeat(1, L, 1)                      # (B, L, U)
        allowed.scatter_(2, target[..., None], True)
        logits = logits.masked_fill(~allowed, -torch.inf)
        return F.cross_entropy(logits.mT, target, reduction="none")

    @torch.no_grad()
    def encode_items(self):
        """The table that score reads: item vectors (N+1, D). Without gradient: a step has its own.

        Items with one title and one picture have one vector, to the last bit.
        """
        ids = torch.arange(self.n_items + 1, device=self.first.device)
        if self.item is None:
            ids, place = self.twin.unique(return_inverse=True)
        parts = ids.split(1024 if ids.is_cuda else 256)
        table = torch.cat([self.items(part) for part in parts])
        return table if self.item is not None else table[place]

    def score(self, batch, table):
        """The last state times each item: scores (B, N+1)."""
        users, items = self.as_product(batch, table)
        return users @ items.T

    def as_product(self, batch, table):
        """Users (B, D) and items (N+1, D) whose products are the scores."""
        seq = recent(self, batch)
        real = seq != 0
        x = F.embedding(seq, table) * real[..., None]
        return self.user(x, real)[:, -1], table

    def init_from(self, state):
        """Start from the weights of a model of any catalog. Raises ValueError for other weights."""
        mine = {(name, value.shape) for name, value in self.state_dict().items()}
        theirs = {(name, value.shape) for name, value in state.items()}
        strange = sorted({name for name, _ in mine ^ theirs})
        check(not strange, f"its weights differ ({', '.join(strange[:3])}, ...): give the same "
                           f"encoders, fusion and dim")
        self.load_state_dict(state)

    def param_groups(self, cfg):
        """Pre-trained weights have a learning rate and a decay of their own (section 4.2)."""
        top = [weight for weight in self.parameters() if weight in self.pre_trained]
        rest = [weight for weight in self.parameters() if weight not in self.pre_trained]
        if not top:
            return [{"params": rest}]
        decay = cfg.encoder_weight_decay
        return [{"params": top, "lr": cfg.encoder_lr, "weight_decay": decay}, {"params": rest}]


Model, Config = MMSR, MMSRConfig


# ---------------- helpers, not the paper's: the same text in every model file

def check(condition, message):
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_kinds(cfg):
    """Raises ValueError for a setting of another type, or none of its choices."""
    for name, kind in get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        choices = get_args(kind)
        if choices:
            check(value in choices, f"{name} {value} must be one of {', '.join(choices)}")
        else:
            wanted = {int: Integral, float: Real}.get(kind, kind)
            check(isinstance(value, wanted), f"{name} {value!r} must be of type {kind.__name__}")


def check_catalog(catalog):
    """Raises ValueError for keys of CATALOG that a catalog lacks, or has in another form."""
    missing = [f"{key} ({form})" for key, form in CATALOG.items() if key not in catalog]
    check(not missing, f"the catalog lacks {', '.join(missing)}")
    N = catalog["n_items"]
    for key, form in CATALOG.items():
        value = catalog[key]
        got = type(value).__name__
        fits = True
        if "(N+1" in form:    # a tensor with as many axes as the form names
            axes = form[:form.index(")")].removesuffix(",").count(",") + 1
            fits = torch.is_tensor(value) and value.dim() == axes and len(value) == N + 1
            got += f" {tuple(value.shape)}" if hasattr(value, "shape") else ""
        elif "list" in form:
            fits = isinstance(value, list) and ("N+1" not in form or len(value) == N + 1)
            got += f" of {len(value)}" if hasattr(value, "__len__") else ""
        check(fits, f"catalog[{key!r}] must be: {form}; N is {N}; it is: {got}")
    for key, form in CATALOG.items():
        if form.startswith("float"):
            masks = [mask for mask in (f"has_{key}", f"{key}_mask") if mask in CATALOG]
            check_numbers(key, catalog[key], catalog[masks[0]] if masks else None)
        if form.startswith("int (N+1"):
            whole = not catalog[key].is_floating_point() and (catalog[key] >= 0).all()
            check(whole, f"catalog[{key!r}] must be whole numbers from 0 on")
    ids = set().union(*catalog.get("train_seqs", ()))
    check(ids <= set(range(1, N + 1)),
          f"catalog['train_seqs'] has ids that are not from 1 to {N}: {list(ids)[:3]}, ...")


def check_numbers(key, value, there):
    """Raises ValueError for features that are not finite, or too large for a square in float32.

    there: bool, where they are read; None: everywhere.
    """
    for first in range(0, len(value), 4096):
        rows = slice(first, first + 4096)
        bad = ~(value[rows].abs() < 1e15).all(-1)    # NaN is below nothing
        if there is not None:
            bad &= there[rows].bool()
        items = bad.flatten(1).any(1) if bad.dim() > 1 else bad
        number = items.nonzero()[:3, 0] + first
        check(len(number) == 0, f"catalog[{key!r}] has numbers that are not finite, or above 1e15, "
                                f"for items {number.tolist()}")


def recent(model, batch):
    """"seq" of a batch, the last cfg.max_len items of each row: (B, L).

    Raises ValueError for what would go wrong without a word: rows that are padded on the right
    (on a GPU nobody looks, as a step would have to wait for the answer), and coarse weights.
    """
    dtype = next(model.parameters()).dtype
    check(dtype in (torch.float32, torch.float64),
          f"weights in {dtype} are too coarse: leave them in float32, and use torch.autocast")
    seq = batch["seq"][:, -model.cfg.max_len:]
    if not seq.is_cuda and not torch.compiler.is_compiling():
        check(((seq[:, -1] != 0) | (seq == 0).all(1)).all(),
              "rows of seq must be padded with 0 on the left, the newest item last")
    return seq


if __name__ == "__main__":    # a check that this file works where it was copied to
    import tempfile
    torch.manual_seed(0)
    start = time.time()
    N, B, L = 100, 8, 10
    items = torch.randint(1, N + 1, (B, L + 1))
    catalog = {
        "n_items": N,
        "titles": [""] + [f"thing number {i}" for i in range(N)],
        "image_paths": [None] * (N + 1),
        "train_seqs": items.tolist(),
    }
    items[0, :4] = 0    # a shorter row, padded on the left
    seq, target = items[:, :-1], items[:, 1:]
    batch = {"user": torch.arange(B), "seq": seq, "target": target * (seq != 0)}
    with tempfile.TemporaryDirectory() as folder:
        cfg = MMSRConfig(text_encoder="tiny", image_encoder="tiny", dim=64, cache_dir=folder)
        model = MMSR(cfg, catalog)
        losses = model(batch)
        sum(losses.values()).backward()
        scores = model.eval().score(batch, model.encode_items())
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
    shown = {name: round(loss.item(), 4) for name, loss in losses.items()}
    print(shown, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
