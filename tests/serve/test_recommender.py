"""Answers of a run equal what its task says of the same histories in a batch of the loader, without any cache."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import argus_kuairand
from recscale import reading, record
from recscale.checkpoint import Checkpoints
from recscale.data.event_log import Column, EventLog
from recscale.data.event_log_writer import write
from recscale.run import build, init_state
from recscale.serve import answers
from recscale.serve.history import BadRequest
from recscale.serve.recommender import Recommender
from tests.tiny_run import tiny, tiny_dreamrec

ITEMS, USERS, EVENTS, LENGTH = 30, 4, 12, 8  # two events more than a model reads, and the one to predict
STU = {
    "embed_dim": 8, "width": 8, "depth": 2, "heads": 2, "qk_dim": 4, "v_dim": 4, "max_length": LENGTH, "dropout": 0.0,
    "time_bias": True, "anchor": "request", "window": 0, "prefix": 0, "truncate_after": 1, "truncate_to": 3,
    "truncate_row": 0, "dtype": "float32",
}  # fmt: skip
SLOW_STU, SLOW_INTERLEAVED = (pytest.param(name, marks=pytest.mark.slow) for name in ("stu", "interleaved"))


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """Users of different lengths, with times, a context, a feedback and a feature of the items."""
    rng = np.random.default_rng(0)
    lengths = np.array([EVENTS, 6, EVENTS - 3, 4])
    n = int(lengths.sum())
    events = {
        "item_id": rng.integers(1, ITEMS + 1, n).astype(np.int32),
        "timestamp": np.concatenate([np.cumsum(rng.integers(1, 90_000, length)) for length in lengths]) + 10**9,
        "like": rng.integers(0, 2, n).astype(np.int8),
        "tab": rng.integers(1, 4, n).astype(np.int32),
    }
    columns = {"item_id": Column("id"), "timestamp": Column("time"), "tab": Column("context", 4)}
    columns |= {"like": Column("feedback", 2)}
    items = {"size": np.concatenate([[0], rng.integers(1, 5, ITEMS)])}
    path = tmp_path_factory.mktemp("serve") / "log"
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    write(EventLog(offsets, events, columns, num_items=ITEMS, items=items, facts={"licence": "none"}), path)
    return path


def next_item(model: str, log: Path, **changes: Any) -> ConfigDict:
    both: dict[str, Any] = {
        "loader__length": LENGTH,
        "loader__layout": "padded",
        "model__max_length": LENGTH,
        **changes,
    }
    both |= {"model__time_bias": True, "model__query_time": "next_event"} if model == "hstu" else {}
    return tiny(model, log, **both)


def stu_config(log: Path) -> ConfigDict:
    config = next_item("hstu", log).unlock()
    config.model_name, config.model = "stu", ConfigDict(STU)
    return config.lock()


def feedback(log: Path, form: str, model: str = "argus") -> ConfigDict:
    c = argus_kuairand.get_config().unlock()
    c.data.path = str(log)
    c.split = ConfigDict({"name": "leave_one_out", "validation": False})
    c.loader.update({"batch_size": 4, "length": LENGTH, "row_length": 0, "layout": "padded"})
    c.loader.update({"inputs": ("like", "items/size"), "queries": ("tab", "hour")})
    c.model.update({"embed_dim": 8, "width": 8, "max_length": 3 * LENGTH, "query_time": "next_event"})
    if model == "hstu":
        c.model_name, c.model = model, ConfigDict(dict(next_item(model, log).model) | {"max_length": 3 * LENGTH})
    c.task.update({"negatives": 4, "heads": (("like", "binary"),), "edges": (), "hidden": 8, "form": form})
    return c.lock()


CONFIGS = {
    "hstu": lambda log: next_item("hstu", log),
    "sasrec": lambda log: next_item("sasrec", log),
    "stu": stu_config,
    "collapsed": lambda log: feedback(log, "collapsed"),
    "interleaved": lambda log: feedback(log, "interleaved", "hstu"),
    "literal": lambda log: feedback(log, "literal"),
}


@functools.cache
def answering(name: str, log: Path) -> tuple[Recommender, dict[str, Any]]:
    """A recommender with small micro-batches, and its state, whose every parameter is random."""
    run = build(CONFIGS[name](log))
    rng, state = np.random.default_rng(1), init_state(run)

    def drawn(x):
        return jax.device_put(np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    state |= {part: jax.tree.map(drawn, state[part]) for part in ("model", "tables")}
    return Recommender(run, state, micro=2), state


def asked(recommender: Recommender, users: Any, stop: int = -1) -> tuple[list, dict[str, Any]]:
    """Histories of the users up to `stop` events before the end, and what else is to be told of them."""
    log, needs = recommender.run.log, recommender.reader
    rows = [np.arange(log.offsets[u], log.offsets[u + 1])[:stop] for u in users]
    events = log.events
    told: dict[str, Any] = {"at": [int(events["timestamp"][r[-1] + 1]) for r in rows]}
    told["timestamps"] = [events["timestamp"][r] for r in rows]
    if needs.given:
        told["columns"] = {"like": [events["like"][r] + 1 for r in rows], "tab": [events["tab"][r] for r in rows]}
        told["request"] = {"tab": [int(events["tab"][r[-1] + 1]) for r in rows]}
    return [events["item_id"][r] for r in rows], told


def loaded(recommender: Recommender) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The loader's batch of all test examples, one user a row in their order, and the slot of each last event."""
    run = recommender.run
    batch = dict(reading.eval_loader(run.config, run.task, run.log, run.views["test"])[0])
    order = np.argsort(batch["example"].max(axis=1), kind="stable")
    order = order[batch["example"].max(axis=1)[order] > 0]
    batch = {name: values[order] for name, values in batch.items()}
    return batch, (batch["segment_ids"] > 0).sum(axis=1) - 1


def queries(recommender: Recommender, state: dict[str, Any]) -> np.ndarray:
    run, (batch, last) = recommender.run, loaded(recommender)
    look = functools.partial(run.tables.lookup, state["tables"], state["mixers"])
    found = jax.jit(lambda b: run.task.queries(state["model"], look, b))(batch)
    return np.asarray(found)[np.arange(len(last)), last]


def item_vectors(recommender: Recommender, state: dict[str, Any]) -> np.ndarray:
    run = recommender.run
    arrays, mixers = state["tables"], state["mixers"]
    found = jax.jit(lambda ids: run.task.item(run.tables.lookup(arrays, mixers, run.task.catalogue, ids)))
    return np.asarray(found(np.arange(1, ITEMS + 1, dtype=np.int32)))


def predictions(recommender: Recommender, state: dict[str, Any], candidates: list[int]) -> np.ndarray:
    """[B, M]: the head's value were the candidate the next item, one candidate at a time."""
    run, (batch, last) = recommender.run, loaded(recommender)
    look = functools.partial(run.tables.lookup, state["tables"], state["mixers"])
    predict = jax.jit(lambda b: run.task.predict(state["model"], look, b)["like"])
    sizes = np.unique(run.log.items["size"][1:], return_inverse=True)[1] + 1
    found, row = [], np.arange(len(last))
    for item in candidates:
        one = {name: values.copy() for name, values in batch.items()}
        one["query_item_id"][row, last], one["query_items/size"][row, last] = item, sizes[item - 1]
        found.append(np.asarray(predict(one))[row, last])
    return np.stack(found, axis=1)


@pytest.mark.parametrize("name", ["hstu", SLOW_STU, SLOW_INTERLEAVED])
def test_recommends_what_the_uncached_model_ranks_first(name, log):
    recommender, state = answering(name, log)
    histories, told = asked(recommender, range(USERS))
    scores = queries(recommender, state) @ item_vectors(recommender, state).T
    ids, found = recommender.recommend(histories, ITEMS, **told, seen=True)
    expected = np.argsort(-scores, axis=1, kind="stable") + 1
    for b in range(USERS):
        np.testing.assert_allclose(found[b], scores[b, ids[b] - 1], rtol=1e-4, atol=1e-4)
        assert sorted(ids[b]) == list(range(1, ITEMS + 1)) and np.all(np.diff(found[b]) <= 1e-6)
        np.testing.assert_array_equal(ids[b, :3], expected[b, :3])
    unseen, values = recommender.recommend(histories, ITEMS, **told)
    for b in range(USERS):
        left = [i for i in ids[b] if i not in set(histories[b])]
        assert unseen[b].tolist() == left + [0] * (ITEMS - len(left))
        assert np.all(np.isneginf(values[b, len(left) :])) and np.all(np.isfinite(values[b, : len(left)]))
    by_item = recommender.rank(
        histories, [3, 9, 4, 9], **told, head="next_item" if name in "collapsed interleaved" else None
    )
    np.testing.assert_allclose(by_item, scores[:, [2, 8, 3, 8]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["collapsed", SLOW_INTERLEAVED, pytest.param("literal", marks=pytest.mark.slow)])
def test_ranks_by_what_the_task_predicts_of_each_candidate(form, log):
    recommender, state = answering(form, log)
    histories, told = asked(recommender, range(USERS))
    candidates = [5, 17, 2, 30, 5, 11, 8, 9, 1]  # more than one bucket of eight
    found = recommender.rank(histories, candidates, **told)
    expected = predictions(recommender, state, candidates)
    assert np.ptp(expected, axis=1).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(recommender.rank(histories, candidates[::-1], **told), expected[:, ::-1], atol=2e-5)
    single = {
        k: v[0] if k != "columns" and k != "request" else {n: w[0] for n, w in v.items()} for k, v in told.items()
    }
    np.testing.assert_allclose(recommender.rank(histories[0], candidates, **single), expected[0], atol=2e-5)


@pytest.mark.parametrize("name", ["hstu", SLOW_STU, SLOW_INTERLEAVED])
def test_a_memory_grows_into_the_same_answers(name, log):
    """Event by event, and past the length that the model reads."""
    recommender, _ = answering(name, log)
    histories, told = asked(recommender, [0])
    told["at"] = told["at"][0]
    columns = {n: v[0] for n, v in told.pop("columns", {}).items()}
    request = {n: v[0] for n, v in told.pop("request", {}).items()}
    times, items = told.pop("timestamps")[0], histories[0]
    whole = recommender.rank(items, [1, 2, 3], timestamps=times, columns=columns, **told, request=request)

    def part(start, stop):
        return items[start:stop], times[start:stop], {n: v[start:stop] for n, v in columns.items()}

    memory = recommender.remember(*part(0, 3))
    for start, stop in ((3, 4), (4, 7), (7, 8), (8, len(items))):
        memory = recommender.extend(memory, *part(start, stop))
    np.testing.assert_allclose(recommender.rank(memory, [1, 2, 3], **told, request=request), whole, atol=2e-5)
    later = recommender.rank(memory, [1, 2, 3], at=told["at"] + 10**7, request=request)
    assert np.abs(later - whole).max() > 1e-4  # these models read the time of the request


def test_users_of_a_memory_grow_apart(log):
    recommender, _ = answering("sasrec", log)
    memory = recommender.extend(recommender.remember([[1, 2, 3], [4]]), [[], [5, 6]])
    found = recommender.rank(memory, [7, 8])
    np.testing.assert_allclose(found, recommender.rank([[1, 2, 3], [4, 5, 6]], [7, 8]), atol=1e-5)


def test_equal_shapes_are_compiled_once(log):
    recommender, _ = answering("sasrec", log)
    recommender.recommend([1, 2, 3], 5)
    sizes = [f._cache_size() for f in (answers.remember, answers.query, answers.last_state, answers.item_scores)]
    for history in ([4], [5, 6, 7, 8, 9], list(range(1, 30))):
        recommender.recommend(history, 7)
    assert sizes == [
        f._cache_size() for f in (answers.remember, answers.query, answers.last_state, answers.item_scores)
    ]


def test_a_workdir_is_all_it_takes(log, tmp_path):
    recommender, state = answering("interleaved", log)
    config = CONFIGS["interleaved"](log)
    record.write(tmp_path, record.new(config.to_dict()))
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state, {"next_index": 1})
    again = Recommender.from_run(tmp_path, micro=2)
    jax.tree.map(np.testing.assert_array_equal, (again.model, again.arrays), (state["model"], state["tables"]))
    assert again.run.config.to_dict() == recommender.run.config.to_dict()
    with pytest.raises(OSError, match=r"record\.json"):
        Recommender.from_run(tmp_path / "nowhere")


TIMES = {"timestamps": [10, 20], "at": 30}
WRONG = {
    "unknown item": (([1, 31], [2]), TIMES, "history: item 31 .1 of 2. is not in the catalogue: expected ids 1..30"),
    "padding": (([1, 0], [2]), TIMES, "history: item 0"),
    "unknown candidate": (([1, 2], [2, 99]), TIMES, "candidates: item 99"),
    "empty history": (([], [2]), TIMES, "history: empty, expected at least one event"),
    "no candidates": (([1, 2], []), TIMES, "candidates: lists of .0. items"),
    "float ids": (([1.0, 2.0], [2]), TIMES, "history: found float64, expected integer item ids"),
    "words": ((["a", "b"], [2]), TIMES, "history: found <U1"),
    "mixed": (([1, [2]], [2]), TIMES, "history: numbers and lists mixed"),
    "no times": (([1, 2], [2]), {"at": 30}, "timestamps of history: missing; this model reads them"),
    "no request": (([1, 2], [2]), {"timestamps": [10, 20]}, "at: missing"),
    "float times": (([1, 2], [2]), TIMES | {"timestamps": [1.5, 2.0]}, "timestamps of history: found float64"),
    "order": (([1, 2], [2]), TIMES | {"timestamps": [20, 10]}, "not ascending"),
    "milliseconds": (([1, 2], [2]), TIMES | {"timestamps": [0, 10**12]}, "are these milliseconds"),
    "past": (([1, 2], [2]), TIMES | {"at": 15}, "at = 15: expected no less than the last event"),
    "head": (([1, 2], [2]), TIMES | {"head": "like"}, "head = 'like': expected one of .'next_item'."),
    "users": (([[1, 2], [3]], [[2]]), TIMES | {"timestamps": [[1, 2], [3]]}, "candidates: 1 lists"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(name, log):
    arguments, told, message = WRONG[name]
    recommender, _ = answering("hstu", log)
    with pytest.raises(BadRequest, match=message) as caught:
        recommender.rank(*arguments, **told)
    assert "\n" not in str(caught.value)


def test_what_else_is_wrong_is_said(log):
    recommender, _ = answering("hstu", log)
    for k in (0, ITEMS + 1, 2.5):
        with pytest.raises(BadRequest, match=rf"k = {k}: expected 1\.\.30"):
            recommender.recommend([1, 2], k, **TIMES)
    ranker, _ = answering("collapsed", log)
    columns = {"like": [1, 2], "tab": [1, 9]}
    with pytest.raises(BadRequest, match="columns: 'like' is missing"):
        ranker.rank([1, 2], [3], **TIMES)
    with pytest.raises(BadRequest, match=r"column 'tab' of history: found 1\.\.9, expected ids 0\.\.3"):
        ranker.rank([1, 2], [3], **TIMES, columns=columns)
    columns["tab"] = [1, 2]
    with pytest.raises(BadRequest, match="request: 'tab' is missing"):
        ranker.rank([1, 2], [3], **TIMES, columns=columns)


def test_a_model_without_keys_and_values_is_not_served(log):
    config = next_item("sasrec", log).unlock()
    sizes = {"embed_dim": 8, "width": 8, "depth": 1, "half_lives": (2.0,), "max_length": LENGTH, "dropout": 0.0}
    config.model_name, config.model = "dlrm", ConfigDict(sizes | {"dtype": "float32"})
    run = build(config.lock())
    with pytest.raises(BadRequest, match="model_name = 'dlrm' keeps no keys and values"):
        Recommender(run, init_state(run))


def test_a_run_that_denoises_is_not_served(log):
    run = build(tiny_dreamrec(log))
    with pytest.raises(BadRequest, match=r"by diffusion .* not served: use recscale\.evaluate, or recscale\.resample"):
        Recommender(run, init_state(run))
