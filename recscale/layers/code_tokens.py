"""Items as tokens: the codes of a history as a stream, their embedding, and the distribution over the codes of a level.

Token of code c at level q: 1 + q K + c. Token 0 begins a target and fills places that nothing attends to.

Shapes: B rows, L slots of a history, Q code levels, K codes of a level, T places of a slot (Q, and one more where items
are separated), D width.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.layers.t5 import INITS, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeShape(Shape):
    """Shape of a generative model over codes.

    levels: Q; codebook: K; max_length: the most events of a history; separator: a learned token after every item;
    tied: the codes are scored by their embeddings times D^-1/2, else by a matrix of its own without that factor;
    base: must be None, these models have no width transfer.
    """

    levels: int
    codebook: int
    max_length: int
    dtype: str
    separator: bool = False
    tied: bool = True
    base: None = None

    def __post_init__(self):
        for name in ("embed_dim", "depth", "heads", "head_dim", "ffn", "levels", "codebook", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.init not in INITS:
            raise ValueError(f"model.init = {self.init!r}: expected one of {INITS}")
        if self.base is not None:
            raise ValueError("model.base is given: this model has no width transfer, set it to None")

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding."""
        return 1 + self.levels * self.codebook + int(self.separator)

    @property
    def places(self) -> int:
        """T: tokens that an item takes in the stream."""
        return self.levels + int(self.separator)

    def codebook_parameters(self) -> int:
        """Parameters of the token embedding and, where it is not tied, of the output matrix."""
        return (self.vocabulary + (0 if self.tied else self.levels * self.codebook)) * self.embed_dim


class History(NamedTuple):
    """The slots of packed rows, each an item or a vector.

    codes: int32 [B, L, Q]; item: bool [B, L], the slot holds an item; segment_ids: int32 [B, L], 0 = padding, the
    slots of a segment side by side; vector: float32 [B, L, D] or None, read where a slot of a segment holds no item
    (a user's vector). A vector is one token, in the last of its slot's places, next to the first code of an item that
    follows.
    """

    codes_BLQ: jax.Array
    item_BL: jax.Array
    segment_ids_BL: jax.Array
    vector_BLD: jax.Array | None = None

    def is_vector(self) -> jax.Array:
        """Bool [B, L]: the slot holds a vector."""
        if self.vector_BLD is None:
            return jnp.zeros_like(self.item_BL, dtype=bool)
        return (self.segment_ids_BL > 0) & ~self.item_BL.astype(bool)

    def known(self) -> jax.Array:
        """Bool [B, L]: the slot holds an item."""
        return (self.segment_ids_BL > 0) & self.item_BL.astype(bool)

    def places(self, count: int) -> jax.Array:
        """Int32 [B, L T]: the segment of every place of `count` places a slot, 0 where there is no token."""
        last = jnp.arange(count) == count - 1
        held = self.known()[:, :, None] | (self.is_vector()[:, :, None] & last[None, None])
        return jnp.where(held, self.segment_ids_BL[:, :, None], 0).reshape(held.shape[0], -1)


class CodeTokens(nnx.Module):
    """Embedding of the tokens, [1 + Q K (+ 1 for the separator), D], which scores the codes of a level too."""

    def __init__(self, c: CodeShape, key: jax.Array):
        keys = jax.random.split(key, 2)
        scale = c.deviation(1.0)
        self.embedding = nnx.Param(scale * jax.random.normal(keys[0], (c.vocabulary, c.embed_dim)))
        outputs = (c.levels * c.codebook, c.embed_dim)
        self.head = None if c.tied else nnx.Param(scale * jax.random.normal(keys[1], outputs))

    def code(self, c: CodeShape, codes: jax.Array, level: int) -> jax.Array:
        """Vectors [..., D] of codes of one level."""
        return self.embedding[...][1 + level * c.codebook + codes].astype(c.dtype)

    def codes(self, c: CodeShape, codes: jax.Array) -> jax.Array:
        """Vectors [..., Q', D] of codes [..., Q'] of levels 0 to Q' - 1."""
        first = 1 + jnp.arange(codes.shape[-1]) * c.codebook
        return self.embedding[...][codes + first.reshape((1,) * (codes.ndim - 1) + (-1,))].astype(c.dtype)

    def start(self, c: CodeShape) -> jax.Array:
        """The vector [D] that begins a target."""
        return self.embedding[...][0].astype(c.dtype)

    def stream(self, c: CodeShape, history: History) -> jax.Array:
        """The tokens of a history, [B, L T, D]; places without a token hold unspecified vectors."""
        B, L, Q = history.codes_BLQ.shape
        tokens = 1 + history.codes_BLQ + (jnp.arange(Q) * c.codebook)[None, None]
        if c.separator:
            tokens = jnp.concatenate([tokens, jnp.full((B, L, 1), c.vocabulary - 1, tokens.dtype)], axis=2)
        x = self.embedding[...][tokens].astype(c.dtype)
        if history.vector_BLD is not None:
            vector = history.vector_BLD.astype(c.dtype)
            last = jnp.where(history.is_vector()[:, :, None], vector, x[:, :, -1])
            x = jnp.concatenate([x[:, :, :-1], last[:, :, None]], axis=2)
        return x.reshape(B, L * c.places, c.embed_dim)

    def logits(self, c: CodeShape, hidden_BSQD: jax.Array) -> jax.Array:
        """Scores [B, S, Q, K], float32, of the codes of level q by the states of token q."""
        B, S, Q, D = hidden_BSQD.shape
        by_level = jnp.moveaxis(hidden_BSQD.reshape(B * S, Q, D), 1, 0)
        vectors = self.outputs(c).reshape(Q, c.codebook, D).astype(c.dtype)
        scores = jnp.einsum("qnd,qkd->qnk", by_level, vectors, preferred_element_type=jnp.float32)
        return jnp.moveaxis(scores, 0, 1).reshape(B, S, Q, c.codebook) * self.factor(c)

    def log_prob(self, c: CodeShape, hidden_BWD: jax.Array, level: int) -> jax.Array:
        """Log-probabilities [B, W, K], float32, of the codes of one level."""
        vectors = self.outputs(c)[level * c.codebook : (level + 1) * c.codebook].astype(c.dtype)
        scores = jnp.einsum("bwd,kd->bwk", hidden_BWD, vectors, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(scores * self.factor(c), axis=-1)

    def outputs(self, c: CodeShape) -> jax.Array:
        """The vectors that score the codes, [Q K, D]."""
        return self.embedding[...][1 : 1 + c.levels * c.codebook] if self.head is None else self.head[...]

    def factor(self, c: CodeShape) -> float:
        """What scores are multiplied by: D^-1/2 where the vectors are the embeddings."""
        return c.embed_dim**-0.5 if self.head is None else 1.0
