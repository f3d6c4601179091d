"""The split that a source made: each user in its part, who trains where there is no train part, and empty histories."""

import dataclasses

import numpy as np
import pytest

from recscale.data import splits, windows
from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.parts import parts
from recscale.reading import SPLITS

USERS = 60


def log_of(lengths: np.ndarray, part: np.ndarray) -> EventLog:
    """Events whose item is their own row + 1."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    events = {"item_id": np.arange(1, total + 1, dtype=np.int32)}
    return EventLog(offsets, events, {"item_id": Column("id")}, total, users={"part": part})


def mixed(*names: str) -> EventLog:
    """Users of these parts in no order, with 1 to 15 events."""
    rng = np.random.default_rng(0)
    return log_of(rng.integers(1, 16, USERS), rng.permutation(np.resize(np.array(names), USERS)))


def targets(log: EventLog, users: np.ndarray, skip: int = 1) -> list[int]:
    return [row for u in users for row in range(log.offsets[u] + skip, log.offsets[u + 1])]


def test_users_are_where_the_source_put_them():
    log = mixed("train", "val", "test")
    views = parts(log)
    for name, view in views.items():
        mine = np.flatnonzero(log.users["part"] == name)
        single = int((log.lengths[mine] == 1).sum())
        assert splits.target_rows(view).tolist() == targets(log, mine)
        assert view.name == name and view.user.dtype == np.int32
        assert dict(view.dropped) == {"first events (no history)": len(mine), "users without a target": single}
    other = parts(log, held_out=0.7, seed=5)  # nothing is held out
    assert all(np.array_equal(other[name].user, views[name].user) for name in views)
    assert SPLITS["parts"] is parts


def test_without_a_train_part_a_seeded_share_of_val_validates_and_the_rest_trains():
    log = mixed("val", "test")
    views, same, other = parts(log, held_out=0.2), parts(log, held_out=0.2), parts(log, held_out=0.2, seed=1)
    val, test = (np.flatnonzero(log.users["part"] == name) for name in ("val", "test"))
    train, held = (np.unique(views[name].user) for name in ("train", "val"))
    assert not set(train) & set(held)
    assert sorted([*splits.target_rows(views["train"]), *splits.target_rows(views["val"])]) == targets(log, val)
    assert splits.target_rows(views["test"]).tolist() == targets(log, test)
    assert views["train"].dropped["users of val held out (there is no train part)"] == 6 == round(0.2 * len(val))
    assert views["val"].dropped["users of val that train (there is no train part)"] == len(val) - 6
    assert views["val"].dropped["first events (no history)"] == 6
    assert np.array_equal(views["val"].user, same["val"].user) and not np.array_equal(
        held, np.unique(other["val"].user)
    )


def test_first_events_are_targets_of_empty_histories():
    log = mixed("train", "val", "test")
    for name, view in parts(log, first_events=True).items():
        mine = np.flatnonzero(log.users["part"] == name)
        assert splits.target_rows(view).tolist() == targets(log, mine, skip=0)
        assert not view.dropped and (view.start == view.target_start).sum() == len(mine)
        one_each = windows.prefixes(view, 4)
        splits.check_view(log, one_each)
        lengths = one_each.target_start - one_each.start
        assert lengths.tolist() == [min(k, 4) for u in mine for k in range(log.lengths[u])]


def test_the_first_event_is_an_example_of_its_own_in_evaluation():
    """Else the slot before it would move all events after it, which training has without."""
    log = mixed("train", "val", "test")
    for view in (parts(log, first_events=True)[name] for name in ("val", "test")):
        splits.check_view(log, view)
        empty = view.start == view.target_start
        assert (view.stop[empty] == view.start[empty] + 1).all()
        assert (view.start[~empty] + 1 == view.target_start[~empty]).all() and (~empty).any()


def test_evaluation_may_have_one_example_per_target():
    log = mixed("train", "val", "test")
    plain, cut = parts(log), parts(log, history=4)
    assert np.array_equal(cut["train"].start, plain["train"].start) and len(cut["train"]) == len(plain["train"])
    for name in ("val", "test"):
        assert np.array_equal(splits.target_rows(cut[name]), splits.target_rows(plain[name]))
        assert set(cut[name].stop - cut[name].target_start) == {1}
        assert set(cut[name].target_start - cut[name].start) == {1, 2, 3, 4}


def test_wrong_logs_and_arguments_are_refused():
    log = mixed("val", "test")
    with pytest.raises(EventLogError, match="no column users/part"):
        parts(dataclasses.replace(log, users={}))
    with pytest.raises(EventLogError, match=r"no user is in part test; found \['train', 'val'\]"):
        parts(mixed("train", "val"))
    for share in (0.0, 1.0, -0.5, 0.001, 0.999):
        with pytest.raises(EventLogError, match=f"held_out={share} of 30 val users"):
            parts(log, held_out=share)
    with pytest.raises(EventLogError, match="history=-1, expected 0"):
        parts(log, history=-1)
    lonely = log_of(np.array([5, 1, 5]), np.array(["train", "val", "test"]))
    with pytest.raises(EventLogError, match=r"val has no user with a target; dropped: .*'users without a target': 1"):
        parts(lonely)
