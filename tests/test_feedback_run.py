"""Runs that predict feedback: what they write, what it is worth, and fine-tuning that begins with another run."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import argus_kuairand
from recscale import evaluate_feedback as evaluate_feedback_module
from recscale import ranking_metrics, record, train, training
from recscale.data.event_log import Column, EventLog
from recscale.data.event_log_writer import write
from recscale.evaluate import evaluate_split
from recscale.evaluate_feedback import evaluate_feedback
from recscale.mesh import place_batch
from recscale.run import build, costs, init_state
from recscale.step import make_train_step
from recscale.tasks.next_item import FREQUENCY

ITEMS, USERS, EVENTS = 20, 60, 16
TIMES = np.arange(EVENTS) // 4 * 1000 + np.arange(EVENTS) % 4 * 10  # four requests of four impressions
TEST_FROM = 3000


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """Impressions of which even items are liked, but for one in twenty; the tab says nothing."""
    rng, n = np.random.default_rng(0), USERS * EVENTS
    item = rng.integers(1, ITEMS + 1, n).astype(np.int32)
    like = ((item % 2 == 0) ^ (rng.random(n) < 0.05)).astype(np.int8)
    events = {
        "item_id": item,
        "timestamp": np.tile(TIMES, USERS) + np.repeat(rng.integers(0, 99, USERS), EVENTS),
        "like": like,
        "ratio": (like + rng.random(n)).astype(np.float32) / 2,
        "tab": rng.integers(1, 4, n).astype(np.int32),
    }
    columns = {"item_id": Column("id"), "timestamp": Column("time"), "tab": Column("context", 4)}
    columns |= {"like": Column("feedback", 2), "ratio": Column("feedback")}
    path = tmp_path_factory.mktemp("impressions") / "log"
    write(EventLog(np.arange(USERS + 1) * EVENTS, events, columns, num_items=ITEMS, facts={"licence": "none"}), path)
    return path


def tiny(log: Path, **changes) -> ConfigDict:
    c = argus_kuairand.get_config().unlock()
    c.data.path = str(log)
    c.split = ConfigDict({"name": "global_time", "test_from": TEST_FROM, "keep_new_users": True})
    c.loader.update({"batch_size": 4, "length": EVENTS, "row_length": 32, "inputs": ("like",), "queries": ("tab",)})
    c.model.update({"embed_dim": 8, "width": 8, "depth": 1, "max_length": EVENTS, "dropout": 0.0, "prefix": 0})
    c.table.update({"learning_rate": 3e-2, "warmup": 3})
    c.optim.update({"learning_rate": 1e-2, "warmup": 3})
    c.task.update({"negatives": 8, "heads": (("like", "binary"), ("ratio", "ordinal")), "edges": (0.5,), "hidden": 8})
    c.train.update({"epochs": 24.0, "log_every": 10})
    c.eval.update({"batch_size": 8, "chunk": 64, "block": 64})
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c.lock()


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    train.train(tiny(log), workdir)
    return workdir


def test_a_run_learns_the_feedback_and_writes_it_per_target(log, trained):
    book, events = record.read(trained), EventLog.open(log).events
    assert book["status"] == "ok"
    value = {row["metric"]: row["value"] for row in book["evaluations"] if row["slice"] == "all"}
    assert value["auc/like"] > 0.85 and value["normalised_entropy/like"] < 0.7 and value["concordance/ratio"] > 0.7
    assert value["nats"] < 3.5 and "hr@10" in value
    found = np.load(trained / "per_target_test.npz")
    np.testing.assert_array_equal(found["label/like"], events["like"][found["row"]])
    np.testing.assert_array_equal(found["label/ratio"], events["ratio"][found["row"]] > 0.5)
    np.testing.assert_array_equal(found["user"], found["row"] // EVENTS)
    assert len(found["row"]) == len(np.unique(found["row"])) == (events["timestamp"] >= TEST_FROM).sum()
    twin = ranking_metrics.summarise(
        "binary", found["label/like"], found["score/like"], found["request"], found["user"]
    )
    assert twin["auc"][0] == value["auc/like"]
    assert book["parameters"]["head"] > 0 and book["flops"]["head"] > 0


def test_predictions_do_not_depend_on_the_batch(log, trained):
    found = np.load(trained / "per_target_test.npz")
    assert np.ptp(found["score/like"]) > 0.5
    run = build(tiny(log, eval__batch_size=3, loader__layout="padded"))
    run = dataclasses.replace(run, config=run.config)
    state = init_state(build(tiny(log, train__warm_start=str(trained))))
    other = init_state(run)
    assert not np.array_equal(state["tables"]["item"], other["tables"]["item"])
    one, two = (evaluate_split(build(tiny(log, **how)), state, "test", 1)[1] for how in ({}, {"eval__batch_size": 3}))
    np.testing.assert_allclose(one["score/like"], two["score/like"], rtol=1e-5)


def test_a_second_evaluation_compiles_nothing(log):
    run = build(tiny(log))
    state = init_state(run)
    evaluate_split(run, state, "test", 1)
    compiled = evaluate_feedback_module._predict._cache_size()
    evaluate_split(run, state, "test", 2)
    assert evaluate_feedback_module._predict._cache_size() == compiled > 0


def two_towers(log: Path, **changes) -> ConfigDict:
    c = tiny(log).unlock()
    c.task_name = "two_tower"
    c.task = ConfigDict({"label": "like", "reach": 8, "similarity": "dot", "temperature": 1.0})
    c.loader.update({"lag": 150, "request_gap": 150, "queries": ()})
    c.cell.name, c.train.epochs = "fine", 4.0
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c.lock()


def test_fine_tuning_begins_with_the_encoder_and_the_tables_of_the_other_run(log, trained, tmp_path):
    before = init_state(build(tiny(log, train__warm_start=str(trained))))
    fresh = init_state(build(two_towers(log)))
    start = init_state(build(two_towers(log, train__warm_start=str(trained))))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), start["model"].encoder, before["model"].encoder)
    assert all(jax.tree.leaves(same))
    for name in ("item", "like"):
        np.testing.assert_array_equal(start["tables"][name], before["tables"][name])
        assert not np.array_equal(start["tables"][name], fresh["tables"][name])
    np.testing.assert_array_equal(start["model"].head.query.kernel[...], fresh["model"].head.query.kernel[...])
    assert int(start["step"]) == 0
    train.train(two_towers(log, train__warm_start=str(trained)), tmp_path / "fine")
    rows = {
        row["metric"]: row["value"] for row in record.read(tmp_path / "fine")["evaluations"] if row["slice"] == "all"
    }
    assert set(np.load(tmp_path / "fine/per_target_test.npz")) >= {"score/like", "label/like", "request", "user"}
    assert rows["pair_accuracy/like"] is not None and "nats" not in rows


def test_a_warm_start_counts_items_in_its_own_training_data(log, trained):
    fewer, before = {"data__users": 5}, init_state(build(tiny(log, train__warm_start=str(trained))))
    own = init_state(build(tiny(log, **fewer)))["tables"][FREQUENCY]
    found = init_state(build(tiny(log, **fewer, train__warm_start=str(trained))))["tables"]
    assert not np.array_equal(own, before["tables"][FREQUENCY])
    np.testing.assert_array_equal(found[FREQUENCY], own)
    np.testing.assert_array_equal(found["item"], before["tables"]["item"])


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [("nothing", {}, "no checkpoint there"), ("", {"model__width": 16}, "does not fit this config")],
)
def test_a_warm_start_that_cannot_be_is_one_line(where, changes, message, log, trained):
    with pytest.raises(ValueError, match=message):
        init_state(build(tiny(log, **changes, train__warm_start=str(trained / where))))


@pytest.mark.parametrize("form", ["collapsed", pytest.param("interleaved", marks=pytest.mark.slow)])
def test_features_of_users_are_a_prefix_that_everybody_sees(form, log, tmp_path):
    """A user column decides what is liked: with it as a prefix the very first target is foretold, without it not."""
    rng, made = np.random.default_rng(1), EventLog.open(log)
    taste = rng.integers(0, 2, USERS)
    events = dict(made.events) | {"like": np.repeat(taste, EVENTS).astype(np.int8)}
    write(dataclasses.replace(made, path=None, events=events, users={"taste": taste}), tmp_path / "log")
    tokens = {"collapsed": 1, "interleaved": 2}[form]
    changes = {"task__form": form, "task__heads": (("like", "binary"),), "task__next_item": 0.0, "train__epochs": 12.0}
    wide = {"loader__inputs": ("like", "users/taste"), "model__prefix": tokens}
    wide |= {"model__max_length": tokens * (EVENTS + 1)}
    config = tiny(tmp_path / "log", **changes, **wide)
    run = build(config)
    state, step = init_state(run), make_train_step(run)
    for i in range(run.steps):
        state, _ = step(state, place_batch(run.mesh, run.loader[i]))
    first = dataclasses.replace(
        run.views["train"], name="first", target_start=run.views["train"].start + 1, stop=run.views["train"].start + 2
    )
    rows, found = evaluate_feedback(run, state, first)
    assert len(found["row"]) == USERS
    value = {row["metric"]: row["value"] for row in rows}
    assert value["auc/like"] > 0.99
    with pytest.raises(ValueError, match=r"model\.prefix = 0"):
        build(tiny(tmp_path / "log", **changes, **wide | {"model__prefix": 0}))


def test_an_encoder_that_measures_from_the_end_of_a_history_is_not_trained_on_every_position(log, tmp_path):
    c = tiny(log).unlock()
    c.model_name = "stu"
    sizes = {"embed_dim": 8, "width": 8, "depth": 1, "heads": 1, "qk_dim": 8, "v_dim": 8, "max_length": EVENTS}
    rest = {"dropout": 0.0, "time_bias": False, "anchor": "request", "window": 0, "prefix": 0, "truncate_after": 0}
    c.model = ConfigDict(sizes | rest | {"truncate_to": 0, "truncate_row": 0, "dtype": "float32"})
    with pytest.raises(ValueError, match="from the end of a history"):
        train.train(c.lock(), tmp_path / "stu")


def test_an_undefined_metric_selects_nothing():
    c = argus_kuairand.get_config().unlock()
    c.train.update({"select": "auc/is_like max", "eval_every": 10})
    rows = [
        {"step": s, "metric": "auc/is_like", "slice": "all", "value": v} for s, v in ((10, None), (20, 0.7), (30, 0.6))
    ]
    assert training.selected(rows, c) == 20
    with pytest.raises(ValueError, match=r"train\.select"):
        training.selected(rows[:1], c)


def test_the_record_counts_the_flops_of_every_token(log):
    """Tokens of the form and of the prefix, by the encoder's own count."""
    run = build(tiny(log, task__form="interleaved", model__max_length=2 * EVENTS))
    found = costs(run, run.steps)["flops"]
    lengths = 2 * run.loader.lengths
    forward = sum(run.model.flops(run.model_config, int(n))["attention"] for n in lengths)
    epochs = run.steps * run.config.loader.batch_size / run.loader.num_rows
    assert found["attention"] == pytest.approx(3 * epochs * forward)
    assert found["head"] == pytest.approx(3 * epochs * run.loader.num_targets * run.task.head_flops(8))
