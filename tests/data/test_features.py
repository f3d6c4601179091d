"""Features by name: ids from 1, 0 for what is not known, and which may describe a query."""

import numpy as np
import pytest

from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.features import EDGES, available, known_before, open_feature

DAY = 86_400


def log() -> EventLog:
    events = {
        "item_id": np.array([1, 3, 2, 1], np.int32),
        "timestamp": np.array([0, 3_600, DAY + 5, 7 * DAY + 23 * 3_600]),
        "like": np.array([0, 1, 1, 0], np.int8),
        "ratio": np.array([0.0, 0.5, np.nan, 9.0], np.float32),
        "tab": np.array([0, 2, 1, 2], np.int32),
        "noise": np.zeros(4, np.int32),
    }
    columns = {
        "item_id": Column("id"), "timestamp": Column("time"), "like": Column("feedback", 2),
        "ratio": Column("feedback"),
        "tab": Column("context", 3),
        "noise": Column("extra"),
    }  # fmt: skip
    items = {
        "author": np.array([0, 900, 70, 900]),
        "length": np.array([0.0, 3.0, 1.0, np.nan]),
        "vector": np.zeros((4, 2)),
    }
    return EventLog(np.array([0, 4]), events, columns, num_items=3, items=items)


@pytest.mark.parametrize(
    ("name", "ids", "cardinality"),
    [
        ("tab", [0, 2, 1, 2], 3),
        ("like", [1, 2, 2, 1], 3),
        ("ratio", [1, 1 + int((EDGES <= 0.5).sum()), 0, len(EDGES) + 1], len(EDGES) + 2),
        ("items/author", [2, 2, 1, 2], 3),
        ("hour", [1, 2, 1, 24], 25),
        ("weekday", [1, 1, 2, 1], 8),
        ("item_id", [1, 3, 2, 1], 4),
    ],
)
def test_ids_of_a_feature(name, ids, cardinality):
    feature = open_feature(log(), name)
    found = feature.read(np.arange(4))
    assert found.tolist() == ids and found.dtype == np.int32 and feature.cardinality == cardinality


def test_floats_of_items_become_deciles_and_nan_unknown():
    feature = open_feature(log(), "items/length")
    first, third, second, again = feature.read(np.arange(4))
    assert third == 0 and 0 < second < first == again < feature.cardinality


def test_only_contexts_and_the_clock_are_known_before_an_item():
    made = log()
    assert {name for name in (*available(made), "item_id", "noise") if known_before(made, name)} == {
        "tab",
        "hour",
        "weekday",
    }


@pytest.mark.parametrize("name", ["noise", "likes", "items/vector", "items/artist", "timestamp"])
def test_what_is_no_feature_is_refused_with_a_list_of_those_there_are(name):
    with pytest.raises(EventLogError, match=rf"feature '{name}'.*'items/author'"):
        open_feature(log(), name)


def test_users_have_features_of_their_own():
    made = log()
    made = type(made)(**vars(made) | {"users": {"age": np.array([30])}})
    feature = open_feature(made, "users/age")
    assert feature.read(np.array([0])).tolist() == [1] and feature.cardinality == 2
    assert not known_before(made, "users/age")
