"""A cooled branch is the run of its length trained from the start; one that cannot be is one clear line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from recscale import record, train
from recscale.branch import branches, phases_of
from recscale.run import build
from recscale.scaling.collect import collect
from tests.same_run import final_arrays, measured
from tests.test_train import Killed
from tests.tiny_run import SAMPLED, make_log, tiny

TRUNK_EPOCHS, EPOCHS, FORK = 3.7, 2.22, 24  # 50 steps, cooling from 40 on, and 30, cooling from 24 on
WSD = {"optim__schedule": "wsd", "optim__decay": 0.2, "table__warmup": 3, "optim__warmup": 5}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return make_log(tmp_path_factory.mktemp("planted") / "log")


def config_of(log: Path, epochs: float, **changes: Any) -> ConfigDict:
    return tiny("hstu", log, **({"train__epochs": epochs} | WSD | SAMPLED | changes))


def branch_of(log: Path, folder: Path, **changes: Any) -> ConfigDict:
    fork = {"train__branch_from": str(folder), "train__branch_step": FORK}
    return config_of(log, EPOCHS, **(fork | changes))


@pytest.fixture(scope="module")
def trunk(log, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trunk"
    config = config_of(log, TRUNK_EPOCHS, train__keep_steps=(10, FORK, 45), train__eval_every=25, train__log_every=25)
    train.train(config, folder)
    return folder


def test_a_branch_killed_and_resumed_is_the_run_of_its_length(log, trunk, tmp_path, monkeypatch):
    """To the bit: parameters, moments, tables, data position, losses, evaluation, examples and FLOPs."""
    whole = train.train(config_of(log, EPOCHS), tmp_path / "whole")
    assert (whole["steps"], whole["decay_start"], whole["decay_steps"]) == (30, FORK, 6)

    config, place, calls = branch_of(log, trunk, train__checkpoint_every=2), train.place_batch, []

    def dies_at_the_fourth_step(mesh, batch):
        calls.append(None)
        if len(calls) == 4:
            raise Killed
        return place(mesh, batch)

    monkeypatch.setattr(train, "place_batch", dies_at_the_fourth_step)
    with pytest.raises(Killed):
        train.train(config, tmp_path / "branch")
    monkeypatch.setattr(train, "place_batch", place)
    cooled = train.train(config, tmp_path / "branch")

    assert measured(tmp_path / "branch") == [row for row in measured(tmp_path / "whole") if row["step"] > FORK]
    one, other = (
        final_arrays(config, tmp_path / "branch/checkpoints"),
        final_arrays(config, tmp_path / "whole/checkpoints"),
    )
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.tobytes() == other[name].tobytes(), name
    for key in (
        "evaluations",
        "seen",
        "flops",
        "parameters",
        "table",
        "stopped_at",
        "horizon",
        "decay_start",
        "cooled",
    ):
        assert cooled[key] == whole[key], key
    assert cooled["cooled"] and cooled["evaluations"][0]["cooled"]


def test_records_say_what_descends_from_what(log, trunk, tmp_path):
    book = record.read(trunk)
    assert (book["lineage"], book["parent_run"], book["parent_step"]) == (book["run_id"], "", 0)
    assert (book["schedule"], book["parametrisation"], book["warmup"], book["horizon"]) == ("wsd", "sp", 5, 50)
    assert {row["step"]: row["cooled"] for row in book["curve"]} == {25: False, 50: True}
    twig = branch_of(log, trunk, train__branch_step=10, train__keep_steps=(20,), eval__final=())
    train.train(twig, tmp_path / "twig")
    leaf = branch_of(log, tmp_path / "twig", train__branch_step=20, eval__final=())
    found = train.train(leaf, tmp_path / "leaf")
    assert found["lineage"] == book["run_id"]  # the trunk's, also through a branch of a branch
    assert found["parent_run"] == record.read(tmp_path / "twig")["run_id"] and found["parent_step"] == 20


def test_a_run_of_constant_rate_is_a_trunk_too_and_is_never_cooled(log, tmp_path):
    constant = config_of(log, 0.75, optim__schedule="constant", train__keep_steps=(8,), eval__final=("val",))
    book = train.train(constant, tmp_path / "trunk")
    assert (book["decay_start"], book["decay_steps"], book["cooled"]) == (10, 0, False)
    assert not any(row["cooled"] for row in book["evaluations"])
    short = branch_of(log, tmp_path / "trunk", train__branch_step=8, train__epochs=0.75, eval__final=("val",))
    cooled = train.train(short, tmp_path / "branch")
    assert cooled["cooled"] and cooled["stopped_at"] == 10
    assert cooled["seen"] == book["seen"]


def test_one_trunk_and_its_branches(log):
    """Every branch leaves where its own decay begins, which the trunk keeps and does not decay before."""
    rows = build(config_of(log, 1.0)).loader.num_rows
    longest, found = branches(config_of(log, 1.0), "runs/trunk", (2.22, 0.75, 3.7), rows)
    assert longest.train.keep_steps == (8, FORK) and longest.train.epochs == 3.7 and list(found) == [0.75, 2.22]
    for length, config in found.items():
        run = build(config)
        plan = phases_of(config.to_dict(), run.steps)
        assert config.train.branch_step == plan.decay_start in longest.train.keep_steps
        assert (config.train.branch_from, config.cell.coordinates.epochs) == ("runs/trunk", length)
    assert phases_of(longest.to_dict(), build(longest).steps).decay_start > FORK


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__branch_from": "/nowhere"}, r"train.branch_from = '/nowhere': no run is there; train the trunk first"),
        ({"train__branch_step": 11}, r"kept no state of step 11, it has \[10, 24, 45\].*train.keep_steps"),
        ({"seed": 1}, r"another config: seed \(trunk: 0, branch: 1\)"),
        (
            {"optim__learning_rate": 0.5, "model__depth": 2},
            r"model.depth \(trunk: 1, branch: 2\); optim.learning_rate \(trunk: 0.01, branch: 0.5\)\. Give both",
        ),
        ({"train__epochs": 1.85}, r"train.branch_step = 24: the learning rate of this run falls from step 20 on"),
        ({"train__branch_step": 45, "train__epochs": 5.0}, "the learning rate of the trunk falls from step 40 on"),
        ({"optim__schedule": "cosine"}, "the learning rate of this run falls from step 5 on"),
        ({"train__keep_steps": (31,)}, r"train.keep_steps = \(31,\): \[31\] are no steps of this run of 30"),
        ({"train__branch_step": 0}, r"train.branch_from = '.*' with train.branch_step = 0: a branch needs"),
        ({"train__branch_from": ""}, r"train.branch_from = '' with train.branch_step = 24: a branch needs"),
        ({"optim__decay": 0.0}, r"optim.decay = 0.0: expected the share of the steps"),
    ],
)
def test_a_branch_that_cannot_be_is_one_line(changes, message, log, trunk, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        train.train(branch_of(log, trunk, **changes), tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_record_from_before_lineages_is_still_read(log, trunk, tmp_path):
    """By the table of a study, and as a trunk."""
    book = record.read(trunk)
    for key in ("lineage", "parent_run", "parent_step", "horizon", "decay_start", "decay_steps", "cooled", "schedule"):
        del book[key]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/record.json").write_text(json.dumps(book))
    (tmp_path / "old/kept").symlink_to(trunk / "kept")
    rows = collect(tmp_path).rows
    assert len(rows) == 1 and "lineage" not in rows[0]
    found = train.train(branch_of(log, tmp_path / "old", eval__final=()), tmp_path / "branch")
    assert found["lineage"] == book["run_id"] and np.isfinite(found["horizon"])
