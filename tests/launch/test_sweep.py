"""The command of a sweep: what it sends, what it leaves out, what it says of wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cell_state, forecast, status, study, sweep
from launch.study import StudyError
from recscale.goodput import CAUSES, Goodput
from tests.tiny_run import make_log

ROOT = Path(__file__).resolve().parent.parent.parent
STUDY = ROOT / "tests/chaos/study"


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return make_log(tmp_path_factory.mktemp("planted") / "log")


@pytest.fixture(autouse=True)
def three_cells(monkeypatch, log):
    monkeypatch.setenv("CHAOS_CELLS", "3")
    monkeypatch.setenv("CHAOS_LOG", str(log))


def finish(workdir: Path, status: str = "ok", **more: object) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    book = {"schema_version": 1, "status": status, "reason": "loss nan at step 3" if status == "diverged" else ""}
    book |= {"evaluations": [{"value": 2.5}], "flops": {"train_total": 7.2e9}, "seconds": {"wall": 2.0}} | more
    (workdir / "record.json").write_text(json.dumps(book))
    (workdir / "DONE").write_text(status)


def fail(workdir: Path, reason: str = "error: no such log") -> None:
    workdir.mkdir(parents=True)
    (workdir / "FAILED").write_text(reason + "\n")


def lines(capsys, *arguments: str) -> list[str]:
    sweep.main([str(STUDY), *arguments])
    return capsys.readouterr().out.splitlines()


def test_submit_sends_what_is_missing_and_retry_what_has_failed_too(tmp_path, capsys):
    out = tmp_path / "study"
    finish(out / "rate-0-s0")
    fail(out / "rate-0-s1")
    said = lines(capsys, "submit", f"--runs={tmp_path}", "--dry-run")
    assert said[0] == "1 of 3 cells are done" and said[1].startswith("1 cells have failed")
    commands = [line for line in said if "recscale.train" in line]
    assert len(commands) == 1 and commands[0].endswith(f"--workdir={out}/rate-0-s2")
    again = [line for line in lines(capsys, "retry", f"--runs={tmp_path}", "--dry-run") if "recscale.train" in line]
    assert [line.rpartition("/")[2] for line in again] == ["rate-0-s1", "rate-0-s2"]
    assert not (out / "slurm").exists() and not (out / ".sweep").exists()


def test_a_done_without_a_complete_record_is_not_done(tmp_path):
    finish(tmp_path)
    assert cell_state.finished(tmp_path)
    for text in ('{"status": "ok"', json.dumps({"schema_version": 1, "status": "running"})):
        (tmp_path / "record.json").write_text(text)
        assert not cell_state.finished(tmp_path)
    (tmp_path / "record.json").unlink()
    assert not cell_state.finished(tmp_path)


def test_when_all_is_done_it_says_so_and_writes_the_report(tmp_path, capsys):
    for i in range(3):
        finish(tmp_path / "study" / f"rate-0-s{i}", "diverged" if i else "ok")
    said = lines(capsys, f"--runs={tmp_path}")
    assert said[0] == "3 of 3 cells are done" and said[1] == f"report: {tmp_path}/study/report.txt"
    assert (tmp_path / "study" / "report.txt").read_text().startswith("rate-0-s0 2.5\n")


def test_the_table_says_state_progress_and_reason(tmp_path, capsys):
    out = tmp_path / "study"
    finish(out / "rate-0-s0", "diverged")
    fail(out / "rate-0-s1")
    (out / "rate-0-s2").mkdir()
    rows = [
        {"event": "start", "wall": 1e9, "clock": 1.0, "attempt": 2, "host": "n1", "pid": 1, "processes": 1},
        {"event": "ready", "wall": 1e9, "clock": 5.0, "attempt": 2, "step": 40},
        {"event": "compiled", "wall": 1e9, "clock": 6.0, "attempt": 2, "step": 41},
        {"event": "alive", "wall": 1e9, "clock": 6.0, "attempt": 2, "step": 41, "steps": 80, "loss": 2.25,
         "events_per_second": 0.0},
        {"event": "alive", "wall": 1e9, "clock": 16.0, "attempt": 2, "step": 60, "steps": 80, "loss": 2.125,
         "events_per_second": 1500.0},
        {"event": "preempted", "wall": 1e9, "clock": 17.0, "attempt": 2, "step": 61},
    ]  # fmt: skip
    (out / "rate-0-s2" / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "al')
    said = lines(capsys, "status", f"--runs={tmp_path}")
    assert said[0] == "3 cells: 1 diverged, 1 failed, 1 preempted"
    by_cell = {line.split()[0]: line.split() for line in said[2:5]}
    assert by_cell["rate-0-s2"][:5] == ["rate-0-s2", "preempted", "60/80", "2.1250", "2"]
    assert "rate-0-s0: loss nan at step 3" in said and "rate-0-s1: error: no such log" in said
    assert "trained" in said[-1]


def test_a_running_cell_has_speed_and_time_left():
    spent = Goodput(10.0, 8.0, dict.fromkeys(CAUSES, 0.0) | {"other": 2.0}, 1)
    state = cell_state.State("running", 50, 100, 1234.5, 2.0, 3725.0, 1, "n1:7", "", spent)
    row = status.table({"a": state}, {"a": "elsewhere"}).splitlines()[2].split()
    assert row == ["a", "running", "50/100", "1,234", "2.0000", "1:02:05", "1", "80%", "n1:7"]
    waiting = status.table({"a": cell_state.State("waiting")}, {"a": "pending on n2"}).splitlines()[2]
    assert waiting.split(maxsplit=2) == ["a", "waiting", "pending on n2"]


def test_cells_that_differ_in_seed_and_rate_alone_are_alike(tmp_path):
    jobs = study.load(STUDY, tmp_path).jobs
    assert [job.alike for job in jobs] == ["rate-0-s0"] * 3


def test_the_plan_knows_sizes_costs_and_what_is_done(tmp_path, log):
    chosen = study.load(STUDY, tmp_path)
    finish(tmp_path / "study" / "rate-0-s0")  # 7.2e9 FLOPs in two seconds
    cells = forecast.forecast(chosen, price=10.0)
    assert [cell.state for cell in cells] == ["done", "waiting", "waiting"] and cells[0].hours == 0
    assert cells[1].hours == pytest.approx(cells[1].flops / 3.6e9 / 3600)
    assert cells[1].cost == pytest.approx(10 * cells[1].hours)
    assert cells[1].parameters > 64 * 8 and cells[1].events > 6 * 1000
    text = forecast.table(cells, 10.0).splitlines()
    assert text[-1].startswith("3 cells, 1 done; to do: ") and "at 10 an hour" in text[-1]
    (tmp_path / "study" / "rate-0-s0" / "DONE").unlink()
    assert forecast.forecast(chosen)[0].hours is None
    assert forecast.forecast(chosen, flops_per_second=1e9)[0].hours > 0


def test_a_branch_comes_after_its_trunk(tmp_path):
    (tmp_path / "study.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def cells(): return ['branch', 'trunk']\n"
        "from configs.hstu_planted import get_config as base\n"
        "def get_config(cell):\n    config = base()\n    if cell == 'branch':\n"
        f"        config.train.branch_from = '{tmp_path}/runs/{tmp_path.name}/trunk'\n    return config\n"
        "def prepare(folder): pass\ndef write_report(folder): return folder\n"
    )
    assert [job.after for job in study.load(tmp_path, tmp_path / "runs").jobs] == ["trunk", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "jbos=2"], "no setting jbos; it has jobs, processes"),
        (["--set", "jobs"], "expected KEY=VALUE"),
        (["--set", "jobs=many"], "jobs='many': expected a value like 0"),
        (["--set", "jobs=-1"], "jobs = -1: expected at least 0"),
        (["--place=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        sweep.main([str(STUDY), f"--runs={tmp_path}", *arguments])
    assert message in str(exit_.value) and "\n" not in str(exit_.value)


def test_a_place_file_is_read_and_the_command_line_wins(tmp_path):
    file = tmp_path / "here.yaml"
    file.write_text("jobs: 3\nmax_restarts: 1\nprice: 2.5\n")
    settings, costs = sweep.settings_of(sweep.PLACES["local"], file, ["jobs=4", "memory_gb=1"])
    assert (settings.jobs, settings.max_restarts, settings.memory_gb, costs) == (4, 1, 1.0, {"price": 2.5})
    file.write_text("time: 02:00:00\nsetup: [module load cuda, source venv]\nnodes: 2\n")
    settings, _ = sweep.settings_of(sweep.PLACES["slurm"], file, ["requeue=false", "memory=64G"])
    assert (settings.time, settings.nodes, settings.requeue) == ("02:00:00", 2, False)
    assert settings.setup == ("module load cuda", "source venv")
    settings, _ = sweep.settings_of(sweep.PLACES["gke"], None, ["env={A: b}", "topology=v6e:4x4"])
    assert settings.env == {"A": "b"}
    file.write_text("- jobs\n")
    with pytest.raises(ValueError, match=r"here.yaml: expected KEY: VALUE"):
        sweep.settings_of(sweep.PLACES["local"], file, [])


def test_a_folder_that_is_no_study_is_one_line(tmp_path):
    with pytest.raises(StudyError, match=r"study.py does not exist"):
        study.load(tmp_path)
    (tmp_path / "study.py").write_text("def cells(): return []\n")
    with pytest.raises(StudyError, match="lacks get_config, prepare, write_report"):
        study.load(tmp_path)
    (tmp_path / "study.py").write_text("".join(f"def {name}(*a): return ['a', 'a']\n" for name in study.FUNCTIONS))
    with pytest.raises(StudyError, match="names a more than once"):
        print(study.load(tmp_path).jobs)


@pytest.mark.slow
def test_of_two_that_prepare_one_works(tmp_path):
    """As the pods of a cluster do, all at once, before they train."""
    (tmp_path / "study.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def cells(): return []\ndef get_config(cell): pass\ndef write_report(folder): return folder\n"
        "def prepare(folder):\n    file = folder / 'data'\n    if file.exists(): return\n"
        "    assert not (folder / 'busy').exists()\n    (folder / 'busy').touch()\n    time.sleep(1)\n"
        "    (folder / 'busy').unlink()\n    file.touch()\n"
    )
    command = [sys.executable, "-m", "launch.sweep", str(tmp_path), "prepare", f"--runs={tmp_path / 'runs'}"]
    both = [subprocess.Popen(command, cwd=ROOT, env=os.environ) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
