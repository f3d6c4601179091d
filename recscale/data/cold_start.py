"""Items that training never sees: the cold-start protocol of generative retrieval (TIGER, arXiv 2305.05065).

A share of the items that are test targets is removed from training. A user's training events are cut where such an item
was; the stretches between are examples. Validation and test are those of leave-one-out: their histories keep the
removed items, and the slice `new_items` (data/slices.py) holds the targets that were removed.
"""

import numpy as np

from recscale.data.event_log import EventLog, EventLogError
from recscale.data.splits import View, leave_one_out, target_rows


def cold_start(
    log: EventLog, share: float, validation: bool = True, validation_users: int = 0, seed: int = 0
) -> dict[str, View]:
    """Leave-one-out without `share` (0 to 1) of the test's items in training, at least one of them, drawn by `seed`.

    Raises EventLogError where share is no such number, or nothing is left to train on.
    """
    if not 0.0 < share < 1.0:
        raise EventLogError(f"cold_start: share={share}, expected a number between 0 and 1.")
    views = leave_one_out(log, validation, validation_users, seed)
    targets = np.unique(log.events["item_id"][target_rows(views["test"])])
    removed = np.random.default_rng(seed).permutation(targets)[: max(1, round(share * len(targets)))]
    views["train"] = without_items(log, views["train"], removed)
    if not len(views["train"]):
        raise EventLogError(f"cold_start: share={share} removes so many items that no training example is left.")
    return views


def without_items(log: EventLog, view: View, items: np.ndarray) -> View:
    """The stretches of each example between events of these items; one event alone is no example and is dropped."""
    out = np.zeros(log.num_items + 1, bool)
    out[items] = True
    cut = np.concatenate([[0], np.cumsum(out[log.events["item_id"]])])  # events of these items before each row
    start, target_start, stop, user = [], [], [], []
    touched = cut[view.stop] > cut[view.start]
    for user_of, begin, first, end in zip(
        view.user[touched], view.start[touched], view.target_start[touched], view.stop[touched], strict=True
    ):
        rows = begin + np.flatnonzero(out[log.events["item_id"][begin:end]])
        begins, ends = np.concatenate([[begin], rows + 1]), np.concatenate([rows, [end]])
        firsts = np.maximum(first, begins + 1)
        kept = firsts < ends
        start.append(begins[kept])
        target_start.append(firsts[kept])
        stop.append(ends[kept])
        user.append(np.full(kept.sum(), user_of))
    pieces = {"user": user, "start": start, "target_start": target_start, "stop": stop}
    whole = {name: np.concatenate([getattr(view, name)[~touched], *cuts]) for name, cuts in pieces.items()}
    order = np.argsort(whole["start"], kind="stable")
    before = int((view.stop - view.target_start).sum())
    return View(
        name=view.name,
        user=whole["user"][order].astype(np.int32),
        start=whole["start"][order],
        target_start=whole["target_start"][order],
        stop=whole["stop"][order],
        reading=view.reading,
        dropped={**view.dropped, "targets cut out": before - int((whole["stop"] - whole["target_start"]).sum())},
    )
