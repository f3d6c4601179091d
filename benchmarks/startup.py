"""Time from the start of a process to the end of its first training step, with a cold and a warm compilation cache.

    python -m benchmarks.startup [--repeats=3]

Each figure is a process of its own that does what recscale.train does first: imports, building the run from a prepared
log, drawing the state, compiling and running one step (8 layers, D 64, L 200, 32 packed rows). "cold" starts with an
empty JAX compilation cache, "warm" with the one that the cold process left. Medians over the repeats.
Writes benchmarks/results/startup.json.
"""

# ruff: noqa: E402 (the clock starts before the imports, which are part of what is measured)
import time

_BEGAN = time.time()

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from benchmarks.training import MODELS, save, workload
from recscale.data import planted
from recscale.data.event_log_writer import write
from recscale.mesh import place_batch
from recscale.run import build, init_state
from recscale.step import make_train_step

_IMPORTED = time.time()
PHASES = ("interpreter", "imports", "build", "state", "first_step")
SETTINGS = {
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def child(model: str, path: str, parent_clock: float) -> None:
    """In the measured process: print the seconds of each phase as JSON."""
    marks = [parent_clock, _BEGAN, _IMPORTED]
    run = build(workload(model, path, length=200, batch_size=32, layout="packed"))
    batches = run.loader.iterator()
    marks.append(time.time())
    state = jax.block_until_ready(init_state(run))
    marks.append(time.time())
    jax.block_until_ready(make_train_step(run)(state, place_batch(run.mesh, next(batches))))
    marks.append(time.time())
    print(json.dumps([after - before for before, after in itertools.pairwise(marks)]))


def start(model: str, path: Path, cache: Path) -> dict[str, float]:
    """Seconds by phase of one process."""
    command = [sys.executable, "-m", "benchmarks.startup", "--child", model, str(path), repr(time.time())]
    environment = os.environ | SETTINGS | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: the measured process failed:\n{done.stderr}")
    seconds = dict(zip(PHASES, json.loads(done.stdout.splitlines()[-1]), strict=True))
    return seconds | {"total": sum(seconds.values())}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], float(args.child[2]))
        return
    rows = []
    print(f"{'model':<8} {'cache':<6}" + "".join(f"{phase:>13}" for phase in (*PHASES, "total")))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        write(planted.generate(planted.Planted(users=2_000)), log)
        for model in MODELS:
            found = {"cold": [], "warm": []}
            for repeat in range(args.repeats):
                cache = Path(folder) / f"cache_{model}_{repeat}"
                for kind in found:
                    found[kind].append(start(model, log, cache))
            for kind, runs in found.items():
                row = {phase: statistics.median(run[phase] for run in runs) for phase in (*PHASES, "total")}
                rows.append({"model": model, "cache": kind, "seconds": row})
                print(f"{model:<8} {kind:<6}" + "".join(f"{value:>12.2f}s" for value in row.values()), flush=True)
    save("startup", {"repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
