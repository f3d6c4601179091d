"""A run that begins with the encoder and the tables of another one: fine-tuning after pre-training.

`train.warm_start` names a finished workdir. Encoder, item table and feature tables are taken from its selected
checkpoint (else its newest); the head, the optimizer, the step and the item frequencies (those of the run's own
training data) are new. A table that the other run did not have begins as always.
"""

from pathlib import Path
from typing import Any

import jax

from recscale.checkpoint import Checkpoints, leaves_by_path
from recscale.tasks.next_item import FREQUENCY

TABLES = ("tables.", "mixers.")


def warm_start(state: dict[str, Any], workdir: Path, inside: str) -> dict[str, Any]:
    """The state with what it shares with the run in `workdir`; inside: where the encoder is, "encoder." in both.

    Raises ValueError where the folder has no checkpoint, another encoder, or nothing in common.
    """
    for folder in (workdir / "best", workdir / "checkpoints"):
        if not folder.is_dir():
            continue
        with Checkpoints(folder, keep=1, read_only=True) as checkpoints:
            step = checkpoints.latest()
            if step is None:
                continue
            leaves = leaves_by_path(state)
            shared = {name: x for name, x in leaves.items() if name.startswith((f"model.{inside}", *TABLES))}
            shared.pop(f"tables.{FREQUENCY}", None)
            found = checkpoints.restore_some(step, shared)
            lacking = [name for name in shared if name.startswith("model.") and name not in found]
            if lacking or not any(name.startswith("model.") for name in shared):
                raise ValueError(
                    f"train.warm_start = {workdir}: its encoder lacks {lacking[:3]}; expected a run with the same model"
                )
            return jax.tree.unflatten(jax.tree.structure(state), list((leaves | found).values()))
    raise ValueError(f"train.warm_start = {workdir}: no checkpoint there; train that run first")
