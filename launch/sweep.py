"""Run a study anywhere: python -m launch.sweep STUDY --on=local|slurm|gke|tpu_vm [plan|submit|status|retry|cancel]

plan shows the cells, their size and cost, and what is done. submit (the default) prepares the data and starts what is
missing. status is a live table; in a pipe it is printed once. retry takes the failed cells too. cancel tells what runs
to save and leave. prepare only makes the data, report only writes the report. Whatever dies, the same command goes on:
a cell is done when its folder says so.

    python -m launch.sweep experiments/0001_four_axes_planted --on=local --set jobs=2
    python -m launch.sweep experiments/0001_four_axes_planted --on=slurm --place=my_cluster.yaml --dry-run
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from launch import cell_state, forecast, gke, local, slurm, status, study, tpu_vm
from launch.study import Job, Study
from recscale.lease import Held
from recscale.preemption import EXIT_HELD

PLACES: dict[str, ModuleType] = {"local": local, "slurm": slurm, "gke": gke, "tpu_vm": tpu_vm}
FORECAST = ("flops_per_second", "price")  # settings of `plan`, in any place


def settings_of(place: ModuleType, file: Path | None, changes: Sequence[str]) -> tuple[Any, dict[str, float]]:
    """The Settings of a place, from a YAML file and then KEY=VALUE, and those of the forecast.

    Raises ValueError in one line for a key that the place does not have or a value that does not fit.
    """
    texts: dict[str, Any] = {}
    if file is not None:
        loaded = yaml.load(file.read_text(), yaml.BaseLoader)  # as text: YAML would read the time 02:00:00 as a number
        if not isinstance(loaded, dict):
            raise ValueError(f"{file}: expected KEY: VALUE lines")
        texts |= loaded
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: expected KEY=VALUE")
        texts[key] = value
    costs = {key: _as(0.0, key, texts.pop(key)) for key in FORECAST if key in texts}
    fields = {field.name: field.default for field in dataclasses.fields(place.Settings)}
    if wrong := sorted(texts.keys() - fields.keys()):
        raise ValueError(f"{place.__name__}: no setting {', '.join(wrong)}; it has {', '.join([*fields, *FORECAST])}")
    return place.Settings(**{key: _as(fields[key], key, text) for key, text in texts.items()}), costs


def _as(default: Any, key: str, text: Any) -> Any:
    """A value of the type of the setting's default, of a text or of what a YAML file holds."""
    if isinstance(default, str):
        return text
    value = yaml.safe_load(text) if isinstance(text, str) else text
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, bool | int | float) and type(value) is not type(default):
        raise ValueError(f"{key}={value!r}: expected a value like {default!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Order:
    """What a verb works on. costs: the settings of the forecast."""

    study: Study
    place: ModuleType
    settings: Any
    costs: dict[str, float]
    dry_run: bool
    watch: bool

    def open_jobs(self) -> list[Job]:
        return [job for job in self.study.jobs if not cell_state.finished(Path(job.workdir))]


def plan(order: Order) -> None:
    """Print what would run and what it costs."""
    print(forecast.table(forecast.forecast(order.study, **order.costs), order.costs.get("price", 0.0)))


def prepare(order: Order) -> None:
    """Make the data of the study. Of several processes that come here one works, and the others wait for it."""
    order.study.prepare()


def submit(order: Order) -> None:
    """Start what is missing. A failed cell stays as it is, for `retry`."""
    _send(order, [job for job in order.open_jobs() if cell_state.of(Path(job.workdir)).name != cell_state.FAILED])


def retry(order: Order) -> None:
    """Start what is missing, the failed cells among it."""
    _send(order, order.open_jobs())


def show(order: Order) -> None:
    """Print the table of all cells."""
    jobs = order.study.jobs
    status.show(jobs, lambda: order.place.where(jobs, order.study.out, order.settings), sys.stdout.isatty())


def cancel(order: Order) -> None:
    """Tell what runs to save and leave, and take back what waits."""
    order.place.cancel(order.open_jobs(), order.study.out, order.settings, order.dry_run)


def report(order: Order) -> None:
    """Write the report of what is there."""
    print(f"report: {order.study.report().resolve()}")


VERBS = {f.__name__.replace("show", "status"): f for f in (plan, prepare, submit, show, retry, cancel, report)}


def _send(order: Order, missing: list[Job]) -> None:
    jobs, still_open, out = order.study.jobs, order.open_jobs(), order.study.out
    if len(still_open) < len(jobs):
        print(f"{len(jobs) - len(still_open)} of {len(jobs)} cells are done")
    if len(missing) < len(still_open):
        failed = len(still_open) - len(missing)
        print(f"{failed} cells have failed: `status` says why, `retry` takes them again")
    if missing:
        if not order.dry_run:
            out.mkdir(parents=True, exist_ok=True)
            order.study.prepare()  # in every place RUNS is a file system that is seen from here and from there
        try:
            order.place.submit(missing, out, order.settings, order.dry_run)
            if order.watch and not order.dry_run:
                ends = order.place.watch(missing, out, order.settings)
                print("\n".join(f"{cell}: {end}" for cell, end in ends.items()))
        finally:
            _report_when_over(order)
    else:
        _report_when_over(order)


def _report_when_over(order: Order) -> None:
    """Write the report once nothing is left to run: failed cells are named in it, and need not be waited for."""
    states = [cell_state.of(Path(job.workdir)) for job in order.study.jobs]
    over = all(state.finished or state.name == cell_state.FAILED for state in states)
    if over and any(state.finished for state in states) and not order.dry_run:
        report(order)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the module docstring; one line and a non-zero exit status for what cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder with a study.py")
    parser.add_argument("verb", nargs="?", default="submit", choices=VERBS, help="default: submit")
    parser.add_argument("--on", default="local", choices=PLACES, help="where it runs (default: local)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go (default: runs)")
    parser.add_argument("--place", type=Path, help="YAML file with settings of the place")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a setting of the place"
    )
    parser.add_argument("--dry-run", action="store_true", help="print exactly what would be sent, and send nothing")
    parser.add_argument("--mirror", default="", help="show the metrics elsewhere too: tensorboard,wandb,trackio")
    parser.add_argument("--watch", action="store_true", help="tpu_vm: stay, and re-create what is preempted")
    chosen = parser.parse_args(arguments)
    place = PLACES[chosen.on]
    if chosen.watch and not hasattr(place, "watch"):
        parser.error(f"--watch: {chosen.on} starts again by itself what is preempted")
    try:
        settings, costs = settings_of(place, chosen.place, chosen.set)
        loaded = study.load(chosen.study, chosen.runs, chosen.mirror)
        VERBS[chosen.verb](Order(loaded, place, settings, costs, chosen.dry_run, chosen.watch))
    except Held as error:
        print(f"{error}: another submission of this study; `status` shows what runs", file=sys.stderr)
        sys.exit(EXIT_HELD)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on where this one was")


if __name__ == "__main__":
    main()
