"""One run of a pack (train_pack.py): its folder, its data, how far it is, and what is due at a step.

Its files are those that recscale.train would write; each of the two goes on where the other was stopped.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from recscale import branch, record
from recscale.checkpoint import Checkpoints
from recscale.data.event_log import EventLogError
from recscale.evaluate import NonFiniteScore, evaluate_split
from recscale.lease import Held
from recscale.preemption import Guard, Preempted
from recscale.program import abstract_state
from recscale.run import Run, build, collapse, costs, seen
from recscale.train import UNMEASURED, out_of_patience, parameters_finite, selected
from recscale.worker import Worker, finished, one_line, open_record

FAILURES = (Held, EventLogError, ValueError, TypeError, OSError)
State = dict[str, Any]


class Member:
    """A run from its config and workdir. As a context manager it passes on what ends it while it is still running.

    outcome: None while it runs, then its record, or the error that ended it. step: of its state. size: runs and devices
    of the pack, for the record.
    """

    def __init__(self, config: ConfigDict, workdir: Path, mirrors: str, origin: float | None, guard: Guard):
        self.config, self.workdir = config, workdir
        self.worker = Worker(workdir, mirrors, origin, guard)
        self.outcome: dict[str, Any] | Exception | None = None
        self.status, self.reason, self.step, self.size = "ok", "", 0, (1, 1)
        self._stack, self._saved, self._compiled = contextlib.ExitStack(), -1, False

    def __enter__(self) -> "Member":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def running(self) -> bool:
        """Whether there is something left to do."""
        return self.outcome is None

    @property
    def due(self) -> bool:
        """Whether something is to be done with the state of this step besides training on."""
        c = self.config.train
        every = any(n and self.step % n == 0 for n in (c.eval_every, c.checkpoint_every))
        return every or self.step in c.keep_steps or self.step == self.run.steps

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """The result of an action; an error of this run's config, data or files ends this run and no other."""
        try:
            return action(*arguments)
        except FAILURES as error:
            self.outcome = error
            print(f"{self.workdir}: {one_line(error)}", file=sys.stderr)
            self._stack.__exit__(type(error), error, error.__traceback__)

    # From the folder to the first step ------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the lease and open the record; a finished run is left alone."""
        if (book := finished(self.config.to_dict(), self.workdir)) is not None:
            print(f"{self.workdir}: finished before ({book['status']}); nothing to do", file=sys.stderr)
            self.outcome = book
            return
        self._stack.enter_context(self.worker)
        self.book = open_record(self.config.to_dict(), self.workdir)
        self.worker.started(self.book)
        self.book |= {"status": "running", "reason": ""}
        record.write(self.workdir, self.book)

    def build(self, like: Run | None) -> None:
        """Build the run, sharing with `like` what evaluation compiles for."""
        run = build(self.config)
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

    def read(self, step: int, loss: float, steps_per_second: float) -> None:
        """Note the loss of a step; one that is not finite ends the run as diverged."""
        finite, every = math.isfinite(loss), self.config.train.log_every
        if (every and step % every == 0) or not finite:  # JSON has no NaN
            self._write({"step": step, "loss": loss if finite else None, "seconds": round(self._elapsed(), 3)})
        if not self._compiled:
            self.worker.events.add("compiled", step=step)
            self._compiled = True
        self.worker.alive(step, self.run.steps, loss, steps_per_second * self.events_per_step)
        if not finite:
            self.status, self.reason = "diverged", f"loss {loss} at step {step}"

    def pause(self, state: State) -> None:
        """Do what is due at this step, save, and finish the run where this was its last."""
        if self.status == "ok" and not parameters_finite(state):
            self.status, self.reason = "diverged", f"parameters after step {self.step} are not finite or beyond 1e19"
        if self.status == "ok" and self.due:
            if self.worker.leaving():
                self.save(state, **{UNMEASURED: 1})
                return
            try:
                self._measure(state)
            except Preempted:
                self.save(state, **{UNMEASURED: 1})
                raise
        if self.status == "ok":
            self.save(state)
        if self.status != "ok" or self._over():
            self._finish(state)

    def save(self, state: State, **data: int) -> None:
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
                self.best.save(step, state, {"next_index": step})
                self.best.wait()  # a run resumed at this step must find it
        if step in c.keep_steps:
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
                np.savez(self.workdir / f"per_target_{split}.npz", allow_pickle=False, **per_target)
            book |= {"selected_step": chosen or step, "cooled": branch.cooled(run, chosen or step)}
        rows = [row | {"cooled": branch.cooled(run, row["step"])} for row in self.metrics.evaluations()]
        book["evaluations"] = [row for row in rows if "final" in row]
        book["curve"] = [row for row in rows if "final" not in row]
        book |= costs(run, step) | {"seen": seen(run, step), "stopped_at": step}
        book |= {"status": self.status, "reason": self.reason}
        book["table"] |= {"extra_rounds": extra_rounds, "lost_rows": lost_rows}
        if self.status == "ok":
            book["table"]["information_abundance"] = collapse(run, state)
        (members, devices), wall = self.size, self._elapsed()
        book["pack"] = {"members": members, "devices": devices}
        book["seconds"] = {"wall": wall, "device": wall * devices / members}
        record.write(self.workdir, book)
        self._files.close()
        self.worker.done(book)
        self._end()

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
        return time.monotonic() - self.began

    def _end(self) -> None:
        self._stack.close()
        self.outcome = self.book
