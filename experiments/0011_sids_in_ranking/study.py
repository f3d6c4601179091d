"""Item ids against n-grams and pieces of semantic ids in the item table, at equal bytes. Question: README.md beside.

python -m recscale.data.prepare --dataset=yelp --source=DIR --out=logs/yelp          (and microlens)
python -m recscale.semantic_ids.make --config=configs/rqkmeans_beauty.py --config.data.path=logs/yelp --out=codes/yelp
python -m launch.sweep experiments/0011_sids_in_ranking --on=local
"""

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs import hstu_ml1m
from recscale import paired, reading, record
from recscale.data.event_log import EventLog
from recscale.data.slices import new_items, tail
from recscale.data.splits import View, target_rows
from recscale.scaling import axes

NAME = "0011_sids_in_ranking"
SEEDS = (0, 1, 2)
DIM, CODES, LENGTH = 64, 4, 50  # width of an item's vector, codes per item, events of history
METRICS = {"hr@10": 1, "ndcg@10": 1, "hr@100": 1, "nats": -1}  # and whether more is better
SHOWN = (("hr@10", "ndcg@10"), ("hr@100", "nats"))
SLICES = ("all", "new_items", "tail_1_5", "tail_6_20", "tail_21_100", "tail_101_up")


class Data(NamedTuple):
    """A dataset: its items, the bytes per item that a small table may take, how it is split and how long it trains."""

    items: int
    bytes_per_item: int
    split: dict[str, Any]
    epochs: float

    def rows(self, code_bytes: int) -> int:
        """Rows of DIM floats that fit beside the codes."""
        return (self.bytes_per_item - code_bytes) * self.items // (4 * DIM)


OCTOBER = 1_569_888_000  # 2019-10-01: three quarters of Yelp's year are before it
DATA = {
    "yelp": Data(20_033, 32, {"name": "global_time", "test_from": OCTOBER}, 3.0),
    "microlens": Data(5_312, 64, {"name": "leave_one_out", "validation": False}, 5.0),
}
MODELS = {
    "sasrec": {"width": 64, "depth": 2, "heads": 2, "ffn": 128, "activation": "gelu"},
    "hstu": {
        **{"width": 64, "depth": 2, "heads": 2, "qk_dim": 32, "v_dim": 32, "output_length": 10},
        **{"time_bias": False, "query_time": "last_event"},
    },
    "dlrm": {"width": 128, "depth": 1, "half_lives": (2.0, 8.0)},
}
TABLES = ("full", "thin", "hashed", "ngram", "bigram", "pieces")
BASELINE = "hashed"  # what the others are compared with, target by target


def table(data: str, name: str) -> dict[str, Any]:
    """The sections of the config that make this item table; all but "full" take the data's bytes per item.

    full: a row of DIM floats per item. thin: a row of fewer floats per item. hashed: two hash functions into rows of
    DIM. ngram, bigram, pieces: rows shared by codes, which are paid for too: a byte each, two where pieces need them.
    """
    d, codes = DATA[data], {"parts": CODES, "codes": f"codes/{data}"}
    made: dict[str, dict[str, Any]] = {
        "full": {"table": {"kind": "full"}},
        "thin": {"table": {"kind": "full"}, "dim": d.bytes_per_item // 4},
        "hashed": {"table": {"kind": "hashed", "rows": d.rows(0), "parts": 2}},
        "ngram": {"table": {"kind": "ngram", "rows": d.rows(CODES), **codes}},
        "bigram": {"table": {"kind": "bigram", "rows": d.rows(CODES), **codes}},
        "pieces": {"table": {"kind": "pieces", "rows": d.rows(2 * CODES), **codes}},
    }
    return made[name]


def base(data: str, model: str) -> ConfigDict:
    """A small model on packed histories; what an epoch does not show is no negative either."""
    config = hstu_ml1m.get_config().unlock()
    config.data.path, config.split = f"logs/{data}", ConfigDict(DATA[data].split)
    config.loader.update({"batch_size": 4, "length": LENGTH, "row_length": 128, "window": "all", "layout": "packed"})
    config.model_name = model
    shape = {"embed_dim": DIM, "max_length": LENGTH, "dropout": 0.2, "dtype": "float32"}
    config.model = ConfigDict(MODELS[model] | shape)
    config.task.update({"loss": "sampled", "negatives": 256, "shared": "batch", "similarity": "cosine"})
    config.task.update({"temperature": 0.07, "sampler": "in_batch", "logq": "standard"})
    config.optim.update({"schedule": "cosine", "learning_rate": 1e-3, "warmup": 50})
    config.table.update({"optimizer": "lazy_adam", "learning_rate": 2e-3, "warmup": 50})
    config.train.update({"epochs": DATA[data].epochs, "eval_every": 0, "checkpoint_every": 0, "select": ""})
    config.eval.update({"final": ("test",), "protocols": ("full",), "ks": (10, 100), "chunk": 512, "top_k": 10})
    config.cell.coordinates = ConfigDict({"data": data, "model": model})
    return config.lock()


@functools.cache
def _configs() -> dict[str, ConfigDict]:
    found = {}
    for seed in SEEDS:
        for data in DATA:
            for model in MODELS:
                for name in TABLES:
                    config, made = base(data, model).copy_and_resolve_references().unlock(), table(data, name)
                    config.table.update(made["table"])
                    config.model.embed_dim = made.get("dim", DIM)
                    config.cell.coordinates.table = name
                    cell = f"{data}-{model}-{name}-s{seed}"
                    found[cell] = axes.cell(config, NAME, cell, ("table",), seed)
    return found


def every_cell() -> list[str]:
    """All cells, whether their data is prepared or not; a seed after the other."""
    return list(_configs())


def cells() -> list[str]:
    """Names of the cells whose log and codes are there."""
    lacking = [path for data in DATA for path in (f"logs/{data}", f"codes/{data}") if not Path(path).is_dir()]
    for path in lacking:
        print(f"{path} is not there: its cells are left out; README.md says how it is made")
    left_out = {path.split("/")[1] for path in lacking}
    return [cell for cell in every_cell() if cell.split("-")[0] not in left_out]


def get_config(cell: str) -> ConfigDict:
    """Config of a cell, e.g. "yelp-sasrec-pieces-s0"."""
    if cell not in _configs():
        raise ValueError(f"study {NAME} has no cell {cell!r}; names look like yelp-sasrec-pieces-s0")
    return _configs()[cell].lock()


def prepare(folder: Path) -> None:
    """Nothing to make: logs and codes are prepared by hand."""
    del folder


def finished(folder: Path) -> dict[tuple[str, str, str, int], Path]:
    """(data, model, table, seed) -> folder of the run, of those that have finished."""
    found = {}
    for cell in every_cell():
        if (folder / cell / "DONE").exists():
            data, model, name, seed = cell.split("-")
            found[data, model, name, int(seed[1:])] = folder / cell
    return found


def results(folder: Path) -> list[dict[str, Any]]:
    """Rows {data, model, table, bytes_per_item, seed, slice, metric, value, stderr, n} of the runs."""
    lines = []
    for (data, model, name, seed), run in finished(folder).items():
        book = record.read(run)
        where = {"data": data, "model": model, "table": name, "seed": seed, "ranked": "item-level"}
        where["bytes_per_item"] = round(book["table"]["bytes_per_item"], 2)
        for row in book["evaluations"]:
            if row["metric"] in METRICS and row["slice"] in SLICES:
                lines.append(where | {key: row[key] for key in ("slice", "metric", "value", "stderr", "n")})
    return lines


def comparisons(folder: Path) -> list[dict[str, Any]]:
    """Every table less random hashing, same data, model and seed, paired over users: differences and 95 % intervals."""
    runs, lines = finished(folder), []
    for (data, model, name, seed), run in runs.items():
        other = runs.get((data, model, BASELINE, seed))
        if name != BASELINE and other is not None:
            where = {"data": data, "model": model, "from": BASELINE, "to": name, "seed": seed, "ranked": "item-level"}
            lines += [where | found for found in _compared(other, run, data)]
    return lines


def _compared(before: Path, after: Path, data: str) -> Iterator[dict[str, Any]]:
    """Differences on every slice of the targets; slices without two users are left out."""
    pair = [paired.read_run(run, "test") for run in (before, after)]
    for name, rows in _rows_of_slices(data).items():
        kept = [{key: values[np.isin(run["row"], rows)] for key, values in run.items()} for run in pair]
        user, users = paired.aligned(*kept)
        if users < 2:
            continue
        a, b = (paired.statistics_of(run, user, users, ks=(10, 100)) for run in kept)
        for row in paired.compare(a, b, users, resamples=500):
            if row.metric in METRICS:
                columns = ("metric", "a", "b", "difference", "low", "high", "n")
                yield {"slice": name} | {column: getattr(row, column) for column in columns}


@functools.cache
def _rows_of_slices(data: str) -> dict[str, np.ndarray]:
    """Slice -> rows of the log that are its test targets."""
    log, views = _opened(data)
    rows = target_rows(views["test"])
    masks = new_items(log, views["test"], views["train"]) | tail(log, views["test"], views["train"])
    masks |= {"all": np.ones(len(rows), bool)}
    return {name: rows[masks[name]] for name in SLICES}


def _opened(data: str) -> tuple[EventLog, dict[str, View]]:
    config = base(data, "sasrec")
    log = EventLog.open(config.data.path)
    return log, reading.views(config, log)


def write_report(folder: Path) -> Path:
    """Write FOLDER/results.csv, comparisons.csv and table.md from what has finished."""
    lines, compared = results(folder), comparisons(folder)
    if not lines:
        raise ValueError(f"{folder}: no finished cell; look at the log files of the cells")
    for name, rows in (("results.csv", lines), ("comparisons.csv", compared)):
        if rows:
            with (folder / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    text = ""
    for data in dict.fromkeys(line["data"] for line in lines):
        text += f"### {data}\n\n" + "".join(f"{_summary(lines, data, pair)}\n" for pair in SHOWN)
        text += "".join(f"{_differences(compared, data, metric)}\n" for metric in METRICS)
    (folder / "table.md").write_text(text)
    return folder / "table.md"


def _summary(lines: list[dict[str, Any]], data: str, metrics: tuple[str, str]) -> str:
    """Models and tables by slices: two metrics, means over seeds (and the deviation of the first between them)."""
    mine = [line for line in lines if line["data"] == data]
    counts = {line["slice"]: line["n"] for line in mine}
    heads = [f"{name} ({counts[name]:,})" if name in counts else name for name in SLICES]
    text = f"{' / '.join(metrics)}, targets in brackets:\n\n"
    text += f"| model | table | bytes per item | ranked | {' | '.join(heads)} |\n|{'---|' * (4 + len(SLICES))}\n"
    for model in MODELS:
        for name in TABLES:
            of_table = [line for line in mine if (line["model"], line["table"]) == (model, name)]
            if of_table:
                values = " | ".join(_cell(of_table, each, metrics) for each in SLICES)
                text += f"| {model} | {name} | {of_table[0]['bytes_per_item']} | item-level | {values} |\n"
    return text


def _cell(lines: list[dict[str, Any]], name: str, metrics: tuple[str, str]) -> str:
    first, second = (
        [line["value"] for line in lines if (line["slice"], line["metric"]) == (name, metric)] for metric in metrics
    )
    if not first or None in first:
        return ""
    spread = f" ({np.std(first, ddof=1):.4f})" if len(first) > 1 else ""
    return f"{np.mean(first):.4f}{spread} / {np.mean(second):.4f}"


def _differences(compared: list[dict[str, Any]], data: str, metric: str) -> str:
    """A metric less that of random hashing: mean over seeds, and seeds whose paired interval leaves out zero."""
    mine = [row for row in compared if row["data"] == data and row["metric"] == metric]
    text = f"{metric} less that of `{BASELINE}`; seeds whose 95 % interval is better, worse, of all:\n\n"
    text += f"| model | table | ranked | {' | '.join(SLICES)} |\n|{'---|' * (3 + len(SLICES))}\n"
    for model in MODELS:
        for name in TABLES:
            of_table = [row for row in mine if (row["model"], row["to"]) == (model, name)]
            if of_table:
                values = " | ".join(_difference(of_table, each) for each in SLICES)
                text += f"| {model} | {name} | item-level | {values} |\n"
    return text


def _difference(rows: list[dict[str, Any]], name: str) -> str:
    mine = [row for row in rows if row["slice"] == name]
    if not mine:
        return ""
    sides = (sum(row["low"] > 0 for row in mine), sum(row["high"] < 0 for row in mine))
    better, worse = sides if METRICS[mine[0]["metric"]] > 0 else sides[::-1]
    return f"{np.mean([row['difference'] for row in mine]):+.4f} ({better}, {worse} of {len(mine)})"
