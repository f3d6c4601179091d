"""From config to step: causality, packing, costs against the compiler, one trace, nothing fetched by the step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.data.codes import item_counts
from recscale.data.loading import Loader
from recscale.evaluate import evaluate_split
from recscale.layers import denoisers, samplers
from recscale.mesh import place_batch
from recscale.models import MODELS, hstu, sasrec
from recscale.program import abstract_state
from recscale.run import build, collapse, costs, inference, init_state, seen
from recscale.step import make_train_step
from tests.tiny_run import FULL, ITEMS, SAMPLED, make_log, tiny, tiny_dreamrec


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("planted") / "log")


def model_of(name: str, length: int, width: int = 4, heads: int = 2, depth: int = 2):
    """A small model with every part that looks across positions."""
    shape = {"embed_dim": width, "width": width, "depth": depth, "heads": heads, "max_length": length, "dropout": 0.0}
    if name == "hstu":
        shape |= {"qk_dim": width // heads, "v_dim": width // heads, "output_length": 1, "time_bias": True}
        config = hstu.Config(**shape, query_time="next_event", dtype="float32")
    else:
        config = sasrec.Config(**shape, ffn=2 * width, activation="gelu", dtype="float32")
    return config, MODELS[name].Model(config, jax.random.key(0))


def packed_row(length: int) -> dict[str, np.ndarray]:
    """One row of two users and some padding at the end."""
    padding, first = length // 10, length // 3
    segment = np.repeat([1, 2, 0], [first, length - first - padding, padding]).astype(np.int32)
    position = np.concatenate([np.arange(first), np.arange(length - first)]).astype(np.int32)
    time = np.cumsum(np.random.default_rng(0).integers(0, 5000, length)).astype(np.int32)
    batch = {
        "segment_ids": segment,
        "positions": position,
        "timestamp": time,
        "query_timestamp": np.append(time[1:], 0),
    }
    return {name: value[None].astype(np.int32) for name, value in batch.items()}


def reach(name: str, length: int, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, L]: the largest |d hidden[i] / d x[j]| for each i of outputs, and where it may differ from zero."""
    config, model = model_of(name, length)
    batch = packed_row(length)
    x = jax.random.normal(jax.random.key(1), (1, length, config.embed_dim))
    direction = np.zeros((len(outputs), *x.shape), np.float32)
    direction[np.arange(len(outputs)), 0, outputs] = np.linspace(0.3, 1.0, config.embed_dim)

    @jax.jit
    def gradients(x, directions):
        _, pull = jax.vjp(lambda x: model(x, batch), x)
        return jax.lax.map(lambda one: pull(one)[0], directions)

    grads = gradients(x, direction)
    segment, j = batch["segment_ids"][0], np.arange(length)
    allowed = (j[None] <= outputs[:, None]) & (segment[None] == segment[outputs][:, None])
    return np.abs(np.asarray(grads))[:, 0].max(axis=-1), allowed


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
@pytest.mark.parametrize("length", [97, *(pytest.param(length, marks=pytest.mark.slow) for length in (49, 150))])
def test_no_gradient_comes_from_the_future_or_from_another_user(name, length):
    """Exactly zero for every j > i and every other segment; different from zero for every event of the past."""
    outputs = np.flatnonzero(packed_row(length)["segment_ids"][0])
    found, allowed = reach(name, length, outputs)
    assert (found[~allowed] == 0).all()
    assert (found[allowed] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_no_gradient_comes_from_the_future_in_long_rows(name):
    """Beyond 1,024 slots a block of queries is scanned in sub-blocks: the outputs sit on both sides of their edges."""
    length = 1100
    outputs = np.array([0, 137, 138, 265, 266, 365, 366, 367, 500, 965, 966, 989])
    found, allowed = reach(name, length, outputs)
    assert (found[~allowed] == 0).all()
    assert (found[allowed] > 0).mean() > 0.99  # a weight over a thousand events may round to nothing


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_packing_changes_no_users_loss(name, log):
    """Evaluation: the nats of every target, users packed or one per row; the run's parameters are random."""
    found = {}
    for layout in ("packed", "padded"):
        run = build(tiny(name, log, loader__layout=layout, loader__length=12, eval__protocols=(), **FULL))
        state = init_state(run)
        state["tables"]["item"] = state["tables"]["item"] * 50.0  # differences that count
        found[layout] = evaluate_split(run, state, "test", 0)[1]
    assert np.ptp(found["padded"]["nats"]) > 0.5
    np.testing.assert_array_equal(found["packed"]["row"], found["padded"]["row"])
    np.testing.assert_allclose(found["packed"]["nats"], found["padded"]["nats"], rtol=2e-5)


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_packing_changes_no_training_loss(name, log):
    """The same users in one batch: packed, several per row, and one per row."""
    changes = SAMPLED | {"task__shared": "batch", "task__sampler": "uniform"}  # draws that no layout changes
    run = build(tiny(name, log, model__dropout=0.0, **changes))
    state, key = init_state(run), jax.random.key(3)
    losses, shapes = [], []
    for layout, row_length, rows in (("packed", 16, 200), ("packed", 64, 64), ("padded", 16, 200)):
        loader = Loader(
            run.log, run.views["train"], batch_size=rows, length=16, row_length=row_length, layout=layout, shuffle=False
        )
        assert loader.steps_per_epoch == 1
        batch = {k: jnp.asarray(v) for k, v in loader[0].items()}
        batch = run.task.draw(batch, key)

        def loss_of(state, batch):
            look = functools.partial(run.tables.lookup, state["tables"], state["mixers"])
            rows_of = {name: look(table, ids) for name, (table, ids) in run.task.wanted(batch).items()}
            return run.task.loss(state["model"], rows_of, batch, key)

        loss, metrics = jax.jit(loss_of)(state, batch)
        losses.append(float(loss))
        shapes.append((int(metrics["targets"]), int(loader[0]["segment_ids"].max())))
    assert len({targets for targets, _ in shapes}) == 1
    assert [users > 1 for _, users in shapes] == [True, True, False]
    np.testing.assert_allclose(losses, losses[-1], rtol=1e-5)


def forward_flops(name: str, width: int, length: int, monkeypatch, *, attend: bool) -> float:
    """FLOPs of one layer as XLA counts them before optimising; attend=False puts the values in attention's place."""
    config, model = model_of(name, length, width, heads=1, depth=1)
    if not attend:
        monkeypatch.setattr(MODELS[name], "attention", lambda q, k, v, *args, **more: v)
    batch = packed_row(length)
    x = jnp.zeros((1, length, config.embed_dim))
    return jax.jit(lambda m, x: m(x, batch)).lower(model, x).cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_flops_agree_with_the_compiler_on_one_layer(name, monkeypatch):
    """Projections within 10 %; attention within 10 % of the full square, which is what one block of 48 computes.

    `flops` counts the causal half, L (L + 1) / 2 pairs; the compiler sees L * L. With attention taken out, what is left
    is the projections and some element-wise work. One layer, because the compiler counts a scanned body once.
    """
    width, length = 256, 48
    config, _ = model_of(name, length, width, heads=1, depth=1)
    ours = MODELS[name].flops(config, length)
    with_attention = forward_flops(name, width, length, monkeypatch, attend=True)
    without = forward_flops(name, width, length, monkeypatch, attend=False)
    assert without == pytest.approx(ours["projections"], rel=0.1)
    assert with_attention - without == pytest.approx(ours["attention"] * 2 * length / (length + 1), rel=0.1)


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_parameters_counted_are_the_models_leaves(name, log):
    changes = {"table__kind": "hashed", "table__rows": 50, "loader__queries": ("surface",)} | FULL
    run = build(tiny(name, log, model__width=16, model__depth=3, **changes))
    state = abstract_state(run)
    counted = costs(run, run.steps)["parameters"]
    assert counted["dense"] == sum(leaf.size for leaf in jax.tree.leaves(state["model"]))
    assert state["tables"]["item"].shape == (64, 8)  # padding and spare rows are no parameters
    assert counted["tables"] == 50 * 8
    assert counted["context_tables"] == (run.log.columns["surface"].cardinality - 1) * 8


def test_the_dense_part_of_a_table_counts_with_the_table(log):
    run = build(tiny("hstu", log, table__kind="low_rank", table__inner=2, **FULL))
    counted = costs(run, run.steps)
    assert counted["parameters"]["tables"] == ITEMS * 2 + 2 * 8
    assert counted["table"]["bytes"] == 4 * (ITEMS * 2 + 2 * 8) == counted["table"]["bytes_per_item"] * ITEMS
    assert 1 < collapse(run, init_state(run))["information_abundance"] < 2  # vectors of rank two


def test_costs_and_counts_equal_a_plain_loop(log):
    """One user after another, by the formulas written out; two epochs of a training view with a hand-made cut."""
    run = build(tiny("hstu", log, train__epochs=2.0, loader__length=9, **SAMPLED))
    view, items = run.views["train"], run.log.events["item_id"]
    D = width = 8
    gated = keyed = 2 * 4
    projections = attention = head = lookup = events = 0.0
    seen_items: set[int] = set()
    for n in range(len(view)):
        inputs = min(int(view.stop[n] - view.start[n]) - 1, 9)
        seen_items |= set(np.asarray(items[view.start[n] : view.stop[n]]).tolist())
        projections += inputs * 2 * (width * (2 * gated + 2 * keyed) + gated * width)
        attention += sum(2 * (gated + keyed) * (i + 1) for i in range(inputs))
        head += 2 * inputs * (1 + 7) * D
        lookup += 4 * D * inputs
        events += inputs
    steps = run.steps
    epochs = steps * 8 / run.loader.num_rows
    assert epochs == pytest.approx(2.0, rel=0.05)
    flops = costs(run, steps)["flops"]
    expected = {"projections": projections, "attention": attention, "head": head}
    for part, value in expected.items():
        assert flops[part] == pytest.approx(3 * epochs * value), part
    assert flops["train_total"] == pytest.approx(3 * epochs * sum(expected.values()))
    assert flops["lookup_bytes"] == pytest.approx(epochs * lookup)
    counts = seen(run, steps)
    assert counts["events"] == pytest.approx(epochs * events)
    assert counts["examples"] == pytest.approx(epochs * len(view))
    assert counts["unique_users"] == len(view) and counts["unique_items"] == len(seen_items)
    half = costs(run, steps // 2)["flops"]["train_total"]
    assert half == pytest.approx(flops["train_total"] * (steps // 2) / steps)


def counted(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def asked(run) -> tuple[dict[str, np.ndarray], Callable]:
    """The batch of one user with a whole history, and a look-up of vectors that takes no FLOPs."""
    length = run.config.loader.length
    batch = {"item_id": 1 + np.arange(length), "segment_ids": np.ones(length), "positions": np.arange(length)}
    batch |= {"target": np.append(np.zeros(length - 1), 1), "timestamp": np.arange(length)}
    batch = {name: value[None].astype(np.int32) for name, value in batch.items()}
    width = run.model_config.embed_dim
    return batch | {"query_timestamp": batch["timestamp"]}, lambda table, ids: jnp.ones((*ids.shape, width))


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_an_answer_costs_what_the_compiler_counts(name, log):
    """One layer, within 10 %; the compiler sees all L * L pairs of attention."""
    width, length = 256, 48
    sizes = {"embed_dim": width, "width": width, "heads": 1, "max_length": length} | (
        {"qk_dim": width, "v_dim": width} if name == "hstu" else {"ffn": 2 * width}
    )
    run = build(tiny(name, log, loader__length=length, **{f"model__{key}": n for key, n in sizes.items()}, **FULL))
    found, task = inference(run), run.task
    batch, lookup = asked(run)
    square = run.model.flops(run.model_config, length)["attention"] * (length - 1) / (length + 1)
    model = abstract_state(run)["model"]
    encoder = counted(lambda model: task.queries(model, lookup, batch), model)
    assert encoder == pytest.approx(found["encoder"] + square, rel=0.1)
    query, items = jnp.zeros((1, width)), jnp.zeros((ITEMS, width))
    assert counted(task.scores, query, items) == pytest.approx(found["ranking"], rel=0.01)
    assert found["sampling"] == 0 and found["total"] == found["encoder"] + found["ranking"]
    assert costs(run, 1)["inference"] == found


@pytest.mark.parametrize(("denoiser", "combine"), [("mlp1", "mean"), ("dit", "max")])
def test_a_sampled_answer_costs_what_the_compiler_counts(denoiser, combine, log, monkeypatch):
    """One call of the denoiser, for the compiler counts a scanned body once; so many samples that it matters.

    Without the noise, whose draws are thousands of operations on integers.
    """
    monkeypatch.setattr(samplers, "normal", lambda keys, step, dim: jnp.ones((len(keys), dim)))
    width, length, samples = 256, 48, 40
    sizes = {"model__embed_dim": width, "model__max_length": length, "loader__length": length, "loader__row_length": 0}
    sizes |= {"task__width": width, "task__ffn": width, "task__denoiser": denoiser, "task__combine": combine}
    sampler = {"task__sampler": "ddim", "task__sampling_steps": 1, "task__samples": samples}
    run = build(tiny_dreamrec(log, **sizes, **sampler))
    found, task = inference(run), run.task
    batch, lookup = asked(run)
    square = run.model.flops(run.model_config, length)["attention"] * (length - 1) / (length + 1)
    row, model = np.ones(1, np.int32), abstract_state(run)["model"]
    whole = counted(lambda model: task.generate(model, lookup, batch, row), model)
    assert whole == pytest.approx(found["encoder"] + square + found["sampling"], rel=0.1)
    assert found["sampling"] > 0.25 * found["total"]
    query, items = jnp.zeros((1, samples * width)), jnp.zeros((ITEMS, width))
    assert counted(task.scores, query, items) == pytest.approx(found["ranking"], rel=0.1, abs=1.1 * samples * width)
    assert found["total"] == found["encoder"] + found["sampling"] + found["ranking"]


@pytest.mark.parametrize("window", ["prefixes", "last"])
def test_a_denoiser_that_reads_a_history_is_counted_with_what_its_targets_see(window, log):
    """By a plain loop over the targets of an epoch: states up to the target's own; keys and values once a state."""
    run = build(tiny_dreamrec(log, loader__window=window, task__denoiser="dit", loader__segments=0))
    rows = {name: [] for name in ("positions", "target", "segment_ids")}
    for i in range(run.loader.steps_per_epoch):
        for name, parts in rows.items():
            parts.append(run.loader[i][name])
    rows = {name: np.concatenate(parts)[: run.loader.num_rows] for name, parts in rows.items()}
    shape, states = run.task.shape(8), (rows["positions"] + 1)[rows["target"] > 0]
    forward = sum(denoisers.flops("dit", shape, int(n)) for n in states)
    forward += (rows["segment_ids"] > 0).sum() * 2 * 2 * 8 * 8  # depth 1, width 8
    epochs = run.steps * run.config.loader.batch_size / run.loader.num_rows
    assert costs(run, run.steps)["flops"]["head"] == pytest.approx(3 * epochs * forward)
    assert (states.mean() == rows["positions"][rows["segment_ids"] > 0].mean() + 1) == (window == "last")


def test_frequency_is_the_share_of_training_events(log):
    run = build(tiny("hstu", log, **SAMPLED))
    view, items = run.views["train"], run.log.events["item_id"]
    events = np.concatenate([items[a:b] for a, b in zip(view.start, view.stop, strict=True)])
    np.testing.assert_array_equal(item_counts(run.log, view), np.bincount(events, minlength=ITEMS + 1))
    frequency = run.fixed["item_frequency"]
    np.testing.assert_allclose(frequency[:, 0], np.bincount(events, minlength=ITEMS + 1) / len(events), rtol=1e-6)
    assert frequency[0] == 0


def test_steps_of_one_shape_compile_once_and_fetch_nothing(log):
    """One trace for the first state and for what the step returns; with the batch placed, no transfer either way."""
    run = build(tiny("hstu", log, table__kind="capped", table__rows=20, **SAMPLED))
    state, train_step = init_state(run), make_train_step(run)
    batches = [place_batch(run.mesh, run.loader[i]) for i in range(3)]
    state, metrics = train_step(state, batches[0])
    with jax.transfer_guard("disallow"):
        for batch in batches[1:]:
            state, metrics = train_step(state, batch)
    assert train_step._cache_size() == 1
    assert int(state["step"]) == 3 and np.isfinite(metrics["loss"])
    values = {name: array.values(state["tables"][name]) for name, array in run.tables.arrays.items()}
    assert (values["item"][0] == 0).all()  # padding is never trained, nor is what the data says
    np.testing.assert_array_equal(values["item.codes"], run.fixed["item.codes"])
    np.testing.assert_array_equal(values["item_frequency"], run.fixed["item_frequency"])


def test_a_config_the_data_cannot_serve_is_refused(log):
    with pytest.raises(ValueError, match=r"'tab' is not a context column.*surface"):
        build(tiny("hstu", log, loader__queries=("tab",)))
    with pytest.raises(ValueError, match=r"eval: split.name = 'leave_one_out'.*'tset'"):
        build(tiny("hstu", log, eval__final=("tset",)))
    with pytest.raises(ValueError, match=r"data\.num_items = 5, but .* has 63: set it to 0"):
        build(tiny("hstu", log, data__num_items=5))
