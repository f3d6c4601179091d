"""Codes for a catalogue: python -m recscale.semantic_ids.make --config=configs/rqvae_beauty.py --out=codes/beauty-rqvae

Content of the log's items -> vectors -> a quantizer -> a policy for collisions -> the folder of codes (catalogue.py),
and make.json beside it: config, versions, seconds, parameters, the history of the fit and the diagnostics. Behaviour
vectors (config.behaviour) join the content, or align an RQ-VAE, or stand alone where content.encoder is "".

The folder keeps what encodes further items, so that extend.py can add them; codes of joined behaviour vectors and
random codes cannot be added to.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from recscale import record
from recscale.data.event_log import EventLog
from recscale.models import rqkmeans, rqvae
from recscale.semantic_ids import behaviour, catalogue, collisions, content, diagnostics, encoding
from recscale.semantic_ids.fit import Fit, fit_product, fit_rqkmeans, fit_rqvae, random_codes
from recscale.semantic_ids.rqvae_training import Training

USES = ("align", "join")
KEYS = {
    "data": ("path",),
    "content": ("encoder", "settings"),
    "behaviour": ("source", "use", "weight"),
    "collisions": ("policy", "maximum", "epsilon", "iterations", "rounds"),
}
"""Keys of the sections; model and fit are checked by what they are passed to."""
Report = Callable[[dict[str, Any]], None]


def _rqvae(c: ConfigDict, vectors_ND: np.ndarray, behaviour_NE: np.ndarray | None, report: Report | None) -> Fit:
    align = 0 if behaviour_NE is None else behaviour_NE.shape[1]
    model = rqvae.Config(input_dim=vectors_ND.shape[1], align_dim=align, **c.model)
    training = Training(**c.fit)
    return fit_rqvae(vectors_ND, model, training, c.seed, inputs=c.inputs, behaviour_NE=behaviour_NE, report=report)


def _rqkmeans(c: ConfigDict, vectors_ND: np.ndarray, *_: Any) -> Fit:
    return fit_rqkmeans(vectors_ND, rqkmeans.Config(**c.model), c.seed)


def _product(c: ConfigDict, vectors_ND: np.ndarray, *_: Any) -> Fit:
    return fit_product(vectors_ND, rqkmeans.Config(**c.model), c.seed)


def _random(c: ConfigDict, vectors_ND: np.ndarray, *_: Any) -> Fit:
    return random_codes(len(vectors_ND), (c.model.codebook,) * c.model.levels, c.seed, unique=c.model.unique)


METHODS: dict[str, Callable[..., Fit]] = {
    "rqvae": _rqvae,
    "rqkmeans": _rqkmeans,
    "product": _product,
    "random": _random,
}
"""name -> (config, vectors of items 1..V, behaviour vectors or None, report) -> Fit."""


def make(config: ConfigDict, out: str | Path, *, replace: bool = False, report: Report | None = None) -> dict[str, Any]:
    """Make the codes that the config describes, write them into `out` and return what make.json holds.

    replace: over codes that are there. Raises ValueError (CodesError, ContentError, VectorsError, EventLogError among
    them) with one line for what is wrong with the config, the log or the vectors.
    """
    out, begin = Path(out), time.perf_counter()
    _check(config, out, replace)
    log = EventLog.open(config.data.path)
    (vectors_VD, content_facts, text), behaviour_VE = _vectors(config, log)
    encoded = time.perf_counter()
    align_NE = behaviour_VE[1:] if behaviour_VE is not None and config.behaviour.use == "align" else None
    fit = METHODS[config.method](config, vectors_VD[1:], align_NE, report)
    fitted = time.perf_counter()
    resolved = _resolved(config, fit)
    described = _described(fit, resolved, vectors_VD)
    facts = {
        **fit.facts,
        "content": content_facts,
        "learned_levels": len(fit.sizes),
        "collisions": {**resolved.facts, "maximum": config.collisions.maximum},
        "config_hash": record.config_hash(config.to_dict()),
        "diagnostics": described,
    }
    codes = catalogue.of_log(log, resolved.codes_VQ, resolved.sizes, facts, fit.codebooks, encoding.keep(text, fit))
    catalogue.write(codes, out, replace=replace)
    book = {
        "config": config.to_dict(),
        "config_hash": facts["config_hash"],
        "seed": config.seed,
        "code": record.code_revision(),
        **record.environment(),
        "seconds": {"content": encoded - begin, "fit": fitted - encoded, "total": time.perf_counter() - begin},
        "parameters": fit.facts["parameters"],
        "sha256": codes.sha256,
        "facts": dict(codes.facts),
        "history": fit.history,
    }
    part = out / "make.json.partial"
    part.write_text(json.dumps(book, indent=1, sort_keys=True))
    os.replace(part, out / "make.json")
    return book


def _check(config: ConfigDict, out: Path, replace: bool) -> None:
    """What can be said before anything is read or fitted."""
    if config.method not in METHODS:
        raise ValueError(f"method = {config.method!r}: expected one of {tuple(METHODS)}")
    _check_keys(config)
    if config.collisions.policy not in collisions.POLICIES:
        raise ValueError(
            f"collisions.policy = {config.collisions.policy!r}: expected one of {tuple(collisions.POLICIES)}"
        )
    if config.behaviour.source and config.behaviour.use not in USES:
        raise ValueError(f"behaviour.use = {config.behaviour.use!r}: expected one of {USES}")
    if config.behaviour.source and config.behaviour.use == "align" and config.method != "rqvae":
        raise ValueError(f"behaviour.use = 'align': method {config.method!r} has no alignment; use 'join' or 'rqvae'")
    if config.collisions.policy == "sinkhorn" and config.method == "random":
        raise ValueError("collisions.policy = 'sinkhorn': random codes have no distances; use 'digit' or 'none'")
    if not config.content.encoder and config.method != "random" and not _behaviour_alone(config):
        raise ValueError(
            "content.encoder = '' with nothing to quantise: name an encoder, or behaviour.source with behaviour.use = "
            "'join' for behaviour vectors alone"
        )
    if (out / "meta.json").exists() and not replace:
        raise ValueError(f"{out}: holds codes already; runs may depend on them: choose another folder or --replace")
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{out}: {there} is no folder that can be written to: choose another --out")


def _check_keys(config: ConfigDict) -> None:
    """The keys of this method, no more and no less."""
    trained = {"inputs", "fit"} if config.method == "rqvae" else set()
    wrong = set(config) ^ ({"seed", "method", "model", *KEYS} | trained)
    sections = KEYS | ({"model": ("levels", "codebook", "unique")} if config.method == "random" else {})
    for name in set(sections) & set(config):
        wrong |= {f"{name}.{key}" for key in set(config[name]) ^ set(sections[name])}
    if wrong:
        raise ValueError(f"config: {sorted(wrong)} are missing or unknown for method {config.method!r}")


def _behaviour_alone(config: ConfigDict) -> bool:
    return not config.content.encoder and bool(config.behaviour.source) and config.behaviour.use == "join"


def _vectors(config: ConfigDict, log: EventLog) -> tuple[content.Content, np.ndarray | None]:
    """What is quantised, [V + 1, D], with facts, and the behaviour vectors [V + 1, E] or None.

    Without an encoder the behaviour vectors alone, or vectors of width 0 for random codes. Behaviour vectors beside the
    text or alone cannot be made of further items: then nothing is kept.
    """
    found = content.Content(np.zeros((log.num_items + 1, 0), np.float32), {"encoder": ""}, {})
    if config.content.encoder:
        found = content.encode(log, config.content.encoder, **config.content.settings)
    if not config.behaviour.source:
        return found, None
    source = Path(config.behaviour.source)
    read = behaviour.from_file if source.suffix == ".npy" else behaviour.from_run
    known_VE = read(source, log)
    found = found._replace(facts={**found.facts, "behaviour": config.behaviour.to_dict()})
    if config.behaviour.use == "align":
        return found, known_VE
    vectors_VD = known_VE
    if not _behaviour_alone(config):
        vectors_VD = behaviour.joined(found.vectors_VD, known_VE, weight=config.behaviour.weight)
    return found._replace(vectors_VD=vectors_VD, kept={}), known_VE


def _resolved(config: ConfigDict, fit: Fit) -> collisions.Resolved:
    c, last = config.collisions, None
    if c.policy == "sinkhorn" and fit.last_Nd is not None:
        last = collisions.LastLevel(_padded(fit.last_Nd), fit.codebooks[-1], c.epsilon, c.iterations, c.rounds)
    return collisions.resolve(
        c.policy, _padded(fit.codes_NQ), fit.sizes, maximum=c.maximum, seed=config.seed, last=last
    )


def _described(fit: Fit, resolved: collisions.Resolved, vectors_VD: np.ndarray) -> dict[str, Any]:
    """Diagnostics of the final codes; "as_fitted" is the error of the codes before any was moved to end a collision."""
    learned = len(fit.sizes)
    moved = not np.array_equal(resolved.codes_VQ[1:, :learned], fit.codes_NQ)
    decoded = None if fit.reconstruction_ND is None else _padded(fit.reconstruction_ND)
    found = diagnostics.describe(
        resolved.codes_VQ,
        resolved.sizes,
        vectors_VD=vectors_VD if vectors_VD.shape[1] else None,
        reconstruction_VD=None if moved else decoded,
        learned=learned,
    )
    return found if decoded is None else found | {"as_fitted": diagnostics.reconstruction_error(vectors_VD, decoded)}


def _padded(array_N: np.ndarray) -> np.ndarray:
    return np.pad(array_N, ((1, 0), (0, 0)))


def _show(row: dict[str, Any]) -> None:
    use = " ".join(
        f"{share:.0%}/{perplexity:.0f}" for share, perplexity in zip(row["usage"], row["perplexity"], strict=True)
    )
    error = f"loss {row['loss']:.5f}  reconstruction {row['reconstruction']:.5f}"
    print(f"step {row['step']:>7}  {error}  use/perplexity {use}", flush=True)


def main(_: list[str]) -> None:
    """Command line of the module docstring; one line and status 1 where it does not end well."""
    logging.set_verbosity(logging.WARNING)
    try:
        book = make(_CONFIG.value, str(_OUT.value), replace=_REPLACE.value, report=_show)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    found = book["facts"]["diagnostics"]
    for level, row in enumerate(found["levels"]):
        print(f"level {level}: {row['used']} of {row['size']} codes used, perplexity {row['perplexity']:.1f}")
    for row in found["prefixes"]:
        print(
            f"{row['levels']} codes: {row['distinct']:,} distinct tuples, largest bucket {row['largest_bucket']}, "
            f"{row['items_sharing']:,} items share theirs"
        )
    if "as_fitted" in found:
        print(f"reconstruction: {found['as_fitted']['relative']:.4f} of the variance is lost")
    print(f"{_OUT.value}: codes {book['sha256'][:12]} in {book['seconds']['total']:.1f} s")


def parse_flags(arguments: list[str]) -> list[str]:
    """absl's flag parser, with one line and status 1 for a wrong key or a config that cannot be made."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Config file, e.g. configs/rqvae_beauty.py", lock_config=True
    )
    _OUT = flags.DEFINE_string("out", None, "Folder for the codes")
    _REPLACE = flags.DEFINE_bool("replace", False, "Write over codes that are there")
    flags.mark_flags_as_required(["config", "out"])
    app.run(main, flags_parser=parse_flags)
