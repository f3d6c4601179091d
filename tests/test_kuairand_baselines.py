"""Baselines of the ranking study on a log of the same form: features without a leak, rows of the split, results."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from recscale import paired
from recscale.data.event_log import Column, EventLog
from recscale.data.event_log_writer import write

SCRIPT = Path(__file__).resolve().parent.parent / "experiments/0006_rankers_kuairand/baselines.py"
USERS, ITEMS = 60, 25


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    for package in ("lightgbm", "sklearn"):
        pytest.importorskip(package, reason="the baselines of the ranking study are fitted with it")
    spec = importlib.util.spec_from_file_location("kuairand_baselines", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_log(seed: int = 0) -> EventLog:
    """Users with a taste, items with a quality; some rows twice, as in the source."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, USERS)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    user, n = np.repeat(np.arange(USERS), lengths), int(offsets[-1])
    time = np.concatenate([np.sort(rng.integers(1_650_816_000, 1_652_025_600, k)) for k in lengths]) * 1000
    item = rng.integers(1, ITEMS + 1, n).astype(np.int32)
    chance = 1 / (1 + np.exp(-rng.normal(size=USERS)[user] - rng.normal(size=ITEMS + 1)[item]))
    ratio = (chance * rng.gamma(2, 0.5, n)).astype(np.float32)
    flags = {name: (rng.random(n) < rate * chance).astype(np.int8)
             for name, rate in (("is_click", 1), ("long_view", 0.7), ("is_like", 0.3))}  # fmt: skip
    columns = {"item_id": item, "time_ms": time, "timestamp": time // 1000, "played_ratio": ratio, **flags}
    columns |= {
        "tab": rng.integers(1, 4, n).astype(np.int32),
        "duration_ms": rng.integers(1, 9, n).astype(np.int32) * 1000,
    }
    twice = np.flatnonzero((rng.random(n - 1) < 0.05) & (np.diff(user) == 0)) + 1
    for values in columns.values():
        values[twice] = values[twice - 1]
    kinds = {"item_id": Column("id"), "timestamp": Column("time"), "tab": Column("context", 16)}
    kinds |= {name: Column("feedback", 2) for name in flags} | {"played_ratio": Column("feedback")}
    items = {"author_id": rng.integers(0, 9, ITEMS + 1), "upload_day": np.full(ITEMS + 1, 19_000, np.int32)}
    items |= {name: rng.integers(0, 3, ITEMS + 1).astype(np.int32) for name in ("video_type", "upload_type", "tag")}
    names = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days", "onehot_feat0")
    users = {name: rng.integers(0, 90, USERS).astype(np.int32) for name in names}
    users["raw_id"] = np.arange(USERS)
    return EventLog(offsets, columns, {n: kinds.get(n, Column("extra")) for n in columns}, ITEMS, items, users)


def test_features_hold_nothing_of_the_event_or_of_later_ones(baselines: ModuleType):
    log = make_log()
    numbers, codes = baselines.features(log)
    moment = np.quantile(log.events["time_ms"], 0.6, method="nearest")
    late = log.events["time_ms"] >= moment
    rng = np.random.default_rng(1)
    changed = {name: np.where(late, rng.permutation(log.events[name]), log.events[name]) for name in baselines.HEADS}
    other = EventLog(log.offsets, {**log.events, **changed}, log.columns, log.num_items, log.items, log.users)
    other_numbers, other_codes = baselines.features(other)
    seen = log.events["time_ms"] <= moment
    for name in numbers:
        np.testing.assert_array_equal(numbers[name][seen], other_numbers[name][seen], err_msg=name)
    for name in codes:
        np.testing.assert_array_equal(codes[name], other_codes[name], err_msg=name)
    moved = [name for name in numbers if (numbers[name] != other_numbers[name]).any()]
    assert len(moved) == 8 * len(baselines.HEADS)  # the rates, later on
    for name, values in numbers.items():
        assert np.isfinite(values).all(), name
    assert {"item_item", "user_item_shown", "silence", "user_tab_is_like"} - set(numbers) == {"item_item"}


def test_frozen_features_know_nothing_of_the_day_from_the_user(baselines: ModuleType):
    log = make_log()
    numbers, _ = baselines.features(log, frozen=True)
    user = np.repeat(np.arange(USERS), log.lengths)
    local = log.events["timestamp"] + baselines.BEIJING
    names, group = np.unique(user * 100_000 + local // baselines.DAY, return_inverse=True)
    rates = [name for name in numbers if name in ("user_shown", *(f"user_{head}" for head in baselines.HEADS))]
    assert len(rates) == 5
    for name in rates:
        low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
        np.minimum.at(low, group, numbers[name])
        np.maximum.at(high, group, numbers[name])
        np.testing.assert_array_equal(low, high, err_msg=name)
    running, _ = baselines.features(log)
    last = np.flatnonzero(np.diff(group) != 0) + 1  # the first event of a day
    np.testing.assert_array_equal(numbers["user_shown"][last], running["user_shown"][last])
    np.testing.assert_array_equal(numbers["item_is_click"], running["item_is_click"])


def test_silence_is_the_time_since_an_earlier_moment(baselines: ModuleType):
    user, time = np.array([0, 0, 0, 0, 1, 1]), np.array([5, 5, 9, 9, 2, 8])
    assert baselines._silence(user, time).tolist() == [-0.5, -0.5, 4, 4, -0.5, 6]


def test_rows_of_the_split(baselines: ModuleType):
    log = make_log()
    train, views = baselines.rows_of(log, baselines.TEST_FROM, baselines.VAL_FROM, baselines.GAP, baselines.DAYS)
    time = log.events["timestamp"]
    assert time[train].max() < baselines.VAL_FROM - baselines.GAP
    assert list(views) == ["val", *(f"day{day}" for day in range(1, 9)), "test"]
    days = np.concatenate([baselines.target_rows(views[f"day{day}"]) for day in range(1, 9)])
    np.testing.assert_array_equal(np.sort(days), baselines.target_rows(views["test"]))
    val = time[baselines.target_rows(views["val"])]
    assert val.min() >= baselines.VAL_FROM and val.max() < baselines.TEST_FROM - baselines.GAP


def test_the_command_writes_results_and_files_to_compare(
    baselines: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write(make_log(), tmp_path / "log")
    monkeypatch.setattr(baselines, "ROUNDS", 5)
    monkeypatch.setattr(baselines, "RESAMPLES", 20)
    monkeypatch.setattr(baselines, "PENALTIES", (0.01,))
    monkeypatch.setattr(baselines, "SEEDS", {"constant": 1, "linear": 1, "lightgbm": 2})
    baselines.main([f"--log={tmp_path / 'log'}", f"--out={tmp_path / 'out'}"])
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert {(row["model"], row["seed"]) for row in rows} == {
        ("constant", 0), ("linear", 0), ("lightgbm", 0), ("lightgbm", 1),
        ("linear_frozen", 0), ("lightgbm_frozen", 0), ("lightgbm_frozen", 1),
    }  # fmt: skip
    auc = {
        row["model"]: row["value"]
        for row in rows
        if (row["head"], row["split"], row["metric"]) == ("is_click", "test", "auc")
    }
    assert auc["constant"] == 0.5 and auc["linear"] > 0.6
    assert {"day8", "days", "val"} < {row["split"] for row in rows}
    paired.main([str(tmp_path / "out/constant_seed0"), str(tmp_path / "out/linear_seed0"), "--resamples=20"])
    assert "concordance/played_ratio" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no event log here"):
        baselines.main([f"--log={tmp_path}", f"--out={tmp_path / 'out'}"])
