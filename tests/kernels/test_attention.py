"""Blockwise attention against its one-einsum reference, and the reference against loops in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.kernels import attention as kernel
from recscale.kernels.attention import Bias, attention, attention_reference, time_bucket

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
QK, V = 3, 2


@dataclasses.dataclass
class Case:
    """Rows of packed users: row 0 packed with a ragged tail, row 1 full, row 2 empty; a long case has only row 0."""

    arrays: tuple[np.ndarray, ...]  # q, k, v, position bias, time bias
    weight: np.ndarray  # of the outputs in the scalar that is differentiated
    segment_ids: np.ndarray
    query_time: np.ndarray
    time: np.ndarray
    n: int

    def bias(self, position, time) -> Bias:
        return Bias(position, time, jnp.asarray(self.query_time), jnp.asarray(self.time))


def case(length: int, longest: int | None = None) -> Case:
    """`longest` bounds the users' lengths: rows may be longer than the reach n of the position bias."""
    rng = np.random.default_rng(length)
    rows, heads = (3, 2) if length < 1000 else (1, 1)
    longest = longest or length
    segment_ids = np.zeros((3, length), np.int32)
    packed = length - length // 6
    lengths = rng.integers(1, max(2, min(longest, length // 3)), size=length)
    segment_ids[0, :packed] = np.repeat(np.arange(length), lengths)[:packed] + 1
    segment_ids[1] = np.arange(length) // longest + 1
    segment_ids = segment_ids[:rows]
    n = longest + 2
    arrays = [rng.normal(size=(rows, length, heads, d)) for d in (QK, QK, V)]
    arrays += [rng.normal(size=2 * n - 1), rng.normal(size=129)]
    time = np.cumsum(rng.integers(0, 5000, (rows, length + 1)), axis=1).astype(np.int32)
    weight = rng.normal(size=(rows, length, heads, V))
    float32 = [x.astype(np.float32) for x in arrays]
    return Case(tuple(float32), weight.astype(np.float32), segment_ids, time[:, 1:], time[:, :-1], n)


def value_and_grads(function, c: Case, kind: str, scale: float = 0.7):
    """Outputs, and the gradients of sum(weight * outputs) with respect to q, k, v and both bias tables."""

    def total(arrays):
        q, k, v, position, time = arrays
        out = function(q, k, v, c.segment_ids, c.bias(position, time), kind=kind, n=c.n, scale=scale)
        return (c.weight * out).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(c.arrays)
    return np.asarray(out), [np.asarray(g) for g in grads]


def in_float64(c: Case, arrays, kind: str, scale: float) -> np.ndarray:
    """The definition by loops: pairs of one user, key not after query."""
    q, k, v, position, time = (np.asarray(x, np.float64) for x in arrays)
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = [j for j in range(i + 1) if c.segment_ids[b, j] == c.segment_ids[b, i] > 0]
        if not keys:
            continue
        seconds = np.abs(c.query_time[b, i].astype(np.int64) - c.time[b, keys])
        bucket = (np.log(np.maximum(seconds, 1)) / 0.301).astype(int)
        s = k[b, keys, h] @ q[b, i, h] * scale + position[np.array(keys) - i + c.n - 1] + time[bucket]
        weights = s / (1 + np.exp(-s)) / c.n if kind == "silu" else np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        out[b, i, h] = weights @ v[b, keys, h]
    return out


@pytest.mark.parametrize("kind", ["silu", "softmax"])
def test_reference_equals_loops_in_float64(kind):
    c = case(11, longest=6)
    out, grads = value_and_grads(attention_reference, c, kind)
    np.testing.assert_allclose(out, in_float64(c, c.arrays, kind, 0.7), atol=2e-6)
    rng = np.random.default_rng(1)
    for place in range(5):
        direction = rng.normal(size=c.arrays[place].shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = list(c.arrays)
            moved[place] = moved[place] + step * direction
            values.append((c.weight * in_float64(c, moved, kind, 0.7)).sum())
        assert (grads[place] * direction).sum() == pytest.approx((values[0] - values[1]) / 2e-5, rel=2e-4, abs=2e-5)


CASES = [("silu", length, None) for length in (1, 7, 48, 49, 97, 150, 400)]
CASES += [("silu", 1030, 60), ("softmax", 7, None), ("softmax", 150, 40)]


@pytest.mark.parametrize(("kind", "length", "longest"), CASES)
def test_blocks_equal_the_reference(kind, length, longest):
    assert_equals_reference(case(length, longest), kind)


def test_softmax_in_sub_blocks(monkeypatch):
    for name, value in {"_MIN_BLOCK": 8, "_MAX_BLOCK": 8, "_MAX_UNROLLED": 3}.items():
        monkeypatch.setattr(kernel, name, value)  # blocks of 21 queries, each in three sub-blocks of 8
    assert_equals_reference(case(61), "softmax")


def assert_equals_reference(c: Case, kind: str) -> None:
    out, grads = value_and_grads(attention, c, kind)
    expected, expected_grads = value_and_grads(attention_reference, c, kind)
    np.testing.assert_allclose(out, expected, atol=5e-6)
    for name, got, want in zip(("q", "k", "v", "position", "time"), grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, np.abs(want).max()), err_msg=name)
    padding = c.segment_ids == 0
    assert padding[0].any() == (padding.shape[1] > 5) and padding[2:].all()
    assert not np.any(out[padding])
    assert not any(np.any(grad[padding]) for grad in grads[:3])


@pytest.mark.parametrize("kind", ["silu", "softmax"])
def test_no_gradient_from_later_events_or_other_users(kind):
    c = case(110, longest=30)
    i = 100  # in the third block, in a user that starts at 90

    def total(arrays):
        q, k, v, position, time = arrays
        return attention(q, k, v, c.segment_ids, c.bias(position, time), kind=kind, n=c.n)[1, i].sum()

    _, k_grad, v_grad, _, _ = jax.jit(jax.grad(total), compiler_options=QUICK)(c.arrays)
    allowed = np.zeros((3, 110), bool)
    allowed[1, 90 : i + 1] = True
    for grad in (np.asarray(k_grad), np.asarray(v_grad)):
        assert not np.any(grad[~allowed])
        assert np.all(np.any(grad[allowed], axis=-1))


@pytest.mark.parametrize("kind", ["silu", "softmax"])
def test_bfloat16_is_close(kind):
    c = case(60)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in c.arrays[:3])
    bias = c.bias(*map(jnp.asarray, c.arrays[3:]))
    run = jax.jit(lambda *a: attention(*a, c.segment_ids, bias, kind=kind, n=c.n, scale=0.7), compiler_options=QUICK)
    low, high = run(q, k, v), run(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert low.dtype == jnp.bfloat16 and high.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(low, np.float32), high, atol=0.02 * np.abs(high).max())


def test_position_only_and_no_bias():
    c = case(60)
    q, k, v, position, _ = c.arrays

    def outputs(function):
        biases = (Bias(), Bias(jnp.asarray(position)))
        return [function(q, k, v, c.segment_ids, bias, kind="softmax", n=c.n, scale=1.0) for bias in biases]

    got, want = (jax.jit(lambda f=f: outputs(f), compiler_options=QUICK)() for f in (attention, attention_reference))
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_time_bias_without_times_is_an_error():
    c = case(7)
    bias = Bias(time=jnp.asarray(c.arrays[4]))
    with pytest.raises(ValueError, match="needs both"):
        attention(*map(jnp.asarray, c.arrays[:3]), jnp.asarray(c.segment_ids), bias, kind="silu", n=c.n)


def test_time_buckets_stay_in_the_table_for_any_difference():
    ends = np.array([np.iinfo(np.int32).min + 1, np.iinfo(np.int32).max], np.int32)
    np.testing.assert_array_equal(jax.jit(time_bucket)(ends), 71)
