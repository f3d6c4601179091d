"""Everything a check asks of the law of one group: fits, nulls, fewer axes, rollouts, the held-out rung, refits."""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from recscale.scaling.checklist_laws import isoflop_budgets, without_axis
from recscale.scaling.findings import Evidence, numbers
from recscale.scaling.fits import Law, compare, fit
from recscale.scaling.forms import FORMS
from recscale.scaling.isoflop import isoflop
from recscale.scaling.points import Points
from recscale.scaling.study import Group, Tables
from recscale.scaling.study_file import NULL, StudySpec
from recscale.scaling.validate import Rollout, held_out_test, rollout, rollout_levels, sensitivity

FEWEST_DRAWS = 200


def gather(spec: StudySpec, group: Group, *, draws: int = 1000, seed: int = 0) -> Evidence:
    """Fits the declared forms to a group and tests the best of them. What cannot be fitted is said in `problem`.

    Losses are fitted in logs, metrics that rise as they are. Only the best form's own tests take further fits, with as
    few bootstrap draws as a fit takes.
    """
    points = group.points
    if points is None or not len(points.fitted):
        return Evidence(problem=group.problem or "no run to fit")
    scale = "log" if spec.direction == "falls" else "identity"
    try:
        comparison = compare(points, spec.forms, scale=scale, delta=spec.delta, draws=draws, seed=seed)
    except ValueError as error:
        return Evidence(problem=str(error))
    law = comparison.best
    if law is None:
        return Evidence(comparison=comparison)
    return Evidence(
        comparison=comparison,
        fewer=_fewer(points, law),
        held_out=held_out_test(law, points) if len(points.held_out) else None,
        rollout=_rollouts(spec, group, points, law),
        sensitivity=sensitivity(points, law, draws=FEWEST_DRAWS),
        isoflop=_profiles(spec, group),
    )


def gather_all(spec: StudySpec, tables: Tables, *, draws: int = 1000, seed: int = 0) -> dict[str, Evidence]:
    """`gather` for every group by its name, on as many processes as there are cores and groups."""
    work = functools.partial(gather, spec, draws=draws, seed=seed)
    workers = min(len(tables.groups), os.cpu_count() or 1)
    if workers < 2:
        found = [work(group) for group in tables.groups]
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(work, tables.groups))
    return {group.name: evidence for group, evidence in zip(tables.groups, found, strict=True)}


def _fewer(points: Points, law: Law) -> dict[str, Law]:
    """The law without each of its axes in turn; a form that needs them all gives way to the additive one."""
    found = {}
    for axis in points.axes if len(points.axes) > 1 else ():
        reduced = without_axis(points, axis)
        low, high = FORMS[law.form].axes
        form = law.form if low <= len(reduced.axes) <= (high or len(reduced.axes)) else "additive"
        delta = "lsq" if law.delta == float("inf") else law.delta
        found[axis] = fit(reduced, form, scale=law.scale, delta=delta, draws=FEWEST_DRAWS, profiles=False, force=True)
    return found


def _rollouts(spec: StudySpec, group: Group, points: Points, law: Law) -> dict[str, dict[str, Rollout]]:
    """The law and the null rolled out along the main axis; nothing where some run does not say where it lies on it."""
    along_N = numbers(group.rows, spec.main_axis)
    if not (along_N > 0).all():
        return {}
    levels_N = rollout_levels(along_N)
    forms = dict.fromkeys((law.form, NULL))
    options = {"scale": law.scale, "delta": spec.delta, "draws": FEWEST_DRAWS}
    return {spec.main_axis: {form: rollout(points, spec.main_axis, form, levels_N, **options) for form in forms}}


def _profiles(spec: StudySpec, group: Group) -> tuple[str, ...]:
    """A mark per isoFLOP profile of the design, against the first axis that moves along it; "" for a sound one."""
    marks = []
    for rows in isoflop_budgets(spec, group):
        budget = float(numbers(rows, spec.main_axis).mean())
        sizes = next(x_N for axis in spec.axes if (x_N := numbers(rows, axis.column)).max() > 1.1 * x_N.min())
        sign = 1.0 if spec.direction == "falls" else -1.0
        (profile,) = isoflop([budget] * len(rows), sizes, sign * numbers(rows, spec.metric)).profiles
        marks.append(f"{budget:.3g}: {', '.join(profile.marks)}" if profile.marks else "")
    return tuple(marks)
