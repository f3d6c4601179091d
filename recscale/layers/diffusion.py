"""Diffusion processes x_t = a_t x0 + s_t eps: their scales and times, what a network may predict, how errors weigh.

Two families. `Chain`: discrete times 0..T-1 with the schedules of DreamRec (arXiv 2310.20453). `Continuous`: times u in
[0, 1], 0 = data: variance preserving, variance exploding (arXiv 2011.13456), and straight (flow matching, arXiv
2210.02747 and 2209.03003). Both are frozen and hashable, hence static under jit, and both answer

    draw(key, shape)   times to train at
    scales(t)          (a, s), float32 of t's shape
    exact(times)       the same in float64, for numpy times; samplers take their coefficients from it
    rates(t)           (a', s') per unit of u; a Chain answers with its variance-preserving limit, u = (t + 1) / T
    embed_time(t)      what a network's sinusoid reads: t of a Chain, 1000 u otherwise
    grid(steps)        the times of a sampler, from noise to data: steps + 1 numpy times, the last of them the data

A network predicts x0, eps, v = a eps - s x0, the score -eps / s, or the velocity a' x0 + s' eps. Each is p x0 + q eps
with its own (p, q), and x is a x0 + s eps: two equations for two unknowns, so every conversion is exact.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recscale.layers.schedules import SCHEDULES, ChainTable, chain_table

DATA = -1
"""Time of the data itself in a Chain: a = 1, s = 0."""
SPAN = (1e-3, 1 - 1e-3)  # training draws no time nearer to the ends, where some coordinate is infinite
SNR_CAP = 5.0  # of the weight "min_snr"


@dataclasses.dataclass(frozen=True)
class Chain:
    """A discrete variance-preserving chain. schedule: a name of SCHEDULES, or the betas themselves; steps: T.

    Raises ValueError for an unknown schedule, for T < 1, and for betas that are not T numbers between 0 and 1.
    """

    schedule: str | tuple[float, ...]
    steps: int

    def __post_init__(self):
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise ValueError(f"schedule: found {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        elif len(self.schedule) != self.steps or not all(0 < beta < 1 for beta in self.schedule):
            raise ValueError(f"schedule: found {self.schedule}, expected {self.steps} betas between 0 and 1")
        if self.steps < 1:
            raise ValueError(f"diffusion steps: found {self.steps}, expected at least 1")

    @property
    def table(self) -> ChainTable:
        """The coefficients in float64."""
        return chain_table(self.schedule, self.steps)

    def exact(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a, s) in float64 of numpy times in {-1, 0, .., T-1}."""
        abar = np.append(1.0, self.table.abar)[np.asarray(times) + 1]
        return np.sqrt(abar), np.sqrt(1 - abar)

    def scales(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(a, s), float32, of integer times."""
        a_T, s_T = self.exact(np.arange(DATA, self.steps))
        return jnp.asarray(a_T, jnp.float32)[t + 1], jnp.asarray(s_T, jnp.float32)[t + 1]

    def rates(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(a', s') of the limit: beta(u) = T beta_t, a' = -beta a / 2, s' = beta a^2 / (2 s)."""
        a, s = self.scales(t)
        beta = jnp.asarray(self.steps * self.table.beta, jnp.float32)[t]
        return -beta * a / 2, beta * a * a / (2 * s)

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """int32, each of the T times alike."""
        return jax.random.randint(key, shape, 0, self.steps)

    def embed_time(self, t: jax.Array) -> jax.Array:
        """t itself, float32."""
        return jnp.asarray(t, jnp.float32)

    def grid(self, steps: int | None = None) -> np.ndarray:
        """T-1 .. 0 and the data, or `steps` of these times, evenly spread; int32. Raises ValueError for more than T."""
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"sampler steps: found {steps}, expected 1 to {self.steps}, the steps of the chain")
        return np.round(np.linspace(self.steps - 1, DATA, steps + 1)).astype(np.int32)


class Path(NamedTuple):
    """A continuous process by formula: scales(u, constants, numpy or jax.numpy), rates(u, a, s, constants)."""

    scales: Callable
    rates: Callable
    constants: tuple[float, ...]


def _vp_scales(u, constants, xp):
    low, high = constants
    area = u * low + u * u * (high - low) / 2  # integral of beta
    return xp.exp(-area / 2), xp.sqrt(-xp.expm1(-area))


def _vp_rates(u, a, s, constants):
    beta = constants[0] + u * (constants[1] - constants[0])
    return -beta * a / 2, beta * a * a / (2 * s)


def _ve_scales(u, constants, xp):
    low, high = constants
    return xp.ones_like(u), low * xp.sqrt(xp.expm1(2 * u * np.log(high / low)))


def _ve_rates(u, a, s, constants):
    low, high = constants
    return jnp.zeros_like(u), (s * s + low * low) * np.log(high / low) / s


PATHS: dict[str, Path] = {
    # vp: beta(u) rises from .1 to 20. ve: s^2 = low^2 ((high / low)^(2u) - 1), the exact marginal of its SDE.
    "vp": Path(_vp_scales, _vp_rates, (0.1, 20.0)),
    "ve": Path(_ve_scales, _ve_rates, (0.01, 50.0)),
    "straight": Path(
        lambda u, constants, xp: (1 - u, u), lambda u, a, s, constants: (-jnp.ones_like(u), jnp.ones_like(u)), ()
    ),
}


@dataclasses.dataclass(frozen=True)
class Continuous:
    """A process in continuous time. kind: a name of PATHS; constants: beta (vp) or sigma (ve) at both ends, or none.

    Raises ValueError for an unknown kind and for constants that are not two numbers, 0 < first < second.
    """

    kind: str
    constants: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.kind not in PATHS:
            raise ValueError(f"process: found {self.kind!r}, expected one of {', '.join(PATHS)}")
        usual = PATHS[self.kind].constants
        found = usual if self.constants is None else tuple(self.constants)
        if len(found) != len(usual) or (found and not 0 < found[0] < found[1]):
            raise ValueError(f"constants of {self.kind}: found {found}, expected {len(usual)} rising positive numbers")
        object.__setattr__(self, "constants", found)

    def exact(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a, s) in float64 of numpy times in [0, 1]."""
        return PATHS[self.kind].scales(np.asarray(times, np.float64), self.constants, np)

    def scales(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(a, s), float32."""
        return PATHS[self.kind].scales(jnp.asarray(t, jnp.float32), self.constants, jnp)

    def rates(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(a', s'), float32; infinite at u = 0 for vp and ve."""
        return PATHS[self.kind].rates(jnp.asarray(t, jnp.float32), *self.scales(t), self.constants)

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """float32, uniform over SPAN."""
        return jax.random.uniform(key, shape, jnp.float32, *SPAN)

    def embed_time(self, t: jax.Array) -> jax.Array:
        """1000 u, float32."""
        return 1000 * jnp.asarray(t, jnp.float32)

    def grid(self, steps: int | None = None) -> np.ndarray:
        """1 .. 0 in `steps` even steps; float64. Raises ValueError where steps is missing or below 1."""
        if steps is None or steps < 1:
            raise ValueError(
                f"sampler steps: found {steps}, expected at least 1: a continuous process has no own number"
            )
        return np.linspace(1.0, 0.0, steps + 1)


Process = Chain | Continuous


def drift(process: Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(f, g) of the forward SDE dx = f x du + g dW: f = a' / a, g^2 = 2 s s' - 2 s^2 f.

    Of the straight path both grow without bound as u nears 1.
    """
    (a, s), (rate_a, rate_s) = process.scales(t), process.rates(t)
    f = rate_a / a
    return f, jnp.sqrt(2 * s * rate_s - 2 * s * s * f)


# What a network may predict: (p, q) of p x0 + q eps, from (a, s, a', s').
PARAMETRISATIONS: dict[str, Callable] = {
    "x0": lambda a, s, rate_a, rate_s: (jnp.ones_like(a), jnp.zeros_like(a)),
    "eps": lambda a, s, rate_a, rate_s: (jnp.zeros_like(a), jnp.ones_like(a)),
    "v": lambda a, s, rate_a, rate_s: (-s, a),
    "score": lambda a, s, rate_a, rate_s: (jnp.zeros_like(a), -1 / s),
    "velocity": lambda a, s, rate_a, rate_s: (rate_a, rate_s),
}


def _mix(kind: str, process: Process, t: jax.Array) -> tuple[jax.Array, ...]:
    """(p, q, a, s) of t's shape."""
    a, s = process.scales(t)
    return (*PARAMETRISATIONS[kind](a, s, *process.rates(t)), a, s)


def _columns(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Values of times, ready to multiply vectors: a last axis of 1, or a plain number."""
    return tuple(value[..., None] if value.ndim else value for value in values)


def diffused(x0: jax.Array, noise: jax.Array, process: Process, t: jax.Array) -> jax.Array:
    """x_t = a x0 + s noise. Here and below: vectors [..., D]; t: their leading axes, or one number for all."""
    a, s = _columns(process.scales(t))
    return a * x0 + s * noise


def target(kind: str, x0: jax.Array, noise: jax.Array, process: Process, t: jax.Array) -> jax.Array:
    """What a network of this kind is trained to say at x_t = a x0 + s noise."""
    p, q, _, _ = _columns(_mix(kind, process, t))
    return p * x0 + q * noise


def to_x0(kind: str, output: jax.Array, x: jax.Array, process: Process, t: jax.Array) -> jax.Array:
    """x0 of a network's output. Where a = 0 (straight, u = 1) eps and score say nothing of x0: 0 is answered there."""
    if kind == "x0":
        return output
    p, q, a, s = _columns(_mix(kind, process, t))
    scale = s * p - q * a
    return jnp.where(scale == 0, 0.0, (s * output - q * x) / jnp.where(scale == 0, 1.0, scale))


def from_x0(kind: str, x0: jax.Array, x: jax.Array, process: Process, t: jax.Array) -> jax.Array:
    """What a network of this kind would say where the clean vector is x0; the inverse of `to_x0`."""
    a, s = _columns(process.scales(t))
    return target(kind, x0, (x - a * x0) / s, process, t)


def convert(source: str, kind: str, output: jax.Array, x: jax.Array, process: Process, t: jax.Array) -> jax.Array:
    """An output of kind `source` as one of kind `kind`."""
    return output if source == kind else from_x0(kind, to_x0(source, output, x, process, t), x, process, t)


def _square(kind: str, process: Process, t: jax.Array) -> jax.Array:
    """MSE in this coordinate over MSE in x0, at a given x: an error d of x0 is one of -(a / s) d in eps."""
    p, q, a, s = _mix(kind, process, t)
    return jnp.square(p - q * a / s)


def _as(kind: str) -> Callable:
    return lambda output, process, t: _square(kind, process, t) / _square(output, process, t)


def _min_snr(output: str, process: Process, t: jax.Array) -> jax.Array:
    a, s = process.scales(t)
    return jnp.minimum(jnp.square(a / s), SNR_CAP) / _square(output, process, t)


# Weight per time, of t's shape, by which the MSE in the network's own coordinate `output` is multiplied: as WEIGHTS[..]
# (output, process, t). A kind's name: the loss is then the MSE in that coordinate. "min_snr": arXiv 2303.09556, cap 5.
WEIGHTS: dict[str, Callable] = {
    "none": lambda output, process, t: jnp.ones_like(process.scales(t)[0]),
    **{kind: _as(kind) for kind in PARAMETRISATIONS},
    "min_snr": _min_snr,
}


def guided(conditional: jax.Array, unconditional: jax.Array, weight: float | jax.Array) -> jax.Array:
    """(1 + w) c - w u (arXiv 2207.12598); the same in every coordinate, for the conversions are affine."""
    return (1 + weight) * conditional - weight * unconditional
