"""A step at the peaks of its chips: what they must multiply, read from and write to memory, and send each other."""

import math
from typing import Any

import numpy as np

from launch import hlo
from launch.chips import Topology


def sent(kind: str, size: float, group: int) -> float:
    """Bytes that a device must send for a collective of `size` bytes (see launch/hlo.py) among `group` devices.

    Source: the optimal algorithms of Thakur, Rabenseifner and Gropp (2005), section 4: a ring, or pairwise exchange.
    """
    if group < 2:
        return 0.0
    share = size * (group - 1) / group
    return {"all-reduce": 2 * share, "collective-permute": float(size)}.get(kind, share)


def links(program: hlo.Program, topology: Topology) -> dict[str, float]:
    """Seconds per step that each kind of link is busy at its peak: {"ICI"} for a TPU, {"NVLink", "network"} for GPUs.

    On a torus an all-to-all among all chips travels a quarter of each ring on average, and takes that many times as
    long; every other collective is taken to use all links of a chip at once. Between nodes, the GPUs of a node share
    the work of a collective other than an all-to-all.
    """
    chip = topology.chip
    if chip.platform == "tpu":
        hops = max(1.0, sum(n / 4 for n in topology.shape if n > 1))
        seconds = 0.0
        for c in program.collectives:
            group = program.group_size(c)
            around = hops if c.kind == "all-to-all" and group == topology.chips else 1.0
            seconds += c.count * sent(c.kind, c.bytes, group) * around / chip.link
        return {"ICI": seconds}
    inside, between = 0.0, 0.0
    for c in program.collectives:
        group = program.group_size(c)
        nodes = _nodes(c, topology)
        local = max(1, group // nodes)
        if c.kind == "all-to-all":
            inside += c.count * c.bytes * (local - 1) / group
            between += c.count * c.bytes * (nodes - 1) / nodes
        else:
            inside += c.count * sent(c.kind, c.bytes, local)
            between += c.count * sent(c.kind, c.bytes, nodes) / local
    return {"NVLink": inside / chip.link, "network": between / chip.network}


def _nodes(collective: hlo.Collective, topology: Topology) -> int:
    """Nodes that the largest group of a collective spans."""
    if collective.groups is None:
        return topology.chips // topology.per_node
    return max(len(set(group)) for group in np.asarray(collective.groups) // topology.per_node)


def least_traffic(
    state: dict[str, int], weights: float, passes: int, rows: float, temporaries: float
) -> dict[str, float]:
    """Bytes that a device must at least read and write per step, by cause, however the program is compiled.

    state: bytes of the dense parameters and their optimizer's slots on a device, each read and written once, and
    gradients of the parameters, written and read once. weights: bytes of all dense weights at the compute type, read
    in every pass. rows: bytes of the touched table rows, read to look them up, read and written to update. temporaries:
    peak bytes of intermediate results, each written and read at least once.
    """
    parts = {
        "parameters and optimizer": 2 * (state["model"] + state["optimizer"]) + 2 * state["model"],
        "weights in each pass": weights * passes,
        "table rows": 3 * rows,
        "intermediate results": 2 * temporaries,
    }
    return parts | {"total": sum(parts.values())}


def bounds(flops: float, peak: float, traffic: float, topology: Topology, wires: dict[str, float]) -> dict[str, Any]:
    """Seconds per step by limit, all taken to overlap perfectly, the largest of them, and its name. Per device."""
    seconds = {"compute": flops / peak, "HBM": traffic / topology.chip.hbm_bandwidth} | wires
    name = max(seconds, key=lambda key: seconds[key])
    return {"seconds": seconds, "step_seconds": max(seconds[name], math.ulp(0.0)), "bound": name}
