"""Plans: what a sweep trains, that its points spread, spend what they may, and that a weak plan is found out."""

import csv
import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from recscale.models import MODELS
from recscale.program import parameters, program
from recscale.scaling import plans

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "0004_four_axes_real"

AXES = {"table": (2, 4, 8, 16, 32, 64), "data": (100, 400, 1600, 6400, 25600), "encoder": ((4, 1), (8, 1), (16, 2))}
COLUMNS = {"table": "parameters.tables", "data": "seen.events", "encoder": "encoder"}


def measure(point: plans.Point) -> dict[str, float]:
    """Sizes of a small HSTU on 50 items, the FLOPs by its own count."""
    width, depth = point.get("encoder", (8, 1))
    table, events = point.get("table", 8), point["data"]
    sizes = {"embed_dim": width, "width": width, "depth": depth, "heads": 1, "qk_dim": width, "v_dim": width}
    hstu = MODELS["hstu"]
    config = hstu.Config(
        **sizes, max_length=16, output_length=1, dropout=0.0, time_bias=False, query_time="last_event", dtype="float32"
    )
    forward = sum(hstu.flops(config, 16).values()) / 16 + 2 * 50 * table
    return {
        "parameters.tables": 50 * table,
        "seen.events": events,
        "encoder": hstu.param_groups(config)["dense"],
        plans.COST: 3 * forward * events,
    }


def rows(points) -> list[dict[str, float]]:
    return [dict(candidate.sizes) for candidate in plans.measured(points, measure)]


def test_sobol_points_are_distinct_and_a_longer_plan_begins_with_a_shorter_one():
    short, long = plans.sobol(AXES, 20, seed=3), plans.sobol(AXES, 60, seed=3)
    assert long[:20] == short != plans.sobol(AXES, 20, seed=4)
    assert len({tuple(point.values()) for point in long}) == 60
    assert all(point[axis] in AXES[axis] for point in long for axis in AXES)


def test_sobol_uses_every_level_about_equally():
    drawn = plans.sobol(AXES, 30, seed=0)
    for axis, levels in AXES.items():
        counts = [sum(point[axis] == level for point in drawn) for level in levels]
        assert min(counts) >= 0.6 * 30 / len(levels) and max(counts) <= 1.5 * 30 / len(levels), (axis, counts)


def test_sobol_spreads_over_pairs_of_axes_better_than_chance():
    axes = {"a": tuple(range(8)), "b": tuple(range(8))}
    drawn = plans.sobol(axes, 16, seed=1)
    quarters = {(point["a"] // 2, point["b"] // 2) for point in drawn}
    assert len(quarters) >= 15  # 16 random points reach 10.3 of 16 quarters on average


def test_sobol_keeps_within_a_budget_and_says_when_too_few_are_left():
    def cheap(point):
        return point["table"] * point["data"] <= 6400

    drawn = plans.sobol(AXES, 15, keep=cheap)
    assert len(drawn) == 15 and all(cheap(point) for point in drawn)
    everything = sum(a * b <= 6400 for a, b in itertools.product(AXES["table"], AXES["data"])) * 3
    assert len(plans.sobol(AXES, everything, keep=cheap)) == everything
    with pytest.raises(ValueError, match=f"asked for {everything + 1} points, found {everything}"):
        plans.sobol(AXES, everything + 1, keep=cheap)
    with pytest.raises(ValueError, match="fewer than 2 levels"):
        plans.sobol({"table": (2,), "data": (1, 2)}, 2)


def test_a_ladder_grows_by_its_factors_and_holds_the_rest():
    rungs = plans.ladder({"users": 100, "width": 16, "history": 8}, {"users": 4, "width": 2}, 4)
    assert [rung["users"] for rung in rungs] == [100, 400, 1600, 6400]
    assert [rung["width"] for rung in rungs] == [16, 32, 64, 128]
    assert {rung["history"] for rung in rungs} == {8}
    for factors in ({"depth": 2}, {"users": 1}):
        with pytest.raises(ValueError, match="expected factors above 1 of axes of"):
            plans.ladder({"users": 100}, factors, 3)


def test_an_isoflop_grid_spends_its_budgets():
    sizes = [{"encoder": encoder} for encoder in ((4, 1), (8, 1), (16, 1), (16, 2))]
    budgets = [3e8, 3e9]
    grid = plans.isoflop(budgets, sizes, measure, "data", most=10**7)
    assert len(grid) == len(budgets) * len(sizes)
    spent = np.array([candidate.sizes[plans.COST] for candidate in grid]).reshape(len(budgets), len(sizes))
    assert (spent <= np.array(budgets)[:, None]).all() and (spent >= 0.98 * np.array(budgets)[:, None]).all()
    events = np.array([candidate.levels["data"] for candidate in grid]).reshape(len(budgets), len(sizes))
    assert (np.diff(events, axis=1) < 0).all(), "a larger model gets fewer events of the same budget"
    few = plans.isoflop(budgets, sizes, measure, "data", most=int(events[1, 0]) - 1000)
    assert len(few) == len(grid) - 1, "the smallest model cannot spend the larger budget"


def test_the_budget_is_kept_in_flops_and_in_seconds():
    candidates = plans.measured(plans.sobol(AXES, 30, seed=2), measure)
    prices = [candidate.sizes[plans.COST] for candidate in candidates]
    total = sum(prices) / 3
    kept = plans.within(candidates, total)
    assert 0 < len(kept) < 30 and sum(candidate.sizes[plans.COST] for candidate in kept) <= total
    places = [candidates.index(candidate) for candidate in kept]
    assert places == sorted(places)
    left = [p for candidate, p in zip(candidates, prices, strict=True) if candidate not in kept]
    spent = sum(candidate.sizes[plans.COST] for candidate in kept)
    assert spent + min(left) > total, "a run that still fits is not passed over"
    assert len(plans.within(candidates, 50.0, seconds=lambda flops: 10 + flops * 0)) == 5


def test_a_sound_plan_has_no_finding():
    drawn = plans.sobol(AXES | {"encoder": tuple((2**k, 1) for k in range(1, 8))}, 24, seed=5)
    fitted = rows(drawn)
    top = rows([{"table": 128, "data": 51200, "encoder": (128, 2)}])
    assert plans.check_plan(fitted, COLUMNS, top) == []


def test_each_fault_of_a_plan_is_named():
    sound = rows(plans.sobol(AXES | {"encoder": tuple((2**k, 1) for k in range(1, 8))}, 24, seed=5))
    largest = max(row[plans.COST] for row in sound)
    top = [{plans.COST: 5 * largest}]
    (few,) = plans.check_plan(sound[:20], COLUMNS, top)
    assert few == "20 fitted runs: expected 21, three for each of 7 parameters"
    (rung,) = plans.check_plan(sound, COLUMNS, [{plans.COST: 3.5 * largest}, {plans.COST: 9 * largest}])
    assert "3.50 times the flops.train_total" in rung
    assert plans.check_plan(sound, COLUMNS, []) == ["no run is held out: expected a rung beyond the fitted ones"]
    narrow = [row | {"seen.events": 100 * 2 ** (i % 4)} for i, row in enumerate(sound)]
    assert plans.check_plan(narrow, COLUMNS, top) == [
        f"axis data spans {math.log10(8):.2f} decades: expected 1.5",
        "axis data has 4 levels: expected 5",
    ]
    (levels,) = plans.check_plan(narrow, COLUMNS, top, minimum_decades={"data": 0.9})
    assert levels == "axis data has 4 levels: expected 5"
    tied = [row | {"encoder": row["parameters.tables"] ** 2} for row in sound]
    (correlated,) = plans.check_plan(tied, COLUMNS, top)
    assert correlated.startswith("axes table and encoder are correlated by 1.00")


def study():
    spec = importlib.util.spec_from_file_location("study_0004", STUDY / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study_rows() -> dict[tuple[str, str], list[dict[str, str]]]:
    """The rows of the frozen plan by log and model."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    with (STUDY / "plan.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault((row["data"], row["model"]), []).append(row)
    return groups


def test_the_frozen_plan_of_the_four_axes_on_real_logs_is_sound():
    groups, columns = study_rows(), study().AXIS_COLUMNS
    assert len(groups) == 8
    for name, cells in groups.items():
        fitted = [row for row in cells if row["held_out"] == "0" and not row["lr_sweep"]]
        top = [row for row in cells if row["held_out"] == "1"]
        assert plans.check_plan(fitted, columns, top, {"history": 1.0}, parameters=10) == [], name
        by_cost = sorted(fitted, key=lambda row: float(row[plans.COST]))
        middle = float(by_cost[len(by_cost) // 2][plans.COST])
        for cost in (float(by_cost[0][plans.COST]), middle, float(by_cost[-1][plans.COST])):
            assert sum(float(row[plans.COST]) == cost for row in fitted) == 3, "three seeds at three scales"
        swept = [row for row in cells if row["lr_sweep"]]
        most = min(float(row[plans.COST]) for row in top)
        assert all(row["held_out"] == "0" and float(row[plans.COST]) < most for row in swept)
        for scale in ("small", "middle", "large"):
            rates = {row["dense_rate"] for row in swept if row["lr_sweep"] == scale}
            assert len(rates) == 3
        assert min(int(row["steps"]) for row in cells) >= 105, "a decay of 100 steps after 5 % of warm-up"


def test_a_cell_of_that_plan_is_the_program_whose_sizes_the_plan_states():
    module, groups = study(), study_rows()
    for group, index in ((("ml1m", "hstu"), 0), (("ml1m", "sasrec"), 3), (("kuairand", "hstu"), 5)):
        row = groups[group][index]
        config = module.get_config(row["cell"])
        items = {"ml1m": 3_706, "kuairand": 6_361}[row["data"]]
        run = program(config, items, {}, int(row["steps"]))
        assert parameters(run)["tables"] == int(row["parameters.tables"])
        alone = run.model_config.__class__(**dict(config.model) | {"embed_dim": config.model.width})
        assert run.model.param_groups(alone)["dense"] == int(row["encoder"]) == config.cell.coordinates.encoder
        assert (config.loader.length, config.data.users) == (int(row["history"]), int(row["users"]))
        assert config.optim.warmup == config.table.warmup <= 0.1 * int(row["steps"])
        assert config.study == module.NAME and config.cell.axes == ("table", "data", "context", "encoder")
    with pytest.raises(ValueError, match="has no cell 'p99'"):
        module.get_config("p99")
