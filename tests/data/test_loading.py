"""The log of these tests encodes (user, place) in every column, so that a batch can be read back without the loader."""

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recscale.data import splits
from recscale.data.event_log import Column, EventLog, EventLogError
from recscale.data.loading import Loader

STRIDE = 1000  # item id = 1 + user * STRIDE + place of the event in the user's history
ORIGIN = 978_300_000


def coded_log(lengths: np.ndarray, shift: int = ORIGIN) -> EventLog:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    user = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(offsets[-1]) - offsets[:-1][user]
    item = (1 + user * STRIDE + place).astype(np.int32)
    events = {
        "item_id": item,
        "timestamp": shift + 10 * place + user,
        "rating": item.astype(np.float32) / 2,
        "watched_ms": item.astype(np.int64) * 3,
        "tab": (place % 7 + 1).astype(np.int32),
    }
    columns = {
        "item_id": Column("id"),
        "timestamp": Column("time"),
        "rating": Column("feedback"),
        "watched_ms": Column("feedback"),
        "tab": Column("context", 8),
    }
    return EventLog(offsets, events, columns, num_items=len(lengths) * STRIDE)


def tail_log(users: int = 120, cap: int = 90, seed: int = 0) -> EventLog:
    lengths = np.random.default_rng(seed).lognormal(np.log(14), 1.0, users).astype(np.int64)
    lengths[:4] = [0, 1, 2, 3]
    return coded_log(np.minimum(lengths, cap))


def one_pass(log: EventLog, view: splits.View, **arguments: Any) -> dict[str, np.ndarray]:
    loader = Loader(log, view, **dict[str, Any](batch_size=4, length=100, shuffle=False) | arguments)
    batches = [loader[i] for i in range(len(loader))]
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def view_targets(log: EventLog, view: splits.View) -> np.ndarray:
    return np.sort(log.events["item_id"][splits.target_rows(view)])


LAYOUTS = pytest.mark.parametrize("layout", ["packed", "padded"])


@LAYOUTS
@pytest.mark.parametrize("side", ["train", "val", "test"])
def test_every_target_once_in_a_pass(layout, side):
    log = tail_log()
    view = splits.leave_one_out(log)[side]
    rows = one_pass(log, view, layout=layout)
    np.testing.assert_array_equal(np.sort(rows["target"][rows["target"] > 0]), view_targets(log, view))


@LAYOUTS
@pytest.mark.parametrize("window", ["last", "random"])
def test_every_target_once_per_shuffled_epoch(layout, window):
    log = tail_log()
    view = splits.leave_one_out(log)["train"]
    loader = Loader(log, view, batch_size=7, length=100, layout=layout, window=window, seed=3)
    rows = np.concatenate([loader[i]["target"] for i in range(3 * loader.steps_per_epoch)])
    orders = []
    for epoch in range(3):  # batches straddle epochs: an epoch is a run of rows, not of steps
        target = rows[epoch * loader.num_rows : (epoch + 1) * loader.num_rows]
        np.testing.assert_array_equal(np.sort(target[target > 0]), view_targets(log, view))
        orders.append(target)
    assert not np.array_equal(orders[0], orders[1])
    assert loader.num_targets == len(view_targets(log, view)) and loader.cut_targets == 0


@LAYOUTS
@pytest.mark.parametrize("window", ["last", "random"])
def test_rows_hold_whole_segments_in_order(layout, window):
    log = tail_log()
    view = splits.by_user(log, train_users=60, eval_users=40)["val"]
    rows = one_pass(log, view, layout=layout, window=window, length=20, row_length=48, with_example=True)
    for item, segment, position, target, example in zip(
        *(rows[n] for n in ("item_id", "segment_ids", "positions", "target", "example")), strict=True
    ):
        real = int((segment > 0).sum())
        assert (item[:real] > 0).all() and not item[real:].any() and not segment[real:].any()
        assert not target[real:].any() and not position[real:].any() and not example[real:].any()
        assert set(np.diff(segment[:real])) <= {0, 1} and segment[:1].max(initial=1) == 1
        for s in range(1, segment.max() + 1):
            inside = segment == s
            np.testing.assert_array_equal(position[inside], np.arange(inside.sum()))
            np.testing.assert_array_equal(np.diff(item[inside]), 1)
            np.testing.assert_array_equal(target[inside], item[inside] + 1)  # nothing at or before its own position
            assert len(set(example[inside])) == 1
            assert set((item[inside] - 1) // STRIDE) == {view.user[example[inside][0] - 1]}
    if layout == "padded":
        assert rows["segment_ids"].max() == 1


@LAYOUTS
def test_columns_line_up_with_input_and_next_event(layout):
    log = tail_log()
    view = splits.leave_one_out(log)["test"]
    rows = one_pass(log, view, layout=layout, inputs=("tab",), queries=("tab",), labels=("rating", "watched_ms"))
    real = rows["segment_ids"] > 0
    user, place = np.divmod(rows["item_id"][real] - 1, STRIDE)
    first = ORIGIN + np.min(np.arange(log.num_users)[log.lengths > 0])
    np.testing.assert_array_equal(rows["timestamp"][real], ORIGIN + 10 * place + user - first)
    np.testing.assert_array_equal(rows["query_timestamp"][real], rows["timestamp"][real] + 10)
    np.testing.assert_array_equal(rows["label_rating"][real], (rows["item_id"][real] + 1) / 2)
    np.testing.assert_array_equal(rows["label_watched_ms"][real], (rows["item_id"][real] + 1) * 3)
    np.testing.assert_array_equal(rows["tab"][real], place % 7 + 1)
    np.testing.assert_array_equal(rows["query_tab"][real], (place + 1) % 7 + 1)
    assert all(not values[~real].any() for values in rows.values())
    assert {str(v.dtype) for n, v in rows.items() if not n.startswith("label_")} == {"int32"}
    assert rows["label_rating"].dtype == rows["label_watched_ms"].dtype == np.float32


def test_history_is_input_only_and_targets_follow_it():
    log = coded_log(np.array([8, 5]))
    view = splits.View("v", np.array([0], np.int32), np.array([1]), np.array([5]), np.array([7]))
    rows = one_pass(log, view, batch_size=1, length=10)
    assert rows["item_id"][0].tolist() == [2, 3, 4, 5, 6, 0, 0, 0, 0, 0]
    assert rows["target"][0].tolist() == [0, 0, 0, 6, 7, 0, 0, 0, 0, 0]
    window = one_pass(log, dataclasses.replace(view, reading="window"), batch_size=1, length=10)
    assert window["item_id"][0].tolist() == [2, 3, 4, 5, 0, 0, 0, 0, 0, 0]
    assert window["target"][0].tolist() == [0, 0, 0, 6, 0, 0, 0, 0, 0, 0]


@LAYOUTS
def test_truncation_keeps_the_last_inputs(layout):
    log = coded_log(np.array([30, 6, 3]))
    views = splits.leave_one_out(log)
    rows = one_pass(log, views["test"], layout=layout, length=5)
    for user, total in enumerate((30, 6, 3)):
        mine = (rows["item_id"] - 1) // STRIDE == user
        place = (rows["item_id"][mine & (rows["item_id"] > 0)] - 1) % STRIDE
        assert place.tolist() == list(range(max(0, total - 6), total - 1))
    loader = Loader(log, views["train"], batch_size=1, length=5, layout=layout)
    assert loader.num_targets == 5 + 3 and loader.cut_targets == 27 - 5 and loader.real_tokens == 8
    assert loader.inputs_per_target == (1 + 2 + 3 + 4 + 5 + 1 + 2 + 3) / 8


def test_random_windows_stay_in_the_view_and_vary():
    log = coded_log(np.array([300, 40, 8]))
    view = splits.leave_one_out(log)["train"]
    loader = Loader(log, view, batch_size=3, length=10, layout="padded", window="random", seed=1)
    firsts = {0: set(), 1: set(), 2: set()}
    for step in range(400):
        for row in loader[step]["item_id"]:
            real = row[row > 0]
            user, place = np.divmod(real - 1, STRIDE)
            assert len(set(user)) == 1 and len(real) == (5 if user[0] == 2 else 10)
            assert place.max() <= log.lengths[user[0]] - 4  # the target of the last input is still a training event
            firsts[int(user[0])].add(int(place[0]))
    assert len(firsts[0]) > 150
    assert firsts[1] == set(range(40 - 2 - 10)) and firsts[2] == {0}


@LAYOUTS
@pytest.mark.parametrize("shuffle", [True, False])
def test_four_hosts_make_the_batch_of_one(layout, shuffle):
    log = tail_log()
    view = splits.leave_one_out(log)["train"]
    arguments: dict[str, Any] = {
        "batch_size": 8,
        "length": 30,
        "layout": layout,
        "shuffle": shuffle,
        "window": "random",
        "seed": 5,
    }
    whole = Loader(log, view, **arguments, with_example=True)
    parts = [Loader(log, view, **arguments, with_example=True, process_index=p, process_count=4) for p in range(4)]
    for step in range(2 * whole.steps_per_epoch if shuffle else len(whole)):
        slices = [part[step] for part in parts]
        assert slices[0]["item_id"].shape == (2, 30)
        same(whole[step], {n: np.concatenate([s[n] for s in slices]) for n in slices[0]})


def test_a_batch_is_a_function_of_its_index():
    log = tail_log()
    view = splits.leave_one_out(log)["train"]
    arguments: dict[str, Any] = {"batch_size": 8, "length": 30, "window": "random"}
    loader = Loader(log, view, **arguments, seed=2)
    forward = [loader[i] for i in range(12)]
    for i in reversed(range(12)):  # any order, another process: what a number of workers would do
        same(forward[i], loader[i])
        same(forward[i], Loader(log, view, **arguments, seed=2)[i])
    other = Loader(log, view, **arguments, seed=3)[0]
    assert not np.array_equal(other["item_id"], forward[0]["item_id"])


def test_a_view_smaller_than_the_batch_repeats():
    log = coded_log(np.array([6] * 2))
    view = splits.leave_one_out(log)["train"]
    loader = Loader(log, view, batch_size=80, length=3, window="random")
    users = (loader[0]["item_id"][:, 0] - 1) // STRIDE
    assert loader.num_rows == 2 and (np.bincount(users) == 40).all()
    last = Loader(log, view, batch_size=8, length=3, shuffle=False)
    assert (last[0]["item_id"][2:] == 0).all() and len(last) == 1
    idle = Loader(log, view, batch_size=8, length=3, shuffle=False, process_index=3, process_count=4)[0]
    assert not idle["item_id"].any() and idle["item_id"].shape == (2, 3)
    with pytest.raises(IndexError, match=r"steps 0\.\.0"):
        last[1]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_iterator_resumes_exactly(prefetch):
    log = tail_log()
    loader = Loader(log, splits.leave_one_out(log)["train"], batch_size=8, length=30, window="random")
    iterator = loader.iterator(prefetch=prefetch)
    for step in range(5):
        same(next(iterator), loader[step])
    state = iterator.get_state()
    assert state == {"next_index": 5}
    expected = [next(iterator) for _ in range(6)]
    resumed = loader.iterator(prefetch=2 - prefetch)
    next(resumed)
    resumed.set_state(state)
    for batch in expected:
        same(next(resumed), batch)
    started = loader.iterator(start=5, prefetch=prefetch)
    assert started.get_state() == state
    same(next(started), expected[0])


def test_iterator_of_one_pass_ends():
    log = tail_log()
    loader = Loader(log, splits.leave_one_out(log)["test"], batch_size=8, length=30, shuffle=False)
    assert len(list(loader.iterator())) == loader.steps_per_epoch
    assert len(list(loader.iterator(start=2))) == loader.steps_per_epoch - 2


def test_memory_mapped_columns_give_the_same_batches(tmp_path):
    log = tail_log()
    for name, values in log.events.items():
        np.save(tmp_path / f"{name}.npy", values)
    mapped = dataclasses.replace(
        log, events={name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in log.events}
    )
    view = splits.leave_one_out(log)["train"]
    a, b = (Loader(x, view, batch_size=8, length=30, inputs=("rating",)) for x in (log, mapped))
    same(a[3], b[3])
    assert type(b[3]["item_id"]) is np.ndarray


def test_order_only_logs_have_no_times():
    log = tail_log()
    events = {n: v for n, v in log.events.items() if n != "timestamp"}
    batch = Loader(dataclasses.replace(log, events=events), splits.leave_one_out(log)["train"], batch_size=2, length=9)[
        0
    ]
    assert set(batch) == {"item_id", "target", "segment_ids", "positions"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 0}, "length=0"),
        ({"length": 9, "row_length": 8}, "row_length=8"),
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 .* process_count=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 1}, "process_index=1"),
        ({"layout": "ragged"}, "layout='ragged'"),
        ({"window": "first"}, "window='first'"),
        ({"labels": ("likes",)}, "'likes' is missing"),
        ({"inputs": ("likes",)}, "feature 'likes'"),
        ({"inputs": ("tab", "tab")}, "may occur once"),
        ({"queries": ("timestamp",)}, "feature 'timestamp'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str):
    log = tail_log()
    view = splits.leave_one_out(log)["train"]
    with pytest.raises(EventLogError, match=message):
        Loader(log, view, **dict[str, Any](batch_size=8, length=10) | arguments)


def test_wrong_logs_are_refused():
    log = tail_log()
    view = splits.leave_one_out(log)["train"]

    def load(name: str, values: np.ndarray, **arguments: Any) -> dict[str, np.ndarray]:
        changed = dataclasses.replace(log, events={**log.events, name: values})
        return Loader(changed, view, batch_size=4, length=9, **arguments)[0]

    with pytest.raises(EventLogError, match="made from another log"):
        Loader(coded_log(np.array([5, 5])), view, batch_size=4, length=9)
    with pytest.raises(EventLogError, match="found int64, expected int32"):
        load("item_id", log.events["item_id"].astype(np.int64))
    with pytest.raises(EventLogError, match="milliseconds"):
        load("timestamp", log.events["timestamp"] * 10_000_000)
    with pytest.raises(EventLogError, match="expected integer seconds"):
        load("timestamp", log.events["timestamp"].astype(np.float64))
    with pytest.raises(EventLogError, match=r"'watched_ms'.*does not fit int32"):
        load("watched_ms", log.events["watched_ms"] << 31, labels=("watched_ms",))


def test_times_far_from_1970_fit_relative_to_the_first():
    log, far = tail_log(), dataclasses.replace(tail_log())
    far = coded_log(log.lengths, shift=2**40)
    view = splits.leave_one_out(log)["train"]
    a, b = (Loader(x, view, batch_size=4, length=9)[0] for x in (log, far))
    same(a, b)


def test_long_tail_fills_rows_and_the_loader_says_how_much():
    lengths = np.random.default_rng(0).lognormal(np.log(43), 1.1, 20_000).astype(np.int64)
    log = coded_log(np.minimum(lengths, 900))
    view = splits.leave_one_out(log)["train"]
    loader = Loader(log, view, batch_size=64, length=200)
    assert loader.fill >= 0.98
    rows = [loader[i]["item_id"] for i in range(20)]
    assert np.mean(np.stack(rows) > 0) == pytest.approx(loader.fill, abs=0.01)
    padded = Loader(log, view, batch_size=64, length=200, layout="padded")
    assert padded.real_tokens == loader.real_tokens and padded.num_rows == len(view)


@pytest.mark.parametrize("name, length", [("movielens/ml1m.parquet", 200), ("amazon2014/beauty.parquet", 50)])
def test_real_data_fills_rows(recscale_data_file, name, length):
    table = pq.read_table(recscale_data_file(name), columns=["user_id", "item_id"])
    _, users = np.unique(table["user_id"].to_numpy(), return_inverse=True)
    _, items = np.unique(table["item_id"].to_numpy(), return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))]).astype(np.int64)
    item_id = (items + 1).astype(np.int32)
    log = EventLog(offsets, {"item_id": item_id}, {"item_id": Column("id")}, num_items=int(item_id.max()))
    for validation in (True, False):
        views = splits.leave_one_out(log, validation)
        for side, view in views.items():
            loader = Loader(log, view, batch_size=32, length=length, shuffle=side == "train")
            assert loader.fill >= 0.95, (side, validation)
    assert len(views["test"]) == log.num_users


def test_importing_the_loader_does_not_import_tensorflow():
    code = "import recscale.data.loading, sys; print('tensorflow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def plain_first_time(loader: Loader, example: int) -> int:
    return int(loader[example]["timestamp"][0, 0])


@LAYOUTS
def test_features_of_users_take_slots_before_the_events_and_change_nothing_else(layout):
    log = tail_log()
    log = dataclasses.replace(log, users={"a": np.arange(log.num_users) % 3, "b": np.arange(log.num_users) % 5})
    view = splits.leave_one_out(log)["train"]
    how = {"batch_size": 1, "length": 9, "queries": ("tab",), "labels": ("rating",), "with_example": True}
    plain = Loader(log, view, **how, row_length=9, layout="padded", shuffle=False)
    wide = Loader(log, view, **how, row_length=22, layout=layout, shuffle=False, inputs=("users/a", "tab", "users/b"))
    found = {}
    for i in range(wide.steps_per_epoch):
        batch = {name: values[0] for name, values in wide[i].items()}
        for segment in range(1, batch["segment_ids"].max() + 1):
            part = {name: values[batch["segment_ids"] == segment] for name, values in batch.items()}
            found[int(part["example"][0]) - 1] = part
    assert len(found) == len(view)
    for example, part in found.items():
        user = view.user[example]
        assert part["users/a"].tolist() == [user % 3 + 1] + [0] * (len(part["example"]) - 1)
        assert part["users/b"].tolist() == [0, user % 5 + 1] + [0] * (len(part["example"]) - 2)
        assert part["positions"].tolist() == list(range(len(part["example"])))
        alone = {name: values[0][: len(part["example"]) - 2] for name, values in plain[example].items()}
        for name in alone.keys() - {"positions", "segment_ids", "example"}:
            expected = [plain_first_time(plain, example)] * 2 if name.endswith("timestamp") else [0, 0]
            assert part[name][:2].tolist() == expected
            np.testing.assert_array_equal(part[name][2:], alone[name], err_msg=name)


def test_thinned_examples_keep_their_last_target_and_differ_from_epoch_to_epoch():
    log = coded_log(np.full(20, 400))
    view = splits.leave_one_out(log)["train"]
    loader = Loader(log, view, batch_size=20, length=512, layout="padded", alpha=1.6)
    assert set(loader.lengths) == {round(512**0.8), 397}
    first, second = loader[0], loader[1]
    for batch in (first, second):
        for item, target in zip(batch["item_id"], batch["target"], strict=True):
            kept = np.count_nonzero(item)
            assert (target[: kept - 1] == item[1:kept]).all() and (np.diff(item[:kept]) > 0).all()
            assert (target[kept - 1] - 1) % STRIDE == 397
    assert not np.array_equal(np.sort(first["item_id"], axis=0), np.sort(second["item_id"], axis=0))
