"""The planted simulator: its filter against brute force, its log against its own settings."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from recscale.data import planted
from recscale.data.planted import Planted
from recscale.data.splits import View

TINY = Planted(
    users=12,
    items=3,
    interests=2,
    types=2,
    concentration=1.0,
    stay=0.6,
    noise=0.2,
    zipf=1.0,
    items_per_interest=2,
    length_median=4,
    length_min=4,
    length_max=4,
    context_groups=2,
    context_reliability=0.7,
    periods=3,
    horizon=1000,
    mean_gap=200.0,
    seed=3,
)
SMALL = dataclasses.replace(
    TINY, users=3000, items=12, interests=4, types=3, concentration=0.3, items_per_interest=4, length_median=12,
    length_sigma=0.5, length_max=30, periods=4, horizon=20_000,
)  # fmt: skip


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
    got = planted.next_item_nats(config, log, view, history, context)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("history", [1, 2, 3])
def test_a_segment_shares_its_last_inputs_among_its_targets(history):
    log = planted.generate(TINY)
    view = view_of(log, last=2)
    expected = []
    for start, first_target, stop in zip(view.start, view.target_start, view.stop, strict=True):
        seen_from = max(start, stop - 1 - history)
        for e in range(max(first_target, seen_from + 1), stop):
            expected.append(-math.log(brute_force(TINY, log, seen_from, e, start, True)))
    got = planted.next_item_nats(TINY, log, view, history, context=True, segment=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    row = planted.floors(TINY, log, view, (history,), segment=True)[1]
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
        nats = planted.next_item_nats(SMALL, log, view, history)
        pieces = np.split(nats, np.cumsum(view.stop - view.target_start)[:-1])
        expected = np.concatenate([pieces[i] for i in shuffle])
        got = planted.next_item_nats(SMALL, log, shuffled, history)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_a_missing_context_says_nothing():
    log = planted.generate(TINY)
    blank = dataclasses.replace(log, events={**log.events, planted.CONTEXT: np.zeros(log.num_events, np.int32)})
    view = view_of(log, last=3)
    np.testing.assert_allclose(
        planted.next_item_nats(TINY, blank, view, 2, context=True),
        planted.next_item_nats(TINY, log, view, 2, context=False),
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
        p_NV[exists, v] = np.exp(-planted.next_item_nats(config, swapped, view, context=True))[exists]
    assert born == (p_NV == 0).any()
    np.testing.assert_allclose(p_NV.sum(1), 1, atol=1e-12)

    nats = planted.next_item_nats(config, log, view, context=True)
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
    right = planted.next_item_nats(SMALL, log, view, context=True)
    assert z_score(planted.next_item_nats(dataclasses.replace(SMALL, **wrong), log, view, context=True) - right) > 4


def test_floors_fall_with_history_and_with_context():
    config = Planted(users=1500)
    log = planted.generate(config)
    view = view_of(log, last=4, users=1000)
    rows = planted.floors(config, log, view, (0, 1, 4, 16, None))
    mean = {(row["history"], row["context"]): row["mean"] for row in rows}
    for context in (False, True):
        values = [mean[history, context] for history in (1, 4, 16, None)]
        assert all(a > b + 0.02 for a, b in itertools.pairwise(values)), values
    assert all(mean[history, False] - mean[history, True] > 0.1 for history in (1, 4, 16, None))
    entropies = planted.entropies(config)
    assert mean[0, False] - mean[None, False] > 1
    assert mean[0, False] == pytest.approx(entropies["unigram"], abs=4 * rows[0]["stderr"])
    assert entropies["unigram"] > entropies["type"] > entropies["interest"]
    assert mean[None, True] > entropies["interest"]
    assert {row["n"] for row in rows} == {4000}


def test_the_standard_error_counts_users_not_targets():
    values = np.random.default_rng(0).standard_normal(50)
    mean, stderr = planted._clustered(values, np.ones(50, int))
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    repeated = planted._clustered(np.repeat(values, 4), np.full(50, 4))
    assert repeated == pytest.approx((mean, stderr))
    assert math.isnan(planted._clustered(values, np.array([50]))[1])


@pytest.mark.parametrize("born", [False, True])
def test_same_seed_same_log_and_fewer_users_are_a_prefix(born):
    config = dataclasses.replace(SMALL, users=1500, born=born)
    log, again = planted.generate(config), planted.generate(config)
    other = planted.generate(dataclasses.replace(config, seed=config.seed + 1))
    for users in (1, 700, 1024, 1025):
        part = planted.generate(dataclasses.replace(config, users=users))
        np.testing.assert_array_equal(part.offsets, log.offsets[: users + 1])
        for name, column in part.events.items():
            np.testing.assert_array_equal(column, log.events[name][: part.num_events])
    for name, column in log.events.items():
        np.testing.assert_array_equal(column, again.events[name])
        assert not np.array_equal(column[:1000], other.events[name][:1000])
    first, second = (
        log.events["item_id"][: log.offsets[1]],
        log.events["item_id"][log.offsets[1024] : log.offsets[1025]],
    )
    assert not np.array_equal(first, second)  # blocks differ


def test_columns_have_the_promised_types_and_ranges():
    log = planted.generate(SMALL)
    item_id, timestamp, surface = (log.events[name] for name in ("item_id", "timestamp", "surface"))
    assert (item_id.dtype, timestamp.dtype, surface.dtype) == (np.int32, np.int64, np.int32)
    assert log.offsets.dtype == np.int64
    assert (np.unique(item_id) == np.arange(1, SMALL.items + 1)).all()
    assert (np.unique(surface) == np.arange(1, SMALL.context_groups + 1)).all()
    assert log.columns["surface"].cardinality == SMALL.context_groups + 1
    assert {len(column) for column in log.events.values()} == {log.num_events}
    gap = np.delete(np.diff(timestamp), log.offsets[1:-1] - 1)
    assert gap.min() >= 0
    start = timestamp[log.offsets[:-1]]
    assert 0 <= start.min() < start.max() < SMALL.horizon
    assert gap.mean() == pytest.approx(SMALL.mean_gap, rel=0.05)
    facts = json.loads(json.dumps(log.facts))
    assert planted.config_of(dataclasses.replace(log, facts=facts)) == SMALL
    assert (facts["users"], facts["items"], facts["events"]) == (log.num_users, log.num_items, log.num_events)


def test_draws_follow_their_row_and_hold_ids_that_float32_cannot():
    rng = np.random.default_rng(0)
    cdf = planted._stacked_cdf(np.array([[0.0, 0.25, 0.75, 0.0], [0.0, 0.0, 0.0, 2.0]]))
    drawn = planted._draw(cdf, 4, np.repeat([0, 1], [4000, 10]), rng)
    assert set(drawn[4000:]) == {3}
    np.testing.assert_allclose(np.bincount(drawn[:4000], minlength=4) / 4000, [0, 0.25, 0.75, 0], atol=0.03)
    items = 2**24 + 2
    certain = np.zeros(items)
    certain[-1] = 1
    assert (planted._draw(certain, items, np.zeros(5, np.int64), rng) == 2**24 + 1).all()


def test_a_draw_at_the_edge_never_takes_an_impossible_column():
    class Lowest:
        def random(self, n):
            return np.zeros(n)

    class Highest:
        def random(self, n):
            return np.full(n, 1 - 2.0**-53)

    cdf = planted._stacked_cdf(np.tile([0.0, 0.5, 0.5, 0.0], (1000, 1)))
    assert set(planted._draw(cdf, 4, np.arange(1000), Lowest())) == {1}
    assert set(planted._draw(cdf, 4, np.arange(1000), Highest())) == {2}


def test_users_start_afresh_and_times_pass_32_bits():
    config = dataclasses.replace(
        TINY, users=1024, interests=16, stay=0.99, concentration=10.0, horizon=2**34, mean_gap=1e7
    )
    (block,) = planted.blocks(config)
    offsets = np.concatenate([[0], np.cumsum(block["length"])])
    first, last = block["interest"][offsets[1:-1]], block["interest"][offsets[1:-1] - 1]
    assert 0.02 < (first == last).mean() < 0.12  # 1 / 16 by chance
    within = np.delete(block["interest"][1:] == block["interest"][:-1], offsets[1:-1] - 1)
    assert within.mean() == pytest.approx(0.99 + 0.01 / 16, abs=0.01)
    start = block["timestamp"][offsets[:-1]]
    assert 2**33.9 < start.max() < 2**34
    assert start.min() >= 0
    assert start.mean() == pytest.approx(2**33, rel=0.1)
    gap = np.delete(np.diff(block["timestamp"]), offsets[1:-1] - 1)  # the gaps of a block add up to more than 2**31
    assert gap.min() >= 0
    assert 2**31 < gap.sum() < 2**36


def test_entropies_are_the_mean_surprise_of_simulated_items():
    true, entropies = planted.world(SMALL), planted.entropies(SMALL)
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
        mean, stderr = planted._clustered(nats, length)
        assert entropies[name] == pytest.approx(mean, abs=4 * stderr), name
        assert stderr < 0.02


def test_without_context_there_is_no_column():
    config = dataclasses.replace(SMALL, context_reliability=0.0)
    log = planted.generate(config)
    assert set(log.events) == set(log.columns) == {"item_id", "timestamp"}
    with pytest.raises(ValueError, match="no column 'surface'"):
        planted.next_item_nats(config, log, view_of(log, 1), context=True)
    assert [row["context"] for row in planted.floors(config, log, view_of(log, 1), (1, None))] == [False, False]


def test_popularity_inside_an_interest_is_zipf():
    config = dataclasses.replace(SMALL, users=4000, items=200, items_per_interest=50, noise=0.0, zipf=1.3)
    order_KV = np.argsort(-planted.world(config).emission_PKV[0], axis=1, kind="stable")
    rank_KV = np.argsort(order_KV, axis=1)
    blocks = list(planted.blocks(config))
    interest = np.concatenate([block["interest"] for block in blocks])
    item = np.concatenate([block["item_id"] for block in blocks]) - 1
    count_R = np.bincount(rank_KV[interest, item], minlength=config.items)
    assert count_R[config.items_per_interest :].sum() == 0
    slope = np.polyfit(np.log(np.arange(1, 21)), np.log(count_R[:20]), 1)[0]
    assert slope == pytest.approx(-config.zipf, abs=0.06)


def test_lengths_are_lognormal_with_a_clipped_tail():
    config = Planted(users=8192, length_median=48, length_sigma=0.8, length_min=5, length_max=200)
    length = np.concatenate([block["length"] for block in planted.blocks(config)])
    assert (length.min(), length.max()) == (5, 200)
    log_length = np.log(length)
    assert np.median(log_length) == pytest.approx(np.log(48), abs=0.04)
    assert np.quantile(log_length, 0.8413) - np.median(log_length) == pytest.approx(0.8, abs=0.06)
    np.testing.assert_array_equal(planted.generate(config).lengths, length)


def test_items_never_appear_before_they_are_born():
    config = dataclasses.replace(SMALL, items=60, items_per_interest=20, born=True)
    log = planted.generate(config)
    born = log.items["born"][log.events["item_id"]]
    late = log.items["born"][1:] > 0
    assert 0.2 < late.mean() < 0.7
    assert (log.events["timestamp"] >= born).all()
    assert (born > 0).sum() > 1000  # items born late do come
    assert log.items["born"].max() < config.horizon
    unaware = planted.generate(dataclasses.replace(config, born=False))
    assert (unaware.events["timestamp"] < log.items["born"][unaware.events["item_id"]]).any()
    assert (unaware.items["born"] == 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("items", 2), ("stay", 1.0), ("stay", 0.0), ("noise", 1.1), ("context_reliability", -0.1), ("context_groups", 9),
     ("length_min", 1), ("users", 0), ("concentration", 0.0), ("zipf", -1.0), ("seed", -1), ("items_per_interest", 13)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field, value):
    base = TINY if field == "items" else SMALL
    value = 1 if field == "items" else value
    with pytest.raises(ValueError, match=f"Planted.{field}" if field != "items" else "items_per_interest"):
        dataclasses.replace(base, **{field: value})


def test_wrong_questions_are_refused():
    log = planted.generate(TINY)
    view = view_of(log, 1)
    with pytest.raises(ValueError, match="expected 'next_item'"):
        planted.next_item_nats(TINY, log, dataclasses.replace(view, reading="window"))
    with pytest.raises(ValueError, match="use config_of"):
        planted.next_item_nats(SMALL, log, view)
    impossible = dataclasses.replace(TINY, noise=0.0, items_per_interest=1)  # 2 of the 3 items
    with pytest.raises(ValueError, match="cannot occur"):
        planted.next_item_nats(impossible, planted.generate(dataclasses.replace(TINY, noise=1.0)), view)
    with pytest.raises(ValueError, match="history"):
        planted.next_item_nats(TINY, log, view, history=-1)
    with pytest.raises(ValueError, match="planted logs only"):
        planted.config_of(dataclasses.replace(log, facts={}))
