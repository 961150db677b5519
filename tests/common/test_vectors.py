"""common/vectors.py: vectors of somebody's own, in their five forms, and what may be wrong."""
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.files import UserError
from common.vectors import digest_of, is_vectors, read_vectors

KEYS = ["7", "12", "3", "40"]
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3) + .5
ORDER = [2, 0, 3, 1]    # another order of the items


def npy(folder, rows):
    np.save(folder / "v.npy", rows)
    return folder / "v.npy"


def tensors(folder, content):
    save_file(content, folder / "v.safetensors")
    return folder / "v.safetensors"


def in_order(folder):
    return npy(folder, ROWS)


def one_tensor(folder):
    return tensors(folder, {"anything": torch.tensor(ROWS).double()})


def tensors_by_key(folder):
    return tensors(folder, {KEYS[i]: torch.tensor(ROWS[i]) for i in ORDER})


def column_of_ids(folder):
    ids = np.array([int(KEYS[i]) for i in ORDER], float)
    return npy(folder, np.column_stack([ids, ROWS[ORDER]]))


def ids_beside(folder):
    (folder / "v.ids.txt").write_text("".join(f"{KEYS[i]}\n" for i in ORDER))
    return npy(folder, ROWS[ORDER])


def two_fields(folder):
    rows = np.zeros(4, [("item", "U8"), ("vector", "f4", 3)])
    rows["item"] = [KEYS[i] for i in ORDER]
    rows["vector"] = ROWS[ORDER]
    return npy(folder, rows)


@pytest.mark.parametrize("form", [
    in_order, one_tensor, tensors_by_key, column_of_ids, ids_beside, two_fields,
])
def test_five_forms_of_the_same_vectors(tmp_path, form):
    path = form(tmp_path)
    rows, notes = read_vectors(path, KEYS)
    np.testing.assert_array_equal(rows, ROWS)
    assert rows.dtype == np.float32
    if form in (in_order, one_tensor):
        assert notes == [f"the rows of {path.name} are taken in the order of the catalog, the "
                         f"first is 7's"]
    elif form == column_of_ids:
        assert notes == ["the first column of v.npy is taken for the items' ids"]
    else:
        assert notes == []


def test_a_first_column_that_is_no_list_of_ids_is_a_feature(tmp_path):
    whole = ROWS.copy()
    whole[:, 0] = [7, 7, 3, 40]    # twice the same
    assert read_vectors(npy(tmp_path, whole), KEYS)[0].shape == (4, 3)
    whole[:, 0] = [1, 2, 4, 5]     # of no item
    rows, notes = read_vectors(npy(tmp_path, whole), KEYS)
    assert rows.shape == (4, 3)
    assert notes[0].endswith("has whole numbers that are no items' ids, and is taken for a feature")


def test_an_id_that_stands_twice_in_the_column_is_refused(tmp_path):
    keys = [str(number) for number in range(20)]
    ids = np.array([0., *range(19)])
    with pytest.raises(UserError, match="20 rows and 19 different ids"):
        read_vectors(npy(tmp_path, np.column_stack([ids, ids + .5])), keys)


def test_ids_that_lost_their_zeros_are_known_and_those_that_lost_digits_are_refused(tmp_path):
    keys = ["0108775015", "0108775044"]
    rows = np.array([[108775044, .5], [108775015, 1.5]])
    found, _ = read_vectors(npy(tmp_path, rows), keys)
    np.testing.assert_array_equal(found, [[1.5], [.5]])
    with pytest.raises(UserError, match="float32 cannot hold: save it as float64"):
        read_vectors(npy(tmp_path, rows.astype(np.float32)), keys)


def test_what_fixes_the_vectors_is_the_file_and_the_ids_beside_it(tmp_path):
    path = npy(tmp_path, ROWS)
    alone = digest_of(path)
    (tmp_path / "v.ids.txt").write_text("7\n12\n3\n40\n")
    beside = digest_of(path)
    (tmp_path / "v.ids.txt").write_text("12\n7\n3\n40\n")
    assert len({alone, beside, digest_of(path)}) == 3


def test_items_without_a_row_have_zeros_and_strange_rows_are_said(tmp_path):
    (tmp_path / "v.ids.txt").write_text("12\nunknown\n")
    rows, notes = read_vectors(npy(tmp_path, ROWS[:2]), KEYS)
    np.testing.assert_array_equal(rows[1], ROWS[0])
    assert not rows[[0, 2, 3]].any()
    assert notes == [
        "1 of 2 rows of v.npy are of no item of the data set, the first is unknown"
    ]


def test_rows_of_the_described_items_are_the_first(tmp_path):
    rows, _ = read_vectors(npy(tmp_path, ROWS[:3]), KEYS, described=3)
    np.testing.assert_array_equal(rows[:3], ROWS[:3])
    assert not rows[3].any()


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.mark.parametrize("rows, sentence", [
    (ROWS[:3], "v.npy has 3 rows, and the data set has 4 items"),
    (ROWS[:, 0], r"of shape \(4,\)"),
    (ROWS[:, :0], r"of shape \(4, 0\)"),
    (ROWS[None], r"of shape \(1, 4, 3\)"),
    (np.where(ROWS == 4.5, np.nan, ROWS), "row 1 .counted from 0. has a number that is not finite"),
    (np.where(ROWS == 4.5, np.inf, ROWS), "not finite"),
    (ROWS.astype(str), "a row of numbers"),
    (np.where(ROWS == 4.5, 1e300, ROWS.astype(float)), "row 1 .* not finite"),
    (np.array([Evil()], object), "cannot be read as an array of numbers"),
])
def test_what_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, rows, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        read_vectors(npy(tmp_path, rows), KEYS)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("ids, sentence", [
    ("7\n7\n3\n40\n", "give each row an id of its own"),
    ("7\n12\n", "4 rows and 2 different ids"),
    ("a\nb\nc\nd\n", "none of the 4 ids .* .a against 7."),
    ("é\nb\nc\nd\n", "v.ids.txt cannot be read .*save it as UTF-8"),
])
def test_ids_that_fit_nothing_are_one_sentence(tmp_path, ids, sentence):
    (tmp_path / "v.ids.txt").write_text(ids, encoding="latin-1")
    with pytest.raises(UserError, match=sentence):
        read_vectors(npy(tmp_path, ROWS), KEYS)


@pytest.mark.parametrize("content", [
    {"a": torch.zeros(4, 3), "b": torch.zeros(4)}, {"a": torch.zeros(3), "b": torch.zeros(2)},
])
def test_tensors_that_are_no_table_are_named(tmp_path, content):
    with pytest.raises(UserError, match="holds the tensors a, b"):
        read_vectors(tensors(tmp_path, content), KEYS)


def test_a_key_of_five_thousand_digits_is_no_number(tmp_path):
    rows, notes = read_vectors(column_of_ids(tmp_path), [*KEYS, "9" * 5000])
    np.testing.assert_array_equal(rows[:4], ROWS)
    assert not rows[4].any()


def test_no_rows_at_all_are_refused(tmp_path):
    with pytest.raises(UserError, match="of shape .0, 3."):
        read_vectors(npy(tmp_path, ROWS[:0]), KEYS)


def test_damaged_and_missing_files(tmp_path):
    for name in ("v.npy", "v.safetensors"):
        with pytest.raises(UserError, match="is no file"):
            read_vectors(tmp_path / name, KEYS)
        (tmp_path / name).write_bytes(b"\x93NUMPY")
        with pytest.raises(UserError, match="cannot be read"):
            read_vectors(tmp_path / name, KEYS)


def test_which_names_are_files(tmp_path):
    assert is_vectors("shop/v.npy") and is_vectors("v.safetensors")
    assert is_vectors("C:\\shop\\v.npy") and is_vectors("/a/run:1/v.npy")
    (tmp_path / "run:1.npy").touch()
    assert is_vectors(tmp_path / "run:1.npy")
    assert not is_vectors("ViT-B-32:weights.safetensors") and not is_vectors("org/model")
    assert not is_vectors(None)


def test_ids_that_float64_cannot_hold_are_refused(tmp_path):
    keys = [str(2 ** 53 + 4 * i + 1) for i in range(4)]
    rows = np.column_stack([np.array(keys, float), np.ones(4)])
    with pytest.raises(UserError, match="float64 cannot hold: write the ids"):
        read_vectors(npy(tmp_path, rows), keys)


def test_rows_without_ids_need_a_line_for_each_item(tmp_path):
    with pytest.raises(UserError, match="has lines twice or lines that cannot be used"):
        read_vectors(npy(tmp_path, ROWS), KEYS, -1)
    ids_beside(tmp_path)
    assert read_vectors(tmp_path / "v.npy", KEYS, -1)[0].shape == ROWS.shape


def test_ids_beside_vectors_may_begin_with_a_mark(tmp_path):
    path = ids_beside(tmp_path)
    beside = tmp_path / "v.ids.txt"
    beside.write_text("\ufeff" + beside.read_text(), encoding="utf-8")
    np.testing.assert_array_equal(read_vectors(path, KEYS)[0], ROWS)


def test_several_arrays_in_one_file_are_refused(tmp_path):
    with open(tmp_path / "v.npy", "wb") as file:
        np.savez(file, a=ROWS)
    with pytest.raises(UserError, match="several arrays"):
        read_vectors(tmp_path / "v.npy", KEYS)
