"""Table, data, context and encoder at once, on four public logs with two models. Prediction and verdict: README.md.

    python -m launch.sweep experiments/0004_four_axes_real --on=local   (of the logs, those in logs/: README.md)
    python experiments/0004_four_axes_real/study.py            writes the plan, plan.csv, again

The plan was frozen before the runs: which points, their sizes, steps and learning rates. The study reads it.
"""

import csv
import functools
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import hstu_ml1m, sasrec_ml1m
from recscale.models import MODELS
from recscale.run import build, costs, seen
from recscale.scaling import axes, plans, report
from recscale.scaling.collect import flatten, write_csv

HERE = Path(__file__).parent
NAME = "0004_four_axes_real"
PLAN = HERE / "plan.csv"
MODEL_BASES = {"hstu": hstu_ml1m, "sasrec": sasrec_ml1m}
POINTS, SEEDS = 27, (0, 1, 2)
BASE_WIDTH = 16
WARMUP = 0.05  # of the steps
DIMS = (2, 4, 8, 16, 32, 64)
ENCODERS = ((4, 1), (8, 1), (16, 1), (16, 2), (32, 2), (64, 2))  # (width, depth)
HISTORIES = (2, 4, 8, 16, 32)
HEADROOM = 4.2  # the held-out rung costs at least this many times the largest fitted run
RATE_FACTORS = (3**-1, 1.0, 3.0)
INT_KEYS = ("users", "dim", "width", "depth", "history", "seed", "held_out", "steps")
FLOAT_KEYS = ("dense_rate", "table_rate")


class Log(NamedTuple):
    """A log: its folder, the training users of the largest fitted runs and of the held-out rung, rows, and the split.

    rows: of a step, `row_length` events each; it is also the longest history. dense_rate: at encoder width 16.
    """

    path: Path
    users: int
    all_users: int
    rows: int
    row_length: int
    dense_rate: float
    table_rate: float
    split: dict[str, Any]

    @property
    def levels(self) -> list[int]:
        """Seven numbers of users from 1/36 of the largest on."""
        return [round(self.users * 36 ** (k / 6 - 1)) for k in range(7)]


def _windows(after: int, days: int) -> dict[str, Any]:
    """Training before `after` (seconds), then a window of `days` to validate and one to test: what users do first."""
    window = days * 86_400
    return {"name": "next_window", "val_at": after, "at": after + window, "window": window}


LEAVE_ONE_OUT = {"name": "leave_one_out", "validation": True, "validation_users": 1024}
LOGS = {
    "ml1m": Log(Path("logs/ml-1m"), 3_020, 6_040, 2, 64, 3e-3, 2e-2, LEAVE_ONE_OUT),  # the log has no times
    "beauty": Log(Path("logs/beauty"), 22_363, 22_363, 1, 32, 3e-3, 1e-2, LEAVE_ONE_OUT),
    "sports": Log(Path("logs/sports"), 35_598, 35_598, 1, 32, 3e-3, 1e-2, LEAVE_ONE_OUT),
    "kuairand": Log(Path("logs/kuairand-pure"), 21_573, 21_573, 1, 32, 3e-3, 1e-2, _windows(1_651_795_200, 1)),
}


@functools.cache
def _rows() -> dict[str, dict[str, Any]]:
    """The plan: cell -> its row, numbers as numbers."""
    with PLAN.open(newline="") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    for row in rows:
        row |= {key: int(row[key]) for key in INT_KEYS} | {key: float(row[key]) for key in FLOAT_KEYS}
    return {row["cell"]: row for row in rows}


def every_cell() -> list[str]:
    """All cells of the plan, whatever logs are prepared."""
    return list(_rows())


def cells() -> list[str]:
    """The cells of every prepared log in the order of the plan: all groups grow together."""
    absent = [name for name, log in LOGS.items() if not log.path.is_dir()]
    for name in absent:
        print(f"{LOGS[name].path} is not prepared: the study leaves {name} out")
    return [cell for cell, row in _rows().items() if row["data"] not in absent]


def get_config(cell: str) -> ConfigDict:
    """The config of a cell."""
    if cell not in _rows():
        raise ValueError(f"study {NAME} has no cell {cell!r}; names look like ml1m-hstu-p07-s0, see {PLAN.name}")
    return _config(_rows()[cell])


def _base(data: str, model: str) -> ConfigDict:
    """What all cells of a group share: few events a step, one pass, 512 shared negatives, one evaluation."""
    config, log = MODEL_BASES[model].get_config().unlock(), LOGS[data]
    config.data.path = str(log.path)
    config.split = ConfigDict(log.split)
    config.loader.update({"batch_size": log.rows, "length": log.row_length, "row_length": log.row_length})
    config.loader.update({"window": "all", "layout": "packed"})
    config.model.update({"embed_dim": 16, "width": BASE_WIDTH, "depth": 1, "heads": 1, "max_length": log.row_length})
    config.model.update({"dropout": 0.0} | ({"ffn": BASE_WIDTH} if "ffn" in config.model else {}))
    config.task.update({"loss": "sampled", "negatives": 512, "sampler": "uniform", "shared": "batch", "logq": "none"})
    config.task.update({"similarity": "dot", "temperature": 1.0})
    config.optim.update({"schedule": "cosine", "learning_rate": log.dense_rate, "clip": 1.0})
    config.table.update({"optimizer": "lazy_adam", "learning_rate": log.table_rate})
    config.train.update({"epochs": 1.0, "eval_every": 0, "checkpoint_every": 0, "select": "", "patience": 0})
    config.eval.update({"final": ("val", "test"), "protocols": ("full",), "ks": (10,), "block": 4096})
    config.eval.update({"chunk": 1024, "top_k": 10})
    config.cell.coordinates = ConfigDict({"data": data, "model": model})
    return config.lock()


def _config(row: dict[str, Any]) -> ConfigDict:
    config = _base(row["data"], row["model"])
    config = axes.table_dim(config, row["dim"])
    config = axes.data_users(config, row["users"])
    config = axes.context_history(config, row["history"])
    config = axes.encoder_width(config, row["width"])
    config = axes.encoder_depth(config, row["depth"]).unlock()
    config.optim.learning_rate *= row["dense_rate"] / LOGS[row["data"]].dense_rate
    config.table.learning_rate = row["table_rate"]
    config.optim.warmup = config.table.warmup = int(WARMUP * row["steps"])
    coordinates = {"dim": row["dim"], "encoder": _layers(config), "held_out": row["held_out"]}
    config.cell.coordinates.update(coordinates | {"lr_sweep": row["lr_sweep"]})
    config.cell.coordinates.update({"dense_rate": row["dense_rate"], "table_rate": row["table_rate"]})
    return axes.cell(config.lock(), NAME, row["cell"].rsplit("-s", 1)[0], tuple(axes.AXES), row["seed"])


def _layers(config: ConfigDict) -> int:
    """Parameters of the layers alone: neither the map between item vectors and encoder nor the table of positions.

    Those two grow with the width of the item vectors and would tie the encoder axis to the table axis.
    """
    module: ModuleType = MODELS[config.model_name]
    alone = dict(config.model) | {"embed_dim": config.model.width}
    return module.param_groups(module.Config(**alone))["dense"]


def prepare(folder: Path) -> None:
    """Nothing to make: the logs are prepared by hand, the plan lies beside this file."""
    del folder


def write_report(folder: Path) -> Path:
    """Collect the runs of FOLDER and write FOLDER/report.html."""
    return report.write(HERE, runs=folder, out=folder)


def _point(data: str, model: str, levels: plans.Point, name: str, **changes: Any) -> dict[str, Any]:
    """A row of the plan; `steps` and the sizes are filled in when it is measured."""
    width, depth = levels["encoder"]
    row = {"cell": "", "data": data, "model": model, "users": levels["users"], "dim": levels["dim"], "width": width}
    row |= {"depth": depth, "history": levels["history"], "seed": 0, "held_out": 0, "lr_sweep": ""}
    row |= {"dense_rate": LOGS[data].dense_rate, "table_rate": LOGS[data].table_rate, "steps": 0} | changes
    return row | {"cell": f"{data}-{model}-{name}-s{row['seed']}"}


@functools.cache
def _sizes(data: str, model: str, users: int, dim: int, encoder: tuple[int, int], history: int) -> dict[str, float]:
    """Sizes of the real program on the real log, by column of the run table, and the steps of one pass."""
    levels = {"users": users, "dim": dim, "encoder": encoder, "history": history}
    config = _config(_point(data, model, levels, "measured"))
    run = build(config)
    facts = flatten({**costs(run, run.steps), "seen": seen(run, run.steps), "evaluations": []})
    columns = ("parameters.tables", "seen.events", "flops.train_total", "flops.head", "flops.projections")
    chosen = {column: facts[column] for column in columns}
    return {"steps": run.steps, "encoder": config.cell.coordinates.encoder} | chosen


def _beyond(data: str) -> list[plans.Point]:
    """The held-out rung: two points beyond the fitted ones in table, context and encoder (on ML-1M in data too)."""
    users = LOGS[data].all_users
    return [
        {"users": users, "dim": 128, "encoder": (128, 2), "history": LOGS[data].row_length},
        {"users": users, "dim": 64, "encoder": (128, 4), "history": 32},
    ]


def group_plan(data: str, model: str) -> list[dict[str, Any]]:
    """The rows of one group in the order they are run."""

    def measure(levels: plans.Point) -> dict[str, float]:
        return _sizes(data, model, **levels)

    def sized(levels: plans.Point, name: str, **changes: Any) -> dict[str, Any]:
        sizes = measure(levels)
        return _point(data, model, levels, name, **changes) | sizes

    beyond = _beyond(data)
    most = min(measure(levels)[plans.COST] for levels in beyond) / HEADROOM
    grid = {"dim": DIMS, "users": LOGS[data].levels, "history": HISTORIES, "encoder": ENCODERS}
    drawn = plans.sobol(grid, POINTS, seed=4, keep=lambda levels: measure(levels)[plans.COST] <= most)
    fitted = [sized(levels, f"p{i:02d}") for i, levels in enumerate(drawn)]
    order = sorted(range(POINTS), key=lambda i: fitted[i][plans.COST])
    again = {order[0]: SEEDS[1:], order[POINTS // 2]: SEEDS[1:], order[-1]: SEEDS[1:]}
    repeats = [sized(drawn[i], f"p{i:02d}", seed=seed) for i, seeds in again.items() for seed in seeds]
    top = [
        sized(levels, f"top{i}", held_out=1, seed=seed)
        for i, seed in ((0, 0), (1, 0), (0, 1))
        for levels in [beyond[i]]
    ]
    return fitted[:9] + repeats[:2] + fitted[9:18] + top[:1] + repeats[2:4] + fitted[18:] + repeats[4:] + top[1:]


def sweep_plan(data: str, model: str) -> list[dict[str, Any]]:
    """The dense learning rate at three scales and, at the middle value of it, the table's at the first two."""
    users = LOGS[data].levels
    scales = {
        "small": {"users": users[2], "dim": 8, "encoder": (8, 1), "history": 8},
        "middle": {"users": users[4], "dim": 16, "encoder": (16, 2), "history": 16},
        "large": {"users": users[6], "dim": 32, "encoder": (64, 2), "history": 16},
    }
    rows = []
    for scale, levels in scales.items():
        sizes = _sizes(data, model, **levels)
        middle, table = LOGS[data].dense_rate, LOGS[data].table_rate
        rates = [(factor * middle, table) for factor in RATE_FACTORS]
        rates += [(middle, factor * table) for factor in RATE_FACTORS if factor != 1.0 and scale != "large"]
        for dense, table in rates:
            changes = {"dense_rate": dense, "table_rate": table, "lr_sweep": scale}
            rows.append(_point(data, model, levels, f"{scale}-lr{dense:.0e}-table{table:.0e}", **changes) | sizes)
    return rows


def _queue(data: str, model: str) -> list[dict[str, Any]]:
    """A group in the order it is run; the sweep of ML-1M early, the others' last, so that half a study has one."""
    runs, sweep = group_plan(data, model), sweep_plan(data, model)
    early = 20 if data == "ml1m" else len(runs)
    return runs[:early] + sweep + runs[early:]


def write_plan() -> Path:
    """Make the plan anew and write plan.csv; says what the checks of a plan found."""
    groups = [(data, model) for data in LOGS for model in MODEL_BASES]
    queues = [_queue(*group) for group in groups]
    for group, queue in zip(groups, queues, strict=True):
        fitted = [row for row in queue if not row["held_out"] and not row["lr_sweep"]]
        held_out = [row for row in queue if row["held_out"]]
        findings = plans.check_plan(fitted, AXIS_COLUMNS, held_out, minimum_decades={"history": 1.0})
        print(f"{'-'.join(group)}: " + ("; ".join(findings) or "no finding"))
    write_csv([row for rows in zip(*queues, strict=True) for row in rows], PLAN)
    return PLAN


AXIS_COLUMNS = {"table": "parameters.tables", "data": "seen.events", "history": "history", "encoder": "encoder"}

if __name__ == "__main__":
    print(write_plan())
