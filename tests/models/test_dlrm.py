"""DLRM over a history against a plain numpy loop in float64: values, what a position sees, counts, configs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import MODELS, dlrm

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
CONFIG = dlrm.Config(embed_dim=6, width=8, depth=2, half_lives=(1.0, 4.0), max_length=7, dropout=0.0, dtype="float32")
BATCH = {"segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]], np.int32)}
REAL = BATCH["segment_ids"] > 0


def random_model(config: dlrm.Config, seed: int = 0) -> dlrm.Model:
    """Every parameter random, biases too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: dlrm.Model(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def inputs(config: dlrm.Config, seed: int = 1, rows: int = 2, length: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, length, config.embed_dim)).astype(np.float32)


def run(config: dlrm.Config, model: dlrm.Model, x: np.ndarray, segment_ids: np.ndarray = BATCH["segment_ids"]):
    batch = {"segment_ids": segment_ids}
    return np.asarray(jax.jit(lambda m, x: m(x, batch), compiler_options=QUICK)(model, x))


def in_float64(config: dlrm.Config, model: dlrm.Model, x: np.ndarray) -> np.ndarray:
    """One position after another, every bag from its definition."""
    numbers = jax.tree.map(lambda p: np.asarray(p, np.float64), model)
    out = np.zeros(x.shape)
    for row, start in np.ndindex(*BATCH["segment_ids"].shape):
        segment = BATCH["segment_ids"][row]
        mine = np.flatnonzero((segment == segment[start]) & (np.arange(8) <= start))
        seen = x[row, mine].astype(np.float64) * np.sqrt(config.embed_dim)
        bags = [seen[-1], seen.mean(axis=0)]
        for life in config.half_lives:
            weight = 0.5 ** ((start - mine) / life)
            bags.append((weight[:, None] * seen).sum(axis=0) / weight.sum())
        pairs = [a @ b / np.sqrt(config.embed_dim) for i, a in enumerate(bags) for b in bags[i + 1 :]]
        hidden = np.concatenate([*bags, pairs])
        hidden = np.maximum(hidden @ numbers.into.kernel[...] + numbers.into.bias[...], 0)
        for kernel, bias in zip(numbers.layers.kernel[...], numbers.layers.bias[...], strict=True):
            hidden = np.maximum(hidden @ kernel + bias, 0)
        out[row, start] = hidden @ numbers.out.kernel[...] + numbers.out.bias[...]
    return out


@pytest.mark.parametrize("change", [{}, {"half_lives": ()}, {"half_lives": (0.5, 2.0, 30.0), "depth": 1, "width": 5}])
def test_values_equal_a_plain_loop(change):
    config = dataclasses.replace(CONFIG, **change)
    model, x = random_model(config), inputs(config)
    np.testing.assert_allclose(run(config, model, x)[REAL], in_float64(config, model, x)[REAL], rtol=2e-4, atol=2e-4)


def test_a_position_sees_its_own_segment_up_to_itself_and_nothing_else():
    model, x = random_model(CONFIG), inputs(CONFIG)
    weight = np.random.default_rng(2).normal(size=CONFIG.embed_dim).astype(np.float32)

    def at(x, row, place):
        return model(x, BATCH)[row, place] @ weight

    slope = jax.jit(jax.grad(at), compiler_options=QUICK)
    for row, place in zip(*np.nonzero(REAL), strict=True):
        grad = np.asarray(slope(x, row, place))
        segment = BATCH["segment_ids"]
        seen = (segment == segment[row, place]) & (np.arange(8)[None] <= place) & (np.arange(2)[:, None] == row)
        assert (grad[~seen] == 0).all()  # not one bit of the future, of other users, of padding
        assert (grad[seen] != 0).any(axis=-1).all()


def test_other_segments_and_the_future_change_no_bit():
    model, x = random_model(CONFIG), inputs(CONFIG)
    first = run(CONFIG, model, x)
    changed = x.copy()
    changed[0, 5:] = 1e6
    changed[0, :3] = -1e6
    np.testing.assert_array_equal(run(CONFIG, model, changed)[0, 3:5], first[0, 3:5])


def test_packed_rows_equal_users_alone():
    config = dataclasses.replace(CONFIG, half_lives=(2.0, 50.0), max_length=40)
    model = random_model(config)
    rng, lengths = np.random.default_rng(5), [40, 1, 17, 2, 30]
    users = [rng.normal(size=(n, config.embed_dim)).astype(np.float32) for n in lengths]
    segment_ids = np.repeat(np.arange(1, 6), lengths).astype(np.int32)
    packed = run(config, model, np.concatenate(users)[None], segment_ids[None])[0]
    alone = [run(config, model, x[None], np.ones((1, len(x)), np.int32))[0] for x in users]
    np.testing.assert_allclose(packed, np.concatenate(alone), rtol=1e-4, atol=1e-4)


def test_memory_is_linear_in_the_length():
    """Nothing that is computed, forward or backward, has two axes of the length."""
    length = 61
    model, x = random_model(CONFIG), inputs(CONFIG, rows=1, length=length)
    batch = {"segment_ids": np.ones((1, length), np.int32)}
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: model(x, batch).sum()))(x))
    shapes = [[int(n) for n in found.split(",")] for found in re.findall(r"f32\[([\d,]+)\]", jaxpr)]
    assert any(length in shape for shape in shapes)
    assert max(np.prod(shape) for shape in shapes) <= length * CONFIG.bags * max(CONFIG.embed_dim, CONFIG.inputs)


def test_a_mean_that_never_fades_is_the_mean():
    x = inputs(CONFIG)
    found = np.asarray(jax.jit(dlrm.bags, static_argnums=2, compiler_options=QUICK)(x, BATCH["segment_ids"], (1e9,)))
    np.testing.assert_allclose(found[:, :, 2], found[:, :, 1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, :, 0], x)


def test_bfloat16_is_close_and_returns_float32():
    model, x = random_model(CONFIG), inputs(CONFIG)
    low = random_model(dataclasses.replace(CONFIG, dtype="bfloat16"))
    got = run(CONFIG, low, x)
    assert got.dtype == np.float32
    exact = in_float64(CONFIG, model, x)[REAL]
    assert np.abs(got[REAL] - exact).mean() < 0.03 * np.abs(exact).mean()


def test_dropout_draws_by_key():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    model, x = random_model(config), inputs(config)
    draw = jax.jit(lambda key: model(x, BATCH, key), compiler_options=QUICK)
    first = np.asarray(draw(jax.random.key(0)))
    np.testing.assert_array_equal(first, draw(jax.random.key(0)))
    assert np.any(first != np.asarray(draw(jax.random.key(1))))
    assert np.any(first != run(config, model, x))


@pytest.mark.parametrize("change", [{}, {"half_lives": ()}, {"width": 32, "depth": 3, "half_lives": (2.0, 8.0, 32.0)}])
def test_parameter_counts(change):
    c = dataclasses.replace(CONFIG, **change)
    shapes = jax.eval_shape(lambda: dlrm.Model(c, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(dlrm.param_groups(c).values())
    assert dlrm.width_factors(c) == {}


def test_counts_of_a_shape_by_hand():
    c = dlrm.Config(64, 128, 1, (2.0, 8.0), 50, 0.1, "float32")
    reads = 4 * 64 + 6
    assert c.inputs == reads
    assert dlrm.param_groups(c)["dense"] == reads * 128 + 128 + 128 * 128 + 128 + 128 * 64 + 64
    assert dlrm.flops(c, 10) == {
        "projections": 20 * (reads * 128 + 128 * 128 + 128 * 64),
        "attention": 20 * 16 * 64,
    }


def test_flops_agree_with_the_compiler_on_one_layer():
    """Within 10 %: the running means and activations are not counted. One layer: a scanned body counts once."""
    c = dataclasses.replace(CONFIG, embed_dim=32, width=512, depth=1)
    model, x = random_model(c), inputs(c, rows=1, length=48)
    batch = {"segment_ids": np.ones((1, 48), np.int32)}
    counted = jax.jit(lambda m, x: m(x, batch)).lower(model, x).cost_analysis()["flops"]
    assert counted == pytest.approx(sum(dlrm.flops(c, 48).values()), rel=0.1)
    dots = jax.jit(dlrm.interact).lower(jnp.ones((1, 48, c.bags, 32))).cost_analysis()["flops"]
    assert dots == pytest.approx(dlrm.flops(c, 48)["attention"], rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "model.depth = 0"),
        ({"width": -1}, "model.width = -1"),
        ({"half_lives": (2.0, 0.0)}, r"model.half_lives = \(2.0, 0.0\): expected positive"),
        ({"half_lives": (float("inf"),)}, r"model.half_lives = \(inf,\)"),
        ({"dropout": 1.0}, r"model.dropout = 1\.0"),
        ({"base": object()}, "has no width transfer: set optim.parametrisation to 'sp'"),
    ],
)
def test_config_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
    with pytest.raises(TypeError, match="unexpected keyword"):
        dlrm.Config(**dataclasses.asdict(CONFIG), heads=2)


def test_the_model_is_in_the_table():
    assert MODELS["dlrm"] is dlrm
