"""What begins with the encoder and the tables of another run, with a head beside its own encoder or without."""

import jax
import numpy as np
import pytest

from recscale import record
from recscale.checkpoint import Checkpoints
from recscale.mesh import place_batch
from recscale.run import build, init_state
from recscale.step import make_train_step
from tests.tiny_run import make_log, tiny, tiny_dreamrec

SETTINGS = {"loader__length": 8, "model__embed_dim": 8, "model__max_length": 8}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("warm") / "log", users=20)


def ranker(log, model="sasrec", **changes):
    """A ranker: its encoder is the whole model."""
    return tiny(model, log, **SETTINGS, **changes)


def denoiser(log, model="sasrec", **changes):
    """The same encoder beside a denoiser."""
    config = tiny_dreamrec(log).unlock()
    config.model_name, config.model = model, ranker(log, model).model
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config.lock()


@pytest.mark.parametrize(
    ("model", "earlier", "later"),
    [
        ("sasrec", ranker, denoiser),
        ("sasrec", denoiser, ranker),
        pytest.param("hstu", ranker, denoiser, marks=pytest.mark.slow),
    ],
)
def test_an_encoder_moves_between_a_run_with_a_head_and_one_without(model, earlier, later, log, tmp_path):
    before = init_state(build(earlier(log, model)))
    before = jax.tree.map(lambda x: x + 1 if np.issubdtype(x.dtype, np.floating) else x, before)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(7, before, {})
    runs = [build(later(log, model, **how)) for how in ({}, {"train__warm_start": str(tmp_path)})]
    fresh, after = (init_state(run) for run in runs)
    of = {"ranker": lambda state: state["model"], "denoiser": lambda state: state["model"].encoder}
    old, new = of[earlier.__name__](before), of[later.__name__](after)
    for was, found in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(was, found)
    np.testing.assert_array_equal(after["tables"]["item"], before["tables"]["item"])
    assert not np.array_equal(after["tables"]["item"], fresh["tables"]["item"])
    assert int(after["step"]) == 0
    _, found = make_train_step(runs[1])(after, place_batch(runs[1].mesh, runs[1].loader[0]))
    assert np.isfinite(found["loss"])


def test_a_run_that_has_not_finished_is_no_start(log, tmp_path):
    record.write(tmp_path, record.new(ranker(log).to_dict()))
    with pytest.raises(ValueError, match=r"has not finished \(status 'running'\); train it first"):
        init_state(build(denoiser(log, train__warm_start=str(tmp_path))))


def test_another_encoder_is_named(log, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(7, init_state(build(tiny_dreamrec(log))), {})
    with pytest.raises(ValueError, match=r"its encoder lacks .*same model"):
        init_state(build(denoiser(log, train__warm_start=str(tmp_path))))
