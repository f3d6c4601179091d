"""The loop: a run that is killed and resumed is the unbroken run; bad input and divergence end in one clear line."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from recscale import record, train, training
from recscale.checkpoint import Checkpoints
from recscale.run import build
from tests.same_run import assert_same_run
from tests.tiny_run import FULL, SAMPLED, make_log, tiny

ROOT = Path(__file__).resolve().parent.parent
SELECT = {"train__select": "nats min", "train__eval_every": 20}


class Killed(BaseException):
    """Stands for the process ending at once."""


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return make_log(tmp_path_factory.mktemp("planted") / "log")


def arguments(config: ConfigDict, log: Path, workdir: Path) -> list[str]:
    """The command line of a tiny HSTU run: every difference from the shipped config as an override."""
    found = [sys.executable, "-m", "recscale.train", "--config=configs/hstu_planted.py", f"--workdir={workdir}"]
    for section in ("data", "loader", "model", "table", "task", "optim", "train", "eval"):
        for key, value in config[section].items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            if not (isinstance(value, tuple) and len(value) != 1):
                found.append(f"--config.{section}.{key}={text}")
    return [*found, "--config.split.train_users=150", "--config.split.eval_users=50"]


def kill_when(command: list[str], due: Callable[[], bool]) -> None:
    """Run a command and end it by SIGKILL as soon as `due`; fails where it ends by itself first."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 300
    while process.poll() is None and not due() and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()


@pytest.mark.slow
def test_a_run_killed_three_times_equals_the_unbroken_run(log, tmp_path):
    """SIGKILL twice mid-epoch at random steps and once while a checkpoint is being written."""
    changes = {"train__epochs": 6.0, "train__checkpoint_every": 7, "loader__batch_size": 4} | SELECT
    config = tiny("hstu", log, **changes, **SAMPLED).unlock()
    config.split = ConfigDict({"name": "by_user", "train_users": 150, "eval_users": 50, "eval_targets": 1})
    config.cell.name = "hstu_planted"
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    train.train(config.lock(), unbroken)
    steps = record.read(unbroken)["steps"]
    assert steps > 100

    def reached(step: int) -> bool:
        lines = (broken / "metrics.jsonl").read_bytes().count(b"\n") if (broken / "metrics.jsonl").exists() else 0
        return lines >= step

    rng = random.Random(0)
    first, second, third = (rng.randrange(int(steps * low), int(steps * (low + 0.2))) for low in (0.1, 0.35, 0.6))
    moments = (
        lambda: reached(first),
        lambda: reached(second) and any((broken / "checkpoints").glob("*tmp*")),
        lambda: reached(third),
    )
    command = arguments(config, log, broken)
    for due in moments:
        kill_when(command, due)
        assert not (broken / "DONE").exists()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "resumed at step" in ended.stderr
    assert_same_run(config, broken, unbroken)


@pytest.mark.parametrize("model", ["hstu", pytest.param("sasrec", marks=pytest.mark.slow)])
def test_resuming_mid_epoch_equals_the_unbroken_run(model, log, tmp_path, monkeypatch):
    """Dropout, negatives and data go on as if nothing had happened; the last checkpoint is some steps old."""
    config = tiny(model, log, train__epochs=1.6, train__checkpoint_every=5, model__depth=2, **SAMPLED)
    train.train(config, tmp_path / "unbroken")
    steps = record.read(tmp_path / "unbroken")["steps"]
    per_epoch = build(config).loader.num_rows / config.loader.batch_size
    assert per_epoch < steps and steps > 13

    place, calls = train.place_batch, []

    def dies_at_step_13(mesh, batch):
        calls.append(None)
        if len(calls) == 13:
            raise Killed
        return place(mesh, batch)

    monkeypatch.setattr(train, "place_batch", dies_at_step_13)
    with pytest.raises(Killed):
        train.train(config, tmp_path / "broken")
    monkeypatch.setattr(train, "place_batch", place)
    assert record.read(tmp_path / "broken")["status"] == "running"
    train.train(config, tmp_path / "broken")
    assert_same_run(config, tmp_path / "broken", tmp_path / "unbroken")


def test_a_kill_in_the_last_evaluation_leaves_no_trace(log, tmp_path, monkeypatch):
    """Stopped by patience, killed between two final splits: no row twice, no step beyond the stop."""
    config = tiny(
        "hstu", log, train__epochs=30.0, train__select="nats min", train__eval_every=10, train__patience=2,
        optim__learning_rate=0.3, table__learning_rate=0.3, eval__final=("val", "test"), **FULL,
    )  # fmt: skip
    unbroken = train.train(config, tmp_path / "unbroken")
    assert unbroken["stopped_at"] < unbroken["steps"]
    assert unbroken["stopped_at"] - unbroken["selected_step"] == 20

    evaluate = training.evaluate_split

    def dies_on_test(run, state, split, *more):
        if split == "test":
            raise Killed
        return evaluate(run, state, split, *more)

    monkeypatch.setattr(training, "evaluate_split", dies_on_test)
    with pytest.raises(Killed):
        train.train(config, tmp_path / "broken")
    monkeypatch.setattr(training, "evaluate_split", evaluate)
    assert any("final" in row for row in record.read_metrics(tmp_path / "broken"))
    train.train(config, tmp_path / "broken")
    assert_same_run(config, tmp_path / "broken", tmp_path / "unbroken")
    share = unbroken["stopped_at"] / unbroken["steps"]
    assert unbroken["seen"]["epochs"] == pytest.approx(30 * share, rel=0.01)  # what was read, not what was planned


def test_the_best_checkpoint_is_on_disk_before_the_one_that_resumes(log, tmp_path, monkeypatch):
    """A kill between the two must not leave a run that selects a step it no longer has."""
    save, late = Checkpoints.save, []

    def saves(self, step, state, data):
        folder = Path(self.manager.directory)
        chosen = training.selected(record.read_metrics(folder.parent), config)
        if folder.name == "checkpoints" and chosen is not None and not (folder.parent / "best" / str(chosen)).exists():
            late.append(step)
        save(self, step, state, data)

    monkeypatch.setattr(Checkpoints, "save", saves)
    config = tiny("hstu", log, train__select="nats min", train__eval_every=5, **FULL)
    assert train.train(config, tmp_path)["status"] == "ok"
    assert late == []


def test_it_overfits_32_users(tmp_path):
    """The loss falls far below the entropy of the items' frequencies, which no model without history can beat."""
    log = make_log(tmp_path / "log", users=32)
    wide = {"model__embed_dim": 32, "model__width": 32, "model__qk_dim": 16, "model__v_dim": 16, "model__dropout": 0.0}
    rates = {"optim__learning_rate": 1e-2, "table__learning_rate": 2e-2}
    config = tiny("hstu", log, train__epochs=50.0, eval__final=(), **FULL, **wide, **rates)
    run = build(config)
    train.train(config, tmp_path / "run")
    counts = np.bincount(np.asarray(run.log.events["item_id"]))[1:]
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    losses = [row["loss"] for row in record.read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[0] == pytest.approx(np.log(run.log.num_items), abs=0.3)
    assert np.mean(losses[-4:]) < 0.3 * entropy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "/nowhere/log"}, "/nowhere/log"),
        ({"train__patiense": 3}, r"train\.patiense.*unknown"),
        ({"model__widht": 3}, "widht"),
        ({"task__negative": 3}, "negative"),
        ({"split__validate": True}, "validate"),
        ({"modle": 3}, "modle"),
        ({"model_name": "hsru"}, "model_name = 'hsru'.*hstu"),
        ({"task_name": "next"}, "task_name = 'next'.*next_item"),
        ({"loader__window": "lsat"}, "loader.window = 'lsat'.*last"),
        ({"loader__length": 17}, r"loader.length = 17 .*model.max_length = 16"),
        ({"table__optimizer": "adamw"}, "table.optimizer = 'adamw'.*rowwise_adagrad"),
        ({"eval__final": ("tset",)}, "'tset'"),
        ({"train__select": "nats"}, "train.select = 'nats'"),
        ({"train__select": "nats mim", "train__eval_every": 5}, "train.select = 'nats mim'"),
        ({"train__select": "nats min"}, "train.eval_every > 0"),
        ({"train__patience": 2}, "train.patience needs train.select"),
        ({"mesh__data": 8, "mesh__model": 2, "loader__batch_size": 16}, "needs 16 devices, 8 are here"),
        ({"mesh__data": 8, "loader__batch_size": 12}, "loader.batch_size = 12.*the 8 devices of the mesh"),
        ({"loader__queries": ("tab",)}, "'tab'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_config_is_one_line_and_never_trains(changes, message, log, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as exit_:
        run_main(tiny("hstu", log, **changes), tmp_path, monkeypatch)
    assert str(exit_.value).startswith("error: ")
    assert "\n" not in str(exit_.value)

    assert re.search(message, str(exit_.value)), exit_.value
    assert not (tmp_path / "metrics.jsonl").exists()


def run_main(config: ConfigDict, workdir: Path, monkeypatch) -> None:
    """main() as the command line calls it."""
    monkeypatch.setattr(train, "_CONFIG", SimpleNamespace(value=config), raising=False)
    monkeypatch.setattr(train, "_WORKDIR", SimpleNamespace(value=str(workdir)), raising=False)
    for flag, value in (("_MIRROR", ""), ("_COORDINATOR", ""), ("_PROCESSES", 1), ("_PROCESS", 0)):
        monkeypatch.setattr(train, flag, SimpleNamespace(value=value), raising=False)
    train.main([])


def test_a_metric_that_is_not_measured_cannot_select(log, tmp_path):
    config = tiny("hstu", log, train__select="ndgc@10 max", train__eval_every=5, **FULL)
    with pytest.raises(ValueError, match=r"ndgc@10 max.*ndcg@10"):
        train.train(config, tmp_path)


@pytest.mark.parametrize("epochs", [0.05, 1.0], ids=["last step", "mid-run"])
def test_divergence_is_a_result(epochs, log, tmp_path, monkeypatch, capsys):
    """A rate of 1e30 ruins the parameters in one step: the run ends as diverged, its record and DONE stay."""
    config = tiny("hstu", log, train__epochs=epochs, optim__learning_rate=1e30, optim__warmup=0, **FULL)
    run_main(config, tmp_path, monkeypatch)  # a result, not a failure: no SystemExit
    assert capsys.readouterr().err.splitlines()[-1].startswith("diverged: ")
    book = record.read(tmp_path)
    assert (tmp_path / "DONE").read_text() == "diverged\n"
    assert book["status"] == "diverged" and "step" in book["reason"]
    assert book["evaluations"] == [] and book["config"]["optim"]["learning_rate"] == 1e30
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    before = (tmp_path / "record.json").read_bytes()
    assert train.train(config, tmp_path)["status"] == "diverged"
    assert (tmp_path / "record.json").read_bytes() == before
    assert "finished before (diverged)" in capsys.readouterr().err


def test_a_finished_workdir_is_left_alone_and_no_other_config_gets_in(log, tmp_path, monkeypatch):
    config = tiny("hstu", log, train__epochs=0.2, **FULL)
    first = train.train(config, tmp_path)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "DONE"}
    monkeypatch.setattr(training, "build", lambda config: pytest.fail("a finished run was built again"))
    assert train.train(config, tmp_path) == json.loads(json.dumps(first))
    assert {p: p.stat().st_mtime_ns for p in files} == files
    with pytest.raises(SystemExit, match="another config"):
        run_main(tiny("hstu", log, train__epochs=0.3, **FULL), tmp_path, monkeypatch)
    assert not (tmp_path / "FAILED").exists() and record.read(tmp_path)["status"] == "ok"


def test_a_folder_whose_run_failed_before_it_began_is_free(log, tmp_path):
    with pytest.raises(ValueError, match=r"table\.kind = 'ful'"):
        train.train(tiny("hstu", log, table__kind="ful", **FULL), tmp_path)
    assert record.read(tmp_path)["status"] == "failed"
    assert train.train(tiny("hstu", log, train__epochs=0.2, **FULL), tmp_path)["status"] == "ok"


@pytest.mark.parametrize("text", ['{"status": "runn', "", "[]", "{}", '{"schema_version": 0}', "\x00\xff"])
def test_a_corrupt_record_is_set_aside_and_loses_nothing(text, log, tmp_path, capsys):
    """Checkpoints and metrics make it anew; what they cannot vouch for, another config, is still kept out."""
    config = tiny("hstu", log, train__epochs=0.2, **FULL)
    first = train.train(config, tmp_path)
    (tmp_path / "record.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="another config"):
        train.train(tiny("hstu", log, train__epochs=0.3, **FULL), tmp_path)
    again = train.train(config, tmp_path)
    assert "record.json" in capsys.readouterr().err and (tmp_path / "record.json.broken").exists()
    differing = {key for key in first if json.dumps(first[key]) != json.dumps(again[key])}
    assert differing <= {"seconds"} and (tmp_path / "DONE").read_text() == "ok\n"


@pytest.mark.slow
def test_a_full_disk_is_one_line(log, tmp_path):
    """Files beyond a size limit fail as on a full disk; in a process of its own, which the limit is meant for."""
    config = tiny("hstu", log, model__embed_dim=256, train__epochs=0.1, **FULL)
    limited = ["bash", "-c", 'ulimit -f 30; exec "$@"', "bash", *arguments(config, log, tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    ended = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode not in (0, None)
    assert any(line.startswith("error: ") for line in ended.stderr.splitlines()), ended.stderr
    assert "Traceback" not in ended.stderr.partition("error: ")[2]
    assert not (tmp_path / "DONE").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("--config.trian.epochs=2", "train"), ("--config.model.widht=2", "widht"), ("--config=nothing.py", "nothing.py")],
)
@pytest.mark.slow
def test_a_wrong_command_line_is_one_line(override, message, tmp_path):
    command = [sys.executable, "-m", "recscale.train", "--config=configs/hstu_planted.py", f"--workdir={tmp_path}"]
    ended = subprocess.run([*command, override], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    assert ended.returncode != 0
    assert message in ended.stderr and len(ended.stderr.strip().splitlines()) == 1, ended.stderr


def rows_of(values: dict[int, float]) -> list[dict]:
    rows = [{"step": s, "split": "val", "slice": "all", "metric": "nats", "value": v} for s, v in values.items()]
    noise = [{"step": 1, "loss": -9.0}, {"step": 3, "slice": "new", "metric": "nats", "value": -9.0}]
    return [*rows, *noise, {"step": 3, "slice": "all", "metric": "nats", "value": -9.0, "final": True}]


def test_selection_and_patience(log):
    lowest = tiny("hstu", log, train__select="nats min", train__eval_every=10, train__patience=2)
    highest = tiny("hstu", log, train__select="nats max", train__eval_every=10)
    assert training.selected(rows_of({10: 3.0, 20: 2.0, 30: 2.5}), lowest) == 20
    assert training.selected(rows_of({10: 3.0, 20: 2.0, 30: 2.5}), highest) == 10
    assert training.selected(rows_of({10: 2.0, 20: 2.0}), lowest) == 10  # a tie keeps the earlier step
    assert training.selected([{"step": 1, "loss": 2.0}], lowest) is None
    assert training.selected(rows_of({10: 3.0}), tiny("hstu", log)) is None
    assert not training.out_of_patience(rows_of({10: 2.0, 20: 3.0}), lowest, 20)
    assert training.out_of_patience(rows_of({10: 2.0, 20: 3.0, 30: 2.0}), lowest, 30)
    assert not training.out_of_patience(rows_of({10: 2.0, 20: 3.0, 30: 1.9}), lowest, 30)
    assert not training.out_of_patience(rows_of({10: 2.0, 90: 3.0}), highest, 90)  # patience 0 never stops


def test_codes_are_no_parameters():
    """Large integers, whose squares overflow, say nothing about divergence; a NaN in a table does."""
    state = {
        "model": jnp.ones(3),
        "mixers": {},
        "tables": {"item.codes": jnp.full((4000, 1), 3000), "item": jnp.ones(2)},
    }
    assert training.parameters_finite(state)
    state["tables"]["item"] = jnp.asarray([1.0, jnp.nan])
    assert not training.parameters_finite(state)


def test_a_lost_table_row_ends_the_run_with_an_error(capsys):
    seen = []
    run = SimpleNamespace(steps=2)
    there = SimpleNamespace(
        step=2, run=run, read=lambda *it: seen.append(it), events_per_second=0.0, events_per_step=1.0
    )
    train._read(there, {"loss": jnp.float32(1.5), "lost_rows": jnp.int32(0)}, training.Line())
    assert seen == [(2, 1.5)] and "step 2/2  loss 1.5000  compiled" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step 2: the exchange of table rows lost 3 rows"):
        train._read(there, {"loss": jnp.float32(1.5), "lost_rows": jnp.int32(3)}, training.Line())


def test_an_undefined_value_is_shown_as_such():
    row = {"split": "test", "slice": "new_items", "metric": "gauc/like", "value": None, "stderr": None, "n": 0}
    assert train.shown(row).split() == ["test", "new_items", "gauc/like", "undefined"]
    assert train.shown(row | {"value": 0.5}).endswith("0.50000 +- 0.00000")
