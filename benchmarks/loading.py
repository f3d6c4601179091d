"""Real tokens per second of packed and padded loading on one core, from a memory-mapped event log.

Command: python -m benchmarks.loading (about 30 s). Synthetic log-normal histories (median 43 events, L 200), and where
RECSCALE_DATA is set ML-1M (L 200) and Amazon Beauty (L 50). Each rate is the median of five timings of about one
second; the columns are direct reads (`loader[i]`) and the Grain iterator with and without its prefetch thread.
Writes benchmarks/results/loading.json.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from recscale.data import splits
from recscale.data.event_log import Column, EventLog
from recscale.data.event_log_writer import write
from recscale.data.loading import Loader

RESULTS = Path(__file__).parent / "results" / "loading.json"
BATCH = 128
REPEATS, SECONDS = 5, 0.6
COLUMNS = {"item_id": Column("id"), "timestamp": Column("time")}
REAL = {"ml-1m": ("movielens/ml1m.parquet", 200), "beauty": ("amazon2014/beauty.parquet", 50)}


def synthetic(users: int = 200_000, items: int = 50_000) -> EventLog:
    """Log-normal history lengths (median 43, mean about 79), skewed items, gaps of an hour on average."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(43), 1.1, users), 3, 5000).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    item = (items ** rng.random(offsets[-1])).astype(np.int32)
    clock = np.cumsum(rng.exponential(3600, offsets[-1]).astype(np.int64))
    seconds = clock - np.repeat(clock[offsets[:-1]], lengths)
    return EventLog(offsets, {"item_id": item, "timestamp": seconds}, COLUMNS, num_items=items)


def from_parquet(path: Path) -> EventLog:
    """The log of a file sorted by user and place; without times where the file has none."""
    table = pq.read_table(path, columns=["user_id", "item_id", "timestamp"])
    _, user = np.unique(table["user_id"].to_numpy(), return_inverse=True)
    known, item = np.unique(table["item_id"].to_numpy(), return_inverse=True)
    events = {"item_id": (item + 1).astype(np.int32)}
    if not table["timestamp"].null_count:
        events["timestamp"] = table["timestamp"].to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64)
    return EventLog(offsets, events, {name: COLUMNS[name] for name in events}, num_items=len(known))


def logs() -> Iterator[tuple[str, int, EventLog]]:
    yield "synthetic", 200, synthetic()
    root = os.environ.get("RECSCALE_DATA")
    if not root:
        print("RECSCALE_DATA is not set: ML-1M and Beauty are left out.")
        return
    for name, (file, length) in REAL.items():
        yield name, length, from_parquet(Path(root) / file)


def rate(loader: Loader, step: Callable[[], dict[str, np.ndarray]]) -> float:
    """Median real tokens per second of `step`, which returns the next batch."""
    tokens_per_step = loader.fill * BATCH * loader.row_length
    step()
    rates = []
    for _ in range(REPEATS):
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < SECONDS:
            step()
            steps += 1
        rates.append(steps * tokens_per_step / (time.perf_counter() - begin))
    return statistics.median(rates)


def measure(log: EventLog, length: int, layout: str) -> dict[str, float]:
    view = splits.leave_one_out(log)["train"]
    begin = time.perf_counter()
    loader = Loader(log, view, batch_size=BATCH, length=length, layout=layout)
    planned = time.perf_counter() - begin
    counter = iter(range(10**9))
    inline, threaded = loader.iterator(prefetch=0), loader.iterator(prefetch=2)
    return {
        "fill": loader.fill,
        "rows": loader.num_rows,
        "real_tokens": loader.real_tokens,
        "plan_seconds": planned,
        "direct": rate(loader, lambda: loader[next(counter)]),
        "grain": rate(loader, lambda: next(inline)),
        "grain_thread": rate(loader, lambda: next(threaded)),
    }


def main() -> None:
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else None
    if core is not None:
        os.sched_setaffinity(0, {core})
    results = []
    headings = f"{'rows':>8} {'plan s':>7} {'Mtok/s':>7} {'grain':>7} {'+thread':>7}"
    print(f"{'log':10} {'L':>4} {'layout':7} {'fill':>6} {headings}")
    for name, length, memory in logs():
        with tempfile.TemporaryDirectory() as folder:
            log = write(memory, Path(folder) / "log")
            for layout in ("packed", "padded"):
                found = measure(log, length, layout)
                results.append({"log": name, "length": length, "layout": layout, **found})
                speeds = " ".join(f"{found[key] / 1e6:7.2f}" for key in ("direct", "grain", "grain_thread"))
                numbers = f"{found['fill']:6.4f} {found['rows']:8} {found['plan_seconds']:7.3f} {speeds}"
                print(f"{name:10} {length:4} {layout:7} {numbers}")
    machine = {"python": platform.python_version(), "numpy": np.__version__, "cores_used": 1, "cpus": os.cpu_count()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "batch_rows": BATCH, "results": results}, indent=1) + "\n")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
