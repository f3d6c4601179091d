"""STU, the encoder of production generative recommenders (DLRM-HSTU), as the authors' released modules compute it.

Source: github:meta-recsys/generative-recommenders, modules/stu.py, ops/pytorch/pt_position.py. Against models/hstu.py:
norms and the projection have parameters, SiLU acts on u alone, scores are scaled by 1/sqrt(qk_dim), a position and a
time vector added to the input take the place of the relative bias, and the gate is [u ; o ; u * norm(o)].

As released, quirks included:
* P is read from the end: row clamp(l - i), l the events of the history; the next event to come and every candidate
  (`targets` in the batch) read row 0. So a position knows how many events follow it, and T, by the time from the event
  to the request, how much time. That is right where only the end of a history or its targets are supervised (anchor
  "request"), and tells the future of every other position. Anchor "event" is the causal form: P from the start, T by
  the time to the next event (what models/hstu.py calls "next_event").
* Weights are divided by max_length, a constant. A time in the future of the request counts as no time at all.
* Mid-stack truncation (its L2STU): states of dropped positions leave the stack where they are.
Not copied: the time bucket clamped to the embedding *width* - 1 instead of the table's (ours is clamped to the table);
GroupNorm per head, stochastic depth, `min_full_attn_seq_len`; two dropout rates, of input and layers (here one).
A window counts slots, so the k-th candidate of a row sees k events less than the first (there every candidate stands
right after the history). The released post-processors (L2, LayerNorm) belong to the task: similarity "cosine" is L2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.kernels.attention import Bias, attention
from recscale.layers.norms import LayerNorm, Linear, dropout
from recscale.layers.width_transfer import BaseShape, Factors
from recscale.mesh import recompute

EPS = 1e-6
ANCHORS = ("request", "event")
TIME_BUCKETS, TIME_UNIT = 2048, 60.0  # floor(sqrt(seconds / 60)): the last bucket begins after eight years


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of an STU.

    embed_dim: width of the item vectors; width: of the hidden states (a linear map joins them where they differ).
    qk_dim, v_dim: per head. max_length: the longest history; it divides the attention weights. time_bias: the time
    vector T, which needs timestamps in the batch. anchor: what P and T are measured from, see above. window: events an
    event sees, itself included, 0 = all; prefix: events at the start that see each other and are seen by all.
    truncate_after: layers after which only the last `truncate_to` events, the prefix and the targets of a history go on
    (0 = none). truncate_row: slots of a row after that. 0 keeps the row's length, which fits any packing and saves
    nothing; prefix + truncate_to (+ targets) where a row holds one history, so that the upper layers cost that much
    only. A row with more is filled with NaN, which stops training. attention: which implementation, see
    kernels/attention.py. base: None, or the base shape of width transfer.
    """

    embed_dim: int
    width: int
    depth: int
    heads: int
    qk_dim: int
    v_dim: int
    max_length: int
    dropout: float
    time_bias: bool
    anchor: str
    window: int
    prefix: int
    truncate_after: int
    truncate_to: int
    truncate_row: int
    dtype: str
    attention: str = "blocks"
    base: BaseShape | None = None

    def __post_init__(self):
        for name in ("embed_dim", "width", "depth", "heads", "qk_dim", "v_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        for name in ("window", "prefix", "truncate_after", "truncate_to", "truncate_row"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected 0 (none) or a positive integer")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.anchor not in ANCHORS:
            raise ValueError(f"model.anchor = {self.anchor!r}: expected one of {ANCHORS}")
        if bool(self.truncate_after) != bool(self.truncate_to) or self.truncate_after >= self.depth:
            raise ValueError(
                f"model.truncate_after = {self.truncate_after}, model.truncate_to = {self.truncate_to}: expected both "
                f"0, or 1 <= truncate_after < depth = {self.depth} and truncate_to >= 1"
            )
        if self.truncate_row and self.truncate_row < self.truncate_to + self.prefix:
            raise ValueError(
                f"model.truncate_row = {self.truncate_row}: expected 0 or at least prefix + truncate_to = "
                f"{self.prefix + self.truncate_to}"
            )


class Layer(nnx.Module):
    """One STU layer: u, v, q, k by one projection, pointwise-SiLU attention, gate of three parts, residual."""

    def __init__(self, c: Config, key: jax.Array):
        keys = jax.random.split(key, 2)
        glorot = jax.nn.initializers.glorot_uniform()
        gated = c.heads * c.v_dim
        self.norm_in = LayerNorm(c.width, EPS)
        self.uvqk = Linear(c.width, 2 * gated + 2 * c.heads * c.qk_dim, glorot, keys[0])
        self.norm_out = LayerNorm(gated, EPS)
        self.out = Linear(3 * gated, c.width, glorot, keys[1], bias=False)

    def __call__(self, c: Config, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        (q, k, v), u = self.project(c, x_BLD)
        targets_BL = batch.get("targets")
        how = self.rules(c) | {"targets_BL": targets_BL, "implementation": c.attention}
        o = attention(q, k, v, batch["segment_ids"], self.bias(c, batch), **how)
        return self.finish(c, x_BLD, o, u, key)

    def project(self, c: Config, x_BLD: jax.Array) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
        """Queries, keys [B, L, H, qk_dim] and values [B, L, H, v_dim]; and the gate u, which `finish` takes."""
        B, L, _ = x_BLD.shape
        gated, keyed = c.heads * c.v_dim, c.heads * c.qk_dim
        z = self.uvqk(self.norm_in(x_BLD))
        u, v, q, k = jnp.split(z, (gated, 2 * gated, 2 * gated + keyed), axis=-1)
        q, k = (a.reshape(B, L, c.heads, c.qk_dim) for a in (q, k))
        return (q, k, v.reshape(B, L, c.heads, c.v_dim)), jax.nn.silu(u)

    def rules(self, c: Config) -> dict[str, Any]:
        """How attention is computed: keyword arguments of kernels/attention.py."""
        scale = c.qk_dim**-0.5 * ((c.base.head_dim / c.qk_dim) ** 0.5 if c.base else 1.0)
        return {"kind": "silu", "n": c.max_length, "scale": scale, "window": c.window, "prefix": c.prefix}

    def bias(self, c: Config, batch: dict[str, jax.Array]) -> Bias:
        """No relative bias."""
        del c, batch
        return Bias()

    def finish(self, c: Config, x_BLD: jax.Array, o_BLHE: jax.Array, u: jax.Array, key: jax.Array | None) -> jax.Array:
        """The layer's output from its input and what attention returned."""
        o = o_BLHE.reshape(*x_BLD.shape[:2], c.heads * c.v_dim)
        g = dropout(jnp.concatenate([u, o, u * self.norm_out(o)], axis=-1), c.dropout, key)
        return x_BLD + self.out(g)


class Model(nnx.Module):
    """Embedded events [B, L, embed_dim] to hidden states [B, L, embed_dim]; layers are stacked and scanned."""

    def __init__(self, c: Config, key: jax.Array):
        self.config = c
        keys = jax.random.split(key, 5)
        self.positions = nnx.Param(_uniform(keys[0], c.max_length + 1 + c.prefix, c.embed_dim))
        self.times = nnx.Param(_uniform(keys[1], TIME_BUCKETS, c.embed_dim)) if c.time_bias else None
        self.layers = jax.vmap(lambda k: Layer(c, k))(jax.random.split(keys[2], c.depth))
        glorot = jax.nn.initializers.glorot_uniform()
        joined = c.embed_dim != c.width
        self.up = Linear(c.embed_dim, c.width, glorot, keys[3], bias=False) if joined else None
        self.down = Linear(c.width, c.embed_dim, glorot, keys[4], bias=False) if joined else None

    def __call__(
        self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None, wrap=recompute
    ) -> jax.Array:
        """Hidden states of the packed rows `batch`: segment_ids, positions, and times for the time vector.

        targets (bool [B, L], optional): candidates at the end of a segment, each seen by itself alone; their
        position is that of the event to come, their times are the request's. key: dropout; None evaluates. wrap: put
        around the body of the scan over layers (see recscale/mesh.py). Padding positions hold unspecified values, and
        positions dropped by truncation the state they had: supervise the last `truncate_to` events or targets alone.
        """
        c = self.config
        keys = None if key is None else jax.random.split(key, c.depth + 1)
        x = self.embed(x_BLD, batch, None if keys is None else keys[-1])

        def through(x, layers, layer_keys, batch):
            def step(x, layer_and_key):
                layer, layer_key = layer_and_key
                return layer(c, x, batch, layer_key), None

            return jax.lax.scan(wrap(step), x, (layers, layer_keys))[0]

        first = c.truncate_after or c.depth
        x = through(x, _part(self.layers, 0, first), None if keys is None else keys[:first], batch)
        if c.truncate_after:
            short_x, short, place_BK = truncate(c, x, batch)
            upper = _part(self.layers, first, c.depth)
            short_x = through(short_x, upper, None if keys is None else keys[first:-1], short)
            row_B1 = jnp.arange(len(x))[:, None]
            x = x.at[row_B1, jnp.where(short["segment_ids"] > 0, place_BK, x.shape[1])].set(short_x, mode="drop")
        return self.readout(x)

    def embed(self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """What the first layer reads, [B, L, width]."""
        c = self.config
        x = x_BLD * (c.base.embed_dim if c.base else c.embed_dim) ** 0.5
        x = x + self.positions[...].at[position_rows(c, batch)].get(mode="clip")
        if self.times is not None:
            x = x + self.times[...][time_buckets(c, batch)]
        x = (dropout(x, c.dropout, key) * (batch["segment_ids"] > 0)[:, :, None]).astype(c.dtype)
        return x if self.up is None else self.up(x)

    def stages(self) -> tuple[tuple[Layer, Callable | None], ...]:
        """The layers before and after truncation, and what happens to states and batch between (serve/cache.py)."""
        c = self.config
        if not c.truncate_after:
            return ((self.layers, None),)
        lower, upper = _part(self.layers, 0, c.truncate_after), _part(self.layers, c.truncate_after, c.depth)
        return ((lower, lambda x, batch: truncate(c, x, batch)[:2]), (upper, None))

    @property
    def rewrites_history(self) -> bool:
        """Whether a further event changes the states of those before it, so that none of them can be kept."""
        return self.config.anchor == "request" or self.config.truncate_after > 0

    def readout(self, x_BLD: jax.Array) -> jax.Array:
        """Hidden states [B, L, embed_dim], float32, from what the last layer gives."""
        c = self.config
        x = (x_BLD if self.down is None else self.down(x_BLD)).astype(jnp.float32)
        return x * (c.base.embed_dim / c.embed_dim) if c.base else x


def position_rows(c: Config, batch: dict[str, jax.Array]) -> jax.Array:
    """Row of P that each position reads, int32 [B, L]."""
    own = batch["positions"]
    if c.anchor == "event":
        return own
    return jnp.where(_real_prefix(c, batch), own, _events_left(batch) + c.prefix)


def time_buckets(c: Config, batch: dict[str, jax.Array]) -> jax.Array:
    """Row of T that each position reads: floor(sqrt(seconds / 60)), to the request or to the next event, [B, L]."""
    until = batch["query_timestamp"]
    if c.anchor == "request":  # that of the segment's last position
        until = jnp.take_along_axis(until, _last_slot(batch["segment_ids"]), axis=1)
    seconds = jnp.maximum(until - batch["timestamp"], 0).astype(jnp.float32)
    return jnp.minimum(jnp.sqrt(seconds / TIME_UNIT).astype(jnp.int32), TIME_BUCKETS - 1)


def truncate(c: Config, x_BLD: jax.Array, batch: dict[str, jax.Array]):
    """What goes on past layer truncate_after: (states [B, K, D], batch of those slots, their old slots [B, K]).

    The kept positions of a row move together to its left, in their order, so a segment stays in one piece.
    """
    real = batch["segment_ids"] > 0
    kept = real & ((_events_left(batch) <= c.truncate_to) | _real_prefix(c, batch))
    size = min(c.truncate_row or x_BLD.shape[1], x_BLD.shape[1])
    place_BK = jnp.argsort(~kept, axis=1, stable=True)[:, :size]
    short = {
        name: jnp.take_along_axis(batch[name], place_BK, axis=1) for name in ("segment_ids", "targets") if name in batch
    }
    short["segment_ids"] = jnp.where(jnp.take_along_axis(kept, place_BK, axis=1), short["segment_ids"], 0)
    x = jnp.take_along_axis(x_BLD, place_BK[:, :, None], axis=1)
    return jnp.where((kept.sum(axis=1) > size)[:, None, None], jnp.nan, x), short, place_BK


def _events_left(batch: dict[str, jax.Array]) -> jax.Array:
    """Events of the segment from each position to the end of its history, itself included; 0 for targets."""
    ids = batch["segment_ids"]
    slot_1L = jnp.arange(ids.shape[1])[None]
    if "targets" not in batch:
        return _last_slot(ids) - slot_1L + 1
    target = batch["targets"].astype(bool)
    history = jnp.where(target, 0, ids)
    return jnp.where(target, 0, _last_slot(history) - slot_1L + 1)


def _last_slot(ids_BL: jax.Array) -> jax.Array:
    """The slot at which the run of equal ids that a position is in ends, [B, L]."""
    length = ids_BL.shape[1]
    ends = ids_BL != jnp.pad(ids_BL, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    return jax.lax.cummin(jnp.where(ends, jnp.arange(length)[None], length - 1), axis=1, reverse=True)


def _real_prefix(c: Config, batch: dict[str, jax.Array]) -> jax.Array:
    return (batch["positions"] < c.prefix) & (batch["segment_ids"] > 0)


def _part(layers: Layer, start: int, stop: int) -> Layer:
    return jax.tree.map(lambda p: p[start:stop], layers)


def _uniform(key: jax.Array, rows: int, dim: int) -> jax.Array:
    """Uniform(+-1 / sqrt(rows)), as the released position and time tables are drawn."""
    return jax.random.uniform(key, (rows, dim), minval=-(rows**-0.5), maxval=rows**-0.5)


def flops(c: Config, length: int) -> dict[str, float]:
    """Forward FLOPs of one history of `length` events by part (multiply-add = 2, pairs that see each other once).

    Derived from the layer equations; the layers above `truncate_after` see the prefix and the last events alone.
    """
    gated, keyed = c.heads * c.v_dim, c.heads * c.qk_dim
    parts = {"projections": 0.0, "attention": 0.0}
    upper = min(length, c.prefix + c.truncate_to)
    for layers, events in ((c.truncate_after or c.depth, length), (c.depth - (c.truncate_after or c.depth), upper)):
        parts["projections"] += layers * 2.0 * events * (c.width * 2 * (gated + keyed) + 3 * gated * c.width)
        parts["attention"] += layers * 2.0 * (keyed + gated) * _pairs(c, events)
    parts["projections"] += 0.0 if c.embed_dim == c.width else 4.0 * length * c.embed_dim * c.width
    return parts


def _pairs(c: Config, length: int) -> float:
    """Pairs of a query and a key that it sees, in one history."""
    before = np.arange(1, length + 1)  # keys up to the query, itself included
    near = np.minimum(before, c.window) if c.window else before
    far = np.minimum(c.prefix, before - near)  # keys of the prefix beyond the window
    first = min(c.prefix, length)
    return float((near + far).sum() + first * (first - 1) / 2)


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group; the position and time vectors are "positions", tables are counted by their owner."""
    gated, keyed = c.heads * c.v_dim, c.heads * c.qk_dim
    projected = 2 * (gated + keyed)
    per_layer = 2 * c.width + (c.width + 1) * projected + 2 * gated + 3 * gated * c.width
    joined = 0 if c.embed_dim == c.width else 2 * c.embed_dim * c.width
    rows = c.max_length + 1 + c.prefix + (TIME_BUCKETS if c.time_bias else 0)
    return {"dense": c.depth * per_layer + joined, "positions": rows * c.embed_dim}


def width_factors(c: Config) -> dict[str, Factors]:
    """Initial deviations and learning rates under width transfer by name of parameter; what is not named is unchanged.

    Empty without a base shape. A Glorot draw already falls with the width.
    """
    if c.base is None:
        return {}
    m, e = c.width / c.base.width, c.embed_dim / c.base.embed_dim
    glorot = ((c.embed_dim + c.width) / (c.base.embed_dim + c.base.width)) ** 0.5
    found = {f"layers.{name}.kernel": Factors(1.0, 1 / m) for name in ("uvqk", "out")}
    joined = {"up.kernel": Factors(glorot * e**-0.5, 1 / e), "down.kernel": Factors(glorot * e**0.5 / m, 1 / m)}
    return found if c.embed_dim == c.width else found | joined
