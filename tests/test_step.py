"""The train step: parts of a batch one after the other, and what the backward pass keeps, change no number."""

import numpy as np
import pytest

from recscale.program import program
from recscale.step import make_train_step
from tests.steps import NO_WARMUP, on, train
from tests.tiny_run import FULL, ITEMS, SAMPLED, make_log, tiny

SLOW = pytest.mark.slow
SHARED = SAMPLED | {"task__shared": "batch"}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("planted") / "log")


@pytest.mark.parametrize("shape", [(1, 2, 1), pytest.param((2, 2, 2), marks=SLOW)])
@pytest.mark.parametrize(
    "changes",
    [SAMPLED, pytest.param(SHARED, marks=SLOW), pytest.param(FULL, marks=SLOW)],
    ids=["sampled-row", "sampled-batch", "full"],
)
def test_accumulating_gradients_changes_nothing(changes, shape, log):
    """Four parts, weighted by their targets, are the whole batch; without dropout, which is drawn per part."""
    size = {"loader__batch_size": 32, "model__dropout": 0.0, "table__optimizer": "rowwise_adagrad"}
    whole = train(tiny("hstu", log, **NO_WARMUP, **size, **changes, **on(shape)))
    parts = train(tiny("hstu", log, **NO_WARMUP, **size, **changes, **on(shape), mesh__accumulate=4), whole.start)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=2e-5)
    for name, array in whole.state["tables"].items():
        np.testing.assert_allclose(parts.state["tables"][name], array, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("model", ["hstu", pytest.param("sasrec", marks=SLOW)])
def test_what_the_backward_pass_keeps_changes_nothing(model, log):
    """mesh.remat: recomputed or kept, with dropout."""
    kept = train(tiny(model, log, **NO_WARMUP, **SAMPLED, mesh__remat="none"))
    for remat in ("dots", "layer"):
        found = train(tiny(model, log, **NO_WARMUP, **SAMPLED, mesh__remat=remat), kept.start)
        np.testing.assert_allclose(found.losses, kept.losses, rtol=2e-5, err_msg=remat)


def test_an_unknown_word_for_remat_is_refused(log):
    with pytest.raises(ValueError, match=r"mesh\.remat = 'all': expected one of \('layer', 'dots', 'none'\)"):
        make_train_step(program(tiny("hstu", log, mesh__remat="all", **FULL), ITEMS, {}, 10))
