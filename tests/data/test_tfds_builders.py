"""Event log -> TFDS dataset -> event log is the identity, and nothing is lost without an error."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds

from recscale.data import DATASETS, tfds_builders
from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.event_log_writer import write
from recscale.data.prepare import prepare
from recscale.data.tfds_builders import EventLogBuilder, from_tfds, to_tfds, verify_num_users

NUM_ITEMS = 30


def make_log(lengths: list[int], times: bool = True, extras: bool = True) -> EventLog:
    rng = np.random.default_rng(len(lengths))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    count = int(offsets[-1])
    events: dict[str, np.ndarray] = {"item_id": rng.integers(1, NUM_ITEMS + 1, count).astype(np.int32)}
    columns = {"item_id": Column("id", NUM_ITEMS + 1)}
    if times:
        events["timestamp"] = 1_400_000_000 + np.arange(count) // 3 * 86_400  # with ties
        columns["timestamp"] = Column("time")
    if extras:
        events |= {
            "like": rng.integers(0, 2, count).astype(np.int8),
            "rating": rng.integers(1, 11, count).astype(np.float32) / 2,
            "played_ratio": rng.random(count) * np.pi,
            "tab": rng.integers(0, 15, count).astype(np.int32),
            "raw_row": rng.integers(2**62, 2**63 - 1, count),
            "code": rng.integers(2**63, 2**64 - 1, count, dtype=np.uint64),
        }
        columns |= {
            "like": Column("feedback", 2),
            "rating": Column("feedback"),
            "played_ratio": Column("feedback"),
            "tab": Column("context", 15),
            "raw_row": Column("extra"),
            "code": Column("extra"),
        }
    return EventLog(offsets, events, columns, NUM_ITEMS, facts={"licence": "ours", "counts": {"users": len(lengths)}})


def with_tables(log: EventLog) -> EventLog:
    rng = np.random.default_rng(1)
    items = {
        "vector": rng.random((NUM_ITEMS + 1, 4)).astype(np.float32),
        "year": np.arange(NUM_ITEMS + 1, dtype=np.int16),
    }
    users = {"age": np.arange(log.num_users, dtype=np.int8), "zip": np.array([f"z{u}" for u in range(log.num_users)])}
    text = pa.table({"title": [f"item {v}" for v in range(1, NUM_ITEMS + 1)]})
    return dataclasses.replace(log, items=items, users=users, text=text)


def assert_same(found: EventLog, expected: EventLog) -> None:
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    assert (found.num_items, found.columns, found.facts) == (expected.num_items, expected.columns, expected.facts)
    for kind in ("events", "items", "users"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert set(ours) == set(theirs), kind
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype, name
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    text, wanted = found.read_text(), expected.read_text()
    assert (text is None) == (wanted is None)
    assert text is None or text.equals(wanted)


LOGS = {
    "everything, users without events first, inside and last": with_tables(make_log([0, 3, 1, 0, 0, 17, 2, 0])),
    "order only": make_log([2, 5, 1], times=False, extras=False),
    "feedback without times": make_log([4, 1], times=False),
    "one user": make_log([1]),
}


@pytest.mark.parametrize("name", LOGS)
def test_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    folder = to_tfds(LOGS[name], tmp_path, "ours", "2.0.1")
    assert folder == tmp_path / "recscale/ours/2.0.1"
    assert_same(from_tfds(folder, tmp_path / "log"), LOGS[name])


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_shards_and_chunks_keep_the_order(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = with_tables(make_log([3, 0, 1, 4, 1, 5, 9, 0]))
    monkeypatch.setattr(tfds_builders, "USERS_PER_SHARD", chunk)
    monkeypatch.setattr(tfds_builders, "READ_USERS", 3)
    folder = to_tfds(log, tmp_path, "ours")
    assert len(list(folder.glob("*.array_record*"))) == -(-log.num_users // chunk)
    assert_same(from_tfds(folder, tmp_path / "log"), log)


def test_memory_mapped_log_round_trips(tmp_path: Path) -> None:
    log = write(with_tables(make_log([3, 1, 2])), tmp_path / "log")
    assert_same(from_tfds(to_tfds(log, tmp_path, "ours"), tmp_path / "back"), log)


def test_same_log_same_bytes(tmp_path: Path) -> None:
    log = with_tables(make_log([3, 0, 2]))
    a, b = (to_tfds(log, tmp_path / side, "ours") for side in "ab")
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert len(files) >= 8
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    assert [path for path in files if (a / path).read_bytes() != (b / path).read_bytes()] == []


def test_a_tfds_user_reads_it(tmp_path: Path) -> None:
    log = make_log([3, 0, 2])
    builder = tfds.builder("recscale/ml-1m", log=log, data_dir=tmp_path)
    builder.download_and_prepare()
    assert builder.info.splits["train"].num_examples == 3 and builder.info.disable_shuffling
    sources = (
        tfds.builder_from_directory(tmp_path / "recscale/ml-1m/1.0.0").as_data_source(split="train"),
        tfds.builder("recscale/ml-1m", data_dir=tmp_path).as_data_source(split="train"),
        tfds.data_source("recscale/ml-1m", data_dir=tmp_path, split="train"),
    )
    for source in sources:
        assert [int(example["user_id"]) for example in source] == [0, 1, 2]
        np.testing.assert_array_equal(source[2]["item_id"], log.events["item_id"][3:])
        assert source[0]["played_ratio"].dtype == np.float64
        assert source[1]["timestamp"].shape == (0,)


@pytest.mark.parametrize("version", [None, "3.0.0"])
def test_config_objects_keep_their_version(version: str | None, tmp_path: Path) -> None:
    config = tfds.core.BuilderConfig(name="ours", version="2.0.0")
    builder = EventLogBuilder(log=make_log([2]), config=config, version=version, data_dir=tmp_path)
    assert builder.data_path == tmp_path / "recscale/ours" / (version or "2.0.0")


def test_public_datasets_are_listed() -> None:
    assert "recscale" in tfds.list_builders(with_community_datasets=False)
    listed = set(tfds.builder_cls("recscale").builder_configs)
    assert listed == set(DATASETS)
    assert {"ml-100k", "ml-1m", "ml-20m", "ml-latest-small", "beauty", "sports", "toys"} <= listed


@pytest.mark.parametrize("file_format", ["parquet", "tfrecord", tfds.core.FileFormat.PARQUET])
def test_other_file_formats_are_refused(file_format: object, tmp_path: Path) -> None:
    log = make_log([2])
    with pytest.raises(EventLogError, match="loses rows"):
        EventLogBuilder(log=log, config="ml-1m", data_dir=tmp_path, file_format=file_format)
    builder = EventLogBuilder(log=log, config="ml-1m", data_dir=tmp_path)
    with pytest.raises(EventLogError, match="loses rows"):
        builder.download_and_prepare(file_format=file_format)
    assert not builder.data_path.exists()


def test_rows_lost_while_writing_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tfds.core.file_adapters.ArrayRecordFileAdapter
    written = adapter.write_examples

    def lossy(path: Path, iterator: Iterable) -> None:
        written(path, list(iterator)[:-1])

    monkeypatch.setattr(adapter, "write_examples", lossy)
    with pytest.raises(EventLogError, match="2 users in 1 shards, expected 3"):
        to_tfds(make_log([1, 2, 3]), tmp_path, "ours")
    assert not (tmp_path / "recscale/ours/1.0.0").exists()


def test_rows_lost_afterwards_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfds_builders, "USERS_PER_SHARD", 2)
    folder = to_tfds(make_log([1, 2, 3, 1]), tmp_path, "ours")
    verify_num_users(folder, 4)
    first, second = sorted(folder.glob("*.array_record*"))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(EventLogError, match="not these users in order"):
        from_tfds(folder, tmp_path / "swapped")
    first.write_bytes(kept)
    second.unlink()
    with pytest.raises(EventLogError, match="2 users in 1 shards, expected 4"):
        from_tfds(folder, tmp_path / "short")
    assert not (tmp_path / "swapped").exists() and not (tmp_path / "short").exists()


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    log = make_log([2, 1])
    with pytest.raises(EventLogError, match="no dataset named"):
        EventLogBuilder(log=log, data_dir=tmp_path)
    with pytest.raises(EventLogError, match="Pass log="):
        EventLogBuilder(config="ml-1m", data_dir=tmp_path)
    with pytest.raises(EventLogError, match="empty log"):
        to_tfds(make_log([0, 0]), tmp_path, "empty")
    with pytest.raises(EventLogError, match="user_id"):
        columns = {**log.columns, "user_id": Column("extra")}
        to_tfds(
            dataclasses.replace(log, events={**log.events, "user_id": np.arange(3)}, columns=columns), tmp_path, "x"
        )
    with pytest.raises(EventLogError, match="native order"):
        swapped = {**log.events, "raw_row": np.arange(3, dtype=">i8")}
        to_tfds(dataclasses.replace(log, events=swapped), tmp_path, "x")
    with pytest.raises(EventLogError, match=r"event_log\.json is missing"):
        from_tfds(tmp_path, tmp_path / "log")
    to_tfds(log, tmp_path, "ours")
    with pytest.raises(EventLogError, match="there already"):
        to_tfds(log, tmp_path, "ours")


def test_no_tensorflow_and_no_jax(tmp_path: Path) -> None:
    """In a fresh process, where other tests cannot hide it; importlib_resources is TFDS's undeclared need."""
    code = f"""
import sys
import numpy as np
sys.modules["importlib_resources"] = None  # an import of it fails
from recscale.data.event_log import Column, EventLog
from recscale.data.tfds_builders import from_tfds, to_tfds
log = EventLog(np.array([0, 2]), {{"item_id": np.array([1, 2], np.int32)}}, {{"item_id": Column("id", 3)}}, 2)
assert from_tfds(to_tfds(log, {str(tmp_path)!r}, "ours"), {str(tmp_path / "log")!r}).num_events == 2
assert not {{"jax", "tensorflow"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def first_users(log: EventLog, count: int) -> EventLog:
    """The log of the first `count` users only, with all item tables."""
    stop = int(log.offsets[count])
    return dataclasses.replace(
        log,
        offsets=log.offsets[: count + 1],
        events={name: values[:stop] for name, values in log.events.items()},
        users={name: rows[:count] for name, rows in log.users.items()},
    )


@pytest.mark.parametrize("name", ["beauty", "kuairand-pure", "ml-100k"])
def test_real_data_round_trips(name: str, tmp_path: Path) -> None:
    source = os.environ.get("RECSCALE_DATA")
    if not source:
        pytest.skip("RECSCALE_DATA is not set")
    log = first_users(prepare(name, tmp_path / "log", source=source), 900)
    assert {"item_id", "timestamp"} <= set(log.events) and log.items
    assert_same(from_tfds(to_tfds(log, tmp_path, name), tmp_path / "back"), log)
