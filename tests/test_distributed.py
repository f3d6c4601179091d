"""Processes come together over gloo, or end with one line; a single process starts nothing."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from recscale import distributed
from recscale.cluster import VARIABLES, Place
from recscale.roll_call import RendezvousError

ROOT = Path(__file__).resolve().parent.parent
COMES = """
import sys, time
from recscale.distributed import abandon, join, leave
from recscale.roll_call import RendezvousError
time.sleep(float(sys.argv[1]))
try:
    place = join(run="test")
except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")
import jax
from jax.experimental import multihost_utils
total = int(multihost_utils.process_allgather(jax.numpy.array([place.index + 1])).sum())
print(f"{place.index} of {jax.process_count()} sum {total}", flush=True)
if sys.argv[2] == "fails" and place.index == 1:
    abandon(3)
try:
    multihost_utils.process_allgather(jax.numpy.array([1]))
except Exception as error:
    print(type(error).__name__, flush=True)
    abandon(4)
leave()
"""


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"localhost:{probe.getsockname()[1]}"


@pytest.fixture
def calls(monkeypatch) -> list:
    """What would be asked of the roll call and of jax; a machine on which nothing is set."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "RECSCALE_", "TPU_", "MEGASCALE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    found: list = []
    monkeypatch.setattr(distributed, "roll_call", lambda place, run, seconds: found.append((place, run, seconds)))
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: found.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda name, value: found.append((name, value)))
    return found


def test_a_single_process_starts_nothing(calls, monkeypatch):
    assert distributed.join().count == 1
    assert distributed.join("none").count == 1
    assert distributed.join("host:1", 1, 0).count == 1
    monkeypatch.setenv("RECSCALE_NPROC", "1")
    assert distributed.join("auto").count == 1
    assert calls == []
    distributed.leave()
    distributed.abandon(3)


def test_several_hold_a_roll_call_then_start_jax_on_gloo(calls, monkeypatch):
    monkeypatch.setenv("RECSCALE_RENDEZVOUS_SECONDS", "30")
    place = distributed.join("host:8476", 4, 2, run="runs/a")
    assert calls[0] == (place, "runs/a", 30.0)
    assert calls[1:3] == [("jax_check_proxy_envs", False), ("jax_cpu_collectives_implementation", "gloo")]
    assert calls[3] == {
        "coordinator_address": "host:8476",
        "num_processes": 4,
        "process_id": 2,
        "local_device_ids": None,
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 29,
    }


def test_the_gpus_of_a_task_reach_jax(calls, monkeypatch):
    place = Place("host:1", 2, 1, "SLURM", devices=(2, 3))
    monkeypatch.setattr(distributed, "find", lambda *arguments: place)
    distributed.join()
    assert calls[-1]["local_device_ids"] == (2, 3)


def test_auto_asks_jax_where_nothing_is_found(calls, monkeypatch):
    distributed.join("auto")
    assert calls == [("jax_cpu_collectives_implementation", "gloo"), {"initialization_timeout": 60}]

    def nothing(**arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    with pytest.raises(ValueError, match=r"--coordinator=auto: found no RECSCALE_COORD.*pass --coordinator=HOST:PORT"):
        distributed.join("auto")


def test_jax_that_was_used_before_is_one_line(calls, monkeypatch):
    def used(**arguments):
        raise RuntimeError("must be called\nbefore any JAX calls")

    monkeypatch.setattr(jax.distributed, "initialize", used)
    with pytest.raises(RendezvousError, match="cannot start on several processes: must be called before any JAX calls"):
        distributed.join("host:1", 2, 0)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_patience_must_be_a_number_of_seconds(calls, monkeypatch, value):
    monkeypatch.setenv("RECSCALE_RENDEZVOUS_SECONDS", value)
    with pytest.raises(ValueError, match=r"RECSCALE_RENDEZVOUS_SECONDS=.*expected seconds"):
        distributed.join()


def test_process_0_is_reached_without_a_proxy(calls, monkeypatch, capsys):
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "internal")
    monkeypatch.setenv("no_grpc_proxy", "")
    distributed.join("host:1", 2, 0)
    found = dict(os.environ)
    assert found["no_grpc_proxy"] == "internal,host" and found["no_proxy"] == "internal"
    assert capsys.readouterr().err == "note: https_proxy set: process 0 on host is reached without a proxy\n"


def start(address: str, count: int, indices: range, delays: dict[int, float] | None = None, **changes: str):
    """Processes of a run of `count`, told by variables where they stand; delays: seconds by which some come late."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | changes
    started = []
    for index in indices:
        place = dict(zip(VARIABLES, (address, str(count), str(index)), strict=True))
        how = changes.get("HOW", "")
        command = [sys.executable, "-c", COMES, str((delays or {}).get(index, 0.0)), how]
        started.append(
            subprocess.Popen(
                command, env=environment | place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return started


def ends(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of each."""
    try:
        said = [process.communicate(timeout=60) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def test_four_processes_come_together_one_of_them_late_with_a_proxy_in_the_way(address):
    dead = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    found = ends(start(address, 4, range(4), {0: 0.0, 3: 1.0}, **dead))
    assert [status for status, _, _ in found] == [0] * 4, found
    assert all(f"{i} of 4 sum 10\n" in output for i, (_, output, _) in enumerate(found)), found
    assert all("reached without a proxy" in errors and "JAX detected proxy" not in errors for _, _, errors in found)


def test_a_process_that_does_not_come_is_one_line_on_each_of_the_others(address):
    began = time.monotonic()
    found = ends(start(address, 3, range(2), RECSCALE_RENDEZVOUS_SECONDS="2"))
    assert time.monotonic() - began < 20
    assert [status for status, _, _ in found] == [1, 1]
    assert "error: " in found[0][2] and "of 3 processes (number " in found[0][2] and "2) did not come" in found[0][2]
    assert all(len(errors.splitlines()) == 1 for _, _, errors in found), found


def test_a_taken_port_is_one_line(address):
    with socket.create_server(("", int(address.split(":")[1]))):
        ((status, _, errors),) = ends(start(address, 2, range(1), RECSCALE_RENDEZVOUS_SECONDS="1"))
    assert status == 1 and "error: process 0 cannot listen on port" in errors and len(errors.splitlines()) == 1


def test_when_one_abandons_the_run_the_other_does_not_hang(address):
    began = time.monotonic()
    found = ends(start(address, 2, range(2), HOW="fails"))
    assert time.monotonic() - began < 30  # a normal exit of the one would take 300 s
    assert found[1][0] == 3 and found[0][0] == 4, found
