"""Codes of a catalogue come back bit for bit, and never for another catalogue or from a damaged folder."""

import dataclasses
import json

import numpy as np
import pytest

from recscale.data.event_log import Column, EventLog
from recscale.semantic_ids import catalogue
from recscale.semantic_ids.catalogue import Codes, CodesError

V = 40


def make_log(raw: np.ndarray | None = None, items: int = V) -> EventLog:
    """A log of one user; raw: items/raw_id [V + 1]."""
    ids = np.arange(1, items + 1, dtype=np.int32)
    tables = {} if raw is None else {"raw_id": raw}
    return EventLog(np.array([0, items]), {"item_id": ids}, {"item_id": Column("id")}, items, items=tables)


def make_codes(log: EventLog, **changes) -> Codes:
    rng = np.random.default_rng(0)
    codes_VQ = np.concatenate([np.zeros((1, 3), np.int32), rng.integers(0, 8, (log.num_items, 3), dtype=np.int32)])
    books = tuple(rng.normal(size=(8, width)).astype(np.float32) for width in (5, 2))
    facts = {"method": "test", "reductions": ["sum"], "diagnostics": {"mse": 0.1 + 0.2}}
    values = {"codes_VQ": codes_VQ, "sizes": (8, 8, 9), "facts": facts, "codebooks": books} | changes
    return catalogue.of_log(log, **values)


RAW = {
    "numbers": np.arange(V + 1) * 7,
    "text": np.array(["", *(f"B{v:03d}é" for v in range(V))]),
    "none": None,
}


@pytest.mark.parametrize("raw", RAW)
def test_round_trip(tmp_path, raw):
    log = make_log(RAW[raw])
    codes = make_codes(log)
    catalogue.write(codes, tmp_path / "codes")
    found = catalogue.read(tmp_path / "codes", log)
    assert found.codes_VQ.dtype == np.int32 and found.codes_VQ.tobytes() == codes.codes_VQ.tobytes()
    assert (found.sizes, found.facts, found.sha256) == (codes.sizes, codes.facts, codes.sha256)
    assert [book.tobytes() for book in found.codebooks] == [book.tobytes() for book in codes.codebooks]
    assert [book.shape for book in found.codebooks] == [(8, 5), (8, 2)]
    if codes.raw_id is None:
        assert found.raw_id is None
    else:
        np.testing.assert_array_equal(found.raw_id, codes.raw_id)
    assert sorted(f.name for f in (tmp_path / "codes").iterdir()) == ["codebooks.parquet", "codes.parquet", "meta.json"]


def test_without_codebooks_and_without_a_log(tmp_path):
    catalogue.write(make_codes(make_log(), codebooks=()), tmp_path)
    assert catalogue.read(tmp_path).codebooks == ()
    assert not (tmp_path / "codebooks.parquet").exists()


def test_what_encodes_further_items_is_read_where_it_is_asked_for(tmp_path):
    arrays = {"version": np.array(1), "text.words": np.arange(5, dtype=np.uint8), "quantizer.scale": np.ones((1, 3))}
    codes = make_codes(make_log(), encoder=arrays)
    for name in ("a", "b"):
        catalogue.write(codes, tmp_path / name)
    assert (tmp_path / "a" / "meta.json").read_bytes() == (tmp_path / "b" / "meta.json").read_bytes()
    found = catalogue.read(tmp_path / "a", encoder=True).encoder
    assert found.keys() == arrays.keys() and all(found[key].tobytes() == arrays[key].tobytes() for key in arrays)
    assert catalogue.read(tmp_path / "a").encoder == {}
    flip(tmp_path / "a" / "encoder.npz")
    assert catalogue.read(tmp_path / "a").sha256 == codes.sha256
    with pytest.raises(CodesError, match=r"encoder.npz: damaged"):
        catalogue.read(tmp_path / "a", encoder=True)


def test_codes_are_not_overwritten_unless_told(tmp_path):
    log = make_log()
    catalogue.write(make_codes(log), tmp_path)
    with pytest.raises(CodesError, match="holds codes already"):
        catalogue.write(make_codes(log), tmp_path)
    other = make_codes(log)
    other.codes_VQ[1, 0] = 7 - other.codes_VQ[1, 0]
    catalogue.write(other, tmp_path, replace=True)
    assert catalogue.read(tmp_path, log).sha256 == other.sha256


def test_a_write_that_is_cut_leaves_no_codes(tmp_path, monkeypatch):
    log = make_log()
    catalogue.write(make_codes(log), tmp_path)

    def full(path, data):
        if path.name != "codes.parquet":
            raise OSError("disk full")
        path.write_bytes(data)

    monkeypatch.setattr(catalogue, "_replace", full)
    with pytest.raises(OSError, match="disk full"):
        catalogue.write(make_codes(log), tmp_path, replace=True)
    with pytest.raises(CodesError, match=r"no codes here \(meta.json is missing\)"):
        catalogue.read(tmp_path)


def test_another_catalogue_is_refused(tmp_path):
    log = make_log(RAW["numbers"])
    catalogue.write(make_codes(log), tmp_path)
    with pytest.raises(CodesError, match=r"made for 40 items \(\w{12}\), but the log has 41 items"):
        catalogue.read(tmp_path, make_log(np.arange(V + 2) * 7, V + 1))
    swapped = RAW["numbers"].copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    with pytest.raises(CodesError, match="40 items with other raw ids"):
        catalogue.read(tmp_path, make_log(swapped))
    with pytest.raises(CodesError, match="other raw ids"):
        catalogue.read(tmp_path, make_log())


def test_the_identity_is_of_the_ids_and_not_of_their_width():
    wide, narrow = make_log(np.arange(V + 1, dtype=np.int64)), make_log(np.arange(V + 1, dtype=np.int16))
    assert catalogue.identity(wide) == catalogue.identity(narrow) == catalogue.identity(make_log())
    assert catalogue.identity(wide) != catalogue.identity(make_log(RAW["numbers"]))


def set_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "nothing there": (lambda f: (f / "meta.json").unlink(), "no codes here"),
    "no JSON": (lambda f: (f / "meta.json").write_text("{"), "meta.json: damaged"),
    "a list": (lambda f: (f / "meta.json").write_text("[]"), "meta.json: damaged"),
    "a field is gone": (lambda f: (f / "meta.json").write_text('{"schema_version": 1}'), "lacks num_items, sizes"),
    "another version": (lambda f: set_meta(f, schema_version=2), "schema version 2, this code reads 1"),
    "a flipped bit": (lambda f: flip(f / "codes.parquet"), "codes.parquet: damaged"),
    "a cut file": (lambda f: (f / "codebooks.parquet").write_bytes(b"PAR1"), "codebooks.parquet: damaged"),
    "a lost file": (lambda f: (f / "codebooks.parquet").unlink(), "codebooks.parquet: cannot be read"),
    "codes beyond the size": (lambda f: set_meta(f, sizes=[8, 4, 9]), r"level 1 has codes 0..7, expected 0..3"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, case):
    damage, message = DAMAGE[case]
    catalogue.write(make_codes(make_log()), tmp_path)
    damage(tmp_path)
    with pytest.raises(CodesError, match=message) as error:
        catalogue.read(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def book(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


WRONG = {
    "floats": ({"codes_VQ": np.zeros((V + 1, 3))}, "float64"),
    "padding": ({"codes_VQ": np.ones((V + 1, 3), np.int32)}, "row 0 is padding"),
    "negative": ({"codes_VQ": np.array([[0] * 3] + [[0, -1, 0]] * V, np.int32)}, r"level 1 has codes -1..0"),
    "levels": ({"sizes": (8, 8)}, "for 3 levels"),
    "no size": ({"sizes": (8, 8, 0)}, "positive size"),
    "rows": ({"codes_VQ": np.zeros((V, 3), np.int32)}, "expected 41"),
    "codebook size": ({"codebooks": (book(7, 2),)}, r"codebook 0 is float32 \[7, 2\], expected float32 \[8, d\]"),
    "codebook type": ({"codebooks": (book(8, 2, dtype=np.float64),)}, "float64"),
    "codebook NaN": ({"codebooks": (book(8, 2) + np.nan,)}, "NaN"),
    "codebooks": ({"codebooks": (book(8, 2),) * 4}, "4 codebooks for 3 levels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_codes_that_do_not_fit_are_refused(case):
    changes, message = WRONG[case]
    with pytest.raises(CodesError, match=message):
        make_codes(make_log(), **changes)


@pytest.mark.parametrize("value", [np.float32(1), float("nan"), {1, 2}])
def test_facts_must_be_plain(tmp_path, value):
    with pytest.raises(CodesError, match="not plain JSON"):
        catalogue.write(make_codes(make_log(), facts={"x": value}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_codes_of_no_catalogue_are_not_written(tmp_path):
    codes = make_codes(make_log())
    with pytest.raises(CodesError, match="facts lack 'catalogue'"):
        catalogue.write(dataclasses.replace(codes, facts={}), tmp_path)
    wrong = {"catalogue": {"num_items": V + 1, "sha256": ""}}
    with pytest.raises(CodesError, match="40 items, but facts"):
        dataclasses.replace(codes, facts=wrong)
