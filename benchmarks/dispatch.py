"""Host time of one training step: what Python and JAX spend before the device can work.

    python -m benchmarks.dispatch [--steps=300]

The step of recscale.step with 8 scanned layers (HSTU and SASRec, D 64) on one row of 8 events, so that computing takes
next to nothing. "call" is the time until the jitted step returns, before anything is waited for; "main thread" is the
processor time of the calling thread in the same interval; "whole step" also waits for the result. Medians over the
steps. Goal: under 1 ms. Writes benchmarks/results/dispatch.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.training import MODELS, save, workload
from recscale.data import planted
from recscale.data.event_log_writer import write
from recscale.mesh import place_batch
from recscale.run import build, init_state
from recscale.step import make_train_step

LENGTH = 8
GOAL_US = 1000.0


def measure(model: str, path: Path, steps: int) -> dict[str, float | str | int]:
    """Medians in microseconds."""
    run = build(workload(model, path, length=LENGTH, batch_size=1, layout="packed"))
    state, step = init_state(run), make_train_step(run)
    batch = jax.block_until_ready(place_batch(run.mesh, run.loader[0]))
    for _ in range(5):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    calls, threads, whole = [], [], []
    for _ in range(steps):
        thread, begin = time.thread_time(), time.perf_counter()
        state, metrics = step(state, batch)
        calls.append(time.perf_counter() - begin)
        threads.append(time.thread_time() - thread)
        jax.block_until_ready((state, metrics))
        whole.append(time.perf_counter() - begin)
    median = {"call_us": calls, "main_thread_us": threads, "whole_step_us": whole}
    return {
        "model": model,
        "depth": run.model_config.depth,
        "state_leaves": len(jax.tree.leaves(state)),
        **{name: 1e6 * statistics.median(values) for name, values in median.items()},
    }


def main() -> None:
    """Measure both models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    # The CPU runs small programs in the calling thread; an accelerator always works beside it.
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    rows = []
    print(f"{'model':<8} {'layers':>6} {'leaves':>6} {'call us':>9} {'main thread us':>15} {'whole step us':>14}")
    with tempfile.TemporaryDirectory() as folder:
        write(planted.generate(planted.Planted(users=2_000)), Path(folder) / "log")
        for model in MODELS:
            row = measure(model, Path(folder) / "log", args.steps)
            rows.append(row)
            print(
                f"{model:<8} {row['depth']:>6} {row['state_leaves']:>6} {row['call_us']:>9.0f} "
                f"{row['main_thread_us']:>15.0f} {row['whole_step_us']:>14.0f}"
            )
    print(f"goal: main thread under {GOAL_US:.0f} us: {all(r['main_thread_us'] < GOAL_US for r in rows)}")
    save("dispatch", {"steps": args.steps, "goal_us": GOAL_US, "rows": rows})


if __name__ == "__main__":
    main()
