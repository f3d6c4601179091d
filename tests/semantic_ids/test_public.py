"""Published id tables: an invented one, wrong ones, and the counts of the real ones."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recscale.data.event_log import Column, EventLog
from recscale.data.prepare import prepare
from recscale.semantic_ids import public
from recscale.semantic_ids.catalogue import CodesError, identity

RAW = np.array([0, 11, 12, 15, 20])


def make_log(raw: np.ndarray = RAW) -> EventLog:
    ids = np.arange(1, len(raw), dtype=np.int32)
    return EventLog(np.array([0, len(ids)]), {"item_id": ids}, {"item_id": Column("id")}, len(ids), {"raw_id": raw})


def write_table(path, **changes):
    """Schemes "a" (one item more than the log) and "b", rows in no order."""
    scheme, item = ["b"] * 4 + ["a"] * 5, [20, 15, 12, 11, 15, 11, 12, 16, 20]
    columns = {
        "scheme": pa.array(scheme).dictionary_encode(),
        "item_id": pa.array(item, pa.int32()),
        "c0": pa.array([10 * k for k in range(9)], pa.int16()),
        "c1": pa.array(range(9), pa.int16()),
    }
    pq.write_table(pa.table({k: v for k, v in (columns | changes).items() if v is not None}), path)
    return path


def test_a_scheme_in_the_order_of_the_log(tmp_path):
    path, log = write_table(tmp_path / "ids.parquet"), make_log()
    assert public.schemes(path) == ["a", "b"]
    found = public.read(path, "b", log)
    assert found.codes_VQ.tolist() == [[0, 0], [30, 3], [20, 2], [10, 1], [0, 0]]
    assert found.sizes == (256, 256) and found.codebooks == ()
    assert found.facts["catalogue"] == identity(log) and found.facts["scheme"] == "b"
    more = public.read(path, "a", log)
    assert more.codes_VQ[1:, 1].tolist() == [5, 6, 4, 8] and more.facts["items_not_in_the_log"] == 1


WRONG = {
    "unknown scheme": ({}, "c", RAW, "no scheme 'c'; it has a, b"),
    "missing items": ({}, "b", np.array([0, 11, 13, 14]), "no codes for 2 of 3 items, first raw id 13"),
    "text ids": ({}, "b", np.array(["", "x"]), "no numbers in items/raw_id"),
    "no column": ({"item_id": None}, "b", RAW, "it lacks item_id"),
    "twice": ({"item_id": pa.array([20, 15, 12, 12, 15, 11, 12, 16, 20])}, "b", RAW, "item 12 has two rows"),
    "floats": ({"c1": pa.array([0.5] * 9)}, "b", RAW, "column c1 is double"),
    "beyond a byte": ({"c1": pa.array([256] * 9)}, "b", RAW, "level 1 has codes 0..256, expected 0..255"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables_are_refused(tmp_path, case):
    changes, scheme, raw, message = WRONG[case]
    path = write_table(tmp_path / "ids.parquet", **changes)
    with pytest.raises(CodesError, match=message) as error:
        public.read(path, scheme, make_log(raw))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_table(tmp_path):
    (tmp_path / "ids.parquet").write_text("no parquet")
    for name in ("ids.parquet", "none.parquet"):
        with pytest.raises(CodesError, match="not a readable parquet file"):
            public.schemes(tmp_path / name)


# Distinct tuples of 4 codes and of the first 3, and the largest bucket of 3, as counted by those who collected them.
PUBLISHED = {
    "beauty": {
        "letter_release": (12_088, 11_696, 27),
        "coll_letter_native": (12_015, 11_653, 24),
        "coll_letter_zcr": (12_101, 11_695, 20),
        "coll_mql4grec": (12_101, 8_395, 27),
        "coll_quasid_native": (12_064, 11_871, 4),
        "coll_quasid_zcr": (12_101, 11_871, 4),
        "coll_rkmeans_native": (10_527, 8_758, 27),
        "coll_rkmeans_zcr": (12_101, 8_758, 27),
        "coll_rkmeans_zcr_cf": (12_101, 9_537, 18),
        "coll_rqvae_native": (11_499, 10_600, 18),
        "coll_rqvae_zcr": (12_101, 9_818, 28),
    },
    "yelp": {
        "letter_release": (19_201, 19_145, 65),
        "coll_letter_native": (18_939, 15_814, 65),
        "coll_letter_zcr": (20_033, 16_677, 121),
        "coll_mql4grec": (20_033, 5_847, 65),
        "coll_quasid_native": (19_200, 19_124, 65),
        "coll_quasid_zcr": (20_033, 19_124, 65),
        "coll_rkmeans_native": (18_004, 15_584, 65),
        "coll_rkmeans_zcr": (20_033, 15_584, 65),
        "coll_rkmeans_zcr_cf": (20_033, 18_041, 16),
        "coll_rqvae_native": (18_831, 17_950, 65),
        "coll_rqvae_zcr": (20_033, 13_281, 65),
    },
    "microlens": {"iba_release": (5_220, 5_068, 14)},
}
FOLDERS = {"beauty": "amazon2014"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_counts_of_the_published_tables(tmp_path, recscale_data, recscale_data_file, name):
    path = recscale_data_file(f"{FOLDERS.get(name, name)}/{name}_semantic_ids.parquet")
    log = prepare(name, tmp_path / "log", source=recscale_data)
    assert public.schemes(path) == sorted(PUBLISHED[name])
    for scheme, expected in PUBLISHED[name].items():
        prefixes = public.read(path, scheme, log).facts["diagnostics"]["prefixes"]
        assert (prefixes[3]["distinct"], prefixes[2]["distinct"], prefixes[2]["largest_bucket"]) == expected, scheme
