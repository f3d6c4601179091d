"""Four scaling axes on planted data, where the floor is known. Question, prediction and verdict: README.md beside.

python -m launch.sweep experiments/0001_four_axes_planted --on=local
python -m recscale.train --config=experiments/0001_four_axes_planted/study.py:users-1000-s0 --workdir=DIR
"""

import functools
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import hstu_planted
from recscale.data import splits
from recscale.data.event_log import EventLog
from recscale.data.planted import config_of
from recscale.data.planted_floors import next_item_nats
from recscale.data.prepare import prepare as prepare_log
from recscale.scaling import axes, report

NAME = "0001_four_axes_planted"
LOG = Path("runs/logs/planted_20000")
USERS, EVAL_USERS, BASE_USERS = 20_000, 4_000, 8_000
BASE_SEEDS = (0, 1, 2, 3, 4)
HISTORY = 32
# sub-axis -> (axis, axis function, levels); the base level is not repeated
SWEEPS = {
    "dim": ("table", axes.table_dim, (2, 4, 8, 16, 64)),
    "rows": ("table", axes.table_rows, (62, 125, 250, 500)),
    "users": ("data", axes.data_users, (1000, 2000, 4000, 16_000)),
    "events": ("data", axes.data_events, (8, 16, 32, 64)),
    "history": ("context", axes.context_history, (1, 2, 4, 8, 16, 64)),
    "width": ("encoder", axes.encoder_width, (4, 8, 16, 64)),
    "depth": ("encoder", axes.encoder_depth, (1, 4)),
}


def base() -> ConfigDict:
    """The cell that all axes share: 8,000 users, one pass, table 1,000 x 32, history 32, HSTU 2 x 32."""
    config = hstu_planted.get_config().unlock()
    config.data.path = str(LOG)
    config.split.train_users, config.split.eval_users = USERS - EVAL_USERS, EVAL_USERS
    config.loader.length = HISTORY
    config.cell.coordinates = ConfigDict(
        {
            "table_rows": 0,
            "table_dim": config.model.embed_dim,
            "users": BASE_USERS,
            "events_per_user": 0,
            "history": HISTORY,
            "context_features": 0,
            "width": config.model.width,
            "depth": config.model.depth,
        }
    )
    return axes.data_users(config.lock(), BASE_USERS)


@functools.cache
def _configs() -> dict[str, ConfigDict]:
    every_axis = tuple(axes.AXES)
    found = {f"base-s{seed}": axes.cell(base(), NAME, "base", every_axis, seed) for seed in BASE_SEEDS}
    for sub_axis, (axis, change, levels) in SWEEPS.items():
        for level in levels:
            name = f"{sub_axis}-{level}"
            found[f"{name}-s0"] = axes.cell(change(base(), level), NAME, name, (axis,))
    features = axes.context_features(base(), ("surface",))
    found["features-1-s0"] = axes.cell(features, NAME, "features-1", ("context",))
    return found


def cells() -> list[str]:
    """Names of the cells, most expensive first so that none is left running alone at the end."""
    found = _configs()
    cost = {n: c.data.users * c.model.depth * (c.model.width + c.loader.length) for n, c in found.items()}
    return sorted(found, key=lambda name: -cost[name])


def get_config(cell: str) -> ConfigDict:
    """Config of a cell, e.g. "base-s0"."""
    found = _configs()
    if cell not in found:
        raise ValueError(f"study {NAME} has no cell {cell!r}; it has {', '.join(found)}")
    return found[cell].lock()


def prepare(folder: Path) -> None:
    """Generate the log once and write the known floors of the evaluation targets to FOLDER/floors.json."""
    log = prepare_log("planted", LOG, settings={"users": USERS})
    if not (folder / "floors.json").exists():
        (folder / "floors.json").write_text(json.dumps(floors(log), indent=1))


def floors(log: EventLog) -> dict[str, float]:
    """Bayes-optimal nats on the test targets: "history=L" and "history=L, surface", and the popularity loss."""
    view = splits.by_user(log, USERS - EVAL_USERS, EVAL_USERS, eval_targets=1)["test"]
    planted = config_of(log)

    def mean(history: int | None, context: bool = False) -> float:
        return float(np.mean(next_item_nats(planted, log, view, history, context)))

    lengths = (1, 2, 4, 8, 16, 32, 64)
    found = {"popularity": mean(0), "history=all": mean(None)} | {f"history={n}": mean(n) for n in lengths}
    return found | {f"history={HISTORY}, surface": mean(HISTORY, context=True)}


def feature_gain(folder: Path) -> tuple[str, str]:
    """What the context feature buys, paired over the test targets: (label, sentence)."""
    label, cells = "context: query feature", ("base-s0", "features-1-s0")
    files = [folder / cell / "per_target_test.npz" for cell in cells]
    if not all(file.exists() for file in files):
        return label, "Nothing can be said: its cell has not finished."
    without, with_feature = (np.load(file)["nats"] for file in files)
    saved = without - with_feature
    half = 1.645 * saved.std(ddof=1) / len(saved) ** 0.5
    mean = saved.mean()
    return label, (
        f"Switching it on lowers test nats by {mean:.4f} nats/event (90 % {mean - half:.4f} to {mean + half:.4f}, "
        f"paired over {len(saved)} targets, one seed each)."
    )


def write_report(folder: Path) -> Path:
    """Collect the runs of FOLDER and write FOLDER/report.html."""
    return report.write(Path(__file__).parent, runs=folder, out=folder, switches=[feature_gain(folder)])
