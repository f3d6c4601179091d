"""Designed simulations with known answers: bias of parabolas, recovery, effects too small to identify, ceilings."""

import numpy as np
import pytest

from recscale.scaling import allocate, fits, isoflop
from recscale.scaling import intervals as sure
from recscale.scaling.forms import FORMS
from recscale.scaling.points import Points
from tests.scaling.test_known_answers import optimum


@pytest.mark.parametrize(
    ("alpha", "beta", "span", "wrong_n", "wrong_d"),
    [
        (0.34, 0.28, 4, 1.32, -1.30),
        (0.34, 0.28, 8, 2.99, -2.9029),
        (0.34, 0.28, 16, 5.37, -5.10),
        (0.465, 0.155, 8, 16.2, -13.9104),
        (0.31, 0.31, 8, 0.0, 0.0),
    ],
)
def test_parabolas_are_biased_without_noise_and_the_surface_fit_is_not(alpha, beta, span, wrong_n, wrong_d):
    a, b, e = 406.4, 410.7, 1.69
    gain = (alpha * a / (beta * b)) ** (1 / (alpha + beta))

    def best(budget):
        return gain * (budget / 6) ** (beta / (alpha + beta))

    budget = np.repeat(np.geomspace(1e17, 1e21, 5), 15)
    size = best(budget) * np.tile(np.geomspace(1 / span, span, 15), 5)
    tokens = budget / (6 * size)
    loss = e + a * size**-alpha + b * tokens**-beta
    lines = [isoflop.isoflop(budget, x, loss).line.at(1e24) for x in (size, tokens)]
    truth = best(1e24), 1e24 / (6 * best(1e24))
    errors = [100 * (found / true - 1) for found, true in zip(lines, truth, strict=True)]
    np.testing.assert_allclose(errors, [wrong_n, wrong_d], atol=0.051)
    if (alpha, span) == (0.34, 8):
        assert round(errors[1], 4) == -2.9029
    law = fits.fit(Points.of({"N": size, "D": tokens}, loss), "additive", delta=1e-3, draws=200)
    np.testing.assert_allclose(allocate.product_optimum(law, 1e24, 6), truth, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_noise_free_sum_of_powers_is_recovered(k):
    rng = np.random.default_rng(k)
    alpha, scale = np.array([0.3, 0.25, 0.2, 0.35])[:k], np.array([0.02, 0.05, 0.1, 0.03])[:k]
    x = np.exp(rng.uniform(0, np.log(256), (k, 32)))
    y = 0.44 + (scale[:, None] * x ** -alpha[:, None]).sum(0)
    names = [f"x{i}" for i in range(k)]
    points = Points.of(dict(zip(names, x, strict=True)), y)
    params, *_ = optimum(points, 1e-3)
    np.testing.assert_allclose(params, [0.44, *scale, *alpha], rtol=1e-6)
    turned = Points.of({name: 1e6 * x[i] for i, name in reversed([*enumerate(names)])}, 7 * y)
    other, *_ = optimum(turned, 1e-3)
    np.testing.assert_allclose(other[-k:][::-1], alpha, rtol=1e-6)
    np.testing.assert_allclose(other[0], 7 * 0.44, rtol=1e-6)


def test_a_repeated_row_counts_as_a_weight_of_two():
    rng = np.random.default_rng(0)
    x = np.geomspace(10, 1e5, 12)
    y = (2 + 3 * x**-0.4) * np.exp(0.002 * rng.standard_normal(12))
    twice = Points.of({"x": np.append(x, x[3])}, np.append(y, y[3]))
    weighted = Points.of({"x": x}, y, weight=np.where(np.arange(12) == 3, 2.0, 1.0))
    first, second = (optimum(p, 1e-3)[:2] for p in (twice, weighted))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-8)
    np.testing.assert_allclose(first[1], second[1], rtol=1e-12)


WUKONG_GFLOP = np.array([0.53, 1.25, 2.12, 5.6, 22.23, 61.0, 108.0])  # arXiv 2403.02545, table 5
WUKONG_LOSS = {1: [-0.35, -0.45, -0.53, -0.6, -0.67, -0.7, -0.76], 2: [-0.32, -0.43, -0.49, -0.6, -0.66, -0.69, -0.76]}


@pytest.mark.parametrize(
    ("task", "slope", "error", "log_score", "power_score"),
    [(1, 0.0703, 0.0070, -35.4, -32.4), (2, 0.0756, 0.0075, -34.4, -30.2)],
)
def test_wukong_table_5(task, slope, error, log_score, power_score):
    points = Points.of({"gflop": WUKONG_GFLOP}, WUKONG_LOSS[task])
    found = fits.compare(points, ("pow_floor", "log"), scale="identity", delta="lsq")
    power, log = found.laws
    assert round(log.params["b"], 4) == slope and round(log.stderr["b"], 4) == error
    assert round(log.aicc, 1) == log_score and round(power.aicc, 1) == power_score
    assert power.verdicts["alpha"] == "weak" and found.best is log
    if task == 1:
        assert round(power.params["E"], 2) == -0.84 and round(power.params["alpha"], 2) == 0.29
        low, high = sure.crossing(*power.profiles["alpha"], sure.stats.f.ppf(0.9, 1, 4))
        np.testing.assert_allclose([low, high], [0.135, 0.458], atol=0.002)


CTR_X = np.geomspace(1, 128, 8)
CTR_Z = np.log(CTR_X) - np.log(CTR_X).mean()
CTR_Y = 0.44 + 0.006 * np.exp(-0.1 * CTR_Z)


def test_a_small_ctr_effect_is_not_identified():
    law = fits.fit(
        Points.of({"x": CTR_X}, CTR_Y, sigma=0.0003 * CTR_Y), "pow_floor", scale="identity", delta="lsq", force=True
    )
    assert law.verdicts == {"E": "not identified", "alpha": "not identified"}
    assert law.intervals["alpha"][0] < 0.03 and 0.18 < law.intervals["alpha"][1] < 0.3
    assert law.gain_per_doubling("x").low > 0, "the gain of a doubling is known where the exponent is not"
    sharp = fits.fit(
        Points.of({"x": CTR_X}, CTR_Y, sigma=0.0001 * CTR_Y), "pow_floor", scale="identity", delta="lsq", force=True
    )
    np.testing.assert_allclose(sharp.intervals["alpha"], (0.06, 0.14), atol=0.015)


@pytest.mark.slow
def test_prediction_interval_covers_a_run_four_times_beyond():
    rng = np.random.default_rng(1)
    truth = 0.44 + 0.006 * np.exp(-0.1 * (np.log(512) - np.log(CTR_X).mean()))
    inside, identified = 0, 0
    for _ in range(200):
        points = Points.of({"x": CTR_X}, CTR_Y * (1 + 0.0003 * rng.standard_normal(8)))
        law = fits.fit(points, "pow_floor", scale="identity", delta="lsq", force=True, draws=500)
        _, low, high = law.prediction({"x": 512.0})
        inside += low[0] <= truth * (1 + 0.0003 * rng.standard_normal()) <= high[0]
        identified += law.verdicts["alpha"] == "identified"
    assert 0.85 <= inside / 200 <= 0.95, inside
    assert identified <= 10


def test_a_saturating_metric_needs_a_ceiling():
    compute = 2.0 ** np.arange(15)
    truth = 0.30 - 0.22 * compute**-0.18
    rng = np.random.default_rng(0)
    errors = {"ceiling": [], "log": [], "log-log": []}
    for _ in range(300):
        y = truth * (1 + 0.003 * rng.standard_normal(15))
        points = Points.of({"C": compute[:9]}, y[:9], metric="recall")
        for form in ("ceiling", "log"):
            params, *_ = optimum(points, np.inf, form, "identity")
            predicted = FORMS[form].predict(params[None], np.log(compute[None, -1:]))[0, 0]
            errors[form].append(predicted / truth[-1] - 1)
        slope, level = np.polyfit(np.log(compute[:9]), np.log(y[:9]), 1)
        errors["log-log"].append(np.exp(level + slope * np.log(compute[-1])) / truth[-1] - 1)
    medians = {name: 100 * np.median(values) for name, values in errors.items()}
    assert abs(medians["ceiling"]) < 0.15, medians
    np.testing.assert_allclose([medians["log"], medians["log-log"]], [26.6, 90.0], atol=0.6)
