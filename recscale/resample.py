"""A trained run of task "denoising" under other settings of sampling: quality against what an answer costs.

Nothing is trained: the selected checkpoint is read once, and each setting evaluated as at the end of training (all
protocols, slices and coverage). Unchanged settings give the rows of the record again. Protocol "dreamrec_legacy" is
left out where the settings are not those that it names.

A CSV has the rows of all settings: those of the evaluation, the settings that were named, and their cost:
denoiser_calls (passes through the denoiser per sample), sampling_flops and inference_flops (forward, per target; the
latter with the encoder and the ranking of the catalogue, recscale.run.inference).

    python -m recscale.resample --workdir=RUN [--split=test] [--targets=N] [--out=curve.csv]
        --steps=1,2,5,10 --guidance=0,2 [--sampler=ddim] [--samples=1,4] [--temperature=1] ...  (all combinations)
"""

import argparse
import csv
import dataclasses
import itertools
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from recscale import reading, record
from recscale.data import windows
from recscale.data.event_log import EventLogError
from recscale.data.splits import View
from recscale.evaluate import evaluate_split
from recscale.evaluate_denoised import LEGACY
from recscale.metrics import NonFiniteScore
from recscale.program import task_of
from recscale.run import Run, inference
from recscale.serve.trained import trained
from recscale.tasks.denoising import Task

TASK = "denoising"
SETTINGS: dict[str, type] = {
    "sampler": str,
    "sampling_steps": int,
    "eta": float,
    "guidance": float,
    "similarity": str,
    "temperature": float,
    "samples": int,
    "combine": str,
    "seed": int,
    "likelihood_steps": int,
    "likelihood_probes": int,
}
"""What may be changed after training: settings of config.task that only sampling and scoring read."""
COST = ("denoiser_calls", "sampling_flops", "inference_flops")
_ACCEPTED = {int: numbers.Integral, float: numbers.Real, str: str}
_FLAGS = {"steps": "sampling_steps"} | {name: name for name in SETTINGS if name != "sampling_steps"}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run of task "denoising": the run, the state of its selected checkpoint, and that one's step."""

    run: Run
    state: dict[str, Any]
    step: int


def opened(workdir: str | Path) -> Trained:
    """Open a finished run; the log is where its config says, from the current folder.

    Raises ValueError for a folder without a run, a run of another task, one that is not finished or has diverged, and
    one whose checkpoint is not there or not that of its record; EventLogError or OSError for what cannot be read.
    """
    workdir = Path(workdir)
    if not (workdir / "record.json").is_file():
        raise ValueError(f"{workdir}: no run here (no record.json); expected the folder of a trained run")
    book = record.read(workdir)
    if book["config"]["task_name"] != TASK:
        raise ValueError(f"{workdir}: a run of task {book['config']['task_name']!r}; only {TASK!r} samples its answers")
    if book["status"] != "ok" or "selected_step" not in book:
        raise ValueError(f"{workdir}: the run is not finished (status {book['status']!r}); train it to the end first")
    run, state = trained(workdir)
    step = int(state["step"])
    if step != book["selected_step"]:
        raise ValueError(
            f"{workdir}: its checkpoint is of step {step}, but the record was evaluated at step "
            f"{book['selected_step']}: put that checkpoint back"
        )
    return Trained(run, state, step)


def evaluate_with(workdir: str | Path | Trained, split: str, changes: Mapping[str, Any], targets: int = 0) -> list[Row]:
    """Rows of the final evaluation of a run on a split under changed settings; see `curve`."""
    return next(curve(workdir, split, [changes], targets))


def curve(
    workdir: str | Path | Trained, split: str, several: Iterable[Mapping[str, Any]], targets: int = 0
) -> Iterator[list[Row]]:
    """Evaluate a run on a split under each of several changes, reading it once; rows of one change after another.

    workdir: or what `opened` gives. changes: names of SETTINGS -> values; those not named are the run's. targets: at
    most this many of the split, evenly spaced (0: all); the same for all changes.

    Row: {step, split, slice, metric, value, stderr, n}, the changed settings, and COST. All changes are checked before
    the first is evaluated: raises ValueError naming the setting and what is allowed, or a split that the run does not
    have; and as `opened` does. The iterator raises NonFiniteScore for settings under which sampling overflows.
    """
    run_state = workdir if isinstance(workdir, Trained) else opened(workdir)
    run = _limited(run_state.run, split, targets)
    prepared = [(dict(changes), _changed(run, changes)) for changes in several]
    return (_rows(dataclasses.replace(run_state, run=new), split, changes) for changes, new in prepared)


def _rows(run_state: Trained, split: str, changes: dict[str, Any]) -> list[Row]:
    run, state, step = run_state.run, run_state.state, run_state.step
    try:
        rows, _ = evaluate_split(run, state, split, step, final=True)
    except NonFiniteScore:
        named = ", ".join(f"{name} = {value}" for name, value in changes.items()) or "the settings of the run"
        raise NonFiniteScore(f"{named}: sampling gives NaN or infinite scores under these settings") from None
    priced = changes | cost(run)
    return [row | priced for row in rows]


def cost(run: Run) -> dict[str, float]:
    """COST of a run of task "denoising"."""
    drawn = cast(Task, run.task).sampling(run.model_config.embed_dim, run.config.loader.length)
    values = (drawn["denoiser_calls"], drawn["flops_per_target"], inference(run)["total"])
    return dict(zip(COST, values, strict=True))


def _changed(run: Run, changes: Mapping[str, Any]) -> Run:
    """The run with other settings of sampling; unchanged ones leave the task as it is, and what is compiled for it."""
    config = ConfigDict(run.config.to_dict())
    for name, value in changes.items():
        config.task[name] = _checked(name, value)
    kept = tuple(name for name in config.eval.protocols if name != LEGACY or reading.legacy_fits(config.task))
    config.eval.protocols = kept or ("full",)
    same = config.task.to_dict() == run.config.task.to_dict()
    task = cast(Task, run.task if same else task_of(config, run.log.num_items))
    if "eta" in changes and task.how["eta"] is None:
        raise ValueError(f"eta = {config.task.eta}: sampler {config.task.sampler!r} has none; leave it out")
    return dataclasses.replace(run, config=config.lock(), task=task)


def _checked(name: str, value: Any) -> Any:
    if name not in SETTINGS:
        raise ValueError(f"{name!r} cannot be changed after training; what can: {', '.join(SETTINGS)}")
    kind = SETTINGS[name]
    if not isinstance(value, _ACCEPTED[kind]) or isinstance(value, bool) or not _is_finite(value):
        raise ValueError(f"task.{name} = {value!r}: expected a value of type {kind.__name__}")
    return kind(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, str) or math.isfinite(value)


def _limited(run: Run, split: str, targets: int) -> Run:
    """The run with at most so many targets of the split, evenly spaced over its users."""
    if split not in run.views:
        raise ValueError(f"split {split!r}: this run has {', '.join(run.views)}")
    if targets < 0:
        raise ValueError(f"targets = {targets}: expected a positive number, or 0 for all")
    each = windows.prefixes(run.views[split])
    if not targets or targets >= len(each):
        return run
    kept = np.linspace(0, len(each) - 1, targets).round().astype(np.int64)
    return dataclasses.replace(run, views=run.views | {split: _part(each, kept)})


def _part(view: View, kept: np.ndarray) -> View:
    arrays = {name: getattr(view, name)[kept] for name in ("user", "start", "target_start", "stop")}
    return dataclasses.replace(view, **arrays)


# Command line ---------------------------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the same keys as CSV, the whole file or none."""
    part = path.with_name(path.name + ".partial")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def _values(kind: type) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        try:
            return list(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {kind.__name__} values with commas") from None

    return read


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("recscale.resample", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", type=Path, required=True, help='folder of a finished run of task "denoising"')
    parser.add_argument("--split", default="test")
    parser.add_argument("--targets", type=int, default=0, help="at most so many, evenly spaced; 0: all")
    parser.add_argument("--out", type=Path, help="CSV file for all rows")
    for flag, name in _FLAGS.items():
        parser.add_argument(f"--{flag}", dest=name, type=_values(SETTINGS[name]), metavar="A,B", help=f"task.{name}")
    return parser.parse_args(argv)


def _line(cells: Sequence[Any]) -> str:
    return " ".join(f"{cell:>14.6g}" if isinstance(cell, float) else f"{cell!s:>14}" for cell in cells)


def _cells(rows: Sequence[Row], settings: Iterable[str], metrics: Sequence[str]) -> list[Any]:
    values = {row["metric"]: row["value"] for row in rows if row["slice"] == "all"}
    found = [values.get(name) for name in metrics]
    return [rows[0][name] for name in (*settings, *COST)] + ["-" if value is None else value for value in found]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: one line per combination of settings; exits with one line on wrong input."""
    args = _arguments(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a folder opened for reading is not written
    lists = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    several = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    rows: list[Row] = []
    try:
        if args.out is not None and not args.out.parent.is_dir():
            raise ValueError(f"--out={args.out}: no such folder {args.out.parent}")
        run_state = opened(args.workdir)
        k = run_state.run.config.eval.ks[0]
        metrics = (f"hr@{k}", f"ndcg@{k}", f"coverage@{k}", "nats", "spread", "distinct")
        evaluated = curve(run_state, args.split, several, args.targets)
        print(_line([*lists, *COST, *metrics]))
        for found in evaluated:
            print(_line(_cells(found, lists, metrics)), flush=True)
            rows += found
        if args.out is not None:
            write(args.out, rows)
    except (EventLogError, ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
