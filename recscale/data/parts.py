"""A split that the source made: each user lies in one part, train, val or test (users/part), with all its events."""

import numpy as np

from recscale.data.event_log import EventLog, EventLogError
from recscale.data.splits import View, check_no_leak
from recscale.data.windows import first_apart, prefixes

PART = "part"
PARTS = ("train", "val", "test")


def parts(
    log: EventLog, held_out: float = 0.1, history: int = 0, first_events: bool = False, seed: int = 0
) -> dict[str, View]:
    """Train, val and test users as the column users/part says; every event of a user but the first is a target.

    A source without a train part: all users of val train but for a share `held_out` of them, drawn by `seed`, which
    validate; test is as the source says, and `dropped` of train and val says so. With a train part nothing is held out,
    and held_out and seed are not read. history: val and test have one example per target, with the last `history`
    events before it (0: one example per user); training is cut by the loader. first_events: a user's first event is a
    target too, of an empty history (in val and test an example of its own); else it is counted in `dropped`.
    Raises EventLogError: no such column, a val or test part that is missing, a share that leaves a side empty.
    """
    if PART not in log.users:
        raise EventLogError(
            f"split parts: the log has no column users/{PART}, which says {', '.join(PARTS)}: use another split."
        )
    of_U = np.asarray(log.users[PART])
    missing = [part for part in PARTS[1:] if part not in of_U]
    if missing:
        raise EventLogError(f"split parts: no user is in part {', '.join(missing)}; found {np.unique(of_U).tolist()}.")
    sides = {part: of_U == part for part in PARTS}
    notes: dict[str, dict[str, int]] = {part: {} for part in PARTS}
    if not sides["train"].any():
        sides["train"], sides["val"] = _shared(sides["val"], held_out, seed)
        notes["train"] = {"users of val held out (there is no train part)": int(sides["val"].sum())}
        notes["val"] = {"users of val that train (there is no train part)": int(sides["train"].sum())}
    views = {part: _side(log, part, sides[part], first_events, notes[part]) for part in PARTS}
    empty = [name for name, view in views.items() if not len(view)]
    if empty:
        raise EventLogError(
            f"split parts: {', '.join(empty)} has no user with a target; dropped: {dict(views[empty[0]].dropped)}."
        )
    check_no_leak(log, views)
    if history < 0:
        raise EventLogError(f"split parts: history={history}, expected 0 (one example per user) or more.")
    for name in PARTS[1:]:
        views[name] = prefixes(views[name], history) if history else first_apart(views[name])
    return views


def _shared(val_U: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bool [U] twice: who of the val part trains, and who validates."""
    users = np.flatnonzero(val_U)
    count = round(held_out * len(users)) if 0.0 < held_out < 1.0 else 0
    if not 0 < count < len(users):
        raise EventLogError(
            f"split parts: held_out={held_out} of {len(users)} val users, which train too as there is no train part; "
            "expected a share between 0 and 1 that leaves users on both sides."
        )
    validates = np.zeros(len(val_U), bool)
    validates[np.random.default_rng(seed).permutation(users)[:count]] = True
    return val_U & ~validates, validates


def _side(log: EventLog, name: str, mine: np.ndarray, first_events: bool, note: dict[str, int]) -> View:
    begin, end = np.asarray(log.offsets[:-1], np.int64), np.asarray(log.offsets[1:], np.int64)
    target_start = begin if first_events else begin + 1
    kept = mine & (end > target_start)
    dropped = {
        **note,
        "first events (no history)": 0 if first_events else int((mine & (end > begin)).sum()),
        "users without events": int((mine & (end == begin)).sum()),
        "users without a target": int((mine & (end > begin) & ~kept).sum()),
    }
    return View(
        name=name,
        user=np.flatnonzero(kept).astype(np.int32),
        start=begin[kept],
        target_start=target_start[kept],
        stop=end[kept],
        empty_history=first_events,
        dropped={reason: count for reason, count in dropped.items() if count},
    )
