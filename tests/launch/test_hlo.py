"""Reading a compiled program: collectives, trips of loops, FLOPs and traffic, as compiled for CPU and for a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launch import chips, compiling, hlo
from launch.hlo_text import replica_groups, size

LAYERS, WIDTH, ROWS, BATCH = 3, 512, 8000, 64
ALL = PartitionSpec(("data", "model"))
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def compiled_step(devices, unrolled=False, data_dependent=False):
    """A train step with what a real one has: rows by all-to-all, sharded matrices in a scan, gradients, an update."""
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def lookup(table, ids):
        asked = jax.lax.all_to_all(ids.reshape(8, -1), ("data", "model"), 0, 0)
        rows = table.at[asked.reshape(-1)].get(mode="clip").reshape(8, -1, WIDTH)
        return jax.lax.all_to_all(rows, ("data", "model"), 0, 0).reshape(-1, WIDTH)

    spread = jax.shard_map(lookup, mesh=mesh, in_specs=(ALL, ALL), out_specs=ALL, check_vma=False)

    def loss(weights, table, ids, wanted):
        body = jax.checkpoint(lambda x, w: (jax.nn.silu(x @ w), None))
        x, _ = jax.lax.scan(body, spread(table, ids), weights, unroll=LAYERS if unrolled else 1)
        return jnp.mean((x - wanted) ** 2)

    def step(state, ids, wanted):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(*state, ids, wanted)
        if data_dependent:
            value = jax.lax.while_loop(lambda v: v > 1e-9, lambda v: v * jnp.mean(wanted), value)
        return jax.tree.map(lambda x, g: x - 0.1 * g, state, grads), value

    def shape(dims, dtype, spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    weights = shape((LAYERS, WIDTH, WIDTH), jnp.float32, PartitionSpec(None, "model"))
    table = shape((ROWS, WIDTH), jnp.float32, ALL)
    layout = ((weights.sharding, table.sharding), None)
    batch = (shape((BATCH,), jnp.int32, ALL), shape((BATCH, WIDTH), jnp.float32, ALL))
    return jax.jit(step, donate_argnums=0, out_shardings=layout).lower((weights, table), *batch).compile()


@pytest.fixture(scope="module")
def program():
    return hlo.read(compiled_step(jax.devices()[:8]).as_text())


# Forward, recomputed forward, and two products backward, in each layer, of the rows of four devices that share a matrix
# (the compiler gathers the matrix: a device multiplies its own 8 rows; here XLA:CPU keeps 64).
def products(rows):
    return LAYERS * 4 * 2 * rows * WIDTH * WIDTH


def test_flops_count_every_trip_of_a_scan(program):
    unrolled = hlo.read(compiled_step(jax.devices()[:8], unrolled=True).as_text())
    assert unrolled.matmul_flops == program.matmul_flops
    assert program.matmul_flops % products(1) == 0
    once = compiled_step(jax.devices()[:8]).cost_analysis()["flops"]
    assert once < 0.5 * program.matmul_flops, "the compiler counts a scan's body once; if not, say so in the report"


def test_collectives_of_a_scan_and_of_a_lookup(program):
    row = 4 * WIDTH
    asked, moved = 4 * BATCH // 8, BATCH // 8 * row
    sizes = sorted(c.bytes for c in program.collectives if c.kind == "all-to-all")
    assert sizes == [asked, 8 * moved // 8, 8 * moved // 8]
    assert program.total("all-to-all") == asked + 2 * moved
    assert program.largest("all-gather") <= 4 * WIDTH * WIDTH
    assert max(program.largest(kind) for kind in hlo.KINDS) < 4 * WIDTH * ROWS, "nothing has the size of the table"
    assert program.count("all-gather") % LAYERS == 0 and program.count("all-gather") > 0
    assert program.open_loops == () and all(c.known for c in program.collectives)
    assert {program.group_size(c) for c in program.collectives if c.kind == "all-to-all"} == {8}


def test_a_loop_that_stops_on_its_data_counts_once_and_is_named():
    program = hlo.read(compiled_step(jax.devices()[:8], data_dependent=True).as_text())
    assert len(program.open_loops) == 1 and "while" in program.open_loops[0]


@needs_libtpu
def test_the_same_step_compiled_for_a_tpu(program):
    compiling.prepare()
    devices = compiling.devices(chips.topology("v5e:2x4"))
    with compiling.quiet():
        compiled = compiled_step(devices, data_dependent=True)
    tpu = hlo.read(compiled.as_text())
    assert tpu.devices == 8 and len(tpu.open_loops) == 1
    assert tpu.matmul_flops == program.matmul_flops
    assert tpu.total("all-to-all") == program.total("all-to-all")
    assert tpu.count("all-gather") == program.count("all-gather")
    assert tpu.count("reduce-scatter") > 0, "a sum fused with the slice that a device keeps is a reduce-scatter"


@needs_libtpu
def test_a_batched_product_that_a_tpu_writes_as_a_convolution():
    compiling.prepare()
    device = compiling.devices(chips.topology("v5e:2x2"))[0]
    one = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    x = jax.ShapeDtypeStruct((2, 256, 4, 32), jnp.bfloat16, sharding=one)
    with compiling.quiet():
        compiled = jax.jit(lambda q, k: jnp.einsum("blhd,bmhd->bhlm", q, k)).lower(x, x).compile()
    assert " convolution(" in compiled.as_text()
    assert hlo.read(compiled.as_text()).matmul_flops == 2 * 2 * 4 * 256 * 256 * 32


def read_cpu(f, *shapes, **options):
    return hlo.read(jax.jit(f, **options).lower(*shapes).compile().as_text())


def test_traffic_of_whole_arrays_of_a_lookup_and_of_an_update_in_place():
    table = jax.ShapeDtypeStruct((100_000, 64), jnp.float32)
    ids = jax.ShapeDtypeStruct((256,), jnp.int32)
    rows = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    whole, touched = 4 * 100_000 * 64, 4 * 256 * 64
    assert read_cpu(lambda t: 2 * t + 1, table).traffic == 2 * whole
    looked_up = read_cpu(lambda t, i: t.at[i].get(mode="clip"), table, ids).traffic
    assert 2 * touched <= looked_up <= 8 * touched
    start = jax.ShapeDtypeStruct((), jnp.int32)
    written = read_cpu(
        lambda t, r, i: jax.lax.dynamic_update_slice(t, r, (i, 0 * i)), table, rows, start, donate_argnums=0
    )
    assert touched <= written.traffic <= 4 * touched


def test_traffic_counts_every_trip():
    x, w = jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((10, 256, 256), jnp.float32)
    program = read_cpu(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], x, w)
    assert program.matmul_flops == 10 * 2 * 256**3
    assert 10 * 3 * 4 * 256**2 <= program.traffic <= 10 * 8 * 4 * 256**2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[8,64]{1,0}", 2048),
        ("bf16[3,128]{1,0:T(8,128)(2,1)S(1)}", 768),
        ("(f32[2]{0}, /*index=1*/(s32[3]{0}, pred[5]{0}))", 8 + 12 + 5),
        ("f32[]", 4),
        ("s4[8]{0:E(4)}", 4),
        ("f8e4m3fn[16]{0}", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type(text, expected):
    assert size(text) == expected


def test_what_lies_on_the_chip_is_not_in_memory():
    assert size("(f32[8]{0:T(128)S(1)}, f32[4]{0:T(128)})", on_chip=False) == 16


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("replica_groups={}, x", None),
    ],
)
def test_groups_of_devices(attributes, expected):
    groups = replica_groups(attributes, 4)
    assert (groups is None) if expected is None else groups.tolist() == expected


ASYNC = """HloModule m, num_partitions=4
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %s = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %d = f32[8]{0} collective-permute-done(%s)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %d)
}
%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(10)
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}
%wrapped (w: f32[8]) -> f32[32] {
  %w = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%w), replica_groups={{0,1,2,3}}, dimensions={0}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %start = s32[] constant(2)
  %copied = s32[] copy(%start)
  %ags = (f32[8]{0}, f32[32]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}
  %agd = f32[32]{0} all-gather-done(%ags)
  %ars = (f32[32]{0}, f32[32]{0}) all-reduce-start(%agd, %agd), replica_groups=[2,2]<=[4], to_apply=%add
  %ard = (f32[32]{0}, f32[32]{0}) all-reduce-done(%ars)
  %rss = ((f32[32]{0}), f32[8]{0}) reduce-scatter-start(%agd), replica_groups=[1,4]<=[4], to_apply=%add
  %rsd = f32[8]{0} reduce-scatter-done(%rss)
  %as = ((f32[8]{0}), f32[32]{0}, u32[]) async-start(%a), calls=%wrapped
  %ad = f32[32]{0} async-done(%as)
  %tuple = (s32[], f32[8]{0}) tuple(%copied, %rsd)
  %loop = (s32[], f32[8]{0}) while(%tuple), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_asynchronous_collectives_count_once_and_loops_are_counted_from_their_condition():
    program = hlo.read(ASYNC.replace("STEP", "1"))
    assert [program.count(kind) for kind in hlo.KINDS] == [2, 1, 1, 0, 8]
    assert [program.total(kind) for kind in hlo.KINDS] == [2 * 128, 2 * 128, 128, 0, 8 * 32]
    assert program.open_loops == ()
    assert hlo.read(ASYNC.replace("STEP", "3")).count("collective-permute") == 3  # 2, 5, 8
    assert hlo.read(ASYNC.replace("STEP", "0")).open_loops == ("loop",)


def test_a_count_that_cannot_be_read_is_open():
    text = ASYNC.replace("%step = s32[] constant(STEP)", "%step = s32[] partition-id()")
    assert hlo.read(text).open_loops == ("loop",)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read("HloModule nothing\n")
