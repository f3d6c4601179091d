"""A run against a known law: scores are those of the evaluation, and bounds are bounds."""

import functools

import numpy as np
import pytest

from recscale import known_law
from recscale.serve.trained import trained
from recscale.train import train
from tests.tiny_run import make_log, tiny, tiny_dreamrec

NEXT_ITEM = functools.partial(tiny, "sasrec")
LAW = np.random.default_rng(0).dirichlet(np.full(15, 0.3), size=40)


@pytest.mark.parametrize("make", [tiny_dreamrec, NEXT_ITEM])
def test_scores_are_those_that_the_evaluation_ranks_by(make, tmp_path):
    log = make_log(tmp_path / "log", users=60)
    book = train(make(log, train__epochs=0.5, eval__ks=(5,), eval__top_k=5), tmp_path / "run")
    run, state = trained(tmp_path / "run")
    scores_TV, items_VD = known_law.scores(run, state, "test")
    target_T = known_law.targets(run, "test")
    recorded = {row["metric"]: row["value"] for row in book["evaluations"] if row["slice"] == "all"}
    assert known_law.nats(scores_TV, target_T, 1.0) == pytest.approx(recorded["nats"], rel=1e-5)
    own_T1 = scores_TV[np.arange(len(target_T)), target_T][:, None]
    assert ((scores_TV > own_T1).sum(1) < 5).mean() == pytest.approx(recorded["hr@5"])
    assert (items_VD is None) == (make is NEXT_ITEM)
    if make is tiny_dreamrec:
        other_TV, _ = known_law.scores(known_law.changed(run, {"guidance": 0.0}), state, "test")
        assert np.abs(other_TV - scores_TV).max() > 0
        assert known_law.scores(known_law.changed(run, {"temperature": 2.0}), state, "test")[0] == pytest.approx(
            scores_TV / 2, rel=1e-5
        )


def test_the_law_itself_is_the_best_list_and_its_expectation_is_what_sampling_gives():
    best = known_law.expected(known_law.top(LAW), LAW)
    for seed in range(20):
        other = known_law.expected(known_law.top(np.random.default_rng(seed).normal(size=LAW.shape)), LAW)
        assert other["hr@10"] < best["hr@10"] and other["ndcg@10"] < best["ndcg@10"]
    rank_T = np.argsort(np.argsort(-LAW, axis=1), axis=1)
    by_hand = (LAW * (rank_T < 10) / np.log2(rank_T + 2)).sum(1).mean()
    assert best["ndcg@10"] == pytest.approx(by_hand)


def test_one_temperature_is_found_where_scores_are_logarithms_at_another_scale():
    rng = np.random.default_rng(1)
    target_T = np.array([rng.choice(15, p=p) for p in np.repeat(LAW, 50, axis=0)])
    scores_TV = 3.0 * np.log(np.repeat(LAW, 50, axis=0) + 1e-6)
    assert known_law.calibrated(scores_TV, target_T) == pytest.approx(1 / 3, rel=0.1)


def test_ceilings_are_what_an_exact_mean_and_an_exact_sample_reach():
    items_VD = np.random.default_rng(2).normal(size=(15, 4))
    found = known_law.ceilings(items_VD, LAW)
    rng, hits = np.random.default_rng(3), []
    for p_V in np.repeat(LAW, 300, axis=0):
        listed = np.argsort(-items_VD @ items_VD[rng.choice(15, p=p_V)])[:10]
        hits.append(p_V[listed].sum())
    assert found["exact sample"] == pytest.approx(np.mean(hits), abs=0.01)
    apart = known_law.ceilings(np.eye(15), LAW)  # no two items alike: the mean is the law
    assert apart["exact mean"] == pytest.approx(known_law.expected(known_law.top(LAW), LAW)["hr@10"])
