"""Metrics of predicted feedback: order inside a request, a user and the whole, probability, calibration, regression.

The input is flat: one row per impression with its label, score, request and user (`scored` checks it). Every metric is
a `Sums` (a function of per-user sums) or an `Area` (AUC), so that three things come from one object: the value, its
standard error clustered by user (users are independent, impressions of one user are not), and the values under
resampled users without another sort. `summarise` and `statistics` take a head's kind and give all its metrics.

Order: a pair of rows with different labels agrees where the larger label has the larger score; equal scores count half.
`pair_accuracy` takes the pairs of one request, `gauc` those of one user (AUC of each user, weighted by impressions),
`auc` and `concordance` (also called XAUC) those of everybody. Only these and `ndcg` do not change under a growing map
of the scores. Everything is numpy in float64, in O(n log n), without a loop over rows.

A trap. `gauc`, `pair_accuracy` and `ndcg` set rows of one user against each other, and this is fair only where all of
them are scored from one state of the user (before the request for the pairs of a request, before the first of the rows
for GAUC). A score that has read the user's answers in between is pushed far below a half: who likes k of n has fewer
likes to come after each one (the bias of Miller and Sanjurjo, Econometrica 2018). On KuaiRand-Pure the user's running
click rate alone has AUC 0.66 and GAUC 0.25, with the labels shuffled inside each user too (0.67 and 0.24); frozen at
the cut its GAUC is 0.5, as it must be. `auc`, entropy and calibration do not care.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from recscale.agreement import agreements, mean_discount
from recscale.user_statistics import Area, Cell, Statistic, Sums, first_over_last, ratio_over_users

EPS = 1e-7  # probabilities are clipped to [EPS, 1 - EPS] where a logarithm is taken, and only there
BINS = 10


@dataclasses.dataclass(frozen=True)
class Scored:
    """label, score: float64 [n]. request: int64 [n], 0..R - 1, none of two users. user: int64 [n], 0..users - 1.

    base_rate: the constant that normalised entropy compares with; None = the rate of these labels.
    """

    label: np.ndarray
    score: np.ndarray
    request: np.ndarray
    user: np.ndarray
    users: int
    base_rate: float | None = None

    @functools.cached_property
    def in_request(self) -> tuple[np.ndarray, np.ndarray]:
        """Agreeing and all pairs of each row with the rows of its request."""
        return agreements(self.label, self.score, self.request)

    @functools.cached_property
    def in_user(self) -> tuple[np.ndarray, np.ndarray]:
        """Agreeing and all pairs of each row with the rows of its user."""
        return agreements(self.label, self.score, self.user)


def scored(
    label: np.ndarray,
    score: np.ndarray,
    request: np.ndarray,
    user: np.ndarray,
    base_rate: float | None = None,
    users: int | None = None,
) -> Scored:
    """Check flat arrays [n] and number their requests and users.

    request: any integers; the same number under two users is two requests. users: given where `user` is already
    0..users - 1 and several sets of rows are to share their resamples (one set per day, say). base_rate: in (0, 1).
    Raises ValueError on arrays of different lengths, on labels or scores that are not finite, on a wrong base rate.
    """
    arrays = {name: np.asarray(array) for name, array in
              (("label", label), ("score", score), ("request", request), ("user", user))}  # fmt: skip
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or arrays["label"].ndim != 1:
        raise ValueError(f"ranking metrics: shapes {shapes}, expected flat arrays of one length.")
    for name in ("label", "score"):
        arrays[name] = arrays[name].astype(np.float64)
        bad = ~np.isfinite(arrays[name])
        if bad.any():
            raise ValueError(f"ranking metrics: {int(bad.sum())} of {len(bad)} values of {name} are not finite.")
    if base_rate is not None and not 0 < base_rate < 1:
        raise ValueError(f"ranking metrics: base_rate={base_rate}, expected a number between 0 and 1.")
    names, place = np.unique(arrays["user"], return_inverse=True)
    if users is not None:
        if len(names) and (names[0] < 0 or names[-1] >= users):
            raise ValueError(f"ranking metrics: users {names[0]}..{names[-1]}, expected 0..{users - 1}.")
        place = arrays["user"].astype(np.int64)
    order = np.lexsort((arrays["request"], place))
    opens = (np.diff(place[order]) != 0) | (np.diff(arrays["request"][order]) != 0)
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(opens)])[: len(order)]
    count = len(names) if users is None else users
    return Scored(arrays["label"], arrays["score"], numbers, place, count, base_rate)


def pair_accuracy(data: Scored) -> Sums:
    """Share of agreeing pairs among all pairs of impressions of one request; n = pairs."""
    agree, pairs = data.in_request
    return _ratio(data, agree / 2, pairs / 2, round(pairs.sum() / 2))


def pair_accuracy_per_request(data: Scored) -> Sums:
    """Mean over requests of the share of agreeing pairs; n = requests with a pair (the others are left out)."""
    agree, pairs = data.in_request
    return _mean_over(data, data.request, agree, pairs)


def gauc(data: Scored) -> Sums:
    """Mean of the users' own AUC, weighted by impressions; n = users with both classes (the others are left out)."""
    agree, pairs = data.in_user
    agree_U, pairs_U, rows_U = (np.bincount(data.user, x, data.users) for x in (agree, pairs, np.ones(len(pairs))))
    weight_U = np.where(pairs_U > 0, rows_U, 0.0)
    auc_U = np.divide(agree_U, pairs_U, out=np.zeros(data.users), where=pairs_U > 0)
    return Sums(np.stack([weight_U * auc_U, weight_U], axis=1), first_over_last, int((pairs_U > 0).sum()))


def gauc_users_left_out(data: Scored) -> Sums:
    """Share of the users whose labels are all equal, so that `gauc` leaves them out; n = users."""
    _, pairs = data.in_user
    present_U = np.bincount(data.user, minlength=data.users) > 0
    left_U = present_U & (np.bincount(data.user, pairs, data.users) == 0)
    return Sums(np.stack([left_U, present_U], axis=1).astype(np.float64), first_over_last, int(present_U.sum()))


def auc(data: Scored) -> Area:
    """Area under the ROC curve over all rows, ties exactly a half. Labels 0/1; raises ValueError on others."""
    _binary(data, "auc")
    order = np.argsort(data.score, kind="stable")
    positive = data.label[order] == 1
    score, user = data.score[order], data.user[order]
    lower, upper = (np.searchsorted(score[~positive], score[positive], side) for side in ("left", "right"))
    return Area(lower, upper, user[positive], user[~positive], data.users)


def concordance(data: Scored) -> Sums:
    """Pair accuracy over the pairs of all rows (XAUC, the C-index; AUC where labels are 0/1); n = rows.

    A resample takes the first-order term of each user (a user's pairs with everybody) and not all pairs anew.
    """
    agree, pairs = agreements(data.label, data.score, np.zeros(len(data.label), np.int64))
    sums_US = _by_user(data, agree, pairs)
    return Sums(sums_US, first_over_last, len(agree), offset=-sums_US.sum(axis=0) / 2)


def ndcg(data: Scored, k: int | None = None) -> Sums:
    """Mean over requests of DCG / ideal DCG, gain = label, discount 1 / log2(place + 1) for places <= k (None: all).

    Rows of equal score share the mean discount of their places. Requests whose labels are all equal are left out (any
    order is ideal); n = the others. Labels >= 0; raises ValueError on others.
    """
    if data.label.size and data.label.min() < 0:
        raise ValueError(f"ndcg: labels from {data.label.min():g}, expected gains of at least 0.")
    _, pairs = data.in_request
    gain = data.label * mean_discount(data.request, data.score, k)
    ideal = data.label * mean_discount(data.request, data.label, k)
    return _mean_over(data, data.request, gain, np.where(pairs > 0, ideal, 0.0))


def log_loss(data: Scored) -> Sums:
    """Mean cross-entropy in nats, probabilities clipped to [EPS, 1 - EPS]; n = rows. Labels 0/1, scores in [0, 1]."""
    return _ratio(data, _cross_entropy(data, "log_loss"), np.ones(len(data.label)), len(data.label))


def normalised_entropy(data: Scored) -> Sums:
    """Cross-entropy over that of a constant prediction; n = rows; below 1 is better than the constant.

    The constant is base_rate (that of training, say), or the rate of these labels: then what divides is their entropy
    (He et al., ADKDD 2014, with the rate of the evaluated labels).
    """
    positive = data.label == 1
    sums_US = _by_user(data, _cross_entropy(data, "normalised_entropy"), positive, ~positive)
    return Sums(sums_US, lambda total: _over_constant(total, data.base_rate), len(data.label))


def calibration_ratio(data: Scored) -> Sums:
    """Sum of predictions over sum of labels; 1 is right, above is too high; n = rows."""
    return _ratio(data, data.score, data.label, len(data.label))


def calibration_error(data: Scored, bins: int = BINS) -> Sums:
    """Expected calibration error: mean over rows of |mean prediction - mean label| of the row's bin; n = rows.

    Bins hold equally many rows, in order of score; they stay where they are when users are resampled. A few rows give
    an error above 0 even to a calibrated model: read it beside that of another model on the same rows.
    """
    _probability(data, "calibration_error")
    place = data.user * bins + _bins(data, bins)
    miss_UB = np.bincount(place, data.score - data.label, data.users * bins).reshape(data.users, bins)
    rows_U1 = np.bincount(data.user, minlength=data.users)[:, None].astype(np.float64)
    return Sums(np.concatenate([miss_UB, rows_U1], axis=1), _error_of_bins, len(data.label))


def calibration_curve(data: Scored, bins: int = BINS) -> dict[str, np.ndarray]:
    """The points of the curve, one per bin of equally many rows: mean `predicted`, mean `observed`, `stderr`, `count`.

    stderr: of the observed mean, clustered by user. Arrays [<= bins]; empty bins are left out.
    """
    place = _bins(data, bins)
    count = np.bincount(place, minlength=bins)
    kept = np.flatnonzero(count)
    observed = [_ratio(data, data.label * (place == b), place == b, int(count[b])).cell() for b in kept]
    predicted = np.bincount(place, data.score, bins)[kept] / count[kept]
    return {
        "predicted": predicted,
        "observed": np.array([cell[0] for cell in observed]),
        "stderr": np.array([cell[1] for cell in observed]),
        "count": count[kept],
    }


def mse(data: Scored) -> Sums:
    """Mean squared error; n = rows."""
    return _ratio(data, np.square(data.score - data.label), np.ones(len(data.label)), len(data.label))


METRICS: Mapping[str, Callable[[Scored], Statistic]] = {
    "auc": auc,
    "gauc": gauc,
    "gauc_users_left_out": gauc_users_left_out,
    "concordance": concordance,
    "pair_accuracy": pair_accuracy,
    "pair_accuracy_per_request": pair_accuracy_per_request,
    "ndcg_in_request": ndcg,
    "log_loss": log_loss,
    "normalised_entropy": normalised_entropy,
    "calibration_ratio": calibration_ratio,
    "calibration_error": calibration_error,
    "mse": mse,
}
"""Name -> f(data)."""

_IN_REQUEST = ("pair_accuracy", "pair_accuracy_per_request", "ndcg_in_request")
_BINARY = ("log_loss", "normalised_entropy", "calibration_ratio", "calibration_error")
HEADS: Mapping[str, tuple[str, ...]] = {
    "binary": ("auc", "gauc", "gauc_users_left_out", *_IN_REQUEST, *_BINARY),
    "ordinal": ("concordance", *_IN_REQUEST, "mse", "calibration_ratio"),
    "regression": ("concordance", *_IN_REQUEST, "mse", "calibration_ratio"),
    "score": ("concordance", "gauc", "gauc_users_left_out", *_IN_REQUEST),
}
"""Kind of a head -> its metrics. binary: labels 0/1, scores are probabilities; ordinal and regression: scores are
expected values; score: they order, and that is all."""


def statistics(kind: str, data: Scored) -> dict[str, Statistic]:
    """Every metric of a head's kind (a key of HEADS) as an object; raises ValueError on a kind that does not exist."""
    if kind not in HEADS:
        raise ValueError(f"head kind {kind!r}: expected one of {', '.join(HEADS)}.")
    return {name: METRICS[name](data) for name in HEADS[kind]}


def summarise(
    kind: str,
    label: np.ndarray,
    score: np.ndarray,
    request: np.ndarray,
    user: np.ndarray,
    base_rate: float | None = None,
) -> dict[str, Cell]:
    """Every metric of a head: name -> (value, standard error, n); NaN where undefined. Arrays as for `scored`."""
    found = statistics(kind, scored(label, score, request, user, base_rate))
    return {name: statistic.cell() for name, statistic in found.items()}


def _ratio(data: Scored, above: np.ndarray, below: np.ndarray, n: int) -> Sums:
    return ratio_over_users(above, below, data.user, data.users, n)


def _mean_over(data: Scored, group: np.ndarray, above: np.ndarray, below: np.ndarray) -> Sums:
    """Mean over the groups (each of one user) of sum of `above` / sum of `below`, where that is not zero."""
    above_G, below_G = np.bincount(group, above), np.bincount(group, below)
    user_G = np.zeros(len(below_G), np.int64)
    user_G[group] = data.user
    kept = below_G > 0
    share_G = np.divide(above_G, below_G, out=np.zeros(len(below_G)), where=kept)
    sums_US = np.stack([np.bincount(user_G, values, data.users) for values in (share_G, kept)], axis=1)
    return Sums(sums_US, first_over_last, int(kept.sum()))


def _by_user(data: Scored, *columns: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(data.user, column, data.users) for column in columns], axis=1)


def _over_constant(total: np.ndarray, base_rate: float | None) -> np.ndarray:
    """total [..., 3]: cross-entropy, positives, negatives."""
    loss, positive, negative = total[..., 0], total[..., 1], total[..., 2]
    rate = positive / (positive + negative) if base_rate is None else base_rate
    return loss / -(positive * np.log(rate) + negative * np.log1p(-rate))


def _error_of_bins(total: np.ndarray) -> np.ndarray:
    """total [..., bins + 1]: prediction minus label summed over each bin, rows."""
    return np.abs(total[..., :-1]).sum(axis=-1) / total[..., -1]


def _bins(data: Scored, bins: int) -> np.ndarray:
    """int64 [n]: bin of equally many rows by score; equal scores share the bin of their middle place."""
    ordered, n = np.sort(data.score), len(data.score)
    low, high = (np.searchsorted(ordered, data.score, side) for side in ("left", "right"))
    return (low + high - 1) * bins // (2 * max(n, 1))


def _cross_entropy(data: Scored, name: str) -> np.ndarray:
    _probability(data, name)
    chance = np.clip(data.score, EPS, 1 - EPS)
    return -np.where(data.label == 1, np.log(chance), np.log1p(-chance))


def _binary(data: Scored, name: str) -> None:
    other = (data.label != 0) & (data.label != 1)
    if other.any():
        raise ValueError(f"{name}: {int(other.sum())} labels are not 0 or 1, the first is {data.label[other][0]:g}.")


def _probability(data: Scored, name: str) -> None:
    _binary(data, name)
    outside = (data.score < 0) | (data.score > 1)
    if outside.any():
        raise ValueError(
            f"{name}: {int(outside.sum())} scores are not probabilities, the first is {data.score[outside][0]:g}."
        )
