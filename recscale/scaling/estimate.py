"""Minimising the Huber loss of a form: seeds, polish, many refits at once, and the certificate of a minimum.

Residuals are ln y^ - ln y ("log") or y^ - y ("identity"), divided by the unit of each point (its sigma where known).
rho(r) = r^2/2 up to delta, delta (|r| - delta/2) beyond; delta = inf is least squares. The reference optimiser is BFGS
with exact gradients in whitened coordinates, on the loss divided by its own scale; bootstraps and profiles go through
`solve_many`, a damped Newton method for many fits at once, and tests hold the two against each other.

S fits at once, N points, K axes, Q inner coordinates, C starts.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize

from recscale.scaling.forms import Form
from recscale.scaling.points import Points

STARTS = 8
AGREEING_STARTS = 3
AGREEMENT = 1e-6
GRADIENT_LIMIT = 1e-2
CONDITION_LIMIT = 1e10
POINTS_PER_PARAMETER = 3
COLLINEAR = 1e3  # condition of the standardised axes above which they move as one
ITERATIONS = 300
PATIENCE = 6
SCALES = ("log", "identity")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of one form on one set of points; delta in residual units, inf for least squares."""

    form: Form
    z_KN: np.ndarray
    y_N: np.ndarray
    unit_N: np.ndarray
    weight_N: np.ndarray
    centre_K: np.ndarray
    scale: str
    delta: float

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds of the inner coordinates."""
        return self.form.bounds(len(self.z_KN))

    def residuals(self, theta_SQ: np.ndarray, y_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals [S, N] and derivatives [S, N, Q]; infinite where a logarithm does not exist."""
        value_SN, jacobian_SNQ = self.form.curve(theta_SQ, self.z_KN)
        if self.scale == "identity":
            return (value_SN - y_SN) / self.unit_N, jacobian_SNQ / self.unit_N[:, None]
        good_SN = value_SN > 0
        safe_SN = np.where(good_SN, value_SN, 1.0)
        residual_SN = np.where(good_SN, (np.log(safe_SN) - np.log(y_SN)) / self.unit_N, np.inf)
        return residual_SN, jacobian_SNQ / (safe_SN * self.unit_N)[..., None]

    def loss(self, residual_SN: np.ndarray, weight_SN: np.ndarray) -> np.ndarray:
        """Weighted sum of rho, [S]."""
        return (weight_SN * rho(residual_SN, self.delta)).sum(-1)

    def at(self, theta_Q: np.ndarray) -> float:
        """The loss of one parameter vector on the points' own data."""
        return float(self.loss(self.residuals(theta_Q[None], self.y_N[None])[0], self.weight_N)[0])


def objective(form: Form, points: Points, scale: str, delta: float) -> Objective:
    """The loss of `form` on `points`. Raises ValueError where form, scale and data do not go together."""
    k, (fewest, most) = len(points.axes), form.axes
    if k < fewest or (most and k > most):
        wanted = f"{fewest}" if most == fewest else f"{fewest} or more" if not most else f"{fewest} to {most}"
        raise ValueError(f"form {form.name}: found {k} axes ({', '.join(points.axes)}), expected {wanted}")
    if scale not in SCALES:
        raise ValueError(f"scale: found {scale!r}, expected one of {', '.join(SCALES)}")
    if (scale == "log" or form.positive_y) and not (points.y_N > 0).all():
        low = points.y_N.min()
        raise ValueError(
            f"{points.metric}: found {low:g}, expected values above 0 for {form.name} on the {scale} scale"
        )
    at_KN = form.coordinates(points.x_KN)
    centre_K = form.centre(at_KN)
    unit_N = np.ones(len(points)) if points.sigma_N is None else points.sigma_N.copy()
    if scale == "log" and points.sigma_N is not None:
        unit_N = unit_N / points.y_N
    return Objective(form, at_KN - centre_K[:, None], points.y_N, unit_N, points.weight_N, centre_K, scale, delta)


def rho(residual: np.ndarray, delta: float) -> np.ndarray:
    """Huber's loss."""
    size = np.abs(residual)
    if math.isinf(delta):
        return 0.5 * np.square(size)
    return np.where(size <= delta, 0.5 * np.square(size), delta * (size - 0.5 * delta))


def pull(residual: np.ndarray, delta: float) -> np.ndarray:
    """psi(r)/r: 1 inside delta, delta/|r| beyond."""
    return (
        np.ones_like(residual) if math.isinf(delta) else np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
    )


def starts(goal: Objective) -> np.ndarray:
    """The best seeds of the form by variable projection on relative residuals, inside the bounds, [C, Q]."""
    row_N = np.sqrt(goal.weight_N) / (goal.unit_N * (goal.y_N if goal.scale == "log" else 1.0))
    theta_CQ, rss_C = goal.form.seeds(goal.z_KN, goal.y_N, row_N)
    return np.clip(theta_CQ[np.argsort(rss_C, kind="stable")[:STARTS]], *goal.bounds)


Tie = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def solve_many(
    goal: Objective,
    theta_SQ: np.ndarray,
    y_SN: np.ndarray | None = None,
    weight_SN: np.ndarray | None = None,
    tie: Tie | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = 1e-13,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises S losses at once from theta_SQ: the minimisers [S, Q] and their losses [S].

    y_SN, weight_SN: data and weights of each fit (default: the points' own). tie(theta_SQ) -> (residual_S, gradient_SQ)
    adds residual^2 / 2 to each loss, which holds a function of the parameters near a value. A fit is done when its
    loss fell by less than tolerance of itself in each of several steps.
    Newton steps on the Huber loss (only points inside delta have curvature), damped towards the majorising step in
    which every point has curvature delta/|r|; that step always descends, so the damping ends.
    """
    theta_SQ = np.array(theta_SQ, np.float64)
    count, n = len(theta_SQ), len(goal.y_N)
    y_SN = np.broadcast_to(goal.y_N if y_SN is None else y_SN, (count, n))
    weight_SN = np.broadcast_to(goal.weight_N if weight_SN is None else weight_SN, (count, n))
    alive, damping_S = np.arange(count), np.full(count, 1e-3)
    loss_S, grad_SQ, newton, major = _expand(goal, theta_SQ, y_SN, weight_SN, tie)
    still_S = np.zeros(count, np.int64)
    for _ in range(iterations):
        step_AQ = _step(goal, theta_SQ[alive], grad_SQ[alive], newton[alive], major[alive], damping_S[alive])
        tried_AQ = np.clip(theta_SQ[alive] + step_AQ, *goal.bounds)
        loss_A, grad_A, newton_A, major_A = _expand(goal, tried_AQ, y_SN[alive], weight_SN[alive], tie)
        better_A = loss_A < loss_S[alive]
        moved = alive[better_A]
        gained_A = np.where(better_A, loss_S[alive] - loss_A, 0.0)
        theta_SQ[moved], loss_S[moved] = tried_AQ[better_A], loss_A[better_A]
        grad_SQ[moved], newton[moved], major[moved] = grad_A[better_A], newton_A[better_A], major_A[better_A]
        damping_S[alive] = np.clip(damping_S[alive] * np.where(better_A, 0.2, 5.0), 1e-9, 1e9)
        small_A = gained_A <= tolerance * np.maximum(np.abs(loss_S[alive]), 1e-300)
        still_S[alive] = np.where(small_A, still_S[alive] + 1, 0)
        alive = alive[still_S[alive] < PATIENCE]
        if not len(alive):
            break
    return theta_SQ, loss_S


def _expand(
    goal: Objective, theta_SQ: np.ndarray, y_SN: np.ndarray, weight_SN: np.ndarray, tie: Tie | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Loss, gradient and the two curvature matrices at theta."""
    with np.errstate(all="ignore"):
        residual_SN, jacobian_SNQ = goal.residuals(theta_SQ, y_SN)
        pull_SN = weight_SN * pull(residual_SN, goal.delta)
        inside_SN = weight_SN * (np.abs(residual_SN) <= goal.delta)
        loss_S = goal.loss(residual_SN, weight_SN)
        slope_SN = np.where(np.isfinite(residual_SN), pull_SN * residual_SN, 0.0)
        grad_SQ = np.matmul(slope_SN[:, None], jacobian_SNQ)[:, 0]
        turned_SQN = jacobian_SNQ.swapaxes(1, 2)
        major_SQQ = np.matmul(turned_SQN * pull_SN[:, None], jacobian_SNQ)
        newton_SQQ = major_SQQ if math.isinf(goal.delta) else np.matmul(turned_SQN * inside_SN[:, None], jacobian_SNQ)
        if tie is not None:
            value_S, slope_SQ = tie(theta_SQ)
            loss_S = loss_S + 0.5 * np.square(value_S)
            grad_SQ = grad_SQ + value_S[:, None] * slope_SQ
            outer_SQQ = slope_SQ[:, :, None] * slope_SQ[:, None]
            major_SQQ, newton_SQQ = major_SQQ + outer_SQQ, newton_SQQ + outer_SQQ
        bad_S = ~(np.isfinite(loss_S) & np.isfinite(grad_SQ).all(-1) & np.isfinite(major_SQQ).all((-1, -2)))
    return np.where(bad_S, np.inf, loss_S), grad_SQ, newton_SQQ, major_SQQ


def _step(
    goal: Objective, theta: np.ndarray, grad: np.ndarray, newton: np.ndarray, major: np.ndarray, damping: np.ndarray
) -> np.ndarray:
    """One damped step; coordinates on a bound that want to leave the box stay where they are."""
    lower_Q, upper_Q = goal.bounds
    held = ((theta <= lower_Q) & (grad > 0)) | ((theta >= upper_Q) & (grad < 0))
    size = np.sqrt(np.maximum(np.diagonal(major, axis1=1, axis2=2), 1e-300))
    size = np.where(held | ~np.isfinite(size), 1.0, size)
    eye = np.eye(theta.shape[1])
    matrix = newton + damping[:, None, None] * (major + eye * np.square(size)[:, None])
    free = (~held[:, :, None]) & (~held[:, None])
    scaled = np.where(free, np.nan_to_num(matrix) / (size[:, :, None] * size[:, None]), 0.0)
    scaled = scaled + eye * np.where(held, 1.0, 1e-13)[:, None]
    right = np.where(held, 0.0, -np.nan_to_num(grad) / size)
    try:
        solved = np.linalg.solve(scaled, right[..., None])[..., 0]
    except np.linalg.LinAlgError:
        solved = right / (1.0 + damping[:, None])
    return solved / size


def polish(goal: Objective, theta_CQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best minimiser [Q] and the losses [C] reached from all starts: `solve_many`, then BFGS from each."""
    theta_CQ, loss_C = solve_many(goal, theta_CQ)
    lower_Q, upper_Q = goal.bounds
    for index in np.argsort(loss_C)[:STARTS]:
        theta_Q = theta_CQ[index]
        if (theta_Q <= lower_Q).any() or (theta_Q >= upper_Q).any() or not np.isfinite(loss_C[index]):
            continue
        finer_Q = bfgs(goal, theta_Q)
        value = goal.at(finer_Q)
        if value < loss_C[index] and (finer_Q > lower_Q).all() and (finer_Q < upper_Q).all():
            theta_CQ[index], loss_C[index] = finer_Q, value
    return theta_CQ[int(np.argmin(loss_C))], loss_C


def bfgs(goal: Objective, theta_Q: np.ndarray) -> np.ndarray:
    """BFGS from theta with the exact gradient, in coordinates in which the majorising curvature is the identity."""
    loss, _, _, major = _expand(goal, theta_Q[None], goal.y_N[None], goal.weight_N[None], None)
    unit = float(loss[0]) or 1.0
    values, vectors = np.linalg.eigh(major[0] / unit)
    white = vectors / np.sqrt(np.maximum(values, 1e-12 * values.max() or 1.0))

    def value_and_gradient(move: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad, _, _ = _expand(goal, (theta_Q + white @ move)[None], goal.y_N[None], goal.weight_N[None], None)
        if not np.isfinite(value[0]):
            return 1e300, np.zeros_like(move)
        return float(value[0]) / unit, white.T @ grad[0] / unit

    options = {"gtol": 1e-7, "maxiter": 2000}
    found = optimize.minimize(value_and_gradient, np.zeros_like(theta_Q), jac=True, method="BFGS", options=options)
    return theta_Q + white @ found.x


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What shows that a fit is a minimum that the points carry; reasons: why it is none, empty if it is.

    gradient: the largest slope of the loss along a coordinate, in units of the noise of one point; agreeing of starts
    reach the best loss; condition of the scaled curvature; on_bound: coordinates at their bound; n points (replicates
    behind sigma count as their degrees of freedom), p parameters.
    """

    gradient: float
    agreeing: int
    starts: int
    condition: float
    on_bound: tuple[str, ...]
    n: float
    p: int
    reasons: tuple[str, ...]

    @property
    def minimum(self) -> bool:
        """Whether the fit is a minimum at all, however few the points."""
        return self.gradient <= GRADIENT_LIMIT and self.agreeing >= min(AGREEING_STARTS, self.starts)


def certificate(
    goal: Objective, points: Points, theta_Q: np.ndarray, params: dict[str, float], losses: np.ndarray
) -> Certificate:
    """Judges one fit. The optimiser's own success flag is not asked: it reports success on early stops and failure on
    exact optima (law_estimation: arXiv 2404.10102 replicated)."""
    loss, grad, _, major = _expand(goal, theta_Q[None], goal.y_N[None], goal.weight_N[None], None)
    residual_N = goal.residuals(theta_Q[None], goal.y_N[None])[0][0]
    p, q = len(params), len(theta_Q)
    noise = _noise_of_one(goal, residual_N, q)
    size_Q = np.sqrt(np.maximum(np.diagonal(major[0]), 1e-300))
    inside_Q = (theta_Q > goal.bounds[0]) & (theta_Q < goal.bounds[1])  # on a bound the slope is said by the bound
    gradient = float(np.abs(grad[0] / size_Q)[inside_Q].max(initial=0.0) / noise)
    condition = float(np.linalg.cond(major[0] / np.outer(size_Q, size_Q)))
    best = min(float(losses.min()), float(loss[0]))
    slack = AGREEMENT * max(best, noise**2)
    agreeing = int((losses - best <= slack).sum())
    on_bound = tuple(_on_bound(goal, theta_Q, params))
    enough = len(points) + (0.0 if math.isinf(points.sigma_dof) or points.sigma_N is None else points.sigma_dof)
    reasons = []
    if not gradient <= GRADIENT_LIMIT:
        reasons.append(f"scaled gradient {gradient:.3g} above {GRADIENT_LIMIT:g}: not a minimum")
    if float(loss[0]) - best > slack:
        reasons.append(f"another start reaches a loss {1 - best / float(loss[0]):.2%} lower")
    if agreeing < min(AGREEING_STARTS, len(losses)):
        reasons.append(f"{agreeing} of {len(losses)} starts reach the best loss, needs {AGREEING_STARTS}")
    if not condition < CONDITION_LIMIT:
        reasons.append(f"condition {condition:.3g} of the curvature, must be below {CONDITION_LIMIT:g}")
    reasons += [f"{name}" for name in on_bound]
    if _condition_of_axes(goal) > COLLINEAR:
        reasons.append(f"{' and '.join(points.axes)} move together: no fit can tell them apart")
    if np.ptp(points.y_N) <= 1e-12 * np.abs(points.y_N).max():
        reasons.append(f"{points.metric} does not move")
    if points.distinct < p + 1:
        reasons.append(f"{points.distinct} distinct places on the axes for {p} parameters, needs {p + 1}")
    if enough < POINTS_PER_PARAMETER * p:
        counted = f"{len(points)} points" + (
            f" and {enough - len(points):g} replicates" if enough > len(points) else ""
        )
        reasons.append(f"{counted} for {p} parameters, needs {POINTS_PER_PARAMETER * p}")
    return Certificate(gradient, agreeing, len(losses), condition, on_bound, enough, p, tuple(reasons))


def _condition_of_axes(goal: Objective) -> float:
    """Condition of the standardised axes, 1 for one axis; an axis that does not move counts as infinite."""
    if len(goal.z_KN) < 2 or goal.form.raw:
        return 1.0
    moved_KN = goal.z_KN - goal.z_KN.mean(1, keepdims=True)
    size_K1 = np.linalg.norm(moved_KN, axis=1, keepdims=True)
    if not (size_K1 > 1e-12).all():
        return math.inf
    return float(np.linalg.cond(moved_KN / size_K1))


def _noise_of_one(goal: Objective, residual_N: np.ndarray, q: int) -> float:
    """The size of one residual, capped at delta as in the loss: what a gradient is measured against."""
    capped_N = np.minimum(np.abs(residual_N), goal.delta)
    spread = math.sqrt(float(np.average(np.square(capped_N), weights=goal.weight_N)) * len(residual_N))
    roundoff = 1e-7 * float((1.0 / goal.unit_N).max()) * (1.0 if goal.scale == "log" else float(np.abs(goal.y_N).max()))
    return max(spread / math.sqrt(max(len(residual_N) - q, 1)), roundoff)


def _on_bound(goal: Objective, theta_Q: np.ndarray, params: dict[str, float]) -> list[str]:
    """One sentence per bound that is active and per sign that the form does not allow."""
    form = goal.form
    found = []
    lower_Q, upper_Q = goal.bounds
    edge = 1e-9 + 1e-6 * np.abs(np.where(np.isfinite(lower_Q), lower_Q, 0.0))
    if ((theta_Q - lower_Q) <= edge).any():
        found.append("an exponent or shape stands on its lower bound: a logarithm may say as much")
    if ((upper_Q - theta_Q) <= 1e-6 * np.abs(np.where(np.isfinite(upper_Q), upper_Q, 1.0))).any():
        found.append("an exponent or shape stands on its upper bound: a step, not a law")
    for name, value in params.items():
        if name.split("_")[0] in form.positive and not value > 0:
            found.append(f"{name} = {value:.3g} is not above 0: the metric does not move the way the form says")
    if form.limit and not form.positive_y:
        value, (low, high) = params[form.limit], form.limits
        if (goal.y_N > 0).all() and not low < value < high:
            where = f"below {low:g}" if value <= low else f"above {high:g}"
            found.append(f"{form.limit} = {value:.4g} lies {where}: the limit is not in the data")
    if form.limit and form.positive_y and params[form.limit] < 1e-6 * float(goal.y_N.min()):
        found.append(f"{form.limit} runs to 0: the limit is not in the data")
    return found
