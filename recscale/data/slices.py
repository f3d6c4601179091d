"""Slices of an evaluation: new users, new and rare items, lengths of history, as named bool masks.

A slice function takes (log, view, train view) and returns name -> mask, over the view's examples [N] or targets [T].
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from recscale.data.codes import item_counts
from recscale.data.event_log import EventLog
from recscale.data.splits import View, items_of, target_rows

HISTORY_EDGES = (5, 10, 20, 50, 100, 200)
TAIL_EDGES = (6, 21, 101)


def new_users(log: EventLog, view: View, train: View) -> dict[str, np.ndarray]:
    """Over examples [N]: users that training has not seen, and the others."""
    known = np.isin(view.user, train.user)
    return {"new_users": ~known, "known_users": known}


def new_items(log: EventLog, view: View, train: View) -> dict[str, np.ndarray]:
    """Over targets [T], in `target_rows` order: items absent from training, and the rest."""
    known = items_of(log, train.start, train.stop)[log.events["item_id"][target_rows(view)]]
    return {"new_items": ~known, "known_items": known}


def tail(log: EventLog, view: View, train: View) -> dict[str, np.ndarray]:
    """Over targets [T]: by training events of the target's item: tail_1_5, ..., tail_101_up. None: see new_items."""
    events = item_counts(log, train)[log.events["item_id"][target_rows(view)]]
    return {f"tail_{name}": inside for name, inside in _between(events, TAIL_EDGES)}


def history(log: EventLog, view: View, train: View) -> dict[str, np.ndarray]:
    """Over examples [N], by events of history before the first target: history_0, history_1_4, ..., history_200_up."""
    events = view.target_start - view.start
    named = {f"history_{name}": inside for name, inside in _between(events, HISTORY_EDGES)}
    return {"history_0": events == 0, "history_1_up": events > 0} | named if view.empty_history else named


def _between(count: np.ndarray, edges: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """("1_4", 1 <= count < 5), ... and ("200_up", count >= 200) for edges (5, ..., 200)."""
    for low, high in itertools.pairwise([1, *edges, None]):
        name = f"{low}_{'up' if high is None else high - 1}"
        yield name, (count >= low) & (high is None or count < high)


SLICES: dict[str, Callable[[EventLog, View, View], dict[str, np.ndarray]]] = {
    "new_users": new_users,
    "new_items": new_items,
    "tail": tail,
    "history": history,
}
