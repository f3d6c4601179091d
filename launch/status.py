"""A live table of a study: one row per cell, from the files of the runs; the scheduler is asked for the rest."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch import cell_state
from launch.cell_state import State
from launch.study import Job
from recscale.goodput import summary

REFRESH_SECONDS = 2.0
COLUMNS = ("cell", "state", "step", "events/s", "loss", "ETA", "restarts", "goodput", "where")


def show(jobs: Sequence[Job], ask: Callable[[], Mapping[str, str]], live: bool) -> None:
    """Print the table: once in a pipe; on a terminal (live) every two seconds while anything runs, until Ctrl-C."""
    try:
        while True:
            states = {job.cell: cell_state.of(Path(job.workdir)) for job in jobs}
            text = table(states, ask())
            print(f"\033[H\033[2J{_fitted(text)}" if live else text, flush=True)
            if not live or not any(state.name == cell_state.RUNNING for state in states.values()):
                return
            time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        print()


def table(states: Mapping[str, State], asked: Mapping[str, str]) -> str:
    """Counts by state, a row per cell, the reasons of what failed, and the goodput of all runs together."""
    counts = Counter(state.name for state in states.values())
    rows = [COLUMNS, *(_row(cell, state, asked.get(cell, "")) for cell, state in states.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{len(states)} cells: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())
    notes = [f"{cell}: {state.reason}" for cell, state in states.items() if state.reason]
    spent = [state.goodput for state in states.values() if state.goodput is not None]
    return "\n".join([head, *lines, *notes, *(["goodput: " + summary(spent).text()] if spent else [])])


def _row(cell: str, state: State, asked: str) -> tuple[str, ...]:
    return (
        cell,
        state.name,
        f"{state.step}/{state.steps}" if state.steps else "",
        f"{state.events_per_second:,.0f}" if state.events_per_second else "",
        f"{state.loss:.4f}" if state.loss is not None else "",
        _duration(state.seconds_left) if state.seconds_left is not None else "",
        str(state.restarts) if state.restarts else "",
        f"{state.goodput.share:.0%}" if state.goodput is not None else "",
        state.where or asked,
    )


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _fitted(text: str) -> str:
    """Cut to the terminal: what does not fit would scroll the table away."""
    width, height = os.get_terminal_size(sys.stdout.fileno())
    lines = [line[: width - 1] for line in text.splitlines()]
    cut = [*lines[: height - 2], f"... {len(lines) - height + 2} more; in a pipe all are shown"]
    return "\n".join(lines if len(lines) < height else cut)
