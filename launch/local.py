"""The place "local": processes of this machine, k cells at a time, each on cores of its own.

A worker that was killed or preempted is started again; one that fails stops no other. Ctrl-C lets the workers save. If
this process is killed, its workers go on, and the next submission waits for those it finds at work.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch import cell_state
from launch.local_workers import Settings, Worker, exit_code, start, tell
from launch.study import Job
from recscale.events import read_events
from recscale.lease import Lease, holder
from recscale.preemption import EXIT_HELD, EXIT_RESTART

POLL_SECONDS = 0.1
STUCK = 5
"""A worker that is killed so often once it is ready, without a step of progress, has failed: mostly for its memory."""


@dataclass
class Outcome:
    """What became of the cells so far. deaths: cell -> (kills in a row, step at the last of them)."""

    restarts: dict[str, int] = field(default_factory=dict)
    deaths: dict[str, tuple[int, int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def submit(jobs: Sequence[Job], folder: Path, settings: Settings, dry_run: bool) -> None:
    """Run these jobs to their end; raises lease.Held where another submission of this study is at work here."""
    if dry_run:
        for job in jobs:
            print(" ".join([sys.executable, *job.argv]))
        return
    with Lease.take(folder / ".sweep"):
        _Queue(list(jobs), folder, settings, _say).run()


def cancel(jobs: Sequence[Job], folder: Path, settings: Settings, dry_run: bool) -> None:
    """Tell the submission that is at work and all workers on this machine to save and leave."""
    here = socket.gethostname()
    for place in [folder / ".sweep", *(Path(job.workdir) for job in jobs)]:
        if (owner := holder(place)) is None:
            continue
        if owner.host != here:
            print(f"{place}: {owner} is on another machine; cancel it there")
            continue
        print(f"kill -TERM {owner.pid}  # {place}")
        if not dry_run:
            with contextlib.suppress(ProcessLookupError):
                os.kill(owner.pid, signal.SIGTERM)


def where(jobs: Sequence[Job], folder: Path, settings: Settings) -> dict[str, str]:
    """Nothing beyond what the leases say."""
    return {}


class Stopped(Exception):
    """This submission was told to stop."""


class _Queue:
    """The loop of one submission: start what may start, look at what ended, start again what was killed."""

    def __init__(self, jobs: list[Job], folder: Path, settings: Settings, say: Callable[[str], None]):
        self.settings, self.folder, self.say = settings, folder, say
        self.waiting, self.total, self.outcome = jobs, len(jobs), Outcome()
        self.running: dict[int, Worker] = {}
        self.slots = settings.at_a_time()
        self.began, self.done, self.shown = time.monotonic(), 0, 0.0

    def run(self) -> None:
        former = signal.signal(signal.SIGTERM, _stop)
        try:
            while self.waiting or self.running:
                self._start_what_may()
                time.sleep(POLL_SECONDS)
                for worker in list(self.running.values()):
                    if (code := exit_code(worker)) is not None:
                        del self.running[worker.slot]
                        for job in worker.jobs:
                            self._ended(job, code, time.monotonic() - worker.began)
                _show_line(self)
        except (KeyboardInterrupt, Stopped):
            self._stop_all()
            sys.exit("\nstopped; the same command goes on where this one was")
        finally:
            signal.signal(signal.SIGTERM, former)
            for worker in self.running.values():  # after an error of this loop's own
                tell(worker, signal.SIGTERM)
        if self.outcome.failed:
            sys.exit(
                f"{len(self.outcome.failed)} cells failed: {', '.join(self.outcome.failed)}; `retry` takes them again"
            )

    def _start_what_may(self) -> None:
        for slot in range(self.slots):
            if slot in self.running:
                continue
            job = next((job for job in self.waiting if self._may_start(job)), None)
            if job is None:
                return
            jobs = self._together(job)
            self.waiting = [other for other in self.waiting if other not in jobs]
            for done in [
                job for job in jobs if cell_state.finished(Path(job.workdir))
            ]:  # by a worker that was left over
                jobs.remove(done)
                self._report(done, "done", 0.0)
            if jobs:
                self.running[slot] = start(jobs, slot, self.folder, self.settings, self.slots)

    def _together(self, job: Job) -> list[Job]:
        """The job, and those that may train in one program with it."""
        alike = [other for other in self.waiting if job.alike and other.alike == job.alike and self._may_start(other)]
        return [job, *(other for other in alike if other is not job)][: self.settings.pack]

    def _may_start(self, job: Job) -> bool:
        """Not while another worker is on it, nor before its trunk has ended, unless that has failed."""
        still_open = [*self.waiting, *(job for worker in self.running.values() for job in worker.jobs)]
        trunk_is_open = any(job.after == other.cell for other in still_open)
        return not trunk_is_open and holder(Path(job.workdir)) is None

    def _ended(self, job: Job, code: int, seconds: float) -> None:
        workdir = Path(job.workdir)
        if cell_state.finished(workdir):
            return self._report(job, cell_state.of(workdir).name, seconds)
        if code == EXIT_HELD:
            self.waiting.append(job)
            return None
        if code == EXIT_RESTART or code < 0:
            reason = self._why_not_again(job, code)
            if not reason:
                self.outcome.restarts[job.cell] = self.outcome.restarts.get(job.cell, 0) + 1
                self.say(f"{job.cell}: {_word(code)} after {seconds:.0f}s, starting it again")
                self.waiting.insert(0, job)
                return None
        else:
            reason = f"ended with status {code}"
        why, failed = f"{reason}; last words: {_last_line(workdir / 'log')}", workdir / "FAILED"
        if not failed.exists() or not failed.stat().st_size:
            with contextlib.suppress(OSError):  # a full disk, mostly
                failed.write_text(f"{why}\n")
        self.outcome.failed.append(job.cell)
        return self._report(job, f"FAILED ({cell_state.of(workdir).reason or why}), see {workdir / 'log'}", seconds)

    def _why_not_again(self, job: Job, code: int) -> str:
        """Why a worker that was told to stop or was killed is not started again; "" where it is."""
        if self.outcome.restarts.get(job.cell, 0) >= self.settings.max_restarts:
            return f"{_word(code)}, and started again {self.settings.max_restarts} times before"
        if code == EXIT_RESTART:
            return ""
        rows = read_events(Path(job.workdir))
        if (
            not rows or rows[-1]["event"] == "start"
        ):  # killed while it was starting: from outside, as far as one can tell
            return ""
        step = max(row["step"] for row in rows if "step" in row)
        times, last = self.outcome.deaths.get(job.cell, (0, -1))
        times = 1 if step > last else times + 1
        self.outcome.deaths[job.cell] = (times, step)
        return f"{_word(code)} {times} times at step {step} (out of memory?)" if times >= STUCK else ""

    def _report(self, job: Job, word: str, seconds: float) -> None:
        self.done += 1
        spent = time.monotonic() - self.began
        left = spent / self.done * (len(self.waiting) + len(self.running))
        self.say(
            f"[{self.done}/{self.total}] {job.cell}: {word} in {seconds:.0f}s"
            f"  (elapsed {spent:.0f}s, about {left:.0f}s left)"
        )

    def _stop_all(self) -> None:
        """Let the workers save; kill what is still there after the grace period, or at a second Ctrl-C."""
        self.say(f"stopping: {len(self.running)} cells save (at most {self.settings.grace_seconds:.0f}s)")
        for worker in self.running.values():
            tell(worker, signal.SIGTERM)
        deadline = time.monotonic() + self.settings.grace_seconds
        with contextlib.suppress(KeyboardInterrupt):
            while time.monotonic() < deadline and any(exit_code(worker) is None for worker in self.running.values()):
                time.sleep(POLL_SECONDS)
        for worker in self.running.values():
            tell(worker, signal.SIGKILL)
        self.running = {}


def _stop(number: int, frame: object) -> None:
    raise Stopped


def _word(code: int) -> str:
    if code == EXIT_RESTART:
        return "told to stop"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _last_line(file: Path) -> str:
    try:
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "none"
    return lines[-1] if lines else "none"


def _say(text: str) -> None:
    print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)


def _show_line(queue: _Queue) -> None:
    """On a terminal, one line that is rewritten: a bar, and how far each running cell is."""
    if not sys.stdout.isatty() or time.monotonic() - queue.shown < 1.0:
        return
    queue.shown = time.monotonic()
    full = round(20 * queue.done / max(1, queue.total))
    cells = []
    for worker in queue.running.values():
        state = cell_state.of(Path(worker.jobs[0].workdir))
        more = f" and {len(worker.jobs) - 1} more" if len(worker.jobs) > 1 else ""
        cells.append(f"{worker.jobs[0].cell}{more} {100 * state.step // max(1, state.steps)}%")
    line = f"[{'#' * full}{'.' * (20 - full)}] {queue.done}/{queue.total}  " + "  ".join(cells)
    print(f"\r\033[K{line[: os.get_terminal_size().columns - 1]}", end="", flush=True)
