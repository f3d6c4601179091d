"""Norms, dropout and initialisers that several models use. Statistics are float32 whatever the input type."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from recscale.mesh import DROPOUT_MASK


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis without affine parameters, float32 statistics; same shape and type as x."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / max(|x|, eps) over the last axis, in float32. A zero vector stays zero; there the gradient is 1 / eps."""
    x32 = x.astype(jnp.float32)
    square = jnp.square(x32).sum(axis=-1, keepdims=True)
    # Not rsqrt, which rounds differently in vector and scalar code: equal vectors must stay equal to tie in a ranking.
    return x32 / jnp.sqrt(jnp.maximum(square, eps * eps))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero entries with probability `rate` and rescale the rest; the identity where key is None (evaluation)."""
    if key is None or rate == 0.0:
        return x
    # 16 random bits an entry: half the cost of a float draw, and a rate is met to 1/65536.
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= jnp.uint16(round(rate * 65536))
    keep = checkpoint_name(keep, DROPOUT_MASK)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, F] as one flat product: with more leading axes its gradient is twice as slow on CPU."""
    return (x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[1])


class LayerNorm(nnx.Module):
    """LayerNorm with affine parameters (scale 1, bias 0 at the start) over a last axis of `dim`; keeps the type."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1,) * (x.ndim - 1) + (-1,)
        y = layer_norm(x.astype(jnp.float32), self.eps)
        return (y * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)).astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel (+ bias): kernel [fan_in, fan_out] drawn by `init` (a jax.nn initializer), bias zero."""

    def __init__(self, fan_in: int, fan_out: int, init, key: jax.Array, *, bias: bool = True):
        self.kernel = nnx.Param(init(key, (fan_in, fan_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((fan_out,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return y


def truncated_normal(stddev: float):
    """Normal(0, stddev^2) cut at two sigma (by redrawing, not clipping), as the HSTU reference draws its tables."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return stddev * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init
