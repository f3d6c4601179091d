"""RQ-VAE: an autoencoder whose latent is a sum of one row from each of Q codebooks (arXiv 2305.05065, section 3.1).

    r^0 = f(x);  c_q = argmin_k |r^q - C^q_k|^2;  r^(q+1) = r^q - C^q[c_q];  z^ = sum_q C^q[c_q]
    L = |x - g(z~)|^2 + over levels (|sg(r^q) - C^q[c_q]|^2 + beta |r^q - sg(C^q[c_q])|^2)

Implementations differ in the reductions, in the straight-through estimator and in how the codebooks learn: each is a
field of Config. With alignment (LETTER, arXiv 2405.07314) a contrastive loss draws z~ to a vector of the item that is
known from behaviour.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.layers import kmeans, sinkhorn
from recscale.layers.norms import Linear, l2_normalize
from recscale.layers.quantize import (
    REDUCTIONS,
    STRAIGHT_THROUGH,
    Assign,
    Quantized,
    by_distance,
    quantization_losses,
    quantize,
    square_error,
)

LEARNING = ("loss", "ema")
ASSIGNMENT = ("nearest", "sinkhorn")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and losses of an RQ-VAE.

    input_dim; hidden: widths between input and latent, reversed in the decoder; latent: width of codebook rows; bias:
    of the linear maps. levels, codebook: Q and K. straight_through: one of STRAIGHT_THROUGH. learning of the codebooks:
    "loss" (by gradient) or "ema" (moving averages with `decay`). assignment: "nearest", or "sinkhorn" for the last
    level in training (sinkhorn_eps, sinkhorn_iterations). beta: weight of the commitment; over_dims, over_levels: "sum"
    or "mean", of all squared errors over dimensions and of the quantisation losses over levels. align_dim: width of the
    behaviour vectors, 0 without; align_weight, align_temperature: of the contrastive loss.
    """

    input_dim: int
    hidden: tuple[int, ...] = (512, 256, 128)
    latent: int = 32
    bias: bool = True
    levels: int = 3
    codebook: int = 256
    straight_through: str = "per_level"
    learning: str = "loss"
    decay: float = 0.99
    assignment: str = "nearest"
    sinkhorn_eps: float = 0.003
    sinkhorn_iterations: int = 50
    beta: float = 0.25
    over_dims: str = "sum"
    over_levels: str = "sum"
    align_dim: int = 0
    align_weight: float = 0.0
    align_temperature: float = 0.07

    def __post_init__(self):
        choices = {
            "straight_through": STRAIGHT_THROUGH,
            "learning": LEARNING,
            "assignment": ASSIGNMENT,
            "over_dims": REDUCTIONS,
            "over_levels": REDUCTIONS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name} = {getattr(self, name)!r}: expected one of {tuple(known)}")
        for name in ("input_dim", "latent", "levels", "sinkhorn_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        if self.codebook < 2:
            raise ValueError(f"model.codebook = {self.codebook}: expected at least 2 codes per level")
        if min(self.hidden, default=1) < 1:
            raise ValueError(f"model.hidden = {self.hidden}: expected positive widths")
        self._check_weights()

    def _check_weights(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"model.decay = {self.decay}: expected 0 < decay < 1")
        for name in ("sinkhorn_eps", "align_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive number")
        if min(self.beta, self.align_weight, self.align_dim) < 0:
            raise ValueError("model.beta, model.align_weight and model.align_dim: expected no negative number")
        if (self.align_weight > 0) != (self.align_dim > 0):
            raise ValueError(
                f"model.align_weight = {self.align_weight} with model.align_dim = {self.align_dim}: alignment needs "
                "both, no alignment has both 0"
            )


class Stack(nnx.Module):
    """Linear maps with ReLU between them, linear at the end; Glorot normal, biases zero."""

    def __init__(self, widths: tuple[int, ...], bias: bool, key: jax.Array):
        keys = jax.random.split(key, len(widths) - 1)
        init = jax.nn.initializers.glorot_normal()
        pairs = zip(widths[:-1], widths[1:], keys, strict=True)
        self.maps = nnx.List([Linear(a, b, init, k, bias=bias) for a, b, k in pairs])

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        for linear in self.maps[:-1]:
            x_BD = jax.nn.relu(linear(x_BD))
        return self.maps[-1](x_BD)


class Model(nnx.Module):
    """Encoder, decoder, codebooks [Q, K, d] (small normal until `codebooks_from`), and the map of the alignment."""

    def __init__(self, c: Config, key: jax.Array):
        keys = jax.random.split(key, 4)
        widths = (c.input_dim, *c.hidden, c.latent)
        self.encoder = Stack(widths, c.bias, keys[0])
        self.decoder = Stack(widths[::-1], c.bias, keys[1])
        self.codebooks = nnx.Param(0.02 * jax.random.normal(keys[2], (c.levels, c.codebook, c.latent)))
        self.align = Stack((c.latent, c.align_dim), False, keys[3]) if c.align_dim else None


class Losses(NamedTuple):
    """Scalars of a batch; total is what is minimised. alignment is zero without behaviour vectors."""

    total: jax.Array
    reconstruction: jax.Array
    codebook: jax.Array
    commitment: jax.Array
    alignment: jax.Array


def last_level(c: Config) -> Assign:
    """How the codes of the last level are chosen in training."""
    if c.assignment == "nearest":
        return by_distance
    return functools.partial(sinkhorn.assign, eps=c.sinkhorn_eps, iterations=c.sinkhorn_iterations)


def loss(c: Config, model: Model, x_BD: jax.Array, behaviour_BE: jax.Array | None = None) -> tuple[Losses, Quantized]:
    """Losses of a batch of inputs [B, input_dim], and its codes. behaviour_BE: rows of zeros are left out."""
    z_BD = model.encoder(x_BD)
    found = quantize(z_BD, model.codebooks[...], c.straight_through, last_level(c))
    reconstruction = square_error(model.decoder(found.passed_BD), x_BD, c.over_dims)
    codebook_Q, commitment_Q = quantization_losses(found, c.over_dims)
    codebook, commitment = (REDUCTIONS[c.over_levels](part) for part in (codebook_Q, commitment_Q))
    alignment = jnp.zeros(())
    if model.align is not None and behaviour_BE is not None:
        alignment = contrast(model.align(found.passed_BD), behaviour_BE, c.align_temperature)
    learnt = codebook if c.learning == "loss" else 0.0
    total = reconstruction + learnt + c.beta * commitment + c.align_weight * alignment
    return Losses(total, reconstruction, codebook, commitment, alignment), found


def contrast(a_BE: jax.Array, b_BE: jax.Array, temperature: float) -> jax.Array:
    """InfoNCE of a against b by cosine: the b of the same item among those of the batch; rows of b that are 0 are out.

    LETTER takes the plain product without a temperature; cosines do not depend on the scale of the behaviour vectors.
    """
    known_B = (b_BE != 0).any(axis=1)
    logits_BB = l2_normalize(a_BE) @ l2_normalize(b_BE).T / temperature
    logits_BB = jnp.where(known_B[None, :] | jnp.eye(len(a_BE), dtype=bool), logits_BB, -jnp.inf)
    nats_B = -jnp.diagonal(jax.nn.log_softmax(logits_BB, axis=1))
    return jnp.where(known_B, nats_B, 0).sum() / jnp.maximum(known_B.sum(), 1)


def codebooks_from(z_ND: jax.Array, c: Config, key: jax.Array, iterations: int) -> jax.Array:
    """Codebooks [Q, K, d] by k-means of latents, level by level on what the levels before left over."""

    def level(z_ND, level_key):
        found = kmeans.fit(z_ND, c.codebook, level_key, iterations=iterations)
        return z_ND - found.centroids_KD[found.codes_N], found.centroids_KD

    _, codebooks_QKD = jax.lax.scan(level, z_ND, jax.random.split(key, c.levels))
    return codebooks_QKD


@functools.partial(jax.jit, static_argnames="c")
def encode(c: Config, model: Model, x_BD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes [B, Q] by the nearest rows on every level, latents [B, d] and reconstructions [B, input_dim]."""
    z_BD = model.encoder(x_BD)
    found = quantize(z_BD, model.codebooks[...], c.straight_through)
    return found.codes_BQ, z_BD, model.decoder(found.chosen_QBD.sum(axis=0))


def flops(c: Config) -> dict[str, float]:
    """Forward FLOPs of one vector: encoder and decoder, and the distances to all codes (multiply-add = 2)."""
    widths = (c.input_dim, *c.hidden, c.latent)
    dense = 2 * 2 * sum(a * b for a, b in itertools.pairwise(widths))
    return {"projections": float(dense), "codebooks": float(2 * c.levels * c.codebook * c.latent)}


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group."""
    widths = (c.input_dim, *c.hidden, c.latent)
    weights = 2 * sum(a * b for a, b in itertools.pairwise(widths))
    biases = (sum(widths[1:]) + sum(widths[:-1])) if c.bias else 0
    aligned = c.latent * c.align_dim
    return {"dense": weights + biases + aligned, "codebooks": c.levels * c.codebook * c.latent}


def describe(c: Config) -> dict[str, Any]:
    """The config as plain JSON, and what it comes to."""
    return {**dataclasses.asdict(c), "hidden": list(c.hidden), "parameters": param_groups(c), "flops": flops(c)}
