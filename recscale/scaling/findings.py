"""What a check of a study finds, and what it looks at: the words that the items of the checklist share."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from recscale.scaling.collect import Row
from recscale.scaling.fits import Comparison, Law
from recscale.scaling.study import Group, Tables, value_of
from recscale.scaling.study_file import StudySpec
from recscale.scaling.validate import Prediction, Rollout, Sensitivity

OK, FINDING, UNKNOWN = "ok", "finding", "unknown"
NAMED_RUNS = 4


@dataclasses.dataclass(frozen=True)
class Said:
    """What an item says: state ok, finding or unknown (the records do not tell), the fact, and what to do about it."""

    state: str
    text: str
    what_to_do: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a check. item: number in the checklist; level: "B" blocks the law, "W" warns."""

    item: int
    level: str
    title: str
    state: str
    text: str
    what_to_do: str

    @property
    def blocks(self) -> bool:
        """Whether no law may be printed without this being put right: what cannot be judged blocks too."""
        return self.level == "B" and self.state != OK

    @property
    def mark(self) -> str:
        """One word: ok, BLOCKS, UNKNOWN (which blocks too), warns or unknown."""
        if self.state == OK:
            return "ok"
        word = "warns" if self.state == FINDING else "unknown"
        return {"warns": "BLOCKS", "unknown": "UNKNOWN"}[word] if self.blocks else word


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was fitted to one group; None is what was not tried.

    comparison: of the declared forms (recscale/scaling/fits.py `compare`); fewer: axis -> law without that axis;
    held_out: test on the held-out rung; rollout: axis -> form -> leave-future-out (recscale/scaling/validate.py);
    sensitivity: refits; isoflop: a mark per isoFLOP profile, "" for a sound one; problem: why
    nothing was fitted.
    """

    comparison: Comparison | None = None
    fewer: Mapping[str, Law] = dataclasses.field(default_factory=dict)
    held_out: Prediction | None = None
    rollout: Mapping[str, Mapping[str, Rollout]] = dataclasses.field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    isoflop: tuple[str, ...] | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Context:
    """What an item judges: the plan, the runs, and the laws by group where some were fitted (None: none was tried)."""

    spec: StudySpec
    tables: Tables
    laws: Mapping[str, Evidence] | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of the study."""
        return self.tables.groups

    def evidence(self, group: Group) -> Evidence | None:
        """What was fitted to a group, if anything."""
        return None if self.laws is None else self.laws.get(group.name)


Item = Callable[[Context], list[Said]]


def good(text: str) -> Said:
    """An item that is as it should be."""
    return Said(OK, text)


def bad(text: str, what_to_do: str) -> Said:
    """An item that is not."""
    return Said(FINDING, text, what_to_do)


def unknown(text: str, what_to_do: str) -> Said:
    """An item that the records do not let anyone judge: what is missing."""
    return Said(UNKNOWN, text, what_to_do)


def per_group(judge: Callable[[Context, Group], list[Said]]) -> Item:
    """An item that is judged group by group; texts name the group where there are several."""

    def item(context: Context) -> list[Said]:
        found = []
        for group in context.groups:
            head = "" if len(context.groups) == 1 else f"[{group.name}] "
            if group.points is None or not group.fitted_rows:
                found.append(unknown(f"{head}no run to fit: {group.problem or 'all are held out'}", "run the study"))
            else:
                said = judge(context, group)
                found += [dataclasses.replace(entry, text=head + entry.text) for entry in said]
        return found or [unknown("the study has no finished runs", "run the study")]

    item.__name__ = judge.__name__
    return item


def names(rows: Iterable[Row]) -> str:
    """The run ids of rows, the first few by name."""
    found = [str(row["run_id"]) for row in rows]
    more = f" and {len(found) - NAMED_RUNS} more" if len(found) > NAMED_RUNS else ""
    return ", ".join(found[:NAMED_RUNS]) + more


def without(rows: Iterable[Row], column: str) -> list[Row]:
    """Rows that have no finite number in a column."""
    return [row for row in rows if value_of(row, column) is None]


def numbers(rows: Sequence[Row], column: str) -> np.ndarray:
    """A column as floats, NaN where a row has none."""
    values = [value_of(row, column) for row in rows]
    return np.array([math.nan if value is None else value for value in values], np.float64)


def cells_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but the seed, together: equal `cell.coordinates`."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        place = tuple(sorted((key, repr(value)) for key, value in row.items() if key.startswith("cell.coordinates.")))
        found.setdefault(place, []).append(row)
    return list(found.values())
