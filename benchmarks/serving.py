"""Candidates per second against a cached history, and when the history is computed again.

    python -m benchmarks.serving [--histories=1024,8192] [--candidates=1024] [--micro=128]

Two layers, D 64, one user, float32. "cached": the history is kept (serve/cache.py), a request costs its candidates, in
micro-batches. "one row": history and all candidates in one row under the targets mask, nothing kept (only the STU takes
that mask). "each alone": every candidate appended to the history and computed with it, measured on a few. Then what
a new event costs, appended against encoded again. Times are the fastest of some calls. Writes
benchmarks/results/serving.json.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training import save
from recscale.models import argus, hstu, stu
from recscale.serve import cache

DIM, FEW = 64, 2


def models(length: int) -> dict[str, tuple[Any, Any]]:
    """Name -> (module, config), with room for a history of `length` and a candidate."""
    shape = {"embed_dim": DIM, "width": DIM, "depth": 2, "heads": 2, "dropout": 0.0, "dtype": "float32"}
    shape |= {"max_length": length + 1, "time_bias": True}
    gated = shape | {"qk_dim": DIM // 2, "v_dim": DIM // 2}
    plain = {"window": 0, "prefix": 0, "truncate_after": 0, "truncate_to": 0, "truncate_row": 0}
    return {
        "hstu": (hstu, hstu.Config(**gated, output_length=10, query_time="next_event")),
        "stu": (stu, stu.Config(**gated, **plain, anchor="event")),
        "argus": (argus, argus.Config(**shape, query_time="next_event")),
    }


def rows(length: int, candidates: int, count: int, rng: np.random.Generator) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`count` rows of one history and, after it, `candidates` candidates."""
    size = length + candidates
    times = np.minimum(np.arange(size), length) * 3600
    batch = {
        "segment_ids": np.ones(size), "positions": np.minimum(np.arange(size), length), "timestamp": times,
        "query_timestamp": np.minimum(times + 3600, length * 3600), "targets": np.arange(size) >= length,
    }  # fmt: skip
    same = {name: jnp.asarray(np.tile(values, (count, 1)).astype(np.int32)) for name, values in batch.items()}
    return jnp.asarray(rng.normal(size=(count, size, DIM)), jnp.float32), same


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The fastest of `repeats` calls after one that compiles: what others do on the machine only adds."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def appended(model: Any, kept: cache.Cache, x: jax.Array, batch: dict[str, jax.Array], repeats: int) -> float:
    """Seconds to append one event; the cache is handed from call to call."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        kept, _ = cache.append(model, kept, x, batch)
        jax.block_until_ready(kept)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def measure(name: str, length: int, candidates: int, micro: int, repeats: int) -> dict[str, Any]:
    """Candidates per second each way, and milliseconds of a new event."""
    module, config = models(length)[name]
    model, rng = module.Model(config, jax.random.key(0)), np.random.default_rng(0)
    forward = jax.jit(lambda model, x, batch: model(x, batch))
    x, batch = rows(length, candidates, 1, rng)
    history, asked = ({k: v[:, part] for k, v in batch.items()} for part in (slice(length), slice(length, None)))
    history.pop("targets")
    asked.pop("targets")
    past, new = x[:, :length], x[:, length:]
    capacity = length + 64
    kept, _ = cache.encode(model, past, history, capacity=capacity)
    cached = candidates / seconds(lambda: cache.score(model, kept, new, asked, micro=micro), repeats)
    found = {"cached": cached, "encode_ms": 1e3 * seconds(lambda: forward(model, past, history), repeats)}
    if name == "stu":
        found["one_row"] = candidates / seconds(lambda: forward(model, x, batch), repeats)
    alone_x, alone = rows(length, 1, FEW, rng)
    alone.pop("targets")
    found["each_alone"] = FEW / seconds(lambda: forward(model, alone_x, alone), 1)
    event = {k: v[:, :1] for k, v in asked.items()}
    found["append_ms"] = 1e3 * appended(model, kept, new[:, :1], event, 8)
    found["ratio_each_alone"] = cached / found["each_alone"]
    found["ratio_append"] = found["encode_ms"] / found["append_ms"]
    return found | ({"ratio_one_row": cached / found["one_row"]} if "one_row" in found else {})


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", default="1024,8192")
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--micro", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for length in map(int, arguments.histories.split(",")):
        for name in models(length):
            row = measure(name, length, arguments.candidates, arguments.micro, arguments.repeats)
            found[f"{name} {length}"] = row
            one_row = f", {row['ratio_one_row']:.1f}x one row" if "one_row" in row else ""
            print(
                f"{name:6s} history {length:5d}: cached {row['cached']:9,.0f} candidates/s = "
                f"{row['ratio_each_alone']:7,.0f}x each alone{one_row}; a new event {row['append_ms']:.2f} ms = "
                f"{row['ratio_append']:.0f}x less than encoding again ({row['encode_ms']:.0f} ms)",
                flush=True,
            )
    save("serving", {"candidates": arguments.candidates, "micro": arguments.micro, "dim": DIM, "rows": found})


if __name__ == "__main__":
    main()
