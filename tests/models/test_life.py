"""Every part of every paper acts: changed alone in a trained model, it moves the scores.

tests/life.py does the same to finished runs, and says how much each part is worth there.
"""
import dataclasses

import life
import numpy as np
import pytest
import torch
from PIL import Image

from loop import runs
from loop.settings import load_model_file

N, L = 30, 8
SMALL = dict(
    dim=16, heads=2, dropout=0., input_dropout=0., max_len=L, centers=4, neighbors=3, lr=1e-2,
    text_encoder="tiny", image_encoder="tiny",
)


def make_catalog(folder):
    """Items in a circle, each with several vectors, words and a picture of its own; one in ten has
    no text, one in ten no picture. Users walk along the circle, a third within one language."""
    random = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    catalog = {"n_items": N, "lang": torch.arange(N + 1) % 3 + 1}
    catalog["lang"][0] = 0
    for m, stack, width in (("text", "sentences", 12), ("image", "pictures", 20)):
        has = torch.arange(N + 1) % 10 != (3 if m == "text" else 7)
        has[0] = False
        mask = (torch.rand(N + 1, 3, generator=random) > .3) & has[:, None]
        mask[:, 0] = has
        x = torch.randn(N + 1, 3, width, generator=random) * mask[..., None]
        catalog |= {f"has_{m}": has, stack: x, f"{stack}_mask": mask}
        catalog[m] = x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    has = catalog["has_text"].tolist()
    catalog["titles"] = [f"thing number {i}" if has[i] else "" for i in range(N + 1)]
    catalog["image_paths"] = [None] * (N + 1)
    for i in range(1, N + 1):
        if catalog["has_image"][i]:
            path = folder / f"{i}.png"
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 64)).save(path)
            catalog["image_paths"][i] = str(path)
    seqs = []
    for user in range(60):
        length = int(rng.integers(3, L + 2))
        start, step = user, 1
        if user % 3 == 0:    # in steps of three the language is the same: the first one, mostly
            start, step = 3 * user, 3
        seqs.append([(start + step * t) % 27 + 1 for t in range(length)])    # three are never sold
    return catalog | {"train_seqs": seqs}


def make_batch(seqs):
    batch = {"user": torch.arange(len(seqs))}
    for key, part in (("seq", slice(None, -1)), ("target", slice(1, None))):
        rows = [torch.tensor(seq[part]) for seq in seqs]
        padded = [torch.nn.functional.pad(row, (L - len(row), 0)) for row in rows]
        batch[key] = torch.stack(padded)
    return batch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> a model of that file, trained for a few steps, and a batch; each once."""
    made = {}
    folder = tmp_path_factory.mktemp("pictures")
    catalog = make_catalog(folder)

    def make(name):
        if name not in made:
            module = load_model_file(name)
            fields = {field.name for field in dataclasses.fields(module.Config)}
            given = SMALL | {"cache_dir": str(folder), "prefixes": False}
            if name == "mmsr":    # a binary loss would need more steps
                given["loss"] = "in_batch"
            cfg = module.Config(**{key: value for key, value in given.items() if key in fields})
            known = {key: catalog[key] for key in ("n_items", *module.READS)}
            model = runs.build(module.Model, cfg, known, "cpu", 0).train()
            batch = make_batch(catalog["train_seqs"])
            optimizer = torch.optim.Adam(model.parameters(), 1e-2)
            for _ in range(60):
                optimizer.zero_grad()
                sum(model(batch).values()).backward()
                optimizer.step()
            made[name] = model.eval(), {key: batch[key] for key in ("user", "seq")}
        return made[name]
    return make


CASES = [(name, part) for name, parts in life.PARTS.items() for part in (*life.INPUTS, *parts)]


@pytest.mark.parametrize("name, part", CASES)
def test_each_part_moves_the_scores(trained, name, part):
    model, batch = trained(name)
    change = {**life.INPUTS, **life.PARTS[name]}[part]
    before = life.scores_of(model, batch)
    after = life.scores_of(life.changed(model, change), batch)
    assert after.isfinite().all()
    assert life.moved(before, after) > 2e-4
    assert torch.equal(life.scores_of(model, batch), before)    # the model itself is as it was


def test_what_a_change_does():
    x = torch.arange(12.).reshape(6, 2)
    assert not life.zero(x).any()
    assert torch.equal(life.mean(x), x.mean(0).expand(6, 2))
    found = life.shuffled(x)
    assert torch.equal(found[0], x[0]) and sorted(found[1:, 0]) == sorted(x[1:, 0])
    assert not torch.equal(found, x)
    seq = torch.tensor([[0, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 9]])
    mixed = life.in_any_order(seq)
    assert sorted(mixed[0].tolist()) == sorted(seq[0].tolist()) and mixed[0, 0] == 0
    assert not torch.equal(mixed, seq)
    assert life.last_alone(seq).tolist() == [[0] * 5 + [7], [0] * 5 + [9]]
    assert life.without_last(seq).tolist() == [[0, 0, 3, 4, 5, 6], [0, 0, 0, 0, 0, 9]]
    assert life.moved(x, 3 * x + 1) < 1e-9 and life.moved(x, -x) == pytest.approx(2)
