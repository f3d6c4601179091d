"""The curves that are no plain sums of powers: the nulls, repetition, learning curves, a smooth break, links, lr laws.

Each curve maps inner coordinates theta_SQ and centred coordinates z_KN to its value [S, N] and derivatives [S, N, Q].
"""

from typing import Any

import numpy as np

from recscale.scaling import power_sums as sums

Pair = tuple[np.ndarray, np.ndarray]


def _stacked(value_SN: np.ndarray, *columns: np.ndarray) -> Pair:
    return value_SN, np.stack([np.broadcast_to(column, value_SN.shape) for column in columns], -1)


def _least_squares(design_NQ: np.ndarray, y_N: np.ndarray, row_N: np.ndarray) -> tuple[np.ndarray, float]:
    solved = np.linalg.lstsq(design_NQ * row_N[:, None], y_N * row_N, rcond=None)[0]
    return solved, float(np.square((design_NQ @ solved - y_N) * row_N).sum())


# ---- the nulls: a - sum_j b_j ln x_j, and a constant


def log_curve(theta: np.ndarray, z_KN: np.ndarray) -> Pair:
    """Value and derivatives in (value at the centre, b_K)."""
    return _stacked(theta[:, :1] - theta[:, 1:] @ z_KN, np.ones((1, 1)), *(-z_N for z_N in z_KN))


def log_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(a, b_K) in the units of x."""
    return np.concatenate([theta[:, :1] + theta[:, 1:] @ centre[:, None], theta[:, 1:]], 1)


def log_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The inverse of `log_natural`."""
    return np.concatenate([params[:, :1] - params[:, 1:] @ centre[:, None], params[:, 1:]], 1)


def log_predict(params: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """a - sum_j b_j ln x_j."""
    return params[:, :1] - params[:, 1:] @ log_x


def log_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    """The exact least-squares solution."""
    solved, rss = _least_squares(np.concatenate([np.ones((1, len(y))), -z]).T, y, row)
    return solved[None], np.array([rss])


def constant_curve(theta: np.ndarray, z_KN: np.ndarray) -> Pair:
    """c everywhere."""
    return _stacked(theta + np.zeros((1, z_KN.shape[1])), np.ones((1, 1)))


def constant_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    """The weighted mean."""
    solved, rss = _least_squares(np.ones((len(y), 1)), y, row)
    return solved[None], np.array([rss])


# ---- repeated data: the smooth sum, whose data axis is U + U R* (1 - e^(-(D/U - 1)/R*)); coordinates (..., ln R*)


def _effective(log_r_S1: np.ndarray, log_d_N: np.ndarray, log_u_N: np.ndarray) -> Pair:
    """ln of the effective data [S, N] and its derivative by ln R*; U is at most D."""
    epochs_N = np.maximum(np.expm1(log_d_N - log_u_N), 0.0)
    r_star = np.exp(np.clip(log_r_S1, -20.0, 20.0))
    ratio = epochs_N / r_star
    gained = -np.expm1(-ratio)
    worth = 1.0 + r_star * gained
    slope = r_star * (gained - ratio * np.exp(-ratio)) / worth
    return np.minimum(log_u_N, log_d_N) + np.log(worth), slope


def _axes_with_effective(theta: np.ndarray, z_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data_SN, slope_SN = _effective(theta[:, -1:], z_KN[-2], z_KN[-1])
    plain_SKN = np.broadcast_to(z_KN[:-2], (len(theta), *z_KN[:-2].shape))
    return np.concatenate([plain_SKN, data_SN[:, None]], 1), slope_SN


def repeat_curve(theta: np.ndarray, z_KN: np.ndarray) -> Pair:
    """The smooth sum over the plain axes and the effective data."""
    axes_SKN, slope_SN = _axes_with_effective(theta, z_KN)
    k = axes_SKN.shape[1]
    value_SN, jacobian_SNQ = sums.smooth_curve(theta[:, :-1], axes_SKN, np.arange(k))
    by_data_SN = -theta[:, k, None] * np.exp(-theta[:, 2 * k, None] * axes_SKN[:, -1])
    return value_SN, np.concatenate([jacobian_SNQ, (by_data_SN * slope_SN)[..., None]], -1)


def repeat_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(E, A, alpha of the plain axes and of the data, R*)."""
    groups = np.arange(len(centre) - 1)
    return np.concatenate([sums.smooth_natural(theta[:, :-1], centre[:-1], groups, 1.0), np.exp(theta[:, -1:])], 1)


def repeat_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The inverse of `repeat_natural`."""
    groups = np.arange(len(centre) - 1)
    return np.concatenate([sums.smooth_inner(params[:, :-1], centre[:-1], groups, 1.0), np.log(params[:, -1:])], 1)


def repeat_predict(params: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """The law at ln x."""
    data_SN, _ = _effective(np.log(params[:, -1:]), log_x[-2], log_x[-1])
    k = len(log_x) - 1
    alpha_SK = params[:, 1 + k : 1 + 2 * k]
    plain = np.einsum("sk,skn->sn", params[:, 1:k], np.exp(-alpha_SK[:, :-1, None] * log_x[:-2]))
    return params[:, :1] + plain + params[:, k, None] * np.exp(-alpha_SK[:, -1:] * data_SN)


def repeat_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    """The additive seeds at three values of R*."""
    starts, rss = [], []
    for log_r in np.log([1.5, 6.0, 25.0]):
        data_1N, _ = _effective(np.array([[log_r]]), z[-2], z[-1])
        theta, rss_C = sums.smooth_seeds(np.concatenate([z[:-2], data_1N]), y, row, np.arange(len(z) - 1), 1.0)
        starts.append(np.concatenate([theta, np.full((len(theta), 1), log_r)], 1))
        rss.append(rss_C)
    return np.concatenate(starts), np.concatenate(rss)


def repeat_bounds(k: int) -> Pair:
    """Exponents and R* in bounds."""
    lower, upper = np.full(2 * k, -np.inf), np.full(2 * k, np.inf)
    lower[k:-1], upper[k:-1] = sums.EXPONENTS
    lower[-1], upper[-1] = np.log(0.01), np.log(1e4)
    return lower, upper


# ---- M4, arXiv 2209.06640: (e - e_inf) / (e0 - e)^a = b x^-c; coordinates (e_inf, ln(e0 - e_inf), a, ln b, c)


def m4_curve(theta: np.ndarray, z_KN: np.ndarray) -> Pair:
    """Solved for e = e_inf + (e0 - e_inf) sigmoid(s) by Newton's method in s, which is monotone."""
    low, log_span, a, log_b, c = (theta[:, i, None] for i in range(5))
    log_span = np.clip(log_span, -200.0, 200.0)
    wanted = log_b - c * z_KN[0] - (1 - a) * log_span
    s = np.where(wanted < 0, wanted, wanted / a)
    for _ in range(60):
        rise = 1 / (1 + np.exp(np.clip(s, -500, 500)))
        miss = -np.logaddexp(0, -s) + a * np.logaddexp(0, s) - wanted
        s = s - np.clip(miss / (rise + a * (1 - rise)), -20.0, 20.0)
    share = 1 / (1 + np.exp(-np.clip(s, -500, 500)))
    span = np.exp(log_span)
    by_s = span * share * (1 - share)
    steep = (1 - share) + a * share  # d(log ratio)/ds
    return _stacked(
        low + span * share,
        np.ones((1, 1)),
        span * share - by_s * (1 - a) / steep,
        by_s * (log_span - np.logaddexp(0, s)) / steep,
        by_s / steep,
        -by_s * z_KN[0] / steep,
    )


def m4_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(e_inf, e0, a, b, c)."""
    low, log_span, a, log_b, c = theta.T
    return np.stack([low, low + np.exp(log_span), a, np.exp(log_b + c * centre[0]), c], -1)


def m4_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The inverse of `m4_natural`."""
    low, high, a, b, c = params.T
    return np.stack([low, np.log(high - low), a, np.log(b) - c * centre[0], c], -1)


def m4_predict(params: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """The law at ln x."""
    return m4_curve(m4_inner(params, np.zeros(1)), log_x)[0]


def m4_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    """Ends just outside the data, three shapes, then a line in logs."""
    span = float(np.ptp(y)) or 1.0
    starts, rss = [], []
    for below in (0.02, 0.2, 1.0):
        for above in (0.02, 0.5):
            for a in (0.3, 1.0, 2.0):
                low, high = y.min() - below * span, y.max() + above * span
                ratio = np.log(y - low) - a * np.log(high - y)
                (log_b, slope), _ = _least_squares(np.stack([np.ones_like(y), -z[0]], -1), ratio, np.ones_like(y))
                theta = np.array([[low, np.log(high - low), a, log_b, max(slope, 1e-3)]])
                starts.append(theta[0])
                rss.append(float(np.square((m4_curve(theta, z)[0][0] - y) * row).sum()))
    return np.stack(starts), np.array(rss)


# ---- one smooth break, arXiv 2210.14891; coordinates (E, ln A at the centre, c0, ln d from the centre, c1, ln f)


def break_curve(theta: np.ndarray, z_KN: np.ndarray) -> Pair:
    """E + A x^-c0 (1 + (x/d)^(1/f))^(-c1 f)."""
    limit, log_a, c0, log_d, c1, log_f = (theta[:, i, None] for i in range(6))
    f = np.exp(np.clip(log_f, -6.0, 6.0))
    u = (z_KN[0] - log_d) / f
    soft, share = np.logaddexp(0, u), 1 / (1 + np.exp(-np.clip(u, -500, 500)))
    part = np.exp(np.clip(log_a - c0 * z_KN[0] - c1 * f * soft, -500, 500))
    return _stacked(
        limit + part,
        np.ones((1, 1)),
        part,
        -part * z_KN[0],
        part * c1 * share,
        -part * f * soft,
        -part * c1 * f * (soft - share * u),
    )


def break_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(E, A, c0, d, c1, f)."""
    limit, log_a, c0, log_d, c1, log_f = theta.T
    return np.stack([limit, np.exp(log_a + c0 * centre[0]), c0, np.exp(log_d + centre[0]), c1, np.exp(log_f)], -1)


def break_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The inverse of `break_natural`."""
    limit, a, c0, d, c1, f = params.T
    return np.stack([limit, np.log(a) - c0 * centre[0], c0, np.log(d) - centre[0], c1, np.log(f)], -1)


def break_predict(params: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """The law at ln x."""
    return break_curve(break_inner(params, np.zeros(1)), log_x)[0]


def break_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    """The best power laws with a floor, broken at a quarter, a half and three quarters of the range, up and down."""
    theta, rss = sums.smooth_seeds(z, y, row, np.zeros(1, np.int64), 1.0)
    starts, sizes = [], []
    for index in np.argsort(rss)[:3]:
        middle, slope, alpha = theta[index]
        term = max(slope / alpha, 1e-6 * float(np.median(y)))
        for place in np.quantile(z[0], (0.25, 0.5, 0.75)):
            for bend in (-0.5, 0.5):
                starts.append([middle - slope / alpha, np.log(term), alpha, place, bend * alpha, np.log(0.3)])
                sizes.append(rss[index])
    return np.array(starts), np.array(sizes)


# ---- how the best learning rate moves: ln y = c0 + sum_j c_j ln x_j + .5 ln B


def rate_curve(theta: np.ndarray, z_KN: np.ndarray) -> Pair:
    """Value and derivatives in (ln y at the centre, c_K-1)."""
    value = np.exp(np.clip(theta[:, :1] + theta[:, 1:] @ z_KN[:-1] + 0.5 * z_KN[-1], -500, 500))
    return _stacked(value, value, *(value * z_N for z_N in z_KN[:-1]))


def rate_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(c0, c_K-1) in the units of x."""
    moved = theta[:, :1] - theta[:, 1:] @ centre[:-1, None] - 0.5 * centre[-1]
    return np.concatenate([moved, theta[:, 1:]], 1)


def rate_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The inverse of `rate_natural`."""
    return rate_natural(params, -centre)


def rate_predict(params: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """The law at ln x."""
    return np.exp(params[:, :1] + params[:, 1:] @ log_x[:-1] + 0.5 * log_x[-1])


def rate_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    """The line in logs."""
    design = np.concatenate([np.ones((1, len(y))), z[:-1]]).T
    solved, rss = _least_squares(design, np.log(y) - 0.5 * z[-1], row * y)
    return solved[None], np.array([rss])


# ---- loss -> metric: linear, exponential, logistic (arXiv 2412.04403); the axis is the loss itself, not its logarithm


def _line_curve(theta: np.ndarray, z: np.ndarray) -> Pair:
    return _stacked(theta[:, :1] + theta[:, 1:] * z[0], np.ones((1, 1)), z[0])


def _line_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.stack([theta[:, 0] - theta[:, 1] * centre[0], theta[:, 1]], -1)


def _line_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return _line_natural(params, -centre)


def _line_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    solved, rss = _least_squares(np.stack([np.ones_like(y), z[0]], -1), y, row)
    return solved[None], np.array([rss])


def _exp_curve(theta: np.ndarray, z: np.ndarray) -> Pair:
    base, scale, rate = (theta[:, i, None] for i in range(3))
    grown = np.exp(np.clip(rate * z[0], -300, 300))
    return _stacked(base + scale * grown, np.ones((1, 1)), grown, scale * grown * z[0])


def _exp_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.stack([theta[:, 0], theta[:, 1] * np.exp(-theta[:, 2] * centre[0]), theta[:, 2]], -1)


def _exp_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return _exp_natural(params, -centre)


def _exp_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    width = float(np.ptp(z[0])) or 1.0
    starts, rss = [], []
    for rate in np.concatenate([-np.geomspace(0.1, 8, 12), np.geomspace(0.1, 8, 12)]) / width:
        solved, left = _least_squares(np.stack([np.ones_like(y), np.exp(rate * z[0])], -1), y, row)
        starts.append([*solved, rate])
        rss.append(left)
    return np.array(starts), np.array(rss)


def _logistic_curve(theta: np.ndarray, z: np.ndarray) -> Pair:
    low, span, rate, middle = (theta[:, i, None] for i in range(4))
    share = 1 / (1 + np.exp(np.clip(rate * (z[0] - middle), -300, 300)))
    by_u = -span * share * (1 - share)
    return _stacked(low + span * share, np.ones((1, 1)), share, by_u * (z[0] - middle), -by_u * rate)


def _logistic_natural(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.stack([theta[:, 0], theta[:, 0] + theta[:, 1], theta[:, 2], theta[:, 3] + centre[0]], -1)


def _logistic_inner(params: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.stack([params[:, 0], params[:, 1] - params[:, 0], params[:, 2], params[:, 3] - centre[0]], -1)


def _logistic_seeds(z: np.ndarray, y: np.ndarray, row: np.ndarray) -> Pair:
    width = float(np.ptp(z[0])) or 1.0
    starts, rss = [], []
    for rate in np.geomspace(1, 20, 8) / width:
        for middle in np.quantile(z[0], (0.0, 0.25, 0.5, 0.75, 1.0)):
            share = 1 / (1 + np.exp(rate * (z[0] - middle)))
            solved, left = _least_squares(np.stack([np.ones_like(y), share], -1), y, row)
            starts.append([*solved, rate, middle])
            rss.append(left)
    return np.array(starts), np.array(rss)


def _predict_raw(curve: Any, inner: Any) -> Any:
    return lambda params, x: curve(inner(params, np.zeros(1)), x)[0]


# name -> (formula, parameters, curve, natural, inner, predict, seeds)
LINKS: dict[str, Any] = {
    "linear": (
        "u + v L",
        ("u", "v"),
        _line_curve,
        _line_natural,
        _line_inner,
        _predict_raw(_line_curve, _line_inner),
        _line_seeds,
    ),
    "exp": (
        "u + v exp(k L)",
        ("u", "v", "k"),
        _exp_curve,
        _exp_natural,
        _exp_inner,
        _predict_raw(_exp_curve, _exp_inner),
        _exp_seeds,
    ),
    "logistic": (
        "low + (high - low) / (1 + exp(k (L - L0)))",
        ("low", "high", "k", "L0"),
        _logistic_curve,
        _logistic_natural,
        _logistic_inner,
        _predict_raw(_logistic_curve, _logistic_inner),
        _logistic_seeds,
    ),
}
