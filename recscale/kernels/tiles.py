"""What the Pallas kernels of attention share: facts of the positions, which blocks meet, the maths of a tile.

A tile is a block of queries against a block of keys. The numbers of `Tile` broadcast against each other, so a kernel
may hold a tile with its queries in the rows or in the columns.

Shapes: B rows, L positions, I blocks of queries, J blocks of keys, N distances of two blocks, S positions of a block.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recscale.kernels.pairs import NUM_TIME_BUCKETS, spans

FIRST, LAST, QUERY_TIME = range(3)  # rows of Plan.queries
HIDDEN, TIME = range(2)  # rows of Plan.keys
BUCKETS = 128
"""Entries of the time table that are looked up: int32 seconds reach 72 of its 129."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a kernel is compiled for. targets, time: whether there are candidates and a time bias."""

    kind: str
    n: int
    scale: float
    window: int
    prefix: int
    targets: bool
    time: bool
    block_q: int | None = None
    block_kv: int | None = None
    interpret: bool = False

    @property
    def softmax(self) -> bool:
        """Whether the weights are normalised, which takes statistics of every query."""
        return self.kind == "softmax"


class Plan(NamedTuple):
    """Facts of positions, int32. queries: [B, 3, L], rows FIRST.. above. keys: [B, 2, L], rows HIDDEN, TIME."""

    queries: jax.Array
    keys: jax.Array


class Ranges(NamedTuple):
    """Which blocks meet. queries: [B, I, 4], (a, m, b, total): the key blocks of a block of queries are m from a on
    and total - m from b on. keys: [B, J, 2]: the first query block of a block of keys, and how many follow."""

    queries: jax.Array
    keys: jax.Array


def make_plan(segment_ids_BL, query_time_BL, time_BL, targets_BL, options: Options) -> Plan:
    """Facts of every position of packed rows."""
    seen, zeros = spans(segment_ids_BL, options.prefix), jnp.zeros(segment_ids_BL.shape, jnp.int32)
    queries = [seen.first_BL, seen.last_BL, query_time_BL if options.time else zeros]
    keys = [targets_BL if options.targets else zeros, time_BL if options.time else zeros]
    return Plan(*(jnp.stack([x.astype(jnp.int32) for x in facts], axis=1) for facts in (queries, keys)))


def pad_plan(plan: Plan, length: int) -> Plan:
    """The plan of rows padded to `length`; the new positions see nothing."""
    extra = length - plan.queries.shape[2]
    if not extra:
        return plan
    nothing = jnp.array([length, -1, 0], jnp.int32)[None, :, None]
    nothing = jnp.broadcast_to(nothing, (plan.queries.shape[0], 3, extra))
    return Plan(jnp.concatenate([plan.queries, nothing], axis=2), jnp.pad(plan.keys, ((0, 0), (0, 0), (0, extra))))


def _least(x_BL: jax.Array, size: int) -> jax.Array:
    return x_BL.reshape(x_BL.shape[0], -1, size).min(axis=2)


def _most(x_BL: jax.Array, size: int) -> jax.Array:
    return x_BL.reshape(x_BL.shape[0], -1, size).max(axis=2)


def make_ranges(plan: Plan, options: Options, block_q: int, block_kv: int) -> Ranges:
    """Which blocks meet, by the least and largest slot that a block's positions reach; L is a multiple of both."""
    slot_BL = jnp.broadcast_to(jnp.arange(plan.queries.shape[2], dtype=jnp.int32), plan.keys[:, 0].shape)
    first_BL, last_BL = plan.queries[:, FIRST], plan.queries[:, LAST]
    return Ranges(
        _ranges_of_queries(slot_BL, first_BL, last_BL, options, block_q, block_kv),
        _ranges_of_keys(slot_BL, first_BL, last_BL, plan.keys[:, HIDDEN], options, block_q, block_kv),
    )


def _ranges_of_queries(slot_BL, first_BL, last_BL, options: Options, block_q: int, block_kv: int) -> jax.Array:
    end = slot_BL.shape[1] - 1
    near_BL = jnp.maximum(first_BL, slot_BL - options.window + 1) if options.window else first_BL
    b = jnp.minimum(_least(near_BL, block_q), end) // block_kv
    last = _most(last_BL, block_q)
    count = jnp.where(last < 0, 0, last // block_kv + 1 - b)
    if not (options.window and options.prefix):
        return jnp.stack([b, jnp.zeros_like(b), b, count], axis=2)
    # beside the window, the prefixes of users that began before it
    edge = b * block_kv
    earlier_BL = first_BL < jnp.repeat(edge, block_q, axis=1)
    reach = jnp.minimum(_most(jnp.where(earlier_BL, first_BL + options.prefix, 0), block_q), edge)
    a = jnp.minimum(_least(first_BL, block_q), end) // block_kv
    m = jnp.where(reach > 0, jnp.maximum(-(-reach // block_kv) - a, 0), 0)
    return jnp.stack([a, m, b, m + count], axis=2)


def _ranges_of_keys(slot_BL, first_BL, last_BL, hidden_BL, options: Options, block_q: int, block_kv: int) -> jax.Array:
    B, length = slot_BL.shape
    seen_BL = last_BL >= 0
    following_BL = jnp.concatenate([first_BL[:, 1:], jnp.full((B, 1), length + 1, first_BL.dtype)], axis=1)
    ends_BL = jnp.where(seen_BL & (following_BL != first_BL), slot_BL, length - 1)
    end_BL = jax.lax.cummin(ends_BL, axis=1, reverse=True)
    from_BL, to_BL = slot_BL, end_BL
    if options.window:
        to_BL = jnp.minimum(end_BL, slot_BL + options.window - 1)
    if options.prefix:
        everyone_BL = slot_BL < first_BL + options.prefix
        from_BL, to_BL = jnp.where(everyone_BL, first_BL, from_BL), jnp.where(everyone_BL, end_BL, to_BL)
    if options.targets:
        from_BL, to_BL = (jnp.where(hidden_BL > 0, slot_BL, x) for x in (from_BL, to_BL))
    start = jnp.minimum(_least(jnp.where(seen_BL, from_BL, length), block_kv), length - 1) // block_q
    to = _most(jnp.where(seen_BL, to_BL, -1), block_kv)
    return jnp.stack([start, jnp.where(to < 0, 0, to // block_q + 1 - start)], axis=2)


def key_block(a, m, b, step):
    """The key block that a step of the range (a, m, b, total) of a query block is about."""
    return jnp.where(step < m, a + step, b + step - m)


def meet(ranges, key):
    """Whether a key block is in the range (a, m, b, total) of a query block."""
    a, m, b, total = ranges
    return ((key >= a) & (key < a + m)) | ((key >= b) & (key < b + total - m))


class Tile(NamedTuple):
    """Numbers of a tile's queries and keys, shaped to broadcast: slots i and j, facts, times; stats of softmax."""

    i: jax.Array
    j: jax.Array
    first: jax.Array
    last: jax.Array
    hidden: Any = None
    query_time: Any = None
    time: Any = None
    logsumexp: Any = None
    delta: Any = None


def visible(t: Tile, options: Options) -> jax.Array:
    """Which pairs of the tile see each other."""
    mask = (t.j >= t.first) & (t.j <= t.last)
    if options.window:
        near = t.i - t.j < options.window
        mask &= (near | (t.j < t.first + options.prefix)) if options.prefix else near
    if options.targets:
        mask &= (t.hidden == 0) | (t.i == t.j)
    return mask


def silu(scores: jax.Array, n: int, tanh=jnp.tanh) -> jax.Array:
    """silu(scores) / n."""
    half = scores * 0.5
    return (half + half * tanh(half)) * (1.0 / n)


def weights_and_slopes(scores, products, mask, t: Tile, options: Options, tanh=jnp.tanh):
    """(weights, gradient of the scores) of a tile, float32; products: of the outputs' gradients with the values."""
    if options.softmax:
        weights = jnp.where(mask, jnp.exp(scores - t.logsumexp), 0.0)
        return weights, weights * (products - t.delta)
    gate = 0.5 + 0.5 * tanh(scores * 0.5)
    plain = gate * scores
    slope = gate + plain * (1.0 - gate)
    scale = 1.0 / options.n
    return jnp.where(mask, plain * scale, 0.0), jnp.where(mask, slope * products * scale, 0.0)


def padded_length(length: int, block_q: int, block_kv: int) -> int:
    """The least multiple of both blocks that holds the row."""
    return math.lcm(block_q, block_kv) * math.ceil(length / math.lcm(block_q, block_kv))


def diagonals(length: int, size: int, options: Options) -> tuple[int, int]:
    """(most key blocks after the query's, most before it) of square blocks that meet, for any segments."""
    count = length // size
    ahead = min(count - 1, math.ceil((options.prefix - 1) / size)) if options.prefix > 1 else 0
    behind = count - 1
    if options.window and not options.prefix:
        behind = min(behind, math.ceil((options.window - 1) / size))
    return ahead, behind


def position_gradient(tiles: jax.Array, ahead: int, n: int) -> jax.Array:
    """Sums along the diagonals of [N, S, S] score gradients: [2n - 1]. Tile N: query block - key block = N - ahead."""
    count, size, _ = tiles.shape
    sheared = jnp.pad(tiles[:, ::-1], ((0, 0), (0, 0), (0, size))).reshape(count, -1)[:, :-size]
    sums = sheared.reshape(count, size, 2 * size - 1).sum(axis=1)  # entry e: key slot - query slot = e - (size - 1)
    distance = jnp.arange(2 * size - 1)[None] - (size - 1) - (jnp.arange(count)[:, None] - ahead) * size
    return jnp.zeros(2 * n - 1, jnp.float32).at[jnp.clip(distance + n - 1, 0, 2 * n - 2)].add(sums)


def time_gradient(sums: jax.Array) -> jax.Array:
    """[..., BUCKETS] sums of score gradients by bucket to the gradient of the table, [129]."""
    total = sums.reshape(-1, BUCKETS).sum(axis=0)
    return jnp.pad(total, (0, NUM_TIME_BUCKETS - BUCKETS))


def windows(position, length: int, block_q: int, block_kv: int, options: Options, transposed: bool):
    """([N, 1, block_q + block_kv], key slots ahead): slices of the position table, one per distance of two blocks.

    Row N serves key slot - query slot of the blocks' starts = N * gcd - (length - block_q). Rolled by its row, a slice
    is the bias of a tile (`expand` in pallas_tpu): no table lookup by pair. Linear in the length.
    """
    step = math.gcd(block_q, block_kv)
    ahead = min(length, block_q + max(options.prefix, 1))
    start = jnp.arange(-(length - block_q), ahead + 1, step)[:, None]
    x = jnp.arange(block_q + block_kv)[None]
    distance = start + (block_kv - x if transposed else x - block_q)
    return position.astype(jnp.float32)[jnp.clip(distance + options.n - 1, 0, 2 * options.n - 2)][:, None]
