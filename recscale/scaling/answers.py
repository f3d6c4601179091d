"""What a study says of one group: gain and cost of the next doubling, the best sizes for a budget, the next runs.

Nothing is answered from a fit without its certificate: `problem` says what would make it carry.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from recscale.scaling.allocate import FittedCost, Frontier, NextPoint, fitted_cost, frontier, next_points
from recscale.scaling.estimate import POINTS_PER_PARAMETER
from recscale.scaling.evidence import gather
from recscale.scaling.figures import short_number
from recscale.scaling.findings import Evidence, numbers
from recscale.scaling.fits import Gain, Law
from recscale.scaling.study import Group
from recscale.scaling.study_file import Axis, StudySpec

FLAT_FORMS = ("log", "constant")  # they have no best mix of sizes: all goes to the axis with the best slope per cost
BUDGET_FACTORS = (0.25, 1.0, 4.0, 16.0)
ASKED_FACTOR = 4.0
FRONTIER_DRAWS = 30
REACH = 1.5  # decades beyond the data that the best sizes may lie
FREE = 1.01  # a doubling that multiplies the cost by no more is free
UNTOLD = 0.5  # an interval of the best metric wider than this share of it tells nothing
CANDIDATE_STEPS = (0.25, 1.0, 2.0, 4.0)  # of the largest fitted size
MOST_NEXT = 4


@dataclasses.dataclass(frozen=True)
class Doubled:
    """The next doubling of an axis: from `size`; gain > 0 is better, whichever way the metric goes.

    factor: what it multiplies the cost by, NaN where no cost is recorded.
    """

    axis: Axis
    size: float
    gain: Gain
    factor: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """A group with all that was found. law: the one to quote, else the first fitted, for inspection; None if none.

    doubled: largest gain first, empty without a certified law; cost: fitted to the runs, of the study's cost column;
    best: frontier at `budgets`, None for a law that has none; next_runs: to train; problem: why nothing is quoted.
    """

    group: Group
    evidence: Evidence
    law: Law | None
    quoted: bool
    doubled: tuple[Doubled, ...]
    cost: FittedCost | None
    best: Frontier | None
    next_runs: tuple[NextPoint, ...]
    problem: str

    @property
    def standing(self) -> str:
        """Certified or refused, for titles."""
        return "certified" if self.quoted else "refused, for inspection only"


def answer(spec: StudySpec, group: Group, *, draws: int = 500, seed: int = 0) -> Answer:
    """Fits the group, tests the law and asks it what to scale next."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a refused form may end at a floor of 0
        evidence = gather(spec, group, draws=draws, seed=seed)
    comparison = evidence.comparison
    if comparison is None:
        return Answer(group, evidence, None, False, (), None, None, (), evidence.problem)
    law = comparison.best or comparison.laws[0]
    cost = _cost(spec, group)
    if comparison.best is None:
        return Answer(group, evidence, law, False, (), cost, None, (), wanting(comparison.laws))
    doubled = _doubled(spec, evidence, law, cost)
    return Answer(
        group, evidence, law, True, doubled, cost, _best(spec, group, law, cost), _next_runs(spec, group, law, cost), ""
    )


def wanting(laws: Sequence[Law]) -> str:
    """What each refused form lacks: runs first, the rest only where there are enough of them."""
    short = [law for law in laws if law.certificate.n < POINTS_PER_PARAMETER * law.certificate.p]
    told = [f"{law.form} needs {POINTS_PER_PARAMETER * law.certificate.p}" for law in short]
    few = f"more runs: {', '.join(told)}, there are {short[0].n}" if short else ""
    other = [f"{law.form}: {'; '.join(law.reasons)}" for law in laws if law not in short]
    return ". ".join([*([few] if few else []), *other])


def _cost(spec: StudySpec, group: Group) -> FittedCost | None:
    assert group.points is not None
    rows = group.fitted_rows
    cost_N = numbers(rows, spec.cost.column)
    known = np.isfinite(cost_N) & (cost_N > 0)
    if not known.all():
        return None
    try:
        return fitted_cost(group.points.fitted.x, cost_N)
    except ValueError:  # fewer runs than the cost has parameters
        return None


def better(spec: StudySpec, gain: Gain) -> Gain:
    """A gain that is above 0 where the metric improves."""
    return gain if spec.direction == "falls" else Gain(-gain.value, -gain.high, -gain.low)


def _doubled(spec: StudySpec, evidence: Evidence, law: Law, cost: FittedCost | None) -> tuple[Doubled, ...]:
    assert evidence.comparison is not None
    here = law.corner()
    found = []
    for axis in spec.axes:
        gain = better(spec, evidence.comparison.gain_per_doubling(axis.name))
        factor = math.nan if cost is None else 2.0 ** cost.exponents[axis.name]
        found.append(Doubled(axis, here[axis.name], gain, factor))
    return tuple(sorted(found, key=lambda entry: -entry.gain.value))


def largest_cost(spec: StudySpec, group: Group) -> float:
    """Cost of the dearest fitted run; NaN where none is known."""
    cost_N = numbers(group.fitted_rows, spec.cost.column)
    return float(np.nanmax(cost_N)) if np.isfinite(cost_N).any() else math.nan


def _best(spec: StudySpec, group: Group, law: Law, cost: FittedCost | None) -> Frontier | None:
    if cost is None or law.form in FLAT_FORMS:
        return None
    budgets = largest_cost(spec, group) * np.array(BUDGET_FACTORS)
    try:
        return frontier(law, cost, budgets, name=spec.cost.unit, draws=FRONTIER_DRAWS, reach=REACH)
    except ValueError:  # no sizes near the data are that cheap
        return None


def _next_runs(spec: StudySpec, group: Group, law: Law, cost: FittedCost | None) -> tuple[NextPoint, ...]:
    """Runs that tell most of the law at twice the largest sizes, for four times the cost of the dearest run."""
    if cost is None:
        return ()
    corner = law.corner()
    steps = itertools.product(CANDIDATE_STEPS, repeat=len(corner))
    sizes_KM = np.array(list(steps)).T * np.array([*corner.values()])[:, None]
    candidates = dict(zip(corner, sizes_KM, strict=True))
    target = {axis: 2 * size for axis, size in corner.items()}
    budget = ASKED_FACTOR * largest_cost(spec, group)
    return next_points(law, candidates, target, cost=cost, budget=budget, most=MOST_NEXT)


def sized(spec: StudySpec, sizes: Mapping[str, float]) -> str:
    """Sizes in words: "data 1.2M events, encoder 40k parameters"."""
    units = {axis.name: axis.unit for axis in spec.axes}
    return ", ".join(f"{name} {short_number(value)} {units[name]}" for name, value in sizes.items())


def headline(answers: Sequence[Answer], blocking: Sequence[int]) -> str:
    """The first sentence of a report: for how many groups a law is certified, and what stands against it."""
    if not answers:
        return "No law is certified: the study has no finished run. Run its cells first."
    certified = [found for found in answers if found.quoted]
    against = ""
    if blocking:
        several = "s" if len(blocking) > 1 else ""
        against = f" The checklist blocks it: item{several} {', '.join(map(str, blocking))} (see below)."
    if not certified:
        return "No law is certified, so nothing is said of what to scale next." + against
    nulls = [found for found in certified if found.law is not None and found.law.form in FLAT_FORMS]
    where = "the one group" if len(answers) == 1 else f"{len(certified)} of {len(answers)} groups"
    told = f"A fit is certified for {where}"
    if nulls:
        which = "it is" if len(certified) == 1 else f"in {len(nulls)} of them it is"
        told += f"; {which} the logarithmic null: gains per doubling are known, no exponent and no floor"
    against = against.replace("blocks it", "still blocks quoting it as a law")
    return told + "." + against


def leading(spec: StudySpec, answers: Sequence[Answer]) -> list[str]:
    """What to scale next, per group: the axis of the largest gain per doubling, and per cost where that is another."""
    found = []
    for entry in answers:
        useful = [doubled for doubled in entry.doubled if doubled.gain.low > 0]
        head = "" if entry.group.name == "all" else f"{entry.group.name}: "
        if not entry.quoted:
            continue
        if not useful:
            found.append(f"{head}no axis is known to gain by a doubling.")
            continue
        first = useful[0]
        rivals = [doubled.axis.label for doubled in useful[1:] if doubled.gain.high >= first.gain.low]
        told = f"{head}{first.axis.label} ({first.gain.value:.4f} {spec.metric_unit} per doubling)"
        told += f", not settled against {', '.join(rivals)}" if rivals else ""
        cheap = max(useful, key=per_cost)
        if cheap is not first and per_cost(cheap) > per_cost(first):
            told += f"; per cost {cheap.axis.label}"
        found.append(told + ".")
    return found


def per_cost(entry: Doubled) -> float:
    """Gain per doubled cost, to first order; infinite where a doubling costs nothing, NaN where no cost is known."""
    if math.isnan(entry.factor):
        return math.nan
    return entry.gain.value / math.log2(entry.factor) if entry.factor > FREE else math.inf


def allocation_sentence(spec: StudySpec, found: Answer) -> str:
    """The best sizes for four times the cost of the dearest run, or why they are not told."""
    if found.best is None:
        if found.law is not None and found.quoted and found.law.form in FLAT_FORMS:
            return "A logarithmic law has no best mix of sizes; compare gain per cost."
        return "" if not found.quoted else f"No best mix: {spec.cost.column} is not known for all runs."
    place = BUDGET_FACTORS.index(ASKED_FACTOR)
    best = found.best
    chosen = best.best[place]
    parts = []
    for name, (value_B, low_B, high_B) in best.sizes.items():
        ends = f"{short_number(low_B[place])} to {short_number(high_B[place])}"
        parts.append(f"{name} {short_number(value_B[place])} ({ends})")
    limit = ", as far as sizes may move" if chosen.decades > 0.99 * REACH else ""
    far = f" It lies {chosen.decades:.1f} decades beyond the data{limit}." if chosen.decades > 0 else ""
    value, low, high = (float(side[place]) for side in best.value)
    gives = f"; the law gives {value:.4f} ({low:.4f} to {high:.4f}) {spec.metric_unit}"
    told = gives if high - low < UNTOLD * abs(value) else "; what it gives is not known"
    budget = f"{ASKED_FACTOR:g} times the dearest run, {short_number(best.budget_B[place])} {spec.cost.unit}"
    return f"Best mix for {budget}: {', '.join(parts)}{told}.{far}{_unsettled(found)}"


def _unsettled(found: Answer) -> str:
    """The parameters that the mix rests on and the runs do not tell."""
    assert found.law is not None
    loose = [name for name, verdict in found.law.verdicts.items() if verdict == "not identified"]
    return f" Not settled: {', '.join(loose)} {'is' if len(loose) == 1 else 'are'} not identified." if loose else ""


def next_sentences(spec: StudySpec, found: Answer) -> list[str]:
    """The next runs to train, most telling per cost first, equal ones together, each with its cost."""
    places: dict[str, list[NextPoint]] = {}
    for point in found.next_runs:
        places.setdefault(sized(spec, point.sizes), []).append(point)
    return [
        f"{sizes}: {'one run' if len(runs) == 1 else f'{len(runs)} runs with different seeds'}, "
        f"{short_number(runs[0].cost)} {spec.cost.unit}{' each' if len(runs) > 1 else ''}"
        for sizes, runs in places.items()
    ]


def narrowing(found: Answer) -> str:
    """How much narrower the interval of the law gets with all the next runs, one sentence."""
    if not found.next_runs:
        return ""
    left = found.next_runs[-1].width_left
    return f"Together they narrow the interval of the law at twice the largest sizes to {left:.0%} of today's."
