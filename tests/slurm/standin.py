"""A trainer that does nothing but keep the contract of a run: python -m tests.slurm.standin --workdir=R [--steps=N] ...

Every step all processes share a number; "loss" follows from the step and from all of them. It resumes from its state,
polls every step, saves when told to stop and leaves with 42, writes DONE last, FAILED with a reason where it breaks.
One process alone does without jax, so that a test of the scheduling is quick.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from recscale.lease import Held, Lease

RESTART, HELD = 42, 75


def main() -> int:
    arguments = parse()
    alone = int(os.environ["SLURM_NTASKS"]) == 1
    peers = Alone(arguments.deaf) if alone else Peers(str(arguments.workdir))
    if peers.rank:
        return train(arguments, peers)
    try:
        with Lease.take(arguments.workdir):
            return train(arguments, peers)
    except Held as held:
        print(held)
        return HELD


def train(arguments: argparse.Namespace, peers) -> int:
    workdir = arguments.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    state = workdir / "state.json"
    step, attempt = json.loads(state.read_text()) if state.exists() else (0, 0)
    peers.share(attempt)  # all have read before one writes
    if peers.rank == 0:
        (workdir / "FAILED").unlink(missing_ok=True)
        state.write_text(json.dumps([step, attempt + 1]))
    while step < arguments.steps:
        step += 1
        total = peers.share(step * (peers.rank + 1))
        time.sleep(arguments.seconds)
        if peers.rank == 0:
            place = {"host": os.environ["SLURMD_NODENAME"], "port": os.environ.get("JAX_COORDINATOR_PORT", "")}
            row = {"step": step, "loss": total, "processes": peers.count, "attempt": attempt}
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row | place) + "\n")
        if step == arguments.crash_at:
            (workdir / "FAILED").write_text(f"error: step {step}: told to crash\n")
            return 1
        if step == arguments.kill_at and attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if peers.told(step):
            time.sleep(arguments.save_seconds)
            if peers.rank == 0:
                state.write_text(json.dumps([step, attempt + 1]))
            peers.leave()
            print(f"saved step {step}", flush=True)
            return RESTART
        if arguments.save_every and step % arguments.save_every == 0 and peers.rank == 0:
            state.write_text(json.dumps([step, attempt + 1]))
    peers.leave()
    if peers.rank == 0:
        (workdir / "DONE").write_text("ok\n")
    return 0


class Alone:
    """One process: the signal is heard here."""

    rank, count = 0, 1

    def __init__(self, deaf: int):
        self.signals, self.deaf = 0, deaf
        signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, *_: object) -> None:
        self.signals += 1

    def share(self, value: int) -> int:
        return value

    def told(self, step: int) -> bool:
        return self.signals > self.deaf

    def leave(self) -> None:
        pass


class Peers:
    """Several processes: jax tells all of them at the same step."""

    def __init__(self, run: str):
        from jax.experimental import multihost_utils

        from recscale import distributed

        place = distributed.join(run=run)
        self.distributed, self.utils, self.rank, self.count = distributed, multihost_utils, place.index, place.count

    def share(self, value: int) -> int:
        import numpy as np

        return int(self.utils.process_allgather(np.array([value])).sum())

    def told(self, step: int) -> bool:
        return self.utils.reached_preemption_sync_point(step)

    def leave(self) -> None:
        self.distributed.leave()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--save_seconds", type=float, default=0.0)
    parser.add_argument("--save_every", type=int, default=0)
    parser.add_argument("--crash_at", type=int, default=0)
    parser.add_argument("--kill_at", type=int, default=0)
    parser.add_argument("--deaf", type=int, default=0, help="signals that are not heeded")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
