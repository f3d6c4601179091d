"""MovieLens: the public archives' formats on invented data, wrong input, and the real files where they are."""

import hashlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recscale.data.event_log import EventLog, EventLogError
from recscale.data.prepare import prepare
from tests.data import make_fixtures as make


def events(log: EventLog) -> list[tuple[int, int, float, int]]:
    user = np.repeat(log.users["raw_id"], log.lengths)
    item = log.items["raw_id"][log.events["item_id"]]
    columns = (user, item, log.events["rating"] / 2, log.events["timestamp"])
    return list(zip(*(column.tolist() for column in columns), strict=True))


ARCHIVES = {
    "ml-1m": (make.write_ml_1m, {}),
    "ml-100k": (make.write_ml_100k, {"grouped": False}),
    "ml-20m": (make.write_ml_csv, {"half": True}),
    "ml-latest-small": (make.write_ml_csv, {"half": True}),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_files(tmp_path, name):
    write_files, options = ARCHIVES[name]
    rows = make.ratings(**options)
    log = prepare(name, tmp_path / "log", source=write_files(tmp_path / name, rows), expected=None)
    assert events(log) == rows.expected()
    assert log.facts["tied_events"] > 0.1
    rated = np.unique(rows.item)
    np.testing.assert_array_equal(log.items["raw_id"], [0, *rated])
    assert log.facts["movies_in_file"] == 60 > log.num_items
    text = log.read_text()
    assert text is not None
    assert text["title"].to_pylist() == [make.title(m) for m in rated]
    np.testing.assert_array_equal(log.items["year"][1:], rated % 90 + 1910)
    for v, movie in enumerate(rated, 1):
        assert {log.facts["genres"][g] for g in np.flatnonzero(log.items["genres"][v])} == set(make.genres(movie))
    assert log.items["genres"][0].sum() == 0
    assert log.columns["rating"].cardinality == 11


def test_zip_equals_folder(tmp_path):
    make.write_ml_1m(tmp_path / "a" / "ml-1m", make.ratings())
    shutil.make_archive(str(tmp_path / "ml-1m"), "zip", tmp_path / "a")
    folder = prepare("ml-1m", tmp_path / "x", source=tmp_path / "a", expected=None)
    zipped = prepare("ml-1m", tmp_path / "y", source=tmp_path / "ml-1m.zip", expected=None)
    beside = prepare("ml-1m", tmp_path / "z", source=tmp_path, expected=None)
    assert events(folder) == events(zipped) == events(beside)
    assert folder.facts == zipped.facts == beside.facts


def test_user_tables(tmp_path):
    rows = make.ratings()
    log = prepare("ml-1m", tmp_path / "a", source=make.write_ml_1m(tmp_path / "s", rows), expected=None)
    raw = log.users["raw_id"]
    np.testing.assert_array_equal(log.users["gender"], raw % 2 + 1)
    np.testing.assert_array_equal(log.users["occupation"], raw % 21 + 1)
    assert set(log.users["age"]) == {25}
    assert log.users["zip"][0] == f"1234{raw[0] % 10}"
    log = prepare("ml-100k", tmp_path / "b", source=make.write_ml_100k(tmp_path / "t", rows), expected=None)
    assert log.facts["occupations"] == ["artist", "doctor"]
    np.testing.assert_array_equal(log.users["occupation"], raw % 2 + 1)


@pytest.mark.parametrize("times", [True, False])
def test_parquet_form_keeps_order(tmp_path, times):
    rows = make.ratings()
    make.write_parquet(tmp_path / "movielens/ml1m.parquet", rows, times=times)
    log = prepare("ml-1m", tmp_path / "log", source=tmp_path, expected=None)
    assert ("timestamp" in log.events) == times
    user = np.repeat(log.users["raw_id"], log.lengths)
    found = list(zip(user.tolist(), log.items["raw_id"][log.events["item_id"]].tolist(), strict=True))
    assert found == [row[:2] for row in rows.expected()]


def test_sasrec_text(tmp_path):
    rows = make.ratings().expected()
    (tmp_path / "ml-1m.txt").write_text("".join(f"{u} {i}\n" for u, i, _, _ in rows))
    log = prepare("ml-1m-sasrec", tmp_path / "log", source=tmp_path, expected=None)
    assert as_lines(log) == "".join(f"{u} {i}\n" for u, i, _, _ in rows)
    assert "timestamp" not in log.events


def as_lines(log: EventLog) -> str:
    user = np.repeat(log.users["raw_id"], log.lengths)
    item = log.items["raw_id"][log.events["item_id"]]
    return "".join(f"{u} {i}\n" for u, i in zip(user.tolist(), item.tolist(), strict=True))


WRONG_LINES = {
    "float id": ("3.5::1::5::978300000\n", "3.5"),
    "negative id": ("-3::1::5::978300000\n", "outside 0"),
    "overflowing id": ("3::3000000000::5::978300000\n", "3000000000"),
    "overflowing int64": ("99999999999999999999::1::5::978300000\n", "99999999999999999999"),
    "NaN time": ("3::1::5::NaN\n", "blank or NaN"),
    "no time": ("3::1::5::\n", "blank or NaN"),
    "milliseconds": ("3::1::5::978300000000\n", "milliseconds"),
    "no column": ("3::1::5\n", "Expected 4 columns"),
    "rating": ("3::1::5.3::978300000\n", "half stars"),
    "NaN rating": ("3::1::nan::978300000\n", "half stars"),
    "duplicate": ("3::1::5::978300000\n3::1::4::978300001\n", "no item twice"),
    "empty": ("", "empty"),
}


@pytest.mark.parametrize("case", WRONG_LINES)
def test_wrong_ratings_are_refused(tmp_path, case):
    lines, message = WRONG_LINES[case]
    (tmp_path / "ratings.dat").write_text(lines)
    (tmp_path / "movies.dat").write_text("1::A (1999)::Drama\n")
    with pytest.raises(EventLogError, match=message):
        prepare("ml-1m", tmp_path / "log", source=tmp_path, expected=None)
    assert not list(tmp_path.glob("log*"))


def test_csv_without_a_column_is_refused(tmp_path):
    make.write_ml_csv(tmp_path, make.ratings())
    (tmp_path / "ratings.csv").write_text("userId,rating,timestamp\n1,3.5,978300000\n")
    with pytest.raises(EventLogError, match=r"missing column: expected userId, movieId.*'userId,rating,timestamp'"):
        prepare("ml-20m", tmp_path / "log", source=tmp_path, expected=None)


def test_movie_listed_twice_is_refused(tmp_path):
    make.write_ml_1m(tmp_path, make.ratings())
    with (tmp_path / "movies.dat").open("a") as file:
        file.write("9999::A::Drama\n9999::B::Drama\n")
    with pytest.raises(EventLogError, match="id 9999 occurs twice"):
        prepare("ml-1m", tmp_path / "log", source=tmp_path, expected=None)


def wrong_parquet(case: str) -> tuple[dict[str, pa.Array], str]:
    rows = make.ratings()
    n = len(rows.user)
    user = np.sort(rows.user)
    time = np.array([row[3] for row in rows.expected()])
    swapped = np.roll(user, 1)
    holes = pa.array(time, mask=np.arange(n) == 4)
    return {
        "float id": ({"item_id": pa.array(rows.item.astype(np.float32))}, "item_id is float.*expected integers"),
        "float time": ({"timestamp": pa.array(np.where(time == time[3], np.nan, time))}, "double with NaN"),
        "NaN time": ({"timestamp": holes}, "timestamp has 1 blank or NaN values, first in row 5"),
        "negative id": ({"item_id": pa.array(rows.item - 4000)}, "outside 0"),
        "overflowing id": ({"item_id": pa.array(rows.item + 2**31)}, "outside 0"),
        "unsigned overflow": ({"item_id": pa.array(np.full(n, 2**64 - 1, np.uint64))}, "overflows int64"),
        "unsorted users": ({"user_id": pa.array(swapped), "pos": pa.array(gapless(swapped))}, "users are not sorted"),
        "gap in pos": ({"pos": pa.array(np.arange(n))}, "must count 0, 1, 2"),
        "unsorted times": ({"timestamp": pa.array(time[::-1].copy())}, "does not decrease"),
        "NaN rating": ({"rating": pa.array(np.full(n, np.nan, np.float32))}, "half stars"),
    }[case]


def gapless(user: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    return np.arange(len(user)) - np.repeat(starts, np.diff(np.append(starts, len(user))))


PARQUET_CASES = ("float id", "float time", "NaN time", "negative id", "overflowing id", "unsigned overflow")
PARQUET_CASES += ("unsorted users", "gap in pos", "unsorted times", "NaN rating")


@pytest.mark.parametrize("case", PARQUET_CASES)
def test_wrong_parquet_is_refused(tmp_path, case):
    columns, message = wrong_parquet(case)
    make.write_parquet(tmp_path / "ml1m.parquet", make.ratings(), **columns)
    with pytest.raises(EventLogError, match=message):
        prepare("ml-1m", tmp_path / "log", source=tmp_path, expected=None)
    assert not list(tmp_path.glob("log*"))


def test_parquet_without_a_column_or_unreadable_is_refused(tmp_path):
    path = make.write_parquet(tmp_path / "ml1m.parquet", make.ratings())
    pq.write_table(pq.read_table(path).drop_columns(["pos"]), path)
    with pytest.raises(EventLogError, match="missing column pos"):
        prepare("ml-1m", tmp_path / "log", source=tmp_path, expected=None)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EventLogError, match="not a readable parquet"):
        prepare("ml-1m", tmp_path / "log", source=tmp_path, expected=None)
    (tmp_path / "ml-1m.zip").write_bytes(b"half a download")
    with pytest.raises(EventLogError, match=r"not a readable \.zip"):
        prepare("ml-1m", tmp_path / "log", source=tmp_path / "ml-1m.zip", expected=None)


@pytest.mark.parametrize("name", ["ml-1m", "ml-100k", "ml-latest-small"])
def test_real_counts(tmp_path, recscale_data, recscale_data_file, name):
    file = {"ml-1m": "ml1m", "ml-100k": "ml100k", "ml-latest-small": "ml_latest_small"}[name]
    recscale_data_file(f"movielens/{file}.parquet")
    log = prepare(name, tmp_path / "log", source=recscale_data)
    assert log.num_items == len(log.items["raw_id"]) - 1
    assert log.facts["items_without_metadata"] == 0
    ties = {"ml-1m": None, "ml-100k": (0.506, 0.440), "ml-latest-small": (0.157, 0.154)}[name]
    if ties is None:
        assert "timestamp" not in log.events
        assert log.facts["movies_in_file"] == 3883
    else:
        assert (log.facts["tied_events"], log.facts["users_last_two_tied"]) == pytest.approx(ties, abs=6e-4)


def test_real_sasrec_file(tmp_path, recscale_data, recscale_data_file):
    recscale_data_file("movielens/ml1m_sasrec.parquet")
    log = prepare("ml-1m-sasrec", tmp_path / "log", source=recscale_data)
    text = as_lines(log).encode()
    blob = hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()
    assert blob == "9ab8e3edb8742f8d8cc4911e3dee25e82a6fcc24"
    assert log.lengths.min() >= 5 and np.bincount(log.events["item_id"])[1:].min() >= 5
