"""Residual quantisation: planted hierarchies, gradients of the estimators, moving averages, restarts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers import quantize as vq


def hierarchy(levels: int = 3, codes: int = 4, dim: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codebooks [Q, K, D] each a tenth of the one before, all tuples [N, Q], and their sums [N, D]."""
    rng = np.random.default_rng(0)
    books = rng.normal(size=(levels, codes, dim)) * 0.1 ** np.arange(levels)[:, None, None]
    tuples = np.stack(np.meshgrid(*[np.arange(codes)] * levels, indexing="ij"), axis=-1).reshape(-1, levels)
    vectors = sum(books[q][tuples[:, q]] for q in range(levels))
    return books.astype(np.float32), tuples, vectors.astype(np.float32)


@pytest.mark.parametrize("estimator", vq.STRAIGHT_THROUGH)
def test_a_planted_hierarchy_comes_back_exactly(estimator: str):
    books, tuples, vectors = hierarchy()
    found = vq.quantize(jnp.asarray(vectors), jnp.asarray(books), estimator)
    np.testing.assert_array_equal(found.codes_BQ, tuples)
    np.testing.assert_allclose(found.passed_BD, vectors, atol=1e-6)
    np.testing.assert_allclose(found.residual_QBD[1] + found.chosen_QBD[0], vectors, atol=1e-6)


def inputs() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(5, 6)), jnp.float32), jnp.asarray(rng.normal(size=(3, 8, 6)), jnp.float32)


def test_per_level_only_the_first_commitment_reaches_the_encoder():
    z, books = inputs()

    def commitment(z, level, estimator):
        return vq.quantization_losses(vq.quantize(z, books, estimator), "sum")[1][level]

    for level in range(3):
        residual, chosen = (a[level] for a in vq.quantize(z, books, "sum")[2:])
        expected = 2 * (residual - chosen) / len(z)
        per_level = jax.grad(commitment)(z, level, "per_level")
        np.testing.assert_array_equal(per_level, expected if level == 0 else jnp.zeros_like(z))
        np.testing.assert_allclose(jax.grad(commitment)(z, level, "sum"), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(commitment)(z, level, "rotation"), expected, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["per_level", "sum"])
def test_a_copied_gradient_reaches_the_encoder_once_and_no_codebook(estimator: str):
    z, books = inputs()
    weight = jnp.asarray(np.random.default_rng(2).normal(size=z.shape), jnp.float32)

    def handed_on(z, books):
        return (weight * vq.quantize(z, books, estimator).passed_BD).sum()

    to_z, to_books = jax.grad(handed_on, argnums=(0, 1))(z, books)
    np.testing.assert_array_equal(to_z, weight)
    assert not np.any(to_books)


def test_a_codebook_learns_from_its_own_level_alone():
    z, books = inputs()
    for level in range(3):
        gradient = jax.grad(lambda b, i=level: vq.quantization_losses(vq.quantize(z, b, "sum"), "sum")[0][i])(books)
        touched = np.abs(np.asarray(gradient)).sum(axis=(1, 2)) > 0
        assert touched.tolist() == [i == level for i in range(3)]


def test_rotation_gives_the_target_and_keeps_angle_and_length():
    rng = np.random.default_rng(3)
    e, q, g = (jnp.asarray(rng.normal(size=(7, 5)), jnp.float32) for _ in range(3))
    value, pull = jax.vjp(lambda e: vq.rotate(e, q), e)
    np.testing.assert_allclose(value, q, atol=1e-6)
    (back,) = pull(g)
    length = np.linalg.norm
    scale = length(q, axis=1) / length(e, axis=1)
    np.testing.assert_allclose(length(back, axis=1), scale * length(g, axis=1), rtol=1e-5)
    cos_before = (g * q).sum(axis=1) / length(g, axis=1) / length(q, axis=1)
    cos_after = (back * e).sum(axis=1) / length(back, axis=1) / length(e, axis=1)
    np.testing.assert_allclose(cos_after, cos_before, atol=1e-5)


def test_rotation_of_opposite_and_zero_vectors_is_finite():
    e = jnp.asarray([[1.0, 2], [0, 0], [1, 0]])
    q = jnp.asarray([[-1.0, -2], [1, 1], [0, 0]])
    value, pull = jax.vjp(lambda e: vq.rotate(e, q), e)
    (back,) = pull(jnp.ones_like(e))
    np.testing.assert_allclose(value, q)
    assert np.isfinite(back[0]).all() and np.isfinite(back[2]).all()


def test_reductions_are_what_they_say():
    z, books = inputs()
    found = vq.quantize(z, books, "sum")
    total, mean = (vq.quantization_losses(found, over)[0] for over in ("sum", "mean"))
    by_hand = ((np.asarray(found.residual_QBD) - np.asarray(found.chosen_QBD)) ** 2).sum(axis=2).mean(axis=1)
    np.testing.assert_allclose(total, by_hand, rtol=1e-6)
    np.testing.assert_allclose(mean * 6, by_hand, rtol=1e-6)


def test_moving_averages_equal_a_computation_by_hand():
    books = jnp.asarray([[[1.0, 0], [0, 1], [5, 5]]])
    codes = jnp.asarray([[0], [0], [1]])
    residual = jnp.asarray([[[2.0, 0], [4, 2], [0, 3]]])
    batch = vq.batch_totals(codes, residual, 3)
    assert batch.size_QK.tolist() == [[2, 1, 0]] and batch.total_QKD.tolist() == [[[6, 2], [0, 3], [0, 0]]]
    new, rows = vq.update_averages(vq.averages(books), batch, 0.9, books)
    np.testing.assert_allclose(new.size_QK, [[0.9 + 0.2, 0.9 + 0.1, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(rows[0, 0], [(0.9 * 1 + 0.1 * 6) / 1.1, 0.1 * 2 / 1.1], rtol=1e-6)
    np.testing.assert_allclose(rows[0, 1], [0, (0.9 + 0.3) / 1.0], rtol=1e-6)
    np.testing.assert_array_equal(rows[0, 2], books[0, 2])


def test_a_row_that_goes_unused_for_long_stays():
    books = jnp.asarray([[[1.0, 0], [0, 1]]])
    batch = vq.Averages(jnp.asarray([[4.0, 0]]), jnp.asarray([[[4.0, 0], [0, 0]]]))
    state, rows = vq.averages(books), books
    for _ in range(100):
        state, rows = vq.update_averages(state, batch, 0.1, rows)
    np.testing.assert_allclose(rows, books)


def test_a_restart_revives_dead_codes_alone_with_residuals_of_their_level():
    z, books = inputs()
    residual = vq.quantize(z, books, "sum").residual_QBD
    dead = jnp.zeros((3, 8), bool).at[0, 2].set(True).at[2, 5].set(True).at[2, 6].set(True)
    new = np.asarray(vq.restart(books, dead, residual, jax.random.key(0)))
    np.testing.assert_array_equal(new[~np.asarray(dead)], np.asarray(books)[~np.asarray(dead)])
    for level, code in ((0, 2), (2, 5), (2, 6)):
        assert new[level, code].tolist() in np.asarray(residual[level]).tolist()
    many = jnp.asarray(np.random.default_rng(4).normal(size=(3, 50, 6)), jnp.float32)
    everywhere = np.asarray(vq.restart(books, jnp.ones((3, 8), bool), many, jax.random.key(1)))
    assert all(len(np.unique(level, axis=0)) == 8 for level in everywhere)


def test_perplexity_of_even_use_and_of_one_code():
    np.testing.assert_allclose(vq.perplexity(jnp.asarray([[5.0, 5, 5, 5], [9, 0, 0, 0]])), [4, 1], rtol=1e-6)


def test_the_last_level_may_be_assigned_otherwise():
    z, books = inputs()
    found = vq.quantize(z, books, "sum", last=lambda d: jnp.full(len(d), 7, jnp.int32))
    assert found.codes_BQ[:, 2].tolist() == [7] * 5
    np.testing.assert_array_equal(found.codes_BQ[:, :2], vq.quantize(z, books, "sum").codes_BQ[:, :2])
