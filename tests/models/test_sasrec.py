"""SASRec's block against torch's own layer, and its second loss against loops."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loop.settings import load_model_file

pytestmark = pytest.mark.usefixtures("float64")
sasrec = load_model_file("sasrec")
N = 9


def make(**settings):
    small = dict(dim=8, heads=2, layers=2, max_len=6, dropout=0.)
    return sasrec.Model(sasrec.Config(**small | settings), {"n_items": N})


@torch.no_grad()
def test_states_are_those_of_torchs_transformer():
    model = make()
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.normal_(std=.5)
    seq = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    x = model.norm(model.item(seq) + model.position[-5:])
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 32, 0., F.gelu, batch_first=True)
        names = {
            "self_attn.in_proj_": block.qkv, "self_attn.out_proj.": block.out,
            "linear1.": block.inner, "linear2.": block.outer,
            "norm1.": block.norm1, "norm2.": block.norm2,
        }
        weights = {}
        for name, part in names.items():
            weights[f"{name}weight"] = part.weight
            weights[f"{name}bias"] = part.bias
        layer.load_state_dict(weights)
        x = layer(x, src_mask=later)
    table = model.encode_items()
    torch.testing.assert_close(model.states(seq, table), x)
    torch.testing.assert_close(model.score({"seq": seq}, table), x[:, -1] @ table.T)


def test_bce_is_the_papers_with_one_negative():
    model = make(loss="bce")
    batch = {"seq": torch.tensor([[0, 3, 1, 4]]), "target": torch.tensor([[0, 1, 4, 7]])}
    table = model.encode_items()
    state = model.states(batch["seq"], table)[0]
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        negative = torch.randint_like(batch["target"], 1, N + 1)[0].tolist()
        torch.manual_seed(seed)
        found = model(batch)["next_item"]
        terms = []
        for t in (1, 2, 3):
            right = state[t] @ table[batch["target"][0, t]]
            loss = -right.sigmoid().log()
            if negative[t] not in (3, 1, 4, 7):    # an item of the row itself is no negative
                wrong = state[t] @ table[negative[t]]
                loss = loss - (1 - wrong.sigmoid()).log()
            terms.append(loss)
        torch.testing.assert_close(found, sum(terms) / 3)
        drawn |= set(negative[1:])
    assert drawn == set(range(1, N + 1)), "the seeds must show all cases"


def test_the_softmax_loss_is_over_all_items():
    model = make()
    batch = {"seq": torch.tensor([[0, 3, 1, 4]]), "target": torch.tensor([[0, 1, 4, 7]])}
    table = model.encode_items()
    logits = model.states(batch["seq"], table)[0, 1:] @ table[1:].T
    expected = F.cross_entropy(logits, torch.tensor([1, 4, 7]) - 1)
    torch.testing.assert_close(model(batch)["next_item"], expected)


def test_with_prefixes_the_last_place_has_the_only_target():
    model = make(prefixes=True)
    batch = {"seq": torch.tensor([[2, 3, 1, 4]]), "target": torch.tensor([[3, 1, 4, 7]])}
    table = model.encode_items()
    logits = model.states(batch["seq"], table)[:, -1] @ table[1:].T
    expected = F.cross_entropy(logits, torch.tensor([7]) - 1)
    torch.testing.assert_close(model(batch)["next_item"], expected)


def test_settings_are_those_that_the_paper_states():
    cfg = sasrec.Config()
    assert (cfg.layers, cfg.dropout, cfg.max_len) == (2, .5, 50)
    assert (cfg.batch_size, cfg.lr, cfg.optimizer) == (128, 1e-3, "adam")
