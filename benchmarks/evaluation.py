"""Users per second and peak memory of full-catalogue evaluation, for two sizes of catalogue.

Command: python -m benchmarks.evaluation (about a minute on two idle cores). Each case is a process of its own: D 64,
one target per user, histories of 100 events, the model replaced by one gather, so that ranking is what is timed.
"ranking" makes both protocols, lists of 10 and nats; "one protocol" leaves the seen filter out; "nats" makes the loss
alone. Wall rates are those of one run after one that compiles; rates per second of CPU time stand beside
them, for a machine that does other work too. Memory is the growth of the process's peak over its size with the table in
place (compiler and log included); the last column is the size of the scores of all users, which are never held at once.
Writes benchmarks/results/evaluation.json.
"""

import functools
import json
import multiprocessing
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recscale.data.event_log import Column, EventLog
from recscale.data.loading import Loader
from recscale.data.splits import leave_one_out
from recscale.evaluate import evaluate

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
DIM, HISTORY, CHUNK = 64, 100, 256
CATALOGUES = {4_000: 2_048, 1_000_000: 256}  # items -> users
BLOCK = 4096
MODES: dict[str, dict[str, Any]] = {
    "ranking": {},
    "one protocol": {"protocols": ("full",)},
    "nats": {"nats_only": True},
}


class LastItem:
    """The query is the vector of the last item."""

    def queries(self, model, tables, batch):
        return tables["item"][batch["item_id"]]

    def item_vectors(self, tables, ids_N):
        return tables["item"][ids_N]


def synthetic(users: int, items: int) -> EventLog:
    """Equal histories of skewed items (a few items in most of them)."""
    rng = np.random.default_rng(0)
    item = (items ** rng.random(users * (HISTORY + 1))).astype(np.int32)
    return EventLog(np.arange(users + 1) * (HISTORY + 1), {"item_id": item}, {"item_id": Column("id")}, items)


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, from Linux."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


@functools.partial(jax.jit, static_argnums=0)
def fill(rows: int) -> jax.Array:
    """Some table [rows, D], computed in place: a drawn one would leave its temporaries in the process's size."""
    row, column = (jax.lax.broadcasted_iota(jnp.float32, (rows, DIM), axis) for axis in (0, 1))
    return jnp.sin(12.9898 * row + 78.233 * column) / DIM**0.5


def measure(items: int, users: int, mode: str) -> dict:
    """One case, in this process."""
    task = LastItem()
    tables = {"item": jax.block_until_ready(fill(items + 1))}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_mb("VmRSS")

    def once(log: EventLog) -> tuple[float, float]:
        view = leave_one_out(log)["test"]
        loader = Loader(log, view, batch_size=64, length=HISTORY, shuffle=False, with_example=True)
        begin = time.perf_counter(), time.process_time()
        evaluate(None, tables, task, loader, log, view, block=BLOCK, chunk=CHUNK, top_k=10, **MODES[mode])
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    log = synthetic(users, items)
    once(log)
    wall, cpu = once(log)
    return {
        "items": items,
        "users": users,
        "mode": mode,
        "users_per_second": users / wall,
        "users_per_cpu_second": users / cpu,
        "growth_mb": resident_mb("VmHWM") - before,
        "table_mb": items * DIM * 4 / 2**20,
        "score_matrix_mb": users * items * 4 / 2**20,
    }


def main() -> None:
    """Run every case, print the table, write the JSON."""
    cases = [(items, users, mode) for items, users in CATALOGUES.items() for mode in MODES]
    print(
        f"{'items':>9} {'users':>6} {'mode':<13} {'users/s':>9} {'per CPU s':>10} {'growth MB':>10} {'scores MB':>14}"
    )
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case in cases:
            row = pool.apply(measure, case)
            print(
                f"{row['items']:>9} {row['users']:>6} {row['mode']:<13} {row['users_per_second']:>9.1f} "
                f"{row['users_per_cpu_second']:>10.1f} {row['growth_mb']:>10.0f} {row['score_matrix_mb']:>14.0f}",
                flush=True,
            )
            rows.append(row)
    result = {
        "rows": rows,
        "block": BLOCK,
        "chunk": CHUNK,
        "dim": DIM,
        "history": HISTORY,
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
