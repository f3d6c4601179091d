"""Every item of the checklist passes on a study that keeps it, and fails on one that breaks it and nothing else."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from recscale.scaling import check, evidence, fits
from recscale.scaling.collect import Excluded
from recscale.scaling.findings import Evidence
from recscale.scaling.validate import Sensitivity, held_out_test, rollout
from tests.scaling import passing_study as study

LAWS = {4, 10, 11, 12}
BLOCKING = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 19}
ROOT = Path(__file__).resolve().parents[2]


def quick(spec, group) -> Evidence:
    """What `gather` gives, from as few fits as say the same."""
    points = group.points
    comparison = fits.compare(points, spec.forms, draws=500)
    law = comparison.best
    along = 1.0 + np.searchsorted(np.array(study.EVENTS)[[0, 2, 4]], points.x["data"])
    rolled = {form: rollout(points, "data", form, along, draws=200) for form in (law.form, "log")}
    return Evidence(
        comparison=comparison,
        fewer=evidence._fewer(points, law),
        held_out=held_out_test(law, points),
        rollout={"data": rolled},
        sensitivity=Sensitivity((("nothing", law, ""),)),
        isoflop=(),
    )


@pytest.fixture(scope="module")
def passing(tmp_path_factory):
    """(spec, tables, laws) of the study that keeps every item."""
    spec, tables = study.tables(tmp_path_factory.mktemp("studies") / "made_up")
    (group,) = tables.groups
    return spec, tables, {group.name: quick(spec, group)}


def wrong(findings) -> set[int]:
    return {finding.item for finding in findings if finding.state != "ok"}


def test_a_study_that_keeps_every_item_is_not_blocked(passing):
    findings = check.run_checks(*passing)
    assert wrong(findings) == set()
    assert [finding.item for finding in check.run_checks(*passing)] == sorted(f.item for f in findings)
    assert {finding.item for finding in findings} == set(range(1, 21))
    assert not check.blocked(findings)
    assert "blocking: none; warning: none" in check.table(findings)


def each(change):
    """Rows of the study, every one changed."""
    found = study.rows()
    for row in found:
        change(row)
    return found


def first(rows, **_):
    return next(row for row in rows if row["cell.name"] == "grid-1-1")


def without(*columns):
    return lambda row: [row.pop(column) for column in columns]


def one(**changes):
    found = study.rows()
    first(found).update(changes)
    return found


def only(test):
    return [row for row in study.rows() if test(row)]


def is_sweep(row):
    return "cell.coordinates.lr_sweep" in row


def narrow(row):
    row["seen.events"] = 1e5 * (row["seen.events"] / 1e5) ** 0.5


def best_at_the_edge():
    found = study.rows()
    for row in found:
        if row.get("cell.coordinates.lr_sweep") == "middle" and row[study.LR] == 3e-3:
            row[study.METRIC] -= 0.5
    return found


def curves_apart():
    found = study.rows()
    for number, row in enumerate(found):
        for entry in row["curve"][:-1]:
            entry["value"] *= 1 + 0.02 * (number % 3)
    return found


# item, how the records break it, a word of the finding, whether the fitted points stay what they were
BROKEN = [
    (1, lambda: one(**{"parameters.dense": 1500.0}), "which the plan does not name", False),
    (1, lambda: only(lambda row: row["parameters.dense"] != study.PARAMS[3]), "no run at the planned", False),
    (2, lambda: each(narrow), "needs 1.5 decades", False),
    (3, lambda: only(lambda row: row["seed"] == 0 or row["cell.name"] != "grid-0-0"), "smallest scale: 1 seeds", False),
    (4, lambda: only(lambda row: not row["cell.coordinates.held_out"]), "no run has", True),
    (5, lambda: only(lambda row: not is_sweep(row)), "was not run", True),
    (5, best_at_the_edge, "at the edge of the sweep", True),
    (5, lambda: only(lambda row: row.get("cell.coordinates.lr_sweep") != "large"), "no third", True),
    (5, lambda: only(lambda row: row[study.TABLE_LR] == 2e-3), "table's learning rate", True),
    (5, lambda: only(lambda row: row[study.BATCH] == 32), "batch", True),
    (6, lambda: one(stopped_at=1000), "stopped before", True),
    (6, lambda: one(**{"config.optim.schedule": "constant"}), "never cooled", True),
    (6, lambda: one(cooled=False), "never cooled", True),
    (6, lambda: one(horizon=8000), "stopped before", True),
    (6, lambda: one(decay_steps=50), "cooled for less", True),
    (6, lambda: one(**{"config.table.warmup": 900}), "warmed up", True),
    (6, lambda: each(without("config.optim.schedule")), "schedule or steps are missing", True),
    (7, lambda: each(without("flops.head")), "flops.head is missing", True),
    (7, lambda: one(**{"flops.head": 1.0}), "do not sum", True),
    (7, lambda: each(without("versions.recscale")), "held against the compiler", True),
    (8, lambda: one(**{f"{study.METRIC}.n": 50}), "other than 100000", True),
    (8, lambda: one(**{"config.split.name": "next_window"}), "differs between runs", True),
    (8, lambda: each(lambda row: row.update({"config.split.name": "leave_one_out"})), "one moment in time", True),
    (8, lambda: each(lambda row: row.update({"config.eval.protocols": ["sampled"]})), "sampled candidates", True),
    (8, lambda: each(lambda row: row.update({f"{study.METRIC}.stderr": 0.01})), "against seed noise", True),
    (9, lambda: one(**{"seen.epochs": 3.0}), "more than once", True),
    (9, lambda: each(without("seen.epochs")), "is missing", True),
    (14, lambda: each(without("table.information_abundance")), "information abundance", True),
    (14, lambda: each(lambda row: row.update({"table.rows": row["seen.events"]})), "move together", True),
    (16, lambda: each(without("flops.serving_per_request")), "serving", True),
    (17, lambda: each(without("eval.val.all.nats")), "one window", True),
    (18, lambda: each(without("curve")), "have a curve", True),
    (18, curves_apart, "normalised curves differ", True),
]


NAMES = [f"{item}-{word[:24]}" for item, _, word, _ in BROKEN]


@pytest.mark.parametrize(("item", "rows", "word", "same"), BROKEN, ids=NAMES)
def test_each_item_is_found_where_it_is_broken(passing, tmp_path, item, rows, word, same):
    _, _, laws = passing
    spec, tables = study.tables(tmp_path / "made_up", rows())
    findings = check.run_checks(spec, tables, laws if same else None)
    found = [finding for finding in findings if finding.item == item and finding.state != "ok"]
    assert any(word in finding.text for finding in found), check.table(findings)
    assert all(finding.what_to_do for finding in found)
    assert wrong(findings) - (set() if same else LAWS) == {item}
    assert check.blocked(findings) == (item in BLOCKING or not same)


def test_axes_that_move_together_are_found(tmp_path):
    spec, tables = study.tables(
        tmp_path, only(lambda row: is_sweep(row) or row["cell.name"][-3] == row["cell.name"][-1])
    )
    texts = [finding.text for finding in check.run_checks(spec, tables) if finding.item == 2]
    assert any("correlate: rho +1.00" in text for text in texts)
    assert any("10 points, the form additive has 5 parameters and needs 15" in text for text in texts)


def test_published_runs_on_a_tenth_of_a_decade_are_found(tmp_path):
    """Eight starts agree on this fit, its exponents have clean profiles: only the span of the axis gives it away."""
    data = os.environ.get("RECSCALE_DATA")
    if not data:
        pytest.skip("RECSCALE_DATA is not set: the published runs are not at hand")
    found = parquet.read_table(Path(data) / "scaling" / "gemstones.parquet").to_pylist()
    runs = [
        study.row(f"run-{i}", row["params_active_precise"], row["tokens"], value=row["final_loss"])
        for i, row in enumerate(found)
        if row["subset"] == "hot_100b+_512x"
    ]
    spec, tables = study.tables(tmp_path, runs)
    texts = [f.text for f in check.run_checks(spec, tables) if f.item == 2 and f.state == "finding"]
    assert len(runs) == 175 and any("axis encoder spans 0.08 decades" in text for text in texts)


def test_a_plan_without_held_out_rung_or_sweep_blocks(tmp_path):
    plan = study.PLAN.replace("{column: cell.coordinates.held_out, value: 1}", "null")
    plan = plan.replace("{column: cell.coordinates.lr_sweep}", "null")
    spec, tables = study.tables(tmp_path, only(lambda row: not is_sweep(row)), plan=plan)
    texts = {finding.item: finding.text for finding in check.run_checks(spec, tables) if finding.state == "finding"}
    assert "no rung out" in texts[4] and "no learning-rate sweep is planned" in texts[5]


def test_a_small_effect_is_told_apart_from_a_small_axis(tmp_path):
    noisy = study.rows()
    rng = np.random.default_rng(1)
    for row in noisy:
        row[study.METRIC] += 0.1 * rng.standard_normal()
    spec, tables = study.tables(tmp_path, noisy)
    texts = [f.text for f in check.run_checks(spec, tables) if f.item == 3 and f.state == "finding"]
    assert len(texts) == 2 and all("its exponent is not identified" in text for text in texts)


def broken_laws(passing, **changes):
    spec, tables, laws = passing
    ((name, known),) = laws.items()
    return check.run_checks(spec, tables, {name: dataclasses.replace(known, **changes)})


def said(findings, item):
    return [finding for finding in findings if finding.item == item and finding.state != "ok"]


def test_no_law_no_certificate_and_another_law_are_found(passing):
    spec, tables, laws = passing
    assert wrong(check.run_checks(spec, tables, None)) == LAWS
    ((name, known),) = laws.items()
    refused = dataclasses.replace(known.comparison, best=None, text="No form is certified. additive refused: why")
    findings = broken_laws(passing, comparison=refused)
    assert {10, 11, 12} == wrong(findings) and "additive refused: why" in said(findings, 10)[0].text
    other = dataclasses.replace(known.comparison.best, data_hash="of other points")
    findings = broken_laws(passing, comparison=dataclasses.replace(known.comparison, best=other))
    assert wrong(findings) == {10} and "other points" in said(findings, 10)[0].text
    findings = broken_laws(passing, comparison=None, problem="3 runs")
    assert wrong(findings) == {10, 11, 12} and check.blocked(findings) and name == "all"


def test_a_missing_null_or_an_idle_axis_is_found(passing):
    _, _, laws = passing
    (known,) = laws.values()
    alone = dataclasses.replace(known.comparison, laws=known.comparison.laws[:1])
    assert wrong(broken_laws(passing, comparison=alone)) == {11}
    assert (
        "no law without the axis data"
        in said(broken_laws(passing, fewer={"encoder": known.fewer["encoder"]}), 11)[0].text
    )
    swapped = {"data": {"additive": known.rollout["data"]["log"], "log": known.rollout["data"]["additive"]}}
    idle = {"steps": (), "problems": ((1.0, "why"),)}
    stuck = {"data": {name: dataclasses.replace(rolled, **idle) for name, rolled in swapped["data"].items()}}
    assert "not rolled out along data: why" in said(broken_laws(passing, rollout=stuck), 11)[0].text
    assert "no rollout was made" in said(broken_laws(passing, rollout={}), 11)[0].text
    findings = broken_laws(passing, rollout=swapped)
    assert wrong(findings) == {11} and "the null predicts better" in said(findings, 11)[0].text


def test_an_axis_that_does_nothing_is_indistinguishable_from_none(tmp_path):
    rng = np.random.default_rng(2)
    flat = study.rows()
    for row in flat:
        row[study.METRIC] = study.loss(row["parameters.dense"], 1e12) * (1 + study.NOISE * rng.standard_normal())
    spec, tables = study.tables(tmp_path, flat)
    (group,) = tables.groups
    comparison = fits.compare(group.points, ("log",), draws=200)
    known = Evidence(comparison=comparison, fewer=evidence._fewer(group.points, comparison.best))
    texts = [f.text for f in check.run_checks(spec, tables, {"all": known}) if f.item == 11 and f.state == "finding"]
    assert len(texts) == 1 and "without the axis data" in texts[0]


def test_a_refit_that_moves_and_a_prediction_that_misses_are_found(passing):
    _, _, laws = passing
    (known,) = laws.values()
    ((choice, refit, _),) = known.sensitivity.rows
    params = refit.params | {"E": 2.0}
    intervals = refit.intervals | {"E": (1.9, 2.1)}
    moved = dataclasses.replace(refit, params=params, intervals=intervals)
    findings = broken_laws(passing, sensitivity=Sensitivity(((choice, moved, ""), ("no fit", None, "3 points"))))
    assert wrong(findings) == {12} and not check.blocked(findings) and len(said(findings, 12)) == 2
    test = known.held_out
    missed = dataclasses.replace(test, actual_M=test.actual_M + 1.0)
    assert wrong(broken_laws(passing, held_out=missed)) == {4}


def test_profiles_without_an_inner_minimum_are_found(tmp_path):
    grid = [row for row in study.rows() if is_sweep(row) or row["cell.coordinates.held_out"]]
    for i in range(6):
        for j in range(6):
            params, events = 1e3 * 4**i, 1e9 * 4**j
            grid.append(study.row(f"grid-{i}-{j}", params, events))
    spec, tables = study.tables(tmp_path, grid)
    assert "were not looked at" in said(check.run_checks(spec, tables), 13)[0].text
    (group,) = tables.groups
    marks = evidence._profiles(spec, group)
    assert len(marks) == 5 and sum("edge" in mark for mark in marks) >= 1
    known = Evidence(comparison=fits.compare(group.points, ("log",), draws=200), isoflop=marks)
    assert "isoFLOP profiles: " in said(check.run_checks(spec, tables, {"all": known}), 13)[0].text


def test_runs_without_a_reason_and_tables_without_their_exclusions_are_found(passing, tmp_path):
    spec, tables, laws = passing
    silent = dataclasses.replace(tables, excluded=(Excluded("a", "failed", ""),))
    assert wrong(check.run_checks(spec, silent, laws)) == {15}
    told = dataclasses.replace(tables, excluded=(Excluded("a", "failed", "out of memory"),))
    assert wrong(check.run_checks(spec, told, laws)) == set()
    frozen = tmp_path / "runs.csv"
    frozen.write_text("")
    assert wrong(check.run_checks(spec, dataclasses.replace(tables, source=str(frozen)), laws)) == {15}
    (tmp_path / "excluded.csv").write_text("run,status,reason\n")
    assert wrong(check.run_checks(spec, dataclasses.replace(tables, source=str(frozen)), laws)) == set()


def test_a_study_that_cannot_be_made_again_and_one_carried_too_far_are_found(passing, tmp_path):
    spec, tables, laws = passing
    assert wrong(check.run_checks(dataclasses.replace(spec, path=tmp_path / "study.yaml"), tables, laws)) == {20}
    far = study.rows()
    for row in far:
        if row["cell.coordinates.held_out"]:
            row["flops.train_total"] *= 100
            for part in ("projections", "attention", "head"):
                row[f"flops.{part}"] *= 100
    spec, tables = study.tables(tmp_path / "far", far)
    assert wrong(check.run_checks(spec, tables, laws)) == {19}


def test_a_study_without_runs_is_unknown_and_blocked(tmp_path):
    spec, tables = study.tables(tmp_path, [])
    findings = check.run_checks(spec, tables)
    assert check.blocked(findings) and any("no finished runs" in finding.text for finding in findings)


def test_the_command_says_what_blocks(capsys):
    folder = ROOT / "experiments" / "0001_four_axes_planted"
    assert check.main([str(folder), "--no-laws"]) == 1
    text = capsys.readouterr().out
    assert "35 finished runs" in text and "blocking: 2, 3, 4, 5, 6, 8, 10, 11" in text


def test_the_command_names_too_few_draws(capsys):
    assert check.main(["anywhere", "--draws", "10"]) == 2
    assert capsys.readouterr().err == "error: --draws: found 10, expected at least 200\n"


def test_the_command_names_a_missing_plan(tmp_path, capsys):
    assert check.main([str(tmp_path)]) == 2
    assert "study.yaml: found no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_that_a_check_asks_is_gathered_for_every_group(tmp_path):
    found = study.rows()
    both = [
        row | {"model_name": name, "run_id": f"{name}-{row['run_id']}"} for name in ("hstu", "sasrec") for row in found
    ]
    plan = study.PLAN.replace("group: []", "group: [model_name]")
    spec, tables = study.tables(tmp_path / "made_up", both, plan=plan)
    laws = evidence.gather_all(spec, tables, draws=500)
    assert list(laws) == ["model_name=hstu", "model_name=sasrec"]
    findings = check.run_checks(spec, tables, laws)
    assert wrong(findings) <= {12}
    assert any(finding.text.startswith("[model_name=sasrec] additive: 42 points") for finding in findings)


GRID = [np.arange(0.0, 2.5, 0.5), np.array([np.e**5, np.e**10]), np.array([0.1, 0.5])]


def test_fits_that_never_left_their_start_are_found():
    moved = np.array([[1.0, np.e**5 * (1 + 1e-6), 0.1], [1.3, np.e**5, 0.1]])
    stuck = np.array([[1.0, np.e**5, 0.1], [0.5, np.e**10 * (1 + 1e-12), 0.5]])
    found = check.on_start_grid(np.concatenate([moved, stuck]), GRID)
    np.testing.assert_array_equal(found, [False, False, True, True])
    with pytest.raises(ValueError, match="expected 3"):
        check.on_start_grid(stuck, GRID[:2])


def test_the_published_loss_laws_stand_on_their_start_grid():
    data = os.environ.get("RECSCALE_DATA")
    if not data:
        pytest.skip("RECSCALE_DATA is not set: the published fits are not at hand")
    rows = parquet.read_table(Path(data) / "scaling" / "porian_published_fits.parquet").to_pylist()
    weighted = np.array([[r["E"], r["A"], r["alpha"]] for r in rows if "weighted" in r["fit"]], np.float64)
    grid = [np.exp(np.arange(-1, 1.5, 0.5)), np.exp(np.arange(0.0, 30, 5)), np.arange(0.0, 2.5, 0.1)]
    assert len(weighted) == 30 and check.on_start_grid(weighted, grid, 1e-6).sum() == 18
