"""Norms, dropout and initialisers against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers.norms import LayerNorm, Linear, dropout, l2_normalize, layer_norm, truncated_normal


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_layer_norm(eps):
    x = draw(3, 5, 8).astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    np.testing.assert_allclose(jax.jit(layer_norm)(x.astype(np.float32), eps), expected, atol=2e-6)


def test_statistics_are_float32_for_bfloat16():
    x = jnp.asarray(draw(4, 256) + 300.0, jnp.bfloat16)  # a bfloat16 mean of these would be off by about one
    got = jax.jit(layer_norm)(x, 1e-6)
    assert got.dtype == jnp.bfloat16
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / x64.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_affine_layer_norm_and_linear_keep_the_type(dtype):
    norm = LayerNorm(4, 1e-6)
    norm.scale[...], norm.bias[...] = jnp.arange(4.0), jnp.arange(4.0) - 1
    x = jnp.asarray(draw(2, 3, 4), dtype)
    x64 = np.asarray(x, np.float64)
    y64 = (x64 - x64.mean(-1, keepdims=True)) / x64.std(-1, keepdims=True) * np.arange(4) + np.arange(4) - 1
    y = norm(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), y64, atol=1e-4 if dtype == jnp.float32 else 0.03)
    linear = Linear(4, 2, jax.nn.initializers.normal(1.0), jax.random.key(0))
    linear.bias[...] = jnp.asarray([5.0, -5.0])
    z = linear(x)
    assert z.dtype == dtype
    expected = x64 @ np.asarray(linear.kernel[...], np.float64) + [5.0, -5.0]
    np.testing.assert_allclose(np.asarray(z, np.float64), expected, atol=1e-5 if dtype == jnp.float32 else 0.1)
    assert Linear(4, 2, jax.nn.initializers.zeros, jax.random.key(0), bias=False).bias is None


def test_l2_normalize():
    x = draw(6, 5)
    x[0], x[1] = 0.0, 1e-8
    expected = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    np.testing.assert_allclose(jax.jit(l2_normalize)(x), expected, rtol=1e-5)
    grad = np.asarray(jax.jit(jax.grad(lambda x: l2_normalize(x).sum()))(x))
    np.testing.assert_allclose(grad[:2], 1e6, rtol=1e-5)
    tangent = grad[2:] * x[2:]  # the length of a vector does not matter: no gradient along it
    np.testing.assert_allclose(tangent.sum(-1), 0.0, atol=1e-5)
    assert l2_normalize(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


def test_dropout():
    x = np.ones((400, 500), np.float32)
    run = jax.jit(dropout, static_argnums=1)
    got = np.asarray(run(x, 0.3, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(got), [0.0, 1 / 0.7], rtol=1e-6)
    assert (got == 0).mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / got.size))
    np.testing.assert_array_equal(got, run(x, 0.3, jax.random.key(0)))
    assert np.any(got != np.asarray(run(x, 0.3, jax.random.key(1))))
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_truncated_normal_is_redrawn_not_clipped():
    x = np.asarray(truncated_normal(0.02)(jax.random.key(0), (300, 300)))
    assert np.abs(x).max() <= 0.04 and np.mean(np.abs(x) > 0.0399) < 2e-3
    assert x.std() == pytest.approx(0.02 * 0.87962566, rel=0.01)  # sd of a normal cut at two sigma
    assert abs(x.mean()) < 5 * 0.02 / 300
