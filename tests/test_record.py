"""The record: what identifies a run, what it holds, and what survives a kill in the middle of a line."""

import json
import math

import pytest

from recscale import record, train
from tests.tiny_run import FULL, make_log, tiny


def test_the_hash_is_of_the_values_not_of_their_order():
    one = {"a": 1, "b": {"c": (1, 2), "d": 0.1}}
    assert record.config_hash(one) == record.config_hash({"b": {"d": 0.1, "c": [1, 2]}, "a": 1})
    for other in ({"a": 2, "b": one["b"]}, {"a": 1, "b": {"c": (1, 2), "d": 0.2}}, {"a": 1}):
        assert record.config_hash(other) != record.config_hash(one)


def test_a_run_leaves_every_field_of_the_contract(tmp_path):
    log = make_log(tmp_path / "log", users=60)
    config = tiny("hstu", log, train__epochs=0.4, **FULL).unlock()
    config.study, config.seed = "a_study", 3
    config.cell.name, config.cell.axes = "users-60", ("data",)
    config.cell.coordinates = {"users": 60}
    train.train(config.lock(), tmp_path / "run")
    book = record.read(tmp_path / "run")
    assert (book["study"], book["seed"], book["status"], book["reason"]) == ("a_study", 3, "ok", "")
    assert book["cell"] == {"name": "users-60", "axes": ["data"], "coordinates": {"users": 60}}
    assert book["config"] == json.loads(json.dumps(config.to_dict()))
    assert book["config_hash"] == record.config_hash(book["config"])
    assert book["run_id"] == f"users-60-s3-{book['config_hash'][:8]}"
    assert set(book["code"]) == {"revision", "dirty"}
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "recscale"} <= set(book["versions"])
    assert book["devices"] == {"kind": "cpu", "platform": "cpu", "count": 8} and book["hosts"] == 1
    assert set(book["parameters"]) == {"tables", "dense", "context_tables", "head", "codebooks"}
    assert set(book["flops"]) == {"projections", "attention", "head", "train_total", "lookup_bytes"}
    assert set(book["inference"]) == {"encoder", "sampling", "ranking", "total"} and book["inference"]["ranking"] > 0
    sizes = {"kind", "rows", "dim", "bytes", "bytes_per_item", "arrays"}
    assert set(book["table"]) == sizes | {"extra_rounds", "lost_rows", "information_abundance", "variance"}
    assert book["table"]["lost_rows"] == 0 and 1 <= book["table"]["information_abundance"] <= 8
    array = book["table"]["arrays"]["item"]
    assert array["collisions_any"] == 0 and array["rows_touched"] == book["seen"]["unique_items"]
    assert sum(array["row_frequency_histogram"]) == array["rows"] == book["table"]["rows"]
    counts = {"examples", "events", "unique_users", "unique_items", "epochs", "fill", "dropped"}
    assert counts <= set(book["seen"])
    assert book["stopped_at"] == book["steps"] == book["selected_step"] > 0  # steps: the planned budget
    assert 0 < book["seconds"]["wall"] == book["seconds"]["device"]  # one device in the mesh
    assert {row["metric"] for row in book["evaluations"]} == {"nats", "hr@10", "ndcg@10", "mrr"}
    for row in book["evaluations"]:
        assert {"step", "split", "slice", "metric", "value", "stderr", "n"} <= set(row)
        assert row["split"] == "test" and math.isfinite(row["value"])
        assert row["n"] == 60 or row["slice"] != "all"
    assert (tmp_path / "run" / "DONE").read_text() == "ok\n"


def test_write_replaces_the_record_whole(tmp_path):
    book = {"schema_version": record.SCHEMA_VERSION, "text": "x" * 1000}
    record.write(tmp_path, book)
    with pytest.raises(TypeError):
        record.write(tmp_path, {"schema_version": record.SCHEMA_VERSION, "text": object()})
    assert record.read(tmp_path) == book


def test_what_is_no_record_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record\.json"):
        record.read(tmp_path)
    (tmp_path / "record.json").write_text('{"schema_version": 1, "stat')
    with pytest.raises(ValueError, match=r"record\.json: not valid JSON"):
        record.read(tmp_path)
    (tmp_path / "record.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match=r"record\.json: found 99, expected .* version 1"):
        record.read(tmp_path)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_by_a_kill_is_left_out(cut, tmp_path):
    rows = [{"step": step, "loss": 1.5 * step, "seconds": step / 4} for step in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text[:-cut])
    complete = rows if cut == 1 else rows[:2]  # only the line's end is missing: the row is whole
    assert record.read_metrics(tmp_path) == complete
    metrics = record.Metrics(tmp_path, 3)
    metrics.append({"step": 4})
    assert record.read_metrics(tmp_path) == [*complete, {"step": 4}] == metrics.rows
    assert metrics.seconds() == complete[-1]["seconds"]


def test_opening_at_a_step_cuts_what_came_after_and_what_was_final(tmp_path):
    kept = [{"step": 1, "loss": 2.0}, {"step": 2, "metric": "nats", "value": 1.0}]
    lost = [{"step": 1, "metric": "nats", "value": 9.0, "final": True}, {"step": 3, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*kept, *lost)))
    metrics = record.Metrics(tmp_path, 2)
    assert metrics.rows == record.read_metrics(tmp_path) == kept
    assert metrics.evaluations() == kept[1:]
    assert record.read_metrics(tmp_path / "nowhere") == [] and record.Metrics(tmp_path, 0).seconds() == 0.0
