"""Embedding tables: how ids become rows, and how the gradients of rows become updates of tables.

A table is a plain array [rows + 1, dim] beside the model; row 0 is padding and stays zero. A step gathers the rows it
touches (`lookup`), differentiates with respect to them, and hands slots and row gradients to the table optimizer, which
merges repeated slots (`merge_rows`) or spreads them over a dense gradient (`scatter_rows`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from recscale.layers.norms import truncated_normal

_GOLDEN_RATIO = 2654435769  # 2^32 / phi: Knuth's multiplicative hashing


@dataclasses.dataclass(frozen=True)
class Table:
    """An embedding table for ids 1..num_ids. rows: 0 gives each id a row; fewer rows than ids are shared by hashing."""

    num_ids: int
    dim: int
    rows: int = 0
    stddev: float = 0.02

    def __post_init__(self):
        if self.num_ids < 1 or self.dim < 1 or self.rows < 0:
            raise ValueError(f"table of {self.num_ids} ids, dim {self.dim}, rows {self.rows}: expected positive sizes")

    @property
    def num_rows(self) -> int:
        """Rows that carry ids (the padding row not counted)."""
        return self.num_ids if self.rows == 0 else min(self.rows, self.num_ids)

    @property
    def hashed(self) -> bool:
        return self.num_rows < self.num_ids

    def init(self, key: jax.Array) -> jax.Array:
        """[num_rows + 1, dim] float32, normal(0, stddev^2) cut at two sigma, row 0 zero."""
        table = truncated_normal(self.stddev)(key, (self.num_rows + 1, self.dim))
        return jnp.where(jnp.arange(self.num_rows + 1)[:, None] > 0, table, 0.0)

    def slots(self, ids: jax.Array) -> jax.Array:
        """Row of each id, same shape, int32; padding (0) keeps row 0. Hashing is multiplicative on the id's 32 bits."""
        if not self.hashed:
            return ids
        mixed = ids.astype(jnp.uint32) * jnp.uint32(_GOLDEN_RATIO)
        mixed = mixed ^ (mixed >> jnp.uint32(15))
        row = 1 + (mixed % jnp.uint32(self.num_rows)).astype(jnp.int32)
        return jnp.where(ids > 0, row, 0)


def lookup(table_VD: jax.Array, slots: jax.Array) -> jax.Array:
    """Rows of a table: [...] -> [..., D]. Slots must be in range: the loader has checked the ids."""
    return table_VD.at[slots].get(mode="clip")


def scatter_rows(like_VD: jax.Array, slots: jax.Array, rows_grad: jax.Array) -> jax.Array:
    """The dense gradient [V, D] of a lookup; costs as much as the table: for small tables and dense optimizers."""
    # Padding is masked here and not by setting row 0 afterwards: on a sharded table the compiler (jax 0.10.2) then
    # cleared the first row of every shard.
    grads_ND = jnp.where(slots.reshape(-1, 1) > 0, rows_grad.reshape(-1, like_VD.shape[1]), 0.0)
    return jnp.zeros_like(like_VD).at[slots.reshape(-1)].add(grads_ND)


def merge_rows(slots_N: jax.Array, rows_grad_ND: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array]:
    """Sum the gradients of equal slots.

    Returns slots [N], distinct, with spare places filled by num_slots + place (out of range, so that a scatter with
    mode="drop" skips them), and the summed gradients [N, D]. Padding (slot 0) becomes a spare place too.
    """
    N = slots_N.shape[0]
    order = jnp.argsort(slots_N)
    ordered = slots_N[order]
    is_new = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
    group = jnp.cumsum(is_new) - 1
    summed = jax.ops.segment_sum(rows_grad_ND[order], group, num_segments=N, indices_are_sorted=True)
    spare = num_slots + jnp.arange(N, dtype=slots_N.dtype)
    distinct = spare.at[group].set(jnp.where(ordered > 0, ordered, num_slots), indices_are_sorted=True)
    return distinct, summed
