"""Logistic regression and gradient boosting on plain features of KuaiRand-Pure: what a ranker has to beat.

    python -m recscale.data.prepare --dataset=kuairand-pure --source=DIR --out=logs/kuairand-pure
    python experiments/0006_rankers_kuairand/baselines.py --log=logs/kuairand-pure --out=runs/0006/baselines

Writes OUT/results.jsonl, one row per (model, seed, head, split, metric), and per model and seed
OUT/MODEL_seedN/per_target_test.npz and per_target_val.npz, which `python -m recscale.paired` compares with each other
and with any run on the same split. Needs lightgbm and scikit-learn. The same versions give the same numbers.

The split is one of time, the log's clock, where the source's own two parts are: its "val" is 25 to 30 April and its
"test" 1 to 8 May 2022, Beijing days, and its training days (9 to 24 April) are not public row by row in the parquet
form. Its cut lies between 15:00 and 16:00 UTC of 30 April and is not sharp (62 test rows are earlier than the last val
row), so that hour is nobody's target. We train before 30 April, choose on 30 April, test on 1 to 8 May. Users without
a training event stay, their first event is history. Rows that repeat the row before (user, video, millisecond) are
left out of the training and of the metrics.

A row is known by the user table, the item table (no statistics of the source: they are counted over the whole period),
tab, hour, weekday, duration and, for eight keys, how often the key was shown and the smoothed rate of each feedback,
all over strictly earlier milliseconds, evaluation days included: what a model that reads the user's history knows.

Models named *_frozen know of the user only what was before the day (midnight in Beijing); of items, all that is
strictly earlier. Only their `gauc` and `pair_accuracy` within a day mean what they say: two rows of one user that are
scored from different states of the user are not comparable (see recscale/ranking_metrics.py). AUC, entropy and
calibration are sound for both.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import OneHotEncoder

from recscale.data.earlier import earlier, past_rates
from recscale.data.event_log import EventLog, EventLogError
from recscale.data.requests import repeats, request_ids
from recscale.data.splits import DAY, daily, global_time, target_example, target_rows
from recscale.paired import drift
from recscale.ranking_metrics import scored, statistics

HEADS = {"is_click": "binary", "long_view": "binary", "is_like": "binary", "played_ratio": "regression"}
TEST_FROM, VAL_FROM, GAP, DAYS = 1_651_334_400, 1_651_248_000, 3_600, 8  # midnights in Beijing; seconds
BEIJING = 8 * 3_600
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
ITEM_CODES = ("video_type", "upload_type", "tag")
DRIFTING = ("auc", "gauc", "normalised_entropy", "concordance", "mse")
BOOSTING = {
    "learning_rate": 0.05, "num_leaves": 31, "min_data_in_leaf": 100, "feature_fraction": 0.7, "bagging_fraction": 0.8,
    "bagging_freq": 1, "lambda_l2": 5.0, "deterministic": True, "force_row_wise": True, "verbosity": -1,
    "num_threads": 1,
}  # fmt: skip
ROUNDS, PATIENCE = 1_500, 50
PENALTIES = (0.001, 0.01, 0.1, 1.0)  # inverse strengths of the logistic regression, chosen on val
RESAMPLES = 1_000  # of the users, for the intervals of the drift
MIN_CATEGORY = 50  # rows; rarer codes share one column
Features = Mapping[str, np.ndarray]


def features(log: EventLog, frozen: bool = False) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Numbers (float32) and codes (int32) of every event, name -> [E]; nothing of the event's own feedback.

    frozen: feedback and counts of the user are those before the event's day.
    """
    user = np.repeat(np.arange(log.num_users), log.lengths)
    events = {name: np.asarray(values) for name, values in log.events.items()}
    item, time = events["item_id"], events["time_ms"]
    local = events["timestamp"] + BEIJING
    codes = {"tab": events["tab"], "hour": local % DAY // 3_600, "weekday": (local // DAY + 3) % 7}
    coded = {name: values for name, values in log.users.items() if name not in (*USER_NUMBERS, "raw_id")}
    codes |= {name: np.unique(values, return_inverse=True)[1][user] for name, values in coded.items()}
    codes |= {name: log.items[name][item] for name in ITEM_CODES}
    numbers = {name: np.log1p(np.maximum(log.users[name][user], 0)) for name in USER_NUMBERS}
    numbers["duration"] = np.log1p(events["duration_ms"] / 1000)
    numbers["age_days"] = np.maximum(local // DAY - log.items["upload_day"][item], 0)
    author = np.unique(log.items["author_id"][item], return_inverse=True)[1]
    keys = {"user": user, "item": item, "author": author, "tag": codes["tag"], "tab": codes["tab"]}
    keys |= {f"user_{name}": _pairs(user, keys[name]) for name in ("author", "tag", "tab")}
    outcome_EF = np.stack([np.minimum(events[name], 5.0) for name in HEADS], axis=1).astype(np.float64)
    midnight = (local - local % DAY - BEIJING) * 1_000
    of_user = midnight if frozen else time  # all events of a user and a day at one moment: none is before another
    for name, key in keys.items():
        clock = of_user if name.startswith("user") else time
        numbers[f"{name}_shown"] = np.log1p(earlier(key, clock, outcome_EF[:, 0])[0])
        rate_EF = past_rates(key, clock, outcome_EF)
        numbers |= {f"{name}_{head}": rate_EF[:, f] for f, head in enumerate(HEADS)}
    numbers["user_item_shown"] = np.log1p(earlier(_pairs(user, item), of_user, outcome_EF[:, 0])[0])
    numbers["silence"] = np.log1p(_silence(user, time) / 1000)
    return (
        {name: values.astype(np.float32) for name, values in numbers.items()},
        {name: values.astype(np.int32) for name, values in codes.items()},
    )


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.astype(np.int64) * (int(second.max()) + 1) + second


def _silence(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Milliseconds since the user's last event that is strictly earlier; -1 where there is none."""
    place = np.arange(len(user))
    opens = np.ones(len(user), bool)
    opens[1:] = np.diff(user) != 0
    moment = opens.copy()
    moment[1:] |= np.diff(time) != 0
    starts = np.maximum.accumulate(np.where(moment, place, 0))
    before = np.maximum(starts - 1, 0)
    return np.where(opens[starts], -1, time - time[before]).clip(-0.5)


def boosted(
    head: str, seed: int, numbers: Features, codes: Features, train: np.ndarray, val: np.ndarray, log: EventLog
):
    """LightGBM with the number of trees chosen on val; codes are numbers to it (as categories they were worse on val).

    Returns predictions [E] of every event.
    """
    names = [*numbers, *codes]
    table = np.stack([*numbers.values(), *codes.values()], axis=1).astype(np.float32)
    label = np.asarray(log.events[head], np.float64)
    kind = {"objective": "binary"} if HEADS[head] == "binary" else {"objective": "regression"}
    sets = lightgbm.Dataset(table[train], label[train], feature_name=names)
    model = lightgbm.train(
        {**BOOSTING, **kind, "seed": seed},
        sets,
        ROUNDS,
        valid_sets=[lightgbm.Dataset(table[val], label[val], reference=sets)],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    return np.asarray(model.predict(table))


def linear(head: str, seed: int, numbers: Features, codes: Features, train: np.ndarray, val: np.ndarray, log: EventLog):
    """Logistic (or ridge) regression on standardised numbers and one-hot codes; the penalty chosen on val."""
    del seed
    columns = np.stack(list(numbers.values()), axis=1).astype(np.float64)
    columns = (columns - columns[train].mean(axis=0)) / np.maximum(columns[train].std(axis=0), 1e-6)
    encoder = OneHotEncoder(min_frequency=MIN_CATEGORY, handle_unknown="infrequent_if_exist")
    table = np.stack(list(codes.values()), axis=1)
    hot = encoder.fit(table[train]).transform(table)
    table = sparse.hstack([sparse.csr_array(columns), hot], format="csr")
    label = np.asarray(log.events[head], np.float64)
    best, found = np.inf, np.zeros(len(label))
    logistic = LogisticRegression(max_iter=1_000, warm_start=True)
    for penalty in PENALTIES:
        if HEADS[head] == "binary":
            model = logistic.set_params(C=penalty).fit(table[train], label[train])
            score = model.predict_proba(table)[:, 1]
            loss = -np.log(np.where(label[val] == 1, score[val], 1 - score[val])).mean()
        else:
            score = Ridge(alpha=1 / penalty).fit(table[train], label[train]).predict(table)
            loss = np.square(score[val] - label[val]).mean()
        if loss < best:
            best, found = loss, score
    return found


def constant(
    head: str, seed: int, numbers: Features, codes: Features, train: np.ndarray, val: np.ndarray, log: EventLog
):
    """The mean of the training rows for everybody."""
    del seed, numbers, codes, val
    label = np.asarray(log.events[head], np.float64)
    return np.full(len(label), label[train].mean())


FROZEN = "_frozen"
FITS = {"constant": constant, "linear": linear, "lightgbm": boosted}
MODELS = ("constant", "linear", "lightgbm", "linear_frozen", "lightgbm_frozen")
SEEDS = {"constant": 1, "linear": 1, "lightgbm": 3}  # the first two have no randomness


def rows_of(log: EventLog, test_from: int, val_from: int, gap: int, days: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Training rows [T] of the log, and its views "val", "test", "day1", ... ."""
    views = daily(log, test_from, days, gap, val_from, keep_new_users=True)
    views["test"] = global_time(log, test_from, val_from, gap, keep_new_users=True)["test"]
    early = np.asarray(log.events["timestamp"]) < val_from - gap  # first events too: this model needs no history
    del views["train"]
    return np.flatnonzero(early & ~repeats(log)), views


def evaluated(
    log: EventLog, score: np.ndarray, head: str, rows: np.ndarray, request: np.ndarray, base_rate: float | None
):
    """The statistics of a head over some rows of the log; users are numbered as in the log."""
    user = np.repeat(np.arange(log.num_users), log.lengths)[rows]
    data = scored(log.events[head][rows], score[rows], request[rows], user, base_rate, users=log.num_users)
    return statistics(HEADS[head], data)


def results(log: EventLog, head: str, score: np.ndarray, train: np.ndarray, views: Mapping[str, Any]) -> Iterator[dict]:
    """{head, split, metric, value, stderr, n}; `normalised_entropy/train` compares with the rate of training.

    drift/METRIC: slope per day of the test over users (see `recscale.paired.drift`), with its interval low, high.
    """
    again, request = repeats(log), request_ids(log)
    days = []
    for split, view in views.items():
        rows = target_rows(view)
        rows = rows[~again[rows]]
        found = evaluated(log, score, head, rows, request, None)
        if HEADS[head] == "binary":
            rate = float(log.events[head][train].mean())
            found["normalised_entropy/train"] = evaluated(log, score, head, rows, request, rate)["normalised_entropy"]
        for metric, statistic in found.items():
            value, stderr, n = (None if np.isnan(x) else x for x in statistic.cell())
            yield {"head": head, "split": split, "metric": metric, "value": value, "stderr": stderr, "n": n}
        if split.startswith("day"):
            days.append(found)
    for metric in (metric for metric in DRIFTING if metric in days[0] and len(days) > 1):
        value, low, high = drift([day[metric] for day in days], log.num_users, RESAMPLES)
        row = {"head": head, "split": "days", "metric": f"drift/{metric}", "value": value, "stderr": None}
        yield {**row, "n": len(days), "low": low, "high": high}


def per_target(log: EventLog, view: Any, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of `recscale.paired`, over all targets of a view, repeats too."""
    rows, example = target_rows(view), target_example(view)
    arrays = {"example": example, "row": rows, "user": view.user[example], "request": request_ids(log)[rows]}
    for head, score in scores.items():
        arrays |= {f"label/{head}": log.events[head][rows].astype(np.float32), f"score/{head}": score[rows]}
    return arrays


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: fit, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", required=True, help="event log of kuairand-pure")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args(argv)
    try:
        log = EventLog.open(args.log)
        train, views = rows_of(log, TEST_FROM, VAL_FROM, GAP, DAYS)
    except EventLogError as error:
        sys.exit(f"error: {error}")
    known = {frozen: features(log, frozen) for frozen in {model.endswith(FROZEN) for model in args.models}}
    again = repeats(log)
    val = target_rows(views["val"])
    val = val[~again[val]]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "results.jsonl").open("w") as file:
        for model in args.models:
            (numbers, codes), fit = known[model.endswith(FROZEN)], model.removesuffix(FROZEN)
            for seed in range(SEEDS[fit]):
                scores = {}
                for head in HEADS:
                    scores[head] = FITS[fit](head, seed, numbers, codes, train, val, log)
                    for row in results(log, head, scores[head], train, views):
                        file.write(json.dumps({"model": model, "seed": seed, **row}) + "\n")
                    file.flush()
                    print(f"{model} seed {seed} {head}: done", file=sys.stderr, flush=True)
                folder = args.out / f"{model}_seed{seed}"
                folder.mkdir(exist_ok=True)
                for split in ("val", "test"):
                    np.savez(
                        folder / f"per_target_{split}.npz", allow_pickle=False, **per_target(log, views[split], scores)
                    )


if __name__ == "__main__":
    main()
