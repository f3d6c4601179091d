"""Figures of single axes: loss against each axis, gain per doubling, and the cuts of a star design."""

import math
from collections.abc import Sequence

import numpy as np

from recscale.scaling.answers import Answer
from recscale.scaling.figures import (
    COLOURS,
    FITTED_FLOOR,
    FLOOR,
    HELD_OUT,
    INK,
    LAW,
    MUTED,
    Diagram,
    Panel,
    Series,
    band,
    level,
    line,
    missing,
    points,
    short_number,
)
from recscale.scaling.fits import Law
from recscale.scaling.forms import FORMS
from recscale.scaling.laws import AxisLaw
from recscale.scaling.study_file import StudySpec

CURVE_POINTS = 60
SHOWN_ROOM = 1.5  # a limit farther below the curve than so many times its range is left out of the picture
DOUBLING_TITLE = "What the next doubling of each axis buys"
AXIS_TITLE = "Metric against each axis, the others at their middle"


def metric_label(spec: StudySpec) -> str:
    """The fitted metric with its unit."""
    _, split, part, metric = spec.metric.split(".", 3)
    return f"{split} {metric}{'' if part == 'all' else f', {part}'} ({spec.metric_unit})"


def middle(law: Law) -> dict[str, float]:
    """The middle of every axis of a law, in logs."""
    return {axis: math.sqrt(low * high) for axis, (low, high) in law.domain.items()}


def loss_by_axis(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 4: a cut of the law along each axis with its 90 % band, and the runs carried onto the cut."""
    name = "axes"
    law, group = found.law, found.group
    if law is None or group.points is None:
        return missing(name, AXIS_TITLE, f"Not drawn: {found.problem}.")
    caption = (
        f"Law: {law.form}, {found.standing}. Each run is moved along the law to the middle of the other axes, so that "
        "what is left is its own residual. Shaded: 90 % of the curve. Dashed: beyond the runs."
    )
    panels = tuple(_axis_panel(spec, found, law, axis.name) for axis in spec.axes)
    return Diagram(name, AXIS_TITLE, caption, panels)


def _axis_panel(spec: StudySpec, found: Answer, law: Law, axis: str) -> Panel:
    entry = next(entry for entry in spec.axes if entry.name == axis)
    low, high = law.domain[axis]
    held = middle(law)
    x_M = np.geomspace(low, 2 * high, CURVE_POINTS)
    value_M, low_M, high_M = law.band(held | {axis: x_M})
    inside = x_M <= high * 1.0001
    drawn: list[Series] = [
        band("90 % of the curve", x_M, low_M, high_M, framed=False),
        line(f"law ({law.form})", x_M[inside], value_M[inside]),
        line("", x_M[~inside], value_M[~inside], dashed=True),
        *_carried(found, law, axis, held),
        *_floor(law, x_M, value_M),
    ]
    others = ", ".join(f"{name} {short_number(size)}" for name, size in held.items() if name != axis)
    title = f"{axis}" + (f" (at {others})" if others else "")
    return Panel(title, f"{entry.label} ({entry.unit}, log scale)", metric_label(spec), tuple(drawn), x_log=True)


def _carried(found: Answer, law: Law, axis: str, held: dict[str, float]) -> list[Series]:
    """The runs at the cut: their residual on top of the law there."""
    assert found.group.points is not None
    series = []
    kinds = (
        ("runs", found.group.points.fitted, INK, "circle"),
        ("held out", found.group.points.held_out, HELD_OUT, "diamond"),
    )
    for label, some, colour, shape in kinds:
        if len(some):
            at_cut = law.curve(held | {axis: some.x[axis]})
            here = law.curve(some.x)
            y = some.y_N * at_cut / here if law.scale == "log" else some.y_N + at_cut - here
            series.append(points(label, some.x[axis], y, colour, run=some.run_N, shape=shape))
    return series


def _floor(law: Law, x_M: np.ndarray, value_M: np.ndarray) -> list[Series]:
    """The limit with its interval, where the runs tell it; in the picture unless it would flatten the curve."""
    limit = FORMS[law.form].limit
    if not limit or not law.certified or law.verdicts[limit] == "not identified":
        return []
    value, (low, high) = law.params[limit], law.intervals[limit]
    label = f"limit {value:.4g} [{low:.4g}, {high:.4g}], {law.verdicts[limit]}"
    ends = [x_M[0], x_M[-1]]
    near = float(np.abs(value_M - value).min()) <= SHOWN_ROOM * float(np.ptp(value_M))
    return [
        band("", ends, [low, low], [high, high], FITTED_FLOOR, framed=False),
        level(label, value, ends, FITTED_FLOOR, dashed=True, framed=near),
    ]


def gain_per_doubling(spec: StudySpec, answers: Sequence[Answer], cuts: Sequence[AxisLaw] = ()) -> Diagram:
    """Diagnostic 13: the gain of the next doubling of each axis with its 90 % interval, largest on top."""
    panels = [
        _gain_panel(
            found.group.name,
            [(f"{entry.axis.label}", entry.gain.value, entry.gain.low, entry.gain.high) for entry in found.doubled],
            spec.metric_unit,
        )
        for found in answers
        if found.doubled
    ]
    sign = 1.0 if spec.direction == "falls" else -1.0
    fitted = [law for law in cuts if law.fits and not law.spec.end and math.isfinite(law.gain.value)]
    rows = [
        (law.spec.label, *sorted(sign * v for v in (law.gain.low, law.gain.value, law.gain.high))) for law in fitted
    ]
    ordered = sorted(((label, mid, low, high) for label, low, mid, high in rows), key=lambda row: -row[1])
    if ordered:
        panels.append(_gain_panel("one axis at a time", ordered, spec.metric_unit))
    if not panels:
        return missing("gain_per_doubling", DOUBLING_TITLE, "Not drawn: no certified law tells a gain.")
    caption = (
        "From the largest size fitted to twice as much, all else equal; above 0 is better. Bars: 90 %. Grey: flat."
    )
    return Diagram("gain_per_doubling", DOUBLING_TITLE, caption, tuple(panels))


def _gain_panel(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str) -> Panel:
    rows = list(rows)[::-1]
    drawn: list[Series] = [line("", [0.0, 0.0], [-0.6, len(rows) - 0.4], MUTED)]
    for flat, colour in ((False, LAW), (True, MUTED)):
        chosen = [(i, *row[1:]) for i, row in enumerate(rows) if (row[2] <= 0 <= row[3]) == flat]
        if chosen:
            place, value, low, high = np.array(chosen).T
            drawn.append(points("", value, place, colour, low=low, high=high, across=True, shape="square"))
    names = tuple(row[0] for row in rows)
    return Panel(title, f"gain of the next doubling ({unit})", "", tuple(drawn), names=names)


def cut_diagram(law: AxisLaw) -> Diagram:
    """One axis of a star design: means of the seeds, the forms fitted to them, the known floor."""
    spec = law.spec
    title = f"{spec.label}, alone"
    if not len(law.x_N):
        return missing(f"cut_{spec.name}", title, "Not drawn: no finished run belongs to this axis.")
    x_label, y_label = f"{spec.label} ({spec.unit}, log scale)", f"{spec.split} {spec.metric} ({spec.metric_unit})"
    drawn = [*_cut_curves(law), _cut_points(law), *_cut_floors(law)]
    caption = f"Bars and shading: 90 %; noise from {law.noise_source}." + (f" {law.problem}." if law.problem else "")
    panel = Panel(spec.label, x_label, y_label, tuple(drawn), x_log=True)
    return Diagram(f"cut_{spec.name}", title, caption, (panel,))


def _cut_points(law: AxisLaw) -> Series:
    fallback = law.power.residual_sd if law.fits else math.nan
    sigma_N = np.full(len(law.x_N), fallback) if law.sigma_N is None else law.sigma_N
    bars_N = 1.645 * np.nan_to_num(sigma_N)
    return points("runs, mean of seeds", law.x_N, law.y_N, INK, low=law.y_N - bars_N, high=law.y_N + bars_N)


def _cut_curves(law: AxisLaw) -> list[Series]:
    if not law.fits:
        return []
    x_M = np.geomspace(law.x_N[0], (1 if law.spec.end else 2) * law.x_N[-1], CURVE_POINTS)
    drawn = []
    for index, fitted in enumerate(fit for fit in law.fits if fit.form in ("pow_floor", "log", law.quoted)):
        value_M, low_M, high_M = fitted.band(law.at(x_M))
        best = fitted.form == law.quoted
        colour = LAW if best else (COLOURS[1], MUTED)[index % 2]
        if best:
            drawn.append(band("", x_M, low_M, high_M, framed=False))
        label = f"{fitted.form}{', best supported' if best else '' if fitted.certified else ', refused'}"
        drawn.append(line(label, x_M, value_M, colour, dashed=not best, framed=best))
    return drawn


def _cut_floors(law: AxisLaw) -> list[Series]:
    if not len(law.x_N):
        return []
    ends = [law.x_N[0], (2 if law.fits else 1) * law.x_N[-1]]
    drawn = []
    if law.spec.floor is not None:
        drawn.append(level(f"known floor {law.spec.floor:.4g}", law.spec.floor, ends, FLOOR, framed=_near(law)))
    interval = law.floor_interval()
    if interval is not None and law.power.verdicts["E"] != "not identified":
        value, (low, high) = law.power.params["E"], interval
        label = f"fitted floor {value:.4g} [{low:.4g}, {high:.4g}]"
        drawn.append(level(label, value, ends, FITTED_FLOOR, dashed=True, framed=False))
        drawn.append(band("", ends, [low, low], [high, high], FITTED_FLOOR, framed=False))
    return drawn


def _near(law: AxisLaw) -> bool:
    """A known floor is in the picture unless it would flatten the runs."""
    assert law.spec.floor is not None
    return law.y_N.min() - law.spec.floor <= 2.5 * max(float(np.ptp(law.y_N)), 1e-12)
