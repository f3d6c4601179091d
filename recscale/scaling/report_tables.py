"""The tables of a report, once: as HTML rows in the page, as markdown in tables.md, as LaTeX in tables.tex."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from recscale.scaling.answers import Answer, per_cost
from recscale.scaling.figures import short_number
from recscale.scaling.findings import OK, Finding
from recscale.scaling.fits import Law
from recscale.scaling.laws import AxisLaw, SeedNoise
from recscale.scaling.study_file import StudySpec

TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "Δ": r"$\Delta$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "≥": r"$\ge$",
    }
)
ANY_SIZE, WIDE = 24, "p{0.34\\linewidth}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; lines within a cell are parted by a line break. numeric: columns set to the right.

    strong: rows to mark (the quoted law, what blocks). ids: an anchor per row, "" for none. note: under the table.
    cards: on a narrow screen each row is a card of its own.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()
    strong: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()
    note: str = ""
    cards: bool = False

    def markdown(self) -> str:
        """A pipe table."""
        head = f"| {' | '.join(self.columns)} |"
        rule = "|" + "|".join(" ---: " if i in self.numeric else " --- " for i in range(len(self.columns))) + "|"
        body = [
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in row) + " |"
            for row in self.rows
        ]
        return "\n".join([f"### {self.title}", "", head, rule, *body, *(["", self.note] if self.note else []), ""])

    def tex(self) -> str:
        """A table float with a tabular that needs no package."""
        long = [max((len(row[i]) for row in self.rows), default=0) > ANY_SIZE for i in range(len(self.columns))]
        kinds = "".join("r" if i in self.numeric else WIDE if long[i] else "l" for i in range(len(self.columns)))
        lines = [_tex_row(self.columns), r"\hline", *(_tex_row(row) for row in self.rows)]
        inner = "\n".join([f"\\begin{{tabular}}{{{kinds}}}", r"\hline", *lines, r"\hline", r"\end{tabular}"])
        caption = f"{self.title}. {self.note}".translate(TEX)
        return f"\\begin{{table}}\n\\small\n\\caption{{{caption}}}\n{inner}\n\\end{{table}}\n"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(cell.translate(TEX).replace("\n", " \\newline ") for cell in cells) + r" \\"


def ungrouped(table: Table) -> Table:
    """Without its first column, the group, where there is only one."""
    if {row[0] for row in table.rows} - {"all", ""}:
        return table
    numeric = tuple(index - 1 for index in table.numeric)
    rows = tuple(row[1:] for row in table.rows)
    return dataclasses.replace(table, columns=table.columns[1:], rows=rows, numeric=numeric)


def fixed(value: float, digits: int = 4) -> str:
    """A number with so many digits, "" where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def span(low: float, high: float, digits: int = 4) -> str:
    """An interval, "unknown" where an end is no number."""
    return f"{low:.{digits}f} to {high:.{digits}f}" if math.isfinite(low) and math.isfinite(high) else "unknown"


def significant(value: float) -> str:
    """Four significant digits; "infinite" or "" for what is no number."""
    return f"{value:.4g}" if math.isfinite(value) else "" if math.isnan(value) else "infinite"


def gains(spec: StudySpec, answers: Sequence[Answer]) -> Table:
    """The next doubling of each axis: gain, its interval, cost factor, gain per doubling of the cost."""
    rows = []
    for found in answers:
        for entry in found.doubled:
            gain = entry.gain
            step = f"{short_number(entry.size)} to {short_number(2 * entry.size)} {entry.axis.unit}"
            cost = "" if math.isnan(entry.factor) else f"× {entry.factor:.2f}"
            per = per_cost(entry)
            free = "no extra cost" if per == math.inf else fixed(per)
            flat = ", flat" if gain.flat else ""
            cells = (entry.axis.label, step, f"{gain.value:+.4f}{flat}", span(gain.low, gain.high), cost, free)
            rows.append((found.group.name, *cells))
    columns = ("group", "axis", "step", f"gain ({spec.metric_unit})", "90 % interval", "cost", "gain per doubled cost")
    note = f"Gain above 0 is better. Cost: {spec.cost.unit}, fitted to the runs, the other axes at their largest."
    return ungrouped(Table("Next doubling of each axis", columns, tuple(rows), numeric=(3, 4, 5, 6), note=note))


def law_rows(name: str, laws: Sequence[Law], quoted: str) -> list[tuple[bool, tuple[str, ...]]]:
    """(quoted, cells) of each form of a law."""
    rows: list[tuple[bool, tuple[str, ...]]] = []
    for index, law in enumerate(laws):
        lines = [_parameter(law, parameter) for parameter in law.params]
        reasons = "; ".join((*law.reasons, *law.notes, *([law.aicc_note] if law.aicc_note else [])))
        proof = ("certified" if law.certified else "refused") + (f": {reasons}" if reasons else "")
        best = law.form == quoted
        mark = "\nbest supported" if best else ""
        cells = (f"{law.form}{mark}\n{law.formula}", "\n".join(lines), fixed(law.delta_aicc, 1), fixed(law.weight, 2))
        rows.append((best, (name if not index else "", *cells, proof)))
    return rows


def _parameter(law: Law, name: str) -> str:
    low, high = law.intervals[name]
    verdict = f", {law.verdicts[name]}" if name in law.verdicts else ""
    return f"{name} = {significant(law.params[name])} ({significant(low)} to {significant(high)}){verdict}"


def laws(answers: Sequence[Answer], cuts: Sequence[AxisLaw]) -> Table:
    """Every form fitted to every group and to every cut."""
    marked: list[tuple[bool, tuple[str, ...]]] = []
    for found in answers:
        comparison = found.evidence.comparison
        if comparison is None:
            marked.append((False, (found.group.name, "not fitted", "", "", "", found.problem)))
            continue
        name = f"{found.group.name}\n{comparison.laws[0].n} runs"
        marked += law_rows(name, comparison.laws, comparison.best.form if comparison.best else "")
        marked += [(False, ("", form, "", "", "", f"not fitted: {why}")) for form, why in comparison.problems]
    for cut in cuts:
        name = f"{cut.spec.label}\nalone, x in {cut.spec.unit}"
        marked += law_rows(name, cut.fits, cut.quoted) or [(False, (name, "not fitted", "", "", "", cut.problem))]
    columns = ("law of", "form", "parameters (90 % interval), verdict", "ΔAICc", "weight", "certificate")
    note = (
        "Intervals: the wider of bootstrap and profile likelihood. Identified: no wider than half the value; weak: "
        "than one and a half times it. A refused fit keeps its numbers for inspection and is no law."
    )
    strong = tuple(index for index, (best, _) in enumerate(marked) if best)
    rows = tuple(cells for _, cells in marked)
    return Table("Laws", columns, rows, numeric=(3, 4), strong=strong, note=note, cards=True)


def held_out(spec: StudySpec, answers: Sequence[Answer]) -> Table:
    """Predicted against actual of every held-out run."""
    rows = []
    for found in answers:
        test = found.evidence.held_out
        for index, run in enumerate(test.run_M if test is not None else ()):
            assert test is not None
            low, high, actual = test.low_M[index], test.high_M[index], test.actual_M[index]
            inside = "inside" if low <= actual <= high else "outside"
            error = f"{test.error_M[index]:+.2%}"
            cells = (
                fixed(test.predicted_M[index]),
                span(low, high),
                fixed(actual),
                error,
                fixed(test.decades_M[index], 2),
            )
            rows.append((found.group.name, run, *cells, inside))
    columns = (
        "group",
        "run",
        f"predicted ({spec.metric_unit})",
        "90 % interval",
        "actual",
        "error",
        "decades beyond",
        "",
    )
    return ungrouped(Table("Held-out runs", columns, tuple(rows), numeric=(2, 3, 4, 5, 6)))


def findings(found: Sequence[Finding]) -> Table:
    """The checklist: blocking first, then unknown and warnings, then what is as it should be."""
    rank = {"BLOCKS": 0, "UNKNOWN": 1, "warns": 2, "unknown": 3, "ok": 4}
    ordered = sorted(found, key=lambda finding: (rank[finding.mark], finding.item))
    rows = [(str(f.item), f.mark, f.title, f.text, f.what_to_do) for f in ordered]
    strong = tuple(index for index, finding in enumerate(ordered) if finding.blocks)
    count = sum(finding.state == OK for finding in found)
    note = (
        f"{count} of {len(found)} findings are as they should be. UNKNOWN: the records do not tell, which blocks too."
    )
    return Table("Checklist", ("item", "", "asks", "found", "do"), tuple(rows), strong=strong, note=note, cards=True)


def noise(named: Mapping[str, SeedNoise]) -> Table:
    """Cells with several seeds, group by group."""
    rows = [
        (name if not index else "", cell, str(seeds), fixed(mean), fixed(sd, 5))
        for name, found in named.items()
        for index, (cell, seeds, mean, sd) in enumerate(found.cells)
    ]
    pooled = "; ".join(
        f"{name}: {found.sd:.5f}, {found.dof} degrees of freedom" for name, found in named.items() if found.dof
    )
    columns = ("group", "cell", "seeds", "mean", "standard deviation")
    note = f"Pooled: {pooled}." if pooled else ""
    return ungrouped(Table("Seed noise", columns, tuple(rows), numeric=(2, 3, 4), note=note))


def files(tables: Sequence[Table], stamp: str) -> tuple[str, str]:
    """(tables.md, tables.tex) of tables that have rows."""
    full = [table for table in tables if table.rows]
    markdown = "\n".join([*(table.markdown() for table in full), stamp, ""])
    return markdown, "\n".join([f"% {stamp}", *(table.tex() for table in full)])
