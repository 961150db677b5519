"""The loop, one for every model: `python train.py --model mdsrec --data demo`.

Read from the top: the command, a seed, its stages, a stage, an epoch, a step. `--model mdsrec
--help` shows every setting with its default. What a run leaves behind lies in its folder under
`runs/`; loop/runs.py says what is there and how a run is resumed.
"""
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")    # it would need a C compiler on a GPU

import numpy as np
import torch

import data
import evaluate
from common.files import (
    AGAIN,
    UserError,
    atomic,
    command,
    first_line,
    load_tensors,
    memory_is_full,
    pick_device,
    precision,
    save_tensors,
    write_json,
)
from common.progress import Bar
from loop import runs, settings
from loop.pretraining import prepare_pretraining
from loop.report import write_report
from loop.runs import Job, Progress
from loop.settings import OPTIMIZERS, SCHEDULES

SELECT = "ndcg@10"    # the validation metric that chooses the epoch
CHECK_EVERY = 500     # steps between two looks at the flag for bad steps, within long epochs


# ---------------- the command

def main():
    commands = [settings.parse(argv) for argv in settings.one_per_model(sys.argv[1:])]
    for args, _ in commands:    # all are read before one is trained
        settings.check_counts(args, "valid_every", "valid_users")
    several = len(commands) > 1
    folders = []
    for args, module in commands:
        of_model, table = train_model(args, module, reuse=several)
        folders += of_model
    if several and table:
        print()
        evaluate.table_of_runs(folders, table)


def train_model(args, module, reuse) -> tuple:
    """Train all seeds of one model -> the folders of its runs, and where a table of several models
    goes, None where nothing is tested.

    reuse: take a run with the same settings as it is, or go on with it.
    """
    settings.say_what_is_not_used(args, module)
    seeds = settings.seeds_of(args)
    device = pick_device(args.device)
    dataset = data.load_for(args)
    cfg = settings.configure(module, args, dataset.name, dataset.about["source"])
    catalog = runs.build_catalog(module, dataset, args, device)
    job = Job(args, module, cfg, dataset, catalog, device, reuse)
    stages, weights = plan(job)
    results = [run_seed(job, stages, weights, seed) for seed in seeds]
    if len(results) > 1 and dataset.is_tested:
        print(f"mean ± sd of {len(results)} seeds\n{evaluate.table(job.label, results)}")
    table = Path(args.out) / f"table-{dataset.name}" if dataset.is_tested else None
    return [job.folder(seed) for seed in seeds], table


@dataclass
class Stage:
    """One training of one model, with the data it is trained on."""
    name: str             # "pretrain" or "train"
    model: type           # Pretrain or Model of the model file
    dataset: data.Data
    catalog: dict
    rows: object          # data.Rows or data.ItemRows
    weights: str          # name of the file that keeps its weights
    epochs: int
    lr: float
    patience: int         # epochs without a better validation metric; None: all epochs, unvalidated

    @property
    def validates(self):
        return self.patience is not None


def plan(job):
    """The stages that the model file asks for, and the weights that the first starts from, or None.

    Raises UserError where there is nothing to train on.
    """
    first = prepare_pretraining(job)
    cfg = job.cfg
    stages = []
    pretrained = hasattr(job.module, "Pretrain") and cfg.pretrain_epochs > 0
    if pretrained and first.weights is None:
        stages.append(Stage(
            name="pretrain",
            model=job.module.Pretrain,
            dataset=first.dataset,
            catalog=first.catalog,
            rows=first.rows(job.module.Pretrain.rows, job),
            weights="pretrain.safetensors",
            epochs=cfg.pretrain_epochs,
            lr=getattr(cfg, "pretrain_lr", cfg.lr),
            patience=None,
        ))
    trained = settings.has_recipe(cfg)    # else there is nothing to train
    kind = "prefixes" if getattr(cfg, "prefixes", False) else "sequences"
    patience = cfg.patience if trained else 0
    stages.append(Stage(
        name="train",
        model=job.module.Model,
        dataset=job.dataset,
        catalog=job.catalog,
        rows=job.dataset.training_rows(kind, cfg.max_len, job.device) if trained else (),
        weights="model.safetensors",
        epochs=cfg.epochs if trained else 0,
        lr=cfg.lr if trained else 0.,
        patience=patience if job.dataset.is_tested else None,
    ))
    refuse_empty(job, stages)
    return stages, first.weights


def refuse_empty(job, stages):
    """Raises UserError where there is nothing to train on, to validate, or nobody to test."""
    dataset = job.dataset
    missing = [split for split, places in dataset.targets.items() if places.max() < 0]
    if missing and dataset.is_tested:
        raise UserError(
            f"{dataset.name} has no {' and no '.join(missing)} targets under --split "
            f"{dataset.split}: it needs users with more interactions"
        )
    every = job.args.valid_every
    if stages[-1].validates and 0 < stages[-1].epochs < every:
        raise UserError(
            f"--valid_every {every} is more than the {stages[-1].epochs} epochs of the run: no "
            f"epoch would be validated"
        )
    for stage in stages:
        if stage.epochs and not len(stage.rows):
            raise UserError(
                f"{stage.dataset.name} has no training rows under --split {dataset.split}: it "
                f"needs users with more interactions"
            )


# ---------------- a seed

def run_seed(job, stages, weights, seed) -> dict:
    """Train and test one seed in its own folder; print and return what metrics.json holds."""
    folder = job.folder(seed)
    wanted = runs.settings_of(job, seed)
    resume = job.args.resume or (job.reuse and runs.has_settings(folder, wanted))
    with runs.run_folder(folder, wanted, resume):
        if resume and (folder / "metrics.json").is_file():
            print(f"{folder} is finished")
            form = runs.TESTED if job.dataset.is_tested else runs.TRAINED
            result = runs.read_metrics(folder, form, AGAIN)
        else:
            with within_memory(job):
                result = train_and_test(job, stages, weights, seed, folder)
    epochs = f"{result['epochs']} epochs on everything, nothing is tested"
    if job.dataset.is_tested:
        print(f"\n{evaluate.table(job.label, [result])}")
        epochs = f"best epoch {result['best_epoch']} of {result['epochs']}"
    print(f"{epochs}, {result['seconds']:.0f} s, {result['parameters']} weights, everything in "
          f"{folder}\n", flush=True)
    scale = evaluate.demo_scale(job.dataset, job.args.model, result)
    if scale:
        print(f"{scale}\n", flush=True)
    return result


@contextmanager
def within_memory(job):
    """Raises UserError where the memory of the device, or of the machine, is not enough."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        sizes = [f"--{name} (now {getattr(job.cfg, name)})"
                 for name in ("batch_size", "max_len", "dim") if hasattr(job.cfg, name)]
        raise UserError(
            f"the memory of {job.device} is full ({first_line(error)}): lower {', '.join(sizes)}, "
            f"or end what else uses it; what was finished is on disk"
        ) from None


def train_and_test(job, stages, weights, seed, folder) -> dict:
    begin = time.perf_counter() - runs.seconds_so_far(folder)
    model, progress = train(job, stages, weights, seed, folder)
    result = {}
    examples = []
    if job.dataset.is_tested:
        result = tested(job, model, folder)
        examples = evaluate.examples(model, job.dataset, job.cfg, job.device)
    result |= {
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "seconds_training": progress.seconds,
        "seconds": time.perf_counter() - begin,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": str(job.device),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    label = f"{job.label}, seed {seed}"
    write_report(folder, label, job.dataset, result, runs.read_log(folder), examples)
    write_json(folder / "metrics.json", result)    # written last: it says that the run is finished
    return result


def tested(job, model, folder) -> dict:
    """The metrics of a trained model; the ranks of every test user's target go into files."""
    valid = evaluate.evaluate(model, job.dataset, job.cfg, "valid", job.device)
    test = evaluate.evaluate(model, job.dataset, job.cfg, "test", job.device)
    for name, ranks in (("ranks-test", "ranks"), ("ranks-test-masked", "ranks_masked")):
        with atomic(folder / f"{name}.npy", "wb") as file:
            np.save(file, test[ranks])
    return {
        "valid": evaluate.numbers_of(valid),
        "valid_masked": valid["masked"],
        **evaluate.summary(test),
    }


# ---------------- its stages

def train(job, stages, weights, seed, folder):
    """All stages of one seed, continued where an interrupted run stopped.

    weights: what the next stage starts from; at first those of --init, or None. Returns the model
    with its best weights, and the Progress of the last stage.
    """
    saved = runs.saved_state(folder)
    for stage in stages:
        path = folder / stage.weights
        if saved and saved.has_finished(stage.name):
            weights = load_tensors(path, "leave --resume out, then the run begins anew")[0]
            continue
        model = None    # the last stage's model makes room first
        model = runs.build(stage.model, job.cfg, stage.catalog, job.device, seed)
        if weights is not None:
            start_from(model, weights, job)
        if not runs.is_trained(model):    # an untrained baseline
            save_tensors(path, model.state_dict())
            return model, Progress(stage.name)
        progress = train_stage(job, stage, model, seed, folder, saved)
        if not stage.validates:    # the last epoch's weights are the result
            weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
            save_tensors(path, weights)
    runs.load_weights(model, folder / stages[-1].weights)    # of the best epoch
    return model, progress


def start_from(model, weights, job):
    """Raises UserError where the weights of a pre-training do not fit."""
    try:
        model.init_from(weights)
    except ValueError as error:
        origin = job.args.init or "the pre-training stage"
        raise UserError(
            f"{origin} does not fit {job.args.model} on {job.dataset.name}: {error}"
        ) from None


# ---------------- a stage

def train_stage(job, stage, model, seed, folder, saved) -> Progress:
    """Train one stage to its end. saved: what an interrupted run has left, or None."""
    optimizer = optimizer_of(model, job.cfg, stage.lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    progress = Progress(stage.name)
    if saved and saved.is_inside(stage.name):
        saved.restore(model, optimizer)
        progress = saved.progress
    forward = model.forward
    if job.args.compile:
        leave_as_they_are(job.module)
        forward = compiled(model.forward)
    trainer = Trainer(
        model, forward, optimizer, job.device, job.cfg.batch_size,
        clip_norm=getattr(job.cfg, "clip_norm", 0),
        precision=job.args.precision,
    )
    while not is_over(stage, progress):
        begin = time.perf_counter()
        epoch = progress.epoch + 1
        numbers = (seed, runs.STAGES.index(stage.name), epoch)    # all that chance depends on
        runs.seed_everything(*numbers)
        factor = SCHEDULES[getattr(job.cfg, "schedule", "constant")]((epoch - 1) / stage.epochs)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor
        if hasattr(model, "on_epoch_start"):
            model.on_epoch_start(epoch)
        where = f"{stage.name} epoch {epoch}"
        losses = train_epoch(trainer, stage.rows, np.random.default_rng(numbers), where)
        line = {"stage": stage.name, "epoch": epoch, "losses": losses}
        line["seconds"] = time.perf_counter() - begin
        progress.epoch = epoch
        if stage.validates and epoch % job.args.valid_every == 0:
            line |= validate(job, model, progress, folder / stage.weights)
        progress.seconds += time.perf_counter() - begin
        runs.append_log(folder, line)
        runs.save_state(folder, model, optimizer, progress)    # last: a kill before it repeats all
        print(shown(line, progress), flush=True)
    return progress


def is_over(stage, progress) -> bool:
    if progress.epoch >= stage.epochs:
        return True
    return stage.validates and progress.checked - progress.best_epoch >= stage.patience


def validate(job, model, progress, path) -> dict:
    """The validation metrics of an epoch. If it is the best so far, that goes into the progress and
    its weights into the file path."""
    most = job.args.valid_users
    valid = evaluate.evaluate(model, job.dataset, job.cfg, "valid", job.device, most)
    line = {"valid": evaluate.numbers_of(valid), "valid_masked": valid["masked"]}
    progress.checked = progress.epoch
    line["selected_by"] = line["valid_masked" if job.args.mask_history else "valid"][SELECT]
    if line["selected_by"] > progress.best:
        progress.best = line["selected_by"]
        progress.best_epoch = progress.epoch
        save_tensors(path, model.state_dict())
    return line


def leave_as_they_are(module):
    """Keep what the model file calls NOT_COMPILED, "function" or "Class.method", from --compile."""
    for name in getattr(module, "NOT_COMPILED", ()):
        owner, _, of_class = name.partition(".")
        owner, name = (getattr(module, owner), of_class) if of_class else (module, name)
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))


def compiled(forward):
    """The step, compiled when it is first called. Raises UserError where that cannot be done."""
    fast = torch.compile(forward, dynamic=True)

    def call(batch):
        try:
            return fast(batch)
        except Exception as error:
            makers = ("torch._dynamo", "torch._inductor", "triton")
            if not type(error).__module__.startswith(makers):
                raise
            raise UserError(
                f"--compile cannot be used here ({first_line(error)}): it needs a C++ compiler, "
                f"and Triton on a GPU; leave it out"
            ) from None
    return call


def shown(line, progress) -> str:
    """A line of the log as it is printed; * marks the best epoch so far."""
    losses = "  ".join(f"{name} {value:.4f}" for name, value in line["losses"].items())
    valid = ""
    if "valid" in line:
        mark = "*" if progress.best_epoch == line["epoch"] else " "
        valid = f"  valid {SELECT} {line['selected_by']:.4f} {mark}"
    return f"{line['stage']} epoch {line['epoch']:>3}  {losses}{valid}  {line['seconds']:.1f} s"


def optimizer_of(model, cfg, lr):
    """The optimizer of a Config, over the model's groups of weights. Raises UserError."""
    kind = getattr(cfg, "optimizer", "adam")
    if kind not in OPTIMIZERS:
        raise UserError(f"--optimizer {kind} is unknown: give one of {', '.join(OPTIMIZERS)}")
    if hasattr(model, "param_groups"):
        groups = model.param_groups(cfg)
    else:
        groups = [{"params": [weight for weight in model.parameters() if weight.requires_grad]}]
    # fused: one kernel for all weights, and it takes `found_inf`, by which a bad step is skipped
    return OPTIMIZERS[kind](groups, lr=lr, weight_decay=cfg.weight_decay, fused=True)


# ---------------- an epoch, a step

@dataclass
class Trainer:
    """What a step of training needs."""
    model: torch.nn.Module
    forward: object              # model.forward, perhaps compiled
    optimizer: torch.optim.Optimizer
    device: torch.device
    batch_size: int
    clip_norm: float = 0         # largest norm of the gradient; 0: any
    precision: str = "bfloat16"  # of products, on a GPU

    @property
    def weights(self):
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    @property
    def lr(self):
        return self.optimizer.param_groups[0]["lr"]


def train_epoch(trainer, rows, rng, where) -> dict:
    """One pass over the rows; mean of each loss term by name. Raises UserError for a loss that is
    not finite. where: what messages call this epoch."""
    trainer.model.train()
    watch = Watch(trainer.device)
    bar = Bar(where, math.ceil(len(rows) / trainer.batch_size), " steps")
    for batch, index in bar.over(rows.epoch(trainer.batch_size, rng)):
        train_step(trainer, batch, watch, rows.users[index])
        if watch.steps % CHECK_EVERY == 0:
            watch.check(where, trainer.lr)
    watch.check(where, trainer.lr)
    return watch.means()


def train_step(trainer, batch, watch, users):
    """One update of the weights; skipped, on the device, if the loss or gradient is not finite."""
    with precision(trainer.device, trainer.precision):
        terms = trainer.forward(batch)
        refuse_other_losses(terms)
        loss = sum(terms.values())
    trainer.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    limit = trainer.clip_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(trainer.weights, limit, foreach=True)
    trainer.optimizer.found_inf = watch.step(terms, norm, users)
    trainer.optimizer.step()


def refuse_other_losses(terms):
    """Raises UserError for what a model file's forward must not return."""
    right = isinstance(terms, dict) and terms and all(
        torch.is_tensor(loss) and loss.dim() == 0 for loss in terms.values()
    )
    if not (right and any(loss.requires_grad for loss in terms.values())):
        raise UserError(
            "forward of the model file must return losses by name, 0-d tensors with a gradient, "
            "such as next_item: models/README.md says what a model file has"
        )


class Watch:
    """Sums of the loss terms, and the first step whose loss or gradient is not finite.

    Kept on the device, so that no step waits for the host.
    """

    def __init__(self, device):
        self.steps = 0
        self.names = []
        self.users = {}    # step -> the users of its batch, since the last check
        self.first_bad = torch.full((), -1, device=device)
        self.sums = None
        self.norm = None
        self.bad_terms = None

    def step(self, terms, norm, users):
        """0-d losses by name, the gradient norm -> 0-d float, 1 where this step must be skipped."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        finite = values.isfinite()
        bad = ~(finite.all() & norm.isfinite())
        if self.sums is None:
            self.names = list(terms)
            self.sums = torch.zeros_like(values)
            self.norm = torch.zeros_like(norm)
            self.bad_terms = torch.zeros_like(finite)
        new = bad & (self.first_bad < 0)
        self.first_bad = torch.where(new, self.steps, self.first_bad)
        self.norm = torch.where(new, norm, self.norm)
        self.bad_terms = torch.where(new, ~finite, self.bad_terms)
        self.sums = self.sums + torch.where(bad, 0, values)
        self.users[self.steps] = users
        self.steps += 1
        return bad.float()

    def check(self, where, lr):
        """Raises UserError for a bad step since the last check; the one wait for the device."""
        step = int(self.first_bad)
        if step >= 0:
            terms = [name for name, bad in zip(self.names, self.bad_terms.tolist()) if bad]
            what = f"the loss {' '.join(terms)}" if terms else "the gradient"
            raise UserError(
                f"training stopped at {where}, step {step}: {what} is not finite (learning rate "
                f"{lr:g}, gradient norm {float(self.norm):g}, first users or items of the batch "
                f"{self.users[step][:5].tolist()}); the last good state is kept: look at those "
                f"inputs or lower --lr"
            )
        self.users = {}

    def means(self):
        return dict(zip(self.names, (self.sums / self.steps).tolist()))


if __name__ == "__main__":
    command(main)
