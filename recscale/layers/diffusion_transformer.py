"""Denoisers of residual blocks modulated by the history and the time (adaLN-zero, arXiv 2212.09748).

Shapes: B rows, S targets of a row, D width of the item vectors, W width of the residual stream, L states of a row,
M = L + 1 with the null state, H heads, E = W / H.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.layers.conditions import Condition, Config, Denoiser, UniformLinear, gelu
from recscale.layers.norms import Linear, layer_norm
from recscale.mesh import recompute

EPS = 1e-6
MASKED = -1e30


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm(x) (1 + scale) + shift, all [B, S, W]; axes of 1 are broadcast."""
    return layer_norm(x, EPS) * (1.0 + scale) + shift


def _zero(fan_in: int, fan_out: int) -> Linear:
    return Linear(fan_in, fan_out, lambda _, shape, dtype: jnp.zeros(shape, dtype), jax.random.key(0))


class Block(nnx.Module):
    """x + gate MLP(modulated x), and for "dit" x + gate attention(modulated x) before it; gates are zero at first."""

    def __init__(self, c: Config, attends: bool, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.modulation = _zero(c.dim, (6 if attends else 3) * c.width)
        self.query = UniformLinear(c.width, c.width, keys[0]) if attends else None
        self.keys_values = UniformLinear(c.dim, 2 * c.width, keys[1]) if attends else None
        self.out = UniformLinear(c.width, c.width, keys[2]) if attends else None
        self.ffn_in = UniformLinear(c.width, c.ffn, keys[3])
        self.ffn_out = UniformLinear(c.ffn, c.width, keys[4])

    def mlp(self, x: jax.Array, shift: jax.Array, scale: jax.Array, gate: jax.Array) -> jax.Array:
        """x plus its gated MLP."""
        return x + gate * self.ffn_out(gelu(self.ffn_in(modulated(x, shift, scale))))

    def cross(
        self,
        x: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask_BSM: jax.Array,
        shift: jax.Array,
        scale: jax.Array,
        gate: jax.Array,
    ) -> jax.Array:
        """x plus its gated attention over keys and values [B, H, M, E]."""
        assert self.query is not None and self.out is not None
        heads, E = k.shape[1], k.shape[3]
        q = self.query(modulated(x, shift, scale)).reshape(*x.shape[:2], heads, E)
        k, v = (jnp.broadcast_to(y, (x.shape[0], *y.shape[1:])) for y in (k, v))
        scores = jnp.einsum("bshe,bhme->bhsm", q, k, preferred_element_type=jnp.float32) * E**-0.5
        weights = jax.nn.softmax(jnp.where(mask_BSM[:, None], scores, MASKED), axis=-1)
        o = jnp.einsum("bhsm,bhme->bshe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return x + gate * self.out(o.reshape(x.shape).astype(x.dtype))


class Modulated(Denoiser):
    """The residual blocks, between a linear map to their width and a modulated one back, which is zero at the start."""

    def __init__(self, config: Config, attends: bool, key: jax.Array):
        keys = jax.random.split(key, 3)
        super().__init__(config, keys[0])
        c = config
        self.up = UniformLinear(c.dim, c.width, keys[1])
        self.blocks = jax.vmap(lambda k: Block(c, attends, k))(jax.random.split(keys[2], c.depth))
        self.modulation = _zero(c.dim, 2 * c.width)
        self.down = _zero(c.width, c.dim)

    def run(self, x_BSD: jax.Array, vector_BSD: jax.Array, read: "Read | None", time_BS: jax.Array, wrap) -> jax.Array:
        """Output float32 [B, S, D]; read: what the blocks attend to, None where they do not."""
        signal = jax.nn.silu(vector_BSD + self.time(time_BS, self.config.dtype))

        def step(x, block_and_read):
            block, keys_values = block_and_read
            parts = jnp.split(block.modulation(signal), 3 if read is None else 6, axis=-1)
            if read is not None:
                x = block.cross(x, *keys_values, read.mask_BSM, *parts[3:])
            return block.mlp(x, *parts[:3]), None

        keys_values = None if read is None else (read.keys, read.values)
        x, _ = jax.lax.scan(wrap(step), self.up(x_BSD.astype(self.config.dtype)), (self.blocks, keys_values))
        return self.down(modulated(x, *jnp.split(self.modulation(signal), 2, axis=-1))).astype(jnp.float32)


class AdaLN(Modulated):
    """Residual MLP blocks modulated by h + t."""

    def __init__(self, config: Config, key: jax.Array):
        super().__init__(config, False, key)

    def remember(self, condition: Condition) -> jax.Array:
        """The vector, [B, S, D]."""
        return self.vector(condition)

    def forget(self) -> jax.Array:
        """What `remember` gives of every dropped target, [1, 1, D]."""
        return self.null_vector()

    def __call__(self, x_BSD: jax.Array, memory: jax.Array, time_BS: jax.Array, wrap=recompute) -> jax.Array:
        """Output float32 [B, S, D]; wrap: put around the body of the scan over blocks (see recscale/mesh.py)."""
        return self.run(x_BSD, memory, None, time_BS, wrap)


class Read(NamedTuple):
    """What the blocks attend to: keys and values of each, [depth, B, H, M, E], and which are seen, bool [B, S, M]."""

    keys: jax.Array
    values: jax.Array
    mask_BSM: jax.Array


class DiTMemory(NamedTuple):
    """What a DiT keeps of a condition: the vector [B, S, D], and what its blocks attend to."""

    vector_BSD: jax.Array
    read: Read


class DiT(Modulated):
    """Blocks of cross-attention over the visible states and an MLP, modulated by h + t.

    The null vector is one more state, which every target sees: alone where the condition is dropped, or where no state
    is visible. There is no attention between tokens, as a target is one token.
    """

    def __init__(self, config: Config, key: jax.Array):
        super().__init__(config, True, key)

    def remember(self, condition: Condition) -> DiTMemory:
        """Vector, keys, values and mask; raises ValueError without states."""
        vector, states, visible = self.vector(condition), condition.states_BLD, condition.visible_BSL
        if states is None:
            raise ValueError("denoiser 'dit' reads the states of the history: found a Condition without states_BLD")
        (B, L, D), S = states.shape, vector.shape[1]
        if visible is None:
            visible = jnp.ones((B, S, L), bool)
        if condition.dropped_BS is not None:
            visible = visible & ~condition.dropped_BS[:, :, None]
        null = jnp.broadcast_to(self.null_vector(), (B, 1, D))
        keys, values = self._project(jnp.concatenate([null, states.astype(null.dtype)], axis=1))
        mask = jnp.concatenate([jnp.ones((*visible.shape[:2], 1), bool), visible], axis=2)
        return DiTMemory(vector, Read(keys, values, mask))

    def forget(self) -> DiTMemory:
        """What `remember` gives of every dropped target, without the states that it does not see: B = S = M = 1."""
        null = self.null_vector()
        return DiTMemory(null, Read(*self._project(null), jnp.ones((1, 1, 1), bool)))

    def __call__(self, x_BSD: jax.Array, memory: DiTMemory, time_BS: jax.Array, wrap=recompute) -> jax.Array:
        """Output float32 [B, S, D]; wrap: put around the body of the scan over blocks (see recscale/mesh.py)."""
        return self.run(x_BSD, memory.vector_BSD, memory.read, time_BS, wrap)

    def _project(self, states_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every block, each [depth, B, H, M, E], of normalised states."""
        (B, M, _), H = states_BMD.shape, self.config.heads
        normal = layer_norm(states_BMD, EPS)
        both = jax.vmap(lambda block: block.keys_values(normal))(self.blocks)
        both = both.reshape(-1, B, M, 2, H, self.config.width // H).transpose(3, 0, 1, 4, 2, 5)
        return both[0], both[1]
