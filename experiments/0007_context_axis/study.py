"""Context axis: histories of 16 to 4,096 events where the floor is known, and on real logs. README.md beside has the
question, the prediction and the verdict.

    python -m launch.sweep experiments/0007_context_axis --on=local   (real logs where they are prepared)
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs import hstu_planted
from recscale.data.event_log import EventLog
from recscale.data.event_log_writer import write
from recscale.data.planted_taste import Taste, config_of, entropies, generate, next_item_nats
from recscale.data.splits import SPLITS
from recscale.scaling import axes, report
from recscale.scaling.collect import write_csv
from recscale.scaling.figure_files import write_files
from recscale.scaling.figures import FLOOR, INK, LAW, MUTED, Diagram, Panel, line, points

HERE = Path(__file__).parent
NAME = "0007_context_axis"
TASTE = Taste(users=2_800, length=4_097, groups=128, items_per_group=1, concentration=0.2)
TRAIN_USERS, EVAL_USERS = 800, 2_000
SEEDS = (0, 1)
TOKENS = 4_096  # of a step on the planted log, whatever the history
SHORT_ROW = 256  # row of the histories up to it
HISTORIES = {"planted": (16, 64, 256, 1024, 4096), "yelp": (16, 32, 64, 128), "watch": (8, 16, 32, 64)}
TIME_HISTORIES = {"yelp": (16, 64), "kuairand": (16,)}
TIMES = {"off": (False, "last_event"), "next": (True, "next_event"), "last": (True, "last_event")}
LOGS = {
    "planted": Path("runs/logs/planted_taste"),
    "yelp": Path("logs/yelp"),
    "watch": Path("logs/kuairand-pure-watch"),
    "kuairand": Path("logs/kuairand-pure"),
}
# epochs, dropout, dense and table learning rate of a log; one setting for all histories and seeds
TRAINING = {
    "planted": (1.0, 0.0, 3e-3, 1e-2),
    "yelp": (3.0, 0.2, 1.5e-3, 5e-3),
    "watch": (1.0, 0.0, 1.5e-3, 5e-3),
    "kuairand": (3.0, 0.2, 1.5e-3, 5e-3),
}
LABELS = {"planted": "planted tastes", "yelp": "Yelp", "watch": "KuaiRand watch sequences", "kuairand": "KuaiRand-Pure"}
LEVEL_90 = 1.645


class Cell(NamedTuple):
    """One run: a log, the history that is read, what the time bias sees, a seed."""

    data: str
    history: int
    time: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-h{self.history}-{self.time}-s{self.seed}"


@functools.cache
def _cells() -> dict[str, Cell]:
    """All cells, one seed after the other; the two long planted histories, which cost most, have fewer seeds."""
    found = []
    for seed in SEEDS:
        for data, histories in HISTORIES.items():
            found += [
                Cell(data, n, "off", seed) for n in histories if seed < (len(SEEDS) if data != "planted" else _seeds(n))
            ]
        for data, histories in TIME_HISTORIES.items():
            found += [Cell(data, n, time, seed) for n in histories for time in TIMES]
    found.sort(key=lambda cell: (cell.seed, cell.history == 4096))  # the dearest last of its seed
    return {cell.name: cell for cell in dict.fromkeys(found)}


def _seeds(history: int) -> int:
    return {1024: 1, 4096: 1}.get(history, 2)


def every_cell() -> list[str]:
    """All cells, whatever logs are prepared."""
    return list(_cells())


def cells() -> list[str]:
    """Names of the cells whose log is there; the planted one is made by `prepare`."""
    absent = [data for data, path in LOGS.items() if data != "planted" and not path.is_dir()]
    for data in absent:
        print(f"{LOGS[data]} is not prepared: the study leaves {data} out")
    return [name for name, cell in _cells().items() if cell.data not in absent]


def get_config(cell: str) -> ConfigDict:
    """The config of a cell, e.g. "planted-h256-off-s0"."""
    if cell not in _cells():
        raise ValueError(f"study {NAME} has no cell {cell!r}; names look like planted-h256-off-s0, yelp-h16-next-s0")
    wanted = _cells()[cell]
    config = axes.context_history(_base(wanted.data, wanted.history), wanted.history).unlock()
    config.model.time_bias, config.model.query_time = TIMES[wanted.time]
    config.cell.coordinates.time = wanted.time
    config.cell.coordinates.time_bias = int(wanted.time != "off")
    return axes.cell(config.lock(), NAME, cell.rsplit("-s", 1)[0], ("context",), wanted.seed)


def _base(data: str, history: int) -> ConfigDict:
    """What the cells of a log share: an HSTU of two layers, one evaluation at the end, nothing selected.

    On the planted log the width is the number of items, so that the pooled counts of all of them fit in a vector.
    """
    config = hstu_planted.get_config().unlock()
    config.data.path = str(LOGS[data])
    epochs, dropout, dense_rate, table_rate = TRAINING[data]
    config.model.update({"embed_dim": 64, "width": 64, "depth": 2, "max_length": history, "dropout": dropout})
    config.optim.learning_rate, config.table.learning_rate = dense_rate, table_rate
    config.train.epochs = epochs
    config.cell.coordinates = ConfigDict({"data": data})
    if data == "planted":
        config.split.update({"train_users": TRAIN_USERS, "eval_users": EVAL_USERS, "eval_targets": 1})
        row = max(history, SHORT_ROW)
        config.loader.update({"batch_size": TOKENS // row, "row_length": row, "window": "all"})
        config.model.update({"embed_dim": 128, "width": 128, "heads": 1, "qk_dim": 32, "v_dim": 128})
        config.train.checkpoint_every = 200
        config.eval.batch_size = TOKENS // history
        return config.lock()
    config.split = ConfigDict({"name": "leave_one_out", "validation": True, "validation_users": 1024})
    config.loader.update({"batch_size": 4, "row_length": max(HISTORIES["yelp"]), "window": "all"})
    config.model.update({"heads": 2, "qk_dim": 32, "v_dim": 32})
    config.task.update({"loss": "sampled", "negatives": 512, "sampler": "uniform", "shared": "batch", "logq": "none"})
    config.table.optimizer = "lazy_adam"
    config.eval.update({"batch_size": 4096 // history, "block": 4096, "chunk": 1024})
    return config.lock()


def prepare(folder: Path) -> None:
    """Make the planted log once and write its known floors to FOLDER/floors.json."""
    if not (LOGS["planted"] / "meta.json").exists():
        write(generate(TASTE), LOGS["planted"])
    if not (folder / "floors.json").exists():
        log = EventLog.open(LOGS["planted"])
        found = {f"history={n}": float(floor(log, n)[1].mean()) for n in HISTORIES["planted"]}
        found |= {f"pooled, history={n}": pooled(log, n) for n in HISTORIES["planted"]}
        (folder / "floors.json").write_text(json.dumps({**found, **entropies(config_of(log))}, indent=1))


def floor(log: EventLog, history: int) -> tuple[np.ndarray, np.ndarray]:
    """(row of the log, Bayes-optimal nats) of each test target of the planted log, read with `history` events."""
    view = SPLITS["by_user"](log, TRAIN_USERS, EVAL_USERS, 1)["test"]
    return view.target_start, next_item_nats(config_of(log), log, view, history)


def pooled(log: EventLog, history: int) -> float:
    """Test nats of the best softmax(b * counts / history): what a reader can do that adds up vectors of its events.

    Bayes takes the logarithm of the counts, item by item, which no sum does. b is chosen on the test targets.
    """
    target_T, _ = floor(log, history)
    items, V = log.events["item_id"], log.num_items
    share_TV = np.stack([np.bincount(items[t - history : t], minlength=V + 1)[1:] / history for t in target_T])
    own_T = share_TV[np.arange(len(target_T)), items[target_T] - 1]
    nats = [float((np.log(np.exp(b * share_TV).sum(1)) - b * own_T).mean()) for b in np.geomspace(1, 200, 60)]
    return min(nats)


def write_report(folder: Path) -> Path:
    """Tables and figure of the finished runs of FOLDER, and FOLDER/report.html."""
    found, known = losses(folder), json.loads((folder / "floors.json").read_text())
    planted, real = planted_rows(found, known), real_rows(found)
    write_csv([*planted, *real, *time_rows(found)], folder / "histories.csv")
    write_files(diagram(planted, real), folder, f"{NAME}, {sum(map(len, found.values()))} runs")
    return report.write(HERE, runs=folder, out=folder)


Losses = dict[tuple[str, int, str], list[np.ndarray]]  # (data, history, time) -> nats [T] of each seed, same targets


def losses(folder: Path) -> Losses:
    """Nats of every test target by setting, one array a seed; a target is known by its row in the log."""
    found: Losses = {}
    for name, cell in _cells().items():
        path = folder / name / "per_target_test.npz"
        if path.is_file():
            with np.load(path) as arrays:
                nats = arrays["nats"][np.argsort(arrays["row"])]
            found.setdefault((cell.data, cell.history, cell.time), []).append(nats)
    return found


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half of its 90 % interval over targets."""
    return float(values.mean()), float(LEVEL_90 * values.std(ddof=1) / len(values) ** 0.5)


def _line(table: str, data: str, history: int, time: str, seeds: list[np.ndarray]) -> dict[str, Any]:
    means = [float(nats.mean()) for nats in seeds]
    entry = {"table": table, "data": data, "history": history, "time": time, "seeds": len(seeds)}
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return entry | {"targets": len(seeds[0]), "nats": float(np.mean(means)), "seed_sd": spread}


def planted_rows(found: Losses, pooled_at: dict[str, float]) -> list[dict[str, Any]]:
    """Loss, known floor and excess over it at each history of the planted log."""
    log, lines = EventLog.open(LOGS["planted"]), []
    for (data, history, time), seeds in sorted(found.items()):
        if data == "planted":
            row_T, floor_T = floor(log, history)
            excess, half = _mean(np.mean(seeds, axis=0) - floor_T[np.argsort(row_T)])
            told = {"floor": float(floor_T.mean()), "excess": excess, "excess_half_90": half}
            told["pooled"] = pooled_at[f"pooled, history={history}"]
            lines.append(_line("history", data, history, time, seeds) | told)
    return lines


def real_rows(found: Losses) -> list[dict[str, Any]]:
    """Loss by history of the real logs, and what is saved against the shortest, paired: all users, and long ones."""
    lines = []
    for data in ("yelp", "watch"):
        settings = sorted(key for key in found if key[0] == data and key[2] == "off")
        if not settings:
            continue
        shortest = settings[0]
        long_T = lengths(data) > shortest[1]
        for key in settings:
            saved_T = np.mean(found[shortest], axis=0) - np.mean(found[key], axis=0)
            (saved, half), (longer, longer_half) = _mean(saved_T), _mean(saved_T[long_T])
            told = {"saved": saved, "saved_half_90": half, "saved_long": longer, "saved_long_half_90": longer_half}
            lines.append(_line("history", *key, found[key]) | told | {"long_users": int(long_T.sum())})
    return lines


def time_rows(found: Losses) -> list[dict[str, Any]]:
    """What the time bias saves under both query times, paired with the runs that have none."""
    lines = []
    for data, history, time in sorted(key for key in found if key[2] != "off"):
        without, seeds = found.get((data, history, "off")), found[data, history, time]
        if without:
            saved, half = _mean(np.mean(without, axis=0) - np.mean(seeds, axis=0))
            lines.append(_line("time bias", data, history, time, seeds) | {"saved": saved, "saved_half_90": half})
    return lines


def lengths(data: str) -> np.ndarray:
    """Events before each test target of leave-one-out, [T] in the order of the log's rows."""
    view = SPLITS["leave_one_out"](EventLog.open(LOGS[data]))["test"]
    return view.target_start - view.start


def diagram(planted: list[dict[str, Any]], real: list[dict[str, Any]]) -> Diagram:
    """Loss against history: the planted log over its floor, and what the real logs save against the shortest."""
    panels = []
    if planted:
        x, y, known, half, best = (
            [entry[key] for entry in planted] for key in ("history", "nats", "floor", "excess_half_90", "pooled")
        )
        low, high = np.subtract(y, half), np.add(y, half)
        drawn = (
            line("", x, y, LAW),
            points("HSTU, mean of seeds", x, y, LAW, low=low, high=high),
            line("exact floor at that history", x, known, FLOOR, dashed=True),
            line("best reader of summed events", x, best, MUTED, dashed=True),
        )
        panels.append(Panel(LABELS["planted"], "history (events, log scale)", "test nats/event", drawn, x_log=True))
    for data in dict.fromkeys(entry["data"] for entry in real):
        mine, drawn = [entry for entry in real if entry["data"] == data], []
        who = (("saved", "all users", INK), ("saved_long", f"users with more than {mine[0]['history']} events", LAW))
        for key, label, colour in who:
            x, y, half = ([entry[name] for entry in mine] for name in ("history", key, f"{key}_half_90"))
            drawn += [line("", x, y, colour)]
            drawn += [points(label, x, y, colour, low=np.subtract(y, half), high=np.add(y, half))]
        x_label, y_label = "history (events, log scale)", f"nats saved against {mine[0]['history']} events"
        panels.append(Panel(LABELS[data], x_label, y_label, tuple(drawn), x_log=True))
    caption = "Bars: 90 % over test users, paired (the excess over the floor; the difference to the shortest history)."
    return Diagram("context_axis", "What a longer history buys", caption, tuple(panels))
