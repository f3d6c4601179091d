"""TIGER (arXiv 2305.05065): a T5 encoder-decoder that reads the codes of a history and writes those of the next item.

No official code exists; the blocks are T5's (layers/t5.py). A vocabulary of 1 + levels x codebook, tied. d_model 128
with 4 + 4 layers, 6 x 64 heads and 1,024 hidden units has 4,590,848 parameters, d_model 384 has 13,771,776.

A packed row holds several histories, one a segment, each with one target at its last slot. Relative positions are
distances between tokens of the row, and segments do not see each other, so packing changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.layers.code_tokens import CodeShape, CodeTokens, History
from recscale.layers.t5 import BUCKETS, DecoderLayer, EncoderLayer, KeysValues, Stack, layer_parameters, split
from recscale.layers.width_transfer import Factors
from recscale.mesh import recompute

__all__ = ["Config", "History", "Memory", "Model", "flops", "param_groups", "width_factors"]


class Config(CodeShape):
    """Shape of a TIGER, see layers/code_tokens.py; depth: layers of the encoder, and of the decoder."""


class Memory(NamedTuple):
    """What the decoder reads of a history. read: of every layer; mask: bool [B, M]."""

    read: tuple[KeysValues, ...]
    mask: jax.Array


class Model(nnx.Module):
    """Histories of codes to the distribution of the next item's codes."""

    def __init__(self, c: Config, key: jax.Array):
        self.config = c
        keys = jax.random.split(key, 3)
        self.tokens = CodeTokens(c, keys[0])
        self.encoder = Stack(c, EncoderLayer, True, keys[1])
        self.decoder = Stack(c, DecoderLayer, False, keys[2])

    def __call__(
        self,
        history: History,
        next_BLQ: jax.Array,
        slots_BS: jax.Array,
        key: jax.Array | None = None,
        wrap=recompute,
    ) -> jax.Array:
        """Scores [B, S, Q, K], float32, of the codes of the event after slot slots[b, s], the last of its segment.

        next: int32 [B, L, Q], codes of the event after every slot (any code where there is none). The score of level q
        is given the history and the codes of levels below q. key: dropout, None evaluates; wrap: put around the body
        of the scans over layers (see recscale/mesh.py). A slot of padding gets unspecified finite scores.
        """
        c = self.config
        keys = split(key, 2)
        encoded, segment_BM = self.encode(history, keys[0], wrap)
        codes_BSQ = jnp.take_along_axis(next_BLQ, slots_BS[:, :, None], axis=1)
        segment_BS = jnp.take_along_axis(history.segment_ids_BL, slots_BS, axis=1)
        B, S, _ = codes_BSQ.shape
        start = jnp.broadcast_to(self.tokens.start(c), (B, S, 1, c.embed_dim))
        x = jnp.concatenate([start, self.tokens.codes(c, codes_BSQ[:, :, :-1])], axis=2)
        seen_BSM = (segment_BS[:, :, None] == segment_BM[:, None]) & (segment_BM > 0)[:, None]
        return self.tokens.logits(c, self.decoder.decode(c, x, encoded, seen_BSM, keys[1], wrap))

    def encode(self, history: History, key: jax.Array | None = None, wrap=recompute) -> tuple[jax.Array, jax.Array]:
        """States [B, M, D] of the history's tokens, and their segments [B, M], 0 where there is no token."""
        c = self.config
        segment_BM = history.places(c.places)
        mask = (segment_BM[:, :, None] == segment_BM[:, None]) & (segment_BM > 0)[:, None]
        return self.encoder.encode(c, self.tokens.stream(c, history), mask, key, wrap), segment_BM

    def remember(self, history: History) -> Memory:
        """What does not depend on the target: keys and values of every cross-attention. One segment a row."""
        encoded, segment_BM = self.encode(history)
        read = tuple(layer.cross.read(self.config, encoded) for layer in self.decoder.unstacked())
        return Memory(read, segment_BM > 0)

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
            x = jnp.broadcast_to(self.tokens.start(c), (*code_BW.shape, c.embed_dim))
        else:
            x = self.tokens.code(c, code_BW, level - 1)
        bias = self.decoder.last_bias(level + 1)
        mask = memory.mask[:, None, None]
        grown = []
        for i, layer in enumerate(self.decoder.unstacked()):
            x, own = layer.attention.step(c, x, cache[i] if cache else None, bias)
            x = layer.cross.attend_cross(c, x, memory.read[i], mask, (None, None))
            x = layer.ffn(c, x, (None, None))
            grown.append(own)
        return self.tokens.log_prob(c, self.decoder.norm(x), level), tuple(grown)


def flops(c: Config, length: int) -> dict[str, float]:
    """Forward FLOPs of one history of `length` EVENTS and its one target (multiply-add = 2), scores of codes included.

    The encoder's attention is over all pairs, the decoder's own counts a pair once.
    """
    M, Q, inner = length * c.places, c.levels, c.heads * c.head_dim
    weights, ffn = c.embed_dim * inner, 2 * c.embed_dim * c.ffn
    encoder = 2 * M * (4 * weights + ffn)
    decoder = 2 * (Q * (6 * weights + ffn) + M * 2 * weights)
    scores = 2 * Q * c.codebook * c.embed_dim
    attention = 4 * inner * (M * M + Q * M + Q * (Q + 1) / 2)
    return {"projections": float(c.depth * (encoder + decoder) + scores), "attention": float(c.depth * attention)}


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group: dense, positions (two tables of relative biases), codebooks (token embedding)."""
    encoder, decoder = layer_parameters(c)
    return {
        "dense": c.depth * (encoder + decoder) + 2 * c.embed_dim,
        "positions": 2 * BUCKETS * c.heads,
        "codebooks": c.codebook_parameters(),
    }


def width_factors(c: Config) -> dict[str, Factors]:
    """No width transfer."""
    del c
    return {}
