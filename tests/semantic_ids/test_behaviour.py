"""Behaviour vectors: from a run's checkpoint, from a file, and beside content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale import record
from recscale.checkpoint import Checkpoints
from recscale.data.event_log import Column, EventLog
from recscale.data.event_log_writer import write
from recscale.data.prepare import prepare
from recscale.layers.kinds import Table
from recscale.layers.tables import Tables
from recscale.mesh import make_mesh
from recscale.semantic_ids import behaviour
from recscale.semantic_ids.content import ContentError
from recscale.serve.recommender import Recommender
from recscale.train import train
from tests.tiny_run import make_log, tiny

V = 12


def log_of(items: int = V) -> EventLog:
    ids = np.arange(1, items + 1, dtype=np.int32)
    return EventLog(np.array([0, items]), {"item_id": ids}, {"item_id": Column("id")}, items)


KINDS = {
    "full": Table(V, 4),
    "low_rank": Table(V, 4, kind="low_rank", inner=2),
    "hashed": Table(V, 4, kind="hashed", rows=8, parts=2),
}


def write_run(workdir, spec: Table, log: EventLog, folder: str, seed: int) -> np.ndarray:
    """A run's folder with a checkpoint of random tables of this kind; returns its item vectors [V, D]."""
    tables = Tables({"item": spec}, make_mesh(1, 1, 1, jax.devices()[:1]))
    arrays, mixers = jax.jit(tables.init)(jax.random.key(seed))
    state = {"tables": arrays, "mixers": mixers, "step": jnp.zeros((), jnp.int32)}
    with Checkpoints(workdir / folder, keep=1) as checkpoints:
        checkpoints.save(3, state, {})
    shape = {key: getattr(spec, key) for key in ("kind", "rows", "parts", "inner", "combine", "dtype")}
    config = {"data": {"path": str(log.path)}, "table": shape, "model": {"embed_dim": spec.dim}}
    config |= {"study": "", "seed": 0, "cell": {"name": "", "axes": {}, "coordinates": {}}}
    record.write(workdir, record.new(config))
    lookup = jax.jit(lambda arrays, mixers, ids: tables.lookup(arrays, mixers, "item", ids))
    return np.asarray(lookup(arrays, mixers, jnp.arange(1, V + 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_vectors_of_a_run_whatever_the_kind_of_its_table(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(behaviour, "_BLOCK", 5)  # the last block is not full
    log = log_of()
    newest = write_run(tmp_path, KINDS[kind], log, "checkpoints", 0)
    found = behaviour.from_run(tmp_path, log)
    assert found.shape == (V + 1, 4) and found.dtype == np.float32 and not found[0].any()
    np.testing.assert_allclose(found[1:], newest, rtol=1e-5, atol=1e-8)
    selected = write_run(tmp_path, KINDS[kind], log, "best", 1)
    np.testing.assert_allclose(behaviour.from_run(tmp_path, log)[1:], selected, rtol=1e-5, atol=1e-8)
    assert np.abs(newest - selected).max() > 1e-3


def test_a_run_over_other_items_is_refused(tmp_path):
    log = write(log_of(), tmp_path / "log")
    write_run(tmp_path, KINDS["full"], log, "best", 0)
    with pytest.raises(ContentError, match="with 12 items, which are not the 13 of this log"):
        behaviour.from_run(tmp_path, log_of(V + 1))
    (tmp_path / "log").rename(tmp_path / "moved")
    with pytest.raises(ContentError, match="does not fit this config; it differs in") as error:
        behaviour.from_run(tmp_path, log_of(9 * V))  # the log is gone: the shapes tell
    assert "\n" not in str(error.value)


def test_a_run_without_a_checkpoint_or_item_vectors(tmp_path):
    log = log_of()
    write_run(tmp_path, KINDS["hashed"], log, "best", 0)
    config = record.read(tmp_path)["config"]
    lacking = {"kind": "low_rank", "rows": 0, "parts": 1, "inner": 2}
    record.write(tmp_path, record.new(config | {"table": config["table"] | lacking}))
    with pytest.raises(ContentError, match=r"lacks mixers\.item\.projection|does not fit this config"):
        behaviour.from_run(tmp_path, log)
    (tmp_path / "best").rename(tmp_path / "kept")
    with pytest.raises(ContentError, match="no checkpoint there"):
        behaviour.from_run(tmp_path, log)


@pytest.mark.slow
def test_the_vectors_of_a_trained_run_are_those_it_ranks_by(tmp_path):
    path = make_log(tmp_path / "log", users=40)
    log = EventLog.open(path)
    train(tiny("sasrec", path), tmp_path / "run")
    served = Recommender.from_run(tmp_path / "run")
    lookup = jax.jit(lambda arrays, mixers, ids: served.run.tables.lookup(arrays, mixers, "item", ids))
    expected = lookup(served.arrays, served.mixers, jnp.arange(1, log.num_items + 1))
    found = behaviour.from_run(tmp_path / "run", log)[1:]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.linalg.norm(found, axis=1).min() > 0


def test_no_run(tmp_path):
    with pytest.raises(ContentError, match="no run here") as error:
        behaviour.from_run(tmp_path, log_of())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("padded", [False, True])
def test_a_file_with_or_without_padding(tmp_path, padded):
    x = np.random.default_rng(0).normal(size=(V, 3))
    np.save(tmp_path / "x.npy", np.concatenate([np.zeros((1, 3)), x]) if padded else x)
    found = behaviour.from_file(tmp_path / "x.npy", log_of())
    assert found.dtype == np.float32 and not found[0].any()
    np.testing.assert_array_equal(found[1:], x.astype(np.float32))


WRONG = {
    "rows": (np.ones((V - 1, 3)), r"shape \[11, 3\], expected \[12, width\], or \[13, width\]"),
    "axes": (np.ones(V), r"shape \[12\]"),
    "padding": (np.ones((V + 1, 3)), "row 0 is padding, but it is not zeros"),
    "NaN": (np.where(np.arange(V)[:, None] == 4, np.nan, np.ones((V, 3))), "1 rows with NaN or infinite values, .* 4"),
    "text": (np.array([["a"]] * V), "expected numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused(tmp_path, case):
    array, message = WRONG[case]
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ContentError, match=message) as error:
        behaviour.from_file(tmp_path / "x.npy", log_of())
    assert str(tmp_path) in str(error.value)


def test_no_file(tmp_path):
    (tmp_path / "x.npy").write_text("no numpy")
    for name in ("x.npy", "none.npy"):
        with pytest.raises(ContentError, match=r"no \.npy file of numbers"):
            behaviour.from_file(tmp_path / name, log_of())


def test_joined_gives_each_part_its_share_of_the_distance():
    rng = np.random.default_rng(0)
    a, b = 5 + 1000 * rng.normal(size=(V + 1, 7)), 0.001 * rng.normal(size=(V + 1, 2))
    found = behaviour.joined(a, b, weight=0.25)
    assert found.shape == (V + 1, 9) and found.dtype == np.float32 and not found[0].any()
    share = (found[1:] ** 2).sum(axis=1).mean(), (found[1:, 7:] ** 2).sum(axis=1).mean()
    assert share == (pytest.approx(1), pytest.approx(0.25))
    np.testing.assert_allclose(found[1:].mean(axis=0), 0, atol=1e-6)
    distance = np.linalg.norm(found[1:, :7] - found[1, :7], axis=1) / np.linalg.norm(a[1:] - a[1], axis=1).clip(1e-9)
    np.testing.assert_allclose(distance[1:], distance[1], rtol=1e-4)
    assert not behaviour.joined(a, b, weight=0)[:, 7:].any()


def test_parts_that_cannot_be_joined():
    x = np.random.default_rng(0).normal(size=(V + 1, 3))
    with pytest.raises(ContentError, match="content of 13 rows, behaviour of 12"):
        behaviour.joined(x, x[1:])
    with pytest.raises(ContentError, match="weight = 2"):
        behaviour.joined(x, x, weight=2)
    with pytest.raises(ContentError, match="all behaviour vectors are equal"):
        behaviour.joined(x, np.ones((V + 1, 2)))


@pytest.mark.parametrize(("name", "folder"), [("beauty", "amazon2014"), ("yelp", "yelp")])
def test_real_files(tmp_path, recscale_data, recscale_data_file, name, folder):
    path = recscale_data_file(f"{folder}/{name}_cf_emb32.npy")
    log = prepare(name, tmp_path / "log", source=recscale_data)
    found = behaviour.from_file(path, log)
    assert found.shape == (log.num_items + 1, 32)
    np.testing.assert_array_equal(found[1:], np.load(path)[log.items["raw_id"][1:] - 1])
