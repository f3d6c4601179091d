"""How many processes a run has, which one this is, and where process 0 listens: as flags, variables or a scheduler say.

Order: flags, RECSCALE_COORD / RECSCALE_NPROC / RECSCALE_PROC (also what a JobSet sets), a step of srun with several
tasks, a TPU pod, a single process. Nothing here touches jax: asking for its devices would settle what is still open.
"""

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLES = ("RECSCALE_COORD", "RECSCALE_NPROC", "RECSCALE_PROC")
ALONE = "none"
DETECT = "auto"
TPU_PORT = 8482
FIRST_PORT, PORTS = 61440, 4096  # above the ephemeral ports of Linux; jax picks from the same range
NO_STEP = ("4294967290", "4294967291")  # what SLURM calls the shell of salloc and the batch script
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/$()\[\]]+):(\d+)")
Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """Where this process stands. coordinator: HOST:PORT of process 0; source: who says so; group: what tells this group
    of processes from others of the same job; devices: the GPUs of this process, None for all that it sees."""

    coordinator: str
    count: int
    index: int
    source: str
    group: str = ""
    devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(
                f"{self.source}: process {self.index} of {self.count}: expected a number from 0 to {self.count - 1}, "
                "one for each process: set the number of processes, or of this one, right"
            )
        if self.count > 1:
            split_address(self.coordinator, self.source)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        return split_address(self.coordinator, self.source)


SINGLE = Place("", 1, 0, "a single process")


def split_address(address: str, source: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[IPV6]:PORT"; raises ValueError naming `source`."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise ValueError(f"{source}: found {address!r}, expected HOST:PORT, the address of process 0")
    return match[1].strip("[]"), int(match[2])


def find(coordinator: str, count: int, index: int, environment: Environment) -> Place:
    """The place of this process.

    coordinator: HOST:PORT; "auto" or "": what variables and schedulers say; "none": a single process whatever they say.
    Raises ValueError where flags, variables or the scheduler's allocation do not fit together: one line, with the cure.
    """
    if coordinator not in ("", DETECT, ALONE):
        return Place(coordinator, count, index, f"--coordinator, --processes={count}, --process={index}")
    if count != 1:
        raise ValueError(f"--processes={count} needs --coordinator=HOST:PORT, the address of process 0")
    if coordinator == ALONE:
        return SINGLE
    for detect in (from_variables, from_slurm, from_tpu):
        place = detect(environment)
        if place is not None:
            return place
    return SINGLE


def from_variables(environment: Environment) -> Place | None:
    """What RECSCALE_COORD, RECSCALE_NPROC and RECSCALE_PROC say; RECSCALE_NPROC=1 alone is a single process."""
    found = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not found:
        return None
    count = _number(found, "RECSCALE_NPROC", 0)
    index = _number(found, "RECSCALE_PROC", 0)
    missing = [name for name in VARIABLES if name not in found]
    if missing and (count, index) != (1, 0):
        raise ValueError(
            f"{', '.join(found)} set, {', '.join(missing)} not: set all three (HOST:PORT of process 0, how many "
            "processes, number of this one), or none of them"
        )
    return Place(found.get("RECSCALE_COORD", ""), count, index, "RECSCALE_COORD, RECSCALE_NPROC, RECSCALE_PROC")


def _number(found: Mapping[str, str], name: str, absent: int) -> int:
    if name not in found:
        return absent
    try:
        return int(found[name])
    except ValueError:
        raise ValueError(f"{name}={found[name]!r}: expected a whole number") from None


def from_slurm(environment: Environment) -> Place | None:
    """The place in a step of srun with several tasks; raises ValueError in an allocation of several without srun."""
    found = environment
    if "SLURM_JOB_ID" not in found:
        return None
    step = found.get("SLURM_STEP_ID", "0")
    if "SLURM_STEP_NODELIST" not in found or "SLURM_PROCID" not in found or step in NO_STEP:
        tasks = max(_number(found, name, 1) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"))
        if tasks > 1:
            raise ValueError(
                f"SLURM job {found['SLURM_JOB_ID']} holds {tasks} tasks or nodes, and this process was not started by "
                "srun: put `srun` before the command, or pass --coordinator=none for one process on this node"
            )
        return None
    count = _number(found, "SLURM_STEP_NUM_TASKS", _number(found, "SLURM_NTASKS", 1))
    if count == 1:
        return None
    # A port per step: with one per job, as jax has it, two steps at once answer each other.
    job, number = _number(found, "SLURM_JOB_ID", 0), _number({"SLURM_STEP_ID": step}, "SLURM_STEP_ID", 0)
    port = found.get("JAX_COORDINATOR_PORT") or str(FIRST_PORT + (job + 613 * number) % PORTS)
    source = f"SLURM step {job}.{step}"
    coordinator = f"{first_host(found['SLURM_STEP_NODELIST'])}:{port}"
    return Place(
        coordinator, count, _number(found, "SLURM_PROCID", 0), source, group=source, devices=slurm_gpus(found, count)
    )


def first_host(nodes: str) -> str:
    """First name of a node list of SLURM: "gpu[003-007,9],x1" -> "gpu003"."""
    name = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name)


def slurm_gpus(environment: Environment, count: int) -> tuple[int, ...] | None:
    """GPUs of this task among those it sees, or None for all of them.

    One task per node drives all its GPUs; several share them evenly; tasks that SLURM confined to GPUs of their own
    (--gpus-per-task, --gpu-bind) take what they see. jax alone would give task i nothing but GPU i, which is one of
    eight in the first case and does not exist in the last. JAX_LOCAL_DEVICE_IDS has the last word. Raises ValueError
    where tasks and GPUs do not fit.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if environment.get("JAX_LOCAL_DEVICE_IDS") or (platforms and not re.search("cuda|gpu|rocm", platforms)):
        return None
    tasks, local = _tasks_here(environment, count), _number(environment, "SLURM_LOCALID", 0)
    visible = re.findall(r"\d+|(?:GPU|MIG)-[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))  # or "NoDevFiles"
    on_node = _number(environment, "SLURM_GPUS_ON_NODE", len(visible))
    seen = len(visible) or on_node
    own = environment.get("SLURM_GPUS_PER_TASK") or seen * tasks <= on_node
    if tasks == 1 or own or not seen:
        return None
    if seen % tasks:
        raise ValueError(
            f"SLURM gives {tasks} tasks of this node {seen} GPUs, which they cannot share evenly: use "
            f"--ntasks-per-node={seen} or --ntasks-per-node=1"
        )
    each = seen // tasks
    return tuple(range(local * each, (local + 1) * each))


def _tasks_here(environment: Environment, count: int) -> int:
    """Tasks of this step on this node: SLURM_STEP_TASKS_PER_NODE is "4(x2),1" for three nodes."""
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    numbers = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        numbers += [int(tasks)] * int(times or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    if node < len(numbers):
        return numbers[node]
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    return _number(environment, "SLURM_NTASKS_PER_NODE", -(-count // nodes))


def from_tpu(environment: Environment) -> Place | None:
    """The place in a TPU pod with several hosts or slices, from the metadata server of GCE or the variables of GKE.

    The same facts that jax reads. Importing jax sets TPU_SKIP_MDS_QUERY where the machine has no TPU.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return None

    def metadata(key: str) -> str | None:
        return _metadata(environment.get("GCE_METADATA_IP", "metadata.google.internal"), key)

    worker = None if "TPU_SKIP_MDS_QUERY" in environment else metadata("agent-worker-number")
    if worker is not None:
        facts = dict(
            re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", metadata("tpu-env") or "", re.MULTILINE), **environment
        )
        endpoints = (metadata("worker-network-endpoints") or "").split(",")
        hosts = [endpoint.split(":")[-1] for endpoint in endpoints]  # a name, or NAME:ID:ADDRESS
        return _tpu_place(hosts, worker, facts, "the metadata server of this TPU VM")
    names, source = "", ""
    for source in ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if names := environment.get(source, ""):
            break
    if not names:
        return None
    if source == "TPU_PROCESS_ADDRESSES_PATH":
        names = Path(names).read_text().strip()
    hosts = [name.split(":")[0] for name in names.split(",")]
    return _tpu_place(hosts, environment.get("TPU_WORKER_ID", "0"), environment, f"{source}, TPU_WORKER_ID")


def _tpu_place(hosts: list[str], worker: str, facts: Mapping[str, str], source: str) -> Place | None:
    facts = {key: value for key, value in facts.items() if value}
    slices, number = _number(facts, "MEGASCALE_NUM_SLICES", 1), _number(facts, "MEGASCALE_SLICE_ID", 0)
    if len(hosts) * slices == 1:
        return None
    head = facts.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).split(":")[0]
    port = facts.get("JAX_COORDINATOR_PORT", str(TPU_PORT))
    index = _number({source: worker}, source, 0) + number * len(hosts)
    return Place(f"{head}:{port}", len(hosts) * slices, index, source)


def _metadata(server: str, key: str, wait: Callable[[float], None] = time.sleep) -> str | None:
    """An attribute of this virtual machine; None where it has none of that name. Raises ConnectionError."""
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    problem: Exception | None = None
    for _ in range(3):
        try:
            with opener.open(request, timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            problem = error
        except OSError as error:
            problem = error
        wait(0.5)
    raise ConnectionError(
        f"the metadata server {server} does not tell {key} ({problem}): on a machine that is no TPU VM set "
        "TPU_SKIP_MDS_QUERY=1, or pass --coordinator=none"
    )
