"""HSTU and ARGUS rankers on KuaiRand-Pure, fine-tuning, window objectives. Question and verdict: README.md beside.

RUNS is runs/0006_rankers_kuairand:

    python -m recscale.data.prepare --dataset=kuairand-pure --source=DIR --out=logs/kuairand-pure
    python experiments/0006_rankers_kuairand/baselines.py --log=logs/kuairand-pure --out=RUNS/baselines
    python -m launch.sweep experiments/0006_rankers_kuairand --on=local
"""

import csv
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import argus_kuairand
from recscale import paired, record
from recscale.scaling import axes

NAME = "0006_rankers_kuairand"
LOG = Path("logs/kuairand-pure")
RUNS = Path("runs") / NAME  # where fine-tuning finds its pre-training
DAY = 86_400
SPLIT = {
    "name": "global_time",
    "test_from": 1_651_334_400,
    "val_from": 1_651_248_000,
    "gap": 3_600,
    "keep_new_users": True,
}
SEEDS = (0, 1, 2)
HEADS = ("is_click", "long_view", "is_like", "played_ratio")
LAG, REQUEST_GAP = 3_600, 1_800
LABEL = "long_view"
USER_COLUMNS = tuple(f"users/{name}" for name in ("user_active_degree", *(f"onehot_feat{k}" for k in range(1, 9))))


def base() -> ConfigDict:
    """The pre-training of configs/argus_kuairand.py on this study's split."""
    config = argus_kuairand.get_config().unlock()
    config.data.path, config.split = str(LOG), ConfigDict(SPLIT)
    return config.lock()


def hstu(config: ConfigDict, form: str) -> ConfigDict:
    """A ranker alone, with an HSTU of the same size and another form of tokens."""
    config = config.copy_and_resolve_references().unlock()
    tokens = {"collapsed": 1, "interleaved": 2}[form]
    config.model_name = "hstu"
    sizes = {name: config.model[name] for name in ("embed_dim", "width", "depth", "heads", "dropout", "dtype")}
    times = {"time_bias": True, "query_time": "last_event", "output_length": 10}
    heads = {"qk_dim": 32, "v_dim": 32, "max_length": tokens * config.loader.length}
    config.model = ConfigDict(sizes | times | heads)
    config.task.update({"form": form, "next_item": 0.0})
    return config.lock()


def frozen(config: ConfigDict) -> ConfigDict:
    """Feedback from the state of the user before the request, in training and in evaluation."""
    config = config.copy_and_resolve_references().unlock()
    config.loader.update({"lag": 1, "request_gap": REQUEST_GAP})
    return config.lock()


def with_users(config: ConfigDict) -> ConfigDict:
    """The columns of the user table as a contextual prefix."""
    config = config.copy_and_resolve_references().unlock()
    config.loader.inputs = (*config.loader.inputs, *USER_COLUMNS)
    config.loader.row_length = 128
    config.model.prefix = len(USER_COLUMNS)
    config.model.max_length += len(USER_COLUMNS)
    return config.lock()


def fine(config: ConfigDict, warm_start: str) -> ConfigDict:
    """Two towers on pairs of impressions of one request, from nothing or from a pre-trained run."""
    config = config.copy_and_resolve_references().unlock()
    config.task_name = "two_tower"
    config.task = ConfigDict({"label": LABEL, "reach": 16, "similarity": "dot", "temperature": 1.0})
    config.loader.update({"lag": LAG, "request_gap": REQUEST_GAP, "queries": ()})
    config.optim.learning_rate, config.table.learning_rate = 5e-4, 1e-3
    config.train.update({"warm_start": warm_start, "epochs": 2.0})
    return config.lock()


def window(config: ConfigDict, horizon: int) -> ConfigDict:
    """The next item, or any of the next days; tested on all of 1 May at once, the user's vector frozen before it.

    horizon: seconds; 0 trains on the next event.
    """
    config = config.copy_and_resolve_references().unlock()
    config.split = ConfigDict({"name": "next_window", "at": SPLIT["test_from"], "window": DAY})
    config.task_name = "next_item"
    kept = ("loss", "negatives", "sampler", "shared", "logq", "similarity", "temperature", "gbce_t")
    config.task = ConfigDict({name: config.task[name] for name in kept})
    config.loader.update({"queries": (), "horizon": horizon})
    config.eval.update({"ks": (10, 100), "top_k": 100})
    return config.lock()


@functools.cache
def _configs() -> dict[str, ConfigDict]:
    found = {}
    for seed in SEEDS:
        made = {"argus": base(), "argus-ranker": _ranker_alone(base())}
        made |= {f"hstu-{form}": hstu(base(), form) for form in ("collapsed", "interleaved")}
        made |= {"hstu-users": with_users(hstu(base(), "collapsed"))}
        made |= {"argus-frozen": frozen(base()), "hstu-frozen": frozen(hstu(base(), "collapsed"))}
        made |= {"window-next": window(base(), 0), "window-dense": window(base(), 3 * DAY)}
        made |= {"fine-alone": fine(base(), ""), "fine-after": fine(base(), str(RUNS / f"argus-s{seed}"))}
        for name, config in made.items():
            found[f"{name}-s{seed}"] = axes.cell(config, NAME, name, (), seed)
    return found


def _ranker_alone(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references().unlock()
    config.task.next_item = 0.0
    return config.lock()


def every_cell() -> list[str]:
    """All cells, whether the log is prepared or not."""
    return list(_configs())


def cells() -> list[str]:
    """Names of the cells; pre-training comes before the fine-tuning that begins with it."""
    if not LOG.is_dir():
        print(f"{LOG} is not prepared: the study has no cells; README.md says how")
        return []
    return every_cell()


def get_config(cell: str) -> ConfigDict:
    """Config of a cell, e.g. "argus-s0"."""
    found = _configs()
    if cell not in found:
        raise ValueError(f"study {NAME} has no cell {cell!r}; it has {', '.join(found)}")
    return found[cell].lock()


def prepare(folder: Path) -> None:
    """Nothing to make: the log is prepared by hand."""
    del folder


def table(folder: Path) -> list[dict[str, Any]]:
    """Rows {model, seed, metric, slice, value, stderr, n} of the runs and of the baselines that are there."""
    lines = []
    for cell in every_cell():
        if not (folder / cell / "DONE").exists():
            continue
        book = record.read(folder / cell)
        for row in book["evaluations"]:
            kept = {name: row[name] for name in ("metric", "slice", "value", "stderr", "n")}
            lines.append({"model": book["cell"]["name"], "seed": book["seed"]} | kept)
    for file in sorted(folder.glob("baselines/results.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            if row["split"] == "test":
                kept = {name: row[name] for name in ("value", "stderr", "n")}
                lines.append(
                    {
                        "model": row["model"],
                        "seed": row["seed"],
                        "metric": f"{row['metric']}/{row['head']}",
                        "slice": "all",
                    }
                    | kept
                )
    return lines


def comparisons(folder: Path) -> list[dict[str, Any]]:
    """Pairs of models with the same seed, paired over users: difference of every metric and its 95 % interval."""
    pairs = [("argus-ranker", "argus"), ("fine-alone", "fine-after"), ("hstu-collapsed", "hstu-interleaved")]
    pairs += [
        ("argus", "hstu-collapsed"),
        ("argus-frozen", "hstu-frozen"),
        ("hstu-collapsed", "hstu-users"),
        ("window-next", "window-dense"),
    ]
    lines = []
    for before, after in pairs:
        for seed in SEEDS:
            runs = [folder / f"{name}-s{seed}" for name in (before, after)]
            if all((run / "DONE").exists() for run in runs):
                lines += _compared(runs, {"from": before, "to": after, "seed": seed})
    against = {
        "lightgbm": ("argus", "hstu-collapsed", "hstu-interleaved", "hstu-users"),
        "lightgbm_frozen": ("argus-frozen", "fine-after"),
    }
    for before, others in against.items():
        for seed in SEEDS:
            for after in others:
                runs = [folder / "baselines" / f"{before}_seed{seed}", folder / f"{after}-s{seed}"]
                if runs[0].is_dir() and (runs[1] / "DONE").exists():
                    lines += _compared(runs, {"from": before, "to": after, "seed": seed})
    return lines


def _compared(runs: Sequence[Path], names: dict[str, Any]) -> list[dict[str, Any]]:
    found = paired.without_repeats(*paired.common_rows(*(paired.read_run(run, "test") for run in runs)))
    if "baselines" in runs[0].parts:
        dropped = ("label/played_ratio", "score/played_ratio")  # edges passed in the runs, the ratio itself there
        found = tuple({name: values for name, values in run.items() if name not in dropped} for run in found)
    user, users = paired.aligned(*found)
    a, b = (paired.statistics_of(run, user, users, ks=(10, 100) if "hits" in run else (10,)) for run in found)
    rows = paired.compare(a, b, users, resamples=500)
    kept = ("metric", "a", "b", "difference", "low", "high", "n")
    return [names | {name: getattr(row, name) for name in kept} for row in rows]


def write_report(folder: Path) -> Path:
    """Write FOLDER/results.csv, comparisons.csv and table.md from what has finished."""
    lines = table(folder)
    for name, rows in (("results.csv", lines), ("comparisons.csv", comparisons(folder))):
        if rows:
            with (folder / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    (folder / "table.md").write_text(summary(lines))
    return folder / "table.md"


def summary(lines: list[dict[str, Any]]) -> str:
    """Markdown: models by metrics, mean over seeds and standard deviation between them."""
    metrics = [
        f"{metric}/{head}" for head in HEADS[:3] for metric in ("auc", "gauc", "normalised_entropy", "pair_accuracy")
    ]
    metrics += ["concordance/played_ratio", "pair_accuracy/played_ratio", "nats", "hr@10"]
    text = ""
    for some in (metrics[:4], metrics[4:8], metrics[8:12], metrics[12:]):
        text += "| model | " + " | ".join(some) + " |\n|" + "---|" * (len(some) + 1) + "\n"
        for model in dict.fromkeys(line["model"] for line in lines):
            values = [_over_seeds(lines, model, metric) for metric in some]
            if any(values):
                text += f"| {model} | " + " | ".join(values) + " |\n"
        text += "\n"
    return text


def _over_seeds(lines: list[dict[str, Any]], model: str, metric: str) -> str:
    mine = [x for x in lines if x["model"] == model and x["metric"] == metric and x["slice"] == "all"]
    values = [line["value"] for line in mine if line["value"] is not None]
    if not values:
        return ""
    spread = f" ({np.std(values, ddof=1):.4f})" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"
