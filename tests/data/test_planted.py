"""The planted simulator: its log against its own settings."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from recscale.data import planted
from recscale.data.event_log import Column, check
from recscale.data.planted import Planted
from recscale.data.prepare import prepare

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
LIKES = {"like_own": 0.6, "like_noise": 0.1}
SMALL = dataclasses.replace(
    TINY, users=3000, items=12, interests=4, types=3, concentration=0.3, items_per_interest=4, length_median=12,
    length_sigma=0.5, length_max=30, periods=4, horizon=20_000,
)  # fmt: skip


LOGS = [  # settings over SMALL; sha256 of the log of 1,500 users, as it came out before there were likes
    ({}, "1afffb33defb5017"),
    ({"born": True}, "a78478bbc2aef3ce"),
    ({"context_reliability": 0.0}, "b02fc1d8b3aef999"),
    ({"noise": 0.0}, "a833f1e65fb84403"),
    ({"noise": 1.0, "born": True}, "713b8beb798eb79c"),
]


@pytest.mark.parametrize("likes", [{}, LIKES, {"like_noise": 1.0}])
@pytest.mark.parametrize(("settings", "expected"), LOGS)
def test_a_log_is_what_it_always_was_and_likes_change_nothing_else(settings, expected, likes):
    log = planted.generate(dataclasses.replace(SMALL, users=1500, **settings, **likes))
    assert (planted.LIKE in log.events) == (planted.LIKE in log.columns) == bool(likes)
    digest = hashlib.sha256(log.offsets.tobytes() + log.items["born"].tobytes())
    for name in sorted(set(log.events) - {planted.LIKE}):
        digest.update(name.encode() + log.events[name].tobytes())
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize("likes", [{}, LIKES])
@pytest.mark.parametrize("born", [False, True])
def test_same_seed_same_log_and_fewer_users_are_a_prefix(born, likes):
    config = dataclasses.replace(SMALL, users=1500, born=born, **likes)
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
    older = {"planted": {name: x for name, x in facts["planted"].items() if not name.startswith("like_")}}
    assert planted.config_of(dataclasses.replace(log, facts=older)) == SMALL
    assert planted.settings_of(SMALL) == older["planted"]  # so that a log prepared before is the same log
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
     ("length_min", 1), ("users", 0), ("concentration", 0.0), ("zipf", -1.0), ("seed", -1), ("items_per_interest", 13),
     ("like_own", 1.1), ("like_noise", -0.1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field, value):
    base = TINY if field == "items" else SMALL
    value = 1 if field == "items" else value
    with pytest.raises(ValueError, match=f"Planted.{field}" if field != "items" else "items_per_interest"):
        dataclasses.replace(base, **{field: value})


def test_a_log_without_its_settings_has_no_known_floor():
    with pytest.raises(ValueError, match="planted logs only"):
        planted.config_of(dataclasses.replace(planted.generate(TINY), facts={}))


def lists(config):
    """(own_KV, everyone_V): the two lists that items come from, out of worlds that have one of them only."""
    plain = dataclasses.replace(config, born=False)
    own_KV = planted.world(dataclasses.replace(plain, noise=0.0)).emission_PKV[0]
    return own_KV, planted.world(dataclasses.replace(plain, noise=1.0)).emission_PKV[0, 0]


@pytest.mark.parametrize("settings", [{}, {"born": True}, {"noise": 0.0}, {"noise": 1.0}, {"like_own": 0.0}])
def test_likes_come_as_often_as_the_list_of_the_draw_says(settings):
    config = dataclasses.replace(SMALL, **(LIKES | settings))
    blocks = list(planted.blocks(config))
    interest, item, own, like = (
        np.concatenate([block[name] for block in blocks]) for name in ("interest", "item_id", "own", "like")
    )
    own_KV, everyone_V = lists(config)
    from_own_KV, from_everyone_V = (1 - config.noise) * own_KV, config.noise * everyone_V
    share = from_own_KV[interest, item - 1] / (from_own_KV[interest, item - 1] + from_everyone_V[item - 1])
    rate = share * config.like_own + (1 - share) * config.like_noise
    for came, p in ((own, share), (like, rate)):
        for v in range(1, config.items + 1):
            for z in range(config.interests):
                of = (item == v) & (interest == z)
                spread = np.sqrt((p * (1 - p))[of].sum())
                assert abs((came - p)[of].sum()) <= 4.5 * spread + 1e-9
    for source, expected in ((own, config.like_own), (~own, config.like_noise)):
        spread = np.sqrt(expected * (1 - expected) / max(source.sum(), 1))
        assert not source.any() or abs(like[source].mean() - expected) <= 4.5 * spread
    if not config.born:
        assert own.mean() == pytest.approx(1 - config.noise, abs=0.01)
    pairs = (own - share)[1:] * (own - share)[:-1]
    assert abs(pairs.sum()) <= 4.5 * np.sqrt((pairs**2).sum())  # every event has a draw of its own
    assert like.dtype == np.int8


def test_blocks_and_seeds_have_draws_of_their_own():
    alike = {"zipf": 0.0, "items_per_interest": 12, "noise": 0.5}  # every item is from its own list half of the time
    config = dataclasses.replace(SMALL, users=2048, **alike, **LIKES)
    first, second = planted.blocks(config)
    other = next(planted.blocks(dataclasses.replace(config, seed=config.seed + 1)))
    for block in (second, other):
        assert 0.45 < (first["own"][:8000] == block["own"][:8000]).mean() < 0.55


def test_likes_are_a_feedback_column_of_a_prepared_log(tmp_path):
    settings = {"users": "1500", "like_own": "0.6", "like_noise": "0.1"}  # as --set reads them
    log = prepare("planted", tmp_path / "log", settings=settings)
    check(log)
    config = Planted(users=1500, like_own=0.6, like_noise=0.1)
    expected = planted.generate(config)
    assert log.columns == expected.columns
    assert log.columns["like"] == Column("feedback", 2)
    assert planted.config_of(log) == config
    assert planted.settings_of(config)["like_own"] == 0.6
    for name, column in expected.events.items():
        np.testing.assert_array_equal(log.events[name], column)
    assert set(np.unique(log.events["like"])) == {0, 1}
