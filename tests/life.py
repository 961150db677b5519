"""What each part of a trained model does: change it alone, rank again, and look.

    python tests/life.py runs/mdsrec-demo-0 runs/srmml-demo-0

prints a Markdown table of each run and writes it into the run's folder, as parts.json.

A part whose change moves no number is computed for nothing, whatever its equation says. For each
part of a model (PARTS) and of its input (INPUTS) the table has validation NDCG@10, without the
history, before and after the change, and how much the scores moved: 1 - the correlation of a
user's scores before and after, mean over users; 0 is not at all.
"""
import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.files import command, write_json
from evaluate import metrics, ranking, ranks_of
from loop import runs

# ---------------- how a tensor is changed: x (n, ...) -> the same shape

def zero(x):
    return torch.zeros_like(x)


def one(x):
    return torch.ones_like(x)


def mean(x):
    """The same for all: the mean over the first axis."""
    return x.mean(0, keepdim=True).expand_as(x)


def shuffled(x):
    """Each row is another's; the first, padding's, stays."""
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x) - 1, generator=random).to(x.device) + 1
    return torch.cat([x[:1], x[order]])


# ---------------- where: each gives a function that changes a model

def tensor(path, how):
    """A weight or buffer by its dotted name."""
    def change(model):
        owner, _, name = path.rpartition(".")
        value = getattr(model.get_submodule(owner), name)
        value.data = how(value.data).contiguous()
    return change


def output(path, how):
    """What a part of the model returns."""
    def change(model):
        model.get_submodule(path).register_forward_hook(lambda part, given, out: how(out))
    return change


def method(path, name, how):
    """What a method returns; `how` gets it and the method's arguments."""
    def change(model):
        owner = model.get_submodule(path)
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **more: how(original(*args, **more), *args))
    return change


def arguments(path, name, how):
    """What a method is given: `how` makes its arguments from those it has."""
    def change(model):
        owner = model.get_submodule(path)
        original = getattr(owner, name)
        setattr(owner, name, lambda *args: original(*how(*args)))
    return change


def together(*changes):
    def change(model):
        for part in changes:
            part(model)
    return change


def setting(name, value):
    def change(model):
        setattr(model.cfg, name, value)
    return change


def each_block(path, part):
    """A linear map in every block of a list, set to zero."""
    def change(model):
        for block in model.get_submodule(path):
            for weight in block.get_submodule(part).parameters():
                weight.data.zero_()
    return change


# ---------------- the input

def histories(how):
    """What the model is shown; `how` makes other histories (B, L) of the batch's."""
    def change(model):
        original = model.score
        model.score = lambda batch, table: original({**batch, "seq": how(batch["seq"])}, table)
    return change


def in_any_order(seq):
    random = torch.Generator().manual_seed(0)
    draw = torch.rand(seq.shape, generator=random).to(seq.device)
    order = draw.masked_fill(seq == 0, -1).argsort(1)    # padding stays on the left
    return seq.gather(1, order)


def last_alone(seq):
    place = torch.arange(seq.shape[1], device=seq.device)
    return torch.where(place == seq.shape[1] - 1, seq, 0)


def without_last(seq):
    shorter = torch.cat([torch.zeros_like(seq[:, :1]), seq[:, :-1]], 1)
    return torch.where((shorter != 0).any(1, keepdim=True), shorter, seq)


INPUTS = {
    "the history in any order": histories(in_any_order),
    "the last item alone": histories(last_alone),
    "the history without its last item": histories(without_last),
}


# ---------------- the parts of each paper

def mdsrec_rho(name):
    def change(model):
        model.rho = {**model.rho, name: 0.0}
    return change


def one_centre(e, E_c):
    return e, E_c.mean(2, keepdim=True).expand_as(E_c)


def no_ids(result, name, *_):
    e, E_c = result
    return (e * 0 if name == "id" else e), E_c


def even_gamma(result, e, E_c):
    return e + E_c.mean(2)


MDSREC = {
    "co-occurrence in the ids, eq. (3): none": setting("mu_id", 0.0),
    "text graph, eqs. (4) to (6): another item's": tensor("graphs.text", shuffled),
    "picture graph: another item's": tensor("graphs.image", shuffled),
    "clusters, eq. (10): items at random": together(
        tensor("clusters.text", lambda C: shuffled(C.T).T),
        tensor("clusters.image", lambda C: shuffled(C.T).T),
    ),
    "interest centres, eqs. (11) to (16): all one": arguments("", "interest", one_centre),
    "interest centres: none, etilde = e": method("", "interest", lambda etilde, e, E_c: e),
    "Gamma, eq. (19): even": method("", "interest", even_gamma),
    "e^id of eq. (17): none": method("", "encode", no_ids),
    "text, eqs. (17) and (22): rho = 0": mdsrec_rho("text"),
    "pictures, eqs. (17) and (22): rho = 0": mdsrec_rho("image"),
    "positions: none": tensor("position", zero),
}


def no_covariance_in_attention(qkv):
    """Queries and keys 0, so that each covariance is 1; values as they are."""
    third = qkv.shape[-1] // 3
    return torch.cat([qkv[..., :2 * third] * 0, qkv[..., 2 * third:]], -1)


def covariance_alike(points, *_):
    """Points (..., 2d): the half that is the covariance's, the mean of all."""
    d = points.shape[-1] // 2
    spread = points[..., d:].flatten(0, -2).mean(0).expand_as(points[..., d:])
    return torch.cat([points[..., :d], spread], -1)


def table_with(how):
    return lambda table, *_: {**table, "point": how(table["point"])}


def each_stream(path, how):
    return together(tensor(f"{path}.mu", how), tensor(f"{path}.sigma", how))


def srmml_attention(model):
    for number in range(len(model.blocks)):
        output(f"blocks.{number}.covariance.qkv", no_covariance_in_attention)(model)


SRMML = {
    "M(similarity), eq. (3): its mean": output("fusion.M", mean),
    "channel weights, eq. (4): their means": method("fusion", "weights", lambda w, *_: mean(w)),
    "text channel: none": output("fusion.norm.text", zero),
    "picture channel: none": output("fusion.norm.image", zero),
    "fused channel: none": output("fusion.norm.fused", zero),
    "content m_Agg: none": output("fusion", zero),
    "content m_Agg: another item's": output("fusion", shuffled),
    "ids e: none": together(tensor("item.mu.weight", zero), tensor("item.sigma.weight", zero)),
    "gate, eq. (7): 1": method("", "gate_of", lambda gate, *_: one(gate)),
    "gate: its mean over items": method("", "gate_of", lambda gate, *_: mean(gate)),
    "language in the gate, eq. (8): its mean": output("language", mean),
    "statistics in the gate: their mean": tensor("stats", mean),
    "covariances in attention, eq. (11): all 1": srmml_attention,
    "covariance of users, eq. (16): one for all": method("", "states", covariance_alike),
    "covariance of candidates: one for all": method(
        "", "encode_items", table_with(covariance_alike)
    ),
    "attention, eq. (13): nothing is read": together(
        each_block("blocks", "mean.out"), each_block("blocks", "covariance.out")
    ),
    "positions: none": each_stream("position", zero),
}


def missing(number):
    """A modality that no item has."""
    def how(has):
        kept = torch.arange(has.shape[1], device=has.device) != number
        return has & kept
    return tensor("encoder.has", how)


FMMSREC = {
    "texts: another item's": tensor("encoder.features.text", shuffled),
    "pictures: another item's": tensor("encoder.features.image", shuffled),
    "texts: [mask] for all": missing(0),
    "pictures: [mask] for all": missing(1),
    "[mask]: zero": tensor("encoder.mask", zero),
    "modality embeddings: none": tensor("encoder.modality", zero),
    "attention: nothing is read": each_block("encoder.blocks", "out"),
    "projection, eq. (3a), of texts: zero": output("encoder.project.text", zero),
    "projection of pictures: zero": output("encoder.project.image", zero),
    "positions: none": tensor("position", zero),
}


def half(number):
    """Only one modality is scored, eq. (12)."""
    def how(table, *_):
        rows = table["candidates"]
        D = rows.shape[1] // 2
        kept = rows * 0
        kept[:, number * D:(number + 1) * D] = rows[:, number * D:(number + 1) * D]
        return {**table, "candidates": kept}
    return method("", "encode_items", how)


def of_both(path, how):
    return together(*(tensor(f"m2se.encoders.{m}.{path}", how) for m in ("text", "image")))


MSM4SR = {
    "attention over an item's vectors, eq. (3): even": of_both("W_1.weight", zero),
    "gate of experts, eqs. (4) and (5): even": of_both("W_3.weight", zero),
    "texts: another item's": output("m2se.encoders.text", shuffled),
    "pictures: another item's": output("m2se.encoders.image", shuffled),
    "ids E: none": tensor("item.weight", zero),
    "scored by texts alone, eq. (12)": half(0),
    "scored by pictures alone": half(1),
    "attention: nothing is read": each_block("m2se.blocks", "out"),
    "positions: none": tensor("m2se.position", zero),
}


def no_merge(model):
    """Merge-attention away: the mean of the projected tokens."""
    model.fusion.blocks = torch.nn.ModuleList()


MMSR = {
    "texts: another item's": tensor("towers.text.row_of", shuffled),
    "pictures: another item's": tensor("towers.image.row_of", shuffled),
    "trained blocks of the text encoder: left out": lambda model: setattr(
        model.towers["text"], "blocks", torch.nn.ModuleList()
    ),
    "trained blocks of the picture encoder: left out": lambda model: setattr(
        model.towers["image"], "blocks", torch.nn.ModuleList()
    ),
    "merge-attention: left out": no_merge,
    "modality embeddings: none": tensor("fusion.kinds", zero),
    "attention: nothing is read": each_block("user.blocks", "self_attn.out_proj"),
    "positions: none": tensor("user.position", zero),
}

SASREC = {
    "attention: nothing is read": each_block("blocks", "out"),
    "feed-forward: none": each_block("blocks", "outer"),
    "positions: none": tensor("position", zero),
}


def faint(value):
    return 1e-9 * value    # not 0, which says that an item lacks the modality


def rare_without_ids(model):
    model.item.weight.data[model.sold[:, 0] < 10] = 0


DIGEST = {
    "ids of items bought fewer than ten times: none": rare_without_ids,
    "ids: none": tensor("item.weight", zero),
    "graphs, eq. (1): another item's": together(
        tensor("graphs.text", shuffled), tensor("graphs.image", shuffled)
    ),
    "new items, eq. (3): borrow nothing": together(
        tensor("share.text", faint), tensor("share.image", faint)
    ),
    "maps of content, eq. (2): none": together(
        tensor("maps.text.weight", zero), tensor("maps.image.weight", zero)
    ),
    "cosine, eqs. (6) and (7): none": together(
        tensor("loudness.text", zero), tensor("loudness.image", zero)
    ),
    "stream of ids: attention reads nothing": each_block("encoders.id", "out"),
    "stream of texts: attention reads nothing": each_block("encoders.text", "out"),
    "stream of pictures: attention reads nothing": each_block("encoders.image", "out"),
    "r of eq. (8): 0": tensor("own", zero),
    "positions: none": tensor("position", zero),
}

PARTS = {
    "digest": DIGEST,
    "mdsrec": MDSREC,
    "srmml": SRMML,
    "fmmsrec": FMMSREC,
    "msm4sr": MSM4SR,
    "mmsr": MMSR,
    "sasrec": SASREC,
}


# ---------------- the table

AS_TRAINED = "as trained"


@torch.no_grad()
def scores_of(model, batch):
    with ranking(model):
        return model.score(batch, model.encode_items())[:, 1:].cpu().double()


def moved(before, after):
    """1 - the correlation of scores (B, N), mean over users."""
    before = before - before.mean(1, keepdim=True)
    after = after - after.mean(1, keepdim=True)
    length = before.norm(dim=1) * after.norm(dim=1)
    correlation = (before * after).sum(1) / length.clamp(min=1e-30)
    return (1 - correlation).mean().item()


def changed(model, change):
    """A copy of the model with one change."""
    other = copy.deepcopy(model)
    change(other)
    return other


def looked_at(folder, device):
    """Yields a part, NDCG@10 without it, the change, and how much the scores moved; first the
    model as it was trained."""
    run = runs.open_run(folder, device)
    model, dataset, cfg, device = run.model(), run.dataset, run.cfg, run.device
    if hasattr(model, "prepare"):
        model.prepare(device)
    rows = dataset.evaluated_rows("valid", cfg.max_len, device)
    index = torch.arange(min(256, len(rows)), device=device)
    batch = rows.batch(index, int(rows.lengths[:len(index)].max()))
    batch = {"user": batch["user"], "seq": batch["seq"]}
    before = scores_of(model, batch)
    name = Path(sys.modules[type(model).__module__].__file__).stem
    ndcg = metrics(ranks_of(model, rows, device)[1])["ndcg@10"]
    yield AS_TRAINED, ndcg, 0.0, 0.0
    for part, change in {**INPUTS, **PARTS.get(name, {})}.items():
        other = changed(model, change)
        after = metrics(ranks_of(other, rows, device)[1])["ndcg@10"]
        yield part, after, after - ndcg, moved(before, scores_of(other, batch))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py made")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    args = parser.parse_args()
    for folder in args.runs:
        print(f"\n| {folder.name} | masked N@10 | change | scores moved |\n|---|---|---|---|")
        found = {}
        for part, ndcg, change, distance in looked_at(folder, args.device):
            print(f"| {part} | {ndcg:.4f} | {change:+.4f} | {distance:.4f} |", flush=True)
            found[part] = {"masked N@10": ndcg, "change": change, "moved": distance}
        write_json(folder / "parts.json", found)


if __name__ == "__main__":
    command(main)
