"""A study of made-up records whose laws are known: what collect, figures and report are tested on."""

import json
from pathlib import Path

import numpy as np

from recscale.scaling.laws import AxisSpec

FLOOR = 3.1
SEED_SD = 0.002
BASE = {"table_rows": 4096, "users": 8000, "history": 64, "width": 64, "context_features": 0}
AXES = {
    "users": ([1000, 2000, 4000, 8000, 16000, 32000, 64000], 9.0, 0.45),
    "table_rows": ([256, 512, 1024, 2048, 4096, 8192], 2.5, 0.5),
    "history": ([4, 8, 16, 32, 64, 128], 0.4, 0.7),
    "width": ([8, 16, 32, 64, 128, 256], 0.0, 0.5),
}
SPECS = (
    AxisSpec("users", "cell.coordinates.users", "training data", "users", cells="users", floor=FLOOR),
    AxisSpec(
        "table_rows",
        lambda row: row["cell.coordinates.table_rows"] * 16,
        "embedding table",
        "rows x dim",
        cells="table_rows",
        cost=lambda row: 4.0 * row["parameters.tables"],
        cost_unit="table bytes",
    ),
    AxisSpec("history", "cell.coordinates.history", "history length", "events", cells="history"),
    AxisSpec("width", "cell.coordinates.width", "encoder width", "channels", cells="width"),
)


def loss(coordinates):
    """The planted test loss: one floor for the users axis, other terms taken at their base value."""
    total = FLOOR
    for axis, (_, scale, alpha) in AXES.items():
        here = scale * coordinates[axis] ** -alpha
        total += here if axis == "users" else here - scale * BASE[axis] ** -alpha
    return total


def record(name, axes, coordinates, seed, value, **changes):
    width, history, users = coordinates["width"], coordinates["history"], coordinates["users"]
    total = 6.0 * users * history * (12 * width**2 + 2 * history * width)
    return {
        "schema_version": 1,
        "run_id": f"{name}-s{seed}",
        "study": "made_up",
        "cell": {"name": name, "axes": axes, "coordinates": coordinates},
        "seed": seed,
        "status": "ok",
        "reason": "",
        "config": {"model": {"width": width}, "seed": seed},
        "parameters": {"tables": coordinates["table_rows"] * 16, "dense": 12 * width**2, "head": 0, "codebooks": 0},
        "flops": {"projections": total, "attention": 0.0, "head": 0.0, "lookup_bytes": 1.0, "train_total": total},
        "seen": {"examples": users, "events": users * 30, "unique_items": 900, "unique_users": users, "epochs": 1.0},
        "seconds": {"wall": 12.5, "device": 11.0},
        "devices": {"kind": "cpu", "count": 2},
        "evaluations": [
            {"step": 10, "split": "test", "slice": "all", "metric": "nats", "value": 9.0, "stderr": 0.1, "n": 500},
            {"step": 99, "split": "test", "slice": "all", "metric": "nats", "value": value, "stderr": 0.008, "n": 500},
        ],
        **changes,
    }


def write(folder, entry):
    run = Path(folder) / entry["run_id"]
    run.mkdir(parents=True, exist_ok=True)
    (run / "record.json").write_text(json.dumps(entry))
    return run


def write_study(folder, seed=1):
    """All cells of the four axes, five seeds at the base, one diverged and one unreadable run."""
    rng = np.random.default_rng(seed)

    def base(number):
        write(folder, record("base", list(AXES), dict(BASE), number, loss(BASE) + SEED_SD * rng.standard_normal()))

    for number in range(3):
        base(number)
    for axis, (values, _, _) in AXES.items():
        for x in values:
            if x != BASE[axis]:
                place = {**BASE, axis: x}
                value = loss(place) + SEED_SD * rng.standard_normal()
                write(folder, record(f"{axis}-{x}", [axis], place, 0, value))
    for number in (3, 4):
        base(number)
    broken = record("width-512", ["width"], {**BASE, "width": 512}, 0, 3.0, status="diverged")
    write(folder, {**broken, "reason": "loss is <nan> & at step 41", "evaluations": []})
    (Path(folder) / "torn").mkdir()
    (Path(folder) / "torn" / "record.json").write_text('{"run_id": ')
    return Path(folder)
