"""Meshes, and the one place that decides what lies where and what is kept for the backward pass.

Axes: "replica" (slices or nodes joined by a slow network), "data", and "model". Every device works on rows of the batch
of its own, whatever the shape of the mesh; the rows of the embedding tables are spread over all devices. "model" is the
axis over which large dense matrices and their optimizer state are spread too (they are gathered layer by layer, and
their gradients scattered, as in fully sharded data parallelism); with model = 1 they are on every device.

The meshes are Auto: the compiler propagates the layouts named here. Tables, full softmax and ranking, where a wrong
guess would move a table, are written per device (shard_map) and leave nothing to propagate.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("replica", "data", "model")
BATCH = PartitionSpec(AXES)
REPLICATED = PartitionSpec()
DROPOUT_MASK = "dropout_mask"  # the name under which a layer's dropout masks are kept
LARGE = 1 << 16
"""Elements from which a matrix of a layer is spread over "model"."""
STACKS = ("layers", "blocks")  # attributes of a model that hold its layers, stacked along the first axis


def make_mesh(replica: int, data: int, model: int, devices: Any = None) -> Mesh:
    """A ("replica", "data", "model") mesh; raises ValueError where there are fewer devices.

    devices: those of a topology, default those of the machine, in an order that suits its network.
    """
    shape = (replica, data, model)
    here = jax.devices() if devices is None else list(np.asarray(devices).flat)
    size = int(np.prod(shape))
    if min(shape) < 1 or size > len(here):
        raise ValueError(
            f"mesh {replica}x{data}x{model} (replica, data, model) needs {size} devices, {len(here)} are here: "
            "change mesh.replica, mesh.data or mesh.model"
        )
    idle = {device.process_index for device in here} - {device.process_index for device in here[:size]}
    if devices is None and idle:
        raise ValueError(
            f"mesh {replica}x{data}x{model} (replica, data, model) has {size} of {len(here)} devices, none of process "
            f"{min(idle)}: let it take all of them, or start fewer processes"
        )
    if here[0].platform == "tpu" and size > 1:  # neighbours of the mesh should be neighbours of the torus
        grid = mesh_utils.create_device_mesh(shape, here[:size], allow_split_physical_axes=True)
    else:
        grid = np.array(here[:size]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def dense_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Layout of a weight of one layer: a large matrix by the longer of its last two axes that "model" divides."""
    parts = mesh.shape["model"]
    if parts == 1 or len(shape) < 2 or shape[-1] * shape[-2] < LARGE:
        return REPLICATED
    for axis in sorted((-1, -2), key=lambda a: -shape[a]):
        if shape[axis] % parts == 0:
            return PartitionSpec(*("model" if i == len(shape) + axis else None for i in range(len(shape))))
    return REPLICATED


def dense_shardings(mesh: Mesh, tree: Any) -> Any:
    """Layouts of dense parameters or their optimizer state: `dense_spec` for stacked layers, the rest everywhere."""

    def one(path, leaf) -> NamedSharding:
        stacked = any(getattr(key, "name", getattr(key, "key", None)) in STACKS for key in path)
        spec = dense_spec(mesh, leaf.shape[1:]) if stacked else REPLICATED
        return NamedSharding(mesh, REPLICATED if spec == REPLICATED else PartitionSpec(None, *spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def layer_wrapper(mesh: Mesh, remat: str) -> Callable[[Callable], Callable]:
    """What a model puts around the body of its scan over layers: weights gathered there, and the remat policy.

    The body is (x, (layer, key)) -> (x, None). remat: "layer" keeps only the inputs of a layer, "dots" the results of
    its matrix products too, "none" everything. Raises ValueError for another word.
    """
    if remat not in REMAT:
        raise ValueError(f"mesh.remat = {remat!r}: expected one of {tuple(REMAT)}")

    def wrap(body: Callable) -> Callable:
        def gathered(x, layer_and_key):
            layer, key = layer_and_key
            if mesh.size > 1:
                x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))
            return body(x, (jax.tree.map(lambda w: _gathered(mesh, w), layer), key))

        return REMAT[remat](gathered)

    return wrap


def recompute(layer: Callable) -> Callable:
    """Recompute a scanned layer in the backward pass and keep only its input and its dropout masks.

    Memory no longer holds the scores of every layer, and on CPU a step takes half the time: there, writing and reading
    what would be kept costs more than computing it again.
    """
    policy = jax.checkpoint_policies.save_only_these_names(DROPOUT_MASK)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)  # a scan needs no protection from CSE


REMAT: dict[str, Callable[[Callable], Callable]] = {
    "layer": recompute,
    "dots": lambda body: jax.checkpoint(
        body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "none": lambda body: body,
}


def _gathered(mesh: Mesh, weight: jax.Array) -> jax.Array:
    """The whole of a spread weight; its gradient is scattered again instead of being summed on every device."""
    spec = dense_spec(mesh, weight.shape)
    if spec == REPLICATED:
        return weight

    @jax.custom_vjp
    def gather(w):
        return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, REPLICATED))

    gather.defvjp(
        lambda w: (gather(w), None), lambda _, g: (jax.lax.with_sharding_constraint(g, NamedSharding(mesh, spec)),)
    )
    return gather(weight)


def spread_rows(mesh: Mesh, x: jax.Array) -> jax.Array:
    """States that the first axis is the batch's rows."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH)) if mesh.size > 1 else x


def split_rows(mesh: Mesh, x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...] for gradient accumulation, each device keeping its own rows."""
    rows = x.reshape(mesh.size, parts, x.shape[0] // mesh.size // parts, *x.shape[1:])
    rows = jnp.moveaxis(rows, 1, 0).reshape(parts, x.shape[0] // parts, *x.shape[1:])
    if mesh.size == 1:
        return rows
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec(None, AXES)))


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A host batch on the devices; on several hosts each passes its own rows."""
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def place_same(sharding: NamedSharding, value: np.ndarray) -> jax.Array:
    """A host array that every process holds whole, laid out as `sharding` says."""
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
