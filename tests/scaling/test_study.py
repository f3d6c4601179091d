"""The plan of a study: read whole or refused line by line; every run a point, held out, of the sweep, or excluded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from recscale.scaling.collect import Excluded, Records, collect, write_csv
from recscale.scaling.study import axis_specs, read_runs, read_spec, rows_of
from tests.scaling import passing_study
from tests.scaling import synthetic_study as records

PLANTED = Path(__file__).resolve().parents[2] / "experiments" / "0001_four_axes_planted"


def written(folder, **changes):
    """The plan with lines replaced: old text -> new."""
    text = passing_study.PLAN
    for old, new in changes.get("replace", {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "study.yaml").write_text(text)
    return folder


def refused(folder, **replace):
    """Problem lines of a plan, without the name of the file."""
    with pytest.raises(ValueError) as caught:
        read_spec(written(folder, replace=replace))
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{folder / 'study.yaml'}: ") for line in lines)
    return [line.removeprefix(f"{folder / 'study.yaml'}: ") for line in lines]


def test_a_plan_is_read_whole(tmp_path):
    spec = read_spec(written(tmp_path))
    assert spec.forms == ("additive", "log") and spec.delta == "seed" and spec.paired is False
    assert [axis.name for axis in spec.axes] == ["encoder", "data"]
    assert spec.axes[1].is_range and spec.axes[1].levels == (1e5, 1.5e7) and spec.axes[1].minimum_decades == 1.5
    assert spec.held_out.value == 1 and spec.learning_rate_sweep == "cell.coordinates.lr_sweep"
    assert spec.exclude[0].rule == "below" and spec.exclude[0].bound == 8
    assert spec.name == tmp_path.name and spec == read_spec(tmp_path / "study.yaml")
    before = spec.sha256
    (tmp_path / "study.yaml").write_text(passing_study.PLAN + "# a word more\n")
    assert read_spec(tmp_path).sha256 != before


def test_every_problem_of_a_plan_is_a_line(tmp_path):
    lines = refused(
        tmp_path,
        **{
            "direction: falls": "direktion: falls",
            "paired: false": "paired: maybe",
            "forms: [additive, log]": "forms: [aditive]",
            "delta: seed": "delta: -1",
            "metric: eval.test.all.nats": "metric: nats",
            "range: [1e5, 1.5e7]": "rang: [1e5, 1.5e7]",
        },
    )
    text = "\n".join(lines)
    assert "direktion: unknown key; the nearest known: direction" in text and "direction: missing" in text
    assert "paired: found 'maybe', expected one of True, False" in text
    assert "unknown form 'aditive'; the nearest known: additive" in text
    assert "expected log among them" in text
    assert "delta: found -1, expected seed, lsq, lad or a number above 0" in text
    assert "metric: found 'nats', expected eval.SPLIT.SLICE.METRIC" in text
    assert "axes.data.rang: unknown key; the nearest known: range" in text
    assert "axes.data: found neither levels nor range" in text
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("group: []", "group: data", "group: found 'data', expected a list"),
        ("group: []", "group: [3]", "group[0]: found 3, expected text"),
        ("question: Do encoder and data obey one law?", "question: 7", "question: found 7, expected text"),
        ("main_axis: flops.train_total", "main_axis:", "main_axis: found nothing, expected text"),
        ("range: [1e5, 1.5e7]", "range: [1e7, 1e5]", "axes.data.range: found"),
        ("range: [1e5, 1.5e7]", "levels: [1e5, many]", "axes.data.levels[1]: found 'many', expected a number above 0"),
        (", reason: another question", "", "exclude[0].reason: missing"),
        (", below: 8", "", "exclude[0]: found no rule, expected one of above, below, equals"),
        (", below: 8", ", below: few", "exclude[0].below: found 'few', expected a number"),
        (", value: 1}", "}", "held_out.value: missing"),
        ("paired: false", "paired: false\npaired: true", "not valid YAML: key 'paired' is given twice"),
        ("paired: false", "paired: [", "not valid YAML"),
    ],
)
def test_a_problem_of_a_plan_names_its_key(tmp_path, old, new, line):
    (found,) = refused(tmp_path, **{old: new})
    assert found.startswith(line)


def test_a_folder_without_a_plan_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"study\.yaml: found no such file"):
        read_spec(tmp_path)
    (tmp_path / "study.yaml").write_text("- a list")
    with pytest.raises(ValueError, match="the file: found"):
        read_spec(tmp_path)


def test_every_run_is_a_point_held_out_swept_or_excluded(tmp_path):
    rows = passing_study.rows()
    rows[0]["cell.coordinates.history"] = 4
    del rows[4][passing_study.METRIC]
    rows[5]["seen.events"] = 0.0
    rows[8][passing_study.METRIC] = float("nan")
    rows[6]["lineage"] = rows[7]["lineage"] = "trunk"
    spec, tables = passing_study.tables(tmp_path, rows, [Excluded("dead", "failed", "out of memory")])
    (group,) = tables.groups
    points = group.points
    assert len(group.sweep) == 13 and points.held_out_N.sum() == 2 and len(points.fitted) == 42 - 4
    assert len(points) + len(group.sweep) + len(group.excluded) == len(rows)
    reasons = {run.run: run.reason for run in tables.every_excluded}
    assert "declared beforehand: another question" in reasons[rows[0]["run_id"]]
    assert reasons[rows[4]["run_id"]] == f"no {passing_study.METRIC}"
    assert reasons[rows[8]["run_id"]] == f"{passing_study.METRIC} is nan, expected a finite number"
    assert "axis data: seen.events is 0.0, expected a number above 0" in reasons[rows[5]["run_id"]]
    assert reasons["dead"] == "out of memory"
    assert points.run_N == tuple(row["run_id"] for row in group.rows)
    assert points.lineage_N[points.run_N.index(rows[6]["run_id"])] == "trunk"
    np.testing.assert_array_equal(points.x["data"], [row["seen.events"] for row in group.rows])
    np.testing.assert_array_equal(points.y_N, [row[spec.metric] for row in group.rows])
    assert [row["cell.name"] for row in group.held_out_rows] == ["top", "top"]


def test_sigma_comes_from_the_seeds_of_the_fitted_runs(tmp_path):
    spec, tables = passing_study.tables(tmp_path)
    points = tables.groups[0].points
    found = passing_study.rows()
    repeated = ("grid-0-0", "grid-2-3", "grid-5-5")
    cells = [[row[spec.metric] for row in found if row["cell.name"] == name] for name in repeated]
    assert all(len(cell) == 3 for cell in cells)
    expected = np.sqrt(np.mean([np.var(cell, ddof=1) for cell in cells]))
    np.testing.assert_allclose(points.sigma_N, expected)
    assert points.sigma_dof == 6


def test_runs_are_grouped_and_those_without_a_group_are_listed(tmp_path):
    rows = passing_study.rows()
    for number, row in enumerate(rows):
        row["cell.coordinates.log"] = "ml1m" if number % 2 else "beauty"
        row["model_name"] = "hstu"
    del rows[0]["model_name"]
    plan = passing_study.PLAN.replace("group: []", "group: [cell.coordinates.log, model_name]")
    _, tables = passing_study.tables(tmp_path, rows, plan=plan)
    assert [group.name for group in tables.groups] == ["log=beauty, model_name=hstu", "log=ml1m, model_name=hstu"]
    (lost,) = tables.excluded
    assert lost.run == rows[0]["run_id"] and "has no model_name" in lost.reason


def test_a_group_without_a_usable_run_has_a_problem_and_no_points(tmp_path):
    rows = [row | {"seen.events": None} for row in passing_study.rows()[:3]]
    _, tables = passing_study.tables(tmp_path, rows)
    (group,) = tables.groups
    assert group.points is None and "no run" in group.problem and group.fitted_rows == []


def test_runs_lie_where_they_are_asked_for_then_frozen_then_in_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "experiments" / "made_up"
    (study / "results").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="found no runs; looked for"):
        read_runs(study)
    records.write_study(tmp_path / "runs" / "made_up")
    live, place = read_runs(study)
    assert place == "runs/made_up" and len(live.excluded) == 2
    write_csv(live.rows, study / "results" / "runs.csv")
    (study / "results" / "excluded.csv").write_text("run,status,reason\nwidth-512-s0,diverged,loss is nan\n")
    frozen, place = read_runs(study)
    assert place.endswith("results/runs.csv") and frozen.excluded == [
        Excluded("width-512-s0", "diverged", "loss is nan")
    ]
    kept = [{key: value for key, value in row.items() if value not in ("", None)} for row in live.rows]
    assert frozen.rows == kept
    table = pyarrow.Table.from_pylist([{"run_id": "a", "seed": 1}])
    parquet.write_table(table, tmp_path / "else.parquet")
    assert read_runs(study, tmp_path / "else.parquet")[0].rows == [{"run_id": "a", "seed": 1}]
    assert read_runs(study, tmp_path / "runs" / "made_up")[0] == collect(tmp_path / "runs" / "made_up")


def test_names_that_look_like_numbers_stay_names(tmp_path):
    write_csv([{"run_id": "1e5", "config_hash": "0012", "steps": 7, "flag": True}], tmp_path / "runs.csv")
    (row,) = read_runs(tmp_path, tmp_path / "runs.csv")[0].rows
    assert row == {"run_id": "1e5", "config_hash": "0012", "steps": 7, "flag": True}


def test_a_cell_cut_short_stays_text(tmp_path):
    (tmp_path / "runs.csv").write_text('run_id,curve,seen.events\na,"[1, 2]","[1, "\n')
    (row,) = read_runs(tmp_path, tmp_path / "runs.csv")[0].rows
    assert row == {"run_id": "a", "curve": [1, 2], "seen.events": "[1, "}


@pytest.mark.parametrize("second", [{"run_id": "a"}, {"seed": 1}])
def test_a_table_names_every_run_once(tmp_path, second):
    write_csv([{"run_id": "a", "seed": 0}, second], tmp_path / "runs.csv")
    with pytest.raises(ValueError, match=r"runs\.csv: run_id (a|None) is missing or occurs twice"):
        read_runs(tmp_path, tmp_path / "runs.csv")


def test_the_planted_study_reads_its_own_plan():
    spec = read_spec(PLANTED)
    known = json.loads((PLANTED / "results" / "floors.json").read_text())
    cuts = axis_specs(spec, known)
    rows = read_runs(PLANTED)[0].rows
    assert [cut.name for cut in cuts] == ["dim", "rows", "users", "events", "history", "width", "depth"]
    assert {cut.floor for cut in cuts} == {known["history=32"], known["history=all"]}
    assert all(sum(cut.belongs(row) for row in rows) >= 5 for cut in cuts)
    columns = {"parameters.tables", "seen.events", "cell.coordinates.history", "parameters.dense"}
    assert {axis.column for axis in spec.axes} == columns
    (group,) = rows_of(spec, Records(rows, [])).groups
    assert len(group.points) == len(rows) - 1 and "a switch, not a size" in group.excluded[0].reason


def test_a_cut_with_an_unknown_floor_names_the_known_ones():
    with pytest.raises(ValueError, match=r"cuts\.dim\.floor: 'history=32' is no known floor, expected of 'history=3'"):
        axis_specs(read_spec(PLANTED), {"history=3": 4.9})


def test_a_frozen_study_gives_the_points_of_its_records(tmp_path):
    shutil.copytree(PLANTED, tmp_path / "copy")
    spec = read_spec(tmp_path / "copy")
    live = read_runs(tmp_path / "copy")[0]
    write_csv(live.rows, tmp_path / "again.csv")
    again = read_runs(tmp_path, tmp_path / "again.csv")[0]
    a, b = (rows_of(spec, runs).groups[0].points for runs in (live, again))
    assert a.data_hash == b.data_hash
