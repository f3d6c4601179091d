"""Checkpoints of a run: the train state and the data position, written asynchronously by Orbax.

Leaves are stored under their path in the state ("model.layers.uvqk"), so a checkpoint says what it holds and restores
onto any mesh.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


def _named(state: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


class Checkpoints:
    """The newest `keep` checkpoints of one folder. Use as a context manager: leaving it waits for the writes.

    read_only: leaves the folder as it is, even what looks like the rest of a broken write: a run may be writing it.
    """

    def __init__(self, path: Path, keep: int, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, cleanup_tmp_directories=not read_only, read_only=read_only
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(path.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, int]) -> None:
        """Start writing `state` and the data position; returns before the write ends. A step is saved once."""
        if step == self.latest():
            return
        # A copy, because the next step donates these buffers while the write is still going on.
        leaves = jax.tree.map(jnp.copy, _named(state))
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), data=ocp.args.JsonSave(data))
        )

    def wait(self) -> None:
        """Return when everything saved so far is on disk."""
        self.manager.wait_until_finished()

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, int]]:
        """The state at `step` in the structure, types and shardings of `state`, and the data position.

        Raises ValueError where the checkpoint holds other arrays (the config has changed).
        """
        named = _named(state)
        self.manager.wait_until_finished()
        stored = self.manager.item_metadata(step)["state"]
        shapes = {name: tuple(meta.shape) for name, meta in stored.items()}
        expected = {name: leaf.shape for name, leaf in named.items()}
        if shapes != expected:
            differing = sorted(k for k in shapes | expected if shapes.get(k) != expected.get(k))
            raise ValueError(
                f"{self.manager.directory}: the checkpoint does not fit this config; it differs in {differing[:5]}. "
                "Use the config it was trained with, or another --workdir."
            )
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in named.items()}
        restored = self.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        )
        structure = jax.tree_util.tree_structure(state)
        return jax.tree_util.tree_unflatten(structure, [restored["state"][k] for k in named]), restored["data"]
