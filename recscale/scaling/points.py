"""The points a law is fitted to: sizes on k axes, a metric, and what is known of the noise and of the runs behind them.

K axes, N points.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Points:
    """axes: names; x_KN: sizes > 0; y_N: the metric; sigma_N: its standard deviation from run to run, None if unknown.

    sigma_dof: degrees of freedom sigma was estimated from (runs less cells when it comes from seed replicates).
    run_N: name of each run; lineage_N: points of one training trajectory share it, and are resampled together.
    held_out_N: the top rung, which no fit sees. weight_N: how often a point counts (1).
    """

    axes: tuple[str, ...]
    x_KN: np.ndarray
    y_N: np.ndarray
    sigma_N: np.ndarray | None
    sigma_dof: float
    run_N: tuple[str, ...]
    lineage_N: tuple[str, ...]
    held_out_N: np.ndarray
    weight_N: np.ndarray
    metric: str = "loss"

    @staticmethod
    def of(
        x: Mapping[str, Sequence[float] | np.ndarray],
        y: Sequence[float] | np.ndarray,
        *,
        sigma: float | Sequence[float] | np.ndarray | None = None,
        sigma_dof: float = math.inf,
        run: Sequence[str] | None = None,
        lineage: Sequence[str] | None = None,
        held_out: Sequence[bool] | np.ndarray | None = None,
        weight: Sequence[float] | np.ndarray | None = None,
        metric: str = "loss",
    ) -> "Points":
        """Checks and gathers the points; raises ValueError with one line per problem."""
        y_N = np.asarray(y, np.float64).ravel()
        n = len(y_N)
        columns = {name: np.asarray(values, np.float64).ravel() for name, values in x.items()}
        problems = [] if columns else ["no axis: give at least one column of sizes"]
        if not n:
            problems.append(f"{metric}: no points")
        problems += [
            f"{name}: {len(values)} values for {n} of {metric}" for name, values in columns.items() if len(values) != n
        ]
        names = tuple(str(name) for name in run) if run is not None else tuple(str(index) for index in range(n))
        lines = tuple(str(name) for name in lineage) if lineage is not None else names
        out_N = np.zeros(n, bool) if held_out is None else np.asarray(held_out, bool).ravel()
        weight_N = np.ones(n) if weight is None else np.asarray(weight, np.float64).ravel()
        sigma_N = None if sigma is None else np.array(np.broadcast_to(np.asarray(sigma, np.float64), n))
        for name, values in (("run", names), ("lineage", lines), ("held_out", out_N), ("weight", weight_N)):
            if len(values) != n:
                problems.append(f"{name}: {len(values)} values for {n} of {metric}")
        if problems:
            raise ValueError("\n".join(problems))
        for name, values in columns.items():
            problems += _bad(name, values, np.isfinite(values) & (values > 0), "a finite size above 0", names)
        problems += _bad(metric, y_N, np.isfinite(y_N), "a finite number", names)
        problems += _bad("weight", weight_N, np.isfinite(weight_N) & (weight_N > 0), "a weight above 0", names)
        if sigma_N is not None:
            problems += _bad("sigma", sigma_N, np.isfinite(sigma_N) & (sigma_N > 0), "a number above 0", names)
        if problems:
            raise ValueError("\n".join(problems))
        x_KN = np.stack(list(columns.values()))
        return Points(tuple(columns), x_KN, y_N, sigma_N, sigma_dof, names, lines, out_N, weight_N, metric)

    def __len__(self) -> int:
        return len(self.y_N)

    @property
    def x(self) -> dict[str, np.ndarray]:
        """Sizes by axis."""
        return dict(zip(self.axes, self.x_KN, strict=True))

    @property
    def fitted(self) -> "Points":
        """The points a fit may see."""
        return self.select(~self.held_out_N)

    @property
    def held_out(self) -> "Points":
        """The points no fit may see."""
        return self.select(self.held_out_N)

    @property
    def distinct(self) -> int:
        """Number of distinct places on the axes."""
        return len(np.unique(self.x_KN, axis=1).T)

    @property
    def data_hash(self) -> str:
        """sha256 of everything that shapes a fit, whatever the order of the points."""
        columns = [*self.x_KN, self.y_N, self.weight_N, self.held_out_N.astype(np.float64)]
        if self.sigma_N is not None:
            columns.append(self.sigma_N)
        table = np.stack(columns, -1)
        order = np.lexsort(table.T)
        first: dict[str, int] = {}  # names do not matter, who is together does
        lineages = [first.setdefault(self.lineage_N[i], len(first)) for i in order]
        head = repr((self.axes, self.metric, self.sigma_dof, lineages)).encode()
        return hashlib.sha256(head + np.ascontiguousarray(table[order]).tobytes()).hexdigest()

    def select(self, chosen: np.ndarray | Sequence[int]) -> "Points":
        """The points of a mask or of a list of indices (an index may occur twice)."""
        index = np.flatnonzero(chosen) if np.asarray(chosen).dtype == bool else np.asarray(chosen, np.int64)
        return dataclasses.replace(
            self,
            x_KN=self.x_KN[:, index],
            y_N=self.y_N[index],
            sigma_N=None if self.sigma_N is None else self.sigma_N[index],
            run_N=tuple(self.run_N[i] for i in index),
            lineage_N=tuple(self.lineage_N[i] for i in index),
            held_out_N=self.held_out_N[index],
            weight_N=self.weight_N[index],
        )


def _bad(name: str, values: np.ndarray, good: np.ndarray, expected: str, runs: Sequence[str]) -> list[str]:
    """One line for a column with bad values: how many, the first and its run."""
    wrong = np.flatnonzero(~good)
    if not len(wrong):
        return []
    first = int(wrong[0])
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return [f"{name}: found {values[first]:g} in run {runs[first]}{more}, expected {expected}"]
