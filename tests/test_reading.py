"""Settings that would leak, learn nothing or be ignored are refused, in one line that names them."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import argus_kuairand
from recscale import reading
from recscale.data.codes import item_counts
from recscale.data.event_log import Column, EventLog
from recscale.program import task_of

EVENTS = 12


def log() -> EventLog:
    events = {
        "item_id": np.arange(1, EVENTS + 1, dtype=np.int32),
        "timestamp": np.arange(EVENTS, dtype=np.int64),
        "tab": np.ones(EVENTS, np.int32),
        "like": (np.arange(EVENTS) % 2).astype(np.int8),
        "stars": (np.arange(EVENTS) % 5).astype(np.int8),
        "ratio": np.linspace(0, 2, EVENTS, dtype=np.float32),
        "holes": np.where(np.arange(EVENTS) == 7, np.nan, 1.0).astype(np.float32),
        "change": np.linspace(-0.5, 0.5, EVENTS, dtype=np.float32),
    }
    columns = {"item_id": Column("id"), "timestamp": Column("time"), "tab": Column("context", 2)}
    columns |= {"like": Column("feedback", 2), "stars": Column("feedback", 5)}
    columns |= {name: Column("feedback") for name in ("ratio", "holes", "change")}
    return EventLog(np.array([0, 6, EVENTS]), events, columns, num_items=EVENTS)


def config(task_name: str = "feedback", **changes) -> ConfigDict:
    c = argus_kuairand.get_config().unlock()
    c.split = ConfigDict({"name": "leave_one_out"})
    c.loader.update({"inputs": ("like",), "queries": (), "length": 4})
    c.task.update({"heads": (("like", "binary"),), "edges": (0.5, 1.5)})
    c.task_name = task_name
    if task_name == "two_tower":
        c.task = ConfigDict({"label": "like", "reach": 8, "similarity": "dot", "temperature": 1.0})
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c.lock()


@pytest.mark.parametrize(
    ("task_name", "changes", "message"),
    [
        ("feedback", {"loader__queries": ("like",)}, "'like' is not a context column"),
        ("feedback", {"loader__horizon": 60, "loader__queries": ("tab",)}, r"loader\.horizon = 60 .* loader\.queries"),
        ("feedback", {"loader__horizon": 60, "model__query_time": "next_event"}, "query_time"),
        ("feedback", {"loader__horizon": 60, "task__form": "interleaved"}, r"horizon = 60 with task\.form = 'interl"),
        ("feedback", {"loader__positive": "like"}, r"loader\.positive = 'like'.*horizon"),
        ("feedback", {"loader__lag": 60}, r"loader\.lag = 60 .*request_gap"),
        ("feedback", {"loader__request_gap": 60, "task__form": "interleaved"}, "only collapsed tokens"),
        ("two_tower", {}, r"two_tower.*set loader\.request_gap"),
        ("two_tower", {"loader__request_gap": 60, "loader__queries": ("tab",)}, "reads no context"),
        ("next_item", {"loader__request_gap": 60}, "request_gap = 60: task 'next_item'"),
    ],
)
def test_a_loader_that_leaks_or_that_nothing_reads_is_refused(task_name, changes, message):
    with pytest.raises(ValueError, match=message):
        reading.cardinalities(config(task_name, **changes), log())


@pytest.mark.parametrize(
    ("task_name", "changes"),
    [
        ("feedback", {"loader__horizon": 60, "loader__positive": "like"}),
        ("feedback", {"loader__lag": 60, "loader__request_gap": 60}),
        ("feedback", {"task__form": "interleaved"}),
        ("two_tower", {"loader__request_gap": 60}),
    ],
)
def test_settings_that_fit_are_read(task_name, changes):
    made = config(task_name, **changes)
    assert reading.cardinalities(made, log()) == {"like": 3}
    loader = reading.train_loader(made, task_of(made, EVENTS), log(), reading.views(made, log())["train"])
    assert loader[0]["label_like"].max() == 1.0


@pytest.mark.parametrize(("window", "examples"), [("last", 2), ("all", 4), ("prefixes", 6)])
def test_examples_cut_anew_for_training_count_no_event_twice(window, examples):
    """Two users with three training targets each, at most two inputs an example."""
    made = config(loader__window=window, loader__length=2)
    view = reading.views(made, log())["train"]
    assert len(reading.train_loader(made, task_of(made, EVENTS), log(), view).lengths) == examples
    np.testing.assert_array_equal(item_counts(log(), view), [0, *[1, 1, 1, 1, 0, 0] * 2])


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("love", "binary", "'love' .* is not a feedback column .*'like', 'stars'"),
        ("tab", "binary", "'tab' .* is not a feedback column"),
        ("stars", "binary", "'stars' .* is 2 at event 2.*0 or 1"),
        ("holes", "binary", "nan at event 7"),
        ("holes", "ordinal", "nan at event 7.*finite"),
        ("holes", "regression", "nan at event 7"),
        ("change", "regression", r"-0\.5 at event 0.*at least 0"),
        ("like", "ordinal", "expected 'binary'"),
    ],
)
def test_a_head_over_what_it_cannot_learn_is_refused_before_training(column, kind, message, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 5)
    made = config(task__heads=((column, kind),))
    with pytest.raises(ValueError, match=message):
        reading.train_loader(made, task_of(made, EVENTS), log(), reading.views(made, log())["train"])


@pytest.mark.parametrize(("column", "message"), [("holes", "'score' expects"), ("tab", "not a feedback column")])
def test_so_is_such_a_label_of_two_towers(column, message):
    made = config("two_tower", loader__request_gap=60, task__label=column)
    with pytest.raises(ValueError, match=message):
        reading.check_labels(task_of(made, EVENTS), log())


@pytest.mark.parametrize(("column", "kind"), [("stars", "ordinal"), ("ratio", "regression"), ("change", "ordinal")])
def test_a_head_over_its_own_kind_of_values_is_none_of_that(column, kind):
    reading.check_labels(task_of(config(task__heads=((column, kind),)), EVENTS), log())
