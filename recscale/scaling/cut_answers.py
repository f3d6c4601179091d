"""What the one-axis laws of a star design say: the next doubling of each axis, its cost, and their order."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recscale.scaling.figures import short_number
from recscale.scaling.fits import Gain
from recscale.scaling.law_file import as_json
from recscale.scaling.laws import AxisLaw

BULKY = ("draws", "residual_draws", "profiles")


def _interval(gain: Gain, digits: int = 4) -> str:
    return f"90 % {gain.low:.{digits}f} to {gain.high:.{digits}f}"


def cut_answer(law: AxisLaw) -> str:
    """What to expect of the next doubling of one axis, and what it costs, in one sentence."""
    spec = law.spec
    if not law.fits:
        return f"Nothing can be said: {law.problem}."
    top = float(law.x_N[-1])
    if spec.end:
        return f"No next doubling beyond {short_number(top)} {spec.unit}: {spec.end}."
    step = f"doubling from {short_number(top)} to {short_number(2 * top)} {spec.unit}"
    amount = f"{abs(law.gain.value):.4f} {spec.metric_unit} ({_interval(law.gain)})"
    if not math.isfinite(law.gain.low):
        told = f"{step} gains about {abs(law.gain.value):.4f} {spec.metric_unit}, interval unknown"
    elif law.gain.flat:
        told = f"{step} shows no gain: flat, {law.gain.value:.4f} {spec.metric_unit} ({_interval(law.gain)})"
    elif law.gain.value > 0:
        told = f"{step} lowers {spec.split} {spec.metric} by {amount}"
    else:
        told = f"{step} raises {spec.split} {spec.metric} by {amount}"
    refused = "" if law.quoted else "; no form is certified, so this is for orientation only"
    return f"{told[0].upper()}{told[1:]}, at {_cost(law)}{refused}."


def _cost(law: AxisLaw) -> str:
    if law.cost is None:
        return "an unrecorded cost"
    if law.cost.extra <= 1e-3 * law.cost.now:
        return f"no extra {law.cost.unit}"
    return f"{short_number(law.cost.extra)} more {law.cost.unit} ({law.cost.factor:.2f} times as many)"


def ordering(laws: Sequence[AxisLaw]) -> str:
    """All axes from the largest gain per doubling to the smallest, naming neighbours whose intervals overlap."""
    fitted = sorted((law for law in laws if law.fits and not law.spec.end), key=lambda law: -law.gain.value)
    if not fitted:
        return "No axis could be fitted, so nothing can be put in order."
    helpful = [law for law in fitted if law.gain.value > 0 and not law.gain.flat]
    flat = [law.spec.label for law in fitted if law.gain.flat]
    harmful = [law.spec.label for law in fitted if law.gain.value <= 0 and not law.gain.flat]
    parts = []
    if helpful:
        parts.append("By gain per doubling: " + ", then ".join(law.spec.label for law in helpful) + ".")
    close = [
        f"{first.spec.label} and {second.spec.label}"
        for first, second in itertools.pairwise(helpful)
        if second.gain.high >= first.gain.low
    ]
    if close:
        parts.append(f"Not settled, the intervals overlap: {'; '.join(close)}.")
    if flat:
        parts.append(f"Flat where the study ends: {', '.join(flat)}.")
    if harmful:
        parts.append(f"Worse when scaled: {', '.join(harmful)}.")
    return " ".join([*parts, *_per_cost(helpful)])


def _per_cost(helpful: Sequence[AxisLaw]) -> list[str]:
    """The order by gain per extra cost, for each unit of cost that two or more axes share."""
    parts = []
    costed = [(law, law.cost) for law in helpful if law.cost is not None and law.cost.extra > 1e-3 * law.cost.now]
    for unit in dict.fromkeys(cost.unit for _, cost in costed):
        shared = [(law.gain.value / cost.extra, law.spec.label) for law, cost in costed if cost.unit == unit]
        if len(shared) > 1:
            listed = ", then ".join(label for _, label in sorted(shared, reverse=True))
            parts.append(f"By gain per extra {unit}: {listed}.")
    return parts


def cut_facts(law: AxisLaw) -> list[str]:
    """What stands behind a one-axis law: values, runs, noise, floor."""
    spec = law.spec
    if not len(law.x_N):
        return ["No finished run belongs to this axis."]
    facts = [
        f"{len(law.x_N)} values of {spec.label} from {short_number(law.x_N[0])} to {short_number(law.x_N[-1])} "
        f"{spec.unit}, {int(law.seeds_N.sum())} runs; noise from {law.noise_source}."
    ]
    if np.isfinite(law.stderr_N).any():
        shared = "common to all points, it moves the floor and not the shape" if spec.paired else "in every point"
        facts.append(
            f"Sampling error of the evaluation: {np.nanmedian(law.stderr_N):.4f} {spec.metric_unit}, {shared}."
        )
    if law.problem:
        return [*facts, f"Not fitted: {law.problem}."]
    return [*facts, law.floor_sentence(), *(f"{law.power.form}: {note}." for note in law.power.notes)]


def cut_json(law: AxisLaw) -> Mapping[str, Any]:
    """A one-axis law as plain data, its points included; without draws."""
    spec, gain = law.spec, law.gain
    return {
        "name": spec.name,
        "label": spec.label,
        "unit": spec.unit,
        "evaluation": spec.evaluation,
        "metric_unit": spec.metric_unit,
        "answer": cut_answer(law),
        "problem": law.problem,
        "judgement": law.judgement,
        "quoted_form": law.quoted or None,
        "gain_per_doubling": {"value": gain.value, "interval": [gain.low, gain.high]} if law.fits else None,
        "flat": gain.flat if law.fits else None,
        "cost_per_doubling": None if law.cost is None else {"extra": law.cost.extra, "unit": law.cost.unit},
        "known_floor": spec.floor,
        "floor": law.floor_sentence(),
        "floor_interval": law.floor_interval(),
        "noise_source": law.noise_source,
        "points": {
            "x": law.x_N.tolist(),
            "y": law.y_N.tolist(),
            "sigma": None if law.sigma_N is None else law.sigma_N.tolist(),
            "seeds": law.seeds_N.tolist(),
        },
        "fits": [{key: value for key, value in as_json(fit).items() if key not in BULKY} for fit in law.fits],
    }
