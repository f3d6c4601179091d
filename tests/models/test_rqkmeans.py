"""Residual k-means and product quantisation on planted data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import rqkmeans

SMALL = rqkmeans.Config(levels=3, codebook=4, iterations=20)


def planted() -> tuple[np.ndarray, np.ndarray]:
    """All 64 tuples of a hierarchy of 3 levels of 4 codes, each far finer than the one before; and the vectors."""
    scale = np.array([100.0, 10.0, 1.0])
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) - 0.5
    tuples = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    return tuples, sum(scale[q] * corners[tuples[:, q]] for q in range(3)).astype(np.float32)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def test_a_planted_hierarchy_is_reconstructed_exactly():
    tuples, x = planted()
    found = rqkmeans.fit(SMALL, jnp.asarray(x), jax.random.key(0))
    np.testing.assert_allclose(found.reconstruction_ND, x, atol=1e-3)
    for level in range(3):
        assert same_partition(np.asarray(found.codes_NQ)[:, level], tuples[:, level])
    decoded = sum(np.asarray(book)[codes] for book, codes in zip(found.codebooks, found.codes_NQ.T, strict=True))
    np.testing.assert_allclose(found.reconstruction_ND, decoded, atol=1e-5)
    left = x - sum(np.asarray(found.codebooks[q])[np.asarray(found.codes_NQ)[:, q]] for q in range(2))
    np.testing.assert_allclose(found.last_ND, left, atol=1e-4)


def test_each_level_leaves_less_over():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)), jnp.float32)
    ends = [np.nanmin(trace) for trace in rqkmeans.fit(SMALL, x, jax.random.key(0)).objectives]
    assert ends[0] > 1.5 * ends[1] > 2 * ends[2]


def test_residuals_of_length_one_decode_by_their_lengths():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)) + 3, jnp.float32)
    c = rqkmeans.Config(levels=3, codebook=4, iterations=20, normalize_residuals=True)
    found = rqkmeans.fit(c, x, jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(found.last_ND, axis=1), 1, rtol=1e-5)
    error = np.square(np.asarray(found.reconstruction_ND) - x).sum() / np.square(x - x.mean(axis=0)[None]).sum()
    assert error < 0.1


def test_balanced_levels_have_equal_sizes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)) ** 3, jnp.float32)
    c = rqkmeans.Config(levels=2, codebook=4, iterations=10, balanced_iterations=3)
    codes = np.asarray(rqkmeans.fit(c, x, jax.random.key(0)).codes_NQ)
    assert [np.bincount(level).tolist() for level in codes.T] == [[16] * 4] * 2


def test_a_sample_of_the_points_serves_all_of_them():
    x = np.concatenate([planted()[1]] * 4)
    c = rqkmeans.Config(levels=1, codebook=4, iterations=20, points_per_code=16)
    found = rqkmeans.fit(c, jnp.asarray(x), jax.random.key(0))
    square = ((x[:, None] - np.asarray(found.codebooks[0])[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found.codes_NQ[:, 0], square.argmin(axis=1))
    assert len(x) == 256 and len(found.codes_NQ) == 256


def test_a_product_clusters_each_part_by_itself():
    _, parts = planted()
    x = np.concatenate([parts, parts[::-1]], axis=1)
    c = rqkmeans.Config(levels=2, codebook=4, iterations=20)
    found = rqkmeans.fit_product(c, jnp.asarray(x), jax.random.key(0))
    decoded = [np.asarray(b)[np.asarray(k)] for b, k in zip(found.codebooks, found.codes_NQ.T, strict=True)]
    np.testing.assert_allclose(found.reconstruction_ND, np.concatenate(decoded, axis=1))
    assert found.codebooks[0].shape == (4, 2)
    assert same_partition(np.asarray(found.codes_NQ)[:, 0], np.asarray(found.codes_NQ)[::-1, 1])
    with pytest.raises(ValueError, match=r"model.levels = 2 does not divide the 3 dimensions"):
        rqkmeans.fit_product(c, jnp.zeros((8, 3)), jax.random.key(0))


def test_parameters_are_counted():
    found = rqkmeans.fit(SMALL, jnp.asarray(planted()[1]), jax.random.key(0))
    assert rqkmeans.param_groups(SMALL, 2) == {"codebooks": sum(book.size for book in found.codebooks)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"levels": 0}, "model.levels = 0"),
        ({"codebook": 1}, "model.codebook = 1"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"points_per_code": 5, "balanced_iterations": 2}, "make one 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        rqkmeans.Config(**change)
