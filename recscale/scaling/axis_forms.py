"""The forms a one-axis law may take, one declarative entry each.

A form is linear in all parameters but an optional exponent. For a given exponent it is a design matrix over the
centred z = ln x - mean ln x, so the linear part is solved in closed form (variable projection) and only the exponent is
searched.
Q linear coefficients, P = Q + 1 parameters with an exponent, N points, ... any batch of fits.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

EXPONENT_BOUNDS = (1e-5, 5.0)  # below, a power cannot be told from a logarithm; above, it is a step at the first point
EXPONENT_GRID_G = np.concatenate([np.geomspace(EXPONENT_BOUNDS[0], 0.01, 40)[:-1], np.geomspace(0.01, 5.0, 220)])


@dataclasses.dataclass(frozen=True)
class Form:
    """One law y = f(x).

    parameters: names, in the order of every parameter array; formula: for the reader.
    design(alpha_..., z_N) -> [..., N, Q]; design_slope: its derivative by alpha, None if the form has no exponent.
    natural(coefficients_...Q, alpha_..., centre) -> parameters_...P in the units of x.
    predict(parameters_...P, log_x_N) -> [..., N].
    positive: parameters that must be > 0 for the form to be a law that falls with x.
    floor: name of the parameter that a lower bound of y (0 for a loss) applies to, or None.
    seeds: exponents the search starts from.
    """

    name: str
    formula: str
    parameters: tuple[str, ...]
    design: Callable[[np.ndarray, np.ndarray], np.ndarray]
    design_slope: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    natural: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray]
    positive: tuple[str, ...] = ()
    floor: str | None = None
    seeds: np.ndarray = dataclasses.field(default_factory=lambda: EXPONENT_GRID_G)

    @property
    def has_exponent(self) -> bool:
        return self.design_slope is not None

    def without_floor(self) -> "Form":
        """The form that is left when the floor is a known number taken off y; self if there is no floor."""
        return FORMS[WITHOUT_FLOOR[self.name]] if self.floor else self


def _power_step(alpha: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    """(1 - e^(-alpha z)) / alpha, [..., N]: tends to z as alpha tends to 0, smoothly."""
    alpha = np.asarray(alpha, np.float64)[..., None]
    return -np.expm1(-alpha * z_N) / alpha


def _pow_floor_design(alpha: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    step = _power_step(alpha, z_N)
    return np.stack([np.ones_like(step), -step], -1)


def _pow_floor_slope(alpha: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    step = _power_step(alpha, z_N)
    alpha = np.asarray(alpha, np.float64)[..., None]
    return np.stack([np.zeros_like(step), -(z_N * np.exp(-alpha * z_N) - step) / alpha], -1)


def _pow_floor_natural(coefficients: np.ndarray, alpha: np.ndarray, centre: float) -> np.ndarray:
    middle, fall = coefficients[..., 0], coefficients[..., 1]
    return np.stack([middle - fall / alpha, fall / alpha * np.exp(alpha * centre), alpha], -1)


def _pow_floor_predict(parameters: np.ndarray, log_x_N: np.ndarray) -> np.ndarray:
    floor, scale, alpha = (parameters[..., k, None] for k in range(3))
    return floor + scale * np.exp(-alpha * log_x_N)


def _pow_design(alpha: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    return np.exp(-np.asarray(alpha, np.float64)[..., None] * z_N)[..., None]


def _pow_slope(alpha: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    return -z_N[:, None] * _pow_design(alpha, z_N)


def _pow_natural(coefficients: np.ndarray, alpha: np.ndarray, centre: float) -> np.ndarray:
    return np.stack([coefficients[..., 0] * np.exp(alpha * centre), alpha], -1)


def _pow_predict(parameters: np.ndarray, log_x_N: np.ndarray) -> np.ndarray:
    return parameters[..., 0, None] * np.exp(-parameters[..., 1, None] * log_x_N)


def _log_design(alpha: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    design_NQ = np.stack([np.ones_like(z_N), -z_N], -1)
    return np.broadcast_to(design_NQ, (*np.shape(alpha), *design_NQ.shape))


def _log_natural(coefficients: np.ndarray, alpha: np.ndarray, centre: float) -> np.ndarray:
    return np.stack([coefficients[..., 0] + coefficients[..., 1] * centre, coefficients[..., 1]], -1)


def _log_predict(parameters: np.ndarray, log_x_N: np.ndarray) -> np.ndarray:
    return parameters[..., 0, None] - parameters[..., 1, None] * log_x_N


def _constant_design(alpha: np.ndarray, z_N: np.ndarray) -> np.ndarray:
    return np.ones((*np.shape(alpha), len(z_N), 1))


def _constant_natural(coefficients: np.ndarray, alpha: np.ndarray, centre: float) -> np.ndarray:
    return coefficients


def _constant_predict(parameters: np.ndarray, log_x_N: np.ndarray) -> np.ndarray:
    return parameters[..., 0, None] + np.zeros_like(log_x_N)


FORMS = {
    form.name: form
    for form in (
        Form(
            "pow_floor",
            "E + A x^-alpha",
            ("E", "A", "alpha"),
            _pow_floor_design,
            _pow_floor_slope,
            _pow_floor_natural,
            _pow_floor_predict,
            positive=("A",),
            floor="E",
        ),
        Form("pow", "A x^-alpha", ("A", "alpha"), _pow_design, _pow_slope, _pow_natural, _pow_predict, positive=("A",)),
        Form("log", "a - b ln x", ("a", "b"), _log_design, None, _log_natural, _log_predict),
        Form("constant", "c", ("c",), _constant_design, None, _constant_natural, _constant_predict),
    )
}

WITHOUT_FLOOR = {"pow_floor": "pow"}
