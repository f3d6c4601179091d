"""Residual k-means and product quantisation: codes without a network.

Residual k-means clusters the vectors, then what the centroids leave over, level after level (OneRec, arXiv 2502.18965,
with clusters of equal size; GRID, arXiv 2507.22224, with residuals brought to length 1). Product quantisation cuts the
vector into Q parts and clusters each by itself.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recscale.layers import balanced, kmeans
from recscale.layers.norms import l2_normalize


@dataclasses.dataclass(frozen=True)
class Config:
    """How vectors are clustered.

    levels, codebook: Q and K. iterations: of Lloyd's, at most; tolerance: see layers/kmeans.py. points_per_code: the
    centroids are fitted to a random K x points_per_code of the vectors, 0 for all (faiss: 256). normalize_residuals:
    every residual is brought to length 1 before its level. balanced_iterations: 0 for clusters of any size; else
    iterations that fill the clusters equally, on all vectors.
    """

    levels: int = 3
    codebook: int = 256
    iterations: int = 25
    tolerance: float = 0.0
    points_per_code: int = 0
    normalize_residuals: bool = False
    balanced_iterations: int = 0

    def __post_init__(self):
        for name in ("levels", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        if self.codebook < 2:
            raise ValueError(f"model.codebook = {self.codebook}: expected at least 2 codes per level")
        if min(self.points_per_code, self.balanced_iterations, self.tolerance) < 0:
            raise ValueError("model.points_per_code, balanced_iterations, tolerance: expected no negative number")
        if self.points_per_code and self.balanced_iterations:
            raise ValueError(
                "model.points_per_code with balanced_iterations: equal sizes are of all vectors; make one 0"
            )


class Levels(NamedTuple):
    """What was fitted.

    codes_NQ int32; codebooks: [K, d] of each level; last_ND: what the last level quantised; reconstruction_ND: what the
    codes decode to (with normalize_residuals, by the lengths of the vector's own residuals); objectives: of every level
    before the first and after each iteration, NaN after the last.
    """

    codes_NQ: jax.Array
    codebooks: tuple[jax.Array, ...]
    last_ND: jax.Array
    reconstruction_ND: jax.Array
    objectives: tuple[jax.Array, ...]


def cluster(c: Config, x_ND: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One level: centroids [K, D], codes [N], objectives."""
    fit_key, sample_key = jax.random.split(key)
    if c.balanced_iterations:
        settings = {"iterations": c.iterations, "balanced_iterations": c.balanced_iterations, "tolerance": c.tolerance}
        found = balanced.fit_balanced(x_ND, c.codebook, fit_key, **settings)
        return found.centroids_KD, found.codes_N, found.objective_I
    count = c.points_per_code * c.codebook
    whole = count == 0 or count >= len(x_ND)
    points = x_ND if whole else x_ND[jax.random.permutation(sample_key, len(x_ND))[:count]]
    found = kmeans.fit(points, c.codebook, fit_key, iterations=c.iterations, tolerance=c.tolerance)
    codes = found.codes_N if whole else kmeans.assign(x_ND, found.centroids_KD)[0]
    return found.centroids_KD, codes, found.objective_I


def fit(c: Config, x_ND: jax.Array, key: jax.Array) -> Levels:
    """Residual k-means of float32 vectors [N, D]."""
    residual, scale = x_ND, jnp.ones((len(x_ND), 1), x_ND.dtype)
    reconstruction, codes, books, objectives, last = jnp.zeros_like(x_ND), [], [], [], x_ND
    for level_key in jax.random.split(key, c.levels):
        if c.normalize_residuals:
            scale = scale * jnp.linalg.norm(residual, axis=1, keepdims=True)
            residual = l2_normalize(residual)
        last = residual
        book, code, objective = cluster(c, residual, level_key)
        row = book[code]
        residual, reconstruction = residual - row, reconstruction + scale * row
        codes.append(code)
        books.append(book)
        objectives.append(objective)
    return Levels(jnp.stack(codes, axis=1), tuple(books), last, reconstruction, tuple(objectives))


def fit_product(c: Config, x_ND: jax.Array, key: jax.Array) -> Levels:
    """Product quantisation of float32 vectors [N, D] into Q parts; raises ValueError where Q does not divide D."""
    if x_ND.shape[1] % c.levels:
        raise ValueError(f"model.levels = {c.levels} does not divide the {x_ND.shape[1]} dimensions of the vectors")
    if c.normalize_residuals:
        raise ValueError("model.normalize_residuals: product quantisation has no residuals; set it to False")
    parts = jnp.split(x_ND, c.levels, axis=1)
    keys = jax.random.split(key, c.levels)
    books, codes, objectives = zip(*(cluster(c, p, k) for p, k in zip(parts, keys, strict=True)), strict=True)
    decoded = jnp.concatenate([book[code] for book, code in zip(books, codes, strict=True)], axis=1)
    return Levels(jnp.stack(codes, axis=1), tuple(books), parts[-1], decoded, tuple(objectives))


def flops(c: Config, dim: int) -> dict[str, float]:
    """FLOPs of the distances of one vector of width `dim` to all codes by residual k-means (multiply-add = 2)."""
    return {"codebooks": float(2 * c.levels * c.codebook * dim)}


def param_groups(c: Config, dim: int) -> dict[str, int]:
    """Parameters by group, of residual k-means of vectors of width `dim`; a product has 1 / levels of them."""
    return {"codebooks": c.levels * c.codebook * dim}
