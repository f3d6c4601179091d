"""From a config to the pieces of a run: data, model, tables, task, optimizers, and the train state on its mesh."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from recscale import optim
from recscale.data import splits
from recscale.data.event_log import EventLog
from recscale.data.loading import Loader
from recscale.layers.embedding import Table
from recscale.mesh import REPLICATED, make_mesh, table_sharding
from recscale.models import MODELS
from recscale.tasks import TASKS
from recscale.tasks.next_item import FREQUENCY, Task

# Streams of randomness: everything a run draws is fold_in(seed, stream), then a step or a table.
MODEL_STREAM, TABLE_STREAM, STEP_STREAM = 0, 1, 2
TRAIN_MULTIPLIER = 3  # a backward pass costs two forward passes


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a config says, built. `state` is not here: it is data, made by init_state and passed along."""

    config: ml_collections.ConfigDict
    log: EventLog
    views: dict[str, splits.View]
    mesh: Mesh
    model: ModuleType
    model_config: Any
    tables: dict[str, Table]
    task: Task
    loader: Loader
    steps: int
    learning_rate: optax.Schedule
    table_learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation


def build(config: ml_collections.ConfigDict) -> Run:
    """Build a run; raises TypeError or ValueError for a config that does not fit, EventLogError for the data."""
    log = EventLog.open(config.data.path)
    views = _views(config, log)
    tables = {"item": Table(log.num_items, config.model.embed_dim, rows=config.table.rows)}
    contexts = tuple(config.loader.queries)
    for name in contexts:
        if name not in log.columns or log.columns[name].kind != "context":
            known = [k for k, column in log.columns.items() if column.kind == "context"]
            raise ValueError(f"loader.queries: {name!r} is not a context column of {config.data.path}; it has {known}")
        tables[name] = Table(log.columns[name].cardinality - 1, config.model.embed_dim)
    objective = TASKS[config.task_name]
    task = objective.Task(objective.Config(**config.task), tables, contexts)
    loader = Loader(
        log,
        views["train"],
        batch_size=config.loader.batch_size,
        length=config.loader.length,
        row_length=config.loader.row_length or None,
        layout=config.loader.layout,
        window="random" if config.loader.window == "random" else "last",
        queries=contexts,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    steps = max(1, round(config.train.epochs * loader.num_rows / config.loader.batch_size))
    c = config.optim
    learning_rate = optim.schedule(c.schedule, c.learning_rate, c.warmup, steps)
    model = MODELS[config.model_name]
    return Run(
        config=config,
        log=log,
        views=views,
        mesh=make_mesh(config.mesh.data, config.mesh.model),
        model=model,
        model_config=model.Config(**config.model),
        tables=tables,
        task=task,
        loader=loader,
        steps=steps,
        learning_rate=learning_rate,
        table_learning_rate=optim.schedule(c.schedule, config.table.learning_rate, c.warmup, steps),
        optimizer=optim.dense(learning_rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, clip=c.clip),
    )


def _views(config: ml_collections.ConfigDict, log: EventLog) -> dict[str, splits.View]:
    arguments = dict(config.split)
    name = arguments.pop("name")
    if name not in splits.SPLITS:
        raise ValueError(f"split.name = {name!r}: expected one of {tuple(splits.SPLITS)}")
    views = splits.SPLITS[name](log, **arguments)
    if config.data.users:
        views["train"] = splits.limit_users(views["train"], config.data.users)
    if config.data.events_per_user:
        views["train"] = splits.limit_events(views["train"], config.data.events_per_user)
    if config.loader.window == "all":
        views["train"] = splits.in_windows(views["train"], config.loader.length)
    return views


def item_frequency(log: EventLog, view: splits.View) -> np.ndarray:
    """float32 [V + 1, 1]: each item's share of the training events, padding 0."""
    items = log.events["item_id"]
    counts = np.zeros(log.num_items + 1)
    for first in range(0, len(view), 100_000):
        part = slice(first, first + 100_000)
        rows = splits.runs(view.start[part], view.stop[part] - view.start[part])
        counts += np.bincount(items[rows], minlength=log.num_items + 1)
    return (counts / counts.sum()).astype(np.float32)[:, None]


def table_rule(run: Run, name: str) -> optim.TableRule:
    """How a table learns: the item table by config, small context tables by Adam, frequencies never."""
    if name == FREQUENCY:
        return optim.TABLE_RULES["frozen"]
    return optim.TABLE_RULES[run.config.table.optimizer if name == "item" else "adam"]


def _draw_state(run: Run) -> dict[str, Any]:
    seed = jax.random.key(run.config.seed)
    model = run.model.Model(run.model_config, jax.random.fold_in(seed, MODEL_STREAM))
    stream = jax.random.fold_in(seed, TABLE_STREAM)
    tables = {n: t.init(jax.random.fold_in(stream, i)) for i, (n, t) in enumerate(sorted(run.tables.items()))}
    if run.task.needs_frequency:
        tables[FREQUENCY] = jnp.zeros((run.log.num_items + 1, 1))
    return {
        "step": jnp.zeros((), jnp.int32),
        "model": model,
        "optimizer": run.optimizer.init(model),
        "tables": tables,
        "table_state": {name: table_rule(run, name).init(table) for name, table in tables.items()},
    }


def init_state(run: Run) -> dict[str, Any]:
    """The train state {step, model, optimizer, tables, table_state} on the run's mesh."""
    state = jax.jit(lambda: _draw_state(run), out_shardings=_shardings(run))()
    if run.task.needs_frequency:
        frequency = item_frequency(run.log, run.views["train"])
        state["tables"][FREQUENCY] = jax.device_put(frequency, table_sharding(run.mesh, len(frequency)))
    return state


def _shardings(run: Run) -> dict[str, Any]:
    """Tables and their optimizer slots by rows, everything else on every device."""
    shapes = jax.eval_shape(lambda: _draw_state(run))
    heights = {name: table.shape[0] for name, table in shapes["tables"].items()}

    def by_rows(name: str, leaf: Any) -> NamedSharding:
        if leaf.ndim and leaf.shape[0] == heights[name]:
            return table_sharding(run.mesh, leaf.shape[0])
        return NamedSharding(run.mesh, REPLICATED)

    spread = {
        part: {name: jax.tree.map(lambda x, n=name: by_rows(n, x), tree) for name, tree in shapes[part].items()}
        for part in ("tables", "table_state")
    }
    rest = {k: v for k, v in shapes.items() if k not in spread}
    return jax.tree.map(lambda x: NamedSharding(run.mesh, REPLICATED), rest) | spread


def make_train_step(run: Run) -> Callable[..., tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The jitted step: (state, batch) -> (state, metrics). Donates the state; touches only the rows of the batch."""
    seed, task = run.config.seed, run.task
    rules = {name: table_rule(run, name) for name in (*run.tables, FREQUENCY)}

    def step(state, batch):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STEP_STREAM), state["step"])
        touched = task.ids(batch, key)
        rows = {name: state["tables"][table].at[slots].get(mode="clip") for name, (table, slots) in touched.items()}
        (_, metrics), (model_grad, rows_grad) = jax.value_and_grad(task.loss, argnums=(0, 1), has_aux=True)(
            state["model"], rows, batch, key
        )
        updates, optimizer = run.optimizer.update(model_grad, state["optimizer"], state["model"])
        model = optax.apply_updates(state["model"], updates)
        tables, table_state = dict(state["tables"]), dict(state["table_state"])
        for table in tables:
            names = [name for name, (owner, _) in touched.items() if owner == table]
            slots = jnp.concatenate([touched[name][1].reshape(-1) for name in names])
            grads = jnp.concatenate([rows_grad[name].reshape(-1, rows_grad[name].shape[-1]) for name in names])
            tables[table], table_state[table] = rules[table].update(
                tables[table], table_state[table], slots, grads, run.table_learning_rate(state["step"])
            )
        state = {
            "step": state["step"] + 1,
            "model": model,
            "optimizer": optimizer,
            "tables": tables,
            "table_state": table_state,
        }
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(_shardings(run), None))


def costs(run: Run) -> dict[str, Any]:
    """Parameters per group, and training FLOPs and lookup bytes of the whole run by part (real tokens, not padding)."""
    c, dim = run.config, run.model_config.embed_dim
    lengths, counts = np.unique(run.loader.lengths, return_counts=True)
    parts = {"projections": 0.0, "attention": 0.0}
    for length, count in zip(lengths, counts, strict=True):
        for part, value in run.model.flops(run.model_config, int(length)).items():
            parts[part] += value * float(count)
    candidates = run.log.num_items if c.task.loss == "full" else 1 + c.task.negatives
    parts["head"] = 2.0 * run.loader.num_targets * candidates * dim
    epochs = run.steps * c.loader.batch_size / run.loader.num_rows
    flops = {part: TRAIN_MULTIPLIER * epochs * value for part, value in parts.items()}
    flops["train_total"] = sum(flops.values())
    flops["lookup_bytes"] = 4.0 * dim * epochs * run.loader.real_tokens * (1 + len(run.task.contexts))
    groups = run.model.param_groups(run.model_config)
    table = run.tables["item"]
    return {
        "flops": flops,
        "parameters": {
            "tables": table.num_rows * dim,
            "dense": groups["dense"] + groups["positions"],
            "context_tables": sum(run.tables[name].num_rows * dim for name in run.task.contexts),
            "head": 0,
            "codebooks": 0,
        },
        "table": {"rows": table.num_rows, "dim": dim, "bytes": 4 * table.num_rows * dim, "hashed": table.hashed},
    }


def seen(run: Run) -> dict[str, Any]:
    """What the whole run reads: examples and events with repeats, users and items without."""
    epochs = run.steps * run.config.loader.batch_size / run.loader.num_rows
    view = run.views["train"]
    frequency = item_frequency(run.log, view)
    return {
        "epochs": epochs,
        "examples": epochs * len(view),
        "events": epochs * run.loader.real_tokens,
        "events_per_epoch": run.loader.real_tokens,
        "targets_per_epoch": run.loader.num_targets,
        "unique_users": int(len(np.unique(view.user))),
        "unique_items": int((frequency[1:] > 0).sum()),
        "fill": run.loader.fill,
        "dropped": dict(view.dropped),
    }
