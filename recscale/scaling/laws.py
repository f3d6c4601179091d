"""From the table of runs to one law per axis: points, seed noise, fits, gain and cost of the next doubling."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recscale.scaling.collect import Row
from recscale.scaling.fits import Comparison, Gain, Law, compare
from recscale.scaling.points import Points

MINIMUM_DISTINCT = 3
FORMS = ("pow_floor", "log", "constant")
NO_GAIN = Gain(math.nan, math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class AxisSpec:
    """One axis of a study.

    name: short and unique, used in file names. x: key of a row or function of a row. label and unit: for the reader.
    cells: the name in `cell.axes` of the cells that belong to the axis, or a predicate of a row; None means `name`.
    metric, split, slice: the evaluation that is fitted, in metric_unit. floor: its known limit on this axis, if any.
    cost: key or function of a row for what a run costs, in cost_unit. paired: all cells are evaluated on the same
    examples, so the sampling error of the evaluation is common to all points and moves the floor, not the shape.
    end: why the axis cannot grow beyond its largest x, where it cannot; such an axis is fitted but never doubled.
    """

    name: str
    x: str | Callable[[Row], float]
    label: str
    unit: str
    cells: str | Callable[[Row], bool] | None = None
    metric: str = "nats"
    split: str = "test"
    slice: str = "all"
    metric_unit: str = "nats/event"
    floor: float | None = None
    cost: str | Callable[[Row], float] = "flops.train_total"
    cost_unit: str = "train FLOPs"
    paired: bool = True
    end: str = ""

    @property
    def evaluation(self) -> str:
        """Key of the fitted evaluation in a row."""
        return f"eval.{self.split}.{self.slice}.{self.metric}"

    def belongs(self, row: Row) -> bool:
        """Whether a run is a cell of this axis."""
        if callable(self.cells):
            return bool(self.cells(row))
        return (self.cells or self.name) in (row.get("cell.axes") or [])


@dataclasses.dataclass(frozen=True)
class SeedNoise:
    """sd: standard deviation between seeds of one cell, pooled; dof behind it; cells: (name, seeds, mean, sd)."""

    sd: float
    dof: int
    cells: tuple[tuple[str, int, float, float], ...]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a run at the largest x, what the next doubling adds, and their ratio, in `unit`."""

    now: float
    extra: float
    unit: str

    @property
    def factor(self) -> float:
        """Cost at 2x over cost at x."""
        return (self.now + self.extra) / self.now


@dataclasses.dataclass(frozen=True)
class AxisLaw:
    """All that is known of one axis. x_N, y_N, seeds_N, sigma_N (None if nothing is known), stderr_N of the evaluation.

    comparison is None, gain is NaN, and problem says why, when the axis cannot be fitted.
    unusable: (run_id, reason) of runs of this axis that have no x or no evaluation.
    """

    spec: AxisSpec
    x_N: np.ndarray
    y_N: np.ndarray
    sigma_N: np.ndarray | None
    stderr_N: np.ndarray
    seeds_N: np.ndarray
    noise_source: str
    comparison: Comparison | None = None
    gain: Gain = NO_GAIN
    cost: Cost | None = None
    problem: str = ""
    unusable: tuple[tuple[str, str], ...] = ()

    @property
    def fits(self) -> tuple[Law, ...]:
        """The fitted forms, certified or not; empty on an axis that could not be fitted."""
        return self.comparison.laws if self.comparison else ()

    @property
    def judgement(self) -> str:
        """What beats what, in one sentence."""
        return self.comparison.text if self.comparison else "not fitted"

    @property
    def quoted(self) -> str:
        """The form to quote, empty if none may be."""
        return self.comparison.best.form if self.comparison and self.comparison.best else ""

    @property
    def power(self) -> Law:
        """The fit of the power law with a floor, certified or not. Raises ValueError on an axis that has no fits."""
        if not self.comparison:
            raise ValueError(f"axis {self.spec.name}: {self.problem}")
        return self.comparison["pow_floor"]

    def at(self, x: np.ndarray | float) -> dict[str, np.ndarray | float]:
        """Sizes of this axis the way its laws take them."""
        return {self.spec.name: x}

    def floor_interval(self) -> tuple[float, float] | None:
        """90 % interval of the fitted floor, widened by the sampling error that all points of the evaluation share."""
        if not self.fits or not self.power.certified:
            return None
        value, (low, high) = self.power.params["E"], self.power.intervals["E"]
        shared = 1.645 * float(np.nanmedian(self.stderr_N)) if np.isfinite(self.stderr_N).any() else 0.0
        widened = value - math.hypot(value - low, shared)
        return max(widened, 0.0) if low >= 0 else widened, value + math.hypot(high - value, shared)

    def floor_sentence(self) -> str:
        """Whether the known floor lies in the interval of the fitted one, or that the fitted one is not identified."""
        interval, known = self.floor_interval(), self.spec.floor
        told = "" if known is None else f" The known floor is {known:.4f}."
        if not self.fits:
            return "Not fitted." + told
        if interval is None:
            return f"The floor is not identified ({'; '.join(self.power.reasons)})." + told
        found = f"{self.power.params['E']:.4f}, 90 % interval {interval[0]:.4f} to {interval[1]:.4f}"
        if self.power.verdicts["E"] == "not identified":
            return f"The floor is not identified (fitted {found})." + told
        if known is None:
            return f"The fitted floor is {found} ({self.power.verdicts['E']}); no floor is known."
        where = "inside" if interval[0] <= known <= interval[1] else "outside"
        return f"The known floor {known:.4f} lies {where} the interval of the fitted floor ({found})."


def seed_noise(rows: Sequence[Row], evaluation: str) -> SeedNoise:
    """Pooled standard deviation between runs that differ in nothing but the seed; dof 0 without replicates."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        place = tuple(sorted((k, repr(v)) for k, v in row.items() if k.startswith("cell.coordinates.")))
        if _finite(row.get(evaluation)) and place:
            groups.setdefault(place, []).append(row)
    cells, square, dof = [], 0.0, 0
    for members in groups.values():
        values = np.array([row[evaluation] for row in members], np.float64)
        if len(values) > 1:
            cells.append((str(members[0]["cell.name"]), len(values), float(values.mean()), float(values.std(ddof=1))))
            square += float(np.square(values - values.mean()).sum())
            dof += len(values) - 1
    sd = math.sqrt(square / dof) if dof else math.nan
    return SeedNoise(sd, dof, tuple(sorted(cells, key=lambda cell: -cell[1])))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(row: Row, source: str | Callable[[Row], float]) -> float | None:
    try:
        value = source(row) if callable(source) else row.get(source)
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return float(value) if value is not None and _finite(value) else None


def axis_law(rows: Sequence[Row], spec: AxisSpec, *, seed: int = 0, draws: int = 1000) -> AxisLaw:
    """Groups the runs of an axis by x, weighs them by the seed noise of the study, fits and judges the forms."""
    groups: dict[float, list[Row]] = {}
    unusable = []
    for row in rows:
        if spec.belongs(row):
            x = _read(row, spec.x)
            if x is None or x <= 0:
                unusable.append((str(row["run_id"]), f"axis {spec.name}: x is {x}, expected a number above 0"))
            elif not _finite(row.get(spec.evaluation)):
                unusable.append((str(row["run_id"]), f"axis {spec.name}: no {spec.evaluation}"))
            else:
                groups.setdefault(x, []).append(row)
    x_N = np.array(sorted(groups), np.float64)
    members_N = [groups[x] for x in x_N]
    y_N = np.array([np.mean([row[spec.evaluation] for row in rows]) for rows in members_N], np.float64)
    seeds_N = np.array([len(rows) for rows in members_N], np.int64)
    stderr_N = np.array([_stderr(rows, spec) for rows in members_N], np.float64)
    noise = seed_noise(rows, spec.evaluation)
    sigma_N, dof, source = _sigma(spec, noise, seeds_N, stderr_N)
    law = AxisLaw(spec, x_N, y_N, sigma_N, stderr_N, seeds_N, source, unusable=tuple(unusable))
    if len(x_N) < MINIMUM_DISTINCT:
        problem = f"{len(x_N)} distinct values of {spec.label}, needs at least {MINIMUM_DISTINCT} to fit anything"
        return dataclasses.replace(law, problem=problem)
    points = Points.of({spec.name: x_N}, y_N, sigma=sigma_N, sigma_dof=dof, metric=spec.metric)
    comparison = compare(points, FORMS, scale="identity", delta="lsq", seed=seed, draws=draws)
    gain, cost = comparison.gain_per_doubling(spec.name), _cost(spec, x_N, members_N)
    return dataclasses.replace(law, comparison=comparison, gain=gain, cost=cost)


def _stderr(rows: Sequence[Row], spec: AxisSpec) -> float:
    values = [_read(row, f"{spec.evaluation}.stderr") for row in rows]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _sigma(
    spec: AxisSpec, noise: SeedNoise, seeds_N: np.ndarray, stderr_N: np.ndarray
) -> tuple[np.ndarray | None, float, str]:
    stderr_known = len(stderr_N) > 0 and bool((np.nan_to_num(stderr_N) > 0).all())
    if noise.dof and noise.sd > 0:
        variance_N = noise.sd**2 / seeds_N
        if spec.paired or not stderr_known:
            return np.sqrt(variance_N), noise.dof, "seed replicates"
        return np.sqrt(variance_N + stderr_N**2), noise.dof, "seed replicates and evaluation error"
    if stderr_known and not spec.paired:
        return stderr_N, math.inf, "evaluation error"
    return None, math.inf, "residuals of the fit (no seed replicates)"


def _cost(spec: AxisSpec, x_N: np.ndarray, members_N: Sequence[Sequence[Row]]) -> Cost | None:
    """The next doubling extrapolated by the log-log slope of the cost between the last two x."""
    ends = []
    for rows in members_N[-2:]:
        values = [value for row in rows if (value := _read(row, spec.cost)) is not None]
        ends.append(float(np.mean(values)) if values else math.nan)
    if not all(value > 0 for value in ends):
        return None
    slope = math.log(ends[1] / ends[0]) / math.log(x_N[-1] / x_N[-2])
    return Cost(ends[1], ends[1] * (2**slope - 1), spec.cost_unit)
