"""The code tuples of a catalogue as a prefix trie of integer arrays, and what follows when items are excluded.

Nodes of a level are numbered in lexicographic order of their prefix, so a smaller number is a smaller prefix, and the
children of a node are neighbours. Items are the last generation: those of a leaf are neighbours in `leaf_items`.
Memory: O(items x levels) integers, whatever the size of the codebooks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "code", "leaf_first", "leaf_items", "place"],
    meta_fields=["widths", "sizes"],
)
@dataclasses.dataclass(frozen=True)
class Trie:
    """Prefixes of Q levels. Level 0 is the root, level l holds n_l nodes, level Q the leaves: the distinct tuples.

    first: for l = 0..Q-1 int32 [n_l + 1]: children of node n of level l are nodes first[l][n] : first[l][n + 1] of
    level l + 1. code: for l = 0..Q-1 int32 [n_(l+1)], the code at level l of each of them, ascending among siblings.
    leaf_first: int32 [n_Q + 1] and leaf_items: int32 [V]: items of leaf n are leaf_items[leaf_first[n] :
    leaf_first[n + 1]], ascending. place: int32 [V + 1], where an item stands in leaf_items; V for item 0.
    widths: largest number of children of a node of each level; sizes: 1 + the largest code of each level. Both are
    static: the trie is a pytree, to be handed to a jitted function as an argument.
    """

    first: tuple[Array, ...]
    code: tuple[Array, ...]
    leaf_first: Array
    leaf_items: Array
    place: Array
    widths: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Q, the number of codes of an item."""
        return len(self.first)

    @property
    def items(self) -> int:
        """V, the number of items."""
        return self.leaf_items.shape[0]

    def count(self, level: int) -> int:
        """The number of nodes of a level, 0..Q."""
        return self.leaf_first.shape[0] - 1 if level == self.levels else self.first[level].shape[0] - 1


def build(codes_VQ: np.ndarray) -> Trie:
    """The trie of items 1..V with these codes.

    codes_VQ: integers [V + 1, Q] >= 0; row 0 is padding and is left out. Equal rows share a leaf. Any Q >= 1, any
    codebook size per level. Raises ValueError for another form, no items, or a negative code (an item without codes).
    """
    codes_VQ = np.asarray(codes_VQ)
    if codes_VQ.ndim != 2 or codes_VQ.dtype.kind not in "iu" or not codes_VQ.shape[1]:
        raise ValueError(f"codes: expected integers [items + 1, levels], found {codes_VQ.dtype} {codes_VQ.shape}")
    if len(codes_VQ) < 2:
        raise ValueError(f"codes: found {len(codes_VQ)} rows, expected one for padding and one per item: no items")
    items_VQ = codes_VQ[1:]
    if items_VQ.min() < 0 or items_VQ.max() >= np.iinfo(np.int32).max:
        item = 1 + int(np.argmax(((items_VQ < 0) | (items_VQ >= np.iinfo(np.int32).max)).any(axis=1)))
        raise ValueError(f"codes of item {item}: {items_VQ[item - 1].tolist()}: every item needs codes >= 0 in int32")
    order_V = np.lexsort(items_VQ.T[::-1])  # stable: items of a leaf stay ascending
    sorted_VQ = items_VQ[order_V].astype(np.int32)
    new_V = np.zeros(len(order_V), bool)
    new_V[0] = True
    starts, first, code = np.zeros(1, np.int64), [], []
    for level in range(codes_VQ.shape[1]):
        parents = starts
        new_V[1:] |= sorted_VQ[1:, level] != sorted_VQ[:-1, level]
        starts = np.flatnonzero(new_V)
        first.append(np.append(np.searchsorted(starts, parents), len(starts)).astype(np.int32))
        code.append(sorted_VQ[starts, level])
    place = np.full(len(codes_VQ), len(order_V), np.int32)
    place[order_V + 1] = np.arange(len(order_V), dtype=np.int32)
    return Trie(
        first=tuple(first),
        code=tuple(code),
        leaf_first=np.append(starts, len(order_V)).astype(np.int32),
        leaf_items=(order_V + 1).astype(np.int32),
        place=place,
        widths=tuple(int(np.diff(x).max()) for x in first),
        sizes=tuple(int(x) + 1 for x in items_VQ.max(axis=0)),
    )


def leaf_codes(trie: Trie) -> np.ndarray:
    """The tuples in lexicographic order, int32 [n_Q, Q], on the host."""
    leaves = np.arange(trie.count(trie.levels))
    columns = []
    for level in reversed(range(trie.levels)):
        columns.append(np.asarray(trie.code[level])[leaves])
        leaves = np.searchsorted(np.asarray(trie.first[level]), leaves, side="right") - 1
    return np.stack(columns[::-1], axis=1).astype(np.int32)


def owner(first: Array, child: jax.Array) -> jax.Array:
    """The node to which each child belongs, given the first child of every node; one past the last gives one past."""
    return (jnp.searchsorted(first, child, side="right") - 1).astype(jnp.int32)


def leaf_of(trie: Trie, item: jax.Array) -> jax.Array:
    """The leaf of each item, int32 of the same shape; n_Q, one past the last leaf, for item 0."""
    return owner(trie.leaf_first, jnp.asarray(trie.place)[item])


def places_of(trie: Trie, excluded_BE: Array) -> jax.Array:
    """Distinct places in `leaf_items` of these items, int32 [B, E] ascending, V where there is none.

    excluded_BE: item ids, 0 = none, any order, repeats allowed.
    """
    place_BE = jnp.sort(jnp.asarray(trie.place)[excluded_BE], axis=1)
    again_BE = jnp.pad(place_BE[:, 1:] == place_BE[:, :-1], ((0, 0), (1, 0)))
    return jnp.sort(jnp.where(again_BE, trie.items, place_BE), axis=1)


def dead_nodes(trie: Trie, excluded_BE: Array) -> list[jax.Array]:
    """For levels 1..Q the nodes below which every item is excluded: int32 [B, E] ascending, n_l where there is none.

    A user has no more dead nodes on a level than excluded items: the lists are found from the leaves up at
    O(E log n) a level, and nothing of the size of the catalogue is made.
    """
    below = places_of(trie, excluded_BE)
    dead = []
    for first in (trie.leaf_first, *reversed(trie.first[1:])):
        below = jax.vmap(functools.partial(_whole, jnp.asarray(first)))(below)
        dead.append(below)
    return dead[::-1]


def _whole(first: jax.Array, child_E: jax.Array) -> jax.Array:
    """The nodes whose children are all among these ascending distinct ones; ascending, one past the last for none."""
    owner_E = owner(first, child_E)
    begin_E = jnp.searchsorted(owner_E, owner_E)
    found_E = jnp.searchsorted(owner_E, owner_E, side="right") - begin_E
    size_E = first.at[owner_E + 1].get(mode="clip") - first[owner_E]  # 0 one past the last, which nothing can equal
    whole_E = (found_E == size_E) & (begin_E == jnp.arange(len(owner_E)))
    return jnp.sort(jnp.where(whole_E, owner_E, len(first) - 1))
