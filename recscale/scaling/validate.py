"""Does a law predict? Rollouts, the held-out rung, and the two operations `predict` and `project`.

`predict` answers for runs that exist: predicted against actual. `project` answers where none does: it says how many
decades beyond the data it speaks, and refuses beyond 1.5 unless forced.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from recscale.scaling.fits import fit
from recscale.scaling.forms import FORMS
from recscale.scaling.law import Law, Sizes
from recscale.scaling.points import Points

FARTHEST_DECADES = 1.5
MINIMUM_LEVELS = 3


class TooFar(ValueError):
    """A projection farther beyond the data than a law may speak."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted against actual for M runs: value and 90 % prediction interval, decades beyond the fitted domain."""

    run_M: tuple[str, ...]
    predicted_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray
    actual_M: np.ndarray
    decades_M: np.ndarray

    def __len__(self) -> int:
        return len(self.actual_M)

    @property
    def error_M(self) -> np.ndarray:
        """ln predicted - ln actual where both are above 0, else the relative error."""
        if (self.predicted_M > 0).all() and (self.actual_M > 0).all():
            return np.log(self.predicted_M) - np.log(self.actual_M)
        return (self.predicted_M - self.actual_M) / np.maximum(np.abs(self.actual_M), 1e-300)

    @property
    def rmsle(self) -> float:
        """Root mean square of `error_M`."""
        return float(np.sqrt(np.square(self.error_M).mean())) if len(self) else math.nan

    @property
    def bias(self) -> float:
        """Mean of `error_M`: above 0 where the law promises a larger metric than came."""
        return float(self.error_M.mean()) if len(self) else math.nan

    @property
    def worst(self) -> float:
        """Largest absolute `error_M`."""
        return float(np.abs(self.error_M).max()) if len(self) else math.nan

    @property
    def coverage(self) -> float:
        """Share of runs inside their 90 % prediction interval."""
        inside = (self.low_M <= self.actual_M) & (self.actual_M <= self.high_M)
        return float(inside.mean()) if len(self) else math.nan

    def text(self) -> str:
        """One sentence."""
        if not len(self):
            return "No run to predict."
        return (
            f"{len(self)} runs, up to {self.decades_M.max():.2f} decades beyond: RMSLE {self.rmsle:.3%}, "
            f"bias {self.bias:+.3%}, worst {self.worst:.3%}, {self.coverage:.0%} inside the 90 % prediction interval."
        )


def predict(law: Law, x: Sizes, actual: Sequence[float] | np.ndarray, run: Sequence[str] | None = None) -> Prediction:
    """Predicted against actual for runs that exist, at sizes x by axis."""
    actual_M = np.atleast_1d(np.asarray(actual, np.float64))
    value_M, low_M, high_M = law.prediction(x)
    if len(value_M) != len(actual_M):
        raise ValueError(f"actual: found {len(actual_M)} values for {len(value_M)} sizes")
    names = tuple(run) if run is not None else tuple(str(index) for index in range(len(actual_M)))
    return Prediction(names, value_M, low_M, high_M, actual_M, law.decades_beyond(x))


def predict_points(law: Law, points: Points) -> Prediction:
    """`predict` on points."""
    return predict(law, points.x, points.y_N, points.run_N)


def held_out_test(law: Law, points: Points) -> Prediction:
    """The law against the held-out rung; raises ValueError where the points were not those of the law, or have none."""
    if points.fitted.data_hash != law.data_hash:
        raise ValueError("points: found other data than the law was fitted to, expected the same with a held-out rung")
    if not points.held_out_N.any():
        raise ValueError("points: found no held-out run, expected a rung at least 4x beyond the fitted ones")
    return predict_points(law, points.held_out)


@dataclasses.dataclass(frozen=True)
class Projection:
    """The law where no run exists: value, 90 % interval of a new run, decades beyond the data; text says so."""

    value_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray
    decades_M: np.ndarray
    text: str


def project(law: Law, x: Sizes, force: bool = False) -> Projection:
    """What the law says where no run exists. Raises TooFar beyond 1.5 decades or for a refused law, unless force."""
    decades_M = law.decades_beyond(x)
    farthest = float(decades_M.max())
    distance = f"{farthest:.2f} decades beyond the data" if farthest > 0 else "inside the range of the data"
    if not law.certified and not force:
        raise TooFar(f"{law.form} is not certified ({'; '.join(law.reasons)}): force it to see what it would say")
    if farthest > FARTHEST_DECADES and not force:
        raise TooFar(
            f"{distance}, a law speaks for at most {FARTHEST_DECADES}: train larger runs, or force it and say so"
        )
    value_M, low_M, high_M = law.prediction(x)
    bottom, top = (0.0, 1.0) if law.form == "ceiling" else (0.0 if law.scale == "log" else -math.inf, math.inf)
    if not ((value_M > bottom) & (value_M < top)).all() and not force:
        raise TooFar(
            f"{law.form} gives {law.metric} = {value_M[~((value_M > bottom) & (value_M < top))][0]:.4g} {distance}: "
            "it has left the range of the metric"
        )
    forced = "" if law.certified and farthest <= FARTHEST_DECADES else " (forced)"
    return Projection(value_M, low_M, high_M, decades_M, f"Projection {distance}{forced}: no run was made here.")


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Fits on ever more levels of an axis, each tested on all later ones. problems: (levels, why there was no fit).

    steps: (largest level fitted, runs fitted, prediction of all runs beyond).
    """

    axis: str
    form: str
    steps: tuple[tuple[float, int, Prediction], ...]
    problems: tuple[tuple[float, str], ...]

    def pooled(self) -> Prediction:
        """All predictions together; raises ValueError where there are none."""
        if not self.steps:
            raise ValueError(f"rollout along {self.axis}: no step could be fitted: {self.problems}")
        parts = [prediction for _, _, prediction in self.steps]
        names = ("predicted_M", "low_M", "high_M", "actual_M", "decades_M")
        arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
        return Prediction(sum((part.run_M for part in parts), ()), *arrays)


def rollout(points: Points, axis: str, form: str, along: np.ndarray | None = None, **options: Any) -> Rollout:
    """Leave-future-out along one axis: expanding windows of at least 3 levels, each predicting every later run.

    along: sizes [N] to roll along that are no axis of the law, such as the compute of each run. The held-out rung is
    never seen. Fits that lack their certificate count where only points are lacking; others are listed as problems.
    """
    if along is None and axis not in points.axes:
        raise ValueError(f"axis: found {axis!r}, expected one of {', '.join(points.axes)}, or sizes to roll along")
    order_N = points.x[axis] if along is None else np.asarray(along, np.float64)
    kept = ~points.held_out_N
    seen, order_N = points.select(kept), order_N[kept]
    levels = np.unique(order_N)
    needed = max(MINIMUM_LEVELS, 1)
    steps, problems = [], []
    for level in levels[needed - 1 : -1]:
        window = order_N <= level
        if window.sum() < len(FORMS[form].names(seen.axes)) + 2:
            continue
        try:
            law = fit(seen.select(window), form, profiles=False, force=True, **options)
        except ValueError as error:
            problems.append((float(level), str(error)))
            continue
        if not law.certificate.minimum:
            problems.append((float(level), "; ".join(law.reasons)))
            continue
        steps.append((float(level), int(window.sum()), predict_points(law, seen.select(~window))))
    return Rollout(axis, form, tuple(steps), tuple(problems))


def rollout_levels(sizes_N: np.ndarray, most: int = 8) -> np.ndarray:
    """Sizes rounded up to at most `most` quantile levels, for a rollout over axes whose values all differ."""
    sizes_N = np.asarray(sizes_N, np.float64)
    if len(np.unique(sizes_N)) <= most:
        return sizes_N
    edges = np.quantile(sizes_N, np.linspace(0, 1, most + 1)[1:], method="higher")
    return edges[np.searchsorted(edges, sizes_N)]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How far the answers move with a choice: rows of (choice, law or None, reason it failed)."""

    rows: tuple[tuple[str, Law | None, str], ...]


def sensitivity(points: Points, law: Law, draws: int = 200, **options: Any) -> Sensitivity:
    """The law's form refitted with delta/10, 10 delta, least squares and least absolute deviations, without each end
    level of every axis, and without the smallest tenth of the runs."""
    seen = points.fitted
    width = law.delta
    choices: list[tuple[str, Points, str | float]] = []
    if math.isfinite(width):
        choices += [("delta / 10", seen, width / 10), ("10 delta", seen, 10 * width)]
    choices += [("least squares", seen, "lsq"), ("least absolute deviations", seen, "lad")]
    same = "lsq" if math.isinf(width) else width
    for axis, x in seen.x.items():
        for name, edge in (("smallest", x.min()), ("largest", x.max())):
            choices.append((f"without the {name} {axis}", seen.select(x != edge), same))
    rows: list[tuple[str, Law | None, str]] = []
    for name, some, delta in choices:
        try:
            rows.append(
                (name, fit(some, law.form, scale=law.scale, delta=delta, draws=draws, force=True, **options), "")
            )
        except ValueError as error:
            rows.append((name, None, str(error)))
    return Sensitivity(tuple(rows))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Of how many simulated studies each parameter's 90 % interval covered the truth it was drawn from."""

    studies: int
    covered: dict[str, int]


def calibration(points: Points, law: Law, studies: int = 100, seed: int = 0, draws: int = 300) -> Calibration:
    """Draws studies of the same design from the law and its noise, fits each the same way, and counts what is covered.

    Noise: sigma of the points where it is known (and then sigma itself is drawn as its degrees of freedom allow), else
    the residual spread of the law. An interval that says "90 %" should cover in about 90 of 100 studies.
    """
    rng = np.random.default_rng(seed)
    seen = points.fitted
    truth_N = law.curve(seen.x)
    known = seen.sigma_N is not None and law.sigma_trusted
    unit_N = np.full(len(seen), law.residual_sd) if seen.sigma_N is None or not known else seen.sigma_N
    relative = law.scale == "log" and not known
    judged = tuple(law.verdicts)
    covered = dict.fromkeys(judged, 0)
    for study in range(studies):
        moved_N = unit_N * rng.standard_normal(len(seen))
        y_N = truth_N * np.exp(moved_N) if relative else truth_N + moved_N
        sigma_N = seen.sigma_N
        if sigma_N is not None and math.isfinite(seen.sigma_dof):
            sigma_N = sigma_N * math.sqrt(rng.chisquare(seen.sigma_dof) / seen.sigma_dof)
        drawn = dataclasses.replace(seen, y_N=y_N, sigma_N=sigma_N)
        delta = "lsq" if math.isinf(law.delta) else "seed"
        found = fit(drawn, law.form, scale=law.scale, delta=delta, draws=draws, seed=study, force=True)
        for name in judged:
            low, high = found.intervals[name]
            covered[name] += low <= law.params[name] <= high
    return Calibration(studies, covered)
