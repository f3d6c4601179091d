"""T5 written out in numpy float64, token by token: the twin of layers/t5.py and both generative models.

A slip named in SLIPS makes one published mistake on purpose.
"""

import math
from collections.abc import Callable

import jax
import numpy as np

SLIPS = ("1/sqrt(d)", "no D^-.5", "bias in cross-attention", "post-norm", "buckets swapped", "mean removed by the norm")


def random_model(build: Callable, seed: int = 0):
    """What `build` returns with every parameter random, norms too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), jax.eval_shape(build))


def numbers_of(model):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), model)


def bucket(distance: int, bidirectional: bool) -> int:
    """Key position minus query position; 16 a sign and 8 exact, or 32 and 16 exact."""
    if bidirectional:
        m, offset, exact, octaves, top = abs(distance), 16 * (distance > 0), 8, 16.0, 15
    else:
        m, offset, exact, octaves, top = max(-distance, 0), 0, 16, 8.0, 31
    if m < exact:
        return offset + m
    return offset + min(exact + math.floor(math.log(m / exact) / math.log(octaves) * exact), top)


def rms(scale, x, slip):
    x = x - x.mean(-1, keepdims=True) if slip == "mean removed by the norm" else x
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def attention(c, block, i, x, read, bias_HLM, mask, slip):
    """What the sub-layer adds, from normalised x [L, D] and what is read [M, D]."""
    q, k, v = np.split(block.qkv[...][i], 3, axis=1)
    out = np.zeros((len(x), c.heads * c.head_dim))
    for h in range(c.heads):
        part = slice(h * c.head_dim, (h + 1) * c.head_dim)
        scores = (x @ q[:, part]) @ (read @ k[:, part]).T
        scores = scores * c.head_dim**-0.5 if slip == "1/sqrt(d)" else scores
        weights = np.where(mask, np.exp(scores + bias_HLM[h]), 0.0)
        out[:, part] = weights / weights.sum(-1, keepdims=True) @ (read @ v[:, part])
    return out @ block.out[...][i]


def stack(c, numbers, x, places, bidirectional, slip="", memory=None):
    """Final states [L, D] of tokens x at `places`; causal unless bidirectional; memory [M, D] for a decoder."""
    distance = places[None, :] - places[:, None]
    swapped = bidirectional != (slip == "buckets swapped")
    buckets = np.array([[bucket(int(d), swapped) for d in row] for row in distance])
    bias = np.moveaxis(numbers.relative[...][buckets], -1, 0)
    mask = np.ones_like(distance, bool) if bidirectional else distance <= 0
    layers = numbers.layers

    def residual(x, scale, sublayer):
        if slip == "post-norm":
            return rms(scale, x + sublayer(x), slip)
        return x + sublayer(rms(scale, x, slip))

    for i in range(c.depth):
        block = layers.attention
        x = residual(x, block.norm.scale[...][i], lambda y, b=block, i=i: attention(c, b, i, y, y, bias, mask, slip))
        if memory is not None:
            far = np.arange(len(memory))[None, :] - np.arange(len(x))[:, None]
            far = np.array([[bucket(int(d), False) for d in row] for row in far])
            cross = np.moveaxis(numbers.relative[...][far], -1, 0) * (slip == "bias in cross-attention")
            x = residual(
                x,
                layers.cross.norm.scale[...][i],
                lambda y, i=i, cross=cross: attention(c, layers.cross, i, y, memory, cross, True, slip),
            )
        wi, wo = layers.ffn.wi[...][i], layers.ffn.wo[...][i]
        x = residual(x, layers.ffn.norm.scale[...][i], lambda y, wi=wi, wo=wo: np.maximum(y @ wi, 0.0) @ wo)
    return rms(numbers.norm.scale[...], x, slip)


def vectors_of(c, numbers, codes):
    """Vectors of the codes [Q] of one item."""
    return [numbers.tokens.embedding[...][1 + q * c.codebook + int(code)] for q, code in enumerate(codes)]


def scores(c, numbers, hidden_QD, slip=""):
    table = numbers.tokens.embedding[...][1 : 1 + c.levels * c.codebook].reshape(c.levels, c.codebook, -1)
    factor = 1.0 if slip == "no D^-.5" else c.embed_dim**-0.5
    return np.einsum("qd,qkd->qk", hidden_QD, table) * factor


def encoder_decoder(model, history, next_BLQ, slots_BS, slip=""):
    """Scores [B, S, Q, K] of models/tiger.py: every target from the tokens of its own segment alone."""
    c, numbers = model.config, numbers_of(model)
    T = c.levels + int(c.separator)
    found = np.zeros((*slots_BS.shape, c.levels, c.codebook))
    for b, s in np.ndindex(*slots_BS.shape):
        slot = slots_BS[b, s]
        tokens, places = [], []
        for i in np.flatnonzero(history.segment_ids_BL[b] == history.segment_ids_BL[b, slot]):
            if history.item_BL[b, i]:
                here = vectors_of(c, numbers, history.codes_BLQ[b, i])
                here += [numbers.tokens.embedding[...][-1]] if c.separator else []
            else:
                here = [history.vector_BLD[b, i].astype(np.float64)]
            tokens += here
            places += list(range((i + 1) * T - len(here), (i + 1) * T))
        memory = stack(c, numbers.encoder, np.array(tokens), np.array(places), True, slip)
        target = [numbers.tokens.embedding[...][0], *vectors_of(c, numbers, next_BLQ[b, slot][:-1])]
        hidden = stack(c, numbers.decoder, np.array(target), np.arange(c.levels), False, slip, memory)
        found[b, s] = scores(c, numbers, hidden, slip)
    return found


def decoder_only(model, history, next_BLQ, slots_BS, slip=""):
    """Scores [B, S, Q, K] of models/tiger_decoder.py."""
    c, numbers = model.config, numbers_of(model)
    found = np.zeros((*slots_BS.shape, c.levels, c.codebook))
    for b, s in np.ndindex(*slots_BS.shape):
        slot = slots_BS[b, s]
        before = np.flatnonzero(history.segment_ids_BL[b] == history.segment_ids_BL[b, slot])
        tokens = []
        for i in before[before <= slot]:
            codes = vectors_of(c, numbers, history.codes_BLQ[b, i])
            if not history.item_BL[b, i]:
                tokens.append(history.vector_BLD[b, i].astype(np.float64))
            else:
                tokens.append(np.sum(codes, axis=0) if i == before[0] else codes[-1])
            tokens += vectors_of(c, numbers, next_BLQ[b, i][:-1])
        hidden = stack(c, numbers.stack, np.array(tokens), np.arange(len(tokens)), False, slip)
        found[b, s] = scores(c, numbers, hidden[-c.levels :], slip)
    return found
