"""Likelihood by the probability-flow ODE: equal to densities in closed form, and Hutchinson's trace without bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from recscale.layers.diffusion import Chain, Continuous
from recscale.layers.diffusion_oracles import gaussian_x0
from recscale.layers.likelihood import log_likelihood

MEAN = np.array([0.3, -0.5, 0.1])
COVARIANCE = np.array([[1.5, 0.6, 0.1], [0.6, 0.7, -0.2], [0.1, -0.2, 0.4]])
ROWS = np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, 40).astype(np.float32)


def gaussian(process):
    """The perfect denoiser of N(MEAN, COVARIANCE)."""
    data = jnp.asarray(MEAN, jnp.float32), jnp.asarray(COVARIANCE, jnp.float32)
    return lambda x_ND, t: gaussian_x0(x_ND, *process.scales(t), *data)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gaussian_nats(process, steps: int | None, x0_ND: jax.Array) -> jax.Array:
    return log_likelihood(gaussian(process), process, x0_ND, steps)


@pytest.mark.parametrize(
    ("process", "steps"),
    [
        (Continuous("straight"), 100),
        (Continuous("vp", (0.1, 40.0)), 300),
        (Chain("linear", 2000), None),
        (Chain("linear", 2000), 500),
        (Chain("cosine", 500), None),
    ],
    ids=str,
)
def test_the_density_of_gaussian_data(process, steps: int | None):
    nats_N = gaussian_nats(process, steps, jnp.asarray(ROWS))
    assert nats_N.dtype == jnp.float32 and nats_N.shape == (40,)
    np.testing.assert_allclose(nats_N, multivariate_normal(MEAN, COVARIANCE).logpdf(ROWS), atol=1e-3)


@pytest.mark.parametrize(
    ("process", "steps"), [(Continuous("vp"), 300), (Continuous("ve"), 300), (Chain("exp", 500), None)], ids=str
)
def test_a_process_that_remembers_has_the_density_of_its_own_samples(process, steps: int | None):
    # The flow carries (z - mean_h) / spread_h along unchanged: N(0, I) at the end of the grid is this at the data.
    a, s = (float(value[0]) for value in process.exact(process.grid(steps)[:1]))
    r = np.hypot(a, s)
    end = (a**2 * COVARIANCE + s**2 * np.eye(3)) / r**2
    narrow = np.real(sqrtm(COVARIANCE @ np.linalg.inv(end)))
    own_N = multivariate_normal(MEAN - a / r * narrow @ MEAN, narrow @ narrow).logpdf(ROWS)
    nats_N = gaussian_nats(process, steps, jnp.asarray(ROWS))
    np.testing.assert_allclose(nats_N, own_N, atol=1e-3)
    data_N = multivariate_normal(MEAN, COVARIANCE).logpdf(ROWS)
    assert 1e-3 < np.abs(nats_N - data_N).max() < (0.2 if process == Chain("exp", 500) else 0.03)


def test_the_error_falls_with_the_square_of_the_steps():
    truth = multivariate_normal(MEAN, COVARIANCE).logpdf(ROWS)
    error = [
        np.abs(gaussian_nats(Continuous("straight"), steps, jnp.asarray(ROWS)) - truth).max() for steps in (12, 24)
    ]
    assert 3 < error[0] / error[1] < 5, error


CENTRES, WEIGHTS, WIDTH = np.array([[-1.0, 0.0], [1.0, 0.5]]), np.array([0.3, 0.7]), 0.4


def mixture(process):
    """The perfect denoiser of two Gaussians of variance WIDTH^2: not linear, so its Jacobian changes with x."""
    centres_KD = jnp.asarray(CENTRES, jnp.float32)

    def denoise(x_ND, t):
        a, s = process.scales(t)
        spread = (a * WIDTH) ** 2 + s**2
        away_NKD = x_ND[:, None] - a * centres_KD[None]
        log_N = jnp.log(WEIGHTS)[None] - jnp.square(away_NKD).sum(2) / (2 * spread)
        each_NKD = centres_KD[None] + a * WIDTH**2 / spread * away_NKD
        return (jax.nn.softmax(log_N)[..., None] * each_NKD).sum(1)

    return denoise


def test_the_density_of_a_mixture():
    process = Continuous("straight")
    x0_ND = np.random.default_rng(1).normal(0, 1, (60, 2))
    parts = [multivariate_normal(centre, WIDTH**2).logpdf(x0_ND) for centre in CENTRES]
    expected = logsumexp(np.log(WEIGHTS)[:, None] + parts, axis=0)
    run = jax.jit(lambda x0_ND: log_likelihood(mixture(process), process, x0_ND, 300))
    np.testing.assert_allclose(run(jnp.asarray(x0_ND, jnp.float32)), expected, atol=1e-3)


def test_hutchinson_is_unbiased_and_narrows_with_its_probes():
    process, N = Continuous("straight"), 3000
    x0_ND = jnp.broadcast_to(jnp.asarray(ROWS[0]), (N, 3))
    keys_N = jax.random.split(jax.random.key(5), N)
    exact = float(gaussian_nats(process, 40, x0_ND[:1])[0])
    spread = []
    for probes in (1, 4):
        run = jax.jit(
            lambda keys_N, probes=probes: log_likelihood(
                gaussian(process), process, x0_ND, 40, "hutchinson", keys_N, probes
            )
        )
        nats_N = np.asarray(run(keys_N), np.float64)
        np.testing.assert_array_equal(nats_N, run(keys_N))
        assert nats_N.std() > 0.01
        assert abs(nats_N.mean() - exact) < 4 * nats_N.std() / np.sqrt(N)
        spread.append(nats_N.std())
    assert 1.8 < spread[0] / spread[1] < 2.2  # standard errors: N = 3,000, 1.3 % each


def test_a_row_is_scored_by_itself():
    process, keys_N = Chain("cosine", 20), jax.random.split(jax.random.key(6), 40)
    for divergence in ("exact", "hutchinson"):
        run = functools.partial(log_likelihood, gaussian(process), process, steps=20, divergence=divergence)
        whole = jax.jit(lambda x, keys, run=run: run(x, keys_N=keys))(jnp.asarray(ROWS), keys_N)
        part = jax.jit(lambda x, keys, run=run: run(x, keys_N=keys))(jnp.asarray(ROWS[7:10]), keys_N[7:10])
        np.testing.assert_allclose(whole[7:10], part, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trace",), "divergence: found 'trace', expected one of exact, hutchinson"),
        (("hutchinson",), "hutchinson: found keys_N None and probes 1, expected a key per row and a probe"),
        (("hutchinson", jax.random.split(jax.random.key(0), 40), 0), "and probes 0, expected"),
    ],
)
def test_errors_say_what_to_do(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        log_likelihood(lambda x, t: x, Chain("exp", 5), jnp.asarray(ROWS), None, *arguments)
