"""A table of runs as the points of a fit: which columns, which rows, and every problem of them at once."""

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recscale.scaling.collect import Excluded, Row
from recscale.scaling.points import Points
from recscale.scaling.sources import BadTable, Table, no_column, number

LINES_PER_COLUMN = 20
CONDITION = re.compile(r"\s*(?P<column>.+?)\s*(?P<sign><=|>=|==|!=|<|>)\s*(?P<value>.+?)\s*")
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """`column sign value`, e.g. loss<3.5; value is compared as a number where it is one."""

    column: str
    sign: str
    value: str

    @staticmethod
    def of(text: str) -> "Condition":
        """Reads a condition; raises ValueError for anything else."""
        match = CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f"found {text!r}, expected COLUMN SIGN VALUE with one of {' '.join(SIGNS)}, e.g. loss<3.5")
        return Condition(match["column"], match["sign"], match["value"])

    def holds(self, row: Row) -> bool:
        """Whether a row meets it; an ordering of what is no number never holds."""
        found, bound = row.get(self.column), number(self.value)
        if bound is not None and (value := number(found)) is not None:
            return SIGNS[self.sign](value, bound)
        if self.sign in ("==", "!="):
            return SIGNS[self.sign](str(found), self.value)
        return False


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which columns of a table become points. x: axis -> column; y: the metric. run: its name (None: as the kind says);
    lineage: the training trajectory; seed: rows that differ in it alone are replicates; held_out, where: conditions;
    parameters: of the form to fit, which needs three points each (0: not checked)."""

    x: Mapping[str, str]
    y: str
    run: str | None = None
    lineage: str | None = None
    seed: str | None = None
    held_out: Condition | None = None
    where: tuple[Condition, ...] = ()
    parameters: int = 0


def points_of(table: Table, choice: Choice) -> tuple[Points, list[Excluded]]:
    """The points of a table and every run left out, with its reason. Raises BadTable with all problems at once."""
    run_column = choice.run or table.run_column
    conditions = [*choice.where, *([choice.held_out] if choice.held_out else [])]
    named = [*choice.x.values(), choice.y, choice.run, choice.lineage, choice.seed, *(c.column for c in conditions)]
    problems = [line for name in dict.fromkeys(named) if name is not None for line in no_column(table, name)]
    if problems:
        raise BadTable(problems)
    chosen, excluded = [], list(table.excluded)
    for index, row in enumerate(table.rows):
        failed = next((condition for condition in choice.where if not condition.holds(row)), None)
        name = _named(row, run_column, "") if run_column else table.places[index]
        if failed is None:
            chosen.append((index, name))
        else:
            reason = f"{failed.column} is {row.get(failed.column)}, not {failed.sign} {failed.value}"
            excluded.append(Excluded(name or table.places[index], "left out", reason, row))
    rows, places = [table.rows[i] for i, _ in chosen], [table.places[i] for i, _ in chosen]
    names = [name for _, name in chosen]
    columns = {axis: _numbers(table, column, rows, places, True, problems) for axis, column in choice.x.items()}
    y_N = _numbers(table, choice.y, rows, places, False, problems)
    problems += _duplicates(table, run_column, names, places) if run_column else []
    held_out_N = np.array([choice.held_out is not None and choice.held_out.holds(row) for row in rows], bool)
    if choice.held_out and not held_out_N.any():
        held = choice.held_out
        problems.append(f"{table.source}: no run has {held.column} {held.sign} {held.value}: nothing is held out")
    fitted, needed = int((~held_out_N).sum()), 3 * choice.parameters
    if fitted < needed:
        left = f", {len(excluded)} runs are left out" if excluded else ""
        problems.append(
            f"{table.source}: {fitted} points to fit{left}; a form with {choice.parameters} parameters needs {needed}"
        )
    if problems:
        raise BadTable(problems)
    lineage = None
    if choice.lineage:  # a run that names no trajectory is one of its own
        lineage = [_named(row, choice.lineage, name) for row, name in zip(rows, names, strict=True)]
    sigma, dof = replicate_noise(columns, y_N, ~held_out_N) if choice.seed else (None, math.inf)
    points = Points.of(
        columns, y_N, sigma=sigma, sigma_dof=dof, run=names, lineage=lineage, held_out=held_out_N, metric=choice.y
    )
    return points, excluded


def _numbers(
    table: Table, column: str, rows: Sequence[Row], places: Sequence[str], positive: bool, problems: list[str]
) -> np.ndarray:
    """A column as floats; what is no finite (positive) number is added to `problems`, one line per row."""
    found, lines = [], []
    for row, place in zip(rows, places, strict=True):
        raw, value = row.get(column), number(row.get(column))
        head = f"{table.source}, {place}: {column} is"
        if value is None:
            lines.append(f"{head} {'empty' if raw is None else repr(raw)}, expected a number")
        elif not math.isfinite(value):
            lines.append(f"{head} {value}, expected a finite number: a diverged run is no point, leave it out")
        elif positive and value <= 0:
            lines.append(f"{head} {value:g}, expected a size above 0")
        found.append(math.nan if value is None else value)
    if len(lines) > LINES_PER_COLUMN:
        lines[LINES_PER_COLUMN:] = [f"{table.source}: {column}: {len(lines) - LINES_PER_COLUMN} more rows like these"]
    problems += lines
    return np.array(found, np.float64)


def _named(row: Row, column: str, missing: str) -> str:
    return missing if row.get(column) is None else str(row[column])


def _duplicates(table: Table, column: str, names: Sequence[str], places: Sequence[str]) -> list[str]:
    first: dict[str, str] = {}
    lines = []
    for name, place in zip(names, places, strict=True):
        if not name:
            lines.append(f"{table.source}, {place}: {column} is empty, expected the name of the run")
        elif name in first:
            lines.append(f"{table.source}, {place}: run {name!r} stands on {first[name]} already: a run is one row")
        first.setdefault(name, place)
    return lines


def replicate_noise(x: Mapping[str, np.ndarray], y_N: np.ndarray, chosen_N: np.ndarray) -> tuple[float | None, float]:
    """Pooled standard deviation of y between rows of equal sizes, and its degrees of freedom; (None, inf) without."""
    place_NK = np.stack(list(x.values()), axis=-1)[chosen_N]
    _, group_N = np.unique(place_NK, axis=0, return_inverse=True)
    group_N, y_N = group_N.ravel(), y_N[chosen_N]
    count_G = np.bincount(group_N)
    mean_G = np.bincount(group_N, y_N) / count_G
    dof = int(len(y_N) - len(count_G))
    sd = math.sqrt(float(np.square(y_N - mean_G[group_N]).sum()) / dof) if dof else 0.0
    return (sd, float(dof)) if sd > 0 else (None, math.inf)
