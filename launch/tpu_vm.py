"""TPU VMs: a queued resource per cell, spot too, whose workers run a start-up script until the cell is done.

    gcsfuse --implicit-dirs --rename-dir-limit=100000 BUCKET runs          (or: mount an NFS share at runs)
    python -m launch.sweep STUDY --on=tpu_vm submit --runs=runs --set runs=gs://BUCKET --set project=P --set zone=Z \
        --set topology=v6e:4x4 --set source=https://HOST/REPOSITORY@REVISION --set spot=true

RUNS is one folder, seen here and by the workers: a bucket mounted with gcsfuse (with a hierarchical namespace, so that
folders are renamed at once), or an NFS share. So DONE, FAILED, record and events are read here as in any other place,
and `submit` refuses a RUNS that is not in the bucket. Nothing of Google's API has to be asked whether a cell is done.

Every worker of a slice runs launch/templates/tpu_vm.sh: fetch the project, mount the runs, install, and run the cell
until it is done; jax finds the other workers by itself. A slice that was taken away does not come back: `watch` deletes
what is left of it and asks for another. The slice deletes itself when the cell is done or has failed for good.

Tried with a stand-in for gcloud, the real gcloud's reading of the flags, and the start-up script in a real shell; never
on a TPU VM: images, gcsfuse as a run folder, the notice before a preemption and deletion are as documented.
"""

import dataclasses
import time
from pathlib import Path

from launch import queued_resources as requests
from launch.checks import refuse, resource_name
from launch.commands import CommandError, call, shown
from launch.queued_resources import ALIVE, LEAVING, LOST
from launch.study import Job
from launch.tpu_vm_settings import Settings, bad_jobs

__all__ = ["Settings", "cancel", "submit", "watch", "where"]

GONE_SECONDS = 180.0
"""A slice deletes itself after DONE, which a mounted bucket may show here only a minute later."""
PATIENCE = 10
"""Refusals in a row after which `watch` leaves a cell, or all of them."""
SAID = {
    "WAITING_FOR_RESOURCES": "waits for a slice",
    "ACTIVE": "on its slice",
    "SUSPENDED": "slice was taken away",
    "FAILED": "request failed",
}


def submit(jobs: list[Job], folder: Path, settings: Settings, dry_run: bool) -> None:
    """Ask for a slice for each cell that has none or has lost it; prints what it sends.

    A cell whose trunk is not done stays behind. dry_run: prints what would be sent, writes and calls nothing.
    Raises ValueError where settings and cells do not fit, CommandError where gcloud is missing or refused some.
    """
    refuse(bad_jobs(jobs, settings))
    there = {} if dry_run else requests.states(settings)
    waiting, refused, checked = {job.cell for job in jobs}, [], dry_run
    for job in jobs:
        state = there.get(resource_name(job.workdir), "")
        if job.after in waiting:
            print(f"# {job.cell}: starts from {job.after}, which is not done; submit again when it is, or watch")
        elif state and state not in LOST:
            print(f"# {job.cell}: {resource_name(job.workdir)} is there ({_said(state)}); left alone")
        else:
            checked = checked or _check_runs(job, folder, settings)
            try:
                _ask(job, folder, settings, state, dry_run)
            except CommandError as error:
                refused.append(f"{job.cell}: {error}")
    if refused:
        raise CommandError("\n".join(refused))


def cancel(jobs: list[Job], folder: Path, settings: Settings, dry_run: bool) -> None:
    """Give the cells' slices back, whatever runs on them; at most the work since the last save is lost.

    Raises CommandError where gcloud is missing or refused some.
    """
    there = None if dry_run else requests.states(settings)
    refused = []
    for job in jobs:
        if there is not None and there.get(resource_name(job.workdir), "DELETING") == "DELETING":
            continue
        try:
            _give_back(job, settings, dry_run)
        except CommandError as error:
            refused.append(f"{job.cell}: {error}")
    if refused:
        raise CommandError("\n".join(refused))


def where(jobs: list[Job], folder: Path, settings: Settings) -> dict[str, str]:
    """Cell -> what the TPU service says of its slice; {} where it cannot be asked."""
    try:
        there = requests.states(settings)
    except CommandError:
        return {}
    names = {job.cell: resource_name(job.workdir) for job in jobs}
    return {cell: _said(there[name]) for cell, name in names.items() if name in there}


def watch(jobs: list[Job], folder: Path, settings: Settings) -> dict[str, str]:
    """Look after the cells until each has ended, and return how: "done", or one line that says why not.

    Every settings.poll seconds: a cell that is done or has failed gives its slice back; one that lost its slice gets
    another, at most settings.retries times; a branch starts once its trunk is done. A queued resource that vanishes
    without DONE was cancelled, or its workers gave up: it is left alone. May be stopped and begun again at any time.
    Raises ValueError where settings and cells do not fit, CommandError where gcloud is not installed.
    """
    refuse(bad_jobs(jobs, settings))
    cells = {job.cell: _Cell(job, _failure(job)) for job in jobs}
    ends: dict[str, str] = {}
    there, errors = requests.states(settings), 0
    while True:
        for name in [name for name in cells if name not in ends]:
            state = there.get(resource_name(cells[name].job.workdir), "")
            if end := _look(cells[name], state, ends, cells, folder, settings):
                ends[name] = end
                print(f"# {name}: {end}", flush=True)
        if len(ends) == len(cells):
            return ends
        time.sleep(settings.poll)
        try:
            there, errors = requests.states(settings), 0
        except CommandError as error:  # what was seen last holds, unless it goes on like this
            errors += 1
            print(f"# {error}", flush=True)
            if errors == PATIENCE:
                raise


@dataclasses.dataclass
class _Cell:
    """What `watch` knows of a cell. failed: time of the FAILED that was there before. gone: since when it has no slice,
    after it had one (0: it has one, or never had)."""

    job: Job
    failed: int
    seen: bool = False
    retries: int = 0
    errors: int = 0
    gone: float = 0.0


def _look(
    cell: _Cell, state: str, ends: dict[str, str], cells: dict[str, _Cell], folder: Path, settings: Settings
) -> str:
    """Do what is due for a cell whose queued resource is in that state ("": there is none); how it ended, or ""."""
    trunk = cell.job.after
    try:
        if end := _ended(cell):
            if state and state not in LEAVING:
                _give_back(cell.job, settings, dry_run=False)
            return end
        if trunk in cells and ends.get(trunk, "") != "done":
            return f"not started: its trunk {trunk} is not done" if trunk in ends else ""
        end, cell.errors = _keep(cell, state, folder, settings), 0
        return end
    except CommandError as error:
        cell.errors += 1
        print(f"# {cell.job.cell}: {error}", flush=True)
        return f"left after {PATIENCE} refusals in a row: {error}" if cell.errors == PATIENCE else ""


def _ended(cell: _Cell) -> str:
    """How the run folder says that the cell has ended, or ""."""
    if (Path(cell.job.workdir) / "DONE").exists():
        return "done"
    if _failure(cell.job) == cell.failed:
        return ""
    return f"failed: {(Path(cell.job.workdir) / 'FAILED').read_text().strip()}"


def _failure(job: Job) -> int:
    """When FAILED was written, in ns; 0: there is none."""
    try:
        return (Path(job.workdir) / "FAILED").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _keep(cell: _Cell, state: str, folder: Path, settings: Settings) -> str:
    """See to it that a cell that is not done has a slice; returns why it gets none, or ""."""
    if state in ALIVE or state in LEAVING:
        cell.seen, cell.gone = True, 0.0
        return ""
    if not state and cell.seen:
        cell.gone = cell.gone or time.monotonic()
        vanished = time.monotonic() - cell.gone >= GONE_SECONDS
        return f"its slice is gone without DONE; see {cell.job.workdir}/log.0, then submit again" if vanished else ""
    if state and cell.retries >= settings.retries:
        _give_back(cell.job, settings, dry_run=False)
        return f"{_said(state)}, replaced {cell.retries}x before: submit again to go on"
    _ask(cell.job, folder, settings, state, dry_run=False)
    cell.seen, cell.retries = True, cell.retries + bool(state)
    return ""


def _ask(job: Job, folder: Path, settings: Settings, state: str, dry_run: bool) -> None:
    """Create the queued resource of a cell, and before that delete one that is of no use any more (state: LOST)."""
    if state:
        print(f"# {job.cell}: {_said(state)}")
        _give_back(job, settings, dry_run)
    path, script = requests.script_path(job, folder), requests.startup_script(job, settings)
    command = requests.create(job, folder, settings)
    print(shown(["tee", str(path)], script), shown(command), sep="\n")
    if dry_run:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    try:
        call(command)
    except CommandError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        print(f"# {job.cell}: just created by another; left alone")


def _give_back(job: Job, settings: Settings, dry_run: bool) -> None:
    command = requests.delete(job, settings)
    print(shown(command))
    if not dry_run:
        call(command)


def _check_runs(job: Job, folder: Path, settings: Settings) -> bool:
    """Raise CommandError where RUNS is not what the workers will mount; True."""
    command = requests.visible(job, folder, settings)
    path = requests.script_path(job, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(requests.startup_script(job, settings))
    try:
        if command:
            call(command)
    except CommandError as error:
        cure = f"mount it with gcsfuse at {folder.parent}, or set runs to what is mounted there"
        raise CommandError(f"{path} is not seen in {settings.runs}: {cure} ({error})") from None
    return True


def _said(state: str) -> str:
    return SAID.get(state, state.lower().replace("_", " "))
