"""Whole studies under fire: workers killed, the launcher killed, one host of several killed, two launchers at once.

What is compared with an undisturbed study: every metric of every step, and what the records say, bit for bit.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cell_state, local, study
from recscale import record, train
from recscale.events import read_events
from recscale.goodput import goodput, summary
from recscale.lease import holder
from tests.same_run import RESULT, measured
from tests.tiny_run import make_log

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
STUDY = Path("tests/chaos/study")
KILLS = 30


@pytest.fixture(scope="module", autouse=True)
def log(tmp_path_factory):
    folder = make_log(tmp_path_factory.mktemp("planted") / "log")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CHAOS_LOG", str(folder))
        patched.setenv("PYTHONPATH", str(ROOT))
        yield folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, log) -> Path:
    """All cells, trained in this process one after the other."""
    runs = tmp_path_factory.mktemp("undisturbed")
    for job in study.load(ROOT / STUDY, runs).jobs:
        train.train(study.load(ROOT / STUDY, runs).config(job.cell), job.workdir)
    return runs / "study"


def sweep(runs: Path, *more: str, cells: int = 24) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.sweep", str(STUDY), "--on=local", f"--runs={runs}", *more]
    environment = os.environ | {"CHAOS_CELLS": str(cells)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def workers(runs: Path) -> dict[int, str]:
    """The live training processes of this study: pid -> cell."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            match = re.search(rf"--workdir={runs}/study/([^\0]+)", command)
            if match and "recscale.train" in command:  # of a pack, its last cell
                found[int(entry.name)] = match[1]
    return found


def assert_same_study(runs: Path, undisturbed: Path, cells: int = 24) -> None:
    names = sorted(path.name for path in undisturbed.iterdir() if (path / "DONE").exists())
    mine = sorted(path.name for path in (runs / "study").iterdir() if (path / "DONE").exists())
    assert len(mine) == cells and set(mine) <= set(names)
    for name in mine:
        one, other = record.read(runs / "study" / name), record.read(undisturbed / name)
        assert {key: one[key] for key in RESULT} == {key: other[key] for key in RESULT}, name
        assert measured(runs / "study" / name) == measured(undisturbed / name), name


def test_a_study_with_thirty_kills_is_the_undisturbed_study(undisturbed, tmp_path):
    """A worker is killed at a random moment, be it start-up, step, evaluation or save, until thirty have died."""
    rng, killed = random.Random(0), []
    process = sweep(tmp_path, "--set", "jobs=2")
    began = time.monotonic()
    try:
        while process.poll() is None and time.monotonic() - began < 900:
            time.sleep(rng.uniform(1.0, 9.0) if len(killed) < KILLS else 1.0)
            there = {pid: cell for pid, cell in workers(tmp_path).items() if killed.count(cell) < local.STUCK - 1}
            if len(killed) < KILLS and there:  # one that dies more often at one step has failed, as it should
                pid = rng.choice(sorted(there))
                os.kill(pid, signal.SIGKILL)
                killed.append(there[pid])
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert_same_study(tmp_path, undisturbed)
    states = [cell_state.of(tmp_path / "study" / name) for name in sorted(set(killed))]
    spent = summary([goodput(read_events(path)) for path in (tmp_path / "study").iterdir() if path.is_dir()])
    print(
        f"24 cells, {len(killed)} kills of {len(set(killed))} cells (up to {max(map(killed.count, killed))} of one), "
        f"{sum(state.restarts for state in states)} attempts had begun to train; all records equal the undisturbed "
        f"study's; {said.count('killed by SIGKILL')} starts anew; {time.monotonic() - began:.0f} s; {spent.text()}"
    )
    assert len(killed) == KILLS, "the study was over too soon to be killed so often"


def test_the_launcher_itself_is_killed(undisturbed, tmp_path):
    """Its workers go on; the next launcher waits for them and does what is left. Nothing is trained twice."""
    first = sweep(tmp_path, "--set", "jobs=2", cells=4)
    while sum(holder(tmp_path / "study" / cell) is not None for cell in workers(tmp_path).values()) < 2:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.kill()
    first.communicate()
    orphans = workers(tmp_path)
    assert len(orphans) == 2
    second = sweep(tmp_path, "--set", "jobs=2", cells=4)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert_same_study(tmp_path, undisturbed, cells=4)
    attempts = [cell_state.of(tmp_path / "study" / cell).restarts for cell in orphans.values()]
    print(f"the launcher was killed with {len(orphans)} workers alive; restarts of their cells: {attempts}")
    assert attempts == [0, 0]


def test_two_launchers_at_once(undisturbed, tmp_path):
    """One does the work, the other says who does and leaves with status 75."""
    both = [sweep(tmp_path, "--set", "jobs=2", cells=2) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 75], said
    loser = said[[process.returncode for process in both].index(75)]
    assert "another submission of this study" in loser
    assert_same_study(tmp_path, undisturbed, cells=2)
    for job in study.load(ROOT / STUDY, tmp_path).jobs[:2]:
        assert [row["event"] for row in read_events(Path(job.workdir))].count("start") == 1
    print(f"the one that left said: {loser.strip().splitlines()[-1]}")


def test_one_host_of_several_is_killed_or_told_to_stop(tmp_path, monkeypatch):
    """Two processes a cell. Killed, one takes the other with it; told to stop, both save at the same step.

    In either case both are started again and end as undisturbed.
    """
    monkeypatch.setenv("CHAOS_DEVICES", "4")
    monkeypatch.setenv("CHAOS_EPOCHS", "12")  # jax may take seconds to spread the word
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"))
    quiet, together = tmp_path / "quiet", ("--set", "jobs=1", "processes=2")
    calm = sweep(quiet, *together, cells=1)
    said, _ = calm.communicate(timeout=300)
    assert calm.returncode == 0, said
    cell = next(path.name for path in (quiet / "study").iterdir() if (path / "DONE").exists())
    for number, words in ((signal.SIGKILL, "killed by SIG"), (signal.SIGTERM, "told to stop")):
        loud = tmp_path / number.name
        process = sweep(loud, *together, cells=1)
        metrics = loud / "study" / cell / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 12):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        victim = max(workers(loud))  # the second process
        os.kill(victim, number)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and words in said, said
        assert_same_study(loud, quiet / "study", cells=1)
        assert record.read(loud / "study" / cell)["hosts"] == 2
        events = read_events(loud / "study" / cell)
        saved = [row["step"] for row in events if row["event"] == "preempted"]
        resumed = [row["step"] for row in events if row["event"] == "ready"][1:]
        assert len(resumed) == 1 and (number == signal.SIGKILL or saved == resumed), (saved, resumed)
        print(
            f"{number.name} to process {victim}, one of two: {said.strip().splitlines()[0]}; on from step {resumed[0]}"
        )


def test_a_pack_is_killed(undisturbed, tmp_path):
    """Eight cells in one program: killed, taken up again, and as if each had been alone, up to rounding."""
    process = sweep(tmp_path, "--set", "jobs=1", "pack=8", cells=8)
    metrics = tmp_path / "study" / "rate-2-s1" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 20):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    (pid,) = workers(tmp_path)
    os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and said.count("killed by SIGKILL") == 8, said
    for job in study.load(ROOT / STUDY, tmp_path).jobs[:8]:
        mine, alone = (record.read(folder / job.cell) for folder in (tmp_path / "study", undisturbed))
        assert mine["pack"]["members"] == 8 and mine["status"] == "ok" and mine["seen"] == alone["seen"]
        losses = [[row["loss"] for row in measured(folder / job.cell) if "loss" in row][:20]
                  for folder in (tmp_path / "study", undisturbed)]  # fmt: skip
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_ctrl_c_and_on(undisturbed, tmp_path):
    process = sweep(tmp_path, "--set", "jobs=2", cells=2)
    metrics = tmp_path / "study" / "rate-0-s0" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 8):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on" in said
    state = cell_state.of(tmp_path / "study" / "rate-0-s0")
    assert state.name == cell_state.PREEMPTED
    on = sweep(tmp_path, "--set", "jobs=2", cells=2)
    assert on.wait(timeout=300) == 0, on.communicate()[0]
    on.communicate()
    assert_same_study(tmp_path, undisturbed, cells=2)
