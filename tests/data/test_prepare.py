"""The prepare command: names, sources, counts, finished and killed logs, one line per error."""

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from recscale.data import DATASETS, event_log_writer
from recscale.data.event_log import EventLog, EventLogError, check
from recscale.data.facts import KNOWN, known_counts
from recscale.data.planted import Planted, generate
from recscale.data.prepare import main, prepare, verify_counts
from recscale.data.sources import SourceError
from tests.data import make_fixtures as make


@pytest.fixture
def source(tmp_path):
    return make.write_ml_1m(tmp_path / "source", make.ratings())


def test_every_dataset_has_known_counts():
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        for layout in dataset.layouts:
            counts = known_counts(name, layout.name)
            assert counts and any(count > 0 for key, count in counts.items() if key.endswith("events"))
    assert known_counts("ml-1m", "dat") == KNOWN["ml-1m"] == {"users": 6040, "items": 3706, "events": 1_000_209}


def test_finished_log_is_recognised_and_not_rebuilt(tmp_path, source):
    lines = []
    first = prepare("ml-1m", tmp_path / "log", source=source, expected=None, report=lines.append)
    assert any("wrote 50 of 50 users" in line for line in lines)
    stamp = (tmp_path / "log/meta.json").stat().st_mtime_ns
    lines.clear()
    again = prepare("ml-1m", tmp_path / "log", source=source, expected=None, report=lines.append)
    assert (tmp_path / "log/meta.json").stat().st_mtime_ns == stamp
    assert "already prepared" in lines[-1]
    assert again.facts == first.facts
    assert set(first.facts["source_files"]) == {"ratings.dat", "movies.dat", "users.dat"}
    check(again, allow_repeats=False)


def test_log_of_other_data_is_not_replaced(tmp_path, source):
    prepare("ml-1m", tmp_path / "log", source=source, expected=None)
    make.write_ml_1m(source, make.ratings(seed=1))
    with pytest.raises(EventLogError, match=r"holds another log.*remove it or choose another --out"):
        prepare("ml-1m", tmp_path / "log", source=source, expected=None)


def test_counts_are_verified(tmp_path, source):
    with pytest.raises(EventLogError, match=r"ml-1m: found 50 users \(expected 6,040\).*1,000,209"):
        prepare("ml-1m", tmp_path / "log", source=source)
    assert not (tmp_path / "log").exists()
    log = prepare("ml-1m", tmp_path / "log", source=source, expected={"users": 50})
    with pytest.raises(EventLogError, match="items"):
        verify_counts("ml-1m", log, {"users": 50, "items": log.num_items + 1})


def test_missing_source_says_what_and_where(tmp_path):
    with pytest.raises(SourceError, match=r"does not exist.*dat: ratings.dat, movies.dat.*grouplens.*ml-1m.zip"):
        prepare("ml-1m", tmp_path / "log", source=tmp_path / "nowhere")
    (tmp_path / "ratings.dat").write_text("")
    with pytest.raises(SourceError, match=r"movies.dat missing from the dat layout"):
        prepare("ml-1m", tmp_path / "log", source=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=ml1m"], "unknown dataset 'ml1m'; known: beauty, dreamrec-ks.*Did you mean ml-1m?"),
        (["--dataset=ml-1m"], "needs --source"),
        (["--dataset=ml-1m", "--source=SOURCE"], "expected 6,040"),
        (["--dataset=toys", "--source=SOURCE"], "Toys_and_Games.txt"),
        (["--dataset=ml-1m", "--source=SOURCE", "--set", "users=3"], "for --dataset=planted only"),
        (["--dataset=planted", "--set", "user=3"], "no setting 'user'.*Did you mean users?"),
        (["--dataset=planted", "--set", "users=many"], "expected a number"),
        (["--dataset=planted", "--set", "users=1.5"], "expected a int"),
        (["--dataset=planted", "--set", "users"], "expected FIELD=VALUE"),
        (["--dataset=planted", "--set", "stay=2"], "stay"),
    ],
)
def test_command_prints_one_line_and_exits_2(tmp_path, source, capsys, arguments, message):
    arguments = [text.replace("SOURCE", str(source)) for text in arguments]
    assert main([*arguments, f"--out={tmp_path / 'log'}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert not (tmp_path / "log").exists() and not (tmp_path / "log.partial").exists()


@pytest.mark.parametrize("blocks", [1, 100, 2000])
def test_disk_that_fills_up(tmp_path, blocks):
    """The system refuses writes beyond a size: at the first header, in a chunk, in a later one."""
    limited = f"ulimit -f {blocks}; exec '{sys.executable}' -m recscale.data.prepare --dataset=planted "
    limited += f"--set users=20000 --out={tmp_path / 'log'}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert "File too large" in lines[-1] and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unwritable_and_full_disk(tmp_path, source, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    arguments = ["--dataset=planted", "--set", "users=50"]
    assert main([*arguments, f"--out={tmp_path / 'file' / 'log'}"]) == 2
    assert "Not a directory" in capsys.readouterr().err

    def no_space(self, array):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(event_log_writer._GrowingArray, "append", no_space)
    assert main([*arguments, f"--out={tmp_path / 'log'}"]) == 2
    assert capsys.readouterr().err.splitlines() == ["prepare: [Errno 28] No space left on device"]
    assert not (tmp_path / "log.partial").exists()


@pytest.mark.parametrize("settings", [{"users": 1500}, {"users": 300, "born": True, "context_reliability": 0.0}])
def test_planted_streams_what_generate_makes(tmp_path, settings):
    log = prepare("planted", tmp_path / "log", settings={name: str(value) for name, value in settings.items()})
    expected = generate(Planted(**settings))
    np.testing.assert_array_equal(log.offsets, expected.offsets)
    assert set(log.events) == set(expected.events) and set(log.items) == set(expected.items)
    assert not expected.users
    for name in expected.events:
        np.testing.assert_array_equal(log.events[name], expected.events[name])
    for name in expected.items:
        np.testing.assert_array_equal(log.items[name], expected.items[name])
    assert log.columns == expected.columns and log.facts.items() >= expected.facts.items()
    assert log.facts["planted"] == dataclasses.asdict(Planted(**settings))
    again = prepare("planted", tmp_path / "log", settings=settings)
    assert again.facts == log.facts


def test_killed_prepare_is_finished_by_the_next(tmp_path):
    out, partial = tmp_path / "log", tmp_path / "log.partial"
    command = [sys.executable, "-m", "recscale.data.prepare", "--dataset=planted", "--set", "users=20000", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (partial / "progress.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists() and not out.exists()
    with pytest.raises(EventLogError, match="no event log here"):
        EventLog.open(out)
    log = prepare("planted", out, settings={"users": 20000})
    expected = generate(Planted(users=20000))
    np.testing.assert_array_equal(log.offsets, expected.offsets)
    for name in expected.events:
        np.testing.assert_array_equal(log.events[name], expected.events[name])
    assert not partial.exists()
