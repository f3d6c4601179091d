"""manifest.jsonl: the jobs of a study as they were submitted, one JSON object per line, closed by a line with a digest.

A cluster reads its commands from here, so a line that was cut or changed must not become a command.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launch.study import Job

FILE = "manifest.jsonl"


class ManifestError(ValueError):
    """A manifest that is missing, cut short or changed."""


def write(folder: Path, jobs: Sequence[Job]) -> Path:
    """Replace FOLDER/manifest.jsonl atomically; returns its path."""
    lines = [json.dumps(asdict(job)) for job in jobs]
    part, file = folder / f"{FILE}.partial", folder / FILE
    part.write_text(
        "".join(f"{line}\n" for line in [*lines, json.dumps({"jobs": len(jobs), "sha256": _digest(lines)})])
    )
    os.replace(part, file)
    return file


def read(folder: Path) -> list[Job]:
    """The jobs of FOLDER/manifest.jsonl; raises ManifestError in one line that says what to do."""
    file = folder / FILE
    try:
        *lines, end = file.read_text().splitlines()
        closing = json.loads(end)
        intact = closing == {"jobs": len(lines), "sha256": _digest(lines)}
    except FileNotFoundError:
        raise ManifestError(f"{file} does not exist: submit the study first") from None
    except ValueError:  # not text, not JSON, or empty
        intact, lines = False, []
    if not intact:
        raise ManifestError(f"{file} was cut short or changed: submit the study again, which writes it anew")
    return [Job(**(fields | {"argv": tuple(fields["argv"])})) for fields in map(json.loads, lines)]


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
