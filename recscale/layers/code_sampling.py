"""Random code tuples of a catalogue, drawn code by code from a model's distribution; not a search.

What some papers call beam search (a multinomial draw per step) is this, with repeats: each draw is independent.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from recscale.layers.beam import Beams, Step, check_codes, children, take_beams
from recscale.layers.trie import Trie


def sample(
    step: Step,
    cache: Any,
    trie: Trie,
    batch: int,
    key: jax.Array,
    count: int,
    temperature: float | jax.Array = 1.0,
) -> Beams:
    """`count` independent tuples per row, in the order drawn, repeats among them.

    Each code is drawn with probability proportional to p(code | prefix)^(1 / temperature) among the children that
    exist. step, cache, batch: as in `beam_search`. score_BW: log-probability of the
    drawn tuple under the model itself, neither tempered nor renormalised over the trie. A row whose step answers NaN,
    or probability zero for every child of the prefix drawn, gets no tuple there (leaf -1).
    Raises ValueError for a count below 1 or a temperature not above 0.
    """
    if count < 1:
        raise ValueError(f"count: found {count}, expected at least 1 tuple a row")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature: found {temperature}, expected a number above 0")
    cache = jax.tree.map(lambda x: x[:, :1], cache)
    node_BW = code_BW = jnp.zeros((batch, 1), jnp.int32)
    score_BW = jnp.zeros((batch, 1), jnp.float32)
    codes = []
    for level in range(trie.levels):
        log_prob_BWK, cache = step(cache, code_BW, level)
        check_codes(trie, level, log_prob_BWK)
        draw = functools.partial(_draw, trie, level, count, temperature)
        keys = jax.random.split(jax.random.fold_in(key, level), batch)
        node_BW, score_BW, code_BW = jax.vmap(draw)(keys, node_BW, score_BW, log_prob_BWK)
        codes.append(code_BW)
        if level == 0:
            root_BW = jnp.zeros((batch, count), jnp.int32)
            cache = jax.tree.map(functools.partial(take_beams, parent_BW=root_BW), cache)
    found_BW = node_BW < trie.count(trie.levels)
    return Beams(
        leaf_BW=jnp.where(found_BW, node_BW, -1),
        score_BW=jnp.where(found_BW, score_BW, -jnp.inf),
        codes_BWQ=jnp.where(found_BW[..., None], jnp.stack(codes, axis=-1), -1),
    )


def _draw(trie, level, count, temperature, key, node_W, score_W, log_prob_WK):
    """One level for one row: nodes, scores and codes [count] of a child of each beam (of the root: `count` of them)."""
    child_WC, real_WC, code_WC = children(trie, level, node_W)
    log_prob_WC = jnp.take_along_axis(log_prob_WK.astype(jnp.float32), code_WC, axis=1, mode="promise_in_bounds")
    log_prob_WC = jnp.where(real_WC & (log_prob_WC > -jnp.inf), log_prob_WC, -jnp.inf)  # NaN is no chance either
    noise = jax.random.gumbel(key, (count, log_prob_WC.shape[1]))
    pick_W = jnp.argmax(log_prob_WC / temperature + noise, axis=1)[:, None]

    def picked(x_WC):
        return jnp.take_along_axis(jnp.broadcast_to(x_WC, noise.shape), pick_W, axis=1)[:, 0]

    gain_W = picked(log_prob_WC)
    alive_W = gain_W > -jnp.inf
    node_W = jnp.where(alive_W, picked(child_WC), trie.count(level + 1))
    return node_W, score_W + gain_W, jnp.where(alive_W, picked(code_WC), 0)
