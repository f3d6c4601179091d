"""Each metric against a plain loop and against known numbers."""

import math

import numpy as np
import pytest

from recscale import metrics


def test_single_target_ndcg_has_the_known_values():
    got = metrics.ndcg(np.array([1, 2, 3, 10, 11]), 10)
    np.testing.assert_allclose(got, [1, 0.6309297536, 0.5, 0.2890648263, 0], atol=1e-10)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_rank_metrics_equal_plain_loops(k: int):
    ranks = np.random.default_rng(0).integers(1, 20, 200)
    assert metrics.hit_rate(ranks, k).tolist() == [1.0 if r <= k else 0.0 for r in ranks]
    np.testing.assert_allclose(
        metrics.ndcg(ranks, k), [1 / math.log2(r + 1) if r <= k else 0.0 for r in ranks], rtol=1e-14
    )
    np.testing.assert_allclose(metrics.reciprocal_rank(ranks), [1 / r for r in ranks], rtol=1e-14)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_items_that_share_a_place_get_the_mean_over_its_ranks(k: int):
    rng = np.random.default_rng(1)
    ranks, buckets = rng.integers(1, 15, 200), rng.integers(1, 6, 200)
    places = [np.arange(r, r + b) for r, b in zip(ranks, buckets, strict=True)]
    for name, shared in metrics.SHARED_METRICS.items():
        plain = metrics.METRICS[name]
        np.testing.assert_allclose(shared(ranks, buckets, k), [plain(each, k).mean() for each in places], rtol=1e-12)
        np.testing.assert_allclose(shared(ranks, np.ones(200, int), k), plain(ranks, k), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.array([1, 0]), np.array([1.0, 2.0])])
def test_what_is_not_a_rank_is_refused(bad: np.ndarray):
    with pytest.raises(ValueError, match="ranks are integers from 1"):
        metrics.hit_rate(bad, 10)


def test_coverage_counts_distinct_items_and_no_padding():
    top = np.array([[1, 2, 9], [2, 1, 0]])
    assert metrics.coverage(top, 10, 2) == 0.2
    assert metrics.coverage(top, 10, 3) == 0.3
    with pytest.raises(ValueError, match="top_k >= 4"):
        metrics.coverage(top, 10, 4)


def test_mean_and_standard_error_leave_nan_out():
    mean, stderr, n = metrics.mean_and_stderr(np.array([1.0, np.nan, 2.0, 6.0]))
    assert (mean, n) == (3.0, 3)
    assert stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert np.isnan(metrics.mean_and_stderr(np.array([np.nan]))[:2]).all()
    assert metrics.mean_and_stderr(np.array([2.0]))[0] == 2.0


# Two users: list 7, 1, 2 with targets 1, 1, 5 and list 3, 4, 6 with target 4.
TOP = np.array([[7, 1, 2], [3, 4, 6]])
TARGET_USER, TARGET_ITEM, NUM_TARGETS = np.array([0, 0, 0, 1]), np.array([1, 1, 5, 4]), np.array([3, 1])


def test_three_versions_of_ndcg_and_recall_have_the_known_values():
    hits = metrics.hits_in_lists(TOP, TARGET_USER, TARGET_ITEM, num_items=9)
    assert hits.tolist() == [[False, True, False], [False, True, False]]
    np.testing.assert_allclose(metrics.dcg(hits, 3), [0.6309297536] * 2, atol=1e-10)
    np.testing.assert_allclose(metrics.ideal_dcg(NUM_TARGETS, 3), [2.1309297536, 1], atol=1e-10)
    assert metrics.ndcg_ratio_of_means(hits, NUM_TARGETS, 3)[0] == pytest.approx(0.4030302838, abs=1e-10)
    assert metrics.ndcg_mean_of_ratios(hits, NUM_TARGETS, 3).mean() == pytest.approx(0.4635058323, abs=1e-10)
    assert metrics.ndcg_over_hits(hits, NUM_TARGETS, 3).tolist() == [1.0, 1.0]
    for k in (2, 3):
        np.testing.assert_allclose(metrics.recall(hits, NUM_TARGETS, k), [1 / 3, 1])
    assert metrics.recall_capped(hits, NUM_TARGETS, 2).mean() == 0.75
    assert metrics.precision(hits, NUM_TARGETS, 2).tolist() == [0.5, 0.5]


def test_set_metrics_equal_plain_loops():
    rng = np.random.default_rng(1)
    top = np.stack([rng.permutation(30)[:8] + 1 for _ in range(60)])
    targets = [rng.integers(1, 31, rng.integers(0, 12)) for _ in range(60)]
    count = np.array([len(t) for t in targets])
    hits = metrics.hits_in_lists(top, np.repeat(np.arange(60), count), np.concatenate(targets), num_items=30)
    for k in (1, 3, 8):
        want = {name: [] for name in metrics.SET_METRICS}
        sums = [0.0, 0.0]
        for listed, wanted in zip(top, targets, strict=True):
            gains = [1 / math.log2(i + 2) for i, item in enumerate(listed[:k]) if item in wanted]
            ideal = sum(1 / math.log2(i + 2) for i in range(min(k, len(wanted))))
            sums = [sums[0] + sum(gains), sums[1] + ideal]
            want["ndcg_mean_of_ratios"].append(sum(gains) / ideal if len(wanted) else 0.0)
            want["ndcg_over_hits"].append(float(len(gains) > 0))
            want["recall"].append(len(gains) / len(wanted) if len(wanted) else 0.0)
            want["recall_capped"].append(len(gains) / min(len(wanted), k) if len(wanted) else 0.0)
            want["precision"].append(len(gains) / k)
        for name, function in metrics.SET_METRICS.items():
            np.testing.assert_allclose(function(hits, count, k), want[name], rtol=1e-12, err_msg=name)
        assert metrics.ndcg_ratio_of_means(hits, count, k)[0] == pytest.approx(sums[0] / sums[1])


def test_standard_error_of_a_ratio_matches_resampling():
    rng = np.random.default_rng(2)
    denominator = 1 + 4 * rng.random(400)
    numerator = denominator * (0.5 + 0.1 * rng.random(400))  # the ratio varies far less than its two parts
    _, stderr, n = metrics.ratio_and_stderr(numerator, denominator)
    draws = rng.integers(0, 400, (4000, 400))
    spread = (numerator[draws].sum(axis=1) / denominator[draws].sum(axis=1)).std()
    assert n == 400 and stderr == pytest.approx(spread, rel=0.1)


def test_short_lists_are_refused():
    with pytest.raises(ValueError, match="top_k >= 5"):
        metrics.recall(np.zeros((2, 3), bool), np.ones(2, int), 5)


def test_summary_names_protocols_apart():
    arrays = {"nats": np.array([1.0, 3.0]), "rank": np.array([1, 4]), "rank_unseen": np.array([1, 2])}
    cells = metrics.summarise(arrays, {"full": np.array([[1], [1]])}, num_items=4, ks=(1, 2))
    assert cells["nats"][:1] == (2.0,)
    assert cells["hr@2"][0] == 0.5 and cells["hr@2/unseen"][0] == 1.0
    assert cells["coverage@1"][0] == 0.25
    assert "coverage@2" not in cells and "coverage@1/unseen" not in cells
    assert cells["mrr"][0] == 0.625 and cells["mrr/unseen"][0] == 0.75
    nothing = metrics.summarise({name: array[:0] for name, array in arrays.items()}, {}, num_items=4, ks=(1,))
    assert all(np.isnan(value) and n == 0 for value, _, n in nothing.values())
