"""One array of embedding rows: where a row lives, how it starts, how rows are read and written.

Slot s is row s of the vocabulary; slot 0 is padding and stays zero. The array holds the rows in an order that depends
on nothing but its size: slots go round-robin over `buckets`, and the buckets are spread by a golden-ratio step, so that
any power-of-two number of equal shards (up to `buckets`) gets an equal part of every range of popular slots, and an
array written on one mesh is read on any other.

On TPU a row narrower than 128 lanes is stored padded to 128. Where 128 is a multiple of the width, such rows share one
line: the array is [rows / pack, pack * dim], the same numbers in the same order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx import initializers

from recscale.layers.norms import truncated_normal

LANES = 128
_INIT_CHUNK = 1 << 16
_BUCKETS = ((1 << 20, 8192, 5063), (1 << 12, 1024, 633), (0, 64, 39))  # rows from, buckets, odd step near buckets / phi


class RowRule(NamedTuple):
    """How a row learns: a pure function of the rows, their optimizer slots and their gradients.

    slots: slot name -> "row" (one float per row) or "element" (shaped like the rows).
    step: (rows [..., D], slots, grads [..., D], learning rate, step count from 0) -> (rows, slots), all float32.
    whole: every row takes part in every step, with a zero gradient where none arrived.
    """

    slots: dict[str, str]
    step: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    whole: bool = False


class Distinct(NamedTuple):
    """The different positions among N, ascending; spare places hold distinct values beyond the last row.

    position_N: int32; inverse_N: the place of each input among them.
    """

    position_N: jax.Array
    inverse_N: jax.Array


@dataclasses.dataclass(frozen=True)
class Array:
    """Slots 1..num_rows of `dim` values, drawn from normal(0, stddev^2), cut at two sigma or whole (stddev 0: zeros).

    dtype: storage; "bfloat16" is written with stochastic rounding. fixed: never trained. by_id: slot = id, so that the
    array is as long as the vocabulary. packed: several rows share a line of 128 values (TPU).
    """

    num_rows: int
    dim: int
    stddev: float = 0.02
    dtype: str = "float32"
    fixed: bool = False
    by_id: bool = True
    packed: bool = False
    cut: bool = True

    @property
    def buckets(self) -> int:
        return next(buckets for rows, buckets, _ in _BUCKETS if self.num_rows + 1 >= rows)

    @property
    def _step(self) -> int:
        return next(step for rows, _, step in _BUCKETS if self.num_rows + 1 >= rows)

    @property
    def rows_per_bucket(self) -> int:
        rows = -(-(self.num_rows + 1) // self.buckets)
        share = LANES // self.dim if self.buckets >= 1024 and self.dim < LANES and LANES % self.dim == 0 else 1
        return -(-rows // share) * share

    @property
    def size(self) -> int:
        """Rows of the array, padding and spare rows included."""
        return self.buckets * self.rows_per_bucket

    @property
    def pack(self) -> int:
        """Rows in a line."""
        narrow = self.packed and self.buckets >= 1024 and self.dim < LANES and LANES % self.dim == 0
        return LANES // self.dim if narrow else 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.size // self.pack, self.pack * self.dim

    @property
    def bytes(self) -> int:
        """Bytes of the rows that carry ids."""
        return self.num_rows * self.dim * jnp.dtype(self.dtype).itemsize

    def position(self, slots: Any) -> Any:
        """Row of the array of each slot; slots beyond the last one wrap and must not be passed."""
        bucket = slots % self.buckets * self._step % self.buckets
        return bucket * self.rows_per_bucket + slots // self.buckets

    def slot(self, positions: Any) -> Any:
        """The inverse of `position`; may exceed num_rows at spare rows."""
        back = pow(self._step, -1, self.buckets)
        residue = positions // self.rows_per_bucket * back % self.buckets
        return positions % self.rows_per_bucket * self.buckets + residue

    def touched(self, slots: jax.Array) -> jax.Array:
        """Positions of slots, with padding (0) sent beyond the last row."""
        return jnp.where(slots > 0, self.position(slots), self.size).astype(jnp.int32)

    def init(self, key: jax.Array, first: Any = 0, count: int | None = None) -> jax.Array:
        """Rows first..first+count of the array (default: all); a row depends on key and slot alone."""
        count = self.size if count is None else count
        if self.fixed or self.stddev == 0:
            return jnp.zeros((count // self.pack, self.pack * self.dim), self.dtype)
        chunk = next(c for c in range(min(_INIT_CHUNK, count), 0, -1) if count % c == 0)
        rows = jax.lax.map(
            lambda start: self.init_rows(key, self.slot(first + start + jnp.arange(chunk))), jnp.arange(0, count, chunk)
        )
        return rows.reshape(count // self.pack, self.pack * self.dim)

    def init_rows(self, key: jax.Array, slots: jax.Array) -> jax.Array:
        """Initial values [n, dim] of slots [n]; zero for padding and spare rows."""
        draw = truncated_normal(self.stddev) if self.cut else initializers.normal(self.stddev)
        rows = jax.vmap(lambda slot: draw(jax.random.fold_in(key, slot), (self.dim,)))(slots)
        real = (slots > 0) & (slots <= self.num_rows)
        return jnp.where(real[:, None], rows, 0.0).astype(self.dtype)

    def place(self, values_SD: np.ndarray) -> np.ndarray:
        """Host values of slots 0..num_rows, in the array's order and shape; row 0 becomes zero."""
        out = np.zeros((self.size, self.dim), jnp.dtype(self.dtype))
        out[self.position(np.arange(1, self.num_rows + 1))] = values_SD[1:]
        return out.reshape(self.shape)

    def values(self, array: Any) -> np.ndarray:
        """The reverse of `place`: host values [num_rows + 1, dim] by slot. For tests, figures and export."""
        return np.asarray(array).reshape(self.size, self.dim)[self.position(np.arange(self.num_rows + 1))]

    def read(self, array: jax.Array, position_N: jax.Array) -> jax.Array:
        """Rows [N, dim] at any positions, as stored; zeros beyond the last row."""
        line = position_N // self.pack
        rows = array.at[line].get(mode="fill", fill_value=0)
        if self.pack > 1:
            part = (position_N % self.pack)[:, None, None]
            choices = rows.reshape(-1, self.pack, self.dim)
            rows = jnp.where(jnp.arange(self.pack)[None, :, None] == part, choices, 0).sum(1, dtype=rows.dtype)
        return rows


def distinct(position_N: jax.Array, size: int) -> Distinct:
    """The different positions below `size` among N (repeats and values >= size allowed)."""
    N = position_N.shape[0]
    place = jnp.arange(N, dtype=jnp.int32)
    ordered, order = jax.lax.sort_key_val(position_N, place)
    is_new = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
    group = jnp.cumsum(is_new, dtype=jnp.int32) - 1
    values = jnp.where(ordered < size, ordered, size + group)
    spare = (size + place).at[group].set(values, indices_are_sorted=True)
    inverse = jnp.zeros_like(place).at[order].set(group, unique_indices=True)
    return Distinct(spare, inverse)


def init_slots(spec: Array, rule: RowRule) -> dict[str, jax.Array]:
    """Optimizer slots of an array, zeros."""
    shapes = {"row": (spec.size,), "element": spec.shape}
    return {name: jnp.zeros(shapes[kind], jnp.float32) for name, kind in rule.slots.items()}


def write(
    spec: Array,
    rule: RowRule,
    array: jax.Array,
    slots: dict[str, jax.Array],
    position_N: jax.Array,
    grads_ND: jax.Array,
    *,
    learning_rate: jax.Array,
    weight_decay: float,
    step: jax.Array,
    key: jax.Array,
    first: Any = 0,
    merged: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One step of the rows at positions [N] of this shard, repeats summed, positions beyond it skipped.

    first: position of the shard's first row in the array. merged: the positions are distinct and ascending. Weight
    decay is decoupled and reaches the touched rows only. key: stochastic rounding; what is drawn depends on key and
    row, not on the shard.
    """
    line_N, grads_NPD, touched_NP = _lines(spec, array.shape[0], position_N, grads_ND, merged)
    row_NP = line_N[:, None] * spec.pack + jnp.arange(spec.pack)[None]
    old = array.at[line_N].get(mode="fill", fill_value=0).reshape(grads_NPD.shape).astype(jnp.float32)
    mine = {
        name: slots[name].at[row_NP if kind == "row" else line_N].get(mode="fill", fill_value=0)
        for name, kind in rule.slots.items()
    }
    mine = {name: x if rule.slots[name] == "row" else x.reshape(old.shape) for name, x in mine.items()}
    new, moved = rule.step(old, mine, grads_NPD, learning_rate, step)
    new = new - learning_rate * weight_decay * old if weight_decay else new
    if spec.pack > 1:
        new = jnp.where(touched_NP[:, :, None], new, old)
    new = _stored(spec, new, key, first + row_NP).reshape(len(line_N), -1)
    array = array.at[line_N].set(new, mode="drop", unique_indices=True, indices_are_sorted=True)
    out = {}
    for name, kind in rule.slots.items():
        kept = moved[name]
        if spec.pack > 1:
            kept = jnp.where(touched_NP if kind == "row" else touched_NP[:, :, None], kept, mine[name])
        index, kept = (row_NP, kept) if kind == "row" else (line_N, kept.reshape(len(line_N), -1))
        out[name] = slots[name].at[index].set(kept, mode="drop", unique_indices=True)
    return array, out


def _lines(spec: Array, lines: int, position_N, grads_ND, merged: bool) -> tuple[jax.Array, jax.Array, Any]:
    """Gradients summed by line: distinct lines [N] (spare ones beyond the shard), [N, pack, D], and which were hit."""
    if spec.pack == 1 and merged:
        return position_N, grads_ND[:, None], None
    line_N, group_N = distinct(position_N // spec.pack, lines)
    part_NP = (position_N % spec.pack)[:, None] == jnp.arange(spec.pack)[None]
    spread = jnp.where(part_NP[:, :, None], grads_ND[:, None], 0.0)
    N = len(position_N)
    touched = jax.ops.segment_sum(part_NP.astype(jnp.int32), group_N, N) > 0
    return line_N, jax.ops.segment_sum(spread, group_N, N), touched


def write_whole(
    spec: Array,
    rule: RowRule,
    array: jax.Array,
    slots: dict[str, jax.Array],
    grads: jax.Array,
    *,
    learning_rate: jax.Array,
    weight_decay: float,
    step: jax.Array,
    key: jax.Array,
    first: Any = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One step of every row of this shard; grads shaped like the array. Costs as much as the table."""
    shape = (array.shape[0] * spec.pack, spec.dim)
    row = first + jnp.arange(shape[0])
    real = ((spec.slot(row) > 0) & (spec.slot(row) <= spec.num_rows))[:, None]
    old = array.reshape(shape).astype(jnp.float32)
    mine = {name: x.reshape(shape) if rule.slots[name] == "element" else x for name, x in slots.items()}
    new, moved = rule.step(old, mine, jnp.where(real, grads.reshape(shape), 0.0), learning_rate, step)
    new = jnp.where(real, new - learning_rate * weight_decay * old if weight_decay else new, 0.0)
    array = _stored(spec, new, key, row).reshape(array.shape)
    return array, {name: moved[name].reshape(slots[name].shape) for name in slots}


def accumulate(spec: Array, total: jax.Array, position_N: jax.Array, grads_ND: jax.Array) -> jax.Array:
    """Adds the gradients of rows to a dense gradient shaped like the shard; positions beyond it are skipped."""
    flat = total.reshape(-1, spec.dim)
    return flat.at[position_N].add(grads_ND, mode="drop").reshape(total.shape)


def _stored(spec: Array, rows: jax.Array, key: jax.Array, row: jax.Array) -> jax.Array:
    """float32 rows [..., D] as they are stored; bfloat16 rounds up or down at random, so that the mean is kept."""
    if spec.dtype != "bfloat16":
        return rows.astype(spec.dtype)
    draw = jax.vmap(lambda r: jax.random.bits(jax.random.fold_in(key, r), (spec.dim,), jnp.uint16))
    noise = draw(row.reshape(-1)).reshape(rows.shape).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(rows), rounded, rows).astype(jnp.bfloat16)
