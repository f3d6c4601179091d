"""Evaluation of a diffusion recommender: a vector is sampled for every target, and the whole catalogue ranked by it.

Ranks, metrics and protocols are those of recscale/evaluate.py. What is added:

* `hr@20/dreamrec_legacy`, ...: the protocol of DreamRec's own code. The encoder's dropout is on, the padding row
  competes (an untrained vector, drawn as the items' once were), of batches of 100 the last is left out where it is not
  full, histories may be empty, seen items stay, one sample per user by all steps of the chain. Not comparable with
  the others, and the only ones that depend on eval.batch_size: by the dropout.
* `density_nats`: -log density of the target's vector given its history, in nats per vector, by the probability-flow ODE
  (task.likelihood_steps, likelihood_probes). It is of a vector, not of an item, and moves with the vectors' scale.
* `spread`: 1 - cosine between two samples of a user, mean over pairs and users; `distinct`: different nearest items
  among the samples of a user, as a share of them. Both only where task.samples > 1.

`nats` is -log softmax of the scores: it is calibrated only as far as task.temperature is.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from recscale import metrics, reading
from recscale.data import splits, windows
from recscale.data.event_log import EventLog
from recscale.data.loading import targets_of
from recscale.data.splits import View, runs
from recscale.layers.ranking import pack_seen, rank_catalogue, top_items
from recscale.mesh import BATCH, REPLICATED, place_same
from recscale.metrics import NonFiniteScore
from recscale.run import Run
from recscale.tasks.denoising import Task

LEGACY = "dreamrec_legacy"  # of metrics.PROTOCOLS
LEGACY_BATCH = 100
PerTarget = dict[str, np.ndarray]


def evaluate_denoised(
    run: Run,
    state: dict[str, Any],
    view: View,
    step: int = 0,
    final: bool = False,
    slices: Callable[[PerTarget], Mapping[str, np.ndarray]] = lambda found: {},
    poll: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], PerTarget]:
    """Sample for every target of a view and rank; returns (rows, per_target).

    rows: {step, split, slice, metric, value, stderr, n} as recscale.evaluate gives them. per_target, in order of
    (example, row of the log): `example`, `row`, `nats`, `rank` and the like per protocol, and where they are measured
    `density_nats`, `spread`, `distinct`. final: with density, coverage and the legacy protocol, which take time.
    slices: per_target -> masks. poll: called at every batch; may raise. Raises NonFiniteScore where the state diverged,
    ValueError for a view that is read as a window.
    """
    c, task = run.config.eval, cast(Task, run.task)
    if view.reading == "window":
        raise ValueError(f"view {view.name!r} is read as a window: a diffusion recommender predicts the next item only")
    each, example_of = windows.prefixes(view), splits.target_example(view)
    loader = reading.generation_loader(run.config, task, run.log, each)
    legacy = final and LEGACY in c.protocols
    protocols = tuple(name for name in c.protocols if name != LEGACY)
    top_k = c.top_k if final else 0
    by_rows = NamedSharding(run.mesh, BATCH)
    arrays = (state["model"], state["tables"], state["mixers"])
    how = {"tables": run.tables, "task": task}
    search = {"block": c.block, "top_k": top_k, "protocols": protocols}
    parts: list[PerTarget] = []
    for i in range(loader.steps_per_epoch):
        poll()
        batch = loader[i]
        at, _, example, row = targets_of(run.log, each, batch)
        row_B = np.zeros(len(batch["target"]), np.int32)
        row_B[at] = row % np.iinfo(np.int32).max
        placed = {name: place_same(by_rows, value) for name, value in batch.items()}
        seen = _seen(run.log, each, example, at, row) if "unseen" in protocols else None
        target_B, seen, row_B = _everywhere(run, (batch["target"].max(axis=1), seen, row_B))
        x_BKD = _generate(*arrays, placed, row_B, None, **how)
        found = rank_catalogue(task.queries_of(x_BKD), target_B, seen, *arrays[1:], **how, **search)
        if task.config.samples > 1:
            found |= _variety(x_BKD, *arrays[1:], **how, block=c.block)
        if final and task.config.likelihood_steps:
            found["density_nats"] = _density(*arrays, placed, row_B, **how)
        if legacy:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(task.config.seed), step), i)
            found[f"rank/{LEGACY}"] = _legacy_rank(*arrays, placed, row_B, target_B, key, **how, block=c.block)
        found = {name: np.asarray(value)[at] for name, value in found.items()}
        parts.append(found | {"example": example, "row": row})
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((found["row"], found["example"]))
    found = {name: values[order] for name, values in found.items()}
    bad = int((~found.pop("finite")).sum())
    if bad:
        raise NonFiniteScore(f"{bad} of {len(order)} targets have a NaN or infinite score: the run diverged.")
    per_target = {"example": example_of[found["example"]], "row": found["row"]}
    per_target["nats"] = -found.pop("log_prob").astype(np.float64)
    ranks = {name: values for name, values in found.items() if name.startswith("rank/")}
    per_target |= {metrics.column("rank", name.removeprefix("rank/")): values for name, values in ranks.items()}
    per_target |= {name: found[name].astype(np.float64) for name in EXTRA if name in found}
    lists = {name.removeprefix("top/"): values for name, values in found.items() if name.startswith("top/")}
    masks = {"all": np.ones(len(order), bool)} | dict(slices(per_target))
    where = {"step": step, "split": view.name}
    return _rows(per_target, lists, masks, run.log.num_items, c.ks, where), per_target


EXTRA = ("density_nats", "spread", "distinct")


def _everywhere(run: Run, values: Any) -> Any:
    return jax.tree.map(lambda x: place_same(NamedSharding(run.mesh, REPLICATED), x), values)


@functools.partial(jax.jit, static_argnames=("tables", "task"))
def _generate(model, arrays, mixers, batch, row_B, key, *, tables, task):
    found = task.generate(model, functools.partial(tables.lookup, arrays, mixers), batch, row_B, key)
    return jax.lax.with_sharding_constraint(found, NamedSharding(tables.mesh, REPLICATED))


@functools.partial(jax.jit, static_argnames=("tables", "task"))
def _density(model, arrays, mixers, batch, row_B, *, tables, task):
    found = task.density_nats(model, functools.partial(tables.lookup, arrays, mixers), batch, row_B)
    return jax.lax.with_sharding_constraint(found, NamedSharding(tables.mesh, REPLICATED))


def _variety(x_BKD, arrays, mixers, *, tables, task, block) -> dict[str, jax.Array]:
    """How much the samples of a user differ: {spread, distinct}, [B] each."""
    B, K, _ = x_BKD.shape
    one_each = task.queries_of(x_BKD.reshape(B * K, 1, -1))
    nearest = top_items(one_each, None, arrays, mixers, tables=tables, task=task, block=block, top_k=1)
    return _compared(x_BKD, nearest.reshape(B, K))


@jax.jit
def _compared(x_BKD, nearest_BK):
    K = x_BKD.shape[1]
    unit = x_BKD / jnp.maximum(jnp.linalg.norm(x_BKD, axis=-1, keepdims=True), 1e-12)
    cosine = (jnp.square(unit.sum(axis=1)).sum(axis=-1) - K) / (K * (K - 1))  # mean over pairs of different samples
    ordered = jnp.sort(nearest_BK, axis=1)
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return {"spread": 1.0 - cosine, "distinct": distinct / K}


def _legacy_rank(model, arrays, mixers, batch, row_B, target_B, key, *, tables, task, block):
    """Ranks as the reference's code finds them, of its own sample; int32 [B]. key: dropout."""
    one = task.alone
    x_B1D = _generate(model, arrays, mixers, batch, row_B, key, tables=tables, task=one)
    how = {"tables": tables, "task": one}
    found = rank_catalogue(
        one.queries_of(x_B1D), target_B, None, arrays, mixers, block=block, protocols=("full",), **how
    )
    return found["rank/full"] + _padding_wins(x_B1D[:, 0], target_B, arrays, mixers, **how)


@functools.partial(jax.jit, static_argnames=("tables", "task"))
def _padding_wins(x_BD, target_B, arrays, mixers, *, tables, task):
    """1 where the vector of padding scores higher than the target."""
    own_BD = tables.lookup(arrays, mixers, task.catalogue, target_B)
    padding_D = task.config.deviation * jax.random.normal(jax.random.key(task.config.seed), own_BD.shape[1:])
    query = task.queries_of(x_BD[:, None])
    wins = task.scores(query, task.item(padding_D[None]))[:, 0] > jnp.diagonal(task.scores(query, task.item(own_BD)))
    return wins.astype(jnp.int32)


def _seen(log: EventLog, view: View, example: np.ndarray, at: np.ndarray, row: np.ndarray):
    """Packed pairs of all earlier events of each target's user."""
    begin = log.offsets[view.user[example]]
    owner = np.repeat(at, row - begin)
    return pack_seen(owner, log.events["item_id"][runs(begin, row - begin)])


def _rows(per_target: PerTarget, lists, masks, num_items: int, ks, where: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, mask in masks.items():
        values = {key: value[mask] for key, value in per_target.items()}
        legacy = values.pop(metrics.column("rank", LEGACY), None)
        cells = metrics.summarise(values, {key: value[mask] for key, value in lists.items()}, num_items, ks)
        cells |= {key: metrics.mean_and_stderr(values[key]) for key in EXTRA if key in values}
        if legacy is not None and name == "all":
            whole = legacy[: len(legacy) // LEGACY_BATCH * LEGACY_BATCH]
            for k in ks:
                for metric in ("hr", "ndcg"):
                    cell = metrics.mean_and_stderr(metrics.METRICS[metric](whole, k))
                    cells[f"{metric}@{k}/{LEGACY}"] = cell
        for metric, cell in cells.items():
            value, stderr, n = (None if np.isnan(x) else x for x in cell)
            rows.append(where | {"slice": name, "metric": metric, "value": value, "stderr": stderr, "n": n})
    return rows
