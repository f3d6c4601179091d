"""DreamRec's encoder against its ten padded slots written out in float64: values, gradients, packing, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers.width_transfer import BaseShape
from recscale.models import MODELS, dreamrec

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
CONFIG = dreamrec.Config(embed_dim=6, max_length=10, dropout=0.0, dtype="float32")
ITEMS, SLOTS = 30, 10
HISTORIES = [[5, 3, 9, 5], [1], [7, 7, 2, 11, 29, 0, 4, 18, 6, 12], [20, 21, 8]]  # items count from 0 here
LENGTHS = [len(items) for items in HISTORIES]
BATCH = {  # the four in two packed rows
    "item_id": np.array([[1] * 5 + [0] * 9, [1] * 13 + [0]], np.int32),
    "segment_ids": np.array([[1] * 4 + [2] + [0] * 9, [1] * 10 + [2] * 3 + [0]], np.int32),
    "positions": np.array([[*range(4), 0, *[0] * 9], [*range(10), *range(3), 0]], np.int32),
}
REAL = BATCH["segment_ids"] > 0
PLACES = [(0, 0), (0, 4), (1, 0), (1, 10)]  # row and first slot of each history
MASK = -(2.0**32) + 1
RUN = jax.jit(lambda model, x, batch: model(x, batch), compiler_options=QUICK)


def random_model(config=CONFIG, seed=0) -> dreamrec.Model:
    """Every parameter random, norms and biases too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: dreamrec.Model(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.7 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def table(seed=1) -> np.ndarray:
    """Vectors of the items and, last, of padding, which is no zero."""
    return np.random.default_rng(seed).normal(size=(ITEMS + 1, CONFIG.embed_dim)).astype(np.float32)


def packed(items_VD: np.ndarray) -> np.ndarray:
    x = np.broadcast_to(items_VD[-1], (*REAL.shape, items_VD.shape[1])).copy()
    for (row, first), items in zip(PLACES, HISTORIES, strict=True):
        x[row, first : first + len(items)] = items_VD[items]
    return x


def slots_of(model: dreamrec.Model, items_VD: np.ndarray, history: list[int], slip: str = "") -> np.ndarray:
    """What the reference computes of one history, left-aligned in ten slots: h. slip: one thing done otherwise."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), model)

    def norm(n, x):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * n.scale[...] + n.bias[...]

    def linear(m, x):
        return x @ m.kernel[...] + m.bias[...]

    ids = np.array([*history, *[ITEMS] * (SLOTS - len(history))])
    m = (ids != ITEMS)[:, None].astype(float)
    s = (items_VD.astype(np.float64)[ids] + p.positions[...]) * m
    normal = norm(p.norm_queries, s)
    keys = normal if slip == "keys normalised" else s
    logits = linear(p.query, normal) @ linear(p.key, keys).T / np.sqrt(CONFIG.embed_dim / (2 if slip == "scale" else 1))
    if slip != "no masks":
        logits = np.where((s.sum(-1) == 0.0)[None, :] | ~np.tri(SLOTS, dtype=bool), MASK, logits)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    a = weights / weights.sum(-1, keepdims=True) @ linear(p.value, s) + (s if slip == "residual" else normal)
    y = norm(p.norm_ffn, a)
    f = linear(p.ffn_out, np.maximum(linear(p.ffn_in, y), 0.0))
    f = norm(p.norm_out, f if slip == "no residual in the feed-forward" else f + y)
    f = norm(p.norm, f * (np.ones_like(m) if slip == "no f * m" else m))
    return f[max(len(history), 1) - 1]


def every_prefix(model, items_VD, slip="") -> np.ndarray:
    """h of every history up to every event, at the slot of the event in the packed rows; 0 in padding."""
    out = np.zeros((*REAL.shape, CONFIG.embed_dim))
    for (row, first), items in zip(PLACES, HISTORIES, strict=True):
        for t in range(len(items)):
            out[row, first + t] = slots_of(model, items_VD, items[: t + 1], slip)
    return out


def ten_slots(items_VD: np.ndarray, histories) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The histories unpacked: a row of ten slots each, padded on the right."""
    ids = np.array([[*items, *[ITEMS] * (SLOTS - len(items))] for items in histories])
    positions = np.broadcast_to(np.arange(SLOTS, dtype=np.int32), ids.shape)
    return items_VD[ids], {
        "item_id": (ids != ITEMS).astype(np.int32),
        "segment_ids": (ids != ITEMS).astype(np.int32),
        "positions": positions,
    }


def test_packed_rows_equal_the_ten_slots_of_every_prefix():
    model, items = random_model(), table()
    found = RUN(model, packed(items), BATCH)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found)[REAL], every_prefix(model, items)[REAL], atol=3e-5)


SLIPS = ["keys normalised", "scale", "no masks", "residual", "no residual in the feed-forward"]


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_seen(slip):
    model, items = random_model(), table()
    found = np.asarray(RUN(model, packed(items), BATCH))
    assert np.abs(found - every_prefix(model, items, slip))[REAL].max() > 1e-2


def test_unpacked_rows_of_every_length_and_none_equal_the_reference():
    model, items = random_model(), table()
    histories = [*HISTORIES, [], [2, 4], [3] * 9]
    x, batch = ten_slots(items, histories)
    found = np.asarray(RUN(model, x, batch))
    last = [max(len(h), 1) - 1 for h in histories]
    expected = [slots_of(model, items, h) for h in histories]
    np.testing.assert_allclose(found[np.arange(len(histories)), last], expected, atol=3e-5)
    assert np.abs(found[4, 0] - slots_of(model, items, [], "no f * m")).max() > 1e-2
    again = np.asarray(RUN(model, packed(items), BATCH))
    for n, (row, first) in enumerate(PLACES):
        length = LENGTHS[n]
        np.testing.assert_allclose(again[row, first : first + length], found[n, :length], atol=2e-6)


def test_an_empty_history_gives_the_bias_of_the_last_norm():
    model, items = random_model(), table()
    np.testing.assert_array_equal(model.empty(), model.norm.bias[...])
    np.testing.assert_allclose(slots_of(model, items, []), model.empty(), atol=1e-6)
    found = np.asarray(RUN(model, packed(items), BATCH))
    np.testing.assert_array_equal(found[~REAL], np.broadcast_to(model.empty(), found[~REAL].shape))


def test_a_key_that_sums_to_zero_is_masked():
    """The second event is the negative of its position: the third sees the first, itself, and no more."""
    model, items = random_model(), table()
    items[4] = -np.asarray(model.positions[...])[1]
    x, batch = ten_slots(items, [[9, 4, 2], [4]])
    found = np.asarray(RUN(model, x, batch))
    np.testing.assert_allclose(found[0, 2], slots_of(model, items, [9, 4, 2]), atol=3e-5)
    items[4] += 1e-3
    near, _ = ten_slots(items, [[9, 4, 2], [4]])
    assert np.abs(np.asarray(RUN(model, near, batch))[0, 2] - found[0, 2]).max() > 1e-4
    nothing = np.broadcast_to(-np.asarray(model.positions[...]), x.shape)  # every key sums to zero
    assert np.isfinite(RUN(model, nothing, batch)).all()


def test_nothing_later_and_no_other_segment_is_seen():
    """Gradients, exact, and finite everywhere, padding included."""
    model, x = random_model(), packed(table())
    weight = np.random.default_rng(3).normal(size=CONFIG.embed_dim).astype(np.float32)

    def value(x, model, row, slot):
        return model(x, BATCH)[row, slot] @ weight

    gradient = jax.jit(jax.grad(value), compiler_options=QUICK)
    for row, slot, first in ((0, 2, 0), (0, 4, 4), (1, 5, 0), (1, 11, 10), (1, 13, 14)):
        found = np.asarray(gradient(x, model, row, slot))
        assert np.isfinite(found).all()
        touched = np.zeros(REAL.shape, bool)
        touched[row, first : slot + 1] = True
        np.testing.assert_array_equal(np.any(found != 0.0, axis=-1), touched)


def test_gradients_equal_those_of_the_reference():
    model, items = random_model(), table()
    weight = np.random.default_rng(2).normal(size=(*REAL.shape, CONFIG.embed_dim)) * REAL[:, :, None]

    def total(model, x):
        return (weight.astype(np.float32) * model(x, BATCH)).sum()

    of_model, of_x = jax.jit(jax.grad(total, argnums=(0, 1)), compiler_options=QUICK)(model, packed(items))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((of_model, of_x)))
    in64 = jax.tree.map(lambda p: np.asarray(p, np.float64), model)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        way = jax.tree.map(lambda p, rng=rng: rng.normal(size=p.shape), in64)
        way_items = np.vstack([rng.normal(size=(ITEMS, CONFIG.embed_dim)), np.zeros((1, CONFIG.embed_dim))])
        way_x = packed(way_items)
        ends = []
        for step in (1e-6, -1e-6):
            moved = jax.tree.map(lambda p, d, step=step: p + step * d, in64, way)
            ends.append((weight * every_prefix(moved, items.astype(np.float64) + step * way_items)).sum())
        slope = (ends[0] - ends[1]) / 2e-6
        ours = (np.asarray(of_x) * way_x).sum()
        ours += sum((np.asarray(g) * d).sum() for g, d in zip(*map(jax.tree.leaves, (of_model, way)), strict=True))
        assert ours == pytest.approx(slope, rel=5e-4)


def test_dropout_falls_on_events_weights_and_the_feed_forward(monkeypatch):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    model, x = random_model(config), packed(table())
    run = jax.jit(lambda model, x, key: model(x, BATCH, key), compiler_options=QUICK)
    first = np.asarray(run(model, x, jax.random.key(0)))
    np.testing.assert_array_equal(first, run(model, x, jax.random.key(0)))
    assert np.any(first != np.asarray(run(model, x, jax.random.key(1))))
    np.testing.assert_array_equal(first[~REAL], np.broadcast_to(model.empty(), first[~REAL].shape))
    seen = []
    monkeypatch.setattr(dreamrec, "dropout", lambda x, rate, key: seen.append((x.shape, rate)) or x)
    jax.eval_shape(lambda model, x: model(x, BATCH, jax.random.key(0)), model, x)
    assert seen == [(x.shape, 0.5), ((2, 14, 14), 0.5), (x.shape, 0.5)]


def test_bfloat16_is_close_and_returns_float32():
    model, items = random_model(dataclasses.replace(CONFIG, dtype="bfloat16")), table()
    found = RUN(model, packed(items), BATCH)
    assert found.dtype == jnp.float32
    assert np.abs(np.asarray(found) - every_prefix(model, items))[REAL].mean() < 0.05


def test_parameters_begin_as_in_the_reference():
    """Linear maps uniform up to 1 / sqrt(fan_in), biases too; positions standard normal; norms the identity."""
    c = dataclasses.replace(CONFIG, embed_dim=64)
    model = dreamrec.Model(c, jax.random.key(3))
    for layer in (model.query, model.key, model.value, model.ffn_in, model.ffn_out):
        kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        assert max(np.abs(kernel).max(), np.abs(bias).max()) <= 1 / 8
        assert kernel.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
        assert bias.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.3)
    assert np.asarray(model.positions[...]).std() == pytest.approx(1.0, rel=0.1)
    assert dreamrec.ITEM_DEVIATION == 1.0
    np.testing.assert_array_equal(model.empty(), np.zeros(64))


@pytest.mark.parametrize("change", [{}, {"embed_dim": 64}, {"max_length": 50}])
def test_parameter_counts(change):
    c = dataclasses.replace(CONFIG, **change)
    shapes = jax.eval_shape(lambda: dreamrec.Model(c, jax.random.key(0)))
    groups = dreamrec.param_groups(c)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(groups.values())
    assert groups["positions"] == c.max_length * c.embed_dim
    assert dreamrec.width_factors(c) == {}
    assert MODELS["dreamrec"] is dreamrec


def test_flops_agree_with_the_compiler():
    """Within 10 %; the compiler sees all L * L pairs, `flops` the causal half."""
    width, length = 256, 48
    c = dataclasses.replace(CONFIG, embed_dim=width, max_length=length)
    batch = {
        "item_id": np.ones((1, length), np.int32),
        "segment_ids": np.ones((1, length), np.int32),
        "positions": np.arange(length, dtype=np.int32)[None],
    }
    model = jax.eval_shape(lambda: dreamrec.Model(c, jax.random.key(0)))
    lowered = jax.jit(lambda m, x: m(x, batch)).lower(model, jnp.zeros((1, length, width)))
    ours = dreamrec.flops(c, length)
    expected = ours["projections"] + ours["attention"] * 2 * length / (length + 1)
    assert lowered.cost_analysis()["flops"] == pytest.approx(expected, rel=0.1)
    assert ours["projections"] == 2 * length * 5 * width**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 0}, "model.embed_dim = 0"),
        ({"max_length": -1}, "model.max_length = -1"),
        ({"dropout": 1.0}, "model.dropout = 1.0"),
        ({"prefix": 2}, "model.prefix = 2"),
        ({"base": BaseShape(8, 8, 8)}, "no width transfer: set optim.parametrisation"),
    ],
)
def test_config_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
    with pytest.raises(TypeError, match="unexpected keyword"):
        dreamrec.Config(**dataclasses.asdict(CONFIG), blocks=2)
