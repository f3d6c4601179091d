"""Evaluation over the whole catalogue, streamed over users and item blocks in bounded memory.

Order and ties: items are ordered by (score descending, id ascending), so an equal score counts before the target only
where its id is smaller. Padding (id 0) is never ranked. Two protocols, two metric names: `hr@10` ranks the whole
catalogue, `hr@10/unseen` first removes every item of the user's earlier events in the log (all of them, not the
truncated history), the target excepted. `nats` is -log p(target) under the softmax over the whole catalogue.

Batches of histories are shared by the devices of the mesh; queries are ranked by all of them together, each against the
items that it holds. On several hosts every process reads the whole view, and each has all results.

    python -m recscale.evaluate --config=configs/hstu_ml1m.py --workdir=runs/hstu_ml1m [--split=test]
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding
from ml_collections import config_flags

from recscale import metrics, reading
from recscale.checkpoint import Checkpoints
from recscale.data.event_log import EventLog, EventLogError
from recscale.data.loading import targets_of
from recscale.data.slices import SLICES
from recscale.data.splits import View, runs
from recscale.evaluate_denoised import evaluate_denoised
from recscale.evaluate_feedback import evaluate_feedback
from recscale.evaluate_generated import evaluate_generated
from recscale.layers.ranking import pack_seen, rank_catalogue
from recscale.layers.tables import Arrays, Mixers, Tables
from recscale.mesh import BATCH, REPLICATED, place_same
from recscale.metrics import NonFiniteScore
from recscale.program import abstract_state
from recscale.run import Run, build


def evaluate(
    model: Any,
    arrays: Arrays,
    mixers: Mixers,
    tables: Tables,
    task: Any,
    loader: Any,
    log: EventLog,
    view: View,
    *,
    step: int = 0,
    ks: Sequence[int] = (10,),
    protocols: Sequence[str] = ("full", "unseen"),
    block: int = 4096,
    top_k: int = 10,
    chunk: int = 256,
    slices: Mapping[str, np.ndarray] | None = None,
    nats_only: bool = False,
    poll: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Rank every target of the view; returns (rows, per_target).

    arrays, mixers: of `tables`, as in a train state. task: `catalogue`, the name of the item table,
    `queries(model, lookup, batch) -> [B, R, D]` and `item(vectors) -> vectors`, both pure; see tasks/next_item.py.
    loader: over this log and view, shuffle=False, with_example=True, window="last", process_count=1 on every process;
    its batch size a multiple of the mesh's devices. chunk: targets ranked at a time (fixed: only one shape is
    compiled); block: items scored at a time on each device. top_k: length of the lists behind `coverage@k`, for the k
    of ks that are <= top_k; 0 leaves it out. nats_only: no ranking at all. poll: called at every
    chunk; may raise.

    rows: {step, split, slice, metric, value, stderr, n}; value and stderr are None where undefined (empty slice, n = 1,
    coverage has no stderr). slices: name -> bool mask over the view's examples [N], or over all its targets [T] in the
    order of `splits.target_rows`.
    per_target, in order of (example, log row): `example` (index into the view), `row` (the target's row in the log),
    `nats`, and `rank`, `rank_unseen`. A view read as "window" has one query per example: `nats` is that of its first
    target, and instead of ranks there are `num_targets` (repeats counted) and the bool lists `hits`, `hits_unseen`
    [n, top_k]; items among the targets are never filtered as seen.

    Raises NonFiniteScore on a NaN or infinite score; ValueError on a loader that does not deliver each example of the
    view exactly once or whose targets are not the log's, on slices of the wrong length, on top lists too short for a
    window view.
    """
    window = view.reading == "window"
    protocols = () if nats_only else tuple(protocols)
    if window and protocols and top_k < max(ks):
        raise ValueError(f"top_k={top_k} but the view {view.name!r} is read as a window: give top_k >= {max(ks)}.")
    how = {"tables": tables, "task": task, "block": block, "top_k": top_k, "protocols": protocols}
    layouts = tables.catalogue_specs(task.catalogue)  # arrays of shared rows go to every device once, not at every call
    items = {name: jax.device_put(arrays[name], NamedSharding(tables.mesh, spec)) for name, spec in layouts.items()}
    place = functools.partial(place_same, NamedSharding(tables.mesh, REPLICATED))
    queries = functools.partial(_queries, model, arrays, mixers, tables=tables, task=task)
    collected, waiting = [], None
    for query_nD, example, row in _in_chunks(_targets(queries, tables, loader, log, view, chunk), chunk):
        poll()
        seen = _seen(log, view, example, row, window) if "unseen" in protocols else None
        query_QD = np.zeros((chunk, query_nD.shape[1]), query_nD.dtype)
        query_QD[: len(row)] = query_nD
        target_Q = np.zeros(chunk, np.int32)
        target_Q[: len(row)] = log.events["item_id"][row]
        result = rank_catalogue(*jax.tree.map(place, (query_QD, target_Q, seen)), items, mixers, **how)
        if waiting is not None:  # the host prepares this chunk while the device ranks the one before
            collected.append(_fetch(*waiting))
        waiting = (result, example, row)
    if waiting is not None:
        collected.append(_fetch(*waiting))
    found = {name: np.concatenate([part[name] for part in collected]) for name in collected[0]} if collected else {}
    per_target, lists = _in_view_order(found, view, log, window)
    masks = {"all": np.ones(len(per_target["row"]), bool)}
    masks |= {name: _target_mask(name, mask, view, per_target) for name, mask in (slices or {}).items()}
    return _rows(per_target, lists, masks, log.num_items, ks, {"step": step, "split": view.name}), per_target


@functools.partial(jax.jit, static_argnames=("tables", "task"))
def _queries(model, arrays, mixers, batch, *, tables, task):
    hidden_BRD = task.queries(model, functools.partial(tables.lookup, arrays, mixers), batch)
    return hidden_BRD.reshape(-1, hidden_BRD.shape[-1]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="mesh")
def _take(query_TD, index_Q, *, mesh):
    """Some of the queries, on every device."""
    return jax.lax.with_sharding_constraint(query_TD[index_Q], NamedSharding(mesh, REPLICATED))


def _targets(queries, tables, loader, log, view, chunk) -> Iterator[tuple[np.ndarray, ...]]:
    """Per batch: the queries of its targets [n, D], their example and their row in the log."""
    by_rows, everywhere = (NamedSharding(tables.mesh, spec) for spec in (BATCH, REPLICATED))
    for i in range(loader.steps_per_epoch):
        batch = loader[i]
        batch_row, place, example, row = targets_of(log, view, batch)
        if not len(place):
            continue
        query_TD = queries({name: place_same(by_rows, value) for name, value in batch.items()})
        flat = batch_row * batch["target"].shape[1] + place
        for start in range(0, len(flat), chunk):
            index = np.zeros(chunk, np.int32)
            part = slice(start, start + chunk)
            index[: len(flat[part])] = flat[part]
            query_QD = _take(query_TD, place_same(everywhere, index), mesh=tables.mesh)
            yield np.asarray(query_QD)[: len(flat[part])], example[part], row[part]


def _in_chunks(parts: Iterator[tuple[np.ndarray, ...]], size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Regroup arrays of any length into pieces of `size`, the last one shorter: every ranking call is full."""
    held = None
    for part in parts:
        held = part if held is None else tuple(np.concatenate(pair) for pair in zip(held, part, strict=True))
        while len(held[0]) >= size:
            yield tuple(array[:size] for array in held)
            held = tuple(array[size:] for array in held)
    if held is not None and len(held[0]):
        yield held


def _events(log: EventLog, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The item ids of runs start:stop of the log, and which run each belongs to."""
    owner = np.repeat(np.arange(len(start)), stop - start)
    return owner, log.events["item_id"][runs(start, stop - start)]


def _seen(log, view, example, row, window) -> tuple[np.ndarray, np.ndarray]:
    """Packed pairs of all earlier events of each target's user, from the user's first event in the log."""
    owner, item = _events(log, log.offsets[view.user[example]], row)
    if window:
        target_owner, target_item = _events(log, view.target_start[example], view.stop[example])
        wanted = target_owner * np.int64(log.num_items + 1) + target_item
        kept = ~np.isin(owner * np.int64(log.num_items + 1) + item, wanted)
        owner, item = owner[kept], item[kept]
    return pack_seen(owner, item)


def _fetch(result: dict[str, jax.Array], example: np.ndarray, row: np.ndarray) -> dict[str, np.ndarray]:
    """Bring a chunk to the host, without its filling; raises NonFiniteScore."""
    values = {name: np.asarray(value)[: len(row)] for name, value in result.items()}
    bad = int((~values.pop("finite")).sum())
    if bad:
        raise NonFiniteScore(
            f"{bad} of {len(row)} queries have a NaN or infinite score (first: example "
            f"{int(example[np.argmin(np.asarray(result['finite'])[: len(row)])])}): the model or the tables diverged."
        )
    return values | {"nats": -values.pop("log_prob").astype(np.float64), "example": example, "row": row}


def _in_view_order(found, view, log, window) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """per_target and the top lists per protocol suffix, sorted by (example, row); checks that nothing is missing."""
    example = found.get("example", np.zeros(0, np.int64))
    order = np.lexsort((found["row"], example)) if len(example) else example
    found = {name: value[order] for name, value in found.items()}
    missing = len(view) - len(np.unique(example))
    twice = len(example) - len(np.unique(found["row"])) if len(example) else 0
    if missing or twice:
        raise ValueError(
            f"view {view.name!r}: {missing} of {len(view)} examples missing, {twice} targets delivered twice; "
            "make the loader from this view with shuffle=False and process_count=1."
        )
    per_target = {name: found[name] for name in ("example", "row", "nats")}
    lists = {name.removeprefix("top/"): value for name, value in found.items() if name.startswith("top/")}
    if not window:
        ranks = {name: value for name, value in found.items() if name.startswith("rank/")}
        return per_target | {metrics.column("rank", name.removeprefix("rank/")): v for name, v in ranks.items()}, lists
    owner, item = _events(log, view.target_start[per_target["example"]], view.stop[per_target["example"]])
    per_target["num_targets"] = (view.stop - view.target_start)[per_target["example"]]
    for name, top in lists.items():
        per_target[metrics.column("hits", name)] = metrics.hits_in_lists(top, owner, item, log.num_items)
    return per_target, lists


def _target_mask(name, mask, view, per_target) -> np.ndarray:
    """A slice over examples or over all targets of the view -> over the targets that were ranked.

    An example of a window view belongs to a slice over targets by its first target.
    """
    count = view.stop - view.target_start
    if len(mask) == len(view):
        return mask[per_target["example"]]
    if len(mask) == count.sum():
        place = np.cumsum(count) - count - view.target_start
        return mask[place[per_target["example"]] + per_target["row"]]
    raise ValueError(
        f"slice {name!r}: {len(mask)} values; view {view.name!r} has {len(view)} examples, {count.sum()} targets."
    )


def _rows(per_target, lists, masks, num_items, ks, where) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for slice_name, mask in masks.items():
        values = {name: value[mask] for name, value in per_target.items()}
        tops = {name: value[mask] for name, value in lists.items()}
        for metric, cell in metrics.summarise(values, tops, num_items, ks).items():
            value, stderr, n = (None if np.isnan(x) else x for x in cell)
            rows.append(where | {"slice": slice_name, "metric": metric, "value": value, "stderr": stderr, "n": n})
    return rows


def evaluate_split(
    run: Run,
    state: dict[str, Any],
    split: str,
    step: int,
    final: bool = False,
    poll: Callable[[], None] = lambda: None,
):
    """Evaluate a train state on a split of its run, as config.eval says; returns (rows, per_target) of `evaluate`.

    final: with the top lists behind coverage and by slice (new users, new items, length of history). poll: as for
    `evaluate`. Raises ValueError for a split the run does not have, NonFiniteScore where the state diverged.
    """
    if split not in run.views:
        raise ValueError(f"split {split!r}: this run has {tuple(run.views)}; see split and eval in the config")
    view = run.views[split]
    slices = _slices(run, view) if final else {}
    rows, per_target = [], {}

    def masks(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: _target_mask(name, mask, view, found) for name, mask in slices.items()}

    if run.task.generates:
        return evaluate_generated(run, state, view, step, masks, poll)
    if run.task.denoises:
        return evaluate_denoised(run, state, view, step, final, masks, poll)
    if run.task.ranks_catalogue:
        rows, per_target = _catalogue(run, state, view, step, final, slices, poll)
    if run.task.heads:
        more, found = evaluate_feedback(run, state, view, step, masks, poll)
        rows, per_target = rows + more, per_target | found
    return rows, per_target


def _catalogue(run: Run, state, view: View, step: int, final: bool, slices, poll):
    c = run.config.eval
    loader = reading.eval_loader(run.config, run.task, run.log, view)
    return evaluate(
        state["model"],
        state["tables"],
        state["mixers"],
        run.tables,
        run.task,
        loader,
        run.log,
        view,
        step=step,
        ks=c.ks,
        protocols=c.protocols,
        block=c.block,
        chunk=c.chunk,
        top_k=c.top_k if final else 0,
        slices=slices,
        nats_only=not c.protocols,
        poll=poll,
    )


def _slices(run: Run, view: View) -> dict[str, np.ndarray]:
    """The slices that divide the view: a mask that holds everywhere or nowhere says nothing."""
    named = [masks for cut in SLICES.values() for masks in cut(run.log, view, run.views["train"]).items()]
    return {name: mask for name, mask in named if mask.any() and not mask.all()}


def main(_argv: list[str]) -> None:
    """Command line: evaluate the selected (else the newest) checkpoint of a workdir and print one row per metric."""
    logging.set_verbosity(logging.WARNING)
    try:
        workdir, run = Path(str(_WORKDIR.value)), build(_CONFIG.value)
        folder = workdir / ("best" if _CONFIG.value.train.select else "checkpoints")
        with Checkpoints(folder, keep=1, read_only=True) as checkpoints:
            step = checkpoints.latest()
            if step is None:
                raise ValueError(f"{folder}: no checkpoint; train first, with the same --config and --workdir")
            state, _ = checkpoints.restore(step, abstract_state(run))
        rows, _ = evaluate_split(run, state, _SPLIT.value, step, final=True)
    except (EventLogError, ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(json.dumps(row) for row in rows))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config the workdir was trained with", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run")
    _SPLIT = flags.DEFINE_string("split", "test", "Which split to evaluate")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
