"""Speed, side by side: our form of a piece of work against the usual one, in turn, in one process.

    python bench.py --data $DATA/beauty                    any data set; the default is demo
    python bench.py --data $DATA/beauty --text MODEL       the same, and encoding its sentences
    python bench.py --items 500000 --users 1000000         memory and time in a made-up shop
    python bench.py --only sasrec,evaluation               some of the comparisons

Medians of several runs. Only the ratios mean something on another machine.
"""
import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
import train
from common.encoders import open_encoder
from common.files import UserError, command, pick_device, precision
from evaluate import ranks_of
from extract_features import inputs_of
from loop import runs
from loop.settings import load_model_file

TARGETS = 20_000    # training targets that a usual form works through per repetition
USERS = 4_000       # test users that each contestant ranks per repetition
ITEMS = 3_000       # items whose sentences are encoded per repetition


# ---------------- what the contestants share

@dataclass
class Setting:
    """A model file as it is, on one data set with the built-in features."""
    module: object
    cfg: object
    dataset: data.Data
    catalog: dict
    rows: data.Rows
    device: torch.device

    def start(self):
        """A new model, its optimizer, and the time."""
        model = runs.build(self.module.Model, self.cfg, self.catalog, self.device, 0)
        return model, train.optimizer_of(model, self.cfg, self.cfg.lr), time.perf_counter()

    def epoch(self):
        """Targets per second of an epoch of train.py."""
        model, optimizer, begin = self.start()
        size = self.cfg.batch_size
        trainer = train.Trainer(model, model.forward, optimizer, self.device, size)
        train.train_epoch(trainer, self.rows, np.random.default_rng(0), "epoch")
        targets = len(self.rows) if self.cfg.prefixes else self.rows.lengths.sum()
        return targets / elapsed(begin, self.device)


def setting_of(name, dataset, device, **settings):
    module = load_model_file(name)
    encoders = SimpleNamespace(text="hash", image="pixels")
    cfg = module.Config(**settings)
    catalog = runs.build_catalog(module, dataset, encoders, device)
    kind = "prefixes" if cfg.prefixes else "sequences"
    rows = dataset.training_rows(kind, cfg.max_len, device)
    return Setting(module, cfg, dataset, catalog, rows, device)


def padded_batches(sequences, max_len, size):
    """The usual loader: a Python loop, each sequence padded, the item after each as target."""
    for first in range(0, len(sequences), size):
        seqs, targets = [], []
        for sequence in sequences[first:first + size]:
            items = sequence[-max_len - 1:]
            padding = [0] * (max_len + 1 - len(items))
            seqs.append((padding + items)[:-1])
            targets.append(([0] + padding + items[1:])[-max_len:])
        yield torch.tensor(seqs), torch.tensor(targets)


def shuffled(sequences):
    order = np.random.default_rng(0).permutation(len(sequences))
    return [sequences[i] for i in order]


def prefixes_of(setting, n):
    """The first n prefixes with their target as last item, users in random order."""
    users = shuffled(np.unique(setting.rows.users))
    every = (setting.dataset.train_seqs[user] for user in users)
    return list(islice((seq[:k] for seq in every for k in range(2, len(seq) + 1)), n))


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def elapsed(begin, device):
    """Seconds since, with all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def compare(title, unit, contestants, repeats):
    """Run the contestants in turn; print each median and how many times faster the first one is."""
    speeds = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            speeds[name].append(contestant())
    print(f"\n{title}")
    first = median(next(iter(speeds.values())))
    for name, values in speeds.items():
        value = median(values)
        shown = f"{value:.0f}" if value >= 10 else f"{value:.3f}"
        print(f"  {name:<56}{shown:>10} {unit}{first / value:>8.1f}x", flush=True)


# ---------------- the comparisons: each a {name: function that returns work per second}

def sasrec(dataset, device):
    setting = setting_of("sasrec", dataset, device)
    n = max(1, int(TARGETS / setting.rows.lengths.mean()))
    users = shuffled(setting.rows.users)[:n]
    sequences = [dataset.train_seqs[user] for user in users]

    def padded(all_rows):
        model, optimizer, begin = setting.start()
        done = 0
        for seq, target in padded_batches(sequences, 50, setting.cfg.batch_size):
            seq, target = seq.to(device), target.to(device)
            with precision(device):
                states = model.states(seq, model.item.weight).flatten(0, 1)
                target = target.flatten()
                if not all_rows:
                    states, target = states[target != 0], target[target != 0]
                logits = states @ model.item.weight.T
                loss = F.cross_entropy(logits, target, ignore_index=0)
            update(optimizer, loss)
            done += int((target != 0).sum())
            if all_rows and done >= TARGETS / 8:    # it is slow, and every step costs the same
                break
        return done / elapsed(begin, device)

    return "SASRec training, full softmax", "targets/s", {
        "ours: a whole epoch of train.py": setting.epoch,
        "padded to 50, softmax of rows with a target": lambda: padded(False),
        "padded to 50, softmax of all rows": lambda: padded(True),
    }


def srmml(dataset, device):
    setting = setting_of("srmml", dataset, device)
    module, cfg = setting.module, setting.cfg
    sequences = [dataset.train_seqs[user] for user in shuffled(setting.rows.users)]
    products = module.wasserstein

    def by_subtraction(a, b):
        return (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)

    def loss_of(distance, states, places, scale, target):
        logits = -scale * distance(states, places)
        return F.cross_entropy(logits[:, 1:], target - 1, reduction="sum")

    def usual(distance, steps, chunk):
        """Plain logits in checkpointed chunks, which would not fit otherwise."""
        module.wasserstein = distance
        model, optimizer, begin = setting.start()
        done = 0
        for seq, target in islice(padded_batches(sequences, 50, cfg.batch_size), steps):
            seq, target = seq.to(device), target.to(device).flatten()
            with precision(device):
                table = model.encode_items()
                states = model.states(seq, table).flatten(0, 1)[target != 0]
                target = target[target != 0]
                scale = model.log_scale.exp()
                loss = 0
                for s, t in zip(states.split(chunk), target.split(chunk)):
                    loss = loss + checkpoint(
                        loss_of, distance, s, table["point"], scale, t, use_reentrant=False
                    )
                loss = loss / len(target)
            update(optimizer, loss)
            done += len(target)
        module.wasserstein = products
        return done / elapsed(begin, device)

    return "SRMML training, full softmax", "targets/s", {
        "ours: a whole epoch of train.py": setting.epoch,
        "padded to 50, plain logits, distances as products": lambda: usual(products, 8, 256),
        "padded to 50, plain logits, by subtraction": lambda: usual(by_subtraction, 1, 16),
    }


def msm4sr(dataset, device):
    setting = setting_of("msm4sr", dataset, device)
    prefixes = prefixes_of(setting, 512)

    def usual():
        model, optimizer, begin = setting.start()
        encoders = [model.m2se.encoders[m] for m in model.scored]
        for seq, target in padded_batches(prefixes, 50, 256):
            seq, answer = seq.to(device), target[:, -1].to(device)
            with precision(device):
                table = model.encode_items()
                streams = []
                for encoder in encoders:    # every position by itself
                    streams.append(encoder(seq.flatten()).unflatten(0, seq.shape) + model.item(seq))
                h = model.m2se.transform(streams, seq)
                states = torch.cat([F.normalize(s[:, -1], dim=-1) for s in h], -1)
                logits = states @ table["candidates"].T
                loss = F.cross_entropy(logits[:, 1:], answer - 1)
            update(optimizer, loss)
        return len(prefixes) / elapsed(begin, device)

    return "MSM4SR fine-tuning, full softmax", "targets/s", {
        "ours: a whole epoch of train.py": setting.epoch,
        "a padded row per prefix, encoded position by position": usual,
    }


def fmmsrec(dataset, device):
    share = min(1., TARGETS / dataset.train_counts.sum())
    few = data.load(dataset.folder, train_share=share)
    setting = setting_of("fmmsrec", few, device, dim=64, heads=4, batch_size=256)
    prefixes = prefixes_of(setting, 1024)

    def usual():
        model, optimizer, begin = setting.start()
        for seq, target in padded_batches(prefixes, setting.cfg.max_len, 256):
            seq, answer = seq.to(device), target[:, -1].to(device)
            ratio = setting.cfg.mask_ratio
            read, chosen = setting.module.mask_items(seq, model.n_items, ratio)
            real = F.pad(seq != 0, (0, 1), value=True)
            position = model.position[-seq.shape[1] - 1:, None]
            answers = torch.cat([seq * chosen, answer[:, None]], 1)    # 0: nothing to predict here
            with precision(device):
                E, has = model.encoder.embed(F.pad(read, (0, 1)).flatten())    # place by place
                E, has = E.unflatten(0, real.shape), has.unflatten(0, real.shape)
                x = model.encoder.transform(E, has, real, position)
                states = model.state(x.flatten(0, 1), has.flatten(0, 1))
                logits = states @ model.encode_items()["item"].T
                loss = F.cross_entropy(logits, answers.flatten(), ignore_index=0)
            update(optimizer, loss)
        return len(prefixes) / elapsed(begin, device)

    return "FMMS-Rec training, full softmax", "targets/s", {
        "ours: an epoch of train.py": setting.epoch,
        "a padded row per prefix, encoded position by position": usual,
    }


BASE = {    # MMSR's encoders at base size, with random weights
    "roberta": dict(max_position_embeddings=514),
    "swin": dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
}


def mmsr(dataset, device, encoders=BASE):
    """A step on the items of a few users, with the frozen part cached and not."""
    module = load_model_file("mmsr")
    module.TINY = encoders
    users = shuffled(range(dataset.n_users))[:8]
    sequences = [dataset.train_seqs[user][-8:] for user in users]
    items = sorted(set().union(*sequences))    # the catalog: what these users have
    number = {item: i for i, item in enumerate(items, 1)}
    sequences = [[number[item] for item in sequence] for sequence in sequences]
    whole = dataset.catalog(module.READS)
    catalog = {"n_items": len(items), "train_seqs": sequences}
    for key in ("titles", "image_paths"):
        catalog[key] = [whole[key][item] for item in [0, *items]]
    (seq, target), = padded_batches(sequences, 8, len(sequences))
    batch = {"user": torch.arange(len(sequences)), "seq": seq, "target": target}
    batch = {key: x.to(device) for key, x in batch.items()}

    folder = tempfile.TemporaryDirectory()    # as long as a contestant needs it

    def contestant(cache):
        cfg = module.Config(
            text_encoder="tiny-roberta", image_encoder="tiny-swin", cache=cache,
            cache_dir=folder.name,
        )
        model = runs.build(module.Model, cfg, catalog, device, 0).train()
        optimizer = train.optimizer_of(model, cfg, cfg.lr)

        def step():
            begin = time.perf_counter()
            with precision(device):
                loss = model(batch)["next_item"]
            update(optimizer, loss)
            return 1 / elapsed(begin, device)

        step()
        return step

    return "MMSR training, encoders of base size", "steps/s", {
        f"ours: a step on {len(items)} items, frozen blocks cached": contestant("fp16"),
        "the whole encoders in every step": contestant("off"),
    }


def evaluation(dataset, device):
    setting = setting_of("sasrec", dataset, device)
    model = setting.start()[0].eval()
    rows = dataset.evaluated_rows("test", 50, device)
    users = rows.users[:USERS]
    ends = dataset.targets["test"][users] + 1
    histories = [dataset.flat[a:b].tolist() for a, b in zip(dataset.offsets[users], ends)]

    def ours():
        begin = time.perf_counter()
        ranks_of(model, rows, device)
        return len(rows) / elapsed(begin, device)

    @torch.no_grad()
    def usual():
        begin = time.perf_counter()
        table = model.encode_items()
        for seq, target in padded_batches(histories, 50, 256):
            scores = model.score({"seq": seq.to(device)}, table)
            scores[:, 0] = -torch.inf
            answer = target[:, -1:].to(device)
            (scores.argsort(1, descending=True) == answer).nonzero()
            for row, items in enumerate(seq.tolist()):    # without the history
                seen = [item for item in items if item and item != target[row, -1]]
                scores[row, seen] = -torch.inf
            (scores.argsort(1, descending=True) == answer).nonzero()
        return len(users) / elapsed(begin, device)

    return "evaluation, full ranking, plain and masked", "users/s", {
        "ours: length-sorted, trimmed, counting": ours,
        "padded, Python loader, whole matrix sorted": usual,
    }


def encoding(dataset, encoder, device):
    which, inputs = inputs_of(dataset, "text")
    items = shuffled(which)[:ITEMS]
    sentences = [inputs[number] for numbers in items for number in numbers]
    model = open_encoder("text", encoder, device)

    def ours(texts):
        begin = time.perf_counter()
        model.encode(texts)
        return len(sentences) / elapsed(begin, device)

    @torch.inference_mode()
    def usual(share, **padding):
        texts = sentences[:len(sentences) // share]
        begin = time.perf_counter()
        for first in range(0, len(texts), 32):
            tokens = model.tokenizer(
                texts[first:first + 32], truncation=True, max_length=256, return_tensors="pt",
                **padding,
            )
            with precision(device):
                model.pool(tokens.to(device)).cpu()
        return len(texts) / elapsed(begin, device)

    distinct = list(dict.fromkeys(sentences))
    return f"encoding with {encoder}", "sentences/s", {
        "ours: each distinct one, by length, token budget": lambda: ours(distinct),
        "ours, repeated sentences encoded again": lambda: ours(sentences),
        "padded to the batch's longest": lambda: usual(4, padding=True),
        "padded to 256 tokens": lambda: usual(32, padding="max_length"),
    }


COMPARISONS = {
    "sasrec": sasrec,
    "srmml": srmml,
    "msm4sr": msm4sr,
    "fmmsrec": fmmsrec,
    "mmsr": mmsr,
    "evaluation": evaluation,
}


# ---------------- a made-up shop of any size

def made_shop(n_items, n_users, width=64):
    """Users with 3 to 50 items, 10 on average, drawn by skewed popularity -> a data set, and a
    catalog of random features for every model that is measured."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(3 + rng.geometric(1 / 8, n_users), 50)
    offsets = np.concatenate([[0], lengths.cumsum()])
    sales = (np.arange(1, n_items + 1) + 10.) ** -.8    # of an item, by its rank
    share = sales.cumsum() / sales.sum()
    flat = rng.permutation(n_items)[np.searchsorted(share, rng.random(offsets[-1]))] + 1
    about = {"name": "made"}
    dataset = data.Data(
        Path("."), about, flat, offsets, np.zeros_like(flat), n_items, "leave_one_out"
    )
    has = torch.arange(n_items + 1) > 0
    random = torch.Generator().manual_seed(0)
    catalog = {"n_items": n_items, "has_text": has, "has_image": has, "lang": has.long()}
    catalog["train_seqs"] = dataset.train_seqs
    for modality in ("text", "image"):
        catalog[modality] = torch.randn(n_items + 1, width, generator=random) * has[:, None]
    return dataset, catalog


def large(name, shop, steps, device, **settings):
    """A model on a made-up shop: its set-up, some steps, and the evaluation of 20,000 users."""
    dataset, catalog = shop
    module = load_model_file(name)
    cfg = module.Config(**settings)
    catalog = {key: catalog[key] for key in ("n_items", *module.READS)}
    print(f"\n{name}, {dataset.n_users} users, {dataset.n_items} items, dim {cfg.dim}")
    begin = time.perf_counter()
    model = runs.build(module.Model, cfg, catalog, device, 0)
    rows = dataset.training_rows("prefixes" if cfg.prefixes else "sequences", cfg.max_len, device)
    say("set-up", begin, device)
    trainer = train.Trainer(
        model, model.forward, train.optimizer_of(model, cfg, cfg.lr), device, cfg.batch_size
    )
    watch = train.Watch(device)
    batches = islice(rows.epoch(cfg.batch_size, np.random.default_rng(0)), steps + 1)
    for number, (batch, index) in enumerate(batches):
        if number <= 1:    # the first one makes ready
            begin, targets = time.perf_counter(), 0
        train.train_step(trainer, batch, watch, rows.users[index])
        targets += len(index) if cfg.prefixes else rows.lengths[index].sum()
    say(f"{watch.steps - 1} steps, {targets} targets", begin, device)
    begin = time.perf_counter()
    evaluated = dataset.evaluated_rows("test", cfg.max_len, device, most=20_000)
    ranks_of(model, evaluated, device)
    say(f"evaluation of {len(evaluated)} users", begin, device)


def say(what, begin, device):
    seconds = elapsed(begin, device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # Windows has none
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    print(f"  {what:<52}{seconds:>10.1f} s, peak so far {peak / 1e9:.1f} GB", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description="Measure speed, side by side.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", default="demo", help="data set to measure on (default: demo)")
    add("--text", help="a Hugging Face text model: measures the encoding of sentences, too")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--items", type=int, help="instead: sasrec, srmml and mdsrec, or those of --only, in a "
                                  "made-up shop of so many items")
    add("--users", type=int, default=1000, help="its users (default: 1000)")
    add("--steps", type=int, default=10, help="training steps in it (default: 10)")
    add("--dim", type=int, help="width of the models in it (default: their own)")
    add("--only", help=f"some of {','.join(COMPARISONS)} (default: all)")
    add("--repeats", type=int, default=3, help="how often each contestant runs (default: 3)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.items:
        shop = made_shop(args.items, args.users)
        settings = {"dim": args.dim} if args.dim else {}
        for name in (args.only or "sasrec,srmml,mdsrec").split(","):
            large(name, shop, args.steps, device, **settings)
        return
    names = args.only.split(",") if args.only else list(COMPARISONS)
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        raise UserError(f"--only {unknown[0]} is unknown: give some of {', '.join(COMPARISONS)}")
    dataset = data.load(args.data)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{dataset.name}: {dataset.n_users} users, {dataset.n_items} items, "
          f"{len(dataset.flat)} interactions; torch {torch.__version__}, {machine}, "
          f"{torch.get_num_threads()} threads")
    for name in names:
        title, unit, contestants = COMPARISONS[name](dataset, device)
        compare(title, unit, contestants, args.repeats)
    if args.text:
        compare(*encoding(dataset, args.text, device), args.repeats)


if __name__ == "__main__":
    command(main)
