"""The decoder-only TIGER against T5 written out in float64: the stream, every slot a target, decoding, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers import t5
from recscale.models import tiger_decoder
from tests.models import t5_twin

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
CONFIG = tiger_decoder.Config(
    embed_dim=8, depth=2, heads=2, head_dim=3, ffn=10, dropout=0.0, levels=3, codebook=7, max_length=9, dtype="float32"
)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2]], np.int32)
VECTORS = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]], bool)
SLOTS = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
SLIPS = [slip for slip in t5_twin.SLIPS if slip != "bias in cross-attention"]
HELD = SEGMENTS > 0


def example(c=CONFIG, seed=0):
    """A history with vectors, and the next codes of every slot: those of the slot that follows it where one does."""
    rng = np.random.default_rng(seed)
    shape = (*SEGMENTS.shape, c.levels)
    codes, following = (rng.integers(0, c.codebook, shape).astype(np.int32) for _ in range(2))
    same = SEGMENTS[:, 1:] == SEGMENTS[:, :-1]
    following[:, :-1] = np.where(same[:, :, None], codes[:, 1:], following[:, :-1])
    vector = rng.normal(size=(*SEGMENTS.shape, c.embed_dim)).astype(np.float32)
    return tiger_decoder.History(codes, HELD & ~VECTORS, SEGMENTS, vector), following


def tiny(c=CONFIG) -> tiger_decoder.Model:
    return t5_twin.random_model(lambda: tiger_decoder.Model(c, jax.random.key(0)))


FORWARD = jax.jit(lambda model, *args: model(*args), compiler_options=QUICK)


def up_to(history, following, targets):
    """The segment of every target up to its slot, in a row of its own, from the left."""
    last = []

    def moved(x):
        out = np.zeros((len(targets), *x.shape[1:]), x.dtype)
        for r, (b, slot) in enumerate(targets):
            mine = np.flatnonzero(SEGMENTS[b, : slot + 1] == SEGMENTS[b, slot])
            out[r, : len(mine)] = x[b, mine]
            last.append(len(mine) - 1)
        return out

    one = tiger_decoder.History(*(moved(np.asarray(x)) for x in history))
    one = one._replace(segment_ids_BL=(one.segment_ids_BL > 0).astype(np.int32))
    return one, moved(following), np.array(last[: len(targets)], np.int32)[:, None]


def test_scores_equal_numpy_at_every_slot():
    model, (history, following) = tiny(), example()
    found = FORWARD(model, history, following, SLOTS)
    assert found.shape == (2, 9, 3, 7) and found.dtype == jnp.float32
    expected = t5_twin.decoder_only(model, history, following, np.where(HELD, SLOTS, 0))
    np.testing.assert_allclose(found[HELD], expected[HELD], atol=1e-5)
    some = np.array([[2, 7], [8, 0]], np.int32)
    np.testing.assert_allclose(
        FORWARD(model, history, following, some), np.asarray(found)[np.arange(2)[:, None], some], atol=1e-5
    )


@pytest.mark.parametrize("slip", SLIPS)
def test_every_slip_is_caught(slip):
    model, (history, following) = tiny(), example()
    slots = np.array([[2, 6], [8, 0]], np.int32)
    found = np.asarray(FORWARD(model, history, following, SLOTS))[np.arange(2)[:, None], slots]
    assert np.abs(found - t5_twin.decoder_only(model, history, following, slots, slip)).max() > 1e-2


def test_packed_rows_equal_a_row_for_every_history():
    model, (history, following) = tiny(), example()
    targets = list(zip(*np.nonzero(HELD), strict=True))
    one, one_following, last = up_to(history, following, targets)
    found = FORWARD(model, one, one_following, last)
    np.testing.assert_allclose(FORWARD(model, history, following, SLOTS)[HELD], found[:, 0], atol=1e-5)


def test_nothing_later_and_no_other_segment_is_seen():
    """Gradients by token, exact: tokens all differ and, untied, embeddings are inputs only."""
    c = dataclasses.replace(CONFIG, tied=False, codebook=40, depth=1)
    model = tiny(c)
    codes = np.arange(36).reshape(2, 18)[:, :9, None].astype(np.int32).repeat(3, axis=2)
    following = np.concatenate([codes[:, 1:], codes[:, :1] + 30], axis=1).astype(np.int32) % 40
    following[0, 6] = [37, 38, 39]  # the last of its segment
    history = tiger_decoder.History(codes, HELD, SEGMENTS)

    def score(model, slot, level):
        return (model(history, following, SLOTS)[0, slot, level] * jnp.arange(1.0, 41.0)).sum()

    gradient = jax.jit(jax.grad(score), compiler_options=QUICK)
    for slot in (3, 5, 6):
        for level in range(3):
            by_token = np.abs(gradient(model, slot, level).tokens.embedding[...]).max(axis=1)
            past = {1 + q * 40 + int(codes[0, i, q]) for i in range(3, slot + 1) for q in range(3)}
            past |= {1 + q * 40 + int(following[0, slot, q]) for q in range(level)}
            assert set(np.flatnonzero(by_token)) == past, (slot, level)


def test_step_by_step_equals_teacher_forcing():
    """For histories of 1 to 8 slots, with and without a vector, and for beams with codes of their own."""
    model, (history, following) = tiny(), example()
    targets = [(0, 0), (0, 1), (0, 3), (0, 6), (0, 7), (1, 1), (1, 2), (1, 8)]
    one, one_following, last = up_to(history, following, targets)
    B, W = len(targets), 4
    beams = np.random.default_rng(5).integers(0, CONFIG.codebook, (B, W, 3)).astype(np.int32)

    def stepwise(model, history, beams):
        memory = model.remember(history)
        assert {x.shape[0] for x in jax.tree.leaves(memory)} == {B}
        cache, found = model.begin(memory, W), []
        for level in range(3):
            code = beams[:, :, level - 1] if level else jnp.full_like(beams[:, :, 0], 3)
            log_p, cache = model.advance(memory, cache, code, level)
            assert {x.shape[:2] for x in jax.tree.leaves(cache)} == {(B, W)}
            found.append(log_p)
        return jnp.stack(found, axis=2)

    run = jax.jit(stepwise, compiler_options=QUICK)
    found = run(model, one, beams)
    for w in range(W):
        forced = one_following.copy()
        forced[np.arange(B), last[:, 0]] = beams[:, w]
        expected = jax.nn.log_softmax(FORWARD(model, one, forced, last), axis=-1)[:, 0]
        np.testing.assert_allclose(found[:, w], expected, atol=1e-5)


def test_a_history_of_one_slot_has_an_empty_memory():
    model, (history, following) = tiny(), example()
    one = jax.tree.map(lambda x: x[:, :1], history)
    memory = model.remember(one)
    assert memory.mask.shape == (2, 0)
    log_p, _ = model.advance(memory, model.begin(memory, 2), np.zeros((2, 2), np.int32), 0)
    expected = jax.nn.log_softmax(FORWARD(model, one, following[:, :1], np.zeros((2, 1), np.int32))[:, :, 0], axis=-1)
    np.testing.assert_allclose(log_p, np.repeat(expected, 2, axis=1), atol=1e-5)


def test_bfloat16_is_close_and_dropout_draws_by_key():
    model, (history, following) = tiny(), example()
    exact = np.asarray(FORWARD(model, history, following, SLOTS))[HELD]
    low = FORWARD(tiny(dataclasses.replace(CONFIG, dtype="bfloat16")), history, following, SLOTS)
    assert low.dtype == jnp.float32
    assert np.abs(np.asarray(low)[HELD] - exact).mean() < 0.06 * np.abs(exact).mean()
    dropped = tiny(dataclasses.replace(CONFIG, dropout=0.5))
    first, again, other = (FORWARD(dropped, history, following, SLOTS, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))


PRESET = dataclasses.replace(
    CONFIG, embed_dim=128, depth=8, heads=6, head_dim=64, ffn=1024, levels=4, codebook=256, max_length=20
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 8 * 459_008 + 128 + 32 * 6 + 1025 * 128),
        ({"tied": False, "depth": 2}, 2 * 459_008 + 128 + 32 * 6 + 2049 * 128),
    ],
)
def test_parameter_counts(change, expected):
    c = dataclasses.replace(PRESET, **change)
    shapes = jax.eval_shape(lambda: tiger_decoder.Model(c, jax.random.key(0)))
    groups = tiger_decoder.param_groups(c)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(groups.values()) == expected
    assert groups["codebooks"] == sum(x.size for x in jax.tree.leaves(shapes.tokens))
    assert tiger_decoder.width_factors(c) == {}


def compiled_flops(c, length, monkeypatch, attend=True):
    """FLOPs as XLA counts them before optimising; attend=False puts sums in attention's place."""
    if not attend:
        monkeypatch.setattr(t5, "attend", lambda q, k, v, *args: q + k.sum() + v.sum())
    model = jax.eval_shape(lambda: tiger_decoder.Model(c, jax.random.key(0)))
    codes, ones = jnp.zeros((1, length, c.levels), jnp.int32), jnp.ones((1, length), jnp.int32)
    history, slots = tiger_decoder.History(codes, ones > 0, ones), jnp.arange(length)[None]
    run = jax.jit(lambda m: m(history, codes, slots, None, lambda body: body))
    return run.lower(model).cost_analysis()["flops"]


def test_flops_agree_with_the_compiler(monkeypatch):
    """One layer (a scanned body is counted once); the compiler counts all pairs."""
    c = dataclasses.replace(PRESET, depth=1, max_length=40)
    ours = tiger_decoder.flops(c, 40)
    whole = compiled_flops(c, 40, monkeypatch)
    rest = compiled_flops(c, 40, monkeypatch, attend=False)
    assert rest == pytest.approx(ours["projections"], rel=0.05)
    assert whole - rest == pytest.approx(ours["attention"] * 2 * 160 / 161, rel=0.1)


def test_config_checks_itself():
    with pytest.raises(ValueError, match=r"model\.separator is true: only the encoder-decoder"):
        dataclasses.replace(CONFIG, separator=True)
    with pytest.raises(ValueError, match=r"model\.heads = 0"):
        dataclasses.replace(CONFIG, heads=0)
