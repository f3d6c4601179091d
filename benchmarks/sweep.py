"""What a sweep adds to its cells: cells of equal shape, one after the other, sharing one compilation cache.

    python -m benchmarks.sweep [--cells=4]

Each cell is a process of its own, started by the local launcher: the cell "base" of experiments/0001_four_axes_planted
with one seed after the other. From its events.jsonl: seconds until recscale is imported and the config read, from
there to the state being ready, and to the end of the first step; "beyond imports" is the sum of the latter two. The
launcher's own share is the wall time of the sweep less that of its cells. Writes benchmarks/results/sweep.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.training import save
from launch import local, study
from recscale.events import read_events

STUDY = Path("experiments/0001_four_axes_planted")


def marks(workdir: Path) -> dict[str, float]:
    """Seconds of one cell."""
    clock = {row["event"]: row["clock"] for row in read_events(workdir)}
    return {
        "imports": clock["start"],
        "ready": clock["ready"] - clock["start"],
        "first_step": clock["compiled"] - clock["ready"],
        "beyond_imports": clock["compiled"] - clock["start"],
        "whole": clock["done"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=4, help="how many (at most 5)")
    count = parser.parse_args().cells
    with tempfile.TemporaryDirectory() as folder:
        chosen = study.load(STUDY, Path(folder))
        chosen.out.mkdir()
        chosen.prepare()
        jobs = [job for job in chosen.jobs if job.cell.startswith("base-s")][:count]
        began = time.monotonic()
        local.submit(jobs, chosen.out, local.Settings(jobs=1), dry_run=False)
        wall = time.monotonic() - began
        found = [marks(Path(job.workdir)) for job in jobs]
    print(f"{'cell':>6}" + "".join(f"{name:>16}" for name in found[0]))
    for i, row in enumerate(found):
        print(f"{i + 1:>6}" + "".join(f"{value:>16.2f}" for value in row.values()))
    launcher = wall - sum(row["whole"] for row in found)
    print(f"the launcher's own share: {launcher / count:.2f} s a cell")
    save("sweep", {"cells": found, "wall": wall, "launcher_per_cell": launcher / count})


if __name__ == "__main__":
    main()
