"""A small sweep of stand-in trainers on a real cluster, and what its files say afterwards."""

import json
import time
from pathlib import Path

from launch import slurm
from launch.study import Job
from tests.slurm.cluster import Cluster

# The tests' own flags ask for eight devices in every process; SLURM hands the environment on to its jobs.
ONE_DEVICE = "export XLA_FLAGS=--xla_force_host_platform_device_count=1"


class Sweep:
    """Cells of one folder: cells = {name: {option of the stand-in: value}}."""

    def __init__(self, cluster: Cluster, folder: Path, cells: dict[str, dict[str, float]], **settings: object):
        self.cluster, self.folder = cluster, folder
        self.settings = slurm.Settings(**({"cpus_per_task": 1, "setup": (ONE_DEVICE,)} | settings))
        self.jobs = [self._job(cell, options) for cell, options in cells.items()]

    def _job(self, cell: str, options: dict[str, float]) -> Job:
        workdir = str(self.folder / cell)
        given = [f"--{name}={value}" for name, value in options.items()]
        return Job(cell, workdir, ("-m", "tests.slurm.standin", f"--workdir={workdir}", *given))

    def submit(self) -> list[str]:
        """Submit the cells that are not done; the ids of the jobs that this made."""
        known = self.ids()
        slurm.submit([job for job in self.jobs if not self.done(job.cell)], self.folder, self.settings, False)
        return [job for job in self.ids() if job not in known]

    def ids(self) -> list[str]:
        file = self.folder / "slurm" / "jobs.jsonl"
        return [json.loads(line)["job"] for line in file.read_text().splitlines()] if file.exists() else []

    def where(self) -> dict[str, str]:
        return slurm.where(self.jobs, self.folder, self.settings)

    def cancel(self) -> None:
        slurm.cancel(self.jobs, self.folder, self.settings, False)

    def done(self, cell: str) -> bool:
        return (self.folder / cell / "DONE").exists()

    def rows(self, cell: str) -> list[dict]:
        """metrics.jsonl of a cell."""
        file = self.folder / cell / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def attempts(self, cell: str) -> int:
        return len({row["attempt"] for row in self.rows(cell)})

    def losses(self, cell: str) -> list[tuple[int, int]]:
        """(step, loss) in the order written: that of an undisturbed run has every step once."""
        return [(row["step"], row["loss"]) for row in self.rows(cell)]

    def wait(self, seconds: float = 60.0) -> None:
        """Until nothing of this sweep is in the queue."""
        self.until(lambda: not self.where(), seconds)

    def until(self, ready, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"waited {seconds} s\n{self.story()}"
            time.sleep(0.1)

    def said(self) -> str:
        """What the scripts wrote, of all tasks."""
        return "".join(log.read_text() for log in sorted((self.folder / "slurm").glob("*.log")))

    def story(self) -> str:
        logs = "".join(f"-- {log}\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*/log")))
        return f"{self.cluster.ask('squeue', '--array')}\n{self.said()}\n{logs}"


def undisturbed(steps: int, processes: int = 1) -> list[tuple[int, int]]:
    """(step, loss) of a stand-in that nothing happened to."""
    return [(step, step * processes * (processes + 1) // 2) for step in range(1, steps + 1)]
