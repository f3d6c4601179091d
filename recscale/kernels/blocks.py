"""Blockwise attention in plain JAX: memory grows linearly with the row, time with the pairs of blocks that can meet.

Long rows are scanned (block_scan.py) with a backward pass of its own. Short rows are a few unrolled blocks of queries,
each over the keys that causality leaves it, differentiated by JAX: what that keeps is little, and on CPU it is faster.
"""

import functools
import math

import jax
import jax.numpy as jnp

from recscale.kernels import block_scan
from recscale.kernels.block_scan import Settings, Sights
from recscale.kernels.dense import attend, heads_first
from recscale.kernels.pairs import Bias, Spans, spans

_SHORT, _SHORT_BLOCK = 256, 64
_CPU_BLOCK, _BLOCK = 128, 512  # a block pair should fit a core's cache; an accelerator wants more work at a time


def attention_blocks(
    q_BLHD, k_BLHD, v_BLHE, segment_ids_BL, bias: Bias, *, kind, n, scale=1.0, window=0, prefix=0, targets_BL=None
):
    """Arguments and result as `recscale.kernels.attention.attention`."""
    c = Settings(kind, n, scale, window, prefix, 0, False)
    arrays = (heads_first(q_BLHD), heads_first(k_BLHD), heads_first(v_BLHE), bias.position, bias.time)
    sights = Sights(*spans(segment_ids_BL, prefix), targets_BL, bias.query_time_BL, bias.time_BL)
    compute = _short if q_BLHD.shape[1] <= _SHORT else _long
    return heads_first(compute(*arrays, sights, c))


def _short(q_BHLD, k_BHLD, v_BHLE, position, time, sights: Sights, c: Settings) -> jax.Array:
    """[B, H, L, E] by unrolled blocks of queries."""
    length = q_BHLD.shape[2]
    block = math.ceil(length / math.ceil(length / _SHORT_BLOCK))
    slots_L = jnp.arange(length)
    outputs = []
    for start in range(0, length, block):
        stop = min(length, start + block)
        lowest = max(0, start - c.window + 1) if c.window and not c.prefix else 0
        query, key = slice(start, stop), slice(lowest, min(length, stop + max(0, c.prefix - 1)))
        seen = Spans(sights.first[:, query], sights.last[:, query])
        times = _columns(sights.query_time, query), _columns(sights.time, key)
        out = attend(
            slots_L[query], q_BHLD[:, :, query], seen, slots_L[key], k_BHLD[:, :, key], v_BHLE[:, :, key],
            _columns(sights.targets, key), Bias(position, time, *times),
            kind=c.kind, n=c.n, scale=c.scale, window=c.window, prefix=c.prefix,
        )  # fmt: skip
        outputs.append(out)
    return jnp.concatenate(outputs, axis=2)


def _columns(x_BL: jax.Array | None, part: slice) -> jax.Array | None:
    return None if x_BL is None else x_BL[:, part]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _long(q_BHLD, k_BHLD, v_BHLE, position, time, sights: Sights, c: Settings) -> jax.Array:
    """[B, H, L, E] by a scan over pairs of blocks."""
    return _forward(q_BHLD, k_BHLD, v_BHLE, position, time, sights, c)[0]


def _forward(q, k, v, position, time, sights: Sights, c: Settings):
    def run(c: Settings, q, k, v, position, time, sights):
        length = q.shape[2]
        q, k, v = (_split(x, c.block) for x in (q, k, v))
        out, log_norm = block_scan.forward(q, k, v, _line(position, length, c), time, _split_sights(sights, c), c)
        return tuple(None if x is None else _join(x, length) for x in (out.astype(v.dtype), log_norm))

    out, log_norm = _by_platform(run, c, q, k, v, position, time, sights)
    return out, (q, k, v, position, time, sights, out if log_norm is not None else None, log_norm)


def _backward(c: Settings, kept, d_out):
    q, k, v, position, time, sights, out, log_norm = kept
    delta = None if out is None else (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)

    def run(c: Settings, q, k, v, position, time, sights, d_out, log_norm, delta):
        length = q.shape[2]
        q, k, v, d_out = (_split(x, c.block) for x in (q, k, v, d_out))
        log_norm, delta = (None if x is None else _split(x, c.block) for x in (log_norm, delta))
        line, seen = _line(position, length, c), _split_sights(sights, c)
        dq, dk, dv, d_line, d_time = block_scan.backward(q, k, v, line, time, seen, c, d_out, log_norm, delta)
        d_position = None
        if d_line is not None:
            d_position = jnp.zeros(position.shape, jnp.float32).at[_distances(length, c)].add(d_line)
        return (*(_join(x, length) for x in (dq, dk, dv)), d_position, d_time)

    grads = _by_platform(run, c, q, k, v, position, time, sights, d_out, log_norm, delta)
    inputs = (q, k, v, position, time)
    return (*(None if g is None else g.astype(x.dtype) for g, x in zip(grads, inputs, strict=True)), None)


_long.defvjp(_forward, _backward)


def _by_platform(run, c: Settings, *arrays):
    """run(settings, *arrays) with the size of a block that suits the platform the program is compiled for."""
    length = arrays[0].shape[2]
    cpu = c._replace(block=_block_size(length, _CPU_BLOCK, 8), gathers=True)
    other = c._replace(block=_block_size(length, _BLOCK, 128), gathers=False)
    return jax.lax.platform_dependent(*arrays, cpu=functools.partial(run, cpu), default=functools.partial(run, other))


def _block_size(length: int, largest: int, multiple: int) -> int:
    """Equal blocks, at most `largest`, so that the padding of the last is short."""
    return math.ceil(length / math.ceil(length / largest) / multiple) * multiple


def _split(x: jax.Array, block: int, axis: int = 2, fill: int = 0) -> jax.Array:
    """[B, .., L, ..] to [N, B, .., Q, ..], padded."""
    count = math.ceil(x.shape[axis] / block)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * block - x.shape[axis])
    shape = (*x.shape[:axis], count, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, widths, constant_values=fill).reshape(shape), axis, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """[N, B, H, Q, ..] to [B, H, L, ..]."""
    moved = jnp.moveaxis(x, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])[:, :, :length]


def _split_sights(sights: Sights, c: Settings) -> Sights:
    """What is added to fill the last block sees nothing, as padding does."""
    length = sights.first.shape[1]
    targets, query_time, time = (None if x is None else _split(x, c.block, axis=1) for x in sights[2:])
    first, last = _split(sights.first, c.block, 1, fill=length), _split(sights.last, c.block, 1, fill=-1)
    return Sights(first, last, targets, query_time, time)


def _distances(length: int, c: Settings) -> jax.Array:
    """Entries of the position table for the distances -NQ .. NQ - 1."""
    reach = math.ceil(length / c.block) * c.block
    return jnp.clip(jnp.arange(-reach, reach) + (c.n - 1), 0, 2 * c.n - 2)


def _line(position: jax.Array | None, length: int, c: Settings) -> jax.Array | None:
    return None if position is None else position[_distances(length, c)]
