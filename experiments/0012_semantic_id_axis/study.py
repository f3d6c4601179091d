"""Semantic ids as an axis: levels x codes per level, width of the encoder, data. Question and verdict: README.md.

    python -m recscale.data.prepare --dataset=microlens --source=DIR --out=logs/microlens
    python -m launch.sweep experiments/0012_semantic_id_axis --on=local

`prepare` makes the codes: balanced residual k-means of the titles, and a digit where items share a tuple.
"""

import contextlib
import csv
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import rqkmeans_beauty, tiger_beauty
from recscale import record
from recscale.scaling import axes
from recscale.scaling import fit as fit_command
from recscale.scaling.figures import STYLE
from recscale.semantic_ids.make import make

NAME = "0012_semantic_id_axis"
LOG = Path("logs/microlens")
CODES = Path("runs") / NAME / "codes"
SEEDS = (0, 1, 2)
BASE = (3, 64)  # levels, codes per level
LEVELS, CODEBOOKS = (1, 2, 3, 4, 5), (16, 24, 32, 64, 128, 256)
WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160)
USERS = (800, 1_130, 1_600, 2_260, 3_200, 4_530, 6_400, 9_050, 0)
DIGITS = 128  # the largest bucket that a level tells apart; balanced levels of 64 leave 83 items and fewer together
X = {"capacity": "log2 of the learned tuples", "width": "width", "users": "training users"}


def base() -> ConfigDict:
    """A decoder-only model of two layers of 64 over three levels of 64 codes."""
    config = tiger_beauty.get_config().unlock()
    config.data.path = str(LOG)
    config.split = ConfigDict({"name": "leave_one_out", "validation": True, "validation_users": 2048})
    config.model_name = "tiger_decoder"
    config.model.update({"embed_dim": 64, "depth": 2, "heads": 4, "head_dim": 16, "ffn": 256})
    config.loader.update(
        {"batch_size": 32, "length": 20, "row_length": 20, "window": "all", "segments": 0, "inputs": ()}
    )
    config.optim.update({"warmup": 100, "learning_rate": 2e-3})
    config.train.update({"epochs": 30.0, "eval_every": 400, "checkpoint_every": 200, "select": "nats min"})
    config.eval.update(
        {"ks": (10, 50), "top_k": 50, "batch_size": 128, "protocols": ("full",), "final": ("val", "test")}
    )
    config.cell.coordinates.update({"width": 64, "users": 0})
    return _codes(config.lock(), *BASE)


def _codes(config: ConfigDict, levels: int, codebook: int) -> ConfigDict:
    return axes.semantic_id_codes(config, str(CODES / f"{levels}x{codebook}"), levels, codebook, DIGITS)


@functools.cache
def _configs() -> dict[str, ConfigDict]:
    found: dict[str, ConfigDict] = {}
    for seed in SEEDS:
        made = {"base": (base(), ("semantic_id", "encoder", "data"))}
        made |= {f"levels{q}": (_codes(base(), q, BASE[1]), ("semantic_id",)) for q in LEVELS if q != BASE[0]}
        made |= {f"codes{k}": (_codes(base(), BASE[0], k), ("semantic_id",)) for k in CODEBOOKS if k != BASE[1]}
        made |= {f"width{d}": (axes.semantic_id_width(base(), d), ("encoder",)) for d in WIDTHS if d != 64}
        made |= {f"users{n}": (axes.data_users(base(), n), ("data",)) for n in USERS if n}
        for name, (config, of) in made.items():
            found[f"{name}-s{seed}"] = axes.cell(config, NAME, name, of, seed)
    return found


def every_cell() -> list[str]:
    """All cells, whether the log is prepared or not."""
    return list(_configs())


def cells() -> list[str]:
    """Names of the cells."""
    if not LOG.is_dir():
        print(f"{LOG} is not prepared: the study has no cells; study.py says how")
        return []
    return every_cell()


def get_config(cell: str) -> ConfigDict:
    """Config of a cell, e.g. "levels2-s0"."""
    found = _configs()
    if cell not in found:
        raise ValueError(f"study {NAME} has no cell {cell!r}; it has {', '.join(found)}")
    return found[cell].lock()


def prepare(folder: Path) -> None:
    """Make the codes that are lacking."""
    del folder
    shapes = {(q, BASE[1]) for q in LEVELS} | {(BASE[0], k) for k in CODEBOOKS}
    for levels, codebook in sorted(shapes) if LOG.is_dir() else ():
        out = CODES / f"{levels}x{codebook}"
        if (out / "meta.json").exists():
            continue
        config = rqkmeans_beauty.get_config().unlock()
        config.data.path = str(LOG)
        config.model.update({"levels": levels, "codebook": codebook, "balanced_iterations": 10})
        config.collisions.update({"policy": "digit", "maximum": DIGITS})
        make(config.lock(), out)


def table(folder: Path) -> list[dict[str, Any]]:
    """One row per finished run: its place on the axes and what it reached on the test split, item-level."""
    lines = []
    for cell in every_cell():
        if not (folder / cell / "DONE").exists():
            continue
        book = record.read(folder / cell)
        found = {
            row["metric"]: row
            for row in book["evaluations"]
            if row["split"] == "test" and row["slice"] == "all" and row["metric"] in ("hr@10", "hr@50", "nats")
        }
        place, ids = book["cell"]["coordinates"], book["semantic_ids"]["diagnostics"]
        learned = ids["prefixes"][place["id_levels"] - 1]
        lines.append(
            {
                "cell": book["cell"]["name"],
                "axes": " ".join(book["cell"]["axes"]),
                "seed": book["seed"],
                "levels": place["id_levels"],
                "codebook": place["id_codebook"],
                "capacity": place["id_levels"] * math.log2(place["id_codebook"]),
                "width": place["width"],
                "users": book["seen"]["unique_users"],
                "distinct": learned["distinct"],
                "largest_bucket": learned["largest_bucket"],
                "parameters": sum(book["parameters"].values()),
                **{name: row["value"] for name, row in found.items()},
                **{f"{name} stderr": row["stderr"] for name, row in found.items()},
            }
        )
    return lines


def write_report(folder: Path) -> Path:
    """Write FOLDER/results.csv, axis.png, table.md and fits.txt from what has finished."""
    lines = table(folder)
    if not lines:
        (folder / "table.md").write_text("No run has finished.\n")
        return folder / "table.md"
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    (folder / "table.md").write_text(summary(lines))
    (folder / "fits.txt").write_text(fits(lines, folder))
    with matplotlib.rc_context(STYLE):
        draw(lines).savefig(folder / "axis.png")
    return folder / "table.md"


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per cell, means over seeds (standard deviation)."""
    names = ("cell", "levels x codes", "width", "users", "distinct learned tuples")
    names += ("R@10, item-level", "R@50, item-level", "nats")
    text = f"| {' | '.join(names)} |\n"
    text += "|" + "---|" * 8 + "\n"
    for cell in dict.fromkeys(line["cell"] for line in lines):
        mine = [line for line in lines if line["cell"] == cell]
        values = []
        for metric in ("hr@10", "hr@50", "nats"):
            found = [line[metric] for line in mine]
            values.append(f"{np.mean(found):.4f}" + (f" ({np.std(found, ddof=1):.4f})" if len(found) > 1 else ""))
        one = mine[0]
        shape = f"{one['levels']} x {one['codebook']} | {one['width']} | {one['users']:,} | {one['distinct']:,}"
        text += f"| {cell} | {shape} | {' | '.join(values)} |\n"
    return text


def on_axis(lines: Sequence[dict[str, Any]], x: str) -> list[dict[str, Any]]:
    """The runs that lie on one axis through the base."""
    axis = {"capacity": "semantic_id", "width": "encoder", "users": "data"}[x]
    return [line for line in lines if axis in line["axes"].split()]


def fits(lines: Sequence[dict[str, Any]], folder: Path) -> str:
    """What the fit command says of R@10 along each axis, with a ceiling and with its own choice of form."""
    text = ""
    for x in X:
        mine = on_axis(lines, x)
        path = folder / f"axis_{x}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, mine[0])
            writer.writeheader()
            writer.writerows(mine)
        for form in ("ceiling", "log"):
            arguments = [
                str(path),
                "--x",
                x,
                "--y",
                "hr@10",
                "--form",
                form,
                "--seed-column",
                "seed",
                "--scale",
                "identity",
            ]
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    fit_command.main(arguments)
                except SystemExit as end:
                    print(f"(exit status {end.code})")
            text += f"== R@10 against {X[x]}, form {form}\n{out.getvalue()}\n"
    return text


def draw(lines: Sequence[dict[str, Any]]) -> Figure:
    """R@10 (item-level) and nats along each axis, every run a dot, the mean of the seeds a line."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(2, len(X), sharey="row")
    for (x, label), panels in zip(X.items(), grid.T, strict=True):
        for panel, metric in zip(panels, ("hr@10", "nats"), strict=True):
            for name, members in curves(on_axis(lines, x), x).items():
                _curve(panel, members, x, metric, name)
            if x != "capacity":
                panel.set_xscale("log", base=2)
            elif metric == "hr@10":
                panel.legend(frameon=False)
        panels[-1].set_xlabel(label)
    for panel, name in zip(grid[:, 0], ("R@10, item-level", "-log p(tuple), nats"), strict=True):
        panel.set_ylabel(name)
    return figure


def curves(mine: Sequence[dict[str, Any]], x: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of an axis by the line that joins them."""
    if x != "capacity":
        return {x: list(mine)}
    starts = {f"levels of {BASE[1]} codes": "levels", f"codes at {BASE[0]} levels": "codes"}
    return {name: [r for r in mine if r["cell"] == "base" or r["cell"].startswith(s)] for name, s in starts.items()}


def _curve(panel: Axes, members: Sequence[dict[str, Any]], x: str, metric: str, name: str) -> None:
    at = sorted({run[x] for run in members})
    means = [np.mean([run[metric] for run in members if run[x] == place]) for place in at]
    (line,) = panel.plot(at, means, label=name)
    panel.plot([run[x] for run in members], [run[metric] for run in members], ".", color=line.get_color(), alpha=0.6)
