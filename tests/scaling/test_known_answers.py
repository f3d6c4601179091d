"""Published scaling-law runs and designed simulations with known answers. Real runs come through RECSCALE_DATA."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import csv
from scipy import optimize

from recscale.scaling import allocate, estimate, fits, isoflop
from recscale.scaling import intervals as sure
from recscale.scaling.forms import FORMS
from recscale.scaling.points import Points

CHINCHILLA = {"E": 1.817218099, "A_params": 477.8258681, "A_tokens": 2143.417364}
HOFFMANN_LOGS = (6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083)


def read(name):
    """Columns of a table of real runs; skips where they are not at hand."""
    if "RECSCALE_DATA" not in os.environ:
        pytest.skip("RECSCALE_DATA is not set: the real scaling-law runs are not at hand")
    path = Path(os.environ["RECSCALE_DATA"]) / "scaling" / name
    table = csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    return {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}


def epoch(kept=240):
    """The runs read off Hoffmann et al.'s figure, without the five of highest loss (or with them: 245)."""
    t = read("chinchilla_epoch.csv")
    mask = t["loss"] < np.sort(t["loss"])[-5] if kept == 240 else t["loss"] > 0
    assert mask.sum() == kept
    return Points.of({"params": t["params"][mask], "tokens": t["tokens"][mask]}, t["loss"][mask])


def optimum(points, delta, form="additive", scale="log"):
    """(natural parameters, sum of Huber losses, objective, theta, losses of all starts)."""
    goal, theta_Q, losses, _ = fits.minimum(points, form, scale, delta)
    return goal.form.natural(theta_Q[None], goal.centre_K)[0], goal.at(theta_Q), goal, theta_Q, losses


def at(points, params, delta=1e-3, form="additive"):
    """The sum of Huber losses at given natural parameters."""
    goal = estimate.objective(FORMS[form], points, "log", delta)
    return goal.at(goal.form.inner(np.array([params], np.float64), goal.centre_K)[0])


@pytest.mark.parametrize(
    ("kept", "delta", "expected", "objective"),
    [
        (240, 1e-3, (1.817218099, 477.8258681, 2143.417364, 0.3473104989, 0.3671724326), 0.0010182740178006),
        (245, 1e-3, (1.891338, 495.726, 12845.6, 0.3493129, 0.4530493), 0.00182601052),
        (240, np.inf, (1.86455, 593.322, 4875.64, 0.360253, 0.405883), 0.00573094350),
    ],
)
def test_huber_optimum_of_the_epoch_points(kept, delta, expected, objective):
    params, value, *_ = optimum(epoch(kept), delta)
    np.testing.assert_allclose(value, objective, rtol=1e-8 if (kept, delta) == (240, 1e-3) else 1e-6)
    np.testing.assert_allclose(params, expected, rtol=1e-4 if kept == 240 and delta == 1e-3 else 2e-5)
    if delta == 1e-3 and kept == 240:
        assert round(params[4] / (params[3] + params[4]), 5) == 0.51390


def test_least_absolute_deviations_of_the_epoch_points():
    points = epoch()
    params, _, goal, theta_Q, _ = optimum(points, 0.0)
    np.testing.assert_allclose(params, [1.816864, 482.006, 2085.436, 0.3478131, 0.3658542], rtol=2e-6)
    residual = goal.residuals(theta_Q[None], goal.y_N[None])[0][0]
    np.testing.assert_allclose(np.abs(residual).sum(), 1.12949465, rtol=1e-8)
    np.testing.assert_allclose(at(points, params), 0.00101864, rtol=1e-5)


def test_huber_loss_at_published_parameters():
    points = epoch()
    a, b, e, alpha, beta = HOFFMANN_LOGS
    unrounded = (np.exp(e), np.exp(a), np.exp(b), alpha, beta)
    for params, expected in (
        (unrounded, 0.00123116),
        ((1.69, 406.4, 410.7, 0.34, 0.28), 0.00412101),
        ((1.69, 406.4, 410.7, 0.339, 0.285), 0.00134055),
        ((1.8172, 482.01, 2085.43, 0.3478, 0.3658), 0.00102284),
    ):
        np.testing.assert_allclose(at(points, params), expected, rtol=1e-5)


def test_case_bootstrap_of_the_epoch_points():
    law = fits.fit(epoch(), "additive", delta=1e-3, draws=500)
    assert law.bootstrap == "case" and law.certified
    errors = dict(zip(law.params, law.draws_SP.std(0), strict=True))
    for name, published in (("A_params", 116), ("E", 0.026), ("alpha_params", 0.0146), ("alpha_tokens", 0.0208)):
        assert abs(errors[name] / published - 1) < 0.25, (name, errors[name])
    alpha, beta = law.draws_SP[:, 3], law.draws_SP[:, 4]
    low, high = np.quantile(beta / (alpha + beta), (0.025, 0.975))
    assert 0.47 <= low < high <= 0.57
    for name, (low, high) in {  # the profile: 2 n ln(obj / obj_min) <= 2.706
        "alpha_params": (0.330, 0.3625),
        "alpha_tokens": (0.3525, 0.380),
        "E": (1.7925, 1.840),
    }.items():
        np.testing.assert_allclose(sure.crossing(*law.profiles[name], 2.706), (low, high), rtol=0.01)


def test_points_of_one_lineage_are_resampled_together():
    points = epoch()
    lineage = [f"{np.log(size):.2f}" for size in points.x["params"]]
    assert len(set(lineage)) == 42
    clustered = Points.of(points.x, points.y_N, lineage=lineage)
    alone, together = (fits.fit(p, "additive", delta=1e-3, draws=1000) for p in (points, clustered))
    assert together.bootstrap == "cluster"
    ratio = together.draws_SP.std(0) / alone.draws_SP.std(0)
    assert 1.1 < ratio[3] < 1.4, "points of one size are not independent: alpha is less sure"


def test_compute_optimal_sizes():
    law = fits.fit(epoch(), "additive", delta=1e-3, draws=200)
    found = allocate.minimise(law, {"flops": (allocate.product_cost(6, "params", "tokens"), 5.76e23)})
    np.testing.assert_allclose(found.sizes["params"], 7.319e10, rtol=1e-4)
    np.testing.assert_allclose(found.sizes["tokens"], 1.3116e12, rtol=1e-4)
    assert found.binding == ("flops",)
    np.testing.assert_allclose([*found.sizes.values()], allocate.product_optimum(law, 5.76e23, 6), rtol=1e-6)
    a, b, e, alpha, beta = HOFFMANN_LOGS
    for params, ratio in (
        (law.params_P, 17.92),
        ((1.8172, 482.01, 2085.43, 0.3478, 0.3658), 18.39),
        ((1.69, 406.4, 410.7, 0.34, 0.28), 92.65),
        ((np.exp(e), np.exp(a), np.exp(b), alpha, beta), 58.93),
    ):
        first, second = allocate.product_optimum(law, 5.76e23, 6, np.array(params))
        np.testing.assert_allclose(second / first, ratio, rtol=3e-4)


def test_kyo_takano_points():
    t = read("kyo_takano_llm.parquet")
    points = Points.of({"N": t["N"], "D": t["D"]}, t["loss"])
    params, value, *_ = optimum(points, 1e-3)
    np.testing.assert_allclose(params, [1.7838941, 442.16406, 1271.808, 0.34262604, 0.3420019], rtol=1e-5)
    np.testing.assert_allclose(value, 0.00084009311996, rtol=1e-8)
    params, *_ = optimum(points, np.inf)
    np.testing.assert_allclose(params, [1.7962382, 510.7871, 1335.5636, 0.35126133, 0.34406154], rtol=1e-5)


ISOFLOPS = {  # A, B, E, alpha, beta, objective, exponent of N* by surface, by parabolas (budgets used)
    "ml_scalefit": (819.00, 3614.3, 1.87223, 0.377696, 0.392781, 0.00057926219, 0.5098, 0.5105, 8),
    "epochai_chinchilla": (1167.14, 43438.7, 1.96428, 0.397484, 0.509185, 0.00123502759, 0.5616, 0.4920, 8),
    "llama_3__exp_loss": (183.921, 979.162, 1.82748, 0.326679, 0.365430, 0.00025454504, 0.5280, 0.4631, 10),
    "llama_3__raw_loss": (38.329, 160.226, 0.594193, 0.283517, 0.315656, 0.00039046785, 0.5268, 0.4632, 10),
    "marin_202603__comma": (216045, 1393.16, 2.70093, 0.665783, 0.349911, 0.00052556341, 0.3445, 0.4049, 7),
    "marin_202603__dclm": (347108, 4082.87, 2.58796, 0.685817, 0.404819, 0.00053583718, 0.3712, 0.4236, 7),
    "marin_202603__nemotron": (143077, 3798.25, 2.52024, 0.639252, 0.400373, 0.00055373178, 0.3851, 0.4224, 7),
    "misfitting": (35988.7, 1.57962e6, 2.69155, 0.610210, 0.704788, 0.00172964176, 0.5360, 0.4811, 19),
}


@pytest.mark.parametrize("experiment", ISOFLOPS)
def test_isoflop_tables_of_five_studies(experiment):
    t = read("isoflops_openathena.parquet")
    mask = np.array([str(name).startswith(experiment) for name in t["experiment"]])
    size, tokens, budget, loss = (t[name][mask].astype(float) for name in ("params", "tokens", "budget", "loss"))
    params, value, *_ = optimum(Points.of({"N": size, "D": tokens}, loss), 1e-3)
    a, b, e, alpha, beta, objective, by_surface, by_parabola, used = ISOFLOPS[experiment]
    np.testing.assert_allclose(params, [e, a, b, alpha, beta], rtol=2e-5)
    np.testing.assert_allclose(value, objective, rtol=2e-8)
    assert round(params[4] / (params[3] + params[4]), 4) == by_surface
    line = isoflop.isoflop(budget, size, loss).line
    assert (round(line.exponent, 4), line.count) == (by_parabola, used)
    if experiment == "llama_3__exp_loss":
        assert round(isoflop.isoflop(budget, tokens, loss).line.exponent, 4) == 0.5369


def averaged_fitter(points, starts=40):
    """The published mistake: averaged loss, raw coordinates, default tolerances (parameters, success, losses)."""
    log_n, log_d, log_y = np.log(points.x["params"]), np.log(points.x["tokens"]), np.log(points.y_N)

    def loss(theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
        top = terms.max(0)
        predicted = top + np.log(np.exp(terms - top).sum(0))
        share = np.exp(terms - predicted)
        r = predicted - log_y
        pull = np.clip(r, -1e-3, 1e-3)
        rows = np.stack([share[0], share[1], share[2], -share[0] * log_n, -share[1] * log_d])
        return float(estimate.rho(r, 1e-3).mean()), (rows * pull).mean(1)

    rng = np.random.default_rng(0)
    terms, limits, exponents = [0, 5, 10, 15, 20, 25], [-1, -0.5, 0, 0.5, 1], [0, 0.5, 1, 1.5, 2]
    grid = np.stack(np.meshgrid(terms, terms, limits, exponents, exponents), -1).reshape(-1, 5)
    found = [optimize.minimize(loss, start, jac=True, method="L-BFGS-B") for start in rng.choice(grid, starts)]
    best = min(found, key=lambda one: one.fun)
    a, b, e, alpha, beta = best.x
    return (
        np.array([np.exp(e), np.exp(a), np.exp(b), alpha, beta]),
        all(one.success for one in found),
        [one.fun for one in found],
    )


def synthetic_twin():
    """240 runs like the real ones, drawn from a known surface."""
    rng = np.random.default_rng(11)
    size = np.exp(rng.uniform(np.log(6e7), np.log(1.6e10), 240))
    tokens = np.exp(rng.uniform(np.log(2e9), np.log(3e11), 240))
    loss = (1.82 + 478 * size**-0.347 + 2143 * tokens**-0.367) * np.exp(0.004 * rng.standard_t(3, 240))
    return Points.of({"params": size, "tokens": tokens}, loss)


@pytest.mark.parametrize("source", [epoch, synthetic_twin])
def test_certificate_refuses_the_averaged_loss(source):
    points = source()
    params, success, values = averaged_fitter(points)
    assert success, "the optimiser says success of every start"
    goal = estimate.objective(FORMS["additive"], points, "log", 1e-3)
    theta_Q = goal.form.inner(params[None], goal.centre_K)[0]
    names = goal.form.names(points.axes)
    losses = np.sort(values)[:8] * len(points)
    proof = estimate.certificate(goal, points, theta_Q, dict(zip(names, params, strict=True)), losses)
    assert not proof.minimum and proof.gradient > 1 and any("not a minimum" in reason for reason in proof.reasons)
    best, value, _, best_theta, honest = optimum(points, 1e-3)
    assert goal.at(theta_Q) > 1.01 * value
    assert not estimate.certificate(goal, points, best_theta, dict(zip(names, best, strict=True)), honest).reasons


def test_published_isoflop_exponents_are_reproduced():
    optima, published = read("porian_isoflop_optima.parquet"), read("porian_published_fits.parquet")
    keys = ("table", "dataset", "hparams", "warmup", "decay", "param_count", "val")
    labels = [*zip(*(optima[key] for key in keys), strict=True)]
    found = {}
    for index, label in enumerate(zip(*(published[key] for key in keys), strict=True)):
        kind = published["fit"][index]
        if kind not in ("basic", "weighted"):
            continue
        for size in ("n", "t"):
            rows = [i for i, other in enumerate(labels) if other == label]
            rows = [i for i in rows if np.isfinite(optima[size][i]) and np.isfinite(optima[f"{size}_star_std"][i])]
            weights = 1 / optima[f"{size}_star_std"][rows] ** 2 if kind == "weighted" else None
            line = isoflop.power_line(optima["flops"][rows], optima[size][rows], weights)
            np.testing.assert_allclose(line.exponent, published[f"{size}_exponent"][index], rtol=1e-11)
            found[label, kind, size] = line.exponent
    assert len(found) >= 60
    slow = ("summary_df", "rw", "base", "long", "kaplan", "kaplan", "train")
    assert [round(found[slow, kind, "n"], 6) for kind in ("basic", "weighted")] == [0.833768, 0.8353]


def test_gemstones_fits_and_their_narrow_axis():
    t = read("gemstones.parquet")

    def subset(name):
        mask = t["subset"] == name
        return Points.of({"N": t["params_active_precise"][mask], "D": t["tokens"][mask]}, t["final_loss"][mask])

    for name, n, expected, objective in (
        ("cool_end", 199, (2.0747837, 226.132792, 271661.02, 0.300360567, 0.580167288), 0.00196408643),
        ("slim_chinchilla", 28, (1.5985568, 58.728652, 58727.6, 0.21403905, 0.52598622), 0.000120436),
    ):
        points = subset(name)
        assert len(points) == n
        params, value, *_ = optimum(points, 1e-3)
        np.testing.assert_allclose(params, expected, rtol=2e-4)
        np.testing.assert_allclose(value, objective, rtol=1e-5)
    points = subset("hot_100b+_512x")
    assert len(points) == 175
    params, value, *_ = optimum(points, 1e-3)
    np.testing.assert_allclose(params[[0, 2, 3, 4]], [3.01415, 111151, 4.503, 0.5560], rtol=2e-3)
    np.testing.assert_allclose(value, 0.000078591, rtol=1e-4)
    law = fits.fit(points, "additive", delta=1e-3, draws=200, force=True)
    spans = {axis: np.log10(high / low) for axis, (low, high) in law.domain.items()}
    assert law.certificate.minimum and spans["N"] < 0.1, "a clean minimum on an axis of a tenth of a decade"


def test_public_seed_noise():
    t = read("routing_curves.parquet")
    mask = (t["d_model"] == 896) & (t["router_type"] == "Dense") & np.isin(t["seed"], (1, 2, 3))
    mask &= t["step"] == t["step"][mask].max()
    last = t["loss_validation"][mask]
    assert len(last) == 3 and round(100 * last.std(ddof=1) / last.mean(), 4) == 0.0251


def test_loss_to_loss_parameters_of_both_forms():
    sweep, published = read("loss_to_loss_sweep.parquet"), read("loss_to_loss_fits.parquet")
    metric = "eval/c4_val/CrossEntropyLoss"
    errors = {"additive": [], "kaplan": []}
    for i in np.flatnonzero(published["loss_name"] == metric):
        form = "kaplan" if published["kaplan"][i] else "additive"
        params = np.array([[published[name][i] for name in ("E", "A", "B", "alpha", "beta")]])
        mask = (sweep["data"] == published["data"][i]) & np.isfinite(sweep[metric].astype(float))
        log_x = np.log(np.stack([sweep["params"][mask], sweep["tokens"][mask]]).astype(float))
        left = FORMS[form].predict(params, log_x)[0] - sweep[metric][mask].astype(float)
        errors[form].append(float(np.sqrt(np.square(left).mean())))
    for form, low, high in (("additive", 0.0094, 0.0219), ("kaplan", 0.0267, 0.0404)):
        assert len(errors[form]) == 6
        np.testing.assert_allclose([min(errors[form]), max(errors[form])], [low, high], atol=5.1e-5)
