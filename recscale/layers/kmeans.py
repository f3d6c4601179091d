"""k-means on the device in bounded memory: Lloyd's iterations over blocks of points, never all distances at once.

Seeds are drawn by k-means++ (Arthur and Vassilvitskii 2007) on a random sample of the points: a pass over all of them
per seed would cost more than the clustering. A cluster that lost all its points moves to a point drawn with probability
proportional to its squared distance, as k-means++ draws. Neither step can raise the objective, the sum of squared
distances to the nearest centroid, so it never rises.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK_ENTRIES = 1 << 20  # distances held at once: 4 MB stay in the cache of a core
MIN_BLOCK = 256
SEEDS_FROM = 16  # points per cluster that k-means++ sees
MOST_TRIALS = 4096  # seeds tried in all: a large codebook tries one candidate for each


class Clusters(NamedTuple):
    """What k-means found.

    centroids_KD: float32. codes_N: int32, the nearest centroid. square_N: squared distance to it. sizes_K: points of
    each cluster. objective_I: sum of squared distances before the first and after every iteration, NaN after the last.
    """

    centroids_KD: jax.Array
    codes_N: jax.Array
    square_N: jax.Array
    sizes_K: jax.Array
    objective_I: jax.Array


def block_size(clusters: int, entries: int = BLOCK_ENTRIES) -> int:
    """Points of a block, such that its distances are about `entries` numbers."""
    return max(MIN_BLOCK, entries // clusters)


def blocks_of(x_ND: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """x as [n, size, D], filled with zeros at the end, and which places hold a point, bool [n, size]."""
    N, D = x_ND.shape
    size = min(size, N)
    n = -(-N // size)
    padded = jnp.pad(x_ND, ((0, n * size - N), (0, 0)))
    return padded.reshape(n, size, D), (jnp.arange(n * size) < N).reshape(n, size)


def square_distances(x_BD: jax.Array, centroids_KD: jax.Array) -> jax.Array:
    """|x - c|^2, [B, K], from products of full precision; never below zero."""
    product = jnp.einsum("BD,KD->BK", x_BD, centroids_KD, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.square(x_BD).sum(axis=1)[:, None] + jnp.square(centroids_KD).sum(axis=1)[None, :]
    return jnp.maximum(norms - 2 * product, 0)


def nearest(distances_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Code int32 [B] of the smallest distance (the first of equals), and that distance [B]."""
    # Twice as fast as argmin on a CPU, where a reduction of pairs is not vectorised.
    least_B = distances_BK.min(axis=1)
    K = distances_BK.shape[1]
    places = jnp.arange(K, dtype=jnp.int32)[None, :]
    return jnp.where(distances_BK == least_B[:, None], places, K - 1).min(axis=1), least_B


@jax.jit
def assign(x_ND: jax.Array, centroids_KD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nearest centroid int32 [N] of every point and the squared distance to it [N], block by block."""
    parts, _ = blocks_of(x_ND, block_size(len(centroids_KD)))
    codes, square = jax.lax.map(lambda part: nearest(square_distances(part, centroids_KD)), parts)
    return codes.reshape(-1)[: len(x_ND)], square.reshape(-1)[: len(x_ND)]


def sums_by_code(x_BD: jax.Array, codes_B: jax.Array, weight_B: jax.Array, clusters: int) -> tuple:
    """Weighted sum [K, D] and total weight [K] of the points of each code, in an order that never changes."""

    def scatter():
        rows = x_BD * weight_B[:, None]
        zeros = jnp.zeros((clusters, x_BD.shape[1]), x_BD.dtype)
        return zeros.at[codes_B].add(rows), jnp.zeros(clusters, x_BD.dtype).at[codes_B].add(weight_B)

    def product():
        chosen = jnp.where(codes_B[:, None] == jnp.arange(clusters)[None, :], weight_B[:, None], 0)
        return jnp.einsum("BK,BD->KD", chosen, x_BD, precision=jax.lax.Precision.HIGHEST), chosen.sum(axis=0)

    # A GPU adds scattered rows in any order: the same seed would not give the same bits. A CPU scatters twice as fast.
    return jax.lax.platform_dependent(cpu=scatter, default=product)


def _pass(parts: jax.Array, valid: jax.Array, centroids_KD: jax.Array) -> tuple:
    """One pass over all blocks: codes, squared distances, and sums and sizes of the clusters."""
    K, D = centroids_KD.shape

    def block(carry, one):
        part, weight = one[0], one[1].astype(one[0].dtype)
        codes, square = nearest(square_distances(part, centroids_KD))
        sums, sizes = sums_by_code(part, codes, weight, K)
        return (carry[0] + sums, carry[1] + sizes), (codes, square * weight)

    start = jnp.zeros((K, D), parts.dtype), jnp.zeros(K, parts.dtype)
    (sums, sizes), (codes, square) = jax.lax.scan(block, start, (parts, valid))
    return codes.reshape(-1), square.reshape(-1), sums, sizes


def seeds(x_ND: jax.Array, clusters: int, key: jax.Array) -> jax.Array:
    """K starting centroids [K, D] by k-means++ on a random sample of SEEDS_FROM points per cluster.

    Of a few candidates for each seed the best is taken (greedy k-means++, as in scikit-learn).
    """
    keys = jax.random.split(key, 2)
    count = min(len(x_ND), max(SEEDS_FROM * clusters, 4096))
    # With replacement: a point seen twice is drawn once all the same, and a permutation of many points is dear.
    sample = x_ND if count == len(x_ND) else x_ND[jax.random.randint(keys[0], (count,), 0, len(x_ND))]

    trials = max(1, min(2 + int(math.log(clusters)), MOST_TRIALS // clusters))

    def draw(square, one):
        # Where all points are taken already (fewer distinct points than clusters), any point will do.
        chances = jnp.where(square.max() > 0, jnp.log(square), 0.0)
        places = jax.random.categorical(one, chances, shape=(trials,))
        left = jnp.minimum(square[None, :], square_distances(sample[places], sample))
        best = left.sum(axis=1).argmin()
        return left[best].at[places[best]].set(0.0), places[best]

    draws = jax.random.split(keys[1], clusters)
    start = jax.random.randint(draws[0], (), 0, count)
    square = jnp.square(sample - sample[start][None, :]).sum(axis=1)
    _, places = jax.lax.scan(draw, square, draws[1:])
    return sample[jnp.concatenate([start[None], places])]


def _revived(centroids_KD: jax.Array, sizes_K: jax.Array, square: jax.Array, x_ND: jax.Array, key: jax.Array):
    """Empty clusters moved to points drawn with probability proportional to their squared distance, none twice."""
    K = len(centroids_KD)
    noise = jax.random.gumbel(key, (len(x_ND),), x_ND.dtype)
    _, places = jax.lax.top_k(jnp.log(square[: len(x_ND)]) + noise, K)
    empty = sizes_K == 0
    rank = jnp.cumsum(empty) - 1
    return jnp.where(empty[:, None], x_ND[places[jnp.maximum(rank, 0)]], centroids_KD)


@functools.partial(jax.jit, static_argnames=("clusters", "iterations"))
def fit(x_ND: jax.Array, clusters: int, key: jax.Array, *, iterations: int, tolerance: float = 0.0) -> Clusters:
    """Cluster float32 points [N, D] into K <= N clusters by at most `iterations` of Lloyd's.

    Ends early once an iteration lowers the objective by no more than `tolerance` of it. Memory beyond the points and a
    copy of them: BLOCK_ENTRIES distances.
    """
    shift_D = x_ND.mean(axis=0)
    x_ND = x_ND - shift_D[None, :]  # squared distances from products lose digits far from zero
    parts, valid = blocks_of(x_ND, block_size(clusters))
    seed_key, revive_key = jax.random.split(key)
    centroids = seeds(x_ND, clusters, seed_key)
    trace = jnp.full(iterations + 1, jnp.nan, x_ND.dtype)

    def look(centroids):
        codes, square, sums, sizes = _pass(parts, valid, centroids)
        return {"centroids": centroids, "codes": codes, "square": square, "sums": sums, "sizes": sizes}

    def more(carry):
        i, _, _, going = carry
        return (i < iterations) & going

    def iteration(carry):
        i, seen, trace, _ = carry
        mean = seen["sums"] / jnp.maximum(seen["sizes"], 1)[:, None]
        moved = jnp.where(seen["sizes"][:, None] > 0, mean, seen["centroids"])
        moved = jax.lax.cond(
            (seen["sizes"] == 0).any(),
            lambda: _revived(moved, seen["sizes"], seen["square"], x_ND, jax.random.fold_in(revive_key, i)),
            lambda: moved,
        )
        seen = look(moved)
        before, now = trace[i], seen["square"].sum()
        return i + 1, seen, trace.at[i + 1].set(now), before - now > tolerance * before

    seen = look(centroids)
    start = jnp.int32(0), seen, trace.at[0].set(seen["square"].sum()), jnp.bool_(True)
    _, seen, trace, _ = jax.lax.while_loop(more, iteration, start)
    count = len(x_ND)
    return Clusters(
        seen["centroids"] + shift_D[None, :], seen["codes"][:count], seen["square"][:count], seen["sizes"], trace
    )
