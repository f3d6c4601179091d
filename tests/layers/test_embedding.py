"""Tables: hashing, initial values, lookups and the merging of repeated rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.layers.embedding import Table, lookup, merge_rows, scatter_rows


def test_every_id_has_its_own_row_unless_rows_are_fewer():
    ids = jnp.asarray([[0, 1], [7, 1000]])
    for rows in (0, 1000, 5000):
        table = Table(1000, 4, rows)
        assert table.num_rows == 1000 and not table.hashed
        np.testing.assert_array_equal(table.slots(ids), ids)


@pytest.mark.parametrize("rows", [1, 7, 125, 999])
def test_hashed_slots(rows):
    table = Table(1000, 4, rows)
    assert table.num_rows == rows and table.hashed
    ids = jnp.arange(1001)
    slots = np.asarray(jax.jit(table.slots)(ids))
    assert slots.dtype == np.int32 and slots[0] == 0
    assert slots[1:].min() >= 1 and slots[1:].max() <= rows
    np.testing.assert_array_equal(slots[::-1], jax.jit(Table(1000, 8, rows).slots)(ids[::-1]))  # of the id alone


def test_hashing_spreads_consecutive_and_large_ids():
    table = Table(2**31 - 1, 4, 128)
    run = jax.jit(table.slots)
    for first in (1, 2**31 - 1 - 20_000):
        counts = np.bincount(np.asarray(run(first + np.arange(20_000, dtype=np.int32))), minlength=129)
        assert counts[0] == 0
        chi2 = ((counts[1:] - 20_000 / 128) ** 2 / (20_000 / 128)).sum()
        assert chi2 < 127 + 5 * np.sqrt(2 * 127)  # no worse than random


def test_initial_values():
    spec = Table(500, 40, stddev=0.1)
    table = np.asarray(jax.jit(spec.init)(jax.random.key(0)))
    assert table.shape == (501, 40) and table.dtype == np.float32
    assert not table[0].any() and np.abs(table[1:]).max() <= 0.2
    assert table[1:].std() == pytest.approx(0.1 * 0.8796, rel=0.02)
    assert jax.eval_shape(Table(500, 40, rows=20).init, jax.random.key(0)).shape == (21, 40)


@pytest.mark.parametrize("sizes", [(0, 4, 0), (10, 0, 0), (10, 4, -1)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="expected positive sizes"):
        Table(*sizes)


def test_lookup_and_its_dense_gradient():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(9, 3)).astype(np.float32)
    slots = np.array([[0, 8, 2], [2, 2, 5]])
    np.testing.assert_array_equal(lookup(jnp.asarray(table), slots), table[slots])
    weight = rng.normal(size=(2, 3, 3)).astype(np.float32)
    dense = np.array(jax.grad(lambda t: (lookup(t, slots) * weight).sum())(jnp.asarray(table)))
    dense[0] = 0.0  # padding never learns
    np.testing.assert_allclose(scatter_rows(jnp.asarray(table), jnp.asarray(slots), weight), dense, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixed", "no padding", "all padding", "all equal", "all different"])
def test_merged_rows_scatter_to_the_dense_gradient(kind):
    rng = np.random.default_rng(1)
    V, N = 40, 32
    slots = {
        "mixed": rng.integers(0, 12, N),
        "no padding": rng.integers(1, 6, N),
        "all padding": np.zeros(N, int),
        "all equal": np.full(N, V - 1),
        "all different": 1 + rng.permutation(V - 1)[:N],
    }[kind].astype(np.int32)
    grads = rng.normal(size=(N, 3)).astype(np.float32)
    distinct, summed = jax.jit(merge_rows, static_argnums=2)(slots, grads, V)
    expected = np.zeros((V, 3))
    np.add.at(expected, slots, grads)
    expected[0] = 0.0
    scattered = jnp.zeros((V, 3)).at[distinct].set(summed, mode="drop", unique_indices=True)
    np.testing.assert_allclose(scattered, expected, atol=1e-6)
    distinct = np.asarray(distinct)
    assert len(np.unique(distinct)) == N  # spare places never collide with a row or with each other
    assert set(distinct[distinct < V]) == set(slots[slots > 0])
