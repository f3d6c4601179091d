"""Train one model: python -m recscale.train --config=configs/hstu_ml1m.py --workdir=runs/hstu_ml1m --config.seed=1

An existing workdir is resumed; a finished one is left alone. The workdir holds record.json, metrics.jsonl,
events.jsonl, checkpoints/, best/ (where the config selects a step), kept/ (states to branch from), per_target_SPLIT.npz
and, at the end, DONE or FAILED. Exit status: 0 done (diverged is a result too), 42 told to stop and saved: run it
again, 75 another worker is on this workdir, else a failure, with one line.
"""

import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from recscale import branch, record
from recscale.checkpoint import Checkpoints
from recscale.data.event_log import EventLogError
from recscale.distributed import abandon, join, leave
from recscale.evaluate import NonFiniteScore, evaluate_split
from recscale.events import process_origin
from recscale.lease import Held
from recscale.mesh import place_batch
from recscale.preemption import EXIT_HELD, EXIT_RESTART, Preempted
from recscale.program import abstract_state
from recscale.run import Run, build, collapse, costs, seen
from recscale.step import make_train_step
from recscale.worker import Worker, finished, one_line, open_record, peer_lost

UNMEASURED = "unmeasured"  # in a checkpoint: its step is still to be evaluated, and kept where it should be


def train(
    config: ml_collections.ConfigDict, workdir: str | Path, mirrors: str = "", origin: float | None = None
) -> dict[str, Any]:
    """Train to the end of the config's plan and return the record.

    Resumes from the workdir's newest checkpoint; the result is bit for bit that of an unbroken run. A non-finite loss,
    or parameters that would give one, end the run with status "diverged". mirrors: names of mirrors.MIRRORS, with
    commas. origin: time.monotonic() when the process began. Raises Preempted where it was told to stop (saved, if there
    was anything), Held where another worker is on the workdir, ValueError where that belongs to another config, OSError
    where it cannot be written.
    """
    workdir = Path(workdir)
    if (book := finished(config.to_dict(), workdir)) is not None:
        print(f"{workdir}: finished before ({book['status']}); nothing to do", file=sys.stderr)
        return book
    with Worker(workdir, mirrors, origin) as worker:
        return _train(config, open_record(config.to_dict(), workdir), worker)


def _train(config: ml_collections.ConfigDict, book: dict[str, Any], worker: Worker) -> dict[str, Any]:  # noqa: C901
    """One linear loop: all that `train` does once it has the lease of the workdir and an open record."""
    workdir = worker.workdir
    worker.started(book)
    book |= {"status": "running", "reason": ""}
    record.write(workdir, book)
    run = build(config)
    book |= branch.facts(run) | costs(run, run.steps) | {"seen": seen(run, run.steps), "steps": run.steps}
    record.write(workdir, book)

    train_step = make_train_step(run)
    c = config.train
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints, Checkpoints(workdir / "best", keep=1) as best:
        if (newest := checkpoints.restore_newest(abstract_state(run))) is None:
            state, start = branch.first_state(run)
            measured = True
        else:
            _, state, data = newest
            start, measured = data["next_index"], UNMEASURED not in data
            print(f"{workdir}: resumed at step {start}", file=sys.stderr)
        metrics = record.Metrics(workdir, start, measured)
        batches = run.loader.iterator(start)
        events_per_step = run.loader.real_tokens / run.loader.num_rows * config.loader.batch_size
        progress = Progress(run.steps, start, events_per_step, metrics.seconds(), worker)
        status, reason, waiting = "ok", "", None
        stop = out_of_patience(metrics.rows, config, start)

        def write(row: dict[str, Any]) -> None:
            metrics.append(row)
            worker.log(row)

        def measure(step: int) -> tuple[str, str]:
            """Evaluate, and select or keep the state: what is due at this step besides a checkpoint."""
            if c.eval_every and (step == run.steps or step % c.eval_every == 0):
                try:
                    rows = _evaluated(run, state, config.eval.during, step, worker)[0]
                except NonFiniteScore as error:
                    return "diverged", f"step {step}: {error}"
                for row in rows:
                    write(row)
                if selected(metrics.rows, config) == step:
                    checkpoints.wait()  # on several processes Orbax cannot finish two saves at a time
                    best.save(step, state, {"next_index": step})
                    best.wait()  # a run resumed at this step must find it
            if step in c.keep_steps:
                checkpoints.wait()
                branch.keep(run, workdir, step, state)
            return "ok", ""

        def save(step: int, **data: int) -> None:
            began = worker.events.clock()
            checkpoints.save(step, state, {"next_index": step} | data)
            worker.events.add("save", step=step, seconds=round(worker.events.clock() - began, 3))

        worker.ready(start)
        if not measured:  # the run was told to stop while it measured this step
            status, reason = measure(start)
            stop = out_of_patience(metrics.rows, config, start)
        for step in range(start + 1, run.steps + 1):
            if stop or status != "ok":
                break
            state, values = train_step(state, place_batch(run.mesh, next(batches)))
            leaving = worker.leaving()
            if waiting is not None:  # the metrics of the step before are read while this one runs
                status, reason = _read(waiting, write, progress, c.log_every)
            waiting = (step, values)
            last = step == run.steps
            due = step in c.keep_steps or any(
                every and step % every == 0 for every in (c.eval_every, c.checkpoint_every)
            )
            if last or due or leaving:
                if status == "ok":
                    status, reason = _read(waiting, write, progress, c.log_every)
                if status == "ok" and not parameters_finite(state):  # the loss is of the parameters before this step
                    status, reason = "diverged", f"parameters after step {step} are not finite or beyond 1e19"
                waiting = None
            if status != "ok":
                break
            if leaving and (last or due):
                save(step, **{UNMEASURED: 1})
            elif last or due:
                try:
                    status, reason = measure(step)
                except Preempted:
                    save(step, **{UNMEASURED: 1})
                    raise
                stop = out_of_patience(metrics.rows, config, step)
            if waiting is None and status == "ok":
                save(step)
            if leaving:
                raise Preempted(f"{workdir}: told to stop; saved at step {step}")

        step = int(state["step"])
        if status == "ok":
            chosen = selected(metrics.rows, config)
            if chosen is not None:
                state, _ = best.restore(chosen, state)
            for split in config.eval.final:
                rows, per_target = _evaluated(run, state, split, chosen or step, worker, final=True)
                for row in rows:
                    write(row | {"final": True})
                if record.is_writer():
                    np.savez(workdir / f"per_target_{split}.npz", allow_pickle=False, **per_target)
            book["selected_step"] = chosen or step
            book["cooled"] = branch.cooled(run, book["selected_step"])
        rows = [row | {"cooled": branch.cooled(run, row["step"])} for row in metrics.evaluations()]
        book["evaluations"] = [row for row in rows if "final" in row]
        book["curve"] = [row for row in rows if "final" not in row]
        book |= costs(run, step) | {"seen": seen(run, step), "status": status, "reason": reason, "stopped_at": step}
        extra_rounds, lost_rows = (int(x) for x in state["overflow"])
        book["table"] |= {"extra_rounds": extra_rounds, "lost_rows": lost_rows}
        if status == "ok":
            book["table"]["information_abundance"] = collapse(run, state)
        wall = progress.elapsed()
        book["seconds"] = {"wall": wall, "device": wall * run.mesh.size}
        record.write(workdir, book)
    worker.done(book)
    return book


def _evaluated(run: Run, state: dict[str, Any], split: str, step: int, worker: Worker, final: bool = False):
    began = worker.events.clock()
    found = evaluate_split(run, state, split, step, final, worker.poll)
    worker.events.add("evaluation", step=step, split=split, seconds=round(worker.events.clock() - began, 3))
    return found


def selected(rows: list[dict[str, Any]], config: ml_collections.ConfigDict) -> int | None:
    """The evaluation step with the best value of train.select ("metric max" or "metric min"); None without one."""
    if not config.train.select:
        return None
    metric, direction = config.train.select.split()
    values = {
        r["step"]: r["value"] for r in rows if r.get("metric") == metric and r["slice"] == "all" and "final" not in r
    }
    if not values:
        found = sorted({r["metric"] for r in rows if "metric" in r and "final" not in r})
        if found:
            raise ValueError(f"train.select = {config.train.select!r}: evaluation gives {found}")
        return None
    return (max if direction == "max" else min)(values, key=lambda s: values[s])


def out_of_patience(rows: list[dict[str, Any]], config: ml_collections.ConfigDict, step: int) -> bool:
    """Whether train.patience evaluations have passed since the selected one."""
    chosen = selected(rows, config)
    patience = config.train.patience * config.train.eval_every
    return bool(patience) and chosen is not None and step - chosen >= patience


_norm = jax.jit(optax.tree.norm)


def parameters_finite(state: dict[str, Any]) -> bool:
    """Whether the square of every parameter, tables included, is finite in float32. Integer codes are no parameters."""
    leaves = jax.tree.leaves((state["model"], state["mixers"], state["tables"]))
    return math.isfinite(_norm([x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]))


def _read(waiting: tuple[int, dict[str, jax.Array]], write: Callable, progress: "Progress", log_every: int):
    step, values = waiting
    loss = float(values["loss"])
    finite = math.isfinite(loss)
    if int(values["lost_rows"]):
        raise ValueError(
            f"step {step}: the exchange of table rows lost {int(values['lost_rows'])} rows: one device owns nearly all "
            "ids of a batch. Use fewer devices, or a table kind that hashes the ids"
        )
    if (log_every and step % log_every == 0) or not finite:  # JSON has no NaN
        write({"step": step, "loss": loss if finite else None, "seconds": round(progress.elapsed(), 3)})
    progress.show(step, loss)
    if finite:
        return "ok", ""
    return "diverged", f"loss {loss} at step {step}"


class Progress:
    """How far the run is: a line on stderr, rewritten on a terminal, every ten seconds in a pipe; rows of events.jsonl.

    spent: seconds that the run had taken before this attempt.
    """

    def __init__(self, steps: int, start: int, events_per_step: float, spent: float, worker: Worker):
        self.steps, self.start, self.events_per_step = steps, start, events_per_step
        self.worker, self.shown = worker, time.monotonic()
        self.began = self.shown - spent
        self.first: float | None = None

    def elapsed(self) -> float:
        """Seconds of the run so far, restarts left out."""
        return time.monotonic() - self.began

    def show(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if self.first is None:  # the first step compiles: speed is counted from its end
            self.first, self.start = now, step
            self.worker.events.add("compiled", step=step)
        rate = (step - self.start) / max(now - self.first, 1e-9)
        self.worker.alive(step, self.steps, loss, rate * self.events_per_step)
        if now - self.shown < (0.5 if sys.stderr.isatty() else 10.0) and step != self.steps:
            return
        self.shown = now
        speed = f"{rate * self.events_per_step:,.0f} events/s" if rate else "compiled"
        left = f"  ETA {(self.steps - step) / rate:.0f}s" if rate else ""
        line = f"step {step}/{self.steps}  {speed}  loss {loss:.4f}{left}"
        print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def main(_: list[str]) -> None:
    """Command line of the module docstring; one line and an exit status of preemption.py where it does not end well."""
    logging.set_verbosity(logging.WARNING)
    try:
        join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, run=str(_WORKDIR.value))
        book = train(_CONFIG.value, str(_WORKDIR.value), _MIRROR.value, process_origin())
    except (Preempted, Held) as error:
        print(error, file=sys.stderr)
        leave()
        sys.exit(EXIT_RESTART if isinstance(error, Preempted) else EXIT_HELD)
    except Exception as error:
        if peer_lost(error):
            print("another process of this run has ended: all must be started again", file=sys.stderr)
            abandon(EXIT_RESTART)
        expected = isinstance(error, EventLogError | ValueError | TypeError | OSError)
        text = one_line(error) if expected else traceback.format_exc()
        if jax.distributed.is_initialized():  # the others must not wait for this one
            print(text, file=sys.stderr)
            abandon(1)
        sys.exit(text)
    for row in book["evaluations"]:
        print(
            f"{row['split']:5s} {row['slice']:12s} {row['metric']:18s} {row['value']:.5f} +- {row['stderr'] or 0:.5f}"
        )
    if book["status"] != "ok":
        print(f"{book['status']}: {book['reason']}", file=sys.stderr)
    leave()


def parse_flags(arguments: list[str]) -> list[str]:
    """absl's flag parser, with one line and a non-zero exit status for a wrong key or a config that cannot be made."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        sys.exit(one_line(error))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Config file, e.g. configs/hstu_ml1m.py", lock_config=True
    )
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; an existing one is resumed")
    _MIRROR = flags.DEFINE_string("mirror", "", "Where to show the metrics too: tensorboard, wandb, trackio; commas")
    _COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0 of several; '': see distributed.py")
    _PROCESSES = flags.DEFINE_integer("processes", 1, "How many processes there are")
    _PROCESS = flags.DEFINE_integer("process", 0, "Number of this one, from 0")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
