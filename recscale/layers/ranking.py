"""Exact ranks, log-probabilities and top lists over a whole catalogue, streamed over blocks of items.

Order and ties: items are ordered by (score descending, id ascending), so an equal score counts before the target only
where its id is smaller. Padding (id 0) is never ranked and never listed.

Several devices: each sweeps the ids whose rows it holds, against all queries, and what is joined is a few numbers per
query. Queries and results are the same on every device; no row of the table moves.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from recscale.layers.tables import Arrays, Mixers, Tables

SEEN_WINDOW = 1024
"""Seen pairs marked at a time; a block that holds none of them costs nothing."""
GROUP = 32
"""Items in a row whose best score decides whether a list looks at them at all."""
FEW = (4, 16, 64)
"""Groups of a block that a list looks at, where no query has more that could enter."""

PROTOCOLS = ("full", "unseen")
Top = tuple[jax.Array, jax.Array]
STATIC = ("tables", "task", "block", "top_k", "protocols")


def dot_products(query_QD: jax.Array, item_ND: jax.Array) -> jax.Array:
    """Scores [Q, N] in full precision."""
    return jnp.einsum("QD,ND->QN", query_QD, item_ND, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=STATIC)
def rank_catalogue(
    query_QD: jax.Array,
    target_Q: jax.Array,
    seen: tuple[jax.Array, jax.Array] | None,
    arrays: Arrays,
    mixers: Mixers,
    *,
    tables: Tables,
    task: Any,
    block: int,
    top_k: int = 0,
    protocols: tuple[str, ...] = PROTOCOLS,
) -> dict[str, jax.Array]:
    """Exact rank, log-probability and top lists of Q queries over items 1..V, by the task's score.

    query_QD: [Q, D]. target_Q: int32 [Q], 0 for a row that only fills the chunk. seen: what `pack_seen` returns, needed
    by protocol "unseen". task: has `catalogue`, the name of the item table, `item`, applied to its vectors, and
    `scores` of queries and those (tasks/next_item.py); arrays: those of that table at least. block: items scored at a
    time on each device. protocols: which rankings to make; () gives log_prob alone. top_k = 0 makes no lists.

    Returns log_prob [Q] (nats, <= 0), finite [Q] (False where any score of the row is NaN or infinite: the other values
    of that row mean nothing), and per protocol `rank/NAME` int32 [Q] and `top/NAME` int32 [Q, top_k], 0 where fewer
    items are left. Memory O(Q x block) besides the tables.

    The catalogue is swept twice, since counting the better items needs the target's score first. That score is read out
    of the same block matmul that scores its rivals, never from a separate dot product: equal vectors tie exactly, and
    rounding cannot rank a target behind itself. A device that holds one block scores it once.
    """
    layouts, same = tables.catalogue_specs(task.catalogue), PartitionSpec()
    sweep = _Sweep(tables, task, block, top_k, protocols)
    run = tables.each(sweep.run, (layouts, same, same, same, same), same)
    own = {name: arrays[name] for name in layouts}
    return run(own, mixers[task.catalogue], query_QD.astype(jnp.float32), target_Q, seen)


@functools.partial(jax.jit, static_argnames=("tables", "task", "block", "top_k"))
def top_items(
    query_QD: jax.Array,
    seen: tuple[jax.Array, jax.Array] | None,
    arrays: Arrays,
    mixers: Mixers,
    *,
    tables: Tables,
    task: Any,
    block: int,
    top_k: int,
) -> jax.Array:
    """The best items of each query, int32 [Q, top_k]; seen ones left out where `seen` is given, 0 where none are left.

    Arguments as in `rank_catalogue`, of which this is a part: what nobody reads is not computed, so one sweep is left.
    """
    name = "full" if seen is None else "unseen"
    no_target_Q = jnp.zeros(query_QD.shape[:1], jnp.int32)
    found = rank_catalogue(
        query_QD, no_target_Q, seen, arrays, mixers, tables=tables, task=task, block=block, top_k=top_k,
        protocols=(name,),
    )  # fmt: skip
    return found[f"top/{name}"]


class _Block(NamedTuple):
    """Scores [Q, g, G] of G groups of g items: ids [g, G] ascend down the columns, then from column to column.

    With the groups along the last axis every reduction over a group is an elementwise one, which CPUs do fast.
    """

    ids_gG: jax.Array
    real_gG: jax.Array
    scores_QgG: jax.Array
    hidden_QgG: jax.Array | None

    def kept(self, protocol: str) -> jax.Array:
        """Which items the protocol ranks, [Q or 1, g, G]."""
        if protocol == "unseen" and self.hidden_QgG is not None:
            return self.real_gG[None] & ~self.hidden_QgG
        return self.real_gG[None]


class _Sweep:
    """What one device does: two passes over the blocks of its ids, each joined with the other devices'."""

    def __init__(self, tables: Tables, task: Any, block: int, top_k: int, protocols: tuple[str, ...]):
        self.tables, self.task, self.top_k, self.protocols = tables, task, top_k, protocols
        self.spread = tables.shards(task.catalogue) > 1
        count = tables.local_count(task.catalogue)
        block = min(block, count)
        self.group = GROUP if block >= 2 * GROUP * max(top_k, 8) else 1  # few groups leave nothing to pass over
        self.block = -(-block // self.group) * self.group
        self.starts = range(0, count, self.block)

    def run(self, arrays, mixer, query_QD, target_Q, seen):
        """The results of `rank_catalogue`, the same on every device."""
        scored = functools.partial(self.scored, arrays, mixer, query_QD, target_Q, seen)
        only = scored(0) if len(self.starts) == 1 else None

        def sweep(step, carry):
            if only is not None:
                return step(carry, only)
            starts = jnp.asarray(self.starts, jnp.int32)
            return jax.lax.scan(lambda c, start: (step(c, scored(start)), None), carry, starts)[0]

        zero_Q = jnp.zeros(target_Q.shape, jnp.float32)
        Q, lists = len(target_Q), self.protocols if self.top_k else ()
        empty = (jnp.full((Q, self.top_k), -jnp.inf), jnp.zeros((Q, self.top_k), jnp.int32))
        start: dict[str, Any] = {"target": zero_Q, "finite": zero_Q == 0, "high": zero_Q - jnp.inf, "mass": zero_Q}
        start["top"] = {name: empty for name in lists}
        found: dict[str, Any] = self.join(sweep(functools.partial(self.first, target_Q), start))
        out = {"finite": found["finite"], "log_prob": found["target"] - found["high"] - jnp.log(found["mass"])}
        out |= {f"top/{name}": ids_QK for name, (_, ids_QK) in found["top"].items()}
        if self.protocols:
            count = functools.partial(self.second, target_Q, found["target"])
            before = sweep(count, {name: jnp.zeros_like(target_Q) for name in self.protocols})
            before = jax.lax.psum(before, self.tables.axes) if self.spread else before
            out |= {f"rank/{name}": 1 + count_Q for name, count_Q in before.items()}
        return out

    def scored(self, arrays, mixer, query_QD, target_Q, seen, start) -> _Block:
        """The block that begins with the device's id number `start`."""
        spec = self.tables.specs[self.task.catalogue]
        items = self.tables.local_items(self.task.catalogue, arrays, start, self.block)
        ids_gG = items.ids.reshape(-1, self.group).T
        vectors_ND = self.task.item(spec.compose(items.rows, mixer)).astype(jnp.float32)
        vectors_ND = vectors_ND.reshape(-1, self.group, spec.dim).swapaxes(0, 1).reshape(-1, spec.dim)
        # Both passes keep the same matmul of the same vectors, fused with nothing.
        vectors_ND = jax.lax.optimization_barrier(vectors_ND)
        scores_QN = self.task.scores(query_QD, vectors_ND)
        scores_QgG = jax.lax.optimization_barrier(scores_QN).reshape(-1, *ids_gG.shape)
        hidden_QgG = None
        if "unseen" in self.protocols:
            hidden_QgG = _hidden(items.ids, self.group, target_Q, seen).reshape(scores_QgG.shape)
        return _Block(ids_gG, (ids_gG > 0) & (ids_gG <= spec.num_ids), scores_QgG, hidden_QgG)

    def first(self, target_Q, carry, part: _Block):
        """Target's score, log-sum-exp and top lists."""
        scores_QgG, real = part.scores_QgG, part.real_gG[None]
        is_target = real & (part.ids_gG[None] == target_Q[:, None, None])
        masked_QgG = jnp.where(real, scores_QgG, -jnp.inf)
        high_Q = jnp.maximum(carry["high"], masked_QgG.max(axis=1).max(axis=1))
        shift_Q = jnp.where(high_Q > -jnp.inf, high_Q, 0.0)  # until a first real item has come
        mass_Q = jnp.exp(masked_QgG - shift_Q[:, None, None]).sum(axis=(1, 2))
        return {
            "target": carry["target"] + jnp.where(is_target, scores_QgG, 0.0).sum(axis=(1, 2)),
            "finite": carry["finite"] & (jnp.isfinite(scores_QgG) | ~real).all(axis=(1, 2)),
            "high": high_Q,
            "mass": carry["mass"] * jnp.exp(carry["high"] - shift_Q) + mass_Q,
            "top": {name: _extend(top, part, name) for name, top in carry["top"].items()},
        }

    def second(self, target_Q, own_Q, before, part: _Block):
        """Items ranked before the target."""
        own, target, ids = own_Q[:, None, None], target_Q[:, None, None], part.ids_gG[None]
        wins = jnp.where(ids < target, part.scores_QgG >= own, part.scores_QgG > own) & (ids != target)
        more = {name: jnp.where(wins & part.kept(name), 1.0, 0.0).sum(axis=(1, 2)) for name in before}
        return {name: before[name] + more[name].astype(jnp.int32) for name in before}

    def join(self, found):
        """What all devices found; where they hold the same items, each has it all already."""
        if not self.spread:
            return found
        axes = self.tables.axes
        high_Q = jax.lax.pmax(found["high"], axes)
        return {
            "target": jax.lax.psum(found["target"], axes),
            "finite": jax.lax.pmin(found["finite"].astype(jnp.int32), axes) > 0,
            "high": high_Q,
            "mass": jax.lax.psum(found["mass"] * jnp.exp(found["high"] - high_Q), axes),
            "top": {name: self._merged(top) for name, top in found["top"].items()},
        }

    def _merged(self, top: Top) -> Top:
        """The first top_k of all devices' lists by (score descending, id ascending)."""
        values, ids = (jax.lax.all_gather(x, self.tables.axes, axis=1, tiled=True) for x in top)
        falling, ids = jax.lax.sort((-values, ids), dimension=1, num_keys=2)
        return -falling[:, : self.top_k], ids[:, : self.top_k]


def _extend(top: Top, part: _Block, protocol: str) -> Top:
    """The running lists with a further block, all of whose ids are larger than those listed.

    Only a score above the last one listed can enter: an equal one has the larger id. Groups whose best score is not
    above it are passed over, and the fewer are left, the shorter are the lists that must be ordered.

    Of more than K groups, the K first by (best score descending, place ascending) suffice. Suppose an item of another
    group belonged to the list: each of those K groups holds an item with a higher score, or with an equal score and a
    smaller id (it lies in an earlier group, and groups are ranges of ids), so K items come before it.
    """
    K, G = top[0].shape[1], part.ids_gG.shape[1]
    best_QG = _unsigned_zero(jnp.where(part.kept(protocol), part.scores_QgG, -jnp.inf).max(axis=1))
    above_QG = best_QG > top[0][:, -1:]
    sizes = [*(few for few in FEW if few < min(K, G)), min(K, G)]

    def grow(size):
        if size == G:
            place_QC = jnp.broadcast_to(jnp.arange(G), best_QG.shape)
        elif size == K:
            place_QC = jax.lax.sort(jax.lax.top_k(best_QG, K)[1], dimension=1)
        else:  # all that are above, in their order; then places beyond the last
            countdown_G = jnp.arange(G, 0, -1, dtype=jnp.float32)
            place_QC = G - jax.lax.top_k(jnp.where(above_QG, countdown_G[None], 0.0), size)[0].astype(jnp.int32)
        return lambda: _insert(top, *_members(part, protocol, place_QC), size)

    most = jnp.where(above_QG, 1.0, 0.0).sum(axis=1).max()
    branch = jnp.where(most > 0, 1 + sum((most > size).astype(jnp.int32) for size in sizes[:-1]), 0)
    return jax.lax.switch(branch, [lambda: top, *map(grow, sizes)])


def _members(part: _Block, protocol: str, place_QC: jax.Array) -> Top:
    """Scores and ids [Q, C * g] of the groups at these places, group after group; -inf for what is not ranked."""
    g, G = part.ids_gG.shape
    member_QCg = place_QC[:, :, None] + G * jnp.arange(g)[None, None]
    inside = jnp.broadcast_to(place_QC[:, :, None] < G, member_QCg.shape).reshape(len(place_QC), -1)
    member = jnp.minimum(member_QCg, g * G - 1).reshape(len(place_QC), -1)

    def take(x):
        return jnp.take_along_axis(x.reshape(len(place_QC), -1), member, axis=1)

    kept = inside & part.real_gG.reshape(-1)[member]
    if protocol == "unseen":
        kept &= ~take(part.hidden_QgG)
    return jnp.where(kept, _unsigned_zero(take(part.scores_QgG)), -jnp.inf), part.ids_gG.reshape(-1)[member]


def _insert(top: Top, values_QN: jax.Array, ids_QN: jax.Array, few: int) -> Top:
    """Candidates in ascending order of id, all larger than the ids listed: top_k keeps the earlier of equal values."""
    values_QN = jnp.where(values_QN > top[0][:, -1:], values_QN, -jnp.inf)
    K, N = top[0].shape[1], values_QN.shape[1]

    def cut(size):
        values, place = jax.lax.top_k(values_QN, size)
        values = jnp.concatenate([top[0], values], axis=1)
        ids = jnp.concatenate([top[1], jnp.take_along_axis(ids_QN, place, axis=1)], axis=1)
        values, place = jax.lax.top_k(values, K)
        return values, jnp.where(values > -jnp.inf, jnp.take_along_axis(ids, place, axis=1), 0)

    if min(few, N) == min(K, N):
        return cut(min(K, N))
    entering = jnp.where(values_QN > -jnp.inf, 1.0, 0.0).sum(axis=1).max()
    return jax.lax.cond(entering <= few, lambda: cut(min(few, N)), lambda: cut(min(K, N)))


def _unsigned_zero(x: jax.Array) -> jax.Array:
    """0 for -0: they are equal scores, but not to every sort."""
    return jnp.where(x == 0, 0.0, x)


def _hidden(ids_N, group, target_Q, seen):
    """Bool [Q, N] in the order of a block's columns: the items that the query's user has seen, its target excepted."""
    row_P, item_P = seen
    N = len(ids_N)
    ids_N = jnp.where(ids_N > 0, ids_N, jnp.where(jnp.arange(N) > 0, jnp.iinfo(jnp.int32).max, 0))  # spare places
    first, last = ids_N[0], jnp.where(ids_N < jnp.iinfo(jnp.int32).max, ids_N, 0).max()
    low = jnp.searchsorted(item_P, jnp.maximum(first, 1))
    high = jnp.searchsorted(item_P, last, side="right")

    def mark(i, hidden_QN):  # a slice that would pass the end is moved back by JAX: marking twice does no harm
        row = jax.lax.dynamic_slice(row_P, (low + i * SEEN_WINDOW,), (SEEN_WINDOW,))
        item = jax.lax.dynamic_slice(item_P, (low + i * SEEN_WINDOW,), (SEEN_WINDOW,))
        place = jnp.minimum(jnp.searchsorted(ids_N, item), N - 1)
        here = (ids_N[place] == item) & (item > 0) & (item != target_Q[row])
        column = place % group * (N // group) + place // group
        return hidden_QN.at[row, jnp.where(here, column, N)].set(True, mode="drop")

    windows = jnp.maximum(high - low + SEEN_WINDOW - 1, 0) // SEEN_WINDOW
    return jax.lax.fori_loop(0, windows, mark, jnp.zeros((len(target_Q), N), bool))


def pack_seen(row: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seen items as pairs (row of the chunk, item id 1..V), any order, repeats allowed -> int32 [P] rows and items.

    Distinct pairs sorted by item, so that each block of items finds its own; padded in front with item 0 to a power of
    two, so that few shapes are compiled.
    """
    if not len(row):
        return np.zeros(SEEN_WINDOW, np.int32), np.zeros(SEEN_WINDOW, np.int32)
    key = np.sort(item.astype(np.int64) << 32 | row.astype(np.int64))
    key = key[np.concatenate([[True], key[1:] != key[:-1]])]
    size = max(SEEN_WINDOW, 1 << int(len(key) - 1).bit_length())
    key = np.concatenate([np.zeros(size - len(key), np.int64), key])
    return (key & 0xFFFFFFFF).astype(np.int32), (key >> 32).astype(np.int32)
