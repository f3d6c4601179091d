"""Which later event a position is trained on, and how old a vector is, against plain loops; and through a loader."""

import numpy as np
import pytest

from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.loading import Loader
from recscale.data.reach import Reach, draw_ahead, last_until, request_start
from recscale.data.splits import View

RNG = np.random.default_rng(0)
LENGTHS = np.array([30, 1, 25, 40])
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
TIMES = np.concatenate([np.cumsum(RNG.choice([0, 5, 50, 4000], n)) for n in LENGTHS]).astype(np.int64)
LIKE = (RNG.random(len(TIMES)) < 0.3).astype(np.int8)


def log() -> EventLog:
    events = {"item_id": np.arange(1, len(TIMES) + 1, dtype=np.int32), "timestamp": TIMES, "like": LIKE}
    columns = {"item_id": Column("id"), "timestamp": Column("time"), "like": Column("feedback", 2)}
    return EventLog(OFFSETS, events, columns, num_items=len(TIMES))


def view() -> View:
    user = np.array([0, 2, 3], np.int32)
    return View("train", user, OFFSETS[user], OFFSETS[user] + 1, OFFSETS[user + 1])


def test_the_newest_event_not_after_a_time():
    begin = np.repeat(OFFSETS[:-1], LENGTHS)
    last = np.arange(len(TIMES))
    for limit in (TIMES - 60, TIMES, TIMES - 10**9):
        found = last_until(TIMES, begin, last, limit)
        for first, here, at, row in zip(begin, last, limit, found, strict=True):
            fits = [r for r in range(first, here + 1) if TIMES[r] <= at]
            assert row == (fits[-1] if fits else first - 1)


@pytest.mark.parametrize("positive", [False, True])
def test_every_event_of_the_horizon_is_drawn_evenly_and_no_other(positive):
    stop = np.repeat(OFFSETS[1:], LENGTHS)
    here, horizon = np.arange(len(TIMES)), 4100
    counted = np.concatenate([[0], np.cumsum(LIKE)]) if positive else None
    draws = np.stack([draw_ahead(TIMES, counted, here, stop, horizon, (1, np.full(len(here), e))) for e in range(3000)])
    for row in range(len(TIMES)):
        ahead = [r for r in range(row + 1, stop[row]) if TIMES[r] <= TIMES[row] + horizon and (not positive or LIKE[r])]
        seen, counts = np.unique(draws[:, row], return_counts=True)
        assert set(seen) == (set(ahead) or {-1})
        expected = 3000 / max(len(ahead), 1)
        assert np.square(counts - expected).sum() / expected < 4 * len(counts) + 20


def test_a_loader_trains_on_events_of_the_horizon_and_changes_them_from_epoch_to_epoch():
    made = log()
    loader = Loader(made, view(), batch_size=3, length=64, layout="padded", reach=Reach(4100, "like"))
    epochs = [loader[i] for i in range(40)]
    seen = set()
    for batch in epochs:
        at = np.nonzero(batch["target"])
        here, there = batch["item_id"][at] - 1, batch["target"][at] - 1
        assert (there > here).all() and (TIMES[there] <= TIMES[here] + 4100).all() and LIKE[there].all()
        assert (np.searchsorted(OFFSETS, there, "right") == np.searchsorted(OFFSETS, here, "right")).all()
        seen |= set(zip(here.tolist(), there.tolist(), strict=True))
        np.testing.assert_array_equal(batch["query_timestamp"][at], TIMES[there] - TIMES[OFFSETS[:-1]].min())
    assert len(seen) > 1.5 * max((batch["target"] > 0).sum() for batch in epochs)
    for i in (0, 7):  # the same batch whenever it is read
        again = Loader(made, view(), batch_size=3, length=64, layout="padded", reach=Reach(4100, "like"))[i]
        assert all(np.array_equal(again[name], epochs[i][name]) for name in again)


@pytest.mark.parametrize("lag", [60, 0])
@pytest.mark.parametrize(("layout", "window", "length"), [("packed", "last", 48), ("padded", "random", 20)])
def test_lagged_slots_are_before_the_request_old_enough_and_as_new_as_that_allows(layout, window, length, lag):
    """With a lag of 0 too: the first event of a request is as old as the request, and of it."""
    gap = 100
    how = {"batch_size": 1, "length": length, "row_length": 96, "layout": layout, "window": window}
    loader = Loader(log(), view(), **how, reach=Reach(0, "", lag, gap))
    checked = 0
    for i in range(2 * loader.steps_per_epoch):
        batch = {name: values[0] for name, values in loader[i].items()}
        for slot in np.flatnonzero(batch["target"]):
            row = batch["target"][slot] - 1
            first = row
            begin = OFFSETS[np.searchsorted(OFFSETS, row, "right") - 1]
            while first > begin and TIMES[first] - TIMES[first - 1] <= gap:
                first -= 1
            oldest = batch["item_id"][slot - batch["positions"][slot]] - 1
            fits = [r for r in range(oldest, first) if TIMES[r] <= TIMES[first] - lag]
            lagged = batch["lagged"][slot]
            assert (batch["item_id"][lagged - 1] - 1 if lagged else None) == (fits[-1] if fits else None)
            assert batch["request"][slot] == 1 + first
            checked += 1
    assert checked > 90


def test_a_request_that_another_one_interrupts_begins_where_it_first_began():
    events = {"item_id": np.ones(7, np.int32), "request_id": np.array([5, 9, 5, 9, 3, 5, 5])}
    columns = {"item_id": Column("id"), "request_id": Column("extra")}
    made = EventLog(np.array([0, 5, 7]), events, columns, num_items=1)
    np.testing.assert_array_equal(request_start(made, 60), [0, 1, 0, 1, 4, 5, 5])


def test_what_cannot_be_is_refused():
    for wrong, message in (
        ({"horizon": -1}, "at least 0"),
        ({"lag": 5}, "request_gap"),
        ({"positive": "like"}, "horizon"),
    ):
        with pytest.raises(EventLogError, match=message):
            Reach(**wrong)
    for name in ("love", "timestamp"):
        with pytest.raises(EventLogError, match=rf"'{name}' is not a feedback column.*\['like'\]"):
            Reach(60, name).open(log())
