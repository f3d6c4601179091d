"""Figures hold the numbers they draw, carry units and the stamp, and are the same in files and in the page."""

import csv
import math
import re
import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest

from recscale.scaling import collect, figure_files, laws
from recscale.scaling.figure_svg import panel_html
from recscale.scaling.figures import (
    COLOURS,
    Diagram,
    Panel,
    Series,
    band,
    level,
    line,
    missing,
    points,
    short_number,
    ticks,
)
from recscale.scaling.figures_axes import cut_diagram, gain_per_doubling
from tests.scaling import passing_study
from tests.scaling import synthetic_study as study

STAMP = "made_up · study.yaml 0123456789ab"


def diagram(**changes):
    x = np.geomspace(10, 1000, 5)
    drawn = (
        points("runs", x, 1 / x, low=0.9 / x, high=1.1 / x, run=tuple("abcde")),
        line("law", x, 1 / x),
        band("90 %", x, 0.8 / x, 1.2 / x),
        level("far below", -50.0, x, COLOURS[2], framed=False),
    )
    panel = Panel("first <panel>", "size (parameters, log scale)", "loss (nats)", drawn, x_log=True)
    return Diagram("figure", "A title", "A caption.", (panel,), **changes)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter() if element.tag == "text"]


def svg_of(html):
    return re.search(r"<svg viewBox.*?</svg>(?=<div)", html, re.S).group(0)


def test_files_hold_what_is_drawn(tmp_path):
    figure_files.write_files(diagram(), tmp_path / "figures", STAMP)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["figure.csv", "figure.pdf", "figure.png"]
    assert matplotlib.image.imread(tmp_path / "figures" / "figure.png").std() > 0.05
    rows = read(tmp_path / "figures" / "figure.csv")
    assert [row["run"] for row in rows if row["series"] == "runs"] == list("abcde")
    np.testing.assert_allclose(
        [float(row["y"]) for row in rows if row["series"] == "law"], 1 / np.geomspace(10, 1000, 5)
    )
    assert {row["panel"] for row in rows} == {"first <panel>"}


def test_files_carry_units_title_and_stamp(tmp_path):
    figure = figure_files.figure_of(diagram(), STAMP)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "size (parameters, log scale)" and axes.get_ylabel() == "loss (nats)"
    assert STAMP in [text.get_text() for text in figure.texts] and figure.get_suptitle() == "A title"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["law", "90 %", "far below", "runs"]


def test_what_is_not_framed_does_not_move_the_limits():
    (panel,) = diagram().panels
    (x_low, x_high), (y_low, y_high) = panel.limits()
    assert 5 < x_low < 10 and 1000 < x_high < 2000 and -0.1 < y_low < 0.001 and 0.12 < y_high < 0.15


def test_a_page_panel_links_points_to_runs_and_escapes():
    (panel,) = diagram().panels
    html = panel_html(panel, STAMP, {"a": "run-0", "c": "run-2"})
    assert html.count("<a ") == 2 and 'href="#run-2"' in html and 'class="points"' in html
    assert "first &lt;panel&gt;" in html and "<panel>" not in html and STAMP in html
    assert "loss (nats)" in html and "size (parameters, log scale)" in html
    ET.fromstring(svg_of(html))  # well formed
    assert panel_html(panel, STAMP, {}).count("<a ") == 0


def test_points_of_a_page_panel_lie_where_their_numbers_are():
    x = np.array([1.0, 10.0, 100.0])
    panel = Panel("", "x", "y", (points("", x, x, run=("a", "b", "c")),), x_log=True, y_log=True)
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', panel_html(panel, "", {}))
    (x0, y0), (x1, y1), (x2, y2) = ((float(a), float(b)) for a, b in found)
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_what_is_no_number_is_not_drawn_and_never_printed(tmp_path):
    drawn = points("runs", [1.0, 2.0, math.nan], [math.nan, 2.0, 3.0], low=[0, math.inf, 0], high=[1, math.inf, 1])
    figure = Diagram(
        "gaps",
        "Gaps",
        "",
        (
            Panel(
                "p",
                "x",
                "y",
                (drawn, line("l", [1.0, math.nan], [1.0, 1.0])),
            ),
        ),
    )
    html = panel_html(figure.panels[0], STAMP, {})
    assert "nan" not in html and "inf" not in html and html.count("<circle") == 2  # one point, one legend entry
    figure_files.write_files(figure, tmp_path, STAMP)
    assert "nan" not in (tmp_path / "gaps.csv").read_text() and "inf" not in (tmp_path / "gaps.csv").read_text()


def test_a_missing_figure_says_why_and_writes_nothing(tmp_path):
    absent = missing("none", "Nothing", "Not drawn: no curve.")
    figure_files.write_files(absent, tmp_path, STAMP)
    assert absent.missing == "Not drawn: no curve." and absent.rows == [] and not list(tmp_path.iterdir())


def test_bad_series_are_refused():
    with pytest.raises(ValueError, match="expected"):
        Series("s", "pie", np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="2 x, 3 y"):
        line("s", [1, 2], [1, 2, 3])


@pytest.mark.parametrize("limits", [(3120, 47_900), (1, 1e9), (0.9, 1.1), (144, 51_000), (7, 8), (1e-3, 2e3)])
@pytest.mark.parametrize("log", [True, False])
def test_ticks_are_few_inside_and_apart(limits, log):
    found = ticks(*limits, log)
    assert 1 <= len(found) <= 7 and all(limits[0] <= value <= limits[1] for value in found)
    places = np.log(found) if log else np.array(found)
    room = (math.log(limits[1] / limits[0]) if log else limits[1] - limits[0]) / 12
    assert len(found) < 2 or np.diff(places).min() > room


def test_counts_have_whole_ticks():
    assert ticks(-0.1, 2.1, False, whole=True) == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "text"),
    [(64000, "64k"), (1.5e6, "1.5M"), (12, "12"), (0.25, "0.25"), (2e12, "2T"), (999_900, "1M"), (math.nan, "")],
)
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    rows = collect.collect(study.write_study(tmp_path_factory.mktemp("study"))).rows
    return [laws.axis_law(rows, spec, draws=300) for spec in study.SPECS]


def test_a_cut_shows_runs_forms_and_floors(cuts):
    figure = cut_diagram(cuts[0])
    runs = [row for row in figure.rows if row["series"] == "runs, mean of seeds"]
    np.testing.assert_array_equal([row["x"] for row in runs], cuts[0].x_N)
    assert all(row["low"] < row["y"] < row["high"] for row in runs)
    labels = {row["series"] for row in figure.rows}
    assert "known floor 3.1" in labels and any(label.startswith("fitted floor 3.") for label in labels)
    assert max(row["x"] for row in figure.rows) == pytest.approx(2 * 64000)
    (panel,) = figure.panels
    assert panel.x_label == "training data (users, log scale)" and "nats/event" in panel.y_label


def test_gains_are_in_order_with_their_intervals(cuts, tmp_path):
    spec, _ = passing_study.tables(tmp_path)
    figure = gain_per_doubling(spec, [], cuts)
    (panel,) = figure.panels
    assert panel.names[::-1] == ("training data", "embedding table", "history length", "encoder width")
    shown = {row["name"]: row for row in figure.rows if row.get("name") and row["series"] == "points"}
    assert shown["training data"]["x"] == pytest.approx(cuts[0].gain.value)
    assert shown["training data"]["low"] == pytest.approx(cuts[0].gain.low)
    assert gain_per_doubling(spec, []).missing.startswith("Not drawn")
