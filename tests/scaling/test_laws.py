"""Runs become points with the right noise, and each axis its law, gain and cost."""

import dataclasses

import numpy as np
import pytest

from recscale.scaling import collect, laws
from tests.scaling import synthetic_study as study


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return collect.collect(study.write_study(tmp_path_factory.mktemp("study"))).rows


def test_planted_floor_and_gain_lie_inside_their_intervals(rows):
    law = laws.axis_law(rows, study.SPECS[0], draws=500)
    assert law.power.certified and law.quoted == "pow_floor"
    assert law.power.intervals["E"][0] <= study.FLOOR <= law.power.intervals["E"][1]
    gain = 9.0 * (64000**-0.45 - 128000**-0.45)
    assert law.gain.low <= gain <= law.gain.high
    assert "inside" in law.floor_sentence()
    elsewhere = dataclasses.replace(law, spec=dataclasses.replace(law.spec, floor=2.5))
    assert "outside" in elsewhere.floor_sentence()


def test_axis_without_effect_is_flat_and_has_no_identified_floor(rows):
    law = laws.axis_law(rows, study.SPECS[3], draws=500)
    assert law.gain.flat
    assert "not identified" in law.floor_sentence()


def test_replicates_are_averaged_and_weigh_more(rows):
    law = laws.axis_law(rows, study.SPECS[0], draws=500)
    noise = laws.seed_noise(rows, study.SPECS[0].evaluation)
    base = [row["eval.test.all.nats"] for row in rows if row["cell.name"] == "base"]
    here = int(np.flatnonzero(law.x_N == 8000)[0])
    assert law.seeds_N[here] == 5 and law.y_N[here] == pytest.approx(np.mean(base))
    assert noise.dof == 4 and noise.sd == pytest.approx(np.std(base, ddof=1))
    assert law.sigma_N is not None
    np.testing.assert_allclose(law.sigma_N, noise.sd / np.sqrt(law.seeds_N))
    assert law.noise_source == "seed replicates"


def test_unpaired_cells_carry_the_evaluation_error_too(rows):
    spec = dataclasses.replace(study.SPECS[0], paired=False)
    law = laws.axis_law(rows, spec, draws=500)
    noise = laws.seed_noise(rows, spec.evaluation)
    assert law.sigma_N is not None
    np.testing.assert_allclose(law.sigma_N, np.sqrt(noise.sd**2 / law.seeds_N + 0.008**2))


def test_without_replicates_the_residuals_speak(rows):
    single = [row for row in rows if row["seed"] == 0]
    law = laws.axis_law(single, study.SPECS[0], draws=500)
    assert law.sigma_N is None and "residuals" in law.noise_source
    assert law.power.certificate.minimum and law.power.reasons == ("7 points for 3 parameters, needs 9",)


def test_cost_of_the_next_doubling_follows_the_slope_of_the_cost(rows):
    users, table = (laws.axis_law(rows, spec, draws=500).cost for spec in study.SPECS[:2])
    assert users is not None and table is not None
    assert users.extra == pytest.approx(users.now) and users.factor == pytest.approx(2.0)
    assert table.now == 8192 * 16 * 4 and table.unit == "table bytes"


def test_too_few_distinct_x_and_unusable_runs_are_said(rows):
    few = [row for row in rows if row["cell.coordinates.users"] in (4000, 8000)]
    law = laws.axis_law(few, study.SPECS[0])
    assert not law.fits and law.problem.startswith("2 distinct values")
    law = laws.axis_law(rows, dataclasses.replace(study.SPECS[0], x="cell.coordinates.absent"))
    assert law.problem.startswith("0 distinct") and len(law.unusable) == 11
    law = laws.axis_law(rows, dataclasses.replace(study.SPECS[0], metric="absent"))
    assert "eval.test.all.absent" in law.unusable[0][1]
