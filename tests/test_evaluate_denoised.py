"""What is sampled, against a plain ranking of the whole catalogue; the legacy protocol by hand."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from recscale import evaluate_denoised as evaluate_module
from recscale import record
from recscale.data.splits import View
from recscale.data.windows import prefixes
from recscale.evaluate import evaluate_split
from recscale.evaluate_denoised import LEGACY, evaluate_denoised
from recscale.layers.conditions import Condition
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


def test_the_legacy_protocol_lets_padding_compete(log):
    """Without dropout and with one sample it is the clean one, but for an untrained vector that may come first."""
    quiet = build(tiny_dreamrec(log, model__dropout=0.0, eval__protocols=("full", LEGACY)))
    state, t = init_state(quiet), quiet.task
    per_target = evaluate_split(quiet, state, "test", 0, True)[1]
    where = {row: i for i, row in enumerate(per_target["row"])}
    padding_D = t.config.deviation * np.asarray(jax.random.normal(jax.random.key(t.config.seed), (8,)))
    wins = np.zeros(len(where), int)
    for row, x_KD, scores_V in plain(quiet, state, quiet.views["test"]):
        wins[where[row]] = x_KD[0] @ padding_D > scores_V[quiet.log.events["item_id"][row] - 1]
    assert 0 < wins.mean() < 1
    assert (per_target[f"rank_{LEGACY}"] - per_target["rank"] == wins).mean() > 0.98  # rounding may swap one


def test_the_legacy_protocol_drops_out_anew_in_every_batch(run, state, found, monkeypatch):
    """And the same again when it is asked again."""
    keys, generate = [], evaluate_module._generate

    def noted(*arguments, **how):
        keys.append(arguments[-1])
        return generate(*arguments, **how)

    monkeypatch.setattr(evaluate_module, "_generate", noted)
    again = evaluate_split(run, state, "test", 0, True)[1]
    assert np.array_equal(again[f"rank_{LEGACY}"], found[1][f"rank_{LEGACY}"])
    drawn = [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys if key is not None]
    assert len(set(drawn)) == len(drawn) == -(-130 // 16)
    assert (found[1][f"rank_{LEGACY}"] != found[1]["rank"]).mean() > 0.5


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
    assert book["sampling"] == {"denoiser_calls": 12, "flops_per_target": 2 * 8**2 * 3 * (1 + 12)}
    answer = book["inference"]
    assert answer["sampling"] == book["sampling"]["flops_per_target"] and answer["ranking"] == 2 * 63 * 8
    assert book["config"]["eval"]["protocols"] == ["full", "unseen", LEGACY]
    assert {f"ndcg@1/{LEGACY}", "ndcg@1"} <= {row["metric"] for row in book["evaluations"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__protocols": (LEGACY,), "task__sampler": "ddim"}, "'dreamrec_legacy' walks all .* 'ddim' in 0 steps"),
        ({"eval__protocols": (LEGACY,), "task__sampling_steps": 3}, "'dreamrec_legacy' walks all .* 'ddpm' in 3 steps"),
        ({"eval__protocols": (LEGACY,), "task__similarity": "cosine"}, "'dreamrec_legacy' .* scored by 'cosine'"),
        ({"loader__horizon": 60}, "loader: horizon = 60.*task 'denoising' generates the very next item"),
        ({"loader__alpha": 1.6}, "alpha = 1.6: task 'denoising' generates the very next item from the whole history"),
        ({"model_name": "tiger"}, "model_name = 'tiger' with task 'denoising': expected one of"),
    ],
)
def test_what_does_not_fit_is_named(log, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_dreamrec(log, **changes))


def test_an_empty_history_is_the_encoders_constant(run, state):
    """First events as targets: one condition for all of them, the bias of the encoder's last norm."""
    log = dataclasses.replace(  # a history that begins with nothing has no times
        run.log,
        events={name: values for name, values in run.log.events.items() if name != "timestamp"},
        columns={name: column for name, column in run.log.columns.items() if name != "timestamp"},
    )
    timeless, begin = dataclasses.replace(run, log=log), np.asarray(log.offsets[:-1], np.int64)
    view = View("test", np.arange(len(begin), dtype=np.int32), begin, begin, begin + 1, empty_history=True)
    batch = generation_loader(run.config, run.task, log, view)[0]
    lookup = functools.partial(run.tables.lookup, state["tables"], state["mixers"])
    memory = np.asarray(jax.jit(lambda batch: run.task._memory(state["model"], lookup, batch, 1, None)[0])(batch))
    network = state["model"]
    expected = network.head.remember(Condition(network.encoder.empty().reshape(1, 1, -1)))
    np.testing.assert_allclose(memory, np.broadcast_to(expected, memory.shape), atol=1e-6)
    rows, per_target = evaluate_denoised(timeless, state, view, final=True)
    assert per_target["row"].tolist() == begin.tolist()
    assert {row["n"] for row in rows if row["metric"] == "hr@5/unseen"} == {130}
