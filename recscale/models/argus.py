"""The encoder of ARGUS (arXiv 2507.15994): a causal pre-norm Transformer, 12 depth width^2 parameters.

The paper names sizes and contexts (512 to 8,192), not the block: ours is the standard one, without biases, with an MLP
of four widths, so that all four sizes (scaling/recipes.py) come out to rounding. Its heads and tokens are those of
tasks/feedback.py. Times enter as a bucketed relative bias of the scores, computed inside the attention kernel
(`time_bias`), which the paper leaves open; `query_time` is as in models/hstu.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.kernels.attention import NUM_TIME_BUCKETS, Bias, attention
from recscale.layers.norms import LayerNorm, Linear, dropout, truncated_normal
from recscale.layers.width_transfer import BaseShape, Factors
from recscale.mesh import recompute

EPS = 1e-6
QUERY_TIMES = ("next_event", "last_event")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the encoder.

    embed_dim: width of the item vectors; width: of the hidden states (a linear map joins them where they differ).
    max_length: the most tokens of a history (events times tokens per event). prefix: positions at the start of a
    history that see each other and that all see. attention: one of kernels.attention.IMPLEMENTATIONS. base: None, or
    the base shape of width transfer.
    """

    embed_dim: int
    width: int
    depth: int
    heads: int
    max_length: int
    dropout: float
    time_bias: bool
    query_time: str
    dtype: str
    prefix: int = 0
    attention: str = "blocks"
    base: BaseShape | None = None

    def __post_init__(self):
        for name in ("embed_dim", "width", "depth", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        if self.width % self.heads:
            raise ValueError(f"model.heads = {self.heads} does not divide model.width = {self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.query_time not in QUERY_TIMES:
            raise ValueError(f"model.query_time = {self.query_time!r}: expected one of {QUERY_TIMES}")


class Layer(nnx.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): project, attend, finish, so that keys and values can be kept."""

    def __init__(self, c: Config, key: jax.Array):
        keys = jax.random.split(key, 5)
        init, last = truncated_normal(0.02), truncated_normal(0.02 / (2 * c.depth) ** 0.5)
        self.norm_attention = LayerNorm(c.width, EPS)
        self.qkv = Linear(c.width, 3 * c.width, init, keys[0], bias=False)
        self.out = Linear(c.width, c.width, last, keys[1], bias=False)
        self.norm_mlp = LayerNorm(c.width, EPS)
        self.mlp_in = Linear(c.width, 4 * c.width, init, keys[2], bias=False)
        self.mlp_out = Linear(4 * c.width, c.width, last, keys[3], bias=False)
        self.time_bias = nnx.Param(truncated_normal(0.02)(keys[4], (NUM_TIME_BUCKETS,))) if c.time_bias else None

    def project(self, c: Config, x_BLD: jax.Array) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        """Queries, keys and values, each [B, L, H, D / H]; `finish` needs nothing else."""
        shape = (*x_BLD.shape[:2], c.heads, c.width // c.heads)
        q, k, v = jnp.split(self.qkv(self.norm_attention(x_BLD)), 3, axis=-1)
        return (q.reshape(shape), k.reshape(shape), v.reshape(shape)), None

    def rules(self, c: Config) -> dict[str, Any]:
        """How attention is computed: keyword arguments of kernels/attention.py."""
        head_dim = c.width // c.heads
        scale = head_dim**-0.5 * ((c.base.head_dim / head_dim) ** 0.5 if c.base else 1.0)
        return {"kind": "softmax", "n": c.max_length, "scale": scale, "prefix": c.prefix}

    def bias(self, c: Config, batch: dict[str, jax.Array]) -> Bias:
        """What is added to the scores."""
        if self.time_bias is None:
            return Bias()
        query_time = batch["query_timestamp"] if c.query_time == "next_event" else batch["timestamp"]
        return Bias(None, self.time_bias[...], query_time, batch["timestamp"])

    def finish(
        self, c: Config, x_BLD: jax.Array, attended_BLHD: jax.Array, more: None, key: jax.Array | None
    ) -> jax.Array:
        """The layer's output from its input and what was attended to."""
        del more
        keys = (None, None) if key is None else jax.random.split(key, 2)
        x = x_BLD + dropout(self.out(attended_BLHD.reshape(x_BLD.shape)), c.dropout, keys[0])
        return x + dropout(self.mlp_out(jax.nn.gelu(self.mlp_in(self.norm_mlp(x)))), c.dropout, keys[1])

    def __call__(self, c: Config, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        (q, k, v), more = self.project(c, x_BLD)
        attended = attention(
            q, k, v, batch["segment_ids"], self.bias(c, batch), **self.rules(c), implementation=c.attention
        )
        return self.finish(c, x_BLD, attended, more, key)


class Model(nnx.Module):
    """Embedded tokens [B, L, embed_dim] to hidden states [B, L, embed_dim]; layers are stacked and scanned."""

    def __init__(self, c: Config, key: jax.Array):
        self.config = c
        keys = jax.random.split(key, 4)
        self.positions = nnx.Param(truncated_normal(0.02)(keys[0], (c.max_length, c.embed_dim)))
        self.layers = jax.vmap(lambda k: Layer(c, k))(jax.random.split(keys[1], c.depth))
        self.norm = LayerNorm(c.width, EPS)
        glorot = jax.nn.initializers.glorot_uniform()
        joined = c.embed_dim != c.width
        self.up = Linear(c.embed_dim, c.width, glorot, keys[2], bias=False) if joined else None
        self.down = Linear(c.width, c.embed_dim, glorot, keys[3], bias=False) if joined else None

    def __call__(
        self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None, wrap=recompute
    ) -> jax.Array:
        """Hidden states of the packed rows `batch` (segment_ids, positions and, for the time bias, times).

        key: dropout; None evaluates. wrap: put around the body of the scan over layers (see recscale/mesh.py).
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
        """What the first layer reads, [B, L, width], in the type of the compute."""
        c = self.config
        x = x_BLD * (c.base.embed_dim if c.base else c.embed_dim) ** 0.5
        x = x + self.positions[...].at[batch["positions"]].get(mode="clip")
        x = (dropout(x, c.dropout, key) * (batch["segment_ids"] > 0)[:, :, None]).astype(c.dtype)
        return x if self.up is None else self.up(x)

    def stages(self) -> tuple[tuple[Layer, None], ...]:
        """The stacked layers, and what happens to the states after them: nothing (see serve/cache.py)."""
        return ((self.layers, None),)

    def readout(self, x_BLD: jax.Array) -> jax.Array:
        """Hidden states float32 [B, L, embed_dim] from the last layer's output."""
        c, x = self.config, self.norm(x_BLD)
        x = (x if self.down is None else self.down(x)).astype(jnp.float32)
        return x * (c.base.embed_dim / c.embed_dim) if c.base else x


def flops(c: Config, length: int) -> dict[str, float]:
    """Forward FLOPs of one history of `length` tokens by part (multiply-add = 2, causal attention counted once)."""
    joined = 0 if c.embed_dim == c.width else 4 * length * c.embed_dim * c.width
    attention_flops = 4 * c.width * length * (length + 1) / 2
    projections = 24 * length * c.width * c.width
    return {"projections": float(c.depth * projections + joined), "attention": float(c.depth * attention_flops)}


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group; tables are counted by their owner."""
    per_layer = 12 * c.width * c.width + 4 * c.width + (NUM_TIME_BUCKETS if c.time_bias else 0)
    joined = 0 if c.embed_dim == c.width else 2 * c.embed_dim * c.width
    return {"dense": c.depth * per_layer + 2 * c.width + joined, "positions": c.max_length * c.embed_dim}


def width_factors(c: Config) -> dict[str, Factors]:
    """Initial deviations and learning rates under width transfer by name of parameter; what is not named is unchanged.

    Empty without a base shape. Draws of .02 fall with the root of the width by these factors, a Glorot draw by itself.
    """
    if c.base is None:
        return {}
    m, e = c.width / c.base.width, c.embed_dim / c.base.embed_dim
    glorot = ((c.embed_dim + c.width) / (c.base.embed_dim + c.base.width)) ** 0.5
    found = {f"layers.{name}.kernel": Factors(m**-0.5, 1 / m) for name in ("qkv", "out", "mlp_in", "mlp_out")}
    joined = {"up.kernel": Factors(glorot * e**-0.5, 1 / e), "down.kernel": Factors(glorot * e**0.5 / m, 1 / m)}
    return found if c.embed_dim == c.width else found | joined
