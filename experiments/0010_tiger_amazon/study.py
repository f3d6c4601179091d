"""TIGER on Amazon Beauty and Sports: whose semantic ids, which model, beside a trained SASRec. Verdict: README.md.

    python -m recscale.data.prepare --dataset=beauty --source=DIR --out=logs/beauty      (and sports)
    python -m launch.sweep experiments/0010_tiger_amazon --on=local

`prepare` makes the codes. The published id tables and collaborative vectors are read from RECSCALE_DATA; without it the
study has only the cells of codes made here.
"""

import csv
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import rqkmeans_beauty, rqvae_beauty, sasrec_beauty, tiger_beauty
from recscale import record
from recscale.data.event_log import EventLog
from recscale.scaling import axes
from recscale.semantic_ids import catalogue, public
from recscale.semantic_ids.make import make

HERE = Path(__file__).parent
NAME = "0010_tiger_amazon"
LOGS = {"beauty": Path("logs/beauty"), "sports": Path("logs/sports")}
CODES = Path("runs") / NAME / "codes"
SEEDS = (0, 1, 2)
KS = (5, 10, 20)
OURS = ("rqvae", "rqkmeans", "random", "rqkmeans_cf")
PUBLIC = (
    *("letter_release", "coll_letter_native", "coll_letter_zcr", "coll_mql4grec", "coll_quasid_native"),
    *("coll_quasid_zcr", "coll_rkmeans_native", "coll_rkmeans_zcr", "coll_rkmeans_zcr_cf", "coll_rqvae_native"),
    "coll_rqvae_zcr",
)
VECTORS = "amazon2014/beauty_cf_emb32.npy"  # of items, by a SASRec: the "proprietary" content
SMALL = {"embed_dim": 64, "depth": 2, "heads": 4, "head_dim": 16, "ffn": 256}
LARGE = {"embed_dim": 128, "depth": 2, "heads": 4, "head_dim": 32, "ffn": 512}


def data_folder() -> Path | None:
    """RECSCALE_DATA, where it is set and has the published ids."""
    root = Path(os.environ["RECSCALE_DATA"]) if os.environ.get("RECSCALE_DATA") else None
    return root if root and (root / "amazon2014/beauty_semantic_ids.parquet").is_file() else None


def published(name: str) -> Path:
    """A published file; raises ValueError where it is not there."""
    folder = data_folder()
    if folder is None:
        raise ValueError(f"{name}: set RECSCALE_DATA to the folder that holds it")
    return folder / name


def base(data: str, ids: str) -> ConfigDict:
    """What the generative models of a dataset share; the digit level has as many codes as the others."""
    config = tiger_beauty.get_config().unlock()
    config.data.path, config.table.codes = str(LOGS[data]), str(CODES / f"{data}-{ids}")
    config.split = ConfigDict({"name": "leave_one_out", "validation": True, "validation_users": 2048})
    config.optim.update({"warmup": 200, "learning_rate": 2e-3})
    config.eval.update({"ks": KS, "top_k": 50, "batch_size": 64, "protocols": ("full",), "final": ("val", "test")})
    return config.lock()


def decoder(data: str, ids: str, size: dict[str, int], epochs: float) -> ConfigDict:
    """The decoder-only model: every event of a user's history is a target, in one pass."""
    config = base(data, ids).unlock()
    config.model_name = "tiger_decoder"
    config.model.update(size)
    config.loader.update({"batch_size": 16, "window": "all", "row_length": 20, "segments": 0, "inputs": ()})
    config.train.update({"epochs": epochs, "eval_every": 2400, "checkpoint_every": 600, "select": "ndcg@10 max"})
    return config.lock()


def encoder_decoder(data: str, ids: str) -> ConfigDict:
    """TIGER, small enough for a CPU: one example per target, packed."""
    config = base(data, ids).unlock()
    config.model.update(SMALL)
    config.loader.update({"batch_size": 16, "row_length": 20, "segments": 6, "inputs": ()})
    config.train.update({"epochs": 8.0, "eval_every": 3000, "checkpoint_every": 1000, "select": "ndcg@10 max"})
    return config.lock()


def sasrec(data: str) -> ConfigDict:
    """configs/sasrec_beauty.py, judged with repeats allowed too, as the generative models are."""
    config = sasrec_beauty.get_config().unlock()
    config.data.path, config.split.validation_users = str(LOGS[data]), 2048
    config.eval.ks = KS
    return config.lock()


@functools.cache
def _configs() -> dict[str, ConfigDict]:
    made: dict[str, ConfigDict] = {}
    for seed in SEEDS:
        for data in LOGS:
            ids = OURS if data == "beauty" else OURS[:3]
            found = {f"{name}-decoder": decoder(data, name, SMALL, 20.0) for name in ids}
            found |= {"sasrec": sasrec(data)}
            if data == "beauty":
                found |= {f"{name}-large": decoder(data, name, LARGE, 30.0) for name in ("rqvae", "rqkmeans_cf")}
                found |= {"rqvae-tiger": encoder_decoder(data, "rqvae")}
                found |= {f"{name}-decoder": decoder(data, name, SMALL, 20.0) for name in PUBLIC} if seed == 0 else {}
            for name, config in found.items():
                made[f"{data}-{name}-s{seed}"] = axes.cell(config, NAME, f"{data}-{name}", (), seed)
    return made


def every_cell() -> list[str]:
    """All cells, whatever is prepared."""
    return list(_configs())


def cells() -> list[str]:
    """Those whose log is prepared and whose codes can be made."""
    lacking = [str(path) for path in LOGS.values() if not path.is_dir()]
    if lacking:
        print(f"{', '.join(lacking)} not prepared: their cells are left out; study.py says how")
    wanted = [name for name in every_cell() if LOGS[name.split("-")[0]].is_dir()]
    if data_folder() is None:
        print("RECSCALE_DATA is not set or has no published ids: their cells are left out")
        wanted = [name for name in wanted if not (set(name.split("-")) & {*PUBLIC, "rqkmeans_cf"})]
    return wanted


def get_config(cell: str) -> ConfigDict:
    """Config of a cell, e.g. "beauty-rqvae-decoder-s0"."""
    found = _configs()
    if cell not in found:
        raise ValueError(f"study {NAME} has no cell {cell!r}; it has {', '.join(found)}")
    return found[cell].lock()


def quantizer(data: str, ids: str) -> ConfigDict:
    """How codes of our own are made: text by TF-IDF and SVD, three levels of 256, a digit for what shares a tuple."""
    config = (rqvae_beauty if ids == "rqvae" else rqkmeans_beauty).get_config().unlock()
    config.data.path = str(LOGS[data])
    if ids == "random":
        config.method, config.model = "random", ConfigDict({"levels": 3, "codebook": 256, "unique": True})
    if ids == "rqkmeans_cf":
        config.behaviour.update({"source": str(published(VECTORS)), "use": "join", "weight": 0.5})
    return config.lock()


def prepare(folder: Path) -> None:
    """Make the codes that are lacking."""
    del folder
    for data, path in LOGS.items():
        if not path.is_dir():
            continue
        log = EventLog.open(path)
        ours = OURS if data == "beauty" and data_folder() else OURS[:3]
        for ids in ours:
            if not (CODES / f"{data}-{ids}" / "meta.json").exists():
                make(quantizer(data, ids), CODES / f"{data}-{ids}")
        for scheme in PUBLIC if data == "beauty" and data_folder() else ():
            if not (CODES / f"{data}-{scheme}" / "meta.json").exists():
                table = published("amazon2014/beauty_semantic_ids.parquet")
                catalogue.write(public.read(table, scheme, log), CODES / f"{data}-{scheme}")


PUBLISHED = (  # R@5, N@5, R@10, N@10: item- or tuple-level as their code counts
    ("beauty", "TIGER, paper (2305.05065)", "tuple of 4", (0.0454, 0.0321, 0.0648, 0.0384)),
    ("beauty", "TIGER, paper: random ids", "tuple of 4", (0.0296, None, 0.0434, None)),
    ("beauty", "TIGER, paper: LSH ids", "tuple of 4", (0.0379, None, 0.0533, None)),
    ("beauty", "TIGER, re-run (XiaoLongtaoo)", "tuple of 4", (0.0392, 0.0257, 0.0594, 0.0321)),
    ("beauty", "TIGER, re-run of that by a user", "tuple of 4", (0.0343, 0.0229, 0.0559, 0.0298)),
    ("beauty", "TIGER, re-run (NonameUntitled)", "item (digit)", (0.0376, 0.0252, 0.0582, 0.0319)),
    ("beauty", "TIGER, re-run (genrec)", "prefix of 3", (0.0465, 0.0297, 0.0721, 0.0378)),
    ("beauty", "SASRec, as in the TIGER paper", "item", (0.0387, 0.0249, 0.0605, 0.0318)),
    ("beauty", "SASRec + sampled softmax (eSASRec study)", "item", (None, None, 0.0921, 0.0531)),
    ("sports", "TIGER, paper (2305.05065)", "tuple of 4", (0.0264, 0.0181, 0.0400, 0.0225)),
    ("sports", "TIGER, paper: random ids", "tuple of 4", (0.0070, None, 0.0116, None)),
    ("sports", "TIGER, re-run (XiaoLongtaoo)", "tuple of 4", (0.0233, 0.0150, 0.0379, 0.0197)),
    ("sports", "TIGER, re-run (genrec)", "prefix of 3", (0.0266, 0.0176, 0.0414, 0.0224)),
    ("sports", "SASRec, as in the TIGER paper", "item", (0.0233, 0.0154, 0.0350, 0.0192)),
    ("sports", "SASRec + sampled softmax (eSASRec study)", "item", (None, None, 0.0569, 0.0314)),
)
METRICS = ("hr@5", "ndcg@5", "hr@10", "ndcg@10")


def table(folder: Path) -> list[dict[str, Any]]:
    """Rows {data, model, seed, metric, slice, value, stderr, n, level} of the test split of what has finished."""
    lines = []
    for cell in every_cell():
        if not (folder / cell / "DONE").exists():
            continue
        book = record.read(folder / cell)
        for row in book["evaluations"]:
            if row["split"] == "test":
                kept = {name: row[name] for name in ("metric", "slice", "value", "stderr", "n")}
                level = "tuple-level" if row["metric"].startswith("tuple") else "item-level"
                data, _, model = book["cell"]["name"].partition("-")
                lines.append({"data": data, "model": model, "seed": book["seed"]} | kept | {"level": level})
    return lines


def write_report(folder: Path) -> Path:
    """Write FOLDER/results.csv and table.md from what has finished."""
    lines = table(folder)
    if lines:
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    (folder / "table.md").write_text(summary(lines, folder))
    return folder / "table.md"


def summary(lines: list[dict[str, Any]], folder: Path) -> str:
    """Markdown: ours, published and re-runs in one table per dataset, then tuple-level and the codes themselves."""
    text = ""
    for data in LOGS:
        mine = [line for line in lines if line["data"] == data and line["slice"] == "all"]
        text += f"{data}, test, full ranking, repeats allowed; mean over seeds (standard deviation)\n\n"
        text += "| model | hit is | seeds | R@5 | N@5 | R@10 | N@10 |\n|---|---|---|---|---|---|---|\n"
        rows = [(model, _cells(mine, model, METRICS)) for model in dict.fromkeys(line["model"] for line in mine)]
        for model, cells in sorted(rows, key=lambda row: row[1][2], reverse=True):
            seeds = len({line["seed"] for line in mine if line["model"] == model})
            text += f"| **{model}** | item | {seeds} | {' | '.join(cells)} |\n"
        for _, name, level, values in (row for row in PUBLISHED if row[0] == data):
            text += f"| {name} | {level} | | {' | '.join('' if v is None else f'{v:.4f}' for v in values)} |\n"
        text += "\n" + _tuples(mine, data, folder) + "\n"
    return text


def _tuples(mine: list[dict[str, Any]], data: str, folder: Path) -> str:
    text = "| ids | tuple-level R@10 | item-level R@10: pessimistic, expected, optimistic | found in the beam | nats |"
    text += " distinct tuples | largest bucket | first level: codes used, perplexity |\n|" + "---|" * 8 + "\n"
    names = ("tuple_hr@10", "hr_pessimistic@10", "hr@10", "hr_optimistic@10", "found", "nats")
    for model in dict.fromkeys(line["model"] for line in mine if line["metric"] == "tuple_hr@10"):
        cells = _cells(mine, model, names)
        found = sorted(folder.glob(f"{data}-{model}-s*/record.json"))
        ids = record.read(found[0].parent)["semantic_ids"]["diagnostics"]
        last, first = ids["prefixes"][-1], ids["levels"][0]
        shape = f"{last['distinct']:,} | {last['largest_bucket']} | {first['used']}, {first['perplexity']:.0f}"
        text += f"| {model} | {cells[0]} | {', '.join(cells[1:4])} | {cells[4]} | {cells[5]} | {shape} |\n"
    return text


def _cells(lines: list[dict[str, Any]], model: str, metrics: tuple[str, ...]) -> list[str]:
    cells = []
    for metric in metrics:
        values = [line["value"] for line in lines if line["model"] == model and line["metric"] == metric]
        spread = f" ({np.std(values, ddof=1):.4f})" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.4f}{spread}" if values else "")
    return cells
