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
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

SCHEMA_VERSION = 1
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

    @classmethod
    def open(cls, path: str | Path) -> "EventLog":
        """Memory-map the event log at `path`; raises EventLogError where it is missing, unfinished or of another schema."""
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
            return {f.stem: np.load(f, mmap_mode="r") for f in sorted((path / folder).glob("*.npy"))}

        return cls(
            offsets=np.load(path / "offsets.npy", mmap_mode="r"),
            events=load("events"),
            columns={name: Column(**spec) for name, spec in meta["columns"].items()},
            num_items=meta["num_items"],
            items=load("items"),
            users=load("users"),
            facts=meta["facts"],
            path=path,
        )
