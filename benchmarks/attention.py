"""Attention: time and memory of blocks against the einsum, what it costs on a TPU, packed rows, a long training run.

    python -m benchmarks.attention [--parts cpu packed tpu train8192] [--repeats=5] [--seconds=0.5]

cpu: forward and backward pass of one attention (2 heads of 32, one user a row, float32), HSTU's with both biases and
softmax without, at L 256, 1024, 4096 with 4096 positions a step; medians of turns by the wall (and the ratio of
processor seconds), and the temporaries that the compiler reserves (memory_analysis); a window of 256 at 4096. Then
blocks alone at L 1024 and 8192, one row: how memory grows.

packed: whole train steps of a 2-layer HSTU (D 64, benchmarks/training.py) on planted histories whose mean is a fifth of
the longest, packed rows against padded ones; real events per second.

tpu: the same attention (8 heads of 128, bfloat16, one row; softmax at 8192 alone) compiled for one chip of a v5p by
libtpu, which needs no TPU: matrix FLOPs (those inside a Pallas kernel are not seen), bytes between the chip and its
memory, temporaries (launch/hlo.py), and the largest array of the program by pairs of positions: 1 is a whole [L, L].
No time: nothing is run.

train8192: a few train steps of a 2-layer HSTU, D 128, on rows of 8,192 events, in a process of its own; its peak size.

Each part writes benchmarks/results/attention_PART.json. About 5 minutes on two idle cores.
"""

import argparse
import functools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

from benchmarks.evaluation import resident_mb
from benchmarks.training import Ours, compare, save, workload
from launch import compiling, hlo
from launch.hlo_text import arrays, parse
from recscale.data import planted
from recscale.data.event_log_writer import write
from recscale.kernels.attention import IMPLEMENTATIONS, Bias, attention
from recscale.mesh import place_batch
from recscale.run import build, init_state
from recscale.step import make_train_step

MIB = 2**20
TOKENS, HEADS, WIDTH = 4096, 2, 32
TPU_LENGTHS, TPU_HEADS, TPU_WIDTH = (1024, 4096, 8192), 8, 128
PACKED_LENGTH, PACKED_ROWS = 512, 8


def step(kind: str, length: int, implementation: str, biased: bool, **options: Any) -> Callable:
    """value_and_grad of a sum of squares of the outputs, of (q, k, v, position, time, segment_ids, seconds)."""

    def total(q, k, v, position, time, segment_ids, seconds):
        bias = Bias(position, time, seconds, seconds) if biased else Bias()
        how = {"kind": kind, "n": length, "scale": q.shape[-1] ** -0.5, "implementation": implementation}
        out = attention(q, k, v, segment_ids, bias, **how, **options).astype(jnp.float32)
        return (out * out).sum()

    return jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4) if biased else (0, 1, 2))


def shapes(rows: int, length: int, heads: int, width: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Of the arguments of `step`."""
    qkv = [jax.ShapeDtypeStruct((rows, length, heads, width), dtype)] * 3
    tables = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (2 * length - 1, 129)]
    return [*qkv, *tables, *[jax.ShapeDtypeStruct((rows, length), jnp.int32)] * 2]


def numbers(wanted: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """Arguments of those shapes: one user a row, ascending times."""
    rng = np.random.default_rng(0)
    values = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in wanted[:5]]
    seconds = np.cumsum(rng.integers(0, 5000, wanted[6].shape), axis=1)
    return [*values, jnp.ones(wanted[5].shape, jnp.int32), jnp.asarray(seconds, jnp.int32)]


def turns(functions: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Median seconds of a call by the wall and of the processor; they take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            calls, begin, cpu = 0, time.perf_counter(), time.process_time()
            while calls == 0 or time.perf_counter() - begin < seconds:
                jax.block_until_ready(function())
                calls += 1
            if turn:  # the first warms up
                spent = (time.perf_counter() - begin) / calls, (time.process_time() - cpu) / calls
                found[name].append(spent)
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in found.items()}


def temporaries(compiled: Any) -> int:
    """Bytes that the compiler reserves beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def part_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """Blocks against the einsum on this machine."""
    print(f"{'':>8} {'L':>5} {'einsum ms':>10} {'blocks ms':>10} {'faster':>7} {'CPU s':>7} {'einsum, blocks MiB':>19}")
    rows = [_against_einsum(kind, length, args) for kind in ("silu", "softmax") for length in (256, 1024, 4096)]
    growth = {}
    for kind in ("silu", "softmax"):
        wanted = {length: shapes(1, length, HEADS, WIDTH, jnp.float32) for length in (1024, 8192)}
        found = {length: temporaries(_compiled(kind, length, "blocks", x)) for length, x in wanted.items()}
        growth[kind] = {"bytes": found, "ratio": found[8192] / found[1024]}
        print(f"{kind}, one row: {found[1024] / MIB:.2f} MiB at 1,024, {found[8192] / MIB:.2f} at 8,192:", end=" ")
        print(f"{growth[kind]['ratio']:.2f} times (goal 9)", flush=True)
    return {"tokens": TOKENS, "heads": HEADS, "width": WIDTH, "rows": rows, "growth": growth}


def _compiled(kind: str, length: int, name: str, wanted: list[jax.ShapeDtypeStruct], **options: Any) -> Any:
    return jax.jit(step(kind, length, name, kind == "silu", **options)).lower(*wanted).compile()


def _against_einsum(kind: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One length on this machine."""
    wanted = shapes(TOKENS // length, length, HEADS, WIDTH, jnp.float32)
    programs = {name: _compiled(kind, length, name, wanted) for name in ("einsum", "blocks")}
    if length == 4096:
        programs["window 256"] = _compiled(kind, length, "blocks", wanted, window=256)
    inputs = numbers(wanted)
    taken = turns({k: functools.partial(p, *inputs) for k, p in programs.items()}, args.repeats, args.seconds)
    memory = {name: temporaries(program) / MIB for name, program in programs.items()}
    (einsum, einsum_cpu), (blocks, blocks_cpu) = taken["einsum"], taken["blocks"]
    print(
        f"{kind:>8} {length:>5} {1e3 * einsum:>10.1f} {1e3 * blocks:>10.1f} {einsum / blocks:>6.2f}x "
        f"{einsum_cpu / blocks_cpu:>6.2f}x {memory['einsum']:>9.1f} {memory['blocks']:>9.1f}",
        flush=True,
    )
    if "window 256" in taken:
        print(f"{'':>14} window of 256: {1e3 * taken['window 256'][0]:.1f} ms", flush=True)
    return {
        "kind": kind, "length": length, "temporaries_mb": memory,
        "seconds": {name: wall for name, (wall, _) in taken.items()},
        "cpu_seconds": {name: cpu for name, (_, cpu) in taken.items()},
    }  # fmt: skip


def part_packed(args: argparse.Namespace) -> dict[str, Any]:
    """Packed rows against padded ones: train steps of a 2-layer HSTU."""
    histories = planted.Planted(users=4_000, length_median=66.0, length_sigma=1.0, length_max=PACKED_LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        log = planted.generate(histories)
        write(log, Path(folder) / "log")
        mean = float(np.diff(log.offsets).mean())
        sides = {}
        for layout in ("packed", "padded"):
            size = {"length": PACKED_LENGTH, "batch_size": PACKED_ROWS}
            config = workload("hstu", Path(folder) / "log", layout=layout, **size)
            config.model.depth = 2
            sides[layout] = Ours(config)
        found = compare({name: side.turn for name, side in sides.items()}, 4 * args.seconds, args.repeats)
        fill = {name: side.run.loader.fill for name, side in sides.items()}
    rates = {name: row["events_per_second"] for name, row in found.items()}
    ratio = rates["packed"] / rates["padded"]
    print(f"mean length {mean:.0f} of {PACKED_LENGTH}; fill {fill['packed']:.3f} packed, {fill['padded']:.3f} padded")
    print(f"packed {rates['packed']:,.0f} events/s, padded {rates['padded']:,.0f}: {ratio:.2f} times (goal 2.5)")
    return {"mean_length": mean, "length": PACKED_LENGTH, "fill": fill, "variants": found, "ratio": ratio}


def largest_by_pairs(text: str, length: int) -> float:
    """Elements of the largest array in memory with two axes over half the length, in units of [L, L]; else 0."""
    computations, _ = parse(text)
    inside = {
        instruction.called(key)
        for body in computations.values()
        for instruction in body.values()
        for key in ("calls", "to_apply")
        if instruction.op != "call"  # what a fusion computes stays in registers
    }
    sizes = [
        math.prod(dims) / length**2
        for name, body in computations.items()
        for instruction in body.values()
        for _, dims, _ in arrays(instruction.type)
        if name not in inside and sum(size > length // 2 for size in dims) >= 2
    ]
    return max(sizes, default=0.0)


def part_tpu(args: argparse.Namespace) -> dict[str, Any]:
    """What the compiled program of one v5p chip multiplies, moves and reserves."""
    del args
    if (package := compiling.missing("tpu")) is not None:
        raise SystemExit(f"error: compiling for TPUs needs {package} (pip install libtpu); leave tpu out of --parts")
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    rows = []
    print(f"{'':>8} {'L':>5} {'':>8} {'GFLOP':>8} {'HBM MiB':>9} {'temporaries MiB':>16} {'largest/L^2':>12} {'s':>5}")
    for kind, length, name in _tpu_cases():
        row = {"kind": kind, "length": length, "implementation": name} | _on_tpu(kind, length, name, chip)
        rows.append(row)
        print(
            f"{kind:>8} {length:>5} {name:>8} {row['gflops']:>8.1f} {row['traffic_mb']:>9.1f} "
            f"{row['temporaries_mb']:>16.1f} {row['largest_by_pairs']:>12.2f} {row['compile_seconds']:>5.1f}",
            flush=True,
        )
    return {"chip": chip.device_kind, "heads": TPU_HEADS, "width": TPU_WIDTH, "rows": rows}


def _on_tpu(kind: str, length: int, name: str, chip: Any) -> dict[str, float]:
    """One compiled program."""
    wanted = shapes(1, length, TPU_HEADS, TPU_WIDTH, jnp.bfloat16)
    here = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(chip)) for x in wanted]
    target = AbstractDevice(device_kind=chip.device_kind, num_cores=chip.num_cores, platform="tpu")
    begin = time.perf_counter()
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=target)):  # for Pallas
        compiled = _compiled(kind, length, name, here)
    text = compiled.as_text()
    program = hlo.read(text)
    return {
        "gflops": program.matmul_flops / 1e9,
        "traffic_mb": program.traffic / MIB,
        "temporaries_mb": temporaries(compiled) / MIB,
        "largest_by_pairs": largest_by_pairs(text, length),
        "compile_seconds": time.perf_counter() - begin,
    }


def _tpu_cases() -> Iterator[tuple[str, int, str]]:
    for kind, lengths in (("silu", TPU_LENGTHS), ("softmax", TPU_LENGTHS[-1:])):
        for length in lengths:
            for name in IMPLEMENTATIONS:
                yield kind, length, name


def _train(length: int, dim: int, depth: int, steps: int, path: str) -> dict[str, Any]:
    """Train steps in this process."""
    config = workload("hstu", path, length=length, batch_size=1, layout="packed")
    config.split.validation_users = 8
    config.model.update({"embed_dim": dim, "width": dim, "depth": depth, "qk_dim": dim // 2, "v_dim": dim // 2})
    run = build(config)
    state = init_state(run)
    train_step = make_train_step(run)
    losses, begin = [], 0.0
    for index in range(steps):
        state, metrics = train_step(state, place_batch(run.mesh, run.loader[index]))
        losses.append(float(metrics["loss"]))
        begin = begin or time.perf_counter()  # the first step compiles
    seconds = (time.perf_counter() - begin) / (steps - 1)
    return {"losses": losses, "seconds_per_step": seconds, "peak_gib": resident_mb("VmHWM") / 1024}


def part_train8192(args: argparse.Namespace) -> dict[str, Any]:
    """Steps at L 8,192 and the peak of the process."""
    del args
    histories = planted.Planted(users=60, length_median=6_000.0, length_sigma=0.8, length_max=20_000)
    with tempfile.TemporaryDirectory() as folder:
        write(planted.generate(histories), Path(folder) / "log")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(_train, (8192, 128, 2, 4, str(Path(folder) / "log")))
    print(f"HSTU, 2 layers, D 128, one row of 8,192 events: {found['seconds_per_step']:.1f} s a step,", end=" ")
    print(f"peak of the process {found['peak_gib']:.2f} GiB (goal 12); losses {np.round(found['losses'], 3).tolist()}")
    return found


PARTS = {"cpu": part_cpu, "packed": part_packed, "tpu": part_tpu, "train8192": part_train8192}


def main() -> None:
    """Run the parts, print their tables, write their JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    if "tpu" in args.parts:
        compiling.prepare()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"Load average {load:.1f}: other work is running, read no times.")
    for name in args.parts:
        print(f"-- {name}", flush=True)
        save(f"attention_{name}", PARTS[name](args))


if __name__ == "__main__":
    main()
