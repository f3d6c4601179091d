"""Checkpoints: what comes back is what was saved, on any mesh, whatever a killed write left behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from recscale.checkpoint import Checkpoints
from recscale.mesh import REPLICATED, ROWS_OF_TABLE, make_mesh


def state_on(data: int, model: int, scale: float = 1.0, rows: int = 16) -> dict:
    """A state with a sharded table, a model of two arrays and a step counter."""
    mesh = make_mesh(data, model)
    draw = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32) * np.float32(scale)
    whole = NamedSharding(mesh, REPLICATED)
    return {
        "step": jax.device_put(np.int32(7 * scale), whole),
        "tables": {"item": jax.device_put(draw, NamedSharding(mesh, ROWS_OF_TABLE))},
        "model": [jax.device_put(draw[0], whole), jax.device_put(np.float32([1e-40, np.nan, -0.0]), whole)],
    }


def assert_same_bits(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("mesh", [(2, 4), (1, 1), (8, 1)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(mesh, tmp_path):
    saved = state_on(2, 4)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, saved, {"next_index": 7})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 7
        like = state_on(*mesh, scale=0.0)
        found, data = checkpoints.restore(7, like)
    assert data == {"next_index": 7}
    assert_same_bits(found, saved)
    assert found["tables"]["item"].sharding == like["tables"]["item"].sharding


def test_a_save_outlives_the_donation_of_its_buffers(tmp_path):
    """The next step overwrites the arrays while they are still being written."""
    state = state_on(1, 1)
    expected = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 9, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {"next_index": 1})
        for _ in range(3):
            state = step(state)
        checkpoints.save(2, state, {"next_index": 2})
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(1, state)[0], expected)


def test_only_the_newest_are_kept_and_none_is_written_twice(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_on(1, 1, float(step)), {"next_index": step})
        checkpoints.save(3, state_on(1, 1, 50.0), {"next_index": 50})
        checkpoints.save(2, state_on(1, 1, 50.0), {"next_index": 50})  # an older step cannot come back either
        checkpoints.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
        found, data = checkpoints.restore(3, state_on(1, 1))
    assert int(found["step"]) == 21 and data == {"next_index": 3}


def test_what_a_killed_write_left_is_ignored_and_removed(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_on(1, 1), {"next_index": 1})
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.restore(1, state_on(1, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"tables": {"item": jnp.zeros((8, 4))}},
        lambda s: s | {"tables": {"item": s["tables"]["item"], "other": jnp.zeros(2)}},
        lambda s: {k: v for k, v in s.items() if k != "tables"},
    ],
    ids=["shape", "missing", "extra"],
)
def test_a_checkpoint_of_another_config_is_refused(change, tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_on(1, 1), {"next_index": 1})
        with pytest.raises(ValueError, match=r"does not fit this config; it differs in \['tables\."):
            checkpoints.restore(1, change(state_on(1, 1)))
