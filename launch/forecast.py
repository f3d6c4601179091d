"""What a study will cost: per cell parameters, FLOPs, hours and money, before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ml_collections import ConfigDict

from launch import cell_state
from launch.cell_state import State
from launch.study import Study
from recscale import record
from recscale.data.event_log import EventLogError
from recscale.run import build, costs

COLUMNS = ("cell", "state", "parameters", "events", "FLOPs", "hours", "cost")


@dataclass(frozen=True)
class Forecast:
    """One cell. events, flops: of the whole training. hours and cost: None where unknown; 0 for what is done."""

    cell: str
    state: str
    parameters: int
    events: float
    flops: float
    hours: float | None
    cost: float | None


def forecast(study: Study, flops_per_second: float = 0.0, price: float = 0.0) -> list[Forecast]:
    """All cells of a study whose data are prepared.

    flops_per_second: of a cell on the hardware it will have; 0: the median of this study's finished cells, if any.
    price: of an hour of that hardware. Raises EventLogError where the data are missing, ValueError for a config that
    does not fit.
    """
    jobs = study.jobs
    states = {job.cell: cell_state.of(Path(job.workdir)) for job in jobs}
    speed = flops_per_second or measured([study.out / cell for cell, state in states.items() if state.finished])
    return [_one(cell, states[cell], study.config(cell), speed, price) for cell in states]


def measured(workdirs: Sequence[Path]) -> float:
    """Median FLOPs per second of finished runs; 0 without one."""
    books = [record.read(workdir) for workdir in workdirs]
    rates = [book["flops"]["train_total"] / book["seconds"]["wall"] for book in books if book["seconds"]["wall"] > 0]
    return median(rates) if rates else 0.0


def table(cells: Sequence[Forecast], price: float = 0.0) -> str:
    """One row per cell, and what is still to do in all."""
    rows = [COLUMNS, *map(_row, cells)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = []
    for row in rows:
        left = [value.ljust(width) for value, width in zip(row[:2], widths[:2], strict=True)]
        right = [value.rjust(width) for value, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    missing = [cell for cell in cells if cell.state not in cell_state.FINISHED]
    total = f"{len(cells)} cells, {len(cells) - len(missing)} done; to do: {sum(c.flops for c in missing):.3g} FLOPs"
    hours = [cell.hours for cell in missing if cell.hours is not None]
    if len(hours) < len(missing):
        total += "; hours are unknown until a cell has run, or say --set flops_per_second=..."
    elif missing:
        total += f", {sum(hours):.2f} hours of the hardware of one cell"
        total += f", {sum(hours) * price:,.2f} at {price:g} an hour" if price else ""
    return "\n".join([*lines, total])


def _one(cell: str, state: State, config: ConfigDict, speed: float, price: float) -> Forecast:
    config = config.copy_and_resolve_references().unlock()
    config.mesh.update({"replica": 1, "data": 1, "model": 1})  # neither cost nor size depends on the mesh
    try:
        run = build(config.lock())
    except EventLogError as error:
        raise EventLogError(f"cell {cell}: {error}") from error
    found: Mapping = costs(run, run.steps)
    flops = found["flops"]["train_total"]
    hours = 0.0 if state.finished else flops / speed / 3600 if speed else None
    events = run.steps * config.loader.batch_size / run.loader.num_rows * run.loader.real_tokens
    total = sum(found["parameters"].values())
    return Forecast(
        cell, state.name, total, events, flops, hours, None if hours is None or not price else hours * price
    )


def _row(cell: Forecast) -> tuple[str, ...]:
    return (
        cell.cell,
        cell.state,
        f"{cell.parameters:,}",
        f"{cell.events:,.0f}",
        f"{cell.flops:.3g}",
        "" if cell.hours is None else f"{cell.hours:.3f}",
        "" if cell.cost is None else f"{cell.cost:,.2f}",
    )
