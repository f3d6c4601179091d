"""The real kubectl before a stand-in server: what gke.py sends arrives, and what kubectl says is understood."""

import dataclasses
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml

from launch import gke
from launch.checks import resource_name
from launch.commands import CommandError
from launch.study import Job
from tests.launch.api_server import ApiServer
from tests.launch.fakes import closed

FOLDER = Path("runs/0001_axes")
SETTINGS = gke.Settings(image="i:1", claim="runs", accelerator="nvidia-h100-80gb", gpus=8, hosts=2)


def job(cell: str) -> Job:
    return Job(cell, f"runs/0001_axes/{cell}", ("-m", "recscale.train", f"--workdir=runs/0001_axes/{cell}"))


@pytest.fixture
def server(tmp_path, monkeypatch, recscale_data_file):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    crd = yaml.load(recscale_data_file("schemas/jobset.x-k8s.io_jobsets.yaml").read_text(), Loader=yaml.CSafeLoader)
    with ApiServer(jsonschema.Draft202012Validator(closed(crd))) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.configuration(tmp_path)))
        monkeypatch.setenv("HOME", str(tmp_path))  # kubectl keeps a cache of what servers offer
        monkeypatch.delenv("http_proxy", raising=False)
        yield server


def test_create_look_leave_alone_replace_and_delete(server: ApiServer, capsys):
    names = [resource_name(job(cell).workdir) for cell in "ab"]
    gke.submit([job("a"), job("b")], FOLDER, SETTINGS, False)
    assert list(server.items) == names
    assert server.items[names[0]] == yaml.safe_load(gke.jobset(job("a"), FOLDER, SETTINGS))
    assert gke.where([job("a"), job("c")], FOLDER, SETTINGS) == {"a": "pending"}
    ended = {"type": "Failed", "status": "True", "message": "jobset failed", "reason": "FailedJobs"}
    server.items[names[1]]["status"] = {"conditions": [ended | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]}
    server.requests.clear()
    gke.submit([job("a"), job("b")], FOLDER, SETTINGS, False)
    changes = [request for request in server.requests if not request.startswith("GET")]
    assert changes == [f"DELETE /jobsets/{names[1]}", "POST /jobsets"]
    assert "status" not in server.items[names[1]]
    gke.cancel([job(cell) for cell in "abc"], FOLDER, SETTINGS, False)  # there is no c
    assert server.items == {}
    assert gke.where([job("a")], FOLDER, dataclasses.replace(SETTINGS, context="here")) == {}


def test_a_race_is_recognised_and_a_refusal_is_one_line(server: ApiServer, capsys, monkeypatch, tmp_path):
    name = resource_name(job("a").workdir)
    server.items[name] = yaml.safe_load(gke.jobset(job("a"), Path("elsewhere/other"), SETTINGS))
    gke.submit([job("a")], FOLDER, SETTINGS, False)
    assert "just created by another; left alone" in capsys.readouterr().out
    template = gke.TEMPLATE.read_text().replace("parallelism:", "parallelizm:")
    broken = tmp_path / "jobset.yaml"
    broken.write_text(template)
    monkeypatch.setattr(gke, "TEMPLATE", broken)
    with pytest.raises(
        CommandError, match=r"^b: kubectl: .*strict decoding error.*'parallelizm' was unexpected"
    ) as found:
        gke.submit([job("b")], FOLDER, SETTINGS, False)
    assert "\n" not in str(found.value)
