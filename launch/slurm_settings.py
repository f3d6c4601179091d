"""What a user says of a SLURM cluster, checked before anything is sent, and as options of sbatch and srun."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields

from launch.checks import refuse, too_small, wrong_types

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")
MEMORY = re.compile(r"\d+[KMGT]?")
# Options that are given by a setting, that every script needs as it is, or that do not work with JAX.
RESERVED = {
    "array": "max_parallel",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory",
    "nodes": "nodes",
    "ntasks": "nodes and tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "requeue": "requeue",
    "signal": "signal_seconds",
    "time": "time",
    "gpus-per-task": "gpus_per_node (a GPU bound to each task hides it from JAX)",
    "gpus-per-node": "gpus_per_node",
    "output": "none: logs go to the slurm folder of the sweep",
    "open-mode": "none: a restarted task appends to its log",
    "job-name": "none: the job has the name of the sweep",
}


@dataclass(frozen=True)
class Settings:
    """Where and how the cells of a sweep run. "" and 0 leave a choice to the cluster.

    time: limit of one start, HH:MM:SS or D-HH:MM:SS; a cell that needs longer saves and is requeued. nodes,
    tasks_per_node: processes of one cell. gpus_per_node: shared evenly by the tasks of a node. cpus_per_task, memory
    (per node, "64G"): of one cell. max_parallel: cells at a time. signal_seconds: how long before the time limit a cell
    is told; must exceed one step and one save. max_restarts: after preemption, time limit and kills. max_kills: of
    those, after kill -9, a lost node, no memory. requeue: whether SLURM may requeue a preempted task. max_array:
    tasks in one array (the cluster's MaxArraySize). python: the interpreter on the nodes. setup: shell lines before it,
    e.g. "module load cuda". options: more options of sbatch, e.g. "--constraint=a100". Raises ValueError, one line per
    problem.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    gpu_type: str = ""
    cpus_per_task: int = 0
    memory: str = ""
    max_parallel: int = 0
    signal_seconds: int = 120
    max_restarts: int = 20
    max_kills: int = 3
    requeue: bool = True
    max_array: int = 1000
    python: str = sys.executable
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("setup", "options"):
            value = getattr(self, name)
            if isinstance(value, str | list):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        refuse(wrong_types(self))
        refuse([*self._wrong_numbers(), *self._wrong_texts(), *self._wrong_options()])

    def sbatch_options(self) -> list[str]:
        """Options of one array, but for its size and its log."""
        gpu = f"gpu:{self.gpu_type}" if self.gpu_type else "gpu"
        values = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.memory,
            "gres": f"{gpu}:{self.gpus_per_node}" if self.gpus_per_node else "",
            "signal": f"TERM@{self.signal_seconds}",  # without "B:": to the processes of the steps
        }
        requeue = "--requeue" if self.requeue else "--no-requeue"
        return [*(f"--{name}={value}" for name, value in values.items() if value), requeue, *self.options]

    def srun_options(self) -> list[str]:
        """Options of the one step of an array task. srun does not take cpus-per-task over from sbatch."""
        found = [f"--nodes={self.nodes}", f"--ntasks={self.nodes * self.tasks_per_node}"]
        found.append(f"--ntasks-per-node={self.tasks_per_node}")
        if self.cpus_per_task:
            found.append(f"--cpus-per-task={self.cpus_per_task}")
        if self.nodes * self.tasks_per_node > 1:
            found.append("--label")
        return [*found, "--kill-on-bad-exit=0"]  # a process that leaves first must not end those that still save

    def _wrong_numbers(self) -> Iterator[str]:
        numbers = {field.name: 0 for field in fields(self) if type(field.default) is int}
        yield from too_small(self, numbers | {"nodes": 1, "tasks_per_node": 1, "max_array": 1, "signal_seconds": 1})
        if self.tasks_per_node > 0 and self.gpus_per_node % self.tasks_per_node:
            yield (
                f"gpus_per_node = {self.gpus_per_node} with tasks_per_node = {self.tasks_per_node}: the tasks of a "
                f"node share its GPUs evenly; set tasks_per_node to {self.gpus_per_node} or 1"
            )
        if self.gpu_type and not self.gpus_per_node:
            yield f"gpu_type = {self.gpu_type!r} without gpus_per_node: say how many"
        seconds = seconds_of(self.time)
        if seconds is not None and self.signal_seconds >= seconds:
            yield f"signal_seconds = {self.signal_seconds}: a start lasts only {seconds} s (time = {self.time!r})"

    def _wrong_texts(self) -> Iterator[str]:
        if self.time and seconds_of(self.time) is None:
            yield f"time = {self.time!r}: expected HH:MM:SS or D-HH:MM:SS; YAML makes a number of it without quotes"
        if self.memory and not MEMORY.fullmatch(self.memory):
            yield f"memory = {self.memory!r}: expected a number with K, M, G or T, e.g. 64G"
        if not self.python:
            yield "python is empty: name the interpreter on the nodes"
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if not isinstance(text, str | int) or "\n" in str(text):
                    yield f"{field.name} = {text!r}: expected one line of text"

    def _wrong_options(self) -> Iterator[str]:
        for option in map(str, self.options):
            name = option.lstrip("-").partition("=")[0]
            if not option.startswith("--") or " " in option.partition("=")[0] or "\n" in option:
                yield f"options: {option!r}: expected the long form, --name=value"
            elif name in RESERVED:
                yield f"options: {option!r}: use the setting {RESERVED[name]}"


def seconds_of(time: str) -> int | None:
    """A time limit in seconds; None for "" and for what is none."""
    match = TIME.fullmatch(time)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
