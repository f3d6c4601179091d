"""A figure inside a page: one small SVG per panel, drawn by hand so that each point is a link to its run.

A panel is as wide as its column, so that text stays readable on a phone; title, labels and legend are HTML and wrap.
"""

import math
from collections.abc import Mapping
from html import escape

import numpy as np

from recscale.scaling.figure_files import tick_text
from recscale.scaling.figures import Panel, Series, legend, ticks

WIDTH, HEIGHT = 340, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 6, 22
NAMES_LEFT, NAME_HEIGHT = 8, 34
DASHES = ' stroke-dasharray="5 3"'


def panel_html(panel: Panel, stamp: str, anchors: Mapping[str, str]) -> str:
    """A panel as HTML: <figure> with its SVG. anchors: run -> id of its row in the page; such points are links."""
    draw = _Frame(panel)
    body = "".join(_series(draw, series, anchors) for series in panel.series)
    label = escape(f"{panel.title}: {panel.y_label or 'choices'} against {panel.x_label}")
    linked = any(run in anchors for series in panel.series for run in series.run)
    focus = ' tabindex="0" class="points"' if linked else ""
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {draw.height}" role="{"group" if linked else "img"}" aria-label="{label}"{focus}>'
        f"{draw.grid()}"
        f'<svg x="{draw.left}" y="{TOP}" width="{draw.width}" height="{draw.inner}">{body}</svg>{draw.words()}</svg>'
    )
    y_label = f'<div class="ylabel">{escape(panel.y_label)}</div>' if panel.y_label else ""
    foot = f'<div class="xlabel">{escape(panel.x_label)}</div>{_legend(panel)}<div class="stamp">{escape(stamp)}</div>'
    return f'<figure class="panel"><div class="ptitle">{escape(panel.title)}</div>{y_label}{svg}{foot}</figure>'


class _Frame:
    """Where numbers lie in a panel, in units of its viewBox."""

    def __init__(self, panel: Panel):
        self.panel = panel
        (self.x_low, self.x_high), (self.y_low, self.y_high) = panel.limits()
        self.left = NAMES_LEFT if panel.names else LEFT
        self.height = TOP + BOTTOM + NAME_HEIGHT * len(panel.names) if panel.names else HEIGHT
        self.width, self.inner = WIDTH - self.left - RIGHT, self.height - TOP - BOTTOM

    def x(self, value: np.ndarray) -> np.ndarray:
        return self.width * _share(value, self.x_low, self.x_high, self.panel.x_log)

    def y(self, value: np.ndarray) -> np.ndarray:
        return self.inner * (1 - _share(value, self.y_low, self.y_high, self.panel.y_log))

    def grid(self) -> str:
        """Lines and tick numbers."""
        parts = []
        for value in ticks(self.x_low, self.x_high, self.panel.x_log, 5, self.panel.x_whole):
            x = self.left + float(self.x(np.array(value)))
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{self.height - BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{self.height - 8}" text-anchor="middle">{tick_text(value)}</text>')
        for value in [] if self.panel.names else ticks(self.y_low, self.y_high, self.panel.y_log, 6):
            y = TOP + float(self.y(np.array(value)))
            parts.append(f'<path class="grid" d="M{self.left} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{self.left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>')
        return "".join(parts)

    def words(self) -> str:
        """The names of rows, above their marks."""
        found = []
        for index, name in enumerate(self.panel.names):
            y = TOP + float(self.y(np.array(float(index)))) - 8
            found.append(f'<text class="name" x="{self.left + 2}" y="{y:.1f}">{escape(name)}</text>')
        return "".join(found)


def _share(value: np.ndarray, low: float, high: float, log: bool) -> np.ndarray:
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            value, low, high = np.log(value), math.log(low), math.log(high)
    return np.clip((value - low) / (high - low), -5.0, 6.0)


def _series(frame: _Frame, series: Series, anchors: Mapping[str, str]) -> str:
    x, y = frame.x(series.x), frame.y(series.y)
    if series.kind == "line":
        dash = DASHES if series.dashed else ""
        return f'<path d="{_path(x, y)}" fill="none" stroke="{series.colour}" stroke-width="1.8"{dash}/>'
    if series.kind == "band":
        assert series.low is not None and series.high is not None
        sides = np.concatenate([frame.y(series.low), frame.y(series.high)[::-1]])
        return f'<path d="{_path(np.concatenate([x, x[::-1]]), sides)}Z" fill="{series.colour}" opacity=".15"/>'
    parts = []
    for index in range(len(x)):
        if np.isfinite([x[index], y[index]]).all():
            mark = _bar(frame, series, index, x[index], y[index]) + _mark(series, x[index], y[index])
            anchor = anchors.get(series.run[index]) if series.run else None
            if anchor:
                hit = f'<circle class="hit" cx="{x[index]:.1f}" cy="{y[index]:.1f}" r="7"/>'
                mark = f'<a href="#{anchor}" tabindex="-1">{mark}{hit}</a>'
            parts.append(mark)
    return "".join(parts)


def _bar(frame: _Frame, series: Series, index: int, x: float, y: float) -> str:
    if series.low is None or series.high is None:
        return ""
    ends = np.array([series.low[index], series.high[index]])
    if not np.isfinite(ends).all():
        return ""
    if series.across:
        low, high = frame.x(ends)
        path = f"M{low:.1f} {y:.1f}H{high:.1f}"
    else:
        low, high = frame.y(ends)
        path = f"M{x:.1f} {low:.1f}V{high:.1f}"
    return f'<path d="{path}" stroke="{series.colour}" stroke-width="1.2"/>'


def _mark(series: Series, x: float, y: float) -> str:
    if series.shape == "square":
        return f'<rect x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4" fill="{series.colour}"/>'
    if series.shape == "diamond":
        return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5-5z" fill="{series.colour}"/>'
    if series.shape == "cross":
        path = f"M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0-7l-7 7"
        return f'<path d="{path}" stroke="{series.colour}" stroke-width="1.8" fill="none"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{series.colour}"/>'


def _path(x: np.ndarray, y: np.ndarray) -> str:
    good = np.isfinite(x) & np.isfinite(y)
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[good], y[good], strict=True)) if good.any() else "M0 0"


def _legend(panel: Panel) -> str:
    entries = []
    named = legend([panel])
    for label, series in named.items() if [*named] != ["runs"] else ():
        if series.kind == "points":
            inner = _mark(series, 9, 7)
        elif series.kind == "band":
            inner = f'<rect y="1" width="18" height="12" fill="{series.colour}" opacity=".2"/>'
        else:
            dash = DASHES if series.dashed else ""
            inner = f'<path d="M0 7H18" stroke="{series.colour}" stroke-width="2"{dash}/>'
        entries.append(f'<li><svg viewBox="0 0 18 14" aria-hidden="true">{inner}</svg>{escape(label)}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>' if entries else ""
