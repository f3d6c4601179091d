"""Goodput: the share of a run's wall time that trained it, and where the rest went, from the rows of events.jsonl.

    start-up     a process began -> ready: imports, data, program, restored state
    compilation  ready -> the first step of the attempt is done
    evaluation, saving    the seconds that these rows name
    lost         steps that a later attempt did again, for they came after the last save
    down         last sign of an attempt -> the next process begins
    other        what fits none of these, such as the end of a run after its last step

Within an attempt every time is a difference of `clock`, which no change of the machine's time disturbs. Gaps between
attempts can be read off `wall` alone. A gap below 0 counts as 0; one above 30 days is taken for a changed clock, not
for a pause, and counts as 0 too; `jumps` counts both. A killed attempt ends at its last row, what it did after that is
part of "down". Steps after the last save of a run that was not taken up again count as trained until it is.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

CAUSES = ("start-up", "compilation", "evaluation", "saving", "lost", "down", "other")
LONGEST_GAP = 30 * 86400.0
CLOCKS_AGREE = 2.0  # seconds by which the clocks of two hosts may differ
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds of a run or of many. wall = trained + the sum of `causes` (one entry per CAUSES).

    jumps: gaps between attempts left out, because the machine's time was changed meanwhile.
    """

    wall: float
    trained: float
    causes: dict[str, float]
    attempts: int
    jumps: int = 0

    @property
    def share(self) -> float:
        """Part of the wall time that trained, 0 to 1; 0 where there was no time at all."""
        return self.trained / self.wall if self.wall else 0.0

    def text(self) -> str:
        """One line: share, time, the causes of at least half a per cent, attempts."""
        if not self.wall:
            return "no time recorded"
        parts = [f"{cause} {self.causes[cause] / self.wall:.1%}" for cause in CAUSES if self.causes[cause] > 0]
        shown = [part for part in parts if float(part.split()[-1].rstrip("%")) >= 0.5]
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        jumped = f", {self.jumps} gaps unknown (the clock was changed)" if self.jumps else ""
        return f"{self.share:.1%} of {_duration(self.wall)} trained; {', '.join([*shown, times])}{jumped}"


@dataclasses.dataclass
class _Piece:
    """Seconds in which the steps after `first`, up to `last`, were done."""

    first: int
    last: int
    seconds: float


def goodput(rows: Sequence[Row]) -> Goodput:
    """The goodput of one run from the rows of its events.jsonl (events.py `read_events`), in any state of the run."""
    found = dict.fromkeys(CAUSES, 0.0)
    pieces: list[_Piece] = []
    attempts = _attempts(rows)
    jumps, ended = 0, None
    for attempt in attempts:
        began = attempt[0]["wall"] - attempt[0]["clock"]
        if ended is not None:
            gap = began - ended
            jumps += not -CLOCKS_AGREE <= gap <= LONGEST_GAP
            found["down"] += gap if 0 <= gap <= LONGEST_GAP else 0.0
        ended = attempt[-1]["wall"]
        found["lost"] += sum(_take_back(pieces, row["step"]) for row in attempt if row["event"] == "ready")
        _account(attempt, found, pieces)
    trained = math.fsum(piece.seconds for piece in pieces)
    return Goodput(trained + sum(found.values()), trained, found, len(attempts), jumps)


def summary(goodputs: Iterable[Goodput]) -> Goodput:
    """Many runs as one: all times, attempts and jumps added up."""
    found = list(goodputs)
    causes = {cause: math.fsum(one.causes[cause] for one in found) for cause in CAUSES}
    trained = math.fsum(one.trained for one in found)
    attempts, jumps = sum(one.attempts for one in found), sum(one.jumps for one in found)
    return Goodput(trained + sum(causes.values()), trained, causes, attempts, jumps)


def _attempts(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by attempt, in order. A clock that begins anew is another attempt, whose first row was not written."""
    numbered: dict[int, list[Row]] = {}
    for row in rows:
        numbered.setdefault(row["attempt"], []).append(row)
    found: list[list[Row]] = []
    for number in sorted(numbered):
        last = math.inf
        for row in numbered[number]:
            if row["clock"] < last - 1.0 or row["event"] == "start":
                found.append([])
            found[-1].append(row)
            last = row["clock"]
    return found


def _take_back(pieces: list[_Piece], step: int) -> float:
    """Seconds of the pieces' steps after `step`, which are done again; the pieces keep the rest."""
    lost = 0.0
    for piece in pieces:
        if piece.last > step:
            kept = max(step, piece.first)
            again = piece.seconds * (piece.last - kept) / (piece.last - piece.first)
            piece.seconds, piece.last = piece.seconds - again, kept
            lost += again
    pieces[:] = [piece for piece in pieces if piece.last > piece.first]
    return lost


def _account(attempt: list[Row], found: dict[str, float], pieces: list[_Piece]) -> None:
    """Add the time of one attempt to the causes, and its steps to the pieces."""
    phase, clock, step = "start-up", 0.0, 0
    for row in attempt:
        seconds = max(0.0, row["clock"] - clock)
        clock += seconds
        named = {"evaluation": "evaluation", "save": "saving"}.get(row["event"])
        if named is not None:
            spent = min(seconds, max(0.0, row.get("seconds", 0.0)))
            found[named] += spent
            seconds -= spent
        if phase != "steps":  # a run taken up at its last step evaluates and never compiles
            found[phase if row["event"] in ("ready", "compiled", *_BEFORE_STEPS[phase]) else "other"] += seconds
        elif row.get("step", 0) > step:
            pieces.append(_Piece(step, row["step"], seconds))
        else:
            found["lost" if row["event"] == "failed" else "other"] += seconds
        phase = {"ready": "compilation", "compiled": "steps"}.get(row["event"], phase)
        step = row["step"] if row["event"] in ("ready", "compiled") else max(step, row.get("step", 0))


_BEFORE_STEPS = {"start-up": ("start", "failed", "preempted"), "compilation": ("failed", "preempted")}
"""phase -> the rows that may end it early and still leave its time its own."""


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
