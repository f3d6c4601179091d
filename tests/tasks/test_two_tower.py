"""The lag is kept exactly, and the loss is that of all pairs of a request."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import argus
from recscale.tasks.two_tower import Config, Task

QUICK = {"xla_backend_optimization_level": 0}
ITEMS, DIM = 9, 4
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0]], np.int32)
BATCH = {
    "segment_ids": SEGMENTS,
    "positions": np.array([[0, 1, 2, 3, 0, 1, 0]], np.int32),
    "item_id": np.array([[3, 4, 5, 6, 1, 2, 0]], np.int32),
    "query_item_id": np.array([[4, 5, 6, 7, 2, 8, 0]], np.int32),
    "target": np.array([[4, 5, 6, 7, 2, 8, 0]], np.int32),
    "like": np.array([[1, 2, 1, 2, 1, 2, 0]], np.int32),
    "label_ratio": np.array([[0.5, 1.0, 0.0, 0.5, 1.0, 0.0, 0.0]], np.float32),
    "request": np.array([[7, 8, 8, 8, 8, 8, 0]], np.int32),
    "lagged": np.array([[1, 2, 2, 2, 5, 5, 0]], np.int32),
}


def task(**changes) -> Task:
    said = {"label": "ratio", "reach": 3, "similarity": "dot", "temperature": 0.5}
    return Task(Config(**said | changes), ITEMS, ("like",), ())


def network():
    sizes = {"embed_dim": DIM, "width": DIM, "depth": 1, "heads": 1, "max_length": 8, "dropout": 0.0}
    config = argus.Config(**sizes, time_bias=False, query_time="last_event", dtype="float32")
    return task().join(argus.Model(config, jax.random.key(1)), DIM, jax.random.key(2))


def vectors(t: Task, batch=BATCH) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    tables = {name: rng.normal(size=(ITEMS + 1, DIM)).astype(np.float32) for name in ("item", "like")}
    return {name: jnp.asarray(tables[owner][ids]) for name, (owner, ids) in t.wanted(batch).items()}


def test_a_score_sees_events_up_to_its_lag_and_its_own_candidate():
    t, model = task(), network()
    run = jax.jit(jax.grad(lambda rows, slot: t._scores(model, rows, BATCH, None)[0, slot]), compiler_options=QUICK)
    for slot, lagged in ((0, 0), (2, 1), (3, 1), (5, 4)):
        gradient = run(vectors(t), slot)
        reached = {name: set(np.flatnonzero(np.abs(g[0]).sum(-1))) for name, g in gradient.items()}
        begin = 0 if slot < 4 else 4
        assert reached["history"] == reached["like"] == set(range(begin, lagged + 1))
        assert reached["candidate"] == {slot}


def test_without_an_old_enough_event_the_user_is_nobody():
    batch = BATCH | {"lagged": np.zeros_like(BATCH["lagged"])}
    t, model = task(), network()
    gradient = jax.grad(lambda rows: t._scores(model, rows, batch, None).sum())(vectors(t))
    assert not np.abs(gradient["history"]).sum()
    assert float(t.loss(model, vectors(t), batch, None)[1]["targets"]) == 0.0


@pytest.mark.parametrize("reach", [1, 2, 6])
def test_the_loss_is_the_mean_over_the_pairs_of_a_request(reach):
    t, model = task(reach=reach), network()
    score = np.asarray(t._scores(model, vectors(t), BATCH, None))[0]
    label, losses = BATCH["label_ratio"][0], []
    for i, j in itertools.combinations(range(6), 2):
        together = SEGMENTS[0, i] == SEGMENTS[0, j] and BATCH["request"][0, i] == BATCH["request"][0, j]
        if together and j - i <= reach and label[i] != label[j]:
            best, worst = (i, j) if label[i] > label[j] else (j, i)
            losses.append(np.log1p(np.exp(score[worst] - score[best])))
    loss, metrics = t.loss(model, vectors(t), BATCH, None)
    assert int(metrics["targets"]) == len(losses) > 0
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_wrong_configs_are_refused():
    for changes in ({"label": ""}, {"reach": 0}, {"temperature": 0.0}, {"similarity": "cos"}):
        with pytest.raises(ValueError, match=r"task\."):
            task(**changes)
