"""k-means: its objective, a numpy twin, scikit-learn, degenerate data, and clusters of equal size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from recscale.layers import balanced, kmeans


def blobs(count: int = 600, clusters: int = 12, dim: int = 5, spread: float = 0.3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(clusters, dim))
    return (centres[rng.integers(0, clusters, count)] + spread * rng.normal(size=(count, dim))).astype(np.float32)


def twin(x: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float]]:
    """Lloyd's iterations in plain numpy; no cluster may be empty."""
    trace = []
    for i in range(iterations + 1):
        square = ((x[:, None] - centroids[None]) ** 2).sum(axis=2)
        trace.append(square.min(axis=1).sum())
        if i < iterations:
            codes = square.argmin(axis=1)
            centroids = np.stack([x[codes == k].mean(axis=0) for k in range(len(centroids))])
    return centroids, trace


def test_equals_the_numpy_twin():
    x, key = blobs(), jax.random.key(0)
    found = kmeans.fit(jnp.asarray(x), 12, key, iterations=6)
    seed_key, _ = jax.random.split(key)
    centred = x.astype(np.float64) - x.mean(axis=0)
    start = np.asarray(kmeans.seeds(jnp.asarray(x) - jnp.asarray(x).mean(axis=0)[None], 12, seed_key))
    centroids, trace = twin(centred, start.astype(np.float64), 6)
    found_trace = np.asarray(found.objective_I)
    ended = np.isfinite(found_trace)
    np.testing.assert_allclose(found_trace[ended], np.array(trace)[ended], rtol=1e-4)
    np.testing.assert_allclose(found.centroids_KD, centroids + x.mean(axis=0), atol=1e-3)


@pytest.mark.parametrize("entries", [1 << 20, 1])
def test_blocks_do_not_change_what_is_found(monkeypatch, entries: int):
    """601 points in one block of 601 or in three of 256."""
    x = jnp.asarray(blobs(601))
    size = kmeans.block_size
    monkeypatch.setattr(kmeans, "block_size", lambda clusters: size(clusters, entries))
    kmeans.fit.clear_cache()
    found = kmeans.fit(x, 7, jax.random.key(3), iterations=10)
    kmeans.fit.clear_cache()
    assert int(found.sizes_K.sum()) == 601 and len(found.codes_N) == len(found.square_N) == 601
    np.testing.assert_array_equal(np.bincount(found.codes_N, minlength=7), found.sizes_K)
    square = ((np.asarray(x)[:, None] - np.asarray(found.centroids_KD)[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found.codes_N, square.argmin(axis=1))
    np.testing.assert_allclose(found.square_N, square.min(axis=1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_objective_never_increases(seed: int):
    x = np.random.default_rng(seed).normal(size=(600, 5)).astype(np.float32) ** 3
    trace = np.asarray(kmeans.fit(jnp.asarray(x), 12, jax.random.key(seed), iterations=20).objective_I)
    trace = trace[np.isfinite(trace)]
    assert len(trace) > 3 and (np.diff(trace) <= 1e-5 * trace[0]).all()


def test_as_good_as_scikit_learn_on_blobs():
    x = blobs(spread=0.8)
    theirs = KMeans(12, n_init=5, random_state=0).fit(x).inertia_
    ours = min(
        np.nanmin(kmeans.fit(jnp.asarray(x), 12, jax.random.key(seed), iterations=20).objective_I) for seed in range(5)
    )
    assert abs(ours / theirs - 1) < 0.03


def test_far_from_zero_it_finds_the_same():
    x = blobs()
    near = kmeans.fit(jnp.asarray(x), 12, jax.random.key(0), iterations=20)
    far = kmeans.fit(jnp.asarray(x + np.float32(1000)), 12, jax.random.key(0), iterations=20)
    assert (near.codes_N == far.codes_N).mean() > 0.99


def test_an_empty_cluster_moves_to_a_point_that_is_badly_served():
    x = jnp.asarray(np.repeat([[0.0, 0], [1, 0], [0, 50]], 4, axis=0), jnp.float32)
    centroids = jnp.asarray([[0.5, 0], [0.5, 0], [0.5, 0]], jnp.float32)
    _, square = kmeans.assign(x, centroids)
    sizes = jnp.asarray([12.0, 0, 0])
    moved = np.asarray(kmeans._revived(centroids, sizes, square, x, jax.random.key(0)))
    np.testing.assert_array_equal(moved[0], centroids[0])
    assert [0, 50] in moved[1:].tolist() and all(row in np.asarray(x).tolist() for row in moved[1:].tolist())


def test_fewer_distinct_points_than_clusters_leaves_no_error_and_no_nan():
    x = jnp.asarray(np.repeat(np.eye(5), 30, axis=0), jnp.float32)
    found = kmeans.fit(x, 12, jax.random.key(0), iterations=20)
    assert np.isfinite(found.centroids_KD).all() and float(found.square_N.max()) < 1e-6


def test_same_seed_same_bits_and_another_seed_other_ones():
    x = jnp.asarray(blobs(spread=1.0))
    one, two, other = (kmeans.fit(x, 12, jax.random.key(seed), iterations=20) for seed in (1, 1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(one.centroids_KD) != np.asarray(other.centroids_KD)).any()


def test_sums_by_code_are_those_of_numpy():
    rng = np.random.default_rng(0)
    x, codes, weight = rng.normal(size=(50, 3)), rng.integers(0, 6, 50), rng.random(50)
    sums, sizes = kmeans.sums_by_code(*(jnp.asarray(a) for a in (x, codes, weight)), 6)
    np.testing.assert_allclose(sums, [(x * weight[:, None])[codes == k].sum(axis=0) for k in range(6)], atol=1e-5)
    np.testing.assert_allclose(sizes, [weight[codes == k].sum() for k in range(6)], atol=1e-5)


def test_nearest_takes_the_first_of_equals():
    codes, least = kmeans.nearest(jnp.asarray([[2.0, 1, 1], [0, 0, 0], [3, 2, 1]]))
    assert codes.tolist() == [1, 0, 2] and least.tolist() == [1, 0, 1] and codes.dtype == jnp.int32


@pytest.mark.parametrize(("points", "clusters"), [(603, 20), (600, 20), (45, 40)])
def test_balanced_sizes_differ_by_at_most_one(points: int, clusters: int):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(points, 4)) ** 3, jnp.float32)
    found = balanced.fit_balanced(x, clusters, jax.random.key(0), iterations=10, balanced_iterations=4)
    sizes = np.bincount(found.codes_N, minlength=clusters)
    assert sizes.sum() == points and sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(sizes, found.sizes_K)
    means = np.stack([np.asarray(x)[np.asarray(found.codes_N) == k].mean(axis=0) for k in range(clusters)])
    np.testing.assert_allclose(found.centroids_KD, means, atol=1e-4)
    np.testing.assert_allclose(found.square_N.sum(), np.min(found.objective_I), rtol=1e-5)


def test_a_balanced_assignment_is_near_the_best_one():
    """Against the optimum of the assignment problem with places for every point; equal prices are far from it."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(600, 4)), jnp.float32)
    centroids = kmeans.fit(x, 20, jax.random.key(0), iterations=20).centroids_KD
    square = np.asarray(kmeans.square_distances(x, centroids))
    rows, places = linear_sum_assignment(np.repeat(square, 30, axis=1))
    best = np.repeat(square, 30, axis=1)[rows, places].sum()
    price = balanced.prices(x, centroids, jax.random.key(1))
    cost = {}
    for name, prices in (("priced", price), ("free", jnp.zeros_like(price))):
        codes = np.asarray(jax.jit(balanced.assign)(x, centroids, prices))
        assert (np.bincount(codes, minlength=20) == 30).all()
        cost[name] = square[np.arange(600), codes].sum()
    assert best <= cost["priced"] * (1 + 1e-5) and cost["priced"] < 1.05 * best < cost["free"]
