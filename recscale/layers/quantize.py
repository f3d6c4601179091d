"""Residual vector quantisation: codebooks, straight-through estimators, and how codebooks learn and are kept alive.

Letters: B vectors, D their width, Q levels, K codes of a level. The quantiser of level q gets the residual
r^q = z - C^0[c_0] - .. - C^(q-1)[c_(q-1)] and picks a row of C^q.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recscale.layers.kmeans import nearest, square_distances, sums_by_code

EPS = 1e-12
Assign = Callable[[jax.Array], jax.Array]


class Quantized(NamedTuple):
    """What the levels made of a batch.

    codes_BQ: int32. passed_BD: the sum of the chosen rows, as the straight-through estimator hands it on. residual_QBD,
    chosen_QBD: what each level got and picked, with the gradients that the estimator gives them.
    """

    codes_BQ: jax.Array
    passed_BD: jax.Array
    residual_QBD: jax.Array
    chosen_QBD: jax.Array


def by_distance(distances_BK: jax.Array) -> jax.Array:
    """The nearest row, int32 [B]."""
    return nearest(distances_BK)[0]


def rotate(source_BD: jax.Array, target_BD: jax.Array) -> jax.Array:
    """target, with the gradient of source turned and stretched onto it: the rotation trick (arXiv 2410.06424).

    The result is (|q| / |e|) R e with R the rotation in the plane of e and q that takes e to q, both held constant. A
    gradient g on the result reaches e as (|q| / |e|) R^T g, at the same angle to e as g has to q. Where e and q are
    opposite there is no such plane: the gradient is then stretched and not turned.
    """
    e, q = jax.lax.stop_gradient(source_BD), jax.lax.stop_gradient(target_BD)
    length_e = jnp.linalg.norm(e, axis=-1, keepdims=True)
    length_q = jnp.linalg.norm(q, axis=-1, keepdims=True)
    unit_e, unit_q = e / jnp.maximum(length_e, EPS), q / jnp.maximum(length_q, EPS)
    between = unit_e + unit_q
    length = jnp.linalg.norm(between, axis=-1, keepdims=True)
    turns = length > 1e-6
    between = jnp.where(turns, between / jnp.where(turns, length, 1), 0)
    turn = jnp.where(turns, 1.0, 0.0)

    def dot(a, b):
        return (a * b).sum(axis=-1, keepdims=True)

    rotated = source_BD - 2 * dot(source_BD, between) * between + 2 * turn * dot(source_BD, unit_e) * unit_q
    stretched = length_q / jnp.maximum(length_e, EPS) * rotated
    return stretched + jax.lax.stop_gradient(q - stretched)  # its value is q but for rounding: make it q


def _copied(z_BD: jax.Array, total_BD: jax.Array) -> jax.Array:
    return z_BD + jax.lax.stop_gradient(total_BD - z_BD)


# name -> (whether residuals carry their gradient from level to level, how the sum is handed on).
# "per_level": r~ = r + sg(q - r) at every level and the next residual r - r~: its value is r - q, its gradient zero, so
# that levels >= 1 send none to the encoder. "sum": the residuals keep their gradient to the encoder, and so do all
# commitment terms; the estimator is once on the sum. "rotation": as "sum", by rotation instead of a copy. In all of
# them a codebook learns from its own level alone.
STRAIGHT_THROUGH: dict[str, tuple[bool, Callable[[jax.Array, jax.Array], jax.Array]]] = {
    "per_level": (False, _copied),
    "sum": (True, _copied),
    "rotation": (True, rotate),
}


def quantize(
    z_BD: jax.Array, codebooks_QKD: jax.Array, estimator: str, last: Assign = by_distance, level: Assign = by_distance
) -> Quantized:
    """Quantise z level by level; `last` chooses the codes of the last level from its squared distances, `level` the
    others'. estimator: one of STRAIGHT_THROUGH.
    """
    keeps, hand_on = STRAIGHT_THROUGH[estimator]
    levels = len(codebooks_QKD)
    residual, codes, residuals, chosen = z_BD, [], [], []
    for q in range(levels):
        distances = square_distances(jax.lax.stop_gradient(residual), jax.lax.stop_gradient(codebooks_QKD[q]))
        code = (last if q == levels - 1 else level)(distances)
        row = codebooks_QKD[q][code]
        residuals.append(residual)
        codes.append(code)
        chosen.append(row)
        residual = residual - jax.lax.stop_gradient(row)
        residual = residual if keeps else jax.lax.stop_gradient(residual)
    total = jax.lax.stop_gradient(sum(chosen[1:], chosen[0]))
    return Quantized(jnp.stack(codes, axis=1), hand_on(z_BD, total), jnp.stack(residuals), jnp.stack(chosen))


REDUCTIONS: dict[str, Callable[..., jax.Array]] = {"sum": jnp.sum, "mean": jnp.mean}


def square_error(a: jax.Array, b: jax.Array, over_dims: str) -> jax.Array:
    """|a - b|^2 over the last axis by REDUCTIONS[over_dims], the mean over the vectors B: [..., B, D] to [...]."""
    return REDUCTIONS[over_dims](jnp.square(a - b), axis=-1).mean(axis=-1)


def quantization_losses(found: Quantized, over_dims: str) -> tuple[jax.Array, jax.Array]:
    """|sg(r) - q|^2, which moves the codebooks, and |r - sg(q)|^2, which moves the encoder; each [Q]."""
    r, q = found.residual_QBD, found.chosen_QBD
    codebook_Q = square_error(jax.lax.stop_gradient(r), q, over_dims)
    commitment_Q = square_error(r, jax.lax.stop_gradient(q), over_dims)
    return codebook_Q, commitment_Q


class Averages(NamedTuple):
    """Exponential moving averages of a set of codebooks: size_QK of the clusters and total_QKD of their residuals."""

    size_QK: jax.Array
    total_QKD: jax.Array


def averages(codebooks_QKD: jax.Array) -> Averages:
    """Averages whose codebooks are these, every cluster of size 1."""
    return Averages(jnp.ones(codebooks_QKD.shape[:2], codebooks_QKD.dtype), codebooks_QKD)


def batch_totals(codes_BQ: jax.Array, residual_QBD: jax.Array, codes: int) -> Averages:
    """Vectors of each code in a batch, [Q, K], and the sum of their residuals [Q, K, D]."""
    ones = jnp.ones(len(codes_BQ), residual_QBD.dtype)
    sums = [sums_by_code(r, c, ones, codes) for r, c in zip(residual_QBD, codes_BQ.T, strict=True)]
    return Averages(jnp.stack([size for _, size in sums]), jnp.stack([total for total, _ in sums]))


def update_averages(
    old: Averages, batch: Averages, decay: float, codebooks_QKD: jax.Array
) -> tuple[Averages, jax.Array]:
    """Averages after a batch, and the codebooks [Q, K, D] that they give (arXiv 1711.00937, appendix A).

    A row that the batch does not use stays as it is: its size and total fall alike, to where they cannot be divided.
    """
    new = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, batch)
    means = new.total_QKD / jnp.maximum(new.size_QK, EPS)[..., None]
    return new, jnp.where(batch.size_QK[..., None] > 0, means, codebooks_QKD)


def restart(codebooks_QKD: jax.Array, dead_QK: jax.Array, residual_QBD: jax.Array, key: jax.Array) -> jax.Array:
    """Codebooks in which the rows of dead codes are residuals of their level, drawn at random, none twice if B >= K."""
    Q, K, _ = codebooks_QKD.shape
    B = residual_QBD.shape[1]

    def one(book, dead, residual, level_key):
        drawn = jax.random.choice(level_key, B, (K,), replace=B < K)
        return jnp.where(dead[:, None], residual[drawn], book)

    return jax.vmap(one)(codebooks_QKD, dead_QK, residual_QBD, jax.random.split(key, Q))


def perplexity(counts_QK: jax.Array) -> jax.Array:
    """exp(entropy) of the use of the codes of each level, [Q]: K where all are used alike, 1 where one is."""
    share = counts_QK / jnp.maximum(counts_QK.sum(axis=1, keepdims=True), 1)
    return jnp.exp(-(share * jnp.log(jnp.maximum(share, EPS))).sum(axis=1))
