"""One-axis laws with their uncertainty: `fit_axis` fits one form, `compare` sets forms against each other.

Weighted least squares on the metric itself, weights 1/sigma^2. A fit that fails its certificate keeps its numbers and
its reasons, but `certified` is False and no reader should print it as a law.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from recscale.scaling.axis_estimate import Points, certificate, fit_many, points, polish, residual_and_jacobian
from recscale.scaling.axis_forms import EXPONENT_BOUNDS, FORMS, Form
from recscale.scaling.axis_intervals import Noise, bootstrap, noise_scale, percentiles, profile, verdict

MINIMUM_DRAWS = 500
INDISTINGUISHABLE = 2.0
ROUNDOFF = 1e-7


@dataclasses.dataclass(frozen=True)
class Gain:
    """What the next doubling of x from the largest point buys, y(x) - y(2x), in units of y, with its 90 % interval."""

    value: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """True when the interval includes no gain at all."""
        return not (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted form. Dictionaries go by parameter name; intervals are 90 %.

    params, stderr (delta method), intervals (the wider of bootstrap and profile), verdicts (interval width over the
    exponent, and for the floor over what is left above it at the largest x);
    certified and reasons; sigma_trusted is False where sigma is unknown or the points scatter far more than it says;
    n points, weighted rss, residual_sd in units of y; aicc is NaN when there are too few points (aicc_note says so);
    delta_aicc and weight are set by `compare`. draws_SP: bootstrap parameters; residual_S: the residual of a new run in
    each draw. domain: smallest and largest x. gain_per_doubling: see `Gain`.
    """

    form: str
    params: dict[str, float]
    stderr: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    verdicts: dict[str, str]
    certified: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    sigma_trusted: bool
    n: int
    rss: float
    residual_sd: float
    aicc: float
    aicc_note: str
    domain: tuple[float, float]
    gain_per_doubling: Gain
    draws_SP: np.ndarray = dataclasses.field(repr=False)
    residual_S: np.ndarray = dataclasses.field(repr=False)
    delta_aicc: float = math.nan
    weight: float = math.nan

    def predict(self, x: np.ndarray | float) -> np.ndarray:
        """The fitted curve at x."""
        return FORMS[self.form].predict(np.array([*self.params.values()]), np.log(np.atleast_1d(x)))

    def band(self, x: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The curve at x and its 90 % interval: where the law runs."""
        log_x_N = np.log(np.atleast_1d(np.asarray(x, np.float64)))
        return self.predict(x), *percentiles(FORMS[self.form].predict(self.draws_SP, log_x_N))

    def prediction(self, x: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The curve at x and the 90 % interval of a new run there: parameter draws and run noise together."""
        log_x_N = np.log(np.atleast_1d(np.asarray(x, np.float64)))
        runs_SN = FORMS[self.form].predict(self.draws_SP, log_x_N) + self.residual_S[:, None]
        return self.predict(x), *percentiles(runs_SN)


def fit_axis(
    x: np.ndarray,
    y: np.ndarray,
    sigma: np.ndarray | float | None = None,
    *,
    form: str = "pow_floor",
    seed: int = 0,
    draws: int = 1000,
    sigma_dof: float = math.inf,
) -> Fit:
    """Fits one form to one axis.

    x: N positive numbers; y: the metric at x; sigma: its standard deviation from run to run, one number or N, None if
    unknown (then all points weigh the same); sigma_dof: degrees of freedom behind sigma (runs less cells when it comes
    from seed replicates). The floor is bounded below by 0 when all y are above 0.
    Raises ValueError for bad numbers, an unknown form, or fewer than 500 draws.
    """
    if form not in FORMS:
        raise ValueError(f"form: found {form!r}, expected one of {', '.join(FORMS)}")
    if draws < MINIMUM_DRAWS:
        raise ValueError(f"draws: found {draws}, expected at least {MINIMUM_DRAWS} for a 90 % interval")
    data, entry = points(x, y, sigma), FORMS[form]
    lower = 0.0 if (data.y_N > 0).all() else None
    n, p = len(data.y_N), len(entry.parameters)
    parameters_SP, rss_S = fit_many(entry, data, data.y_N[None], lower)
    theta_P, sums = polish(entry, data)
    coefficients, alpha = (theta_P[:-1], theta_P[-1:].reshape(())) if entry.has_exponent else (theta_P, np.ones(()))
    free_P = entry.natural(coefficients, alpha, data.centre)
    on_bound = lower is not None and entry.floor is not None and free_P[entry.parameters.index(entry.floor)] < lower
    best_P, rss = (parameters_SP[0], float(rss_S[0])) if on_bound else (free_P, float(sums.min()))
    fitted_N = entry.predict(best_P, data.log_x_N)
    noise = noise_scale(rss, n, p, sigma is not None, sigma_dof)
    # Losses are float32 at best: a smaller residual is rounding, and dividing by it would only magnify it.
    roundoff = ROUNDOFF * float(np.abs(data.y_N / data.sigma_N).max())
    reasons = certificate(entry, data, theta_P, sums, max(math.sqrt(np.nan_to_num(noise.variance)), roundoff), lower)
    draws_SP, residual_S = bootstrap(entry, data, fitted_N, noise, lower, draws, seed)
    params = {name: float(value) for name, value in zip(entry.parameters, best_P, strict=True)}
    intervals, verdicts = _intervals(entry, data, params, draws_SP, rss, noise, lower, certified=not reasons)
    rss = max(rss, n * roundoff**2)
    aicc, aicc_note = _aicc(rss, n, p, form, sigma_dof if noise.trusted else 0.0)
    return Fit(
        form=form,
        params=params,
        stderr=_stderr(entry, data, theta_P, noise),
        intervals=intervals,
        verdicts=verdicts,
        certified=not reasons,
        reasons=tuple(reasons),
        notes=(noise.note,) if noise.note else (),
        sigma_trusted=noise.trusted,
        n=n,
        rss=rss,
        residual_sd=float(np.sqrt(np.square(data.y_N - fitted_N).sum() / max(n - p, 1))),
        aicc=aicc,
        aicc_note=aicc_note,
        domain=(float(np.min(x)), float(np.max(x))),
        gain_per_doubling=_gain(entry, best_P, draws_SP, data.log_x_N[-1]),
        draws_SP=draws_SP,
        residual_S=residual_S,
    )


def _intervals(
    form: Form,
    data: Points,
    params: dict[str, float],
    draws_SP: np.ndarray,
    rss: float,
    noise: Noise,
    lower: float | None,
    certified: bool,
) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    lows, highs = percentiles(draws_SP)
    intervals = {
        name: (min(float(low), params[name]), max(float(high), params[name]))
        for name, low, high in zip(params, lows, highs, strict=True)
    }
    verdicts = {}
    for name in params:
        if name not in ("alpha", form.floor):
            continue
        if noise.dof > 0:
            low, high = profile(form, data, name, params[name], rss, noise, lower)
            intervals[name] = min(low, intervals[name][0]), max(high, intervals[name][1])
        edges = EXPONENT_BOUNDS if name == "alpha" else (-math.inf if lower is None else lower, math.inf)
        at_bound = intervals[name][0] <= edges[0] * 1.001 or intervals[name][1] >= edges[1] * 0.999
        size = params[name]
        if name == form.floor:  # a floor is known as well as what is left above it: 5.1 +- .1 says nothing .1 away
            reached = form.predict(np.array([*params.values()]), np.array([data.log_x_N.max()]))
            size = float(np.ravel(reached)[0]) - params[name]
        verdicts[name] = verdict(size, intervals[name], at_bound) if certified else "not identified"
    return intervals, verdicts


def _gain(form: Form, best_P: np.ndarray, draws_SP: np.ndarray, log_largest: float) -> Gain:
    ends_2 = np.array([log_largest, log_largest + math.log(2)])
    value_2, draws_S2 = form.predict(best_P, ends_2), form.predict(draws_SP, ends_2)
    low, high = percentiles(draws_S2[:, 0] - draws_S2[:, 1])
    value = float(value_2[0] - value_2[1])
    return Gain(value, min(float(low), value), max(float(high), value))


def _stderr(form: Form, data: Points, theta_P: np.ndarray, noise: Noise) -> dict[str, float]:
    """Delta method: the covariance in centred coordinates carried to the units of x by central differences."""
    _, jacobian_NP = residual_and_jacobian(form, data, theta_P)
    norm_P = np.linalg.norm(jacobian_NP, axis=0)
    norm_P = np.where(norm_P > 0, norm_P, 1.0)
    covariance_PP = np.linalg.pinv((jacobian_NP / norm_P).T @ (jacobian_NP / norm_P)) / np.outer(norm_P, norm_P)

    def natural(theta: np.ndarray) -> np.ndarray:
        coefficients, alpha = (theta[:-1], theta[-1:].reshape(())) if form.has_exponent else (theta, np.ones(()))
        return form.natural(coefficients, alpha, data.centre)

    steps = np.diag(1e-6 * np.maximum(np.abs(theta_P), 1e-12))
    columns = [(natural(theta_P + step) - natural(theta_P - step)) / (2 * step.sum()) for step in steps]
    change_PP = np.stack(columns, -1)
    variance_P = np.diag(change_PP @ covariance_PP @ change_PP.T) * noise.variance
    return {name: float(np.sqrt(v)) for name, v in zip(form.parameters, variance_P, strict=True)}


def _aicc(rss: float, n: int, p: int, form: str, sigma_dof: float) -> tuple[float, str]:
    """Akaike's criterion with its small-sample correction, up to a constant of the data; k = p + 1 has the noise scale.

    The replicates behind sigma speak of the noise scale like points without parameters, so N = n + sigma_dof:
    N ln((rss + sigma_dof)/N) + 2k + 2k(k+1)/(N-k-1). Without replicates N = n, the usual form; with a known sigma it
    becomes rss + 2k, which needs no correction.
    """
    k = p + 1
    if math.isinf(sigma_dof):
        return rss - n + 2 * k, ""
    total = n + sigma_dof
    if total - k - 1 <= 0:
        return math.nan, f"{n} points are too few for the AICc of {form} ({p} parameters and the noise): needs {k + 2}"
    score = total * math.log(max(rss + sigma_dof, 1e-300) / total)
    return float(score + 2 * k + 2 * k * (k + 1) / (total - k - 1)), ""


def compare(
    x: np.ndarray,
    y: np.ndarray,
    sigma: np.ndarray | float | None = None,
    *,
    forms: Sequence[str] = ("pow_floor", "log", "constant"),
    seed: int = 0,
    draws: int = 1000,
    sigma_dof: float = math.inf,
) -> list[Fit]:
    """Fits several forms and fills delta_aicc (to the best) and the Akaike weight; in the order of `forms`."""
    fits = [fit_axis(x, y, sigma, form=form, seed=seed, draws=draws, sigma_dof=sigma_dof) for form in forms]
    # One noise model for all: sigma holds if any form reaches it, else it only weighs the points.
    common_dof = sigma_dof if any(fit.sigma_trusted for fit in fits) else 0.0
    fits = [_rescored(fit, common_dof) for fit in fits]
    scores = [fit.aicc for fit in fits if not math.isnan(fit.aicc)]
    if not scores:
        return fits
    total = sum(math.exp(-0.5 * (score - min(scores))) for score in scores)
    return [
        dataclasses.replace(
            fit, delta_aicc=fit.aicc - min(scores), weight=math.exp(-0.5 * (fit.aicc - min(scores))) / total
        )
        for fit in fits
    ]


def _rescored(fit: Fit, sigma_dof: float) -> Fit:
    aicc, note = _aicc(fit.rss, fit.n, len(fit.params), fit.form, sigma_dof)
    return dataclasses.replace(fit, aicc=aicc, aicc_note=note)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """form: the form to quote, empty if none may be; text: one sentence on what beats what."""

    form: str
    text: str


def judge(fits: Sequence[Fit]) -> Judgement:
    """Which of the compared fits may be printed as the law of the axis, and what it cannot be told from."""
    law = next(fit for fit in fits if fit.form == "pow_floor")
    others = [fit for fit in fits if fit.certified and fit.form != "pow_floor"]
    if not law.certified:
        rest = min(others, key=_order, default=None)
        return Judgement(rest.form if rest else "", f"no power law with a floor: {'; '.join(law.reasons)}")
    if math.isnan(law.delta_aicc):
        return Judgement(law.form, f"not compared with {_names(others)}: {law.aicc_note}")
    best, *rest = sorted([law, *others], key=_order)
    near = [fit for fit in rest if fit.delta_aicc - best.delta_aicc < INDISTINGUISHABLE]
    if near:
        return Judgement(best.form, f"{best.form} fits best, indistinguishable from {_names(near)}")
    margin = f", AICc lower by {rest[0].delta_aicc - best.delta_aicc:.1f} or more" if rest else ""
    return Judgement(best.form, f"{best.form} preferred{margin}")


def _order(fit: Fit) -> float:
    return math.inf if math.isnan(fit.aicc) else fit.aicc


def _names(fits: Sequence[Fit]) -> str:
    return " and ".join(fit.form for fit in fits) or "nothing"


def average_gain(fits: Sequence[Fit], seed: int = 0) -> Gain:
    """The gain of the next doubling over the certified forms with a slope, weighed by their Akaike weights.

    Where AICc cannot weigh the power law with a floor, it speaks alone if certified: the simpler forms are special
    cases of it, and its interval is the wider one.
    """
    law = next(fit for fit in fits if fit.form == "pow_floor")
    sloping = [fit for fit in fits if fit.form != "constant"]
    usable = [fit for fit in sloping if fit.certified] or sloping
    if any(fit is law for fit in usable) and math.isnan(law.weight):
        return law.gain_per_doubling
    weight_F = np.array([np.nan_to_num(fit.weight) for fit in usable])
    weight_F = weight_F / weight_F.sum() if weight_F.sum() > 0 else np.full(len(usable), 1 / len(usable))
    rng = np.random.default_rng(seed)
    ends_2 = np.log(law.domain[1]) + np.array([0.0, math.log(2)])
    drawn = []
    for fit, weight in zip(usable, weight_F, strict=True):
        count = round(float(weight) * 4000)
        picked_SP = fit.draws_SP[rng.integers(len(fit.draws_SP), size=count)]
        values_S2 = FORMS[fit.form].predict(picked_SP, ends_2)
        drawn.append(values_S2[:, 0] - values_S2[:, 1])
    low, high = percentiles(np.concatenate(drawn))
    value = float(weight_F @ np.array([fit.gain_per_doubling.value for fit in usable]))
    return Gain(value, min(float(low), value), max(float(high), value))
