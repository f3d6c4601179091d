"""From a law to the next runs: best sizes under several costs, frontiers, gains, designs that shrink the interval."""

import numpy as np
import pytest

from recscale.scaling import allocate, fits
from recscale.scaling.points import Points

FLOPS = allocate.product_cost(6, "N", "D")


def made(rising=False, seed=0):
    rng = np.random.default_rng(seed)
    size, data = (np.exp(rng.uniform(np.log(1e4), np.log(1e6), 60)) for _ in range(2))
    fall = 8 * size**-0.35 + 20 * data**-0.4
    if rising:
        y = 0.6 - 0.5 * fall + 0.0005 * rng.standard_normal(60)
        return fits.fit(Points.of({"N": size, "D": data}, y), "ceiling", scale="identity", delta="lsq", draws=200)
    return fits.fit(Points.of({"N": size, "D": data}, (2 + fall) * np.exp(0.001 * rng.standard_normal(60))), draws=200)


@pytest.fixture(scope="module")
def law():
    return made()


def test_product_cost_gives_the_closed_form(law):
    found = allocate.minimise(law, {"flops": (FLOPS, 3e12)})
    np.testing.assert_allclose([*found.sizes.values()], allocate.product_optimum(law, 3e12, 6), rtol=1e-5)
    assert found.binding == ("flops",) and found.at_reach == ()


def test_a_serving_budget_moves_sizes_into_data(law):
    free = allocate.minimise(law, {"flops": (FLOPS, 3e12)})
    served = {"flops": (FLOPS, 3e12), "serving": (lambda x: 2 * x["N"], free.sizes["N"])}
    tight = allocate.minimise(law, served | {"serving": (served["serving"][0], free.sizes["N"] / 2)})
    np.testing.assert_allclose(tight.sizes["N"], free.sizes["N"] / 4, rtol=1e-3)
    assert set(tight.binding) == {"flops", "serving"} and tight.value > free.value


def test_sizes_at_the_end_of_the_reach_are_named(law):
    found = allocate.minimise(law, {"flops": (FLOPS, 1e30)})
    assert set(found.at_reach) == {"N", "D"} and not found.binding


def test_a_rising_metric_is_made_large():
    law = made(rising=True)
    small, large = (allocate.minimise(law, {"flops": (FLOPS, c)}) for c in (1e11, 1e12))
    assert large.value > small.value and large.sizes["N"] > small.sizes["N"]


def test_frontier_has_bands_that_hold_the_best(law):
    found = allocate.frontier(law, FLOPS, [1e11, 1e12], draws=20)
    for best, low, high in (*found.sizes.values(), found.value):
        assert (low <= best * 1.05).all() and (best <= high * 1.05).all()


def test_doublings_are_in_order_with_cost_factors(law):
    rows = allocate.doublings(law, {"flops": FLOPS})
    assert [row.factors["flops"] for row in rows] == [pytest.approx(2.0)] * 2
    assert rows[0].gain.value >= rows[1].gain.value > 0
    with pytest.raises(ValueError, match="axis: found 'width'"):
        law.gain_per_doubling("width")


def test_next_points_shrink_the_interval_and_really_do(law):
    grid = np.stack(np.meshgrid(np.geomspace(1e4, 4e6, 6), np.geomspace(1e4, 4e6, 6)), -1).reshape(-1, 2)
    target = {"N": 4e6, "D": 4e6}
    chosen = allocate.next_points(law, {"N": grid[:, 0], "D": grid[:, 1]}, target, cost=FLOPS, budget=1e14, most=5)
    left = [point.width_left for point in chosen]
    assert left == sorted(left, reverse=True) and left[-1] < 0.9
    places = [tuple(point.sizes.values()) for point in chosen]
    assert max(places.count(place) for place in places) <= 2
    assert sum(point.cost for point in chosen) <= 1e14


def test_a_measured_cost_is_fitted_in_logs():
    rng = np.random.default_rng(1)
    x = {"N": np.exp(rng.uniform(5, 10, 30)), "D": np.exp(rng.uniform(5, 10, 30))}
    cost = allocate.fitted_cost(x, 7 * x["N"] ** 1.1 * x["D"] ** 0.9)
    assert cost.exponents == pytest.approx({"N": 1.1, "D": 0.9}) and cost.residual_sd < 1e-9
    np.testing.assert_allclose(cost({"N": 10.0, "D": 20.0}), 7 * 10**1.1 * 20**0.9)


@pytest.mark.parametrize(
    ("budgets", "fixed", "message"),
    [
        ({"flops": (FLOPS, 0.0)}, None, "budgets: found"),
        ({"flops": (FLOPS, 1e3)}, None, "no sizes within 1.5 decades"),
        ({"flops": (FLOPS, 1e12)}, {"N": 1e5, "D": 1e5}, "some, not all"),
        ({"flops": (FLOPS, 1e12)}, {"width": 8}, "fixed: found width"),
    ],
)
def test_impossible_requests_are_refused(law, budgets, fixed, message):
    with pytest.raises(ValueError, match=message):
        allocate.minimise(law, budgets, fixed=fixed)
    with pytest.raises(ValueError, match="expected numbers above 0"):
        allocate.next_points(law, {"N": [1e5], "D": [1e5]}, law.corner(), cost=lambda x: 0.0, budget=1.0)
