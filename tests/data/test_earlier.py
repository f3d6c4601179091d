"""Past counts, sums and rates against a loop over strictly earlier events, and no word from the event itself."""

import numpy as np
import pytest

from recscale.data.earlier import UNIT, earlier, past_rates


def make_events(n: int = 150, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, times with many ties, two values per event, in random order."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 6, n), rng.integers(0, 25, n), rng.random((n, 2))


def test_counts_and_sums_equal_a_loop():
    key, time, values = make_events()
    count, total = earlier(key, time, values)
    for i in range(len(key)):
        before = (key == key[i]) & (time < time[i])
        assert count[i] == before.sum()
        np.testing.assert_allclose(total[i], values[before].sum(axis=0), atol=150 * UNIT)
    np.testing.assert_array_equal(earlier(key, time, values[:, 1])[1], total[:, 1])


def test_rates_are_smoothed_by_everybody_before():
    key, time, values = make_events()
    rates = past_rates(key, time, values, prior=5.0)
    for i in range(len(key)):
        before, mine = time < time[i], (key == key[i]) & (time < time[i])
        mean = values[before].mean(axis=0) if before.any() else np.zeros(2)
        want = (values[mine].sum(axis=0) + 5 * mean) / (mine.sum() + 5)
        np.testing.assert_allclose(rates[i], want, atol=2 * UNIT)


@pytest.mark.parametrize("moment", [0, 7, 24])
def test_nothing_of_the_present_or_the_future_is_read(moment: int):
    key, time, values = make_events()
    other = np.where((time >= moment)[:, None], 1e6, values)
    for function in (past_rates, lambda *events: earlier(*events)[1]):
        past = time <= moment
        np.testing.assert_array_equal(function(key, time, values)[past], function(key, time, other)[past])
        assert (function(key, time, values)[~past] != function(key, time, other)[~past]).any() or moment == 24


def test_the_order_of_rows_does_not_matter():
    key, time, values = make_events()
    mixed = np.random.default_rng(1).permutation(len(key))
    np.testing.assert_array_equal(
        past_rates(key[mixed], time[mixed], values[mixed]), past_rates(key, time, values)[mixed]
    )


def test_no_events_are_no_error():
    count, total = earlier(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3)))
    assert count.shape == (0,) and total.shape == (0, 3)
