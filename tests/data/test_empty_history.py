"""A first event predicted from nothing: one blank slot before it, in every way that examples are cut and packed."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from configs import dreamrec_yc
from recscale import program, reading
from recscale.data import splits, windows
from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.loading import Loader, targets_of
from tests.data.test_one_target import examples

LENGTHS = np.array([1, 9, 4, 30, 3, 1, 5, 12])
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])


@pytest.fixture(scope="module")
def log() -> EventLog:
    """Events whose item is their own row + 1, and a context that is never 0."""
    items = np.arange(1, int(OFFSETS[-1]) + 1, dtype=np.int32)
    events = {"item_id": items, "tab": items % 7 + 1}
    return EventLog(OFFSETS, events, {"item_id": Column("id"), "tab": Column("context", 8)}, len(items))


@pytest.fixture(scope="module")
def whole() -> splits.View:
    """Every event of every user is a target."""
    users = np.arange(len(LENGTHS), dtype=np.int32)
    return splits.View("train", users, OFFSETS[:-1], OFFSETS[:-1], OFFSETS[1:], empty_history=True)


def read(log, view, length, **how):
    loader = Loader(log, view, batch_size=3, length=length, shuffle=False, **how)
    batches = [loader[i] for i in range(loader.steps_per_epoch)]
    return batches, [example for batch in batches for example in examples(batch)]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_user_begins_with_a_blank_slot_whose_target_is_the_first_event(log, whole, layout):
    batches, found = read(log, whole, 40, layout=layout, inputs=("tab",), queries=("tab",), with_example=True)
    expected = []
    for a, b in itertools.pairwise(OFFSETS):
        rows = list(range(a + 1, b + 1))
        expected.append(([0, *rows[:-1]], rows))
    assert sorted(found) == sorted(expected)
    for batch in batches:
        blank = (batch["item_id"] == 0) & (batch["segment_ids"] > 0)
        assert np.array_equal(blank, (batch["positions"] == 0) & (batch["segment_ids"] > 0))
        assert not batch["tab"][blank].any() and (batch["tab"] > 0).sum() == (batch["item_id"] > 0).sum()
        assert np.array_equal(batch["query_tab"], np.where(batch["target"] > 0, batch["target"] % 7 + 1, 0))
        at, place, example, row = targets_of(log, whole, batch)
        assert np.array_equal(batch["target"][at, place], row + 1)
        assert (OFFSETS[example] <= row).all() and (row < OFFSETS[example + 1]).all()


def test_a_short_length_leaves_the_blank_slot_out_of_reach(log, whole):
    _, found = read(log, whole, 5)
    for (items, _), a, b in zip(sorted(found, key=lambda e: e[1][-1]), OFFSETS, OFFSETS[1:], strict=False):
        assert items == list(range(a, b))[-5:] or (b - a <= 5 and items == [0, *range(a + 1, b)])


def test_windows_have_every_target_once_and_one_blank_slot_a_user(log, whole):
    for length in (1, 2, 5, 40):
        for cut in (windows.prefixes, windows.in_windows):
            view = cut(whole, length)
            splits.check_view(log, view)
            _, found = read(log, view, length)
            assert (
                sorted(target for _, targets in found for target in targets if target) == log.events["item_id"].tolist()
            )
            blank = [targets[0] for items, targets in found if items[0] == 0]
            assert sorted(blank) == (OFFSETS[:-1] + 1).tolist()
            for items, targets in found:
                assert (items == [0] or 0 not in items) and len(items) <= length
                assert all(t == i + 1 for i, t in zip(items, targets, strict=True) if t and i)


@pytest.mark.parametrize("window", ["last", "random", "all", "prefixes", "spans"])
def test_training_and_evaluation_have_an_event_at_the_same_position(log, whole, window):
    """The blank slot is alone wherever it is: no event of a user stands one further in training than it will later."""
    length = int(LENGTHS.max())
    config = dreamrec_yc.get_config().unlock()
    config.loader.update({"window": window, "length": length, "row_length": 0, "layout": "padded", "segments": 0})
    loader = reading.train_loader(config, program.task_of(config, log.num_items), log, whole)
    batches = [loader[i] for i in range(200)]
    drawn = [example for batch in batches for example in examples(batch)]
    assert {target for _, targets in drawn for target in targets if target} == set(log.events["item_id"].tolist())
    assert all(items == [0] or 0 not in items for items, _ in drawn)
    if window in ("last", "all", "prefixes"):  # the whole history fits, so that an event is where evaluation has it
        for batch in batches[:10]:
            real = batch["item_id"] > 0
            row = batch["item_id"][real] - 1
            begins = OFFSETS[np.searchsorted(OFFSETS, row, side="right") - 1]
            assert np.array_equal(batch["positions"][real], row - begins)


def test_shuffled_epochs_have_the_same_examples_and_spans_know_the_blank_slot(log, whole):
    view = windows.prefixes(whole, 4)
    loader = Loader(log, view, batch_size=4, length=4, row_length=8, seed=1)
    rows = [e for i in range(loader.num_rows) for e in examples(loader[i])]  # batch_size epochs
    assert sorted(rows) == sorted(4 * read(log, view, 4)[1])
    spans = Loader(log, whole, batch_size=len(whole), length=4, layout="padded", window="spans")
    drawn = [e for i in range(300) for e in examples(spans[i])]
    assert {targets[-1] for _, targets in drawn} == set(log.events["item_id"].tolist())
    assert all(t == ([0] * (len(i) - 1) + [i[-1] + 1] if i[-1] else t) for i, t in drawn)
    assert {t[0] for i, t in drawn if i == [0]} == set((OFFSETS[:-1] + 1).tolist())


def test_the_last_events_keep_the_first_as_a_target_only_where_it_is_left(log, whole):
    view = splits.limit_events(whole, 5)
    splits.check_view(log, view)
    short = LENGTHS <= 5
    assert np.array_equal(view.target_start - view.start, np.where(short, 0, 1))


def test_an_empty_history_is_refused_where_nothing_says_so_or_the_loader_cannot(log, whole):
    with pytest.raises(EventLogError, match=f"{len(LENGTHS)} examples lack history or a target"):
        splits.check_view(log, dataclasses.replace(whole, empty_history=False))
    timed = dataclasses.replace(
        log,
        events={**log.events, "timestamp": np.arange(log.num_events)},
        columns={**log.columns, "timestamp": Column("time")},
    )
    refused: tuple[tuple[EventLog, dict[str, Any]], ...] = (
        (timed, {}),
        (log, {"inputs": ("users/hash3",)}),
        (log, {"alpha": 1.5}),
    )
    for other, how in refused:
        with pytest.raises(EventLogError, match="8 examples have an empty history; expected a log without times"):
            Loader(other, whole, batch_size=2, length=5, **how)
