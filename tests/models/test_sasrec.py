"""SASRec against a plain numpy version in float64: values, gradients, counts, configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import sasrec

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
CONFIG = sasrec.Config(
    embed_dim=6, width=6, depth=2, heads=2, ffn=10, max_length=5, dropout=0.0, activation="relu", dtype="float32"
)
BATCH = {
    "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]], np.int32),
    "positions": np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0]], np.int32),
}
REAL = BATCH["segment_ids"] > 0


def random_model(config: sasrec.Config, seed: int = 0) -> sasrec.Model:
    """Every parameter random, norms and biases too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: sasrec.Model(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def inputs(config: sasrec.Config, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 8, config.embed_dim)).astype(np.float32)


def in_float64(model: sasrec.Model, x: np.ndarray) -> np.ndarray:
    """The pre-norm Transformer, written out."""
    c = model.config
    numbers = jax.tree.map(lambda p: np.asarray(p, np.float64), model)

    def norm(n, x, *layer):
        scale, bias = n.scale[...][layer], n.bias[...][layer]
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-8) * scale + bias

    def linear(m, x, *layer):
        return x @ m.kernel[...][layer] + m.bias[...][layer]

    x = x * np.sqrt(c.embed_dim) + numbers.positions[...][BATCH["positions"]]
    if c.embed_dim != c.width:
        x = x @ numbers.up.kernel[...]
    size, blocks = c.width // c.heads, numbers.blocks
    segment = BATCH["segment_ids"]
    allowed = (segment[:, :, None] == segment[:, None, :]) & np.tri(8, dtype=bool) & REAL[:, :, None]
    for layer in range(c.depth):
        qkv = linear(blocks.qkv, norm(blocks.norm_attention, x, layer), layer)
        mixed = np.zeros_like(x)
        for h in range(c.heads):
            q, k, v = (qkv[..., i * c.width + h * size : i * c.width + (h + 1) * size] for i in range(3))
            weights = np.where(allowed, np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(size)), 0.0)
            total = weights.sum(-1, keepdims=True)
            mixed[..., h * size : (h + 1) * size] = weights / np.where(total > 0, total, 1.0) @ v
        x = x + linear(blocks.out, mixed, layer)
        hidden = np.maximum(linear(blocks.ffn_in, norm(blocks.norm_ffn, x, layer), layer), 0.0)
        x = x + linear(blocks.ffn_out, hidden, layer)
    x = norm(numbers.norm, x)
    return x if c.embed_dim == c.width else x @ numbers.down.kernel[...]


@pytest.mark.parametrize("width", [6, 4])
def test_value_and_gradient_equal_numpy(width):
    config = dataclasses.replace(CONFIG, width=width)
    model, x = random_model(config), inputs(config)
    weight = np.random.default_rng(2).normal(size=(2, 8, 6)) * REAL[:, :, None]

    def total(model, x):
        hidden = model(x, BATCH)
        return (weight.astype(np.float32) * hidden).sum(), hidden

    run = jax.jit(jax.value_and_grad(total, argnums=1, has_aux=True), compiler_options=QUICK)
    (_, hidden), grad = run(model, x)
    assert (model.up is None) == (model.down is None) == (width == 6)
    np.testing.assert_allclose(np.asarray(hidden)[REAL], in_float64(model, x)[REAL], atol=2e-5)
    for seed in range(2):
        direction = np.random.default_rng(seed).normal(size=x.shape)
        plus, minus = (in_float64(model, x.astype(np.float64) + step * direction) for step in (1e-6, -1e-6))
        slope = (weight * (plus - minus)).sum() / 2e-6
        assert (np.asarray(grad) * direction).sum() == pytest.approx(slope, rel=2e-4)


def test_bfloat16_is_close_and_returns_float32():
    model, x = random_model(CONFIG), inputs(CONFIG)
    low = random_model(dataclasses.replace(CONFIG, dtype="bfloat16"))
    got = jax.jit(lambda m, x: m(x, BATCH), compiler_options=QUICK)(low, x)
    assert got.dtype == jnp.float32
    assert np.abs(np.asarray(got) - in_float64(model, x))[REAL].mean() < 0.03
    jaxpr = str(jax.make_jaxpr(lambda m, x: m(x, BATCH))(low, x))
    products = [line for line in jaxpr.splitlines() if "= dot_general" in line]
    assert sum(":f32[" in line for line in products) == 2  # scores and weighted values accumulate in float32
    assert sum(":bf16[" in line for line in products) == 4


def test_dropout_draws_by_key():
    config = dataclasses.replace(CONFIG, dropout=0.5, depth=1)
    model, x = random_model(config), inputs(config)
    run = jax.jit(lambda model, x, key: model(x, BATCH, key), compiler_options=QUICK)
    first = np.asarray(run(model, x, jax.random.key(0)))
    np.testing.assert_array_equal(first, run(model, x, jax.random.key(0)))
    assert np.any(first != np.asarray(run(model, x, jax.random.key(1))))


@pytest.mark.parametrize("change", [{}, {"width": 8, "ffn": 32}, {"depth": 3, "heads": 3, "max_length": 50}])
def test_parameter_counts(change):
    c = dataclasses.replace(CONFIG, **change)
    shapes = jax.eval_shape(lambda: sasrec.Model(c, jax.random.key(0)))
    groups = sasrec.param_groups(c)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(groups.values())
    assert groups["positions"] == c.max_length * c.embed_dim


def test_counts_of_the_published_shape():
    """Width 50, two blocks, feed-forward 50: a block has 6 w^2 weights, 6 w biases and 4 w of norms."""
    c = dataclasses.replace(CONFIG, embed_dim=50, width=50, heads=1, ffn=50, max_length=200)
    assert sasrec.param_groups(c) == {"dense": 2 * (6 * 2500 + 10 * 50) + 100, "positions": 10_000}
    flops = sasrec.flops(c, 200)
    assert flops == {"projections": 2 * 200 * 2 * 6 * 2500, "attention": 2 * 2 * 2 * 50 * 200 * 201 / 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "model.depth = 0"),
        ({"ffn": -1}, "model.ffn = -1"),
        ({"heads": 4}, "model.heads = 4 does not divide model.width = 6"),
        ({"dropout": 1.0}, "model.dropout = 1.0"),
        ({"activation": "swish"}, "model.activation = 'swish'"),
    ],
)
def test_config_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
    with pytest.raises(TypeError, match="unexpected keyword"):
        sasrec.Config(**dataclasses.asdict(CONFIG), blocks=2)
