"""Items of the test that training never sees."""

import numpy as np
import pytest

from recscale.data import splits
from recscale.data.cold_start import cold_start, without_items
from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.slices import new_items

ITEMS = 30


@pytest.fixture(scope="module")
def log() -> EventLog:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = {"item_id": rng.integers(1, ITEMS + 1, int(offsets[-1])).astype(np.int32)}
    return EventLog(offsets, events, {"item_id": Column("id", ITEMS + 1)}, ITEMS)


def test_training_has_no_event_of_a_removed_item_and_every_other_transition_once(log):
    views, plain = cold_start(log, 0.2, seed=1), splits.leave_one_out(log)
    items, train = log.events["item_id"], views["train"]
    splits.check_view(log, train)
    seen = splits.items_of(log, train.start, train.stop)
    removed = [i for i in range(1, ITEMS + 1) if not seen[i]]
    assert len(removed) == round(0.2 * len(np.unique(items[splits.target_rows(views["test"])])))
    expected = [  # a transition stays where neither of its two items is removed
        row
        for start, stop in zip(plain["train"].start, plain["train"].stop, strict=True)
        for row in range(start + 1, stop)
        if not {items[row], items[row - 1]} & set(removed)
    ]
    assert sorted(splits.target_rows(train)) == expected
    assert train.dropped["targets cut out"] == len(splits.target_rows(plain["train"])) - len(expected)
    for name in ("val", "test"):
        np.testing.assert_array_equal(views[name].target_start, plain[name].target_start)
    cold = new_items(log, views["test"], train)["new_items"]
    np.testing.assert_array_equal(cold, np.isin(items[splits.target_rows(views["test"])], removed))


def test_targets_that_were_history_only_stay_history_only(log):
    view = splits.leave_one_out(log)["test"]
    cut = without_items(log, view, np.array([1, 2]))
    assert (cut.stop - cut.target_start == 1).all() and set(cut.target_start) <= set(view.target_start)
    assert not np.isin(log.events["item_id"][splits.target_rows(cut)], [1, 2]).any()


def test_the_same_seed_removes_the_same_items_and_another_does_not(log):
    a, b, c = (cold_start(log, 0.2, seed=s)["train"] for s in (1, 1, 2))
    assert np.array_equal(a.start, b.start) and not np.array_equal(a.start, c.start)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_that_is_none_is_refused(log, share):
    with pytest.raises(EventLogError, match=f"share={share}, expected a number between 0 and 1"):
        cold_start(log, share)
