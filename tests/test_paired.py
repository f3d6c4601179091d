"""The paired bootstrap against resampling by hand, its intervals against known differences, its command."""

from pathlib import Path

import numpy as np
import pytest

from recscale import metrics, paired
from recscale import ranking_metrics as m
from recscale.user_statistics import mean_over_users, ratio_over_users


def make_run(seed: int = 0, noise: float = 0.3, n: int = 600, users: int = 50, draws: int = 0) -> dict[str, np.ndarray]:
    """What a ranking run writes; `draws` changes the predictions only."""
    rng, mine = np.random.default_rng(seed), np.random.default_rng(1000 + draws)
    user = np.sort(rng.integers(0, users, n))
    taste = rng.random(n)
    run = {"example": user, "row": np.arange(n) * 2, "user": 3 * user, "request": rng.integers(0, 3, n)}
    run |= {"label/is_click": (rng.random(n) < taste).astype(np.float32), "label/ratio": rng.gamma(1 + taste)}
    run |= {f"score/{head}": np.clip(taste + noise * mine.normal(size=n), 0, 1) for head in ("is_click", "ratio")}
    return run | {"nats": mine.gamma(2, 1, n), "rank": mine.integers(1, 30, n)}


def all_statistics(run: dict[str, np.ndarray]):
    user, users = paired.aligned(run, run)
    return paired.statistics_of(run, user, users, (10,)), users


def repeated(run: dict[str, np.ndarray], times_U: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of every user as often as it was drawn, each time as another user."""
    names, place = np.unique(run["user"], return_inverse=True)
    rows = [np.flatnonzero(place == u) for u in np.repeat(np.arange(len(names)), times_U)]
    out = {name: values[np.concatenate(rows)] for name, values in run.items()}
    return out | {"user": np.repeat(np.arange(len(rows)), [len(r) for r in rows])}


def test_weighted_users_are_users_written_down_that_often():
    run = make_run()
    found, users = all_statistics(run)
    times_RU = np.random.default_rng(5).poisson(1.0, (3, users))
    for times_U in times_RU:
        again, _ = all_statistics(repeated(run, times_U))
        for name, statistic in found.items():
            if name.startswith(("concordance", "calibration_error")):
                continue  # the first keeps no pairs of two draws, the second keeps its bins
            value = statistic.resampled(times_U[None].astype(float))[0]
            assert value == pytest.approx(again[name].cell()[0], rel=1e-9), name


def test_items_that_share_a_tuple_are_not_all_hit():
    """Three items on rank 1, the target one of them; against a run that ranks it third."""
    run = {"example": np.arange(4), "row": np.arange(4), "nats": np.ones(4), "rank": np.array([1, 1, 3, 9])}
    generated = run | {"rank": np.ones(4, int), "bucket": np.array([3, 3, 3, 1]), "tuple_rank": np.ones(4, int)}
    a, b = (paired.statistics_of(each, np.arange(4), 4, (1, 2)) for each in (run, generated))
    assert [a["hr@1"].cell()[0], b["hr@1"].cell()[0]] == pytest.approx([0.5, 0.5])
    assert b["hr@2"].cell()[0] == pytest.approx((3 * 2 / 3 + 1) / 4)
    assert b["ndcg@2"].cell()[0] == pytest.approx((1 + 1 / np.log2(3) + 1) / 4)
    assert {row.metric for row in paired.compare(a, b, 4, 10)} == {"nats", "hr@1", "hr@2", "ndcg@1", "ndcg@2"}


def test_draws_of_concordance_spread_like_those_of_auc():
    run = make_run(n=3000, users=300)
    data = m.scored(run["label/is_click"], run["score/is_click"], run["request"], run["user"])
    draws = paired.resampled({"auc": m.auc(data), "whole": m.concordance(data)}, data.users, 400)
    assert np.abs(draws["auc"] - draws["whole"]).max() < 0.1 * draws["auc"].std() + 1e-3
    assert draws["auc"].std() == pytest.approx(m.auc(data).cell()[1], rel=0.15)


def test_draws_are_multinomial_and_belong_to_the_seed():
    drawn = np.concatenate(list(paired.weights(40, 200, seed=3)))
    assert drawn.shape == (200, 40) and (drawn.sum(axis=1) == 40).all()
    assert drawn.var() == pytest.approx(1 - 1 / 40, rel=0.05)
    np.testing.assert_array_equal(drawn[:7], np.concatenate(list(paired.weights(40, 7, seed=3))))
    assert (drawn[0] != next(paired.weights(40, 1, seed=4))[0]).any()


def test_intervals_of_the_mean_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    values, user = rng.normal(size=(2, 4000)), np.repeat(np.arange(400), 10)
    a, b = (mean_over_users(v + 0.5 * rng.normal(size=400)[user], user, 400) for v in values)
    (row,) = paired.compare({"x": a}, {"x": b}, 400, resamples=2000)
    per_user = (b.sums_US - a.sums_US)[:, 0] / 10
    error = per_user.std(ddof=1) / 20
    assert row.difference == pytest.approx(per_user.mean()) and row.stderr == pytest.approx(error, rel=0.06)
    assert row.low == pytest.approx(row.difference - 1.96 * error, abs=0.2 * error)
    assert row.high == pytest.approx(row.difference + 1.96 * error, abs=0.2 * error)


def test_a_difference_is_seen_through_the_noise_that_both_runs_share():
    """Users differ a thousand times more than the runs do; the pairs know it."""
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(200), 3)
    level = 10 * rng.normal(size=200)[user]
    a, b = (mean_over_users(level + shift + 0.01 * rng.normal(size=600), user, 200) for shift in (0.0, -0.01))
    (row,) = paired.compare({"nats": a}, {"nats": b}, 200)
    assert row.high < 0 and row.below == 1.0 and row.stderr < 0.01 * a.cell()[1]
    (same,) = paired.compare({"nats": a}, {"nats": a}, 200)
    assert (same.difference, same.low, same.high, same.below) == (0, 0, 0, 0.5)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = []
    for seed in range(60):
        a, b = make_run(seed, draws=2 * seed), make_run(seed, draws=2 * seed + 1)  # equally good predictions
        (found, users), (other, _) = all_statistics(a), all_statistics(b)
        names = ("auc/is_click", "normalised_entropy/is_click", "concordance/ratio", "nats")
        rows = paired.compare({n: found[n] for n in names}, {n: other[n] for n in names}, users, resamples=200)
        held += [row.low <= 0 <= row.high for row in rows]
    assert 0.88 <= np.mean(held) <= 0.985


def test_resamples_without_a_class_are_counted():
    user = np.arange(6)
    data = m.scored(np.array([1.0, 0, 0, 0, 0, 0]), np.linspace(1, 0, 6), user, user)
    (row,) = paired.compare({"auc": m.auc(data)}, {"auc": m.auc(data)}, 6, resamples=300)
    assert row.undefined == pytest.approx(300 * (5 / 6) ** 6, rel=0.2) and row.difference == 0


def test_drift_is_the_slope_over_days_with_the_users_kept_together():
    rng = np.random.default_rng(2)
    user = np.arange(300)
    level = rng.normal(size=300)
    days = [mean_over_users(level + 0.05 * day + 0.02 * rng.normal(size=300), user, 300) for day in range(5)]
    slope, low, high = paired.drift(days, 300)
    assert low < slope < high and slope == pytest.approx(0.05, abs=0.005)
    assert high - low < 0.005  # the level of a user is no drift
    empty = ratio_over_users(np.zeros(300), np.zeros(300), user, 300)
    assert paired.drift([*days, empty], 300) == (slope, low, high)
    with pytest.raises(ValueError, match="1 of 2 days"):
        paired.drift([days[0], empty], 300)


def test_item_metrics_are_those_of_the_evaluation():
    run = make_run()
    found, _ = all_statistics(run)
    assert found["hr@10"].cell()[0] == pytest.approx(metrics.hit_rate(run["rank"], 10).mean())
    assert found["nats"].cell()[::2] == (pytest.approx(run["nats"].mean()), 600)
    hits = np.random.default_rng(0).random((50, 10)) < 0.2
    window = {"example": np.arange(50), "row": np.arange(50), "hits": hits, "num_targets": np.full(50, 4)}
    sets, _ = all_statistics(window)
    want = metrics.ndcg_ratio_of_means(hits, window["num_targets"], 10)
    np.testing.assert_allclose(sets["ndcg_ratio_of_means@10"].cell(), want, rtol=1e-6)
    np.testing.assert_allclose(sets["recall@10"].cell()[0], metrics.recall(hits, window["num_targets"], 10).mean())


def test_the_kind_of_a_head_is_read_off_its_arrays():
    run = make_run()
    found, _ = all_statistics(run | {"score/is_click": 10 * run["score/is_click"] - 5})
    assert "log_loss/is_click" not in found and "mse/ratio" in found
    value = all_statistics(run)[0]["auc/is_click"].cell()[0]
    assert found["concordance/is_click"].cell()[0] == pytest.approx(value, abs=1e-12)


def write(folder: Path, run: dict[str, np.ndarray], split: str = "test") -> Path:
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"per_target_{split}.npz", allow_pickle=False, **run)
    return folder


def test_command_prints_a_row_per_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = write(tmp_path / "a", make_run()), write(tmp_path / "b", make_run(noise=0.0))
    paired.main([str(a), str(b), "--resamples=50"])
    text = capsys.readouterr().out
    assert "50 users drawn 50 times" in text and "concordance/ratio" in text
    (line,) = [line.split() for line in text.splitlines() if line.startswith("auc/is_click")]
    assert float(line[3]) > 0 and float(line[3]) == pytest.approx(float(line[2]) - float(line[1]), abs=2e-6)
    paired.main([str(a), str(b), "--resamples=50", "--json"])
    assert '"metric": "auc/is_click"' in capsys.readouterr().out


def test_only_rows_of_both_runs_are_compared_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run()
    part = {name: values[np.random.default_rng(0).permutation(600)[:500]] for name, values in run.items()}
    a, b = write(tmp_path / "a", run), write(tmp_path / "b", part)
    paired.main([str(a), str(b), "--resamples=20", "--common"])
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("nats")]
    assert float(line[3]) == 0 and line[-1] == "500"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": np.arange(600)}, "599 of 600 differ in 'row', the first at 1: 2 and 1"),
        ({"label/is_click": np.zeros(600, np.float32)}, "differ in 'label/is_click'"),
        ({name: values[:10] for name, values in make_run().items()}, "600 and 10 in 'example'; .*--common"),
        ({"score/ratio": None}, "head 'ratio': the file has its labels but no array 'score/ratio'"),
        ({"score/is_click": np.full(600, np.nan)}, "head 'is_click': .* 600 of 600 values of score are not finite"),
        ({"row": None}, "without the array 'row'"),
    ],
)
def test_runs_that_do_not_fit_give_one_line(tmp_path: Path, change: dict, message: str):
    other = {name: values for name, values in (make_run() | change).items() if values is not None}
    a, b = write(tmp_path / "a", make_run()), write(tmp_path / "b", other)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as stopped:
        paired.main([str(a), str(b), "--resamples=20"])
    assert "\n" not in str(stopped.value)


def test_missing_and_damaged_files_give_one_line(tmp_path: Path):
    a = write(tmp_path / "a", make_run())
    with pytest.raises(SystemExit, match=r"per_target_val.npz: no such file; .* \['test'\]"):
        paired.main([str(a), str(a), "--split=val"])
    (a / "per_target_val.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(SystemExit, match=r"per_target_val.npz: not a readable .npz file"):
        paired.main([str(a), str(a), "--split=val"])
    with pytest.raises(SystemExit, match="--resamples=1"):
        paired.main([str(a), str(a), "--resamples=1"])
    only = {name: write(tmp_path / name, {"example": np.arange(3), "row": np.arange(3)} | more)
            for name, more in (("x", {"nats": np.ones(3)}), ("y", {"rank": np.ones(3, int)}))}  # fmt: skip
    with pytest.raises(SystemExit, match="no metric in common"):
        paired.main([str(only["x"]), str(only["y"])])
