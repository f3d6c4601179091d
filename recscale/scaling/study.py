"""The plan of a study, STUDY/study.yaml, written before its runs: what is asked, varied, measured, held out, left out.

`read_spec` reads it, `read_runs` finds the runs, `rows_of` turns both into the points of each surface law, and
`axis_specs` into the one-axis laws of a star design. The sha256 of the file stamps every figure made from it.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from recscale.scaling.collect import Excluded, Records, Row, collect
from recscale.scaling.laws import AxisSpec, SeedNoise, seed_noise
from recscale.scaling.points import Points
from recscale.scaling.sources import number
from recscale.scaling.study_file import Axis, Cut, Exclusion, StudySpec, read_spec

__all__ = [
    "Axis",
    "Cut",
    "Exclusion",
    "Group",
    "StudySpec",
    "Tables",
    "axis_specs",
    "read_runs",
    "read_spec",
    "rows_of",
]

FROZEN = ("runs.parquet", "runs.csv")
# Columns that stay text even where a value looks like a number.
TEXT = ("run_id", "study", "cell.name", "lineage", "config_hash", "code.revision", "model_name", "reason", "status")


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one surface law. name: "all", or the values of the spec's group columns ("data=ml1m, ...").

    rows: the runs in `points`, in its order (held-out ones too); points: None with a problem, where there are none;
    sweep: the runs of the learning-rate sweep, which no law is fitted to; noise: between seeds of the fitted runs.
    excluded: every other run of the group with its reason.
    """

    name: str
    rows: tuple[Row, ...]
    points: Points | None
    problem: str
    sweep: tuple[Row, ...]
    noise: SeedNoise
    excluded: tuple[Excluded, ...]

    @property
    def fitted_rows(self) -> list[Row]:
        """The runs that the fit sees."""
        if self.points is None:
            return []
        return [row for row, out in zip(self.rows, self.points.held_out_N, strict=True) if not out]

    @property
    def held_out_rows(self) -> list[Row]:
        """The runs that no fit sees."""
        if self.points is None:
            return []
        return [row for row, out in zip(self.rows, self.points.held_out_N, strict=True) if out]


@dataclasses.dataclass(frozen=True)
class Tables:
    """The runs of a study: one group per surface law, excluded runs without a group, and where they were read."""

    groups: tuple[Group, ...]
    excluded: tuple[Excluded, ...]
    source: str

    @property
    def every_excluded(self) -> list[Excluded]:
        """Excluded runs of all groups and of none."""
        return [*self.excluded, *(run for group in self.groups for run in group.excluded)]


def read_runs(study: str | Path, runs: str | Path | None = None) -> tuple[Records, str]:
    """The runs of a study and where they lie: `runs` (a folder of run records, or a flat table), else the frozen table
    STUDY/results/runs.parquet or runs.csv, else runs/NAME of the working folder. Raises FileNotFoundError, or
    ValueError for a table that names a run twice or not at all.

    A frozen table holds finished runs; STUDY/results/excluded.csv (run, status, reason) tells of the others.
    """
    study = Path(study)
    places = (
        [Path(runs)]
        if runs is not None
        else [*(study / "results" / name for name in FROZEN), Path("runs") / study.name]
    )
    place = next((place for place in places if place.exists()), None)
    if place is None:
        tried = ", ".join(map(str, places))
        raise FileNotFoundError(f"{study}: found no runs; looked for {tried}: run the study or give --runs FOLDER")
    if place.is_dir():
        return collect(place), str(place)
    rows = parquet.read_table(place).to_pylist() if place.suffix == ".parquet" else _frozen(place)
    names = [row.get("run_id") for row in rows]
    if doubled := sorted({str(name) for name in names if name is None or names.count(name) > 1}):
        raise ValueError(
            f"{place}: run_id {', '.join(doubled[:4])} is missing or occurs twice, expected one row per run"
        )
    listed = place.with_name("excluded.csv")
    excluded = [Excluded(row["run"], row["status"], row["reason"]) for row in _cells(listed)] if listed.exists() else []
    return Records(rows, excluded), str(place)


def _cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _frozen(path: Path) -> list[Row]:
    """Rows of a table that `collect.write_csv` wrote, with the types of the records; empty cells are left out."""
    return [{key: _value(key, text) for key, text in row.items() if text} for row in _cells(path)]


def _value(key: str, text: str) -> Any:
    if key in TEXT or key.startswith("versions."):
        return text
    if text in ("True", "False"):
        return text == "True"
    if text.startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError:  # a cell cut short is no list; what needs it says so
            return text
    value = number(text)
    if value is None:
        return text
    return int(text) if text.lstrip("+-").isdigit() else value


def value_of(row: Row, column: str) -> float | None:
    """A finite number of a row, None where it has none."""
    value = number(row.get(column))
    return value if value is not None and math.isfinite(value) else None


def equals(found: Any, wanted: Any) -> bool:
    """Whether a cell holds a value of the study file: as numbers where both are, else as text."""
    a, b = number(found), number(wanted)
    return a == b if a is not None and b is not None else str(found) == str(wanted)


def rows_of(spec: StudySpec, records: Records, source: str = "") -> Tables:
    """Sorts the runs into one group per law: fitted, held out, of the sweep, or excluded with the reason."""
    found: dict[str, list[Row]] = {}
    excluded = list(records.excluded)
    for row in records.rows:
        missing = [column for column in spec.group if row.get(column) is None]
        if missing:
            excluded.append(_left_out(row, f"has no {missing[0]}, by which the study is grouped"))
        else:
            found.setdefault(group_name(spec, row), []).append(row)
    groups = tuple(_group(spec, name, rows) for name, rows in sorted(found.items()))
    return Tables(groups, tuple(excluded), source)


def group_name(spec: StudySpec, row: Row) -> str:
    """The group of a row in words, by the last part of each group column; "all" where the study has one group."""
    return ", ".join(f"{column.rsplit('.', 1)[-1]}={row[column]}" for column in spec.group) or "all"


def _left_out(row: Row, reason: str) -> Excluded:
    return Excluded(str(row["run_id"]), str(row.get("status")), reason, row)


def _group(spec: StudySpec, name: str, rows: Sequence[Row]) -> Group:
    kept, sweep, excluded = [], [], []
    for row in rows:
        reason = _reason(spec, row)
        if spec.learning_rate_sweep and row.get(spec.learning_rate_sweep):
            sweep.append(row)
        elif reason:
            excluded.append(_left_out(row, reason))
        else:
            kept.append(row)
    held_out_N = np.array([is_held_out(spec, row) for row in kept], bool)
    noise = seed_noise([row for row, out in zip(kept, held_out_N, strict=True) if not out], spec.metric)
    points, problem = _points(spec, kept, held_out_N, noise)
    return Group(name, tuple(kept), points, problem, tuple(sweep), noise, tuple(excluded))


def is_held_out(spec: StudySpec, row: Row) -> bool:
    """Whether a run belongs to the rung that no fit sees."""
    return spec.held_out is not None and equals(row.get(spec.held_out.column), spec.held_out.value)


def _reason(spec: StudySpec, row: Row) -> str:
    """Why a run is no point; "" if it is one."""
    for exclusion in spec.exclude:
        if exclusion.meets(row):
            return f"declared beforehand: {exclusion.reason} ({exclusion.column} is {row.get(exclusion.column)})"
    if value_of(row, spec.metric) is None:
        found = row.get(spec.metric)
        return f"no {spec.metric}" if found is None else f"{spec.metric} is {found}, expected a finite number"
    for axis in spec.axes:
        value = value_of(row, axis.column)
        if value is None or value <= 0:
            return f"axis {axis.name}: {axis.column} is {row.get(axis.column)}, expected a number above 0"
    return ""


def _points(
    spec: StudySpec, rows: Sequence[Row], held_out_N: np.ndarray, noise: SeedNoise
) -> tuple[Points | None, str]:
    if not rows:
        return None, "no run can be used"
    known = noise.dof > 0 and noise.sd > 0
    points = Points.of(
        {axis.name: [float(row[axis.column]) for row in rows] for axis in spec.axes},
        [float(row[spec.metric]) for row in rows],
        sigma=noise.sd if known else None,
        sigma_dof=noise.dof if known else math.inf,
        run=[str(row["run_id"]) for row in rows],
        lineage=[str(row.get("lineage") or row["run_id"]) for row in rows],
        held_out=held_out_N,
        metric=spec.metric,
    )
    return points, ""


def axis_specs(spec: StudySpec, floors: Mapping[str, float]) -> list[AxisSpec]:
    """The one-axis laws of a star design, in the order of the file. Raises ValueError for a floor that is not known."""
    _, split, part, metric = spec.metric.split(".", 3)
    found = []
    for cut in spec.cuts:
        if isinstance(cut.floor, str) and cut.floor not in floors:
            known = ", ".join(repr(name) for name in floors) or "none"
            raise ValueError(
                f"{spec.path}: cuts.{cut.name}.floor: {cut.floor!r} is no known floor, expected of {known}"
            )
        floor = floors[cut.floor] if isinstance(cut.floor, str) else cut.floor
        found.append(
            AxisSpec(
                cut.name,
                cut.x,
                cut.label,
                cut.unit,
                _begins(cut.cells),
                metric,
                split,
                part,
                spec.metric_unit,
                floor,
                spec.cost.column,
                spec.cost.unit,
                spec.paired,
                cut.end,
            )
        )
    return found


def _begins(cells: Sequence[str]) -> Callable[[Row], bool]:
    """Predicate of a row: the name of its cell, up to the first "-", is one of these."""
    return lambda row: str(row["cell.name"]).split("-")[0] in cells
