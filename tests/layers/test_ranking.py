"""Streamed ranking against a plain sort of the whole score matrix."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from recscale.layers.ranking import SEEN_WINDOW, pack_seen, rank_catalogue


def vectors_of(tables, ids_N):
    return tables["item"][ids_N]


def rank(query, target, table, seen=None, *, block, top_k=5, protocols=("full", "unseen")):
    packed = pack_seen(*(np.array([], int), np.array([], int)) if seen is None else seen)
    result = rank_catalogue(
        query, target, packed, {"item": table}, item_vectors=vectors_of, num_items=len(table) - 1, block=block,
        top_k=top_k, protocols=protocols,
    )  # fmt: skip
    return {name: np.asarray(value) for name, value in result.items()}


def plain(query, target, table, seen=None, top_k=5):
    """The same by sorting each row by (score descending, id ascending)."""
    scores = (query.astype(np.float64)[:, None] * table[None, 1:]).sum(axis=-1)  # equal vectors give equal scores
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
        table = rng.integers(-1, 2, (num_items + 1, 3)).astype(np.float32)
        query = rng.integers(-1, 2, (queries, 3)).astype(np.float32)
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
@pytest.mark.parametrize(("num_items", "queries", "block"), [(50, 7, 16), (48, 7, 16), (37, 1, 100), (37, 5, 1)])
def test_equals_a_plain_sort(kind: str, num_items: int, queries: int, block: int):
    query, target, table, seen = case(kind, num_items, queries)
    check(rank(query, target, table, seen, block=block), plain(query, target, table, seen))


def test_lists_longer_than_the_catalogue_end_in_zeros():
    query, target, table, seen = case("random", 6, 3)
    got = rank(query, target, table, seen, block=4, top_k=9)
    check(got, plain(query, target, table, seen, top_k=9))
    assert (got["top/full"][:, 6:] == 0).all() and (got["top/full"][:, :6] > 0).all()


@pytest.mark.parametrize("block", [8, 64, 199, 200, 1000])
def test_nothing_depends_on_the_block(block: int):
    query, target, table, seen = case("duplicated", 200, 9)
    check(rank(query, target, table, seen, block=block), plain(query, target, table, seen))


def test_a_constant_on_all_scores_changes_nothing():
    query, target, table, seen = case("tied", 90, 6)
    one = np.ones((len(table), 1), np.float32)
    moved = np.concatenate([query, np.full((6, 1), 64.0, np.float32)], axis=1)
    a = rank(query, target, table, seen, block=32)
    b = rank(moved, target, np.concatenate([table, one], axis=1), seen, block=32)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_renaming_the_items_renames_the_lists_only():
    query, target, table, seen = case("random", 90, 6)
    new_id = np.concatenate([[0], 1 + np.random.default_rng(3).permutation(90)])
    renamed = np.empty_like(table)
    renamed[new_id] = table
    a = rank(query, target, table, seen, block=32)
    b = rank(query, new_id[target].astype(np.int32), renamed, (seen[0], new_id[seen[1]]), block=32)
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
    for block in (num_items, 700):
        check(rank(query, target, table, seen, block=block), plain(query, target, table, seen))


def test_log_prob_holds_for_large_scores():
    query, target, table, _ = case("random", 300, 5)
    got = rank(100 * query, target, table, block=64, protocols=(), top_k=0)
    assert set(got) == {"log_prob", "finite"}
    want = plain(100 * query, target, table)["log_prob"]
    np.testing.assert_allclose(got["log_prob"], want, rtol=1e-6, atol=1e-4)


def test_padding_in_front_of_the_table_is_never_ranked():
    query, target, table, _ = case("random", 20, 4)
    table[0] = 1e6 * query.sum(axis=0)
    check(rank(query, target, table, block=8), plain(query, target, table))


def test_non_finite_scores_are_reported_per_row():
    query, target, table, _ = case("random", 20, 4)
    query[2, 3] = np.nan
    assert rank(query, target, table, block=8)["finite"].tolist() == [True, True, False, True]
    query, target, table, _ = case("random", 20, 4)
    table[19] = np.inf  # one item of the last block is enough
    assert not rank(query, target, table, block=8)["finite"].any()
    query, target, table, _ = case("random", 20, 4)
    table[0] = np.nan
    assert rank(query, target, table, block=8)["finite"].all()


def test_compiles_once_for_new_values():
    query, target, table, seen = case("random", 31, 4)
    rank(query, target, table, seen, block=8)
    size = rank_catalogue._cache_size()
    rank(query + 1, target, 2 * table, (seen[0][:3], seen[1][:3]), block=8)
    assert rank_catalogue._cache_size() == size


def test_rows_of_the_table_may_be_sharded():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    query, target, table, seen = case("duplicated", 103, 8)
    split = jax.device_put(table, NamedSharding(mesh, P("model", None)))
    rows = NamedSharding(mesh, P("data"))
    args = {"block": 32, "top_k": 5, "num_items": 103, "item_vectors": vectors_of, "protocols": ("full", "unseen")}
    with jax.set_mesh(mesh):
        place = jax.device_put((query, target), rows)
        got = rank_catalogue(*place, pack_seen(*seen), {"item": split}, **args)
    check({name: np.asarray(value) for name, value in got.items()}, plain(query, target, table, seen))


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
