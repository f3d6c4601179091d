"""Which key a query sees, and the bias of a pair: what every implementation of attention shares.

A row holds the positions of several users, each in a piece without gaps (`segment_ids`; 0 is padding). The keys that a
query sees lie between two slots of its row, `Spans`; window, prefix and targets take some of them away. All of it is
made from a few numbers per position, so no implementation needs a mask or a bias of all pairs in memory.

Shapes: B rows, L positions, Q query slots and K key slots of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NUM_TIME_BUCKETS = 129


class Bias(NamedTuple):
    """Relative attention bias of HSTU (arXiv 2402.17152), shared by the heads; either part may be None.

    position: [2n - 1], entry (j - i) + (n - 1) for query slot i and key slot j; farther pairs take the end of the
    table. time: [129], entry time_bucket(query_time_BL[i] - time_BL[j]); times are int32 seconds, and a time bias needs
    both.
    """

    position: jax.Array | None = None
    time: jax.Array | None = None
    query_time_BL: jax.Array | None = None
    time_BL: jax.Array | None = None


class Spans(NamedTuple):
    """Keys first..last, both inclusive, are what the query at a slot may see, [B, L]; none where padding: (L, -1)."""

    first_BL: jax.Array
    last_BL: jax.Array


def time_bucket(seconds: jax.Array) -> jax.Array:
    """Bucket 0..128 of a time difference in seconds: trunc(ln(max(|d|, 1)) / 0.301). Source: HSTU reference code."""
    log = jnp.log(jnp.maximum(jnp.abs(seconds), 1).astype(jnp.float32))
    return jnp.clip((log / 0.301).astype(jnp.int32), 0, NUM_TIME_BUCKETS - 1)


def spans(segment_ids_BL: jax.Array, prefix: int) -> Spans:
    """What the query at each slot sees: from the start of its user to itself, or to the end of the prefix it is in."""
    length = segment_ids_BL.shape[1]
    slot_1L = jnp.arange(length)[None]
    real_BL = segment_ids_BL > 0
    begins_BL = segment_ids_BL != jnp.pad(segment_ids_BL, ((0, 0), (1, 0)))[:, :-1]
    first_BL = jax.lax.cummax(jnp.where(begins_BL, slot_1L, 0), axis=1)
    last_BL = jnp.broadcast_to(slot_1L, first_BL.shape)
    if prefix:
        ends_BL = segment_ids_BL != jnp.pad(segment_ids_BL, ((0, 0), (0, 1)))[:, 1:]
        end_BL = jax.lax.cummin(jnp.where(ends_BL, slot_1L, length - 1), axis=1, reverse=True)
        last_BL = jnp.maximum(last_BL, jnp.minimum(first_BL + prefix - 1, end_BL))
    return Spans(jnp.where(real_BL, first_BL, length), jnp.where(real_BL, last_BL, -1))


def visible(spans_BQ: Spans, i_Q: jax.Array, j_K: jax.Array, window: int, prefix: int, targets_BK) -> jax.Array:
    """Mask [B, Q, K]: query slot i sees key slot j. spans_BQ: of the queries; targets_BK: of the keys, or None."""
    first_BQ1, i_1Q1, j_11K = spans_BQ.first_BL[:, :, None], i_Q[None, :, None], j_K[None, None, :]
    last_BQ1 = spans_BQ.last_BL[:, :, None] if prefix else i_1Q1  # without a prefix, the same for every row
    mask_BQK = (j_11K >= first_BQ1) & (j_11K <= last_BQ1)
    if window:
        near_BQK = i_1Q1 - j_11K < window
        mask_BQK &= (near_BQK | (j_11K < first_BQ1 + prefix)) if prefix else near_BQK
    if targets_BK is not None:
        mask_BQK &= ~targets_BK.astype(bool)[:, None, :] | (j_11K == i_1Q1)
    return mask_BQK


def position_entry(i_Q: jax.Array, j_K: jax.Array, n: int) -> jax.Array:
    """The entry [Q, K] of the position table that belongs to each pair."""
    return jnp.clip(j_K[None, :] - i_Q[:, None] + (n - 1), 0, 2 * n - 2)


def time_entry(query_time_BQ: jax.Array, time_BK: jax.Array) -> jax.Array:
    """The entry [B, Q, K] of the time table that belongs to each pair."""
    return time_bucket(query_time_BQ[:, :, None] - time_BK[:, None, :])
