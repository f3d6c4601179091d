"""Causal self-attention over packed rows: pointwise-SiLU (HSTU) and softmax, in plain JAX.

`attention_reference` is the einsum that says what is meant. `attention` computes the same in causal blocks: queries of
a block see only the keys up to its end, so the upper triangle is never computed, and long rows are scanned in
sub-blocks that are recomputed in the backward pass, so memory grows linearly with the row.

Shapes: B rows, L positions, H heads, D width of a head. Positions of different users in a row never see each other
(`segment_ids`; a user's positions are contiguous; 0 is padding and sees nothing).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NUM_TIME_BUCKETS = 129
_MIN_BLOCK, _MAX_BLOCK, _MAX_UNROLLED = 64, 128, 8


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
    half = 0.5 * scores  # silu(x) = x / 2 (1 + tanh(x / 2)): on CPU a quarter faster than by the exponential
    return jnp.where(mask, (half + half * jnp.tanh(half)) / n, 0.0)


def _softmax_weights(scores: jax.Array, mask: jax.Array, n: int) -> jax.Array:
    del n
    scores = jnp.where(mask, scores, -1e30)
    top = jnp.maximum(
        jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True), -1e20
    )  # padding: exp(-1e30 + 1e20) = 0
    weights = jnp.exp(scores - top)
    return weights * (1.0 / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30))


WEIGHTS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    "silu": _silu_weights,
    "softmax": _softmax_weights,
}


def _first_slot(segment_ids_BL: jax.Array) -> jax.Array:
    """The slot where each position's user begins, [B, L]; L for padding. Keys first..i are what query i sees."""
    slot_L = jnp.arange(segment_ids_BL.shape[1])
    begins_BL = segment_ids_BL != jnp.pad(segment_ids_BL, ((0, 0), (1, 0)))[:, :-1]
    first_BL = jax.lax.cummax(jnp.where(begins_BL, slot_L[None], 0), axis=1)
    return jnp.where(segment_ids_BL > 0, first_BL, len(slot_L))


def _block(start, q_BLHD, k_BHMD, v_BHMD, first_BL, bias: Bias, *, kind: str, n: int, scale: float):
    """Attention of the queries at slots start.. over the keys at slots 0..M - 1; the scores are float32."""
    i_L1 = (start + jnp.arange(q_BLHD.shape[1]))[:, None]
    j_1M = jnp.arange(k_BHMD.shape[2])[None, :]
    mask_BLM = (j_1M[None] >= first_BL[:, :, None]) & (j_1M <= i_L1)[None]
    scores = jnp.einsum("bhld,bhmd->bhlm", _heads_first(q_BLHD), k_BHMD, preferred_element_type=jnp.float32) * scale
    if bias.position is not None:
        distance_LM = jnp.maximum(j_1M - i_L1, 1 - n)  # beyond n slots only other users are found, and those are masked
        scores += bias.position[jnp.minimum(distance_LM, 0) + (n - 1)][None, None]
    if bias.time is not None:
        if bias.query_time_BL is None or bias.time_BL is None:
            raise ValueError("Bias.time is given, Bias.query_time_BL or Bias.time_BL is not: a time bias needs both")
        seconds_BLM = bias.query_time_BL[:, :, None] - bias.time_BL[:, None, :]
        scores += bias.time[time_bucket(seconds_BLM)][:, None]
    weights = WEIGHTS[kind](scores, mask_BLM[:, None], n)
    return _heads_first(jnp.einsum("bhlm,bhmd->bhld", weights.astype(v_BHMD.dtype), v_BHMD))


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, L, H, D] <-> [B, H, L, D]: the layout in which the products over pairs are plain batched matrix products."""
    return jnp.swapaxes(x, 1, 2)


def attention_reference(q_BLHD, k_BLHD, v_BLHD, segment_ids_BL, bias: Bias, *, kind: str, n: int, scale: float):
    """One einsum over all pairs: the definition. Arguments and result as `attention`."""
    first_BL = _first_slot(segment_ids_BL)
    return _block(0, q_BLHD, _heads_first(k_BLHD), _heads_first(v_BLHD), first_BL, bias, kind=kind, n=n, scale=scale)


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
    block = math.ceil(length / min(_MAX_UNROLLED, math.ceil(length / _MIN_BLOCK)))
    k_BHLD, v_BHLD, first_BL = _heads_first(k_BLHD), _heads_first(v_BLHD), _first_slot(segment_ids_BL)
    outputs = []
    for start in range(0, length, block):
        stop = min(length, start + block)
        keys = (k_BHLD[:, :, :stop], v_BHLD[:, :, :stop])
        key_times = None if bias.time_BL is None else bias.time_BL[:, :stop]
        queries = (q_BLHD[:, start:stop], first_BL[:, start:stop])
        if bias.query_time_BL is not None:
            queries += (bias.query_time_BL[:, start:stop],)
        tables = (bias.position, bias.time)
        attend = functools.partial(
            _attend_queries, keys=keys, key_times=key_times, tables=tables, kind=kind, n=n, scale=scale
        )
        outputs.append(_in_sub_blocks(attend, start, queries))
    return jnp.concatenate(outputs, axis=1)


def _attend_queries(start, queries, *, keys, key_times, tables, kind, n, scale):
    bias = Bias(tables[0], tables[1], queries[2] if len(queries) > 2 else None, key_times)
    k_BHMD, v_BHMD = keys
    return _block(start, queries[0], k_BHMD, v_BHMD, queries[1], bias, kind=kind, n=n, scale=scale)


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
