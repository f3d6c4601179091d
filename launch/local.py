"""The place "local": processes of this machine, k cells at a time, each on cores of its own.

A worker that was killed or preempted is started again; one that fails stops no other. Ctrl-C lets the workers save. If
this process is killed, its workers go on, and the next submission waits for those it finds at work.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch import cell_state
from launch.study import Job
from recscale.lease import Lease, holder
from recscale.preemption import EXIT_HELD, EXIT_RESTART

HERE = True  # cells run on this file system: what they need is prepared here
POLL_SECONDS = 0.1
STUCK = 3
"""A worker that is killed so often without a step of progress has failed: killed for its memory, mostly."""
PARTNER_SECONDS = 15.0  # what the other processes of a cell get to end by themselves once one has failed


@dataclass(frozen=True)
class Settings:
    """jobs: cells at a time, 0 one per core. processes: of a cell, joined to one run. devices: virtual CPU devices of
    each process, 0 as the machine has. memory_gb: needed by a cell, bounds how many run at a time; 0 unbounded.
    max_restarts: of a cell, per submission. grace_seconds: for saving after Ctrl-C. gpus: of this machine, divided
    among the cells."""

    jobs: int = 0
    processes: int = 1
    devices: int = 0
    memory_gb: float = 0.0
    max_restarts: int = 20
    grace_seconds: float = 60.0
    gpus: int = 0

    def __post_init__(self) -> None:
        for name, least in (("jobs", 0), ("processes", 1), ("devices", 0), ("memory_gb", 0), ("max_restarts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.memory_gb > memory_gb():
            raise ValueError(f"memory_gb={self.memory_gb}: this machine has {memory_gb():.1f}")

    def at_a_time(self) -> int:
        """How many cells run at a time."""
        most = self.jobs or len(_cores())
        return min(most, int(memory_gb() / self.memory_gb)) if self.memory_gb else most


@dataclass
class Worker:
    """The processes of one cell."""

    job: Job
    slot: int
    processes: list[subprocess.Popen[bytes]]
    began: float
    failed_at: float | None = None


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
        self.began, self.done = time.monotonic(), 0

    def run(self) -> None:
        former = signal.signal(signal.SIGTERM, _stop)
        try:
            while self.waiting or self.running:
                self._start_what_may()
                time.sleep(POLL_SECONDS)
                for worker in list(self.running.values()):
                    if (code := _exit_code(worker)) is not None:
                        del self.running[worker.slot]
                        self._ended(worker, code)
                _show_line(self)
        except (KeyboardInterrupt, Stopped):
            self._stop_all()
            sys.exit("\nstopped; the same command goes on where this one was")
        finally:
            signal.signal(signal.SIGTERM, former)
            for worker in self.running.values():  # after an error of this loop's own
                _signal(worker, signal.SIGTERM)
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
            self.waiting.remove(job)
            if cell_state.finished(Path(job.workdir)):  # by a worker that an earlier submission had left
                self._report(job, "done", 0.0)
                continue
            self.running[slot] = _start(job, slot, self.folder, self.settings, self.slots)

    def _may_start(self, job: Job) -> bool:
        """Not while another worker is on it, nor before its trunk has ended, unless that has failed."""
        trunk_is_open = job.after in {other.cell for other in self.waiting} | {
            w.job.cell for w in self.running.values()
        }
        return not trunk_is_open and holder(Path(job.workdir)) is None

    def _ended(self, worker: Worker, code: int) -> None:
        job, seconds = worker.job, time.monotonic() - worker.began
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
        failed = workdir / "FAILED"
        if not failed.exists():
            with contextlib.suppress(OSError):
                failed.write_text(f"{reason}; last words: {_last_line(workdir / 'log')}\n")
        self.outcome.failed.append(job.cell)
        return self._report(job, f"FAILED ({cell_state.of(workdir).reason}), see {workdir / 'log'}", seconds)

    def _why_not_again(self, job: Job, code: int) -> str:
        """Why a worker that was told to stop or was killed is not started again; "" where it is."""
        if self.outcome.restarts.get(job.cell, 0) >= self.settings.max_restarts:
            return f"{_word(code)}, and started again {self.settings.max_restarts} times before"
        if code == EXIT_RESTART:
            return ""
        step = cell_state.of(Path(job.workdir)).step
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
            _signal(worker, signal.SIGTERM)
        deadline = time.monotonic() + self.settings.grace_seconds
        with contextlib.suppress(KeyboardInterrupt):
            while time.monotonic() < deadline and any(
                p.poll() is None for w in self.running.values() for p in w.processes
            ):
                time.sleep(POLL_SECONDS)
        for worker in self.running.values():
            _signal(worker, signal.SIGKILL)
        self.running = {}


def _start(job: Job, slot: int, folder: Path, settings: Settings, slots: int) -> Worker:
    """Start the processes of a cell; their output goes to WORKDIR/log."""
    workdir = Path(job.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "FAILED").unlink(missing_ok=True)
    mine = set(_cores()[slot::slots]) or set(_cores())
    environment = os.environ | environment_of(folder, len(mine), slot, slots, settings)
    address = f"127.0.0.1:{_free_port()}" if settings.processes > 1 else ""
    processes = []
    for index in range(settings.processes):
        joint = {"RECSCALE_COORD": address, "RECSCALE_NPROC": str(settings.processes), "RECSCALE_PROC": str(index)}
        with (workdir / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *job.argv],
                env=environment | (joint if address else {}),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which tells its workers
            )
        if hasattr(os, "sched_setaffinity"):  # before jax counts the cores to size its thread pools
            with contextlib.suppress(OSError):
                os.sched_setaffinity(process.pid, mine)
        processes.append(process)
    return Worker(job, slot, processes, time.monotonic())


def environment_of(folder: Path, cores: int, slot: int, slots: int, settings: Settings) -> Mapping[str, str]:
    """What a worker's environment has beyond this one's: the shared compilation cache, its share of the machine."""
    found = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "OMP_NUM_THREADS": str(cores),
    }
    if settings.devices:
        found["JAX_NUM_CPU_DEVICES"] = str(settings.devices)
    if settings.gpus:
        mine = list(range(settings.gpus))[slot % settings.gpus :: slots] or [slot % settings.gpus]
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / -(-slots // settings.gpus):.2f}"
    return found


def memory_gb() -> float:
    """Memory of this machine in GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _exit_code(worker: Worker) -> int | None:
    """None while the cell runs. Of several processes: 0 or 42 where all say so, else a signal before a failure.

    Once one has ended otherwise, the rest cannot go on: they are killed after a while.
    """
    codes = [process.poll() for process in worker.processes]
    bad = [code for code in codes if code not in (None, 0, EXIT_RESTART, EXIT_HELD)]
    if None in codes:
        if bad:
            worker.failed_at = worker.failed_at or time.monotonic()
            if time.monotonic() - worker.failed_at > PARTNER_SECONDS:
                _signal(worker, signal.SIGKILL)
        return None
    if not bad:
        return max(code for code in codes if code is not None)
    return min(code for code in bad if code is not None)


def _signal(worker: Worker, number: int) -> None:
    for process in worker.processes:
        if process.poll() is None:
            process.send_signal(number)


def _stop(number: int, frame: object) -> None:
    raise Stopped


def _word(code: int) -> str:
    if code == EXIT_RESTART:
        return "told to stop"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    if not sys.stdout.isatty() or time.monotonic() - getattr(queue, "shown", 0.0) < 1.0:
        return
    queue.shown = time.monotonic()
    full = round(20 * queue.done / max(1, queue.total))
    cells = []
    for worker in queue.running.values():
        state = cell_state.of(Path(worker.job.workdir))
        cells.append(f"{worker.job.cell} {100 * state.step // max(1, state.steps)}%")
    line = f"[{'#' * full}{'.' * (20 - full)}] {queue.done}/{queue.total}  " + "  ".join(cells)
    print(f"\r\033[K{line[: os.get_terminal_size().columns - 1]}", end="", flush=True)
