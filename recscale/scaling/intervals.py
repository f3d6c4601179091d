"""How sure a fit is: noise scale, AICc, bootstrap, profile likelihood, standard errors, verdicts.

S draws, N points, Q inner coordinates, P parameters, T values of a profile.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, stats

from recscale.scaling.estimate import Objective, _expand, rho, solve_many
from recscale.scaling.points import Points

LEVEL = 0.90
CASE_BOOTSTRAP_FROM = 20
TUNING = 1.345  # Huber's constant: 95 % efficient under normal noise
IDENTIFIED, WEAK = 0.5, 1.5  # interval width over value
PROFILE_STEPS = np.concatenate([np.linspace(0.3, 3.0, 10), np.geomspace(3.6, 400.0, 10)])  # in standard errors
PROFILE_BEYOND = 4.0  # a profile runs to this multiple of the deviance at the edge of the interval
PROBED_DRAWS = 48
BOOTSTRAPS = ("auto", "case", "cluster", "residual")
Natural = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Noise:
    """variance: of a residual, in units; dof: degrees of freedom behind it (inf if known, 0 if unknown).

    trusted: the points agree with the sigma they came with.
    """

    variance: float
    dof: float
    note: str
    trusted: bool


def noise_scale(goal: Objective, residual_N: np.ndarray, p: int, sigma_known: bool, sigma_dof: float) -> Noise:
    """Pools sigma with the residuals, or sets it aside where the points scatter significantly more than it says."""
    weights = goal.weight_N
    n = float(weights.sum())
    left = n - p
    rss = 2.0 * float((weights * rho(residual_N, max(goal.delta, _spread(residual_N)))).sum())
    if not sigma_known:
        if left <= 0:
            return Noise(math.nan, 0, "no residual degree of freedom", False)
        return Noise(rss / left, left, "", False)
    if left > 0 and stats.f.sf(rss / left, left, min(sigma_dof, 1e9)) < 0.05:
        return Noise(rss / left, left, f"the points scatter {math.sqrt(rss / left):.1f} sigma around the curve", False)
    if math.isinf(sigma_dof):
        return Noise(1.0, math.inf, "", True)
    return Noise((rss + sigma_dof) / (max(left, 0) + sigma_dof), max(left, 0) + sigma_dof, "", True)


def _spread(residual_N: np.ndarray) -> float:
    """1.345 times the robust standard deviation of the residuals."""
    return TUNING * 1.4826 * float(np.median(np.abs(residual_N)))


def aicc(goal: Objective, residual_N: np.ndarray, p: int, sigma_dof: float) -> tuple[float, str]:
    """Akaike's criterion with its small-sample correction, up to a constant of the data; k = p + 1 has the noise scale.

    Errors are normal for a least-squares fit, else Huber's (normal inside 1.345 tau, exponential tails beyond), tau
    being the scale that fits best. The replicates behind sigma speak of that scale like points without parameters, so
    they add sigma_dof to the number of points; with a known sigma (inf) the scale is 1 and is no parameter.
    """
    residual_N = residual_N[np.isfinite(residual_N)]
    tuning = math.inf if math.isinf(goal.delta) else TUNING
    area = 0.0
    if not math.isinf(tuning):
        normal = 1 - 2 * stats.norm.sf(tuning)
        tails = 2 * math.exp(-0.5 * tuning**2) / tuning / math.sqrt(2 * math.pi)
        area = math.log(normal + tails)
    weights, n = goal.weight_N, float(goal.weight_N.sum())
    smallest = 1e-7 * float((1.0 / goal.unit_N).max()) * (1.0 if goal.scale == "log" else float(np.abs(goal.y_N).max()))

    def deviance(log_tau: float) -> float:
        tau = math.exp(log_tau)
        told = 2.0 * float((weights * rho(residual_N / tau, tuning)).sum()) + n * (2 * log_tau + 2 * area)
        return told + (0.0 if math.isinf(sigma_dof) else sigma_dof * (2 * log_tau + math.exp(-2 * log_tau)))

    k = p + 1
    if math.isinf(sigma_dof):
        return deviance(0.0) - n + 2 * k, ""
    total = n + sigma_dof
    if total - k - 1 <= 0:
        return math.nan, f"{n:g} points are too few for the AICc of {goal.form.name} ({p} parameters and the noise)"
    around = math.log(max(float(np.sqrt(np.average(np.square(residual_N), weights=weights))), smallest))
    low = math.log(smallest)
    best = optimize.minimize_scalar(deviance, bounds=(min(low, around - 5), around + 3), method="bounded")
    log_tau = max(float(best.x), low)
    if math.isinf(tuning):  # the closed form
        rss = float((weights * np.square(residual_N)).sum()) + (sigma_dof or 0.0)
        log_tau = max(0.5 * math.log(max(rss / total, 1e-300)), low)
    return deviance(log_tau) - total + 2 * k + 2 * k * (k + 1) / (total - k - 1), ""


@dataclasses.dataclass(frozen=True)
class Draws:
    """theta_SQ refitted to resampled points; residual_S: of a new run in each draw, in units; kind; discarded share."""

    theta_SQ: np.ndarray
    residual_S: np.ndarray
    kind: str
    discarded: float


def bootstrap(
    goal: Objective,
    points: Points,
    theta_Q: np.ndarray,
    other_CQ: np.ndarray,
    noise: Noise,
    kind: str,
    count: int,
    seed: int,
) -> Draws:
    """Refits to resampled points, each from the optimum and from the other starts.

    case: points are resampled, those of one lineage together ("cluster"), within the levels of an axis that has few.
    residual: normal noise around the fit, its variance drawn from the scaled inverse chi-square where it was estimated;
    for few points, of which resampling would drop an end of an axis. auto: case from 20 lineages on.
    """
    if kind not in BOOTSTRAPS:
        raise ValueError(f"bootstrap: found {kind!r}, expected one of {', '.join(BOOTSTRAPS)}")
    rng = np.random.default_rng(seed)
    lineages = len(set(points.lineage_N))
    if kind == "auto":
        enough = lineages >= CASE_BOOTSTRAP_FROM and points.distinct > len(theta_Q) + 1
        kind = "case" if enough else "residual"
    fitted_1N, _ = goal.form.curve(theta_Q[None], goal.z_KN)
    residual_N = goal.residuals(theta_Q[None], goal.y_N[None])[0][0]
    n, q = len(points), len(theta_Q)
    if kind == "residual":
        sd_S = np.full(count, math.sqrt(noise.variance)) if noise.dof > 0 else np.full(count, math.nan)
        if 0 < noise.dof < math.inf:
            sd_S = sd_S * np.sqrt(noise.dof / rng.chisquare(noise.dof, count))
        drawn_SN = sd_S[:, None] * rng.standard_normal((count, n + 1))
        moved_SN = drawn_SN[:, :n] * goal.unit_N
        y_SN = fitted_1N * np.exp(moved_SN) if goal.scale == "log" else fitted_1N + moved_SN
        weight_SN, new_S, dropped = np.broadcast_to(goal.weight_N, (count, n)), drawn_SN[:, n], 0.0
        if noise.dof <= 0:
            return Draws(np.repeat(theta_Q[None], count, 0), np.full(count, math.nan), kind, 0.0)
    else:
        kind = "cluster" if lineages < n else "case"
        weight_SN, dropped = _resampled(points, count, q, rng)
        y_SN = np.broadcast_to(goal.y_N, (count, n))
        new_S = rng.choice(residual_N, count) * math.sqrt(n / max(n - q, 1))
    starts_CQ = np.concatenate([theta_Q[None], other_CQ])
    return Draws(_refit(goal, starts_CQ, y_SN, weight_SN), new_S, kind, dropped)


def _refit(goal: Objective, starts_CQ: np.ndarray, y_SN: np.ndarray, weight_SN: np.ndarray) -> np.ndarray:
    """The best of the starts for every draw. A start that betters none of the first draws is not tried on the rest."""
    first_Q, *others = starts_CQ

    def solved(start_Q: np.ndarray, some: slice) -> tuple[np.ndarray, np.ndarray]:
        y, weight = y_SN[some], weight_SN[some]
        return solve_many(goal, np.repeat(start_Q[None], len(y), 0), y, weight, tolerance=1e-9)

    best_SQ, best_S = solved(first_Q, slice(None))
    for start_Q in others:
        probe = slice(0, PROBED_DRAWS)
        if not (solved(start_Q, probe)[1] < best_S[probe] * (1 - 1e-6)).any():
            continue
        theta_SQ, loss_S = solved(start_Q, slice(None))
        better_S = loss_S < best_S
        best_SQ[better_S], best_S[better_S] = theta_SQ[better_S], loss_S[better_S]
    return best_SQ


def _resampled(points: Points, count: int, q: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Weights [S, N] of resampled lineages and the share of draws that had to be drawn again."""
    names = {name: index for index, name in enumerate(dict.fromkeys(points.lineage_N))}
    lineage_N = np.array([names[name] for name in points.lineage_N])
    stratum_C = _strata(points, lineage_N, len(names))
    place_N = np.unique(points.x_KN, axis=1, return_inverse=True)[1].ravel()
    rows, refused = [], 0
    while len(rows) < count and refused < 20 * count:
        times_C = np.zeros(len(names))
        for stratum in np.unique(stratum_C):
            members = np.flatnonzero(stratum_C == stratum)
            np.add.at(times_C, rng.choice(members, len(members)), 1.0)
        weight_N = times_C[lineage_N] * points.weight_N
        if len(np.unique(place_N[weight_N > 0])) < q + 1:
            refused += 1
        else:
            rows.append(weight_N)
    if len(rows) < count:
        raise ValueError(
            f"bootstrap: {len(names)} lineages on {points.distinct} places are too few to resample {q} parameters"
        )
    return np.stack(rows), refused / (count + refused)


def _strata(points: Points, lineage_N: np.ndarray, count: int) -> np.ndarray:
    """The levels of the axis with the fewest, where it has few and no lineage spans two of them; else one stratum."""
    for values_N in sorted(points.x_KN, key=lambda values: len(np.unique(values))):
        level_N = np.unique(values_N, return_inverse=True)[1]
        stratum_C = np.zeros(count, np.int64)
        stratum_C[lineage_N] = level_N
        few = 1 < len(np.unique(level_N)) <= count / 4
        if few and (stratum_C[lineage_N] == level_N).all() and np.bincount(stratum_C).min() >= 3:
            return stratum_C
    return np.zeros(count, np.int64)


def percentiles(values_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 90 % percentile interval along the first axis."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values_SN, (tail, 1 - tail), axis=0)
    return low, high


def slopes(function: Natural, theta_SQ: np.ndarray) -> np.ndarray:
    """Derivatives [S, P, Q] of a function [S, Q] -> [S, P] by central differences."""
    count, q = theta_SQ.shape
    step_SQ = 1e-6 * np.maximum(np.abs(theta_SQ), 1e-4)
    moves_SQQ = np.eye(q) * step_SQ[:, None]
    moved = np.stack([theta_SQ[:, None] + moves_SQQ, theta_SQ[:, None] - moves_SQQ])
    up_SQP, down_SQP = function(moved.reshape(-1, q)).reshape(2, count, q, -1)
    return ((up_SQP - down_SQP) / (2 * step_SQ[..., None])).swapaxes(1, 2)


def standard_errors(goal: Objective, theta_Q: np.ndarray, natural: Natural, noise: Noise) -> np.ndarray:
    """Delta method, [P]: model-based for least squares, a sandwich of the Huber score otherwise."""
    _, _, newton, major = (part[0] for part in _expand(goal, theta_Q[None], goal.y_N[None], goal.weight_N[None], None))
    size_Q = np.sqrt(np.maximum(np.diagonal(major), 1e-300))
    if math.isinf(goal.delta):
        covariance = np.linalg.pinv(major / np.outer(size_Q, size_Q)) * noise.variance
    else:
        residual, jacobian = goal.residuals(theta_Q[None], goal.y_N[None])
        score_NQ = (goal.weight_N * np.clip(residual[0], -goal.delta, goal.delta))[:, None] * jacobian[0] / size_Q
        bread = np.linalg.pinv(newton / np.outer(size_Q, size_Q), rcond=1e-9)
        covariance = bread @ (score_NQ.T @ score_NQ) @ bread
    change_PQ = slopes(natural, theta_Q[None])[0] / size_Q
    return np.sqrt(np.maximum(np.diag(change_PQ @ covariance @ change_PQ.T), 0.0))


def profile(
    goal: Objective, theta_Q: np.ndarray, function: Natural, step: float, noise: Noise, floor: float = -math.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Points of the profile of a scalar function of the parameters: values [T] ascending, deviance [T] above the best.

    The function is drawn towards targets on both sides by a strong quadratic tie; what is returned are the values it
    really took, so each is a true point of the profile. deviance <= quantile(noise) is the interval. floor: the
    smallest value that means anything.
    """
    best, enough = goal.at(theta_Q), PROFILE_BEYOND * quantile(noise)
    middle = float(function(theta_Q[None])[0, 0])
    unit = math.sqrt(noise.variance) if noise.variance > 0 else math.sqrt(max(best, 1e-300))
    strength = 300.0 * min(unit, goal.delta) / max(step, 1e-12)
    values, losses = [middle], [best]
    for side in (-1, 1):
        moved_Q = theta_Q
        for reach in PROFILE_STEPS:  # outwards, each from its neighbour, until the deviance is far beyond the interval
            target = max(middle + side * reach * max(step, 1e-12), floor)

            def tie(theta: np.ndarray, target: float = target) -> tuple[np.ndarray, np.ndarray]:
                return strength * (function(theta)[:, 0] - target), strength * slopes(function, theta)[:, 0]

            moved_Q = solve_many(goal, moved_Q[None], tie=tie, iterations=60, tolerance=1e-8)[0][0]
            values.append(float(function(moved_Q[None])[0, 0]))
            losses.append(goal.at(moved_Q))
            if _deviance(goal, theta_Q, np.array(losses[-1:]), best, noise)[0] > enough:
                break
    order = np.argsort(values)
    return np.array(values)[order], _deviance(goal, theta_Q, np.array(losses)[order], best, noise)


def _deviance(goal: Objective, theta_Q: np.ndarray, loss_T: np.ndarray, best: float, noise: Noise) -> np.ndarray:
    """Twice the log-likelihood lost: by the noise variance for least squares or known sigma, else by ratio."""
    if math.isinf(goal.delta) or noise.trusted:
        return 2.0 * np.maximum(loss_T - best, 0.0) / noise.variance
    residual_N = goal.residuals(theta_Q[None], goal.y_N[None])[0][0]
    outside = float((np.abs(residual_N) > goal.delta).mean())
    best = max(best, 1e-300)
    return len(residual_N) * (1.0 + outside) * np.log(np.maximum(loss_T, best) / best)


def quantile(noise: Noise) -> float:
    """The deviance at the edge of the 90 % interval."""
    known = not math.isfinite(noise.dof) or noise.dof <= 0
    return float(stats.chi2.ppf(LEVEL, 1) if known else stats.f.ppf(LEVEL, 1, noise.dof))


def crossing(value_T: np.ndarray, deviance_T: np.ndarray, limit: float) -> tuple[float, float]:
    """The ends of the stretch around the best value whose deviance is below the limit, interpolated in its root."""
    root_T, edge = np.sqrt(np.maximum(deviance_T, 0.0)), math.sqrt(limit)
    best = int(np.argmin(deviance_T))
    ends = []
    for direction in (-1, 1):
        index = best
        while 0 <= index + direction < len(value_T) and root_T[index + direction] <= edge:
            index += direction
        beyond = index + direction
        if not 0 <= beyond < len(value_T):
            ends.append(float(value_T[index]))
            continue
        rise = root_T[beyond] - root_T[index]
        share = (edge - root_T[index]) / rise if rise > 0 else 0.0
        ends.append(float(value_T[index] + share * (value_T[beyond] - value_T[index])))
    return ends[0], ends[1]


def verdict(size: float, interval: tuple[float, float], at_bound: bool) -> str:
    """identified, weak or not identified, by the width of the interval over the size of what it is about."""
    width = (interval[1] - interval[0]) / abs(size) if size else math.inf
    if not math.isfinite(width) or width > WEAK:
        return "not identified"
    return "identified" if width <= IDENTIFIED and not at_bound else "weak"
