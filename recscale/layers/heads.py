"""What a ranking task learns beside the encoder: the query of the next item, and one small MLP per feedback."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.layers.norms import Linear, matmul


class Mlps(nnx.Module):
    """K MLPs of one hidden layer side by side: [B, L, width] to float32 [B, L, K, O]."""

    def __init__(self, width: int, hidden: int, outputs: Sequence[int], key: jax.Array):
        glorot = jax.nn.initializers.glorot_uniform()
        first_key, *last_keys = jax.random.split(key, 1 + len(outputs))
        self.first = nnx.Param(glorot(first_key, (width, len(outputs) * hidden)))
        self.first_bias = nnx.Param(jnp.zeros((len(outputs) * hidden,)))
        self.last = nnx.Param(jnp.stack([glorot(k, (hidden, max(outputs))) for k in last_keys]))
        self.last_bias = nnx.Param(jnp.zeros((len(outputs), max(outputs))))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(matmul(x_BLD, self.first[...]) + self.first_bias[...].reshape(1, 1, -1))
        hidden_BLKF = hidden.reshape(*x_BLD.shape[:2], self.last.shape[0], -1)
        logits = jnp.einsum("blkf,kfo->blko", hidden_BLKF, self.last[...])
        return (logits + self.last_bias[...][None, None]).astype(jnp.float32)


class Head(nnx.Module):
    """Query map and feedback MLPs on vectors of width `dim`.

    query_parts, feedback_parts: vectors that are joined at their inputs; outputs: of each feedback's MLP (they are
    stored as wide as the widest), () for none; hidden: width of the MLPs.
    """

    def __init__(
        self, dim: int, query_parts: int, feedback_parts: int, outputs: Sequence[int], hidden: int, key: jax.Array
    ):
        glorot = jax.nn.initializers.glorot_uniform()
        keys = jax.random.split(key)
        self.query = Linear(query_parts * dim, dim, glorot, keys[0]) if query_parts else None
        self.mlps = Mlps(feedback_parts * dim, hidden, outputs, keys[1]) if outputs else None

    def feedback(self, *parts_BLD: jax.Array) -> jax.Array:
        """Logits float32 [B, L, K, O] of K feedbacks from vectors that are joined."""
        assert self.mlps is not None, "a head without feedback"
        return self.mlps(jnp.concatenate(parts_BLD, axis=-1))


def head_parameters(dim: int, query_parts: int, feedback_parts: int, outputs: Sequence[int], hidden: int) -> int:
    """How many parameters such a Head has."""
    count, widest = len(outputs), max(outputs, default=0)
    query = query_parts * dim * dim + dim if query_parts else 0
    return query + count * ((feedback_parts * dim + 1) * hidden + (hidden + 1) * widest)


class Ranker(nnx.Module):
    """An encoder and the head of a task, trained together. Called as the encoder is."""

    def __init__(self, encoder: nnx.Module, head: nnx.Module):
        self.encoder, self.head = encoder, head

    def __call__(self, *arguments, **named):
        return self.encoder(*arguments, **named)  # pyrefly: ignore[not-callable]
