"""Kinds of embedding table at 4 to 1,024 bytes per item, on planted data and ML-1M. Prediction and verdict: README.md.

    python -m launch.sweep experiments/0003_table_axis --on=local   (ML-1M where logs/ml-1m is there)

The encoder is the same in every cell; what differs is how an item id becomes a vector, and what that costs in memory.
"""

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import hstu_ml1m, hstu_planted
from recscale.data.event_log import EventLog
from recscale.data.planted import config_of
from recscale.data.planted_floors import next_item_nats
from recscale.data.prepare import prepare as prepare_log
from recscale.data.splits import SPLITS
from recscale.scaling import axes
from recscale.scaling.collect import Row, collect
from recscale.scaling.figures import FLOOR, STYLE

HERE = Path(__file__).parent
NAME = "0003_table_axis"
SEEDS = (0, 1, 2)
DIM = 64  # of every kind but "full", whose width is its size
USERS, EVAL_USERS, HISTORY = 12_000, 2_000, 32
LOGS = {"planted": Path("runs/logs/planted_table_axis"), "ml1m": Path("logs/ml-1m")}
ITEMS = {"planted": 4_000, "ml1m": 3_706}


class Point(NamedTuple):
    """One table: its kind, a size for the name, the width of its vectors and the sizes of the kind."""

    kind: str
    size: int
    dim: int = DIM
    rows: int = 0
    parts: int = 1
    inner: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}{self.parts if self.kind == 'hashed' else ''}_{self.size}"


def points(items: int) -> list[Point]:
    """The tables of a catalogue; `size` is about the stored bytes per item."""

    def rows(size: float) -> int:
        return min(items, round(size * items / (4 * DIM)))

    found = [Point("full", 4 * dim, dim=dim) for dim in (1, 4, 16, 64, 256)]
    found += [Point("hashed", size, rows=rows(size), parts=k) for k in (1, 2) for size in (4, 16, 64)]
    found += [Point("low_rank", 4 * inner, inner=inner) for inner in (1, 4, 16)]
    found += [Point("capped", size, rows=rows(size - 4)) for size in (16, 64)]
    found += [Point("quotient_remainder", round(4 * DIM * (m + items / m) / items), rows=m) for m in (64, 900)]
    found += [Point("multi", 4 * sets * width, parts=sets, inner=width) for sets, width in ((2, 16), (4, 16))]
    found += [Point("pq", parts, parts=parts) for parts in (2, 8, 32)]
    return found + [Point("ngram", size, rows=rows(size), parts=4) for size in (16, 64)]


def _base(data: str) -> ConfigDict:
    """An HSTU of two layers of 32 on histories of 32 events, 128 negatives a row; nothing is tuned per kind."""
    config = (hstu_planted if data == "planted" else hstu_ml1m).get_config().unlock()
    config.data.path = str(LOGS[data])
    config.loader.update({"batch_size": 16, "length": HISTORY, "row_length": 64, "window": "all", "layout": "packed"})
    config.model.update({"width": 32, "depth": 2, "heads": 2, "qk_dim": 16, "v_dim": 16, "max_length": HISTORY})
    config.model.update({"embed_dim": DIM, "dropout": 0.0})
    config.task.update({"loss": "sampled", "negatives": 128, "shared": "row", "similarity": "cosine"})
    config.task.update({"temperature": 0.05, "sampler": "uniform", "logq": "none"})
    config.optim.update({"schedule": "cosine", "learning_rate": 2e-3, "warmup": 50})
    config.table.update({"optimizer": "lazy_adam", "learning_rate": 2e-3, "warmup": 50})
    config.train.update({"epochs": 1.0, "eval_every": 0, "checkpoint_every": 0, "select": "", "patience": 0})
    config.eval.update({"final": ("test",), "protocols": ("full",), "ks": (10,), "chunk": 512, "top_k": 10})
    if data == "planted":
        config.split.train_users, config.split.eval_users = USERS - EVAL_USERS, EVAL_USERS
    config.cell.coordinates = ConfigDict({"data": data, "dim": DIM})
    return config.lock()


def _cells() -> dict[str, tuple[str, Point, int]]:
    there = [data for data in LOGS if data == "planted" or LOGS[data].is_dir()]
    return {f"{d}-{p.name}-s{s}": (d, p, s) for s in SEEDS for d in there for p in points(ITEMS[d])}


def cells() -> list[str]:
    """Every table on every log, one seed after the other."""
    if not LOGS["ml1m"].is_dir():
        print(f"{LOGS['ml1m']} is not prepared: the study runs on planted data alone")
    return list(_cells())


def get_config(cell: str) -> ConfigDict:
    """The config of a cell."""
    if cell not in _cells():
        raise ValueError(f"study {NAME} has no cell {cell!r}; names look like planted-hashed2_64-s0")
    data, point, seed = _cells()[cell]
    config = axes.table_kind(_base(data), point.kind, rows=point.rows, parts=point.parts, inner=point.inner).unlock()
    config.model.embed_dim = config.cell.coordinates.dim = point.dim
    return axes.cell(config.lock(), NAME, cell, ("table",), seed)


def prepare(folder: Path) -> None:
    """Make the planted log once."""
    del folder
    if not LOGS["planted"].is_dir():
        prepare_log("planted", LOGS["planted"], settings={"users": USERS, "items": ITEMS["planted"]})


def floor() -> float:
    """Bayes-optimal test nats of the planted log."""
    log = EventLog.open(LOGS["planted"])
    arguments = dict(_base("planted").split)
    view = SPLITS[arguments.pop("name")](log, **arguments)["test"]
    return float(np.mean(next_item_nats(config_of(log), log, view, HISTORY, False)))


METRICS = {"nats": "test nats per event", "hr@10": "test HR@10"}


def table(rows: list[Row]) -> list[dict[str, object]]:
    """One line per log and table: means over seeds, and the standard deviation between them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["cell.coordinates.data"], str(row["cell.name"]).split("-")[1]), []).append(row)
    lines = []
    for (data, name), members in groups.items():
        line: dict[str, object] = {"data": data, "table": name, "kind": name.rsplit("_", 1)[0], "seeds": len(members)}
        line["bytes_per_item"] = round(members[0]["table.bytes_per_item"], 2)
        for metric in METRICS:
            values = [row[f"eval.test.all.{metric}"] for row in members]
            line[metric] = round(float(np.mean(values)), 5)
            line[f"{metric}.sd"] = round(float(np.std(values, ddof=1)), 5) if len(values) > 1 else None
        line["stderr"] = round(members[0]["eval.test.all.hr@10.stderr"], 5)
        line["information_abundance"] = round(
            float(np.mean([row["table.information_abundance"] for row in members])), 2
        )
        lines.append(line)
    return sorted(lines, key=lambda line: (str(line["data"]), str(line["kind"]), float(str(line["bytes_per_item"]))))


def draw(lines: list[dict[str, object]], path: Path, limit: float) -> None:
    """Loss and hit rate against bytes per item, one line per kind; bars are 90 % over seeds."""
    there = [data for data in LOGS if any(line["data"] == data for line in lines)]
    kinds = sorted({str(line["kind"]) for line in lines})
    colours = {kind: matplotlib.colormaps["tab10"](i) for i, kind in enumerate(kinds)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * len(there), 8.0), layout="constrained")
        grid = figure.subplots(len(METRICS), len(there), squeeze=False, sharex=True)
        for column, data in enumerate(there):
            for row, (metric, label) in enumerate(METRICS.items()):
                panel = grid[row][column]
                for kind in kinds:
                    mine = [line for line in lines if line["data"] == data and line["kind"] == kind]
                    x = [float(str(line["bytes_per_item"])) for line in mine]
                    y = [float(str(line[metric])) for line in mine]
                    bars = [1.645 * float(str(line[f"{metric}.sd"] or 0.0)) for line in mine]
                    panel.errorbar(x, y, bars, marker="o", ms=4, lw=1.4, capsize=2, label=kind, color=colours[kind])
                if metric == "nats" and data == "planted":
                    panel.axhline(limit, color=FLOOR, ls="--", lw=1, label=f"known floor {limit:.3f}")
                if metric == "nats":
                    _note_what_is_off(panel, [line for line in lines if line["data"] == data], ITEMS[data], colours)
                panel.set_xscale("log", base=2)
                panel.set_xticks([4, 16, 64, 256, 1024], ["4", "16", "64", "256", "1024"])
                panel.set_title(f"{data}: {label}")
                if row == len(METRICS) - 1:
                    panel.set_xlabel("stored bytes per item")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        figure.savefig(path)


def _note_what_is_off(panel: Axes, lines: list[dict[str, object]], items: int, colours: dict[str, Any]) -> None:
    """Cut the panel a little above the loss of a uniform guess, and write the value of what lies beyond."""
    top = math.log(items) + 0.3
    values = [(float(str(line["bytes_per_item"])), float(str(line["nats"])), str(line["kind"])) for line in lines]
    panel.set_ylim(min(panel.get_ylim()[0], min(y for _, y, _ in values) - 0.2), top)
    for x, y, kind in values:
        if y > top:
            panel.annotate(f"{y:.1f}", (x, top), (0, -14), textcoords="offset points", color=colours[kind], ha="center")


def write_report(folder: Path) -> Path:
    """Collect the runs of FOLDER into results.csv and table_axis.png; returns the figure."""
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
    draw(lines, folder / "table_axis.png", floor())
    return folder / "table_axis.png"
