"""Optional mirrors of the rows of metrics.jsonl: TensorBoard, Weights & Biases, trackio. The files stay the truth.

A mirror is shown a row after it was written, by a thread of its own, from process 0. Whatever goes wrong there (package
missing, disk full, no network, no answer at all) is said once, counted, and stops nothing.
"""

import importlib
import math
import netrc
import os
import queue
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

WAITING_ROWS = 1000  # per mirror; more are dropped and counted
CLOSE_SECONDS = 10.0  # for all mirrors together; a run that is told to stop has little time


class Mirror(Protocol):
    """What shows numbers elsewhere. Called from one thread."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show named numbers of a step; steps may come again, or smaller than before."""

    def close(self) -> None:
        """Finish what was begun."""


class TensorBoard:
    """Event files in WORKDIR/tensorboard, written by tensorboardX; TensorFlow is not needed."""

    def __init__(self, workdir: Path, record: Mapping[str, Any], step: int):
        del record
        package = importlib.import_module("tensorboardX")
        # What an earlier attempt wrote beyond its last save is not shown twice.
        self._writer = package.SummaryWriter(logdir=str(workdir / "tensorboard"), purge_step=step, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; offline, for `wandb sync`, where WANDB_MODE says so or no key is there. Never asks."""

    def __init__(self, workdir: Path, record: Mapping[str, Any], step: int):
        del step
        package = importlib.import_module("wandb")
        self._run = package.init(
            project=record["study"] or "recscale",
            id=record["run_id"],
            name=record["run_id"],
            config=dict(record["config"]),
            dir=str(workdir),
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_key(os.environ) else "offline"),
            resume="allow",
            settings=package.Settings(  # without the timeouts a process without network would wait at its end
                silent=True, console="off", login_timeout=5, init_timeout=5, finish_timeout=CLOSE_SECONDS - 2
            ),
        )
        self._run.define_metric("*", step_metric="step")  # its own counter takes no step twice

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio: a local database (TRACKIO_DIR, else trackio's own folder), shown by `trackio show`."""

    def __init__(self, workdir: Path, record: Mapping[str, Any], step: int):
        del workdir, step
        package = importlib.import_module("trackio")
        self._run = package.init(
            project=record["study"] or "recscale",
            name=record["run_id"],
            config=dict(record["config"]),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


MIRRORS: dict[str, Callable[[Path, Mapping[str, Any], int], Mirror]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
"""name -> what opens it: (workdir, record, first step) -> Mirror."""


class Mirrors:
    """The mirrors of a run. failures: name -> rows that were not shown, for an error or because it was too slow."""

    def __init__(self, names: list[str], workdir: Path, record: Mapping[str, Any]):
        self._threads = {name: _Thread(name, workdir, record) for name in names}

    @property
    def failures(self) -> dict[str, int]:
        """name -> rows not shown so far."""
        return {name: thread.failures for name, thread in self._threads.items()}

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Hand a row of metrics.jsonl to every mirror; returns at once."""
        for thread in self._threads.values():
            thread.put((step, scalars(row)))

    def close(self) -> None:
        """Let every mirror finish, within CLOSE_SECONDS for all of them; says which rows were not shown."""
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads.values():
            thread.put(None)
        for thread in self._threads.values():
            thread.end(until)


def open_mirrors(names: str, workdir: Path, record: Mapping[str, Any]) -> Mirrors:
    """Mirrors by name, comma-separated; each opens at its first row. Raises ValueError for an unknown name."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in MIRRORS]
    if unknown:
        raise ValueError(f"--mirror={names}: found {', '.join(unknown)}, expected some of {', '.join(MIRRORS)}")
    return Mirrors(chosen, workdir, record)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by name: train/loss, test/all/ndcg@10 and, of the last ones, final/..."""
    if "metric" not in row:
        return {f"train/{name}": float(value) for name, value in row.items() if name != "step" and _is_number(value)}
    place = f"{'final/' if row.get('final') else ''}{row['split']}/{row['slice']}/{row['metric']}"
    found: dict[str, Any] = {place: row["value"], f"{place}.stderr": row.get("stderr")}
    return {name: float(value) for name, value in found.items() if _is_number(value)}


class _Thread:
    """Shows rows in one mirror. It is a daemon: a mirror that never answers does not keep the process alive."""

    def __init__(self, name: str, workdir: Path, record: Mapping[str, Any]):
        self.name, self.workdir, self.record = name, workdir, record
        self.failures, self._said, self._broken = 0, False, False
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING_ROWS)
        self._mirror: Mirror | None = None
        self._thread = threading.Thread(target=self._work, name=f"mirror-{name}", daemon=True)
        self._thread.start()

    def put(self, item: tuple[int, dict[str, float]] | None) -> None:
        try:
            self._rows.put_nowait(item)
        except queue.Full:
            if item is not None:
                self._fail(f"{WAITING_ROWS} rows wait, and it takes no more")

    def end(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self.failures += self._rows.qsize()
            self._say(f"not finished after {CLOSE_SECONDS:.0f} s")
        if self.failures:
            print(f"mirror {self.name}: {self.failures} rows were not shown", file=sys.stderr)

    def _work(self) -> None:
        while (item := self._rows.get()) is not None:
            if self._broken:
                self.failures += 1
                continue
            try:
                if self._mirror is None:
                    self._broken = True  # unless it opens
                    self._mirror = MIRRORS[self.name](self.workdir, self.record, item[0])
                    self._broken = False
                self._mirror.log(*item)
            except BaseException as error:  # a library may leave by SystemExit: this thread is all that it can end
                self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        try:
            if self._mirror is not None:
                self._mirror.close()
        except BaseException as error:
            self._say(f"closing: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _fail(self, reason: str) -> None:
        self.failures += 1
        self._say(reason)

    def _say(self, reason: str) -> None:
        if not self._said:
            self._said = True
            hint = "; pip install 'recscale[mirrors]'" if reason.startswith("ModuleNotFoundError") else ""
            print(f"mirror {self.name}: {reason}{hint}; the run goes on, its files have every row", file=sys.stderr)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _has_key(environment: Mapping[str, str]) -> bool:
    """Whether Weights & Biases has a key: in WANDB_API_KEY, or in the netrc file that `wandb login` writes."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(environment.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
