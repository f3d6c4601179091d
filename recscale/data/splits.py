"""Which events are history and which are targets: leave-one-out, held-out users, global time, days, next window.

Every split keeps the order of the log, counts what it leaves out in `View.dropped` and asserts that nothing leaks.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from recscale.data.event_log import EventLog, EventLogError

DAY = 86_400


@dataclasses.dataclass(frozen=True)
class View:
    """One side of a split: N examples, each a run of one user's events.

    All arrays have shape [N]. user: int32 index of the user. start, stop: int64 rows of the log's event columns; the
    example may see no event outside start:stop. target_start: int64, start < target_start < stop; the targets are
    events target_start:stop, and an event before it is history only. Two ways to read the targets: `next_item` (each
    target is predicted from everything before it) and `window` (all are predicted at once from start:target_start).
    empty_history: start == target_start is allowed, the first target is then predicted from nothing. dropped: reason ->
    number of users or events left out.
    """

    name: str
    user: np.ndarray
    start: np.ndarray
    target_start: np.ndarray
    stop: np.ndarray
    reading: str = "next_item"
    empty_history: bool = False
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user)


def leave_one_out(log: EventLog, validation: bool = True, validation_users: int = 0, seed: int = 0) -> dict[str, View]:
    """The last event of every user is the test target, the one before it the validation target, the rest is training.

    Without `validation` there is no "val" and training keeps the second last event. validation_users: only this many
    users, drawn by `seed`, give their second last event to validation (0: all); training keeps that of the others. A
    user needs one event of history to be in a view: 2 events for test, 3 for val, 4 for train (3 if not validating).
    """
    begin, end = _ends(log)
    validating = np.full(log.num_users, validation)
    if validation and validation_users:
        if not 0 < validation_users <= log.num_users:
            raise EventLogError(
                f"leave_one_out: validation_users={validation_users} of {log.num_users} users in the log."
            )
        validating[np.random.default_rng(seed).permutation(log.num_users)[validation_users:]] = False
    views = {"train": _view("train", begin, begin + 1, end - 1 - validating)}
    if validation:
        val = _view("val", begin, end - 2, end - 1)
        chosen = validating[val.user]
        views["val"] = _select(val, chosen, "users that do not validate", int((~chosen).sum()))
    views["test"] = _view("test", begin, end - 1, end)
    return _checked(log, views)


def by_user(log: EventLog, train_users: int, eval_users: int, eval_targets: int = 0) -> dict[str, View]:
    """Held-out users: the first `train_users` train, the last `eval_users` are half val, half test (the very last).

    Every transition of a training user is a target; of an evaluation user the last `eval_targets` (0: all). With 1, a
    model that reads L events has all L of them behind every target. The evaluation users do not move when `train_users`
    changes. Raises EventLogError where the log has too few users.
    """
    if train_users < 1 or eval_users < 2 or train_users + eval_users > log.num_users:
        raise EventLogError(
            f"by_user: train_users={train_users}, eval_users={eval_users}, but the log has {log.num_users} users; "
            "expected train_users >= 1, eval_users >= 2 and a sum that fits."
        )
    begin, end = _ends(log)
    edges = {
        "train": (0, train_users),
        "val": (log.num_users - eval_users, log.num_users - eval_users // 2),
        "test": (log.num_users - eval_users // 2, log.num_users),
    }
    views = {
        name: _view(name, begin[a:b], begin[a:b] + 1, end[a:b], first_user=a, others=log.num_users - (b - a))
        for name, (a, b) in edges.items()
    }
    if eval_targets:
        for name in ("val", "test"):
            last = np.maximum(views[name].target_start, views[name].stop - eval_targets)
            views[name] = dataclasses.replace(views[name], target_start=last)
    return _checked(log, views)


def global_time(
    log: EventLog,
    test_from: int,
    val_from: int | None = None,
    gap: int = 0,
    keep_unseen_items: bool = True,
    keep_new_users: bool = False,
) -> dict[str, View]:
    """Cut all users at the same moments (seconds, the log's own clock), as in Yambda (arXiv 2505.22238).

    test targets: time >= test_from. With `val_from`: val targets in [val_from, test_from - gap), training before
    val_from - gap; without: no "val", training before test_from - gap. Events of a gap are nobody's target; they are
    history of the evaluation that follows, as is everything before a target. Users without a training event are dropped
    from val and test unless `keep_new_users`, which makes their first event history. With keep_unseen_items=False
    targets whose item has no training event are dropped; a user then has one example per run of kept targets.
    Raises EventLogError where times are missing, unsorted, or leave a side empty.
    """
    if gap < 0 or (val_from is not None and val_from >= test_from - gap):
        raise EventLogError(
            f"global_time: val_from={val_from}, test_from={test_from}, gap={gap}; "
            "expected gap >= 0 and val_from < test_from - gap."
        )
    begin, end = _ends(log)
    before_test, test = _first_at(log, test_from - gap), _first_at(log, test_from)
    sides = {"test": (test, end)}
    train_end = before_test
    if val_from is not None:
        train_end = _first_at(log, val_from - gap)
        sides = {"val": (_first_at(log, val_from), before_test), **sides}
    views = {"train": _view("train", begin, begin + 1, train_end)}
    for name, (first, last) in sides.items():
        view = _view(name, begin, first, last, known=train_end > begin, keep_new=keep_new_users)
        views[name] = view if keep_unseen_items else _seen_items_only(log, view, begin, train_end)
    return _checked(log, views, by_time=True)


def daily(
    log: EventLog,
    test_from: int,
    days: int,
    gap: int = 0,
    val_from: int | None = None,
    keep_new_users: bool = False,
) -> dict[str, View]:
    """Train once, evaluate day by day: "train" (and "val") as in `global_time`, then "day1" .. "day{days}".

    Targets of day i: time in [test_from + (i - 1) days, test_from + i days), days of 86,400 seconds on the log's own
    clock. Everything before a target is its history, earlier test days too: the model stays as it was trained, what it
    reads grows. Users without a training event are dropped from every day unless `keep_new_users`, which makes their
    first event history (so their first day loses it as a target). Raises EventLogError as `global_time` does.
    """
    if days < 1:
        raise EventLogError(f"daily: days={days}, expected at least 1.")
    views = global_time(log, test_from, val_from, gap, keep_new_users=keep_new_users)
    del views["test"]
    begin, _ = _ends(log)
    known = _first_at(log, (test_from if val_from is None else val_from) - gap) > begin
    first = _first_at(log, test_from)
    for day in range(1, days + 1):
        last = _first_at(log, test_from + day * DAY)
        views[f"day{day}"] = _view(f"day{day}", begin, first, last, known=known, keep_new=keep_new_users)
        first = last
    return _checked(log, views, by_time=True)


def next_window(log: EventLog, at: int, window: int, val_at: int | None = None) -> dict[str, View]:
    """Targets are all events in [at, at + window) at once, predicted from what came before (reading "window").

    at, window: seconds on the log's own clock. Training is next_item before `at`, or before `val_at` where there is a
    validation window [val_at, val_at + window). Users without an event before the window are dropped from it.
    """
    if window < 1 or (val_at is not None and val_at + window > at):
        raise EventLogError(
            f"next_window: at={at}, window={window}, val_at={val_at}; expected window >= 1 and val_at + window <= at."
        )
    begin, _ = _ends(log)
    train_end = _first_at(log, at if val_at is None else val_at)
    views = {"train": _view("train", begin, begin + 1, train_end)}
    for name, time in (("val", val_at), ("test", at)):
        if time is not None:
            first, last = _first_at(log, time), _first_at(log, time + window)
            view = _view(name, begin, first, last, known=train_end > begin)
            views[name] = dataclasses.replace(view, reading="window")
    return _checked(log, views, by_time=True)


SPLITS = {
    "leave_one_out": leave_one_out,
    "by_user": by_user,
    "global_time": global_time,
    "daily": daily,
    "next_window": next_window,
}


def limit_users(view: View, n: int, seed: int = 0) -> View:
    """The view's first `n` users in a seeded order: n = 100 is a subset of n = 200; all of them where n is larger."""
    if n < 1:
        raise EventLogError(f"limit_users: n={n}, expected at least 1.")
    users = np.unique(view.user)
    kept = np.random.default_rng(seed).permutation(users)[:n]
    return _select(view, np.isin(view.user, kept), "users over the limit", max(0, len(users) - n))


def limit_events(view: View, n: int) -> View:
    """The last `n` events of each example (n >= 2: one of them is history), for a smaller training log."""
    if n < 2:
        raise EventLogError(f"limit_events: n={n}, expected at least 2: one event of history and one target.")
    start = np.maximum(view.start, view.stop - n)
    target_start = np.maximum(view.target_start, start + (start > view.start))
    dropped = {**view.dropped, "events over the limit": int((start - view.start).sum())}
    return dataclasses.replace(view, start=start, target_start=target_start, dropped=dropped)


def check_view(log: EventLog, view: View) -> None:
    """Raise EventLogError where a view does not belong to this log or an example is not start < target_start < stop."""
    arrays = (view.user, view.start, view.target_start, view.stop)
    if any(a.shape != (len(view),) for a in arrays) or view.reading not in ("next_item", "window"):
        raise EventLogError(f"view {view.name!r}: arrays must all be [{len(view)}] and reading next_item or window.")
    if not len(view):
        return
    if view.user.min() < 0 or view.user.max() >= log.num_users:
        raise EventLogError(
            f"view {view.name!r}: users {view.user.min()}..{view.user.max()}, but the log has {log.num_users} users: "
            "this view was made from another log."
        )
    outside = (view.start < log.offsets[view.user]) | (view.stop > log.offsets[view.user.astype(np.int64) + 1])
    if outside.any():
        raise EventLogError(
            f"view {view.name!r}: {outside.sum()} examples reach outside their user's events, the first is "
            f"{int(outside.argmax())}: this view was made from another log."
        )
    wrong = (view.start + (not view.empty_history) > view.target_start) | (view.target_start >= view.stop)
    if wrong.any():
        raise EventLogError(
            f"view {view.name!r}: {wrong.sum()} examples lack history or a target, the first is {int(wrong.argmax())}; "
            "expected start < target_start < stop."
        )


def check_no_leak(log: EventLog, views: Mapping[str, View], by_time: bool = False) -> None:
    """Raise EventLogError where a side reads a target of a later one (train, val, test; train, val, day1, day2, ...).

    by_time: also where a side reads anything, of any user, that is not earlier than every target of a later one.
    """
    for view in views.values():
        check_view(log, view)
    days = sorted((name for name in views if name.startswith("day")), key=lambda name: int(name.removeprefix("day")))
    order = [views[name] for name in ("train", "val", "test", *days) if name in views]
    for i, earlier in enumerate(order):
        for later in order[i + 1 :]:
            seen_until, first_target = np.zeros(log.num_users, np.int64), np.full(log.num_users, log.num_events + 1)
            np.maximum.at(seen_until, earlier.user, earlier.stop)
            np.minimum.at(first_target, later.user, later.target_start)
            leaks = seen_until > first_target
            if leaks.any():
                raise EventLogError(
                    f"{leaks.sum()} users leak: view {earlier.name!r} reads events that are targets of {later.name!r}, "
                    f"the first is user {int(leaks.argmax())}."
                )
            if by_time:
                _check_times(log, earlier, later)


def _check_times(log: EventLog, earlier: View, later: View) -> None:
    times = log.events["timestamp"]
    latest, first = times[earlier.stop - 1].max(), times[later.target_start].min()
    if latest >= first:
        raise EventLogError(
            f"leak: view {earlier.name!r} reads time {latest}, {later.name!r} has targets from {first}."
        )


def _checked(log: EventLog, views: dict[str, View], by_time: bool = False) -> dict[str, View]:
    empty = [name for name, view in views.items() if not len(view)]
    if empty:
        raise EventLogError(f"split: {', '.join(empty)} has no example; dropped: {dict(views[empty[0]].dropped)}.")
    check_no_leak(log, views, by_time)
    return views


def _ends(log: EventLog) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.asarray(log.offsets, np.int64)
    return offsets[:-1], offsets[1:]


def _view(
    name: str,
    begin: np.ndarray,
    target_start: np.ndarray,
    stop: np.ndarray,
    *,
    first_user: int = 0,
    others: int = 0,
    known: np.ndarray | None = None,
    keep_new: bool = False,
) -> View:
    """One example per user of `begin` with a target and history; counts those without."""
    target_start = np.maximum(target_start, begin + 1) if keep_new or known is None else target_start
    no_event, no_target = stop <= begin, stop <= target_start
    no_history = target_start <= begin
    new_user = np.zeros_like(no_event) if known is None or keep_new else ~known
    keep = ~(no_event | no_target | no_history | new_user)
    dropped = {
        "users of another side": others,
        "users without events": int(no_event.sum()),
        "users without a target": int((no_target & ~no_event).sum()),
        "users without training history": int((new_user & ~no_event & ~no_target).sum()),
        "users without history": int((no_history & ~new_user & ~no_event & ~no_target).sum()),
    }
    return View(
        name=name,
        user=(first_user + np.flatnonzero(keep)).astype(np.int32),
        start=begin[keep],
        target_start=target_start[keep],
        stop=stop[keep],
        dropped={reason: count for reason, count in dropped.items() if count},
    )


def _select(view: View, mask: np.ndarray, reason: str, count: int) -> View:
    return dataclasses.replace(
        view,
        user=view.user[mask],
        start=view.start[mask],
        target_start=view.target_start[mask],
        stop=view.stop[mask],
        dropped={**view.dropped, reason: count} if count else view.dropped,
    )


def _first_at(log: EventLog, time: int) -> np.ndarray:
    """int64 [U]: row of the first event of each user at or after `time` (the user's end where there is none)."""
    if "timestamp" not in log.events:
        raise EventLogError("column 'timestamp' is missing: this log has order only. Use leave_one_out or by_user.")
    offsets, times = np.asarray(log.offsets, np.int64), log.events["timestamp"]
    first_at = np.empty(log.num_users, np.int64)
    for first, last in log.user_chunks():
        local = offsets[first : last + 1] - offsets[first]
        seconds = np.asarray(times[offsets[first] : offsets[last]])
        falls = np.flatnonzero(seconds[1:] < seconds[:-1]) + 1
        falls = falls[~np.isin(falls, local)]
        if len(falls):
            raise EventLogError(
                f"column 'timestamp': event {offsets[first] + falls[0]} is earlier than its user's event before it; "
                "expected each user's events in time order. Prepare the log again."
            )
        earlier = np.concatenate([[0], np.cumsum(seconds < time)])
        first_at[first:last] = offsets[first:last] + earlier[local[1:]] - earlier[local[:-1]]
    return first_at


def _seen_items_only(log: EventLog, view: View, begin: np.ndarray, train_end: np.ndarray) -> View:
    """Split each example into its runs of targets whose item has a training event."""
    seen = items_of(log, begin, train_end)
    rows, example = target_rows(view), target_example(view)
    keep = seen[log.events["item_id"][rows]]
    joined = keep[1:] & keep[:-1] & (example[1:] == example[:-1])
    opens = keep & np.concatenate([[True], ~joined])[: len(keep)]
    closes = keep & np.concatenate([~joined, [True]])[: len(keep)]
    runs = _select(view, example[opens], "targets of items without training events", int((~keep).sum()))
    return dataclasses.replace(runs, target_start=rows[opens], stop=rows[closes] + 1)


def items_of(log: EventLog, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """bool [V + 1]: items with an event in one of the runs start:stop."""
    seen = np.zeros(log.num_items + 1, bool)
    for first in range(0, len(start), 65536):
        a, b = start[first : first + 65536], stop[first : first + 65536]
        seen[log.events["item_id"][runs(a, np.maximum(b - a, 0))]] = True
    return seen


def runs(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    return np.arange(int(count.sum())) + np.repeat(start - (np.cumsum(count) - count), count)


def target_rows(view: View) -> np.ndarray:
    """int64 [T]: the log's rows of all targets of the view, example by example, in time order."""
    return runs(view.target_start, view.stop - view.target_start)


def target_example(view: View) -> np.ndarray:
    """int64 [T]: the example each target belongs to; expands a mask over examples to one over targets."""
    return np.repeat(np.arange(len(view)), view.stop - view.target_start)
