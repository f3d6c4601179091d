"""Which events are history and which are targets: leave-one-out, global time, next window."""

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class View:
    """One side of a split: N examples, each a run of one user's events.

    All arrays have shape [N]. user: int32 index of the user. start, stop: int64 rows of the log's event columns; the
    example may see no event outside start:stop. target_start: int64, start < target_start < stop; the targets are events
    target_start:stop, and an event before it is history only. Two ways to read the targets: `next_item` (each target is
    predicted from everything before it) and `window` (all are predicted at once from start:target_start).
    dropped: reason -> number of users or events left out.
    """

    name: str
    user: np.ndarray
    start: np.ndarray
    target_start: np.ndarray
    stop: np.ndarray
    reading: str = "next_item"
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user)
