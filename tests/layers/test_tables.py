"""Tables on a mesh: every kind against plain dense arithmetic by id, overflow, and what the compiled step moves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import hlo
from recscale.layers import exchange
from recscale.layers.embedding import Array
from recscale.layers.kinds import Table
from recscale.layers.tables import Tables, Update
from recscale.mesh import AXES, make_mesh
from recscale.optim import TABLE_RULES

IDS, D = 300, 8
TABLES = {
    "full": Table(IDS, D),
    "hashed": Table(IDS, D, "hashed", rows=40, parts=2),
    "hashed_concat": Table(IDS, D, "hashed", rows=70, parts=2, combine="concat"),
    "quotient_remainder": Table(IDS, D, "quotient_remainder", rows=23),
    "low_rank": Table(IDS, D, "low_rank", inner=5),
    "pq": Table(IDS, D, "pq", parts=4),
    "multi": Table(IDS, D, "multi", parts=2, inner=4),
    "capped": Table(IDS, D, "capped", rows=30),
    "ngram": Table(IDS, D, "ngram", rows=50, parts=3),
    "pieces": Table(IDS, D, "pieces", rows=50, parts=3),
}
SLOW = pytest.mark.slow
# Six devices do not share the rows evenly: each holds them all.
CASES = [("full", (1, 1, 1)), ("full", (1, 8, 1)), ("pq", (2, 2, 2))]
RARER = [("full", (1, 2, 4)), ("full", (2, 2, 2)), ("full", (1, 6, 1)), ("pq", (1, 1, 1)), ("pq", (1, 6, 1))]
RARER += [(kind, (2, 2, 2)) for kind in TABLES if kind not in ("full", "pq")]
RATE, DECAY = 0.1, 0.01


def draw_ids(seed: int = 0) -> dict[str, np.ndarray]:
    """Two uses of the table: rows of a batch with padding and ids that many devices share, and 7 ids for all."""
    rng = np.random.default_rng(seed)
    history = rng.integers(1, 12, (16, 5))
    history[:, 2:] = rng.integers(1, IDS + 1, (16, 3))
    history[::3, 0] = 0
    history[5] = 0
    return {"history": history.astype(np.int32), "negatives": np.array([3, 3, IDS, 0, 1, 250, 3], np.int32)}


def codes_of(spec: Table) -> np.ndarray | None:
    """Codes [IDS + 1, Q] by id; None for kinds without."""
    if not spec.num_codes:
        return None
    low, high = {"capped": (1, spec.rows + 1), "pieces": (0, spec.rows + 1)}.get(spec.kind, (0, 256))
    codes = np.random.default_rng(5).integers(low, high, (IDS + 1, spec.num_codes))
    return codes.astype(spec.arrays()["codes"].dtype)


def by_slot(spec: Table, part: str) -> np.ndarray:
    """Made-up values of an array by slot, padding zero."""
    array = spec.arrays()[part]
    values = np.random.default_rng(len(part)).normal(size=(array.num_rows + 1, array.dim)).astype(np.float32)
    values[0] = 0.0
    return values


def dense_vectors(spec: Table, values: dict[str, jax.Array], mixer, ids) -> jax.Array:
    """Vectors of ids from arrays by slot: nothing of meshes, routes or distinct rows."""
    codes = codes_of(spec)
    slots = spec.slots(jnp.asarray(ids), None if codes is None else jnp.asarray(codes)[ids])
    return spec.compose({part: x[slots.get(part, ids)] for part, x in values.items()}, mixer)


def weights(ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the loss multiplies vectors with."""
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=(*x.shape, D)).astype(np.float32) for name, x in sorted(ids.items())}


def loss(vectors, weight) -> jax.Array:
    return sum((jnp.sin(vectors[name]) * weight[name]).sum() for name in weight)


def place(tables: Tables, name: str, by_slot: np.ndarray) -> jax.Array:
    return jax.device_put(tables.arrays[name].place(by_slot), tables.sharding(name))


def train_step(tables: Tables, rule):
    """A jitted step on table "t", which gives the vectors too, the overflow and the gradient of the mixer."""

    def one(arrays, slots, mixers, ids, weight, step):
        touched, rows, overflow = tables.touch(arrays, "t", ids)

        def of(rows, mixer):
            vectors = tables.vectors("t", rows, mixer, touched, ids)
            return loss(vectors, weight), vectors

        (rows_grad, mixer_grad), vectors = jax.grad(of, argnums=(0, 1), has_aux=True)(rows, mixers["t"])
        arrays, slots, how = dict(arrays), dict(slots), Update(rule, jnp.float32(RATE), DECAY)
        for i, (part, name) in enumerate(tables.parts("t").items()):
            if part == "codes":
                continue
            arrays[name], slots[name], more = tables.update(
                name, arrays[name], slots[name], touched.position[part], rows_grad[part], how, step, jax.random.key(i)
            )
            overflow = overflow + more
        return vectors, arrays, slots, overflow, mixer_grad

    return jax.jit(one, donate_argnums=(0, 1))


def start(tables: Tables, rule):
    """Arrays of table "t" with made-up values, its mixers, and zero optimizer slots."""
    spec = tables.specs["t"]
    mixers = {"t": spec.mixer(jax.random.key(7))}
    arrays = {
        name: place(tables, name, codes_of(spec) if part == "codes" else by_slot(spec, part))
        for part, name in tables.parts("t").items()
    }
    return arrays, {name: tables.init_slots(name, rule) for name in arrays if not name.endswith("codes")}, mixers


# Against plain arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), [*CASES, *(pytest.param(*case, marks=SLOW) for case in RARER)])
def test_steps_are_those_of_a_dense_table(kind, shape):
    spec, rule, ids = TABLES[kind], TABLE_RULES["rowwise_adagrad"], draw_ids()
    tables, weight = Tables({"t": spec}, make_mesh(*shape)), weights(ids)
    arrays, slots, mixers = start(tables, rule)
    step = train_step(tables, rule)
    values = {part: by_slot(spec, part) for part in spec.arrays() if part != "codes"}
    totals = {part: np.zeros(len(x), np.float32) for part, x in values.items()}

    @jax.jit
    def dense(values, mixer):
        vectors = {name: dense_vectors(spec, values, mixer, x) for name, x in ids.items()}
        return loss(vectors, weight), vectors

    for i in range(2):
        found, arrays, slots, overflow, mixer_grad = step(arrays, slots, mixers, ids, weight, i)
        (grads, expected_mixer), vectors = jax.grad(dense, argnums=(0, 1), has_aux=True)(values, mixers["t"])
        assert overflow.tolist() == [0, 0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, vectors)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), mixer_grad, expected_mixer)
        for part, name in tables.parts("t").items():
            layout, array = tables.arrays[name], np.asarray(arrays[name])
            if part == "codes":
                np.testing.assert_array_equal(layout.values(array), codes_of(spec) * (np.arange(IDS + 1) > 0)[:, None])
                continue
            grad = np.asarray(grads[part])
            hit = np.any(grad != 0, axis=1) & (np.arange(len(grad)) > 0)
            totals[part] += np.square(grad).mean(axis=1) * hit
            move = RATE * grad / np.sqrt(totals[part] + 1e-8)[:, None] + RATE * DECAY * values[part]
            values[part] = np.where(hit[:, None], values[part] - move, values[part])
            np.testing.assert_allclose(layout.values(array), values[part], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(layout.values(array)[~hit], values[part][~hit])  # untouched, to the bit
            assert np.count_nonzero(array.any(axis=1)) == layout.num_rows  # padding and spare rows stay zero
            held = layout.shape[0] // (1 if 6 in shape else math.prod(shape))
            assert {shard.data.shape[0] for shard in arrays[name].addressable_shards} == {held}


def test_starting_values_do_not_depend_on_the_mesh():
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        tables = Tables({kind: TABLES[kind] for kind in ("full", "pq", "multi")}, make_mesh(*shape))
        found.append(jax.jit(tables.init)(jax.random.key(1)))
    assert found[0][0].keys() == found[1][0].keys()
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("name", ["sgd", *(pytest.param(rule, marks=SLOW) for rule in ("lazy_adam", "adam"))])
def test_bfloat16_and_every_rule_give_the_same_rows_on_every_mesh(name):
    """Gradients that sum without error, so that the rounding drawn for a row is all that could differ."""
    rng, found = np.random.default_rng(0), []
    spec, rule = Table(IDS, D, dtype="bfloat16"), TABLE_RULES[name]
    ids = rng.permutation(IDS)[:64].astype(np.int32) + 1  # every id on one device only
    grads = (rng.integers(-64, 64, (64, D)) / 256).astype(np.float32)
    for shape in ((1, 1, 1), (2, 2, 2)):
        tables = Tables({"t": spec}, make_mesh(*shape))
        arrays, slots, _ = start(tables, rule)

        @jax.jit
        def one(array, slots, step, tables=tables):
            touched, rows, _ = tables.touch({"t": array}, "t", {"ids": ids})
            pull = jax.vjp(lambda r: tables.vectors("t", r, {}, touched, {"ids": ids})["ids"], rows)[1]
            how = Update(rule, jnp.float32(0.125), 0.0)
            return tables.update(
                "t", array, slots, touched.position[""], pull(grads)[0][""], how, step, jax.random.key(2)
            )

        array, own = arrays["t"], slots["t"]
        for i in range(3):
            array, own, overflow = one(array, own, jnp.int32(i))
        assert array.dtype == jnp.bfloat16 and overflow.tolist() == [0, 0]
        found.append({"": np.asarray(array, np.float32)} | {k: np.asarray(x) for k, x in own.items()})
    assert np.any(found[0][""] != np.asarray(tables.arrays["t"].place(by_slot(spec, "")), np.float32))
    one, many = found
    for slot in rule.slots:  # moments: up to the last place, sums and products being fused in another order
        np.testing.assert_allclose(many[slot], one[slot], rtol=1e-6, atol=1e-7)
    different = one[""] != many[""]
    assert different.mean() <= (0.0 if name == "sgd" else 0.001)
    np.testing.assert_allclose(many[""], one[""], rtol=2.0**-7)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 4)])
def test_lookups_of_any_number_of_ids(shape):
    spec = TABLES["full"]
    tables = Tables({"t": spec}, make_mesh(*shape))
    arrays, _, mixers = start(tables, TABLE_RULES["sgd"])
    find = jax.jit(lambda ids: tables.lookup(arrays, mixers, "t", ids))
    for ids in (np.zeros((8, 3)), np.full((8, 3), IDS), np.array([5]), np.arange(301).reshape(7, 43)):
        got = find(ids.astype(np.int32))
        np.testing.assert_array_equal(got, by_slot(spec, "")[ids.astype(int)])


def test_a_large_array_that_the_mesh_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"table 't'.*cannot be shared by 6 devices.*divides 1024"):
        Tables({"t": Table(10**6, 64)}, make_mesh(1, 6, 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_a_dense_gradient_joins_that_of_the_rows(dtype, tolerance):
    """As under a loss over the catalogue: one step of the sum, and the weight decay once."""
    spec = dataclasses.replace(TABLES["full"], dtype=dtype)
    tables, rng = Tables({"t": spec}, make_mesh(1, 2, 4)), np.random.default_rng(0)
    layout, values, ids = tables.arrays["t"], by_slot(TABLES["full"], ""), draw_ids()["history"]
    whole = rng.normal(size=values.shape).astype(np.float32)
    weight = rng.normal(size=(*ids.shape, D)).astype(np.float32)

    @jax.jit
    def step(array, dense):
        touched, rows, _ = tables.touch({"t": array}, "t", {"x": ids})
        pull = jax.vjp(lambda r: tables.vectors("t", r, {}, touched, {"x": ids})["x"], rows)[1]
        how = Update(TABLE_RULES["sgd"], jnp.float32(RATE), DECAY)
        position, own = touched.position[""], pull(weight)[0][""]
        return tables.update("t", array, {}, position, own, how, jnp.int32(0), jax.random.key(0), dense)

    array, _, overflow = step(place(tables, "t", values), place(tables, "t", whole))
    np.add.at(whole, ids, weight)
    expected = values - RATE * whole - RATE * DECAY * values
    expected[0] = 0.0
    assert overflow.tolist() == [0, 0] and array.dtype == dtype
    np.testing.assert_allclose(layout.values(array).astype(np.float32), expected, rtol=1e-4 + tolerance, atol=tolerance)
    assert np.count_nonzero(np.asarray(array).any(axis=1)) == IDS  # padding and spare rows stay zero


# Overflow ------------------------------------------------------------------------------------------------------------


def on_one_shard(array: Array, count: int, shard: int, same_class: bool) -> np.ndarray:
    """Ids whose rows all lie on one of 8 devices, in as many of the classes of rows as can be or in one."""
    rows = array.size // 8
    local = np.arange(7, rows, exchange.MOST_ROUNDS) if same_class else np.arange(rows)
    ids = array.slot(shard * rows + local)
    return ids[(ids > 0) & (ids <= array.num_rows)][:count]


def overflowing(num_ids: int, same_class: bool):
    """A step in which each of 8 devices asks one device for the same 512 rows: found, expected, overflow, ids."""
    spec, rule, N = Table(num_ids, 4), TABLE_RULES["sgd"], 512
    tables = Tables({"t": spec}, make_mesh(1, 8, 1))
    layout = tables.arrays["t"]
    ids = np.tile(on_one_shard(layout, N, 3, same_class), (8, 1)).astype(np.int32)
    assert ids.shape == (8, N)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(num_ids + 1, 4)).astype(np.float32)
    grads = (rng.integers(-8, 8, (8, N, 4)) / 8).astype(np.float32)
    array = place(tables, "t", values)

    @jax.jit
    def step(array, ids, grads):
        touched, rows, fetched = tables.touch({"t": array}, "t", {"ids": ids})
        vectors, pull = jax.vjp(lambda r: tables.vectors("t", r, {}, touched, {"ids": ids})["ids"], rows)
        how = Update(rule, jnp.float32(0.125), 0.5)
        position = touched.position[""]
        array, _, written = tables.update("t", array, {}, position, pull(grads)[0][""], how, 0, jax.random.key(0))
        return vectors, array, fetched, written

    vectors, array, fetched, written = step(array, ids, grads)
    expected = values.copy()
    np.subtract.at(expected, ids, 0.125 * grads)
    expected[ids[0]] -= 0.125 * 0.5 * values[ids[0]]
    expected[0] = 0.0
    return (vectors, layout.values(array)), (values[ids], expected), (fetched.tolist(), written.tolist()), ids


def test_ids_that_all_live_on_one_device_take_more_rounds_and_none_is_lost():
    found, expected, overflow, _ = overflowing(20_000, same_class=False)
    assert exchange.capacity(512, 8) == 96
    assert overflow == ([7, 0], [7, 0])  # 512 rows, 96 a round: 8 rounds of 64
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)  # every row once, decay included


def test_rows_beyond_all_rounds_are_counted(monkeypatch):
    monkeypatch.setattr(exchange, "MOST_ROUNDS", 2)
    found, expected, overflow, ids = overflowing(20_000, same_class=False)
    lost = 8 * (512 - 2 * 96)
    assert overflow == ([1, lost], [1, lost])
    arrived = np.all(found[0] == expected[0], axis=-1)
    assert (~arrived).sum() == lost
    changed = np.zeros(20_001, bool)
    changed[ids[arrived]] = True
    np.testing.assert_allclose(found[1][changed], expected[1][changed], rtol=1e-6, atol=1e-6)


@SLOW
def test_the_last_resort_is_counted_too():
    """All ids in one class of one device: splitting into classes helps nothing."""
    _, _, overflow, _ = overflowing(2**18, same_class=True)
    assert overflow == ([63, 8 * (512 - 96)],) * 2


# What the compiled step costs ----------------------------------------------------------------------------------------

ROWS, WIDTH, LOOKUPS = 10**6, 64, 16_384


def compile_step(tables: Tables, rule_name: str) -> jax.stages.Compiled:
    """A train step of table "t" with LOOKUPS lookups, compiled from shapes alone."""
    rule, array, batch = TABLE_RULES[rule_name], tables.arrays["t"], NamedSharding(tables.mesh, PartitionSpec(AXES))
    width = tables.specs["t"].dim

    def shaped(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    own = jax.eval_shape(lambda: tables.init_slots("t", rule))
    slots = {name: shaped(x.shape, x.dtype, tables.sharding("t")) for name, x in own.items()}
    rows = shaped(array.shape, jnp.float32, tables.sharding("t"))
    ids, weight = shaped((LOOKUPS,), jnp.int32, batch), shaped((LOOKUPS, width), jnp.float32, batch)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = train_step(tables, rule).lower({"t": rows}, {"t": slots}, {"t": {}}, {"x": ids}, {"x": weight}, step)
    return lowered.compile()


@pytest.mark.parametrize("name", ["rowwise_adagrad", pytest.param("lazy_adam", marks=SLOW)])
def test_a_donated_step_needs_no_second_table(name):
    tables = Tables({"t": Table(ROWS, WIDTH)}, make_mesh(1, 1, 1))
    memory, table = compile_step(tables, name).memory_analysis(), math.prod(tables.arrays["t"].shape) * 4
    print(f"{name}: table {table / 1e6:.0f} MB, temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB")
    copies = 3 if name == "lazy_adam" else 1
    assert memory.alias_size_in_bytes >= copies * table
    assert memory.temp_size_in_bytes < 0.15 * table


@pytest.mark.parametrize("shape", [(1, 8, 1), pytest.param((2, 2, 2), marks=SLOW)])
def test_a_sharded_step_moves_rows_and_never_the_table(shape):
    tables = Tables({"t": Table(ROWS, WIDTH)}, make_mesh(*shape))
    program, table = compile_step(tables, "rowwise_adagrad"), math.prod(tables.arrays["t"].shape) * 4
    moved = hlo.read(program.as_text())
    ids = np.exp(np.random.default_rng(0).random((8, LOOKUPS // 8)) * np.log(ROWS)).astype(int)  # log-uniform
    row = WIDTH * 4
    touched = np.mean([len(np.unique(x)) for x in ids]) * row  # per device, as all that follows
    one_way = moved.total("all-to-all") / 2
    print(f"mesh {shape}, table {table / 1e6:.0f} MB: all-to-all {one_way / 1e6:.2f} MB per device and direction,")
    print(f"{one_way / touched:.2f} x the {touched / 1e6:.2f} MB of the rows that a device's lookups reach")
    assert touched < one_way <= 2.5 * touched
    # Of what the collective handles an eighth stays on the device; the rest, against the rows distinct on all devices.
    assert one_way * 7 / 8 <= 2.5 * len(np.unique(ids)) / 8 * row
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute"):
        assert moved.total(kind) < 4096, kind
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * table / 8
    assert memory.alias_size_in_bytes >= table / 8
