"""Samplers of a diffusion: a denoiser's x0^ turned into a sample, in one scan, whatever the sampler.

Every sampler here is one line per call of the denoiser,

    x <- keep x + clean x0^(x, t) + before x0^(of the call before) + noise z,

so a sampler is a table of these four numbers and t (a `Plan`), made in float64 from the process's (a, s) alone. The
scan knows nothing else, a linear denoiser's mean and covariance follow from the same table (`affine_chain`), and every
sampler visits a chain at its own integer times only, which is also why no library of solvers is used.

In (a, s) -> (a', s'), one step of the grid towards the data, with alpha = a / a' and q = s^2 - alpha^2 s'^2 the noise
that the process adds on the way back:

    ddpm      the exact posterior x' ~ N(c1 x0^ + c2 x, q s'^2 / s^2); on a sub-sequence of times, DDIM with eta = 1
    ddim      arXiv 2010.02502: a' x0^ + sqrt(s'^2 - d^2) eps^ + d z, d = eta of the ddpm's standard deviation
    sde       Euler-Maruyama of the reverse SDE in the increments of its own forward step (the reverse diffusion
              sampler of arXiv 2011.13456): (2 - alpha) x + q score + sqrt(q) z, the last step without noise
    ode       the probability flow by Heun. In the angle tan(h) = s / a and z = x / sqrt(a^2 + s^2) it reads
              dz/dh = v for every process, finite from pure noise to data; a step is DDIM's rotation, corrected by
              (h - h') / 2 of the difference of v at its end; the last step has no end to look at and is DDIM's
    langevin  annealed (arXiv 1907.05600): at every time one step x + eta s^2 score + sqrt(2 eta) s z, and on to the
              next by DDIM (the predictor-corrector of arXiv 2011.13456). The step is not rejected, so it leaves the
              noise too wide by about eta / 2 where it acts

ode and langevin call the denoiser twice per step (`Plan.calls`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recscale.layers.counter_noise import normal
from recscale.layers.diffusion import Process

Denoise = Callable[[jax.Array, jax.Array], jax.Array]  # (x_ND float32, one time) -> x0_ND, guidance already in it
ETA = {"ddim": 0.0, "langevin": 0.1}
"""Samplers that have an eta, and its usual value: share of the ddpm's noise; length of a step in units of s^2."""


class Plan(NamedTuple):
    """Rows of a sampler, one per call of the denoiser; start: standard deviation of x before the first."""

    time_R: np.ndarray
    keep_R: np.ndarray
    clean_R: np.ndarray
    before_R: np.ndarray
    noise_R: np.ndarray
    start: float

    @property
    def calls(self) -> int:
        """How often the denoiser is called."""
        return len(self.time_R)


class _Steps(NamedTuple):
    """Scales at both ends of every step, [steps] each."""

    a: np.ndarray
    s: np.ndarray
    next_a: np.ndarray
    next_s: np.ndarray

    @property
    def forward(self) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, q): x = alpha x' + sqrt(q) noise is the process's own way from the end of the step to its start."""
        alpha = self.a / self.next_a
        return alpha, self.s**2 - (alpha * self.next_s) ** 2


Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # keep, clean, before, noise; [steps] each


def _ddpm(step: _Steps, eta: float) -> tuple[Row, ...]:
    alpha, q = step.forward
    c1, c2 = step.next_a * q / step.s**2, alpha * step.next_s**2 / step.s**2
    return ((c2, c1, 0 * q, np.sqrt(q) * step.next_s / step.s),)


def _ddim(step: _Steps, eta: float) -> tuple[Row, ...]:
    _, q = step.forward
    noise = eta * np.sqrt(q) * step.next_s / step.s
    keep = np.sqrt(step.next_s**2 - noise**2) / step.s
    return ((keep, step.next_a - step.a * keep, 0 * q, noise),)


def _sde(step: _Steps, eta: float) -> tuple[Row, ...]:
    alpha, q = step.forward
    noise = np.append(np.sqrt(q[:-1]), 0.0)
    return ((2 - alpha - q / step.s**2, q * step.a / step.s**2, 0 * q, noise),)


def _ode(step: _Steps, eta: float) -> tuple[Row, ...]:
    """v at the end of the step, less v as the step assumed it there, is -(x0^' - x0^) / sin h'."""
    ((keep, clean, none, _),) = _ddim(step, 0.0)
    turn = np.arctan2(step.s, step.a) - np.arctan2(step.next_s, step.next_a)
    last = step.next_s == 0
    correct = np.where(last, 0.0, (step.next_a**2 + step.next_s**2) * turn / (2 * np.where(last, 1.0, step.next_s)))
    return (keep, clean, none, none), (none + 1, correct, -correct, none)


def _langevin(step: _Steps, eta: float) -> tuple[Row, ...]:
    ((keep, clean, none, _),) = _ddim(step, 0.0)
    walk = (none + 1 - eta, eta * step.a, none, np.sqrt(2 * eta) * step.s)
    return walk, (keep, clean, none, none)


SAMPLERS: dict[str, Callable[[_Steps, float], tuple[Row, ...]]] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "sde": _sde,
    "ode": _ode,
    "langevin": _langevin,
}


def plan(process: Process, sampler: str, steps: int | None = None, eta: float | None = None) -> Plan:
    """The rows of a sampler. steps: of the grid, None for all of a Chain; eta: None for the usual value of ETA.

    Raises ValueError for an unknown sampler, for an eta where the sampler has none, for one outside [0, 1], and for
    steps that the process's grid does not have.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: found {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if eta is not None and (sampler not in ETA or not 0 <= eta <= 1):
        raise ValueError(f"eta: found {eta} for sampler {sampler!r}, expected 0 to 1, and only for {', '.join(ETA)}")
    times = process.grid(steps)
    a, s = process.exact(times)
    rows = SAMPLERS[sampler](_Steps(a[:-1], s[:-1], a[1:], s[1:]), ETA.get(sampler, 0.0) if eta is None else eta)
    # Second rows of a step: ode looks at its end, langevin goes on from where it is. The last look of ode has no end.
    seen = (times[:-1], times[1:] if sampler == "ode" else times[:-1])[: len(rows)]
    time_R, *columns = (np.stack(part, axis=1).ravel() for part in (seen, *zip(*rows, strict=True)))
    calls = len(time_R) - (sampler == "ode")
    return Plan(time_R[:calls], *(column[:calls] for column in columns), start=float(np.hypot(a[0], s[0])))


def _scanned(rows: Plan, dtype: Any) -> tuple[jax.Array, ...]:
    """What a scan reads: times, the four numbers, and the number of the call."""
    time_R = jnp.asarray(rows.time_R, jnp.int32 if rows.time_R.dtype == np.int32 else jnp.float32)
    columns = (rows.keep_R, rows.clean_R, rows.before_R, rows.noise_R)
    return time_R, *(jnp.asarray(column, dtype) for column in columns), jnp.arange(1, rows.calls + 1)


def sample(
    denoise: Denoise,
    process: Process,
    keys_N: jax.Array,
    dim: int,
    sampler: str = "ddpm",
    steps: int | None = None,
    eta: float | None = None,
) -> jax.Array:
    """One sample per key, float32 [N, dim].

    The noise of row n is counter_noise.normal of keys_N[n] and i, i = 0 for the start and 1, 2, .. for the calls after
    it: a row's sample depends neither on the rows beside it nor on the mesh, and memory does not grow with the steps.
    steps, eta, errors: see `plan`.
    """
    rows = plan(process, sampler, steps, eta)
    random = bool(rows.noise_R.any())

    def call(carry, row):
        x_ND, before_ND = carry
        time, keep, clean, before, noise, number = row
        x0_ND = denoise(x_ND, time).astype(jnp.float32)
        x_ND = keep * x_ND + clean * x0_ND + before * before_ND
        return (x_ND + noise * normal(keys_N, number, dim) if random else x_ND, x0_ND), None

    start_ND = rows.start * normal(keys_N, 0, dim)
    (x_ND, _), _ = jax.lax.scan(call, (start_ND, jnp.zeros_like(start_ND)), _scanned(rows, jnp.float32))
    return x_ND


def affine_chain(
    weight: jax.Array | Callable[[jax.Array], jax.Array],
    shift: jax.Array | Callable[[jax.Array], jax.Array],
    process: Process,
    sampler: str = "ddpm",
    steps: int | None = None,
    eta: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean [.., D] and covariance [D, D] of the samples of an affine denoiser x0^ = x W^T + k, without sampling.

    weight: W [D, D], or a function of the time that gives it. shift: k by time, [T, .., D], or a function of the time
    that gives [.., D]: leading axes are users, who share the covariance. With DreamRec's `mlp1` W is its first D
    columns and k all the rest, so the mean is its ranking without noise. steps, eta, errors: see `plan`.
    """
    rows = plan(process, sampler, steps, eta)
    W_of = weight if callable(weight) else lambda t: weight
    k_of = shift if callable(shift) else lambda t: shift[t]
    k = k_of(jnp.asarray(rows.time_R[0]))
    D, dtype = k.shape[-1], k.dtype
    eye, zero = jnp.eye(D, dtype=dtype), jnp.zeros((D, D), dtype)

    def call(carry, row):
        mean, before, joint = carry  # joint: covariance of (x, x0^ of the call before)
        time, keep, clean, last, noise, _ = row
        W, k = W_of(time), k_of(time)
        x0 = mean @ W.T + k
        move = jnp.block([[keep * eye + clean * W, last * eye], [W, zero]])
        joint = move @ joint @ move.T + jnp.block([[noise**2 * eye, zero], [zero, zero]])
        return (keep * mean + clean * x0 + last * before, x0, joint), None

    start = (jnp.zeros_like(k), jnp.zeros_like(k), jnp.block([[rows.start**2 * eye, zero], [zero, zero]]))
    (mean, _, joint), _ = jax.lax.scan(call, start, _scanned(rows, dtype))
    return mean, joint[:D, :D]
