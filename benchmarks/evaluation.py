"""Full-catalogue evaluation: users per second beside faiss and PyTorch, and peak memory up to ten million items.

    python -m benchmarks.evaluation [--torch-python=PYTHON] [--threads=2] [--quick]

Search: the best 100 of a million items x 64 for 512 queries, by `top_items`, by faiss IndexFlatIP and by PyTorch matmul
and topk, in turns, after a first one that compiles; the median of each. Both others run in a process of their own
(benchmarks/_search_peer.py, `pip install torch==2.13.0 faiss-cpu==1.15.1 numpy`, interpreter named by --torch-python or
TORCH_PYTHON). "same lists" is the share of queries whose items equal ours in the same order: the others do not order
ties and near-ties as we do.

Evaluation: `evaluate` of one target per user with histories of 100 events, the model replaced by one lookup, so that
ranking is what is timed. "ranking" makes both protocols, lists of 10 and nats; "one protocol" leaves the seen filter
out; "nats" makes the loss alone. Each case is a process of its own. Rates are those of one run after one that compiles,
by wall and by CPU time. "growth" is how far the process's peak rises above its size with the table in place (compiler
and log included); "scores" is the size of all users' scores, which are never held at once. About two minutes on two
idle cores. Writes benchmarks/results/evaluation.json.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
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
from recscale.layers.kinds import Table
from recscale.layers.ranking import dot_products, top_items
from recscale.layers.tables import Tables
from recscale.mesh import make_mesh

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
PEER = Path(__file__).parent / "_search_peer.py"
DIM, HISTORY, CHUNK, BLOCK = 64, 100, 256, 16_384
SEARCHED, QUERIES, TOP = 1_000_000, 512, 100
CASES = (
    (4_000, 2_048, "ranking"),
    (4_000, 2_048, "one protocol"),
    (4_000, 2_048, "nats"),
    (1_000_000, 512, "ranking"),
    (1_000_000, 512, "one protocol"),
    (1_000_000, 512, "nats"),
    (10_000_000, 64, "one protocol"),
)
MODES: dict[str, dict[str, Any]] = {
    "ranking": {},
    "one protocol": {"protocols": ("full",)},
    "nats": {"nats_only": True},
}


class LastItem:
    """The query is the vector of the last item."""

    catalogue = "item"
    scores = staticmethod(dot_products)

    def queries(self, model, lookup, batch):
        return lookup("item", batch["item_id"])

    def item(self, vectors):
        return vectors


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
def fill(shape: tuple[int, int]) -> jax.Array:
    """Some array, computed in place: a drawn one would leave its temporaries in the process's size."""
    row, column = (jax.lax.broadcasted_iota(jnp.float32, shape, axis) for axis in (0, 1))
    return jnp.sin(12.9898 * row + 78.233 * column) / DIM**0.5


def measure(items: int, users: int, mode: str) -> dict[str, Any]:
    """One evaluation, in this process."""
    task, tables = LastItem(), Tables({"item": Table(items, DIM)}, make_mesh(1, 1, 1))
    arrays = {"item": jax.block_until_ready(fill(tables.arrays["item"].shape))}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_mb("VmRSS")

    def once(log: EventLog) -> tuple[float, float]:
        view = leave_one_out(log)["test"]
        loader = Loader(log, view, batch_size=64, length=HISTORY, shuffle=False, with_example=True)
        begin = time.perf_counter(), time.process_time()
        options = {"block": BLOCK, "chunk": min(CHUNK, users), "top_k": 10, **MODES[mode]}
        evaluate(None, arrays, {"item": {}}, tables, task, loader, log, view, **options)
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


class Peer:
    """_search_peer.py in its own process."""

    def __init__(self, python: str, folder: Path, threads: int):
        files = [str(folder / name) for name in ("vectors.npy", "queries.npy")]
        self.process = subprocess.Popen(
            [python, str(PEER), *files, str(TOP), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.out = folder / "items.npy"
        self.versions = self._answer()

    def search(self, name: str) -> tuple[np.ndarray, dict[str, float]]:
        """Items from 1 [Q, TOP], and the seconds it took."""
        self.process.stdin.write(json.dumps({"do": name, "out": str(self.out)}) + "\n")
        self.process.stdin.flush()
        spent = self._answer()
        return np.load(self.out) + 1, spent

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{PEER.name} ended with status {self.process.wait()}: see its message above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def ours(vectors: np.ndarray, queries: np.ndarray):
    """A search by `top_items`, CHUNK queries at a time."""
    task, tables = LastItem(), Tables({"item": Table(len(vectors), DIM)}, make_mesh(1, 1, 1))
    values = np.concatenate([np.zeros((1, DIM), np.float32), vectors])
    arrays = {"item": jax.device_put(tables.arrays["item"].place(values), tables.sharding("item"))}
    options = {"tables": tables, "task": task, "block": BLOCK, "top_k": TOP}

    def search() -> tuple[np.ndarray, dict[str, float]]:
        begin = time.perf_counter(), time.process_time()
        parts = [queries[i : i + CHUNK] for i in range(0, len(queries), CHUNK)]
        found = np.concatenate([np.asarray(top_items(part, None, arrays, {"item": {}}, **options)) for part in parts])
        return found, {"wall": time.perf_counter() - begin[0], "cpu": time.process_time() - begin[1]}

    return search


def compare(python: str, threads: int, repeats: int) -> dict[str, Any]:
    """Users per second of every search, in turns."""
    rng = np.random.default_rng(0)
    vectors, queries = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (SEARCHED, QUERIES))
    searches = {"ours": ours(vectors, queries)}
    result: dict[str, Any] = {"items": SEARCHED, "dim": DIM, "top_k": TOP, "queries": QUERIES, "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if python:
            np.save(Path(folder) / "vectors.npy", vectors)
            np.save(Path(folder) / "queries.npy", queries)
            peer = Peer(python, Path(folder), threads)
            result["peer"] = peer.versions
            searches |= {name: functools.partial(peer.search, name) for name in peer.versions["searches"]}
        found = {name: search()[0] for name, search in searches.items()}
        spent = {name: [] for name in searches}
        for _ in range(repeats):
            for name, search in searches.items():
                spent[name].append(search()[1])
        if peer is not None:
            peer.close()
    result["searches"] = {
        name: {
            "users_per_second": QUERIES / float(np.median([s["wall"] for s in turns])),
            "users_per_cpu_second": QUERIES / float(np.median([s["cpu"] for s in turns])),
            "same_lists": float((found[name] == found["ours"]).all(axis=1).mean()),
        }
        for name, turns in spent.items()
    }
    others = [row["users_per_second"] for name, row in result["searches"].items() if name != "ours"]
    if others:
        result["ours_over_the_faster"] = result["searches"]["ours"]["users_per_second"] / max(others)
    return result


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON", ""))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="one turn of each search, no ten million items")
    return parser.parse_args()


def main() -> None:
    """Run every case, print the tables, write the JSON."""
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # all sides; before JAX makes its threads
    if not args.torch_python:
        print("No --torch-python and no TORCH_PYTHON: faiss and PyTorch are left out, only this project is measured.")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        search = pool.apply(compare, (args.torch_python, args.threads, 1 if args.quick else 3))
        print(f"best {TOP} of {SEARCHED:,} items: {'users/s':>12} {'per CPU s':>10} {'same lists':>11}")
        for name, row in search["searches"].items():
            print(
                f"{name:<28} {row['users_per_second']:>12.1f} {row['users_per_cpu_second']:>10.1f} "
                f"{row['same_lists']:>10.1%}"
            )
        if "ours_over_the_faster" in search:
            print(f"ours over the faster of the others: {search['ours_over_the_faster']:.2f}x (goal 1x)")
        print(f"\n{'items':>10} {'users':>6} {'mode':<13} {'users/s':>9} {'per CPU s':>10}", end=" ")
        print(f"{'table MB':>9} {'growth MB':>10} {'scores MB':>10}", flush=True)
        rows = []
        for case in CASES[:-1] if args.quick else CASES:
            row = pool.apply(measure, case)
            print(
                f"{row['items']:>10} {row['users']:>6} {row['mode']:<13} {row['users_per_second']:>9.1f} "
                f"{row['users_per_cpu_second']:>10.1f} {row['table_mb']:>9.0f} {row['growth_mb']:>10.0f} "
                f"{row['score_matrix_mb']:>10.0f}",
                flush=True,
            )
            rows.append(row)
    result = {
        "search": search,
        "rows": rows,
        "block": BLOCK,
        "chunk": CHUNK,
        "dim": DIM,
        "history": HISTORY,
        "threads": args.threads,
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
