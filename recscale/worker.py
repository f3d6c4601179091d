"""The contract of a process that works on a run folder, whatever is done there: one worker, told to stop politely, and
a trace of what happened.

`Worker` takes the lease of the folder, listens to the scheduler, writes events.jsonl, and marks the end: DONE is
written last of all, FAILED holds one line with the reason. The exit statuses are in preemption.py.
"""

import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from recscale import record
from recscale.events import Events, read_events
from recscale.lease import Held, Lease
from recscale.mirrors import Mirrors, open_mirrors
from recscale.preemption import Guard, Preempted

ALIVE_SECONDS = 5.0
PEER_WORDS = ("Gloo", "NCCL", "Connection reset", "Connection closed", "coordination service", "heartbeat")
FINISHED = ("ok", "diverged")
"""Status of a record that is complete: diverged runs are results too."""


class OtherRun(ValueError):
    """The folder holds a run of another config: nothing may be written there."""


class Worker:
    """A context in which this process, with the others of its run, may write `workdir`.

    Entering raises Held where another worker lives, OSError where the folder cannot be written. `poll` raises Preempted
    once the run was told to stop, Held once the lease is lost. Leaving with an exception writes what happened.
    mirrors: names of mirrors.MIRRORS, comma-separated. origin: time.monotonic() when the process began.
    guard: shared with other workers of this process, default one of its own.
    """

    def __init__(self, workdir: Path, mirrors: str = "", origin: float | None = None, guard: Guard | None = None):
        self.workdir, self.mirror_names, self.origin = workdir, mirrors, origin
        self.guard, self._stack = guard or Guard(), contextlib.ExitStack()
        self.step, self._shown, self._shares_guard = 0, -ALIVE_SECONDS, guard is not None
        self.events = Events(workdir, writer=False)
        self.mirrors: Mirrors | None = None
        self.lease: Lease | None = None

    def __enter__(self) -> "Worker":
        with contextlib.ExitStack() as stack:
            self.lease = _take_together(self.workdir)
            if self.lease is not None:
                stack.enter_context(self.lease)
            if not self._shares_guard:
                stack.enter_context(self.guard)
            self._stack = stack.pop_all()
        self.events = Events(self.workdir, record.is_writer(), self.origin)
        if record.is_writer():
            (self.workdir / "FAILED").unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Preempted):
            self.events.add("preempted", step=self.step)
        elif isinstance(error, Exception) and not isinstance(error, Held | OtherRun) and not peer_lost(error):
            self.fail(error)
        if self.mirrors is not None:
            self.mirrors.close()
        self._stack.close()

    def started(self, book: dict[str, Any]) -> None:
        """Note that the work begins, on the run that this record describes."""
        self.events.add(
            "start",
            host=socket.gethostname(),
            pid=os.getpid(),
            processes=jax.process_count(),
            config_hash=book["config_hash"],
        )
        if record.is_writer() and self.mirror_names:
            self.mirrors = open_mirrors(self.mirror_names, self.workdir, book)

    def ready(self, step: int) -> None:
        """Note that data, program and state are there; from here on a signal is answered at the next poll."""
        self.step = step
        self.guard.poll_only()
        self.events.add("ready", step=step)

    def leaving(self) -> bool:
        """Whether to save and leave. Call at every step, at the same places on every process.

        Raises Held once the lease is lost: then nothing may be written any more.
        """
        if self.lease is not None and self.lease.lost:
            raise Held(f"{self.workdir}: another worker took the lease while this one was suspended; it leaves")
        return self.guard.poll()

    def poll(self) -> None:
        """`leaving` for the inside of an evaluation: raises Preempted instead of answering."""
        if self.leaving():
            raise Preempted(f"{self.workdir}: told to stop; saved at step {self.step}")

    def log(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl, once it is written there, in the mirrors."""
        if self.mirrors is not None:
            self.mirrors.log(row["step"], row)

    def alive(self, step: int, steps: int, loss: float, events_per_second: float) -> None:
        """Note, every few seconds and at the last step, how far the run is."""
        self.step, now = step, time.monotonic()
        if now - self._shown >= ALIVE_SECONDS or step == steps:
            self._shown = now
            speed = {"loss": _json_number(loss), "events_per_second": _json_number(events_per_second)}
            self.events.add("alive", step=step, steps=steps, **speed)

    def done(self, book: dict[str, Any]) -> None:
        """DONE is written last: whoever sees it knows that the record is complete."""
        self.events.add("done", step=book["stopped_at"], status=book["status"])
        mark_done(self.workdir, book)

    def fail(self, error: Exception) -> None:
        """Note the failure beside the run and in its record; the same command goes on from its last checkpoint.

        Any process may fail, so each writes FAILED.
        """
        reason = one_line(error)
        self.events.add("failed", step=self.step, reason=reason)
        with contextlib.suppress(OSError, ValueError):  # no room for it: the error that is being reported says more
            (self.workdir / "FAILED").write_text(reason + "\n")
            book = record.read(self.workdir)
            if book["status"] == "running":
                record.write(self.workdir, book | {"status": "failed", "reason": reason})


def finished(config: dict[str, Any], workdir: Path) -> dict[str, Any] | None:
    """The record of this config's run where it is complete, DONE being made up for; else None."""
    try:
        book = record.read(workdir)
    except (OSError, ValueError):
        return None
    if book["status"] not in FINISHED or book["config_hash"] != record.config_hash(config):
        return None
    if not (workdir / "DONE").exists():
        mark_done(workdir, book)
    return book


def open_record(config: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """The record of the run in `workdir`, or a fresh one; a broken file is set aside: checkpoints and metrics say more.

    A run that failed before its first checkpoint gives way to another config. Raises OtherRun where the folder belongs
    to another config otherwise.
    """
    fresh, file = record.new(config), workdir / "record.json"
    found = [row["config_hash"] for row in read_events(workdir) if "config_hash" in row]
    book = fresh
    if file.exists():
        try:
            book = record.read(workdir)
            found = [book["config_hash"]]
        except ValueError as error:
            if record.is_writer():
                os.replace(file, file.with_suffix(".json.broken"))
                (workdir / "DONE").unlink(missing_ok=True)
                print(f"{error}; it is now {file.name}.broken, and the run goes on", file=sys.stderr)
    if found and found[-1] != fresh["config_hash"]:
        if book["status"] == "failed" and not any((workdir / "checkpoints").glob("*")):
            return fresh
        raise OtherRun(
            f"{workdir}: holds a run of another config ({found[-1]}, this one is {fresh['config_hash']}). "
            "Choose another --workdir, or delete this one."
        )
    return book


def mark_done(workdir: Path, book: dict[str, Any]) -> None:
    """Write WORKDIR/DONE, which holds the status of the record."""
    if record.is_writer():
        (workdir / "DONE").write_text(book["status"] + "\n")


def peer_lost(error: BaseException | None) -> bool:
    """Whether this process failed only because another one of its run ended: it has no failure of its own to report."""
    while jax.distributed.is_initialized() and error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in PEER_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """What the command line says of an error; KeyError would print its message quoted."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return "error: " + " ".join(f"{text or type(error).__name__}".split())


def _json_number(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


def _take_together(workdir: Path) -> Lease | None:
    """Process 0 takes the lease; where it cannot, no process goes on. None on the others."""
    lease, problem = None, None
    if record.is_writer():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lease = Lease.take(workdir)
        except (Held, OSError) as error:
            problem = error
    if jax.process_count() > 1:
        code = 0 if problem is None else 1 if isinstance(problem, Held) else 2
        code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
        if code and problem is None:
            problem = (Held if code == 1 else OSError)(f"{workdir}: process 0 could not take the lease and said why")
    if problem is not None:
        raise problem
    return lease
