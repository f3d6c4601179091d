"""Behaviour vectors: what training on who took what has learned of each item, float32 [V + 1, D], row 0 zeros.

From the folder of a trained run (the item table of its selected checkpoint) or from a .npy file. `joined` puts them
beside content vectors, so that codes tell apart what is described alike and taken by others, and the other way round.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from recscale import record
from recscale.checkpoint import Checkpoints, leaves_by_path
from recscale.data.event_log import EventLog, EventLogError
from recscale.layers.kinds import Table
from recscale.layers.tables import Tables
from recscale.mesh import REPLICATED, make_mesh
from recscale.semantic_ids.catalogue import identity
from recscale.semantic_ids.content import ContentError, check_vectors

TABLE = "item"  # what a run calls the table of its catalogue
_SHAPE = ("kind", "rows", "parts", "inner", "combine", "dtype")
_BLOCK = 1 << 16  # items looked up at a time


def from_run(workdir: str | Path, log: EventLog) -> np.ndarray:
    """The item vectors of a trained run over this log's catalogue: its selected checkpoint's, else its newest one's.

    Raises ContentError: no run or no checkpoint there, a run over other items, a run without a table of item vectors.
    """
    workdir = Path(workdir)
    try:
        config = record.read(workdir)["config"]
    except (OSError, ValueError) as error:
        raise ContentError(f"{workdir}: no run here ({' '.join(str(error).split())})") from None
    _check_same_items(workdir, config["data"]["path"], log)
    shape = {key: config["table"][key] for key in _SHAPE if key in config["table"]}
    spec = Table(log.num_items, config["model"]["embed_dim"], **shape)
    tables = Tables({TABLE: spec}, make_mesh(1, 1, 1, jax.devices()[:1]))
    state = _restored(workdir, tables)
    found = np.zeros((log.num_items + 1, spec.dim), np.float32)
    lookup = jax.jit(lambda state, ids: tables.lookup(state["tables"], state["mixers"], TABLE, ids))
    block = min(_BLOCK, log.num_items)
    for first in range(1, log.num_items + 1, block):
        ids = np.arange(first, first + block, dtype=np.int32)
        ids[ids > log.num_items] = 0  # padding: one shape for all blocks
        found[ids] = lookup(state, ids)
    return _padded(found[1:], log.num_items, str(workdir))


def from_file(path: str | Path, log: EventLog) -> np.ndarray:
    """The vectors of a .npy file of [V, D], item 1 first, or of [V + 1, D] with padding first.

    Raises ContentError: no such file, another shape, NaN, a padding row that is not zeros.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ContentError(f"{path}: no .npy file of numbers ({' '.join(str(error).split())})") from None
    V = log.num_items
    if found.ndim != 2 or len(found) not in (V, V + 1):
        raise ContentError(
            f"{path}: shape {list(found.shape)}, expected [{V}, width], or [{V + 1}, width] with padding first: are "
            "these the vectors of another catalogue?"
        )
    if len(found) == V + 1 and np.any(found[0] != 0):
        raise ContentError(f"{path}: {V + 1} rows for {V} items, so row 0 is padding, but it is not zeros")
    return _padded(np.array(found[len(found) - V :]), V, str(path))


def joined(content_VD: np.ndarray, behaviour_VE: np.ndarray, *, weight: float = 0.5) -> np.ndarray:
    """Content and behaviour side by side, float32 [V + 1, D + E], row 0 zeros.

    Each part is centred and scaled to a mean squared length of 1 over the items, then by the root of its share: weight
    is the share of behaviour in a squared distance. Raises ContentError for other rows, a weight that is not in 0..1,
    vectors that are all equal.
    """
    if not 0 <= weight <= 1:
        raise ContentError(f"joined: weight = {weight}: expected 0..1, the share of behaviour")
    if len(content_VD) != len(behaviour_VE):
        raise ContentError(
            f"joined: content of {len(content_VD)} rows, behaviour of {len(behaviour_VE)}: expected those of one log"
        )
    parts = [_unit(content_VD, "content") * (1 - weight) ** 0.5, _unit(behaviour_VE, "behaviour") * weight**0.5]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _unit(vectors_VD: np.ndarray, name: str) -> np.ndarray:
    x = check_vectors(vectors_VD, len(vectors_VD), f"joined: {name}")[1:].astype(np.float64)
    x = x - x.mean(axis=0)
    length = np.sqrt((x**2).sum(axis=1).mean())
    if length == 0:
        raise ContentError(f"joined: all {name} vectors are equal: they say nothing of any item")
    return np.concatenate([np.zeros((1, x.shape[1])), x / length])


def _padded(found_VD: np.ndarray, rows: int, name: str) -> np.ndarray:
    return np.pad(check_vectors(found_VD, rows, name), ((1, 0), (0, 0)))


def _check_same_items(workdir: Path, path: str, log: EventLog) -> None:
    """Where the run's log is still there, its items must be this log's; else the checkpoint's shapes decide."""
    try:
        theirs = EventLog.open(path)
    except EventLogError:
        return
    if identity(theirs) != identity(log):
        raise ContentError(
            f"{workdir}: trained on {path} with {theirs.num_items:,} items, which are not the {log.num_items:,} of "
            f"{log.path or 'this log'}: choose a run over the same catalogue"
        )


def _restored(workdir: Path, tables: Tables) -> dict[str, Any]:
    """{"tables", "mixers"} of the run's selected checkpoint, else of its newest."""
    shapes = dict(zip(("tables", "mixers"), jax.eval_shape(tables.init, jax.random.key(0)), strict=True))
    place = NamedSharding(tables.mesh, REPLICATED)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    leaves = leaves_by_path(wanted)
    for folder in (workdir / "best", workdir / "checkpoints"):
        if not folder.is_dir():
            continue
        with Checkpoints(folder, keep=1, read_only=True) as checkpoints:
            step = checkpoints.latest()
            if step is None:
                continue
            try:
                found = checkpoints.restore_some(step, leaves)
            except ValueError as error:
                raise ContentError(f"{workdir}: {' '.join(str(error).split())}") from None
            lacking = sorted(set(leaves) - set(found))
            if lacking:
                raise ContentError(f"{folder}/{step}: lacks {', '.join(lacking)}: no run with a table of item vectors")
            return jax.tree.unflatten(jax.tree.structure(wanted), [found[name] for name in leaves])
    raise ContentError(f"{workdir}: no checkpoint there; train that run first")
