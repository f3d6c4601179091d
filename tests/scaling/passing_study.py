"""A study that keeps every rule of the checklist: its plan, its rows and their law are made up here."""

import numpy as np

from recscale.scaling.collect import Records
from recscale.scaling.study import read_spec, rows_of

NOISE = 2e-4
PARAMS = [1e3 * 2.1**i for i in range(6)]
EVENTS = [1e5 * 2.7**i for i in range(6)]
METRIC = "eval.test.all.nats"
LR, TABLE_LR, BATCH = "config.optim.learning_rate", "config.table.learning_rate", "config.loader.batch_size"

PLAN = f"""\
question: Do encoder and data obey one law?
metric: {METRIC}
metric_unit: nats/event
direction: falls
paired: false
group: []
axes:
  encoder: {{column: parameters.dense, label: encoder parameters, unit: parameters, levels: {PARAMS}}}
  data: {{column: seen.events, label: training events, unit: events, range: [1e5, 1.5e7]}}
main_axis: flops.train_total
cost: {{column: flops.train_total, unit: train FLOPs}}
forms: [additive, log]
delta: seed
held_out: {{column: cell.coordinates.held_out, value: 1}}
learning_rate_sweep: {{column: cell.coordinates.lr_sweep}}
exclude:
  - {{column: cell.coordinates.history, below: 8, reason: another question}}
"""


def loss(params, events):
    """The planted law."""
    return 3.0 + 8.0 * params**-0.35 + 40.0 * events**-0.4


def row(name, params, events, seed=0, value=None, **changes):
    """The flat record of one run; keys of `changes` may hold dots when passed as a dictionary."""
    value = loss(params, events) if value is None else value
    flops = 6.0 * params * events
    return {
        "run_id": f"{name}-s{seed}",
        "study": "made_up",
        "status": "ok",
        "seed": seed,
        "cell.name": name,
        "cell.coordinates.encoder": params,
        "cell.coordinates.data": events,
        "cell.coordinates.held_out": 0,
        "cell.coordinates.history": 32,
        "parameters.dense": params,
        "parameters.tables": 64_000,
        "table.bytes": 256_000,
        "table.rows": 1000,
        "table.information_abundance": 12.0,
        "table.arrays.item.rows_touched": 990,
        "seen.events": events,
        "seen.epochs": 1.0,
        "seen.fill": 0.98,
        "flops.projections": 0.6 * flops,
        "flops.attention": 0.1 * flops,
        "flops.head": 0.3 * flops,
        "flops.lookup_bytes": 1e6,
        "flops.train_total": flops,
        "flops.serving_per_request": 1e5,
        "steps": 4000,
        "stopped_at": 4000,
        "config.optim.schedule": "wsd",
        "config.optim.warmup": 100,
        "config.table.warmup": 100,
        LR: 1e-3,
        TABLE_LR: 2e-3,
        BATCH: 32,
        "config.split.name": "global_time",
        "config.eval.protocols": ["full"],
        "versions.recscale": "0.1.0",
        METRIC: value,
        f"{METRIC}.stderr": 1e-5,
        f"{METRIC}.n": 100_000,
        "eval.val.all.nats": value + 0.01,
        "eval.test.new_items.nats": value + 1.0,
        "eval.test.history_10_19.nats": value + 0.1,
        "curve": [
            {
                "step": 4000 * share,
                "split": "val",
                "slice": "all",
                "metric": "nats",
                "value": value * (1.3 - 0.3 * share),
            }
            for share in (0.25, 0.5, 0.75, 1.0)
        ],
    } | changes


def rows():
    """A grid of two axes, three cells of it with three seeds, a held-out rung, and the sweep."""
    rng = np.random.default_rng(0)

    def noisy(name, params, events, seed, **changes):
        value = loss(params, events) * (1 + NOISE * rng.standard_normal())
        return row(name, params, events, seed, value, **changes)

    found = []
    for i, params in enumerate(PARAMS):
        for j, events in enumerate(EVENTS):
            repeated = (i, j) in ((0, 0), (2, 3), (5, 5))
            found += [noisy(f"grid-{i}-{j}", params, events, seed) for seed in range(3 if repeated else 1)]
    top = {"cell.coordinates.held_out": 1}
    found += [noisy("top", PARAMS[-1] * 2.1, EVENTS[-1] * 2.7, seed, **top) for seed in range(2)]
    return found + sweep()


def sweep():
    """Three scales, each with three learning rates; the table's and the batch at the first."""
    found = []
    for name, params in (("small", PARAMS[0]), ("middle", PARAMS[2]), ("large", PARAMS[4])):
        knobs = [(LR, value) for value in (3e-4, 1e-3, 3e-3)]
        knobs += [(TABLE_LR, 6e-4), (TABLE_LR, 6e-3), (BATCH, 16), (BATCH, 64)] if name == "small" else []
        for knob, value in knobs:
            base = {LR: 1e-3, TABLE_LR: 2e-3, BATCH: 32}[knob]
            worse = 1 + 0.01 * abs(np.log(value / base))
            changes = {knob: value, "cell.coordinates.lr_sweep": name}
            label = f"sweep-{name}-{knob.split('.')[1]}-{value:g}"
            found.append(row(label, params, EVENTS[0], 0, loss(params, EVENTS[0]) * worse, **changes))
    return found


def write(folder):
    """The folder of the study: plan, script, README, a frozen table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(PLAN)
    for name in ("study.py", "README.md"):
        (folder / name).write_text("")
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "runs.csv").write_text("run_id\n")
    return folder


def tables(folder, found=None, excluded=(), plan=PLAN):
    """(spec, tables) of a study in `folder` with these rows."""
    write(folder)
    (folder / "study.yaml").write_text(plan)
    spec = read_spec(folder)
    return spec, rows_of(spec, Records(rows() if found is None else found, list(excluded)), str(folder))
