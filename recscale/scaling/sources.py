"""Runs of any origin as one table. What is wrong with a source is said at once, one line per problem.

A source is a CSV or parquet file with one run per row, the run table or the histories that Weights & Biases exports, an
MLflow store or table, TensorBoard event files or chart CSVs, or a folder of this library's run records. KINDS says how
each names a run and its state. A mapping (our name -> name in the source) makes the columns of a tracker readable:

    {"params": "params.n_params", "tokens": "metrics.tokens_seen", "loss": "metrics.val/loss"}

`recscale/scaling/sources_points.py` turns a table into the points of a fit.
"""

import csv
import dataclasses
import difflib
import fnmatch
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from recscale.scaling import collect, sources_trackers
from recscale.scaling.collect import Excluded, Row

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a source names its runs. run: columns that may hold the name, best first; status: its state; done: what the
    state of a finished run reads; needs: columns that give the kind away ("metrics.*": some column that begins so)."""

    run: tuple[str, ...]
    status: str = ""
    done: str = ""
    needs: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "W&B run table": Kind(("ID", "Name"), "State", "finished", ("Name", "State")),
    "MLflow run table": Kind(("run_id",), "status", "FINISHED", ("run_id", "status", "metrics.*")),
    "MLflow page": Kind(("Run ID",), "Status", "FINISHED", ("Run ID", "Status")),
    "MLflow store": Kind(("run_id",), "status", "FINISHED"),
    "histories": Kind(("run",)),
    "TensorBoard": Kind(("run",)),
    "run records": Kind(("run_id",)),
    "table": Kind(("run_id", "run")),
}


class BadTable(ValueError):
    """A table that cannot be fitted; problems: one line each, in the order found."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclasses.dataclass(frozen=True)
class Table:
    """rows: one per run; places: where each stands ("line 4", "run ab12"); kind: one of KINDS; excluded: runs that
    their tracker does not call finished."""

    source: str
    kind: str
    rows: tuple[Row, ...]
    places: tuple[str, ...]
    excluded: tuple[Excluded, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Every column that some row has."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    @property
    def run_column(self) -> str | None:
        """The column that names a run, if there is one."""
        return next((name for name in KINDS[self.kind].run if name in self.columns), None)


def read_table(path: str | Path, mapping: Mapping[str, str] | None = None) -> Table:
    """Reads a file or folder of runs; mapping: our name -> name in the source. Raises BadTable with all problems."""
    path = Path(path)
    try:
        kind, rows, excluded = _folder(path) if path.is_dir() else _file(path)
    except FileNotFoundError:
        raise BadTable([f"{path}: found no such file or folder"]) from None
    except BadTable:
        raise
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        text = str(error).splitlines()[0]
        raise BadTable([text if text.startswith(str(path)) else f"{path}: cannot be read ({text})"]) from error
    if not rows and excluded:
        why = f"{excluded[0].run}: {excluded[0].reason}"
        raise BadTable([f"{path}: all {len(excluded)} runs ({kind}) are left out, the first {why}"])
    if not rows:
        raise BadTable([f"{path}: found no runs ({kind}), expected at least one row"])
    table = _renamed(Table(str(path), kind, tuple(row for _, row in rows), tuple(place for place, _ in rows)), mapping)
    return _finished(dataclasses.replace(table, excluded=tuple(excluded)))


def _folder(path: Path) -> tuple[str, sources_trackers.Rows, list[Excluded]]:
    if next(path.rglob("record.json"), None):
        records = collect.collect(path)
        return "run records", [(f"run {row['run_id']}", row) for row in records.rows], records.excluded
    if next(path.rglob(sources_trackers.EVENT_FILE), None):
        return "TensorBoard", sources_trackers.event_folder(path), []
    if next(path.rglob("meta.yaml"), None):
        return "MLflow store", sources_trackers.mlflow_folder(path), []
    if files := sorted(path.glob("*.jsonl")):
        return "histories", sources_trackers.json_lines(files), []
    if files := sorted(path.glob("*.csv")):
        charts = {file: [row for _, row in _csv(file)] for file in files}
        if all(list(rows[0]) == sources_trackers.CHART_COLUMNS for rows in charts.values() if rows):
            return "TensorBoard", sources_trackers.chart_files(charts), []
    expected = "run records, an MLflow store, TensorBoard event files, chart CSVs (Wall time, Step, Value) or *.jsonl"
    raise BadTable([f"{path}: found no runs in this folder, expected {expected}; or give a single CSV or parquet file"])


def _file(path: Path) -> tuple[str, sources_trackers.Rows, list[Excluded]]:
    if path.suffix == ".parquet":
        rows = [(f"row {number}", row) for number, row in enumerate(parquet.read_table(path).to_pylist(), 1)]
    elif path.suffix == ".jsonl":
        rows = sources_trackers.json_lines([path])
    elif path.suffix == ".csv":
        rows = _csv(path)
    else:
        raise BadTable([f"{path}: found the ending {path.suffix!r}, expected .csv, .parquet or .jsonl, or a folder"])
    columns = list(rows[0][1]) if rows else []
    if columns == sources_trackers.CHART_COLUMNS:
        raise BadTable([f"{path}: one chart of one run; give the folder of all charts (run-RUN-tag-TAG.csv)"])
    if any(name.endswith("__MIN") for name in columns):
        raise BadTable([f"{path}: a W&B chart, which holds no sizes; export the table of runs (Runs, download as CSV)"])
    return next((name for name, kind in KINDS.items() if kind.needs and _has(columns, kind.needs)), "table"), rows, []


def _has(columns: Sequence[str], patterns: Sequence[str]) -> bool:
    return all(fnmatch.filter(columns, pattern) for pattern in patterns)


def _csv(path: Path) -> sources_trackers.Rows:
    """Rows as text, empty cells as None, places as line numbers."""
    with io.StringIO(path.read_text(encoding="utf-8-sig"), newline="") as text:
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        doubled = sorted({name for name in header if header.count(name) > 1})
        problems = [f"{path}: column {name!r} occurs {header.count(name)} times: rename one" for name in doubled]
        if len(header) == 1 and (mark := next((mark for mark in ";\t" if mark in header[0]), None)):
            problems.append(f"{path}: columns are separated by {mark!r}, expected commas: export again")
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                problems.append(f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}")
                continue
            row = {name: cell.strip() or None for name, cell in zip(header, cells, strict=True)}
            rows.append((f"line {reader.line_num}", row))
    if problems:
        raise BadTable(problems)
    return rows


def _renamed(table: Table, mapping: Mapping[str, str] | None) -> Table:
    if not mapping:
        return table
    problems = [line for name in mapping.values() for line in no_column(table, name)]
    if problems:
        raise BadTable(problems)
    rows = tuple(row | {ours: row.get(theirs) for ours, theirs in mapping.items()} for row in table.rows)
    return dataclasses.replace(table, rows=rows)


def _finished(table: Table) -> Table:
    kind = KINDS[table.kind]
    if not kind.status:
        return table
    keep, excluded = [], []
    for index, row in enumerate(table.rows):
        state = row.get(kind.status)
        if state == kind.done:
            keep.append(index)
        else:
            name = row.get(table.run_column or "")
            run = table.places[index] if name is None else str(name)
            excluded.append(Excluded(run, str(state), f"{kind.status} is {state}, not {kind.done}", row))
    rows, places = tuple(table.rows[i] for i in keep), tuple(table.places[i] for i in keep)
    if not rows:
        raise BadTable([f"{table.source}: none of {len(table.rows)} runs has {kind.status} = {kind.done}"])
    return dataclasses.replace(table, rows=rows, places=places, excluded=(*table.excluded, *excluded))


def nearest(name: str, known: Sequence[str], limit: int = 12) -> str:
    """The known names, the most similar first, at most `limit` of them."""
    folded = {other: difflib.SequenceMatcher(None, name.casefold(), other.casefold()).ratio() for other in known}
    ranked = sorted(known, key=lambda other: -folded[other])
    return ", ".join(ranked[:limit]) + (f" and {len(ranked) - limit} more" if len(ranked) > limit else "")


def no_column(table: Table, name: str) -> list[str]:
    """That a table lacks a column, with the nearest it has; nothing where it has it."""
    if name in table.columns:
        return []
    return [f"{table.source}: no column {name!r}; the nearest it has: {nearest(name, table.columns)}"]


def number(value: Any) -> float | None:
    """A number, or text that reads as one (nan and inf included), as a float; None for all else."""
    if isinstance(value, str):
        text = value.strip()
        plain = NUMBER.fullmatch(text) or text.casefold().lstrip("+-") in ("nan", "inf", "infinity")
        return float(text) if plain else None
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value)
