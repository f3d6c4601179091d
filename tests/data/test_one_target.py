"""One example per target: windows that slide (prefixes), random spans, and rows with few examples."""

import numpy as np
import pytest

from recscale.data import packing, splits, windows
from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.features import open_feature
from recscale.data.loading import Loader

LENGTHS = np.array([2, 9, 4, 30, 3, 6, 5, 12])


@pytest.fixture(scope="module")
def log() -> EventLog:
    """Events whose item is their own row + 1, so that an item says where it is from."""
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    total = int(offsets[-1])
    events = {"item_id": np.arange(1, total + 1, dtype=np.int32)}
    return EventLog(offsets, events, {"item_id": Column("id", total + 1)}, total)


@pytest.fixture(scope="module")
def train(log) -> splits.View:
    return splits.leave_one_out(log, validation=False)["train"]


def examples(batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every example of a batch."""
    found = []
    for items, targets, segments in zip(batch["item_id"], batch["target"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            mine = segments == segment
            found.append((items[mine].tolist(), targets[mine].tolist()))
    return found


def test_every_target_is_predicted_once_from_the_events_just_before_it(log, train):
    length = 5
    view = windows.prefixes(train, length)
    splits.check_view(log, view)
    assert len(view) == (train.stop - train.target_start).sum()
    loader = Loader(log, view, batch_size=4, length=length, shuffle=False)
    found = [e for i in range(loader.steps_per_epoch) for e in examples(loader[i])]
    first = {int(u): int(log.offsets[u]) for u in view.user}
    targets = []
    for items, target in found:
        assert not any(target[:-1]) and target[-1] == items[-1] + 1  # one target, at the end, the very next event
        user = int(np.searchsorted(log.offsets, target[-1] - 1, side="right")) - 1
        assert items == list(range(max(first[user], target[-1] - 1 - length) + 1, target[-1]))
        targets.append(target[-1])
    assert sorted(targets) == sorted(splits.target_rows(train) + 1)
    assert windows.prefixes(train).start.tolist() == np.repeat(train.start, train.stop - train.target_start).tolist()


def test_a_span_is_a_run_of_events_with_one_target_drawn_anew_in_every_epoch(log, train):
    loader = Loader(log, train, batch_size=len(train), length=6, layout="padded", window="spans", seed=3)
    epochs = [examples(loader[i]) for i in range(300)]
    ends: dict[int, set[int]] = {}
    counts: dict[int, set[int]] = {}
    for found in epochs:
        assert len(found) == len(train)
        for items, target in found:
            assert not any(target[:-1]) and target[-1] == items[-1] + 1
            assert np.diff(items).tolist() == [1] * (len(items) - 1) and len(items) <= 6
            user = int(np.searchsorted(log.offsets, target[-1] - 1, side="right")) - 1
            assert items[0] - 1 >= log.offsets[user] and target[-1] - 1 < log.offsets[user + 1] - 1
            ends.setdefault(user, set()).add(target[-1])
            counts.setdefault(user, set()).add(len(items))
    assert len(ends[3]) == LENGTHS[3] - 2 and counts[3] == {1, 2, 3, 4, 5, 6}  # every target, every length
    again = Loader(log, train, batch_size=len(train), length=6, layout="padded", window="spans", seed=3)
    assert examples(again[7]) == epochs[7] != epochs[8]


def test_spans_need_padded_rows(log, train):
    with pytest.raises(EventLogError, match=r"window='spans' with layout='packed'.*expected layout 'padded'"):
        Loader(log, train, batch_size=4, length=6, window="spans")


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_row_has_more_examples_than_it_may(most):
    lengths = np.random.default_rng(0).integers(1, 5, 1000)
    plan = packing.plan(lengths, 12, most=most)
    held = np.diff(plan.row_offsets)
    assert held.max() == most and sorted(plan.segments) == list(range(1000))
    assert all(
        lengths[plan.segments[a:b]].sum() <= 12 for a, b in zip(plan.row_offsets, plan.row_offsets[1:], strict=False)
    )
    assert len(held) <= 1.1 * max(1000 / most, lengths.sum() / 12) + 2
    free = packing.plan(lengths, 12)
    assert np.diff(free.row_offsets).max() > 3 and np.array_equal(
        free.segments, packing.plan(lengths, 12, most=12).segments
    )


def test_loader_passes_the_bound_on(log, train):
    view = windows.prefixes(train, 4)
    loader = Loader(log, view, batch_size=3, length=4, row_length=12, segments=2)
    batch = loader[0]
    assert batch["segment_ids"].max() == 2 and (batch["target"] > 0).sum(axis=1).max() == 2


def test_user_tokens_are_hashed_evenly_and_never_zero(log):
    feature = open_feature(log, "users/hash7")
    ids = feature.read(np.arange(7000))
    assert feature.cardinality == 8 and ids.min() == 1 and ids.max() == 7
    assert abs(np.bincount(ids)[1:] / 1000 - 1).max() < 0.1
    assert np.array_equal(ids[:50], feature.read(np.arange(50)))
    with pytest.raises(EventLogError, match="hash0"):
        open_feature(log, "users/hash0")
