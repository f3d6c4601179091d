"""Samplers against closed forms: one Gaussian, a catalogue of points, the affine chain; then keys, meshes and memory.

Monte-Carlo bounds are stated where they are used: 5 standard errors, and what the steps themselves leave out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from recscale.layers import samplers
from recscale.layers.counter_noise import normal
from recscale.layers.diffusion import Chain, Continuous
from recscale.layers.diffusion_oracles import catalogue_x0, gaussian_affine
from recscale.layers.samplers import SAMPLERS, affine_chain, plan, sample
from recscale.mesh import BATCH, make_mesh

GRIDS = [(Chain("linear", 1000), 1000), (Continuous("vp"), 500), (Continuous("ve"), 500), (Continuous("straight"), 500)]
SHORT = [(Chain("cosine", 200), 200), (Continuous("vp"), 100), (Continuous("ve"), 200), (Continuous("straight"), 100)]
MEAN, COVARIANCE = np.array([1.0, -0.5], np.float32), np.array([[0.5, 0.3], [0.3, 0.8]], np.float32)


def moments(process, sampler: str, steps: int, eta: float | None = None):
    """Mean and covariance of a sampler that has the perfect denoiser of N(MEAN, COVARIANCE); exact, no sampling."""

    def best(t):
        return gaussian_affine(*process.scales(t), jnp.asarray(MEAN), jnp.asarray(COVARIANCE))

    chain = functools.partial(affine_chain, lambda t: best(t)[0], lambda t: best(t)[1], process, sampler, steps, eta)
    return jax.jit(chain)()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("process", "steps"), GRIDS, ids=str)
def test_every_sampler_ends_in_the_same_gaussian(process, steps: int, sampler: str):
    mean, covariance = moments(process, sampler, steps)
    # Deterministic samplers keep what the start forgot of the data's mean: a_T = .0064 for the chain and vp, 1 / 50
    # for ve. The rest is the error of the steps, first order (ode: second).
    np.testing.assert_allclose(mean, MEAN, atol=0.02 if process == Continuous("ve") else 0.006)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=4e-4 if sampler == "ode" else 0.02)


@pytest.mark.parametrize(("sampler", "order"), [("ddpm", 1), ("ddim", 1), ("sde", 1), ("ode", 2)])
def test_the_error_falls_as_the_order_says(sampler: str, order: int):
    error = [np.abs(moments(Continuous("straight"), sampler, steps)[1] - COVARIANCE).max() for steps in (20, 40, 80)]
    rates = np.log2(np.array(error[:-1]) / error[1:])
    assert (rates > order - 0.3).all() and (rates < order + 0.5).all(), (error, rates)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_simulation_agrees_with_the_affine_chain(sampler: str):
    process, N = Chain("exp", 20), 20000
    weight = jnp.array([[0.5, 0.2], [-0.1, 0.6]])
    shift_TD = 0.3 * jax.random.normal(jax.random.key(7), (20, 2))
    mean, covariance = affine_chain(weight, shift_TD, process, sampler)
    keys_N = jax.random.split(jax.random.key(8), N)
    draw = jax.jit(lambda: sample(lambda x, t: x @ weight.T + shift_TD[t][None], process, keys_N, 2, sampler))
    x = np.asarray(draw(), np.float64)
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 5 * np.sqrt(np.diag(covariance) / N))
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + np.square(covariance)) / N)
    np.testing.assert_array_less(np.abs(np.cov(x.T) - covariance), 5 * spread)


GOLDEN = [  # after the steps t = 3, 2, 1, 0
    ((0, -0.04070697), (0.73880972, -0.02573329, -0.02573329, 0.80021864)),
    ((-0.15605597, 0.28035067), (0.45958448, -0.03044983, -0.03044983, 0.54812915)),
    ((0.00518576, 0.32222031), (0.19736707, -0.01974509, -0.01974509, 0.27586477)),
    ((0.53377776, -0.12214903), (0.01933698, -0.00278194, -0.00278194, 0.05519226)),
]
WX, K_TD = ((0.3, 0.1), (-0.2, 0.4)), ((0.5, -0.25), (0.1, 0.2), (-0.3, 0.6), (0, -0.1))


def test_golden_affine_chain(monkeypatch):
    process = Chain((0.1, 0.2, 0.3, 0.4), 4)
    rows = plan(process, "ddpm")
    np.testing.assert_allclose(rows.clean_R, [0.40706971, 0.51322266, 0.67763093, 1], atol=1e-8)
    np.testing.assert_allclose(rows.keep_R, [0.55074534, 0.47230808, 0.31943828, 0], atol=1e-8)
    np.testing.assert_allclose(rows.noise_R**2, [0.28440367, 0.16935484, 0.07142857, 0], atol=1e-8)

    def after(calls: int):
        cut = rows._replace(**{name: getattr(rows, name)[:calls] for name in rows._fields[:-1]})
        monkeypatch.setattr(samplers, "plan", lambda *_: cut)
        return affine_chain(jnp.asarray(WX, jnp.float64), jnp.asarray(K_TD, jnp.float64), process)

    with jax.enable_x64(True):
        steps = jax.jit(lambda: [after(calls) for calls in (1, 2, 3, 4)])()
    for found, (mean, covariance) in zip(steps, GOLDEN, strict=True):
        np.testing.assert_allclose(found[0], mean, atol=1e-8)
        np.testing.assert_allclose(found[1].ravel(), covariance, atol=1e-8)


def test_the_affine_chain_serves_many_users_at_once():
    process, W = Chain("exp", 30), jnp.asarray(WX)
    k_TND = jax.random.normal(jax.random.key(0), (30, 5, 2))
    whole, alone = jax.jit(lambda: (affine_chain(W, k_TND, process), affine_chain(W, k_TND[:, 3], process)))()
    assert whole[0].shape == (5, 2) and whole[1].shape == (2, 2)
    np.testing.assert_allclose(whole[0][3], alone[0], atol=1e-6)
    np.testing.assert_array_equal(whole[1], alone[1])


@pytest.mark.parametrize(("process", "steps"), [*GRIDS, (Chain("exp", 100), 17), (Chain((0.1, 0.3), 2), 2)], ids=str)
def test_ddim_with_eta_one_is_the_ancestral_sampler(process, steps: int):
    for ddim, ddpm in zip(plan(process, "ddim", steps, 1.0), plan(process, "ddpm", steps), strict=True):
        np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-9)


def test_golden_ancestral_step():
    for rows in (plan(Chain((0.1, 0.3), 2), "ddpm"), plan(Chain((0.1, 0.3), 2), "ddim", None, 1.0)):
        np.testing.assert_allclose(rows.keep_R[0] * 0.7 + rows.clean_R[0] * 0.3, 0.3890478343, atol=1e-10)
        np.testing.assert_allclose(rows.noise_R[0] ** 2, 0.0810810811, atol=1e-10)


def test_the_ancestral_plan_is_the_table_of_the_chain():
    process = Chain("cosine", 300)
    rows, table = plan(process, "ddpm"), process.table
    for found, expected in ((rows.clean_R, table.c1), (rows.keep_R, table.c2), (rows.noise_R**2, table.sigma2)):
        np.testing.assert_allclose(found, expected[::-1], rtol=1e-9, atol=1e-12)
    assert rows.time_R.tolist() == list(range(299, -1, -1)) and rows.start == pytest.approx(1)


ITEMS = np.array([[-1.5, 0], [0, 1], [1, -1], [1.2, 1.2], [-0.5, -1.5]], np.float32)
PRIOR = np.array([0.1, 0.3, 0.15, 0.25, 0.2], np.float32)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("process", "steps"), SHORT, ids=str)
def test_a_perfect_model_gives_the_frequencies_of_the_catalogue(process, steps: int, sampler: str):
    N = 4000

    def best(x_ND, t):
        return catalogue_x0(x_ND, *process.scales(t), jnp.asarray(ITEMS), jnp.asarray(PRIOR))

    draw = jax.jit(lambda: sample(best, process, jax.random.split(jax.random.key(11), N), 2, sampler, steps))
    x_ND = np.asarray(draw())
    distance = np.linalg.norm(x_ND[:, None] - ITEMS[None], axis=2)
    assert (distance.min(axis=1) < 0.02).mean() > 0.995  # on a row, but for a few that the last step finds undecided
    found = np.bincount(distance.argmin(axis=1), minlength=5) / N
    # 4 standard errors (.029 at most), and .01 for the steps.
    np.testing.assert_array_less(np.abs(found - PRIOR), 4 * np.sqrt(PRIOR * (1 - PRIOR) / N) + 0.01)


def toy(x_ND, t):
    """Elementwise, so that a row's bits cannot depend on how a matrix product is cut."""
    return jnp.tanh(x_ND) * 0.7 + 0.001 * jnp.asarray(t, jnp.float32)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_depends_on_its_key_alone(sampler: str):
    process, keys = Chain("exp", 12), jax.random.split(jax.random.key(1), 16)
    draw = jax.jit(lambda keys: sample(toy, process, keys, 8, sampler))
    x_ND = draw(keys)
    assert x_ND.dtype == jnp.float32 and x_ND.shape == (16, 8)
    np.testing.assert_array_equal(x_ND, draw(keys))
    np.testing.assert_array_equal(x_ND[::-1], draw(keys[::-1]))
    np.testing.assert_allclose(x_ND[3:5], draw(keys[3:5]), atol=1e-6)
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        spread_ND = draw(jax.device_put(keys, NamedSharding(mesh, BATCH)))
    assert spread_ND.sharding.num_devices == 8
    np.testing.assert_allclose(x_ND, spread_ND, atol=1e-6)
    assert not np.allclose(x_ND, draw(jax.random.split(jax.random.key(2), 16)), atol=0.1)


def test_deterministic_samplers_differ_only_by_their_start():
    process, key = Chain("exp", 50), jax.random.key(3)
    for sampler, noise in (("ddim", False), ("ode", False), ("ddpm", True), ("sde", True), ("langevin", True)):
        assert plan(process, sampler).noise_R.any() == noise
    start_ND = normal(key[None], 0, 4)
    # The only step of a grid is to the data, and lands where the denoiser says: here, where it started.
    np.testing.assert_array_equal(sample(lambda x, t: x, process, key[None], 4, "ddim", 1), start_ND)
    assert plan(process, "ode", 3).time_R.tolist() == [49, 32, 32, 16, 16]
    assert plan(process, "langevin", 3).time_R.tolist() == [49, 49, 32, 32, 16, 16]


@pytest.mark.parametrize(("sampler", "calls"), [("ddpm", 10), ("ddim", 10), ("sde", 10), ("ode", 19), ("langevin", 20)])
def test_calls_of_the_denoiser(sampler: str, calls: int):
    assert plan(Chain("exp", 500), sampler, 10).calls == calls
    assert plan(Continuous("straight"), sampler, 10).calls == calls


def compiled(T: int, sampler: str, N: int = 1000, D: int = 64):
    """1,000 rows of the linear denoiser of DreamRec, with its own part for every row, compiled but not run."""
    process, W = Chain("linear", T), 0.5 * jnp.eye(D)

    def run(keys_N, h_ND):
        return sample(lambda x_ND, t: x_ND @ W + h_ND, process, keys_N, D, sampler)

    keys_N = jax.random.split(jax.random.key(0), N)
    return jax.jit(run).lower(keys_N, jnp.ones((N, D))).compile(), keys_N


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_memory_does_not_grow_with_the_steps(sampler: str):
    few, many = (compiled(T, sampler)[0].memory_analysis() for T in (10, 1000))
    # The table of the sampler is 1,000 rows of 6 numbers, twice for two calls per step; a batch of rows is 256 kB.
    assert many.temp_size_in_bytes - few.temp_size_in_bytes <= 2 * 1000 * 6 * 4
    assert many.temp_size_in_bytes < 12 * 1000 * 64 * 4


def test_a_thousand_steps_of_a_thousand_rows():
    run, keys_N = compiled(1000, "ddpm")
    x_ND = np.asarray(run(keys_N, jnp.ones((1000, 64))), np.float64)
    mean, covariance = affine_chain(0.5 * jnp.eye(64), jnp.ones((1000, 64)), Chain("linear", 1000))
    variance = float(covariance[0, 0])
    assert x_ND.shape == (1000, 64) and abs(x_ND.mean() - float(mean[0])) < 5 * np.sqrt(variance / x_ND.size)
    assert abs(x_ND.var() / variance - 1) < 5 * np.sqrt(2 / x_ND.size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 10), "sampler: found 'euler', expected one of ddpm, ddim, sde, ode, langevin"),
        (("ddpm", 10, 1.0), "eta: found 1.0 for sampler 'ddpm', expected 0 to 1, and only for ddim, langevin"),
        (("ddim", 10, 1.5), "eta: found 1.5 for sampler 'ddim', expected 0 to 1"),
        (("ddim", 101), "sampler steps: found 101, expected 1 to 100"),
    ],
)
def test_errors_say_what_to_do(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        plan(Chain("exp", 100), *arguments)
