"""Processes in discrete and continuous time, conversions that must be exact, and the oracles at one point."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers import diffusion
from recscale.layers.diffusion import PARAMETRISATIONS, WEIGHTS, Chain, Continuous
from recscale.layers.diffusion_oracles import catalogue_weights, catalogue_x0, gaussian_x0
from recscale.layers.schedules import chain_table

CHAINS = [Chain("cosine", 50), Chain("exp", 200), Chain((0.1, 0.3), 2)]
PATHS = [Continuous("vp"), Continuous("ve"), Continuous("straight")]


@pytest.mark.parametrize("process", CHAINS + PATHS, ids=str)
def test_times_and_scales(process):
    times = process.grid(2 if isinstance(process, Chain) else 7)
    a, s = process.exact(times)
    assert (a[-1], s[-1]) == (1, 0) and (np.diff(s) < 0).all() and (np.diff(a) >= 0).all()
    for value, expected in zip(process.scales(jnp.asarray(times)), (a, s), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-7)
    if process != Continuous("ve"):
        unit = a + s if process == Continuous("straight") else a**2 + s**2
        np.testing.assert_allclose(unit, 1, rtol=1e-12)
    drawn = process.draw(jax.random.key(0), (4000,))
    if isinstance(process, Chain):
        assert drawn.dtype == jnp.int32 and set(drawn.tolist()) == set(range(process.steps))
        np.testing.assert_array_equal(process.embed_time(drawn), drawn.astype(jnp.float32))
    else:
        assert drawn.dtype == jnp.float32 and drawn.min() >= 1e-3 and drawn.max() <= 0.999
        np.testing.assert_array_equal(process.embed_time(drawn), 1000 * drawn)
    assert hash(process) == hash(dataclasses.replace(process))


def test_a_grid_of_fewer_steps_ends_at_the_data():
    assert Chain("exp", 10).grid().tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1]
    assert Chain("exp", 10).grid(5).tolist() == [9, 7, 5, 3, 1, -1]
    assert Chain("exp", 10).grid(1).tolist() == [9, -1]
    assert len(set(Chain("exp", 997).grid(991).tolist())) == 992


@pytest.mark.parametrize("process", PATHS, ids=str)
def test_rates_are_the_derivatives_of_the_scales(process):
    u, h = np.linspace(0.05, 0.95, 7), 1e-5
    high, low = process.exact(u + h), process.exact(u - h)
    for found, up, down in zip(process.rates(u), high, low, strict=True):
        np.testing.assert_allclose(found, (up - down) / (2 * h), rtol=1e-4)


def test_sde_of_vp_and_ve_is_the_textbook_one():
    u = jnp.linspace(0.05, 1, 9)
    f, g = diffusion.drift(Continuous("vp"), u)
    beta = 0.1 + 19.9 * u
    np.testing.assert_allclose(f, -beta / 2, rtol=1e-5)
    np.testing.assert_allclose(g, jnp.sqrt(beta), rtol=1e-4)
    f, g = diffusion.drift(Continuous("ve"), u)
    np.testing.assert_array_equal(f, jnp.zeros(9))
    np.testing.assert_allclose(g, 0.01 * 5000**u * np.sqrt(2 * np.log(5000)), rtol=1e-4)


def test_the_limit_of_a_chain_is_vp():
    # beta(u) of the linear schedule is T (1e-4 + u (.02 - 1e-4)): with T = 1000 the usual constants .1 and 20.
    chain, limit = Chain("linear", 1000), Continuous("vp")
    t = np.arange(50, 1000, 50)
    for found, expected in zip(chain.rates(t), limit.rates((t + 1) / 1000), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-3)  # the chain is its limit to order beta <= .02
    a, _ = chain.exact(t)
    np.testing.assert_allclose(np.log(a), np.log(limit.exact((t + 1) / 1000)[0]), rtol=0.02)


@pytest.mark.parametrize("process", CHAINS + PATHS, ids=str)
def test_every_conversion_there_and_back(process):
    keys = jax.random.split(jax.random.key(1), 3)
    x0_BSD, noise_BSD = jax.random.normal(keys[0], (5, 3, 4)), jax.random.normal(keys[1], (5, 3, 4))
    t_BS = process.draw(keys[2], (5, 3))
    if not isinstance(process, Chain):
        t_BS = 0.2 + 0.6 * t_BS  # away from the ends, where a conversion loses digits
    x_BSD = diffusion.diffused(x0_BSD, noise_BSD, process, t_BS)
    a, s = (scale[..., None] for scale in process.scales(t_BS))
    tolerance = {"rtol": 0, "atol": 3e-6 * float(jnp.maximum(a / s, s / a).max())}
    for source in PARAMETRISATIONS:
        output = diffusion.target(source, x0_BSD, noise_BSD, process, t_BS)
        np.testing.assert_allclose(diffusion.to_x0(source, output, x_BSD, process, t_BS), x0_BSD, **tolerance)
        for kind in PARAMETRISATIONS:
            expected = diffusion.target(kind, x0_BSD, noise_BSD, process, t_BS)
            found = diffusion.convert(source, kind, output, x_BSD, process, t_BS)
            size = float(jnp.abs(expected).max())
            np.testing.assert_allclose(found / size, expected / size, **tolerance)
    t = t_BS[0, 0]  # one time for all rows
    x_BSD = diffusion.diffused(x0_BSD, noise_BSD, process, t)
    np.testing.assert_allclose(
        diffusion.to_x0("v", diffusion.target("v", x0_BSD, noise_BSD, process, t), x_BSD, process, t),
        x0_BSD,
        **tolerance,
    )


def test_a_network_that_cannot_know_x0_answers_zero():
    ones = jnp.ones((2, 3))
    for kind in ("eps", "score"):
        assert not diffusion.to_x0(kind, ones, ones, Continuous("straight"), jnp.float32(1)).any()
    expected = diffusion.to_x0("velocity", 3 * ones, ones, Continuous("straight"), jnp.float32(1))
    np.testing.assert_array_equal(expected, -2 * ones)


@pytest.mark.parametrize("process", CHAINS + PATHS, ids=str)
def test_a_weight_turns_one_loss_into_another(process):
    keys = jax.random.split(jax.random.key(2), 4)
    t = jnp.asarray(1) if isinstance(process, Chain) else jnp.float32(0.4)
    x0, noise, error = (jax.random.normal(key, (50, 4)) for key in keys[:3])
    x = diffusion.diffused(x0, noise, process, t)
    loss = {}
    for kind in PARAMETRISATIONS:
        wrong = diffusion.from_x0(kind, x0 + error, x, process, t)
        loss[kind] = float(jnp.square(wrong - diffusion.target(kind, x0, noise, process, t)).mean())
    for kind in PARAMETRISATIONS:
        for name in PARAMETRISATIONS:
            np.testing.assert_allclose(WEIGHTS[name](kind, process, t) * loss[kind], loss[name], rtol=2e-3)
        assert WEIGHTS["none"](kind, process, t) == 1 and WEIGHTS[kind](kind, process, t) == 1
    a, s = process.scales(t)
    np.testing.assert_allclose(loss["eps"], s**2 * loss["score"], rtol=2e-3)
    np.testing.assert_allclose(WEIGHTS["min_snr"]("x0", process, t), min((a / s) ** 2, 5), rtol=1e-5)
    np.testing.assert_allclose(WEIGHTS["min_snr"]("eps", process, t), min(1, 5 * (s / a) ** 2), rtol=1e-5)
    if process == Continuous("vp"):
        np.testing.assert_allclose(loss["v"], loss["x0"] / s**2, rtol=2e-3)
        np.testing.assert_allclose(loss["v"], loss["eps"] / a**2, rtol=2e-3)


@pytest.mark.parametrize("process", [Chain("exp", 200), *PATHS], ids=str)
def test_guidance_is_the_same_in_every_coordinate(process):
    t = jnp.asarray(120) if isinstance(process, Chain) else jnp.float32(0.6)
    given, free, x = (jax.random.normal(key, (6, 4)) for key in jax.random.split(jax.random.key(3), 3))
    expected = diffusion.guided(given, free, 2.0)
    np.testing.assert_allclose(expected, 3 * given - 2 * free, rtol=1e-6)
    for kind in PARAMETRISATIONS:
        pair = (diffusion.from_x0(kind, clean, x, process, t) for clean in (given, free))
        found = diffusion.to_x0(kind, diffusion.guided(*pair, 2.0), x, process, t)
        np.testing.assert_allclose(found, expected, atol=2e-3 if process == Continuous("ve") else 1e-4)


ITEMS, PRIOR = np.array([[-1.0], [0.5], [2.0]]), np.array([0.2, 0.5, 0.3])


def test_golden_oracles():
    with jax.enable_x64(True):
        x, items, prior = jnp.array([[0.4]], jnp.float64), jnp.asarray(ITEMS), jnp.asarray(PRIOR)
        a, s = 0.6, 0.8
        np.testing.assert_allclose(
            catalogue_weights(x, a, s, items, prior), [[0.11897418, 0.64460306, 0.23642277]], atol=1e-8
        )
        x0 = catalogue_x0(x, a, s, items, prior)
        noise = (x - a * x0) / s
        found = jnp.concatenate([x0, noise, -noise / s, a * noise - s * x0])
        np.testing.assert_allclose(found[:, 0], [0.6761728828, -0.0071296621, 0.0089120776, -0.5452161035], atol=1e-9)
        np.testing.assert_allclose(
            gaussian_x0(x, a, s, jnp.ones(1), jnp.full((1, 1), 0.25)), [[0.9589041096]], atol=1e-9
        )
        table = chain_table((0.1, 0.3), 2)
        np.testing.assert_allclose(np.sqrt(table.abar[1]), np.sqrt(0.63), rtol=1e-12)
        x = jnp.array([[0.7]], jnp.float64)
        clean = catalogue_x0(x, np.sqrt(table.abar[1]), np.sqrt(1 - table.abar[1]), items, prior)
        np.testing.assert_allclose(table.c1[1] * clean + table.c2[1] * x, [[0.7376836560]], atol=1e-9)


@pytest.mark.parametrize(
    ("process", "a", "s", "kind", "expected"),
    [
        (Continuous("straight"), 0.6, 0.4, "velocity", -0.4734053712),
        (Continuous("straight"), 0.6, 0.4, "eps", 0.1159567773),
        (Chain((0.64,), 1), 0.6, 0.8, "v", -0.5452161035),
        (Chain((0.64,), 1), 0.6, 0.8, "score", 0.0089120776),
    ],
)
def test_golden_conversions_in_float32(process, a: float, s: float, kind: str, expected: float):
    t = jnp.asarray(0) if isinstance(process, Chain) else jnp.float32(0.4)
    x = jnp.array([[0.4]], jnp.float32)
    np.testing.assert_allclose(process.scales(t), (a, s), rtol=1e-6)
    x0 = catalogue_x0(x, *process.scales(t), jnp.asarray(ITEMS, jnp.float32), jnp.asarray(PRIOR, jnp.float32))
    np.testing.assert_allclose(diffusion.from_x0(kind, x0, x, process, t), [[expected]], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain("quadratic", 10), "schedule: found 'quadratic', expected one of linear, cosine, exp, sqrt"),
        (lambda: Chain("exp", 0), "diffusion steps: found 0, expected at least 1"),
        (lambda: Chain((0.1, 0.3), 3), r"schedule: found \(0.1, 0.3\), expected 3 betas between 0 and 1"),
        (lambda: Chain("exp", 10).grid(11), "sampler steps: found 11, expected 1 to 10, the steps of the chain"),
        (lambda: Continuous("cosine"), "process: found 'cosine', expected one of vp, ve, straight"),
        (lambda: Continuous("vp", (20.0, 0.1)), r"constants of vp: found \(20.0, 0.1\), expected 2 rising positive"),
        (lambda: Continuous("straight", (1.0,)), r"constants of straight: found \(1.0,\), expected 0"),
        (lambda: Continuous("vp").grid(), "sampler steps: found None, expected at least 1"),
    ],
)
def test_errors_say_what_to_do(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
