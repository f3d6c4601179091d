"""Figures of the runs themselves: learning-rate sensitivity, collapse of training curves, metric against loss."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recscale.scaling.answers import Answer
from recscale.scaling.checklist_design import BATCH, LEARNING_RATE, TABLE_LEARNING_RATE
from recscale.scaling.collect import Row
from recscale.scaling.figures import (
    COLOURS,
    HELD_OUT,
    INK,
    LAW,
    Diagram,
    Panel,
    Series,
    band,
    line,
    missing,
    points,
)
from recscale.scaling.figures_axes import metric_label
from recscale.scaling.findings import numbers
from recscale.scaling.fits import compare
from recscale.scaling.points import Points
from recscale.scaling.study import equals, value_of
from recscale.scaling.study_file import StudySpec

KNOBS = {LEARNING_RATE: "learning rate", TABLE_LEARNING_RATE: "learning rate of the table", BATCH: "rows per step"}
LINKS = ("link_linear", "link_exp", "link_logistic")
LINK_DRAWS = 200
PREFERRED = ("ndcg@10", "hr@10", "recall@10", "mrr", "auc")
FEWEST_FOR_LINK = 5
SMOOTHED = 24  # windows of a training curve

Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def curves_of(spec: StudySpec, rows: Sequence[Row], source: str) -> tuple[Curves, str]:
    """Curves of the runs, run -> (share of the run [T], value [T]), and what they are; {} and why where there are none.

    First choice: evaluations along the way, `curve` in the records. Else the training loss in metrics.jsonl beside the
    records, in windows. A frozen table has neither unless its rows hold `curve`.
    """
    _, _, part, metric = spec.metric.split(".", 3)
    found = {}
    for row in rows:
        entries = [
            (entry["step"], entry["value"])
            for entry in row.get("curve") or []
            if entry["metric"] == metric and entry["slice"] == part
        ]
        steps = value_of(row, "steps")
        if len(entries) > 2 and steps:
            step_T, value_T = np.array(sorted(entries), np.float64).T
            found[str(row["run_id"])] = (step_T / steps, value_T)
    if found:
        return found, f"{metric} along the way ({spec.metric_unit})"
    trained = _training(Path(source)) if source and Path(source).is_dir() else {}
    if trained:
        return trained, "training loss, as optimised (nats)"
    return {}, "the records hold no curve; set train.eval_every, or report from the folder of the runs"


def _training(folder: Path) -> Curves:
    """Training losses of every run below a folder, averaged in windows."""
    found = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        try:
            run = json.loads((path.parent / "record.json").read_text())["run_id"]
            entries = [json.loads(text) for text in path.read_text().splitlines()]
        except (OSError, ValueError, KeyError, TypeError):  # collect says what is wrong with such a run
            continue
        pairs = [(e["step"], e["loss"]) for e in entries if isinstance(e, dict) and "loss" in e and "split" not in e]
        pairs = [(step, loss) for step, loss in pairs if isinstance(loss, int | float) and math.isfinite(loss)]
        if len(pairs) > 2:
            step_T, loss_T = np.array(sorted(pairs), np.float64).T
            parts = np.array_split(np.arange(len(step_T)), min(SMOOTHED, len(step_T)))
            middle = np.array([step_T[part].mean() for part in parts]) / step_T[-1]
            found[str(run)] = (middle, np.array([loss_T[part].mean() for part in parts]))
    return found


def learning_rates(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 10: metric against learning rate and batch at each scale, the best marked, edges named."""
    name, title = "learning_rate", "Learning rate and batch at each scale"
    if not spec.learning_rate_sweep:
        return missing(
            name, title, "Not drawn: no learning-rate sweep was planned, so the rates are a rule nobody checked."
        )
    if not found.group.sweep:
        return missing(name, title, f"Not drawn: no run has {spec.learning_rate_sweep}; the planned sweep was not run.")
    panels = [
        panel for knob, label in KNOBS.items() if (panel := _knob(spec, found.group.sweep, knob, label)) is not None
    ]
    if not panels:
        return missing(name, title, "Not drawn: the sweep holds fewer than two values of every knob.")
    caption = (
        "Other knobs at their most common value. Diamond: the best value; at an edge the sweep does not settle it."
    )
    return Diagram(name, title, caption, tuple(panels))


def _knob(spec: StudySpec, rows: Sequence[Row], knob: str, label: str) -> Panel | None:
    assert spec.learning_rate_sweep is not None
    scales: dict[str, list[Row]] = {}
    for row in rows:
        scales.setdefault(str(row[spec.learning_rate_sweep]), []).append(row)
    drawn: list[Series] = []
    for index, (scale, members) in enumerate(scales.items()):
        drawn += _swept(spec, members, knob, scale, COLOURS[index % len(COLOURS)])
    return Panel(label, f"{label} (log scale)", metric_label(spec), tuple(drawn), x_log=True) if drawn else None


def _swept(spec: StudySpec, rows: Sequence[Row], knob: str, scale: str, colour: str) -> list[Series]:
    others = [name for name in KNOBS if name != knob]
    common = Counter(tuple(row.get(name) for name in others) for row in rows).most_common(1)[0][0]
    some = [row for row in rows if tuple(row.get(name) for name in others) == common]
    some = [row for row in some if value_of(row, knob) and value_of(row, spec.metric) is not None]
    x, y = numbers(some, knob), numbers(some, spec.metric)
    if len(np.unique(x)) < 2:
        return []
    order = np.argsort(x)
    x, y, names = x[order], y[order], tuple(str(some[i]["run_id"]) for i in order)
    best = int(np.argmin(y) if spec.direction == "falls" else np.argmax(y))
    edge = ", at the edge" if x[best] in (x[0], x[-1]) else ""
    return [
        line("", x, y, colour),
        points(f"{scale}: best {x[best]:.3g}{edge}", x, y, colour, run=names),
        points("", [x[best]], [y[best]], colour, run=(names[best],), shape="diamond"),
    ]


def collapse(
    spec: StudySpec, found: Answer, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], source: str
) -> Diagram:
    """Diagnostic 11: curves over their end against the share of the run; well-scaled runs fall on one curve."""
    name, title = "collapse", "Collapse of the training curves"
    mine = {run: curves[run] for row in found.group.rows if (run := str(row["run_id"])) in curves}
    if len(mine) < 2:
        return missing(name, title, f"Not drawn: {len(mine)} runs have a curve ({source}).")
    start = max(0.1, max(float(share[0]) for share, _ in mine.values()))
    at = np.linspace(start, 1.0, 30)
    normal = np.stack([np.interp(at, share, value) / value[-1] for share, value in mine.values()])
    spread = normal.std(0, ddof=1)
    drawn: list[Series] = [line("" if i else "runs", at, y, "#a9b4c0") for i, y in enumerate(normal)]
    drawn.append(line("mean", at, normal.mean(0), LAW))
    drawn.append(band("one standard deviation", at, normal.mean(0) - spread, normal.mean(0) + spread))
    noise = found.group.noise
    told = ""
    if noise.dof and found.group.points is not None:
        told = f" Seed noise of the metric: {noise.sd / abs(float(found.group.points.y_N.mean())):.2%}."
    caption = f"Largest spread after the start {spread.max():.2%}.{told} Curve: {source}."
    return Diagram(name, title, caption, (Panel("", "share of the run", "curve over its end", tuple(drawn)),))


def metric_against_loss(spec: StudySpec, found: Answer) -> Diagram:
    """Diagnostic 12: another metric of the same evaluation against the fitted one, with the link that fits best."""
    name, title = "link", "Another metric against the fitted one"
    rows = [row for row in found.group.rows if value_of(row, spec.metric) is not None]
    base, fitted = spec.metric.rsplit(".", 1)
    others = [
        key
        for key in dict.fromkeys(k for row in rows for k in row)
        if key.startswith(f"{base}.") and key.count(".") == 3
    ]
    others = [key for key in others if key != spec.metric and sum(value_of(r, key) is not None for r in rows) > 1]
    if not others:
        return missing(name, title, f"Not drawn: the records hold no other metric beside {spec.metric}.")
    rank = {metric: place for place, metric in enumerate(PREFERRED)}
    chosen = min(others, key=lambda key: rank[key.rsplit(".", 1)[1]] if key.rsplit(".", 1)[1] in rank else len(rank))
    rows = [row for row in rows if value_of(row, chosen) is not None]
    metric = chosen.rsplit(".", 1)[1]
    x, y, runs = numbers(rows, spec.metric), numbers(rows, chosen), tuple(str(row["run_id"]) for row in rows)
    out = np.array(
        [spec.held_out is not None and equals(row.get(spec.held_out.column), spec.held_out.value) for row in rows]
    )
    drawn: list[Series] = []
    for label, mask, colour, shape in (("runs", ~out, INK, "circle"), ("held out", out, HELD_OUT, "diamond")):
        if mask.any():
            names = tuple(run for run, keep in zip(runs, mask, strict=True) if keep)
            drawn.append(points(label, x[mask], y[mask], colour, run=names, shape=shape))
    curve, caption = _link(x, y, out, metric)
    panel = Panel("", metric_label(spec), metric, (*curve, *drawn))
    return Diagram(name, f"{metric} against {fitted}", caption, (panel,))


def _link(x: np.ndarray, y: np.ndarray, out: np.ndarray, metric: str) -> tuple[list[Series], str]:
    if (~out).sum() < FEWEST_FOR_LINK or not (x > 0).all():
        return [], f"No link fitted: {int((~out).sum())} runs, needs {FEWEST_FOR_LINK}."
    try:
        sizes = Points.of({"loss": x}, y, held_out=out, metric=metric)
        with np.errstate(over="ignore", invalid="ignore"):  # a link that does not fit is refused, not warned of
            comparison = compare(sizes, LINKS, scale="identity", delta="lsq", draws=LINK_DRAWS)
    except ValueError as error:
        return [], f"No link fitted: {error}."
    link = comparison.best
    if link is None:
        return [], comparison.text
    x_M = np.linspace(x.min(), x.max(), 50)
    value_M, low_M, high_M = link.band({"loss": x_M})
    label = f"{link.form}: {link.formula}"
    return [band("90 %", x_M, low_M, high_M, framed=False), line(label, x_M, value_M)], comparison.text
