"""Attention of some queries over some keys with all of their pairs at once, differentiated by JAX.

The definition of attention ("einsum") is this over whole rows. Shapes: B rows, Q queries, K keys, H heads, D width of a
head's keys, E of its values.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from recscale.kernels.pairs import Bias, Spans, position_entry, spans, time_entry, visible


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


def attend(
    i_Q, q_BHQD, spans_BQ: Spans, j_K, k_BHKD, v_BHKE, targets_BK, bias: Bias, *, kind, n, scale, window, prefix
):
    """Attention of the queries at slots i over the keys at slots j, [B, H, Q, E] in the values' type.

    bias.query_time_BL and spans_BQ are of the queries, bias.time_BL and targets_BK of the keys. Scores, weights and
    sums are float32.
    """
    mask_BQK = visible(spans_BQ, i_Q, j_K, window, prefix, targets_BK)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q_BHQD, k_BHKD, preferred_element_type=jnp.float32) * scale
    if bias.position is not None:
        scores += bias.position[position_entry(i_Q, j_K, n)][None, None]
    if bias.time is not None:
        assert bias.query_time_BL is not None and bias.time_BL is not None
        scores += bias.time[time_entry(bias.query_time_BL, bias.time_BL)][:, None]
    weights = WEIGHTS[kind](scores, mask_BQK[:, None], n)
    out = jnp.einsum("bhqk,bhke->bhqe", weights.astype(v_BHKE.dtype), v_BHKE, preferred_element_type=jnp.float32)
    return out.astype(v_BHKE.dtype)


def heads_first(x: jax.Array) -> jax.Array:
    """[B, L, H, D] <-> [B, H, L, D]: the layout in which the products over pairs are plain batched matrix products."""
    return jnp.swapaxes(x, 1, 2)


def attention_reference(
    q_BLHD, k_BLHD, v_BLHE, segment_ids_BL, bias: Bias, *, kind, n, scale=1.0, window=0, prefix=0, targets_BL=None
):
    """One einsum over all pairs: the definition. Arguments and result as `recscale.kernels.attention.attention`."""
    slots_L = jnp.arange(q_BLHD.shape[1])
    seen = spans(segment_ids_BL, prefix)
    out = attend(
        slots_L, heads_first(q_BLHD), seen, slots_L, heads_first(k_BLHD), heads_first(v_BLHE), targets_BL, bias,
        kind=kind, n=n, scale=scale, window=window, prefix=prefix,
    )  # fmt: skip
    return heads_first(out)
