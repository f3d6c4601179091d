"""The local queue: whoever dies is started again, whoever fails stops no other, and nothing is done twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cell_state, local, local_workers
from launch.study import Job
from recscale.lease import Held, Lease, holder

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def job(folder: Path, name: str, plan: str, after: str = "") -> Job:
    workdir = folder / name
    return Job(name, str(workdir), (str(ROOT / "tests/launch/stand_in.py"), str(workdir), plan), after)


def attempts(folder: Path, name: str) -> int:
    return len((folder / name / "attempts").read_text())


def submit(jobs: list[Job], folder: Path, **settings: float) -> None:
    local.submit(jobs, folder, local.Settings(**{"jobs": 2} | settings), dry_run=False)


def test_kills_and_preemptions_are_started_again_and_a_crash_stops_no_other(tmp_path, capsys):
    plans = {"a": "restart,kill,done", "b": "crash", "c": "kill,restart,restart,done", "d": "done"}
    with pytest.raises(SystemExit, match="1 cells failed: b"):
        submit([job(tmp_path, name, plan) for name, plan in plans.items()], tmp_path)
    states = {name: cell_state.of(tmp_path / name) for name in plans}
    assert {name: state.name for name, state in states.items()} == {
        "a": "done",
        "b": "failed",
        "c": "done",
        "d": "done",
    }
    assert [attempts(tmp_path, name) for name in plans] == [3, 1, 4, 1]
    assert [states[name].restarts for name in plans] == [2, 0, 3, 0]
    assert states["b"].reason == "ended with status 1; last words: about to fail"
    said = capsys.readouterr().out
    assert "a: killed by SIGKILL after" in said and "[4/4]" in said and str(tmp_path / "b" / "log") in said


@pytest.mark.parametrize(("event", "starts"), [("ready", local.STUCK), ("start", 8)])
def test_a_worker_that_is_killed_again_and_again_at_one_step_has_failed(tmp_path, event, starts):
    """One that was killed while it was starting is tried again as often as any."""
    script = tmp_path / "same_step.py"
    script.write_text(
        "import os, signal, sys\nfolder = sys.argv[1]\n"
        "with open(folder + '/events.jsonl', 'a') as file:\n"
        f'    file.write(\'{{"event": "{event}", "step": 7, "wall": 0, "clock": 0, "attempt": 0}}\\n\')\n'
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(SystemExit, match="1 cells failed"):
        submit([Job("a", str(tmp_path / "a"), (str(script), str(tmp_path / "a")))], tmp_path, max_restarts=7)
    assert len((tmp_path / "a" / "events.jsonl").read_text().splitlines()) == starts
    reason = cell_state.of(tmp_path / "a").reason
    assert ("killed by SIGKILL 5 times at step 7 (out of memory?)" in reason) == (event == "ready"), reason


def test_restarts_end_somewhere(tmp_path):
    with pytest.raises(SystemExit, match="failed: a"):
        submit([job(tmp_path, "a", "restart")], tmp_path, max_restarts=2)
    assert attempts(tmp_path, "a") == 3 and "started again 2 times" in cell_state.of(tmp_path / "a").reason


def test_a_branch_waits_for_its_trunk(tmp_path):
    submit([job(tmp_path, "branch", "done", after="trunk"), job(tmp_path, "trunk", "slow")], tmp_path)
    order = [(tmp_path / name / "attempts").stat().st_mtime for name in ("trunk", "branch")]
    assert order[1] > order[0] + 0.9


def test_a_live_worker_of_another_submission_is_waited_for_not_doubled(tmp_path):
    """As after a kill of the launcher: its workers go on."""
    a = job(tmp_path, "a", "slow")
    Path(a.workdir).mkdir()
    orphan = subprocess.Popen([sys.executable, *a.argv])
    try:
        while holder(tmp_path / "a") is None:
            time.sleep(0.01)
        submit([a], tmp_path)
        assert attempts(tmp_path, "a") == 1 and cell_state.finished(tmp_path / "a")
    finally:
        orphan.wait()


def test_the_second_submission_of_a_study_leaves(tmp_path):
    with Lease.take(tmp_path / ".sweep"), pytest.raises(Held):
        submit([job(tmp_path, "a", "done")], tmp_path)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_the_workers_save_and_the_next_call_goes_on(tmp_path, number):
    code = "import signal, sys; from pathlib import Path; from launch import local; from launch.study import Job\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background is born deaf to it
    code += (
        "folder, jobs = Path(sys.argv[1]), [Job(*x.split(';')[:2], tuple(x.split(';')[2:])) for x in sys.argv[2:]]\n"
    )
    code += "local.submit(jobs, folder, local.Settings(jobs=2), False)"
    jobs = [job(tmp_path, name, "hang,done") for name in "ab"]
    texts = [";".join([j.cell, j.workdir, *j.argv]) for j in jobs]
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path, *texts], stderr=subprocess.PIPE, text=True)
    while not all((tmp_path / j.cell / "attempts").exists() and holder(tmp_path / j.cell) for j in jobs):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode != 0 and "the same command goes on" in said
    assert all(holder(tmp_path / j.cell) is None for j in jobs)
    submit(jobs, tmp_path)
    assert [attempts(tmp_path, j.cell) for j in jobs] == [2, 2]
    assert all(cell_state.finished(tmp_path / j.cell) for j in jobs)


def test_cancel_tells_the_workers_of_this_machine(tmp_path, capsys):
    a = job(tmp_path, "a", "hang")
    Path(a.workdir).mkdir()
    orphan = subprocess.Popen([sys.executable, *a.argv])
    try:
        while (owner := holder(tmp_path / "a")) is None:
            time.sleep(0.01)
        time.sleep(0.3)
        local.cancel([a], tmp_path, local.Settings(), dry_run=True)
        assert orphan.poll() is None and f"kill -TERM {owner.pid}" in capsys.readouterr().out
        local.cancel([a], tmp_path, local.Settings(), dry_run=False)
        assert orphan.wait(timeout=10) == 42
    finally:
        orphan.kill()
        orphan.wait()


def test_dry_run_prints_the_commands_and_starts_nothing(tmp_path, capsys):
    jobs = [job(tmp_path, name, "done") for name in "ab"]
    local.submit(jobs, tmp_path / "runs", local.Settings(), dry_run=True)
    assert capsys.readouterr().out.splitlines() == [" ".join([sys.executable, *j.argv]) for j in jobs]
    assert list(tmp_path.iterdir()) == []


def test_the_machine_is_divided(tmp_path):
    gb = local_workers.memory_gb()
    assert local.Settings(jobs=8, memory_gb=gb / 3.5).at_a_time() == 3
    shares = [
        local_workers.environment_of(tmp_path, 1, slot, 4, local.Settings(gpus=2, devices=4)) for slot in range(4)
    ]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "0", "1"]
    assert {share["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in shares} == {"0.45"}
    assert {share["JAX_NUM_CPU_DEVICES"] for share in shares} == {"4"}
    alone = local_workers.environment_of(tmp_path, 1, 0, 1, local.Settings(gpus=2))
    assert alone["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    "settings", [{"jobs": -1}, {"processes": 0}, {"memory_gb": 1e9}, {"gpus": 1, "processes": 2}, {"pack": 0},
                 {"pack": 2, "processes": 2}], ids=["jobs", "processes", "memory", "gpus", "no-pack", "pack"]
)  # fmt: skip
def test_settings_that_do_not_fit_are_one_line(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} = "):
        local.Settings(**settings)


def test_a_pack_is_one_command_of_cells_that_are_alike(tmp_path):
    jobs = [Job(name, f"runs/{name}", ("-m", "recscale.train", f"--workdir=runs/{name}"), "", name[0]) for name in
            ("a1", "b1", "a2", "a3", "c1")]  # fmt: skip
    queue = local._Queue(jobs, tmp_path, local.Settings(jobs=1, pack=2), print)
    assert [job.cell for job in queue._together(jobs[0])] == ["a1", "a2"]
    assert [job.cell for job in queue._together(jobs[1])] == ["b1"]
    words = ["-m", "recscale.train_pack", "--workdir=runs/a1", "--workdir=runs/a2"]
    assert local_workers.command([jobs[0], jobs[2]]) == words
    assert local_workers.command(jobs[:1]) == list(jobs[0].argv)


def test_orphans_keep_no_terminal(tmp_path):
    """Ctrl-C in a terminal goes to the launcher's process group: workers are not in it."""
    script = tmp_path / "group.py"
    script.write_text("import os, sys; print(os.getpgrp() == os.getpid())")
    with pytest.raises(SystemExit):
        submit([Job("a", str(tmp_path / "a"), (str(script),))], tmp_path)
    assert (tmp_path / "a" / "log").read_text() == "True\n" and os.getpgrp() != 0
