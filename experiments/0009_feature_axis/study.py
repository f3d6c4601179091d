"""What each context feature buys a ranker on KuaiRand-Pure, whatever the order of adding. README.md has the verdict.

python -m recscale.data.prepare --dataset=kuairand-pure --source=DIR --out=logs/kuairand-pure
python -m launch.sweep experiments/0009_feature_axis --on=local
"""

import csv
import functools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import argus_kuairand
from recscale.scaling import axes
from recscale.scaling.feature_orders import Arrays, Cell, answer, measured, name_of, orders, sentence, table
from recscale.scaling.feature_orders import cells as cells_of
from recscale.scaling.figure_files import write_files
from recscale.scaling.figures_features import feature_gains

NAME = "0009_feature_axis"
LOG = Path("logs/kuairand-pure")
SPLIT = {"name": "global_time", "test_from": 1_651_334_400, "val_from": 1_651_248_000, "gap": 3_600}
HEAD = "long_view"
ORDERS, SEED = 3, 0
# feature -> (where it is read, the columns it stands for)
FEATURES = {
    "tab": ("queries", ("tab",)),
    "hour": ("queries", ("hour",)),
    "feedback": ("inputs", ("is_click", "long_view", "is_like")),
    "played_ratio": ("inputs", ("played_ratio",)),
    "duration": ("inputs", ("items/video_seconds",)),
    "tag": ("inputs", ("items/tag",)),
}


def with_features(cell: Cell) -> ConfigDict:
    """The ranker of configs/argus_kuairand.py, feedback only, with these features and no other."""
    config = argus_kuairand.get_config().unlock()
    config.data.path, config.split = str(LOG), ConfigDict(SPLIT | {"keep_new_users": True})
    for place in ("inputs", "queries"):
        chosen = [names for feature, (where, names) in FEATURES.items() if feature in cell and where == place]
        config.loader[place] = tuple(name for names in chosen for name in names)
    config.task.update({"next_item": 0.0, "heads": ((HEAD, "binary"),), "edges": ()})
    config.cell.coordinates = ConfigDict({"context_features": len(cell)})
    return axes.cell(config.lock(), NAME, name_of(cell), ("context",), SEED)


@functools.cache
def _configs() -> dict[str, ConfigDict]:
    return {f"{name_of(cell)}-s{SEED}": with_features(cell) for cell in cells_of(tuple(FEATURES), ORDERS, SEED)}


def every_cell() -> list[str]:
    """All cells, whether the log is prepared or not."""
    return list(_configs())


def cells() -> list[str]:
    """Names of the cells, fewest features first."""
    if not LOG.is_dir():
        print(f"{LOG} is not prepared: the study has no cells; README.md says how")
        return []
    return every_cell()


def get_config(cell: str) -> ConfigDict:
    """Config of a cell, e.g. "none-s0"."""
    found = _configs()
    if cell not in found:
        raise ValueError(f"study {NAME} has no cell {cell!r}; it has {', '.join(found)}")
    return found[cell].lock()


def prepare(folder: Path) -> None:
    """Nothing to make: the log is prepared by hand."""
    del folder


def log_loss(arrays: Arrays) -> np.ndarray:
    """Cross-entropy of each impression, nats."""
    label = arrays[f"label/{HEAD}"]
    score = np.clip(arrays[f"score/{HEAD}"], 1e-7, 1 - 1e-7)
    return -(label * np.log(score) + (1 - label) * np.log1p(-score))


def write_report(folder: Path) -> Path:
    """Write FOLDER/gains.csv, gains.txt and features.png."""
    runs = {cell: [folder / f"{name_of(cell)}-s{SEED}"] for cell in cells_of(tuple(FEATURES), ORDERS, SEED)}
    found = answer(orders(tuple(FEATURES), ORDERS, SEED), measured(runs, loss=log_loss))
    with (folder / "gains.csv").open("w", newline="") as file:
        rows = table(found)
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "gains.txt").write_text(sentence(found, "nats/impression") + "\n")
    write_files(feature_gains(found, "nats/impression"), folder, f"{NAME}, {len(runs)} cells")
    return folder / "gains.csv"
