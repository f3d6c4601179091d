"""The exact floors of planted data: the filter against brute force, against its own calibration, against entropies."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from recscale.data import planted, planted_floors
from recscale.data.planted import Planted
from recscale.data.splits import View
from tests.data.test_planted import SMALL, TINY


def view_of(log, last, users=None):
    """The last `last` events of every user as targets, all events before them as history."""
    user = np.arange(log.num_users if users is None else users)
    start, stop = log.offsets[user], log.offsets[user + 1]
    return View("test", user.astype(np.int32), start, np.maximum(stop - last, start + 1), stop)


def brute_force(config, log, seen_from, target, start, context):
    """p(item at `target` | items seen_from..target - 1, contexts seen_from + 1..target), every hidden path summed.

    Paths begin at the user's first event, whatever is seen: nothing is assumed about where a filter may restart.
    """
    true = planted.world(config)
    G, K = true.type_GK.shape
    item, surface = log.events["item_id"], log.events[planted.CONTEXT]
    period = planted.period_of(config, log.events["timestamp"])
    joint = seen = 0.0
    for g, path in itertools.product(range(G), itertools.product(range(K), repeat=target - start + 1)):
        p = true.type_GK[g, path[0]] / G
        for z, z_next in itertools.pairwise(path):
            p *= config.stay * (z == z_next) + (1 - config.stay) * true.type_GK[g, z_next]
        for event in range(seen_from, target):
            p *= true.emission_PKV[period[event], path[event - start], item[event] - 1]
        for event in range(seen_from + 1, target + 1) if context and seen_from < target else ():
            shown = surface[event] - 1 == path[event - start] % config.context_groups
            p *= config.context_reliability * shown + (1 - config.context_reliability) / config.context_groups
        seen += p
        joint += p * true.emission_PKV[period[target], path[-1], item[target] - 1]
    return joint / seen


@pytest.mark.parametrize("history", [0, 1, 2, 3, None])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("born", [False, True])
def test_the_filter_equals_brute_force_over_all_hidden_paths(history, context, born):
    config = dataclasses.replace(TINY, born=born)
    log = planted.generate(config)
    view = view_of(log, last=3)
    expected = [
        -math.log(brute_force(config, log, start if history is None else max(start, e - history), e, start, context))
        for start, first_target, stop in zip(view.start, view.target_start, view.stop, strict=True)
        for e in range(first_target, stop)
    ]
    got = planted_floors.next_item_nats(config, log, view, history, context)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("history", [0, 2, None])
@pytest.mark.parametrize("born", [False, True])
def test_the_law_is_a_distribution_whose_share_of_the_target_is_the_floor(history, born):
    config = dataclasses.replace(TINY, born=born)
    log = planted.generate(config)
    view = view_of(log, last=3)
    law_TV = planted_floors.next_item_law(config, log, view, history)
    np.testing.assert_allclose(law_TV.sum(1), 1, rtol=0, atol=1e-12)
    targets = zip(view.target_start, view.stop, strict=True)
    item_T = np.concatenate([log.events["item_id"][first:stop] for first, stop in targets])
    nats = planted_floors.next_item_nats(config, log, view, history)
    np.testing.assert_allclose(-np.log(law_TV[np.arange(len(item_T)), item_T - 1]), nats, rtol=0, atol=1e-12)


@pytest.mark.parametrize("history", [1, 2, 3])
def test_a_segment_shares_its_last_inputs_among_its_targets(history):
    log = planted.generate(TINY)
    view = view_of(log, last=2)
    expected = []
    for start, first_target, stop in zip(view.start, view.target_start, view.stop, strict=True):
        seen_from = max(start, stop - 1 - history)
        for e in range(max(first_target, seen_from + 1), stop):
            expected.append(-math.log(brute_force(TINY, log, seen_from, e, start, True)))
    got = planted_floors.next_item_nats(TINY, log, view, history, context=True, segment=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    row = planted_floors.floors(TINY, log, view, (history,), segment=True)[1]
    assert row["n"] == len(expected)
    assert row["mean"] == pytest.approx(np.mean(expected))


def test_examples_may_come_in_any_order_and_length():
    log = planted.generate(SMALL)
    view = view_of(log, last=1000, users=400)  # longer and shorter runs, several chunks
    shuffle = np.random.default_rng(0).permutation(len(view))
    shuffled = dataclasses.replace(
        view, **{name: getattr(view, name)[shuffle] for name in ("user", "start", "target_start", "stop")}
    )
    for history in (2, None):
        nats = planted_floors.next_item_nats(SMALL, log, view, history)
        pieces = np.split(nats, np.cumsum(view.stop - view.target_start)[:-1])
        expected = np.concatenate([pieces[i] for i in shuffle])
        got = planted_floors.next_item_nats(SMALL, log, shuffled, history)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_a_missing_context_says_nothing():
    log = planted.generate(TINY)
    blank = dataclasses.replace(log, events={**log.events, planted.CONTEXT: np.zeros(log.num_events, np.int32)})
    view = view_of(log, last=3)
    np.testing.assert_allclose(
        planted_floors.next_item_nats(TINY, blank, view, 2, context=True),
        planted_floors.next_item_nats(TINY, log, view, 2, context=False),
        atol=1e-12,
    )


@pytest.mark.parametrize("born", [False, True])
def test_the_predictive_distribution_is_calibrated(born):
    """It sums to one, -log p(seen item) has the distribution's own entropy as mean, and every item comes as often."""
    config = dataclasses.replace(SMALL, born=born)
    log = planted.generate(config)
    view = view_of(log, last=1)
    target = view.stop - 1
    p_NV = np.zeros((len(view), config.items))
    for v in range(config.items):
        exists = log.events["timestamp"][target] >= log.items["born"][v + 1]
        item_id = log.events["item_id"].copy()
        item_id[target[exists]] = v + 1
        swapped = dataclasses.replace(log, events={**log.events, "item_id": item_id})
        p_NV[exists, v] = np.exp(-planted_floors.next_item_nats(config, swapped, view, context=True))[exists]
    assert born == (p_NV == 0).any()
    np.testing.assert_allclose(p_NV.sum(1), 1, atol=1e-12)

    nats = planted_floors.next_item_nats(config, log, view, context=True)
    entropy = -(p_NV * np.log(np.where(p_NV > 0, p_NV, 1))).sum(1)
    assert abs(z_score(nats - entropy)) < 4
    came_NV = log.events["item_id"][target][:, None] == np.arange(1, config.items + 1)
    probable_NV = p_NV > 0.3
    assert probable_NV.sum() > 300
    assert abs(z_score((came_NV - p_NV)[probable_NV])) < 4
    for v in range(config.items):
        assert abs(z_score(came_NV[:, v] - p_NV[:, v])) < 4


def z_score(x):
    return x.mean() / (x.std(ddof=1) / math.sqrt(len(x)))


@pytest.mark.parametrize("wrong", [{"stay": 0.3}, {"noise": 0.5}, {"context_reliability": 0.3}, {"seed": 4}])
def test_a_filter_with_wrong_parameters_loses(wrong):
    log = planted.generate(SMALL)
    view = view_of(log, last=8)
    right = planted_floors.next_item_nats(SMALL, log, view, context=True)
    assert (
        z_score(planted_floors.next_item_nats(dataclasses.replace(SMALL, **wrong), log, view, context=True) - right) > 4
    )


def test_floors_fall_with_history_and_with_context():
    config = Planted(users=1500)
    log = planted.generate(config)
    view = view_of(log, last=4, users=1000)
    rows = planted_floors.floors(config, log, view, (0, 1, 4, 16, None))
    mean = {(row["history"], row["context"]): row["mean"] for row in rows}
    for context in (False, True):
        values = [mean[history, context] for history in (1, 4, 16, None)]
        assert all(a > b + 0.02 for a, b in itertools.pairwise(values)), values
    assert all(mean[history, False] - mean[history, True] > 0.1 for history in (1, 4, 16, None))
    entropies = planted_floors.entropies(config)
    assert mean[0, False] - mean[None, False] > 1
    assert mean[0, False] == pytest.approx(entropies["unigram"], abs=4 * rows[0]["stderr"])
    assert entropies["unigram"] > entropies["type"] > entropies["interest"]
    assert mean[None, True] > entropies["interest"]
    assert {row["n"] for row in rows} == {4000}


def test_the_standard_error_counts_users_not_targets():
    values = np.random.default_rng(0).standard_normal(50)
    mean, stderr = planted_floors._clustered(values, np.ones(50, int))
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    repeated = planted_floors._clustered(np.repeat(values, 4), np.full(50, 4))
    assert repeated == pytest.approx((mean, stderr))
    assert math.isnan(planted_floors._clustered(values, np.array([50]))[1])


def test_entropies_are_the_mean_surprise_of_simulated_items():
    true, entropies = planted.world(SMALL), planted_floors.entropies(SMALL)
    blocks = list(planted.blocks(SMALL))
    length = np.concatenate([block["length"] for block in blocks])
    item = np.concatenate([block["item_id"] for block in blocks]) - 1
    interest = np.concatenate([block["interest"] for block in blocks])
    user_type = np.repeat(np.concatenate([block["type"] for block in blocks]), length)
    by_type_GV = true.type_GK @ true.emission_PKV[0]
    surprise = {
        "unigram": -np.log(by_type_GV.mean(0)[item]),
        "type": -np.log(by_type_GV[user_type, item]),
        "interest": -np.log(true.emission_PKV[0][interest, item]),
    }
    for name, nats in surprise.items():
        mean, stderr = planted_floors._clustered(nats, length)
        assert entropies[name] == pytest.approx(mean, abs=4 * stderr), name
        assert stderr < 0.02


def test_without_context_there_is_no_column():
    config = dataclasses.replace(SMALL, context_reliability=0.0)
    log = planted.generate(config)
    assert set(log.events) == set(log.columns) == {"item_id", "timestamp"}
    with pytest.raises(ValueError, match="no column 'surface'"):
        planted_floors.next_item_nats(config, log, view_of(log, 1), context=True)
    assert [row["context"] for row in planted_floors.floors(config, log, view_of(log, 1), (1, None))] == [False, False]


def test_wrong_questions_are_refused():
    log = planted.generate(TINY)
    view = view_of(log, 1)
    with pytest.raises(ValueError, match="expected 'next_item'"):
        planted_floors.next_item_nats(TINY, log, dataclasses.replace(view, reading="window"))
    with pytest.raises(ValueError, match="use config_of"):
        planted_floors.next_item_nats(SMALL, log, view)
    impossible = dataclasses.replace(TINY, noise=0.0, items_per_interest=1)  # 2 of the 3 items
    with pytest.raises(ValueError, match="cannot occur"):
        planted_floors.next_item_nats(impossible, planted.generate(dataclasses.replace(TINY, noise=1.0)), view)
    with pytest.raises(ValueError, match="history"):
        planted_floors.next_item_nats(TINY, log, view, history=-1)
