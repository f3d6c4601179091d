"""Reading STUDY/study.yaml: what a study says of itself before it runs. All problems are said at once.

    question: one sentence
    metric: eval.test.all.nats              # column of the flat table of runs: eval.SPLIT.SLICE.METRIC
    metric_unit: nats/event
    direction: falls                        # falls (a loss) | rises (a bounded metric)
    paired: true                            # every run is evaluated on the same examples
    group: [cell.coordinates.data]          # one law per combination of these columns; [] = one
    axes:                                   # of the surface law, in order
      data: {column: seen.events, label: training events, unit: events, levels: [1.e+4, 1.e+5, 1.e+6]}
      context: {column: config.loader.length, label: history, unit: events, range: [8, 256], minimum_decades: 1.0}
    main_axis: flops.train_total            # on this column the held-out rung lies at least 4x beyond the fitted runs
    cost: {column: flops.train_total, unit: train FLOPs}
    cuts: []                                # one-axis laws of a star design: {name, x, label, unit, cells, floor, end}
    forms: [additive, log]                  # log is the null and always there
    delta: seed                             # seed | lsq | lad | a number
    held_out: {column: cell.coordinates.held_out, value: 1}             # or null
    learning_rate_sweep: {column: cell.coordinates.lr_sweep}            # or null; names the scale of a run of the sweep
    exclude: []                             # {column, above|below|equals, reason}, declared before the runs

`levels` are the planned sizes of a grid, `range` the ends of a space-filling design. A cut's floor is a number, a name
in the study's floors.json, or null; its cells are the names of cells up to the first "-".
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recscale.scaling.collect import Row
from recscale.scaling.forms import FORMS
from recscale.scaling.keyed_file import Reader, UniqueKeys, shown
from recscale.scaling.sources import nearest, number

FILE = "study.yaml"
NULL = "log"
DECADES = 1.5
RULES = ("above", "below", "equals")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the surface law. levels: planned sizes, or the two ends of a range; minimum_decades it must span."""

    name: str
    column: str
    label: str
    unit: str
    levels: tuple[float, ...]
    is_range: bool
    minimum_decades: float


@dataclasses.dataclass(frozen=True)
class Cut:
    """A one-axis law: the runs whose cell name begins with one of `cells`, against column x."""

    name: str
    x: str
    label: str
    unit: str
    cells: tuple[str, ...]
    floor: float | str | None
    end: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run costs: a column of the table and its unit."""

    column: str
    unit: str


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The runs that no fit sees: those with this value in this column."""

    column: str
    value: float | str


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """A rule declared beforehand: rule is above, below or equals."""

    column: str
    rule: str
    bound: float | str
    reason: str

    def meets(self, row: Row) -> bool:
        """Whether a run falls under the rule."""
        found, bound = number(row.get(self.column)), number(self.bound)
        if self.rule == "equals":
            return (
                found == bound if found is not None and bound is not None else str(row.get(self.column)) == self.bound
            )
        if found is None or bound is None:
            return False
        return found > bound if self.rule == "above" else found < bound


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """The plan of a study as its file has it; learning_rate_sweep: a column or None; sha256 of the file's bytes."""

    name: str
    path: Path
    sha256: str
    question: str
    metric: str
    metric_unit: str
    direction: str
    paired: bool
    group: tuple[str, ...]
    axes: tuple[Axis, ...]
    main_axis: str
    cost: Cost
    cuts: tuple[Cut, ...]
    forms: tuple[str, ...]
    delta: str | float
    held_out: HeldOut | None
    learning_rate_sweep: str | None
    exclude: tuple[Exclusion, ...]


KEYS = tuple(
    [
        "question",
        "metric",
        "metric_unit",
        "direction",
        "paired",
        "group",
        "axes",
        "main_axis",
        "cost",
        "forms",
        "delta",
        "held_out",
        "learning_rate_sweep",
        "exclude",
    ]
)


def read_spec(study: str | Path) -> StudySpec:
    """Reads STUDY/study.yaml (or the file itself). Raises FileNotFoundError, or ValueError with a line per problem."""
    path = Path(study)
    path = path / FILE if path.is_dir() or path.suffix != ".yaml" else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file; a study states its plan there before it runs")
    content = path.read_bytes()
    try:
        data = yaml.load(content, UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    read = Reader(path)
    top = read.keys(data, "", KEYS, ("cuts",))
    spec = StudySpec(
        name=path.parent.resolve().name,
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        question=read.text(top, "question", "question"),
        metric=_metric(read, top),
        metric_unit=read.text(top, "metric_unit", "metric_unit"),
        direction=read.one_of(top, "direction", "direction", ("falls", "rises")),
        paired=read.one_of(top, "paired", "paired", (True, False)),
        group=read.many(top, "group", "group", read.text),
        axes=_axes(read, top),
        main_axis=read.text(top, "main_axis", "main_axis"),
        cost=_cost(read, top),
        cuts=read.many(top, "cuts", "cuts", lambda data, name, key: _cut(read, data[name], key)) if top["cuts"] else (),
        forms=_forms(read, top),
        delta=_delta(read, top),
        held_out=_held_out(read, top),
        learning_rate_sweep=_sweep(read, top),
        exclude=read.many(top, "exclude", "exclude", lambda data, name, key: _exclusion(read, data[name], key)),
    )
    if read.problems:
        raise ValueError("\n".join(read.problems))
    return spec


def _metric(read: Reader, top: Mapping[str, Any]) -> str:
    value = read.text(top, "metric", "metric")
    if value and (not value.startswith("eval.") or value.count(".") < 3):
        read.problem("metric", f"found {value!r}, expected eval.SPLIT.SLICE.METRIC, e.g. eval.test.all.nats")
    return value


def _axes(read: Reader, top: Mapping[str, Any]) -> tuple[Axis, ...]:
    axes = top["axes"]
    if not isinstance(axes, Mapping) or not axes:
        return read.wrong(top, "axes", "axes", "at least one axis: name: {column, label, unit, levels}", ())
    return tuple(_axis(read, str(name), value) for name, value in axes.items())


def _axis(read: Reader, name: str, value: Any) -> Axis:
    key = f"axes.{name}"
    data = read.keys(value, key, ("column", "label", "unit"), ("levels", "range", "minimum_decades"))
    given = [word for word in ("levels", "range") if data[word] is not None]
    levels: tuple[float, ...] = ()
    if len(given) != 1:
        read.problem(
            key, f"found {' and '.join(given) or 'neither levels nor range'}, expected one of levels and range"
        )
    else:
        levels = read.many(data, given[0], f"{key}.{given[0]}", lambda d, n, k: read.number(d, n, k, 1.0))
        if given[0] == "range" and not (len(levels) == 2 and levels[0] < levels[1]):
            read.problem(f"{key}.range", f"found {data['range']}, expected [smallest, largest]")
    decades = (
        DECADES
        if data["minimum_decades"] is None
        else read.number(data, "minimum_decades", f"{key}.minimum_decades", DECADES)
    )
    column, label, unit = (read.text(data, word, f"{key}.{word}") for word in ("column", "label", "unit"))
    return Axis(name, column, label, unit, tuple(sorted(levels)), given == ["range"], decades)


def _cost(read: Reader, top: Mapping[str, Any]) -> Cost:
    if "cost" not in top.get("", ()):
        return Cost("", "")
    data = read.keys(top["cost"], "cost", ("column", "unit"))
    return Cost(read.text(data, "column", "cost.column"), read.text(data, "unit", "cost.unit"))


def _cut(read: Reader, value: Any, key: str) -> Cut:
    data = read.keys(value, key, ("name", "x", "label", "unit", "cells"), ("floor", "end"))
    floor = data["floor"] if number(data["floor"]) is None else number(data["floor"])
    if floor is not None and not isinstance(floor, str | float):
        read.problem(f"{key}.floor", f"found {shown(floor)}, expected a number, a name in floors.json, or null")
    name, x, label, unit = (read.text(data, word, f"{key}.{word}") for word in ("name", "x", "label", "unit"))
    cells = read.many(data, "cells", f"{key}.cells", read.text)
    if data["end"] is not None and not isinstance(data["end"], str):
        read.problem(f"{key}.end", f"found {shown(data['end'])}, expected text: why the axis ends")
    return Cut(name, x, label, unit, cells, floor, data["end"] or "")


def _forms(read: Reader, top: Mapping[str, Any]) -> tuple[str, ...]:
    forms = read.many(top, "forms", "forms", read.text)
    for name in forms:
        if name and name not in FORMS:
            read.problem("forms", f"unknown form {name!r}; the nearest known: {nearest(name, tuple(FORMS), 3)}")
    if forms and NULL not in forms:
        read.problem("forms", f"found {', '.join(forms)}, expected {NULL} among them: a law must beat the null")
    return forms


def _delta(read: Reader, top: Mapping[str, Any]) -> str | float:
    value = top["delta"]
    if value in ("seed", "lsq", "lad"):
        return value
    if isinstance(value, bool) or (found := number(value)) is None or not found > 0:
        return read.wrong(top, "delta", "delta", "seed, lsq, lad or a number above 0", "seed")
    return found


def _held_out(read: Reader, top: Mapping[str, Any]) -> HeldOut | None:
    if top["held_out"] is None:
        return None
    data = read.keys(top["held_out"], "held_out", ("column", "value"))
    value = data["value"]
    if isinstance(value, Mapping | list) or (value is None and "value" in data.get("", ())):
        read.problem("held_out.value", f"found {shown(value)}, expected the value of the held-out runs")
    found = number(value)
    return HeldOut(read.text(data, "column", "held_out.column"), str(value) if found is None else found)


def _sweep(read: Reader, top: Mapping[str, Any]) -> str | None:
    if top["learning_rate_sweep"] is None:
        return None
    data = read.keys(top["learning_rate_sweep"], "learning_rate_sweep", ("column",))
    return read.text(data, "column", "learning_rate_sweep.column")


def _exclusion(read: Reader, value: Any, key: str) -> Exclusion:
    data = read.keys(value, key, ("column", "reason"), RULES)
    given = [rule for rule in RULES if data[rule] is not None]
    if len(given) != 1:
        read.problem(key, f"found {' and '.join(given) or 'no rule'}, expected one of {', '.join(RULES)}")
    rule = given[0] if given else RULES[0]
    bound = data[rule]
    if given and rule != "equals" and number(bound) is None:
        read.problem(f"{key}.{rule}", f"found {shown(bound)}, expected a number")
    found = number(bound)
    column, reason = (read.text(data, word, f"{key}.{word}") for word in ("column", "reason"))
    return Exclusion(column, rule, str(bound) if found is None else found, reason)
