"""Run a study on this machine: python -m launch.local experiments/0001_four_axes_planted [--jobs=2] [--runs=runs]

A study is a folder with a study.py that has `cells()` (names), `get_config(cell)`, `prepare(folder)` (data, once) and
`write_report(folder)`. Each cell is one process, `python -m recscale.train`, on cores of its own; finished cells are
skipped, a failed cell stops no other and is tried again by the next call. Ctrl-C leaves everything resumable.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

POLL_SECONDS = 0.2


def load(study: Path) -> ModuleType:
    """The module STUDY/study.py; exits with one line where there is none."""
    file = study / "study.py"
    if not file.is_file():
        sys.exit(f"error: {file} does not exist; give the folder of a study, e.g. experiments/0001_four_axes_planted")
    spec = importlib.util.spec_from_file_location(study.name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finished(workdir: Path) -> bool:
    """Whether the cell has ended for good: trained to the end, or diverged (which is a result too)."""
    return (workdir / "DONE").exists()


def start(study: Path, cell: str, workdir: Path, cache: Path, cores: set[int]) -> subprocess.Popen[bytes]:
    """Start one cell; its output goes to WORKDIR/log."""
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recscale.train", f"--config={study / 'study.py'}:{cell}", f"--workdir={workdir}"]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "OMP_NUM_THREADS": str(len(cores)),
    }
    with (workdir / "log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    if hasattr(os, "sched_setaffinity"):  # before jax counts the cores to size its thread pools
        os.sched_setaffinity(process.pid, cores)
    return process


def run(study: Path, folder: Path, jobs: int) -> list[str]:
    """Run the cells that are missing, `jobs` at a time; returns the names of the cells that failed."""
    module = load(study)
    folder.mkdir(parents=True, exist_ok=True)
    module.prepare(folder)
    names = module.cells()
    waiting = [name for name in names if not finished(folder / name)]
    skipped = len(names) - len(waiting)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    slots = {slot: set(cores[slot::jobs]) or set(cores) for slot in range(jobs)}
    running: dict[int, tuple[str, subprocess.Popen[bytes], float]] = {}
    failed: list[str] = []
    done, began = 0, time.time()
    try:
        while waiting or running:
            for slot in [slot for slot in slots if slot not in running][: len(waiting)]:
                name = waiting.pop(0)
                process = start(study, name, folder / name, folder / ".jax_cache", slots[slot])
                running[slot] = (name, process, time.time())
            time.sleep(POLL_SECONDS)
            for slot, (name, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                done += 1
                state = "done" if finished(folder / name) else f"FAILED, see {folder / name / 'log'}"
                if not finished(folder / name):
                    failed.append(name)
                left = (time.time() - began) / done * (len(waiting) + len(running))
                print(
                    f"[{skipped + done}/{len(names)}] {name}: {state} in {time.time() - since:.0f}s"
                    f"  (elapsed {time.time() - began:.0f}s, about {left:.0f}s left)",
                    flush=True,
                )
    except KeyboardInterrupt:
        for _, process, _ in running.values():
            process.terminate()
        sys.exit("\nstopped; the same command goes on where this one was")
    if skipped:
        print(f"{skipped} cells were finished before")
    return failed


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder with a study.py")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time (default: one per core)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go (default: runs)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        sys.exit(f"error: --jobs={arguments.jobs}: expected at least 1")
    began = time.time()
    folder = arguments.runs / arguments.study.resolve().name
    failed = run(arguments.study, folder, arguments.jobs)
    report = load(arguments.study).write_report(folder)
    print(f"report: {report.resolve()}  ({time.time() - began:.0f}s in all)")
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}; the report lists them, run again to retry them")


if __name__ == "__main__":
    main()
