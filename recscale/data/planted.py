"""A simulated event log whose Bayes-optimal losses are known exactly, so a fitted floor can be checked.

Hidden state: a user has a type g (uniform over the G types, fixed for life) and a current interest z. At the first
event z is drawn from the type's own distribution pi_g; at every later event z stays with probability `stay`, else it is
drawn again from pi_g. The item comes from the interest's own Zipf list with probability 1 - `noise`, else from one Zipf
list over the whole catalogue. A context column (`surface`), known before the item is chosen, shows the group of the
current interest with probability `context_reliability` and a uniform group otherwise. A feedback column (`like`)
is 1 with probability `like_own` where the item was drawn from the interest's own list, and `like_noise` where it came
from the list over the whole catalogue. Lengths, times and hidden states are independent of each other; where items are
born over time, emissions are renormalised over the items born so far.

The floors, by exact filtering, are in recscale.data.planted_floors.

Shapes: K interests, G types, V items (column v - 1 is item v), P periods, C context groups, N runs, E events, U users.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from recscale.data.event_log import Column, EventLog

CONTEXT = "surface"
LIKE = "like"
BLOCK_USERS = 1024  # users drawn from one seed; the last block is cut, so a smaller log is a prefix of a larger one
SMALLEST_SHARE = 1e-9  # of an interest in a type: no pi_g(z) is zero, so the filter may divide by it
BORN_AT_START = 0.5  # share of the catalogue that exists from the first period on, where items are born over time


@dataclasses.dataclass(frozen=True)
class Planted:
    """The simulator's settings. Raises ValueError where one is out of range.

    items_per_interest: length of each interest's list; lists are random, so they overlap and one event does not give
    the interest away. concentration: of the Dirichlet the types' pi_g come from (small = types differ much). Lengths
    are lognormal (median, sigma of the logarithm), clipped to length_min..length_max. context_reliability = 0: no
    context column. born: items are born over `periods` equal parts of the horizon (half exist from the start). Users
    start uniformly over `horizon` seconds; gaps are lognormal with mean `mean_gap` seconds. like_own and like_noise
    both 0: no feedback column; with one, everything else in the log stays as it is without.
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
    like_own: float = 0.0
    like_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("users", "interests", "types", "items_per_interest", "context_groups", "periods", "horizon"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.items_per_interest <= self.items, "items_per_interest", self.items_per_interest, "at most items")
        _require(self.context_groups <= self.interests, "context_groups", self.context_groups, "at most interests")
        _require(0 < self.stay < 1, "stay", self.stay, "in (0, 1)")
        for name in ("noise", "context_reliability", "like_own", "like_noise"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        _require(self.zipf >= 0, "zipf", self.zipf, "at least 0")
        _require(2 <= self.length_min <= self.length_max, "length_min", self.length_min, "in [2, length_max]")
        for name in ("concentration", "length_median", "mean_gap"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("length_sigma", "gap_sigma", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")

    @property
    def likes(self) -> bool:
        """Whether the log has a feedback column."""
        return self.like_own > 0 or self.like_noise > 0


class World(NamedTuple):
    """The true parameters. Row 0 of context_CK is the missing context, which says nothing."""

    type_GK: np.ndarray  # pi_g
    emission_PKV: np.ndarray  # p(item | period, interest)
    context_CK: np.ndarray  # [C + 1, K] p(context | interest)
    birth_V: np.ndarray  # period in which the item appears
    own_KV: np.ndarray  # p(drawn from the interest's own list | interest, item); [K, 0] without a feedback column


def _require(ok: bool, field: str, found: float, expected: str) -> None:
    if not ok:
        raise ValueError(f"Planted.{field}: found {found}, expected {expected}: change the value.")


def config_of(log: EventLog) -> Planted:
    """The settings a planted log was made with; raises ValueError where the log is not a planted one."""
    if "planted" not in log.facts:
        raise ValueError(f"{log.path}: facts hold no 'planted' settings: the floor is known for planted logs only.")
    return Planted(**log.facts["planted"])


def settings_of(config: Planted) -> dict[str, float]:
    """The fields of `config`, without those of feedback where there is none: a log is called what it always was."""
    fields = dataclasses.asdict(config)
    return fields if config.likes else {name: x for name, x in fields.items() if name not in ("like_own", "like_noise")}


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
    own_KV = _own_share(config, own_KV, mixed_KV) if config.likes else np.zeros((K, 0))

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
    return World(type_GK, emission_PKV, np.concatenate([np.ones((1, K)), context_CK]), birth_V, own_KV)


def _own_share(config: Planted, own_KV: np.ndarray, mixed_KV: np.ndarray) -> np.ndarray:
    """[K, V] share of an item's draws that come from the own list: the same in every period, as births cancel out."""
    share_KV = np.zeros_like(mixed_KV)
    return np.divide((1 - config.noise) * own_KV, mixed_KV, out=share_KV, where=mixed_KV > 0)


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

    Yields `length` [U]; `item_id` int32, `timestamp` int64 seconds, with a context `surface` int32 and with feedback
    `like` int8, all [E]; and the hidden `type` [U], `interest` [E] and, with feedback, `own` [E] (bool: drawn from the
    interest's own list), which are not part of the log.
    """
    true = world(config)
    interest_cdf, item_cdf = _stacked_cdf(true.type_GK), _stacked_cdf(true.emission_PKV.reshape(-1, config.items))
    for block, first in enumerate(range(0, config.users, BLOCK_USERS)):
        rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(1, block)))
        drawn = _block(config, interest_cdf, item_cdf, rng)
        if config.likes:
            rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(2, block)))
            drawn |= _feedback(config, true.own_KV, drawn, rng)
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


def _feedback(config: Planted, own_KV: np.ndarray, drawn: dict, rng: np.random.Generator) -> dict:
    """`own` and `like` of drawn events: which list an item came from is drawn last, given the item and the interest."""
    E = len(drawn["item_id"])
    own = rng.random(E) < own_KV[drawn["interest"], drawn["item_id"] - 1]
    like = rng.random(E) < np.where(own, config.like_own, config.like_noise)
    return {"own": own, LIKE: like.astype(np.int8)}


def generate(config: Planted) -> EventLog:
    """The event log of `config`, in memory. Same settings: same log, bit for bit; fewer users: a prefix of it.

    Item column `born` (int64 [V + 1]): first second of the item's first period. The settings are in facts["planted"].
    """
    parts = list(blocks(config))
    length = np.concatenate([part["length"] for part in parts])
    columns = {"item_id": Column("id"), "timestamp": Column("time")}
    if config.context_reliability > 0:
        columns[CONTEXT] = Column("context", config.context_groups + 1)
    if config.likes:
        columns[LIKE] = Column("feedback", 2)
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
