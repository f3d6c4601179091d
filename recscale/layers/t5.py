"""Blocks of T5 (arXiv 1910.10683), as the public implementations compute them.

Pre-norm with RMSNorm, no biases, no 1/sqrt(d) in attention (the initial deviations stand for it), a ReLU feed-forward,
and one table of relative biases per stack, shared by its layers; cross-attention has none. Dropout falls on attention
weights, the hidden units of the feed-forward, every sub-layer's output, and what enters and leaves a stack.

Attention is one product over all pairs with a mask: a history of 20 items of 4 codes is 80 tokens, too few for blocks
to pay. The relative bias is [H, L, L], whatever the batch.

Shapes: B rows, L tokens, M tokens attended to, D width, H heads, E width of a head, W beams, S targets, Q codes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.layers.hashed_dropout import dropout
from recscale.layers.norms import matmul
from recscale.mesh import recompute

EPS = 1e-6
BUCKETS = 32
MAX_DISTANCE = 128
MASKED = -1e30
INITS = ("t5", "small")
SMALL = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a stack's layers. embed_dim: D; depth: layers; ffn: hidden units; init: "t5" or "small" (all .02)."""

    embed_dim: int
    depth: int
    heads: int
    head_dim: int
    ffn: int
    dropout: float
    init: str = "t5"

    def deviation(self, t5: float) -> float:
        """The initial standard deviation of a matrix that T5 draws with deviation `t5`."""
        return t5 if self.init == "t5" else SMALL


class KeysValues(NamedTuple):
    """What attention reads of some tokens: keys and values, each [B, H, M, E], or [B, W, H, M, E] for beams."""

    k: jax.Array
    v: jax.Array


def relative_bucket(distance: np.ndarray, bidirectional: bool) -> np.ndarray:
    """Bucket (0 to 31) of key position minus query position, int; one by one near, then by logarithm up to 128."""
    distance = np.asarray(distance)
    buckets = BUCKETS // 2 if bidirectional else BUCKETS
    offset = np.where(distance > 0, buckets, 0) if bidirectional else 0
    m = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    exact = buckets // 2
    octave = np.log(np.maximum(m, exact) / exact) / np.log(MAX_DISTANCE / exact)
    far = np.minimum(exact + np.floor(octave * (buckets - exact)).astype(int), buckets - 1)
    return np.where(m < exact, m, far) + offset


def relative_bias(table: jax.Array, length: int, bidirectional: bool) -> jax.Array:
    """Bias [H, L, L] of query i and key j from a table [32, H].

    One value a distance, laid along the diagonals by reshaping: a lookup by pair would scatter its gradient.
    """
    L = length
    around = np.concatenate([np.arange(L), [0], np.arange(1 - L, 0)])  # distance r at place r modulo 2 L
    one_hot = np.eye(BUCKETS, dtype=np.float32)[relative_bucket(around, bidirectional)]
    by_distance = table.T @ one_hot.T
    H = by_distance.shape[0]
    rows = jnp.broadcast_to(by_distance[:, None], (H, L, 2 * L)).reshape(H, 2 * L * L)
    return rows[:, : L * (2 * L - 1)].reshape(H, L, max(2 * L - 1, 0))[:, :, :L]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, bias: jax.Array | None, rate: float, key
) -> jax.Array:
    """Attention of q [..., L, E] over k, v [..., M, E] with equal leading axes; scores and weights float32.

    mask (bool) and bias end in [L, M], 1 where an axis is shared. A query that sees nothing gets finite numbers.
    """
    scores = jnp.einsum("...le,...me->...lm", q, k, preferred_element_type=jnp.float32)
    scores = scores if bias is None else scores + bias
    weights, total = softmax_parts(jnp.where(mask, scores, MASKED))
    weights = dropout(weights, rate, key)
    o = jnp.einsum("...lm,...me->...le", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (o / total).astype(v.dtype)


def softmax_parts(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(score - highest) and its sum over the last axis: dividing the weighted values costs less than the weights."""
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True, initial=MASKED))
    return weights, weights.sum(axis=-1, keepdims=True)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, statistics float32, no bias; keeps the type."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + EPS)
        return (y * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of an attention with its norm: queries, keys and values [D, H E] in one matrix, and the output's."""

    def __init__(self, c: Shape, key: jax.Array):
        keys = jax.random.split(key, 4)
        D, inner = c.embed_dim, c.heads * c.head_dim
        self.norm = RMSNorm(D)
        deviations = (c.deviation((D * c.head_dim) ** -0.5), c.deviation(D**-0.5), c.deviation(D**-0.5))
        drawn = [s * jax.random.normal(k, (D, inner)) for s, k in zip(deviations, keys[:3], strict=True)]
        self.qkv = nnx.Param(jnp.concatenate(drawn, axis=1))
        self.out = nnx.Param(c.deviation(inner**-0.5) * jax.random.normal(keys[3], (inner, D)))

    def project(self, c: Shape, x: jax.Array, first: int, last: int) -> jax.Array:
        """Parts first to last - 1 of (queries, keys, values) of x [..., L, D], as [parts, ..., H, L, E]."""
        inner = c.heads * c.head_dim
        y = matmul(x, self.qkv[...][:, first * inner : last * inner])
        y = y.reshape(*x.shape[:-1], last - first, c.heads, c.head_dim)
        lead = x.ndim - 2
        return y.transpose(lead + 1, *range(lead), lead + 2, lead, lead + 3)

    def finish(self, c: Shape, x: jax.Array, o: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [..., L, D] plus the output of attention, o [..., H, L, E]."""
        joined = jnp.swapaxes(o, -3, -2).reshape(*x.shape[:-1], c.heads * c.head_dim)
        return x + dropout(matmul(joined, self.out[...]), c.dropout, key)

    def attend_self(self, c: Shape, x: jax.Array, mask: jax.Array, bias: jax.Array, keys) -> jax.Array:
        """x [..., L, D] plus its self-attention; keys: two for dropout."""
        q, k, v = self.project(c, self.norm(x), 0, 3)
        return self.finish(c, x, attend(q, k, v, mask, bias, c.dropout, keys[0]), keys[1])

    def read(self, c: Shape, memory: jax.Array) -> KeysValues:
        """Keys and values of normalised states [B, M, D]."""
        return KeysValues(*self.project(c, memory, 1, 3))

    def attend_cross(self, c: Shape, x: jax.Array, read: KeysValues, mask: jax.Array, keys) -> jax.Array:
        """x [B, L, D] plus its attention over what was read; mask [B, 1, L, M]."""
        (q,) = self.project(c, self.norm(x), 0, 1)
        return self.finish(c, x, attend(q, read.k, read.v, mask, None, c.dropout, keys[0]), keys[1])

    def step(
        self,
        c: Shape,
        x_BWD: jax.Array,
        past: KeysValues | None,
        bias: jax.Array,
        shared: KeysValues | None = None,
        shared_bias: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Self-attention of one more token of every beam: over its own past, itself, and keys that the beams share.

        past: of the beams, [B, W, H, l, E]; bias: [H, l + 1], the last entry the token's own. shared: [B, H, M, E] with
        shared_bias [B, H, M] (MASKED where there is no token). Returns the states and the past with the token.
        """
        q, k, v = self.project(c, self.norm(x_BWD)[:, :, None], 0, 3)
        own = KeysValues(k, v)
        if past is not None:
            own = KeysValues(*(jnp.concatenate(pair, axis=3) for pair in zip(past, own, strict=True)))
        # Per beam a handful of keys: sums of products, where batched matrix products would be one call a beam and head.
        scores = (q.astype(jnp.float32) * own.k.astype(jnp.float32)).sum(axis=-1) + bias[None, None]
        if shared is None or shared_bias is None:
            weights, total = softmax_parts(scores)
            o = (weights[..., None] * own.v.astype(jnp.float32)).sum(axis=3) / total
        else:
            q_BHWE = jnp.swapaxes(q[:, :, :, 0], 1, 2)
            far = jnp.einsum("bhwe,bhme->bwhm", q_BHWE, shared.k, preferred_element_type=jnp.float32)
            M = far.shape[-1]
            weights, total = softmax_parts(jnp.concatenate([far + shared_bias[:, None], scores], axis=-1))
            o = (weights[..., M:, None] * own.v.astype(jnp.float32)).sum(axis=3)
            far_weights = jnp.swapaxes(weights[..., :M], 1, 2).astype(shared.v.dtype)
            o += jnp.einsum("bhwm,bhme->bwhe", far_weights, shared.v, preferred_element_type=jnp.float32)
            o = o / total
        return self.finish(c, x_BWD[:, :, None], o[:, :, :, None].astype(x_BWD.dtype), None)[:, :, 0], own


class FeedForward(nnx.Module):
    """x + dropout(relu(RMSNorm(x) wi)) wo."""

    def __init__(self, c: Shape, key: jax.Array):
        keys = jax.random.split(key, 2)
        self.norm = RMSNorm(c.embed_dim)
        self.wi = nnx.Param(c.deviation(c.embed_dim**-0.5) * jax.random.normal(keys[0], (c.embed_dim, c.ffn)))
        self.wo = nnx.Param(c.deviation(c.ffn**-0.5) * jax.random.normal(keys[1], (c.ffn, c.embed_dim)))

    def __call__(self, c: Shape, x: jax.Array, keys) -> jax.Array:
        hidden = dropout(jax.nn.relu(matmul(self.norm(x), self.wi[...])), c.dropout, keys[0])
        return x + dropout(matmul(hidden, self.wo[...]), c.dropout, keys[1])


class EncoderLayer(nnx.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, c: Shape, key: jax.Array):
        keys = jax.random.split(key, 2)
        self.attention = Attention(c, keys[0])
        self.ffn = FeedForward(c, keys[1])


class DecoderLayer(nnx.Module):
    """Self-attention, cross-attention, then feed-forward."""

    def __init__(self, c: Shape, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.attention = Attention(c, keys[0])
        self.cross = Attention(c, keys[1])
        self.ffn = FeedForward(c, keys[2])


class Stack(nnx.Module):
    """Layers stacked along the first axis, their table of relative biases, and the final norm."""

    def __init__(self, c: Shape, layer: type[EncoderLayer] | type[DecoderLayer], bidirectional: bool, key: jax.Array):
        keys = jax.random.split(key, 2)
        self.bidirectional = bidirectional
        self.layers = jax.vmap(lambda k: layer(c, k))(jax.random.split(keys[0], c.depth))
        deviation = c.deviation(c.embed_dim**-0.5)
        self.relative = nnx.Param(deviation * jax.random.normal(keys[1], (BUCKETS, c.heads)))
        self.norm = RMSNorm(c.embed_dim)

    def bias(self, length: int) -> jax.Array:
        """The relative bias [H, L, L] of every layer."""
        return relative_bias(self.relative[...], length, self.bidirectional)

    def last_bias(self, length: int) -> jax.Array:
        """The relative bias [H, L] of the last of L tokens to itself and the tokens before it."""
        return self.relative[...][relative_bucket(np.arange(length) - (length - 1), self.bidirectional)].T

    def unstacked(self) -> list:
        """The layers one by one, for code that runs them without a scan."""
        depth = self.layers.ffn.wi[...].shape[0]
        return [jax.tree.map(lambda w, i=i: w[i], self.layers) for i in range(depth)]

    def encode(
        self, c: Shape, x_BLD: jax.Array, mask_BLL: jax.Array, key: jax.Array | None = None, wrap=recompute
    ) -> jax.Array:
        """States [B, L, D] after the final norm of a stack of EncoderLayer; mask: which key a query sees."""
        bias, mask = self.bias(x_BLD.shape[1])[None], mask_BLL[:, None]

        def body(x, layer_and_key):
            layer, layer_key = layer_and_key
            keys = split(layer_key, 4)
            x = layer.attention.attend_self(c, x, mask, bias, keys[:2])
            return layer.ffn(c, x, keys[2:]), None

        return self._scan(c, body, x_BLD, key, wrap)

    def keys_values(self, c: Shape, x_BLD: jax.Array, mask_BLL: jax.Array) -> tuple[KeysValues, ...]:
        """Keys and values of every layer of a stack of EncoderLayer, evaluating."""
        bias, mask, none = self.bias(x_BLD.shape[1])[None], mask_BLL[:, None], (None, None)
        x, found = x_BLD, []
        for layer in self.unstacked():
            found.append(layer.attention.read(c, layer.attention.norm(x)))
            x = layer.ffn(c, layer.attention.attend_self(c, x, mask, bias, none), none)
        return tuple(found)

    def decode(
        self,
        c: Shape,
        x_BSQD: jax.Array,
        memory_BMD: jax.Array,
        mask_BSM: jax.Array,
        key: jax.Array | None = None,
        wrap=recompute,
    ) -> jax.Array:
        """States [B, S, Q, D] after the final norm of a stack of DecoderLayer: S targets of Q tokens a row.

        A token sees those of its own target up to itself, and the tokens of the memory that mask [B, S, M] allows.
        """
        B, S, Q, D = x_BSQD.shape
        bias = self.bias(Q)[None, None]
        causal = jnp.asarray(np.tri(Q, dtype=bool))[None, None, None]
        mask = jnp.repeat(mask_BSM, Q, axis=1)[:, None]

        def body(x, layer_and_key):
            layer, layer_key = layer_and_key
            keys = split(layer_key, 6)
            x = layer.attention.attend_self(c, x, causal, bias, keys[:2]).reshape(B, S * Q, D)
            x = layer.cross.attend_cross(c, x, layer.cross.read(c, memory_BMD), mask, keys[2:4])
            return layer.ffn(c, x, keys[4:]).reshape(B, S, Q, D), None

        return self._scan(c, body, x_BSQD, key, wrap)

    def _scan(self, c: Shape, body, x: jax.Array, key: jax.Array | None, wrap) -> jax.Array:
        keys = split(key, c.depth + 2)
        layer_keys = None if key is None else keys[: c.depth]
        x, _ = jax.lax.scan(wrap(body), dropout(x, c.dropout, keys[-2]), (self.layers, layer_keys))
        return dropout(self.norm(x), c.dropout, keys[-1])


def split(key: jax.Array | None, count: int):
    """`count` keys, or as many None where there is no dropout."""
    return (None,) * count if key is None else jax.random.split(key, count)


def layer_parameters(c: Shape) -> tuple[int, int]:
    """Parameters of an encoder layer and of a decoder layer."""
    attention = 4 * c.embed_dim * c.heads * c.head_dim + c.embed_dim
    ffn = 2 * c.embed_dim * c.ffn + c.embed_dim
    return attention + ffn, 2 * attention + ffn
