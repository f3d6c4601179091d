"""Amazon 2014: the text, archive and parquet layouts on invented data, wrong input, and the real files."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recscale.data.event_log import EventLogError
from recscale.data.prepare import prepare
from tests.data import make_fixtures as make


def test_text_sequences(tmp_path):
    sequences = make.write_s3rec(tmp_path / "Beauty.txt")
    log = prepare("beauty", tmp_path / "log", source=tmp_path, expected=None)
    raw = log.items["raw_id"][log.events["item_id"]]
    assert [raw[a:b].tolist() for a, b in zip(log.offsets, log.offsets[1:], strict=False)] == sequences
    assert log.users["raw_id"].tolist() == list(range(1, make.USERS + 1))
    assert set(log.events) == {"item_id"}
    assert log.facts["times"].startswith("none")


def test_reviews(tmp_path):
    expected = make.write_reviews(tmp_path / "reviews_Toys_and_Games_5.json.gz", make.ratings())
    log = prepare("toys", tmp_path / "log", source=tmp_path, expected=None)
    user = np.repeat(log.users["raw_id"], log.lengths)
    item = log.items["raw_id"][log.events["item_id"]]
    columns = (user, item, log.events["rating"] / 2, log.events["timestamp"])
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert log.facts["tied_events"] > 0.5  # whole days
    assert log.items["raw_id"][0] == ""


def test_parquet_with_item_text(tmp_path):
    rows = make.ratings()
    make.write_parquet(tmp_path / "amazon2014/sports.parquet", rows)
    ids = rows.movies[::-1]
    table = {"item_id": ids, "asin": [f"B{i}" for i in ids], "keywords": [f"word {i}" for i in ids]}
    pq.write_table(pa.table(table), tmp_path / "amazon2014/sports_items.parquet")
    log = prepare("sports", tmp_path / "log", source=tmp_path, expected=None)
    rated = np.unique(rows.item)
    text = log.read_text()
    assert text is not None
    assert log.items["asin"].tolist() == ["", *(f"B{i}" for i in rated)]
    assert text["keywords"].to_pylist() == [f"word {i}" for i in rated]


WRONG_TEXT = {
    "float id": ("1 2.0 3\n", "2.0"),
    "text": ("1 a b\n", "whole numbers"),
    "negative id": ("1 -2 3\n", "id -2 is outside"),
    "overflowing id": ("1 2 3000000000\n", "id 3000000000 is outside"),
    "user without items": ("1 2 3\n2\n", "line 2 has no items"),
    "user twice": ("1 2 3\n2 3 4\n1 5 6\n", "user 1 has two lines"),
    "duplicate": ("1 2 3 2\n", "no item twice"),
    "empty": ("", "empty log"),
}


@pytest.mark.parametrize("case", WRONG_TEXT)
def test_wrong_text_is_refused(tmp_path, case):
    lines, message = WRONG_TEXT[case]
    (tmp_path / "Beauty.txt").write_text(lines)
    with pytest.raises(EventLogError, match=message):
        prepare("beauty", tmp_path / "log", source=tmp_path, expected=None)
    assert not list(tmp_path.glob("log*"))


REVIEW = {"reviewerID": "A", "asin": "B", "overall": 5.0, "unixReviewTime": 1_300_000_000}
WRONG_REVIEWS = {
    "missing column": ([{k: v for k, v in REVIEW.items() if k != "asin"}], "missing column asin"),
    "missing value": ([REVIEW, {**REVIEW, "asin": None}], "line 2 has no asin"),
    "float time": ([{**REVIEW, "unixReviewTime": 1.5e9}], "not gzipped JSON"),
    "milliseconds": ([{**REVIEW, "unixReviewTime": 1_300_000_000_000}], "outside|milliseconds"),
    "rating": ([{**REVIEW, "overall": 9.0}], "half stars"),
    "duplicate": ([REVIEW, REVIEW], "no item twice"),
    "empty": ([], "empty log"),
}


@pytest.mark.parametrize("case", WRONG_REVIEWS)
def test_wrong_reviews_are_refused(tmp_path, case):
    reviews, message = WRONG_REVIEWS[case]
    with gzip.open(tmp_path / "reviews_Beauty_5.json.gz", "wt") as file:
        file.write("".join(json.dumps(review) + "\n" for review in reviews))
    with pytest.raises(EventLogError, match=message):
        prepare("beauty", tmp_path / "log", source=tmp_path, expected=None)


def test_reviews_that_are_not_gzip_are_refused(tmp_path):
    (tmp_path / "reviews_Beauty_5.json.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(EventLogError, match="not gzipped JSON"):
        prepare("beauty", tmp_path / "log", source=tmp_path, expected=None)


@pytest.mark.parametrize(("name", "ties"), [("beauty", (0.390, 0.435)), ("sports", (0.419, 0.451))])
def test_real_counts(tmp_path, recscale_data, recscale_data_file, name, ties):
    recscale_data_file(f"amazon2014/{name}.parquet")
    log = prepare(name, tmp_path / "log", source=recscale_data)
    assert log.lengths.min() == 5
    assert (log.facts["tied_events"], log.facts["users_last_two_tied"]) == pytest.approx(ties, abs=6e-4)
    text = log.read_text()
    assert text is not None and text.num_rows == log.num_items
    assert set(np.strings.str_len(log.items["asin"][1:])) == {10}
