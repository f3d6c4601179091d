"""Train one model: python -m recscale.train --config=configs/hstu_ml1m.py --workdir=runs/hstu_ml1m --config.seed=1

An existing workdir is resumed; a finished one is left alone. The workdir holds record.json, metrics.jsonl,
events.jsonl, checkpoints/, best/ (where the config selects a step), kept/ (states to branch from), per_target_SPLIT.npz
and, at the end, DONE or FAILED. Exit status: 0 done (diverged is a result too), 42 told to stop and saved: run it
again, 75 another worker is on this workdir, else a failure, with one line.
"""

import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from recscale.data.event_log import EventLogError
from recscale.distributed import abandon, join, leave
from recscale.events import process_origin
from recscale.lease import Held
from recscale.mesh import place_batch
from recscale.preemption import EXIT_HELD, EXIT_RESTART, Preempted
from recscale.run import init_state
from recscale.step import make_train_step
from recscale.training import Line, Training, progress
from recscale.worker import one_line, peer_lost


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
    with Training(config, Path(workdir), mirrors, origin) as training:
        training.open()
        if not training.ended:
            training.build()
            _train(training)
        return training.book


def _train(training: Training) -> None:
    """The loop: a step, then what is due at it."""
    train_step = make_train_step(training.run)
    state = training.start()
    state = init_state(training.run) if state is None else state
    line, waiting = Line(), None
    while not training.ended:
        state, values = train_step(state, place_batch(training.run.mesh, next(training.batches)))
        leaving = training.worker.leaving()
        if waiting is not None:  # the metrics of the step before are read while this one runs
            _read(training, waiting, line)
        training.step += 1
        waiting = values
        if leaving or training.due or training.status != "ok":
            _read(training, waiting, line)
            waiting = None
            training.pause(state, leaving)
        if leaving and not training.ended:
            raise Preempted(f"{training.workdir}: told to stop; saved at step {training.step}")


def _read(training: Training, values: dict[str, jax.Array], line: Line) -> None:
    """Note the metrics of the step that the training is at."""
    step, steps, loss = training.step, training.run.steps, float(values["loss"])
    if int(values["lost_rows"]):
        raise ValueError(
            f"step {step}: the exchange of table rows lost {int(values['lost_rows'])} rows: one device owns nearly all "
            "ids of a batch. Use fewer devices, or a table kind that hashes the ids"
        )
    training.read(step, loss)
    speed = progress(step, steps, training.events_per_second, training.events_per_step)
    line.show(f"step {step}/{steps}  loss {loss:.4f}  {speed}", last=step == steps)


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
        print(shown(row))
    if book["status"] != "ok":
        print(f"{book['status']}: {book['reason']}", file=sys.stderr)
    leave()


def shown(row: dict[str, Any]) -> str:
    """A row of the evaluation as a line; a value may be undefined (no pair in the slice, say)."""
    value = "undefined" if row["value"] is None else f"{row['value']:.5f} +- {row['stderr'] or 0:.5f}"
    return f"{row['split']:5s} {row['slice']:12s} {row['metric']:18s} {value}"


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
