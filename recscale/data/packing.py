"""Which examples share a row: packing plans computed once from lengths and a seed.

A plan depends on nothing but lengths and seed, so row r is a random-access element: an epoch only permutes rows.
"""

import dataclasses

import numpy as np

from recscale.data.event_log import EventLogError

SLACK = 1.005  # rows opened at first, relative to the fewest that could hold everything


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of examples in CSR form: row r holds segments[row_offsets[r]:row_offsets[r + 1]], in that order.

    row_offsets: int64 [rows + 1]. segments: int64 [N], each example exactly once. row_length: slots of a row.
    """

    row_offsets: np.ndarray
    segments: np.ndarray
    row_length: int

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def fill(self, lengths: np.ndarray) -> float:
        """Real tokens per slot."""
        return float(lengths[self.segments].sum()) / (self.num_rows * self.row_length)


def plan(lengths: np.ndarray, row_length: int, window_users: int = 65536, seed: int = 0, most: int = 0) -> Plan:
    """Pack examples of `lengths` [N] (1..row_length) into rows of `row_length` slots; several examples a row.

    Examples are taken in windows of about `window_users` in a seeded order, which keeps a row's examples unrelated to
    the order of the log. most: examples in a row at most, 0 = as many as fit. Raises EventLogError where a length does
    not fit. Rows come out ordered by their longest example: shuffle them.
    """
    return _pack(lengths, np.random.default_rng(seed).permutation(len(lengths)), row_length, window_users, most)


def plan_in_order(lengths: np.ndarray, row_length: int, window_users: int = 4096) -> Plan:
    """Like `plan` with windows in the order of the log: neighbours stay close, no seed is involved (evaluation)."""
    return _pack(lengths, np.arange(len(lengths)), row_length, window_users)


def plan_padded(lengths: np.ndarray, row_length: int) -> Plan:
    """One example a row, in the order given."""
    _check(lengths, row_length)
    return Plan(np.arange(len(lengths) + 1), np.arange(len(lengths)), row_length)


def _check(lengths: np.ndarray, row_length: int) -> None:
    if len(lengths) and (lengths.min() < 1 or lengths.max() > row_length):
        raise EventLogError(
            f"lengths: found {lengths.min()}..{lengths.max()}, expected 1..row_length={row_length}. "
            "Drop empty examples and cut long ones first."
        )


def _pack(lengths: np.ndarray, order: np.ndarray, row_length: int, window_users: int, most: int = 0) -> Plan:
    _check(lengths, row_length)
    windows = max(1, round(len(order) / window_users))
    rows_N = np.empty(len(order), np.int64)
    num_rows = 0
    for window in np.array_split(order, windows):
        placed, used = _rounds(lengths[window], row_length, most or row_length)
        rows_N[window] = num_rows + placed
        num_rows += used
    by_row = order[np.argsort(rows_N[order], kind="stable")]
    counts = np.bincount(rows_N, minlength=num_rows)
    return Plan(np.concatenate([[0], np.cumsum(counts)]), by_row, row_length)


def _rounds(lengths: np.ndarray, row_length: int, most: int) -> tuple[np.ndarray, int]:
    """Row of each example, and the number of rows: each round gives every row at most one example, longest first.

    In a round the longest waiting examples meet the rows with most free space; those that do not fit wait. Examples
    longer than any free space open new rows. A row with `most` examples has no free space.
    """
    placed = np.empty(len(lengths), np.int64)
    waiting = np.argsort(-lengths, kind="stable")
    free, held = np.zeros(0, np.int64), np.zeros(0, np.int64)
    while len(waiting):
        if not len(free) or lengths[waiting[0]] > free.max():
            stuck = lengths[waiting] > (free.max() if len(free) else 0)
            new_rows = int(np.ceil(SLACK * lengths[waiting[stuck]].sum() / row_length))
            free = np.concatenate([free, np.full(new_rows, row_length)])
            held = np.concatenate([held, np.zeros(new_rows, np.int64)])
        rows = np.argsort(-free, kind="stable")[: len(waiting)]
        candidates = waiting[: len(rows)]
        fits = lengths[candidates] <= free[rows]
        placed[candidates[fits]] = rows[fits]
        free[rows[fits]] -= lengths[candidates[fits]]
        held[rows[fits]] += 1
        free[held == most] = 0
        waiting = np.concatenate([candidates[~fits], waiting[len(rows) :]])
    used, placed = np.unique(placed, return_inverse=True)
    return placed, len(used)
