"""A simulated event log whose Bayes-optimal next-item loss is known exactly, so a fitted floor can be checked.

Hidden state: a user has a type g (uniform over the G types, fixed for life) and a current interest z. At the first
event z is drawn from the type's own distribution pi_g; at every later event z stays with probability `stay`, else it is
drawn again from pi_g. The item comes from the interest's own Zipf list with probability 1 - `noise`, else from one Zipf
list over the whole catalogue. A context column (`surface`), known before the item is chosen, shows the group of the
current interest with probability `context_reliability` and a uniform group otherwise. Lengths, times and hidden states
are independent of each other; where items are born over time, emissions are renormalised over the items born so far.

The floor is the loss of exact forward filtering over (g, z). pi_g is stationary under the transition, so filtering
restarted at any event with the prior p(g) pi_g(z) is the exact answer for a reader who sees the events from there on.

Shapes: K interests, G types, V items (column v - 1 is item v), P periods, C context groups, N runs, E events, U users.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from recscale.data.event_log import Column, EventLog
from recscale.data.splits import View

CONTEXT = "surface"
BLOCK_USERS = 1024  # users drawn from one seed; the last block is cut, so a smaller log is a prefix of a larger one
CHUNK_STATES = 1 << 16  # states (K * G * N) filtered at once: half a MiB of float64, which stays in a core's cache
SMALLEST_SHARE = 1e-9  # of an interest in a type: no pi_g(z) is zero, so the filter may divide by it
BORN_AT_START = 0.5  # share of the catalogue that exists from the first period on, where items are born over time


@dataclasses.dataclass(frozen=True)
class Planted:
    """The simulator's settings. Raises ValueError where one is out of range.

    items_per_interest: length of each interest's list; lists are random, so they overlap and one event does not give
    the interest away. concentration: of the Dirichlet the types' pi_g come from (small = types differ much). Lengths
    are lognormal (median, sigma of the logarithm), clipped to length_min..length_max. context_reliability = 0: no
    context column. born: items are born over `periods` equal parts of the horizon (half exist from the start). Users
    start uniformly over `horizon` seconds; gaps are lognormal with mean `mean_gap` seconds.
    """

    users: int = 20_000
    items: int = 1_000
    interests: int = 32
    types: int = 64
    concentration: float = 0.08
    stay: float = 0.7
    noise: float = 0.25
    zipf: float = 1.1
    items_per_interest: int = 128
    length_median: float = 48.0
    length_sigma: float = 0.8
    length_min: int = 5
    length_max: int = 512
    context_groups: int = 4
    context_reliability: float = 0.6
    born: bool = False
    periods: int = 8
    horizon: int = 180 * 86_400
    mean_gap: float = 6 * 3_600.0
    gap_sigma: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("users", "interests", "types", "items_per_interest", "context_groups", "periods", "horizon"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.items_per_interest <= self.items, "items_per_interest", self.items_per_interest, "at most items")
        _require(self.context_groups <= self.interests, "context_groups", self.context_groups, "at most interests")
        _require(0 < self.stay < 1, "stay", self.stay, "in (0, 1)")
        _require(0 <= self.noise <= 1, "noise", self.noise, "in [0, 1]")
        _require(0 <= self.context_reliability <= 1, "context_reliability", self.context_reliability, "in [0, 1]")
        _require(self.zipf >= 0, "zipf", self.zipf, "at least 0")
        _require(2 <= self.length_min <= self.length_max, "length_min", self.length_min, "in [2, length_max]")
        for name in ("concentration", "length_median", "mean_gap"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("length_sigma", "gap_sigma", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")


class World(NamedTuple):
    """The true parameters. Row 0 of context_CK is the missing context, which says nothing."""

    type_GK: np.ndarray  # pi_g
    emission_PKV: np.ndarray  # p(item | period, interest)
    context_CK: np.ndarray  # [C + 1, K] p(context | interest)
    birth_V: np.ndarray  # period in which the item appears


def _require(ok: bool, field: str, found: float, expected: str) -> None:
    if not ok:
        raise ValueError(f"Planted.{field}: found {found}, expected {expected}: change the value.")


def config_of(log: EventLog) -> Planted:
    """The settings a planted log was made with; raises ValueError where the log is not a planted one."""
    if "planted" not in log.facts:
        raise ValueError(f"{log.path}: facts hold no 'planted' settings: the floor is known for planted logs only.")
    return Planted(**log.facts["planted"])


def world(config: Planted) -> World:
    """The true parameters, from the seed alone: the number of users changes nothing."""
    return _world(dataclasses.replace(config, users=1))


@functools.lru_cache(maxsize=8)
def _world(config: Planted) -> World:
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(0,)))
    K, V, C = config.interests, config.items, config.context_groups
    type_GK = np.maximum(rng.dirichlet(np.full(K, config.concentration), size=config.types), SMALLEST_SHARE)
    type_GK /= type_GK.sum(1, keepdims=True)
    lists_KM = rng.permuted(np.tile(np.arange(V), (K, 1)), axis=1)[:, : config.items_per_interest]
    own_KV = np.zeros((K, V))
    np.put_along_axis(own_KV, lists_KM, _zipf(lists_KM.shape[1], config.zipf)[None, :], axis=1)
    everyone_V = rng.permutation(_zipf(V, config.zipf))
    mixed_KV = (1 - config.noise) * own_KV + config.noise * everyone_V[None, :]

    birth_V = np.zeros(V, np.int64)
    if config.born and config.periods > 1:
        late_V = rng.random(V) >= BORN_AT_START
        birth_V[late_V] = rng.integers(1, config.periods, size=int(late_V.sum()))
        birth_V[lists_KM[:, 0]] = 0  # every interest always has an item
    periods = config.periods if config.born else 1
    born_P1V = (birth_V[None, :] <= np.arange(periods)[:, None])[:, None, :]
    emission_PKV = mixed_KV[None] * born_P1V
    emission_PKV /= emission_PKV.sum(-1, keepdims=True)

    shown_CK = (np.arange(K) % C)[None, :] == np.arange(C)[:, None]
    context_CK = config.context_reliability * shown_CK + (1 - config.context_reliability) / C
    return World(type_GK, emission_PKV, np.concatenate([np.ones((1, K)), context_CK]), birth_V)


def _zipf(n: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, n + 1) ** -float(exponent)
    return weights / weights.sum()


def _stacked_cdf(p_RV: np.ndarray) -> np.ndarray:
    """Flat [R * V]: row r's cumulative distribution, running from r to r + 1, so that one search serves all rows."""
    cdf_RV = np.cumsum(p_RV, axis=-1)
    return (cdf_RV / cdf_RV[:, -1:] + np.arange(len(p_RV))[:, None]).reshape(-1)


def _draw(cdf: np.ndarray, width: int, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw per entry of `row` from that row of a stacked cdf: its column, int64."""
    u = rng.random(len(row))
    u *= 1 - 2.0**-32  # row + u stays below row + 1 after rounding
    u += row
    return np.searchsorted(cdf, u, side="right") - row * width


def period_of(config: Planted, timestamp: np.ndarray) -> np.ndarray:
    """Period of each time; all zeros where items are not born over time, and the last period after the horizon."""
    if not config.born:
        return np.zeros(len(timestamp), np.int64)
    return np.minimum(timestamp.astype(np.int64) * config.periods // config.horizon, config.periods - 1)


def blocks(config: Planted) -> Iterator[dict[str, np.ndarray]]:
    """Users in blocks of up to BLOCK_USERS, for writing a log larger than memory.

    Yields `length` [U]; `item_id` int32, `timestamp` int64 seconds and, with a context, `surface` int32, all [E]; and
    the hidden `type` [U] and `interest` [E], which are not part of the log.
    """
    true = world(config)
    interest_cdf, item_cdf = _stacked_cdf(true.type_GK), _stacked_cdf(true.emission_PKV.reshape(-1, config.items))
    for block, first in enumerate(range(0, config.users, BLOCK_USERS)):
        rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(1, block)))
        drawn = _block(config, interest_cdf, item_cdf, rng)
        users = min(BLOCK_USERS, config.users - first)
        events = int(drawn["length"][:users].sum())
        yield {name: x[: users if name in ("length", "type") else events] for name, x in drawn.items()}


def _block(config: Planted, interest_cdf: np.ndarray, item_cdf: np.ndarray, rng: np.random.Generator) -> dict:
    U, K = BLOCK_USERS, config.interests
    length = np.rint(config.length_median * np.exp(config.length_sigma * rng.standard_normal(U)))
    length = np.clip(length, config.length_min, config.length_max).astype(np.int64)
    head = np.cumsum(length) - length  # each user's first event
    E = int(length.sum())
    type_U = rng.integers(config.types, size=U)

    switch = rng.random(E) >= config.stay
    switch[head] = True
    at = np.flatnonzero(switch)
    fresh = _draw(interest_cdf, K, np.repeat(type_U, length)[at], rng)
    interest = np.repeat(fresh, np.diff(at, append=E))

    gap = np.exp(config.gap_sigma * rng.standard_normal(E)) * (config.mean_gap * math.exp(-(config.gap_sigma**2) / 2))
    gap = gap.astype(np.int64)
    gap[head] = 0
    since = np.cumsum(gap)
    timestamp = since + np.repeat(rng.integers(config.horizon, size=U) - since[head], length)

    row = period_of(config, timestamp) * K + interest if config.born else interest
    item = _draw(item_cdf, config.items, row, rng) + 1
    out = {
        "length": length,
        "type": type_U,
        "interest": interest,
        "item_id": item.astype(np.int32),
        "timestamp": timestamp,
    }
    if config.context_reliability > 0:
        shown = rng.random(E) < config.context_reliability
        other = rng.integers(config.context_groups, size=E)
        out[CONTEXT] = (np.where(shown, interest % config.context_groups, other) + 1).astype(np.int32)
    return out


def generate(config: Planted) -> EventLog:
    """The event log of `config`, in memory. Same settings: same log, bit for bit; fewer users: a prefix of it.

    Item column `born` (int64 [V + 1]): first second of the item's first period. The settings are in facts["planted"].
    """
    parts = list(blocks(config))
    length = np.concatenate([part["length"] for part in parts])
    columns = {"item_id": Column("id"), "timestamp": Column("time")}
    if config.context_reliability > 0:
        columns[CONTEXT] = Column("context", config.context_groups + 1)
    birth_V = world(config).birth_V
    born = np.concatenate([[0], -(-birth_V * config.horizon // config.periods)]).astype(np.int64)
    return EventLog(
        offsets=np.concatenate([[0], np.cumsum(length)]).astype(np.int64),
        events={name: np.concatenate([part[name] for part in parts]) for name in columns},
        columns=columns,
        num_items=config.items,
        items={"born": born},
        facts={
            "source": "simulated by recscale.data.planted",
            "licence": "Apache-2.0",
            "users": len(length),
            "items": config.items,
            "events": int(length.sum()),
            "planted": dataclasses.asdict(config),
        },
    )


def next_item_nats(
    config: Planted, log: EventLog, view: View, history: int | None = None, context: bool = False, segment: bool = False
) -> np.ndarray:
    """-log p(item) in nats of each target of `view` under the exact predictive distribution; float64, in view order.

    For the target event t + 1 the reader sees the items of the last `history` events (t - history + 1 .. t; None = from
    the example's start; 0 = nothing, which is the popularity loss) and, with `context`, the contexts of the events that
    follow each of them (t - history + 2 .. t + 1), never the context of the first one. With items born over time it
    also knows which items exist at each event. segment: as a causal model reads one training segment, where the last
    `history` inputs of the example serve all its targets: a target sees only the inputs of the segment before it, and
    targets before the segment's second event are left out.

    Raises ValueError for a view read as a window, a context the log does not have, or a log these settings cannot make.
    """
    if view.reading != "next_item":
        raise ValueError(
            f"view {view.name}: reading is {view.reading!r}, expected 'next_item': the floor is per event."
        )
    if log.num_items != config.items:
        raise ValueError(
            f"{log.path}: {log.num_items} items, but the settings have {config.items}: use config_of(log)."
        )
    if context and CONTEXT not in log.events:
        raise ValueError(f"{log.path}: no column {CONTEXT!r}: ask for context=False or prepare with a context.")
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
    return _filter(config, log, start, target_start, stop, context)


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, .. (counts[0] of them), first[1], .. as one array."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) + np.repeat(first - (ends - counts), counts)


def _filter(
    config: Planted, log: EventLog, first: np.ndarray, target_start: np.ndarray, stop: np.ndarray, context: bool
) -> np.ndarray:
    """Nats of the events target_start:stop of each run; run n's filter begins at event first[n] with the prior."""
    true = world(config)
    emission_PVK = np.ascontiguousarray(true.emission_PKV.transpose(0, 2, 1))
    counts = stop - target_start
    place = np.cumsum(counts) - counts - target_start  # event row + place = index in the result
    nats = np.empty(int(counts.sum()))
    order = np.argsort(first - stop, kind="stable")  # longest first: the runs still going are a prefix
    size = max(16, CHUNK_STATES // (config.interests * config.types))
    for begin in range(0, len(order), size):
        n = order[begin : begin + size]
        _filter_chunk(config, true, emission_PVK, log, first[n], target_start[n], stop[n], place[n], context, nats)
    return nats


def _filter_chunk(config, true, emission_PVK, log, first, target_start, stop, place, context, nats) -> None:
    """Filter runs sorted by falling length, side by side, and write their targets' nats in place.

    The state is b = p(g, z | seen) / pi_g(z), times `stay` after each event: the transition is then one sum over z and
    one in-place addition, half the memory traffic of the plain form.
    """
    type_KG = np.ascontiguousarray(true.type_GK.T)
    length = stop - first
    state_KGN = np.full((*type_KG.shape, len(first)), 1 / config.types)
    for k in range(int(length[0])):
        N = int(np.searchsorted(-length, -k))
        row = first[:N] + k
        state_KGN = state_KGN[:, :, :N]
        if k:
            mass_GN = (type_KG.T[:, None, :] @ state_KGN.transpose(1, 0, 2))[:, 0]
            state_KGN += ((1 - config.stay) / config.stay * mass_GN)[None]
        interest_KN = (type_KG[:, None, :] @ state_KGN)[:, 0]
        period = period_of(config, log.events["timestamp"][row]) if config.born else np.zeros(N, np.int64)
        seen_KN = np.ascontiguousarray(emission_PVK[period, log.events["item_id"][row] - 1].T)
        if context and k:
            context_KN = true.context_CK[log.events[CONTEXT][row]].T
            seen_KN *= context_KN / (interest_KN * context_KN).sum(0)
        p_N = (interest_KN * seen_KN).sum(0)
        if not p_N.all():
            raise ValueError(
                f"event {row[p_N == 0][0]}: its item cannot occur under these settings: use config_of(log)."
            )
        target = row >= target_start[:N]
        nats[(row + place[:N])[target]] = -np.log(p_N[target])
        state_KGN *= (config.stay / p_N * seen_KN)[:, None, :]


def floors(
    config: Planted,
    log: EventLog,
    view: View,
    histories: Sequence[int | None] = (0, 1, 2, 4, 8, 16, 32, 64, None),
    segment: bool = False,
) -> list[dict[str, Any]]:
    """Bayes-optimal loss on the view's targets: rows {history, context, mean, stderr, n}, in nats.

    history 0 is the popularity (unigram) loss, the trivial ceiling; None is unlimited. Every history is given without
    and, where the log has one and history > 0, with the context. stderr is clustered by example (one user's targets are
    not independent); NaN with fewer than two examples. n counts targets.
    """
    rows = []
    for history in histories:
        for context in (False, True) if CONTEXT in log.events and history != 0 else (False,):
            nats = next_item_nats(config, log, view, history, context, segment)
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

    `unigram` is the expected popularity loss; no history of any length gets below `interest`.
    """
    true = world(config)
    type_GK, emission_KV = true.type_GK, true.emission_PKV[period]

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    return {
        "unigram": float(entropy(type_GK.mean(0) @ emission_KV)),
        "type": float(entropy(type_GK @ emission_KV).mean()),
        "interest": float(type_GK.mean(0) @ entropy(emission_KV)),
    }
