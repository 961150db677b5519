"""sources/recbole.py: atomic files, whole or split."""
import pytest

from common.files import UserError
from sources import prepare, recbole

HEAD = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_interactions_and_items(tmp_path):
    raw = recbole.read(write(
        tmp_path / "x",
        x_inter=HEAD + "u\tb\t5.0\t1500000001\nu\ta\t4.0\t1500000000\n",
        x_item='item_id:token\tmovie_title:token_seq\tclass:token_seq\tyear:token\n'
               'b\tThe "Mug\tDrama Crime\t1999\na\tTea\t\t\n',
        x_user="user_id:token\tage:token\nu\t33\n",
    ), None)
    assert list(zip(raw.users, raw.items, raw.times)) == [
        ("u", "b", 1500000001), ("u", "a", 1500000000),
    ]
    assert raw.item_order == ["b", "a"]
    assert raw.catalog["b"]["title"] == 'The "Mug'
    assert raw.catalog["b"]["text"] == ["Drama Crime"]
    assert raw.notes == ["x.inter: columns not read: rating", "x.item: keys not read: year (1)"]


def test_split_files(tmp_path):
    folder = write(tmp_path / "x", **{
        f"x_{part}_inter": f"{HEAD}u\t{part}\t5\t{1500000000 + number}\n"
        for number, part in enumerate(("train", "valid", "test"))
    })
    raw = recbole.read(folder, None)
    assert dict(zip(raw.items, raw.parts)) == {"train": 0, "valid": 1, "test": 2}


def test_split_files_without_times_are_in_their_order(tmp_path, histories):
    head = "user_id:token\titem_id:token\n"
    folder = write(tmp_path / "x", **{
        f"x_{part}_inter": f"{head}u\t{part}\n" for part in ("test", "train", "valid")
    })
    assert histories(prepare(folder, tmp_path / "data")) == {"u": ["train", "valid", "test"]}


def test_parts_of_other_names_are_put_together(tmp_path):
    folder = write(tmp_path / "x", x_part1_inter=f"{HEAD}u\ta\t5\t9\n",
                   x_part2_inter=f"{HEAD}u\tb\t5\t8\n")
    raw = recbole.read(folder, None)
    assert [*raw.items] == ["a", "b"]
    assert raw.parts is None
    assert raw.notes[-1] == (
        "x.part1.inter, x.part2.inter are put together: they are not called train, valid and test"
    )


@pytest.mark.parametrize("files, sentence", [
    ({"x_train_inter": HEAD, "x_extra_inter": HEAD}, "must all have a part: train, valid or test"),
    ({"x_inter": "user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta b\tc\n"},
     "a row for each prefix of a history"),
    ({"x_inter": HEAD, "y_inter": HEAD}, "several data sets .x, y."),
    ({"x_inter": "user_id:token\trating:float\nu\t5\n"}, "item is not there"),
])
def test_what_cannot_be_used_is_one_sentence(tmp_path, files, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(write(tmp_path / "x", **files), tmp_path / "data")


def test_real_atomic_file(real, tmp_path, histories):
    out = prepare(real("pantry-ids"), tmp_path / "data")
    sequences = histories(out)
    assert (len(sequences), sum(map(len, sequences.values()))) == (12608, 109007)
