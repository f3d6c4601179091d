"""Figures of a study. Each writes a PNG and a CSV beside it and returns the rows it drew."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from recscale.scaling.collect import write_csv
from recscale.scaling.fits import Law
from recscale.scaling.laws import AxisLaw

INK, LAW, FLOOR, FITTED_FLOOR = "#1f2933", "#1f5fa8", "#b3261e", "#2e7d4f"
NULL = {"log": "#7b8794", "constant": "#b7791f"}
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
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short_number(value: float) -> str:
    """1500 -> 1.5k, 2e6 -> 2M; three significant digits."""
    for size, letter in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def axis_figure(law: AxisLaw, path: str | Path) -> list[dict[str, Any]]:
    """Metric against one axis (log2): points with error bars, law with its 90 % band, null model, known floor.

    Error bars are 90 % (1.645 sigma). The curve runs one doubling beyond the largest x; that part is dotted.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        axes = figure.add_subplot()
        rows = _draw_points(axes, law)
        if law.fits:
            rows += _draw_fits(axes, law)
        _limits(axes, law)
        _draw_floors(axes, law)
        _dress(axes, law)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        figure.savefig(path)
    write_csv(rows, Path(path).with_suffix(".csv"))
    return rows


def _draw_points(axes: Axes, law: AxisLaw) -> list[dict[str, Any]]:
    sigma_N = law.sigma_N
    if sigma_N is None:
        sigma_N = np.full(len(law.x_N), law.power.residual_sd if law.fits else math.nan)
    bars_N = 1.645 * np.nan_to_num(sigma_N)
    label = f"runs (mean of seeds), 90 % from {law.noise_source}"
    axes.errorbar(law.x_N, law.y_N, bars_N, fmt="o", color=INK, ms=5.5, capsize=3, lw=1.2, zorder=5, label=label)
    return [
        {"series": "runs", "x": float(x), "y": float(y), "low": float(y - bar), "high": float(y + bar), "seeds": int(n)}
        for x, y, bar, n in zip(law.x_N, law.y_N, bars_N, law.seeds_N, strict=True)
    ]


def _drawn_forms(law: AxisLaw) -> list[tuple[Law, str, str]]:
    """The fits to draw, with colour and line style: the law solid (with a band), null and other quoted form dashed."""
    quoted = law.quoted
    drawn = []
    for fit in law.fits:
        certified = law.power.certified
        if (fit is law.power and certified) or (fit.form == quoted and not certified):
            drawn.append((fit, LAW, "-"))
        elif fit.form in ("log", quoted):
            drawn.append((fit, NULL[fit.form], "--"))
    return drawn


def _draw_fits(axes: Axes, law: AxisLaw) -> list[dict[str, Any]]:
    rows = []
    inside_N = np.geomspace(law.x_N[0], law.x_N[-1], 120)
    beyond_N = np.geomspace(law.x_N[-1], 2 * law.x_N[-1], 25)
    for fit, colour, line in _drawn_forms(law):
        name = {"pow_floor": "E + A x^(-α)", "log": "null: a - b ln x", "constant": "null: constant"}[fit.form]
        axes.plot(inside_N, fit.curve(law.at(inside_N)), line, color=colour, lw=1.8, label=name)
        axes.plot(beyond_N, fit.curve(law.at(beyond_N)), ":", color=colour, lw=1.8)
        x_N = np.append(inside_N, beyond_N[1:])
        mean_N, low_N, high_N = fit.band(law.at(x_N))
        if line == "-":
            axes.fill_between(x_N, low_N, high_N, color=colour, alpha=0.16, lw=0, label="90 % band of the curve")
        rows += [
            {"series": fit.form, "x": float(x), "y": float(y), "low": float(low), "high": float(high)}
            for x, y, low, high in zip(x_N, mean_N, low_N, high_N, strict=True)
        ]
    return rows


def _limits(axes: Axes, law: AxisLaw) -> None:
    """The data fill the height; a floor is taken in where that leaves the data at least a third of it."""
    if not len(law.y_N):
        return
    bars_N = np.zeros(len(law.y_N)) if law.sigma_N is None else 1.645 * law.sigma_N
    low, high = float((law.y_N - bars_N).min()), float((law.y_N + bars_N).max())
    for fit, _, _ in _drawn_forms(law):
        low = min(low, float(fit.curve(law.at(2 * law.x_N[-1]))[0]))
    span = max(high - low, 1e-3 * abs(high), 1e-9)
    floors = [law.spec.floor] if law.spec.floor is not None else []
    if law.fits and law.power.verdicts["E"] != "not identified":
        floors.append(law.power.params["E"])
    reached = [floor for floor in floors if low - 2 * span <= floor < low]
    bottom = min([low, *reached])
    margin = 0.07 * (high - bottom or span)
    axes.set_ylim(bottom - margin, high + margin)


def _draw_floors(axes: Axes, law: AxisLaw) -> None:
    bottom, top = axes.get_ylim()
    known, interval = law.spec.floor, law.floor_interval()
    if known is not None:
        inside = bottom <= known <= top
        where = "" if inside else ", below the figure" if known < bottom else ", above the figure"
        label = f"known floor {known:.4g}{where}"
        if inside:
            axes.axhline(known, color=FLOOR, lw=1.8, label=label)
        else:
            axes.plot([], [], color=FLOOR, lw=1.8, label=label)
    if interval is None or law.power.verdicts["E"] == "not identified":
        axes.plot([], [], " ", label="fitted floor: not identified")
        return
    value, (low, high) = law.power.params["E"], interval
    label = f"fitted floor {value:.4g} [{low:.4g}, {high:.4g}], {law.power.verdicts['E']}"
    if high > bottom:
        axes.axhspan(max(low, bottom), min(high, top), color=FITTED_FLOOR, alpha=0.10, lw=0)
    if bottom <= value <= top:
        axes.axhline(value, color=FITTED_FLOOR, lw=1.6, ls=(0, (5, 4)), label=label)
    else:
        axes.plot([], [], color=FITTED_FLOOR, lw=1.6, ls=(0, (5, 4)), label=f"{label}, below the figure")


def _dress(axes: Axes, law: AxisLaw) -> None:
    spec = law.spec
    if len(law.x_N):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(law.x_N)))
        axes.set_xlim(law.x_N[0] / 1.15, 2.15 * law.x_N[-1] if law.fits else law.x_N[-1] * 1.15)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.set_xlabel(f"{spec.label} ({spec.unit}, log scale)")
    axes.set_ylabel(f"{spec.split} {spec.metric} ({spec.metric_unit})")
    title = f"{spec.label}: {law.problem}" if law.problem else _gain_title(law)
    axes.set_title(title, loc="left", wrap=True)


def _ticks(x_N: np.ndarray) -> list[float]:
    """The measured x, less those that would touch a neighbour's label."""
    room = max(math.log(2 * x_N[-1] / x_N[0]) / 11, 1e-9)
    ticks = [float(x_N[0])]
    for x in x_N[1:]:
        if math.log(x / ticks[-1]) >= room:
            ticks.append(float(x))
    return ticks


def _gain_title(law: AxisLaw) -> str:
    gain = law.gain
    flat = ", flat" if gain.flat else ""
    return f"{law.spec.label}: the next doubling gains {gain.value:.4f} [{gain.low:.4f}, {gain.high:.4f}]{flat}"


def _unit(law: AxisLaw) -> str:
    return law.spec.metric_unit


def gain_figure(laws: Sequence[AxisLaw], path: str | Path) -> list[dict[str, Any]]:
    """What the next doubling of each axis buys, largest first, with 90 % intervals; grey where it includes nothing."""
    fitted = sorted((law for law in laws if law.fits and not law.spec.end), key=lambda law: law.gain.value)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.5 + 0.5 * max(len(fitted), 1)), layout="constrained")
        axes = figure.add_subplot()
        rows = []
        for place, law in enumerate(fitted):
            gain = law.gain
            bars = [[gain.value - gain.low], [gain.high - gain.value]]
            axes.barh(place, gain.value, color="#c3cad2" if gain.flat else "#8fb4dc", height=0.62)
            axes.errorbar(gain.value, place, xerr=bars, fmt="o", color=INK, ms=4.5, capsize=3.5, lw=1.4)
            rows.append({"axis": law.spec.name, "gain": gain.value, "low": gain.low, "high": gain.high})
        axes.set_yticks(range(len(fitted)), [f"{law.spec.label}\n({law.spec.unit})" for law in fitted])
        axes.axvline(0, color=INK, lw=1)
        axes.grid(axis="y", visible=False)
        units = sorted({_unit(law) for law in fitted}) or ["nats/event"]
        axes.set_xlabel(f"gain of the next doubling ({', '.join(units)}), bars 90 %")
        axes.set_title("What the next doubling of each axis buys" if fitted else "No axis could be fitted", loc="left")
        figure.savefig(path)
    write_csv(rows[::-1], Path(path).with_suffix(".csv"))
    return rows[::-1]
