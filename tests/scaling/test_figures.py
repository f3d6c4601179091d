"""Figures are written with the numbers they draw."""

import csv
import dataclasses

import matplotlib.image
import numpy as np
import pytest

from recscale.scaling import collect, figures, laws
from tests.scaling import synthetic_study as study


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    rows = collect.collect(study.write_study(tmp_path_factory.mktemp("study"))).rows
    return [laws.axis_law(rows, spec, draws=500) for spec in study.SPECS]


def _read(path):
    with path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def test_axis_figure_holds_points_law_null_and_band(fitted, tmp_path):
    path = tmp_path / "users.png"
    rows = figures.axis_figure(fitted[0], path)
    assert matplotlib.image.imread(path).std() > 0.05
    assert len(_read(path)) == len(rows)
    points = [row for row in rows if row["series"] == "runs"]
    np.testing.assert_array_equal([row["x"] for row in points], fitted[0].x_N)
    np.testing.assert_array_equal([row["y"] for row in points], fitted[0].y_N)
    assert {row["series"] for row in rows} == {"runs", "pow_floor", "log"}
    assert all(row["low"] <= row["y"] <= row["high"] for row in rows)
    assert max(row["x"] for row in rows) == pytest.approx(2 * 64000)


def test_axes_carry_units_and_the_known_floor_is_labelled(fitted, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path: seen.append(figure))
    figures.axis_figure(fitted[0], tmp_path / "users.png")
    (axes,) = seen[0].axes
    assert axes.get_xlabel() == "training data (users, log scale)" and "nats/event" in axes.get_ylabel()
    labels = axes.get_legend_handles_labels()[1]
    assert any(label == "known floor 3.1" for label in labels)
    assert any(label.startswith("fitted floor 3.") and "identified" in label for label in labels)
    bottom, top = axes.get_ylim()
    assert bottom < study.FLOOR < fitted[0].y_N.min() < fitted[0].y_N.max() < top
    figures.axis_figure(
        dataclasses.replace(fitted[0], spec=dataclasses.replace(fitted[0].spec, floor=0.1)), tmp_path / "f.png"
    )
    labels = seen[1].axes[0].get_legend_handles_labels()[1]
    assert "known floor 0.1, below the figure" in labels
    assert seen[1].axes[0].get_ylim()[0] > 2.5, "a far floor must not flatten the data"


def test_figures_of_an_axis_that_cannot_be_fitted(fitted, tmp_path):
    bare = dataclasses.replace(fitted[0], comparison=None, problem="2 distinct values")
    for count in (0, 1, 2):
        cut = dataclasses.replace(
            bare, **{name: getattr(bare, name)[:count] for name in ("x_N", "y_N", "sigma_N", "seeds_N", "stderr_N")}
        )
        assert len(figures.axis_figure(cut, tmp_path / f"{count}.png")) == count
    assert figures.gain_figure([bare], tmp_path / "gain.png") == []


def test_gain_figure_is_in_order(fitted, tmp_path):
    rows = figures.gain_figure(fitted, tmp_path / "gain.png")
    assert [row["axis"] for row in rows] == ["users", "table_rows", "history", "width"]
    assert len(_read(tmp_path / "gain.png")) == 4


@pytest.mark.parametrize(("value", "text"), [(64000, "64k"), (1.5e6, "1.5M"), (12, "12"), (0.25, "0.25"), (2e12, "2T")])
def test_short_numbers(value, text):
    assert figures.short_number(value) == text
