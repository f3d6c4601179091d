"""The exact floors with likes: both against brute force over every hidden path and every list an item came from."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from recscale.data import planted, planted_floors
from tests.data.test_planted import LIKES, SMALL, TINY, lists
from tests.data.test_planted_floors import view_of, z_score

LIKED = dataclasses.replace(SMALL, **LIKES)


def sources(config):
    """p(item, list it came from | interest, period) as lists [P][2][K][V]: own list, list over the catalogue."""
    own_KV, everyone_V = lists(config)
    birth_V = planted.world(config).birth_V
    found = []
    for period in range(config.periods if config.born else 1):
        born_V = birth_V <= period
        own, everyone = (1 - config.noise) * own_KV * born_V, config.noise * everyone_V * born_V + 0 * own_KV
        mass = (own + everyone).sum(1, keepdims=True)
        found.append([(own / mass).tolist(), (everyone / mass).tolist()])
    return found


def brute_force(config, log, seen_from, target, start, context):
    """(p(item at `target` | seen), p(its like | seen, that item)), every type, interest path and list path summed.

    Seen: items and likes of seen_from..target - 1, contexts of seen_from + 1..target. Paths of interests begin at the
    user's first event, whatever is seen: nothing is assumed about where a filter may restart.
    """
    type_GK = planted.world(config).type_GK.tolist()
    item, like, surface = (log.events[name].tolist() for name in ("item_id", "like", "surface"))
    period = planted.period_of(config, log.events["timestamp"]).tolist()
    p_P2KV, rate = sources(config), (config.like_own, config.like_noise)
    seen = with_item = with_like = 0.0
    interests = itertools.product(range(config.interests), repeat=target - start + 1)
    for (g, path), origins in itertools.product(
        itertools.product(range(config.types), interests), itertools.product((0, 1), repeat=target - seen_from + 1)
    ):
        p = type_GK[g][path[0]] / config.types
        for z, z_next in itertools.pairwise(path):
            p *= config.stay * (z == z_next) + (1 - config.stay) * type_GK[g][z_next]
        for event in range(seen_from + 1, target + 1) if context else ():
            shown = surface[event] - 1 == path[event - start] % config.context_groups
            p *= config.context_reliability * shown + (1 - config.context_reliability) / config.context_groups
        for event, s in zip(range(seen_from, target), origins, strict=False):
            p *= p_P2KV[period[event]][s][path[event - start]][item[event] - 1]
            p *= rate[s] if like[event] else 1 - rate[s]
        s = origins[-1]
        seen += p / 2  # the list of the target is not in p yet: both of its values come by
        p *= p_P2KV[period[target]][s][path[-1]][item[target] - 1]
        with_item += p
        with_like += p * (rate[s] if like[target] else 1 - rate[s])
    return with_item / seen, with_like / with_item


def assert_equals_brute_force(config, history, context, segment=False, users=5):
    log = planted.generate(config)
    view = view_of(log, last=2 if segment else 3, users=users)
    expected = []
    for start, first_target, stop in zip(view.start, view.target_start, view.stop, strict=True):
        shared = max(start, stop - 1 - history) if segment else start
        for e in range(max(first_target, shared + 1) if segment else first_target, stop):
            seen_from = shared if segment or history is None else max(start, e - history)
            expected.append(brute_force(config, log, seen_from, e, start, context))
    item, like = -np.log(expected).T
    got = planted_floors.next_item_nats(config, log, view, history, context, segment, feedback=True)
    np.testing.assert_allclose(got, item, rtol=0, atol=1e-12)
    got = planted_floors.feedback_nats(config, log, view, history, context, segment)
    np.testing.assert_allclose(got, like, rtol=0, atol=1e-12)


@pytest.mark.parametrize("history", [0, 1, 2, None])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("born", [False, True])
def test_both_floors_equal_brute_force_over_all_hidden_paths(history, context, born):
    assert_equals_brute_force(dataclasses.replace(TINY, born=born, **LIKES), history, context)


@pytest.mark.parametrize("likes", [(1.0, 0.0), (0.0, 0.5), (1.0, 1.0), (0.3, 1.0)])
@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_certain_likes_and_lists_too(likes, noise):
    config = dataclasses.replace(TINY, like_own=likes[0], like_noise=likes[1], noise=noise)
    assert_equals_brute_force(config, None, context=True, users=3)


@pytest.mark.parametrize("history", [1, 2])
def test_a_segment_shares_its_last_inputs_and_their_likes(history):
    assert_equals_brute_force(dataclasses.replace(TINY, **LIKES), history, context=True, segment=True)


def test_a_reader_without_the_likes_has_the_floor_of_the_log_without_them():
    plain, liked = planted.generate(SMALL), planted.generate(LIKED)
    view = view_of(plain, last=8)
    expected = planted_floors.next_item_nats(SMALL, plain, view, 4, context=True)
    np.testing.assert_array_equal(planted_floors.next_item_nats(LIKED, liked, view, 4, context=True), expected)


def test_likes_of_one_rate_say_nothing():
    config = dataclasses.replace(SMALL, like_own=0.3, like_noise=0.3)
    log = planted.generate(config)
    view = view_of(log, last=8, users=500)
    blind, seeing = (planted_floors.next_item_nats(config, log, view, feedback=f) for f in (False, True))
    np.testing.assert_allclose(seeing, blind, rtol=0, atol=1e-12)
    rows = np.concatenate([np.arange(a, b) for a, b in zip(view.target_start, view.stop, strict=True)])
    coin = -np.log(np.where(log.events["like"][rows] == 1, 0.3, 0.7))
    np.testing.assert_allclose(planted_floors.feedback_nats(config, log, view), coin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("born", [False, True])
def test_the_predicted_like_is_calibrated(born):
    config = dataclasses.replace(LIKED, born=born)
    log = planted.generate(config)
    view = view_of(log, last=1)
    like = log.events["like"][view.stop - 1]
    other = log.events["like"].copy()
    other[view.stop - 1] = 1 - like
    swapped = dataclasses.replace(log, events={**log.events, "like": other})
    nats, missed = (planted_floors.feedback_nats(config, x, view, context=True) for x in (log, swapped))
    np.testing.assert_allclose(np.exp(-nats) + np.exp(-missed), 1, atol=1e-12)
    assert abs(z_score(nats - np.exp(-nats) * nats - np.exp(-missed) * missed)) < 4
    p = np.where(like == 1, np.exp(-nats), np.exp(-missed))
    tenths = np.quantile(p, [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1])
    assert tenths[-2] - tenths[1] > 0.2
    for low, high in itertools.pairwise(tenths):
        among = (p >= low) & (p <= high)
        assert abs(z_score((like - p)[among])) < 4


def test_the_next_item_is_calibrated_after_likes():
    log = planted.generate(LIKED)
    view = view_of(log, last=1)
    target = view.stop - 1
    p_NV = np.empty((len(view), LIKED.items))
    for v in range(LIKED.items):
        item_id = log.events["item_id"].copy()
        item_id[target] = v + 1
        swapped = dataclasses.replace(log, events={**log.events, "item_id": item_id})
        p_NV[:, v] = np.exp(-planted_floors.next_item_nats(LIKED, swapped, view, feedback=True))
    np.testing.assert_allclose(p_NV.sum(1), 1, atol=1e-12)
    nats = planted_floors.next_item_nats(LIKED, log, view, feedback=True)
    assert abs(z_score(nats + (p_NV * np.log(p_NV)).sum(1))) < 4


def test_likes_lower_the_floor_and_a_history_lowers_that_of_likes():
    config = dataclasses.replace(LIKED, like_own=0.9, like_noise=0.05, users=6000)
    log = planted.generate(config)
    view = view_of(log, last=4)
    for history in (1, 4, None):
        blind, seeing = (planted_floors.next_item_nats(config, log, view, history, feedback=f) for f in (False, True))
        assert z_score(by_user(blind - seeing, view)) > 4, history
    assert [row["mean"] for row in planted_floors.floors(config, log, view, (None,), feedback=True)] == [
        planted_floors.next_item_nats(config, log, view, None, context, feedback=True).mean()
        for context in (False, True)
    ]
    nats = [planted_floors.feedback_nats(config, log, view, history) for history in (0, 1, 4, None)]
    nats.append(planted_floors.feedback_nats(config, log, view, context=True))
    for less, more in itertools.pairwise(nats):
        assert z_score(by_user(less - more, view)) > 4
    entropies = planted_floors.entropies(config)
    assert entropies["like"] > entropies["like_item"] > nats[-1].mean() > entropies["like_interest"]
    mean, stderr = planted_floors._clustered(nats[0], view.stop - view.target_start)
    assert entropies["like_item"] == pytest.approx(mean, abs=4 * stderr)


def by_user(values, view):
    """Sum of each user's values, which are not independent."""
    return np.add.reduceat(values, np.cumsum(view.stop - view.target_start) - (view.stop - view.target_start))


@pytest.mark.parametrize("wrong", [{"like_own": 0.4}, {"like_noise": 0.3}, {"like_own": 0.1, "like_noise": 0.6}])
def test_a_filter_with_wrong_rates_loses(wrong):
    log = planted.generate(LIKED)
    view = view_of(log, last=8)
    lost = planted_floors.feedback_nats(dataclasses.replace(LIKED, **wrong), log, view)
    assert z_score(by_user(lost - planted_floors.feedback_nats(LIKED, log, view), view)) > 4


@pytest.mark.parametrize("period", [0, 3])
def test_entropies_are_the_mean_surprise_of_simulated_likes(period):
    config = dataclasses.replace(LIKED, born=period > 0, users=6000)
    blocks = list(planted.blocks(config))
    here = [planted.period_of(config, block["timestamp"]) == period for block in blocks]
    interest, item, like = (
        np.concatenate([block[name][at] for block, at in zip(blocks, here, strict=True)])
        for name in ("interest", "item_id", "like")
    )
    entropies = planted_floors.entropies(config, period)
    rate = like.mean()
    assert entropies["like"] == pytest.approx(-rate * math.log(rate) - (1 - rate) * math.log(1 - rate), abs=0.01)
    own_KV, everyone_V = lists(config)
    from_own, from_everyone = (1 - config.noise) * own_KV[interest, item - 1], config.noise * everyone_V[item - 1]
    p = (from_own * config.like_own + from_everyone * config.like_noise) / (from_own + from_everyone)
    surprise = -np.log(np.where(like == 1, p, 1 - p))
    assert entropies["like_interest"] == pytest.approx(surprise.mean(), abs=0.01)
    assert set(planted_floors.entropies(SMALL)) == {"unigram", "type", "interest"}


def test_wrong_questions_about_likes_are_refused():
    liked, plain = planted.generate(LIKED), planted.generate(SMALL)
    view = view_of(plain, 1)
    for config, log in ((LIKED, plain), (SMALL, liked), (SMALL, plain)):
        with pytest.raises(ValueError, match="no column 'like', or none in the settings"):
            planted_floors.feedback_nats(config, log, view)
        with pytest.raises(ValueError, match="no column 'like', or none in the settings"):
            planted_floors.next_item_nats(config, log, view, feedback=True)
    never = dataclasses.replace(SMALL, like_own=0.0, like_noise=1e-300)
    certain = dataclasses.replace(liked, events={**liked.events, "like": np.zeros(liked.num_events, np.int8)})
    with pytest.raises(ValueError, match="its like cannot occur"):
        planted_floors.feedback_nats(dataclasses.replace(SMALL, like_own=1.0, like_noise=1.0), certain, view)
    planted_floors.feedback_nats(never, certain, view)
