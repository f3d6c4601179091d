"""A law: what a fit leaves behind, and what it says at any sizes.

K axes, P parameters, S draws, M places.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from recscale.scaling.estimate import Certificate
from recscale.scaling.forms import FORMS
from recscale.scaling.intervals import percentiles

Sizes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a doubling buys, y(x) - y(2x), in units of y, with its 90 % interval."""

    value: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """True when the interval includes no gain at all."""
        return not (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted form. Dictionaries go by parameter name; intervals are 90 %, the wider of bootstrap and profile.

    stderr: delta method; verdicts of exponents and limits; certificate with its reasons (empty: certified); notes;
    scale and delta of the loss (inf: least squares); objective: the sum of Huber losses in residual units; n points;
    residual_sd in the scale's units; aicc (NaN with aicc_note when points are too few); delta_aicc and weight are set
    by `compare`; domain of the fitted points by axis; draws_SP: bootstrap parameters; residual_S: the residual of a new
    run in each draw, unit applied; profiles: (values, deviance) by parameter.
    """

    form: str
    axes: tuple[str, ...]
    params: dict[str, float]
    stderr: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    verdicts: dict[str, str]
    certificate: Certificate
    notes: tuple[str, ...]
    scale: str
    delta: float
    n: int
    objective: float
    residual_sd: float
    aicc: float
    aicc_note: str
    domain: dict[str, tuple[float, float]]
    metric: str
    data_hash: str
    bootstrap: str
    draws_SP: np.ndarray = dataclasses.field(repr=False)
    residual_S: np.ndarray = dataclasses.field(repr=False)
    profiles: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(repr=False, default_factory=dict)
    sigma_trusted: bool = False
    delta_aicc: float = math.nan
    weight: float = math.nan

    @property
    def formula(self) -> str:
        """The form, for the reader."""
        return FORMS[self.form].formula

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the fit is not certified; empty if it is."""
        return self.certificate.reasons

    @property
    def certified(self) -> bool:
        """Whether the fit may be printed as a law."""
        return not self.certificate.reasons

    @property
    def params_P(self) -> np.ndarray:
        """The parameters in order."""
        return np.array([*self.params.values()])

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of the parameters over the bootstrap draws, [P, P]."""
        return np.atleast_2d(np.cov(self.draws_SP, rowvar=False))

    def sizes(self, x: Sizes) -> np.ndarray:
        """Sizes by axis as an array [K, M]; raises ValueError for a missing, unknown or non-positive one."""
        if set(x) != set(self.axes):
            raise ValueError(f"sizes: found {', '.join(map(str, x)) or 'none'}, expected {', '.join(self.axes)}")
        x_KM = np.stack(np.broadcast_arrays(*(np.atleast_1d(np.asarray(x[a], np.float64)) for a in self.axes)))
        if not (np.isfinite(x_KM) & (x_KM > 0)).all():
            raise ValueError(f"sizes: found {x_KM.min():g}, expected finite numbers above 0")
        return x_KM

    def _values(self, params_SP: np.ndarray, x: Sizes) -> np.ndarray:
        form = FORMS[self.form]
        with np.errstate(over="ignore", invalid="ignore"):
            return form.predict(params_SP, form.coordinates(self.sizes(x)))

    def curve(self, x: Sizes) -> np.ndarray:
        """The law at sizes x (by axis, scalars or arrays [M]), [M]."""
        return self._values(self.params_P[None], x)[0]

    def drawn(self, x: Sizes) -> np.ndarray:
        """The law of every bootstrap draw, [S, M]."""
        return self._values(self.draws_SP, x)

    def drawn_runs(self, x: Sizes) -> np.ndarray:
        """A new run in every draw, [S, M]: the law of the draw and run noise."""
        values_SM = self.drawn(x)
        noise_S1 = self.residual_S[:, None]
        return values_SM * np.exp(noise_S1) if self.scale == "log" else values_SM + noise_S1

    def band(self, x: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The law at x and its 90 % interval: where the curve runs."""
        return self.curve(x), *percentiles(self.drawn(x))

    def prediction(self, x: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The law at x and the 90 % interval of a new run there: parameter draws and run noise together."""
        return self.curve(x), *percentiles(self.drawn_runs(x))

    def decades_beyond(self, x: Sizes) -> np.ndarray:
        """How far x lies outside the domain, in decades along its worst axis, [M]; 0 inside."""
        low_K, high_K = (np.log10([self.domain[axis][side] for axis in self.axes]) for side in (0, 1))
        at_KM = np.log10(self.sizes(x))
        return np.maximum(np.maximum(at_KM - high_K[:, None], low_K[:, None] - at_KM), 0.0).max(0)

    def corner(self) -> dict[str, float]:
        """The largest fitted size of every axis."""
        return {axis: high for axis, (_, high) in self.domain.items()}

    def gain_per_doubling(self, axis: str, at: Mapping[str, float] | None = None) -> Gain:
        """What twice as much of one axis buys at a place (default: the largest sizes fitted)."""
        if axis not in self.axes:
            raise ValueError(f"axis: found {axis!r}, expected one of {', '.join(self.axes)}")
        here = dict(at or self.corner())
        ends = {name: np.array([value, value * (2 if name == axis else 1)]) for name, value in here.items()}
        value_2, drawn_S2 = self.curve(ends), self.drawn(ends)
        low, high = percentiles(drawn_S2[:, 0] - drawn_S2[:, 1])
        value = float(value_2[0] - value_2[1])
        return Gain(value, min(float(low), value), max(float(high), value))
