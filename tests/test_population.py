"""What a population computes: the steps of its members as they would be alone; who can be a member."""

from pathlib import Path

import jax
import numpy as np
import pytest

from recscale.population import HYPER, Population, check, groups
from recscale.run import build
from tests import steps
from tests.tiny_run import FULL, SAMPLED, make_log, tiny

SLOW = pytest.mark.slow
NUMBERS = (
    {"seed": 1, "optim__warmup": 1, "optim__weight_decay": 0.0, "table__weight_decay": 0.3, "task__temperature": 0.5},
    {"seed": 2, "optim__schedule": "constant", "optim__weight_decay": 0.3, "optim__b1": 0.8, "optim__b2": 0.99},
    {"seed": 3, "table__warmup": 0, "table__weight_decay": 0.0, "table__learning_rate": 0.1, "task__temperature": 2.0},
)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return make_log(tmp_path_factory.mktemp("planted") / "log")


@pytest.mark.parametrize(
    ("optimizer", "loss"),
    [
        ("adam", SAMPLED),
        pytest.param("lazy_adam", FULL, marks=SLOW),
        pytest.param("rowwise_adagrad", SAMPLED, marks=SLOW),
    ],
)
def test_every_number_that_may_differ_enters_the_step(optimizer, loss, log):
    """Six steps of three settings on two devices, the last place filled up; losses, and the tables after them."""
    configs = [tiny("sasrec", log, table__optimizer=optimizer, **(loss | member)) for member in NUMBERS]
    runs = [build(config) for config in configs]
    population = Population(runs, jax.devices()[:2])
    assert population.places == [0, 1, 2, 2] and set(population.values) < set(HYPER)
    state, found = population.init(), []
    for step in range(6):
        state, metrics = population.step(state, [run.loader[step] for run in runs], [step] * 3)
        found.append(np.asarray(metrics["loss"])[:3])
    host = population.to_host(state)
    for i, config in enumerate(configs):
        alone, member = steps.train(config, steps=6), population.member(host, i)
        np.testing.assert_allclose(np.array(found)[:, i], alone.losses, rtol=1e-5)
        assert jax.tree.structure(member) == jax.tree.structure(alone.state)
        np.testing.assert_allclose(member["tables"]["item"], alone.state["tables"]["item"], atol=1e-5)
    assert len({tuple(losses) for losses in np.array(found).T}) == 3


def test_members_may_be_at_different_steps(log):
    """One goes ahead alone; put beside a fresh one, both go on as they would by themselves, to the bit."""
    runs = [build(tiny("hstu", log, seed=seed, **SAMPLED)) for seed in (0, 1)]
    population = Population(runs, jax.devices()[:1])
    state, expected, host = population.init(), [], {}
    for step in range(5):
        state, metrics = population.step(state, [run.loader[step] for run in runs], [step] * 2)
        expected.append(np.asarray(metrics["loss"]))
        host = population.to_host(state) if step == 2 else host
    state, found = population.put_members(population.init(), {0: population.member(host, 0)}), []
    for step in range(2):
        batches = [runs[0].loader[3 + step], runs[1].loader[step]]
        state, metrics = population.step(state, batches, [3 + step, step])
        found.append(np.asarray(metrics["loss"]))
    assert [x[0] for x in found] == [x[0] for x in expected[3:]]
    assert [x[1] for x in found] == [x[1] for x in expected[:2]]


def test_places_share_the_members_evenly(log):
    runs = [build(tiny("hstu", log, seed=seed, **FULL)) for seed in range(3)]
    for devices, used, places in ((1, 1, [0, 1, 2]), (2, 2, [0, 1, 2, 2]), (8, 3, [0, 1, 2])):
        population = Population(runs, jax.devices()[:devices])
        assert (population.mesh.size, population.places) == (used, places)


def test_groups_are_the_cells_that_share_a_program(log):
    configs = {
        "a-s0": tiny("hstu", log),
        "wide": tiny("hstu", log, model__width=16, model__qk_dim=8, model__v_dim=8),
        "a-s1": tiny("hstu", log, seed=1),
        "fast": tiny("hstu", log, optim__learning_rate=1.0, task__temperature=0.1),
        "unclipped": tiny("hstu", log, optim__clip=0.0),
        "parts": tiny("hstu", log, mesh__data=2, mesh__accumulate=2),
        "parts-s1": tiny("hstu", log, mesh__data=2, mesh__accumulate=2, seed=1),
        "wide-s1": tiny("hstu", log, model__width=16, model__qk_dim=8, model__v_dim=8, seed=1),
    }
    found = groups(configs)
    assert found == [["a-s0", "a-s1", "fast"], ["wide", "wide-s1"], ["unclipped"], ["parts"], ["parts-s1"]]
    for names in found[:3]:
        check({name: configs[name] for name in names})
    with pytest.raises(ValueError, match=r"a-s0 and unclipped .* optim\.clip \(1\.0, 0\.0\).*seed") as error:
        check({name: configs[name] for name in ("a-s0", "a-s1", "unclipped")})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"model\.qk_dim \(4, 8\), model\.v_dim \(4, 8\), model\.width \(8, 16\)"):
        check({name: configs[name] for name in ("a-s0", "wide")})
    with pytest.raises(ValueError, match=r"parts: mesh\.accumulate = 2"):
        check({"parts": configs["parts"]})
