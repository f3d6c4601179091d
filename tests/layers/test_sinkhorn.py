"""Sinkhorn assignment against the published golden values, and in float32 where the exponentials underflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers import sinkhorn

DISTANCES = [[0.10, 0.40, 0.90], [0.12, 0.35, 0.80], [0.11, 0.50, 0.70]]
DISTANCES += [[0.09, 0.45, 0.95], [0.13, 0.30, 0.60], [0.10, 0.42, 0.85]]
GOLDEN = {
    0.003: (
        [0, 1, 0, 0, 2, 0],
        [
            [0.501979, 0, 0],
            [0, 1.965458, 0],
            [0.494062, 0, 0.031603],
            [0.501979, 0, 0],
            [0, 0.034542, 1.968397],
            [0.501979, 0, 0],
        ],
    ),
    0.05: (
        [1, 1, 2, 0, 2, 0],
        [
            [0.412720, 0.584442, 0.001425],
            [0.025842, 0.949219, 0.023676],
            [0.016368, 0.000352, 0.986083],
            [0.918476, 0.079836, 0.000195],
            [0.000060, 0.036171, 0.966492],
            [0.626532, 0.349980, 0.022130],
        ],
    ),
    0.5: (
        [0, 1, 2, 0, 2, 0],
        [
            [0.386543, 0.384278, 0.229179],
            [0.293020, 0.403405, 0.303575],
            [0.309723, 0.202595, 0.487681],
            [0.454426, 0.341755, 0.203819],
            [0.179493, 0.326652, 0.493856],
            [0.376795, 0.341315, 0.281890],
        ],
    ),
}


@pytest.mark.parametrize("eps", GOLDEN)
def test_golden_codes_in_float32(eps: float):
    codes = jax.jit(sinkhorn.assign, static_argnums=(1, 2))(jnp.asarray(DISTANCES, jnp.float32), eps, 50)
    assert codes.dtype == jnp.int32 and codes.tolist() == GOLDEN[eps][0]


@pytest.mark.parametrize("eps", GOLDEN)
def test_golden_plan_in_float64(eps: float):
    with jax.enable_x64(True):
        plan = jnp.exp(sinkhorn.log_plan(jnp.asarray(DISTANCES, jnp.float64), eps, 50))
        assert plan.dtype == jnp.float64
        np.testing.assert_allclose(plan, GOLDEN[eps][1], atol=1e-5)


def reference(distances: np.ndarray, eps: float, iterations: int) -> np.ndarray:
    """The formula as the references write it, in float64 and without logarithms."""
    top, bottom = distances.max(), distances.min()
    middle = (top + bottom) / 2
    q = np.exp(-(distances - middle) / (top - middle + 1e-5) / eps)
    B, K = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * B
        q /= q.sum(axis=0, keepdims=True) * K
    return q * B


def test_float32_follows_the_float64_reference_where_float32_exponentials_are_gone():
    # 256 codes at eps .003: exp(-d / eps) spans 280 powers of ten.
    distances = np.random.default_rng(0).random((512, 256)) ** 2
    expected = reference(distances, 0.003, 50)
    assert np.isfinite(expected).all()
    assert (np.exp(-np.float32(2 / 0.003)) == 0) and (expected < 1e-40).any()
    found = np.asarray(jnp.exp(sinkhorn.log_plan(jnp.asarray(distances, jnp.float32), 0.003, 50)))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    codes = np.asarray(sinkhorn.assign(jnp.asarray(distances, jnp.float32), 0.003, 50))
    assert (codes == expected.argmax(axis=1)).mean() > 0.99


def test_the_columns_are_exact_and_codes_are_used_evenly():
    rng = np.random.default_rng(1)
    distances = jnp.asarray(rng.random((600, 8)) + 3 * np.arange(8)[None, :], jnp.float32)  # all prefer code 0
    plan = jnp.exp(sinkhorn.log_plan(distances, 0.01, 100))
    np.testing.assert_allclose(plan.sum(axis=0), 600 / 8, rtol=1e-4)
    assert set(distances.argmin(axis=1).tolist()) == {0}
    counts = np.bincount(sinkhorn.assign(distances, 0.01, 100), minlength=8)
    assert counts.min() > 50 and counts.max() < 100


def test_equal_rows_get_equal_codes():
    distances = jnp.asarray(np.random.default_rng(2).random((40, 5)), jnp.float32)
    codes = np.asarray(sinkhorn.assign(jnp.concatenate([distances, distances[::-1]]), 0.05, 50))
    np.testing.assert_array_equal(codes[:40], codes[40:][::-1])


def test_potentials_go_on_from_where_they_were():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(20, 6)), jnp.float32)
    _, half = sinkhorn.potentials(logits, 5)
    _, whole = sinkhorn.potentials(logits, 10)
    np.testing.assert_array_equal(sinkhorn.potentials(logits, 5, half)[1], whole)
