"""The report says what the study found, holds everything it shows, and survives studies that went wrong."""

import json
import re

import pytest

from recscale.scaling import collect, report
from tests.scaling import synthetic_study as study


def _write(folder, records, axes=study.SPECS, title="Four axes", floors=None):
    question = "Where should the next GPU-hour go?"
    path = report.write(folder, records, axes, title=title, question=question, floors=floors, draws=500)
    return path.read_text(), json.loads((folder / "laws.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    records = collect.collect(study.write_study(folder / "runs"))
    return *_write(folder, records, title="Four <axes> & more", floors={"limit <1>": 3.1}), folder


def test_answer_per_axis_with_interval_and_cost(written):
    html, document, _ = written
    text = {axis["name"]: axis["answer"] for axis in document["axes"]}
    assert re.match(
        r"Doubling from 64k to 128k users lowers test nats by 0\.01\d+ nats/event \(90 % 0\.01", text["users"]
    )
    assert "more train FLOPs (2.00 times as many)" in text["users"] and "table bytes" in text["table_rows"]
    assert "shows no gain: flat" in text["width"]
    assert document["ordering"].startswith("By gain per doubling: training data, then embedding table, then history")
    assert "Flat where the study ends: encoder width." in document["ordering"]
    assert html.count("Doubling from") == 4


def test_page_needs_nothing_from_outside(written):
    html, _, _ = written
    assert html.count("data:image/png;base64,") == 5
    assert not re.search(r"""(src|href)=["'](?!data:)""", html) and "<script" not in html and "@import" not in html


def test_text_is_escaped(written):
    html, _, _ = written
    assert "Four &lt;axes&gt; &amp; more" in html and "limit &lt;1&gt;" in html
    assert "loss is &lt;nan&gt; &amp; at step 41" in html


def test_failures_noise_runs_and_hardware_are_listed(written):
    html, document, _ = written
    assert "width-512-s0" in html and "diverged" in html and "torn" in html
    assert [run["status"] for run in document["excluded"]] == ["unreadable", "diverged"]
    assert "4 degrees of freedom" in html and "2 x cpu" in html and "12.5" in html
    assert html.count("<td>base</td>") == 6  # three runs and the row of seed noise


def test_law_file_has_what_a_reader_needs_to_predict(written):
    _, document, folder = written
    users = document["axes"][0]
    power = next(fit for fit in users["fits"] if fit["form"] == "pow_floor")
    low, high = users["floor_interval"]
    assert low <= study.FLOOR <= high and "inside" in users["floor"] and users["quoted_form"] == "pow_floor"
    assert len(repr(power["params"]["alpha"])) >= 10 and len(power["covariance"]) == 3
    assert power["domain"] == {"users": [1000.0, 64000.0]}
    predicted = power["params"]["E"] + power["params"]["A"] * 64000 ** -power["params"]["alpha"]
    assert predicted == pytest.approx(users["points"]["y"][-1], abs=0.01)
    assert len(document["runs_sha256"]) == 64
    assert sorted(path.name for path in (folder / "figures").glob("*.csv")) == [
        "gain_per_doubling.csv",
        "history.csv",
        "table_rows.csv",
        "users.csv",
        "width.csv",
    ]


def test_empty_study(tmp_path):
    html, document = _write(tmp_path, collect.collect(tmp_path))
    assert "No finished run" in html and html.count("Nothing can be said") == 4
    assert document["axes"][0]["gain_per_doubling"] is None


def test_all_runs_failed(tmp_path):
    for x in (1000, 2000):
        entry = study.record(f"u{x}", ["users"], {**study.BASE, "users": x}, 0, 3.0, status="failed")
        study.write(tmp_path / "runs", {**entry, "reason": "out of memory"})
    html, _ = _write(tmp_path, collect.collect(tmp_path / "runs"))
    assert "No finished run" in html and html.count("out of memory") == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_axis_with_few_values(tmp_path, count):
    for x in (1000, 4000, 16000, 64000)[:count]:
        place = {**study.BASE, "users": x}
        study.write(tmp_path / "runs", study.record(f"u{x}", ["users"], place, 0, study.loss(place)))
    html, document = _write(tmp_path, collect.collect(tmp_path / "runs"), axes=study.SPECS[:1])
    users = document["axes"][0]
    if count < 3:
        assert f"{count} distinct values of training data, needs at least 3" in html and users["fits"] == []
    else:
        assert users["gain_per_doubling"]["value"] > 0
        certified = {fit["form"]: fit["certified"] for fit in users["fits"]}
        assert not certified["log"] and not certified["pow_floor"] and "needs" in html


def test_two_axes_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="users"):
        _write(tmp_path, collect.Records([], []), axes=[study.SPECS[0], study.SPECS[0]])
