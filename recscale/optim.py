"""Optimizers: optax for the dense parameters, one rule per row for the tables, and the learning-rate schedule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from recscale.layers.embedding import RowRule


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


def _sgd(rows, slots, grads, lr, step):
    return rows - lr * grads, slots


def _rowwise_adagrad(rows, slots, grads, lr, step, eps: float = 1e-8):
    """One accumulator per row: the mean squared gradient, summed over steps."""
    total = slots["total"] + jnp.square(grads).mean(axis=-1)
    return rows - lr * grads * jax.lax.rsqrt(total + eps)[..., None], {"total": total}


def _adam(rows, slots, grads, lr, step, b1: float = 0.9, b2: float = 0.98, eps: float = 1e-8):
    mean = b1 * slots["mean"] + (1 - b1) * grads
    square = b2 * slots["square"] + (1 - b2) * jnp.square(grads)
    t = step.astype(jnp.float32) + 1
    direction = mean / (1 - b1**t) / (jnp.sqrt(square / (1 - b2**t)) + eps)
    return rows - lr * direction, {"mean": mean, "square": square}


_MOMENTS = {"mean": "element", "square": "element"}
# All but "adam" read and write nothing but the rows of a step. Of these, "sgd" and "rowwise_adagrad" are what they are
# on the whole table: a zero gradient moves neither row nor accumulator. "lazy_adam" differs from Adam on rows that a
# step does not touch: their moments do not fade and the row does not coast. Step t (from 1) of either moves an element
# by at most lr (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) sqrt(1 - b2^t) / (1 - b1^t) (Cauchy-Schwarz on the moments):
# 1.70 lr for b1 = 0.9, b2 = 0.98 and large t. A row left untouched differs by at most that per step missed, and once it
# is touched again, its moments being others, by at most twice that per step. Weight decay reaches touched rows only.
TABLE_RULES: dict[str, RowRule] = {
    "adam": RowRule(_MOMENTS, _adam, whole=True),
    "lazy_adam": RowRule(_MOMENTS, _adam),
    "rowwise_adagrad": RowRule({"total": "row"}, _rowwise_adagrad),
    "sgd": RowRule({}, _sgd),
}
FROZEN = "frozen"
TABLE_OPTIMIZERS = (*TABLE_RULES, FROZEN)
