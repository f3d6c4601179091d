"""The page of a report: what the template shows, gathered; one HTML file that needs nothing from outside."""

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import scipy

from recscale import events, goodput
from recscale.scaling import report_tables as tabled
from recscale.scaling.answers import Answer, allocation_sentence, headline, leading, narrowing, next_sentences
from recscale.scaling.collect import Records, Row
from recscale.scaling.cut_answers import cut_answer, cut_facts, ordering
from recscale.scaling.figure_svg import panel_html
from recscale.scaling.figures import Diagram, short_number
from recscale.scaling.findings import Finding
from recscale.scaling.laws import AxisLaw
from recscale.scaling.report_tables import Table
from recscale.scaling.study import Tables, value_of
from recscale.scaling.study_file import StudySpec

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything a report shows. shared: figures of the whole study; drawn: those of each group."""

    spec: StudySpec
    tables: Tables
    records: Records
    answers: Sequence[Answer]
    cuts: Sequence[AxisLaw]
    findings: Sequence[Finding]
    floors: Mapping[str, float]
    switches: Sequence[tuple[str, str]]
    shared: Sequence[Diagram]
    drawn: Sequence[Sequence[Diagram]]


def headline_of(content: Content) -> str:
    """The first sentence."""
    return headline(content.answers, sorted({finding.item for finding in content.findings if finding.blocks}))


def tables_of(content: Content) -> list[Table]:
    """The tables that are also written as markdown and LaTeX."""
    return [
        tabled.gains(content.spec, content.answers),
        tabled.laws(content.answers, content.cuts),
        tabled.held_out(content.spec, content.answers),
        tabled.findings(content.findings),
        tabled.noise({group.name: group.noise for group in content.tables.groups}),
    ]


def page(content: Content, stamp: str) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    spec = content.spec
    runs, facts, anchors = _runs(content)
    gains, laws, held_out, findings, noise = tables_of(content)

    def panels(diagram: Diagram) -> str:
        return "".join(panel_html(panel, stamp, anchors) for panel in diagram.panels)

    return environment.get_template(TEMPLATE.name).render(
        spec=spec,
        stamp=stamp,
        headline=headline_of(content),
        leading=leading(spec, content.answers),
        floors={name: f"{value:.4f}" for name, value in content.floors.items()},
        gains=gains,
        groups=[_group(content, found) for found in content.answers],
        cuts=[(law, cut_answer(law)) for law in content.cuts],
        ordering=ordering(content.cuts) if content.cuts else "",
        cut_facts=[cut_facts(law) for law in content.cuts],
        switches=content.switches,
        laws=laws,
        judgements=[(f.group.name, f.evidence.comparison.text) for f in content.answers if f.evidence.comparison],
        held_out=held_out,
        held_out_texts=[(f.group.name, f.evidence.held_out.text()) for f in content.answers if f.evidence.held_out],
        planned_held_out=spec.held_out is not None,
        shared=content.shared,
        drawn=list(zip(content.answers, content.drawn, strict=True)),
        opened=next((index for index, found in enumerate(content.answers) if found.quoted), 0),
        panels=panels,
        findings=findings,
        noise=noise,
        runs=runs,
        run_facts=json.dumps(facts, allow_nan=False).replace("<", "\\u003c"),
        excluded=_excluded(content),
        setting=_setting(content),
        found=len(content.records.rows) + len(content.records.excluded),
    )


def _group(content: Content, found: Answer) -> dict[str, Any]:
    return {
        "name": found.group.name,
        "quoted": found.quoted,
        "form": found.law.form if found.law is not None else "",
        "problem": found.problem,
        "allocation": allocation_sentence(content.spec, found),
        "next_runs": next_sentences(content.spec, found),
        "narrowing": narrowing(found),
        "rows": len(found.group.fitted_rows),
    }


def _runs(content: Content) -> tuple[Table, list[dict[str, str]], dict[str, str]]:
    """The table of runs, what a tip says of each of them, and run -> the anchor of its row."""
    spec = content.spec
    label = f"{spec.metric} ({spec.metric_unit})"
    columns = ("run", "cell", "seed", "part", *(axis.name for axis in spec.axes), label, spec.cost.unit, "wall s")
    parts = _parts(content.tables)
    rows, facts, anchors = [], [], {}
    for row in content.records.rows:
        name = str(row["run_id"])
        anchors[name] = f"run-{len(rows)}"
        sizes = [_short(row, axis.column) for axis in spec.axes]
        value = _measured(row, spec.metric)
        cell = str(row["cell.name"]) if "cell.name" in row else ""
        part = parts.get(name, "left out")
        rows.append(
            (
                name,
                cell,
                str(row.get("seed", "")),
                part,
                *sizes,
                value,
                _short(row, spec.cost.column),
                _short(row, "seconds.wall"),
            )
        )
        told = [f"{axis.name} {size} {axis.unit}" for axis, size in zip(spec.axes, sizes, strict=True)]
        facts.append(
            {
                "run": name,
                "sizes": "\n".join(told),
                "metric": f"{value} {spec.metric_unit}",
                "seed": f"seed {row.get('seed', '')}, {part}",
            }
        )
    numeric = (2, *range(4, len(columns)))
    note = "± is the sampling error of the evaluation. The full table is runs.csv, the laws are laws.json."
    table = Table("All runs", columns, tuple(rows), numeric, ids=tuple(anchors.values()), note=note)
    return table, facts, anchors


def _short(row: Row, column: str) -> str:
    value = value_of(row, column)
    return "" if value is None else short_number(value)


def _measured(row: Row, metric: str) -> str:
    value, stderr = value_of(row, metric), value_of(row, f"{metric}.stderr")
    return "" if value is None else f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _parts(tables: Tables) -> dict[str, str]:
    """run -> fitted, held out or sweep."""
    found = {}
    for group in tables.groups:
        for part, rows in (("fitted", group.fitted_rows), ("held out", group.held_out_rows), ("sweep", group.sweep)):
            found |= {str(row["run_id"]): part for row in rows}
    return found


def _excluded(content: Content) -> Table:
    rows = [(run.run, run.status, run.reason) for run in content.tables.every_excluded]
    rows += [(run, "not used", reason) for law in content.cuts for run, reason in law.unusable]
    return Table("Excluded runs", ("run", "status", "reason"), tuple(rows), cards=True)


def _setting(content: Content) -> list[tuple[str, str]]:
    """Hardware and versions, as recorded by the runs, and those of the fits."""
    found: dict[str, set[str]] = {}
    for row in [*content.records.rows, *(run.row for run in content.records.excluded if run.row)]:
        if row.get("devices.kind"):
            found.setdefault("devices", set()).add(f"{row.get('devices.count')} × {row['devices.kind']}")
        for key, value in row.items():
            if key.startswith("versions.") or key in ("revision", "code.revision"):
                found.setdefault(key, set()).add(str(value))
    wall = [value for row in content.records.rows if (value := value_of(row, "seconds.wall")) is not None]
    fits = f"python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    return [
        ("plan", f"{content.spec.name}/study.yaml, sha256 {content.spec.sha256}"),
        ("runs", content.tables.source or "none found"),
        ("time of all finished runs", f"{math.fsum(wall) / 3600:.2f} hours"),
        *_goodput(content.tables.source),
        *((key, ", ".join(sorted(values))) for key, values in sorted(found.items())),
        ("fits and figures", f"{fits}, matplotlib {matplotlib.__version__}"),
    ]


def _goodput(source: str) -> list[tuple[str, str]]:
    """How much of their time all runs trained, finished or not, where their folders tell what happened."""
    files = sorted(Path(source).rglob(events.FILE)) if source and Path(source).is_dir() else []
    found = [one for file in files if (one := goodput.goodput(events.read_events(file.parent))).wall]
    return [("goodput", f"{len(found)} runs: {goodput.summary(found).text()}")] if found else []
