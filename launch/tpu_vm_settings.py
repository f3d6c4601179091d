"""Settings of the TPU VM place (launch/tpu_vm.py), and what may be wrong with them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from launch.checks import missing, refuse, study_outside, too_small, wrong_types
from launch.study import Job
from launch.tpu_slices import tpu_slice

BUCKET = r"gs://(?P<bucket>[a-z0-9][-_.a-z0-9]*)(/(?P<prefix>[^/]+(/[^/]+)*))?/?"
SHARE = r"[-.a-zA-Z0-9]+:/\S*"
TARBALL = r"gs://[^/]+/.+\.(tar\.gz|tgz)"
REVISION = r"(?P<url>https://\S+)@(?P<revision>[^@/\s]+)"
NEEDED = {
    "project": "the Google Cloud project",
    "zone": "where the TPUs are, e.g. us-east5-b",
    "topology": "the slice of a cell, e.g. v6e:4x4",
    "source": "this project's files: https://HOST/REPOSITORY@REVISION, or gs://BUCKET/FILE.tar.gz of `git archive`",
    "runs": "what holds RUNS: gs://BUCKET or gs://BUCKET/PREFIX, or SERVER:/SHARE (NFS)",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where and on what the cells run. Raises ValueError, one line per problem.

    topology: the slice of one cell ("v6e:4x4"). runs: the bucket or NFS share that is RUNS, here and there. source:
    where the workers get this project. spot: TPUs that may be taken away. runtime_version: "" for the usual of the TPU.
    service_account, network, subnetwork, internal_ips: as in gcloud. checkout: where the project goes on the worker.
    python: its version there. restarts: of the program on one slice. retries: how often `watch` asks for a new slice,
    for each cell. poll: seconds between two looks of it. env: further variables of the program.
    """

    project: str = ""
    zone: str = ""
    topology: str = ""
    source: str = ""
    runs: str = ""
    spot: bool = False
    runtime_version: str = ""
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    checkout: str = "/opt/recscale"
    python: str = "3.12"
    restarts: int = 20
    retries: int = 50
    poll: float = 60.0
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse(wrong_types(self))
        refuse([*too_small(self, {"restarts": 0, "retries": 0, "poll": 0}), *_bad_values(self)])


def bad_jobs(jobs: Sequence[Job], settings: Settings) -> list[str]:
    """One line per reason why these cells cannot be sent with these settings."""
    found = missing(settings, NEEDED)
    for job in jobs:
        found += study_outside(job.argv)
        if Path(job.workdir).is_absolute() or ".." in Path(job.workdir).parts:
            wanted = "a RUNS inside the current folder; mount the bucket or share there"
            found.append(f"{job.cell}: its run folder {job.workdir} lies elsewhere on the workers: expected {wanted}")
    return found


def _bad_values(settings: Settings) -> list[str]:
    patterns = {
        "zone": (r"[a-z]+-[a-z]+\d+-[a-z]", "e.g. us-east5-b"),
        "source": (f"{TARBALL}|{REVISION}", "https://HOST/REPOSITORY@REVISION or gs://BUCKET/FILE.tar.gz"),
        "runs": (f"{BUCKET}|{SHARE}", "gs://BUCKET, gs://BUCKET/PREFIX or SERVER:/SHARE"),
        "python": (r"3\.\d+", "e.g. 3.12"),
    }
    found = [
        f"{name} = {getattr(settings, name)!r}: expected {wanted}"
        for name, (pattern, wanted) in patterns.items()
        if getattr(settings, name) and not re.fullmatch(pattern, getattr(settings, name))
    ]
    if not PurePosixPath(settings.checkout).is_absolute():
        found.append(f"checkout = {settings.checkout!r}: expected an absolute path on the worker")
    odd = [name for name in settings.env if not re.fullmatch(r"[A-Za-z_]\w*", name)]
    found += [f"env: {name!r} is no name of a variable" for name in odd]
    if settings.topology:
        try:
            tpu_slice(settings.topology)
        except ValueError as error:
            found.append(str(error))
    return found
