"""What the tests of the sources share."""
import json

import numpy as np
import pytest


@pytest.fixture
def histories():
    """histories(folder) -> {user: item keys, oldest first} of a processed folder."""
    def read(folder):
        with np.load(folder / "sequences.npz", allow_pickle=False) as file:
            items, offsets = file["items"], file["offsets"]
        with open(folder / "items.jsonl", encoding="utf-8") as file:
            keys = [json.loads(line)["key"] for line in file]
        users = (folder / "users.txt").read_text(encoding="utf-8").splitlines()
        return {
            user: [keys[i - 1] for i in items[begin:end]]
            for user, begin, end in zip(users, offsets, offsets[1:])
        }
    return read
