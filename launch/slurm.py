"""SLURM: a sweep is one array job; every array task is one cell that resumes, and asks for its own restart.

The rendered script and what it needs lie in RUNS/NAME/slurm/: NNN.sbatch (readable, and runs by hand too), NNN.manifest
(one line per array task), ID_TASK.log (what SLURM said), jobs.jsonl (which job holds which cell). A cell's own output
goes to WORKDIR/log.
"""

import hashlib
import itertools
import json
import os
import shlex
import shutil
import string
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.checks import refuse
from launch.commands import CommandError, call, shown
from launch.slurm_settings import Settings
from launch.study import Job

__all__ = ["Settings", "cancel", "submit", "where"]

TEMPLATES = Path(__file__).parent / "templates"
FOLDER = "slurm"
RECORD = "jobs.jsonl"
QUEUE_FORMAT = "%F|%K|%T|%N|%r"  # array job, array index, state, nodes, reason
PENDING = {  # what a user wants to know of squeue's reasons; any other is shown as it is
    "None": "pending",
    "Priority": "pending",
    "Resources": "pending: waits for free nodes",
    "BeginTime": "pending: starts again soon",
    "Dependency": "pending: waits for its trunk",
    "JobArrayTaskLimit": "pending: max_parallel reached",
}


def submit(jobs: list[Job], folder: Path, settings: Settings, dry_run: bool) -> None:
    """Submit one array job with these cells; those that are in the queue already are left out.

    Cells whose trunk is to be trained first go into a further array that waits for the one before. folder: RUNS/NAME,
    seen under the same path on every node. Raises ValueError for a cell that no line of a script can hold, CommandError
    where sbatch is missing or refuses.
    """
    if not dry_run and shutil.which("sbatch") is None:
        raise CommandError("sbatch is not on PATH: submit from a login node of the cluster, or look with --dry-run")
    refuse(f"{job.cell!r}: a line break in a cell's name or folder" for job in jobs if "\n" in job.cell + job.workdir)
    queued = _queued(folder)
    if inside := [job for job in jobs if job.cell in queued]:
        print(f"{len(inside)} cells are in the queue already, e.g. {inside[0].cell} ({queued[inside[0].cell][0]})")
    missing = [job for job in jobs if job.cell not in queued]
    before: list[str] = []
    for wave in _waves(missing):
        trunks = [queued[job.after][0] for job in wave if job.after in queued]
        before = _submit_wave(wave, folder, settings, [*before, *sorted(set(trunks))], dry_run)


def cancel(jobs: list[Job], folder: Path, settings: Settings, dry_run: bool) -> None:
    """Take these cells out of the queue; running ones save their state first. Raises CommandError where it fails."""
    queued = _queued(folder)
    tasks = [queued[job.cell][0] for job in jobs if job.cell in queued]
    if not tasks:
        print("none of these cells is in the queue")
        return
    command = ["scancel", *tasks]
    print(shown(command))
    if not dry_run:
        _run(command)


def where(jobs: list[Job], folder: Path, settings: Settings) -> dict[str, str]:
    """Cell -> what squeue says of it in a few words; a cell that is not in the queue is left out."""
    queued = _queued(folder)
    return {job.cell: queued[job.cell][1] for job in jobs if job.cell in queued}


def render(jobs: list[Job], folder: Path, settings: Settings, script: Path, directory: Path) -> tuple[str, str]:
    """The sbatch script of one array, and the file it reads its commands from, as text.

    script: where the script will lie. directory: where the commands run, for their paths may be relative to it.
    """
    commands = "".join(
        f"cell={shlex.quote(job.cell)} workdir={shlex.quote(job.workdir)} command=({shlex.join(job.argv)})\n"
        for job in jobs
    )
    limit = f"%{settings.max_parallel}" if settings.max_parallel else ""
    log = str(script.parent).replace("%", "%%") + "/%A_%a.log"
    options = [
        f"--job-name={folder.name}",
        f"--array=0-{len(jobs) - 1}{limit}",
        f"--output={log}",
        "--open-mode=append",
        *settings.sbatch_options(),
    ]
    values = {
        "title": f"{folder.name}: {len(jobs)} cells, one array task each. Rendered by launch.sweep.",
        "directives": "\n".join(f"#SBATCH {_directive(option)}" for option in options),
        "script": shlex.quote(str(script)),
        "manifest": shlex.quote(str(script.with_suffix(".manifest"))),
        "digest": hashlib.sha256(commands.encode()).hexdigest(),
        "jobs": shlex.quote(str(script.with_name(RECORD))),
        "directory": shlex.quote(str(directory)),
        "python": shlex.quote(settings.python),
        "max_restarts": settings.max_restarts,
        "max_kills": settings.max_kills,
        "srun_options": shlex.join(settings.srun_options()),
        "setup": "\n".join(f"  {line}" for line in (":", *settings.setup)),
    }
    header = string.Template((TEMPLATES / "slurm.sbatch").read_text()).substitute(values)
    return header + (TEMPLATES / "slurm_task.sh").read_text(), commands


def _submit_wave(jobs: list[Job], folder: Path, settings: Settings, before: list[str], dry_run: bool) -> list[str]:
    """Submit one array, or several where SLURM's limit on the size of an array asks for it; their job ids."""
    ids: list[str] = []
    for start in range(0, len(jobs), settings.max_array):
        part = jobs[start : start + settings.max_array]
        waits = before if start == 0 or not settings.max_parallel else ids[-1:]  # max_parallel holds over all parts
        ids.append(_submit_array(part, folder, settings, waits, dry_run))
    return ids


def _submit_array(jobs: list[Job], folder: Path, settings: Settings, before: list[str], dry_run: bool) -> str:
    place = folder.resolve() / FOLDER
    script = _unused(place) if not dry_run else place / "NNN.sbatch"
    text, commands = render(jobs, folder, settings, script, Path.cwd())
    command = ["sbatch", "--parsable"]
    if before:
        command.append(f"--dependency=afterany:{':'.join(before)}")
    command.append(str(script))
    if dry_run:
        print(f"# {script}\n{text}\n# {script.with_suffix('.manifest')}\n{commands}\n{shown(command)}")
        return "JOB_ABOVE"
    script.with_suffix(".manifest").write_text(commands)
    script.write_text(text)
    job = _run(command).strip().split(";")[0]
    cells = {str(index): entry.cell for index, entry in enumerate(jobs)}
    with (place / RECORD).open("a") as file:
        file.write(
            json.dumps({"job": job, "cells": cells, "script": script.name, "wall": round(time.time(), 3)}) + "\n"
        )
    print(f"{shown(command)}\njob {job}: {len(jobs)} cells")
    return job


def _unused(place: Path) -> Path:
    """The next script of this folder, made empty: a second submission at the same moment takes the one after it."""
    place.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        script = place / f"{number:03d}.sbatch"
        try:
            script.touch(exist_ok=False)
            return script
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _directive(option: str) -> str:
    """An option as sbatch reads it from a script: quoted where it holds blanks."""
    return shlex.quote(option) if any(c in option for c in " \t#'\"") else option


def _waves(jobs: list[Job]) -> Iterator[list[Job]]:
    """The cells in groups: first those whose trunk is not among them, then those that follow these, and so on."""
    waiting = list(jobs)
    while waiting:
        cells = {job.cell for job in waiting}
        wave = [job for job in waiting if job.after not in cells]
        if not wave:
            raise ValueError(f"{waiting[0].cell}: its trunk {waiting[0].after} waits for it in turn")
        yield wave
        waiting = [job for job in waiting if job.after in cells]


def _queued(folder: Path) -> dict[str, tuple[str, str]]:
    """Cell -> (array task, state in a few words) of what this folder submitted and squeue still shows."""
    cells = _recorded(folder / FOLDER / RECORD)
    if not cells or shutil.which("squeue") is None:
        return {}
    try:
        rows = _run(["squeue", "--me", "--array", "--noheader", f"--format={QUEUE_FORMAT}"]).splitlines()
    except CommandError:
        return {}
    found = {}
    for job, index, state, nodes, reason in (row.split("|", 4) for row in rows if row.count("|") >= 4):
        if (cell := cells.get((job, index))) is not None:
            found[cell] = (f"{job}_{index}", _in_words(state, nodes, reason))
    return found


def _in_words(state: str, nodes: str, reason: str) -> str:
    if state == "PENDING":
        return PENDING.get(reason, f"pending: {reason}")
    word = {"RUNNING": "running", "COMPLETING": "ending"}.get(state, state.lower())
    return f"{word} on {nodes}" if nodes else word


def _recorded(file: Path) -> dict[tuple[str, str], str]:
    """(job, array index) -> cell, of every submission and of what the tasks submitted again by themselves."""
    found: dict[tuple[str, str], str] = {}
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a full disk
            continue
        if "cells" in row:
            found |= {(row["job"], index): cell for index, cell in row["cells"].items()}
        elif (cell := found.get((row["of"], str(row["task"])))) is not None:
            found[row["job"], str(row["task"])] = cell
    return found


def _run(command: Sequence[str]) -> str:
    """Output of a SLURM command. Within a job, the variables that describe that job are kept from the new one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    return call(command, environment=environment)
