"""Items 4, 10 to 13 and 19 of the checklist: the held-out rung, the law, the nulls, how far the law is carried."""

import dataclasses
import math
from collections.abc import Collection, Sequence

import numpy as np

from recscale.scaling.collect import Row
from recscale.scaling.findings import Context, Evidence, Said, bad, good, names, numbers, per_group, unknown, without
from recscale.scaling.fits import INDISTINGUISHABLE, Law
from recscale.scaling.points import Points
from recscale.scaling.study import Group
from recscale.scaling.study_file import NULL, StudySpec
from recscale.scaling.validate import Rollout

BEYOND = 4.0
COVERAGE = 0.90
DRAWS = 500
FURTHEST = 1.5
SAME_BUDGET, PROFILE_POINTS, OPPOSED = 0.10, 4, -0.95
NO_LAW = "no law was fitted"
FIT_FIRST = "fit first: python -m recscale.scaling.check without --no-laws"


def aicc(law: Law, points: Points) -> float:
    """Akaike's criterion of a law on points from its residuals, the noise scale counted as a parameter; inf where the
    points are too few."""
    y_N, fitted_N = points.y_N, law.curve(points.x)
    residual_N = np.log(y_N / fitted_N) if law.scale == "log" else y_N - fitted_N
    n, p = len(y_N), len(law.params) + 1
    if n <= p + 1:
        return math.inf
    return n * math.log(float(np.square(residual_N).mean())) + 2 * p + 2 * p * (p + 1) / (n - p - 1)


def _law(context: Context, group: Group) -> tuple[Evidence, Law] | Said:
    """The law to quote of a group with its evidence, or why there is none."""
    evidence = context.evidence(group)
    if evidence is None:
        return unknown(NO_LAW, FIT_FIRST)
    if evidence.comparison is None:
        return unknown(
            f"{NO_LAW}: {evidence.problem or 'no reason given'}", "see the items above, run what they ask for"
        )
    if evidence.comparison.best is None:
        return bad(evidence.comparison.text, "run the points that the reasons ask for; print no law")
    return evidence, evidence.comparison.best


@per_group
def held_out(context: Context, group: Group) -> list[Said]:
    """Item 4: a rung that no fit saw, far enough out, and how well it was predicted."""
    spec = context.spec
    if spec.held_out is None:
        return [bad("the plan holds no rung out", f"run a rung 4x beyond on {spec.main_axis} and name it in held_out")]
    rows = group.held_out_rows
    if not rows:
        text = f"no run has {spec.held_out.column} = {spec.held_out.value}"
        return [bad(text, "run the held-out rung")]
    missing = without([*rows, *group.fitted_rows], spec.main_axis)
    if missing:
        return [unknown(f"{spec.main_axis} is missing in {names(missing)}", "record it")]
    ratio = float(numbers(rows, spec.main_axis).max() / numbers(group.fitted_rows, spec.main_axis).max())
    text = f"the held-out rung lies {ratio:.1f}x beyond the fitted runs on {spec.main_axis}"
    if ratio < BEYOND:
        said = [bad(f"{text}, needs {BEYOND:g}x", "run a larger rung, or hold out the top of the fitted runs too")]
    else:
        said = [good(text)]
    evidence = context.evidence(group)
    test = None if evidence is None else evidence.held_out
    if test is None:
        return [*said, unknown("the held-out rung was not predicted: no law", FIT_FIRST)]
    text = f"the held-out rung: {test.text()}"
    # Fewer inside than nine in ten do by chance: one of one, or two of three, says nothing against the interval.
    inside = round(test.coverage * len(rows))
    if _chance_of_at_most(inside, len(rows)) < 0.05:
        return [*said, bad(text, "the law is too sure of itself: try other forms, or more points near the top")]
    return [*said, good(text)]


def _chance_of_at_most(inside: int, n: int) -> float:
    """Chance that at most this many of n runs lie inside their 90 % interval."""
    return sum(math.comb(n, i) * COVERAGE**i * (1 - COVERAGE) ** (n - i) for i in range(inside + 1))


@per_group
def certified(context: Context, group: Group) -> list[Said]:
    """Item 10: the law has its certificate, is of these points, and can be written down whole."""
    found = _law(context, group)
    if isinstance(found, Said):
        return [found]
    _, law = found
    assert group.points is not None
    proof = f"{law.form}: {law.n} points, delta {law.delta:.3g}, {len(law.draws_SP)} {law.bootstrap} draws"
    said = [good(proof)]
    if law.data_hash != group.points.fitted.data_hash:
        said.append(bad(f"{law.form} was fitted to other points than these runs", "fit again"))
    if len(law.draws_SP) < DRAWS:
        said.append(bad(f"{len(law.draws_SP)} bootstrap draws, needs {DRAWS}", f"fit with draws={DRAWS} or more"))
    if not np.isfinite(law.covariance).all():
        said.append(bad("the covariance of the parameters is not finite", "try a form with fewer parameters"))
    loose = [f"{name} {verdict}" for name, verdict in law.verdicts.items() if verdict != "identified"]
    if loose:
        said.append(good(f"quote no value for: {', '.join(loose)}"))
    return said


@per_group
def nulls(context: Context, group: Group) -> list[Said]:
    """Item 11: the law beats the logarithm and the laws with an axis less, or says what it cannot be told from."""
    found = _law(context, group)
    if isinstance(found, Said):
        return [found]
    evidence, law = found
    assert group.points is not None
    comparison = evidence.comparison
    assert comparison is not None
    said = [good(comparison.text)]
    if NULL not in {entry.form for entry in comparison.laws}:
        said.append(bad(f"the null {NULL} was not fitted", f"compare with {NULL}"))
    if law.form == NULL:
        said.append(good("the null is best: there is no exponent and no floor to quote"))
    fitted = group.points.fitted
    if len(fitted.axes) > 1 and set(evidence.fewer) != set(fitted.axes):
        lacking = [axis for axis in fitted.axes if axis not in evidence.fewer]
        said.append(unknown(f"no law without the axis {', '.join(lacking)} was fitted", "compare with fewer axes"))
    for axis, less in evidence.fewer.items():
        reduced = without_axis(fitted, axis)
        gap = aicc(less, reduced) - aicc(law, fitted)
        if gap < INDISTINGUISHABLE:
            than = "no better than" if gap < 0 else "indistinguishable from"
            text = f"{than} a law without the axis {axis} (its AICc is {gap:+.1f})"
            said.append(bad(text, f"widen the axis {axis}, or leave it out of the law"))
    return said + _rolled(evidence, law)


def without_axis(points: Points, axis: str) -> Points:
    """The points with one axis left out."""
    keep = [name for name in points.axes if name != axis]
    sizes = points.x
    return Points.of(
        {name: sizes[name] for name in keep},
        points.y_N,
        sigma=points.sigma_N,
        sigma_dof=points.sigma_dof,
        run=points.run_N,
        lineage=points.lineage_N,
        held_out=points.held_out_N,
        weight=points.weight_N,
        metric=points.metric,
    )


def _rolled(evidence: Evidence, law: Law) -> list[Said]:
    """Leave-future-out error of the law beside the null's, over the steps that both have."""
    said = []
    for axis, rollouts in evidence.rollout.items():
        both = set.intersection(*({level for level, _, _ in rollouts[form].steps} for form in {law.form, NULL}))
        if not both:
            why = next((reason for _, reason in rollouts[law.form].problems), "too few runs below the last levels")
            said.append(unknown(f"{law.form} was not rolled out along {axis}: {why}", f"run more levels of {axis}"))
            continue
        own, null = (_error(rollouts[form], both) for form in (law.form, NULL))
        text = f"rolled out along {axis}: {law.form} {own:.2%}, {NULL} {null:.2%} (RMSLE of {len(both)} steps)"
        if own <= null or law.form == NULL:
            said.append(good(text))
        else:
            do = f"do not extrapolate {axis} with {law.form}, or run more levels"
            said.append(bad(f"{text}: the null predicts better", do))
    return said or [unknown("no rollout was made", "roll the law out along the main axis")]


def _error(rolled: Rollout, levels: Collection[float]) -> float:
    return dataclasses.replace(rolled, steps=tuple(step for step in rolled.steps if step[0] in levels)).pooled().rmsle


@per_group
def sensitivity(context: Context, group: Group) -> list[Said]:
    """Item 12: resampling by lineage, and what delta and single levels do to the parameters."""
    found = _law(context, group)
    if isinstance(found, Said):
        return [found]
    evidence, law = found
    assert group.points is not None
    fitted = group.points.fitted
    said = []
    if len(set(fitted.lineage_N)) < len(fitted) and law.bootstrap not in ("cluster", "residual"):
        text = f"points share training runs, but the bootstrap is by {law.bootstrap}"
        said.append(bad(text, "resample by lineage: bootstrap=cluster"))
    if evidence.sensitivity is None:
        return [*said, unknown("no sensitivity was computed", "refit with other delta and without single levels")]
    moved: dict[str, list[str]] = {}
    for choice, refit, reason in evidence.sensitivity.rows:
        if refit is None:
            said.append(bad(f"{choice}: no fit ({reason})", "run more points"))
            continue
        for name in law.verdicts:
            low, high = law.intervals[name]
            there, here = refit.params[name], law.params[name]
            if not low <= there <= high and not refit.intervals[name][0] <= here <= refit.intervals[name][1]:
                moved.setdefault(name, []).append(f"{choice} ({there:.4g})")
    for name, changes in moved.items():
        low, high = law.intervals[name]
        text = f"{name} leaves its 90 % interval [{low:.4g}, {high:.4g}] with: {', '.join(changes[:4])}"
        said.append(bad(text, "quote the wider range, or the gain per doubling alone"))
    return said or [good(f"no exponent or limit leaves its interval in {len(evidence.sensitivity.rows)} refits")]


@per_group
def profiles(context: Context, group: Group) -> list[Said]:
    """Item 13: isoFLOP profiles, where the design has some, are looked at and not extrapolated."""
    budgets = isoflop_budgets(context.spec, group)
    if not budgets:
        return [good("the design has no isoFLOP profiles; the law is a surface fit")]
    evidence = context.evidence(group)
    if evidence is None or evidence.isoflop is None:
        return [unknown(f"{len(budgets)} isoFLOP profiles were not looked at", FIT_FIRST)]
    marked = [mark for mark in evidence.isoflop if mark]
    if marked:
        return [
            bad(f"{len(marked)} of {len(budgets)} isoFLOP profiles: {'; '.join(marked[:4])}", "centre the sizes, run 5")
        ]
    return [good(f"{len(budgets)} isoFLOP profiles have inner minima; they are shown, not extrapolated")]


def isoflop_budgets(spec: StudySpec, group: Group) -> list[list[Row]]:
    """Fitted runs of equal cost along which one axis grows as another shrinks; [] below 2 budgets of 4 places."""
    main = spec.main_axis
    budgets: list[list[Row]] = []
    for row in sorted((row for row in group.fitted_rows if row.get(main)), key=lambda row: row[main]):
        if budgets and row[main] <= budgets[-1][0][main] * (1 + SAME_BUDGET):
            budgets[-1].append(row)
        else:
            budgets.append([row])
    found = [rows for rows in budgets if _traded(spec, rows)]
    return found if len(found) > 1 else []


def _traded(spec: StudySpec, rows: Sequence[Row]) -> bool:
    places = {tuple(math.log(row[axis.column]) for axis in spec.axes) for row in rows}
    if len(places) < PROFILE_POINTS:
        return False
    z_KN = np.array(sorted(places)).T
    moving = z_KN[np.ptp(z_KN, axis=1) > math.log(1 + SAME_BUDGET)]
    return len(moving) > 1 and float(np.corrcoef(moving).min()) < OPPOSED


@per_group
def distance(context: Context, group: Group) -> list[Said]:
    """Item 19: how far beyond the fitted runs anything is predicted."""
    assert group.points is not None
    fitted, out = group.points.fitted, group.points.held_out
    reach = {axis: math.log10(2) for axis in fitted.axes}
    main = context.spec.main_axis
    if len(out):
        high_K = fitted.x_KN.max(1)
        reach = {
            a: max(0.0, math.log10(x.max() / high)) for a, x, high in zip(fitted.axes, out.x_KN, high_K, strict=True)
        }
        rows = group.held_out_rows
        if not without([*rows, *group.fitted_rows], main):
            reach[main] = math.log10(numbers(rows, main).max() / numbers(group.fitted_rows, main).max())
    axis = max(reach, key=reach.__getitem__)
    what = "the held-out rung" if len(out) else "the next doubling"
    text = f"{what} lies at most {reach[axis]:.2f} decades beyond the fitted runs ({axis})"
    if reach[axis] > FURTHEST:
        return [bad(f"{text}, at most {FURTHEST:g}", "run a rung between, or force the projection and say so")]
    return [good(text)]
