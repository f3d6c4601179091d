"""Integers per item that are fixed before training, and what a table's rows will see of the training events.

`svd_codes`, `frequency_rows`, `load_codes` and `first_levels` make the codes of tables that have them, and
recscale.data.pieces makes pieces of such codes; `table_facts` describes how items share the rows of one array, for the
record. A training event is an event start:stop of an example of the view.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from recscale.data.event_log import CHUNK_EVENTS, EventLog
from recscale.data.splits import View, runs

LEVELS = 256  # a code is a byte unless a table says otherwise
NOISE = 1e-5  # of the width of a component: spreads items that share a value, unseen ones above all, over several bins
_EMPTY = 1e-6  # a singular value below this share of the largest is rounding: its directions mean nothing


def item_counts(log: EventLog, view: View) -> np.ndarray:
    """int64 [num_items + 1]: how often each item occurs among the events of a view's examples, padding 0."""
    counts = np.zeros(log.num_items + 1, np.int64)
    for part, length in _example_chunks(view.start, view.stop):
        counts += np.bincount(log.events["item_id"][runs(view.start[part], length)], minlength=log.num_items + 1)
    return counts


def svd_codes(log: EventLog, view: View, parts: int, levels: int = LEVELS, seed: int = 0) -> np.ndarray:
    """Codes uint8 [num_items + 1, parts] from who took what in training: the same log, view and seed, the same codes.

    The truncated SVD of the binary user-item matrix gives `parts` components per item; each is scaled to 0..1, noise of
    deviation 1e-5 is added, and its items are cut by rank into `levels` bins that differ by one item at most. Items
    without a training event sit at zero and part by noise alone. Row 0 is padding and zero. Users are those of the
    view. Raises ValueError where parts is beyond min(users, items) - 1 or levels is not 2..256. Source: arXiv
    2312.06165.
    """
    if not 2 <= levels <= LEVELS:
        raise ValueError(f"svd_codes: levels = {levels}: expected 2..{LEVELS}, a code is a byte")
    matrix = interactions(log, view)
    if not 1 <= parts <= min(matrix.shape) - 1:
        users, items = matrix.shape
        raise ValueError(
            f"svd_codes: parts = {parts}: expected 1..{min(users, items) - 1}, one less than the smaller of the "
            f"{users:,} training users and {items:,} items. Ask for fewer parts."
        )
    rng = np.random.default_rng(seed)
    codes = np.zeros((log.num_items + 1, parts), np.uint8)
    for part, component in enumerate(item_components(matrix, parts, rng)):
        spread = np.ptp(component)
        scaled = (component - component.min()) / spread if spread else component
        rank = np.empty(log.num_items, np.int64)
        rank[np.argsort(scaled + rng.normal(0, NOISE, log.num_items), kind="stable")] = np.arange(log.num_items)
        codes[1:, part] = rank * levels // log.num_items
    return codes


def interactions(log: EventLog, view: View) -> scipy.sparse.csr_matrix:
    """The matrix [users of the view, num_items] of ones where a user has a training event of item column + 1."""
    order = np.argsort(view.user, kind="stable")
    users, user = np.unique(view.user[order], return_inverse=True)
    width = log.num_items + 1
    filled, columns = np.zeros(len(users), np.int64), []
    for part, count in _example_chunks(view.start[order], view.stop[order]):
        items = log.events["item_id"][runs(view.start[order[part]], count)]
        pairs = np.unique(np.repeat(user[part], count) * width + items)
        columns.append((pairs % width - 1).astype(np.int32))
        taken = pairs // width
        filled[taken[0] : taken[-1] + 1] += np.bincount(taken - taken[0])
    indices = np.concatenate(columns) if columns else np.zeros(0, np.int32)
    indptr = np.concatenate([[0], np.cumsum(filled)])
    matrix = scipy.sparse.csr_matrix((np.ones(len(indices)), indices, indptr), (len(users), log.num_items))
    matrix.sum_duplicates()  # a user cut by the end of a chunk may have an item twice
    matrix.data[:] = 1
    return matrix


def _example_chunks(start: np.ndarray, stop: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of consecutive examples of about CHUNK_EVENTS events together, and the events of each example."""
    ends, first = np.cumsum(stop - start), 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + CHUNK_EVENTS, side="right")), first + 1)
        yield slice(first, last), stop[first:last] - start[first:last]
        first = last


def item_components(matrix: scipy.sparse.csr_matrix, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Right singular vectors [parts, items], largest singular value first; the largest entry of each is positive.

    Components beyond the rank of the matrix are zero.
    """
    first = rng.normal(size=min(matrix.shape))  # ARPACK would draw a start of its own
    _, values, vectors = scipy.sparse.linalg.svds(matrix, parts, v0=first, return_singular_vectors="vh")
    order = np.argsort(-values, kind="stable")
    values, vectors = values[order], vectors[order]
    peak = vectors[np.arange(parts), np.abs(vectors).argmax(axis=1)]
    return np.where(values > _EMPTY * values[0], np.sign(peak), 0)[:, None] * vectors


def frequency_rows(frequency: np.ndarray, rows: int) -> np.ndarray:
    """Codes int32 [num_items + 1, 1]: slot 1 for the most frequent item, ..., slot `rows` for all without their own.

    frequency: [num_items + 1, 1], shares or counts. Of items equally frequent, the smaller id comes first. Row 0 is
    padding and zero. Raises ValueError where rows is not 1..num_items.
    """
    _check_column(frequency, "frequency_rows")
    num_items = len(frequency) - 1
    if not 1 <= rows <= num_items:
        raise ValueError(f"frequency_rows: rows = {rows}: expected 1..{num_items}, the number of items")
    slots = np.full((num_items + 1, 1), rows, np.int32)
    order = np.argsort(-frequency[1:, 0], kind="stable")
    slots[1 + order[: rows - 1], 0] = np.arange(1, rows)
    slots[0] = 0
    return slots


def first_levels(codes_VQ: np.ndarray, parts: int, levels: int = LEVELS, name: str = "codes") -> np.ndarray:
    """The first `parts` codes of every item as the smallest unsigned integers that hold 0..levels - 1.

    codes_VQ: integers [num_items + 1, Q], row 0 padding; name: whose they are, for errors. Raises ValueError where
    there are fewer than `parts` of them or a code is beyond `levels`.
    """
    if codes_VQ.shape[1] < parts:
        raise ValueError(
            f"{name}: {codes_VQ.shape[1]} codes per item, but table.parts = {parts}: expected at least as many codes"
        )
    kept = codes_VQ[:, :parts]
    _check_range(kept, levels, name)
    return kept.astype(np.min_scalar_type(levels - 1))


def load_codes(path: str | Path, num_items: int, parts: int, levels: int = LEVELS) -> np.ndarray:
    """Codes [num_items + 1, parts] of a .npy file of integers 0..levels - 1, one row per item in id order.

    They come as the smallest unsigned integers that hold them. A file of num_items + 1 rows has padding first, and
    there zeros. Raises ValueError, naming the file, where it is missing, no .npy file, of another shape or type, or
    holds other values.
    """
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no codes here ({error}). Expected a .npy file of [{num_items}, {parts}].") from None
    if found.shape not in ((num_items, parts), (num_items + 1, parts)):
        raise ValueError(
            f"{path}: shape {list(found.shape)}, expected [{num_items}, {parts}], or [{num_items + 1}, {parts}] with "
            "padding first. Make the codes for this log, or set table.parts to their width."
        )
    if found.dtype.kind not in "iu":
        raise ValueError(f"{path}: dtype {found.dtype}, expected integers 0..{levels - 1}. Save them as integers.")
    _check_range(found, levels, path)
    padded = len(found) == num_items + 1
    if padded and found[0].any():
        raise ValueError(
            f"{path}: {num_items + 1} rows for {num_items} items, so row 0 is padding, but it is {found[0].tolist()}; "
            "expected zeros. Save one row per item, item 1 first."
        )
    codes = np.zeros((num_items + 1, parts), np.min_scalar_type(levels - 1))
    codes[0 if padded else 1 :] = found
    return codes


def _check_range(codes_VQ: np.ndarray, levels: int, name: str | Path) -> None:
    if codes_VQ.min() < 0 or codes_VQ.max() >= levels:
        raise ValueError(
            f"{name}: values {codes_VQ.min()}..{codes_VQ.max()}, expected 0..{levels - 1}; n-grams of wider codes need "
            "table.inner = the number of values of a code"
        )


def table_facts(slots_VK: np.ndarray, frequency_V1: np.ndarray, num_rows: int) -> dict[str, Any]:
    """How items 1..V share rows 1..num_rows of one array, in plain numbers for the record.

    slots_VK: integers [V + 1, K], the rows of each item; row 0 is padding and not read. frequency_V1: [V + 1, 1],
    training events of each item (counts). An event reaches every different row of its item once. 0 is no row: an item
    may have fewer than K, and one at least. Keys:

        rows                       num_rows
        rows_touched               rows that some training event reaches
        collisions_whole           share of items with the same K rows, in the same order, as another item
        collisions_any             share of items with a row that another item has too
        row_frequency_histogram    [0] rows reached by no event, [b] by 2^(b-1) to 2^b - 1 events; ends at the last
                                   bin in use; sums to num_rows

    Items without training events count in both collisions. Raises ValueError for slots outside 1..num_rows, other
    shapes and frequencies that are not counts.
    """
    _check_column(frequency_V1, "table_facts")
    slots, count = slots_VK[1:], frequency_V1[1:, 0]
    if slots_VK.ndim != 2 or len(slots_VK) != len(frequency_V1):
        raise ValueError(f"table_facts: slots {list(slots_VK.shape)}, expected [{len(frequency_V1)}, rows of an item]")
    if slots.max(axis=1).min() < 1 or slots.min() < 0 or slots.max() > num_rows:
        raise ValueError(f"table_facts: slots {slots.min()}..{slots.max()} of items, expected 1..{num_rows}")
    if (count < 0).any() or (count != np.floor(count)).any():
        raise ValueError("table_facts: frequencies are shares or negative, expected the number of training events")
    ordered = np.sort(slots, axis=1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    row, events = ordered[new], np.repeat(count, new.sum(axis=1))
    items_of_row = np.bincount(row, minlength=num_rows + 1)
    events_of_row = np.bincount(row, weights=events, minlength=num_rows + 1)[1:]
    shared = (items_of_row[slots] > 1) & (slots > 0)
    return {
        "rows": num_rows,
        "rows_touched": int((events_of_row > 0).sum()),
        "collisions_whole": _repeated(slots[(shared | (slots == 0)).all(axis=1)]) / len(slots),
        "collisions_any": float(shared.any(axis=1).mean()),
        # The binary exponent of n is the bin: 0 of 0, 1 of 1, 2 of 2 and 3, 3 of 4 to 7.
        "row_frequency_histogram": np.bincount(np.frexp(events_of_row)[1]).tolist(),
    }


def _repeated(rows: np.ndarray) -> int:
    """How many of `rows` [n, K] equal another one."""
    ordered = rows[np.lexsort(rows.T)]
    equal = (ordered[1:] == ordered[:-1]).all(axis=1)
    return int((np.append(equal, False) | np.append(False, equal)).sum()) if len(rows) else 0


def _check_column(frequency: np.ndarray, name: str) -> None:
    if frequency.ndim != 2 or frequency.shape[1] != 1 or len(frequency) < 2:
        raise ValueError(f"{name}: frequency of shape {list(frequency.shape)}, expected [items + 1, 1]")
