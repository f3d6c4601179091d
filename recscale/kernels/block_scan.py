"""Attention block by block: forward and backward passes that keep numbers per position, never one per pair.

A step works on a block of queries by a block of keys. One scan walks the block pairs that the causal mask and the
window can reach, adds each to its queries' sums, and skips those in which no query of the batch sees a key (other
users, padding, a window's far side). The backward pass walks the same pairs and computes their scores again.

Shapes: N blocks of Q positions (the row, padded), P pairs of blocks; B rows, H heads, D width of a head's keys, E of
its values, K keys of a block (as many as Q).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recscale.kernels.pairs import NUM_TIME_BUCKETS, Spans, time_entry, visible

_LOW = -1e30
_REACHED = 72  # time buckets that differences of int32 seconds fall in


class Settings(NamedTuple):
    """What is not an array. block: Q. gathers: look biases up by gather and scatter, else by comparison (see below)."""

    kind: str
    n: int
    scale: float
    window: int
    prefix: int
    block: int
    gathers: bool


class Sights(NamedTuple):
    """Per position and without gradient, in blocks [N, B, Q]: spans, targets, times (None where there are none)."""

    first: jax.Array
    last: jax.Array
    targets: jax.Array | None
    query_time: jax.Array | None
    time: jax.Array | None


def reachable(blocks: int, c: Settings) -> np.ndarray:
    """The pairs [P, 2] (query block, key block) that causality and window allow, whoever the users are."""
    query, key = np.meshgrid(np.arange(blocks), np.arange(blocks), indexing="ij")
    keep = key * c.block <= query * c.block + c.block - 1 + max(0, c.prefix - 1)
    if c.window and not c.prefix:
        keep &= query * c.block - (key * c.block + c.block - 1) < c.window
    return np.stack([query[keep], key[keep]], axis=1).astype(np.int32)


def needed(sights: Sights, pairs: np.ndarray, c: Settings) -> jax.Array:
    """Whether any query of the one block sees a key of the other, bool [P]."""
    blocks = sights.first.shape[0]
    first, last = sights.first[..., None], sights.last[..., None]  # [N, B, Q, 1] against [1, 1, 1, N] key blocks
    low = c.block * jnp.arange(blocks).reshape(1, 1, 1, -1)
    seen = (first < low + c.block) & (last >= low)
    if c.window:
        i = jnp.arange(blocks * c.block).reshape(blocks, 1, c.block, 1)
        seen &= (i - (low + c.block - 1) < c.window) | (first + c.prefix > low)
    return seen.any(axis=(1, 2))[pairs[:, 0], pairs[:, 1]]


def _look_up(table: jax.Array, entry: jax.Array, c: Settings) -> jax.Array:
    """table[entry] of the time table.

    Accelerators compare with every bucket: that stays in registers, where a gather of single numbers goes one by one on
    a TPU and the scatter of its gradient queues on a GPU.
    """
    if c.gathers:
        return table.at[entry].get(mode="promise_in_bounds")
    buckets = jnp.arange(_REACHED).reshape(-1, *(1,) * entry.ndim)
    return jnp.where(entry[None] == buckets, table[:_REACHED].reshape(buckets.shape), 0.0).sum(axis=0)


def _sums_by_entry(x_BQK: jax.Array, entry: jax.Array, c: Settings) -> jax.Array:
    """The transpose of `_look_up`, by row: [B, 129]."""
    if c.gathers:
        zeros = jnp.zeros((x_BQK.shape[0], NUM_TIME_BUCKETS), x_BQK.dtype)
        return jax.vmap(lambda z, e, x: z.at[e].add(x, mode="promise_in_bounds"))(zeros, entry, x_BQK)
    buckets = jnp.arange(_REACHED).reshape(-1, 1, 1, 1)
    sums = jnp.where(entry[None] == buckets, x_BQK[None], 0.0).sum(axis=(2, 3)).T
    return jnp.pad(sums, ((0, 0), (0, NUM_TIME_BUCKETS - _REACHED)))


def _toeplitz(line: jax.Array) -> jax.Array:
    """[Q, Q] from [2Q], entry (i, j) = line[j - i + Q], by one copy and no gather."""
    size = line.shape[0] // 2
    rolled = jnp.roll(line, size)  # distance d at place d modulo 2Q
    return jnp.tile(rolled, size)[: size * (2 * size - 1)].reshape(size, 2 * size - 1)[:, :size]


def _diagonal_sums(square: jax.Array) -> jax.Array:
    """The transpose of `_toeplitz`, by row: [B, 2Q] from [B, Q, Q]."""
    rows, size = square.shape[:2]
    flat = jnp.pad(square, ((0, 0), (0, 0), (0, size - 1))).reshape(rows, -1)
    return jnp.roll(jnp.pad(flat, ((0, 0), (0, size))).reshape(rows, size, 2 * size).sum(axis=1), -size, axis=1)


def _line_start(pair: jax.Array, blocks: int, c: Settings) -> jax.Array:
    """Where the 2Q distances of a pair of blocks begin in the line of all 2NQ."""
    return (pair[1] - pair[0] + blocks - 1) * c.block


def _product(equation: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _scores(pair, q, k, line, time, sights: Sights, c: Settings):
    """Scores [B, H, Q, K] of a pair of blocks, their mask [B, 1, Q, K] and time entries [B, Q, K]."""
    here, there = pair[0], pair[1]
    i_Q, j_K = here * c.block + jnp.arange(c.block), there * c.block + jnp.arange(c.block)
    spans = Spans(sights.first[here], sights.last[here])
    targets = None if sights.targets is None else sights.targets[there]
    mask = visible(spans, i_Q, j_K, c.window, c.prefix, targets)[:, None]
    scores = _product("bhqd,bhkd->bhqk", q[here], k[there]) * c.scale
    if line is not None:
        piece = jax.lax.dynamic_slice(line, (_line_start(pair, q.shape[0], c),), (2 * c.block,))
        scores += _toeplitz(piece)[None, None]
    if time is None or sights.query_time is None or sights.time is None:
        return scores, mask, None
    entry = time_entry(sights.query_time[here], sights.time[there])
    scores += _look_up(time, entry, c)[:, None]
    return scores, mask, entry


class Kind(NamedTuple):
    """begin(shape of the output's sums) -> sums; step(sums, scores, mask, v, c) -> sums; end(sums) -> output and what
    the backward pass needs per query; back(scores, mask, gradient of the weights, that, output's share, c) -> weights
    and gradient of the scores."""

    begin: Callable
    step: Callable
    end: Callable
    back: Callable


def _silu_begin(shape):
    return (jnp.zeros(shape, jnp.float32),)


def _silu_step(sums, scores, mask, v, c: Settings):
    half = 0.5 * scores
    weights = jnp.where(mask, (half + half * jnp.tanh(half)) * (1 / c.n), 0.0)
    return (sums[0] + _product("bhqk,bhke->bhqe", weights.astype(v.dtype), v),)


def _silu_end(sums):
    return sums[0], None


def _silu_back(scores, mask, d_weights, kept, c: Settings):
    del kept
    half = 0.5 * scores
    tanh = jnp.tanh(half)
    gate = jnp.where(mask, (0.5 / c.n) * (1 + tanh), 0.0)
    return gate * scores, d_weights * gate * (1 + half * (1 - tanh))


def _softmax_begin(shape):  # a largest score above _LOW: what is masked weighs exp(-1e30 + 1e20) = 0
    return jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], -1e20), jnp.zeros(shape[:-1], jnp.float32)


def _softmax_step(sums, scores, mask, v, c: Settings):
    total, top, norm = sums
    scores = jnp.where(mask, scores, _LOW)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.exp(scores - new_top[..., None])
    decay = jnp.exp(top - new_top)
    total = total * decay[..., None] + _product("bhqk,bhke->bhqe", weights.astype(v.dtype), v)
    return total, new_top, norm * decay + weights.sum(axis=-1)


def _softmax_end(sums):
    total, top, norm = sums
    norm = jnp.maximum(norm, 1e-30)
    return total / norm[..., None], top + jnp.log(norm)


def _softmax_back(scores, mask, d_weights, kept, c: Settings):
    log_norm, delta = kept
    weights = jnp.where(mask, jnp.exp(scores - log_norm[..., None]), 0.0)
    return weights, weights * (d_weights - delta[..., None])


KINDS = {
    "silu": Kind(_silu_begin, _silu_step, _silu_end, _silu_back),
    "softmax": Kind(_softmax_begin, _softmax_step, _softmax_end, _softmax_back),
}


def forward(q, k, v, line, time, sights: Sights, c: Settings):
    """Outputs [N, B, H, Q, E], float32, and the logarithms of the softmax's sums [N, B, H, Q] (None for silu).

    q, k: [N, B, H, Q, D]; v: [N, B, H, Q, E]. line: [2NQ], position bias of distance j - i at NQ + j - i. time: [129],
    the time bias. Either may be None.
    """
    kind = KINDS[c.kind]
    pairs = reachable(q.shape[0], c)

    def visit(sums, pair_and_needed):
        pair, wanted = pair_and_needed

        def compute(mine):
            scores, mask, _ = _scores(pair, q, k, line, time, sights, c)
            return kind.step(mine, scores, mask, v[pair[1]], c)

        mine = jax.lax.cond(wanted, compute, lambda mine: mine, tuple(x[pair[0]] for x in sums))
        return tuple(_put(x, new, pair[0]) for x, new in zip(sums, mine, strict=True)), None

    begin = kind.begin((*q.shape[:-1], v.shape[-1]))
    sums, _ = jax.lax.scan(visit, begin, (pairs, needed(sights, pairs, c)))
    return kind.end(sums)


def backward(q, k, v, line, time, sights: Sights, c: Settings, d_out, log_norm, delta):
    """Gradients of q, k, v, line [2NQ] and time [129], float32.

    d_out: gradient of the outputs. For softmax, log_norm as of `forward` and delta [N, B, H, Q], the sum over E of
    output times gradient. The tables' gradients are kept by row of the batch until the end: where rows lie on several
    devices these then meet once.
    """
    pairs = reachable(q.shape[0], c)

    def compute(mine, pair):
        here, there = pair[0], pair[1]
        dq, dk, dv, d_line, d_time = mine
        scores, mask, entry = _scores(pair, q, k, line, time, sights, c)
        d_weights = _product("bhqe,bhke->bhqk", d_out[here], v[there])
        per_query = None if delta is None else (log_norm[here], delta[here])
        weights, d_scores = KINDS[c.kind].back(scores, mask, d_weights, per_query, c)
        dv += _product("bhqk,bhqe->bhke", weights.astype(v.dtype), d_out[here])
        if d_line is not None:
            d_line += _diagonal_sums(d_scores.sum(axis=1))
        if entry is not None:
            d_time += _sums_by_entry(d_scores.sum(axis=1), entry, c)
        low = (c.scale * d_scores).astype(q.dtype)
        dq += _product("bhqk,bhkd->bhqd", low, k[there])
        dk += _product("bhqk,bhqd->bhkd", low, q[here])
        return dq, dk, dv, d_line, d_time

    def visit(grads, pair_and_needed):
        pair, wanted = pair_and_needed
        here, there = pair[0], pair[1]
        dq, dk, dv, d_line, d_time = grads
        at = _line_start(pair, q.shape[0], c)
        piece = None if line is None else jax.lax.dynamic_slice_in_dim(d_line, at, 2 * c.block, axis=1)
        mine = (dq[here], dk[there], dv[there], piece, d_time)
        new = jax.lax.cond(wanted, lambda mine: compute(mine, pair), lambda mine: mine, mine)
        d_line = None if line is None else jax.lax.dynamic_update_slice_in_dim(d_line, new[3], at, axis=1)
        return (_put(dq, new[0], here), _put(dk, new[1], there), _put(dv, new[2], there), d_line, new[4]), None

    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    d_line, d_time = (None if x is None else jnp.zeros((q.shape[1], x.shape[0]), jnp.float32) for x in (line, time))
    zeros = (dq, dk, dv, d_line, d_time)
    (dq, dk, dv, d_line, d_time), _ = jax.lax.scan(visit, zeros, (pairs, needed(sights, pairs, c)))
    return dq, dk, dv, *(None if x is None else x.sum(axis=0) for x in (d_line, d_time))


def _put(x: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, block, at, 0)
