"""Least squares for one form on one axis: variable projection for many data vectors at once, polish, certificate.

N points, S data vectors fitted at once (bootstrap draws), G exponents of the search grid, Q linear coefficients.
Everything is divided by sigma first, so a residual of 1 is one standard deviation.
"""

import dataclasses

import numpy as np
from scipy import optimize

from recscale.scaling.axis_forms import EXPONENT_BOUNDS, Form

GRADIENT_LIMIT = 1e-2
CONDITION_LIMIT = 1e10
STARTS = 8
AGREEING_STARTS = 3


@dataclasses.dataclass(frozen=True)
class Points:
    """The data of one axis: log_x_N, y_N, sigma_N (ones where unknown), centre = mean of log x."""

    log_x_N: np.ndarray
    y_N: np.ndarray
    sigma_N: np.ndarray
    centre: float

    @property
    def z_N(self) -> np.ndarray:
        return self.log_x_N - self.centre


def points(x: np.ndarray, y: np.ndarray, sigma: np.ndarray | float | None = None) -> Points:
    """Checks the data of an axis and sorts it by x. Raises ValueError naming what is wrong."""
    x_N, y_N = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if x_N.shape != y_N.shape or not len(x_N):
        raise ValueError(f"x and y: found {len(x_N)} and {len(y_N)} values, expected as many of both, at least one")
    sigma_N = np.broadcast_to(np.asarray(1.0 if sigma is None else sigma, np.float64), x_N.shape)
    for name, values, good in (
        ("x", x_N, np.isfinite(x_N) & (x_N > 0)),
        ("y", y_N, np.isfinite(y_N)),
        ("sigma", sigma_N, np.isfinite(sigma_N) & (sigma_N > 0)),
    ):
        if not good.all():
            raise ValueError(f"{name}: found {values[~good][0]}, expected finite numbers, x and sigma above 0")
    order = np.lexsort((y_N, x_N))
    log_x_N = np.log(x_N[order])
    return Points(log_x_N, y_N[order], sigma_N[order], float(log_x_N.mean()))


def solve(form: Form, data: Points, y_SN: np.ndarray, alpha_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best linear coefficients [S, Q] and the weighted residual sum of squares [S] at given exponents."""
    design_SNQ = form.design(alpha_S, data.z_N) / data.sigma_N[:, None]
    basis_SNQ, upper_SQQ = np.linalg.qr(design_SNQ)
    scaled_SN = y_SN / data.sigma_N
    part_SQ = np.einsum("snq,sn->sq", basis_SNQ, scaled_SN)
    rss_S = np.square(scaled_SN - np.einsum("snq,sq->sn", basis_SNQ, part_SQ)).sum(-1)
    return np.linalg.solve(upper_SQQ, part_SQ[..., None])[..., 0], rss_S


def search(form: Form, data: Points, y_SN: np.ndarray) -> np.ndarray:
    """rss_SG: the residual sum of squares of every data vector at every exponent of the grid."""
    design_GNQ = form.design(form.seeds, data.z_N) / data.sigma_N[:, None]
    basis_GNQ = np.linalg.qr(design_GNQ)[0]
    scaled_SN = y_SN / data.sigma_N
    part_GSQ = np.einsum("sn,gnq->gsq", scaled_SN, basis_GNQ, optimize=True)
    rss_SG = np.empty((len(y_SN), len(basis_GNQ)))
    for index, (basis_NQ, part_SQ) in enumerate(zip(basis_GNQ, part_GSQ, strict=True)):
        rss_SG[:, index] = np.square(scaled_SN - part_SQ @ basis_NQ.T).sum(-1)
    return rss_SG


def fit_many(form: Form, data: Points, y_SN: np.ndarray, lower: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Fits S data vectors at once: parameters_SP and weighted residual sums of squares rss_S.

    lower: bound of the form's floor; where the free optimum lies below it, the floor stands on the bound and the rest
    is fitted as a plain power (`pow`).
    """
    y_SN = np.atleast_2d(y_SN)
    if not form.has_exponent:
        coefficients_SQ, rss_S = solve(form, data, y_SN, np.ones(len(y_SN)))
        return form.natural(coefficients_SQ, np.ones(len(y_SN)), data.centre), rss_S
    log_S = np.log(form.seeds[search(form, data, y_SN).argmin(-1)])
    low, high = np.log(EXPONENT_BOUNDS)
    width = 0.05
    for _ in range(6):  # parabolas through three exponents, each time on a narrower stretch
        rss_3S = [solve(form, data, y_SN, np.exp(np.clip(log_S + side * width, low, high)))[1] for side in (-1, 0, 1)]
        bend_S = rss_3S[0] - 2 * rss_3S[1] + rss_3S[2]
        tilt_S = rss_3S[0] - rss_3S[2]
        with np.errstate(divide="ignore", invalid="ignore"):
            shift_S = np.where(bend_S > 0, 0.5 * tilt_S / bend_S, np.sign(tilt_S))
        log_S = np.clip(log_S + width * np.clip(np.nan_to_num(shift_S), -1, 1), low, high)
        width *= 0.4
    alpha_S = np.exp(log_S)
    coefficients_SQ, rss_S = solve(form, data, y_SN, alpha_S)
    parameters_SP = form.natural(coefficients_SQ, alpha_S, data.centre)
    if form.floor is None or lower is None:
        return parameters_SP, rss_S
    return _on_bound(form, data, y_SN, lower, parameters_SP, rss_S)


def _on_bound(
    form: Form, data: Points, y_SN: np.ndarray, lower: float, parameters_SP: np.ndarray, rss_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    from_floor = form.parameters.index(form.floor)
    below_S = parameters_SP[:, from_floor] < lower
    if below_S.any():
        rest_SP, rest_rss_S = fit_many(form.without_floor(), data, y_SN[below_S] - lower)
        parameters_SP[below_S] = np.insert(rest_SP, from_floor, lower, axis=1)
        rss_S[below_S] = rest_rss_S
    return parameters_SP, rss_S


def residual_and_jacobian(form: Form, data: Points, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted residual_N and its Jacobian_NP at theta = (coefficients, exponent if any), in centred coordinates."""
    coefficients, alpha = (theta[:-1], theta[-1]) if form.has_exponent else (theta, 1.0)
    design_NQ = form.design(np.asarray(alpha), data.z_N)
    columns = [design_NQ]
    if form.design_slope is not None:
        columns.append((form.design_slope(np.asarray(alpha), data.z_N) @ coefficients)[:, None])
    residual_N = (design_NQ @ coefficients - data.y_N) / data.sigma_N
    return residual_N, np.concatenate(columns, -1) / data.sigma_N[:, None]


def polish(form: Form, data: Points) -> tuple[np.ndarray, np.ndarray]:
    """The best theta_P and the residual sums of squares of all starts, from the seeds spread over the exponent grid."""
    if not form.has_exponent:
        coefficients, rss = solve(form, data, data.y_N[None], np.ones(1))
        return coefficients[0], np.repeat(rss, AGREEING_STARTS)
    rss_G = search(form, data, data.y_N[None])[0]
    blocks = np.array_split(np.arange(len(rss_G))[form.seeds > 1e-3], STARTS - 1)
    chosen = [int(rss_G.argmin()), *(int(block[rss_G[block].argmin()]) for block in blocks)]
    alpha_S = form.seeds[chosen]
    coefficients_SQ, _ = solve(form, data, np.broadcast_to(data.y_N, (len(chosen), len(data.y_N))), alpha_S)
    thetas, sums = [], []
    for coefficients, alpha in zip(coefficients_SQ, alpha_S, strict=True):
        found = optimize.leastsq(
            lambda theta: residual_and_jacobian(form, data, theta)[0],
            np.append(coefficients, alpha),
            Dfun=lambda theta: residual_and_jacobian(form, data, theta)[1],
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            maxfev=200,
            full_output=True,
        )[0]
        inside = np.clip(np.nan_to_num(found[-1:], nan=EXPONENT_BOUNDS[0]), *EXPONENT_BOUNDS)
        refitted_SQ, rss_S = solve(form, data, data.y_N[None], inside)
        thetas.append(np.append(refitted_SQ[0], inside))
        sums.append(float(rss_S[0]))
    return thetas[int(np.argmin(sums))], np.array(sums)


def certificate(
    form: Form, data: Points, theta: np.ndarray, sums: np.ndarray, scale: float, lower: float | None
) -> list[str]:
    """Reasons why theta is not a minimum that may be printed as a law; empty if it is.

    scale: size of one scaled residual (1 where sigma is known). The optimiser's own success flag is not asked: it says
    success on early stops and failure on exact optima (Hoffmann's fit, arXiv 2404.10102).
    """
    reasons = []
    distinct = len(np.unique(data.log_x_N))
    if distinct < len(form.parameters) + 1:
        reasons.append(f"{distinct} distinct x for {len(form.parameters)} parameters, needs one more than parameters")
    residual_N, jacobian_NP = residual_and_jacobian(form, data, theta)
    norm_P = np.linalg.norm(jacobian_NP, axis=0)
    norm_P = np.where(norm_P > 0, norm_P, 1.0)
    gradient = float(np.abs(jacobian_NP.T @ residual_N / norm_P).max() / scale)
    if not gradient <= GRADIENT_LIMIT:
        reasons.append(f"scaled gradient {gradient:.3g} above {GRADIENT_LIMIT:g}: not a minimum")
    best = min(float(sums.min()), float(residual_N @ residual_N))
    agreeing = int((sums - best <= 1e-6 * max(best, scale**2)).sum())
    if agreeing < AGREEING_STARTS:
        reasons.append(f"{agreeing} of {len(sums)} starts reach the best sum of squares, needs {AGREEING_STARTS}")
    if float(residual_N @ residual_N) - best > 1e-6 * max(best, scale**2):
        reasons.append("another start found a smaller sum of squares")
    singular = np.linalg.svd(jacobian_NP / norm_P, compute_uv=False)
    if not singular[-1] ** 2 * CONDITION_LIMIT > singular[0] ** 2:
        reasons.append("the points do not determine all parameters (condition number above 1e10)")
    return reasons + _bound_reasons(form, theta, data.centre, lower)


def _bound_reasons(form: Form, theta: np.ndarray, centre: float, lower: float | None) -> list[str]:
    reasons = []
    coefficients, alpha = (theta[:-1], theta[-1:].reshape(())) if form.has_exponent else (theta, np.ones(()))
    values = dict(zip(form.parameters, form.natural(coefficients, alpha, centre), strict=True))
    if form.has_exponent and alpha <= EXPONENT_BOUNDS[0] * 1.1:
        reasons.append("exponent at its lower bound: the points are as straight in ln x as a logarithm")
    if form.has_exponent and alpha >= EXPONENT_BOUNDS[1] * 0.99:
        reasons.append("exponent at its upper bound: the loss falls once and is flat afterwards")
    reasons += [
        f"{name} = {values[name]:.4g} <= 0: y does not fall with x" for name in form.positive if values[name] <= 0
    ]
    if form.floor is not None and lower is not None and values[form.floor] <= lower:
        reasons.append(f"{form.floor} at its lower bound {lower:g}: no floor is seen")
    return reasons
