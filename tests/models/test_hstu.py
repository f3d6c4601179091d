"""HSTU against numbers of the authors' released code, and the variants that must differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.kernels import attention as kernel
from recscale.kernels import pairs
from recscale.models import hstu
from recscale.tasks import next_item

CONFIG = hstu.Config(
    embed_dim=6, width=6, depth=2, heads=2, qk_dim=3, v_dim=4, max_length=5, output_length=1, dropout=0.0,
    time_bias=True, query_time="next_event", dtype="float32",
)  # fmt: skip
TASK = next_item.Config(
    loss="sampled", negatives=3, sampler="uniform", shared="token", logq="none", similarity="cosine", temperature=0.05,
    gbce_t=0.0,
)  # fmt: skip
# Encoder outputs of the released code, float32, before the L2 norm: user 0 has four inputs, user 1 two.
GOLDEN = np.array(
    [
        [-0.184508, 1.201055, 2.014602, 1.893044, 0.907525, -0.476315],
        [-1.819543, -1.367291, -0.295992, 0.906303, 1.693622, 1.710102],
        [-1.040738, -0.406674, 0.401725, 1.016726, 1.163555, 0.783134],
        [0.306571, 1.044950, 1.280953, 0.911709, 0.120265, -0.714730],
        [-0.859495, -0.748385, -0.305079, 0.280938, 0.753408, 0.901134],
        [-0.633057, -0.605909, -0.300905, 0.138005, 0.507312, 0.638350],
    ]
)


def fill(shape: tuple[int, ...], phase: float) -> np.ndarray:
    k = np.arange(np.prod(shape))
    return (0.4 * np.sin(0.7 * (k + 1) + phase)).reshape(shape)


def golden_model(config: hstu.Config = CONFIG) -> tuple[hstu.Model, np.ndarray]:
    """The model and item table whose parameters are 0.4 sin(0.7 (k + 1) + phase)."""
    model = jax.eval_shape(lambda: hstu.Model(config, jax.random.key(0)))  # every parameter is set below

    def stacked(shape, offset):
        return np.stack([fill(shape, 1 + offset + 5 * layer) for layer in range(2)]).astype(np.float32)

    model.layers.out_bias = nnx.Param(stacked((6,), 0))
    model.layers.out = nnx.Param(stacked((6, 8), 1).transpose(0, 2, 1))
    model.layers.position_bias = nnx.Param(stacked((13,), 2))
    model.layers.time_bias = nnx.Param(stacked((129,), 3))
    model.layers.uvqk = nnx.Param(stacked((6, 28), 4))
    model.positions = nnx.Param(fill((7, 6), 11).astype(np.float32))
    table = fill((10, 6), 0)
    table[0] = 0.0
    return model, table.astype(np.float32)


def golden_batch(packed: bool) -> dict[str, jax.Array]:
    """Two users in two padded rows of five, or packed into one row of six."""
    users = [([3, 7, 1, 9, 2], [100, 160, 4000, 90000, 90005]), ([5, 4, 8], [10, 11, 2000000])]
    rows = []
    for place, (ids, times) in enumerate(users):
        k = len(ids) - 1
        segment = place + 1 if packed else 1
        rows.append(np.stack([ids[:-1], ids[1:], np.full(k, segment), np.arange(k), times[:-1], times[1:]]))
    if packed:
        merged = np.concatenate(rows, axis=1)[:, None]
    else:
        merged = np.stack([np.pad(row, [(0, 0), (0, 5 - row.shape[1])]) for row in rows], axis=1)
    names = ("item_id", "target", "segment_ids", "positions", "timestamp", "query_timestamp")
    return {name: jnp.asarray(values, jnp.int32) for name, values in zip(names, merged, strict=True)}


def forward(model, x, batch):
    return model(x, batch)


QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
FORWARD = jax.jit(forward, compiler_options=QUICK)


def outputs(model, table, packed=False, batch=None, run=FORWARD) -> np.ndarray:
    batch = batch or golden_batch(packed)
    hidden = np.asarray(run(model, table[np.asarray(batch["item_id"])], batch))
    return hidden[np.asarray(batch["segment_ids"]) > 0]


@pytest.mark.parametrize("packed", [False, True])
def test_encoder_equals_the_released_code(packed):
    model, table = golden_model()
    np.testing.assert_allclose(outputs(model, table, packed), GOLDEN, atol=2e-6)


def test_last_event_query_time():
    model, table = golden_model(dataclasses.replace(CONFIG, query_time="last_event"))
    expected = [1.774417627, 2.383918246, 1.890021640, 0.517488522, -1.100293879, -2.213756021]
    np.testing.assert_allclose(outputs(model, table)[3], expected, atol=2e-6)


def test_loss_equals_the_released_code():
    model, table = golden_model()
    task = next_item.Task(TASK, num_items=9)
    batch = golden_batch(packed=False)
    negatives = np.zeros((2, 5, 3), np.int32)
    negatives[0, :4] = [(7, 1, 8), (1, 2, 3), (9, 9, 4), (2, 6, 6)]
    negatives[1, :2] = [(4, 5, 1), (8, 3, 7)]

    def losses(model, table, batch):
        rows = {name: table[ids] for name, (_, ids) in task.wanted(batch).items()}
        query = task._query(model, rows, batch, None)
        return task._sampled(query, rows, batch), task.loss(model, rows, batch, jax.random.key(0))

    with_negatives = batch | {"negative": jnp.asarray(negatives)}
    per_token, (loss, metrics) = jax.jit(losses, compiler_options=QUICK)(model, table, with_negatives)
    expected = [0.286616131, 0.0, 28.950268803, 33.220018494, 0.786081147, 17.732234683]
    np.testing.assert_allclose(np.asarray(per_token)[np.asarray(batch["target"]) > 0], expected, atol=2e-5)
    assert float(loss) == pytest.approx(13.495869876214, abs=2e-5)
    assert float(metrics["targets"]) == 6


VARIANTS = {
    "n = L": 0.062,
    "1/sqrt(d)": 0.864,
    "no position bias": 1.03,
    "no time bias": 2.34,
    "flipped position index": 0.839,
    "eps 1e-5": 1.18,
    "time of item i": 2.27,
    "no sqrt(D)": 3.20,
    "split U,Q,K,V": 1.89,
    "split U,V,K,Q": 1.99,
    "log2 buckets": 1.06,
    "log10 buckets": 1.75,
    "no SiLU on the projection": 2.05,
    "per-head LN": 2.14,
    "n = true length": 0.116,
}


def variant_outputs(name, monkeypatch) -> np.ndarray:
    """Outputs of the model with one published slip made on purpose."""
    model, table = golden_model()
    batch = golden_batch(packed=False)
    attention, norm = kernel.attention, hstu.layer_norm

    def reordered(order):
        cuts = {"UQKV": (8, 14, 20), "UVKQ": (8, 16, 22)}[order]
        a, b, c, d = np.split(np.asarray(model.layers.uvqk[...]), cuts, axis=-1)
        new = {"UQKV": (a, d, b, c), "UVKQ": (a, b, d, c)}[order]
        model.layers.uvqk = nnx.Param(np.concatenate(new, axis=-1))

    def buckets(base):
        return lambda d: jnp.clip(
            (jnp.log(jnp.maximum(jnp.abs(d), 1)) / np.log(base) / 0.301).astype(jnp.int32), 0, 128
        )

    def per_row_n(q, k, v, segment_ids, bias, **kwargs):
        lengths = (segment_ids > 0).sum(axis=1)
        return attention(q, k, v, segment_ids, bias, **kwargs) * (kwargs["n"] / lengths)[:, None, None, None]

    def per_head(x, eps):
        if x.shape[-1] != 8:
            return norm(x, eps)
        return norm(x.reshape(*x.shape[:-1], 2, 4), eps).reshape(x.shape)

    changes = {
        "n = L": lambda: monkeypatch.setattr(hstu, "attention", lambda *a, **k: attention(*a, **k) * (k["n"] / 5)),
        "n = true length": lambda: monkeypatch.setattr(hstu, "attention", per_row_n),
        "1/sqrt(d)": lambda: monkeypatch.setattr(
            hstu, "attention", lambda *a, **k: attention(*a, **(k | {"scale": 3**-0.5}))
        ),
        "no position bias": lambda: setattr(model.layers, "position_bias", nnx.Param(np.zeros((2, 13), np.float32))),
        "no time bias": lambda: setattr(model.layers, "time_bias", nnx.Param(np.zeros((2, 129), np.float32))),
        "flipped position index": lambda: setattr(
            model.layers, "position_bias", nnx.Param(model.layers.position_bias[...][:, ::-1])
        ),
        "eps 1e-5": lambda: monkeypatch.setattr(hstu, "EPS", 1e-5),
        "time of item i": lambda: batch.update(query_timestamp=batch["timestamp"]),
        "no sqrt(D)": lambda: None,
        "split U,Q,K,V": lambda: reordered("UQKV"),
        "split U,V,K,Q": lambda: reordered("UVKQ"),
        "log2 buckets": lambda: monkeypatch.setattr(pairs, "time_bucket", buckets(2.0)),
        "log10 buckets": lambda: monkeypatch.setattr(pairs, "time_bucket", buckets(10.0)),
        "no SiLU on the projection": lambda: monkeypatch.setattr(hstu, "_activate", lambda z: z),
        "per-head LN": lambda: monkeypatch.setattr(hstu, "layer_norm", per_head),
    }
    changes[name]()
    if name == "no sqrt(D)":
        table = table / np.sqrt(6.0)
    return outputs(model, table, batch=batch, run=jax.jit(lambda *a: forward(*a), compiler_options=QUICK))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_published_slip_is_caught(name, monkeypatch):
    change = np.abs(variant_outputs(name, monkeypatch) - GOLDEN).max()
    assert change == pytest.approx(VARIANTS[name], rel=0.02)


def random_model(config: hstu.Config) -> hstu.Model:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: hstu.Model(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def in_float64(model: hstu.Model, x: np.ndarray, batch: dict[str, np.ndarray]) -> np.ndarray:
    """HSTU written out: pairs of one user, key not after query."""
    c = model.config
    numbers = jax.tree.map(lambda p: np.asarray(p, np.float64), model)

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    segment, (B, L) = batch["segment_ids"], batch["segment_ids"].shape
    x = x * np.sqrt(c.embed_dim) + numbers.positions[...][batch["positions"]]
    x = x * (segment > 0)[:, :, None]
    if c.embed_dim != c.width:
        x = x @ numbers.up[...]
    seconds = np.abs(batch["query_timestamp"].astype(int)[:, :, None] - batch["timestamp"].astype(int)[:, None, :])
    bucket = (np.log(np.maximum(seconds, 1)) / 0.301).astype(int)
    for layer in range(c.depth):
        weights = {name: getattr(numbers.layers, name)[...][layer] for name in ("uvqk", "out", "out_bias")}
        position, time = numbers.layers.position_bias[...][layer], numbers.layers.time_bias[...][layer]
        gated, keyed = c.heads * c.v_dim, c.heads * c.qk_dim
        u, v, q, k = np.split(silu(norm(x) @ weights["uvqk"]), (gated, 2 * gated, 2 * gated + keyed), axis=-1)
        v, q, k = (a.reshape(B, L, c.heads, -1) for a in (v, q, k))
        o = np.zeros((B, L, c.heads, c.v_dim))
        for b, i, h in np.ndindex(B, L, c.heads):
            for j in range(i + 1):
                if segment[b, i] == segment[b, j] > 0:
                    score = q[b, i, h] @ k[b, j, h] + position[j - i + c.n - 1] + time[bucket[b, i, j]]
                    o[b, i, h] += silu(score) / c.n * v[b, j, h]
        x = x + (u * norm(o.reshape(B, L, gated))) @ weights["out"] + weights["out_bias"]
    return x if c.embed_dim == c.width else x @ numbers.down[...]


@pytest.mark.parametrize(("width", "query_time"), [(6, "next_event"), (8, "last_event")])
def test_value_and_gradient_equal_numpy(width, query_time):
    """On random parameters, with the linear maps that join an item vector to a width of another size."""
    config = dataclasses.replace(CONFIG, width=width, query_time=query_time)
    model, rng = random_model(config), np.random.default_rng(1)
    times = np.cumsum(rng.integers(1, 90_000, (2, 8)), axis=1).astype(np.int32)
    batch = {
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32),
        "positions": np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]], np.int32),
        "timestamp": times[:, :-1],
        "query_timestamp": times[:, 1:],
    }
    plain = batch if query_time == "next_event" else batch | {"query_timestamp": batch["timestamp"]}
    real = batch["segment_ids"] > 0
    x = rng.normal(size=(2, 7, 6)).astype(np.float32)
    weight = (rng.normal(size=(2, 7, 6)) * real[:, :, None]).astype(np.float32)

    def total(model, x):
        hidden = model(x, batch)
        return (weight * hidden).sum(), hidden

    assert (model.up is None) == (width == 6)
    run = jax.jit(jax.value_and_grad(total, argnums=1, has_aux=True), compiler_options=QUICK)
    (_, hidden), grad = run(model, x)
    np.testing.assert_allclose(np.asarray(hidden)[real], in_float64(model, x, plain)[real], atol=2e-5)
    direction = rng.normal(size=x.shape)
    plus, minus = (in_float64(model, x.astype(np.float64) + step * direction, plain) for step in (1e-6, -1e-6))
    slope = (weight * (plus - minus)).sum() / 2e-6
    assert (np.asarray(grad) * direction).sum() == pytest.approx(slope, rel=5e-4)
    assert not np.any(np.asarray(grad)[~real])


def test_time_buckets():
    golden = {0: 0, 1: 0, 2: 2, 5: 5, 60: 13, 600: 21, 3600: 27, 86400: 37, 604800: 44, 2592000: 49, 31536000: 57}
    bucket = jax.jit(kernel.time_bucket)
    got = bucket(np.array(list(golden), np.int32))
    np.testing.assert_array_equal(got, list(golden.values()))
    firsts = [2, 2, 3, 4, 5, 7, 9, 12, 16, 21, 28, 38, 51, 68, 92, 124, 167, 226, 305]
    buckets = np.asarray(bucket(np.arange(400)))
    assert [int(np.argmax(buckets >= k)) for k in range(1, 20)] == firsts
    np.testing.assert_array_equal(bucket(-np.arange(400)), buckets)


@pytest.mark.parametrize(
    ("shape", "layer", "encoder"),
    [((50, 1, 50, 2), 13_100, 26_200), ((50, 2, 25, 8), 13_100, 104_800), ((256, 4, 64, 4), 328_486, 1_313_944)],
)
def test_published_parameter_counts(shape, layer, encoder):
    width, heads, dim, depth = shape
    c = dataclasses.replace(
        CONFIG, embed_dim=width, width=width, heads=heads, qk_dim=dim, v_dim=dim, depth=depth, max_length=200,
        output_length=10,
    )  # fmt: skip
    assert hstu.param_groups(c)["dense"] == encoder == depth * layer
    shapes = jax.eval_shape(lambda: hstu.Model(c, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(hstu.param_groups(c).values())


def test_published_flops():
    c = dataclasses.replace(
        CONFIG, embed_dim=50, width=50, heads=1, qk_dim=50, v_dim=50, depth=2, max_length=200, output_length=10
    )
    flops = hstu.flops(c, 200)
    assert flops["projections"] == pytest.approx(10.0e6, rel=0.005)
    assert flops["attention"] == pytest.approx(8.0e6, rel=0.01)


def test_initial_positions_follow_the_effective_draw():
    c = dataclasses.replace(CONFIG, embed_dim=50, width=50, max_length=200, output_length=10)
    positions = jax.jit(lambda: hstu.Model(c, jax.random.key(3)).positions[...])()
    assert float(np.std(positions)) == pytest.approx(np.sqrt(2 / (211 + 50)), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "model.depth = 0"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"query_time": "now"}, "model.query_time"),
    ],
)
def test_config_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
