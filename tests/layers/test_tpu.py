"""A train step of a sharded table, compiled for TPUs by libtpu, which needs no TPU: what it moves and what it pads."""

import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from launch import hlo
from recscale.layers.kinds import Table
from recscale.layers.tables import Tables
from recscale.mesh import make_mesh
from tests.layers.test_tables import LOOKUPS, ROWS, WIDTH, compile_step

pytestmark = pytest.mark.slow
LINE = 128 * 4


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """Eight chips of a TPU v5e. Skips where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs: libtpu is not installed (pip install 'jax[tpu]')")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not look for a machine around it
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock file would abort a second process
    return make_mesh(1, 2, 4, topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)


def report(name: str, tables: Tables) -> Any:
    """Memory of a compiled step per device, printed."""
    memory = compile_step(tables, "rowwise_adagrad").memory_analysis()
    held, temporary = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    print(f"{name}: arguments {held:.1f}, temporaries {temporary:.1f} MB")
    return memory


def unpacked(tables: Tables) -> Tables:
    """The same tables with a row per line."""
    tables.arrays = {name: dataclasses.replace(array, packed=False) for name, array in tables.arrays.items()}
    return tables


def test_a_step_moves_rows_and_never_the_table(mesh):
    tables = Tables({"t": Table(ROWS, WIDTH)}, mesh)
    program = compile_step(tables, "rowwise_adagrad")
    moved = hlo.read(program.as_text())
    row, table = WIDTH * 4, math.prod(tables.arrays["t"].shape) * 4
    ids = np.exp(np.random.default_rng(0).random((8, LOOKUPS // 8)) * np.log(ROWS)).astype(int)  # log-uniform
    touched = np.mean([len(np.unique(x)) for x in ids]) * row
    one_way = moved.total("all-to-all") / 2
    print(f"v5e 2x4, table {table / 1e6:.0f} MB: all-to-all {one_way / 1e6:.2f} MB per device and direction,")
    print(f"{one_way / touched:.2f} x the {touched / 1e6:.2f} MB of the rows that a device's lookups reach")
    for kind in hlo.KINDS:
        print(f"{kind}: {moved.count(kind)}, {moved.total(kind)} bytes, largest {moved.largest(kind)}")
    assert touched < one_way <= 2.5 * touched
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute"):
        assert moved.total(kind) < 64 * 1024, kind
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * table / 8


@pytest.mark.parametrize("dim", [64, 32])
def test_narrow_rows_are_not_padded_to_a_line(mesh, dim):
    """With a shard too large for the chip's on-chip memory; below that the compiler finds other ways."""
    tables = Tables({"t": Table(10**7, dim)}, mesh)
    assert tables.arrays["t"].pack == 128 // dim
    shard = tables.arrays["t"].size * dim * 4 // 8
    packed = report(f"dim {dim}, packed, {shard / 1e6:.1f} MB of rows", tables)
    own = tables.arrays["t"].size // 8 * 4  # one optimizer slot a row
    assert packed.argument_size_in_bytes < shard + own + 2 * LOOKUPS // 8 * LINE
    assert packed.temp_size_in_bytes < shard / 10
    if dim == 64:
        plain = report("dim 64, a row per line", unpacked(tables))
        assert plain.temp_size_in_bytes > tables.arrays["t"].size // 8 * LINE  # a padded copy: what packing is for
    assert jax.devices()[0].platform == "cpu"
