"""The trie of a catalogue: every tuple once and in order, whatever the levels; nodes that exclusions leave empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recscale.layers import trie as tries

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def catalogues(draw) -> np.ndarray:
    """Codes [V + 1, Q] with Q 1..5, 1..12 items and few codes, so that tuples collide."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    rows = draw(st.lists(st.tuples(*(st.integers(0, size - 1) for size in sizes)), min_size=1, max_size=12))
    return np.array([(0,) * len(sizes), *rows], np.int32)


def prefixes(codes_VQ: np.ndarray, level: int) -> list[tuple[int, ...]]:
    return sorted({tuple(row[:level].tolist()) for row in codes_VQ[1:]})


@QUICK
@given(catalogues())
def test_every_prefix_is_a_node_in_lexicographic_order_and_every_item_hangs_on_its_tuple(codes_VQ):
    trie = tries.build(codes_VQ)
    levels = codes_VQ.shape[1]
    assert trie.levels == levels and trie.items == len(codes_VQ) - 1
    for level in range(levels):
        nodes, below = prefixes(codes_VQ, level), prefixes(codes_VQ, level + 1)
        assert (trie.count(level), trie.count(level + 1)) == (len(nodes), len(below))
        found = [
            (*node, int(code))
            for n, node in enumerate(nodes)
            for code in trie.code[level][trie.first[level][n] : trie.first[level][n + 1]]
        ]
        assert found == below
        assert trie.widths[level] == max(np.diff(trie.first[level]))
        assert trie.sizes[level] == codes_VQ[1:, level].max() + 1
    leaves = prefixes(codes_VQ, levels)
    assert tries.leaf_codes(trie).tolist() == [list(leaf) for leaf in leaves]
    for n, leaf in enumerate(leaves):
        items = trie.leaf_items[trie.leaf_first[n] : trie.leaf_first[n + 1]]
        assert items.tolist() == [i for i in range(1, len(codes_VQ)) if tuple(codes_VQ[i].tolist()) == leaf]


dead_nodes, places_of = jax.jit(tries.dead_nodes), jax.jit(tries.places_of)


@pytest.mark.parametrize("form", range(4))
@QUICK
@given(excluded=st.lists(st.integers(0, 9), max_size=6), seed=st.integers(0, 999))
def test_dead_nodes_are_those_with_nothing_left_below(form, excluded, seed):
    sizes = [(3,), (2, 3), (2, 2, 2), (2, 1, 3, 2)][form]
    codes_VQ = np.stack([np.random.default_rng(form).integers(0, size, 10) for size in sizes], axis=1)
    codes_VQ[1:] = np.random.default_rng(seed).permutation(codes_VQ[1:])  # the tree's form stays: compiled once
    trie = tries.build(codes_VQ)
    padded = np.array([excluded + [0] * (6 - len(excluded))], np.int32)
    live = np.array([codes_VQ[i] for i in range(len(codes_VQ)) if i == 0 or i not in excluded])
    dead = dead_nodes(trie, padded)
    assert len(dead) == trie.levels
    for level, dead_BE in enumerate(dead, 1):
        nodes, left = prefixes(codes_VQ, level), prefixes(live, level)
        expected = [n for n, node in enumerate(nodes) if node not in left]
        assert np.asarray(dead_BE)[0].tolist() == expected + [len(nodes)] * (6 - len(expected))
    places = np.asarray(places_of(trie, padded))[0]
    assert set(trie.leaf_items[places[places < trie.items]].tolist()) == set(excluded) - {0}
    assert (np.diff(places[places < trie.items]) > 0).all()


def test_every_item_knows_its_leaf():
    codes_VQ = np.random.default_rng(0).integers(0, 4, (60, 3))
    trie = tries.build(codes_VQ)
    own = np.asarray(tries.leaf_of(trie, jnp.arange(60)))
    assert own[0] == trie.count(3)
    np.testing.assert_array_equal(tries.leaf_codes(trie)[own[1:]], codes_VQ[1:])


def test_many_items_are_a_matter_of_seconds_and_of_memory_in_proportion():
    codes_VQ = np.random.default_rng(0).integers(0, 256, (200_001, 4))
    trie = tries.build(codes_VQ)
    assert trie.sizes == (256,) * 4 and trie.widths[0] == 256
    arrays = (*trie.first, *trie.code, trie.leaf_first, trie.leaf_items, trie.place)
    assert all(x.dtype == np.int32 for x in arrays)
    assert sum(x.nbytes for x in arrays) < 200_000 * 4 * (2 * 4 + 3)


@pytest.mark.parametrize(
    ("codes", "complaint"),
    [
        (np.zeros((1, 3), np.int32), "no items"),
        (np.zeros((0, 3), np.int32), "no items"),
        (np.array([[0, 0], [1, 2], [3, -1]]), r"codes of item 2: \[3, -1\]"),
        (np.array([[0, 0], [1, 2**31]]), r"codes of item 1: \[1, 2147483648\]"),
        (np.zeros((4, 2), np.float32), "expected integers .* found float32"),
        (np.zeros(4, np.int32), r"found int32 \(4,\)"),
        (np.zeros((4, 0), np.int32), r"found int32 \(4, 0\)"),
    ],
)
def test_codes_that_are_no_catalogue_are_refused(codes, complaint):
    with pytest.raises(ValueError, match=complaint):
        tries.build(codes)
