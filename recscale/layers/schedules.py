"""Noise schedules of a discrete chain, as DreamRec has them (arXiv 2310.20453), and the chain's coefficients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


def _linear(T: int, dtype: Any) -> np.ndarray:
    return np.linspace(1e-4, 0.02, T, dtype=dtype)


def _cosine(T: int, dtype: Any) -> np.ndarray:
    x = np.linspace(0, T, T + 1, dtype=dtype)
    abar = np.cos((x / dtype(T) + dtype(0.008)) / dtype(1.008) * dtype(np.pi) * dtype(0.5)) ** 2
    abar = abar / abar[0]
    return np.clip(1 - abar[1:] / abar[:-1], dtype(1e-4), dtype(0.9999))


def _exp(T: int, dtype: Any) -> np.ndarray:
    x = np.linspace(1, 2 * T + 1, T, dtype=dtype)
    return 1 - np.exp(-dtype(0.1 / T) - dtype(0.5) * x * dtype(9.9) / dtype(T * T))


def _sqrt(T: int, dtype: Any) -> np.ndarray:
    abar = 1 - np.sqrt(np.arange(T + 1) / T + 1e-4)
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999).astype(dtype)


SCHEDULES: dict[str, Callable[[int, Any], np.ndarray]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exp": _exp,
    "sqrt": _sqrt,
}


class ChainTable(NamedTuple):
    """Coefficients of a chain, [T] each: x_{t-1} ~ N(c1 x0 + c2 x_t, sigma2 I)."""

    beta: np.ndarray
    abar: np.ndarray
    c1: np.ndarray
    c2: np.ndarray
    sigma2: np.ndarray


@functools.cache
def chain_table(schedule: str | tuple[float, ...], steps: int, dtype: Any = np.float64) -> ChainTable:
    """The table of a schedule. In float32 it repeats the rounding of the reference: c1 is .999834 at t = 0, not 1."""
    beta = SCHEDULES[schedule](steps, dtype) if isinstance(schedule, str) else np.asarray(schedule, dtype)
    abar = np.cumprod(1 - beta, dtype=dtype)
    before = np.append(dtype(1), abar[:-1])
    c1 = beta * np.sqrt(before) / (1 - abar)
    c2 = (1 - before) * np.sqrt(1 - beta) / (1 - abar)
    return ChainTable(beta, abar, c1, c2, beta * (1 - before) / (1 - abar))
