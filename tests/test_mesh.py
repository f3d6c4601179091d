"""One loss on every mesh; what lies where, and that every device does its share of the work and no more."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from recscale import mesh as layouts
from recscale.mesh import AXES, REPLICATED, dense_spec, make_mesh, place_batch
from recscale.program import abstract_batch, abstract_state
from recscale.run import build, init_state
from recscale.step import make_train_step
from tests.steps import NO_WARMUP, QUICK, on, train
from tests.tiny_run import FULL, SAMPLED, make_log, tiny, tiny_dreamrec

MESHES = ((1, 8, 1), (1, 2, 4), (1, 4, 2), (2, 2, 2))
IN_BATCH = {"task__loss": "sampled", "task__negatives": 7, "task__sampler": "in_batch", "task__logq": "corrected"}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("planted") / "log")


def assert_same(config_of, shapes) -> None:
    """Three losses on each of the meshes, and the tables after them, equal those of one device."""
    plain = train(config_of((1, 1, 1)))
    assert len(set(plain.losses)) == 3
    for shape in shapes:
        found = train(config_of(shape), plain.start)
        np.testing.assert_allclose(found.losses, plain.losses, rtol=2e-5, err_msg=str(shape))
        for name, array in found.state["tables"].items():
            np.testing.assert_allclose(array, plain.state["tables"][name], atol=3e-4, err_msg=f"{shape} {name}")


CASES = {
    "hstu-sampled": ("hstu", SAMPLED | {"table__optimizer": "rowwise_adagrad"}),
    "sasrec-full": ("sasrec", FULL),
    "hstu-full": ("hstu", FULL),
    "sasrec-sampled": ("sasrec", SAMPLED),
    "hstu-in-batch-shared": ("hstu", IN_BATCH | {"task__shared": "batch"}),
    "hstu-in-batch-row": ("hstu", IN_BATCH | {"task__shared": "row"}),
    "sasrec-in-batch-shared": ("sasrec", IN_BATCH | {"task__shared": "batch"}),
    "sasrec-in-batch-row": ("sasrec", IN_BATCH | {"task__shared": "row"}),
}
KINDS = {
    "hashed": {"rows": 20, "parts": 2},
    "low_rank": {"inner": 4},
    "pq": {"parts": 4},
    "multi": {"parts": 2, "inner": 4},
    "capped": {"rows": 20},
    "quotient_remainder": {"rows": 8},
    "ngram": {"rows": 32, "parts": 3},
}


@pytest.mark.parametrize("shapes", [((2, 2, 2),), pytest.param(MESHES, marks=SLOW)], ids=["2x2x2", "all"])
@pytest.mark.parametrize("case", ["hstu-sampled", "sasrec-full"])
def test_the_loss_is_the_same_on_every_mesh(case, shapes, log):
    """Dropout and negatives included: what is drawn does not depend on the mesh."""
    model, changes = CASES[case]
    assert_same(lambda shape: tiny(model, log, **NO_WARMUP, **on(shape), **changes), shapes)


@SLOW
@pytest.mark.parametrize("case", list(CASES)[2:])
def test_every_loss_is_the_same_on_every_mesh(case, log):
    model, changes = CASES[case]
    assert_same(lambda shape: tiny(model, log, **NO_WARMUP, **on(shape), **changes), MESHES)


@SLOW
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("denoiser", ["dit", "mlp1"])
def test_a_denoiser_trains_the_same_on_every_mesh(denoiser, large, log, monkeypatch):
    """Times, noise and dropped conditions included; large: with matrices spread over "model"."""
    changes = {"task__denoiser": denoiser, "task__ranking": 0.5, "task__width": 16, "task__ffn": 16, "task__depth": 2}

    def config_of(shape):
        if large:
            monkeypatch.setattr(layouts, "LARGE", 220 if np.prod(shape) > 1 else 1 << 30)
        return tiny_dreamrec(log, **changes, **on(shape))

    assert_same(config_of, ((1, 2, 4) if large else (2, 2, 2),))


@pytest.mark.parametrize("loss", [SAMPLED, pytest.param(FULL, marks=SLOW)], ids=["sampled", "full"])
@pytest.mark.parametrize("kind", [k if k == "hashed" else pytest.param(k, marks=SLOW) for k in KINDS])
def test_every_kind_of_table_trains_the_same_on_every_mesh(kind, loss, log):
    table = {"table__kind": kind} | {f"table__{key}": value for key, value in KINDS[kind].items()}
    assert_same(lambda shape: tiny("sasrec", log, **NO_WARMUP, **on(shape), **table, **loss), ((2, 2, 2),))


@pytest.mark.parametrize("shape", [(1, 2, 4), pytest.param((2, 2, 2), marks=SLOW)])
def test_tables_are_shared_by_rows_among_all_devices(shape, log):
    """Arrays, optimizer slots, frequency and codes: an eighth of the rows on each device; and they start the same."""
    changes = {"table__kind": "capped", "table__rows": 20, "table__optimizer": "rowwise_adagrad"} | SAMPLED
    run = build(tiny("hstu", log, **changes, **on(shape), loader__queries=("surface",)))
    state = init_state(run)
    assert set(state["tables"]) == {"item", "item.codes", "item_frequency", "surface"}
    for leaf in jax.tree.leaves((state["tables"], state["table_state"])):
        assert leaf.sharding.spec == PartitionSpec(AXES)
        assert {s.data.shape for s in leaf.addressable_shards} == {(leaf.shape[0] // 8, *leaf.shape[1:])}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state["model"]))  # tiny: not spread
    plain = init_state(build(tiny("hstu", log, **changes, loader__queries=("surface",))))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


# Large dense parameters over "model"


def collected(compiled, operation: str) -> list[tuple[int, ...]]:
    """Shapes of the float32 results of a collective in a compiled step."""
    lines = [line for line in compiled.as_text().splitlines() if re.search(rf" {operation}(-start)?\(", line)]
    shapes = [found for line in lines for found in re.findall(r"f32\[([\d,]*)\]", line.split(f" {operation}")[0])]
    return [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


@pytest.mark.parametrize("shape", [(1, 2, 4), pytest.param((2, 2, 2), marks=SLOW)])
@pytest.mark.parametrize("model", ["sasrec", pytest.param("hstu", marks=SLOW)])
def test_large_matrices_are_spread_over_model_and_train_the_same(model, shape, log, monkeypatch):
    """Parameters and both Adam moments hold their share; a step gathers them layer by layer, never the whole stack."""
    size = {"model__width": 16, "model__embed_dim": 16, "model__depth": 4, "table__optimizer": "sgd"}
    plain = train(tiny(model, log, **NO_WARMUP, **size, **SAMPLED))
    monkeypatch.setattr(layouts, "LARGE", 220)
    found = train(tiny(model, log, **NO_WARMUP, **size, **SAMPLED, **on(shape)), plain.start)
    np.testing.assert_allclose(found.losses, plain.losses, rtol=2e-5)

    parameters = jax.tree.leaves(found.state["model"])
    moments = [leaf for leaf in jax.tree.leaves(found.state["optimizer"]) if leaf.ndim]
    assert len(moments) == 2 * len(parameters)
    leaves = (*parameters, *moments)
    large = [leaf for leaf in leaves if leaf.ndim == 3 and leaf.shape[-1] * leaf.shape[-2] >= 220]
    assert len(large) == 3 * {"sasrec": 4, "hstu": 1}[model]
    for leaf in large:
        assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // shape[2]}, leaf.shape
    assert all(leaf.sharding.is_fully_replicated for leaf in leaves if leaf.ndim < 3)  # a stack of vectors too

    stacked = [leaf for leaf in parameters if leaf.ndim == 3 and leaf.shape[-1] * leaf.shape[-2] >= 220]
    layer, stack = max(x.size // 4 for x in stacked), min(x.size for x in stacked)
    gathered = [int(np.prod(s)) for s in collected(found.compiled, "all-gather")]
    assert layer in gathered and max(gathered) == layer < stack
    reduced = [int(np.prod(s)) for name in ("all-reduce", "reduce-scatter") for s in collected(found.compiled, name)]
    assert max(reduced) <= layer and any(x in reduced for x in (layer, layer // shape[2]))


def test_what_is_large_is_spread_by_its_longer_axis():
    mesh = make_mesh(1, 2, 4)
    assert dense_spec(mesh, (3, 1024, 256)) == PartitionSpec(None, "model", None)
    assert dense_spec(mesh, (256, 1024)) == PartitionSpec(None, "model")
    assert dense_spec(mesh, (1025, 256)) == PartitionSpec(None, "model")  # 4 does not divide the longer axis
    assert dense_spec(mesh, (1025, 255)) == dense_spec(mesh, (255, 256)) == dense_spec(mesh, (1 << 20,)) == REPLICATED
    assert dense_spec(make_mesh(2, 4, 1), (1024, 1024)) == REPLICATED


# A device's share of the work


@pytest.mark.parametrize("loss", [SAMPLED, pytest.param(FULL, marks=SLOW)], ids=["sampled", "full"])
@pytest.mark.parametrize("shapes", [((1, 8, 1),), pytest.param(((1, 2, 1), (2, 2, 1), (1, 2, 4)), marks=SLOW)])
def test_the_work_of_a_device_falls_with_the_devices(shapes, loss, log, monkeypatch):
    """FLOPs of the compiled step of one device are 1/n, spread matrices included: no device repeats another's work."""
    monkeypatch.setattr(layouts, "LARGE", 2000)
    size = {"model__width": 64, "model__ffn": 128, "loader__batch_size": 32}

    def flops(shape) -> float:
        run = build(tiny("sasrec", log, **size, **on(shape), **loss))
        lowered = make_train_step(run).lower(abstract_state(run), abstract_batch(run))
        return lowered.compile(compiler_options=QUICK).cost_analysis()["flops"]

    alone = flops((1, 1, 1))
    for shape in shapes:
        assert flops(shape) * np.prod(shape) == pytest.approx(alone, rel=0.2), shape


def test_a_batch_is_shared_by_all_devices():
    mesh = make_mesh(2, 2, 2)
    assert mesh.shape == {"replica": 2, "data": 2, "model": 2}
    batch = place_batch(mesh, {"item_id": np.arange(48).reshape(16, 3)})
    assert {s.data.shape for s in batch["item_id"].addressable_shards} == {(2, 3)}


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 9, 1), (2, 4, 2)])
def test_a_mesh_that_the_machine_cannot_have(shape):
    name = "x".join(map(str, shape))
    message = rf"mesh {name} .* 8 are here: change mesh.replica, mesh.data or mesh.model"
    with pytest.raises(ValueError, match=message):
        make_mesh(*shape)
