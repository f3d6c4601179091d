"""TIGER without an encoder: one causal T5 stack over the stream of codes, with a target at every slot.

Slot i holds Q tokens: what begins it, then the codes of the next event but for the last. The first slot of a segment
begins with its item as one token (the sum of its codes' vectors) or with its vector, every other slot with the last
code of its item, which completes the stream: a history reads [item 0] c0 c1 c2 c3 of item 1, c0 c1 c2 c3 of item 2, ...
The token at place q predicts the code of level q of the next event.

Blocks and vocabulary are those of models/tiger.py; relative biases and buckets those of T5's decoder.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.layers.code_tokens import CodeShape, CodeTokens, History
from recscale.layers.t5 import BUCKETS, MASKED, EncoderLayer, KeysValues, Stack, layer_parameters
from recscale.layers.width_transfer import Factors
from recscale.mesh import recompute

__all__ = ["Config", "History", "Memory", "Model", "flops", "param_groups", "width_factors"]


class Config(CodeShape):
    """Shape of the stack, see layers/code_tokens.py; depth: its layers. It has no separators."""

    def __post_init__(self):
        super().__post_init__()
        if self.separator:
            raise ValueError("model.separator is true: only the encoder-decoder separates items, set it to False")


class Memory(NamedTuple):
    """The stream before the last slot, its end at the last place. read: of every layer; mask: bool [B, M].

    begin: [B, D], what the last slot begins with.
    """

    read: tuple[KeysValues, ...]
    mask: jax.Array
    begin: jax.Array


class Model(nnx.Module):
    """Histories of codes to the distribution of the next item's codes, at every slot."""

    def __init__(self, c: Config, key: jax.Array):
        self.config = c
        keys = jax.random.split(key, 2)
        self.tokens = CodeTokens(c, keys[0])
        self.stack = Stack(c, EncoderLayer, False, keys[1])

    def __call__(
        self,
        history: History,
        next_BLQ: jax.Array,
        slots_BS: jax.Array,
        key: jax.Array | None = None,
        wrap=recompute,
    ) -> jax.Array:
        """Scores [B, S, Q, K], float32, of the codes of the event after slot slots[b, s], any slot of the row.

        next: int32 [B, L, Q], codes of the event after every slot; where another slot of the segment follows it is that
        slot's item. The score of level q is given the slots of the segment up to this one and the codes of levels below
        q. key: dropout, None evaluates; wrap: put around the body of the scan over layers (see recscale/mesh.py). A
        slot of padding gets unspecified finite scores.
        """
        c = self.config
        B, L, Q = next_BLQ.shape
        hidden = self.stack.encode(c, self.stream(history, next_BLQ), causal(history, Q), key, wrap)
        chosen = jnp.take_along_axis(hidden.reshape(B, L, Q * c.embed_dim), slots_BS[:, :, None], axis=1)
        return self.tokens.logits(c, chosen.reshape(B, -1, Q, c.embed_dim))

    def stream(self, history: History, next_BLQ: jax.Array) -> jax.Array:
        """What the first layer reads, [B, L Q, D]."""
        begin = self.begins(history)
        x = jnp.concatenate([begin[:, :, None], self.tokens.codes(self.config, next_BLQ[:, :, :-1])], axis=2)
        return x.reshape(x.shape[0], -1, self.config.embed_dim)

    def begins(self, history: History) -> jax.Array:
        """The vector [B, L, D] that begins every slot."""
        c = self.config
        segment = history.segment_ids_BL
        first = jnp.concatenate([jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1)
        vectors = self.tokens.codes(c, history.codes_BLQ)
        begin = jnp.where(first[:, :, None], vectors.sum(axis=2), vectors[:, :, -1])
        if history.vector_BLD is None:
            return begin
        return jnp.where(history.is_vector()[:, :, None], history.vector_BLD.astype(c.dtype), begin)

    def remember(self, history: History) -> Memory:
        """Keys and values of the stream before the last slot of each row. One segment a row, from its first slot on."""
        c = self.config
        Q = c.levels
        last_B = jnp.maximum((history.segment_ids_BL > 0).sum(axis=1) - 1, 0)
        begins = self.begins(history)
        begin = jnp.take_along_axis(begins, last_B[:, None, None], axis=1)[:, 0]
        before = jax.tree.map(lambda x: x[:, :-1], history)
        M = before.codes_BLQ.shape[1] * Q
        read = self.stack.keys_values(c, self.stream(before, history.codes_BLQ[:, 1:]), causal(before, Q))
        # Every row's stream ends at the last place, so that distances to what follows are the same in all rows.
        place_BM = jnp.arange(M)[None] - M + Q * last_B[:, None]
        index = jnp.maximum(place_BM, 0)[:, None, :, None]
        read = tuple(KeysValues(*(jnp.take_along_axis(x, index, axis=2) for x in layer)) for layer in read)
        return Memory(read, place_BM >= 0, begin)

    def begin(self, memory: Memory, width: int) -> tuple:
        """The cache of `width` beams before their first code: nothing yet."""
        del memory, width
        return ()

    def advance(
        self, memory: Memory, cache: tuple[KeysValues, ...], code_BW: jax.Array, level: int
    ) -> tuple[jax.Array, tuple[KeysValues, ...]]:
        """Log-probabilities [B, W, K] of the codes of `level`, and the cache with one more token.

        code: of level - 1, ignored at level 0; level is static. Leaves of the cache are [B, W, ...]; the beams share
        the memory.
        """
        c = self.config
        if level == 0:
            x = jnp.broadcast_to(memory.begin[:, None], (*code_BW.shape, c.embed_dim))
        else:
            x = self.tokens.code(c, code_BW, level - 1)
        M = memory.mask.shape[1]
        bias = self.stack.last_bias(M + level + 1)
        far = jnp.where(memory.mask[:, None], bias[None, :, :M], MASKED)
        grown = []
        for i, layer in enumerate(self.stack.unstacked()):
            past = cache[i] if cache else None
            x, own = layer.attention.step(c, x, past, bias[:, M:], memory.read[i], far)
            x = layer.ffn(c, x, (None, None))
            grown.append(own)
        return self.tokens.log_prob(c, self.stack.norm(x), level), tuple(grown)


def causal(history: History, levels: int) -> jax.Array:
    """Bool [B, L Q, L Q]: which token sees which: those of its segment up to itself."""
    held = history.known() | history.is_vector()
    segment_BM = jnp.repeat(jnp.where(held, history.segment_ids_BL, 0), levels, axis=1)
    past = np.tri(segment_BM.shape[1], dtype=bool)
    return (segment_BM[:, :, None] == segment_BM[:, None]) & (segment_BM > 0)[:, None] & past[None]


def flops(c: Config, length: int) -> dict[str, float]:
    """Forward FLOPs of one history of `length` EVENTS with a target at each (multiply-add = 2), scores included.

    Causal attention counts a pair once.
    """
    M, inner = length * c.levels, c.heads * c.head_dim
    per_token = 4 * c.embed_dim * inner + 2 * c.embed_dim * c.ffn
    projections = 2 * M * (c.depth * per_token + c.codebook * c.embed_dim)
    return {"projections": float(projections), "attention": float(c.depth * 4 * inner * M * (M + 1) / 2)}


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group: dense, positions (the table of relative biases), codebooks (token embedding)."""
    layer, _ = layer_parameters(c)
    return {
        "dense": c.depth * layer + c.embed_dim,
        "positions": BUCKETS * c.heads,
        "codebooks": c.codebook_parameters(),
    }


def width_factors(c: Config) -> dict[str, Factors]:
    """No width transfer."""
    del c
    return {}
