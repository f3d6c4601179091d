"""Stochastic Length against the published tables, its own formula, and what a loader needs of it."""

import numpy as np
import pytest

from recscale.data.event_log import EventLogError
from recscale.data.stochastic_length import kept_lengths, kept_offsets, thinned, thinning_probability

# arXiv 2402.17152: events a thinned example keeps, by alpha and maximum length.
KEPT = {
    1.6: {1024: 256, 2048: 446, 4096: 776, 8192: 1351},
    1.7: {1024: 362, 2048: 653, 4096: 1176, 8192: 2120},
    1.8: {1024: 512, 2048: 955, 4096: 1783, 8192: 3327},
    1.9: {1024: 724, 2048: 1399, 4096: 2702, 8192: 5221},
    2.0: {1024: 1024, 2048: 2048, 4096: 4096, 8192: 8192},
}
# Its table 3: share of N x N slots without a token. At alpha = 2 nothing is thinned, users are just short.
SPARSITY = {1.6: (0.715, 0.761), 1.7: (0.561, 0.636), 1.8: (0.402, 0.453), 2.0: (0.031, 0.066)}


@pytest.mark.parametrize("alpha", KEPT)
def test_published_lengths(alpha):
    assert {n: thinned(n, alpha) for n in KEPT[alpha]} == pytest.approx(KEPT[alpha], abs=1)


def test_sparsity_is_that_of_the_formula_and_near_the_published_one():
    """Almost all users of the two shorter columns are full: the formula at n = N is nearly their sparsity."""
    for column, length in enumerate((1024, 2048)):
        for alpha, published in SPARSITY.items():
            chance = thinning_probability(np.array([length]), length, alpha)[0]
            expected = 1 - (chance * thinned(length, alpha) + (1 - chance) * length) / length
            kept = kept_lengths(np.full(20_000, length), length, alpha, seed=1)
            assert 1 - kept.mean() / length == pytest.approx(expected, abs=0.01)
            assert expected == pytest.approx(published[column], abs=0.08)
    rng = np.random.default_rng(0)
    count = np.minimum(rng.lognormal(6.0, 1.0, 50_000).astype(int) + 1, 2048)
    chance = thinning_probability(count, 2048, 1.6)
    expected = (chance * 446 + (1 - chance) * count).mean()
    kept = kept_lengths(count, 2048, 1.6, seed=1)
    assert kept.mean() == pytest.approx(expected, rel=0.01)
    np.testing.assert_array_equal(kept[count <= 446], count[count <= 446])
    assert set(kept[kept < count]) == {446}


def test_alpha_two_keeps_everything():
    count = np.arange(1, 1025)
    np.testing.assert_array_equal(kept_lengths(count, 1024, 2.0, seed=0), count)


def drawn(count, kept, epoch=0, seed=3, example=None, age=None):
    example = np.arange(len(count)) if example is None else np.asarray(example)
    flat = kept_offsets(np.asarray(count), np.asarray(kept), seed=seed, epoch=epoch, example=example, age=age)
    return np.split(flat, np.cumsum(kept)[:-1])


def test_offsets_are_distinct_in_order_and_as_many_as_asked():
    count, kept = np.array([5, 0, 900, 40, 1]), np.array([5, 0, 30, 39, 1])
    for part, n, k in zip(drawn(count, kept), count, kept, strict=True):
        assert len(part) == k and np.all(np.diff(part) > 0)
        assert k == 0 or (part[0] >= 0 and part[-1] < n)


def test_a_draw_depends_on_seed_epoch_and_example_alone():
    count, kept = np.full(8, 200), np.full(8, 20)
    whole = drawn(count, kept)
    for order in ([3], [5, 1], [7, 6, 5, 4, 3, 2, 1, 0]):  # any batch of examples, in any order
        for part, example in zip(drawn(count[order], kept[order], example=order), order, strict=True):
            np.testing.assert_array_equal(part, whole[example])
    others = [*drawn(count, kept, epoch=1), *drawn(count, kept, seed=4), *whole[1:]]
    assert all(np.any(other != whole[0]) for other in others)
    mixed = drawn(count, kept, epoch=np.array([0, 1] * 4))  # a batch that straddles two epochs
    for i, part in enumerate(mixed):
        np.testing.assert_array_equal(part, (whole, drawn(count, kept, epoch=1))[i % 2][i])


def test_recent_events_are_favoured_by_the_stated_weights():
    """One of three events is kept 60,000 times: it is drawn in proportion to 1 - f / sum(f)."""
    runs = 60_000
    count, kept = np.full(runs, 3), np.ones(runs, int)
    share = np.bincount(np.concatenate(drawn(count, kept)), minlength=3) / runs
    np.testing.assert_allclose(share, np.array([1 / 3, 2 / 3, 1]) / 2, atol=0.01)  # ages 2, 1, 0
    by_time = np.bincount(np.concatenate(drawn(count, kept, age=np.tile([90.0, 5.0, 5.0], runs))), minlength=3) / runs
    np.testing.assert_allclose(by_time, np.array([0.1, 0.95, 0.95]) / 2, atol=0.01)
    same = np.bincount(np.concatenate(drawn(count, kept, age=np.zeros(3 * runs))), minlength=3) / runs
    np.testing.assert_allclose(same, 1 / 3, atol=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: thinned(100, 2.5), "alpha = 2.5"),
        (lambda: thinned(0, 1.6), "max_length = 0"),
        (lambda: drawn([3], [4], example=[7]), "example 7: to keep 4 events, but it has 3"),
        (lambda: drawn([3], [2], age=np.zeros(2)), "2 values for 3 events"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(EventLogError, match=message):
        call()
