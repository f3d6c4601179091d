"""Dropout whose masks cost little: a hash of the entry's number and of the key, instead of a cipher's bits.

On CPU the bits of jax.random.bits cost several times the matrix product whose output they mask, and are written to
memory first. A hash is a few integer operations an entry and is computed inside the loop that masks.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from recscale.mesh import DROPOUT_MASK


def hash_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 bits of `shape`: entry i is mix(mix(i + a) ^ b), where key gives a and b.

    Two words of key, so that the masks of two keys are not one sequence at two places. For masks, not for draws whose
    tails matter. Source of the mix: C. Wellons, "Prospecting for hash functions" (a bijection of bias .11).
    """
    a, b = jax.random.bits(key, (2,), jnp.uint32)
    entry = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _mix(_mix(entry + a) ^ b)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero entries with probability `rate` and rescale the rest; the identity where key is None (evaluation)."""
    if key is None or rate == 0.0:
        return x
    keep = hash_bits(key, x.shape) >= jnp.uint32(round(rate * 2**32))
    keep = checkpoint_name(keep, DROPOUT_MASK)
    return jnp.where(keep, x * (1.0 / (1.0 - rate)), jnp.zeros_like(x))
