"""Attention kernels for TPUs (Pallas, Mosaic): forward, and backward in three passes (queries, keys, bias tables).

The grid walks, for every block, only as many blocks of the other side as the widest range of the batch has
(`tiles.Ranges`, prefetched scalars), and steps beyond a block's own range do nothing and load nothing. Nothing of the
size of all pairs is ever in memory.

Shapes: as in `tiles`; heads first, [B, H, L, D], inside this module.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recscale.kernels import tiles
from recscale.kernels.tiles import BUCKETS, Options, Plan
from recscale.kernels.tpu_tables import table_gradients
from recscale.kernels.tpu_tile import gradients_of, make_tile, product, scores_of

_BLOCK = 256
_NOTHING = -1e30
_PARALLEL, _ORDERED = pltpu.PARALLEL, pltpu.ARBITRARY


def forward(q, k, v, position, time, plan: Plan, options: Options):
    """(outputs [B, L, H, E], logsumexp [B, H, L] or None) of attention; arguments as in `pallas_attention`."""
    c = _Call(q, k, v, position, time, plan, options)
    width = v.shape[3]
    shapes = [jax.ShapeDtypeStruct((c.B, c.H, c.length, width), v.dtype)]
    specs = [c.per_query(width, by_query=True)]
    scratch = [pltpu.VMEM((c.block_q, width), jnp.float32)]
    if options.softmax:
        shapes.append(jax.ShapeDtypeStruct((c.B, c.H, 1, c.length), jnp.float32))
        specs.append(c.stats(1, by_query=True))
        scratch += [pltpu.VMEM((c.block_q, 1), jnp.float32)] * 2
    out = c.run(_forward_kernel, c.inputs(by_query=True), shapes, specs, scratch, by_query=True, products=2)
    logsumexp = out[1][:, :, 0, : c.unpadded] if options.softmax else None
    return c.heads_last(out[0]), logsumexp


def backward(q, k, v, position, time, plan: Plan, out, logsumexp, out_gradient, options: Options):
    """Gradients of (q, k, v, position, time), the tables' float32; out, logsumexp: of `forward`."""
    c = _Call(q, k, v, position, time, plan, options, out_gradient)
    if options.softmax:
        delta_BHL = jnp.einsum("blhe,blhe->bhl", out, out_gradient, preferred_element_type=jnp.float32)
        c.stats_array = c.pad(jnp.stack([logsumexp, delta_BHL], axis=2), 3)
    like_q, like_k, like_v = (jax.ShapeDtypeStruct((c.B, c.H, c.length, x.shape[3]), x.dtype) for x in (q, k, v))
    D, E = q.shape[3], v.shape[3]
    scratch = [pltpu.VMEM((c.block_q, D), jnp.float32)]
    spec = c.per_query(D, by_query=True)
    (dq,) = c.run(_query_kernel, c.inputs(by_query=True), [like_q], [spec], scratch, by_query=True, products=3)
    scratch = [pltpu.VMEM((c.block_kv, x), jnp.float32) for x in (D, E)]
    specs = [c.per_key(x, by_query=False) for x in (D, E)]
    inputs = c.inputs(by_query=False)
    dk, dv = c.run(_key_kernel, inputs, [like_k, like_v], specs, scratch, by_query=False, products=4)
    tables = table_gradients(c, position, time, options)
    return c.heads_last(dq), c.heads_last(dk), c.heads_last(dv), *tables


class _Call:
    """Padded arrays and block specs of one call. by_query: whether a step of the grid is a block of queries."""

    def __init__(self, q, k, v, position, time, plan: Plan, options: Options, out_gradient=None):
        self.options, self.unpadded = options, q.shape[1]
        self.B, _, self.H, _ = q.shape
        self.block_q, self.block_kv = options.block_q or _BLOCK, options.block_kv or _BLOCK
        self.length = tiles.padded_length(self.unpadded, self.block_q, self.block_kv)
        self.I, self.J = self.length // self.block_q, self.length // self.block_kv
        self.q, self.k, self.v = (self.pad(jnp.swapaxes(x, 1, 2), 2) for x in (q, k, v))
        self.out_gradient = None if out_gradient is None else self.pad(jnp.swapaxes(out_gradient, 1, 2), 2)
        self.plan = tiles.pad_plan(plan, self.length)
        self.ranges = tiles.make_ranges(self.plan, options, self.block_q, self.block_kv)
        self.position = position
        self.time = None if time is None else time[:BUCKETS].astype(jnp.float32)[None]
        self.stats_array = None

    def pad(self, x, axis: int):
        """Zeros up to the padded length."""
        extra = self.length - self.unpadded
        return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x

    def heads_last(self, x):
        """[B, H, L, D] of padded rows to [B, L, H, D]."""
        return jnp.swapaxes(x[:, :, : self.unpadded], 1, 2)

    def pair(self, b, x, step, ranges, by_query: bool):
        """(query block, key block) of a step of the grid, the last one of the range where the step is beyond it."""
        if by_query:
            a, m, near, total = (ranges[(b * self.I + x) * 4 + part] for part in range(4))
            return x, tiles.key_block(a, m, near, jnp.maximum(jnp.minimum(step, total - 1), 0))
        start, count = (ranges[(b * self.J + x) * 2 + part] for part in range(2))
        return start + jnp.maximum(jnp.minimum(step, count - 1), 0), x

    def spec(self, shape, index, by_query: bool):
        """Block spec by index(b, h, query block, key block)."""
        return pl.BlockSpec(shape, lambda b, h, x, t, ranges: index(b, h, *self.pair(b, x, t, ranges, by_query)))

    def per_query(self, width: int, by_query: bool):
        """Rows of q and its like."""
        return self.spec((None, None, self.block_q, width), lambda b, h, i, j: (b, h, i, 0), by_query)

    def per_key(self, width: int, by_query: bool):
        """Rows of k and v and their like."""
        return self.spec((None, None, self.block_kv, width), lambda b, h, i, j: (b, h, j, 0), by_query)

    def stats(self, count: int, by_query: bool):
        """Statistics of queries, [B, H, count, L]."""
        return self.spec((None, None, count, self.block_q), lambda b, h, i, j: (b, h, 0, i), by_query)

    def inputs(self, by_query: bool):
        """[(array, spec)] in the order of the kernels' arguments; (None, None) where the call has none."""
        facts, keys = self.plan
        D, E = self.q.shape[3], self.v.shape[3]
        return [
            (self.q, self.per_query(D, by_query)), (self.k, self.per_key(D, by_query)),
            (self.v, self.per_key(E, by_query)), (self.out_gradient, self.per_query(E, by_query)),
            (self.stats_array, self.stats(2, by_query)),
            (facts, self.spec((None, 3, self.block_q), lambda b, h, i, j: (b, 0, i), by_query)),
            (keys, self.spec((None, 2, self.block_kv), lambda b, h, i, j: (b, 0, j), by_query)),
            self.position_windows(by_query),
            (self.time, pl.BlockSpec((1, BUCKETS), lambda b, h, x, t, ranges: (0, 0))),
        ]  # fmt: skip

    def position_windows(self, by_query: bool):
        """Slices of the position table and the spec of the one that belongs to two blocks."""
        if self.position is None:
            return None, None
        bq, bk = self.block_q, self.block_kv
        slices = tiles.windows(self.position, self.length, bq, bk, self.options, not by_query)
        step, last = math.gcd(bq, bk), len(slices) - 1

        def index(b, h, i, j):
            return jnp.clip((j * bk - i * bq + self.length - bq) // step, 0, last), 0, 0

        return slices, self.spec((None, 1, bq + bk), index, by_query)

    def run(self, kernel, inputs, shapes, specs, scratch, by_query: bool, products: int):
        """The kernel over batch, heads, blocks of one side and the ranges on the other."""
        ranges = self.ranges.queries if by_query else self.ranges.keys
        steps = jnp.maximum(ranges[:, :, -1].max(), 1)
        arrays = [array for array, _ in inputs if array is not None]
        pairs = self.B * self.H * self.length * (self.length + 1) // 2
        widths = self.q.shape[3] + self.v.shape[3]
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in [*arrays, *shapes])
        present = tuple(array is not None for array, _ in inputs)
        return pl.pallas_call(
            functools.partial(_with_absent, kernel, present, self, by_query),
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(self.B, self.H, self.I if by_query else self.J, steps),
                in_specs=[spec for array, spec in inputs if array is not None],
                out_specs=specs,
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=(_PARALLEL, _PARALLEL, _PARALLEL, _ORDERED)),
            cost_estimate=pl.CostEstimate(flops=pairs * products * widths, transcendentals=pairs, bytes_accessed=moved),
            interpret=self.options.interpret,
            name=f"attention_{self.options.kind}{kernel.__name__}",
        )(ranges.reshape(-1), *arrays)


def _with_absent(kernel, present, call: _Call, by_query: bool, ranges, *refs):
    """Call `kernel` with None for the inputs that the call does not have."""
    given = iter(refs)
    inputs = [next(given) if here else None for here in present]
    b, x, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    width = 4 if by_query else 2
    total = ranges[(b * (call.I if by_query else call.J) + x) * width + width - 1]
    i, j = call.pair(b, x, step, ranges, by_query)
    kernel(call.options, i, j, step, step < total, inputs, *given)


def _forward_kernel(options: Options, i, j, step, inside, inputs, out, *rest):
    """rest: (logsumexp, sum of the outputs, largest score, sum of the weights) or (sum of the outputs,)."""
    q, k, v = inputs[:3]
    named: Any = rest if options.softmax else (None, *rest, None, None)
    logsumexp, total, top, mass = named

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        if options.softmax:
            top[...] = jnp.full(top.shape, _NOTHING, jnp.float32)
            mass[...] = jnp.zeros_like(mass)

    @pl.when(inside)
    def _():
        tile, bias, _ = make_tile(inputs, i, j, options, queries_in_rows=True)
        scores, mask = scores_of(q[...], k[...], bias, options), tiles.visible(tile, options)
        if options.softmax:
            before, now = top[...], jnp.maximum(top[...], jnp.where(mask, scores, _NOTHING).max(axis=1, keepdims=True))
            weights = jnp.where(mask, jnp.exp(scores - now), 0.0)
            shrink = jnp.exp(before - now)
            top[...], mass[...] = now, mass[...] * shrink + weights.sum(axis=1, keepdims=True)
            total[...] *= shrink
        else:
            weights = jnp.where(mask, tiles.silu(scores, options.n), 0.0)
        total[...] += product(weights.astype(v.dtype), v[...])

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        result = total[...]
        if options.softmax:
            result = result / jnp.maximum(mass[...], 1e-30)
            logsumexp[...] = jnp.transpose(top[...] + jnp.log(jnp.maximum(mass[...], 1e-30)))
        out[...] = result.astype(out.dtype)


def _query_kernel(options: Options, i, j, step, inside, inputs, dq, total):
    k = inputs[1]

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(inside)
    def _():
        _, slopes, _, _ = gradients_of(inputs, i, j, options, queries_in_rows=True)
        total[...] += product(slopes.astype(k.dtype), k[...])

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq[...] = (total[...] * options.scale).astype(dq.dtype)


def _key_kernel(options: Options, i, j, step, inside, inputs, dk, dv, total_k, total_v):
    q, out_gradient = inputs[0], inputs[3]

    @pl.when(step == 0)
    def _():
        total_k[...], total_v[...] = jnp.zeros_like(total_k), jnp.zeros_like(total_v)

    @pl.when(inside)
    def _():
        weights, slopes, _, _ = gradients_of(inputs, i, j, options, queries_in_rows=False)
        total_v[...] += product(weights.astype(out_gradient.dtype), out_gradient[...])
        total_k[...] += product(slopes.astype(q.dtype), q[...])

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dk[...], dv[...] = (total_k[...] * options.scale).astype(dk.dtype), total_v[...].astype(dv.dtype)
