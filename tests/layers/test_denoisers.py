"""Denoisers against networks written out in float64, one target at a time; what a target sees; counts; beginnings."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.layers.conditions import TimeEmbedding, frequencies, sinusoid
from recscale.layers.denoisers import (
    DENOISERS,
    Condition,
    Config,
    flops,
    memory_flops,
    modulation_flops,
    parameters,
    time_flops,
)
from recscale.layers.diffusion import Chain, guided
from recscale.layers.samplers import sample
from recscale.mesh import layer_wrapper, make_mesh

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
CONFIG = Config(dim=6, width=8, depth=2, ffn=10, heads=2)
B, S, L, D = 2, 3, 5, CONFIG.dim
KINDS = tuple(DENOISERS)


def random_denoiser(kind, config=CONFIG, seed=0):
    """Every parameter random, gates and last layers too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: DENOISERS[kind](config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def condition(seed=1) -> Condition:
    """Two rows of three targets: one dropped, one without any visible state."""
    rng = np.random.default_rng(seed)
    one, other = [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], [[1] * 5, [0] * 5, [0, 1, 0, 0, 0]]
    visible = np.array([one, other])
    dropped = np.array([[False, True, False], [False, False, False]])
    vector, states = rng.normal(size=(B, S, D)), rng.normal(size=(B, L, D))
    return Condition(vector.astype(np.float32), states.astype(np.float32), visible.astype(bool), dropped)


def noisy(count=S, seed=2) -> tuple[np.ndarray, np.ndarray]:
    """x and times, which may be far beyond the first."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, count, D)).astype(np.float32), rng.integers(0, 2000, (B, count)).astype(np.int32)


@functools.partial(jax.jit, compiler_options=QUICK)
def run(denoiser, x, condition, time):
    return denoiser(x, denoiser.remember(condition), time)


def drawn(kind, config):
    """A denoiser as it begins, in numpy."""
    make = jax.jit(lambda key: DENOISERS[kind](config, key), compiler_options=QUICK)
    return jax.tree.map(np.asarray, make(jax.random.key(1)))


def gelu(x):
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def linear(m, x, *block):
    return x @ m.kernel[...][block] + m.bias[...][block]


def normal(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def modulated(x, shift, scale):
    return normal(x) * (1.0 + scale) + shift


def one_target(kind, p, x, h, states, time):
    """The output for one target; p: parameters in float64, states: [null ; those it sees]."""
    rates = np.exp(-np.log(1e4) * np.arange(D // 2) / (D // 2 - 1))
    t = linear(p.time.last, gelu(linear(p.time.first, np.concatenate([np.sin(time * rates), np.cos(time * rates)]))))
    together = np.concatenate([x, h, t])
    if kind == "mlp1":
        return linear(p.out, together)
    if kind == "mlp2":
        return linear(p.out, gelu(linear(p.first, together)))
    c, signal = CONFIG, (h + t) / (1.0 + np.exp(-(h + t)))
    y = linear(p.up, x)
    for i in range(c.depth):
        b = p.blocks
        parts = np.split(linear(b.modulation, signal, i), 6 if kind == "dit" else 3)
        if kind == "dit":
            q, kv = linear(b.query, modulated(y, *parts[3:5]), i), linear(b.keys_values, normal(states), i)
            mixed, E = [], c.width // c.heads
            for n in range(c.heads):
                head = slice(n * E, (n + 1) * E)
                scores = np.exp(kv[:, : c.width][:, head] @ q[head] / np.sqrt(E))
                mixed.append(scores / scores.sum() @ kv[:, c.width :][:, head])
            y = y + parts[5] * linear(b.out, np.concatenate(mixed), i)
        y = y + parts[2] * linear(b.ffn_out, gelu(linear(b.ffn_in, modulated(y, *parts[:2]), i)), i)
    return linear(p.down, modulated(y, *np.split(linear(p.modulation, signal), 2)))


def by_target(kind, denoiser, x, known, time):
    """The output [B, S, D], target by target."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), denoiser)
    null, out = p.null[...], np.zeros(x.shape)
    for b, s in np.ndindex(*time.shape):
        gone = known.dropped_BS[b, s]
        sees = known.visible_BSL[b, s] & ~gone
        states = np.vstack([null[None], known.states_BLD[b][sees]])
        out[b, s] = one_target(kind, p, x[b, s], null if gone else known.vector_BSD[b, s], states, time[b, s])
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_output_equals_numpy_target_by_target(kind):
    denoiser, known, (x, time) = random_denoiser(kind), condition(), noisy()
    found = run(denoiser, x, known, time)
    assert found.dtype == jnp.float32 and found.shape == x.shape
    np.testing.assert_allclose(found, by_target(kind, denoiser, x, known, time), atol=2e-3, rtol=2e-3)
    early = time % 7  # where the sinusoids of large times do not round
    expected = by_target(kind, denoiser, x, known, early)
    np.testing.assert_allclose(run(denoiser, x, known, early), expected, atol=3e-5)
    other = by_target(kind, denoiser, x, known, early + 1)
    assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_target_depends_on_the_null_alone(kind):
    """Exact: no gradient, and no change by what is not a number; `forget` gives the same without a history."""
    denoiser, known, (x, time) = random_denoiser(kind), condition(), noisy()

    def dropped(denoiser, vector, states):
        changed = known._replace(vector_BSD=vector, states_BLD=states)
        return denoiser(x, denoiser.remember(changed), time)[0, 1].sum(), denoiser(x, denoiser.forget(), time)

    gradient = jax.jit(jax.grad(dropped, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)
    (of_denoiser, of_vector, of_states), forgotten = gradient(denoiser, known.vector_BSD, known.states_BLD)
    assert np.all(np.asarray(of_denoiser.null[...]) != 0.0)
    np.testing.assert_array_equal(of_vector, np.zeros((B, S, D)))
    np.testing.assert_array_equal(of_states, np.zeros((B, L, D)))
    found = np.asarray(run(denoiser, x, known, time))
    poisoned = known.vector_BSD.copy()
    poisoned[0, 1] = np.nan
    again = np.asarray(run(denoiser, x, known._replace(vector_BSD=poisoned), time))
    np.testing.assert_array_equal(found, again)
    np.testing.assert_allclose(forgotten[0, 1], found[0, 1], atol=2e-6)
    kept = np.asarray(run(denoiser, x, known._replace(dropped_BS=np.zeros_like(known.dropped_BS)), time))
    held = ~known.dropped_BS
    np.testing.assert_array_equal(kept[held], found[held])
    assert np.abs(kept[0, 1] - found[0, 1]).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_sees_its_own_x_time_and_visible_states(kind):
    """Exact: no gradient of any other state, and not a bit of another target moves."""
    denoiser, known, (x, time) = random_denoiser(kind), condition(), noisy()

    def output(states, denoiser, b, s):
        return denoiser(x, denoiser.remember(known._replace(states_BLD=states)), time)[b, s, 0]

    gradient = jax.jit(jax.grad(output), compiler_options=QUICK)
    for b, s in np.ndindex(B, S):
        expected = np.zeros((B, L), bool)
        expected[b] = known.visible_BSL[b, s] & ~known.dropped_BS[b, s] & (kind == "dit")
        seen = np.any(np.asarray(gradient(known.states_BLD, denoiser, b, s)) != 0.0, axis=-1)
        np.testing.assert_array_equal(seen, expected)
    found = np.asarray(run(denoiser, x, known, time))
    states = known.states_BLD.copy()
    states[0, 2:] += 3.0 * np.arange(D)  # the first target sees the first state alone
    moved = np.any(np.asarray(run(denoiser, x, known._replace(states_BLD=states), time)) != found, axis=-1)
    assert not moved[0, 0] and not moved[1].any() and moved[0, 2] == (kind == "dit")
    for name in ("x", "time", "vector"):
        x2, time2, vector = x.copy(), time.copy(), known.vector_BSD.copy()
        x2[1, 2] += (name == "x") * np.arange(D)
        time2[1, 2] += name == "time"
        vector[1, 2] += (name == "vector") * np.arange(D)
        moved = np.any(np.asarray(run(denoiser, x2, known._replace(vector_BSD=vector), time2)) != found, axis=-1)
        assert moved[1, 2] and moved.sum() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_more_targets(kind):
    """Any number of samples of a target, and one time for all of them or of everything."""
    denoiser, known = random_denoiser(kind), condition()
    x, time = noisy(4 * S)
    found = np.asarray(run(denoiser, x, known.repeat(4), time))
    for k in range(4):
        np.testing.assert_allclose(found[:, k::4], run(denoiser, x[:, k::4], known, time[:, k::4]), atol=3e-5)
    one = Condition(*(y if y.shape[1] == L else y[:, :1] for y in known))
    full = run(denoiser, x, one.repeat(12), np.full((B, 12), 9, np.int32))
    single = run(denoiser, x, one, np.full((1, 1), 9, np.int32))  # memory and time of one target, used by twelve
    np.testing.assert_allclose(single, full, atol=3e-5)


def test_mlp1_is_affine_in_x():
    denoiser, known, (x, time) = random_denoiser("mlp1"), condition(), noisy()
    Wx, k = denoiser.affine(denoiser.remember(known), time)
    np.testing.assert_allclose(x @ Wx.T + k, run(denoiser, x, known, time), atol=1e-5)
    guided = 3.0 * np.asarray(k) - 2.0 * np.asarray(denoiser.affine(denoiser.forget(), time)[1])
    h, null, Wh = known.vector_BSD, denoiser.null[...], denoiser.out.kernel[...][D : 2 * D]
    h = np.where(known.dropped_BS[:, :, None], null, h)
    np.testing.assert_allclose(guided - k, 2.0 * (h - null) @ Wh, atol=1e-5)


def test_guided_chains_of_mlp1_have_the_mean_and_covariance_of_the_closed_form():
    """DreamRec's sampler is affine and Gaussian: 20,000 chains against the recursion, written out in float64."""
    denoiser, h, steps, w, count = drawn("mlp1", CONFIG), condition().vector_BSD[:1, :1], 20, 2.0, 20_000
    process = Chain("linear", steps)

    def chains(denoiser, keys):
        known, null = denoiser.remember(Condition(h)), denoiser.forget()

        def denoise(x_ND, t):
            time = process.embed_time(t).reshape(1, 1)
            return guided(denoiser(x_ND[None], known, time), denoiser(x_ND[None], null, time), w)[0]

        return sample(denoise, process, keys, D)

    x = np.asarray(jax.jit(chains)(denoiser, jax.random.split(jax.random.key(0), count)))
    p = jax.tree.map(lambda y: np.asarray(y, np.float64), denoiser)
    k_by_t = [(1 + w) * one_target("mlp1", p, np.zeros(D), h[0, 0], None, t) for t in range(steps)]
    k_by_t = [k - w * one_target("mlp1", p, np.zeros(D), p.null[...], None, t) for t, k in enumerate(k_by_t)]
    beta = np.linspace(1e-4, 0.02, steps)
    kept = np.cumprod(1 - beta)
    before = np.append(1.0, kept[:-1])
    mean, covariance = np.zeros(D), np.eye(D)
    for t in reversed(range(steps)):
        c1 = beta[t] * np.sqrt(before[t]) / (1 - kept[t])
        c2 = (1 - before[t]) * np.sqrt(1 - beta[t]) / (1 - kept[t])
        M = c1 * p.out.kernel[...][:D].T + c2 * np.eye(D)
        mean = M @ mean + c1 * k_by_t[t]
        covariance = M @ covariance @ M.T + (t > 0) * beta[t] * (1 - before[t]) / (1 - kept[t]) * np.eye(D)
    deviation = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(x.mean(0) - mean) < 5 * deviation / count**0.5)
    error = np.abs(np.cov(x.T) - covariance) / np.outer(deviation, deviation)
    assert error.max() < 5 * (2 / count) ** 0.5
    assert np.abs(mean).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_reach_every_parameter(kind):
    denoiser, known, (x, time) = random_denoiser(kind), condition(), noisy()

    def total(denoiser, wrap):
        return jnp.square(denoiser(x, denoiser.remember(known), time, wrap=wrap)).sum()

    gradient = jax.jit(jax.grad(total), static_argnums=1, compiler_options=QUICK)
    found = gradient(denoiser, layer_wrapper(make_mesh(1, 1, 1), "layer"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.isfinite(leaf).all() and np.any(leaf != 0.0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_and_returns_float32(kind):
    known, (x, time) = condition(), noisy()
    exact = np.asarray(run(random_denoiser(kind), x, known, time % 7))
    low = run(random_denoiser(kind, dataclasses.replace(CONFIG, dtype="bfloat16")), x, known, time % 7)
    assert low.dtype == jnp.float32
    assert 0.0 < np.abs(low - exact).mean() < 0.03 * np.abs(exact).mean() + 0.02


def test_denoisers_begin_as_their_sources_say():
    """Linear maps uniform up to 1 / sqrt(fan_in), null standard normal; modulated ones begin at zero, blocks as x."""
    c = Config(dim=64, width=32, depth=3, ffn=48, heads=4)
    mlp1 = drawn("mlp1", c)
    kernel, bias, bound = mlp1.out.kernel[...], mlp1.out.bias[...], (3 * 64) ** -0.5
    assert max(np.abs(kernel).max(), np.abs(bias).max()) <= bound
    assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert bias.std() == pytest.approx(bound / 3**0.5, rel=0.3)
    assert mlp1.null[...].std() == pytest.approx(1.0, rel=0.3)
    rng = np.random.default_rng(0)
    known = Condition(np.ones((1, 2, 64), np.float32), np.ones((1, 3, 64), np.float32))
    x, last = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 2, 64), (32, 64)))
    denoiser = drawn("dit", c)
    np.testing.assert_array_equal(run(denoiser, x, known, np.ones((1, 2))), np.zeros((1, 2, 64)))
    kernels = denoiser.blocks.ffn_in.kernel[...]
    assert np.abs(kernels).max() <= 32**-0.5 and np.abs(kernels[0] - kernels[1]).max() > 0.01
    denoiser.down.kernel = nnx.Param(last)
    found = run(denoiser, x, known, np.ones((1, 2)))
    np.testing.assert_allclose(found, normal(linear(denoiser.up, x)) @ last, atol=1e-4)


def test_time_embedding_of_width_64():
    """32 rates from 1 to 1e-4; other widths half as many, at least two."""
    assert [frequencies(dim) for dim in (64, 6, 3, 2)] == [32, 3, 2, 2]
    found = sinusoid(jnp.array([[0, 1, 1999]]), 32)
    rates = 1e4 ** (-np.arange(32) / 31.0)
    assert found.shape == (1, 3, 64)
    for n, time in enumerate((0.0, 1.0, 1999.0)):
        np.testing.assert_allclose(found[0, n], np.r_[np.sin(time * rates), np.cos(time * rates)], atol=5e-4)
    np.testing.assert_allclose(sinusoid(jnp.array([[0.25]]), 32)[0, 0, 0], np.sin(0.25), atol=1e-6)
    for dim in (2, 3, 5, 64):
        embedded = functools.partial(lambda dim, key: TimeEmbedding(dim, key)(jnp.ones((2, 3)), "float32"), dim)
        assert jax.eval_shape(embedded, jax.random.key(0)).shape == (2, 3, dim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{}, {"dim": 64, "width": 32, "depth": 3}, {"dim": 3, "heads": 4, "ffn": 5}])
def test_parameter_counts(kind, change):
    c = dataclasses.replace(CONFIG, **change)
    shapes = jax.eval_shape(lambda: DENOISERS[kind](c, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters(kind, c)


def test_counts_of_the_published_shape():
    """Width 64: 16.6 k parameters of the time, 12.4 k of mlp1 and 64 of the null."""
    c = dataclasses.replace(CONFIG, dim=64)
    time = 64 * 128 + 128 + 128 * 64 + 64
    assert parameters("mlp1", c) == time + 192 * 64 + 64 + 64
    assert parameters("mlp2", c) == time + 192 * 128 + 128 + 128 * 64 + 64 + 64
    assert time_flops(c) == 2 * 2 * 64 * 128
    assert flops("mlp1", c) - time_flops(c) == 2 * 2 * 64 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_flops_agree_with_the_compiler(kind):
    """Within 10 %, one block: the compiler counts a scanned body once, and some 30 operations for an error function."""
    D = 512
    c, targets, states = Config(dim=D, width=768, depth=1, ffn=1024, heads=3), 40, 31
    denoiser = jax.eval_shape(lambda: DENOISERS[kind](c, jax.random.key(0)))
    known = Condition(jnp.zeros((1, targets, D)), jnp.zeros((1, states, D)), jnp.ones((1, targets, states), bool))
    memory = jax.eval_shape(lambda d: d.remember(known), denoiser)

    def counted(function, *arguments) -> float:
        return jax.jit(function).lower(*arguments).cost_analysis().get("flops", 0.0)

    x, time = jnp.zeros((1, targets, D)), jnp.zeros((1, targets))
    step = counted(lambda d, x, m, t: d(x, m, t), denoiser, x, memory, time)
    assert step == pytest.approx(targets * flops(kind, c, states), rel=0.1)
    shared = counted(lambda d, x, m, t: d(x, m, t), denoiser, x, memory, time[:, :1])
    products = {"mlp1": D * D, "mlp2": 2 * D * D}.get(kind, 0)  # of the time, shared as well
    saved = targets * (time_flops(c) + 2 * products) * (targets - 1) / targets
    assert step - shared == pytest.approx(saved, rel=0.1)
    null = jax.eval_shape(lambda d: d.forget(), denoiser)
    alone = counted(lambda d, x, m, t: d(x, m, t), denoiser, x, null, time[:, :1])
    less = time_flops(c) + 2 * products + modulation_flops(kind, c)
    assert alone == pytest.approx(targets * flops(kind, c) - (targets - 1) * less, rel=0.1)
    read = counted(lambda d, c: d.remember(c), denoiser, known)
    rows = 1 if kind == "dit" else targets
    assert read == pytest.approx(rows * memory_flops(kind, c, states), rel=0.1, abs=targets * D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "denoiser: dim = 0"),
        ({"depth": 0}, "denoiser: depth = 0"),
        ({"heads": 3}, "denoiser: heads = 3 does not divide width = 8"),
    ],
)
def test_config_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_dit_asks_for_states():
    with pytest.raises(ValueError, match="'dit' reads the states of the history"):
        random_denoiser("dit").remember(condition()._replace(states_BLD=None))
