"""The Bayes-optimal losses of a planted log: the next item's, and its feedback's.

They are those of exact forward filtering over (g, z), the user's type and current interest. pi_g is stationary under
the transition, so filtering restarted at any event with the prior p(g) pi_g(z) is the exact answer for a reader who
sees the events from there on. A past like tells more of the interest than its item alone: the filter then takes in
p(item, like | z) = p(item | z) p(like | z, item), the second mixed over the two lists the item may have come from.

Shapes: K interests, G types, V items (column v - 1 is item v), P periods, N runs, E events. Simulator and notation:
recscale.data.planted.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recscale.data.event_log import EventLog
from recscale.data.planted import CONTEXT, LIKE, Planted, period_of, world
from recscale.data.splits import View

CHUNK_STATES = 1 << 16  # states (K * G * N) filtered at once: half a MiB of float64, which stays in a core's cache


class Runs(NamedTuple):
    """int64 [N] each: run n's filter begins at event first[n] with the prior; target_start:stop are its targets."""

    first: np.ndarray
    target_start: np.ndarray
    stop: np.ndarray


class Seen(NamedTuple):
    """What the reader sees of the events besides their items."""

    context: bool
    feedback: bool


def next_item_nats(
    config: Planted,
    log: EventLog,
    view: View,
    history: int | None = None,
    context: bool = False,
    segment: bool = False,
    feedback: bool = False,
) -> np.ndarray:
    """-log p(item) in nats of each target of `view` under the exact predictive distribution; float64, in view order.

    For the target event t + 1 the reader sees the items of the last `history` events (t - history + 1 .. t; None = from
    the example's start; 0 = nothing, which is the popularity loss), with `feedback` their likes too, and, with
    `context`, the contexts of the events that follow each of them (t - history + 2 .. t + 1), never the context of the
    first one. With items born over time it also knows which items exist at each event. segment: as a causal model reads
    one training segment, where the last `history` inputs of the example serve all its targets: a target sees only the
    inputs of the segment before it, and targets before the segment's second event are left out.

    Raises ValueError for a view read as a window, a context or a feedback the log does not have, or a log these
    settings cannot make.
    """
    seen = Seen(context, feedback)
    return _filter(config, log, _runs(config, log, view, history, seen, segment), seen)[0]


def next_item_law(config: Planted, log: EventLog, view: View, history: int | None = None) -> np.ndarray:
    """p(item) of every item at each target of `view`, under the exact predictive distribution; float64 [T, V].

    Column v - 1 is item v; reader, order and errors are those of `next_item_nats` without contexts and likes. Its items
    by falling probability are the best possible ranking: no other has a higher expected hit rate at any length. Memory
    O(T x V).
    """
    runs = _runs(config, log, view, history, Seen(False, False), False)
    counts = runs.stop - runs.target_start
    interest_TK = np.empty((int(counts.sum()), config.interests))
    _filter(config, log, runs, Seen(False, False), interest_TK)
    emission_PKV = world(config).emission_PKV
    if not config.born:
        return interest_TK @ emission_PKV[0]
    period_T = period_of(config, log.events["timestamp"][_ranges(runs.target_start, counts)])
    law_TV = np.empty((len(interest_TK), config.items))
    for period, emission_KV in enumerate(emission_PKV):
        law_TV[period_T == period] = interest_TK[period_T == period] @ emission_KV
    return law_TV


def feedback_nats(
    config: Planted,
    log: EventLog,
    view: View,
    history: int | None = None,
    context: bool = False,
    segment: bool = False,
) -> np.ndarray:
    """-log p(like) in nats of each target of `view`, its item known; float64, in view order: the floor of feedback.

    The reader of the target event t + 1 sees what the one of `next_item_nats` sees with feedback=True, and the item of
    t + 1 as well. Over entropies(config)["like"] its mean is the floor of normalised entropy. Raises as next_item_nats.
    """
    seen = Seen(context, feedback=True)
    return _filter(config, log, _runs(config, log, view, history, seen, segment), seen)[1]


def _runs(config: Planted, log: EventLog, view: View, history: int | None, seen: Seen, segment: bool) -> Runs:
    """The runs that answer for the view's targets in view order; raises ValueError where they cannot."""
    if view.reading != "next_item":
        raise ValueError(
            f"view {view.name}: reading is {view.reading!r}, expected 'next_item': the floor is per event."
        )
    if log.num_items != config.items:
        raise ValueError(
            f"{log.path}: {log.num_items} items, but the settings have {config.items}: use config_of(log)."
        )
    if seen.context and CONTEXT not in log.events:
        raise ValueError(f"{log.path}: no column {CONTEXT!r}: ask for context=False or prepare with a context.")
    if seen.feedback and not (config.likes and LIKE in log.events):
        raise ValueError(f"{log.path}: no column {LIKE!r}, or none in the settings: prepare with like_own above 0.")
    if history is not None and history < 0:
        raise ValueError(f"history: found {history}, expected None or at least 0.")
    start, target_start, stop = (np.asarray(x, np.int64) for x in (view.start, view.target_start, view.stop))
    if segment and history is not None:
        start = np.maximum(start, stop - 1 - history)
        target_start = np.maximum(target_start, start + 1)
    elif history is not None:
        counts = stop - target_start
        target_start = _ranges(target_start, counts)
        stop = target_start + 1
        start = np.maximum(np.repeat(start, counts), target_start - history)
    return Runs(start, target_start, stop)


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, .. (counts[0] of them), first[1], .. as one array."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) + np.repeat(first - (ends - counts), counts)


class _Tables(NamedTuple):
    """The true parameters as the filter reads them."""

    type_KG: np.ndarray
    emission_PVK: np.ndarray
    context_CK: np.ndarray
    like_VK: np.ndarray  # p(like = 1 | item, interest)


def _tables(config: Planted) -> _Tables:
    true = world(config)
    like_VK = config.like_noise + (config.like_own - config.like_noise) * true.own_KV.T
    emission_PVK = np.ascontiguousarray(true.emission_PKV.transpose(0, 2, 1))
    return _Tables(np.ascontiguousarray(true.type_GK.T), emission_PVK, true.context_CK, np.ascontiguousarray(like_VK))


def _filter(
    config: Planted, log: EventLog, runs: Runs, seen: Seen, interest_nK: np.ndarray | None = None
) -> np.ndarray:
    """Nats of the targets, [1, n]: of their items; with feedback [2, n]: of their items, and of their likes then.

    interest_nK: filled with p(interest | what is seen before the target, its context left out).
    """
    tables = _tables(config)
    counts = runs.stop - runs.target_start
    place = np.cumsum(counts) - counts - runs.target_start  # event row + place = index in the result
    nats = np.empty((1 + seen.feedback, int(counts.sum())))
    order = np.argsort(runs.first - runs.stop, kind="stable")  # longest first: the runs still going are a prefix
    size = max(16, CHUNK_STATES // (config.interests * config.types))
    for begin in range(0, len(order), size):
        n = order[begin : begin + size]
        _filter_chunk(config, tables, log, Runs(*(x[n] for x in runs)), place[n], seen, nats, interest_nK)
    return nats


def _filter_chunk(
    config: Planted,
    tables: _Tables,
    log: EventLog,
    runs: Runs,
    place: np.ndarray,
    seen: Seen,
    nats: np.ndarray,
    interest_nK: np.ndarray | None,
) -> None:
    """Filter runs sorted by falling length, side by side, and write their targets' nats in place.

    The state is b = p(g, z | seen) / pi_g(z), times `stay` after each event: the transition is then one sum over z and
    one in-place addition, half the memory traffic of the plain form.
    """
    type_KG = tables.type_KG
    length = runs.stop - runs.first
    state_KGN = np.full((*type_KG.shape, len(length)), 1 / config.types)
    for k in range(int(length[0])):
        N = int(np.searchsorted(-length, -k))
        row = runs.first[:N] + k
        state_KGN = state_KGN[:, :, :N]
        if k:
            mass_GN = (type_KG.T[:, None, :] @ state_KGN.transpose(1, 0, 2))[:, 0]
            state_KGN += ((1 - config.stay) / config.stay * mass_GN)[None]
        interest_KN = (type_KG[:, None, :] @ state_KGN)[:, 0]
        period = period_of(config, log.events["timestamp"][row]) if config.born else np.zeros(N, np.int64)
        seen_KN = np.ascontiguousarray(tables.emission_PVK[period, log.events["item_id"][row] - 1].T)
        if seen.context and k:
            context_KN = tables.context_CK[log.events[CONTEXT][row]].T
            seen_KN *= context_KN / (interest_KN * context_KN).sum(0)
        p_N = _probability(interest_KN, seen_KN, row, "item")
        target = row >= runs.target_start[:N]
        at = (row + place[:N])[target]
        nats[0, at] = -np.log(p_N[target])
        if interest_nK is not None:
            interest_nK[at] = interest_KN[:, target].T
        if seen.feedback:
            like_KN = tables.like_VK[log.events["item_id"][row] - 1].T
            seen_KN *= np.where(log.events[LIKE][row] == 1, like_KN, 1 - like_KN)
            both_N = _probability(interest_KN, seen_KN, row, "like")
            nats[1, at] = np.log(p_N[target] / both_N[target])
            p_N = both_N
        state_KGN *= (config.stay / p_N * seen_KN)[:, None, :]


def _probability(interest_KN: np.ndarray, seen_KN: np.ndarray, row: np.ndarray, what: str) -> np.ndarray:
    """[N] of what is seen of the events at `row`; raises ValueError where it is zero."""
    p_N = (interest_KN * seen_KN).sum(0)
    if not p_N.all():
        raise ValueError(f"event {row[p_N == 0][0]}: its {what} cannot occur under these settings: use config_of(log).")
    return p_N


def floors(
    config: Planted,
    log: EventLog,
    view: View,
    histories: Sequence[int | None] = (0, 1, 2, 4, 8, 16, 32, 64, None),
    segment: bool = False,
    feedback: bool = False,
) -> list[dict[str, Any]]:
    """Bayes-optimal loss of the next item on the view's targets: rows {history, context, mean, stderr, n}, in nats.

    history 0 is the popularity (unigram) loss, the trivial ceiling; None is unlimited. Every history is given without
    and, where the log has one and history > 0, with the context. feedback: past likes are seen too. stderr is clustered
    by example (one user's targets are not independent); NaN with fewer than two examples. n counts targets.
    """
    rows = []
    for history in histories:
        for context in (False, True) if CONTEXT in log.events and history != 0 else (False,):
            nats = next_item_nats(config, log, view, history, context, segment, feedback)
            counts = view.stop - view.target_start
            if segment and history is not None:
                counts = view.stop - np.maximum(view.target_start, np.maximum(view.start, view.stop - 1 - history) + 1)
            mean, stderr = _clustered(nats, counts)
            rows.append({"history": history, "context": context, "mean": mean, "stderr": stderr, "n": len(nats)})
    return rows


def _clustered(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error with the examples (counts[n] values each, in order) as clusters."""
    N, mean = len(counts), float(values.mean())
    if N < 2:
        return mean, math.nan
    sums = np.bincount(np.repeat(np.arange(N), counts), weights=values - mean, minlength=N)
    return mean, float(np.sqrt((sums**2).sum() * N / (N - 1)) / len(values))


def entropies(config: Planted, period: int = 0) -> dict[str, float]:
    """Entropy of the next item in nats, for one period: nothing known, type known, interest known.

    `unigram` is the expected popularity loss; no history of any length gets below `interest`. Where the log has a
    feedback column, also the entropy of a like: `like` with nothing known (that of the base rate, which normalised
    entropy divides by), `like_item` with the item known, `like_interest` with the item and the interest known.
    """
    true = world(config)
    type_GK, emission_KV = true.type_GK, true.emission_PKV[period]
    out = {
        "unigram": float(_entropy(type_GK.mean(0) @ emission_KV)),
        "type": float(_entropy(type_GK @ emission_KV).mean()),
        "interest": float(type_GK.mean(0) @ _entropy(emission_KV)),
    }
    return out | _like_entropies(config, type_GK.mean(0)[:, None] * emission_KV) if config.likes else out


def _like_entropies(config: Planted, joint_KV: np.ndarray) -> dict[str, float]:
    """joint_KV: p(interest, item) of an event."""
    like_KV = _tables(config).like_VK.T
    item_V, liked_V = joint_KV.sum(0), (joint_KV * like_KV).sum(0)
    like_V = np.divide(liked_V, item_V, out=np.zeros_like(item_V), where=item_V > 0)

    def coin(p: np.ndarray) -> np.ndarray:
        return _entropy(np.stack([p, 1 - p], -1))

    return {
        "like": float(coin(liked_V.sum())),
        "like_item": float(item_V @ coin(like_V)),
        "like_interest": float((joint_KV * coin(like_KV)).sum()),
    }


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
