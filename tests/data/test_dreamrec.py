"""DreamRec's sessions: parts, the whole catalogue, wrong input, and the released rows of the real files."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recscale.data import windows
from recscale.data.dreamrec import ITEMS
from recscale.data.event_log import EventLogError
from recscale.data.loading import Loader
from recscale.data.parts import parts
from recscale.data.prepare import prepare
from recscale.data.tfds_builders import from_tfds, to_tfds
from tests.data import make_fixtures as make

SHORT = pytest.mark.parametrize("short", ITEMS)
TEST_ROWS = {"yc": (55_245, 12_847), "ks": (55_346, 9_209)}  # of which with an empty history
VAL_ROWS = {"yc": (57_062, 12_847), "ks": (76_995, 9_209)}


def write(folder, short: str = "yc", names=("val", "test")) -> dict[int, tuple[str, list[int]]]:
    """50 sessions of 3 events or more in the released form; returns session -> (part, its items)."""
    rng = np.random.default_rng(0)
    sessions = {}
    for u in range(make.USERS):
        items = rng.integers(0, ITEMS[short], int(rng.integers(3, 15))).tolist()
        sessions[u] = (names[u * len(names) // make.USERS], items)
    sessions[0][1][:2] = [0, ITEMS[short] - 1]
    write_sessions(folder / f"{short}.parquet", sessions)
    return sessions


def write_sessions(path, sessions) -> None:
    rows = [(u, item, pos, part) for u, (part, items) in sessions.items() for pos, item in enumerate(items)]
    user, item, pos, part = zip(*rows, strict=True)
    table = {
        name: pa.array(column, pa.int32()) for name, column in (("user_id", user), ("item_id", item), ("pos", pos))
    }
    table |= {"timestamp": pa.nulls(len(rows), pa.int64()), "split": pa.array(part, pa.large_string())}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)


@SHORT
def test_sessions_keep_their_order_their_part_and_the_ids_of_the_release(tmp_path, short):
    sessions = write(tmp_path / "dreamrec", short)
    log = prepare(f"dreamrec-{short}", tmp_path / "log", source=tmp_path, expected=None)
    found = [log.events["item_id"][a:b] for a, b in zip(log.offsets, log.offsets[1:], strict=False)]
    assert [(items - 1).tolist() for items in found] == [items for _, items in sessions.values()]
    assert log.users["part"].tolist() == [part for part, _ in sessions.values()]
    assert log.num_items == ITEMS[short] and len(log.items["raw_id"]) == ITEMS[short] + 1
    assert log.items["raw_id"][1:].tolist() == list(range(ITEMS[short]))  # items that never occur are there too
    events = np.concatenate([items for _, items in sessions.values()])
    assert log.facts["items"] == ITEMS[short] and log.facts["items_with_events"] == len(np.unique(events))
    assert set(log.events) == {"item_id"} and log.facts["times"].startswith("none")
    assert "trains on sessions of the val part" in log.facts["train_part"]


def test_a_train_part_in_the_file_is_used(tmp_path):
    sessions = write(tmp_path, names=("train", "train", "val", "test"))
    log = prepare("dreamrec-yc", tmp_path / "log", source=tmp_path, expected=None)
    assert "train_part" not in log.facts
    for name, view in parts(log).items():
        mine = [u for u, (part, _) in sessions.items() if part == name]
        assert view.user.tolist() == mine
        assert log.facts["parts"][f"{name}_users"] == len(mine) == view.dropped["first events (no history)"]
        assert log.facts["parts"][f"{name}_events"] == sum(len(sessions[u][1]) for u in mine)


def test_the_tfds_form_keeps_the_parts(tmp_path):
    write(tmp_path)
    log = prepare("dreamrec-yc", tmp_path / "log", source=tmp_path, expected=None)
    again = from_tfds(to_tfds(log, tmp_path / "tfds", "dreamrec-yc"), tmp_path / "again")
    assert again.users["part"].tolist() == log.users["part"].tolist() and again.num_items == log.num_items
    assert json.dumps(again.facts) == json.dumps(log.facts)
    assert np.array_equal(again.events["item_id"], log.events["item_id"])


def test_wrong_input_is_refused(tmp_path):
    sessions = write(tmp_path)

    def refused(message: str, changed=None, **how) -> None:
        write_sessions(tmp_path / "yc.parquet", {**sessions, **(changed or {})})
        with pytest.raises(EventLogError, match=message):
            prepare("dreamrec-yc", tmp_path / "log", source=tmp_path, **how)
        assert not (tmp_path / "log").exists()

    refused(r"val_users \(expected 12,847\).* test_events \(expected 55,245\)")
    refused(r"yc.parquet: row 2 has item_id 9514, expected 0..9513", {0: ("val", [1, 9514, 2])}, expected=None)
    refused(r"row 1 has split 'valid', expected one of \('train', 'val', 'test'\)", {0: ("valid", [1])}, expected=None)
    refused(r"row 1 has split '', expected one of", {0: (None, [1])}, expected=None)
    write_sessions(tmp_path / "yc.parquet", sessions)
    table = pq.read_table(tmp_path / "yc.parquet")
    torn = table["split"].to_pylist()
    torn[len(sessions[0][1]) + 1] = "test"
    pq.write_table(table.set_column(4, "split", pa.array(torn)), tmp_path / "yc.parquet")
    with pytest.raises(EventLogError, match=f"row {len(sessions[0][1]) + 2}: session 1 is in two parts"):
        prepare("dreamrec-yc", tmp_path / "log", source=tmp_path, expected=None)
    pq.write_table(table.drop_columns(["split"]), tmp_path / "yc.parquet")
    with pytest.raises(EventLogError, match="missing column split"):
        prepare("dreamrec-yc", tmp_path / "log", source=tmp_path, expected=None)


def released_rows(path, part: str, pad: int) -> np.ndarray:
    """The table of a part, made of the file alone: [rows, 12] last 10 items left-aligned, their number, next item."""
    table = pq.read_table(path)
    user, item, pos = (table[name].to_numpy() for name in ("user_id", "item_id", "pos"))
    mine = np.array(table["split"].to_pylist()) == part
    rows = []
    for at in np.flatnonzero(mine):
        history = item[at - min(pos[at], 10) : at]
        assert (user[at - len(history) : at] == user[at]).all()
        rows.append([*history, *[pad] * (10 - len(history)), max(len(history), 1), item[at]])
    return np.array(rows)


def rows_of_batches(loader: Loader, pad: int) -> np.ndarray:
    """The same, read from batches of one example a row."""
    batches = [loader[i] for i in range(loader.steps_per_epoch)]
    item, target, segment = (np.concatenate([b[n] for b in batches]) for n in ("item_id", "target", "segment_ids"))
    real = segment.max(axis=1) > 0
    item, target, length = item[real], target[real], (segment[real] > 0).sum(axis=1)
    assert segment.max() == 1 and ((target > 0).sum(axis=1) == 1).all()
    return np.column_stack([np.where(item > 0, item - 1, pad), length, target.max(axis=1) - 1])


@SHORT
def test_the_released_rows_come_back(tmp_path, recscale_data, recscale_data_file, short):
    path, pad = recscale_data_file(f"dreamrec/{short}.parquet"), ITEMS[short]
    log = prepare(f"dreamrec-{short}", tmp_path / "log", source=recscale_data)
    views, plain = parts(log, history=10, first_events=True), parts(log)
    found = {}
    for name, view in (views | {"train": windows.prefixes(views["train"], 10)}).items():
        loader = Loader(log, view, batch_size=1000, length=10, layout="padded", shuffle=False)
        found[name] = rows_of_batches(loader, pad)
        assert (found[name][:, 0] == pad).sum() == plain[name].dropped["first events (no history)"]
    test, val = found["test"], np.concatenate([found["train"], found["val"]])
    np.testing.assert_array_equal(test, released_rows(path, "test", pad))
    assert (len(test), int((test[:, 0] == pad).sum())) == TEST_ROWS[short]
    expected = released_rows(path, "val", pad)
    np.testing.assert_array_equal(*(rows[np.lexsort(rows.T)] for rows in (val, expected)))
    assert (len(val), int((val[:, 0] == pad).sum())) == VAL_ROWS[short]
    assert len(plain["val"]) == round(0.1 * VAL_ROWS[short][1])
