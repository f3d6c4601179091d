"""Embedding tables on a mesh: a step touches rows, moves those rows between devices, and writes those rows back.

Every device removes the repeats among its own ids, asks the devices that own the rows for them (all-to-all), and sends
the summed gradients back the same way; the owner adds what several devices sent and updates each row once. What moves
is in proportion to the ids of a batch, never to the table. Buffers have a fixed capacity per pair of devices, four
standard deviations above the mean of evenly spread ids; where that is not enough the exchange is repeated with the rows
split into 2, 4, ... 64 classes, so that every row is updated once and none is lost. Extra rounds are counted, and so
are rows that found no place even then (`overflow`): a run must not go on after those.

Arrays that cannot be shared evenly (a mesh of more devices than buckets) are held by every device if they are small.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recscale.layers.embedding import Array, RowRule, accumulate, distinct, init_slots, write, write_whole
from recscale.layers.exchange import Route
from recscale.layers.kinds import Table

REPLICATED_BYTES = 64 << 20

Arrays = dict[str, jax.Array]
Mixers = dict[str, dict[str, jax.Array]]


class Touched(NamedTuple):
    """What a step touches of one table; every leaf has the devices' parts along its first axis.

    index: name -> for each id of that name, its place among the device's distinct ids. position: array -> the distinct
    rows [n, U], ascending. inverse: shared array -> [n, ids, k], the place of each slot among the distinct rows.
    """

    index: dict[str, jax.Array]
    position: dict[str, jax.Array]
    inverse: dict[str, jax.Array]


class Items(NamedTuple):
    """Some ids of a shard, ascending (0 and ids beyond the last are not real): their rows, and where those are."""

    ids: jax.Array
    position: dict[str, jax.Array]
    rows: dict[str, jax.Array]


class Update(NamedTuple):
    """How one array learns in this step."""

    rule: RowRule
    learning_rate: jax.Array
    weight_decay: float


class Tables:
    """The tables of a run, their arrays by name ("item", "item.codes") and everything that depends on the mesh."""

    def __init__(self, specs: Mapping[str, Table], mesh: Mesh):
        """Raises ValueError for a large array that the mesh cannot share evenly."""
        self.specs, self.mesh = dict(specs), mesh
        self.axes = tuple(mesh.axis_names)
        packed = mesh.devices.flat[0].platform == "tpu"
        self.arrays: dict[str, Array] = {}
        for name, spec in self.specs.items():
            for part, array in spec.arrays().items():
                self.arrays[join(name, part)] = Array(**(vars(array) | {"packed": packed}))
        for name, array in self.arrays.items():
            if not self.is_sharded(array) and array.bytes > REPLICATED_BYTES:
                raise ValueError(
                    f"table {name!r} of {array.bytes / 2**20:,.0f} MiB cannot be shared by {mesh.size} devices: "
                    f"choose a mesh whose size divides {array.buckets}"
                )

    def is_sharded(self, array: Array) -> bool:
        """Whether each device holds a part of the array."""
        return array.buckets % self.mesh.size == 0

    def spec(self, name: str) -> PartitionSpec:
        """Layout of an array and of its optimizer slots."""
        return PartitionSpec(self.axes) if self.is_sharded(self.arrays[name]) else PartitionSpec()

    def sharding(self, name: str) -> NamedSharding:
        """Placement of an array and of its optimizer slots."""
        return NamedSharding(self.mesh, self.spec(name))

    def parts(self, table: str) -> dict[str, str]:
        """Part of a table ("" is the main one) -> name of its array."""
        return {part: join(table, part) for part in self.specs[table].arrays()}

    # Starting values ------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> tuple[Arrays, Mixers]:
        """All arrays (fixed ones zero) and mixers; a row depends on key, table and slot, not on the mesh."""
        arrays: Arrays = {}
        mixers: Mixers = {}
        for i, table in enumerate(sorted(self.specs)):
            own = jax.random.fold_in(key, i)
            mixers[table] = self.specs[table].mixer(jax.random.fold_in(own, 0))
            for j, name in enumerate(sorted(self.parts(table).values())):
                arrays[name] = self._init_array(name, jax.random.fold_in(own, 1 + j))
        return arrays, mixers

    def _init_array(self, name: str, key: jax.Array) -> jax.Array:
        array = self.arrays[name]
        if not self.is_sharded(array):
            return array.init(key)
        count = array.size // self.mesh.size
        make = self.each(lambda key: array.init(key, self._device() * count, count), PartitionSpec(), self.spec(name))
        return make(key)

    def init_slots(self, name: str, rule: RowRule) -> dict[str, jax.Array]:
        """Zero optimizer slots of an array."""
        return init_slots(self.arrays[name], rule)

    # A step ---------------------------------------------------------------------------------------------------------

    def touch(self, arrays: Arrays, table: str, ids: dict[str, jax.Array]) -> tuple[Touched, Arrays, jax.Array]:
        """The distinct rows that the ids reach: (where they are, the learned rows [n, U, d], overflow int32 [2]).

        ids: name -> int32 [B, ...], the first axis shared evenly by the devices, or [N], shared as well as can be.
        overflow: extra rounds of exchange, and rows that were lost.
        """
        padded = {name: self._pad(x) for name, x in ids.items()}
        own = {part: arrays[name] for part, name in self.parts(table).items()}
        rows_in = {part: self.spec(name) for part, name in self.parts(table).items()}
        leading = PartitionSpec(self.axes)
        run = self.each(
            lambda own, ids: self._touch(table, own, ids), (rows_in, leading), (leading, leading, PartitionSpec())
        )
        return run(own, padded)

    def vectors(
        self, table: str, rows: Arrays, mixer: dict[str, jax.Array], touched: Touched, shapes: dict[str, Any]
    ) -> dict[str, jax.Array]:
        """Vectors [B, ..., D] of each name in touched.index; differentiable in rows and mixer.

        shapes: name -> anything with the shape of the ids that were touched.
        """
        leading = PartitionSpec(self.axes)
        run = self.each(
            lambda rows, mixer, touched: self._vectors(table, rows, mixer, touched),
            (leading, PartitionSpec(), leading),
            leading,
        )
        out = run(rows, mixer, touched)
        return {name: x[: shapes[name].shape[0]] for name, x in out.items()}

    def lookup(self, arrays: Arrays, mixers: Mixers, table: str, ids: jax.Array) -> jax.Array:
        """Vectors [..., D] of ids [...], for evaluation."""
        touched, rows, _ = self.touch(arrays, table, {"ids": ids})
        return self.vectors(table, rows, mixers[table], touched, {"ids": ids})["ids"]

    def update(
        self,
        name: str,
        array: jax.Array,
        slots: dict[str, jax.Array],
        position: jax.Array,
        grads: jax.Array,
        how: Update,
        step: jax.Array,
        key: jax.Array,
        dense: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        """One step of an array from the gradients [n, U, d] of the rows at `position` [n, U]; also the overflow.

        dense: a further gradient of every row, shaped like the array (full softmax).
        """
        spec, leading, none = self.spec(name), PartitionSpec(self.axes), PartitionSpec()
        run = self.each(
            lambda array, slots, position, grads, rate, step, key, dense: self._update(
                name, array, slots, position[0], grads[0], how._replace(learning_rate=rate), step, key, dense
            ),
            (spec, spec, leading, leading, none, none, none, spec),
            (spec, spec, none),
        )
        return run(array, slots, position, grads, how.learning_rate, step, key, dense)

    # What runs on each device ---------------------------------------------------------------------------------------

    def each(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """The function of one device's parts, run on every device."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _device(self) -> jax.Array:
        return jax.lax.axis_index(self.axes)

    def _pad(self, ids: jax.Array) -> jax.Array:
        lacking = -ids.shape[0] % self.mesh.size
        return jnp.pad(ids, [(0, lacking)] + [(0, 0)] * (ids.ndim - 1)) if lacking else ids

    def _layout(self, table: str) -> Array:
        """The order in which ids are shared: that of an array by id whose rows are a whole line."""
        return Array(self.specs[table].num_ids, 128)

    def _touch(self, table, own, ids):
        spec, layout = self.specs[table], self._layout(table)
        flat = jnp.concatenate([x.reshape(-1) for x in ids.values()])
        found = distinct(layout.touched(flat), layout.size)
        count = min(len(flat), spec.num_ids + 1)
        place = found.position_N[:count]
        ids_U = jnp.where(place < layout.size, layout.slot(place), 0)
        index, first = {}, 0
        for name, x in ids.items():
            index[name] = found.inverse_N[first : first + x.size].reshape(x.shape)
            first += x.size
        position, inverse, rows, overflow = {}, {}, {}, jnp.zeros((2,), jnp.int32)
        arrays = {part: self.arrays[join(table, part)] for part in own}
        spare = jnp.arange(count, dtype=jnp.int32)
        by_id = {p: jnp.where(ids_U > 0, a.position(ids_U), a.size + spare) for p, a in arrays.items() if a.by_id}
        codes = None
        if "codes" in arrays:
            codes, more = self._fetch(arrays["codes"], own["codes"], by_id["codes"])
            overflow += more
        slots = spec.slots(ids_U, codes)
        for part, array in arrays.items():
            if part == "codes":
                continue
            if array.by_id:
                position[part] = by_id[part]
            else:
                merged = distinct(array.touched(slots[part].reshape(-1)), array.size)
                position[part] = merged.position_N[: array.num_rows + 1]
                inverse[part] = merged.inverse_N.reshape(slots[part].shape)
            fetched, more = self._fetch(array, own[part], position[part])
            rows[part] = _learning(array, fetched)
            overflow += more
        lift = functools.partial(jax.tree.map, lambda x: x[None])
        return Touched(index, lift(position), lift(inverse)), lift(rows), overflow

    def _vectors(self, table, rows, mixer, touched):
        rows, inverse = jax.tree.map(lambda x: x[0], (rows, touched.inverse))
        whole = {part: x[inverse[part]] if part in inverse else x for part, x in rows.items()}
        vectors_UD = self.specs[table].compose(whole, mixer)
        return {name: vectors_UD[place] for name, place in touched.index.items()}

    def _fetch(self, array: Array, shard: jax.Array, position_U: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows at distinct ascending positions, zeros beyond the last, and the overflow."""
        zero = jnp.zeros((2,), jnp.int32)
        if self.mesh.size == 1 or not self.is_sharded(array):
            return array.read(shard, position_U), zero
        route = Route(self.axes, self.mesh.size, array.size, position_U)

        def round_(i, out):
            taken, index = route.places(i)
            asked = route.swap(route.fill(index, route.local, route.rows))
            found = array.read(shard, asked.reshape(-1))
            back = route.swap(found.reshape(*asked.shape, -1)).reshape(-1, array.dim)
            return jnp.where(taken[:, None], back.at[index].get(mode="clip"), out)

        start = jnp.zeros((len(position_U), array.dim), shard.dtype)
        return jax.lax.fori_loop(0, route.rounds, round_, start), route.overflow

    def _update(self, name, array, slots, position_U, grads_UD, how, step, key, dense):
        spec, decay = self.arrays[name], how.weight_decay
        first = self._device() * (spec.size // self.mesh.size) if self.mesh.size > 1 and self.is_sharded(spec) else 0
        settings = {"learning_rate": how.learning_rate, "weight_decay": decay, "step": step, "key": key, "first": first}

        if how.rule.whole or dense is not None:

            def add(total, position_N, grads_ND, merged):
                return accumulate(spec, total, position_N, grads_ND)

            start = jnp.zeros(array.shape, jnp.float32) if dense is None else dense.astype(jnp.float32)
            total, overflow = self._receive(spec, position_U, grads_UD, add, start)
            return *write_whole(spec, how.rule, array, slots, total, **settings), overflow

        def learn(state, position_N, grads_ND, merged):
            array, slots = state
            return write(spec, how.rule, array, slots, position_N, grads_ND, merged=merged, **settings)

        (array, slots), overflow = self._receive(spec, position_U, grads_UD, learn, (array, slots))
        return array, slots, overflow

    def _receive(self, spec, position_U, grads_UD, take, state):
        """take(state, positions, gradients, whether they are distinct) for all that reaches this device's rows."""
        zero = jnp.zeros((2,), jnp.int32)
        if self.mesh.size == 1:
            return take(state, position_U, grads_UD, True), zero
        if not self.is_sharded(spec):
            everything = (jax.lax.all_gather(x, self.axes, tiled=True) for x in (position_U, grads_UD))
            return take(state, *everything, False), zero
        route = Route(self.axes, self.mesh.size, spec.size, position_U)

        def round_(i, state):
            _, index = route.places(i)
            position_N = route.swap(route.fill(index, route.local, route.rows)).reshape(-1)
            grads_ND = route.swap(route.fill(index, grads_UD, 0.0)).reshape(-1, spec.dim)
            return take(state, position_N, grads_ND, False)

        return jax.lax.fori_loop(0, route.rounds, round_, state), route.overflow

    # The whole catalogue, shard by shard ----------------------------------------------------------------------------

    def shards(self, table: str) -> int:
        """Devices among which the ids of a table are shared; 1 where every device holds them all."""
        return self.mesh.size if self.is_sharded(self._layout(table)) else 1

    def catalogue_specs(self, table: str) -> dict[str, PartitionSpec]:
        """Layouts of a table's arrays for work on the whole catalogue: by id as stored, shared rows on every device."""
        named = self.parts(table).values()
        return {name: self.spec(name) if self.arrays[name].by_id else PartitionSpec() for name in named}

    def local_count(self, table: str) -> int:
        """Places for ids in a shard, spare ones included."""
        return self._layout(table).size // self.shards(table)

    def shard(self, table: str) -> jax.Array:
        """Number of this device's shard; call inside `each`."""
        return self._device() if self.shards(table) > 1 else jnp.zeros((), jnp.int32)

    def local_ids(self, table: str, start: Any, size: int) -> jax.Array:
        """The shard's ids number start.. in ascending order, int32 [size]; 0 or beyond num_ids: not real."""
        layout = self._layout(table)
        shards = self.shards(table)
        width = layout.buckets // shards
        residue = layout.slot((self.shard(table) * width + jnp.arange(width)) * layout.rows_per_bucket)
        k = start + jnp.arange(size, dtype=jnp.int32)
        ids = k // width * layout.buckets + jnp.sort(residue)[k % width]
        return jnp.where(k < self.local_count(table), ids, 0).astype(jnp.int32)

    def local_items(self, table: str, arrays: Arrays, start: Any, size: int) -> Items:
        """Rows of the ids of `local_ids`; arrays laid out as `catalogue_specs` says. Compose them for vectors."""
        spec, ids = self.specs[table], self.local_ids(table, start, size)
        real = (ids > 0) & (ids <= spec.num_ids)
        kept = jnp.where(real, ids, 0)
        arrays_of = {part: (self.arrays[name], arrays[name]) for part, name in self.parts(table).items()}
        position, rows, codes = {}, {}, None
        for part, (array, values) in arrays_of.items():
            if array.by_id:
                first = self.shard(table) * (array.size // self.shards(table)) if self.is_sharded(array) else 0
                position[part] = jnp.where(real, array.position(kept) - first, array.size)
                rows[part] = _learning(array, array.read(values, position[part]))
        codes = rows.pop("codes", None)
        position.pop("codes", None)
        for part, slots in spec.slots(kept, codes).items():
            array, values = arrays_of[part]
            position[part] = array.touched(slots)
            found = array.read(values, position[part].reshape(-1)).reshape(*slots.shape, array.dim)
            rows[part] = _learning(array, found)
        return Items(ids, position, rows)


def _learning(array: Array, rows: jax.Array) -> jax.Array:
    return rows if array.fixed else rows.astype(jnp.float32)


def join(table: str, part: str) -> str:
    """Name of an array of a table."""
    return f"{table}.{part}" if part else table
