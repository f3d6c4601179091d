"""One worker per run folder: whoever dies is replaced, whoever lives is left alone."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recscale.lease import Held, Lease, holder

ROOT = Path(__file__).resolve().parent.parent
HOLD = "import sys, time; from pathlib import Path; from recscale.lease import Lease\n"
HOLD += "lease = Lease.take(Path(sys.argv[1])); print('taken', flush=True); time.sleep(100)"


def elsewhere(workdir: Path, age: float) -> Path:
    """Make the lease that stands in `workdir` one of another machine, with a heartbeat `age` seconds old."""
    (info,) = (workdir / "lease").glob("*.info")
    info.write_text(json.dumps(json.loads(info.read_text()) | {"host": "other", "boot": "other 1"}))
    beat = info.with_suffix(".beat")
    os.utime(beat, (time.time() - age,) * 2)
    return beat


def abandoned(workdir: Path) -> None:
    """A lease whose owner no longer beats."""
    lease = Lease.take(workdir, beat=100)
    lease._released.set()
    lease._thread.join()


def test_the_second_worker_leaves_and_comes_in_after_release(tmp_path):
    with Lease.take(tmp_path) as lease:
        assert holder(tmp_path) == lease.holder
        with pytest.raises(Held, match=f"process {os.getpid()}"):
            Lease.take(tmp_path)
    assert holder(tmp_path) is None and list(tmp_path.iterdir()) == []
    Lease.take(tmp_path).release()


def test_a_killed_process_of_this_machine_is_replaced_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(Held, match=f"process {process.pid}"):
            Lease.take(tmp_path)
        process.kill()
        began = time.monotonic()
        while holder(tmp_path) is not None:  # a killed process is a zombie until its parent looks
            time.sleep(0.01)
        with Lease.take(tmp_path) as lease:
            assert lease.holder.pid == os.getpid() and time.monotonic() - began < 5
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("age", [30.0, 1.0])
def test_a_fresh_heartbeat_elsewhere_is_respected(tmp_path, age):
    abandoned(tmp_path)
    elsewhere(tmp_path, age)
    with pytest.raises(Held, match="on other"):
        Lease.take(tmp_path, beat=0.05)
    assert holder(tmp_path).host == "other"


@pytest.mark.parametrize("age", [1000.0, -1000.0], ids=["old", "clock-of-the-future"])
@pytest.mark.parametrize("alive", [True, False])
def test_an_old_or_future_heartbeat_is_watched_before_it_is_believed(tmp_path, age, alive):
    """A clock that jumped makes a live heartbeat look wrong; that it moves tells it from a dead one."""
    abandoned(tmp_path)
    beat, stop = elsewhere(tmp_path, age), threading.Event()

    def move() -> None:
        moved = 0
        while not stop.wait(0.05):
            moved += 1
            os.utime(beat, (time.time() - age + moved,) * 2)

    thread = threading.Thread(target=move)
    if alive:
        thread.start()
    try:
        if alive:
            with pytest.raises(Held):
                Lease.take(tmp_path, beat=0.2)
        else:
            Lease.take(tmp_path, beat=0.2).release()
    finally:
        stop.set()
        if alive:
            thread.join()


def test_of_many_that_take_over_one_wins(tmp_path):
    abandoned(tmp_path)
    elsewhere(tmp_path, 1000.0)
    results: list[object] = []

    def attempt() -> None:
        try:
            results.append(Lease.take(tmp_path, beat=0.1))
        except Held as error:
            results.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [lease for lease in results if isinstance(lease, Lease)]
    assert len(won) == 1 and len(results) == 8
    won[0].release()


def test_who_was_suspended_learns_that_the_lease_is_lost(tmp_path):
    lease = Lease.take(tmp_path, beat=0.3)
    (tmp_path / "lease" / f"{lease.holder.token}.beat").rename(tmp_path / "lease" / "another.beat")
    deadline = time.monotonic() + 10
    while not lease.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lease.lost
    lease.release()
    assert (tmp_path / "lease" / "another.beat").exists()  # what belongs to another stays


def test_what_a_dead_worker_left_half_done_is_no_lease(tmp_path):
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "x.info").write_text("{")
    assert holder(tmp_path) is None
    Lease.take(tmp_path).release()


def test_a_folder_that_cannot_be_written_is_an_error_not_a_wait(tmp_path):
    (tmp_path / "lease").write_text("a file")
    with pytest.raises(OSError, match="lease: cannot be made"):
        Lease.take(tmp_path)
