"""What is shipped runs: every config and every cell of every study."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from launch.study import load
from recscale.data.prepare import prepare
from recscale.mesh import place_batch
from recscale.program import check_config, program
from recscale.run import build, init_state
from recscale.step import make_train_step
from tests.data import make_fixtures
from tests.tiny_run import make_codes, make_log

ROOT = Path(__file__).resolve().parent.parent
QUANTIZERS = ("rqkmeans_beauty", "rqvae_beauty")  # not of training: tests/semantic_ids/test_make.py runs them
CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("[!_]*.py")} - {*QUANTIZERS})
STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/study.py"))


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return make_log(tmp_path_factory.mktemp("planted") / "log", users=80)


@pytest.fixture(scope="module")
def impressions(tmp_path_factory) -> Path:
    """A log with feedback, tabs and item features."""
    folder = tmp_path_factory.mktemp("impressions")
    make_fixtures.write_kuairand(folder / "source")
    prepare("kuairand-pure", folder / "log", source=folder / "source", expected=None)
    return folder / "log"


@pytest.fixture(scope="module")
def codes(log, tmp_path_factory) -> Path:
    """Semantic ids of the planted items, of the shipped shape."""
    return make_codes(log, tmp_path_factory.mktemp("codes") / "codes", levels=4, size=256)


def get_config(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


def assert_it_builds(config: ConfigDict) -> None:
    """All that can be said of a config without its data and its machine: here 3,000 items, one device."""
    check_config(config)
    here = config.copy_and_resolve_references()
    here.mesh.update({"replica": 1, "data": 1, "model": 1})
    features = (*config.loader.inputs, *config.loader.queries)
    program(here, num_items=3000, cardinalities=dict.fromkeys(features, 4), steps=100)
    assert (config.loader.row_length or config.loader.length) >= config.loader.length


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_is_locked_and_says_how_to_run_it(name):
    config = get_config(name)
    assert config.is_locked
    with pytest.raises((KeyError, AttributeError)):
        config.train.patiense = 3
    assert_it_builds(config)
    text = importlib.import_module(f"configs.{name}").__doc__
    for word in ("Data", "Command", "Hardware"):
        assert re.search(rf"^{word} ", text, re.MULTILINE), word
    assert f"--config=configs/{name}.py" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_takes_two_steps(name, log, impressions, codes):
    """On a tiny log and one device: as shipped but for depth, batch, and what follows from the number of users.

    A config for more than one device is cut in width and length too.
    """
    config = get_config(name).unlock()
    path = impressions if config.loader.inputs and not config.table.codes else log
    config.table.codes = config.table.codes and str(codes)
    config.data.update({"path": str(path), "users": 0, "num_items": 0, "num_events": 0})
    if config.mesh.replica * config.mesh.data * config.mesh.model > 1:
        config.loader.length = 64
        config.model.update({"width": 64, "heads": 2, "qk_dim": 32, "v_dim": 32, "max_length": 64})
        config.mesh.update({"replica": 1, "data": 1, "model": 1})
    if config.split.name == "by_user":
        config.split.train_users, config.split.eval_users = 60, 20
    if config.split.name in ("global_time", "parts"):
        config.split = ConfigDict({"name": "leave_one_out"})
    if "validation_users" in config.split and config.split.validation_users:
        config.split.validation_users = 20
    config.loader.batch_size = 2
    if "depth" in config.model:
        config.model.depth = 1
    if "negatives" in config.task and config.task.loss != "full":
        config.task.negatives = 8
    run = build(config.lock())
    state, train_step = init_state(run), make_train_step(run)
    for i in range(2):
        state, metrics = train_step(state, place_batch(run.mesh, run.loader[i]))
        assert np.isfinite(metrics["loss"]) and metrics["targets"] > 0
    assert int(state["step"]) == 2


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_every_cell_of_a_study_builds(study):
    module = load(study).module
    names = getattr(module, "every_cell", module.cells)()  # a study may leave out cells whose logs are not prepared
    assert len(set(names)) == len(names) > 0
    for name in names:
        config = module.get_config(name)
        assert config.is_locked and config.study == study.name, name
        assert_it_builds(config)
