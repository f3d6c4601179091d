"""One loss on every mesh; what is sharded and what is not."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from recscale.mesh import ROWS_OF_TABLE, make_mesh, place_batch, table_sharding
from recscale.run import build, init_state, make_train_step
from tests.tiny_run import FULL, SAMPLED, make_log, tiny

MESHES = ((8, 1), (2, 4), (4, 2))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("planted") / "log")


def three_steps(config) -> tuple[np.ndarray, dict]:
    run = build(config)
    state, train_step = init_state(run), make_train_step(run)
    losses = []
    for i in range(3):
        state, metrics = train_step(state, place_batch(run.mesh, run.loader[i]))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


SLOW = pytest.mark.slow
CASES = [
    pytest.param("hstu", SAMPLED | {"table__optimizer": "rowwise_adagrad"}, id="hstu-sampled"),
    pytest.param("sasrec", FULL, id="sasrec-full"),
    pytest.param("hstu", FULL, id="hstu-full", marks=SLOW),
    pytest.param("sasrec", SAMPLED, id="sasrec-sampled", marks=SLOW),
]


@pytest.mark.parametrize(("model", "changes"), CASES)
def test_the_loss_is_the_same_on_every_mesh(model, changes, log):
    """Dropout and negatives included: what is drawn does not depend on the mesh."""
    config = tiny(model, log, optim__warmup=0, **changes)
    expected, plain = three_steps(config)
    assert len(set(expected)) == 3
    for data, tables in MESHES:
        config = tiny(model, log, optim__warmup=0, mesh__data=data, mesh__model=tables, **changes)
        losses, state = three_steps(config)
        np.testing.assert_allclose(losses, expected, rtol=2e-5, err_msg=f"{data}x{tables}")
        item = state["tables"]["item"]
        np.testing.assert_allclose(item, plain["tables"]["item"], atol=2e-4, err_msg=f"{data}x{tables}")
        assert item.sharding.spec == ROWS_OF_TABLE and {s.data.shape for s in item.addressable_shards} == {(8, 8)}
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state["model"]))


def test_tables_are_sharded_where_their_rows_divide_the_mesh(log):
    """64 rows over eight devices; 51 rows on each of them; optimizer slots follow their table."""
    run = build(tiny("hstu", log, mesh__data=2, mesh__model=4, loader__queries=("surface",), **FULL))
    state = init_state(run)
    moments = state["table_state"]["item"]
    assert {s.data.shape for s in state["tables"]["item"].addressable_shards} == {(8, 8)}
    assert {s.data.shape for s in moments.mu.addressable_shards} == {(8, 8)}
    assert state["tables"]["surface"].sharding.is_fully_replicated
    hashed = init_state(build(tiny("hstu", log, mesh__data=2, mesh__model=4, table__rows=50, **FULL)))
    assert hashed["tables"]["item"].shape[0] == 51 and hashed["tables"]["item"].sharding.is_fully_replicated


def test_layouts_and_sizes():
    mesh = make_mesh(2, 4)
    assert mesh.shape == {"data": 2, "model": 4}
    assert table_sharding(mesh, 16).spec == ROWS_OF_TABLE
    assert table_sharding(mesh, 17).spec == PartitionSpec()
    batch = place_batch(mesh, {"item_id": np.arange(12).reshape(4, 3)})
    assert {s.data.shape for s in batch["item_id"].addressable_shards} == {(2, 3)}
    for data, tables in ((0, 1), (1, 0), (9, 1), (4, 4)):
        with pytest.raises(ValueError, match=r"8 are here: change mesh.data or mesh.model"):
            make_mesh(data, tables)
