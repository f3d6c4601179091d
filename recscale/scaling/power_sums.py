"""Curves made of power terms: E + sum_j A_j x_j^-alpha_j and its relatives, with exact derivatives.

Two sets of inner coordinates, both on centred logs z = ln x - centre:

* smooth (`additive`, `ceiling`, `repeat`): value m at the centre, slope b_j and exponent alpha_j of each axis,
  y = m - sum_j b_j (1 - e^(-alpha_j z_j)) / alpha_j. It tends to m - sum_j b_j z_j, the logarithmic null, as alpha
  tends to 0: data that cannot tell the two apart give a well-conditioned fit with a wide interval, not a runaway one.
* logarithmic (`pow`, `gamma`, `kaplan`): y = exp(e) + exp(g LSE_j(a_j - alpha_j z_j)).

S fits at once, N points, K axes, Q inner coordinates, P parameters, G groups of tied exponents.
"""

import numpy as np
from scipy import optimize
from scipy.stats import qmc

EXPONENTS = (1e-5, 8.0)  # below, a power cannot be told from a logarithm; above, it is a step at the first point
CANDIDATES = 64


def exponent_candidates(count: int) -> np.ndarray:
    """Exponent vectors [C, count] that a fit starts from: a grid for one or two axes, a Sobol set beyond."""
    if count == 1:
        return np.geomspace(0.01, 3.0, 48)[:, None]
    if count == 2:
        line = np.geomspace(0.04, 2.0, 15)
        return np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    unit = qmc.Sobol(count, rng=np.random.default_rng(0)).random(CANDIDATES)
    return np.exp(np.log(0.05) + unit * np.log(1.2 / 0.05))


def steps(alpha_SK: np.ndarray, z_KN: np.ndarray) -> np.ndarray:
    """(1 - e^(-alpha z)) / alpha, [S, K, N]."""
    alpha = alpha_SK[..., None]
    return -np.expm1(-alpha * z_KN) / alpha


def smooth_curve(theta_SQ: np.ndarray, z_KN: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value [S, N] and derivatives [S, N, Q] in the coordinates (m, b_K, alpha_G); groups[j]: exponent of axis j."""
    k = z_KN.shape[-2]  # z may also differ from fit to fit, [S, K, N]
    b_SK, alpha_SK = theta_SQ[:, 1 : 1 + k], theta_SQ[:, 1 + k :][:, groups]
    step_SKN = steps(alpha_SK, z_KN)
    value_SN = theta_SQ[:, :1] - np.einsum("sk,skn->sn", b_SK, step_SKN)
    alpha = alpha_SK[..., None]
    slope_SKN = -b_SK[..., None] * (z_KN * np.exp(-alpha * z_KN) - step_SKN) / alpha
    exponents_SGN = np.zeros((len(theta_SQ), int(groups.max()) + 1, z_KN.shape[-1]))
    for axis, group in enumerate(groups):
        exponents_SGN[:, group] += slope_SKN[:, axis]
    jacobian_SQN = np.concatenate([np.ones_like(value_SN)[:, None], -step_SKN, exponents_SGN], 1)
    return value_SN, jacobian_SQN.swapaxes(1, 2)


def smooth_natural(theta_SQ: np.ndarray, centre_K: np.ndarray, groups: np.ndarray, sign: float) -> np.ndarray:
    """(E, A_K, alpha_G) in the units of x; sign -1 for a ceiling, whose terms are taken off."""
    k = len(centre_K)
    b_SK, alpha_SK = theta_SQ[:, 1 : 1 + k], theta_SQ[:, 1 + k :][:, groups]
    limit_S = theta_SQ[:, 0] - (b_SK / alpha_SK).sum(-1)
    scale_SK = sign * b_SK / alpha_SK * np.exp(alpha_SK * centre_K)
    return np.concatenate([limit_S[:, None], scale_SK, theta_SQ[:, 1 + k :]], 1)


def smooth_inner(params_SP: np.ndarray, centre_K: np.ndarray, groups: np.ndarray, sign: float) -> np.ndarray:
    """The inverse of `smooth_natural`."""
    k = len(centre_K)
    alpha_SK = params_SP[:, 1 + k :][:, groups]
    terms_SK = sign * params_SP[:, 1 : 1 + k] * np.exp(-alpha_SK * centre_K)
    middle_S = params_SP[:, 0] + terms_SK.sum(-1)
    return np.concatenate([middle_S[:, None], terms_SK * alpha_SK, params_SP[:, 1 + k :]], 1)


def smooth_predict(params_SP: np.ndarray, log_x_KN: np.ndarray, groups: np.ndarray, sign: float) -> np.ndarray:
    """E + sign sum_j A_j x_j^-alpha_j, [S, N]."""
    k = len(log_x_KN)
    alpha_SK = params_SP[:, 1 + k :][:, groups]
    return params_SP[:, :1] + sign * np.einsum(
        "sk,skn->sn", params_SP[:, 1 : 1 + k], np.exp(-alpha_SK[..., None] * log_x_KN)
    )


def smooth_seeds(
    z_KN: np.ndarray, y_N: np.ndarray, row_N: np.ndarray, groups: np.ndarray, sign: float
) -> tuple[np.ndarray, np.ndarray]:
    """Variable projection: at each candidate of exponents the best non-negative (E, A_K); theta_CQ and its rss_C.

    row_N: weight of each residual (1/y for relative residuals). Where y goes below zero the limit is free in sign.
    """
    found, sums = [], []
    free = bool((y_N <= 0).any()) or sign < 0
    for alpha_G in exponent_candidates(int(groups.max()) + 1):
        power_KN = np.exp(-alpha_G[groups][:, None] * z_KN)
        limit_NK = np.stack([np.ones_like(y_N), -np.ones_like(y_N)], -1) if free else np.ones((len(y_N), 1))
        design_NQ = np.concatenate([limit_NK, sign * power_KN.T], 1) * row_N[:, None]
        solved, norm = optimize.nnls(design_NQ, y_N * row_N)
        limit = solved[0] - solved[1] if free else solved[0]
        terms_K = sign * solved[-len(z_KN) :]
        found.append(np.concatenate([[limit + terms_K.sum()], terms_K * alpha_G[groups], alpha_G]))
        sums.append(norm**2)
    return np.stack(found), np.array(sums)


def log_curve(
    theta_SQ: np.ndarray, z_KN: np.ndarray, exponents: np.ndarray, floor: bool, power: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Value, derivatives of exp(e) + exp(g LSE(a_K - alpha_K z_K)); coordinates (e if floor, a_K, alphas, g if power).

    exponents[j]: which of the alphas axis j has, -1 for an exponent of 1.
    """
    k, first = len(z_KN), int(floor)
    count = int(exponents.max()) + 1
    alpha_SA = theta_SQ[:, first + k : first + k + count]
    alpha_SK = np.where(exponents >= 0, alpha_SA[:, np.maximum(exponents, 0)], 1.0)
    g_S1 = theta_SQ[:, -1:] if power else np.ones((len(theta_SQ), 1))
    terms_SKN = theta_SQ[:, first : first + k, None] - alpha_SK[..., None] * z_KN
    top_SN = terms_SKN.max(1)
    lse_SN = top_SN + np.log(np.exp(terms_SKN - top_SN[:, None]).sum(1))
    part_SN = np.exp(np.clip(g_S1 * lse_SN, -700.0, 700.0))
    share_SKN = (g_S1 * part_SN)[:, None] * np.exp(terms_SKN - lse_SN[:, None])
    exponents_SAN = np.zeros((len(theta_SQ), count, z_KN.shape[1]))
    for axis, group in enumerate(exponents):
        if group >= 0:
            exponents_SAN[:, group] -= share_SKN[:, axis] * z_KN[axis]
    columns, value_SN = [share_SKN, exponents_SAN], part_SN
    if floor:
        floor_SN = np.exp(np.clip(theta_SQ[:, :1], -700.0, 700.0)) + np.zeros_like(part_SN)
        columns.insert(0, floor_SN[:, None])
        value_SN = part_SN + floor_SN
    if power:
        columns.append((part_SN * lse_SN)[:, None])
    return value_SN, np.concatenate(columns, 1).swapaxes(1, 2)


def log_seeds(z_KN: np.ndarray, y_N: np.ndarray, row_N: np.ndarray, floor: bool) -> tuple[np.ndarray, np.ndarray]:
    """The seeds of the smooth sum in the coordinates (e if floor, a_K, alpha_K); terms at a bound start at 1e-6 y."""
    k = len(z_KN)
    theta_CQ, rss_C = smooth_seeds(z_KN, y_N, row_N, np.arange(k), 1.0)
    alpha_CK = theta_CQ[:, 1 + k :]
    terms_CK = theta_CQ[:, 1 : 1 + k] / alpha_CK
    limit_C = theta_CQ[:, 0] - terms_CK.sum(-1)
    tiny = 1e-6 * float(np.median(y_N))
    columns = [np.log(np.maximum(terms_CK, tiny)), alpha_CK]
    if floor:
        columns.insert(0, np.log(np.maximum(limit_C, tiny))[:, None])
    return np.concatenate(columns, 1), rss_C
