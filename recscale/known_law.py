"""A trained run against data whose law is known: how much of the best possible ranking and loss it reaches.

Where p(next item | history) is known exactly (recscale.data.planted_floors.next_item_law), a list of items has an
expected hit rate, which is free of the noise of who took what, and the best list is known too. Scores of any kind
become probabilities by one temperature, so that models that do not predict probabilities can be compared with those
that do.

Shapes: T targets, V items (column v - 1 is item v), D width of the item vectors, K = 10 listed items, B rows.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from recscale import reading
from recscale.data import windows
from recscale.data.loading import targets_of
from recscale.program import task_of
from recscale.run import Run, inference
from recscale.serve.trained import trained


def expected(listed_TK: np.ndarray, law_TV: np.ndarray) -> dict[str, float]:
    """HR@10 and NDCG@10 of lists of ten, expected over the true law of the target: no noise of who took what."""
    p_TK = np.take_along_axis(law_TV, listed_TK, axis=1)
    discount_K = 1.0 / np.log2(np.arange(2, 12))
    return {"hr@10": float(p_TK.sum(1).mean()), "ndcg@10": float((p_TK * discount_K).sum(1).mean())}


def top(scores_TV: np.ndarray) -> np.ndarray:
    """The ten best columns of every row, best first."""
    best_TK = np.argpartition(-scores_TV, 10, axis=1)[:, :10]
    order_TK = np.argsort(-np.take_along_axis(scores_TV, best_TK, axis=1), axis=1)
    return np.take_along_axis(best_TK, order_TK, axis=1)


def nats(scores_TV: np.ndarray, target_T: np.ndarray, sharpness: float) -> float:
    """Mean -log softmax(sharpness * scores) of the targets."""
    z_TV = sharpness * (scores_TV - scores_TV.max(1, keepdims=True)).astype(np.float64)
    return float((np.log(np.exp(z_TV).sum(1)) - z_TV[np.arange(len(target_T)), target_T]).mean())


def calibrated(scores_TV: np.ndarray, target_T: np.ndarray) -> float:
    """The sharpness (1 / temperature) of the least nats: a grid, then a finer one around its best."""
    grid = np.geomspace(1e-2, 1e2, 31)
    for _ in range(2):
        found = [nats(scores_TV, target_T, b) for b in grid]
        at = int(np.argmin(found))
        best, grid = grid[at], np.geomspace(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)], 15)
    return float(best)


@functools.partial(jax.jit, static_argnames=("tables", "task"))
def _scores(model, arrays, mixers, batch, row_B, *, tables, task):
    lookup = functools.partial(tables.lookup, arrays, mixers)
    items_VD = task.item(lookup(task.catalogue, jnp.arange(1, task.num_items + 1)))
    if task.denoises:
        return task.scores(task.queries_of(task.generate(model, lookup, batch, row_B)), items_VD), items_VD
    slot_B11 = jnp.argmax(batch["target"] > 0, axis=1)[:, None, None]
    return task.scores(jnp.take_along_axis(task.queries(model, lookup, batch), slot_B11, axis=1)[:, 0], items_VD), None


def scores(run: Run, state: dict[str, Any], split: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores [T, V] of all items at every target of a split; and the item vectors [V, D] of a run that denoises."""
    view = windows.prefixes(run.views[split])
    loader, parts, items_VD = reading.generation_loader(run.config, run.task, run.log, view), {}, None
    with jax.set_mesh(run.mesh):
        for i in range(loader.steps_per_epoch):
            batch = loader[i]
            at, _, example, row = targets_of(run.log, view, batch)
            row_B = np.zeros(len(batch["target"]), np.int32)
            row_B[at] = row
            arrays = (state["model"], state["tables"], state["mixers"])
            found, items_VD = _scores(*arrays, batch, row_B, tables=run.tables, task=run.task)
            parts |= dict(zip(example.tolist(), np.asarray(found)[at], strict=True))
    return np.stack([parts[n] for n in range(len(view))]), None if items_VD is None else np.asarray(items_VD)


def changed(run: Run, changes: Mapping[str, Any]) -> Run:
    """The run with other settings of sampling."""
    config = ConfigDict(run.config.to_dict())
    config.task.update(changes)
    return dataclasses.replace(run, config=config.lock(), task=task_of(config, run.log.num_items))


def judged(run: Run, state: dict[str, Any], law_TV: np.ndarray) -> dict[str, float]:
    """How close a run comes to the law of its test targets: {nats, sharpness, hr@10, ndcg@10}, and `ceilings`.

    The nats are an upper bound: one temperature, chosen on "val", makes the scores probabilities. Ceilings are those of
    a run that denoises.
    """
    found_TV, items_VD = scores(run, state, "test")
    sharpness = calibrated(scores(run, state, "val")[0], targets(run, "val"))
    row = {"nats": nats(found_TV, targets(run, "test"), sharpness), "sharpness": sharpness}
    row |= expected(top(found_TV), law_TV)
    return row if items_VD is None else row | ceilings(items_VD, law_TV)


def targets(run: Run, split: str) -> np.ndarray:
    """Column of every target of a split."""
    return run.log.events["item_id"][windows.prefixes(run.views[split]).target_start] - 1


def judged_with(
    workdir: Path, several: Mapping[str, Mapping[str, Any]], law_TV: np.ndarray
) -> dict[str, dict[str, float]]:
    """`judged` of a finished run under several named settings of sampling, and `inference`: FLOPs of an answer.

    What was found before is read from WORKDIR/known.json. Raises ValueError or OSError where there is no run.
    """
    file = workdir / "known.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    lacking = {name: changes for name, changes in several.items() if name not in found}
    if lacking:
        run, state = trained(workdir)
        for name, changes in lacking.items():
            new = changed(run, changes) if changes else run
            found[name] = judged(new, state, law_TV) | {"inference": inference(new)["total"]}
            file.write_text(json.dumps(found, indent=1))
    return {name: found[name] for name in several}


def ceilings(items_VD: np.ndarray, law_TV: np.ndarray) -> dict[str, float]:
    """HR@10 of the best that a diffusion over these item vectors can learn: its exact mean, and one exact sample."""
    similar_VV = items_VD @ items_VD.T
    mean = expected(top(law_TV @ similar_VV), law_TV)["hr@10"]
    listed_VV = np.zeros(similar_VV.shape)
    np.put_along_axis(listed_VV, top(similar_VV), 1.0, axis=1)
    sample = (law_TV * (law_TV @ listed_VV.T)).sum(1).mean()
    return {"exact mean": mean, "exact sample": float(sample)}
