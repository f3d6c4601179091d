"""Kubernetes (GKE): a JobSet per cell, on GPU hosts or TPU slices, queued by Kueue where there is one.

    python -m launch.sweep STUDY --on=gke submit --runs=runs --set image=IMAGE --set claim=VOLUME_CLAIM \
        --set accelerator=nvidia-h100-80gb --set gpus=8          (TPU slices: --set topology=v6e:4x4)

The image holds a checkout of this project at `checkout`, with recscale installed. The volume claim (ReadWriteMany: a
shared file system) is mounted at `mount`, and the run folders lie on it: here, RUNS is the same file system, so that
what is done and what is left are read from the runs' own files. The cluster needs JobSet 0.10 or later.

A restart is the cluster's (launch/templates/jobset.yaml says when); a JobSet that has ended without DONE, because the
program failed or its restarts are spent, is deleted and created anew by the next submit. Processes on GPU hosts meet at
the JobSet's coordinator; TPU slices are found by jax from what GKE puts into their pods. `kubectl` must be logged in.

Tried with the schema of JobSet, a stand-in for kubectl and the real kubectl before a stand-in server; never on a
cluster: what Kueue and GKE add to the pods, and the restarts themselves, are as their documentation says.
"""

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.checks import refuse, resource_name, slug
from launch.commands import CommandError, call, shown
from launch.gke_settings import Settings, bad_jobs
from launch.study import Job
from launch.tpu_slices import Slice, tpu_slice
from recscale.preemption import EXIT_HELD, EXIT_RESTART

__all__ = ["Settings", "cancel", "jobset", "submit", "where"]

TEMPLATE = Path(__file__).parent / "templates" / "jobset.yaml"
PORT = 8476
PATIENCE = {"RECSCALE_RENDEZVOUS_SECONDS": "900"}  # a node may have to be made, and the image fetched, for the last pod
ENDED = ("Completed", "Failed")
# Beside what the program says itself: killed (137: also for its memory), told to stop before it could answer (143), and
# SIGABRT (134), by which jax ends a process whose fellow on another host is gone.
RESTARTABLE = (EXIT_RESTART, EXIT_HELD, 134, 137, 143)


def submit(jobs: list[Job], folder: Path, settings: Settings, dry_run: bool) -> None:
    """Create a JobSet for each cell that has none at work; prints what it sends.

    A cell whose trunk is not done stays behind. dry_run: prints what would be created, and calls nothing.
    Raises ValueError where settings and cells do not fit, CommandError where kubectl is missing or refused some.
    """
    refuse(bad_jobs(jobs, settings))
    there = {} if dry_run else _listed(folder, settings)
    waiting = {job.cell for job in jobs}
    refused = []
    for job in jobs:
        if job.after in waiting:
            print(f"# {job.cell}: starts from {job.after}, which is not done; submit again when it is")
            continue
        try:
            _send(job, folder, settings, there.get(resource_name(job.workdir)), dry_run)
        except CommandError as error:
            refused.append(f"{job.cell}: {error}")
    if refused:
        raise CommandError("\n".join(refused))


def cancel(jobs: list[Job], folder: Path, settings: Settings, dry_run: bool) -> None:
    """Delete the cells' JobSets; a run that is on saves within the grace period. Raises CommandError."""
    if not jobs:
        return
    names = [resource_name(job.workdir) for job in jobs]
    command = [*_kubectl(settings, "delete", "jobset"), "--ignore-not-found", "--wait=false", *names]
    print(shown(command))
    if not dry_run:
        print(call(command).strip())


def where(jobs: list[Job], folder: Path, settings: Settings) -> dict[str, str]:
    """Cell -> what the cluster says of its JobSet; {} where it cannot be asked."""
    try:
        there = _listed(folder, settings)
    except CommandError:
        return {}
    names = {job.cell: resource_name(job.workdir) for job in jobs}
    return {cell: _said(there[name]) for cell, name in names.items() if name in there}


def jobset(job: Job, folder: Path, settings: Settings) -> str:
    """The JobSet of a cell, as YAML."""
    tpu = tpu_slice(settings.topology, settings.chips_per_host) if settings.topology else None
    hosts = tpu.hosts if tpu else settings.hosts
    labels = {"app.kubernetes.io/part-of": "recscale", "recscale/study": slug(folder.name)}
    annotations = {"recscale/cell": job.cell, "recscale/workdir": job.workdir}
    if tpu and hosts > 1:  # a slice of several hosts is a node pool of its own
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    return _render(
        TEMPLATE.read_text(),
        {
            "cell": job.cell,
            "name": resource_name(job.workdir),
            "namespace": settings.namespace,
            "pod_labels": labels,  # without the queue's: Kueue would take the pods for jobs
            "labels": labels | ({"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}),
            "annotations": annotations,
            "restarts": settings.restarts,
            "restartable": sorted(RESTARTABLE),  # Kubernetes wants them in order
            "slices": settings.slices,
            "hosts": hosts,
            "placement": _placement(settings, tpu),
            "grace": settings.grace,
            "image": settings.image,
            "checkout": settings.checkout,
            "command": ["python", *(word.replace("$(", "$$(") for word in job.argv)],
            "env": _environment(settings, 1 if tpu else hosts),
            "resources": _resources(settings, tpu),
            "mount": settings.mount,
            "claim": settings.claim,
        },
    )


def _send(job: Job, folder: Path, settings: Settings, there: dict[str, Any] | None, dry_run: bool) -> None:
    name = resource_name(job.workdir)
    if there and not _over(there):
        print(f"# {job.cell}: {name} is there ({_said(there)}); left alone")
        return
    if there:
        delete = [*_kubectl(settings, "delete", "jobset"), "--ignore-not-found", "--cascade=foreground", name]
        print(f"# {job.cell}: {_said(there)}\n{shown(delete)}")
        call(delete)
    create, text = _kubectl(settings, "create", "-f", "-"), jobset(job, folder, settings)
    print(shown(create, text))
    if dry_run:
        return
    try:
        print(f"# {call(create, text).strip()}")
    except CommandError as error:
        if "AlreadyExists" not in str(error):
            raise
        print(f"# {job.cell}: {name} was just created by another; left alone")


def _kubectl(settings: Settings, *words: str) -> list[str]:
    context = [f"--context={settings.context}"] if settings.context else []
    return ["kubectl", *context, f"--namespace={settings.namespace}", *words]


def _listed(folder: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """Name -> JobSet, of those of this study."""
    command = _kubectl(settings, "get", "jobset", f"--selector=recscale/study={slug(folder.name)}", "--output=json")
    items = json.loads(call(command))["items"]
    return {item["metadata"]["name"]: item for item in items}


def _conditions(item: dict[str, Any]) -> dict[str, str]:
    """Type -> message of the conditions that hold. A JobSet that no controller has seen yet has none."""
    found = item.get("status", {}).get("conditions", [])
    return {each["type"]: " ".join(each["message"].split()) for each in found if each["status"] == "True"}


def _over(item: dict[str, Any]) -> bool:
    return "deletionTimestamp" in item["metadata"] or any(each in ENDED for each in _conditions(item))


def _said(item: dict[str, Any]) -> str:
    status, conditions = item.get("status", {}), _conditions(item)
    restarts = status.get("restarts", 0)
    after = f", restarts: {restarts}" if restarts else ""
    if "deletionTimestamp" in item["metadata"]:
        return "being deleted"
    if "Failed" in conditions:
        return f"failed{after}: {conditions['Failed'][:100]}"
    if "Completed" in conditions:
        return f"finished{after}"
    if item["spec"].get("suspend", False):
        return f"waits in its queue{after}"
    (workers,) = status.get("replicatedJobsStatus") or [{}]
    ready, wanted = workers.get("ready", 0), item["spec"]["replicatedJobs"][0].get("replicas", 1)
    if not ready:
        return f"pending{after}"
    return f"running{f' ({ready} of {wanted} slices)' if wanted > 1 else ''}{after}"


def _placement(settings: Settings, tpu: Slice | None) -> dict[str, Any]:
    """What of the pod's specification says where it runs. Nodes with GPUs or TPUs are tolerated by GKE's own doing."""
    nodes = {"cloud.google.com/gke-accelerator": settings.accelerator}
    if tpu:
        nodes = {"cloud.google.com/gke-tpu-accelerator": tpu.generation.node}
        nodes["cloud.google.com/gke-tpu-topology"] = tpu.shape
    found: dict[str, Any] = {"nodeSelector": nodes}
    if settings.spot:
        nodes["cloud.google.com/gke-spot"] = "true"
        found["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if settings.service_account:
        found["serviceAccountName"] = settings.service_account
    if settings.slices > 1:  # slices talk over the hosts' own network
        found |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return found


def _environment(settings: Settings, processes: int) -> list[dict[str, Any]]:
    """Variables of the container; on several GPU hosts, who meets whom where. TPU pods are told by GKE."""
    found: list[dict[str, Any]] = []
    if processes > 1:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        host = "metadata.labels['jobset.sigs.k8s.io/coordinator']"
        found += [
            {"name": "COORD_HOST", "valueFrom": {"fieldRef": {"fieldPath": host}}},
            {"name": "RECSCALE_COORD", "value": f"$(COORD_HOST):{PORT}"},
            {"name": "RECSCALE_NPROC", "value": str(processes)},
            {"name": "RECSCALE_PROC", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
    plain = {"PYTHONUNBUFFERED": "1"} | PATIENCE | dict(settings.env)
    return found + [{"name": name, "value": value} for name, value in plain.items()]


def _resources(settings: Settings, tpu: Slice | None) -> dict[str, Any]:
    asked = {name: size for name, size in (("cpu", settings.cpu), ("memory", settings.memory)) if size}
    chips = {"google.com/tpu": tpu.per_host} if tpu else {"nvidia.com/gpu": settings.gpus}
    return ({"requests": asked} if asked else {}) | {"limits": chips}


def _render(template: str, values: Mapping[str, Any]) -> str:
    """Fill in $names: mappings and lists that have a line to themselves as blocks, all else as YAML within the line."""
    lines = []
    for line in template.splitlines():
        alone = re.fullmatch(r"( *)\$(\w+)", line)
        if alone:
            block = yaml.safe_dump(values[alone[2]], sort_keys=False, width=10**6, allow_unicode=True)
            lines += [alone[1] + row for row in block.splitlines()]
        else:
            lines.append(string.Template(line).substitute(_Inline(values)))
    return "\n".join(lines) + "\n"


class _Inline(dict[str, Any]):
    def __getitem__(self, name: str) -> str:
        text = yaml.safe_dump(super().__getitem__(name), default_flow_style=True, width=10**6, allow_unicode=True)
        return text.strip().removesuffix("...").strip()
