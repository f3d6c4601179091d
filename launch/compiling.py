"""Compile a train step for chips that are not here, and measure what came out.

TPUs: libtpu from PyPI compiles for any slice. GPUs: the CUDA plugin's wheels compile for any number of nodes, without a
driver. The compilers write to the process's stderr; that goes to a file while they work.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from launch import hlo
from launch.chips import GIB, Topology

NEEDED = {"tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda13", "jax_cuda13_plugin")}


class TooLarge(Exception):
    """The compiler refused the program for its memory; message: what it said. needed: bytes, 0 where it did not say."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step: what the text says, bytes per device by part, FLOPs with every loop counted once (None: the
    compiler does not say), and how long compiling took."""

    program: hlo.Program
    memory: dict[str, int]
    flops_once: float | None
    seconds: float


def prepare() -> None:
    """Keep jax on the CPU and libtpu from looking for a machine around it. Before the first device is asked for."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two planners at once would abort on libtpu's lock file
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


def missing(platform: str) -> str | None:
    """The first package without which nothing can be compiled for a platform; None where all are installed."""
    for name in NEEDED[platform]:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return name
    return None


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology, to build a mesh of. Raises ValueError where the compiler does not know it."""
    options: dict[str, Any] = {"platform": "tpu", "topology_name": topology.text.lower()}
    if topology.chip.platform == "gpu":
        sizes = "x".join(str(n) for n in topology.shape)
        options = {"platform": "cuda", "topology_name": topology.name, "target_config": topology.chip.target}
        options |= {"topology": sizes}
    try:
        with quiet():
            found = list(topologies.get_topology_desc(**options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology.text!r}: the compiler does not know it: {_one_line(error)}") from error
    if len(found) != topology.chips:
        raise ValueError(
            f"topology {topology.text!r}: expected {topology.chips} devices, the compiler makes {len(found)}"
        )
    return found


def stand_ins(count: int) -> list[Any]:
    """`count` CPU devices, to lay arrays out on. Raises ValueError where jax has started with fewer."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    here = jax.devices("cpu")
    if len(here) < count:
        raise ValueError(
            f"this process has {len(here)} CPU devices, {count} are needed: unset XLA_FLAGS and run it again"
        )
    return here[:count]


def compile_step(step: Any, state: Any, batch: Any) -> Compiled:
    """Compile step(state, batch) for the devices in the shapes' layouts. Raises TooLarge where memory does not do."""
    began = time.time()
    try:
        with quiet():
            compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        raise TooLarge(_one_line(error), _needed(str(error))) from error
    seconds = time.time() - began
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    costs = compiled.cost_analysis() or {}
    return Compiled(hlo.read(compiled.as_text()), memory, costs.get("flops"), seconds)


def _needed(message: str) -> int:
    """Bytes in "Used 20.5G of 15.7G hbm" or "required for HLO temporaries (40.00G) exceeds"."""
    found = re.search(r"Used ([\d.]+)([KMG]) of|\(([\d.]+)([KMG])\) exceeds", message)
    if found is None:
        return 0
    number, unit = found.group(1) or found.group(3), found.group(2) or found.group(4)
    return int(float(number) * {"K": 1 << 10, "M": 1 << 20, "G": GIB}[unit])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what compilers write to stderr into a file: errors come as exceptions, the rest is noise.

    Where a compiler kills the process, its last words stay in the file: recscale-plan-PID.log in the folder for
    temporary files.
    """
    sys.stderr.flush()
    path = Path(tempfile.gettempdir()) / f"recscale-plan-{os.getpid()}.log"
    kept = os.dup(2)
    try:
        with path.open("wb") as log:
            os.dup2(log.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        path.unlink(missing_ok=True)


def version(package: str) -> str:
    """Version of an installed package."""
    return importlib.metadata.version(package)
