"""Speed, side by side: our form of a piece of work against the usual one, alternating in one process, medians.

    python bench.py --data $DATA/beauty                                  (any data set; the default is demo)
    python bench.py --data $DATA/beauty --text path/to/sentence-bert     (the same, and the encoding of its sentences)
    python bench.py --items 500000                                       (memory and time on a made-up catalog)

Only the ratios mean something on another machine. Nothing here is asserted by a test.
"""
import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data as datasets
import train
from encoders import open_encoder
from evaluate import ranks_of
from extract_features import inputs_of
from sources.common import command

TARGETS = 20_000                         # training targets that a usual form works through per repetition
USERS = 4_000                            # test users that each contestant ranks per repetition
ITEMS = 3_000                            # items whose sentences are encoded per repetition


def padded_batches(users, max_len, size, sequence):
    """The usual loader: a Python loop over users, each padded to max_len, the item after each as target."""
    for first in range(0, len(users), size):
        seqs, targets = [], []
        for user in users[first:first + size]:
            items = sequence(user)[-max_len - 1:]
            pad = [0] * (max_len + 1 - len(items))
            seqs.append((pad + items)[:-1]), targets.append(([0] + pad + items[1:])[-max_len:])
        yield torch.tensor(seqs), torch.tensor(targets)


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def training(data, device):
    """SASRec, full softmax: {name: function that returns targets per second}. Optimiser and precision are the same."""
    _, rows, start, ours = default_model("sasrec", data, device)
    users = np.random.default_rng(0).permutation(rows.users)[:max(1, int(TARGETS / rows.lengths.mean()))]

    def padded(all_rows):
        def run():
            (model, optimizer, begin), done = start(), 0
            for seq, target in padded_batches(users, 50, model.cfg.batch_size, data.train_seqs.__getitem__):
                seq, target = seq.to(device), target.to(device)
                with train.precision(device):
                    states, target = model.states(seq, model.item.weight).flatten(0, 1), target.flatten()
                    if not all_rows:
                        states, target = states[target != 0], target[target != 0]
                    loss = F.cross_entropy(states @ model.item.weight.T, target, ignore_index=0)
                update(optimizer, loss)
                done += int((target != 0).sum())
                if all_rows and done >= TARGETS / 8:             # it is slow, and every step of it costs the same
                    break
            return done / elapsed(begin, device)
        return run

    return {"ours: a whole epoch of train.py": ours,
            "padded to 50, softmax of rows with a target": padded(False),
            "padded to 50, softmax of all rows": padded(True)}


def default_model(file, data, device, **settings):
    """A model file as it is, on built-in features: module, rows, start() -> model, optimizer, time; an epoch's targets/s."""
    module = train.load_model_file(file)
    catalog, cfg = train.build_catalog(module, data, "hash", "pixels", device), module.Config(**settings)
    rows = data.training_rows("prefixes" if cfg.prefixes else "sequences", cfg.max_len, device)

    def start():
        model = train.build(module.Model, cfg, catalog, device, 0)
        return model, train.optimizer_of(model, cfg, cfg.lr), time.perf_counter()

    def ours():
        model, optimizer, begin = start()
        train.train_epoch(model, model, optimizer, rows, cfg.batch_size, np.random.default_rng(0), 5., device, "epoch")
        return (len(rows) if cfg.prefixes else rows.lengths.sum()) / elapsed(begin, device)

    return module, rows, start, ours


def prefixes_of(data, rows, n):
    """The first n prefixes with their target as last item, users in random order: lists of item ids."""
    users = np.random.default_rng(0).permutation(np.unique(rows.users))
    return [data.train_seqs[u][:k] for u in users for k in range(2, len(data.train_seqs[u]) + 1)][:n]


def msm4sr(data, device):
    """MSM4SR, fine-tuning on built-in features: {name: function that returns targets per second}."""
    _, rows, start, ours = default_model("msm4sr", data, device)
    prefixes = prefixes_of(data, rows, 512)

    def usual():
        model, optimizer, begin = start()
        encoders = [model.m2se.encoders[m] for m in model.scored]
        for seq, target in padded_batches(range(len(prefixes)), 50, 256, prefixes.__getitem__):
            seq, answer = seq.to(device), target[:, -1].to(device)
            with train.precision(device):
                table = model.encode_items()
                streams = [encoder(seq.flatten()).unflatten(0, seq.shape) + model.item(seq) for encoder in encoders]
                states = torch.cat([F.normalize(h[:, -1], dim=-1) for h in model.m2se.transform(streams, seq)], -1)
                loss = F.cross_entropy((states @ table["candidates"].T)[:, 1:], answer - 1)
            update(optimizer, loss)
        return len(prefixes) / elapsed(begin, device)

    return {"ours: a whole epoch of train.py": ours, "a padded row per prefix, encoded position by position": usual}


def fmmsrec(data, device):
    """FMMS-Rec at the width of the demo, on built-in features: {name: function that returns targets per second}."""
    few = datasets.load(data.folder, train_share=min(1., TARGETS / data.train_counts.sum()))
    size = 256
    module, rows, start, ours = default_model("fmmsrec", few, device, dim=64, heads=4, batch_size=size)
    prefixes = prefixes_of(few, rows, 4 * size)

    def usual():
        model, optimizer, begin = start()
        for seq, target in padded_batches(range(len(prefixes)), model.cfg.max_len, size, prefixes.__getitem__):
            seq, answer = seq.to(device), target[:, -1].to(device)
            read, chosen = module.mask_items(seq, model.n_items, model.cfg.mask_ratio)
            real, position = F.pad(seq != 0, (0, 1), value=True), model.position[-seq.shape[1] - 1:, None]
            answers = torch.cat([seq * chosen, answer[:, None]], 1)                # 0: nothing to predict here
            with train.precision(device):
                E, has = model.encoder.embed(F.pad(read, (0, 1)).flatten())        # every position by itself
                has = has.unflatten(0, real.shape)
                x = model.encoder.transform(E.unflatten(0, real.shape), has, real, position)
                states = model.users(x.flatten(0, 1), has.flatten(0, 1)).unflatten(0, real.shape)
                logits = states @ model.encode_items()["item"].T
                loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=0)
            update(optimizer, loss)
        return len(prefixes) / elapsed(begin, device)

    return {"ours: an epoch of train.py": ours, "a padded row per prefix, encoded position by position": usual}


def mmsr(data, device, folder):
    """MMSR, encoders of base size, random weights, on a few users' items: {name: function that returns steps per second}."""
    module = train.load_model_file("mmsr")
    module.TINY = {"roberta": dict(max_position_embeddings=514),
                   "swin": dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])}
    rows = [data.train_seqs[u][-8:] for u in np.random.default_rng(0).permutation(data.n_users)[:8]]
    items = sorted(set().union(*rows))                           # the catalog: what these users have
    number = {item: i for i, item in enumerate(items, 1)}
    catalog = {key: [values[item] for item in [0, *items]] for key, values in data.catalog(module.READS).items()
               if key in ("titles", "image_paths")}
    catalog |= {"n_items": len(items), "train_seqs": [[number[i] for i in row] for row in rows]}
    (seq, target), = padded_batches(range(len(rows)), 8, len(rows), catalog["train_seqs"].__getitem__)
    batch = {"user": torch.arange(len(rows), device=device), "seq": seq.to(device), "target": target.to(device)}

    def contestant(cache):
        cfg = module.Config(text_encoder="tiny-roberta", image_encoder="tiny-swin", cache=cache, cache_dir=folder)
        model = train.build(module.Model, cfg, catalog, device, 0).train()
        optimizer = train.optimizer_of(model, cfg, cfg.lr)

        def step():
            begin = time.perf_counter()
            with train.precision(device):
                loss = model(batch)["next_item"]
            update(optimizer, loss)
            return 1 / elapsed(begin, device)
        step()                                                   # fills the cache
        return step

    return {f"ours: a step on {len(items)} items, frozen blocks cached": contestant("fp16"),
            "the whole encoders in every step": contestant("off")}


def srmml(data, device):
    """SRMML on built-in features: {name: function that returns targets per second}. All encode the catalog once a step."""
    module, rows, start, ours = default_model("srmml", data, device)
    users = np.random.default_rng(0).permutation(rows.users)

    def usual(distance, steps, chunk):
        def loss_of(states, places, scale, target):
            return F.cross_entropy(-scale * distance(states, places)[:, 1:], target - 1, reduction="sum")

        def run():
            products, module.wasserstein = module.wasserstein, distance
            model, optimizer, begin = start()
            done = 0
            for seq, target in islice(padded_batches(users, 50, model.cfg.batch_size, data.train_seqs.__getitem__), steps):
                seq, target = seq.to(device), target.to(device).flatten()
                with train.precision(device):
                    table = model.encode_items()
                    states, target = model.states(seq, table).flatten(0, 1)[target != 0], target[target != 0]
                    loss = sum(checkpoint(loss_of, s, table["point"], model.log_scale.exp(), t, use_reentrant=False)
                               for s, t in zip(states.split(chunk), target.split(chunk))) / len(target)
                update(optimizer, loss)
                done += len(target)
            module.wasserstein = products
            return done / elapsed(begin, device)
        return run

    broadcast = lambda a, b: (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)
    return {"ours: a whole epoch of train.py": ours,
            "padded to 50, plain logits, distances as products": usual(module.wasserstein, 8, 256),
            "padded to 50, plain logits, distances by subtraction": usual(broadcast, 1, 16)}


def large(n_items, device):
    """One training step and one evaluation of SRMML on a made-up catalog, with the memory they took."""
    module, rng = train.load_model_file("srmml"), np.random.default_rng(0)
    flat, offsets = rng.integers(1, n_items + 1, 256 * 12), np.arange(257) * 12
    data = datasets.Data(Path("."), {"name": "made"}, flat, offsets, np.zeros_like(flat), n_items, "leave_one_out")
    has, random = torch.arange(n_items + 1) > 0, torch.Generator().manual_seed(0)
    features = {m: torch.randn(n_items + 1, 64, generator=random) * has[:, None] for m in ("text", "image")}
    catalog = features | {"n_items": n_items, "has_text": has, "has_image": has, "lang": has.long(),
                          "train_seqs": data.train_seqs}
    model = train.build(module.Model, module.Config(), catalog, device, 0)
    optimizer, rows = train.optimizer_of(model, model.cfg, 1e-3), data.training_rows("sequences", 50, device)
    print(f"\nSRMML, {n_items} items, {sum(p.numel() for p in model.parameters()) * 4 / 1e9:.2f} GB of weights")
    for name, work in (
            (f"one training step of {len(rows)} rows, {rows.lengths.sum()} targets", lambda: train.train_epoch(
                model, model, optimizer, rows, len(rows), rng, 5., device, "step")),
            ("evaluation of 256 users", lambda: ranks_of(model.eval(), data.evaluated_rows("test", 50, device), device))):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            import resource              # Windows has none
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"  {name:<52}{elapsed(begin, device):>10.1f} s, peak so far {peak / 1e9:.1f} GB", flush=True)


def evaluation(data, device):
    """Full ranking of test users, plain and masked: (name, users per second) of each contestant."""
    model = default_model("sasrec", data, device)[2]()[0].eval()
    rows = data.evaluated_rows("test", 50, device)
    history = lambda user: data.flat[data.offsets[user]:data.targets["test"][user] + 1].tolist()

    def ours():
        begin = time.perf_counter()
        ranks_of(model, rows, device)
        return len(rows) / elapsed(begin, device)

    @torch.no_grad()
    def usual():
        begin, table, users = time.perf_counter(), model.encode_items(), rows.users[:USERS]
        for seq, target in padded_batches(users, 50, 256, history):
            scores = model.score({"seq": seq.to(device)}, table)
            scores[:, 0] = -torch.inf
            for masked in (False, True):
                if masked:
                    for row, items in enumerate(seq.tolist()):
                        scores[row, [i for i in items if i and i != target[row, -1]]] = -torch.inf
                order = scores.argsort(1, descending=True)
                (order == target[:, -1:].to(device)).nonzero()[:, 1]
        return len(users) / elapsed(begin, device)

    return {"ours: length-sorted, trimmed, counting": ours, "padded, Python loader, whole matrix sorted": usual}


def encoding(data, encoder, device):
    """Sentences of items -> vectors by a Hugging Face text model: {name: function that returns sentences per second}."""
    which, inputs = inputs_of(data, "text")
    rng = np.random.default_rng(0)
    sentences = [inputs[i] for item in rng.permutation(len(which))[:ITEMS] for i in which[item]]
    model = open_encoder("text", encoder, device)

    def ours(texts):
        def run():
            begin = time.perf_counter()
            model.encode(texts)
            return len(sentences) / elapsed(begin, device)
        return run

    def usual(share, **padding):
        @torch.inference_mode()
        def run():
            texts, begin = sentences[:len(sentences) // share], time.perf_counter()
            for first in range(0, len(texts), 32):
                x = model.tokenizer(texts[first:first + 32], truncation=True, max_length=256, return_tensors="pt", **padding)
                with train.precision(device):
                    model.pool(x.to(device)).cpu()
            return len(texts) / elapsed(begin, device)
        return run

    return {"ours: each distinct one, by length, token budget": ours(list(dict.fromkeys(sentences))),
            "ours, repeated sentences encoded again": ours(sentences),
            "padded to the batch's longest": usual(4, padding=True),
            "padded to 256 tokens": usual(32, padding="max_length")}


def elapsed(begin, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def compare(title, unit, contestants, repeats, decimals=0):
    """Run the contestants in turn, several times; print each median and how many times faster the first one is."""
    speeds = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            speeds[name].append(contestant())
    first = median(next(iter(speeds.values())))
    print(f"\n{title}\n" + "\n".join(f"  {name:<56}{median(values):>10.{decimals}f} {unit}{first / median(values):>8.1f}x"
                                     for name, values in speeds.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Measure speed, side by side.", allow_abbrev=False)
    parser.add_argument("--data", default="demo", help="data set to measure on (default: demo)")
    parser.add_argument("--text", help="a Hugging Face text model: measures the encoding of the data set's sentences, too")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--items", type=int, help="instead: memory and time of SRMML on a made-up catalog of so many items")
    parser.add_argument("--repeats", type=int, default=3, help="how often each contestant runs (default: 3)")
    args = parser.parse_args()
    device = train.pick_device(args.device)
    if args.items:
        return large(args.items, device)
    data = datasets.load(args.data)
    print(f"{data.name}: {data.n_users} users, {data.n_items} items, {len(data.flat)} interactions; torch "
          f"{torch.__version__}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, "
          f"{torch.get_num_threads()} threads")
    compare("SASRec training, full softmax", "targets/s", training(data, device), args.repeats)
    compare("SRMML training, full softmax", "targets/s", srmml(data, device), args.repeats)
    compare("MSM4SR fine-tuning, full softmax", "targets/s", msm4sr(data, device), args.repeats)
    compare("FMMS-Rec training, full softmax", "targets/s", fmmsrec(data, device), args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        compare("MMSR training, encoders of base size", "steps/s", mmsr(data, device, folder), args.repeats, decimals=2)
    if args.text:
        compare(f"encoding with {args.text}", "sentences/s", encoding(data, args.text, device), args.repeats)
    compare("evaluation, full ranking, plain and masked", "users/s", evaluation(data, device), args.repeats)


if __name__ == "__main__":
    command(main)
