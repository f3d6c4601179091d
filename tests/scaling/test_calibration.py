"""Intervals that say 90 %: on the planted study the truth is known, so how often they cover it can be counted."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from recscale.scaling import fits, laws, study, study_file, validate
from recscale.scaling.points import Points

PLANTED = Path(__file__).parents[2] / "experiments" / "0001_four_axes_planted"
X = np.geomspace(1e3, 1e6, 12)


def planted_axis(name):
    """(points of one axis of the planted study with the noise of its seeds, its known floor)."""
    spec = study_file.read_spec(PLANTED)
    records, _ = study.read_runs(PLANTED)
    known = json.loads((PLANTED / "results" / "floors.json").read_text())
    cut = next(cut for cut in study.axis_specs(spec, known) if cut.name == name)
    law = laws.axis_law(records.rows, cut, draws=200)
    dof = laws.seed_noise(records.rows, cut.evaluation).dof
    return Points.of({name: law.x_N}, law.y_N, sigma=law.sigma_N, sigma_dof=dof), cut.floor


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["dim", "users", "history"])
def test_intervals_cover_the_known_floor_of_the_planted_study(axis):
    """100 studies with this study's levels and seed noise, drawn from the known floor and the slope that fits it."""
    points, floor = planted_axis(axis)
    above = Points.of(points.x, points.y_N - floor)
    goal, theta_Q, *_ = fits.minimum(above, "pow", "identity", math.inf)
    scale, alpha = goal.form.natural(theta_Q[None], goal.centre_K)[0]
    curve_N = floor + scale * points.x[axis] ** -alpha
    rng = np.random.default_rng(0)
    hits = {"E": 0, "alpha": 0}
    for number in range(100):
        sigma = points.sigma_N * math.sqrt(rng.chisquare(points.sigma_dof) / points.sigma_dof)
        y_N = curve_N + points.sigma_N * rng.standard_normal(len(curve_N))
        drawn = Points.of(points.x, y_N, sigma=sigma, sigma_dof=points.sigma_dof)
        law = fits.fit(drawn, "pow_floor", scale="identity", delta="lsq", draws=300, seed=number, force=True)
        for name, truth in (("E", floor), ("alpha", alpha)):
            low, high = law.intervals[name]
            hits[name] += low <= truth <= high
    assert all(count >= 85 for count in hits.values()), hits


def test_calibration_counts_what_the_intervals_cover():
    y = (2 + 30 * X**-0.4) * np.exp(0.001 * np.random.default_rng(0).standard_normal(len(X)))
    points = Points.of({"x": X}, y)
    law = fits.fit(points, "pow_floor", delta="lsq", draws=200)
    found = validate.calibration(points, law, studies=20, draws=200)
    assert found.studies == 20 and set(found.covered) == {"E", "alpha"}
    assert all(14 <= count <= 20 for count in found.covered.values()), found
