"""Histories as callers give them, checked, and the fixed-shape batches that are made of them.

A batch is what data/loading.py makes of a log, so a model sees what it saw in training: `NAME` is a feature at the
event, `query_NAME` and `query_timestamp` are of the event after it, which for the last event is the request. Shapes are
padded to powers of two (`padded`), so that few of them are ever compiled.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recscale.data.columns import QUERY
from recscale.data.features import CLOCK, ITEM

INT32_MAX = np.iinfo(np.int32).max
Events = dict[str, np.ndarray]
Columns = Mapping[str, Any]


class BadRequest(ValueError):
    """What was asked cannot be answered: one line that says which argument, what was found, what was expected."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Checks what callers give for one trained run.

    inputs, queries: features of an event, and of the event that follows it, as the task reads them. cardinalities: of
    all of them. item_codes: feature `items/NAME` -> its id for every item. times: whether the model reads the times of
    events; request_time: whether it reads that of the request.
    """

    num_items: int
    inputs: tuple[str, ...]
    queries: tuple[str, ...]
    cardinalities: Mapping[str, int]
    item_codes: Mapping[str, np.ndarray]
    times: bool
    request_time: bool

    @property
    def given(self) -> tuple[str, ...]:
        """Features that the caller has to give for every event."""
        names = dict.fromkeys((*self.inputs, *self.queries))
        return tuple(n for n in names if n not in CLOCK and not n.startswith(ITEM) and n != "item_id")

    @property
    def needs_times(self) -> bool:
        """Whether a history without timestamps can be read."""
        return self.times or any(name in CLOCK for name in (*self.inputs, *self.queries))

    def items(self, what: str, values: Any) -> np.ndarray:
        """Item ids int64 [n]; raises BadRequest for anything else."""
        ids = np.asarray(values)
        if ids.size and ids.dtype.kind not in "iu":
            raise BadRequest(f"{what}: found {ids.dtype}, expected integer item ids (convert them; a float loses ids)")
        if ids.ndim != 1:
            raise BadRequest(f"{what}: found shape {ids.shape}, expected a list of item ids")
        wrong = ids[(ids < 1) | (ids > self.num_items)]
        if len(wrong):
            raise BadRequest(
                f"{what}: item {int(wrong[0])} ({len(wrong)} of {len(ids)}) is not in the catalogue: expected ids "
                f"1..{self.num_items}"
            )
        return ids.astype(np.int64)

    def events(self, what: str, items: Any, timestamps: Any, columns: Columns, before: Events | None = None) -> Events:
        """The events of one user, in their order; before: those that came before, after which there may be none."""
        ids = self.items(what, items)
        if not len(ids) and before is not None:
            return {name: values[:0] for name, values in before.items()}
        if not len(ids):
            raise BadRequest(f"{what}: empty, expected at least one event")
        after = before["timestamp"][-1] if before is not None and "timestamp" in before else None
        found = {"item_id": ids}
        if timestamps is not None:
            found["timestamp"] = self._times(f"timestamps of {what}", timestamps, len(ids), after)
        elif self.needs_times:
            raise BadRequest(
                f"timestamps of {what}: missing; this model reads them: give integer seconds, one an event"
            )
        for name in self.given:
            if name not in columns:
                raise BadRequest(f"columns: {name!r} is missing; this model reads {self.given} of every event")
            found[name] = self._feature(f"column {name!r} of {what}", name, columns[name], len(ids))
        return found

    def request(self, what: str, at: int | None, columns: Columns, last: Events) -> dict[str, Any]:
        """What is known of the event to come: its time (that of the last event where none is given), its features."""
        found: dict[str, Any] = {"timestamp": last["timestamp"][-1] if "timestamp" in last else 0}
        if at is not None:
            if not isinstance(at, int | np.integer):
                raise BadRequest(f"at: found {type(at).__name__}, expected the request's time in integer seconds")
            if "timestamp" in last and at < last["timestamp"][-1]:
                raise BadRequest(f"at = {at}: expected no less than the last event of {what}, {last['timestamp'][-1]}")
            found["timestamp"] = int(at)
        elif self.request_time or any(name in CLOCK for name in self.queries):
            raise BadRequest("at: missing; this model reads the time of the request: give it in integer seconds")
        for name in self.queries:
            if name in self.given:
                if name not in columns:
                    raise BadRequest(f"request: {name!r} is missing; this model reads it of the event to come")
                found[name] = self._feature(f"request {name!r}", name, [columns[name]], 1)[0]
        return found

    def _times(self, what: str, values: Any, count: int, after: Any) -> np.ndarray:
        times = np.asarray(values)
        if times.dtype.kind not in "iu":
            raise BadRequest(f"{what}: found {times.dtype}, expected integer seconds")
        if times.shape != (count,):
            raise BadRequest(f"{what}: found shape {times.shape}, expected one for each of {count} events")
        times = times.astype(np.int64)
        if np.any(np.diff(times) < 0) or (after is not None and times[0] < after):
            raise BadRequest(f"{what}: not ascending; expected the order of time, oldest first")
        if times[-1] - times[0] > INT32_MAX:
            raise BadRequest(f"{what}: they span {times[-1] - times[0]}, more than 68 years: are these milliseconds?")
        return times

    def _feature(self, what: str, name: str, values: Any, count: int) -> np.ndarray:
        ids, size = np.asarray(values), self.cardinalities[name]
        if ids.dtype.kind not in "iu" or ids.shape != (count,):
            raise BadRequest(f"{what}: found {ids.dtype} of shape {ids.shape}, expected integers of shape ({count},)")
        if np.any((ids < 0) | (ids >= size)):
            raise BadRequest(
                f"{what}: found {int(ids.min())}..{int(ids.max())}, expected ids 0..{size - 1} (0 = unknown)"
            )
        return ids.astype(np.int64)

    def feature(self, name: str, events: Mapping[str, Any]) -> Any:
        """A feature of events (or of one event), from what was given."""
        if name in CLOCK:
            seconds, steps = CLOCK[name]
            return np.asarray(events["timestamp"]) // seconds % steps + 1
        if name.startswith(ITEM):
            return self.item_codes[name][events["item_id"]]
        return events[name]

    def history(
        self, users: Sequence[Events], start: np.ndarray, stop: np.ndarray, first: np.ndarray, size: int
    ) -> Events:
        """Events start..stop - 1 of every user, whose successors are known too: a batch [B, size], left-aligned.

        first: the event of each user that stands at position 0.
        """
        batch = self.empty(padded(len(users), 1), size)
        for b, events in enumerate(users):
            part, then = slice(start[b], stop[b]), slice(start[b] + 1, stop[b] + 1)
            here = {name: values[part] for name, values in events.items()}
            self._fill(batch, b, here, {name: values[then] for name, values in events.items()}, start[b] - first[b])
        return self._finish(batch, users, first)

    def asked(
        self,
        users: Sequence[Events],
        first: np.ndarray,
        requests: Sequence[dict],
        candidates: Sequence[np.ndarray],
        size: int,
    ) -> Events:
        """The last event of every user, once for each of its candidates as the event to come: a batch [B, size]."""
        batch = self.empty(padded(len(users), 1), size)
        for b, events in enumerate(users):
            count, last = len(candidates[b]), len(events["item_id"]) - 1
            here = {name: np.repeat(values[-1:], count) for name, values in events.items()}
            there = {name: np.repeat(value, count) for name, value in requests[b].items()} | {"item_id": candidates[b]}
            self._fill(batch, b, here, there, last - first[b])
            batch["positions"][b, :count] = last - first[b]
        return self._finish(batch, users, first)

    def empty(self, rows: int, size: int) -> Events:
        """A batch of padding."""
        names = ["item_id", "target", "segment_ids", "positions", "timestamp", "query_timestamp", "lagged"]
        names += [*self.inputs, *(QUERY + name for name in (*self.queries, "item_id"))]
        return {name: np.zeros((rows, size), np.int64) for name in names}

    def _fill(self, batch: Events, b: int, here: Events, there: Events, position: int) -> None:
        count = len(here["item_id"])
        batch["item_id"][b, :count], batch[QUERY + "item_id"][b, :count] = here["item_id"], there["item_id"]
        batch["segment_ids"][b, :count], batch["positions"][b, :count] = 1, position + np.arange(count)
        batch["lagged"][b, :count] = 1 + np.arange(count)  # the newest event that a user vector is made of
        if "timestamp" in here:
            batch["timestamp"][b, :count], batch["query_timestamp"][b, :count] = here["timestamp"], there["timestamp"]
        for name in self.inputs:
            batch[name][b, :count] = self.feature(name, here)
        for name in self.queries:
            batch[QUERY + name][b, :count] = self.feature(name, there)

    def _finish(self, batch: Events, users: Sequence[Events], first: np.ndarray) -> Events:
        """int32, times counted from each user's first event in reach (models read differences alone)."""
        for b, events in enumerate(users):
            if "timestamp" in events:
                real = batch["segment_ids"][b] > 0
                for name in ("timestamp", "query_timestamp"):
                    batch[name][b] = np.where(real, batch[name][b] - events["timestamp"][first[b]], 0)
        return {name: np.minimum(values, INT32_MAX).astype(np.int32) for name, values in batch.items()}


def padded(count: int, least: int) -> int:
    """The power of two that holds `count`, at least `least`."""
    return max(least, 1 << max(int(count) - 1, 0).bit_length())


def users_of(what: str, values: Any) -> tuple[list[Any], bool]:
    """The users' lists, and whether it was only one: a list of numbers is one user, a list of lists several."""
    nested = (
        [np.ndim(value) > 0 for value in values]
        if not isinstance(values, np.ndarray)
        else [values.ndim > 1] * len(values)
    )
    if any(nested) and not all(nested):
        raise BadRequest(f"{what}: numbers and lists mixed; expected a list of item ids, or one such list per user")
    return (list(values), False) if any(nested) else ([values], True)
