"""Softmax over the whole catalogue, in chunks of items and with the items shared by the devices.

Every device scores all queries against the items whose rows it holds, a chunk at a time, and the log-sum-exp is joined
across chunks and devices; the backward pass computes each chunk's scores again. Scores never exist beyond a chunk, and
what moves between devices is queries, not rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from recscale.layers.embedding import accumulate
from recscale.layers.tables import Arrays, Mixers, Tables

SCORES_AT_ONCE = 1 << 23


def catalogue_softmax(
    tables: Tables, task: Any, arrays: Arrays, mixers: Mixers, query_TD: jax.Array, target_T: jax.Array
) -> jax.Array:
    """-log p(target) in nats under the softmax over all items, [T].

    task: has `catalogue`, the name of the item table, and `item`, applied to its vectors. arrays: all of that table's.
    target 0 gives the log-sum-exp alone. Differentiable in arrays (dense gradients, shaped like them; those of bfloat16
    arrays are rounded once), mixers and query. Memory: one dense gradient of the table and SCORES_AT_ONCE scores a few
    times.
    """
    table = task.catalogue
    fixed = {name: x for name, x in arrays.items() if tables.arrays[name].fixed}
    learned = {name: x for name, x in arrays.items() if name not in fixed}
    layouts = tables.catalogue_specs(table)
    shared, leading = PartitionSpec(), PartitionSpec(tables.axes)
    laid = {name: layouts[name] for name in learned}, {name: layouts[name] for name in fixed}
    sweep = Sweep(tables, task, len(target_T))

    @jax.custom_vjp
    def nats(learned, mixer, query, target, fixed):
        return forward(learned, mixer, query, target, fixed)[0]

    def forward(learned, mixer, query, target, fixed):
        run = tables.each(sweep.forward, (laid[0], shared, leading, leading, laid[1]), (leading, leading))
        return run(learned, mixer, query, target, fixed)

    def keep(*arguments):
        value, lse = forward(*arguments)
        return value, (*arguments, lse)

    def backward(kept, cotangent):
        run = tables.each(
            sweep.backward,
            (laid[0], shared, leading, leading, laid[1], leading, leading),
            (laid[0], shared, leading),
        )
        return *run(*kept, cotangent), None, None

    nats.defvjp(keep, backward)
    return nats(learned, mixers[table], query_TD, target_T, fixed)


class Sweep:
    """The two passes over a device's part of the catalogue."""

    def __init__(self, tables: Tables, task: Any, queries: int):
        self.tables, self.task, self.table = tables, task, task.catalogue
        self.spread = tables.shards(self.table) > 1
        seen = queries if self.spread else queries // tables.mesh.size
        count = tables.local_count(self.table)
        self.chunk = min(count, max(128, SCORES_AT_ONCE // max(1, seen)))
        self.starts = range(0, count, self.chunk)

    def gather(self, x: jax.Array) -> jax.Array:
        """The queries of all devices, where each device has only a part of the items."""
        return jax.lax.all_gather(x, self.tables.axes, tiled=True) if self.spread else x

    def own(self, x: jax.Array, count: int) -> jax.Array:
        """This device's part of what all devices know."""
        return jax.lax.dynamic_slice_in_dim(x, self.tables.shard(self.table) * count, count) if self.spread else x

    def scores(self, rows, mixer, query_TD, ids_N):
        """[T, N] and which items are real."""
        spec = self.tables.specs[self.table]
        vectors_ND = self.task.item(spec.compose(rows, mixer))
        scores = jnp.einsum("td,nd->tn", query_TD, vectors_ND, preferred_element_type=jnp.float32)
        return jnp.where(((ids_N > 0) & (ids_N <= spec.num_ids))[None], scores, -jnp.inf)

    def items(self, arrays, start):
        """The chunk of items that begins at `start`."""
        return self.tables.local_items(self.table, arrays, start, self.chunk)

    def forward(self, learned, mixer, query, target, fixed):
        """(-log p, log-sum-exp) of this device's queries."""
        query_TD, target_T = self.gather(query), self.gather(target)

        def step(carry, start):
            high, mass, positive = carry
            items = self.items(learned | fixed, start)
            scores = self.scores(items.rows, mixer, query_TD, items.ids)
            above = jnp.maximum(high, scores.max(axis=1))
            mass = mass * jnp.exp(high - above) + jnp.exp(scores - above[:, None]).sum(axis=1)
            mine = (items.ids[None] == target_T[:, None]) & (target_T > 0)[:, None]
            return (above, mass, positive + jnp.where(mine, scores, 0.0).sum(axis=1)), None

        zero = jnp.zeros(target_T.shape, jnp.float32)
        low = jnp.full(target_T.shape, -1e30, jnp.float32)
        (high, mass, positive), _ = jax.lax.scan(step, (low, zero, zero), jnp.asarray(self.starts))
        if self.spread:
            top = jax.lax.pmax(high, self.tables.axes)
            mass = jax.lax.psum(mass * jnp.exp(high - top), self.tables.axes)
            high, positive = top, jax.lax.psum(positive, self.tables.axes)
        lse = high + jnp.log(mass)
        return self.own(lse - positive, len(target)), self.own(lse, len(target))

    def backward(self, learned, mixer, query, target, fixed, lse, cotangent):
        """Gradients of the arrays (this device's part), of the mixer and of this device's queries."""
        query_TD, target_T, lse_T, weight_T = (self.gather(x) for x in (query, target, lse, cotangent))
        names = {part: name for part, name in self.tables.parts(self.table).items() if name in learned}

        def step(carry, start):
            totals, mixer_total, query_total = carry
            items = self.items(learned | fixed, start)
            scores, pull = jax.vjp(lambda r, m, q: self.scores(r, m, q, items.ids), items.rows, mixer, query_TD)
            share = jnp.exp(scores - lse_T[:, None])
            mine = (items.ids[None] == target_T[:, None]) & (target_T > 0)[:, None]
            rows_grad, mixer_grad, query_grad = pull((share - mine) * weight_T[:, None])
            for part, name in names.items():
                array = self.tables.arrays[name]
                grads = rows_grad[part].reshape(-1, array.dim)
                totals = totals | {name: accumulate(array, totals[name], items.position[part].reshape(-1), grads)}
            return (totals, jax.tree.map(jnp.add, mixer_total, mixer_grad), query_total + query_grad), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (learned, mixer, query_TD))
        (totals, mixer_total, query_total), _ = jax.lax.scan(step, zeros, jnp.asarray(self.starts))
        axes, layouts = self.tables.axes, self.tables.catalogue_specs(self.table)
        if self.tables.mesh.size > 1:
            mixer_total = jax.lax.psum(mixer_total, axes)
            whole = {name for name in totals if layouts[name] == PartitionSpec()}
            totals = {name: jax.lax.psum(x, axes) if name in whole else x for name, x in totals.items()}
        if self.spread:
            query_total = jax.lax.psum_scatter(query_total, axes, tiled=True)
        return jax.tree.map(lambda t, x: t.astype(x.dtype), totals, learned), mixer_total, query_total
