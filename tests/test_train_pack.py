"""Runs that train in one program equal runs that train alone, whatever happens to the others."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from recscale import record, train_pack, training
from recscale import train as train_alone
from recscale.checkpoint import Checkpoints
from recscale.events import read_events
from recscale.lease import Lease
from recscale.population import Population
from recscale.preemption import EXIT_HELD, Preempted
from recscale.run import build, init_state
from recscale.train import train
from tests.tiny_run import FULL, SAMPLED, make_log, tiny

SLOW = pytest.mark.slow
SEEDS = tuple({"seed": seed} for seed in range(3))
RATES = tuple({"optim__learning_rate": rate, "table__learning_rate": rate / 2} for rate in (1e-3, 1e-2, 3e-2))
SELECT = {"train__select": "nats min", "train__eval_every": 5, "train__checkpoint_every": 3}


class Killed(BaseException):
    """Stands for the process ending at once."""


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return make_log(tmp_path_factory.mktemp("planted") / "log")


def cells(model: str, log: Path, members, folder: Path, **changes) -> dict[Path, ConfigDict]:
    """Workdir -> config of each member."""
    return {folder / str(i): tiny(model, log, **(changes | member)) for i, member in enumerate(members)}


def assert_same_runs(pack: Path, alone: Path, count: int = 3, rtol: float = 1e-5) -> None:
    for i in range(count):
        one, other = (record.read(folder / str(i)) for folder in (pack, alone))
        for key in ("status", "stopped_at", "selected_step", "seen", "flops", "config_hash", "run_id", "steps"):
            assert one[key] == other[key], key
        for key in ("evaluations", "curve"):
            assert len(one[key]) == len(other[key])
            for mine, theirs in zip(one[key], other[key], strict=True):
                assert {k: mine[k] for k in ("step", "split", "slice", "metric", "n")} == {
                    k: theirs[k] for k in ("step", "split", "slice", "metric", "n")
                }
                if mine["metric"] == "nats":
                    assert mine["value"] == pytest.approx(theirs["value"], rel=rtol)
        found, expected = losses(pack / str(i)), losses(alone / str(i))
        assert list(found) == list(expected) and len(found) > 8
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=rtol)
        assert (pack / str(i) / "DONE").read_text() == (alone / str(i) / "DONE").read_text()
        per_target = [np.load(folder / str(i) / "per_target_test.npz") for folder in (pack, alone)]
        np.testing.assert_allclose(per_target[0]["nats"], per_target[1]["nats"], rtol=100 * rtol)


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in record.read_metrics(workdir) if "loss" in row}


@pytest.mark.parametrize(
    ("model", "members", "changes", "devices"),
    [
        pytest.param("hstu", SEEDS[:2], SAMPLED | SELECT, 8, id="hstu-seeds-8"),
        pytest.param("sasrec", RATES, FULL, 1, id="sasrec-rates-1"),
        pytest.param("hstu", RATES, FULL | SELECT, 2, id="hstu-rates-2", marks=SLOW),
        pytest.param("sasrec", SEEDS, SAMPLED | {"mesh__data": 8}, 8, id="sasrec-seeds-8-of-8", marks=SLOW),
        pytest.param("hstu", SEEDS, SAMPLED | {"mesh__accumulate": 2}, 1, id="hstu-seeds-1-in-parts", marks=SLOW),
    ],
)
def test_a_packed_run_is_the_run_alone(model, members, changes, devices, log, tmp_path):
    """Losses, evaluations, the selected step and the counts, from one program against a program each."""
    configs = cells(model, log, members, tmp_path / "pack", **changes)
    found = train_pack.train_pack(configs, devices=jax.devices()[:devices])
    count = len(members)
    assert [found[path]["status"] for path in configs] == ["ok"] * count
    assert found[tmp_path / "pack" / "0"]["pack"] == {"members": count, "devices": min(devices, count)}
    for path, config in configs.items():
        train(config, tmp_path / "alone" / path.name)
    assert_same_runs(tmp_path / "pack", tmp_path / "alone", count)


def test_a_run_that_diverges_disturbs_no_other(log, tmp_path):
    members = ({"seed": 0}, {"seed": 1, "optim__learning_rate": 1e30}, {"seed": 2})
    configs = cells("hstu", log, members, tmp_path / "pack", optim__warmup=0, **FULL)
    found = train_pack.train_pack(configs, devices=jax.devices()[:1])
    assert [book["status"] for book in found.values()] == ["ok", "diverged", "ok"]
    ruined = tmp_path / "pack" / "1"
    assert (ruined / "DONE").read_text() == "diverged\n"
    for line in (ruined / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for path, config in configs.items():
        train(config, tmp_path / "alone" / path.name)
    other = record.read(tmp_path / "alone" / "1")
    assert [found[ruined][key] for key in ("reason", "stopped_at")] == [other[key] for key in ("reason", "stopped_at")]
    np.testing.assert_allclose(
        list(losses(tmp_path / "pack" / "2").values()), list(losses(tmp_path / "alone" / "2").values()), rtol=1e-5
    )


def dies_after(monkeypatch, steps: int) -> None:
    """The process ends in the step after `steps` more steps."""
    step, calls = Population.step, []

    def dies(self, *arguments):
        calls.append(None)
        if len(calls) > steps:
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(Population, "step", dies)


def arrays(folder: Path, config: ConfigDict) -> list[np.ndarray]:
    with Checkpoints(folder, keep=1) as checkpoints:
        step = checkpoints.latest()
        assert step is not None
        return [np.asarray(x) for x in jax.tree.leaves(checkpoints.restore(step, init_state(build(config))))]


def packed(configs, **arguments):
    return train_pack.train_pack(configs, devices=jax.devices()[:1], **arguments)


def assert_same_bits(one: Path, other: Path, config: ConfigDict) -> None:
    for mine, theirs in zip(arrays(one / "checkpoints", config), arrays(other / "checkpoints", config), strict=True):
        assert mine.tobytes() == theirs.tobytes()


@pytest.fixture(scope="module")
def unbroken(log, tmp_path_factory) -> Path:
    """The folder of a pack of three seeds that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    packed(cells("hstu", log, SEEDS, folder, **SAMPLED, **SELECT))
    return folder


def test_a_killed_pack_goes_on_together_and_each_of_its_runs_alone(log, tmp_path, monkeypatch, unbroken, capsys):
    """Resumed, it is the unbroken pack to the bit, but for the run that went on alone in between."""
    configs = cells("hstu", log, SEEDS, tmp_path, **SAMPLED, **SELECT)
    with monkeypatch.context() as patch:
        dies_after(patch, 8)
        with pytest.raises(Killed):
            packed(configs)
    assert not list(tmp_path.glob("*/DONE"))
    train(configs[tmp_path / "2"], tmp_path / "2")
    found = packed(configs)
    assert f"{tmp_path / '2'}: finished before (ok)" in capsys.readouterr().err
    assert found[tmp_path / "0"]["pack"]["members"] == 2
    assert_same_runs(tmp_path, unbroken)
    for i in (0, 1):
        assert_same_bits(tmp_path / str(i), unbroken / str(i), configs[tmp_path / str(i)])
    assert [row["step"] for row in read_events(tmp_path / "0") if row["event"] == "ready"] == [0, 6]


@SLOW
def test_a_run_that_began_alone_goes_on_in_a_pack(log, tmp_path, monkeypatch, unbroken):
    """Member 1 is 8 steps ahead of the others."""
    configs = cells("hstu", log, SEEDS, tmp_path, **SAMPLED, **SELECT)
    place, calls = train_alone.place_batch, []

    def dies_at_step_9(mesh, batch):
        calls.append(None)
        if len(calls) == 9:
            raise Killed
        return place(mesh, batch)

    monkeypatch.setattr(train_alone, "place_batch", dies_at_step_9)
    with pytest.raises(Killed):
        train(configs[tmp_path / "1"], tmp_path / "1")
    packed(configs)
    assert [row["step"] for row in read_events(tmp_path / "1") if row["event"] == "ready"] == [0, 6]
    assert_same_runs(tmp_path, unbroken)


def told_after(monkeypatch, owner, name: str, count: int) -> None:
    """SIGTERM arrives within a call of owner.name, after `count` more."""
    function, calls = getattr(owner, name), []

    def called(*arguments, **more):
        calls.append(None)
        if len(calls) == count + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **more)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(
    ("owner", "name", "count", "steps"),
    [
        pytest.param(Population, "step", 7, {8}, id="in a step", marks=SLOW),
        pytest.param(training, "evaluate_split", 4, {10}, id="in an evaluation"),
        pytest.param(training, "evaluate_split", 7, {14}, id="in the final evaluation", marks=SLOW),
    ],
)
def test_told_to_stop_every_run_is_saved_at_its_step(owner, name, count, steps, log, tmp_path, monkeypatch, unbroken):
    configs = cells("hstu", log, SEEDS, tmp_path, **SAMPLED, **SELECT)
    with monkeypatch.context() as patch:
        told_after(patch, owner, name, count)
        with pytest.raises(Preempted):
            packed(configs)
    left = [path for path in configs if not (path / "DONE").exists()]
    assert {int(max((path / "checkpoints").iterdir(), key=lambda p: int(p.name)).name) for path in left} == steps
    for path in left:
        assert [row["step"] for row in read_events(path) if row["event"] == "preempted"] == list(steps)
        assert not (path / "lease").exists() and not (path / "FAILED").exists()
    packed(configs)
    assert_same_runs(tmp_path, unbroken, rtol=0)


def test_one_run_that_cannot_train_stops_no_other(log, tmp_path, monkeypatch, capsys):
    """One folder is held by another worker, one belongs to another config: exit 75 for the former alone."""
    short = {"train__epochs": 0.2} | SAMPLED
    configs = cells("hstu", log, (*SEEDS, {"seed": 9}), tmp_path, **short)
    other = cells("hstu", log, ({"seed": 7},), tmp_path / "x", **short)
    packed(other)
    (tmp_path / "x" / "0").rename(tmp_path / "3")
    assert run_main(configs, monkeypatch, held=tmp_path / "1") == 1
    errors = capsys.readouterr().err
    assert (
        f"{tmp_path / '3'}: error: " in errors and "another config" in errors and f"{tmp_path / '1'}: error: " in errors
    )
    assert [(path / "DONE").exists() for path in configs] == [True, False, True, True]
    assert not any((tmp_path / name / "FAILED").exists() for name in "13")  # these folders are another's
    del configs[tmp_path / "3"]
    assert run_main(configs, monkeypatch, held=tmp_path / "1") == EXIT_HELD
    assert run_main(configs, monkeypatch) == 0
    assert {record.read(path)["status"] for path in configs} == {"ok"}


def run_main(configs, monkeypatch, held: Path | None = None) -> int:
    """main() of a command line that means these configs, while another worker may be on a folder."""
    with monkeypatch.context() as patch:
        patch.setattr(train_pack, "parse", lambda _: (configs, ""))
        if held is None:
            return train_pack.main([])
        with Lease.take(held):
            return train_pack.main([])


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_the_command_line_is_that_of_each_run(tmp_path, capsys):
    config = "--config=configs/hstu_planted.py"
    words = [config, "--workdir=a", "--config.seed=3", config, "--workdir=b", "--config.optim.learning_rate=0.5"]
    configs, mirrors = train_pack.parse(words)
    assert [(str(path), c.seed, c.optim.learning_rate) for path, c in configs.items()] == [
        ("a", 3, 3e-3),
        ("b", 0, 0.5),
    ]
    assert mirrors == ""
    for wrong, message in (
        ([], "expected --config=C1 --workdir=R1"),
        (["x", config, "--workdir=a"], "expected --config=C1 --workdir=R1"),
        ([config], "both of them"),
        ([config, "--workdir=a", config, "--workdir=a"], "--workdir=a is there twice"),
        ([config, "--workdir=a", config, "--workdir=b", "--mirror=wandb"], "the same for all"),
        ([config, "--workdir=a", "--config.modle.width=3"], "modle"),
        ([config, "--workdir=a", "--wordkir=b"], "wordkir"),
        (["--config=nothing.py", "--workdir=a"], "nothing.py"),
        ([config, "--workdir=a", config, "--workdir=b", "--config.model.width=64"], "model.width (32, 64)"),
    ):
        assert train_pack.main(wrong) == 1, wrong
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
