"""Counts and sums over strictly earlier events: past rates of a user, an item, an author that hold nothing of now."""

import numpy as np

UNIT = 2.0**-20  # values are added as whole multiples of this: sums are exact, in any order


def earlier(key: np.ndarray, time: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each event: how many events of the same key have a strictly smaller time, and the sum of their values.

    key, time: int [n], in any order; values: [n] or [n, F]. An event of the same moment counts for nothing, so neither
    the event itself nor its copy, nor another item of the same request. Values are rounded to 2^-20 first: sums of
    floats would carry later events and other keys in their last digits. Returns float64 [n] and [n] or [n, F].
    """
    order = np.lexsort((time, key))
    new_key = np.ones(len(order), bool)
    new_key[1:] = key[order[1:]] != key[order[:-1]]
    new_moment = new_key.copy()
    new_moment[1:] |= time[order[1:]] != time[order[:-1]]
    place = np.arange(len(order))
    of_key, of_moment = (np.maximum.accumulate(np.where(opens, place, 0)) for opens in (new_key, new_moment))
    before = np.zeros((len(order) + 1, *values.shape[1:]), np.int64)
    np.cumsum(np.rint(values[order] / UNIT).astype(np.int64), axis=0, out=before[1:])
    count, total = np.empty(len(order)), np.empty(values.shape)
    count[order] = of_moment - of_key
    total[order] = (before[of_moment] - before[of_key]) * UNIT
    return count, total


def past_rates(key: np.ndarray, time: np.ndarray, values: np.ndarray, prior: float = 20.0) -> np.ndarray:
    """float64 [n, F]: mean of values [n, F] over the strictly earlier events of the key, smoothed.

    `prior` events of the mean over everybody's strictly earlier events are added (0 before the first event of all).
    """
    everyone, whole = earlier(np.zeros_like(key), time, values)
    count, total = earlier(key, time, values)
    mean = whole / np.maximum(everyone, 1.0)[:, None]
    return (total + prior * mean) / (count + prior)[:, None]
