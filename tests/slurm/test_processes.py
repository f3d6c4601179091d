"""Cells of several processes on a real SLURM: layouts, ports, preemption, one process that dies, no srun."""

import shlex
import sys

import pytest

from tests.slurm.sweeps import ONE_DEVICE, undisturbed

pytestmark = pytest.mark.slurm
PYTHON = shlex.quote(sys.executable)


def test_four_processes_on_one_node_and_two_on_each_of_two(sweep):
    """Each sees the other three, whichever way SLURM lays them out; ports differ between jobs at the same time."""
    found = []
    for name, nodes, tasks in (("1x4", 1, 4), ("2x2", 2, 2)):
        mine = sweep({name: {"steps": 3}}, nodes=nodes, tasks_per_node=tasks)
        mine.submit()
        found.append((name, mine))
    for name, mine in found:
        mine.wait(120)
        assert mine.done(name) and mine.losses(name) == undisturbed(3, processes=4), mine.story()
    ports = {mine.rows(name)[0]["port"] for name, mine in found}
    assert len(ports) == 2


def test_a_cell_on_two_nodes_is_preempted_saves_and_resumes(sweep):
    """Requeued while it runs: both processes save the same step, leave with 42, and go on from there together."""
    mine = sweep({"a": {"steps": 100, "save_seconds": 1.0}, "b": {"steps": 5}}, nodes=2)
    (job,) = mine.submit()
    mine.until(lambda: len(mine.rows("a")) > 5, 90)
    mine.cluster.run("scontrol", "requeue", f"{job}_0")
    mine.wait(120)
    assert mine.done("a") and mine.attempts("a") == 2, mine.story()
    assert mine.losses("a") == undisturbed(100, processes=2)
    assert mine.attempts("b") == 1 and mine.losses("b") == undisturbed(5, processes=2)


def test_one_process_of_two_killed_ends_both_and_both_start_again(sweep):
    """The survivor does not hang: the connection breaks; the cell goes on from its last save."""
    mine = sweep({"a": {"steps": 12, "kill_at": 8, "save_every": 3}}, nodes=2)
    mine.submit()
    mine.wait(120)
    assert mine.done("a") and mine.attempts("a") == 2, mine.story()
    assert mine.losses("a") == undisturbed(8, 2) + undisturbed(12, 2)[6:]


STEPS = """#!/bin/bash
{one_device}
unset JAX_COORDINATOR_PORT
for step in 1 2; do
  {port}
  srun --ntasks=2 --cpus-per-task=1 --exact {python} -m tests.slurm.standin --workdir={folder}/$step --steps=20 &
done
wait
"""


@pytest.mark.parametrize("port", [":", "export JAX_COORDINATOR_PORT=$((20000 + 10 * SLURM_JOB_ID + step))"])
def test_two_steps_of_one_job_at_once_do_not_collide(cluster, tmp_path, port):
    """jax takes the same port for both and they tear each other down; here each step has its own, given or not."""
    script = tmp_path / "steps.sbatch"
    script.write_text(STEPS.format(port=port, python=PYTHON, folder=tmp_path, one_device=ONE_DEVICE))
    said = cluster.batch(tmp_path, "--ntasks=4", "--nodes=1", str(script))
    done = [(tmp_path / str(step) / "DONE").exists() for step in (1, 2)]
    assert done == [True, True], said


def test_python_without_srun_in_a_job_of_several_says_so(cluster, tmp_path):
    """Not a hang, and not two single processes that each believe to be the run."""
    run = f"{PYTHON} -m recscale.train --config=configs/hstu_planted.py --workdir={tmp_path}/run"
    said = cluster.batch(tmp_path, "--nodes=2", f"--wrap={run}")
    (error,) = [line for line in said.splitlines() if line.startswith("error")]
    assert "was not started by srun: put `srun` before the command" in error
    assert not (tmp_path / "run" / "DONE").exists()
