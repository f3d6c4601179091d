"""STU against a plain numpy version in float64, its masks, positions and truncation, and its counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recscale.layers.width_transfer import BaseShape
from recscale.models import stu

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
CONFIG = stu.Config(
    embed_dim=6, width=6, depth=2, heads=2, qk_dim=3, v_dim=4, max_length=9, dropout=0.0, time_bias=True,
    anchor="request", window=0, prefix=0, truncate_after=0, truncate_to=0, truncate_row=0, dtype="float32",
)  # fmt: skip
CAUSAL = dataclasses.replace(CONFIG, anchor="event")
LENGTHS = ((5, 7), (9, 2))  # of the users of two rows


def random_model(config: stu.Config, seed: int = 0) -> stu.Model:
    """Every parameter random, norms and biases too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: stu.Model(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def users(targets: int = 0, seed: int = 1) -> list[list[dict[str, np.ndarray]]]:
    """Per row its users: x [l + targets, D] and the batch's columns; candidates share position and time."""
    rng = np.random.default_rng(seed)
    rows = []
    for lengths in LENGTHS:
        row = []
        for length in lengths:
            times = np.cumsum(rng.integers(1, 90_000, length + 1))
            size, last = length + targets, np.full(targets, times[-1])
            positions = np.minimum(np.arange(size), length)
            row.append(
                {
                    "x": rng.normal(size=(size, 6)),
                    "positions": positions,
                    "timestamp": np.concatenate([times[:-1], last]),
                    "query_timestamp": np.concatenate([times[1:], last]),
                    "targets": np.arange(size) >= length,
                }
            )
        rows.append(row)
    return rows


def packed(rows: list[list[dict[str, np.ndarray]]], spare: int = 1, targets: bool = False):
    """x [B, L, D], the batch, and which slots are real."""
    length = max(sum(len(user["x"]) for user in row) for row in rows) + spare
    x = np.zeros((len(rows), length, 6), np.float32)
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("positions", "timestamp", "query_timestamp")}
    batch |= {"segment_ids": np.zeros((len(rows), length), np.int32)}
    batch |= {"targets": np.zeros((len(rows), length), bool)} if targets else {}
    for b, row in enumerate(rows):
        begin = 0
        for segment, user in enumerate(row, 1):
            part = slice(begin, begin + len(user["x"]))
            x[b, part] = user["x"]
            for name in batch:
                batch[name][b, part] = segment if name == "segment_ids" else user[name]
            begin = part.stop
    return x, batch, batch["segment_ids"] > 0


RUN = jax.jit(lambda model, x, batch: model(x, batch), compiler_options=QUICK)


def hidden(model: stu.Model, x, batch) -> np.ndarray:
    return np.asarray(RUN(model, x, batch))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def attended(c: stu.Config, q: np.ndarray, k: np.ndarray, v: np.ndarray, target: np.ndarray) -> np.ndarray:
    o = np.zeros(v.shape)
    for i, j in np.ndindex(len(q), len(q)):
        sees = j <= i or max(i, j) < c.prefix
        sees &= not c.window or i - j < c.window or j < c.prefix
        if sees and (not target[j] or i == j):
            o[i] += (silu((q[i] * k[j]).sum(-1) / np.sqrt(c.qk_dim)) / c.max_length)[:, None] * v[j]
    return o


def in_float64(model: stu.Model, user: dict[str, np.ndarray], x: np.ndarray | None = None) -> np.ndarray:
    """STU written out for one user, pair by pair."""
    c = model.config
    w = jax.tree.map(lambda p: np.asarray(p, np.float64), model)
    layers = w.layers
    target, events = user["targets"], int((~user["targets"]).sum())
    x = (user["x"] if x is None else x) * np.sqrt(c.embed_dim)
    rows = []
    for i in range(len(x)):
        if c.anchor == "event":
            rows.append(user["positions"][i])
        else:
            rows.append(i if i < c.prefix else max(events - i, 0) + c.prefix)
    x = x + w.positions[...][rows]
    if c.time_bias:
        until = user["query_timestamp"] if c.anchor == "event" else user["query_timestamp"][-1]
        x = x + w.times[...][np.sqrt(np.maximum(until - user["timestamp"], 0) / 60).astype(int)]
    if c.embed_dim != c.width:
        x = x @ w.up.kernel[...]

    def norm(n, x, layer):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return scaled * n.scale[...][layer] + n.bias[...][layer]

    gated, keyed = c.heads * c.v_dim, c.heads * c.qk_dim
    alive = np.arange(len(x))
    for layer in range(c.depth):
        if layer == c.truncate_after > 0:
            alive = np.array([i for i in alive if events - i <= c.truncate_to or i < c.prefix])
        z = norm(layers.norm_in, x[alive], layer) @ layers.uvqk.kernel[...][layer] + layers.uvqk.bias[...][layer]
        u, v, q, k = np.split(z, (gated, 2 * gated, 2 * gated + keyed), axis=-1)
        o = attended(c, *(a.reshape(len(alive), c.heads, -1) for a in (q, k, v)), target[alive])
        o = o.reshape(len(alive), gated)
        gate = np.concatenate([silu(u), o, silu(u) * norm(layers.norm_out, o, layer)], axis=-1)
        x = x.copy()
        x[alive] += gate @ layers.out.kernel[...][layer]
    return x if c.embed_dim == c.width else x @ w.down.kernel[...]


VARIANTS = {
    "as released": ({}, 0),
    "three candidates": ({}, 3),
    "causal, wider": ({"anchor": "event", "width": 8}, 3),
    "window": ({"window": 3}, 1),
    "prefix and window": ({"prefix": 2, "window": 3, "time_bias": False}, 2),
    "truncated": ({"truncate_after": 1, "truncate_to": 3}, 2),
    "truncated, with a prefix": ({"truncate_after": 1, "truncate_to": 2, "prefix": 2, "depth": 3}, 2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradient_equal_numpy(name):
    change, targets = VARIANTS[name]
    config = dataclasses.replace(CONFIG, **change)
    model, rows = random_model(config), users(targets)
    x, batch, real = packed(rows, targets=targets > 0)
    rng = np.random.default_rng(2)
    weight = (rng.normal(size=x.shape) * real[:, :, None]).astype(np.float32)

    def total(model, x):
        hidden = model(x, batch)
        return jnp.where(real[:, :, None], weight * hidden, 0.0).sum(), hidden

    run = jax.jit(jax.value_and_grad(total, argnums=1, has_aux=True), compiler_options=QUICK)
    (_, got), grad = run(model, x)
    expected = np.concatenate([in_float64(model, user) for row in rows for user in row])
    np.testing.assert_allclose(np.asarray(got)[real], expected, atol=3e-5)
    direction = rng.normal(size=x.shape)
    pieces = np.split(direction[real], np.cumsum([len(u["x"]) for row in rows for u in row])[:-1])

    def value(step):
        flat = [user for row in rows for user in row]
        return np.concatenate([in_float64(model, u, u["x"] + step * d) for u, d in zip(flat, pieces, strict=True)])

    slope = (weight[real] * (value(1e-6) - value(-1e-6))).sum() / 2e-6
    assert (np.asarray(grad) * direction).sum() == pytest.approx(slope, rel=1e-3)
    assert not np.any(np.asarray(grad)[~real])


def test_the_future_never_shows():
    """Anchor "event": cutting a history changes nothing before the cut. "request": only items of the future are unseen,
    for how many follow and when the request comes is told to every event, as released."""
    for config in (CAUSAL, CONFIG):
        model = random_model(config)
        x, batch, _ = packed([[users()[0][1]]], spare=0)
        whole = hidden(model, x, batch)
        changed = x.copy()
        changed[:, 4:] += 1.0
        np.testing.assert_array_equal(hidden(model, changed, batch)[:, :4], whole[:, :4])
        assert np.all(hidden(model, changed, batch)[:, 4:] != whole[:, 4:])
        cut = {name: values[:, :4] for name, values in batch.items()}
        if config is CAUSAL:
            np.testing.assert_allclose(hidden(model, x[:, :4], cut), whole[:, :4], atol=1e-6)
        else:
            assert np.all(np.abs(hidden(model, x[:, :4], cut) - whole[:, :4]).max(axis=-1) > 1e-3)


def test_candidates_do_not_see_each_other():
    model = random_model(CONFIG)
    x, batch, _ = packed(users(3), targets=True)
    whole = hidden(model, x, batch)
    changed = x.copy()
    changed[0, 5] += 1.0  # first candidate of the first user
    differs = np.any(hidden(model, changed, batch) != whole, axis=-1)
    assert np.argwhere(differs).tolist() == [[0, 5]]
    swapped = x.copy()
    swapped[0, [5, 6, 7]] = x[0, [7, 5, 6]]
    np.testing.assert_allclose(hidden(model, swapped, batch)[0, [5, 6, 7]], whole[0, [7, 5, 6]], atol=1e-6)


@pytest.mark.parametrize("change", [{}, {"truncate_after": 1, "truncate_to": 3}])
def test_packed_rows_equal_one_user_a_row(change):
    config = dataclasses.replace(CONFIG, **change)
    model, rows = random_model(config), users(2)
    x, batch, real = packed(rows, targets=True)
    alone_x, alone, alone_real = packed([[user] for row in rows for user in row], targets=True)
    together = hidden(model, x, batch)[real]
    np.testing.assert_allclose(together, hidden(model, alone_x, alone)[alone_real], atol=2e-5)
    if change:  # one user a row: few slots are enough, too few are seen
        short = random_model(dataclasses.replace(config, truncate_row=5))
        np.testing.assert_allclose(together, hidden(short, alone_x, alone)[alone_real], atol=2e-5)
        assert np.isnan(hidden(short, x, batch)).any()


def forward_flops(config: stu.Config, length: int, monkeypatch, attend: bool = True) -> float:
    """FLOPs as XLA counts them before optimising; attend=False puts the values in attention's place."""
    if not attend:
        monkeypatch.setattr(stu, "attention", lambda q, k, v, *args, **more: v)
    model = jax.eval_shape(lambda: stu.Model(config, jax.random.key(0)))
    batch = {name: jnp.ones((1, length), jnp.int32) for name in ("segment_ids", "positions")}
    x = jnp.zeros((1, length, config.embed_dim))
    return jax.jit(lambda m, x: m(x, batch)).lower(model, x).cost_analysis()["flops"]


def test_flops_agree_with_the_compiler(monkeypatch):
    """One layer (a scanned body is counted once): projections, and attention of the full square of one block."""
    length = 48
    config = dataclasses.replace(
        CONFIG, embed_dim=256, width=256, heads=2, qk_dim=128, v_dim=64, depth=1, max_length=48, time_bias=False
    )
    ours = stu.flops(config, length)
    whole = forward_flops(config, length, monkeypatch)
    rest = forward_flops(config, length, monkeypatch, attend=False)
    assert rest == pytest.approx(ours["projections"], rel=0.1)
    assert whole - rest == pytest.approx(ours["attention"] * 2 * length / (length + 1), rel=0.1)
    below = dataclasses.replace(config, depth=2, truncate_after=1, truncate_to=12, truncate_row=12)
    shorter = forward_flops(below, length, monkeypatch, attend=False)  # a layer of 48 events and one of 12
    assert shorter == pytest.approx(stu.flops(below, length)["projections"], rel=0.1)
    assert stu.flops(below, length)["projections"] == pytest.approx(1.25 * ours["projections"])


def test_pairs_are_those_of_the_mask():
    for window, prefix, length in [(0, 0, 9), (3, 0, 9), (3, 2, 9), (0, 4, 9), (2, 5, 3)]:
        config = dataclasses.replace(CONFIG, window=window, prefix=prefix, depth=1)
        i, j = np.indices((length, length))
        sees = (j <= i) | (np.maximum(i, j) < prefix)
        sees &= (window == 0) | (i - j < window) | (j < prefix)
        assert stu.flops(config, length)["attention"] == 2 * 14 * sees.sum()


@pytest.mark.parametrize("change", [{}, {"width": 8}, {"time_bias": False, "prefix": 3}, {"depth": 4, "qk_dim": 5}])
def test_parameter_counts(change):
    c = dataclasses.replace(CONFIG, **change)
    shapes = jax.eval_shape(lambda: stu.Model(c, jax.random.key(0)))
    groups = stu.param_groups(c)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(groups.values())
    tables = shapes.positions.size + (shapes.times.size if c.time_bias else 0)
    assert groups["positions"] == tables


def test_width_factors_name_parameters_of_the_model():
    c = dataclasses.replace(CONFIG, width=12, base=BaseShape(width=6, embed_dim=6, head_dim=3))
    paths = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: stu.Model(c, jax.random.key(0))))
    names = {jax.tree_util.keystr(p, simple=True, separator=".").removesuffix(".value") for p, _ in paths}
    assert set(stu.width_factors(c)) <= names and "layers.uvqk.kernel" in stu.width_factors(c)
    assert not stu.width_factors(CONFIG)
    same = dataclasses.replace(CONFIG, base=BaseShape(width=6, embed_dim=6, head_dim=3))
    x, batch, real = packed(users())
    at_base = hidden(random_model(same), x, batch)
    np.testing.assert_array_equal(at_base[real], hidden(random_model(CONFIG), x, batch)[real])


def test_learns_what_32_users_do_next():
    """Next of 20 items by softmax, causal anchor: the loss falls to a tenth."""
    config = dataclasses.replace(CAUSAL, embed_dim=32, width=32, qk_dim=8, v_dim=8, max_length=8, depth=1)
    rng = np.random.default_rng(0)
    items = rng.integers(0, 20, (32, 9))
    times = np.cumsum(rng.integers(1, 9000, (32, 9)), axis=1).astype(np.int32)
    batch = {"segment_ids": np.ones((32, 8), np.int32), "positions": np.tile(np.arange(8, dtype=np.int32), (32, 1))}
    batch |= {"timestamp": times[:, :-1], "query_timestamp": times[:, 1:]}
    model = stu.Model(config, jax.random.key(0))
    state = (model, jnp.asarray(0.1 * rng.normal(size=(20, 32)), jnp.float32))
    optimizer = optax.adam(1e-2)

    def loss(state):
        model, table = state
        logits = model(table[items[:, :-1]], batch) @ table.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, items[:, 1:]).mean()

    @jax.jit
    def train(state, slots):
        def step(carry, _):
            state, slots = carry
            value, grads = jax.value_and_grad(loss)(state)
            updates, slots = optimizer.update(grads, slots)
            return (optax.apply_updates(state, updates), slots), value

        return jax.lax.scan(step, (state, slots), None, 200)[1]

    losses = np.asarray(train(state, optimizer.init(state)))
    assert losses[0] == pytest.approx(np.log(20), rel=0.3) and losses[-20:].mean() < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "model.depth = 0"),
        ({"window": -1}, "model.window = -1"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"anchor": "now"}, "model.anchor = 'now'"),
        ({"truncate_to": 3}, "model.truncate_after = 0, model.truncate_to = 3"),
        ({"truncate_after": 2, "truncate_to": 3}, "truncate_after < depth = 2"),
        ({"truncate_after": 1, "truncate_to": 3, "truncate_row": 2}, "model.truncate_row = 2"),
    ],
)
def test_config_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
