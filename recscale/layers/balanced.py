"""Balanced k-means: clusters whose sizes differ by at most one, as OneRec (arXiv 2502.18965) wants its codes used.

OneRec fills one cluster after another with its nearest points, so the last ones get what is left. Here all clusters
are filled together. Prices that even out the demand come from Sinkhorn on a sample of the points; then, round after
round, every unplaced point asks for the cheapest cluster that still has room (squared distance + price), and a cluster
asked by more than it has room for takes those that would lose most elsewhere. A round fills a cluster or places all who
asked, so there are at most 2 K rounds. The sizes are exact; the objective is not the least possible one (within a few
per cent of it in the tests).
"""

import functools

import jax
import jax.numpy as jnp

from recscale.layers.kmeans import Clusters, block_size, blocks_of, fit, square_distances, sums_by_code
from recscale.layers.sinkhorn import potentials

SAMPLE_ENTRIES = 1 << 20  # distances in the sample that sets the prices
SHARPNESS = 0.05  # last temperature of the prices, in mean squared distances to the nearest centroid
STAGES, ROUNDS = 10, 10


def prices(x_ND: jax.Array, centroids_KD: jax.Array, key: jax.Array) -> jax.Array:
    """What to add to the squared distance of each cluster, [K], so that a sample asks for all of them alike."""
    K = len(centroids_KD)
    count = min(len(x_ND), max(2 * K, SAMPLE_ENTRIES // K))
    sample = x_ND if count == len(x_ND) else x_ND[jax.random.randint(key, (count,), 0, len(x_ND))]
    distances = square_distances(sample, centroids_KD)
    least = distances.min(axis=1).mean() + 1e-6 * distances.mean() + jnp.finfo(x_ND.dtype).tiny
    # From soft to sharp: sharp potentials alone need very many rounds.
    first, last = distances.mean(), SHARPNESS * least

    def stage(price_K, share):
        scale = first * (last / first) ** share
        _, v_K = potentials(-distances / scale, ROUNDS, -price_K / scale)
        return -scale * v_K, None

    price_K, _ = jax.lax.scan(stage, jnp.zeros(K, x_ND.dtype), jnp.linspace(0, 1, STAGES))
    return price_K


def _wishes(x_ND: jax.Array, centroids_KD: jax.Array, cost_K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cheapest cluster of every point, int32 [N], and how much dearer the next one is [N]; infinite costs are closed.

    Where one cluster alone is open, how much dearer it is counts as minus its cost: the nearest points come first.
    """
    parts, _ = blocks_of(x_ND, block_size(len(centroids_KD)))

    def one(part):
        cost = square_distances(part, centroids_KD) + cost_K[None, :]
        best = jnp.argmin(cost, axis=1).astype(jnp.int32)
        others = jnp.where(jnp.arange(cost.shape[1])[None, :] == best[:, None], jnp.inf, cost).min(axis=1)
        least = cost.min(axis=1)
        return best, jnp.where(jnp.isfinite(others), others - least, -least)

    best, loss = jax.lax.map(one, parts)
    return best.reshape(-1)[: len(x_ND)], loss.reshape(-1)[: len(x_ND)]


def assign(x_ND: jax.Array, centroids_KD: jax.Array, price_K: jax.Array) -> jax.Array:
    """Codes int32 [N] with floor(N / K) or ceil(N / K) points of each."""
    N, K = len(x_ND), len(centroids_KD)
    floor = N // K

    def unplaced(state):
        return (state[0] == K).any()

    def round_(state):
        codes, sizes = state
        room = floor - sizes + (sizes.sum() >= floor * K)  # one more each, once all have their floor
        wish, loss = _wishes(x_ND, centroids_KD, jnp.where(room > 0, price_K, jnp.inf))
        wish = jnp.where(codes == K, wish, K)
        asked, _, order = jax.lax.sort((wish, -loss, jnp.arange(N, dtype=jnp.int32)), num_keys=2)
        starts = jnp.searchsorted(asked, jnp.arange(K + 1, dtype=jnp.int32)).astype(jnp.int32)
        rank = jnp.arange(N, dtype=jnp.int32) - starts[asked]
        taken = (asked < K) & (rank < jnp.append(room, 0)[asked])
        codes = codes.at[jnp.where(taken, order, N)].set(asked, mode="drop", unique_indices=False)
        sizes = sizes + jnp.minimum(jnp.diff(starts), room)
        return codes, sizes

    start = jnp.full(N, K, jnp.int32), jnp.zeros(K, jnp.int32)
    return jax.lax.while_loop(unplaced, round_, start)[0]


@functools.partial(jax.jit, static_argnames=("clusters", "iterations", "balanced_iterations"))
def fit_balanced(
    x_ND: jax.Array,
    clusters: int,
    key: jax.Array,
    *,
    iterations: int,
    balanced_iterations: int,
    tolerance: float = 0.0,
) -> Clusters:
    """Plain k-means, then `balanced_iterations` in which the clusters are filled equally; the best of those is kept.

    codes_N are the clusters that the points were put in, not the nearest ones; objective_I is that of the balanced
    iterations.
    """
    start_key, price_key = jax.random.split(key)
    start = fit(x_ND, clusters, start_key, iterations=iterations, tolerance=tolerance)
    parts, valid = blocks_of(x_ND, block_size(clusters))
    n, size = valid.shape

    def measure(codes):
        """Means of the clusters, squared distances to them, sizes."""
        padded = jnp.pad(codes, (0, n * size - len(x_ND))).reshape(n, size)

        def block(carry, one):
            sums, sizes = sums_by_code(one[0], one[1], one[2].astype(x_ND.dtype), clusters)
            return (carry[0] + sums, carry[1] + sizes), None

        zeros = jnp.zeros((clusters, x_ND.shape[1]), x_ND.dtype), jnp.zeros(clusters, x_ND.dtype)
        (sums, sizes), _ = jax.lax.scan(block, zeros, (parts, padded, valid))
        means = sums / jnp.maximum(sizes, 1)[:, None]
        return means, jnp.square(x_ND - means[codes]).sum(axis=1), sizes

    def iteration(best, i):
        centroids, kept = best
        codes = assign(x_ND, centroids, prices(x_ND, centroids, jax.random.fold_in(price_key, i)))
        means, square, sizes = measure(codes)
        found = Clusters(means, codes, square, sizes, square.sum())
        better = found.objective_I < kept.objective_I
        return (means, jax.tree.map(lambda a, b: jnp.where(better, a, b), found, kept)), found.objective_I

    nothing = Clusters(start.centroids_KD, start.codes_N, start.square_N, start.sizes_K, jnp.float32(jnp.inf))
    steps = jnp.arange(balanced_iterations)
    (_, kept), objective_I = jax.lax.scan(iteration, (start.centroids_KD, nothing), steps)
    return kept._replace(objective_I=objective_I)
