"""Approaches 1 and 2 to compute-optimal sizes, for comparison with the surface fit; labelled as what they are.

Approach 1 fits a line through the envelope of all training curves. Approach 2 fits a parabola per budget and a line
through their minima. Both are biased even without noise unless exponents are equal and the grid is centred
(arXiv 2603.22339): show them, do not extrapolate from them.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

FEWEST_TO_FIT = 4
FEWEST_TO_TRUST = 5
OFF_CENTRE = 0.25  # of the range of ln size, between the minimum and the middle of the grid


@dataclasses.dataclass(frozen=True)
class PowerLine:
    """best = coefficient * budget^exponent through `count` optima; stderr of the exponent (NaN for two)."""

    coefficient: float
    exponent: float
    stderr: float
    count: int

    def at(self, budget: float) -> float:
        """The line at a budget: an extrapolation beyond the budgets seen is not to be trusted."""
        return self.coefficient * budget**self.exponent


def power_line(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, weight: np.ndarray | None = None
) -> PowerLine:
    """Least squares of ln y on ln x, weighted. Raises ValueError for fewer than two points or non-positive values."""
    x_N, y_N = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x_N) < 2 or len(x_N) != len(y_N):
        raise ValueError(f"power line: found {len(x_N)} and {len(y_N)} values, expected as many of both, at least two")
    if not ((x_N > 0) & (y_N > 0)).all():
        raise ValueError("power line: expected numbers above 0")
    weight_N = np.ones_like(x_N) if weight is None else np.asarray(weight, np.float64)
    middle = float(np.average(np.log(x_N), weights=weight_N))
    z_N = np.log(x_N) - middle
    level = float(np.average(np.log(y_N), weights=weight_N))
    square = float((weight_N * z_N**2).sum())
    if not square > 0:
        raise ValueError("power line: all x are equal, expected at least two values")
    slope = float((weight_N * z_N * (np.log(y_N) - level)).sum() / square)
    left_N = np.log(y_N) - level - slope * z_N
    n = len(x_N)
    stderr = math.sqrt(float((weight_N * left_N**2).sum()) / (n - 2) / square) if n > 2 else math.nan
    return PowerLine(math.exp(level - slope * middle), slope, stderr, n)


@dataclasses.dataclass(frozen=True)
class Profile:
    """One budget: sizes and losses, the parabola (a, b, c in ln size - middle), its minimum, and its quality marks.

    marks: "edge" (minimum not inside the grid), "curvature" (no minimum), "few" (< 5 points), "off-centre". used: the
    minimum enters the line (>= 4 points, positive curvature, interior).
    """

    budget: float
    size_N: np.ndarray
    loss_N: np.ndarray
    coefficients: tuple[float, float, float]
    best_size: float
    best_loss: float
    marks: tuple[str, ...]
    used: bool


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Approach 2: one profile per budget and the line through the usable minima, None with fewer than two."""

    profiles: tuple[Profile, ...]
    line: PowerLine | None


def isoflop(
    budget: Sequence[float] | np.ndarray, size: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray
) -> IsoFlop:
    """Approach 2 on runs grouped by budget, as they are labelled: nothing is rounded into a bucket."""
    budget_N, size_N, loss_N = (np.asarray(values, np.float64) for values in (budget, size, loss))
    if not (len(budget_N) == len(size_N) == len(loss_N) and (budget_N > 0).all() and (size_N > 0).all()):
        raise ValueError("isoflop: expected as many budgets, sizes and losses, budgets and sizes above 0")
    label_N = np.round(np.log(budget_N), 8)  # 6 N D of one budget differs in its last digits
    profiles = tuple(
        _profile(float(budget_N[label_N == b].mean()), size_N[label_N == b], loss_N[label_N == b])
        for b in np.unique(label_N)
    )
    used = [profile for profile in profiles if profile.used]
    line = power_line([p.budget for p in used], [p.best_size for p in used]) if len(used) > 1 else None
    return IsoFlop(profiles, line)


def _profile(budget: float, size_N: np.ndarray, loss_N: np.ndarray) -> Profile:
    order = np.argsort(size_N, kind="stable")
    size_N, loss_N = size_N[order], loss_N[order]
    log_N = np.log(size_N)
    middle = float(log_N.mean())
    marks = ["few"] if len(np.unique(size_N)) < FEWEST_TO_TRUST else []
    if len(size_N) < FEWEST_TO_FIT or len(np.unique(size_N)) < 3:
        return Profile(budget, size_N, loss_N, (math.nan,) * 3, math.nan, math.nan, tuple(marks), False)
    a, b, c = (float(v) for v in np.polyfit(log_N - middle, loss_N, 2))
    if not a > 0:
        return Profile(budget, size_N, loss_N, (a, b, c), math.nan, math.nan, (*marks, "curvature"), False)
    best = middle - b / (2 * a)
    inside = bool(log_N[0] < best < log_N[-1])
    if not inside:
        marks.append("edge")
    elif abs(best - (log_N[0] + log_N[-1]) / 2) > OFF_CENTRE * (log_N[-1] - log_N[0]):
        marks.append("off-centre")
    return Profile(budget, size_N, loss_N, (a, b, c), math.exp(best), c - b * b / (4 * a), tuple(marks), inside)


@dataclasses.dataclass(frozen=True)
class Envelope:
    """Approach 1: the runs on the lower envelope of loss against compute (indices, by compute) and the line of their
    sizes; the envelope hull is convex in logs."""

    index_N: np.ndarray
    line: PowerLine | None


def envelope(
    compute: Sequence[float] | np.ndarray, size: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray
) -> Envelope:
    """Approach 1: points of all curves on the lower convex hull of ln loss against ln compute."""
    compute_N, size_N, loss_N = (np.asarray(values, np.float64) for values in (compute, size, loss))
    if not ((compute_N > 0).all() and (size_N > 0).all() and (loss_N > 0).all()):
        raise ValueError("envelope: expected compute, sizes and losses above 0")
    order = np.lexsort((loss_N, compute_N))
    hull: list[int] = []
    for index in order:
        if hull and loss_N[index] >= loss_N[hull[-1]]:
            continue
        while len(hull) > 1 and _above(compute_N, loss_N, hull[-2], hull[-1], int(index)):
            hull.pop()
        hull.append(int(index))
    index_N = np.array(hull)
    line = power_line(compute_N[index_N], size_N[index_N]) if len(hull) > 2 else None
    return Envelope(index_N, line)


def _above(compute_N: np.ndarray, loss_N: np.ndarray, first: int, middle: int, last: int) -> bool:
    """Whether the middle point lies on or above the line from the first to the last, in logs."""
    x0, x1, x2 = (math.log(compute_N[i]) for i in (first, middle, last))
    y0, y1, y2 = (math.log(loss_N[i]) for i in (first, middle, last))
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
