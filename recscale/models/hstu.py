"""HSTU, the encoder of generative recommenders (arXiv 2402.17152), as its authors' released code computes it.

Three facts of that code that a reader may take for slips: the second norm works in its epsilon regime at the start (eps
must be exactly 1e-6 and n = max_length + 11), there is no 1/sqrt(d), and at query time the time bias sees the timestamp
of the event being predicted (`query_time`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.kernels.attention import NUM_TIME_BUCKETS, Bias, attention
from recscale.layers.norms import dropout, layer_norm, matmul
from recscale.layers.width_transfer import BaseShape, Factors
from recscale.mesh import recompute

EPS = 1e-6
QUERY_TIMES = ("next_event", "last_event")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of an HSTU.

    embed_dim: width of the item vectors; width: of the hidden states (a linear map joins them where they differ).
    qk_dim, v_dim: per head. max_length: L, the longest history; output_length: G (10 as published), which only widens
    the mask constant n = L + G + 1. time_bias: needs timestamps in the batch. query_time: "next_event" (as published:
    the last position knows when the predicted event happens) or "last_event". prefix: positions at the start of a
    history that see each other and that all see. attention: one of kernels.attention.IMPLEMENTATIONS. base: None, or
    the base shape of width transfer (layers/width_transfer.py).
    """

    embed_dim: int
    width: int
    depth: int
    heads: int
    qk_dim: int
    v_dim: int
    max_length: int
    output_length: int
    dropout: float
    time_bias: bool
    query_time: str
    dtype: str
    prefix: int = 0
    attention: str = "blocks"
    base: BaseShape | None = None

    def __post_init__(self):
        for name in ("embed_dim", "width", "depth", "heads", "qk_dim", "v_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.query_time not in QUERY_TIMES:
            raise ValueError(f"model.query_time = {self.query_time!r}: expected one of {QUERY_TIMES}")

    @property
    def n(self) -> int:
        """Mask width of the reference: it divides the attention weights and sizes the position tables."""
        return self.max_length + self.output_length + 1


_activate = jax.nn.silu  # on all four of u, v, q, k


class Layer(nnx.Module):
    """One HSTU layer: u, v, q, k by one projection, pointwise-SiLU attention, gate, output projection, residual."""

    def __init__(self, c: Config, key: jax.Array):
        keys = jax.random.split(key, 5)
        normal = jax.nn.initializers.normal(0.02)
        gated = c.heads * c.v_dim
        self.uvqk = nnx.Param(normal(keys[0], (c.width, 2 * gated + 2 * c.heads * c.qk_dim)))
        self.out = nnx.Param(jax.nn.initializers.glorot_uniform()(keys[1], (gated, c.width)))
        bound = gated**-0.5
        self.out_bias = nnx.Param(jax.random.uniform(keys[2], (c.width,), minval=-bound, maxval=bound))
        self.position_bias = nnx.Param(normal(keys[3], (2 * c.n - 1,)))
        self.time_bias = nnx.Param(normal(keys[4], (NUM_TIME_BUCKETS,))) if c.time_bias else None

    def __call__(self, c: Config, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        (q, k, v), u = self.project(c, x_BLD)
        o = attention(q, k, v, batch["segment_ids"], self.bias(c, batch), **self.rules(c), implementation=c.attention)
        return self.finish(c, x_BLD, o, u, key)

    def project(self, c: Config, x_BLD: jax.Array) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
        """Queries, keys [B, L, H, qk_dim] and values [B, L, H, v_dim]; and the gate u, which `finish` takes."""
        B, L, _ = x_BLD.shape
        z = _activate(matmul(layer_norm(x_BLD, EPS), self.uvqk[...]))
        gated, keyed = c.heads * c.v_dim, c.heads * c.qk_dim
        u, v, q, k = jnp.split(z, (gated, 2 * gated, 2 * gated + keyed), axis=-1)
        q, k = (a.reshape(B, L, c.heads, c.qk_dim) for a in (q, k))
        return (q, k, v.reshape(B, L, c.heads, c.v_dim)), u

    def rules(self, c: Config) -> dict[str, Any]:
        """How attention is computed: keyword arguments of kernels/attention.py."""
        scale = c.base.head_dim / c.qk_dim if c.base else 1.0
        return {"kind": "silu", "n": c.n, "scale": scale, "prefix": c.prefix}

    def bias(self, c: Config, batch: dict[str, jax.Array]) -> Bias:
        """The relative bias of the positions in `batch`, as queries and as keys."""
        if self.time_bias is None:
            return Bias(self.position_bias[...])
        query_time = batch["query_timestamp"] if c.query_time == "next_event" else batch["timestamp"]
        return Bias(self.position_bias[...], self.time_bias[...], query_time, batch["timestamp"])

    def finish(self, c: Config, x_BLD: jax.Array, o_BLHE: jax.Array, u: jax.Array, key: jax.Array | None) -> jax.Array:
        """The layer's output from its input and what attention returned."""
        o = o_BLHE.reshape(*x_BLD.shape[:2], c.heads * c.v_dim)
        g = dropout(u * layer_norm(o, EPS), c.dropout, key)
        return x_BLD + matmul(g, self.out[...]) + self.out_bias[...].astype(x_BLD.dtype).reshape(1, 1, -1)


class Model(nnx.Module):
    """Embedded events [B, L, embed_dim] to hidden states [B, L, embed_dim]; layers are stacked and scanned."""

    def __init__(self, c: Config, key: jax.Array):
        self.config = c
        keys = jax.random.split(key, 4)
        # The reference first draws P truncated-normal and then overwrites it: the effective draw is xavier-normal.
        self.positions = nnx.Param(jax.nn.initializers.glorot_normal()(keys[0], (c.n, c.embed_dim)))
        self.layers = jax.vmap(lambda k: Layer(c, k))(jax.random.split(keys[1], c.depth))
        glorot = jax.nn.initializers.glorot_uniform()
        joined = c.embed_dim != c.width
        self.up = nnx.Param(glorot(keys[2], (c.embed_dim, c.width))) if joined else None
        self.down = nnx.Param(glorot(keys[3], (c.width, c.embed_dim))) if joined else None

    def __call__(
        self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None, wrap=recompute
    ) -> jax.Array:
        """Hidden states of the packed rows `batch` (segment_ids, positions and, for the time bias, times).

        key: dropout; None evaluates. wrap: put around the body of the scan over layers (see recscale/mesh.py).
        Padding positions hold unspecified values.
        """
        c = self.config
        keys = None if key is None else jax.random.split(key, c.depth + 1)
        x = self.embed(x_BLD, batch, None if keys is None else keys[-1])

        def step(x, layer_and_key):
            layer, layer_key = layer_and_key
            return layer(c, x, batch, layer_key), None

        x, _ = jax.lax.scan(wrap(step), x, (self.layers, None if keys is None else keys[:-1]))
        return self.readout(x)

    def embed(self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """What the first layer reads, [B, L, width]."""
        c = self.config
        x = x_BLD * (c.base.embed_dim if c.base else c.embed_dim) ** 0.5 + self.positions[...].at[
            batch["positions"]
        ].get(mode="clip")
        x = dropout(x, c.dropout, key) * (batch["segment_ids"] > 0)[:, :, None]
        x = x.astype(c.dtype)
        return x if self.up is None else matmul(x, self.up[...])

    def stages(self) -> tuple[tuple[Layer, None], ...]:
        """The stacked layers, and what happens to the states after them: nothing (see serve/cache.py)."""
        return ((self.layers, None),)

    def readout(self, x_BLD: jax.Array) -> jax.Array:
        """Hidden states [B, L, embed_dim], float32, from what the last layer gives."""
        c = self.config
        x = x_BLD if self.down is None else matmul(x_BLD, self.down[...])
        x = x.astype(jnp.float32)
        return x * (c.base.embed_dim / c.embed_dim) if c.base else x


def flops(c: Config, length: int) -> dict[str, float]:
    """Forward FLOPs of one history of `length` events by part (multiply-add = 2, causal attention counted once).

    Source: derived from the layer equations; agrees with arXiv 2402.17152's released shapes.
    """
    gated, keyed = c.heads * c.v_dim, c.heads * c.qk_dim
    per_layer = 2 * length * (c.width * 2 * (gated + keyed) + gated * c.width)
    joined = 0 if c.embed_dim == c.width else 4 * length * c.embed_dim * c.width
    attention_flops = 2 * (keyed + gated) * length * (length + 1) / 2
    return {"projections": float(c.depth * per_layer + joined), "attention": float(c.depth * attention_flops)}


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group; tables are counted by their owner."""
    gated, keyed = c.heads * c.v_dim, c.heads * c.qk_dim
    per_layer = c.width * 2 * (gated + keyed) + gated * c.width + c.width + 2 * c.n - 1
    per_layer += NUM_TIME_BUCKETS if c.time_bias else 0
    joined = 0 if c.embed_dim == c.width else 2 * c.embed_dim * c.width
    return {"dense": c.depth * per_layer + joined, "positions": c.n * c.embed_dim}


def width_factors(c: Config) -> dict[str, Factors]:
    """Initial deviations and learning rates under width transfer by name of parameter; what is not named is unchanged.

    Empty without a base shape. A Glorot draw already falls with the width, a normal(0.02) does not.
    """
    if c.base is None:
        return {}
    m, e = c.width / c.base.width, c.embed_dim / c.base.embed_dim
    glorot = ((c.embed_dim + c.width) / (c.base.embed_dim + c.base.width)) ** 0.5
    found = {
        "positions": Factors(((c.n + c.embed_dim) / (c.n + c.base.embed_dim)) ** 0.5, 1.0),
        "layers.uvqk": Factors(m**-0.5, 1 / m),
        "layers.out": Factors(1.0, 1 / m),
        "layers.out_bias": Factors(m**0.5, 1.0),
    }
    joined = {"up": Factors(glorot * e**-0.5, 1 / e), "down": Factors(glorot * e**0.5 / m, 1 / m)}
    return found if c.embed_dim == c.width else found | joined
