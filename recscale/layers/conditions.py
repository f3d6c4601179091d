"""What every denoiser is made from: its shape, the condition it reads, the time embedding and the null of DreamRec.

Shapes: B rows, S targets of a row (K samples of a target are K entries), D width of the item vectors, L states.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.layers.norms import Linear

SLOWEST = 1e4  # the longest period of the sinusoids is 2 pi times this


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a denoiser.

    dim: D. width: W, depth: blocks, ffn: hidden units of a block, heads: of the cross-attention; "adaln" reads the
    first three of these and "dit" all, "mlp1" and "mlp2" none. dtype: of the products; the result is float32.
    """

    dim: int
    width: int = 64
    depth: int = 2
    ffn: int = 256
    heads: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("dim", "width", "depth", "ffn", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"denoiser: {name} = {getattr(self, name)}: expected a positive integer")
        if self.width % self.heads:
            raise ValueError(f"denoiser: heads = {self.heads} does not divide width = {self.width}")


class Condition(NamedTuple):
    """What is known of the history at every target.

    vector: its summary [B, S, D]. states: the encoder's [B, L, D], read by "dit" alone, and visible: bool [B, S, L],
    which of them a target may see, None = all. dropped: bool [B, S], targets whose condition is the learned null.
    """

    vector_BSD: jax.Array
    states_BLD: jax.Array | None = None
    visible_BSL: jax.Array | None = None
    dropped_BS: jax.Array | None = None

    def repeat(self, samples: int) -> "Condition":
        """Every target `samples` times, one after the other: S becomes S * samples, the states stay as they are."""
        vector, visible, dropped = (
            None if x is None else jnp.repeat(x, samples, axis=1)
            for x in (self.vector_BSD, self.visible_BSL, self.dropped_BS)
        )
        assert vector is not None
        return Condition(vector, self.states_BLD, visible, dropped)


class UniformLinear(Linear):
    """A Linear whose kernel and bias begin uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in)."""

    def __init__(self, fan_in: int, fan_out: int, key: jax.Array):
        bound, keys = fan_in**-0.5, jax.random.split(key)
        super().__init__(fan_in, fan_out, lambda k, shape, dtype: _uniform(k, shape, bound), keys[0])
        self.bias = nnx.Param(_uniform(keys[1], (fan_out,), bound))


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def frequencies(dim: int) -> int:
    """Sinusoids of the time embedding: D / 2, at least 2 (their rates need two ends)."""
    return max(dim // 2, 2)


def sinusoid(time: jax.Array, half: int) -> jax.Array:
    """[sin, cos] of time [...] at `half` rates from 1 down to 1e-4, evenly in the logarithm: float32 [..., 2 half]."""
    rates = jnp.exp(-math.log(SLOWEST) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angle = time.astype(jnp.float32)[..., None] * rates.reshape((1,) * time.ndim + (-1,))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by the error function, as torch has it."""
    return jax.nn.gelu(x, approximate=False)


class TimeEmbedding(nnx.Module):
    """Times [...] to vectors [..., D]: sinusoids, then D to 2 D, GELU, to D."""

    def __init__(self, dim: int, key: jax.Array):
        keys = jax.random.split(key)
        self.half = frequencies(dim)
        self.first = UniformLinear(2 * self.half, 2 * dim, keys[0])
        self.last = UniformLinear(2 * dim, dim, keys[1])

    def __call__(self, time: jax.Array, dtype: str) -> jax.Array:
        return self.last(gelu(self.first(sinusoid(time, self.half).astype(dtype))))


class Denoiser(nnx.Module):
    """What all denoisers have: the time embedding and the null vector."""

    def __init__(self, config: Config, key: jax.Array):
        keys = jax.random.split(key)
        self.config = config
        self.time = TimeEmbedding(config.dim, keys[0])
        self.null = nnx.Param(jax.random.normal(keys[1], (config.dim,)))

    def vector(self, condition: Condition) -> jax.Array:
        """The condition's vector [B, S, D], the null where it is dropped."""
        vector = condition.vector_BSD.astype(self.config.dtype)
        if condition.dropped_BS is None:
            return vector
        return jnp.where(condition.dropped_BS[:, :, None], self.null_vector(), vector)

    def null_vector(self) -> jax.Array:
        """The null vector [1, 1, D]."""
        return self.null[...].astype(self.config.dtype).reshape(1, 1, -1)
