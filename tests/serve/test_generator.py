"""Generated recommendations: those of evaluation, without what was seen; clear answers to what cannot be answered."""

import numpy as np
import pytest

from recscale.data.windows import prefixes
from recscale.evaluate_generated import evaluate_generated
from recscale.run import build, init_state
from recscale.serve.generator import Generator
from recscale.serve.history import BadRequest
from recscale.serve.recommender import Recommender
from tests.tiny_run import ITEMS, make_codes, make_log, tiny, tiny_tiger


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    log = make_log(folder / "log", users=30)
    return log, make_codes(log, folder / "codes")


@pytest.fixture(scope="module")
def generator(world):
    run = build(tiny_tiger(*world, model__init="t5"))  # far from uniform before it is trained
    return Generator(run, init_state(run), width=64)


def test_the_place_of_a_target_is_that_of_evaluation(generator):
    run = generator.run
    view = prefixes(run.views["test"])
    state = dict(zip(("model", "tables", "mixers"), generator.arrays, strict=True))
    _, found = evaluate_generated(run, state, view)
    items = run.log.events["item_id"]
    histories = [items[run.log.offsets[u] : row].tolist() for u, row in zip(view.user, view.target_start, strict=True)]
    ids, scores = generator.recommend(histories, ITEMS, users=view.user, seen=True)
    assert (np.sort(ids) == np.arange(1, ITEMS + 1)).all() and (np.diff(scores) <= 0).all()
    targets = items[view.target_start]
    place = 1 + (ids == targets[:, None]).argmax(axis=1)
    assert ((found["rank"] <= place) & (place < found["rank"] + found["bucket"])).all()
    np.testing.assert_allclose(scores[np.arange(len(ids)), place - 1], -found["tuple_nats"], rtol=1e-5)

    ids, scores = generator.recommend(histories[3], 5, users=int(view.user[3]))
    assert ids.shape == (5,) and not set(ids) & set(histories[3]) and np.isfinite(scores).all()
    everything = list(range(1, ITEMS + 1))  # but item 7, so that one is left
    ids, scores = generator.recommend([i for i in everything if i != 7], 3, users=0)
    assert ids.tolist() == [7, 0, 0] and np.isneginf(scores[1:]).all()


def test_draws_follow_the_model(generator):
    best, score = generator.recommend([3, 4], 63, users=2, seen=True)
    ids, scores = generator.sample([[3, 4]], 4000, users=[2], seed=1)
    of = dict(zip(best.tolist(), score.tolist(), strict=True))
    np.testing.assert_allclose(scores[0], [of[i] for i in ids[0].tolist()], rtol=1e-4)
    again, _ = generator.sample([[3, 4]], 4000, users=[2], seed=1)
    np.testing.assert_array_equal(ids, again)
    cold, _ = generator.sample([[3, 4]], 4000, users=[2], temperature=0.05)
    assert len(set(cold[0].tolist())) < len(set(ids[0].tolist()))
    drawn = dict(zip(*np.unique(ids[0], return_counts=True), strict=True))
    for value in set(score.tolist()):  # every item of a tuple has its chance
        items = [i for i in best.tolist() if of[i] == value]
        counts = [drawn.get(i, 0) for i in items]
        assert sum(counts) < 100 or min(counts) > 0.5 * sum(counts) / len(items)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda g: g.recommend([], 3, users=1), "history: empty"),
        (lambda g: g.recommend([1, 99], 3, users=1), "item 99"),
        (lambda g: g.recommend([1.5], 3, users=1), "expected integer item ids"),
        (lambda g: g.recommend([1], 0, users=1), "k = 0: expected 1..63"),
        (lambda g: g.recommend([1], 3), "users: missing; this model reads"),
        (lambda g: g.recommend([[1], [2]], 3, users=[1]), "expected one integer per history"),
        (lambda g: g.sample([1], 3, temperature=0.0, users=1), "temperature = 0.0"),
    ],
)
def test_what_cannot_be_answered_is_said(generator, ask, message):
    with pytest.raises(BadRequest, match=message):
        ask(generator)


def test_each_kind_of_run_names_the_other(generator, world):
    with pytest.raises(BadRequest, match=r"use recscale\.serve\.generator\.Generator"):
        Recommender(generator.run, {})
    run = build(tiny("sasrec", world[0]))
    with pytest.raises(BadRequest, match=r"use recscale.serve.recommender.Recommender"):
        Generator(run, {})
