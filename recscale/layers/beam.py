"""Exact beam search over the code tuples of a catalogue, under jit; and from the tuples found to items.

Only children that exist are scored and only live items are found, so no place of the beam is spent on a tuple that
cannot be returned. Order: (score descending, code tuple ascending), exactly; score = float32 sum of log p.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recscale.layers.trie import Array, Trie, dead_nodes, leaf_of, places_of

LOWEST = float(np.finfo(np.float32).min)
"""Stands for the log-probability of the impossible inside a search: below every real score, above every filler."""

Step = Callable[[Any, jax.Array, int], tuple[jax.Array, Any]]
"""step(cache, code_BW, level) -> (log_prob_BWK, cache); the code is that of level - 1, and means nothing at level 0."""


class Beams(NamedTuple):
    """What was found for each row, best first.

    leaf_BW: int32 [B, W], number of the tuple in the trie, -1 where there is none. score_BW: float32 [B, W], its
    log-probability in nats; -inf for an impossible tuple and where there is none. codes_BWQ: int32 [B, W, Q], -1
    where there is none. A row whose step answered NaN (or +inf) has no tuples, and score NaN.
    """

    leaf_BW: jax.Array
    score_BW: jax.Array
    codes_BWQ: jax.Array


class Places(NamedTuple):
    """Where a target stands among the items found: int32 [B] each, bool for found.

    tuple_rank_B: rank of its tuple from 1, 0 if not found. first_rank_B: 1 + the items of better tuples, the rank of
    the first item of its bucket, 0 if not found. bucket_B: items of its tuple, found or not, itself among them; its
    expected rank at a random order inside the bucket is first_rank + (bucket - 1) / 2.
    """

    found_B: jax.Array
    tuple_rank_B: jax.Array
    first_rank_B: jax.Array
    bucket_B: jax.Array


def beam_search(step: Step, cache: Any, trie: Trie, batch: int, width: int, excluded_BE: Array | None = None) -> Beams:
    """The `width` best tuples per row of a beam search over the trie; with width >= number of tuples, all of them.

    step: log-probabilities over the codes of a level, [B, w, K_level] with K_level >= trie.sizes[level], for w beams;
    w = 1 at level 0 (all beams are the root), then min(width, nodes of the level). cache: a pytree of [B, 1, ...]
    leaves (of wider ones the first beam is taken), whose beams are reordered between steps.
    excluded_BE: int32 [B, E] item ids, 0 = none: a tuple all of whose items are excluded is not found, nor is any place
    spent on a prefix that has nothing else below it. Cost besides the steps: O(W x children) a level and O(E log n).

    Tuples of probability zero rank last, in order of their codes, before the places that stay empty.
    """
    if width < 1:
        raise ValueError(f"width: found {width}, expected at least 1 beam")
    none = [jnp.zeros((batch, 0), jnp.int32)] * trie.levels
    dead = none if excluded_BE is None or not excluded_BE.shape[1] else dead_nodes(trie, excluded_BE)
    cache = jax.tree.map(lambda x: x[:, :1], cache)
    node_BW = code_BW = jnp.zeros((batch, 1), jnp.int32)
    score_BW = jnp.zeros((batch, 1), jnp.float32)
    codes_BWQ, sound_B = jnp.zeros((batch, 1, 0), jnp.int32), jnp.ones(batch, bool)
    for level in range(trie.levels):
        log_prob_BWK, cache = step(cache, code_BW, level)
        check_codes(trie, level, log_prob_BWK)
        grow = functools.partial(_grow, trie, level, min(width, trie.count(level + 1)))
        node_BW, score_BW, parent_BW, code_BW, ok_B = jax.vmap(grow)(node_BW, score_BW, log_prob_BWK, dead[level])
        codes_BWQ = jnp.concatenate([take_beams(codes_BWQ, parent_BW), code_BW[..., None]], axis=-1)
        sound_B &= ok_B
        if level + 1 < trie.levels:
            cache = jax.tree.map(functools.partial(take_beams, parent_BW=parent_BW), cache)
    found_BW = (score_BW > -jnp.inf) & sound_B[:, None]
    score_BW = jnp.where(found_BW & (score_BW > LOWEST), score_BW, -jnp.inf)
    rest = width - node_BW.shape[1]
    return Beams(
        leaf_BW=jnp.pad(jnp.where(found_BW, node_BW, -1), ((0, 0), (0, rest)), constant_values=-1),
        score_BW=jnp.where(sound_B[:, None], jnp.pad(score_BW, ((0, 0), (0, rest)), constant_values=-jnp.inf), jnp.nan),
        codes_BWQ=jnp.pad(
            jnp.where(found_BW[..., None], codes_BWQ, -1), ((0, 0), (0, rest), (0, 0)), constant_values=-1
        ),
    )


def _grow(trie, level, size, node_W, score_W, log_prob_WK, dead_E):
    """One level for one row: (nodes, scores, parents, codes) [size] of the best children, and whether all was finite.

    Beams come in ascending order of their nodes, those that hold nothing (node n_l, score -inf) last: then candidates
    are in ascending order of their tuples, and top_k, which keeps the earlier of equals, breaks ties by code. What is
    kept returns to that order, but for the leaves.
    """
    child_WC, real_WC, code_WC = children(trie, level, node_W)
    log_prob_WC = jnp.take_along_axis(log_prob_WK.astype(jnp.float32), code_WC, axis=1, mode="promise_in_bounds")
    total_WC = score_W[:, None] + log_prob_WC
    sound = jnp.where(real_WC, total_WC < jnp.inf, True).all()
    total_WC = jnp.where(total_WC == 0, 0.0, total_WC)  # 0 for -0: equal scores, but not to top_k
    total_WC = jnp.where(real_WC, jnp.where(total_WC > LOWEST, total_WC, LOWEST), -jnp.inf)
    if len(dead_E):
        total_WC = _without(jnp.asarray(trie.first[level]), dead_E, node_W, total_WC)
    score_S, pick_S = jax.lax.top_k(total_WC.reshape(-1), size)
    if level + 1 < trie.levels:
        pick_S = jnp.where(score_S > -jnp.inf, pick_S, total_WC.size)
        pick_S, score_S = jax.lax.sort((pick_S, score_S), num_keys=1)
    alive_S = score_S > -jnp.inf
    pick_S = jnp.where(alive_S, pick_S, 0)
    parent_S = pick_S // trie.widths[level]
    node_S = jnp.where(alive_S, child_WC.reshape(-1)[pick_S], trie.count(level + 1))
    return node_S, score_S, parent_S, code_WC.reshape(-1)[pick_S], sound


def children(trie: Trie, level: int, node_W: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Number, existence and code, each [w, C], of the children of w nodes of a level (n_l: none); C = widths[level]."""
    first, code = jnp.asarray(trie.first[level]), jnp.asarray(trie.code[level])
    child_WC = first[node_W][:, None] + jnp.arange(trie.widths[level], dtype=jnp.int32)[None]
    real_WC = child_WC < first.at[node_W + 1].get(mode="clip")[:, None]
    return child_WC, real_WC, code.at[child_WC].get(mode="clip")


def _without(first: jax.Array, dead_E: jax.Array, node_W: jax.Array, total_WC: jax.Array) -> jax.Array:
    """The scores with -inf for dead children. node_W ascends, so the beam of a dead child is found by its parent."""
    parent_E = (jnp.searchsorted(first, dead_E, side="right") - 1).astype(jnp.int32)
    beam_E = jnp.searchsorted(node_W, parent_E)
    here_E = node_W.at[beam_E].get(mode="fill", fill_value=-1) == parent_E
    column_E = jnp.where(here_E, dead_E - first[parent_E], total_WC.shape[1])
    return total_WC.at[beam_E, column_E].set(-jnp.inf, mode="drop")


def take_beams(x_BW: jax.Array, parent_BW: jax.Array) -> jax.Array:
    """Beams of each row by number: [B, w, ...] and int32 [B, W] -> [B, W, ...]."""
    return jax.vmap(lambda x_W, parent_W: x_W.at[parent_W].get(mode="promise_in_bounds"))(x_BW, parent_BW)


def check_codes(trie: Trie, level: int, log_prob_BWK: jax.Array) -> None:
    """Raises ValueError where a step knows fewer codes than the catalogue has."""
    if log_prob_BWK.shape[-1] < trie.sizes[level]:
        raise ValueError(
            f"level {level}: the step gave log-probabilities of {log_prob_BWK.shape[-1]} codes, the catalogue has "
            f"codes up to {trie.sizes[level] - 1}: the model was built for another catalogue"
        )


def places(beams: Beams, trie: Trie, target_B: Array, excluded_BE: Array | None = None) -> Places:
    """Where the target of each row stands; excluded items of a tuple do not count, an excluded target is not found.

    target_B: int32 [B] item ids; 0 is never found. excluded_BE: as in `beam_search`. Traceable.
    """
    batch = beams.leaf_BW.shape[0]
    excluded_BE = jnp.zeros((batch, 0), jnp.int32) if excluded_BE is None else jnp.asarray(excluded_BE)
    target_B = jnp.asarray(target_B)
    size = functools.partial(_live, jnp.asarray(trie.leaf_first))
    gone_BE = places_of(trie, excluded_BE)
    own_B = leaf_of(trie, target_B)
    size_BW = jax.vmap(size)(gone_BE, beams.leaf_BW)
    bucket_B = jax.vmap(size)(gone_BE, own_B[:, None])[:, 0]
    hit_BW = beams.leaf_BW == own_B[:, None]
    found_B = hit_BW.any(axis=1) & ~(excluded_BE == target_B[:, None]).any(axis=1)
    rank_B = jnp.argmax(hit_BW, axis=1).astype(jnp.int32)
    before_B = jnp.take_along_axis(jnp.cumsum(size_BW, axis=1) - size_BW, rank_B[:, None], axis=1)[:, 0]
    return Places(found_B, jnp.where(found_B, 1 + rank_B, 0), jnp.where(found_B, 1 + before_B, 0), bucket_B)


def _live(leaf_first: jax.Array, gone_E: jax.Array, leaf_W: jax.Array) -> jax.Array:
    """Items of each leaf that are not among the places gone (ascending, distinct); 0 for no leaf, whether -1 or n_Q."""
    begin_W = leaf_first[jnp.maximum(leaf_W, 0)]
    end_W = leaf_first.at[jnp.maximum(leaf_W, 0) + 1].get(mode="clip")
    live_W = end_W - begin_W - jnp.searchsorted(gone_E, end_W) + jnp.searchsorted(gone_E, begin_W)
    return jnp.where(leaf_W >= 0, live_W, 0).astype(jnp.int32)


def ranked_items(beams: Beams, trie: Trie, k: int, excluded_BE: np.ndarray | None = None) -> np.ndarray:
    """The first k items of each row, int32 [B, k], 0 where there are no more: tuple by tuple, ids ascending inside.

    On the host. excluded_BE: int32 [B, E] item ids that are left out, 0 = none.
    """
    leaf_BW, first = np.asarray(beams.leaf_BW), np.asarray(trie.leaf_first)
    begin, count = first[leaf_BW].reshape(-1), np.where(leaf_BW < 0, 0, np.diff(first)[leaf_BW]).reshape(-1)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    item = np.asarray(trie.leaf_items)[np.repeat(begin, count) + offset]
    row = np.repeat(np.arange(leaf_BW.size) // leaf_BW.shape[1], count)
    if excluded_BE is not None:
        rows_BE = np.arange(len(excluded_BE))[:, None] * (trie.items + 1)
        live = ~np.isin(row * (trie.items + 1) + item, rows_BE + np.asarray(excluded_BE))
        item, row = item[live], row[live]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    ranked_Bk = np.zeros((len(leaf_BW), k), np.int32)
    ranked_Bk[row[place < k], place[place < k]] = item[place < k]
    return ranked_Bk
