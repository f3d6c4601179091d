"""The forms a law may take: one small entry each. A form knows its curve, its parameters and what makes it a law.

S fits at once, N points, K axes, Q inner coordinates (what the optimiser moves), P parameters (what is printed).
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from recscale.scaling import power_sums as sums
from recscale.scaling import single_curves as single

Names = Callable[[tuple[str, ...]], tuple[str, ...]]
Curve = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Seeds = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Bounds = Callable[[int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Form:
    """One law y = f(x_1 .. x_K).

    formula: for the reader; axes: smallest and largest K (0: any); names(axes) -> names of the P parameters.
    curve(theta_SQ, z_KN) -> value [S, N], derivatives [S, N, Q]; natural(theta_SQ, centre_K) -> params_SP; inner, its
    inverse; predict(params_SP, log_x_KN) -> [S, N]; seeds(z_KN, y_N, row_N) -> starts [C, Q] and their rss [C];
    bounds(K) -> lower_Q, upper_Q. positive: prefixes of the parameters that must be above 0 for the form to be a law.
    exponents: prefixes of the parameters that get a profile and a verdict, as does the limit.
    limit: the parameter y tends to, if any, and limits: the range it must lie in. common_centre: the axes share one
    centre (their ratio matters). positive_y: only for metrics above 0. raw: the axis is taken as it is, not as its log.
    """

    name: str
    formula: str
    axes: tuple[int, int]
    names: Names
    curve: Curve
    natural: Callable[[np.ndarray, np.ndarray], np.ndarray]
    inner: Callable[[np.ndarray, np.ndarray], np.ndarray]
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray]
    seeds: Seeds
    bounds: Bounds
    positive: tuple[str, ...] = ()
    exponents: tuple[str, ...] = ("alpha",)
    limit: str = ""
    limits: tuple[float, float] = (-np.inf, np.inf)
    common_centre: bool = False
    positive_y: bool = False
    raw: bool = False

    def coordinates(self, x_KN: np.ndarray) -> np.ndarray:
        """What the curve reads: ln x, or x itself for a form that is `raw`."""
        return x_KN if self.raw else np.log(x_KN)

    def centre(self, log_x_KN: np.ndarray) -> np.ndarray:
        """Centre of the coordinates, [K]."""
        centre_K = log_x_KN.mean(1)
        return np.full_like(centre_K, centre_K[-1]) if self.common_centre else centre_K


def _tagged(axes: tuple[str, ...], letter: str) -> tuple[str, ...]:
    return (letter,) if len(axes) == 1 else tuple(f"{letter}_{axis}" for axis in axes)


def _free(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, -np.inf), np.full(count, np.inf)


def _parameters_free(count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return _free(count)


def _smooth_bounds(k: int, exponents: int) -> tuple[np.ndarray, np.ndarray]:
    lower_Q, upper_Q = _free(1 + k + exponents)
    lower_Q[1 + k :], upper_Q[1 + k :] = sums.EXPONENTS
    return lower_Q, upper_Q


def _additive(
    name: str,
    formula: str,
    axes: tuple[int, int],
    groups: Callable[[int], np.ndarray],
    limit: str,
    sign: float,
    top: float,
) -> Form:
    """A sum of power terms above a floor (sign 1) or below a ceiling (sign -1); groups(K): exponent of each axis."""

    def names(axis_names: tuple[str, ...]) -> tuple[str, ...]:
        tied = groups(len(axis_names))
        shared = len(axis_names) > 1 and tied.max() == 0
        exponents = ("alpha",) if shared else _tagged(axis_names, "alpha")
        return (limit, *_tagged(axis_names, "A"), *exponents)

    return Form(
        name,
        formula,
        axes,
        names,
        lambda theta, z: sums.smooth_curve(theta, z, groups(len(z))),
        lambda theta, centre: sums.smooth_natural(theta, centre, groups(len(centre)), sign),
        lambda params, centre: sums.smooth_inner(params, centre, groups(len(centre)), sign),
        lambda params, log_x: sums.smooth_predict(params, log_x, groups(len(log_x)), sign),
        lambda z, y, row: sums.smooth_seeds(z, y, row, groups(len(z)), sign),
        lambda k: _smooth_bounds(k, int(groups(k).max()) + 1),
        positive=("A",),
        limit=limit,
        limits=(0.0, top),
    )


def _one_each(k: int) -> np.ndarray:
    return np.arange(k)


def _all_tied(k: int) -> np.ndarray:
    return np.zeros(k, np.int64)


def _pow_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    k = len(centre)
    return np.concatenate([np.exp(theta[:, :k] + theta[:, k:] * centre), theta[:, k:]], 1)


def _pow_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    k = len(centre)
    return np.concatenate([np.log(params[:, :k]) - params[:, k:] * centre, params[:, k:]], 1)


def _pow_predict(params: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    k = len(log_x)
    return np.einsum("sk,skn->sn", params[:, :k], np.exp(-params[:, k:, None] * log_x))


def _pow_bounds(k: int) -> tuple[np.ndarray, np.ndarray]:
    lower_Q, upper_Q = _free(2 * k)
    lower_Q[k:], upper_Q[k:] = sums.EXPONENTS
    return lower_Q, upper_Q


def _gamma_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    k = len(centre)
    a, alpha = theta[:, 1 : 1 + k], theta[:, 1 + k : 1 + 2 * k]
    return np.concatenate([np.exp(theta[:, :1]), np.exp(a + alpha * centre), alpha, theta[:, -1:]], 1)


def _gamma_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    k = len(centre)
    alpha = params[:, 1 + k : 1 + 2 * k]
    floor = np.maximum(params[:, :1], np.finfo(np.float64).tiny)  # a floor that ran to 0
    return np.concatenate([np.log(floor), np.log(params[:, 1 : 1 + k]) - alpha * centre, alpha, params[:, -1:]], 1)


def _gamma_predict(params: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    k = len(log_x)
    inner = np.einsum("sk,skn->sn", params[:, 1 : 1 + k], np.exp(-params[:, 1 + k : 1 + 2 * k, None] * log_x))
    return params[:, :1] + inner ** params[:, -1:]


def _gamma_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the additive seeds: with outer exponent g, terms and exponents divided by g in logs."""
    theta, rss = sums.log_seeds(z, y, row, floor=True)
    starts = [np.concatenate([theta[:, :1], theta[:, 1:] / g, np.full((len(theta), 1), g)], 1) for g in (0.6, 1.0, 1.6)]
    return np.concatenate(starts), np.concatenate([rss * 1.01, rss, rss * 1.01])


def _gamma_bounds(k: int) -> tuple[np.ndarray, np.ndarray]:
    lower_Q, upper_Q = _free(2 + 2 * k)
    lower_Q[1 + k :], upper_Q[1 + k :] = sums.EXPONENTS
    lower_Q[-1], upper_Q[-1] = 0.02, 20.0
    return lower_Q, upper_Q


def _kaplan_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    e, a, b, ratio, beta = theta.T
    with np.errstate(over="ignore"):
        scale_n, scale_d = np.exp(a / ratio + centre[0]), np.exp(b + centre[1])
    return np.stack([np.exp(e), scale_n, scale_d, ratio * beta, beta], -1)


def _kaplan_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    floor, scale_n, scale_d, alpha, beta = params.T
    ratio = alpha / beta
    a = ratio * (np.log(scale_n) - centre[0])
    log_floor = np.log(np.maximum(floor, np.finfo(np.float64).tiny))
    return np.stack([log_floor, a, np.log(scale_d) - centre[1], ratio, beta], -1)


def _kaplan_predict(params: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    floor, scale_n, scale_d, alpha, beta = (params[:, i, None] for i in range(5))
    first = np.exp(alpha / beta * (np.log(scale_n) - log_x[0]))
    return floor + (first + np.exp(np.log(scale_d) - log_x[1])) ** beta


def _kaplan_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    theta, rss = sums.log_seeds(z, y, row, floor=True)
    alpha, beta = theta[:, 3], theta[:, 4]
    return np.stack([theta[:, 0], theta[:, 1] / beta, theta[:, 2] / beta, alpha / beta, beta], -1), rss


def _kaplan_bounds(k: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = sums.EXPONENTS
    return np.array([-np.inf, -np.inf, -np.inf, 0.01, low]), np.array([np.inf, np.inf, np.inf, 100.0, high])


FORMS = {
    form.name: form
    for form in (
        _additive("pow_floor", "E + A x^-alpha", (1, 1), _one_each, "E", 1.0, np.inf),
        _additive("additive", "E + sum_j A_j x_j^-alpha_j", (1, 0), _one_each, "E", 1.0, np.inf),
        _additive("additive_shared", "E + sum_j A_j x_j^-alpha", (2, 0), _all_tied, "E", 1.0, np.inf),
        _additive("ceiling", "R0 - sum_j A_j x_j^-alpha_j", (1, 0), _one_each, "R0", -1.0, 1.0),
        Form(
            "pow",
            "sum_j A_j x_j^-alpha_j",
            (1, 0),
            lambda axes: (*_tagged(axes, "A"), *_tagged(axes, "alpha")),
            lambda theta, z: sums.log_curve(theta, z, np.arange(len(z)), floor=False, power=False),
            _pow_natural,
            _pow_inner,
            _pow_predict,
            partial(sums.log_seeds, floor=False),
            _pow_bounds,
            positive_y=True,
        ),
        Form(
            "gamma",
            "E + (sum_j A_j x_j^-alpha_j)^g",
            (2, 0),
            lambda axes: ("E", *_tagged(axes, "A"), *_tagged(axes, "alpha"), "g"),
            lambda theta, z: sums.log_curve(theta, z, np.arange(len(z)), floor=True, power=True),
            _gamma_natural,
            _gamma_inner,
            _gamma_predict,
            _gamma_seeds,
            _gamma_bounds,
            exponents=("alpha", "g"),
            limit="E",
            positive_y=True,
        ),
        Form(
            "kaplan",
            "E + ((A/N)^(alpha/beta) + B/D)^beta",
            (2, 2),
            lambda axes: ("E", f"A_{axes[0]}", f"A_{axes[1]}", f"alpha_{axes[0]}", f"alpha_{axes[1]}"),
            lambda theta, z: sums.log_curve(theta, z, np.array([0, -1]), floor=True, power=True),
            _kaplan_natural,
            _kaplan_inner,
            _kaplan_predict,
            _kaplan_seeds,
            _kaplan_bounds,
            limit="E",
            positive_y=True,
        ),
        Form(
            "repeat",
            "E + sum_j A_j x_j^-alpha_j with D -> U + U R* (1 - e^(-(D/U - 1)/R*)), the last two axes being D and U",
            (2, 0),
            lambda axes: ("E", *_tagged(axes[:-1], "A"), *_tagged(axes[:-1], "alpha"), "R*"),
            single.repeat_curve,
            single.repeat_natural,
            single.repeat_inner,
            single.repeat_predict,
            single.repeat_seeds,
            single.repeat_bounds,
            positive=("A", "R*"),
            exponents=("alpha", "R*"),
            limit="E",
            limits=(0.0, np.inf),
            common_centre=True,
        ),
        Form(
            "log",
            "a - sum_j b_j ln x_j",
            (1, 0),
            lambda axes: ("a", *_tagged(axes, "b")),
            single.log_curve,
            single.log_natural,
            single.log_inner,
            single.log_predict,
            single.log_seeds,
            lambda k: _free(1 + k),
        ),
        Form(
            "constant",
            "c",
            (1, 0),
            lambda axes: ("c",),
            single.constant_curve,
            lambda theta, centre: theta,
            lambda params, centre: params,
            lambda params, log_x: params[:, :1] + np.zeros((1, log_x.shape[1])),
            single.constant_seeds,
            lambda k: _free(1),
        ),
        Form(
            "m4",
            "(e - e_inf) / (e0 - e)^a = b x^-c",
            (1, 1),
            lambda axes: ("e_inf", "e0", "a", "b", "c"),
            single.m4_curve,
            single.m4_natural,
            single.m4_inner,
            single.m4_predict,
            single.m4_seeds,
            lambda k: (
                np.array([-np.inf, -np.inf, 0.01, -np.inf, 1e-5]),
                np.array([np.inf, np.inf, 20.0, np.inf, 20.0]),
            ),
            exponents=("a", "c"),
            limit="e_inf",
        ),
        Form(
            "bnsl1",
            "E + A x^-c0 (1 + (x/d)^(1/f))^(-c1 f)",
            (1, 1),
            lambda axes: ("E", "A", "c0", "d", "c1", "f"),
            single.break_curve,
            single.break_natural,
            single.break_inner,
            single.break_predict,
            single.break_seeds,
            lambda k: (
                np.array([-np.inf, -np.inf, -8.0, -np.inf, -8.0, -4.0]),
                np.array([np.inf, np.inf, 8, np.inf, 8, 3]),
            ),
            positive=("A",),
            exponents=("c0", "c1"),
            limit="E",
            limits=(0.0, np.inf),
            positive_y=True,
        ),
        Form(
            "hp",
            "ln y = c0 + sum_j c_j ln x_j + .5 ln B, the last axis being B",
            (2, 0),
            lambda axes: ("c0", *_tagged(axes[:-1], "c")),
            single.rate_curve,
            single.rate_natural,
            single.rate_inner,
            single.rate_predict,
            single.rate_seeds,
            lambda k: _free(k),
            positive_y=True,
        ),
        *(
            Form(
                f"link_{name}",
                formula,
                (1, 1),
                lambda axes, parameters=parameters: parameters,
                curve,
                natural,
                inner,
                predict,
                seeds,
                partial(_parameters_free, len(parameters)),
                raw=True,
            )
            for name, (formula, parameters, curve, natural, inner, predict, seeds) in single.LINKS.items()
        ),
    )
}
