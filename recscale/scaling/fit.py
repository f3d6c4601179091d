"""Fit a law to a table of runs of any origin, and say what it does not carry.

    python -m recscale.scaling.fit runs.csv --x params tokens --y loss
    python -m recscale.scaling.fit mlruns --map columns.yaml --x params tokens --y loss --where 'loss<3.5'

TABLE: CSV, parquet, JSON lines, or a folder of an experiment tracker (recscale/scaling/sources.py). columns.yaml maps a
name used here to a column there, one per line (tokens: metrics.tokens_seen). Exit status: 0, 2 for bad input, 3 where
the form is fitted but not certified; the text then says what would make it carry.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recscale.scaling.collect import Excluded
from recscale.scaling.fits import Comparison, Law, compare
from recscale.scaling.forms import FORMS
from recscale.scaling.law_file import save_law
from recscale.scaling.points import Points
from recscale.scaling.sources import BadTable, nearest, number, read_table
from recscale.scaling.sources_points import Choice, Condition, points_of
from recscale.scaling.study_file import NULL
from recscale.scaling.validate import Prediction, Projection, TooFar, held_out_test, predict, project

BAD_INPUT, UNCERTIFIED = 2, 3
SHOWN_EXCLUDED = 10
SPAN = 1.5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser("recscale.scaling.fit", description=__doc__.splitlines()[0])
    found.add_argument("table", help="CSV, parquet, JSON lines, or a folder of runs")
    found.add_argument("--x", nargs="+", required=True, metavar="COLUMN", help="the axes")
    found.add_argument("--y", required=True, metavar="COLUMN", help="the metric")
    found.add_argument("--form", default="additive", help=", ".join(FORMS))
    found.add_argument("--scale", choices=("log", "identity"), default="log", help="of the residuals")
    found.add_argument("--delta", default="seed", help="seed, lsq, lad, or a number in units of the residuals")
    found.add_argument("--run", metavar="COLUMN", help="names a run; no two rows share it")
    found.add_argument(
        "--lineage", metavar="COLUMN", help="rows of one training run share it, and are resampled together"
    )
    found.add_argument("--seed-column", metavar="COLUMN", help="rows of equal sizes are seeds: sigma comes from them")
    found.add_argument("--held-out", metavar="COLUMN=VALUE", help="rows that no fit sees")
    found.add_argument("--where", action="append", default=[], metavar="CONDITION", help="keep rows, e.g. 'loss<3.5'")
    found.add_argument("--map", metavar="FILE.yaml", help="name used here: column of the source")
    found.add_argument("--predict", metavar="SIZES", help="params=1e9,tokens=2e10,loss=2.1: a run that exists")
    found.add_argument("--project", metavar="SIZES", help="params=1e9,tokens=2e10: a run that does not")
    found.add_argument("--draws", type=int, default=1000, help="bootstrap draws")
    found.add_argument("--out", metavar="LAW.json", help="write the law")
    found.add_argument("--force", action="store_true", help="print, write and project what is not carried, marked so")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        asked = {name: _sizes(text, args.x, args.y) for name in ("predict", "project") if (text := getattr(args, name))}
        if "predict" in asked and args.y not in asked["predict"]:
            raise ValueError(f"--predict: no {args.y}=...; give what the run measured, or use --project")
        mapping = _mapping(args.map)
        table = read_table(args.table, mapping)
        points, excluded = points_of(table, _choice(args))
        law, comparison = _fitted(points, args)
    except (BadTable, ValueError, OSError) as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return BAD_INPUT
    print(describe(law, comparison, excluded))
    if not law.certified:
        print("\nWhat would make it carry:", *(f"  - {line}" for line in advice(law)), sep="\n")
        if not args.force:
            return UNCERTIFIED
    elif not carried(law, comparison) and not args.force:
        print(
            f"\n{law.form} is not the law of these runs: {comparison.text} Take the form that is, or --force this one."
        )
        return UNCERTIFIED
    if len(points.held_out):
        print(f"\nheld out: {held_out_test(law, points).text()}")
    try:
        if args.out:
            print(f"\nwritten: {save_law(law, args.out)}")
    except OSError as error:
        print(f"error: --out: {error}", file=sys.stderr)
        return BAD_INPUT
    status = _foresee(law, asked, args)
    return status if law.certified else UNCERTIFIED


def _mapping(file: str | None) -> dict[str, str] | None:
    if file is None:
        return None
    try:
        found = yaml.safe_load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise ValueError(f"{file}: expected lines of NAME: COLUMN, e.g. tokens: metrics.tokens_seen")
    return found


def _choice(args: argparse.Namespace) -> Choice:
    if args.form not in FORMS:
        raise ValueError(f"--form: found {args.form!r}; the nearest known: {nearest(args.form, tuple(FORMS), 4)}")
    low, high = FORMS[args.form].axes
    if not low <= len(args.x) <= (high or len(args.x)):
        wanted = f"{low}" if low == high else f"at least {low}"
        raise ValueError(f"--form {args.form}: takes {wanted} axes, found {len(args.x)} in --x")
    named = [*args.x, args.y]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(f"--x, --y: {', '.join(twice)} is named twice, expected every column once")
    held = args.held_out
    if held is not None and "=" not in held:
        raise ValueError(f"--held-out: found {held!r}, expected COLUMN=VALUE")
    column, _, value = (held or "").partition("=")
    return Choice(
        x={name: name for name in args.x},
        y=args.y,
        run=args.run,
        lineage=args.lineage,
        seed=args.seed_column,
        held_out=Condition(column.strip(), "==", value.strip()) if held else None,
        where=tuple(Condition.of(text) for text in args.where),
        parameters=len(FORMS[args.form].names(tuple(args.x))),
    )


def _fitted(points: Points, args: argparse.Namespace) -> tuple[Law, Comparison]:
    delta = number(args.delta)
    forms = list(dict.fromkeys([args.form, NULL, "constant"]))
    options: dict[str, Any] = {
        "scale": args.scale,
        "delta": args.delta if delta is None else delta,
        "draws": args.draws,
    }
    comparison = compare(points, forms, **options)
    problems = dict(comparison.problems)
    if args.form in problems:
        raise ValueError(f"--form {args.form}: {problems[args.form]}")
    return comparison[args.form], comparison


def _sizes(text: str, axes: Sequence[str], metric: str) -> dict[str, float]:
    """params=1e9,tokens=2e10 as a dictionary; every axis once, the metric where it is given."""
    found = {}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        amount = number(value)
        if not sign or amount is None or not math.isfinite(amount) or name not in (*axes, metric):
            raise ValueError(f"sizes: found {part!r}, expected NAME=NUMBER with a name of {', '.join(axes)}")
        if name != metric and amount <= 0:
            raise ValueError(f"sizes: found {part!r}, expected a size above 0")
        found[name] = amount
    missing = [axis for axis in axes if axis not in found]
    if missing:
        raise ValueError(f"sizes: {text!r} lacks {', '.join(missing)}")
    return found


def describe(law: Law, comparison: Comparison, excluded: Sequence[Excluded]) -> str:
    """The law as text: parameters with intervals and verdicts, certificate, nulls, gains, runs left out."""
    proof = law.certificate
    head = "NOT CERTIFIED: " if not law.certified else "" if carried(law, comparison) else "NOT CARRIED: "
    lines = [
        f"{head}{law.metric} = {law.formula}",
        f"  {law.form}, {law.n} points, residuals of the {law.scale}, delta {law.delta:.3g}",
    ]
    lines += [f"  {axis}: {low:.4g} to {high:.4g}" for axis, (low, high) in law.domain.items()]
    width = max(len(name) for name in law.params)
    lines.append(
        f"\n  {'parameter':{max(width, 9)}}  {'value':>14}  {'90 % interval':>27}  {'std. error':>10}  verdict"
    )
    for name, value in law.params.items():
        low, high = law.intervals[name]
        verdict = law.verdicts.get(name, "")
        lines.append(
            f"  {name:{max(width, 9)}}  {value:14.8g}  {low:12.6g} to {high:11.6g}  {law.stderr[name]:10.3g}  {verdict}"
        )
    lines.append(
        f"\n  certificate: {'yes' if law.certified else 'no'}: gradient {proof.gradient:.1e}, {proof.agreeing} of "
        f"{proof.starts} starts agree, condition {proof.condition:.1e}, {proof.n:g} points for {proof.p} parameters"
    )
    lines += [f"    {reason}" for reason in law.reasons]
    lines.append(
        f"  residual sd {law.residual_sd:.4g}; intervals from {len(law.draws_SP)} {law.bootstrap} draws and profiles"
    )
    lines.append(f"  comparison: {comparison.text}")
    lines += [
        f"    {entry.form:10} AICc {entry.aicc:10.2f}  weight {entry.weight:.3f}  {entry.aicc_note}".rstrip()
        for entry in comparison.laws
    ]
    for axis in law.axes:
        gain = law.gain_per_doubling(axis)
        verb, value, low, high = ("lowers", gain.value, gain.low, gain.high)
        if value < 0:
            verb, value, low, high = "raises", -value, -high, -low
        lines.append(f"  the next doubling of {axis} {verb} {law.metric} by {value:.4g} ({low:.4g} to {high:.4g})")
    lines += [f"  note: {note}" for note in law.notes]
    if excluded:
        lines.append(f"  left out: {len(excluded)} runs")
        lines += [f"    {run.run}: {run.reason}" for run in excluded[:SHOWN_EXCLUDED]]
        lines += [f"    and {len(excluded) - SHOWN_EXCLUDED} more"] if len(excluded) > SHOWN_EXCLUDED else []
    return "\n".join(lines)


def carried(law: Law, comparison: Comparison) -> bool:
    """Whether the law is the best of the comparison, or cannot be told from it."""
    return comparison.best is not None and (law is comparison.best or law.form in comparison.near)


def advice(law: Law) -> list[str]:
    """What to run, or which form to take, so that a refused law would be carried."""
    proof, found = law.certificate, []
    needed = 3 * proof.p
    if proof.n < needed:
        found.append(f"{needed - proof.n:g} more points: {proof.n:g} of the {needed} that {proof.p} parameters need")
    for axis, (low, high) in law.domain.items():
        if high < low * 10**SPAN:
            decades = math.log10(high / low)
            found.append(f"a wider {axis}: {decades:.2f} decades; {SPAN:g} would be {low:.3g} to {low * 10**SPAN:.3g}")
    if proof.on_bound:
        found.append(f"a form with fewer parameters ({NULL}, pow): the points do not bend the way {law.form} says")
    if not proof.condition < 1e10:
        found.append("axes that move apart: small with large and the reverse, at equal cost")
    if proof.agreeing < 3:
        found.append("less noise (more seeds, more evaluation examples), or a form with fewer parameters")
    return found or ["more points on a wider range, or a form with fewer parameters"]


def _foresee(law: Law, asked: Mapping[str, Mapping[str, float]], args: argparse.Namespace) -> int:
    """Prints predictions and projections; status 2 where a projection goes too far."""
    for name, sizes in asked.items():
        place = {axis: sizes[axis] for axis in law.axes}
        try:
            if name == "predict":
                print(f"\npredict {_said(place)}: {_foretold(predict(law, place, [sizes[args.y]]))}")
            else:
                print(f"\nproject {_said(place)}: {_projected(project(law, place, force=args.force))}")
        except TooFar as error:
            print(f"error: --project: {error}", file=sys.stderr)
            return BAD_INPUT
    return 0


def _said(place: Mapping[str, float]) -> str:
    return ", ".join(f"{axis}={value:.4g}" for axis, value in place.items())


def _foretold(test: Prediction) -> str:
    value, low, high, actual = (float(side[0]) for side in (test.predicted_M, test.low_M, test.high_M, test.actual_M))
    where = "inside" if low <= actual <= high else "outside"
    return f"{value:.5g}, 90 % interval {low:.5g} to {high:.5g}; measured {actual:.5g}, {where}. {test.text()}"


def _projected(seen: Projection) -> str:
    value, low, high = (float(side[0]) for side in (seen.value_M, seen.low_M, seen.high_M))
    return f"{value:.5g}, 90 % interval {low:.5g} to {high:.5g}. {seen.text}"


if __name__ == "__main__":
    sys.exit(main())
