"""From a law to the next runs: the best sizes under any costs, the frontier, gains per doubling, points to train next.

A cost is a function of the sizes by axis (training FLOPs, table bytes, seconds, serving FLOPs per request, rows of
data); a budget is its largest allowed value. K axes, B budgets, S draws, M candidates.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize
from scipy.stats import qmc

from recscale.scaling.forms import FORMS
from recscale.scaling.intervals import percentiles
from recscale.scaling.law import Gain, Law, Sizes

STARTS = 8
MOST_REPEATS = 2
Cost = Callable[[Mapping[str, Any]], Any]


def product_cost(kappa: float, *axes: str) -> Cost:
    """kappa times the product of axes: 6 N D is product_cost(6, "params", "tokens")."""
    return lambda x: kappa * math.prod(np.asarray(x[axis], np.float64) for axis in axes)


@dataclasses.dataclass(frozen=True)
class FittedCost:
    """A cost measured on runs: ln cost = c0 + sum_j c_j ln x_j; residual_sd in logs says how well that holds."""

    axes: tuple[str, ...]
    intercept: float
    exponents: dict[str, float]
    residual_sd: float

    def __call__(self, x: Mapping[str, np.ndarray]) -> np.ndarray:
        """Cost at sizes by axis."""
        log_cost = sum(self.exponents[axis] * np.log(np.asarray(x[axis], np.float64)) for axis in self.axes)
        return np.exp(self.intercept + log_cost)


def fitted_cost(x: Mapping[str, np.ndarray], cost_N: np.ndarray) -> FittedCost:
    """The log-linear cost of runs of sizes x (by axis, [N]). Raises ValueError for costs below 0 or too few runs."""
    cost_N = np.asarray(cost_N, np.float64)
    if len(cost_N) < len(x) + 2:
        raise ValueError(f"cost: found {len(cost_N)} runs, expected at least {len(x) + 2} for {len(x)} axes")
    if not (np.isfinite(cost_N) & (cost_N > 0)).all():
        raise ValueError(f"cost: found {cost_N[~(cost_N > 0)][:1]}, expected finite numbers above 0")
    design_NQ = np.stack([np.ones_like(cost_N), *(np.log(np.asarray(values, np.float64)) for values in x.values())], -1)
    solved, *_ = np.linalg.lstsq(design_NQ, np.log(cost_N), rcond=None)
    left = np.log(cost_N) - design_NQ @ solved
    sd = float(np.sqrt(np.square(left).sum() / max(len(cost_N) - len(solved), 1)))
    exponents = dict(zip(x, map(float, solved[1:]), strict=True))
    return FittedCost(tuple(x), float(solved[0]), exponents, sd)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The best sizes by axis, the metric there, the costs there, which budgets bind, decades beyond the data.

    at_reach: axes that stand as far from the data as they may: not the budget stopped them, nor the law.
    """

    sizes: dict[str, float]
    value: float
    costs: dict[str, float]
    binding: tuple[str, ...]
    decades: float
    at_reach: tuple[str, ...] = ()


def minimise(
    law: Law,
    budgets: Mapping[str, tuple[Cost, float]],
    *,
    fixed: Mapping[str, float] | None = None,
    reach: float = 1.5,
    params_P: np.ndarray | None = None,
    near: Mapping[str, float] | None = None,
    rises: bool | None = None,
) -> Allocation:
    """The sizes of best predicted metric whose costs stay within all budgets.

    budgets: name -> (cost, largest value). fixed: sizes that are not free. Sizes move at most `reach` decades beyond
    the fitted domain. params_P: another draw of the law; near: start there only. rises: whether a larger metric is
    better (default: whether the law rises from its smallest sizes to its largest). SLSQP in logs from 8 starts.
    Raises ValueError when no sizes within reach are affordable, or a budget or a fixed axis makes no sense.
    """
    fixed = dict(fixed or {})
    free = [axis for axis in law.axes if axis not in fixed]
    if set(fixed) - set(law.axes) or not free:
        raise ValueError(f"fixed: found {', '.join(fixed)}, expected some, not all, of {', '.join(law.axes)}")
    if wrong := {name: budget for name, (_, budget) in budgets.items() if not budget > 0}:
        raise ValueError(f"budgets: found {wrong}, expected numbers above 0")
    low_F = np.array([math.log(law.domain[axis][0]) for axis in free]) - reach * math.log(10)
    high_F = np.array([math.log(law.domain[axis][1]) for axis in free]) + reach * math.log(10)
    form = FORMS[law.form]
    theta_1P = (law.params_P if params_P is None else params_P)[None]
    smallest = {axis: low for axis, (low, _) in law.domain.items()}
    rising = bool(law.curve(law.corner())[0] > law.curve(smallest)[0]) if rises is None else rises
    sign = -1.0 if rising else 1.0
    scale = abs(float(law.curve(law.corner())[0])) or 1.0

    def sizes(log_F: np.ndarray) -> dict[str, float]:
        values = dict(zip(free, map(float, np.exp(log_F)), strict=True)) | fixed
        return {axis: values[axis] for axis in law.axes}

    def value(log_F: np.ndarray) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            found = float(form.predict(theta_1P, form.coordinates(law.sizes(sizes(log_F))))[0, 0])
        return sign * found / scale if math.isfinite(found) else 1e9

    def spare(name: str) -> Callable[[np.ndarray], float]:
        cost, budget = budgets[name]
        return lambda log_F: math.log(budget) - math.log(float(np.ravel(cost(sizes(log_F)))[0]))

    rules = [{"type": "ineq", "fun": spare(name)} for name in budgets]
    if near is None:
        unit = qmc.Sobol(len(free), rng=np.random.default_rng(0)).random(STARTS)
        begin = low_F + unit * (high_F - low_F)
    else:
        begin = np.log([[near[axis] for axis in free]])
    best = None
    for start_F in begin:
        found = optimize.minimize(
            value,
            start_F,
            method="SLSQP",
            bounds=list(zip(low_F, high_F, strict=True)),
            constraints=rules,
            options={"ftol": 1e-13, "maxiter": 300},
        )
        affordable = all(rule["fun"](found.x) >= -1e-6 for rule in rules)
        if affordable and (best is None or found.fun < best.fun):
            best = found
    if best is None:
        asked = ", ".join(f"{name} <= {budget:.3g}" for name, (_, budget) in budgets.items())
        raise ValueError(f"no sizes within {reach} decades of the data are affordable with {asked}")
    chosen = sizes(best.x)
    costs = {name: float(np.ravel(cost(chosen))[0]) for name, (cost, _) in budgets.items()}
    binding = tuple(name for name, (_, budget) in budgets.items() if costs[name] > budget * (1 - 1e-3))
    decades = float(law.decades_beyond(chosen)[0])
    edge_F = (best.x - low_F < 1e-3) | (high_F - best.x < 1e-3)
    at_reach = tuple(axis for axis, edge in zip(free, edge_F, strict=True) if edge)
    return Allocation(chosen, sign * float(best.fun) * scale, costs, binding, decades, at_reach)


def product_optimum(law: Law, budget: float, kappa: float, params_P: np.ndarray | None = None) -> tuple[float, float]:
    """The closed form for a two-axis additive law and C = kappa N D: N* = G (C/kappa)^(beta/(alpha+beta)), D*."""
    _, a, b, alpha, beta = law.params_P if params_P is None else params_P
    gain = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    first = gain * (budget / kappa) ** (beta / (alpha + beta))
    return float(first), float(budget / (kappa * first))


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The best allocation at each budget: sizes by axis [B] and the metric, with 90 % bands over bootstrap draws."""

    cost: str
    budget_B: np.ndarray
    best: tuple[Allocation, ...]
    sizes: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    value: tuple[np.ndarray, np.ndarray, np.ndarray]
    draws: int


def frontier(
    law: Law,
    cost: Cost,
    budget_B: Sequence[float] | np.ndarray,
    *,
    name: str = "cost",
    others: Mapping[str, tuple[Cost, float]] | None = None,
    fixed: Mapping[str, float] | None = None,
    draws: int = 60,
    reach: float = 1.5,
    rises: bool | None = None,
) -> Frontier:
    """The frontier of one cost, other budgets (such as serving FLOPs) held, with bands over `draws` bootstrap draws."""
    budget_B = np.asarray(budget_B, np.float64)
    picked_SP = law.draws_SP[np.linspace(0, len(law.draws_SP) - 1, min(draws, len(law.draws_SP))).astype(int)]
    best, sized, valued = [], [], []
    for budget in budget_B:
        limits = dict(others or {}) | {name: (cost, float(budget))}
        found = minimise(law, limits, fixed=fixed, reach=reach, rises=rises)
        best.append(found)
        rows = []
        for params_P in picked_SP:
            try:
                again = {"params_P": params_P, "near": found.sizes, "rises": rises}
                rows.append(minimise(law, limits, fixed=fixed, reach=reach, **again))
            except ValueError:
                continue
        sized.append([[row.sizes[axis] for axis in law.axes] for row in rows] or [[math.nan] * len(law.axes)])
        valued.append([row.value for row in rows] or [math.nan])
    bands = [percentiles(np.array(rows)) for rows in sized]
    sizes = {
        axis: (
            np.array([found.sizes[axis] for found in best]),
            np.array([low[index] for low, _ in bands]),
            np.array([high[index] for _, high in bands]),
        )
        for index, axis in enumerate(law.axes)
    }
    ends = [percentiles(np.array(rows)) for rows in valued]
    value = (
        np.array([f.value for f in best]),
        np.array([low for low, _ in ends]),
        np.array([high for _, high in ends]),
    )
    return Frontier(name, budget_B, tuple(best), sizes, value, len(picked_SP))


@dataclasses.dataclass(frozen=True)
class Doubling:
    """What a doubling of one axis buys and by what factor each cost grows with it."""

    axis: str
    gain: Gain
    factors: dict[str, float]


def doublings(
    law: Law, costs: Mapping[str, Cost] | None = None, at: Mapping[str, float] | None = None
) -> tuple[Doubling, ...]:
    """Gain per doubling of each axis at a place (default: the largest sizes fitted), largest first.

    Well identified even where exponents are not.
    """
    here = dict(at or law.corner())
    rows = []
    for axis in law.axes:
        twice = here | {axis: 2 * here[axis]}
        factors = {
            name: float(np.ravel(cost(twice))[0] / np.ravel(cost(here))[0]) for name, cost in dict(costs or {}).items()
        }
        rows.append(Doubling(axis, law.gain_per_doubling(axis, here), factors))
    return tuple(sorted(rows, key=lambda row: -abs(row.gain.value)))


@dataclasses.dataclass(frozen=True)
class NextPoint:
    """A run to train: its sizes, its cost, and the width of the interval at the target once it and those before it are
    in (a share of today's width)."""

    sizes: dict[str, float]
    cost: float
    width_left: float


def next_points(
    law: Law, candidates: Sizes, target: Mapping[str, float], *, cost: Cost, budget: float, most: int = 8
) -> tuple[NextPoint, ...]:
    """The runs that shrink the interval of the law at the target most per cost, within a budget, in order.

    Greedy design on the bootstrap draws: the law at target and candidates is treated as jointly normal, and a run with
    the law's run noise conditions it. Greedy by the cut and by the cut per cost, whichever leaves less of the interval.
    candidates: sizes [M] by axis; each is chosen at most twice. Raises ValueError for costs not above 0.
    """
    x_KM = law.sizes(candidates)
    columns = {axis: x_KM[index] for index, axis in enumerate(law.axes)}
    cost_M = np.array(np.broadcast_to(np.asarray(cost(columns), np.float64), x_KM.shape[1]))
    if not (cost_M > 0).all():
        raise ValueError(f"cost: found {cost_M.min():g} for a candidate, expected numbers above 0")
    drawn_SM = np.concatenate([law.drawn(columns), law.drawn({axis: target[axis] for axis in law.axes})], 1)
    noise_SM = law.drawn_runs(columns) - law.drawn(columns)
    drawn_SM = drawn_SM[np.isfinite(drawn_SM).all(1)]
    covariance, noise_M = np.cov(drawn_SM, rowvar=False), np.nanvar(noise_SM, axis=0)
    plans = [
        _greedy(covariance, noise_M, cost_M, weight_M, budget, most) for weight_M in (cost_M, np.ones_like(cost_M))
    ]
    chosen = min(plans, key=lambda plan: plan[-1][1] if plan else 1.0)
    return tuple(
        NextPoint({axis: float(x[index]) for axis, x in columns.items()}, float(cost_M[index]), left)
        for index, left in chosen
    )


def _greedy(
    covariance: np.ndarray, noise_M: np.ndarray, cost_M: np.ndarray, weight_M: np.ndarray, budget: float, most: int
) -> list[tuple[int, float]]:
    """(candidate, share of the target's standard deviation that is left), in the order chosen."""
    before, spent = covariance[-1, -1], 0.0
    times_M = np.zeros(len(cost_M), np.int64)
    found: list[tuple[int, float]] = []
    while len(found) < most and before > 0:
        spread_M = np.diag(covariance)[:-1] + noise_M
        cut_M = np.where(spread_M > 0, np.square(covariance[-1, :-1]) / np.maximum(spread_M, 1e-300), 0.0)
        cut_M = np.where((spent + cost_M <= budget) & (times_M < MOST_REPEATS), cut_M, -1.0)
        best = int(np.argmax(cut_M / weight_M))
        if cut_M[best] <= 1e-4 * before:
            break
        column = covariance[:, best : best + 1]
        covariance = covariance - column @ column.T / spread_M[best]
        spent += float(cost_M[best])
        times_M[best] += 1
        found.append((best, math.sqrt(max(covariance[-1, -1], 0.0) / before)))
    return found
