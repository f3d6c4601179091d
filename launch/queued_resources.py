"""Queued resources of the Cloud TPU service: what gcloud is asked for a cell, and the start-up script it sends along.

States and flags: https://docs.cloud.google.com/tpu/docs/queued-resources and `gcloud compute tpus queued-resources`.
"""

import json
import re
import shlex
import string
from pathlib import Path, PurePosixPath

from launch.checks import resource_name, slug
from launch.commands import call
from launch.study import Job
from launch.tpu_slices import tpu_slice
from launch.tpu_vm_settings import BUCKET, REVISION, Settings
from recscale.preemption import EXIT_HELD, EXIT_RESTART

TEMPLATE = Path(__file__).parent / "templates" / "tpu_vm.sh"
FOLDER = "tpu_vm"
LOGS = "/var/log"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
ALIVE = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
LEAVING = ("SUSPENDING", "DELETING")
LOST = ("SUSPENDED", "FAILED")
"""Of no use any more: a slice that was taken away does not come back, a request that failed is not tried again."""
HELD_SECONDS = 30
# Killed (137: also for its memory), told to stop before it could answer (143), and SIGABRT (134), by which jax ends a
# process whose fellow on another worker is gone.
RESTARTABLE = (EXIT_RESTART, 134, 137, 143)
# The workers of a slice install the program at their own speed before they meet.
PATIENCE = {"RECSCALE_RENDEZVOUS_SECONDS": "1800"}


def create(job: Job, folder: Path, settings: Settings) -> list[str]:
    """The command that asks for the slice of a cell."""
    tpu, name = tpu_slice(settings.topology), resource_name(job.workdir)
    options = {
        "node-id": name,
        "accelerator-type": tpu.accelerator_type,
        "runtime-version": settings.runtime_version or tpu.generation.runtime,
        "metadata-from-file": f"startup-script={script_path(job, folder)}",
        "labels": f"recscale-study={slug(folder.name)}",
        "scopes": SCOPE,
        "service-account": settings.service_account,
        "network": settings.network,
        "subnetwork": settings.subnetwork,
    }
    words = [f"--{option}={value}" for option, value in options.items() if value]
    words += [flag for flag, on in (("--spot", settings.spot), ("--internal-ips", settings.internal_ips)) if on]
    return [*_gcloud("create", name, settings), *words, "--quiet"]


def delete(job: Job, settings: Settings) -> list[str]:
    """The command that gives the slice of a cell back, with whatever runs on it."""
    return [*_gcloud("delete", resource_name(job.workdir), settings), "--force", "--quiet"]


def states(settings: Settings) -> dict[str, str]:
    """Name -> state of every queued resource in the zone. Raises CommandError."""
    rows = json.loads(call([*_gcloud("list", "", settings), "--format=json"]))
    return {row["name"].rpartition("/")[2]: row["state"]["state"] for row in rows}


def visible(job: Job, folder: Path, settings: Settings) -> list[str]:
    """The command that finds the start-up script, written here, in the bucket; empty where the runs are on NFS."""
    if not settings.runs.startswith("gs://"):
        return []
    path = script_path(job, folder).relative_to(folder.parent)
    return ["gcloud", "storage", "ls", f"{settings.runs.rstrip('/')}/{path.as_posix()}"]


def script_path(job: Job, folder: Path) -> Path:
    """Where the start-up script of a cell lies: for gcloud to read, and for people."""
    return folder / FOLDER / f"{resource_name(job.workdir)}.sh"


def startup_script(job: Job, settings: Settings) -> str:
    """What every worker of the cell's slice runs at boot."""
    name, checkout = resource_name(job.workdir), PurePosixPath(settings.checkout)
    exports = PATIENCE | dict(settings.env)
    words = {
        "name": name,
        "project": settings.project,
        "zone": settings.zone,
        "checkout": str(checkout),
        "runs": str(checkout / PurePosixPath(job.workdir).parent.parent),
        "run": str(checkout / job.workdir),
        "venv": f"{checkout}-venv",
        "log": f"{LOGS}/{name}.log",
        "python": settings.python,
    }
    return string.Template(TEMPLATE.read_text()).substitute(
        {key: shlex.quote(word) for key, word in words.items()},
        cell=" ".join(job.cell.split()),
        restarts=settings.restarts,
        exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
        command=shlex.join(job.argv),
        get_code=_get_code(settings.source),
        mount=_mount(settings.runs),
        held=EXIT_HELD,
        held_seconds=HELD_SECONDS,
        restartable=" | ".join(str(code) for code in RESTARTABLE),
    )


def _gcloud(verb: str, name: str, settings: Settings) -> list[str]:
    place = [f"--project={settings.project}", f"--zone={settings.zone}"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *([name] if name else []), *place]


def _get_code(source: str) -> str:
    """Fetch the project into the current folder."""
    revision = re.fullmatch(REVISION, source)
    if revision is None:
        return f"gcloud storage cat {shlex.quote(source)} | tar -xz"
    url, commit = shlex.quote(revision["url"]), shlex.quote(revision["revision"])
    return f"git init -q && git fetch -q --depth=1 {url} {commit} && git checkout -q --force FETCH_HEAD"


def _mount(runs: str) -> str:
    """Mount what holds the runs at $runs of the script.

    A checkpoint is finished by renaming its folder: gcsfuse does that at once in a bucket with a hierarchical
    namespace, and file by file, up to the limit, in any other.
    """
    bucket = re.fullmatch(BUCKET, runs)
    if bucket is None:
        install = "{ apt-get update -q && apt-get install -qy nfs-common; }"
        mount = f'mount -t nfs -o hard {shlex.quote(runs)} "$runs"'
        return f"{{ command -v mount.nfs >/dev/null || {install}; }} && {mount}"
    only = f"--only-dir={shlex.quote(bucket['prefix'])} " if bucket["prefix"] else ""
    options = f"--implicit-dirs --rename-dir-limit=100000 {only}{bucket['bucket']}"
    return f'{{ command -v gcsfuse >/dev/null || install_gcsfuse; }} && gcsfuse {options} "$runs"'
