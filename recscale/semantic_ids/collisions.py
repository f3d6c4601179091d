"""What is done about items that share all their codes: a policy each, in POLICIES.

    none           nothing: some tuples stand for several items
    digit          a further level counts the items of a bucket, 0, 1, .. in ascending id (TIGER, arXiv 2305.05065)
    digit_random   a further level gives the items of a bucket distinct random values, also an item that is alone
    sinkhorn       rounds that spread each colliding bucket over the codes of the last level, balanced by Sinkhorn;
                   then digits for what still collides

A bucket is the set of items with the same tuple. `extend` adds items later and leaves every tuple as it was.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from recscale.layers import sinkhorn
from recscale.semantic_ids.catalogue import CodesError, check_codes

MAXIMUM = 256  # codes of a level: a digit is a level like the others
_ENTRIES = 1 << 22  # distances handed to Sinkhorn at a time


class LastLevel(NamedTuple):
    """What a new assignment of the last learned level needs.

    residual_VD: float32 [V + 1, d], what the last level quantises (row 0 not read); codebook_KD: float32 [K, d].
    epsilon, iterations: of Sinkhorn; rounds: at most.
    """

    residual_VD: np.ndarray
    codebook_KD: np.ndarray
    epsilon: float = 0.003
    iterations: int = 50
    rounds: int = 30


class Resolved(NamedTuple):
    """codes_VQ int32 [V + 1, Q] and the sizes of their levels; facts: what was done, in plain numbers."""

    codes_VQ: np.ndarray
    sizes: tuple[int, ...]
    facts: dict[str, Any]


def resolve(
    policy: str,
    codes_VQ: np.ndarray,
    sizes: tuple[int, ...],
    *,
    maximum: int = MAXIMUM,
    seed: int = 0,
    last: LastLevel | None = None,
) -> Resolved:
    """Applies a policy to learned codes int32 [V + 1, Q] (row 0 padding).

    maximum: values that a digit may have. seed: of random digits. last: for "sinkhorn". Raises CodesError for an
    unknown policy, wrong codes, and a bucket larger than maximum.
    """
    check_codes(codes_VQ, sizes)
    if policy not in POLICIES:
        raise CodesError(f"collisions = {policy!r}: expected one of {', '.join(POLICIES)}")
    before = _counts(codes_VQ)
    found = POLICIES[policy](codes_VQ, sizes, maximum, seed, last)
    facts = {"policy": policy, "before": before, **found.facts, "after": _counts(found.codes_VQ)}
    return found._replace(facts=facts)


def buckets(codes_VQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bucket of each item 1..V, int64 [V], and items in each bucket, int64 [N]; buckets are in order of their codes."""
    order = np.lexsort(codes_VQ[1:].T[::-1])
    ordered = codes_VQ[1:][order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    bucket = np.empty(len(order), np.int64)
    bucket[order] = np.cumsum(first) - 1
    return bucket, np.bincount(bucket)


def extend(
    policy: str,
    codes_VQ: np.ndarray,
    sizes: tuple[int, ...],
    new_NQ: np.ndarray,
    *,
    maximum: int = MAXIMUM,
    seed: int = 0,
) -> Resolved:
    """Adds items V + 1 .. V + N to resolved codes; the tuple of every old item stays as it is.

    new_NQ: int32 [N, learned levels], the learned codes of the new items. With a digit they get values that are free in
    their bucket: the smallest ones in ascending id, random ones under "digit_random". The digit's level grows where it
    must, up to `maximum`: a model with a smaller level cannot say the new digits. Raises CodesError where a bucket is
    full.
    """
    check_codes(codes_VQ, sizes)
    if policy not in POLICIES:
        raise CodesError(f"collisions = {policy!r}: expected one of {', '.join(POLICIES)}")
    learned = len(sizes) - (policy != "none")
    if new_NQ.ndim != 2 or new_NQ.shape[1] != learned or new_NQ.dtype != np.int32:
        raise CodesError(f"extend: new codes {new_NQ.dtype} {list(new_NQ.shape)}, expected int32 [items, {learned}]")
    together = np.concatenate([codes_VQ[:, :learned], new_NQ])
    check_codes(together, sizes[:learned])
    old = len(codes_VQ) - 1
    facts = {"policy": policy, "items_before": old, "items_added": len(new_NQ)}
    if policy == "none":
        return Resolved(together, sizes, facts | {"after": _counts(together)})
    digit = np.concatenate([codes_VQ[1:, -1], np.full(len(new_NQ), -1, np.int32)])
    bucket, count = buckets(together)
    _check_room(count, maximum)
    random = np.random.default_rng(seed) if policy == "digit_random" else None
    touched = np.unique(bucket[old:])
    order, stops = np.argsort(bucket, kind="stable"), np.cumsum(count)
    for number in touched:
        members = order[stops[number] - count[number] : stops[number]]
        newcomers = members[members >= old]
        free = np.setdiff1d(np.arange(maximum), digit[members])
        if random is not None:
            free = random.permutation(free)
        digit[newcomers] = free[: len(newcomers)]
    size = max(sizes[-1], int(digit.max()) + 1)
    codes = _with_digit(together, digit)
    return Resolved(codes, (*sizes[:-1], size), facts | {"digit_size": size, "after": _counts(codes)})


def _none(codes_VQ: np.ndarray, sizes: tuple[int, ...], *_: Any) -> Resolved:
    return Resolved(codes_VQ, sizes, {})


def _digit(codes_VQ: np.ndarray, sizes: tuple[int, ...], maximum: int, *_: Any) -> Resolved:
    bucket, count = buckets(codes_VQ)
    _check_room(count, maximum)
    order = np.argsort(bucket, kind="stable")  # by bucket, then by id
    digit = np.empty(len(bucket), np.int32)
    digit[order] = np.arange(len(bucket)) - np.repeat(np.cumsum(count) - count, count)
    size = int(count.max())
    return Resolved(_with_digit(codes_VQ, digit), (*sizes, size), {"digit_size": size})


def _digit_random(codes_VQ: np.ndarray, sizes: tuple[int, ...], maximum: int, seed: int, *_: Any) -> Resolved:
    bucket, count = buckets(codes_VQ)
    _check_room(count, maximum)
    rng = np.random.default_rng(seed)
    order = np.argsort(bucket, kind="stable")
    drawn = rng.integers(0, maximum, len(bucket), dtype=np.int32)  # right for the items that are alone
    starts = np.cumsum(count) - count
    for number in np.flatnonzero(count > 1):
        rows = slice(starts[number], starts[number] + count[number])
        drawn[rows] = rng.choice(maximum, count[number], replace=False)
    digit = np.empty(len(bucket), np.int32)
    digit[order] = drawn
    return Resolved(_with_digit(codes_VQ, digit), (*sizes, maximum), {"digit_size": maximum, "digit_seed": seed})


def _sinkhorn(
    codes_VQ: np.ndarray, sizes: tuple[int, ...], maximum: int, seed: int, last: LastLevel | None
) -> Resolved:
    """As in github:XiaoLongtaoo/TIGER: every colliding bucket of a round by itself, until none collides.

    An item may move to the tuple of one that was alone: those two collide in the next round.
    """
    if last is None:
        raise CodesError("collisions = 'sinkhorn' needs the residuals and the codebook of the last level (last=)")
    _check_last(last, codes_VQ, sizes)
    codes, done = codes_VQ.copy(), 0
    for done in range(last.rounds + 1):
        bucket, count = buckets(codes)
        if count.max() == 1 or done == last.rounds:
            break
        before = codes[:, -1].copy()
        for items_GN in _groups(bucket, count, len(last.codebook_KD)):
            codes[items_GN, -1] = _spread(last, items_GN)
        if np.array_equal(before, codes[:, -1]):
            break  # equal vectors stay together whatever the rounds
    spread = _counts(codes)
    moved = int((codes[1:, -1] != codes_VQ[1:, -1]).sum())
    found = _digit(codes, sizes, maximum)
    return found._replace(facts={"rounds": done, "items_moved": moved, "after_rounds": spread, **found.facts})


POLICIES: dict[str, Callable[..., Resolved]] = {
    "none": _none,
    "digit": _digit,
    "digit_random": _digit_random,
    "sinkhorn": _sinkhorn,
}
"""name -> (codes, sizes, maximum, seed, last level) -> Resolved."""


def _with_digit(codes_VQ: np.ndarray, digit_V: np.ndarray) -> np.ndarray:
    column = np.concatenate([np.zeros(1, np.int32), digit_V.astype(np.int32)])
    return np.concatenate([codes_VQ, column[:, None]], axis=1)


def _counts(codes_VQ: np.ndarray) -> dict[str, int]:
    """Distinct tuples, the largest bucket, and the items that share their tuple."""
    _, count = buckets(codes_VQ)
    return {"distinct": len(count), "largest_bucket": int(count.max()), "items_sharing": int(count[count > 1].sum())}


def _check_room(count_N: np.ndarray, maximum: int) -> None:
    if count_N.max() > maximum:
        raise CodesError(
            f"collisions: {count_N.max():,} items share one tuple, a digit has at most {maximum} values: use more or "
            "larger levels, 'sinkhorn', or vectors that tell these items apart (are their texts equal?)"
        )


def _check_last(last: LastLevel, codes_VQ: np.ndarray, sizes: tuple[int, ...]) -> None:
    residual, codebook = last.residual_VD.shape, last.codebook_KD.shape
    if residual != (len(codes_VQ), codebook[-1]) or codebook != (sizes[-1], codebook[-1]):
        raise CodesError(
            f"collisions = 'sinkhorn': residuals {list(residual)} and codebook {list(codebook)}, expected "
            f"[{len(codes_VQ)}, d] and [{sizes[-1]}, d]"
        )


def _groups(bucket_V: np.ndarray, count_N: np.ndarray, codes: int) -> Iterator[np.ndarray]:
    """Items [G, n] of the buckets of n > 1 items, several buckets of one size at a time."""
    order, stops = np.argsort(bucket_V, kind="stable"), np.cumsum(count_N)
    for size in np.unique(count_N[count_N > 1]):
        numbers = np.flatnonzero(count_N == size)
        for some in np.array_split(numbers, -(-len(numbers) * int(size) * codes // _ENTRIES)):
            yield 1 + order[(stops[some] - size)[:, None] + np.arange(size)]


def _spread(last: LastLevel, items_GN: np.ndarray) -> np.ndarray:
    """New codes [G, n] of the last level, every group balanced by itself."""
    x, c = last.residual_VD[items_GN].astype(np.float64), last.codebook_KD.astype(np.float64)
    distances = np.maximum((x**2).sum(-1)[..., None] - 2 * x @ c.T + (c**2).sum(-1)[None, None], 0).astype(np.float32)
    padded = np.resize(distances, (1 << (len(distances) - 1).bit_length(), *distances.shape[1:]))  # few shapes
    return np.asarray(_assign_groups(padded, last.epsilon, last.iterations))[: len(distances)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _assign_groups(distances_GNK: jax.Array, epsilon: float, iterations: int) -> jax.Array:
    return jax.vmap(lambda distances_NK: sinkhorn.assign(distances_NK, epsilon, iterations))(distances_GNK)
