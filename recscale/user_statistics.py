"""Metrics as functions of users: value, standard error clustered by user, and values under resampled users.

Users are independent, the rows of one user are not: so errors and resamples are about users. A resample gives each user
a weight (how often it was drawn); nothing is sorted again. U users, S sums, R resamples, P positives, N negatives.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Cell = tuple[float, float, int]
"""Value, standard error, number of cases."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """A metric that is a function of per-user sums: sums_US [U, S], value: totals [..., S] -> [...], n cases.

    value must not change when all totals are doubled. offset [S] is added to the totals (see `concordance`).
    """

    sums_US: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    n: int
    offset: np.ndarray | float = 0.0

    def cell(self) -> Cell:
        """Value, standard error and n; NaN where undefined. The error is the delta method over users."""
        total_S = self.sums_US.sum(axis=0) + self.offset
        with np.errstate(all="ignore"):
            value = float(self.value(total_S)) if self.n else float("nan")
            step_S = 1e-6 * np.maximum(np.abs(total_S), 1e-12)
            moves_SS = np.diag(step_S)
            slope_S = (self.value(total_S + moves_SS) - self.value(total_S - moves_SS)) / (2 * step_S)
            slope_S = np.where(np.any(self.sums_US != 0, axis=0), slope_S, 0.0)
            pull_U = self.sums_US @ slope_S
        return value, _clustered(pull_U[np.any(self.sums_US != 0, axis=1)]), self.n

    def resampled(self, weight_RU: np.ndarray) -> np.ndarray:
        """Values [R] where user u counts weight_RU[r, u] times; NaN where undefined."""
        return self.of_totals(weight_RU @ self.sums_US)

    def of_totals(self, total_RS: np.ndarray) -> np.ndarray:
        """Values [R] of weighted sums over users [R, S]; NaN where undefined."""
        with np.errstate(all="ignore"):
            return self.value(total_RS + self.offset)


@dataclasses.dataclass(frozen=True)
class Area:
    """AUC. lower_P, upper_P: for each positive the number of negatives below it, and below or equal.

    user_P, user_N: the user of each positive and of each negative, negatives in ascending order of score.
    """

    lower_P: np.ndarray
    upper_P: np.ndarray
    user_P: np.ndarray
    user_N: np.ndarray
    users: int

    @property
    def n(self) -> int:
        return len(self.user_P) + len(self.user_N)

    def cell(self) -> Cell:
        """AUC, its standard error (DeLong's, users as clusters: Obuchowski 1997) and the number of rows."""
        positives, negatives = len(self.user_P), len(self.user_N)
        if not positives or not negatives:
            return float("nan"), float("nan"), self.n
        win_P = (self.lower_P + self.upper_P) / 2.0 / negatives
        value = float(win_P.mean())
        above_N, level_N = (
            positives - np.cumsum(np.bincount(count_P, minlength=negatives + 1))[:negatives]
            for count_P in (self.lower_P, self.upper_P)
        )  # positives above each negative, and above or equal
        pull_U = np.bincount(self.user_P, win_P - value, self.users) / positives
        pull_U += np.bincount(self.user_N, (above_N + level_N) / 2.0 / positives - value, self.users) / negatives
        present_U = np.bincount(self.user_P, minlength=self.users) + np.bincount(self.user_N, minlength=self.users) > 0
        return value, _clustered(pull_U[present_U]), self.n

    def resampled(self, weight_RU: np.ndarray) -> np.ndarray:
        """AUC [R] where user u counts weight_RU[r, u] times: exact, in O(n) each; NaN without one of the classes."""
        values = np.full(len(weight_RU), np.nan)
        below_N = np.zeros(len(self.user_N) + 1)
        bounds = (self.lower_P,) if np.array_equal(self.lower_P, self.upper_P) else (self.lower_P, self.upper_P)
        for r, weight_U in enumerate(weight_RU):
            np.cumsum(weight_U.take(self.user_N), out=below_N[1:])
            weight_P = weight_U.take(self.user_P)
            pairs = weight_P.sum() * below_N[-1]
            if pairs > 0:  # einsum: a threaded dot of this length waits for its threads longer than it computes
                won = sum(float(np.einsum("p,p", weight_P, below_N.take(bound))) for bound in bounds)
                values[r] = won / len(bounds) / pairs
        return values


Statistic = Sums | Area


def mean_over_users(values: np.ndarray, user: np.ndarray, users: int) -> Sums:
    """Mean of values [n], clustered by user [n] in 0..users - 1; NaN values are left out."""
    known = ~np.isnan(values)
    return ratio_over_users(np.where(known, values, 0.0), known.astype(np.float64), user, users, int(known.sum()))


def ratio_over_users(above: np.ndarray, below: np.ndarray, user: np.ndarray, users: int, n: int | None = None) -> Sums:
    """Sum of above [n] over sum of below [n], clustered by user [n] in 0..users - 1. n: cases (None: rows)."""
    sums_US = np.stack([np.bincount(user, column, users) for column in (above, below)], axis=1)
    return Sums(sums_US, first_over_last, len(user) if n is None else n)


def first_over_last(total: np.ndarray) -> np.ndarray:
    """totals [..., S] -> [...]: the first over the last."""
    return np.divide(total[..., 0], total[..., -1])


def _clustered(pull_U: np.ndarray) -> float:
    """Standard error of a sum of independent pulls of zero mean, one per user; NaN for fewer than two users."""
    users = len(pull_U)
    return float(np.sqrt(users / (users - 1) * np.square(pull_U).sum())) if users > 1 else float("nan")
