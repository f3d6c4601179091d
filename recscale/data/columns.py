"""What a batch reads of the log: its keys, and for each a reader of rows and whether it looks at the next event."""

from collections.abc import Callable, Sequence

import numpy as np

from recscale.data.event_log import EventLog, EventLogError
from recscale.data.features import USER, open_feature

INT32_MAX = np.iinfo(np.int32).max
QUERY, LABEL = "query_", "label_"  # what the keys of a feature of the next event, and of a raw value of it, begin with
Reader = Callable[[np.ndarray], np.ndarray]


class Column:
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


def columns(
    log: EventLog, inputs: Sequence[str] = (), queries: Sequence[str] = (), labels: Sequence[str] = ()
) -> dict[str, tuple[Reader, int]]:
    """Batch key -> (reader, how many events ahead of the input it is read).

    item_id, target; timestamp and query_timestamp where the log has times; NAME for the features `inputs` (but for
    those of users, which are of no event), query_NAME for the features `queries`, label_NAME for the columns `labels`,
    which are read as they are, in float32.
    """
    for group in (inputs, queries, labels):
        if len(set(group)) < len(group):
            raise EventLogError(f"features: {tuple(group)}; a name may occur once.")
    items = Column(log, "item_id")
    if items.values.dtype != np.int32:
        raise EventLogError(f"column 'item_id': found {items.values.dtype}, expected int32. Prepare the log again.")
    found: dict[str, tuple[Reader, int]] = {"item_id": (items, 0), "target": (items, 1)}
    if "timestamp" in log.events:
        times = Column(log, "timestamp", time_origin(log))
        found |= {"timestamp": (times, 0), "query_timestamp": (times, 1)}
    found |= {name: (open_feature(log, name).read, 0) for name in inputs if not name.startswith(USER)}
    found |= {QUERY + name: (open_feature(log, name).read, 1) for name in queries}
    return found | {LABEL + name: (_as_float(Column(log, name)), 1) for name in labels}


def _as_float(column: Column) -> Reader:
    return lambda rows: column(rows).astype(np.float32)


def time_origin(log: EventLog) -> int:
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
