"""JobSets: what is written is valid and complete, and kubectl is called exactly when and as it should be."""

import copy
import dataclasses
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from launch import gke
from launch.checks import resource_name
from launch.commands import CommandError
from launch.study import Job
from launch.tpu_slices import tpu_slice
from recscale.cluster import VARIABLES
from tests.launch.fakes import Fake, closed

FOLDER = Path("runs/0001_axes")
GPU = gke.Settings(image="eu.gcr.io/p/recscale:1", claim="runs", accelerator="nvidia-h100-80gb", gpus=8, hosts=2)
TPU = gke.Settings(image="eu.gcr.io/p/recscale:1", claim="runs", topology="v6e:4x4")
FULL = {"queue": "research", "spot": True, "cpu": "16", "memory": "64Gi", "service_account": "trainer"}
KINDS = {
    "gpu": GPU,
    "one-gpu": dataclasses.replace(GPU, gpus=1, hosts=1),
    "gpu-all": dataclasses.replace(GPU, **FULL, env={"XLA_FLAGS": "--a=1,2 --b=true", "YES": "no"}, restarts=3),
    "tpu": TPU,
    "tpu-host": dataclasses.replace(TPU, topology="v5e:2x4"),
    "tpu-slices": dataclasses.replace(TPU, **FULL, topology="v5p:4x4x4", slices=3),
}


def job(cell: str = "width-8", runs: str = "runs", after: str = "") -> Job:
    workdir = f"{runs}/0001_axes/{cell}"
    argv = ("-m", "recscale.train", f"--config=experiments/0001_axes/study.py:{cell}", f"--workdir={workdir}")
    return Job(cell, workdir, argv, after)


def made(settings: gke.Settings, one: Job | None = None) -> dict:
    return yaml.safe_load(gke.jobset(one or job(), FOLDER, settings))


def listed(*items: dict) -> dict:
    return {"apiVersion": "v1", "kind": "List", "items": list(items)}


def item(cell: str, spec: dict | None = None, metadata: dict | None = None, **status) -> dict:
    name = resource_name(job(cell).workdir)
    spec = {"replicatedJobs": [{"name": "w", "replicas": 1}]} | (spec or {})
    return {"metadata": {"name": name} | (metadata or {}), "spec": spec, "status": status}


def condition(kind: str, message: str = "") -> dict:
    return {"type": kind, "status": "True", "message": message, "reason": "X", "lastTransitionTime": "2026-01-01"}


@pytest.fixture(scope="session")
def schema(recscale_data_file):
    """Of a JobSet, whose definition contains the Kubernetes schema of jobs and pods."""
    crd = yaml.load(recscale_data_file("schemas/jobset.x-k8s.io_jobsets.yaml").read_text(), Loader=yaml.CSafeLoader)
    return jsonschema.Draft202012Validator(closed(crd))


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake("kubectl", tmp_path, monkeypatch)
    fake.answer("get", stdout=listed())
    fake.answer("create", stdout="jobset.jobset.x-k8s.io/x created\n")
    return fake


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_what_is_rendered_fits_the_schema_of_jobsets_and_pods(settings, schema):
    assert [error.message for error in schema.iter_errors(made(settings))] == []


def _typo(jobset):
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["parallelizm"] = spec.pop("parallelism")


def _container(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_typo, "'parallelizm' was unexpected"),
        (lambda jobset: jobset["spec"]["replicatedJobs"][0].update(replicas="two"), "'two' is not of type 'integer'"),
        (lambda jobset: jobset["spec"].update(suspend=None), "None is not of type 'boolean'"),
        (lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].pop("name"), "'name' is a required property"),
        (lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].update(action="Restart"), "'Restart' is not one"),
        (lambda jobset: _container(jobset).update(envs=[]), "'envs' was unexpected"),
        (lambda jobset: _container(jobset)["env"].append({"name": "A", "value": 1}), "1 is not of type 'string'"),
        (lambda jobset: _container(jobset)["resources"].update(limit={}), "'limit' was unexpected"),
    ],
)
def test_a_planted_mistake_does_not_fit_it(spoil, complaint, schema):
    jobset = copy.deepcopy(made(GPU))
    spoil(jobset)
    found = [error.message for error in schema.iter_errors(jobset)]
    assert len(found) == 1 and complaint in found[0]


def test_gpu_hosts_meet_at_the_coordinator_of_the_jobset():
    jobset = made(GPU)
    (workers,) = jobset["spec"]["replicatedJobs"]
    assert jobset["spec"]["coordinator"] == {"replicatedJob": workers["name"], "jobIndex": 0, "podIndex": 0}
    spec = workers["template"]["spec"]
    assert (workers["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, 2, 2, 0)
    assert spec["completionMode"] == "Indexed"
    container = _container(jobset)
    assert container["command"] == ["python", *job().argv] and container["workingDir"] == "/recscale"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    values = {each["name"]: each.get("value") for each in container["env"]}
    paths = {
        each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"] if "valueFrom" in each
    }
    assert values["RECSCALE_NPROC"] == "2" and values["RECSCALE_COORD"] == "$(COORD_HOST):8476"
    assert paths == {
        "COORD_HOST": "metadata.labels['jobset.sigs.k8s.io/coordinator']",
        "RECSCALE_PROC": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    }
    names = [each["name"] for each in container["env"]]
    assert names.index("COORD_HOST") < names.index("RECSCALE_COORD")  # Kubernetes fills in what comes before


def test_restarts_follow_the_exit_status():
    jobset = made(KINDS["gpu-all"])
    disrupted, failed = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    codes = failed["onExitCodes"]
    assert (codes["containerName"], codes["operator"]) == (_container(jobset)["name"], "NotIn")
    assert codes["values"] == [42, 75, 134, 137, 143] == sorted(set(codes["values"]))
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    # The two texts that Kubernetes 1.31 writes into the Job's condition (pkg/controller/job/pod_failure_policy.go).
    messages = [
        "Pod default/x-w-0-1 has condition DisruptionTarget matching FailJob rule at index 0",
        "Container train for pod default/x-w-0-0 failed with exit code 1 matching FailJob rule at index 1",
    ]
    actions = [
        next(r["action"] for r in policy["rules"] if any(re.search(p, m) for p in r["onJobFailureMessagePatterns"]))
        for m in messages
    ]
    assert actions == ["RestartJobSetAndIgnoreMaxRestarts", "FailJobSet"]


@pytest.mark.parametrize(
    ("name", "hosts", "chips", "labels"),
    [
        ("tpu", 4, 4, ("tpu-v6e-slice", "4x4")),
        ("tpu-host", 1, 8, ("tpu-v5-lite-podslice", "2x4")),
        ("tpu-slices", 16, 4, ("tpu-v5p-slice", "4x4x4")),
    ],
)
def test_tpu_slices_are_left_to_the_detection_of_tpus(name, hosts, chips, labels):
    jobset = made(KINDS[name])
    (workers,) = jobset["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert (workers["replicas"], spec["parallelism"], spec["completions"]) == (KINDS[name].slices, hosts, hosts)
    assert _container(jobset)["resources"]["limits"] == {"google.com/tpu": chips}
    assert not {each["name"] for each in _container(jobset)["env"]} & {"COORD_HOST", *VARIABLES}
    nodes = spec["template"]["spec"]["nodeSelector"]
    assert (nodes["cloud.google.com/gke-tpu-accelerator"], nodes["cloud.google.com/gke-tpu-topology"]) == labels
    alone = "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"]["annotations"]
    assert alone == (hosts > 1)
    assert spec["template"]["spec"].get("hostNetwork", False) == (KINDS[name].slices > 1)


def test_queue_spot_and_the_volume_of_the_runs():
    jobset = made(KINDS["gpu-all"])
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert "kueue.x-k8s.io/queue-name" not in pod["metadata"]["labels"]
    assert pod["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["spec"]["terminationGracePeriodSeconds"] == 120 and pod["spec"]["restartPolicy"] == "Never"
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    mounts = {each["name"]: each["mountPath"] for each in _container(jobset)["volumeMounts"]}
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "runs"} and mounts["runs"] == "/recscale/runs"
    assert {"name": "YES", "value": "no"} in _container(jobset)["env"]  # text, though YAML 1.1 reads a false
    assert "null" not in gke.jobset(job(), FOLDER, KINDS["gpu-all"])


def test_odd_cell_names_stay_text():
    odd = job("lr=1e-3,wd: 0 #$(HOME) $x ü")
    jobset = made(GPU, odd)
    assert jobset["metadata"]["annotations"]["recscale/cell"] == odd.cell
    assert _container(jobset)["command"][-1] == odd.argv[-1].replace("$(", "$$(")  # Kubernetes reads $$( as $(


def test_names_are_dns_labels_unique_and_stable():
    cells = ["a", "A", "a.b", "a_b", "x" * 200 + "1", "x" * 200 + "2", "ü", "-", "1"]
    names = [resource_name(job(cell).workdir) for cell in cells]
    assert len(set(names)) == len(cells)
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name) for name in names)
    assert all(len(f"{name}-w-99-9999-abcde") <= 63 for name in names)  # the longest name of a pod
    assert resource_name("runs/0001_axes/a") == resource_name("./runs//0001_axes/a") == "rs-0001-axes-a-b65c0910"


def test_submit_creates_what_is_missing_and_replaces_what_has_ended(kubectl: Fake, capsys):
    there = listed(
        item("done", conditions=[condition("Completed", "jobset completed successfully")]),
        item("bad", conditions=[condition("Failed", "jobset failed due to\n FailJobSet rule")], restarts=2),
        item("on", replicatedJobsStatus=[{"name": "w", "active": 1, "ready": 1}]),
        item("unseen"),
        item("stopping", metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
    )
    kubectl.answer("get", stdout=there)
    gke.submit([job(cell) for cell in ("new", "done", "bad", "on", "unseen", "stopping")], FOLDER, GPU, False)
    assert kubectl.verbs("get", "create", "delete") == ["get", "create", *["delete", "create"] * 3]
    get, create, delete = kubectl.calls[:3]
    assert get["argv"][1:] == [
        "--namespace=default",
        "get",
        "jobset",
        "--selector=recscale/study=0001-axes",
        "--output=json",
    ]
    assert create["argv"][1:] == ["--namespace=default", "create", "-f", "-"]
    assert create["stdin"].rstrip() == gke.jobset(job("new"), FOLDER, GPU).rstrip()
    assert delete["argv"][-1] == resource_name(job("done").workdir) and "--cascade=foreground" in delete["argv"]
    printed = capsys.readouterr().out
    assert (
        "on: rs-0001-axes-on-" in printed and "(running); left alone" in printed and "(pending); left alone" in printed
    )
    assert "failed, restarts: 2: jobset failed due to FailJobSet rule" in printed


def test_dry_run_prints_what_submit_sends_and_calls_nothing(kubectl: Fake, capsys):
    cells = [job("a"), job("b")]
    gke.submit(cells, FOLDER, TPU, True)
    gke.cancel(cells, FOLDER, TPU, True)
    assert kubectl.calls == []
    dry = capsys.readouterr().out
    gke.submit(cells, FOLDER, TPU, False)
    gke.cancel(cells, FOLDER, TPU, False)
    sent = capsys.readouterr().out
    assert [line for line in sent.splitlines() if "created" not in line and line] == dry.splitlines()
    for call in kubectl.calls[1:3]:
        assert call["stdin"].rstrip() in dry
    assert "kubectl --namespace=default create -f - <<'END'\n" in dry and dry.count("\nEND\n") == 2


def test_a_second_submit_at_the_same_time_is_recognised(kubectl: Fake, capsys):
    message = 'Error from server (AlreadyExists): jobsets.jobset.x-k8s.io "x" already exists'
    kubectl.answer("create", stderr=message, status=1)
    gke.submit([job()], FOLDER, GPU, False)
    assert "just created by another; left alone" in capsys.readouterr().out


def test_a_refusal_is_one_line_and_stops_no_other_cell(kubectl: Fake):
    kubectl.answer("create", stderr="Error from server (Forbidden):\n  no quota\n", status=1, once=True)
    with pytest.raises(CommandError) as found:
        gke.submit([job("a"), job("b")], FOLDER, GPU, False)
    assert str(found.value) == "a: kubectl: Error from server (Forbidden): no quota (status 1)"
    assert kubectl.verbs("get", "create") == ["get", "create", "create"]


def test_no_server_and_no_kubectl_are_one_line(kubectl: Fake, monkeypatch, tmp_path):
    kubectl.answer(
        "get",
        stderr="E1122 05:46:34.9 memcache.go] Unhandled\nThe connection to the server localhost:8080 was refused",
        status=1,
    )
    with pytest.raises(
        CommandError, match=r"^kubectl: The connection to the server localhost:8080 was refused \(status 1\)$"
    ):
        gke.submit([job()], FOLDER, GPU, False)
    assert gke.where([job()], FOLDER, GPU) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match="kubectl is not installed here") as found:
        gke.submit([job()], FOLDER, GPU, False)
    assert "\n" not in str(found.value)
    assert gke.where([job()], FOLDER, GPU) == {}


def test_a_branch_waits_for_its_trunk(kubectl: Fake, capsys):
    gke.submit([job("trunk"), job("branch", after="trunk"), job("late", after="done-before")], FOLDER, GPU, False)
    sent = [yaml.safe_load(call["stdin"])["metadata"]["annotations"]["recscale/cell"] for call in kubectl.calls[1:]]
    assert sent == ["trunk", "late"]
    assert "branch: starts from trunk, which is not done" in capsys.readouterr().out


def test_where_says_it_in_a_few_words(kubectl: Fake):
    two = {"replicatedJobs": [{"name": "w", "replicas": 2}]}
    kubectl.answer(
        "get",
        stdout=listed(
            item("a", spec={"suspend": True}, conditions=[condition("Suspended")]),
            item("b", replicatedJobsStatus=[{"name": "w", "active": 1, "ready": 0}], restarts=4),
            item("c", spec=two, replicatedJobsStatus=[{"name": "w", "active": 2, "ready": 1}]),
            item("d", conditions=[condition("Completed")]),
            {"metadata": {"name": "somebody-else"}, "spec": {}},
        ),
    )
    assert gke.where([job(cell) for cell in "abcde"], FOLDER, GPU) == {
        "a": "waits in its queue",
        "b": "pending, restarts: 4",
        "c": "running (1 of 2 slices)",
        "d": "finished",
    }


def test_cancel_deletes_by_name_in_the_right_place(kubectl: Fake):
    settings = dataclasses.replace(GPU, namespace="team", context="gke_p_eu_c")
    gke.cancel([job("a"), job("b")], FOLDER, settings, False)
    (call,) = kubectl.calls
    names = [resource_name(job(cell).workdir) for cell in "ab"]
    wanted = ["--context=gke_p_eu_c", "--namespace=team", "delete", "jobset", "--ignore-not-found", "--wait=false"]
    assert call["argv"] == ["kubectl", *wanted, *names]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"gpus": 0}, ["gpus = 0: how many of nvidia-h100-80gb a host has (--set gpus=8)"]),
        ({"gpus": "8"}, ["gpus = '8': expected int, found str"]),
        (
            {"spot": 1, "env": {"A": 1}},
            ["spot = 1: expected bool, found int", "env = {'A': 1}: expected a mapping from"],
        ),
        ({"grace": 0, "hosts": 0}, ["hosts = 0: expected at least 1", "grace = 0: expected at least 1"]),
        ({"topology": "v6e:4x4"}, ["accelerator = 'nvidia-h100-80gb' (GPUs) and topology = 'v6e:4x4' (TPUs): set one"]),
        ({"slices": 2}, ["slices = 2: only with topology (TPUs)"]),
        (
            {"namespace": "My_Team", "mount": "runs"},
            ["namespace = 'My_Team': not a name in Kuber", "mount = 'runs': exp"],
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line_each(changes, lines):
    with pytest.raises(ValueError) as found:
        dataclasses.replace(GPU, **changes)
    said = str(found.value).splitlines()
    assert len(said) == len(lines) and all(one.startswith(line) for one, line in zip(said, lines, strict=True)), said


@pytest.mark.parametrize(
    ("topology", "per_host", "complaint"),
    [
        ("v6e:4x4", 8, "chips_per_host = 8: hosts of a v6e:4x4 slice have 4 chips"),
        ("v5e:2x2", 8, "topology = 'v5e:2x2': 4 chips do not fill hosts of 8 (chips_per_host)"),
        ("v5e:2x4", 3, "chips_per_host = 3: hosts of a v5e:2x4 slice have 1 or 4 or 8 chips"),
        ("v5e:3x3", 0, "topology = 'v5e:3x3': no such slice; there are 1x1, 2x2"),
        ("v5p:4x4", 0, "topology = 'v5p:4x4': expected three sizes"),
        ("v5p:1x1x2", 0, "topology = 'v5p:1x1x2': expected three sizes"),
        ("h100:8", 0, "topology = 'h100:8': not a TPU"),
        ("v7:4x4", 0, "topology 'v7:4x4': no chip 'v7' in the table"),
    ],
)
def test_a_topology_that_does_not_fit_is_one_line(topology, per_host, complaint):
    with pytest.raises(ValueError) as found:
        dataclasses.replace(TPU, topology=topology, chips_per_host=per_host)
    assert str(found.value).startswith(complaint) and "\n" not in str(found.value)


def test_slices_join_hosts_only():
    assert (tpu_slice("v5e:2x4", 4).hosts, tpu_slice("v5p:2x2x1").hosts, tpu_slice("v6e:16x16").hosts) == (2, 1, 64)
    assert (tpu_slice("v5p:2x2x2").accelerator_type, tpu_slice("v5e:4x4").accelerator_type) == (
        "v5p-16",
        "v5litepod-16",
    )
    with pytest.raises(ValueError, match="slices = 2: GKE joins slices of several hosts only; v5e:2x4 has one host"):
        dataclasses.replace(TPU, topology="v5e:2x4", slices=2)


def test_what_submit_needs_is_said_at_once(kubectl: Fake):
    away = Job("b", "/home/me/runs/b", ("-m", "recscale.train", "--config=/home/me/study.py:b", "--workdir=x"))
    with pytest.raises(ValueError) as found:
        gke.submit([job("a"), away], FOLDER, gke.Settings(), False)
    assert [line.split(" ")[0] for line in str(found.value).splitlines()] == ["image", "claim", "accelerator"]
    with pytest.raises(ValueError) as found:
        gke.submit([job("a"), away, job("c", runs="elsewhere")], FOLDER, GPU, True)
    config, lost, elsewhere = str(found.value).splitlines()
    assert config.startswith("--config=/home/me/study.py:b: the study is read from the checkout there")
    assert lost.startswith("b: its run folder lies at /home/me/runs/b in the container, outside of the mounted")
    assert elsewhere.startswith("c: its run folder lies at /recscale/elsewhere/0001_axes/c")
    assert kubectl.calls == []
