"""The record of a run: one JSON file that says what ran, on what, on which data, at which cost, with which result.

`record.json` is replaced atomically; `metrics.jsonl` is append-only and is the source of everything measured along the
run. Failed and diverged runs keep their record.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

SCHEMA_VERSION = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "recscale")


def config_hash(config: dict[str, Any]) -> str:
    """First 16 hex digits of the sha256 of the resolved config in canonical JSON."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_revision() -> dict[str, Any]:
    """Git revision of this code and whether files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return {"revision": "unknown", "dirty": True}


def environment() -> dict[str, Any]:
    """Versions and devices of this process."""
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
        "devices": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "hosts": jax.process_count(),
        "cpu_count": os.cpu_count(),
    }


def new(config: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that is about to start; `config` is the resolved config with `study`, `cell` and `seed`."""
    digest = config_hash(config)
    run_id = f"{config['cell']['name'] or 'run'}-s{config['seed']}-{digest[:8]}"
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "lineage": run_id,  # of a branch: its trunk's; see recscale/branch.py, which also says what the schedule was
        "parent_run": "",
        "parent_step": 0,
        "config_hash": digest,
        "study": config["study"],
        "cell": config["cell"],
        "seed": config["seed"],
        "status": "running",
        "reason": "",
        "config": config,
        "code": code_revision(),
        **environment(),
        "evaluations": [],
    }


def is_writer() -> bool:
    """Whether this process writes the files of the run: the first of all does."""
    return jax.process_index() == 0


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace path/record.json atomically; does nothing on processes other than the first."""
    if not is_writer():
        return
    part = path / "record.json.partial"
    part.write_text(json.dumps(record, indent=1, sort_keys=True))
    os.replace(part, path / "record.json")


def read(path: Path) -> dict[str, Any]:
    """The record of the run folder `path`; raises FileNotFoundError or ValueError naming the file."""
    file = path / "record.json"
    try:
        found = json.loads(file.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file}: not valid JSON ({error}); run the cell again to write it anew") from error
    version = found["schema_version"] if isinstance(found, dict) and "schema_version" in found else "no schema_version"
    if version != SCHEMA_VERSION:
        raise ValueError(f"{file}: found {version}, expected a run record of schema version {SCHEMA_VERSION}")
    return found


class Metrics:
    """metrics.jsonl of a run: append rows, flushed at once; opened at a step, later rows and final ones are cut off.

    Every process keeps the rows, the first one writes them. measured: whether that step's evaluation is over.
    """

    def __init__(self, path: Path, step: int, measured: bool = True):
        self.file = path / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step and "final" not in row]
        kept = [row for row in kept if measured or row["step"] < step or "metric" not in row]
        self.rows = kept
        if is_writer():
            part = self.file.with_suffix(".partial")
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(part, self.file)

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not is_writer():
            return
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def seconds(self) -> float:
        """Time the run had taken at its last row, restarts left out."""
        return max((row["seconds"] for row in self.rows if "seconds" in row), default=0.0)

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation rows (those with a metric), as the record keeps them."""
        return [row for row in self.rows if "metric" in row]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    file = path / "metrics.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
