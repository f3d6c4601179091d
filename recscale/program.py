"""What a config computes, without its data: model, tables, task, optimizers, and the shape and layout of the state."""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding

from recscale import metrics, optim
from recscale.layers.embedding import RowRule
from recscale.layers.kinds import Table
from recscale.layers.tables import Tables
from recscale.layers.width_transfer import BaseShape, scaled
from recscale.mesh import BATCH, REMAT, REPLICATED, dense_shardings, make_mesh
from recscale.models import GENERATIVE, MODELS
from recscale.tasks import TASKS
from recscale.tasks.next_item import LABEL, QUERY, Task

# Streams of randomness: everything a run draws is fold_in(seed, stream), then a step or a table.
MODEL_STREAM, TABLE_STREAM, STEP_STREAM, HEAD_STREAM = 0, 1, 2, 3


WINDOWS = ("last", "random", "all", "prefixes", "spans")
TOP_LEVEL = ("seed", "study", "model_name", "model", "task_name", "task", "split")
SECTIONS = {
    "cell": ("name", "axes", "coordinates"),
    "data": ("path", "users", "events_per_user", "num_items", "num_events"),
    "loader": (
        *("batch_size", "length", "row_length", "layout", "window", "inputs", "queries"),
        *("horizon", "positive", "lag", "request_gap", "alpha", "segments"),
    ),
    "table": (
        *("kind", "rows", "parts", "inner", "combine", "dtype", "codes"),
        *("optimizer", "learning_rate", "weight_decay", "warmup"),
    ),
    "optim": (
        *("schedule", "learning_rate", "warmup", "decay", "b1", "b2", "weight_decay", "clip"),
        *("parametrisation", "base_width", "base_embed_dim", "base_head_dim"),
    ),
    "train": (
        *("epochs", "log_every", "eval_every", "checkpoint_every", "select", "patience"),
        *("keep_steps", "branch_from", "branch_step", "warm_start"),
    ),
    "eval": ("during", "final", "batch_size", "ks", "protocols", "block", "chunk", "top_k"),
    "mesh": ("replica", "data", "model", "accumulate", "remat"),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config computes, without its data. The state is not here: init_state makes it, and it is passed along."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: ModuleType
    model_config: Any
    tables: Tables
    task: Task
    steps: int
    learning_rate: optax.Schedule
    table_learning_rate: optax.Schedule
    table_weight_decay: float
    optimizer: optax.GradientTransformation


def program(
    config: ml_collections.ConfigDict,
    num_items: int,
    cardinalities: Mapping[str, int],
    steps: int,
    devices: Any = None,
) -> Program:
    """The part of a run that needs no data. cardinalities: of the query-context columns; devices: as for make_mesh."""
    check_config(config)
    c, t = config.optim, config.table
    mesh = make_mesh(config.mesh.replica, config.mesh.data, config.mesh.model, devices)
    task = task_of(config, num_items)
    model: ModuleType = MODELS[config.model_name]
    model_config = model.Config(**config.model, base=_base_shape(config))
    shape = {key: t[key] for key in ("kind", "rows", "parts", "inner", "combine", "dtype")}
    specs = task.tables(model_config, shape)
    small = {"dim": model_config.embed_dim, "stddev": task.feature_deviation(model_config)}
    specs |= {name: Table(cardinalities[name] - 1, **small) for name in task.features}
    prefix = getattr(model_config, "prefix", 0)
    if prefix != task.prefix and not task.generates:
        raise ValueError(
            f"model.prefix = {prefix}, but loader.inputs has features of users (users/NAME) for {task.prefix} "
            f"positions: expected model.prefix = {task.prefix}"
        )
    tokens = config.loader.length * task.tokens_per_event + task.prefix
    if tokens > model_config.max_length:
        each = f" with {task.tokens_per_event} tokens an event" if task.tokens_per_event > 1 else ""
        raise ValueError(
            f"loader.length = {config.loader.length}{each} is beyond model.max_length = {model_config.max_length}"
        )
    learning_rate = optim.schedule(c.schedule, c.learning_rate, c.warmup, steps, c.decay)
    return Program(
        config=config,
        mesh=mesh,
        model=model,
        model_config=model_config,
        tables=Tables(specs, mesh),
        task=task,
        steps=steps,
        learning_rate=learning_rate,
        table_learning_rate=optim.schedule(c.schedule, t.learning_rate, t.warmup, steps, c.decay),
        table_weight_decay=t.weight_decay,
        optimizer=dense_optimizer(config, model, model_config, learning_rate, inside=task.inside),
    )


def task_of(config: ml_collections.ConfigDict, num_items: int) -> Task:
    """The config's task over that many items."""
    objective: ModuleType = TASKS[config.task_name]
    features = {"inputs": tuple(config.loader.inputs), "queries": tuple(config.loader.queries)}
    task = objective.Task(objective.Config(**config.task), num_items, **features, segments=config.loader.segments)
    if task.generates != (config.model_name in GENERATIVE):
        fits = [name for name in MODELS if (name in GENERATIVE) == task.generates]
        raise ValueError(f"model_name = {config.model_name!r} with task {config.task_name!r}: expected one of {fits}")
    return task


def dense_optimizer(
    config: ml_collections.ConfigDict,
    model: ModuleType,
    model_config: Any,
    learning_rate: optax.Schedule,
    inside: str = "",
    **changed: Any,
) -> optax.GradientTransformation:
    """AdamW for the pair (model, mixers), as config.optim says; changed: arguments of optim.dense that differ.

    inside: where in the model the encoder is, "" or "encoder.".
    """
    settings = {key: config.optim[key] for key in ("b1", "b2", "weight_decay", "clip")} | changed
    factors = model.width_factors(model_config)
    rates = {f"0.{inside}{name}": factor.rate for name, factor in factors.items()}  # 0: the first of the pair
    return optim.dense(learning_rate, rates=rates, **settings)


def _base_shape(config: ml_collections.ConfigDict) -> BaseShape | None:
    c = config.optim
    return None if c.parametrisation == "sp" else BaseShape(c.base_width, c.base_embed_dim, c.base_head_dim)


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
        ("table.optimizer", config.table.optimizer, optim.TABLE_OPTIMIZERS),
        ("optim.parametrisation", config.optim.parametrisation, optim.PARAMETRISATIONS),
        ("mesh.remat", config.mesh.remat, REMAT),
        *(("eval.protocols", name, metrics.PROTOCOLS) for name in config.eval.protocols),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{key} = {value!r}: expected one of {tuple(allowed)}")
    select, m = config.train.select, config.mesh
    if select and (select.split()[1:] not in (["max"], ["min"]) or not config.train.eval_every):
        raise ValueError(f"train.select = {select!r}: expected 'METRIC max' or 'METRIC min', and train.eval_every > 0")
    if config.train.patience and not select:
        raise ValueError("train.patience needs train.select, the metric that it waits for")
    if bool(config.train.branch_from) != (config.train.branch_step > 0):
        raise ValueError(
            f"train.branch_from = {config.train.branch_from!r} with train.branch_step = {config.train.branch_step}: a "
            "branch needs a workdir and a step of it, any other run neither"
        )
    if min(m.replica, m.data, m.model, m.accumulate) < 1:
        raise ValueError(f"mesh = {m.to_dict()}: expected replica, data, model and accumulate of at least 1")
    size = m.replica * m.data * m.model
    for key, value, parts in (
        ("loader.batch_size", config.loader.batch_size, m.accumulate),
        ("eval.batch_size", config.eval.batch_size, 1),
    ):
        if value % (size * parts):
            times = f" x mesh.accumulate = {parts}" if parts > 1 else ""
            raise ValueError(f"{key} = {value}: expected a multiple of the {size} devices of the mesh{times}")


def updates(run: Program) -> dict[str, tuple[RowRule, float, Callable]]:
    """Array name -> (rule, weight decay, learning rate of a step) for the arrays that learn.

    The catalogue's by config; small context tables by Adam.
    """
    rules = {}
    for table in run.tables.specs:
        for name in run.tables.parts(table).values():
            optimizer = run.config.table.optimizer if table == run.task.catalogue else "adam"
            if not run.tables.arrays[name].fixed and optimizer != optim.FROZEN:
                decay = run.table_weight_decay if table == run.task.catalogue else 0.0
                rules[name] = (optim.TABLE_RULES[optimizer], decay, run.table_learning_rate)
    return rules


def draw_tables(run: Program, seed: jax.Array) -> dict[str, Any]:
    """The part {tables, table_state, mixers} of the state at step 0; fixed arrays are still zero."""
    arrays, mixers = run.tables.init(jax.random.fold_in(jax.random.key(seed), TABLE_STREAM))
    slots = {name: run.tables.init_slots(name, rule) for name, (rule, _, _) in updates(run).items()}
    return {"tables": arrays, "table_state": slots, "mixers": mixers}


def draw_dense(run: Program, seed: jax.Array, mixers: Any) -> dict[str, Any]:
    """The rest of the state at step 0."""
    model = run.model.Model(run.model_config, jax.random.fold_in(jax.random.key(seed), MODEL_STREAM))
    model = scaled(model, {name: f.initial for name, f in run.model.width_factors(run.model_config).items()})
    head_key = jax.random.fold_in(jax.random.key(seed), HEAD_STREAM)
    model = run.task.join(model, run.model_config.embed_dim, head_key)
    return {
        "step": jnp.zeros((), jnp.int32),
        "seed": seed,
        "model": model,
        "optimizer": run.optimizer.init((model, mixers)),
        "overflow": jnp.zeros((2,), jnp.int32),
    }


def _shapes(run: Program) -> dict[str, Any]:
    def draw(seed):
        tables = draw_tables(run, seed)
        return tables | draw_dense(run, seed, tables["mixers"])

    return jax.eval_shape(draw, jax.ShapeDtypeStruct((), jnp.uint32))


def shardings(run: Program) -> dict[str, Any]:
    """Tables and their optimizer slots by rows, large dense parameters over "model", the rest on every device."""
    shapes = _shapes(run)
    by_rows = {
        part: {
            name: jax.tree.map(lambda _, n=name: run.tables.sharding(n), tree) for name, tree in shapes[part].items()
        }
        for part in ("tables", "table_state")
    }
    dense = {part: dense_shardings(run.mesh, shapes[part]) for part in ("model", "mixers", "optimizer")}
    whole = {part: NamedSharding(run.mesh, REPLICATED) for part in ("step", "seed", "overflow")}
    return by_rows | dense | whole


def abstract_state(run: Program) -> dict[str, Any]:
    """Shapes and layouts of the train state."""
    shapes = _shapes(run)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings(run)
    )


def abstract_batch(run: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and layouts of a global batch of the train step."""
    c = run.config
    names = ["item_id", "target", "segment_ids", "positions"]
    if "time_bias" in c.model and c.model.time_bias:
        names += ["timestamp", "query_timestamp"]
    names += ["lagged", "request"] if c.loader.request_gap else []
    read = run.task.columns
    types = dict.fromkeys([*names, *read["inputs"], *(QUERY + name for name in read["queries"])], jnp.int32)
    types |= {LABEL + name: jnp.float32 for name in read["labels"]}
    longest = c.loader.length + run.task.prefix // run.task.tokens_per_event
    shape, layout = (c.loader.batch_size, c.loader.row_length or longest), NamedSharding(run.mesh, BATCH)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in types.items()}


def parameters(run: Program) -> dict[str, int]:
    """Trained parameters per group: item table (with the dense part of its kind), dense, context tables."""
    groups = run.model.param_groups(run.model_config)
    mixers = _shapes(run)["mixers"]

    def size(table: str) -> int:
        arrays = (run.tables.arrays[name] for name in run.tables.parts(table).values())
        return sum(a.num_rows * a.dim for a in arrays if not a.fixed) + sum(x.size for x in mixers[table].values())

    return {
        "tables": size(run.task.catalogue),
        "dense": groups["dense"] + groups["positions"],
        "context_tables": sum(size(name) for name in run.task.features),
        "head": run.task.head_parameters(run.model_config.embed_dim),
        "codebooks": groups["codebooks"] if run.task.generates else 0,
    }
