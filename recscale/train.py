"""Train one model: python -m recscale.train --config=configs/hstu_ml1m.py --workdir=runs/hstu_ml1m --config.seed=1

An existing workdir is resumed; a finished one is left alone. The workdir holds record.json, metrics.jsonl,
checkpoints/, best/ (where the config selects a step), kept/ (states to branch from), per_target_SPLIT.npz and, at the
end, DONE.
"""

import math
import sys
import time
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
from recscale.evaluate import NonFiniteScore, evaluate_split
from recscale.mesh import join_processes, place_batch
from recscale.program import abstract_state
from recscale.run import build, collapse, costs, seen
from recscale.step import make_train_step


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:  # noqa: C901 (one linear loop)
    """Train to the end of the config's plan and return the record.

    Resumes from the workdir's newest checkpoint; the result is bit for bit that of an unbroken run. A non-finite loss,
    or parameters that would give one, end the run with status "diverged". Raises ValueError where the workdir belongs
    to another config, OSError where it cannot be written.
    """
    workdir = Path(workdir)
    plain = config.to_dict()
    book = _open_record(plain, workdir)
    if book["status"] in ("ok", "diverged"):
        print(f"{workdir}: finished before ({book['status']}); nothing to do", file=sys.stderr)
        _mark_done(workdir, book)
        return book
    book |= {"status": "running", "reason": ""}
    record.write(workdir, book)
    started = time.time()
    run = build(config)
    book |= branch.facts(run) | costs(run, run.steps) | {"seen": seen(run, run.steps), "steps": run.steps}
    record.write(workdir, book)

    train_step = make_train_step(run)
    c = config.train
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints, Checkpoints(workdir / "best", keep=1) as best:
        if (newest := checkpoints.restore_newest(abstract_state(run))) is None:
            state, start = branch.first_state(run)
        else:
            _, state, data = newest
            start = data["next_index"]
            print(f"{workdir}: resumed at step {start}", file=sys.stderr)
        metrics = record.Metrics(workdir, start)
        started -= metrics.seconds()
        batches = run.loader.iterator(start)
        events_per_step = run.loader.real_tokens / run.loader.num_rows * config.loader.batch_size
        progress = Progress(run.steps, start, events_per_step, started)
        status, reason, waiting = "ok", "", None
        stop = out_of_patience(metrics.rows, config, start)

        for step in range(start + 1, run.steps + 1):
            if stop:
                break
            state, values = train_step(state, place_batch(run.mesh, next(batches)))
            if waiting is not None:  # the metrics of the step before are read while this one runs
                status, reason = _read(waiting, metrics, progress, c.log_every)
            waiting = (step, values)
            last = step == run.steps
            evaluating = c.eval_every and (last or step % c.eval_every == 0)
            keeping = step in c.keep_steps
            if evaluating or last or keeping or (c.checkpoint_every and step % c.checkpoint_every == 0):
                if status == "ok":
                    status, reason = _read(waiting, metrics, progress, c.log_every)
                if status == "ok" and not parameters_finite(state):  # the loss is of the parameters before this step
                    status, reason = "diverged", f"parameters after step {step} are not finite or beyond 1e19"
                waiting = None
            if status != "ok":
                break
            if evaluating:
                try:
                    rows, _ = evaluate_split(run, state, config.eval.during, step)
                except NonFiniteScore as error:
                    status, reason = "diverged", f"step {step}: {error}"
                    break
                for row in rows:
                    metrics.append(row)
                chosen = selected(metrics.rows, config)
                if chosen == step:
                    best.save(step, state, {"next_index": step})
                    best.wait()  # a run resumed at this step must find it
                stop = out_of_patience(metrics.rows, config, step)
            if keeping:
                branch.keep(run, workdir, step, state)
            if waiting is None:
                checkpoints.save(step, state, {"next_index": step})

        step = int(state["step"])
        if status == "ok":
            chosen = selected(metrics.rows, config)
            if chosen is not None:
                state, _ = best.restore(chosen, state)
            for split in config.eval.final:
                rows, per_target = evaluate_split(run, state, split, chosen or step, final=True)
                for row in rows:
                    metrics.append(row | {"final": True})
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
        wall = time.time() - started
        book["seconds"] = {"wall": wall, "device": wall * run.mesh.size}
        record.write(workdir, book)
    _mark_done(workdir, book)
    return book


def _mark_done(workdir: Path, book: dict[str, Any]) -> None:
    """DONE is written last: whoever sees it knows that the record is complete."""
    if record.is_writer():
        (workdir / "DONE").write_text(book["status"] + "\n")


def _mark_failed(workdir: Path, config: ml_collections.ConfigDict, error: Exception) -> None:
    """Note the failure in the run's own record, if it has one; the same command goes on from its last checkpoint."""
    try:
        book = record.read(workdir)
        if book["status"] == "running" and book["config_hash"] == record.config_hash(config.to_dict()):
            record.write(workdir, book | {"status": "failed", "reason": one_line(error)})
    except (OSError, ValueError):
        pass  # no record, a broken one, or no room for it: the error that is being reported says more


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


def _open_record(config: dict[str, Any], workdir: Path) -> dict[str, Any]:
    workdir.mkdir(parents=True, exist_ok=True)
    fresh = record.new(config)
    if not (workdir / "record.json").exists():
        return fresh
    book = record.read(workdir)
    if book["config_hash"] != fresh["config_hash"]:
        raise ValueError(
            f"{workdir}: holds a run of another config ({book['config_hash']}, this one is {fresh['config_hash']}). "
            "Choose another --workdir, or delete this one."
        )
    return book


def _read(waiting: tuple[int, dict[str, jax.Array]], metrics: record.Metrics, progress: "Progress", log_every: int):
    step, values = waiting
    loss = float(values["loss"])
    finite = math.isfinite(loss)
    if int(values["lost_rows"]):
        raise ValueError(
            f"step {step}: the exchange of table rows lost {int(values['lost_rows'])} rows: one device owns nearly all "
            "ids of a batch. Use fewer devices, or a table kind that hashes the ids"
        )
    if (log_every and step % log_every == 0) or not finite:  # JSON has no NaN
        metrics.append({"step": step, "loss": loss if finite else None, "seconds": round(progress.elapsed(), 3)})
    progress.show(step, loss)
    if finite:
        return "ok", ""
    return "diverged", f"loss {loss} at step {step}"


class Progress:
    """One line about the run on stderr: rewritten on a terminal, every ten seconds in a pipe."""

    def __init__(self, steps: int, start: int, events_per_step: float, began: float):
        self.steps, self.start, self.events_per_step = steps, start, events_per_step
        self.began, self.shown = began, time.time()
        self.first: float | None = None

    def elapsed(self) -> float:
        return time.time() - self.began

    def show(self, step: int, loss: float) -> None:
        now = time.time()
        if self.first is None:  # the first step compiles: speed is counted from its end
            self.first, self.start = now, step
        if now - self.shown < (0.5 if sys.stderr.isatty() else 10.0) and step != self.steps:
            return
        self.shown = now
        rate = (step - self.start) / max(now - self.first, 1e-9)
        left = (self.steps - step) / rate if rate else float("nan")
        line = (
            f"step {step}/{self.steps}  {rate * self.events_per_step:,.0f} events/s  loss {loss:.4f}  ETA {left:.0f}s"
        )
        print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """What the command line says of an error; KeyError would print its message quoted."""
    return "error: " + " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())


def main(_: list[str]) -> None:
    """Command line of the module docstring; one line and a non-zero exit status on a bad config, log or workdir."""
    logging.set_verbosity(logging.WARNING)
    workdir = Path(str(_WORKDIR.value))
    try:
        join_processes(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        book = train(_CONFIG.value, workdir)
    except Exception as error:
        _mark_failed(workdir, _CONFIG.value, error)
        if isinstance(error, (EventLogError, ValueError, TypeError, OSError)):
            sys.exit(one_line(error))
        raise
    for row in book["evaluations"]:
        print(
            f"{row['split']:5s} {row['slice']:12s} {row['metric']:18s} {row['value']:.5f} +- {row['stderr'] or 0:.5f}"
        )
    if book["status"] != "ok":
        sys.exit(f"{book['status']}: {book['reason']}")


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
    _COORDINATOR = flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0 of several; 'auto' asks the cluster (TPU pods, SLURM, Kubernetes)"
    )
    _PROCESSES = flags.DEFINE_integer("processes", 1, "How many processes there are")
    _PROCESS = flags.DEFINE_integer("process", 0, "Number of this one, from 0")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
