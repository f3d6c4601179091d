"""Codes fixed before training, and the facts of shared rows, against plain Python."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

from recscale.data import codes, splits
from recscale.data.event_log import Column, EventLog


def make_log(users: list[list[int]], num_items: int) -> EventLog:
    offsets = np.concatenate([[0], np.cumsum([len(u) for u in users])]).astype(np.int64)
    events = {"item_id": np.array([item for user in users for item in user], np.int32)}
    return EventLog(offsets, events, {"item_id": Column("id")}, num_items)


def whole(log: EventLog) -> splits.View:
    """Every event of every user as a training event."""
    first, last = np.asarray(log.offsets[:-1]), np.asarray(log.offsets[1:])
    return splits.View("train", np.arange(log.num_users, dtype=np.int32), first, first + 1, last)


def two_tastes(users: int = 60, items: int = 41, seed: int = 0) -> EventLog:
    """Even users take items 1..20, odd ones 21..40; nobody takes the last ones."""
    rng = np.random.default_rng(seed)
    return make_log([(rng.integers(1, 21, rng.integers(5, 15)) + 20 * (u % 2)).tolist() for u in range(users)], items)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_interactions_are_binary_and_of_training_events_only(monkeypatch, chunk):
    monkeypatch.setattr(codes, "CHUNK_EVENTS", chunk)
    log = make_log([[1, 2, 2, 1, 9], [3], [4, 4, 4, 8], [2, 6, 5, 2, 7, 10]], 12)
    view = splits.leave_one_out(log, validation=False)["train"]
    found = codes.interactions(log, view)
    expected = np.zeros((3, 12))
    for row, taken in enumerate([(1, 2), (4,), (2, 6, 5, 7)]):
        expected[row, np.array(taken) - 1] = 1
    np.testing.assert_array_equal(found.toarray(), expected)
    assert found.has_canonical_format


@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_a_user_in_several_overlapping_examples_is_one_row(monkeypatch, chunk):
    monkeypatch.setattr(codes, "CHUNK_EVENTS", chunk)
    log = make_log([[1, 2, 3, 1, 2], [4, 5, 4]], 5)
    # Out of order: the first user's runs overlap and lie on both sides of the second user's.
    arrays = ([0, 1, 0], [2, 5, 0], [3, 6, 1], [5, 8, 4])
    view = splits.View("train", np.array(arrays[0], np.int32), *(np.array(a, np.int64) for a in arrays[1:]))
    np.testing.assert_array_equal(codes.interactions(log, view).toarray(), [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]])


def test_components_are_the_dense_singular_vectors():
    log = make_log(np.random.default_rng(1).integers(1, 31, (50, 12)).tolist(), 30)
    matrix = codes.interactions(log, whole(log))
    found = codes.item_components(matrix, 6, np.random.default_rng(0))
    expected = np.linalg.svd(matrix.toarray(), full_matrices=False)[2][:6]
    expected *= np.sign(expected[np.arange(6), np.abs(expected).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_components_beyond_the_rank_are_zero():
    log = make_log([[1, 2]] * 5 + [[3]] * 4, 6)
    found = codes.item_components(codes.interactions(log, whole(log)), 4, np.random.default_rng(0))
    half = math.sqrt(0.5)
    expected = [[half, half, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0] * 6, [0] * 6]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_codes_follow_from_log_view_and_seed():
    log = two_tastes()
    first = codes.svd_codes(log, whole(log), 4)
    assert first.shape == (42, 4) and first.dtype == np.uint8 and not first[0].any()
    np.testing.assert_array_equal(first, codes.svd_codes(log, whole(log), 4))
    assert (first != codes.svd_codes(log, whole(log), 4, seed=1)).any()


@pytest.mark.parametrize("levels, items", [(2, 41), (8, 41), (256, 41), (256, 256), (256, 1000)])
def test_bins_are_equally_full(levels, items):
    log = two_tastes(items=items)
    found = codes.svd_codes(log, whole(log), 3, levels)[1:]
    for part in range(3):
        count = np.bincount(found[:, part], minlength=levels)
        assert len(count) == levels and set(count) <= {items // levels, -(-items // levels)}


def test_codes_are_the_quantile_bins_of_the_scaled_components():
    log = two_tastes(items=40)
    matrix, rng = codes.interactions(log, whole(log)), np.random.default_rng(5)
    components = codes.item_components(matrix, 2, rng)
    found = codes.svd_codes(log, whole(log), 2, levels=5, seed=5)[1:]
    for part, component in enumerate(components):
        scaled = (component - component.min()) / (component.max() - component.min()) + rng.normal(0, 1e-5, 40)
        edges = np.quantile(scaled, [0.2, 0.4, 0.6, 0.8])
        np.testing.assert_array_equal(found[:, part], np.searchsorted(edges, scaled))


def test_items_of_one_taste_have_codes_alike_and_unseen_items_are_spread_by_noise():
    log = two_tastes(items=640)
    found = codes.svd_codes(log, whole(log), 2, levels=64).astype(int)
    # Two separate groups: each of the first two components is one of them, all other items sit at zero below it.
    tastes = {tuple(found[a:b].mean(axis=0) > 60) for a, b in ((1, 21), (21, 41))}
    assert tastes == {(True, False), (False, True)}
    unseen = found[41:]
    assert len(np.unique(unseen[:, 0])) > 60  # one tie would be one bin
    assert abs(np.corrcoef(unseen.T)[0, 1]) < 0.15


def test_only_training_events_decide_codes():
    log = two_tastes()
    views = splits.leave_one_out(log)
    changed = log.events["item_id"].copy()
    changed[splits.target_rows(views["test"])] = 41
    changed[splits.target_rows(views["val"])] = 41
    other = dataclasses.replace(log, events={"item_id": changed})
    np.testing.assert_array_equal(
        codes.svd_codes(log, views["train"], 3), codes.svd_codes(other, splits.leave_one_out(other)["train"], 3)
    )


def test_svd_codes_refuse_sizes():
    log = make_log([[1, 2, 3], [2, 4, 5], [5, 6, 7], [7, 8, 1]], 8)
    assert codes.svd_codes(log, whole(log), 3).shape == (9, 3)
    for parts in (0, 4):
        with pytest.raises(ValueError, match=rf"parts = {parts}: expected 1..3, .* 4 training users and 8 items"):
            codes.svd_codes(log, whole(log), parts)
    for levels in (1, 257):
        with pytest.raises(ValueError, match=f"levels = {levels}: expected 2..256"):
            codes.svd_codes(log, whole(log), 2, levels)


def test_frequency_rows():
    frequency = np.array([[9.0], [0.1], [0.3], [0.0], [0.3], [0.2], [0.1]], np.float32)
    found = codes.frequency_rows(frequency, 4)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[:, 0], [0, 4, 1, 4, 2, 3, 4])
    np.testing.assert_array_equal(codes.frequency_rows(frequency, 5)[:, 0], [0, 4, 1, 5, 2, 3, 5])
    np.testing.assert_array_equal(codes.frequency_rows(frequency, 1)[:, 0], [0, 1, 1, 1, 1, 1, 1])
    assert sorted(codes.frequency_rows(frequency, 6)[:, 0]) == list(range(7))


def test_frequency_rows_refuse_sizes():
    for rows in (0, 4):
        with pytest.raises(ValueError, match=f"rows = {rows}: expected 1..3"):
            codes.frequency_rows(np.ones((4, 1)), rows)
    with pytest.raises(ValueError, match=r"frequency of shape \[4\], expected \[items \+ 1, 1\]"):
        codes.frequency_rows(np.ones(4), 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("padded", [False, True])
def test_codes_are_read_back(tmp_path, dtype, padded):
    made = np.random.default_rng(0).integers(0, 256, (6, 3))
    made[0] = 0
    np.save(tmp_path / "codes.npy", made[0 if padded else 1 :].astype(dtype))
    found = codes.load_codes(tmp_path / "codes.npy", 5, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, made)


@pytest.mark.parametrize(
    "levels, dtype", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (70_000, "uint32")]
)
def test_wide_codes_are_as_narrow_as_they_can_be(tmp_path, levels, dtype):
    made = np.array([[0, 0, 0], [levels - 1, 0, 1], [0, levels - 1, 1]])
    np.save(tmp_path / "codes.npy", made[1:])
    for found in (codes.load_codes(tmp_path / "codes.npy", 2, 3, levels), codes.first_levels(made, 3, levels)):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, made)
    np.testing.assert_array_equal(codes.first_levels(made, 2, levels), made[:, :2])
    with pytest.raises(
        ValueError, match=rf"codes\.npy: values 0..{levels - 1}, expected 0..{levels - 2}; n-grams of wider"
    ):
        codes.load_codes(tmp_path / "codes.npy", 2, 3, levels - 1)
    with pytest.raises(ValueError, match=rf"mine: values 0..{levels - 1}, expected 0..{levels - 2}"):
        codes.first_levels(made, 3, levels - 1, "mine")
    with pytest.raises(ValueError, match=r"mine: 3 codes per item, but table.parts = 4"):
        codes.first_levels(made, 4, levels, "mine")


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((4, 3), int), r"shape \[4, 3\], expected \[5, 3\], or \[6, 3\] with padding"),
        (np.zeros((5, 2), int), r"shape \[5, 2\]"),
        (np.zeros(5, int), r"shape \[5\]"),
        (np.zeros((5, 3)), "dtype float64, expected integers"),
        (np.full((5, 3), 256), r"values 256..256, expected 0..255"),
        (np.full((5, 3), -1), r"values -1..-1, expected 0..255"),
        (np.ones((6, 3), int), r"row 0 is padding, but it is \[1, 1, 1\]"),
    ],
)
def test_wrong_codes_are_refused(tmp_path, values, message):
    np.save(tmp_path / "codes.npy", values)
    with pytest.raises(ValueError, match=rf"codes\.npy: .*{message}"):
        codes.load_codes(tmp_path / "codes.npy", 5, 3)


@pytest.mark.parametrize("content", [None, b"", b"not an array at all"])
def test_missing_and_foreign_files_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "codes.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"codes\.npy: no codes here .* \.npy file of \[5, 3\]"):
        codes.load_codes(tmp_path / "codes.npy", 5, 3)


def facts_by_hand(slots: list[list[int]], counts: list[int], num_rows: int) -> dict:
    """`table_facts` by definition, over lists that start at item 1."""
    events = {row: sum(n for s, n in zip(slots, counts, strict=True) if row in s) for row in range(1, num_rows + 1)}
    tuples = Counter(tuple(s) for s in slots)
    owners = Counter(row for s in slots for row in set(s) - {0})
    bins = Counter(0 if n == 0 else int(math.log2(n)) + 1 for n in events.values())
    return {
        "rows": num_rows,
        "rows_touched": sum(n > 0 for n in events.values()),
        "collisions_whole": sum(tuples[tuple(s)] > 1 for s in slots) / len(slots),
        "collisions_any": sum(any(owners[row] > 1 for row in s) for s in slots) / len(slots),
        "row_frequency_histogram": [bins[b] for b in range(max(bins) + 1)],
    }


@pytest.mark.parametrize("items, parts, rows", [(1, 1, 1), (30, 1, 100), (50, 2, 9), (200, 2, 60), (80, 4, 500)])
def test_facts_are_those_of_plain_python(items, parts, rows):
    rng = np.random.default_rng(items)
    slots = rng.integers(1, rows + 1, (items + 1, parts), np.int32)
    slots[0] = 0
    slots[rng.integers(1, items + 1, items // 5)] = slots[1]
    counts = rng.zipf(1.5, (items + 1, 1)).clip(0, 1 << 20) - 1
    found = codes.table_facts(slots, counts, rows)
    assert found == facts_by_hand(slots[1:].tolist(), counts[1:, 0].tolist(), rows)
    assert {type(v) for v in found.values()} <= {int, float, list}
    assert sum(found["row_frequency_histogram"]) == rows


def test_items_with_fewer_rows_than_others():
    slots, counts = np.array([[0, 0], [1, 0], [1, 2], [3, 0], [4, 5], [4, 5]]), np.array([[0], [4], [1], [0], [2], [3]])
    found = codes.table_facts(slots, counts, 6)
    assert found == facts_by_hand(slots[1:].tolist(), counts[1:, 0].tolist(), 6)
    assert found["rows_touched"] == 4 and found["collisions_whole"] == 0.4 and found["collisions_any"] == 0.8
    with pytest.raises(ValueError, match=r"slots 0..2 of items, expected 1..3"):
        codes.table_facts(np.array([[0, 0], [1, 2], [0, 0]]), np.zeros((3, 1)), 3)


def test_facts_of_known_tables():
    counts = np.array([[0], [4], [0], [1], [2], [3]])
    own = codes.table_facts(np.arange(6)[:, None], counts, 7)
    assert own == {
        "rows": 7, "rows_touched": 4, "collisions_whole": 0.0, "collisions_any": 0.0,
        "row_frequency_histogram": [3, 1, 2, 1],
    }  # fmt: skip
    capped = codes.table_facts(codes.frequency_rows(counts, 3), counts, 3)
    assert capped["collisions_whole"] == capped["collisions_any"] == 0.6
    assert capped["row_frequency_histogram"] == [0, 0, 2, 1]  # 4; 3; 0 + 1 + 2 on the shared row
    # Both hash functions of item 1 meet in row 2: its four events reach the row once.
    twice = codes.table_facts(np.array([[0, 0], [2, 2], [1, 3], [3, 1], [4, 5], [4, 5]]), counts, 5)
    assert twice["row_frequency_histogram"] == [0, 2, 0, 3]
    assert twice["collisions_whole"] == 0.4 and twice["collisions_any"] == 0.8


@pytest.mark.parametrize(
    "slots, counts, message",
    [
        ([[0], [0]], [[0], [1]], r"slots 0..0 of items, expected 1..3"),
        ([[0], [4]], [[0], [1]], r"slots 4..4 of items, expected 1..3"),
        ([[0], [1]], [[0], [0.5]], "expected the number of training events"),
        ([[0], [1]], [[0], [-1]], "expected the number of training events"),
        ([[0], [1], [2]], [[0], [1]], r"slots \[3, 1\], expected \[2, rows of an item\]"),
        ([[0], [1]], [0, 1], r"frequency of shape \[2\]"),
    ],
)
def test_facts_refuse_wrong_input(slots, counts, message):
    with pytest.raises(ValueError, match=message):
        codes.table_facts(np.array(slots), np.array(counts), 3)
