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


WINDOWS = ("last", "random", "all")
TOP_LEVEL = ("seed", "study", "model_name", "model", "task_name", "task", "split")
SECTIONS = {
    "cell": ("name", "axes", "coordinates"),
    "data": ("path", "users", "events_per_user"),
    "loader": ("batch_size", "length", "row_length", "layout", "window", "queries"),
    "table": ("rows", "optimizer", "learning_rate"),
    "optim": ("schedule", "learning_rate", "warmup", "b1", "b2", "weight_decay", "clip"),
    "train": ("epochs", "log_every", "eval_every", "checkpoint_every", "select", "patience"),
    "eval": ("during", "final", "batch_size", "ks", "protocols", "block", "chunk", "top_k"),
    "mesh": ("data", "model"),
}


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
    check_config(config)
    log = EventLog.open(config.data.path)
    views = _views(config, log)
    for split in (*config.eval.final, *([config.eval.during] if config.train.eval_every else [])):
        if split not in views:
            raise ValueError(f"eval: split.name = {config.split.name!r} gives {tuple(views)}, not {split!r}")
    tables = {"item": Table(log.num_items, config.model.embed_dim, rows=config.table.rows)}
    contexts = tuple(config.loader.queries)
    for name in contexts:
        column = log.columns.get(name)
        if column is None or column.kind != "context" or column.cardinality is None:
            known = [k for k, column in log.columns.items() if column.kind == "context"]
            raise ValueError(f"loader.queries: {name!r} is not a context column of {config.data.path}; it has {known}")
        tables[name] = Table(column.cardinality - 1, config.model.embed_dim)
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
    model = MODELS[config.model_name]
    model_config = model.Config(**config.model)
    if config.loader.length > model_config.max_length:
        raise ValueError(
            f"loader.length = {config.loader.length} is beyond model.max_length = {model_config.max_length}"
        )
    if "time_bias" in config.model and config.model.time_bias and "timestamp" not in log.columns:
        raise ValueError(f"model.time_bias needs timestamps, {config.data.path} has none: set it to False")
    steps = max(1, round(config.train.epochs * loader.num_rows / config.loader.batch_size))
    c = config.optim
    learning_rate = optim.schedule(c.schedule, c.learning_rate, c.warmup, steps)
    return Run(
        config=config,
        log=log,
        views=views,
        mesh=make_mesh(config.mesh.data, config.mesh.model),
        model=model,
        model_config=model_config,
        tables=tables,
        task=task,
        loader=loader,
        steps=steps,
        learning_rate=learning_rate,
        table_learning_rate=optim.schedule(c.schedule, config.table.learning_rate, c.warmup, steps),
        optimizer=optim.dense(learning_rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, clip=c.clip),
    )


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise ValueError for a key that nothing reads, a key that is missing, or a choice that does not exist.

    The sections model, task and split are checked by what they are passed to.
    """
    wrong = set(config) ^ {*SECTIONS, *TOP_LEVEL}
    wrong |= {
        f"{name}.{key}" for name in set(SECTIONS) & set(config) for key in set(config[name]) ^ set(SECTIONS[name])
    }
    if wrong:
        raise ValueError(f"config: {sorted(wrong)} are missing or unknown; configs/hstu_planted.py has every key")
    choices = (
        ("model_name", config.model_name, MODELS),
        ("task_name", config.task_name, TASKS),
        ("loader.window", config.loader.window, WINDOWS),
        ("table.optimizer", config.table.optimizer, optim.TABLE_RULES),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{key} = {value!r}: expected one of {tuple(allowed)}")
    select, data = config.train.select, config.mesh.data
    if select and (select.split()[1:] not in (["max"], ["min"]) or not config.train.eval_every):
        raise ValueError(f"train.select = {select!r}: expected 'METRIC max' or 'METRIC min', and train.eval_every > 0")
    if config.train.patience and not select:
        raise ValueError("train.patience needs train.select, the metric that it waits for")
    for key, rows in (("loader", config.loader.batch_size), ("eval", config.eval.batch_size)):
        if data > 0 and rows % data:
            raise ValueError(f"{key}.batch_size = {rows}: expected a multiple of mesh.data = {data}")
    if data > 0 and config.eval.chunk % data:
        raise ValueError(f"eval.chunk = {config.eval.chunk}: expected a multiple of mesh.data = {data}")


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


def costs(run: Run, steps: int) -> dict[str, Any]:
    """Parameters per group, and training FLOPs and lookup bytes of `steps` steps by part (real tokens, not padding)."""
    c, dim = run.config, run.model_config.embed_dim
    lengths, counts = np.unique(run.loader.lengths, return_counts=True)
    parts = {"projections": 0.0, "attention": 0.0}
    for length, count in zip(lengths, counts, strict=True):
        for part, value in run.model.flops(run.model_config, int(length)).items():
            parts[part] += value * float(count)
    candidates = run.log.num_items if c.task.loss == "full" else 1 + c.task.negatives
    parts["head"] = 2.0 * run.loader.num_targets * candidates * dim
    epochs = steps * c.loader.batch_size / run.loader.num_rows
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


def seen(run: Run, steps: int) -> dict[str, Any]:
    """What `steps` steps read: examples and events with repeats; users and items are those of one whole epoch."""
    epochs = steps * run.config.loader.batch_size / run.loader.num_rows
    view = run.views["train"]
    frequency = item_frequency(run.log, view)
    return {
        "epochs": epochs,
        "examples": epochs * len(view),
        "events": epochs * run.loader.real_tokens,
        "events_per_epoch": run.loader.real_tokens,
        "targets_per_epoch": run.loader.num_targets,
        "unique_users": len(np.unique(view.user)),
        "unique_items": int((frequency[1:] > 0).sum()),
        "fill": run.loader.fill,
        "dropped": dict(view.dropped),
    }
