"""Cases of attention, and its definition by loops: for the tests of every implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from recscale.kernels.attention import Bias, attention

QUICK = {"xla_backend_optimization_level": 0}  # these tests compile much and compute little
NAMES = ("q", "k", "v", "position", "time")
MASKS: dict[str, dict] = {
    "causal": {},
    "window": {"window": 5},
    "prefix": {"prefix": 4},
    "window and prefix": {"window": 6, "prefix": 3},
    "targets": {"targets": True},
    "all": {"window": 7, "prefix": 2, "targets": True},
}


@dataclasses.dataclass
class Case:
    """Rows of packed users: row 0 packed with a ragged tail, row 1 full, row 2 empty; a long case has only row 0."""

    arrays: tuple[np.ndarray, ...]  # q, k, v, position bias, time bias
    weight: np.ndarray  # of the outputs in the scalar that is differentiated
    segment_ids: np.ndarray
    query_time: np.ndarray
    time: np.ndarray
    targets: np.ndarray
    n: int

    def bias(self, position, time) -> Bias:
        return Bias(position, time, jnp.asarray(self.query_time), jnp.asarray(self.time))

    def options(self, mask: str) -> dict:
        """Keyword arguments of `attention` for a name of MASKS."""
        found = MASKS[mask] | {"n": self.n}
        return {k: v for k, v in found.items() if k != "targets"} | {
            "targets_BL": jnp.asarray(self.targets) if "targets" in found else None
        }


def case(length: int, longest: int | None = None, qk: int = 3, v: int = 2) -> Case:
    """`longest` bounds the users' lengths: rows may be longer than the reach n of the position bias.

    A quarter of the positions are targets, most of them at the end of their users.
    """
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
    arrays = [rng.normal(size=(rows, length, heads, d)) for d in (qk, qk, v)]
    arrays += [rng.normal(size=2 * n - 1), rng.normal(size=129)]
    time = np.cumsum(rng.integers(0, 5000, (rows, length + 1)), axis=1).astype(np.int32)
    weight = rng.normal(size=(rows, length, heads, v))
    targets = rng.random((rows, length)) < 0.25
    float32 = [x.astype(np.float32) for x in arrays]
    weight = weight.astype(np.float32)
    return Case(tuple(float32), weight, segment_ids, time[:, 1:], time[:, :-1], targets, n)


def value_and_grads(c: Case, kind: str, implementation: str, mask: str = "causal", scale=0.7, dtype=np.float32):
    """Outputs, and the gradients of sum(weight * outputs) with respect to q, k, v and both bias tables, as float32."""

    def total(arrays):
        q, k, v, position, time = arrays
        bias = c.bias(position, time)
        out = attention(
            q, k, v, c.segment_ids, bias, kind=kind, scale=scale, implementation=implementation, **c.options(mask)
        )
        return (c.weight * out).sum(), out

    arrays = [jnp.asarray(x, dtype) for x in c.arrays[:3]] + list(c.arrays[3:])
    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(arrays)
    assert out.dtype == dtype and [g.dtype for g in grads] == [dtype] * 3 + [np.float32] * 2
    return np.asarray(out, np.float32), [np.asarray(g, np.float32) for g in grads]


def keys_seen(c: Case, mask: str, b: int, i: int) -> list[int]:
    """The keys of a query, by the words of the definition."""
    options = MASKS[mask]
    window, prefix = options.get("window", 0), options.get("prefix", 0)
    user = [j for j in range(c.segment_ids.shape[1]) if c.segment_ids[b, j] == c.segment_ids[b, i] > 0]
    seen = []
    for j in user:
        before = j <= i or (user.index(j) < prefix and user.index(i) < prefix)
        near = not window or i - j < window or user.index(j) < prefix
        single = "targets" not in options or not c.targets[b, j] or j == i
        if before and near and single:
            seen.append(j)
    return seen


def in_float64(c: Case, arrays, kind: str, mask: str, scale: float = 0.7) -> np.ndarray:
    """The definition by loops over rows, queries and heads."""
    q, k, v, position, time = (np.asarray(x, np.float64) for x in arrays)
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i in np.ndindex(q.shape[:2]):
        keys = keys_seen(c, mask, b, i)
        if not keys:
            continue
        seconds = np.abs(c.query_time[b, i].astype(np.int64) - c.time[b, keys])
        bucket = (np.log(np.maximum(seconds, 1)) / 0.301).astype(int)
        place = np.clip(np.array(keys) - i + c.n - 1, 0, 2 * c.n - 2)
        for h in range(q.shape[2]):
            s = k[b, keys, h] @ q[b, i, h] * scale + position[place] + time[bucket]
            weights = s / (1 + np.exp(-s)) / c.n if kind == "silu" else np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            out[b, i, h] = weights @ v[b, keys, h]
    return out


def assert_equals_reference(c: Case, kind: str, mask: str, implementation: str, dtype=np.float32, tolerance=1e-5):
    """Values and gradients against "einsum"; padding gives and gets exact zeros."""
    out, grads = value_and_grads(c, kind, implementation, mask, dtype=dtype)
    expected, expected_grads = value_and_grads(c, kind, "einsum", mask, dtype=dtype)
    np.testing.assert_allclose(out, expected, atol=0.5 * tolerance * max(1.0, np.abs(expected).max()))
    for name, got, want in zip(NAMES, grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance * max(1.0, np.abs(want).max()), err_msg=name)
    padding = c.segment_ids == 0
    assert not np.any(out[padding])
    assert not any(np.any(grad[padding]) for grad in grads[:3])
