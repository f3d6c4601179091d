"""A study of real cells through `launch.sweep --on=slurm`: two nodes, one process each."""

import time
from pathlib import Path

import pytest

from launch import sweep
from recscale import record
from recscale.events import read_events
from tests.same_run import measured
from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import ONE_DEVICE

pytestmark = pytest.mark.slurm
STUDY = Path(__file__).parent / "study"


@pytest.fixture(scope="module", autouse=True)
def speaks_with_the_cluster(running_cluster, tmp_path_factory):
    """Fixtures of a module come before those of a test: what they submit needs the cluster's address too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", running_cluster.environment["SLURM_CONF"])
        patch.setenv("RECSCALE_SLURM_LOG", str(tmp_path_factory.mktemp("planted") / "log"))
        yield


def order(runs: Path, *words: str) -> None:
    settings = ["nodes=2", "cpus_per_task=1", "partition=cpu", f"setup={ONE_DEVICE}"]
    sweep.main([str(STUDY), *words, "--on=slurm", f"--runs={runs}", "--set", *settings])


def wait(cluster: Cluster, runs: Path, until, seconds: float = 150.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        logs = [*runs.glob("study/slurm/*.log"), *runs.glob("study/pair/log")]
        assert time.monotonic() < end, cluster.ask("squeue") + "".join(log.read_text()[-3000:] for log in logs)
        time.sleep(0.2)


@pytest.fixture(scope="module")
def undisturbed(running_cluster, tmp_path_factory) -> Path:
    """RUNS of a sweep that nothing happened to."""
    runs = tmp_path_factory.mktemp("undisturbed")
    order(runs)
    wait(running_cluster, runs, lambda: not running_cluster.ask("squeue", "-h", "--partition=cpu"))
    return runs


def test_a_cell_on_two_nodes_from_end_to_end(cluster, undisturbed, capsys):
    """Submitted, trained by two processes on two nodes as one run, and reported; sent again, nothing is left to do."""
    workdir = undisturbed / "study" / "pair"
    assert (workdir / "DONE").exists(), (workdir / "log").read_text()
    book = record.read(workdir)
    assert book["status"] == "ok" and book["hosts"] == 2 and book["evaluations"]
    steps = [row["step"] for row in measured(workdir) if "loss" in row]
    assert steps == list(range(1, book["steps"] + 1))
    assert [row["processes"] for row in read_events(workdir) if row["event"] == "start"] == [2]
    order(undisturbed)
    said = capsys.readouterr().out
    assert "1 of 1 cells are done" in said and "sbatch" not in said
    assert (undisturbed / "study" / "report.txt").read_text() == "pair ok\n"


def test_a_preempted_cell_is_the_same_run_in_the_end(cluster, undisturbed, tmp_path, capsys):
    """Nodes taken by a job of higher priority amid training: saved, requeued, resumed; every loss is the same."""
    workdir = tmp_path / "study" / "pair"
    order(tmp_path)
    wait(cluster, tmp_path, lambda: (workdir / "metrics.jsonl").exists() and len(record.read_metrics(workdir)) > 20)
    cluster.run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait(cluster, tmp_path, lambda: "PENDING" in cluster.ask("squeue", "-h", "--partition=cpu", "-o", "%T"))
    (saved,) = [row["step"] for row in read_events(workdir) if row["event"] == "preempted"]
    assert len(record.read_metrics(workdir)) > 20 and not (workdir / "DONE").exists()
    capsys.readouterr()
    order(tmp_path, "status")
    assert "pending" in capsys.readouterr().out
    wait(cluster, tmp_path, lambda: not cluster.ask("squeue", "-h", "--partition=cpu"))
    assert (workdir / "DONE").exists(), (workdir / "log").read_text()
    assert [row["step"] for row in read_events(workdir) if row["event"] == "ready"] == [0, saved]
    assert measured(workdir) == measured(undisturbed / "study" / "pair")
