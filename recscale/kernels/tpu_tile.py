"""A tile of attention inside a TPU kernel: facts, biases, scores and their gradients.

The position bias of a tile is a slice of the table, rolled by one more in each row; the time bucket is computed per
pair, and its entry gathered from one vector register.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from recscale.kernels import tiles
from recscale.kernels.pairs import time_bucket
from recscale.kernels.tiles import BUCKETS, FIRST, HIDDEN, LAST, QUERY_TIME, TIME, Options, Tile


def make_tile(inputs, i, j, options: Options, queries_in_rows: bool):
    """(Tile, position bias, time buckets) of query block i and key block j; biases None where there are none."""
    q, k, _, _, stats, facts, keys, position, time = inputs
    rows, columns = (q.shape[0], k.shape[0]) if queries_in_rows else (k.shape[0], q.shape[0])
    slot_rows = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    slot_columns = jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    slot_q, slot_k = (slot_rows, slot_columns) if queries_in_rows else (slot_columns, slot_rows)

    def turn(ref, of_queries: bool) -> list[Any]:
        if ref is None:
            return [None, None]
        x = ref[...]
        if of_queries == queries_in_rows:
            x = jnp.transpose(x)
            return [x[:, row : row + 1] for row in range(x.shape[1])]
        return [x[row : row + 1] for row in range(x.shape[0])]

    of_queries, of_keys, of_softmax = turn(facts, True), turn(keys, False), turn(stats, True)
    tile = Tile(
        i=i * q.shape[0] + slot_q, j=j * k.shape[0] + slot_k, first=of_queries[FIRST], last=of_queries[LAST],
        hidden=of_keys[HIDDEN], query_time=of_queries[QUERY_TIME], time=of_keys[TIME],
        logsumexp=of_softmax[0], delta=of_softmax[1],
    )  # fmt: skip
    bias = None
    if position is not None:
        wide = jnp.broadcast_to(position[...], (rows, rows + columns))
        bias = pltpu.roll(wide, 0, 1, stride=1, stride_axis=0)[:, rows:]
    bucket = None
    if time is not None:
        bucket = jnp.broadcast_to(time_bucket(tile.query_time - tile.time), (rows, columns))
        table = jnp.broadcast_to(time[...], (rows, BUCKETS))
        entries = [
            jnp.take_along_axis(table, bucket[:, x : x + BUCKETS], axis=1, mode="promise_in_bounds")
            for x in range(0, columns, BUCKETS)
        ]
        looked_up = jnp.concatenate(entries, axis=1) if len(entries) > 1 else entries[0]
        bias = looked_up if bias is None else bias + looked_up
    return tile, bias, bucket


def product(a, b, contract_rows: bool = False):
    """a b, or a b^T (rows of both contracted with each other's), summed in float32."""
    dims = (((1,), (1,)), ((), ())) if contract_rows else (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def scores_of(a, b, bias, options: Options):
    """Scores of a tile, float32; a: the side in the rows."""
    scores = product(a, b, contract_rows=True) * options.scale
    return scores if bias is None else scores + bias


def gradients_of(inputs, i, j, options: Options, queries_in_rows: bool):
    """(weights, gradients of the scores, mask, time buckets) of a tile, keys in the rows unless queries_in_rows."""
    q, k, v, out_gradient = inputs[:4]
    tile, bias, bucket = make_tile(inputs, i, j, options, queries_in_rows)
    (a, b), (c, d) = ((q, k), (out_gradient, v)) if queries_in_rows else ((k, q), (v, out_gradient))
    scores = scores_of(a[...], b[...], bias, options)
    products = product(c[...], d[...], contract_rows=True)
    mask = tiles.visible(tile, options)
    return *tiles.weights_and_slopes(scores, products, mask, tile, options), mask, bucket
