"""Attention: the einsum against loops in float64, blocks against the einsum, over masks, shapes and precisions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.kernels import blocks
from recscale.kernels.attention import IMPLEMENTATIONS, Bias, attention, time_bucket
from tests.kernels.attention_cases import (
    MASKS,
    NAMES,
    QUICK,
    Case,
    assert_equals_reference,
    case,
    in_float64,
    value_and_grads,
)

KINDS = ("silu", "softmax")


@pytest.fixture
def long_path(monkeypatch):
    """Every row is scanned, in blocks of at most 16."""
    monkeypatch.setattr(blocks, "_SHORT", 0)
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 16)


def short_table(c: Case, n: int) -> Case:
    """The same with a position table of 2n - 1 entries, which users may be longer than."""
    middle = len(c.arrays[3]) // 2
    position = c.arrays[3][middle - n + 1 : middle + n]
    return dataclasses.replace(c, arrays=(*c.arrays[:3], position, c.arrays[4]), n=n)


@pytest.mark.parametrize(("kind", "mask"), [*((kind, "all") for kind in KINDS), *(("silu", mask) for mask in MASKS)])
def test_reference_equals_loops_in_float64(kind, mask):
    c = short_table(case(13, longest=9), 6)
    out, grads = value_and_grads(c, kind, "einsum", mask)
    np.testing.assert_allclose(out, in_float64(c, c.arrays, kind, mask), atol=4e-6)
    rng = np.random.default_rng(1)
    for name, grad, array in zip(NAMES, grads, c.arrays, strict=True):
        direction = rng.normal(size=array.shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = [x + step * direction if x is array else x for x in c.arrays]
            values.append((c.weight * in_float64(c, moved, kind, mask)).sum())
        slope = (values[0] - values[1]) / 2e-5
        assert (grad * direction).sum() == pytest.approx(slope, rel=2e-4, abs=3e-5), name


@pytest.mark.parametrize(
    ("kind", "length", "longest", "mask"),
    [
        ("silu", 1, None, "all"),
        ("silu", 7, None, "causal"),
        ("softmax", 7, None, "all"),
        ("silu", 97, None, "all"),
        ("softmax", 150, 40, "window"),
    ],
)
def test_short_rows_equal_the_reference(kind, length, longest, mask):
    assert_equals_reference(case(length, longest), kind, mask, "blocks")


@pytest.mark.parametrize(
    ("kind", "length", "mask"),
    [("silu", 1, "causal"), ("softmax", 17, "prefix"), ("softmax", 61, "causal"), ("softmax", 61, "all")]
    + [("silu", 61, mask) for mask in MASKS],
)
def test_scanned_rows_equal_the_reference(long_path, kind, length, mask):
    assert_equals_reference(short_table(case(length, longest=40), 12), kind, mask, "blocks")


@pytest.mark.parametrize(("kind", "length"), [("silu", 1037), ("softmax", 300)])
def test_scanned_rows_at_the_real_size_of_a_block(kind, length):
    assert_equals_reference(case(length, longest=length - 100), kind, "window", "blocks")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("length", "longest", "dtype"),
    [(257, None, np.float32), (257, 60, jnp.bfloat16), (512, 60, np.float32), (1037, None, np.float32)],
)
def test_grid(kind, length, longest, dtype):
    """All masks, rows of one user and of many."""
    tolerance = 1e-5 if dtype == np.float32 else 3e-2
    for mask in MASKS:
        assert_equals_reference(case(length, longest), kind, mask, "blocks", dtype, tolerance)


def test_the_path_of_accelerators(long_path, monkeypatch):
    """On CPU, what other platforms run: biases by comparison, larger blocks."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
    assert_equals_reference(short_table(case(61, longest=40), 12), "silu", "all", "blocks")


@pytest.mark.parametrize("blocks_of", [64, 128])
def test_several_key_blocks_are_added_up(monkeypatch, blocks_of):
    """The shape on which a public kernel overwrites its sums from the second block on: error .127 instead of 1e-7."""
    monkeypatch.setattr(blocks, "_SHORT", 0)
    monkeypatch.setattr(blocks, "_CPU_BLOCK", blocks_of)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, 1, 128)) * 0.3, jnp.float32) for _ in range(3))
    one_user = jnp.ones((2, 256), jnp.int32)
    got, want = (
        jax.jit(lambda name=name: attention(q, k, v, one_user, kind="silu", n=256, implementation=name))()
        for name in ("blocks", "einsum")
    )
    np.testing.assert_allclose(got, want, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["short", "scanned"])
def test_bfloat16_is_close(kind, path, request):
    if path == "scanned":
        request.getfixturevalue("long_path")
    assert_equals_reference(case(60), kind, "all", "blocks", jnp.bfloat16, tolerance=3e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["short", "scanned"])
def test_no_gradient_from_later_events_or_other_users(kind, path, request):
    if path == "scanned":
        request.getfixturevalue("long_path")
    c = case(110, longest=30)
    i = 100  # in a user that starts at 90

    def total(arrays):
        q, k, v, position, time = arrays
        return attention(q, k, v, c.segment_ids, c.bias(position, time), kind=kind, n=c.n)[1, i].sum()

    _, k_grad, v_grad, _, _ = jax.jit(jax.grad(total), compiler_options=QUICK)(c.arrays)
    allowed = np.zeros((3, 110), bool)
    allowed[1, 90 : i + 1] = True
    for grad in (np.asarray(k_grad), np.asarray(v_grad)):
        assert not np.any(grad[~allowed])
        assert np.all(np.any(grad[allowed], axis=-1))


def test_no_bias_and_one_of_two(long_path):
    c = case(40)
    q, k, v, position, time = (jnp.asarray(x) for x in c.arrays)
    times = (jnp.asarray(c.query_time), jnp.asarray(c.time))

    def outputs(name):
        def total(q, bias):
            return attention(q, k, v, c.segment_ids, bias, kind="softmax", n=c.n, implementation=name).sum()

        return [jax.grad(total)(q, b) for b in (Bias(), Bias(position), Bias(None, time, *times))]

    got, want = (jax.jit(lambda n=name: outputs(n), compiler_options=QUICK)() for name in ("blocks", "einsum"))
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_only_blocks_within_reach_are_computed():
    c = blocks.Settings("silu", 10, 1.0, 0, 0, 4, True)
    reach = blocks.block_scan.reachable
    assert len(reach(8, c)) == 36  # causal: 8 x 9 / 2
    assert len(reach(8, c._replace(window=4))) == 15  # its own block and the one before
    assert len(reach(8, c._replace(window=6))) == 21
    assert len(reach(8, c._replace(prefix=3))) == 36 + 7
    segments = np.zeros((1, 32), np.int32)
    segments[0, :20] = np.repeat([1, 2], 10)  # users in blocks 0 to 2 and 2 to 4, then padding
    seen = blocks.spans(jnp.asarray(segments), 0)
    sights = blocks._split_sights(blocks.Sights(*seen, None, None, None), c)
    pairs = reach(8, c)
    wanted = {tuple(x) for x in pairs[np.asarray(blocks.block_scan.needed(sights, pairs, c))]}
    assert wanted == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4)}


def test_memory_grows_linearly():
    """Of forward and backward pass, as the compiler reserves it; for the einsum it would be sixteen times."""

    def temporaries(length: int) -> int:
        def total(q, k, v, position, time, segment_ids, seconds):
            bias = Bias(position, time, seconds, seconds)
            return attention(q, k, v, segment_ids, bias, kind="softmax", n=length).sum()

        float_shapes = [(1, length, 2, 16)] * 3 + [(2 * length - 1,), (129,)]
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in float_shapes]
        shapes += [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2
        compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large <= 4.5 * small and small < 1024 * 1024 * 4, (small, large)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "relu"}, "kind = 'relu': expected one of"),
        ({"implementation": "cudnn"}, "implementation = 'cudnn': expected one of"),
        ({"window": -1}, "window = -1, prefix = 0: expected 0"),
        ({"bias": Bias(time=jnp.zeros(129))}, "needs both"),
    ],
)
def test_what_cannot_be_computed_is_an_error(options, message):
    c = case(7)
    options = {"kind": "silu", "n": c.n} | options
    with pytest.raises(ValueError, match=message):
        attention(*map(jnp.asarray, c.arrays[:3]), jnp.asarray(c.segment_ids), **options)


def test_implementations_have_a_name():
    assert {"einsum", "blocks"} <= set(IMPLEMENTATIONS)


def test_time_buckets_stay_in_the_table_for_any_difference():
    ends = np.array([np.iinfo(np.int32).min + 1, np.iinfo(np.int32).max], np.int32)
    np.testing.assert_array_equal(jax.jit(time_bucket)(ends), 71)
