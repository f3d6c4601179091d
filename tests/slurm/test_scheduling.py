"""What SLURM does to a sweep, and what the sweep makes of it. One process per cell; see test_processes.py for more."""

import json
import time

import pytest

from launch import slurm
from launch.commands import CommandError
from launch.study import Job
from tests.slurm.sweeps import undisturbed

pytestmark = pytest.mark.slurm


def test_an_array_runs_every_cell_and_one_that_crashes_stops_no_other(sweep):
    cells = {"a": {}, "crash": {"crash_at": 2}, "it's b": {}, "c": {}}
    mine = sweep(cells, max_parallel=2, time="00:10:00", memory="100M")
    (job,) = mine.submit()
    mine.wait()
    assert [cell for cell in cells if mine.done(cell)] == ["a", "it's b", "c"], mine.story()
    assert all(mine.losses(cell) == undisturbed(5) for cell in ("a", "it's b", "c"))
    assert "failed with exit status 1: error: step 2: told to crash" in mine.said()
    states = mine.cluster.ask("squeue", "--array", "--states=all", "-h", f"--jobs={job}", "-o", "%K %T").splitlines()
    assert sorted(states) == ["0 COMPLETED", "1 FAILED", "2 COMPLETED", "3 COMPLETED"]
    assert (mine.folder / "a" / "log").exists()


def test_submitting_again_starts_only_what_is_missing(sweep):
    cells = {"a": {"steps": 3}, "b": {"steps": 60}, "crash": {"crash_at": 2}}
    mine = sweep(cells)
    first = mine.submit()
    mine.until(lambda: mine.done("a") and len(mine.where()) == 1)
    assert mine.where() == {"b": "running on n1"} or "running on n" in mine.where()["b"]
    (second,) = mine.submit()  # b is in the queue: only the crashed cell is sent
    row = json.loads((mine.folder / "slurm" / "jobs.jsonl").read_text().splitlines()[-1])
    assert row["cells"] == {"0": "crash"} and second not in first
    mine.wait()
    assert mine.losses("b") == undisturbed(60) and mine.attempts("crash") == 2
    mine.jobs = mine.jobs[:2]
    assert mine.submit() == []


def test_two_sweeps_at_once_train_every_cell_once(sweep):
    """Nobody remembers the first submission: the lease keeps the second worker off, DONE ends it early."""
    mine = sweep({"a": {"steps": 60}, "b": {"steps": 1}})
    mine.submit()
    mine.until(lambda: mine.rows("a") and mine.done("b"))
    (mine.folder / "slurm" / "jobs.jsonl").unlink()
    slurm.submit(mine.jobs, mine.folder, mine.settings, False)
    mine.until(lambda: mine.cluster.ask("squeue", "-h", "--partition=cpu") == "")
    assert mine.losses("a") == undisturbed(60) and mine.losses("b") == undisturbed(1)
    assert "another worker is on it" in mine.said() and "b: done before" in mine.said()


def test_preempted_cells_save_are_requeued_and_resume(sweep):
    """A job of a partition of higher priority takes all nodes; SLURM signals, requeues and later restarts the cells."""
    mine = sweep({"a": {"steps": 80, "save_seconds": 1.0}, "b": {"steps": 80}}, partition="cpu")
    mine.submit()
    mine.until(lambda: len(mine.rows("a")) > 5 and len(mine.rows("b")) > 5)
    mine.cluster.run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    mine.until(lambda: all("pending" in mine.where().get(cell, "") for cell in "ab"))
    cut = {cell: mine.losses(cell) for cell in "ab"}
    mine.wait()
    for cell in "ab":
        assert mine.done(cell) and mine.attempts(cell) == 2, mine.story()
        assert mine.losses(cell) == undisturbed(80) and 5 < len(cut[cell]) < 80
    assert "SLURM is ending this job itself" in mine.said() and "told to stop" in mine.said()


def test_a_task_that_wants_a_restart_requeues_itself_alone(sweep):
    """The last task of an array has the id of the whole array: asking for that would restart the others too."""
    mine = sweep({"a": {"steps": 100}, "b": {"steps": 100}, "last": {"steps": 100}})
    (job,) = mine.submit()
    mine.until(lambda: all(len(mine.rows(cell)) > 3 for cell in ("a", "b", "last")))
    mine.cluster.run("scancel", "--signal=TERM", f"{job}_2")
    mine.wait()
    assert [mine.attempts(cell) for cell in ("a", "b", "last")] == [1, 1, 2], mine.story()
    assert all(mine.losses(cell) == undisturbed(100) for cell in ("a", "b", "last"))
    assert "last: saved its state; requeued, restart 1 of at most 20" in mine.said()


def test_restarts_are_bounded(sweep):
    mine = sweep({"a": {"steps": 1000}}, max_restarts=1)
    (job,) = mine.submit()
    for attempt in (1, 2):
        mine.until(lambda count=attempt: mine.attempts("a") == count)
        mine.cluster.run("scancel", "--signal=TERM", f"{job}_0")
    mine.wait()
    assert not mine.done("a") and mine.attempts("a") == 2
    assert "restarted 1 times already, submit the sweep again to go on" in mine.said()
    mine.jobs = [mine._job("a", {"steps": mine.rows("a")[-1]["step"] + 5})]
    mine.submit()
    mine.wait()
    assert mine.done("a") and mine.losses("a") == undisturbed(len(mine.losses("a")))


def test_where_a_job_must_not_requeue_itself_it_is_submitted_again(sweep):
    mine = sweep({"other": {"steps": 3}, "a": {"steps": 60}}, requeue=False)
    (job,) = mine.submit()
    mine.until(lambda: len(mine.rows("a")) > 5)
    mine.cluster.run("scancel", "--signal=TERM", f"{job}_1")
    mine.until(lambda: len(mine.ids()) == 2 and "a" in mine.where())
    mine.wait()
    assert mine.done("a") and mine.attempts("a") == 2 and mine.losses("a") == undisturbed(60), mine.story()
    assert f"saved its state; submitted again as job {mine.ids()[1]}" in mine.said()
    assert mine.attempts("other") == 1


def test_a_killed_worker_is_started_again(sweep):
    """kill -9 leaves no word: a few restarts, from the last save; the cell that dies every time fails at the end."""
    mine = sweep({"a": {"steps": 10, "kill_at": 6, "save_every": 2}})
    mine.submit()
    mine.wait()
    assert mine.done("a") and mine.attempts("a") == 2, mine.story()
    assert mine.losses("a") == undisturbed(6) + undisturbed(10)[4:]  # from step 4 on once more
    assert "killed (exit status 137); requeued" in mine.said()


def test_a_cancelled_array_leaves_everything_resumable(sweep):
    cells = {cell: {"steps": 60, "save_seconds": 0.5} for cell in "abcd"}
    mine = sweep(cells, max_parallel=2)
    mine.submit()
    mine.until(lambda: all(len(mine.rows(cell)) > 5 for cell in "ab"))
    mine.until(lambda: mine.where()["d"] == "pending: max_parallel reached", 5)
    mine.cancel()
    mine.wait()
    time.sleep(8)  # longer than a requeued job waits
    assert mine.where() == {} and not any(mine.done(cell) for cell in cells)
    assert "SLURM is ending this job itself" in mine.said() and "requeued" not in mine.said()
    cut = {cell: len(mine.rows(cell)) for cell in cells}
    assert cut["a"] > 5 and cut["d"] == 0
    mine.submit()
    mine.wait()
    assert all(mine.done(cell) and mine.losses(cell) == undisturbed(60) for cell in cells), mine.story()


def test_a_branch_waits_for_its_trunk(sweep):
    """Whether the trunk is sent with it, or is in the queue from before."""
    mine = sweep({"trunk": {"steps": 40}, "branch": {"steps": 2}, "late": {"steps": 2}})
    trunk, branch, late = mine.jobs
    mine.jobs = [trunk, Job(branch.cell, branch.workdir, branch.argv, after="trunk")]
    assert len(mine.submit()) == 2
    mine.until(lambda: mine.where()["branch"] == "pending: waits for its trunk", 5)
    mine.jobs += [Job(late.cell, late.workdir, late.argv, after="trunk")]
    assert len(mine.submit()) == 1
    mine.until(lambda: mine.where()["late"] == "pending: waits for its trunk", 5)
    mine.wait()
    ends = {cell: (mine.folder / cell / "DONE").stat().st_mtime for cell in ("trunk", "branch", "late")}
    assert ends["trunk"] < ends["branch"] and ends["trunk"] < ends["late"]


def test_what_slurm_refuses_is_said_in_one_line(sweep):
    mine = sweep({"a": {}}, partition="nowhere")
    with pytest.raises(CommandError, match=r"^sbatch: .*[Ii]nvalid partition.*$"):
        mine.submit()
    assert mine.where() == {}
