"""Feature orderings: nested cells, known additive and interacting gains, intervals, what is missing, the figure."""

import itertools

import numpy as np
import pytest

from recscale.scaling import feature_orders
from recscale.scaling.feature_orders import answer, cells, chain, measured, name_of, of_targets, orders, sentence, table
from recscale.scaling.figure_files import write_files
from recscale.scaling.figures_features import feature_gains

FEATURES = ("author", "hour", "tab", "weekday")
GAINS = {"author": 0.30, "hour": 0.10, "tab": 0.05, "weekday": -0.02}


def additive(cell):
    return 6.0 - sum(GAINS[name] for name in cell)


def interacting(cell):
    """hour and tab tell the same: either alone saves .2, both together .25; author and weekday only help together."""
    saved = 0.25 if {"hour", "tab"} <= cell else 0.2 * bool({"hour", "tab"} & cell)
    return 6.0 - saved - 0.1 * ({"author", "weekday"} <= cell)


def losses(loss_of, users=400, noise=0.0, spread=1.0, seed=0, only=None):
    """Synthetic targets: 1 to 5 a user, a user effect shared by all cells, and noise of each target and cell."""
    rng = np.random.default_rng(seed)
    user_T = np.repeat(np.arange(users), rng.integers(1, 6, users))
    shared_T = spread * rng.standard_normal(users)[user_T] + rng.standard_normal(len(user_T))
    subsets = [frozenset(c) for k in range(len(FEATURES) + 1) for c in itertools.combinations(FEATURES, k)]
    shared_T -= shared_T.mean()
    table = {c: loss_of(c) + shared_T + noise * rng.standard_normal(len(user_T)) for c in subsets}
    return of_targets({c: loss for c, loss in table.items() if only is None or c in only}, user_T)


def test_orders_are_random_different_nested_in_their_number_and_end_at_all_of_them():
    few, more = orders(FEATURES, 5, seed=3), orders(FEATURES, 9, seed=3)
    assert more[:5] == few and len(set(more)) == 9 and few != orders(FEATURES, 5, seed=4)
    assert sorted(orders(FEATURES, 1000)) == sorted(itertools.permutations(FEATURES))
    many = orders([str(i) for i in range(9)], 50, seed=1)  # beyond what is listed
    assert len(set(many)) == 50 and many[:20] == orders([str(i) for i in range(9)], 20, seed=1)
    first = [order[0] for seed in range(60) for order in orders(FEATURES, 4, seed)]
    assert min(first.count(name) for name in FEATURES) > 30  # 60 each are expected


def test_cells_are_the_shared_prefixes_once():
    chains = orders(FEATURES, 6, seed=2)
    expected = {frozenset(order[:k]) for order in chains for k in range(5)}
    found = cells(FEATURES, 6, seed=2)
    assert set(found) == expected and len(found) == len(expected)
    assert found[0] == frozenset() and found[-1] == frozenset(FEATURES)
    assert [len(cell) for cell in found] == sorted(len(cell) for cell in found)
    assert name_of(found[0]) == "none" and name_of(frozenset(["tab", "items/author"])) == "items-author+tab"


@pytest.mark.parametrize("budget", [5, 7, 9, 12, 15])
def test_a_budget_pays_for_as_many_orderings_as_fit(budget):
    count = feature_orders.affordable(FEATURES, budget, seed=1)
    assert len(cells(FEATURES, count, seed=1)) <= budget < len(cells(FEATURES, count + 1, seed=1))
    assert feature_orders.affordable(FEATURES, 16) == 24  # all cells there are
    with pytest.raises(ValueError, match="budget of 4 cells: one ordering of 4 needs 5"):
        feature_orders.affordable(FEATURES, 4)


@pytest.mark.parametrize("count", [1, 3, 24])
def test_additive_gains_are_exact_in_any_orderings(count):
    found = answer(orders(FEATURES, count), losses(additive), resamples=20)
    assert {gain.feature: gain.value for gain in found.gains} == pytest.approx(GAINS, abs=1e-12)
    assert found.gains[0].feature == "author" and found.exact == (count == 24)
    for gain in found.gains:
        assert gain.least == pytest.approx(gain.most, abs=1e-9)
        assert gain.low == pytest.approx(gain.high, abs=1e-9)  # the user effect is the same in every cell: paired


def test_interacting_gains_are_shapley_values_over_all_orderings():
    found = answer(orders(FEATURES, 24), losses(interacting), resamples=20)
    by_hand = {}  # Shapley's formula over subsets, not over orderings
    for name in FEATURES:
        rest = [other for other in FEATURES if other != name]
        total = 0.0
        for size, weight in ((0, 1 / 4), (1, 1 / 12), (2, 1 / 12), (3, 1 / 4)):
            for some in map(frozenset, itertools.combinations(rest, size)):
                total += weight * (interacting(some) - interacting(some | {name}))
        by_hand[name] = total
    assert {gain.feature: gain.value for gain in found.gains} == pytest.approx(by_hand, abs=1e-12)
    assert by_hand["hour"] == pytest.approx(0.125) and by_hand["author"] == pytest.approx(0.05)
    hour = next(gain for gain in found.gains if gain.feature == "hour")
    assert (hour.least, hour.most) == pytest.approx((0.05, 0.2))


@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_gains_add_up_to_the_gain_of_all_features(count):
    data = losses(interacting, noise=0.3)
    found = answer(orders(FEATURES, count, seed=count), data, resamples=20)
    loss = dict(zip(data.cells, data.loss_C, strict=True))
    assert sum(gain.value for gain in found.gains) == pytest.approx(found.total.value, abs=1e-12)
    assert found.total.value == pytest.approx(loss[frozenset()] - loss[frozenset(FEATURES)], abs=1e-12)
    assert found.loss[0].value == pytest.approx(loss[frozenset()], abs=1e-12)
    assert [step.value for step in found.saved] == pytest.approx([found.loss[0].value - s.value for s in found.loss])


def test_the_curve_is_the_mean_over_orderings():
    chains, data = orders(FEATURES, 3, seed=5), losses(interacting)
    loss = dict(zip(data.cells, data.loss_C, strict=True))
    found = answer(chains, data, resamples=20)
    expected = [np.mean([loss[chain(order)[k]] for order in chains]) for k in range(5)]
    assert [step.value for step in found.loss] == pytest.approx(expected)


def test_losses_are_means_over_targets_not_over_users():
    user_T = np.array([7, 7, 7, 2])
    data = of_targets({frozenset(): np.array([1.0, 2.0, 3.0, 10.0])}, user_T)
    assert data.loss_C == pytest.approx([4.0])
    assert len(data.targets_U) == 2


def test_intervals_are_paired_and_cover():
    covered, width, loss_width = [], [], []
    for seed in range(40):
        found = answer(orders(FEATURES, 24), losses(additive, users=150, noise=0.5, seed=seed), resamples=200)
        covered += [gain.low <= GAINS[gain.feature] <= gain.high for gain in found.gains]
        width.append(found.total.high - found.total.low)
        loss_width.append(found.loss[0].high - found.loss[0].low)
    assert 0.82 <= np.mean(covered) <= 0.97  # 90 % promised, 160 intervals
    assert np.mean(width) < 0.6 * np.mean(loss_width)  # users differ by more than the features: pairing removes it


def test_few_orderings_of_interacting_features_have_wider_intervals_than_all():
    data = losses(interacting, noise=0.05)
    some, everything = (answer(orders(FEATURES, count, seed=1), data, resamples=300) for count in (6, 24))
    widths = [{gain.feature: gain.high - gain.low for gain in found.gains}["hour"] for found in (some, everything)]
    assert widths[0] > 2 * widths[1]


def test_missing_orderings_are_named_and_left_out():
    chains = orders(FEATURES, 4, seed=0)
    lacking = chain(chains[1])[2]
    whole = {cell for order in chains for cell in chain(order)} - {lacking}
    found = answer(chains, losses(additive, only=whole), resamples=20)
    expected = [order for order in chains if lacking in chain(order)]
    assert found.missing == dict.fromkeys(expected, (lacking,))
    assert len(found.used) == 4 - len(expected) and not found.exact
    assert f"{len(expected)} orderings are not complete" in sentence(found)
    with pytest.raises(ValueError, match=r"none of 4 orderings is complete; the nearest lacks"):
        answer(chains, losses(additive, only={frozenset()}))


def test_runs_are_read_seeds_averaged_and_targets_checked(tmp_path):
    def run(name, nats, row=(3, 9, 12), **more):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "per_target_test.npz", nats=nats, row=row, example=np.arange(3), **more)
        return tmp_path / name

    none, tab = frozenset(), frozenset(["tab"])
    runs = {none: [run("none-s0", [3.0, 4.0, 5.0]), run("none-s1", [5.0, 4.0, 5.0])], tab: [run("tab-s0", [2.0] * 3)]}
    found = answer([("tab",)], measured({**runs, frozenset(["hour"]): [tmp_path / "not yet"]}), resamples=20)
    assert found.total.value == pytest.approx(13 / 3 - 2)
    doubled = measured(runs, loss=lambda arrays: 2 * arrays["nats"])
    assert doubled.loss_C == pytest.approx([26 / 3, 4.0])
    runs[tab].append(run("tab-s1", [2.0] * 3, row=(3, 9, 13)))
    with pytest.raises(ValueError, match=r"tab-s1/per_target_test.npz: its targets are not those of .*none-s0"):
        measured(runs)
    with pytest.raises(ValueError, match="no run of 1 cells has a per_target_val"):
        measured({none: [tmp_path / "none-s0"]}, split="val")


WRONG = {
    "no feature": (lambda: orders((), 1), "expected at least one name"),
    "twice": (lambda: cells(("tab", "tab"), 1), "each once"),
    "no ordering": (lambda: orders(FEATURES, 0), "count = 0, expected at least 1"),
    "nan": (lambda: of_targets({frozenset(): np.array([np.nan])}, np.zeros(1)), "all finite"),
    "one user": (
        lambda: answer([("tab",)], of_targets(dict.fromkeys(map(frozenset, ((), ("tab",))), np.ones(3)), np.zeros(3))),
        "at least 2",
    ),
    "other features": (lambda: answer([("tab", "hour"), ("tab",)], losses(additive)), "not all of the same features"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_refused(case):
    act, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        act()


def test_table_and_figure(tmp_path):
    found = answer(orders(FEATURES, 5), losses(interacting, noise=0.3), resamples=50)
    rows = table(found)
    assert [row["feature"] for row in rows][-1] == "all together" and len(rows) == 5
    assert sum(row["gain"] for row in rows[:-1]) == pytest.approx(rows[-1]["gain"])
    write_files(feature_gains(found), tmp_path, "synthetic")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".pdf", ".csv"}
