"""The report says what the study found, holds everything it shows, and survives studies that went wrong."""

import csv
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from recscale.scaling import report, report_tables
from recscale.scaling.answers import headline
from recscale.scaling.collect import Records, collect
from recscale.scaling.law_file import load_law
from tests.scaling import passing_study, reported_study
from tests.scaling import synthetic_study as star

EXCLUDED = [("grid-99-s0", "diverged", "loss is <nan> & at step 41")]
DIAGNOSTICS = 13


def texts(folder):
    return (folder / "report.html").read_text(), json.loads((folder / "laws.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "made_up <study>"
    study = reported_study.write(folder, excluded=EXCLUDED)
    report.write(study, out=folder / "out", draws=500, switches=[("a <switch>", "On is better.")])
    return *texts(folder / "out"), folder / "out"


def test_the_answer_is_on_top(written):
    html, document, _ = written
    assert document["headline"].startswith("A fit is certified for the one group.")
    order = [
        html.index(f'id="{name}"') for name in ("next", "laws", "held-out", "figures", "checklist", "noise", "runs")
    ]
    assert order == sorted(order) and html.index('id="excluded"') > order[-1]
    assert html.index("Scale next") < html.index("Best mix for 4 times") < html.index("Next runs to train") < order[1]
    (gain,) = document["groups"][0]["gain_per_doubling"]
    truth = passing_study.loss(reported_study.SIZES[-1], 1.0) - passing_study.loss(2 * reported_study.SIZES[-1], 1.0)
    assert gain["axis"] == "encoder" and gain["interval"][0] < truth < gain["interval"][1]
    assert gain["cost_factor"] == pytest.approx(2.0, rel=1e-6)
    assert "On is better." in html and "a &lt;switch&gt;" in html


def test_every_diagnostic_is_drawn_or_says_what_is_missing(written):
    html, _, folder = written
    sections = re.findall(r'<section class="figure[^"]*" id="figure-([^"]*)">(.*?)</section>', html, re.S)
    assert len(sections) == DIAGNOSTICS
    drawn = {name for name, body in sections if "<svg" in body}
    absent = {name: re.search(r'class="absent">(.*?)<', body).group(1) for name, body in sections if name not in drawn}
    assert set(absent) == {"all-isoflop", "all-contours"} and all(
        text.startswith("Not drawn") for text in absent.values()
    )
    for name in drawn:
        assert {path.suffix for path in (folder / "figures").glob(f"{name}.*")} == {".png", ".pdf", ".csv"}
    for body in (body for name, body in sections if name in drawn):
        assert "study.yaml" in body, "the hash of the plan stamps every figure"


def test_the_page_needs_nothing_from_outside(written):
    html, _, _ = written
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert "@import" not in html and "url(" not in html and "http" not in html


def test_links_lead_to_rows_of_runs(written):
    html, _, _ = written
    targets = set(re.findall(r'href="#([^"]*)"', html))
    assert len(targets) > 10 and targets <= set(re.findall(r'id="([^"]*)"', html))


def test_text_is_escaped_and_nothing_is_nan(written):
    html, document, folder = written
    assert "grid-7 &lt;b&gt;&amp;&#34;odd&#34;" in html and "<b>&" not in html
    assert "loss is &lt;nan&gt; &amp; at step 41" in html and "limit &lt;1&gt; 3.1000" in html
    shown = re.sub(r"<script.*?</script>|<style.*?</style>|loss is &lt;nan&gt;", "", html, flags=re.S)
    assert not re.search(r"\bnan\b|\bNaN\b|\binf\b|\bNone\b(?!\.)", shown)
    assert "NaN" not in json.dumps(document) and "Infinity" not in json.dumps(document)
    for path in (folder / "figures").glob("*.csv"):
        assert not re.search(r"\b(nan|inf)\b", path.read_text()), path.name
    facts = json.loads(re.search(r'id="run-facts">(.*?)</script>', html, re.S).group(1))
    assert any(fact["run"].startswith(reported_study.ODD_NAME) for fact in facts)


def test_the_law_file_is_read_back(written):
    _, document, folder = written
    law = load_law(folder / "laws" / "all.json")
    told = document["groups"][0]["laws"][0]
    assert law.form == "pow_floor" and law.certified and law.params == told["params"]
    np.testing.assert_array_equal(law.draws_SP, told["draws"])
    assert document["study_sha256"] and len(document["runs_sha256"]) == 64
    assert law.intervals["alpha"][0] < 0.35 < law.intervals["alpha"][1]


def test_runs_and_exclusions_are_all_there(written):
    html, document, folder = written
    with (folder / "runs.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(reported_study.rows()) == html.count('<tr id="run-')
    assert "grid-99-s0" in html and "grid-99-s0" in (folder / "excluded.csv").read_text()
    assert [run["status"] for run in document["excluded"]] == ["diverged"]
    for part in ("fitted", "held out", "sweep"):
        assert re.search(f"<td[^>]*>{part}</td>", html)
    assert "degrees of freedom" in html and document["study_sha256"] in html


def test_held_out_runs_are_tested(written):
    html, document, _ = written
    assert "2 runs, up to 0.62 decades beyond" in document["groups"][0]["held_out"]
    assert len(re.findall(r"<td[^>]*>(?:inside|outside)</td>", html)) == 2


def test_findings_come_blocking_first(written):
    html, document, _ = written
    marks = re.findall(r"<td[^>]*>(BLOCKS|UNKNOWN|warns|unknown|ok)</td>", html)
    rank = ["BLOCKS", "UNKNOWN", "warns", "unknown", "ok"]
    assert marks == sorted(marks, key=rank.index) and len(marks) == len(document["checklist"]) >= 20


def test_tables_as_markdown_and_latex(written):
    _, _, folder = written
    markdown, tex = (folder / "tables.md").read_text(), (folder / "tables.tex").read_text()
    for title in ("Next doubling of each axis", "Laws", "Held-out runs", "Checklist", "Seed noise"):
        assert f"### {title}" in markdown and f"\\caption{{{title}." in tex
    widths = [line.count(" | ") for line in markdown.split("### Laws")[1].split("\n\n")[1].splitlines()]
    assert len(set(widths)) == 1, "every row of the table has as many cells"
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 5
    body = re.sub(r"\\[&%$#_{}]|\\text[a-z]+\{\}|\$\\[A-Za-z]+\$", "", "\n".join(tex.splitlines()[1:]))
    assert not re.search(r"[%#_^~<>]", body), "special characters are escaped"


def test_cells_of_a_table_cannot_break_out():
    table = report_tables.Table("T", ("a|b", "c"), (("x|y\nz", "5 % & <1>_2"),), numeric=(1,))
    assert r"x\|y<br>z" in table.markdown() and r"5 \% \& \textless{}1\textgreater{}\_2" in table.tex()


def empty(folder):
    return reported_study.write(folder, found=[])


def one_run(folder):
    return reported_study.write(folder, found=reported_study.rows()[:1])


def diverged(folder):
    return reported_study.write(folder, found=[], excluded=EXCLUDED)


def few(folder):
    return reported_study.write(folder, found=reported_study.rows()[3:8])


def no_evaluation(folder):
    bare = [{k: v for k, v in row.items() if not k.startswith("eval.")} for row in reported_study.rows()[:3]]
    return reported_study.write(folder, found=bare)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (empty, "No finished run"),
        (one_run, "No law is certified"),
        (diverged, "loss is &lt;nan&gt; &amp; at step 41"),
        (few, "needs 9"),
        (no_evaluation, "no eval.test.all.nats"),
    ],
)
def test_a_study_that_went_wrong_gives_a_page_that_says_so(tmp_path, monkeypatch, make, said):
    monkeypatch.setattr(report, "write_files", lambda diagram, folder, stamp: None)
    study = make(tmp_path / "poor")
    path = report.write(study, out=tmp_path / "out", draws=200)
    html, document = texts(path.parent)
    assert said in html and document["headline"].startswith("No law is certified")
    assert not re.search(r"\bnan\b(?!&gt;)", re.sub(r"<(script|style).*?</\1>", "", html, flags=re.S))
    assert html.index("No law is certified") < html.index('id="laws"')
    for group in document["groups"]:
        assert group["gain_per_doubling"] == [] and group["next_runs"] == [], "nothing is answered without a law"


def test_no_folder_of_runs_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = reported_study.write(tmp_path / "fresh")
    for path in (study / "results").iterdir():
        path.unlink()
    assert "No finished run" in report.write(study, out=tmp_path / "out").read_text()
    assert report.main([str(study), "--runs", str(tmp_path / "nowhere")]) == 2


def test_goodput_is_told_where_the_runs_tell_what_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_files", lambda diagram, folder, stamp: None)
    study = reported_study.write(tmp_path / "fresh", found=[])
    (tmp_path / "runs" / "grid-0").mkdir(parents=True)
    assert "<li>goodput" not in report.write(study, runs=tmp_path / "runs", out=tmp_path / "out").read_text()
    for run, seconds in (("grid-0", 40.0), ("grid-1", 80.0)):
        clocks = [("ready", 10.0, 0), ("compiled", 20.0, 1), ("alive", 20.0 + seconds, 9)]
        rows = [{"event": e, "wall": 1e9 + c, "clock": c, "attempt": 0, "step": s} for e, c, s in clocks]
        (tmp_path / "runs" / run).mkdir(exist_ok=True)
        (tmp_path / "runs" / run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = report.write(study, runs=tmp_path / "runs", out=tmp_path / "out").read_text()
    told = "75.0% of 2.7 min trained; start-up 12.5%, compilation 12.5%, 2 attempts"
    assert f"<li>goodput: 2 runs: {told}</li>" in html


def test_bad_plan_is_one_clear_line(tmp_path, capsys):
    study = reported_study.write(tmp_path / "bad", plan=reported_study.PLAN.replace("falls", "sinks"))
    assert report.main([str(study)]) == 2
    assert re.fullmatch(r"error: .*study\.yaml: direction: .*\n", capsys.readouterr().err)


def test_a_frozen_table_is_left_as_it_is(tmp_path):
    table = tmp_path / "runs.csv"
    table.write_bytes(b"run_id,empty\na,\n")
    report._tables(tmp_path, Records([{"run_id": "a"}], []), table)
    assert table.read_bytes() == b"run_id,empty\na,\n" and not (tmp_path / "excluded.csv").exists()
    (tmp_path / "excluded.csv").write_text("run,status,reason\n")
    (tmp_path / "out").mkdir()
    report._tables(tmp_path / "out", Records([{"run_id": "a"}], []), table)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["excluded.csv", "runs.csv"]


@pytest.mark.parametrize("content", ['{"a', "[1]", '{"history": "all"}'])
def test_known_limits_that_cannot_be_read_name_their_file(tmp_path, content):
    (tmp_path / report.FLOORS).write_text(content)
    with pytest.raises(ValueError, match=r"floors\.json: expected an object of NAME: NUMBER"):
        report._floors(str(tmp_path))


def test_groups_get_their_own_laws_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_files", lambda diagram, folder, stamp: None)
    found = [
        row | {"run_id": f"{model}-{row['run_id']}", "model_name": model}
        for model in ("a model", "b")
        for row in reported_study.rows()[:4]
    ]
    study = reported_study.write(
        tmp_path / "two",
        found,
        plan=reported_study.PLAN.replace("group: []", "group: [model_name]").replace("[pow_floor, log]", "[log]"),
    )
    path = report.write(study, out=tmp_path / "out", draws=200, jobs=1)
    html, document = texts(path.parent)
    assert [group["name"] for group in document["groups"]] == ["model_name=a model", "model_name=b"]
    assert sorted(path.name for path in (tmp_path / "out" / "laws").iterdir()) == ["a-model.json", "b.json"]
    assert "figure-a-model-residuals" in html and "figure-b-residuals" in html


CUT_PLAN = """\
question: Where should the next GPU-hour go?
metric: eval.test.all.nats
metric_unit: nats/event
direction: falls
paired: true
group: []
axes:
  users: {column: cell.coordinates.users, label: training data, unit: users, levels: [1000, 64000]}
main_axis: flops.train_total
cost: {column: flops.train_total, unit: train FLOPs}
cuts:
  - {name: users, x: cell.coordinates.users, label: training data, unit: users, cells: [base, users], floor: planted}
  - {name: width, x: cell.coordinates.width, label: encoder width, unit: channels, cells: [base, width], end: no wider}
forms: [log]
delta: seed
held_out: null
learning_rate_sweep: null
exclude: []
"""


def test_cuts_of_a_star_from_run_folders(tmp_path):
    study = reported_study.write(tmp_path / "star", found=[], plan=CUT_PLAN)
    runs = star.write_study(tmp_path / "runs")
    (runs / "floors.json").write_text(json.dumps({"planted": star.FLOOR}))
    path = report.write(study, runs=runs, draws=300)
    html, document = texts(path.parent)
    assert path.parent == runs, "the page lies with the runs"
    users, width = document["axes"]
    assert re.match(
        r"Doubling from 64k to 128k users lowers test nats by 0\.0\d+ nats/event \(90 % 0\.0", users["answer"]
    )
    assert "no wider" in width["answer"] and users["known_floor"] == star.FLOOR
    assert document["axes_ordering"].startswith("By gain per doubling: training data")
    assert "known floor 3.1" in html and (runs / "figures" / "cut_users.pdf").exists()
    assert {run.run for run in collect(runs).excluded} == {run["run"] for run in document["excluded"]}


def test_the_headline_names_what_blocks():
    assert headline([], [1]).startswith("No law is certified: the study has no finished run")


@pytest.mark.slow
def test_a_surface_of_two_axes_has_contours_and_a_frontier(tmp_path):
    study = reported_study.write(tmp_path / "surface", passing_study.rows(), plan=passing_study.PLAN)
    path = report.write(study, out=tmp_path / "out", draws=500)
    html, document = texts(path.parent)
    absent = re.findall(r'class="absent">', html)
    assert len(absent) == 2, "no isoFLOP budgets, and no second metric"
    contours = re.search(r'id="figure-all-contours">(.*?)</section>', html, re.S).group(1)
    assert "frontier" in contours and contours.count('href="#run-') == 44
    ET.fromstring(re.search(r"<svg viewBox.*?</svg>(?=<div)", contours, re.S).group(0))
    assert document["groups"][0]["quoted_form"] == "additive"
