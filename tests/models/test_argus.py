"""The ARGUS encoder against plain numpy in float64: values, gradients, the future, counts, the sizes of the paper."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import argus_kuairand
from recscale.models import argus
from recscale.scaling import axes, recipes

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
CONFIG = argus.Config(
    embed_dim=6, width=6, depth=2, heads=2, max_length=5, dropout=0.0, time_bias=True, query_time="last_event",
    dtype="float32",
)  # fmt: skip
TIME = np.cumsum(np.random.default_rng(9).integers(1, 5000, (2, 8)), axis=1).astype(np.int32)
BATCH = {
    "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]], np.int32),
    "positions": np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0]], np.int32),
    "timestamp": TIME,
    "query_timestamp": TIME + 777,
}
REAL = BATCH["segment_ids"] > 0


def random_model(config: argus.Config, seed: int = 0) -> argus.Model:
    """Every parameter random, norms too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: argus.Model(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def inputs(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 8, CONFIG.embed_dim)).astype(np.float32)


def in_float64(model: argus.Model, x: np.ndarray) -> np.ndarray:
    """The pre-norm Transformer with a bucketed time bias, written out."""
    c = model.config
    numbers = jax.tree.map(lambda p: np.asarray(p, np.float64), model)

    def norm(n, x, *layer):
        scale, bias = n.scale[...][layer], n.bias[...][layer]
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = (x * np.sqrt(c.embed_dim) + numbers.positions[...][BATCH["positions"]]) * REAL[:, :, None]
    if c.embed_dim != c.width:
        x = x @ numbers.up.kernel[...]
    size, layers, segment = c.width // c.heads, numbers.layers, BATCH["segment_ids"]
    i, j = np.arange(8)[:, None], np.arange(8)[None]
    past = (j <= i)[None] | ((BATCH["positions"][:, :, None] < c.prefix) & (BATCH["positions"][:, None] < c.prefix))
    allowed = (segment[:, :, None] == segment[:, None, :]) & past & REAL[:, :, None]
    asked = BATCH["query_timestamp" if c.query_time == "next_event" else "timestamp"]
    seconds = np.abs(asked[:, :, None].astype(np.int64) - TIME[:, None, :])
    bucket = np.clip((np.log(np.maximum(seconds, 1)) / 0.301).astype(int), 0, 128)
    for layer in range(c.depth):
        qkv = norm(layers.norm_attention, x, layer) @ layers.qkv.kernel[...][layer]
        mixed = np.zeros_like(x)
        for h in range(c.heads):
            q, k, v = (qkv[..., n * c.width + h * size : n * c.width + (h + 1) * size] for n in range(3))
            score = q @ k.transpose(0, 2, 1) / np.sqrt(size)
            score = score + (layers.time_bias[...][layer][bucket] if c.time_bias else 0.0)
            weights = np.where(allowed, np.exp(score), 0.0)
            total = weights.sum(-1, keepdims=True)
            mixed[..., h * size : (h + 1) * size] = weights / np.where(total > 0, total, 1.0) @ v
        x = x + mixed @ layers.out.kernel[...][layer]
        hidden = gelu(norm(layers.norm_mlp, x, layer) @ layers.mlp_in.kernel[...][layer])
        x = x + hidden @ layers.mlp_out.kernel[...][layer]
    x = norm(numbers.norm, x)
    return x if c.embed_dim == c.width else x @ numbers.down.kernel[...]


@pytest.mark.parametrize("change", [{}, {"width": 4, "time_bias": False}, {"query_time": "next_event", "prefix": 2}])
def test_value_and_gradient_equal_numpy(change):
    model, x = random_model(dataclasses.replace(CONFIG, **change)), inputs()
    weight = np.random.default_rng(2).normal(size=(2, 8, 6)) * REAL[:, :, None]

    def total(model, x):
        hidden = model(x, BATCH)
        return (weight.astype(np.float32) * hidden).sum(), hidden

    run = jax.jit(jax.value_and_grad(total, argnums=1, has_aux=True), compiler_options=QUICK)
    (_, hidden), grad = run(model, x)
    np.testing.assert_allclose(np.asarray(hidden)[REAL], in_float64(model, x)[REAL], atol=5e-5)
    direction = np.random.default_rng(0).normal(size=x.shape)
    plus, minus = (in_float64(model, x.astype(np.float64) + step * direction) for step in (1e-6, -1e-6))
    slope = (weight * (plus - minus)).sum() / 2e-6
    assert (np.asarray(grad) * direction).sum() == pytest.approx(slope, rel=5e-4)


def test_nothing_comes_from_the_future_or_another_user():
    model, x = random_model(CONFIG), inputs()
    run = jax.jit(jax.grad(lambda x, model: model(x, BATCH)[0, 4].sum()), compiler_options=QUICK)
    grad = run(x, model)
    assert {(int(b), int(i)) for b, i in zip(*np.nonzero(np.abs(grad).sum(-1)), strict=True)} == {(0, 3), (0, 4)}


@pytest.mark.parametrize("change", [{}, {"width": 8, "heads": 4}, {"depth": 3, "time_bias": False, "max_length": 50}])
def test_parameter_counts(change):
    c = dataclasses.replace(CONFIG, **change)
    shapes = jax.eval_shape(lambda: argus.Model(c, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(argus.param_groups(c).values())


@pytest.mark.parametrize(
    ("size", "published"), [("mini", 3.2e6), ("small", 18.9e6), ("medium", 126e6), ("large", 1.007e9)]
)
def test_the_dial_gives_the_sizes_of_the_paper(size, published):
    """Contexts of 512 to 8,192 build at every size; small is derived, the others are published."""
    for context in (512, 8192):
        config = argus_kuairand.get_config().unlock()
        config.model.max_length = config.loader.length = config.loader.row_length = context
        config = axes.encoder_size(config.lock(), size)
        c = argus.Config(**config.model)
        assert argus.param_groups(c)["dense"] == pytest.approx(published, rel=0.025)
        per_token = argus.flops(c, context)["projections"] / context
        assert per_token == pytest.approx(2 * 12 * c.depth * c.width**2, rel=0.05)
        assert config.cell.coordinates.width == c.width and config.optim.learning_rate <= 2e-3
    with pytest.raises(ValueError, match="size 'huge'"):
        recipes.argus(argus_kuairand.get_config(), "huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "model.depth = 0"),
        ({"heads": 4}, "model.heads = 4 does not divide model.width = 6"),
        ({"dropout": 1.0}, "model.dropout = 1.0"),
        ({"query_time": "now"}, "model.query_time = 'now'"),
    ],
)
def test_config_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
