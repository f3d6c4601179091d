"""Figures of the surface: isoFLOP profiles, envelope of curves, contours, frontier sizes."""

import math
from collections.abc import Mapping, Sequence

import contourpy
import numpy as np

from recscale.scaling.allocate import frontier
from recscale.scaling.answers import FLAT_FORMS, Answer
from recscale.scaling.checklist_laws import isoflop_budgets
from recscale.scaling.figures import (
    COLOURS,
    HELD_OUT,
    INK,
    LAW,
    MUTED,
    Diagram,
    Panel,
    Series,
    band,
    line,
    missing,
    points,
    short_number,
)
from recscale.scaling.figures_axes import metric_label, middle
from recscale.scaling.findings import numbers
from recscale.scaling.fits import Law
from recscale.scaling.isoflop import Profile, envelope, isoflop
from recscale.scaling.study import Group
from recscale.scaling.study_file import StudySpec

GRID = 41
LEVELS = 7
BAND_DRAWS = 16
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]  # run -> share of the run [T], metric [T]


def isoflop_profiles(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 1: loss against size at equal cost, with a parabola and its quality marks."""
    name, title = "isoflop", "IsoFLOP profiles (Approach 2): shown, not extrapolated"
    budgets = isoflop_budgets(spec, found.group)
    if not budgets:
        return missing(name, title, "Not drawn: the design has no budgets at which one axis grows as another shrinks.")
    axis = spec.axes[0]
    budget_N = np.concatenate([[float(numbers(rows, spec.main_axis).mean())] * len(rows) for rows in budgets])
    rows = [row for some in budgets for row in some]
    sign = 1.0 if spec.direction == "falls" else -1.0
    profiles = isoflop(budget_N, numbers(rows, axis.column), sign * numbers(rows, spec.metric)).profiles
    drawn: list[Series] = []
    for index, profile in enumerate(profiles):
        drawn += _profile(profile, sign, COLOURS[index % len(COLOURS)], spec.cost.unit)
    panel = Panel("", f"{axis.label} ({axis.unit}, log scale)", metric_label(spec), tuple(drawn), x_log=True)
    caption = "One parabola per budget in the logarithm of size; its marks say what is wrong with it."
    return Diagram(name, title, caption, (panel,))


def _profile(profile: Profile, sign: float, colour: str, unit: str) -> list[Series]:
    marks = f" ({', '.join(profile.marks)})" if profile.marks else ""
    label = f"{short_number(profile.budget)} {unit}{marks}"
    drawn = [points(label, profile.size_N, sign * profile.loss_N, colour)]
    a, b, c = profile.coefficients
    if math.isfinite(a):
        x_M = np.geomspace(profile.size_N.min(), profile.size_N.max(), 40)
        z_M = np.log(x_M) - np.log(profile.size_N).mean()
        drawn.append(line("", x_M, sign * (a * z_M**2 + b * z_M + c), colour))
    if profile.used:
        drawn.append(points("", [profile.best_size], [sign * profile.best_loss], colour, shape="diamond"))
    return drawn


def curve_envelope(spec: StudySpec, found: Answer, curves: Curves, source: str) -> Diagram:
    """Diagnostic 2: training curves against compute with their lower hull (Approach 1)."""
    name, title = "envelope", "Envelope of the training curves (Approach 1)"
    group = found.group
    main_N = numbers(group.rows, spec.main_axis)
    costs = {str(row["run_id"]): cost for row, cost in zip(group.rows, main_N, strict=True)}
    mine = {run: curve for run, curve in curves.items() if costs.get(run, math.nan) > 0}
    if not mine:
        return missing(name, title, f"Not drawn: no run has a curve ({source}).")
    drawn: list[Series] = []
    x_all, y_all = [], []
    for index, (run, (share, value)) in enumerate(mine.items()):
        x = share * costs[run]
        drawn.append(line("" if index else "runs", x, value, MUTED))
        x_all.append(x)
        y_all.append(value)
    x, y = np.concatenate(x_all), np.concatenate(y_all)
    label = f"{spec.main_axis} (log scale)"
    if (y > 0).all():
        hull = envelope(x, np.ones_like(x), y).index_N
        drawn.append(line("lower hull", x[hull], y[hull], LAW))
    panel = Panel("", label, source, tuple(drawn), x_log=True)
    return Diagram(name, title, "Points of all runs along the way; biased towards what was trained.", (panel,))


def contours(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 3: the law over the two axes that move it most, the others at their middle."""
    name, title = "contours", "The law over the two axes of largest effect"
    law, group = found.law, found.group
    if law is None or group.points is None or len(spec.axes) < 2:
        why = found.problem or "the law has one axis"
        return missing(name, title, f"Not drawn: {why}.")
    if not found.quoted:
        return missing(name, title, f"Not drawn: no certified law. {found.problem}.")
    held = middle(law)
    effect = {axis: float(np.ptp(law.curve(held | {axis: np.array(ends)}))) for axis, ends in law.domain.items()}
    first, second = sorted(effect, key=lambda axis: -effect[axis])[:2]
    drawn = [*_levels(law, held, first, second), *_run_places(found, first, second)]
    drawn += _frontier_line(found, law, held, (first, second))
    others = ", ".join(f"{axis} {short_number(size)}" for axis, size in held.items() if axis not in (first, second))
    entry = {axis.name: axis for axis in spec.axes}
    panel = Panel(
        f"{metric_label(spec)}" + (f" at {others}" if others else ""),
        f"{entry[first].label} ({entry[first].unit}, log scale)",
        f"{entry[second].label} ({entry[second].unit}, log scale)",
        tuple(drawn),
        x_log=True,
        y_log=True,
    )
    caption = f"Law: {law.form}. Runs are shown wherever they lie on the other axes."
    return Diagram(name, title, caption, (panel,))


def _levels(law: Law, held: Mapping[str, float], first: str, second: str) -> list[Series]:
    x_M, y_M = (np.geomspace(law.domain[axis][0], 2 * law.domain[axis][1], GRID) for axis in (first, second))
    place = {first: np.tile(x_M, GRID), second: np.repeat(y_M, GRID)}
    z = law.curve({axis: place[axis] if axis in place else held[axis] for axis in law.axes}).reshape(GRID, GRID)
    cut = contourpy.contour_generator(np.log(x_M), np.log(y_M), z)
    found: list[Series] = []
    heights = np.linspace(z.min(), z.max(), LEVELS + 2)[1:-1]
    for index, height in enumerate(heights):
        shade = _shade(index / (LEVELS - 1))
        for part, path in enumerate(cut.lines(float(height))):
            label = f"{height:.4g}" if not part else ""
            path = np.exp(np.asarray(path))
            found.append(line(label, path[:, 0], path[:, 1], shade))
    return found


def _shade(share: float) -> str:
    """From dark blue to light orange, dark is low: ordered for any colour vision."""
    ends = np.array([[0, 50, 110], [240, 170, 60]])
    return "#" + "".join(f"{round(v):02x}" for v in ends[0] + share * (ends[1] - ends[0]))


def _run_places(found: Answer, first: str, second: str) -> list[Series]:
    assert found.group.points is not None
    kinds = (
        ("runs", found.group.points.fitted, INK, "circle"),
        ("held out", found.group.points.held_out, HELD_OUT, "diamond"),
    )
    return [
        points(label, some.x[first], some.x[second], colour, run=some.run_N, shape=shape)
        for label, some, colour, shape in kinds
        if len(some)
    ]


def _frontier_line(found: Answer, law: Law, held: Mapping[str, float], pair: tuple[str, str]) -> list[Series]:
    """The best way through the plane, other axes held, with the 90 % band of its second size."""
    if found.cost is None or law.form in FLAT_FORMS:
        return []
    fixed: dict[str, float] = {axis: size for axis, size in held.items() if axis not in pair}
    corners = [fixed | {axis: law.domain[axis][side] for axis in pair} for side in (0, 1)]
    ends = [float(found.cost({axis: np.array(size) for axis, size in corner.items()})) for corner in corners]
    if not ends[0] < ends[1]:
        return []
    try:
        best = frontier(law, found.cost, np.geomspace(1.5 * ends[0], ends[1], 4), fixed=fixed, draws=BAND_DRAWS)
    except ValueError:
        return []
    x_B, y_B = best.sizes[pair[0]][0], best.sizes[pair[1]]
    return [
        band("frontier, 90 %", x_B, y_B[1], y_B[2], COLOURS[3], framed=False),
        line("frontier", x_B, y_B[0], COLOURS[3], framed=False),
    ]


def frontier_sizes(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 5: best sizes against budget by the surface (Approach 3); Approaches 1 and 2 over it, if any."""
    name, title = "frontier", "Best sizes against budget"
    if found.best is None or found.law is None:
        form = found.law.form if found.law is not None else ""
        why = f"a {form} law has no best mix" if found.quoted and form in FLAT_FORMS else "no certified law with a cost"
        return missing(name, title, f"Not drawn: {why}.")
    best = found.best
    panels = []
    for axis in spec.axes:
        value_B, low_B, high_B = best.sizes[axis.name]
        top = found.law.domain[axis.name][1]
        drawn = [
            band("90 %", best.budget_B, low_B, high_B),
            line("surface (Approach 3)", best.budget_B, value_B),
            line("largest fitted", best.budget_B[[0, -1]], [top, top], MUTED, dashed=True),
            *_approaches(spec, found.group, axis.column, best.budget_B),
        ]
        x_label, y_label = f"{spec.cost.unit} (log scale)", f"{axis.label} ({axis.unit}, log scale)"
        panels.append(Panel(axis.name, x_label, y_label, tuple(drawn), x_log=True, y_log=True))
    caption = (
        "Cost fitted to the runs. Sizes move at most 1.5 decades beyond the data; a size that stands there is a limit."
    )
    return Diagram(name, title, caption, tuple(panels))


def _approaches(spec: StudySpec, group: Group, column: str, budget_B: np.ndarray) -> list[Series]:
    """The lines of Approaches 1 (hull of the runs) and 2 (parabolas), where the runs carry one."""
    rows: Sequence = group.fitted_rows
    cost, size = numbers(rows, spec.cost.column), numbers(rows, column)
    loss = numbers(rows, spec.metric)
    found = []
    if spec.direction == "falls" and (loss > 0).all() and (cost > 0).all() and (size > 0).all():
        hull = envelope(cost, size, loss).line
        if hull is not None:
            y = [hull.at(float(b)) for b in budget_B]
            found.append(line("hull of runs (Approach 1)", budget_B, y, COLOURS[1], dashed=True, framed=False))
    budgets = isoflop_budgets(spec, group)
    if budgets:
        some = [row for rows in budgets for row in rows]
        at = np.concatenate([[float(numbers(rows, spec.main_axis).mean())] * len(rows) for rows in budgets])
        parabola = isoflop(at, numbers(some, column), numbers(some, spec.metric)).line
        if parabola is not None:
            y = [parabola.at(float(b)) for b in budget_B]
            found.append(line("parabolas (Approach 2)", budget_B, y, COLOURS[3], dashed=True, framed=False))
    return found
