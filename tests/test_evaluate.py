"""Evaluation of a whole view against a plain loop over users, and what it must not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale import metrics
from recscale.data.event_log import Column, EventLog
from recscale.data.loading import Loader
from recscale.data.splits import View, leave_one_out
from recscale.evaluate import NonFiniteScore, evaluate
from recscale.layers.kinds import Table
from recscale.layers.ranking import dot_products, rank_catalogue
from recscale.layers.tables import Tables
from recscale.mesh import make_mesh

ITEMS, USERS, DIM, LENGTH = 40, 30, 6, 8


class LastItem:
    """The query is a vector of the input item plus one of its position: enough to tell every slot of a batch apart."""

    catalogue = "item"
    scores = staticmethod(dot_products)

    def queries(self, model, lookup, batch):
        return jnp.asarray(model)[batch["positions"]] + lookup("item", batch["item_id"])

    def item(self, vectors):
        return vectors


TASK = LastItem()
MESHES = ((1, 1, 1), (1, 8, 1), (1, 2, 4))
TABLES = {shape: Tables({"item": Table(ITEMS, DIM)}, make_mesh(*shape)) for shape in MESHES}


def make_log(seed: int = 0) -> EventLog:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 25, USERS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = {"item_id": rng.integers(1, ITEMS + 1, offsets[-1]).astype(np.int32)}
    return EventLog(offsets, events, {"item_id": Column("id")}, ITEMS)


def half_view(log: EventLog, reading: str = "next_item") -> View:
    """The second half of each user's events are targets."""
    start, stop = log.offsets[:-1], log.offsets[1:]
    return View("val", np.arange(USERS, dtype=np.int32), start, start + (stop - start) // 2, stop, reading)


def weights(seed: int = 1):
    rng = np.random.default_rng(seed)
    model = rng.normal(size=(64, DIM)).astype(np.float32)
    return model, {"item": rng.normal(size=(ITEMS + 1, DIM)).astype(np.float32)}


def loader_of(log, view, batch_size=4, length=LENGTH, **more):
    return Loader(log, view, batch_size=batch_size, length=length, shuffle=False, with_example=True, **more)


def run(log, view, loader=None, mesh=(1, 1, 1), model=None, **more):
    values, rows = weights()
    tables = TABLES[mesh]
    arrays = {"item": jax.device_put(tables.arrays["item"].place(rows["item"]), tables.sharding("item"))}
    options = {"ks": (1, 5), "block": 16, "top_k": 5, "chunk": 32, **more}
    loader = loader or loader_of(log, view)
    model = values if model is None else model
    return evaluate(model, arrays, {"item": {}}, tables, TASK, loader, log, view, **options)


def plain(log, view, length=LENGTH):
    """(example, row) -> scores over items 1..V and the items seen before, one user at a time."""
    model, tables = weights()
    table = tables["item"].astype(np.float64)
    found = {}
    for n in range(len(view)):
        one_query = view.reading == "window"
        stop = int(view.target_start[n]) + 1 if one_query else int(view.stop[n])
        first = max(int(view.start[n]), stop - 1 - length)
        for row in range(max(int(view.target_start[n]), first + 1), stop):
            query = model[row - 1 - first] + table[log.events["item_id"][row - 1]]
            seen = set(log.events["item_id"][int(log.offsets[view.user[n]]) : row].tolist())
            found[n, row] = ((query * table[1:]).sum(axis=1), seen)
    return found


def order_of(scores, hidden):
    return [v for v in sorted(range(1, ITEMS + 1), key=lambda v: (-scores[v - 1], v)) if v not in hidden]


def value(rows, metric, where="all"):
    (row,) = [row for row in rows if row["metric"] == metric and row["slice"] == where]
    return row["value"]


@pytest.mark.parametrize("split", ["last", "half"])
def test_ranks_and_nats_equal_a_plain_loop(split: str):
    log = make_log()
    view = leave_one_out(log)["test"] if split == "last" else half_view(log)
    rows, got = run(log, view, step=7)
    want = plain(log, view)
    assert list(zip(got["example"].tolist(), got["row"].tolist(), strict=True)) == sorted(want)
    for i, key in enumerate(sorted(want)):
        scores, seen = want[key]
        target = int(log.events["item_id"][key[1]])
        assert got["rank"][i] == 1 + order_of(scores, set()).index(target)
        assert got["rank_unseen"][i] == 1 + order_of(scores, seen - {target}).index(target)
        assert got["nats"][i] == pytest.approx(np.log(np.exp(scores).sum()) - scores[target - 1], abs=2e-5)
    assert (got["rank_unseen"] < got["rank"]).any()
    assert {(row["step"], row["split"], row["n"]) for row in rows} == {(7, view.name, len(want))}
    assert value(rows, "hr@5/unseen") == metrics.hit_rate(got["rank_unseen"], 5).mean()
    assert value(rows, "ndcg@5") == metrics.ndcg(got["rank"], 5).mean()
    assert value(rows, "mrr") == metrics.reciprocal_rank(got["rank"]).mean()
    shown = {v for scores, _ in want.values() for v in order_of(scores, set())[:5]}
    assert value(rows, "coverage@5") == len(shown) / ITEMS


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        ({"batch_size": 1}, {}),
        ({"batch_size": 64}, {"chunk": 7}),
        ({"layout": "padded"}, {"chunk": 1000}),
        ({"row_length": 30}, {"block": 1000}),
        ({}, {"block": 1}),
    ],
)
def test_nothing_depends_on_batch_chunk_block_or_packing(loader: dict, options: dict):
    log = make_log()
    view = half_view(log)
    want_rows, want = run(log, view)
    rows, got = run(log, view, loader_of(log, view, **loader), **options)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5, err_msg=name)
    assert [(row["metric"], row["n"]) for row in rows] == [(row["metric"], row["n"]) for row in want_rows]


def test_batches_and_chunks_do_not_recompile():
    log = make_log()
    run(log, half_view(log))
    size = rank_catalogue._cache_size()
    run(log, half_view(log), protocols=("full", "unseen"))
    assert rank_catalogue._cache_size() == size


def test_window_view_scores_sets_of_targets():
    log = make_log()
    view = half_view(log, "window")
    rows, got = run(log, view)
    want = plain(log, view)
    assert got["example"].tolist() == list(range(USERS))
    full, unseen, ideal = [], [], []
    for n in range(USERS):
        scores, seen = want[n, int(view.target_start[n])]
        targets = log.events["item_id"][view.target_start[n] : view.stop[n]].tolist()
        full.append([v in targets for v in order_of(scores, set())[:5]])
        unseen.append([v in targets for v in order_of(scores, seen - set(targets))[:5]])
        ideal.append(sum(1 / np.log2(i + 2) for i in range(min(5, len(targets)))))
        assert got["num_targets"][n] == len(targets)
        assert got["nats"][n] == pytest.approx(np.log(np.exp(scores).sum()) - scores[targets[0] - 1], abs=2e-5)
    assert got["hits"].tolist() == full and got["hits_unseen"].tolist() == unseen and full != unseen
    gains = (np.array(full) / np.log2(np.arange(5) + 2)[None]).sum(axis=1)
    assert value(rows, "ndcg_ratio_of_means@5") == pytest.approx(gains.mean() / np.mean(ideal))
    assert value(rows, "ndcg_mean_of_ratios@5") == pytest.approx((gains / ideal).mean())
    assert value(rows, "recall@5/unseen") == pytest.approx((np.sum(unseen, axis=1) / got["num_targets"]).mean())
    with pytest.raises(ValueError, match="top_k >= 5"):
        run(log, view, top_k=3)


def test_slices_over_examples_and_over_targets():
    log = make_log()
    view = half_view(log)
    size = view.stop - view.target_start
    some_users = np.arange(USERS) < 10
    items = log.events["item_id"][
        np.concatenate([np.arange(a, b) for a, b in zip(view.target_start, view.stop, strict=True)])
    ]
    slices = {"users": some_users, "items": items <= 5, "nobody": np.zeros(USERS, bool)}
    rows, got = run(log, view, slices=slices)
    assert len(got["row"]) < size.sum()  # long users lose their oldest targets to the truncation
    of_users, of_items = got["example"] < 10, log.events["item_id"][got["row"]] <= 5
    assert value(rows, "mrr", "users") == pytest.approx((1 / got["rank"][of_users]).mean())
    assert value(rows, "mrr", "items") == pytest.approx((1 / got["rank"][of_items]).mean())
    empty = [row for row in rows if row["slice"] == "nobody"]
    assert empty and all(row["n"] == 0 and row["value"] is None and row["stderr"] is None for row in empty)
    with pytest.raises(ValueError, match="slice 'x': 3 values"):
        run(log, view, slices={"x": np.ones(3, bool)})


def test_a_slice_over_the_targets_of_a_window_goes_by_the_first_target():
    log = make_log()
    view = half_view(log, "window")
    count = view.stop - view.target_start
    assert (count > 1).any()  # else a slice over targets is one over examples
    targets = np.concatenate([log.events["item_id"][a:b] for a, b in zip(view.target_start, view.stop, strict=True)])
    rows, got = run(log, view, slices={"items": targets <= 5})
    first = log.events["item_id"][view.target_start] <= 5
    assert first.any() and not first.all()
    assert value(rows, "nats", "items") == pytest.approx(got["nats"][first].mean())


def test_nats_alone_are_the_same_nats():
    log = make_log()
    view = half_view(log)
    rows, got = run(log, view, nats_only=True)
    assert set(got) == {"example", "row", "nats"} and [row["metric"] for row in rows] == ["nats"]
    np.testing.assert_array_equal(got["nats"], run(log, view)[1]["nats"])


def test_one_protocol_leaves_the_other_out():
    log = make_log()
    rows, got = run(log, half_view(log), protocols=("full",), top_k=0)
    assert "rank_unseen" not in got
    assert {row["metric"] for row in rows} == {"nats", "hr@1", "hr@5", "ndcg@1", "ndcg@5", "mrr"}


def test_a_nan_names_the_number_of_bad_rows():
    log = make_log()
    view = leave_one_out(log)["test"]
    model, _ = weights()
    model[int(np.minimum(log.lengths - 1, LENGTH).min()) - 1] = np.nan
    bad = int((np.minimum(log.lengths - 1, LENGTH) == np.minimum(log.lengths - 1, LENGTH).min()).sum())
    with pytest.raises(NonFiniteScore, match=f"{bad} of {USERS} queries have a NaN or infinite score"):
        run(log, view, model=model)


def test_a_loader_of_another_view_is_refused():
    log = make_log()
    view = half_view(log)
    with pytest.raises(ValueError, match="are not the log's item"):
        run(log, view, loader_of(log, leave_one_out(log)["val"]))
    with pytest.raises(ValueError, match="examples missing"):
        run(log, view, loader_of(log, view, process_count=2))


def test_history_before_the_view_counts_as_seen():
    log = make_log()
    view = leave_one_out(log)["test"]
    short = dataclasses.replace(view, start=view.target_start - 1)
    for key, array in run(log, view, loader_of(log, view, length=1))[1].items():
        np.testing.assert_array_equal(array, run(log, short, loader_of(log, short, length=1))[1][key])


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_a_mesh_gives_the_same(mesh):
    log = make_log()
    view = half_view(log)
    rows, want = run(log, view)
    got_rows, got = run(log, view, loader_of(log, view, batch_size=8), mesh=mesh, block=4, chunk=30)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5, err_msg=name)
    for found, expected in zip(got_rows, rows, strict=True):
        assert (found["metric"], found["n"]) == (expected["metric"], expected["n"])
        assert found["value"] == pytest.approx(expected["value"], abs=2e-5)
