"""Start and end of a run on several processes: each finds its place, all come together, all leave together.

A single process never starts jax's distributed service. Several first hold a roll call on the coordinator's port
(roll_call.py), so that whatever is wrong is one line on every process within RECSCALE_RENDEZVOUS_SECONDS (60).
"""

import os
import sys
import time
from collections.abc import MutableMapping

import jax

from recscale.cluster import DETECT, SINGLE, Place, find
from recscale.roll_call import RendezvousError, roll_call

SECONDS = "RECSCALE_RENDEZVOUS_SECONDS"
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # gRPC takes the first that is set
SHORTEST_START = 10  # seconds for jax to connect once all are known to be there


def join(coordinator: str = "", count: int = 1, index: int = 0, run: str = "") -> Place:
    """Make this process one of those that share a run, and say which; call it before anything else of jax.

    coordinator: HOST:PORT of process 0, with `count` and `index`; "" asks variables and schedulers (cluster.py `find`);
    "auto" asks jax's own detectors (Open MPI, Kubernetes) too and raises where nothing is found; "none" is a single
    process whatever the environment says. run: a name that the processes of one run share, its workdir say.
    Raises ValueError for what does not fit together, RendezvousError (an OSError) where the others do not come in time
    or the port is another's; nothing of jax has been started then.
    """
    seconds = _patience(os.environ)
    place = find(coordinator, count, index, os.environ)
    if place.count == 1:
        if coordinator == DETECT and place is SINGLE:
            _ask_jax(seconds)
        return place
    began = time.monotonic()
    roll_call(place, run, seconds)
    _exempt_from_proxies(place.address[0], os.environ)
    left = max(SHORTEST_START, int(seconds - (time.monotonic() - began)))
    _initialize(
        coordinator_address=place.coordinator,
        num_processes=place.count,
        process_id=place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=left,
    )
    return place


def leave() -> None:
    """Take leave of the other processes: all must call it, for it waits until all do. A single process: nothing."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def abandon(status: int) -> None:
    """End this process at once with an exit status, when it failed and others may wait for it.

    A normal exit would wait 300 s for all to leave together; so the others see the connection break, and end too. Does
    nothing for a single process.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _patience(environment: MutableMapping[str, str]) -> float:
    value = environment.get(SECONDS) or "60"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise ValueError(f"{SECONDS}={value!r}: expected seconds to wait for the other processes, above 0")
    return seconds


def _initialize(**arguments) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # has a meaning on CPU only
    try:
        jax.distributed.initialize(**arguments)
    except RuntimeError as error:
        raise RendezvousError(f"jax cannot start on several processes: {' '.join(str(error).split())}") from error


def _ask_jax(seconds: float) -> None:
    """jax's own detectors; what they take from a scheduler is theirs to check."""
    try:
        _initialize(initialization_timeout=max(SHORTEST_START, int(seconds)))
    except ValueError as error:
        raise ValueError(
            "--coordinator=auto: found no RECSCALE_COORD, no step of srun with several tasks, no TPU pod, and jax no "
            f"other cluster ({error}): pass --coordinator=HOST:PORT, --processes, --process, or none of them"
        ) from error


def _exempt_from_proxies(host: str, environment: MutableMapping[str, str]) -> None:
    """Keep gRPC from asking a proxy for process 0, which ends in nothing or in a dead process; say so once."""
    found = [name for name in PROXIES if environment.get(name)]
    jax.config.update("jax_check_proxy_envs", False)  # its warning says to do what is done here
    if not found:
        return
    known = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    environment["no_grpc_proxy"] = ",".join([*([known] if known else []), host])
    print(f"note: {', '.join(found)} set: process 0 on {host} is reached without a proxy", file=sys.stderr)
