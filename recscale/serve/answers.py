"""What a task computes against a cache, compiled once per shape.

A task turns a batch into the encoder's tokens, and hidden states into queries and predictions. It does so here as in
training: it is handed the trained network with another function in the encoder's place, which encodes into a cache,
appends to one, or computes against it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recscale.serve import cache

MODEL_READS = ("segment_ids", "positions", "timestamp", "query_timestamp")


class Program(NamedTuple):
    """What the compiled parts close over; equal where it is the same run."""

    tables: Any
    task: Any


class _Stand:
    """A trained network whose encoder is another function: the task goes on as in training, the cache comes in between.

    The task calls it with (x, batch, key); `encode` is (encoder, x, what a model reads of the batch) -> hidden states.
    """

    def __init__(self, model: Any, task: Any, encode: Callable):
        self._model, self._task, self._encode = model, task, encode

    def __call__(self, x, batch, key=None, **how):
        del key, how
        read = {name: batch[name] for name in MODEL_READS}
        return self._encode(encoder_of(self._model, self._task), x, read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def encoder_of(model: Any, task: Any) -> Any:
    """The encoder inside a task's trained network."""
    for name in task.inside.split(".")[:-1]:
        model = getattr(model, name)
    return model


def _through(program: Program, model, arrays, mixers, batch, encode):
    """Let the task make its tokens and hand them to `encode`; what comes of them is not used."""
    look = functools.partial(program.tables.lookup, arrays, mixers)
    task, stand = program.task, _Stand(model, program.task, encode)
    return task.predict(stand, look, batch) if task.heads else task.queries(stand, look, batch)


@functools.partial(jax.jit, static_argnames=("program", "capacity"))
def remember(model, arrays, mixers, batch, *, program: Program, capacity: int) -> cache.Cache:
    """Keys and values of the events in `batch`, with room for `capacity` tokens."""
    found = []

    def encode(encoder, x, tokens):
        kept, hidden = cache.encode(encoder, x, tokens, capacity=capacity)
        found.append(kept)
        return hidden

    _through(program, model, arrays, mixers, batch, encode)
    return found[0]


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("kept",))
def extend(model, arrays, mixers, kept, batch, *, program: Program) -> cache.Cache:
    """The cache with the events in `batch`; donates the one given."""
    found = []

    def encode(encoder, x, tokens):
        longer, hidden = cache.append(encoder, kept, x, tokens)
        found.append(longer)
        return hidden

    _through(program, model, arrays, mixers, batch, encode)
    return found[0]


@functools.partial(jax.jit, static_argnames=("program",))
def last_state(model, arrays, mixers, kept, batch, *, program: Program) -> jax.Array:
    """Hidden states [B, M, D] of the events in `batch`, each right after what is kept."""
    found = []

    def encode(encoder, x, tokens):
        found.append(cache.score(encoder, kept, x, tokens))
        return found[0]

    _through(program, model, arrays, mixers, batch, encode)
    return found[0]


@functools.partial(jax.jit, static_argnames=("program",))
def last_state_of_whole(model, arrays, mixers, batch, *, program: Program) -> jax.Array:
    """Hidden state [B, 1, D] of the last event of whole histories, without a cache."""
    found = []

    def encode(encoder, x, tokens):
        hidden = encoder(x, tokens)
        last = jnp.maximum((tokens["segment_ids"] > 0).sum(axis=1) - 1, 0)
        found.append(jnp.take_along_axis(hidden, last[:, None, None], axis=1))
        return hidden

    _through(program, model, arrays, mixers, batch, encode)
    return found[0]


def _against(kept, hidden, tokens: int, micro: int) -> Callable:
    """Encoder of copies of the last event: their states known, or computed against what is kept."""

    def encode(encoder, x, read):
        if hidden is not None:
            return jnp.broadcast_to(hidden, x.shape)
        return cache.score(encoder, kept, x, read, group=tokens, micro=micro)

    return encode


@functools.partial(jax.jit, static_argnames=("program", "micro"))
def predict(model, arrays, mixers, kept, hidden, batch, *, program: Program, micro: int) -> dict[str, jax.Array]:
    """Feedback predictions {head: [B, M]} of the event that follows, for each candidate of `batch`.

    hidden: states [B, 1, D] of the last events where they see no candidate, else None: computed against what is kept.
    """
    look = functools.partial(program.tables.lookup, arrays, mixers)
    encode = _against(kept, hidden, program.task.tokens_per_event, micro)
    return program.task.predict(_Stand(model, program.task, encode), look, batch)


@functools.partial(jax.jit, static_argnames=("program",))
def query(model, arrays, mixers, kept, hidden, batch, *, program: Program) -> jax.Array:
    """Query of the next item, float32 [B, D]; `batch` [B, 1] holds the last events, the rest as for `predict`."""
    look = functools.partial(program.tables.lookup, arrays, mixers)
    encode = _against(kept, hidden, program.task.tokens_per_event, 0)
    return program.task.queries(_Stand(model, program.task, encode), look, batch)[:, 0].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("program",))
def item_scores(query_BD, arrays, mixers, ids_BM, *, program: Program) -> jax.Array:
    """Scores [B, M] of items by their queries."""
    vectors = program.task.item(program.tables.lookup(arrays, mixers, program.task.catalogue, ids_BM))
    return jnp.einsum("bd,bmd->bm", query_BD, vectors.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
