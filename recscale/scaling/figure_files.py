"""A figure as files: NAME.png, NAME.pdf and NAME.csv with the numbers it draws."""

import io
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

from recscale.scaling.collect import write_csv
from recscale.scaling.figures import STYLE, Diagram, Panel, Series, legend, short_number, ticks

MARKERS = {"circle": "o", "square": "s", "diamond": "D", "cross": "x"}
PANEL_INCHES = (4.4, 3.3)
NAME_INCHES = 0.32
LONG_ENTRY = 30  # characters of a legend entry that needs a wide column
PLAIN_UP_TO = 1e4
PNG_COLOURS = 96


def write_files(diagram: Diagram, folder: str | Path, stamp: str) -> None:
    """Draws a figure into a folder; stamp: small print at its foot. Nothing is written for a figure that is missing."""
    if diagram.missing:
        return
    base = Path(folder) / diagram.name
    base.parent.mkdir(parents=True, exist_ok=True)
    figure = figure_of(diagram, stamp)
    with matplotlib.rc_context(STYLE):
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        few = Image.open(drawn).convert("RGB").quantize(PNG_COLOURS)  # a third of the size, no difference to the eye
        few.save(base.with_name(base.name + ".png"), optimize=True)
        figure.savefig(base.with_name(base.name + ".pdf"), metadata={"CreationDate": None})
    write_csv(diagram.rows, base.with_name(base.name + ".csv"))


def figure_of(diagram: Diagram, stamp: str) -> Figure:
    """A diagram as a matplotlib figure, the sentence alone where it is missing; stamp: small print at its foot."""
    with matplotlib.rc_context(STYLE):
        if diagram.missing:
            figure = Figure(figsize=(6.0, 1.0))
            figure.text(0.02, 0.5, textwrap.fill(f"{diagram.title}: {diagram.missing}", 90), va="center", fontsize=9)
            return figure
        return _drawn(diagram, stamp)


def _drawn(diagram: Diagram, stamp: str) -> Figure:
    panels = diagram.panels
    columns = 1 if any(panel.names for panel in panels) else 3 if len(panels) == 3 else min(len(panels), 2)
    lines = -(-len(panels) // columns)
    tall = max((NAME_INCHES * len(panel.names) + 1.1 for panel in panels if panel.names), default=PANEL_INCHES[1])
    width, height = columns * PANEL_INCHES[0] * (1.4 if columns == 1 else 1), lines * tall
    named = legend(panels)
    entries = columns if max(map(len, named), default=0) > LONG_ENTRY else max(columns, 3)
    height += 0.75 + 0.24 * -(-len(named) // entries)
    figure = Figure(figsize=(width, height), layout="constrained")
    foot = 0.22 / height
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0.0, foot, 1.0, 1.0 - foot))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _panel(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(textwrap.fill(diagram.title, int(9.5 * width)), x=0.02, ha="left", fontsize=11.5, fontweight="bold")
    if named:
        handles, labels = [], []
        for axes in grid[: len(panels)]:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        figure.legend(handles, labels, loc="outside lower center", ncols=entries, fontsize=8.5)
    figure.text(0.995, 0.25 * foot, stamp, ha="right", va="bottom", fontsize=6.5, color="#616e7c")
    return figure


def _panel(axes: Axes, panel: Panel) -> None:
    (x_low, x_high), (y_low, y_high) = panel.limits()
    axes.set_xscale("log" if panel.x_log else "linear")
    axes.set_yscale("log" if panel.y_log else "linear")
    axes.set_xlim(x_low, x_high)
    axes.set_ylim(y_low, y_high)
    axes.set_autoscale_on(False)
    for series in panel.series:
        _series(axes, series)
    _ticks(axes.xaxis, x_low, x_high, panel.x_log, panel.x_whole)
    if panel.names:
        axes.set_yticks(range(len(panel.names)), [textwrap.fill(name, 34) for name in panel.names])
        axes.grid(axis="y", visible=False)
    else:
        _ticks(axes.yaxis, y_low, y_high, panel.y_log)
    axes.set_xlabel(textwrap.fill(panel.x_label, 48))
    axes.set_ylabel(textwrap.fill(panel.y_label, 34))
    axes.set_title(textwrap.fill(panel.title, 40 if panel.names else 48), loc="left", fontsize=10)


def _ticks(axis: matplotlib.axis.Axis, low: float, high: float, log: bool, whole: bool = False) -> None:
    axis.set_major_locator(FixedLocator(ticks(low, high, log, whole=whole)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: tick_text(value))


def tick_text(value: float) -> str:
    """A tick in few characters: 12.5, 40k; not rounded below 10,000."""
    return f"{value:.10g}" if abs(value) < PLAIN_UP_TO else short_number(value)


def _series(axes: Axes, series: Series) -> None:
    label = series.label or "_"
    dashes = (0, (5, 3)) if series.dashed else "-"
    if series.kind == "line":
        axes.plot(series.x, series.y, color=series.colour, lw=1.8, ls=dashes, label=label)
        return
    if series.kind == "band":
        assert series.low is not None and series.high is not None
        axes.fill_between(series.x, series.low, series.high, color=series.colour, alpha=0.15, lw=0, label=label)
        return
    marker = MARKERS[series.shape]
    options = {"fmt": marker, "ms": 4.5, "lw": 1.1, "capsize": 2, "zorder": 5, "color": series.colour, "label": label}
    if series.low is None or series.high is None:
        axes.errorbar(series.x, series.y, **options)
        return
    middle = series.x if series.across else series.y
    with np.errstate(invalid="ignore"):
        bars = np.stack([middle - series.low, series.high - middle])
    bars = np.where(np.isfinite(bars), np.maximum(bars, 0.0), 0.0)
    x_bars, y_bars = (bars, None) if series.across else (None, bars)
    axes.errorbar(series.x, series.y, xerr=x_bars, yerr=y_bars, **options)
