"""The blocks of T5: buckets, biases along the diagonals, initial deviations, the norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.layers import t5

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
SHAPE = t5.Shape(embed_dim=64, depth=3, heads=4, head_dim=24, ffn=160, dropout=0.0)


def test_buckets_are_the_published_ones():
    both = {0: 0, 1: 17, 7: 23, 8: 24, 16: 26, 20: 26, 32: 28, 64: 30, 127: 31, 128: 31, 9999: 31}
    both |= {-1: 1, -8: 8, -20: 10, -128: 15}
    past = {0: 0, -15: 15, -16: 16, -32: 21, -64: 26, -127: 31, -128: 31, -9999: 31, 1: 0, 50: 0}
    for expected, bidirectional in ((both, True), (past, False)):
        found = t5.relative_bucket(np.array(list(expected)), bidirectional)
        assert dict(zip(expected, found.tolist(), strict=True)) == expected


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_bias_is_the_tables_entry_of_every_pair(length, bidirectional):
    table = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    place = np.arange(length)
    entry = t5.relative_bucket(place[None, :] - place[:, None], bidirectional)
    found = t5.relative_bias(jnp.asarray(table), length, bidirectional)
    np.testing.assert_allclose(found, np.moveaxis(table[entry], -1, 0), atol=1e-6)
    weight = np.random.default_rng(1).normal(size=found.shape).astype(np.float32)
    grad = jax.grad(lambda t: (weight * t5.relative_bias(t, length, bidirectional)).sum())(jnp.asarray(table))
    expected = np.zeros((32, 3))
    np.add.at(expected, entry, np.moveaxis(weight, 0, -1))
    np.testing.assert_allclose(grad, expected, atol=1e-4)
    stack = jax.eval_shape(lambda: t5.Stack(SHAPE, t5.EncoderLayer, bidirectional, jax.random.key(0)))
    stack.relative = nnx.Param(table)
    np.testing.assert_allclose(stack.last_bias(length), found[:, -1], atol=1e-6)


@pytest.mark.parametrize("init", t5.INITS)
def test_initial_deviations(init):
    """With 64 wide states, 4 heads of 24, 160 hidden units."""
    c = t5.Shape(**{**SHAPE.__dict__, "init": init, "depth": 8})
    build = jax.jit(lambda key: t5.Stack(c, t5.DecoderLayer, False, key), compiler_options=QUICK)
    stack = build(jax.random.key(0))
    published = {
        "q": (64 * 24) ** -0.5, "k": 64**-0.5, "v": 64**-0.5, "out": 96**-0.5, "wi": 64**-0.5, "wo": 160**-0.5,
    }  # fmt: skip
    for attention in (stack.layers.attention, stack.layers.cross):
        drawn = dict(zip("qkv", np.split(np.asarray(attention.qkv[...]), 3, axis=-1), strict=True))
        drawn |= {"out": attention.out[...], "wi": stack.layers.ffn.wi[...], "wo": stack.layers.ffn.wo[...]}
        for name, expected in published.items():
            assert np.std(drawn[name]) == pytest.approx(expected if init == "t5" else 0.02, rel=0.03), name
            assert abs(np.mean(drawn[name])) < 0.03 * np.std(drawn[name]), name
    draws = [build(jax.random.key(i)).relative[...] for i in range(9)]
    assert np.std(draws) == pytest.approx(64**-0.5 if init == "t5" else 0.02, rel=0.08)
    np.testing.assert_array_equal(stack.layers.ffn.norm.scale[...], 1.0)


def test_norm_has_no_mean_and_float32_statistics():
    norm = t5.RMSNorm(6)
    x = np.random.default_rng(0).normal(size=(2, 6)) * 300 + 5
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)
    low = norm(jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, rtol=1.5e-2)
    lines = str(jax.make_jaxpr(norm)(jnp.asarray(x, jnp.bfloat16))).splitlines()
    assert any("reduce_sum" in line and ":f32[" in line for line in lines)
    tiny = np.full((1, 6), 1e-4)
    np.testing.assert_allclose(norm(jnp.asarray(tiny, jnp.float32)), tiny / np.sqrt(1e-8 + 1e-6), rtol=1e-5)


def test_dropout_of_the_weights_keeps_their_mean():
    """Dropped after the softmax: the mean over draws is the attention without dropout, and rows stop summing to 1."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 4, 3)), jnp.float32) for _ in range(2))
    v, mask = jnp.ones((1, 1, 4, 1)), jnp.ones((1, 1, 1, 4), bool)
    keys = jax.random.split(jax.random.key(0), 2000)
    run = jax.jit(jax.vmap(lambda key: t5.attend(q, k, v, mask, None, 0.5, key)), compiler_options=QUICK)
    drawn = run(keys)
    assert np.std(drawn) > 0.1
    np.testing.assert_allclose(drawn.mean(axis=0), t5.attend(q, k, v, mask, None, 0.5, None), atol=0.06)


def test_layer_parameters_of_the_published_shapes():
    for width, expected in ((128, (459_008, 655_744)), (384, (1_377_024, 1_967_232))):
        c = t5.Shape(embed_dim=width, depth=1, heads=6, head_dim=64, ffn=1024, dropout=0.1)
        assert t5.layer_parameters(c) == expected
        for layer, count in zip((t5.EncoderLayer, t5.DecoderLayer), expected, strict=True):
            shapes = jax.eval_shape(lambda layer=layer, c=c: layer(c, jax.random.key(0)))
            assert sum(x.size for x in jax.tree.leaves(shapes)) == count
