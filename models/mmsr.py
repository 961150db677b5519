"""MMSR: An Empirical Study of Training ID-Agnostic Multi-modal Sequential Recommenders. Youhua Li, Hanwen Du, Yongxin Ni,
Yuanqi He, Junchen Fu, Xiangyan Liu, Qi Guo. 2024. arXiv:2403.17372.

An item is its raw title and picture, nothing else: a pre-trained text and a vision encoder whose top blocks are trained with
the recommender, a fusion of their tokens into one vector, and a user encoder that reads such vectors. No weight belongs to
an item, so what was trained on one shop starts on another (--init).

    title ---> text encoder:   frozen bottom -|-> top blocks -> tokens (U, T, D) --+
                                            cache                                  +-> fusion -> items (U, D)
    picture -> vision encoder: frozen bottom -|-> top blocks -> tokens (U, V, D) --+
    items (B, L, D) -> SASRec | GRU | NextItNet -> states (B, L, D);   score = state . item

What stands left of the bar never changes: it is computed once for each text and picture and kept in cache_dir, as a memory
map, under a fingerprint of frozen weights and inputs. A step runs the top blocks on the U distinct items of its batch. U
decides the shapes, so a GPU is waited for a few times a step. Readings, of what the paper leaves open and its code does:
   1. trained are the last two blocks of each encoder and the norm after them, by name. The code compares tensor indices the
      wrong way round and freezes just those. Embeddings stay frozen, poolers are not used.
   2. at most 50 tokens of one string an item: its title and what else the data set says (appendix F.3).
   3. pictures are squeezed to the encoder's square and normalised by its own statistics (the code: .5). An item without
      a readable picture has a grey one, the same for all, in place of a [missing] token. Of an animation, the first frame.
   4. MAE sees all patches. Hugging Face's drops 75 % at random in every pass, which would make metrics random.
   5. MMSR-T, MMSR-V and the coarse fusions take the masked mean of the projected tokens; "+" is 3 x (dropout, linear, ReLU).
   6. merge-attention is BERT's layer (post-norm), and adds the modality embeddings that the code makes and forgets;
      co-attention is LXMERT's: one cross-attention for both directions, then own self-attention and feed-forward.
   7. padding is zero where a user encoder or a convolution reads it (in the code it is an encoded blank item).
   8. layers: SASRec 2, GRU 4, NextItNet 2 (appendix B). Positions are counted from the end. SASRec's attention has biases,
      texts keep their case.
   9. eq. (6): one negative, uniform over the items that the user's training sequence lacks. `--loss in_batch`: softmax over
      the targets of the batch minus log popularity, without the user's own items, as in the authors' MoRec.
  10. the learning rate drops to a tenth at 80 % of the epochs: the code's step, where the paper says "linearly".
  11. BatchNorm (ResNet) keeps its pre-trained statistics, as usual in fine-tuning.
Vision-language models: CLIP (as --text_encoder and --image_encoder, `--fusion concat`) and FLAVA with its own fusion, all of
which is trained (`--fusion flava`, appendix E). Left out: GroupViT, which groups tokens between blocks; ViLT and VisualBERT,
whose one stream has no boundary where a text or a picture alone could be cached.

Reads from the catalog: n_items, titles, image_paths, train_seqs.
"""
import hashlib
import os
import re
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

READS = ("titles", "image_paths", "train_seqs")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


@dataclass
class MMSRConfig:
    text_encoder: str = "FacebookAI/roberta-base"    # Hugging Face name or folder, or tiny, tiny-bert, -electra, -clip...
    image_encoder: str = "microsoft/swin-base-patch4-window7-224"    # the same; tiny, tiny-swin, -resnet, -clip, -flava
    modality: Literal["both", "text", "image"] = "both"              # text, image: MMSR-T, MMSR-V
    item_encoder: Literal["content", "id"] = "content"               # id: IDSR, the paper's baseline
    fusion: Literal["merge", "co", "sum", "concat", "gate", "film", "sum+", "concat+", "gate+", "film+", "flava"] = "merge"
    merge_layers: int = 1                # blocks of merge-attention: 1, 2, 4 in Table 3
    user_encoder: Literal["sasrec", "gru", "nextitnet"] = "sasrec"   # section 3.5
    tune_blocks: int = 2                 # top blocks of each encoder that are trained; 0: none
    loss: Literal["bce", "in_batch"] = "bce"         # eq. (6), or softmax over the targets of the batch
    cache: Literal["fp16", "fp32", "off"] = "fp16"   # hidden states at the frozen boundary; off: whole encoders every step
    cache_dir: str = "data/cache"        # where they are kept
    max_tokens: int = 50                 # of a text, appendix F.3
    dim: int = 768                       # section 4.2
    heads: int = 2                       # of SASRec, appendix B
    layers: int = 0                      # of the user encoder; 0: 2 for SASRec, 4 for GRU, 2 for NextItNet, appendix B
    dropout: float = 0.1                 # section 4.2: from .1, .3, .5
    max_len: int = 20                    # appendix C
    optimizer: str = "adamw"             # section 4.2
    schedule: Literal["constant", "step", "linear", "cosine"] = "step"    # to a tenth at 80 % of the epochs, section 4.2
    lr: float = 1e-4                     # section 4.2
    encoder_lr: float = 5e-5             # of the top blocks, Table 12
    weight_decay: float = 0.1            # section 4.2
    encoder_weight_decay: float = 0.0    # section 4.2
    batch_size: int = 64                 # section 4.2: from 64, 128, 256
    epochs: int = 150                    # section 4.2
    patience: int = 10                   # ours
    prefixes: bool = False               # dense next-item prediction, appendix B


SMALL = dict(text_encoder="tiny", image_encoder="tiny", loss="in_batch", dim=64, lr=1e-3, encoder_lr=1e-3, batch_size=32,
             epochs=13)
PRESETS = {"demo": SMALL, "demo-b": SMALL}

TOWERS = {                               # model type -> where its blocks are, and the norm after them
    "bert": ("encoder.layer", ""), "roberta": ("encoder.layer", ""), "electra": ("encoder.layer", ""),
    "clip_text_model": ("encoder.layers", "final_layer_norm"), "flava_text_model": ("encoder.layer", "layernorm"),
    "swin": ("encoder.layers.{last}.blocks", "layernorm"), "resnet": ("encoder.stages.{last}.layers", ""),
    "vit_mae": ("layers", "layernorm"), "clip_vision_model": ("encoder.layers", ""),
    "flava_image_model": ("encoder.layer", "layernorm")}
VIT = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, image_size=64, patch_size=16)
BERT = dict(VIT, vocab_size=4096, max_position_embeddings=514)
TINY = {                                 # model type -> settings of its tiny version
    "bert": BERT, "roberta": BERT, "electra": dict(BERT, embedding_size=32), "vit_mae": VIT,
    "swin": dict(image_size=64, embed_dim=16, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=4),
    "resnet": dict(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 3]),
    "clip": dict(text_config=dict(BERT, eos_token_id=2), vision_config=VIT),
    "flava": dict(text_config=BERT, image_config=VIT, multimodal_config=dict(VIT, num_hidden_layers=2))}


def load_encoder(name, modality):
    """Name, folder or tiny -> (Hugging Face model, tokenizer or (mean, std) of pixels). Raises ValueError."""
    import transformers
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    try:
        if name.partition("-")[0] == "tiny":
            kind = name.partition("-")[2] or {"text": "roberta", "image": "vit_mae"}[modality]
            with torch.random.fork_rng(devices=[]):      # the same weights whatever the run's seed, like a checkpoint's
                torch.manual_seed(0)
                model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **TINY[kind]))
            return model, tiny_tokens if modality == "text" else ([.5] * 3, [.5] * 3)
        model, info = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True,
                                                             output_loading_info=True, trust_remote_code=False)
        if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
            raise ValueError(f"it lacks weights: {', '.join(missing[:3])}, ...")
        if modality == "text":
            return model, transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        return model, (processor.image_mean, processor.image_std)
    except Exception as e:               # no such folder, no network, a foreign format: each has its own type
        reason = str(e).strip().splitlines()[0]
        raise ValueError(f"{modality}_encoder {name} cannot be loaded ({reason}): give the name or folder of a Hugging Face "
                         f"model, tiny, or tiny- and one of {', '.join(TINY)}") from None


def tiny_tokens(texts, max_length, **_):
    """Words as hashes, between RoBERTa's <s> and </s>: the tokenizer of the tiny encoders."""
    words = lambda text: [3 + zlib.crc32(word.encode()) % 4093 for word in re.findall(r"\w+", text.lower())]
    return {"input_ids": [[0, *words(text)[:max_length - 2], 2] for text in texts]}


class Boundary(nn.Module):
    """Stands where the first trained block stood: ends the encoder's own forward pass with what arrived here."""
    Reached = type("Reached", (Exception,), {})

    def forward(self, hidden, *_, **__):
        raise self.Reached(hidden)


class Tower(nn.Module):
    """An encoder: frozen and cached below the boundary, trained above; its weights are those of the trained blocks alone.

    wanted: the text, or the path of a picture or None, of each item; row 0 is padding. Raises ValueError.
    """

    def __init__(self, model, other, modality, wanted, cfg):
        super().__init__()
        config, self.modality, self.cfg, self.kind = model.config, modality, cfg, model.config.model_type
        if self.kind not in TOWERS or model.main_input_name != {"text": "input_ids", "image": "pixel_values"}[modality]:
            raise ValueError(f"{modality}_encoder of the type {self.kind} is not supported, only {', '.join(TOWERS)}")
        where, norm = TOWERS[self.kind]
        blocks = model.get_submodule(where.format(last=len(getattr(config, "depths", ())) - 1))
        first = len(blocks) - cfg.tune_blocks
        least = int(self.kind == "resnet")       # the first block of its last stage reads a map of another shape
        if not least <= first <= len(blocks):
            raise ValueError(f"tune_blocks {cfg.tune_blocks} of {modality}_encoder must be from 0 to {len(blocks) - least}")
        self.blocks = nn.ModuleList(list(blocks)[first:])
        own = cfg.fusion == "flava" and cfg.modality == "both"   # its fusion reads the tokens before their norm
        self.norm = model.get_submodule(norm) if norm and self.blocks and not own else nn.Identity()
        if norm and (self.blocks or own):        # trained, or not wanted: no part of the frozen bottom
            model.set_submodule(norm, nn.Identity())
        if self.blocks:
            blocks[first] = Boundary()
            del blocks[first + 1:]
        for module in self.modules():    # indices of positions, statistics of BatchNorm: not learned
            module._non_persistent_buffers_set.update(module._buffers)
        if self.kind == "vit_mae":
            model.embeddings.random_masking = lambda x, noise=None: (x, None, None)              # reading 4
        self.bottom = [model.eval()]                                               # in a list: no part of the weights
        self.width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        row = {x: i for i, x in enumerate(dict.fromkeys(["" if modality == "text" else None, *wanted[1:]]))}
        self.register_buffer("row_of", torch.tensor([0, *map(row.get, wanted[1:])]), persistent=False)
        self.inputs, self.hidden, self.start, self.unreadable = list(row), None, None, 0
        if modality == "text":
            room = config.max_position_embeddings - (config.pad_token_id + 1 if self.kind == "roberta" else 0)
            if not 3 <= cfg.max_tokens <= room:
                raise ValueError(f"max_tokens {cfg.max_tokens} of {cfg.text_encoder} must be from 3 to {room}")
            self.inputs = other(self.inputs, max_length=cfg.max_tokens, truncation=True)["input_ids"]
        else:
            size = getattr(config, "image_size", 64 if cfg.image_encoder.partition("-")[0] == "tiny" else 224)
            self.size, (self.mean, self.std) = np.ravel(size)[0].item(), torch.tensor(other)[..., None, None]
        self.train()

    def train(self, mode=True):
        return super().train(mode and self.kind != "resnet")                       # reading 11

    def read(self, x):
        """Token ids -> (T,), or a path -> (3, S, S), grey for None and for what is no picture."""
        if self.modality == "text":
            return torch.tensor(x)
        try:
            with Image.open(x, formats=FORMATS) if x else Image.new("RGB", (1, 1), (128, 128, 128)) as picture:
                if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:        # Pillow itself only warns
                    raise ValueError
                picture = picture.convert("RGB").resize((self.size, self.size), Image.BICUBIC)
            return (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - self.mean) / self.std
        except Exception:                # a damaged file makes Pillow raise almost anything
            self.unreadable += 1
            return self.read(None)

    @torch.no_grad()
    def below(self, inputs, device):
        """What `read` made of n inputs -> hidden states at the boundary (n, T, width), mask (n, T)."""
        model, mask = self.bottom[0].to(device), None
        if self.modality == "text":
            ids = nn.utils.rnn.pad_sequence(inputs, True, model.config.pad_token_id or 0).to(device)
            lengths = torch.tensor([len(x) for x in inputs], device=device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            given = {"input_ids": ids, "attention_mask": mask.long()}
        else:
            given = {"pixel_values": torch.stack(inputs).to(device)}
        with torch.autocast(device.type, enabled=False):
            try:
                hidden = model(**given).last_hidden_state
            except Boundary.Reached as reached:
                hidden = reached.args[0]
        hidden = hidden.flatten(2).mT if hidden.dim() == 4 else hidden             # ResNet's map -> (n, V, width)
        return hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask

    def prepare(self, device):
        """Open the cache, or fill it; then forget the frozen bottom. Does nothing the second time."""
        if self.hidden is not None:
            return
        if self.cfg.cache == "off":
            self.hidden = self.inputs
            return
        n, dtype = len(self.inputs), {"fp16": np.float16, "fp32": np.float32}[self.cfg.cache]
        path = Path(self.cfg.cache_dir) / f"{self.modality}-{self.fingerprint()}.{self.cfg.cache}"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial, begin = Path(f"{path}.{os.getpid()}"), time.time()
            try:
                self.fill(partial, dtype, device)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            size = path.stat().st_size
            print(f"{n} {self.modality}s to the boundary, {self.unreadable} unreadable, {time.time() - begin:.0f} s: "
                  f"{size / 2**20:.1f} MiB, {size / 1024 / n:.1f} KiB each, in {path}", flush=True)
        self.hidden = torch.from_numpy(np.memmap(path, dtype, "c").reshape(-1, self.width))
        lengths = [len(x) for x in self.inputs] if self.modality == "text" else [len(self.hidden) // n] * n
        self.start, self.bottom = torch.tensor([0, *lengths], device=device).cumsum(0), None
        if device.type == "cuda" and self.hidden.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.hidden = self.hidden.to(device)

    def fill(self, path, dtype, device):
        """Hidden states of every input's tokens, one after the other: (tokens, width) as dtype."""
        step = 256 if device.type == "cuda" else 32
        with open(path, "wb") as f, ThreadPoolExecutor() as pool, np.errstate(over="ignore"):
            for first in range(0, len(self.inputs), step):
                hidden, mask = self.below(list(pool.map(self.read, self.inputs[first:first + step])), device)
                rows = hidden[mask].cpu().numpy().astype(dtype)
                if not np.isfinite(rows).all():
                    raise ValueError(f"{self.modality}_encoder has hidden states beyond fp16: give cache fp32")
                f.write(rows.tobytes())
            f.flush(), os.fsync(f.fileno())

    def fingerprint(self):
        """Of what decides the cache: the frozen model, and the tokens, or each picture's path, size and time."""
        pixels = () if self.modality == "text" else (self.size, self.mean, self.std)
        digest = hashlib.blake2b(f"{self.bottom[0].config} {self.cfg.tune_blocks} {pixels}".encode(), digest_size=12)
        for key, weight in self.bottom[0].state_dict().items():
            if "pooler" not in key:              # not used, and random where a checkpoint lacks it
                digest.update(weight.cpu().contiguous().numpy().tobytes())
        for x in self.inputs:
            about = os.stat(x)[6:9:2] if isinstance(x, str) and os.path.exists(x) else ()      # size, time
            digest.update(f"{x} {about}".encode())
        return digest.hexdigest()

    def boundary(self, rows):                                    # rows of the inputs (R,) -> (R, T, width), mask (R, T)
        if self.start is None:           # no cache
            return self.below([self.read(self.hidden[row]) for row in rows.tolist()], rows.device)
        length = self.start[rows + 1] - self.start[rows]
        place = torch.arange(int(length.max()), device=rows.device)
        mask = place < length[:, None]
        place = torch.where(mask, self.start[rows, None] + place, 0)
        return self.hidden[place.to(self.hidden.device)].to(rows.device).float(), mask

    def forward(self, items):                                    # (U,) -> tokens (U, T, width), mask (U, T)
        rows, back = self.row_of[items].unique(return_inverse=True)
        x, mask = self.boundary(rows)
        side = (int(x.shape[1] ** .5),) * 2
        if self.modality == "text":
            look = mask[:, None, None].expand(-1, 1, x.shape[1], -1)               # (R, 1, T, T) True = may look
            look = look.tril() if self.kind == "clip_text_model" else look
            also = (torch.zeros_like(look, dtype=x.dtype).masked_fill(~look, torch.finfo(x.dtype).min),)
        else:
            also = {"resnet": (), "swin": (side,)}.get(self.kind, (None,))
        x = x.mT.unflatten(2, side) if self.kind == "resnet" else x
        for block in self.blocks:
            x = block(x, *also)
            x = x[0] if isinstance(x, tuple) else x
        x = x.flatten(2).mT if self.kind == "resnet" else x
        return self.norm(x).index_select(0, back), mask[back]


def masked_mean(x, mask):                                        # (U, T, D), (U, T) -> (U, D)
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


COARSE = {                               # fusion -> its linear maps (widths in units of dim), and what it makes of two means
    "sum": ({"Wx": (1, 1), "Wy": (1, 1)}, lambda m, x, y: m["Wx"](x) + m["Wy"](y)),
    "concat": ({"W": (2, 1)}, lambda m, x, y: m["W"](torch.cat([x, y], -1))),
    "gate": ({"Wx": (1, 1), "Wy": (1, 1), "W": (1, 1)}, lambda m, x, y: m["W"](m["Wx"](x).sigmoid() * m["Wy"](y))),
    "film": ({"gamma": (1, 1), "beta": (1, 1), "W": (1, 1)}, lambda m, x, y: m["W"](m["gamma"](x) * y + m["beta"](x)))}


class Fusion(nn.Module):
    """Text tokens x (U, T, D), picture tokens y (U, V, D) and their masks -> item vectors (U, D). Section 3.3."""

    def __init__(self, cfg, flava):
        super().__init__()
        d, p, self.kind = cfg.dim, cfg.dropout, cfg.fusion.removesuffix("+")
        heads = max(h for h in range(1, max(1, d // 64) + 1) if d % h == 0)        # of width 64, as in BERT
        if self.kind in COARSE:
            self.maps = nn.ModuleDict({name: nn.Linear(i * d, o * d) for name, (i, o) in COARSE[self.kind][0].items()})
            self.norm = nn.LayerNorm(d, eps=1e-6)                                  # one for both means
            deep = [layer for _ in range(3) for layer in (nn.Dropout(p), nn.Linear(d, d), nn.ReLU())]
            self.dnn = nn.Sequential(*deep if cfg.fusion.endswith("+") else ())    # reading 5
        elif self.kind == "flava":
            if flava.config.model_type != "flava" or cfg.text_encoder != cfg.image_encoder:
                raise ValueError("fusion flava needs one FLAVA model as text_encoder and as image_encoder")
            self.x, self.y, self.model = flava.text_to_mm_projection, flava.image_to_mm_projection, flava.multimodal_model
            self.model.pooler, self.out = None, nn.Linear(flava.mm_hidden_size, d)
        else:
            self.kinds = nn.Parameter(torch.empty(2, d))                           # reading 6
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(d, heads, 4 * d, p, "gelu", 1e-12, batch_first=True)
                                        for _ in range(2 if self.kind == "co" else cfg.merge_layers))
        if self.kind == "co":
            self.cross, self.out = nn.MultiheadAttention(d, heads, p, batch_first=True), nn.Linear(2 * d, d)
            self.norm, self.dropout = nn.LayerNorm(d, 1e-12), nn.Dropout(p)

    def forward(self, x, x_mask, y, y_mask):
        return getattr(self, "coarse" if self.kind in COARSE else self.kind)(x, x_mask, y, y_mask)

    def coarse(self, x, x_mask, y, y_mask):
        return self.dnn(COARSE[self.kind][1](self.maps, *map(self.norm, (masked_mean(x, x_mask), masked_mean(y, y_mask)))))

    def merge(self, x, x_mask, y, y_mask):
        z, mask = torch.cat([x + self.kinds[0], y + self.kinds[1]], 1), torch.cat([x_mask, y_mask], 1)   # (U, T+V, D)
        for block in self.blocks:
            z = block(z, src_key_padding_mask=~mask)
        return masked_mean(z, mask)

    def co(self, x, x_mask, y, y_mask):                          # reading 6
        attend = lambda q, k, mask: self.norm(q + self.dropout(self.cross(q, k, k, ~mask, need_weights=False)[0]))
        x, y = x + self.kinds[0], y + self.kinds[1]
        x, y = attend(x, y, y_mask), attend(y, x, x_mask)
        x, y = self.blocks[0](x, src_key_padding_mask=~x_mask), self.blocks[1](y, src_key_padding_mask=~y_mask)
        return self.out(torch.cat([masked_mean(x, x_mask), masked_mean(y, y_mask)], -1))

    def flava(self, x, x_mask, y, y_mask):                       # the class token of its multimodal Transformer
        z, mask = torch.cat([self.y(y), self.x(x)], 1), torch.cat([y_mask[:, :1], y_mask, x_mask], 1)
        return self.out(self.model(z, attention_mask=mask.long()).last_hidden_state[:, 0])


class SASRec(nn.Module):                 # the user encoders: section 3.5, appendix B
    def __init__(self, cfg):
        super().__init__()
        if cfg.dim % cfg.heads:
            raise ValueError(f"dim {cfg.dim} must be a multiple of heads {cfg.heads}")
        self.heads, self.position = cfg.heads, nn.Parameter(torch.empty(cfg.max_len, cfg.dim))
        self.norm, self.dropout = nn.LayerNorm(cfg.dim), nn.Dropout(cfg.dropout)
        block = lambda: nn.TransformerEncoderLayer(cfg.dim, cfg.heads, 4 * cfg.dim, cfg.dropout, batch_first=True)
        self.blocks = nn.ModuleList(block() for _ in range(cfg.layers or 2))

    def forward(self, x, real):                                  # items (B, L, D), real (B, L) -> states (B, L, D)
        L = x.shape[1]
        x = self.dropout(self.norm(x + self.position[-L:]))
        causal = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=x.device)                   # a padded row must see something
        hide = ~(causal & real[:, None] | itself).repeat_interleave(self.heads, 0)           # (B heads, L, L)
        for block in self.blocks:
            x = block(x, hide)
        return x


class GRU(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.dropout = nn.Dropout(cfg.dropout)
        self.gru = nn.GRU(cfg.dim, cfg.dim, cfg.layers or 4, bias=False, batch_first=True)

    def forward(self, x, real):          # without biases, zeros on the left leave the state at zero
        return self.gru(self.dropout(x))[0]


class NextItNet(nn.Module):
    """Layers of two residual blocks (b), each of two causal convolutions of width 3, dilated by d and 2 d; d = 1, 4."""

    def __init__(self, cfg):
        super().__init__()
        self.dilations = [d for _ in range(cfg.layers or 2) for d in (1, 2, 4, 8)]
        self.convolutions = nn.ModuleList(nn.Conv1d(cfg.dim, cfg.dim, 3, dilation=d) for d in self.dilations)
        self.norms = nn.ModuleList(nn.LayerNorm(cfg.dim) for _ in self.dilations)

    def forward(self, x, real):
        for i, (convolution, norm, d) in enumerate(zip(self.convolutions, self.norms, self.dilations)):
            before = x if i % 2 == 0 else before
            x = norm(convolution(F.pad(x.mT, (2 * d, 0))).mT).relu() * real[..., None]
            x = x + before if i % 2 else x
        return x


class MMSR(nn.Module):
    def __init__(self, cfg, catalog):
        super().__init__()
        self.cfg, self.n_items, N = cfg, catalog["n_items"], catalog["n_items"]
        self.towers, self.project = nn.ModuleDict(), nn.ModuleDict()
        self.user = {"sasrec": SASRec, "gru": GRU, "nextitnet": NextItNet}[cfg.user_encoder](cfg)
        both, content = cfg.modality == "both", cfg.item_encoder == "content"
        for modality in (("text", "image") if both else (cfg.modality,)) if content else ():
            whole, other = load_encoder(getattr(cfg, f"{modality}_encoder"), modality)
            parts = {"text": ("text_model",), "image": ("vision_model", "image_model")}[modality]      # of CLIP, FLAVA
            model = next((getattr(whole, part) for part in parts if hasattr(whole, part)), whole)
            wanted = catalog[{"text": "titles", "image": "image_paths"}[modality]]
            tower = self.towers[modality] = Tower(model, other, modality, wanted, cfg)
            self.project[modality] = nn.Identity() if both and cfg.fusion == "flava" else nn.Linear(tower.width, cfg.dim)
        self.fusion = Fusion(cfg, whole) if both and content else None
        self.item = None if content else nn.Embedding(N + 1, cfg.dim, padding_idx=0)
        self.pre_trained = {*self.towers.parameters(), *(p for name in ("x", "y", "model") for p in
                                                         getattr(self.fusion, name, nn.Module()).parameters())}
        for name, weight in self.named_parameters():
            if weight.dim() > 1 and weight not in self.pre_trained:
                free = name in ("item.weight", "user.position", "fusion.kinds")
                nn.init.normal_(weight, std=.02) if free else nn.init.xavier_normal_(weight)
        own = [sorted(set(seq)) for seq in catalog["train_seqs"]]
        # how many items the user lacks before the i-th of those he has, + user (N+1): sorted, so one search finds all
        lacked = [u * (N + 1) + item - 1 - i for u, seq in enumerate(own) for i, item in enumerate(seq)]
        flat = torch.tensor([item for seq in catalog["train_seqs"] for item in seq], dtype=torch.long)
        for name, value in {"lacked": torch.tensor(lacked), "first": torch.tensor([0, *map(len, own)]).cumsum(0),
                            "log_pop": flat.bincount(minlength=N + 1).clamp(min=1).log()}.items():
            self.register_buffer(name, value, persistent=False)

    def items(self, ids):
        """Item vectors (U, D) of ids (U,); zero for padding."""
        if self.item is not None:
            return self.item(ids) * (ids != 0)[:, None]
        self.prepare(ids.device)
        tokens = []
        for modality, tower in self.towers.items():
            x, mask = tower(ids)
            tokens += [self.project[modality](x), mask]                            # (U, T, D), (U, T)
        return (self.fusion or masked_mean)(*tokens) * (ids != 0)[:, None]

    def negatives(self, user, L):
        """user (B,) -> (B, L) items, each uniform over those that the user's training sequence lacks; 0: there is none."""
        draw = torch.rand(len(user), max(L, self.cfg.max_len), device=user.device, dtype=torch.float64)[:, -L:]
        user = user[:, None]             # the draws are those of the places from the end, so that padding changes none
        first = self.first[user]
        n = self.n_items - (self.first[user + 1] - first)
        r = (draw * n).long()                                                      # take the r-th of them
        before = torch.searchsorted(self.lacked, user * (self.n_items + 1) + r, right=True) - first
        return torch.where(n > 0, r + 1 + before, 0)

    def forward(self, batch):
        seq, target = batch["seq"], batch["target"]
        if self.cfg.prefixes:                                                      # one target a row, the last
            target = F.pad(target[:, -1:], (seq.shape[1] - 1, 0))
        real, bce = target != 0, self.cfg.loss == "bce"
        negative = self.negatives(batch["user"], seq.shape[1]) * real if bce else target
        ids, place = torch.stack([seq, target, negative]).unique(return_inverse=True)
        vectors = self.items(ids)                                                  # (U, D): each distinct item once
        x, right, wrong = F.embedding(place, vectors)                              # (B, L, D)
        states = self.user(x, seq != 0)                                            # (B, L, D)
        if bce:
            loss = F.softplus((states * wrong).sum(-1)) * ((negative != 0) & (negative != target))
            loss = loss + F.softplus(-(states * right).sum(-1)) * real             # eq. (6)
        else:                                                                      # reading 9
            logits = (states @ vectors.T).float() - self.log_pop[ids]              # (B, L, U)
            out = torch.ones_like(ids, dtype=torch.bool).index_fill_(0, place[1].flatten(), False) | (ids == 0)
            out = out.repeat(len(seq), 1).scatter_(1, place[:2].transpose(0, 1).flatten(1), True)      # (B, U)
            out = out[:, None].repeat(1, seq.shape[1], 1).scatter_(2, place[1, ..., None], False)      # (B, L, U)
            loss = F.cross_entropy(logits.masked_fill(out, -torch.inf).mT, place[1], reduction="none") * real
        return {"next_item": loss.sum() / real.sum().clamp(min=1)}

    def encode_items(self):
        ids = torch.arange(self.n_items + 1, device=self.first.device)
        return torch.cat([self.items(part) for part in ids.split(1024 if ids.is_cuda else 256)])   # (N+1, D)

    def score(self, batch, table):                                                 # -> (B, N+1)
        real = batch["seq"] != 0
        return self.user(table[batch["seq"]] * real[..., None], real)[:, -1] @ table.T

    def prepare(self, device):
        """Fill or open the caches now, and not in the first step. Raises ValueError."""
        for tower in self.towers.values():
            tower.prepare(device)

    def init_from(self, state):
        """Start from the weights of a model of any catalog. Raises ValueError unless they are exactly these weights."""
        shapes = lambda weights: {(key, value.shape) for key, value in weights.items()}
        if strange := sorted({key for key, _ in shapes(self.state_dict()) ^ shapes(state)}):
            raise ValueError(f"its weights differ ({', '.join(strange[:3])}, ...): give the same encoders, fusion and dim")
        self.load_state_dict(state)

    def param_groups(self, cfg):
        top, rest = ([p for p in self.parameters() if (p in self.pre_trained) == yes] for yes in (True, False))
        encoders = {"params": top, "lr": cfg.encoder_lr, "weight_decay": cfg.encoder_weight_decay}
        return [encoders, {"params": rest}] if top else [{"params": rest}]


Model, Config = MMSR, MMSRConfig


if __name__ == "__main__":
    import tempfile
    torch.manual_seed(0)
    start, N, B, L = time.time(), 100, 8, 10
    items = torch.randint(1, N + 1, (B, L + 1))
    catalog = {"n_items": N, "titles": ["", *(f"thing number {i}" for i in range(N))], "image_paths": [None] * (N + 1),
               "train_seqs": items.tolist()}
    items[0, :4] = 0
    batch = {"user": torch.arange(B), "seq": items[:, :-1], "target": items[:, 1:] * (items[:, :-1] != 0)}
    with tempfile.TemporaryDirectory() as folder:
        model = MMSR(MMSRConfig(text_encoder="tiny", image_encoder="tiny", dim=64, cache_dir=folder), catalog)
        losses = model(batch)
        sum(losses.values()).backward()
        scores = model.eval().score(batch, model.encode_items())
    print({k: round(v.item(), 4) for k, v in losses.items()}, "scores", tuple(scores.shape), f"{time.time() - start:.2f} s")
    assert scores.shape == (B, N + 1) and scores.isfinite().all()
