"""Softmax over the whole catalogue, in chunks and on meshes, against logsumexp over vectors by id."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import hlo
from recscale.layers import softmax
from recscale.layers.kinds import Table
from recscale.layers.norms import l2_normalize
from recscale.layers.tables import Tables
from recscale.mesh import AXES, make_mesh

IDS, D, T = 300, 8, 24
TABLES = {
    "full": Table(IDS, D),
    "hashed": Table(IDS, D, "hashed", rows=40, parts=2),
    "low_rank": Table(IDS, D, "low_rank", inner=5),
    "pq": Table(IDS, D, "pq", parts=4),
    "multi": Table(IDS, D, "multi", parts=2, inner=4),
    "capped": Table(IDS, D, "capped", rows=30),
    "pieces": Table(IDS, D, "pieces", rows=50, parts=3),
}
MESHES = {"1x1x1": (1, 1, 1), "1x8x1": (1, 8, 1), "1x2x4": (1, 2, 4)}
CASES = [("full", "1x1x1", "dot"), ("full", "1x8x1", "cosine"), ("hashed", "1x2x4", "dot")]
RARER = [("full", "1x1x1", "cosine"), ("full", "1x2x4", "dot"), ("hashed", "1x1x1", "dot"), ("pq", "1x1x1", "dot")]
RARER += [("low_rank", "1x2x4", "dot"), ("pq", "1x2x4", "cosine"), ("multi", "1x2x4", "cosine")]
RARER += [("capped", "1x8x1", "dot"), ("pieces", "1x8x1", "dot")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in RARER]


class Task(NamedTuple):
    """What catalogue_softmax asks of a task."""

    item: Callable[[jax.Array], jax.Array]
    catalogue: str = "item"


TASKS = {"dot": Task(lambda x: x), "cosine": Task(lambda x: 20.0 * l2_normalize(x))}


def codes_of(spec: Table) -> np.ndarray | None:
    """Codes [IDS + 1, Q] by id; None for kinds without."""
    if not spec.num_codes:
        return None
    low, high = {"capped": (1, spec.rows + 1), "pieces": (0, spec.rows + 1)}.get(spec.kind, (0, 256))
    return np.random.default_rng(5).integers(low, high, (IDS + 1, spec.num_codes))


def problem(kind: str) -> tuple[Table, dict[str, np.ndarray], dict, np.ndarray, np.ndarray, np.ndarray]:
    """A table, the values of its arrays by slot, its mixer, queries, targets (some 0), and what losses weigh."""
    rng, spec = np.random.default_rng(0), TABLES[kind]
    values = {}
    for part, array in spec.arrays().items():
        if part != "codes":
            values[part] = rng.normal(size=(array.num_rows + 1, array.dim)).astype(np.float32)
            values[part][0] = 0.0
    query = rng.normal(size=(T, D)).astype(np.float32)
    target = rng.integers(1, IDS + 1, T).astype(np.int32)
    target[:3] = 0, 1, IDS
    return spec, values, spec.mixer(jax.random.key(7)), query, target, rng.normal(size=T).astype(np.float32)


def plain(spec: Table, task: Task, values, mixer, query, target) -> jax.Array:
    """-log p(target), from all scores at once."""
    ids, codes = jnp.arange(1, IDS + 1), codes_of(spec)
    slots = spec.slots(ids, None if codes is None else jnp.asarray(codes[1:]))
    vectors = task.item(spec.compose({part: x[slots.get(part, ids)] for part, x in values.items()}, mixer))
    scores = query @ vectors.T
    positive = jnp.take_along_axis(scores, jnp.maximum(target - 1, 0)[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scores, axis=1) - jnp.where(target > 0, positive, 0.0)


@pytest.mark.parametrize(("kind", "mesh", "score"), CASES)
def test_values_and_gradients_are_those_of_all_scores_at_once(kind, mesh, score, monkeypatch):
    monkeypatch.setattr(softmax, "SCORES_AT_ONCE", 1)  # chunks of 128 items, the least
    spec, values, mixer, query, target, weight = problem(kind)
    tables, task = Tables({"item": spec}, make_mesh(*MESHES[mesh])), TASKS[score]
    chunks = len(softmax.Sweep(tables, task, T).starts)
    assert chunks == (3 if mesh == "1x1x1" else 1)
    arrays, fixed = {}, {}
    for part, name in tables.parts("item").items():
        by_slot = codes_of(spec) if part == "codes" else values[part]
        placed = jax.device_put(tables.arrays[name].place(by_slot), tables.sharding(name))
        (fixed if part == "codes" else arrays)[name] = placed

    @jax.jit
    def sharded(arrays, mixer, query):
        nats = softmax.catalogue_softmax(tables, task, arrays | fixed, {"item": mixer}, query, target)
        return (nats * weight).sum(), nats

    def expected(values, mixer, query):
        nats = plain(spec, task, values, mixer, query, target)
        return (nats * weight).sum(), nats

    (grads, mixer_grad, query_grad), nats = jax.grad(sharded, argnums=(0, 1, 2), has_aux=True)(arrays, mixer, query)
    want = jax.jit(jax.grad(expected, argnums=(0, 1, 2), has_aux=True))(values, mixer, query)
    np.testing.assert_allclose(nats, want[1], rtol=1e-5, atol=1e-5)
    for part, by_slot in want[0][0].items():
        name = tables.parts("item")[part]
        layout = tables.arrays[name]
        assert grads[name].shape == arrays[name].shape
        # Under the cosine a gradient is divided by the length of its vector, and rounding with it.
        np.testing.assert_allclose(layout.values(grads[name])[1:], by_slot[1:], rtol=1e-4, atol=1e-4)
        assert np.count_nonzero(np.any(np.asarray(grads[name]) != 0, axis=1)) <= layout.num_rows  # padding has none
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), mixer_grad, want[0][1])
    np.testing.assert_allclose(query_grad, want[0][2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1"])
def test_many_chunks_and_scores_far_apart(mesh, monkeypatch):
    """5,000 ids, so that a device has several chunks; scores in the hundreds, where plain sums of exponentials fail."""
    monkeypatch.setattr(softmax, "SCORES_AT_ONCE", 1)
    rng, spec = np.random.default_rng(0), Table(5000, D)
    tables = Tables({"item": spec}, make_mesh(*MESHES[mesh]))
    assert len(softmax.Sweep(tables, TASKS["dot"], T).starts) == {"1x1x1": 40, "1x8x1": 5}[mesh]
    values = (rng.normal(size=(5001, D)) * 10).astype(np.float32)
    query = (rng.normal(size=(T, D)) * 10).astype(np.float32)
    target = rng.integers(1, 5001, T).astype(np.int32)
    placed, spare = tables.arrays["item"].place(values), np.ones(tables.arrays["item"].size, bool)
    spare[tables.arrays["item"].position(np.arange(1, 5001))] = False
    placed[spare] = 1000.0  # padding is no item, whatever stands there
    arrays = {"item": jax.device_put(placed, tables.sharding("item"))}
    run = jax.jit(lambda a, q: softmax.catalogue_softmax(tables, TASKS["dot"], a, {"item": {}}, q, target))
    scores = query.astype(np.float64) @ values[1:].T.astype(np.float64)
    high = scores.max(axis=1, keepdims=True)
    lse = high[:, 0] + np.log(np.exp(scores - high).sum(axis=1))
    found = run(arrays, query)
    np.testing.assert_allclose(found, lse - scores[np.arange(T), target - 1], rtol=1e-5, atol=2e-3)
    assert lse.max() > 500 and np.asarray(found).min() > -1e-3


def test_probabilities_sum_to_one():
    """-log p of every item of the catalogue under one query."""
    spec, values, mixer, query, _, _ = problem("full")
    tables = Tables({"item": spec}, make_mesh(1, 2, 4))
    arrays = {"item": jax.device_put(tables.arrays["item"].place(values[""]), tables.sharding("item"))}
    target = np.zeros(304, np.int32)
    target[:IDS] = np.arange(1, IDS + 1)
    queries = np.tile(query[:1], (304, 1))
    run = jax.jit(lambda a, q: softmax.catalogue_softmax(tables, TASKS["dot"], a, {"item": mixer}, q, target))
    nats = np.asarray(run(arrays, queries), np.float64)
    assert np.exp(-nats[:IDS]).sum() == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(nats[IDS:], jax.nn.logsumexp(query[:1] @ values[""][1:].T), rtol=1e-6)  # no target


# What the compiled program costs -------------------------------------------------------------------------------------

ROWS, WIDTH, QUERIES = 10**6, 64, 1024


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1)])
def test_scores_exist_a_chunk_at_a_time_and_the_table_stays_where_it_is(shape):
    mesh, task = make_mesh(*shape), TASKS["dot"]
    tables = Tables({"item": Table(ROWS, WIDTH)}, mesh)
    whole = tables.arrays["item"].shape
    batch = NamedSharding(mesh, PartitionSpec(AXES))
    array = jax.ShapeDtypeStruct(whole, jnp.float32, sharding=tables.sharding("item"))
    query = jax.ShapeDtypeStruct((QUERIES, WIDTH), jnp.float32, sharding=batch)
    target = jax.ShapeDtypeStruct((QUERIES,), jnp.int32, sharding=batch)

    def loss(array, query, target):
        return softmax.catalogue_softmax(tables, task, {"item": array}, {"item": {}}, query, target).mean()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, (tables.sharding("item"), batch)))
    program = gradient.lower(array, query, target).compile()
    memory, text = program.memory_analysis(), program.as_text()
    table = math.prod(whole) * 4 // mesh.size
    print(f"mesh {shape}: table {table / 1e6:.0f} MB a device, temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB")
    scores = QUERIES * ROWS * 4 // mesh.size
    assert memory.temp_size_in_bytes < 3 * 4 * softmax.SCORES_AT_ONCE < scores / 3  # nor a second gradient
    largest = max(hlo.size(found) for found in re.findall(r"f32\[[\d,]+\]", text))
    assert largest <= max(table, 4 * softmax.SCORES_AT_ONCE) < scores
    if mesh.size == 1:
        return
    moved = hlo.read(text)
    queries = QUERIES * (WIDTH + 4) * 4
    assert moved.total("all-gather") <= 2 * queries  # the queries of the others, in both passes
    assert moved.total("reduce-scatter") + moved.total("all-reduce") <= 2 * queries
    assert max(moved.largest(kind) for kind in hlo.KINDS) <= queries
    assert moved.total("all-to-all") == 0
