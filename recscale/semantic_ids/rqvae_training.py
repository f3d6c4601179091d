"""Training of an RQ-VAE: a chunk of steps is one jitted scan, and nothing leaves the device inside it.

Batches are consecutive pieces of one random order of the items after the other, so that an epoch sees every item once.
The order of epoch e, the initial parameters and the restarts all follow from the seed by fold_in.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recscale.layers import quantize
from recscale.models import rqvae

State = dict[str, Any]
SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
}
OPTIMIZERS = {
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "adagrad": lambda rate, decay: optax.chain(optax.add_decayed_weights(decay), optax.adagrad(rate)),
}
_PARAMETERS, _ORDER, _RESTART, _CODEBOOKS = range(4)


@dataclasses.dataclass(frozen=True)
class Training:
    """How an RQ-VAE is trained.

    steps; batch_size: vectors of a step, all of them where there are fewer; chunk: steps between two rows of the
    history. optimizer: one of OPTIMIZERS, with learning_rate, weight_decay (of all parameters), clip (global norm, 0:
    none), schedule (one of SCHEDULES) after `warmup` steps. kmeans_iterations of the codebooks' start on at most
    kmeans_points latents; 0: a small random start. restart_every: steps after which codes that were not used since the
    last time become random residuals of the batch, 0: never; not in the last `restart_every` steps.
    """

    steps: int = 20_000
    batch_size: int = 1024
    chunk: int = 500
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 1.0
    schedule: str = "constant"
    warmup: int = 0
    kmeans_iterations: int = 25
    kmeans_points: int = 65_536
    restart_every: int = 100

    def __post_init__(self):
        for name in ("steps", "batch_size", "chunk", "kmeans_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"fit.{name} = {getattr(self, name)}: expected a positive integer")
        for name in ("weight_decay", "clip", "warmup", "kmeans_iterations", "restart_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"fit.{name} = {getattr(self, name)}: expected no negative number")
        if not self.learning_rate > 0:
            raise ValueError(f"fit.learning_rate = {self.learning_rate}: expected a positive number")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"fit.{name} = {getattr(self, name)!r}: expected one of {tuple(known)}")
        if self.warmup >= self.steps:
            raise ValueError(f"fit.warmup = {self.warmup}: expected fewer than fit.steps = {self.steps}")


def optimizer(t: Training) -> optax.GradientTransformation:
    """The optimizer of all parameters."""
    rate = SCHEDULES[t.schedule](t.learning_rate, t.steps - t.warmup)
    if t.warmup:
        rate = optax.join_schedules([optax.linear_schedule(0.0, t.learning_rate, t.warmup), rate], [t.warmup])
    clipping = [optax.clip_by_global_norm(t.clip)] if t.clip else []
    return optax.chain(*clipping, OPTIMIZERS[t.optimizer](rate, t.weight_decay))


@functools.partial(jax.jit, static_argnames=("c", "t"))
def start(c: rqvae.Config, t: Training, x_ND: jax.Array, key: jax.Array) -> State:
    """Parameters, codebooks by k-means of the first latents, optimizer state, averages, counts, step 0."""
    model = rqvae.Model(c, jax.random.fold_in(key, _PARAMETERS))
    if t.kmeans_iterations:
        pick, fit = jax.random.split(jax.random.fold_in(key, _CODEBOOKS))
        some = x_ND
        if len(x_ND) > t.kmeans_points:
            some = x_ND[jax.random.permutation(pick, len(x_ND))[: t.kmeans_points]]
        model.codebooks[...] = rqvae.codebooks_from(model.encoder(some), c, fit, t.kmeans_iterations)
    return {
        "model": model,
        "optimizer": optimizer(t).init(model),
        "averages": quantize.averages(model.codebooks[...]),
        "used": jnp.zeros((c.levels, c.codebook)),
        "step": jnp.int32(0),
    }


def step(
    c: rqvae.Config, t: Training, state: State, x_BD: jax.Array, behaviour_BE: jax.Array | None, key: jax.Array
) -> tuple[State, rqvae.Losses, jax.Array]:
    """One step: new state, losses, and how often each code was used, [Q, K]."""

    def total(model):
        losses, found = rqvae.loss(c, model, x_BD, behaviour_BE)
        return losses.total, (losses, found)

    gradient, (losses, found) = jax.grad(total, has_aux=True)(state["model"])
    updates, moments = optimizer(t).update(gradient, state["optimizer"], state["model"])
    model = optax.apply_updates(state["model"], updates)
    batch = quantize.batch_totals(found.codes_BQ, found.residual_QBD, c.codebook)
    averages, books = state["averages"], model.codebooks[...]
    if c.learning == "ema":
        averages, books = quantize.update_averages(averages, batch, c.decay, state["model"].codebooks[...])
    used, now = state["used"] + batch.size_QK, state["step"] + 1
    if t.restart_every:
        due = (now % t.restart_every == 0) & (now + t.restart_every <= t.steps)
        dead = due & (used == 0)

        def revive(books, averages):
            fresh = quantize.restart(books, dead, found.residual_QBD, jax.random.fold_in(key, now))
            sizes, totals = quantize.averages(fresh)
            totals = jnp.where(dead[..., None], totals, averages.total_QKD)
            return fresh, quantize.Averages(jnp.where(dead, sizes, averages.size_QK), totals)

        books, averages = jax.lax.cond(dead.any(), revive, lambda *same: same, books, averages)
        used = jnp.where(due, 0.0, used)
    model.codebooks[...] = books
    new = {"model": model, "optimizer": moments, "averages": averages, "used": used, "step": now}
    return new, losses, batch.size_QK


@functools.partial(jax.jit, static_argnames=("c", "t", "count", "rows"), donate_argnames="state")
def run_chunk(
    c: rqvae.Config,
    t: Training,
    state: State,
    x_ND: jax.Array,
    behaviour_NE: jax.Array | None,
    key: jax.Array,
    place: tuple[jax.Array, jax.Array],
    *,
    count: int,
    rows: int,
) -> tuple[State, rqvae.Losses, jax.Array]:
    """`count` steps of `rows` vectors; place: epoch and offset at which the first begins. Means of the losses, use."""
    N = len(x_ND)
    epoch, offset = place
    epochs = (count * rows + N - 1) // N + 1
    order = jax.random.fold_in(key, _ORDER)
    keys = jax.vmap(lambda i: jax.random.fold_in(order, epoch + i))(jnp.arange(epochs))
    orders = jax.vmap(lambda k: jax.random.permutation(k, N))(keys).reshape(-1)
    taken = jax.lax.dynamic_slice(orders, (offset,), (count * rows,)).reshape(count, rows)
    restart_key = jax.random.fold_in(key, _RESTART)

    def one(carry, ids):
        state, use = carry
        behaviour = None if behaviour_NE is None else behaviour_NE[ids]
        state, losses, counts = step(c, t, state, x_ND[ids], behaviour, restart_key)
        return (state, use + counts), losses

    (state, use), losses = jax.lax.scan(one, (state, jnp.zeros((c.levels, c.codebook))), taken)
    return state, jax.tree.map(jnp.mean, losses), use


def train(
    c: rqvae.Config, t: Training, x_ND: jax.Array, behaviour_NE: jax.Array | None, seed: int, report: Any = None
) -> tuple[rqvae.Model, list[dict[str, Any]]]:
    """The trained model and its history, a row per chunk: step, means of the losses, usage and perplexity by level.

    usage: share of the codes used in the chunk. report: called with every row. Raises ValueError where the loss is not
    finite.
    """
    key = jax.random.key(seed)
    rows, history = min(t.batch_size, len(x_ND)), []
    state = start(c, t, x_ND, key)
    for begin in range(0, t.steps, t.chunk):
        count = min(t.chunk, t.steps - begin)
        place = tuple(np.int32(part) for part in divmod(begin * rows, len(x_ND)))
        state, losses, use = run_chunk(c, t, state, x_ND, behaviour_NE, key, place, count=count, rows=rows)
        row: dict[str, Any] = {"step": begin + count, "loss": float(losses.total)}
        row |= {name: float(value) for name, value in losses._asdict().items() if name != "total"}
        row["usage"] = np.asarray((use > 0).mean(axis=1)).tolist()
        row["perplexity"] = np.asarray(quantize.perplexity(use)).tolist()
        history.append(row)
        if not np.isfinite(row["loss"]):
            raise ValueError(
                f"the loss is {row['loss']} at step {row['step']}: lower fit.learning_rate or set fit.clip"
            )
        if report is not None:
            report(row)
    return state["model"], history
