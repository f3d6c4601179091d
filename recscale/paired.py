"""Two runs on the same targets: paired bootstrap over users of every metric that their per-target files allow.

Users are drawn with replacement and keep all their rows; both runs get the same draws. A draw is a weight per user, so
no metric sorts anything twice. The difference is that of the second run minus the first. Where a file has no `user`
(runs that only predict items), the examples of the view are drawn: each is one user in most splits.

A run that generates semantic ids (arrays `rank` and `bucket`) is compared item-level, as it is evaluated: the items of
a tuple share its places. It has no `mrr`, for its beam ends.

Rows that repeat the one before (data/requests.py) are left out, as recscale.evaluate_feedback does.

    python -m recscale.paired RUN_A RUN_B [--split=test] [--resamples=1000] [--seed=0] [--ks 10] [--common]
"""

import argparse
import dataclasses
import json
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from recscale import metrics
from recscale.ranking_metrics import scored, statistics
from recscale.user_statistics import Area, Statistic, Sums, mean_over_users, ratio_over_users

LEVEL = 0.95
CHUNK = 64  # resamples whose weights are held at a time
LABEL, SCORE = "label/", "score/"


@dataclasses.dataclass(frozen=True)
class Paired:
    """One metric of two runs: values, difference b - a, its percentile interval (LEVEL), standard error, share below 0.

    below: share of the resamples whose difference is below 0 (equal ones count half). undefined: resamples without a
    value (a class missing, say), left out. n: cases of the metric in run a.
    """

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    stderr: float
    below: float
    n: int
    undefined: int = 0


def weights(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks [<= CHUNK, users] of `resamples` multinomial draws: how often each user is drawn. By the seed alone."""
    rng = np.random.default_rng(seed)
    for first in range(0, resamples, CHUNK):
        drawn = [rng.integers(0, users, users) for _ in range(min(CHUNK, resamples - first))]
        yield np.stack([np.bincount(user, minlength=users) for user in drawn]).astype(np.float64)


def resampled(
    found: Mapping[str, Statistic], users: int, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Name -> values [resamples] of each statistic; all share the draws, so differences between any two are paired."""
    if users < 2:
        raise ValueError(f"paired bootstrap: {users} users, expected at least 2.")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in found}
    sums = {name: statistic for name, statistic in found.items() if isinstance(statistic, Sums)}
    edges = np.cumsum([0, *(statistic.sums_US.shape[1] for statistic in sums.values())])
    columns_US = np.concatenate([np.zeros((users, 0)), *(statistic.sums_US for statistic in sums.values())], axis=1)
    for weight_RU in weights(users, resamples, seed):
        total_RS = weight_RU @ columns_US  # one product for all of them
        for (name, statistic), first, last in zip(sums.items(), edges[:-1], edges[1:], strict=True):
            parts[name].append(statistic.of_totals(total_RS[:, first:last]))
        for name, statistic in found.items():
            if isinstance(statistic, Area):
                parts[name].append(statistic.resampled(weight_RU))
    return {name: np.concatenate(values) for name, values in parts.items()}


def compare(
    a: Mapping[str, Statistic], b: Mapping[str, Statistic], users: int, resamples: int = 1000, seed: int = 0
) -> list[Paired]:
    """Paired bootstrap of the metrics that both runs have; their users 0..users - 1 must be the same people.

    Raises ValueError where the runs have no metric in common or there are fewer than 2 users.
    """
    names = [name for name in a if name in b]
    if not names:
        raise ValueError(f"paired bootstrap: no metric in common: {sorted(a)} and {sorted(b)}.")
    sides = {f"a {name}": a[name] for name in names} | {f"b {name}": b[name] for name in names}
    draws = resampled(sides, users, resamples, seed)
    return [_paired(name, a[name], b[name], draws[f"b {name}"] - draws[f"a {name}"]) for name in names]


def drift(days: Sequence[Statistic], users: int, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """How much a metric changes per day: least-squares slope over the days (in order), and its interval (LEVEL).

    All days share the users 0..users - 1 and their draws, so people who come back every day do not count as new ones.
    Days without a value are left out. Raises ValueError where fewer than 2 days have one.
    """
    value_D = np.array([day.cell()[0] for day in days])
    kept = np.flatnonzero(np.isfinite(value_D))
    if len(kept) < 2:
        raise ValueError(f"drift: {len(kept)} of {len(days)} days have a value, expected at least 2.")
    place_D = kept - kept.mean()
    draws = resampled({str(day): days[day] for day in kept.tolist()}, users, resamples, seed)
    slope_R = place_D @ np.stack(list(draws.values())) / np.square(place_D).sum()
    low, high = _interval(slope_R[np.isfinite(slope_R)])
    return float(place_D @ value_D[kept] / np.square(place_D).sum()), low, high


def read_run(folder: Path, split: str) -> dict[str, np.ndarray]:
    """The arrays of FOLDER/per_target_SPLIT.npz; raises ValueError where the file is missing or damaged."""
    path = Path(folder) / f"per_target_{split}.npz"
    if not path.is_file():
        there = sorted(p.stem.removeprefix("per_target_") for p in path.parent.glob("per_target_*.npz"))
        raise ValueError(f"{path}: no such file; this folder has per-target files of {there or 'no split'}.")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error}); evaluate the run again.") from None


def aligned(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[np.ndarray, int]:
    """The unit to draw of each target, 0..count - 1, and count; raises ValueError where the runs' targets differ.

    Two runs share their targets where `example`, `row`, and `user`, `request` and every label of both are equal.
    """
    shared = [name for name in a if name in b and (name in ("example", "row", "user", "request") or _is_label(name))]
    if "row" not in shared:
        raise ValueError("per-target files without the array 'row': evaluate the runs again.")
    for name in shared:
        if a[name].shape != b[name].shape:
            raise ValueError(
                f"the runs have different targets: {len(a[name]):,} and {len(b[name]):,} in {name!r}; "
                "compare runs on the same data, split and history length, or give --common."
            )
        differ = a[name] != b[name]
        if differ.any():
            at = int(np.argmax(differ))
            raise ValueError(
                f"the runs have different targets: {int(differ.sum()):,} of {len(differ):,} differ in {name!r}, "
                f"the first at {at}: {a[name][at]} and {b[name][at]}; compare runs on the same data and split."
            )
    unit = "user" if "user" in shared else "example"
    names, place = np.unique(a[unit], return_inverse=True)
    return place.astype(np.int64), len(names)


def common_rows(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Both runs without the targets (rows of the log) that the other does not have; raises ValueError at none."""
    if "row" not in a or "row" not in b:
        raise ValueError("per-target files without the array 'row': evaluate the runs again.")
    _, of_a, of_b = np.intersect1d(a["row"], b["row"], return_indices=True)
    if not len(of_a):
        raise ValueError("the runs have no target in common; compare runs on the same data and split.")
    return {name: values[of_a] for name, values in a.items()}, {name: values[of_b] for name, values in b.items()}


def without_repeats(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Both runs, which share their targets, without those that either marks as a `repeat` of the row before."""
    marks = [run["repeat"] for run in (a, b) if "repeat" in run]
    if not marks or len(a["row"]) != len(b["row"]):
        return a, b
    once = ~np.any(marks, axis=0)
    return {name: values[once] for name, values in a.items()}, {name: values[once] for name, values in b.items()}


def statistics_of(
    run: Mapping[str, np.ndarray], user: np.ndarray, users: int, ks: Sequence[int]
) -> dict[str, Statistic]:
    """Every metric of a run's per-target arrays: `nats`, `hr@10`, ..., and `auc/HEAD`, ... of every head.

    A head is two arrays `label/HEAD` and `score/HEAD`. Where all labels are 0 or 1 it is binary if the scores are in
    [0, 1], else a mere score (order only); with other labels it is a regression.
    Without `request` every target is a request of its own.
    """
    found = _of_items(run, user, users, ks)
    request = run["request"] if "request" in run else np.arange(len(user))
    for name in (name.removeprefix(LABEL) for name in run if _is_label(name)):
        if SCORE + name not in run:
            raise ValueError(f"head {name!r}: the file has its labels but no array {SCORE + name!r}.")
        label, score = run[LABEL + name], run[SCORE + name]
        kind = "regression"
        if np.isin(label, (0, 1)).all():
            kind = "binary" if ((score >= 0) & (score <= 1)).all() else "score"
        try:
            of_head = statistics(kind, scored(label, score, request, user, users=users))
        except ValueError as error:
            raise ValueError(f"head {name!r}: {error}") from None
        found |= {f"{metric}/{name}": statistic for metric, statistic in of_head.items()}
    return found


def _of_items(run: Mapping[str, np.ndarray], user: np.ndarray, users: int, ks: Sequence[int]) -> dict[str, Statistic]:
    found: dict[str, Statistic] = {}
    if "nats" in run:
        found["nats"] = mean_over_users(run["nats"], user, users)
    for protocol, suffix in metrics.PROTOCOLS.items():
        for name, values in _of_ranks(run, protocol, ks).items():
            found[name + suffix] = mean_over_users(values, user, users)
        hits = run.get(metrics.column("hits", protocol))
        if hits is not None:
            count = run["num_targets"]
            for k in ks:
                gain, ideal = metrics.dcg(hits, k), metrics.ideal_dcg(count, k)
                found[f"ndcg_ratio_of_means@{k}{suffix}"] = ratio_over_users(gain, ideal, user, users)
                for name, function in metrics.SET_METRICS.items():
                    found[f"{name}@{k}{suffix}"] = mean_over_users(function(hits, count, k), user, users)
    return found


def _of_ranks(run: Mapping[str, np.ndarray], protocol: str, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Metric -> value of each target, by its rank or, where it shares its place, by the ranks of all who do."""
    rank, bucket = (run.get(metrics.column(kind, protocol)) for kind in ("rank", "bucket"))
    if rank is None:
        return {}
    if bucket is not None:
        return {f"{name}@{k}": shared(rank, bucket, k) for k in ks for name, shared in metrics.SHARED_METRICS.items()}
    found = {f"{name}@{k}": metrics.METRICS[name](rank, k) for k in ks for name in ("hr", "ndcg")}
    return {"mrr": metrics.reciprocal_rank(rank)} | found


def _is_label(name: str) -> bool:
    return name.startswith(LABEL)


def _interval(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def _paired(name: str, a: Statistic, b: Statistic, difference_R: np.ndarray) -> Paired:
    (value_a, _, n), (value_b, _, _) = a.cell(), b.cell()
    known = difference_R[np.isfinite(difference_R)]
    low, high = _interval(known)
    stderr = float(known.std(ddof=1)) if len(known) > 1 else math.nan
    below = float(((known < 0) + (known == 0) / 2).mean()) if len(known) else math.nan
    undefined = len(difference_R) - len(known)
    return Paired(name, value_a, value_b, value_b - value_a, low, high, stderr, below, n, undefined)


def _table(rows: Sequence[Paired]) -> str:
    width = max(len(row.metric) for row in rows)
    lines = [f"{'metric':{width}}  {'a':>10} {'b':>10} {'b - a':>11}  {'interval':>24}  {'below 0':>7} {'n':>9}"]
    for row in rows:
        interval = f"[{row.low:+.6f}, {row.high:+.6f}]"
        lines.append(
            f"{row.metric:{width}}  {row.a:10.6f} {row.b:10.6f} {row.difference:+11.6f}  {interval:>24}  "
            f"{row.below:7.3f} {row.n:9,d}" + (f"  {row.undefined} resamples undefined" if row.undefined else "")
        )
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("recscale.paired", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run_a", type=Path, help="folder of a run")
    parser.add_argument("run_b", type=Path, help="folder of the run that is compared with it")
    parser.add_argument("--split", default="test")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ks", type=int, nargs="+", default=[10], help="cut-offs of the item metrics")
    parser.add_argument("--common", action="store_true", help="compare on the targets that both runs have")
    parser.add_argument("--json", action="store_true", help="one JSON object per metric")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: one line per metric; exits with one line on wrong input."""
    args = _arguments(argv)
    try:
        if args.resamples < 2:
            raise ValueError(f"--resamples={args.resamples}: expected at least 2.")
        a, b = read_run(args.run_a, args.split), read_run(args.run_b, args.split)
        a, b = without_repeats(*(common_rows(a, b) if args.common else (a, b)))
        user, users = aligned(a, b)
        sides = [statistics_of(run, user, users, args.ks) for run in (a, b)]
        rows = compare(sides[0], sides[1], users, args.resamples, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json:
        print("\n".join(json.dumps(dataclasses.asdict(row)) for row in rows))
        return
    unit = "users" if "user" in a and "user" in b else "examples"
    print(f"a: {args.run_a}\nb: {args.run_b}\n{users:,} {unit} drawn {args.resamples:,} times, {LEVEL:.0%} intervals\n")
    print(_table(rows))


if __name__ == "__main__":
    main()
