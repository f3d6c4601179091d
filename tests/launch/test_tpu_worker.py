"""The start-up script of a TPU VM, in a real shell with everything around it a stand-in."""

import dataclasses
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch import queued_resources, tpu_vm
from launch.study import Job
from tests.launch.fakes import Fake

SETTINGS = tpu_vm.Settings(
    project="p",
    zone="us-east5-b",
    topology="v6e:4x4",
    source="https://example.org/recscale.git@0123abc",
    runs="gs://bucket/team/runs",
)
CELL = "experiments/0001_axes/study.py:width-8"
WORKDIR = "runs/0001_axes/width-8"
# The fake program reads its workdir from a last word of its own.
JOB = Job("width-8", WORKDIR, ("-m", "recscale.train", f"--config={CELL}", f"--workdir={WORKDIR}", WORKDIR))

TRAINER = """#!/bin/bash
# Obeys the contract of a run: ends with the statuses in turn, at each start with the next; 0 writes DONE.
echo "$PWD $* $EXTRA" >>"{folder}/starts"
status=$(sed -n "$(wc -l <"{folder}/starts")p" "{folder}/statuses")
[[ $status == wait ]] && {{ trap 'exit 42' TERM; touch "{folder}/waits"; while :; do /bin/sleep 0.02; done; }}
[[ $status == 0 ]] && touch "${{@: -1}}/DONE" 2>/dev/null
exit "$status"
"""


class Machine:
    """A worker of a slice: the start-up script in a real shell, with everything around it a stand-in."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.gcloud, self.folder = Fake("gcloud", tmp_path, monkeypatch), tmp_path
        self.checkout = tmp_path / "opt" / "rec scale"
        self.run = self.checkout / WORKDIR
        monkeypatch.setattr(queued_resources, "LOGS", str(tmp_path))
        names = ("git", "curl", "mountpoint", "gcsfuse", "python3", "sleep")
        self.fakes = {each: Fake(each, tmp_path, monkeypatch) for each in names}
        self.fakes["curl"].answer(stdout="0")
        self.fakes["mountpoint"].answer(status=1, once=True)
        self.fakes["mountpoint"].answer()
        self.fakes["mountpoint"].answer(status=1, once=True)
        python = Path(f"{self.checkout}-venv") / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(TRAINER.format(folder=tmp_path))
        python.chmod(0o755)
        self.run.mkdir(parents=True)

    def start(self, *statuses: int | str, **changes) -> subprocess.Popen[str]:
        (self.folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        settings = dataclasses.replace(SETTINGS, checkout=str(self.checkout), env={"EXTRA": "a b'c"}, **changes)
        path = self.folder / "startup.sh"
        path.write_text(queued_resources.startup_script(JOB, settings))
        return subprocess.Popen(["bash", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def boot(self, *statuses: int | str, **changes) -> tuple[int, str]:
        process = self.start(*statuses, **changes)
        said, _ = process.communicate(timeout=20)
        return process.returncode, said

    @property
    def starts(self) -> list[str]:
        path = self.folder / "starts"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def deleted(self) -> bool:
        return self.gcloud.verbs("delete").count("delete") == 1


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_the_start_up_script_runs_the_cell_again_until_it_is_done(machine: Machine):
    status, said = machine.boot(42, 137, 75, 143, 0)
    assert status == 0 and len(machine.starts) == 5 and (machine.run / "DONE").exists(), said
    assert machine.starts[0].startswith(f"{machine.checkout} -m recscale.train --config=experiments/0001_axes/study.py")
    assert machine.starts[0].endswith(" a b'c")
    git = [call["argv"][1:] for call in machine.fakes["git"].calls]
    assert git[1] == ["fetch", "-q", "--depth=1", "https://example.org/recscale.git", "0123abc"]
    (mounted,) = machine.fakes["gcsfuse"].calls
    assert mounted["argv"][-3:] == ["--only-dir=team/runs", "bucket", f"{machine.checkout}/runs"]
    install = machine.fakes["python3"].calls[-1]["argv"]
    assert install[-1] == f"--editable={machine.checkout}[tpu]" and install[1:5] == ["-m", "uv", "pip", "install"]
    assert [call["argv"][1] for call in machine.fakes["sleep"].calls] == ["30"]  # before the lease may have expired
    delete = machine.gcloud.calls[-1]["argv"]
    assert delete == [*queued_resources.delete(JOB, SETTINGS), "--async"]
    assert "start 4" in (machine.run / "log.0").read_text()


def test_a_second_boot_finds_all_in_place_and_a_done_cell_is_not_started(machine: Machine):
    machine.boot(0)
    for fake in machine.fakes.values():
        fake.forget()
    machine.gcloud.forget()
    status, said = machine.boot()
    assert status == 0 and len(machine.starts) == 1 and machine.deleted and "done" in said
    assert not machine.fakes["git"].calls and not machine.fakes["python3"].calls and not machine.fakes["gcsfuse"].calls


@pytest.mark.parametrize(
    ("statuses", "changes", "reason"),
    [
        ((42, 3), {}, "failed with exit status 3"),
        ((42, 42, 42), {"restarts": 2}, "gave up after 2 restarts"),
    ],
)
def test_a_real_failure_and_too_many_restarts_end_it(machine: Machine, statuses, changes, reason):
    status, said = machine.boot(*statuses, **changes)
    assert status == 1 and len(machine.starts) == len(statuses) and machine.deleted, said
    assert (machine.run / "FAILED").read_text() == f"worker 0: {reason}\n"


def test_the_reason_that_the_run_wrote_stays(machine: Machine):
    (machine.run / "FAILED").write_text("no such config\n")
    assert machine.boot(1)[0] == 1 and (machine.run / "FAILED").read_text() == "no such config\n"


def test_another_worker_leaves_the_slice_to_worker_0_unless_it_fails(machine: Machine):
    machine.fakes["curl"].answer(stdout="3")
    assert machine.boot(0)[0] == 0 and not machine.deleted
    (machine.run / "DONE").unlink()
    (machine.folder / "starts").unlink()
    assert machine.boot(1)[0] == 1 and machine.deleted
    assert (machine.run / "FAILED").read_text() == "worker 3: failed with exit status 1\n"


def test_a_step_that_fails_is_tried_again_and_then_reported(machine: Machine):
    machine.fakes["git"].answer("fetch", status=1)
    status, said = machine.boot()
    assert status == 1 and "get_code failed, see" in said and machine.deleted and not machine.starts
    assert [call["argv"][1] for call in machine.fakes["sleep"].calls] == ["10", "60"]
    machine.fakes["git"].answer("fetch")
    assert machine.boot(0)[0] == 0


def test_the_notice_of_a_preemption_reaches_the_program_which_is_not_started_again(machine: Machine):
    process = machine.start("wait", 0)
    for _ in range(500):
        if (machine.folder / "waits").exists():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and len(machine.starts) == 1 and not machine.deleted, said
    assert (machine.run / "log.0").exists() and not (machine.run / "FAILED").exists()


def test_a_tarball_and_nfs_instead():
    settings = dataclasses.replace(SETTINGS, source="gs://b/recscale.tar.gz", runs="10.0.0.2:/share")
    script = queued_resources.startup_script(JOB, settings)
    assert "gcloud storage cat gs://b/recscale.tar.gz | tar -xz && touch" in script
    assert 'mount -t nfs -o hard 10.0.0.2:/share "$runs"' in script
    assert queued_resources.visible(JOB, Path("runs/0001_axes"), settings) == []
