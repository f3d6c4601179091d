"""The text of a compiled program as data: instructions, types and their bytes, groups of devices, trips of loops."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {"pred": 1.0, "token": 0.0}
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.$-]+)")
_PASSED_ON = ("copy", "bitcast", "convert", "reshape", "copy-done")  # what may stand between a constant and its use


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its result type as text, operation, names of its operands, what stands in the brackets, attributes."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    def called(self, key: str) -> str | None:
        """The computation that an attribute names: called("body") of `body=%region_1`; None where there is none."""
        found = re.search(rf"\b{key}=%?([\w.$-]+)", self.attributes)
        return found.group(1) if found else None


Computation = dict[str, Instruction]


def size(type_text: str, on_chip: bool = True) -> int:
    """Bytes of a type as HLO writes it, tuples summed: "f32[8,64]{1,0}" -> 2048. on_chip: count arrays that the
    compiler put into the chip's own memory (S(1) in their layout) too."""
    return math.ceil(
        sum(width(kind) * math.prod(dims) for kind, dims, inside in arrays(type_text) if on_chip or not inside)
    )


def arrays(type_text: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(element type, dimensions, whether it lies in the chip's own memory) of every array in a type."""
    for kind, dims, layout in _ARRAY.findall(type_text):
        yield kind, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), "S(" in layout


def width(kind: str) -> float:
    """Bytes of an element."""
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.match(r"[a-z]+([0-9]+)", kind)
    return int(bits.group(1)) / 8 if bits else 0.0


def parse(text: str) -> tuple[dict[str, Computation], str | None]:
    """The computations of a program by name, and the name of the one that is its entry."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line.endswith("{") and (line.startswith(("%", "ENTRY"))):
            found = _NAME.search(line)
            assert found is not None
            current = computations.setdefault(found.group(1), {})
            entry = found.group(1) if line.startswith("ENTRY") else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def root_of(computation: Computation) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(i for i in computation.values() if i.root)


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closed(right, 0) if right.startswith("(") else right.index(" ")
    rest = right[end:].lstrip()
    opening = rest.index("(")
    closing = _closed(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    name = left.removeprefix("ROOT ").lstrip("%")
    operands = tuple(_NAME.findall(inside))
    return Instruction(name, right[:end], rest[:opening], operands, inside, rest[closing:], left.startswith("ROOT "))


def _closed(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"hlo: unclosed bracket in {text[:200]!r}")


def trip_count(loop: Instruction, outside: Computation, computations: dict[str, Computation]) -> int | None:
    """Trips of a while loop: as the compiler noted them, or counted from `i < limit` with i from a constant by a
    constant step; None where the number depends on data."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if noted:
        return int(noted.group(1))
    condition, body = (computations[loop.called(key) or ""] for key in ("condition", "body"))
    test = root_of(condition)
    if test.op != "compare" or "direction=LT" not in test.attributes:
        return None
    counter = _element(condition, test.operands[0])
    first = root_of(body)
    initial = outside[loop.operands[0]]
    if counter is None or first.op != "tuple" or initial.op != "tuple":
        return None
    limit = _constant(condition, test.operands[1])
    if limit is None and (place := _element(condition, test.operands[1])) is not None:
        limit = _constant(outside, initial.operands[place])  # a bound carried unchanged through the loop
    start = _constant(outside, initial.operands[counter])
    step = _step(body, first.operands[counter], counter, computations)
    if limit is None or start is None or step is None or step < 1:
        return None
    return max(0, -(-(limit - start) // step))


def _step(body: Computation, name: str, counter: int, computations: dict[str, Computation]) -> int | None:
    """What the body adds to its counter, None where it does something else to it."""
    update = _origin(body, name)
    if update.op == "fusion":
        inner = computations[update.called("calls") or ""]
        root = root_of(inner)
        added = [_constant(inner, operand) for operand in root.operands] if root.op == "add" else []
        added += [_constant(body, operand) for operand in update.operands] if root.op == "add" else []
        from_counter = any(_element(body, operand) == counter for operand in update.operands)
    else:
        added = [_constant(body, operand) for operand in update.operands] if update.op == "add" else []
        from_counter = any(_element(body, operand) == counter for operand in update.operands)
    known = [value for value in added if value is not None]
    return known[0] if from_counter and len(known) == 1 else None


def _origin(body: Computation, name: str) -> Instruction:
    found = body[name]
    while found.op in _PASSED_ON:
        found = body[found.operands[0]]
    return found


def _constant(body: Computation, name: str) -> int | None:
    found = _origin(body, name)
    return int(found.inside) if found.op == "constant" and re.fullmatch(r"-?\d+", found.inside) else None


def _element(body: Computation, name: str) -> int | None:
    """Which element of the loop's tuple an instruction is; None where it is something else."""
    found = _origin(body, name)
    place = re.search(r"\bindex=(\d+)", found.attributes)
    return int(place.group(1)) if found.op == "get-tuple-element" and place else None


def replica_groups(attributes: str, devices: int) -> np.ndarray | None:
    """Groups [G, g] of a collective in any of the three forms the compiler writes; None for "all devices"."""
    if pairs := re.search(r"source_target_pairs=\{(\{[^=]*\})\}", attributes):
        return np.array([[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed.group(1))])
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        shape, source = iota.group(1).split("<=")
        return _iota(source).reshape(numbers(shape))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", attributes):
        return _named_groups(*named.groups())
    return None


def _named_groups(mesh: str, order: str | None, over: str) -> np.ndarray:
    """Groups over named axes of a mesh, e.g. ('axis_0'=4,'axis_1'=2), [2,4]T(1,0), 'axis_0'."""
    axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    places = (_iota(order) if order else np.arange(math.prod(axes.values()))).reshape(tuple(axes.values()))
    taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)
    shape: list[int] = []
    inside: list[int] = []
    for name, n in axes.items():
        parts = sorted((int(before or 1), int(length or n)) for other, before, length in taken if other == name)
        done = 1
        for before, length in parts:  # a part of an axis, 'axis':(before)length, splits it in three
            shape += [before // done, length]
            inside.append(len(shape) - 1)
            done = before * length
        shape.append(n // done)
    outer = [i for i in range(len(shape)) if i not in inside]
    return places.reshape(shape).transpose(*outer, *inside).reshape(-1, math.prod(shape[i] for i in inside))


def _iota(text: str) -> np.ndarray:
    """Devices in the order "[2,4]T(1,0)": counted, shaped, transposed."""
    shape, _, order = text.partition("T")
    counted = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
    return counted.transpose(numbers(order)) if order else counted


def numbers(text: str) -> tuple[int, ...]:
    """Every number in a text."""
    return tuple(int(n) for n in re.findall(r"\d+", text))
