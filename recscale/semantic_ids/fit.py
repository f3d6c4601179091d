"""Vectors to codes: one function per quantizer, all with the same result. Items that have equal vectors share a tuple.

fit_rqvae      RQ-VAE (models/rqvae.py)
fit_rqkmeans   residual k-means, also with clusters of equal size (models/rqkmeans.py)
fit_product    product quantisation
random_codes   codes that say nothing of the items, with or without collisions: what the others must beat
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recscale.checkpoint import leaves_by_path
from recscale.models import rqkmeans, rqvae
from recscale.semantic_ids.rqvae_training import Training, train

ENCODED_AT_ONCE = 16_384
CODEBOOKS = "codebooks"  # the leaf of rqvae.Model
INPUTS = ("none", "standard", "unit")


class VectorsError(ValueError):
    """These vectors cannot be quantised: one line with what was found and what to do."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Codes of N vectors and what made them.

    codes_NQ: int32. sizes: codes of each level. codebooks: float32 [K, d] per level, () for random codes. last_Nd: what
    the last level quantised, reconstruction_ND: what the codes decode to, in the space of the input; None for random
    codes. history: rows of plain numbers along the fit. facts: plain JSON, with the parameters and the number of
    vectors that repeat an earlier one ("duplicates"). encoder: what encodes further vectors beside codebooks and facts.
    """

    codes_NQ: np.ndarray
    sizes: tuple[int, ...]
    codebooks: tuple[np.ndarray, ...]
    last_Nd: np.ndarray | None
    reconstruction_ND: np.ndarray | None
    history: list[dict[str, Any]]
    facts: dict[str, Any]
    encoder: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def check(vectors_ND: np.ndarray, codebook: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors as float32 [N, D], and of each the first one that equals it, int64 [N].

    Raises VectorsError: wrong shape or type, NaN or infinite values, all equal, fewer distinct vectors than codes.
    """
    vectors_ND = np.asarray(vectors_ND)
    if vectors_ND.ndim != 2 or vectors_ND.dtype.kind not in "fiu" or 0 in vectors_ND.shape:
        raise VectorsError(
            f"vectors: {vectors_ND.dtype} {list(vectors_ND.shape)}, expected numbers [items, dimensions]"
        )
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    bad = ~np.isfinite(vectors_ND).all(axis=1)
    if bad.any():
        raise VectorsError(
            f"vectors: {int(bad.sum()):,} of {len(vectors_ND):,} have NaN or infinite values, first {np.argmax(bad)}"
            "; mend the encoder that made them"
        )
    first_N = first_equal(vectors_ND)
    distinct = int((first_N == np.arange(len(first_N))).sum())
    if distinct == 1:
        raise VectorsError(
            f"vectors: all {len(vectors_ND):,} rows are equal: there is nothing to quantise; use other content"
        )
    if distinct < codebook:
        raise VectorsError(
            f"vectors: {distinct:,} distinct for {codebook:,} codes a level: use model.codebook = {distinct} or fewer"
        )
    return vectors_ND, first_N


def first_equal(vectors_ND: np.ndarray) -> np.ndarray:
    """Of each row the first one with the same values, int64 [N]."""
    N, D = vectors_ND.shape
    odd = np.random.default_rng(0).integers(0, 2**63, D, np.uint64) * np.uint64(2) + np.uint64(1)
    digest = np.empty(N, np.uint64)
    for rows in np.array_split(np.arange(N), -(-N // 65_536)):
        bits = (vectors_ND[rows] + np.float32(0)).view(np.uint32).astype(np.uint64)  # + 0: -0 is 0
        digest[rows] = (bits * odd[None]).sum(axis=1)
    _, first, index = np.unique(digest, return_index=True, return_inverse=True)
    found = first[index]
    repeats = np.flatnonzero(found != np.arange(N))
    apart = (vectors_ND[repeats] != vectors_ND[found[repeats]]).any(axis=1)
    found[repeats[apart]] = repeats[apart]  # equal digests of other values: 1 in 2^64
    return found


def fit_rqkmeans(vectors_ND: np.ndarray, config: rqkmeans.Config, seed: int) -> Fit:
    """Residual k-means. With balanced clusters equal vectors may get several tuples: the fact "balanced" says so."""
    return _fit_levels("rqkmeans", rqkmeans.fit, vectors_ND, config, seed)


def fit_product(vectors_ND: np.ndarray, config: rqkmeans.Config, seed: int) -> Fit:
    """Product quantisation into config.levels parts."""
    return _fit_levels("product", rqkmeans.fit_product, vectors_ND, config, seed)


def _fit_levels(
    method: str, fit: Callable[..., rqkmeans.Levels], vectors_ND: np.ndarray, c: rqkmeans.Config, seed: int
) -> Fit:
    vectors_ND, first_N = check(vectors_ND, c.codebook)
    found = fit(c, jnp.asarray(vectors_ND), jax.random.key(seed))
    representative = np.arange(len(first_N)) if c.balanced_iterations else first_N
    codebooks = tuple(np.asarray(book) for book in found.codebooks)
    history = [
        {"level": level, "iteration": i, "objective": float(value)}
        for level, values in enumerate(found.objectives)
        for i, value in enumerate(np.asarray(values))
        if np.isfinite(value)
    ]
    facts = {
        **_facts(method, seed, first_N),
        "model": dataclasses.asdict(c),
        "parameters": {"codebooks": sum(book.size for book in codebooks)},
        "balanced": bool(c.balanced_iterations),
    }
    arrays = (np.asarray(array)[representative] for array in (found.codes_NQ, found.last_ND, found.reconstruction_ND))
    codes_NQ, last_Nd, reconstruction_ND = arrays
    return Fit(codes_NQ, (c.codebook,) * c.levels, codebooks, last_Nd, reconstruction_ND, history, facts)


def fit_rqvae(
    vectors_ND: np.ndarray,
    config: rqvae.Config,
    training: Training,
    seed: int,
    *,
    inputs: str = "none",
    behaviour_NE: np.ndarray | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Fit:
    """RQ-VAE. The same seed gives the same codes.

    inputs: what is done to the vectors first: "none", "standard" (every dimension to mean 0, deviation 1) or "unit"
    (every vector to length 1). behaviour_NE: vectors to align with, where config.align_dim = E; rows of zeros: unknown.
    report: called with every row of the history. Raises VectorsError, and ValueError for settings that do not fit.
    """
    vectors_ND, first_N = check(vectors_ND, config.codebook)
    _check_fit(vectors_ND, config, training, inputs, behaviour_NE)
    measured = measure(vectors_ND, inputs)
    x_ND, restore = prepared(vectors_ND, inputs, measured)
    behaviour = None if behaviour_NE is None else jnp.asarray(behaviour_NE, jnp.float32)
    model, history = train(config, training, x_ND, behaviour, seed, report)
    codes_NQ, latent_Nd, decoded_ND = (array[first_N] for array in encoded(config, model, x_ND))
    books_QKd = np.asarray(model.codebooks[...])
    last_Nd = latent_Nd - sum(
        (book[codes] for book, codes in zip(books_QKd[:-1], codes_NQ.T, strict=False)), np.zeros_like(latent_Nd)
    )
    facts = {
        **_facts("rqvae", seed, first_N),
        "model": rqvae.describe(config),
        "fit": dataclasses.asdict(training),
        "inputs": inputs,
        "batch_size": min(training.batch_size, len(x_ND)),
        "parameters": rqvae.param_groups(config),
        "items_with_behaviour": 0 if behaviour_NE is None else int((behaviour_NE != 0).any(axis=1).sum()),
    }
    sizes = (config.codebook,) * config.levels
    weights = named(model).items()
    kept = {name: np.asarray(x) for name, x in weights if name != CODEBOOKS and not name.startswith("align.")}
    return Fit(codes_NQ, sizes, tuple(books_QKd), last_Nd, restore(decoded_ND), history, facts, {**measured, **kept})


def _check_fit(
    vectors_ND: np.ndarray, c: rqvae.Config, t: Training, inputs: str, behaviour_NE: np.ndarray | None
) -> None:
    N, D = vectors_ND.shape
    if inputs not in INPUTS:
        raise ValueError(f"inputs = {inputs!r}: expected one of {INPUTS}")
    if c.input_dim != D:
        raise ValueError(f"model.input_dim = {c.input_dim}, but the vectors have {D} dimensions")
    if t.kmeans_iterations and min(t.kmeans_points, N) < c.codebook:
        raise ValueError(f"fit.kmeans_points = {t.kmeans_points}: expected at least model.codebook = {c.codebook}")
    if (behaviour_NE is not None) != (c.align_dim > 0):
        found = "there are none" if behaviour_NE is None else "there are some"
        raise ValueError(f"model.align_dim = {c.align_dim} is the width of the behaviour vectors, but {found}")
    if behaviour_NE is not None and (behaviour_NE.shape != (N, c.align_dim) or not np.isfinite(behaviour_NE).all()):
        raise ValueError(
            f"behaviour vectors: shape {list(behaviour_NE.shape)}, expected finite numbers [{N}, {c.align_dim}]"
        )


def named(model: rqvae.Model) -> dict[str, jax.Array]:
    """The leaves by name, "encoder.maps.0.kernel", in their order."""
    return {name.removesuffix(".value"): leaf for name, leaf in leaves_by_path(model).items()}


def encoded(config: rqvae.Config, model: rqvae.Model, x_ND: jax.Array) -> tuple[np.ndarray, ...]:
    """Codes [N, Q], latents [N, d] and reconstructions [N, D], some rows at a time."""
    starts = range(0, len(x_ND), ENCODED_AT_ONCE)
    parts = [rqvae.encode(config, model, x_ND[i : i + ENCODED_AT_ONCE]) for i in starts]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def measure(vectors_ND: np.ndarray, inputs: str) -> dict[str, np.ndarray]:
    """What `prepared` must know of all vectors, float32: "shift" and "scale", [1, D] where inputs is "standard".

    Where it is "unit", scale is the length [1, 1] of a vector that is as good as zero and is not stretched.
    """
    shift, scale = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    if inputs == "standard":
        shift, scale = vectors_ND.mean(axis=0, keepdims=True), vectors_ND.std(axis=0, keepdims=True)
        scale = np.where(scale > 1e-6 * scale.max(), scale, 1)  # a constant dimension stays near zero
    if inputs == "unit":
        scale = 1e-6 * np.linalg.norm(vectors_ND, axis=1).max(keepdims=True)[None]
    return {"shift": shift, "scale": scale.astype(np.float32)}


def prepared(
    vectors_ND: np.ndarray, inputs: str, measured: Mapping[str, np.ndarray]
) -> tuple[jax.Array, Callable[[np.ndarray], np.ndarray]]:
    """What the encoder reads, and the way back."""
    shift, scale = measured["shift"], measured["scale"]
    if inputs == "unit":
        length = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        scale = np.where(length > scale, length, 1).astype(np.float32)
    return jnp.asarray((vectors_ND - shift) / scale), lambda decoded_ND: decoded_ND * scale + shift


def random_codes(items: int, sizes: tuple[int, ...], seed: int, *, unique: bool = False) -> Fit:
    """Uniform codes of N items; unique: no two share a tuple. Raises ValueError where there are too few tuples."""
    rng, tuples = np.random.default_rng(seed), math.prod(sizes)
    if items < 1 or min(sizes, default=0) < 1:
        raise ValueError(f"random codes of {items} items with levels {sizes}: expected positive numbers")
    if unique and tuples < items:
        raise ValueError(f"{items:,} items, but levels {sizes} make {tuples:,} tuples: use more or larger levels")
    if unique and tuples <= 2 * items:
        codes_NQ = np.stack(np.unravel_index(rng.permutation(tuples)[:items], sizes), axis=1)
    else:
        codes_NQ = _drawn(rng, items, sizes)
    while unique:  # at most half of the tuples are taken: few rounds
        _, first = np.unique(codes_NQ, axis=0, return_index=True)
        repeats = np.setdiff1d(np.arange(items), first)
        if len(repeats) == 0:
            break
        codes_NQ[repeats] = _drawn(rng, len(repeats), sizes)
    facts = {**_facts("random", seed, np.arange(items)), "unique": unique, "parameters": {"codebooks": 0}}
    return Fit(codes_NQ.astype(np.int32), tuple(sizes), (), None, None, [], facts)


def _drawn(rng: np.random.Generator, items: int, sizes: tuple[int, ...]) -> np.ndarray:
    return np.stack([rng.integers(0, size, items) for size in sizes], axis=1)


def _facts(method: str, seed: int, first_N: np.ndarray) -> dict[str, Any]:
    repeats = int((first_N != np.arange(len(first_N))).sum())
    return {"method": method, "seed": seed, "items": len(first_N), "duplicates": repeats}
