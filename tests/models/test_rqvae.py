"""RQ-VAE: its losses by hand, what its settings mean, alignment, counts, and configs that cannot be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import rqvae

SMALL = rqvae.Config(input_dim=6, hidden=(8,), latent=4, levels=3, codebook=5)


def inputs(rows: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(rows, 6)), jnp.float32)


def model(c: rqvae.Config) -> rqvae.Model:
    return rqvae.Model(c, jax.random.key(0))


def by_hand(c: rqvae.Config, m: rqvae.Model, x: np.ndarray) -> tuple[float, list[float], np.ndarray]:
    """Reconstruction, squared distance of every level (sums over dimensions, means over the batch) and codes."""

    def stack(maps, h):
        for i, linear in enumerate(maps):
            h = h @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
            h = np.maximum(h, 0) if i < len(maps) - 1 else h
        return h

    residual, total, distances, codes = stack(m.encoder.maps, x), 0.0, [], []
    for book in np.asarray(m.codebooks[...]):
        square = ((residual[:, None] - book[None]) ** 2).sum(axis=2)
        codes.append(square.argmin(axis=1))
        distances.append(square.min(axis=1).mean())
        residual, total = residual - book[codes[-1]], total + book[codes[-1]]
    return ((x - stack(m.decoder.maps, total)) ** 2).sum(axis=1).mean(), distances, np.stack(codes, axis=1)


@pytest.mark.parametrize("estimator", ["per_level", "sum", "rotation"])
def test_the_losses_are_those_of_the_paper(estimator: str):
    c = dataclasses.replace(SMALL, straight_through=estimator)
    m, x = model(c), inputs()
    losses, found = rqvae.loss(c, m, x)
    reconstruction, distances, codes = by_hand(c, m, np.asarray(x))
    np.testing.assert_array_equal(found.codes_BQ, codes)
    np.testing.assert_allclose(losses.reconstruction, reconstruction, rtol=1e-4)
    np.testing.assert_allclose(losses.codebook, sum(distances), rtol=1e-4)
    np.testing.assert_allclose(losses.total, reconstruction + 1.25 * sum(distances), rtol=1e-4)
    mean = dataclasses.replace(c, over_dims="mean", over_levels="mean")
    np.testing.assert_allclose(rqvae.loss(mean, m, x)[0].commitment, sum(distances) / 4 / 3, rtol=1e-4)
    np.testing.assert_allclose(rqvae.loss(mean, m, x)[0].reconstruction, reconstruction / 6, rtol=1e-4)


def gradient(c: rqvae.Config) -> rqvae.Model:
    return jax.grad(lambda m: rqvae.loss(c, m, inputs())[0].total)(model(c))


def test_codebooks_that_learn_by_averages_get_no_gradient():
    assert np.any(gradient(SMALL).codebooks[...])
    assert not np.any(gradient(dataclasses.replace(SMALL, learning="ema")).codebooks[...])


def test_per_level_the_encoder_hears_less_than_by_the_sum():
    """The same network and batch: the estimators give the same losses and other gradients, and only to the encoder."""
    per_level, whole = gradient(SMALL), gradient(dataclasses.replace(SMALL, straight_through="sum"))
    np.testing.assert_allclose(per_level.codebooks[...], whole.codebooks[...], rtol=1e-5)
    a, b = (g.encoder.maps[0].kernel[...] for g in (per_level, whole))
    assert float(jnp.abs(a - b).max()) > 1e-3 * float(jnp.abs(a).max())


def test_sinkhorn_spreads_the_last_level_in_training_alone():
    c = dataclasses.replace(SMALL, assignment="sinkhorn", sinkhorn_eps=0.05)
    m, x = model(c), inputs(200)
    trained = np.asarray(rqvae.loss(c, m, x)[1].codes_BQ)
    nearest = np.asarray(rqvae.encode(c, m, x)[0])
    np.testing.assert_array_equal(trained[:, :2], nearest[:, :2])
    counts = [np.bincount(codes[:, 2], minlength=5) for codes in (trained, nearest)]
    assert counts[0].std() < counts[1].std()


def test_contrast_is_the_nats_of_the_items_own_vector_and_leaves_unknown_items_out():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    b[2] = 0
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-6) for v in (a, b)]
    logits = (unit[0] @ unit[1].T / 0.5)[[0, 1, 3]][:, [0, 1, 3]]
    expected = (np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)).mean()
    found = rqvae.contrast(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(rqvae.contrast(jnp.asarray(a, jnp.float32), jnp.zeros((4, 3)), 0.5)) == 0


def test_alignment_adds_its_share_and_moves_the_encoder():
    c = dataclasses.replace(SMALL, align_dim=3, align_weight=0.5)
    m, x = model(c), inputs()
    known = jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)), jnp.float32)
    losses, _ = rqvae.loss(c, m, x, known)
    without, _ = rqvae.loss(c, m, x)
    assert losses.alignment > 0 and without.alignment == 0
    np.testing.assert_allclose(losses.total, without.total + 0.5 * losses.alignment, rtol=1e-5)
    pull = jax.grad(lambda m: rqvae.loss(c, m, x, known)[0].alignment)(m)
    assert np.any(pull.encoder.maps[0].kernel[...]) and np.any(pull.align.maps[0].kernel[...])


@pytest.mark.parametrize("change", [{}, {"bias": False}, {"align_dim": 3, "align_weight": 0.1}, {"hidden": ()}])
def test_parameters_are_counted(change: dict):
    c = dataclasses.replace(SMALL, **change)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(model(c)))
    assert sum(rqvae.param_groups(c).values()) == sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"straight_through": "copy"}, r"model.straight_through = 'copy'.*per_level"),
        ({"over_dims": "max"}, "model.over_dims = 'max'.*sum"),
        ({"codebook": 1}, "model.codebook = 1"),
        ({"hidden": (8, 0)}, "model.hidden"),
        ({"decay": 1.0}, "model.decay = 1.0"),
        ({"sinkhorn_eps": 0.0}, "model.sinkhorn_eps = 0.0"),
        ({"beta": -1.0}, "model.beta"),
        ({"align_weight": 0.1}, "model.align_weight = 0.1 with model.align_dim = 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(change: dict, words: str):
    with pytest.raises(ValueError, match=words) as error:
        dataclasses.replace(SMALL, **change)
    assert "\n" not in str(error.value)
