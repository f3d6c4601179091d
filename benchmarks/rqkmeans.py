"""Residual k-means of a million vectors: seconds and error beside faiss.

    python -m benchmarks.rqkmeans [--faiss-python=PYTHON] [--vectors=1000000] [--iterations=10] [--threads=2] [--quick]

3 levels of 256 codes of vectors of width 64, a mixture of 2,000 blobs of unequal size with noise. "all": every vector
is used to fit; "256": 256 vectors per code, which is the most that faiss uses unless told otherwise. faiss runs in a
process of its own (benchmarks/_kmeans_peer.py, `pip install faiss-cpu==1.15.1 numpy`, interpreter named by
--faiss-python or FAISS_PYTHON). Times are those of one fit in turns, ours after one that compiles; "error" is the share
of the variance that three codes leave. Writes benchmarks/results/rqkmeans.json.
"""

import argparse
import json
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

from recscale.models import rqkmeans

RESULTS = Path(__file__).parent / "results" / "rqkmeans.json"
PEER = Path(__file__).parent / "_kmeans_peer.py"
LEVELS, CODES, DIM, BLOBS = 3, 256, 64, 2000


def synthetic(count: int) -> np.ndarray:
    """float32 [count, DIM]: blobs of unequal size."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, BLOBS + 1) ** 0.7
    centres = rng.normal(size=(BLOBS, DIM)).astype(np.float32)
    found = centres[rng.choice(BLOBS, count, p=share / share.sum())]
    found += 0.5 * rng.normal(size=(count, DIM)).astype(np.float32)
    return found


def ours(x_ND: jax.Array, iterations: int, points_per_code: int) -> dict[str, float]:
    """One fit with its codes, after one that compiles."""
    c = rqkmeans.Config(levels=LEVELS, codebook=CODES, iterations=iterations, points_per_code=points_per_code)
    short = rqkmeans.Config(**{**vars(c), "iterations": iterations, "levels": 1})
    jax.block_until_ready(rqkmeans.fit(short, x_ND, jax.random.key(0)))
    begin = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(rqkmeans.fit(c, x_ND, jax.random.key(0)))
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    left, spread = x_ND - found.reconstruction_ND, x_ND - x_ND.mean(axis=0)[None]
    return {"total": wall, "cpu": cpu, "error": float(jnp.square(left).sum() / jnp.square(spread).sum())}


class Peer:
    """_kmeans_peer.py in its own process."""

    def __init__(self, python: str, vectors: Path, iterations: int, threads: int):
        settings = [str(value) for value in (LEVELS, CODES, iterations, threads)]
        self.process = subprocess.Popen(
            [python, str(PEER), str(vectors), *settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._answer()

    def fit(self, name: str) -> dict[str, float]:
        """Seconds and error."""
        self.process.stdin.write(json.dumps({"do": name}) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        return {**found, "total": found["fit"] + found["code"]}

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{PEER.name} ended with status {self.process.wait()}: see its message above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Run every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faiss-python", default=os.environ.get("FAISS_PYTHON", ""))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="100,000 vectors, 4 iterations")
    args = parser.parse_args()
    if args.quick:
        args.vectors, args.iterations = 100_000, 4
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # both sides; before JAX makes its threads
    if not args.faiss_python:
        print("No --faiss-python and no FAISS_PYTHON: faiss is left out, only this project is measured.")
    vectors, rows = synthetic(args.vectors), {}
    x_ND = jnp.asarray(vectors)
    print(f"{'':<28} {'seconds':>8} {'CPU s':>8} {'error':>8}", flush=True)

    def show(name: str, row: dict[str, float]) -> None:
        rows[name] = row
        print(f"{name:<28} {row['total']:>8.2f} {row['cpu']:>8.2f} {row['error']:>8.4f}", flush=True)

    versions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if args.faiss_python:
            np.save(Path(folder) / "vectors.npy", vectors)
            peer = Peer(args.faiss_python, Path(folder) / "vectors.npy", args.iterations, args.threads)
            versions = peer.versions
        for name, points in (("all", 0), ("256", 256)):
            show(f"ours {name}", ours(x_ND, args.iterations, points))
            if peer is not None:
                show(f"faiss kmeans {name}", peer.fit(f"kmeans {name}"))
        if peer is not None:
            show("faiss residual quantizer", peer.fit("residual quantizer"))
            peer.close()
    result = {
        "rows": rows,
        "vectors": args.vectors,
        "dim": DIM,
        "levels": LEVELS,
        "codes": CODES,
        "iterations": args.iterations,
        "threads": args.threads,
        "faiss": versions,
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
