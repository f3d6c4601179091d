"""The report of a study: one self-contained HTML page and laws.json beside it."""

import base64
import hashlib
import itertools
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import scipy

from recscale.scaling.collect import Records, write_csv
from recscale.scaling.figures import axis_figure, gain_figure, short_number
from recscale.scaling.fits import Gain, Law
from recscale.scaling.laws import AxisLaw, AxisSpec, SeedNoise, axis_law, seed_noise

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write(
    study_folder: str | Path,
    records: Records,
    axes: Sequence[AxisSpec],
    *,
    title: str,
    question: str,
    floors: Mapping[str, float] | None = None,
    switches: Sequence[tuple[str, str]] = (),
    draws: int = 1000,
) -> Path:
    """Writes report.html, laws.json, runs.csv and figures/ into the study's folder and returns the report's path.

    records: from `collect`; axes: what to fit, in the order to show; floors: further known limits, name -> value in the
    unit of the metric, listed beside the question; switches: (label, sentence) of what is on or off and so has no
    doubling. A study without usable runs, or an axis with too few points, is
    reported as such. Raises ValueError when two axes share a name.
    """
    folder = Path(study_folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    names = [spec.name for spec in axes]
    if len(set(names)) < len(names):
        raise ValueError(f"axes: found the names {names}, expected each once: the figures are named after them")
    laws = [axis_law(records.rows, spec, draws=draws) for spec in axes]
    figures = {law.spec.name: _figure(axis_figure, law, folder / "figures" / f"{law.spec.name}.png") for law in laws}
    gain_image = _figure(gain_figure, laws, folder / "figures" / "gain_per_doubling.png")
    noises = {spec.evaluation: seed_noise(records.rows, spec.evaluation) for spec in axes}
    write_csv(records.rows, folder / "runs.csv")
    page = _environment().get_template(TEMPLATE.name)
    html = page.render(
        title=title,
        question=question,
        floors=floors or {},
        answers=[*((law.spec.label, answer(law)) for law in laws), *switches],
        ordering=ordering(laws),
        laws=[_law_row(law) for law in laws],
        sections=[(law, figures[law.spec.name], _facts(law)) for law in laws],
        gain_image=gain_image,
        noises=[(key, noise) for key, noise in noises.items() if noise.dof],
        runs=[_run_row(row, axes) for row in records.rows],
        evaluation=axes[0].evaluation if axes else "none",
        excluded=records.excluded,
        unusable=[pair for law in laws for pair in law.unusable],
        setting=_setting(records),
    )
    document = {
        "schema_version": 1,
        "title": title,
        "question": question,
        "floors": dict(floors or {}),
        "runs_sha256": hashlib.sha256((folder / "runs.csv").read_bytes()).hexdigest(),
        "ordering": ordering(laws),
        "axes": [_law_json(law, noises[law.spec.evaluation]) for law in laws],
        "excluded": [{"run": run.run, "status": run.status, "reason": run.reason} for run in records.excluded],
    }
    (folder / "laws.json").write_text(json.dumps(_without_nan(document), indent=1, allow_nan=False) + "\n")
    path = folder / "report.html"
    path.write_text(html)
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    return environment


def _short(value: float | None) -> str:
    return "" if value is None else short_number(value)


def _figure(draw: Any, subject: Any, path: Path) -> str:
    draw(subject, path)
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _interval(gain: Gain, digits: int = 4) -> str:
    return f"90 % {gain.low:.{digits}f} to {gain.high:.{digits}f}"


def answer(law: AxisLaw) -> str:
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
        told = f"{step} gains about {amount}, interval unknown"
    elif law.gain.flat:
        told = f"{step} shows no gain: flat, {law.gain.value:.4f} {spec.metric_unit} ({_interval(law.gain)})"
    elif law.gain.value > 0:
        told = f"{step} lowers {spec.split} {spec.metric} by {amount}"
    else:
        told = f"{step} makes {spec.split} {spec.metric} worse by {amount}"
    return f"{told[0].upper()}{told[1:]}, at {_cost(law)}."


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


def _law_row(law: AxisLaw) -> dict[str, Any]:
    return {
        "label": law.spec.label,
        "unit": law.spec.unit,
        "problem": law.problem,
        "judgement": law.judgement if law.fits else "",
        "gain": f"{law.gain.value:.4f} ({_interval(law.gain)})",
        "flat": law.gain.flat,
        "forms": [_form_row(fit, fit.form == law.quoted) for fit in law.fits],
    }


def _form_row(fit: Law, quoted: bool) -> dict[str, Any]:
    numbers = []
    for name, value in fit.params.items():
        low, high = fit.intervals[name]
        verdict = fit.verdicts.get(name, "")
        numbers.append((name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", verdict))
    return {
        "formula": fit.formula,
        "quoted": quoted,
        "certified": fit.certified,
        "reasons": "; ".join((*fit.reasons, *fit.notes)),
        "numbers": numbers,
        "delta": "none: too few points" if math.isnan(fit.delta_aicc) else f"{fit.delta_aicc:.1f}",
        "weight": "" if math.isnan(fit.weight) else f"{fit.weight:.2f}",
    }


def _facts(law: AxisLaw) -> list[str]:
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


def _run_row(row: Mapping[str, Any], axes: Sequence[AxisSpec]) -> dict[str, Any]:
    key = axes[0].evaluation if axes else ""
    parameters = [value for name, value in row.items() if name.startswith("parameters.") and value is not None]
    stderr = row.get(f"{key}.stderr")
    value = row.get(key)
    return {
        "cell": row["cell.name"] if "cell.name" in row else row["run_id"],
        "seed": row["seed"],
        "axes": ", ".join(row.get("cell.axes") or []),
        "parameters": sum(parameters),
        "events": row.get("seen.events"),
        "flops": row.get("flops.train_total"),
        "loss": "" if value is None else f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}"),
        "wall": row.get("seconds.wall"),
    }


def _setting(records: Records) -> list[tuple[str, str]]:
    """Hardware and versions, as recorded by the runs, and those of the fits."""
    found: dict[str, set[str]] = {}
    for row in [*records.rows, *(run.row for run in records.excluded if run.row)]:
        if row.get("devices.kind"):
            found.setdefault("devices", set()).add(f"{row.get('devices.count')} x {row['devices.kind']}")
        for key, value in row.items():
            if key.startswith("versions.") or key in ("revision", "code.revision"):
                found.setdefault(key, set()).add(str(value))
    fits = f"python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    return [
        *((key, ", ".join(sorted(values))) for key, values in sorted(found.items())),
        ("fits and figures", f"{fits}, matplotlib {matplotlib.__version__}"),
    ]


def _law_json(law: AxisLaw, noise: SeedNoise) -> dict[str, Any]:
    spec = law.spec
    gain = law.gain
    return {
        "name": spec.name,
        "label": spec.label,
        "unit": spec.unit,
        "evaluation": spec.evaluation,
        "metric_unit": spec.metric_unit,
        "answer": answer(law),
        "problem": law.problem,
        "judgement": law.judgement,
        "quoted_form": law.quoted or None,
        "gain_per_doubling": {"value": gain.value, "interval": [gain.low, gain.high]} if law.fits else None,
        "flat": gain.flat if law.fits else None,
        "cost_per_doubling": None if law.cost is None else {"extra": law.cost.extra, "unit": law.cost.unit},
        "known_floor": spec.floor,
        "floor": law.floor_sentence(),
        "floor_interval": law.floor_interval(),
        "seed_noise": {"sd": noise.sd, "degrees_of_freedom": noise.dof},
        "noise_source": law.noise_source,
        "points": {
            "x": law.x_N.tolist(),
            "y": law.y_N.tolist(),
            "sigma": None if law.sigma_N is None else law.sigma_N.tolist(),
            "seeds": law.seeds_N.tolist(),
        },
        "fits": [_fit_json(fit) for fit in law.fits],
    }


def _fit_json(fit: Law) -> dict[str, Any]:
    return {
        "form": fit.form,
        "formula": fit.formula,
        "params": fit.params,
        "stderr": fit.stderr,
        "intervals": fit.intervals,
        "covariance": fit.covariance.tolist(),
        "verdicts": fit.verdicts,
        "certified": fit.certified,
        "reasons": [*fit.reasons, *fit.notes],
        "n": fit.n,
        "domain": fit.domain,
        "residual_sd": fit.residual_sd,
        "aicc": fit.aicc,
        "aicc_note": fit.aicc_note,
        "delta_aicc": fit.delta_aicc,
        "weight": fit.weight,
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
