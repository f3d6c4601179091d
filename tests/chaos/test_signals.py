"""SIGTERM at the worst moments of a run, and what else may happen to one process: nothing but time is lost.

Each test runs to the end and compares with a run that nobody disturbed, bit for bit.
"""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from recscale import evaluate, reading, record, train, training
from recscale.checkpoint import Checkpoints
from recscale.events import read_events
from recscale.goodput import goodput
from recscale.lease import Held, Lease, holder
from recscale.preemption import Preempted
from tests.same_run import assert_same_run, measured
from tests.tiny_run import SAMPLED, make_log, tiny

pytestmark = pytest.mark.slow
PLAN = {
    "train__epochs": 2.0,
    "train__checkpoint_every": 4,
    "train__eval_every": 6,
    "train__select": "nats min",
    "train__keep_steps": (6,),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return make_log(tmp_path_factory.mktemp("planted") / "log")


@pytest.fixture(scope="module")
def config(log):
    return tiny("hstu", log, **PLAN, **SAMPLED)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train.train(config, folder)["steps"] > 20
    return folder


def told_at(monkeypatch, owner: object, name: str, call: int) -> None:
    """Send SIGTERM to this process when `owner.name` is called for the call-th time."""
    real, calls = getattr(owner, name), []

    def noisy(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, noisy)


MOMENTS = {
    "a step": (train, "place_batch", 9, 9),
    "the first step": (train, "place_batch", 1, 1),
    "a step that is saved anyway": (train, "place_batch", 4, 4),
    "a step that is measured": (train, "place_batch", 6, 6),
    "the last step": (train, "place_batch", 28, 28),
    "a save": (Checkpoints, "save", 1, 5),
    "the save of the best": (Checkpoints, "save", 2, 7),
    "an evaluation": (evaluate, "rank_catalogue", 2, 6),
    "the final evaluation": (training, "collapse", 1, None),
    "reading the log": (reading, "views", 1, 0),
    "counting the costs": (training, "costs", 1, 0),
}


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.replace(" ", "-"))
def test_a_signal_loses_nothing(moment, config, undisturbed, tmp_path, monkeypatch):
    owner, name, call, step = MOMENTS[moment]
    steps = record.read(undisturbed)["steps"]
    if moment == "the last step":
        call = step = steps
    with monkeypatch.context() as patched:
        told_at(patched, owner, name, call)
        try:
            train.train(config, tmp_path)
            assert step is None, "the signal was not heard"
        except Preempted:
            assert step is not None
    if step is not None:  # None: what was left to do was less than to stop
        assert not (tmp_path / "DONE").exists() and record.read(tmp_path)["status"] == "running"
        assert read_events(tmp_path)[-1]["event"] == "preempted" and holder(tmp_path) is None
        saved = [int(path.name) for path in (tmp_path / "checkpoints").glob("*") if path.name.isdigit()]
        assert max(saved, default=0) == step
        before = len(measured(tmp_path))
        train.train(config, tmp_path)
        assert len(measured(tmp_path)) > before
    assert (tmp_path / "DONE").read_text() == "ok\n"
    assert_same_run(config, tmp_path, undisturbed)
    assert (tmp_path / "kept" / "6").is_dir()


def test_told_twice_it_saves_twice(config, undisturbed, tmp_path, monkeypatch):
    """Told again while it makes up for the evaluation that the first signal cut short."""
    for _ in range(2):
        with monkeypatch.context() as patched:
            told_at(patched, evaluate, "rank_catalogue", 2)
            with pytest.raises(Preempted):
                train.train(config, tmp_path)
    train.train(config, tmp_path)
    assert_same_run(config, tmp_path, undisturbed)


def test_an_evaluation_made_up_for_twice_counts_once(config, undisturbed, tmp_path, monkeypatch):
    """Told to stop in an evaluation, then killed right after it was made up for: the checkpoint still asks for it."""

    class Killed(BaseException):
        pass

    def dies(mesh, batch):
        raise Killed

    with monkeypatch.context() as patched:
        told_at(patched, evaluate, "rank_catalogue", 2)
        with pytest.raises(Preempted):
            train.train(config, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(train, "place_batch", dies)
        with pytest.raises(Killed):
            train.train(config, tmp_path)
    assert any("metric" in row for row in measured(tmp_path))
    train.train(config, tmp_path)
    assert_same_run(config, tmp_path, undisturbed)


@pytest.mark.parametrize("jump", [86400.0, -86400.0], ids=["forward", "back"])
def test_a_clock_that_jumps_changes_nothing(jump, config, undisturbed, tmp_path, monkeypatch):
    real = time.time
    place, calls = train.place_batch, []

    def jumps(mesh, batch):
        calls.append(None)
        if len(calls) == 5:
            monkeypatch.setattr(time, "time", lambda: real() + jump)
        return place(mesh, batch)

    monkeypatch.setattr(train, "place_batch", jumps)
    began = time.monotonic()
    book = train.train(config, tmp_path)
    assert 0 < book["seconds"]["wall"] <= time.monotonic() - began
    spent = goodput(read_events(tmp_path))
    assert spent.wall <= time.monotonic() - began + 1 and min(spent.causes.values()) >= 0
    assert_same_run(config, tmp_path, undisturbed)


def test_a_nan_at_a_step_is_a_result_of_that_step(config, tmp_path, monkeypatch):
    make = train.make_train_step

    def poisoned(run):
        step = make(run)

        def one(state, batch):
            state, values = step(state, batch)
            if int(state["step"]) == 7:
                values = values | {"loss": jnp.float32(np.nan)}
            return state, values

        return one

    monkeypatch.setattr(train, "make_train_step", poisoned)
    book = train.train(config, tmp_path)
    assert (book["status"], book["reason"]) == ("diverged", "loss nan at step 7")
    assert (tmp_path / "DONE").read_text() == "diverged\n" and book["evaluations"] == []
    assert [row["step"] for row in measured(tmp_path) if "loss" in row] == list(range(1, 8))


DISKS = {
    "a checkpoint": (Checkpoints, "save", 2, "No space left"),
    "the record": (record, "write", 3, "No space left"),
    "the metrics": (record.Metrics, "append", 11, "No space left"),
}


@pytest.mark.parametrize("what", DISKS, ids=lambda what: what.replace(" ", "-"))
def test_a_full_disk_is_an_error_and_loses_nothing(what, config, undisturbed, tmp_path, monkeypatch):
    owner, name, call, words = DISKS[what]
    real, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise OSError(28, "No space left on device", str(tmp_path))
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, full)
        with pytest.raises(OSError, match=words):
            train.train(config, tmp_path)
    assert not (tmp_path / "DONE").exists() and holder(tmp_path) is None
    assert words in (tmp_path / "FAILED").read_text()
    train.train(config, tmp_path)
    assert not (tmp_path / "FAILED").exists()
    assert_same_run(config, tmp_path, undisturbed)


def test_events_that_cannot_be_written_stop_no_run(config, undisturbed, tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    assert train.train(config, tmp_path)["status"] == "ok"
    assert_same_run(config, tmp_path, undisturbed)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user for a moment")
def test_a_workdir_that_cannot_be_written_is_one_line(config, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == 0 and parent.name.startswith(("pytest-of", "pytest-", "test_a_workdir", "popen-")):
            parent.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=str(folder)):
            train.train(config, folder / "run")
        with pytest.raises(PermissionError, match=str(folder)):
            train.train(config, folder)
    finally:
        os.seteuid(0)
    assert list(folder.iterdir()) == []


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(bytes(byte ^ (i % 64 == 0) for i, byte in enumerate(data)))


@pytest.mark.parametrize("how", ["truncated", "corrupted"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    how, config, undisturbed, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        told_at(patched, train, "place_batch", 11)
        with pytest.raises(Preempted):
            train.train(config, tmp_path)
    newest = tmp_path / "checkpoints" / "11" / "state"
    for data in newest.rglob("d/*"):  # one of them may be a copy that nothing refers to
        damage(data, how)
    train.train(config, tmp_path)
    said = capsys.readouterr().err
    assert "broken checkpoint" in said and "Falling back to step 8" in said
    assert_same_run(config, tmp_path, undisturbed)


def test_a_worker_that_lost_its_lease_writes_no_more(config, tmp_path, monkeypatch):
    """As after a long suspension: another worker has taken over, and this one must not touch the run."""
    place, calls = train.place_batch, []
    kept = SimpleNamespace(files=set())

    def suspended(mesh, batch):
        calls.append(None)
        if len(calls) == 6:
            (beat,) = (tmp_path / "lease").glob("*.beat")
            beat.rename(beat.with_name("another.beat"))
            time.sleep(0.3)
            kept.files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json*")}
        return place(mesh, batch)

    monkeypatch.setattr("recscale.lease.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("recscale.worker.Lease.take", lambda folder: real_take(folder, beat=0.1))
    monkeypatch.setattr(train, "place_batch", suspended)
    with pytest.raises(Held, match="another worker took the lease"):
        train.train(config, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in kept.files} == kept.files
    assert (tmp_path / "lease" / "another.beat").exists() and not (tmp_path / "FAILED").exists()


real_take = Lease.take
