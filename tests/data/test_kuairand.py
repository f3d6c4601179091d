"""KuaiRand-Pure: the archive's files on invented data, wrong input, and the real files."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from recscale.data.event_log import EventLogError
from recscale.data.kuairand import FLAGS
from recscale.data.prepare import prepare
from tests.data import make_fixtures as make

FIRST = "log_standard_4_08_to_4_21_pure.csv"


def test_archive_files(tmp_path):
    source = make.write_kuairand(tmp_path / "KuaiRand-Pure/data")
    log = prepare("kuairand-pure", tmp_path / "log", source=tmp_path, expected=None)
    order = sorted(range(600), key=lambda row: (source["user_id"][row], source["time_ms"][row]))  # stable
    np.testing.assert_array_equal(np.repeat(log.users["raw_id"], log.lengths), source["user_id"][order])
    np.testing.assert_array_equal(log.items["raw_id"][log.events["item_id"]], source["video_id"][order])
    for name in (*FLAGS, "time_ms", "play_time_ms", "duration_ms"):
        np.testing.assert_array_equal(log.events[name], source[name][order], err_msg=name)
    np.testing.assert_array_equal(log.events["timestamp"], source["time_ms"][order] // 1000)
    np.testing.assert_array_equal(log.events["tab"], source["tab"][order] + 1)
    play, duration = source["play_time_ms"][order], source["duration_ms"][order]
    expected = [p / d if d else 0.0 for p, d in zip(play.tolist(), duration.tolist(), strict=True)]
    np.testing.assert_allclose(log.events["played_ratio"], expected, rtol=1e-6)
    assert log.events["time_ms"].dtype == np.int64 and log.events["time_ms"].min() > 2**32
    assert log.facts["duplicate_rows"] >= 1 and log.facts["repeats"] == "allowed"
    assert log.columns["tab"].kind == "context" and log.columns["is_click"].kind == "feedback"


def test_side_tables(tmp_path):
    make.write_kuairand(tmp_path)
    log = prepare("kuairand-pure", tmp_path / "log", source=tmp_path, expected=None)
    video = log.items["raw_id"][1:]
    np.testing.assert_array_equal(log.items["author_id"][1:], video + 8_000_000_000)
    np.testing.assert_array_equal(log.items["tag"][1:], video % 2)
    np.testing.assert_allclose(log.items["video_seconds"][1:], np.where(video % 7 == 0, 0, video))
    assert set(log.items["upload_day"][1:]) == {19090}  # 8 April 2022
    user = log.users["raw_id"]
    np.testing.assert_array_equal(log.users["follow_user_num"], user)
    np.testing.assert_array_equal(log.users["onehot_feat4"], np.where(user % 5 == 0, 0, user % 3 + 1))
    assert not [name for name in log.items if name.endswith("_cnt")]


WRONG = {
    "missing column": ((",tab\n", ",page\n"), "missing column"),
    "float id": (("\n7,", "\n7.5,"), "7.5"),
    "negative id": (("\n7,", "\n-7,"), "outside 0"),
    "overflowing id": (("\n7,", "\n7000000000,"), "outside 0"),
    "blank time": ((",164940", ",,164940"), "columns|blank"),
    "unknown tab": (("\n7,", "\n7,"), "tab"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_log_is_refused(tmp_path, case):
    (old, new), message = WRONG[case]
    make.write_kuairand(tmp_path)
    text = (tmp_path / FIRST).read_text().replace(old, new)
    if case == "unknown tab":
        head, row, rest = text.split("\n", 2)
        text = "\n".join([head, row.rsplit(",", 1)[0] + ",99", rest])
    (tmp_path / FIRST).write_text(text)
    with pytest.raises(EventLogError, match=message):
        prepare("kuairand-pure", tmp_path / "log", source=tmp_path, expected=None)
    assert not (tmp_path / "log").exists() and not (tmp_path / "log.partial").exists()


def test_half_an_archive_names_the_missing_file(tmp_path):
    make.write_kuairand(tmp_path)
    (tmp_path / FIRST).unlink()
    with pytest.raises(EventLogError, match=rf"{FIRST} missing from the archive layout.*zenodo"):
        prepare("kuairand-pure", tmp_path / "log", source=tmp_path, expected=None)


def test_real_counts(tmp_path, recscale_data, recscale_data_file):
    path = recscale_data_file("impressions/kuairand_pure_0425_0508.parquet")
    log = prepare("kuairand-pure", tmp_path / "log", source=recscale_data)
    table = pq.read_table(path, columns=["user_id", "item_id", "time_ms"])
    np.testing.assert_array_equal(np.repeat(log.users["raw_id"], log.lengths), table["user_id"].to_numpy())
    np.testing.assert_array_equal(log.items["raw_id"][log.events["item_id"]], table["item_id"].to_numpy())
    np.testing.assert_array_equal(log.events["time_ms"], table["time_ms"].to_numpy())
    assert log.facts["tied_events"] == pytest.approx(0.033, abs=6e-4)
    vectors = np.load(recscale_data_file("impressions/kuairand_pure_item_emb64.npy"))
    np.testing.assert_array_equal(log.items["vector"][1:], vectors[log.items["raw_id"][1:]])
