"""Several processes are one run: the same losses and evaluations as one process, written once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recscale import record
from recscale.data.loading import Loader
from recscale.run import build
from recscale.train import train
from tests.tiny_run import FULL, SAMPLED, make_log, tiny

ROOT = Path(__file__).resolve().parent.parent
PLAN = {"train__eval_every": 5, "train__checkpoint_every": 5, "train__epochs": 1.0, "mesh__data": 4, "mesh__model": 2}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("planted") / "log")


def settings(log: Path, changes: dict):
    return tiny("hstu", log, **(PLAN | changes))


def processes(folder: Path, log: Path, changes: dict, count: int = 2) -> list[subprocess.Popen]:
    """Start `count` processes of 8 / count devices each that train one run in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{folder.name}_config.py"
    config.write_text(
        "from pathlib import Path\nfrom tests.test_hosts import settings\n"
        f"def get_config():\n    return settings(Path({str(log)!r}), {changes!r})\n"
    )
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // count}")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    started = []
    for index in range(count):
        command = [sys.executable, "-m", "recscale.train", f"--config={config}", f"--workdir={folder}"]
        command += [f"--coordinator={address}", f"--processes={count}", f"--process={index}"]
        with (folder.parent / f"{folder.name}_{index}.txt").open("w") as output:
            started.append(
                subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            )
    return started


def run_together(folder: Path, log: Path, changes: dict) -> None:
    started = processes(folder, log, changes)
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    texts = [(folder.parent / f"{folder.name}_{i}.txt").read_text()[-2000:] for i in range(len(started))]
    assert codes == [0, 0], texts


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in record.read_metrics(folder) if "loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [SAMPLED | {"table__optimizer": "rowwise_adagrad"}, FULL], ids=["sampled-in-batch", "full"]
)
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path, log, changes):
    """Losses, evaluations and the record; each of them written once, by process 0."""
    run_together(tmp_path / "two", log, changes)
    one = train(settings(log, changes), tmp_path / "one")
    two = record.read(tmp_path / "two")
    assert two["status"] == "ok" and two["hosts"] == 2 and two["config_hash"] == one["config_hash"]
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert list(found) == list(expected) and len(found) > 10
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-5)
    for mine, theirs in zip(two["evaluations"], one["evaluations"], strict=True):
        assert (mine["metric"], mine["slice"], mine["n"]) == (theirs["metric"], theirs["slice"], theirs["n"])
        if mine["metric"] == "nats":
            assert mine["value"] == pytest.approx(theirs["value"], rel=1e-3)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_killed_processes_go_on_together(tmp_path, log):
    """One process dies; the other does not hang for ever; the same command on both goes on to the same end."""
    changes = SAMPLED | {"table__optimizer": "rowwise_adagrad", "train__epochs": 4.0}
    folder = tmp_path / "two"
    started = processes(folder, log, changes)
    try:
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
            assert all(process.poll() is None for process in started), (tmp_path / "two_0.txt").read_text()[-2000:]
        started[1].kill()
        assert started[0].wait(timeout=200) != 0
    finally:
        for process in started:
            process.kill()
    run_together(folder, log, changes)
    one = train(settings(log, changes), tmp_path / "one")
    assert "resumed at step" in (tmp_path / "two_0.txt").read_text()
    np.testing.assert_allclose(list(losses(folder).values()), list(losses(tmp_path / "one").values()), rtol=2e-5)
    assert record.read(folder)["steps"] == one["steps"]


def test_processes_share_the_rows_of_every_batch(log):
    """Without overlap or loss, whatever their number; the order is that of one process."""
    run = build(settings(log, SAMPLED))
    arguments = {"batch_size": 8, "length": 16, "layout": "packed", "window": "last", "seed": 0}
    whole = Loader(run.log, run.views["train"], **arguments)
    for count in (2, 4):
        parts = [
            Loader(run.log, run.views["train"], process_index=i, process_count=count, **arguments) for i in range(count)
        ]
        for step in (0, 3, whole.steps_per_epoch + 1):
            joined = np.concatenate([part[step]["item_id"] for part in parts])
            np.testing.assert_array_equal(joined, whole[step]["item_id"])
