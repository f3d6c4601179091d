"""A run that begins with the encoder and the tables of another one: fine-tuning after pre-training.

`train.warm_start` names a finished workdir. Encoder, item table and feature tables are taken from its selected
checkpoint (else its newest); the head, the optimizer, the step and the item frequencies (those of the run's own
training data) are new. A table that the other run did not have begins as always.
"""

from pathlib import Path
from typing import Any

import jax

from recscale import record
from recscale.checkpoint import Checkpoints, leaves_by_path
from recscale.tasks.next_item import FREQUENCY

TABLES = ("tables.", "mixers.")
PLACES = ("model.encoder.", "model.")  # of an encoder: with a head beside it, and alone


def warm_start(state: dict[str, Any], workdir: Path, inside: str) -> dict[str, Any]:
    """The state with what it shares with the run in `workdir`; inside: where its own encoder is, "encoder." or "".

    Raises ValueError where the run has not finished, the folder has no checkpoint, or its encoder or item table is not
    that of this run.
    """
    status = record.read(workdir)["status"] if (workdir / "record.json").is_file() else "ok"
    if status != "ok":
        raise ValueError(f"train.warm_start = {workdir}: that run has not finished (status {status!r}); train it first")
    for folder in (workdir / "best", workdir / "checkpoints"):
        if not folder.is_dir():
            continue
        with Checkpoints(folder, keep=1, read_only=True) as checkpoints:
            step = checkpoints.latest()
            if step is None:
                continue
            leaves, own = leaves_by_path(state), f"model.{inside}"
            encoder = {name.removeprefix(own): x for name, x in leaves.items() if name.startswith(own)}
            tables = {name: x for name, x in leaves.items() if name.startswith(TABLES)}
            tables.pop(f"tables.{FREQUENCY}", None)
            wanted = {place + name: x for place in PLACES for name, x in encoder.items()} | tables
            found = checkpoints.restore_some(step, wanted)
            lacking = {place: [name for name in encoder if place + name not in found] for place in PLACES}
            place = min(PLACES, key=lambda place: len(lacking[place]))
            if lacking[place] or not encoder:
                raise ValueError(
                    f"train.warm_start = {workdir}: its encoder lacks {lacking[place][:3]}; expected a run with the "
                    "same model"
                )
            if tables and not tables.keys() & found.keys():
                raise ValueError(f"train.warm_start = {workdir}: it has none of the tables {sorted(tables)[:3]}")
            taken = {own + name: found[place + name] for name in encoder}
            taken |= {name: found[name] for name in tables if name in found}
            return jax.tree.unflatten(jax.tree.structure(state), list((leaves | taken).values()))
    raise ValueError(f"train.warm_start = {workdir}: no checkpoint there; train that run first")
