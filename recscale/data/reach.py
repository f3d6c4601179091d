"""Which event a position is trained on, where that is not the next one, and how late a user's vector may be.

`draw_ahead` picks a positive among the events of the next days (the dense all-action loss of PinnerFormer, arXiv
2205.04507); `last_until` finds the newest event that a vector computed with a lag may have seen (ARGUS, arXiv
2507.15994). Both work on rows of the log, without a loop over events.
"""

import dataclasses

import numpy as np

from recscale.data.event_log import EventLog, EventLogError
from recscale.data.hashing import uniform
from recscale.data.requests import request_ids


@dataclasses.dataclass(frozen=True)
class Reach:
    """What a loader looks at beside the next event.

    horizon: seconds; instead of the next event each input is trained on one drawn, anew in every epoch, from its user's
    events of that time (0: the next event). positive: only from those where this column is above 0 ("": from all).
    lag: seconds; adds `request`, the same for the next events of one request, and `lagged`, 1 + the slot of the newest
    input before the next event's request and at least that much older (0: there is none); None: no such keys.
    request_gap: seconds without an event that end a request.
    """

    horizon: int = 0
    positive: str = ""
    lag: int | None = None
    request_gap: int = 0

    def __post_init__(self):
        if self.horizon < 0 or (self.lag is not None and (self.lag < 0 or self.request_gap < 1)):
            raise EventLogError(f"{self}: expected at least 0, and with a lag request_gap >= 1.")
        if self.positive and not self.horizon:
            raise EventLogError(f"{self}: positive = {self.positive!r} says what is drawn within a horizon: give one.")

    def open(self, log: EventLog) -> "Reached":
        """Over this log; raises EventLogError where it has no times or no such feedback."""
        return Reached(self, log)


class Reached:
    """A Reach over a log: call it with rows of inputs."""

    def __init__(self, reach: Reach, log: EventLog):
        if "timestamp" not in log.events:
            raise EventLogError(f"{reach}: {log.path} has no timestamps.")
        self.reach, self.times, self.positive, self.request = reach, np.asarray(log.events["timestamp"]), None, None
        if reach.positive:
            known = [name for name, column in log.columns.items() if column.kind in ("feedback", "extra")]
            if reach.positive not in known:
                raise EventLogError(f"{reach}: positive = {reach.positive!r} is not a feedback column; it has {known}.")
            flags = np.asarray(log.events[reach.positive]) > 0
            self.positive = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
        if reach.lag is not None:
            self.request = request_start(log, reach.request_gap)

    def __call__(
        self,
        here: np.ndarray,
        there: np.ndarray,
        first: np.ndarray,
        stop: np.ndarray,
        stream: tuple[int, np.ndarray],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(the row each input is trained on, its own row where there is none, further rows by name); int64 [n] each.

        here, there: rows of the inputs and of what follows them; first, stop: of the example; stream: (seed, epoch of
        each input).
        """
        more = {}
        if self.reach.horizon:
            drawn = draw_ahead(self.times, self.positive, here, stop, self.reach.horizon, stream)
            there = np.where(drawn < 0, here, drawn)
        if self.request is not None:
            assert self.reach.lag is not None
            opened = self.request.take(there)
            before = np.minimum(here, opened - 1)  # a lag of 0 is no leave to read the request itself
            more["lagged"] = last_until(self.times, first, before, self.times.take(opened) - self.reach.lag)
            more["request"] = 1 + opened % (1 << 30)
        return there, more


def request_start(log: EventLog, gap: int) -> np.ndarray:
    """int64 [E]: the row of the first event of each event's request, which others may interrupt."""
    _, first, request = np.unique(request_ids(log, gap), return_index=True, return_inverse=True)
    return first[request].astype(np.int64)


def last_until(times: np.ndarray, first: np.ndarray, last: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """The largest row r in first..last with times[r] <= limit, first - 1 where there is none; int64 [n] each.

    times: of the whole log, in order within first..last.
    """
    low, high = first - 1, last.copy()  # the answer is in low..high
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = (low < high) & (times.take(np.maximum(middle, 0)) <= limit)
        high = np.where(fits | (low >= high), high, middle - 1)
        low = np.where(fits, middle, low)
    return low


def draw_ahead(
    times: np.ndarray,
    positive: np.ndarray | None,
    here: np.ndarray,
    stop: np.ndarray,
    horizon: int,
    stream: tuple[int, np.ndarray],
) -> np.ndarray:
    """A row drawn evenly among the events of here + 1 .. stop - 1 at most `horizon` seconds later; -1 without one.

    positive: int64 [E + 1], positives among the events before each row (None: all are). stream: (seed, epoch of
    each input); the same numbers give the same rows, whatever else is in a batch.
    """
    last = last_until(times, here + 1, stop - 1, times.take(here) + horizon)
    before, until = here + 1, last + 1
    if positive is not None:
        before, until = positive[before], positive[until]
    count = until - before
    drawn = before + np.minimum((uniform(stream[0], stream[1], here) * count).astype(np.int64), count - 1)
    if positive is not None:
        drawn = np.searchsorted(positive, drawn, side="right") - 1  # the row of positive number `drawn`
    return np.where(count > 0, drawn, -1)
