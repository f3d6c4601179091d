"""Predict, project, rollout, held-out rung; laws that must not be believed; law files."""

import json
import math

import numpy as np
import pytest

from recscale.scaling import fits, law_file, validate
from recscale.scaling.points import Points


def made(n=60, seed=0, noise=0.002):
    rng = np.random.default_rng(seed)
    size, data = (np.exp(rng.uniform(np.log(1e4), np.log(1e6), n)) for _ in range(2))
    y = (2 + 8 * size**-0.35 + 20 * data**-0.4) * np.exp(noise * rng.standard_normal(n))
    return Points.of({"N": size, "D": data}, y, held_out=size > 6e5)


@pytest.fixture(scope="module")
def points():
    return made()


@pytest.fixture(scope="module")
def law(points):
    return fits.fit(points, draws=300)


def test_the_held_out_rung_is_predicted_inside_its_interval(law, points):
    found = validate.held_out_test(law, points)
    assert len(found) == points.held_out_N.sum() and found.coverage >= 0.7 and found.rmsle < 0.01
    assert (found.decades_M > 0).all() and "beyond" in found.text()
    with pytest.raises(ValueError, match="other data"):
        validate.held_out_test(law, made(seed=1))


def test_projection_says_how_far_it_goes_and_refuses_to_go_too_far(law):
    found = validate.project(law, {"N": 4e6, "D": 4e6})
    assert "decades beyond the data" in found.text and found.low_M < found.value_M < found.high_M
    with pytest.raises(validate.TooFar, match="a law speaks for at most"):
        validate.project(law, {"N": 1e9, "D": 1e9})
    assert "forced" in validate.project(law, {"N": 1e9, "D": 1e9}, force=True).text
    refused = fits.fit(made(10), "additive", draws=200, force=True)
    with pytest.raises(validate.TooFar, match="not certified"):
        validate.project(refused, {"N": 1e6, "D": 1e6})


def test_a_projection_does_not_leave_the_range_of_the_metric():
    x = np.geomspace(1, 1e3, 12)
    law = fits.fit(Points.of({"x": x}, 0.5 - 0.06 * np.log(x) + 1e-4 * np.cos(x)), "log", draws=200)
    with pytest.raises(validate.TooFar, match="left the range"):
        validate.project(law, {"x": 2e4})


def test_rollout_never_sees_the_future_or_the_rung(points):
    found = validate.rollout(points, "D", "additive", validate.rollout_levels(points.x["D"], 5), draws=200)
    assert found.steps
    for _, count, prediction in found.steps:
        assert count + len(prediction) == len(points.fitted)
        assert prediction.rmsle < 0.05
    assert len(found.pooled()) == sum(len(step[2]) for step in found.steps)
    with pytest.raises(ValueError, match="axis: found 'width'"):
        validate.rollout(points, "width", "additive")


def test_sensitivity_refits_with_other_losses_and_without_the_ends(points, law):
    rows = validate.sensitivity(points, law).rows
    names = [name for name, _, _ in rows]
    assert "least absolute deviations" in names and "without the largest D" in names
    assert all(other is not None and abs(other.params["E"] / law.params["E"] - 1) < 0.1 for _, other, _ in rows)


def test_a_certified_null_far_behind_a_refused_form_is_no_law():
    rng = np.random.default_rng(3)
    size, idle = (np.exp(rng.uniform(np.log(1e3), np.log(1e6), 40)) for _ in range(2))
    points = Points.of({"N": size, "idle": idle}, (2 + 40 * size**-0.5) * np.exp(0.002 * rng.standard_normal(40)))
    found = fits.compare(points, ("additive", "log"), draws=200)
    if not found["additive"].certified:
        assert found.best is None and "far worse" in found.text
    assert found["log"].delta_aicc > fits.FAR_WORSE


def test_axes_that_move_as_one_are_refused():
    rng = np.random.default_rng(0)
    size, data = (np.exp(rng.uniform(5, 12, 40)) for _ in range(2))
    y = (2 + 3 * size**-0.4 + 5 * data**-0.3) * np.exp(0.002 * rng.standard_normal(40))
    law = fits.fit(Points.of({"N": size, "D": data, "C": 6 * size * data}, y), draws=200, force=True)
    assert any("move together" in reason for reason in law.reasons)


def test_a_metric_that_does_not_move_is_refused():
    law = fits.fit(Points.of({"x": np.geomspace(1, 100, 12)}, np.full(12, 3.0)), "pow_floor", draws=200, force=True)
    assert any("does not move" in reason for reason in law.reasons)


def test_a_law_file_gives_back_the_same_law(law, tmp_path):
    path = law_file.save_law(law, tmp_path / "deep" / "law.json")
    again = law_file.load_law(path)
    assert again.params == law.params and again.intervals == law.intervals and again.data_hash == law.data_hash
    np.testing.assert_array_equal(again.draws_SP, law.draws_SP)
    place = {"N": 3e6, "D": [1e5, 1e6]}
    for ours, theirs in zip(again.prediction(place), law.prediction(place), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    document = json.loads(path.read_text())
    assert {"form", "params", "covariance", "draws", "domain", "data_hash"} <= set(document)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 9},
        {"form": "cubic"},
        {"params": {"E": 1.0}},
        {"params": {"E": None, "A_N": 1, "A_D": 1, "alpha_N": 1, "alpha_D": 1}},
        {"draws": [[1.0]]},
        {"domain": None},
        {"certificate": []},
    ],
)
def test_a_damaged_law_file_is_named(law, tmp_path, change):
    path = law_file.save_law(law, tmp_path / "law.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="law"):
        law_file.load_law(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a law file"):
        law_file.load_law(path)


def test_infinite_numbers_become_null():
    assert law_file.without_nan({"a": math.nan, "b": [math.inf, 1.0]}) == {"a": None, "b": [None, 1.0]}
