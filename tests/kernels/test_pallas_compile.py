"""The Pallas kernels, lowered and compiled for TPUs and NVIDIA GPUs on a machine that has neither."""

import importlib.util
import itertools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from launch import hlo
from launch.chips import CHIPS
from recscale.kernels.attention import Bias, attention

# jax from 0.11.2 on says so wherever a Triton kernel is lowered
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "h100": "NVIDIA H100 80GB HBM3"}
CALLS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
PASSES = 4  # forward; backward for queries, keys, tables
EVERY_CASE = list(itertools.product(("silu", "softmax"), (jnp.float32, jnp.bfloat16)))


def platform_of(chip: str) -> str:
    return "cuda" if CHIPS[chip].platform == "gpu" else "tpu"


def program(kind: str, dtype, length: int, width: int = 128, masks: bool = False, implementation: str = "pallas"):
    """(function, abstract arguments) of outputs and all gradients, one row, two heads, both biases."""
    n, ids = length + 2, jax.ShapeDtypeStruct((1, length), jnp.int32)
    heads = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
    tables = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (2 * n - 1, 129)]
    targets = jax.ShapeDtypeStruct((1, length), jnp.bool_)

    def compute(q, k, v, position, time, weight, segment_ids, query_time, key_time, targets_BL):
        given = {"window": length // 4, "prefix": 5, "targets_BL": targets_BL} if masks else {}

        def total(q, k, v, position, time):
            bias = Bias(position, time, query_time, key_time)
            out = attention(q, k, v, segment_ids, bias, kind=kind, n=n, implementation=implementation, **given)
            return (out * weight).astype(jnp.float32).sum(), out

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True)(q, k, v, position, time)

    return compute, [heads, heads, heads, *tables, heads, ids, ids, ids, targets]


def lower(chip: str, function, arguments, chips: int = 1) -> Any:
    """The program lowered for a chip that is not here."""
    platform = platform_of(chip)
    device = AbstractDevice(KINDS[chip], 1 if platform == "tpu" else 132, "tpu" if platform == "tpu" else "gpu")
    mesh = AbstractMesh((chips,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))


def compiled(chip: str, device, *given, **options) -> Any:
    """The program compiled for one device of a topology."""
    sharding = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())
    function, arguments = program(*given, **options)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    return lower(chip, function, placed).compile()


def holds_all_pairs(text: str, length: int) -> bool:
    """Whether a program has an array of all pairs of slots, padded or not."""
    sides = "|".join(str(x) for x in range(length, length + 257))
    return re.search(rf"\b({sides})[x,]({sides})[x,\]]", text) is not None


@pytest.mark.parametrize("chip", ["v5p", "h100"])
@pytest.mark.parametrize("kind", ["silu", "softmax"])
def test_lowers_to_kernels_without_an_array_of_all_pairs(chip, kind):
    text = lower(chip, *program(kind, jnp.bfloat16, 1000, 32, masks=True)).as_text()
    assert text.count(CALLS[platform_of(chip)]) == PASSES
    assert not holds_all_pairs(text, 1000)


def test_all_pairs_are_found_where_they_are():
    text = lower("v5p", *program("silu", jnp.bfloat16, 1000, 32, implementation="einsum")).as_text()
    assert CALLS["tpu"] not in text and holds_all_pairs(text, 1000)


@pytest.fixture(scope="module")
def tpus() -> dict[str, list[Any]]:
    """The devices of a slice of each kind of TPU. Skips where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs: libtpu is not installed (pip install 'jax[tpu]')")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not look for a machine around it
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock file would abort a second process
    names = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
    found = {chip: topologies.get_topology_desc(platform="tpu", topology_name=name) for chip, name in names.items()}
    return {chip: topology.devices for chip, topology in found.items()}


@pytest.fixture(scope="module")
def gpus() -> dict[str, list[Any]]:
    """Four H100. Skips where the plugin for CUDA is not installed; neither a GPU nor a driver is needed."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("compiling for GPUs: no plugin (pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt)")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=CHIPS["h100"].target, topology="1x1x4"
    )
    return {"h100": topology.devices}


def assert_compiles(chip: str, device, kind: str, dtype) -> None:
    for masks, width, length in ((False, 128, 2048), (True, 50, 1000)):
        done = compiled(chip, device, kind, dtype, length, width, masks=masks)
        memory = done.memory_analysis()
        print(f"{chip} {kind} {dtype.__name__} L {length}: {memory.temp_size_in_bytes / 1e6:.1f} MB of temporaries")
        assert not holds_all_pairs(done.as_text(), length)
    assert jax.devices()[0].platform == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
@pytest.mark.parametrize(("kind", "dtype"), EVERY_CASE)
def test_compiles_for_tpus(tpus, chip, kind, dtype):
    assert_compiles(chip, tpus[chip][0], kind, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), EVERY_CASE)
def test_compiles_for_gpus(gpus, kind, dtype):
    assert_compiles("h100", gpus["h100"][0], kind, dtype)


def assert_memory_is_linear(chip: str, device) -> None:
    """Temporaries of a row grow no faster than the row, and what einsum needs is far above them."""
    used = {}
    for length in (2048, 4096, 8192):
        memory = compiled(chip, device, "silu", jnp.bfloat16, length).memory_analysis()
        used[length] = memory.temp_size_in_bytes / 1e6
    plain = compiled(chip, device, "silu", jnp.bfloat16, 4096, implementation="einsum").memory_analysis()
    print(f"{chip}: temporaries by length {used} MB; einsum at 4096 {plain.temp_size_in_bytes / 1e6:.1f} MB")
    assert used[8192] <= 2.2 * used[4096] + 1 and used[4096] <= 2.2 * used[2048] + 1
    assert plain.temp_size_in_bytes / 1e6 > 5 * used[4096]


@pytest.mark.slow
def test_memory_is_linear_on_a_tpu(tpus):
    assert_memory_is_linear("v5p", tpus["v5p"][0])


@pytest.mark.slow
def test_memory_is_linear_on_a_gpu(gpus):
    assert_memory_is_linear("h100", gpus["h100"][0])


def assert_rows_stay_where_they_are(chip: str, devices) -> None:
    """Under shard_map over the rows, chips exchange the gradients of the tables and nothing else."""
    mesh = Mesh(np.array(devices), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    function, arguments = program("silu", jnp.bfloat16, 1000)
    specs = [rows if len(x.shape) > 1 else whole for x in arguments]

    def summed(*given):
        (_, out), (dq, dk, dv, *tables) = function(*given)
        return out, dq, dk, dv, *(jax.lax.psum(x, "data") for x in tables)

    spread = jax.shard_map(summed, in_specs=tuple(specs), out_specs=(rows,) * 4 + (whole,) * 2, check_vma=False)
    wide = [(len(devices), *x.shape[1:]) if len(x.shape) > 1 else x.shape for x in arguments]
    placed = [
        jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for shape, x, spec in zip(wide, arguments, specs, strict=True)
    ]
    moved = hlo.read(lower(chip, spread, placed, len(devices)).compile().as_text())
    total = {kind: moved.total(kind) for kind in hlo.KINDS}
    print(f"{chip} x {len(devices)}: bytes by kind of collective {total}")
    assert sum(total.values()) - total["all-reduce"] == 0 < total["all-reduce"] <= 8 * (2 * 1002 + 129)


@pytest.mark.slow
def test_rows_stay_where_they_are_on_tpus(tpus):
    assert_rows_stay_where_they_are("v5p", tpus["v5p"])


@pytest.mark.slow
def test_rows_stay_where_they_are_on_gpus(gpus):
    assert_rows_stay_where_they_are("h100", gpus["h100"])
