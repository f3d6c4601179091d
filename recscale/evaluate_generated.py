"""Evaluation of a generative retriever: a beam over the semantic ids of the whole catalogue for every target.

The search (layers/beam.py) is held to tuples that exist; its width is eval.top_k. Whose items share a tuple share its
place: of a tuple with b items, first among them the rank r, each item has the ranks r .. r + b - 1 with equal chance.

* `hr@10`, `ndcg@10`: item-level, the expectation over that order. `hr_optimistic@10` puts the target first among the
  items of its tuple, `hr_pessimistic@10` last: the width between them is what collisions leave open.
* `tuple_hr@10`, `tuple_ndcg@10`: tuple-level; a hit is the tuple, whoever shares it. Not comparable with item-level.
* `.../unseen`: without the items of the user's earlier events, the target excepted, inside the search.
* `nats`: -log p(item), the tuple's probability shared by its items alike; `tuple_nats`: -log p(tuple). Both among all
  tuples of codes, existing or not. `found`: targets that are in the beam at all.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from recscale import metrics, reading
from recscale.data import splits, windows
from recscale.data.event_log import EventLog
from recscale.data.loading import targets_of
from recscale.data.splits import View
from recscale.layers.beam import beam_search, places
from recscale.layers.trie import build
from recscale.mesh import BATCH, REPLICATED, place_same
from recscale.metrics import NonFiniteScore
from recscale.run import Run, check_semantic_ids
from recscale.tasks.semantic_id import CODES

PerTarget = dict[str, np.ndarray]


def evaluate_generated(
    run: Run,
    state: dict[str, Any],
    view: View,
    step: int = 0,
    slices: Callable[[PerTarget], Mapping[str, np.ndarray]] = lambda found: {},
    poll: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], PerTarget]:
    """Generate for every target of a view; returns (rows, per_target).

    rows: {step, split, slice, metric, value, stderr, n} as recscale.evaluate gives them. per_target, in order of
    (example, row of the log): `example`, `row`, `nats`, `tuple_nats`, and for each protocol of eval.protocols `rank`,
    `bucket` and `tuple_rank` (or rank_unseen, ...): rank is that of the first item of the target's tuple, bucket how
    many share it, and all are one more than the catalogue's items where the beam does not hold it. slices: per_target
    -> masks. poll: called at every batch; may raise. Raises NonFiniteScore where the state diverged, ValueError where
    it was trained with other codes than those that are in the folder now.
    """
    c = run.config.eval
    check_semantic_ids(run, state)
    each, example_of = _one_target_each(view)
    loader = reading.generation_loader(run.config, run.task, run.log, each)
    seen = _Seen(run.log, each) if "unseen" in c.protocols else None
    trie = jax.device_put(build(_codes(run)), NamedSharding(run.mesh, REPLICATED)) if c.protocols else None
    sharing = _sharing(_codes(run))
    arrays = (state["model"], state["tables"], state["mixers"])
    how = {"tables": run.tables, "task": run.task}
    by_rows = NamedSharding(run.mesh, BATCH)
    parts: list[PerTarget] = []
    for i in range(loader.steps_per_epoch):
        poll()
        batch = loader[i]
        at, place, example, row = targets_of(run.log, each, batch)
        placed = {name: place_same(by_rows, value) for name, value in batch.items()}
        found = {"example": example, "row": row}
        nats_BL = _nats(*arrays, placed, **how)
        target_B = np.zeros(len(batch["target"]), np.int32)
        target_B[at] = batch["target"][at, place]
        for protocol in c.protocols:
            excluded = seen(example, at, row, target_B) if seen and protocol == "unseen" else None
            inputs = jax.tree.map(lambda x: place_same(by_rows, x), (target_B, excluded))
            ranks = _search(*arrays, placed, *inputs, trie, width=c.top_k, **how)
            found |= {metrics.column(name, protocol): np.asarray(value)[at] for name, value in ranks.items()}
        tuple_nats = np.asarray(nats_BL)[at, place].astype(np.float64)
        parts.append(found | {"tuple_nats": tuple_nats, "nats": tuple_nats + np.log(sharing[target_B[at]])})
    per_target = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((per_target["row"], per_target["example"]))
    per_target = {name: values[order] for name, values in per_target.items()}
    per_target["example"] = example_of[per_target["example"]]
    bad = int((~np.isfinite(per_target["nats"])).sum())
    if bad:
        raise NonFiniteScore(f"{bad} of {len(order)} targets have a probability that is NaN or zero: it diverged.")
    masks = {"all": np.ones(len(order), bool)} | dict(slices(per_target))
    where = {"step": step, "split": view.name}
    return _rows(per_target, masks, run.log.num_items, c.ks, c.protocols, where), per_target


def _one_target_each(view: View) -> tuple[View, np.ndarray]:
    """The view with one example per target, and the example of the view that each is of."""
    if view.reading == "window":
        raise ValueError(f"view {view.name!r} is read as a window: a generative retriever predicts the next item only")
    return windows.prefixes(view), splits.target_example(view)


def _codes(run: Run) -> np.ndarray:
    return run.fixed[CODES].astype(np.int32)


def _sharing(codes_VQ: np.ndarray) -> np.ndarray:
    """int64 [V + 1]: how many items have the tuple of each item; 1 for padding."""
    _, inverse, counts = np.unique(codes_VQ[1:], axis=0, return_inverse=True, return_counts=True)
    return np.concatenate([[1], counts[inverse.reshape(-1)]])


@functools.partial(jax.jit, static_argnames=("tables", "task"))
def _nats(model, arrays, mixers, batch, *, tables, task):
    found = task.nats(model, functools.partial(tables.lookup, arrays, mixers), batch)
    return jax.lax.with_sharding_constraint(found, NamedSharding(tables.mesh, REPLICATED))


@functools.partial(jax.jit, static_argnames=("tables", "task", "width"))
def _search(model, arrays, mixers, batch, target_B, excluded_BE, trie, *, tables, task, width):
    """Where the target of every row is among what its beam holds; {rank, bucket, tuple_rank}."""
    memory = task.remember(model, functools.partial(tables.lookup, arrays, mixers), batch)
    step = functools.partial(model.advance, memory)
    beams = beam_search(step, model.begin(memory, width), trie, len(target_B), width, excluded_BE)
    found_B, tuple_rank_B, first_B, bucket_B = places(beams, trie, target_B, excluded_BE)
    beyond = trie.leaf_items.shape[0] + 1
    found = {"rank": first_B, "bucket": bucket_B, "tuple_rank": tuple_rank_B}
    found = {name: jnp.where(found_B, value, beyond) for name, value in found.items()}
    return jax.lax.with_sharding_constraint(found, NamedSharding(tables.mesh, REPLICATED))


class _Seen:
    """The items of all earlier events of each target's user, as ascending ids, one width for the whole view."""

    def __init__(self, log: EventLog, view: View):
        self._items, self._begin = log.events["item_id"], np.asarray(log.offsets)[view.user.astype(np.int64)]
        longest = int((view.target_start - self._begin).max())
        self._width = 1 << max(3, (longest - 1).bit_length())

    def __call__(self, example, at, row, target_B: np.ndarray) -> np.ndarray:
        """int32 [B, E], 0 in front; the target itself is left out."""
        excluded = np.zeros((len(target_B), self._width), np.int32)
        for b, begin, end in zip(at, self._begin[example], row, strict=True):
            ids = np.unique(self._items[begin:end])
            ids = ids[ids != target_B[b]]
            excluded[b, self._width - len(ids) :] = ids
        return excluded


def _rows(per_target: PerTarget, masks, num_items: int, ks, protocols, where: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, mask in masks.items():
        cells = {kind: metrics.mean_and_stderr(per_target[kind][mask]) for kind in ("nats", "tuple_nats")}
        for protocol in protocols:
            places_of = {k: per_target[metrics.column(k, protocol)][mask] for k in ("rank", "bucket", "tuple_rank")}
            found = {"found": (places_of["rank"] <= num_items).astype(np.float64)}
            for metric, values in (found | generated_metrics(**places_of, ks=ks)).items():
                cells[metric + metrics.PROTOCOLS[protocol]] = metrics.mean_and_stderr(values)
        for metric, cell in cells.items():
            value, stderr, n = (None if np.isnan(x) else x for x in cell)
            rows.append(where | {"slice": name, "metric": metric, "value": value, "stderr": stderr, "n": n})
    return rows


def generated_metrics(rank: np.ndarray, bucket: np.ndarray, tuple_rank: np.ndarray, ks) -> dict[str, np.ndarray]:
    """Name -> value of each target [n]; rank, bucket, tuple_rank: int [n] as in per_target. See the module docstring.

    The ranks of a target that no beam holds are beyond the catalogue, so that it counts as missed at every k.
    """
    found: dict[str, np.ndarray] = {}
    for k in ks:
        found |= {f"{name}@{k}": shared(rank, bucket, k) for name, shared in metrics.SHARED_METRICS.items()}
        found[f"hr_optimistic@{k}"] = metrics.hit_rate(rank, k)
        found[f"hr_pessimistic@{k}"] = metrics.hit_rate(rank + bucket - 1, k)
        found[f"tuple_hr@{k}"] = metrics.hit_rate(tuple_rank, k)
        found[f"tuple_ndcg@{k}"] = metrics.ndcg(tuple_rank, k)
    return found
