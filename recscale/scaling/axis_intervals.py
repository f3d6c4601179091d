"""Uncertainty of a fitted form: noise scale, vectorised bootstrap, profile likelihood, verdicts.

N points, S bootstrap draws, P parameters, K values of a profile.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

from recscale.scaling.axis_estimate import Points, fit_many, solve
from recscale.scaling.axis_forms import EXPONENT_BOUNDS, Form

LEVEL = 0.90
RESIDUAL_BOOTSTRAP_FROM = 20
PROFILE_VALUES = 160
IDENTIFIED, WEAK = 0.5, 1.5  # interval width over value


@dataclasses.dataclass(frozen=True)
class Noise:
    """variance: of a residual in units of sigma^2; dof: degrees of freedom behind it (inf if known, 0 if unknown).

    trusted: sigma is known and the points agree with it.
    """

    variance: float
    dof: float
    note: str
    trusted: bool


def noise_scale(rss: float, n: int, p: int, sigma_known: bool, sigma_dof: float) -> Noise:
    """How far sigma is trusted: pooled with the residuals, or set aside where the points scatter significantly more.

    sigma_dof: degrees of freedom sigma was estimated from (replicates less cells), inf if known.
    """
    left = n - p
    if not sigma_known:
        return (
            Noise(rss / left, left, "", False)
            if left > 0
            else Noise(math.nan, 0, "no residual degree of freedom", False)
        )
    if left > 0 and stats.f.sf(rss / left, left, min(sigma_dof, 1e9)) < 0.05:
        return Noise(rss / left, left, f"the points scatter {math.sqrt(rss / left):.1f} sigma around the curve", False)
    if math.isinf(sigma_dof):
        return Noise(1.0, math.inf, "", True)
    return Noise((rss + sigma_dof) / (max(left, 0) + sigma_dof), max(left, 0) + sigma_dof, "", True)


def bootstrap(
    form: Form, data: Points, fitted_N: np.ndarray, noise: Noise, lower: float | None, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """parameters_SP refitted to data drawn around the fit, and residual_S, the residual of a new run in each draw.

    Fewer than 20 points: normal noise, whose variance is drawn from its scaled inverse chi-square when it was estimated
    (resampling few points would drop an end of the axis). From 20 on: the plain residuals are resampled.
    """
    rng = np.random.default_rng(seed)
    n = len(data.y_N)
    variance_S = np.full(draws, noise.variance)
    if 0 < noise.dof < math.inf:
        variance_S *= noise.dof / rng.chisquare(noise.dof, draws)
    pool = rng.standard_normal((draws, n + 1))
    if n >= RESIDUAL_BOOTSTRAP_FROM:
        residual_N = (data.y_N - fitted_N) / data.sigma_N
        residual_N = residual_N - residual_N.mean()
        if residual_N.std() > 0:
            pool = rng.choice(residual_N / residual_N.std(), (draws, n + 1))
    sd_S = np.sqrt(variance_S)
    drawn_SN = fitted_N + data.sigma_N * sd_S[:, None] * pool[:, :n]
    residual_S = float(np.median(data.sigma_N)) * sd_S * pool[:, n]
    return fit_many(form, data, drawn_SN, lower)[0], residual_S


def percentiles(values_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 90 % percentile interval along the first axis."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values_SN, (tail, 1 - tail), axis=0)
    return low, high


def profile(
    form: Form, data: Points, name: str, value: float, rss: float, noise: Noise, lower: float | None
) -> tuple[float, float]:
    """90 % profile-likelihood interval of the exponent or of the floor, cut at the bounds."""
    quantile = stats.f.ppf(LEVEL, 1, noise.dof) if math.isfinite(noise.dof) else stats.chi2.ppf(LEVEL, 1)
    limit = float(rss + noise.variance * quantile + 1e-12 * rss)
    if name == "alpha":
        offsets = np.append(0.0, np.geomspace(1e-6, math.log(EXPONENT_BOUNDS[1] / EXPONENT_BOUNDS[0]), PROFILE_VALUES))
        candidates = [np.clip(value * np.exp(side * offsets), *EXPONENT_BOUNDS) for side in (-1, 1)]
        sums = [_rss_at_exponent(form, data, alpha_K, lower) for alpha_K in candidates]
    else:
        spread = float(np.ptp(data.y_N)) or 1.0
        offsets = np.append(0.0, np.geomspace(1e-7, 1e3, PROFILE_VALUES)) * spread
        candidates = [np.maximum(value + side * offsets, -np.inf if lower is None else lower) for side in (-1, 1)]
        sums = [fit_many(form.without_floor(), data, data.y_N - floor_K[:, None])[1] for floor_K in candidates]
    low, high = (_crossing(v, s, limit) for v, s in zip(candidates, sums, strict=True))
    return min(low, value), max(high, value)


def _rss_at_exponent(form: Form, data: Points, alpha_K: np.ndarray, lower: float | None) -> np.ndarray:
    y_KN = np.broadcast_to(data.y_N, (len(alpha_K), len(data.y_N)))
    coefficients_KQ, rss_K = solve(form, data, y_KN, alpha_K)
    if form.floor is None or lower is None:
        return rss_K
    floor_K = form.natural(coefficients_KQ, alpha_K, data.centre)[:, form.parameters.index(form.floor)]
    return np.where(floor_K < lower, solve(form.without_floor(), data, y_KN - lower, alpha_K)[1], rss_K)


def _crossing(value_K: np.ndarray, rss_K: np.ndarray, limit: float) -> float:
    """The farthest value (values run outwards) whose sum is below the limit, interpolated to the next one."""
    inside = np.flatnonzero(rss_K <= limit)
    last = int(inside[-1]) if len(inside) else 0
    if last == len(value_K) - 1:
        return float(value_K[-1])
    rise = rss_K[last + 1] - rss_K[last]
    share = (limit - rss_K[last]) / rise if rise > 0 and len(inside) else 0.0
    return float(value_K[last] + share * (value_K[last + 1] - value_K[last]))


def verdict(size: float, interval: tuple[float, float], at_bound: bool) -> str:
    """identified, weak or not identified, by the width of the interval over the size of what it is about."""
    width = (interval[1] - interval[0]) / abs(size) if size else math.inf
    if not math.isfinite(width) or width > WEAK:
        return "not identified"
    return "identified" if width <= IDENTIFIED and not at_bound else "weak"
