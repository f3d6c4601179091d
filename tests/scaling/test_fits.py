"""Laws on one or more axes: planted parameters come back, intervals cover, unsupported laws are refused."""

import math

import numpy as np
import pytest

from recscale.scaling import estimate, fits
from recscale.scaling.forms import FORMS
from recscale.scaling.points import Points

X = np.geomspace(1, 128, 8)
Z = np.log(X) - np.log(X).mean()


def one_axis(x, y, sigma=None, form="pow_floor", **options):
    options = {"scale": "identity", "delta": "lsq", "force": True} | options
    return fits.fit(Points.of({"x": x}, y, sigma=sigma), form, **options)


def two_axes(n=64, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    first, second = (np.exp(rng.uniform(np.log(1e3), np.log(3e5), n)) for _ in range(2))
    return first, second, np.exp(noise * rng.standard_normal(n))


def made(form, seed=3):
    """(points, natural parameters) of a form without noise."""
    first, second, _ = two_axes(seed=seed)
    axes = {"N": first, "D": second}
    params = {
        "pow_floor": [2.0, 30.0, 0.4],
        "additive": [1.8, 40.0, 90.0, 0.3, 0.4],
        "additive_shared": [1.8, 40.0, 90.0, 0.35],
        "gamma": [1.7, 60.0, 300.0, 0.4, 0.5, 0.7],
        "kaplan": [1.5, 2e4, 5e3, 0.3, 0.45],
        "repeat": [1.8, 40.0, 90.0, 0.3, 0.4, 8.0],
        "pow": [40.0, 6.0, 0.4, 0.1],
        "log": [9.0, 0.2, 0.1],
        "constant": [3.0],
        "ceiling": [0.4, 2.0, 3.0, 0.4, 0.5],
        "m4": [0.2, 0.9, 1.3, 30.0, 0.5],
        "bnsl1": [1.0, 20.0, 0.3, 2e4, 0.4, 0.4],
        "hp": [-2.0, -0.3, 0.1],
        "link_linear": [0.9, -0.1],
        "link_exp": [0.1, 5.0, -0.7],
        "link_logistic": [0.05, 0.8, 2.0, 3.2],
    }[form]
    if form in ("pow_floor", "m4", "bnsl1"):
        axes = {"x": np.geomspace(1e3, 1e6, 40)}
    if form == "repeat":
        axes |= {"unique": second / np.exp(np.random.default_rng(1).uniform(0, np.log(30), len(second)))}
    if form == "hp":
        axes |= {"B": np.exp(np.random.default_rng(1).uniform(0, 5, len(second)))}
    if form.startswith("link"):
        axes = {"loss": np.linspace(2.0, 4.5, 30)}
    x_KN = np.stack(list(axes.values()))
    y = FORMS[form].predict(np.array([params]), FORMS[form].coordinates(x_KN))[0]
    return Points.of(axes, y), np.array(params)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_from_noise_free_points(form):
    points, params = made(form)
    scale = "log" if (points.y_N > 0).all() and not form.startswith("link") else "identity"
    law = fits.fit(points, form, scale=scale, delta="lsq", draws=200, force=True)
    assert law.certificate.minimum, law.reasons
    tolerance = 1e-3 if form in ("m4", "bnsl1", "kaplan", "gamma") else 1e-5
    np.testing.assert_allclose(law.params_P, params, rtol=tolerance)
    np.testing.assert_allclose(law.curve(points.x), points.y_N, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_and_coordinates_of_every_form(form):
    points, params = made(form)
    entry = FORMS[form]
    at_KN = entry.coordinates(points.x_KN)
    centre_K = entry.centre(at_KN)
    theta = entry.inner(params[None], centre_K)
    np.testing.assert_allclose(entry.natural(theta, centre_K)[0], params, rtol=1e-9)
    z_KN = at_KN - centre_K[:, None]
    value_SN, jacobian_SNQ = entry.curve(theta, z_KN)
    np.testing.assert_allclose(value_SN[0], points.y_N, rtol=1e-8)
    assert len(entry.names(points.axes)) == len(params)
    for column in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, column] = 1e-6 * max(1.0, abs(theta[0, column]))
        slope = (entry.curve(theta + step, z_KN)[0] - entry.curve(theta - step, z_KN)[0]) / (2 * step[0, column])
        np.testing.assert_allclose(
            jacobian_SNQ[0, :, column], slope[0], rtol=2e-5, atol=1e-8 * np.abs(slope).max() + 1e-12
        )


def test_many_fits_at_once_agree_with_the_reference_optimiser():
    first, second, noise = two_axes(noise=0.004)
    points = Points.of({"N": first, "D": second}, (1.8 + 40 * first**-0.3 + 90 * second**-0.4) * noise)
    for delta in (1e-3, math.inf):
        goal = estimate.objective(FORMS["additive"], points, "log", delta)
        start_CQ = estimate.starts(goal)
        _, many_C = estimate.solve_many(goal, start_CQ)
        for start_Q in start_CQ[:3]:
            reference = estimate.bfgs(goal, estimate.bfgs(goal, start_Q))
            assert goal.at(reference) >= many_C.min() * (1 - 1e-9), "BFGS found a lower loss"
        np.testing.assert_allclose(many_C, many_C.min(), rtol=1e-9)


@pytest.mark.slow
def test_intervals_of_a_surface_cover_the_planted_floor_and_exponents():
    """100 studies drawn from a known surface with the noise of seeds: 90 % intervals cover in at least 85."""
    truth = {"E": 5.0, "alpha_N": 0.35, "alpha_D": 0.3}
    hits = dict.fromkeys(truth, 0)
    for study in range(100):
        first, second, noise = two_axes(48, 0.003, seed=100 + study)
        points = Points.of({"N": first, "D": second}, (5.0 + 20 * first**-0.35 + 12 * second**-0.3) * noise)
        law = fits.fit(points, "additive", seed=study, draws=400, force=True)
        for name, value in truth.items():
            hits[name] += law.intervals[name][0] <= value <= law.intervals[name][1]
    assert all(85 <= count <= 99 for count in hits.values()), hits


def test_intervals_cover_the_planted_floor_and_exponent():
    x = np.geomspace(1e3, 64e3, 7)
    truth = {"E": 3.0, "alpha": 0.5}
    curve = truth["E"] + 40 * x ** -truth["alpha"]
    rng = np.random.default_rng(5)
    hits = {"E": 0, "alpha": 0}
    for number in range(60):
        sigma = 0.004 if number % 2 else None
        law = one_axis(x, curve + 0.004 * rng.standard_normal(7), sigma, draws=300)
        for name, value in truth.items():
            hits[name] += law.intervals[name][0] <= value <= law.intervals[name][1]
    assert all(0.8 <= count / 60 <= 1.0 for count in hits.values()), hits


def test_order_and_units_change_nothing():
    rng = np.random.default_rng(3)
    x = np.geomspace(10, 1e4, 9)
    y = 4 + 3 * x**-0.3 + 0.003 * rng.standard_normal(9)
    base = one_axis(x, y, 0.003)
    order = rng.permutation(9)
    shuffled = one_axis(x[order], y[order], 0.003)
    np.testing.assert_allclose(shuffled.params_P, base.params_P, rtol=1e-8)
    assert shuffled.data_hash == base.data_hash
    scaled = one_axis(1000 * x, y / math.log(2), 0.003 / math.log(2))
    np.testing.assert_allclose(scaled.params["alpha"], base.params["alpha"], rtol=1e-6)
    np.testing.assert_allclose(scaled.params["E"] * math.log(2), base.params["E"], rtol=1e-6)
    np.testing.assert_allclose(scaled.intervals["alpha"], base.intervals["alpha"], rtol=1e-3)


def test_log_linear_data_is_not_called_a_power_law_with_a_floor():
    rng = np.random.default_rng(2)
    x = np.geomspace(1e3, 1e6, 10)
    points = Points.of({"x": x}, 9 - 0.2 * np.log(x) + 0.005 * rng.standard_normal(10))
    found = fits.compare(points, ("pow_floor", "log", "constant"), scale="identity", delta="lsq")
    assert found.best is found["log"]
    assert sum(law.weight for law in found.laws) == pytest.approx(1.0)
    assert not found.gain_per_doubling("x").flat


def test_two_forms_that_fit_alike_are_averaged_and_said_to_be_alike():
    x = np.geomspace(1, 256, 12)
    y = 0.44 + 0.006 * x**-0.1 + 2e-4 * np.sin(3 * np.arange(12))
    found = fits.compare(Points.of({"x": x}, y), ("pow_floor", "log"), scale="identity", delta="lsq")
    assert "indistinguishable" in found.text and found.near
    assert found.mixed({"x": 512.0}).shape[1] == 1


def test_flat_axis_says_flat():
    rng = np.random.default_rng(4)
    flat, falling = (
        fits.compare(Points.of({"x": X}, y), ("pow_floor", "log", "constant"), scale="identity", delta="lsq")
        for y in (3 + 0.01 * rng.standard_normal(8), 3 + X**-0.4 + 0.001 * rng.standard_normal(8))
    )
    assert flat.gain_per_doubling("x").flat and not falling.gain_per_doubling("x").flat


def test_rising_loss_is_refused_as_a_law():
    law = one_axis(X, 3 + 0.1 * np.log(X) + 0.0005 * np.cos(X))
    assert any("not above 0" in reason or "bound" in reason for reason in law.reasons)
    assert law.gain_per_doubling("x").high < 0


def test_floor_below_zero_is_refused():
    x = np.geomspace(1, 512, 10)
    law = one_axis(x, 5 * x**-0.3 - 0.05 * np.log(x))
    assert any("E = " in reason or "lower bound" in reason for reason in law.reasons)
    with pytest.raises(fits.Uncertified, match="pow_floor: no certified law"):
        one_axis(x, 5 * x**-0.3 - 0.05 * np.log(x), force=False)


def test_too_few_points_are_refused_and_replicates_count():
    x = np.geomspace(1, 16, 5)
    y = 2 + x**-0.5 + 0.001 * np.cos(7 * x)
    assert one_axis(x, y).reasons == ("5 points for 3 parameters, needs 9",)
    points = Points.of({"x": x}, y, sigma=0.001, sigma_dof=4)
    found = fits.compare(points, ("pow_floor", "log", "constant"), scale="identity", delta="lsq")
    assert found.best is found["pow_floor"] and found["log"].delta_aicc > 2
    three = one_axis(x[:3], y[:3], 0.001)
    assert any("distinct places" in reason for reason in three.reasons)


def test_sigma_too_small_for_the_scatter_is_set_aside():
    rng = np.random.default_rng(6)
    y = 3 + 2 * X**-0.5 + 0.01 * rng.standard_normal(8)
    honest, boastful = one_axis(X, y), one_axis(X, y, 1e-4)
    assert any("scatter" in note for note in boastful.notes) and not boastful.sigma_trusted
    np.testing.assert_allclose(boastful.intervals["E"], honest.intervals["E"], rtol=1e-3)


def test_weights_follow_sigma():
    y = 3 + 2 * X**-0.5
    y[2] += 0.5
    sigma = np.full(8, 0.001)
    sigma[2] = 100.0
    np.testing.assert_allclose(one_axis(X, y, sigma).params["E"], 3.0, rtol=1e-4)


def test_held_out_points_are_never_seen():
    first, second, noise = two_axes(noise=0.002)
    y = (1.8 + 40 * first**-0.3 + 90 * second**-0.4) * noise
    out = first > np.quantile(first, 0.9)
    with_rung = Points.of({"N": first, "D": second}, np.where(out, 99.0, y), held_out=out)
    without = Points.of({"N": first[~out], "D": second[~out]}, y[~out])
    assert fits.fit(with_rung, draws=200).params == fits.fit(without, draws=200).params


def test_starts_that_disagree_are_refused():
    points = Points.of({"x": X}, 3 + 2 * X**-0.5 + 1e-3 * np.cos(X))
    goal, theta_Q, losses, _ = fits.minimum(points, "pow_floor", "identity", math.inf)
    params = {"E": 1.0, "A": 1.0, "alpha": 1.0}
    apart = np.append(losses.min(), losses.min() + np.arange(1, 8))
    proof = estimate.certificate(goal, points, theta_Q, params, apart)
    assert not proof.minimum and any("starts" in reason for reason in proof.reasons)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "cubic"}, "form: found 'cubic'"),
        ({"draws": 20}, "draws: found 20"),
        ({"delta": "huber"}, "delta: found 'huber'"),
        ({"delta": -1.0}, "delta: found -1.0"),
        ({"scale": "sqrt"}, "scale: found 'sqrt'"),
        ({"form": "gamma"}, "found 1 axes"),
        ({"bootstrap": "jackknife"}, "bootstrap: found 'jackknife'"),
    ],
)
def test_bad_requests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        one_axis(X, 3 + X**-0.5, **changes)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 0, 2], [1, 2, 3], "x: found 0 in run 1, expected a finite size above 0"),
        ([1, 2], [1, math.nan], "loss: found nan in run 1"),
        ([1, 2], [1], "x: 2 values for 1 of loss"),
        ([], [], "no points"),
    ],
)
def test_bad_points_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        Points.of({"x": x}, y)


def test_all_problems_are_said_at_once():
    with pytest.raises(ValueError) as error:
        Points.of({"N": [1, -1], "D": [math.inf, 2]}, [1, math.nan])
    assert len(str(error.value).splitlines()) == 3
