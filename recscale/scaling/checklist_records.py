"""Items 14 to 18 and 20 of the checklist, which warn: what a reader of the law must know of the runs behind it."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from recscale.scaling.checklist_runs import length, missing
from recscale.scaling.collect import Row
from recscale.scaling.findings import Context, Said, bad, good, numbers, per_group, unknown
from recscale.scaling.study import Group, value_of

CONFOUNDED = 0.8
COLLAPSE_AT, COLLAPSE_NOISE = (0.25, 0.5, 0.75), 3.0


@per_group
def vocabulary(context: Context, group: Group) -> list[Said]:
    """Item 14: what the table axis needs: rows touched, abundance, unseen items, lengths, padding."""
    rows, metric = group.rows, context.spec.metric
    split = metric.split(".")[1]
    columns = {key for row in rows for key in row}
    wanted = {
        "the share of unseen items": any(key.startswith(f"eval.{split}.new_items.") for key in columns),
        "rows touched in training": any(key.endswith("rows_touched") or key == "table.arrays" for key in columns),
        "information abundance of the table": "table.information_abundance" in columns,
        "the metric by length of history": any(key.startswith(f"eval.{split}.history_") for key in columns),
        "the share of padding": "seen.fill" in columns,
    }
    lacking = [what for what, there in wanted.items() if not there]
    said = [unknown(f"no run records {', '.join(lacking)}", "train with the current trainer")] if lacking else []
    rows_N, events_N = numbers(rows, "table.rows"), numbers(rows, "seen.events")
    both = (rows_N > 0) & (events_N > 0)
    if both.sum() > 2 and np.ptp(rows_N[both]) > 0 and np.ptp(events_N[both]) > 0:
        rho = float(np.corrcoef(np.log(rows_N[both]), np.log(events_N[both]))[0, 1])
        if abs(rho) >= CONFOUNDED:
            text = f"table rows and training events move together: rho {rho:+.2f} in logs"
            said.append(bad(text, "cap the vocabulary at several sizes for each amount of data"))
    return said + _abundance(rows) or [good("unseen items, rows touched, abundance, lengths and padding are recorded")]


def _abundance(rows: Sequence[Row]) -> list[Said]:
    """Information abundance must not fall as tables grow."""
    pairs = [(value_of(row, "parameters.tables"), value_of(row, "table.information_abundance")) for row in rows]
    known = [(size, abundance) for size, abundance in pairs if size and abundance]
    if len({size for size, _ in known}) < 2:
        return []
    ends = [float(np.mean([a for size, a in known if size == end])) for end in (min(known)[0], max(known)[0])]
    if ends[1] >= ends[0]:
        return []
    text = f"information abundance falls from {ends[0]:.3g} at the smallest table to {ends[1]:.3g} at the largest"
    return [bad(text, "a larger table that collapses is not scaling: say so, or regularise the tables")]


def exclusions(context: Context) -> list[Said]:
    """Item 15: every run that is no point has a reason."""
    tables, source = context.tables, Path(context.tables.source)
    found = tables.every_excluded
    silent = [run.run for run in found if not run.reason]
    if silent:
        return [bad(f"runs without a reason: {', '.join(silent[:4])}", "write the reason into the record")]
    if source.is_file() and not source.with_name("excluded.csv").exists():
        text = f"{source} holds finished runs alone: nothing tells which diverged or failed"
        return [unknown(text, "write excluded.csv (run, status, reason) beside it, or give --runs FOLDER")]
    counts = Counter(run.status for run in found)
    listed = ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"
    return [good(f"{len(found)} runs are excluded, each with its reason: {listed}")]


@per_group
def sizes(context: Context, group: Group) -> list[Said]:
    """Item 16: parameters with and without tables, memory, and what serving costs."""
    said = []
    for column in ("parameters.tables", "parameters.dense", "table.bytes"):
        said += missing(group.rows, column, "record parameters by group and the bytes of the tables")
    if not any(key.startswith(("inference.", "flops.serving", "serving.")) for row in group.rows for key in row):
        said.append(unknown("no run records what serving a request costs", "record inference.total"))
    return said or [good("parameters by group, bytes of the tables and serving cost are recorded")]


@per_group
def second_window(context: Context, group: Group) -> list[Said]:
    """Item 17: the metric on a second evaluation window."""
    _, split, rest = context.spec.metric.split(".", 2)
    others = Counter(
        key.split(".")[1]
        for row in group.rows
        for key in row
        if key.startswith("eval.")
        and key.count(".") >= 3
        and key.split(".", 2)[2] == rest
        and key.split(".")[1] != split
    )
    if others and others.most_common(1)[0][1] == len(group.rows):
        return [
            good(
                f"every run is evaluated on {others.most_common(1)[0][0]} too; floors of two windows are not comparable"
            )
        ]
    return [bad(f"the law rests on one window, {split}", "evaluate every run on a second split and fit it too")]


@per_group
def collapse(context: Context, group: Group) -> list[Said]:
    """Item 18: training curves, divided by their ends, fall on one curve when hyper-parameters scale well."""
    curves = [found for row in group.fitted_rows if (found := _curve(context, row)) is not None]
    if len(curves) < 3:
        text = f"{len(curves)} runs have a curve of {context.spec.metric}, needs 3"
        return [unknown(text, "set train.eval_every so that each run is evaluated along the way")]
    spread = float(np.std(curves, axis=0, ddof=1).max())
    assert group.points is not None
    noise = group.noise.sd / float(np.mean(np.abs(group.points.fitted.y_N)))
    if not noise > 0:
        return [unknown("no seed noise to hold the curves against", "repeat cells with other seeds")]
    text = f"normalised curves differ by {spread:.2%}, {spread / noise:.1f} times the seed noise"
    return (
        [good(text)]
        if spread <= COLLAPSE_NOISE * noise
        else [bad(text, "tune the learning rate and schedule per scale")]
    )


def _curve(context: Context, row: Row) -> np.ndarray | None:
    """The metric over its final value at fixed shares of the run, None without a curve that reaches so far back."""
    part, metric = context.spec.metric.split(".", 3)[2:]
    entries = [
        (entry["step"], entry["value"])
        for entry in row.get("curve") or []
        if entry["metric"] == metric and entry["slice"] == part
    ]
    end, steps = value_of(row, context.spec.metric), length(row)
    if len(entries) < len(COLLAPSE_AT) or not end or not steps:
        return None
    step_N, value_N = np.array(sorted(entries), np.float64).T
    if step_N[0] > COLLAPSE_AT[0] * steps:
        return None
    return np.interp(np.array(COLLAPSE_AT) * steps, step_N, value_N) / value_N[-1]


def bundle(context: Context) -> list[Said]:
    """Item 20: the table of runs and the script lie beside the plan, so that the law can be made again offline."""
    folder = context.spec.path.parent
    wanted: dict[str, Callable[[], bool]] = {
        "study.py": lambda: (folder / "study.py").is_file(),
        "README.md": lambda: (folder / "README.md").is_file(),
        "results/runs.csv or .parquet": lambda: any((folder / "results").glob("runs.[cp]*")),
    }
    lacking = [name for name, there in wanted.items() if not there()]
    if lacking:
        return [bad(f"{folder} has no {', no '.join(lacking)}", "write the report and keep its table in results/")]
    return [good("the plan, the script and the frozen table of runs lie together")]
