import numpy as np
import pytest

from recscale.data import packing
from recscale.data.event_log import EventLogError


def long_tail(count: int, cap: int, seed: int = 0) -> np.ndarray:
    lengths = np.random.default_rng(seed).lognormal(np.log(43), 1.1, count).astype(np.int64)
    return np.clip(lengths, 1, cap)


def row_sums(plan: packing.Plan, lengths: np.ndarray) -> np.ndarray:
    return np.add.reduceat(lengths[plan.segments], plan.row_offsets[:-1])


@pytest.mark.parametrize("make", [packing.plan, packing.plan_in_order, packing.plan_padded])
@pytest.mark.parametrize(
    "lengths",
    [
        long_tail(3000, 200),
        np.ones(1000, np.int64),
        np.full(1000, 101),
        np.full(50, 200),
        np.array([7]),
        np.array([200, 1, 199, 1, 100, 100, 51, 50, 49, 50]),
    ],
    ids=["tail", "ones", "over_half", "full", "single", "exact"],
)
def test_every_example_is_in_one_row_and_rows_fit(make, lengths):
    plan = make(lengths, 200)
    np.testing.assert_array_equal(np.sort(plan.segments), np.arange(len(lengths)))
    assert plan.row_offsets[0] == 0 and plan.row_offsets[-1] == len(lengths)
    assert np.diff(plan.row_offsets).min() >= 1
    assert row_sums(plan, lengths).max() <= 200
    assert plan.fill(lengths) == pytest.approx(lengths.sum() / (plan.num_rows * 200))


@pytest.mark.parametrize("window_users", [256, 1000, 65536])
def test_windows_change_rows_not_the_contract(window_users):
    lengths = long_tail(5000, 200)
    plan = packing.plan(lengths, 200, window_users=window_users)
    np.testing.assert_array_equal(np.sort(plan.segments), np.arange(5000))
    assert row_sums(plan, lengths).max() <= 200


@pytest.mark.parametrize("row_length", [50, 200, 1024])
def test_long_tail_fills_rows(row_length):
    lengths = long_tail(50_000, row_length)
    assert packing.plan(lengths, row_length).fill(lengths) >= 0.98
    assert packing.plan_in_order(lengths, row_length).fill(lengths) >= 0.97


def test_plan_follows_from_lengths_and_seed_alone():
    lengths = long_tail(2000, 200)
    one, same, other = (
        packing.plan(lengths, 200, seed=3),
        packing.plan(lengths, 200, seed=3),
        packing.plan(lengths, 200),
    )
    np.testing.assert_array_equal(one.segments, same.segments)
    np.testing.assert_array_equal(one.row_offsets, same.row_offsets)
    assert not np.array_equal(one.segments, other.segments)


def test_in_order_plan_keeps_windows_of_the_log_together():
    plan = packing.plan_in_order(long_tail(1000, 200), 200, window_users=100)
    row = np.repeat(np.arange(plan.num_rows), np.diff(plan.row_offsets))
    windows = plan.segments // 100
    assert all(len(np.unique(windows[row == r])) == 1 for r in range(plan.num_rows))
    assert (np.diff(windows) >= 0).all()


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11]])
@pytest.mark.parametrize("make", [packing.plan, packing.plan_in_order, packing.plan_padded])
def test_lengths_that_do_not_fit_are_refused(make, lengths):
    with pytest.raises(EventLogError, match=r"expected 1\.\.row_length=10"):
        make(np.array(lengths), 10)
