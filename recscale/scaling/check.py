"""Hold a study against the checklist of a trustworthy law: 20 items, of which the blocking ones block.

    python -m recscale.scaling.check experiments/0001_four_axes_planted [--runs DIR]

Exit status: 0, 1 where a blocking item fails or cannot be judged, 2 for bad input.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from recscale.scaling import checklist_design, checklist_laws, checklist_records, checklist_runs
from recscale.scaling.evidence import gather_all
from recscale.scaling.findings import OK, Context, Evidence, Finding, Item
from recscale.scaling.fits import MINIMUM_DRAWS
from recscale.scaling.study import Tables, read_runs, rows_of
from recscale.scaling.study_file import StudySpec, read_spec

# Number, blocks or warns, title, and the function that judges it.
CHECKLIST: tuple[tuple[int, str, str, Item], ...] = (
    (1, "B", "the plan was written before the runs", checklist_design.planned),
    (2, "B", "axes are wide, dense and independent", checklist_design.spread),
    (3, "B", "seeds tell the noise", checklist_design.seeds),
    (4, "B", "a rung is held out and predicted", checklist_laws.held_out),
    (5, "B", "learning rates are tuned at several scales", checklist_design.learning_rates),
    (6, "B", "schedules end with their runs", checklist_runs.schedules),
    (7, "B", "FLOPs are counted by part", checklist_runs.flops),
    (8, "B", "one evaluation for all", checklist_runs.evaluation),
    (9, "B", "one pass over the data", checklist_runs.epochs),
    (10, "B", "the law is certified", checklist_laws.certified),
    (11, "B", "the law beats the nulls", checklist_laws.nulls),
    (12, "W", "the law stands when the fit is changed", checklist_laws.sensitivity),
    (13, "W", "isoFLOP profiles are sound", checklist_laws.profiles),
    (14, "W", "tables and data are told apart", checklist_records.vocabulary),
    (15, "W", "excluded runs have reasons", checklist_records.exclusions),
    (16, "W", "sizes and serving cost are known", checklist_records.sizes),
    (17, "W", "a second window agrees", checklist_records.second_window),
    (18, "W", "training curves collapse", checklist_records.collapse),
    (19, "B", "nothing is carried too far", checklist_laws.distance),
    (20, "W", "the study can be made again", checklist_records.bundle),
)


def run_checks(spec: StudySpec, tables: Tables, laws: Mapping[str, Evidence] | None = None) -> list[Finding]:
    """Every item of the checklist, one finding or more each, in order.

    laws: what was fitted, by name of the group (recscale/scaling/evidence.py `gather_all`); without it the items that
    need a law are unknown, and block.
    """
    context = Context(spec, tables, laws)
    return [
        Finding(number, level, title, said.state, said.text, said.what_to_do)
        for number, level, title, item in CHECKLIST
        for said in item(context)
    ]


def blocked(findings: Sequence[Finding]) -> bool:
    """Whether no law may be printed: a blocking item fails, or nothing tells whether it does."""
    return any(finding.blocks for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """The findings as text, by item."""
    lines, last = [], 0
    for finding in findings:
        if finding.item != last:
            lines.append(f"{finding.item:2d} {finding.level} {finding.title}")
        last = finding.item
        do = f"\n              -> {finding.what_to_do}" if finding.what_to_do else ""
        lines.append(f"     {finding.mark:8s} {finding.text}{do}")
    wrong = {level: {f.item for f in findings if f.level == level and f.state != OK} for level in "BW"}
    block, warn = (", ".join(map(str, sorted(wrong[level]))) or "none" for level in "BW")
    return "\n".join([*lines, "", f"blocking: {block}; warning: {warn}"])


def on_start_grid(values: np.ndarray, grid: Sequence[np.ndarray], tolerance: float = 1e-9) -> np.ndarray:
    """Which rows of a published table of fits stand exactly on a point of the start grid: their optimiser never moved.

    values: [N, P] fitted parameters; grid: P arrays, the start values of each parameter; equal within a relative
    `tolerance`. Returns a mask [N]. (A fit that ends where it started is a start, not a fit.)
    """
    values = np.atleast_2d(np.asarray(values, np.float64))
    if values.shape[1] != len(grid):
        raise ValueError(f"grid: found {len(grid)} parameters, expected {values.shape[1]}")
    on_PN = [
        np.isclose(column_N[:, None], np.asarray(starts, np.float64), rtol=tolerance, atol=0.0).any(1)
        for column_N, starts in zip(values.T, grid, strict=True)
    ]
    return np.all(on_PN, axis=0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("recscale.scaling.check", description=__doc__.splitlines()[0])
    parser.add_argument("study", help="the folder of a study, with study.yaml")
    parser.add_argument("--runs", help="a folder of run records, or a flat table (default: results/, then runs/NAME)")
    parser.add_argument("--no-laws", action="store_true", help="judge the runs alone, fit nothing")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws")
    args = parser.parse_args(arguments)
    if args.draws < MINIMUM_DRAWS:
        print(f"error: --draws: found {args.draws}, expected at least {MINIMUM_DRAWS}", file=sys.stderr)
        return 2
    try:
        spec = read_spec(args.study)
        records, source = read_runs(args.study, args.runs)
        tables = rows_of(spec, records, source)
    except (ValueError, OSError) as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    laws = None if args.no_laws else gather_all(spec, tables, draws=args.draws)
    findings = run_checks(spec, tables, laws)
    print(f"{spec.name}: {len(records.rows)} finished runs from {source}, study.yaml {spec.sha256[:12]}\n")
    print(table(findings))
    return 1 if blocked(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
