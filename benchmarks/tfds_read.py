"""Reading users: the memory-mapped event log against the same log as a tensorflow-datasets data source.

    python -m benchmarks.tfds_read [--users=20000] [--reads=5000] [--rounds=5]

Both hand out, in the same seeded random order, one user's columns as arrays of their own. The rounds alternate between
the readers; the table gives the median rate of each and the ratio to the event log. Also written to
benchmarks/results/tfds_read.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from recscale.data.event_log import EventLog
from recscale.data.event_log_writer import write
from recscale.data.planted import Planted, generate
from recscale.data.tfds_builders import to_tfds

RESULT = Path(__file__).parent / "results/tfds_read.json"
BATCH = 100
EVENT_LOG = "event log, one user at a time"


def readers(log: EventLog, source: Any) -> dict[str, Callable[[np.ndarray], int]]:
    """Name -> function that reads the given users and returns the sum of their item ids, so that nothing is skipped."""
    columns = {name: np.asarray(values) for name, values in log.events.items()}
    offsets = np.asarray(log.offsets)

    def from_log(users: np.ndarray) -> int:
        total = 0
        for user in users:
            start, stop = offsets[user], offsets[user + 1]
            example = {name: values[start:stop].copy() for name, values in columns.items()}
            total += int(example["item_id"].sum())
        return total

    def from_source(users: np.ndarray) -> int:
        return sum(int(source[user]["item_id"].sum()) for user in users)

    def from_source_in_batches(users: np.ndarray) -> int:
        total = 0
        for first in range(0, len(users), BATCH):
            examples = source.__getitems__(users[first : first + BATCH].tolist())
            total += sum(int(example["item_id"].sum()) for example in examples)
        return total

    return {
        EVENT_LOG: from_log,
        "TFDS data source, one user at a time": from_source,
        f"TFDS data source, {BATCH} users at a time": from_source_in_batches,
    }


def measure(num_users: int, reads: int, rounds: int) -> dict[str, Any]:
    """Median users/s of each reader over `rounds` alternating rounds of `reads` random users."""
    with tempfile.TemporaryDirectory() as folder:
        log = write(generate(Planted(users=num_users)), Path(folder) / "log")
        began = time.perf_counter()
        dataset = to_tfds(log, folder, "planted")
        written = num_users / (time.perf_counter() - began)
        source = tfds.builder_from_directory(dataset).as_data_source(split="train")
        rng = np.random.default_rng(0)
        rates: dict[str, list[float]] = {}
        for _ in range(rounds):
            users = rng.integers(0, num_users, reads)
            sums = set()
            for name, read in readers(log, source).items():
                began = time.perf_counter()
                sums.add(read(users))
                rates.setdefault(name, []).append(reads / (time.perf_counter() - began))
            if len(sums) != 1:
                raise RuntimeError(f"the readers disagree on the item ids of {reads} users: sums {sorted(sums)}")
        users_per_second = {name: statistics.median(values) for name, values in rates.items()}
        return {
            "users": num_users,
            "events": log.num_events,
            "columns": sorted(log.events),
            "reads": reads,
            "rounds": rounds,
            "users_per_second": users_per_second,
            "event_log_over": {name: users_per_second[EVENT_LOG] / rate for name, rate in users_per_second.items()},
            "tfds_users_written_per_second": written,
            "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "load": os.getloadavg()[0]},
            "versions": {name: version(name) for name in ("tensorflow-datasets", "array-record", "numpy")},
        }


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--reads", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    result = measure(args.users, args.reads, args.rounds)
    print(f"{result['users']:,} users, {result['events']:,} events, columns {', '.join(result['columns'])}")
    print(f"{'random reads':<40}{'users/s':>12}{'event log is faster by':>26}")
    for name, rate in result["users_per_second"].items():
        print(f"{name:<40}{rate:>12,.0f}{result['event_log_over'][name]:>25.1f}x")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
