"""The Pallas kernels in interpret mode against the einsum reference: several blocks, ragged tails, all masks.

The kernels compiled for real chips are in test_pallas_compile.py.
"""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.kernels import tiles
from recscale.kernels.attention import IMPLEMENTATIONS, Bias, attention_reference
from recscale.kernels.pairs import spans, visible
from recscale.kernels.pallas_attention import attention_pallas
from tests.kernels.attention_cases import MASKS, NAMES, QUICK, Case, assert_equals_reference, case

GOLDEN_BLOCKS = [(256, 256), (128, 256), (256, 128), (128, 128)]


def with_grads(function, c: Case, kind: str, mask: str, dtype=np.float32, tables=(True, True), **blocks):
    """Outputs, and the gradients of sum(weight * outputs) by q, k, v and the tables that are used."""

    def total(arrays):
        q, k, v, position, time = arrays
        bias = Bias(position if tables[0] else None, time if tables[1] else None, c.query_time, c.time)
        out = function(q, k, v, c.segment_ids, bias, kind=kind, scale=0.7, **c.options(mask), **blocks)
        return (c.weight * out).sum(), out

    arrays = [jnp.asarray(x, dtype) for x in c.arrays[:3]] + list(c.arrays[3:])
    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(arrays)
    assert out.dtype == dtype and [x.dtype for x in grads] == [dtype] * 3 + [np.float32] * 2
    return np.asarray(out, np.float32), [np.asarray(x, np.float32) for x in grads]


def assert_same(c: Case, backend: str, kind: str, mask: str, blocks: tuple[int, int], dtype=np.float32, **given):
    """bfloat16 is held against the reference in float32 on the rounded inputs."""
    block = dict(zip(("block_q", "block_kv"), blocks, strict=True))
    out, grads = with_grads(attention_pallas, c, kind, mask, dtype, backend=backend, interpret=True, **block, **given)
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float32) for x in c.arrays[:3]]
    exact = dataclasses.replace(c, arrays=(*rounded, *c.arrays[3:]))
    expected, expected_grads = with_grads(attention_reference, exact, kind, mask, **given)
    tolerance = 1e-5 if dtype == np.float32 else 0.02
    np.testing.assert_allclose(out, expected, atol=tolerance * max(0.5, np.abs(expected).max()))
    for name, got, want in zip(NAMES, grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance * max(1.0, np.abs(want).max()), err_msg=name)
    padding = c.segment_ids == 0
    assert not np.any(out[padding]) and not any(np.any(x[padding]) for x in grads[:3])


@pytest.mark.parametrize(
    ("backend", "kind", "length", "mask", "blocks", "dtype"),
    [
        ("tpu", "silu", 45, "all", (16, 8), np.float32),
        ("tpu", "softmax", 45, "window and prefix", (8, 16), jnp.bfloat16),
        ("gpu", "softmax", 70, "all", (16, 32), np.float32),
        ("gpu", "silu", 70, "window and prefix", (32, 16), jnp.bfloat16),
        ("gpu", "silu", 1, "causal", (128, 128), np.float32),
    ],
)
def test_equals_the_reference(backend, kind, length, mask, blocks, dtype):
    assert_same(case(length), backend, kind, mask, blocks, dtype)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_several_key_blocks_are_added_up(backend):
    """Sizes at which a public kernel keeps only the last block of keys: two rows of 256, one head of 128, no bias."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, 1, 128)) * 0.1, jnp.float32) for _ in range(3))
    ids = jnp.ones((2, 256), jnp.int32)

    def outputs():
        pairs = [{"block_q": x, "block_kv": y, "backend": backend, "interpret": True} for x, y in GOLDEN_BLOCKS]
        ours = [attention_pallas(q, k, v, ids, Bias(), kind="silu", n=256, **given) for given in pairs]
        return ours, attention_reference(q, k, v, ids, Bias(), kind="silu", n=256)

    got, want = jax.jit(outputs, compiler_options=QUICK)()
    for out in got:
        np.testing.assert_allclose(out, want, atol=1e-6 * np.abs(want).max())


def test_the_choice_by_platform_is_right_here():
    assert IMPLEMENTATIONS["pallas"] is attention_pallas
    assert_equals_reference(case(20), "softmax", "causal", "pallas")


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize("tables", [(True, False), (False, True), (False, False)])
def test_an_absent_table_has_no_gradient_and_no_array(backend, tables):
    c = case(20)

    def total(arrays):
        q, k, v, position, time = arrays
        bias = Bias(position if tables[0] else None, time if tables[1] else None, c.query_time, c.time)
        return attention_pallas(q, k, v, c.segment_ids, bias, kind="silu", n=c.n, backend=backend, interpret=True).sum()

    program = jax.make_jaxpr(jax.grad(total))(c.arrays)
    assert str(program).count("pallas_call") == 3 + any(tables)  # forward, queries, keys, tables


def brute_force(c: Case, mask: str) -> np.ndarray:
    """All pairs [B, L, L] that see each other."""
    options = c.options(mask)
    prefix, length = options.get("prefix", 0), c.segment_ids.shape[1]
    slots, seen = jnp.arange(length), spans(jnp.asarray(c.segment_ids), prefix)
    return np.asarray(visible(seen, slots, slots, options.get("window", 0), prefix, options["targets_BL"]))


@pytest.mark.parametrize(("mask", "blocks"), list(itertools.product(MASKS, [(8, 4), (4, 8), (8, 8)])))
def test_ranges_hold_every_pair_and_little_else(mask, blocks):
    c = case(96, longest=40)
    given = c.options(mask)
    window, prefix, targets = given.get("window", 0), given.get("prefix", 0), given["targets_BL"]
    options = tiles.Options("silu", c.n, 1.0, window, prefix, targets is not None, False)
    plan = tiles.make_plan(jnp.asarray(c.segment_ids), None, None, targets, options)
    queries, keys = (np.asarray(x) for x in tiles.make_ranges(plan, options, *blocks))
    B, count, J = len(c.segment_ids), 96 // blocks[0], 96 // blocks[1]
    meet = brute_force(c, mask).reshape(B, count, blocks[0], J, blocks[1]).any(axis=(2, 4))
    for b, i in np.ndindex(B, count):
        steps = range(queries[b, i, 3])
        walked = [int(tiles.key_block(*queries[b, i, :3], step)) for step in steps]
        assert len(set(walked)) == len(walked) and set(np.flatnonzero(meet[b, i])) <= set(walked), (b, i)
        assert [bool(tiles.meet(queries[b, i], j)) for j in range(J)] == [j in walked for j in range(J)]
    for b, j in np.ndindex(B, J):
        walked = range(keys[b, j, 0], keys[b, j].sum())
        assert set(np.flatnonzero(meet[b, :, j])) <= set(walked) <= set(range(count)), (b, j)
    assert queries[..., 3].sum() <= 1.25 * meet.sum() and keys[..., 1].sum() <= 1.6 * meet.sum()
    ahead, behind = tiles.diagonals(96, blocks[0], options)
    if blocks[0] == blocks[1]:
        _, i, j = np.nonzero(meet)
        assert -ahead <= (i - j).min() and (i - j).max() <= behind


def test_position_gradient_sums_along_diagonals():
    rng = np.random.default_rng(3)
    size, ahead, n = 4, 1, 6
    sums = rng.normal(size=(4, size, size)).astype(np.float32)
    want = np.zeros(2 * n - 1)
    for d, r, c in np.ndindex(sums.shape):
        want[np.clip(c - r - (d - ahead) * size + n - 1, 0, 2 * n - 2)] += sums[d, r, c]
    np.testing.assert_allclose(tiles.position_gradient(jnp.asarray(sums), ahead, n), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize(("kind", "mask"), list(itertools.product(("silu", "softmax"), MASKS)))
def test_grid_of_lengths_and_blocks(backend, kind, mask):
    ragged = [(7, (8, 8)), (150, (64, 32))] if mask in ("causal", "all") else []
    for length, blocks in [(49, (16, 32)), *ragged]:
        blocks = tuple(max(16, x) for x in blocks) if backend == "gpu" else blocks
        assert_same(case(length, longest=max(1, length // 2)), backend, kind, mask, blocks)
    assert_same(case(60), backend, kind, mask, (16, 16), jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize("tables", [(True, False), (False, True), (False, False)])
def test_grid_of_tables(backend, kind, tables):
    assert_same(case(60), backend, kind, "causal", (16, 16), tables=tables)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize(("length", "kind", "blocks"), [(256, "silu", b) for b in GOLDEN_BLOCKS])
def test_grid_of_large_blocks(backend, length, kind, blocks):
    assert_same(case(length, qk=128, v=128), backend, kind, "causal", blocks)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize("kind", ["silu", "softmax"])
def test_a_long_row_of_short_users(backend, kind):
    assert_same(case(1037, 60), backend, kind, "causal", (64, 64))


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small(monkeypatch, capsys):
    benchmark = importlib.import_module("benchmarks.attention_gpu")
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "CALLS", 1)
    monkeypatch.setattr("sys.argv", ["attention_gpu", "--smoke"])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "largest relative difference" in printed and "ragged" in printed
    assert {name for name in ("pallas", "blocks", "einsum", "cuDNN") if f" {name}" not in printed} == set()
