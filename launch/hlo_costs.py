"""What one instruction of a compiled program costs: FLOPs of matrix products, bytes read from and written to memory.

Bytes are counted at the borders of fusions, as the instructions are written; what the compiler keeps in the chip's own
memory is free. A slice or gather reads what it returns, an update in place touches what it writes.
"""

import math
import re

import numpy as np

from launch.hlo_text import Computation, Instruction, arrays, numbers, root_of, size


def _dot(call: Instruction, body: Computation) -> float:
    """2 x result x contracted size."""
    contracted = re.search(r'lhs_contracting_dim(?:s|ension_numbers|ensions"):?=?[{\[]([\d,"]*)[}\]]', call.attributes)
    _, left, _ = next(arrays(body[call.operands[0]].type))
    _, result, _ = next(arrays(call.type))
    over = numbers(contracted.group(1)) if contracted else ()
    return 2.0 * math.prod(result) * math.prod(left[i] for i in over)


def _gemm(call: Instruction, body: Computation) -> float:
    return _dot(call, body) if "gemm" in call.attributes or "matmul" in call.attributes else 0.0


def _convolution(call: Instruction, body: Computation) -> float:
    """2 x batch x output features x input features x (output place, window place) pairs that hit the input.

    A TPU writes its matrix products so; batch dimensions become windows that mostly miss.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", call.attributes)
    assert labels is not None
    left_labels, right_labels, out_labels = labels.groups()
    (_, left, _), (_, right, _) = (next(arrays(body[name].type)) for name in call.operands[:2])
    _, out, _ = next(arrays(call.type))
    window = re.search(r"window=\{([^}]*)\}", call.attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    spatial = [c for c in out_labels if c.isdigit()]
    pairs = 1.0
    for i, c in enumerate(spatial):
        pick = {key: value.split("x")[i] for key, value in fields.items()}
        pairs *= _hits(left[left_labels.index(c)], right[right_labels.index(c)], out[out_labels.index(c)], pick)
    outer = out[out_labels.index("b")] * out[out_labels.index("f")] * right[right_labels.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", call.attributes)
    return 2.0 * outer * pairs / (int(groups.group(1)) if groups else 1)


def _hits(left: int, right: int, out: int, window: dict[str, str]) -> int:
    """Pairs (output place, window place) of one dimension whose input place exists."""
    stride, spread, gap = (int(window[k]) if k in window else 1 for k in ("stride", "rhs_dilate", "lhs_dilate"))
    before = int(window["pad"].split("_")[0]) if "pad" in window else 0
    at = np.arange(out)[:, None] * stride + np.arange(right)[None, :] * spread - before
    return int(((at >= 0) & (at % gap == 0) & (at // gap < left)).sum())


FLOPS = {"dot": _dot, "convolution": _convolution, "custom-call": _gemm}

_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "call", "conditional", "after-all")
_FREE += ("partition-id", "replica-id", "async-start", "async-update", "async-done", "call-start", "call-done")
_FREE += ("opt-barrier", "domain")
_SAME = ("bitcast", "reshape", "copy", "convert", "transpose")  # inside a fusion these cost nothing
_SLICES = ("dynamic-slice", "gather", "slice")


def traffic(call: Instruction, body: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that an instruction outside of fusions reads from and writes to the chip's large memory."""
    if call.op in _FREE:
        return 0.0
    operands = [name for name in call.operands if name in body]
    if call.op == "fusion":
        inner = computations[call.called("calls") or ""]
        read = sum(
            min(_stored(body[name]), _read_by_fusion(inner, parameter, computations))
            for name, parameter in zip(operands, _parameters(inner), strict=False)
        )
        return read + _fusion_writes(call, inner)
    if call.op in _SLICES:
        return float(size(call.type) * (_stored(body[operands[0]]) > 0) + _stored(call))
    if call.op in ("dynamic-update-slice", "scatter"):
        return 2.0 * _updated(call, body) * (_stored(call) > 0)
    written = 0 if call.op.endswith("-start") else _stored(call)
    read = 0 if call.op.endswith("-done") else sum(_stored(body[name]) for name in operands)
    return float(written + read)


def _stored(instruction: Instruction) -> int:
    return size(instruction.type, on_chip=False)


def _updated(call: Instruction, body: Computation) -> int:
    """Bytes of what an update in place writes: operand 1 of a dynamic-update-slice, the last third of a scatter's."""
    if call.op == "dynamic-update-slice":
        return size(body[call.operands[1]].type)
    values = len(call.operands) // 2
    return sum(size(body[name].type) for name in call.operands[-values:])


def _parameters(computation: Computation) -> list[str]:
    found = [i for i in computation.values() if i.op == "parameter"]
    return [i.name for i in sorted(found, key=lambda i: int(i.inside))]


def _read_by_fusion(inner: Computation, parameter: str, computations: dict[str, Computation]) -> float:
    total, passed = _read(inner, parameter, computations)
    return math.inf if passed else total


def _read(computation: Computation, name: str, computations: dict[str, Computation]) -> tuple[float, bool]:
    """(bytes that a fusion reads of one of its values, whether the value itself is passed on as the result)."""
    total, passed = 0.0, computation[name].root
    for user in (i for i in computation.values() if name in i.operands):
        if user.op in _SLICES and user.operands[0] == name:
            total += size(user.type)
        elif user.op in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            total += 0 if user.op == "dynamic-update-slice" else _updated(user, computation)
        elif user.op in _SAME:
            more, through = _read(computation, user.name, computations)
            total, passed = total + more, passed or through
        elif user.op == "fusion":
            inner = computations[user.called("calls") or ""]
            more, through = _read(inner, _parameters(inner)[user.operands.index(name)], computations)
            total += more
            if through:
                more, through = _read(computation, user.name, computations)
                total, passed = total + more, passed or through
        else:
            return math.inf, False
    return total, passed


def _fusion_writes(call: Instruction, inner: Computation) -> float:
    root = root_of(inner)
    results = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    written = 0.0
    for result, (kind, dims, on_chip) in zip(results, arrays(call.type), strict=False):
        while result.op in _SAME:
            result = inner[result.operands[0]]
        whole = size(f"{kind}[{','.join(map(str, dims))}]")
        in_place = result.op in ("dynamic-update-slice", "scatter")
        written += 0 if on_chip else min(whole, _updated(result, inner)) if in_place else whole
    return written
