"""Planted tastes: the exact floor against integration over tastes, what history saves, and bad settings."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.special import digamma as scipy_digamma

from recscale.data import planted_taste
from recscale.data.event_log import EventLog
from recscale.data.event_log_writer import write
from recscale.data.planted_taste import Taste, config_of, digamma, entropies, generate, next_item_nats
from recscale.data.splits import by_user, leave_one_out

SMALL = Taste(users=300, length=65, groups=6, items_per_group=3, concentration=0.4, seed=3)


def test_the_floor_is_the_integral_over_tastes():
    """p(next | history) by importance sampling over 200,000 tastes drawn from the prior: no conjugacy used."""
    config = dataclasses.replace(SMALL, users=2, length=9)
    log = generate(config)
    view = leave_one_out(log, validation=False)["test"]
    zipf_M, items_KM = planted_taste._world(config)
    taste_SK = np.random.default_rng(0).dirichlet(np.full(6, 0.4), size=200_000)
    share_KV = np.zeros((6, 19))
    share_KV[np.arange(6)[:, None], items_KM] = zipf_M
    p_SV = taste_SK @ share_KV
    for n, found in ((8, next_item_nats(config, log, view)), (3, next_item_nats(config, log, view, 3))):
        for user in range(2):
            events = log.events["item_id"][9 * user : 9 * user + 9]
            seen_S = p_SV[:, events[8 - n : 8]].prod(1)
            expected = -math.log(float(seen_S @ p_SV[:, events[8]]) / float(seen_S.sum()))
            assert found[user] == pytest.approx(expected, abs=0.03)


def test_the_predictive_distribution_sums_to_one():
    config = dataclasses.replace(SMALL, users=1, length=20)
    log = generate(config)
    total = 0.0
    for item in range(1, config.items + 1):
        log.events["item_id"][-1] = item
        total += math.exp(-next_item_nats(config, log, leave_one_out(log)["test"], 7)[0])
    assert total == pytest.approx(1.0)


def test_history_pays_from_the_prior_down_to_the_taste():
    config = dataclasses.replace(SMALL, users=4_000)
    log = generate(config)
    view = by_user(log, 1, 3_999, 1)["test"]
    nats = {n: next_item_nats(config, log, view, n).mean() for n in (0, 1, 4, 16, 64, None)}
    known = entropies(config)
    assert nats[0] == pytest.approx(known["prior"], abs=0.03)
    assert nats[0] > nats[1] > nats[4] > nats[16] > nats[64] == nats[None]
    assert known["taste"] < nats[64] + 0.05
    assert nats[64] - known["taste"] == pytest.approx(5 / 128, abs=0.05)  # (K - 1) / (2 n)


def test_many_targets_come_in_the_order_of_the_view():
    log = generate(SMALL)
    view = by_user(log, 100, 20, 5)["test"]
    together = next_item_nats(SMALL, log, view, 16)
    alone = [
        next_item_nats(SMALL, log, dataclasses.replace(view, target_start=view.stop - k, stop=view.stop - k + 1), 16)
        for k in (5, 4, 3, 2, 1)
    ]
    np.testing.assert_allclose(together.reshape(-1, 5), np.stack(alone, axis=1))


def test_same_settings_same_log_and_fewer_users_are_a_prefix(tmp_path):
    log = generate(SMALL)
    fewer = generate(dataclasses.replace(SMALL, users=270))
    np.testing.assert_array_equal(fewer.events["item_id"], log.events["item_id"][: 270 * 65])
    assert not np.array_equal(generate(dataclasses.replace(SMALL, seed=4)).events["item_id"], log.events["item_id"])
    write(log, tmp_path / "log", allow_repeats=True)
    assert config_of(EventLog.open(tmp_path / "log")) == SMALL
    assert set(log.events["item_id"]) == set(range(1, 19))


def test_digamma_is_scipys():
    for x in (0.05, 0.3, 1.0, 1.1, 13.8, 400.0):
        assert digamma(x) == pytest.approx(float(scipy_digamma(x)), abs=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"users": 0}, "users: found 0"), ({"concentration": 0.0}, "concentration"), ({"length": 1}, "at least 2")],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_wrong_questions_are_refused():
    log = generate(dataclasses.replace(SMALL, users=4))
    view = leave_one_out(log)["test"]
    with pytest.raises(ValueError, match="found -1"):
        next_item_nats(SMALL, log, view, -1)
    with pytest.raises(ValueError, match="18 items, the settings have 12"):
        next_item_nats(dataclasses.replace(SMALL, items_per_group=2), log, view)
    with pytest.raises(ValueError, match="expected 'next_item'"):
        next_item_nats(SMALL, log, dataclasses.replace(view, reading="window"))
    with pytest.raises(ValueError, match="no 'planted_taste' settings"):
        config_of(dataclasses.replace(log, facts={}))
