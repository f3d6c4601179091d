"""The processes of one cell, or of a pack of cells, on this machine, and their share of cores, devices and memory."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.checks import refuse, too_small
from launch.study import Job
from recscale.preemption import EXIT_HELD, EXIT_RESTART

COUNT = "xla_force_host_platform_device_count"
PARTNER_SECONDS = 15.0  # what the other processes of a cell get to end by themselves once one has failed


@dataclass(frozen=True)
class Settings:
    """How a study uses this machine. Raises ValueError, one line per problem.

    jobs: cells at a time, 0 one per core. processes: of a cell, joined to one run. devices: virtual CPU devices of each
    process, 0 as the machine has; of a pack, its cores. pack: cells that train in one program, where they differ in
    nothing but seed and scalar hyper-parameters (recscale/population.py). memory_gb: needed by a cell or pack, bounds
    how many run at a time; 0 unbounded. max_restarts: of a cell, per submission. grace_seconds: for saving after
    Ctrl-C. gpus: of this machine, divided among the cells.
    """

    jobs: int = 0
    processes: int = 1
    devices: int = 0
    pack: int = 1
    memory_gb: float = 0.0
    max_restarts: int = 20
    grace_seconds: float = 60.0
    gpus: int = 0

    def __post_init__(self) -> None:
        refuse(too_small(self, {"jobs": 0, "processes": 1, "devices": 0, "pack": 1, "memory_gb": 0, "max_restarts": 0}))
        if self.memory_gb > memory_gb():
            raise ValueError(f"memory_gb = {self.memory_gb}: this machine has {memory_gb():.1f}")
        if 0 < self.gpus < self.processes:
            raise ValueError(f"gpus = {self.gpus}: expected one for each of the {self.processes} processes of a cell")
        if self.pack > 1 and self.processes > 1:
            raise ValueError(f"pack = {self.pack} with processes = {self.processes}: a pack is one process")

    def at_a_time(self) -> int:
        """How many cells run at a time."""
        most = self.jobs or len(cores())
        return min(most, int(memory_gb() / self.memory_gb)) if self.memory_gb else most


@dataclass
class Worker:
    """The processes of one cell, or of a pack."""

    jobs: list[Job]
    slot: int
    processes: list[subprocess.Popen[bytes]]
    began: float
    failed_at: float | None = None


def start(jobs: list[Job], slot: int, folder: Path, settings: Settings, slots: int) -> Worker:
    """Start the processes of a cell; several cells are a pack, one process. Their output goes to WORKDIR/log."""
    for job in jobs:
        workdir = Path(job.workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "FAILED").unlink(missing_ok=True)
        if job is not jobs[0]:
            (workdir / "log").write_text(f"trained together with {jobs[0].cell}: see {jobs[0].workdir}/log\n")
    mine = set(cores()[slot::slots]) or set(cores())
    address = f"127.0.0.1:{_free_port()}" if settings.processes > 1 else ""
    processes = []
    for index in range(settings.processes):
        environment = environment_of(folder, len(mine), slot, slots, settings, index)
        if len(jobs) > 1 and not settings.devices and COUNT not in os.environ.get("XLA_FLAGS", ""):
            environment["JAX_NUM_CPU_DEVICES"] = str(len(mine))  # a member lives on one device
        joint = {"RECSCALE_NPROC": str(settings.processes), "RECSCALE_COORD": address, "RECSCALE_PROC": str(index)}
        with (Path(jobs[0].workdir) / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command(jobs)],
                env=os.environ | environment | joint,  # also alone: it may stand in an allocation of several tasks
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which tells its workers
            )
        if hasattr(os, "sched_setaffinity"):  # before jax counts the cores to size its thread pools
            with contextlib.suppress(OSError):
                os.sched_setaffinity(process.pid, mine)
        processes.append(process)
    return Worker(jobs, slot, processes, time.monotonic())


def command(jobs: list[Job]) -> list[str]:
    """What follows `python`: the cell's own command, or that of the pack."""
    if len(jobs) == 1:
        return list(jobs[0].argv)
    return ["-m", "recscale.train_pack", *(word for job in jobs for word in job.argv[2:])]


def environment_of(
    folder: Path, cores: int, slot: int, slots: int, settings: Settings, index: int = 0
) -> dict[str, str]:
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
        mine = list(range(settings.gpus)) if len(mine) < settings.processes else mine
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine[index :: settings.processes]))
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / -(-slots // settings.gpus):.2f}"
    return found


def memory_gb() -> float:
    """Memory of this machine in GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def exit_code(worker: Worker) -> int | None:
    """None while the cell runs. Of several processes: 0 or 42 where all say so, else a signal before a failure.

    Once one has ended otherwise, the rest cannot go on: they are killed after a while.
    """
    codes = [process.poll() for process in worker.processes]
    bad = [code for code in codes if code not in (None, 0, EXIT_RESTART, EXIT_HELD)]
    if None in codes:
        if bad:
            worker.failed_at = worker.failed_at or time.monotonic()
            if time.monotonic() - worker.failed_at > PARTNER_SECONDS:
                tell(worker, signal.SIGKILL)
        return None
    if not bad:
        return max(code for code in codes if code is not None)
    return min(code for code in bad if code is not None)


def tell(worker: Worker, number: int) -> None:
    for process in worker.processes:
        if process.poll() is None:
            process.send_signal(number)


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
