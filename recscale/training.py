"""One run being trained: its folder, its data, how far it is, and what is due at a step. The loops are elsewhere.

train.py takes the steps of one run, train_pack.py those of several in one program; either goes on where the other was
stopped, for all that a run does besides its steps is here.
"""

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from recscale import branch, record
from recscale.checkpoint import Checkpoints
from recscale.evaluate import NonFiniteScore, evaluate_split
from recscale.preemption import Guard, Preempted
from recscale.program import abstract_state
from recscale.run import Run, build, collapse, costs, seen
from recscale.worker import Worker, finished, open_record

UNMEASURED = "unmeasured"  # in a checkpoint: its step is still to be evaluated, and kept where it should be
State = dict[str, Any]


class Training:
    """A run from its config and workdir. Call open, build and start; then for every step read and, where due, pause.

    As a context manager it passes on what ends it while it is running. ended: whether the record is complete. step: of
    its state. pack: runs and devices that share a program with it, None where it is alone. The other arguments are
    those of worker.Worker.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        mirrors: str = "",
        origin: float | None = None,
        guard: Guard | None = None,
    ):
        self.config, self.workdir = config, workdir
        self.worker = Worker(workdir, mirrors, origin, guard)
        self.ended, self.status, self.reason, self.step = False, "ok", "", 0
        self.pack: tuple[int, int] | None = None
        self.book: dict[str, Any] = {}
        self._stack, self._saved, self._first = contextlib.ExitStack(), -1, (0.0, -1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def due(self) -> bool:
        """Whether something is to be done with the state of this step besides training on."""
        c = self.config.train
        every = any(n and self.step % n == 0 for n in (c.eval_every, c.checkpoint_every))
        return every or self.step in c.keep_steps or self.step == self.run.steps

    @property
    def events_per_second(self) -> float:
        """Speed of this attempt, counted from the end of its first step, which compiles."""
        now, (began, step) = time.monotonic(), self._first
        return max(self.step - step, 0) * self.events_per_step / max(now - began, 1e-9) if step >= 0 else 0.0

    # From the folder to the first step ------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the lease and open the record; a finished run is left alone.

        Raises Held where another worker is on the folder, ValueError where it belongs to another config.
        """
        if (book := finished(self.config.to_dict(), self.workdir)) is not None:
            print(f"{self.workdir}: finished before ({book['status']}); nothing to do", file=sys.stderr)
            self.book, self.ended = book, True
            return
        self._stack.enter_context(self.worker)
        self.book = open_record(self.config.to_dict(), self.workdir)
        self.worker.started(self.book)
        self.book |= {"status": "running", "reason": ""}
        record.write(self.workdir, self.book)

    def build(self, like: Run | None = None) -> None:
        """Build the run, sharing with `like` what evaluation compiles for."""
        run = build(self.config)
        if getattr(run.model_config, "anchor", "event") != "event":
            raise ValueError(
                f"model.anchor = {run.model_config.anchor!r} measures positions and times from the end of a history, "
                "which training on every position would give away: train with model.anchor = 'event'"
            )
        if like is not None:
            task = like.task if run.task.config == like.task.config else run.task
            run = dataclasses.replace(run, mesh=like.mesh, tables=like.tables, task=task)
        self.run = run
        self.book |= branch.facts(run) | costs(run, run.steps) | {"seen": seen(run, run.steps), "steps": run.steps}
        record.write(self.workdir, self.book)

    def start(self) -> State | None:
        """The state from which the run goes on, None: a fresh one. Does first what was due when it was stopped."""
        self._files = self._stack.enter_context(contextlib.ExitStack())
        self.checkpoints = self._files.enter_context(Checkpoints(self.workdir / "checkpoints", keep=2))
        self.best = self._files.enter_context(Checkpoints(self.workdir / "best", keep=1))
        state, data = None, {}
        if (newest := self.checkpoints.restore_newest(abstract_state(self.run))) is not None:
            _, state, data = newest
            self.step = self._saved = data["next_index"]
            print(f"{self.workdir}: resumed at step {self.step}", file=sys.stderr)
        elif self.config.train.branch_from:
            state, self.step = branch.first_state(self.run)
        self.metrics = record.Metrics(self.workdir, self.step, UNMEASURED not in data)
        self.batches = self.run.loader.iterator(self.step)
        self.events_per_step = self.run.loader.real_tokens / self.run.loader.num_rows * self.run.loader.batch_size
        self.began = time.monotonic() - self.metrics.seconds()
        self.worker.ready(self.step)
        if state is not None:
            if UNMEASURED in data:
                self._measure(state)
            if self.status != "ok" or self._over():
                self._finish(state)
        return state

    # Along the way --------------------------------------------------------------------------------------------------

    def read(self, step: int, loss: float) -> None:
        """Note the loss of a step; one that is not finite ends the run as diverged."""
        if self.status != "ok":
            return
        finite, every = math.isfinite(loss), self.config.train.log_every
        if (every and step % every == 0) or not finite:  # JSON has no NaN
            self._write({"step": step, "loss": loss if finite else None, "seconds": round(self._elapsed(), 3)})
        if self._first[1] < 0:
            self._first = (time.monotonic(), step)
            self.worker.events.add("compiled", step=step)
        self.worker.alive(step, self.run.steps, loss, self.events_per_second)
        if not finite:
            self.status, self.reason = "diverged", f"loss {loss} at step {step}"

    def pause(self, state: State, leaving: bool) -> None:
        """Do what is due at this step, save, and finish the run where this was its last. leaving: only save.

        Raises Preempted, the state being saved, where the run is told to stop while it is evaluated.
        """
        if self.status == "ok" and not parameters_finite(state):  # the loss is of the parameters before this step
            self.status, self.reason = "diverged", f"parameters after step {self.step} are not finite or beyond 1e19"
        if self.status == "ok" and self.due:
            if leaving:
                self._save(state, **{UNMEASURED: 1})
                return
            try:
                self._measure(state)
            except Preempted:
                self._save(state, **{UNMEASURED: 1})
                raise
        if self.status == "ok":
            self._save(state)
        if self.status != "ok" or self._over():
            self._finish(state)

    def _save(self, state: State, **data: int) -> None:
        """Write a checkpoint of this step, unless it is there."""
        if self._saved == self.step:
            return
        began = self.worker.events.clock()
        self.checkpoints.save(self.step, state, {"next_index": self.step} | data)
        self.worker.events.add("save", step=self.step, seconds=round(self.worker.events.clock() - began, 3))
        self._saved = self.step

    def _measure(self, state: State) -> None:
        """Evaluate, and select or keep the state, where that is due at this step."""
        c, step = self.config.train, self.step
        if c.eval_every and (step == self.run.steps or step % c.eval_every == 0):
            try:
                rows, _ = self._evaluated(state, self.config.eval.during, step, False)
            except NonFiniteScore as error:
                self.status, self.reason = "diverged", f"step {step}: {error}"
                return
            for row in rows:
                self._write(row)
            if selected(self.metrics.rows, self.config) == step:
                self.checkpoints.wait()  # on several processes Orbax cannot finish two saves at a time
                self.best.save(step, state, {"next_index": step})
                self.best.wait()  # a run resumed at this step must find it
        if step in c.keep_steps:
            self.checkpoints.wait()
            branch.keep(self.run, self.workdir, step, state)

    def _finish(self, state: State) -> None:
        """The final evaluation, the complete record, and DONE."""
        run, step, book = self.run, self.step, self.book
        extra_rounds, lost_rows = (int(x) for x in state["overflow"])
        if self.status == "ok":
            chosen = selected(self.metrics.rows, self.config)
            if chosen is not None:
                state, _ = self.best.restore(chosen, state)
            for split in self.config.eval.final:
                rows, per_target = self._evaluated(state, split, chosen or step, True)
                for row in rows:
                    self._write(row | {"final": True})
                if record.is_writer():
                    np.savez(self.workdir / f"per_target_{split}.npz", allow_pickle=False, **per_target)
            book |= {"selected_step": chosen or step, "cooled": branch.cooled(run, chosen or step)}
        rows = [row | {"cooled": branch.cooled(run, row["step"])} for row in self.metrics.evaluations()]
        book["evaluations"] = [row for row in rows if "final" in row]
        book["curve"] = [row for row in rows if "final" not in row]
        book |= costs(run, step) | {"seen": seen(run, step), "stopped_at": step}
        book |= {"status": self.status, "reason": self.reason}
        book["table"] |= {"extra_rounds": extra_rounds, "lost_rows": lost_rows}
        if self.status == "ok":
            book["table"] |= collapse(run, state)
        wall, devices = self._elapsed(), float(run.mesh.size)
        if self.pack is not None:
            book["pack"] = {"members": self.pack[0], "devices": self.pack[1]}
            devices = self.pack[1] / self.pack[0]
        book["seconds"] = {"wall": wall, "device": wall * devices}
        self._files.close()
        record.write(self.workdir, book)
        self.worker.done(book)
        self.ended = True
        self._stack.close()

    def _evaluated(self, state: State, split: str, step: int, final: bool):
        began = self.worker.events.clock()
        found = evaluate_split(self.run, state, split, step, final, self.worker.poll)
        seconds = round(self.worker.events.clock() - began, 3)
        self.worker.events.add("evaluation", step=step, split=split, seconds=seconds)
        return found

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        self.worker.log(row)

    def _over(self) -> bool:
        return self.step >= self.run.steps or out_of_patience(self.metrics.rows, self.config, self.step)

    def _elapsed(self) -> float:
        """Seconds of the run so far, restarts left out."""
        return time.monotonic() - self.began


def selected(rows: list[dict[str, Any]], config: ConfigDict) -> int | None:
    """The evaluation step with the best value of train.select ("metric max" or "metric min"); None without one."""
    if not config.train.select:
        return None
    metric, direction = config.train.select.split()
    values = {
        r["step"]: r["value"] for r in rows if r.get("metric") == metric and r["slice"] == "all" and "final" not in r
    }
    values = {step: value for step, value in values.items() if value is not None}  # an undefined AUC selects nothing
    if not values:
        found = sorted({r["metric"] for r in rows if "metric" in r and "final" not in r})
        if found:
            raise ValueError(f"train.select = {config.train.select!r}: evaluation gives {found}")
        return None
    return (max if direction == "max" else min)(values, key=lambda s: values[s])


def out_of_patience(rows: list[dict[str, Any]], config: ConfigDict, step: int) -> bool:
    """Whether train.patience evaluations have passed since the selected one."""
    chosen = selected(rows, config)
    patience = config.train.patience * config.train.eval_every
    return bool(patience) and chosen is not None and step - chosen >= patience


_norm = jax.jit(optax.tree.norm)


def parameters_finite(state: State) -> bool:
    """Whether the square of every parameter, tables included, is finite in float32. Integer codes are no parameters."""
    leaves = jax.tree.leaves((state["model"], state["mixers"], state["tables"]))
    return math.isfinite(_norm([x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]))


class Line:
    """A line on stderr about what is going on: rewritten on a terminal, every ten seconds in a pipe."""

    def __init__(self) -> None:
        self.shown = time.monotonic()

    def show(self, text: str, last: bool = False) -> None:
        """Print it where its time has come; last: in any case."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if last or now - self.shown >= (0.5 if terminal else 10.0):
            self.shown = now
            print(text, end="\r" if terminal else "\n", file=sys.stderr, flush=True)


def progress(step: int, steps: int, events_per_second: float, events_per_step: float) -> str:
    """Speed and time left, as far as they are known."""
    if not events_per_second:
        return "compiled"
    return f"{events_per_second:,.0f} events/s  ETA {(steps - step) * events_per_step / events_per_second:.0f}s"
