"""How Kubernetes (GKE) and the TPU VM service call the TPU slices of launch/chips.py, and how chips sit on hosts.

Sources: https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e (shapes, hosts, names of accelerator types),
https://docs.cloud.google.com/kubernetes-engine/docs/concepts/tpus (node labels, machine types),
https://docs.cloud.google.com/tpu/docs/runtimes (runtime versions).
"""

import dataclasses

from launch.chips import Topology, topology

SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
POD_HOST = 4
"""Chips of a host of a slice that has several."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """Names of one generation. node: value of the node label on GKE. prefix: of a TPU VM accelerator type, which counts
    `cores` per chip. runtime: software of a TPU VM. hosts: chips that a host may have. shapes: empty for any."""

    node: str
    prefix: str
    cores: int
    runtime: str
    hosts: tuple[int, ...]
    shapes: tuple[str, ...]


GENERATIONS = {
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", (1, 4, 8), SQUARES),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", (4,), ()),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", (1, 4, 8), SQUARES),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice as it is asked for. shape: "4x4". accelerator_type: "v6e-16". hosts x per_host chips."""

    generation: Generation
    shape: str
    chips: int
    per_host: int

    @property
    def hosts(self) -> int:
        """How many machines the slice has: as many processes."""
        return self.chips // self.per_host

    @property
    def accelerator_type(self) -> str:
        """What the TPU VM service calls it."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"


def tpu_slice(text: str, per_host: int = 0) -> Slice:
    """Read "v6e:4x4". per_host: chips of a host; 0: all of them up to 8 on one host, 4 beyond.

    Raises ValueError where the slice does not exist, or its chips do not fill hosts of that size.
    """
    found = topology(text)
    if found.name not in GENERATIONS:
        raise ValueError(f"topology = {text!r}: not a TPU; expected e.g. v6e:4x4 ({', '.join(GENERATIONS)})")
    generation = GENERATIONS[found.name]
    shape = "x".join(str(n) for n in found.shape)
    if problem := _unknown_shape(found, generation, shape):
        raise ValueError(f"topology = {text!r}: {problem}")
    largest = max(generation.hosts)
    size = per_host or (found.chips if found.chips <= largest else POD_HOST)
    if size not in generation.hosts or (found.chips > largest and size != POD_HOST):
        sizes = POD_HOST if found.chips > largest else " or ".join(str(n) for n in generation.hosts)
        raise ValueError(f"chips_per_host = {size}: hosts of a {text} slice have {sizes} chips")
    if found.chips % size:
        raise ValueError(f"topology = {text!r}: {found.chips} chips do not fill hosts of {size} (chips_per_host)")
    return Slice(generation, shape, found.chips, size)


def _unknown_shape(found: Topology, generation: Generation, shape: str) -> str:
    if generation.shapes and shape not in generation.shapes:
        return f"no such slice; there are {', '.join(generation.shapes)}"
    if not generation.shapes and (len(found.shape) != 3 or found.chips % POD_HOST):
        return f"expected three sizes whose product fills hosts of {POD_HOST} chips, e.g. v5p:2x2x1"
    return ""
