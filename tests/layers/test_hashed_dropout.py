"""Hashed masks look drawn: rate, independence along entries, bits and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers.hashed_dropout import dropout, hash_bits


def bits(key: int, size: int = 1 << 17) -> np.ndarray:
    """[size, 32] bits of a key."""
    return (np.asarray(hash_bits(jax.random.key(key), (size,)))[:, None] >> np.arange(32)) & 1


def test_masks_have_the_rate_and_keep_the_mean():
    x = jnp.ones((64, 64, 16))
    for rate in (0.1, 0.5):
        y = np.asarray(dropout(x, rate, jax.random.key(3)))
        assert set(np.unique(y)) == {0.0, np.float32(1.0 / (1.0 - rate))}
        error = (rate * (1 - rate) / y.size) ** 0.5
        assert (y == 0).mean() == pytest.approx(rate, abs=4 * error)
        for axis in range(3):  # no row, column or plane is favoured
            share = (y == 0).mean(axis=tuple(a for a in range(3) if a != axis))
            assert share.std() == pytest.approx(error * y.shape[axis] ** 0.5, rel=0.6)
    assert dropout(x, 0.1, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_every_bit_is_fair_and_uncorrelated():
    """Over entries of a key, with the neighbours, with other bits, and with the same entries of the next key."""
    one, other = bits(5) - 0.5, bits(6) - 0.5
    sigma = 0.25 / len(one) ** 0.5
    assert np.abs(one.mean(axis=0)).max() < 4.5 * 2 * sigma
    for lag in (1, 2, 64, 80, 1024, 4096):
        assert np.abs((one[lag:] * one[:-lag]).mean(axis=0)).max() < 4.5 * sigma
    between = one.T @ one / len(one)
    assert np.abs(between - np.diag(np.diag(between))).max() < 5 * sigma
    assert np.abs(one.T @ other / len(one)).max() < 5 * sigma


def test_masks_are_those_of_the_key():
    first, again, other = (np.asarray(hash_bits(jax.random.key(i), (5, 7))) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    grad = jax.grad(lambda x: (dropout(x, 0.5, jax.random.key(0)) * 3.0).sum())(jnp.ones((5, 7)))
    np.testing.assert_array_equal(grad, 3.0 * dropout(jnp.ones((5, 7)), 0.5, jax.random.key(0)))
