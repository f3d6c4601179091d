"""Feature interactions in the manner of DLRM (arXiv 1906.00091) over bags of the history: a model without attention.

At every position the history is a few bags: the last item, the mean of all items so far, and means that fade with the
distance, one per half-life. What goes into the top MLP is what DLRM's does: the vectors, and the dot products of every
pair of them. Departs from the paper: the bags of a causal history take the place of its categorical features, and what
comes out is the query of the next item instead of a click probability, so the candidate is not among the features.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.layers.norms import Linear, dropout
from recscale.layers.width_transfer import BaseShape, Factors
from recscale.mesh import recompute


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a DLRM over a history.

    embed_dim: width of the item vectors, in and out; width: of the top MLP, which has 1 + depth hidden layers.
    half_lives: events after which the weight of an item has halved, one bag each. max_length: the longest history; the
    model itself has no positions. base: None; width transfer is not worked out for this model.
    """

    embed_dim: int
    width: int
    depth: int
    half_lives: tuple[float, ...]
    max_length: int
    dropout: float
    dtype: str
    base: BaseShape | None = None

    def __post_init__(self):
        for name in ("embed_dim", "width", "depth", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        if not all(0.0 < life < math.inf for life in self.half_lives):
            raise ValueError(f"model.half_lives = {self.half_lives}: expected positive numbers of events")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.base is not None:
            raise ValueError("model_name = 'dlrm' has no width transfer: set optim.parametrisation to 'sp'")

    @property
    def bags(self) -> int:
        """F: vectors per position."""
        return 2 + len(self.half_lives)

    @property
    def inputs(self) -> int:
        """Width of what the top MLP reads: the bags, and the dot products of their pairs."""
        return self.bags * self.embed_dim + self.bags * (self.bags - 1) // 2


class Model(nnx.Module):
    """Embedded events [B, L, embed_dim] to hidden states [B, L, embed_dim]; hidden layers are stacked and scanned."""

    def __init__(self, c: Config, key: jax.Array):
        self.config = c
        keys = jax.random.split(key, 3)
        glorot = jax.nn.initializers.glorot_normal()
        self.into = Linear(c.inputs, c.width, glorot, keys[0])
        self.layers = jax.vmap(lambda k: Linear(c.width, c.width, glorot, k))(jax.random.split(keys[1], c.depth))
        self.out = Linear(c.width, c.embed_dim, glorot, keys[2])

    def __call__(
        self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None, wrap=recompute
    ) -> jax.Array:
        """Hidden states of the packed rows `batch` (segment_ids), float32; key: dropout, None evaluates.

        wrap: put around the body of the scan over layers (see recscale/mesh.py).
        """
        c = self.config
        keys = None if key is None else jax.random.split(key, c.depth + 1)
        bags_BLFD = bags(x_BLD * c.embed_dim**0.5, batch["segment_ids"], c.half_lives)
        x = jax.nn.relu(self.into(interact(bags_BLFD).astype(c.dtype)))
        x = dropout(x, c.dropout, None if keys is None else keys[-1])

        def step(x, layer_and_key):
            layer, layer_key = layer_and_key
            return dropout(jax.nn.relu(layer(x)), c.dropout, layer_key), None

        x, _ = jax.lax.scan(wrap(step), x, (self.layers, None if keys is None else keys[:-1]))
        return self.out(x).astype(jnp.float32)


def bags(x_BLD: jax.Array, segment_ids_BL: jax.Array, half_lives: tuple[float, ...]) -> jax.Array:
    """Of every position, from its own segment up to and including itself: [B, L, F, D], F = 2 + half-lives.

    The item itself, the mean, and the mean with weights that halve every so many events. A mean is a running sum over
    a running weight, both scanned in parallel in memory linear in L; a segment's first event drops all before it.
    """
    first_BL = jnp.pad(segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    keep_K = jnp.asarray([1.0, *(0.5 ** (1.0 / life) for life in half_lives)], x_BLD.dtype)
    keep_BLK1 = jnp.where(first_BL[:, :, None, None], 0.0, keep_K.reshape(1, 1, -1, 1))
    shape = (*x_BLD.shape[:2], len(keep_K), x_BLD.shape[2])
    total = _running(keep_BLK1, jnp.broadcast_to(x_BLD[:, :, None], shape))
    weight = _running(keep_BLK1, jnp.ones(keep_BLK1.shape, x_BLD.dtype))
    return jnp.concatenate([x_BLD[:, :, None], total / weight], axis=2)


def _running(keep_BLK1: jax.Array, x_BLKD: jax.Array) -> jax.Array:
    """y[t] = keep[t] * y[t - 1] + x[t] along L."""

    def join(before, after):
        return before[0] * after[0], after[0] * before[1] + after[1]

    return jax.lax.associative_scan(join, (keep_BLK1, x_BLKD), axis=1)[1]


def interact(bags_BLFD: jax.Array) -> jax.Array:
    """The bags one after another, then the dot products of their pairs over sqrt(D): [B, L, F D + F (F - 1) / 2]."""
    B, L, F, D = bags_BLFD.shape
    dots_BLFG = jnp.einsum("blfd,blgd->blfg", bags_BLFD, bags_BLFD) * D**-0.5
    above = np.triu_indices(F, 1)
    return jnp.concatenate([bags_BLFD.reshape(B, L, F * D), dots_BLFG[:, :, *above]], axis=-1)


def flops(c: Config, length: int) -> dict[str, float]:
    """Forward FLOPs of one history of `length` events by part (multiply-add = 2).

    The dot products stand where other models have attention: all F * F are computed. The running means are a few
    element-wise operations per bag, which are not counted here as nowhere else.
    """
    projections = 2 * length * (c.inputs * c.width + c.depth * c.width * c.width + c.width * c.embed_dim)
    return {"projections": float(projections), "attention": float(2 * length * c.bags**2 * c.embed_dim)}


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group; tables are counted by their owner."""
    hidden = c.depth * (c.width * c.width + c.width)
    return {"dense": (c.inputs + 1) * c.width + hidden + (c.width + 1) * c.embed_dim, "positions": 0}


def width_factors(c: Config) -> dict[str, Factors]:
    """None: width transfer is not worked out for this model, and its Config refuses a base shape."""
    del c
    return {}
