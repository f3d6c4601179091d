"""Cooled branches: one long trunk at a constant learning rate, from which runs of several lengths branch off and decay.

The trunk keeps its state at `train.keep_steps`. A branch names the trunk's workdir (`train.branch_from`) and one of
those steps (`train.branch_step`), goes on with the trunk's data and cools down to a horizon of its own: it is, bit for
bit, the run of that horizon trained from the start, at the cost of its own steps. Its record counts examples and FLOPs
from the trunk's start and names the trunk as its `lineage`, since runs of one trunk are not independent.
Source: arXiv 2405.18392; "warm-up, stable, decay" arXiv 2404.06395.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from recscale import record
from recscale.checkpoint import Checkpoints
from recscale.optim import Phases, phases
from recscale.program import abstract_state
from recscale.run import Run, init_state

KEPT = "kept"
# What may differ between a trunk and its branch: names, what is measured, and how long and how they decay.
FREE = ("study", "cell.", "train.", "eval.", "optim.schedule", "optim.decay")


def facts(run: Run) -> dict[str, Any]:
    """What the record says of schedule and lineage; raises ValueError where the run cannot branch or keep so."""
    c, plan = run.config, phases_of(run.config.to_dict(), run.steps)
    beyond = [step for step in c.train.keep_steps if not 0 < step <= run.steps]
    if beyond:
        raise ValueError(f"train.keep_steps = {c.train.keep_steps}: {beyond} are no steps of this run of {run.steps}")
    found = {
        "schedule": c.optim.schedule,
        "parametrisation": c.optim.parametrisation,
        "warmup": plan.warmup,
        "horizon": plan.horizon,
        "decay_start": plan.decay_start,
        "decay_steps": plan.decay_steps,
        "cooled": False,
    }
    if not c.train.branch_from:
        return found
    trunk = _trunk(run)
    lineage = trunk["lineage"] if "lineage" in trunk else trunk["run_id"]
    return found | {"lineage": lineage, "parent_run": trunk["run_id"], "parent_step": c.train.branch_step}


def phases_of(config: Mapping[str, Any], steps: int) -> Phases:
    """Phases of the encoder's learning rate in a run of so many steps."""
    c = config["optim"]
    return phases(c["schedule"], c["warmup"], steps, c["decay"])


def cooled(run: Run, step: int) -> bool:
    """Whether the learning rate has fallen to zero by this step: only such losses belong in a law of data."""
    plan = phases_of(run.config.to_dict(), run.steps)
    return plan.decay_steps > 0 and step == plan.horizon


def first_state(run: Run) -> tuple[dict[str, Any], int]:
    """State and step at which the run begins: a fresh one at step 0, or the trunk's at the step where it branches."""
    c = run.config.train
    if not c.branch_from:
        return init_state(run), 0
    with Checkpoints(Path(c.branch_from) / KEPT, keep=1, read_only=True) as kept:
        state, data = kept.restore(c.branch_step, abstract_state(run))
    return state, data["next_index"]


def branches(
    trunk: ConfigDict, workdir: str | Path, epochs: Sequence[float], rows: int
) -> tuple[ConfigDict, dict[float, ConfigDict]]:
    """One trunk and a branch for each shorter length: configs, locked, with the length in cell.coordinates as `epochs`.

    trunk: a config with schedule "wsd"; workdir: where it will run; rows: of an epoch (`build(trunk).loader.num_rows`).
    The longest of `epochs` is the trunk's own, which cools at its end like any other run. Train the trunk first.
    """
    *shorter, longest = sorted(set(epochs))
    found, forks = {}, []
    for length in shorter:
        config = trunk.copy_and_resolve_references().unlock()
        steps = max(1, round(length * rows / config.loader.batch_size))
        forks.append(phases_of(config.to_dict(), steps).decay_start)
        config.train.update({"epochs": length, "branch_from": str(workdir), "branch_step": forks[-1]})
        config.cell.coordinates.epochs = length
        found[length] = config.lock()
    trunk = trunk.copy_and_resolve_references().unlock()
    trunk.train.update({"epochs": longest, "keep_steps": tuple(dict.fromkeys(forks))})
    trunk.cell.coordinates.epochs = longest
    return trunk.lock(), found


def keep(run: Run, workdir: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state at a step of `train.keep_steps` for good; returns when it is on disk."""
    with Checkpoints(workdir / KEPT, keep=len(run.config.train.keep_steps)) as kept:
        kept.save(step, state, {"next_index": step})


def _trunk(run: Run) -> dict[str, Any]:
    """The trunk's record, once it is sure that the run may branch off there; else ValueError in one line."""
    c = run.config.train
    folder, step = Path(c.branch_from), c.branch_step
    where = f"train.branch_from = {c.branch_from!r}"
    if not (folder / "record.json").is_file():
        raise ValueError(f"{where}: no run is there; train the trunk first, or correct the path")
    trunk = record.read(folder)
    wrong = _differences(trunk["config"], run.config.to_dict())
    if wrong:
        raise ValueError(f"{where}: the trunk ran with another config: {'; '.join(wrong)}. Give both the same values")
    kept = sorted(int(path.name) for path in (folder / KEPT).glob("*") if path.name.isdigit())
    if step not in kept:
        raise ValueError(
            f"{where}: kept no state of step {step}, it has {kept}: branch at one of these, or put {step} into the "
            "trunk's train.keep_steps"
        )
    for whose, plan in (
        ("this run", phases_of(run.config.to_dict(), run.steps)),
        ("the trunk", phases_of(trunk["config"], trunk["steps"])),
    ):
        if step > plan.decay_start:
            raise ValueError(
                f"train.branch_step = {step}: the learning rate of {whose} falls from step {plan.decay_start} on; "
                "branch before that, with a longer train.epochs or a shorter optim.decay"
            )
    return trunk


def _differences(trunk: Mapping[str, Any], branch: Mapping[str, Any], most: int = 3) -> list[str]:
    """What differs between the two configs and may not, as "key (trunk: a, branch: b)"; at most so many."""
    one, other = (dict(_leaves(json.loads(json.dumps(config)), "")) for config in (trunk, branch))
    keys = sorted(key for key in one | other if not key.startswith(FREE))
    values = {key: [leaves.get(key, "absent") for leaves in (one, other)] for key in keys}
    wrong = [f"{key} (trunk: {a}, branch: {b})" for key, (a, b) in values.items() if a != b]
    return wrong[:most] + ([f"and {len(wrong) - most} more"] if len(wrong) > most else [])


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, child in value.items():
        if isinstance(child, dict):
            yield from _leaves(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child
