"""Keys and values of a history, kept: it is encoded once, grows by new events, and candidates are scored against it.

Candidates of one list do not see each other (M-FALCON, arXiv 2402.17152 section 3.3): each stands right after the
history, at the slot of the event to come, and sees the history and itself. What comes out equals the uncached model on
that history with that candidate appended, for every way to cut a history into pieces and a list into micro-batches.

A model is served through methods that models/*.py have: `embed` makes the input of its first layer, `stages` are its
stacked layers, `readout` makes the hidden states; a layer's `project` gives queries, keys and values, `rules` and
`bias` say how attention is computed, `finish` makes its output. Nothing else of a model is known here.

A history can be kept where a new event changes nothing before it: in HSTU, SASRec, ARGUS and the STU with anchor
"event", as long as a contextual prefix lies in the first piece. What an event's states depend on must be known
when it is encoded: its own columns and, where the time bias or vector reads the time of the next event ("next_event"),
that time. The last event of a history is therefore appended when the one after it has come, or stands among the
candidates, with the time of the request. With "last_event" nothing has to wait.
An STU that measures from the request, or truncates, is encoded and scored against for that request; it takes no append.

Shapes: B users, L events, M tokens, C capacity, H heads, N layers of a stage. A cache holds one history per row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recscale.kernels.attention import Bias, attention, time_bucket
from recscale.kernels.dense import WEIGHTS

Batch = dict[str, jax.Array]
POINTWISE = ("silu",)  # kinds of attention in which the weight of a key does not depend on the others


class Stage(NamedTuple):
    """What is kept of the layers of one stage: slot s of a row holds the s-th position of its history.

    keys [N, B, H, C, D], values [N, B, H, C, E], times int32 [B, C] (zeros without timestamps), count int32 [B].
    """

    keys: jax.Array
    values: jax.Array
    times_BC: jax.Array
    count_B: jax.Array


Cache = tuple[Stage, ...]
Scores = tuple[jax.Array, jax.Array]  # of pairs, and which of them see each other


@functools.partial(jax.jit, static_argnames=("capacity",))
def encode(model: Any, x_BLD: jax.Array, batch: Batch, *, capacity: int) -> tuple[Cache, jax.Array]:
    """A cache of the histories in `batch`, and their hidden states [B, L, D].

    One history per row from its first slot on; batch as for the model. capacity: events there will be room for. Raises
    ValueError for a capacity below L.
    """
    if capacity < x_BLD.shape[1]:
        raise ValueError(f"capacity = {capacity}: expected room for the {x_BLD.shape[1]} positions to encode")
    c, stages = model.config, []
    x = model.embed(x_BLD, batch)
    room = capacity
    for layers, then in model.stages():
        how = {"implementation": c.attention} if hasattr(c, "attention") else {}

        def step(x, layer, batch=batch, how=how):
            (q, k, v), more = layer.project(c, x)
            o = attention(q, k, v, batch["segment_ids"], layer.bias(c, batch), **layer.rules(c), **how)
            return layer.finish(c, x, o, more, None), (_heads_first(k), _heads_first(v))

        x, (keys, values) = jax.lax.scan(step, x, layers)
        spare = max(room - keys.shape[3], 0)
        keys, values = (jnp.pad(a, [(0, 0)] * 3 + [(0, spare), (0, 0)]) for a in (keys, values))
        times = jnp.pad(_times(batch), [(0, 0), (0, spare)])
        stages.append(Stage(keys, values, times, _count(batch)))
        if then is not None:
            x, batch = then(x, batch)
            room = 0
    return tuple(stages), model.readout(x)


@functools.partial(jax.jit, donate_argnames=("cache",))
def append(model: Any, cache: Cache, x_BMD: jax.Array, batch: Batch) -> tuple[Cache, jax.Array]:
    """The cache with further events, and their hidden states [B, M, D]. Donates the cache: use what is returned.

    batch: as for the model, the M positions of a row being new events of its history from the first slot on
    (segment_ids 0: none), `positions` counted from the start of the history. Events beyond the capacity are lost: the
    caller keeps count. Raises ValueError for a model in which a new event changes earlier states.
    """
    if getattr(model, "rewrites_history", False):
        raise ValueError("append: this model measures from the end of a history, so all of it changes: encode it again")
    c, (stage,) = model.config, cache
    real_BM = batch["segment_ids"] > 0
    capacity = stage.keys.shape[3]
    slot_BM = stage.count_B[:, None] + jnp.arange(real_BM.shape[1])[None]
    place_BM = jnp.where(real_BM, slot_BM, capacity)
    row_B1 = jnp.arange(len(slot_BM))[:, None]
    times_BC = stage.times_BC.at[row_B1, place_BM].set(_times(batch), mode="drop")
    seen_BMC = jnp.arange(capacity)[None, None] <= slot_BM[:, :, None]

    def step(carry, layer):
        x, keys, values, i = carry
        (q, k, v), more = layer.project(c, x)
        # Written in place: the cache is carried along, not rebuilt from the layers' results.
        keys = keys.at[i, row_B1, :, place_BM].set(k, mode="drop")
        values = values.at[i, row_B1, :, place_BM].set(v, mode="drop")
        known = _Keys(keys[i], values[i], times_BC, seen_BMC)
        x = layer.finish(c, x, _attend(c, layer, q, slot_BM, batch, known), more, None)
        return (x, keys, values, i + 1), None

    ((layers, _),) = model.stages()
    start = (model.embed(x_BMD, batch), stage.keys, stage.values, 0)
    (x, keys, values, _), _ = jax.lax.scan(step, start, layers)
    return (Stage(keys, values, times_BC, stage.count_B + _count(batch)),), model.readout(x)


@functools.partial(jax.jit, static_argnames=("group", "micro"))
def score(model: Any, cache: Cache, x_BMD: jax.Array, batch: Batch, *, group: int = 1, micro: int = 0) -> jax.Array:
    """Hidden states [B, M, D] of candidates, each seeing its row's history and itself.

    batch: as for the model, `positions` those of the event to come. group: tokens of a candidate (side by side, each
    seeing those before it in its group). micro: candidates scored at a time, 0 = all; it bounds memory and must divide
    their number. Raises ValueError where it does not.
    """
    M = x_BMD.shape[1]
    if M % (group * (micro or 1)):
        raise ValueError(f"{M} tokens: expected a multiple of group x micro = {group} x {micro or 1}")
    size = (micro or M // group) * group
    parts = M // size
    if parts <= 1:
        return _score(model, cache, x_BMD, batch, group)

    def split(a):
        return jnp.moveaxis(a.reshape(a.shape[0], parts, size, *a.shape[2:]), 1, 0)

    out = jax.lax.map(lambda part: _score(model, cache, part[0], part[1], group), jax.tree.map(split, (x_BMD, batch)))
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], M, -1)


def _score(model: Any, cache: Cache, x_BMD: jax.Array, batch: Batch, group: int) -> jax.Array:
    c = model.config
    x = model.embed(x_BMD, batch)
    place_M = jnp.arange(x.shape[1]) % group
    for stage, (layers, _) in zip(cache, model.stages(), strict=True):
        slot_BM = stage.count_B[:, None] + place_M[None]
        seen_B1C = (jnp.arange(stage.keys.shape[3])[None] < stage.count_B[:, None])[:, None]

        def step(x, layer_and_kept, stage=stage, slot_BM=slot_BM, seen_B1C=seen_B1C):
            layer, keys, values = layer_and_kept
            (q, k, v), more = layer.project(c, x)
            known = _Keys(keys, values, stage.times_BC, seen_B1C)
            o = _attend(c, layer, q, slot_BM, batch, known, own=(k, v), group=group)
            return layer.finish(c, x, o, more, None), None

        x, _ = jax.lax.scan(step, x, (layers, stage.keys, stage.values))
    return model.readout(x)


class _Keys(NamedTuple):
    """Kept keys [B, H, C, D] and values of a layer, their times [B, C], and which a query sees, [B, M or 1, C]."""

    keys: jax.Array
    values: jax.Array
    times_BC: jax.Array
    seen_BMC: jax.Array


def _attend(c: Any, layer: Any, q_BMHD, slot_BM, batch: Batch, known: _Keys, own=None, group: int = 1) -> jax.Array:
    """Attention [B, M, H, E] of new queries over kept keys and, for candidates, over those of their own group."""
    rules = layer.rules(c)
    kind, n, scale = rules["kind"], rules["n"], rules["scale"]
    window, prefix = rules.get("window", 0), rules.get("prefix", 0)
    bias = layer.bias(c, batch)
    q = _heads_first(q_BMHD)
    B, H, M, _ = q.shape
    j_11C = jnp.arange(known.keys.shape[2])[None, None]
    i_BM1 = slot_BM[:, :, None]
    seen = known.seen_BMC & ((i_BM1 - j_11C < window) | (j_11C < prefix)) if window else known.seen_BMC
    scores = jnp.einsum("bhmd,bhcd->bhmc", q, known.keys, preferred_element_type=jnp.float32) * scale
    far = (scores + _relative(bias, n, i_BM1, j_11C, known.times_BC[:, None])[:, None], seen[:, None])
    if own is None:
        return _heads_first(_weighted("bhmc,bhce->bhme", WEIGHTS[kind](far[0], far[1], n), known.values))
    k, v = (_heads_first(a).reshape(B, H, M // group, group, -1) for a in own)
    near = jnp.einsum("bhxgd,bhxfd->bhxgf", q.reshape(k.shape), k, preferred_element_type=jnp.float32) * scale
    j_BMg = i_BM1 + (jnp.arange(group)[None, None] - (jnp.arange(M) % group)[None, :, None])
    times = _times(batch).reshape(B, M // group, 1, group)
    times_BMg = jnp.broadcast_to(times, (B, M // group, group, group)).reshape(B, M, group)
    near_seen = (j_BMg <= i_BM1) & ((i_BM1 - j_BMg < window) | (window == 0))
    near = near.reshape(B, H, M, group) + _relative(bias, n, i_BM1, j_BMg, times_BMg)[:, None]
    far_weights, near_weights = _joint_weights(kind, n, far, (near, near_seen[:, None]))
    out = _weighted("bhmc,bhce->bhme", far_weights, known.values)
    near_weights = near_weights.reshape(B, H, M // group, group, group)
    return _heads_first(out + _weighted("bhxgf,bhxfe->bhxge", near_weights, v).reshape(out.shape))


def _joint_weights(kind: str, n: int, far: Scores, near: Scores) -> tuple[jax.Array, jax.Array]:
    """Weights of a query over two sets of keys: pointwise ones of each alone, softmax over both."""
    if kind in POINTWISE:
        return WEIGHTS[kind](far[0], far[1], n), WEIGHTS[kind](near[0], near[1], n)
    mask = jnp.broadcast_to(far[1], (*near[1].shape[:3], far[1].shape[3]))
    weights = WEIGHTS[kind](jnp.concatenate([far[0], near[0]], -1), jnp.concatenate([mask, near[1]], -1), n)
    return weights[..., : far[0].shape[3]], weights[..., far[0].shape[3] :]


def _relative(bias: Bias, n: int, i_BM1, j_BMC, times_BMC) -> jax.Array:
    """What the relative bias adds to the scores of pairs, [B, M, C] or broadcastable to it."""
    total = jnp.zeros((1, 1, 1), jnp.float32)
    if bias.position is not None:
        total = total + bias.position[jnp.clip(j_BMC - i_BM1 + (n - 1), 0, 2 * n - 2)]
    if bias.time is not None:
        assert bias.query_time_BL is not None
        total = total + bias.time[time_bucket(bias.query_time_BL[:, :, None] - times_BMC)]
    return total


def _weighted(pattern: str, weights: jax.Array, values: jax.Array) -> jax.Array:
    out = jnp.einsum(pattern, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return out.astype(values.dtype)


def _heads_first(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


def _count(batch: Batch) -> jax.Array:
    return (batch["segment_ids"] > 0).sum(axis=1).astype(jnp.int32)


def _times(batch: Batch) -> jax.Array:
    """The times of new keys, int32 [B, M]."""
    return batch["timestamp"] if "timestamp" in batch else jnp.zeros_like(batch["segment_ids"])
