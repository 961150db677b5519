"""Speed, side by side: our form of a piece of work against the usual one, in turn, in one process.

    python bench.py --data $DATA/beauty                    any data set; the default is demo
    python bench.py --data $DATA/beauty --text MODEL       the same, and encoding its sentences
    python bench.py --only sasrec,evaluation               some of the comparisons
    python bench.py --items 500000 --users 1000000         memory and time in a made-up shop

Each line has the median of several runs, their range, the most memory that was held beyond what was
held before (on Linux and on GPUs), and how many times as fast the first contestant is. Only such
ratios mean something on another machine. RecBole's SASRec takes part where RecBole can be imported.
"""
import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
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
from loop.settings import check_counts, load_model_file
from recommend import Ranker, best_items, best_of_chunk, rows_of_users

TARGETS = 20_000    # training targets that a usual form works through per repetition
USERS = 4_000       # test users that each contestant ranks per repetition
ITEMS = 3_000       # items whose sentences are encoded per repetition


# ---------------- measuring

class Stopwatch:
    """Seconds and memory since it was made."""

    def __init__(self, device):
        self.device = device
        self.wait()
        self.before = held(device)
        forget_peak(device)
        self.begin = time.perf_counter()

    def wait(self):
        """For what the device still works on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self):
        self.wait()
        return time.perf_counter() - self.begin

    def bytes(self):
        """The most that was held beyond what was held before; nan where nobody can tell."""
        return peak(self.device) - self.before


def held(device) -> float:
    """Bytes of memory in use, on the GPU or by this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return of_process("VmRSS")


def peak(device) -> float:
    """The most bytes in use since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return of_process("VmHWM")


def forget_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")    # Linux: VmHWM starts anew


def of_process(name) -> float:
    """Bytes of one line of Linux's /proc/self/status; nan elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    values = dict(line.split(":", 1) for line in lines)
    return int(values[name].split()[0]) * 1024 if name in values else float("nan")


def compare(title, unit, contestants, repeats, device):
    """Run the contestants in turn, and print a line of each.

    contestants: {name: function that returns how much work it did, in `unit`s}
    """
    speeds = {name: [] for name in contestants}
    most = dict.fromkeys(contestants, 0)
    for _ in range(repeats):
        for name, contestant in contestants.items():
            watch = Stopwatch(device)
            speeds[name].append(contestant() / watch.seconds())
            most[name] = max(most[name], watch.bytes())
    print(f"\n{title}")
    first = median(next(iter(speeds.values())))
    for name, values in speeds.items():
        value, low, high = median(values), min(values), max(values)
        shown = " to ".join(f"{x:.0f}" if value >= 10 else f"{x:.3f}" for x in (low, high))
        middle = f"{value:.0f}" if value >= 10 else f"{value:.3f}"
        print(f"  {name:<56}{middle:>9} {unit}/s ({shown}){most[name] / 1e6:>8.0f} MB"
              f"{first / value:>8.1f}x", flush=True)


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

    def __post_init__(self):
        self.model, self.optimizer = self.start()    # before the stopwatch runs

    def start(self):
        """A new model and its optimizer."""
        model = runs.build(self.module.Model, self.cfg, self.catalog, self.device, 0)
        return model, train.optimizer_of(model, self.cfg, self.cfg.lr)

    def epoch(self):
        """Targets of an epoch of train.py."""
        trainer = train.Trainer(
            self.model, self.model.forward, self.optimizer, self.device, self.cfg.batch_size
        )
        train.train_epoch(trainer, self.rows, np.random.default_rng(0), "epoch")
        return len(self.rows) if self.cfg.prefixes else int(self.rows.lengths.sum())

    def steps(self, batches, loss_of):
        """Targets of a plain loop. loss_of(model, seq, target): the loss, seq and target padded."""
        done = 0
        for seq, target in batches:
            seq, target = seq.to(self.device), target.to(self.device)
            with precision(self.device):
                loss = loss_of(self.model, seq, target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            done += int((target != 0).sum())
        return done


def setting_of(name, dataset, device, **settings):
    module = load_model_file(name)
    encoders = SimpleNamespace(text="hash", image="pixels")
    cfg = module.Config(**settings)
    catalog = runs.build_catalog(module, dataset, encoders, device)
    kind = "prefixes" if cfg.prefixes else "sequences"
    rows = dataset.training_rows(kind, cfg.max_len, device)
    return Setting(module, cfg, dataset, catalog, rows, device)


def few_users(dataset):
    """The data set with so many of its users that an epoch has about TARGETS targets."""
    return data.load(dataset.folder, train_share=min(1., TARGETS / dataset.train_counts.sum()))


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


def padded_prefixes(setting, n, size):
    """The same with a row for each of n prefixes, of which the last item alone is a target."""
    users = shuffled(np.unique(setting.rows.users))
    every = (setting.dataset.train_seqs[user] for user in users)
    prefixes = list(islice((seq[:k] for seq in every for k in range(2, len(seq) + 1)), n))
    for seq, target in padded_batches(prefixes, setting.cfg.max_len, size):
        target[:, :-1] = 0
        yield seq, target


def shuffled(sequences):
    order = np.random.default_rng(0).permutation(len(sequences))
    return [sequences[i] for i in order]


def whole_logits(states, items, target):
    """Cross entropy as torch has it, of all logits at once."""
    return F.cross_entropy(states @ items.T, target, ignore_index=0)


# ---------------- training

def sasrec(dataset, device):
    setting = setting_of("sasrec", dataset, device)
    n = max(1, int(TARGETS / setting.rows.lengths.mean()))
    sequences = [dataset.train_seqs[user] for user in shuffled(setting.rows.users)[:n]]
    size = setting.cfg.batch_size

    def all_rows(model, seq, target):
        states = model.states(seq, model.item.weight).flatten(0, 1)
        return whole_logits(states, model.item.weight, target.flatten())

    def rows_with_a_target(model, seq, target):
        states = model.states(seq, model.item.weight)[target != 0]
        return whole_logits(states, model.item.weight, target[target != 0])

    def padded(loss_of, n):
        return setting.steps(padded_batches(sequences[:n], 50, size), loss_of)

    contestants = {
        "ours: a whole epoch of train.py": setting.epoch,
        "padded to 50, softmax of the rows with a target": lambda: padded(rows_with_a_target, None),
        "padded to 50, softmax of all rows": lambda: padded(all_rows, 2 * size),
    }
    if find_spec("recbole"):
        targets = round(setting.rows.lengths.mean() * size)    # as many as in our steps
        trainer, rows, _ = recbole(dataset, device, targets)
        contestants["RecBole's SASRec, a row per prefix"] = lambda: recbole_steps(trainer, rows)
    return "SASRec training, full softmax", "targets", contestants


def srmml(dataset, device):
    setting = setting_of("srmml", dataset, device)
    module, size = setting.module, setting.cfg.batch_size
    sequences = [dataset.train_seqs[user] for user in shuffled(setting.rows.users)]
    products = module.wasserstein

    def by_subtraction(a, b):
        return (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)

    def loss_of_chunk(distance, states, places, scale, target):
        logits = -scale * distance(states, places)
        return F.cross_entropy(logits[:, 1:], target - 1, reduction="sum")

    def usual(distance, steps, chunk):
        """Plain logits in checkpointed chunks, which would not fit otherwise."""
        def loss_of(model, seq, target):
            table = model.encode_items()
            states = model.states(seq, table)[target != 0]
            target = target[target != 0]
            losses = [
                checkpoint(loss_of_chunk, distance, s, table["point"], model.log_scale.exp(), t,
                           use_reentrant=False)
                for s, t in zip(states.split(chunk), target.split(chunk))
            ]
            return sum(losses) / len(target)

        module.wasserstein = distance
        done = setting.steps(padded_batches(sequences[:steps * size], 50, size), loss_of)
        module.wasserstein = products
        return done

    return "SRMML training, full softmax", "targets", {
        "ours: a whole epoch of train.py": setting.epoch,
        "padded to 50, plain logits, distances as products": lambda: usual(products, 8, 256),
        "padded to 50, plain logits, by subtraction": lambda: usual(by_subtraction, 1, 16),
    }


def mdsrec(dataset, device):
    few = few_users(dataset)
    setting = setting_of("mdsrec", few, device, dim=64, inner=128, centers=16)
    prefixes = list(padded_prefixes(setting, 512, 256))
    graphs = {"O": setting.model.O.to_dense()}    # matrices (N+1, N+1)
    for m in setting.model.rho:
        neighbours = F.one_hot(setting.model.graphs[m], dataset.n_items + 1).sum(1).float()
        graphs[m] = neighbours / neighbours.sum(1, keepdim=True)

    def loss_of(model, seq, target):
        E = model.item.weight
        table = {m: graphs[m] @ E for m in model.rho}
        table |= {"item": E, "id": E + model.cfg.mu_id * (graphs["O"] @ E)}
        e_s, e_tilde = model.states(seq, table)
        answer = target[:, -1]
        loss = whole_logits(e_s[:, -1], E, answer)
        for m, rho in model.rho.items():
            loss = loss + rho * whole_logits(e_tilde[m][:, -1], table[m], answer)
        return loss

    return "MDSRec training at dim 64, full softmax", "targets", {
        "ours: an epoch of train.py": setting.epoch,
        "padded to 50, graphs as N x N matrices": lambda: setting.steps(prefixes, loss_of),
    }


def msm4sr(dataset, device):
    setting = setting_of("msm4sr", dataset, device)
    prefixes = list(padded_prefixes(setting, 512, 256))

    def loss_of(model, seq, target):
        table = model.encode_items()
        streams = []
        for m in model.scored:    # every position by itself
            stream = model.m2se.encoders[m](seq.flatten()).unflatten(0, seq.shape)
            streams.append(stream + model.item(seq))
        h = model.m2se.transform(streams, seq)
        states = torch.cat([F.normalize(s[:, -1], dim=-1) for s in h], -1)
        return whole_logits(states, table["candidates"], target[:, -1])

    return "MSM4SR fine-tuning, full softmax", "targets", {
        "ours: a whole epoch of train.py": setting.epoch,
        "a padded row per prefix, encoded position by position":
            lambda: setting.steps(prefixes, loss_of),
    }


def fmmsrec(dataset, device):
    few = few_users(dataset)
    setting = setting_of("fmmsrec", few, device, dim=64, heads=4, batch_size=256)
    prefixes = list(padded_prefixes(setting, 1024, 256))

    def loss_of(model, seq, target):
        read, chosen = setting.module.mask_items(seq, model.n_items, setting.cfg.mask_ratio)
        real = F.pad(seq != 0, (0, 1), value=True)
        position = model.position[-seq.shape[1] - 1:, None]
        answers = torch.cat([seq * chosen, target[:, -1:]], 1)    # 0: nothing to predict here
        E, has = model.encoder.embed(F.pad(read, (0, 1)).flatten())    # place by place
        E, has = E.unflatten(0, real.shape), has.unflatten(0, real.shape)
        x = model.encoder.transform(E, has, real, position)
        states = model.state(x.flatten(0, 1), has.flatten(0, 1))
        return whole_logits(states, model.encode_items()["item"], answers.flatten())

    return "FMMS-Rec training at dim 64, full softmax", "targets", {
        "ours: an epoch of train.py": setting.epoch,
        "a padded row per prefix, encoded position by position":
            lambda: setting.steps(prefixes, loss_of),
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
            with precision(device):
                loss = model(batch)["next_item"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return 1

        step()
        return step

    return "MMSR training, encoders of base size", "steps", {
        f"ours: a step on {len(items)} items, frozen blocks cached": contestant("fp16"),
        "the whole encoders in every step": contestant("off"),
    }


# ---------------- set-up, ranking, lists, sentences

def setup(dataset, device):
    """MDSRec's graphs: the other models have little to set up."""
    setting = setting_of("mdsrec", dataset, device, dim=64, inner=128, centers=16)
    features = {m: setting.catalog[m].to(device) for m in ("text", "image")}
    cfg, N = setting.cfg, dataset.n_items

    def usual():
        O = torch.zeros(N + 1, N + 1)
        for seq in setting.catalog["train_seqs"]:
            items = seq[-cfg.max_len:]
            for a, i in enumerate(items):
                for b, j in enumerate(items[:a]):
                    if i != j:
                        O[i, j] += 1 / (a - b)
                        O[j, i] += 1 / (a - b)
        O = (O / O.sum(1, keepdim=True).clamp(min=1e-9)).to(device)
        for x in features.values():
            E = F.normalize(x.float(), dim=-1)
            E_bar = F.normalize(E + cfg.mu_modal * (O @ E), dim=-1)
            (E_bar @ E_bar.T).topk(min(cfg.neighbors, N))
            setting.module.k_means(E, cfg.centers)
        return N

    def ours():
        setting.start()
        return N

    return "MDSRec's set-up: co-occurrence, neighbours, clusters", "items", {
        "ours: sorted pairs, neighbours in tiles": ours,
        "pairs in a Python loop, N x N matrices": usual,
    }


def evaluation(dataset, device):
    setting = setting_of("sasrec", dataset, device)
    model = setting.model.eval()
    rows = dataset.evaluated_rows("test", 50, device)
    users = rows.users[:USERS]
    ends = dataset.targets["test"][users] + 1
    histories = [dataset.flat[a:b].tolist() for a, b in zip(dataset.offsets[users], ends)]

    def ours():
        ranks_of(model, rows, device)
        return len(rows)

    @torch.no_grad()
    def usual():
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
        return len(users)

    contestants = {
        "ours: sorted by length, trimmed, counting": ours,
        "padded, Python loader, whole matrix sorted": usual,
    }
    if find_spec("recbole"):
        trainer, _, rows_of_recbole = recbole(dataset, device, 2048)
        contestants["RecBole's, plain alone"] = lambda: recbole_ranking(trainer, rows_of_recbole)
    return "evaluation, full ranking, plain and masked", "users", contestants


def recommendation(dataset, device):
    """The best ten of everybody, as recommend.py --all finds them."""
    setting = setting_of("sasrec", dataset, device)
    model = setting.model.eval()
    users = np.arange(dataset.n_users)
    rows = rows_of_users(dataset, users, 50, device)
    with torch.no_grad():
        ranker = Ranker(model, model.encode_items(), 50, device)
    alone = [rows_of_users(dataset, users[i:i + 1], 50, device) for i in users[:USERS // 4]]

    def ours():
        best_items(ranker, rows, 10)
        return len(rows)

    def usual():
        for row in alone:
            index = torch.zeros(1, dtype=torch.long, device=device)
            batch = row.batch(index, int(row.lengths[0]))
            seen = row.seen(index, int(row.history[0]))
            best_of_chunk(ranker, {"user": batch["user"], "seq": batch["seq"]}, seen, 10)
        return len(alone)

    return "recommendation, the ten best of each user", "users", {
        "ours: many users at once": ours,
        "one user after another": usual,
    }


def encoding(dataset, encoder, device):
    which, inputs = inputs_of(dataset, "text")
    items = shuffled(which)[:ITEMS]
    sentences = [inputs[number] for numbers in items for number in numbers]
    distinct = list(dict.fromkeys(sentences))
    model = open_encoder("text", encoder, device)

    def ours(texts):
        model.encode(texts)
        return len(sentences)

    @torch.inference_mode()
    def usual(share, **padding):
        texts = sentences[:len(sentences) // share]
        for first in range(0, len(texts), 32):
            tokens = model.tokenizer(
                texts[first:first + 32], truncation=True, max_length=256, return_tensors="pt",
                **padding,
            )
            with precision(device):
                model.pool(tokens.to(device)).cpu()
        return len(texts)

    return f"encoding with {encoder}", "sentences", {
        "ours: each distinct one, by length, token budget": lambda: ours(distinct),
        "ours, repeated sentences encoded again": lambda: ours(sentences),
        "padded to the batch's longest": lambda: usual(4, padding=True),
        "padded to 256 tokens": lambda: usual(32, padding="max_length"),
    }


COMPARISONS = {
    "sasrec": sasrec,
    "srmml": srmml,
    "mdsrec": mdsrec,
    "msm4sr": msm4sr,
    "fmmsrec": fmmsrec,
    "mmsr": mmsr,
    "setup": setup,
    "evaluation": evaluation,
    "recommendation": recommendation,
}


# ---------------- RecBole 1.2, https://recbole.io

def recbole(dataset, device, batch_size):
    """Its Trainer, and its training and test data, for SASRec at the size of ours."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer

    sys.argv = sys.argv[:1]    # RecBole reads our flags otherwise
    with tempfile.TemporaryDirectory() as folder:
        write_for_recbole(dataset, Path(folder) / "made" / "made.inter")
        config = Config(model="SASRec", dataset="made", config_dict=dict(
            data_path=folder, checkpoint_dir=folder, MAX_ITEM_LIST_LENGTH=50,
            load_col={"inter": ["user_id", "item_id", "timestamp"]},
            hidden_size=64, inner_size=256, n_layers=2, n_heads=2,
            loss_type="CE", train_neg_sample_args=None, train_batch_size=batch_size,
            eval_args={"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
            metrics=["Recall", "NDCG"], topk=[10], valid_metric="NDCG@10",
            use_gpu=device.type == "cuda", show_progress=False, state="ERROR",
        ))
        made = create_dataset(config)
        training, _, test = data_preparation(config, made)
        model = SASRec(config, training.dataset).to(config["device"])
        return Trainer(config, model), training, test


def write_for_recbole(dataset, path):
    path.parent.mkdir()
    with path.open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, (a, b) in enumerate(zip(dataset.offsets, dataset.offsets[1:])):
            for time_step, item in enumerate(dataset.flat[a:b]):
                file.write(f"{user}\t{item}\t{time_step}\n")


def recbole_steps(trainer, rows):
    """Steps of its training on about TARGETS targets."""
    trainer.model.train()
    done = 0
    for batch in rows:
        trainer.optimizer.zero_grad()
        trainer.model.calculate_loss(batch.to(trainer.device)).backward()
        trainer.optimizer.step()
        done += len(batch)
        if done >= TARGETS:
            break
    return done


def recbole_ranking(trainer, rows):
    trainer.evaluate(rows, load_best_model=False, show_progress=False)
    return len(rows.dataset)


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


LARGE = """
| | items | set-up, s | 1,000 targets, s | 1,000 users ranked, s | peak, GB |
|---|---|---|---|---|---|"""


def large(name, shop, steps, ranked, device, **settings):
    """A model on a made-up shop: its set-up, some steps, and the evaluation of some users.

    Prints each as it is done -> a row of the table under LARGE.
    """
    dataset, catalog = shop
    module = load_model_file(name)
    cfg = module.Config(**settings)
    catalog = {key: catalog[key] for key in ("n_items", *module.READS)}
    print(f"\n{name}, {dataset.n_users} users, {dataset.n_items} items, dim {cfg.dim}")
    watch = Stopwatch(device)
    model = runs.build(module.Model, cfg, catalog, device, 0)
    rows = dataset.training_rows("prefixes" if cfg.prefixes else "sequences", cfg.max_len, device)
    setup, setup_peak = say("set-up", watch)
    trainer = train.Trainer(
        model, model.forward, train.optimizer_of(model, cfg, cfg.lr), device, cfg.batch_size
    )
    losses = train.Watch(device)
    batches = islice(rows.epoch(cfg.batch_size, np.random.default_rng(0)), steps + 1)
    for number, (batch, index) in enumerate(batches):
        if number <= 1:    # the first one makes ready
            watch, targets = Stopwatch(device), 0
        train.train_step(trainer, batch, losses, rows.users[index])
        targets += len(index) if cfg.prefixes else rows.lengths[index].sum()
    training, training_peak = say(f"{losses.steps - 1} steps, {targets} targets", watch)
    watch = Stopwatch(device)
    evaluated = dataset.evaluated_rows("test", cfg.max_len, device, most=ranked)
    ranks_of(model, evaluated, device)
    ranking, ranking_peak = say(f"evaluation of {len(evaluated)} users", watch)
    most = max(setup_peak, training_peak, ranking_peak)
    numbers = setup, 1000 * training / targets, 1000 * ranking / len(evaluated), most
    cells = [f"{x:,.0f}" if x >= 10 else f"{x:.2g}" for x in numbers]
    return f"| {name} | {dataset.n_items:,} | {' | '.join(cells)} |"


def say(what, watch):
    """Seconds and gigabytes, after printing them."""
    seconds, gigabytes = watch.seconds(), peak(watch.device) / 1e9
    print(f"  {what:<52}{seconds:>10.1f} s, at most {gigabytes:.1f} GB", flush=True)
    return seconds, gigabytes


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
    add("--ranked", type=int, default=20_000, help="users to evaluate in it (default: 20000)")
    add("--dim", type=int, help="width of the models in it (default: their own)")
    add("--only", help=f"some of {','.join(COMPARISONS)} (default: all)")
    add("--repeats", type=int, default=3, help="how often each contestant runs (default: 3)")
    args = parser.parse_args()
    check_counts(args, "items", "users", "steps", "ranked", "dim", "repeats")
    device = pick_device(args.device)
    if args.items:
        shop = made_shop(args.items, args.users)
        settings = {"dim": args.dim} if args.dim else {}
        names = (args.only or "sasrec,srmml,mdsrec").split(",")
        rows = [
            large(name, shop, args.steps, args.ranked, device, **settings) for name in names
        ]
        print("\n".join([LARGE, *rows]))
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
        compare(*COMPARISONS[name](dataset, device), args.repeats, device)
    if args.text:
        compare(*encoding(dataset, args.text, device), args.repeats, device)


if __name__ == "__main__":
    command(main)
