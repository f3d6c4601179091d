"""Settings of the Kubernetes place (launch/gke.py), and what may be wrong with them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from launch.checks import missing, refuse, study_outside, too_small, wrong_types
from launch.study import Job
from launch.tpu_slices import tpu_slice

DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
NEEDED = {
    "image": "the container image with recscale and a checkout of this project",
    "claim": "the PersistentVolumeClaim (ReadWriteMany) of the file system that holds the run folders",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where and on what the cells run. Raises ValueError, one line per problem.

    GPUs: accelerator (value of the node label cloud.google.com/gke-accelerator), gpus per host, hosts. TPUs: topology
    ("v6e:4x4"), slices of it, chips_per_host (0: the usual). queue: Kueue's LocalQueue, "" for none. spot: on nodes
    that may be taken away. cpu, memory: of a host, as Kubernetes writes them ("" asks for nothing). mount: where the
    claim is in the container. checkout: where this project is in the image. grace: seconds between SIGTERM and the end,
    more than a save takes. restarts: those that count. context: of kubectl, "" for the current one. env: further
    variables of the program.
    """

    image: str = ""
    claim: str = ""
    accelerator: str = ""
    gpus: int = 0
    hosts: int = 1
    topology: str = ""
    slices: int = 1
    chips_per_host: int = 0
    namespace: str = "default"
    queue: str = ""
    spot: bool = False
    cpu: str = ""
    memory: str = ""
    mount: str = "/recscale/runs"
    checkout: str = "/recscale"
    service_account: str = ""
    grace: int = 120
    restarts: int = 20
    context: str = ""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse(wrong_types(self))
        least = {"gpus": 0, "hosts": 1, "slices": 1, "chips_per_host": 0, "grace": 1, "restarts": 0}
        refuse([*too_small(self, least), *_bad_names(self), *_bad_hardware(self)])


def bad_jobs(jobs: Sequence[Job], settings: Settings) -> list[str]:
    """One line per reason why these cells cannot be sent with these settings."""
    unset = missing(settings, NEEDED)
    if not settings.accelerator and not settings.topology:
        gpus = "--set accelerator=nvidia-h100-80gb --set gpus=8"
        return [*unset, f"accelerator is not set: the kind of GPU ({gpus}), or topology for TPUs"]
    found = unset
    for job in jobs:
        found += study_outside(job.argv)
        place = PurePosixPath(settings.checkout) / job.workdir
        if not place.is_relative_to(settings.mount) or ".." in place.parts:
            where_to = f"lies at {place} in the container, outside of the mounted {settings.mount}"
            found.append(f"{job.cell}: its run folder {where_to}: give --runs and mount that fit each other")
    return found


def _bad_names(settings: Settings) -> list[str]:
    found = []
    for name in ("namespace", "queue", "claim", "service_account"):
        value = getattr(settings, name)
        if value and not re.fullmatch(DNS_LABEL, value):
            found.append(f"{name} = {value!r}: not a name in Kubernetes (lower-case letters, digits, hyphens)")
    for name in ("mount", "checkout"):
        if not PurePosixPath(getattr(settings, name)).is_absolute():
            found.append(f"{name} = {getattr(settings, name)!r}: expected an absolute path in the container")
    return found


def _bad_hardware(settings: Settings) -> list[str]:
    """Problems of accelerator against topology; both empty is for submit to refuse."""
    if settings.accelerator and settings.topology:
        return [f"accelerator = {settings.accelerator!r} (GPUs) and topology = {settings.topology!r} (TPUs): set one"]
    if settings.accelerator and not settings.gpus:
        return [f"gpus = 0: how many of {settings.accelerator} a host has (--set gpus=8)"]
    if not settings.topology:
        tpu_only = [name for name, usual in (("slices", 1), ("chips_per_host", 0)) if getattr(settings, name) != usual]
        return [f"{name} = {getattr(settings, name)}: only with topology (TPUs)" for name in tpu_only]
    if settings.hosts > 1 or settings.gpus:
        return [f"hosts = {settings.hosts}, gpus = {settings.gpus}: not with topology, which says both"]
    try:
        tpu = tpu_slice(settings.topology, settings.chips_per_host)
    except ValueError as error:
        return [str(error)]
    if settings.slices > 1 and tpu.hosts == 1:
        return [f"slices = {settings.slices}: GKE joins slices of several hosts only; {settings.topology} has one host"]
    return []
