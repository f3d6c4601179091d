"""What a compiled program moves and multiplies: collectives, their bytes and matrix FLOPs, with loops counted in full.

`read(compiled.as_text())` walks the program from its entry through fusions, calls and loops. A loop's body counts once
per trip where the text says how many trips it makes (a scan does); a loop that stops on its data counts once, and is
listed. That is what the compiler's own cost analysis does not do: it counts the body of every loop once.

All figures are of one device. The bytes of a collective are those of its larger side: the result of an all-gather, the
operand of a reduce-scatter, either side of the others.
"""

import dataclasses
import math
import re

import numpy as np

from launch import hlo_costs
from launch.hlo_text import Computation, Instruction, parse, replica_groups, root_of, size, trip_count

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_KIND_OF = {kind: kind for kind in KINDS} | {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: bytes of one execution, executions per step, and the devices that take part together.

    groups [G, g] are places in the mesh, None where the text does not say (then all devices). known: every enclosing
    loop's trip count is in the program. source: the operation in the traced function it stems from.
    """

    kind: str
    bytes: int
    count: int
    known: bool
    groups: np.ndarray | None
    source: str

    @property
    def total(self) -> int:
        """Bytes per step."""
        return self.bytes * self.count


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program as read, one step on one device.

    devices: that take part. matmul_flops: of matrix products. traffic: bytes that its instructions read from and write
    to memory (launch/hlo_costs.py). open_loops: sources of the loops whose number of trips depends on data.
    """

    devices: int
    collectives: tuple[Collective, ...]
    matmul_flops: float
    traffic: float
    open_loops: tuple[str, ...]

    def total(self, kind: str) -> int:
        """Bytes that all collectives of one kind move per step."""
        return sum(c.total for c in self.collectives if c.kind == kind)

    def largest(self, kind: str) -> int:
        """Bytes of the largest single collective of one kind; 0 where there is none."""
        return max((c.bytes for c in self.collectives if c.kind == kind), default=0)

    def count(self, kind: str) -> int:
        """Executions per step of the collectives of one kind."""
        return sum(c.count for c in self.collectives if c.kind == kind)

    def group_size(self, collective: Collective) -> int:
        """Devices that take part together."""
        return self.devices if collective.groups is None else collective.groups.shape[1]


def read(text: str) -> Program:
    """Read the text of a compiled program. Raises ValueError where it has no entry computation."""
    computations, entry = parse(text)
    if entry is None:
        raise ValueError("hlo: no ENTRY computation; expected the text of a compiled program (compiled.as_text())")
    header = text.split("\n", 1)[0]
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header))
    walk = _Walk(computations, devices)
    walk.visit(entry, 1, True)
    return Program(devices, tuple(walk.collectives), walk.flops, walk.traffic, tuple(dict.fromkeys(walk.open_loops)))


class _Walk:
    """Collects from one computation after the other, each as often as the program runs it."""

    def __init__(self, computations: dict[str, Computation], devices: int):
        self.computations, self.devices = computations, devices
        self.collectives: list[Collective] = []
        self.open_loops: list[str] = []
        self.flops = 0.0
        self.traffic = 0.0

    def visit(self, name: str, count: int, known: bool, fused: bool = False) -> None:
        body = self.computations[name]
        for instruction in body.values():
            if not fused:
                self.traffic += count * hlo_costs.traffic(instruction, body, self.computations)
            if instruction.op == "while":
                self._loop(instruction, body, count, known)
            elif instruction.op.removesuffix("-start") in _KIND_OF:
                self._collective(instruction, body, count, known)
            elif instruction.op in hlo_costs.FLOPS:
                self.flops += count * hlo_costs.FLOPS[instruction.op](instruction, body)
            else:
                for called in _callees(instruction):
                    self.visit(called, count, known, fused or instruction.op == "fusion")

    def _loop(self, loop: Instruction, outside: Computation, count: int, known: bool) -> None:
        condition, body = loop.called("condition"), loop.called("body")
        assert condition is not None and body is not None
        trips = trip_count(loop, outside, self.computations)
        if trips is None:
            source = re.search(r'op_name="([^"]*)"', loop.attributes)
            self.open_loops.append(source.group(1) if source else loop.name)
        self.visit(body, count * (1 if trips is None else trips), known and trips is not None)

    def _collective(self, call: Instruction, body: Computation, count: int, known: bool) -> None:
        operand = sum(size(body[name].type) for name in call.operands if name in body)
        result = size(call.type)
        if call.op.endswith("-start"):  # its type may hold the operands too: the matching -done has the result alone
            done = [i for i in body.values() if i.op == call.op.replace("-start", "-done") and call.name in i.operands]
            result = size(done[0].type) if done else max(result - operand, operand)
        kind = _KIND_OF[call.op.removesuffix("-start")]
        root = root_of(body)
        if kind == "all-reduce" and root.op == "dynamic-slice" and call.name in root.operands:
            kind = "reduce-scatter"  # a TPU writes one as an all-reduce fused with the slice that a device keeps
        source = re.search(r'op_name="([^"]*)"', call.attributes)
        self.collectives.append(
            Collective(
                kind,
                max(operand, result),
                count,
                known,
                replica_groups(call.attributes, self.devices),
                source.group(1) if source else "",
            )
        )


def _callees(instruction: Instruction) -> list[str]:
    """What an instruction runs: a fusion's, call's or async-start's computation, every branch of a conditional."""
    if instruction.op in ("fusion", "call", "call-start", "async-start"):
        names = [instruction.called("calls"), instruction.called("to_apply")]
    elif instruction.op == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        named = [instruction.called("true_computation"), instruction.called("false_computation")]
        names = re.findall(r"%([\w.$-]+)", branches.group(1)) if branches else named
    else:
        return []
    return [name for name in names if name is not None]
