"""Causal self-attention over packed rows: pointwise-SiLU (HSTU) and softmax, in plain JAX.

`attention_reference` is the einsum that says what is meant. `attention` computes the same in causal blocks: queries of
a block see only the keys up to its end, so the upper triangle is never computed, and long rows are scanned in
sub-blocks that are recomputed in the backward pass, so memory grows linearly with the row.

Shapes: B rows, L positions, H heads, D width of a head. Positions of different users in a row never see each other
(`segment_ids`; 0 is padding and sees nothing).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NUM_TIME_BUCKETS = 129
_MIN_BLOCK, _MAX_BLOCK, _MAX_UNROLLED = 48, 128, 8


class Bias(NamedTuple):
    """Relative attention bias of HSTU (arXiv 2402.17152), shared by the heads; either part may be None.

    position: [2n - 1], entry (j - i) + (n - 1) for query slot i and key slot j. time: [129], entry
    time_bucket(query_time_BL[i] - time_BL[j]); times are int32 seconds, and a time bias needs both.
    """

    position: jax.Array | None = None
    time: jax.Array | None = None
    query_time_BL: jax.Array | None = None
    time_BL: jax.Array | None = None


def time_bucket(seconds: jax.Array) -> jax.Array:
    """Bucket 0..128 of a time difference in seconds: trunc(ln(max(|d|, 1)) / 0.301). Source: HSTU reference code."""
    log = jnp.log(jnp.maximum(jnp.abs(seconds), 1).astype(jnp.float32))
    return jnp.clip((log / 0.301).astype(jnp.int32), 0, NUM_TIME_BUCKETS - 1)


def _silu_weights(scores: jax.Array, mask: jax.Array, n: int) -> jax.Array:
    return jnp.where(mask, jax.nn.silu(scores) / n, 0.0)


def _softmax_weights(scores: jax.Array, mask: jax.Array, n: int) -> jax.Array:
    del n
    top = jax.lax.stop_gradient(jnp.max(jnp.where(mask, scores, -1e30), axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0.0)), 0.0)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)


WEIGHTS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    "silu": _silu_weights,
    "softmax": _softmax_weights,
}


def _block(start, q_BLHD, k_BMHD, v_BMHD, segment_q_BL, segment_k_BM, bias: Bias, *, kind: str, n: int, scale: float):
    """Attention of the queries at slots start.. over the keys at slots 0..M - 1; the scores are float32."""
    i_L1 = (start + jnp.arange(q_BLHD.shape[1]))[:, None]
    j_1M = jnp.arange(k_BMHD.shape[1])[None, :]
    mask_BLM = (segment_q_BL[:, :, None] == segment_k_BM[:, None, :]) & (segment_q_BL > 0)[:, :, None]
    mask_BLM &= (j_1M <= i_L1)[None]
    scores = jnp.einsum("blhd,bmhd->bhlm", q_BLHD, k_BMHD, preferred_element_type=jnp.float32) * scale
    if bias.position is not None:
        distance_LM = jnp.maximum(j_1M - i_L1, 1 - n)  # beyond n slots only other users are found, and those are masked
        scores += bias.position[jnp.minimum(distance_LM, 0) + (n - 1)][None, None]
    if bias.time is not None:
        if bias.query_time_BL is None or bias.time_BL is None:
            raise ValueError("Bias.time is given, Bias.query_time_BL or Bias.time_BL is not: a time bias needs both")
        seconds_BLM = bias.query_time_BL[:, :, None] - bias.time_BL[:, None, :]
        scores += bias.time[time_bucket(seconds_BLM)][:, None]
    weights = WEIGHTS[kind](scores, mask_BLM[:, None], n)
    return jnp.einsum("bhlm,bmhd->blhd", weights.astype(v_BMHD.dtype), v_BMHD)


def attention_reference(q_BLHD, k_BLHD, v_BLHD, segment_ids_BL, bias: Bias, *, kind: str, n: int, scale: float):
    """One einsum over all pairs: the definition. Arguments and result as `attention`."""
    return _block(0, q_BLHD, k_BLHD, v_BLHD, segment_ids_BL, segment_ids_BL, bias, kind=kind, n=n, scale=scale)


def attention(
    q_BLHD: jax.Array,
    k_BLHD: jax.Array,
    v_BLHD: jax.Array,
    segment_ids_BL: jax.Array,
    bias: Bias = Bias(),  # noqa: B008 (an immutable tuple)
    *,
    kind: str,
    n: int,
    scale: float = 1.0,
) -> jax.Array:
    """Causal attention inside the segments of packed rows.

    q, k: [B, L, H, D]; v: [B, L, H, E]; segment_ids: int [B, L], 0 = padding. kind: "silu" (weights silu(score) / n) or
    "softmax". n: the constant of HSTU's mask width, also the reach of the position bias. Returns [B, L, H, E]; padding
    gives zeros. Source: arXiv 2402.17152 section 3 and its reference code.
    """
    length = q_BLHD.shape[1]
    block = max(_MIN_BLOCK, math.ceil(length / _MAX_UNROLLED))
    outputs = []
    for start in range(0, length, block):
        stop = min(length, start + block)
        keys = (k_BLHD[:, :stop], v_BLHD[:, :stop], segment_ids_BL[:, :stop])
        key_times = None if bias.time_BL is None else bias.time_BL[:, :stop]
        queries = (q_BLHD[:, start:stop], segment_ids_BL[:, start:stop])
        if bias.query_time_BL is not None:
            queries += (bias.query_time_BL[:, start:stop],)
        tables = (bias.position, bias.time)
        attend = functools.partial(
            _attend_queries, keys=keys, key_times=key_times, tables=tables, kind=kind, n=n, scale=scale
        )
        outputs.append(_in_sub_blocks(attend, start, queries))
    return jnp.concatenate(outputs, axis=1)


def _attend_queries(start, queries, *, keys, key_times, tables, kind, n, scale):
    k, v, segment_k = keys
    bias = Bias(tables[0], tables[1], queries[2] if len(queries) > 2 else None, key_times)
    return _block(start, queries[0], k, v, queries[1], segment_k, bias, kind=kind, n=n, scale=scale)


def _in_sub_blocks(attend, start: int, queries: tuple[jax.Array, ...]) -> jax.Array:
    """Run `attend` over the queries of a block at once where it is short, else as a scan over recomputed sub-blocks."""
    length = queries[0].shape[1]
    if length <= _MAX_BLOCK:
        return attend(start, queries)
    count = math.ceil(length / _MAX_BLOCK)
    padded = [jnp.pad(x, [(0, 0), (0, count * _MAX_BLOCK - length)] + [(0, 0)] * (x.ndim - 2)) for x in queries]
    split = [jnp.moveaxis(x.reshape(x.shape[0], count, _MAX_BLOCK, *x.shape[2:]), 1, 0) for x in padded]
    starts = start + _MAX_BLOCK * jnp.arange(count)
    outputs = jax.lax.map(jax.checkpoint(lambda args: attend(args[0], args[1])), (starts, tuple(split)))
    merged = jnp.moveaxis(outputs, 0, 1).reshape(outputs.shape[1], count * _MAX_BLOCK, *outputs.shape[3:])
    return merged[:, :length]
