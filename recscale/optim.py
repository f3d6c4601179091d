"""Optimizers: optax for the dense parameters, one rule per row for the tables, and the learning-rate schedule."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from recscale.layers.embedding import RowRule
from recscale.layers.width_transfer import scaled


class Phases(NamedTuple):
    """The parts of a run in steps: warm-up to `warmup`, decay from `decay_start` to `horizon`, where the rate is zero.

    A schedule without a decay has decay_start = horizon.
    """

    horizon: int
    warmup: int
    decay_start: int

    @property
    def decay_steps(self) -> int:
        """Steps over which the learning rate falls; 0: it never does."""
        return self.horizon - self.decay_start


def phases(name: str, warmup: int, steps: int, decay: float) -> Phases:
    """Phases of a schedule; decay: share of the steps in which "wsd" falls. Raises ValueError for what cannot be."""
    if name not in SCHEDULES:
        raise ValueError(f"optim.schedule = {name!r}: expected one of {tuple(SCHEDULES)}")
    if name != "wsd":
        return Phases(steps, warmup, steps if name == "constant" else min(warmup, steps))
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"optim.decay = {decay}: expected the share of the steps that decay, above 0 and at most 1")
    decay_start = steps - max(1, round(decay * steps))
    if decay_start < warmup:
        raise ValueError(
            f"the decay begins at step {decay_start} of {steps}, before the warm-up of {warmup} steps ends: lower "
            "optim.decay, optim.warmup or table.warmup, or train longer"
        )
    return Phases(steps, warmup, decay_start)


def schedule(name: str, peak: float, warmup: int, steps: int, decay: float = 0.2) -> optax.Schedule:
    """Learning rate over steps: linear warm-up, then "constant", "cosine" (to zero) or "wsd".

    "wsd" (warm-up, stable, decay; arXiv 2405.18392): constant, then linear to zero over the last share `decay` of all
    steps. Until its decay begins it does not depend on `steps`, so runs of several lengths can share their beginning.
    """
    plan = phases(name, warmup, steps, decay)
    body = SCHEDULES[name](peak, plan)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup]) if warmup else body


SCHEDULES: dict[str, Callable[[float, Phases], optax.Schedule]] = {
    "constant": lambda peak, plan: optax.constant_schedule(peak),
    "cosine": lambda peak, plan: optax.cosine_decay_schedule(peak, max(1, plan.horizon - plan.warmup)),
    "wsd": lambda peak, plan: optax.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, plan.decay_steps)],
        [plan.decay_start - plan.warmup],
    ),
}
PARAMETRISATIONS = ("sp", "mup")


def dense(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip: float,
    rates: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping (clip = 0: none) for the dense parameters.

    rates: name of a parameter -> factor on its learning rate (layers/width_transfer.py). The weight decay of a step
    stays learning rate x weight_decay for all of them.
    """
    clipping = [optax.clip_by_global_norm(clip)] if clip else []
    by_name = [optax.stateless(lambda updates, _: scaled(updates, rates))] if rates else []
    adam = optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2),
        *by_name,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.chain(*clipping, adam)


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
