"""What one array task does with every end of a cell: the rendered script, with stand-ins for srun and its like on PATH.
tests/slurm has the real ones."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from launch import slurm
from launch.study import Job


class Task:
    """Runs the rendered script for one array task, with stand-ins whose behaviour a test sets as shell text."""

    def __init__(self, folder: Path):
        self.folder, self.place, self.bin = folder / "runs", folder / "runs" / "slurm", folder / "bin"
        self.place.mkdir(parents=True)
        self.bin.mkdir()
        self.cell = self.folder / "a"
        self.damage = str  # what becomes of the manifest's text
        for name, text in {"squeue": "echo RUNNING None", "scontrol": "", "sbatch": "echo 77", "sleep": ""}.items():
            self.program(name, text)

    def program(self, name: str, text: str) -> None:
        file = self.bin / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >>{self.bin}/called\n{text}\n')
        file.chmod(0o755)

    def run(self, srun: str, settings: slurm.Settings | None = None, **environment: str) -> tuple[int, str, list[str]]:
        """(exit status, what it said, what it called) with `srun` doing this; W is the workdir."""
        script = self.place / "001.sbatch"
        jobs = [Job("a", str(self.cell), ("-m", "recscale.train", f"--workdir={self.cell}"))]
        text, commands = slurm.render(jobs, self.folder, settings or slurm.Settings(), script, self.folder)
        script.write_text(text)
        script.with_suffix(".manifest").write_text(self.damage(commands))
        (self.bin / "called").write_text("")
        self.program("srun", srun)
        given = {"SLURM_JOB_ID": "1012", "SLURM_ARRAY_JOB_ID": "1012", "SLURM_ARRAY_TASK_ID": "0", "W": str(self.cell)}
        path = {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", str(script)], env=os.environ | path | given | environment, capture_output=True, text=True
        )
        assert done.stderr == "", done.stderr
        return done.returncode, done.stdout, (self.bin / "called").read_text().splitlines()


@pytest.fixture
def task(tmp_path) -> Task:
    return Task(tmp_path)


def names(called: list[str]) -> list[str]:
    return [line.split()[0] for line in called]


def test_done_is_what_counts(task):
    status, said, called = task.run('touch "$W/DONE"; exit 9')
    assert status == 0 and names(called) == ["srun"] and "a: done" in said
    assert "--kill-on-bad-exit=0" in called[0] and called[0].endswith(f"--workdir={task.cell}")
    status, said, called = task.run("exit 1")
    assert status == 0 and called == [] and "done before" in said
    (task.cell / "DONE").unlink()
    status, said, _ = task.run("exit 0")
    assert status == 1 and "exit status 0 and yet no" in said


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:-9], lambda text: text.replace("train", "trane"), lambda text: "", lambda text: text * 2],
    ids=["cut", "changed", "empty", "doubled"],
)
def test_a_damaged_manifest_runs_nothing(task, damage):
    task.damage = damage
    status, said, called = task.run('touch "$W/DONE"')
    assert status == 1 and called == [] and "001.manifest is gone, cut short or changed; submit the sweep again" in said
    task.damage = str
    assert task.run('touch "$W/DONE"')[0] == 0


def test_42_requeues_this_task_and_no_other(task):
    status, said, called = task.run("exit 42", SLURM_RESTART_COUNT="4")
    assert status == 42 and called[-1] == "scontrol requeue 1012_0"
    assert "requeued, restart 5 of at most 20" in said
    status, said, called = task.run("exit 42", SLURM_RESTART_COUNT="20")
    assert status == 42 and names(called) == ["srun"] and "restarted 20 times already" in said


@pytest.mark.parametrize("state", ["COMPLETING None", "CANCELLED None", ""])
def test_a_job_that_slurm_ends_is_not_brought_back(task, state):
    task.program("squeue", f"echo {state}")
    status, _, called = task.run("exit 42")
    assert status == 42 and names(called) == ["srun", "squeue"]


def test_a_job_whose_time_is_up_is_brought_back(task):
    """The save outlasted the notice: SLURM is ending the job, and starts it again only where asked."""
    task.program("squeue", "echo COMPLETING TimeLimit")
    assert names(task.run("exit 42")[2]) == ["srun", "squeue", "scontrol"]


@pytest.mark.parametrize("missing", ["scontrol", "squeue"])
def test_without_scontrol_it_is_submitted_again(task, missing):
    task.program("scontrol", "exit 1")
    task.program(missing, "exit 127")
    _, said, called = task.run("exit 42", SLURM_RESTART_COUNT="1", RECSCALE_RESTARTS="2")
    assert called[-1].startswith(
        "sbatch --parsable --array=0 --dependency=afterany:1012_0 --export=ALL,RECSCALE_RESTARTS=4"
    )
    assert json.loads((task.place / "jobs.jsonl").read_text()) == {"job": "77", "of": "1012", "task": 0}
    task.program("sbatch", "exit 1")
    status, said, _ = task.run("exit 42")
    assert status == 42 and "submit the sweep again to go on" in said


def test_75_leaves_the_cell_to_the_other_worker(task):
    status, said, called = task.run("exit 75")
    assert status == 0 and names(called) == ["srun"] and "another worker is on it" in said
    count = '[[ $(grep -c ^srun "$(dirname "$0")/called") == 3 ]] && touch "$W/DONE" && exit 0; exit 75'
    status, said, called = task.run(count, SLURM_RESTART_COUNT="1")  # its own former worker, until the lease expires
    assert status == 0 and names(called) == ["srun", "sleep"] * 2 + ["srun"] and "a: done" in said


def test_a_failure_says_why(task):
    status, said, called = task.run('echo "error: no such key" >"$W/FAILED"; exit 1')
    assert status == 1 and names(called) == ["srun"] and "failed with exit status 1: error: no such key" in said
    status, said, _ = task.run(
        "echo 'error: cannot join'; echo 'srun: error: n1: task 0: Exited with exit code 2'; exit 2"
    )
    assert status == 2 and (task.cell / "FAILED").read_text() == "exit status 2: error: cannot join\n"


def test_a_kill_is_a_restart_a_few_times(task):
    settings = slurm.Settings(max_kills=2)
    for turn in range(3):
        text = 'echo "error: lost its peer" >"$W/FAILED"; exit 137' if turn else "exit 143"
        status, said, called = task.run(text, settings, SLURM_RESTART_COUNT=str(turn))
        assert (names(called)[-1] == "scontrol") == (turn < 2), said
        assert status == (137 if turn else 143)
    assert (task.cell / "FAILED").read_text().startswith("exit status 137")
    status, said, called = task.run(
        'echo "error: bad batch" >"$W/FAILED"; exit 134'
    )  # jax aborts when a peer has failed
    assert names(called) == ["srun"] and "failed with exit status 134: error: bad batch" in said


def test_each_job_has_a_port_and_none_of_another_launcher_s_variables(task):
    show = 'echo "$JAX_COORDINATOR_PORT ${RECSCALE_COORD-none} $LOADED" >"$W/seen"; touch "$W/DONE"'
    settings = slurm.Settings(setup=("export LOADED=yes",))
    task.run(show, settings, RECSCALE_COORD="host:1")
    assert (task.cell / "seen").read_text() == "21012 none yes\n"
    (task.cell / "DONE").unlink()
    task.run(show, settings, SLURM_JOB_ID="1013")
    assert (task.cell / "seen").read_text() == "21013 none yes\n"
