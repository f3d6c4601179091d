"""A worker that costs nothing: it obeys the contract of a run folder without training. python stand_in.py WORKDIR PLAN

PLAN: words with commas, one per attempt, the last one repeated: done, restart (42), held (75), crash (status 1), kill
(itself), hang (until told to stop, then 42), slow (a second, then done).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from recscale.lease import Held, Lease


def main(workdir: Path, plan: list[str]) -> int:
    try:
        with Lease.take(workdir):
            return work(workdir, plan)
    except Held:
        return 75


def work(workdir: Path, plan: list[str]) -> int:
    attempts = workdir / "attempts"
    past = len(attempts.read_text()) if attempts.exists() else 0
    attempts.write_text("x" * (past + 1))
    rows = [
        {"event": "start", "host": "here", "pid": os.getpid(), "processes": 1},
        {"event": "ready", "step": past},
        {"event": "alive", "step": past + 1, "steps": 10, "loss": 2.5, "events_per_second": 100.0},
    ]
    with (workdir / "events.jsonl").open("a") as file:
        for clock, row in enumerate(rows):
            file.write(json.dumps({"wall": time.time(), "clock": float(clock), "attempt": past} | row) + "\n")
    word = plan[min(past, len(plan) - 1)]
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        while not told:
            time.sleep(0.02)
        return 42
    if word in ("restart", "crash"):
        print("about to fail" if word == "crash" else "saved")
        return {"restart": 42, "crash": 1}[word]
    time.sleep(1.0 if word == "slow" else 0.0)
    record = {"schema_version": 1, "status": "ok", "reason": ""}
    (workdir / "record.json").write_text(json.dumps(record))
    (workdir / "DONE").write_text("ok\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2].split(",")))
