"""Yelp: the text and parquet layouts on invented data with repeats, wrong input, and the real file."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from recscale.data.event_log import EventLogError
from recscale.data.prepare import prepare
from tests.data import make_fixtures as make


def test_text_sequences(tmp_path):
    sequences = make.write_s3rec(tmp_path / "Yelp.txt")
    log = prepare("yelp", tmp_path / "log", source=tmp_path, expected=None)
    raw = log.items["raw_id"][log.events["item_id"]]
    assert [raw[a:b].tolist() for a, b in zip(log.offsets, log.offsets[1:], strict=False)] == sequences
    assert set(log.events) == {"item_id"}


def test_parquet_keeps_the_order_the_times_and_repeats(tmp_path):
    rows = make.ratings()
    rows.item[1] = rows.item[0]  # the first user comes back to a business
    make.write_parquet(tmp_path / "yelp/yelp.parquet", rows)
    log = prepare("yelp", tmp_path / "log", source=tmp_path, expected=None)
    user = np.repeat(log.users["raw_id"], log.lengths)
    columns = (user, log.items["raw_id"][log.events["item_id"]], log.events["timestamp"])
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == [
        (u, i, t) for u, i, _, t in rows.expected()
    ]
    assert log.num_users == make.USERS
    assert log.facts["repeats"] == "allowed" and log.facts["repeated_events"] == 1


def test_item_text_is_that_of_the_item(tmp_path):
    rows = make.ratings()
    make.write_parquet(tmp_path / "yelp/yelp.parquet", rows)
    about = [f"Food, kind {i % 7}" for i in rows.movies]
    make.write_items(tmp_path / "yelp/yelp_items.parquet", rows.movies, description=about)
    log = prepare("yelp", tmp_path / "log", source=tmp_path, expected=None)
    raw, text = log.items["raw_id"][1:], log.read_text()
    assert text is not None and text.column_names == ["title", "description"]
    assert text["title"].to_pylist() == [make.title(i) for i in raw]
    assert text["description"].to_pylist() == [f"Food, kind {i % 7}" for i in raw]


def test_an_item_without_text_is_null_and_one_given_twice_is_refused(tmp_path):
    rows = make.ratings()
    make.write_parquet(tmp_path / "yelp.parquet", rows)
    rated = np.unique(rows.item)
    make.write_items(tmp_path / "yelp_items.parquet", rated[1:])
    text = prepare("yelp", tmp_path / "log", source=tmp_path, expected=None).read_text()
    assert text is not None and text["title"].to_pylist() == [None, *(make.title(i) for i in rated[1:])]
    make.write_items(tmp_path / "yelp_items.parquet", np.append(rated, rated[3]))
    with pytest.raises(EventLogError, match=f"yelp_items.parquet: id {rated[3]} occurs twice"):
        prepare("yelp", tmp_path / "other", source=tmp_path, expected=None)


def test_a_gap_in_pos_is_refused(tmp_path):
    make.write_parquet(tmp_path / "yelp.parquet", make.ratings())
    table = pq.read_table(tmp_path / "yelp.parquet")
    pq.write_table(table.take([0, *range(2, len(table))]), tmp_path / "yelp.parquet")
    with pytest.raises(EventLogError, match=r"row 2 .* has pos 2, expected 1"):
        prepare("yelp", tmp_path / "log", source=tmp_path, expected=None)


def test_real_counts(tmp_path, recscale_data, recscale_data_file):
    path = recscale_data_file("yelp/yelp.parquet")
    log = prepare("yelp", tmp_path / "log", source=recscale_data)
    table = pq.read_table(path)
    np.testing.assert_array_equal(log.items["raw_id"][log.events["item_id"]], table["item_id"].to_numpy())
    np.testing.assert_array_equal(log.events["timestamp"], table["timestamp"].to_numpy())
    assert (log.lengths.min(), log.lengths.max()) == (5, 350)
    assert (log.facts["tied_events"], log.facts["users_last_two_tied"]) == (0, 0)
    assert log.facts["repeated_events"] == 11_830
    text, given = log.read_text(), pq.read_table(recscale_data_file("yelp/yelp_items.parquet"))
    titles = dict(zip(given["item_id"].to_pylist(), given["title"].to_pylist(), strict=True))
    assert text is not None and text["title"].to_pylist() == [titles[i] for i in log.items["raw_id"][1:].tolist()]
    assert sorted(source for source in log.facts["source_files"]) == ["yelp.parquet", "yelp_items.parquet"]
