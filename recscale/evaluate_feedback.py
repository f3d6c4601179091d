"""Evaluation of predicted feedback: every target is an impression; how well is what the user made of it foretold?

Metrics are those of recscale/ranking_metrics.py per head, named METRIC/COLUMN ("auc/is_click"). Requests are those of
recscale/data/requests.py; a log that has neither times nor requests gives no metric inside them. Rows that repeat the
one before (KuaiRand has some) tell their own answer and count in no metric.

`gauc`, `pair_accuracy` and `ndcg_in_request` compare impressions of one user. They are sound only where those are
scored from one state of the user (loader.request_gap): a state that has seen earlier answers orders by itself.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from recscale import ranking_metrics, reading
from recscale.data.event_log import EventLog
from recscale.data.loading import targets_of
from recscale.data.requests import GAP, repeats, request_ids
from recscale.data.splits import View
from recscale.mesh import BATCH, REPLICATED, place_same
from recscale.metrics import NonFiniteScore
from recscale.run import Run

PerTarget = dict[str, np.ndarray]


def evaluate_feedback(
    run: Run,
    state: dict[str, Any],
    view: View,
    step: int = 0,
    slices: Callable[[PerTarget], Mapping[str, np.ndarray]] = lambda found: {},
    poll: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], PerTarget]:
    """Predict the feedback of every target of a view; returns (rows, per_target).

    rows: {step, split, slice, metric, value, stderr, n} as recscale.evaluate gives them, stderr clustered by user.
    per_target, in order of (example, row of the log): `example`, `row`, `user`, `request`, `repeat`, and per head
    `label/COLUMN` (for an ordinal head how many edges it passes) and `score/COLUMN`. slices: per_target -> masks.
    poll: called at every batch; may raise. Raises ValueError where the view has targets of another log,
    NonFiniteScore where the state diverged.
    """
    loader = reading.eval_loader(run.config, run.task, run.log, view)
    by_rows = NamedSharding(run.mesh, BATCH)
    arrays = (state["model"], state["tables"], state["mixers"])
    parts: list[PerTarget] = []
    for i in range(loader.steps_per_epoch):
        poll()
        batch = loader[i]
        at, place, example, row = targets_of(run.log, view, batch)
        placed = {name: place_same(by_rows, value) for name, value in batch.items()}
        scores = _predict(*arrays, placed, tables=run.tables, task=run.task)
        found = {"example": example, "row": row}
        for column, score in scores.items():
            found[f"label/{column}"] = batch["label_" + column][at, place].astype(np.float64)
            found[f"score/{column}"] = np.asarray(score)[at, place].astype(np.float64)
        parts.append(found)
    per_target = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((per_target["row"], per_target["example"]))
    per_target = {name: values[order] for name, values in per_target.items()}
    per_target["user"] = view.user[per_target["example"]].astype(np.int64)
    per_target["request"] = _requests(run.log, run.config.loader.request_gap)[per_target["row"]]
    per_target |= {f"label/{c}": run.task.graded(c, per_target[f"label/{c}"]) for c, _ in run.task.heads}
    again = repeats(run.log) if "timestamp" in run.log.events else np.zeros(run.log.num_events, bool)
    per_target["repeat"] = again[per_target["row"]]
    once = ~per_target["repeat"]
    masks = {"all": once} | {name: mask & once for name, mask in slices(per_target).items()}
    return _rows(run.task.heads, per_target, masks, {"step": step, "split": view.name}), per_target


@functools.partial(jax.jit, static_argnames=("tables", "task"))
def _predict(model, arrays, mixers, batch, *, tables, task):
    """Predictions on every device; compiled once for a run, however often it is evaluated."""
    found = task.predict(model, functools.partial(tables.lookup, arrays, mixers), batch)
    return jax.lax.with_sharding_constraint(found, NamedSharding(tables.mesh, REPLICATED))


def _requests(log: EventLog, gap: int) -> np.ndarray:
    if "timestamp" not in log.events and "request_id" not in log.events:
        return np.arange(log.num_events)
    return request_ids(log, gap or GAP)


def _rows(heads, per_target: PerTarget, masks: Mapping[str, np.ndarray], where: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, mask in masks.items():
        request, user = per_target["request"][mask], per_target["user"][mask]
        for column, kind in heads:
            label, score = (per_target[f"{part}/{column}"][mask] for part in ("label", "score"))
            if not np.isfinite(score).all():
                bad = int((~np.isfinite(score)).sum())
                raise NonFiniteScore(
                    f"{bad} of {len(score)} predictions of {column!r} are NaN or infinite: it diverged."
                )
            for metric, cell in ranking_metrics.summarise(kind, label, score, request, user).items():
                value, stderr, n = (None if np.isnan(x) else x for x in cell)
                cells = {"slice": name, "metric": f"{metric}/{column}", "value": value, "stderr": stderr, "n": n}
                rows.append(where | cells)
    return rows
