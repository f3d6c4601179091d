"""The encoder of DreamRec (arXiv 2310.20453): one block of attention over the history, whose result is a condition.

One head. Queries are normalised, keys and values are not, and the residual is the normalised input:

    s = dropout(x + position), 0 where padding;  q = Wq LN1(s), k = Wk s, v = Wv s, all with biases
    a = dropout(softmax(q k / sqrt(D))) v + LN1(s)
    h = LN3(f), f = LN(y + dropout(W2 relu(W1 y))) with y = LN2(a), 0 where padding

Keys whose entries sum to exactly 0 get the score -2^32 + 1. The reference multiplies attention by a query mask, the
sign of |sum of LN1(s)|, which rounding alone decides: here it is 1. A slot of padding therefore gives LN3's bias, and
so does an empty history, see `Model.empty`.

Departs from the reference: later events and other segments have no weight at all, also where every visible key sums to
0 (there it would weigh all ten slots alike). Attention is one product over all pairs of a row: rows should be short.
The denoisers are in layers/denoisers.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.kernels.pairs import spans, visible
from recscale.layers.conditions import UniformLinear
from recscale.layers.norms import LayerNorm, dropout
from recscale.layers.width_transfer import BaseShape, Factors
from recscale.mesh import recompute

EPS = 1e-5
MASKED = -(2.0**32) + 1
ITEM_DEVIATION = 1.0
"""Standard deviation of the item vectors at the start, in the reference; their table is not the model's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of DreamRec's encoder.

    embed_dim: width of the item vectors and of all states; max_length: the longest history. prefix: 0; base: None;
    features of users and width transfer are not worked out for this model.
    """

    embed_dim: int
    max_length: int
    dropout: float
    dtype: str
    prefix: int = 0
    base: BaseShape | None = None

    def __post_init__(self):
        for name in ("embed_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: expected a positive integer")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.prefix:
            raise ValueError(f"model.prefix = {self.prefix}: model_name = 'dreamrec' reads no features of users: 0")
        if self.base is not None:
            raise ValueError("model_name = 'dreamrec' has no width transfer: set optim.parametrisation to 'sp'")


class Model(nnx.Module):
    """Embedded events [B, L, embed_dim] to hidden states [B, L, embed_dim]."""

    def __init__(self, c: Config, key: jax.Array):
        self.config = c
        D, keys = c.embed_dim, jax.random.split(key, 6)
        self.positions = nnx.Param(jax.random.normal(keys[0], (c.max_length, D)))
        self.norm_queries, self.norm_ffn = LayerNorm(D, EPS), LayerNorm(D, EPS)
        self.norm_out, self.norm = LayerNorm(D, EPS), LayerNorm(D, EPS)
        self.query, self.key, self.value = (UniformLinear(D, D, k) for k in keys[1:4])
        self.ffn_in, self.ffn_out = (UniformLinear(D, D, k) for k in keys[4:])

    def __call__(
        self, x_BLD: jax.Array, batch: dict[str, jax.Array], key: jax.Array | None = None, wrap=recompute
    ) -> jax.Array:
        """Hidden states of the packed rows `batch` (segment_ids, positions), float32; key: dropout, None evaluates.

        wrap has nothing to wrap: there is one block, and no scan.
        """
        del wrap
        c = self.config
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        real_BL1 = ((batch["segment_ids"] > 0) & (batch["item_id"] > 0))[:, :, None]  # an empty history is a blank slot
        placed = x_BLD + self.positions[...].at[batch["positions"]].get(mode="clip")
        s = jnp.where(real_BL1, dropout(placed, c.dropout, keys[0]), 0.0).astype(c.dtype)
        asked = self.norm_queries(s)
        weights = dropout(self._weights(asked, s, batch["segment_ids"]), c.dropout, keys[1])
        v = self.value(s)
        y = self.norm_ffn(jnp.einsum("bij,bjd->bid", weights.astype(v.dtype), v) + asked)
        hidden = self.ffn_out(jax.nn.relu(self.ffn_in(y)))
        f = self.norm_out(y + dropout(hidden, c.dropout, keys[2]))
        return self.norm(jnp.where(real_BL1, f, 0.0)).astype(jnp.float32)

    def _weights(self, asked_BLD: jax.Array, s_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Attention [B, L, L] of every slot over its own segment up to itself, float32."""
        q, k = self.query(asked_BLD), self.key(s_BLD)
        logits = jnp.einsum("bid,bjd->bij", q, k, preferred_element_type=jnp.float32) * self.config.embed_dim**-0.5
        zero_sum_BL = s_BLD.astype(jnp.float32).sum(axis=-1) == 0.0
        slots_L = jnp.arange(s_BLD.shape[1])
        seen_BLL = visible(spans(segment_ids_BL, 0), slots_L, slots_L, 0, 0, None)
        # What is not seen lies below a masked key, too low for a weight beside one; padding sees nothing and is zeroed.
        logits = jnp.where(zero_sum_BL[:, None, :], MASKED, logits)
        return jax.nn.softmax(jnp.where(seen_BLL, logits, 2 * MASKED), axis=-1)

    def empty(self) -> jax.Array:
        """What a history without events gives, float32 [embed_dim]: the bias of the last norm."""
        return self.norm.bias[...]


def flops(c: Config, length: int) -> dict[str, float]:
    """Forward FLOPs of one history of `length` events by part (multiply-add = 2, causal attention counted once)."""
    attention = 4 * c.embed_dim * length * (length + 1) / 2
    return {"projections": float(2 * length * 5 * c.embed_dim**2), "attention": float(attention)}


def param_groups(c: Config) -> dict[str, int]:
    """Parameters by group; tables are counted by their owner. Five matrices with biases, four norms."""
    return {"dense": 5 * c.embed_dim**2 + 13 * c.embed_dim, "positions": c.max_length * c.embed_dim}


def width_factors(c: Config) -> dict[str, Factors]:
    """None: width transfer is not worked out for this model, and its Config refuses a base shape."""
    del c
    return {}
