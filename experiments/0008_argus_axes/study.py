"""ARGUS on planted impressions with known floors: encoder, context and token forms. Why and verdict: README.md beside.

python -m launch.sweep experiments/0008_argus_axes --on=local
"""

import csv
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import argus_kuairand
from recscale import paired, record
from recscale.data import splits
from recscale.data.event_log import EventLog
from recscale.data.planted import config_of
from recscale.data.planted_floors import entropies, feedback_nats, next_item_nats
from recscale.data.prepare import prepare as prepare_log
from recscale.scaling import axes

NAME = "0008_argus_axes"
LOG = Path("runs/logs/planted_likes")
WORLD = {"users": 14_000, "like_own": 0.9, "like_noise": 0.05}
TRAIN_USERS, EVAL_USERS, HISTORY = 6_000, 8_000, 64
LOSSES = {"nats": "next item, nats", "log_loss/like": "feedback, nats"}
# sub-axis -> (axis, levels, seeds); "micro", a history of 64 and collapsed tokens are the base and not repeated
SIZES = {"nano": 3, "micro": 3, "mini": 1, "small": 1}
HISTORIES = {4: 2, 16: 2, 256: 2}
FORMS = {"interleaved": 1, "literal": 1}


def base() -> ConfigDict:
    """The cell that the axes share: encoder micro (3 x 128), 64 events, one pass over 6,000 users, full softmax."""
    config = argus_kuairand.get_config().unlock()
    config.data.path = str(LOG)
    config.split = ConfigDict(
        {"name": "by_user", "train_users": TRAIN_USERS, "eval_users": EVAL_USERS, "eval_targets": 1}
    )
    config.loader.update({"batch_size": 8, "length": HISTORY, "row_length": 128, "window": "all"})
    config.loader.update({"inputs": ("like", "surface"), "queries": ("surface",)})
    config.model.update({"embed_dim": 64, "width": 64, "depth": 2, "heads": 2, "max_length": HISTORY, "dropout": 0.0})
    config.model.time_bias = False
    config.table.update({"optimizer": "adam", "learning_rate": 5e-3})
    config.task.update({"loss": "full", "negatives": 0, "logq": "none", "similarity": "dot", "temperature": 1.0})
    config.task.update({"heads": (("like", "binary"),), "edges": ()})
    config.optim.update({"learning_rate": 2e-3, "weight_decay": 0.0})
    config.train.update({"epochs": 1.0, "log_every": 20})
    config.eval.update({"block": 1024, "chunk": 512, "batch_size": 64})
    config.cell.coordinates = ConfigDict({"history": HISTORY, "width": 0, "depth": 0, "form": "collapsed"})
    return axes.encoder_size(config.lock(), "micro")


def with_history(config: ConfigDict, length: int) -> ConfigDict:
    """Another length of history, in rows of about the same number of tokens."""
    config = config.copy_and_resolve_references().unlock()
    config.model.max_length = length
    config.loader.row_length = max(128, length)
    config.loader.batch_size = 1024 // config.loader.row_length
    return axes.context_history(config.lock(), length)


def with_form(config: ConfigDict, form: str) -> ConfigDict:
    """Another form of tokens."""
    config = config.copy_and_resolve_references().unlock()
    config.task.form = config.cell.coordinates.form = form
    config.model.max_length = 3 * HISTORY
    return config.lock()


@functools.cache
def _configs() -> dict[str, ConfigDict]:
    found = {}
    for size, seeds in SIZES.items():
        for seed in range(seeds):
            found[f"{size}-s{seed}"] = axes.cell(axes.encoder_size(base(), size), NAME, size, ("encoder",), seed)
    for length, seeds in HISTORIES.items():
        for seed in range(seeds):
            name = f"history-{length}"
            found[f"{name}-s{seed}"] = axes.cell(with_history(base(), length), NAME, name, ("context",), seed)
    for form, seeds in FORMS.items():
        for seed in range(seeds):
            found[f"{form}-s{seed}"] = axes.cell(with_form(base(), form), NAME, form, (), seed)
    return found


def cells() -> list[str]:
    """Names of the cells, the cheapest first."""
    found = _configs()
    return sorted(found, key=lambda name: found[name].model.depth * found[name].model.width ** 2)


def get_config(cell: str) -> ConfigDict:
    """Config of a cell, e.g. "mini-s0"."""
    found = _configs()
    if cell not in found:
        raise ValueError(f"study {NAME} has no cell {cell!r}; it has {', '.join(found)}")
    return found[cell].lock()


def prepare(folder: Path) -> None:
    """Generate the log once and write the known floors of the evaluation targets to FOLDER/floors.json."""
    log = prepare_log("planted", LOG, settings=WORLD)
    if not (folder / "floors.json").exists():
        (folder / "floors.json").write_text(json.dumps(floors(log), indent=1))


def floors(log: EventLog) -> dict[str, dict[str, float]]:
    """Bayes-optimal losses of the test targets per history, likes and surfaces seen; "none": of a constant."""
    view = splits.by_user(log, TRAIN_USERS, EVAL_USERS, eval_targets=1)["test"]
    planted, found = config_of(log), {}
    for length in (*HISTORIES, HISTORY):
        item = next_item_nats(planted, log, view, length, context=True, feedback=True)
        like = feedback_nats(planted, log, view, length, context=True)
        found[str(length)] = {"nats": float(item.mean()), "log_loss/like": float(like.mean())}
    constant = entropies(planted)
    found["none"] = {"nats": constant["unigram"], "log_loss/like": constant["like"]}
    return found


def table(folder: Path) -> list[dict[str, Any]]:
    """One line per kind of cell: parameters, mean losses over seeds, and what lies above the floor."""
    known, lines = json.loads((folder / "floors.json").read_text()), []
    for kind in dict.fromkeys(name.rpartition("-s")[0] for name in cells()):
        paths = [folder / name for name in cells() if name.rpartition("-s")[0] == kind]
        books = [record.read(path) for path in paths if (path / "DONE").exists()]
        if not books:
            continue
        line = {"cell": kind, "seeds": len(books), "encoder": books[0]["parameters"]["dense"]}
        line |= {"history": books[0]["cell"]["coordinates"]["history"], "seconds": books[0]["seconds"]["wall"]}
        for metric in LOSSES:
            rows = [r for b in books for r in b["evaluations"] if r["metric"] == metric and r["slice"] == "all"]
            mean = float(np.mean([row["value"] for row in rows]))
            line |= {metric: mean, f"{metric} above floor": mean - known[str(line["history"])][metric]}
            line |= {f"{metric} sd": float(np.std([r["value"] for r in rows], ddof=1)) if len(rows) > 1 else None}
        lines.append(line)
    return lines


def comparisons(folder: Path) -> list[dict[str, Any]]:
    """Neighbouring cells against each other, seed 0, paired over the users: difference and 95 % interval."""
    pairs = [("nano", "micro"), ("micro", "mini"), ("mini", "small"), ("history-4", "history-16")]
    pairs += [("history-16", "micro"), ("micro", "history-256"), ("micro", "interleaved"), ("micro", "literal")]
    lines = []
    for before, after in pairs:
        runs = [folder / f"{name}-s0" for name in (before, after)]
        if not all((run / "DONE").exists() for run in runs):
            continue
        found = [paired.read_run(run, "test") for run in runs]
        user, users = paired.aligned(*found)
        a, b = (paired.statistics_of(run, user, users, ks=()) for run in found)
        a = {name: statistic for name, statistic in a.items() if name in LOSSES}
        for row in paired.compare(a, b, users):
            interval = {"change": row.difference, "low": row.low, "high": row.high}
            lines.append({"from": before, "to": after, "loss": row.metric, **interval})
    return lines


def draw(lines: list[dict[str, Any]], known: dict[str, dict[str, float]], path: Path) -> None:
    """Both losses over encoder parameters and over history, with their floors."""
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    panels = figure.subplots(2, 2)
    by_cell = {line["cell"]: line for line in lines}
    sizes = [by_cell[name] for name in SIZES if name in by_cell]
    names = [*(f"history-{length}" for length in HISTORIES), "micro"]
    histories = sorted((by_cell[name] for name in names if name in by_cell), key=lambda line: line["history"])
    for row, (metric, label) in zip(panels, LOSSES.items(), strict=True):
        for panel, found, key in ((row[0], sizes, "encoder"), (row[1], histories, "history")):
            panel.plot([line[key] for line in found], [line[metric] for line in found], "o-", label="trained")
            floor = [known[str(line["history"])][metric] for line in found]
            panel.plot([line[key] for line in found], floor, "k--", label="Bayes-optimal")
            panel.set_xscale("log", base=2 if key == "history" else 10)
            panel.set_ylabel(label)
            panel.set_xlabel({"encoder": "encoder parameters", "history": "history, events"}[key])
    panels[0][0].legend()
    figure.savefig(path, dpi=110)


def write_report(folder: Path) -> Path:
    """Write FOLDER/results.csv, comparisons.csv and losses.png from what has finished."""
    lines, known = table(folder), json.loads((folder / "floors.json").read_text())
    for name, rows in (("results.csv", lines), ("comparisons.csv", comparisons(folder))):
        if rows:
            with (folder / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    if lines:
        draw(lines, known, folder / "losses.png")
    return folder / "results.csv"
