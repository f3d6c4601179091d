"""Exact ranks, log-probabilities and top lists over a whole catalogue, streamed over item blocks.

Order and ties: items are ordered by (score descending, id ascending), so an equal score counts before the target only
where its id is smaller. Padding (id 0) is never ranked and never listed.

Several devices: tables may be sharded over a mesh of Auto axes, and XLA places the block gather and the matmul. With
explicit axes every score, mask and list here would have to state a layout that XLA finds by itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEEN_WINDOW = 1024
"""Seen pairs marked at a time; a block that holds none of them costs nothing."""


@functools.partial(jax.jit, static_argnames=("item_vectors", "num_items", "block", "top_k", "protocols"))
def rank_catalogue(
    query_QD: jax.Array,
    target_Q: jax.Array,
    seen: tuple[jax.Array, jax.Array] | None,
    tables: Any,
    *,
    item_vectors: Callable[[Any, jax.Array], jax.Array],
    num_items: int,
    block: int,
    top_k: int = 0,
    protocols: tuple[str, ...] = ("full", "unseen"),
) -> dict[str, jax.Array]:
    """Exact rank, log-probability and top lists of Q queries over items 1..V; score = query . item vector.

    query_QD: [Q, D]. target_Q: int32 [Q], 0 for a row that only fills the chunk. seen: what `pack_seen` returns, needed
    by protocol "unseen". tables: any pytree; item_vectors(tables, ids_N) -> [N, D] must be a pure function that hashes
    (a function or a bound method, the same object at every call: it is a static argument). protocols: which rankings to
    make; () gives log_prob alone. top_k = 0 makes no lists.

    Returns log_prob [Q] (nats, <= 0), finite [Q] (False where any score of the row is NaN or infinite: the other values
    of that row mean nothing), and per protocol `rank/NAME` int32 [Q] and `top/NAME` int32 [Q, top_k], 0 where fewer
    items are left. Memory O(Q x block) besides the tables.

    The catalogue is swept twice, since counting the better items needs the target's score first. That score is read out
    of the same block matmul that scores its rivals, never from a separate dot product: equal vectors tie exactly, and
    rounding cannot rank a target behind itself. A catalogue of one block is scored once.
    """
    block = min(block, num_items)
    blocks = -(-num_items // block)
    query_QD = query_QD.astype(jnp.float32)

    def scored(b):
        ids_N = b * block + 1 + jnp.arange(block, dtype=jnp.int32)
        vectors_ND = item_vectors(tables, jnp.minimum(ids_N, num_items)).astype(jnp.float32)
        scores_QN = jnp.einsum("QD,ND->QN", query_QD, vectors_ND, precision=jax.lax.Precision.HIGHEST)
        scores_QN = jax.lax.optimization_barrier(scores_QN)  # both sweeps keep the same, unfused matmul
        real_QN = jnp.broadcast_to(ids_N <= num_items, scores_QN.shape)
        hidden_QN = _hidden(b * block + 1, block, target_Q, seen) if "unseen" in protocols else None
        kept = {"full": real_QN, "unseen": real_QN if hidden_QN is None else real_QN & ~hidden_QN}
        return ids_N, scores_QN, real_QN, {name: kept[name] for name in protocols}

    only = scored(0) if blocks == 1 else None

    def sweep(step, carry):
        if only is not None:
            return step(carry, only)
        return jax.lax.scan(lambda c, b: (step(c, scored(b)), None), carry, jnp.arange(blocks, dtype=jnp.int32))[0]

    def first(carry, part):
        ids_N, scores_QN, real_QN, kept = part
        is_target_QN = ids_N[None] == target_Q[:, None]
        masked_QN = jnp.where(real_QN, scores_QN, -jnp.inf)
        high_Q = jnp.maximum(carry["high"], masked_QN.max(axis=1))
        mass_Q = jnp.exp(masked_QN - high_Q[:, None]).sum(axis=1)
        return {
            "target": carry["target"] + jnp.where(is_target_QN, scores_QN, 0.0).sum(axis=1),
            "finite": carry["finite"] & (jnp.isfinite(scores_QN) | ~real_QN).all(axis=1),
            "high": high_Q,
            "mass": carry["mass"] * jnp.exp(carry["high"] - high_Q) + mass_Q,
            "top": {name: _merge(carry["top"][name], ids_N, scores_QN, kept[name], top_k) for name in carry["top"]},
        }

    zero_Q = jnp.zeros(target_Q.shape, jnp.float32)
    empty = (jnp.full((len(target_Q), top_k), -jnp.inf), jnp.zeros((len(target_Q), top_k), jnp.int32))
    lists = {name: empty for name in protocols if top_k}
    start = {"target": zero_Q, "finite": zero_Q == 0, "high": zero_Q - jnp.inf, "mass": zero_Q, "top": lists}
    seen_first = sweep(first, start)

    def second(before, part):
        ids_N, scores_QN, _, kept = part
        own_Q1, target_Q1 = seen_first["target"][:, None], target_Q[:, None]
        wins_QN = (scores_QN > own_Q1) | ((scores_QN == own_Q1) & (ids_N[None] < target_Q1))
        wins_QN &= ids_N[None] != target_Q1
        return {name: before[name] + (wins_QN & kept[name]).sum(axis=1, dtype=jnp.int32) for name in before}

    before = sweep(second, {name: jnp.zeros_like(target_Q) for name in protocols}) if protocols else {}
    out = {f"rank/{name}": 1 + count for name, count in before.items()}
    out |= {f"top/{name}": ids_QK for name, (_, ids_QK) in seen_first["top"].items()}
    log_prob = seen_first["target"] - seen_first["high"] - jnp.log(seen_first["mass"])
    return out | {"log_prob": log_prob, "finite": seen_first["finite"]}


def _merge(top, ids_N, scores_QN, kept_QN, top_k):
    """Running top list: earlier blocks have the smaller ids, and top_k keeps the earlier of two equal values."""
    values, places = jax.lax.top_k(jnp.where(kept_QN, scores_QN, -jnp.inf), min(top_k, len(ids_N)))
    values = jnp.concatenate([top[0], values], axis=1)
    ids = jnp.concatenate([top[1], ids_N[places]], axis=1)
    values, places = jax.lax.top_k(values, top_k)
    return values, jnp.where(values > -jnp.inf, jnp.take_along_axis(ids, places, axis=1), 0)


def _hidden(first_id, block, target_Q, seen):
    """Bool [Q, block]: items first_id.. that the query's user has seen, its own target excepted."""
    row_P, item_P = seen
    low, high = jnp.searchsorted(item_P, jnp.stack([first_id, first_id + block]))

    def mark(i, hidden_QN):  # a slice that would pass the end is moved back by JAX: marking twice does no harm
        row = jax.lax.dynamic_slice(row_P, (low + i * SEEN_WINDOW,), (SEEN_WINDOW,))
        item = jax.lax.dynamic_slice(item_P, (low + i * SEEN_WINDOW,), (SEEN_WINDOW,))
        here = (item >= first_id) & (item < first_id + block) & (item != target_Q[row])
        return hidden_QN.at[row, jnp.where(here, item - first_id, block)].set(True, mode="drop")

    windows = (high - low + SEEN_WINDOW - 1) // SEEN_WINDOW
    return jax.lax.fori_loop(0, windows, mark, jnp.zeros((len(target_Q), block), bool))


def pack_seen(row: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seen items as pairs (row of the chunk, item id 1..V), any order, repeats allowed -> int32 [P] rows and items.

    Distinct pairs sorted by item, so that each block of items finds its own; padded in front with item 0 to a power of
    two, so that few shapes are compiled.
    """
    if not len(row):
        return np.zeros(SEEN_WINDOW, np.int32), np.zeros(SEEN_WINDOW, np.int32)
    key = np.sort(item.astype(np.int64) << 32 | row.astype(np.int64))
    key = key[np.concatenate([[True], key[1:] != key[:-1]])]
    size = max(SEEN_WINDOW, 1 << int(len(key) - 1).bit_length())
    key = np.concatenate([np.zeros(size - len(key), np.int64), key])
    return (key & 0xFFFFFFFF).astype(np.int32), (key >> 32).astype(np.int32)
