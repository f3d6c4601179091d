"""The exchange of rows between devices: buffers of a fixed capacity per pair, in as many rounds as are needed."""

import math
from typing import Any

import jax
import jax.numpy as jnp

MOST_ROUNDS = 64


class Route:
    """How a device's distinct positions travel to the devices that own them, in rounds of fixed capacity."""

    def __init__(self, axes: tuple[str, ...], devices: int, size: int, position_U: jax.Array):
        """Inside shard_map over `axes`. size: rows of the array; position_U: ascending, those >= size stay at home."""
        self.axes, self.n = axes, devices
        self.rows = size // self.n
        self.capacity = capacity(len(position_U), self.n)
        self.valid = position_U < size
        self.owner = jnp.minimum(position_U // self.rows, self.n - 1)
        self.local = position_U % self.rows
        fine = self.local % MOST_ROUNDS
        counts = jnp.zeros((self.n, MOST_ROUNDS), jnp.int32).at[self.owner, fine].add(self.valid.astype(jnp.int32))
        choices = [1 << k for k in range(MOST_ROUNDS.bit_length())]
        worst = jnp.stack([counts.reshape(self.n, -1, r).sum(1).max() for r in choices])
        worst = jax.lax.pmax(worst, self.axes)
        fits = worst <= self.capacity
        self.rounds = jnp.where(fits.any(), jnp.asarray(choices)[jnp.argmax(fits)], MOST_ROUNDS)
        lost = jax.lax.psum(jnp.maximum(counts - self.capacity, 0).sum(), self.axes)
        self.overflow = jnp.stack([self.rounds - 1, jnp.where(fits.any(), 0, lost)]).astype(jnp.int32)

    def places(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which positions travel in round i, and their place in the buffer (beyond its end for the others)."""
        chosen = self.valid & (self.local % self.rounds == i)
        before = jnp.cumsum(chosen, dtype=jnp.int32) - 1
        each = jnp.zeros((self.n,), jnp.int32).at[self.owner].add(chosen.astype(jnp.int32))
        rank = before - (jnp.cumsum(each) - each)[self.owner]
        taken = chosen & (rank < self.capacity)
        return taken, jnp.where(taken, self.owner * self.capacity + rank, self.n * self.capacity)

    def fill(self, index: jax.Array, values: jax.Array, empty: Any) -> jax.Array:
        """The buffer [n, capacity, ...] with the values at their places."""
        shape = (self.n * self.capacity, *values.shape[1:])
        out = jnp.full(shape, empty, values.dtype).at[index].set(values, mode="drop", unique_indices=True)
        return out.reshape(self.n, self.capacity, *values.shape[1:])

    def swap(self, buffer: jax.Array) -> jax.Array:
        """All-to-all: part i of the result is what device i sent here."""
        return jax.lax.all_to_all(buffer, self.axes, 0, 0)


def capacity(count: int, devices: int) -> int:
    """Places per pair of devices for `count` ids of one device: mean plus four Poisson deviations."""
    mean = count / devices
    return min(count, math.ceil(mean + 4 * math.sqrt(mean)))
