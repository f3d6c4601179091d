"""Codes of further vectors by a quantizer that is fitted: what `encoder.npz` of a folder of codes keeps, and its use.

Every level takes the nearest code: that is what the fit did too, unless its clusters were balanced.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recscale.layers import kmeans
from recscale.layers.norms import l2_normalize
from recscale.models import rqkmeans, rqvae
from recscale.semantic_ids.catalogue import Codes
from recscale.semantic_ids.fit import CODEBOOKS, Fit, encoded, first_equal, named, prepared

VERSION = 1
"""Of the arrays: the names below "text." are content.py's, those below "quantizer." fit.py's."""


class Encoded(NamedTuple):
    """codes_NQ int32, and reconstruction_ND float32: what they decode to, in the space of the input."""

    codes_NQ: np.ndarray
    reconstruction_ND: np.ndarray


def keep(text: Mapping[str, np.ndarray], fit: Fit) -> dict[str, np.ndarray]:
    """The arrays that encode further items: what the text encoder kept and what the fit did.

    {} where items cannot be encoded: random codes, and vectors that are not those of a text alone (text is {}).
    """
    if not text or not fit.codebooks:
        return {}
    arrays = {f"text.{name}": array for name, array in text.items()}
    arrays |= {f"quantizer.{name}": array for name, array in fit.encoder.items()}
    return {"version": np.array(VERSION), **arrays}


def part(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays below a name, "text" or "quantizer", without it."""
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}


def encode(codes: Codes, vectors_ND: np.ndarray) -> Encoded:
    """Learned codes of vectors float32 [N, D] by the quantizer of these codes; equal vectors have equal codes."""
    first_N = first_equal(vectors_ND)
    found = QUANTIZERS[codes.facts["method"]](codes, vectors_ND)
    return Encoded(np.asarray(found[0])[first_N], np.asarray(found[1])[first_N])


def _rqvae(codes: Codes, vectors_ND: np.ndarray) -> tuple[Any, Any]:
    arrays, facts = part(codes.encoder, "quantizer"), codes.facts
    names = {field.name for field in dataclasses.fields(rqvae.Config)}
    settings: dict[str, Any] = {name: value for name, value in facts["model"].items() if name in names}
    settings |= {"hidden": tuple(settings["hidden"]), "align_dim": 0, "align_weight": 0.0}  # of training alone
    config = rqvae.Config(**settings)
    shapes = jax.eval_shape(lambda: rqvae.Model(config, jax.random.key(0)))
    values = {CODEBOOKS: np.stack(codes.codebooks), **arrays}
    leaves = [jnp.asarray(values[name]) for name in named(shapes)]
    model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    x_ND, restore = prepared(vectors_ND, facts["inputs"], arrays)
    codes_NQ, _, decoded_ND = encoded(config, model, x_ND)
    return codes_NQ, restore(decoded_ND)


def _rqkmeans(codes: Codes, vectors_ND: np.ndarray) -> tuple[Any, Any]:
    c, residual = rqkmeans.Config(**codes.facts["model"]), jnp.asarray(vectors_ND)
    reconstruction, scale, found = jnp.zeros_like(residual), jnp.ones((len(residual), 1)), []
    for book in codes.codebooks:
        if c.normalize_residuals:
            scale = scale * jnp.linalg.norm(residual, axis=1, keepdims=True)
            residual = l2_normalize(residual)
        code, _ = kmeans.assign(residual, jnp.asarray(book))
        row = jnp.asarray(book)[code]
        residual, reconstruction = residual - row, reconstruction + scale * row
        found.append(code)
    return jnp.stack(found, axis=1), reconstruction


def _product(codes: Codes, vectors_ND: np.ndarray) -> tuple[Any, Any]:
    pieces = np.split(vectors_ND, len(codes.codebooks), axis=1)
    found = [kmeans.assign(jnp.asarray(x), jnp.asarray(b))[0] for x, b in zip(pieces, codes.codebooks, strict=True)]
    rows = [book[np.asarray(code)] for book, code in zip(codes.codebooks, found, strict=True)]
    return jnp.stack(found, axis=1), np.concatenate(rows, axis=1)


QUANTIZERS: dict[str, Callable[[Codes, np.ndarray], tuple[Any, Any]]] = {
    "rqvae": _rqvae,
    "rqkmeans": _rqkmeans,
    "product": _product,
}
"""Method of a fit -> (codes with their encoder, vectors [N, D]) -> codes [N, Q] and reconstructions [N, D]."""
