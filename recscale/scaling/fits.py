"""Fitting a law: `fit` for one form, `compare` for several against each other and against the null.

A fit without its certificate raises `Uncertified`; `force=True` returns it, marked, for inspection.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recscale.scaling import intervals as sure
from recscale.scaling.estimate import Objective, certificate, objective, polish, solve_many, starts
from recscale.scaling.forms import FORMS
from recscale.scaling.law import Gain, Law, Sizes
from recscale.scaling.points import Points

MINIMUM_DRAWS = 200
INDISTINGUISHABLE = 2.0
FAR_WORSE = 10.0  # AICc: a form this far behind another, refused or not, is no law of the data
LAD_STEPS = 40


class Uncertified(ValueError):
    """A fit that must not be printed as a law; its message says why, `law` is the fit."""

    def __init__(self, law: Law):
        super().__init__(f"{law.form}: no certified law: {'; '.join(law.reasons)}")
        self.law = law


def huber_delta(points: Points, form: str, scale: str, delta: str | float) -> float:
    """delta in residual units: a number as given; "lsq" inf; "lad" 0; "seed" 1.345 sigma.

    "seed" takes sigma from the points (seed replicates); where it is unknown, from the median absolute residual of the
    form, twice refined.
    """
    if isinstance(delta, int | float) and not isinstance(delta, bool):
        if not delta > 0:
            raise ValueError(f"delta: found {delta}, expected a number above 0, seed, lsq or lad")
        return float(delta)
    if delta in ("lsq", "lad"):
        return math.inf if delta == "lsq" else 0.0
    if delta != "seed":
        raise ValueError(f"delta: found {delta!r}, expected a number above 0, seed, lsq or lad")
    if points.sigma_N is not None:
        return sure.TUNING
    found = math.inf
    for _ in range(3):
        goal = objective(FORMS[form], points, scale, found)
        theta_Q, _ = polish(goal, starts(goal))
        residual_N = goal.residuals(theta_Q[None], goal.y_N[None])[0][0]
        found = max(sure._spread(residual_N), 1e-12)
    return found


def minimum(
    points: Points, form: str, scale: str, delta: float
) -> tuple[Objective, np.ndarray, np.ndarray, np.ndarray]:
    """The objective, its best theta [Q], the losses of all starts [C] and the starts [C, Q]."""
    if delta > 0:
        goal = objective(FORMS[form], points, scale, delta)
        start_CQ = starts(goal)
        theta_Q, losses = polish(goal, start_CQ)
        return goal, theta_Q, losses, start_CQ
    size = float(np.std(np.log(points.y_N) if scale == "log" else points.y_N))
    goal, theta_Q, losses, start_CQ = minimum(points, form, scale, max(1e-3 * size, 1e-9))
    for _ in range(LAD_STEPS):  # least absolute deviations: delta halved until the sum stands still
        narrower = dataclasses.replace(goal, delta=goal.delta / 2)
        moved_Q, _ = solve_many(narrower, theta_Q[None])
        change = abs(narrower.at(moved_Q[0]) / narrower.delta - goal.at(theta_Q) / goal.delta)
        goal, theta_Q = narrower, moved_Q[0]
        if change <= 1e-10 * goal.at(theta_Q) / goal.delta:
            break
    return goal, theta_Q, np.full(len(losses), goal.at(theta_Q)), start_CQ


def fit(
    points: Points,
    form: str = "additive",
    *,
    scale: str = "log",
    delta: str | float = "seed",
    seed: int = 0,
    draws: int = 1000,
    bootstrap: str = "auto",
    profiles: bool = True,
    force: bool = False,
) -> Law:
    """Fits one form to the points that are not held out.

    scale: residuals of the logarithm ("log", losses) or of the metric itself ("identity", bounded metrics and small
    effects). delta: see `huber_delta`. profiles: without them, intervals are those of the bootstrap alone. Raises
    Uncertified (unless force) where the certificate fails, ValueError for an unknown form, data it does not suit, or
    fewer than 200 draws.
    """
    if form not in FORMS:
        raise ValueError(f"form: found {form!r}, expected one of {', '.join(FORMS)}")
    if draws < MINIMUM_DRAWS:
        raise ValueError(f"draws: found {draws}, expected at least {MINIMUM_DRAWS} for a 90 % interval")
    seen = points.fitted
    if not len(seen):
        raise ValueError("points: all are held out, expected some to fit")
    goal, theta_Q, losses, start_CQ = minimum(seen, form, scale, huber_delta(seen, form, scale, delta))
    entry = goal.form
    names = entry.names(seen.axes)
    natural_P = entry.natural(theta_Q[None], goal.centre_K)[0]
    params = {name: float(value) for name, value in zip(names, natural_P, strict=True)}
    proof = certificate(goal, seen, theta_Q, params, losses)
    residual_N = goal.residuals(theta_Q[None], goal.y_N[None])[0][0]
    known = seen.sigma_N is not None
    noise = sure.noise_scale(goal, residual_N, len(names), known, seen.sigma_dof)
    others_CQ = start_CQ[[0, len(start_CQ) // 2]]
    found = sure.bootstrap(goal, seen, theta_Q, others_CQ, noise, bootstrap, draws, seed)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        draws_SP = entry.natural(found.theta_SQ, goal.centre_K)
    errors_P = sure.standard_errors(goal, theta_Q, lambda theta: entry.natural(theta, goal.centre_K), noise)
    law = Law(
        form=form,
        axes=seen.axes,
        params=params,
        stderr={name: float(value) for name, value in zip(names, errors_P, strict=True)},
        intervals={},
        verdicts={},
        certificate=proof,
        notes=_notes(noise, found),
        scale=scale,
        delta=goal.delta,
        n=len(seen),
        objective=goal.at(theta_Q),
        residual_sd=_residual_sd(goal, residual_N, len(names)),
        aicc=math.nan,
        aicc_note="",
        domain={axis: (float(x.min()), float(x.max())) for axis, x in seen.x.items()},
        metric=seen.metric,
        data_hash=seen.data_hash,
        bootstrap=found.kind,
        draws_SP=draws_SP,
        residual_S=found.residual_S * float(np.median(goal.unit_N)),
        sigma_trusted=noise.trusted,
    )
    law = _with_intervals(law, goal, theta_Q, noise, profiles)
    score, note = sure.aicc(goal, residual_N, len(names), seen.sigma_dof if known and noise.trusted else 0.0)
    law = dataclasses.replace(law, aicc=score, aicc_note=note)
    if proof.reasons and not force:
        raise Uncertified(law)
    return law


def _notes(noise: sure.Noise, found: sure.Draws) -> tuple[str, ...]:
    notes = [noise.note] if noise.note else []
    if found.discarded:
        notes.append(f"{found.discarded:.1%} of the bootstrap draws had too few distinct places and were drawn again")
    return tuple(notes)


def _residual_sd(goal: Objective, residual_N: np.ndarray, p: int) -> float:
    moved_N = residual_N * goal.unit_N
    return float(np.sqrt(np.square(moved_N).sum() / max(len(moved_N) - p, 1)))


def _with_intervals(law: Law, goal: Objective, theta_Q: np.ndarray, noise: sure.Noise, profiled: bool) -> Law:
    """Adds intervals, profiles and verdicts."""
    entry = goal.form
    lows, highs = sure.percentiles(law.draws_SP)
    intervals = {
        name: (min(float(low), law.params[name]), max(float(high), law.params[name]))
        for name, low, high in zip(law.params, lows, highs, strict=True)
    }
    verdicts, profiles = {}, {}
    for index, name in enumerate(law.params):
        if name != entry.limit and name.split("_")[0] not in entry.exponents:
            continue

        def one(theta: np.ndarray, index: int = index) -> np.ndarray:
            return entry.natural(theta, goal.centre_K)[:, index : index + 1]

        if profiled and noise.dof > 0:
            step = (
                law.stderr[name] if math.isfinite(law.stderr[name]) and law.stderr[name] > 0 else abs(law.params[name])
            )
            value_T, deviance_T = sure.profile(goal, theta_Q, one, step, noise)
            profiles[name] = (value_T, deviance_T)
            low, high = sure.crossing(value_T, deviance_T, sure.quantile(noise))
            intervals[name] = min(low, intervals[name][0]), max(high, intervals[name][1])
        verdicts[name] = _verdict(law, name, intervals[name], bool((goal.y_N > 0).all()))
        low, high = entry.limits
        if name == entry.limit and (goal.y_N > 0).all() and low <= law.params[name] <= high:
            ends = np.clip(intervals[name], low, high)  # a loss cannot end below 0, nor a share above 1
            intervals[name] = float(ends[0]), float(ends[1])
    return dataclasses.replace(law, intervals=intervals, verdicts=verdicts, profiles=profiles)


def _verdict(law: Law, name: str, interval: tuple[float, float], bounded: bool) -> str:
    if not law.certificate.minimum:
        return "not identified"
    entry = FORMS[law.form]
    if name != entry.limit:
        edges = (0.0101, 0.99e4) if name == "R*" else (1.001e-5, math.inf)
        return sure.verdict(law.params[name], interval, interval[0] <= edges[0] or interval[1] >= edges[1])
    # A limit is known as well as what is left above it: 5.1 +- .1 says nothing .1 away.
    reached = float(law.curve(law.corner())[0])
    low, high = entry.limits
    if bounded and not low <= law.params[name] <= high:
        return "not identified"
    return sure.verdict(reached - law.params[name], interval, bounded and (interval[0] <= low or interval[1] >= high))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """laws in the order asked for, certified or not; best: the law to quote, None if none may be; near: names of others
    within 2 of its AICc; text: one sentence on what beats what; problems: (form, why it could not be fitted at all)."""

    laws: tuple[Law, ...]
    best: Law | None
    near: tuple[str, ...]
    text: str
    problems: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, form: str) -> Law:
        """The fit of a form; raises KeyError."""
        return {law.form: law for law in self.laws}[form]

    def gain_per_doubling(
        self, axis: str, at: Mapping[str, float] | None = None, count: int = 4000, seed: int = 0
    ) -> Gain:
        """The gain of a doubling averaged by Akaike weight over the certified forms that move with x.

        Where AICc cannot weigh the first form asked for, that form speaks alone if certified; where none is certified,
        all speak. Default place: the largest sizes fitted.
        """
        sloping = [law for law in self.laws if law.form != "constant"]
        usable = [law for law in sloping if law.certified and not law.delta_aicc > FAR_WORSE] or sloping
        first = self.laws[0]
        if math.isnan(first.weight) and any(law is first for law in usable):
            return first.gain_per_doubling(axis, at)
        weights = np.nan_to_num(np.array([law.weight for law in usable]))
        weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(usable), 1 / len(usable))
        here = dict(at or first.corner())
        ends = {name: np.array([value, value * (2 if name == axis else 1)]) for name, value in here.items()}
        rng = np.random.default_rng(seed)
        parts = []
        for law, weight in zip(usable, weights, strict=True):
            drawn_S2 = law.drawn(ends)
            parts.append(drawn_S2[rng.integers(len(drawn_S2), size=round(float(weight) * count))])
        drawn_S2 = np.concatenate(parts)
        low, high = sure.percentiles(drawn_S2[:, 0] - drawn_S2[:, 1])
        value_2 = weights @ np.stack([law.curve(ends) for law in usable])
        value = float(value_2[0] - value_2[1])
        return Gain(value, min(float(low), value), max(float(high), value))

    def mixed(self, x: Sizes, runs: bool = False, count: int = 4000, seed: int = 0) -> np.ndarray:
        """Draws [S, M] at x averaged over the certified forms within 2 AICc of the best, by Akaike weight."""
        near = [law for law in self.laws if law is self.best or law.form in self.near]
        if not near:
            raise ValueError(f"no certified law to average: {self.text}")
        weights = np.nan_to_num(np.array([law.weight for law in near]))
        weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(near), 1 / len(near))
        rng = np.random.default_rng(seed)
        parts = []
        for law, weight in zip(near, weights, strict=True):
            values_SM = law.drawn_runs(x) if runs else law.drawn(x)
            parts.append(values_SM[rng.integers(len(values_SM), size=round(float(weight) * count))])
        return np.concatenate(parts)


def compare(
    points: Points,
    forms: Sequence[str] = ("additive", "log"),
    *,
    scale: str = "log",
    delta: str | float = "seed",
    **options: Any,
) -> Comparison:
    """Fits several forms with one loss and one noise model, and ranks them by AICc.

    The logarithmic null is always among them. A form that the data do not suit is listed in `problems`.
    """
    asked = [*forms] + [name for name in ("log",) if name not in forms]
    seen = points.fitted
    width = huber_delta(seen, next(form for form in asked if form in FORMS), scale, delta)
    laws, problems = [], []
    for form in asked:
        try:
            laws.append(fit(points, form, scale=scale, delta=width if width > 0 else "lad", force=True, **options))
        except ValueError as error:
            problems.append((form, str(error)))
    if not laws:
        raise ValueError("; ".join(f"{form}: {why}" for form, why in problems))
    laws = _ranked(laws, seen, scale)
    best, near, text = _judged(laws)
    return Comparison(tuple(laws), best, near, text, tuple(problems))


def _ranked(laws: Sequence[Law], points: Points, scale: str) -> list[Law]:
    """AICc under one noise model: sigma holds if any form reaches it, else it only weighs the points."""
    dof = points.sigma_dof if any(law.sigma_trusted for law in laws) else 0.0
    scored = []
    for law in laws:
        goal = objective(FORMS[law.form], points, scale, law.delta)
        theta_1Q = goal.form.inner(law.params_P[None], goal.centre_K)
        residual_N = goal.residuals(theta_1Q, goal.y_N[None])[0][0]
        score, note = sure.aicc(goal, residual_N, len(law.params), dof)
        scored.append(dataclasses.replace(law, aicc=score, aicc_note=note))
    known = [law.aicc for law in scored if not math.isnan(law.aicc)]
    if not known:
        return scored
    total = sum(math.exp(-0.5 * (score - min(known))) for score in known)
    return [
        dataclasses.replace(
            law, delta_aicc=law.aicc - min(known), weight=math.exp(-0.5 * (law.aicc - min(known))) / total
        )
        for law in scored
    ]


def _judged(laws: Sequence[Law]) -> tuple[Law | None, tuple[str, ...], str]:
    """Which law may be quoted, which forms it cannot be told from, and one sentence."""
    usable = [law for law in laws if law.certified]
    refused = [law for law in laws if not law.certified]
    why = "".join(f" {law.form} refused: {'; '.join(law.reasons)}." for law in refused)
    if not usable:
        return None, (), f"No form is certified.{why}"
    if any(math.isnan(law.aicc) for law in usable):
        notes = "; ".join(law.aicc_note for law in usable if law.aicc_note)
        return usable[0], tuple(law.form for law in usable[1:]), f"{usable[0].form}: not compared, {notes}.{why}"
    best, *rest = sorted(usable, key=lambda law: law.aicc)
    ahead = [law for law in refused if best.aicc - law.aicc > FAR_WORSE]
    if ahead:
        margin = best.aicc - min(law.aicc for law in ahead)
        names = " and ".join(law.form for law in ahead)
        told = f"No law: {best.form} is certified but fits far worse (AICc by {margin:.0f}) than the refused {names}."
        return None, (), f"{told}{why}"
    near = tuple(law.form for law in rest if law.aicc - best.aicc < INDISTINGUISHABLE)
    if near:
        return best, near, f"{best.form} fits best, indistinguishable from {' and '.join(near)}.{why}"
    margin = f", AICc lower by {rest[0].aicc - best.aicc:.1f} or more" if rest else ""
    return best, (), f"{best.form} preferred{margin}.{why}"
