"""Normal noise by row key, step and dimension, cheap on CPU: hashed words and the transform of Box and Muller (1958).

A sampler draws [N, D] normals at every step, each row from a key of its own. Drawn by jax.random.normal they cost more
than all the rest of a step of a small network: a third of it is the cipher, two thirds the inverse error function. Here
the cipher makes two words per row and step, hash_bits two words per entry of them, and the logarithm and the cosine are
short series. In 77 million entries moments to the sixth, tails beyond 5, and pairs of dimensions were as they should.
"""

import math

import jax
import jax.numpy as jnp

from recscale.layers.hashed_dropout import hash_bits

RADIUS_BITS = 23
"""A radius is sqrt(-2 ln u) of one of 2^23 odd u / 2^24, all exact in float32: no normal is beyond 5.77."""


def normal(keys_N: jax.Array, step: jax.Array | int, dim: int) -> jax.Array:
    """Standard normals, float32 [N, dim]; entry (n, d) follows from keys_N[n], step, d and dim alone.

    Two steps, or two rows, are as independent as jax.random.fold_in makes their keys; the dimensions of one row and
    step as hash_bits makes its words.
    """
    bits_N2D = jax.vmap(lambda key: hash_bits(jax.random.fold_in(key, step), (2, dim)))(keys_N)
    return _radius(bits_N2D[:, 0]) * _cosine(bits_N2D[:, 1])


def _radius(bits: jax.Array) -> jax.Array:
    """sqrt(-2 ln u), u = (2 k + 1) / 2^24 and k the first 23 bits.

    ln u = e ln 2 + 2 artanh(s), s = (m - 1) / (m + 1), with u = 2^e m and m in [sqrt(1/2), sqrt(2)): |s| < .172, four
    terms of the series leave 3e-8. Near u = 1, e = 0 and the sum cannot be positive, however it is rounded.
    """
    odd = 2 * (bits >> (32 - RADIUS_BITS)).astype(jnp.int32) + 1
    word = jax.lax.bitcast_convert_type(odd.astype(jnp.float32), jnp.int32)
    exponent = (word - SQRT_HALF) >> 23
    m = jax.lax.bitcast_convert_type(word - (exponent << 23), jnp.float32)
    s = (m - 1) / (m + 1)
    tail = _series(s * s, [2 / (2 * k + 1) for k in range(4)])
    return jnp.sqrt(-2 * ((exponent - RADIUS_BITS - 1).astype(jnp.float32) * math.log(2) + s * tail))


SQRT_HALF = 0x3F3504F3
"""The bits of float32 sqrt(1/2)."""


def _cosine(bits: jax.Array) -> jax.Array:
    """cos(2 pi v), v = bits / 2^32: sin(pi y) with y = 1/2 - |2 v| for v in [-1/2, 1/2); six terms leave 6e-8."""
    y = 0.5 - jnp.abs(bits.astype(jnp.int32).astype(jnp.float32)) * 2.0**-31
    return y * _series(y * y, [(-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(6)])


def _series(x: jax.Array, terms: list[float]) -> jax.Array:
    """terms[0] + terms[1] x + ..."""
    total = jnp.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * x + term
    return total
