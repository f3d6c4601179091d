"""Every record becomes a row or a reason."""

import csv
import json
import os

import pytest

from recscale.scaling import collect
from tests.scaling import synthetic_study as study


def test_rows_are_flat_and_hold_the_last_evaluation(tmp_path):
    study.write(tmp_path, study.record("base", ["users"], dict(study.BASE), 0, 3.25))
    (row,) = collect.collect(tmp_path).rows
    assert row["cell.coordinates.users"] == 8000 and row["cell.axes"] == ["users"]
    assert row["config.model.width"] == 64 and row["devices.kind"] == "cpu"
    assert row["eval.test.all.nats"] == 3.25 and row["eval.test.all.nats.stderr"] == 0.008
    assert row["eval.test.all.nats.step"] == 99


def test_every_run_is_a_row_or_an_exclusion_with_its_reason(tmp_path):
    base = dict(study.BASE)
    study.write(tmp_path, study.record("good", ["users"], base, 0, 3.0))
    study.write(tmp_path, study.record("late", ["users"], base, 0, 3.0, status="running"))
    study.write(tmp_path, study.record("bad", ["users"], base, 0, 3.0, status="diverged", reason="loss nan at step 3"))
    study.write(tmp_path, study.record("dead", ["users"], base, 0, 3.0, status="failed"))
    study.write(tmp_path, study.record("unseen", ["users"], base, 0, 3.0, evaluations=[]))
    study.write(tmp_path, study.record("infinite", ["users"], base, 0, float("inf")))
    study.write(tmp_path, study.record("future", ["users"], base, 0, 3.0, schema_version=99))
    half = study.record("half", ["users"], base, 0, 3.0)
    del half["seed"]
    study.write(tmp_path, half)
    for name, content in (("torn", '{"run_id": '), ("list", "[1]"), ("malformed", json.dumps(half | {"seed": 0}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(content)
    malformed = half | {"seed": 0, "evaluations": [{"step": 1}]}
    (tmp_path / "malformed" / "record.json").write_text(json.dumps(malformed))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("{}\n")
    records = collect.collect(tmp_path)
    assert [row["run_id"] for row in records.rows] == ["good-s0"]
    reasons = {run.run: run.reason for run in records.excluded}
    assert len(reasons) == 11
    assert reasons["bad-s0"] == "loss nan at step 3"
    assert "no reason recorded" in reasons["dead-s0"]
    assert "not finished" in reasons["late-s0"]
    assert "no evaluation" in reasons["unseen-s0"]
    assert "non-finite" in reasons["infinite-s0"]
    assert "schema_version 99" in reasons["future-s0"]
    assert "no seed" in reasons["half-s0"]
    assert "cannot be read" in reasons["torn"] and "list" in reasons["list"] and "malformed" in reasons["malformed"]
    assert "no record.json" in reasons["begun"]


def test_newest_record_of_a_run_wins_and_the_older_is_named(tmp_path):
    for place, value, age in (("first", 3.0, 0), ("second", 2.0, 1000), ("third", 4.0, -1000)):
        run = study.write(tmp_path / place, study.record("cell", ["users"], dict(study.BASE), 0, value))
        os.utime(run / "record.json", (10_000 + age, 10_000 + age))
    records = collect.collect(tmp_path)
    assert [row["eval.test.all.nats"] for row in records.rows] == [2.0]
    assert sorted(run.run for run in records.excluded) == ["first/cell-s0", "third/cell-s0"]
    assert all("second/cell-s0" in run.reason for run in records.excluded)


def test_empty_folder_gives_nothing_and_a_missing_one_is_an_error(tmp_path):
    assert collect.collect(tmp_path) == collect.Records([], [])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        collect.collect(tmp_path / "nowhere")


def test_csv_has_every_column_of_every_row(tmp_path):
    collect.write_csv([{"a": 1, "b": [1, 2]}, {"a": 2, "c": "x,y"}], tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"a": "1", "b": "[1, 2]", "c": ""}, {"a": "2", "b": "", "c": "x,y"}]
