"""Streamed ranking against a plain sort of the whole score matrix."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recscale.layers.kinds import Table
from recscale.layers.norms import l2_normalize
from recscale.layers.ranking import GROUP, SEEN_WINDOW, dot_products, pack_seen, rank_catalogue, top_items
from recscale.layers.tables import Tables
from recscale.mesh import make_mesh


class Task:
    """What ranking asks of a task; hashable, as a static argument must be."""

    catalogue = "item"
    scores = staticmethod(dot_products)

    def __init__(self, item):
        self.item = item


DOT, COSINE = Task(lambda vectors: vectors), Task(l2_normalize)
MESHES = ((1, 1, 1), (1, 8, 1), (1, 2, 4))
_made: dict = {}


def tables_of(spec: Table, mesh=(1, 1, 1)) -> Tables:
    """The same object for the same sizes: it is a static argument, and a new one compiles again."""
    if (spec, mesh) not in _made:
        _made[spec, mesh] = Tables({"item": spec}, make_mesh(*mesh))
    return _made[spec, mesh]


def placed(tables: Tables, values: dict) -> dict:
    """Host values by slot, as the tables store them."""
    return {name: jax.device_put(tables.arrays[name].place(x), tables.sharding(name)) for name, x in values.items()}


def rank(query, target, table, seen=None, *, block, top_k=5, protocols=("full", "unseen"), mesh=(1, 1, 1), task=DOT):
    """rank_catalogue over a table of kind full with these rows."""
    tables = tables_of(Table(len(table) - 1, table.shape[1]), mesh)
    arrays = {"item": jax.device_put(tables.arrays["item"].place(table), tables.sharding("item"))}
    packed = pack_seen(*(np.array([], int), np.array([], int)) if seen is None else seen)
    result = rank_catalogue(
        query, target, packed, arrays, {"item": {}}, tables=tables, task=task, block=block, top_k=top_k,
        protocols=protocols,
    )  # fmt: skip
    return {name: np.asarray(value) for name, value in result.items()}


def plain(query, target, table, seen=None, top_k=5):
    """The same by sorting each row by (score descending, id ascending)."""
    scores = np.einsum("qd,vd->qv", query.astype(np.float64), table[1:])  # equal vectors give equal scores
    gone = np.zeros(scores.shape, bool)
    if seen is not None:
        gone[seen[0], seen[1] - 1] = True
    gone[np.arange(len(target)), target - 1] = False
    high = scores.max(axis=1, keepdims=True)
    lse = high[:, 0] + np.log(np.exp(scores - high).sum(axis=1))
    out = {"log_prob": scores[np.arange(len(target)), target - 1] - lse}
    for name, hidden in (("full", np.zeros_like(gone)), ("unseen", gone)):
        order = [np.lexsort((np.arange(len(row)), -row)) + 1 for row in scores]
        order = [ids[~hidden[q, ids - 1]] for q, ids in enumerate(order)]
        out[f"rank/{name}"] = np.array([1 + ids.tolist().index(t) for ids, t in zip(order, target, strict=True)])
        out[f"top/{name}"] = np.array([np.pad(ids[:top_k], (0, max(0, top_k - len(ids)))) for ids in order])
    return out


def case(kind: str, num_items: int, queries: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    if kind == "random":
        table = rng.normal(size=(num_items + 1, 8)).astype(np.float32)
        query = rng.normal(size=(queries, 8)).astype(np.float32)
    elif kind == "tied":  # few distinct scores, all exact in float32
        table = rng.integers(-1, 2, (num_items + 1, 8)).astype(np.float32)
        query = np.where(np.arange(8)[None] < 3, rng.integers(-1, 2, (queries, 8)), 0).astype(np.float32)
    else:  # "duplicated": real-valued vectors, each shared by many items
        table = rng.normal(size=(5, 8)).astype(np.float32)[rng.integers(0, 5, num_items + 1)]
        query = rng.normal(size=(queries, 8)).astype(np.float32)
    target = rng.integers(1, num_items + 1, queries).astype(np.int32)
    count = 4 * queries
    return query, target, table, (rng.integers(0, queries, count), rng.integers(1, num_items + 1, count))


def check(got, want):
    assert got["finite"].all()
    for name, value in want.items():
        if name == "log_prob":
            np.testing.assert_allclose(got[name], value, atol=2e-5)
        else:
            np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("kind", ["random", "tied", "duplicated"])
@pytest.mark.parametrize(("num_items", "queries", "block"), [(48, 7, 16), (37, 5, 1)])
def test_equals_a_plain_sort(kind: str, num_items: int, queries: int, block: int):
    query, target, table, seen = case(kind, num_items, queries)
    check(rank(query, target, table, seen, block=block), plain(query, target, table, seen))


def test_lists_longer_than_the_catalogue_end_in_zeros():
    query, target, table, seen = case("random", 6, 3)
    got = rank(query, target, table, seen, block=4, top_k=9)
    check(got, plain(query, target, table, seen, top_k=9))
    assert (got["top/full"][:, 6:] == 0).all() and (got["top/full"][:, :6] > 0).all()


@pytest.mark.parametrize("block", [8, 199, 1000])
def test_nothing_depends_on_the_block(block: int):
    query, target, table, seen = case("duplicated", 200, 9)
    check(rank(query, target, table, seen, block=block), plain(query, target, table, seen))


def test_a_constant_on_all_scores_changes_nothing():
    query, target, table, seen = case("tied", 48, 7)
    one = np.ones((len(table), 1), np.float32)
    moved = np.concatenate([query, np.full((7, 1), 64.0, np.float32)], axis=1)
    a = rank(query, target, table, seen, block=16)
    b = rank(moved, target, np.concatenate([table, one], axis=1), seen, block=16)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_renaming_the_items_renames_the_lists_only():
    query, target, table, seen = case("random", 48, 7)
    new_id = np.concatenate([[0], 1 + np.random.default_rng(3).permutation(48)])
    renamed = np.empty_like(table)
    renamed[new_id] = table
    a = rank(query, target, table, seen, block=16)
    b = rank(query, new_id[target].astype(np.int32), renamed, (seen[0], new_id[seen[1]]), block=16)
    for name in ("rank/full", "rank/unseen"):
        np.testing.assert_array_equal(a[name], b[name])
    for name in ("top/full", "top/unseen"):
        np.testing.assert_array_equal(new_id[a[name]], b[name])


def test_the_target_is_never_filtered_and_the_rest_of_the_seen_items_is():
    table = np.array([[0], [5], [4], [3], [2]], np.float32)
    query, target = np.ones((2, 1), np.float32), np.array([3, 3], np.int32)
    got = rank(query, target, table, (np.array([0, 0, 1]), np.array([1, 3, 4])), block=3, top_k=4)
    assert got["rank/full"].tolist() == [3, 3] and got["rank/unseen"].tolist() == [2, 3]
    assert got["top/unseen"].tolist() == [[2, 3, 4, 0], [1, 2, 3, 0]]


def test_many_seen_items_cross_several_windows():
    queries, num_items = 4, 3000
    query, target, table, _ = case("random", num_items, queries)
    pairs = np.random.default_rng(5).permutation(queries * num_items)[: 7 * SEEN_WINDOW + 13]
    seen = (pairs // num_items, 1 + pairs % num_items)
    check(rank(query, target, table, seen, block=700), plain(query, target, table, seen))


def test_log_prob_holds_for_large_scores():
    query, target, table, _ = case("random", 300, 5)
    got = rank(100 * query, target, table, block=64, protocols=(), top_k=0)
    assert set(got) == {"log_prob", "finite"}
    want = plain(100 * query, target, table)["log_prob"]
    np.testing.assert_allclose(got["log_prob"], want, rtol=1e-6, atol=1e-4)


def test_padding_in_front_of_the_table_is_never_ranked():
    query, target, table, _ = case("random", 48, 7)
    table[0] = 1e6 * query.sum(axis=0)
    check(rank(query, target, table, block=16), plain(query, target, table))


def test_non_finite_scores_are_reported_per_row():
    query, target, table, _ = case("random", 48, 7)
    query[2, 3] = np.nan
    assert rank(query, target, table, block=16)["finite"].tolist() == [True, True, False, *4 * [True]]
    query, target, table, _ = case("random", 48, 7)
    table[47] = np.inf  # one item of the last block is enough
    assert not rank(query, target, table, block=16)["finite"].any()
    query, target, table, _ = case("random", 48, 7)
    table[0] = np.nan
    assert rank(query, target, table, block=16)["finite"].all()


def test_compiles_once_for_new_values():
    query, target, table, seen = case("random", 48, 7)
    rank(query, target, table, seen, block=16)
    size = rank_catalogue._cache_size()
    rank(query + 1, target, 2 * table, (seen[0][:3], seen[1][:3]), block=16)
    assert rank_catalogue._cache_size() == size


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["tied", "duplicated"])
def test_the_same_on_every_mesh(mesh, kind: str):
    query, target, table, seen = case(kind, 103, 8)
    check(rank(query, target, table, seen, block=4, mesh=mesh), plain(query, target, table, seen))


@pytest.mark.parametrize(("mesh", "num_items", "block"), [((1, 8, 1), 3, 8), ((1, 2, 4), 1500, 64)])
def test_shards_that_hold_next_to_nothing_and_shards_of_several_blocks(mesh, num_items: int, block: int):
    query, target, table, seen = case("duplicated", num_items, 8)
    check(rank(query, target, table, seen, block=block, mesh=mesh), plain(query, target, table, seen))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 4)])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "tied", "rare", "burst"])
def test_long_lists_over_groups_of_items(mesh, order: str):
    """Blocks of many groups: lists that hardly change from block to block, and lists that change altogether."""
    num_items, block, top_k = 20_000, 128 * GROUP // (1 if mesh == (1, 1, 1) else 8), 40 if mesh == (1, 1, 1) else 5
    query, target, table, seen = case("tied" if order == "tied" else "random", num_items, 6)
    if order in ("rising", "falling"):  # of the first query
        by_score = np.argsort(table[1:] @ query[0], kind="stable")
        table[1:] = table[1:][by_score if order == "rising" else by_score[::-1]]
    if order == "burst":  # one group of the last block fills most of the list
        query = np.abs(query)
        table[19_008:19_040] = 10 + np.abs(table[19_008:19_040])
    if order == "rare":  # few scores above 0, in the first block alone: the list ends within ties of many groups
        rng = np.random.default_rng(7)
        few = (rng.random(len(table)) < 0.02) & (np.arange(len(table)) < 4096)
        table[:, 0], query[:, 1:] = few * rng.integers(1, 4, len(table)), 0
        query[:, 0] = np.arange(1, 7)
    want = plain(query, target, table, seen, top_k)
    check(rank(query, target, table, seen, block=block, top_k=top_k, mesh=mesh), want)
    tables = tables_of(Table(num_items, table.shape[1]), mesh)
    alone = top_items(
        query, pack_seen(*left(seen, target)), placed(tables, {"item": table}), {"item": {}},
        tables=tables, task=DOT, block=block, top_k=top_k,
    )  # fmt: skip
    np.testing.assert_array_equal(alone, want["top/unseen"])


def left(seen, target):
    """Seen pairs without the query's own target."""
    kept = seen[1] != target[seen[0]]
    return seen[0][kept], seen[1][kept]


SPECS = {
    "hashed": (Table(303, 8, "hashed", rows=7, parts=2), DOT),  # 49 different vectors at most
    "pq": (Table(303, 8, "pq", parts=2), COSINE),
    "low_rank": (Table(303, 8, "low_rank", inner=3), COSINE),
}
OTHER_MESHES = [pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[:2]]


@pytest.mark.parametrize("mesh", [(1, 2, 4), *OTHER_MESHES])
@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_table(mesh, name: str):
    spec, task = SPECS[name]
    tables, rng = tables_of(spec, mesh), np.random.default_rng(1)
    values = {
        tables.parts("item")[part]: rng.normal(size=(5, array.dim)).astype(np.float32)[
            rng.integers(0, 5, array.num_rows + 1)  # few different rows: many ids have the same vector
        ]
        for part, array in spec.arrays().items()
    }
    if name == "pq":
        values["item.codes"] = rng.integers(0, 3, (304, 2)).astype(np.uint8)
    mixers = {"item": {"projection": rng.normal(size=(3, 8)).astype(np.float32)} if name == "low_rank" else {}}
    slots = spec.slots(np.arange(304), values["item.codes"] if name == "pq" else None)
    rows = {part: values["item"][where] for part, where in slots.items()} or {"": values["item"]}
    table = np.array(jax.jit(lambda rows, mixer: task.item(spec.compose(rows, mixer)))(rows, mixers["item"]))
    query = rng.normal(size=(8, 8)).astype(np.float32)
    target = rng.integers(1, 304, 8).astype(np.int32)
    seen = rng.integers(0, 8, 40), rng.integers(1, 304, 40)
    got = rank_catalogue(
        query, target, pack_seen(*seen), placed(tables, values), mixers, tables=tables, task=task, block=16, top_k=5
    )
    check(got, plain(query, target, table, seen))


def compiled(num_items: int, mesh, block=4096, queries=64, top_k=100):
    """The compiled program for a table that exists as a shape alone."""
    tables = tables_of(Table(num_items, 64), mesh)
    same = NamedSharding(tables.mesh, PartitionSpec())
    array = jax.ShapeDtypeStruct(tables.arrays["item"].shape, jnp.float32, sharding=tables.sharding("item"))
    query = jax.ShapeDtypeStruct((queries, 64), jnp.float32, sharding=same)
    target = jax.ShapeDtypeStruct((queries,), jnp.int32, sharding=same)
    pairs = jax.ShapeDtypeStruct((SEEN_WINDOW,), jnp.int32, sharding=same)
    return rank_catalogue.lower(
        query, target, (pairs, pairs), {"item": array}, {"item": {}}, tables=tables, task=DOT, block=block, top_k=top_k
    ).compile()


def test_memory_does_not_grow_with_the_catalogue():
    small, large = (compiled(n, (1, 1, 1)).memory_analysis().temp_size_in_bytes for n in (1_000_000, 10_000_000))
    assert large < 1.01 * small < 1_000_000 * 64 * 4 / 10


def test_no_row_moves_between_devices():
    program = compiled(100_000, (1, 2, 4), queries=16, top_k=10).as_text()
    sizes = []
    for result in re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)[\w-]*\(", program):
        sizes += [
            np.prod([int(n) for n in shape.split(",") if n] or [1]) for shape in re.findall(r"\[([\d,]*)\]", result)
        ]
    assert sizes and max(sizes) <= 8 * 16 * 10  # the lists of eight devices


# Queries after the L2 norm and scores as printed by the reference implementation of HSTU; the item table is a formula.
HSTU_QUERIES = [
    [0.149890309, 0.510902450, 0.626289838, 0.445757887, 0.058800404, -0.349449622],
    [-0.509745493, -0.487885963, -0.242293092, 0.111123466, 0.408494698, 0.514008301],
]
HSTU_SCORES = [
    [-0.217433, -0.766108, 0.875523, -0.189837, -0.792354, 0.860236, -0.161826, -0.817313, 0.844353],
    [0.919407, -0.074821, -0.903143, 0.907966, -0.032993, -0.915922, 0.895685, 0.009073, -0.927680],
]


def test_ranking_of_the_hstu_golden_vectors():
    table = 0.4 * np.sin(0.7 * np.arange(1, 61)).reshape(10, 6)
    table[1:] /= np.linalg.norm(table[1:], axis=1, keepdims=True)
    table[0] = 0
    query, table = np.array(HSTU_QUERIES, np.float32), table.astype(np.float32)
    np.testing.assert_allclose(query @ table[1:].T, HSTU_SCORES, atol=2e-6)
    seen = (np.array([0, 0, 0, 0, 1, 1]), np.array([3, 7, 1, 9, 5, 4]))
    got = rank(query, np.array([2, 8], np.int32), table, seen, block=4, top_k=9)
    assert got["top/full"].tolist() == [[3, 6, 9, 7, 4, 1, 2, 5, 8], [1, 4, 7, 8, 5, 2, 3, 6, 9]]
    assert got["top/unseen"].tolist() == [[6, 4, 2, 5, 8, 0, 0, 0, 0], [1, 7, 8, 2, 3, 6, 9, 0, 0]]
    assert got["rank/unseen"].tolist() == [3, 3]
    assert got["rank/full"].tolist() == [7, 4]
