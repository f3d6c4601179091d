"""Counting inside groups without a loop over rows: pairs that two orders agree on, rows that are equal, places.

n rows in any order; group: int [n]. Keys are float64 or integers without NaN. All O(n log n), numpy.
"""

import numpy as np


def agreements(label: np.ndarray, score: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row: pairs in its group whose scores are ordered as the labels (equal scores: a half), and all pairs.

    label, score: [n], labels may be graded; only rows with different labels make a pair. Returns float64 [n] twice;
    each pair is counted at both of its ends.
    """
    equal_scores = sizes(group, score) - sizes(group, score, label)
    pairs = sizes(group) - sizes(group, label)
    agree = dominated(label, score, group) + dominated(-label, -score, group) + equal_scores / 2.0
    return agree, pairs.astype(np.float64)


def sizes(*keys: np.ndarray) -> np.ndarray:
    """int64 [n]: how many rows have the same keys as this one, itself included."""
    order = np.lexsort(keys[::-1])
    starts = np.flatnonzero(_opens(order, *keys))
    count = np.diff(np.append(starts, len(order)))
    found = np.empty(len(order), np.int64)
    found[order] = np.repeat(count, count)
    return found


def dominated(first: np.ndarray, second: np.ndarray, group: np.ndarray) -> np.ndarray:
    """int64 [n]: how many rows of the same group are strictly smaller in both keys.

    Rows are laid out by group and first key and then parted by the bits of their rank in the second key, highest bit
    first. Two rows part at the highest bit in which they differ: the one with the 1 there is the larger, and counts the
    0s before it. Rows of equal first key are laid out by falling second key, so that none counts the other.
    """
    found = np.zeros(len(first), np.int64)
    if not len(first):
        return found
    row = np.lexsort((-second, first, group))
    rank = _dense_ranks(second, group)[row]
    start, end = _runs(group[row])
    for bit in reversed(range(int(rank.max()).bit_length())):
        one = (rank >> bit & 1).astype(bool)
        zeros = np.concatenate([[0], np.cumsum(~one)])
        before, inside = zeros[:-1] - zeros[start], zeros[end] - zeros[start]
        found[row[one]] += before[one]
        middle = start + inside
        ones_before = np.arange(len(row)) - start - before
        place = np.where(one, middle + ones_before, start + before)
        start, end = np.where(one, middle, start), np.where(one, end, middle)
        row, rank, start, end = (_moved(array, place) for array in (row, rank, start, end))
    return found


def mean_discount(group: np.ndarray, key: np.ndarray, k: int | None = None) -> np.ndarray:
    """float64 [n]: 1 / log2(place + 1) of each row in its group by falling key; 0 for places over k.

    Rows of equal key share the mean of their places' discounts.
    """
    order = np.lexsort((-key, group))
    start, _ = _runs(group[order])
    place = np.arange(len(order)) - start + 1
    discount = np.where(place <= (k or len(order)), 1.0 / np.log2(place + 1.0), 0.0)
    first, last = _runs_of(_opens(order, group, key))
    summed = np.concatenate([[0.0], np.cumsum(discount)])
    found = np.empty(len(order))
    found[order] = np.where(last - first > 1, (summed[last] - summed[first]) / np.maximum(last - first, 1), discount)
    return found


def _dense_ranks(key: np.ndarray, group: np.ndarray) -> np.ndarray:
    """int64 [n]: the number of different smaller keys in the row's group."""
    order = np.lexsort((key, group))
    number = np.cumsum(_opens(order, group, key))
    start, _ = _runs(group[order])
    found = np.empty(len(order), np.int64)
    found[order] = number - number[start]
    return found


def _opens(order: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """bool [n]: in this order, the row differs from the one before in one of the keys."""
    opens = np.ones(len(order), bool)
    opens[1:] = np.logical_or.reduce([key[order[1:]] != key[order[:-1]] for key in keys])
    return opens


def _runs(sorted_group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the row's run of equal values starts and ends (one past)."""
    return _runs_of(_opens(np.arange(len(sorted_group)), sorted_group))


def _runs_of(opens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    starts = np.flatnonzero(opens)
    ends = np.append(starts[1:], len(opens))[: len(starts)]
    count = ends - starts
    return np.repeat(starts, count), np.repeat(ends, count)


def _moved(array: np.ndarray, place: np.ndarray) -> np.ndarray:
    moved = np.empty_like(array)
    moved[place] = array
    return moved
