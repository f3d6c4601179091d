"""Which impressions were shown together (requests), and rows that a source holds twice.

A log with a column `request_id` says it. Others do not, KuaiRand among them: there a request is a session of one user,
consecutive impressions with gaps of at most `gap` seconds, and where asked the same value of a column (tab, say).

On the default of 1,800 s: in KuaiRand-Pure (25 April to 8 May 2022, 7,583 sampled videos, so most impressions of the
real feed are missing) the gaps between a user's impressions have no valley that would part sessions. Their density per
decade rises evenly from 5 s to a day: 4 % are 0 s, 6 % up to 2 minutes, 12 % up to 10, 19 % up to 30, 25 % up to an
hour, 71 % up to a day. Half an hour is the usual length of silence that ends a session; with it 30 % of the
impressions share a request with another one, and 12 % are in a request with both outcomes of is_click.
"""

import numpy as np

from recscale.data.event_log import EventLog, EventLogError

GAP = 1800


def request_ids(log: EventLog, gap: int = GAP, same: str | None = None) -> np.ndarray:
    """int64 [E]: the request of every event, 0..R - 1, by the column `request_id` where the log has one, else by gaps.

    gap: seconds; a longer silence of the user opens a new request. same: name of an event column; a new value opens a
    new request. With `request_id` neither is read, and one value under two users is two requests. Numbers rise with the
    first event of a request. Raises EventLogError where times or the column are missing, or gap is negative.
    """
    if "request_id" in log.events:
        return _of_column(log)
    if gap < 0:
        raise EventLogError(f"request_ids: gap={gap}, expected 0 seconds or more.")
    names = ["timestamp"] if same is None else ["timestamp", same]
    for name in names:
        if name not in log.events:
            raise EventLogError(
                f"column {name!r} is missing (the log has {sorted(log.events)}): requests need times, or a column "
                "request_id."
            )
    opens = _first_events(log)
    opens[1:] |= np.diff(log.events["timestamp"]) > gap
    if same is not None:
        opens[1:] |= log.events[same][1:] != log.events[same][:-1]
    return np.cumsum(opens) - 1


def repeats(log: EventLog) -> np.ndarray:
    """bool [E]: the event is the one before it again: same user, item and time (`time_ms` where the log has it).

    A source that writes an impression twice shows a model that reads the user's past the label of the copy. Leave such
    targets out of an evaluation. Raises EventLogError where the log has no times.
    """
    clock = "time_ms" if "time_ms" in log.events else "timestamp"
    if clock not in log.events:
        raise EventLogError("column 'timestamp' is missing: without times a repeat cannot be told from a second visit.")
    again = ~_first_events(log)
    for name in ("item_id", clock):
        again[1:] &= log.events[name][1:] == log.events[name][:-1]
    return again


def _first_events(log: EventLog) -> np.ndarray:
    """bool [E]: the first event of its user."""
    first = np.zeros(log.num_events, bool)
    first[log.offsets[:-1][log.lengths > 0]] = True
    return first


def _of_column(log: EventLog) -> np.ndarray:
    """Numbers of the pairs (user, request_id), by first appearance."""
    user = np.repeat(np.arange(log.num_users), log.lengths)
    _, value = np.unique(log.events["request_id"], return_inverse=True)
    pair = user * (int(value.max(initial=0)) + 1) + value
    _, first, number = np.unique(pair, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    return place[number]
