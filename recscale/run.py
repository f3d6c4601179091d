"""A run: a program and its data, from a config; what it costs and what it reads."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from recscale import reading
from recscale.data import codes, pieces, splits
from recscale.data.codes import item_counts
from recscale.data.event_log import EventLog
from recscale.data.loading import Loader
from recscale.layers.kinds import Table, information_abundance
from recscale.mesh import REPLICATED, place_same
from recscale.program import Program, check_config, draw_dense, draw_tables, parameters, program, shardings, task_of
from recscale.semantic_ids import catalogue
from recscale.tasks import denoising
from recscale.tasks.next_item import FREQUENCY
from recscale.tasks.semantic_id import CODES
from recscale.warm_start import warm_start

TRAIN_MULTIPLIER = 3  # a backward pass costs two forward passes


@dataclasses.dataclass(frozen=True)
class Run(Program):
    """A program and its data."""

    log: EventLog
    views: dict[str, splits.View]
    loader: Loader
    fixed: dict[str, np.ndarray]


def build(config: ml_collections.ConfigDict) -> Run:
    """Build a run; raises TypeError or ValueError for a config that does not fit, EventLogError for the data."""
    check_config(config)
    if config.train.branch_from and config.train.warm_start:
        raise ValueError("train.branch_from and train.warm_start: a run begins with one other run at most")
    log = EventLog.open(config.data.path)
    for key, found in (("num_items", log.num_items), ("num_events", log.num_events)):
        if config.data[key] not in (0, found):
            raise ValueError(f"data.{key} = {config.data[key]}, but {config.data.path} has {found}: set it to 0")
    views = reading.views(config, log)
    cardinalities = reading.cardinalities(config, log)
    loader = reading.train_loader(config, task_of(config, log.num_items), log, views["train"])
    steps = max(1, round(config.train.epochs * loader.num_rows / config.loader.batch_size))
    parts = program(config, log.num_items, cardinalities, steps)
    fixed = _fixed_values(parts, log, views["train"])
    return Run(**vars(parts), log=log, views=views, loader=loader, fixed=fixed)


def init_state(run: Run) -> dict[str, Any]:
    """The train state on the run's mesh; the fixed arrays hold what the training data says."""
    layouts, seed = shardings(run), np.uint32(run.config.seed)  # not a constant: all seeds share a compiled program
    parts = ("tables", "table_state", "mixers")
    tables = jax.jit(functools.partial(draw_tables, run), out_shardings={k: layouts[k] for k in parts})(seed)
    rest = {k: layout for k, layout in layouts.items() if k not in parts}
    state = tables | jax.jit(functools.partial(draw_dense, run), out_shardings=rest)(seed, tables["mixers"])
    for name, values in run.fixed.items():
        state["tables"][name] = place_same(run.tables.sharding(name), run.tables.arrays[name].place(values))
    if run.config.train.warm_start:
        state = warm_start(state, Path(run.config.train.warm_start), run.task.inside)
    return state


def _fixed_values(run: Program, log: EventLog, view: splits.View) -> dict[str, np.ndarray]:
    """Values by id [V + 1, q] of the arrays that are not trained: item frequencies, and the codes of a table."""
    t, values = run.config.table, {}
    if run.task.generates:
        return {CODES: semantic_ids(run, log).codes_VQ.astype(np.float32)}
    spec = run.tables.specs[run.task.catalogue]
    if run.task.needs_frequency:
        counts = item_counts(log, view)
        values[FREQUENCY] = (counts / counts.sum()).astype(np.float32)[:, None]
    if spec.num_codes:
        name = run.tables.parts(run.task.catalogue)["codes"]
        if t.kind == "capped":
            values[name] = codes.frequency_rows(item_counts(log, view)[:, None], spec.rows)
        else:
            found = _item_codes(run, log, view, spec)
            values[name] = pieces.learn(found, item_counts(log, view), spec.rows) if t.kind == "pieces" else found
    return values


def _item_codes(run: Program, log: EventLog, view: splits.View, spec: Table) -> np.ndarray:
    """Codes [V + 1, parts] of config.table.codes: a folder of semantic ids, a .npy file, "" for who took what."""
    source = run.config.table.codes
    if not source:
        return codes.svd_codes(log, view, spec.num_codes, seed=run.config.seed)
    levels = np.iinfo(np.int32).max if spec.kind == "pieces" else spec.levels
    if Path(source).is_dir():
        return codes.first_levels(catalogue.read(source, log).codes_VQ, spec.num_codes, levels, source)
    return codes.load_codes(source, spec.num_ids, spec.num_codes, levels)


def semantic_ids(run: Program, log: EventLog) -> catalogue.Codes:
    """The codes that config.table.codes names; raises ValueError where they are not of this log or not of the model."""
    folder, model = run.config.table.codes, run.model_config
    if not folder:
        raise ValueError("table.codes is empty: task 'semantic_id' needs the folder of the items' codes")
    found = catalogue.read(folder, log)
    if found.levels != model.levels or max(found.sizes) > model.codebook:
        raise ValueError(
            f"{folder}: {found.levels} levels of {found.sizes} codes, but model.levels = {model.levels} and "
            f"model.codebook = {model.codebook}: expected as many levels, and no more codes than model.codebook"
        )
    return found


@functools.partial(jax.jit, static_argnames="mesh")
def _rows_that_differ(a: jax.Array, b: jax.Array, *, mesh: Mesh) -> jax.Array:
    """How many rows of two arrays are not equal, on every device."""
    return jax.lax.with_sharding_constraint((a != b).any(axis=1).sum(), NamedSharding(mesh, REPLICATED))


def check_semantic_ids(run: Run, state: dict[str, Any]) -> None:
    """Raise ValueError where a state was trained with other semantic ids than those now in the folder of the config."""
    stored = state["tables"][CODES]
    placed = place_same(run.tables.sharding(CODES), run.tables.arrays[CODES].place(run.fixed[CODES]))
    differ = int(_rows_that_differ(stored, placed, mesh=run.mesh))
    if differ:
        raise ValueError(
            f"{run.config.table.codes}: the codes of {differ:,} of {run.log.num_items:,} items are not those that this "
            "run was trained with: put those back, or train again"
        )


def costs(run: Run, steps: int) -> dict[str, Any]:
    """Parameters per group, and training FLOPs and lookup bytes of `steps` steps by part (real tokens, not padding).

    Of a task that ranks the catalogue also what an answer costs, `inference`; of one that denoises what a sample does,
    `sampling` (tasks/denoising.py); of semantic ids, generated or in the item table, `semantic_ids`: what they are.
    """
    c, dim = run.config, run.model_config.embed_dim
    tokens = run.loader.lengths * run.task.tokens_per_event + run.task.prefix
    lengths, counts = np.unique(tokens, return_counts=True)
    parts = {"projections": 0.0, "attention": 0.0}
    for length, count in zip(lengths, counts, strict=True):
        for part, value in run.model.flops(run.model_config, int(length)).items():
            parts[part] += value * float(count)
    parts["head"] = run.loader.num_targets * _head_flops(run, dim)
    epochs = steps * c.loader.batch_size / run.loader.num_rows
    flops = {part: TRAIN_MULTIPLIER * epochs * value for part, value in parts.items()}
    flops["train_total"] = sum(flops.values())
    flops["lookup_bytes"] = 4.0 * dim * epochs * run.loader.real_tokens * (1 + len(run.task.features))
    found = {"flops": flops, "parameters": parameters(run), "table": table_facts(run)}
    if run.task.denoises:
        found["sampling"] = cast(denoising.Task, run.task).sampling(dim, c.loader.length)
    if run.task.denoises or run.task.ranks_catalogue:
        found["inference"] = inference(run)
    if c.table.codes and Path(c.table.codes).is_dir():
        ids = catalogue.read(c.table.codes, run.log)
        found["semantic_ids"] = {"sha256": ids.sha256, "sizes": list(ids.sizes)} | dict(ids.facts)
    return found


def inference(run: Run) -> dict[str, float]:
    """Forward FLOPs of ranking the whole catalogue once, for one user with a history of loader.length events.

    {encoder, sampling, ranking, total}. sampling: what a task that denoises draws, 0 for others; ranking: the scores of
    all items. Lookups and sorting are not in it, nor the mixing of parts in tables of another kind than "full".
    """
    task, dim = run.task, run.model_config.embed_dim
    length = run.config.loader.length
    tokens = length * task.tokens_per_event + task.prefix
    found = {
        "encoder": float(sum(run.model.flops(run.model_config, tokens).values())),
        "sampling": cast(denoising.Task, task).sampling(dim, length)["flops_per_target"] if task.denoises else 0.0,
        "ranking": task.ranking_flops(dim),
    }
    return found | {"total": sum(found.values())}


def _head_flops(run: Run, dim: int) -> float:
    """Forward FLOPs of the loss per target; a denoiser may read the states up to its target."""
    if not run.task.denoises:
        return run.task.head_flops(dim)
    states, each = run.loader.inputs_per_target, run.loader.real_tokens / run.loader.num_targets
    return cast(denoising.Task, run.task).head_flops(dim, states, each)


def table_facts(run: Run) -> dict[str, Any]:
    """The item table: kind, stored bytes, and of each array its rows, those reached in training, and collisions."""
    spec, ids = run.tables.specs[run.task.catalogue], np.arange(run.log.num_items + 1)
    names = run.tables.parts(run.task.catalogue)
    arrays = {part: run.tables.arrays[name] for part, name in names.items() if part != "codes"}
    slots = spec.slots(ids, run.fixed[names["codes"]] if "codes" in names else None)
    counts = item_counts(run.log, run.views["train"])[:, None]
    facts = {
        names[part]: codes.table_facts(slots[part] if part in slots else ids[:, None], counts, array.num_rows)
        for part, array in arrays.items()
    }
    return {
        "kind": spec.kind,
        "rows": sum(array.num_rows for array in arrays.values()),
        "dim": spec.dim,
        "bytes": spec.bytes,
        "bytes_per_item": spec.bytes / spec.num_ids,
        "arrays": facts,
    }


def collapse(run: Run, state: dict[str, Any], sample: int = 4096) -> dict[str, float]:
    """What is left of the item vectors, of at most `sample` evenly spread items.

    information_abundance (arXiv 2310.04400); variance: over items, the mean of the dimensions.
    """
    ids = np.linspace(1, run.log.num_items, min(sample, run.log.num_items), dtype=np.int32)
    everywhere = NamedSharding(run.mesh, REPLICATED)
    look = jax.jit(
        lambda arrays, mixers, ids: run.tables.lookup(arrays, mixers, run.task.catalogue, ids), out_shardings=everywhere
    )
    vectors = np.asarray(look(state["tables"], state["mixers"], place_same(everywhere, ids)))
    return {"information_abundance": information_abundance(vectors), "variance": float(vectors.var(axis=0).mean())}


def seen(run: Run, steps: int) -> dict[str, Any]:
    """What `steps` steps read: examples and events with repeats; users and items are those of one whole epoch."""
    epochs = steps * run.config.loader.batch_size / run.loader.num_rows
    view = run.views["train"]
    return {
        "epochs": epochs,
        "examples": epochs * len(run.loader.lengths),
        "events": epochs * run.loader.real_tokens,
        "events_per_epoch": run.loader.real_tokens,
        "targets_per_epoch": run.loader.num_targets,
        "unique_users": len(np.unique(view.user)),
        "unique_items": int((item_counts(run.log, view) > 0).sum()),
        "fill": run.loader.fill,
        "dropped": dict(view.dropped),
    }
