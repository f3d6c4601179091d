"""The one form every dataset takes: users' events in time order, as flat memory-mapped columns plus offsets.

On disk an event log is a folder:

    meta.json              schema version, column kinds and cardinalities, counts, facts (licence, source, sha256)
    offsets.npy            int64 [U + 1]; the events of user u are rows offsets[u]:offsets[u + 1] of every column
    events/NAME.npy        one flat array [E] per event column, `item_id` among them
    items/NAME.npy         one array [V + 1, ...] per item column; row 0 is padding
    users/NAME.npy         one array [U, ...] per user column
    items/text.parquet     item text, where the source has any (row v - 1 is item v)

Item ids are 1..V without gaps (0 is padding), users are 0..U - 1. Events keep the order of the source log: nothing here
ever sorts by a timestamp.

`check` validates a log; `recscale.data.event_log_writer` has `Writer` (streaming) and `write` (a log in memory).
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
CHUNK_EVENTS = 1 << 20  # events checked or written at a time
MAX_ID = 2**31 - 2  # ids are int32 and id + 1 must fit too
MAX_SECONDS = 2**34  # the year 2514: a larger timestamp is in milliseconds
Kind = Literal["id", "time", "feedback", "context", "extra"]


class EventLogError(ValueError):
    """Wrong input data: names the file or column, what was found, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class Column:
    """What an event column means.

    kind: "id" (`item_id`), "time" (`timestamp`, int64 seconds), "feedback" (what the user did with the item: rating,
    like, played ratio), "context" (known before the item is chosen: device, surface, tab; int32 with 0 = unknown),
    "extra" (anything else). cardinality: number of values of an integer-coded column (values 0..cardinality - 1), or
    None for a numeric one.
    """

    kind: Kind
    cardinality: int | None = None


@dataclasses.dataclass(frozen=True)
class EventLog:
    """Users' events in time order. Arrays may be memory-mapped: read slices, do not copy whole columns.

    offsets: int64 [U + 1]. events: name -> [E]; always has `item_id` (int32, 1..V); `timestamp` (int64 seconds) where
    times are known. columns: name -> Column, one per event column. items: name -> [V + 1, ...] (row 0 padding).
    users: name -> [U, ...]. facts: counts, licence, source, sha256 of the source files, anything worth keeping.
    """

    offsets: np.ndarray
    events: Mapping[str, np.ndarray]
    columns: Mapping[str, Column]
    num_items: int
    items: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    users: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    text: pa.Table | None = None  # item text of a log in memory (row v - 1 is item v); see read_text

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_events(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Events per user, int64 [U]."""
        return np.diff(self.offsets)

    def read_text(self) -> pa.Table | None:
        """Item text, row v - 1 is item v; None where the source has no text."""
        if self.text is not None or self.path is None or not (self.path / "items/text.parquet").is_file():
            return self.text
        return pq.read_table(self.path / "items/text.parquet")

    def user_chunks(self, chunk_events: int = CHUNK_EVENTS) -> Iterator[tuple[int, int]]:
        """Yields (first, last + 1) ranges of whole users of about `chunk_events` events: columns are read in slices."""
        first = 0
        while first < self.num_users:
            last = int(np.searchsorted(self.offsets, self.offsets[first] + chunk_events, side="right")) - 1
            last = min(max(last, first + 1), self.num_users)
            yield first, last
            first = last

    @classmethod
    def open(cls, path: str | Path) -> "EventLog":
        """Memory-maps the log at `path`; raises EventLogError where it is missing, damaged or of another schema."""
        path = Path(path)
        if not (path / "meta.json").is_file():
            raise EventLogError(
                f"{path}: no event log here (meta.json is missing). Build one with "
                f"`python -m recscale.data.prepare --dataset=NAME --out={path}`."
            )
        meta = json.loads((path / "meta.json").read_text())
        if meta["schema_version"] != SCHEMA_VERSION:
            raise EventLogError(
                f"{path}: schema version {meta['schema_version']}, this code reads {SCHEMA_VERSION}: prepare it again."
            )

        def load(folder: str) -> dict[str, np.ndarray]:
            return {f.stem: _map(f) for f in sorted((path / folder).glob("*.npy"))}

        log = cls(
            offsets=_map(path / "offsets.npy"),
            events=load("events"),
            columns={name: Column(**spec) for name, spec in meta["columns"].items()},
            num_items=meta["num_items"],
            items=load("items"),
            users=load("users"),
            facts=meta["facts"],
            path=path,
        )
        found = {"users": log.num_users, "events": log.num_events, "columns": sorted(log.events)}
        expected = {"users": meta["num_users"], "events": meta["num_events"], "columns": sorted(log.columns)}
        if found != expected or any(len(values) != log.num_events for values in log.events.values()):
            raise EventLogError(f"{path}: damaged log: found {found}, meta.json says {expected}. Prepare it again.")
        return log


def _map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise EventLogError(f"{path}: missing or truncated ({error}). Prepare the log again.") from None


def check(log: EventLog, *, allow_repeats: bool = True) -> None:
    """Validates a whole log, in chunks of users; allow_repeats=False also forbids an item twice in one user's events.

    Raises EventLogError: empty log, broken offsets, a missing or undeclared column, wrong dtype, ids outside 1..V,
    codes outside their cardinality, non-finite numbers, times that decrease inside a user or are not seconds, tables
    of the wrong length.
    """
    offsets = log.offsets
    if offsets.ndim != 1 or offsets.dtype != np.int64:
        raise EventLogError(f"offsets: {offsets.dtype} of shape {offsets.shape}, expected int64 of shape [users + 1].")
    if len(offsets) < 2 or offsets[-1] == 0:
        raise EventLogError("empty log: no users or no events. Check the source files.")
    if offsets[0] != 0 or np.any(np.diff(offsets) < 0):
        raise EventLogError("offsets: expected to start at 0 and never decrease: users must be contiguous.")
    check_columns(log.columns, log.events, log.num_items)
    for name, array in log.events.items():
        if array.shape != (log.num_events,):
            raise EventLogError(f"events/{name}: shape {array.shape}, offsets say {log.num_events:,} events.")
    for first, last in log.user_chunks():
        rows = slice(int(offsets[first]), int(offsets[last]))
        events = {name: np.asarray(array[rows]) for name, array in log.events.items()}
        check_events(log.columns, events, np.diff(offsets[first : last + 1]), log.num_items, first, allow_repeats)
    check_tables("items", log.items, log.num_items + 1)
    check_tables("users", log.users, log.num_users)
    if log.text is not None and log.text.num_rows != log.num_items:
        raise EventLogError(f"items/text: {log.text.num_rows:,} rows, expected one per item ({log.num_items:,}).")


def check_columns(columns: Mapping[str, Column], events: Mapping[str, np.ndarray], num_items: int) -> None:
    """Names, kinds and dtypes of event columns; raises EventLogError."""
    if not 1 <= num_items <= MAX_ID:
        raise EventLogError(f"num_items is {num_items}, expected 1..{MAX_ID} (ids are int32).")
    if "item_id" not in columns:
        raise EventLogError(f"missing column item_id; the log has {sorted(columns)}.")
    if set(columns) != set(events):
        raise EventLogError(f"columns declared: {sorted(columns)}, with data: {sorted(events)}. Make them equal.")
    for name, column in columns.items():
        _check_dtype(name, column, events[name].dtype)


def _check_dtype(name: str, column: Column, dtype: np.dtype) -> None:
    if not name.isidentifier():
        raise EventLogError(f"column name {name!r} is not a plain identifier.")
    if dtype.kind not in "iuf" or (dtype.kind == "f" and dtype.itemsize < 4):
        raise EventLogError(f"events/{name}: dtype {dtype}, expected an integer, float32 or float64.")
    if name == "item_id" and dtype != np.int32:
        raise EventLogError(f"events/item_id: dtype {dtype}, expected int32: ids never pass through a float.")
    if column.kind == "time" and dtype != np.int64:
        raise EventLogError(f"events/{name}: dtype {dtype}, expected int64 seconds.")
    if column.kind == "context" and (dtype != np.int32 or column.cardinality is None):
        raise EventLogError(f"events/{name}: a context column is int32 with a cardinality; found {dtype}, {column}.")
    if column.cardinality is not None and dtype.kind == "f":
        raise EventLogError(f"events/{name}: dtype {dtype}, but a column with a cardinality holds integer codes.")


def check_events(
    columns: Mapping[str, Column],
    events: Mapping[str, np.ndarray],
    lengths: np.ndarray,
    num_items: int,
    first_user: int,
    allow_repeats: bool,
) -> None:
    """Values of the events of consecutive users (lengths [users], columns [sum of lengths]); raises EventLogError."""
    user = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)

    def refuse(bad: np.ndarray, name: str, expected: str) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            raise EventLogError(
                f"events/{name}: {int(bad.sum()):,} bad values, first at user {first_user + int(user[at])}: "
                f"{events[name][at]}, expected {expected}."
            )

    for name, column in columns.items():
        values = events[name]
        if name == "item_id":
            refuse((values < 1) | (values > num_items), name, f"1..{num_items}")
        elif column.cardinality is not None:
            refuse((values < 0) | (values >= column.cardinality), name, f"0..{column.cardinality - 1}")
        elif values.dtype.kind == "f":
            refuse(~np.isfinite(values), name, "a finite number")
        if column.kind == "time":
            refuse(np.abs(values) > MAX_SECONDS, name, "seconds since 1970 (these look like milliseconds)")
            late = np.zeros(len(values), bool)
            late[1:] = (np.diff(values) < 0) & (np.diff(user) == 0)
            refuse(late, name, "a time that does not decrease inside a user")
    if not allow_repeats:
        keys = user * (num_items + 1) + events["item_id"]
        order = np.argsort(keys, kind="stable")
        repeat = np.zeros(len(keys), bool)
        repeat[order[1:]] = np.diff(keys[order]) == 0
        refuse(repeat, "item_id", "no item twice in one user's events (duplicate rows)")


def check_tables(folder: str, tables: Mapping[str, np.ndarray], rows: int) -> None:
    """Item or user columns: one row each, numbers (finite) or fixed-width text; raises EventLogError."""
    for name, array in tables.items():
        if array.ndim < 1 or len(array) != rows:
            raise EventLogError(f"{folder}/{name}: shape {array.shape}, expected {rows:,} rows.")
        if array.dtype.kind not in "iufbU":
            raise EventLogError(f"{folder}/{name}: dtype {array.dtype}, expected numbers or fixed-width text.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise EventLogError(f"{folder}/{name}: NaN or infinite values; use 0 or a separate code for unknown.")
