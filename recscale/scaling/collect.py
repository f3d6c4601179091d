"""Many run records into one table. A run that cannot be used is listed with its reason, never dropped in silence."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
REQUIRED = ("run_id", "study", "cell", "seed", "status", "evaluations")
RUN_FILES = ("record.json", "metrics.jsonl", "config.json")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Excluded:
    """A run that takes no part in the fits. row: its flat record where one could be read."""

    run: str
    status: str
    reason: str
    row: Row | None = None


@dataclasses.dataclass(frozen=True)
class Records:
    """rows: flat records of the finished runs, newest per run_id, in the order of run_id; excluded: all other runs."""

    rows: list[Row]
    excluded: list[Excluded]


def collect(folder: str | Path) -> Records:
    """Reads every run below a folder. Raises FileNotFoundError if there is no such folder.

    A row has one key per leaf of the record, joined by dots (`cell.coordinates.history`, `flops.train_total`), and, for
    each split, slice and metric, its evaluation at the last step: `eval.SPLIT.SLICE.METRIC` and the same with
    `.stderr`, `.n` and `.step`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: found no such folder, expected the folder of a study's runs: run the study")
    rows: dict[str, tuple[int, Path, Row]] = {}
    excluded = []
    for run in _run_folders(folder):
        name = run.relative_to(folder).as_posix()
        row, problem = _read(run / "record.json")
        if row is None:
            excluded.append(Excluded(name, "unreadable", problem))
            continue
        written = (run / "record.json").stat().st_mtime_ns
        known = rows.get(row["run_id"])
        if known is not None:
            (written, run, row), old = sorted([known, (written, run, row)], key=lambda entry: entry[0], reverse=True)
            reason = f"run_id {row['run_id']} was written again by {run.relative_to(folder).as_posix()}"
            excluded.append(Excluded(old[1].relative_to(folder).as_posix(), "superseded", reason, old[2]))
        rows[row["run_id"]] = (written, run, row)
    finished = []
    for _, (_, run, row) in sorted(rows.items()):
        reason = _unfinished(row)
        if reason:
            excluded.append(Excluded(run.relative_to(folder).as_posix(), str(row["status"]), reason, row))
        else:
            finished.append(row)
    return Records(finished, excluded)


def _run_folders(folder: Path) -> list[Path]:
    return sorted({path.parent for name in RUN_FILES for path in folder.rglob(name)})


def _read(path: Path) -> tuple[Row | None, str]:
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None, "no record.json: the run stopped before its first record"
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return None, f"record.json cannot be read: {error}"
    if not isinstance(record, dict):
        return None, f"record.json holds a {type(record).__name__}, expected an object"
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        return None, f"record.json has no {', '.join(missing)}"
    if record.get("schema_version") != SCHEMA_VERSION:
        return None, f"schema_version {record.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
    try:
        return flatten(record), ""
    except (KeyError, TypeError, AttributeError) as error:
        return None, f"record.json is malformed: {type(error).__name__} {error}"


def _unfinished(row: Row) -> str:
    status, reason = row["status"], row.get("reason") or ""
    if status == "running":
        return reason or "not finished: still running, or killed"
    if status != "ok":
        return reason or f"status {status}, no reason recorded"
    values = [row[key.removesuffix(".step")] for key in row if key.startswith("eval.") and key.endswith(".step")]
    if not values:
        return "status ok but no evaluation recorded"
    return "" if all(isinstance(v, int | float) and math.isfinite(v) for v in values) else "a non-finite evaluation"


def flatten(record: Mapping[str, Any]) -> Row:
    """One record as one flat row; see `collect`. Lists other than the evaluations stay lists."""
    row = {key: value for key, value in _leaves(record, "") if key != "evaluations"}
    last: dict[str, Mapping[str, Any]] = {}
    for entry in record["evaluations"]:
        key = f"eval.{entry['split']}.{entry['slice']}.{entry['metric']}"
        if key not in last or entry["step"] >= last[key]["step"]:
            last[key] = entry
    for key, entry in last.items():
        row[key] = entry["value"]
        for part in ("stderr", "n", "step"):
            row[f"{key}.{part}"] = entry.get(part)
    return row


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, child in value.items():
        if isinstance(child, Mapping):
            yield from _leaves(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Rows to CSV, one column per key that occurs in any row, in order of first appearance; lists as JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
            )
