"""Attention kernels on a GPU: forward + backward at L = 1,024, 4,096, 8,192, and the MFU of an HSTU at 4,096.

    python -m benchmarks.attention_gpu [--sweep]

Heads of 128, bfloat16, causal, 16,384 tokens a call. First the kernels are held against einsum on the chip itself; a
difference ends the run. Then pointwise SiLU (without and with position and time bias) and softmax: the Pallas kernel,
the blocks and the einsum of this project, and for softmax cuDNN (jax.nn.dot_product_attention) and, where torch can be
imported, PyTorch's scaled_dot_product_attention. TFLOP/s count the causal half: 14 FLOPs a pair and unit of width, 4
forward and 10 backward. MFU: a training step (bfloat16, AdamW on the dense weights, embeddings given) of 8
layers, 1,024 wide, 8 heads, over the peak in launch/chips.py; "ragged" packs users of random lengths and counts only
their own pairs. To beat (published for an H100): 34.5 % at fixed, 31.4 % at ragged lengths. --sweep tries block sizes.
Without a GPU it says so and measures nothing. Writes benchmarks/results/attention_gpu.json.
"""

import argparse
import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.training import save
from launch.chips import CHIPS
from recscale.kernels.attention import IMPLEMENTATIONS, Bias, attention
from recscale.models import hstu

LENGTHS, TOKENS, HEADS, WIDTH = (1024, 4096, 8192), 16384, 8, 128
BLOCKS = ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128))
REPEATS, CALLS = 5, 10


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Median over repeats of the mean time of a call, after a warm-up."""
    wait(call())
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = call()
        wait(result)
        taken.append((time.perf_counter() - start) / CALLS)
    return statistics.median(taken)


def arrays(rows: int, length: int, dtype=jnp.bfloat16, width: int = WIDTH) -> list[Any]:
    """q, k, v, position and time bias, weight of the outputs, segment ids, times."""
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.normal(size=(rows, length, HEADS, width)) * 0.5, dtype) for _ in range(4)]
    tables = [jnp.asarray(rng.normal(size=size) * 0.1, jnp.float32) for size in (2 * length - 1, 129)]
    times = jnp.asarray(np.cumsum(rng.integers(0, 5000, (rows, length)), axis=1), jnp.int32)
    return [*heads[:3], *tables, heads[3], jnp.ones((rows, length), jnp.int32), times]


def gradient_step(given: list[Any], compute: Callable, biased: bool) -> Callable[[], Any]:
    """A call of the gradients with respect to q, k, v and, where biased, both tables."""

    def total(differentiated, fixed):
        weight, ids, times = fixed
        q, k, v, *tables = differentiated
        bias = Bias(*tables, times, times) if tables else Bias()
        return (compute(q, k, v, ids, bias) * weight).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(total))
    return lambda: step(given[: 5 if biased else 3], given[5:])


def ours(name: str, kind: str, n: int, **options) -> Callable:
    """Attention of this project by an implementation."""
    function = IMPLEMENTATIONS[name] if options else functools.partial(attention, implementation=name)
    return functools.partial(function, kind=kind, n=n, scale=WIDTH**-0.5, **options)


def cudnn(q, k, v, ids, bias, implementation: str = "cudnn"):
    """Causal softmax by cuDNN."""
    del ids, bias
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def torch_step(given: list[Any], device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """PyTorch's causal scaled_dot_product_attention, forward and backward, and how to wait for it."""
    torch = importlib.import_module("torch")
    made = [torch.tensor(np.asarray(x, np.float32)).to(device, torch.bfloat16) for x in (*given[:3], given[5])]
    q, k, v, weight = (x.transpose(1, 2).contiguous() for x in made)
    for x in (q, k, v):
        x.requires_grad_()

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out, (q, k, v), weight)

    return call, lambda _: torch.cuda.synchronize() if device == "cuda" else None


def check() -> float:
    """Largest relative difference of the kernel from einsum on this chip, over kinds and all masks; float32, exact."""
    worst, (rows, length) = 0.0, (2, 300)
    given = arrays(rows, length, jnp.float32, 64)
    slots = np.tile(np.arange(length), (rows, 1))
    given[6] = jnp.asarray(np.where(slots < 290, slots // 70 + 1, 0), jnp.int32)
    targets = jnp.asarray(slots % 7 == 3)
    masks = {"window": 20, "prefix": 5, "targets_BL": targets}
    for kind in ("silu", "softmax"):
        for options in ({}, masks):
            with jax.default_matmul_precision("highest"):
                got, want = (
                    gradient_step(given, functools.partial(ours(name, kind, length), **options), biased=True)()
                    for name in ("pallas", "einsum")
                )
            for x, y in zip(got, want, strict=True):
                worst = max(worst, float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-9)))
    return worst


def cases(length: int, smoke: bool) -> list[tuple[str, str, bool, Callable | None]]:
    """(case, variant, biased, attention); None: PyTorch."""
    made: list[tuple[str, str, bool, Callable | None]] = []
    for case, kind, biased in (("silu", "silu", False), ("silu, biases", "silu", True), ("softmax", "softmax", False)):
        made += [(case, name, biased, ours(name, kind, length)) for name in ("pallas", "blocks", "einsum")]
    made.append(("softmax", "cuDNN", False, functools.partial(cudnn, implementation="xla" if smoke else "cudnn")))
    if importlib.util.find_spec("torch") is not None:
        made.append(("softmax", "PyTorch", False, None))
    return made


def measure(lengths: tuple[int, ...], tokens: int, smoke: bool) -> list[dict]:
    """A row per case, variant and length: ms, TFLOP/s, and the time over that of our kernel."""
    rows: list[dict] = []
    for length in lengths:
        batch = max(1, tokens // length)
        given, flops = arrays(batch, length), 14 * WIDTH * HEADS * batch * length * (length + 1) / 2
        best: dict[str, float] = {}
        for case, variant, biased, compute in cases(length, smoke):
            row = {"case": case, "variant": variant, "length": length, "rows": batch}
            try:
                if compute is None:
                    taken = seconds(*torch_step(given, "cpu" if smoke else "cuda"))
                else:
                    taken = seconds(gradient_step(given, compute, biased), jax.block_until_ready)
            except Exception as error:  # out of memory, or a library that is not there: the others go on
                row["error"] = str(error).splitlines()[0][:200]
                print(f"{case:<13} {variant:<8} L {length:>5}: {row['error']}", flush=True)
            else:
                best.setdefault(case, taken)  # the first variant is our kernel
                row |= {"ms": taken * 1e3, "tflops": flops / taken / 1e12, "over_pallas": taken / best[case]}
                text = f"{row['ms']:>9.2f} ms {row['tflops']:>7.1f} TFLOP/s {row['over_pallas']:>6.2f} x pallas"
                print(f"{case:<13} {variant:<8} L {length:>5}: {text}", flush=True)
            rows.append(row)
    return rows


def sweep(length: int, tokens: int, blocks: tuple[tuple[int, int], ...]) -> list[dict]:
    """Times of our kernel by block sizes, which hold for all of its passes."""
    given, rows = arrays(max(1, tokens // length), length), []
    for kind in ("silu", "softmax"):
        for block_q, block_kv in blocks:
            compute = ours("pallas", kind, length, block_q=block_q, block_kv=block_kv)
            row = {"kind": kind, "block_q": block_q, "block_kv": block_kv}
            try:
                row["ms"] = seconds(gradient_step(given, compute, biased=True), jax.block_until_ready) * 1e3
            except Exception as error:  # blocks that do not fit the shared memory
                row["error"] = str(error).splitlines()[0][:200]
            print(row, flush=True)
            rows.append(row)
    return rows


def peak() -> float | None:
    """Peak of this chip in bfloat16, FLOP/s; None for one that the table does not have."""
    kind = jax.devices()[0].device_kind.lower()
    return next((chip.flops["bfloat16"] for name, chip in CHIPS.items() if name in kind), None)


def users(rows: int, length: int, ragged: bool) -> np.ndarray:
    """Segment ids: one user a row, or users of random lengths up to the row side by side."""
    if not ragged:
        return np.ones((rows, length), np.int32)
    rng, ids = np.random.default_rng(1), np.zeros((rows, length), np.int32)
    for row in ids:
        row[:] = np.repeat(np.arange(length), rng.integers(1, length + 1, length))[:length] + 1
    return ids


def mfu(length: int, tokens: int, depth: int, width: int, ragged: bool) -> dict[str, Any]:
    """A training step of an HSTU, timed; mfu None on a chip of unknown peak."""
    heads = max(1, width // WIDTH)
    c = hstu.Config(
        embed_dim=width, width=width, depth=depth, heads=heads, qk_dim=width // heads, v_dim=width // heads,
        max_length=length, output_length=1, dropout=0.0, time_bias=True, query_time="next_event", dtype="bfloat16",
        attention="pallas",
    )  # fmt: skip
    graph, state = nnx.split(hstu.Model(c, jax.random.key(0)))
    ids = users(max(1, tokens // length), length, ragged)
    place = np.concatenate([np.arange(n) for row in ids for n in np.unique(row, return_counts=True)[1]])
    times = jnp.asarray(np.cumsum(np.full(ids.shape, 3600), axis=1), jnp.int32)
    batch = {"segment_ids": jnp.asarray(ids), "positions": jnp.asarray(place.reshape(ids.shape), jnp.int32)}
    batch |= {"timestamp": times, "query_timestamp": times + 3600}
    x = jax.random.normal(jax.random.key(1), (*ids.shape, width)) * 0.02
    rule = optax.adamw(1e-4)

    def loss(state, x, batch):
        return jnp.square(nnx.merge(graph, state)(x, batch, wrap=lambda body: body)).mean()

    @jax.jit
    def step(state, slots, x, batch):
        updates, slots = rule.update(jax.grad(loss)(state, x, batch), slots, state)
        return optax.apply_updates(state, updates), slots

    taken = seconds(functools.partial(step, state, rule.init(state), x, batch), jax.block_until_ready)
    lengths = [int(n) for row in ids for n in np.unique(row, return_counts=True)[1]]
    work = 3 * sum(sum(hstu.flops(c, n).values()) for n in lengths)  # backward = twice forward
    top = peak()
    result = {"ragged": ragged, "length": length, "rows": len(ids), "users": len(lengths), "ms": taken * 1e3}
    result |= {"tflops": work / taken / 1e12, "mfu": work / taken / top if top else None}
    share = f"MFU {100 * result['mfu']:.1f} %" if top else "MFU unknown: the chip is not in launch/chips.py"
    print(f"HSTU {depth} x {width}, L {length}, {'ragged' if ragged else 'fixed'}: {taken * 1e3:.1f} ms, {share}")
    return result


def main() -> None:
    """Check, measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="block sizes of our kernel at L = 4,096 too")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)  # tiny, anywhere, writes nothing
    args = parser.parse_args()
    if jax.default_backend() != "gpu" and not args.smoke:
        print("no GPU here: nothing measured, benchmarks/results/attention_gpu.json not written")
        return
    worst = check()
    print(f"kernel against einsum on this chip, float32: largest relative difference {worst:.1e}", flush=True)
    if worst > 1e-3:
        raise SystemExit("the kernel differs from einsum by more than 1e-3: nothing measured")
    lengths, tokens, length, depth, width = (LENGTHS, TOKENS, 4096, 8, 1024)
    if args.smoke:
        lengths, tokens, length, depth, width = (64,), 64, 64, 2, 32
    result: dict[str, Any] = {"difference": worst, "attention": measure(lengths, tokens, args.smoke)}
    if args.sweep:
        result["sweep"] = sweep(length, tokens, BLOCKS[:1] if args.smoke else BLOCKS)
    result["mfu"] = [mfu(length, 2 * tokens, depth, width, ragged) for ragged in (False, True)]
    if not args.smoke:
        save("attention_gpu", result)


if __name__ == "__main__":
    main()
