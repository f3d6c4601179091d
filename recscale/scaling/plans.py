"""Sweep plans: which points of the axes to train. Sizes are never written by hand: a `measure` gives them.

A point is {axis: level}; a level is whatever the study's config understands (a number, or a tuple such as width and
depth). `measure(point)` builds the config of a point and returns its sizes by column of the run table, e.g.
{"parameters.tables": ..., "seen.events": ..., "flops.train_total": ...}: `costs` and `seen` of recscale.run give them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import qmc

Point = dict[str, Any]
Measure = Callable[[Point], Mapping[str, float]]

COST = "flops.train_total"
MOST_DRAWS = 2**16
DECADES, LEVELS, CORRELATION, RUNG = 1.5, 5, 0.8, 4.0  # what check_plan asks for


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A point and its sizes by column of the run table."""

    levels: Point
    sizes: Mapping[str, float]


def sobol(
    axes: Mapping[str, Sequence[Any]], count: int, seed: int = 0, keep: Callable[[Point], bool] | None = None
) -> list[Point]:
    """`count` distinct points by a scrambled Sobol sequence over the levels of each axis, which stand evenly.

    The first points of a longer plan are the points of a shorter one, so that a study may stop early. keep: leaves out
    points, e.g. those beyond a budget. Raises ValueError where an axis has no levels or too few points are left.
    """
    short = [name for name, levels in axes.items() if len(levels) < 2]
    if short or count < 1:
        raise ValueError(f"sobol: axes {short} have fewer than 2 levels, count = {count}: expected at least 2 and 1")
    sequence = qmc.Sobol(len(axes), scramble=True, rng=seed)
    found: dict[tuple[int, ...], Point] = {}
    refused: set[tuple[int, ...]] = set()
    number = np.array([len(levels) for levels in axes.values()])
    for _ in range(MOST_DRAWS):
        place = tuple(int(i) for i in np.floor(sequence.random(1)[0] * number))
        if place not in found and place not in refused:
            point = {name: levels[i] for (name, levels), i in zip(axes.items(), place, strict=True)}
            if keep is not None and not keep(point):
                refused.add(place)
            else:
                found[place] = point
        if len(found) == count:
            return list(found.values())
        if len(found) + len(refused) == math.prod(number):
            break
    raise ValueError(
        f"sobol: asked for {count} points, found {len(found)} and left out {len(refused)} of {math.prod(number)}: "
        "give more levels, or a larger budget"
    )


def ladder(base: Mapping[str, float], factors: Mapping[str, float], rungs: int) -> list[Point]:
    """`rungs` points that grow together: rung k has level base * factor^k on each axis of `factors`, rounded.

    Axes of `base` alone stay where they are. Raises ValueError for a factor of an axis that `base` lacks, or one that
    does not grow.
    """
    unknown = set(factors) - set(base)
    if unknown or rungs < 2 or any(factor <= 1 for factor in factors.values()):
        raise ValueError(
            f"ladder: factors {dict(factors)}, rungs = {rungs}: expected factors above 1 of axes of {sorted(base)} and "
            "at least 2 rungs"
        )
    return [
        {
            axis: max(1, round(level * factors[axis] ** rung)) if axis in factors else level
            for axis, level in base.items()
        }
        for rung in range(rungs)
    ]


def isoflop(
    budgets: Sequence[float],
    sizes: Sequence[Point],
    measure: Measure,
    data: str,
    most: int,
    cost: str = COST,
) -> list[Candidate]:
    """For each budget and each model size, the point whose data level spends the budget.

    data: the axis of the data, whose levels are whole numbers of 1 to `most`; the cost must grow with it. A size whose
    smallest run costs more than the budget, or whose largest costs less, has no point at that budget.
    """
    found = []
    for budget in budgets:
        for size in sizes:
            level = _spends(budget, lambda n, size=size: measure(size | {data: n})[cost], most)
            if level is not None:
                point = size | {data: level}
                found.append(Candidate(point, measure(point)))
    return found


def _spends(budget: float, cost: Callable[[int], float], most: int) -> int | None:
    """The largest whole number in 1..most whose cost is within the budget; None where the budget is out of reach."""
    low, high = 1, most
    if cost(low) > budget or cost(high) < budget:
        return None
    while high - low > max(0, low // 100):  # to one percent
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def measured(points: Sequence[Point], measure: Measure) -> list[Candidate]:
    """The points with their sizes."""
    return [Candidate(point, measure(point)) for point in points]


def within(
    candidates: Sequence[Candidate], total: float, cost: str = COST, seconds: Callable[[float], float] | None = None
) -> list[Candidate]:
    """The first candidates, in their order, whose costs together stay within `total`; a dearer one is passed over.

    seconds: turns the cost of one run into seconds, and then `total` is in seconds. A run has a fixed part, so give a
    function that was measured, e.g. lambda flops: 8 + flops / 2e10.
    """
    kept, spent = [], 0.0
    for candidate in candidates:
        price = candidate.sizes[cost]
        price = seconds(price) if seconds else price
        if spent + price <= total:
            kept.append(candidate)
            spent += price
    return kept


def check_plan(
    fitted: Sequence[Mapping[str, Any]],
    axes: Mapping[str, str],
    held_out: Sequence[Mapping[str, Any]],
    minimum_decades: Mapping[str, float] | None = None,
    cost: str = COST,
    parameters: int | None = None,
) -> list[str]:
    """What keeps a plan from carrying a law, one sentence per finding; an empty list: nothing was found.

    fitted, held_out: rows of sizes by column, one per run. axes: axis -> its column. minimum_decades: per axis, where
    it is not 1.5. parameters: of the largest form (additive: one, and two per axis). Source: the demands on a sweep of
    arXiv 2203.15556 and its replications: span, levels, 3 runs per parameter, uncorrelated axes, a rung left out.
    """
    wanted = minimum_decades or {}
    p = parameters or 1 + 2 * len(axes)
    found = []
    if len(fitted) < 3 * p:
        found.append(f"{len(fitted)} fitted runs: expected {3 * p}, three for each of {p} parameters")
    logs = {name: np.log10([float(row[column]) for row in fitted]) for name, column in axes.items()}
    for name, x in logs.items():
        least, span, levels = wanted.get(name, DECADES), float(np.ptp(x)), len(np.unique(np.round(x, 9)))
        if span < least:
            found.append(f"axis {name} spans {span:.2f} decades: expected {least}")
        if levels < LEVELS:
            found.append(f"axis {name} has {levels} levels: expected {LEVELS}")
    for (one, x), (other, y) in itertools.combinations(logs.items(), 2):
        if np.ptp(x) and np.ptp(y) and abs(rho := float(np.corrcoef(x, y)[0, 1])) >= CORRELATION:
            found.append(f"axes {one} and {other} are correlated by {rho:.2f}: expected less than {CORRELATION}")
    return found + _check_rung([float(row[cost]) for row in fitted], [float(row[cost]) for row in held_out], cost)


def _check_rung(fitted: Sequence[float], held_out: Sequence[float], cost: str) -> list[str]:
    if not held_out:
        return ["no run is held out: expected a rung beyond the fitted ones"]
    factor = min(held_out) / max(fitted)
    if factor < RUNG:
        return [f"the held-out rung has {factor:.2f} times the {cost} of the largest fitted run: expected {RUNG:g}"]
    return []
