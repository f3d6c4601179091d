"""Runs as experiment trackers write them to disk, without their libraries: MLflow, TensorBoard, Weights & Biases.

Each reader gives one (place, row) per run; the place names the run in messages. A metric that was logged many times
counts with its value at the last step, as the trackers' own run tables show it.

MLflow       `mlruns/EXPERIMENT/RUN/` with meta.yaml, metrics/NAME ("milliseconds value step" per line), params/NAME
             (mlflow/store/tracking/file_store.py). Columns as in `mlflow.search_runs`: run_id, run_name, status,
             metrics.NAME, params.NAME, tags.NAME.
TensorBoard  event files: TFRecord frames that hold `Event` messages (tensorflow/core/util/event.proto), scalars as
             simple_value or as a scalar tensor, hyper-parameters of the HParams plugin. Columns: run, step, TAG,
             hparams.NAME. Also the CSV of one scalar chart (Wall time, Step, Value), one file per run and tag.
W&B          JSON lines of `run.scan_history()`: one object per logged step with `_step`; one file per run.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recscale.scaling.collect import Row

Rows = list[tuple[str, Row]]
MLFLOW_STATUS = {1: "RUNNING", 2: "SCHEDULED", 3: "FINISHED", 4: "FAILED", 5: "KILLED"}
EVENT_FILE = "*tfevents*"
# What TensorBoard calls the CSV of one chart: run-RUN-tag-TAG.csv
CHART_NAME = re.compile(r"run-(?P<run>.*)-tag-(?P<tag>.*)")
CHART_COLUMNS = ["Wall time", "Step", "Value"]
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FLOAT, DOUBLE = 1, 2


def mlflow_folder(folder: Path) -> Rows:
    """Runs of a local MLflow store (or of one experiment of it); deleted runs are left out. Raises ValueError."""
    rows: Rows = []
    for meta_file in sorted(folder.rglob("meta.yaml")):
        run = meta_file.parent
        try:
            meta = yaml.safe_load(meta_file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{meta_file}: cannot be read as YAML ({_first_line(error)})") from error
        if not isinstance(meta, dict) or "run_id" not in meta or meta.get("lifecycle_stage") == "deleted":
            continue
        row: Row = {
            "run_id": str(meta["run_id"]),
            "run_name": meta.get("run_name"),
            "status": _status(meta.get("status")),
        }
        row |= {f"params.{name}": _text(file).strip() for name, file in _leaves(run / "params")}
        row |= {f"tags.{name}": _text(file).strip() for name, file in _leaves(run / "tags")}
        row |= {f"metrics.{name}": _last_metric(file) for name, file in _leaves(run / "metrics")}
        rows.append((f"run {row['run_id']}", row))
    return rows


def _status(found: Any) -> str:
    return MLFLOW_STATUS[found] if isinstance(found, int) and found in MLFLOW_STATUS else str(found)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _leaves(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every file below a folder; a name may hold slashes."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield file.relative_to(folder).as_posix(), file


def _last_metric(file: Path) -> float | None:
    """The value at the last step, the later one of two at one step."""
    last: tuple[int, int, float] | None = None
    for number, line in enumerate(_text(file).splitlines(), 1):
        parts = line.split()
        try:
            entry = (int(parts[2]) if len(parts) > 2 else 0, int(parts[0]), float(parts[1]))
        except (ValueError, IndexError) as error:
            raise ValueError(f"{file}:{number}: found {line!r}, expected 'milliseconds value step'") from error
        if last is None or entry[:2] >= last[:2]:
            last = entry
    return None if last is None else last[2]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def json_lines(files: Sequence[Path]) -> Rows:
    """Objects of JSON-lines files. With `_step` in them they are a W&B history: one row per file. Raises ValueError."""
    rows: Rows = []
    for file in files:
        entries = []
        for number, line in enumerate(_text(file).splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not JSON ({error.msg}), expected one object per line") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{file}:{number}: found a {type(entry).__name__}, expected one object per line")
            if not isinstance(entry.get("_step") or 0, int | float):
                raise ValueError(f"{file}:{number}: _step is {entry['_step']!r}, expected a number")
            entries.append((number, dict(_flat(entry))))
        if any("_step" in entry for _, entry in entries):
            rows.append((f"run {file.stem}", {"run": file.stem} | _last_values([entry for _, entry in entries])))
        else:
            rows += [(f"{file.name}:{number}" if len(files) > 1 else f"line {number}", row) for number, row in entries]
    return rows


def _flat(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _last_values(entries: Sequence[Row]) -> Row:
    """The last value of every key, in order of `_step`; null is no value."""
    found: Row = {}
    for entry in sorted(entries, key=lambda entry: entry.get("_step") or 0):
        found |= {key: value for key, value in entry.items() if value is not None}
    return found


def chart_files(tables: Mapping[Path, Sequence[Row]]) -> Rows:
    """CSV exports of single TensorBoard charts, gathered into one row per run. Raises ValueError for a bad number."""
    found: dict[str, Row] = {}
    for file, rows in tables.items():
        match = CHART_NAME.fullmatch(file.stem)
        run, tag = (match["run"], match["tag"]) if match else (file.stem, "Value")
        try:
            points = [(float(row["Step"]), float(row["Value"])) for row in rows]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: Step or Value is no number ({error})") from error
        if points:
            step, value = max(points, key=lambda point: point[0])
            row = found.setdefault(run, {"run": run, "step": step})
            row["step"] = max(row["step"], step)
            row[tag] = value
    return [(f"run {run}", row) for run, row in sorted(found.items())]


def event_folder(folder: Path) -> Rows:
    """Scalars of TensorBoard event files, one row per folder that holds some. Raises ValueError for a damaged file."""
    latest: dict[str, dict[str, tuple[int, Any]]] = {}
    for file in sorted(folder.rglob(EVENT_FILE)):
        run = file.parent.relative_to(folder).as_posix()
        values = latest.setdefault(folder.name if run == "." else run, {})
        for tag, step, value in _scalars(file):
            if tag not in values or step >= values[tag][0]:
                values[tag] = (step, value)
    rows: Rows = []
    for run, values in sorted((run, values) for run, values in latest.items() if values):
        last = max((step for step, _ in values.values()), default=0)
        rows.append((f"run {run}", {"run": run, "step": last} | {tag: value for tag, (_, value) in values.items()}))
    return rows


def _scalars(file: Path) -> Iterator[tuple[str, int, Any]]:
    """(tag, step, value) of an event file: Event{step = 2, summary = 5{value = 1{tag = 1, simple_value = 2,
    tensor = 8, metadata = 9}}}."""
    try:
        for event in _frames(file):
            fields = dict(_fields(event))
            for _, value in _fields(fields.get(5, b"")):
                entry = dict(_fields(value))
                tag = entry.get(1, b"").decode()
                if 2 in entry:
                    yield tag, fields.get(2, 0), struct.unpack("<f", entry[2])[0]
                elif 9 in entry and (hparams := list(_hparams(entry[9]))):
                    yield from ((f"hparams.{name}", 0, number) for name, number in hparams)
                elif 8 in entry and (number := _scalar_tensor(entry[8])) is not None:
                    yield tag, fields.get(2, 0), number
    except (struct.error, IndexError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file}: damaged, not a TensorBoard event file ({error}): export the scalars as CSV"
        ) from error


def _frames(file: Path) -> Iterator[bytes]:
    """Payloads of a TFRecord file; a last frame cut short by a kill is left out, a wrong length is an error."""
    data, at = file.read_bytes(), 0
    while at + 12 <= len(data):
        header, (size, check) = data[at : at + 8], struct.unpack_from("<QI", data, at)
        if _masked_crc(header) != check:
            raise struct.error(f"wrong checksum at byte {at}")
        if at + 16 + size > len(data):
            return
        yield data[at + 12 : at + 12 + size]
        at += 16 + size


def _masked_crc(data: bytes) -> int:
    """CRC-32C, masked as TFRecord does. Only frame lengths are checked: eight bytes each, so speed is no matter."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, content) of the fields of a protobuf message: an int or the raw bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(kind)
        if size is None:
            if kind != BYTES:
                raise struct.error(f"wire type {kind}")
            size, at = _varint(message, at)
        if at + size > len(message):
            raise struct.error("a field runs over its message")
        yield key >> 3, message[at : at + size]
        at += size


def _scalar_tensor(message: bytes) -> float | None:
    """TensorProto{dtype = 1, tensor_content = 4, float_val = 5, double_val = 6} that holds one number, else None."""
    tensor = dict(_fields(message))
    kind = tensor.get(1)
    if kind not in (FLOAT, DOUBLE):
        return None
    raw = tensor.get(4) or tensor.get(5 if kind == FLOAT else 6) or b""
    size = 4 if kind == FLOAT else 8
    return struct.unpack("<f" if kind == FLOAT else "<d", raw)[0] if len(raw) == size else None


def _hparams(metadata: bytes) -> Iterator[tuple[str, Any]]:
    """SummaryMetadata{plugin_data = 1{name = 1, content = 2}} of the HParams plugin, whose content is {session_start =
    3{hparams = 1{key = 1, value = 2{number = 2, text = 3, bool = 4}}}}."""
    plugin = dict(_fields(dict(_fields(metadata)).get(1, b"")))
    if plugin.get(1) != b"hparams":
        return
    for number, entry in _fields(dict(_fields(plugin.get(2, b""))).get(3, b"")):
        if number == 1:
            pair = dict(_fields(entry))
            value = dict(_fields(pair.get(2, b"")))
            if 2 in value:
                yield pair[1].decode(), struct.unpack("<d", value[2])[0]
            elif 3 in value:
                yield pair[1].decode(), value[3].decode()
