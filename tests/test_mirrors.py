"""Mirrors show what metrics.jsonl holds; one that fails, hangs or is not there is counted, and stops nothing."""

import importlib.util
import struct
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from recscale import mirrors
from recscale.mirrors import MIRRORS, open_mirrors, scalars

RECORD = {"study": "axes", "run_id": "cell-s0-0123", "config": {"seed": 0, "model": {"width": 8}}}
LOSSES = [{"step": step, "loss": 1 / step, "seconds": 0.5 * step} for step in range(1, 21)]
SCORE = {"step": 20, "split": "test", "slice": "all", "metric": "ndcg@10", "value": 0.3, "stderr": 0.01, "n": 5}
ROWS = [*LOSSES, SCORE, SCORE | {"step": 10, "final": True, "stderr": None}]


class Kept:
    """A mirror that keeps what it is shown; `before` runs first and may raise or wait."""

    def __init__(self, before=lambda step: None, before_close=lambda: None):
        self.rows: list = []
        self.closed = 0
        self.before, self.before_close = before, before_close

    def log(self, step, values):
        self.before(step)
        self.rows.append((step, dict(values)))

    def close(self):
        self.before_close()
        self.closed += 1


def shown(names: str, workdir: Path = Path(), rows=None) -> dict[str, int]:
    """Failures after all rows were handed over."""
    opened = open_mirrors(names, workdir, RECORD)
    for row in ROWS if rows is None else rows:
        opened.log(row["step"], row)
    opened.close()
    return opened.failures


@pytest.fixture
def kept(monkeypatch) -> dict[str, Kept]:
    """Mirrors "good" and "bad" in place of the real ones."""
    found = {"good": Kept(), "bad": Kept()}
    monkeypatch.setattr(mirrors, "MIRRORS", {name: lambda *_, m=mirror: m for name, mirror in found.items()})
    monkeypatch.setattr(mirrors, "CLOSE_SECONDS", 0.5)
    return found


def fail(*_):
    raise RuntimeError("no\nroom")


def test_rows_become_named_numbers():
    assert scalars(ROWS[1]) == {"train/loss": 0.5, "train/seconds": 1.0}
    assert scalars(SCORE) == {"test/all/ndcg@10": 0.3, "test/all/ndcg@10.stderr": 0.01}
    assert scalars(ROWS[-1]) == {"final/test/all/ndcg@10": 0.3}
    assert scalars({"step": 1, "loss": None, "seconds": float("inf"), "note": "x", "flag": True}) == {}


def test_every_row_is_shown_in_order_and_the_mirror_is_closed(kept, capsys):
    assert shown("good") == {"good": 0}
    assert kept["good"].rows == [(row["step"], scalars(row)) for row in ROWS] and kept["good"].closed == 1
    assert capsys.readouterr().err == ""


def test_no_rows_open_nothing(monkeypatch):
    monkeypatch.setattr(mirrors, "MIRRORS", {"never": fail})
    assert shown("never", rows=[]) == {"never": 0}
    assert shown("") == {}


def test_names_are_checked_at_the_start():
    with pytest.raises(ValueError, match="--mirror=tensorbord,wandb: found tensorbord, expected some of tensorboard, "):
        open_mirrors("tensorbord,wandb", Path(), RECORD)
    assert set(open_mirrors("wandb, wandb,", Path(), RECORD).failures) == {"wandb"}


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt, ImportError])
def test_a_mirror_that_fails_is_said_once_and_counted_and_the_other_goes_on(kept, capsys, error):
    def before(step):
        if step % 5 == 0:
            raise error("no\nroom")

    kept["bad"].before = before
    assert shown("bad,good") == {"bad": 6, "good": 0}
    assert len(kept["good"].rows) == len(ROWS) and len(kept["bad"].rows) == len(ROWS) - 6
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"mirror bad: {error.__name__}: no room; the run goes on, its files have every row"
    assert second == "mirror bad: 6 rows were not shown"


def test_a_mirror_that_cannot_be_opened_is_tried_once(monkeypatch, capsys):
    tries = []
    monkeypatch.setattr(mirrors, "MIRRORS", {"bad": lambda *_: tries.append(1) or fail()})
    assert shown("bad") == {"bad": len(ROWS)}
    assert len(tries) == 1 and capsys.readouterr().err.count("no room") == 1


def test_a_mirror_that_cannot_be_closed_is_said(kept, capsys):
    kept["bad"].before_close = fail
    assert shown("bad") == {"bad": 0}
    assert capsys.readouterr().err.count("mirror bad: closing: RuntimeError: no room") == 1


def test_a_mirror_that_hangs_holds_up_nothing_but_the_end_and_that_for_a_moment(kept, monkeypatch, capsys):
    monkeypatch.setattr(mirrors, "WAITING_ROWS", 8)
    free = threading.Event()
    kept["bad"].before = lambda step: free.wait(20)
    began = time.monotonic()
    opened = open_mirrors("bad", Path(), RECORD)
    for row in ROWS:
        opened.log(row["step"], row)
    assert time.monotonic() - began < 0.4
    opened.close()
    assert time.monotonic() - began < 3
    free.set()
    assert len(ROWS) - 2 <= opened.failures["bad"] <= len(ROWS)
    assert "8 rows wait, and it takes no more" in capsys.readouterr().err


@pytest.mark.parametrize("name", MIRRORS)
def test_a_package_that_is_not_there_is_one_line(name, tmp_path, monkeypatch, capsys):
    package = "tensorboardX" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does to forbid an import
    assert shown(name, tmp_path) == {name: len(ROWS)}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and f"mirror {name}: ModuleNotFoundError" in said[0]
    assert "pip install 'recscale[mirrors]'" in said[0]


def test_tensorboard_cuts_what_an_earlier_attempt_wrote_further_on(tmp_path, monkeypatch):
    calls: list = []

    class Writer:
        def __init__(self, **arguments):
            calls.append(arguments)

        def add_scalar(self, name, value, step):
            calls.append((step, name, value))

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    assert shown("tensorboard", tmp_path, LOSSES[6:7]) == {"tensorboard": 0}
    assert calls[0]["logdir"] == str(tmp_path / "tensorboard") and calls[0]["purge_step"] == 7
    assert calls[1:] == [(7, "train/loss", 1 / 7), (7, "train/seconds", 3.5), "closed"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX: pip install it")
def test_tensorboard_files_hold_every_number(tmp_path):
    assert shown("tensorboard", tmp_path) == {"tensorboard": 0}
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):  # a record: length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += length + 16
    expected = [(row["step"], name.replace("@", "_"), value) for row in ROWS for name, value in scalars(row).items()]
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected])


class FakeTracker(types.ModuleType):
    """What wandb and trackio have in common: init() gives a run with log() and finish()."""

    def __init__(self):
        super().__init__("fake")
        self.started: dict = {}
        self.logged: list = []

    def init(self, **arguments):
        self.started = arguments
        return self

    def Settings(self, **arguments):
        return arguments

    def define_metric(self, name, step_metric):
        self.logged.append((name, step_metric))

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")


@pytest.fixture
def wandb(monkeypatch, tmp_path) -> FakeTracker:
    """A fake wandb on a machine without a key."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_one_run_over_all_attempts_whatever_the_order_of_steps(wandb, tmp_path):
    assert shown("wandb", tmp_path) == {"wandb": 0}
    started = wandb.started
    assert (started["id"], started["resume"], started["project"]) == ("cell-s0-0123", "allow", "axes")
    assert started["dir"] == str(tmp_path) and started["config"] == RECORD["config"]
    assert wandb.logged[:2] == [("*", "step"), (None, {"step": 1, "train/loss": 1.0, "train/seconds": 0.5})]
    assert wandb.logged[-2:] == [(None, {"step": 10, "final/test/all/ndcg@10": 0.3}), "finished"]


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({}, "machine api.wandb.ai login user password key\n", "online"),
        ({}, "machine elsewhere login user password key\n", "offline"),
        ({}, "not a netrc file\n", "offline"),
        ({"WANDB_BASE_URL": "https://elsewhere:8080/"}, "machine elsewhere login user password key\n", "online"),
        ({"WANDB_API_KEY": "key"}, "", "online"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_MODE": "disabled"}, "", "disabled"),
    ],
)
def test_wandb_never_asks_for_a_key(wandb, tmp_path, monkeypatch, environment, netrc, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    assert shown("wandb", tmp_path, LOSSES[:1]) == {"wandb": 0}
    assert wandb.started["mode"] == mode


def test_trackio_is_one_run_over_all_attempts(tmp_path, monkeypatch):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    assert shown("trackio", tmp_path) == {"trackio": 0}
    assert (fake.started["name"], fake.started["resume"]) == ("cell-s0-0123", "allow")
    assert fake.logged[0] == (1, {"train/loss": 1.0, "train/seconds": 0.5}) and fake.logged[-1] == "finished"
