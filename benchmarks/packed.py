"""Eight small seeds trained together in one program against the same eight one after another.

    python -m benchmarks.packed [--quick] [--seconds=3]

HSTU on planted data (configs/hstu_planted.py, 2,000 training users, D 32, 2 layers; --quick: 500 users). Wall and CPU
time are those of `python -m recscale.train` eight times, and of `python -m recscale.train_pack` once, from the start of
the first process to the end of the last: imports, data, compilation, training, evaluation, record. "cold" begins with
an empty JAX compilation cache (the first of the eight fills it for the others), "warm" with what the cold turn left.
The pack runs on one CPU device and on one per core. Then, in one process and by turns, the real events per second and
per second of CPU of the steps alone. The losses of step 20 must be the same to 1e-5, relative. From there rounding
grows, as it does between meshes: the final nats of one run on two devices and on one differ by .3e-3 to 3.5e-3 here,
and the largest difference between the ways, printed, is of that size.
About 4 minutes on two idle cores, --quick 3. Writes benchmarks/results/packed.json.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks.startup import SETTINGS
from benchmarks.training import Ours, compare, save
from configs import hstu_planted
from recscale import record
from recscale.data import planted
from recscale.data.event_log_writer import write
from recscale.population import Population
from recscale.run import build

SEEDS = range(8)
EVAL_USERS = 500
TOLERANCE = 1e-5
CORES = len(os.sched_getaffinity(0))


def overrides(log: Path, users: int, seed: int) -> list[str]:
    """What differs from the shipped config, as the command line has it."""
    split = {"split.train_users": users, "split.eval_users": EVAL_USERS}
    values = {"data.path": log, "seed": seed, **split, "table.warmup": 20, "optim.warmup": 20}
    return [f"--config.{key}={value}" for key, value in values.items()]


def timed(commands: Sequence[list[str]], cache: Path, devices: int = 1) -> dict[str, float]:
    """Wall and CPU seconds of processes, one after another."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    environment = os.environ | SETTINGS | {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": flags}
    before, began = _children(), time.perf_counter()
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr}")
    return {"wall": time.perf_counter() - began, "cpu": _children() - before}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def whole_runs(log: Path, users: int, folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Seconds of each way, cold and warm, and the largest relative differences of their losses and final nats."""

    def words(way: str, seed: int) -> list[str]:
        where = ["--config=configs/hstu_planted.py", f"--workdir={folder / way / str(seed)}"]
        return [*where, *overrides(log, users, seed)]

    def alone(way: str) -> list[list[str]]:
        return [[sys.executable, "-m", "recscale.train", *words(way, seed)] for seed in SEEDS]

    def together(way: str) -> list[list[str]]:
        return [[sys.executable, "-m", "recscale.train_pack", *(word for seed in SEEDS for word in words(way, seed))]]

    ways: dict[str, tuple[Callable, int]] = {"one after another": (alone, 1), "together, 1 device": (together, 1)}
    if CORES > 1:
        ways[f"together, {CORES} devices"] = (together, CORES)
    found = {}
    for kind in ("cold", "warm"):
        for way, (commands, devices) in ways.items():
            name = f"{way}, {kind}"
            found[name] = timed(commands(name), folder / f"cache of {way}", devices)
            print(f"  {name:<28} {found[name]['wall']:7.1f} s   {found[name]['cpu']:7.1f} s of CPU", flush=True)
    results = {name: np.array([_results(folder / name / str(seed)) for seed in SEEDS]) for name in found}
    base = results["one after another, cold"]
    differences = np.max([np.abs(values / base - 1).max(axis=0) for values in results.values()], axis=0)
    return found, dict(zip(("loss", "nats"), map(float, differences), strict=True))


def _results(workdir: Path) -> tuple[float, float]:
    """The first loss in metrics.jsonl and the final nats."""
    loss = next(row["loss"] for row in record.read_metrics(workdir) if "loss" in row)
    rows = record.read(workdir)["evaluations"]
    return loss, next(row["value"] for row in rows if row["metric"] == "nats" and row["slice"] == "all")


class Together:
    """Eight runs in one program, fed and stepped as recscale.train_pack does it."""

    def __init__(self, configs: Sequence[ml_collections.ConfigDict], devices: int):
        self.runs = [build(config) for config in configs]
        self.population = Population(self.runs, jax.devices()[:devices])
        self.state = self.population.init()
        self.batches = [run.loader.iterator() for run in self.runs]
        self.done = 0

    def turn(self, seconds: float) -> dict[str, float]:
        """Train for about `seconds`, at least one step."""
        events = steps = 0
        waiting = None
        cpu, begin = time.process_time(), time.perf_counter()
        while steps == 0 or time.perf_counter() - begin < seconds:
            batches = [next(iterator) for iterator in self.batches]
            self.state, metrics = self.population.step(self.state, batches, [self.done] * len(batches))
            if waiting is not None:
                np.asarray(waiting["loss"])
            waiting = metrics
            events += sum(int(np.count_nonzero(batch["target"])) for batch in batches)
            steps, self.done = steps + 1, self.done + 1
        jax.block_until_ready(self.state)
        wall = time.perf_counter() - begin
        return {"events": events, "steps": steps, "wall": wall, "cpu": time.process_time() - cpu}


def steady(log: Path, users: int, seconds: float, repeats: int) -> dict[str, dict]:
    """Events per second of the steps alone, by turns in this process."""
    configs = []
    for seed in SEEDS:
        config = hstu_planted.get_config()
        config.data.path, config.seed = str(log), seed
        config.split.train_users, config.split.eval_users = users, EVAL_USERS
        configs.append(config)
    turns = {"one": Ours(configs[0]).turn, "together, 1 device": Together(configs, 1).turn}
    if CORES > 1:
        turns[f"together, {CORES} devices"] = Together(configs, CORES).turn
    return compare(turns, seconds, repeats)


def ratios(whole: dict[str, dict[str, float]], rates: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Together over one after another; more is better."""
    found: dict[str, dict[str, float]] = {}
    for way in [name for name in rates if name != "one"]:
        row = {}
        for kind in ("cold", "warm"):
            for clock in ("wall", "cpu"):
                alone = whole[f"one after another, {kind}"][clock]
                row[f"{clock}, {kind}"] = alone / whole[f"{way}, {kind}"][clock]
        for rate in ("events_per_second", "events_per_cpu_second"):
            row[rate] = rates[way][rate] / rates["one"][rate]
        found[way] = row
    return found


def main() -> None:
    """Measure, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 training users instead of 2,000, fewer turns")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn of the steps alone")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", CORES)
    users, repeats = (500, 2) if args.quick else (2_000, 3)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"Load average {load:.1f}: other work is running; the seconds of CPU suffer less than the wall clock.")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        write(planted.generate(planted.Planted(users=users + EVAL_USERS)), log)
        print(f"8 seeds, {users:,} training users; whole runs:", flush=True)
        whole, differences = whole_runs(log, users, Path(folder))
        loss, nats = differences["loss"], differences["nats"]
        print(f"largest relative difference: first loss {loss:.1e}, final nats {nats:.1e}", flush=True)
        if not loss < TOLERANCE:
            sys.exit(f"error: the first losses differ by {loss}, expected < {TOLERANCE}: not the same runs")
        rates = steady(log, users, args.seconds, repeats)
    for name, row in rates.items():
        print(
            f"  {name:<28} {row['events_per_second']:>9,.0f} events/s  {row['events_per_cpu_second']:>9,.0f} per CPU s"
        )
    found = ratios(whole, rates)
    for way, row in found.items():
        print(f"{way} over one after another: " + ", ".join(f"{key} {value:.2f}x" for key, value in row.items()))
    result: dict[str, Any] = {"quick": args.quick, "users": users, "differences": differences, "load_average": load}
    save("packed", result | {"whole_runs": whole, "steps": rates, "ratios": found})


if __name__ == "__main__":
    main()
