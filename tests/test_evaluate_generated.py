"""What is generated, against scoring every item of the catalogue; metrics of shared tuples by hand."""

import functools

import jax
import numpy as np
import pytest

from recscale import metrics
from recscale.data.windows import prefixes
from recscale.evaluate import evaluate_split
from recscale.evaluate_generated import evaluate_generated, generated_metrics
from recscale.metrics import NonFiniteScore
from recscale.reading import generation_loader
from recscale.run import build, init_state
from recscale.tasks.semantic_id import CODES
from tests.tiny_run import make_codes, make_log, tiny_tiger

KS = (1, 5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    log = make_log(folder / "log", users=40)
    return log, make_codes(log, folder / "codes")


@pytest.fixture(scope="module")
def run(world):
    return build(tiny_tiger(*world))


@pytest.fixture(scope="module")
def state(run):
    return init_state(run)


def scores(run, state, view) -> dict[int, np.ndarray]:
    """Row of each target -> log-probability of the tuple of every item 1..V, each taught to the model by itself."""
    nats = jax.jit(
        lambda batch: run.task.nats(
            state["model"], functools.partial(run.tables.lookup, state["tables"], state["mixers"]), batch
        )
    )
    loader, found = generation_loader(run.config, run.task, run.log, view), {}
    for i in range(loader.steps_per_epoch):
        batch = loader[i]
        for b, place in zip(*np.nonzero(batch["target"]), strict=True):
            one = {name: np.repeat(x[b : b + 1], run.log.num_items, axis=0) for name, x in batch.items()}
            one["target"][:, place] = np.arange(1, run.log.num_items + 1)
            example = int(batch["example"][b, place]) - 1
            found[int(view.target_start[example])] = -np.asarray(nats(one))[:, place].astype(np.float64)
    return found


def plain(run, state, view):
    """protocol -> per target (rank of the first item of its tuple, items of the tuple, rank of the tuple)."""
    codes, items, log = run.fixed[CODES].astype(int)[1:], run.log.events["item_id"], run.log
    view = prefixes(view)
    by_row, result = scores(run, state, view), {"full": [], "unseen": []}
    for user, row in zip(view.user, view.target_start, strict=True):
        target, log_p = items[row] - 1, by_row[int(row)]
        seen = set((items[log.offsets[user] : row] - 1).tolist()) - {int(target)}
        for protocol, hidden in (("full", set()), ("unseen", seen)):
            tuples: dict[tuple, list[int]] = {}
            for v in range(log.num_items):
                if v not in hidden:
                    tuples.setdefault(tuple(codes[v]), []).append(v)
            order = sorted(tuples, key=lambda t: (-log_p[tuples[t][0]], t))
            mine = order.index(tuple(codes[target]))
            before = sum(len(tuples[t]) for t in order[:mine])
            result[protocol].append((before + 1, len(tuples[order[mine]]), mine + 1))
    return {protocol: np.array(values) for protocol, values in result.items()}


def test_a_beam_as_wide_as_the_catalogue_ranks_as_scoring_every_item_does(run, state):
    view = run.views["test"]
    rows, per_target = evaluate_generated(run, state, view, step=7)
    expected = plain(run, state, view)
    values = {row["metric"]: row["value"] for row in rows if row["slice"] == "all"}
    assert (expected["full"][:, 1] > 1).any() and (expected["full"] != expected["unseen"]).any()
    for protocol, suffix in ((name, metrics.PROTOCOLS[name]) for name in expected):
        got = np.stack([per_target[metrics.column(n, protocol)] for n in ("rank", "bucket", "tuple_rank")], axis=1)
        np.testing.assert_array_equal(got, expected[protocol])
        for k in KS:
            rank, bucket, tuple_rank = expected[protocol].T
            places = [range(r, r + b) for r, b in zip(rank, bucket, strict=True)]
            gain = [np.mean([(p <= k) / np.log2(p + 1) for p in each]) for each in places]
            assert values[f"hr@{k}{suffix}"] == pytest.approx(np.mean([np.mean([p <= k for p in e]) for e in places]))
            assert values[f"ndcg@{k}{suffix}"] == pytest.approx(np.mean(gain))
            assert values[f"tuple_hr@{k}{suffix}"] == pytest.approx(np.mean(tuple_rank <= k))
            assert values[f"hr_optimistic@{k}{suffix}"] == pytest.approx(np.mean(rank <= k))
            assert values[f"hr_pessimistic@{k}{suffix}"] == pytest.approx(np.mean(rank + bucket - 1 <= k))
    assert values["nats"] - values["tuple_nats"] == pytest.approx(np.log(expected["full"][:, 1]).mean())
    assert values["found"] == 1.0 and rows[0]["step"] == 7 and rows[0]["n"] == len(view)


def test_what_a_narrow_beam_does_not_hold_is_a_miss(run, world, state):
    _, per_wide = evaluate_generated(run, state, run.views["test"])
    narrow = build(tiny_tiger(*world, eval__top_k=5))
    rows, per_target = evaluate_generated(narrow, state, narrow.views["test"])
    lost = per_target["rank"] == run.log.num_items + 1
    assert 0 < lost.mean() < 1 and per_target["tuple_rank"][~lost].max() <= 5
    values = {row["metric"]: row["value"] for row in rows if row["slice"] == "all"}
    assert values["found"] == pytest.approx(1 - lost.mean())
    assert values["hr@5"] <= values["tuple_hr@5"] == pytest.approx(1 - lost.mean())
    np.testing.assert_array_equal(per_target["nats"], per_wide["nats"])


def test_every_target_of_an_example_is_generated_from_what_is_before_it(world):
    split = {"name": "by_user", "train_users": 20, "eval_users": 10, "eval_targets": 3}
    run = build(tiny_tiger(*world, split=split, eval__protocols=("full",)))
    state = init_state(run)
    view = run.views["test"]
    rows, per_target = evaluate_split(run, state, "test", 0, final=True)
    np.testing.assert_array_equal(
        per_target["row"], np.concatenate([np.arange(a, b) for a, b in zip(view.target_start, view.stop, strict=True)])
    )
    assert np.bincount(per_target["example"]).max() == 3
    np.testing.assert_array_equal(per_target["rank"], plain(run, state, view)["full"][:, 0])
    assert {"all", "history_1_4"} & {row["slice"] for row in rows} and {"history_5_9"} & {row["slice"] for row in rows}


@pytest.mark.slow
def test_the_mesh_changes_nothing(world, run, state):
    spread = build(tiny_tiger(*world, mesh__data=4, mesh__model=2))
    _, per_target = evaluate_generated(spread, init_state(spread), spread.views["test"])
    _, expected = evaluate_generated(run, state, run.views["test"])
    np.testing.assert_allclose(per_target["nats"], expected["nats"], rtol=1e-5)
    assert (per_target["rank"] == expected["rank"]).mean() > 0.95  # rounding may swap two of nearly the same score


def test_a_diverged_state_is_named(run, state):
    broken = state | {"model": jax.tree.map(lambda x: x * np.nan, state["model"])}
    with pytest.raises(NonFiniteScore, match="40 of 40 targets have a probability that is NaN or zero"):
        evaluate_generated(run, broken, run.views["test"])


def test_codes_made_anew_after_training_are_not_evaluated_with(run, world, state, tmp_path):
    again = build(tiny_tiger(world[0], make_codes(world[0], tmp_path / "codes", seed=1)))
    with pytest.raises(ValueError, match=r"codes: the codes of \d+ of 63 items are not those that this run"):
        evaluate_generated(again, state, run.views["test"])


def test_items_of_a_tuple_share_its_places():
    """A tuple of three items from rank 4 on, alone at rank 1, and one that no beam holds."""
    found = generated_metrics(np.array([4, 1, 100]), np.array([3, 1, 2]), np.array([2, 1, 100]), ks=(5, 10))
    np.testing.assert_allclose(found["hr@5"], [2 / 3, 1, 0])
    np.testing.assert_allclose(found["ndcg@5"], [(1 / np.log2(5) + 1 / np.log2(6)) / 3, 1, 0])
    np.testing.assert_allclose(found["hr@10"], [1, 1, 0])
    np.testing.assert_allclose(found["hr_optimistic@5"], [1, 1, 0])
    np.testing.assert_allclose(found["hr_pessimistic@5"], [0, 1, 0])
    np.testing.assert_allclose(found["tuple_hr@5"], [1, 1, 0])
    np.testing.assert_allclose(found["tuple_ndcg@5"], [1 / np.log2(3), 1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loader__window": "last", "loader__segments": 0}, "reads the whole history of a target at once"),
        ({"loader__window": "all"}, "loader.window = 'all'"),
        ({"eval__top_k": 3}, "eval.top_k = 3 is the width of the beam"),
        ({"loader__horizon": 60}, "horizon = 60"),
        ({"table__codes": ""}, "table.codes is empty"),
        ({"model__codebook": 3}, r"3 levels of \(4, 4, 4\) codes, but model.levels = 3 and model.codebook = 3"),
        ({"model_name": "sasrec"}, r"model_name = 'sasrec' with task 'semantic_id': expected one of \['tiger'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(world, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_tiger(*world, **changes))
