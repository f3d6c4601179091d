"""Counter noise is normal: shape, tails, independence of rows, steps and dimensions; and whose entry is whose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding

from recscale.layers import counter_noise
from recscale.layers.counter_noise import RADIUS_BITS, normal
from recscale.layers.hashed_dropout import hash_bits
from recscale.mesh import BATCH, make_mesh

N, STEPS, D = 1024, 64, 64
DRAW = jax.jit(normal, static_argnums=2)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """[STEPS, N, D] = 4 million entries, float64. Keys as the samplers get them: one seed, folded with row numbers."""
    keys_N = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(N))
    return np.asarray(jax.jit(lambda: jax.lax.map(lambda i: normal(keys_N, i, D), jnp.arange(STEPS)))(), np.float64)


def test_moments_and_distribution(noise):
    z = noise.ravel()
    # Standard errors of mean, variance, skewness and kurtosis of z.size normals; 4 of each.
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z**moment).mean() - expected) < 4 * np.sqrt(variance / z.size), moment
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
    counts = np.histogram(z, scipy.stats.norm.ppf(np.linspace(0, 1, 1025)))[0]
    assert 1e-3 < scipy.stats.chisquare(counts).pvalue < 1 - 1e-3


@pytest.mark.parametrize("bound", [3.0, 4.0, 4.5])
def test_tails(noise, bound: float):
    for tail in (noise > bound, noise < -bound):
        expected = noise.size * scipy.stats.norm.sf(bound)  # 5,662, 133 and 14
        assert abs(tail.sum() - expected) < 4.5 * np.sqrt(expected)


def test_every_row_and_every_step_is_standard_normal(noise):
    """No dimension, row or step is favoured; squares of a row sum to chi^2, so its entries go on no common scale."""
    for axis, count in ((0, N * D), (1, STEPS * D), (2, STEPS * N)):
        rest = tuple(a for a in range(3) if a != axis)
        mean, square = noise.mean(axis=rest), np.square(noise).mean(axis=rest)
        assert scipy.stats.kstest(mean * np.sqrt(count), "norm").pvalue > 1e-3
        assert scipy.stats.kstest((square - 1) * np.sqrt(count / 2), "norm").pvalue > 1e-3
    squares = np.square(noise).sum(axis=2).ravel()
    assert scipy.stats.kstest(squares, scipy.stats.chi2(D).cdf).pvalue > 1e-3
    sums = noise.sum(axis=2).ravel() / np.sqrt(D)
    assert scipy.stats.kstest(sums, "norm").pvalue > 1e-3


def test_no_two_dimensions_rows_or_steps_go_together(noise):
    """Correlations of entries, and of their squares, are within Monte-Carlo error, the largest of all pairs too."""
    for values in (noise, (np.square(noise) - 1) / np.sqrt(2)):
        for axis in range(3):
            columns = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])[:, :256]
            C = columns.T @ columns / np.sqrt(len(columns))
            pairs = C[np.triu_indices(len(C), 1)]
            assert np.abs(pairs).max() < 5.5  # 32,640 pairs at most: 5.5 once in 800 times
            assert np.square(pairs).mean() == pytest.approx(1.0, abs=5 * np.sqrt(2 / len(pairs)))
    for lag in (1, 2, 3, 32):  # neighbours of the hash's counter, one row and step at a time
        product = (noise[..., lag:] * noise[..., :-lag]).ravel()
        assert abs(product.mean()) < 4 * np.sqrt(1 / product.size)


def test_radius_and_angle_against_float64():
    keys_N = jax.random.split(jax.random.key(1), 300)
    words = jax.jit(jax.vmap(lambda key: hash_bits(jax.random.fold_in(key, 7), (2, 50))))(keys_N)
    first, second = np.asarray(words[:, 0], np.int64), np.asarray(words[:, 1], np.int64)
    u = (2 * (first >> (32 - RADIUS_BITS)) + 1) / 2.0**24
    expected = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * second / 2.0**32)
    np.testing.assert_allclose(DRAW(keys_N, 7, 50), expected, atol=3e-6)


def test_the_ends_of_both_words():
    """u nearest to 0 and to 1 (a logarithm above 0 would be NaN), and the quarters of a turn."""
    radius, cosine = jax.jit(counter_noise._radius), jax.jit(counter_noise._cosine)
    ends = jnp.array([0, 2**9 - 1, 2**32 - 1, 2**32 - 2**9], jnp.uint32)
    expected = np.sqrt(-2 * np.log([2.0**-24, 2.0**-24, 1 - 2.0**-24, 1 - 2.0**-24]))
    np.testing.assert_allclose(radius(ends), expected, rtol=1e-6)
    every = np.asarray(radius(jnp.arange(2**32 - 2**21, 2**32, 2**9, dtype=jnp.uint32)))
    assert (every > 0).all()
    quarters = jnp.array([0, 2**30, 2**31, 3 * 2**30], jnp.uint32)
    np.testing.assert_allclose(cosine(quarters), [1, 0, -1, 0], atol=2e-7)


def test_an_entry_depends_on_key_and_step_alone():
    keys_N = jax.random.split(jax.random.key(2), 16)
    z = DRAW(keys_N, 3, 8)
    assert z.shape == (16, 8) and z.dtype == jnp.float32
    np.testing.assert_array_equal(z, DRAW(keys_N, 3, 8))
    np.testing.assert_array_equal(z[::-1], DRAW(keys_N[::-1], 3, 8))
    np.testing.assert_allclose(z[5:6], DRAW(keys_N[5:6], 3, 8), atol=1e-6)
    with jax.set_mesh(mesh := make_mesh(1, 4, 2)):
        spread = DRAW(jax.device_put(keys_N, NamedSharding(mesh, BATCH)), 3, 8)
    assert spread.sharding.num_devices == 8
    np.testing.assert_allclose(z, spread, atol=1e-6)
    for other in (DRAW(keys_N, 4, 8), DRAW(jax.random.split(jax.random.key(3), 16), 3, 8)):
        assert (np.abs(np.asarray(z - other)) > 1e-6).all()
