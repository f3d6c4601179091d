"""SASRec: a causal Transformer over the history (arXiv 1808.09781), with true pre-norm blocks so that depth trains.

Departs from the paper: pre-norm (x + f(LN(x))) instead of its post-norm-like block, which collapses beyond a few
layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.kernels.attention import Bias, attention
from recscale.layers.norms import LayerNorm, Linear, dropout, truncated_normal
from recscale.layers.width_transfer import BaseShape, Factors
from recscale.mesh import recompute

EPS = 1e-8
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a SASRec.

    embed_dim: width of the item vectors; width: of the hidden states (a linear map joins them where they differ);
    ffn: width of the hidden layer of the feed-forward block; max_length: L, the longest history. prefix: positions
    at the start of a history that see each other and that all see. attention: one of kernels.attention.IMPLEMENTATIONS.
    base: None, or the base shape of width transfer (layers/width_transfer.py).
    """

    embed_dim: int
    width: int
    depth: int
    heads: int
    ffn: int
    max_length: int
    dropout: float
    activation: str
    dtype: str
    prefix: int = 0
    attention: str = "blocks"
    base: BaseShape | None = None

    def __post_init__(self):
        for name in ("embed_dim", "width", "depth", "heads", "ffn", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        if self.width % self.heads:
            raise ValueError(f"model.heads = {self.heads} does not divide model.width = {self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"model.activation = {self.activation!r}: expected one of {tuple(ACTIVATIONS)}")


class Block(nnx.Module):
    """x + attention(LN(x)), then x + FFN(LN(x))."""

    def __init__(self, c: Config, key: jax.Array):
        keys = jax.random.split(key, 4)
        xavier = jax.nn.initializers.glorot_normal()
        self.norm_attention = LayerNorm(c.width, EPS)
        self.qkv = Linear(c.width, 3 * c.width, xavier, keys[0])
        self.out = Linear(c.width, c.width, xavier, keys[1])
        self.norm_ffn = LayerNorm(c.width, EPS)
        self.ffn_in = Linear(c.width, c.ffn, xavier, keys[2])
        self.ffn_out = Linear(c.ffn, c.width, xavier, keys[3])

    def __call__(self, c: Config, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        (q, k, v), rest = self.project(c, x_BLD)
        o = attention(q, k, v, batch["segment_ids"], self.bias(c, batch), **self.rules(c), implementation=c.attention)
        return self.finish(c, x_BLD, o, rest, key)

    def project(self, c: Config, x_BLD: jax.Array) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        """Queries, keys and values [B, L, H, D / H]; and nothing more for `finish`."""
        B, L, D = x_BLD.shape
        parts = jnp.split(self.qkv(self.norm_attention(x_BLD)), 3, axis=-1)
        q, k, v = (part.reshape(B, L, c.heads, D // c.heads) for part in parts)
        return (q, k, v), None

    def rules(self, c: Config) -> dict[str, Any]:
        """How attention is computed: keyword arguments of kernels/attention.py."""
        head_dim = c.width // c.heads
        scale = head_dim**-0.5 * ((c.base.head_dim / head_dim) ** 0.5 if c.base else 1.0)
        return {"kind": "softmax", "n": c.max_length, "scale": scale, "prefix": c.prefix}

    def bias(self, c: Config, batch: dict[str, jax.Array]) -> Bias:
        """No relative bias."""
        del c, batch
        return Bias()

    def finish(self, c: Config, x_BLD: jax.Array, o_BLHE: jax.Array, rest: None, key: jax.Array | None) -> jax.Array:
        """The block's output from its input and what attention returned."""
        del rest
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = x_BLD + dropout(self.out(o_BLHE.reshape(x_BLD.shape)), c.dropout, keys[0])
        hidden = dropout(ACTIVATIONS[c.activation](self.ffn_in(self.norm_ffn(x))), c.dropout, keys[1])
        return x + dropout(self.ffn_out(hidden), c.dropout, keys[2])


class Model(nnx.Module):
    """Embedded events [B, L, embed_dim] to hidden states [B, L, embed_dim]; blocks are stacked and scanned."""

    def __init__(self, c: Config, key: jax.Array):
        self.config = c
        keys = jax.random.split(key, 4)
        self.positions = nnx.Param(truncated_normal(0.02)(keys[0], (c.max_length, c.embed_dim)))
        self.blocks = jax.vmap(lambda k: Block(c, k))(jax.random.split(keys[1], c.depth))
        self.norm = LayerNorm(c.width, EPS)
        xavier = jax.nn.initializers.glorot_normal()
        joined = c.embed_dim != c.width
        self.up = Linear(c.embed_dim, c.width, xavier, keys[2], bias=False) if joined else None
        self.down = Linear(c.width, c.embed_dim, xavier, keys[3], bias=False) if joined else None

    def __call__(
        self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None, wrap=recompute
    ) -> jax.Array:
        """Hidden states of the packed rows `batch` (segment_ids, positions); key: dropout, None evaluates.

        wrap: put around the body of the scan over blocks (see recscale/mesh.py).
        """
        c = self.config
        keys = None if key is None else jax.random.split(key, c.depth + 1)
        x = self.embed(x_BLD, batch, None if keys is None else keys[-1])

        def step(x, block_and_key):
            block, block_key = block_and_key
            return block(c, x, batch, block_key), None

        x, _ = jax.lax.scan(wrap(step), x, (self.blocks, None if keys is None else keys[:-1]))
        return self.readout(x)

    def embed(self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """What the first block reads, [B, L, width]."""
        c = self.config
        x = x_BLD * (c.base.embed_dim if c.base else c.embed_dim) ** 0.5 + self.positions[...].at[
            batch["positions"]
        ].get(mode="clip")
        x = dropout(x, c.dropout, key).astype(c.dtype)
        return x if self.up is None else self.up(x)

    def stages(self) -> tuple[tuple[Block, None], ...]:
        """The stacked blocks, and what happens to the states after them: nothing (see serve/cache.py)."""
        return ((self.blocks, None),)

    def readout(self, x_BLD: jax.Array) -> jax.Array:
        """Hidden states [B, L, embed_dim], float32, from what the last block gives."""
        c = self.config
        x = self.norm(x_BLD)
        x = (x if self.down is None else self.down(x)).astype(jnp.float32)
        return x * (c.base.embed_dim / c.embed_dim) if c.base else x


def flops(c: Config, length: int) -> dict[str, float]:
    """Forward FLOPs of one history of `length` events by part (multiply-add = 2, causal attention counted once)."""
    per_block = 2 * length * (4 * c.width * c.width + 2 * c.width * c.ffn)
    joined = 0 if c.embed_dim == c.width else 4 * length * c.embed_dim * c.width
    attention_flops = 4 * c.width * length * (length + 1) / 2
    return {"projections": float(c.depth * per_block + joined), "attention": float(c.depth * attention_flops)}


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group; tables are counted by their owner."""
    biases_and_norms = 9 * c.width + c.ffn  # qkv 3, out 1, ffn_out 1, two norms 4
    per_block = 4 * c.width * c.width + 2 * c.width * c.ffn + biases_and_norms
    joined = 0 if c.embed_dim == c.width else 2 * c.embed_dim * c.width
    return {"dense": c.depth * per_block + 2 * c.width + joined, "positions": c.max_length * c.embed_dim}


def width_factors(c: Config) -> dict[str, Factors]:
    """Initial deviations and learning rates under width transfer by name of parameter; what is not named is unchanged.

    Empty without a base shape. A Glorot draw already falls with the width.
    """
    if c.base is None:
        return {}
    m, e = c.width / c.base.width, c.embed_dim / c.base.embed_dim
    glorot = ((c.embed_dim + c.width) / (c.base.embed_dim + c.base.width)) ** 0.5
    matrices = ("qkv", "out", "ffn_in", "ffn_out")
    found = {f"blocks.{name}.kernel": Factors(1.0, 1 / m) for name in matrices}
    joined = {"up.kernel": Factors(glorot * e**-0.5, 1 / e), "down.kernel": Factors(glorot * e**0.5 / m, 1 / m)}
    return found if c.embed_dim == c.width else found | joined
