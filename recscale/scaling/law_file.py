"""Laws as files: JSON that another program reads, and `load_law` gives back as the same law.

Numbers keep all their digits (JSON writes the shortest text that reads back the same); no NaN, no infinity: null.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from recscale.scaling.estimate import Certificate
from recscale.scaling.forms import FORMS
from recscale.scaling.law import Law

SCHEMA_VERSION = 1
PLAIN = ("form", "params", "stderr", "verdicts", "scale", "n", "objective", "residual_sd", "aicc_note", "metric")
LATER = ("data_hash", "bootstrap", "sigma_trusted")


def as_json(law: Law) -> dict[str, Any]:
    """A law as plain data: form, parameters, covariance, draws, domain, data hash, certificate, profiles."""
    document = {"schema_version": SCHEMA_VERSION, "formula": law.formula, "axes": list(law.axes)}
    document |= {name: getattr(law, name) for name in (*PLAIN, *LATER)}
    proof = law.certificate
    document |= {
        "intervals": {name: list(ends) for name, ends in law.intervals.items()},
        "domain": {axis: list(ends) for axis, ends in law.domain.items()},
        "delta": "lsq" if math.isinf(law.delta) else law.delta,
        "certified": law.certified,
        "certificate": {
            name: getattr(proof, name) for name in ("gradient", "agreeing", "starts", "condition", "n", "p")
        }
        | {"on_bound": list(proof.on_bound), "reasons": list(proof.reasons)},
        "notes": list(law.notes),
        "aicc": law.aicc,
        "delta_aicc": law.delta_aicc,
        "weight": law.weight,
        "covariance": law.covariance.tolist(),
        "draws": law.draws_SP.tolist(),
        "residual_draws": law.residual_S.tolist(),
        "profiles": {name: [side.tolist() for side in pair] for name, pair in law.profiles.items()},
    }
    return without_nan(document)


def save_law(law: Law, path: str | Path) -> Path:
    """Writes a law; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(as_json(law), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
    return path


def load_law(path: str | Path) -> Law:
    """Reads what `save_law` wrote. Raises ValueError, naming the file and the key, for anything else."""
    path = Path(path)
    try:
        document = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a law file: {error}") from error
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path}: found no law of schema_version {SCHEMA_VERSION}, expected a file of save_law")
    try:
        return _law(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a law file: {type(error).__name__} {error}") from error


def _law(document: dict[str, Any]) -> Law:
    form, axes = document["form"], tuple(document["axes"])
    if form not in FORMS or FORMS[form].names(axes) != tuple(document["params"]):
        raise ValueError(f"form {form!r} with parameters {', '.join(document['params'])} is not known here")
    if not all(isinstance(value, float | int) for value in document["params"].values()):
        raise ValueError(f"params: found {document['params']}, expected numbers")
    draws_SP = np.array(document["draws"], np.float64)
    if (
        draws_SP.ndim != 2
        or draws_SP.shape[1] != len(document["params"])
        or len(document["residual_draws"]) != len(draws_SP)
    ):
        raise ValueError(f"draws: found {draws_SP.shape}, expected a row of {len(document['params'])} numbers per draw")
    proof = {name: _number(value) for name, value in document["certificate"].items() if not isinstance(value, list)}
    certificate = Certificate(
        **proof, on_bound=tuple(document["certificate"]["on_bound"]), reasons=tuple(document["certificate"]["reasons"])
    )
    numbers = {name: _number(document[name]) for name in ("aicc", "delta_aicc", "weight")}
    profiles = document["profiles"]
    return Law(
        **{name: document[name] for name in (*PLAIN, *LATER)},
        **numbers,
        axes=axes,
        intervals={name: (_number(low), _number(high)) for name, (low, high) in document["intervals"].items()},
        domain={axis: (low, high) for axis, (low, high) in document["domain"].items()},
        delta=math.inf if document["delta"] == "lsq" else float(document["delta"]),
        certificate=certificate,
        notes=tuple(document["notes"]),
        draws_SP=draws_SP,
        residual_S=np.array(document["residual_draws"], np.float64),
        profiles={name: (np.array(x, np.float64), np.array(y, np.float64)) for name, (x, y) in profiles.items()},
    )


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: without_nan(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
