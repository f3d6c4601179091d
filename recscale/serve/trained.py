"""A workdir that training has written, opened again: its run and its train state."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from recscale import record
from recscale.checkpoint import Checkpoints
from recscale.program import abstract_state
from recscale.run import Run, build


def trained(workdir: str | Path) -> tuple[Run, dict[str, Any]]:
    """The run and the state of its selected checkpoint, else of its newest.

    Raises ValueError or OSError where there is none, or it cannot be read.
    """
    config = ConfigDict(_tuples(record.read(Path(workdir))["config"])).lock()
    run = build(config)
    folder = Path(workdir) / ("best" if config.train.select else "checkpoints")
    with Checkpoints(folder, keep=1, read_only=True) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise ValueError(f"{folder}: no checkpoint; train first")
        state, _ = checkpoints.restore(step, abstract_state(run))
    return run, state


def _tuples(value: Any) -> Any:
    """A config read from JSON: its lists are tuples again."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
