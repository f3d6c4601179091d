"""Figures that test a law: residuals, rollout, profile likelihoods, and how far the answer moves with a choice."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from recscale.scaling.answers import Answer
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
    level,
    line,
    missing,
    points,
)
from recscale.scaling.findings import numbers
from recscale.scaling.fits import Law
from recscale.scaling.points import Points
from recscale.scaling.study_file import StudySpec
from recscale.scaling.validate import Prediction

DATES = ("created", "started")
CHI2_90 = float(stats.chi2.ppf(0.90, 1))
SHOWN_DEVIANCE = 4.0  # times the edge of the interval


def residual(law: Law, some: Points) -> np.ndarray:
    """What the law leaves: in % for a law in logs, else in units of the metric."""
    fitted = law.curve(some.x)
    return 100 * (np.log(some.y_N) - np.log(fitted)) if law.scale == "log" else some.y_N - fitted


def residuals(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 6: residuals against every axis, fitted value, seed, date, and their quantiles."""
    name, title = "residuals", "Residuals of the law"
    law, group = found.law, found.group
    if law is None or group.points is None:
        return missing(name, title, f"Not drawn: {found.problem}.")
    kinds = [("runs", group.points.fitted, group.fitted_rows, INK, "circle")]
    kinds.append(("held out", group.points.held_out, group.held_out_rows, HELD_OUT, "diamond"))
    kinds = [kind for kind in kinds if len(kind[1])]
    y_label = "residual (%)" if law.scale == "log" else f"residual ({spec.metric_unit})"
    columns = [(axis.name, f"{axis.label} ({axis.unit}, log scale)", True) for axis in spec.axes]
    columns += [("fitted value", f"fitted value ({spec.metric_unit})", False), ("seed", "seed", False)]
    panels = []
    for column, x_label, log in columns:
        drawn: list[Series] = []
        for label, some, rows, colour, shape in kinds:
            x = _column(law, some, rows, column)
            drawn.append(points(label, x, residual(law, some), colour, run=some.run_N, shape=shape))
        ends = [min(s.x.min() for s in drawn), max(s.x.max() for s in drawn)]
        drawn.append(level("", 0.0, ends, MUTED))
        panels.append(Panel(f"against {column}", x_label, y_label, tuple(drawn), x_log=log, x_whole=column == "seed"))
    panels.insert(-1, _quantiles(law, group.points.fitted, y_label))
    dated = _by_date(found, law, y_label)
    caption = f"Law: {law.form}, {found.standing}." + (
        "" if dated else " The records hold no date, so drift cannot be seen."
    )
    return Diagram(name, title, caption, tuple(panels + dated))


def _column(law: Law, some: Points, rows: Sequence, column: str) -> np.ndarray:
    if column == "fitted value":
        return law.curve(some.x)
    return numbers(rows, "seed") if column == "seed" else some.x[column]


def _quantiles(law: Law, some: Points, y_label: str) -> Panel:
    left = residual(law, some)
    order = np.argsort(left)
    normal = stats.norm.ppf((np.arange(len(left)) + 0.5) / len(left))
    spread = float(np.std(left, ddof=1)) if len(left) > 1 else 0.0
    names = tuple(some.run_N[i] for i in order)
    drawn = (
        points("runs", normal, left[order], INK, run=names),
        line("normal", normal[[0, -1]], left.mean() + spread * normal[[0, -1]], MUTED),
    )
    return Panel("quantiles", "normal quantile (standard deviations)", y_label, drawn)


def _by_date(found: Answer, law: Law, y_label: str) -> list[Panel]:
    rows = found.group.fitted_rows
    column = next((name for name in DATES if rows and all(row.get(name) for row in rows)), "")
    if not column:
        return []
    assert found.group.points is not None
    some = found.group.points.fitted
    place = {date: index for index, date in enumerate(sorted({str(row[column]) for row in rows}))}
    x = np.array([place[str(row[column])] for row in rows], np.float64)
    drawn = (points("runs", x, residual(law, some), INK, run=some.run_N), level("", 0.0, [0.0, x.max()], MUTED))
    return [Panel("against date", "order of the runs", y_label, drawn, x_whole=True)]


def rollouts(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 7: predicted over actual against decades ahead on the main axis, fits on ever more of the runs."""
    name, title = "rollout", "Predicted over actual, by decades ahead"
    group = found.group
    sizes = {
        str(row["run_id"]): value for row, value in zip(group.rows, numbers(group.rows, spec.main_axis), strict=True)
    }
    drawn: list[Series] = []
    for index, (form, rolled) in enumerate(found.evidence.rollout.get(spec.main_axis, {}).items()):
        parts = [(level_, prediction) for level_, _, prediction in rolled.steps]
        if parts:
            colour, shape = (LAW, "circle") if not index else (COLOURS[1], "square")
            drawn.append(_ahead(f"{form}, fitted to the smaller runs", parts, sizes, colour, shape))
    held = found.evidence.held_out
    if held is not None and len(held):
        largest = max((sizes[str(row["run_id"])] for row in group.fitted_rows), default=math.nan)
        drawn.append(_ahead("held-out rung", [(largest, held)], sizes, HELD_OUT, "diamond"))
    drawn = [series for series in drawn if np.isfinite(series.x).any()]
    if not drawn:
        why = "no certified law" if not found.quoted else f"too few levels of {spec.main_axis}, and no held-out rung"
        return missing(name, title, f"Not drawn: {why}.")
    ends = [min(s.x.min() for s in drawn), max(s.x.max() for s in drawn)]
    drawn.append(level("", 1.0, ends, MUTED))
    panel = Panel("", f"decades ahead on {spec.main_axis}", "predicted / actual (1 is right)", tuple(drawn))
    caption = "Each fit sees only runs below a level and predicts all above it. Bars: 90 % prediction interval."
    return Diagram(name, title, caption, (panel,))


def _ahead(label: str, parts: Sequence[tuple[float, Prediction]], sizes: dict, colour: str, shape: str) -> Series:
    x, ratio, low, high, runs = [], [], [], [], []
    for edge, prediction in parts:
        for index, run in enumerate(prediction.run_M):
            actual = prediction.actual_M[index]
            x.append(math.log10(sizes[run] / edge) if sizes[run] > 0 and edge > 0 else math.nan)
            ratio.append(prediction.predicted_M[index] / actual)
            low.append(prediction.low_M[index] / actual)
            high.append(prediction.high_M[index] / actual)
            runs.append(run)
    return points(label, x, ratio, colour, low=low, high=high, run=tuple(runs), shape=shape)


def profiles(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 8: the deviance of each exponent and of the limit when it is held at other values."""
    name, title = "profiles", "Profile likelihoods"
    del spec
    law = found.law
    if law is None or not law.profiles:
        form = "" if law is None else f"the {law.form} form has no exponent"
        return missing(name, title, f"Not drawn: {form or found.problem}.")
    panels = []
    for parameter, (value_T, deviance_T) in law.profiles.items():
        near = np.isfinite(deviance_T) & (deviance_T <= SHOWN_DEVIANCE * CHI2_90)
        if near.sum() < 2:
            continue
        x, y = value_T[near], deviance_T[near]
        low, high = law.intervals[parameter]
        drawn = (
            line(law.form, x, y),
            level("90 %, normal", CHI2_90, [x.min(), x.max()], MUTED, dashed=True),
            band("printed 90 % interval", [low, high], [0.0, 0.0], [y.max(), y.max()], COLOURS[1], framed=False),
        )
        title_ = f"{parameter}: {law.verdicts[parameter]}"
        panels.append(Panel(title_, parameter, "deviance above the best", drawn))
    if not panels:
        return missing(name, title, "Not drawn: no parameter has a profile of two points.")
    caption = f"Law: {law.form}, {found.standing}. A flat curve: the runs do not tell the parameter."
    return Diagram(name, title, caption, tuple(panels))


def tornado(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 9: the law at twice the largest sizes, refitted with other losses and without single levels."""
    name, title = "tornado", "How far the answer moves with the fit"
    law, refits = found.law, found.evidence.sensitivity
    if law is None or refits is None:
        return missing(name, title, f"Not drawn: no certified law to refit. {found.problem}")
    at = {axis: 2 * size for axis, size in law.corner().items()}
    base, low, high = (float(side[0]) for side in law.band(at))
    rows: list[tuple[str, float, float, float]] = [("as quoted", base, low, high)]
    for choice, refit, _ in refits.rows:
        if refit is not None:
            moved, ends_low, ends_high = refit.band(at)
            rows.append((choice, float(moved[0]), float(ends_low[0]), float(ends_high[0])))
    rows[1:] = sorted(rows[1:], key=lambda row: -abs(row[1] - base))
    rows = rows[::-1]
    value, lows, highs = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    place = np.arange(len(rows), dtype=np.float64)
    drawn = (
        band("90 % as quoted", [low, high], [-0.6, -0.6], [len(rows) - 0.4] * 2, framed=False),
        line("", [base, base], [-0.6, len(rows) - 0.4], MUTED),
        points("", value, place, LAW, low=lows, high=highs, across=True, shape="square"),
    )
    x_label = f"law at twice the largest sizes ({spec.metric_unit})"
    failed = [choice for choice, refit, _ in refits.rows if refit is None]
    caption = "Bars: 90 % of the refitted curve." + (f" Not fitted: {', '.join(failed)}." if failed else "")
    return Diagram(name, title, caption, (Panel("", x_label, "", drawn, names=tuple(row[0] for row in rows)),))
