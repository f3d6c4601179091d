"""Meshes and the few named layouts every module shares.

Axes: "data" (rows of a batch) and "model" (rows of a table). The meshes are Auto: the compiler propagates the layouts
named here, which ran every model unchanged and never gathered a table; Explicit meshes would make each gather from a
sharded table state its output layout, and pay off where tables are updated row by row under shard_map.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ROWS_OF_BATCH = PartitionSpec("data")
ROWS_OF_TABLE = PartitionSpec(("data", "model"))
REPLICATED = PartitionSpec()


def make_mesh(data: int, model: int) -> Mesh:
    """A ("data", "model") mesh over data x model devices; raises ValueError where the machine has fewer."""
    devices = jax.devices()
    if data < 1 or model < 1 or data * model > len(devices):
        raise ValueError(
            f"mesh {data}x{model} needs {data * model} devices, {len(devices)} are here: change mesh.data or mesh.model"
        )
    grid = np.array(devices[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def table_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows of a table over all devices where they divide evenly, else replicated (small tables)."""
    return NamedSharding(mesh, ROWS_OF_TABLE if rows % mesh.size == 0 else REPLICATED)


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A host batch on the devices, rows over "data"; on several hosts each passes its own rows."""
    sharding = NamedSharding(mesh, ROWS_OF_BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
