"""Items 1, 2, 3 and 5 of the checklist: the plan, the spread of the points, the seeds, the learning rates."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from recscale.scaling.collect import Row
from recscale.scaling.findings import Context, Said, bad, cells_of, good, names, numbers, per_group, unknown, without
from recscale.scaling.forms import FORMS
from recscale.scaling.study import Group, is_held_out, value_of
from recscale.scaling.study_file import Axis

MINIMUM_LEVELS = 5
POINTS_PER_PARAMETER = 3
MAXIMUM_CORRELATION = 0.8
NEAR = 0.10  # sizes are planned in events or parameters and come out a little different
SAME_LEVEL = 0.05
SEEDS = (("smallest", 3), ("middle", 3), ("largest", 2))
EFFECT_OVER_NOISE = 20.0
SWEPT_VALUES, SWEPT_SCALES = 3, 2
LEARNING_RATE = "config.optim.learning_rate"
TABLE_LEARNING_RATE = "config.table.learning_rate"
BATCH = "config.loader.batch_size"


def planned(context: Context) -> list[Said]:
    """Item 1: the plan is there, its levels were run, and nothing else was."""
    spec = context.spec
    said = [good(f"study.yaml states the plan, sha256 {spec.sha256[:12]}")]
    rows = [row for group in context.groups for row in group.fitted_rows]  # the held-out rung lies beyond on purpose
    for axis in spec.axes:
        x_N = numbers(rows, axis.column)
        x_N = x_N[x_N > 0]
        if not len(x_N):
            continue
        if axis.is_range:
            outside = int(((x_N < axis.levels[0] * (1 - NEAR)) | (x_N > axis.levels[1] * (1 + NEAR))).sum())
            if outside:
                text = f"axis {axis.name}: {outside} runs lie outside the planned range {_list(axis.levels)}"
                said.append(bad(text, "declare them in study.yaml before the next run, or exclude them with a reason"))
            continue
        said += _levels(axis, x_N)
    return said


def _levels(axis: Axis, x_N: np.ndarray) -> list[Said]:
    apart_NL = np.abs(np.log(x_N[:, None] / np.array(axis.levels)))
    near = math.log1p(NEAR)
    missing = [level for level, gap in zip(axis.levels, apart_NL.min(0), strict=True) if gap > near]
    extra = sorted({float(f"{x:.3g}") for x in x_N[apart_NL.min(1) > near]})
    said = []
    if missing:
        said.append(bad(f"axis {axis.name}: no run at the planned {_list(missing)} {axis.unit}", "run these cells"))
    if extra:
        text = f"axis {axis.name}: runs at {_list(extra)} {axis.unit}, which the plan does not name"
        said.append(bad(text, "add the levels to study.yaml with a reason, or exclude the runs"))
    return said


def _list(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:,.10g}" for value in values[:6])
    return shown + (f" and {len(values) - 6} more" if len(values) > 6 else "")


@per_group
def spread(context: Context, group: Group) -> list[Said]:
    """Item 2: decades and levels of every axis, number of points, correlation of the axes."""
    points = group.points
    assert points is not None
    fitted = points.fitted
    said = []
    for axis, x_N in zip(context.spec.axes, fitted.x_KN, strict=True):
        decades = math.log10(x_N.max() / x_N.min())
        levels = 1 + int((np.diff(np.sort(np.log(x_N))) > math.log1p(SAME_LEVEL)).sum())
        text = f"axis {axis.name} spans {decades:.2f} decades with {levels} levels"
        if decades < axis.minimum_decades or levels < MINIMUM_LEVELS:
            wanted = f"{axis.minimum_decades:g} decades and {MINIMUM_LEVELS} levels"
            far = f"{x_N.min():.3g} to {x_N.min() * 10**axis.minimum_decades:.3g} {axis.unit}"
            said.append(bad(f"{text}, needs {wanted}", f"run {axis.label} from {far}"))
        else:
            said.append(good(text))
    form, p = max(((name, parameters(name, fitted.axes)) for name in context.spec.forms), key=lambda entry: entry[1])
    needed = POINTS_PER_PARAMETER * p
    if len(fitted) < needed:
        text = f"{len(fitted)} points, the form {form} has {p} parameters and needs {needed}"
        said.append(bad(text, f"run {needed - len(fitted)} more points or drop the form from study.yaml"))
    else:
        said.append(good(f"{len(fitted)} points for at most {p} parameters ({form})"))
    for i, j in itertools.combinations(range(len(fitted.axes)), 2):
        rho = _correlation(np.log(fitted.x_KN[i]), np.log(fitted.x_KN[j]))
        if abs(rho) >= MAXIMUM_CORRELATION:
            pair = f"axes {fitted.axes[i]} and {fitted.axes[j]}"
            text = f"{pair} correlate: rho {rho:+.2f} in logs, at most {MAXIMUM_CORRELATION:g}"
            said.append(bad(text, f"run small {fitted.axes[i]} with large {fitted.axes[j]} and the reverse"))
    return said


def parameters(form: str, axes: tuple[str, ...]) -> int:
    """Number of parameters of a form on these axes; 0 if it does not take so many axes."""
    low, high = FORMS[form].axes
    return len(FORMS[form].names(axes)) if low <= len(axes) <= (high or len(axes)) else 0


def _correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    spread_a, spread_b = a_N.std(), b_N.std()
    return (
        float(((a_N - a_N.mean()) * (b_N - b_N.mean())).mean() / (spread_a * spread_b)) if spread_a * spread_b else 0.0
    )


@per_group
def seeds(context: Context, group: Group) -> list[Said]:
    """Item 3: replicates at three scales, the noise, and the effect of every axis in units of it."""
    spec, rows = context.spec, [*group.fitted_rows, *group.held_out_rows]
    missing = without(rows, spec.main_axis)
    if missing:
        return [unknown(f"{spec.main_axis} is missing in {names(missing)}: no scale to sort by", "record it")]
    cells = [(float(numbers(cell, spec.main_axis).mean()), cell) for cell in cells_of(rows)]
    low, high = (math.log(end([scale for scale, _ in cells])) for end in (min, max))
    said = []
    for third, (name, wanted) in enumerate(SEEDS):
        best = max((len(cell) for scale, cell in cells if _third(math.log(scale), low, high) == third), default=0)
        if best < wanted:
            text = f"{name} scale: {best} seeds of one cell at most, needs {wanted}"
            said.append(bad(text, f"repeat a cell of the {name} third of {spec.main_axis} with other seeds"))
    said += [] if said else [good("seeds are repeated at the smallest, a middle and the largest scale")]
    noise = group.noise
    if not (noise.dof and noise.sd > 0):
        return [*said, unknown("no seed noise: no fitted cell has two seeds", "repeat cells with other seeds")]
    said.append(
        good(
            f"seed noise {noise.sd:.4g} {spec.metric_unit} from {noise.dof} degrees of freedom{_trend(context, cells)}"
        )
    )
    for axis, effect in effects(group).items():
        ratio = effect / noise.sd
        text = f"axis {axis}: effect {effect:.3g} is {ratio:.0f} times the noise"
        if ratio < EFFECT_OVER_NOISE:
            text += f", below {EFFECT_OVER_NOISE:.0f}: its exponent is not identified"
            said.append(bad(text, "widen the axis, add seeds, or state the gain per doubling alone"))
        else:
            said.append(good(text))
    return said


def _third(value: float, low: float, high: float) -> int:
    return min(int(3 * (value - low) / (high - low)), 2) if high > low else 0


def _trend(context: Context, cells: Sequence[tuple[float, list[Row]]]) -> str:
    """How the noise moves with scale: its log-log slope over the cells that have replicates."""
    known = [(scale, float(numbers(cell, context.spec.metric).std(ddof=1))) for scale, cell in cells if len(cell) > 1]
    x_N, sd_N = (np.log([max(entry[i], 1e-300) for entry in known]) for i in (0, 1))
    if len(known) < 3 or np.ptp(x_N) == 0:
        return f"; its trend with scale needs 3 repeated cells, has {len(known)}"
    slope = float(np.polyfit(x_N, sd_N, 1)[0])
    return f"; it goes as scale^{slope:+.2f} over {len(known)} cells"


def effects(group: Group) -> dict[str, float]:
    """What each axis moves the metric over its span, others held: least squares on a quadratic in the logs (a line,
    where there are too few points)."""
    assert group.points is not None
    fitted = group.points.fitted
    z_KN = np.log(fitted.x_KN)
    z_KN = z_KN - z_KN.mean(1, keepdims=True)
    curved = len(fitted) > 2 * (2 * len(z_KN) + 1)
    terms = [np.ones((1, len(fitted))), z_KN, *([z_KN**2] if curved else [])]
    coefficients, *_ = np.linalg.lstsq(np.concatenate(terms).T, fitted.y_N, rcond=None)
    k = len(z_KN)
    bend_K = coefficients[1 + k :] if curved else np.zeros(k)
    along_KN = coefficients[1 : 1 + k, None] * z_KN + bend_K[:, None] * z_KN**2
    return dict(zip(fitted.axes, np.ptp(along_KN, axis=1).tolist(), strict=True))


@per_group
def learning_rates(context: Context, group: Group) -> list[Said]:
    """Item 5: learning rates swept at several scales with the optimum inside, the table's apart, the batch too."""
    column = context.spec.learning_rate_sweep
    if not column:
        return [bad("no learning-rate sweep is planned", "sweep 3 values at 2 scales, name the column in study.yaml")]
    if not group.sweep:
        return [bad(f"no run has {column}: the planned sweep was not run", "run the sweep")]
    scales: dict[str, list[Row]] = {}
    for row in group.sweep:
        scales.setdefault(str(row[column]), []).append(row)
    said = []
    settled: dict[str, list[str]] = {name: [] for name in (LEARNING_RATE, TABLE_LEARNING_RATE, BATCH)}
    for scale, rows in scales.items():
        for knob, done in settled.items():
            entry = _swept(context, rows, knob, scale)
            if entry is not None:
                said.append(entry)
                done += [scale] if not entry.what_to_do else []
    said += _settled(settled)
    touched = [row for row in group.sweep if is_held_out(context.spec, row)]
    if touched:
        text = f"the sweep used held-out runs: {names(touched)}"
        said.append(bad(text, "choose learning rates below the held-out rung"))
    return said


def _settled(settled: Mapping[str, Sequence[str]]) -> list[Said]:
    """What the sweeps leave open; settled: the scales at which each knob has its optimum inside a sweep."""
    said = []
    count = len(settled[LEARNING_RATE])
    if count < SWEPT_SCALES:
        text = f"the learning rate is settled at {count} scales, needs {SWEPT_SCALES}"
        said.append(bad(text, f"sweep at least {SWEPT_VALUES} values of {LEARNING_RATE} with the best one inside"))
    elif count < SWEPT_SCALES + 1:
        said.append(bad("the rule for the learning rate is checked at no third, larger scale", "sweep it there too"))
    if not settled[TABLE_LEARNING_RATE]:
        said.append(bad("the table's learning rate is swept apart at no scale", f"sweep {TABLE_LEARNING_RATE} alone"))
    if not settled[BATCH]:
        text = "the batch is swept at no scale, and no record tells whether it lies below the critical one"
        said.append(unknown(text, f"sweep {BATCH} at one scale"))
    return said


def _swept(context: Context, rows: Sequence[Row], knob: str, scale: str) -> Said | None:
    """A sweep of one knob at one scale, the other knobs at their most common values; None if it was not swept."""
    others = [name for name in (LEARNING_RATE, TABLE_LEARNING_RATE, BATCH) if name != knob]
    common = Counter(tuple(row.get(name) for name in others) for row in rows).most_common(1)[0][0]
    values: dict[float, list[float]] = {}
    for row in rows:
        value, metric = value_of(row, knob), value_of(row, context.spec.metric)
        if tuple(row.get(name) for name in others) == common and value is not None and metric is not None:
            values.setdefault(value, []).append(metric)
    if len(values) < 2:
        return None
    means = {value: float(np.mean(found)) for value, found in sorted(values.items())}
    best = min(means, key=means.__getitem__) if context.spec.direction == "falls" else max(means, key=means.__getitem__)
    text = f"scale {scale}: {len(means)} values of {knob}, best {best:g}"
    if len(means) < SWEPT_VALUES:
        return bad(f"{text}, needs {SWEPT_VALUES} values", "add values on both sides")
    if best in (min(means), max(means)):
        return bad(f"{text}, at the edge of the sweep", "extend the sweep beyond it, or exclude the runs of this scale")
    return good(f"{text}, inside the sweep")
