"""Requests by column, by silence and by a context column; rows that a source holds twice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.prepare import prepare
from recscale.data.requests import GAP, repeats, request_ids

TIMES = [0, 10, 10, 100, 5, 100, 131, 132]
TABS = [1, 1, 2, 2, 2, 2, 1, 1]
USERS = [0, 4, 4, 8]  # offsets: the middle user has no events


def make_log(**columns: list[int]) -> EventLog:
    events = {"item_id": np.array([1, 2, 2, 3, 3, 3, 1, 1], np.int32)}
    events |= {name: np.array(values, np.int64 if name != "tab" else np.int32) for name, values in columns.items()}
    return EventLog(np.array(USERS), events, {name: Column("extra") for name in events}, num_items=3)


def random_log(seed: int = 0) -> EventLog:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 20, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    time = np.concatenate([np.sort(rng.integers(0, 3000, n)) for n in lengths])
    events = {"item_id": rng.integers(1, 4, len(time)).astype(np.int32), "timestamp": time}
    events |= {"tab": rng.integers(0, 3, len(time)), "request_id": rng.integers(-3, 9, len(time))}
    return EventLog(offsets, events, {name: Column("extra") for name in events}, num_items=3)


def without(log: EventLog, name: str) -> EventLog:
    events = {n: values for n, values in log.events.items() if n != name}
    return EventLog(log.offsets, events, {n: log.columns[n] for n in events}, log.num_items)


@pytest.mark.parametrize(
    ("gap", "same", "want"),
    [
        (30, None, [0, 0, 0, 1, 2, 3, 4, 4]),
        (31, None, [0, 0, 0, 1, 2, 3, 3, 3]),
        (0, None, [0, 1, 1, 2, 3, 4, 5, 6]),
        (30, "tab", [0, 0, 1, 2, 3, 4, 5, 5]),
        (GAP, None, [0, 0, 0, 0, 1, 1, 1, 1]),
        (GAP, "tab", [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_silence_and_a_new_tab_open_a_request(gap: int, same: str | None, want: list[int]):
    assert request_ids(make_log(timestamp=TIMES, tab=TABS), gap, same).tolist() == want


def test_sessions_equal_a_loop():
    log = without(random_log(), "request_id")
    want, number, last = [], -1, {}
    user = np.repeat(np.arange(log.num_users), log.lengths)
    for u, time, tab in zip(user, log.events["timestamp"], log.events["tab"], strict=True):
        if u not in last or time - last[u][0] > 120 or tab != last[u][1]:
            number += 1
        last[u] = time, tab
        want.append(number)
    assert request_ids(log, 120, "tab").tolist() == want


def test_a_column_of_requests_goes_first_and_is_of_one_user():
    log = make_log(timestamp=TIMES, request_id=[9, -4, 9, 9, 9, 7, 7, 8])
    assert request_ids(log, gap=0).tolist() == [0, 1, 0, 0, 2, 3, 3, 4]
    many = random_log()
    ids = request_ids(many)
    user = np.repeat(np.arange(many.num_users), many.lengths)
    pairs = list(zip(user.tolist(), many.events["request_id"].tolist(), strict=True))
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    assert ids.tolist() == [numbers[pair] for pair in pairs]


def test_repeats_are_the_event_before_again():
    log = make_log(timestamp=[0, 10, 10, 10, 10, 10, 20, 20])
    assert repeats(log).tolist() == [False, False, True, False, False, True, False, True]
    fine = make_log(timestamp=[0, 10, 10, 10, 10, 10, 20, 20], time_ms=[0, 1, 2, 3, 3, 3, 4, 5])
    assert repeats(fine).tolist() == [False, False, False, False, False, True, False, False]


def test_wrong_requests_are_named():
    with pytest.raises(EventLogError, match="'timestamp' is missing"):
        request_ids(make_log())
    with pytest.raises(EventLogError, match="'device' is missing"):
        request_ids(make_log(timestamp=TIMES), same="device")
    with pytest.raises(EventLogError, match="gap=-1"):
        request_ids(make_log(timestamp=TIMES), gap=-1)
    with pytest.raises(EventLogError, match="'timestamp' is missing"):
        repeats(make_log())


def test_the_figures_said_of_kuairand_hold(recscale_data_file: Callable[[str], Path], tmp_path: Path):
    source = recscale_data_file("impressions/kuairand_pure_0425_0508.parquet").parent.parent
    log = prepare("kuairand-pure", tmp_path / "log", source=source)
    ids = request_ids(log)
    size, clicks = np.bincount(ids)[ids], np.bincount(ids, log.events["is_click"])[ids]
    assert (size > 1).mean() == pytest.approx(0.303, abs=0.001)
    assert ((clicks > 0) & (clicks < size)).mean() == pytest.approx(0.117, abs=0.001)
    assert repeats(log).sum() == log.facts["duplicate_rows"] == 5885
