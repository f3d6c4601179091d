"""A grown catalogue: old items keep their codes bit for bit, new ones get theirs from what the folder keeps."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ml_collections import ConfigDict

from recscale.data.event_log import Column, EventLog
from recscale.data.event_log_writer import write
from recscale.semantic_ids import catalogue, content, encoding
from recscale.semantic_ids.catalogue import CodesError
from recscale.semantic_ids.extend import extend, match, summary
from recscale.semantic_ids.make import make

ITEMS = 60
WORDS = ("red", "nail", "polish", "cream", "skin", "hair", "oil", "brush", "soap", "lotion", "gel", "spray")
METHODS = ("rqvae", "rqkmeans")


def old_titles() -> dict[int, str]:
    """Raw id -> title; items 70 and 80 have equal texts, item 90 has none."""
    rng = np.random.default_rng(0)
    names = [" ".join(rng.choice(WORDS[4 * (v % 3) : 4 * (v % 3) + 4], 3)) + f" n{v % 50}" for v in range(ITEMS)]
    found = {10 * (v + 1): name for v, name in enumerate(names)}
    return found | {80: found[70], 90: "..."}


NEW = {5: "soap lotion gel", 75: old_titles()[70], 333: "", 444: "zzz yyy", 999: "red nail spray n7"}


def make_log(path: Path, titles: dict[int, str], raw: bool = True) -> Path:
    """A log of one user with these items, in ascending raw id."""
    keys, V = sorted(titles), len(titles)
    ids = np.arange(1, V + 1, dtype=np.int32)
    tables = {"raw_id": np.array([0, *keys])} if raw else {}
    text = pa.table({"title": [titles[key] for key in keys]})
    write(EventLog(np.array([0, V]), {"item_id": ids}, {"item_id": Column("id")}, V, items=tables, text=text), path)
    return path


def tiny(method: str, log: Path) -> ConfigDict:
    c = importlib.import_module(f"configs.{method}_beauty").get_config().unlock()
    c.data.path = str(log)
    c.content.settings.dim = 6
    c.model.update({"levels": 2, "codebook": 8})
    if method == "rqvae":
        c.model.update({"hidden": (8,), "latent": 4})
        c.fit.update({"steps": 20, "chunk": 10, "warmup": 2, "batch_size": 32, "restart_every": 5})
    return c.lock()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Logs "old" and "grown", and codes of the old one by method."""
    path = tmp_path_factory.mktemp("extend")
    make_log(path / "old", old_titles())
    make_log(path / "grown", old_titles() | NEW)
    for method in METHODS:
        make(tiny(method, path / "old"), path / method)
    return path


def by_raw(codes: catalogue.Codes) -> dict[int, list[int]]:
    return dict(zip(codes.raw_id[1:].tolist(), codes.codes_VQ[1:].tolist(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_old_items_keep_their_codes_and_new_ones_get_theirs(method: str, root: Path, tmp_path: Path):
    before = {file.name: file.read_bytes() for file in (root / method).iterdir()}
    extend(root / method, root / "grown", tmp_path / "more")
    parent = catalogue.read(root / method, EventLog.open(root / "old"))
    child = catalogue.read(tmp_path / "more", EventLog.open(root / "grown"), encoder=True)
    old, grown = by_raw(parent), by_raw(child)
    assert {key: grown[key] for key in old} == old and sorted(set(grown) - set(old)) == sorted(NEW)
    assert child.sizes[:2] == parent.sizes[:2] and len(np.unique(child.codes_VQ[1:], axis=0)) == ITEMS + len(NEW)
    assert grown[75][:2] == old[70][:2] and grown[333][:2] == old[90][:2]  # equal texts, and no text
    for key in sorted(NEW):  # the next free digit of the bucket
        lower = [row for other, row in grown.items() if row[:2] == grown[key][:2] and (other in old or other < key)]
        assert grown[key][2] == len(lower)
    row = child.facts["extensions"][0]
    assert row["parent"] == {"sha256": parent.sha256, "num_items": ITEMS, "sizes": list(parent.sizes)}
    assert (row["items_added"], row["old_encoded_alike"], row["new_said_nothing"]) == (5, ITEMS, 2)
    assert row["new_sharing"] == 0 and 2 <= row["new_sharing_learned"] <= 5
    fitted = parent.facts["diagnostics"]["as_fitted"]["relative"]
    assert row["lost_of_old"] == pytest.approx(fitted, rel=1e-3) and row["lost_of_new"] > 0
    assert child.facts["diagnostics"]["levels"][0]["size"] == 8 and child.facts["method"] == method
    assert {file.name: file.read_bytes() for file in (root / method).iterdir()} == before


@pytest.mark.parametrize("method", METHODS)
def test_an_old_item_is_encoded_to_its_own_learned_codes(method: str, root: Path):
    log = EventLog.open(root / "old")
    codes = catalogue.read(root / method, log, encoder=True)
    again, said = content.encode_again(log, codes.facts["content"], encoding.part(codes.encoder, "text"))
    np.testing.assert_allclose(again, content.encode(log, "tfidf_svd", dim=6).vectors_VD, atol=1e-6)
    assert said[1:].sum() == ITEMS - 1 and not said[9]
    np.testing.assert_array_equal(encoding.encode(codes, again[1:]).codes_NQ, codes.codes_VQ[1:, :2])


def test_a_catalogue_grows_twice_as_it_would_at_once(root: Path, tmp_path: Path):
    first = make_log(tmp_path / "first", old_titles() | {key: NEW[key] for key in (5, 75)})
    one = extend(root / "rqkmeans", first, tmp_path / "one")
    two = extend(tmp_path / "one", root / "grown", tmp_path / "two")
    assert [row["items_added"] for row in two.facts["extensions"]] == [2, 3]
    assert two.facts["extensions"][1]["parent"]["sha256"] == one.sha256
    assert by_raw(two) == by_raw(extend(root / "rqkmeans", root / "grown", tmp_path / "at_once"))


def test_a_digit_that_grows_is_said_with_what_it_asks_of_a_model(root: Path, tmp_path: Path):
    same = {71 + n: old_titles()[70] for n in range(9)}
    log = make_log(tmp_path / "log", old_titles() | same)
    codes = extend(root / "rqkmeans", log, tmp_path / "more")
    before = catalogue.read(root / "rqkmeans").sizes[-1]
    assert codes.sizes[-1] >= 11 > before
    lines = summary(codes)
    assert f"grew from {before} to {codes.sizes[-1]} codes: a model needs model.codebook >=" in lines[-1]
    assert lines[1].startswith("9 new items: 9 share their learned tuple, 0 all codes; 0 have no text")


def test_codes_without_a_digit_and_the_command_line(root: Path, tmp_path: Path):
    c = tiny("rqkmeans", root / "old").unlock()
    c.collisions.policy = "none"
    make(c.lock(), tmp_path / "plain")
    names = {"codes": tmp_path / "plain", "data.path": root / "grown", "out": tmp_path / "more"}
    command = [sys.executable, "-m", "recscale.semantic_ids.extend", *(f"--{k}={v}" for k, v in names.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("60 old items keep their codes; today the encoder gives 60 of them") and len(lines) == 4
    codes = catalogue.read(tmp_path / "more", EventLog.open(root / "grown"))
    assert codes.levels == 2 and by_raw(codes)[75] == by_raw(codes)[70]
    assert codes.facts["extensions"][0]["new_sharing"] == codes.facts["extensions"][0]["new_sharing_learned"] > 0


def changed_titles(folder: Path) -> Path:
    keys = sorted(old_titles())
    return make_log(folder, {key: old_titles()[keys[v - 13]] for v, key in enumerate(keys)} | NEW)


LOGS = {
    "an item is gone": (
        lambda f: make_log(f, {key: title for key, title in (old_titles() | NEW).items() if key not in (20, 30)}),
        "lacks 2 of the 60 items of .*, first raw id 20: their codes would be given again",
    ),
    "nothing is new": (lambda f: make_log(f, old_titles()), "all 60 items have codes in .*nothing to add"),
    "no raw ids": (lambda f: make_log(f, old_titles() | NEW, raw=False), "no items/raw_id by which"),
    "other texts": (changed_titles, r"only \d+ of 60 old items come out with their first code, expected 50% or more"),
    "no log": (lambda f: f, "no event log here"),
}


def refused(folder: Path, log: Path, out: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        extend(folder, log, out)
    assert "\n" not in str(error.value) and not out.exists()


@pytest.mark.parametrize("case", LOGS)
def test_a_log_that_does_not_fit_is_refused_and_nothing_is_written(case: str, root: Path, tmp_path: Path):
    log, message = LOGS[case]
    refused(root / "rqkmeans", log(tmp_path / "log"), tmp_path / "out", message)


def joined(root: Path, folder: Path) -> None:
    np.save(folder.with_suffix(".npy"), np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32))
    c = tiny("rqkmeans", root / "old").unlock()
    c.behaviour.update({"source": str(folder.with_suffix(".npy")), "use": "join"})
    make(c.lock(), folder)


def drawn(root: Path, folder: Path) -> None:
    c = tiny("rqkmeans", root / "old").unlock()
    c.method, c.model = "random", ConfigDict({"levels": 2, "codebook": 8, "unique": True})
    make(c.lock(), folder)


def without_encoder(root: Path, folder: Path) -> None:
    catalogue.write(catalogue.read(root / "rqkmeans"), folder)


def full(root: Path, folder: Path) -> None:
    codes = catalogue.read(root / "rqkmeans", encoder=True)
    facts = {**codes.facts, "collisions": {**codes.facts["collisions"], "maximum": codes.sizes[-1]}}
    catalogue.write(dataclasses.replace(codes, facts=facts), folder)


def another_version(root: Path, folder: Path) -> None:
    codes = catalogue.read(root / "rqkmeans", encoder=True)
    catalogue.write(dataclasses.replace(codes, encoder={**codes.encoder, "version": np.array(2)}), folder)


def damaged(root: Path, folder: Path) -> None:
    catalogue.write(catalogue.read(root / "rqkmeans", encoder=True), folder)
    data = bytearray((folder / "encoder.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "encoder.npz").write_bytes(data)
    assert catalogue.read(folder).num_items == ITEMS  # training reads the codes all the same


def published(root: Path, folder: Path) -> None:
    codes = catalogue.read(root / "rqkmeans")
    catalogue.write(dataclasses.replace(codes, facts={**codes.facts, "method": "published"}), folder)


FOLDERS = {
    "behaviour vectors": (joined, r"codes of behaviour vectors \(behaviour.use = 'join'\)"),
    "random codes": (drawn, "codes by method 'random' have no encoder"),
    "published codes": (published, "codes by method 'published' have no encoder"),
    "an older folder": (without_encoder, r"keeps no encoder \(encoder.npz\).*make the codes anew"),
    "another version": (another_version, "encoder.npz: version 2, this code reads 1"),
    "a damaged encoder": (damaged, "encoder.npz: damaged"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_codes_that_cannot_be_extended_are_refused_in_one_line(case: str, root: Path, tmp_path: Path):
    prepare, message = FOLDERS[case]
    prepare(root, tmp_path / "codes")
    refused(tmp_path / "codes", root / "grown", tmp_path / "out", message)


def test_a_full_bucket_is_refused(root: Path, tmp_path: Path):
    full(root, tmp_path / "codes")
    same = {71 + n: old_titles()[70] for n in range(9)}
    log = make_log(tmp_path / "log", old_titles() | same)
    refused(tmp_path / "codes", log, tmp_path / "out", "items share one tuple, a digit has at most")


def test_items_are_matched_by_raw_ids_of_one_kind(root: Path):
    codes = catalogue.read(root / "rqkmeans")
    text = np.array(["", *(f"i{key:04d}" for key in codes.raw_id[1:])])
    V = ITEMS + 2
    ours = np.array(["", "i9999", *text[:0:-1], "a"])  # new, old ones in reverse, new
    ids = np.arange(1, V + 1, dtype=np.int32)
    log = EventLog(np.array([0, V]), {"item_id": ids}, {"item_id": Column("id")}, V, items={"raw_id": ours})
    found = match(dataclasses.replace(codes, raw_id=text), log)
    np.testing.assert_array_equal(found.old, np.arange(V - 1, 1, -1))
    np.testing.assert_array_equal(found.new, [1, V])
    with pytest.raises(CodesError, match="raw_id is <U5, in codes it is int64: another dataset"):
        match(codes, log)
    with pytest.raises(CodesError, match="two items have the same raw id"):
        match(dataclasses.replace(codes, raw_id=np.where(text == "i0020", "i0010", text)), log)
    with pytest.raises(CodesError, match="its log had no items/raw_id"):
        match(dataclasses.replace(codes, raw_id=None), log)


def test_the_encoder_is_counted_in_the_meta(root: Path):
    meta = json.loads((root / "rqvae" / "meta.json").read_text())
    assert sorted(meta["files"]) == ["codebooks.parquet", "codes.parquet", "encoder.npz"]
