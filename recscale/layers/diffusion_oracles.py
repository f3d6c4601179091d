"""Best possible denoisers in closed form, E[x0 given x_t = x]: perfect models to hold samplers and training against."""

import jax
import jax.numpy as jnp


def catalogue_x0(x: jax.Array, a: jax.Array, s: jax.Array, items_VD: jax.Array, prior_V: jax.Array) -> jax.Array:
    """x0 is row i of a catalogue with probability p_i: the mean of the rows under softmax(log p - |x - a e|^2 / 2 s^2).

    x: [.., D]; a, s: of the process at x's time, one number each; same type as x.
    """
    return catalogue_weights(x, a, s, items_VD, prior_V) @ items_VD


def catalogue_weights(x: jax.Array, a: jax.Array, s: jax.Array, items_VD: jax.Array, prior_V: jax.Array) -> jax.Array:
    """Probability [.., V] of every row given x."""
    fit = a * (x @ items_VD.T) - jnp.broadcast_to(
        a * a * jnp.square(items_VD).sum(1) / 2, (*x.shape[:-1], len(items_VD))
    )
    return jax.nn.softmax(jnp.broadcast_to(jnp.log(prior_V), fit.shape) + fit / (s * s), axis=-1)


def gaussian_affine(
    a: jax.Array, s: jax.Array, mean_D: jax.Array, covariance_DD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x0 ~ N(mean, C): (W [D, D], k [D]) of E[x0 given x] = W x + k.

    W = a C (a^2 C + s^2 I)^-1, k = mean - a W mean.
    """
    spread_DD = a * a * covariance_DD + s * s * jnp.eye(len(mean_D), dtype=covariance_DD.dtype)
    W_DD = a * jnp.linalg.solve(spread_DD, covariance_DD).T  # both are symmetric
    return W_DD, mean_D - a * W_DD @ mean_D


def gaussian_x0(x: jax.Array, a: jax.Array, s: jax.Array, mean_D: jax.Array, covariance_DD: jax.Array) -> jax.Array:
    """E[x0 given x] for Gaussian data; x: [.., D]; a, s: one number each."""
    W_DD, k_D = gaussian_affine(a, s, mean_D, covariance_DD)
    return x @ W_DD.T + jnp.broadcast_to(k_D, x.shape)
