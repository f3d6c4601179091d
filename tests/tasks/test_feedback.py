"""What a step may know of the next event, in every form; losses against numpy; packed = one user per row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import argus, hstu
from recscale.tasks.feedback import KINDS, TOKENS, Config, Task

QUICK = {"xla_backend_optimization_level": 0}
ITEMS, DIM, L = 12, 4, 6
INPUTS, QUERIES = ("like", "tab", "items/tag"), ("tab", "hour")
HEADS = (("like", "binary"), ("ratio", "ordinal"), ("seconds", "regression"))
EDGES = (0.5, 1.0)
FORMS = pytest.mark.parametrize("form", TOKENS)
SIZES = {"item": ITEMS + 1, "like": 3, "tab": 5, "hour": 25, "items/tag": 4}


def task(form: str = "collapsed", **changes) -> Task:
    said = {
        "loss": "sampled", "negatives": 3, "sampler": "uniform", "shared": "token", "logq": "none", "similarity": "dot",
        "temperature": 1.0, "gbce_t": 0.0, "next_item": 1.0, "heads": HEADS, "edges": EDGES, "form": form, "hidden": 5,
    }  # fmt: skip
    return Task(Config(**said | changes), ITEMS, INPUTS, QUERIES)


def batch_of(segments=((1, 1, 1, 2, 2, 0),), seed: int = 0) -> dict[str, np.ndarray]:
    """Rows whose every event is described; the event after the last of a segment is drawn anew."""
    rng, segment = np.random.default_rng(seed), np.array(segments, np.int32)
    real = segment > 0
    batch = {"segment_ids": segment, "positions": np.zeros_like(segment)}
    for row, ids in enumerate(segment):
        batch["positions"][row] = [list(ids[:i]).count(s) if s else 0 for i, s in enumerate(ids)]
    for name, size in SIZES.items():
        key = "item_id" if name == "item" else name
        here, after = (rng.integers(1, size, segment.shape).astype(np.int32) for _ in range(2))
        follows = np.pad(segment[:, 1:] == segment[:, :-1], ((0, 0), (0, 1)))
        batch["query_" + key] = np.where(real, np.where(follows, np.roll(here, -1, 1), after), 0).astype(np.int32)
        batch[key] = np.where(real, here, 0).astype(np.int32)
    batch["target"] = batch["query_item_id"]
    batch["label_like"] = rng.integers(0, 2, segment.shape).astype(np.float32)
    batch["label_ratio"] = rng.choice([0.2, 0.7, 1.3], segment.shape).astype(np.float32)
    batch["label_seconds"] = rng.exponential(9, segment.shape).astype(np.float32)
    time = np.cumsum(rng.integers(1, 9, segment.shape), 1).astype(np.int32)
    return batch | {"timestamp": time, "query_timestamp": time + 5}


def encoder(form: str, name: str = "argus"):
    sizes = {"embed_dim": DIM, "width": DIM, "depth": 2, "heads": 2, "max_length": 3 * L, "dropout": 0.0}
    common = sizes | {"time_bias": True, "query_time": "last_event", "dtype": "float32"}
    module, extra = {"argus": (argus, {}), "hstu": (hstu, {"qk_dim": 2, "v_dim": 2, "output_length": 1})}[name]
    config = module.Config(**common, **extra)
    return task(form).join(module.Model(config, jax.random.key(1)), DIM, jax.random.key(2))


def vectors(t: Task, batch, seed: int = 3) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    tables = {name: rng.normal(size=(size, DIM)).astype(np.float32) for name, size in SIZES.items()}
    return {name: jnp.asarray(tables[owner][np.asarray(ids)]) for name, (owner, ids) in t._read(batch).items()}


# What the next event may tell


@FORMS
def test_a_step_sees_of_the_next_event_what_it_is_given_and_nothing_else(form):
    """Gradients of query and logits at slot 1 of the first user with respect to every vector of the batch, exactly."""
    t, batch, at = task(form), batch_of(), 1
    model, rows = encoder(form), vectors(task(form), batch_of())

    def outputs(rows, what):
        query, logits = t._outputs(model, rows, batch, None)
        return jnp.square(query[0, at] if what == "query" else logits[0, at]).sum()

    for what in ("query", "logits"):
        gradient = jax.jit(jax.grad(functools.partial(outputs, what=what)), compiler_options=QUICK)(rows)
        reached = {name: {int(i) for i in np.flatnonzero(np.abs(g[0]).sum(-1))} for name, g in gradient.items()}
        past = {0, 1}
        first = past if form == "collapsed" else {0}  # later events are known by the token of their own
        assert reached["like"] == past  # the feedback of the next event, slot 2, is not there
        assert reached["history"] == reached["items/tag"] == reached["tab"] == first
        given = past if what == "logits" else {0}
        known = {name: (given if form != "collapsed" else given - {0}) for name in ("candidate", "query_items/tag")}
        assert {name: reached[name] for name in known} == known
        context = past if form != "collapsed" else {1}
        if form == "interleaved" and what == "query":
            assert reached["query_tab"] == reached["query_hour"] == past
        else:
            assert reached["query_tab"] == reached["query_hour"] == context


def test_labels_are_no_inputs():
    t, batch = task(), batch_of()
    changed = batch | {name: 1.0 - batch[name] for name in batch if name.startswith("label_")}
    model, rows = encoder("collapsed"), vectors(t, batch)
    for a, b in zip(t._outputs(model, rows, batch, None), t._outputs(model, rows, changed, None), strict=True):
        np.testing.assert_array_equal(a, b)


@FORMS
@pytest.mark.parametrize("name", ["argus", "hstu"])
def test_packed_rows_give_what_one_user_a_row_gives(form, name):
    t, batch = task(form), batch_of()
    model, tables = encoder(form, name), vectors(t, batch)
    run = jax.jit(lambda rows, batch: t._outputs(model, rows, batch, None), compiler_options=QUICK)
    packed = run(tables, batch)
    for segment in (1, 2):
        place = np.flatnonzero(batch["segment_ids"][0] == segment)

        def alone(x, place=place):
            padded = np.zeros((1, L, *x.shape[2:]), x.dtype)
            padded[:, : len(place)] = np.asarray(x)[:, place]
            return jnp.asarray(padded)

        single = run(jax.tree.map(alone, tables), jax.tree.map(alone, batch))
        for a, b in zip(packed, single, strict=True):
            np.testing.assert_allclose(np.asarray(a)[0, place], np.asarray(b)[0, : len(place)], rtol=2e-4, atol=2e-5)


# Losses and predictions


def test_feedback_losses_are_those_of_the_formulas():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(1, 4, 2)), np.array([[0.0, 1.0, 1.0, 0.0]])
    value = np.array([[0.2, 0.6, 1.4, 0.5]])
    p = 1 / (1 + np.exp(-x))
    binary = -(y * np.log(p[..., 0]) + (1 - y) * np.log(1 - p[..., 0]))
    np.testing.assert_allclose(KINDS["binary"].loss(x, y, ()), binary, rtol=1e-5)
    above = value[..., None] > np.array(EDGES)
    ordinal = -np.where(above, np.log(p), np.log(1 - p)).sum(-1)
    np.testing.assert_allclose(KINDS["ordinal"].loss(jnp.asarray(x), jnp.asarray(value), EDGES), ordinal, rtol=1e-5)
    np.testing.assert_array_equal(KINDS["ordinal"].grade(value, EDGES), above.sum(-1))
    np.testing.assert_allclose(KINDS["ordinal"].predict(jnp.asarray(x), EDGES), p.sum(-1), rtol=1e-5)
    squared = 0.5 * (x[..., 0] - np.log1p(value)) ** 2
    np.testing.assert_allclose(KINDS["regression"].loss(jnp.asarray(x), jnp.asarray(value), ()), squared, rtol=1e-5)


@FORMS
def test_the_loss_is_the_sum_of_its_parts_over_supervised_positions(form):
    batch = batch_of()
    batch["target"] = batch["target"] * np.array([[0, 1, 1, 0, 1, 1]], np.int32)
    model, key = encoder(form), jax.random.key(0)

    def loss(**changes):
        t = task(form, **changes)
        drawn = t.draw({k: jnp.asarray(v) for k, v in batch.items()}, key)
        rng = np.random.default_rng(3)
        tables = {name: rng.normal(size=(size, DIM)).astype(np.float32) for name, size in SIZES.items()}
        rows = {name: jnp.asarray(tables[owner])[ids] for name, (owner, ids) in t.wanted(drawn).items()}
        value, metrics = t.loss(model, rows, drawn, key)
        assert int(metrics["targets"]) == 3
        return float(value)

    everything, half = loss(), loss(next_item=0.5)
    assert half < everything
    t = task(form)
    rows = vectors(t, batch)
    logits = t._outputs(model, rows, batch, None)[1]
    parts = sum(
        np.asarray(KINDS[kind].loss(logits[:, :, k], batch["label_" + column], EDGES))
        for k, (column, kind) in enumerate(HEADS)
    )
    feedback = parts[batch["target"] > 0].mean()
    assert 2 * half - everything == pytest.approx(feedback, rel=1e-4)


def test_a_ranker_alone_draws_nothing_and_has_no_query():
    t = task(next_item=0.0)
    assert not t.ranks_catalogue and not t.needs_catalogue
    batch = batch_of()
    assert t.draw(batch, jax.random.key(0)) is batch and "negative" not in t.wanted(batch)
    assert t.join(None, DIM, jax.random.key(0)).head.query is None


@FORMS
def test_the_head_counts_its_parameters(form):
    t = task(form)
    shapes = jax.eval_shape(lambda: t.join(None, DIM, jax.random.key(0)).head)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == t.head_parameters(DIM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "flat"}, "task.form = 'flat'"),
        ({"heads": (("like", "logistic"),)}, "'like' is 'logistic'"),
        ({"heads": (("like", "binary"), ("like", "binary"))}, "one head"),
        ({"heads": (), "next_item": 0.0}, "something to learn"),
        ({"heads": ("like", "binary")}, "expected pairs"),
        ({"heads": (("like", "binary", 2.0),)}, "expected pairs"),
        ({"edges": (1.0, 0.5)}, "ascending"),
        ({"edges": (0.5, float("nan"))}, "ascending"),
        ({"edges": ()}, "ascending"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes)


def test_a_form_needs_what_its_tokens_say():
    with pytest.raises(ValueError, match="tokens of feedback"):
        Task(task("interleaved").config, ITEMS, ("tab",), ("tab",))
    with pytest.raises(ValueError, match="tokens of context"):
        Task(task("literal").config, ITEMS, ("like",), ())


def test_with_a_lag_feedback_is_read_from_the_older_state_alone():
    t, batch = task(), batch_of()
    batch["lagged"] = np.array([[0, 1, 1, 0, 4, 0]], np.int32)
    model, rows = encoder("collapsed"), vectors(t, batch)

    def outputs(rows, at):
        return jnp.square(t._outputs(model, rows, batch, None)[1][0, at]).sum()

    run = jax.jit(jax.grad(outputs), compiler_options=QUICK)
    for at, past in ((0, set()), (2, {0}), (4, {3})):
        gradient = run(rows, at)
        reached = {name: {int(i) for i in np.flatnonzero(np.abs(g[0]).sum(-1))} for name, g in gradient.items()}
        assert reached["like"] == reached["history"] == past
        assert reached["candidate"] == reached["query_tab"] == {at}
