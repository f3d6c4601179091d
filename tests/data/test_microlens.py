"""MicroLens: the parquet layout with text on invented data, order only, wrong input, and the real files."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recscale.data.event_log import EventLogError
from recscale.data.prepare import prepare
from recscale.data.tfds_builders import from_tfds, to_tfds
from tests.data import make_fixtures as make


def write_source(folder, rows) -> None:
    make.write_parquet(folder / "microlens/microlens.parquet", rows, times=False)
    brand = [f"brand {i}" for i in rows.movies]
    make.write_items(folder / "microlens/microlens_items.parquet", rows.movies, brand=brand)


def test_order_only_with_text(tmp_path):
    rows = make.ratings()
    write_source(tmp_path, rows)
    log = prepare("microlens", tmp_path / "log", source=tmp_path, expected=None)
    user = np.repeat(log.users["raw_id"], log.lengths).tolist()
    raw = log.items["raw_id"][log.events["item_id"]].tolist()
    assert list(zip(user, raw, strict=True)) == [(u, i) for u, i, _, _ in rows.expected()]
    assert set(log.events) == {"item_id"} and log.facts["times"].startswith("none")
    assert log.num_users == make.USERS
    text = log.read_text()
    assert text is not None and text.column_names == ["title", "brand"]
    assert text["brand"].to_pylist() == [f"brand {i}" for i in log.items["raw_id"][1:]]


def test_the_tfds_form_gives_the_same_log(tmp_path):
    write_source(tmp_path, make.ratings())
    log = prepare("microlens", tmp_path / "log", source=tmp_path, expected=None)
    found = from_tfds(to_tfds(log, tmp_path / "tfds", "microlens"), tmp_path / "again")
    np.testing.assert_array_equal(found.offsets, log.offsets)
    np.testing.assert_array_equal(found.events["item_id"], log.events["item_id"])
    text = log.read_text()
    assert text is not None and text.equals(found.read_text())
    assert found.facts == log.facts


def test_without_items_there_is_no_text(tmp_path):
    make.write_parquet(tmp_path / "microlens.parquet", make.ratings(), times=False)
    assert prepare("microlens", tmp_path / "log", source=tmp_path, expected=None).read_text() is None


def test_wrong_input_is_refused(tmp_path):
    write_source(tmp_path, make.ratings())
    with pytest.raises(EventLogError, match=r"expected 13,210"):
        prepare("microlens", tmp_path / "log", source=tmp_path)
    items = tmp_path / "microlens/microlens_items.parquet"
    pq.write_table(pa.table({"item_id": [1.0, 2.0], "title": ["a", "b"]}), items)
    with pytest.raises(EventLogError, match=r"microlens_items\.parquet: column item_id is double"):
        prepare("microlens", tmp_path / "log", source=tmp_path, expected=None)
    rows = make.ratings()
    rows.item[1] = rows.item[0]
    write_source(tmp_path, rows)
    with pytest.raises(EventLogError, match="no item twice"):
        prepare("microlens", tmp_path / "log", source=tmp_path, expected=None)
    assert not (tmp_path / "log").exists()


def test_real_counts(tmp_path, recscale_data, recscale_data_file):
    path = recscale_data_file("microlens/microlens.parquet")
    log = prepare("microlens", tmp_path / "log", source=recscale_data)
    assert (log.num_users, log.num_items, log.num_events) == (13_210, 5_312, 78_255)
    assert (log.lengths.min(), np.bincount(log.events["item_id"])[1:].min()) == (4, 1)
    np.testing.assert_array_equal(log.items["raw_id"][log.events["item_id"]], pq.read_table(path)["item_id"].to_numpy())
    text, given = log.read_text(), pq.read_table(recscale_data_file("microlens/microlens_items.parquet"))
    titles = dict(zip(given["item_id"].to_pylist(), given["title"].to_pylist(), strict=True))
    assert text is not None and text["title"].to_pylist() == [titles[i] for i in log.items["raw_id"][1:].tolist()]
