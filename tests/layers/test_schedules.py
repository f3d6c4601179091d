"""Schedules against the golden tables, in float64 and with the rounding of the float32 reference."""

import numpy as np
import pytest

from recscale.layers.schedules import SCHEDULES, chain_table

# beta, abar, c1, sigma2 (float64: and c2) at t = 0, 1, T / 2, T - 1.
FLOAT32 = {
    ("linear", 500): (
        (1e-4, 0.9999, 0.999834, 0),
        (0.00013988, 0.99976, 0.583025, 5.83151e-5),
        (0.0100699, 0.277859, 0.00738779, 0.0100305),
        (0.02, 0.00635271, 0.00162056, 0.0199974),
    ),
    ("linear", 2000): (
        (1e-4, 0.9999, 0.999834, 0),
        (0.000109955, 0.99979, 0.523601, 5.23714e-5),
        (0.010055, 0.00609859, 0.000794049, 0.0100544),
        (0.02, 1.62885e-9, 8.15375e-7, 0.02),
    ),
    ("cosine", 500): (
        (1e-4, 0.9999, 0.999834, 0),
        (0.000106812, 0.999793, 0.516401, 5.16512e-5),
        (0.00631124, 0.490721, 0.00870864, 0.00627261),
        (0.9999, 9.71594e-10, 0.00311647, 0.99989),
    ),
    ("cosine", 2000): (
        (1e-4, 0.9999, 0.999834, 0),
        (1e-4, 0.9998, 0.499892, 5e-5),
        (0.00157809, 0.491749, 0.00217906, 0.00157568),
        (0.9999, 6.0577e-11, 0.00077817, 0.999899),
    ),
    ("exp", 500): (
        (0.000219762, 0.99978, 1, 0),
        (0.000259459, 0.999521, 0.541426, 0.000118998),
        (0.0100884, 0.272502, 0.00727573, 0.0100499),
        (0.0198207, 0.0063462, 0.00160505, 0.0198182),
    ),
    ("sqrt", 500): (
        (0.0361876, 0.963812, 1, 0),
        (0.0190798, 0.945423, 0.343211, 0.012651),
        (0.00482429, 0.294353, 0.00371818, 0.00481454),
        (0.999, 9.6004e-7, 0.0309538, 0.998042),
    ),
}
FLOAT64 = {
    ("linear", 500): (
        (1e-4, 0.9999, 1, 0, 0),
        (0.00013988, 0.99976, 0.583129, 5.83158e-5, 0.416871),
        (0.0100699, 0.277859, 0.00738779, 0.0100305, 0.991058),
        (0.02, 0.00635271, 0.00162056, 0.0199974, 0.98982),
    ),
    ("linear", 2000): (
        (1e-4, 0.9999, 1, 0, 0),
        (0.000109955, 0.99979, 0.523709, 5.23735e-5, 0.476291),
        (0.010055, 0.00609859, 0.000794048, 0.0100544, 0.994898),
        (0.02, 1.62885e-9, 8.15374e-7, 0.02, 0.989949),
    ),
    ("cosine", 500): (
        (1e-4, 0.9999, 1, 0, 0),
        (0.000106854, 0.999793, 0.516568, 5.16594e-5, 0.483432),
        (0.00631123, 0.490721, 0.00870863, 0.00627261, 0.990739),
        (0.9999, 9.71492e-10, 0.00311657, 0.99989, 0.0099999),
    ),
    ("cosine", 2000): (
        (1e-4, 0.9999, 1, 0, 0),
        (1e-4, 0.9998, 0.5, 5.00025e-5, 0.5),
        (0.00157786, 0.491749, 0.00217874, 0.00157545, 0.997683),
        (0.9999, 6.05573e-11, 0.000778108, 0.999899, 0.00999999),
    ),
    ("exp", 500): (
        (0.000219776, 0.99978, 1, 0, 0),
        (0.000259446, 0.999521, 0.541395, 0.000118999, 0.458605),
        (0.0100884, 0.272502, 0.00727574, 0.0100499, 0.991145),
        (0.0198207, 0.00634619, 0.00160505, 0.0198182, 0.989912),
    ),
    ("sqrt", 500): (
        (0.0361876, 0.963812, 1, 0, 0),
        (0.0190798, 0.945423, 0.343211, 0.012651, 0.6567),
        (0.00482429, 0.294353, 0.00371818, 0.00481454, 0.995568),
        (0.999, 9.60052e-7, 0.0309538, 0.998042, 0.0315924),
    ),
}
C2_FLOAT32 = {  # at t = 0, 1, T / 2, T - 1
    ("linear", 500): (0, 0.416865, 0.991058, 0.989820),
    ("cosine", 2000): (0, 0.499975, 0.997683, 0.0100008),
    ("exp", 500): (0, 0.458580, 0.991145, 0.989912),
}


def rows(table, T: int) -> np.ndarray:
    at = [0, 1, T // 2, T - 1]
    return np.stack([table.beta[at], table.abar[at], table.c1[at], table.sigma2[at], table.c2[at]], axis=1)


@pytest.mark.parametrize(("schedule", "T"), FLOAT64)
def test_float64_schedule(schedule: str, T: int):
    found = rows(chain_table(schedule, T), T)
    # The golden numbers are printed to six digits; c1 and c2 at t = 0 are 1 and 0 exactly.
    np.testing.assert_allclose(found, FLOAT64[schedule, T], rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize(("schedule", "T"), FLOAT32)
def test_float32_schedule(schedule: str, T: int):
    table = chain_table(schedule, T, np.float32)
    assert all(column.dtype == np.float32 for column in table)
    np.testing.assert_allclose(rows(table, T)[:, :4], FLOAT32[schedule, T], rtol=5e-4)
    if (schedule, T) in C2_FLOAT32:
        np.testing.assert_allclose(rows(table, T)[:, 4], C2_FLOAT32[schedule, T], rtol=5e-4)
    if schedule == "linear":  # the cancellation itself is reproduced
        np.testing.assert_allclose(table.c1[0], 0.999834, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 100, 1000])
def test_the_posterior_mean_of_a_clean_path_is_the_clean_path(schedule: str, T: int):
    table = chain_table(schedule, T)
    before = np.append(1.0, table.abar[:-1])
    np.testing.assert_allclose(table.c1 + table.c2 * np.sqrt(table.abar), np.sqrt(before), rtol=1e-12)
    assert ((table.beta > 0) & (table.beta < 1)).all() and table.sigma2[0] == 0
