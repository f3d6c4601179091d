"""Peak memory of the training step at L = 200, 1024 and 4096, at a constant number of tokens a step.

    python -m benchmarks.memory [--tokens=8192] [--without-step]

HSTU and SASRec with 8 layers, D 64, on planted histories packed into rows of L. "temporaries" is what the compiler
reserves beside arguments and results (memory_analysis of the compiled step); "growth" is how far the process's peak
rises above its size with state and batch in place while it runs two steps, the compiler's own memory not counted; both
in MiB. "scores of all pairs" is what one layer's attention would hold if it kept every pair: B H L L float32. Each case
is a process of its own. Writes benchmarks/results/memory.json.
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import jax

from benchmarks.evaluation import resident_mb
from benchmarks.training import HEADS, MODELS, save, workload
from recscale.data import planted
from recscale.data.event_log_writer import write
from recscale.mesh import place_batch
from recscale.run import build, init_state
from recscale.step import make_train_step

LENGTHS = (200, 1024, 4096)


def measure(model: str, length: int, tokens: int, path: str, with_step: bool) -> dict:
    """One case, in this process."""
    rows = max(1, round(tokens / length))
    run = build(workload(model, path, length=length, batch_size=rows, layout="packed"))
    state = jax.block_until_ready(init_state(run))
    batch = place_batch(run.mesh, run.loader[0])
    compiled = make_train_step(run).lower(state, batch).compile()
    analysis = compiled.memory_analysis()
    result = {
        "model": model, "length": length, "rows": rows, "tokens": rows * length,
        "temporaries_mb": analysis.temp_size_in_bytes / 2**20,
        "arguments_mb": analysis.argument_size_in_bytes / 2**20,
        "all_pairs_mb": rows * HEADS * length * length * 4 / 2**20,
    }  # fmt: skip
    if with_step:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident_mb("VmRSS")
        for _ in range(2):
            state, _ = jax.block_until_ready(compiled(state, batch))
        result |= {"growth_mb": resident_mb("VmHWM") - before, "process_peak_mb": resident_mb("VmHWM")}
    return result


def main() -> None:
    """Run every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--without-step", action="store_true", help="compile only: the compiler's figure alone")
    args = parser.parse_args()
    rows = []
    headings = ("temporaries", "growth", "process peak", "scores of all pairs")
    print(f"{'model':<8} {'L':>5} {'rows':>5}" + "".join(f"{h:>21}" for h in headings))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        histories = planted.Planted(users=2_000, length_median=300.0, length_sigma=1.0, length_max=5000)
        write(planted.generate(histories), log)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for model in MODELS:
                for length in LENGTHS:
                    row = pool.apply(measure, (model, length, args.tokens, str(log), not args.without_step))
                    rows.append(row)
                    shown = [row.get(k) for k in ("temporaries_mb", "growth_mb", "process_peak_mb", "all_pairs_mb")]
                    cells = "".join(f"{'-' if x is None else f'{x:,.0f} MiB':>21}" for x in shown)
                    print(f"{model:<8} {length:>5} {row['rows']:>5}{cells}", flush=True)
    save("memory", {"rows": rows})


if __name__ == "__main__":
    main()
