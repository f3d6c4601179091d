"""Ranking metrics from exact ranks (one target per query) and from top lists (several targets per user).

Everything here is numpy in float64 and returns one value per target or per user, so that slices, standard errors and
paired bootstraps are taken from the same arrays. A rank is 1 for the best item of the whole catalogue and has no cap.

Several targets per user: three definitions are in circulation for Yambda (arXiv 2505.22238 and later code), and they
differ by more than most models do. They have three names here: `ndcg_ratio_of_means` with `recall` (the paper's
tables), `ndcg_mean_of_ratios` with `recall_capped` (the later code), `ndcg_over_hits` (a copy of the later code whose
ideal DCG is that of the hits themselves: it is 1 for any hit). The number of targets counts repeats; a hit does not.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


class NonFiniteScore(ValueError):
    """A score was NaN or infinite: the model or the tables diverged."""


def hit_rate(rank: np.ndarray, k: int) -> np.ndarray:
    """1 where the target is among the first k, else 0. rank: int [n], 1 = best. Returns float64 [n]."""
    return (_checked(rank) <= k).astype(np.float64)


def ndcg(rank: np.ndarray, k: int) -> np.ndarray:
    """NDCG of a single target: 1 / log2(rank + 1) where rank <= k, else 0. rank: int [n]. Returns float64 [n]."""
    rank = _checked(rank)
    return np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)


def shared_hit_rate(rank: np.ndarray, bucket: np.ndarray, k: int) -> np.ndarray:
    """Chance that the target is among the first k, float64 [n]: its rank is any of rank .. rank + bucket - 1 alike.

    rank, bucket: int [n]; for items that share a place in the ranking. bucket = 1: `hit_rate`.
    """
    return np.clip((k - _checked(rank) + 1) / bucket, 0.0, 1.0)


def shared_ndcg(rank: np.ndarray, bucket: np.ndarray, k: int) -> np.ndarray:
    """Expected NDCG of the same target, float64 [n]. bucket = 1: `ndcg`."""
    gains = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(1, k + 1) + 1.0))])
    _checked(rank)
    first, last = (np.clip(edge, 0, k) for edge in (rank - 1, rank + bucket - 1))
    return (gains[last] - gains[first]) / bucket


def reciprocal_rank(rank: np.ndarray) -> np.ndarray:
    """1 / rank, without a cap. rank: int [n]. Returns float64 [n]."""
    return 1.0 / _checked(rank)


def coverage(top_lists: np.ndarray, num_items: int, k: int) -> float:
    """Share of the catalogue that appears in anybody's first k. top_lists: int [n, >= k] item ids, best first; 0 is
    an empty place (a catalogue with fewer than k items left to show). Raises ValueError where the lists are too short.
    """
    if top_lists.shape[1] < k:
        raise ValueError(f"coverage@{k}: the top lists hold {top_lists.shape[1]} items; ask for top_k >= {k}.")
    shown = np.zeros(num_items + 1, bool)
    shown[top_lists[:, :k]] = True
    return float(shown[1:].sum() / num_items)


def mean_and_stderr(values: np.ndarray) -> tuple[float, float, int]:
    """Mean, standard error of the mean (sample standard deviation / sqrt(n)) and n over the values that are not NaN.

    The mean is NaN where n = 0 and the standard error is NaN where n < 2.
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    n = len(values)
    mean = float(values.mean()) if n else float("nan")
    stderr = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return mean, stderr, n


def ratio_and_stderr(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float, int]:
    """Ratio of two means over the same users, its standard error (linearised: the spread of numerator - ratio x
    denominator) and n. Both float64 [n] without NaN; NaN where n = 0 or the denominators sum to zero."""
    n = len(numerator)
    if n == 0 or denominator.sum() == 0:
        return float("nan"), float("nan"), n
    ratio = float(numerator.sum() / denominator.sum())
    _, stderr, _ = mean_and_stderr(numerator - ratio * denominator)
    return ratio, stderr / float(denominator.mean()), n


def hits_in_lists(top_lists: np.ndarray, user: np.ndarray, item: np.ndarray, num_items: int) -> np.ndarray:
    """Which places of each user's top list hold one of the user's targets.

    top_lists: int [n, K] item ids, best first. user, item: int [t], the targets as pairs, user in 0..n - 1; repeats are
    fine. num_items: V. Returns bool [n, K].
    """
    width = np.int64(num_items + 1)
    keys_NK = np.arange(len(top_lists), dtype=np.int64)[:, None] * width + top_lists
    return np.isin(keys_NK, user.astype(np.int64) * width + item) & (top_lists > 0)


def dcg(hits: np.ndarray, k: int) -> np.ndarray:
    """Sum of 1 / log2(place + 1) over the hits among the first k places. hits: bool [n, K]. Returns float64 [n]."""
    hits = _first(hits, k)
    return (hits / np.log2(np.arange(k, dtype=np.float64) + 2.0)[None]).sum(axis=1)


def ideal_dcg(num_targets: np.ndarray, k: int) -> np.ndarray:
    """DCG of min(k, targets) hits in the first places. num_targets: int [n], repeats counted. Returns float64 [n]."""
    gains = np.cumsum(1.0 / np.log2(np.arange(k, dtype=np.float64) + 2.0))
    return np.where(num_targets > 0, gains[np.clip(num_targets, 1, k) - 1], 0.0)


def ndcg_mean_of_ratios(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """DCG / ideal DCG of each user. hits: bool [n, K]; num_targets: int [n]. Returns float64 [n]; 0 without targets."""
    return _ratio(dcg(hits, k), ideal_dcg(num_targets, k))


def ndcg_over_hits(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """DCG over the DCG of the same hits: an indicator of any hit. Kept only to read numbers that were made this way."""
    return np.asarray(_first(hits, k).any(axis=1), np.float64)


def recall(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """Hits among the first k over the number of targets, no cap. hits: bool [n, K]; num_targets: int [n], repeats
    counted. Returns float64 [n]; 0 without targets."""
    return _ratio(_first(hits, k).sum(axis=1), num_targets)


def recall_capped(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """Hits among the first k over min(targets, k). hits: bool [n, K]; num_targets: int [n]. Returns float64 [n]."""
    return _ratio(_first(hits, k).sum(axis=1), np.minimum(num_targets, k))


def precision(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """Hits among the first k over k. hits: bool [n, K]. Returns float64 [n]."""
    return _first(hits, k).sum(axis=1) / float(k)


def ndcg_ratio_of_means(hits: np.ndarray, num_targets: np.ndarray, k: int) -> tuple[float, float, int]:
    """Mean DCG over mean ideal DCG (the Yambda paper's tables): value, standard error, n."""
    return ratio_and_stderr(dcg(hits, k), ideal_dcg(num_targets, k))


METRICS: Mapping[str, Callable[..., np.ndarray]] = {"hr": hit_rate, "ndcg": ndcg, "mrr": reciprocal_rank}
"""One target per query: name -> f(rank, k), or f(rank) for mrr. Recall of a single target is `hr`."""

SHARED_METRICS: Mapping[str, Callable[..., np.ndarray]] = {"hr": shared_hit_rate, "ndcg": shared_ndcg}
"""The same where items share a place: name -> f(rank, bucket, k)."""

SET_METRICS: Mapping[str, Callable[..., np.ndarray]] = {
    "ndcg_mean_of_ratios": ndcg_mean_of_ratios,
    "ndcg_over_hits": ndcg_over_hits,
    "recall": recall,
    "recall_capped": recall_capped,
    "precision": precision,
}
"""Several targets per user: name -> f(hits, num_targets, k), one value per user (`ndcg_ratio_of_means` has none)."""


PROTOCOLS: Mapping[str, str] = {"full": "", "unseen": "/unseen", "dreamrec_legacy": "/dreamrec_legacy"}
"""Ranking protocol -> what its metric names end with. The last is for task "denoising", see evaluate_denoised.py."""


def column(kind: str, protocol: str) -> str:
    """Name of a per-target array: `rank`, `rank_unseen`, `hits`, `hits_unseen`."""
    return kind if protocol == "full" else f"{kind}_{protocol}"


def summarise(
    per_target: Mapping[str, np.ndarray], lists: Mapping[str, np.ndarray], num_items: int, ks: Sequence[int]
) -> dict[str, tuple[float, float, int]]:
    """Every metric that the arrays allow: name -> (value, standard error, n); NaN where undefined.

    per_target: `nats` [n] and, per protocol, `rank*` int [n] or `hits*` bool [n, K] with `num_targets` [n]. lists:
    protocol -> top lists [n, K] for the coverage at each k <= K. ks: cut-offs. Names are `hr@10`, `hr@10/unseen`, ...
    """
    cells = {"nats": mean_and_stderr(per_target["nats"])}
    for protocol, suffix in PROTOCOLS.items():
        ranks, hits = (per_target.get(column(kind, protocol)) for kind in ("rank", "hits"))
        for k in ks:
            if ranks is not None:
                for name in ("hr", "ndcg"):
                    cells[f"{name}@{k}{suffix}"] = mean_and_stderr(METRICS[name](ranks, k))
            if hits is not None:
                count = per_target["num_targets"]
                cells[f"ndcg_ratio_of_means@{k}{suffix}"] = ndcg_ratio_of_means(hits, count, k)
                for name, function in SET_METRICS.items():
                    cells[f"{name}@{k}{suffix}"] = mean_and_stderr(function(hits, count, k))
            if protocol in lists and k <= lists[protocol].shape[1]:
                top = lists[protocol]
                share = coverage(top, num_items, k) if len(top) else float("nan")
                cells[f"coverage@{k}{suffix}"] = (share, float("nan"), len(top))
        if ranks is not None:
            cells[f"mrr{suffix}"] = mean_and_stderr(METRICS["mrr"](ranks))
    return cells


def _checked(rank: np.ndarray) -> np.ndarray:
    rank = np.asarray(rank)
    if not np.issubdtype(rank.dtype, np.integer) or (rank.size and rank.min() < 1):
        raise ValueError(f"ranks are integers from 1 (best); found dtype {rank.dtype}, {(rank < 1).sum()} below 1.")
    return rank.astype(np.float64)


def _first(hits: np.ndarray, k: int) -> np.ndarray:
    if hits.shape[1] < k:
        raise ValueError(f"the top lists hold {hits.shape[1]} items, the metric needs {k}; ask for top_k >= {k}.")
    return hits[:, :k]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
