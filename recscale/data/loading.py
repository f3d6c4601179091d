"""From a log and a view to fixed-shape batches: packed or padded rows, any of which is a random-access element.

The packing plan follows from lengths and seed; an epoch permutes rows; step i takes global rows i * B .. (i + 1) * B of
the endless sequence of epochs. So a batch is a pure function of its index, whatever the hosts, the workers or the
restarts, and Grain only prefetches and remembers an index.
"""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from recscale.data import packing
from recscale.data.event_log import EventLog, EventLogError
from recscale.data.splits import View, check_view, runs

INT32_MAX = np.iinfo(np.int32).max
ENDLESS = 2**40  # steps of a shuffled loader, as far as Grain is concerned
RESERVED = ("item_id", "target", "segment_ids", "positions", "timestamp", "query_timestamp", "example")
ROW_STREAM, WINDOW_STREAM = 0, 1  # what a seed is used for


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """Row order [rows] and first input event of each example [N] in one epoch."""

    rows: np.ndarray
    first: np.ndarray


class Loader:
    """Batches of a view by step: `loader[i]` is this process's rows of global step i, a dict of [B, R] arrays.

    B = batch_size / process_count rows, R = row_length (default: length). Keys, all 0 at padding:

    * item_id int32; target int32 (the next item where it is a target of the view, else 0);
    * segment_ids int32 (1.. per example in a row); positions int32 (0.. in an example);
    * timestamp, query_timestamp int32, where the log has times: seconds since the log's first event, at the input and
      at the next event;
    * one per name of `inputs` (that column at the input event) and of `queries` (at the next event);
    * example int32, with `with_example`: 1 + index into the view.

    An example keeps at most `length` inputs: the last ones, or with window="random" a run drawn anew in every epoch.
    With shuffle=False there is one pass in the order of the plan and its last batch is completed with empty rows; with
    shuffle=True epochs follow each other without end and nothing is dropped: a batch may straddle two.

    Attributes: num_rows, steps_per_epoch (rounded up), real_tokens (inputs per epoch), fill (real tokens / slots),
    num_targets (supervised positions per epoch; with window="random" an upper bound), cut_targets (targets of the view
    out of reach of the last `length` inputs).

    Raises EventLogError: a view of another log, a missing column, a column or a time that does not fit 32 bits, a
    length < 1, a batch that processes cannot share.
    """

    def __init__(
        self,
        log: EventLog,
        view: View,
        *,
        batch_size: int,
        length: int,
        row_length: int | None = None,
        layout: str = "packed",
        window: str = "last",
        seed: int = 0,
        shuffle: bool = True,
        inputs: Sequence[str] = (),
        queries: Sequence[str] = (),
        process_index: int = 0,
        process_count: int = 1,
        with_example: bool = False,
    ):
        row_length = length if row_length is None else row_length
        _check_arguments(batch_size, length, row_length, layout, window, process_index, process_count)
        check_view(log, view)
        if not len(view):
            raise EventLogError(f"view {view.name!r} has no example; dropped: {dict(view.dropped)}.")
        self.batch_size, self.row_length, self.shuffle, self.seed = batch_size, row_length, shuffle, seed
        self.local_rows = batch_size // process_count
        self.first_row = process_index * self.local_rows
        self._window, self._with_example = window, with_example
        self._columns = _columns(log, inputs, queries)
        self._start, self._target_start = view.start, view.target_start
        self._stop = view.stop if view.reading == "next_item" else view.target_start + 1
        available = self._stop - 1 - self._start
        self._count = np.minimum(available, length)
        self._spare = available - self._count
        if layout == "padded":
            self._plan = packing.plan_padded(self._count, row_length)
        elif shuffle:
            self._plan = packing.plan(self._count, row_length, seed=seed)
        else:
            self._plan = packing.plan_in_order(self._count, row_length)
        self.num_rows = self._plan.num_rows
        self.steps_per_epoch = -(-self.num_rows // batch_size)
        self.real_tokens = int(self._count.sum())
        self.fill = self._plan.fill(self._count)
        targets = self._stop - self._target_start
        self.num_targets = int(np.minimum(targets, self._count).sum())
        self.cut_targets = int(targets.sum()) - self.num_targets
        self._epochs: dict[int, _Epoch] = {}

    @property
    def lengths(self) -> np.ndarray:
        """Inputs each example contributes per epoch, int64 [N]."""
        return self._count

    def __len__(self) -> int:
        """Steps: of the one pass without shuffling, practically endless with it."""
        return ENDLESS if self.shuffle else self.steps_per_epoch

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"step {index}: this loader has steps 0..{len(self) - 1}.")
        rows = index * self.batch_size + self.first_row + np.arange(self.local_rows)
        epochs, places = np.divmod(rows, self.num_rows)
        if not self.shuffle:
            places = places[epochs == 0]  # what lies beyond the one pass stays empty
            return self._fill([(self._epoch(0), places)])
        each = range(int(epochs[0]), int(epochs[-1]) + 1)
        return self._fill([(self._epoch(epoch), places[epochs == epoch]) for epoch in each])

    def iterator(self, start: int = 0, prefetch: int = 2) -> grain.DatasetIterator:
        """A Grain iterator over steps start, start + 1, ... that reads `prefetch` batches ahead.

        get_state() is {"next_index": step}; set_state() of it goes on exactly there.
        """
        threads = 1 if prefetch else 0  # more threads are slower: a batch is one memory-bound gather
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        iterator = iter(grain.MapDataset.source(self).to_iter_dataset(options))
        iterator.set_state({"next_index": start})
        return iterator

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs  # read once: the prefetch thread may put another dict in its place
        if epoch not in known:
            fresh = self._draw(epoch)
            known = {e: k for e, k in known.items() if e == epoch - 1} | {epoch: fresh}
            self._epochs = known
        return known[epoch]

    def _draw(self, epoch: int) -> _Epoch:
        rows = np.arange(self.num_rows)
        if self.shuffle:
            rows = np.random.default_rng((self.seed, ROW_STREAM, epoch)).permutation(self.num_rows)
        skip = self._spare
        if self._window == "random":
            uniform = np.random.default_rng((self.seed, WINDOW_STREAM, epoch)).random(len(skip))
            skip = (uniform * (self._spare + 1)).astype(np.int64)
        return _Epoch(rows, self._start + skip)

    def _fill(self, parts: list[tuple[_Epoch, np.ndarray]]) -> dict[str, np.ndarray]:
        """Gathers the examples of the rows at `places` of each epoch; rows that are lacking stay empty."""
        plan = self._plan
        rows = np.concatenate([epoch.rows[places] for epoch, places in parts])
        per_row = plan.row_offsets[rows + 1] - plan.row_offsets[rows]
        segment = plan.segments[runs(plan.row_offsets[rows], per_row)]
        if len(parts) == 1:
            first = parts[0][0].first[segment]
        else:
            part = np.repeat(np.repeat(np.arange(len(parts)), [len(places) for _, places in parts]), per_row)
            first = np.stack([epoch.first[segment] for epoch, _ in parts])[part, np.arange(len(segment))]

        count = self._count[segment]
        before = np.cumsum(count) - count  # tokens of the batch before each segment
        owner = np.repeat(np.arange(len(segment)), count)  # each token's segment
        position = np.arange(len(owner)) - before[owner]
        source = position + first[owner]
        row_tokens = np.zeros(self.local_rows, np.int64)
        row_tokens[: len(rows)] = np.add.reduceat(count, np.cumsum(per_row) - per_row) if len(rows) else 0
        slots = np.flatnonzero(np.arange(self.row_length) < row_tokens[:, None])  # rows fill from the left

        def spread(values: np.ndarray) -> np.ndarray:
            flat = np.zeros(self.local_rows * self.row_length, values.dtype)
            flat[slots] = values
            return flat.reshape(self.local_rows, self.row_length)

        batch = {name: spread(read(source + ahead)) for name, (read, ahead) in self._columns.items()}
        batch["target"] *= spread(source + 1 >= self._target_start[segment][owner])
        batch["positions"] = spread(position.astype(np.int32))
        batch["segment_ids"] = spread((1 + runs(np.zeros_like(per_row), per_row)).astype(np.int32)[owner])
        if self._with_example:
            batch["example"] = spread((segment + 1).astype(np.int32)[owner])
        return batch


class _Column:
    """Reads rows of one event column as at most 32 bits; a 64-bit integer that does not fit is an error, not a wrap."""

    def __init__(self, log: EventLog, name: str, origin: int = 0):
        if name not in log.events:
            raise EventLogError(f"column {name!r} is missing; the log has {sorted(log.events)}.")
        self.name, self.origin = name, origin
        self.values = np.asarray(log.events[name])  # a plain view of the memory map: nothing is read yet

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        values = self.values.take(rows)
        if values.dtype == np.float64:
            return values.astype(np.float32)
        if not self.origin and (values.dtype.itemsize < 4 or values.dtype in (np.int32, np.float32)):
            return values
        values = values.astype(np.int64) - self.origin
        if len(values) and max(values.max(), -values.min()) > INT32_MAX:
            raise EventLogError(f"column {self.name!r}: {values.min()}..{values.max()} does not fit int32.")
        return values.astype(np.int32)


def _columns(log: EventLog, inputs: Sequence[str], queries: Sequence[str]) -> dict[str, tuple[_Column, int]]:
    """Batch key -> (column, how many events ahead of the input it is read)."""
    names = [*inputs, *queries]
    if len(set(names)) < len(names) or set(names) & set(RESERVED):
        raise EventLogError(f"inputs and queries: {names}; names must differ from each other and from {RESERVED}.")
    items = _Column(log, "item_id")
    if items.values.dtype != np.int32:
        raise EventLogError(f"column 'item_id': found {items.values.dtype}, expected int32. Prepare the log again.")
    columns = {"item_id": (items, 0), "target": (items, 1)}
    if "timestamp" in log.events:
        times = _Column(log, "timestamp", _time_origin(log))
        columns |= {"timestamp": (times, 0), "query_timestamp": (times, 1)}
    columns |= {name: (_Column(log, name), 0) for name in inputs}
    return columns | {name: (_Column(log, name), 1) for name in queries}


def _time_origin(log: EventLog) -> int:
    """The log's first time; raises EventLogError where the log spans more than int32 seconds (68 years)."""
    times = log.events["timestamp"]
    if times.dtype.kind not in "iu":
        raise EventLogError(f"column 'timestamp': found {times.dtype}, expected integer seconds.")
    begin, end = np.asarray(log.offsets[:-1]), np.asarray(log.offsets[1:])
    some = end > begin
    first, last = int(times[begin[some]].min()), int(times[end[some] - 1].max())
    if last - first > INT32_MAX:
        raise EventLogError(
            f"column 'timestamp': {first}..{last} spans {last - first}, more than int32 seconds (68 years). "
            "Are these milliseconds? Store seconds."
        )
    return first


def _check_arguments(
    batch_size: int,
    length: int,
    row_length: int,
    layout: str,
    window: str,
    process_index: int,
    process_count: int,
) -> None:
    if length < 1 or row_length < length:
        raise EventLogError(f"length={length}, row_length={row_length}; expected 1 <= length <= row_length.")
    if layout not in ("packed", "padded"):
        raise EventLogError(f"layout={layout!r}, expected 'packed' or 'padded'.")
    if window not in ("last", "random"):
        raise EventLogError(f"window={window!r}, expected 'last' or 'random'.")
    if process_count < 1 or batch_size < 1 or batch_size % process_count:
        raise EventLogError(f"batch_size={batch_size} rows cannot be shared evenly by process_count={process_count}.")
    if not 0 <= process_index < process_count:
        raise EventLogError(f"process_index={process_index}, expected 0..{process_count - 1}.")
