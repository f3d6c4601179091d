"""A trained run sampled otherwise: the same again where nothing is changed, and what is changed is what it costs."""

import csv
import json

import numpy as np
import pytest

from recscale import resample
from recscale.evaluate_denoised import LEGACY
from recscale.metrics import NonFiniteScore
from recscale.train import train
from tests.tiny_run import make_log, tiny_dreamrec

TWICE = {"eval__final": ("val", "test"), "eval__protocols": ("full", "unseen", LEGACY)}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("resample") / "log", users=100)


@pytest.fixture(scope="module")
def workdir(log, tmp_path_factory):
    """A run whose selected checkpoint is not its last."""
    folder = tmp_path_factory.mktemp("resample") / "run"
    train(tiny_dreamrec(log, train__eval_every=10, train__select="nats max", train__epochs=1.0, **TWICE), folder)
    return folder


@pytest.fixture(scope="module")
def opened(workdir):
    return resample.opened(workdir)


def values(rows, metric, part="value"):
    return {row["slice"]: row[part] for row in rows if row["metric"] == metric}


def test_unchanged_settings_give_the_rows_of_the_record(workdir, opened):
    book = json.loads((workdir / "record.json").read_text())
    assert book["selected_step"] == opened.step < book["stopped_at"]
    names = ("step", "split", "slice", "metric", "value", "stderr", "n")
    for split in ("val", "test"):
        recorded = [{name: row[name] for name in names} for row in book["evaluations"] if row["split"] == split]
        rows = resample.evaluate_with(opened, split, {})
        assert [{name: row[name] for name in names} for row in rows] == recorded
    assert rows[0]["denoiser_calls"] == book["sampling"]["denoiser_calls"] == 2 * 6
    assert rows[0]["sampling_flops"] == book["sampling"]["flops_per_target"]
    assert rows[0]["inference_flops"] == book["inference"]["total"]


def test_other_settings_change_what_is_found_and_what_it_costs(opened):
    several = [{}, {"sampler": "ddim", "sampling_steps": 2}, {"guidance": 0, "samples": 3}]
    same, few, more = resample.curve(opened, "test", several)
    assert len({tuple(values(rows, "nats").values()) for rows in (same, few, more)}) == 3
    assert [rows[0]["denoiser_calls"] for rows in (same, few, more)] == [12, 4, 6]
    remembered, each = 2 * 8**2, 2 * 8**2
    drawn = [samples * (remembered + passes * each) for samples, passes in ((1, 12), (1, 4), (3, 6))]
    assert [rows[0]["sampling_flops"] for rows in (same, few, more)] == drawn
    rest = [rows[0]["inference_flops"] - rows[0]["sampling_flops"] for rows in (same, few, more)]
    assert rest[0] == rest[1] == rest[2] > 2 * 8 * 63
    assert few[0]["sampling_steps"] == 2 and "sampling_steps" not in same[0]
    assert values(more, "spread")["all"] > 0 and not values(same, "spread")
    assert values(same, f"hr@5/{LEGACY}") and not values(few, f"hr@5/{LEGACY}")  # it walks the whole chain
    assert values(few, "hr@5/unseen") and values(few, "coverage@5")


def test_some_of_the_targets_are_ranked_as_all_are(opened):
    """The limit changes which targets count, nothing else."""
    every, some = (resample.evaluate_with(opened, "test", {}, targets=n) for n in (0, 17))
    assert values(some, "hr@5", "n")["all"] == 17 and values(every, "hr@5", "n")["all"] == 100
    one, again = (resample._limited(opened.run, "test", n).views["test"] for n in (17, 17))
    assert np.array_equal(one.target_start, again.target_start)
    assert set(one.target_start) <= set(opened.run.views["test"].target_start)
    assert resample._limited(opened.run, "test", 1000) is opened.run


def test_a_metric_follows_from_temperature_alone_where_it_should(opened):
    cold, warm = resample.curve(opened, "test", [{"temperature": 1.0}, {"temperature": 8.0}], targets=20)
    assert values(cold, "ndcg@5") == values(warm, "ndcg@5")
    assert values(cold, "nats")["all"] != values(warm, "nats")["all"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": "dit"}, "'denoiser' cannot be changed after training; what can: sampler, sampling_steps"),
        ({"steps": 3}, "'steps' cannot be changed"),
        ({"sampler": "euler"}, "task.sampler = 'euler': expected one of"),
        ({"sampling_steps": 7}, "sampler steps: found 7, expected 1 to 6"),
        ({"sampling_steps": 2.5}, "task.sampling_steps = 2.5: expected a value of type int"),
        ({"guidance": float("nan")}, "task.guidance = nan: expected a value of type float"),
        ({"samples": 0}, "task.samples = 0: expected at least 1"),
        ({"eta": 0.5}, "eta = 0.5: sampler 'ddpm' has none; leave it out"),
    ],
)
def test_a_setting_that_does_not_fit_is_named_before_anything_is_evaluated(opened, changes, message):
    with pytest.raises(ValueError, match=message):
        resample.curve(opened, "test", [{}, changes])


def test_settings_under_which_sampling_overflows_are_named(opened):
    with pytest.raises(NonFiniteScore, match=r"guidance = 1e\+30: sampling gives NaN or infinite scores"):
        resample.evaluate_with(opened, "test", {"guidance": 1e30}, targets=4)


def test_a_folder_that_does_not_fit_is_named(workdir, log, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no run here"):
        resample.opened(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split 'dev': this run has train, val, test"):
        resample.evaluate_with(workdir, "dev", {})
    book = json.loads((workdir / "record.json").read_text())
    for changes, message in (
        ({"status": "running"}, r"the run is not finished \(status 'running'\)"),
        ({"config": book["config"] | {"task_name": "next_item"}}, "a run of task 'next_item'; only 'denoising'"),
        ({}, "best: no checkpoint; train first"),
    ):
        (tmp_path / "record.json").write_text(json.dumps(book | changes))
        with pytest.raises(ValueError, match=message):
            resample.opened(tmp_path)
    moved = book | {"selected_step": book["selected_step"] + 1}
    (tmp_path / "record.json").write_text(json.dumps(moved))
    (tmp_path / "best").symlink_to(workdir / "best")
    with pytest.raises(ValueError, match=r"checkpoint is of step .* put that checkpoint back"):
        resample.opened(tmp_path)


def test_the_command_writes_all_combinations_or_nothing(workdir, tmp_path, capsys):
    out = tmp_path / "curve.csv"
    common = [f"--workdir={workdir}", "--targets=10", f"--out={out}"]
    resample.main([*common, "--steps=1,3", "--sampler=ddim", "--guidance=0,2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 and lines[0].split()[:4] == ["sampler", "sampling_steps", "guidance", "denoiser_calls"]
    assert lines[1].split()[:5] == ["ddim", "1", "0", "1", "256"] and lines[-1].split()[-1] == "-"  # one sample each
    with out.open() as file:
        rows = list(csv.DictReader(file))
    cells = {(row["sampling_steps"], row["guidance"]): float(row["inference_flops"]) for row in rows}
    assert set(cells) == {("1", "0.0"), ("1", "2.0"), ("3", "0.0"), ("3", "2.0")}
    assert cells["3", "2.0"] > cells["3", "0.0"] > cells["1", "0.0"]
    out.unlink()
    with pytest.raises(SystemExit, match=r"error: .*99"):
        resample.main([*common, "--steps=1,99"])
    with pytest.raises(SystemExit, match=r"error: --out=.*no such folder"):
        resample.main([*common, f"--out={tmp_path / 'none' / 'x.csv'}"])
    assert list(tmp_path.iterdir()) == []
