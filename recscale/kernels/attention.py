"""Self-attention over packed rows: pointwise-SiLU (HSTU) and softmax, by one signature for several implementations.

"einsum" is the definition, over all pairs at once. "blocks" computes the same in memory that grows linearly with the
row, in plain JAX, on any device.

Shapes: B rows, L positions, H heads, D width of a head's keys, E of its values.
"""

from collections.abc import Callable

import jax

from recscale.kernels.blocks import attention_blocks
from recscale.kernels.dense import WEIGHTS, attention_reference
from recscale.kernels.pairs import NUM_TIME_BUCKETS, Bias, time_bucket
from recscale.kernels.pallas_attention import attention_pallas

__all__ = ["IMPLEMENTATIONS", "NUM_TIME_BUCKETS", "Bias", "attention", "attention_reference", "time_bucket"]

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "einsum": attention_reference,
    "blocks": attention_blocks,
    "pallas": attention_pallas,
}
"""Name -> (q, k, v, segment_ids, bias, *, kind, n, scale, window, prefix, targets_BL), as `attention` checks them."""


def attention(
    q_BLHD: jax.Array,
    k_BLHD: jax.Array,
    v_BLHE: jax.Array,
    segment_ids_BL: jax.Array,
    bias: Bias = Bias(),  # noqa: B008 (an immutable tuple)
    *,
    kind: str,
    n: int,
    scale: float = 1.0,
    window: int = 0,
    prefix: int = 0,
    targets_BL: jax.Array | None = None,
    implementation: str = "blocks",
) -> jax.Array:
    """Causal attention inside the segments of packed rows.

    q, k: [B, L, H, D]; v: [B, L, H, E]; segment_ids: int [B, L], 0 = padding, the positions of a segment side by side.
    kind: "silu" (weights silu(score) / n) or "softmax". n: the constant of HSTU's mask width, also the reach of the
    position bias. window: a query sees the last `window` positions up to itself, 0 = all. prefix: the first `prefix`
    positions of a segment see each other and are seen by its every query, window or not. targets: bool [B, L],
    candidates: a position so marked is seen by itself alone. Returns [B, L, H, E]; padding gives zeros. Raises
    ValueError for an unknown kind or implementation, a negative window or prefix, a time bias without times.
    Source: arXiv 2402.17152 section 3 and its reference code.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"attention: kind = {kind!r}: expected one of {tuple(WEIGHTS)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention: implementation = {implementation!r}: expected one of {tuple(IMPLEMENTATIONS)}")
    if min(window, prefix) < 0:
        raise ValueError(f"attention: window = {window}, prefix = {prefix}: expected 0 (none) or a positive integer")
    if bias.time is not None and (bias.query_time_BL is None or bias.time_BL is None):
        raise ValueError("Bias.time is given, Bias.query_time_BL or Bias.time_BL is not: a time bias needs both")
    compute = IMPLEMENTATIONS[implementation]
    return compute(
        q_BLHD, k_BLHD, v_BLHE, segment_ids_BL, bias,
        kind=kind, n=n, scale=scale, window=window, prefix=prefix, targets_BL=targets_BL,
    )  # fmt: skip
