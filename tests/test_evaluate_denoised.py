"""What is sampled, against a plain ranking of the whole catalogue; the legacy protocol by hand."""

import functools

import jax
import numpy as np
import pytest

from recscale import record
from recscale.data.windows import prefixes
from recscale.evaluate import evaluate_split
from recscale.evaluate_denoised import LEGACY, evaluate_denoised
from recscale.metrics import NonFiniteScore
from recscale.reading import generation_loader
from recscale.run import build, init_state
from recscale.train import train
from tests.tiny_run import make_log, tiny_dreamrec

ALL = {"eval__protocols": ("full", "unseen", LEGACY), "task__samples": 3, "task__likelihood_steps": 4}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("denoised") / "log", users=130)


@pytest.fixture(scope="module")
def run(log):
    return build(tiny_dreamrec(log, **ALL))


@pytest.fixture(scope="module")
def state(run):
    return init_state(run)


@pytest.fixture(scope="module")
def found(run, state):
    return evaluate_split(run, state, "test", 0, True)


def plain(run, state, view):
    """Per target the vectors that its row's noise gives, and the scores of all items 1..V, in numpy."""
    loader = generation_loader(run.config, run.task, run.log, prefixes(view))
    lookup = functools.partial(run.tables.lookup, state["tables"], state["mixers"])
    items = np.asarray(lookup("item", np.arange(1, run.log.num_items + 1)))
    generate = jax.jit(lambda batch, row: run.task.generate(state["model"], lookup, batch, row))
    for i in range(loader.steps_per_epoch):
        batch = loader[i]
        b = np.flatnonzero(batch["target"].max(axis=1))
        row_B = np.zeros(len(batch["target"]), np.int32)
        row_B[b] = view.target_start[batch["example"].max(axis=1)[b] - 1]
        x_BKD = np.asarray(generate(batch, row_B))
        yield from zip(row_B[b], x_BKD[b], (x_BKD[b].mean(axis=1) @ items.T), strict=True)


def test_ranks_are_those_of_the_mean_sample(run, state, found):
    view, items = run.views["test"], run.log.events["item_id"]
    _, per_target = found
    where = {row: i for i, row in enumerate(per_target["row"])}
    assert len(where) == len(view) == 130
    for row, x_KD, scores_V in plain(run, state, view):
        user, target = np.searchsorted(run.log.offsets, row, side="right") - 1, items[row]
        better = scores_V > scores_V[target - 1]
        better |= (scores_V == scores_V[target - 1]) & (np.arange(len(scores_V)) < target - 1)
        assert abs(per_target["rank"][where[row]] - 1 - better.sum()) <= 1  # rounding may swap two
        seen = np.unique(items[run.log.offsets[user] : row])
        better[seen[seen != target] - 1] = False
        assert abs(per_target["rank_unseen"][where[row]] - 1 - better.sum()) <= 1
        unit = x_KD / np.linalg.norm(x_KD, axis=1, keepdims=True)
        spread = 1 - (unit @ unit.T)[np.triu_indices(3, 1)].mean()
        np.testing.assert_allclose(per_target["spread"][where[row]], spread, atol=1e-4)


def test_rows_name_what_was_measured(run, found):
    rows, per_target = found
    named = {row["metric"]: row for row in rows if row["slice"] == "all"}
    assert {"hr@5", "hr@5/unseen", f"hr@5/{LEGACY}", "nats", "density_nats", "spread", "distinct", "coverage@5"} <= set(
        named
    )
    assert named["hr@5"]["n"] == 130 and named[f"hr@5/{LEGACY}"]["n"] == 100  # the last batch of 100 is not full
    assert np.isfinite(per_target["density_nats"]).all()
    assert set(np.round(3 * per_target["distinct"], 5)) <= {1.0, 2.0, 3.0}


def test_the_legacy_protocol_lets_padding_compete(run, state, found):
    """An untrained vector of padding may come first, so that a rank may be one more than the items."""
    legacy = found[1][f"rank_{LEGACY}"]
    assert legacy.min() >= 1 and legacy.max() <= run.log.num_items + 1
    again = evaluate_split(run, state, "test", 0, True)[1][f"rank_{LEGACY}"]
    assert np.array_equal(legacy, again)


def test_neither_the_batch_nor_its_order_matters(log, state, found):
    other = build(tiny_dreamrec(log, eval__batch_size=64, **ALL))
    _, per_target = evaluate_denoised(other, state, other.views["test"], final=True)
    np.testing.assert_allclose(per_target["nats"], found[1]["nats"], rtol=1e-4)
    np.testing.assert_allclose(per_target["density_nats"], found[1]["density_nats"], rtol=1e-4)
    assert (per_target["rank"] == found[1]["rank"]).mean() > 0.95


@pytest.mark.slow
def test_the_mesh_changes_nothing(log, run, found):
    spread = build(tiny_dreamrec(log, mesh__data=4, mesh__model=2, **ALL))
    _, per_target = evaluate_denoised(spread, init_state(spread), spread.views["test"], final=True)
    np.testing.assert_allclose(per_target["nats"], found[1]["nats"], rtol=1e-4)
    assert (per_target["rank"] == found[1]["rank"]).mean() > 0.95


def test_a_diverged_state_is_named(run, state):
    broken = state | {"model": jax.tree.map(lambda x: x * np.nan, state["model"])}
    with pytest.raises(NonFiniteScore, match="130 of 130 targets have a NaN or infinite score"):
        evaluate_denoised(run, broken, run.views["test"])


def test_a_run_is_recorded_with_both_protocols_and_what_is_left_of_the_vectors(log, tmp_path):
    train(tiny_dreamrec(log, **ALL), tmp_path)
    book = record.read(tmp_path)
    assert book["status"] == "ok" and 0 < book["table"]["variance"] < 4 and book["parameters"]["head"] > 0
    assert book["config"]["eval"]["protocols"] == ["full", "unseen", LEGACY]
    assert {f"ndcg@1/{LEGACY}", "ndcg@1"} <= {row["metric"] for row in book["evaluations"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loader__horizon": 60}, "loader: horizon = 60.*task 'denoising' generates the very next item"),
        ({"model_name": "tiger"}, "model_name = 'tiger' with task 'denoising': expected one of"),
    ],
)
def test_what_does_not_fit_is_named(log, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_dreamrec(log, **changes))
