"""Features switched on one by one, in random orders, so that the order of adding does not decide what each one buys.

A cell of such a study is a SET of features; an ordering is a chain of nested cells from no feature to all of them, and
orderings share their cells. The gain of a feature is what the loss falls by when it is switched on, averaged over the
orderings: over all of them it is its Shapley value, and in any case the gains add up to the gain of all features
together. Intervals come from a bootstrap that draws users and orderings, both with replacement, with the same drawn
users in every cell (Owen 2007, "The pigeonhole bootstrap"); orderings are not drawn where all of them were run, and
one ordering alone says nothing of the others.

    chains = orders(FEATURES, count=4, seed=0)
    names = {name_of(cell): cell for cell in cells(FEATURES, 4, seed=0)}          # the runs of a study
    found = answer(chains, measured({cell: [runs / f"{name}-s0"] for name, cell in names.items()}))

Shapes: F features, O orderings, C cells, T targets, U users, R resamples.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Cell = frozenset[str]
Order = tuple[str, ...]
Arrays = Mapping[str, np.ndarray]

LEVEL = 0.90
ALL_LISTED = 7  # features up to which the orderings are listed and shuffled; beyond, they are drawn until they differ
CHUNK = 64  # resamples whose weights are held at a time


def orders(features: Sequence[str], count: int, seed: int = 0) -> list[Order]:
    """`count` different random orderings, all F! where there are no more. A larger count begins with the smaller's."""
    _check_features(features)
    if count < 1:
        raise ValueError(f"orders: count = {count}, expected at least 1")
    rng = np.random.default_rng(seed)
    if len(features) <= ALL_LISTED:
        listed = list(itertools.permutations(features))
        return [listed[i] for i in rng.permutation(len(listed))[:count]]
    found: dict[Order, None] = {}
    while len(found) < min(count, math.factorial(len(features))):
        found[tuple(features[i] for i in rng.permutation(len(features)))] = None
    return list(found)


def cells(features: Sequence[str], count: int, seed: int = 0) -> list[Cell]:
    """The cells of `count` orderings, each once, fewest features first: the runs to make."""
    chained = dict.fromkeys(cell for order in orders(features, count, seed) for cell in chain(order))
    return sorted(chained, key=len)


def affordable(features: Sequence[str], budget: int, seed: int = 0) -> int:
    """How many orderings a budget of cells pays for; raises ValueError where it does not pay for one.

    More orderings need more cells, but never more than 2^F.
    """
    _check_features(features)
    if budget < len(features) + 1:
        raise ValueError(f"a budget of {budget} cells: one ordering of {len(features)} needs {len(features) + 1}")
    seen: set[Cell] = set()
    most = math.factorial(len(features)) if budget >= 2 ** len(features) else budget
    for count, order in enumerate(orders(features, most, seed)):
        seen |= set(chain(order))
        if len(seen) > budget:
            return count
    return most


def chain(order: Order) -> list[Cell]:
    """The nested cells of an ordering: no feature, the first, the first two, .., all."""
    return [frozenset(order[:k]) for k in range(len(order) + 1)]


def name_of(cell: Cell) -> str:
    """A name for the run of a cell that does not depend on the order: "none", or the features sorted, joined by +.

    A slash, as in "items/author", becomes a hyphen: the name may be that of a folder.
    """
    return "+".join(sorted(cell)).replace("/", "-") or "none"


def nats(arrays: Arrays) -> np.ndarray:
    """The loss of each target in a per-target file of next-item prediction."""
    return arrays["nats"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Losses by cell: mean_CU, each cell's mean loss of each user, cells in order; targets_U: targets of each user."""

    cells: tuple[Cell, ...]
    mean_CU: np.ndarray
    targets_U: np.ndarray

    @property
    def loss_C(self) -> np.ndarray:
        """Mean loss of each cell over all targets."""
        return self.mean_CU @ self.targets_U / self.targets_U.sum()


def measured(
    runs: Mapping[Cell, Sequence[str | Path]], split: str = "test", loss: Callable[[Arrays], np.ndarray] = nats
) -> Measured:
    """Losses of the finished runs of each cell (several: seeds, averaged), from their per_target_SPLIT.npz.

    loss: from the arrays of such a file to [T], smaller is better. Cells without a finished run are left out. Raises
    ValueError where the runs' targets differ.
    """
    tables: dict[Cell, list[np.ndarray]] = {}
    first: tuple[Path, np.ndarray, np.ndarray] | None = None
    for cell, folders in runs.items():
        for path in (Path(folder) / f"per_target_{split}.npz" for folder in folders):
            if not path.is_file():
                continue
            with np.load(path) as arrays:
                rows, users = arrays["row"], arrays["user" if "user" in arrays else "example"]
                first = first or (path, rows, users)
                if not (np.array_equal(rows, first[1]) and np.array_equal(users, first[2])):
                    raise ValueError(f"{path}: its targets are not those of {first[0]}: evaluate both on the same ones")
                tables.setdefault(cell, []).append(np.asarray(loss(arrays), np.float64))
    if first is None:
        raise ValueError(f"feature orders: no run of {len(runs)} cells has a per_target_{split}.npz yet")
    return of_targets({cell: np.mean(losses, axis=0) for cell, losses in tables.items()}, first[2])


def of_targets(losses: Mapping[Cell, np.ndarray], user_T: np.ndarray) -> Measured:
    """From losses [T] by cell, of targets whose users are user_T; raises ValueError for losses that are not finite."""
    for cell, loss_T in losses.items():
        if loss_T.shape != user_T.shape or not np.isfinite(loss_T).all():
            raise ValueError(f"cell {name_of(cell)}: {loss_T.shape} losses, expected {user_T.shape}, all finite")
    _, place_T = np.unique(user_T, return_inverse=True)
    targets_U = np.bincount(place_T).astype(np.float64)
    mean_CU = np.stack([np.bincount(place_T, weights=loss_T) / targets_U for loss_T in losses.values()])
    return Measured(tuple(losses), mean_CU, targets_U)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 90 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Gain(Estimate):
    """What a feature lowers the loss by, averaged over the orderings; least, most: over the orderings."""

    feature: str
    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the orderings say.

    gains: largest first; they add up to total. loss, saved: [F + 1] with 0, 1, .. F features on, averaged over the
    orderings, and what that is below no feature. used: complete orderings; missing: the others and the cells that they
    lack; exact: all F! are there, so the gains are Shapley values.
    """

    gains: tuple[Gain, ...]
    total: Estimate
    loss: tuple[Estimate, ...]
    saved: tuple[Estimate, ...]
    used: tuple[Order, ...]
    missing: Mapping[Order, tuple[Cell, ...]]
    exact: bool
    users: int


def answer(chains: Sequence[Order], found: Measured, resamples: int = 1000, seed: int = 0) -> Answer:
    """Gains, curve and intervals of the orderings whose cells are all measured; raises ValueError where none is."""
    place = {cell: i for i, cell in enumerate(found.cells)}
    missing = {order: tuple(cell for cell in chain(order) if cell not in place) for order in chains}
    missing = {order: lacking for order, lacking in missing.items() if lacking}
    used = tuple(dict.fromkeys(order for order in chains if order not in missing))
    if not used:
        nearest = min(missing.values(), key=len)
        lacking = ", ".join(map(name_of, nearest))
        raise ValueError(f"feature orders: none of {len(chains)} orderings is complete; the nearest lacks {lacking}")
    if len({frozenset(order) for order in chains}) > 1:
        raise ValueError("feature orders: the orderings are not all of the same features")
    features = sorted(used[0])
    exact = len(used) == math.factorial(len(features))
    path_OK = np.array([[place[cell] for cell in chain(order)] for order in used])
    slot_OF = np.array([[order.index(feature) for feature in features] for order in used])

    whole = np.ones(len(used)) / len(used)
    gain_F, loss_K = _averaged(found.loss_C, path_OK, slot_OF, whole)
    draws = [
        _averaged(loss_C, path_OK, slot_OF, whole if exact else _drawn(len(used), seed, r))
        for r, loss_C in enumerate(_resampled(found, resamples, seed))
    ]
    gain_RF, loss_RK = (np.stack(side) for side in zip(*draws, strict=True))
    step_OF = -np.take_along_axis(np.diff(found.loss_C[path_OK], axis=1), slot_OF, axis=1)
    gains = [
        Gain(*_interval(gain_F[f], gain_RF[:, f]), feature, float(step_OF[:, f].min()), float(step_OF[:, f].max()))
        for f, feature in enumerate(features)
    ]
    saved_K, saved_RK = loss_K[0] - loss_K, loss_RK[:, :1] - loss_RK
    return Answer(
        gains=tuple(sorted(gains, key=lambda gain: -gain.value)),
        total=Estimate(*_interval(saved_K[-1], saved_RK[:, -1])),
        loss=tuple(Estimate(*_interval(loss_K[k], loss_RK[:, k])) for k in range(len(loss_K))),
        saved=tuple(Estimate(*_interval(saved_K[k], saved_RK[:, k])) for k in range(len(loss_K))),
        used=used,
        missing=missing,
        exact=exact,
        users=len(found.targets_U),
    )


def table(found: Answer) -> list[dict[str, Any]]:
    """One row a feature, then one of all of them together."""
    rows = [{"feature": gain.feature, **_columns(gain), "least": gain.least, "most": gain.most} for gain in found.gains]
    return [*rows, {"feature": "all together", **_columns(found.total), "least": "", "most": ""}]


def sentence(found: Answer, unit: str = "nats/event") -> str:
    """What the orderings say, in plain words."""
    rows = "; ".join(f"{g.feature} {g.value:+.4f} ({g.low:.4f} to {g.high:.4f})" for g in found.gains)
    how = "all orderings, so these are Shapley values" if found.exact else f"{len(found.used)} random orderings"
    short = f" {len(found.missing)} orderings are not complete and left out." if found.missing else ""
    total = found.total
    return (
        f"All {len(found.gains)} features lower the loss by {total.value:.4f} {unit} (90 % {total.low:.4f} to "
        f"{total.high:.4f}). Of that, over {how} and {found.users:,} users: {rows}.{short}"
    )


def _columns(estimate: Estimate) -> dict[str, float]:
    return {"gain": estimate.value, "low": estimate.low, "high": estimate.high}


def _check_features(features: Sequence[str]) -> None:
    if not features or len(set(features)) < len(features):
        raise ValueError(f"feature orders: {list(features)}, expected at least one name, each once")


def _averaged(loss_C: np.ndarray, path_OK: np.ndarray, slot_OF: np.ndarray, weight_O: np.ndarray) -> tuple:
    """(gain [F], loss [F + 1]) averaged over the orderings."""
    loss_OK = loss_C[path_OK]
    step_OF = np.take_along_axis(-np.diff(loss_OK, axis=1), slot_OF, axis=1)
    return weight_O @ step_OF, weight_O @ loss_OK


def _resampled(found: Measured, resamples: int, seed: int) -> np.ndarray:
    """The cells' losses [R, C] over users drawn with replacement, the same draws in every cell."""
    rng, users = np.random.default_rng((seed, 0)), len(found.targets_U)
    if users < 2:
        raise ValueError(f"feature orders: {users} user, expected at least 2 to tell an interval")
    losses = []
    for first in range(0, resamples, CHUNK):
        drawn = [rng.integers(0, users, users) for _ in range(min(CHUNK, resamples - first))]
        weight_RU = np.stack([np.bincount(user, minlength=users) for user in drawn]) * found.targets_U
        losses.append(weight_RU @ found.mean_CU.T / weight_RU.sum(1, keepdims=True))
    return np.concatenate(losses)


def _drawn(count: int, seed: int, resample: int) -> np.ndarray:
    """Shares [O] of orderings drawn with replacement."""
    drawn = np.random.default_rng((seed, 1, resample)).integers(0, count, count)
    return np.bincount(drawn, minlength=count) / count


def _interval(value: float, draws_R: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(draws_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(value), float(low), float(high)
