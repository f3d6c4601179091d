"""Items 6 to 9 of the checklist: how the runs were trained, counted and evaluated."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from recscale.scaling.collect import Row
from recscale.scaling.findings import Context, Said, bad, good, names, numbers, per_group, unknown, without
from recscale.scaling.study import Group, value_of

WARMUP_SHARE = 0.10
DECAY_SHARE, DECAY_STEPS = 0.10, 100  # a decay of fewer steps does not cool a run, however short the run
COOLING = ("cosine", "wsd")  # schedules that end cooled when the run ends where they do
ONE_PASS = 1.02  # the last batch may reach into the next pass
SAME_SUM = 0.01
TEMPORAL = ("global_time", "next_window")
FLOPS = ("flops.projections", "flops.attention", "flops.head", "flops.train_total")
LOOKUPS = "flops.lookup_bytes"


def _known(row: Row, *columns: str) -> float | None:
    """The first of these columns that a row has as a number."""
    return next((value for column in columns if (value := value_of(row, column)) is not None), None)


def missing(rows: Sequence[Row], column: str, do: str) -> list[Said]:
    """That a column is missing in some runs, if it is."""
    lacking = without(rows, column)
    return (
        [unknown(f"{column} is missing in {len(lacking)} of {len(rows)} runs: {names(lacking)}", do)] if lacking else []
    )


@per_group
def schedules(context: Context, group: Group) -> list[Said]:
    """Item 6: runs end where their schedule ends, decays are long enough, warm-ups short enough."""
    rows = group.rows
    lacking = [row for row in rows if _schedule(row) is None or length(row) is None]
    if lacking:
        text = f"schedule or steps are missing in {len(lacking)} of {len(rows)} runs: {names(lacking)}"
        return [unknown(text, "train with a trainer that records config.optim.schedule, steps and stopped_at")]
    kinds = (
        (_short_of_horizon, "stopped before the schedule's end", "train to the horizon, or branch and cool the run"),
        (_hot, "never cooled", "use a schedule that decays (cosine, wsd) or a cooled branch"),
        (_short_decay, f"cooled for less than {DECAY_SHARE:.0%} or {DECAY_STEPS} steps", "cool for longer"),
        (_long_warmup, f"warmed up for more than {WARMUP_SHARE:.0%} of the run", "shorten the warm-up with the run"),
    )
    said = []
    for test, what, do in kinds:
        found = [row for row in rows if test(row)]
        if found:
            said.append(bad(f"{len(found)} of {len(rows)} runs {what}: {names(found)}", do))
    return said or [
        good(f"all {len(rows)} runs end cooled at their horizon, with warm-ups of at most {WARMUP_SHARE:.0%}")
    ]


def length(row: Row) -> float | None:
    """Steps that a run took."""
    return _known(row, "stopped_at", "steps")


def _schedule(row: Row) -> str | None:
    return row.get("schedule") or row.get("config.optim.schedule")


def _cooled(row: Row) -> bool:
    """As the record says; one that does not say so is cooled where its schedule ran to its end."""
    if isinstance(row.get("cooled"), bool):
        return row["cooled"]
    return _schedule(row) in COOLING and not _ends_early(row)


def _ends_early(row: Row) -> bool:
    horizon, steps = _known(row, "horizon", "steps"), length(row)
    return horizon is not None and steps is not None and steps < horizon


def _short_of_horizon(row: Row) -> bool:
    return _ends_early(row) and not _cooled(row)


def _hot(row: Row) -> bool:
    return not _cooled(row) and not _ends_early(row)


def _short_decay(row: Row) -> bool:
    """Of a cosine the whole run after the warm-up is the decay; wsd without a recorded one decays over a fifth."""
    steps, decay = length(row), _known(row, "decay_steps")
    if steps is None or not _cooled(row):
        return False
    if decay is None:
        decay = steps // 5 if _schedule(row) == "wsd" else steps - (_warmup(row) or 0)
    return decay < max(DECAY_SHARE * steps, DECAY_STEPS)


def _warmup(row: Row) -> float | None:
    known = [
        value for name in ("warmup", "config.optim.warmup", "config.table.warmup") if (value := value_of(row, name))
    ]
    return max(known, default=0.0)


def _long_warmup(row: Row) -> bool:
    steps, warmup = length(row), _warmup(row)
    return steps is not None and warmup is not None and warmup > WARMUP_SHARE * steps


@per_group
def flops(context: Context, group: Group) -> list[Said]:
    """Item 7: FLOPs by part, summing to the total, from counts that are held against the compiler."""
    rows, spec = group.rows, context.spec
    said = []
    for column in (*FLOPS, LOOKUPS):
        said += missing(rows, column, "record FLOPs by part: projections, attention, head, lookup bytes, total")
    if said:
        return said
    off = [row for row in rows if abs(sum(row[name] for name in FLOPS[:3]) / row[FLOPS[3]] - 1) > SAME_SUM]
    if off:
        said.append(
            bad(f"parts do not sum to {FLOPS[3]} in {names(off)}", "count every part, or record the missing one")
        )
    for column in {spec.main_axis, spec.cost.column}:
        if "6nd" in column.casefold():
            said.append(bad(f"{column} counts 6ND", f"use {FLOPS[3]}; 6ND misses attention and the head"))
    foreign = [row for row in rows if row.get("versions.recscale") is None]
    if foreign:
        text = f"nothing tells whether the counts of {names(foreign)} were held against the compiler"
        said.append(unknown(text, "count one layer with the compiler and write it into the study's README"))
    return said or [good("FLOPs by part sum to the total; the library's tests hold these counts against the compiler")]


@per_group
def evaluation(context: Context, group: Group) -> list[Said]:
    """Item 8: one set of examples, every candidate, a split in time, and an error below the seed noise."""
    rows, metric = group.rows, context.spec.metric
    said = missing(rows, f"{metric}.n", "record n of every evaluation")
    sizes = Counter(value_of(row, f"{metric}.n") for row in rows)
    if not said and len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        odd = [row for row in rows if value_of(row, f"{metric}.n") != usual]
        said.append(bad(f"{names(odd)}: evaluated on other than {usual:g} examples", "evaluate all runs on one set"))
    for column in sorted({key for row in rows for key in row if key.startswith("config.split.")}):
        found = sorted({str(row.get(column)) for row in rows})
        if column != "config.split.train_users" and len(found) > 1:
            said.append(bad(f"{column} differs between runs: {', '.join(found[:4])}", "use one split for all runs"))
    said += _candidates(rows) + _split_in_time(rows)
    return said + _error(context, group)


def _candidates(rows: Sequence[Row]) -> list[Said]:
    lacking = [row for row in rows if row.get("config.eval.protocols") is None]
    if lacking:
        return [unknown(f"config.eval.protocols is missing in {names(lacking)}", "record against which candidates")]
    sampled = [row for row in rows if "full" not in row["config.eval.protocols"]]
    if sampled:
        return [bad(f"{names(sampled)}: evaluated on sampled candidates alone", "evaluate with the protocol full")]
    return []


def _split_in_time(rows: Sequence[Row]) -> list[Said]:
    found = sorted({str(row.get("config.split.name")) for row in rows})
    if found == ["None"]:
        return [unknown("config.split.name is missing", "record how the data was split")]
    if set(found) <= set(TEMPORAL):
        return []
    text = f"split {', '.join(found)} is not one moment in time: some training is later than some of the evaluation"
    return [bad(text, f"split by {' or '.join(TEMPORAL)}, or say in the README why time plays no part in this data")]


def _error(context: Context, group: Group) -> list[Said]:
    rows, metric, unit = group.rows, context.spec.metric, context.spec.metric_unit
    stderr_N = numbers(rows, f"{metric}.stderr")
    if not np.isfinite(stderr_N).all():
        return missing(rows, f"{metric}.stderr", "record the standard error of every evaluation")
    stderr, noise = float(np.median(stderr_N)), group.noise
    if context.spec.paired:
        return [good(f"evaluation error {stderr:.3g} {unit} is shared by all runs: it moves the floor, not the shape")]
    if not noise.dof:
        return [unknown(f"evaluation error {stderr:.3g} {unit}, but no seed noise to hold it against", "repeat cells")]
    text = f"evaluation error {stderr:.3g} against seed noise {noise.sd:.3g} {unit}"
    if stderr < noise.sd / 2:
        return [good(text)]
    return [bad(f"{text}, at most half of it", f"evaluate on {4 * (stderr / noise.sd) ** 2:.1f} times the examples")]


@per_group
def epochs(context: Context, group: Group) -> list[Said]:
    """Item 9: one pass over the data, or passes are an axis."""
    if "repeat" in context.spec.forms or any(axis.column == "seen.epochs" for axis in context.spec.axes):
        return [good("passes over the data have a term of their own")]
    said = missing(group.rows, "seen.epochs", "record passes over the data")
    again = [row for row in group.rows if (value_of(row, "seen.epochs") or 0) > ONE_PASS]
    if again:
        text = f"{len(again)} of {len(group.rows)} runs see data more than once: {names(again)}"
        said.append(bad(text, "train one pass, or make seen.epochs an axis and add the form repeat"))
    return said or [good(f"all {len(group.rows)} runs take one pass over their data")]
