"""What a figure is, before it is drawn: panels of series, and the rows of its CSV. Shared colours and style.

figure_files.py draws a figure as PNG and PDF, figure_svg.py as SVG inside a page; both from the same `Diagram`.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colours, told apart with any colour vision.
INK, MUTED = "#1f2933", "#7b8794"
LAW, HELD_OUT, FITTED_FLOOR, FLOOR = "#0072b2", "#d55e00", "#009e73", "#b3261e"
COLOURS = (LAW, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", INK, MUTED)
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.dpi": 100,
    "savefig.dpi": 130,
}
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
KINDS = ("points", "line", "band")
SHAPES = ("circle", "square", "diamond", "cross")


def short_number(value: float) -> str:
    """1500 -> 1.5k, 2e6 -> 2M; three significant digits. "" for what is no finite number."""
    if not math.isfinite(value):
        return ""
    if abs(value) >= 1e18:
        return f"{value:.3g}"
    for size, letter in PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Series:
    """Marks of one look. kind: points (with bars where low and high are given), line, band (between low and high).

    label: for the legend, "" for none. run: the run behind each point. across: bars run along x. framed: whether the
    series moves the limits of the panel; what is not framed is cut off at them.
    """

    label: str
    kind: str
    x: np.ndarray
    y: np.ndarray
    colour: str = INK
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    run: tuple[str, ...] = ()
    shape: str = "circle"
    dashed: bool = False
    across: bool = False
    framed: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.shape not in SHAPES:
            raise ValueError(f"series {self.label!r}: found {self.kind} and {self.shape}, expected {KINDS}, {SHAPES}")
        for name in ("x", "y", "low", "high"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.atleast_1d(np.asarray(value, np.float64)))
        if len(self.x) != len(self.y) or (self.run and len(self.run) != len(self.x)):
            raise ValueError(f"series {self.label!r}: {len(self.x)} x, {len(self.y)} y, {len(self.run)} runs")

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """All x and all y that must be in the picture."""
        sides = [side for side in (self.low, self.high) if side is not None]
        if self.across:
            return np.concatenate([self.x, *sides]), self.y
        return self.x, np.concatenate(([] if self.kind == "band" and sides else [self.y]) + sides)


def points(label: str, x: Any, y: Any, colour: str = INK, **more: Any) -> Series:
    """A series of points."""
    return Series(label, "points", x, y, colour, **more)


def line(label: str, x: Any, y: Any, colour: str = LAW, **more: Any) -> Series:
    """A line."""
    return Series(label, "line", x, y, colour, **more)


def band(label: str, x: Any, low: Any, high: Any, colour: str = LAW, **more: Any) -> Series:
    """The area between two curves."""
    return Series(label, "band", x, np.asarray(low, np.float64), colour, low=low, high=high, **more)


def level(label: str, y: float, x_ends: Sequence[float], colour: str, **more: Any) -> Series:
    """A horizontal line from the first to the last x."""
    return line(label, [x_ends[0], x_ends[-1]], [y, y], colour, **more)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes. Labels carry their units. names: what y = 0, 1, 2, .. stand for where y is no number; x_whole:
    x counts something."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    names: tuple[str, ...] = ()
    x_whole: bool = False

    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The frame: all framed series with a margin; (x_low, x_high), (y_low, y_high)."""
        ends = [series.ends() for series in self.series if series.framed]
        x, y = (np.concatenate([pair[i] for pair in ends] or [np.zeros(0)]) for i in (0, 1))
        if self.names:
            return _frame(x, self.x_log), (-0.6, len(self.names) - 0.4)
        return _frame(x, self.x_log), _frame(y, self.y_log)


def _frame(values: np.ndarray, log: bool) -> tuple[float, float]:
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = (float(v) for v in (values.min(), values.max()))
    if log:
        low, high = math.log(low), math.log(high)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    low, high = low - margin, high + margin
    return (math.exp(low), math.exp(high)) if log else (low, high)


@dataclasses.dataclass(frozen=True)
class Diagram:
    """A figure: panels and what they show, or (missing) one sentence on what the records lack. name: of its files."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...] = ()
    missing: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The numbers drawn, one row per mark: panel, series, x, y, low, high, run. Not finite: left empty."""
        return [row for panel in self.panels for series in panel.series for row in _rows(panel, series)]


def _rows(panel: Panel, series: Series) -> list[dict[str, Any]]:
    found = []
    for index, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        row: dict[str, Any] = {"panel": panel.title, "series": series.label or series.kind, "x": x, "y": y}
        for name, side in (("low", series.low), ("high", series.high)):
            row[name] = math.nan if side is None else side[index]
        if panel.names and float(y).is_integer():
            row["name"] = panel.names[int(y)]
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        found.append(row | ({"run": series.run[index]} if series.run else {}))
    return [{k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in found]


def missing(name: str, title: str, sentence: str) -> Diagram:
    """A figure that cannot be drawn: why."""
    return Diagram(name, title, "", missing=sentence)


def legend(panels: Sequence[Panel]) -> Mapping[str, Series]:
    """The labelled series by label, first come."""
    found: dict[str, Series] = {}
    for panel in panels:
        for series in panel.series:
            if series.label:
                found.setdefault(series.label, series)
    return found


def ticks(low: float, high: float, log: bool, most: int = 6, whole: bool = False) -> list[float]:
    """Round numbers inside the limits, about `most` and none too close to the next; whole: integers only."""
    if not log:
        rough = max((high - low) / most, 1.0 if whole else 0.0)
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [round(index * step, 12) + 0.0 for index in range(first, last + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    room = math.log(high / low) / (1.5 * most)
    found: list[float] = []
    for leading in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in decades for digit in leading]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most and all(math.log(b / a) >= room for a, b in itertools.pairwise(found)):
            break
    return found[:: max(math.ceil(len(found) / most), 1)]
