"""Some steps of a run, compiled quickly: for tests that compare runs."""

from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from recscale.mesh import place_batch
from recscale.program import shardings
from recscale.run import Run, build, init_state
from recscale.step import make_train_step

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
NO_WARMUP = {"optim__warmup": 0, "table__warmup": 0}  # the first step moves something


class Trained(NamedTuple):
    """A run after some steps: its losses, its state, and the state on the host that it started from."""

    run: Run
    losses: np.ndarray
    state: dict[str, Any]
    start: dict[str, Any]
    compiled: Any


def on(shape: tuple[int, int, int]) -> dict[str, int]:
    """The changes that put a tiny config on a mesh (replica, data, model)."""
    return dict(zip(("mesh__replica", "mesh__data", "mesh__model"), shape, strict=True))


def train(config: ConfigDict, start: dict[str, Any] | None = None, steps: int = 3) -> Trained:
    """Train for some steps; start: a host state to start from, default the config's own."""
    run = build(config)
    state = init_state(run) if start is None else jax.device_put(start, shardings(run))
    start = jax.tree.map(np.array, state)
    batches = [place_batch(run.mesh, run.loader[i]) for i in range(steps)]
    compiled = make_train_step(run).lower(state, batches[0]).compile(compiler_options=QUICK)
    losses = []
    for batch in batches:
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    assert int(metrics["lost_rows"]) == 0
    return Trained(run, np.array(losses), state, start, compiled)
