"""The untrained baselines against answers that are known."""
import torch

from loop.settings import load_model_file

pop = load_model_file("pop")
cosine = load_model_file("cosine")


def test_pop_counts_the_training_part():
    model = pop.Model(pop.Config(), {"n_items": 5, "train_seqs": [[1, 2, 2], [2, 4], []]})
    scores = model.score({"seq": torch.ones(2, 3, dtype=torch.long)}, model.encode_items())
    assert scores.tolist() == [[0, 1, 3, 0, 1, 0]] * 2


def test_cosine_ranks_by_likeness_to_the_last_item():
    text = torch.tensor([[0., 0], [1, 0], [3, 4], [0, 0]])     # item 3 has no text
    image = torch.tensor([[0., 0], [0, 2], [0, 1], [5, 0]])
    catalog = {"n_items": 3, "text": text, "image": image}
    batch = {"seq": torch.tensor([[0, 3, 1]])}
    expected = {"text": [0., 1, .6, 0], "image": [0., 1, 1, 0], "both": [0., 1, .8, 0]}
    for modality, scores in expected.items():
        model = cosine.Model(cosine.Config(modality=modality), catalog)
        found = model.score(batch, model.encode_items())
        torch.testing.assert_close(found, torch.tensor([scores]))
