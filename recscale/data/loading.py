"""From a log and a view to fixed-shape batches: packed or padded rows, any of which is a random-access element.

The packing plan follows from lengths and seed; an epoch permutes rows; step i takes global rows i * B .. (i + 1) * B of
the endless sequence of epochs. So a batch is a pure function of its index, whatever the hosts, the workers or the
restarts, and Grain only prefetches and remembers an index.
"""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from recscale.data import packing
from recscale.data.columns import columns
from recscale.data.event_log import EventLog, EventLogError
from recscale.data.features import USER, open_feature
from recscale.data.reach import Reach
from recscale.data.splits import View, check_view, runs
from recscale.data.stochastic_length import kept_lengths, kept_offsets

ENDLESS = 2**40  # steps of a shuffled loader, as far as Grain is concerned
ROW_STREAM, WINDOW_STREAM = 0, 1  # what a seed is used for


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """Row order [rows]; of each example [N] its first input event, its inputs and its first target, in one epoch."""

    number: int
    rows: np.ndarray
    first: np.ndarray
    count: np.ndarray
    target_start: np.ndarray


class Loader:
    """Batches of a view by step: `loader[i]` is this process's rows of global step i, a dict of [B, R] arrays.

    B = batch_size / process_count rows, R = row_length (default: length). Keys, all 0 at padding:

    * item_id int32; target int32 (the next item where it is a target of the view, else 0);
    * segment_ids int32 (1.. per example in a row); positions int32 (0.. in an example);
    * timestamp, query_timestamp int32, where the log has times: seconds since the log's first event, at the input and
      at the next event;
    * NAME int32 for the features `inputs` (data/features.py), at the input event; query_NAME int32 for the features
      `queries` and label_NAME float32 for the columns `labels`, at the next event. An input users/NAME takes a slot of
      its own at the beginning of every example, which holds it and nothing else;
    * example int32, with `with_example`: 1 + index into the view.

    An example whose history is empty (View.empty_history) begins with a blank slot: an input with a target, but whose
    item_id and features are 0.

    reach: where training looks further than the next event, or a vector is older than it (data/reach.py); it may make
    another event the "next" one in all of the above, and add the keys `lagged` and `request`.

    An example keeps at most `length` inputs: the last ones, or with window="random" a run drawn anew in every epoch.
    window="spans" draws one target and how many of the inputs before it are kept (layout "padded"). alpha < 2 thins
    long examples (Stochastic Length, data/stochastic_length.py); each event kept is then followed by the next one kept.
    segments: examples in a row at most, 0 = as many as fit (shuffle=True).
    With shuffle=False there is one pass in the order of the plan and its last batch is completed with empty rows; with
    shuffle=True epochs follow each other without end and nothing is dropped: a batch may straddle two.

    Attributes: num_rows, steps_per_epoch (rounded up), real_tokens (inputs per epoch), fill (real tokens / slots),
    num_targets (supervised positions per epoch; with window="random" an upper bound), cut_targets (targets of the view
    out of reach of the last `length` inputs). With window="spans" lengths and what follows from them are upper bounds.

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
        labels: Sequence[str] = (),
        reach: Reach | None = None,
        alpha: float = 2.0,
        segments: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        with_example: bool = False,
    ):
        self._prefix = [(name, open_feature(log, name).read) for name in inputs if name.startswith(USER)]
        longest = length + len(self._prefix)
        row_length = longest if row_length is None else row_length
        _check_arguments(batch_size, longest, row_length, layout, window, process_index, process_count)
        if alpha < 2.0 and reach is not None and reach.lag is not None:
            raise EventLogError(f"alpha = {alpha} with lag = {reach.lag}: a lag needs all events; expected alpha = 2.")
        if window == "spans" and (alpha < 2.0 or reach is not None or layout != "padded" or not shuffle):
            raise EventLogError(
                f"window='spans' with layout={layout!r}, shuffle={shuffle}, alpha={alpha}, reach={reach}: expected "
                "layout 'padded', shuffled, alpha = 2 and no reach."
            )
        check_view(log, view)
        if not len(view):
            raise EventLogError(f"view {view.name!r} has no example; dropped: {dict(view.dropped)}.")
        self.batch_size, self.row_length, self.shuffle, self.seed = batch_size, row_length, shuffle, seed
        self.local_rows = batch_size // process_count
        self.first_row = process_index * self.local_rows
        self._window, self._with_example = window, with_example
        self._columns = columns(log, inputs, queries, labels)
        self._reach = None if reach is None else reach.open(log)
        empty = view.start == view.target_start
        if empty.any() and (self._prefix or alpha < 2.0 or "timestamp" in self._columns):
            raise EventLogError(
                f"view {view.name!r}: {empty.sum()} examples have an empty history; expected a log without times, no "
                "features of users and alpha = 2."
            )
        self._begin, self._blanks = view.start, bool(empty.any())
        self._start, self._target_start = view.start - empty, view.target_start  # as if an event came before
        self._stop = view.stop if view.reading == "next_item" else view.target_start + 1
        available = self._stop - 1 - self._start
        self._all = np.minimum(available, length)
        self._spare = available - self._all
        self._count = self._all if alpha == 2.0 else kept_lengths(self._all, length, alpha, seed=seed)
        self._user, wide = view.user, self._count + len(self._prefix)
        if layout == "padded":
            self._plan = packing.plan_padded(wide, row_length)
        elif shuffle:
            self._plan = packing.plan(wide, row_length, seed=seed, most=segments)
        else:
            self._plan = packing.plan_in_order(wide, row_length)
        self.num_rows = self._plan.num_rows
        self.steps_per_epoch = -(-self.num_rows // batch_size)
        self.real_tokens = int(self._count.sum())
        self.fill = self._plan.fill(wide)
        targets = self._stop - self._target_start
        self.num_targets = len(view) if window == "spans" else int(np.minimum(targets, self._count).sum())
        self.cut_targets = int(targets.sum()) - self.num_targets
        self._epochs: dict[int, _Epoch] = {}

    @property
    def lengths(self) -> np.ndarray:
        """Inputs each example contributes per epoch, int64 [N]."""
        return self._count

    @property
    def inputs_per_target(self) -> float:
        """Mean over the targets of an epoch of the inputs of its example up to the one that it follows."""
        targets = np.minimum(self._stop - self._target_start, 1 if self._window == "spans" else self._count)
        return float((targets * self._count - targets * (targets - 1) / 2).sum() / targets.sum())

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
        if self._window == "spans":
            rng = np.random.default_rng((self.seed, WINDOW_STREAM, epoch))
            target = rng.integers(self._target_start, self._stop)
            begin = np.where(target > self._target_start, self._begin, self._start)  # a blank slot stands alone
            count = 1 + rng.integers(np.minimum(target - begin, self._all))
            return _Epoch(epoch, rows, target - count, count, target)
        return _Epoch(epoch, rows, self._start + skip, self._count, self._target_start)

    def _fill(self, parts: list[tuple[_Epoch, np.ndarray]]) -> dict[str, np.ndarray]:
        """Gathers the examples of the rows at `places` of each epoch; rows that are lacking stay empty."""
        plan = self._plan
        rows = np.concatenate([epoch.rows[places] for epoch, places in parts])
        per_row = plan.row_offsets[rows + 1] - plan.row_offsets[rows]
        segment = plan.segments[runs(plan.row_offsets[rows], per_row)]
        part = np.repeat(np.repeat(np.arange(len(parts)), [len(places) for _, places in parts]), per_row)
        first, count, target_start = (
            np.stack([getattr(epoch, name)[segment] for epoch, _ in parts])[part, np.arange(len(segment))]
            for name in ("first", "count", "target_start")
        )
        prefix = len(self._prefix)
        wide = count + prefix
        before = np.cumsum(wide) - wide  # slots of the batch before each segment
        owner = np.repeat(np.arange(len(segment)), wide)  # each slot's segment
        position = np.arange(len(owner)) - before[owner]
        event = position >= prefix
        number = np.array([epoch.number for epoch, _ in parts])[part]
        here, there = self._rows(segment, first, count, number)
        row_tokens = np.zeros(self.local_rows, np.int64)
        row_tokens[: len(rows)] = np.add.reduceat(wide, np.cumsum(per_row) - per_row) if len(rows) else 0
        slots = np.flatnonzero(np.arange(self.row_length) < row_tokens[:, None])  # rows fill from the left

        def spread(values: np.ndarray) -> np.ndarray:
            flat = np.zeros(self.local_rows * self.row_length, values.dtype)
            flat[slots] = values
            return flat.reshape(self.local_rows, self.row_length)

        def spread_events(values: np.ndarray) -> np.ndarray:
            if not prefix:
                return spread(values)
            wider = np.zeros(len(owner), values.dtype)
            wider[event] = values
            return spread(wider)

        more, of = {}, owner[event]
        if self._reach is not None:
            stream = (self.seed, number[of])
            there, more = self._reach(here, there, first[of], self._stop[segment][of], stream)
        batch = self._read(here, there, segment[of], spread_events)
        batch["target"] *= spread_events((there >= target_start[of]) & (there > here))
        batch["positions"] = spread(position.astype(np.int32))
        batch["segment_ids"] = spread((1 + runs(np.zeros_like(per_row), per_row)).astype(np.int32)[owner])
        if prefix:  # the time of a prefix is that of the user's first event
            rows_of = np.repeat(first, wide)
            for name in {"timestamp", "query_timestamp"} & set(self._columns):
                batch[name] = np.where(spread(event), batch[name], spread(self._columns[name][0](rows_of)))
        for place, (name, read) in enumerate(self._prefix):
            batch[name] = spread(np.where(position == place, read(self._user[segment])[owner], 0).astype(np.int32))
        if "lagged" in more:  # from a row of the log to 1 + its slot in the batch's row
            back, slot = here - more["lagged"], (slots % self.row_length)[event]
            known = back <= position[event] - prefix
            batch["lagged"] = spread_events(np.where(known, slot - back + 1, 0).astype(np.int32))
            batch["request"] = spread_events(more["request"].astype(np.int32))
        if self._with_example:
            batch["example"] = spread((segment + 1).astype(np.int32)[owner])
        return batch

    def _read(self, here, there, example, spread: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        """The columns at the rows of every input and of the event after it; of a blank slot only the latter."""
        batch = {name: spread(read(there if ahead else here)) for name, (read, ahead) in self._columns.items()}
        if self._blanks:
            known = spread(here >= self._begin[example])
            batch |= {name: batch[name] * known for name, (_, ahead) in self._columns.items() if not ahead}
        return batch

    def _rows(self, segment, first, count, number) -> tuple[np.ndarray, np.ndarray]:
        """The log's row of every input of these examples, and of the event that follows it."""
        owner = np.repeat(np.arange(len(segment)), count)
        place = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
        last = np.append(owner[1:] != owner[:-1], True)[: len(owner)]
        if self._count is not self._all:
            place = kept_offsets(self._all[segment], count, seed=self.seed, epoch=number, example=segment)
        here = first[owner] + place
        after = first + (count if self._count is self._all else self._all[segment])
        return here, np.where(last, after[owner], np.append(here[1:], 0)[: len(owner)])


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
        raise EventLogError(
            f"length={length} (with a slot for each feature of users), row_length={row_length}; "
            "expected 1 <= length <= row_length."
        )
    if layout not in ("packed", "padded"):
        raise EventLogError(f"layout={layout!r}, expected 'packed' or 'padded'.")
    if window not in ("last", "random", "spans"):
        raise EventLogError(f"window={window!r}, expected 'last', 'random' or 'spans'.")
    if process_count < 1 or batch_size < 1 or batch_size % process_count:
        raise EventLogError(f"batch_size={batch_size} rows cannot be shared evenly by process_count={process_count}.")
    if not 0 <= process_index < process_count:
        raise EventLogError(f"process_index={process_index}, expected 0..{process_count - 1}.")


def targets_of(log: EventLog, view: View, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Where the targets of a batch are and which events they are: batch row, slot, example of the view, row of the log.

    The batch is of a loader over this log and view with with_example=True and window="last"; raises ValueError where
    its targets are other items than the log's.
    """
    batch_row, place = np.nonzero(batch["target"])
    example_BR = batch["example"]
    last_BR = np.concatenate([example_BR[:, 1:] != example_BR[:, :-1], np.ones((len(example_BR), 1), bool)], axis=1)
    ends_BR = np.where(last_BR, np.arange(example_BR.shape[1]), example_BR.shape[1])
    ends_BR = np.minimum.accumulate(ends_BR[:, ::-1], axis=1)[:, ::-1]
    example = example_BR[batch_row, place].astype(np.int64) - 1
    stop = view.target_start[example] + 1 if view.reading == "window" else view.stop[example]
    row = stop - 1 - (ends_BR[batch_row, place] - place)
    wrong = int((log.events["item_id"][row] != batch["target"][batch_row, place]).sum())
    if wrong:
        raise ValueError(
            f"view {view.name!r}: {wrong} of {len(row)} targets are not the log's item at that event; "
            'make the loader from the same log and view, with window="last".'
        )
    return batch_row, place, example, row
