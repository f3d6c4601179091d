"""Sinkhorn assignment: codes of a batch such that every code of the codebook is used about equally often.

Formula of the reference implementations of LC-Rec, LETTER and their relatives: squared distances are centred and
scaled to [-1, 1] over the whole matrix, Q = exp(-d / eps) has its rows and columns normalised in turn, and the code of
a row is its largest entry. They need float64, for at eps = .003 the exponentials underflow float32. Here everything is
a logarithm, and the two normalisations are kept as one number per row and one per column, so that nothing underflows
and no error adds up over the iterations: float32 is enough.
"""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp


def centred(distances_BK: jax.Array) -> jax.Array:
    """(d - m) / (max d - m + 1e-5) with m = (max d + min d) / 2, over the whole matrix; same type."""
    top, bottom = distances_BK.max(), distances_BK.min()
    middle = (top + bottom) / 2
    return (distances_BK - middle) / (top - middle + 1e-5)


def potentials(logits_BK: jax.Array, iterations: int, start_K: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Row and column potentials (u_B, v_K) after `iterations` rounds: log Q = logits + u + v.

    Each round makes the rows of Q sum to 1 / B, then its columns to 1 / K: the columns are exact at the end. start_K:
    column potentials to begin with, None for zeros.
    """
    B, K = logits_BK.shape

    def round_(_, pair):
        _, v_K = pair
        u_B = -logsumexp(logits_BK + v_K[None, :], axis=1) - jnp.log(B)
        v_K = -logsumexp(logits_BK + u_B[:, None], axis=0) - jnp.log(K)
        return u_B, v_K

    columns = jnp.zeros(K, logits_BK.dtype) if start_K is None else start_K
    return jax.lax.fori_loop(0, iterations, round_, (jnp.zeros(B, logits_BK.dtype), columns))


def log_plan(distances_BK: jax.Array, eps: float, iterations: int) -> jax.Array:
    """log(Q B), [B, K]: the columns of Q B sum to B / K, its rows to about 1."""
    logits_BK = -centred(distances_BK) / eps
    u_B, v_K = potentials(logits_BK, iterations)
    return logits_BK + u_B[:, None] + v_K[None, :] + jnp.log(distances_BK.shape[0])


def assign(distances_BK: jax.Array, eps: float, iterations: int) -> jax.Array:
    """Codes int32 [B] of squared distances [B, K]: the largest entry of each row of the plan."""
    return jnp.argmax(log_plan(distances_BK, eps, iterations), axis=1).astype(jnp.int32)
