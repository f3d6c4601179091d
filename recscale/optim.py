"""Optimizers: optax for the dense parameters, one entry per rule for the tables, and the learning-rate schedule.

A table rule is a pair of pure functions, `init(table) -> state` and `update(table, state, touched, grads, lr) ->
(table, state)`, where `touched` [N] are the rows a step used and `grads` [N, D] their gradients, repeats included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from recscale.layers.embedding import merge_rows, scatter_rows


class TableRule(NamedTuple):
    """How a table learns; see the module docstring."""

    init: Callable[[jax.Array], Any]
    update: Callable[..., tuple[jax.Array, Any]]


def schedule(name: str, peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Learning rate over steps: linear warm-up, then "constant", "cosine" (to zero) or "wsd" (last fifth linear)."""
    if name not in SCHEDULES:
        raise ValueError(f"optim.schedule = {name!r}: expected one of {tuple(SCHEDULES)}")
    body = SCHEDULES[name](peak, max(1, steps - warmup))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup]) if warmup else body


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "wsd": lambda peak, steps: optax.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, max(1, steps // 5))], [steps - steps // 5]
    ),
}


def dense(
    learning_rate: optax.Schedule, *, b1: float, b2: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping (clip = 0: none) for the dense parameters."""
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*chain, optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay))


def _adam() -> TableRule:
    """Adam on the whole table: exact, costs as much as the table. For small catalogues and published recipes."""
    rule = optax.scale_by_adam(b1=0.9, b2=0.98)

    def update(table, state, touched, grads, lr):
        direction, state = rule.update(scatter_rows(table, touched, grads), state)
        return table - lr * direction, state

    return TableRule(rule.init, update)


def _rowwise_adagrad(eps: float = 1e-8) -> TableRule:
    """One accumulator per row (mean squared gradient); touches only the rows of the step."""

    def init(table):
        return jnp.zeros((table.shape[0],), jnp.float32)

    def update(table, state, touched, grads, lr):
        rows, grad = merge_rows(touched, grads, table.shape[0])
        total = state.at[rows].get(mode="fill", fill_value=0.0) + jnp.square(grad).mean(axis=-1)
        state = state.at[rows].set(total, mode="drop", unique_indices=True)
        step = lr * grad * jax.lax.rsqrt(total + eps)[:, None]
        return table.at[rows].add(-step, mode="drop", unique_indices=True), state

    return TableRule(init, update)


def _sgd() -> TableRule:
    """Plain gradient descent; touches only the rows of the step."""

    def update(table, state, touched, grads, lr):
        return table.at[touched].add(jnp.where(touched > 0, -lr, 0.0)[:, None] * grads), state

    return TableRule(lambda table: (), update)


def _frozen() -> TableRule:
    return TableRule(lambda table: (), lambda table, state, touched, grads, lr: (table, state))


TABLE_RULES: dict[str, TableRule] = {
    "adam": _adam(),
    "rowwise_adagrad": _rowwise_adagrad(),
    "sgd": _sgd(),
    "frozen": _frozen(),
}
