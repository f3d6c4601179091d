"""A study of one axis, quick to fit, whose report has it all: a certified law, a held-out rung, a sweep, curves."""

import json
import math

import numpy as np

from recscale.scaling.collect import write_csv
from tests.scaling import passing_study

SIZES = [1e3 * 1.5**i for i in range(12)]
EVENTS = 1e6
ODD_NAME = 'grid-7 <b>&"odd"'

_BEFORE, _REST = passing_study.PLAN.split("  data:")
PLAN = (_BEFORE + _REST[_REST.index("\n") + 1 :]).replace("[additive, log]", "[pow_floor, log]")


def rows():
    """Twelve sizes, three of them with three seeds, two held-out runs four times as dear, and a sweep."""
    rng = np.random.default_rng(1)

    def run(name, params, seed, **changes):
        value = passing_study.loss(params, EVENTS) * (1 + passing_study.NOISE * rng.standard_normal())
        extra = {"eval.test.all.ndcg@10": 0.9 * math.exp(-0.4 * value) + 1e-4 * rng.standard_normal()}
        return passing_study.row(name, params, EVENTS, seed, value, **extra, **changes)

    found = []
    for i, params in enumerate(SIZES):
        name = ODD_NAME if i == 7 else f"grid-{i}"
        found += [run(name, params, seed) for seed in range(3 if i in (0, 6, 11) else 1)]
    found += [run("top", SIZES[-1] * 4.2, seed, **{"cell.coordinates.held_out": 1}) for seed in (0, 1)]
    return found + [row | {"seen.events": EVENTS} for row in passing_study.sweep()]


def write(folder, found=None, excluded=(), plan=PLAN):
    """Writes plan and frozen table of a study; excluded: (run, status, reason)."""
    passing_study.write(folder)
    (folder / "study.yaml").write_text(plan)
    results = folder / "results"
    write_csv(rows() if found is None else found, results / "runs.csv")
    listed = [dict(zip(("run", "status", "reason"), entry, strict=True)) for entry in excluded]
    write_csv(listed, results / "excluded.csv")
    (results / "floors.json").write_text(json.dumps({"limit <1>": 3.1}))
    return folder
