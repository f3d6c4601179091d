"""Stochastic Length (arXiv 2402.17152, section 3.2): long histories are thinned in training, anew in every epoch.

With N = max_length and an example of n events: n <= N^(alpha/2) is left whole; a longer one keeps N^(alpha/2) of its
events with probability 1 - N^alpha / n^2 and all of them otherwise, so that attention costs O(N^alpha) an example
whatever n is. Events are drawn without replacement by the weights 1 - f_i / sum(f), f_i being the age of event i: the
paper's best, which favours recent events a little. Their order stays.

Two steps, since rows are packed by length: `kept_lengths` says how many events an example keeps, `kept_offsets` which.
Every draw is a hash of (seed, epoch, example, event): the same for any batch, process or order of reading.
"""

import numpy as np

from recscale.data.event_log import EventLogError
from recscale.data.hashing import uniform

_LENGTH_STREAM, _EVENT_STREAM = 0, 1


def thinned(max_length: int, alpha: float) -> int:
    """Events that a thinned example keeps: N^(alpha / 2), rounded; raises EventLogError for alpha outside (0, 2]."""
    if not 0.0 < alpha <= 2.0:
        raise EventLogError(f"stochastic length: alpha = {alpha}: expected 0 < alpha <= 2; 2 keeps every event")
    if max_length < 1:
        raise EventLogError(f"stochastic length: max_length = {max_length}: expected a positive integer")
    return max(1, round(max_length ** (alpha / 2)))


def thinning_probability(count: np.ndarray, max_length: int, alpha: float) -> np.ndarray:
    """Probability, float64 [N], that an example of `count` events is thinned; 0 up to N^(alpha / 2) events."""
    count = np.asarray(count, np.float64)
    chance = np.maximum(1.0 - float(max_length) ** alpha / np.maximum(count, 1.0) ** 2, 0.0)
    return np.where(count > thinned(max_length, alpha), chance, 0.0)


def kept_lengths(count: np.ndarray, max_length: int, alpha: float, *, seed: int, epoch: int = 0) -> np.ndarray:
    """How many events each of the N examples keeps, int64 [N], at least 1 where it has any.

    count: events of each example, int [N]. A loader whose packing plan holds for all epochs asks once, with the same
    epoch for ever; then only the choice of the events changes from epoch to epoch.
    """
    count = np.asarray(count, np.int64)
    drawn = uniform(seed, epoch, _LENGTH_STREAM, np.arange(len(count)), np.zeros(len(count), np.int64))
    return np.where(drawn < thinning_probability(count, max_length, alpha), thinned(max_length, alpha), count)


def kept_offsets(
    count: np.ndarray,
    kept: np.ndarray,
    *,
    seed: int,
    epoch: int | np.ndarray,
    example: np.ndarray,
    age: np.ndarray | None = None,
) -> np.ndarray:
    """Which events are kept: int64 [sum(kept)], offsets 0..count - 1, ascending inside each of the K examples.

    count, kept: events that each example has, and keeps (kept <= count); where they are equal all are kept. example:
    its number, int [K], so that any batch of examples draws the same; epoch: one, or one per example. age: of every
    event of these examples, >= 0, flat [sum(count)], in any unit (seconds before the example's end); default: events
    that follow it. Raises EventLogError where an example is to keep more than it has, or ages do not fit.
    """
    count, kept, example = (np.asarray(x, np.int64) for x in (count, kept, example))
    if np.any(kept > count):
        worst = int(np.argmax(kept - count))
        raise EventLogError(f"example {example[worst]}: to keep {kept[worst]} events, but it has {count[worst]}")
    if age is not None and (len(age) != count.sum() or (len(age) and np.min(age) < 0)):
        raise EventLogError(f"age: {len(age)} values for {count.sum()} events; expected one >= 0 for each")
    owner = np.repeat(np.arange(len(count)), count)
    begin = np.cumsum(count) - count
    offset = np.arange(len(owner)) - begin[owner]
    chosen = np.flatnonzero((kept < count)[owner])  # events of examples that are thinned
    if not len(chosen):
        return offset
    who, place = owner[chosen], offset[chosen]
    weight = _weights(who, (count[owner] - 1 - offset if age is None else np.asarray(age, np.float64))[chosen], count)
    epochs = np.broadcast_to(np.asarray(epoch, np.int64), count.shape)
    drawn = uniform(seed, epochs[who], _EVENT_STREAM, example[who], place)
    # The smallest exponential draws of rate `weight` are a weighted sample without replacement (Efraimidis, Spirakis).
    order = np.lexsort((-np.log1p(-drawn) / weight, who))
    first = np.searchsorted(who, np.arange(len(count)))  # `who` ascends
    rank = np.arange(len(who)) - first[who]  # of the sorted events: each example keeps its place in the order
    keep = np.ones(len(owner), bool)
    keep[chosen] = False
    keep[chosen[order[rank < kept[who]]]] = True
    return offset[keep]


def _weights(owner: np.ndarray, age: np.ndarray, count: np.ndarray) -> np.ndarray:
    """1 - f_i / sum(f) inside each example, never quite 0; 1 where all ages are 0."""
    total = np.bincount(owner, age, minlength=len(count))[owner]
    return np.maximum(1.0 - age / np.maximum(total, np.finfo(np.float64).tiny), 1e-9)
