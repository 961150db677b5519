"""Splits: where each user's training part ends, and which items are the targets.

    leave_one_out   a user's last item is the test target, the one before it the validation target;
                    users with fewer than 3 items are trained on and never evaluated
    temporal        one cut in time for all users, where validation begins, and one where the test
                    begins: dates, or shares of the interactions (80 % and 90 %)
    files           as the train, valid and test files of the data say
    none            everything is trained on, and nothing evaluated

In `temporal` and `files` a user can have several items after a cut; the target is the first of
them, with everything before it as input. Users without an item before it are not evaluated.

Each function: data.Data -> ends of the training parts (n_users,), validation targets, test targets:
places in `flat`, -1 = none.
"""
import numpy as np

from .files import UserError
from .times import Times, number

SHARES = (.8, .9)    # of the interactions, before the two cuts
PARTS = ("train", "valid", "test")


def leave_one_out(dataset):
    begin, end = dataset.offsets[:-1], dataset.offsets[1:]
    evaluated = end - begin >= 3
    train_end = np.where(evaluated, end - 2, end)
    valid = np.where(evaluated, end - 2, -1)
    test = np.where(evaluated, end - 1, -1)
    return train_end, valid, test


def temporal(dataset):
    """Raises UserError where there are no times, or no interactions between the cuts."""
    if dataset.about["clock"] == "order":
        raise UserError(
            f"{dataset.name} has an order but no times, so it cannot be split at a time: "
            f"use --split leave_one_out"
        )
    first, second = cuts_of(dataset.cut, dataset.times)
    return in_parts(dataset, (dataset.times >= first).astype(int) + (dataset.times >= second))


def files(dataset):
    """Raises UserError where the data came in one piece, or without valid or test."""
    if dataset.parts is None:
        read = ", ".join(name for name in dataset.about["files"] if name in dataset.about["report"])
        raise UserError(
            f"{dataset.name} came in one piece ({read}), so --split files has nothing to go by: "
            f"give train.csv, valid.csv and test.csv in its place, or use another --split"
        )
    missing = [part for number, part in enumerate(PARTS) if not (dataset.parts == number).any()]
    if missing:
        raise UserError(
            f"{dataset.name} came without {' and '.join(missing)}, and --split files needs train, "
            f"valid and test: give the missing file, or use another --split"
        )
    return in_parts(dataset, dataset.parts)


def none(dataset):
    nobody = np.full(dataset.n_users, -1)
    return dataset.offsets[1:].copy(), nobody, nobody


def in_parts(dataset, parts):
    """The split of interactions marked 0 train, 1 valid, 2 test, in this order for each user."""
    begin = dataset.offsets[:-1]
    user = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))

    def first_of(part):    # of each user: the first place of this part or a later one
        return begin + np.bincount(user, parts < part, dataset.n_users).astype(np.int64)

    first_cut, second_cut, end = first_of(1), first_of(2), first_of(3)
    valid = np.where((first_cut < second_cut) & (first_cut > begin), first_cut, -1)
    test = np.where((second_cut < end) & (second_cut > begin), second_cut, -1)
    return first_cut, valid, test


SPLITS = {"leave_one_out": leave_one_out, "temporal": temporal, "files": files, "none": none}


# ---------------- the cuts of a temporal split

def cuts_of(text, times) -> tuple:
    """--cut -> the seconds at which validation and test begin.

    text: two dates or two shares with a comma between them; one of them, where the test begins:
    then validation has the last ninth of what lies before it, as the shares .8 and .9 have it;
    None: those. Raises UserError for what is neither, and for cuts that nothing lies between.
    """
    if text is None:
        return tuple(np.quantile(times, SHARES))
    cuts = [cut_at(part.strip(), times) for part in text.split(",")]
    if None in cuts or len(cuts) > 2:
        raise UserError(
            f"--cut {text} is not understood: give one or two dates, such as 2022-09-15 or "
            f"2022-09-15,2022-09-22, or shares, such as .8,.9"
        )
    if len(cuts) == 2 and cuts[0] >= cuts[1]:
        raise UserError(f"--cut {text} must name the earlier cut first, where validation begins")
    if len(cuts) == 1:
        before = times[times < cuts[0]]
        first = np.quantile(before, SHARES[0] / SHARES[1]) if len(before) else cuts[0]
        cuts = [first, *cuts]
    if not times.min() < cuts[0] < cuts[1] <= times.max():
        ends = np.array([times.min(), times.max()], "datetime64[s]")
        first, last = ends.astype("datetime64[D]")
        raise UserError(
            f"--cut {text} leaves nothing to train on, to validate or to test: the interactions "
            f"lie between {first} and {last}"
        )
    return tuple(cuts)


def cut_at(text, times):
    """Seconds of a date, or of where a share of the interactions is reached; else None."""
    share = number(text)
    if share is not None and 0 < share < 1:
        return np.quantile(times, share)
    date = Times()
    if not date.add(text):
        return None
    seconds, _, clock = date.in_seconds(f"--cut {text}")
    return None if clock == "order" else seconds[0]    # 1, 2, 3 are no dates


def in_order_of_parts(offsets, flat, times, parts):
    """flat, times and parts of each user with the training items first, then valid, then test."""
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((np.arange(len(flat)), parts, user))
    return flat[order], times[order], parts[order]
