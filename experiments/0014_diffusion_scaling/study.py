"""Diffusion against next-item prediction where the floor is known, and the diffusion axis. README.md has the verdict.

python -m launch.sweep experiments/0014_diffusion_scaling --on=local
"""

import contextlib
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import dreamrec_yc, hstu_planted
from recscale import known_law, record
from recscale.checkpoint import Checkpoints
from recscale.data import splits
from recscale.data.event_log import EventLog
from recscale.data.planted import config_of, world
from recscale.data.planted_floors import next_item_law
from recscale.data.prepare import prepare as prepare_log
from recscale.mesh import place_same
from recscale.run import build, init_state
from recscale.scaling import axes
from recscale.scaling import fit as fit_command
from recscale.scaling.collect import write_csv
from recscale.scaling.figure_files import write_files
from recscale.scaling.figures import COLOURS, INK, Diagram, Panel, Series, level, line, points

NAME = "0014_diffusion_scaling"
LOG = Path("runs/logs/planted_20000")  # that of study 0001
ANCHORS = Path("runs") / NAME / "anchors"  # item vectors that are given, by width
LOG_USERS, EVAL_USERS, HISTORY = 20_000, 4_000, 32
DIM, BASE_USERS = 32, 8_000
USERS = (500, 2_000, 8_000, 16_000)
STEPS, WIDTHS, DIMS = (10, 50, 1_000), (32, 128, 256), (8, 16, 64)  # beside the base: 200 steps, width 64, DIM
SEEDED = ("sasrec", "anchored", "plain")
PASSES = 4  # of the dearest rung
SEEDS = ((BASE_USERS, 1), (BASE_USERS, 2), (500, 1), (2_000, 1))  # users and seed, beside seed 0
SASREC = {
    **{"embed_dim": DIM, "width": 32, "depth": 2, "heads": 1, "ffn": 128, "max_length": HISTORY},
    **{"dropout": 0.0, "activation": "gelu", "dtype": "float32"},
}
CLEAN: dict[str, Any] = {  # what our own diffusion recommenders share
    **{"process": "cosine", "steps": 200, "predicts": "x0", "denoiser": "adaln", "width": 64, "depth": 2, "ffn": 128},
    **{"heads": 2, "target": "detached", "normalise": True, "deviation": 0.1, "sampler": "ddim", "sampling_steps": 20},
    **{"similarity": "cosine", "temperature": 0.1, "guidance": 0.0},
}


def base() -> ConfigDict:
    """What all runs share: the log, 256 events a step, one pass, the optimiser of 0001, one evaluation at the end."""
    config = hstu_planted.get_config().unlock()
    config.data.path = str(LOG)
    config.split.update({"train_users": LOG_USERS - EVAL_USERS, "eval_users": EVAL_USERS})
    config.loader.length = HISTORY
    config.model.update({"embed_dim": DIM, "width": DIM})
    config.train.checkpoint_every = 100_000
    config.eval.update({"final": ("test",), "batch_size": 256})
    coordinates = {"family": "hstu", "users": BASE_USERS, "passes": 1, "table_dim": DIM}
    config.cell.coordinates = ConfigDict(coordinates)
    return axes.data_users(config.lock(), BASE_USERS)


def sasrec() -> ConfigDict:
    """The other encoder, trained to classify; the encoder of all diffusion recommenders but DreamRec."""
    config = base().unlock()
    config.model_name, config.model = "sasrec", ConfigDict(SASREC)
    config.cell.coordinates.family = "sasrec"
    return config.lock()


def diffusion(family: str, **task: Any) -> ConfigDict:
    """SASRec with a denoiser; `task` differs from CLEAN."""
    config = sasrec().unlock()
    config.task_name, config.task = "denoising", dreamrec_yc.get_config().task.unlock()
    config.task.update(CLEAN | task)
    config.cell.coordinates.family = family
    return config.lock()


def dreamrec() -> ConfigDict:
    """DreamRec as its authors set it on YooChoose, on the rows and with the optimiser of the others."""
    theirs, config = dreamrec_yc.get_config(), base().unlock()
    config.model_name, config.model = "dreamrec", theirs.model.unlock()
    config.model.update({"embed_dim": DIM, "max_length": HISTORY})
    config.task_name, config.task = "denoising", theirs.task.unlock()
    config.task.sampler = "closed_form"
    config.cell.coordinates.family = "dreamrec"
    return config.lock()


def anchored(kind: str = "diffusion", dim: int = DIM, seed: int = 0) -> ConfigDict:
    """Item vectors that are given and stay: what `anchor` writes. They stand for vectors of texts."""
    config = {"diffusion": lambda: diffusion("anchored"), "sasrec": sasrec}[kind]().unlock()
    config.cell.coordinates.family = "anchored" if kind == "diffusion" else "sasrec, anchored"
    config.model.embed_dim = config.cell.coordinates.table_dim = dim
    config.table.optimizer = "frozen"
    config.seed = seed
    config.train.warm_start = str(ANCHORS / (f"{kind}-{dim}-s{seed}" if seed else f"{kind}-{dim}"))
    return config.lock()


FAMILIES = {
    "sasrec": sasrec,
    "hstu": base,
    "anchored": anchored,
    "plain": lambda: diffusion("plain"),
    "ranked": lambda: diffusion("ranked", ranking=0.5),
    "dreamrec": dreamrec,
}


GUIDANCE = (1.0, 2.0, 4.0, 8.0)
COSINE = {"similarity": "cosine"}
READS: dict[str, dict[str, Any]] = {"sampled": {}, "one step": {"sampling_steps": 1, "guidance": 0.0}}
DREAMREC_READS = {"sampled": {}, "one step": READS["one step"] | {"similarity": "cosine"}, "cosine": COSINE}
RESAMPLED: dict[str, dict[str, Any]] = (  # of the base run
    {f"steps {n}": {"sampling_steps": n} for n in (2, 5, 100)}
    | {f"guidance {w}, one step": {"sampling_steps": 1, "guidance": w} for w in GUIDANCE}
    | {f"guidance {w}, sampled": {"guidance": w} for w in GUIDANCE}
    | {f"samples {n}, sampled": {"samples": n} for n in (4, 16, 64)}
)
EVERY = ("data", "diffusion", "table", "encoder")  # axes that pass through the base


@functools.cache
def _configs() -> dict[str, ConfigDict]:
    ladder = (BASE_USERS, *(users for users in USERS if users != BASE_USERS))
    made = [_on_users(family, users) for users in ladder for family in FAMILIES]
    made += [(f"anchored-steps{n}", axes.diffusion_steps(anchored(), n), ("diffusion",)) for n in STEPS]
    made += [(f"anchored-denoiser{n}", axes.denoiser_width(anchored(), n), ("encoder",)) for n in WIDTHS]
    made += [(f"anchored-dim{n}", anchored(dim=n), ("table",)) for n in DIMS if n < DIM]  # the interests span no more
    made += [
        (f"{f}-dim{n}", axes.table_dim(FAMILIES[f](), n), ("table",)) for f in ("plain", "sasrec") for n in DIMS[1:]
    ]
    made += [("sasrec-anchored", anchored("sasrec"), ())]
    made += [(f"{family}-passes{PASSES}", passes(FAMILIES[family]()), ("data",)) for family in SEEDED]
    found = {f"{name}-s0": axes.cell(config, NAME, name, of) for name, config, of in made}
    for users, seed in SEEDS:
        made = [_on_users(family, users, seed) for family in SEEDED]
        found |= {f"{name}-s{seed}": axes.cell(config, NAME, name, of, seed) for name, config, of in made}
    return found


def _on_users(family: str, users: int, seed: int = 0) -> tuple[str, ConfigDict, tuple[str, ...]]:
    of = EVERY if users == BASE_USERS else ("data",)
    config = anchored(seed=seed) if family == "anchored" else FAMILIES[family]()
    return f"{family}-{users}", axes.data_users(config, users), of


def passes(base: ConfigDict) -> ConfigDict:
    """The same, more passes over the same users."""
    config = base.copy_and_resolve_references().unlock()
    config.train.epochs, config.cell.coordinates.passes = float(PASSES), PASSES
    return config.lock()


def cells() -> list[str]:
    """Names of the cells, in the order of what they are worth."""
    return list(_configs())


def get_config(cell: str) -> ConfigDict:
    """Config of a cell, e.g. "plain-8000-s0"."""
    found = _configs()
    if cell not in found:
        raise ValueError(f"study {NAME} has no cell {cell!r}; it has {', '.join(found)}")
    return found[cell].lock()


def prepare(folder: Path) -> None:
    """Make the log and the item vectors that are given, once."""
    del folder
    log = prepare_log("planted", LOG, settings={"users": LOG_USERS})
    for config in _configs().values():
        if config.train.warm_start and not Path(config.train.warm_start).exists():
            anchor(log, config)


def anchor(log: EventLog, config: ConfigDict) -> None:
    """Write what `config` begins with: item vectors that say how often each of the interests shows an item.

    Centred over the items; the leading directions, as many as the table is wide; of length 1.
    """
    config = config.copy_and_resolve_references().unlock()
    folder, config.train.warm_start = Path(config.train.warm_start), ""
    run = build(config.lock())
    shown_VK = world(config_of(log)).emission_PKV[0].T
    left_VK, scale_K, _ = np.linalg.svd(shown_VK - shown_VK.mean(0), full_matrices=False)
    vectors_VD = (left_VK * scale_K)[:, : run.model_config.embed_dim]
    vectors_VD /= np.linalg.norm(vectors_VD, axis=1, keepdims=True)
    state, name = init_state(run), run.task.catalogue
    values = np.concatenate([np.zeros_like(vectors_VD[:1]), vectors_VD]).astype(np.float32)
    state["tables"][name] = place_same(run.tables.sharding(name), run.tables.arrays[name].place(values))
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(0, state, {})


# What the runs reached ------------------------------------------------------------------------------------------------


@functools.cache
def oracle(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(law [T, V], target [T]) of the best reader of HISTORY events; column v - 1 is item v."""
    log = EventLog.open(LOG)
    view = splits.by_user(log, LOG_USERS - EVAL_USERS, EVAL_USERS, 1)[split]
    return next_item_law(config_of(log), log, view, HISTORY), log.events["item_id"][view.target_start] - 1


def table(folder: Path) -> list[dict[str, Any]]:
    """One row per finished run and way to read it out."""
    lines = []
    for cell, config in _configs().items():
        if not (folder / cell / "DONE").exists():
            continue
        book, several = record.read(folder / cell), READS if config.task_name == "denoising" else {"scores": {}}
        several = DREAMREC_READS if config.model_name == "dreamrec" else several
        several = several | (RESAMPLED if cell == f"anchored-{BASE_USERS}-s0" else {})
        place = {"users": BASE_USERS, "diffusion_steps": 200, "denoiser_width": 64} | book["cell"]["coordinates"]
        shared = {"cell": book["cell"]["name"], "seed": book["seed"]}
        shared |= {key: place[key] for key in ("family", "users", "passes", "table_dim", "diffusion_steps")}
        shared |= {"denoiser_width": place["denoiser_width"], "train_flops": book["flops"]["train_total"]}
        if book["status"] != "ok":
            print(f"{cell}: left out, {book['status']}")
            continue
        found = known_law.judged_with(folder / cell, several, oracle("test")[0])
        for read, values in found.items():
            row = shared | {"read": read} | dict.fromkeys(("exact mean", "exact sample"), None) | values
            lines.append(row | {"excess": values["nats"] - floors()["floor"]})
    return lines


@functools.cache
def floors() -> dict[str, float]:
    """What the oracle reaches on the test targets, and popularity."""
    log, (law_TV, target_T) = EventLog.open(LOG), oracle("test")
    view = splits.by_user(log, LOG_USERS - EVAL_USERS, EVAL_USERS, 1)["test"]
    popular_TV, rows = next_item_law(config_of(log), log, view, 0), np.arange(len(target_T))
    found = {"floor": float(-np.log(law_TV[rows, target_T]).mean())}
    found |= {"popularity": float(-np.log(popular_TV[rows, target_T]).mean())}
    for who, of_TV in (("oracle", law_TV), ("popularity", popular_TV)):
        found |= {f"{who} {key}": x for key, x in known_law.expected(known_law.top(of_TV), law_TV).items()}
    return found


def write_report(folder: Path) -> Path:
    """Write FOLDER/results.csv, table.md, fits.txt and three figures from what has finished."""
    lines = table(folder)
    if not lines:
        (folder / "table.md").write_text("No run has finished.\n")
        return folder / "table.md"
    write_csv(lines, folder / "results.csv")
    (folder / "table.md").write_text(summary(lines))
    (folder / "fits.txt").write_text(fits(lines, folder))
    for diagram in (approach(lines), axis(lines), price(lines)):
        write_files(diagram, folder, f"{NAME}, {len({(run['cell'], run['seed']) for run in lines})} runs")
    return folder / "table.md"


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: the oracle, then a row per cell and read-out, means over seeds."""
    text = "".join(f"{name}: {value:.4f}\n" for name, value in floors().items())
    names = ("cell", "read-out", "seeds", "training GFLOPs", "inference MFLOPs", "nats above the floor", "HR@10")
    names += ("NDCG@10", "HR@10 of the exact mean", "of one exact sample")
    text += f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    for cell, read in dict.fromkeys((run["cell"], run["read"]) for run in lines):
        mine = [run for run in lines if (run["cell"], run["read"]) == (cell, read)]
        sizes = f"{mine[0]['train_flops'] / 1e9:.1f} | {mine[0]['inference'] / 1e6:.2f}"
        shown = [_mean(mine, key) for key in ("excess", "hr@10", "ndcg@10", "exact mean", "exact sample")]
        text += f"| {cell} | {read} | {len(mine)} | {sizes} | {' | '.join(shown)} |\n"
    return text


def _mean(lines: Sequence[dict[str, Any]], key: str) -> str:
    found = [run[key] for run in lines if run[key] is not None]
    spread = f" ({np.std(found, ddof=1):.4f})" if len(found) > 1 else ""
    return f"{np.mean(found):.4f}{spread}" if found else ""


def ladder(lines: Sequence[dict[str, Any]], family: str, read: str) -> list[dict[str, Any]]:
    """The runs of a family along training FLOPs, one pass over more and more users."""
    names = [f"{family}-{users}" for users in USERS]
    mine = [run for run in lines if run["cell"] in names and run["read"] == read]
    return sorted(mine, key=lambda run: run["train_flops"])


def best_read(family: str) -> str:
    """How a family is read out in the fits."""
    return "scores" if family in ("sasrec", "hstu") else "one step"


def fits(lines: Sequence[dict[str, Any]], folder: Path) -> str:
    """What the fit command says of every family along training FLOPs; the floor is known, so it can be held against."""
    text = f"known floor {floors()['floor']:.4f} nats, known ceiling {floors()['oracle hr@10']:.4f}\n\n"
    for family in FAMILIES:
        mine, path = ladder(lines, family, best_read(family)), folder / f"ladder_{family}.csv"
        if len(mine) < ENOUGH:
            text += f"== {family}: {len(mine)} runs, a form of three parameters needs {ENOUGH}: not fitted\n\n"
            continue
        write_csv([run | {"hr10": run["hr@10"]} for run in mine], path)
        for y, form in (("nats", "additive"), ("hr10", "ceiling")):
            options = {"--x": "train_flops", "--y": y, "--form": form, "--seed-column": "seed", "--scale": "identity"}
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    fit_command.main([str(path), *(word for pair in options.items() for word in pair)])
                except SystemExit as end:
                    print(f"(exit status {end.code})")
            text += f"== {family}: {y} against training FLOPs, form {form}\n{out.getvalue()}\n"
    return text


ENOUGH = 9
LABELS = {"sasrec": "SASRec, full softmax", "hstu": "HSTU, full softmax", "anchored": "diffusion, given vectors"}
LABELS |= {"plain": "diffusion, own vectors", "ranked": "diffusion, ranking term", "dreamrec": "DreamRec"}
TRAIN, HITS = "training FLOPs (log scale)", "HR@10, expected"


def _curve(label: str, mine: Sequence[dict[str, Any]], x: str, y: str, colour: str, **look: Any) -> list[Series]:
    """Means of the seeds joined by a line, every run a point."""
    if not mine:
        return []
    at = sorted({run[x] for run in mine})
    means = [float(np.mean([run[y] for run in mine if run[x] == place])) for place in at]
    return [line("", at, means, colour, **look), points(label, [r[x] for r in mine], [r[y] for r in mine], colour)]


def approach(lines: Sequence[dict[str, Any]]) -> Diagram:
    """Distance to the floor, and hits, along training FLOPs; the dashed lines are one sample, as trained."""
    panels, ends = [], [min(run["train_flops"] for run in lines), max(run["train_flops"] for run in lines)]
    for y, label in (("excess", "nats above the floor, calibrated"), ("hr@10", HITS)):
        drawn: list[Series] = []
        for (family, name), colour in zip(LABELS.items(), COLOURS, strict=False):
            drawn += _curve(name, ladder(lines, family, best_read(family)), "train_flops", y, colour)
            drawn += _curve("", ladder(lines, family, "sampled"), "train_flops", y, colour, dashed=True)[:1]
        best = 0.0 if y == "excess" else floors()["oracle hr@10"]
        popular = floors()["popularity"] - floors()["floor"] if y == "excess" else floors()["popularity hr@10"]
        drawn += [level("exact bound", best, ends, INK), level("popularity", popular, ends, INK, dashed=True)]
        panels.append(Panel(label, TRAIN, label, tuple(drawn), x_log=True))
    caption = "Lines: one step for the diffusion recommenders; dashed: one sample, as trained."
    return Diagram("approach", "Diffusion and next-item prediction near a known floor", caption, tuple(panels))


def axis(lines: Sequence[dict[str, Any]]) -> Diagram:
    """HR@10 along every size of the diffusion, at the base run with given vectors."""
    name, panels = f"anchored-{BASE_USERS}", []
    for x, cell, label in (
        ("diffusion_steps", "anchored-steps", "steps of the chain that is trained"),
        ("denoiser_width", "anchored-denoiser", "width of the denoiser"),
        ("table_dim", "anchored-dim", "width of the item vectors"),
    ):
        mine = [run for run in lines if run["cell"] == name or run["cell"].startswith(cell)]
        drawn = []
        for read, colour in zip(READS, COLOURS, strict=False):
            drawn += _curve(read, [run for run in mine if run["read"] == read], x, "hr@10", colour)
        panels.append(Panel(label, f"{label} (log scale)", HITS, tuple(drawn), x_log=True))
    base = {run["read"]: run for run in lines if (run["cell"], run["seed"]) == (name, 0)}
    for label, series in (
        ("steps of the sampler", {"": {"one step": 1, "steps 2": 2, "steps 5": 5, "sampled": 20, "steps 100": 100}}),
        (
            "guidance",
            {r: {r: 0} | {f"guidance {w}, {r}": w for w in GUIDANCE} for r in ("sampled", "one step")},
        ),
        ("samples per user", {"": {"sampled": 1} | {f"samples {n}, sampled": n for n in (4, 16, 64)}}),
    ):
        drawn = []
        for (read, places), colour in zip(series.items(), COLOURS, strict=False):
            mine = [base[key] | {"x": float(x)} for key, x in places.items() if key in base]
            drawn += _curve(read, mine, "x", "hr@10", colour)
        panels.append(Panel(label, label, HITS, tuple(drawn), x_log=label != "guidance"))
    caption = f"Given vectors, {BASE_USERS:,} users."
    return Diagram("diffusion_axis", "What the sizes of the diffusion buy", caption, tuple(panels))


def price(lines: Sequence[dict[str, Any]]) -> Diagram:
    """HR@10 against what an answer costs: at equal data, and at about equal training FLOPs."""
    single = [run for run in lines if run["seed"] == 0 and "guidance" not in run["read"]]
    spent = {run["cell"]: run["train_flops"] for run in single}
    budget = spent.get(f"anchored-{BASE_USERS}", max(spent.values()))
    equal_data, equal_flops, told = [], [], []
    for (family, name), colour in zip(LABELS.items(), COLOURS, strict=False):
        rungs = [f"{family}-{users}" for users in USERS if f"{family}-{users}" in spent]
        if not rungs:
            continue
        nearest = min(rungs, key=lambda cell: abs(math.log(spent[cell] / budget)))
        told.append(f"{nearest} {spent[nearest] / 1e9:.0f}")
        for drawn, cell in ((equal_data, f"{family}-{BASE_USERS}"), (equal_flops, nearest)):
            mine = [run for run in single if run["cell"] == cell]
            drawn.append(points(name, [run["inference"] for run in mine], [run["hr@10"] for run in mine], colour))
    cost = "inference FLOPs per user (log scale)"
    panels = (
        Panel(f"{BASE_USERS:,} users, one pass", cost, HITS, tuple(equal_data), x_log=True),
        Panel("about equal training FLOPs", cost, HITS, tuple(equal_flops), x_log=True),
    )
    caption = f"Every way to read a run out. Right, training GFLOPs: {', '.join(told)}."
    return Diagram("price", "What an answer costs", caption, panels)
