"""events.jsonl of a run: what happened to it and when, over all its attempts. Append-only, written by process 0.

A row is {"event", "wall", "clock", "attempt", ...}. wall: Unix seconds. clock: seconds since this attempt's process
began, which no change of the machine's time can disturb. attempt: how often the run had been started before.

    start       host, pid, processes, config_hash
    ready       step: data, program and state are there; training goes on from this step
    compiled    step: the first step of this attempt is done
    alive       step, steps, loss, events_per_second: every few seconds
    evaluation  step, split, seconds
    save        step, seconds: how long the training waited for it
    preempted   step: told to stop, saved, wants to be started again
    done        step, status
    failed      step, reason
"""

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


class Events:
    """Appends to events.jsonl of a run. A row that cannot be written is counted in `dropped`: events stop no run.

    origin: time.monotonic() when the process began, default now. writer: False on all processes but the first.
    """

    def __init__(self, workdir: Path, writer: bool = True, origin: float | None = None):
        self.file, self.writer = workdir / FILE, writer
        self.origin = time.monotonic() if origin is None else origin
        self.attempt = sum(row["event"] == "start" for row in read_events(workdir))
        self.dropped = 0
        self._cut = _ends_cut(self.file)

    def clock(self) -> float:
        """Seconds since this attempt's process began."""
        return time.monotonic() - self.origin

    def add(self, event: str, **fields: Any) -> None:
        """Append one row."""
        if not self.writer:
            return
        row = {"event": event, "wall": round(time.time(), 3), "clock": round(self.clock(), 3), "attempt": self.attempt}
        try:
            with self.file.open("a") as file:
                file.write(("\n" if self._cut else "") + json.dumps(row | fields) + "\n")
            self._cut = False
        except OSError:
            self.dropped += 1
            self._cut = True


def read_events(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's events.jsonl, oldest first; lines cut short by a kill or a full disk are left out."""
    try:
        lines = (workdir / FILE).read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [row for row in map(_parsed, lines) if row is not None]


def process_origin() -> float:
    """time.monotonic() of the moment this process began (Linux; elsewhere: now)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0.0
    return time.monotonic() - max(0.0, age)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= {"event", "wall", "clock", "attempt"} else None


def _ends_cut(file: Path) -> bool:
    """Whether the last line lacks its end: the next row must not be glued to it."""
    try:
        with file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"
    except OSError:  # no file, or an empty one
        return False
