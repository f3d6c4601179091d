"""KuaiRand-Pure's watch sequences: both parts joined in order on invented data, wrong input, and the real files."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recscale.data.event_log import EventLogError
from recscale.data.prepare import prepare
from tests.data import make_fixtures as make

HISTORY, LOG = "kuairand_pure_history.parquet", "kuairand_pure_0425_0508.parquet"


def write(folder, seed=0):
    """Both files; of 50 users the first five have no history, the last five nothing else. Returns what must come."""
    rng = np.random.default_rng(seed)
    users = range(5, make.USERS)
    sequences = [rng.integers(0, 40, int(rng.integers(1, 9))).tolist() for _ in users]
    table = {"user_id": pa.array(users, pa.int32()), "watch_seq": pa.array(sequences), "like_seq": pa.array(sequences)}
    pq.write_table(pa.table(table), folder / HISTORY)
    late = {u: rng.integers(0, 60, int(rng.integers(1, 9))).tolist() for u in range(make.USERS - 5)}
    rows = [(u, i, pos) for u, items in late.items() for pos, i in enumerate(items)]
    user, item, pos = (pa.array(column, pa.int32()) for column in zip(*rows, strict=True))
    time = pa.array(1_650_900_000 + np.arange(len(rows)))
    pq.write_table(pa.table({"user_id": user, "item_id": item, "timestamp": time, "pos": pos}), folder / LOG)
    early = dict(zip(users, sequences, strict=True))
    return {u: [*early.get(u, []), *late.get(u, [])] for u in range(make.USERS)}


def test_the_history_comes_before_the_exposures(tmp_path):
    expected = write(tmp_path)
    log = prepare("kuairand-pure-watch", tmp_path / "log", source=tmp_path, expected=None)
    raw = log.items["raw_id"][log.events["item_id"]]
    found = [raw[a:b].tolist() for a, b in zip(log.offsets, log.offsets[1:], strict=False)]
    assert dict(zip(log.users["raw_id"].tolist(), found, strict=True)) == expected
    assert set(log.events) == {"item_id"} and log.facts["times"].startswith("none")


WRONG = {
    "user twice": (([1, 2, 1], [[1], [2], [3]]), "user 1 has two rows"),
    "negative id": (([1], [[4, -3]]), "id -3 is outside"),
    "overflowing id": (([1], [[3_000_000_000]]), "id 3000000000 is outside"),
    "missing list": (([1, 2], [[4], None]), "missing values"),
    "missing item": (([1], [[4, None]]), "missing values"),
    "floats": (([1], [[4.5]]), "expected lists of integer item ids"),
    "no lists": (([1], [4]), "expected lists of integer item ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sequences_are_refused(tmp_path, case):
    (users, sequences), message = WRONG[case]
    write(tmp_path)
    table = pa.table({"user_id": pa.array(users), "watch_seq": pa.array(sequences)})
    pq.write_table(table, tmp_path / HISTORY)
    with pytest.raises(EventLogError, match=message):
        prepare("kuairand-pure-watch", tmp_path / "log", source=tmp_path, expected=None)


def test_real_counts(tmp_path, recscale_data, recscale_data_file):
    path = recscale_data_file(f"impressions/{HISTORY}")
    log = prepare("kuairand-pure-watch", tmp_path / "log", source=recscale_data)
    history = pq.read_table(path, columns=["user_id", "watch_seq"])
    late = pq.read_table(recscale_data_file(f"impressions/{LOG}"), columns=["user_id", "item_id"])
    raw = log.items["raw_id"][log.events["item_id"]]
    for row in (0, 17, 20_000):
        user, before = history["user_id"][row].as_py(), history["watch_seq"][row].as_py()
        after = late["item_id"].to_numpy()[late["user_id"].to_numpy() == user].tolist()
        at = int(np.flatnonzero(log.users["raw_id"] == user)[0])
        assert raw[log.offsets[at] : log.offsets[at + 1]].tolist() == before + after
    assert log.facts["events_before"] == 817_187
