"""The event log on disk: round trip, growing files, resuming, memory mapping, and what it refuses."""

import dataclasses
import errno
import json
import os

import numpy as np
import pyarrow as pa
import pytest

from recscale.data import event_log_writer
from recscale.data.event_log import Column, EventLog, EventLogError, check
from recscale.data.event_log_writer import Writer, write


def small_log(users: int = 50, items: int = 20, seed: int = 0) -> EventLog:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, users)
    lengths[0] = 5
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item_id = np.concatenate([rng.choice(items, n, replace=False) + 1 for n in lengths]).astype(np.int32)
    time = np.concatenate([np.sort(rng.integers(10**9, 10**9 + 50, n)) for n in lengths]).astype(np.int64)
    events = {
        "item_id": item_id,
        "timestamp": time,
        "rating": rng.integers(0, 11, len(item_id)).astype(np.int8),
        "ratio": rng.random(len(item_id)).astype(np.float32),
        "tab": rng.integers(0, 4, len(item_id)).astype(np.int32),
    }
    columns = {
        "item_id": Column("id"),
        "timestamp": Column("time"),
        "rating": Column("feedback", 11),
        "ratio": Column("feedback"),
        "tab": Column("context", 4),
    }
    return EventLog(
        offsets=offsets,
        events=events,
        columns=columns,
        num_items=items,
        items={"vector": rng.standard_normal((items + 1, 3)).astype(np.float32)},
        users={"zip": np.array([f"z{u % 7:03d}" for u in range(users)]), "age": np.arange(users)},
        facts={"licence": "none", "sha256": "0"},
        text=pa.table({"title": [f"é{v}" for v in range(1, items + 1)]}),
    )


def assert_same(found: EventLog, expected: EventLog) -> None:
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    for name in ("events", "items", "users"):
        arrays, wanted = getattr(found, name), getattr(expected, name)
        assert set(arrays) == set(wanted)
        for key in arrays:
            np.testing.assert_array_equal(arrays[key], wanted[key], err_msg=key)
            assert arrays[key].dtype == wanted[key].dtype
    assert (found.columns, found.num_items, found.facts) == (expected.columns, expected.num_items, expected.facts)
    left, right = found.read_text(), expected.read_text()
    assert left is not None and right is not None and left.to_pydict() == right.to_pydict()


@pytest.mark.parametrize("chunk_events", [1, 17, 10**6])
def test_round_trip(tmp_path, chunk_events):
    log = small_log()
    check(log, allow_repeats=False)
    found = write(log, tmp_path / "log", allow_repeats=False, chunk_events=chunk_events)
    assert_same(found, log)
    assert_same(EventLog.open(tmp_path / "log"), log)
    assert isinstance(found.events["item_id"], np.memmap) and isinstance(found.offsets, np.memmap)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log"]
    assert not (tmp_path / "log" / "progress.json").exists()
    check(found)


@pytest.mark.parametrize("chunk_events", [1, 7, 10**6])
def test_user_chunks_cover_every_user_once(chunk_events):
    log = small_log()
    chunks = list(log.user_chunks(chunk_events))
    assert [user for first, last in chunks for user in range(first, last)] == list(range(log.num_users))
    assert all(last - first == 1 or log.offsets[last] - log.offsets[first] <= chunk_events for first, last in chunks)


def test_killed_writer_is_continued(tmp_path):
    log, path = small_log(), tmp_path / "log"
    identity = {"dataset": "x", "sha256": "1"}
    half = int(log.offsets[20])
    writer = Writer(path, log.columns, log.num_items, identity=identity)
    users = {name: values[:20] for name, values in log.users.items()}
    writer.append(log.lengths[:20], {name: values[:half] for name, values in log.events.items()}, users)
    # The next chunk was being written when the process died: bytes lie beyond the last complete chunk.
    writer._arrays["events/item_id"].append(np.full(3, 9, np.int32))
    for array in writer._arrays.values():
        array.file.close()
    assert not path.exists()
    written = []
    found = write(log, path, identity=identity, progress=lambda *done: written.append(done), chunk_events=50)
    assert written[0][0] > 20
    assert_same(found, log)


@pytest.mark.parametrize("identity", [None, {"dataset": "y", "sha256": "1"}])
def test_partial_of_something_else_is_replaced(tmp_path, identity):
    log, path = small_log(), tmp_path / "log"
    writer = Writer(path, log.columns, log.num_items, identity={"dataset": "x", "sha256": "1"})
    five = {name: values[:5] for name, values in log.events.items()}
    writer.append(np.array([5]), five, {name: values[:1] for name, values in log.users.items()})
    writer.__exit__(None, None, None)
    assert_same(write(log, path, identity=identity), log)


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    log = small_log()

    def no_space(self, array):
        if self.rows > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, array)

    append = event_log_writer._GrowingArray.append
    monkeypatch.setattr(event_log_writer._GrowingArray, "append", no_space)
    with pytest.raises(OSError, match="No space left"):
        write(log, tmp_path / "log", chunk_events=10)
    assert list(tmp_path.iterdir()) == []


def test_existing_path_is_never_overwritten(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log/thesis.txt").write_text("precious")
    with pytest.raises(EventLogError, match="not empty"):
        write(small_log(), tmp_path / "log")
    assert (tmp_path / "log/thesis.txt").read_text() == "precious"


def test_open_refuses_what_is_not_a_whole_log(tmp_path):
    with pytest.raises(EventLogError, match="no event log here"):
        EventLog.open(tmp_path)
    path = tmp_path / "log"
    write(small_log(), path)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "schema_version": 99}))
    with pytest.raises(EventLogError, match="schema version 99"):
        EventLog.open(path)
    (path / "meta.json").write_text(json.dumps(meta))
    data = (path / "events/item_id.npy").read_bytes()
    (path / "events/item_id.npy").write_bytes(data[:-4])
    with pytest.raises(EventLogError, match=r"item_id\.npy: missing or truncated"):
        EventLog.open(path)
    (path / "events/item_id.npy").unlink()
    with pytest.raises(EventLogError, match="damaged log"):
        EventLog.open(path)


def with_event(log: EventLog, name: str, values: np.ndarray, column: Column | None = None) -> EventLog:
    columns = {**log.columns, name: column or log.columns[name]}
    return dataclasses.replace(log, events={**log.events, name: values}, columns=columns)


def changed(log: EventLog, name: str, value: float, row: int = 3) -> EventLog:
    values = np.array(log.events[name])
    values[row] = value
    return with_event(log, name, values)


def twice(log: EventLog) -> EventLog:
    return changed(log, "item_id", log.events["item_id"][2])


WRONG = {
    "empty": (lambda log: EventLog(np.zeros(1, np.int64), log.events, log.columns, 20), "empty log"),
    "no events": (lambda log: dataclasses.replace(log, offsets=np.zeros(4, np.int64)), "empty log"),
    "offsets fall": (lambda log: dataclasses.replace(log, offsets=np.array([0, 5, 3, log.num_events])), "contiguous"),
    "offsets float": (lambda log: dataclasses.replace(log, offsets=log.offsets.astype(float)), "expected int64"),
    "short column": (lambda log: with_event(log, "rating", log.events["rating"][:-1]), "offsets say"),
    "no item_id": (lambda log: dataclasses.replace(log, columns={}), "missing column item_id"),
    "undeclared": (lambda log: dataclasses.replace(log, columns={"item_id": Column("id")}), "Make them equal"),
    "float ids": (lambda log: with_event(log, "item_id", log.events["item_id"].astype(np.float32)), "never pass"),
    "int64 ids": (lambda log: with_event(log, "item_id", log.events["item_id"].astype(np.int64)), "expected int32"),
    "id 0": (lambda log: changed(log, "item_id", 0), r"user 0: 0, expected 1\.\.20"),
    "negative id": (lambda log: changed(log, "item_id", -1), r"expected 1\.\.20"),
    "id too large": (lambda log: changed(log, "item_id", 21), r"21, expected 1\.\.20"),
    "repeat": (twice, "no item twice"),
    "int32 time": (lambda log: with_event(log, "timestamp", log.events["timestamp"].astype(np.int32)), "int64 seconds"),
    "float time": (lambda log: with_event(log, "timestamp", log.events["timestamp"] * 1.0), "expected int64 seconds"),
    "milliseconds": (lambda log: with_event(log, "timestamp", log.events["timestamp"] * 1000), "milliseconds"),
    "time falls": (lambda log: changed(log, "timestamp", 0), "does not decrease"),
    "code too large": (lambda log: changed(log, "rating", 11), r"events/rating.*expected 0\.\.10"),
    "negative context": (lambda log: changed(log, "tab", -1), r"expected 0\.\.3"),
    "NaN": (lambda log: changed(log, "ratio", np.nan), "nan, expected a finite number"),
    "infinite": (lambda log: changed(log, "ratio", np.inf), "inf, expected a finite number"),
    "context dtype": (
        lambda log: with_event(log, "tab", log.events["tab"].astype(np.int64)),
        "context column is int32",
    ),
    "codes as floats": (lambda log: with_event(log, "rating", log.events["ratio"]), "integer codes"),
    "objects": (lambda log: with_event(log, "rating", log.events["rating"].astype(object)), "dtype object"),
    "item rows": (lambda log: dataclasses.replace(log, items={"x": np.zeros(20)}), "expected 21 rows"),
    "item NaN": (lambda log: dataclasses.replace(log, items={"x": np.full(21, np.nan)}), "items/x: NaN"),
    "user rows": (lambda log: dataclasses.replace(log, users={"x": np.zeros(49)}), "users/x: .*expected 50"),
    "text rows": (lambda log: dataclasses.replace(log, text=pa.table({"title": ["a"] * 19})), "items/text: 19 rows"),
    "too many items": (lambda log: dataclasses.replace(log, num_items=2**31), "ids are int32"),
    "column name": (lambda log: with_event(log, "../x", log.events["ratio"], Column("extra")), "plain identifier"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_logs_are_refused(tmp_path, case):
    change, message = WRONG[case]
    log = change(small_log())
    with pytest.raises(EventLogError, match=message):
        check(log, allow_repeats=False)
    if not case.startswith("offsets"):
        with pytest.raises(EventLogError):
            write(log, tmp_path / "log", allow_repeats=False)
    assert list(tmp_path.iterdir()) == []


def test_times_may_fall_between_users_and_repeats_may_be_allowed():
    log = small_log()
    check(changed(log, "timestamp", log.events["timestamp"].max() + 5, row=int(log.offsets[1]) - 1))
    check(twice(log), allow_repeats=True)


def test_writer_refuses_chunks_that_do_not_fit(tmp_path):
    log = small_log()
    five = {name: values[:5] for name, values in log.events.items()}
    with pytest.raises(EventLogError, match="lengths sum to 4"), Writer(tmp_path / "a", log.columns, 20) as writer:
        writer.append(np.array([4]), five)
    with pytest.raises(EventLogError, match="the first int8"), Writer(tmp_path / "a", log.columns, 20) as writer:
        writer.append(np.array([5]), five)
        writer.append(np.array([5]), {**five, "rating": five["rating"].astype(np.int16)})
    with (
        pytest.raises(EventLogError, match="users/x: 1 rows for 2 users"),
        Writer(tmp_path / "a", log.columns, 20) as writer,
    ):
        writer.append(np.array([5]), five, {"x": np.zeros(1)})
        writer.append(np.array([5]), five)
        writer.finish()
    with pytest.raises(EventLogError, match="empty log"), Writer(tmp_path / "a", log.columns, 20) as writer:
        writer.finish()
    assert list(tmp_path.iterdir()) == []
