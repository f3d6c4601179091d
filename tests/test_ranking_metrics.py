"""Every metric of predicted feedback against a loop over all pairs, hand-worked numbers and scikit-learn."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from recscale import ranking_metrics as m
from recscale.agreement import agreements, dominated, mean_discount, sizes

Rows = dict[str, np.ndarray]


def make_rows(n: int = 300, graded: bool = False, seed: int = 0, users: int = 20) -> Rows:
    """Rows in random order with many ties of label and score; request numbers are used again by other users."""
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 12, n) / 12
    label = rng.integers(0, 4, n) / 2 if graded else (rng.random(n) < 0.2 + 0.6 * score).astype(float)
    return {"label": label, "score": score, "request": rng.integers(0, 6, n), "user": rng.integers(0, users, n) * 7}


def share_of_pairs(rows: Rows, together: Callable[[int, int], bool]) -> tuple[float, int]:
    """(agreeing pairs, pairs) by a loop over all pairs with different labels for which `together` holds."""
    label, score = rows["label"], rows["score"]
    agree, pairs = 0.0, 0
    for i, j in itertools.combinations(range(len(label)), 2):
        if label[i] == label[j] or not together(i, j):
            continue
        pairs += 1
        agree += 0.5 if score[i] == score[j] else float((score[i] > score[j]) == (label[i] > label[j]))
    return agree, pairs


def groups(rows: Rows, *names: str) -> list[Rows]:
    keys = list(zip(*(rows[name].tolist() for name in names), strict=True))
    return [
        {name: values[[k == key for k in keys]] for name, values in rows.items()} for key in dict.fromkeys(sorted(keys))
    ]


def everybody(i: int, j: int) -> bool:
    return True


def own(rows: Rows) -> tuple[float, int]:
    return share_of_pairs(rows, everybody)


@pytest.mark.parametrize("graded", [False, True])
def test_pair_accuracy_equals_a_loop_over_pairs(graded: bool):
    rows = make_rows(graded=graded)
    user, request = rows["user"], rows["request"]
    agree, pairs = share_of_pairs(rows, lambda i, j: bool(user[i] == user[j] and request[i] == request[j]))
    data = m.scored(**rows)
    value, _, n = m.pair_accuracy(data).cell()
    assert (value, n) == (pytest.approx(agree / pairs, abs=1e-14), pairs)
    shares = [a / p for a, p in map(own, groups(rows, "user", "request")) if p]
    value, _, n = m.pair_accuracy_per_request(data).cell()
    assert (value, n) == (pytest.approx(np.mean(shares), abs=1e-14), len(shares))
    assert n < len(groups(rows, "user", "request"))  # some requests have no pair


@pytest.mark.parametrize("graded", [False, True])
def test_pairs_of_everybody_are_auc_and_concordance(graded: bool):
    rows = make_rows(graded=graded)
    agree, pairs = own(rows)
    assert m.concordance(m.scored(**rows)).cell()[0] == pytest.approx(agree / pairs, abs=1e-14)
    if not graded:
        area, whole = m.auc(m.scored(**rows)).cell(), m.concordance(m.scored(**rows)).cell()
        assert area[0] == pytest.approx(agree / pairs, abs=1e-14)
        assert area[1] == pytest.approx(whole[1], rel=1e-7)  # the same error by two ways


def test_gauc_weighs_users_by_impressions_and_counts_those_left_out():
    rows = make_rows(n=150, users=40)
    total, weight, left = 0.0, 0, 0
    members = groups(rows, "user")
    for one in members:
        agree, pairs = own(one)
        left += pairs == 0
        if pairs:
            total, weight = total + len(one["label"]) * agree / pairs, weight + len(one["label"])
    data = m.scored(**rows)
    assert left > 0
    assert m.gauc(data).cell()[::2] == (pytest.approx(total / weight, abs=1e-14), len(members) - left)
    assert m.gauc_users_left_out(data).cell()[::2] == (pytest.approx(left / len(members)), len(members))


def test_hand_worked_request():
    """Labels 2, 1, 0, 0 with scores .3, .9, .3, .1: pairs (2,1) wrong, (2,0) tied, (2,0) right, (1,0) right twice."""
    cells = m.summarise("regression", *(np.array(x) for x in ([2, 1, 0, 0], [0.3, 0.9, 0.3, 0.1], [0] * 4, [5] * 4)))
    assert cells["pair_accuracy"][0] == pytest.approx(3.5 / 5)
    tied = (1 / math.log2(3) + 1 / math.log2(4)) / 2  # places 2 and 3
    ideal = 2 + 1 / math.log2(3)
    assert cells["ndcg_in_request"][::2] == (pytest.approx((1 + 2 * tied) / ideal), 1)
    assert cells["mse"][0] == pytest.approx((1.7**2 + 0.1**2 + 0.3**2 + 0.1**2) / 4)
    assert cells["calibration_ratio"][0] == pytest.approx(1.6 / 3)
    assert math.isnan(cells["mse"][1])  # one user


@pytest.mark.parametrize("k", [None, 2])
def test_ndcg_of_tied_rows_is_the_mean_over_their_orders(k: int | None):
    rows = make_rows(n=60, graded=True, users=3)
    values = []
    for one in groups(rows, "user", "request"):
        label, score = one["label"], one["score"]
        if len(set(label)) < 2:
            continue
        best = sorted(label, reverse=True)
        gains = [
            dcg([label[i] for i in order], k)
            for order in itertools.permutations(range(len(label)))
            if all(score[a] >= score[b] for a, b in itertools.pairwise(order))
        ]
        values.append(np.mean(gains) / dcg(best, k))
    assert m.ndcg(m.scored(**rows), k).cell()[::2] == (pytest.approx(np.mean(values)), len(values))


def dcg(gains: list[float], k: int | None) -> float:
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:k]))


def test_entropy_calibration_and_clipping_are_those_of_plain_loops():
    rows = make_rows()
    label, score = rows["label"], rows["score"]
    chance = [min(max(s, m.EPS), 1 - m.EPS) for s in score]
    assert 0 in score  # so that clipping matters
    loss = np.mean([-math.log(p if y else 1 - p) for y, p in zip(label, chance, strict=True)])
    data = m.scored(**rows)
    assert m.log_loss(data).cell()[0] == pytest.approx(loss, rel=1e-12)
    rate = label.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert m.normalised_entropy(data).cell()[0] == pytest.approx(loss / entropy, rel=1e-12)
    other = -(rate * math.log(0.3) + (1 - rate) * math.log(0.7))
    assert m.normalised_entropy(m.scored(**rows, base_rate=0.3)).cell()[0] == pytest.approx(loss / other, rel=1e-12)
    assert m.calibration_ratio(data).cell()[0] == pytest.approx(score.sum() / label.sum())


def test_a_constant_prediction_of_the_base_rate_has_normalised_entropy_one():
    rows = make_rows()
    constant = np.full(len(rows["label"]), rows["label"].mean())
    cells = m.summarise("binary", rows["label"], constant, rows["request"], rows["user"])
    assert cells["normalised_entropy"][0] == pytest.approx(1, abs=1e-12)
    assert cells["auc"][0] == cells["gauc"][0] == cells["pair_accuracy"][0] == 0.5
    assert cells["calibration_error"][0] == pytest.approx(0, abs=1e-12)


def test_calibration_bins_hold_equally_many_rows():
    rng = np.random.default_rng(3)
    score = rng.permutation(np.arange(1, 101) / 101)
    label = (rng.random(100) < score**2).astype(float)
    data = m.scored(label, score, np.arange(100), np.arange(100) % 30)
    curve = m.calibration_curve(data, bins=5)
    order = np.argsort(score)
    parts = [order[20 * b : 20 * b + 20] for b in range(5)]
    assert curve["count"].tolist() == [20] * 5
    np.testing.assert_allclose(curve["predicted"], [score[p].mean() for p in parts])
    np.testing.assert_allclose(curve["observed"], [label[p].mean() for p in parts])
    error = np.mean([abs(score[p].mean() - label[p].mean()) for p in parts])
    assert m.calibration_error(data, bins=5).cell()[0] == pytest.approx(error)
    tied = np.concatenate([np.arange(45), np.full(50, 60), np.arange(90, 95)]) / 100
    curve = m.calibration_curve(m.scored(label, tied, np.arange(100), np.arange(100) % 30), bins=2)
    assert curve["count"].tolist() == [45, 55]  # equal scores stay together, where their middle is


RANKING = ("auc", "gauc", "concordance", "pair_accuracy", "pair_accuracy_per_request", "ndcg_in_request")


@pytest.mark.parametrize("kind", list(m.HEADS))
def test_nothing_depends_on_the_order_of_rows_or_the_numbers_of_requests(kind: str):
    rows = make_rows(graded=kind != "binary")
    want = m.summarise(kind, **rows)
    mixed = np.random.default_rng(1).permutation(len(rows["label"]))
    other = {name: values[mixed] for name, values in rows.items()}
    other["request"] = 1000 - 13 * other["request"]
    for name, cell in m.summarise(kind, **other).items():
        np.testing.assert_allclose(cell, want[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("kind", list(m.HEADS))
@pytest.mark.parametrize("change", [lambda s: s + 3.0, lambda s: np.exp(4 * s), lambda s: s**3 - 100])
def test_ranking_metrics_do_not_change_under_a_growing_map(kind: str, change):
    rows = make_rows(graded=kind != "binary")
    data, moved = m.scored(**rows), m.scored(**rows | {"score": change(rows["score"])})
    for name in (name for name in RANKING if name in m.HEADS[kind]):
        assert m.METRICS[name](moved).cell() == m.METRICS[name](data).cell(), name


def test_scikit_learn_agrees():
    sk = pytest.importorskip("sklearn.metrics", reason="the oracle of this test")
    rows = make_rows(n=2000)
    rows["score"] = np.clip(rows["score"], 0.01, 0.99)
    cells, label, score = m.summarise("binary", **rows), rows["label"], rows["score"]
    assert cells["auc"][0] == pytest.approx(sk.roc_auc_score(label, score), abs=1e-12)
    assert cells["log_loss"][0] == pytest.approx(sk.log_loss(label, score), rel=1e-12)
    graded = make_rows(n=400, graded=True)
    mixed = [one for one in groups(graded, "user", "request") if len(set(one["label"])) > 1]
    want = np.mean([sk.ndcg_score(one["label"][None], one["score"][None]) for one in mixed])
    assert m.ndcg(m.scored(**graded)).cell()[0] == pytest.approx(want, rel=1e-12)
    assert m.mse(m.scored(**graded)).cell()[0] == pytest.approx(sk.mean_squared_error(graded["label"], graded["score"]))


@pytest.mark.parametrize("kind", list(m.HEADS))
def test_standard_errors_are_the_spread_over_new_users(kind: str):
    """Rows of one user share a bent towards label 1 and towards high scores: rows alone would say far too little."""
    values: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        user = np.repeat(np.arange(60), rng.integers(5, 25, 60))
        bent, taste = rng.normal(0, 1, 60)[user], rng.normal(0, 1, 60)[user]
        score = 1 / (1 + np.exp(-rng.normal(0, 1, len(user)) - bent - taste))
        label = (rng.random(len(user)) < 1 / (1 + np.exp(-bent - rng.normal(0, 0.5, len(user))))).astype(float)
        label = label if kind == "binary" else label + rng.integers(0, 3, len(user)) * score
        for name, cell in m.summarise(kind, label, score, rng.integers(0, 3, len(user)), user).items():
            values.setdefault(name, []).append(cell[0])
            errors.setdefault(name, []).append(cell[1])
    for name in values:
        assert np.mean(errors[name]) == pytest.approx(np.std(values[name], ddof=1), rel=0.25), name


def test_answers_read_between_the_rows_of_a_user_push_gauc_below_a_half():
    """Labels without any order in time: the running rate knows the user (AUC), yet it loses inside every user."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(400), 12)
    label = (rng.random(len(user)) < rng.beta(1, 2, 400)[user]).astype(float)
    before = np.cumsum(label.reshape(400, 12), axis=1) - label.reshape(400, 12)
    running = (before + 0.5) / (np.arange(12) + 1.5)[None]
    rows = np.arange(len(user))
    cells = m.summarise("binary", label, running.ravel(), rows, user)
    assert cells["auc"][0] > 0.65 and cells["gauc"][0] < 0.4
    frozen = m.summarise("binary", label, np.repeat(running[:, 6], 12), rows, user)
    assert frozen["auc"][0] > 0.65 and frozen["gauc"][0] == 0.5


def test_counts_inside_groups_equal_loops():
    rng = np.random.default_rng(4)
    first, second, group = (rng.integers(0, high, 120) for high in (6, 9, 4))
    want = [
        sum(first[j] < first[i] and second[j] < second[i] and group[j] == group[i] for j in range(120))
        for i in range(120)
    ]
    assert dominated(first, second, group).tolist() == want
    assert sizes(first, group).tolist() == [
        int(((first == f) & (group == g)).sum()) for f, g in zip(first, group, strict=True)
    ]
    agree, pairs = agreements(first.astype(float), second.astype(float), group)
    assert pairs.sum() % 2 == 0 and (agree <= pairs).all()
    assert mean_discount(np.zeros(3, int), np.array([1.0, 5.0, 3.0])).tolist() == [0.5, 1.0, 1 / math.log2(3)]


def test_many_rows_are_counted_right():
    """A known number of inversions over more rows than a loop could do."""
    n = 50_000
    label = np.arange(n, dtype=float)
    score = np.concatenate([label[n // 2 :], label[: n // 2]])  # the halves change places
    value = m.concordance(m.scored(label, score, np.zeros(n, int), np.arange(n))).cell()[0]
    assert value == pytest.approx(1 - (n / 2) ** 2 / (n * (n - 1) / 2), abs=1e-12)


@pytest.mark.parametrize("kind", list(m.HEADS))
def test_without_rows_or_with_one_class_nothing_is_invented(kind: str):
    rows = make_rows(graded=kind != "binary")
    empty = m.summarise(kind, **{name: values[:0] for name, values in rows.items()})
    assert set(empty) == set(m.HEADS[kind]) and all(np.isnan(cell[0]) and cell[2] == 0 for cell in empty.values())
    one = m.summarise(kind, **rows | {"label": np.ones(len(rows["label"]))})
    for name in RANKING:
        assert name not in one or (np.isnan(one[name][0]) and np.isnan(one[name][1])), name
    assert kind != "binary" or one["gauc_users_left_out"][0] == 1
    assert "calibration_ratio" not in one or one["calibration_ratio"][0] == pytest.approx(rows["score"].mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": np.array([0.1, np.nan])}, "1 of 2 values of score are not finite"),
        ({"label": np.array([np.inf, 1.0])}, "1 of 2 values of label are not finite"),
        ({"user": np.array([1])}, "expected flat arrays of one length"),
        ({"label": np.array([0.5, 1.0])}, "auc: 1 labels are not 0 or 1, the first is 0.5"),
        ({"score": np.array([0.5, 1.5])}, "log_loss: 1 scores are not probabilities, the first is 1.5"),
        ({"base_rate": 1.0}, "base_rate=1.0"),
    ],
)
def test_wrong_input_is_named(change: dict, message: str):
    rows = {"label": np.array([0.0, 1.0]), "score": np.array([0.2, 0.4]), "request": np.zeros(2), "user": np.zeros(2)}
    with pytest.raises(ValueError, match=message):
        m.summarise("binary", **rows | change)


def test_wrong_kind_users_and_gains_are_named():
    data = m.scored(np.array([-1.0, 0.0]), np.zeros(2), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="head kind 'softmax'"):
        m.statistics("softmax", data)
    with pytest.raises(ValueError, match="labels from -1"):
        m.ndcg(data)
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        m.scored(np.zeros(2), np.zeros(2), np.zeros(2), np.array([0, 2]), users=2)
