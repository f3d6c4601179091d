"""Attention kernels for NVIDIA GPUs (Pallas, Triton): forward, and backward in three passes (queries, keys, tables).

A program owns a block of one side and walks the blocks of the other that its positions meet (`tiles.Ranges`). Both bias
tables are looked up by gathers from memory (they stay in the first cache). Their gradients come from a pass by distance
of the blocks: a program adds up the score gradients of all its tiles of one distance, which are summed along their
diagonals afterwards, and sums the buckets that occur in a tile, few where times are in order, one by one. There are no
atomic additions: the same inputs give the same bits. Nothing of the size of all pairs is ever in memory.

Shapes: as in `tiles`; heads stay where they are, [B, L, H, D]; D and E are padded to powers of two.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recscale.kernels import tiles
from recscale.kernels.pairs import time_bucket
from recscale.kernels.tiles import BUCKETS, FIRST, HIDDEN, LAST, QUERY_TIME, TIME, Options, Plan, Tile

_FORWARD_BLOCKS = {2: (128, 64), 4: (64, 32)}  # (queries, keys), by bytes of a number: what fits the shared memory
_BACKWARD_BLOCKS = {2: (64, 64), 4: (32, 32)}
_SMALLEST = 16  # of a side of a matrix product
_PROGRAMS = 1024  # of the pass for the tables: enough to fill the largest chip several times
_NOTHING = -1e30


def forward(q, k, v, position, time, plan: Plan, options: Options):
    """(outputs [B, L, H, E], logsumexp [B, H, L] or None) of attention; arguments as in `pallas_attention`."""
    c = _Call(q, k, v, position, time, plan, options, _FORWARD_BLOCKS)
    E = c.v.shape[3]
    shapes, specs = [jax.ShapeDtypeStruct(c.v.shape, v.dtype)], [c.block(c.block_q, E)]
    if options.softmax:
        shapes.append(jax.ShapeDtypeStruct((c.B, c.H, c.length), jnp.float32))
        specs.append(pl.BlockSpec((None, None, c.block_q), lambda x, h, b: (b, h, c.I - 1 - x)))
    out = c.run(_forward_kernel, c.I, c.ranges.queries, shapes, specs, stages=3)
    return c.trim(out[0], v), (out[1][:, :, : q.shape[1]] if options.softmax else None)


def backward(q, k, v, position, time, plan: Plan, out, logsumexp, out_gradient, options: Options):
    """Gradients of (q, k, v, position, time), the tables' float32; out, logsumexp: of `forward`."""
    c = _Call(q, k, v, position, time, plan, options, _BACKWARD_BLOCKS, out_gradient)
    if options.softmax:
        delta_BHL = jnp.einsum("blhe,blhe->bhl", out, out_gradient, preferred_element_type=jnp.float32)
        c.stats = jnp.pad(jnp.stack([logsumexp, delta_BHL], axis=2), ((0, 0),) * 3 + ((0, c.length - q.shape[1]),))
    like_q, like_k, like_v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (c.q, c.k, c.v))
    D, E = c.q.shape[3], c.v.shape[3]
    (dq,) = c.run(_query_kernel, c.I, c.ranges.queries, [like_q], [c.block(c.block_q, D)], stages=2)
    specs = [pl.BlockSpec((None, c.block_kv, None, x), lambda x, h, b: (b, x, h, 0)) for x in (D, E)]
    dk, dv = c.run(_key_kernel, c.J, c.ranges.keys, [like_k, like_v], specs, stages=2)
    return c.trim(dq, q), c.trim(dk, k), c.trim(dv, v), *_table_gradients(c)


class _Call:
    """Padded arrays of one call. Programs of query blocks run from the last block, the longest, to the first."""

    def __init__(self, q, k, v, position, time, plan: Plan, options: Options, blocks, out_gradient=None):
        self.options, self.B, self.H = options, q.shape[0], q.shape[2]
        largest = max(_SMALLEST, pl.next_power_of_2(q.shape[1]))
        default = blocks[q.dtype.itemsize]
        self.block_q = min(largest, options.block_q or default[0])
        self.block_kv = min(largest, options.block_kv or default[1])
        self.length = tiles.padded_length(q.shape[1], self.block_q, self.block_kv)
        self.I, self.J = self.length // self.block_q, self.length // self.block_kv
        self.q, self.k, self.v = (self.pad(x) for x in (q, k, v))
        self.out_gradient = None if out_gradient is None else self.pad(out_gradient)
        self.plan = tiles.pad_plan(plan, self.length)
        self.ranges = tiles.make_ranges(self.plan, options, self.block_q, self.block_kv)
        self.position, self.time = (None if x is None else x.astype(jnp.float32) for x in (position, time))
        self.stats = None

    def pad(self, x):
        """[B, L, H, D] with zeros up to the padded length and width."""
        width = max(_SMALLEST, pl.next_power_of_2(x.shape[3]))
        extra = (self.length - x.shape[1], width - x.shape[3])
        return jnp.pad(x, ((0, 0), (0, extra[0]), (0, 0), (0, extra[1]))) if any(extra) else x

    def trim(self, x, like):
        """The padded result in the shape of `like`."""
        return x[:, : like.shape[1], :, : like.shape[3]]

    def block(self, size: int, width: int):
        """The output rows of a program's query block."""
        return pl.BlockSpec((None, size, None, width), lambda x, h, b: (b, self.I - 1 - x, h, 0))

    def arrays(self):
        """Inputs in the order of `_Refs`."""
        return self.q, self.k, self.v, self.out_gradient, self.stats, *self.plan, self.position, self.time

    def run(self, kernel, count: int, ranges, shapes, specs, stages: int):
        """The kernel for `count` blocks of every head and row; each sees whole rows of the inputs of its head."""

        def of_head(x):
            return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda x, h, b: (b, 0, h, 0))

        def of_row(x):
            return pl.BlockSpec((None, *x.shape[1:]), lambda x, h, b: (b, 0, 0))

        heads = [None if x is None else of_head(x) for x in (self.q, self.k, self.v, self.out_gradient)]
        stats = None if self.stats is None else pl.BlockSpec((None, None, 2, self.length), lambda x, h, b: (b, h, 0, 0))
        known = (self.position, self.time)
        tables = [None if x is None else pl.BlockSpec(x.shape, lambda x, h, b: (0,)) for x in known]
        compute = functools.partial(_one_head, kernel, self.options, self.block_q, self.block_kv)
        return pl.pallas_call(
            compute,
            grid=(count, self.H, self.B),
            in_specs=[of_row(ranges), *heads, stats, *(of_row(x) for x in self.plan), *tables],
            out_specs=specs,
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=self.warps(), num_stages=stages),
            interpret=self.options.interpret,
            name=f"attention_{self.options.kind}{kernel.__name__}",
        )(ranges, *self.arrays())

    def warps(self) -> int:
        """Warps of a program."""
        return 8 if max(self.q.shape[3], self.v.shape[3]) > 64 and self.block_q >= 64 else 4


class _Refs:
    """Inputs of a program: of one head, or of all with `row` and `head` picking one."""

    def __init__(self, options: Options, block_q: int, block_kv: int, refs, row=None, head=None):
        self.options, self.block_q, self.block_kv, self.row, self.head = options, block_q, block_kv, row, head
        self.q, self.k, self.v, self.out_gradient, self.stats, self.queries, self.keys, self.position, self.time = refs
        fast = self.q.dtype == jnp.bfloat16 and not options.interpret
        self.tanh = plgpu.approx_tanh if fast else jnp.tanh  # its error is a tenth of a rounding in bfloat16

    def of_query(self, ref, i):
        """Rows of query block i."""
        return self._rows(ref, pl.ds(i * self.block_q, self.block_q))

    def of_key(self, ref, j):
        """Rows of key block j."""
        return self._rows(ref, pl.ds(j * self.block_kv, self.block_kv))

    def _rows(self, ref, rows):
        return ref[rows, :] if self.row is None else ref[self.row, rows, self.head, :]

    def tile(self, i, j, queries_in_rows: bool) -> Tile:
        """Facts of the pairs of query block i and key block j; what the options do not need is not loaded."""
        options, row = self.options, () if self.row is None else (self.row,)
        head = row if self.row is None else (self.row, self.head)

        def of_queries(ref, *index):
            x = ref[(*index, pl.ds(i * self.block_q, self.block_q))]
            return x[:, None] if queries_in_rows else x[None, :]

        def of_keys(fact):
            x = self.keys[(*row, fact, pl.ds(j * self.block_kv, self.block_kv))]
            return x[None, :] if queries_in_rows else x[:, None]

        slot_q, slot_k = i * self.block_q + jnp.arange(self.block_q), j * self.block_kv + jnp.arange(self.block_kv)
        return Tile(
            i=slot_q[:, None] if queries_in_rows else slot_q[None, :],
            j=slot_k[None, :] if queries_in_rows else slot_k[:, None],
            first=of_queries(self.queries, *row, FIRST),
            last=of_queries(self.queries, *row, LAST),
            hidden=of_keys(HIDDEN) if options.targets else None,
            query_time=of_queries(self.queries, *row, QUERY_TIME) if options.time else None,
            time=of_keys(TIME) if options.time else None,
            logsumexp=None if self.stats is None else of_queries(self.stats, *head, 0),
            delta=None if self.stats is None else of_queries(self.stats, *head, 1),
        )

    def scores(self, a, b, t: Tile):
        """Scores of a tile, float32; a: the side in the rows."""
        scores = _product(a, b.T) * self.options.scale
        if self.position is not None:
            n = self.options.n
            scores += self.position[jnp.clip(t.j - t.i + (n - 1), 0, 2 * n - 2)]
        if self.time is not None:
            scores += self.time[time_bucket(t.query_time - t.time)]
        return scores

    def gradients(self, q, k, v, out_gradient, t: Tile, queries_in_rows: bool):
        """(weights, gradients of the scores) of a tile."""
        (a, b), (c, d) = ((q, k), (out_gradient, v)) if queries_in_rows else ((k, q), (v, out_gradient))
        scores, products = self.scores(a, b, t), _product(c, d.T)
        return tiles.weights_and_slopes(scores, products, tiles.visible(t, self.options), t, self.options, self.tanh)


def _product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _one_head(kernel, options: Options, block_q: int, block_kv: int, ranges, *refs):
    kernel(_Refs(options, block_q, block_kv, refs[:9]), ranges, *refs[9:])


def _walk(ranges, i, add, start):
    """`add(key block, state)` over the range of query block i."""
    a, m, b, total = (ranges[i, part] for part in range(4))
    return jax.lax.fori_loop(0, total, lambda step, state: add(tiles.key_block(a, m, b, step), state), start)


def _forward_kernel(refs: _Refs, ranges, out, *logsumexp):
    options, i = refs.options, pl.num_programs(0) - 1 - pl.program_id(0)
    q = refs.of_query(refs.q, i)
    total = jnp.zeros(out.shape, jnp.float32)

    def silu(j, total):
        t = refs.tile(i, j, queries_in_rows=True)
        scores, v = refs.scores(q, refs.of_key(refs.k, j), t), refs.of_key(refs.v, j)
        weights = jnp.where(tiles.visible(t, options), tiles.silu(scores, options.n, refs.tanh), 0.0)
        return total + _product(weights.astype(v.dtype), v)

    def softmax(j, state):
        total, top, mass = state
        t = refs.tile(i, j, queries_in_rows=True)
        scores, v = refs.scores(q, refs.of_key(refs.k, j), t), refs.of_key(refs.v, j)
        mask = tiles.visible(t, options)
        now = jnp.maximum(top, jnp.where(mask, scores, _NOTHING).max(axis=1))
        weights = jnp.where(mask, jnp.exp(scores - now[:, None]), 0.0)
        shrink = jnp.exp(top - now)
        total = total * shrink[:, None] + _product(weights.astype(v.dtype), v)
        return total, now, mass * shrink + weights.sum(axis=1)

    if options.softmax:
        start = (total, jnp.full((refs.block_q,), _NOTHING, jnp.float32), jnp.zeros((refs.block_q,), jnp.float32))
        total, top, mass = _walk(ranges, i, softmax, start)
        mass = jnp.maximum(mass, 1e-30)
        total = total / mass[:, None]
        logsumexp[0][...] = top + jnp.log(mass)
    else:
        total = _walk(ranges, i, silu, total)
    out[...] = total.astype(out.dtype)


def _query_kernel(refs: _Refs, ranges, dq):
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    q, out_gradient = refs.of_query(refs.q, i), refs.of_query(refs.out_gradient, i)

    def add(j, total):
        t = refs.tile(i, j, queries_in_rows=True)
        k, v = refs.of_key(refs.k, j), refs.of_key(refs.v, j)
        _, slopes = refs.gradients(q, k, v, out_gradient, t, queries_in_rows=True)
        return total + _product(slopes.astype(k.dtype), k)

    total = _walk(ranges, i, add, jnp.zeros(dq.shape, jnp.float32))
    dq[...] = (total * refs.options.scale).astype(dq.dtype)


def _key_kernel(refs: _Refs, ranges, dk, dv):
    j = pl.program_id(0)
    k, v = refs.of_key(refs.k, j), refs.of_key(refs.v, j)
    first, count = ranges[j, 0], ranges[j, 1]

    def add(step, state):
        total_k, total_v = state
        i = first + step
        t = refs.tile(i, j, queries_in_rows=False)
        q, out_gradient = refs.of_query(refs.q, i), refs.of_query(refs.out_gradient, i)
        weights, slopes = refs.gradients(q, k, v, out_gradient, t, queries_in_rows=False)
        total_v += _product(weights.astype(out_gradient.dtype), out_gradient)
        return total_k + _product(slopes.astype(q.dtype), q), total_v

    start = (jnp.zeros(dk.shape, jnp.float32), jnp.zeros(dv.shape, jnp.float32))
    total_k, total_v = jax.lax.fori_loop(0, count, add, start)
    dk[...], dv[...] = (total_k * refs.options.scale).astype(dk.dtype), total_v.astype(dv.dtype)


def _table_gradients(c: _Call):
    """Gradients of both tables, float32, None for an absent one."""
    if c.position is None and c.time is None:
        return None, None
    size = min(c.block_q, c.block_kv)
    ranges = tiles.make_ranges(c.plan, c.options, size, size).queries
    ahead, behind = tiles.diagonals(c.length, size, c.options)
    N = ahead + behind + 1
    parts = max(1, min(_PROGRAMS // N, c.B * (c.length // size)))
    shapes, specs = [], []
    if c.position is not None:
        shapes.append(jax.ShapeDtypeStruct((parts, N, size, size), jnp.float32))
        specs.append(pl.BlockSpec((None, None, size, size), lambda part, d: (part, d, 0, 0)))
    if c.time is not None:
        shapes.append(jax.ShapeDtypeStruct((parts, N, BUCKETS), jnp.float32))
        specs.append(pl.BlockSpec((None, None, BUCKETS), lambda part, d: (part, d, 0)))
    kernel = functools.partial(_table_kernel, c.options, size, ahead, c.B, c.H, parts)
    sums = pl.pallas_call(
        kernel,
        grid=(parts, N),
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=c.warps(), num_stages=2),
        interpret=c.options.interpret,
        name=f"attention_{c.options.kind}_table_kernel",
    )(ranges, *c.arrays())
    given, position, time = iter(sums), None, None
    if c.position is not None:
        position = tiles.position_gradient(next(given).sum(axis=0), ahead, c.options.n)
    if c.time is not None:
        time = tiles.time_gradient(next(given))
    return position, time


def _table_kernel(options: Options, size: int, ahead: int, rows: int, heads: int, parts: int, ranges, *refs):
    """Sums over a share of the tiles of one distance: by pair of slots, and by time bucket."""
    arrays, outs = refs[:9], list(refs[9:])
    part, d = pl.program_id(0), pl.program_id(1)
    blocks = ranges.shape[1]
    position_out = outs.pop(0) if arrays[7] is not None else None
    time_out = outs.pop(0) if arrays[8] is not None else None

    def add(turn, state):
        total, buckets = state
        x = part + turn * parts
        b, i = jax.lax.div(x, blocks), jax.lax.rem(x, blocks)
        j = i + ahead - d
        needed = tiles.meet([ranges[b, i, column] for column in range(4)], j)
        count, zeros = needed.astype(jnp.int32) * heads, jnp.zeros((size, size), jnp.float32)
        slopes = jax.lax.fori_loop(0, count, functools.partial(of_head, b, i, j), zeros)
        if time_out is not None:
            buckets = add_by_bucket(refs_of(b, 0), i, j, needed, slopes, buckets)
        return total + slopes, buckets

    def refs_of(b, h):
        return _Refs(options, size, size, arrays, b, h)

    def of_head(b, i, j, h, total):
        r = refs_of(b, h)
        t = r.tile(i, j, queries_in_rows=True)
        q, k, v, out_gradient = r.of_query(r.q, i), r.of_key(r.k, j), r.of_key(r.v, j), r.of_query(r.out_gradient, i)
        return total + r.gradients(q, k, v, out_gradient, t, queries_in_rows=True)[1]

    def add_by_bucket(r, i, j, needed, slopes, buckets):
        j = jnp.where(needed, j, 0)
        t = r.tile(i, j, queries_in_rows=True)
        bucket, mask = time_bucket(t.query_time - t.time), tiles.visible(t, options) & needed
        first, last = jnp.where(mask, bucket, BUCKETS).min(), jnp.where(mask, bucket, -1).max()
        entry = jnp.arange(BUCKETS)

        def one(x, sums):
            return sums + jnp.where(entry == x, jnp.where(bucket == x, slopes, 0.0).sum(), 0.0)

        return jax.lax.fori_loop(first, last + 1, one, buckets)

    turns = jax.lax.div(rows * blocks - part + parts - 1, parts)
    start = (jnp.zeros((size, size), jnp.float32), jnp.zeros((BUCKETS,), jnp.float32))
    total, buckets = jax.lax.fori_loop(0, turns, add, start)
    if position_out is not None:
        position_out[...] = total
    if time_out is not None:
        time_out[...] = buckets
