"""The report of a study: one self-contained page, its figures as PNG, PDF and CSV, the laws as JSON, the tables.

    python -m recscale.scaling.report experiments/0001_four_axes_planted [--runs DIR] [--out DIR]

Writes OUT/report.html, figures/, laws.json, laws/GROUP.json (read back by law_file.py `load_law`), runs.csv,
excluded.csv, tables.md and tables.tex. OUT: the folder of the runs, or STUDY/results where a frozen table is read.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recscale.scaling.answers import Answer, answer
from recscale.scaling.check import run_checks
from recscale.scaling.collect import Records, write_csv
from recscale.scaling.cut_answers import cut_answer, cut_json, ordering
from recscale.scaling.figure_files import write_files
from recscale.scaling.figures import Diagram
from recscale.scaling.figures_axes import cut_diagram, gain_per_doubling, loss_by_axis
from recscale.scaling.figures_checks import profiles, residuals, rollouts, tornado
from recscale.scaling.figures_runs import Curves, collapse, curves_of, learning_rates, metric_against_loss
from recscale.scaling.figures_surface import contours, curve_envelope, frontier_sizes, isoflop_profiles
from recscale.scaling.findings import Finding
from recscale.scaling.law_file import as_json, save_law, without_nan
from recscale.scaling.laws import AxisLaw, axis_law
from recscale.scaling.report_page import Content, headline_of, page, tables_of
from recscale.scaling.report_tables import files
from recscale.scaling.study import Group, Tables, axis_specs, read_runs, rows_of
from recscale.scaling.study_file import StudySpec, read_spec

SCHEMA_VERSION = 2
DRAWS = 500
FLOORS = "floors.json"


def write(
    study: str | Path,
    *,
    runs: str | Path | None = None,
    out: str | Path | None = None,
    floors: Mapping[str, float] | None = None,
    switches: Sequence[tuple[str, str]] = (),
    draws: int = DRAWS,
    jobs: int | None = None,
) -> Path:
    """Writes the report of a study and returns the path of its page.

    study: the folder with study.yaml; runs: a folder of records or a flat table (default: see study.py `read_runs`);
    floors: known limits, name -> value in the unit of the metric (default: floors.json beside the runs); switches:
    (label, sentence) of what is on or off and so has no doubling; jobs: processes, one group each (default: the cores).
    A study without usable runs gives a page that says so. Raises FileNotFoundError and ValueError for a bad plan.
    """
    spec = read_spec(study)
    records, source = _runs(spec, runs)
    folder = Path(out) if out is not None else _default_out(spec, source)
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(floors) if floors is not None else _floors(source)
    tables = rows_of(spec, records, source)
    curves, curve_source = curves_of(spec, records.rows, source)
    tasks = [
        Task(
            spec, group, {str(r["run_id"]): curves[str(r["run_id"])] for r in group.rows if str(r["run_id"]) in curves}
        )
        for group in tables.groups
    ]
    tasks = [dataclasses.replace(task, curve_source=curve_source, folder=folder, draws=draws) for task in tasks]
    drawn = _all(tasks, jobs)
    answers = [found for found, _ in drawn]
    cuts = _cuts(spec, tables, known, draws)
    findings = run_checks(spec, tables, {found.group.name: found.evidence for found in answers})
    shared = [gain_per_doubling(spec, answers, cuts), *(cut_diagram(law) for law in cuts)]
    for diagram in shared:
        write_files(diagram, folder / "figures", stamp(spec))
    content = Content(
        spec, tables, records, answers, cuts, findings, known, switches, shared, [figures for _, figures in drawn]
    )
    _tables(folder, records, Path(source))
    _laws(folder, content, hashlib.sha256((folder / "runs.csv").read_bytes()).hexdigest())
    markdown, tex = files(tables_of(content), stamp(spec))
    (folder / "tables.md").write_text(markdown)
    (folder / "tables.tex").write_text(tex)
    path = folder / "report.html"
    path.write_text(page(content, stamp(spec)))
    return path


def _tables(folder: Path, records: Records, source: Path) -> None:
    """runs.csv and excluded.csv. A frozen table that is read is not written over, and one that tells of no excluded
    runs gets no empty list of them, which would say that there were none."""
    if source.resolve() != (folder / "runs.csv").resolve():
        write_csv(records.rows, folder / "runs.csv")
    excluded = [{"run": run.run, "status": run.status, "reason": run.reason} for run in records.excluded]
    if excluded or not source.is_file() or source.with_name("excluded.csv").exists():
        write_csv(excluded, folder / "excluded.csv")


def stamp(spec: StudySpec) -> str:
    """What stands at the foot of every figure: the study and the hash of its plan."""
    return f"{spec.name} · study.yaml {spec.sha256[:12]}"


def _runs(spec: StudySpec, runs: str | Path | None) -> tuple[Records, str]:
    """The runs of a study; a folder that is not there yet holds none, a named one must exist."""
    try:
        return read_runs(spec.path.parent, runs)
    except FileNotFoundError:
        if runs is not None:
            raise
        return Records([], []), ""


def _default_out(spec: StudySpec, source: str) -> Path:
    return Path(source) if source and Path(source).is_dir() else spec.path.parent / "results"


def _floors(source: str) -> dict[str, float]:
    """Known limits: floors.json in the folder of the runs, or beside their table."""
    if not source:
        return {}
    path = Path(source) / FLOORS if Path(source).is_dir() else Path(source).with_name(FLOORS)
    if not path.is_file():
        return {}
    try:
        return {name: float(value) for name, value in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected an object of NAME: NUMBER ({error})") from error


def _cuts(spec: StudySpec, tables: Tables, known: Mapping[str, float], draws: int) -> list[AxisLaw]:
    """The one-axis laws of every group; a floor that is not known is none."""
    cuts = [
        dataclasses.replace(cut, floor=None) if isinstance(cut.floor, str) and cut.floor not in known else cut
        for cut in spec.cuts
    ]
    found = []
    for group in tables.groups:
        for entry in axis_specs(dataclasses.replace(spec, cuts=tuple(cuts)), known):
            if len(tables.groups) > 1:
                changes = {"name": f"{slug(group.name)}-{entry.name}", "label": f"{group.name}: {entry.label}"}
                entry = dataclasses.replace(entry, **changes)
            found.append(axis_law(group.fitted_rows, entry, draws=draws))
    return found


@dataclasses.dataclass(frozen=True)
class Task:
    """One group to fit and draw."""

    spec: StudySpec
    group: Group
    curves: Curves
    curve_source: str = ""
    folder: Path = Path()
    draws: int = DRAWS


def _all(tasks: Sequence[Task], jobs: int | None) -> list[tuple[Answer, list[Diagram]]]:
    """Every group, in parallel processes where there are several."""
    workers = min(jobs or os.cpu_count() or 1, len(tasks))
    if workers < 2:
        return [draw_group(task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(draw_group, tasks))


def draw_group(task: Task) -> tuple[Answer, list[Diagram]]:
    """Fits a group, draws the diagnostics that are its own and writes them; named after group and figure."""
    spec = task.spec
    found = answer(spec, task.group, draws=task.draws)
    diagrams = [
        isoflop_profiles(spec, found),
        curve_envelope(spec, found, task.curves, task.curve_source),
        contours(spec, found),
        loss_by_axis(spec, found),
        frontier_sizes(spec, found),
        residuals(spec, found),
        rollouts(spec, found),
        profiles(spec, found),
        tornado(spec, found),
        learning_rates(spec, found),
        collapse(spec, found, task.curves, task.curve_source),
        metric_against_loss(spec, found),
    ]
    where = slug(task.group.name)
    named = [
        dataclasses.replace(diagram, name=f"{where}-{diagram.name}", title=f"{number}. {diagram.title}")
        for number, diagram in enumerate(diagrams, 1)
    ]
    for diagram in named:
        titled = (
            diagram
            if task.group.name == "all"
            else dataclasses.replace(diagram, title=f"{diagram.title} ({task.group.name})")
        )
        write_files(titled, task.folder / "figures", stamp(spec))
    return found, named


def slug(name: str) -> str:
    """A group's name as part of a file name: "data=ml1m, model=hstu" -> "ml1m-hstu"."""
    values = [part.split("=", 1)[-1] for part in name.split(", ")]
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(values)).strip("-.") or "group"


def _laws(folder: Path, content: Content, runs_sha256: str) -> None:
    """laws.json with everything, laws/GROUP.json with the law of each group: quoted, else the first, refused."""
    groups = [_group_json(content.spec, found) for found in content.answers]
    document = {
        "schema_version": SCHEMA_VERSION,
        "study": content.spec.name,
        "study_sha256": content.spec.sha256,
        "question": content.spec.question,
        "metric": content.spec.metric,
        "metric_unit": content.spec.metric_unit,
        "runs_sha256": runs_sha256,
        "headline": headline_of(content),
        "groups": groups,
        "axes": [cut_json(law) for law in content.cuts],
        "axes_answers": [cut_answer(law) for law in content.cuts],
        "axes_ordering": ordering(content.cuts) if content.cuts else "",
        "floors": dict(content.floors),
        "checklist": [_finding_json(finding) for finding in content.findings],
        "excluded": [
            {"run": run.run, "status": run.status, "reason": run.reason} for run in content.tables.every_excluded
        ],
    }
    (folder / "laws.json").write_text(json.dumps(without_nan(document), allow_nan=False) + "\n")
    for found in content.answers:
        if found.law is not None:
            save_law(found.law, folder / "laws" / f"{slug(found.group.name)}.json")


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {"mark": finding.mark} | dataclasses.asdict(finding)


def _group_json(spec: StudySpec, found: Answer) -> dict[str, Any]:
    comparison, test = found.evidence.comparison, found.evidence.held_out
    return {
        "name": found.group.name,
        "runs": len(found.group.fitted_rows),
        "held_out_runs": len(found.group.held_out_rows),
        "quoted_form": found.law.form if found.law is not None and found.quoted else None,
        "indistinguishable": list(comparison.near) if comparison else [],
        "judgement": comparison.text if comparison else "",
        "problem": found.problem,
        "gain_per_doubling": [
            {
                "axis": entry.axis.name,
                "from": entry.size,
                "value": entry.gain.value,
                "interval": [entry.gain.low, entry.gain.high],
                "cost_factor": entry.factor,
            }
            for entry in found.doubled
        ],
        "cost": None if found.cost is None else {"unit": spec.cost.unit, "exponents": found.cost.exponents},
        "next_runs": [dataclasses.asdict(point) for point in found.next_runs],
        "held_out": test.text() if test is not None else None,
        "laws": [as_json(law) for law in comparison.laws] if comparison else [],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("recscale.scaling.report", description=__doc__.splitlines()[0])
    parser.add_argument("study", help="the folder of a study, with study.yaml")
    parser.add_argument("--runs", help="a folder of run records, or a flat table (default: results/, then runs/NAME)")
    parser.add_argument("--out", help="where to write (default: the folder of the runs, or STUDY/results)")
    parser.add_argument("--draws", type=int, default=DRAWS, help="bootstrap draws of the laws")
    parser.add_argument("--jobs", type=int, help="processes (default: the cores)")
    args = parser.parse_args(arguments)
    try:
        path = write(args.study, runs=args.runs, out=args.out, draws=args.draws, jobs=args.jobs)
    except (ValueError, OSError) as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
