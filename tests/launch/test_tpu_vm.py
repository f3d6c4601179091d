"""TPU VMs: what gcloud is asked and when, and slices that are taken away."""

import dataclasses
import os
import re
import shutil
import subprocess
import time
import types
from pathlib import Path

import pytest

from launch import queued_resources, tpu_vm
from launch.checks import resource_name
from launch.commands import CommandError
from launch.study import Job
from tests.launch.fakes import Fake

FOLDER = Path("runs/0001_axes")
SETTINGS = tpu_vm.Settings(
    project="p",
    zone="us-east5-b",
    topology="v6e:4x4",
    source="https://example.org/recscale.git@0123abc",
    runs="gs://bucket/team/runs",
    spot=True,
    poll=0.01,
)
PLACE = ["--project=p", "--zone=us-east5-b"]
GCLOUD = ["gcloud", "compute", "tpus", "queued-resources"]


def job(cell: str = "width-8", after: str = "") -> Job:
    workdir = f"runs/0001_axes/{cell}"
    argv = ("-m", "recscale.train", f"--config=experiments/0001_axes/study.py:{cell}", f"--workdir={workdir}")
    return Job(cell, workdir, argv, after)


def name(cell: str) -> str:
    return resource_name(job(cell).workdir)


def rows(**states: str) -> list[dict]:
    place = "projects/p/locations/us-east5-b/queuedResources/"
    return [{"name": place + name(cell), "state": {"state": state}} for cell, state in states.items()]


def finish(cell: str, file: str = "DONE", text: str = "") -> None:
    path = Path(job(cell).workdir) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.chdir(tmp_path)
    fake = Fake("gcloud", tmp_path, monkeypatch)
    fake.answer("list", stdout=[])
    return fake


def test_submit_asks_for_a_spot_slice_with_its_start_up_script(gcloud: Fake, tmp_path):
    gcloud.answer("list", stdout=rows(other="ACTIVE"))
    settings = dataclasses.replace(SETTINGS, service_account="t@p.iam", network="n", subnetwork="s", internal_ips=True)
    tpu_vm.submit([job()], FOLDER, settings, False)
    script = FOLDER / "tpu_vm" / f"{name('width-8')}.sh"
    listing, look, create = (call["argv"] for call in gcloud.calls)
    assert listing == [*GCLOUD, "list", *PLACE, "--format=json"]
    assert look == ["gcloud", "storage", "ls", f"gs://bucket/team/runs/0001_axes/tpu_vm/{script.name}"]
    assert create == [
        *[*GCLOUD, "create", name("width-8"), *PLACE, f"--node-id={name('width-8')}", "--accelerator-type=v6e-16"],
        *["--runtime-version=v2-alpha-tpuv6e", f"--metadata-from-file=startup-script={script}"],
        *["--labels=recscale-study=0001-axes", "--scopes=https://www.googleapis.com/auth/cloud-platform"],
        *["--service-account=t@p.iam", "--network=n", "--subnetwork=s", "--spot", "--internal-ips", "--quiet"],
    ]
    assert script.read_text() == queued_resources.startup_script(job(), settings)


@pytest.mark.parametrize("state", [*queued_resources.ALIVE, *queued_resources.LEAVING])
def test_a_slice_that_is_asked_for_or_there_is_left_alone(gcloud: Fake, capsys, state):
    gcloud.answer("list", stdout=rows(a=state))
    tpu_vm.submit([job("a")], FOLDER, SETTINGS, False)
    assert gcloud.verbs("list", "create", "delete") == ["list"]
    assert "left alone" in capsys.readouterr().out


@pytest.mark.parametrize("state", queued_resources.LOST)
def test_one_that_is_of_no_use_any_more_is_deleted_and_asked_for_anew(gcloud: Fake, state):
    gcloud.answer("list", stdout=rows(a=state))
    tpu_vm.submit([job("a")], FOLDER, SETTINGS, False)
    assert gcloud.verbs("list", "ls", "create", "delete") == ["list", "ls", "delete", "create"]
    assert gcloud.calls[2]["argv"] == [*GCLOUD, "delete", name("a"), *PLACE, "--force", "--quiet"]


def test_dry_run_prints_what_submit_sends_and_calls_nothing(gcloud: Fake, capsys):
    cells = [job("a"), job("b", after="a"), job("c", after="done-before")]
    tpu_vm.submit(cells, FOLDER, SETTINGS, True)
    tpu_vm.cancel([job("a")], FOLDER, SETTINGS, True)
    assert gcloud.calls == [] and not FOLDER.exists()
    dry = capsys.readouterr().out
    tpu_vm.submit(cells, FOLDER, SETTINGS, False)
    gcloud.answer("list", stdout=rows(a="ACTIVE"))
    tpu_vm.cancel([job("a")], FOLDER, SETTINGS, False)
    assert capsys.readouterr().out == dry
    assert "b: starts from a, which is not done" in dry
    for call in gcloud.calls:
        if {"create", "delete"} & set(call["argv"]):
            assert " ".join(call["argv"]) in dry
    assert queued_resources.startup_script(job("c"), SETTINGS) in dry


def test_runs_that_are_not_in_the_bucket_are_refused(gcloud: Fake):
    gcloud.answer("ls", stderr="ERROR: One or more URLs matched no objects.", status=1)
    with pytest.raises(
        CommandError, match="is not seen in gs://bucket/team/runs: mount it with gcsfuse at runs"
    ) as found:
        tpu_vm.submit([job("a"), job("b")], FOLDER, SETTINGS, False)
    assert "\n" not in str(found.value) and "create" not in gcloud.verbs("create")


def test_refusals_are_one_line_each_and_a_race_is_recognised(gcloud: Fake, capsys, monkeypatch, tmp_path):
    gcloud.answer("create", stderr="ERROR: ALREADY_EXISTS: Resource", status=1)
    gcloud.answer("create", stderr="ERROR: (gcloud.x)\n  Quota exceeded", status=1, once=True)
    with pytest.raises(CommandError) as found:
        tpu_vm.submit([job("a"), job("b")], FOLDER, SETTINGS, False)
    assert str(found.value) == "a: gcloud: ERROR: (gcloud.x) Quota exceeded (status 1)"
    assert "b: just created by another; left alone" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    for act in (tpu_vm.submit, tpu_vm.cancel):
        with pytest.raises(CommandError, match="gcloud is not installed here"):
            act([job("a")], FOLDER, SETTINGS, False)
    with pytest.raises(CommandError, match="gcloud is not installed here"):
        tpu_vm.watch([job("a")], FOLDER, SETTINGS)
    assert tpu_vm.where([job("a")], FOLDER, SETTINGS) == {}


def test_where_says_it_in_a_few_words(gcloud: Fake):
    gcloud.answer(
        "list", stdout=rows(a="WAITING_FOR_RESOURCES", b="ACTIVE", c="SUSPENDED", d="PROVISIONING", z="ACTIVE")
    )
    assert tpu_vm.where([job(cell) for cell in "abcde"], FOLDER, SETTINGS) == {
        "a": "waits for a slice",
        "b": "on its slice",
        "c": "slice was taken away",
        "d": "provisioning",
    }


def test_cancel_gives_back_what_is_there(gcloud: Fake):
    gcloud.answer("list", stdout=rows(a="ACTIVE", b="DELETING", d="SUSPENDED"))
    tpu_vm.cancel([job(cell) for cell in "abcd"], FOLDER, SETTINGS, False)
    assert [call["argv"][5] for call in gcloud.calls[1:]] == [name("a"), name("d")]


def _watched(monkeypatch, gcloud: Fake, steps: list, jobs: list[Job], **changes) -> dict[str, str]:
    """Watch, and before each poll take one of the steps: states that gcloud then lists, or a function to call."""
    left = list(steps)

    def poll(seconds: float) -> None:
        assert seconds == SETTINGS.poll
        step = left.pop(0)
        gcloud.answer("list", stdout=step) if isinstance(step, list) else step()

    monkeypatch.setattr(tpu_vm, "time", types.SimpleNamespace(sleep=poll, monotonic=time.monotonic))
    ends = tpu_vm.watch(jobs, FOLDER, dataclasses.replace(SETTINGS, **changes))
    assert left == []
    return ends


def test_watch_replaces_a_slice_that_was_taken_away_until_the_cell_is_done(gcloud: Fake, monkeypatch):
    gcloud.answer("list", stdout=rows(a="ACTIVE"))
    steps = [
        rows(a="SUSPENDING"),
        rows(a="SUSPENDED"),
        rows(a="WAITING_FOR_RESOURCES"),
        rows(a="ACTIVE"),
        rows(a="FAILED"),
        rows(a="ACTIVE"),
        lambda: finish("a"),
    ]
    assert _watched(monkeypatch, gcloud, steps, [job("a")]) == {"a": "done"}
    assert [verb for verb in gcloud.verbs("list", "create", "delete") if verb != "list"] == [
        *["delete", "create"] * 2,  # anew after each loss
        "delete",  # done: given back
    ]


def test_watch_starts_what_has_no_slice_and_a_branch_after_its_trunk(gcloud: Fake, monkeypatch):
    jobs = [job("branch", after="trunk"), job("trunk"), job("late", after="lost"), job("lost")]
    finish("lost", "FAILED", "of an earlier start")
    steps = [
        rows(trunk="ACTIVE", lost="ACTIVE"),
        lambda: (finish("trunk"), os.utime(Path(job("lost").workdir) / "FAILED", ns=(1, 1))),
        rows(),  # one more look, for the branch stands before its trunk
        rows(branch="ACTIVE"),
        lambda: finish("branch"),
    ]
    ends = _watched(monkeypatch, gcloud, steps, jobs)
    assert ends == {
        "trunk": "done",
        "lost": "failed: of an earlier start",
        "late": "not started: its trunk lost is not done",
        "branch": "done",
    }
    created = [call["argv"][5] for call in gcloud.calls if "create" in call["argv"]]
    assert created == [name("trunk"), name("lost"), name("branch")]


def test_watch_leaves_alone_what_others_deleted_and_gives_up_in_the_end(gcloud: Fake, monkeypatch, capsys):
    gcloud.answer("list", stdout=rows(a="ACTIVE", b="ACTIVE"))
    monkeypatch.setattr(tpu_vm, "GONE_SECONDS", 0.0)
    steps = [rows(b="SUSPENDED"), rows(b="SUSPENDED")]
    ends = _watched(monkeypatch, gcloud, steps, [job("a"), job("b")], retries=1)
    assert ends == {
        "a": "its slice is gone without DONE; see runs/0001_axes/a/log.0, then submit again",
        "b": "slice was taken away, replaced 1x before: submit again to go on",
    }
    assert [verb for verb in gcloud.verbs("list", "create", "delete") if verb != "list"] == [
        "delete",
        "create",
        "delete",
    ]


def test_watch_waits_for_a_late_done(gcloud: Fake, monkeypatch):
    gcloud.answer("list", stdout=rows(a="ACTIVE"))
    assert _watched(monkeypatch, gcloud, [rows(), rows(), lambda: finish("a")], [job("a")]) == {"a": "done"}
    assert set(gcloud.verbs("list", "create", "delete")) == {"list"}


def test_watch_bears_refusals_for_a_while(gcloud: Fake, monkeypatch, capsys):
    def refuse():
        gcloud.answer("list", stderr="ERROR: network", status=1, once=True)

    gcloud.answer("create", stderr="ERROR: quota", status=1, once=True)
    steps = [refuse, rows(), rows(a="ACTIVE"), lambda: finish("a")]
    assert _watched(monkeypatch, gcloud, steps, [job("a")]) == {"a": "done"}
    assert gcloud.verbs("create").count("create") == 2
    assert "# a: gcloud: ERROR: quota (status 1)" in capsys.readouterr().out
    gcloud.answer("list", stderr="ERROR: network", status=1)
    gcloud.answer("list", stdout=rows(b="ACTIVE"), once=True)
    with pytest.raises(CommandError, match="network"):
        _watched(monkeypatch, gcloud, [lambda: None] * tpu_vm.PATIENCE, [job("b")])


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"topology": "v6e:4x5"}, ["topology = 'v6e:4x5': no such slice"]),
        ({"topology": "h100:8"}, ["topology = 'h100:8': not a TPU"]),
        (
            {"zone": "us-east5", "runs": "bucket"},
            ["zone = 'us-east5': expected e.g.", "runs = 'bucket': expected gs://"],
        ),
        ({"source": "https://x/y.git"}, ["source = 'https://x/y.git': expected https://HOST/REPOSITORY@REVISION or"]),
        ({"retries": -1, "python": "3"}, ["retries = -1: expected at least 0", "python = '3': expected e.g. 3.12"]),
        ({"env": {"A B": "1"}, "checkout": "x"}, ["checkout = 'x': expected an absolute", "env: 'A B' is no name"]),
        ({"poll": "60"}, ["poll = '60': expected float, found str"]),
    ],
)
def test_settings_that_do_not_fit_are_one_line_each(changes, lines):
    with pytest.raises(ValueError) as found:
        dataclasses.replace(SETTINGS, **changes)
    said = str(found.value).splitlines()
    assert len(said) == len(lines) and all(one.startswith(line) for one, line in zip(said, lines, strict=True)), said


def test_what_submit_needs_is_said_at_once(gcloud: Fake):
    away = Job("b", "/mnt/runs/x/b", ("-m", "recscale.train", "--config=../study.py:b", "--workdir=/mnt/runs/x/b"))
    with pytest.raises(ValueError) as found:
        tpu_vm.submit([away], FOLDER, tpu_vm.Settings(), False)
    lines = str(found.value).splitlines()
    assert [line.split(" ")[0] for line in lines[:5]] == ["project", "zone", "topology", "source", "runs"]
    assert lines[5].startswith("--config=../study.py:b: the study is read from the checkout there")
    assert lines[6].startswith("b: its run folder /mnt/runs/x/b lies elsewhere on the workers")
    assert len(lines) == 7 and gcloud.calls == []


def test_gcloud_knows_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real program reads its flags before it asks who we are; with an empty configuration it goes no further."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CORE_CHECK_GCE_METADATA", "false")
    settings = dataclasses.replace(SETTINGS, service_account="t@p.iam", network="n", subnetwork="s", internal_ips=True)
    script = queued_resources.script_path(job(), FOLDER)
    script.parent.mkdir(parents=True)
    script.write_text("x")
    create, delete = queued_resources.create(job(), FOLDER, settings), queued_resources.delete(job(), settings)
    for command in (create, delete):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "active account" in done.stderr, done.stderr
    done = subprocess.run([*create, "--spott"], capture_output=True, text=True, check=False)
    assert re.search(r"unrecognized arguments:\s+--spott", done.stderr)
