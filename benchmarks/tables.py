"""Time and memory of a table's training step at 1e5, 1e6 and 1e7 rows x 64 with 16,384 log-uniform lookups.

    python -m benchmarks.tables [--quick] [--torch-python=PYTHON] [--threads=2]

Ours (lookup, sum of squares, gradient, update of the touched rows; row-wise Adagrad, lazy Adam, SGD) against the same
on the whole table with optax.adam, and against nn.Embedding(sparse=True) + SparseAdam of PyTorch in an environment of
its own (`pip install torch==2.13.0 numpy`; its interpreter named by --torch-python or TORCH_PYTHON). The variants take
turns in one run; figures are medians over all steps. Memory of ours at 1e7 rows is the compiler's (arguments and
temporaries) and the peak of a process that does nothing else. About 5 minutes. Writes benchmarks/results/tables.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.training import save
from recscale import optim
from recscale.layers.kinds import Table
from recscale.layers.tables import Tables, Update
from recscale.mesh import make_mesh

ROWS, DIM, LOOKUPS = (10**5, 10**6, 10**7), 64, 16_384
PEER = Path(__file__).parent / "_tables_peer.py"
RULES = ("rowwise_adagrad", "lazy_adam", "sgd")
MEMORY_SLACK = 1.15
State = Any


def ours(rows: int, rule_name: str) -> tuple[Callable, State]:
    """The jitted step (state, ids) -> state of a table that updates the rows it touches, and its first state."""
    tables = Tables({"item": Table(rows, DIM)}, make_mesh(1, 1, 1))
    rule = optim.TABLE_RULES[rule_name]

    def step(state, ids):
        array, slots, count = state
        touched, found, _ = tables.touch({"item": array}, "item", {"ids": ids})

        def loss(found):
            return jnp.square(tables.vectors("item", found, {}, touched, {"ids": ids})["ids"]).sum()

        grads = jax.grad(loss)(found)
        how = Update(rule, jnp.float32(1e-3), 0.0)
        place, key = touched.position[""], jax.random.key(0)
        array, slots, _ = tables.update("item", array, slots, place, grads[""], how, count, key)
        return array, slots, count + 1

    shape = tables.arrays["item"].shape
    state = (jnp.full(shape, 0.01), tables.init_slots("item", rule), jnp.zeros((), jnp.int32))
    return jax.jit(step, donate_argnums=0), state


def dense_adam(rows: int) -> tuple[Callable, State]:
    """The same with a dense gradient and optax.adam on the whole table."""
    rule = optax.adam(1e-3)

    def step(state, ids):
        array, slots = state
        grads = jax.grad(lambda table: jnp.square(table[ids]).sum())(array)
        updates, slots = rule.update(grads, slots)
        return optax.apply_updates(array, updates), slots

    array = jnp.full((rows + 1, DIM), 0.01)
    return jax.jit(step, donate_argnums=0), (array, rule.init(array))


def draws(rows: int, seed: int) -> Iterator[jax.Array]:
    """Batches of ids 1..rows, log-uniform: about half of them different."""
    rng = np.random.default_rng(seed)
    while True:
        yield jnp.asarray(np.exp(rng.uniform(0, np.log(rows), LOOKUPS)).astype(np.int32).clip(1, rows))


def timed(step: Callable, state: State, rows: int, count: int, seed: int) -> tuple[State, list[float]]:
    """Seconds of `count` steps after one that warms up."""
    ids, seconds = draws(rows, seed), []
    for _ in range(count + 1):
        now = jax.block_until_ready(next(ids))
        started = time.perf_counter()
        state = jax.block_until_ready(step(state, now))
        seconds.append(time.perf_counter() - started)
    return state, seconds[1:]


class Peer:
    """The PyTorch side, one process for the whole run."""

    def __init__(self, python: str, threads: int):
        self.threads = threads
        self.process = subprocess.Popen([python, str(PEER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, rows: int, count: int, seed: int) -> list[float]:
        order = {"rows": rows, "dim": DIM, "lookups": LOOKUPS, "steps": count, "seed": seed, "threads": self.threads}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["seconds"]


def compiled_bytes(rows: int, rule: str) -> dict[str, int]:
    """What the compiler reserves for a step, and the bytes of the table and its optimizer slots."""
    step, state = ours(rows, rule)
    shapes = jax.eval_shape(lambda: state)
    memory = step.lower(shapes, jax.ShapeDtypeStruct((LOOKUPS,), jnp.int32)).compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return {
        "table_and_slots": held,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def peak_of_child(rows: int, rule: str) -> int:
    """Bytes by which the peak of a process rises when it makes a table and trains it for three steps."""
    command = [sys.executable, "-m", "benchmarks.tables", f"--measure-peak={rows},{rule}"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak() -> int:
    """Highest resident memory of this process so far, bytes (Linux; getrusage would count the parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_peak(rows: int, rule: str) -> None:
    """What the child of `peak_of_child` runs."""
    step, state = ours(1000, rule)
    timed(step, state, 1000, 2, 0)
    before = peak()
    step, state = ours(rows, rule)
    timed(step, state, rows, 3, 0)
    print(peak() - before)


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps; no dense Adam at 1e7 rows")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON", ""))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--measure-peak", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_peak:
        rows, rule = arguments.measure_peak.split(",")
        measure_peak(int(rows), rule)
        return
    peer = Peer(arguments.torch_python, arguments.threads) if arguments.torch_python else None
    if peer is None:
        print("no --torch-python and no TORCH_PYTHON: PyTorch is not measured")
    turns, count = (2, 5) if arguments.quick else (3, 10)
    times: dict[str, dict[int, list[float]]] = {}
    for rows in ROWS:
        made = {rule: ours(rows, rule) for rule in RULES}
        for turn in range(turns):
            for name, (step, state) in list(made.items()):
                state, seconds = timed(step, state, rows, count, turn)
                made[name] = (step, state)
                times.setdefault(name, {}).setdefault(rows, []).extend(seconds)
            if peer is not None:
                times.setdefault("torch SparseAdam", {}).setdefault(rows, []).extend(peer(rows, count, turn))
        del made, state
        if rows < 10**7 or not arguments.quick:
            step, state = dense_adam(rows)
            state, seconds = timed(step, state, rows, 3, 0)
            times.setdefault("dense optax.adam", {})[rows] = seconds
            del step, state
    report(times)
    rows, rule = ROWS[-1], "rowwise_adagrad"
    memory = compiled_bytes(rows, rule) | {"peak_of_process": peak_of_child(rows, rule)}
    ratio = memory["peak_of_process"] / memory["table_and_slots"]
    print(f"memory at {rows:,} rows, {rule}: {memory}; peak / (table + slots) {ratio:.3f} (at most {MEMORY_SLACK})")
    medians = {name: {str(r): statistics.median(s) for r, s in by.items()} for name, by in times.items()}
    least = {name: {str(r): min(s) for r, s in by.items()} for name, by in times.items()}
    save("tables", {"lookups": LOOKUPS, "dim": DIM, "median_s": medians, "min_s": least, "memory": memory})


def report(times: dict[str, dict[int, list[float]]]) -> None:
    """The table of medians (and minima) in ms, and the ratios."""
    print(f"{'ms a step: median (min)':28s}" + "".join(f"{rows:>22,}" for rows in ROWS))
    for name, by in times.items():
        cells = (f"{1e3 * statistics.median(by[r]):.1f} ({1e3 * min(by[r]):.1f})" if r in by else "-" for r in ROWS)
        print(f"{name:28s}" + "".join(f"{cell:>22s}" for cell in cells))
    own = {r: statistics.median(s) for r, s in times["rowwise_adagrad"].items()}
    print(f"rowwise_adagrad t(1e7) / t(1e5): {own[10**7] / own[10**5]:.2f} (at most 2)")
    for other in ("torch SparseAdam", "dense optax.adam"):
        for rows, seconds in times.get(other, {}).items():
            with contextlib.suppress(KeyError):
                lazy = statistics.median(times["lazy_adam"][rows])
                ratio = statistics.median(seconds) / own[rows]
                print(
                    f"{other} / ours at {rows:,}: {ratio:.1f}x rowwise_adagrad, "
                    f"{statistics.median(seconds) / lazy:.1f}x lazy_adam; of minima "
                    f"{min(seconds) / min(times['rowwise_adagrad'][rows]):.1f}x"
                )


if __name__ == "__main__":
    main()
