"""Denoisers: networks that read a noisy item vector, its time and a history, and give what the process asks for.

* "mlp1": one linear layer of [x ; h ; t], DreamRec's default (arXiv 2310.20453). It is affine in x: see `Mlp1.affine`;
* "mlp2": two, 3 D to 2 D, GELU, to D, DreamRec's other one;
* "adaln": residual MLP blocks, modulated by h + t, gates zero at the start (adaLN-zero, arXiv 2212.09748);
* "dit": a small diffusion transformer: a target is one token, which reads the states of its history by
  cross-attention and passes through an MLP, both modulated as in "adaln". Targets do not see each other.

All share the time embedding of DreamRec and a learned null vector N0 ~ N(0, 1), which takes the place of a condition
that is dropped. A denoiser reads a condition once (`remember`) and then any number of times x and t.

Shapes: B rows, S targets of a row (K samples of a target are K entries), D width of the item vectors, W width of the
residual stream, L states of a row, M = L + 1 with the null state, H heads, E = W / H.
"""

import jax
import jax.numpy as jnp

from recscale.layers.conditions import Condition, Config, Denoiser, UniformLinear, frequencies, gelu
from recscale.layers.diffusion_transformer import AdaLN, DiT
from recscale.layers.norms import Linear, matmul
from recscale.mesh import recompute

__all__ = ["DENOISERS", "Condition", "Config", "flops", "memory_flops", "modulation_flops", "parameters", "time_flops"]


class Mlp1(Denoiser):
    """W [x ; h ; t] + b."""

    def __init__(self, config: Config, key: jax.Array):
        keys = jax.random.split(key)
        super().__init__(config, keys[0])
        self.out = UniformLinear(3 * config.dim, config.dim, keys[1])

    def remember(self, condition: Condition) -> jax.Array:
        """Wh h + b, [B, S, D]."""
        return _joined(self.out, self.vector(condition))

    def forget(self) -> jax.Array:
        """What `remember` gives of every dropped target, [1, 1, D]."""
        return _joined(self.out, self.null_vector())

    def affine(self, memory: jax.Array, time_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The result is Wx x + k: Wx [D, D] (x a column) and k = Wh h + Wt t + b, float32 [B, S, D]."""
        kernel_x, _, kernel_t = _parts(self.out)
        return kernel_x.T, (memory + matmul(self.time(time_BS, self.config.dtype), kernel_t)).astype(jnp.float32)

    def __call__(self, x_BSD: jax.Array, memory: jax.Array, time_BS: jax.Array, wrap=recompute) -> jax.Array:
        """Output float32 [B, S, D]; wrap has nothing to wrap."""
        del wrap
        kernel_x, _, kernel_t = _parts(self.out)
        y = matmul(x_BSD.astype(self.config.dtype), kernel_x) + matmul(self.time(time_BS, self.config.dtype), kernel_t)
        return (y + memory).astype(jnp.float32)


class Mlp2(Denoiser):
    """W2 GELU(W1 [x ; h ; t] + b1) + b2 with 2 D hidden units."""

    def __init__(self, config: Config, key: jax.Array):
        keys = jax.random.split(key, 3)
        super().__init__(config, keys[0])
        self.first = UniformLinear(3 * config.dim, 2 * config.dim, keys[1])
        self.out = UniformLinear(2 * config.dim, config.dim, keys[2])

    def remember(self, condition: Condition) -> jax.Array:
        """The hidden layer's share of the history and its bias, [B, S, 2 D]."""
        return _joined(self.first, self.vector(condition))

    def forget(self) -> jax.Array:
        """What `remember` gives of every dropped target, [1, 1, 2 D]."""
        return _joined(self.first, self.null_vector())

    def __call__(self, x_BSD: jax.Array, memory: jax.Array, time_BS: jax.Array, wrap=recompute) -> jax.Array:
        """Output float32 [B, S, D]; wrap has nothing to wrap."""
        del wrap
        kernel_x, _, kernel_t = _parts(self.first)
        y = matmul(x_BSD.astype(self.config.dtype), kernel_x) + matmul(self.time(time_BS, self.config.dtype), kernel_t)
        return self.out(gelu(y + memory)).astype(jnp.float32)


def _parts(layer: Linear) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows of a kernel over [x ; h ; t] that belong to x, h and t."""
    kernel = layer.kernel[...]
    D = kernel.shape[0] // 3
    return kernel[:D], kernel[D : 2 * D], kernel[2 * D :]


def _joined(layer: Linear, vector_BSD: jax.Array) -> jax.Array:
    """h's share of a layer over [x ; h ; t], with the layer's bias."""
    assert layer.bias is not None
    return matmul(vector_BSD, _parts(layer)[1]) + layer.bias[...].astype(vector_BSD.dtype).reshape(1, 1, -1)


DENOISERS: dict[str, type[Mlp1 | Mlp2 | AdaLN | DiT]] = {"mlp1": Mlp1, "mlp2": Mlp2, "adaln": AdaLN, "dit": DiT}


def flops(kind: str, c: Config, states: float = 0) -> float:
    """Forward FLOPs of one target at one time, given its memory (multiply-add = 2); states: M - 1, read by "dit".

    The time embedding counts once a target. Where all targets have one time ([1, 1]) it is computed once for all:
    `time_flops` less for each of them; where they have one condition too, `modulation_flops` less as well.
    """
    D, W = c.dim, c.width
    if kind in ("mlp1", "mlp2"):
        products = 2 * D * D if kind == "mlp1" else 2 * D * 2 * D + 2 * D * D
        return time_flops(c) + 2.0 * products
    block = 3 * D * W + 2 * W * c.ffn
    if kind == "dit":
        block += 3 * D * W + 2 * W * W + 2 * W * (1 + states)
    return time_flops(c) + 2.0 * (2 * D * W + 2 * D * W + c.depth * block)


def time_flops(c: Config) -> float:
    """Forward FLOPs of the embedding of one time."""
    return 2.0 * (2 * frequencies(c.dim) * 2 * c.dim + 2 * c.dim * c.dim)


def modulation_flops(kind: str, c: Config) -> float:
    """Forward FLOPs of the scales, shifts and gates of one target, which follow from its vector and its time."""
    blocks = {"mlp1": 0, "mlp2": 0, "adaln": 2 + 3 * c.depth, "dit": 2 + 6 * c.depth}
    return 2.0 * blocks[kind] * c.dim * c.width


def memory_flops(kind: str, c: Config, states: float = 0) -> float:
    """Forward FLOPs of `remember`: of one target for "mlp1" and "mlp2", of a row of `states` states for "dit"."""
    products = {"mlp1": c.dim**2, "mlp2": 2 * c.dim**2, "adaln": 0, "dit": c.depth * (1 + states) * 2 * c.dim * c.width}
    return 2.0 * products[kind]


def parameters(kind: str, c: Config) -> int:
    """Parameters of a denoiser, its null vector and time embedding included."""
    D, W = c.dim, c.width
    shared = (2 * frequencies(D) + 1) * 2 * D + (2 * D + 1) * D + D
    if kind == "mlp1":
        return shared + (3 * D + 1) * D
    if kind == "mlp2":
        return shared + (3 * D + 1) * 2 * D + (2 * D + 1) * D
    block = (D + 1) * 3 * W + (W + 1) * c.ffn + (c.ffn + 1) * W
    if kind == "dit":
        block += (D + 1) * 3 * W + 2 * (W + 1) * W + (D + 1) * 2 * W
    return shared + (D + 1) * W + c.depth * block + (D + 1) * 2 * W + (W + 1) * D
