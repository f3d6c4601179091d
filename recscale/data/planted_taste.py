"""A simulated log in which a long history never stops paying, with the exact Bayes-optimal loss at every length.

A user has a taste p over K groups of items, drawn once from Dirichlet(concentration, .., concentration) and kept for
life. Every event is independent given the taste: a group from p, then an item of that group from the group's own Zipf
list of M items (groups do not share items). Seeing a history of n events with c_z of them in group z, the exact
predictive distribution of the next item is

    p(v) = (concentration + c_z) / (K concentration + n) * zipf_M(v | z)          z = group of v

whatever the order of the events. What a longer history saves falls like (K - 1) / (2 n) nats, so it still pays at
thousands of events. The simulator of planted.py cannot do that: with G types the excess over the full-history floor,
summed over all lengths, is at most ln G nats, so at n events it is at most ln G / n (.004 at 1,024 events, 64 types).

Shapes: K groups, M items of a group, V = K * M items (item v is 1-based), U users, T targets.
"""

import dataclasses

import numpy as np

from recscale.data.event_log import Column, EventLog
from recscale.data.splits import View

BLOCK_USERS = 256  # users drawn from one seed; the last block is cut, so a smaller log is a prefix of a larger one


@dataclasses.dataclass(frozen=True)
class Taste:
    """The simulator's settings. Raises ValueError where one is out of range.

    concentration: of the Dirichlet, per group; small = a user likes few groups. length: events of every user.
    """

    users: int
    length: int
    groups: int = 128
    items_per_group: int = 4
    concentration: float = 0.3
    zipf: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"users": 1, "length": 2, "groups": 2, "items_per_group": 1, "zipf": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"Taste.{name}: found {getattr(self, name)}, expected at least {low}.")
        if self.concentration <= 0:
            raise ValueError(f"Taste.concentration: found {self.concentration}, expected above 0.")

    @property
    def items(self) -> int:
        """V."""
        return self.groups * self.items_per_group


def config_of(log: EventLog) -> Taste:
    """The settings a log was made with; raises ValueError where the log is another one."""
    if "planted_taste" not in log.facts:
        raise ValueError(f"{log.path}: facts hold no 'planted_taste' settings: the floor is known for such logs only.")
    return Taste(**log.facts["planted_taste"])


def _world(config: Taste) -> tuple[np.ndarray, np.ndarray]:
    """(zipf_M, items_KM): the items of each group (a random partition of 1..V) and their shares, by rank."""
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(0,)))
    weights_M = np.arange(1, config.items_per_group + 1) ** -float(config.zipf)
    items_KM = 1 + rng.permutation(config.items).reshape(config.groups, config.items_per_group)
    return weights_M / weights_M.sum(), items_KM


def generate(config: Taste) -> EventLog:
    """The log of `config`, in memory: item_id only. Same settings: same log; fewer users: a prefix of it."""
    zipf_M, items_KM = _world(config)
    item_UL = np.empty((config.users, config.length), np.int32)
    for block, first in enumerate(range(0, config.users, BLOCK_USERS)):
        rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(1, block)))
        taste_BK = rng.dirichlet(np.full(config.groups, config.concentration), size=BLOCK_USERS)
        rank_BL = rng.choice(config.items_per_group, size=(BLOCK_USERS, config.length), p=zipf_M)
        for row in range(min(BLOCK_USERS, config.users - first)):
            group_L = np.searchsorted(np.cumsum(taste_BK[row]), rng.random(config.length) * (1 - 1e-12), side="right")
            item_UL[first + row] = items_KM[np.minimum(group_L, config.groups - 1), rank_BL[row]]
    return EventLog(
        offsets=config.length * np.arange(config.users + 1, dtype=np.int64),
        events={"item_id": item_UL.reshape(-1)},
        columns={"item_id": Column("id")},
        num_items=config.items,
        items={},
        facts={
            "source": "simulated by recscale.data.planted_taste",
            "licence": "Apache-2.0",
            "users": config.users,
            "items": config.items,
            "events": config.users * config.length,
            "planted_taste": dataclasses.asdict(config),
        },
    )


def next_item_nats(config: Taste, log: EventLog, view: View, history: int | None = None) -> np.ndarray:
    """-log p(item) in nats of each target of `view` under the exact predictive distribution; float64 [T], view order.

    history: the reader sees the last `history` events before a target (None: all from the example's start; 0: none).
    Raises ValueError for a view read as a window, a negative history, or a log these settings cannot make.
    """
    if view.reading != "next_item":
        raise ValueError(f"view {view.name}: reading is {view.reading!r}, expected 'next_item'.")
    if log.num_items != config.items:
        raise ValueError(f"{log.path}: {log.num_items} items, the settings have {config.items}: use config_of(log).")
    if history is not None and history < 0:
        raise ValueError(f"history: found {history}, expected None or at least 0.")
    zipf_M, items_KM = _world(config)
    group_V, share_V = np.empty(config.items + 1, np.int64), np.empty(config.items + 1)
    group_V[items_KM] = np.arange(config.groups)[:, None]
    share_V[items_KM] = zipf_M[None, :]
    items, nats = log.events["item_id"], []
    for start, target_start, stop in zip(view.start, view.target_start, view.stop, strict=True):
        run = np.asarray(items[start:stop])
        first, group = int(target_start - start), group_V[run]
        for at in range(first, len(run)):
            begin = 0 if history is None else max(0, at - history)
            count = int((group[begin:at] == group[at]).sum())
            p = (config.concentration + count) / (config.groups * config.concentration + at - begin)
            nats.append(-np.log(p * share_V[run[at]]))
    return np.array(nats)


def entropies(config: Taste) -> dict[str, float]:
    """Expected nats of the next item: nothing known but the world (`prior`), and the taste known (`taste`)."""
    zipf_M, _ = _world(config)
    within = float(-(zipf_M * np.log(zipf_M)).sum())
    K, a = config.groups, config.concentration
    return {"prior": float(np.log(K)) + within, "taste": digamma(K * a + 1) - digamma(a + 1) + within}


def digamma(x: float) -> float:
    """The digamma function of x > 0: the recurrence up to x >= 10, then the asymptotic series (error below 1e-12)."""
    total = 0.0
    while x < 10:
        total -= 1 / x
        x += 1
    y = 1 / x**2
    series = y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132))))
    return float(total + np.log(x) - 0.5 / x - series)
