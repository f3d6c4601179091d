"""From rows to an event log: ids, ties, and side tables lined up with the ids."""

import numpy as np
import pyarrow as pa
import pytest

from recscale.data.event_log import Column, EventLogError
from recscale.data.rows import align, align_text, build, codes, half_stars, multi_hot, ties


def test_build_sorts_by_user_and_time_only():
    user, item = np.array([9, 4, 9, 4, 9]), np.array([70, 50, 60, 70, 50])
    time = np.array([5, 1, 5, 1, 2])
    rating = {"rating": (Column("feedback", 11), np.arange(5))}
    log = build(user, item, time, rating, order=time, name="x")
    np.testing.assert_array_equal(log.offsets, [0, 2, 5])
    np.testing.assert_array_equal(log.users["raw_id"], [4, 9])
    np.testing.assert_array_equal(log.items["raw_id"], [0, 50, 60, 70])
    np.testing.assert_array_equal(log.events["rating"], [1, 3, 4, 0, 2])
    np.testing.assert_array_equal(log.events["item_id"], [1, 3, 1, 3, 2])
    assert log.events["item_id"].dtype == np.int32


def test_large_ids_stay_exact():
    item = np.array([2**24 + 1, 2**24, 2**31 - 3])  # the first two are one number in float32
    log = build(np.zeros(3, np.int64), item, None, {}, order=None, name="x")
    np.testing.assert_array_equal(log.items["raw_id"][log.events["item_id"]], item)


def test_ties_do_not_reach_over_users():
    found = ties(np.array([0, 2, 2, 5]), np.array([7, 7, 7, 8, 8]))
    assert found == {"tied_events": 0.4, "users_last_two_tied": 1.0}
    assert ties(np.array([0, 1, 2]), np.array([7, 7])) == {"tied_events": 0.0, "users_last_two_tied": 0.0}


@pytest.mark.parametrize("rows", [([], []), ([1, 2, 1], [5, 5, 6])])
def test_empty_or_unsorted_rows_are_refused(rows):
    user, item = (np.array(column, np.int64) for column in rows)
    with pytest.raises(EventLogError, match=r"x\.csv: (empty log|users are not sorted: user 1)"):
        build(user, item, None, {}, order=None, name="x.csv")


def test_ids_without_a_row_get_zeros_and_nulls():
    raw, keys = np.array([10, 20, 99]), np.array([20, 5, 10])
    values = np.array([[2.0, 2.5], [7.0, 7.0], [1.0, 1.5]])
    np.testing.assert_array_equal(align(raw, keys, values, "x", padding=True), [[0, 0], [1.0, 1.5], [2.0, 2.5], [0, 0]])
    np.testing.assert_array_equal(align(raw, keys, np.array(["b", "c", "a"]), "x", padding=False), ["a", "b", ""])
    text = align_text(raw, keys, pa.table({"title": ["b", "c", "a"]}), "x")
    assert text["title"].to_pylist() == ["a", "b", None]
    with pytest.raises(EventLogError, match="id 5 occurs twice"):
        align(raw, np.array([5, 10, 5]), values, "x", padding=False)


def test_codes_and_multi_hot():
    found, names = codes(pa.chunked_array([["b", None], ["a", "b"]]))
    np.testing.assert_array_equal(found, [2, 0, 1, 2])
    assert names == ["a", "b"]
    found, _ = codes(pa.chunked_array([pa.array([2.0, float("nan"), 1.0])]))
    np.testing.assert_array_equal(found, [2, 0, 1])
    hot, names = multi_hot(pa.chunked_array([[["w", "d"], []], [["none", "d"]]]), ignore=["none"])
    assert names == ["d", "w"]
    np.testing.assert_array_equal(hot, [[1, 1], [0, 0], [1, 0]])


def test_half_stars():
    column, found = half_stars(pa.chunked_array([pa.array([0.5, 3.0, 5.0])]), "x")
    np.testing.assert_array_equal(found, [1, 6, 10])
    assert column.cardinality == 11
    with pytest.raises(EventLogError, match=r"x: column rating has 2 bad values, first in row 2: 0\.0"):
        half_stars(pa.chunked_array([pa.array([1.0, 0.0, 5.5])]), "x")
