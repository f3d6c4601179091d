"""TIGER against T5 written out in float64, its packing, its decoding step by step, its counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers import t5
from recscale.models import tiger
from tests.models import t5_twin

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
CONFIG = tiger.Config(
    embed_dim=8, depth=2, heads=2, head_dim=3, ffn=10, dropout=0.0, levels=3, codebook=7, max_length=9, dtype="float32"
)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2]], np.int32)
VECTORS = np.array([[1, 0, 0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]], bool)
SLOTS = np.array([[2, 6, 7], [0, 8, 0]], np.int32)


def example(c=CONFIG, segments=SEGMENTS, vectors=VECTORS, seed=0):
    """A history with vectors, and the next codes of every slot."""
    rng = np.random.default_rng(seed)
    shape = (*segments.shape, c.levels)
    codes, following = (rng.integers(0, c.codebook, shape).astype(np.int32) for _ in range(2))
    vector = rng.normal(size=(*segments.shape, c.embed_dim)).astype(np.float32)
    return tiger.History(codes, (segments > 0) & ~vectors, segments, vector), following


def tiny(c=CONFIG) -> tiger.Model:
    return t5_twin.random_model(lambda: tiger.Model(c, jax.random.key(0)))


FORWARD = jax.jit(lambda model, *args: model(*args), compiler_options=QUICK)


def alone(history, following, slots):
    """Every target's segment in a row of its own, from the left."""
    rows = [(b, slot) for b, row in enumerate(slots) for slot in row]
    length = history.item_BL.shape[1]

    def moved(x):
        out = np.zeros((len(rows), *x.shape[1:]), x.dtype)
        for r, (b, slot) in enumerate(rows):
            mine = np.flatnonzero(history.segment_ids_BL[b] == history.segment_ids_BL[b, slot])
            out[r, : len(mine)] = x[b, mine]
        return out

    one = tiger.History(*(moved(np.asarray(x)) for x in history))
    one = one._replace(segment_ids_BL=(one.segment_ids_BL > 0).astype(np.int32))
    last = (one.segment_ids_BL > 0).sum(axis=1, keepdims=True) - 1
    assert length == one.item_BL.shape[1]
    return one, moved(following), last.astype(np.int32)


@pytest.mark.parametrize("separator", [False, True])
def test_scores_equal_numpy(separator):
    c = dataclasses.replace(CONFIG, separator=separator)
    model, (history, following) = tiny(c), example(c)
    found = FORWARD(model, history, following, SLOTS)
    assert found.shape == (2, 3, c.levels, c.codebook) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, t5_twin.encoder_decoder(model, history, following, SLOTS), atol=1e-5)


@pytest.mark.parametrize("slip", t5_twin.SLIPS)
def test_every_slip_is_caught(slip):
    model, (history, following) = tiny(), example()
    found = np.asarray(FORWARD(model, history, following, SLOTS))
    assert np.abs(found - t5_twin.encoder_decoder(model, history, following, SLOTS, slip)).max() > 1e-2


def test_packed_rows_equal_a_row_for_every_segment():
    model, (history, following) = tiny(), example()
    one, one_following, last = alone(history, following, SLOTS)
    packed = FORWARD(model, history, following, SLOTS)
    found = FORWARD(model, one, one_following, last)
    np.testing.assert_allclose(packed.reshape(found.shape), found, atol=1e-5)


def test_scores_do_not_depend_on_the_other_rows():
    model, (history, following) = tiny(), example()
    one, one_following, last = alone(history, following, SLOTS)
    together = FORWARD(model, one, one_following, last)
    for r in range(2):
        part = jax.tree.map(lambda x, r=r: x[r : r + 1], (one, one_following, last))
        np.testing.assert_allclose(FORWARD(model, *part)[0], together[r], atol=1e-5)


def test_no_other_segment_and_no_later_code_is_seen():
    """Gradients by token, exact: tokens all differ and, untied, embeddings are inputs only."""
    c = dataclasses.replace(CONFIG, tied=False, codebook=40, depth=1)
    model = tiny(c)
    assert model.tokens.head is not None
    codes = np.arange(36).reshape(2, 18)[:, :9, None].astype(np.int32).repeat(3, axis=2)
    history = tiger.History(codes, SEGMENTS > 0, SEGMENTS)
    following = (codes + 9).astype(np.int32) % 40
    following[0, 2] = [37, 38, 39]

    def score(model, level):
        return (model(history, following, SLOTS)[0, 0, level] * jnp.arange(1.0, 41.0)).sum()

    gradient = jax.jit(jax.grad(score), compiler_options=QUICK)
    for level in range(3):
        by_token = np.abs(gradient(model, level).tokens.embedding[...]).max(axis=1)
        own = {1 + q * 40 + int(codes[0, i, q]) for i in range(3) for q in range(3)}
        assert set(np.flatnonzero(by_token)) == own | {0} | {1 + q * 40 + 37 + q for q in range(level)}


@pytest.mark.parametrize("separator", [False, True])
def test_step_by_step_equals_teacher_forcing(separator):
    c = dataclasses.replace(CONFIG, separator=separator)
    model, (history, following) = tiny(c), example(c)
    one, _, last = alone(history, following, SLOTS)
    W = 4
    beams = np.random.default_rng(5).integers(0, c.codebook, (len(last), W, c.levels)).astype(np.int32)

    def stepwise(model, history, beams):
        memory = model.remember(history)
        assert {x.shape[0] for x in jax.tree.leaves(memory)} == {len(last)}
        cache, found = model.begin(memory, W), []
        for level in range(c.levels):
            code = beams[:, :, level - 1] if level else jnp.full_like(beams[:, :, 0], 3)
            log_p, cache = model.advance(memory, cache, code, level)
            assert {x.shape[:2] for x in jax.tree.leaves(cache)} == {(len(last), W)}
            found.append(log_p)
        return jnp.stack(found, axis=2)

    found = jax.jit(stepwise, compiler_options=QUICK)(model, one, beams)
    assert found.dtype == jnp.float32
    for w in range(W):
        forced = np.zeros((*one.item_BL.shape, c.levels), np.int32)
        forced[np.arange(len(last)), last[:, 0]] = beams[:, w]
        expected = jax.nn.log_softmax(FORWARD(model, one, forced, last), axis=-1)[:, 0]
        np.testing.assert_allclose(found[:, w], expected, atol=1e-5)


def test_a_vector_is_one_token_next_to_the_first_code():
    """A vector equal to a code's embedding in front of an item reads as that code alone would."""
    model, (history, following) = tiny(), example()
    assert np.asarray(history.places(3)).reshape(2, 9, 3)[0, 0].tolist() == [0, 0, 1]
    plain = history._replace(vector_BLD=None)
    assert (np.asarray(plain.places(3)).reshape(2, 9, 3)[0, 0] == 0).all()
    without = FORWARD(model, plain, following, SLOTS)  # then the slot has no token, and the segment begins after it
    assert np.abs(without - FORWARD(model, history, following, SLOTS))[0, 0].max() > 1e-3
    np.testing.assert_allclose(without[0, 2], FORWARD(model, history, following, SLOTS)[0, 2], atol=1e-6)


def test_bfloat16_is_close_and_keeps_float32_where_it_matters():
    model, (history, following) = tiny(), example()
    low = tiny(dataclasses.replace(CONFIG, dtype="bfloat16"))
    found = FORWARD(low, history, following, SLOTS)
    assert found.dtype == jnp.float32
    exact = t5_twin.encoder_decoder(model, history, following, SLOTS)
    assert np.abs(found - exact).mean() < 0.05 * np.abs(exact).mean()
    lines = str(jax.make_jaxpr(lambda m: m(history, following, SLOTS, None, lambda body: body))(low)).splitlines()
    assert all(":f32[" in line for line in lines if "= exp " in line)
    assert (
        sum(":f32[" in line for line in lines if "= dot_general" in line) == 2 + 2 * 3 + 1
    )  # biases, attention, codes


def test_dropout_draws_by_key():
    c = dataclasses.replace(CONFIG, dropout=0.5)
    model, (history, following) = tiny(c), example(c)
    first = np.asarray(FORWARD(model, history, following, SLOTS, jax.random.key(0)))
    np.testing.assert_array_equal(first, FORWARD(model, history, following, SLOTS, jax.random.key(0)))
    assert np.any(first != np.asarray(FORWARD(model, history, following, SLOTS, jax.random.key(1))))


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


PRESET = dataclasses.replace(
    CONFIG, embed_dim=128, depth=4, heads=6, head_dim=64, ffn=1024, levels=4, codebook=256, max_length=20
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 4_590_848),
        ({"embed_dim": 384}, 13_771_776),
        ({"separator": True}, 4_590_848 + 128),
        ({"tied": False}, 4_590_848 + 1024 * 128),
        ({"depth": 1, "levels": 3, "init": "small"}, 459_008 + 655_744 + 769 * 128 + 256 + 384),
    ],
)
def test_parameter_counts(change, expected):
    c = dataclasses.replace(PRESET, **change)
    shapes = jax.eval_shape(lambda: tiger.Model(c, jax.random.key(0)))
    groups = tiger.param_groups(c)
    assert count(shapes) == sum(groups.values()) == expected
    assert groups["codebooks"] == count(shapes.tokens)
    assert groups["positions"] == count((shapes.encoder.relative, shapes.decoder.relative))
    assert tiger.width_factors(c) == {}


def test_embeddings_begin_with_deviation_one_or_small():
    for init, expected in (("t5", 1.0), ("small", 0.02)):
        c = dataclasses.replace(CONFIG, embed_dim=32, codebook=100, tied=False, init=init)
        tokens = jax.jit(lambda key, c=c: tiger.CodeTokens(c, key), compiler_options=QUICK)(jax.random.key(0))
        assert np.std(tokens.embedding[...]) == pytest.approx(expected, rel=0.02)
        assert np.std(tokens.head[...]) == pytest.approx(expected, rel=0.02)
    c = dataclasses.replace(CONFIG, embed_dim=32, codebook=100)
    model = jax.jit(lambda key: tiger.Model(c, key), compiler_options=QUICK)(jax.random.key(0))
    codes = np.random.default_rng(0).integers(0, 100, (16, 4, 3)).astype(np.int32)
    ones = np.ones((16, 4), np.int32)
    history = tiger.History(codes, ones > 0, ones)
    scores = FORWARD(model, history, codes, np.full((16, 1), 3, np.int32))
    assert np.std(scores) == pytest.approx(1.0, rel=0.2)  # D^-1/2 times the norm's D^1/2


def compiled_flops(c, length, monkeypatch, attend=True):
    """FLOPs as XLA counts them before optimising; attend=False puts sums in attention's place."""
    if not attend:
        monkeypatch.setattr(t5, "attend", lambda q, k, v, *args: q + k.sum() + v.sum())
    model = jax.eval_shape(lambda: tiger.Model(c, jax.random.key(0)))
    codes, ones = jnp.zeros((1, length, c.levels), jnp.int32), jnp.ones((1, length), jnp.int32)
    slots = jnp.full((1, 1), length - 1)
    run = jax.jit(lambda m: m(tiger.History(codes, ones > 0, ones), codes, slots, None, lambda body: body))
    return run.lower(model).cost_analysis()["flops"]


def test_flops_agree_with_the_compiler(monkeypatch):
    """One layer of each stack (a scanned body is counted once); the compiler counts all pairs."""
    c = dataclasses.replace(PRESET, depth=1, max_length=40)
    ours = tiger.flops(c, 40)
    whole = compiled_flops(c, 40, monkeypatch)
    rest = compiled_flops(c, 40, monkeypatch, attend=False)
    assert rest == pytest.approx(ours["projections"], rel=0.05)
    assert whole - rest == pytest.approx(ours["attention"], rel=0.1)
    assert tiger.flops(dataclasses.replace(c, depth=3), 40)["attention"] == 3 * ours["attention"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "model.depth = 0"),
        ({"codebook": -1}, "model.codebook = -1"),
        ({"dropout": 1.0}, "model.dropout = 1.0"),
        ({"init": "xavier"}, "model.init = 'xavier'"),
        ({"base": 3}, "model.base is given"),
    ],
)
def test_config_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
