"""Where is the best learning rate of an encoder that is 8 times wider? README.md has prediction and verdict.

    python -m launch.sweep experiments/0005_width_transfer --on=local

Each cell is one pass over planted data with one learning rate of the encoder; that of the tables is never changed.
"""

import csv
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import hstu_planted
from recscale.data.prepare import prepare as prepare_log
from recscale.scaling import axes, recipes
from recscale.scaling.collect import Row, collect
from recscale.scaling.figures import STYLE

NAME = "0005_width_transfer"
LOG = Path("runs/logs/planted_width_transfer")
USERS, EVAL_USERS = 6_500, 4_000
BASE, WIDE = 16, 128
RATES = (5e-4, 1.6e-3, 5e-3, 1.6e-2, 5e-2, 1.6e-1)  # half a decade apart; the last was added later, see README.md
SEEDS = (0, 1)
METRIC = "eval.test.all.nats"


def base(rate: float) -> ConfigDict:
    """An HSTU of two layers of width 16; the shape at which both parametrisations are the same model."""
    config = hstu_planted.get_config().unlock()
    config.data.path = str(LOG)
    config.split.train_users, config.split.eval_users = USERS - EVAL_USERS, EVAL_USERS
    config.cell.coordinates = ConfigDict({"width": config.model.width, "learning_rate": rate})
    config = axes.encoder_width(config.lock(), BASE).unlock()
    config.optim.learning_rate = rate
    return config.lock()


def _configs() -> dict[str, ConfigDict]:
    found = {}
    for seed in SEEDS:
        for rate in RATES:
            wide = axes.encoder_width(base(rate), WIDE).unlock()
            wide.optim.learning_rate = rate  # the sweep says it, not the square root
            configs = {
                f"w{BASE}": base(rate),
                f"w{WIDE}-sp": wide.lock(),
                f"w{WIDE}-mup": axes.encoder_width(recipes.width_transfer(base(rate)), WIDE),
            }
            for name, config in configs.items():
                cell = f"{name}-lr{rate:g}"
                found[f"{cell}-s{seed}"] = axes.cell(config, NAME, cell, ("encoder",), seed)
    return found


def cells() -> list[str]:
    """Names of the cells, all of the first seed first."""
    return list(_configs())


def get_config(cell: str) -> ConfigDict:
    """The config of a cell."""
    if cell not in _configs():
        raise ValueError(f"study {NAME} has no cell {cell!r}; names look like w128-mup-lr0.005-s0")
    return _configs()[cell]


def prepare(folder: Path) -> None:
    """Make the planted log once."""
    del folder
    if not LOG.is_dir():
        prepare_log("planted", LOG, settings={"users": USERS})


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """One line per width, parametrisation and learning rate: mean loss over the seeds and how far they are apart."""
    groups: dict[tuple[int, str, float], list[float]] = {}
    for row in rows:
        key = (row["config.model.width"], row["config.optim.parametrisation"], row["config.optim.learning_rate"])
        groups.setdefault(key, []).append(row[METRIC])
    return [
        {"width": width, "parametrisation": kind, "learning_rate": rate, "seeds": len(values)}
        | {"nats": round(float(np.mean(values)), 5), "spread": round(float(np.ptp(values)), 5)}
        for (width, kind, rate), values in sorted(groups.items())
    ]


def best(lines: list[dict[str, Any]], width: int, kind: str) -> tuple[float, float]:
    """Learning rate of the lowest mean loss, and the vertex of the parabola through it and its two neighbours.

    The second is the first where that lies on the edge of the sweep.
    """
    mine = [line for line in lines if (line["width"], line["parametrisation"]) == (width, kind)]
    x, y = np.log([line["learning_rate"] for line in mine]), np.array([line["nats"] for line in mine])
    i = int(np.argmin(y))
    if i in (0, len(y) - 1):
        return float(np.exp(x[i])), float(np.exp(x[i]))
    curve = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    return float(np.exp(x[i])), float(np.exp(x[i] - curve[1] / (2 * curve[0])))


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Loss against learning rate at both widths, one panel per parametrisation; a line marks each optimum."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, kind, title in zip(panels, ("sp", "mup"), ("standard", "width transfer"), strict=True):
            for width, which, colour in ((BASE, "sp", "tab:blue"), (WIDE, kind, "tab:red")):
                mine = [line for line in lines if (line["width"], line["parametrisation"]) == (width, which)]
                x, y = [line["learning_rate"] for line in mine], [line["nats"] for line in mine]
                bars = [line["spread"] / 2 for line in mine]
                panel.errorbar(x, y, bars, marker="o", ms=4, capsize=2, color=colour, label=f"width {width}")
                panel.axvline(best(lines, width, which)[1], color=colour, lw=1.0, ls=":")
            panel.set_xscale("log")
            panel.set_title(title)
            panel.set_xlabel("learning rate of the encoder")
            panel.legend()
        panels[0].set_ylabel("test nats per event")
        figure.savefig(path)


def write_report(folder: Path) -> Path:
    """Collect the runs of FOLDER into results.csv and learning_rates.png; prints the optima and returns the figure."""
    records = collect(folder)
    lines = table(records.rows)
    if not lines:
        raise ValueError(f"{folder}: no finished cell; look at the log files of the cells")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    for excluded in records.excluded:
        print(f"not counted: {excluded.run}: {excluded.reason}")
    for width, kind in ((BASE, "sp"), (WIDE, "sp"), (WIDE, "mup")):
        rate, vertex = best(lines, width, kind)
        print(f"width {width}, {kind}: best rate {rate:g}, vertex {vertex:.2g}")
    draw(lines, folder / "learning_rates.png")
    return folder / "learning_rates.png"
