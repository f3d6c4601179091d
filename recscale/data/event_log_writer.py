"""Writing event logs: streaming, in chunks of whole users, into PATH.partial, renamed to PATH when it is complete.

A log can be bigger than RAM. A killed writer with the same identity goes on after its last complete chunk.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recscale.data.event_log import (
    CHUNK_EVENTS,
    SCHEMA_VERSION,
    Column,
    EventLog,
    EventLogError,
    check_columns,
    check_events,
    check_tables,
)


class _GrowingArray:
    """A .npy file that grows along its first axis: NumPy pads the header, so the shape is rewritten in place."""

    def __init__(self, path: Path, dtype: np.dtype, tail: tuple[int, ...], rows: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.dtype, self.tail, self.rows = path, np.dtype(dtype), tail, rows
        self.file = path.open("r+b" if rows else "w+b")
        try:
            self._write_header()
            self.file.truncate(self.file.tell() + rows * self.dtype.itemsize * int(np.prod(tail, dtype=np.int64)))
            self.file.seek(0, os.SEEK_END)
        except OSError:
            self.close(lost=True)
            raise

    def append(self, array: np.ndarray) -> None:
        if array.dtype != self.dtype or array.shape[1:] != self.tail:
            raise EventLogError(
                f"{self.path.stem}: this chunk is {array.dtype} {array.shape[1:]}, the first {self.dtype} {self.tail}."
            )
        self.file.write(np.ascontiguousarray(array).tobytes())
        self.rows += len(array)

    def flush(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.seek(0, os.SEEK_END)
        self.file.flush()

    def close(self, *, lost: bool = False) -> None:
        """lost: the file is about to be removed, so that what a full disk did not take does not matter."""
        with contextlib.suppress(OSError) if lost else contextlib.nullcontext():
            self.file.close()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.tail),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


class Writer:
    """Appends users in chunks and makes one event log of them.

        with Writer(path, columns, num_items) as writer:
            for lengths, events in chunks:
                writer.append(lengths, events)
            log = writer.finish(items=..., facts=...)

    columns: name -> Column, `item_id` among them. allow_repeats=False forbids an item twice in one user's events.
    identity: what the log is made from (JSON); a PATH.partial of the same identity is continued, and `num_users` says
    how many users it already holds; any other PATH.partial is replaced. Leaving the block with an error removes
    PATH.partial; a killed process leaves it, to be continued. Raises EventLogError where `path` exists and is not
    empty, OSError where the disk is full.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Mapping[str, Column],
        num_items: int,
        *,
        allow_repeats: bool = True,
        identity: Mapping[str, Any] | None = None,
    ):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise EventLogError(f"{self.path} exists and is not empty: remove it, or write the log elsewhere.")
        self.columns, self.num_items, self.allow_repeats = dict(columns), num_items, allow_repeats
        self.num_users = self.num_events = 0
        self._arrays: dict[str, _GrowingArray] = {}
        self._described = {
            "schema_version": SCHEMA_VERSION,
            "columns": {name: dataclasses.asdict(column) for name, column in self.columns.items()},
            "num_items": num_items,
            "allow_repeats": allow_repeats,
            "identity": None if identity is None else json.loads(json.dumps(dict(identity))),
        }
        if not self._continue():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            try:
                self._add("offsets", np.zeros(1, np.int64))
            except OSError:
                self._discard()
                raise

    def append(
        self, lengths: np.ndarray, events: Mapping[str, np.ndarray], users: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Adds consecutive users: lengths [n] events each, columns [sum(lengths)], user columns [n, ...]."""
        lengths = np.asarray(lengths)
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or np.any(lengths < 0):
            raise EventLogError(f"lengths: {lengths.dtype} of shape {lengths.shape}, expected counts of shape [users].")
        total = int(lengths.sum())
        check_columns(self.columns, events, self.num_items)
        for name, values in events.items():
            if values.shape != (total,):
                raise EventLogError(f"events/{name}: shape {values.shape}, lengths sum to {total:,}.")
        check_events(self.columns, events, lengths, self.num_items, self.num_users, self.allow_repeats)
        check_tables("users", users or {}, len(lengths))
        for name, values in events.items():
            self._add(f"events/{name}", values)
        for name, values in (users or {}).items():
            self._add(f"users/{name}", values)
        self._add("offsets", self.num_events + np.cumsum(lengths, dtype=np.int64))
        self.num_users += len(lengths)
        self.num_events += total
        self._save_state()

    def finish(
        self,
        items: Mapping[str, np.ndarray] | None = None,
        text: pa.Table | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> EventLog:
        """Writes item tables (row 0 padding), text and meta.json, renames PATH.partial to PATH and opens the log."""
        if self.num_events == 0:
            raise EventLogError(f"{self.path}: empty log: no events were written. Check the source files.")
        for name, array in self._arrays.items():
            expected = self.num_users if name.startswith("users/") else array.rows
            if array.rows != expected:
                raise EventLogError(f"{name}: {array.rows:,} rows for {expected:,} users: give it in every append.")
        check_tables("items", items or {}, self.num_items + 1)
        if text is not None and text.num_rows != self.num_items:
            raise EventLogError(f"items/text: {text.num_rows:,} rows, expected one per item ({self.num_items:,}).")
        (self.partial / "items").mkdir(exist_ok=True)
        for name, values in (items or {}).items():
            np.save(self.partial / f"items/{name}.npy", values, allow_pickle=False)
        if text is not None:
            pq.write_table(text, self.partial / "items/text.parquet", compression="zstd")
        for array in self._arrays.values():
            array.close()
        meta = {
            "schema_version": SCHEMA_VERSION,
            "columns": self._described["columns"],
            "num_users": self.num_users,
            "num_items": self.num_items,
            "num_events": self.num_events,
            "facts": dict(facts or {}),
        }
        (self.partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        (self.partial / "progress.json").unlink(missing_ok=True)
        os.replace(self.partial, self.path)
        return EventLog.open(self.path)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self._discard()
        for array in self._arrays.values():
            array.close()

    def _add(self, name: str, values: np.ndarray) -> None:
        if name not in self._arrays:
            self._arrays[name] = _GrowingArray(self.partial / f"{name}.npy", values.dtype, values.shape[1:], 0)
        self._arrays[name].append(values)

    def _save_state(self) -> None:
        for array in self._arrays.values():
            array.flush()
        arrays = {n: [np.lib.format.dtype_to_descr(a.dtype), list(a.tail), a.rows] for n, a in self._arrays.items()}
        state = {"log": self._described, "users": self.num_users, "events": self.num_events, "arrays": arrays}
        (self.partial / "progress.tmp").write_text(json.dumps(state))
        os.replace(self.partial / "progress.tmp", self.partial / "progress.json")

    def _continue(self) -> bool:
        """Opens the arrays of an earlier PATH.partial of the same identity; False where there is none."""
        path = self.partial / "progress.json"
        if self._described["identity"] is None or not path.is_file():
            return False
        state = json.loads(path.read_text())
        if state["log"] != self._described:
            return False
        self.num_users, self.num_events = state["users"], state["events"]
        for name, (descr, tail, rows) in state["arrays"].items():
            self._arrays[name] = _GrowingArray(self.partial / f"{name}.npy", np.dtype(descr), tuple(tail), rows)
        return True

    def _discard(self) -> None:
        for array in self._arrays.values():
            array.close(lost=True)
        shutil.rmtree(self.partial, ignore_errors=True)


def write(
    log: EventLog,
    path: str | Path,
    *,
    allow_repeats: bool = True,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    chunk_events: int = CHUNK_EVENTS,
) -> EventLog:
    """Validates `log` and writes it to `path`; returns the log opened from there.

    progress(users, events) is called after each chunk of about chunk_events events. identity, allow_repeats and errors
    as in Writer.
    """
    check_columns(log.columns, log.events, log.num_items)
    for name, table in log.users.items():
        if len(table) != log.num_users:
            raise EventLogError(f"users/{name}: {len(table):,} rows, expected {log.num_users:,}.")
    with Writer(path, log.columns, log.num_items, allow_repeats=allow_repeats, identity=identity) as writer:
        for first, last in log.user_chunks(chunk_events):
            if last <= writer.num_users:
                continue
            first = max(first, writer.num_users)
            rows = slice(int(log.offsets[first]), int(log.offsets[last]))
            events = {name: np.asarray(values[rows]) for name, values in log.events.items()}
            users = {name: np.asarray(values[first:last]) for name, values in log.users.items()}
            writer.append(np.diff(log.offsets[first : last + 1]), events, users)
            if progress is not None:
                progress(writer.num_users, writer.num_events)
        return writer.finish(log.items, log.read_text(), log.facts)
