"""Slices of an evaluation: new users, new items, lengths of history, as named bool masks.

A slice function takes (log, view, train view) and returns name -> mask, over the view's examples [N] or targets [T].
"""

import itertools
from collections.abc import Callable

import numpy as np

from recscale.data.event_log import EventLog
from recscale.data.splits import View, items_of, target_rows

HISTORY_EDGES = (5, 10, 20, 50, 100, 200)


def new_users(log: EventLog, view: View, train: View) -> dict[str, np.ndarray]:
    """Over examples [N]: users that training has not seen, and the others."""
    known = np.isin(view.user, train.user)
    return {"new_users": ~known, "known_users": known}


def new_items(log: EventLog, view: View, train: View) -> dict[str, np.ndarray]:
    """Over targets [T], in `target_rows` order: items absent from training, and the rest."""
    known = items_of(log, train.start, train.stop)[log.events["item_id"][target_rows(view)]]
    return {"new_items": ~known, "known_items": known}


def history(log: EventLog, view: View, train: View) -> dict[str, np.ndarray]:
    """Over examples [N], by events of history before the first target: history_1_4, ..., history_200_up."""
    events = view.target_start - view.start
    bounds = [1, *HISTORY_EDGES, None]
    return {
        f"history_{low}_{'up' if high is None else high - 1}": (events >= low) & (high is None or events < high)
        for low, high in itertools.pairwise(bounds)
    }


SLICES: dict[str, Callable[[EventLog, View, View], dict[str, np.ndarray]]] = {
    "new_users": new_users,
    "new_items": new_items,
    "history": history,
}
