import dataclasses

import numpy as np
import pytest

from recscale.data import slices, splits, windows
from recscale.data.event_log import Column, EventLog, EventLogError

DAY = 86_400


def make_log(lengths: list[int], times: list[list[int]] | None = None, items: list[int] | None = None) -> EventLog:
    """Users of these lengths; item ids count all events from 1 unless given."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    events: dict[str, np.ndarray] = {"item_id": np.array(items or np.arange(1, offsets[-1] + 1), np.int32)}
    if times is not None:
        events["timestamp"] = np.concatenate([np.array(t, np.int64) for t in times])
    kinds = {"item_id": Column("id"), "timestamp": Column("time")}
    return EventLog(offsets, events, {n: kinds[n] for n in events}, num_items=int(events["item_id"].max()))


def random_timed_log(users: int = 200, seed: int = 0) -> EventLog:
    """Sorted times in 0..1000 with many ties, some users empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30, users)
    times = [(np.sort(rng.integers(0, 1000, n)) // 7 * 7).tolist() for n in lengths]
    return make_log(lengths.tolist(), times, rng.integers(1, 60, lengths.sum()).tolist())


def runs(view: splits.View) -> list[tuple[int, int, int, int]]:
    return list(zip(*(a.tolist() for a in (view.user, view.start, view.target_start, view.stop)), strict=True))


def test_leave_one_out_counts_what_it_drops():
    views = splits.leave_one_out(make_log([0, 1, 2, 3, 5]))
    assert runs(views["test"]) == [(2, 1, 2, 3), (3, 3, 5, 6), (4, 6, 10, 11)]
    assert runs(views["val"]) == [(3, 3, 4, 5), (4, 6, 9, 10)]
    assert runs(views["train"]) == [(4, 6, 7, 9)]
    assert dict(views["test"].dropped) == {"users without events": 1, "users without a target": 1}
    assert sum(views["train"].dropped.values()) == 4
    assert views["test"].user.dtype == np.int32 and views["test"].start.dtype == np.int64


def test_leave_one_out_without_validation_trains_on_the_second_last():
    views = splits.leave_one_out(make_log([5, 4]), validation=False)
    assert set(views) == {"train", "test"}
    assert runs(views["train"]) == [(0, 0, 1, 4), (1, 5, 6, 8)]


def test_leave_one_out_covers_every_transition_once():
    log = random_timed_log()
    rows = np.concatenate([splits.target_rows(v) for v in splits.leave_one_out(log).values()])
    short = log.offsets[:-1][log.lengths >= 2]
    expected = np.setdiff1d(np.arange(log.num_events), log.offsets[:-1][log.lengths >= 1])
    np.testing.assert_array_equal(np.sort(rows), expected)
    assert len(np.intersect1d(rows, short)) == 0


def test_ties_keep_the_order_of_the_log():
    log = make_log([4], times=[[5, 9, 9, 9]], items=[1, 7, 3, 5])
    views = splits.leave_one_out(log)
    assert log.events["item_id"][splits.target_rows(views["test"])].tolist() == [5]
    assert log.events["item_id"][splits.target_rows(views["val"])].tolist() == [3]


def test_by_user_evaluation_does_not_move_with_the_training_set():
    log = make_log([4] * 20)
    small, large = splits.by_user(log, train_users=3, eval_users=6), splits.by_user(log, train_users=14, eval_users=6)
    assert small["train"].user.tolist() == [0, 1, 2] and large["train"].user.tolist() == list(range(14))
    for name, users in (("val", [14, 15, 16]), ("test", [17, 18, 19])):
        assert small[name].user.tolist() == users
        assert runs(small[name]) == runs(large[name])
    assert runs(large["val"])[0] == (14, 56, 57, 60)
    assert small["train"].dropped["users of another side"] == 17


@pytest.mark.parametrize("train, held", [(15, 6), (0, 4), (3, 1)])
def test_by_user_refuses_too_many_users(train, held):
    with pytest.raises(EventLogError, match="the log has 20 users"):
        splits.by_user(make_log([4] * 20), train_users=train, eval_users=held)


def test_global_time_matches_brute_force():
    log = random_timed_log()
    views = splits.global_time(log, test_from=800, val_from=600, gap=20)
    times = log.events["timestamp"]
    user = np.repeat(np.arange(log.num_users), log.lengths)
    train_events = times < 580
    known = np.unique(user[train_events])
    inside = {"val": (times >= 600) & (times < 780), "test": times >= 800}
    for name, mask in inside.items():
        expected = np.flatnonzero(mask & np.isin(user, known))
        np.testing.assert_array_equal(splits.target_rows(views[name]), expected)
        assert (times[views[name].target_start - 1] < {"val": 600, "test": 800}[name]).all()
    first = np.isin(np.arange(log.num_events), log.offsets[:-1])
    np.testing.assert_array_equal(splits.target_rows(views["train"]), np.flatnonzero(train_events & ~first))


def test_yambda_boundaries():
    last, gap = 26_000_000, 1_800
    edges = [25_823_599, 25_823_600, 25_825_399, 25_825_400, 25_911_799, 25_911_800, 25_913_599, 25_913_600]
    log = make_log([10], times=[[1, 2, *edges]])
    with_val = splits.global_time(log, test_from=last - DAY, val_from=last - DAY - gap - DAY, gap=gap)
    assert log.events["timestamp"][with_val["train"].stop - 1].tolist() == [25_823_599]
    val = log.events["timestamp"][splits.target_rows(with_val["val"])]
    assert val.tolist() == [25_825_400, 25_911_799]
    assert log.events["timestamp"][splits.target_rows(with_val["test"])].tolist() == [25_913_600]
    without = splits.global_time(log, test_from=last - DAY, gap=gap)
    assert log.events["timestamp"][without["train"].stop - 1].tolist() == [25_911_799]
    assert set(without) == {"train", "test"}


def test_new_users_are_dropped_or_kept_with_their_first_event_as_history():
    log = make_log([3, 3, 3], times=[[1, 2, 12], [11, 12, 13], [3, 4, 5]])
    views = splits.global_time(log, test_from=10)
    assert runs(views["test"]) == [(0, 0, 2, 3)]
    assert views["test"].dropped == {"users without a target": 1, "users without training history": 1}
    kept = splits.global_time(log, test_from=10, keep_new_users=True)
    assert runs(kept["test"]) == [(0, 0, 2, 3), (1, 3, 4, 6)]
    masks = slices.new_users(log, kept["test"], kept["train"])
    assert masks["new_users"].tolist() == [False, True] and masks["known_users"].tolist() == [True, False]


def test_unseen_items_are_dropped_without_losing_the_targets_around_them():
    log = make_log([8, 3], times=[[1, 2, 3, 11, 12, 13, 14, 15], [1, 2, 12]], items=[1, 2, 3, 2, 9, 1, 3, 8, 3, 2, 9])
    keep = splits.global_time(log, test_from=10)["test"]
    assert runs(keep) == [(0, 0, 3, 8), (1, 8, 10, 11)]
    views = splits.global_time(log, test_from=10, keep_unseen_items=False)
    assert runs(views["test"]) == [(0, 0, 3, 4), (0, 0, 5, 7)]
    assert views["test"].dropped["targets of items without training events"] == 3
    assert slices.new_items(log, keep, views["train"])["new_items"].tolist() == [0, 1, 0, 0, 1, 1]


def test_rare_items_are_sliced_by_their_training_events():
    often = [1] * 101 + [2] * 100 + [3] * 21 + [4] * 20 + [5] * 6 + [6] * 5 + [7]
    targets = [1, 2, 3, 4, 5, 6, 7, 8, 8]
    times = list(range(len(often))) + [1_000 + i for i in range(len(targets))]
    log = make_log([len(times)], times=[times], items=often + targets)
    views = splits.global_time(log, test_from=1_000)
    masks = slices.tail(log, views["test"], views["train"])
    found = {name: np.asarray(targets)[mask].tolist() for name, mask in masks.items()}
    assert found == {"tail_1_5": [6, 7], "tail_6_20": [4, 5], "tail_21_100": [2, 3], "tail_101_up": [1]}
    new = slices.new_items(log, views["test"], views["train"])["new_items"]
    assert (sum(mask.astype(int) for mask in masks.values()) + new == 1).all()  # every target in one slice


def test_counts_of_tail_slices_match_brute_force():
    log = random_timed_log(seed=7)
    views = splits.global_time(log, test_from=300)
    items, rows = np.asarray(log.events["item_id"]), splits.target_rows(views["test"])
    trained = np.concatenate([items[a:b] for a, b in zip(views["train"].start, views["train"].stop, strict=True)])
    count = np.array([(trained == item).sum() for item in items[rows]])
    masks = slices.tail(log, views["test"], views["train"])
    np.testing.assert_array_equal(masks["tail_1_5"], (count >= 1) & (count <= 5))
    np.testing.assert_array_equal(masks["tail_6_20"], (count >= 6) & (count <= 20))
    assert masks["tail_1_5"].any() or masks["tail_6_20"].any()


def test_unseen_items_match_brute_force():
    log = random_timed_log(seed=5)
    views = splits.global_time(log, test_from=300, keep_unseen_items=False)
    times, items = log.events["timestamp"], log.events["item_id"]
    all_targets = splits.target_rows(splits.global_time(log, test_from=300)["test"])
    expected = all_targets[np.isin(items[all_targets], items[times < 300])]
    assert len(expected) > 0
    np.testing.assert_array_equal(splits.target_rows(views["test"]), expected)


@pytest.mark.parametrize("keep_new_users", [False, True])
def test_days_match_brute_force(keep_new_users: bool):
    log = random_timed_log()
    times = log.events["timestamp"] * (DAY // 100)  # 1,000 units are ten days
    log = dataclasses.replace(log, events={**log.events, "timestamp": times})
    views = splits.daily(log, 6 * DAY, 3, gap=DAY // 10, val_from=5 * DAY, keep_new_users=keep_new_users)
    assert list(views) == ["train", "val", "day1", "day2", "day3"]
    user = np.repeat(np.arange(log.num_users), log.lengths)
    known = np.isin(user, np.unique(user[times < 5 * DAY - DAY // 10]))
    first = np.isin(np.arange(log.num_events), log.offsets[:-1])
    for day in (1, 2, 3):
        view = views[f"day{day}"]
        inside = (times >= (5 + day) * DAY) & (times < (6 + day) * DAY)
        expected = np.flatnonzero(inside & (~first if keep_new_users else known))
        assert len(expected) > 100
        np.testing.assert_array_equal(splits.target_rows(view), expected)
        np.testing.assert_array_equal(view.start, log.offsets[view.user])  # all the past, earlier days too
    whole = splits.global_time(log, 6 * DAY, 5 * DAY, DAY // 10, keep_new_users=keep_new_users)
    assert runs(views["train"]) == runs(whole["train"]) and runs(views["val"]) == runs(whole["val"])


def test_days_have_sharp_edges_and_no_leak():
    log = make_log([7], times=[[0, 1, DAY - 1, DAY, 2 * DAY - 1, 2 * DAY, 9 * DAY]])
    views = splits.daily(log, test_from=DAY, days=2)
    assert runs(views["train"]) == [(0, 0, 1, 3)]
    assert runs(views["day1"]) == [(0, 0, 3, 5)] and runs(views["day2"]) == [(0, 0, 5, 6)]
    longer = dataclasses.replace(views["day1"], stop=views["day1"].stop + 1)
    with pytest.raises(EventLogError, match="'day1' reads events that are targets of 'day2'"):
        splits.check_no_leak(log, {**views, "day1": longer})
    with pytest.raises(EventLogError, match="days=0"):
        splits.daily(log, test_from=DAY, days=0)
    with pytest.raises(EventLogError, match="day3 has no example"):
        splits.daily(log, test_from=DAY, days=3)


def test_next_window_reads_all_targets_at_once():
    log = make_log([6, 3, 2], times=[[1, 5, 10, 14, 15, 21], [12, 13, 30], [1, 2]])
    views = splits.next_window(log, at=10, window=5)
    assert runs(views["test"]) == [(0, 0, 2, 4)]
    assert views["test"].reading == "window" and views["train"].reading == "next_item"
    assert views["test"].dropped["users without training history"] == 1
    assert runs(views["train"]) == [(0, 0, 1, 2), (2, 9, 10, 11)]
    with_val = splits.next_window(log, at=15, window=5, val_at=10)
    assert runs(with_val["val"]) == [(0, 0, 2, 4)] and runs(with_val["test"]) == [(0, 0, 4, 5)]
    assert runs(with_val["train"]) == runs(views["train"])


def test_wrong_times_are_refused():
    with pytest.raises(EventLogError, match="'timestamp' is missing"):
        splits.global_time(make_log([3]), test_from=2)
    with pytest.raises(EventLogError, match="event 2 is earlier"):
        splits.global_time(make_log([3], times=[[1, 9, 3]]), test_from=5)
    timed = make_log([3], times=[[1, 2, 3]])
    with pytest.raises(EventLogError, match="val_from=9"):
        splits.global_time(timed, test_from=10, val_from=9, gap=2)
    with pytest.raises(EventLogError, match="test has no example"):
        splits.global_time(timed, test_from=100)
    with pytest.raises(EventLogError, match="window >= 1"):
        splits.next_window(timed, at=2, window=0)


def test_a_leak_is_found():
    log = make_log([6, 6], times=[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 15, 16]])
    views = splits.leave_one_out(log)
    longer = dataclasses.replace(views["train"], stop=views["train"].stop + np.array([0, 1]))
    with pytest.raises(EventLogError, match=r"'train' reads events that are targets of 'val', the first is user 1"):
        splits.check_no_leak(log, {**views, "train": longer})
    with pytest.raises(EventLogError, match=r"'val' reads events that are targets of 'test'"):
        splits.check_no_leak(log, {"val": dataclasses.replace(views["test"], name="val"), "test": views["test"]})
    with pytest.raises(EventLogError, match="reads time 15"):
        splits.check_no_leak(log, views, by_time=True)


def test_check_view_names_the_wrong_example():
    log = make_log([4, 4])
    view = splits.leave_one_out(log)["test"]
    with pytest.raises(EventLogError, match="made from another log"):
        splits.check_view(make_log([4]), view)
    with pytest.raises(EventLogError, match="made from another log"):
        splits.check_view(make_log([3, 5]), view)
    with pytest.raises(EventLogError, match="start < target_start < stop"):
        splits.check_view(log, dataclasses.replace(view, target_start=view.start))


def test_limit_users_is_nested_and_seeded():
    view = splits.leave_one_out(make_log([5] * 300))["train"]
    small, large = splits.limit_users(view, 100, seed=1), splits.limit_users(view, 200, seed=1)
    assert len(small) == 100 and len(large) == 200
    assert set(small.user) < set(large.user)
    assert set(small.user) != set(splits.limit_users(view, 100, seed=2).user)
    assert small.dropped["users over the limit"] == 200
    assert runs(splits.limit_users(view, 1000)) == runs(view)
    assert runs(small) == [r for r in runs(view) if r[0] in set(small.user)]


def test_limit_events_keeps_the_last():
    view = splits.by_user(make_log([10, 3, 10, 10]), train_users=2, eval_users=2)["train"]
    limited = splits.limit_events(view, 4)
    assert runs(limited) == [(0, 6, 7, 10), (1, 10, 11, 13)]
    assert limited.dropped["events over the limit"] == 6
    with pytest.raises(EventLogError, match="at least 2"):
        splits.limit_events(view, 1)


def test_history_slices_partition_the_examples():
    log = make_log([2, 5, 6, 11, 300])
    views = splits.leave_one_out(log)
    masks = slices.history(log, views["test"], views["train"])
    assert masks["history_1_4"].tolist() == [True, True, False, False, False]
    assert masks["history_5_9"].tolist() == [False, False, True, False, False]
    assert masks["history_200_up"].tolist() == [False, False, False, False, True]
    np.testing.assert_array_equal(np.sum(list(masks.values()), axis=0), 1)


def test_masks_expand_from_examples_to_targets():
    views = splits.by_user(make_log([4, 3, 4, 3]), train_users=1, eval_users=2)
    assert splits.target_example(views["val"]).tolist() == [0, 0, 0]
    assert splits.target_rows(views["test"]).tolist() == [12, 13]


def test_every_split_is_in_the_table():
    assert set(splits.SPLITS) == {"leave_one_out", "by_user", "global_time", "daily", "next_window"}
    assert splits.SPLITS["leave_one_out"] is splits.leave_one_out


def test_leave_one_out_with_few_validation_users():
    log = make_log([2, 3, 4, 5, 6, 7, 8, 9])
    views = splits.leave_one_out(log, validation_users=3, seed=1)
    val = set(views["val"].user.tolist())
    assert len(val) <= 3 and len(val) == len(views["val"])
    stop = dict(zip(views["train"].user.tolist(), views["train"].stop.tolist(), strict=True))
    for user in stop:
        validates = user in val
        assert stop[user] == log.offsets[user + 1] - (2 if validates else 1)
    assert val == set(splits.leave_one_out(log, validation_users=3, seed=1)["val"].user.tolist())
    with pytest.raises(EventLogError, match="validation_users=99"):
        splits.leave_one_out(log, validation_users=99)


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_windows_train_on_every_target_once(length):
    view = splits.leave_one_out(make_log([4, 5, 9, 17, 30]))["train"]
    cut = windows.in_windows(view, length)
    np.testing.assert_array_equal(np.sort(splits.target_rows(cut)), np.sort(splits.target_rows(view)))
    assert (cut.stop - 1 - cut.start).max() <= length
    with pytest.raises(EventLogError, match="length=0"):
        windows.in_windows(view, 0)


def test_held_out_users_with_few_targets():
    log = make_log([5, 6, 7, 8, 9])
    views = splits.by_user(log, 1, 4, eval_targets=2)
    assert set((views["test"].stop - views["test"].target_start).tolist()) == {2}
    assert (views["train"].target_start == views["train"].start + 1).all()
