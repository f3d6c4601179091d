"""The state of a cell, from the files of its run alone: the truth about it, whatever a scheduler says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recscale import record
from recscale.events import read_events
from recscale.goodput import Goodput, goodput
from recscale.lease import holder

WAITING = "waiting"  # never started
RUNNING = "running"  # a live worker holds the lease
PREEMPTED = "preempted"  # told to stop, saved
KILLED = "killed"  # died without a word
FAILED = "failed"  # FAILED says why
DIVERGED = "diverged"  # done: a result
DONE = "done"
FINISHED = (DONE, DIVERGED)


@dataclass(frozen=True)
class State:
    """What is known of a cell. seconds_left, events_per_second and loss are None where unknown."""

    name: str
    step: int = 0
    steps: int = 0
    events_per_second: float | None = None
    loss: float | None = None
    seconds_left: float | None = None
    restarts: int = 0
    where: str = ""
    reason: str = ""
    goodput: Goodput | None = None

    @property
    def finished(self) -> bool:
        """Trained to the end, or diverged, which is a result too."""
        return self.name in FINISHED


def finished(workdir: Path) -> bool:
    """Whether DONE is there and the record is complete: the only judge of success."""
    return _finished(workdir) is not None


def of(workdir: Path) -> State:
    """The state of the run in `workdir`; a folder that does not exist is waiting."""
    rows, owner, done = read_events(workdir), holder(workdir), _finished(workdir)
    where = f"{owner.host}:{owner.pid}" if owner else ""
    reason = _first_line(workdir / "FAILED")
    if done is not None:
        name = DONE if done["status"] == "ok" else DIVERGED
        reason = done["reason"]
    elif owner is not None:
        name, reason = RUNNING, ""
    elif (workdir / "FAILED").exists():  # empty where there was no room for the reason
        name = FAILED
    elif rows:
        name = PREEMPTED if rows[-1]["event"] == "preempted" else KILLED
    else:
        name = WAITING
    speed = _speed(rows, name)
    return State(
        name,
        restarts=max((row["attempt"] for row in rows), default=0),
        where=where,
        reason=reason,
        goodput=goodput(rows) if rows else None,
        **speed,
    )


def _finished(workdir: Path) -> dict[str, Any] | None:
    """The record of a run that is complete, else None."""
    if not (workdir / "DONE").exists():
        return None
    try:
        found = record.read(workdir)
    except (OSError, ValueError):
        return None
    return found if found["status"] in ("ok", "diverged") else None


def _speed(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Step, steps, loss and, of a run that goes on, events per second and seconds left of the newest attempt."""
    alive = [row for row in rows if row["event"] == "alive"]
    if not alive:
        return {}
    last = alive[-1]
    found = {"step": last["step"], "steps": last["steps"], "loss": last["loss"]}
    mine = [row for row in alive if row["attempt"] == last["attempt"]]
    seconds, steps = last["clock"] - mine[0]["clock"], last["step"] - mine[0]["step"]
    if name == RUNNING and seconds > 0 and steps > 0:
        found["events_per_second"] = last["events_per_second"]
        found["seconds_left"] = (last["steps"] - last["step"]) * seconds / steps
    elif name in FINISHED:
        found["events_per_second"] = last["events_per_second"]
    return found


def _first_line(file: Path) -> str:
    try:
        return file.read_text(errors="replace").partition("\n")[0]
    except OSError:
        return ""
