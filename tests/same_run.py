"""Two run folders hold the same run: metrics, every bit of the checkpoints, and what the record says of the result."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from recscale import record
from recscale.checkpoint import Checkpoints
from recscale.run import build, init_state

RESULT = ("evaluations", "curve", "seen", "flops", "status", "reason", "stopped_at", "selected_step", "config_hash")


def measured(workdir: Path) -> list[dict]:
    """metrics.jsonl without its clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record.read_metrics(workdir)]


def final_arrays(config: ConfigDict, folder: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, as bits."""
    with Checkpoints(folder, keep=1) as checkpoints:
        step = checkpoints.latest()
        assert step is not None
        state, data = checkpoints.restore(step, init_state(build(config)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {"next": np.array(data["next_index"])} | {str(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(config: ConfigDict, broken: Path, unbroken: Path) -> None:
    assert measured(broken) == measured(unbroken)
    for folder in ("checkpoints", "best") if config.train.select else ("checkpoints",):
        one, other = final_arrays(config, broken / folder), final_arrays(config, unbroken / folder)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.tobytes() == other[name].tobytes(), name
    books = [record.read(folder) for folder in (broken, unbroken)]
    for key in RESULT:
        assert books[0][key] == books[1][key], key
