"""Policies for items that share their codes, against plain Python; tuples stay as they are when items are added."""

import collections

import numpy as np
import pytest

from recscale.semantic_ids import collisions
from recscale.semantic_ids.catalogue import CodesError
from recscale.semantic_ids.collisions import LastLevel, extend, resolve

SIZES = (4, 3)


def make_codes(items: int = 60, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, size, items) for size in sizes]
    return np.concatenate([np.zeros((1, len(sizes))), np.stack(columns, axis=1)]).astype(np.int32)


def members(codes_VQ: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """Tuple -> its items, ascending: plain Python."""
    found = collections.defaultdict(list)
    for item, row in enumerate(codes_VQ.tolist()):
        if item:
            found[tuple(row)].append(item)
    return dict(found)


def test_buckets_are_those_of_plain_python():
    codes = make_codes()
    bucket, count = collisions.buckets(codes)
    expected = members(codes)
    assert count.tolist() == [len(expected[row]) for row in sorted(expected)]
    assert [sorted(expected).index(tuple(row)) for row in codes[1:].tolist()] == bucket.tolist()


def test_none_changes_nothing_and_counts():
    codes = make_codes()
    found = resolve("none", codes, SIZES)
    assert found.codes_VQ is codes and found.sizes == SIZES
    count = [len(items) for items in members(codes).values()]
    sharing = sum(n for n in count if n > 1)
    expected = {"distinct": len(count), "largest_bucket": max(count), "items_sharing": sharing}
    assert found.facts["before"] == found.facts["after"] == expected


def test_digits_count_a_bucket_in_ascending_id():
    codes = make_codes()
    found = resolve("digit", codes, SIZES)
    for row, items in members(codes).items():
        assert found.codes_VQ[items].tolist() == [[*row, digit] for digit in range(len(items))]
    assert found.sizes == (*SIZES, max(map(len, members(codes).values())))
    assert found.facts["after"] == {"distinct": 60, "largest_bucket": 1, "items_sharing": 0}
    assert not found.codes_VQ[0].any()


def test_random_digits_are_distinct_in_a_bucket_and_follow_the_seed():
    codes = make_codes()
    found = resolve("digit_random", codes, SIZES, maximum=20, seed=3)
    assert found.sizes == (*SIZES, 20) and found.facts["after"]["items_sharing"] == 0
    np.testing.assert_array_equal(found.codes_VQ[:, :2], codes)
    again = resolve("digit_random", codes, SIZES, maximum=20, seed=3)
    np.testing.assert_array_equal(found.codes_VQ, again.codes_VQ)
    assert (resolve("digit_random", codes, SIZES, maximum=20, seed=4).codes_VQ != found.codes_VQ).any()
    alone = resolve("digit_random", make_codes(2000, sizes=(10**6,)), (10**6,), maximum=256)
    assert len(np.unique(alone.codes_VQ[1:, -1])) > 200  # also an item that is alone gets a random value


@pytest.mark.parametrize("policy", ["digit", "digit_random"])
def test_a_bucket_beyond_the_maximum_is_refused(policy):
    codes = make_codes()
    largest = max(map(len, members(codes).values()))
    resolve(policy, codes, SIZES, maximum=largest)
    with pytest.raises(CodesError, match=f"{largest} items share one tuple, a digit has at most {largest - 1} values"):
        resolve(policy, codes, SIZES, maximum=largest - 1)


def nearest(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    return ((x[:, None] - codebook[None]) ** 2).sum(-1).argmin(1).astype(np.int32)


def clouds(seed: int = 0) -> tuple[np.ndarray, LastLevel]:
    """60 items, half of them in 6 clouds around 6 of 32 codes: (codes [V + 1, 2], what the last level needs)."""
    rng = np.random.default_rng(seed)
    codebook = rng.normal(size=(32, 4)).astype(np.float32)
    residual = codebook[rng.integers(0, 6, 61)] + 0.1 * rng.normal(size=(61, 4)).astype(np.float32)
    residual[::2] = rng.normal(size=(31, 4))
    codes = np.stack([rng.integers(0, 4, 61).astype(np.int32), nearest(residual, codebook)], axis=1)
    codes[0] = 0
    return codes, LastLevel(residual, codebook, rounds=10)


def test_sinkhorn_spreads_what_collides():
    codes, last = clouds()
    found = resolve("sinkhorn", codes, (4, 32), last=last)
    before, after = found.facts["before"], found.facts["after_rounds"]
    assert before["items_sharing"] > 25 and after["items_sharing"] < before["items_sharing"] / 4
    assert found.facts["after"]["items_sharing"] == 0 and found.facts["items_moved"] > 10
    np.testing.assert_array_equal(found.codes_VQ[:, 0], codes[:, 0])
    alone = [items[0] for items in members(codes).values() if len(items) == 1]
    once = resolve("sinkhorn", codes, (4, 32), last=last._replace(rounds=1))
    np.testing.assert_array_equal(once.codes_VQ[alone, 1], codes[alone, 1])
    again = resolve("sinkhorn", codes, (4, 32), last=last)
    np.testing.assert_array_equal(found.codes_VQ, again.codes_VQ)


def test_sinkhorn_of_a_bucket_is_that_of_the_formula():
    """One bucket, one round, against the formula in float64."""
    rng = np.random.default_rng(1)
    codebook, residual = rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=(6, 3)).astype(np.float32)
    codes = np.zeros((6, 1), np.int32)
    found = resolve("sinkhorn", codes, (8,), last=LastLevel(residual, codebook, epsilon=0.05, rounds=1))
    d = ((residual[1:, None] - codebook[None]).astype(np.float64) ** 2).sum(-1)
    middle = (d.max() + d.min()) / 2
    q = np.exp(-(d - middle) / (d.max() - middle + 1e-5) / 0.05)
    q /= q.sum()
    for _ in range(50):
        q /= q.sum(axis=1, keepdims=True) * len(q)
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    assert found.codes_VQ[1:, 0].tolist() == q.argmax(axis=1).tolist()
    assert found.facts["rounds"] == 1


def test_equal_vectors_end_with_digits():
    codebook = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    last = LastLevel(np.tile(codebook[2], (6, 1)), codebook)
    found = resolve("sinkhorn", np.array([[0]] + [[2]] * 5, np.int32), (8,), last=last)
    assert len(np.unique(found.codes_VQ[1:, 0])) == 1 and found.codes_VQ[1:, 1].tolist() == [0, 1, 2, 3, 4]
    assert found.facts["rounds"] < 3


@pytest.mark.parametrize("policy", ["digit", "digit_random", "sinkhorn", "none"])
def test_items_are_added_without_touching_the_old_ones(policy):
    codes, last = clouds()
    old = resolve(policy, codes, (4, 32), last=last)
    rng = np.random.default_rng(5)
    learned = old.codes_VQ[1 + rng.integers(0, 60, 40), :2]  # into buckets that exist ...
    learned[:5] = [[1, code] for code in range(27, 32)]  # ... and new ones
    new = extend(policy, old.codes_VQ, old.sizes, learned, seed=9)
    np.testing.assert_array_equal(new.codes_VQ[:61], old.codes_VQ)
    np.testing.assert_array_equal(new.codes_VQ[61:, :2], learned)
    assert (new.codes_VQ.max(axis=0) < new.sizes).all()
    if policy != "none":
        assert new.facts["after"]["items_sharing"] == 0
        more = extend(policy, new.codes_VQ, new.sizes, learned, seed=10)
        np.testing.assert_array_equal(more.codes_VQ[:101], new.codes_VQ)
        assert more.facts["after"]["items_sharing"] == 0


def test_new_items_take_the_smallest_free_digits():
    codes = np.array([[0, 0], [1, 0], [1, 2], [1, 3], [0, 0]], np.int32)
    found = extend("digit", codes, (2, 4), np.array([[1], [1], [0], [1]], np.int32))
    assert found.codes_VQ[5:].tolist() == [[1, 1], [1, 4], [0, 1], [1, 5]]
    assert found.sizes == (2, 6) and found.facts["digit_size"] == 6
    with pytest.raises(CodesError, match="6 items share one tuple, a digit has at most 5 values"):
        extend("digit", codes, (2, 4), np.array([[1], [1], [1]], np.int32), maximum=5)


def test_wrong_input_is_refused():
    codes = make_codes()
    with pytest.raises(CodesError, match="collisions = 'zcr': expected one of none, digit"):
        resolve("zcr", codes, SIZES)
    with pytest.raises(CodesError, match="needs the residuals"):
        resolve("sinkhorn", codes, SIZES)
    with pytest.raises(CodesError, match=r"residuals \[61, 2\] and codebook \[4, 2\], expected \[61, d\] and \[3, d\]"):
        resolve("sinkhorn", codes, SIZES, last=LastLevel(np.zeros((61, 2)), np.zeros((4, 2))))
    with pytest.raises(CodesError, match=r"int64 \[1, 3\], expected int32 \[items, 1\]"):
        extend("digit", codes, SIZES, np.zeros((1, 3), np.int64))
    with pytest.raises(CodesError, match="level 0 has codes"):
        extend("none", codes, SIZES, np.full((1, 2), 9, np.int32))
