"""Speed of the planted simulator and of its exact filter, on one core.

    OPENBLAS_NUM_THREADS=1 python benchmarks/planted.py [--users=20000] [--out=benchmarks/results/planted.json]

Prints a table and writes JSON: events generated per second, and per history length the targets and filter steps (one
event of one window) per second. The default settings of `Planted`; the evaluation view is the last 60 events of users.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from recscale.data import planted, planted_floors
from recscale.data.splits import View

EVALUATION_USERS = 1_000
EVALUATION_EVENTS = 60


def last_events(log, users: int, events: int) -> View:
    """The last `events` events of the first `users` users as targets (fewer where a user has fewer)."""
    start, stop = log.offsets[:users], log.offsets[1 : users + 1]
    return View("test", np.arange(users, dtype=np.int32), start, np.maximum(stop - events, start + 1), stop)


def seconds(work, repeats: int) -> float:
    """Best wall time of `repeats` calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/planted.json"))
    args = parser.parse_args()

    rows = []
    for born in (False, True):
        config = planted.Planted(users=args.users, born=born)
        planted.world(config)
        log = planted.generate(config)
        wall = seconds(lambda config=config: planted.generate(config), 3)
        rows.append({"what": "generate", "born": born, "events": log.num_events, "seconds": wall})
        rows[-1]["events_per_second"] = log.num_events / wall

    config = planted.Planted(users=args.users)
    log = planted.generate(config)
    view = last_events(log, min(EVALUATION_USERS, args.users), EVALUATION_EVENTS)
    for history in (1, 8, 64, None):
        first = view.start if history is None else np.maximum(view.start, view.target_start - history)
        steps = view.stop - first
        if history is not None:
            targets = view.stop - view.target_start
            offset = np.arange(targets.sum()) - np.repeat(np.cumsum(targets) - targets, targets)
            behind = np.repeat(view.target_start - view.start, targets) + offset
            steps = np.minimum(behind, history) + 1
        n = int((view.stop - view.target_start).sum())
        wall = seconds(lambda h=history: planted_floors.next_item_nats(config, log, view, h, context=True), 1)
        rows.append({"what": "filter", "history": history, "targets": n, "steps": int(steps.sum()), "seconds": wall})
        rows[-1] |= {"targets_per_second": n / wall, "steps_per_second": int(steps.sum()) / wall}

    for row in rows:
        print("  ".join(f"{k}={v:,.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    result = {
        "states": config.interests * config.types,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "library default"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
