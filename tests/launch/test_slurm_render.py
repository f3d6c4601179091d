"""SLURM: what the script says, and when sbatch, squeue and scancel are called; they are stand-ins here."""

import json
import os
from pathlib import Path

import pytest

from launch import slurm
from launch.commands import CommandError
from launch.study import Job
from tests.launch.fakes import Fake


def job(cell: str, folder: Path, after: str = "") -> Job:
    workdir = str(folder / cell)
    return Job(cell, workdir, ("-m", "recscale.train", f"--config=study.py:{cell}", f"--workdir={workdir}"), after)


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def rendered(settings: slurm.Settings, folder: Path = Path("/runs/name"), cells: str = "ab") -> str:
    jobs = [job(cell, folder) for cell in cells]
    return slurm.render(jobs, folder, settings, folder / "slurm" / "001.sbatch", Path("/checkout"))[0]


def test_settings_become_directives_and_options_of_srun():
    settings = slurm.Settings(
        partition="gpu",
        account="lab",
        qos="long",
        time="1-00:00:00",
        nodes=2,
        tasks_per_node=4,
        gpus_per_node=8,
        gpu_type="a100",
        cpus_per_task=6,
        memory="64G",
        max_parallel=3,
        options=("--constraint=ib",),
        setup=("module load cuda", "source venv/bin/activate"),
        python="python",
    )
    text = rendered(settings)
    assert directives(text) == [
        "--job-name=name",
        "--array=0-1%3",
        "--output=/runs/name/slurm/%A_%a.log",
        "--open-mode=append",
        "--partition=gpu",
        "--account=lab",
        "--qos=long",
        "--time=1-00:00:00",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=6",
        "--mem=64G",
        "--gres=gpu:a100:8",
        "--signal=TERM@120",
        "--requeue",
        "--constraint=ib",
    ]
    assert "--gpus-per-task" not in text and "B:" not in "".join(directives(text))
    options = "--nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=6 --label --kill-on-bad-exit=0"
    assert f"srun_options=({options})" in text
    assert "setup() {\n  :\n  module load cuda\n  source venv/bin/activate\n}" in text


def test_what_is_left_to_the_cluster_is_not_written():
    assert directives(rendered(slurm.Settings(requeue=False, signal_seconds=30))) == [
        "--job-name=name",
        "--array=0-1",
        "--output=/runs/name/slurm/%A_%a.log",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--signal=TERM@30",
        "--no-requeue",
    ]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"nodes": 0}, "nodes = 0: expected at least 1"),
        ({"nodes": "2"}, "nodes = '2': expected int, found str"),
        ({"time": "86400"}, "time = '86400': expected HH:MM:SS or D-HH:MM:SS"),
        ({"time": "00:02:00"}, "signal_seconds = 120: a start lasts only 120 s"),
        ({"memory": "64 GB"}, "memory = '64 GB': expected a number with K, M, G or T"),
        ({"gpus_per_node": 6, "tasks_per_node": 4}, "set tasks_per_node to 6 or 1"),
        ({"gpu_type": "a100"}, "gpu_type = 'a100' without gpus_per_node"),
        ({"options": ["--gpus-per-task=1"]}, "use the setting gpus_per_node"),
        ({"options": ["--signal=B:TERM@60"]}, "use the setting signal_seconds"),
        ({"options": ["-p gpu"]}, "'-p gpu': expected the long form"),
        ({"setup": "module load a\nmodule load b"}, "expected one line of text"),
        ({"python": ""}, "python is empty"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_does_not_fit_is_one_line(settings, complaint):
    with pytest.raises(ValueError) as error:
        slurm.Settings(**settings)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as error:
        slurm.Settings(nodes=0, memory="much", max_parallel=-1)
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["nodes", "max_parallel", "memory"]


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Fake:
    fake = Fake("sbatch", tmp_path, monkeypatch)
    Fake("squeue", tmp_path, monkeypatch)
    fake.answer(stdout="12;cluster\n")
    return fake


def test_one_array_holds_the_cells_and_the_next_those_that_follow(tmp_path, sbatch, capsys):
    folder = tmp_path / "runs" / "name"
    sbatch.answer("--dependency=afterany:12", stdout="13\n")
    jobs = [job("a", folder), job("branch", folder, after="a"), job("b", folder), job("c", folder, after="elsewhere")]
    slurm.submit(jobs, folder, slurm.Settings(), False)
    rows = [json.loads(line) for line in (folder / "slurm" / "jobs.jsonl").read_text().splitlines()]
    assert [(row["job"], row["cells"]) for row in rows] == [
        ("12", {"0": "a", "1": "b", "2": "c"}),
        ("13", {"0": "branch"}),
    ]
    assert [call["argv"][1:-1] for call in sbatch.calls] == [["--parsable"], ["--parsable", "--dependency=afterany:12"]]
    assert "#SBATCH --array=0-2\n" in (folder / "slurm" / "001.sbatch").read_text()
    assert "job 12: 3 cells" in capsys.readouterr().out


def test_more_cells_than_an_array_holds_are_several(tmp_path, sbatch):
    folder = tmp_path / "name"
    slurm.submit([job(c, folder) for c in "abcde"], folder, slurm.Settings(max_array=2, max_parallel=2), False)
    assert [call["argv"][2:-1] for call in sbatch.calls] == [[], *[["--dependency=afterany:12"]] * 2]
    assert (folder / "slurm" / "003.manifest").read_text().startswith("cell=e ")


def test_a_dry_run_prints_all_and_sends_nothing(tmp_path, sbatch, capsys):
    folder = tmp_path / "name"
    slurm.submit([job("a", folder), job("it's", folder, after="a")], folder, slurm.Settings(), True)
    said = capsys.readouterr().out
    assert sbatch.calls == [] and not folder.exists()
    assert "#SBATCH --array=0-0\n" in said and "sbatch --parsable --dependency=afterany:JOB_ABOVE" in said
    assert """cell='it'"'"'s'""" in said and "srun " in said


def test_a_circle_of_trunks_and_an_sbatch_that_is_missing_or_refuses_are_said(tmp_path, sbatch, monkeypatch):
    folder = tmp_path / "name"
    with pytest.raises(ValueError, match="a: its trunk b waits for it in turn"):
        slurm.submit([job("a", folder, "b"), job("b", folder, "a")], folder, slurm.Settings(), False)
    sbatch.answer(stderr="sbatch: error: invalid account\nsbatch: error: try another", status=1)
    with pytest.raises(
        CommandError, match=r"^sbatch: sbatch: error: invalid account sbatch: error: try another"
    ) as error:
        slurm.submit([job("a", folder)], folder, slurm.Settings(), False)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match="sbatch is not on PATH: submit from a login node"):
        slurm.submit([job("a", folder)], folder, slurm.Settings(), False)
    assert slurm.where([job("a", folder)], folder, slurm.Settings()) == {}


def test_a_job_within_a_job_gets_no_variables_of_the_outer_one(tmp_path, monkeypatch):
    program = tmp_path / "sbatch"
    program.write_text('#!/bin/sh\nenv | grep ^SLURM_ > "$(dirname "$0")/environment"\necho 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_CONF", "SLURM_MEM_PER_NODE", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "x")
    slurm.submit([job("a", tmp_path / "name")], tmp_path / "name", slurm.Settings(), False)
    assert (tmp_path / "environment").read_text() == "SLURM_CONF=x\n"


@pytest.fixture
def submitted(tmp_path, monkeypatch, sbatch):
    """A folder with cells a, b in job 12, task 1 of which submitted itself again as job 15; squeue answers below."""
    folder = tmp_path / "name"
    slurm.submit([job("a", folder), job("b", folder)], folder, slurm.Settings(), False)
    with (folder / "slurm" / "jobs.jsonl").open("a") as file:
        file.write('{"job": "15", "of": "12", "task": 1}\n{"job": "16", "of"')
    return folder


def test_where_says_what_squeue_says_in_few_words(submitted, tmp_path, monkeypatch):
    squeue = Fake("squeue", submitted, monkeypatch)
    rows = ["12|0|RUNNING|n1,n2|None", "15|1|PENDING||BeginTime", "99|0|RUNNING|n3|None", "16|N/A|PENDING||Priority"]
    squeue.answer(stdout="\n".join(rows) + "\n")
    jobs = [job(cell, submitted) for cell in "abc"]
    assert slurm.where(jobs, submitted, slurm.Settings()) == {
        "a": "running on n1,n2",
        "b": "pending: starts again soon",
    }
    squeue.answer(stderr="slurm_load_jobs error: Unable to contact slurm controller", status=1)
    assert slurm.where(jobs, submitted, slurm.Settings()) == {}


def test_cancel_takes_the_tasks_that_are_in_the_queue(submitted, monkeypatch, capsys):
    squeue, scancel = Fake("squeue", submitted, monkeypatch), Fake("scancel", submitted, monkeypatch)
    squeue.answer(stdout="15|1|RUNNING|n1|None\n")
    jobs = [job(cell, submitted) for cell in "ab"]
    slurm.cancel(jobs, submitted, slurm.Settings(), True)
    assert scancel.calls == [] and "scancel 15_1" in capsys.readouterr().out
    slurm.cancel(jobs, submitted, slurm.Settings(), False)
    assert [call["argv"] for call in scancel.calls] == [["scancel", "15_1"]]
    slurm.submit(jobs, submitted, slurm.Settings(), False)
    assert (submitted / "slurm" / "002.manifest").read_text().startswith("cell=a ")  # b is in the queue
    squeue.answer(stdout="")
    slurm.cancel(jobs, submitted, slurm.Settings(), False)
    assert "none of these cells is in the queue" in capsys.readouterr().out
