"""The train step: one jitted function from (state, batch) to (state, metrics)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recscale.layers.softmax import catalogue_softmax
from recscale.layers.tables import Tables, Update
from recscale.mesh import layer_wrapper, split_rows, spread_rows
from recscale.program import STEP_STREAM, Program, shardings, updates

DROPOUT_STREAM, ROUNDING_STREAM = 1, 2  # within a step, whose own key draws the negatives


def make_train_step(run: Program) -> Callable[..., tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The jitted step: (state, batch) -> (state, metrics). Donates the state; touches only the rows of the batch."""
    return jax.jit(step_of(run), donate_argnums=0, out_shardings=(shardings(run), None))


def step_of(run: Program) -> Callable[..., tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The step as a plain function, for whoever compiles it in a program of their own (population.py)."""
    task, tables = run.task, run.tables
    rules, wrap = updates(run), layer_wrapper(run.mesh, run.config.mesh.remat)

    def step(state, batch):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state["seed"]), STEP_STREAM), state["step"])
        batch = {k: spread_rows(run.mesh, x) if x.ndim > 1 else x for k, x in task.draw(batch, key).items()}
        wanted = task.wanted(batch)
        touched, rows, overflow = {}, {}, state["overflow"]
        for table in dict.fromkeys(owner for owner, _ in wanted.values()):
            ids = {name: ids for name, (owner, ids) in wanted.items() if owner == table}
            touched[table], rows[table], more = tables.touch(state["tables"], table, ids)
            overflow = overflow + more

        def loss(model, mixers, rows, dense, batch, index, key):
            vectors = {}
            for table, place in touched.items():
                shapes = {name: batch_ids for name, (owner, batch_ids) in task.wanted(batch).items() if owner == table}
                now = place._replace(index=index[table])
                vectors |= tables.vectors(table, rows[table], mixers[table], now, shapes)
            full = functools.partial(catalogue_softmax, tables, task, dense, mixers) if task.needs_catalogue else None
            return task.loss(model, vectors, batch, key, full, wrap=wrap)

        learning = _learning(run, state, rows, wanted)
        index = {table: place.index for table, place in touched.items()}
        metrics, (model_grad, mixer_grad, rows_grad, dense_grad) = _gradients(
            run, loss, learning, batch, index, jax.random.fold_in(key, DROPOUT_STREAM)
        )
        dense_updates, optimizer = run.optimizer.update(
            (model_grad, mixer_grad), state["optimizer"], (state["model"], state["mixers"])
        )
        model, mixers = optax.apply_updates((state["model"], state["mixers"]), dense_updates)
        arrays, slots = dict(state["tables"]), dict(state["table_state"])
        rounding = jax.random.fold_in(key, ROUNDING_STREAM)
        for i, (name, (rule, decay, rate)) in enumerate(sorted(rules.items())):
            table, part = _owner(tables, name)
            arrays[name], slots[name], more = tables.update(
                name,
                arrays[name],
                slots[name],
                touched[table].position[part],
                rows_grad[table][part],
                Update(rule, rate(state["step"]), decay),
                state["step"],
                jax.random.fold_in(rounding, i),
                dense_grad.get(name),
            )
            overflow = overflow + more
        state = {
            "step": state["step"] + 1,
            "seed": state["seed"],
            "model": model,
            "mixers": mixers,
            "optimizer": optimizer,
            "tables": arrays,
            "table_state": slots,
            "overflow": overflow,
        }
        return state, metrics | {"lost_rows": overflow[1]}

    return step


def _owner(tables: Tables, name: str) -> tuple[str, str]:
    return next((t, p) for t in tables.specs for p, n in tables.parts(t).items() if n == name)


def _learning(run: Program, state, rows, wanted) -> tuple[Any, ...]:
    """What a step differentiates: model, mixers, the rows it touches and, for a loss over the catalogue, its arrays."""
    dense = {}
    if run.task.needs_catalogue:
        dense = {name: state["tables"][name] for name in run.tables.parts(run.task.catalogue).values()}
    return state["model"], state["mixers"], rows, dense


def _gradients(run: Program, loss, learning, batch, index, key):
    """Metrics and gradients of the mean over all targets of the batch, in mesh.accumulate parts one after the other."""
    fixed = {name: x for name, x in learning[3].items() if run.tables.arrays[name].fixed}
    learning = (*learning[:3], {name: x for name, x in learning[3].items() if name not in fixed})

    def weighted(learning, batch, index, key):
        model, mixers, rows, dense = learning
        value, metrics = loss(model, mixers, rows, dense | fixed, batch, index, key)
        return value * jax.lax.stop_gradient(metrics["targets"]), metrics

    def part(batch, index, key):
        gradient, metrics = jax.grad(weighted, has_aux=True)(learning, batch, index, key)
        return gradient, metrics | {"loss": metrics["loss"] * metrics["targets"]}

    parts = run.config.mesh.accumulate
    if parts == 1:
        total, metrics = part(batch, index, key)
    else:
        leaves, structure = jax.tree.flatten((batch, index))
        split = [split_rows(run.mesh, x, parts) if x.ndim > 1 else None for x in leaves]  # negatives [N] are shared

        def one(step):
            now, i = step
            now = [x if mine is None else mine for mine, x in zip(now, leaves, strict=True)]
            batch, index = jax.tree.unflatten(structure, now)
            return part(batch, index, jax.random.fold_in(key, i))

        steps = (split, jnp.arange(parts))
        shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda x: x[0], steps)))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (total, metrics), _ = jax.lax.scan(lambda t, now: (jax.tree.map(jnp.add, t, one(now)), None), zero, steps)
    count = jnp.maximum(metrics["targets"], 1.0)
    return metrics | {"loss": metrics["loss"] / count}, jax.tree.map(lambda g: g / count, total)
