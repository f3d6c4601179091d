"""Features of an event as small integer ids, read by name: what a model embeds beside the item.

A name is one of:

* a context column of the log (tab, surface, device): its own ids, 0 = unknown;
* a feedback column (like, played ratio, rating): 1 + the value of an integer-coded one, else 1 + the bucket of its
  value between EDGES;
* `items/NAME`: an item column, at the event's item. Integers become codes 1.. of their distinct values, floats become
  deciles over the items;
* `users/NAME`, a user column, coded like an item's: not of an event, but a slot of its own before the user's first one
  (the contextual prefix of the production HSTU). `users/hashN` is the user's number hashed to 1..N, TIGER's user token;
* `hour` (1..24) and `weekday` (1..7) of the log's clock;
* `item_id`, the item itself.

Only what is known before the item is chosen may describe a query: `known_before` says which those are.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.hashing import uniform

ITEM, USER = "items/", "users/"
HASHED = USER + "hash"
# Fine below 1, where ratios are; halves up to 5, where ratings are. Fixed, so that no bucket depends on later events.
EDGES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.05, 1.25, *np.arange(1.75, 5.0, 0.5)], np.float32)
DECILES = 10
CLOCK = {"hour": (3_600, 24), "weekday": (86_400, 7)}  # name -> (seconds of a step, steps of a round)


class Feature(NamedTuple):
    """Ids 0..cardinality - 1 of a feature, 0 = unknown; `read` takes rows of the log, int64 [n], and gives int32.

    That of a user takes users.
    """

    cardinality: int
    read: Callable[[np.ndarray], np.ndarray]


def open_feature(log: EventLog, name: str) -> Feature:
    """The feature of this name; raises EventLogError where the log has none, or the column is not one."""
    if name in CLOCK:
        return _clock(log, name)
    if name == "item_id":
        ids = np.asarray(log.events["item_id"])
        return Feature(log.num_items + 1, lambda rows: ids.take(rows).astype(np.int32))
    if name.startswith(ITEM):
        items, values = np.asarray(log.events["item_id"]), _described(log, log.items, name)
        codes, size = _codes(values[1:])
        codes = np.concatenate([np.zeros(1, np.int32), codes])
        return Feature(size, lambda rows: codes.take(items.take(rows)))
    if name.startswith(HASHED) and name.removeprefix(HASHED).isdecimal() and int(name.removeprefix(HASHED)):
        buckets = int(name.removeprefix(HASHED))
        return Feature(buckets + 1, lambda users: 1 + np.floor(uniform(0, users) * buckets).astype(np.int32))
    if name.startswith(USER):
        codes, size = _codes(_described(log, log.users, name))
        return Feature(size, codes.take)
    if name not in log.columns or not _is_feature(log.columns[name]):
        raise EventLogError(f"feature {name!r}: {log.path} has {available(log)}.")
    column = log.columns[name]
    values = np.asarray(log.events[name])  # a plain view of the memory map
    if column.kind == "context":
        assert column.cardinality is not None
        return Feature(column.cardinality, lambda rows: values.take(rows).astype(np.int32))
    if column.cardinality:
        return Feature(column.cardinality + 1, lambda rows: values.take(rows).astype(np.int32) + 1)

    def bucket(rows: np.ndarray) -> np.ndarray:
        found = values.take(rows).astype(np.float32)
        return np.where(np.isnan(found), 0, 1 + np.searchsorted(EDGES, found, side="right")).astype(np.int32)

    return Feature(len(EDGES) + 2, bucket)


def available(log: EventLog) -> list[str]:
    """Names of all features of a log."""
    events = [name for name, column in log.columns.items() if _is_feature(column)]
    tables = ((ITEM, log.items), (USER, log.users))
    described = [kind + name for kind, table in tables for name, values in table.items() if values.ndim == 1]
    return events + described + (list(CLOCK) if "timestamp" in log.events else [])


def known_before(log: EventLog, name: str) -> bool:
    """Whether the feature of an event is known before its item is chosen: contexts and the clock are."""
    return name in CLOCK or (name in log.columns and log.columns[name].kind == "context")


def _is_feature(column: Column) -> bool:
    return column.kind == "feedback" or (column.kind == "context" and column.cardinality is not None)


def _clock(log: EventLog, name: str) -> Feature:
    if "timestamp" not in log.events:
        raise EventLogError(f"feature {name!r}: {log.path} has no timestamps.")
    times, (seconds, steps) = np.asarray(log.events["timestamp"]), CLOCK[name]
    return Feature(steps + 1, lambda rows: (times.take(rows) // seconds % steps + 1).astype(np.int32))


def _described(log: EventLog, table: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    column = name.partition("/")[2]
    if column not in table or table[column].ndim != 1:
        raise EventLogError(f"feature {name!r}: {log.path} has {available(log)}.")
    return np.asarray(table[column])


def _codes(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Codes int32 from 1 (0 = NaN), by distinct integer or by decile, and how many ids there are with 0."""
    if values.dtype.kind == "f":
        edges = np.unique(np.nanquantile(values, np.arange(1, DECILES) / DECILES))
        codes = np.where(np.isnan(values), 0, 1 + np.searchsorted(edges, values, side="right"))
        return codes.astype(np.int32), len(edges) + 2
    found, codes = np.unique(values, return_inverse=True)
    return (codes + 1).astype(np.int32), len(found) + 1
