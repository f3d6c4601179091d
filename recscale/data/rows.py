"""From flat rows of a source to an event log: dense ids, order inside a user, and tables lined up with the ids."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recscale.data.event_log import Column, EventLog, EventLogError

Columns = Mapping[str, tuple[Column, np.ndarray]]


def build(
    user: np.ndarray,
    item: np.ndarray,
    timestamp: np.ndarray | None,
    columns: Columns,
    *,
    order: np.ndarray | None,
    name: str,
) -> EventLog:
    """An event log from rows [E]: items 1..V in increasing raw id, raw ids kept in items/raw_id and users/raw_id.

    user, item: raw ids (integers or text). timestamp: int64 seconds, or None where only the order is known. columns:
    further event columns. order: None keeps the source's order, and users must then be contiguous; else times [E], and
    rows are sorted by (user, order), ties in source order. name: of the source file, for errors.
    Raises EventLogError: empty source, rows of one user apart.
    """
    if len(user) == 0:
        raise EventLogError(f"{name}: empty log: the file has no rows.")
    raw_items, item_index = np.unique(item, return_inverse=True)
    if order is None:
        starts = np.concatenate([[0], 1 + np.flatnonzero(user[1:] != user[:-1])])
        raw_users, rows = user[starts], slice(None)
        values, counts = np.unique(raw_users, return_counts=True)
        if counts.max() > 1:
            raise EventLogError(
                f"{name}: users are not sorted: user {values[counts > 1][0]} comes back after another user's rows. "
                "Sort the rows by user, keeping each user's own order."
            )
    else:
        raw_users, user_index = np.unique(user, return_inverse=True)
        rows = np.lexsort((order, user_index))
        starts = np.concatenate([[0], np.cumsum(np.bincount(user_index))[:-1]])
    events = {"item_id": (item_index[rows] + 1).astype(np.int32)}
    kinds = {"item_id": Column("id")}
    if timestamp is not None:
        events["timestamp"], kinds["timestamp"] = timestamp[rows], Column("time")
    for column, (kind, values) in columns.items():
        events[column], kinds[column] = values[rows], kind
    offsets = np.append(starts, len(user)).astype(np.int64)
    facts = {
        "users": len(raw_users),
        "items": len(raw_items),
        "events": len(user),
        "order": "as in the source" if order is None else "by user, then time; ties in source order",
        "times": "seconds since 1970" if timestamp is not None else "none: only the order is known",
        **_repeats(offsets, events["item_id"], len(raw_items)),
    }
    if timestamp is not None:
        facts |= ties(offsets, events["timestamp"])
    return EventLog(
        offsets=offsets,
        events=events,
        columns=kinds,
        num_items=len(raw_items),
        items={"raw_id": np.concatenate([np.zeros(1, raw_items.dtype), raw_items])},
        users={"raw_id": raw_users},
        facts=facts,
    )


def ties(offsets: np.ndarray, timestamp: np.ndarray) -> dict[str, float]:
    """Share of events with the time of the user's previous event; share of users whose last two events tie."""
    tied = np.zeros(len(timestamp), bool)
    tied[1:] = np.diff(timestamp) == 0
    tied[offsets[:-1][np.diff(offsets) > 0]] = False
    stops = offsets[1:][np.diff(offsets) > 0]
    return {"tied_events": round(float(tied.mean()), 6), "users_last_two_tied": round(float(tied[stops - 1].mean()), 6)}


def _repeats(offsets: np.ndarray, item_id: np.ndarray, num_items: int) -> dict[str, int]:
    user = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    keys = np.sort(user * (num_items + 1) + item_id)
    return {"repeated_events": int((np.diff(keys) == 0).sum())}


def lookup(raw: np.ndarray, keys: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Row of each raw id [n] in a side table with those keys [m]: (row, found). Raises where a key occurs twice."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    if np.any(ordered[1:] == ordered[:-1]):
        raise EventLogError(
            f"{name}: id {ordered[:-1][ordered[1:] == ordered[:-1]][0]} occurs twice; ids must be unique."
        )
    at = np.minimum(np.searchsorted(ordered, raw), len(keys) - 1)
    return order[at], ordered[at] == raw


def align(raw: np.ndarray, keys: np.ndarray, values: np.ndarray, name: str, *, padding: bool) -> np.ndarray:
    """Side-table values [m, ...] lined up with raw ids [n]: [n (+ 1 with padding), ...]; 0 where the table has none."""
    row, found = lookup(raw, keys, name)
    out = values[row]
    out[~found] = np.zeros((), values.dtype)
    return np.concatenate([np.zeros((1, *values.shape[1:]), values.dtype), out]) if padding else out


def align_text(raw: np.ndarray, keys: np.ndarray, table: pa.Table, name: str) -> pa.Table:
    """Side-table text lined up with raw item ids [V]; null where the table has none."""
    row, found = lookup(raw, keys, name)
    return table.take(pa.array(row, mask=~found))


def codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Text or numbers as int32 codes [rows]: 1.. in sorted order, 0 where null or NaN; and the names of codes 1.. ."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    names = pc.unique(column.drop_null()).sort() if len(column) else pa.array([])
    index = pc.index_in(column, value_set=names)
    return (index.fill_null(-1).to_numpy() + 1).astype(np.int32), [str(name) for name in names.to_pylist()]


def multi_hot(lists: pa.ChunkedArray, ignore: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Lists of names as int8 [rows, names], names sorted; names in `ignore` are left out."""
    flat = pc.list_flatten(lists)
    row = pc.list_parent_indices(lists).to_numpy()
    keep = pc.invert(pc.is_in(flat, value_set=pa.array(list(ignore), flat.type)))
    code, names = codes(flat.filter(keep))
    out = np.zeros((len(lists), len(names)), np.int8)
    out[row[keep.to_numpy(zero_copy_only=False)], code - 1] = 1
    return out, names


def half_stars(rating: pa.ChunkedArray, name: str) -> tuple[Column, np.ndarray]:
    """Ratings in stars (0.5 .. 5) as int8 codes in half stars; raises EventLogError on anything else."""
    doubled = 2 * rating.cast(pa.float64()).to_numpy()
    bad = ~np.isin(doubled, np.arange(1, 11))
    if bad.any():
        at = int(np.argmax(bad))
        raise EventLogError(
            f"{name}: column rating has {int(bad.sum()):,} bad values, first in row {at + 1}: {doubled[at] / 2}, "
            "expected half stars from 0.5 to 5."
        )
    return Column("feedback", 11), doubled.astype(np.int8)


def with_tables(
    log: EventLog,
    *,
    items: Mapping[str, np.ndarray] | None = None,
    users: Mapping[str, np.ndarray] | None = None,
    text: pa.Table | None = None,
    facts: Mapping[str, Any] | None = None,
) -> EventLog:
    """The log with further item and user columns, item text and facts."""
    return dataclasses.replace(
        log,
        items={**log.items, **(items or {})},
        users={**log.users, **(users or {})},
        text=log.text if text is None else text,
        facts={**log.facts, **(facts or {})},
    )
