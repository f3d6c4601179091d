"""How good the codes of a catalogue are, in plain numbers: use of the codes, collisions, what they keep of content.

Collapse (few codes used) and silent collisions are how semantic ids usually fail: look here before training.
"""

from typing import Any

import numpy as np

from recscale.semantic_ids.catalogue import check_codes
from recscale.semantic_ids.collisions import buckets

BLOCK_ENTRIES = 1 << 24  # distances held at a time


def describe(
    codes_VQ: np.ndarray,
    sizes: tuple[int, ...],
    *,
    vectors_VD: np.ndarray | None = None,
    reconstruction_VD: np.ndarray | None = None,
    learned: int | None = None,
    k: int = 10,
    sample: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Diagnostics of codes int32 [V + 1, Q] (row 0 is padding and left out everywhere).

    vectors_VD, reconstruction_VD: float32 [V + 1, D], the content that was quantised and what its codes decode to.
    learned: levels that describe content, the first ones (all by default); a digit after them does not. Keys:

        levels          one entry per level, see `level_use`
        prefixes        one entry per number of levels 1..Q, see `sharing`
        reconstruction  with both arrays, see `reconstruction_error`
        neighbours      with vectors, see `neighbours_kept`
    """
    check_codes(codes_VQ, sizes)
    learned = len(sizes) if learned is None else learned
    found: dict[str, Any] = {
        "levels": [level_use(codes_VQ[1:, level], size) for level, size in enumerate(sizes)],
        "prefixes": [sharing(codes_VQ[:, :depth]) for depth in range(1, len(sizes) + 1)],
    }
    if vectors_VD is not None and reconstruction_VD is not None:
        found["reconstruction"] = reconstruction_error(vectors_VD, reconstruction_VD)
    if vectors_VD is not None:
        codes = codes_VQ[:, :learned]
        found["neighbours"] = neighbours_kept(codes, vectors_VD, reconstruction_VD, k=k, sample=sample, seed=seed)
    return found


def level_use(codes_V: np.ndarray, size: int) -> dict[str, Any]:
    """How the items use the `size` codes of one level; codes [V] without padding.

    size; used and dead codes; entropy in nats, its share of log(size) (1 where every code has as many items), and
    perplexity = exp(entropy): the number of evenly used codes with the same entropy; largest: items of the fullest
    code.
    """
    count = np.bincount(codes_V, minlength=size)
    share = count[count > 0] / len(codes_V)
    entropy = max(float(-(share * np.log(share)).sum()), 0.0)
    return {
        "size": size,
        "used": len(share),
        "dead": size - len(share),
        "entropy": entropy,
        "entropy_share": entropy / float(np.log(size)) if size > 1 else 1.0,
        "perplexity": float(np.exp(entropy)),
        "largest": int(count.max()),
    }


def sharing(codes_VQ: np.ndarray) -> dict[str, Any]:
    """Collisions of tuples [V + 1, Q]: distinct tuples, the largest bucket, items that share theirs, unique_share.

    unique_share: share of items whose tuple is theirs alone.
    """
    _, count = buckets(codes_VQ)
    items, shared = len(codes_VQ) - 1, int(count[count > 1].sum())
    return {
        "levels": codes_VQ.shape[1],
        "distinct": len(count),
        "largest_bucket": int(count.max()),
        "items_sharing": shared,
        "unique_share": 1 - shared / items,
    }


def reconstruction_error(vectors_VD: np.ndarray, reconstruction_VD: np.ndarray) -> dict[str, float]:
    """Squared error of items 1..V: mse, its mean over items and dimensions, and relative, against the mean item's.

    relative = sum |x - x^|^2 / sum |x - mean|^2: 0 is exact, 1 no better than one vector for all items (null where all
    items are equal).
    """
    x, error = vectors_VD[1:].astype(np.float64), (vectors_VD[1:] - reconstruction_VD[1:]).astype(np.float64) ** 2
    spread = float(((x - x.mean(axis=0)) ** 2).sum())
    return {"mse": float(error.mean()), "relative": float(error.sum()) / spread if spread else float(error.sum() > 0)}


def neighbours_kept(
    codes_VQ: np.ndarray,
    vectors_VD: np.ndarray,
    reconstruction_VD: np.ndarray | None = None,
    *,
    k: int = 10,
    sample: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall of an item's k nearest neighbours by content among its k nearest by code, over a sample of items.

    By content: smallest Euclidean distance between vectors, exact, among all items but itself. By code: longest common
    prefix of codes first, then smallest distance between reconstructions (where given). Ties go to the smaller id in
    both. chance: what k items at random would give. Items are drawn without replacement; at most all of them.
    """
    items = len(codes_VQ) - 1
    k = min(k, items - 1)
    if k < 1:
        return {"k": 0, "items": 0, "recall": 1.0, "stderr": 0.0, "chance": 1.0}
    drawn = np.sort(np.random.default_rng(seed).choice(items, min(sample, items), replace=False))
    x, codes = vectors_VD[1:].astype(np.float32), codes_VQ[1:]
    decoded = None if reconstruction_VD is None else reconstruction_VD[1:].astype(np.float32)
    recall = []
    for rows in np.array_split(drawn, -(-len(drawn) * items // BLOCK_ENTRIES)):
        near = _nearest(_distances(x, rows), rows, k)
        by_code = _nearest(_code_distances(codes, decoded, rows), rows, k)
        recall.append((near[:, :, None] == by_code[:, None, :]).any(axis=2).mean(axis=1))
    share = np.concatenate(recall)
    stderr = float(share.std(ddof=1) / np.sqrt(len(share))) if len(share) > 1 else 0.0
    return {
        "k": k,
        "items": len(drawn),
        "recall": float(share.mean()),
        "stderr": stderr,
        "chance": k / (items - 1),
    }


def _distances(x_VD: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Squared distances [rows, V], never below 0."""
    square = (x_VD**2).sum(axis=1)
    return np.maximum(square[rows][:, None] - 2 * x_VD[rows] @ x_VD.T + square[None], 0)


def _code_distances(codes_VQ: np.ndarray, decoded_VD: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Distances [rows, V] that order by common prefix, then by reconstruction: levels not shared + a part below 1."""
    shared = np.zeros((len(rows), len(codes_VQ)), np.int32)
    equal = np.ones((len(rows), len(codes_VQ)), bool)
    for level in range(codes_VQ.shape[1]):
        equal &= codes_VQ[rows, level][:, None] == codes_VQ[None, :, level]
        shared += equal
    apart = (codes_VQ.shape[1] - shared).astype(np.float64)
    if decoded_VD is None:
        return apart
    distance = _distances(decoded_VD, rows).astype(np.float64)
    return apart + distance / (2 * distance.max() + 1e-30)


def _nearest(distance_RV: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The k nearest columns [R, k] of each row but its own; ties: the smaller one first."""
    distance_RV[np.arange(len(rows)), rows] = np.inf
    edge = np.partition(distance_RV, k - 1, axis=1)[:, k - 1 : k]
    found = np.empty((len(rows), k), np.int64)
    for row, (distance, limit) in enumerate(zip(distance_RV, edge[:, 0], strict=True)):
        close = np.flatnonzero(distance <= limit)
        found[row] = close[np.argsort(distance[close], kind="stable")[:k]]
    return found
