"""From a config and a log to a folder of codes, by function and by command line."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ml_collections import ConfigDict

from recscale.data.event_log import Column, EventLog
from recscale.data.event_log_writer import write
from recscale.semantic_ids import catalogue
from recscale.semantic_ids.make import make, parse_flags

ITEMS = 60
WORDS = ("red", "nail", "polish", "cream", "skin", "hair", "oil", "brush", "soap", "lotion", "gel", "spray")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS[4 * (v % 3) : 4 * (v % 3) + 4], 3)) + f" n{v % 50}" for v in range(ITEMS)]
    titles[7] = titles[6]
    events = {"item_id": np.arange(1, ITEMS + 1, dtype=np.int32)}
    text = pa.table({"title": titles})
    path = tmp_path_factory.mktemp("make") / "log"
    write(EventLog(np.array([0, ITEMS]), events, {"item_id": Column("id")}, ITEMS, text=text), path)
    return path


def tiny(name: str, log: Path) -> ConfigDict:
    """A shipped config, as small as the log."""
    c = importlib.import_module(f"configs.{name}").get_config().unlock()
    c.data.path = str(log)
    c.content.settings.dim = 6
    c.model.update({"levels": 2, "codebook": 8})
    if name == "rqvae_beauty":
        c.model.update({"hidden": (8,), "latent": 4})
        c.fit.update({"steps": 20, "chunk": 10, "warmup": 2, "batch_size": 32, "restart_every": 5})
    return c.lock()


@pytest.mark.parametrize("name", ["rqvae_beauty", "rqkmeans_beauty"])
def test_a_shipped_config_makes_codes_and_the_same_ones_again(name: str, log: Path, tmp_path: Path):
    book = make(tiny(name, log), tmp_path / "a")
    codes = catalogue.read(tmp_path / "a", EventLog.open(log))
    assert codes.sizes[:2] == (8, 8) and codes.levels == 3 and len(codes.codebooks) == 2
    assert len(np.unique(codes.codes_VQ[1:], axis=0)) == ITEMS  # the digit tells all apart
    np.testing.assert_array_equal(codes.codes_VQ[7, :2], codes.codes_VQ[8, :2])  # equal texts
    assert codes.facts["learned_levels"] == 2 and codes.facts["duplicates"] >= 1
    assert codes.facts["content"]["encoder"] == "tfidf_svd" and codes.facts["collisions"]["policy"] == "digit"
    diagnosed = codes.facts["diagnostics"]
    assert diagnosed["as_fitted"] == diagnosed["reconstruction"] and diagnosed["prefixes"][1]["distinct"] > 8
    assert json.loads((tmp_path / "a" / "make.json").read_text())["sha256"] == book["sha256"] == codes.sha256
    assert book["parameters"]["codebooks"] == sum(b.size for b in codes.codebooks) and book["history"]
    assert make(tiny(name, log), tmp_path / "b")["sha256"] == book["sha256"]


def test_sinkhorn_rounds_and_behaviour_beside_the_text(log: Path, tmp_path: Path):
    np.save(tmp_path / "known.npy", np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32))
    c = tiny("rqkmeans_beauty", log)
    c.behaviour.update({"source": str(tmp_path / "known.npy"), "use": "join"})
    c.collisions.policy = "sinkhorn"
    facts = make(c, tmp_path / "joined")["facts"]
    assert facts["collisions"]["items_moved"] > 0 and "reconstruction" not in facts["diagnostics"]
    assert facts["diagnostics"]["as_fitted"]["relative"] < 1


def test_alignment_with_behaviour(log: Path, tmp_path: Path):
    np.save(tmp_path / "known.npy", np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32))
    c = tiny("rqvae_beauty", log)
    c.behaviour.source = str(tmp_path / "known.npy")
    c.model.align_weight = 0.1
    book = make(c, tmp_path / "aligned")
    assert book["facts"]["items_with_behaviour"] == ITEMS and book["history"][-1]["alignment"] > 0


@pytest.mark.parametrize("unique", [False, True])
def test_random_codes_as_a_method(unique: bool, log: Path, tmp_path: Path):
    c = tiny("rqkmeans_beauty", log).unlock()
    c.method, c.model = "random", ConfigDict({"levels": 2, "codebook": 8, "unique": unique})
    c.collisions.policy = "none"
    codes = catalogue.read(tmp_path / "r") if make(c.lock(), tmp_path / "r") else None
    assert codes.sizes == (8, 8) and (len(np.unique(codes.codes_VQ[1:], axis=0)) == ITEMS) == unique


def changed(log: Path, section: str, **values: object) -> ConfigDict:
    c = tiny("rqkmeans_beauty", log).unlock()
    (c[section] if section else c).update(values)
    return c.lock()


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("", {"method": "vq"}, "method = 'vq': expected one of .*'rqvae'"),
        ("collisions", {"policy": "merge"}, "collisions.policy = 'merge'"),
        ("behaviour", {"source": "x.npy", "use": "mix"}, "behaviour.use = 'mix'"),
        ("behaviour", {"source": "x.npy", "use": "align"}, "method 'rqkmeans' has no alignment"),
        ("data", {"path": "nowhere"}, "nowhere: no event log here"),
        ("model", {"codebook": 64}, "distinct for 64 codes a level: use model.codebook = "),
        ("content", {"encoder": "bag"}, "encoder 'bag'"),
        ("content", {"encoder": ""}, "content.encoder = '' with nothing to quantise"),
        ("", {"fit": {"steps": 3}}, r"config: \['fit'\] are missing or unknown for method 'rqkmeans'"),
        ("collisions", {"polcy": "none"}, r"\['collisions.polcy'\] are missing or unknown"),
        ("", {"method": "random"}, "'model.iterations'.*'model.unique'.* for method 'random'"),
        ("", {"method": "rqvae"}, r"\['fit', 'inputs'\] are missing or unknown for method 'rqvae'"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(section, values, words, log: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=words) as error:
        make(changed(log, section, **values), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused_before_the_fit(log: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder that can be written to"):
        make(changed(log, "data", path="nowhere"), tmp_path / "file" / "codes")


def test_behaviour_alone_and_random_codes_need_no_text(tmp_path: Path):
    events = {"item_id": np.arange(1, ITEMS + 1, dtype=np.int32)}
    write(EventLog(np.array([0, ITEMS]), events, {"item_id": Column("id")}, ITEMS), tmp_path / "log")
    np.save(tmp_path / "known.npy", np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32))
    c = changed(tmp_path / "log", "content", encoder="").unlock()
    c.behaviour.source = str(tmp_path / "known.npy")
    facts = make(c.lock(), tmp_path / "known")["facts"]
    assert facts["content"]["encoder"] == "" and facts["diagnostics"]["neighbours"]["recall"] > 0.3
    c = changed(tmp_path / "log", "content", encoder="").unlock()
    c.method, c.model = "random", ConfigDict({"levels": 2, "codebook": 8, "unique": True})
    assert "neighbours" not in make(c.lock(), tmp_path / "random")["facts"]["diagnostics"]


def test_codes_that_are_there_are_kept_unless_told_otherwise(log: Path, tmp_path: Path):
    c = tiny("rqkmeans_beauty", log)
    make(c, tmp_path / "out")
    with pytest.raises(ValueError, match="holds codes already"):
        make(c, tmp_path / "out")
    make(c, tmp_path / "out", replace=True)


def test_a_misspelt_key_of_the_config_ends_in_one_line(monkeypatch):
    def wrong(*_, **__):
        raise AttributeError("'codebok' is not\n a key")

    monkeypatch.setattr("recscale.semantic_ids.make.app.parse_flags_with_usage", wrong)
    with pytest.raises(SystemExit, match="'codebok' is not a key"):
        parse_flags([sys.argv[0]])
