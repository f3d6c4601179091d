"""One array of rows: where a slot lives, how rows start, packed lines, merged repeats, stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers.embedding import Array, RowRule, accumulate, distinct, init_slots, write, write_whole
from recscale.optim import TABLE_RULES

DIMS = (64, 3, 1)
BILLION = 10**9


def shards(array: Array) -> list[int]:
    """Numbers of equal shards, powers of two up to the buckets."""
    return [1 << k for k in range(1, array.buckets.bit_length())]


# Where a slot lives --------------------------------------------------------------------------------------------------


def assert_bijective(array: Array) -> None:
    everywhere = np.arange(array.size)
    positions = array.position(everywhere)  # spare slots included
    assert positions.min() == 0 and positions.max() == array.size - 1
    assert np.array_equal(array.slot(positions), everywhere)  # no two share a place
    assert array.size >= array.num_rows + 1 and array.size % array.buckets == 0


def test_every_slot_has_a_place_of_its_own():
    for rows in range(1, 5001):
        assert_bijective(Array(rows, DIMS[rows % len(DIMS)]))


@pytest.mark.parametrize("rows", [4094, 4095, 4096, 2**20 - 2, 2**20 - 1, 2**20, 2**20 + 1])
def test_every_slot_has_a_place_of_its_own_where_the_number_of_buckets_changes(rows):
    for dim in DIMS:
        assert_bijective(Array(rows, dim))


@pytest.mark.parametrize("rows", [10**6, 10**7, 123_456_789, BILLION])
@pytest.mark.parametrize("dim", DIMS)
def test_places_of_large_arrays_fit_in_int32(rows, dim):
    array = Array(rows, dim)
    assert array.size < 2**31
    drawn = np.random.default_rng(0).integers(1, rows + 1, 5000)
    slots = np.concatenate([np.arange(0, 3000), rows - np.arange(3000), drawn])
    positions = jax.jit(array.position)(jnp.asarray(slots, jnp.int32))
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, array.position(slots.astype(np.int64)))
    np.testing.assert_array_equal(jax.jit(array.slot)(positions), slots)
    assert int(positions.min()) >= 0 and int(positions.max()) < array.size
    assert len(np.unique(positions)) == len(np.unique(slots))


@pytest.mark.parametrize("rows", [50, 3000, 5000, 200_000, 2**20 + 5, BILLION])
def test_every_range_of_slots_is_shared_evenly(rows):
    array = Array(rows, 64)
    assert 8 in shards(array)
    for first in (1, 2, 37, 1000, rows // 3, rows // 2):
        for length in (1, 2, 8, 16, 50, 64, 100, 333, 1000, 1024, 5000, 20_000):
            if first + length > rows + 1:
                continue
            positions = array.position(np.arange(first, first + length))
            for count in shards(array):
                held = np.bincount(positions // (array.size // count), minlength=count)
                assert np.abs(held - length / count).max() <= 5, (first, length, count)


def test_the_order_does_not_depend_on_packing():
    slots = np.arange(5001)
    plain, packed = Array(5000, 32), Array(5000, 32, packed=True)
    assert (plain.pack, packed.pack) == (1, 4) and plain.size == packed.size
    assert packed.shape == (plain.size // 4, 128)
    np.testing.assert_array_equal(plain.position(slots), packed.position(slots))
    assert [Array(n, d, packed=True).pack for n, d in ((5000, 128), (5000, 48), (300, 32), (5000, 1))] == [1, 1, 1, 128]


# How rows start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "packed"), [(300, False), (5000, True)])
def test_a_row_depends_on_key_and_slot_alone(rows, packed):
    array, key = Array(rows, 32, stddev=0.1, packed=packed), jax.random.key(3)
    whole = np.asarray(jax.jit(array.init)(key))
    assert whole.shape == array.shape
    by_slot = array.values(whole)
    alone = np.asarray(jax.jit(array.init_rows)(key, jnp.asarray([7, rows, 0, 1, rows + 1])))
    np.testing.assert_array_equal(alone[[0, 1, 3]], by_slot[[7, rows, 1]])
    assert not alone[[2, 4]].any()
    longer = Array(array.num_rows + 4000, 32, stddev=0.1)  # another size, another order, the same rows
    np.testing.assert_array_equal(longer.values(jax.jit(longer.init)(key))[: rows + 1], by_slot)
    part = array.size // 8
    make = jax.jit(lambda first: array.init(key, first, part))
    np.testing.assert_array_equal(np.concatenate([make(i * part) for i in range(8)]), whole)
    assert not np.array_equal(jax.jit(array.init)(jax.random.key(4)), whole)


def test_initial_values():
    array = Array(5000, 16, stddev=0.1)
    rows = np.asarray(array.init(jax.random.key(0))).reshape(array.size, 16)
    real = np.zeros(array.size, bool)
    real[array.position(np.arange(1, 5001))] = True
    assert not rows[~real].any() and (~real).sum() == array.size - 5000  # padding and spare rows
    assert np.abs(rows).max() <= 0.2 and rows[real].std() == pytest.approx(0.1 * 0.8796, rel=0.02)
    whole = np.asarray(Array(5000, 16, stddev=0.1, cut=False).init(jax.random.key(0)))
    assert whole.std() == pytest.approx(0.1 * (5000 / array.size) ** 0.5, rel=0.02) and np.abs(whole).max() > 0.35
    assert abs(np.corrcoef(rows[real][:2000, 0], rows[real][:2000, 1])[0, 1]) < 0.1
    for zero in (Array(5000, 16, stddev=0.0), Array(5000, 16, fixed=True)):
        assert not np.asarray(zero.init(jax.random.key(0))).any()
    assert Array(40, 4, dtype="bfloat16").init(jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize(("rows", "packed"), [(300, False), (4100, False), (4100, True)])
def test_values_reverse_place(rows, packed, dtype):
    array = Array(rows, 8, dtype=dtype, packed=packed)
    by_slot = np.random.default_rng(0).integers(1, 200, (rows + 1, 8)).astype(jnp.dtype(dtype))
    placed = array.place(by_slot)
    assert placed.shape == array.shape and placed.dtype == jnp.dtype(dtype)
    back = array.values(placed)
    np.testing.assert_array_equal(back[1:], by_slot[1:])
    assert not back[0].any()
    assert (placed.reshape(array.size, 8) != 0).any(axis=1).sum() == rows  # nothing at padding and spare rows


# Reading and writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixed", "none beyond", "all beyond", "far beyond", "all equal", "all different"])
def test_distinct_positions(kind):
    rng, N, size = np.random.default_rng(1), 32, 40
    given = {
        "mixed": rng.integers(0, 60, N),
        "none beyond": rng.integers(0, 6, N),
        "all beyond": np.full(N, size),
        "far beyond": np.repeat([0, size + N - 1], N // 2),  # as a spare place is numbered
        "all equal": np.full(N, size - 1),
        "all different": rng.permutation(size)[:N],
    }[kind].astype(np.int32)
    found = jax.jit(distinct, static_argnums=1)(given, size)
    position, inverse = np.asarray(found.position_N), np.asarray(found.inverse_N)
    assert (np.diff(position) > 0).all()  # ascending, and spare places never collide
    np.testing.assert_array_equal(position[inverse][given < size], given[given < size])
    assert (position[inverse][given >= size] >= size).all()
    assert set(position[position < size]) == set(given[given < size])


def positions_and_gradients(array: Array, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Touched positions with repeats, neighbours in a line, and some beyond the end; their gradients."""
    rng = np.random.default_rng(seed)
    position = np.concatenate(
        [rng.integers(0, array.size, 40), np.arange(8), np.full(5, 77), np.full(3, array.size), [array.size + 9]]
    )
    return position.astype(np.int32), rng.normal(size=(len(position), array.dim)).astype(np.float32)


def after_steps(array: Array, rule: RowRule, weight_decay: float, unit: float) -> dict[str, np.ndarray]:
    """Rows [size, D] ("") and optimizer slots [size, 1 or D] after three steps; gradients are multiples of `unit`."""
    rng = np.random.default_rng(2)
    values = jnp.asarray(array.place(rng.integers(-128, 128, (array.num_rows + 1, array.dim)) / 128))
    state = values, init_slots(array, rule)
    assert state[1].keys() == rule.slots.keys()
    position, grads = positions_and_gradients(array)
    grads = np.round(grads / unit) * np.float32(unit)

    @jax.jit
    def step(state, step):
        how = {
            "learning_rate": jnp.float32(0.125),
            "weight_decay": weight_decay,
            "step": step,
            "key": jax.random.key(1),
        }
        if not rule.whole:
            return write(array, rule, *state, position, grads, **how)
        total = accumulate(array, jnp.zeros(array.shape), position, grads)
        return write_whole(array, rule, *state, total, **how)

    for i in range(3):
        state = step(state, i)
    read = jax.jit(array.read)(state[0], position)
    rows = np.asarray(state[0], np.float32).reshape(array.size, array.dim)
    np.testing.assert_array_equal(read[:40].astype(jnp.float32), rows[position[:40]])
    assert read.dtype == jnp.dtype(array.dtype) and not np.asarray(read)[-4:].astype(np.float32).any()
    slots = np.setdiff1d(np.arange(1, array.num_rows + 1), array.slot(position))
    assert rule.whole or np.array_equal(array.values(state[0])[slots], array.values(values)[slots])  # untouched
    assert np.any(rows != np.asarray(values, np.float32).reshape(rows.shape), axis=1).sum() >= 40
    return {"": rows} | {name: np.asarray(x).reshape(array.size, -1) for name, x in state[1].items()}


@pytest.mark.parametrize("dim", [64, 32, 1])
@pytest.mark.parametrize("name", TABLE_RULES)
def test_packed_lines_are_the_rows_unpacked(name, dim):
    plain, packed = (Array(4100, dim, packed=flag) for flag in (False, True))
    assert (plain.pack, packed.pack) == (1, 128 // dim)
    expected, found = (after_steps(array, TABLE_RULES[name], 0.01, 2.0**-20) for array in (plain, packed))
    for part, values in expected.items():
        np.testing.assert_allclose(found[part], values, rtol=1e-6, atol=1e-7, err_msg=part)


@pytest.mark.parametrize("dim", [64, 1])
def test_packed_bfloat16_is_rounded_as_unpacked(dim):
    """With gradients that float32 adds without error, to the bit."""
    plain, packed = (Array(4100, dim, dtype="bfloat16", packed=flag) for flag in (False, True))
    expected, found = (after_steps(array, TABLE_RULES["sgd"], 0.0, 2.0**-10) for array in (plain, packed))
    np.testing.assert_array_equal(found[""], expected[""])


def test_a_shard_writes_what_the_whole_array_writes():
    array, rule = Array(5000, 4, dtype="bfloat16"), TABLE_RULES["rowwise_adagrad"]
    rows = jnp.asarray(array.place(np.random.default_rng(2).normal(size=(5001, 4))))
    position, grads = positions_and_gradients(array)
    how = {"learning_rate": jnp.float32(0.1), "weight_decay": 0.1, "step": jnp.int32(3), "key": jax.random.key(5)}
    run = jax.jit(lambda rows, total, position, first: write(
        array, rule, rows, {"total": total}, position, grads, first=first, **how
    ))  # fmt: skip
    whole, whole_slots = run(rows, jnp.ones(array.size), position, 0)
    part = array.size // 8
    for i in range(8):
        own = slice(i * part, (i + 1) * part)
        local = np.where((position >= own.start) & (position < own.stop), position - own.start, part)
        got, got_slots = run(rows[own], jnp.ones(part), local, own.start)
        np.testing.assert_array_equal(got, whole[own])
        np.testing.assert_array_equal(got_slots["total"], whole_slots["total"][own])


# bfloat16 ------------------------------------------------------------------------------------------------------------


def written(start: float, gradients: list[float], rows: int = 4000, dim: int = 8) -> np.ndarray:
    """Rows [rows, dim] of bfloat16 that begin at `start`, after SGD steps with these gradients."""
    array, rule = Array(rows, dim, dtype="bfloat16"), TABLE_RULES["sgd"]
    values = jnp.asarray(array.place(np.full((rows + 1, dim), start)))
    position = jnp.asarray(array.position(np.arange(1, rows + 1)), jnp.int32)

    @jax.jit
    def step(values, gradient, i):
        key = jax.random.fold_in(jax.random.key(0), i)
        how = {"learning_rate": jnp.float32(1.0), "weight_decay": 0.0, "step": i, "key": key}
        return write(array, rule, values, {}, position, jnp.full((rows, dim), gradient), **how)[0]

    for i, gradient in enumerate(gradients):
        values = step(values, gradient, i)
    assert values.dtype == jnp.bfloat16
    return array.values(values)[1:].astype(np.float64)


@pytest.mark.parametrize("start", [1.0, -1.0, 2.0**-30])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.93])
def test_rounding_keeps_the_mean(start, fraction):
    unit = abs(start) * 2.0**-7  # bfloat16 has 8 bits
    values = written(start, [-np.sign(start) * fraction * unit])
    assert set(np.unique(values)) == {start, start + np.sign(start) * unit}
    share = np.abs(values - start) / unit
    assert abs(share.mean() - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / share.size)
    by_row = share.reshape(4000, 8)  # rows, and elements of a row, are rounded independently
    assert np.abs(np.corrcoef(by_row.T) - np.eye(8)).max() < 0.1
    assert by_row.mean(axis=1).std() == pytest.approx(np.sqrt(fraction * (1 - fraction) / 8), rel=0.1)


def test_many_small_steps_add_up():
    values = written(1.0, [-(2.0**-11)] * 160)  # each is 1/16 of a unit: rounding to nearest would never move
    steps = 160 * 2.0**-11
    assert abs(values.mean() - 1 - steps) < 5 * np.sqrt(160 * 2.0**-14 / 16) / np.sqrt(values.size)


def test_values_that_bfloat16_holds_stay():
    assert (written(1.5, [0.0] * 3) == 1.5).all()
    assert (written(1.5, [-0.25, 0.5, 3.0]) == -1.75).all()
    assert not written(0.0, [0.0]).any()
    assert np.isinf(written(1.0, [-np.inf], rows=3)).all() and np.isnan(written(1.0, [np.nan], rows=3)).all()
