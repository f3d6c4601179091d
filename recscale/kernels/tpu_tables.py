"""Gradients of the bias tables on TPUs: one pass over the tiles, ordered by the distance of their blocks.

Score gradients of the tiles of one distance are added up, over rows, blocks and heads, and summed along their diagonals
afterwards. The time buckets that occur in a tile, few where times are in order, are summed one by one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recscale.kernels import tiles
from recscale.kernels.tiles import BUCKETS, Options
from recscale.kernels.tpu_tile import gradients_of


def table_gradients(c: Any, position, time, options: Options):
    """Gradients of both tables, float32, None for an absent one; c: the padded arrays of `pallas_tpu`."""
    if position is None and time is None:
        return None, None
    size = min(c.block_q, c.block_kv)
    ranges = tiles.make_ranges(c.plan, options, size, size).queries
    ahead, behind = tiles.diagonals(c.length, size, options)
    N, blocks = ahead + behind + 1, c.length // size

    def needed(d, b, i, ranges):
        return tiles.meet([ranges[(b * blocks + i) * 4 + part] for part in range(4)], i + ahead - d)

    def spec(shape, index):
        def of_step(d, b, i, h, ranges):  # a step that is passed over asks for nothing new
            return index(*(jnp.where(needed(d, b, i, ranges), x, 0) for x in (b, h, i, i + ahead - d)))

        return pl.BlockSpec(shape, of_step)

    def per_query(width):
        return spec((None, None, size, width), lambda b, h, i, j: (b, h, i, 0))

    def per_key(width):
        return spec((None, None, size, width), lambda b, h, i, j: (b, h, j, 0))

    slices, D, E = None, c.q.shape[3], c.v.shape[3]
    if position is not None:
        slices = tiles.windows(position, c.length, size, size, options, transposed=False)
    start = blocks - 1
    inputs = [
        (c.q, per_query(D)), (c.k, per_key(D)), (c.v, per_key(E)), (c.out_gradient, per_query(E)),
        (c.stats_array, spec((None, None, 2, size), lambda b, h, i, j: (b, h, 0, i))),
        (c.plan.queries, spec((None, 3, size), lambda b, h, i, j: (b, 0, i))),
        (c.plan.keys, spec((None, 2, size), lambda b, h, i, j: (b, 0, j))),
        (slices, pl.BlockSpec((None, 1, 2 * size), lambda d, b, i, h, ranges: (start + ahead - d, 0, 0))),
        (c.time, pl.BlockSpec((1, BUCKETS), lambda d, b, i, h, ranges: (0, 0))),
    ]  # fmt: skip
    present = tuple(array is not None for array, _ in inputs)
    heights = {"position": size} if position is not None else {}
    heights |= {"time": BUCKETS} if time is not None else {}

    def kernel(ranges, *refs):
        d, b, i = (pl.program_id(axis) for axis in range(3))
        given = iter(refs)
        known = [next(given) if here else None for here in present]
        sums = {name: next(given) for name in heights}
        _table_kernel(options, i, i + ahead - d, needed(d, b, i, ranges), known, sums, *given)

    pairs = c.B * c.H * c.length * (c.length + 1) // 2
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array, _ in inputs if array is not None)
    sums = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((N, height, size), jnp.float32) for height in heights.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N, c.B, blocks, c.H),
            in_specs=[spec for array, spec in inputs if array is not None],
            out_specs=[
                pl.BlockSpec((None, height, size), lambda d, b, i, h, ranges: (d, 0, 0)) for height in heights.values()
            ],
            scratch_shapes=[pltpu.VMEM((size, size), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY, pltpu.ARBITRARY, pltpu.ARBITRARY)
        ),
        cost_estimate=pl.CostEstimate(flops=pairs * 2 * (D + E), transcendentals=pairs, bytes_accessed=moved),
        interpret=options.interpret,
        name=f"attention_{options.kind}_table_kernel",
    )(ranges.reshape(-1), *(array for array, _ in inputs if array is not None))
    by_name = dict(zip(heights, sums, strict=True))
    return (
        tiles.position_gradient(by_name["position"], ahead, options.n) if position is not None else None,
        tiles.time_gradient(by_name["time"].sum(axis=(0, 2))) if time is not None else None,
    )


def _table_kernel(options: Options, i, j, needed, inputs, sums, heads):
    """Add the score gradients of a tile, summed over the heads, to the sums by pair of slots and by time bucket."""
    h = pl.program_id(3)

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0) & (h == 0))
    def _():
        for total in sums.values():
            total[...] = jnp.zeros_like(total)

    @pl.when(needed)
    def _():
        _, slopes, mask, bucket = gradients_of(inputs, i, j, options, queries_in_rows=True)
        heads[...] = jnp.where(h == 0, slopes, heads[...] + slopes)

        @pl.when(h == pl.num_programs(3) - 1)
        def _():
            if "position" in sums:
                sums["position"][...] += heads[...]
            if "time" in sums:
                _add_by_bucket(sums["time"], heads, mask, bucket)


def _add_by_bucket(sums, slopes, mask, bucket):
    """Bucket by bucket over those that occur in the tile: few, unless the times are out of order."""

    def add(x, _):
        sums[pl.ds(x, 1), :] += jnp.where(bucket == x, slopes[...], 0.0).sum(axis=0, keepdims=True)

    first, last = jnp.where(mask, bucket, BUCKETS).min(), jnp.where(mask, bucket, -1).max()
    jax.lax.fori_loop(first, last + 1, add, None)
